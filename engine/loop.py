"""The loop that every recipe runs: prompts, rollout, reward, advantage, update."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from fuserl.engine import catalogue, models, prompts
from fuserl.engine.batch import batch_of
from fuserl.engine.config import Config
from fuserl.engine.metrics import Run
from fuserl.engine.policy import Policy, Sampling, Updating
from fuserl.engine.recipe import Recipe


def train(config: Config) -> Path:
    """Run a recipe to its end and return the run's folder: configuration, metrics, plot.

    Accuracy on held-out problems (greedy, one completion each) is measured before and after, and every `eval_every`
    steps in between when that is set.
    """
    config = config.resolved()
    torch.manual_seed(config.seed)
    torch.set_num_threads(config.threads)
    recipe = catalogue.recipe(config)
    policy = policy_of(config, reference=recipe.loss.reference)
    held_out = prompts.held_out(config)
    with Run(config) as run:
        run.evaluated(0, accuracy(policy, held_out, recipe.reward))
        for number in range(1, config.steps + 1):
            run.log({"step": number, **step(policy, recipe, number)})
            if number == config.steps or (config.eval_every and number % config.eval_every == 0):
                run.evaluated(number, accuracy(policy, held_out, recipe.reward))
    return run.folder


def step(policy: Policy, recipe: Recipe, number: int) -> dict[str, float]:
    """One turn of the loop; returns its metrics."""
    started = time.perf_counter()
    rollouts = recipe.rollout(policy, recipe.prompts(number))
    generated = time.perf_counter()
    rewards = recipe.reward(rollouts)
    batch = batch_of(rollouts, rewards)
    advantages = recipe.advantage(batch)
    per_token = advantages.shape == batch.tokens.shape and advantages.shape != batch.rewards.shape
    batch = batch.replace(advantages=advantages if per_token else batch.to_tokens(advantages))
    statistics = policy.update(batch, recipe.loss)
    return {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "mixed": _mixed(rewards, rollouts.group),
        "length": len(rollouts.tokens) / len(rollouts),
        "tokens": len(rollouts.tokens),
        "generate_s": generated - started,
        "seconds": time.perf_counter() - started,
        **statistics,
    }


def accuracy(policy: Policy, held_out: list, reward) -> dict[str, float]:
    """Share of the held-out problems whose greedy completion gets the full reward, and how many there were."""
    if not held_out:
        return {"problems": 0, "correct": 0}
    rewards = reward(policy.generate(held_out, greedy=True))
    return {"problems": len(held_out), "correct": int((rewards >= 1.0).sum())}


def policy_of(config: Config, *, reference: bool = False) -> Policy:
    """Load the configured model and give it the run's sampling and updating settings."""
    model, tokenizer = models.load(config.model, config.device, torch.float32)
    sampling = Sampling(
        config.max_new_tokens, config.temperature, config.top_k, config.top_p, config.min_p, tuple(config.stop)
    )
    updating = Updating(
        lr=config.lr,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        epochs=config.epochs,
        minibatches=config.minibatches,
        micro_tokens=config.micro_tokens,
        chunk=config.chunk,
    )
    compute = getattr(torch, config.dtype)
    return Policy(model, tokenizer, sampling, updating, seed=config.seed, reference=reference, compute=compute)


def _mixed(rewards: Tensor, group: Tensor) -> float:
    """Share of the groups whose rewards differ: those that teach a group-relative method something."""
    least, most = (
        torch.full((int(group.max()) + 1,), sign * torch.inf).scatter_reduce(0, group, rewards, kind)
        for sign, kind in ((1, "amin"), (-1, "amax"))
    )
    return float((most > least).float().mean())
