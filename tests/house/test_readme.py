"""README: its tables equal the code and the measured rows, its example runs, its map is the tree."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()


def readme():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_equal_the_code():
    assert readme().rendered(TEXT) == TEXT, "run: python benchmarks/readme.py"


@pytest.mark.parametrize("table", ["ops", "recipes", "settings", "learning", "benchmarks"])
def test_a_table_that_differs_is_seen(table):
    changed = re.sub(rf"(<!-- table:{table} -->\n)", r"\1| changed |\n", TEXT)
    assert changed != TEXT and readme().rendered(changed) == TEXT


def test_example_runs():
    source = re.search(r"```python\n(import torch.*?)```", TEXT, re.DOTALL)[1]
    namespace = {}
    exec(source.replace("2048", "32").replace("49152", "500"), namespace)
    assert namespace["hidden"].grad.abs().sum() > 0 and namespace["head"].weight.grad.abs().sum() > 0


def test_map_names_every_folder():
    named = set(re.findall(r"^(\w+)/ ", re.search(r"## Map\n\n```\n(.*?)```", TEXT, re.DOTALL)[1], re.MULTILINE))
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")}
    assert named == folders - {"build", "dist", "runs", "__pycache__"}
