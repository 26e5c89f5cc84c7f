"""How far outputs are apart, and what is told where an output is not a number: in which of the two."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor
from unseen import unseen
from untouched_cases import Model, inputs

import meshdiff.autoshard.lazy
from meshdiff import Layout, init_mesh, parallelize, simulate
from meshdiff.autoshard import Guidance
from meshdiff.autoshard.numerics import difference, has_numbers, not_numbers, one_sided, tolerance

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1, 2], [1, 2], 0),
        ([1, NAN], [1, NAN], 0),
        ([NAN, NAN], [NAN, NAN], 0),
        ([1, INF], [1, INF], 0),
        ([-INF, 2], [-INF, 2], 0),
        ([NAN, 3], [NAN, 2], 0.5),
        ([INF, 3], [INF, 2], 0.5),
        ([1, NAN], [1, 2], INF),
        ([1, 2], [1, NAN], INF),
        ([1, INF], [1, 2], INF),
        ([1, 2], [INF, 2], INF),
        ([INF, 2], [-INF, 2], INF),
        ([INF, 2], [NAN, 2], INF),
        ([NAN, 1], [INF, 1], INF),
        ([1, 2, 3], [1, 2], INF),
        ([], [], 0),
    ],
)
def test_what_is_no_number_on_both_sides_is_equal(one, other, expected, dtype):
    own, others = torch.tensor(one, dtype=dtype), torch.tensor(other, dtype=dtype)
    fine = torch.ones(2)
    for output, wanted in (([own], [others]), ([fine, own], [fine, others]), ([own, fine], [others, fine])):
        assert difference(output, wanted) == pytest.approx(expected, abs=0)


def test_words_for_outputs_that_are_no_numbers():
    numbers, some = torch.ones(4), torch.tensor([1, NAN, -INF, INF])
    assert not_numbers([numbers]) == ""
    assert not_numbers([numbers, some]) == "1 NaN and 2 infinite of 8 values"
    assert one_sided([some], [some], "x") == ""
    assert one_sided([some], [numbers], "x") == "gives NaN where x does not"
    assert one_sided([numbers], [some], "x") == "gives no NaN where x does"
    assert one_sided([some], [some.nan_to_num(2, 2, 2).where(~some.isnan(), some)], "x") == (
        "gives infinities where x does not"
    )
    assert [has_numbers(output) for output in ([numbers * NAN], [numbers * NAN, some], [], [torch.ones(2).int()])] == [
        False,
        True,
        True,
        True,
    ]
    assert tolerance(torch.ones(2, dtype=torch.complex128)) == tolerance(torch.ones(2, dtype=torch.float64))


class Overflows(Model):
    """Gives NaN in the rows of which the input asks for it."""

    def forward(self, hidden_states: Tensor, text: Tensor) -> Tensor:
        return super().forward(hidden_states, text) * torch.where(hidden_states[..., :1] > 0, NAN, 1.0)


class ByRows(torch.nn.Module):
    """Gives NaN in one row of a batch, whatever is in the others."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = unseen(rows=[])

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        self.seen.get().rows.append(len(hidden_states))
        return (hidden_states.log(),)


def test_a_batch_is_shared_out_though_the_model_gives_nan_in_places():
    given = torch.tensor([[[1.0, 2.0]], [[-1.0, 3.0]]])
    model, expected = ByRows(), given.log()
    with simulate(2), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        Guidance(model, init_mesh(Layout(cfg=2), "cpu")["cfg"])
        for _ in range(2):
            assert difference(model(given)[0], expected) == 0
    assert model.seen.get().rows == [2, 1, 1]  # the second time only the own row


def verified(model: torch.nn.Module) -> None:
    given = inputs()
    with simulate(2):
        parallelize(model.requires_grad_(False), init_mesh(Layout(cp=2), "cpu")["cp"], verify=True)(**given)


def test_verify_says_that_the_model_itself_gives_nan():
    with pytest.warns(UserWarning, match=r"verify: the untouched Overflows itself returns \d+ NaN of 168 values"):
        verified(Overflows())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        verified(Model())


def test_verify_says_that_only_the_mesh_gives_nan(monkeypatch):
    real = meshdiff.autoshard.lazy.exchange_into

    def broken(sources, outputs, dim, into):
        real(sources, outputs, dim, into)
        for output in into:
            output.to_local().mul_(NAN)

    monkeypatch.setattr(meshdiff.autoshard.lazy, "exchange_into", broken)
    with pytest.raises(RuntimeError, match="verify: Model on this mesh gives NaN where the untouched model does not"):
        verified(Model())
