"""Writes README's tables and every page of docs/ from docstrings, signatures and measured rows.

    python docs/generate.py

A table of README stands between <!-- table:NAME --> and <!-- end -->; neither it nor a page is ever typed, and a test
compares them with what this gives.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import api_page
import code_tables
import measured_tables
import metrics_page

ROOT = Path(__file__).resolve().parent.parent
TABLES = (
    code_tables.ops, code_tables.recipes, code_tables.trl,
    measured_tables.learning, measured_tables.baselines, measured_tables.speed, measured_tables.benchmarks,
    measured_tables.trainers, measured_tables.endtoend, measured_tables.curve,
    measured_tables.objectives,
)  # fmt: skip
PAGES: dict[str, Callable[[], str]] = {
    "docs/api.md": api_page.page,
    "docs/settings.md": code_tables.settings_page,
    "docs/metrics.md": metrics_page.page,
    "docs/checks.md": measured_tables.checks_page,
    "docs/numerics.md": measured_tables.numerics_page,
    "docs/benchmarks.md": measured_tables.benchmarks_page,
}
_NOTE = "<!-- Written by docs/generate.py from the code and the measured rows; change those. -->\n\n"


def page(path: str) -> str:
    """The text of a page."""
    return _NOTE + PAGES[path]()


def with_tables(text: str) -> str:
    """A text with every table between its marks written anew."""
    for table in TABLES:
        marks = rf"(<!-- table:{table.__name__} -->\n).*?(<!-- end -->)"
        text = re.sub(marks, lambda found, table=table: f"{found[1]}{table()}\n{found[2]}", text, flags=re.DOTALL)
    return text


def main() -> None:
    """Write them all."""
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text()))
    for path in PAGES:
        (ROOT / path).write_text(page(path))


if __name__ == "__main__":
    main()
