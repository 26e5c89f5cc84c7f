"""The registry of models: complete, and what flags are for which."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest

from meshdiff import InputError, Request
from meshdiff.attention.strategy import AUTO, STRATEGIES
from meshdiff.cli.config import Config
from meshdiff.cli.metrics import RunMetrics
from meshdiff.cli.registry import MODELS, OF_SOME_MODELS, ModelFlags, ModelName, StrategyFlag
from meshdiff.cli.run import parse
from meshdiff.cli.sweep.main import Config as SweepConfig
from meshdiff.cli.sweep.report import COLORS

GIVEN = {
    "weights": ["--weights", "x"],
    "shape": ["--dim", "48"],
    "checkpoint": ["--checkpoint", "x"],
    "components": ["--components", "x"],
    "tile": ["--tile", "0"],
    "capture": ["--capture"],
    "shard_weights": ["--shard-weights"],
    "shard_text": ["--no-shard-text"],
    "shard_vae": ["--no-shard-vae"],
    "low_memory": ["--low-memory", "1"],
    "simulate": ["--simulate"],
}


def test_names_are_those_of_what_they_name():
    assert [*MODELS] == [*get_args(ModelName)]
    assert [*get_args(StrategyFlag)] == [AUTO, *STRATEGIES]
    assert [*SweepConfig.strategies] == [*STRATEGIES]
    assert {f"cp, {name}" for name in (AUTO, *STRATEGIES)} <= COLORS.keys()
    fields = {field.name for field in dataclasses.fields(ModelFlags)}
    told = {field.name for field in dataclasses.fields(Request)} | Config().of_run().keys()
    assert told <= {field.name for field in dataclasses.fields(RunMetrics)}
    assert set(OF_SOME_MODELS) == GIVEN.keys() <= fields
    for entry in MODELS.values():
        assert entry.flags <= set(OF_SOME_MODELS)
        assert set(entry.strategies) <= set(get_args(StrategyFlag))
        assert (entry.checkpoint is not None) == ("checkpoint" in entry.flags)


@pytest.mark.parametrize("flag", OF_SOME_MODELS)
@pytest.mark.parametrize("model", MODELS)
def test_a_flag_of_another_model_is_one_line(model, flag):
    needed = ["--checkpoint", "x"] if MODELS[model].checkpoint is not None and flag != "checkpoint" else []
    arguments = ["--model", model, *needed, *GIVEN[flag]]
    if flag in MODELS[model].flags:
        assert parse(arguments).model == model
        return
    named = "--dim, --depth, --heads" if flag == "shape" else GIVEN[flag][0]
    others = " or ".join(name for name, entry in MODELS.items() if flag in entry.flags)
    with pytest.raises(InputError, match=rf"^{named}: is for --model {others}; this is --model {model}: leave it out$"):
        parse(arguments)


def test_defaults_are_those_of_the_model_that_is_named():
    assert parse([]).request == Config().request == MODELS["digits"].defaults()
    for model, entry in MODELS.items():
        assert parse(["--model", model, "--checkpoint", "x"] if entry.checkpoint else ["--model", model]).request == (
            entry.defaults()
        )
