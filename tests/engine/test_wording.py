"""Texts at the border: one printable sentence whatever an error says, and the user's own line."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuserl.engine import wording


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no", "no."),
        ("no.", "no."),
        ("Did you mean 'x'?", "Did you mean 'x'?"),
        ("one\n two\t\u2028three ", "one two three."),
        ("\x1b[2J\ud800\u200f", r"\x1b[2J\ud800\u200f."),
        (KeyError("x"), "'x'."),
        ("a" * 5000 + " Do this.", "a" * 700 + " ... " + "a" * 391 + " Do this."),
    ],
)
def test_sentences(text, expected):
    assert wording.sentence(text) == expected


@settings(derandomize=True, database=None)
@given(st.text())
def test_any_text_is_one_line(text):
    line = wording.sentence(text)
    assert line.isprintable() and line.endswith((".", "?"))


def test_what_files_can_hold():
    assert wording.encodable("é\n") and not wording.encodable("a\0") and not wording.encodable("\udcff")


def test_the_last_line_of_a_user_s_code():
    for fail in (lambda: json.loads("{"), lambda: 1 / 0):
        with pytest.raises((ValueError, ArithmeticError)) as raised:
            fail()
        assert wording.place(raised.value).startswith(f" ({__file__}:")
    with pytest.raises(SyntaxError) as raised:
        compile("1 +", "theirs.py", "exec")
    assert wording.place(raised.value) == " (theirs.py:1)" and wording.place(KeyError("x")) == ""
