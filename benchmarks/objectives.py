"""Every system whose idea is the objective on one toy problem, from one start, beside GRPO: what does the idea change?

    python benchmarks/objectives.py [RECIPE ...] [--seeds 5] [--save]

The problem, the start and the settings are those of baselines.py. Each recipe has the same number of steps; then come
pass@1 and pass@16 on pairs of digits that it never trained on, the entropy of its last steps, and how many steps it
took until the mean reward of five in a row was 0.8. One problem of one answer says whether a recipe learns and what it
keeps of the start's diversity, not which one is best elsewhere. `--save` appends a row per recipe to
results/objectives.jsonl and draws results/objectives.png.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import tempfile
from pathlib import Path

import baselines

from fuserl.engine import bench, catalogue, figures, lookup, machine, metrics
from fuserl.engine.panels import PALETTE, dress

RESULTS = Path(__file__).resolve().parent / "results" / "objectives.jsonl"
SAMPLES, WINDOW, THRESHOLD = 16, 5, 0.8
BASELINES = ("dr_grpo", "dapo", "gspo", "cispo", "max_rl", "rloo", "reinforce_pp", "ppo", "dpo", "reward_model", "sft")
# What one learns is no answer, and what the other's teacher reads are words, which this alphabet has not.
APART = ("advantage_alignment", "sdpo")


def run(recipe: str, seed: int) -> dict[str, float]:
    """What one run came to."""
    with tempfile.TemporaryDirectory() as scratch:
        config = baselines.configured(Path(scratch), recipe, seed, eval_samples=SAMPLES)
        rows = metrics.read(baselines.train(baselines.started(seed), config))
    rewards = [row["reward"] for row in rows if "reward" in row]
    entropies = [row["entropy"] for row in rows if math.isfinite(row.get("entropy", math.nan))]
    last = [row for row in rows if "pass@1" in row][-1]
    return {
        "pass@1": last["pass@1"],
        f"pass@{SAMPLES}": last[f"pass@{SAMPLES}"],
        "entropy": statistics.mean(entropies[-WINDOW:]) if entropies else math.nan,
        "steps": reached(rewards),
    }


def reached(rewards: list[float]) -> float:
    """The first step at which the mean of WINDOW rewards is THRESHOLD; NaN where there is none."""
    for step in range(WINDOW, len(rewards) + 1):
        if statistics.mean(rewards[step - WINDOW : step]) >= THRESHOLD:
            return float(step)
    return math.nan


def picture(rows: list[dict]):
    """pass@1 and pass@16 of every recipe with the spread over its seeds, in the order of the table."""
    matplotlib, figure = lookup.package("matplotlib", "tasks"), lookup.package("matplotlib.figure", "tasks")
    with matplotlib.rc_context(figures.STYLE):
        made = figure.Figure(figsize=(7, 0.34 * len(rows) + 1), layout="constrained", facecolor=PALETTE["paper"])
        axes = made.add_subplot()
        dress(axes, "x")
        places = range(len(rows))[::-1]
        for name, color, up in (("pass@1", "blue", 0.12), (f"pass@{SAMPLES}", "orange", -0.12)):
            means = [statistics.mean(row[name]) for row in rows]
            errors = [statistics.stdev(row[name]) / len(row[name]) ** 0.5 for row in rows]
            at = [place + up for place in places]
            axes.errorbar(means, at, xerr=errors, fmt="o", markersize=4, color=PALETTE[color], label=name)
        axes.set_yticks(list(places), [row["recipe"] for row in rows])
        axes.set_xlim(0, 1.02)
        axes.legend(frameon=False, loc="lower left")
    return made


def main() -> None:
    """Run them all, print a line each, and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", help="default all systems, and grpo")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    facts = {"device": bench.device(), **machine.versions(), "commit": machine.commit()}
    facts["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    found = []
    for recipe in given.recipes or [name for name in catalogue.RECIPES if name not in (*BASELINES, *APART)]:
        runs = [run(recipe, seed) for seed in range(given.seeds)]
        row = {"recipe": recipe, "training_steps": baselines.SETTINGS["steps"]}
        row |= {name: [round(each[name], 4) for each in runs] for name in runs[0]}
        print(f"{recipe:<20}" + "  ".join(f"{n} {statistics.mean(row[n]):.3f}" for n in runs[0]), flush=True)
        found.append(row)
        if given.save:
            with RESULTS.open("a") as file:
                file.write(json.dumps({**row, **facts}) + "\n")
    if given.save:
        RESULTS.with_suffix(".png").write_bytes(figures.png(picture(found)))


if __name__ == "__main__":
    main()
