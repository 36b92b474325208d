"""Where tokens come from: sampled by the policy, or given as demonstrations."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fuserl.engine.batch import Rollouts
from fuserl.engine.prompts import Prompt


def sampled(group_size: int) -> Callable:
    """A rollout slot: `group_size` completions of every prompt, drawn from the policy as its sampling settings say."""
    return lambda policy, prompts: policy.generate(prompts, group_size=group_size)


def demonstrations(policy, prompts: list[Prompt]) -> Rollouts:
    """A rollout slot: each prompt's own answer as its one completion, ended the way the policy's completions end."""
    prompt_tokens, completions = [], []
    for prompt in prompts:
        if prompt.answer is None:
            raise ValueError(
                f"demonstrations: every prompt must have an answer to imitate; got none for {prompt.text[-80:]!r}. "
                "Use a task with answers."
            )
        prompt_tokens.append(policy.encode(prompt.text))
        completions.append(policy.encode_completion(prompt.answer))
    lengths = torch.tensor([0] + [len(c) for c in completions])
    tokens = torch.cat(completions)
    return Rollouts(
        prompts=prompts,
        prompt_tokens=prompt_tokens,
        group=torch.arange(len(prompts)),
        tokens=tokens,
        offsets=lengths.cumsum(0),
        rollout_logprobs=torch.zeros(len(tokens)),
        texts=[prompt.answer for prompt in prompts],
        finish=["stop"] * len(prompts),
    )
