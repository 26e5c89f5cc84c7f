"""Autoencoders of diffusers on rows: what they decode and encode is that of one device, and nothing is gathered."""

from __future__ import annotations

import pytest
from autoencoder_cases import on_ranks, with_a_rank_that_is_off
from ranks import run_on_ranks

from experiments.tiny_models.autoencoders import AUTOENCODERS
from experiments.tools.autoencoders_coverage import BOUND, Outcome, outcomes
from meshdiff import Layout, init_mesh, simulate


def check(found: dict[str, Outcome]) -> None:
    for part, outcome in found.items():
        assert outcome.error <= BOUND, part
        assert outcome.replicated == [], part
        assert outcome.share > 0.97, part  # the rest are layers of inputs that stay whole, as of a spatial norm


@pytest.mark.long
def test_every_autoencoder_is_itself_on_real_ranks(tmp_path):
    for found in run_on_ranks(on_ranks, 3, tmp_path):
        assert found.keys() == AUTOENCODERS.keys()
        for name in found:
            check(found[name])
        # An exchange for each convolution of more than one row, and one to bring the output together.
        assert {kind: of_kind["count"] for kind, of_kind in found["AutoencoderTiny"]["decoder"].sent.items()} == {
            "all_to_all": 10,
            "all_gather": 1,
        }


@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderKLHunyuanVideo", "AutoencoderDC"])
def test_an_autoencoder_is_itself_on_simulated_ranks(name):
    with simulate(4):
        check(outcomes(name, init_mesh(Layout(cp=4), "cpu")["cp"]))


def test_the_output_is_wrong_when_one_rank_takes_other_rows(tmp_path):
    (error,) = {found["decoder"].error for found in run_on_ranks(with_a_rank_that_is_off, 2, tmp_path)}
    assert error > 100 * BOUND
