"""Completions behind no prompt: the beginning-of-text token in its place, positions from 0."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fuserl.engine.advantages import centred, signed, standardized
from fuserl.engine.batch import Batch
from fuserl.engine.contracts import one_token, require, require_one_of
from fuserl.engine.mixtures import emptied, joined, only, woven

SIGNS = {
    "negative": lambda a: a < 0,
    "positive": lambda a: a > 0,
    "both": lambda a: torch.ones_like(a, dtype=torch.bool),
    "none": lambda a: torch.zeros_like(a, dtype=torch.bool),
}
_USUAL = "<|im_start|>"  # what opens a text where a tokenizer of this family names no beginning


def token(tokenizer, text: str | None = None) -> int:
    """The id of the token that opens a text.

    Args:
        tokenizer: a transformers tokenizer.
        text: the token; by default the tokenizer's beginning of text, <|im_start|> where it names none but has that,
            else its end of text, which is what stands between the texts that models are pre-trained on.

    Raises:
        ValueError: `text` is no one token, or there is none of the three.
    """
    if text is not None:
        return one_token("bos", tokenizer, text)
    named = getattr(tokenizer, "bos_token_id", None)
    if named is None and hasattr(tokenizer, "get_vocab"):
        named = tokenizer.get_vocab().get(_USUAL)
    found = tokenizer.eos_token_id if named is None else named
    if found is None:
        raise ValueError("bos: the tokenizer must have a token that opens texts; it names none. Give one with --bos.")
    return found


def known(text: str | None = None) -> Callable:
    """The fact that `two_spaces` needs: (policy, Rollouts) -> {"opening": (B, 1) the id of `token`}."""
    return lambda policy, drawn: {"opening": torch.full((len(drawn), 1), token(policy.tokenizer, text))}


def without_prompts(batch: Batch, opening: int) -> Batch:
    """The batch with the token `opening` in each prompt's place, where nobody has drawn or scored its tokens yet."""
    return batch.replace(
        prompt_tokens=[torch.tensor([opening])] * len(batch.prompt_tokens),
        rollout_logprobs=torch.full_like(batch.rollout_logprobs, torch.nan),
        old_logprobs=None,
        ref_logprobs=None,
        teacher_prompts=None,
    )


def two_spaces(*, pre_samples: str = "negative", rl_samples: str = "both", fixed: bool = False) -> Callable:
    """(Batch) -> two batches with advantages: behind its prompts those of GRPO, behind none the mean taken off alone.

    Args:
        pre_samples, rl_samples: which rollouts of the second and of the first there are, by the sign of the advantage:
            "negative", "positive", "both" or "none"; no others count.
        fixed: behind no prompt advantages are -1 and +1, so that groups count whose rewards all agree.
    """
    for name, value in (("pre_samples", pre_samples), ("rl_samples", rl_samples)):
        require_one_of("two_spaces", name, value, list(SIGNS))

    def spaces(batch: Batch) -> tuple[Batch, Batch]:
        ordinary, free = standardized(batch), signed()(batch) if fixed else centred(batch)
        opened = without_prompts(batch, int(batch.facts["opening"][0]))
        return (
            only(batch.with_advantages(ordinary), SIGNS[rl_samples](ordinary)),
            only(opened.with_advantages(free), SIGNS[pre_samples](free)),
        )

    return spaces


def phased(spaces: Callable, *, switch: int = 20, mixed: bool = False) -> Callable:
    """An advantage slot of a mixture: what is behind prompts is for objective 0, what is behind none for objective 1.

    Args:
        spaces: of `two_spaces`.
        switch: up to this step objective 1 alone has rollouts, from then on objective 0.
        mixed: both have theirs in every step, and there is no switch.
    """
    require("phased", "switch", switch, switch >= 0, "an integer >= 0")

    def advantage(batch: Batch) -> Batch:
        prompted, free = spaces(batch)
        if mixed:
            return woven(joined(prompted, free))
        return joined(emptied(prompted), free) if batch.step <= switch else joined(prompted, emptied(free))

    return advantage
