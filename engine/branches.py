"""Readers of texts that fork: what two of them begin with alike has been read once and stands in the cache once.

A reader has `read(rollouts) -> (n, V) logits behind each`, `fork(rollout, token, logprob)`, another rollout that goes
on with a token, and `drop`, which gives up what is kept of a text; `prompts` with `slots` rollouts may be open at once.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from fuserl.engine.decoding import Decoder
from fuserl.engine.kv_cache import free_bytes
from fuserl.engine.scheduling import Rollout, Source, Span
from fuserl.kernels.tree_lines import PAGE


class Branches(Decoder):
    """A model whose texts share pages of keys and values: a fork copies the last one, where that is not full.

    What is read when is said from outside, not by a scheduler.

    Args:
        model: in eval mode, with "fuserl" attention.
        longest: tokens of the longest prompt.
        width: rollouts of a prompt at once.
        most: tokens of any of them.
        rows, kv_gb: as of `Decoder`.
        share: of the memory, where several readers have to do with it.
    """

    def __init__(self, model: nn.Module, longest: int, width: int, most: int, rows: int | None, kv_gb, share: float):
        pages = -width * (-most // PAGE)
        self.each = -(-longest // PAGE) + pages  # of a prompt and its rollouts
        if share < 1:
            kv_gb = share * (free_bytes(next(model.parameters()).device) / 1e9 if kv_gb is None else kv_gb)
        first = Rollout([], source=Source([0] * longest), number=0, stream=0)
        super().__init__(model, [first], PAGE * pages, rows, kv_gb)

    @property
    def prompts(self) -> int:
        """How many may be open at once."""
        return self.pages.most // self.each

    def read(self, rollouts: list[Rollout]) -> Tensor:
        """Reads what is new in the rollouts, and in their prompts; logits (n, V) behind each."""
        sources = dict.fromkeys(each.source for each in rollouts if not each.source.complete)
        texts, found = [*sources, *(each for each in rollouts if each.tokens)], {}
        for text in texts:
            text.pages += self.pages.take(text.missing)
        while texts:
            spans, left = [], self.scheduler.rows
            for text in texts:
                stop = min(len(text.tokens), text.read + left)
                if stop > text.read:
                    spans.append(Span(text, text.read, stop))
                    left -= stop - text.read
            logits, row = self._forward(spans), 0
            for text, _, text.read in spans:
                if text.read == len(text.tokens):
                    found[text] = logits[row]
                    row += 1
            texts = [text for text in texts if text.read < len(text.tokens)]
        return torch.stack([found[each if each.tokens else each.source] for each in rollouts])

    def fork(self, rollout: Rollout, token: int, logprob: float) -> Rollout:
        """The rollout with one more token, beside it."""
        child, whole = followed(rollout, token, logprob), rollout.read // PAGE
        child.pages = rollout.pages[:whole]
        self.pages.share(child.pages)
        if rollout.read % PAGE:
            child.pages += self.pages.take(1)
            self.pages.copy(rollout.pages[whole], child.pages[whole])
        return child

    def drop(self, text: Rollout | Source) -> None:
        """Gives up the pages of a rollout or a prompt."""
        self.pages.drop(text.pages)
        text.pages, text.read = [], 0


class Whole:
    """A model whose attention cannot take our cache: every text is read from its beginning each time, alone."""

    prompts, slots = 1, 1

    def __init__(self, model: nn.Module):
        self.model, self.device = model, next(model.parameters()).device
        # A family that cannot leave out the others gives the logits of all tokens of one text.
        self.kept = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}

    def read(self, rollouts: list[Rollout]) -> Tensor:
        """Logits (n, V) behind each rollout."""
        texts = [torch.tensor([each.source.tokens + each.tokens], device=self.device) for each in rollouts]
        return torch.stack([self.model(input_ids=text, use_cache=False, **self.kept).logits[0, -1] for text in texts])

    def fork(self, rollout: Rollout, token: int, logprob: float) -> Rollout:
        """The rollout with one more token, beside it."""
        return followed(rollout, token, logprob)

    def drop(self, text: Rollout | Source) -> None:
        """Nothing is kept."""


def followed(rollout: Rollout, token: int, logprob: float) -> Rollout:
    """A copy of a rollout with one more token, which has no pages."""
    child = dataclasses.replace(
        rollout, tokens=[*rollout.tokens], pages=[], trained=[*rollout.trained], logprobs=[*rollout.logprobs]
    )
    child.draw(token, logprob)
    return child
