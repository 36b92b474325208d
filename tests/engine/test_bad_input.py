"""Arguments and files of settings that nobody can run: one sentence each, and no training."""

import json
import os

import pytest
import refusals
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from refusals import outcome, refused, sentence, training

from fuserl.engine import catalogue
from fuserl.engine.config import kind, settings

ALWAYS = dict(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def staged(monkeypatch, tmp_path):
    refusals.stage(monkeypatch, tmp_path)


COMMANDS = {
    (): None,
    ("",): "unknown command ''",
    ("trian",): "Did you mean 'train'?",
    ("\x1b[31m",): r"'\x1b[31m'",
    ("--steps",): "unknown command '--steps'",
    ("list", "all"): "unknown argument 'all'",
    ("doctor", "--fix"): "unknown argument '--fix'",
    ("check", ""): "got ''",
    ("check", "grop"): "Did you mean 'grpo'?",
    ("check", "grpo", "sft"): "unknown argument 'sft'",
    ("bench", "--smok"): "Did you mean '--smoke'?",
    ("bench", "a", "b"): "unknown argument 'b'",
    ("eval",): "RUN|MODEL",
    ("eval", "x", "y"): "unknown argument 'y'",
    ("eval", "x", "--low", "0.1"): "low is an option of",
    ("eval", "x", "--resume", "y"): "unknown argument '--resume'",
    ("eval", ""): "model must be a text; got ''",
    ("eval", "a\0b"): r"got 'a\x00b'",
    ("export",): "RUN, --out",
    ("export", "x"): "--out",
    ("export", "x", "--out"): "--out",
    ("export", "", "--out", "y"): "got ''",
    ("export", "absent", "--out", "y"): "got 'absent'",
    ("export", "x", "--out", "y", "--dtype", "int8"): "'int8'",
    ("report",): "RUN",
    ("report", ""): "no config.json",
    ("report", "absent"): "absent",
    ("report", "absent", "--out", "\udcff"): r"\udcff",
    ("report", "a", "--open"): "unknown argument '--open'",
}


@pytest.mark.parametrize("words", [words for words in COMMANDS if words], ids=repr)
def test_commands(words):
    refused(list(words), COMMANDS[words])


FLAGS = {
    ("--grop-size", "4"): "Did you mean '--group-size'?",
    ("--num_generations", "4"): "It is --group-size here.",
    ("--lam", "0.5"): "lam is an option of ppo",
    ("--\x07",): r"'--\x07'",
    ("--lr",): "expected one argument",
    ("--lr", ""): "got ''",
    ("--lr", "fast"): "got 'fast'",
    ("--lr", "nan"): "got nan",
    ("--lr", "inf"): "got inf",
    ("--lr=-1e-5",): "got -1e-05",
    ("--lr", "0"): "got 0.0",
    ("--lr", "1e-5\n1e-6"): r"got '1e-5\n1e-6'",
    ("--steps", "0"): "got 0",
    ("--steps", "1e3"): "got '1e3'",
    ("--steps", "1.5"): "got '1.5'",
    ("--steps", "9" * 30): "below 2^31",
    ("--steps", "9" * 5000): "--steps",
    ("--groups", str(2**31)): "below 2^31; got 2147483648",
    ("--threads", "1000000"): "<= 1024; got 1000000",
    ("--reward-workers", "1000000"): "<= 1024; got 1000000",
    ("--seed", "-1"): "got -1",
    ("--top-p", "2"): "got 2.0",
    ("--top-p", "0"): "got 0.0",
    ("--temperature", "0"): "got 0.0",
    ("--warmup", "10000"): "got 10000",
    ("--keep", "0"): "got 0",
    ("--device", "tpu"): "got 'tpu'",
    ("--device", "cuda:x"): "got 'cuda:x'",
    ("--dtype", "float16"): "got 'float16'",
    ("--schedule", "step"): "got 'step'",
    ("--chat=1",): "'1'",
    ("--no-lr",): "unknown argument '--no-lr'",
    ("--recipe",): "--recipe",
    ("--recipe=",): "unknown recipe ''",
    ("--recipe", "grop"): "Did you mean 'grpo'?",
    ("--model", ""): "got ''",
    ("--out", ""): "got ''",
    ("--data", ""): "got ''",
    ("--data", "\udcff.jsonl"): r"\udcff.jsonl",
    ("--task", "a\0b"): r"a\x00b",
    ("--stop", ""): "got ('',)",
    ("--system", "Be brief."): "got 'Be brief.'",
    ("--columns", "prompt"): "got 'prompt'",
    ("--trackers", "mlflow"): "got 'mlflow'",
    ("--config", ""): "config: .",
    ("--config", "absent.toml"): "absent.toml",
    ("--config", "."): "Is a directory",
    ("--config", "\x1b[31m.toml"): r"config: \x1b[31m.toml must be",
    ("--resume", "absent"): "leave out --config and --out",
    ("--low", "nan"): "got nan",
    ("--low", "-1"): "got -1.0",
    ("--beta", "inf"): "got inf",
    ("--dual", "x"): "got 'x'",
}


@pytest.mark.parametrize("words", FLAGS, ids=lambda words: repr(words)[:60])
def test_flags(words):
    refused(training(*words), FLAGS[words])


OPTIONS = [
    ("dapo", "--attempts", "0"), ("dapo", "--attempts", "9" * 30), ("dapo", "--overlong-buffer", "5"),
    ("dapo", "--overlong-penalty", "nan"), ("dapo", "--high", "-1"), ("ppo", "--gamma", "1.5"),
    ("ppo", "--lam", "-0.1"), ("ppo", "--critic-lr", "0"), ("ppo", "--value-clip", "-1"), ("ppo", "--whiten", "no"),
    ("rloo", "--beta", "-1"), ("gspo", "--low", "wide"), ("dpo", "--label-smoothing", "2"),
    ("reward_model", "--centre", "-1"),
]  # fmt: skip


@pytest.mark.parametrize("words", OPTIONS, ids=" ".join)
def test_options_of_recipes(words):
    recipe, flag, value = words
    size = {"dpo": 2, "reward_model": 2}.get(recipe, 4)
    line = refused(training(flag, value, recipe=recipe, group_size=size))
    assert value[:20] in line or str(float(value)) in line


NUMBERS = [setting for setting in settings() if kind(setting.name)[0] in (int, float)]


@st.composite
def wrong_numbers(draw):
    setting = draw(st.sampled_from(NUMBERS))
    integer = kind(setting.name)[0] is int
    texts = st.text(max_size=20).filter(lambda text: not text.startswith("-") and not number(text))
    values = [texts, st.sampled_from(["nan", "inf", "-inf", "1e999", "0x10", "1,5", "--", "٣x"])]
    if setting.metadata["least"] is not None:
        values.append(st.integers(max_value=int(setting.metadata["least"]) - 1).map(str))
    if setting.metadata["most"] is not None:
        values.append(st.integers(min_value=int(setting.metadata["most"]) + 1, max_value=10**400).map(str))
    if integer:
        values += [st.integers(min_value=2**31).map(str), st.floats(allow_nan=False, allow_infinity=False).map(repr)]
    return setting.name, draw(st.one_of(values))


def number(text):
    """Whether Python reads the text as a finite number."""
    try:
        return abs(float(text)) < float("inf")
    except ValueError:
        return False


@given(case=wrong_numbers())
@examples(max_examples=80, **ALWAYS)
def test_any_number_out_of_its_range(case):
    name, value = case
    line = refused(training(f"--{name.replace('_', '-')}={value}", **{name: None}))
    assert name in line.replace("-", "_") or "UTF-8" in line


@given(words=st.lists(st.text(max_size=30), min_size=1, max_size=4))
@examples(max_examples=40, **ALWAYS)
def test_any_words(words):
    status, _, err = outcome([words[0] if words[0] not in ("help", "-h", "--help", "--version") else "x", *words[1:]])
    assert status == 2 and sentence(err, 2)


FILES = {
    "steps = ": "c.toml",
    "steps = 1\nsteps = 2": "c.toml",
    "[update]\nlr = 1e-3": "'update'",
    "[grpo]\nlow = 0.1": "'grpo'",
    "lr = 1979-05-27": "got datetime.date(1979, 5, 27)",
    "lr = [1e-3]": "got [0.001]",
    "lr = nan": "got nan",
    "steps = true": "got True",
    "x = " + "[" * 10_000: "recursion",
    "grop_size = 4": "Did you mean 'group_size'?",
    "recipe = 'grop'": "Did you mean 'grpo'?",
    "recipe = 3": "got 3",
    "value_coef = 1.0": "value_coef is an option of ppo",
}
JSON = {
    "": "c.json",
    "{": "c.json",
    "[1, 2]": "got list",
    "3": "got int",
    "null": "got NoneType",
    "[" * 100_000: "recursion",
    b"\x00\x01\xff": "c.json",
    '{"config": 3}': "'config'",
    '{"config": {"steps": "3"}}': "got '3'",
    '{"steps": 1.0}': "got 1.0",
    '{"steps": null}': "got None",
    '{"steps": 1%s}' % ("0" * 400): "below 2^31",
    '{"lr": 1%s}' % ("0" * 400): "got inf",
    '{"lr": NaN}': "got nan",
    '{"lr": 1e999}': "got inf",
    '{"stop": "x"}': "got 'x'",
    '{"stop": [1]}': "got (1,)",
    '{"stop": ["\\ud800"]}': r"\ud800",
    '{"model": "a\\u0000b"}': r"a\x00b",
    '{"data": 3}': "got 3",
    '{"trackers": "wandb"}': "got 'wandb'",
    '{"chat": "yes"}': "got 'yes'",
    '{"": 1}': "got ''",
    '{"a\\u001b[2J": 1}': r"a\x1b[2J",
    '{"options": {"low": 0.1}}': "'options'",
    '{"reasons": {"lr": "x"}}': "'reasons'",
    '{"low": null}': "got None",
    '{"low": [1]}': "got [1]",
}


@pytest.mark.parametrize("content", [*FILES, *JSON], ids=lambda content: repr(content)[:40])
def test_files_of_settings(content, tmp_path):
    path = tmp_path / ("c.toml" if content in FILES else "c.json")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(["train", "--config", str(path), "--out", "out"], {**FILES, **JSON}[content])


def test_files_of_settings_that_nobody_can_read(tmp_path):
    os.symlink("/proc/self/mem", "mem.json")
    os.symlink("loop.toml", "loop.toml")
    for name, says in {"mem.json": "Input/output", "loop.toml": "Too many levels", "a/b.toml": "No such file"}.items():
        refused(["train", "--config", name], name, says)
    refused(["train", "--config", "a" * 5000], "File name too long", status=1)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NAMES = [setting.name for setting in settings()]


@given(
    name=st.sampled_from(NAMES) | st.sampled_from(list(catalogue.options("grpo"))) | st.text(max_size=8), value=VALUES
)
@examples(max_examples=80, **ALWAYS)
def test_any_setting_of_any_type(name, value):
    """A value is taken, and the absent data file is what is wrong, or it is refused by its name."""
    with open("any.json", "w") as file:
        json.dump({"data": "absent.jsonl", name: value}, file)
    if name in ("model", "task", "data", "eval_data", "reward", "system", "columns", "out", "trackers") and value:
        return  # texts that may name something
    status, _, err = outcome(["train", "--config", "any.json"])
    assert status in (1, 2) and not refusals.started
    line = sentence(err, status)
    assert any(says in line for says in ("absent.jsonl", "every name must be a setting", name))


@given(content=st.binary(max_size=60), suffix=st.sampled_from([".toml", ".json", ""]))
@examples(max_examples=40, **ALWAYS)
def test_any_bytes_as_a_file_of_settings(content, suffix):
    with open(f"any{suffix}", "wb") as file:
        file.write(content)
    refused(["train", "--data", "absent.jsonl", "--config", f"any{suffix}"])
