"""Texts at the border: what went wrong, as one line that a terminal can show, and which texts may come in."""

from __future__ import annotations

import sysconfig
import traceback

_HEAD, _TAIL = 700, 400  # letters that are shown of a longer text


def sentence(text: object) -> str:
    """The text on one line that ends as a sentence does; what would not show, or would move the cursor, is spelled out.

    Of a long one the middle is left out: what is wrong comes first, and what to do last.
    """
    words = " ".join(str(text).split())
    if len(words) > _HEAD + _TAIL:
        words = f"{words[:_HEAD]} ... {words[-_TAIL:]}"
    line = "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in words)
    return line if line.endswith((".", "?")) else f"{line}."


def encodable(text: str) -> bool:
    """Whether files and file names can hold the text: there are no half characters and no NUL in it."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def place(error: BaseException) -> str:
    """The last line of a user's code that an error came through, as ` (rewards.py:3)`; empty where there is none."""
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        frames = [(error.filename, error.lineno)]
    theirs = [frame for frame in frames if not _installed(frame[0])]
    return " ({}:{})".format(*theirs[-1]) if theirs else ""


def _installed(path: str) -> bool:
    """Whether a file is Python's own, a package's, or ours."""
    known = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    return path.startswith(("<", *known, __file__.rpartition("/")[0]))
