"""What the initial policy could already do: problems that it solves, each with an answer of its, to be kept.

solved      problems of whose k samples at least a given share is right
stored      of each the first right sample, with its log-probs at the start: no second model while training
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fuserl.engine.batch import Batch, Counts, Rollouts, batch_of, offsets_of
from fuserl.engine.contracts import require
from fuserl.engine.mixtures import emptied, joined, woven
from fuserl.engine.prompts import Prompt
from fuserl.engine.rollouts import rollouts_at


@dataclass(frozen=True)
class Sample:
    """One right answer: its prompt's tokens (T,), its own (t,), and their log-probs (t,) at the start."""

    prompt: Tensor
    tokens: Tensor
    logprobs: Tensor


class Rehearsal:
    """The samples of problems that the policy solved before it was trained, by the problem's text: a recipe's state.

    Args:
        reward: (Rollouts) -> ((B,) rewards, facts); right is 1.0 or more.
        presamples: of each problem.
        solved: share of them that must be right.
    """

    def __init__(self, reward: Callable, *, presamples: int = 8, solved: float = 1.0):
        require("Rehearsal", "presamples", presamples, presamples >= 1, "an integer >= 1")
        require("Rehearsal", "solved", solved, 0 < solved <= 1, "in (0, 1]")
        self.reward, self.presamples, self.solved = reward, presamples, solved
        self.stored: dict[str, Sample] = {}
        self.drawn = False

    def exploring(self, sampler: Callable, config) -> Callable:
        """A rollout slot: the prompts that are no stored problem's; before the first call, `draw` of those of the run.

        A step that has stored problems only explores the first of them.

        Args:
            sampler: the prompts slot.
            config: resolved.
        """

        def rollout(policy, asked: list[Prompt]) -> Rollouts:
            every = (prompt for step in range(1, config.steps + 1) for prompt in sampler(step))
            self.draw(policy, every, config.groups)
            return policy.generate(self.unsolved(asked) or asked[:1], group_size=config.group_size)

        return rollout

    def rehearsing(self, advantage: Callable, sampler: Callable) -> Callable:
        """An advantage slot: that of explored rollouts, and `beside` these the samples of the step's problems."""

        def credit(batch: Batch) -> Batch:
            explored = batch.with_advantages(advantage(batch))
            return beside(explored, self.batch(sampler(batch.step), batch))

        return credit

    def draw(self, policy, prompts: Iterable[Prompt], at_once: int) -> None:
        """Sample the problems with the policy as it is, `at_once` of them together; only the first call does it."""
        if self.drawn:
            return
        self.drawn, every = True, list({prompt.text: prompt for prompt in prompts}.values())
        for begin in range(0, len(every), at_once):
            rollouts = policy.generate(every[begin : begin + at_once], group_size=self.presamples)
            with policy.meter.phase("reward"):
                right = self.reward(rollouts)[0] >= 1.0
            each = right.view(-1, self.presamples)
            first = each.int().argmax(1) + torch.arange(len(each)) * self.presamples
            index = first[each.float().mean(1) >= self.solved]
            if not len(index):
                continue
            kept = rollouts_at(rollouts, index)
            batch = policy.score(batch_of(kept, torch.ones(len(kept))), ["old_logprobs"])
            lengths = batch.offsets.diff().tolist()
            parts = zip(batch.tokens.split(lengths), batch.old_logprobs.split(lengths), strict=True)
            for b, (tokens, logprobs) in enumerate(parts):
                prompt = kept.prompt_of(b).text
                self.stored[prompt] = Sample(kept.prompt_tokens[int(kept.group[b])], tokens, logprobs)

    def unsolved(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Those of the prompts that are no stored problem's."""
        return [prompt for prompt in prompts if prompt.text not in self.stored]

    def batch(self, prompts: Sequence[Prompt], like: Batch) -> Batch | None:
        """The samples of the prompts that are stored problems', as a batch of groups of one; None where none is.

        Log-probs of the start are its ref_logprobs, rewards 1, and nobody drew it; dtype and step are those of `like`.
        """
        found = [self.stored[text] for text in dict.fromkeys(prompt.text for prompt in prompts) if text in self.stored]
        if not found:
            return None
        lengths, count = torch.tensor([len(each.tokens) for each in found]), len(found)
        tokens = torch.cat([each.tokens for each in found])
        return Batch(
            tokens=tokens,
            rollout=torch.arange(count).repeat_interleave(lengths),
            offsets=offsets_of(lengths),
            group=torch.arange(count),
            rewards=torch.ones(count, dtype=like.dtype),
            rollout_logprobs=torch.full(tokens.shape, torch.nan, dtype=like.dtype),
            counts=Counts(len(tokens), count, count),
            prompt_tokens=[each.prompt for each in found],
            advantages=torch.zeros(tokens.shape, dtype=like.dtype),
            ref_logprobs=torch.cat([each.logprobs for each in found]).to(like.dtype),
            step=like.step,
        )

    def state_dict(self) -> dict:
        """Texts, and the tensors of all samples end to end."""
        each = list(self.stored.values())
        none = [torch.zeros(0, dtype=torch.int64)]
        return {
            "drawn": self.drawn,
            "texts": list(self.stored),
            "prompts": torch.cat([x.prompt for x in each] or none),
            "prompt_lengths": torch.tensor([len(x.prompt) for x in each], dtype=torch.int64),
            "tokens": torch.cat([x.tokens for x in each] or none),
            "logprobs": torch.cat([x.logprobs for x in each] or [torch.zeros(0)]),
            "lengths": torch.tensor([len(x.tokens) for x in each], dtype=torch.int64),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on with the samples of a `state_dict`."""
        self.drawn, lengths = state["drawn"], state["lengths"].tolist()
        parts = (
            state["prompts"].split(state["prompt_lengths"].tolist()),
            state["tokens"].split(lengths),
            state["logprobs"].split(lengths),
        )
        self.stored = dict(zip(state["texts"], map(Sample, *parts), strict=True))


def beside(explored: Batch, rehearsed: Batch | None) -> Batch:
    """Rollouts with their advantages as objective 0, and rehearsed ones, if there are any, as 1."""
    return woven(joined(explored, emptied(explored) if rehearsed is None else rehearsed))
