"""What is done with a trained run, or with any model: it is judged on held-out problems, or written for others to load.

A target is a run's folder, whose newest checkpoint counts, or a model folder or hub name.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from fuserl.engine import catalogue, checkpoint, learners, loop, prompts, state
from fuserl.engine import export as exporting
from fuserl.engine.config import Config
from fuserl.engine.policy import Policy
from fuserl.engine.recipe import Recipe


def evaluate(target: str, changes: dict) -> int:
    """Print how the target does on held-out problems; a run's figures are added to its evaluations.jsonl.

    Args:
        target: as above.
        changes: settings that differ from the run's, or from the defaults.
    """
    config, recipe, policy, step = restored(target, changes)
    held_out = prompts.held_out(config)
    if not held_out:
        raise ValueError("eval: there must be held-out problems; got --eval-problems 0. Ask for some.")
    started = time.perf_counter()
    row = loop.evaluated(policy, recipe, held_out, config.eval_samples)
    getattr(recipe.reward, "close", lambda: None)()
    row = {"target": target, "step": step, **row, "seconds": round(time.perf_counter() - started, 3)}
    for name, value in row.items():
        print(f"{name:<16}{value:.4f}" if isinstance(value, float) else f"{name:<16}{value}")
    if _is_run(target):
        with (Path(target) / "evaluations.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "changes": changes}) + "\n")
    return 0


def export(run: str, out: str, dtype: str) -> int:
    """Write the newest checkpoint of a run as a transformers folder: adapters merged, a reward model with its head."""
    if not _is_run(run):
        raise ValueError(f"export: it must be a run's folder, which has a config.json; got {run!r}. Try `ls runs`.")
    _, recipe, policy, step = restored(run, {})
    head = policy.value if recipe.loss.outputs == ("value",) else None
    folder = exporting.write(policy.model, policy.tokenizer, out, dtype=getattr(torch, dtype), score=head)
    print(f"{folder}: {run} at step {step}, {dtype}")
    return 0


def restored(target: str, changes: dict) -> tuple[Config, Recipe, Policy, int]:
    """The settings, recipe and policy of a target, and the step that its weights are of (0 for a model)."""
    run = _is_run(target)
    base = Config.read(Path(target) / "config.json") if run else Config(model=target)
    config = base.replace(**changes).resolved()
    torch.set_num_threads(config.threads)
    recipe = catalogue.recipe(config)
    policy = learners.of(config, recipe)[0]
    if not run:
        return config, recipe, policy, 0
    found = checkpoint.newest(Path(target))
    if found is None:
        raise ValueError(
            f"restored: the run must have a checkpoint; {target} has none yet. Wait for --save-every steps."
        )
    state.copy(policy.parameters(), found.tensors("policy"), f"{found.path.name} of {target}")
    return config, recipe, policy, found.step


def _is_run(target: str) -> bool:
    """Whether a folder is a run's: its config.json holds our settings, not a model's."""
    path = Path(target) / "config.json"
    try:
        return "reasons" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
