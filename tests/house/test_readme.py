"""README, CONTRIBUTING and docs/: they equal what the generator gives, and what they name exists and runs."""

import re
import shlex
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "docs"))

import api_page
import docstrings
import generate

from fuserl.engine import cli, losses, rewards
from fuserl.engine.batch import Batch

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()
WRITTEN = ("README.md", "CONTRIBUTING.md")
MARKDOWN = sorted([*WRITTEN, "CHANGELOG.md", *generate.PAGES])
STALE = "run: python docs/generate.py"


def test_tables_equal_the_code():
    assert generate.with_tables(TEXT) == TEXT, STALE


@pytest.mark.parametrize("path", generate.PAGES)
def test_pages_equal_the_code_and_the_rows(path):
    assert generate.page(path) == (ROOT / path).read_text(), STALE


@pytest.mark.parametrize("table", [each.__name__ for each in generate.TABLES])
def test_a_table_that_differs_is_seen(table):
    changed = re.sub(rf"(<!-- table:{table} -->\n)", r"\1| changed |\n", TEXT)
    assert changed != TEXT and generate.with_tables(changed) == TEXT


def test_example_runs():
    source = re.search(r"```python\n(import torch.*?)```", TEXT, re.DOTALL)[1]
    namespace = {}
    exec(source.replace("2048", "32").replace("49152", "500"), namespace)
    assert namespace["hidden"].grad.abs().sum() > 0 and namespace["head"].weight.grad.abs().sum() > 0


def test_the_reward_of_the_example_is_one():
    source, namespace = re.search(r"```python\n(def short.*?)```", TEXT, re.DOTALL)[1], {}
    exec(source, namespace)
    assert set(rewards.wanted(namespace["short"])) == {"completion", "answer"}
    assert namespace["short"](" 7", "7") >= 1 > namespace["short"](" 8", "7")


def test_the_problems_of_the_example_are_read(tmp_path):
    from fuserl.engine import files

    path = tmp_path / "problems.jsonl"
    path.write_text(re.search(r'```\n(\{"prompt".*?)```', TEXT, re.DOTALL)[1])
    first, second, third = files.read(path).problems
    assert first.answer == second.answer == "4" and second.turns and third.rejected == " 5"


def test_map_names_every_folder():
    named = set(re.findall(r"^(\w+)/ ", re.search(r"## Map\n\n```\n(.*?)```", TEXT, re.DOTALL)[1], re.MULTILINE))
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")}
    assert named == folders - {"build", "dist", "runs", "__pycache__"}


def anchors(text):
    """The anchors of a page's headings, as GitHub numbers repeated ones."""
    found = []
    for heading in re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE):
        slug = docstrings.slug(heading)
        found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return found


def without_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def broken_links(path, text, pages):
    """Links of a page to files or headings that are not there; `pages` are texts by path."""
    for target in re.findall(r"\]\(([^)]+)\)", without_code(text)):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        there = (Path(path).parent / file).as_posix() if file else path
        if not (there in pages or (ROOT / there).is_file()):
            yield f"{path}: {target}: no such file"
        elif anchor and anchor not in anchors(pages[there]):
            yield f"{path}: {target}: no such heading"


def test_links_resolve():
    pages = {path: (ROOT / path).read_text() for path in MARKDOWN}
    broken = [line for path, text in pages.items() for line in broken_links(path, text, pages)]
    assert not broken, broken
    assert sum(text.count("](") for text in pages.values()) > 100


def test_a_broken_link_is_found():
    pages = {"docs/a.md": "# One\n\n# One\n", "b.md": ""}
    kept = "[a](docs/a.md#one) [b](docs/a.md#one-1) [c](README.md) [d](https://x.y)"
    assert not list(broken_links("b.md", kept, pages))
    wrong = "[a](docs/a.md#two) [b](a.md) [c](#one) [d](docs/a.md#one-2)"
    assert len(list(broken_links("b.md", wrong, pages))) == 4


def test_no_heading_of_a_page_comes_twice():
    for path in MARKDOWN:
        found = anchors((ROOT / path).read_text())
        assert len({re.sub(r"-\d+$", "", each) for each in found}) == len(found), path


def flags_of(parser):
    return {option for action in parser._actions for option in action.option_strings}


def wrong_commands(text):
    """Commands and flags in a text's code that fuserl does not take, with what it says."""
    parsers, recipes = api_page.parsers(), {}
    known = set().union(*map(flags_of, parsers.values()))
    shown = [line for block in re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.M) for line in block.splitlines()]
    shown += [span for span in re.findall(r"`([^`\n]+)`", without_code(text)) if "COMMAND" not in span]
    for line in shown:
        words = shlex.split(line, comments=True) if re.match(r"(fuserl|--\w)", line) else []
        if words[:1] == ["fuserl"] and words[1:] and "<name>" not in words:
            command, *arguments = words[1:]
            try:
                if command not in parsers:
                    cli.main([command])
                recipe = cli._recipe(arguments) if command == "train" else None
                parser = recipes.setdefault(recipe, cli.train_parser(recipe)) if recipe else parsers[command]
                parser.known(arguments if arguments or command != "export" else ["RUN", "--out", "DIR"])
            except SystemExit:
                yield line
        elif words[:1] != ["fuserl"]:
            yield from (word for word in words if word.startswith("--") and word.partition("=")[0] not in known)


@pytest.mark.parametrize("path", WRITTEN)
def test_every_command_and_flag_exists(path, capsys):
    text = re.sub(r"<!-- table:trl -->.*?<!-- end -->", "", (ROOT / path).read_text(), flags=re.DOTALL)
    wrong = list(wrong_commands(text))
    assert not wrong, (wrong, capsys.readouterr().err)


def test_a_wrong_command_or_flag_is_found():
    wrong = [
        "fuserl trian",
        "fuserl train grpo --stesp 3",
        "fuserl train sft --low 0.1",
        "fuserl bench --fast",
        "--nope",
    ]
    right = ["fuserl train ppo --lam 1", "fuserl list", "fuserl eval RUN", "--resume", "--no-chat"]
    inline = "".join(f"`{each}`\n" for each in (*wrong, *right))
    assert list(wrong_commands(inline)) == wrong
    assert list(wrong_commands("```\n" + "\n".join([*wrong, *right]) + "\n```\n")) == wrong


@pytest.mark.parametrize("path", WRITTEN)
def test_every_file_and_target_named_exists(path):
    text = (ROOT / path).read_text()
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"\bmake ([a-z-]+)", text)
    assert targets and all(f"\n{each}:" in makefile for each in targets), targets
    folders = "bindings|kernels|csrc|engine|benchmarks|docs|examples|tests"
    named = re.findall(rf"\b((?:{folders})/[\w./]+\.\w+)", without_code(text))
    assert len(named) > 3 and not [each for each in named if not (ROOT / each).is_file()]


def sample(a, *, b: int | None = None, c="x"):
    """One sentence of `other` and `sample`.

        sum = a * b

    More, a < b * c* (arXiv:1234.56789).
    Memory: none.

    Args:
        a: first,
            on two lines.
        b, c: the rest.

    Returns:
        (a,) with text.

    Raises:
        ValueError: always.
    """


def test_a_docstring_becomes_markdown():
    links = {"other": "#other"}
    assert docstrings.docstring(sample.__doc__, links).split("\n\n") == [
        "One sentence of [`other`](#other) and `sample`.",
        "```text\nsum = a * b\n```",
        "More, a \\< b \\* c\\* ([arXiv:1234.56789](https://arxiv.org/abs/1234.56789)).",
        "Memory: none.",
        "**Args**",
        "- `a`: first,\n  on two lines.\n- `b`, `c`: the rest.",
        "**Returns** (a,) with text.",
        "**Raises**",
        "- `ValueError`: always.",
    ]


def test_a_formula_without_indentation_is_code():
    assert "```text\nloss = max(" in docstrings.docstring(losses.squared_value.__doc__)


def test_a_signature_is_shown_as_written():
    assert docstrings.signature("f", sample) == 'f(a, *, b: int | None = None, c="x")'
    long = docstrings.signature("losses.clipped", losses.clipped).splitlines()
    assert long[:3] == ["losses.clipped(", "    *,", "    low: float = 0.2,"]
    assert long[-2:] == ["    reduce: Callable = rollout_mean,", ") -> Loss"]


def test_a_field_is_listed_with_its_comment():
    listed = docstrings.fields(Batch).splitlines()
    assert "- `tokens: Tensor`: (N,) int64" in listed and "- `counts: Counts`" in listed


def test_the_api_page_has_every_public_op_and_part():
    import fuserl
    from fuserl.engine import advantages, rollouts

    page = (ROOT / "docs" / "api.md").read_text()
    parts = [f"{module.__name__.rpartition('.')[2]}.{name}" for module in (losses, advantages, rollouts)
             for name in vars(module) if getattr(vars(module)[name], "__module__", "") == module.__name__
             and name[0].islower()]  # fmt: skip
    assert len(parts) > 25
    for name in [*fuserl.__all__, *parts, "Recipe", "Critic", "Loss", "Batch", "Rollouts", "Policy"]:
        assert f"\n### `{name}`\n" in page, name
    for command in cli._COMMANDS:
        assert f"\n### `fuserl {command}`\n" in page


def test_the_page_of_metrics_explains_every_number_that_a_run_writes():
    import metrics_page
    import recorded_run

    from fuserl.engine import panels

    series = {name for panel in panels.PANELS for name in panel.series} - {"tokens_per_second"}
    written = {re.sub(r"pass@\d+", "pass@k", name) for row in recorded_run.rows(3) for name in row}
    assert series | written == {*metrics_page.WHAT, "format_reward"}  # the last is of a reward that adds its own
    shown = (ROOT / "docs" / "metrics.md").read_text()
    assert all(f"| `{name}` |" in shown for name in metrics_page.WHAT)
