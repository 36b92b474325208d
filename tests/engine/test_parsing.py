"""Units of language: at most so many words in a constituent, statements where lines and braces end; spaces kept."""

import re
from types import SimpleNamespace

import pytest
import torch
from batches import made

from fuserl.engine.parsing import constituents, parsed, pieces, statements

PROSE = (
    "The cat sat on the mat, and then (because it was tired) it slept; nobody knew why. It woke up\nand ran far away"
)


def shown(begins, text, pattern=r" ?\w+|\W"):
    texts = re.findall(pattern, text)
    return "".join("|" * begin + each for begin, each in zip(begins(texts), texts, strict=True))


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (99, f"|{PROSE}"),
        (
            15,
            "|The cat sat on the mat, and then (because it was tired) it slept;| nobody knew why.| It woke up\n"
            "|and ran far away",
        ),
        (
            5,
            "|The cat sat on the| mat,| and then |(because it was tired)| it slept;| nobody knew why.| It woke up\n"
            "|and ran far away",
        ),
    ],
)
def test_constituents_are_divided_at_the_strongest_boundary(most, expected):
    assert shown(constituents(most), PROSE) == expected


@pytest.mark.parametrize("pattern", [r" ?\w+|\W", r"(?s)."])
@pytest.mark.parametrize("most", [1, 2, 3, 7])
def test_no_constituent_has_more_words(pattern, most):
    parts = shown(constituents(most), PROSE, pattern).split("|")[1:]
    assert "".join(parts) == PROSE and all(len(part.split()) <= most for part in parts)
    assert len(parts) >= len(PROSE.split()) / most


def test_statements_end_outside_brackets():
    code = "x = f(1,\n   2)\nif x: y = [3; 4]; z = 4\n\nwhile (a) { b(); }\nc"
    assert shown(statements, code) == "|x = f(1,\n   2)\n|if x: y = [3; 4];| z = 4\n\n|while (a) {| b(); |}\n|c"
    assert statements([]) == [] and constituents(3)([]) == []


def test_a_token_keeps_its_leading_space():
    words = {1: "▁the", 2: "▁cat", 3: "s", 4: "<end>"}

    def decode(ids, skip_special_tokens, clean_up_tokenization_spaces):
        return "".join(words[i] for i in ids if i != 4).replace("▁", " ").removeprefix(" ")

    tokenizer = SimpleNamespace(decode=decode)
    assert pieces(tokenizer, torch.tensor([1, 2, 3, 1, 4])) == ["the", " cat", "s", " the", ""]
    assert pieces(tokenizer, torch.tensor([], dtype=torch.int64)) == []


def test_rollouts_say_where_units_begin():
    rollouts = made(["?"], torch.tensor([0, 0, 0]), ["a b c", "", "d;e"])
    policy = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids, **_: "".join(map(chr, ids))))
    found = parsed(lambda policy, prompts: rollouts, statements)(policy, None)
    assert found.facts["macro_begins"].tolist() == [
        [True] + [False] * 4,
        [False] * 5,
        [True, False, True, False, False],
    ]
    with pytest.raises(ValueError, match="constituents: leaves must be a number of words >= 1; got 0"):
        constituents(0)
