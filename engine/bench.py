"""Runs the benchmarks of a checkout and keeps their rows: `fuserl bench`."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fuserl.engine import machine


def main(only: str | None = None, *, smoke: bool = False, save: bool = False) -> int:
    """Run benchmarks/ of the current checkout, print a table per case, and return pytest's exit status.

    Args:
        only: run the cases whose name contains this.
        smoke: tiny sizes and one round; shows that every case runs, measures nothing.
        save: append the rows to benchmarks/results/<device>.jsonl.
    """
    folder = Path("benchmarks")
    if not (folder / "measure.py").exists():
        raise RuntimeError(
            f"bench: the current folder must be a checkout of fuserl, which carries benchmarks/; got {Path.cwd()}. "
            "Clone the repository and run it there."
        )
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        command = [sys.executable, "-m", "pytest", str(folder), "-q", "-o", "python_files=bench_*.py"]
        command += ["--benchmark-disable-gc", f"--benchmark-json={report}"]
        command += ["--benchmark-quiet", *(["-k", only] if only else []), *(["--smoke"] if smoke else [])]
        status = subprocess.run(command, check=False).returncode
        cases = json.loads(report.read_text())["benchmarks"] if report.exists() and report.stat().st_size else []
    rows = [{"case": case["name"], **row} for case in cases for row in case["extra_info"]["rows"]]
    for case in cases:
        _print(case["name"], case["extra_info"])
    if save and not smoke and rows:
        _append(folder / "results" / f"{re.sub('[^a-z0-9]+', '-', device().lower())}.jsonl", rows)
    return status


def device() -> str:
    """The name of the GPU, or of the processor with its number of threads."""
    facts = machine.machine()
    return facts["gpus"][0] if facts["gpus"] else f"{facts['processor']}, {torch.get_num_threads()} threads"


def _append(path: Path, rows: list[dict]) -> None:
    facts = {"device": device(), **machine.versions(), "commit": machine.commit()}
    facts["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(row | facts) + "\n")


def _print(name: str, extra: dict) -> None:
    columns = ("provider", "median", "spread", f"x {extra['floor']}", "peak MB", "of it returned", "error")
    table = Table(*columns, title=escape(name), title_justify="left")
    for row in extra["rows"]:
        if row["reason"]:
            table.add_row(row["provider"], "not timed", "", "", row["reason"])
            continue
        peak = "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
        rate = f", {row['tflops']:.3g} TFLOP/s" if "tflops" in row else ""
        error = "" if row["error"] is None else f"{row['error']:.0e}"
        times = _time(row["median_s"]) + rate, _time(row["iqr_s"]), f"{row['ratio']:.2f}"
        table.add_row(row["provider"], *times, peak, f"{row['returned_mb']:.0f}", error)
    Console().print(table)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"
