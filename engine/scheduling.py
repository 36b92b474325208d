"""Which tokens the next pass of the model reads: continuous batching over a cache of so many pages.

A prompt is read once, by pieces, and kept for all its rollouts; what it begins with alike another prompt is taken from
there. A rollout holds pages for its own tokens alone. Where pages run out, prompts that nobody uses go first, then the
rollout that came last: it waits again with what it has drawn, which is read anew later.
"""

from __future__ import annotations

import math
from collections import deque
from concurrent import futures
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from fuserl.engine.kv_cache import Pages
from fuserl.kernels.tree_lines import PAGE


@dataclass(eq=False)
class Text:
    """Tokens, the first `read` of which have their keys and values in `pages`."""

    tokens: list[int]
    read: int = 0
    pages: list[int] = field(default_factory=list)

    @property
    def missing(self) -> int:
        """Pages wanting for all tokens."""
        return -(-len(self.tokens) // PAGE) - len(self.pages)


@dataclass(eq=False)
class Source(Text):
    """A prompt."""

    logits: Tensor | None = None  # (V,) after its last token
    live: int = 0  # rollouts
    unfinished: int = 0  # rollouts

    @property
    def complete(self) -> bool:
        """Whether all of it is read."""
        return self.read == len(self.tokens)


@dataclass(eq=False, kw_only=True)
class Rollout(Text):
    """One completion in the making; its tokens stand behind its prompt's."""

    source: Source
    number: int  # its prompt's
    stream: int  # with the seed, names its random numbers
    turn: int = 0  # tokens before those that the policy is drawing now
    trained: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str | None = None
    reply: futures.Future | None = None  # what is to stand behind its tokens, waited for
    chunks: list[list[int]] = field(default_factory=list)  # earlier ones, each behind the prompt
    carried: int = 0  # tokens of a later chunk that are the last ones of the chunk before it

    @property
    def said(self) -> list[int]:
        """All its tokens, what was carried over once."""
        chunks = [*self.chunks, self.tokens]
        return chunks[0] + [token for chunk in chunks[1:] for token in chunk[self.carried :]]

    @property
    def count(self) -> int:
        """How many those are."""
        return sum(map(len, self.chunks)) - self.carried * len(self.chunks) + len(self.tokens)

    def draw(self, token: int, logprob: float) -> None:
        """Appends a token of the policy."""
        self.tokens.append(token)
        self.trained.append(True)
        self.logprobs.append(logprob)

    def insert(self, tokens: list[int]) -> None:
        """Appends tokens of somebody else, behind which a new turn begins."""
        self.tokens += tokens
        self.trained += [False] * len(tokens)
        self.logprobs += [math.nan] * len(tokens)
        self.turn = len(self.tokens)

    def begin_anew(self, carry: int) -> None:
        """Begins a new chunk behind the prompt, with the last tokens of this one."""
        kept = len(self.tokens) - carry
        self.chunks.append(self.tokens)
        self.carried, self.tokens, self.read = carry, self.tokens[kept:], 0
        self.trained += [False] * carry
        self.logprobs += [math.nan] * carry
        self.turn = max(0, self.turn - kept)


class Span(NamedTuple):
    """Tokens of a text that a pass reads."""

    text: Text
    start: int
    stop: int


class Scheduler:
    """What is read when.

    Args:
        rollouts: in the order in which they begin, those of a prompt together.
        pages: enough for any one of them.
        slots: rollouts at once.
        rows: tokens of one pass.
        shared: tokens that all prompts begin with, fewer than the shortest has.
    """

    def __init__(self, rollouts: list[Rollout], pages: Pages, slots: int, rows: int, shared: int = 0):
        self.pages, self.slots, self.rows, self.shared = pages, slots, rows, shared
        self.waiting = deque(rollouts)
        self.live: dict[Rollout, None] = {}  # in the order of their coming
        self.resident: dict[Source, None] = {}  # prompts with pages
        for rollout in rollouts:
            rollout.source.unfinished += 1

    def plan(self) -> list[Span]:
        """What the next pass reads; nothing where no more is to be read before tokens are drawn."""
        for rollout in list(self.live):
            while rollout.missing and rollout in self.live and not self._hold(rollout, rollout.source):
                self._preempt(next(reversed(self.live)))
        while self.waiting and len(self.live) < self.slots and self._admit(self.waiting[0]):
            pass
        return self._spans()

    def ready(self) -> list[Rollout]:
        """Live rollouts all of whose tokens are read, their prompts' too: their next token can be drawn."""
        return [each for each in self.live if each.source.complete and each.read == len(each.tokens)]

    def replied(self) -> list[Rollout]:
        """Live rollouts whose reply has come."""
        return [each for each in self.live if each.reply is not None and each.reply.done()]

    def wait(self) -> None:
        """Until the reply of some live rollout has come, if one waits for any."""
        replies = [each.reply for each in self.live if each.reply is not None]
        futures.wait(replies, return_when=futures.FIRST_COMPLETED)

    def done(self, rollout: Rollout) -> None:
        """Takes a finished rollout out."""
        self._leave(rollout)
        rollout.source.unfinished -= 1
        for source in [each for each in self.resident if not each.unfinished]:
            # One stays, so that the next prompt finds the common beginning.
            if source is not rollout.source or not self.shared:
                self._forget(source)

    def _spans(self) -> list[Span]:
        """Prompts first, for rollouts wait for them; then rollouts, the oldest first."""
        spans, left = [], self.rows
        for source in dict.fromkeys(each.source for each in self.live):
            if left and not source.complete:
                spans.append(Span(source, source.read, min(len(source.tokens), source.read + left)))
                left -= spans[-1].stop - source.read
        for rollout in self.live:
            # One that waits for a reply keeps its place and its pages; its last token is read with what comes.
            if left and rollout.reply is None and rollout.source.complete and rollout.read < len(rollout.tokens):
                spans.append(Span(rollout, rollout.read, min(len(rollout.tokens), rollout.read + left)))
                left -= spans[-1].stop - rollout.read
        return spans

    def _admit(self, rollout: Rollout) -> bool:
        """Makes a waiting rollout live, if there are pages for it and its prompt."""
        source = rollout.source
        if (source not in self.resident and not self._enter(source)) or not self._hold(rollout, source):
            return False
        self.waiting.popleft()
        self.live[rollout] = None
        source.live += 1
        return True

    def _enter(self, source: Source) -> bool:
        """Gives a prompt its pages, with what another one has read of it; not while that is being read."""
        like = max(self.resident, key=lambda each: each.read, default=None) if self.shared else None
        known = self.shared if like and like.read >= self.shared else 0
        if like and not known and any(each.live for each in self.resident):
            return False
        whole, held = known // PAGE, like.pages[: -(-known // PAGE)] if known else []
        self.pages.share(held)
        source.pages = held[:whole]
        entered = self._hold(source, source)
        if entered:
            self.resident[source], source.read = None, known
            if held[whole:]:
                self.pages.copy(held[whole], source.pages[whole])
        else:
            self._drop(source)
        self.pages.drop(held[whole:])
        return entered

    def _hold(self, text: Text, source: Source) -> bool:
        """Takes the pages that a text still wants, if need be from prompts that nobody uses, other than `source`."""
        wanted, idle = text.missing, (each for each in list(self.resident) if not each.live and each is not source)
        while wanted > self.pages.left:
            unused = next(idle, None)
            if unused is None:
                return False
            self._forget(unused)
        text.pages += self.pages.take(wanted)
        return True

    def _preempt(self, rollout: Rollout) -> None:
        self._leave(rollout)
        self.waiting.appendleft(rollout)

    def _leave(self, rollout: Rollout) -> None:
        del self.live[rollout]
        rollout.source.live -= 1
        self._drop(rollout)

    def _forget(self, source: Source) -> None:
        del self.resident[source]
        source.logits = None
        self._drop(source)

    def _drop(self, text: Text) -> None:
        self.pages.drop(text.pages)
        text.pages, text.read = [], 0
