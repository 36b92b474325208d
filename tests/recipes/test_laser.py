"""laser: the token behind finished answers, its error and weights, mixed advantages, phases, votes."""

import types

import pytest
import tiny_models
import tiny_runs
import torch
from batches import made, ragged, recipe
from tiny_runs import numbers

from fuserl.engine import checks, verdicts
from fuserl.engine.advantages import standardized
from fuserl.engine.batch import Rollouts
from fuserl.engine.losses import clipped
from fuserl.engine.policy import Policy, Sampling, Updating
from fuserl.engine.prompts import Prompt
from fuserl.engine.toys import laser as toys

SHORT = "tiny_runs:shortness"
FINISHED = (1.0, 1.0, 0.0, 1.0, 1.0, 0.0)
REWARDS = (1.0, 0.0, 1.0, 0.0, 0.0, 0.0)


def batch(step=1, rewards=REWARDS):
    facts = {"finished": torch.tensor(FINISHED), "verdict": torch.full((6, 1), 63)}
    given = ragged((3, 1, 5, 2, 4, 1), (0, 0, 0, 1, 1, 1), (2, 3))
    return given.replace(
        rewards=torch.tensor(rewards), old_logprobs=None, ref_logprobs=None, values=None, returns=None,
        advantages=None, extra={}, facts=facts, step=step,
    )  # fmt: skip


def scored(laser, given, logprob):
    """The batch packed, its verdicts' old log-probs those given, and credited."""
    packed = laser.packed(given)
    old = torch.full((len(packed.tokens),), -1.0)
    old[packed.objective == 1] = torch.tensor(logprob)[: int((packed.objective == 1).sum())]
    packed = packed.replace(old_logprobs=old, rollout_logprobs=old)
    return packed.with_advantages(laser.advantage(packed))


VERDICTS = (-13.0, -23.0, -18.5, -14.0)


def test_one_token_goes_behind_each_finished_answer(tmp_path):
    packed = recipe(tmp_path, "laser", w1=0, temperature=0.5).packed(batch())
    assert packed.tokens[packed.objective == 1].tolist() == [63] * 4
    assert packed.rollout[packed.objective == 1].tolist() == [0, 1, 3, 4]
    assert [each.counts.tokens for each in packed.objectives] == [16, 4]
    assert packed.extra["temperature"].tolist() == [1.0 if k else 0.5 for k in packed.objective.tolist()]
    weights = packed.extra["balance"][packed.objective == 1]
    assert weights.tolist() == pytest.approx([4 / 2, 4 / 6, 4 / 6, 4 / 6])  # one right and three wrong are finished
    nothing = recipe(tmp_path, "laser", w1=1).packed(batch())
    assert [each.counts.tokens for each in nothing.objectives] == [16, 0] and len(nothing.tokens) == 16


def test_its_log_prob_is_at_temperature_1_and_the_others_as_drawn():
    model = tiny_models.model()
    policy = Policy(model, None, Sampling(temperature=0.5), Updating())
    given = batch().replace(tokens=torch.arange(16) + 5, prompt_tokens=[torch.tensor([3, 4]), torch.tensor([9, 8, 7])])
    packed = verdicts.with_verdicts(given, temperature=0.5)
    found = policy.score(packed, ["old_logprobs"]).old_logprobs
    text = torch.tensor([3, 4, 5, 6, 7, 63])
    logits = model(text[None]).logits[0, :-1].detach()
    drawn = (logits / 0.5).log_softmax(-1).gather(-1, text[1:, None]).squeeze(-1)[1:4]
    torch.testing.assert_close(found[:3], drawn, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[3], logits[-1].log_softmax(-1)[63], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("c_ref", [-23.0, -20.0, None])
def test_the_error_is_balanced_and_of_verdicts_alone(c_ref, tmp_path):
    laser = recipe(tmp_path, "laser", w1=0, alpha=0.3, beta_v=0.2, c_ref=c_ref, tau=0.0)
    seen = scored(laser, batch(), VERDICTS)
    seen = seen.replace(ref_logprobs=torch.full((20,), -21.0))
    rows = seen.objective == 1
    logprob = seen.rollout_logprobs.clone().double().requires_grad_()
    reward, weight = torch.tensor([1.0, 0, 0, 0]), torch.tensor([2.0, 2 / 3, 2 / 3, 2 / 3])
    score = 0.2 * (logprob[rows] - (-21.0 if c_ref is None else c_ref))
    (expected,) = torch.autograd.grad(0.3 * (weight * (score - reward) ** 2).mean(), logprob)
    got = checks.gradient(seen, laser.loss)
    torch.testing.assert_close(got[rows].double(), expected[rows], rtol=1e-5, atol=1e-7)
    plain = batch().replace(rollout_logprobs=seen.rollout_logprobs[~rows], old_logprobs=seen.old_logprobs[~rows])
    assert torch.equal(got[~rows], checks.gradient(checks.credited(plain, standardized), clipped()))
    assert ("ref_logprobs" in laser.reads) == (c_ref is None) and "old_logprobs" not in laser.reads
    statistics = laser.loss(types.SimpleNamespace(logprob=seen.rollout_logprobs), seen)[1]
    said = 0.2 * (torch.tensor(VERDICTS) - (-21.0 if c_ref is None else c_ref)) > 0.5
    assert float(statistics["verdict_right"].nanmean()) == float(said[0])
    assert float(statistics["verdict_wrong"].nanmean()) == pytest.approx(float((~said[1:]).float().mean()))


def test_a_batch_of_one_class_and_one_of_none_have_finite_losses(tmp_path):
    laser = recipe(tmp_path, "laser", w1=0, tau=0.0)
    for rewards in ((1.0,) * 6, (0.0,) * 6):
        seen = scored(laser, batch(rewards=rewards), VERDICTS)
        assert seen.extra["balance"][seen.objective == 1].tolist() == [0.5] * 4
        assert checks.gradient(seen, laser.loss).isfinite().all()
    none = batch().replace(facts={"finished": torch.zeros(6), "verdict": torch.full((6, 1), 63)})
    assert checks.gradient(scored(laser, none, VERDICTS), laser.loss).isfinite().all()


def test_advantages_are_mixed_where_scores_differ(tmp_path):
    laser = recipe(tmp_path, "laser", w1=2, w2=3, tau=0.25)
    before, after = scored(laser, batch(5), VERDICTS), scored(laser, batch(6), VERDICTS)
    ordinary = standardized(batch())
    firsts = torch.tensor([after.rollout.tolist().index(b) for b in range(6)])
    assert torch.equal(before.advantages[firsts], ordinary)
    said = torch.tensor([1.0, 0.0, 0.0, 0.45, 0.9, 0.0])  # held to [0, 1]; 0 where the answer was cut
    own = standardized(batch().replace(rewards=said))
    torch.testing.assert_close(after.advantages[firsts], 0.75 * ordinary + 0.25 * own, rtol=1e-5, atol=1e-5)
    alike = scored(laser, batch(6), (-23.0, -23.0, -22.0, -22.5))  # a deviation of .058 and less says nothing
    torch.testing.assert_close(alike.advantages[firsts], ordinary)
    assert laser.reads == ("old_logprobs",)


@pytest.mark.parametrize("options", [{}, {"w1": 0}, {"w1": 0, "alpha": 0.0}, {"w1": 0, "w2": 0, "tau": 0.5}])
def test_what_is_known_dead_has_no_loss(options, tmp_path):
    laser = recipe(tmp_path, "laser", **options)
    seen = scored(laser, batch(rewards=(1.0, 1.0, 1.0, 0.0, 0.0, 1.0)), VERDICTS)
    live, got = laser.loss.live(seen), checks.gradient(seen, laser.loss)
    assert ("tau" in options or not live.all()) and not got[~live].any()
    assert "alpha" not in options or not live[seen.objective == 1].any()
    assert torch.equal(checks.gradient(seen.take(live.nonzero().squeeze(-1)), laser.loss), got[live])


@pytest.mark.parametrize("options", [{"alpha": 0.0, "tau": 0.0, "w1": 0}, {}])
def test_without_its_terms_it_is_grpo(options, tmp_path):
    laser = recipe(tmp_path, "laser", **options)
    seen = scored(laser, batch(), VERDICTS)
    plain = batch().replace(rollout_logprobs=torch.full((16,), -1.0), old_logprobs=torch.full((16,), -1.0))
    grpo = checks.gradient(checks.credited(plain, standardized), clipped())
    got = checks.gradient(seen, laser.loss)
    assert torch.equal(got[seen.objective == 0], grpo) and not got[seen.objective == 1].any()


def test_the_token_is_a_spare_one():
    def tokenizer(**known):
        speak = lambda self, text, add_special_tokens: types.SimpleNamespace(input_ids=[ord(x) for x in text])  # noqa: E731
        found = type("Spoken", (), {"__call__": speak})()
        found.__dict__.update({"bos_token_id": 1, "eos_token_id": 2, **known})
        return found

    assert verdicts.token(tokenizer(all_special_ids=[1, 2, 9, 5])) == 9
    assert verdicts.token(tokenizer(all_special_ids=[1, 2])) == verdicts.token(tokenizer()) == 2
    assert verdicts.token(tokenizer(), "A") == 65 and verdicts.token(tokenizer(), "A", 7) == 7
    with pytest.raises(ValueError, match="must be one token"):
        verdicts.token(tokenizer(), "AB")
    with pytest.raises(ValueError, match="must have a special token"):
        verdicts.token(tokenizer(eos_token_id=None))


def test_answers_are_elected_by_number_and_by_score():
    found = made(["q", "r"], torch.tensor([0, 0, 0, 0, 1, 1]), ["5", "7", " 5", "7", "x", "y"])
    found = Rollouts(**{**vars(found), "prompts": [Prompt("q", "7"), Prompt("r", "y")]})
    assert verdicts.elected(found, torch.ones(6)).tolist() == [0, 4]
    assert verdicts.elected(found, torch.tensor([0.1, 0.9, 0.2, 0.0, 0.3, 0.4])).tolist() == [1, 5]


def test_wrong_options_are_refused(tmp_path):
    for options, words in (
        ({"alpha": -1.0}, "alpha must be"),
        ({"beta_v": 0.0}, "beta_v must be"),
        ({"tau": 2.0}, "tau must be in"),
        ({"w1": -1}, "w1 must be"),
        ({"w2": -1}, "w2 must be"),
    ):
        with pytest.raises(ValueError, match=words):
            recipe(tmp_path, "laser", **options)


@pytest.fixture
def tiny(monkeypatch):
    tiny_runs.use(monkeypatch)


def run(folder, name, **changes):
    ends = ("\n", "1", "2", "3", "4", "5")
    return tiny_runs.run(folder, name, recipe="laser", reward=SHORT, stop=ends, **{"max_new_tokens": 12, **changes})


@pytest.mark.parametrize(
    "options",
    [
        {"w1": 0},
        {"w1": 0, "w2": 1, "tau": 0.5, "minibatches": 2},
        {"w1": 1, "c_ref": None, "verdict": "=", "epochs": 2},
        {"w1": 0, "alpha": 1.0, "beta_v": 0.5, "verdict_id": 5, "temperature": 0.7},
        {"low": 0.01, "high": 0.01, "epochs": 3},
    ],
)
def test_a_run_takes_its_options(tmp_path, tiny, options):
    plain, rows = numbers(run(tmp_path, "plain")), numbers(run(tmp_path, "run", **options))
    assert rows != plain
    assert any(row.get("verdict_error") is not None for row in rows) == ("w1" in options)
    assert not any("verdict" in row for row in rows) and all("finished" in row for row in rows if "tokens" in row)


def test_a_run_evaluates_by_votes(tmp_path, tiny):
    rows = run(tmp_path, "run", w1=0, eval_samples=4)
    judged = [row for row in rows if "accuracy" in row]
    assert len(judged) == 2 and all(0 <= row["vote_accuracy"] <= 1 for row in judged)
    assert all("weighted_vote_accuracy" in row for row in judged)


@pytest.mark.slow
def test_a_transformer_knows_what_is_right():
    loss = verdicts.squared_verdict(alpha=0.1, beta_v=0.1, c_ref=-23.0)
    found = toys.learnt(loss, seeds=(0, 1, 2))
    assert found["accuracy"] > 0.9 and found["kl"] < 0.02, found
