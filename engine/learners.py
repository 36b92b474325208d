"""The policy and the critic of a run, from its configuration."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from fuserl.engine import adapters, models, sources
from fuserl.engine.config import Config
from fuserl.engine.policy import Policy, Sampling, Updating
from fuserl.engine.recipe import Recipe
from fuserl.engine.second_models import Teacher


def of(config: Config, recipe: Recipe) -> tuple[Policy, Policy | None]:
    """The policy that a resolved configuration and its recipe ask for, and the critic where it is a model apart."""
    reads = {*recipe.reads, *recipe.loss.reads}
    refers = any(field.startswith("ref_") or field == "features" for field in reads)
    seconds = {"reference": recipe.reference if refers else None, "teacher": recipe.teacher}
    for name, path in (("reference", config.reference), ("teacher", config.teacher)):
        if path and seconds[name] is not None:
            seconds[name] = models.load(path, config.device, torch.float32)[0]
    policy = policy_of(config, value=bool({"value", "score"} & {*recipe.loss.outputs}), **seconds)
    policy.source = sources.of(config, policy.model, policy.tokenizer)
    if recipe.critic is None:
        return policy, None
    critic = policy_of(config, value=True, lr=recipe.critic.lr)
    critic.meter = policy.meter  # a phase is one for both
    return policy, critic


def policy_of(
    config: Config,
    *,
    reference: Teacher | nn.Module | None = None,
    teacher: Teacher | nn.Module | None = None,
    value: bool = False,
    lr: float | None = None,
) -> Policy:
    """Load the configured model, prepare it for training, and give it the run's settings."""
    model, tokenizer = models.load(config.model, config.device, torch.float32)
    if config.lora_rank:
        model = adapters.lora(
            model,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            targets=config.lora_targets,
        )
    if config.freeze:
        adapters.frozen(model, config.freeze)
    if config.checkpoint_activations:
        adapters.checkpoint_activations(model)
    sampling = Sampling(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Sampling)})
    settings = {field.name: getattr(config, field.name, None) for field in dataclasses.fields(Updating)}
    settings |= {"lr": lr or config.lr, "total": config.steps * config.epochs * config.minibatches}
    compute = getattr(torch, config.dtype)
    return Policy(
        model, tokenizer, sampling, Updating(**settings), seed=config.seed, reference=reference, teacher=teacher,
        value=value, compute=compute, cut=config.shard == "full", offload=config.offload,
    )  # fmt: skip
