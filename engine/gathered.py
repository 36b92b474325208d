"""The whole batch on every rank, from what each has generated of it."""

from __future__ import annotations

import torch

from fuserl.engine import ranks
from fuserl.engine.batch import Rollouts
from fuserl.engine.prompts import Prompt


def rollouts(own: Rollouts | None, prompts: list[Prompt]) -> Rollouts:
    """The completions of all `prompts`, the same on every rank and in the order in which one rank makes them.

    Args:
        own: those of this rank's `ranks.share` of the prompts; None where that is empty.
        prompts: G, the same on every rank.
    """
    if ranks.world() == 1 and own is not None:
        return own
    none = torch.zeros(0, dtype=torch.int64)
    own = own or Rollouts([], [], none, none, none.new_zeros(1), torch.zeros(0), [], [])
    group = own.group + ranks.share(len(prompts)).start
    told = ranks.everyones(
        {"texts": own.texts, "finish": own.finish, "chunks": own.chunks, "sizes": [*map(len, own.prompt_tokens)]}
    )
    texts, finish, chunks, sizes = ([each for part in told for each in part[name]] for name in told[0])
    numbers = (torch.cat([none, *own.prompt_tokens]), group, own.tokens, own.offsets.diff())
    parts = (*numbers, own.rollout_logprobs, own.trained.to(torch.uint8))
    prompt_tokens, group, tokens, lengths, logprobs, trained = (torch.cat(ranks.gathered(part)) for part in parts)
    return Rollouts(
        prompts=prompts,
        prompt_tokens=list(prompt_tokens.split(sizes)),
        group=group,
        tokens=tokens,
        offsets=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        rollout_logprobs=logprobs,
        texts=texts,
        finish=finish,
        trained=trained.bool(),
        chunks=chunks,
    )
