"""Shared by all tests: one thread, so that equality can be asked for to the bit, and no network."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which looks once
hypothesis.settings.register_profile("meshdiff", deadline=None, print_blob=True)
hypothesis.settings.load_profile("meshdiff")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
