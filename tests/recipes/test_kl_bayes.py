"""kl_bayes: without KL it is REINFORCE; with it, or another objective, a policy is brought to its target."""

import pytest
import tiny_models
import tiny_runs
import torch
from batches import gradient, ragged, recipe

from fuserl.engine import adapters, targets
from fuserl.engine.policy import Policy, Sampling, Updating
from fuserl.engine.proposals import Proposal
from fuserl.engine.toys import kl_bayes as toy

SHORT = "tiny_runs:shortness"


def on_policy():
    batch = ragged((3, 1, 5, 2), (0, 0, 1, 1))
    return batch.replace(old_logprobs=batch.rollout_logprobs)


def test_without_kl_it_is_rloo(tmp_path):
    batch, ours, rloo = on_policy(), recipe(tmp_path, "kl_bayes", beta=0.0), recipe(tmp_path, "rloo")
    got, expected = (gradient(each, batch, batch.old_logprobs) for each in (ours, rloo))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert expected.any() and ours.reads == ("old_logprobs", "ref_logprobs")


def test_the_credit_is_the_reward_less_the_log_ratio(tmp_path):
    batch = on_policy()
    ratio = batch.rollout_sum(batch.old_logprobs - batch.ref_logprobs)
    got = recipe(tmp_path, "kl_bayes", beta=0.3, baseline=False).advantage(batch)
    torch.testing.assert_close(got.advantages, batch.to_tokens(batch.rewards - 0.3 * ratio))
    held = recipe(tmp_path, "kl_bayes", beta=0.3).advantage(batch)
    each = batch.rewards - 0.3 * ratio
    torch.testing.assert_close(held.advantages, batch.to_tokens(each - each[[1, 0, 3, 2]]))


def test_options_reach_the_credit(tmp_path):
    batch = ragged((3, 1, 5, 2), (0, 0, 1, 1)).replace(rewards=torch.tensor([1.0, 0, 0, 1]))
    seen = []
    for options in (
        {},
        {"beta": 1.0},
        {"baseline": False},
        {"objective": "dpg"},
        {"objective": "fdpg"},
        {"objective": "fdpg", "divergence": "total_variation"},
        {"objective": "dpg", "target": "pointwise"},
        {"objective": "dpg", "target": "moments"},
        {"objective": "dpg", "target": "moments", "moment": "0.6"},
        {"objective": "dpg", "target": "moments", "moment_lr": 0.1},
        {"objective": "dpg", "target": "moments", "moment_steps": 2},
    ):
        found = recipe(tmp_path, "kl_bayes", **options).advantage(batch).advantages
        assert not any(torch.allclose(found, other) for other in seen), options
        seen.append(found)
    batch = batch.replace(prompt_tokens=[torch.tensor([1]), torch.tensor([2])])
    first, second = (recipe(tmp_path, "kl_bayes", objective="dpg", z_rate=rate) for rate in (0.0, 0.9))
    found = [
        [each.advantage(b).advantages for b in (batch, batch.replace(rewards=1 - batch.rewards))]
        for each in (first, second)
    ]
    assert torch.equal(found[0][0], found[1][0]) and not torch.allclose(found[0][1], found[1][1])


def test_what_goes_on_from_batch_to_batch_is_kept(tmp_path):
    for options, names in (
        ({}, {"partition"}),
        ({"target": "moments"}, {"partition", "moments"}),
        ({"proposal": "best"}, {"partition", "proposal"}),
    ):
        assert {*recipe(tmp_path, "kl_bayes", **options).state} == names
    with pytest.raises(ValueError, match="proposal must be policy where rollouts are drawn ahead or by vLLM"):
        recipe(tmp_path, "kl_bayes", proposal="best", overlap=True)
    for moment in ("", "0.3,x", "0.3;1"):
        with pytest.raises(ValueError, match=r"^kl_bayes: moment must be numbers, separated by commas; got "):
            recipe(tmp_path, "kl_bayes", moment=moment)
    assert recipe(tmp_path, "kl_bayes", target="moments", moment="0.3, 1").state["moments"].moments.tolist() == [0.3, 1]


def test_a_proposal_is_adopted_where_it_is_nearer_and_restored_after_drawing():
    model = tiny_models.model()
    policy = Policy(model, None, Sampling(), Updating(lr=0.1))
    seen, proposal = [], Proposal()
    slot = proposal.drawing(lambda policy, _: seen.append(next(iter(policy.parameters().values())).clone()))
    weights = next(iter(adapters.trained(model).values()))
    slot(policy, None)
    start = weights.detach().clone()
    weights.data.add_(1.0)
    slot(policy, None)
    assert torch.equal(seen[0], seen[1]) and torch.equal(weights, start + 1)
    again = Proposal()
    again.load_state_dict(proposal.state_dict())
    proposal.adopt()
    slot(policy, None)
    assert torch.equal(seen[2], start + 1)
    again.drawing(lambda policy, _: seen.append(next(iter(policy.parameters().values())).clone()))(policy, None)
    assert torch.equal(seen[3], start)

    def failing(policy, _):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        again.drawing(failing)(policy, None)
    assert torch.equal(weights, start + 1)


@pytest.mark.parametrize("toward", [True, False])
def test_the_best_proposal_is_the_nearest_to_the_target(toward):
    world, proposal, random = toy.Enumerable(moved=1.0), Proposal(), torch.Generator().manual_seed(0)
    proposal.weights = {"a": torch.zeros(1)}
    p, _ = world.posterior(0.5)
    uniform = torch.full_like(p, -p.new_tensor(64).log())
    policy, drawing = (p, uniform) if toward else (uniform, p)
    index = torch.multinomial(drawing.exp(), 2000, replacement=True, generator=random)
    old, drawn = (each[index, None].expand(-1, 2).flatten() / 2 for each in (policy, drawing))
    batch = world.given(index).replace(old_logprobs=old, rollout_logprobs=drawn)
    targets.inferred("dpg", beta=0.5, proposal=proposal)(batch)
    assert (proposal.weights == {}) == toward


@pytest.mark.slow
def test_collapse_and_no_collapse_from_several_starts():
    for seed in (1, 2):
        p, _ = toy.Enumerable(seed=seed).posterior(0.5)
        for objective, lr, most in (("kl_rl", 10.0, 1e-4), ("dpg", 2.0, 1e-3)):
            credit = targets.inferred(objective, beta=0.5, baseline=False)
            logs = toy.Enumerable(seed=seed, lr=lr).trained(credit, targets.reinforced(), 4000)
            apart = toy.divergence(logs, p) if objective == "kl_rl" else toy.divergence(p, logs)
            assert apart < most and toy.entropy(logs) == pytest.approx(toy.entropy(p), abs=0.02)
        free = targets.inferred(beta=0.0, baseline=False)
        assert toy.entropy(toy.Enumerable(seed=seed, lr=100.0).trained(free, targets.reinforced(), 4000)) < 0.01


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"objective": "dpg", "target": "moments", "proposal": "best"},
        {"objective": "fdpg", "divergence": "total_variation"},
    ],
)
def test_steps_of_a_tiny_model(tmp_path, monkeypatch, options):
    tiny_runs.use(monkeypatch)
    rows = tiny_runs.run(tmp_path, "run", recipe="kl_bayes", reward=SHORT, steps=2, beta=2.0, **options)
    steps = [row for row in rows if "tokens" in row]
    assert all(row["grad_norm"] > 0 and 0 < row["distinct_2"] <= 1 for row in steps)
    assert all(name in row for row in steps for name in targets.DIAGNOSTICS)
