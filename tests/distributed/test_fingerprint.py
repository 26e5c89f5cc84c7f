"""Tensors of any kind, told apart by their contents: equal ones are equal, and one other bit is seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from weight_kinds import KINDS, Model, Scaled

from meshdiff.attention.validation import digest
from meshdiff.autoshard.cfg.deferred import OutputForm
from meshdiff.distributed.fingerprint import bits, fingerprint, sha256, sum_of_bits

DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("reduce", [sum_of_bits, sha256])
@pytest.mark.parametrize("name", KINDS)
def test_one_other_value_in_a_weight_of_any_kind_is_seen(name, reduce):
    kind, found = KINDS[name], []
    if not kind.is_installed:
        pytest.skip(f"needs {kind.needs}")
    for spoils in (False, False, True):
        model = Model().requires_grad_(False)
        kind.prepare(model)
        if spoils:
            kind.spoil(model)
        held = [*model.named_parameters(), *model.named_buffers()]
        found.append({name: fingerprint(weight, reduce) for name, weight in held})
    first, again, spoiled = found
    assert again == first
    assert len([name for name in first if spoiled[name] != first[name]]) == 1


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if "quint" not in str(dtype) and "qint" not in str(dtype)])
def test_every_dtype_is_read_however_it_lies_in_memory(dtype):
    storage = torch.arange(24 * 16, dtype=torch.uint8)
    whole = torch.empty(0, dtype=dtype).set_(storage.untyped_storage(), 0, (4, 6), (6, 1))
    ways = [
        lambda: whole,
        lambda: whole.t(),
        lambda: whole[:, 1::2],
        lambda: whole[2, 3],
        lambda: whole[2:3].expand(3, 6),
        lambda: whole[:0],
        lambda: whole.conj() if dtype.is_complex else whole,
    ]
    for way in ways:
        tensor, names = way(), []
        for _ in range(2):
            names.append(fingerprint(tensor, sum_of_bits))
            (entry,) = names[-1]
            assert entry.value[:2] == (tuple(tensor.shape), dtype)
            assert len(entry.value) == 3  # it has been read
            storage[(6 * 2 + 3) * whole.element_size()] += 1  # row 2, place 3
        storage[(6 * 2 + 3) * whole.element_size()] -= 2
        assert (names[0] == names[1]) == (not tensor.numel())


def test_the_order_of_bits_counts_for_inputs():
    assert digest(torch.tensor([1.0, 2.0])) != digest(torch.tensor([2.0, 1.0]))
    assert digest(torch.tensor([[1.0, 2.0], [3.0, 4.0]]).t()) == digest(torch.tensor([[1.0, 3.0], [2.0, 4.0]]))
    assert digest(torch.tensor([1j]).conj()) == digest(torch.tensor([complex(0, -1)])) != digest(torch.tensor([1j]))


def test_tensors_without_values_are_told_apart_by_their_shapes():
    with FakeTensorMode():
        fakes = [torch.empty(2, 3), torch.empty(2, 3), torch.empty(3, 2)]
    metas = [torch.empty(2, 3, device="meta"), torch.empty(2, 3, device="meta"), torch.empty(3, 2, device="meta")]
    for one, same, other in (fakes, metas):
        assert fingerprint(one, sum_of_bits) == fingerprint(same, sum_of_bits) != fingerprint(other, sum_of_bits)
        assert bits(one) == []
    lazy = nn.LazyLinear(3)
    assert len(fingerprint(lazy.weight, sum_of_bits)) == 1


def test_tensors_that_are_not_written_to_any_more_and_those_that_come_later():
    with torch.inference_mode():
        made = torch.arange(3.0)
    expected = fingerprint(torch.arange(3.0), sha256)
    assert fingerprint(made, sha256) == expected
    (deferred,) = OutputForm.of((torch.arange(3.0),)).deferred(lambda: (torch.arange(3.0),))
    assert fingerprint(deferred, sha256) == expected
    assert fingerprint(nn.Parameter(torch.arange(3.0)), sha256) == expected


class Packed(nn.Parameter):
    """With what it takes to unpack it in an attribute, as bitsandbytes has it."""


class State:
    def __init__(self, scale: float) -> None:
        self.scales, self.code, self.device = torch.tensor([1.0, scale]), "nf4", torch.device("cpu")


def packed(scale: float = 2.0, value: int = 1) -> Packed:
    made = Packed(torch.tensor([0, value], dtype=torch.uint8), requires_grad=False)
    made.state = State(scale)
    return made


def test_what_a_tensor_has_among_its_attributes_counts():
    expected = fingerprint(packed(), sum_of_bits)
    assert fingerprint(packed(), sum_of_bits) == expected
    for other in (packed(scale=3.0), packed(value=2), packed().data):
        assert fingerprint(other, sum_of_bits) != expected
    other = packed()
    other.state.code = "fp4"
    assert fingerprint(other, sum_of_bits) != expected
    other.state.code, other.state.device = "nf4", torch.device("meta")  # ranks have devices of their own
    assert fingerprint(other, sum_of_bits) == expected


def test_an_input_of_such_a_class_is_read_by_its_parts():
    inner = torch.arange(6, dtype=torch.int8), torch.tensor(0.5)  # itself, it has no memory that could be read
    expected = digest(Scaled(*inner))
    assert digest(Scaled(*map(Tensor.clone, inner))) == expected
    assert digest(Scaled(inner[0], inner[1] * 2)) != expected


def test_bits_of_a_plain_tensor_are_a_view_of_it():
    tensor = torch.zeros(3)
    (integers,) = bits(tensor)
    tensor[1] = 1.0
    assert integers.flatten().tolist() == [0, 0x3F800000, 0]
