"""Keeps what `fuserl check` finds of every recipe, for the table of README and docs/checks.md.

python benchmarks/checks.py [RECIPE ...]      appends a row per recipe to benchmarks/results/checks.jsonl
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from pathlib import Path

from fuserl.engine import bench, catalogue, machine

RESULTS = Path(__file__).resolve().parent / "results" / "checks.jsonl"


def main() -> None:
    """Take the figures of the recipes, print how many hold, and keep them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", help="default all")
    facts = {"device": bench.device(), **machine.versions(), "commit": machine.commit()}
    facts["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    for recipe in parser.parse_args().recipes or catalogue.RECIPES:
        started = time.perf_counter()
        figures = catalogue.show(recipe)
        row = {"recipe": recipe, "seconds": round(time.perf_counter() - started, 2)}
        row["figures"] = [{"what": str(figure), "holds": figure.holds} for figure in figures]
        print(
            f"{recipe:<20} {sum(figure.holds for figure in figures)} of {len(figures)}  {row['seconds']} s", flush=True
        )
        with RESULTS.open("a") as file:
            file.write(json.dumps({**row, **facts}) + "\n")


if __name__ == "__main__":
    main()
