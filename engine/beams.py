"""Beam search over a policy: of the texts that go on from `width` kept ones, the `width` best are kept.

    score(text) = beta sum over its tokens of (logprob - ref_logprob) + value(text)

Without a reference and without values that is likelihood. A policy trained on preferences makes it a search for reward:
where pi is optimal under a reward r, beta log(pi / pi_ref) = r + V(next state) - V(state), so the likeliest text is the
one with the largest sum of r + beta log pi_ref, and sums of beta (logprob - ref_logprob) know what is still to come
(arXiv:2404.12358). A text that has ended keeps its place as long as no other one is better.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fuserl.engine import generation
from fuserl.engine.batch import Rollouts
from fuserl.engine.branches import Branches, Whole
from fuserl.engine.contracts import require
from fuserl.engine.generation import Ending
from fuserl.engine.prompts import Prompt
from fuserl.engine.sampling import Sampling
from fuserl.engine.scheduling import Rollout, Source


@dataclass(frozen=True)
class Beams:
    """What is searched for.

    Args:
        width: texts of a prompt that are kept; 1 is greedy.
        branches: tokens that each may go on with, the likeliest ones; None is `width`, or 2 max(width, 4) where there
            is a reference or a value, under which others may be better.
        beta: as above.
        temperature: divides the policy's logits, and the reference's.
        value: what a text is worth beside its tokens: called with a list of (prompt's number, its tokens), returns a
            number for each.
    """

    width: int
    branches: int | None = None
    beta: float = 1.0
    temperature: float = 1.0
    value: Callable[[list[tuple[int, list[int]]]], Sequence[float]] | None = None

    def __post_init__(self):
        require("beams", "width", self.width, self.width >= 1, "at least 1")
        most = self.branches is None or self.branches >= self.width
        require("beams", "branches", self.branches, most, f"at least width ({self.width}), or None")
        require("beams", "beta", self.beta, 0 < self.beta < math.inf, "a finite number > 0")
        require("beams", "temperature", self.temperature, 0 < self.temperature < math.inf, "a finite number > 0")


class Kept(NamedTuple):
    """A text among the best: a rollout for each reader, the policy's first, and its score."""

    rollouts: tuple[Rollout, ...]
    total: float = 0.0  # beta times the sum over its tokens
    score: float = 0.0  # with its value

    @property
    def ended(self) -> bool:
        """Whether nothing comes behind it."""
        return self.rollouts[0].finish is not None


class _Next(NamedTuple):
    """A text that may be kept: a kept one as it is, or with one more token."""

    parent: Kept
    score: float
    total: float = 0.0
    token: int | None = None
    logprob: float = 0.0


@torch.no_grad()
def search(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[Prompt],
    beams: Beams,
    *,
    group_size: int = 1,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] | None = None,
    reference: Callable | None = None,
    rows: int | None = None,
    kv_gb: float | None = None,
) -> Rollouts:
    """The `group_size` best completions of each prompt that a beam search finds, the best first.

    With width 1 and neither reference nor value they are, bit for bit, those of `generation.generate` at temperature 0.

    Args:
        model, tokenizer, max_new_tokens, stop, stop_ids, rows, kv_gb: as in `generation.generate`. A model that cannot
            be given our attention reads every text from its beginning for each token.
        beams: what is searched for.
        group_size: at most `width`.
        reference: called without arguments, gives a context whose value is the reference model; None is no reference.

    Returns:
        `Rollouts`, with the log-probability of every token under the policy.

    Raises:
        ValueError: an empty prompt, an argument out of range, or fewer texts than `group_size`.
        RuntimeError: no room for one prompt's texts.
    """
    generation.check(prompts, None, group_size=group_size, max_new_tokens=max_new_tokens, stop=stop, chunk=None)
    require("search", "group_size", group_size, group_size <= beams.width, f"at most width ({beams.width})")
    prompt_tokens = [torch.tensor(tokenizer(p.text).input_ids, dtype=torch.int64) for p in prompts]
    stop_ids = generation.eos_ids(model) if stop_ids is None else frozenset(stop_ids)
    ending = Ending(tokenizer, tuple(stop), stop_ids, max_new_tokens, prompts, None, None)
    sizes = (max(map(len, prompt_tokens), default=0), beams.width, max_new_tokens, rows, kv_gb)
    with contextlib.ExitStack() as stack:
        inside = [lambda: contextlib.nullcontext(model), *([] if reference is None else [reference])]
        readers = [_reader(stack, each, sizes, 1 / len(inside)) for each in inside]
        found = best(readers, [ids.tolist() for ids in prompt_tokens], beams, ending.reason)
    for several in found:
        require("search", "group_size", group_size, group_size <= len(several), f"at most the {len(several)} texts")
    rollouts = [rollout for several in found for rollout in several[:group_size]]
    return generation.collected(list(prompts), prompt_tokens, rollouts, ending)


class Inside(NamedTuple):
    """A reader, and the context in which it reads."""

    reader: Branches | Whole
    context: Callable


def _reader(stack: contextlib.ExitStack, context: Callable, sizes: tuple, share: float) -> Inside:
    with context() as model:
        reason = stack.enter_context(generation.prepared(model, sizes[-1]))
        return Inside(Branches(model, *sizes, share) if reason is None else Whole(model), context)


def best(
    readers: Sequence[Inside], prompts: Sequence[list[int]], beams: Beams, ending: Callable[[Rollout], str | None]
) -> list[list[Rollout]]:
    """The texts of each prompt that are kept in the end, the best first.

    Args:
        readers: of the policy, then of the reference where there is one.
        prompts: token ids.
        beams: what is searched for.
        ending: called with a rollout behind each token, gives its `finish`, None while it goes on.
    """
    at_once = max(1, min(min(each.prompts, each.slots // beams.width) for each, _ in readers))
    found: list[list[Rollout]] = [[] for _ in prompts]
    waiting, going = deque(enumerate(prompts)), {}
    while waiting or going:
        while waiting and len(going) < at_once:
            number, tokens = waiting.popleft()
            going[number] = [Kept(tuple(Rollout([], source=Source(tokens), number=number, stream=0) for _ in readers))]
        for number, chosen in _better(readers, going, beams).items():
            sources = [each.source for each in going[number][0].rollouts]
            going[number] = _grown(readers, going[number], chosen, ending)
            if all(each.ended for each in going[number]):
                found[number] = [each.rollouts[0] for each in going.pop(number)]
                for (reader, _), source in zip(readers, sources, strict=True):
                    reader.drop(source)
    return found


def _better(readers: Sequence[Inside], going: dict[int, list[Kept]], beams: Beams) -> dict[int, list[_Next]]:
    """What is kept of each prompt after one more token, the best first."""
    live = [each for kept in going.values() for each in kept if not each.ended]
    logits = []
    for number, (reader, context) in enumerate(readers):
        with context():
            logits.append(reader.read([each.rollouts[number] for each in live]) / beams.temperature)
    wide = len(readers) > 1 or beams.value is not None
    ids, logprobs = _likeliest(logits[0], beams.branches or (2 * max(beams.width, 4) if wide else beams.width))
    gains = logprobs - _logprobs(logits[1], ids) if len(readers) > 1 else logprobs
    ids, logprobs, gains = (x.tolist() for x in (ids, logprobs, beams.beta * gains))
    totals = [[each.total + gain for gain in row] for each, row in zip(live, gains, strict=True)]
    values = _values(beams, live, ids)
    rows = iter(zip(ids, logprobs, totals, values, strict=True))
    found = {}
    for number, kept in going.items():
        some = []
        for each in kept:
            some += (
                [_Next(each, each.score)]
                if each.ended
                else [
                    _Next(each, total + value, total, token, logprob)
                    for token, logprob, total, value in zip(*next(rows), strict=True)
                ]
            )
        # Stable: of equals the one that goes on from the better text, with the likelier token, comes first.
        ordered = sorted((each for each in some if each.score > -math.inf), key=lambda each: -each.score)
        found[number] = ordered[: beams.width]
    return found


def _values(beams: Beams, live: list[Kept], ids: list[list[int]]) -> list[list[float]]:
    """What each text with one more token is worth beside its tokens."""
    if beams.value is None:
        return [[0.0] * len(row) for row in ids]
    rollouts = [each.rollouts[0] for each in live]
    asked = [(r.number, [*r.tokens, token]) for r, row in zip(rollouts, ids, strict=True) for token in row]
    given = iter(beams.value(asked))
    return [[float(next(given)) for _ in row] for row in ids]


def _grown(readers: Sequence[Inside], kept: list[Kept], chosen: list[_Next], ending: Callable) -> list[Kept]:
    """The chosen texts; one that no chosen one goes on from gives up what it holds, and the last that does has it."""
    left = Counter(each.parent.rollouts[0] for each in chosen if each.token is not None)
    for each in kept:
        if not each.ended and not left[each.rollouts[0]]:
            _dropped(readers, each.rollouts)
    found = []
    for parent, score, total, token, logprob in chosen:
        if token is None:
            found.append(parent)
            continue
        left[parent.rollouts[0]] -= 1
        rollouts = parent.rollouts
        if left[rollouts[0]]:
            pairs = zip(readers, rollouts, strict=True)
            rollouts = tuple(reader.fork(rollout, token, logprob) for (reader, _), rollout in pairs)
        else:
            for rollout in rollouts:
                rollout.draw(token, logprob)
        rollouts[0].finish = ending(rollouts[0])
        if rollouts[0].finish is not None:
            _dropped(readers, rollouts)
        found.append(Kept(rollouts, total, score))
    return found


def _dropped(readers: Sequence[Inside], rollouts: tuple[Rollout, ...]) -> None:
    for (reader, _), rollout in zip(readers, rollouts, strict=True):
        reader.drop(rollout)


def _likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of each row, ids (n, k) and log-probs (n, k) float64, on the host; the greedy one first."""
    greedy, of_it = _greedy(logits)
    top = logits.topk(min(count, logits.shape[1])).indices
    # Among equals topk may take any; the first one of the largest is the greedy token.
    top[:, -1] = torch.where((top == greedy).any(1), top[:, -1], greedy[:, 0])
    top = top.sort(1).values
    order = logits.gather(1, top).sort(dim=1, descending=True, stable=True).indices
    ids = top.gather(1, order)
    return ids.cpu(), _logprobs_at(logits, ids, greedy, of_it)


def _logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probs (n, k) float64 of tokens, on the host."""
    return _logprobs_at(logits, ids.to(logits.device), *_greedy(logits))


def _greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The token that greedy decoding draws, and its log-prob as that gives it, both (n, 1)."""
    zeros = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    return tuple(each[:, None] for each in Sampling(temperature=0.0).draw(logits, zeros, zeros))


def _logprobs_at(logits: Tensor, ids: Tensor, greedy: Tensor, of_it: Tensor) -> Tensor:
    distance = logits.gather(1, ids).double() - logits.gather(1, greedy).double()
    return (of_it.double() + distance).cpu()


def widths(text: str) -> list[int]:
    """Widths of beams out of an option such as "1,2,5,8"; empty is none."""
    found = [each.strip() for each in text.split(",")] if text.strip() else []
    if not all(each.isdecimal() and int(each) >= 1 for each in found):
        raise ValueError(f"beams: beams must be widths >= 1 between commas; got {text!r}. Write 1,2,5,8, say.")
    return [int(each) for each in found]
