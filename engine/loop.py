"""The loop that every recipe runs: prompts, rollout, reward, advantage, update."""

from __future__ import annotations

import contextlib
import functools
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fuserl.engine import catalogue, ceiling, credit, evaluation, learners, prompts, ranks, sources, traces, trackers
from fuserl.engine.ahead import Ahead
from fuserl.engine.batch import Rollouts, batch_of
from fuserl.engine.config import Config
from fuserl.engine.follower import Follower
from fuserl.engine.metrics import Run
from fuserl.engine.policy import Policy
from fuserl.engine.recipe import Recipe
from fuserl.engine.rewards import RewardError, rehearse
from fuserl.engine.state import State


def train(config: Config, *, resume: Path | None = None) -> Path:
    """Run a recipe to its end and return the run's folder: configuration, metrics, checkpoints, plot.

    Args:
        config: the settings.
        resume: the folder of a run to go on with, from its newest checkpoint.

    Held-out problems are evaluated before and after, and every `eval_every` steps in between when that is set. Started
    by torchrun, this is one rank of a run: see `ranks`.
    """
    config = config.resolved()
    _begin(config)
    trackers.check(config.trackers)
    traces.chosen(config.profile, config.steps)  # refused before anything is loaded
    with contextlib.ExitStack() as stack:
        stack.enter_context(ranks.joined(config.device))
        recipe, task = catalogue.recipe(config), prompts.configured(config)
        task.require(*recipe.learns_from)
        sources.check(config, recipe)
        for slot in (recipe.reward, recipe.rollout):
            stack.callback(getattr(slot, "close", lambda: None))
        # What can be wrong is found in the order of what it costs to find: the folder, the reward, the model.
        run = stack.enter_context(Run(config, resume=resume) if ranks.first() else Follower())
        run.folder = Path(ranks.everyones(str(run.folder))[0])
        if config.reward:
            rehearse(recipe.reward, task)
        # Before the model takes its memory, and the highest mark of it is taken.
        best = ceiling.measured(config.device, getattr(torch, config.dtype))
        policy, critic = learners.of(config, recipe)
        policy.meter.ceiling = best
        policy.check_lengths(task, recipe.learns_from)
        held_out = task.held_out()
        ranks.require_same("held-out problems", [prompt.text for prompt in held_out])
        ahead = stack.enter_context(Ahead(policy, recipe, overlap=config.overlap))
        parts = {**recipe.state, **policy.seconds, "ahead": ahead}  # which asks the recipe for prompts, when restored
        state = State(recipe.name, {"policy": policy} | ({"critic": critic} if critic else {}), parts)
        if resume is not None:
            state.restore(run)
        if state.step < config.steps and ranks.first():
            state.require_room(run, config.keep)
        stack.enter_context(_failures_kept(run, state, ahead))
        judge = functools.partial(evaluated, policy, recipe, held_out, config.eval_samples)
        run.note(best.words(config.dtype))
        if state.step == 0:
            run.evaluated(0, judge())
        saving = {}  # the time of a checkpoint is on the row of the step after it
        profiled = traces.chosen(config.profile, config.steps, start=state.step)
        while state.step < config.steps:
            state.step += 1
            with run.traced(state.step) if state.step in profiled else contextlib.nullcontext():
                row = step(policy, critic, recipe, run, state, ahead)
            run.log({"step": state.step, **row, **saving})
            _refuse_skipping(state, config.max_skipped)
            if state.step == config.steps or _due(state.step, config.eval_every):
                run.evaluated(state.step, judge())
            started, saving = time.perf_counter(), {}
            if state.step == config.steps or _due(state.step, config.save_every):
                state.save(run, config.keep)
                saving = {"save_s": time.perf_counter() - started}
    return run.folder


def _begin(config: Config) -> None:
    """Threads, and every random stream from its beginning."""
    torch.set_num_threads(config.threads)
    for seeded in (torch.manual_seed, random.seed, np.random.seed):
        seeded(config.seed)


def step(
    policy: Policy, critic: Policy | None, recipe: Recipe, run: Run, state: State, ahead: Ahead
) -> dict[str, float]:
    """One turn of the loop; returns its metrics."""
    started = time.perf_counter()
    policy.meter.clear()
    rollouts, drawn = ahead.take(state.step)
    with policy.meter.phase("reward"):
        rewards, facts = rollouts.scores or recipe.reward(rollouts)
    taught = facts.pop("teacher_prompts", None)
    batch = batch_of(rollouts, rewards, step=state.step)
    batch = batch.replace(teacher_prompts=taught and [policy.encode(text) for text in taught])
    batch = batch.replace(facts=batch.facts | {name: x for name, x in facts.items() if isinstance(x, Tensor)})
    batch = batch if recipe.packed is None else recipe.packed(batch)
    batch = (critic or policy).score(batch, [field for field in recipe.reads if field == "values"])
    batch = policy.score(batch, [field for field in recipe.reads if field != "values"])
    advantages = recipe.advantage(batch)
    batch = batch.with_advantages(advantages) if isinstance(advantages, Tensor) else advantages
    run.sampled(state.step, rollouts, rewards, None, functools.partial(credit.kept, batch, rollouts, policy.tokenizer))
    batches = [batch] if recipe.batches is None else recipe.batches(batch)
    statistics = _averaged([policy.update(each, recipe.loss) for each in batches])
    if critic is not None:
        theirs = critic.update(batch, recipe.critic.loss)
        statistics = {**{f"critic_{name}": value for name, value in theirs.items()}, **statistics}
        statistics["value_loss"] = theirs["value_loss"]
    ahead.wait()
    state.skipped = state.skipped + 1 if statistics.get("skipped") else 0
    seconds = time.perf_counter() - started
    return {
        **({} if recipe.learns_from else {**_rewarded(rewards, rollouts.group), **drawn}),
        **_described(rollouts),
        **_numbers({**batch.facts, **rollouts.facts, **facts}),
        **_explained(batch),
        "seconds": seconds,
        **policy.meter.row(seconds),
        **statistics,
    }


def evaluated(policy: Policy, recipe: Recipe, held_out: list, samples: int) -> dict[str, float]:
    """Accuracy on held-out problems by the recipe's reward, and its own evaluation of them, where it has each."""
    if not held_out:
        return {}
    policy.sync()
    started = time.perf_counter()
    row = {} if recipe.evaluate is None else recipe.evaluate(policy, held_out)
    if recipe.reward is not None:
        row |= evaluation.evaluate(policy, held_out, recipe.reward, samples)
    return {**row, "eval_s": time.perf_counter() - started}


@contextlib.contextmanager
def _failures_kept(run: Run, state: State, ahead: Ahead) -> Iterator[None]:
    """Write down everything that was generated, for a reward that fails and for the next step."""
    try:
        yield
    except RewardError as error:
        error.add_note(f"All of its rollouts are in {run.failed(state.step, error.rollouts, error.rewards)}.")
        if (drawn := ahead.waiting()) is not None:
            error.add_note(f"Those drawn ahead are in {run.failed(*drawn, None)}.")
        raise


def _rewarded(rewards: Tensor, group: Tensor) -> dict[str, float]:
    return {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std()) if len(rewards) > 1 else 0.0,
        "mixed": _mixed(rewards, group),
    }


def _described(rollouts: Rollouts) -> dict[str, float]:
    return {
        "length": len(rollouts.tokens) / len(rollouts),
        "truncated": rollouts.finish.count("length") / len(rollouts),
        "tokens": len(rollouts.tokens),
    }


def _numbers(facts: dict) -> dict[str, float]:
    """Facts as metrics: numbers, and the means of what is one number per rollout."""
    single = {name: x for name, x in facts.items() if not isinstance(x, Tensor) or x.dim() == 1}
    return {name: float(x.float().nanmean()) if isinstance(x, Tensor) else x for name, x in single.items()}


def _averaged(rows: list[dict[str, float]]) -> dict[str, float]:
    """The means of several updates' statistics, each over those that have it."""
    known = [{name: value for name, value in row.items() if not math.isnan(value)} for row in rows]
    found = {name: [row[name] for row in known if name in row] for row in rows for name in row}
    return {name: sum(values) / len(values) if values else math.nan for name, values in found.items()}


def _mixed(rewards: Tensor, group: Tensor) -> float:
    """Share of the groups whose rewards differ: those that teach a group-relative method something."""
    least, most = (
        torch.full((int(group.max()) + 1,), sign * torch.inf).scatter_reduce(0, group, rewards, kind)
        for sign, kind in ((1, "amin"), (-1, "amax"))
    )
    return float((most > least).float().mean())


def _explained(batch) -> dict[str, float]:
    """Share of the returns' variance that the values explain, where there are values."""
    if batch.values is None or batch.returns is None:
        return {}
    variance = float(batch.returns.var(correction=0))
    residual = float((batch.returns - batch.values).var(correction=0))
    return {"explained_variance": 1 - residual / variance if variance else math.nan}


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _refuse_skipping(state: State, limit: int) -> None:
    if state.skipped > limit:
        raise RuntimeError(
            f"train: gradients must be finite; those of the last {state.skipped} steps were not, and the weights are "
            "as they were before them. Lower --lr, or look for inf or NaN in the model and the rewards' scale."
        )
