"""Forwards that others replace, and copies, of models on a mesh; as on one device."""

from __future__ import annotations

import copy
import os
import pickle
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload
from accelerate.hooks import CpuOffload, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from ranks import run_on_every_rank
from torch import Tensor, nn

from experiments.tiny_models.transformers import TINY
from meshdiff import Layout, init_mesh, simulate
from meshdiff import parallelize as parallelize_module
from meshdiff.autoshard.numerics import difference
from meshdiff.autoshard.patching import Interception, owners
from meshdiff.distributed.simulation import unwrap
from meshdiff.integrations.diffusers import parallelize

NAME = "WanTransformer3DModel"


def model() -> nn.Module:
    return TINY[NAME].build()


def arguments(number: int = 1) -> dict[str, Any]:
    given = TINY[NAME].arguments(1)
    return {k: v[:1] + number / 10 if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}


def calls(module: nn.Module, count: int = 6) -> Tensor:
    """Steps of two calls, the outputs of each used together."""
    outputs = []
    for step in range(count):
        with cached(module):
            pair = [module(**arguments(step + n), return_dict=False)[0] for n in range(2)]
        outputs.append(pair[0] + 3 * pair[1])
    return torch.stack(outputs)


def cached(module: nn.Module) -> Any:
    return module.cache_context("it")


def first_block_cache(module: nn.Module) -> None:
    module.enable_cache(FirstBlockCacheConfig(threshold=0.3))


def layerwise_casting(module: nn.Module) -> None:
    module.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def accelerate_hook(module: nn.Module) -> None:
    add_hook_to_module(module, CpuOffload(execution_device=torch.device("cpu")))


def sequential_offload(module: nn.Module) -> None:
    cpu_offload(module, execution_device=torch.device("cpu"))


def monkey_patch(module: nn.Module) -> None:
    own = module.forward
    module.forward = lambda *args, **kwargs: (own(*args, **kwargs)[0] * 1.5,)


def of_block(module: nn.Module) -> None:
    own = module.blocks[0].forward
    module.blocks[0].forward = types.MethodType(
        lambda self, *args, **kwargs: own(*args, **kwargs) * 1.5, module.blocks[0]
    )


PATCHES = [first_block_cache, layerwise_casting, accelerate_hook, sequential_offload, monkey_patch, of_block]


def of_patches() -> dict[str, tuple[float, float, str]]:
    """By patch, mesh, order and capture: the error on the mesh, after remove(), and why it was not captured."""
    found = {}
    for patch in PATCHES:
        expected_model = model()
        patch(expected_model)
        expected = calls(expected_model)
        for layout in (Layout(cp=2), Layout(cfg=2)):
            for after in (False, True):
                for capture in (False, True):
                    patched = model()
                    if not after:
                        patch(patched)
                    parallel = parallelize(patched, init_mesh(layout, "cpu"), capture=capture)
                    if after:
                        patch(patched)
                    error = difference(calls(patched), expected)
                    told = " ".join(parallel.captured().values())
                    parallel.remove()
                    if patch is first_block_cache:
                        patched.disable_cache(), first_block_cache(patched)
                    key = f"{patch.__name__} {layout} {'after' if after else 'before'} {capture}"
                    found[key] = error, difference(calls(patched), expected), told
    return found


def scaling(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: (forward(self, *args, **kwargs)[0] * 1.5,)


def of_classes() -> dict[str, float]:
    """The forward of the class is patched, before and after, by either name of the class."""
    found = {}
    cls = type(model())
    for when in ("before", "after", "after, by type()"):
        for layout in (Layout(cp=2), Layout(cfg=2)):
            own, patched = cls.forward, model()
            scaled = scaling(own)
            if when == "before":
                cls.forward = scaled
            parallelize(patched, init_mesh(layout, "cpu"))
            if when != "before":
                named = type(patched) if "type" in when else patched.__class__
                named.forward = scaled
            expected = calls(model())
            found[f"{when} {layout}"] = difference(calls(patched), expected)
            cls.forward = own
    return found


def of_checks() -> list[str]:
    """What every rank hears with MESHDIFF_CHECK=1 if rank 1 is given something else in its ninth step, by layout."""
    heard = []
    for layout in (Layout(cp=2), Layout(cfg=2)):
        for change in (
            lambda module, given: given["hidden_states"].add_(1),
            lambda module, given: bias(module).add_(1),
        ):
            module = model()
            parallelize(module, init_mesh(layout, "cpu"))
            calls(module, 9)
            given = arguments()
            if dist.get_rank() == 1:
                change(module, given)
            os.environ["MESHDIFF_CHECK"] = "1"
            try:
                heard.append(str(module(**given, return_dict=False)[0].shape))
            except ValueError as error:
                heard.append(str(error))
            del os.environ["MESHDIFF_CHECK"]
    return heard


def bias(module: nn.Module) -> Tensor:
    return next(parameter for name, parameter in module.named_parameters() if name.endswith("bias"))


def of_noise() -> list[str]:
    """What a rank hears whose second step starts from other noise than that of the other rank, by layout."""
    heard = []
    for layout in (Layout(cp=2), Layout(cfg=2)):
        module = model()
        parallelize(module, init_mesh(layout, "cpu"))
        calls(module, 1)
        try:
            given = arguments()
            given["hidden_states"] = given["hidden_states"] + dist.get_rank()
            module(**given, return_dict=False)[0] + 0
            heard.append("nothing")
        except ValueError as error:
            heard.append(str(error))
    return heard


def of_inference() -> dict[str, float]:
    """Inputs, and weights, that were made in inference mode, in calls outside of it and inside."""
    found = {}
    for layout in (Layout(cp=2), Layout(cfg=2)):
        for inside in (False, True):
            with torch.inference_mode():
                given, module = arguments(), model()
            plain = model()
            parallelize(module, init_mesh(layout, "cpu"))
            with torch.inference_mode() if inside else torch.no_grad():
                outputs = [module(**given, return_dict=False)[0] + 0 for _ in range(4)]
                expected = plain(**arguments(), return_dict=False)[0]
            found[f"{layout} {inside}"] = max(difference(output, expected) for output in outputs)
    return found


@torch.no_grad()
def on_this_rank() -> dict[str, Any]:
    warnings.simplefilter("ignore")
    return {
        "patches": of_patches(),
        "classes": of_classes(),
        "checks": of_checks(),
        "noise": of_noise(),
        "inference": of_inference(),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    return run_on_every_rank(on_this_rank, 2, tmp_path_factory.mktemp("patches"))


def test_patches_of_others_are_what_they_are_on_one_device(ranks):
    for found in ranks:
        for key, (error, removed, told) in found["patches"].items():
            assert error <= 1e-5, key
            assert removed <= 1e-6, key
            if key.endswith("True"):
                assert told.startswith("Not captured: "), (key, told)
                assert "has a forward of its own" in told or "runs replicated" in told or "hooks" in told, (key, told)


def test_a_patch_of_the_class_counts_before_and_after(ranks):
    for found in ranks:
        assert {key: round(error, 4) for key, error in found["classes"].items()} == dict.fromkeys(found["classes"], 0.0)


def test_ranks_are_compared_in_every_call_where_that_is_asked_for(ranks):
    for found in ranks:
        for line, what in zip(found["checks"], ["inputs", "weights"] * 2, strict=True):
            assert line.startswith(f"{NAME} has other {what} on rank 1 of this mesh than on rank 0"), line


def test_other_noise_is_told_in_the_step_after_it_was_drawn(ranks):
    for found in ranks:
        for line in found["noise"]:
            assert line.startswith(f"{NAME} has other inputs on rank 1 of this mesh than on rank 0"), line


def test_what_was_made_in_inference_mode_is_taken(ranks):
    for found in ranks:
        assert max(found["inference"].values()) <= 1e-5


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0), requires_grad=False)

    def forward(self, x: Tensor, returns: str = "tuple") -> Any:
        x = x * self.factor
        return {"tuple": (x,), "tensor": x, "output": Transformer2DModelOutput(sample=x)}[returns]


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_is_a_model_of_its_own(copied):
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with simulate(2), torch.no_grad():
        parallel = parallelize_module(module, init_mesh(Layout(cp=2), "cpu")["cp"], blocks=["0"])
        other = copied(module)
        assert type(other) is nn.Sequential
        if copied is not copy.copy:  # which shares the parts
            assert not [*owners(other)]
            other[0].weight.data.zero_(), other[1].weight.data.zero_(), other[1].bias.data.zero_()
            assert other(torch.ones(1, 4)).abs().max() == 0
        assert unwrap(module(torch.ones(1, 4))).abs().max() > 0
        parallel.remove()
        assert type(module) is nn.Sequential
        assert type(module[0]) is nn.Linear


def test_what_is_on_a_mesh_is_not_compiled():
    with simulate(2):
        module = nn.Sequential(nn.Linear(4, 4))
        parallelize_module(module, init_mesh(Layout(cp=2), "cpu")["cp"])
        with pytest.raises(RuntimeError, match=r"compile\(\) cannot trace it, .* instead: .*capture=torch.compile\)$"):
            module.compile()
    with intercepted(nn.Linear(4, 4)) as linear, torch.no_grad():  # torch.compile goes around it
        assert torch.equal(torch.compile(linear, backend="eager")(torch.ones(1, 4)), linear(torch.ones(1, 4)))


@contextmanager
def intercepted(module: nn.Module) -> Iterator[nn.Module]:
    interception = Interception(module, lambda inner, args, kwargs: inner(*args, **kwargs))
    yield module
    interception.remove()


def test_forwards_that_come_and_go_are_never_lost():
    heard: list[str] = []

    def around(inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        heard.append("mesh")
        return inner(*args, **kwargs)

    module, x = nn.Linear(2, 2), torch.ones(1, 2)
    add_hook_to_module(module, CpuOffload(execution_device=torch.device("cpu")))
    interception = Interception(module, around)
    for change in (
        lambda: None,
        lambda: remove_hook_from_module(module),
        lambda: add_hook_to_module(module, CpuOffload(execution_device=torch.device("cpu"))),
        lambda: remove_hook_from_module(module),
        lambda: vars(module).pop("forward"),
        lambda: setattr(module, "__class__", type("Other", (nn.Linear,), {})),
    ):
        change()
        heard.clear()
        module(x), module.forward(x)
        assert heard == ["mesh", "mesh"]
    interception.remove()
    heard.clear()
    module(x)
    assert not heard
    assert module.__class__.__name__ == type(module).__name__ == "Other"
