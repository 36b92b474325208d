"""Times the row kernels of softmax_rows over a fixed grid of launch parameters: `python benchmarks/launch_grid.py`.

Every candidate has to agree with the launch in use before it is timed. Rows go to benchmarks/results/launches/, with
the share of the bandwidth that a plain copy reached in the same run. With TRITON_INTERPRET=1, --smoke needs no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import statistics
from pathlib import Path

import torch

from fuserl.engine import bench, machine
from fuserl.kernels import softmax_rows

TILES = [(2, 1024, 4), (4, 1024, 4), (8, 1024, 4), (2, 2048, 8), (4, 2048, 8)]
STATISTICS = [
    {"SEGMENT": segment, "DEPTH": depth, "LANES": lanes, "num_warps": warps}
    for segment in (16384, 32768, 65536)
    for depth, lanes, warps in TILES
]
GRADIENT = [
    {"BLOCK": block, "num_warps": warps}
    for block, warps in ((2048, 4), (4096, 4), (4096, 8), (8192, 8), (8192, 16), (16384, 16))
]
CASES = [  # rows, vocabulary, dtype: the usual one, float32, rows that are not aligned, and few rows
    (8192, 151936, torch.bfloat16),
    (2048, 151936, torch.float32),
    (8192, 50257, torch.bfloat16),
    (16, 151936, torch.bfloat16),
]
SMOKE_CASES = [(2, 20001, torch.bfloat16)]


def main() -> None:
    """Run the grid and append its rows, unless this is a smoke run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, every candidate once, nothing saved")
    smoke = parser.parse_args().smoke
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for count, vocabulary, dtype in SMOKE_CASES if smoke else CASES:
        rows += case(count, vocabulary, dtype, device)
    if smoke:
        print(f"{len(rows)} launches agree")
        return
    for row in sorted(rows, key=lambda row: (row["rows"], row["vocabulary"], row["dtype"], row["median_s"])):
        shape = f"{row['rows']}x{row['vocabulary']} {row['dtype']}"
        print(f"{shape} {row['kernel']} {row['launch']}: {row['share_of_copy']:.0%} of a copy")
    facts = {"device": bench.device(), **machine.versions(), "commit": machine.commit()}
    facts["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    name = re.sub("[^a-z0-9]+", "-", facts["device"].lower())
    path = Path(__file__).parent / "results" / "launches" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(row | facts) + "\n")


def case(count: int, vocabulary: int, dtype: torch.dtype, device: str) -> list[dict]:
    """Rows of both kernels for one shape."""
    torch.manual_seed(0)
    logits = (torch.randn(1, count, vocabulary, device=device) * 4).to(dtype)
    ids = torch.randint(vocabulary, (count,), device=device)
    coefficients = torch.randn(5, count, device=device)
    out, bytes_read = torch.empty_like(logits), logits.numel() * logits.element_size()
    copy = 2 * bytes_read / seconds(lambda: out.copy_(logits))
    truth = softmax_rows.forward(logits, ids, 1.0, None, 3, "triton")
    lse = truth[2].contiguous()

    def forward():
        return softmax_rows.forward(logits, ids, 1.0, None, 3, "triton")

    def gradient():
        softmax_rows.gradient(logits, ids, lse, coefficients, 1.0, None, out, "triton")
        return out

    expected = gradient()[:, :2].float().clone()
    rows = timed("STATISTICS_LAUNCH", STATISTICS, forward, truth, bytes_read / copy)
    rows += timed("GRADIENT_LAUNCH", GRADIENT, gradient, expected, 2 * bytes_read / copy)
    facts = {"rows": count, "vocabulary": vocabulary, "dtype": str(dtype), "copy_gb_s": copy / 1e9}
    return [row | facts for row in rows]


def timed(kernel: str, launches: list[dict], run, expected: torch.Tensor, floor: float) -> list[dict]:
    """A row per launch whose result agrees; `floor` is the time that the traffic takes at the speed of a copy."""
    in_use, rows = getattr(softmax_rows, kernel), []
    for launch in launches:
        setattr(softmax_rows, kernel, in_use | launch)
        got = run()
        got = got[:, :2].float() if got.dim() == 3 else got
        torch.testing.assert_close(got, expected, rtol=1e-2 if got.dim() == 3 else 1e-5, atol=1e-5)
        median = seconds(run)
        rows.append({"kernel": kernel, "launch": launch, "median_s": median, "share_of_copy": floor / median})
    setattr(softmax_rows, kernel, in_use)
    return rows


def seconds(run, rounds: int = 9) -> float:
    """Median time of one call; the first, which may compile, is not counted."""
    if not torch.cuda.is_available():
        return 1.0
    run()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


if __name__ == "__main__":
    main()
