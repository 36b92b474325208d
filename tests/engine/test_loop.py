"""The loop end to end on a tiny random model: every recipe runs, learns, and repeats itself under a seed."""

import dataclasses
import json

import pytest
import tiny_models
import tiny_runs
import torch
from tiny_runs import numbers, run

from fuserl.engine import catalogue, loop
from fuserl.engine.rewards import RewardError

SHORT = "tiny_runs:shortness"


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    tiny_runs.use(monkeypatch)


MORE = {
    "c_grpo": {**tiny_runs.ENDING, "group_size": 16},  # it rewards only what ends by itself
    "self_interference": {"reward": "tiny_runs:modest"},  # what the tiny model says greedily is right by SHORT
}


@pytest.mark.parametrize("recipe", catalogue.RECIPES)
def test_every_recipe_runs(tmp_path, recipe):
    rows = run(tmp_path, "run", recipe=recipe, **{"reward": SHORT, **MORE.get(recipe, {})})
    steps = [row for row in rows if "tokens" in row]
    assert all(("reward" in row) != (recipe in ("sft", "dpo", "reward_model", "vpo", "r_to_q")) for row in steps)
    assert [row["step"] for row in steps] == [1, 2, 3] and sum("accuracy" in row for row in rows) == 2
    assert all(row["tokens"] > 0 and row["seconds"] >= row["generate_s"] for row in steps)
    assert all(row["skipped"] == 0 and row["grad_norm"] > 0 for row in steps)
    assert (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("recipe", catalogue.RECIPES)
def test_a_seed_repeats_and_another_differs(tmp_path, recipe):
    first, again, other = (
        numbers(run(tmp_path, name, recipe=recipe, seed=seed, **{"reward": SHORT, **MORE.get(recipe, {})}))
        for name, seed in zip("abc", (0, 0, 2), strict=True)
    )
    assert first == again and first != other


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("grpo", {"beta": 0.1, "entropy_coef": 0.01, "dual": 3.0, "minibatches": 2, "epochs": 2}),
        ("dapo", {"overlong_buffer": 2, "attempts": 1}),
        ("rloo", {"beta": 0.1}),
        ("reinforce_pp", {"beta": 0.1, "group_baseline": True}),
        ("ppo", {"beta": 0.1, "separate_critic": True, "critic_lr": 1e-3}),
        ("ppo", {"whiten": False, "epochs": 2, "minibatches": 2}),
        ("dpo", {"label_smoothing": 0.1, "minibatches": 2}),
        ("reward_model", {"centre": 0.01}),
        ("grpo", {"lora_rank": 2, "beta": 0.1, "lora_targets": ("all-linear", "lm_head")}),
        ("sft", {"checkpoint_activations": True, "schedule": "cosine", "warmup": 1, "freeze": ("*.mlp.*",)}),
    ],
)
def test_options_take_effect(tmp_path, recipe, options):
    plain = numbers(run(tmp_path, "plain", recipe=recipe, reward=SHORT))
    assert numbers(run(tmp_path, "run", recipe=recipe, reward=SHORT, **options)) != plain


def test_grpo_learns_what_is_rewarded(tmp_path):
    rows = run(tmp_path, "run", reward=SHORT, steps=12, groups=4, group_size=8, eval_problems=0)
    rewards = [row["reward"] for row in rows]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.3


def test_sft_learns_the_answers(tmp_path):
    rows = run(tmp_path, "run", recipe="sft", steps=30, groups=4, lr=0.01, eval_problems=0)
    losses = [row["nll"] for row in rows]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("recipe", ["dpo", "reward_model"])
def test_pairs_are_told_apart(tmp_path, recipe):
    rows = [row for row in run(tmp_path, "run", recipe=recipe, steps=30, groups=4, eval_problems=2) if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert rows[-1]["loss"] < 0.3 and rows[-1]["pair_accuracy"] == 1 and rows[-1]["margin"] > 0


def test_the_critic_learns_the_returns(tmp_path):
    for name, separate in (("head", False), ("apart", True)):
        rows = run(
            tmp_path, name, recipe="ppo", reward=SHORT, steps=12, groups=8, eval_problems=0, separate_critic=separate,
            value_coef=1.0, value_clip=10.0, minibatches=1, lr=3e-3,
        )  # fmt: skip
        losses = [row["value_loss"] for row in rows]
        assert losses[-1] < 0.3 * losses[0]


def test_mismatch_of_generation_and_update_is_rounding(tmp_path):
    for changes in ({}, {"epochs": 2, "minibatches": 2, "lr": 0.01}):  # what the update itself changes is no mismatch
        rows = run(tmp_path, f"run{len(changes)}", reward=SHORT, **{"lr": 1e-6, **changes})
        steps = [row for row in rows if row.get("mismatch") is not None]
        assert len(steps) == 3 and 0 < max(row["mismatch_max"] for row in steps) < 1e-4
        assert all(row["mismatch"] <= row["mismatch_max"] for row in steps)
        assert all(1 - 1e-6 < row[f"mismatch_{kind}"] <= 1 for row in steps for kind in ("ess", "rollout_ess"))


def test_rewards_of_one_group_that_agree_take_no_step(tmp_path):
    rows = run(tmp_path, "run", reward="tiny_runs:constant")
    assert all(row["live"] == 0 and row["mixed"] == 0 for row in rows if "reward" in row)


def test_mixed_is_the_share_of_groups_that_differ():
    rewards, group = torch.tensor([0.0, 1, 1, 1, 0, 0]), torch.tensor([0, 0, 1, 1, 2, 2])
    assert loop._mixed(rewards, group) == pytest.approx(1 / 3)


def test_sixteen_bit_products_train_float32_parameters(tmp_path, monkeypatch):
    model = tiny_models.model()
    tiny_runs.use(monkeypatch, lambda: model)
    rows = run(tmp_path, "run", reward=SHORT, dtype="bfloat16")
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    gaps = [row["mismatch"] for row in rows if row.get("mismatch") is not None]
    assert gaps and 1e-5 < max(gaps) < 0.3  # it did round, and only that


def test_evaluation_does_not_disturb_training(tmp_path):
    seldom, often = (
        [
            row
            for row in numbers(run(tmp_path, f"every{every}", reward=SHORT, eval_every=every, eval_samples=every * 2))
            if "reward" in row
        ]
        for every in (0, 1)
    )
    assert seldom == often


def test_a_model_that_gives_nan_stops_with_the_reason_and_keeps_its_weights(tmp_path, monkeypatch):
    model = tiny_models.model()
    tiny_runs.use(monkeypatch, lambda: model)

    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = tiny_runs.config(tmp_path, "run", recipe="sft", steps=9, max_skipped=2)
    real = catalogue.recipe

    def poisoned(config):
        return dataclasses.replace(real(config), advantage=lambda batch: torch.full_like(batch.rewards, torch.nan))

    monkeypatch.setattr(catalogue, "recipe", poisoned)
    with pytest.raises(RuntimeError, match="gradients must be finite; those of the last 3 steps were not"):
        loop.train(config)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [row["skipped"] for row in tiny_runs.rows(tmp_path / "run") if "tokens" in row] == [1, 1, 1]


def raising(completion):
    """Fails on every fourth call, the second of a run: two before it are on trial."""
    raising.calls = getattr(raising, "calls", 0) + 1
    if raising.calls % 4 == 0:
        raise KeyError("units")
    return 1.0


@pytest.mark.parametrize("recipe", ["grpo", "dapo"])
def test_a_failing_reward_stops_the_run_and_keeps_what_was_generated(tmp_path, recipe):
    raising.calls = 0
    with pytest.raises(RewardError, match=r"KeyError.*rollout 1"):
        run(tmp_path, "run", recipe=recipe, reward="test_loop:raising", eval_problems=0)
    kept = [json.loads(line) for line in (tmp_path / "run" / "failed-step-1.jsonl").read_text().splitlines()]
    assert len(kept) == 8 and kept[0]["reward"] == 1.0 and kept[1]["reward"] is None


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'grpo'"):
        catalogue.options("grop")


def test_a_prompt_longer_than_the_context_is_refused_before_training(tmp_path, monkeypatch):
    tiny_runs.use(monkeypatch, lambda: tiny_models.model(max_position_embeddings=6))
    with pytest.raises(ValueError, match="must fit the 6 tokens"):
        run(tmp_path, "run", reward=SHORT)
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_needs_pairs_says_so(tmp_path, monkeypatch):
    (tmp_path / "plain.jsonl").write_text("".join(f'{{"prompt": "{n}+1=", "answer": "{n + 1}"}}\n' for n in range(8)))
    config = tiny_runs.config(tmp_path, "run", recipe="dpo").replace(data=str(tmp_path / "plain.jsonl"))
    with pytest.raises(ValueError, match='"chosen"'):
        loop.train(config)


def test_pairs_are_never_cut_apart(tmp_path):
    rows = run(tmp_path, "run", recipe="dpo", steps=1, minibatches=9, lr=1e-6)
    assert [row["loss"] for row in rows if "loss" in row] == [pytest.approx(0.693147, abs=1e-4)]
