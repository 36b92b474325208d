"""Decoding by transformers' own `generate`, for models whose attention cannot take our cache: the draws are ours.

One call takes all rollouts of one text, so that nothing is padded, and what was put into a rollout is read with all
that stands before it. Random numbers are named as elsewhere; bits depend on how many rollouts are drawn together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from fuserl.engine.sampling import Sampling
from fuserl.engine.scheduling import Rollout


def run(
    model: nn.Module,
    rollouts: list[Rollout],
    most: int,
    rows: int | None,
    sampling: Sampling,
    drew: Callable[[Rollout], None],
) -> None:
    """Draws until all rollouts have a `finish`, which `drew`, called with each behind each token, is to set.

    Args:
        model: in eval mode.
        rollouts: of any prompts.
        most: tokens of any of them.
        rows: rollouts decoded at once, None for all of a text.
    """
    device, waiting, before = next(model.parameters()).device, list(rollouts), model.generation_config
    # What the model's own settings say of penalties and ends is not what was asked for.
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    try:
        while waiting:
            first = waiting[0]
            alike = [each for each in waiting if each.source is first.source and each.tokens == first.tokens][:rows]
            text = torch.tensor([first.source.tokens + first.tokens], device=device).expand(len(alike), -1)
            drawing = _Drawing(alike, sampling, drew)
            model.generate(
                text, attention_mask=torch.ones_like(text), max_new_tokens=most - first.count,
                logits_processor=LogitsProcessorList([drawing]),
                stopping_criteria=StoppingCriteriaList([drawing.ended]),
            )  # fmt: skip
            waiting = [each for each in waiting if each.finish is None]
    finally:
        model.generation_config = before


class _Drawing(LogitsProcessor):
    """Draws a token for every rollout that goes on, and leaves nothing else to choose."""

    def __init__(self, rollouts: list[Rollout], sampling: Sampling, drew: Callable[[Rollout], None]):
        self.sampling, self.drew = sampling, drew
        self.going = dict(enumerate(rollouts))
        self.ended = _Ended(self)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows, rollouts = list(self.going), list(self.going.values())
        names = torch.tensor([[each.stream for each in rollouts], [each.count for each in rollouts]])
        ids, logprobs = self.sampling.draw(scores[rows], *names.to(scores.device))
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, 0] = 0.0
        chosen[rows, 0] = -torch.inf
        chosen[rows, ids] = 0.0
        for row, rollout, token, logprob in zip(rows, rollouts, ids.tolist(), logprobs.tolist(), strict=True):
            rollout.draw(token, logprob)
            size = len(rollout.tokens)
            self.drew(rollout)
            while rollout.reply is not None:
                self.drew(rollout)
            if rollout.finish or len(rollout.tokens) != size:
                del self.going[row]
        return chosen


class _Ended(StoppingCriteria):
    """Which rows of the call are over."""

    def __init__(self, drawing: _Drawing):
        self.drawing = drawing

    def __call__(self, input_ids: Tensor, scores: Tensor, **others) -> Tensor:
        return torch.tensor([row not in self.drawing.going for row in range(len(input_ids))], device=input_ids.device)
