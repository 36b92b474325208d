"""Config: vetted defaults, automatic choices with a reason, a recipe's options, and values refused in one sentence."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from fuserl.engine import catalogue
from fuserl.engine.config import Config, contract, kind, settings
from fuserl.engine.metrics import Run

CPU = {"device": "cpu", "dtype": "float32", "groups": 16, "group_size": 8, "micro_tokens": 1024, "few_shot": 4}
GPU = {"device": "cuda", "dtype": "bfloat16", "groups": 64, "group_size": 16, "micro_tokens": 32768, "few_shot": 4}
AUTOMATIC = {*CPU, "lr", "epochs", "minibatches", "importance", "threads", "reward_workers", "stop"}
AUTOMATIC |= {"task", "max_new_tokens"}


def on(monkeypatch, gpus):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")


@pytest.fixture
def cpu(monkeypatch):
    on(monkeypatch, 0)


@pytest.mark.parametrize(("gpus", "chosen"), [(0, CPU), (1, GPU)])
def test_automatic_settings_fit_the_machine_and_say_why(gpus, chosen, monkeypatch):
    on(monkeypatch, gpus)
    config = Config().resolved()
    assert {name: getattr(config, name) for name in chosen} == chosen
    assert config.stop == ("\n",) and config.threads == torch.get_num_threads() and config.reward_workers >= 1
    assert (config.lr, config.epochs, config.minibatches) == (1e-5, 1, 1)
    assert set(config.reasons) == AUTOMATIC and all(config.reasons.values())


def test_resolving_keeps_what_was_given_and_resolving_twice_is_as_once(cpu):
    config = Config(groups=3, stop=(), device="cpu", options={"beta": 0.5}).resolved()
    assert config.groups == 3 and config.stop == () and not {"groups", "stop", "device"} & set(config.reasons)
    assert config.options == {"low": 0.2, "high": 0.2, "dual": None, "beta": 0.5, "entropy_coef": 0.0}
    assert config.resolved() == config and config.resolved().reasons == config.reasons


@pytest.mark.parametrize("recipe", catalogue.RECIPES)
def test_every_recipe_resolves_once_and_for_all(recipe, cpu):
    config = Config(recipe=recipe).resolved()
    named = {setting.name for setting in settings() if getattr(config, setting.name) is None}
    assert named <= {
        "model",
        "data",
        "reward",
        "system",
        "eval_data",
        "eval_problems",
        "reference",
        "teacher",
        "chunk",
        "profile",
        "kv_gb",
        "out",
        "judge",
        "judge_model",
        "judge_cache",
        "reward_model",
        "reward_model_name",
        "embedder",
        "embedder_model",
    }  # fmt: skip  nothing else stays open
    assert config.options == {name: option.default for name, option in catalogue.options(recipe).items()}
    assert config.resolved() == config and config.resolved().reasons == config.reasons
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_what_a_recipe_is_run_with_fills_only_what_was_not_given(cpu):
    config = Config(recipe="ppo").resolved()
    assert config.minibatches == 4 and config.reasons["minibatches"] == "as ppo is run"
    assert Config(recipe="ppo", minibatches=1).resolved().minibatches == 1
    assert Config(recipe="dpo").resolved().group_size == 2 and Config(recipe="grpo").resolved().minibatches == 1


def test_a_recipe_may_have_a_task_of_its_own_for_those_who_bring_no_data(tmp_path, cpu, monkeypatch):
    data = tmp_path / "x.jsonl"
    data.write_text('{"prompt": "1+1=", "answer": "2"}\n' * 2)
    monkeypatch.setattr(catalogue, "defaults", lambda name: {"task": "reasoning_gym:gcd", "max_new_tokens": 9})
    config = Config().resolved()
    assert (config.task, config.max_new_tokens) == ("reasoning_gym:gcd", 9) and "as grpo" in config.reasons["task"]
    assert Config(task="reasoning_gym:lcm").resolved().task == "reasoning_gym:lcm"
    config = Config(data=str(data)).resolved()
    assert config.task is None and "task" not in config.reasons and config.max_new_tokens == 9


def test_examples_are_for_completions_of_tasks(tmp_path, cpu):
    data = tmp_path / "x.jsonl"
    data.write_text('{"prompt": "1+1=", "answer": "2"}\n' * 2)
    for changes, few_shot in (({}, 4), ({"data": str(data), "eval_problems": 0}, 0), ({"chat": True}, 0)):
        assert Config(**changes).resolved().few_shot == few_shot


def test_a_chat_is_ended_by_the_model(cpu):
    assert Config(chat=True).resolved().stop == ()


def test_defaults_of_the_algorithm_are_the_vetted_ones(cpu):
    expected = {
        "recipe": "grpo", "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "epochs": 1, "minibatches": 1,
        "low": 0.2, "high": 0.2, "beta": 0.0, "entropy_coef": 0.0, "max_grad_norm": 1.0, "weight_decay": 0.0,
        "seed": 0, "schedule": "constant", "warmup": 0, "lora_rank": 0,
    }  # fmt: skip
    assert Config().resolved().to_dict().items() >= expected.items()


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("groups", 0, "groups must be an integer >= 1; got 0"),
        ("groups", 2.0, "groups must be an integer >= 1; got 2.0"),
        ("steps", True, "steps must be an integer >= 1; got True"),
        ("steps", None, "steps must be an integer >= 1; got None"),
        ("steps", "3", "steps must be an integer >= 1; got '3'"),
        ("lr", 0.0, "lr must be a number > 0.0; got 0.0"),
        ("lr", True, "lr must be a number > 0.0; got True"),
        ("lr", float("nan"), "lr must be a number > 0.0; got nan"),
        ("max_grad_norm", float("inf"), "max_grad_norm must be a number > 0.0; got inf"),
        ("lora_dropout", -0.1, "lora_dropout must be a number >= 0.0 and <= 1.0; got -0.1"),
        ("top_p", 1.5, "top_p must be a number > 0.0 and <= 1.0; got 1.5"),
        ("seed", 2**31, "seed must be an integer below 2^31"),
        ("dtype", "float8", "dtype must be one of float32, bfloat16; got 'float8'"),
        ("schedule", "step", "schedule must be one of constant, linear, cosine; got 'step'"),
        ("device", "gpu", "device must be cpu, cuda or cuda:N; got 'gpu'"),
        ("device", "cuda:x", "device must be cpu, cuda or cuda:N"),
        ("device", "cuda:", "device must be cpu, cuda or cuda:N"),
        ("chat", 1, "chat must be true or false; got 1"),
        ("model", "", "model must be a text; got ''"),
        ("stop", ("a", 1), "stop must be texts; got ('a', 1)"),
        ("stop", ("a", ""), "stop must be texts; got ('a', '')"),
        ("stop", "a", "stop must be texts; got 'a'"),
        ("recipe", 3, "recipe must be a text; got 3"),
    ],
)
def test_bad_values_are_one_sentence(name, value, says):
    for make in (lambda: Config(**{name: value}), lambda: Config.from_dict({name: value, "beta": 0.1})):
        with pytest.raises(ValueError) as caught:
            make()
        assert str(caught.value).startswith(f"config: {says}") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "name", "value", "says"),
    [
        ("grpo", "beta", "x", "beta must be a number; got 'x'"),
        ("grpo", "beta", True, "beta must be a number; got True"),
        ("grpo", "beta", None, "beta must be a number; got None"),
        ("grpo", "dual", float("nan"), "dual must be a number; got nan"),
        ("dapo", "attempts", 1.5, "attempts must be an integer; got 1.5"),
        ("ppo", "whiten", 0, "whiten must be true or false; got 0"),
    ],
)
def test_bad_options_are_one_sentence(recipe, name, value, says):
    for make in (
        lambda: Config(recipe=recipe, options={name: value}),
        lambda: Config(recipe=recipe).replace(**{name: value}),
        lambda: Config.from_dict({name: value, "recipe": recipe}),
    ):
        with pytest.raises(ValueError) as caught:
            make()
        assert str(caught.value) == f"config: {says}."


def test_an_integer_is_a_number_and_a_list_of_texts_is_texts():
    config = Config(temperature=1, stop=["a"], options={"beta": 1, "dual": None})
    assert type(config.temperature) is float and type(config.options["beta"]) is float and config.stop == ("a",)
    assert config == Config(temperature=1.0, stop=("a",)).replace(beta=np.float64(1), dual=None)


def test_options_are_given_beside_settings(cpu):
    config = Config.from_dict({"recipe": "rloo", "groups": 3, "low": 0.1, "beta": 1})
    assert config.options == {"low": 0.1, "beta": 1.0} and config.groups == 3
    changed = config.replace(beta=0.5, high=0.3, groups=4)
    assert changed.options == {"low": 0.1, "beta": 0.5, "high": 0.3} and changed.groups == 4
    assert config.options == {"low": 0.1, "beta": 1.0}  # as it was
    assert Config.from_dict(changed.to_dict()) == changed
    assert config.replace(recipe="dr_grpo").options == config.options  # which has these, too
    given = {"beta": 0.1}
    made = Config(options=given)
    given["beta"] = 7.0
    assert made.options == {"beta": 0.1}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Config.from_dict({"recipe": "rloo", "beta": 1}).replace(recipe="dapo"),
        lambda: Config(recipe="dapo").replace(beta=1),
        lambda: Config(recipe="dapo", options={"beta": 1}),
    ],
)
def test_an_option_of_other_recipes_only_is_refused_with_their_names(make):
    with pytest.raises(
        ValueError, match=r"an option of dapo; got 'beta'\. beta is an option of grpo, .*rloo.*dpo.*\.$"
    ):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Config().replace(grups=3),
        lambda: Config.from_dict({"grups": 3}),
        lambda: Config(options={"grups": 3}),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(make):
    with pytest.raises(ValueError, match=r"got 'grups'. Did you mean 'groups'\?"):
        make()
    with pytest.raises(ValueError, match=r"got 'entropy_coeff'. Did you mean 'entropy_coef'\?"):
        Config().replace(entropy_coeff=0.1)


@pytest.mark.parametrize(
    "make", [lambda: Config(recipe="grop"), lambda: Config.from_dict({"recipe": "grop", "beta": 1})]
)
def test_an_unknown_recipe_is_answered_with_the_nearest(make):
    with pytest.raises(ValueError, match=r"got 'grop'. Did you mean 'grpo'\?"):
        make()


def test_a_device_that_torch_does_not_see_is_refused(monkeypatch):
    on(monkeypatch, 1)
    with pytest.raises(RuntimeError, match=r"must see cuda:1; it sees 1 CUDA devices"):
        Config(device="cuda:1").resolved()
    assert Config(device="cuda:0").resolved().dtype == "bfloat16"
    on(monkeypatch, 0)
    with pytest.raises(RuntimeError, match="it sees 0"):
        Config(device="cuda").resolved()


def test_json_there_and_back(tmp_path, cpu):
    config = Config(stop=("\n", "x"), lr=3e-6, model="m", options={"high": float("inf"), "dual": 3.0}).resolved()
    path = tmp_path / "config.json"
    for written in (config.to_dict(), {"config": config.to_dict(), "versions": {}}):
        path.write_text(json.dumps(written))
        assert Config.read(path) == config
    assert Config.from_dict({"lr": 1e-3}).lr == 1e-3


@pytest.mark.parametrize("recipe", ["grpo", "ppo", "sft"])
def test_what_a_run_writes_reads_back(recipe, tmp_path, cpu):
    config = Config(recipe=recipe, out=str(tmp_path / "run"), freeze=("a.*",)).resolved()
    config = config.replace(**{name: float("inf") for name in config.options if name == "high"})
    with Run(config):
        pass
    assert Config.read(tmp_path / "run" / "config.json") == config


def test_toml(tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text(
        'recipe = "grpo"\nsteps = 3\nlr = 1e-6\ntemperature = 1\nstop = ["\\n", "END"]\nchat = true\nbeta = 1\n'
    )
    expected = Config(steps=3, lr=1e-6, stop=("\n", "END"), chat=True, options={"beta": 1.0})
    assert Config.read(path) == Config.read(str(path)) == expected


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.json", "{", "must be a TOML or JSON file that can be read"),
        ("a.json", "[1]", "must hold settings by name; got list"),
        ("a.json", "3", "must hold settings by name; got int"),
        ("a.toml", "steps = ", "must be a TOML or JSON file that can be read"),
        ("a.toml", "[options]\nbeta = 1", "got 'options'"),
        ("a.toml", "steps = 2024-01-01", "steps must be an integer"),
        ("a.json", '{"lr": NaN}', "lr must be a number > 0.0; got nan"),
        ("a.json", '{"lr": Infinity}', "lr must be a number > 0.0; got inf"),
        ("a.json", '{"stop": {"a": 1}}', "stop must be texts"),
        ("absent.json", None, "No such file"),
    ],
)
def test_a_file_that_is_not_settings_is_refused(name, text, says, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as caught:
        Config.read(tmp_path / name)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="must be a TOML or JSON file"):
        Config.read(tmp_path / "a.toml")


def test_every_field_is_a_documented_setting_but_what_goes_with_them():
    names = {each.name for each in dataclasses.fields(Config)}
    assert names - {setting.name for setting in settings()} == {"options", "reasons"}
    assert all(setting.metadata["doc"] and setting.metadata["section"] for setting in settings())
    assert kind("lr") == (float, True) and kind("stop") == (tuple, True) and kind("model") == (str, True)
    assert kind("freeze") == (tuple, False) and kind("chat") == (bool, False)


@pytest.mark.parametrize("setting", settings(), ids=lambda setting: setting.name)
def test_a_default_keeps_its_own_contract_and_another_type_does_not(setting):
    assert getattr(Config(), setting.name) == setting.default
    for wrong in ({}, object(), np.float32(1)):
        with pytest.raises(ValueError, match=f"config: {setting.name} must be") as caught:
            Config(**{setting.name: wrong})
        assert contract(setting) in str(caught.value)


def test_what_a_recipe_leaves_no_choice_about_is_not_dropped(cpu):
    assert Config(recipe="dpo").resolved().group_size == Config(recipe="dpo", group_size=2).resolved().group_size == 2
    with pytest.raises(ValueError, match="group_size must be 2 for dpo; got 8"):
        Config(recipe="dpo", group_size=8).resolved()
