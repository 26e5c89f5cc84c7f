"""Calls of a guided step that are put off: what the caller does in between is never lost, and never silently wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ranks import run_on_every_rank
from torch import Tensor, nn

from meshdiff import Layout, init_mesh, simulate
from meshdiff.autoshard import Guidance
from meshdiff.distributed.simulation import unwrap

CHANGED = "the first of which had not run yet; look at its output before changing the model, or use a mesh without cfg"


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(4, 4), 1.0

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.linear(hidden_states) * self.scale


class Processor:
    def __init__(self) -> None:
        self.backend = "native"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = nn.ModuleList([Scaled()])
        self.shift = nn.Buffer(torch.zeros(1))
        self.scales = {"style": [1.0]}
        self.processor, self.missing = Processor(), None
        self.table = torch.ones(4)

    def forward(self, hidden_states: Tensor, extra: object = None, returns: str = "tuple") -> object:
        if self.processor.backend != "native":
            hidden_states = hidden_states * 5
        if extra == 13.0:
            raise TypeError("no such thing")
        if extra == 14.0:
            raise ValueError("no such value")
        hidden_states = self.blocks[0](hidden_states) * self.scales["style"][0] * self.table + self.shift
        if returns == "number":
            return hidden_states, float(hidden_states.sum())
        return {"sample": hidden_states} if returns == "dict" else (hidden_states,)


X, Y = torch.randn(2, 1, 5, 4, generator=torch.Generator().manual_seed(1)).unbind()


def with_change(change: Callable[[Model], object]) -> Callable[[Model], Tensor]:
    def step(model: Model) -> Tensor:
        first = model(X)[0]
        change(model)
        return first + 2 * model(Y)[0]

    return step


def another_processor(model: Model) -> None:
    del model.processor  # whose place in memory the next one may get
    model.processor = Processor()


def seeded_block() -> Scaled:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return Scaled()


CHANGES: dict[str, Callable[[Model], object]] = {
    "blocks.0.scale": lambda model: setattr(model.blocks[0], "scale", 3.0),
    "blocks.0.linear.weight": lambda model: model.blocks[0].linear.weight.mul_(2),
    "values of weights": lambda model: model.blocks[0].linear.weight.data.mul_(2),
    "blocks.0.linear.bias": lambda model: setattr(model.blocks[0].linear, "bias", None),
    "shift": lambda model: model.shift.add_(1),
    "blocks.0.linear._forward_hooks": lambda model: model.blocks[0].linear.register_forward_hook(lambda *args: None),
    "blocks.0": lambda model: model.blocks.insert(0, seeded_block()),
    "scales": lambda model: model.scales["style"].__setitem__(0, 2.0),
    "processor": another_processor,
    "backend": lambda model: setattr(model.processor, "backend", "flash"),
    "table": lambda model: model.table.mul_(3),
    "new": lambda model: setattr(model, "new", None),
    "training": lambda model: model.eval(),
}


WRITES = {"blocks.0.linear.weight", "values of weights", "shift", "table"}
"""Of what was written to there is no copy; everything else can be put back."""


def of_change(what: str) -> str | Tensor:
    """What a step returns, or raises, in which the model is changed between two calls."""
    model = guided(2)
    try:
        return with_change(CHANGES[what])(model) + 0
    except RuntimeError as error:
        assert (model(X)[0] + model(Y)[0]).shape == X.shape  # the next step is as ever
        return str(error)


def check_changes(found: dict[str, str | Tensor]) -> None:
    for what, outcome in found.items():
        if what in WRITES:
            assert outcome == f"Model was changed ({what}) between the calls of a guided step, {CHANGED}"
        else:
            assert isinstance(outcome, Tensor), outcome
            assert torch.equal(outcome, with_change(CHANGES[what])(Model())), what


@torch.no_grad()
def test_a_model_that_changes_within_a_step_is_run_as_it_was_or_is_one_line():
    with simulate(2):
        found = {what: of_change(what) for what in CHANGES}
        check_changes({what: unwrap(out) if isinstance(out, Tensor) else out for what, out in found.items()})


@torch.no_grad()
def test_a_model_that_is_changed_in_every_step_is_no_longer_deferred():
    def set_scale(scale: float) -> Callable[[Model], object]:
        return lambda model: setattr(model.blocks[0], "scale", scale)

    def steps(model: Model) -> list[Tensor]:
        return [unwrap(with_change(set_scale(float(n)))(model) + 0) for n in range(5)]

    with simulate(2):
        model = guided(2)
        with pytest.warns(UserWarning, match=r"is changed between the calls of a step \(blocks.0.scale\)"):
            found = steps(model)
    assert all(map(torch.equal, found, steps(Model())))


def guided(ranks: int, warm: bool = True) -> Model:
    model = Model()
    Guidance(model, init_mesh(Layout(cfg=ranks), "cpu")["cfg"])
    if warm:  # calls of a kind are deferred once one has shown what they return
        for extra in ((), (1.0,)):
            model(X, *extra)
    return model


def looked_before(model: Model) -> Tensor:
    first = model(X)[0] + 0
    model.blocks[0].scale = 3.0
    return first + 2 * model(Y)[0]


def set_to_the_same(model: Model) -> Tensor:
    return with_change(lambda model: setattr(model.blocks[0], "scale", float("1.0")))(model)


def dropped_before(model: Model) -> Tensor:
    model(X)  # to warm up
    model.blocks[0].scale = 3.0
    return model(X)[0] + 2 * model(Y)[0]


def under_autocast(model: Model) -> Tensor:
    model.shift, model.table = nn.Buffer(model.shift.bfloat16()), model.table.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        first, second = (model(value)[0] for value in (X, Y))
    third = model(X)[0]
    assert (first.dtype, second.dtype, third.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    return first + 2 * second.float() + third


def autocast_once(model: Model) -> Tensor:
    model.shift, model.table = nn.Buffer(model.shift.bfloat16()), model.table.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        first = model(X)[0]
    second = model(Y)[0]
    assert (first.dtype, second.dtype) == (torch.bfloat16, torch.float32)
    return first + 2 * second


def gradients_at_the_look(model: Model) -> Tensor:
    first = model(X)[0]
    with torch.enable_grad():
        assert not first.requires_grad
    return first


def inference_at_the_look(model: Model) -> Tensor:
    first = model(X)[0]
    with torch.inference_mode():
        assert not first.is_inference()
    return first


def second_raises(model: Model) -> Tensor:
    first = model(X)[0]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(Y[..., :3])
    return first * 2 + model(Y)[0]


def first_raises(model: Model) -> Tensor:
    first = model(X, 14.0)
    second = model(Y, 1.0)[0]
    for _ in range(2):
        with pytest.raises(ValueError, match="no such value"):
            first[0] + 0
    return second * 2


def second_raises_alone(model: Model) -> Tensor:
    first = model(X, 1.0)[0]
    with pytest.raises(ValueError, match="no such value"):
        model(Y, 14.0)
    return first * 2


def raises_type_error(model: Model) -> Tensor:
    first = model(X, 13.0)[0]
    with pytest.raises(RuntimeError, match="the call that was to compute this tensor failed: no such thing"):
        first * 2
    return X


def returns_unlike(model: Model) -> Tensor:
    total = torch.zeros(())
    for _ in range(2):
        first, second = model(X), model(Y, returns="dict")
        total = total + first[0] + 2 * second["sample"]
    return total


def returns_numbers(model: Model) -> Tensor:
    first, second = (model(value, returns="number") for value in (X, Y))
    return torch.tensor([first[1], second[1]])


def is_a_tuple(model: Model) -> Tensor:
    first = model(X)
    assert isinstance(first, tuple)
    return first[0]


STEPS = [
    looked_before,
    set_to_the_same,
    dropped_before,
    under_autocast,
    autocast_once,
    gradients_at_the_look,
    inference_at_the_look,
    second_raises,
    second_raises_alone,
    first_raises,
    raises_type_error,
    returns_unlike,
    returns_numbers,
    is_a_tuple,
]
ONLY_ON_RANKS = {returns_numbers}  # of which a simulation has none of each rank's own
NOT_ON_ONE_DEVICE = {first_raises: lambda model: model(Y)[0] * 2, raises_type_error: lambda _: X}
ONLY_DEFERRED = {
    second_raises_alone,
    *NOT_ON_ONE_DEVICE,
}  # of which one device, and the first call of a kind, raises at once


@torch.no_grad()
def expected(step: Callable[[Model], Tensor]) -> Tensor:
    return NOT_ON_ONE_DEVICE.get(step, step)(Model())


@pytest.mark.filterwarnings("ignore:.*does not return tensors alone")
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("step", [step for step in STEPS if step not in ONLY_ON_RANKS])
def test_a_step_gives_what_one_device_gives(step, warm):
    if step in ONLY_DEFERRED:
        warm = True
    with simulate(2), torch.no_grad():
        found = unwrap(step(guided(2, warm)))
    assert torch.equal(found, expected(step))


def test_a_step_gives_what_one_device_gives_on_real_ranks(tmp_path):
    for of_rank in run_on_every_rank(on_this_rank, 2, tmp_path, timeout=120):
        steps = of_rank.pop("steps")
        assert {step.__name__: torch.equal(steps[step.__name__], expected(step)) for step in STEPS} == {
            step.__name__: True for step in STEPS
        }
        check_changes(of_rank)


@torch.no_grad()
def test_other_shapes_than_before_are_right():
    def step(model: Model) -> Tensor:
        with_change(lambda model: None)(model)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model.blocks[0].linear, model.table = nn.Linear(4, 6), torch.ones(6)
        return with_change(lambda model: None)(model)

    with simulate(2):
        assert torch.equal(unwrap(step(guided(2)) + 0), step(Model()))


@pytest.mark.parametrize("replaced", [False, True])
def test_a_model_has_its_own_forward_back(replaced):
    with simulate(2):
        model = nn.Linear(4, 4)
        own = model.forward
        if replaced:
            model.forward = own
        before = dict(vars(model))
        guidance = Guidance(model, init_mesh(Layout(cfg=2), "cpu")["cfg"])
        with torch.no_grad():
            waiting = [model(X) for _ in range(2)][1]
        guidance.remove()
        assert vars(model) == before
        assert type(model) is nn.Linear
        assert torch.equal(unwrap(waiting[0] + 0), model(X)[0])


def test_inputs_that_need_gradients_are_not_put_off():
    with simulate(2):
        model = guided(2).requires_grad_(False)
        x = X.clone().requires_grad_()
        assert type(model(x)) is tuple


def test_a_pipeline_is_on_a_mesh_as_a_whole_or_not_at_all():
    from diffusers import DiffusionPipeline

    from meshdiff.integrations.diffusers import parallelize

    class Pair(DiffusionPipeline):
        def __init__(self) -> None:
            self.transformer, self.transformer_2 = Model(), Model()

    pair = Pair()
    with simulate(4):
        mesh = init_mesh(Layout(cfg=2, cp=2), "cpu")
        alone = parallelize(pair.transformer_2, mesh)
        with pytest.raises(ValueError, match="Model or a part of it is on a mesh already"):
            parallelize(pair, mesh)
        assert type(pair.transformer) is Model
        assert type(pair.transformer_2) is not Model  # which was on the mesh and stays there
        alone.remove()
        assert type(pair.transformer_2) is Model
        assert parallelize(pair, mesh).guidance.keys() == {"transformer", "transformer_2"}


@torch.no_grad()
def on_this_rank() -> dict[str, object]:
    found: dict[str, object] = {"steps": {step.__name__: step(guided(2)) + 0 for step in STEPS}}
    return found | {what: of_change(what) for what in CHANGES}
