"""Config: vetted defaults, automatic choices with a reason, and values that are refused in one sentence."""

import dataclasses
import json

import pytest
import torch

from fuserl.engine.config import Config, kind, settings

CPU = {"device": "cpu", "dtype": "float32", "groups": 16, "group_size": 8, "micro_tokens": 4096, "few_shot": 4}
GPU = {"device": "cuda", "dtype": "bfloat16", "groups": 64, "group_size": 16, "micro_tokens": 32768, "few_shot": 4}


def on(monkeypatch, gpus):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")


@pytest.mark.parametrize(("gpus", "chosen"), [(0, CPU), (1, GPU)])
def test_automatic_settings_fit_the_machine_and_say_why(gpus, chosen, monkeypatch):
    on(monkeypatch, gpus)
    config = Config().resolved()
    assert {name: getattr(config, name) for name in chosen} == chosen
    assert config.stop == ("\n",) and config.threads == torch.get_num_threads()
    assert set(config.reasons) == {*chosen, "stop", "threads"} and all(config.reasons.values())


def test_resolving_keeps_what_was_given_and_resolving_twice_is_as_once():
    config = Config(groups=3, stop=(), device="cpu").resolved()
    assert config.groups == 3 and config.stop == () and not {"groups", "stop", "device"} & set(config.reasons)
    assert config.resolved() == config and config.resolved().reasons == config.reasons


@pytest.mark.parametrize(("changes", "few_shot"), [({}, 4), ({"data": "x.jsonl"}, 0), ({"chat": True}, 0)])
def test_examples_are_for_completions_of_tasks(changes, few_shot):
    assert Config(**changes).resolved().few_shot == few_shot


def test_a_chat_is_ended_by_the_model():
    assert Config(chat=True).resolved().stop == ()


def test_defaults_of_the_algorithm_are_the_vetted_ones():
    expected = {
        "recipe": "grpo", "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "epochs": 1, "minibatches": 1,
        "low": 0.2, "high": 0.2, "beta": 0.0, "entropy_coef": 0.0, "max_grad_norm": 1.0, "weight_decay": 0.0,
        "eval_problems": 200, "seed": 0,
    }  # fmt: skip
    assert {name: getattr(Config(), name) for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("groups", 0, "groups must be an integer >= 1; got 0"),
        ("groups", 2.0, "groups must be an integer >= 1; got 2.0"),
        ("steps", True, "steps must be an integer >= 1; got True"),
        ("steps", None, "steps must be an integer >= 1; got None"),
        ("lr", 0.0, "lr must be a number > 0.0; got 0.0"),
        ("lr", True, "lr must be a number > 0.0; got True"),
        ("lr", float("nan"), "lr must be a number > 0.0; got nan"),
        ("high", float("inf"), "high must be a number >= 0.0; got inf"),
        ("top_p", 1.5, "top_p must be a number > 0.0 and <= 1.0; got 1.5"),
        ("seed", 2**31, "seed must be an integer >= 0 and <= 2147483647"),
        ("dtype", "float8", "dtype must be one of float32, bfloat16, float16; got 'float8'"),
        ("device", "gpu", "device must be cpu, cuda or cuda:N; got 'gpu'"),
        ("device", "cuda:x", "device must be cpu, cuda or cuda:N"),
        ("chat", 1, "chat must be true or false; got 1"),
        ("model", "", "model must be a text; got ''"),
        ("stop", ("a", 1), "stop must be texts"),
        ("stop", "a", "stop must be texts; got 'a'"),
    ],
)
def test_bad_values_are_one_sentence(name, value, says):
    with pytest.raises(ValueError) as caught:
        Config(**{name: value})
    assert str(caught.value).startswith(f"config: {says}") and "\n" not in str(caught.value)


def test_an_integer_is_a_number():
    assert Config(temperature=1).temperature == 1.0 and type(Config(temperature=1).temperature) is float


def test_a_device_that_torch_does_not_see_is_refused(monkeypatch):
    on(monkeypatch, 1)
    with pytest.raises(RuntimeError, match=r"must see cuda:1; it sees 1 CUDA devices"):
        Config(device="cuda:1").resolved()
    on(monkeypatch, 0)
    with pytest.raises(RuntimeError, match="it sees 0"):
        Config(device="cuda").resolved()


@pytest.mark.parametrize("make", [lambda: Config().replace(grups=3), lambda: Config.from_dict({"grups": 3})])
def test_an_unknown_name_is_answered_with_the_nearest(make):
    with pytest.raises(ValueError, match=r"got 'grups'. Did you mean 'groups'\?"):
        make()


def test_json_there_and_back(tmp_path):
    config = Config(stop=("\n", "x"), lr=3e-6, model="m").resolved()
    path = tmp_path / "config.json"
    for written in (config.to_dict(), {"config": config.to_dict(), "versions": {}}):
        path.write_text(json.dumps(written))
        assert Config.read(path) == config
    assert Config.from_dict({"lr": 1e-3}).lr == 1e-3


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
def test_a_file_that_is_not_settings_is_refused(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"must hold|must be a JSON"):
        Config.read(path)
    with pytest.raises(ValueError, match="No such file"):
        Config.read(tmp_path / "absent.json")


def test_every_field_is_a_documented_setting_but_the_reasons():
    names = {each.name for each in dataclasses.fields(Config)}
    assert names - {setting.name for setting in settings()} == {"reasons"}
    assert all(setting.metadata["doc"] and setting.metadata["section"] for setting in settings())
    assert kind("lr") == (float, False) and kind("stop") == (tuple, True) and kind("model") == (str, True)
