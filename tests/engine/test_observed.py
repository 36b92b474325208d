"""What a run says of itself: phases that add up, rates of what was really computed, a mismatch of known size."""

import pytest
import tiny_models
import tiny_runs
import torch

from fuserl.engine import catalogue, learners
from fuserl.engine.batch import batch_of
from fuserl.engine.losses import clipped
from fuserl.engine.policy import Policy, Sampling, Updating
from fuserl.engine.prompts import Prompt

PHASES = ("generate_s", "reward_s", "score_s", "update_s", "other_s")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    tiny_runs.use(monkeypatch)


@pytest.mark.parametrize(("recipe", "options"), [("grpo", {"beta": 0.1}), ("dapo", {}), ("ppo", {}), ("sft", {})])
def test_every_step_says_where_its_time_went(tmp_path, recipe, options):
    rows = tiny_runs.run(tmp_path, "run", recipe=recipe, reward="tiny_runs:shortness", save_every=1, **options)
    steps, drawn = [row for row in rows if "tokens" in row], recipe != "sft"
    assert len(steps) == 3
    for row in steps:
        assert sum(row[name] for name in PHASES) == pytest.approx(row["seconds"], rel=1e-4)
        assert row["update_s"] > 0 and row["update_tokens_per_s"] > 0 and 0 < row["update_share"] < 2
        assert row["update_tflops"] > 0
        assert ("generate_tokens_per_s" in row) == drawn
        if drawn:
            assert row["generate_s"] > 0 and row["reward_s"] > 0 and row["read_tokens_per_s"] > 0
            assert row["generate_gb_per_s"] > 0 and 0 < row["generate_share"] < 2
            assert row["generate_tokens_per_s"] * row["generate_s"] >= row["tokens"] * (1 - 1e-5)
    assert all(row["save_s"] > 0 for row in steps[1:])
    assert all(row["eval_s"] > 0 for row in rows if "accuracy" in row)


def test_the_critics_update_is_a_part_of_the_update(tmp_path):
    config = tiny_runs.config(tmp_path, "run", recipe="ppo", separate_critic=True).resolved()
    policy, critic = learners.of(config, catalogue.recipe(config))
    assert critic is not policy and critic.meter is policy.meter


def drawn(rewards, **settings):
    """A policy, and a batch of 3 groups of 2 that it has drawn, with these rewards as advantages."""
    policy = Policy(tiny_models.model(), tiny_models.Letters(), Sampling(5), Updating(**{"lr": 0.01, **settings}))
    rollouts = policy.generate([Prompt("abc"), Prompt("abcde"), Prompt("k")], group_size=2)
    batch = batch_of(rollouts, torch.tensor(rewards))
    return policy, batch.with_advantages(batch.rewards)


def test_what_was_skipped_is_no_work():
    policy, batch = drawn([1.0, -1.0, 0.0, 0.0, 0.5, 0.0])
    lengths = batch.lengths.tolist()
    policy.meter.clear()
    policy.update(batch, clipped())
    done = policy.meter.work["update"]
    # The group of two zeros is not there, nor the sixth rollout; the last token of each is not read.
    passed = 3 + lengths[0] - 1 + lengths[1] - 1 + 1 + lengths[4] - 1
    assert done.tokens == passed
    position = torch.cat([
        torch.arange(3), 3 + torch.arange(lengths[0] - 1), 3 + torch.arange(lengths[1] - 1), torch.arange(lengths[4]),
    ])  # fmt: skip
    assert done.flops == policy.costs.update(position, lengths[0] + lengths[1] + lengths[4]).flops
    policy.meter.clear()
    policy.update(batch.replace(advantages=torch.zeros_like(batch.advantages)), clipped())
    assert "update" not in policy.meter.work and "update_tflops" not in policy.meter.row(1.0)


def test_scoring_is_no_update_and_micro_batches_read_a_prompt_each():
    policy, batch = drawn([1.0, -1.0, 1.0, -1.0, 1.0, -1.0], epochs=2, micro_tokens=1)
    policy.meter.clear()
    policy.update(batch, clipped())
    prompts = 2 * (3 + 5 + 1)  # a rollout each, so a prompt each
    assert policy.meter.work["update"].tokens == 2 * (prompts + len(batch.tokens) - 6)
    assert policy.meter.seconds["score"] > 0


@pytest.mark.parametrize("settings", [{}, {"micro_tokens": 9}, {"minibatches": 2, "epochs": 2}])
def test_a_mismatch_of_known_size_is_found_however_the_batch_is_cut(settings):
    policy, batch = drawn([1.0, -1.0, 1.0, -1.0, 1.0, -1.0], **settings)
    gaps = torch.linspace(-1, 2, len(batch.tokens), dtype=torch.float64)
    exact = policy.score(batch, ["old_logprobs"]).old_logprobs
    found = policy.update(batch.replace(rollout_logprobs=(exact.double() - gaps).float()), clipped())
    whole = torch.zeros(6, dtype=torch.float64).index_add(0, batch.rollout, gaps)
    for name, logs in (("mismatch_ess", gaps), ("mismatch_rollout_ess", whole)):
        weights = logs.exp()
        expected = float(weights.sum() ** 2 / (len(logs) * weights.square().sum()))
        # Log-probs of float32, from passes cut otherwise, are off by 1e-5 at most; a rollout of 5 tokens has 5 of them,
        # and four weights stand in each term of the share.
        assert found[name] == pytest.approx(expected, rel=1e-3), name
    assert found["mismatch"] == pytest.approx(float(gaps.abs().mean()), rel=1e-4)
    assert found["mismatch_max"] == pytest.approx(2.0, rel=1e-4)


def test_what_nobody_drew_has_no_mismatch(tmp_path):
    rows = [row for row in tiny_runs.run(tmp_path, "run", recipe="sft") if "tokens" in row]
    assert all(row["mismatch"] is row["mismatch_max"] is row["mismatch_rollout_ess"] is None for row in rows)
