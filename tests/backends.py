"""Which backends the tests of an op take: C++ and the reference here, Triton on a GPU, and under its interpreter.

The interpreter runs Triton's kernels on a CPU. It must be chosen before triton is imported, so one test of a file
starts the file again, in a process of its own, where the same tests take the Triton backend.
"""

import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETING:
    FAST = BACKENDS = [("cpu", "triton")]
else:
    FAST = [("cpu", "cpu"), pytest.param("cuda", "triton", marks=pytest.mark.gpu)]
    BACKENDS = [*FAST, ("cpu", "reference")]
each_backend = pytest.mark.parametrize("device,backend", BACKENDS)
each_fast_backend = pytest.mark.parametrize("device,backend", FAST)
cpu_only = pytest.mark.skipif(INTERPRETING, reason="says nothing of Triton")


@contextmanager
def threads(count):
    """Run a block on this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_interpreted(file, *options):
    """Run the tests of a file under Triton's interpreter; some of them must run, and none may fail."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *options, file]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-2000:]
    assert " passed" in process.stdout
