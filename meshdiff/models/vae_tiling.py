"""Decoding of latents on every rank of a mesh: the picture is cut into tiles, and each rank decodes some.

A causal video decoder carries state from frame to frame, so time cannot be cut
exactly; the picture can, into tiles that overlap and are blended. The cut and
the order of blending, and so the result, are those of
`AutoencoderKLWan.tiled_decode` in diffusers 0.42, which decodes one tile after
the other in one process.

Sizes here are in latents, and in *decoded* pixels: those that leave the
decoder. A VAE with `config.patch_size` p (Wan2.2 5B) spreads the channels of
each of them over p x p pixels of the video, after blending.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from meshdiff.distributed.simulation import on_each_rank, unwrap
from meshdiff.errors import InputError

__all__ = ["VideoVAE", "check_tile", "deal", "decode"]

# torch 2.13 renamed it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class VideoVAE(Protocol):
    """The public attributes of diffusers' `AutoencoderKLWan` that `decode` needs.

    Attributes:
        config: has `out_channels`, `patch_size` (None for 1) and `temperal_downsample`
            (for each level, True if it halves the frames).
        spatial_compression_ratio: pixels of the video along each side of a latent.
        post_quant_conv: function applied to latents before the decoder.
        decoder: called as `decoder(latents, feat_cache=list, feat_idx=[0],
            first_chunk=bool)` with one latent frame after the other.
    """

    config: Any
    spatial_compression_ratio: int
    post_quant_conv: Callable[[Tensor], Tensor]
    decoder: nn.Module


@torch.no_grad()
def decode(
    vae: VideoVAE, latents: Tensor, mesh: DeviceMesh, tile: int = 256, overlap: int = 64, on_host: bool = False
) -> Tensor:
    """Decode a latent video, its tiles divided between all ranks of `mesh`.

    Every rank must call it. Nothing is sent if the picture fits in one tile:
    every rank then decodes it by itself. Otherwise there is one all-gather on each
    mesh dim that has more than one rank, in which every rank sends as much as the
    rank with most to decode. Ranks wait for that one: the time-out of the process
    group has to cover its decoding.

    Args:
        vae: a plain module, replicated on all ranks, on the device of `latents`.
        latents: `[batch, z_dim, frames, height, width]`, plain, the same on every
            rank; the VAE's mean and std have been applied.
        mesh: of any dims; all of its ranks decode.
        tile: pixels along each side of a tile; 0 decodes the picture in one piece.
        overlap: pixels that neighbouring tiles share.
        on_host: copy decoded frames to host memory at once, and exchange and blend
            tiles there (ranks of a CUDA mesh then use the CPU backend that
            `init_distributed` starts). The device then holds the weights, the latents
            and the memory for decoding one tile. Otherwise it also holds the video and
            every rank's tiles, which are about twice as large as the video.

    Returns:
        `[batch, channels, frames, height, width]` in [-1, 1], plain, the same on
        every rank, of the type of `latents`; in host memory if `on_host`.

    Raises:
        InputError: if tiles of that size and overlap are not possible.
    """
    grid = _grid(vae, latents, tile, overlap)
    if len(grid.tiles) == 1:
        return unwrap(_blend_all(_decode_own(vae, latents, grid, [[0]], on_host), grid, [[0]]))
    dealt = deal([len(rows) * len(columns) for rows, columns in grid.tiles], mesh.size())
    place = [mesh.get_local_rank(dim) for dim in range(mesh.ndim)]
    gathered = _gather(_decode_own(vae, latents, grid, dealt, on_host, mesh.shape, place), mesh)
    return unwrap(_blend_all(gathered, grid, dealt))


def check_tile(ratio: int, tile: int = 256, overlap: int = 64) -> None:
    """Raise `InputError` unless a tile of so many pixels is made of whole latents, of `ratio` pixels a side."""
    if tile and not (0 <= overlap < tile and tile % ratio == overlap % ratio == 0):
        raise InputError(
            "--tile",
            f"{tile} with an overlap of {overlap}: both must be multiples of {ratio} pixels and the overlap smaller, "
            f"like {32 * ratio} with {8 * ratio}; 0 decodes the picture whole",
        )


def deal(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Divide items between ranks so that none has much more to do than another.

    The costliest item comes first, and each goes to the rank with the least cost so
    far: the largest sum is at most a third above the optimum (Graham, Bounds on
    multiprocessing timing anomalies, 1969). Every rank gets the same result, as ties
    go to the first rank.

    Returns:
        The indices of the items of each rank; none for some if there are few items.
    """
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        rank = loads.index(min(loads))
        dealt[rank].append(item)
        loads[rank] += costs[item]
    return dealt


@dataclass(frozen=True)
class _Grid:
    """The division of the picture into tiles.

    Attributes:
        rows, columns: the latents of each row and of each column of tiles.
        shape: `(batch, channels, frames, height, width)` of the full video, decoded.
        scale: decoded pixels along each side of a latent.
        overlap: decoded pixels that neighbours share.
        patch: pixels of the video along each side of a decoded one.
    """

    rows: tuple[range, ...]
    columns: tuple[range, ...]
    shape: tuple[int, ...]
    scale: int
    overlap: int
    patch: int

    @property
    def tiles(self) -> list[tuple[range, range]]:
        return list(product(self.rows, self.columns))

    def tile_shape(self, tile: int) -> tuple[int, ...]:
        """`(batch, channels, frames, height, width)` of a tile, decoded."""
        rows, columns = self.tiles[tile]
        return *self.shape[:3], self.scale * len(rows), self.scale * len(columns)


def _grid(vae: VideoVAE, latents: Tensor, tile: int, overlap: int) -> _Grid:
    ratio, patch = vae.spatial_compression_ratio, vae.config.patch_size or 1
    check_tile(ratio, tile, overlap)
    batch, _, frames, height, width = latents.shape
    size, shared = tile // ratio, overlap // ratio
    if tile == 0 or max(height, width) <= size:
        size, shared = max(height, width), 0
    scale = ratio // patch
    frames = 1 + (frames - 1) * 2 ** sum(vae.config.temperal_downsample)
    return _Grid(
        rows=_spans(height, size, size - shared),
        columns=_spans(width, size, size - shared),
        shape=(batch, vae.config.out_channels, frames, height * scale, width * scale),
        scale=scale,
        overlap=shared * scale,
        patch=patch,
    )


def _spans(length: int, size: int, stride: int) -> tuple[range, ...]:
    """Ranges of `size` that start every `stride`, cut off at the end; the last ones may lie inside another."""
    return tuple(range(start, min(start + size, length)) for start in range(0, length, stride))


def _room(grid: _Grid, dealt: list[list[int]]) -> int:
    """Number of elements in the tiles of the rank that has most."""
    return max(sum(math.prod(grid.tile_shape(tile)) for tile in tiles) for tiles in dealt)


def _views(buffer: Tensor, grid: _Grid, tiles: list[int]) -> dict[int, Tensor]:
    """The tiles that lie one after the other in a flat buffer, which may be longer."""
    shapes = [grid.tile_shape(tile) for tile in tiles]
    sizes = [math.prod(shape) for shape in shapes]
    parts = buffer[: sum(sizes)].split(sizes)
    return {tile: part.view(shape) for tile, part, shape in zip(tiles, parts, shapes, strict=True)}


@on_each_rank
def _decode_own(
    vae: VideoVAE,
    latents: Tensor,
    grid: _Grid,
    dealt: list[list[int]],
    on_host: bool,
    mesh_shape: Sequence[int] = (),
    place: Sequence[int] = (),
) -> Tensor:
    """The tiles of the rank that is at `place` in the mesh, in a flat buffer with room for any rank's."""
    rank = 0
    for size, own in zip(mesh_shape, place, strict=True):
        rank = rank * size + own
    buffer = latents.new_empty(_room(grid, dealt), device="cpu" if on_host else None)
    for tile, decoded in _views(buffer, grid, dealt[rank]).items():
        rows, columns = grid.tiles[tile]
        _decode_tile(vae, latents[..., rows.start : rows.stop, columns.start : columns.stop], decoded)
    return buffer


def _decode_tile(vae: VideoVAE, latents: Tensor, decoded: Tensor) -> None:
    """Decode the latents of a tile, frame by frame, into a tensor that may be on another device."""
    # A slot for each causal convolution, for the frames it needs again; that there are more does not matter.
    cache = [None] * sum(1 for _ in vae.decoder.modules())
    start = 0
    for frame in vae.post_quant_conv(latents).split(1, dim=2):
        frames = vae.decoder(frame, feat_cache=cache, feat_idx=[0], first_chunk=start == 0)
        decoded[:, :, start : start + frames.shape[2]] = frames
        start += frames.shape[2]


def _gather(own: Tensor, mesh: DeviceMesh) -> Tensor:
    """Every rank's flat buffer, one after the other in the order of ranks."""
    for dim in reversed(range(mesh.ndim)):
        if mesh.size(dim) > 1:
            gathered = own.new_empty(mesh.size(dim) * own.numel())
            _all_gather(gathered, own, group=mesh.get_group(dim))
            own = gathered
    return own


@on_each_rank
def _blend_all(buffer: Tensor, grid: _Grid, dealt: list[list[int]]) -> Tensor:
    """The video made of the tiles in every rank's buffer, which are changed in place."""
    tiles: dict[int, Tensor] = {}
    for part, own in zip(buffer.split(_room(grid, dealt)), dealt, strict=True):
        tiles |= _views(part, grid, own)
    video = buffer.new_empty(grid.shape)
    across = len(grid.columns)
    for tile, (rows, columns) in enumerate(grid.tiles):
        current = tiles[tile]
        if tile >= across:
            _blend(tiles[tile - across], current, grid.overlap, dim=3)
        if tile % across:
            _blend(tiles[tile - 1], current, grid.overlap, dim=4)
        # Later tiles cover what they share with this one, which has been blended into them.
        top, left = grid.scale * rows.start, grid.scale * columns.start
        video[..., top : top + current.shape[3], left : left + current.shape[4]] = current
    video = rearrange(video, "b (c pw ph) f h w -> b c f (h ph) (w pw)", ph=grid.patch, pw=grid.patch)
    return video.clamp_(-1, 1)


def _blend(before: Tensor, after: Tensor, overlap: int, dim: int) -> None:
    """Fade the last of `before` along `dim` into the first of `after`, in place."""
    extent = min(before.shape[dim], after.shape[dim], overlap)
    shape = [extent if i == dim else 1 for i in range(after.ndim)]
    weight = (torch.arange(extent, device=after.device) / max(extent, 1)).view(shape)
    end, start = before.narrow(dim, before.shape[dim] - extent, extent), after.narrow(dim, 0, extent)
    start.copy_(end * (1 - weight) + start * weight)
