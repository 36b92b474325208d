"""Problems in a user's file, JSON lines or Parquet: every row is checked before anything starts.

    {"prompt": "2 + 2 =", "answer": 4}                                                   text, as the model reads it
    {"prompt": [{"role": "user", "content": "What is 2 + 2?"}], "answer": "4"}           messages, for a chat template
    {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}                              a preference
    {"chosen": [{"role": "user", ...}, {"role": "assistant", ...}], "rejected": [...]}   messages that hold the prompt

Any other column is metadata. What is wrong with a row is one line that begins with the file and the row.
"""

from __future__ import annotations

import decimal
import functools
import json
import math
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fuserl.engine import lookup
from fuserl.engine.problems import Problem, Rows

COLUMNS = ("prompt", "answer", "chosen", "rejected")
ROLES = ("system", "user", "assistant")
SUFFIXES = (".jsonl", ".json", ".parquet")
_SHOWN = 12  # columns listed in one error
_EXAMPLE = '{"prompt": "2 + 2 =", "answer": "4"}'
_MESSAGE = '{"role": "user", "content": "text"}'

Turns = tuple[dict[str, str], ...]


def read(path: str | Path, columns: Sequence[str] = ()) -> Rows:
    """The problems in a file, all of them held in memory.

    Args:
        path: `.jsonl` (an object a line), `.json` (the same, or one list of objects) or `.parquet`.
        columns: `ours=theirs` each, where the file calls prompt, answer, chosen or rejected otherwise.

    Raises:
        ValueError: the file cannot be read, has no rows, lacks a column, or a row is not what it must be.
    """
    path, theirs = Path(path), renamed(columns)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"task: data must be a {', '.join(SUFFIXES)} file; got {str(path)!r}. Write it as JSON lines.")
    try:
        rows = list(_parquet(path) if path.suffix.lower() == ".parquet" else _json(path))
    except OSError as error:
        raise ValueError(
            f"task: data must be a readable file; got {str(path)!r} ({_line(error.strerror or error)}). Check the path."
        ) from error
    if not rows:
        raise ValueError(f"task: data must have rows; {path} is empty. Write lines like {_EXAMPLE}.")
    _require_columns(path, rows, theirs)
    return Rows([Row(place, values, theirs).problem() for place, values in rows], str(path))


def renamed(columns: Sequence[str]) -> dict[str, str]:
    """The file's name of each of our columns, from texts `ours=theirs`; columns that are not named keep theirs."""
    theirs = {ours: ours for ours in COLUMNS}
    seen = set()
    for text in columns:
        ours, equals, name = text.partition("=")
        if not equals or not name:
            raise ValueError(f"columns: each must read ours=theirs; got {text!r}. Write it like prompt=question.")
        if ours not in COLUMNS:
            raise ValueError(
                f"columns: the left side must be one of {', '.join(COLUMNS)}; got {ours!r}. "
                f"{lookup.nearest(ours, COLUMNS)}"
            )
        if ours in seen:
            raise ValueError(f"columns: {ours} must be named once; got {text!r} too. Leave one of them out.")
        seen.add(ours)
        theirs[ours] = name
    return theirs


@dataclass(frozen=True)
class Row:
    """One row as it was read.

    Args:
        place: the file and the row, as errors name them.
        values: by the file's own column names.
        theirs: the file's name of each of COLUMNS.
    """

    place: str
    values: dict
    theirs: dict[str, str]

    def problem(self) -> Problem:
        """The row as a problem.

        Raises:
            ValueError: something in it is missing or of the wrong kind.
        """
        turns, question = self._prompt()
        answer = self._answer()
        ours = {self.theirs[name] for name in COLUMNS}
        metadata = {name: value for name, value in self.values.items() if name not in ours}
        return Problem(
            question,
            answer,
            {**metadata, "answer": answer},
            chosen=self._completion("chosen", turns),
            rejected=self._completion("rejected", turns),
            turns=turns,
            place=self.place,
        )

    def _prompt(self) -> tuple[Turns, str]:
        """The turns, none where the prompt is plain text, and the question."""
        value, leading = self._value("prompt"), self._leading()
        if isinstance(value, list):
            turns = self._messages("prompt", value)
        elif value is None and leading:
            turns = leading
        elif isinstance(value, str) and value.strip():
            self._encodable("prompt", value)
            # Preference files often hold the prompt twice: as text, and in front of both completions.
            turns = leading if leading and leading[-1]["content"] == value else ()
            if not turns:
                return (), value
        else:
            fields = f"Its columns are {_listed(self.values)}"
            raise self._refusal("prompt", "a row must have text or messages under", value, fields)
        if turns[-1]["role"] != "user" or not turns[-1]["content"].strip():
            raise self._refusal("prompt", "the last message must be a user's that is not empty in", turns[-1])
        transcript = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
        return turns, turns[0]["content"] if len(turns) == 1 else transcript

    def _leading(self) -> Turns:
        """The messages in front of the completions, where those are conversations."""
        chosen, rejected = (self._conversation(name)[:-1] for name in ("chosen", "rejected"))
        if chosen and rejected and chosen != rejected:
            raise self._refusal("rejected", 'all messages but the last must be those of "chosen" in', rejected)
        return chosen or rejected

    def _completion(self, name: str, turns: Turns) -> str | None:
        value = self._value(name)
        if value is None:
            return None
        if isinstance(value, str):
            self._encodable(name, value)
            return value
        *leading, last = self._conversation(name)
        if leading and tuple(leading) != turns:
            raise self._refusal(name, "the messages before the last must be those of the prompt in", leading)
        return last["content"]

    def _conversation(self, name: str) -> Turns:
        """The messages under `name`, () where there is text or nothing."""
        value = self._value(name)
        if value is None or isinstance(value, str):
            return ()
        if not isinstance(value, list):
            raise self._refusal(name, "there must be text or messages under", value)
        messages = self._messages(name, value)
        if messages[-1]["role"] != "assistant":
            raise self._refusal(name, "the last message must be the assistant's in", messages[-1])
        return messages

    def _messages(self, name: str, value: list) -> Turns:
        if not value:
            raise self._refusal(name, "there must be at least one message in", value, f"Write {_MESSAGE}")
        for message in value:
            role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
            if role not in ROLES or not isinstance(content, str):
                contract = f"every message must have a role ({', '.join(ROLES)}) and text as content in"
                raise self._refusal(name, contract, message, f"Write {_MESSAGE}")
            self._encodable(name, content)
        return tuple({"role": message["role"], "content": message["content"]} for message in value)

    def _answer(self) -> str | None:
        value = self._value("answer")
        if isinstance(value, str):
            self._encodable("answer", value)
        elif isinstance(value, bool) or not isinstance(value, int | float | decimal.Decimal | None):
            raise self._refusal("answer", "there must be text or a number under", value, "Quote it")
        elif value is not None and not math.isfinite(value):
            raise self._refusal("answer", "the number must be finite under", value, "Quote it, or leave it out")
        return None if value is None else str(value)

    def _value(self, name: str) -> object:
        return self.values.get(self.theirs[name])

    def _encodable(self, name: str, text: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise self._refusal(name, "text must be Unicode without half characters under", text) from error

    def _refusal(self, name: str, contract: str, value: object, advice: str = "Change the row") -> ValueError:
        column = f'"{_printable(self.theirs[name])}"'
        return ValueError(f"{self.place}: {contract} {column}; got {_short(value)}. {advice}.")


def _json(path: Path) -> Iterator[tuple[str, dict]]:
    # Windows' editors open a file with this mark.
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if path.suffix.lower() == ".json" and content.lstrip().startswith(b"["):
        for number, row in enumerate(_parsed(content, str(path), "the file must be JSON"), 1):
            yield _object(row, f"{path}, row {number}")
        return
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            place = f"{path}:{number}"
            yield _object(_parsed(line, place, "a row must be one JSON object"), place)


def _parsed(content: bytes, place: str, contract: str) -> object:
    try:
        return json.loads(content.decode(), parse_constant=_refuse_constant)
    except ValueError as error:
        raise ValueError(f"{place}: {contract} in UTF-8; it is not ({_line(error)}).") from error
    except RecursionError as error:
        raise ValueError(f"{place}: {contract} that a program can follow; it is nested too deep.") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"JSON has no {name}")


def _object(row: object, place: str) -> tuple[str, dict]:
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a row must be a JSON object; got {_short(row)}. Write {_EXAMPLE}.")
    return place, row


def _parquet(path: Path) -> Iterator[tuple[str, dict]]:
    parquet = lookup.package("pyarrow.parquet", "tasks")
    arrow = lookup.package("pyarrow", "tasks")
    if not path.is_file():
        raise FileNotFoundError(2, "there is no such file")
    try:
        with parquet.ParquetFile(str(path)) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise ValueError(f"its columns must have different names; got {_listed(names)}")
            rows = file.read().to_pylist()
    except (OSError, ValueError, ArithmeticError, MemoryError, arrow.ArrowException) as error:
        raise ValueError(f"{path}: the file must be Parquet and whole; it is not ({_line(error)}).") from error
    return ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))


def _require_columns(path: Path, rows: list[tuple[str, dict]], theirs: dict[str, str]) -> None:
    """Refuses a renamed column that no row has."""
    known = dict.fromkeys(name for _, row in rows for name in row)
    for ours, name in theirs.items():
        if name != ours and name not in known:
            near = lookup.nearest(name, map(_printable, known))
            columns = f"{near} Its columns are {_listed(known)}." if near.endswith("?") else near
            raise ValueError(f"columns: {path} must have the column that {ours} is to be; got {name!r}. {columns}")


def _listed(names) -> str:
    names = [_printable(name) for name in names]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "nothing") + more


def _printable(name: str) -> str:
    return name if name.isprintable() and len(name) <= 40 else _short(name)


@functools.cache
def _brief() -> reprlib.Repr:
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = 60
    return brief


def _short(value: object) -> str:
    text = " ".join(_brief().repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _line(error: object) -> str:
    """An error's text on one line, without the stop at its end."""
    return " ".join(str(error).split()).rstrip(".")
