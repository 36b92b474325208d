"""Every CUDA C++ kernel, for every machine we name, without one at hand: it compiles without a warning or a spill."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("source", sorted((CSRC / "cuda").glob("*.cu")), ids=lambda path: path.name)
def test_compiles_and_spills_nothing(source, target, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on the PATH: install the CUDA toolkit, version 12.8 or newer")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    if target not in known:
        pytest.skip(f"this nvcc does not compile for {target}: install the CUDA toolkit, version 12.8 or newer")
    command = [
        nvcc, "-cubin", f"-arch={target}", "-std=c++17", "-O3", f"-I{CSRC}", "-Xptxas=-v", "-Werror=all-warnings",
        str(source), "-o", str(tmp_path / "out.cubin"),
    ]  # fmt: skip
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", process.stderr)
    assert spills and all(int(count) == 0 for each in spills for count in each), process.stderr
