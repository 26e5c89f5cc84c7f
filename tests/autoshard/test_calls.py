"""What a model does from one call to the next, and what torch refuses: as on one device, in every call."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_every_rank
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from untouched_cases import CHANNELS, values

from meshdiff import Layout, init_mesh, parallelize, simulate
from meshdiff.attention.problem import chunk_sizes
from meshdiff.autoshard.numerics import difference
from tests.autoshard.test_parallelize import Joint

SEQ = 7


class Tokens(nn.Module):
    """Two blocks that do one thing to `hidden`, of which one layer was made."""

    def __init__(self, body) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = nn.ModuleList([Block(body), Block(body)])

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


class Block(nn.Module):
    def __init__(self, body) -> None:
        super().__init__()
        self.attn_in, self.attn_out, self.body = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, CHANNELS), body

    def forward(self, hidden: Tensor) -> Tensor:
        return self.attn_out(self.body(self, hidden, self.attn_in(hidden)))


def view_of_bits(block, x, y):
    return y + (y > 0).float().view(torch.int32).float() / 1e9


def operands_by_name(block, x, y):
    return torch.add(y, other=x) + torch.mul(input=y, other=x) + torch.where(condition=x > 0, input=y, other=x)


def written_to_what_is_given(block, x, y):
    made = torch.empty_like(x)
    torch.add(x, y, out=made)
    return torch.mul(made, 0.5, out=made)


def rows_until_there_are_none(block, x, y):
    total = torch.zeros_like(x[:, 0])
    for i in range(50):
        try:
            total = total + x[:, i] * (i + 1)
        except IndexError:
            break
    return y + total.unsqueeze(1)


def place_in_memory(block, x, y):
    _, last = (y * 1).chunk(2, dim=0)
    return y + last.storage_offset()


def kept_from_the_last_call(block, x, y):
    last, block.kept = getattr(block, "cached", y), (y * 2)[:, 2:5]
    return y + last.mean(1, keepdim=True)


def heads_without_a_transpose(block, x, y):
    heads = y.unflatten(-1, (3, -1))
    return F.scaled_dot_product_attention(heads, heads, heads).flatten(2)


def own_rows_of_what_was_cut(block, x, y):
    y = y * 1
    cut, flat = y[:, 2:5], y.flatten(1)
    y[..., ::2] = x[..., 1::2] * 2
    return y + cut.mean(1, keepdim=True) + flat.mean()


def own_rows(block, x, y):
    made, turned = torch.empty_like(y), y.unflatten(-1, (-1, 2))
    made[..., ::2] = turned[..., 0]
    made[..., 1::2] = x[..., 1::2]
    made[:, :, 3:5] = y[:, :, :2]
    made[..., 7] = 0.5
    return made


def own_rows_that_were_joined(block, x, y):
    y = y * 1
    joined = torch.cat([y[:, 3:], x[:, :3]], dim=1)
    y[..., ::2] = x[..., 1::2]
    return y + joined


def own_rows_that_may_be_cut(block, x, y):
    y = y * 1
    cut = y[:, 2:5] if getattr(block, "cuts", False) else x
    y[..., ::2] = x[..., 1::2]
    return y + cut.mean(1, keepdim=True)


def writes_if_asked(block, x, y):
    z = F.silu(y)
    F.silu(y, inplace=True)
    return F.relu(y) + z + F.relu(x * 1, inplace=True)


def norms_and_dropout(block, x, y):
    weight = block.attn_in.bias
    y = F.dropout(F.layer_norm(y, (CHANNELS,), weight, bias=weight), 0.5, False)
    return (
        F.rms_norm(x, (CHANNELS,), weight=weight, eps=1e-3) + torch.rms_norm(y, (CHANNELS,)) + F.dropout(y, 0.0, True)
    )


def norms_while_rows_wait(block, x, y):
    cut = (y * 2)[:, 2:5]
    # Of two dtypes, torch makes it of operations some of which write to what others made.
    normed = F.rms_norm(y, (CHANNELS,), weight=block.attn_in.bias.bfloat16(), eps=1e-3)
    return normed + cut.mean(1, keepdim=True)


def dropout_of_none_and_of_some(block, x, y):
    torch.manual_seed(0)
    return F.dropout(y, 0.0, True) + F.dropout(x * 1, 0.5, True) + F.dropout(y, 0.25, True) * F.dropout(x, 0.5, False)


def pairs_of_turned_heads(block, x, y):
    pairs = torch.view_as_complex(y.unflatten(-1, (3, -1, 2)).transpose(1, 2))
    assert not pairs.is_contiguous()
    turned = torch.view_as_real(pairs * 1j)
    assert not turned.is_contiguous()
    return y + turned.contiguous().view(len(y), -1).mean() + pairs.contiguous().view(len(y), -1).real.mean()


class Twice(Tensor):
    """A weight of another class, which stands for twice its values."""

    @staticmethod
    def __new__(cls, values):
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values):
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*(arg.values * 2 if isinstance(arg, cls) else arg for arg in args), **(kwargs or {}))


def weights_of_another_class(block, x, y):
    return F.linear(x, Twice(block.attn_in.weight.detach())) + F.layer_norm(
        y * Twice(block.attn_in.bias.detach()), (CHANNELS,), Twice(block.attn_in.bias.detach())
    )


BODIES = [view_of_bits, operands_by_name, written_to_what_is_given, rows_until_there_are_none, place_in_memory,
          kept_from_the_last_call, heads_without_a_transpose, own_rows_of_what_was_cut, own_rows,
          own_rows_that_were_joined, writes_if_asked, norms_and_dropout, dropout_of_none_and_of_some,
          norms_while_rows_wait, pairs_of_turned_heads, weights_of_another_class]  # fmt: skip


CALLS = [torch.randn(2, SEQ, CHANNELS, generator=torch.Generator().manual_seed(i)) for i in range(5)]
"""What the calls of a test are given."""


@pytest.fixture(autouse=True)
def without_gradients():
    """What has been found out about operations is done again only without them."""
    with torch.no_grad():
        yield


def on_mesh(ranks: int):
    return init_mesh(Layout(cp=ranks), "cpu")["cp"]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_every_call_is_that_of_one_device(body, ranks):
    model = Tokens(body).requires_grad_(False)
    alone, given = copy.deepcopy(model), CALLS
    expected = [alone(hidden.clone()) for hidden in given]
    with simulate(ranks):
        parallel = parallelize(model, on_mesh(ranks))
        for hidden, one in zip(given, expected, strict=True):
            (found,) = values(parallel(hidden))
            assert difference(found, one) <= 1e-5


def test_complex_views_lie_in_memory_as_on_one_device():
    model = Tokens(pairs_of_turned_heads).requires_grad_(False)
    with simulate(2):
        parallel = parallelize(model, on_mesh(2))
        parallel(CALLS[0])
        assert not parallel.replicated_kinds  # else a view that one device has has failed


def on_this_rank() -> tuple[dict[str, float], int, int]:
    """Errors of models that are called several times; FLOPs of a later call as counted, and as expected."""
    mesh, errors = init_mesh(Layout(cp=dist.get_world_size()), "cpu")["cp"], {}
    torch.manual_seed(0)
    models = {body.__name__: (Tokens(body), [(hidden,) for hidden in CALLS]) for body in BODIES}
    models |= {
        f"joint {change}": (Joint(change), [(hidden, hidden[:, :5] * 2) for hidden in CALLS])
        for change in ("", "source", "join", "view")
    }
    with torch.no_grad():
        for name, (model, calls) in models.items():
            expected = [copy.deepcopy(model)(*(tensor.clone() for tensor in call)) for call in calls]
            if "cached" in name:  # by one model, from call to call
                alone = copy.deepcopy(model)
                expected = [alone(*call) for call in calls]
            parallel = parallelize(model, mesh)
            found = [parallel(*call) for call in calls]
            errors[name] = max(difference(*pair) for pair in zip(found, expected, strict=True))
        model = Tokens(lambda block, x, y: y)
        parallel = parallelize(model, mesh)
        for hidden in CALLS:
            with FlopCounterMode(display=False) as counter:
                parallel(hidden)
    batch, length, channels = CALLS[0].shape
    rows = batch * chunk_sizes(length, mesh.size())[mesh.get_local_rank()]
    return errors, counter.get_total_flops(), 4 * 2 * rows * channels * channels


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_call_is_that_of_one_device_on_real_ranks_too(ranks, tmp_path):
    results = run_on_every_rank(on_this_rank, ranks, tmp_path)
    for rank, (errors, counted, expected) in enumerate(results):
        assert {name: error for name, error in errors.items() if not error <= 1e-5} == {}, rank
        assert counted == expected, rank


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_write_that_would_miss_a_copy_from_some_call_on_is_noticed_then(ranks):
    model = Tokens(own_rows_that_may_be_cut).requires_grad_(False)
    with simulate(ranks):
        parallel = parallelize(model, on_mesh(ranks))
        for hidden in CALLS[:3]:
            parallel(hidden)
        for block in model.blocks:
            block.cuts = True
        with pytest.raises(RuntimeError, match="writes to memory that a view of it"):
            parallel(CALLS[3])
        (found,) = values(parallel(CALLS[3]))
    parallel.remove()
    assert difference(found, model(CALLS[3])) <= 1e-5


def test_an_error_in_between_leaves_nothing_half_done():
    def body(block, x, y):
        last, block.kept = getattr(block, "cached", y), (y * 2)[:, 2:5]
        if block.fails:
            raise KeyError("its own")
        return y + last.mean(1, keepdim=True)

    model, expected = Tokens(body).requires_grad_(False), []
    alone = copy.deepcopy(model)
    with simulate(2):
        handles = [alone, parallelize(model, on_mesh(2))]
        for i in range(5):
            for one in (alone, model):
                one.blocks[0].fails, one.blocks[1].fails = False, i == 2
            for handle in handles:
                try:
                    expected.append(values(handle(CALLS[i].clone()))[0])
                except KeyError:
                    expected.append(torch.ones(1))
            assert difference(expected.pop(), expected.pop()) <= 1e-5


@pytest.mark.parametrize(
    "refused",
    [
        lambda x: x.narrow(1, 3, 9),
        lambda x: x.narrow(1, 20, 2),
        lambda x: x[:, SEQ + 2],
        lambda x: torch.cat([x, x], 4),
        lambda x: torch.cat([x, x[:1]], 1),
        lambda x: x.split(2, 4)[0],
        lambda x: torch.view_as_real(x),
        lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], torch.ones(1, 1, 1, SEQ).double()),
    ],
)
def test_what_torch_refuses_is_refused(refused):
    model = Tokens(lambda block, x, y: y + refused(y).mean()).requires_grad_(False)
    with pytest.raises((RuntimeError, IndexError)) as alone:
        model(CALLS[0].clone())
    with simulate(2):
        parallel = parallelize(model, on_mesh(2))
        for _ in range(2):
            with pytest.raises(type(alone.value)):
                parallel(CALLS[0].clone())


@dataclass(frozen=True, slots=True)
class Output:
    sample: Tensor
    others: list[Tensor]


class Several(Tokens):
    def forward(self, hidden: Tensor) -> Output:
        made = super().forward(hidden)
        return Output(made, [made, made + 1])


def test_outputs_are_plain_in_any_dataclass_and_one_tensor_is_one():
    model = Several(lambda block, x, y: y).requires_grad_(False)
    expected = model(CALLS[0].clone())
    with simulate(2):
        output = parallelize(model, on_mesh(2))(CALLS[0].clone())
        assert output.sample is output.others[0]
        found = [values(tensor)[0] for tensor in (output.sample, output.others[1])]
    assert difference(found, [expected.sample, expected.others[1]]) <= 1e-5
