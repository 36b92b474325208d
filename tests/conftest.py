"""Every test starts from one seed, and memory that nobody has written reads as NaN."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; deterministic mode asks for it

import hypothesis
import pytest
import torch

from fuserl import _C

# The same examples every time, however slow the machine.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned():
    """Fill every torch.empty with NaN, so that an output left unwritten cannot pass for a number."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=("baseline", "avx2", "avx512"))
def isa(request):
    """The name of the instruction set that the C++ runs on: a test that takes it runs on each that the machine has."""
    best = _C.isa()
    try:
        _C.set_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    _C.set_isa(best)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
