"""Benchmarks run on one thread, with the tiny models of the tests."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


@pytest.fixture(autouse=True)
def one_thread():
    """Ratios of single-thread times: two threads on two busy cores measure the scheduler."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
