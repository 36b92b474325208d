"""The catalogue: every recipe declares options that a user can set, and settings that it is run with."""

import inspect
import json
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from fuserl.engine import catalogue
from fuserl.engine.catalogue import RECIPES, Option, options
from fuserl.engine.config import WORDS, Config, settings
from fuserl.engine.recipe import Recipe

EVERY = pytest.mark.parametrize("name", RECIPES)


@EVERY
def test_options_are_typed_described_and_named_like_nothing_else(name):
    signature = inspect.signature(catalogue._module(name).recipe)
    keywords = [each for each in signature.parameters.values() if each.kind is each.KEYWORD_ONLY]
    found = options(name)
    assert list(found) == [each.name for each in keywords] and next(iter(signature.parameters)) == "config"
    taken = {setting.name for setting in settings()} | {"options", "reasons", "config", "resume"}
    for option in found.values():
        assert option.name not in taken and option.type in WORDS and option.type is not tuple
        assert option.default is not inspect.Parameter.empty
        assert type(option.default) is option.type or (option.default is None and option.optional)
        assert len(option.doc) > 8 and not option.doc.endswith(".") and "\n" not in option.doc


@EVERY
def test_what_is_read_from_the_source_is_what_python_makes_of_it(name):
    module = catalogue._module(name)
    hints, parameters = typing.get_type_hints(module.recipe), inspect.signature(module.recipe).parameters
    for option in options(name).values():
        assert hints[option.name] == (option.type | None if option.optional else option.type)
        assert parameters[option.name].default == option.default
        assert type(parameters[option.name].default) is type(option.default)
    fixed = getattr(module, "FIXED", {})
    assert catalogue.fixed(name) == fixed and catalogue.defaults(name) == {**getattr(module, "DEFAULTS", {}), **fixed}


def test_a_command_line_is_parsed_before_anything_heavy_is_imported():
    code = (
        "import sys; from fuserl.engine import flags; parser = flags.Parser(prog='fuserl train')\n"
        "flags.add_options(parser, 'ppo'); flags.add_settings(parser, 'ppo'); parser.format_help()\n"
        "print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@EVERY
def test_a_recipe_says_what_it_is_run_with_only_where_a_setting_is_automatic(name):
    automatic = {setting.name for setting in settings() if setting.default is None}
    usual = catalogue.defaults(name)
    assert usual.keys() <= automatic
    assert Config(recipe=name, **usual).to_dict().items() >= usual.items()  # of the right type and range


@EVERY
def test_a_recipe_is_built_from_its_defaults(name, tmp_path):
    path = tmp_path / "problems.jsonl"
    rows = [{"prompt": f"{n}+1=", "answer": str(n + 1), "chosen": str(n + 1), "rejected": "x"} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config(recipe=name, data=str(path), reward="exact", reward_workers=0, device="cpu", eval_problems=2)
    recipe = catalogue.recipe(config.resolved())
    assert isinstance(recipe, Recipe) and recipe.name == name
    assert len(recipe.prompts(1)) in (config.resolved().groups, 3 * config.resolved().groups)
    fields = {"old_logprobs", "ref_logprobs", "values", "features"}
    read = {*recipe.reads, *recipe.loss.reads}
    assert all(field in fields or field.startswith(("old_", "ref_", "teacher_")) for field in read)
    assert {*recipe.learns_from} <= {"answer", "chosen", "rejected"} and recipe.loss.scope in (
        "token",
        "rollout",
        "group",
    )


def test_the_catalogue_is_what_the_folder_has():
    folder = Path(inspect.getfile(catalogue)).parent / "recipes"
    assert {path.stem for path in folder.glob("*.py")} == set(RECIPES)
    papers = [re.findall(r"arXiv:\d{4}\.\d{5}", phrase) for phrase in RECIPES.values()]
    for name, cited in zip(RECIPES, papers, strict=True):
        assert cited or name == "sft"
        assert all(paper in catalogue._module(name).__doc__ for paper in cited)


def test_an_option_is_read_from_signature_and_docstring():
    found = options("ppo")
    assert found["critic_lr"] == Option(
        "critic_lr", float, True, None, "learning rate of the separate critic; default the policy's"
    )
    assert found["whiten"].type is bool and found["whiten"].default is True and not found["whiten"].optional
    assert options("dapo")["attempts"].type is int and options("sft") == {}


def test_a_description_goes_on_over_lines():
    doc = """What.

    Args:
        one: begins here
            and ends there.
        two: 3 of them.

    Returns:
        three: no option.
    """
    assert catalogue._described(inspect.cleandoc(doc)) == {"one": "begins here and ends there", "two": "3 of them"}
    assert catalogue._described("What.") == {}


def test_options_take_effect_by_name(tmp_path):
    config = Config(recipe="ppo", device="cpu", options={"separate_critic": True, "critic_lr": 3e-4}).resolved()
    recipe = catalogue.recipe(config)
    assert recipe.critic.lr == 3e-4 and recipe.loss.outputs == ("logprob",) and recipe.critic.loss.outputs == ("value",)


@pytest.mark.parametrize("call", [catalogue.options, catalogue.defaults, catalogue.show, catalogue.known])
def test_an_unknown_recipe_is_answered_with_the_nearest(call):
    with pytest.raises(ValueError, match=r"must be a known recipe; got 'grop'\. Did you mean 'grpo'\?"):
        call("grop")


def test_owners_of_an_option():
    assert catalogue.owners("critic_lr") == "critic_lr is an option of ppo, ma_rlhf." and catalogue.owners("gama") == ""
    assert all(name in catalogue.owners("beta") for name in ("grpo", "rloo", "dpo")) and catalogue.known("sft") == "sft"


@pytest.mark.parametrize(
    ("recipe", "changes", "says"),
    [
        ("grpo", {"low": -1.0}, "low must be a number >= 0"),
        ("grpo", {"dual": 0.5}, "dual must be above 1"),
        ("grpo", {"beta": float("inf")}, "beta must be a finite number >= 0"),
        ("dapo", {"attempts": 0}, "attempts must be an integer >= 1; got 0"),
        ("dapo", {"overlong_buffer": 7}, "overlong_buffer must be an integer in [0, 6]; got 7"),
        ("dapo", {"overlong_buffer": -1}, "overlong_buffer must be an integer in [0, 6]; got -1"),
        ("dapo", {"overlong_penalty": float("inf")}, "overlong_penalty must be a finite number >= 0"),
        ("ppo", {"gamma": 1.5}, "gamma must be in [0, 1]"),
        ("ppo", {"value_clip": 0.0}, "clip must be a number > 0"),
        ("ppo", {"value_coef": -1.0}, "coefficient must be a finite number >= 0"),
        ("ppo", {"separate_critic": True, "critic_lr": 0.0}, "critic_lr must be a finite number > 0"),
        ("rloo", {"beta": -0.1}, "beta must be a finite number >= 0"),
        ("reinforce_pp", {"beta": -0.1}, "beta must be a finite number >= 0"),
        ("dpo", {"beta": 0.0}, "beta must be a finite number > 0"),
        ("dpo", {"label_smoothing": 0.7}, "label_smoothing must be in [0, 0.5]"),
        ("reward_model", {"centre": -1.0}, "centre must be a finite number >= 0"),
    ],
)
def test_numbers_that_make_no_recipe_are_refused_in_one_line(recipe, changes, says):
    with pytest.raises(ValueError) as caught:
        catalogue.recipe(Config(recipe=recipe, device="cpu").replace(**changes).resolved())
    assert says in str(caught.value) and "\n" not in str(caught.value)
