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
    task = prompts.configured(settings(target, changes))
    held_out = task.held_out()
    if not held_out:
        raise ValueError("eval: there must be held-out problems; got --eval-problems 0. Ask for some.")
    config, recipe, policy, step = restored(target, changes)
    policy.check_lengths(task, recipe.learns_from)
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
    exporting.require_new(out)
    _, recipe, policy, step = restored(run, {})
    head = policy.value if recipe.loss.outputs == ("score",) else None
    folder = exporting.write(policy.model, policy.tokenizer, out, dtype=getattr(torch, dtype), score=head)
    print(f"{folder}: {run} at step {step}, {dtype}")
    return 0


def settings(target: str, changes: dict) -> Config:
    """The resolved settings of a run, or the defaults for a model, with changes."""
    base = Config.read(Path(target) / "config.json") if _is_run(target) else Config(model=target)
    return base.replace(**changes).resolved()


def restored(target: str, changes: dict) -> tuple[Config, Recipe, Policy, int]:
    """The settings, recipe and policy of a target, and the step that its weights are of (0 for a model)."""
    run, config = _is_run(target), settings(target, changes)
    found = checkpoint.newest(Path(target)) if run else None
    if run and found is None:
        raise ValueError(
            f"restored: the run must have a checkpoint; {target} has none yet. Wait for --save-every steps."
        )
    torch.set_num_threads(config.threads)
    recipe = catalogue.recipe(config)
    policy = learners.of(config, recipe)[0]
    if found is None:
        return config, recipe, policy, 0
    state.copy(policy.parameters(), found.tensors("policy"), f"{found.path.name} of {target}")
    return config, recipe, policy, found.step


def _is_run(target: str) -> bool:
    """Whether a folder is a run's: it holds metrics, or its config.json our settings and not a model's."""
    folder = Path(target)
    if (folder / "metrics.jsonl").is_file():
        return True
    try:
        described = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(described, dict) and "reasons" in described
