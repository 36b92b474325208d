"""Where tokens come from: sampled by the policy, sampled until they teach something, or given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from fuserl.engine import adapters, sharding, sources
from fuserl.engine.batch import Rollouts, offsets_of
from fuserl.engine.prompts import Prompt


def sampled(group_size: int, **turns) -> Callable:
    """A rollout slot: `group_size` completions of every prompt, drawn from the policy as its sampling settings say.

    Args:
        group_size: completions of each prompt.
        turns: reply and chunk, as of `Policy.generate`.
    """
    return lambda policy, prompts: policy.generate(prompts, group_size=group_size, **turns)


def from_reference(policy, prompts: list[Prompt], **drawing) -> Rollouts:
    """Completions of every prompt drawn from the policy's reference, by its sampling settings and `Policy.generate`.

    It draws in this process, whatever the policy's own completions come from.
    """
    with policy.seconds["ref"].reading() as model, sharding.uncut(adapters.base(model)):
        own, policy.source = policy.source, sources.Own(model, policy.tokenizer)
        try:
            return policy.generate(prompts, **drawing)
        finally:
            policy.source = own


def sampled_from_greedy(group_size: int) -> Callable:
    """A rollout slot: of every prompt the greedy completion, and `group_size` - 1 drawn as the settings say."""

    def rollout(policy, prompts: list[Prompt]) -> Rollouts:
        greedy = policy.generate(prompts, group_size=1, greedy=True)
        return greedy if group_size == 1 else beside(greedy, policy.generate(prompts, group_size=group_size - 1))

    return rollout


def scored(draw: Callable, reward: Callable) -> Callable:
    """The rollout slot `draw`, with a reward that is for training: the recipe's own judges held-out problems.

    Args:
        draw: (policy, prompts) -> Rollouts; those that come with rewards keep them.
        reward: as of a recipe.
    """

    def rollout(policy, prompts: list[Prompt]) -> Rollouts:
        drawn = draw(policy, prompts)
        if drawn.scores is not None:
            return drawn
        rollouts, rewards, facts = _rewarded(policy, drawn, reward)
        return dataclasses.replace(rollouts, scores=(rewards, facts))

    rollout.close = getattr(reward, "close", lambda: None)
    return rollout


def noted(draw: Callable, *facts: Callable) -> Callable:
    """The rollout slot `draw`, with what each of `facts` knows of its rollouts.

    Args:
        draw: (policy, prompts) -> Rollouts.
        facts: (policy, Rollouts) -> {name: (B, ...)}.
    """

    def rollout(policy, prompts: list[Prompt]) -> Rollouts:
        rollouts = draw(policy, prompts)
        found = {name: value for of in facts for name, value in of(policy, rollouts).items()}
        return dataclasses.replace(rollouts, facts=rollouts.facts | found)

    return rollout


def mixed(group_size: int, groups: int, reward: Callable) -> Callable:
    """A rollout slot: prompts in turn, `groups` at a time, until as many groups have rewards that differ.

    Groups whose rewards all agree are dropped; there may be fewer than `groups` in the end, and where no group is
    mixed, the first one stays.
    """

    def rollout(policy, prompts: list[Prompt]) -> Rollouts:
        kept, facts, found = [], {}, 0
        for begin in range(0, len(prompts), groups):
            rollouts = policy.generate(prompts[begin : begin + groups], group_size=group_size)
            rollouts, rewards, seen = _rewarded(policy, rollouts, reward)
            facts |= {name: facts.get(name, 0) + value for name, value in seen.items()}
            each = rewards.view(-1, group_size)
            good = (each.amax(1) > each.amin(1)).nonzero().squeeze(-1)
            if begin == 0 and not len(good):
                spare = selected(rollouts, torch.tensor([0]), rewards)
            kept.append(selected(rollouts, good[: groups - found], rewards))
            found += len(kept[-1].prompts)
            if found == groups:
                break
        taken = joined(kept) if found else spare
        return dataclasses.replace(taken, scores=(taken.scores[0], facts))

    return rollout


def _rewarded(policy, rollouts: Rollouts, reward: Callable) -> tuple[Rollouts, Tensor, dict]:
    """The rollouts with what the reward says of each, the rewards, and what it says of all."""
    with policy.meter.phase("reward"):
        rewards, seen = reward(rollouts)
    each_of = {name: value for name, value in seen.items() if isinstance(value, Tensor)}
    rollouts = dataclasses.replace(rollouts, facts=rollouts.facts | each_of)
    return rollouts, rewards, {name: value for name, value in seen.items() if name not in each_of}


def demonstrations(policy, prompts: list[Prompt]) -> Rollouts:
    """A rollout slot: each prompt's own answer as its one completion, ended as the policy's end, with reward 1."""
    rollouts = given(policy, prompts, [(prompt.answer,) for prompt in prompts])
    return dataclasses.replace(rollouts, scores=(torch.ones(len(prompts)), {}))


def pairs(policy, prompts: list[Prompt]) -> Rollouts:
    """A rollout slot: each prompt's chosen and rejected completion, with rewards 1 and 0."""
    rollouts = given(policy, prompts, [(prompt.chosen, prompt.rejected) for prompt in prompts])
    return dataclasses.replace(rollouts, scores=(torch.tensor([1.0, 0.0]).repeat(len(prompts)), {}))


def given(policy, prompts: list[Prompt], texts: list[tuple[str, ...]]) -> Rollouts:
    """Completions that the data brings, `texts` of each prompt, as many for all: with rollout_logprobs of NaN."""
    for prompt, several in zip(prompts, texts, strict=True):
        if None in several:
            raise ValueError(
                f"rollouts: every prompt must have completions to learn from; {prompt.text[-80:]!r} lacks one. "
                "Use data with answers, or with chosen and rejected."
            )
    completions = [
        policy.encode_completion(prompt.text, text)
        for prompt, several in zip(prompts, texts, strict=True)
        for text in several
    ]
    tokens = torch.cat(completions)
    return Rollouts(
        prompts=prompts,
        prompt_tokens=[policy.encode(prompt.text) for prompt in prompts],
        group=torch.arange(len(prompts)).repeat_interleave(len(texts[0])),
        tokens=tokens,
        offsets=offsets_of(torch.tensor([len(each) for each in completions])),
        rollout_logprobs=torch.full(tokens.shape, torch.nan),  # nobody drew them
        texts=[text for several in texts for text in several],
        finish=["stop"] * len(completions),
    )


def selected(rollouts: Rollouts, groups: Tensor, rewards: Tensor) -> Rollouts:
    """The groups numbered `groups` (g,), renumbered from 0, with their rewards out of (B,) as scores."""
    members = [(rollouts.group == group).nonzero().squeeze(-1) for group in groups.tolist()]
    index = torch.cat([torch.zeros(0, dtype=torch.int64), *members])
    return dataclasses.replace(
        rollouts_at(rollouts, index),
        prompts=[rollouts.prompts[group] for group in groups.tolist()],
        prompt_tokens=[rollouts.prompt_tokens[group] for group in groups.tolist()],
        group=torch.cat([index[:0], *(torch.full_like(each, new) for new, each in enumerate(members))]),
        scores=(rewards[index], {}),
    )


def rollouts_at(rollouts: Rollouts, index: Tensor) -> Rollouts:
    """The rollouts `index` (b,) in their order, of the same prompts, without scores."""
    rows = [torch.arange(rollouts.offsets[b], rollouts.offsets[b + 1]) for b in index.tolist()]
    rows = torch.cat([torch.zeros(0, dtype=torch.int64), *rows])
    return dataclasses.replace(
        rollouts,
        group=rollouts.group[index],
        tokens=rollouts.tokens[rows],
        offsets=offsets_of(rollouts.offsets.diff()[index]),
        rollout_logprobs=rollouts.rollout_logprobs[rows],
        texts=[rollouts.texts[b] for b in index.tolist()],
        finish=[rollouts.finish[b] for b in index.tolist()],
        scores=None,
        trained=rollouts.trained[rows],
        chunks=[rollouts.chunks[b] for b in index.tolist()],
        facts={name: value[index] for name, value in rollouts.facts.items()},
    )


def beside(*several: Rollouts) -> Rollouts:
    """Completions of the same prompts as one: each prompt's of the first, then of the second, and so on; no scores."""
    prompts = several[0].prompts
    if any(each.prompts != prompts for each in several):
        raise ValueError("beside: rollouts must be of the same prompts; some are not. Complete the same ones.")
    nothing = [dataclasses.replace(each, scores=(torch.zeros(len(each)), {})) for each in several]
    whole = joined(nothing)
    whole = dataclasses.replace(
        whole, prompts=prompts, prompt_tokens=several[0].prompt_tokens, group=whole.group % len(prompts)
    )
    return rollouts_at(whole, whole.group.argsort(stable=True))


def joined(several: list[Rollouts]) -> Rollouts:
    """Rollouts one after the other, their groups renumbered."""
    groups = [len(each.prompts) for each in several]
    shifts = [sum(groups[:at]) for at in range(len(several))]
    return Rollouts(
        prompts=[prompt for each in several for prompt in each.prompts],
        prompt_tokens=[tokens for each in several for tokens in each.prompt_tokens],
        group=torch.cat([each.group + shift for each, shift in zip(several, shifts, strict=True)]),
        tokens=torch.cat([each.tokens for each in several]),
        offsets=offsets_of(torch.cat([each.offsets.diff() for each in several])),
        rollout_logprobs=torch.cat([each.rollout_logprobs for each in several]),
        texts=[text for each in several for text in each.texts],
        finish=[finish for each in several for finish in each.finish],
        scores=(torch.cat([each.scores[0] for each in several]), {}),
        trained=torch.cat([each.trained for each in several]),
        chunks=[chunks for each in several for chunks in each.chunks],
        facts={name: torch.cat([each.facts[name] for each in several]) for name in several[0].facts},
    )
