"""Models that keep something between calls or write to what they are given, on ranks that share guidance branches."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_every_rank
from stateful_models import (
    CACHE,
    STEPS,
    Average,
    Cache,
    Counter,
    Global,
    Late,
    OfClass,
    Plain,
    Residual,
    Table,
    X,
    build,
    clip,
    hooked,
    patched,
)
from torch import Tensor, nn

from meshdiff import Layout, init_mesh, simulate
from meshdiff.autoshard import Guidance
from meshdiff.distributed.simulation import unwrap

STATEFUL = [Counter, Cache, Average, Residual, OfClass, Global, patched, hooked, Late]
NAMES = dict(
    zip(
        STATEFUL,
        ["calls", "calls", "average", "last", "OfClass.shared", "KEPT", "forward", "part", "calls"],
        strict=True,
    )
)


def clips(kind: Any, ranks: int) -> list[tuple[Tensor, str]]:
    """Of both batches: a clip on a mesh, and why ranks did all of it."""
    found = []
    for batch in (1, 2):
        model = build(kind)
        guidance = Guidance(model, init_mesh(Layout(cfg=ranks), "cpu")["cfg"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append((clip(model, batch), guidance.fallback))
    return found


def check(kind: Any, found: list[tuple[Tensor, str]]) -> None:
    for batch, (video, why) in zip((1, 2), found, strict=True):
        assert torch.equal(video, clip(build(kind), batch)), batch
        assert why.startswith("keeps something from one call to the next ("), why
        assert NAMES[kind] in why


@torch.no_grad()
@pytest.mark.parametrize("kind", STATEFUL)
def test_a_model_that_keeps_state_is_right(kind):
    with simulate(2):
        found = [(unwrap(video), why) for video, why in clips(kind, 2)]
    check(kind, found)


@torch.no_grad()
def test_what_a_model_keeps_by_shape_is_no_state():
    with simulate(2):
        found = [(unwrap(video), why) for video, why in clips(Table, 2)]
        model = Table()
        guidance = Guidance(model, init_mesh(Layout(cfg=2), "cpu")["cfg"])
        for length in (2, 3, 4):
            given = X[0][:1, :length]
            assert torch.equal(unwrap(model(given)[0]), Table()(given)[0])
        assert not guidance.fallback
    assert [why for _, why in found] == ["", ""]
    assert all(torch.equal(video, clip(Table(), batch)) for batch, (video, _) in zip((1, 2), found, strict=True))


class Streams(Plain):
    """Writes to a cache that its caller owns."""

    def forward(self, hidden_states, cache, at):
        cache[:, at] = hidden_states.mean(1)
        return (hidden_states + cache.sum(1, keepdim=True),)


class StreamsLater(Plain):
    """Only from some step on."""

    def forward(self, hidden_states, cache, at):
        if at > 2:
            cache[:, at] = hidden_states.mean(1)
        return (hidden_states + cache.sum(1, keepdim=True),)


def stream(model: nn.Module, batch: int) -> Tensor:
    cache, outputs = CACHE[:batch].clone(), []
    for at in range(STEPS):
        first, second = (model(hidden_states=x[:batch] + at, cache=cache, at=at)[0] for x in X)
        outputs += [first + 0, second + 0]
    return torch.stack([*outputs, cache.sum(1, keepdim=True).expand(-1, 5, -1)])


WRITERS = [Streams, StreamsLater]


def streams(kind: type[Plain]) -> list[Tensor]:
    found = []
    for batch in (1, 2):
        model = kind()
        Guidance(model, init_mesh(Layout(cfg=2), "cpu")["cfg"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(stream(model, batch))
    return found


@torch.no_grad()
@pytest.mark.parametrize("kind", WRITERS)
def test_a_model_that_writes_to_what_it_is_given_is_right(kind):
    with simulate(2):
        found = [unwrap(video) for video in streams(kind)]
    assert all(torch.equal(video, stream(kind(), batch)) for batch, video in zip((1, 2), found, strict=True))


class Chunks(Plain):
    """Takes the batch apart, which no rank that has one of its rows can."""

    def forward(self, hidden_states):
        first, second, third = hidden_states.chunk(3)
        return (torch.cat([first, second, third * 0.5]),)


class Lists(Plain):
    """Takes a list of images, whose channels are as many as other things are long."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, images, embedding):
        return [self.linear(image.movedim(0, -1)) + embedding.mean() for image in images]


class OneRankRaises(Plain):
    """On rank 1 alone, in a call that is not the first."""

    def forward(self, hidden_states):
        if hidden_states.abs().max() > 100 and dist.get_rank() == 1:
            raise ValueError("broken on purpose")
        return (hidden_states * 2,)


class Appends(Plain):
    """To a list of its caller."""

    def forward(self, hidden_states, cache):
        cache.append(hidden_states.mean())
        return (hidden_states + sum(cache),)


class Draws(Plain):
    """From the generator that everything draws from."""

    def forward(self, hidden_states):
        return (hidden_states + torch.rand(()),)


class Twice(Plain):
    """Is given one tensor under two names."""

    def forward(self, hidden_states, other):
        return (hidden_states * (3 if other is hidden_states else 2),)


def appended(model: nn.Module) -> Tensor:
    cache: list[Tensor] = []
    outputs = [model(hidden_states=x[:1], cache=cache)[0] + 0 for _ in range(3) for x in X]
    return torch.stack([*outputs, torch.full_like(outputs[0], len(cache))])


def drawn(model: nn.Module) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return clip(model, 1)


def given_twice(model: nn.Module) -> Tensor:
    return torch.stack([model(hidden_states=x[:1], other=x[:1])[0] + 0 for _ in range(3) for x in X])


def given_one_twice(model: nn.Module) -> Tensor:
    rows = [x[:1] for x in X]
    return torch.stack([sum(model(hidden_states=row, other=row)[0] for row in rows) for _ in range(3)])


OTHERS: list[tuple[type[Plain], Callable[[nn.Module], Tensor]]] = [
    (Appends, appended),
    (Draws, drawn),
    (Twice, given_twice),
    (Twice, given_one_twice),
]


def used_by_one_rank(model: nn.Module) -> str:
    """Rank 0 alone reads an output between the calls of a step, once."""
    try:
        for step in range(STEPS):
            first = model(hidden_states=X[0][:1])[0]
            if step == 3 and dist.get_rank() == 0:
                float(first.mean())
            first + model(hidden_states=X[1][:1])[0]
    except RuntimeError as error:
        return str(error)
    return ""


GUESSES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "chunks": (Chunks, {"hidden_states": torch.arange(60.0).view(3, 5, 4)}),
    "lists": (Lists, {"images": [torch.ones(4, 3, 2), torch.ones(4, 2, 2) * 2], "embedding": torch.arange(4.0)}),
}


def guess(name: str, model: nn.Module) -> list[Tensor]:
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [tensor + 0 for _ in range(3) for tensor in model(**GUESSES[name][1])]


def make(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GUESSES[name][0]()


def guessed(name: str) -> list[Tensor]:
    model = make(name)
    Guidance(model, init_mesh(Layout(cfg=2), "cpu")["cfg"])
    return guess(name, model)


@torch.no_grad()
def on_this_rank() -> dict[str, Any]:
    """All of the above on real ranks, and one rank that raises alone."""
    found: dict[str, Any] = {kind.__name__: clips(kind, dist.get_world_size()) for kind in STATEFUL}
    found |= {kind.__name__: streams(kind) for kind in WRITERS}
    found |= {name: guessed(name) for name in GUESSES}
    for kind, use in OTHERS:
        model = kind()
        Guidance(model, init_mesh(Layout(cfg=2), "cpu")["cfg"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[use.__name__] = use(model)
    model = Plain()
    Guidance(model, init_mesh(Layout(cfg=2), "cpu")["cfg"])
    found["used"] = used_by_one_rank(model)
    model = OneRankRaises()
    Guidance(model, init_mesh(Layout(cfg=2), "cpu")["cfg"])
    for batch in (1, 2):
        try:
            clip(model, batch)
        except (RuntimeError, ValueError) as error:
            found[f"raises {batch}"] = str(error)
    return found


def test_real_ranks_are_right_as_well(tmp_path):
    for rank, found in enumerate(run_on_every_rank(on_this_rank, 2, tmp_path, timeout=200)):
        with torch.no_grad():
            for kind in STATEFUL:
                check(kind, found[kind.__name__])
            for kind in WRITERS:
                videos = zip((1, 2), found[kind.__name__], strict=True)
                assert all(torch.equal(video, stream(kind(), batch)) for batch, video in videos)
            for name in GUESSES:
                assert all(map(torch.equal, found[name], guess(name, make(name))))
        with torch.no_grad():
            for kind, use in OTHERS:
                assert torch.equal(found[use.__name__], use(kind())), use.__name__
        assert found["used"].startswith("ranks of cfg do not call the model alike: one of them used an output")
        alone = "OneRankRaises raised on rank 1 of this mesh and not on all: broken on purpose"
        for batch in (1, 2):
            assert found[f"raises {batch}"] == ("broken on purpose" if rank == 1 else alone)
