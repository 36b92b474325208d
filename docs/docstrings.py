"""Docstrings, signatures and fields of dataclasses as Markdown."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence

WIDTH = 100  # of a signature on one line
_SECTION = re.compile(r"(Args|Raises|Returns):$")
_LABEL = re.compile(r"[A-Z][A-Za-z]*: ")
# A formula whose docstring has no other line further in: the formatter takes its indentation away.
_FORMULA = re.compile(r"[a-z_]\w*(\[\w+\])? += ")
_ARGUMENT = re.compile(r"(\w+(?:, \w+)*): (.*)")


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    cells = [[str(cell).replace("|", r"\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [headings, ["---"] * len(headings), *cells])


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def prose(text: str, links: Mapping[str, str] = {}) -> str:
    """Text with what Markdown would take for markup escaped, links to papers, and names in backticks linked.

    Args:
        text: as docstrings have it.
        links: where a name that stands in backticks is explained.
    """
    parts = re.split(r"(`[^`]+`)", text)
    for at, part in enumerate(parts):
        if at % 2:
            parts[at] = f"[{part}]({links[part[1:-1]]})" if part[1:-1] in links else part
        else:
            plain = re.sub(r"([*<])", r"\\\1", part)
            parts[at] = re.sub(r"\barXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", plain)
    return "".join(parts)


def docstring(text: str | None, links: Mapping[str, str] = {}) -> str:
    """A docstring's paragraphs, its indented blocks as code, its arguments and errors as lists."""
    lines = inspect.cleandoc(text or "").splitlines()
    return "\n\n".join(_blocks(lines, links))


def _blocks(lines: list[str], links: Mapping[str, str]) -> Iterator[str]:
    while lines:
        section = _SECTION.match(lines[0])
        if not lines[0].strip():
            lines = lines[1:]
        elif section or lines[0].startswith("    "):
            start = 1 if section else 0
            end = next((i for i, line in enumerate(lines) if i >= start and line and line[0] != " "), len(lines))
            inner, lines = textwrap.dedent("\n".join(lines[start:end])).strip("\n"), lines[end:]
            yield _section(section[1], inner, links) if section else _code(inner)
        else:
            end = next((i for i, line in enumerate(lines) if i and _ends_paragraph(line)), len(lines))
            paragraph, lines = lines[:end], lines[end:]
            yield _code("\n".join(paragraph)) if _FORMULA.match(paragraph[0]) else prose("\n".join(paragraph), links)


def _ends_paragraph(line: str) -> bool:
    return not line.strip() or line.startswith("    ") or bool(_SECTION.match(line) or _LABEL.match(line))


def _section(name: str, inner: str, links: Mapping[str, str]) -> str:
    if name == "Returns":
        return f"**Returns** {_blocks_joined(inner, links)}"
    entries: list[list[str]] = []
    for line in inner.splitlines():
        found = _ARGUMENT.match(line)
        if found:
            entries.append([", ".join(f"`{each}`" for each in found[1].split(", ")), found[2]])
        elif entries:
            entries[-1][1] += f"\n  {line.strip()}"
        else:
            entries.append(["", line])  # `as above`
    items = "\n".join(f"- {name}: {prose(says, links)}" if name else prose(says, links) for name, says in entries)
    return f"**{name}**\n\n{items}"


def _blocks_joined(inner: str, links: Mapping[str, str]) -> str:
    return "\n\n".join(_blocks(inner.splitlines(), links))


def code(text: str, language: str = "python") -> str:
    """A block of code."""
    return f"```{language}\n{text}\n```"


def _code(text: str) -> str:
    # Also where it is Python: a formatter of Markdown would format that, and the page is not written by hand.
    return code(text, "text")


def signature(name: str, function: Callable) -> str:
    """A function's signature, a parameter a line where it is long; annotations as they are written."""
    parts, seen_star = [], False
    described = inspect.signature(function)
    for parameter in described.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not seen_star:
            parts.append("*")
            seen_star = True
        seen_star = seen_star or parameter.kind is parameter.VAR_POSITIONAL
        parts.append(_parameter(parameter))
    returns = _annotation(described.return_annotation)
    end = f" -> {returns}" if returns not in ("", "None") else ""
    line = f"{name}({', '.join(parts)}){end}"
    if len(line) > WIDTH:
        line = f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){end}"
    return line


def _parameter(parameter: inspect.Parameter) -> str:
    star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    kind, default = _annotation(parameter.annotation), parameter.default
    text = f"{star}{parameter.name}{f': {kind}' if kind else ''}"
    if default is parameter.empty:
        return text
    shown = getattr(default, "__name__", None) or repr(default).replace("'", '"')
    return f"{text} = {shown}" if kind else f"{text}={shown}"


def _annotation(annotation: object) -> str:
    if annotation is inspect.Signature.empty:
        return ""
    annotation = getattr(annotation, "__forward_arg__", annotation)  # a NamedTuple keeps them so
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def fields(kind: type, links: Mapping[str, str] = {}) -> str:
    """The fields of a dataclass as a list, each with the comment behind it in the source."""
    source = textwrap.dedent(inspect.getsource(kind))
    lines, items = source.splitlines(), []
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign) and not node.target.id.startswith("_"):
            code = ast.get_source_segment(source, node)
            comment = lines[node.end_lineno - 1][node.end_col_offset :].partition("#")[2].strip()
            items.append(f"- `{' '.join(code.split())}`" + (f": {prose(comment, links)}" if comment else ""))
    return "\n".join(items)
