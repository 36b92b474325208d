"""ace: GRPO or DAPO whose wrong rollouts weigh more, the more the policy has grown confident of them."""

import pytest
import tiny_runs
import torch
from batches import gradient, ragged, recipe

from fuserl.engine.toys import ace as toy

SHORT = "tiny_runs:shortness"


def mixed_batch():
    """Two groups that are mixed and one whose rewards agree, with old and reference log-probs."""
    return ragged((3, 1, 5, 2, 2, 3), (0, 0, 1, 1, 2, 2)).replace(rewards=torch.tensor([1.0, 0, 0, 1, 0, 0]))


@pytest.mark.parametrize("base", ["grpo", "dapo"])
def test_with_alpha_0_it_is_its_base(base, tmp_path):
    batch, ours, theirs = mixed_batch(), recipe(tmp_path, "ace", alpha=0.0, base=base), recipe(tmp_path, base)
    logprob = batch.old_logprobs + torch.linspace(-0.5, 0.5, 16)
    assert torch.equal(gradient(ours, batch, logprob), gradient(theirs, batch, logprob))
    assert ours.reads == ("old_logprobs", "ref_logprobs")
    assert [prompt.text for prompt in ours.prompts(1)] == [prompt.text for prompt in theirs.prompts(1)]


def test_only_wrong_rollouts_weigh_more(tmp_path):
    batch = mixed_batch()
    plain, found = (recipe(tmp_path, "ace", alpha=alpha).advantage(batch) for alpha in (0.0, 0.7))
    shift = batch.rollout_sum(batch.old_logprobs - batch.ref_logprobs)
    factor = torch.where(batch.rewards == 0, 1 + 0.7 * shift.exp().log1p(), 1.0)
    torch.testing.assert_close(found, plain * factor)
    assert torch.equal(found[batch.rewards == 1], plain[batch.rewards == 1]) and (found[[1, 2]] < plain[[1, 2]]).all()


def test_options_reach_the_advantage(tmp_path):
    batch = mixed_batch()
    plain = recipe(tmp_path, "ace").advantage(batch)
    for options in ({"alpha": 2.0}, {"penalty": "relu"}, {"per_token": True}, {"cap": 0.1}):
        assert not torch.allclose(recipe(tmp_path, "ace", **options).advantage(batch), plain)
    dapo = recipe(tmp_path, "ace", base="dapo", groups=2, attempts=5)
    assert len(dapo.prompts(1)) == 10 and len(recipe(tmp_path, "ace", groups=2, attempts=5).prompts(1)) == 2
    with pytest.raises(ValueError, match="ace: base must be one of grpo, dapo; got 'dago'"):
        recipe(tmp_path, "ace", base="dago")
    with pytest.raises(ValueError, match="ace: attempts must be an integer >= 1; got 0"):
        recipe(tmp_path, "ace", attempts=0)


def test_the_overconfident_arm_is_unlearnt_faster(tmp_path):
    ace, grpo = recipe(tmp_path, "ace"), recipe(tmp_path, "grpo")
    (left, right), (plain, less) = (toy.unlearnt(each.advantage, each.loss, 3) for each in (ace, grpo))
    assert left < plain and right > less


@pytest.mark.parametrize("options", [{}, {"base": "dapo", "penalty": "relu", "per_token": True, "cap": 5.0}])
def test_a_step_of_a_tiny_model(tmp_path, monkeypatch, options):
    tiny_runs.use(monkeypatch)
    rows = tiny_runs.run(tmp_path, "run", recipe="ace", reward=SHORT, steps=1, **options)
    assert [row["grad_norm"] > 0 for row in rows if "tokens" in row] == [True]
