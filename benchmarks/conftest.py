"""The device the cases run on, and the small sizes of a smoke run."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--smoke", action="store_true", help="tiny sizes, one round: does every case run?")


@pytest.fixture
def smoke(request) -> bool:
    """Whether this is a smoke run."""
    return request.config.getoption("--smoke")


@pytest.fixture
def device() -> str:
    """The GPU where there is one."""
    torch.manual_seed(0)
    return "cuda" if torch.cuda.is_available() else "cpu"
