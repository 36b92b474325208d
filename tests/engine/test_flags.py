"""Flags: one for every setting and option, with help and defaults; wrong ones are answered with the right one."""

import re

import pytest

from fuserl.engine import catalogue, flags
from fuserl.engine.catalogue import RECIPES
from fuserl.engine.config import Config, kind, settings
from fuserl.engine.flags import SYNONYMS, Parser, add_options, add_settings, given, recipe_of

VALUES = {int: ("3", 3), float: ("0.25", 0.25), str: ("text", "text"), bool: (None, True), tuple: ("x y", ("x", "y"))}
EVERY = pytest.mark.parametrize("recipe", RECIPES)


def parser_of(recipe):
    parser = Parser(prog="fuserl train")
    add_options(parser, recipe)
    add_settings(parser, recipe)
    return parser


def own(recipe):
    """Name, type and default of everything that can be set with a recipe."""
    usual = catalogue.defaults(recipe)
    every = [(each.name, kind(each.name)[0], usual.get(each.name, each.default)) for each in settings()]
    options = [(each.name, each.type, each.default) for each in catalogue.options(recipe).values()]
    return [each for each in (*every, *options) if each[0] != "recipe"]


def flag(name):
    return f"--{name.replace('_', '-')}"


def helped(parser):
    """The help of each flag, its lines joined."""
    text = parser.format_help().partition("options:")[2]
    blocks = re.split(r"\n  (?=-)", text)
    return {re.match(r"(?:-h, )?(--[\w-]+)", block)[1]: " ".join(block.split()) for block in blocks[1:]}


def refused(parser, words, capsys):
    with pytest.raises(SystemExit) as leaving:
        parser.known(words)
    out, err = capsys.readouterr()
    assert leaving.value.code == 2 and out == "" and err.count("\n") == 1
    return err


@EVERY
@pytest.mark.parametrize("written", [flag, lambda name: f"--{name}"], ids=["dashes", "underscores"])
def test_everything_is_a_flag(recipe, written):
    special = {"device": "cpu", "dtype": "float32", "schedule": "cosine", "shard": "full", "rollout": "vllm"}
    special |= {"importance": "none"}
    special = {name: (value, value) for name, value in special.items()} | {"importance_bound": ("1.5", 1.5)}
    words, expected = [], {}
    for name, wanted, _ in own(recipe):
        text, expected[name] = special.get(name, VALUES[wanted])
        words += [written(name), *(text.split() if text else [])]
    assert given(parser_of(recipe).known(words)) == expected
    config = Config(recipe=recipe).replace(**expected)
    assert all(config.options.get(name, getattr(config, name, None)) == value for name, value in expected.items())


@EVERY
def test_nothing_given_is_nothing_set(recipe):
    assert given(parser_of(recipe).known([])) == {}


@EVERY
def test_every_flag_has_help_and_shows_its_default(recipe):
    shown = helped(parser_of(recipe))
    for name, _, default in own(recipe):
        text = shown[flag(name)]
        assert len(text.split()) > 3, name
        words = " ".join(default) if isinstance(default, tuple) else default
        says = f"(default {words})" if default not in (None, ()) else "default" if default is None else ""
        assert says in text and text.count("default") <= 1, (name, text)
    assert set(shown) == {flag(name) for name, _, _ in own(recipe)} | {"--help"}


def test_what_a_recipe_is_run_with_shows_in_its_help():
    ppo, plain = helped(parser_of("ppo")), Parser(prog="fuserl eval")
    assert "(default 4)" in ppo["--minibatches"] and "(default 0.95)" in ppo["--lam"]
    add_settings(plain)
    assert "(default: chosen for the machine and the task)" in helped(plain)["--minibatches"]
    assert "--no-whiten" in ppo["--whiten"] and "(default True)" in ppo["--whiten"] and "--low" not in helped(plain)


def test_switches_texts_and_line_breaks():
    words = ["--no-chat", "--stop", "\\n", "END_", "--freeze", "--task=reasoning_gym:gcd:max_value=9"]
    expected = {"chat": False, "stop": ("\n", "END_"), "freeze": (), "task": "reasoning_gym:gcd:max_value=9"}
    assert given(parser_of("grpo").known(words)) == expected
    assert given(parser_of("grpo").known(["--eval_data=a_b.jsonl"])) == {"eval_data": "a_b.jsonl"}


@EVERY
def test_names_of_other_trainers_point_to_ours(recipe, capsys):
    parser, known = parser_of(recipe), {name for name, _, _ in own(recipe)} | {"resume"}
    parser.add_argument("--resume")
    for theirs, ours in SYNONYMS.items():
        name = ours.replace("-", "_")
        says = f"It is --{ours} here." if name in known else f"{name} is an option of"
        assert says in refused(parser, [f"--{theirs}", "1"], capsys), theirs


def test_synonyms_lead_somewhere_and_shadow_nothing():
    every = {name for recipe in RECIPES for name, _, _ in own(recipe)}
    assert {ours.replace("-", "_") for ours in SYNONYMS.values()} <= every | {"resume"}
    assert not {theirs.replace("-", "_") for theirs in SYNONYMS} & (every | {"resume", "config", "recipe", "help"})
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", word) for pair in SYNONYMS.items() for word in pair)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--grop_size", "4"], "unknown argument '--grop-size'. Did you mean '--group-size'?"),
        (["--group", "4"], "Did you mean '--groups'?"),
        (["--batch_size=4"], "unknown argument '--batch-size'. It is --groups here."),
        (["--lam", "0.9"], "unknown argument '--lam'. lam is an option of ppo"),
        (["--vf-coef", "0.9"], "unknown argument '--vf-coef'. value_coef is an option of ppo"),
        (["steps", "9"], "unknown argument 'steps'. It is --steps here."),
        (["--groups", "x"], "argument --groups: must be an integer >= 1; got 'x'"),
        (["--lr", "fast"], "argument --lr: must be a number > 0.0; got 'fast'"),
        (["--low", "x"], "argument --low: must be a number; got 'x'"),
        (["--lr"], "argument --lr: expected one argument"),
        (["--chat=yes"], "--chat"),
    ],
)
def test_wrong_arguments_are_one_line_and_name_the_right_one(words, says, capsys):
    assert says in refused(parser_of("grpo"), words, capsys)


def test_an_error_of_several_lines_is_one(capsys):
    with pytest.raises(SystemExit):
        Parser(prog="fuserl").error("one\n  two")
    assert capsys.readouterr().err == "fuserl: one two.\n"


@pytest.mark.parametrize(
    ("words", "recipe"),
    [
        (["sft", "--steps", "3"], "sft"),
        (["--steps", "3", "--recipe", "dpo"], "dpo"),
        (["--recipe=dpo"], "dpo"),
        (["--steps", "3"], None),
        (["--recipe"], None),
        ([], None),
    ],
)
def test_the_recipe_among_the_words(words, recipe):
    assert recipe_of(words) == recipe


def test_a_percent_sign_in_help_is_shown():
    parser = Parser(prog="fuserl train")
    flags._add(parser, "share", float, "5% of it", 0.05, "a number")
    assert "5% of it (default 0.05)" in " ".join(parser.format_help().split())
