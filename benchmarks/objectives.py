"""Every system whose idea is the objective on one toy problem, from one start, beside GRPO: what does the idea change?

    python benchmarks/objectives.py [RECIPE ...] [--seeds 5] [--save]

The problem and the settings are those of baselines.py; so is the start, which has then learned to believe notes, too:
a digit that stands before the question, as the teachers of sdpo and vla_opd are shown it, is what it says, be it right
or wrong. Which digit is the larger no note told it. Each recipe has the same number of steps; then come pass@1 and
pass@16 on pairs of digits that it never trained on, the entropy of its last steps, and how many steps it took until the
mean reward of five in a row was 0.8. One problem of one answer says whether a recipe learns and what it keeps of the
start's diversity, not which one is best elsewhere. `--save` appends a row per recipe to results/objectives.jsonl and
draws the newest row of each in results/objectives.png.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import random
import statistics
import tempfile
from pathlib import Path

import baselines
import torch

from fuserl.engine import bench, catalogue, figures, hindsight, lookup, machine, metrics
from fuserl.engine.batch import Rollouts, offsets_of
from fuserl.engine.panels import PALETTE, dress
from fuserl.engine.prompts import Prompt

RESULTS = Path(__file__).resolve().parent / "results" / "objectives.jsonl"
SAMPLES, WINDOW, THRESHOLD = 16, 5, 0.8
BASELINES = ("dr_grpo", "dapo", "gspo", "cispo", "max_rl", "rloo", "reinforce_pp", "ppo", "dpo", "reward_model", "sft")
APART = ("advantage_alignment",)  # it learns a game, not an answer


def shown(a: int, b: int, said: int) -> tuple[str, str]:
    """What the teachers of vla_opd and of sdpo read in the place of `a,b=`, told that the answer is `said`."""
    one = torch.ones(2, dtype=torch.int64)
    siblings = Rollouts(
        prompts=[Prompt(f"{a},{b}=", str(said))], prompt_tokens=[one], group=one - 1, tokens=one,
        offsets=offsets_of(one), rollout_logprobs=-one.float(), texts=[str(said), ""], finish=["stop"] * 2,
    )  # fmt: skip
    scored = torch.tensor([1.0, 0.0])
    behind = hindsight.answered(siblings, scored)[0][1]
    beside = hindsight.reprompted(None, success=1.0, most=1000, skip_solved=False)(siblings, scored)[0][1]
    return behind, beside


def notes(folder: Path) -> str:
    """The file of notes to believe: before each pair of digits either of them, which is then the answer."""
    either, rows = random.Random(0), []
    for a, b in [(a, b) for a in range(10) for b in range(10) if a != b] * 5:
        for at in (0, 1):
            said = either.choice((a, b))
            rows.append({"prompt": shown(a, b, said)[at], "answer": str(said)})
        rows.append({"prompt": f"{a},{b}=", "answer": str(either.choice((a, b)))})
    path = folder / "notes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@functools.cache
def start(seed: int) -> dict:
    """The weights of a model that says one of the two digits, or the one that a note names."""
    model = baselines.started(seed)
    with tempfile.TemporaryDirectory() as scratch:
        config = baselines.configured(Path(scratch), "sft", seed, steps=100, lr=3e-3, data=notes(Path(scratch)))
        baselines.train(model, config)
    return {name: value.clone() for name, value in model.state_dict().items()}


def run(recipe: str, seed: int) -> dict[str, float]:
    """What one run came to."""
    model = baselines.tiny(seed)
    model.load_state_dict(start(seed))
    with tempfile.TemporaryDirectory() as scratch:
        config = baselines.configured(Path(scratch), recipe, seed, eval_samples=SAMPLES)
        rows = metrics.read(baselines.train(model, config))
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


def main(arguments: list[str] | None = None) -> None:
    """Run them all, print a line each, and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", help="default all systems, and grpo")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args(arguments)
    facts = {"device": bench.device(), **machine.versions(), "commit": machine.commit()}
    facts["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    for recipe in given.recipes or [name for name in catalogue.RECIPES if name not in (*BASELINES, *APART)]:
        runs = [run(recipe, seed) for seed in range(given.seeds)]
        row = {"recipe": recipe, "training_steps": baselines.SETTINGS["steps"]}
        row |= {name: [round(each[name], 4) for each in runs] for name in runs[0]}
        print(f"{recipe:<20}" + "  ".join(f"{n} {statistics.mean(row[n]):.3f}" for n in runs[0]), flush=True)
        if given.save:
            with RESULTS.open("a") as file:
                file.write(json.dumps({**row, **facts}) + "\n")
    if given.save:
        newest = {row["recipe"]: row for row in map(json.loads, RESULTS.read_text().splitlines())}
        ordered = [newest[name] for name in catalogue.RECIPES if name in newest]
        RESULTS.with_suffix(".png").write_bytes(figures.png(picture(ordered)))


if __name__ == "__main__":
    main()
