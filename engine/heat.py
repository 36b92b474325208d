"""What a report colours: completions, each token by its credit, and what learning one problem does to another.

A token's credit is its advantage as the update saw it: blue above 0, orange below, the stronger the further from it.
"""

from __future__ import annotations

import html
import json
import math
import re

_SHOWN = 4  # completions of the first and of the last step
_LONG = 280  # characters of a text that is shown without opening it
_STRONGEST = 60  # percent of its colour behind the token with the most credit
_ODD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def legible(text: str) -> str:
    """A text in which what would not show or would reorder the line is made visible."""
    return _ODD.sub(_visible, text)


def clean(value: object) -> str:
    """A value as HTML text: legible, and markup escaped."""
    return html.escape(legible(str(value)))


def completions(rows: list[dict]) -> str:
    """Completions of the first and of the last step that has any."""
    steps = [row.get("step") for row in rows if isinstance(row.get("step"), int | float)]
    if not steps:
        return ""
    picked = []
    for step in dict.fromkeys((min(steps), max(steps))):
        picked += [row for row in rows if row.get("step") == step][:_SHOWN]
    most = max((abs(credit) for row in picked for credit in _credits(row)), default=0.0)
    key = f"; each token with its credit, blue above 0, orange below, {most:.3g} the strongest" if most else ""
    heads = "".join(f"<th>{name}</th>" for name in ("step", "prompt", "completion", "answer"))
    heads += '<th class="number">reward</th>'
    return (
        f"<h2>Completions <small>of the first and the last step{key}</small></h2>\n"
        f'<div class="scroll"><table class="samples stacked"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(_sample(row, most) for row in picked)}</tbody></table></div>"
    )


def interference(rows: list[dict]) -> str:
    """The last matrix of interference that an evaluation measured; empty where none did."""
    measured = [row for row in rows if _square(row.get("interference"))]
    if not measured:
        return ""
    found = measured[-1]["interference"]
    most = max(abs(each) for row in found for each in row) or 1.0
    heads = "".join(f'<th class="number">{at + 1}</th>' for at in range(len(found)))
    cells = ["".join(f"<td>{_behind(format(x, '+.2g'), x, most)}</td>" for x in row) for row in found]
    lines = "".join(f'<tr><th class="number">{at + 1}</th>{each}</tr>' for at, each in enumerate(cells))
    return (
        "<h2>Interference <small>what an update on a row's problem adds to the mean log-prob of a column's answer, "
        f"after step {clean(measured[-1].get('step'))}; orange below 0</small></h2>\n"
        f'<div class="scroll"><table class="matrix"><thead><tr><th></th>{heads}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _square(found: object) -> bool:
    """Whether a value out of a file is a matrix of numbers, a row for each column."""
    return (
        isinstance(found, list)
        and bool(found)
        and all(
            isinstance(row, list) and len(row) == len(found) and all(isinstance(x, int | float) for x in row)
            for row in found
        )
    )


def _sample(row: dict, most: float) -> str:
    reward, finish = row.get("reward"), row.get("finish")
    score = f"{reward:.3g}" if isinstance(reward, int | float) and math.isfinite(reward) else "none"
    cut = f"<small>{clean(finish)}</small>" if finish not in (None, "stop") else ""
    cells = {
        "step": clean(row.get("step")),
        "prompt": _text(row.get("prompt"), tail=True),
        "completion": _text(row.get("completion"), coloured=_coloured(row, most)),
        "answer": _text(row.get("answer")),
    }
    written = "".join(f'<td data-label="{name}">{cell}</td>' for name, cell in cells.items())
    return f'<tr>{written}<td class="number score" data-label="reward">{score}{cut}</td></tr>'


def _credits(row: dict) -> list[float]:
    """The credit of a completion's tokens, or of all of it, where it is known."""
    credit = row.get("credit")
    several = credit if isinstance(credit, list) else [credit]
    return [float(each) for each in several if isinstance(each, int | float) and math.isfinite(each)]


def _coloured(row: dict, most: float) -> str:
    """A completion as HTML with its credit behind each token, or behind all of it; empty where none is known."""
    tokens, credit = row.get("tokens"), row.get("credit")
    if not most or not _credits(row):
        return ""
    if not isinstance(credit, list):
        return _behind(row.get("completion"), credit, most)
    if not isinstance(tokens, list) or len(tokens) != len(credit):
        return ""
    return "".join(_behind(token, each, most) for token, each in zip(tokens, credit, strict=True))


def _behind(text: object, credit: object, most: float) -> str:
    if not isinstance(credit, int | float) or not math.isfinite(credit):
        return f'<span class="told" title="not its own">{clean(text)}</span>'
    side, strength = "gain" if credit > 0 else "loss", round(_STRONGEST * abs(credit) / most)
    return f'<span class="{side}" style="--much: {strength}%" title="{credit:+.3g}">{clean(text)}</span>'


def _text(value: object, *, tail: bool = False, coloured: str = "") -> str:
    """A text that a model read or wrote; a long one is folded, and shows its end (`tail`) or its beginning.

    `coloured` is the HTML of the whole of it, in the place of the plain text.
    """
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        value = "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    whole = f'<div class="text mono">{coloured or clean(text)}</div>'
    if len(text) <= _LONG:
        return whole
    end, start = text[-_LONG // 2 :], text[: _LONG // 2]
    short = f"… {end.partition(' ')[2] or end}" if tail else f"{start.rpartition(' ')[0] or start} …"
    return f'<details><summary class="mono">{clean(short)}</summary>{whole}</details>'


def _visible(found: re.Match) -> str:
    """A control character as its picture, another odd one as its number."""
    code = ord(found[0])
    if code < 0x20:
        return chr(0x2400 + code)
    if 0xD800 <= code <= 0xDFFF:
        return "\ufffd"
    return f"⟨U+{code:04X}⟩"
