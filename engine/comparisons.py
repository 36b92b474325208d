"""Pairs of a policy's own completions, an oracle's preferences between them, and all that were ever collected.

Of three completions of each prompt the first two are a pair, and the last, which the reference draws, calibrates.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import torch
from torch import Tensor

from fuserl.engine import mixtures, rollouts
from fuserl.engine.batch import Batch, Counts, Rollouts, offsets_of
from fuserl.engine.contracts import require, require_one_of
from fuserl.engine.prompts import Prompt

ORACLES = ("larger", "bradley_terry")
_TOKENS = ("tokens", "ref_logprobs")


def drawn(reward: Callable, *, second: str = "policy") -> Callable:
    """A rollout slot: two completions of every prompt with their rewards, the second by the policy or the reference."""
    good = second in ("policy", "reference")
    require("drawn", "second", second, good, "policy or reference, which draws a pair's second completion")

    def rollout(policy, prompts: list[Prompt]) -> Rollouts:
        if second == "policy":
            pairs = policy.generate(prompts, group_size=2)
        else:
            pairs = rollouts.beside(policy.generate(prompts, group_size=1), _by_reference(policy, prompts))
        with policy.meter.phase("reward"):
            return dataclasses.replace(pairs, scores=reward(pairs))

    return rollout


def calibrated(slot: Callable) -> Callable:
    """A rollout slot of pairs with scores, and behind them one completion of every prompt by the reference.

    Its reward is the mean of the pair's, so that averages are those of pairs.
    """

    def rollout(policy, prompts: list[Prompt]) -> Rollouts:
        pairs = slot(policy, prompts)
        rewards, facts = pairs.scores
        both, each = rollouts.beside(pairs, _by_reference(policy, prompts)), rewards.view(-1, 2)
        numbers = {name: x for name, x in facts.items() if not isinstance(x, Tensor)}
        return dataclasses.replace(both, scores=(torch.cat([each, each.mean(1, keepdim=True)], 1).flatten(), numbers))

    return rollout


def _by_reference(policy, prompts: list[Prompt]) -> Rollouts:
    """A completion of each prompt by the reference; that it is not the policy's draw shows in its log-probs, NaN."""
    drawn = rollouts.from_reference(policy, prompts)
    return dataclasses.replace(drawn, rollout_logprobs=torch.full_like(drawn.rollout_logprobs, torch.nan))


def apart(batch: Batch) -> tuple[Batch, Batch]:
    """The pairs of a batch, and the rollouts that calibrate: of three in a group the last."""
    index = torch.arange(len(batch.group)).view(-1, 3)
    return tuple(batch.rollouts_at(each.flatten()).counted() for each in (index[:, :2], index[:, 2]))


def beside(batch: Batch) -> list[Batch]:
    """A step's one batch of given pairs: these are objective 0, the rollouts that calibrate are objective 1."""
    return [mixtures.joined(*apart(batch))]


def preferred(pairs: Batch, oracle: str, chance: torch.Generator) -> Batch:
    """The pairs with rewards of 1 and 0 for what an oracle prefers; where it cannot, a pair is left out.

    Args:
        pairs: two rollouts in each group.
        oracle: "larger" prefers the larger reward, and neither of equals; "bradley_terry" the first of two with the
            chance sigmoid(its reward - the other's).
        chance: what the second one draws from.
    """
    require_one_of("preferred", "oracle", oracle, ORACLES)
    one, two = pairs.group.argsort(stable=True).view(-1, 2).unbind(1)
    more = pairs.rewards[one] - pairs.rewards[two]
    if oracle == "larger":
        known, first = more != 0, more > 0
    else:
        known, first = more == more, torch.rand(len(more), generator=chance) < more.sigmoid()
    labels = torch.zeros_like(pairs.rewards).index_fill(0, torch.where(first, one, two), 1.0)
    kept = torch.stack([one, two], 1)[known].flatten().sort().values
    return pairs.replace(rewards=labels).rollouts_at(kept).counted()


class Buffer:
    """Every pair that was ever compared, with what calibrates: what each step learns from, the new ones and old ones.

    Args:
        oracle: as of `preferred`.
        replay: earlier steps that each step learns from again, drawn anew; None is all of them.
        seed: of every random number, with the step's.
    """

    def __init__(self, oracle: str, replay: int | None, seed: int):
        require_one_of("Buffer", "oracle", oracle, ORACLES)
        require("Buffer", "replay", replay, replay is None or replay >= 0, "an integer >= 0, or None for all")
        self.oracle, self.replay, self.seed = oracle, replay, seed
        self.kept: list[tuple[Batch, Batch]] = []

    def grown(self, batch: Batch) -> list[Batch]:
        """A step's batches: its own, then earlier ones in a random order; pairs are objective 0, the rest is 1."""
        # torch's generator hears of a seed its last 32 bits alone.
        named = random.Random(f"{self.seed} {batch.step}").getrandbits(32)
        chance = torch.Generator().manual_seed(named)
        pairs, rest = apart(batch)
        new = preferred(pairs, self.oracle, chance), rest
        order = torch.randperm(len(self.kept), generator=chance)
        older = [self.kept[at] for at in order[: self.replay].tolist()]
        self.kept.append(tuple(_plain(each) for each in new))
        return [mixtures.joined(*each) for each in [new, *older]]

    def state_dict(self) -> dict[str, Tensor]:
        """All that was collected, end to end."""
        parts = [part for pair in self.kept for part in pair]
        if not parts:
            return {}
        prompts = [tokens for part in parts for tokens in part.prompt_tokens]
        return {
            "sizes": torch.tensor([[len(part.group), len(part.prompt_tokens), part.step] for part in parts]),
            "prompts": torch.cat(prompts),
            "prompt_lengths": torch.tensor([len(tokens) for tokens in prompts]),
            "lengths": torch.cat([part.offsets.diff() for part in parts]),
            **{name: torch.cat([getattr(part, name) for part in parts]) for name in ("group", "rewards", *_TOKENS)},
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with what a `state_dict` holds."""
        parts, prompts = [], iter(state["prompts"].split(state["prompt_lengths"].tolist()) if state else ())
        left = {name: x for name, x in state.items() if name in ("lengths", "group", "rewards", *_TOKENS)}

        def taken(names: tuple[str, ...], count: int) -> dict[str, Tensor]:
            found = {name: left[name][:count] for name in names}
            left.update({name: left[name][count:] for name in names})
            return found

        for several, groups, step in state["sizes"].tolist() if state else ():
            found = taken(("lengths", "group", "rewards"), several)
            lengths = found.pop("lengths")
            count = int(lengths.sum())
            batch = Batch(
                **found,
                **taken(_TOKENS, count),
                rollout=torch.arange(several).repeat_interleave(lengths),
                offsets=offsets_of(lengths),
                rollout_logprobs=torch.full((count,), torch.nan),
                counts=Counts(0, 0, 0),
                prompt_tokens=[next(prompts) for _ in range(groups)],
                advantages=torch.ones(count),
                step=step,
            )
            parts.append(batch.counted())
        self.kept = list(zip(parts[::2], parts[1::2], strict=True))


def _plain(batch: Batch) -> Batch:
    """A batch without what only the step that drew it needs."""
    nobody = torch.full_like(batch.rollout_logprobs, torch.nan)
    return batch.replace(rollout_logprobs=nobody, old_logprobs=None, extra={}, facts={})
