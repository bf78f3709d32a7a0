"""Shared by all tests: the device, the interpreter, the real data."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real photos and fixtures named by FASTRCNN_TEST_DATA; tests that need it skip without it."""
    folder = Path(os.environ.get("FASTRCNN_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("real test data not found: set FASTRCNN_TEST_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    return ROOT


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
