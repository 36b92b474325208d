"""Keeps what runs of the default job learned: `python benchmarks/learning.py RUN...` after training with several seeds.

    for seed in 0 1 2; do fuserl train grpo --seed $seed --out runs/seed$seed; done
    python benchmarks/learning.py runs/seed0 runs/seed1 runs/seed2

Appends a row per run to results/learning/<processor>.jsonl and keeps the first run's plot beside it.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

from fuserl.engine import metrics

RESULTS = Path(__file__).resolve().parent / "results" / "learning"


def row(folder: Path) -> dict:
    """What one run came to, and on what."""
    described, rows = json.loads((folder / "config.json").read_text()), metrics.read(folder)
    tests = [r for r in rows if "accuracy" in r]
    config = described["config"]
    return {
        "recipe": config["recipe"],
        "task": config["task"],
        "steps": config["steps"],
        "seed": config["seed"],
        "problems": tests[0]["problems"],
        "before": tests[0]["accuracy"],
        "after": tests[-1]["accuracy"],
        "seconds": rows[-1]["elapsed"],
        "peak_gb": max((r.get("host_gb", 0.0) for r in rows), default=0.0),
        "processor": (described["machine"]["gpus"] or [described["machine"]["processor"]])[0],
        "cores": described["machine"]["cores"],
        "torch": described["versions"]["torch"],
        "commit": described["commit"],
        "date": described["started"][:10],
    }


def main(folders: list[str]) -> None:
    """Append a row per run folder."""
    rows = [row(Path(folder)) for folder in folders]
    RESULTS.mkdir(parents=True, exist_ok=True)
    name = re.sub("[^a-z0-9]+", "-", rows[0]["processor"].lower())
    with (RESULTS / f"{name}.jsonl").open("a") as file:
        for each in rows:
            file.write(json.dumps(each) + "\n")
    shutil.copy(Path(folders[0]) / "reward.png", RESULTS / f"{rows[0]['recipe']}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
