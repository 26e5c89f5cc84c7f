from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import torch
from diffusers import AutoencoderKLWan
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_on_every_rank

from meshdiff import CommsCounter, InputError, Layout, init_mesh, simulate
from meshdiff.distributed.simulation import on_each_rank
from meshdiff.models import vae_tiling
from meshdiff.models.vae_tiling import deal, decode

TOLERANCE = 1e-5
SIDE, SHARED = 8, 2  # latents along a tile, and of an overlap
Size = tuple[int, int, int]  # frames, height and width, in latents
SIZE = (2, 13, 9)
AREAS = [8 * 8, 8 * 3, 7 * 8, 7 * 3, 1 * 8, 1 * 3]  # of its tiles; the last row lies inside the one before
MOST = {1: sum(AREAS), 2: 64 + 21 + 3, 3: 64, 4: 64, 6: 64}  # of them on one rank, of so many
PAIR = (2, 9, 4)  # two tiles, 8 x 4 and 3 x 4


@cache
@torch.no_grad()
def tiny_vae(patch: int = 1) -> AutoencoderKLWan:
    """Wan2.1's VAE, or with a patch Wan2.2's; few channels, random weights, made so large that some pixels clip."""
    torch.manual_seed(0)
    channels = 3 * patch**2
    newer = {"is_residual": True, "patch_size": patch, "scale_factor_spatial": 8 * patch} if patch > 1 else {}
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        in_channels=channels,
        out_channels=channels,
        **newer,
    )
    vae.decoder.conv_out.weight.mul_(2)
    return vae


def latents(frames: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(1, 4, frames, height, width, generator=torch.Generator().manual_seed(0))


@cache
@torch.no_grad()
def by_diffusers(size: Size = SIZE, patch: int = 1, tiled: bool = True) -> torch.Tensor:
    vae = tiny_vae(patch)
    side, stride = (n * vae.spatial_compression_ratio for n in (SIDE, SIDE - SHARED))
    if tiled:
        vae.enable_tiling(side, side, stride, stride)
    video = vae.decode(latents(*size), return_dict=False)[0]
    vae.disable_tiling()
    return video


def decoded(layout: Layout, latents: torch.Tensor, patch: int = 1, tile: int | None = None, on_host: bool = False):
    """A video and what was sent; run it inside `simulate` or on real ranks."""
    vae, mesh = tiny_vae(patch), init_mesh(layout, "cpu")
    side, shared = (n * vae.spatial_compression_ratio for n in (SIDE, SHARED))
    with CommsCounter(mesh) as comms:
        video = decode(vae, latents, mesh, side if tile is None else tile, shared, on_host)
    return video, comms.as_dict()


def simulated(layout: Layout, size: Size = SIZE, **options):
    z = latents(*size)
    with simulate(layout.world_size):
        return decoded(layout, z, **options)


def traffic(layout: Layout, most: int, patch: int = 1) -> dict:
    """One all-gather a mesh dim of as much as the `most` latents on one rank make."""
    share = most * 5 * 3 * (8 * patch) ** 2 * 4  # of 5 frames, 3 channels, in float32
    sent = {"cfg": share * layout.cp * (layout.cfg - 1), "cp": share * (layout.cp - 1)}
    return {dim: {"all_gather": {"count": 1, "bytes": nbytes}} for dim, nbytes in sent.items() if nbytes}


def agree(video: torch.Tensor, expected: torch.Tensor) -> bool:
    assert type(video) is torch.Tensor
    assert video.shape == expected.shape
    return (video - expected).abs().max().item() <= TOLERANCE


@pytest.mark.parametrize(
    ("layout", "patch", "on_host"),
    [
        (Layout(1, 1), 1, False),
        (Layout(2, 1), 2, False),
        (Layout(1, 3), 1, True),
        (Layout(2, 3), 1, False),
        (Layout(2, 3), 2, True),
    ],
    ids=str,
)
def test_simulated_ranks_agree_with_diffusers_and_each_decodes_its_own(layout, patch, on_host):
    expected = by_diffusers(patch=patch)
    assert 0.01 < (expected.abs() == 1).float().mean() < 0.3
    areas = []
    watch = tiny_vae(patch).post_quant_conv.register_forward_pre_hook(
        lambda _, inputs: areas.append(inputs[0][0, 0, 0].numel())
    )
    video, comms = simulated(layout, patch=patch, on_host=on_host)
    watch.remove()
    assert not video.requires_grad
    assert agree(video, expected)
    assert sorted(areas) == sorted(AREAS)
    assert comms == traffic(layout, MOST[layout.world_size], patch)


def on_this_rank() -> list[tuple[Layout, torch.Tensor, dict]]:
    """The decoded video and what was sent, on two layouts."""
    return [(layout, *decoded(layout, latents(*SIZE))) for layout in (Layout(2, 2), Layout(1, 4))]


def test_real_ranks_agree_with_diffusers(tmp_path):
    for of_layouts in run_on_every_rank(on_this_rank, 4, tmp_path):
        for layout, video, comms in of_layouts:
            assert agree(video, by_diffusers())
            assert comms == traffic(layout, MOST[4])


def test_ranks_may_have_no_tile():
    video, comms = simulated(Layout(2, 3), PAIR)
    assert agree(video, by_diffusers(PAIR))
    assert comms == traffic(Layout(2, 3), 8 * 4)


@pytest.mark.parametrize("broken_rank", [0, 1])
def test_what_one_rank_decodes_wrongly_shows(broken_rank, monkeypatch):
    decode_own = vae_tiling._decode_own

    @on_each_rank
    def disturb(own: torch.Tensor, rank: int) -> torch.Tensor:
        return own * 1.01 if rank == broken_rank else own

    def decode_badly(*args):
        *_, (_, rank) = args
        return disturb(decode_own(*args), rank)

    monkeypatch.setattr(vae_tiling, "_decode_own", decode_badly)
    video, _ = simulated(Layout(1, 2), PAIR)
    assert not agree(video, by_diffusers(PAIR))


@pytest.mark.parametrize(("size", "tile"), [((2, SIDE, SIDE), None), (SIZE, 0)], ids=["one-tile", "no-tiles"])
def test_a_whole_picture_sends_nothing(size, tile):
    video, comms = simulated(Layout(1, 2), size, tile=tile)
    assert agree(video, by_diffusers(size, tiled=False))
    assert comms == {}


@pytest.mark.parametrize(("tile", "overlap"), [(60, 16), (64, 12), (64, 64), (64, -8), (-64, 16)])
def test_tiles_that_cannot_be(tile, overlap):
    with simulate(1), pytest.raises(InputError, match=f"^--tile: {tile} with an overlap of {overlap}: .* of 8 pixels"):
        decode(tiny_vae(), latents(*SIZE), init_mesh(Layout(), "cpu"), tile, overlap)


def loads(costs: list[int], dealt: list[list[int]]) -> list[int]:
    return [sum(costs[item] for item in own) for own in dealt]


def least_possible(costs: list[int], ranks: int) -> int:
    """The largest load in the best of all ways to deal."""
    ways = {(0,) * ranks}
    for cost in costs:
        ways = {tuple(sorted((*way[:i], way[i] + cost, *way[i + 1 :]))) for way in ways for i in range(ranks)}
    return min(map(max, ways))


@given(costs=st.lists(st.integers(1, 100), max_size=7), ranks=st.integers(1, 4))
def test_deal_gives_every_item_once_and_nobody_much_more(costs, ranks):
    dealt = deal(costs, ranks)
    assert len(dealt) == ranks
    assert sorted(item for own in dealt for item in own) == list(range(len(costs)))
    assert 3 * max(loads(costs, dealt)) <= 4 * least_possible(costs, ranks)


@pytest.mark.parametrize(
    ("rows", "columns", "ranks", "largest"),
    [
        ([32, 32, 12], [32, 32, 32, 32, 8], 8, 32 * 32 + 12 * 32),  # 480 x 832: 8 full tiles of 15
        ([32, 32, 32, 18], [32] * 6 + [16], 16, 2 * 32 * 32),  # 720 x 1280: 18 full tiles of 28
    ],
)
def test_deal_balances_the_tiles_of_common_videos(rows, columns, ranks, largest):
    costs = [height * width for height, width in product(rows, columns)]
    assert max(loads(costs, deal(costs, ranks))) == largest
