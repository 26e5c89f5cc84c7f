"""Shared by all tests: one thread, so that equality can be asked for to the bit, no network, and two at a time."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import draws
import hypothesis
import pytest
import torch

from meshdiff.distributed.world import keep_order_of_sums

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which looks once
keep_order_of_sums()  # before the first product of this process
LOCKS = "MESHDIFF_TEST_LOCKS"
"""The variable that names the folder with the locks of this run of pytest, for its workers."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--draws", type=int, default=1, metavar="N", help="draw N times as many cases, and other ones")


def pytest_configure(config: pytest.Config) -> None:
    draws.TIMES = config.getoption("--draws")
    hypothesis.settings.register_profile("meshdiff", deadline=None, print_blob=True, max_examples=draws.times(100))
    hypothesis.settings.load_profile("meshdiff")
    if not hasattr(config, "workerinput"):  # a worker of pytest-xdist has it
        os.environ[LOCKS] = tempfile.mkdtemp(prefix="meshdiff-tests-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(LOCKS)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start what is marked `long` first, or one worker would be busy with it when the other has nothing left."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@contextmanager
def lock(name: str, exclusive: bool) -> Iterator[None]:
    with Path(os.environ[LOCKS], name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Run the test, and no other beside it if it is marked `serial`."""
    with ExitStack() as running:
        with lock("next", exclusive=True):  # held by one that waits, or others would start before it again and again
            running.enter_context(lock("running", exclusive=item.get_closest_marker("serial") is not None))
        return (yield)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
