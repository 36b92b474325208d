"""Data, tasks and rewards that cannot be used: one sentence each, before a model is loaded or a step is taken."""

import importlib
import json
import os
import sys
from pathlib import Path

import pyarrow
import pytest
import refusals
import tiny_runs
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from pyarrow import parquet
from refusals import outcome, refused, sentence, training

from fuserl.engine import models

ALWAYS = dict(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
ROWS = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(8)]
PAIRS = [{**row, "chosen": row["answer"], "rejected": "0"} for row in ROWS]
EMPTY = "must have rows"


@pytest.fixture(autouse=True)
def staged(monkeypatch, tmp_path):
    refusals.stage(monkeypatch, tmp_path)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def after(row):
    """A file whose ninth row is this one."""
    return lines([*ROWS, row])


CONTENTS = {
    "d.jsonl": [
        ("", EMPTY),
        ("\n \n", EMPTY),
        (lines([{"question": "1"}]), "Its columns are question"),
        (after({"answer": "1"}), "d.jsonl:9"),
        (after([1]), "got [1]"),
        (after("x"), "got 'x'"),
        (after(None), "got None"),
        (after({"prompt": 3}), "got 3"),
        (after({"prompt": " "}), "got ' '"),
        (after({"prompt": []}), "got []"),
        (after({"prompt": [1]}), "got 1"),
        (after({"prompt": {"a": 1}}), "got {'a': 1}"),
        (after({"prompt": [{"role": "robot", "content": "x"}]}), "role"),
        (after({"prompt": [{"role": "assistant", "content": "x"}]}), "the last message must be a user's"),
        (after({"prompt": "1+1=", "answer": [1]}), "got [1]"),
        (after({"prompt": "1+1=", "answer": True}), "got True"),
        (after({"prompt": "\ud800", "answer": "1"}), r"\ud800"),
        (after({"prompt": "9"}), "d.jsonl:9 has no answer"),
        ('{"prompt": "1", "answer": NaN}', "no NaN"),
        ('{"prompt": "1", "answer": 1e999}', "got inf"),
        ('{"prompt": "1", "answer": 1%s}' % ("0" * 5000), "d.jsonl:1"),
        ("{'prompt': 1}", "d.jsonl:1"),
        ("[" * 100_000, "nested too deep"),
        ('{"prompt": "\x1b[2J"}', "d.jsonl:1"),
        (b"\xff\x00\x01", "d.jsonl:1"),
        (lines(ROWS[:1]), "it has 1"),
        (lines(ROWS[:4]), "it has 4"),
        (lines(ROWS[:1] * 9), "it has 1"),
    ],
    "d.json": [("[]", EMPTY), ("{}", "got None"), ("3", "got 3"), ("[1", "d.json"), (json.dumps([ROWS]), "row 1")],
    "d.csv": [("prompt,answer\n1,2", "d.csv")],
    "d": [("x", "'d'")],
    "d.parquet": [
        ("", "0 bytes"),
        ("garbage", "7 bytes"),
        (b"PAR1" + b"\0" * 100 + b"PAR1", "d.parquet"),
        ({"prompt": pyarrow.array([], pyarrow.string())}, EMPTY),
        ({"prompt": [1, 2]}, "got 1"),
        ({"prompt": [{"a": 1}]}, "got {'a': 1}"),
        ({"prompt": [b"\xff"]}, r"got b'\xff'"),
        ({"question": ["1"]}, "Its columns are question"),
    ],
}
CASES = [(name, content, says) for name, several in CONTENTS.items() for content, says in several]


def write(name, content):
    if isinstance(content, dict):
        parquet.write_table(pyarrow.table(content), name)
    else:
        with open(name, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize(("name", "content", "says"), CASES, ids=lambda value: repr(value)[-30:])
def test_files_of_problems(name, content, says):
    write(name, content)
    refused(training(data=name), says)


@pytest.mark.parametrize(
    ("recipe", "rows", "says"),
    [
        ("sft", [{"prompt": row["prompt"]} for row in ROWS], 'must have "answer"'),
        ("dpo", ROWS, 'must have "chosen"'),
        ("dpo", [{**row, "chosen": "1"} for row in ROWS], 'must have "rejected"'),
        ("dpo", [{**row, "chosen": "?", "rejected": row["answer"]} for row in PAIRS], "must be a wrong completion"),
        ("reward_model", [{**row, "chosen": "0"} for row in PAIRS], "both are '0'"),
        ("dpo", [{**row, "rejected": 3} for row in PAIRS], "got 3"),
        ("dpo", [{**row, "chosen": []} for row in PAIRS], "got []"),
        ("dpo", [{**row, "chosen": [{"role": "user", "content": "x"}]} for row in PAIRS], "assistant's"),
    ],
)
def test_problems_that_a_recipe_cannot_learn_from(recipe, rows, says):
    write("d.jsonl", lines(rows))
    refused(training(data="d.jsonl", recipe=recipe, group_size=None), says, "d.jsonl:1")


SPLITS = {
    ("--eval-problems", "8"): "it has 8",
    ("--eval-problems", "7", "--few-shot", "1"): "it has 8",
    ("--few-shot", "8"): "it has 8",
    ("--columns", "prompt=question"): "got 'question'",
    ("--columns", "x=y"): "got 'x'",
    ("--columns", "prompt="): "got 'prompt='",
    ("--columns", "prompt=prompt", "prompt=answer"): "got 'prompt=answer' too",
    ("--eval-data", "problems.jsonl"): "beside the questions of problems.jsonl",
    ("--eval-data", "absent.jsonl"): "got 'absent.jsonl'",
    ("--eval-data", "."): "got '.'",
    ("--data", "absent.jsonl"): "No such file",
    ("--data", "folder.jsonl"): "Is a directory",
    ("--data", "folder.parquet"): "folder.parquet",
    ("--data", "mem.jsonl"): "Input/output",
    ("--data", "loop.jsonl"): "Too many levels",
}


@pytest.mark.parametrize("words", SPLITS, ids=" ".join)
def test_splits_columns_and_paths(words):
    for name in ("folder.jsonl", "folder.parquet"):
        os.mkdir(name)
    os.symlink("/proc/self/mem", "mem.jsonl")
    os.symlink("loop.jsonl", "loop.jsonl")
    refused(training(*words), SPLITS[words])


TASKS = {
    "x": "got 'x'",
    "chain_sum": "Did you mean 'reasoning_gym:chain_sum'?",
    "reasoning_gym": "got 'reasoning_gym'",
    "reasoning_gym:": "got ''",
    "reasoning_gym:chain_sun": "Did you mean 'chain_sum'?",
    "reasoning_gym:chain_sum:terms=1": "got 'terms=1'",
    "reasoning_gym:chain_sum:max_terms": "got 'max_terms'",
    "reasoning_gym:chain_sum:max_terms=": "got max_terms=.",
    "reasoning_gym:chain_sum:max_terms=x": "got max_terms=x",
    "reasoning_gym:chain_sum:max_terms=-1": "got max_terms=-1",
    "reasoning_gym:chain_sum:max_terms=[1": "got max_terms=[1",
    "reasoning_gym:chain_sum:max_terms=None": "got max_terms=None",
    "reasoning_gym:chain_sum:max_terms=2.5": "got max_terms=2.5",
    "reasoning_gym:chain_sum:max_digits=5000": "got max_digits=5000",
    "reasoning_gym:chain_sum:max_terms=3,max_terms=4": "got max_terms=3, max_terms=4",
    "reasoning_gym:chain_sum:seed=3": "got 'seed=3'",
    "absent.jsonl": "got 'absent.jsonl'",
    "/": "got '/'",
}


@pytest.mark.parametrize("task", TASKS)
def test_tasks(task):
    refused(training("--task", task, data=None), TASKS[task])


def test_columns_of_a_task():
    refused(training("--columns", "prompt=q", data=None), "got prompt=q")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["prompt", "answer", "chosen", "role", "content", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.fixture
def no_model(monkeypatch):
    def load(*_):
        raise ValueError("load: there is none here.")

    monkeypatch.setattr(models, "load", load)


@pytest.mark.usefixtures("no_model")
@given(row=JSON, recipe=st.sampled_from(["grpo", "sft", "dpo"]))
@examples(max_examples=50, **ALWAYS)
def test_any_row(row, recipe):
    """It is refused, or what comes next is: a model that is not there."""
    write("any.jsonl", lines([*PAIRS, row]))
    status, _, err = outcome(training(data="any.jsonl", recipe=recipe, group_size=None))
    assert status == 2 and not refusals.started
    line = sentence(err, 2)
    assert "any.jsonl" in line or "there is none here" in line


@given(content=st.binary(max_size=80), suffix=st.sampled_from(["jsonl", "json", "parquet"]))
@examples(max_examples=50, **ALWAYS)
def test_any_bytes_as_problems(content, suffix):
    write(f"any.{suffix}", content)
    refused(training(data=f"any.{suffix}"), f"any.{suffix}")


REWARDS = {  # what is wrong before it is called, by the source of the module
    "def f(completion) return 1": "SyntaxError: expected ':' (",
    "  f = 1": "IndentationError",
    "\0": "SyntaxError",
    "import absent_thing": "ModuleNotFoundError: No module named 'absent_thing' (",
    "\n1 / 0": "ZeroDivisionError: division by zero (",
    "import json\njson.loads('')": "rewards.py:2)",
    "raise SystemExit('bye')": "SystemExit: bye (",
    "raise Exception('one\\ntwo')": "Exception: one two (",
    "class Odd(BaseException): ...\nraise Odd": "Odd (",
    "": "got 'f'",
    "f = 3": "got 'f'",
    "def g(completion): return 1": "Known: g",
    "def f(text): return 1": "got 'text'",
    "def f(completion, completions): return 1": "got 'completion'",
    "from torch import sum as f": "no signature",
    "def f(completion): return 1\nf.prepare = 3": "'int' object is not callable",
    "def f(completion): return 1\ndef p(): raise KeyError('judge')\nf.prepare = p": "KeyError: 'judge' (",
}
RETURNS = {  # what is wrong when it is called, on trial
    "def f(completion): return None": "got None",
    "def f(completion): return '1'": "got '1'",
    "def f(completion): return float('nan')": "got nan",
    "def f(completion): return float('inf')": "got inf",
    "def f(completion): return 10**400": "got 1000",
    "def f(completion): return 1j": "got 1j",
    "def f(completion): return [1.0]": "got [1.0]",
    "import torch\ndef f(completion): return torch.ones(())": "got tensor(1.)",
    "def f(completion): yield 1.0": "got <generator",
    "class f: ...": "got <rewards",
    "def f(completions): return 1.0": "got 1.0",
    "def f(completions): return [1.0] * 3": "a list of 2 numbers, one per completion; got 3",
    "def f(completions): return ['x', 'y']": "got 'x'",
    "async def f(completion): return None": "got None",
    "def f(completion):\n    raise KeyError('unit\\nof it')": "rewards.py:2)",
    "import json\ndef f(completion):\n    return json.loads('{')": "rewards.py:3)",
    "def f(completion): exit(3)": "SystemExit: 3",
    "def f(completion): return f(completion)": "RecursionError",
}


def module(source):
    """A user's module with the reward, which no cache knows."""
    write("rewards.py", source)
    importlib.invalidate_caches()
    sys.modules.pop("rewards", None)


@pytest.mark.parametrize("source", [*REWARDS, *RETURNS], ids=lambda source: repr(source)[-40:])
def test_rewards(source):
    module(source)
    line = refused(training("--reward", "rewards:f"), {**REWARDS, **RETURNS}[source])
    assert (source in RETURNS) == ("on trial" in line)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def f(completion): return None", "got None"),
        ("import os\ndef f(completion): os._exit(3)", "exit status 3"),
        ("import os\ndef f(completion): os.kill(os.getpid(), 9)", "SIGKILL"),
        ("f = lambda completion: 1.0", "must be importable"),
        ("import sys\nif sys.argv[0] == '-c': 1 / 0\ndef f(completion): return 1.0", "rewards.py:2)"),
    ],
)
def test_rewards_in_workers(source, says):
    module(source)
    refused(training("--reward", "rewards:f", reward_workers=1), says)


def test_a_reward_that_hangs_counts_as_0():
    module("def f(completion):\n    while True: ...")
    changes = dict(reward_workers=2, reward_timeout=0.1, groups=1, group_size=2, eval_problems=0)
    assert outcome(training("--reward", "rewards:f", **changes))[0] == 0
    (row,) = tiny_runs.rows(Path("out"))
    assert row["timeouts"] == 2 and row["reward"] == 0


@pytest.mark.parametrize(
    "name",
    ["x", "x:y", ":", "x:", ":y", "..x:y", ".:y", "a b:c", "os:sep", "os:nothing", "builtins:len", "rewards:f:g"],
)
def test_names_of_rewards(name):
    refused(training("--reward", name))
