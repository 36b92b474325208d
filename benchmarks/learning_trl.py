"""The reward of GRPO as it trains, here and in TRL's GRPOTrainer: one toy problem, one start, the same settings.

    pip install trl datasets; python benchmarks/learning_trl.py [--steps 30] [--seeds 8] [--save]

The problem is that of baselines.py, the settings are alike as in baselines_trl.py; what is drawn differs. Compared is
the mean reward of the last five steps: both sides' means over the seeds, and the standard error of their difference.
`--save` appends a row to results/learning_trl.jsonl and draws the curves beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import statistics
import tempfile
import warnings
from pathlib import Path

import baselines
import baselines_trl
import datasets
import torch
import transformers

from fuserl.engine import bench, figures, machine, metrics
from fuserl.engine.panels import PALETTE, SERIES, dress

RESULTS = Path(__file__).parent / "results" / "learning_trl.jsonl"
LAST = 5  # steps whose rewards are compared


def ours(seed: int, steps: int) -> list[float]:
    """The mean reward of each step of our run."""
    with tempfile.TemporaryDirectory() as scratch:
        config = baselines.configured(Path(scratch), "grpo", seed, steps=steps)
        rows = metrics.read(baselines.train(baselines.started(seed), config))
    return [row["reward"] for row in rows if "reward" in row]


def theirs(seed: int, steps: int) -> list[float]:
    """The same of TRL's."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        config = baselines.configured(Path(scratch), "grpo", seed, steps=steps).resolved()
        torch.set_num_threads(config.threads)
        trainer = baselines_trl.grpo(config, Path(scratch), loss_type="grpo")
        trainer.args.logging_strategy, trainer.args.logging_steps = transformers.trainer_utils.IntervalStrategy.STEPS, 1
        trainer.state.logging_steps = 1
        trainer.train()
    return [row["reward"] for row in trainer.state.log_history if "reward" in row]


def compared(curves: dict[str, list[list[float]]]) -> dict[str, float]:
    """The last rewards of both sides, their difference, and its standard error."""
    ends = {side: [statistics.mean(curve[-LAST:]) for curve in each] for side, each in curves.items()}
    means = {side: statistics.mean(values) for side, values in ends.items()}
    error = sum(statistics.variance(values) / len(values) for values in ends.values()) ** 0.5
    rewards = {"reward": means["fuserl"], "rival_reward": means["trl"]}
    return {**rewards, "difference": means["fuserl"] - means["trl"], "standard_error": error}


def draw(curves: dict[str, list[list[float]]], path: Path) -> None:
    """The mean over the seeds, and the band of one standard error, of both sides."""
    import matplotlib
    from matplotlib import figure

    with matplotlib.rc_context(figures.STYLE):
        made = figure.Figure(figsize=(7, 3.6), layout="constrained", facecolor=PALETTE["paper"])
        axes = made.add_subplot()
        dress(axes)
        for color, (side, each) in zip(SERIES, curves.items(), strict=False):
            table = torch.tensor(each)
            mean, error = table.mean(0), table.std(0) / len(table) ** 0.5
            steps = range(1, table.shape[1] + 1)
            axes.plot(steps, mean, color=PALETTE[color], label=side)
            axes.fill_between(steps, mean - error, mean + error, color=PALETTE[color], alpha=0.2, linewidth=0)
        axes.set(xlabel="step", ylabel="mean reward")
        axes.legend(frameon=False)
        made.savefig(path, dpi=150)


def main() -> None:
    """Train both, print the comparison, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=8, help="at least 2")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    curves = {"fuserl": [], "trl": []}
    for seed in range(given.seeds):
        for side, run in (("fuserl", ours), ("trl", theirs)):
            curves[side].append(run(seed, given.steps))
            print(f"seed {seed} {side:<7}" + " ".join(f"{x:.2f}" for x in curves[side][-1][::5]), flush=True)
    row = {"steps": given.steps, "seeds": given.seeds, "rival": baselines_trl.PROVIDER, **compared(curves)}
    print({name: round(x, 4) if isinstance(x, float) else x for name, x in row.items()})
    if given.save:
        facts = {"device": bench.device(), **machine.versions(), "commit": machine.commit()}
        facts["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
        with RESULTS.open("a") as file:
            file.write(json.dumps({**row, "curves": curves, **facts}) + "\n")
        draw(curves, RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    main()
