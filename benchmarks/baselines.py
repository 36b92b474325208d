"""Every baseline on one toy problem, from one start, three seeds: does it learn, and how do they compare?

    python benchmarks/baselines.py [RECIPE ...]      appends rows to benchmarks/results/baselines.jsonl

Two digits are shown and the larger is to be said: `3,7=` wants `7`. The model (2 layers of 64) is trained from scratch,
first by supervised learning to say one of the two at random: about half right. From there each recipe has the same
number of steps and judges itself on twenty pairs of digits that it is never trained on.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import io
import json
import os
import random
import statistics
import sys
import tempfile
import types
from pathlib import Path

import torch
import transformers

from fuserl.engine import bench, catalogue, loop, machine, metrics, models
from fuserl.engine.config import Config

LETTERS = "0123456789,= \n"
SEEDS = (0, 1, 2)
RESULTS = Path(__file__).parent / "results" / "baselines.jsonl"
SETTINGS = dict(
    steps=100, groups=16, group_size=8, max_new_tokens=3, lr=1e-3, few_shot=0, threads=1, reward_workers=0,
    eval_problems=20, eval_every=0, save_every=0, samples=0,
)  # fmt: skip
# PPO takes four optimizer steps a batch. DPO, where it is rushed, drives the probabilities of both completions down
# until something else is likelier than either.
CHANGES = {"ppo": {"lr": 5e-4}, "dpo": {"lr": 1e-4}}


class Digits:
    """A tokenizer of digits, one token per character, what it does not know a line break; token 2 ends a text."""

    eos_token_id = 2

    def __call__(self, text, add_special_tokens=True):
        return types.SimpleNamespace(input_ids=[LETTERS.find(letter) % len(LETTERS) + 3 for letter in text])

    def decode(self, tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False):
        """The letters of tokens, without those that mark an end."""
        return "".join(LETTERS[token - 3] for token in tokens if token >= 3)


def problems(folder: Path, *, guessing: bool = False) -> str:
    """The file of all pairs of different digits; `guessing` answers with either digit."""
    random_digit = random.Random(0)
    pairs = [(a, b) for a in range(10) for b in range(10) if a != b]
    rows = [
        {
            "prompt": f"{a},{b}=",
            "answer": str(random_digit.choice((a, b)) if guessing else max(a, b)),
            "chosen": str(max(a, b)),
            "rejected": str(min(a, b)),
        }
        for a, b in pairs * (5 if guessing else 1)
    ]
    path = folder / f"{'either' if guessing else 'larger'}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def tiny(seed: int):
    """A model of 80 thousand random weights."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=3 + len(LETTERS), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@functools.cache
def start(seed: int) -> dict:
    """The weights of a model that says one of the two digits."""
    model = tiny(seed)
    with tempfile.TemporaryDirectory() as scratch:
        either = problems(Path(scratch), guessing=True)
        train(model, configured(Path(scratch), "sft", seed, steps=100, lr=3e-3, data=either))
    return {name: value.clone() for name, value in model.state_dict().items()}


def judged(recipe: str, seed: int, **changes) -> tuple[dict, dict, float]:
    """The evaluations before and after training with a recipe, and the seconds that its steps took."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = train(started(seed), configured(Path(scratch), recipe, seed, **changes))
        rows = metrics.read(folder)
    tests = [row for row in rows if "accuracy" in row]
    return tests[0], tests[-1], sum(row.get("seconds", 0.0) for row in rows)


def started(seed: int):
    """A model that says one of the two digits."""
    model = tiny(seed)
    model.load_state_dict(start(seed))
    return model


def configured(folder: Path, recipe: str, seed: int, **changes) -> Config:
    """The settings of a recipe's run in `folder`, where its problems are written."""
    where = {"out": str(folder / recipe), "data": problems(folder), "recipe": recipe, "seed": seed}
    return Config.from_dict({**SETTINGS, **catalogue.fixed(recipe), **CHANGES.get(recipe, {}), **where, **changes})


@contextlib.contextmanager
def loading(model):
    """fuserl loads this model, whatever it is asked for."""
    loaded, models.load = models.load, lambda *_: (model, Digits())
    try:
        yield
    finally:
        models.load = loaded


def keep(recipe: str, provider: str, runs: list[tuple[dict, dict, float]], **more) -> None:
    """Print what a run of each seed came to, and append it to the rows.

    Args:
        recipe, provider: what was trained, and with whose trainer.
        runs: what `judged` gives, by seed.
        more: what else the row says.
    """
    before, after = ([round(run[side]["accuracy"], 4) for run in runs] for side in (0, 1))
    pairs = [round(run[1]["pair_accuracy"], 4) for run in runs if "pair_accuracy" in run[1]]
    means = f"{statistics.mean(before):.3f} -> {statistics.mean(after):.3f}"
    print(f"{recipe:<14} {provider:<11} {means}  {after} {pairs or ''}", flush=True)
    row = {"recipe": recipe, "provider": provider, "before": before, "after": after, "pairs": pairs}
    row |= {"steps": SETTINGS["steps"], "seconds": _undisturbed(run[2] for run in runs), **more}
    facts = {"device": bench.device(), **machine.versions(), "commit": machine.commit()}
    facts["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    with RESULTS.open("a") as file:
        file.write(json.dumps({**row, **facts}) + "\n")


def main(recipes) -> None:
    """Train with the recipes, print a table and keep the rows."""
    for recipe in recipes or catalogue.RECIPES:
        keep(recipe, "fuserl", [judged(recipe, seed) for seed in SEEDS])


def _undisturbed(seconds) -> float | None:
    """The median, or None where other programs wanted the processor too, and a time says nothing."""
    return round(statistics.median(seconds), 2) if os.getloadavg()[0] < 1.5 else None


def train(model, config: Config) -> Path:
    """Train a model by our loop; returns the folder of the run."""
    with loading(model), contextlib.redirect_stdout(io.StringIO()):
        return loop.train(config)


if __name__ == "__main__":
    main(sys.argv[1:])
