"""Where units of language begin among the tokens of a completion: constituents of prose, statements of code.

No parser is needed: prose is divided at its punctuation, the strongest first, code where lines and statements end.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from fuserl.engine.batch import Rollouts
from fuserl.engine.contracts import require

_OPENING, _CLOSING = "([{", ")]}"


def parsed(rollout: Callable, begins: Callable) -> Callable:
    """A rollout slot that adds facts["macro_begins"], (B, T) bool: begins(texts of a completion's tokens) of each."""

    def slot(policy, prompts) -> Rollouts:
        rollouts = rollout(policy, prompts)
        lengths = rollouts.offsets.diff().tolist()
        found = torch.zeros(len(lengths), max(lengths), dtype=torch.bool)
        for row, tokens in zip(found, rollouts.tokens.split(lengths), strict=True):
            row[: len(tokens)] = torch.tensor(begins(pieces(policy.tokenizer, tokens)), dtype=torch.bool)
        return dataclasses.replace(rollouts, facts=rollouts.facts | {"macro_begins": found})

    return slot


def pieces(tokenizer, tokens: Tensor) -> list[str]:
    """The text that each token adds to the one before it; a token that is not shown adds none."""

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    ids = tokens.tolist()
    # A token by itself may lose its leading space; behind another one it keeps it.
    pairs = [text([one, two])[len(text([one])) :] for one, two in itertools.pairwise(ids)]
    return [*(text([token]) for token in ids[:1]), *pairs]


def constituents(most: int) -> Callable:
    """Which tokens begin a constituent of at most `most` words: (texts of tokens) -> list of bool.

    A span of more is divided at its strongest boundaries: lines, then sentences, ; and :, brackets, commas; where there
    is none, after every `most` words.
    """
    require("constituents", "leaves", most, most >= 1, "a number of words >= 1")

    def found(texts: list[str]) -> list[bool]:
        before, strengths, words = "", [], []
        for text in texts:
            strengths.append(_strength(before, text))
            words.append(_is_word(before, text))
            before = text if text.strip() else before + text
        begins, spans = [False] * len(texts), [(0, len(texts))] if texts else []
        while spans:
            begin, end = spans.pop()
            begins[begin] = True
            starts = [at for at in range(begin, end) if words[at]]
            if len(starts) <= most:
                continue
            strongest = max(strengths[begin + 1 : end])
            inner = [at for at in range(begin + 1, end) if strengths[at] == strongest]
            spans += itertools.pairwise([begin, *(inner if strongest else starts[most::most]), end])
        return begins

    return found


def statements(texts: list[str]) -> list[bool]:
    """Which tokens begin a statement: the first with text after a line, ; or brace has ended outside ( and [."""
    begins, depth, ended = [], 0, True
    for text in texts:
        begins.append(ended and bool(text.strip()))
        for letter in text:
            depth = max(0, depth + (letter in "([") - (letter in ")]"))
            if letter in "\n;{}" and not depth:
                ended = True
            elif not letter.isspace():
                ended = False
    return begins


def _is_word(before: str, text: str) -> bool:
    """Whether a word begins with a token that has this text before it."""
    return bool(text.strip()) and (not before or before[-1:].isspace() or text[:1].isspace())


def _strength(before: str, text: str) -> int:
    """How strong a boundary is between the texts of two tokens; 0 is none."""
    left, right = before.rstrip(), text.lstrip()
    if not right:
        return 0
    gap = before[len(left) :] + text[: len(text) - len(right)]
    if "\n" in gap:
        return 5
    if left.endswith((".", "!", "?")) and gap:
        return 4
    if left.endswith((";", ":")):
        return 3
    if right.startswith(tuple(_OPENING)) or left.endswith(tuple(_CLOSING)):
        return 2
    return int(left.endswith(",") and bool(gap))
