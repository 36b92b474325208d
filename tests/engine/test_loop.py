"""The loop end to end on a tiny random model: every recipe runs, learns, and repeats itself under a seed."""

import json
import types

import pytest
import tiny_models
import torch

from fuserl.engine import catalogue, loop, models
from fuserl.engine.config import Config

LETTERS = "0123456789+-= \n"
MACHINE = {"seconds", "generate_s", "update_s", "elapsed", "host_gb", "gpu_gb"}


class Characters:
    """A tokenizer of arithmetic, one token per character; token 2 ends a text."""

    eos_token_id = 2

    def __call__(self, text, add_special_tokens=True):
        return types.SimpleNamespace(input_ids=[LETTERS.index(letter) + 3 for letter in text])

    def decode(self, tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False):
        return "".join(LETTERS[t - 3] for t in tokens if 3 <= t < 3 + len(LETTERS))


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(models, "load", lambda *_: (tiny_models.model(), Characters()))


def run(tmp_path, name, **changes):
    """The metrics of a run of a few steps on three-problem data."""
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n}+1=", "answer": str(n + 1)}) + "\n" for n in range(8)))
    settings = {"steps": 3, "groups": 2, "group_size": 4, "max_new_tokens": 4, "eval_problems": 4, "lr": 0.01}
    config = Config(data=str(data), out=str(tmp_path / name), few_shot=0, threads=1, **{**settings, **changes})
    folder = loop.train(config)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("recipe", catalogue.RECIPES)
def test_every_recipe_runs(tmp_path, recipe):
    rows = run(tmp_path, "run", recipe=recipe)
    steps = [row for row in rows if "reward" in row]
    assert [row["step"] for row in steps] == [1, 2, 3] and sum("accuracy" in row for row in rows) == 2
    assert all(row["tokens"] > 0 and row["seconds"] >= row["generate_s"] for row in steps)
    assert (tmp_path / "run" / "config.json").exists()


def test_a_seed_repeats_and_another_differs(tmp_path):
    def numbers(name, seed):
        rows = run(tmp_path, name, reward="test_loop:shortness", seed=seed)
        return [{k: v for k, v in row.items() if k not in MACHINE} for row in rows]

    first = numbers("a", 0)
    assert first == numbers("b", 0) and first != numbers("c", 1)


def shortness(completion):
    """Reward for few characters: something that a random model gets different amounts of."""
    return 1.0 - len(completion) / 4


def test_grpo_learns_what_is_rewarded(tmp_path):
    rows = run(tmp_path, "run", reward="test_loop:shortness", steps=12, groups=4, group_size=8, eval_problems=0)
    rewards = [row["reward"] for row in rows]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.3


def test_sft_learns_the_answers(tmp_path):
    rows = run(tmp_path, "run", recipe="sft", steps=30, groups=4, lr=0.01, eval_problems=0)
    losses = [row["nll"] for row in rows]
    assert losses[-1] < 0.5 * losses[0]


def test_drift_between_generation_and_update_is_rounding(tmp_path):
    rows = run(tmp_path, "run", reward="test_loop:shortness", lr=1e-6)
    drifts = [row["drift"] for row in rows if row.get("drift") is not None]
    assert drifts and max(drifts) < 1e-4


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'grpo'"):
        catalogue.recipe(types.SimpleNamespace(recipe="gpro"))


def test_rewards_of_one_group_that_agree_take_no_step(tmp_path):
    rows = run(tmp_path, "run", reward="test_loop:constant")
    assert all(row["live"] == 0 and row["mixed"] == 0 for row in rows if "reward" in row)


def constant(completion):
    """The same for all: a group-relative method learns nothing from it."""
    return 0.5


def test_mixed_is_the_share_of_groups_that_differ():
    rewards, group = torch.tensor([0.0, 1, 1, 1, 0, 0]), torch.tensor([0, 0, 1, 1, 2, 2])
    assert loop._mixed(rewards, group) == pytest.approx(1 / 3)


def test_sixteen_bit_products_train_float32_parameters(tmp_path, monkeypatch):
    model = tiny_models.model()
    monkeypatch.setattr(models, "load", lambda *_: (model, Characters()))
    rows = run(tmp_path, "run", reward="test_loop:shortness", dtype="bfloat16")
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    drifts = [row["drift"] for row in rows if row.get("drift") is not None]
    assert drifts and 1e-5 < max(drifts) < 0.3  # it did round, and only that
