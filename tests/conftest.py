"""Shared by all tests: one thread, so that equality can be asked for to the bit."""

from __future__ import annotations

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("meshdiff", deadline=None, print_blob=True)
hypothesis.settings.load_profile("meshdiff")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
