"""Writes README's tables from the code and the measured rows: `python benchmarks/readme.py`.

A table stands between <!-- table:NAME --> and <!-- end --> and is never typed; a test compares README with this.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPS = ("token_logprob", "linear_policy_loss", "group_advantage")


def ops() -> str:
    """Ops by backend."""
    backends = ("cuda", "triton", "cpu", "reference")
    lines = ["| op | what | CUDA C++ | Triton | C++ (CPU) | torch |", "|---|---|---|---|---|---|"]
    for op in OPS:
        module = importlib.import_module(f"fuserl.kernels.{op}")
        what = getattr(module, op).__doc__.splitlines()[0].rstrip(".")
        marks = " | ".join("yes" if name in module.IMPLS else "" for name in backends)
        lines.append(f"| `{op}` | {what} | {marks} |")
    return "\n".join(lines)


def recipes() -> str:
    """Recipes by name."""
    from fuserl.engine.catalogue import RECIPES

    rows = [f"| `{name}` | {phrase} |" for name, phrase in RECIPES.items()]
    return "\n".join(["| recipe | what |", "|---|---|", *rows])


def settings() -> str:
    """What `fuserl train` accepts."""
    from fuserl.engine.config import settings

    rows = [
        f"| `--{s.name}` | {s.default if s.default is not None else 'automatic'} | {s.metadata['doc']} |"
        for s in settings()
    ]
    return "\n".join(["| setting | default | what |", "|---|---|---|", *rows])


def learning() -> str:
    """The newest run of every seed of the default job, and their mean rise with its interval."""
    newest = {}
    for path in sorted((ROOT / "benchmarks" / "results" / "learning").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            newest[row["recipe"], row["task"], row["processor"], row["seed"]] = row
    if not newest:
        return "No runs yet."
    lines = [
        "| recipe, task | seed | greedy accuracy before | after | rise | minutes | peak GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in newest.values():
        name, rise = f"{row['recipe']}, `{row['task']}`", row["after"] - row["before"]
        lines.append(
            f"| {name} | {row['seed']} | {row['before']:.3f} | {row['after']:.3f} | {rise:+.3f} "
            f"| {row['seconds'] / 60:.1f} | {row['peak_gb']:.1f} |"
        )
    rises, row = [r["after"] - r["before"] for r in newest.values()], next(iter(newest.values()))
    mean = statistics.mean(rises)
    # Student's t of 95 % for n - 1 degrees of freedom
    half = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(rises), math.nan)
    half *= statistics.stdev(rises) / len(rises) ** 0.5 if len(rises) > 1 else math.nan
    lines += [
        "",
        f"Mean rise over {len(rises)} seeds {mean:+.3f} (95 % interval {mean - half:+.3f} to {mean + half:+.3f}),",
    ]
    lines += [
        f"on {row['problems']} held-out problems; {row['cores']} cores of {row['processor']}, torch {row['torch']},"
    ]
    lines += [f"commit {row['commit']}."]
    return "\n".join(lines)


def benchmarks() -> str:
    """The newest row of every provider of every case on every device."""
    newest = {}
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            newest[row["device"], row["case"], row["provider"]] = row
    lines = []
    for device in dict.fromkeys(key[0] for key in newest):
        rows = [row for key, row in newest.items() if key[0] == device]
        first = rows[0]
        lines += [f"{device}, torch {first['torch']}, commit {first['commit']}:", ""]
        lines += ["| case | provider | median | spread | times the floor | peak MB |", "|---|---|---|---|---|---|"]
        lines += [_row(row) for row in rows]
        lines.append("")
    return "\n".join(lines).strip() or "No rows yet: `make bench` takes them."


def rendered(text: str) -> str:
    """README's text with every table written anew."""
    for table in (ops, recipes, settings, learning, benchmarks):
        pattern = rf"(<!-- table:{table.__name__} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, table=table: f"{m[1]}{table()}\n{m[2]}", text, flags=re.DOTALL)
    return text


def _row(row: dict) -> str:
    if row["reason"]:
        return f"| {row['case']} | {row['provider']} | not timed: {row['reason']} | | | |"
    peak = "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
    return (
        f"| {row['case']} | {row['provider']} | {_time(row['median_s'])} | {_time(row['iqr_s'])} "
        f"| {row['ratio']:.2f} | {peak} |"
    )


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(rendered(path.read_text()))
