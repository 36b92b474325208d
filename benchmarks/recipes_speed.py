"""Tokens a second of every recipe, and where a step's time goes: one set of prompts and sizes, a process for each.

    python benchmarks/recipes_speed.py [RECIPE ...] [--model FOLDER|tiny] [--steps N] [--once] [--save]

Prints a row per recipe, the median step after two to warm up; `--save` appends them to results/recipes_speed.jsonl and
draws results/recipes_speed.png. Prompts are sums, each after four solved ones of its own (some 50 tokens, no beginning
in common); the reward differs within every group, so that all completions are passed forward and backward. The model
is the built-in one, a folder, or `tiny`: two layers of 64 with random weights, to see that all runs.

With `--once` every recipe takes one optimizer step on the whole batch, whatever its own epochs and minibatches are:
what its objective costs beside another's. Name grpo several times among them, and the table divides by its median.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import datetime
import io
import json
import multiprocessing
import random
import statistics
import sys
import tempfile
import zlib
from pathlib import Path

import baselines
import torch

from fuserl.engine import bench, catalogue, figures, lookup, loop, machine, metrics, models
from fuserl.engine.config import Config
from fuserl.engine.panels import PALETTE, SERIES, dress

RESULTS = Path(__file__).resolve().parent / "results" / "recipes_speed.jsonl"
WARM = 2
SIZES = {
    "cpu": dict(groups=4, group_size=8, max_new_tokens=8),
    "cuda": dict(groups=64, group_size=16, max_new_tokens=128),
    "tiny": dict(groups=2, group_size=4, max_new_tokens=3),
}
OF_THEIR_OWN = {
    "sdpo": {"reward": "recipes_speed:halved"},  # it learns from right answers, of which the other reward has none
    "c_grpo": {"stop": ("\n",)},  # it learns from what ends by itself
    "advantage_alignment": {"rounds": 2},  # of two agents that talk in turn
}
PHASES = ("generate", "reward", "score", "update", "other")
RATES = (
    "generate_tokens_per_s", "generate_share", "generate_tflops", "generate_gb_per_s", "read_tokens_per_s",
    "update_tokens_per_s", "update_share", "update_tflops", "mismatch_max", "mismatch_ess",
)  # fmt: skip


def spread(completion: str) -> float:
    """A reward that two different completions seldom share."""
    return zlib.crc32(completion.encode()) % 1009 / 1009


def halved(completion: str) -> float:
    """A reward that half of all completions have."""
    return float(spread(completion) < 0.5)


def problems(folder: Path, count: int) -> str:
    """A file of sums with solved ones in front, right and wrong answers."""
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        sums = [(draw.randrange(10, 100), draw.randrange(10, 100)) for _ in range(5)]
        (*shots, (a, b)) = sums
        shown = "".join(f"{c} + {d} = {c + d}\n" for c, d in shots)
        rows.append({"prompt": f"{shown}{a} + {b} =", "answer": f"{a + b}", "chosen": f"{a + b}", "rejected": f"{a}"})
    path = folder / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def measured(recipe: str, model: str | None, steps: int, once: bool = False) -> dict:
    """The row of one recipe: medians over the steps after the first two.

    Args:
        recipe: its name.
        model: a folder, `tiny`, or None for the built-in one.
        steps: turns of the loop, more than two.
        once: one epoch and one minibatch.
    """
    kind = "tiny" if model == "tiny" else "cuda" if torch.cuda.device_count() else "cpu"
    given = dict(
        recipe=recipe, steps=steps, **SIZES[kind], reward="recipes_speed:spread", reward_workers=0, few_shot=0, stop=(),
        eval_problems=0, eval_every=0, save_every=0, samples=0,
    )  # fmt: skip
    given |= OF_THEIR_OWN.get(recipe, {}) | ({"epochs": 1, "minibatches": 1} if once else {})
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if kind == "tiny":
            stack.enter_context(baselines.loading(baselines.tiny(0)))
            given |= {"data": baselines.problems(Path(scratch)), "device": "cpu"}
        else:
            given |= {"data": problems(Path(scratch), 4 * SIZES[kind]["groups"]), "model": model}
        config = Config.from_dict({**given, **catalogue.fixed(recipe), "out": str(Path(scratch) / "run")})
        rows = [row for row in metrics.read(loop.train(config)) if "seconds" in row][WARM:]
    found = {**_medians(rows), **SIZES[kind], "model": model or models.DEFAULT, "steps": len(rows)}
    return found | ({"once": True} if once else {})


def _medians(rows: list[dict]) -> dict:
    """The median of each phase's seconds, of the whole step and of the rates; the most memory."""
    names = [*(f"{phase}_s" for phase in PHASES), "seconds", "tokens", *RATES]
    held = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
    found = {name: float(f"{statistics.median(values):.4g}") for name, values in held.items() if values}
    peaks = {place: max(row.get(f"{place}_gb", 0.0) for row in rows) for place in ("host", "gpu")}
    return found | {f"{place}_gb": round(peak, 2) for place, peak in peaks.items() if peak}


def picture(rows: list[dict]):
    """A matplotlib figure of the rows: seconds of a step of each recipe, phase on phase."""
    matplotlib, figure = lookup.package("matplotlib", "tasks"), lookup.package("matplotlib.figure", "tasks")
    with matplotlib.rc_context(figures.STYLE):
        made = figure.Figure(figsize=(9, 0.9 + 0.34 * len(rows)), layout="constrained", facecolor=PALETTE["paper"])
        axes = made.add_subplot(facecolor=PALETTE["paper"])
        places, lefts = range(len(rows)), [0.0] * len(rows)
        for phase, colour in zip(PHASES, SERIES, strict=False):
            widths = [row.get(f"{phase}_s", 0.0) for row in rows]
            axes.barh(places, widths, 0.62, left=lefts, color=PALETTE[colour], label=phase)
            lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
        dress(axes, "x")
        axes.set_yticks(places, [row["recipe"] for row in rows])
        axes.invert_yaxis()
        first = rows[0]
        work = f"{first['groups']} prompts x {first['group_size']} completions x {first['max_new_tokens']} tokens"
        axes.set_title("Seconds of a step", loc="left", fontsize=11, fontweight="bold", pad=26)
        axes.set_xlabel(f"{first['model']} · {work} · {first['device']}", loc="left")
        axes.legend(
            loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=len(PHASES), frameon=False, borderaxespad=0.2,
            handlelength=0.9, handletextpad=0.5, columnspacing=1.4,
        )  # fmt: skip
    return made


def main(arguments: list[str] | None = None) -> None:
    """Measure the recipes in turn, print a line each, and keep them when asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipes", nargs="*", metavar="RECIPE")
    parser.add_argument("--model", help="a folder, or tiny; default the built-in model")
    parser.add_argument("--steps", type=int, default=7, help="turns of the loop, the first two left out")
    parser.add_argument("--once", action="store_true", help="one optimizer step on the whole batch for each")
    parser.add_argument("--save", action="store_true", help="append the rows to the results and draw them")
    given = parser.parse_args(arguments)
    facts = {"device": bench.device(), **machine.versions(), "commit": machine.commit()}
    facts["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    rows = []
    for recipe in given.recipes or catalogue.RECIPES:
        # A process has one highest mark of memory: each recipe gets its own.
        alone = concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        with alone as pool:
            row = pool.submit(measured, recipe, given.model, given.steps, given.once).result()
        rows.append({"recipe": recipe, **row, **facts})
        drawn, updated = (row.get(f"{phase}_tokens_per_s", 0.0) for phase in ("generate", "update"))
        split = "  ".join(f"{phase} {row[f'{phase}_s'] / row['seconds']:.0%}" for phase in PHASES)
        print(f"{recipe:<14}{row['seconds']:>8.3f} s  {drawn:>9,.0f} {updated:>9,.0f} tokens/s  {split}", flush=True)
        if given.save:
            with RESULTS.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    if given.save and not given.once:
        RESULTS.with_suffix(".png").write_bytes(figures.png(picture(rows)))


if __name__ == "__main__":
    main(sys.argv[1:])
