"""Credit of tokens: what a policy and its reference imply of them, as a map, as a dense reward, and to be watched."""

import json
import math

import pytest
import tiny_runs
import torch
from batches import config, ragged

from fuserl.engine import catalogue, credit, learners, loop
from fuserl.engine.advantages import generalised, implicit, rewards_to_go
from fuserl.engine.batch import Rollouts, batch_of
from fuserl.engine.policy import Policy
from fuserl.engine.prompts import Prompt
from fuserl.engine.rollouts import from_reference

PROMPTS = [Prompt("1+1="), Prompt("23+4=")]


@pytest.fixture
def policy(tmp_path, monkeypatch):
    tiny_runs.use(monkeypatch)
    given = config(tmp_path, "dpo", max_new_tokens=5, threads=1)
    found = learners.of(given, catalogue.recipe(given))[0]
    random = torch.Generator().manual_seed(0)
    for parameter in found.parameters().values():
        parameter.data += 0.3 * parameter.std() * torch.randn(parameter.shape, generator=random)
    return found


def plain(model, prompt, tokens):
    """Log-probs (n,) of tokens behind a prompt, from one ordinary forward."""
    with torch.no_grad():
        model.set_attn_implementation("eager")
        logits = model(torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1]
        model.set_attn_implementation("fuserl")
    return logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def test_a_map_says_what_each_token_earned(policy):
    drawn = policy.generate(PROMPTS, group_size=2)
    rows = credit.heat_map(policy, drawn, 0.3)
    assert [row["completion"] for row in rows] == drawn.texts and rows[2]["prompt"] == "23+4="
    for b, row in enumerate(rows):
        tokens = drawn.tokens[drawn.offsets[b] : drawn.offsets[b + 1]]
        prompt = drawn.prompt_tokens[drawn.group[b]]
        expected = 0.3 * (plain(policy.model, prompt, tokens) - plain(policy.seconds["ref"].own, prompt, tokens))
        assert torch.tensor(row["token_rewards"]) == pytest.approx(expected, abs=2e-5)
        assert row["tokens"] == [policy.tokenizer.decode([token]) for token in tokens]
    batch = batch_of(drawn, torch.zeros(4)).replace(old_logprobs=torch.ones(len(drawn.tokens)))  # of another policy
    assert torch.equal(
        credit.judged_by(policy, 0.3)(batch), torch.tensor([x for r in rows for x in r["token_rewards"]])
    )


def test_completions_of_the_reference_are_its_own(policy):
    before, calls = policy.source, policy.calls
    drawn = from_reference(policy, PROMPTS, group_size=3, stream=5)
    assert policy.source is before and policy.calls == calls
    reference = policy.seconds["ref"].own
    for b in range(len(drawn)):
        tokens, span = drawn.tokens[drawn.offsets[b] : drawn.offsets[b + 1]], slice(*drawn.offsets[b : b + 2].tolist())
        expected = plain(reference, drawn.prompt_tokens[drawn.group[b]], tokens)
        assert torch.allclose(drawn.rollout_logprobs[span], expected, atol=2e-5)
    watched = credit.of_reference(policy, PROMPTS, beta=0.5, samples=3)
    assert watched == credit.of_reference(policy, PROMPTS, beta=0.5, samples=3) and watched["reference_reward"] < 0
    assert credit.of_reference(policy, PROMPTS, beta=0.5, samples=0) == {}
    assert credit.of_reference(policy, [], beta=0.5, samples=2) == {}


def test_dense_rewards_reach_the_advantages():
    batch = ragged((3, 1, 4, 2), (0, 0, 1, 1))
    dense = lambda batch: implicit(batch, 0.5)  # noqa: E731
    each = 0.5 * (batch.old_logprobs - batch.ref_logprobs)
    assert torch.equal(dense(batch), each)
    one_step = generalised(gamma=1.0, lam=0.0, beta=0.0, whiten=False, dense=dense)(batch)
    plainly = generalised(gamma=1.0, lam=0.0, beta=0.0, whiten=False)(batch)
    assert torch.allclose(one_step.advantages - plainly.advantages, each, atol=1e-6)
    found = rewards_to_go(dense)(batch)
    for group in range(2):
        mine = batch.group[batch.rollout] == group
        scaled = (each[mine] - each[mine].mean()) / (each[mine].std() + 1e-6)
        expected = [scaled[t:][batch.rollout[mine][t:] == batch.rollout[mine][t]].sum() for t in range(int(mine.sum()))]
        assert found[mine].tolist() == pytest.approx([float(x) for x in expected], abs=1e-4)
    with pytest.raises(ValueError, match="beta must be a finite number > 0"):
        implicit(batch, 0.0)


class Letters:
    def decode(self, tokens):
        return "".join("abcdefghij"[token] for token in tokens)


def test_what_is_kept_is_the_credit_of_drawn_tokens_alone():
    tokens = torch.arange(6)
    drawn = Rollouts(
        prompts=[Prompt("?")], prompt_tokens=[tokens[:1]], group=torch.zeros(3, dtype=torch.int64), tokens=tokens,
        offsets=torch.tensor([0, 3, 5, 6]), rollout_logprobs=torch.zeros(6), texts=["abc", "de", "f"],
        finish=["stop"] * 3, trained=torch.tensor([True, False, True, True, True, True]),
    )  # fmt: skip
    batch = batch_of(drawn, torch.zeros(3)).with_advantages(torch.tensor([0.5, 0.5, -2.0, -2.0, 1.0]))
    first, second, third = credit.kept(batch, drawn, Letters(), 4)
    assert first["tokens"] == ["a", "b", "c"] and first["credit"][::2] == [0.5, 0.5] and math.isnan(first["credit"][1])
    assert (second, third) == ({"credit": -2.0}, {"credit": 1.0})
    assert [len(credit.kept(batch, drawn, Letters(), count)) for count in (0, 1, 2)] == [0, 1, 2]
    other = batch.replace(tokens=batch.tokens + 1)
    assert credit.kept(other, drawn, Letters(), 4) == [] == credit.kept(batch.replace(advantages=None), drawn, None, 4)


@pytest.mark.parametrize(("recipe", "several"), [("grpo", False), ("ppo", True)])
def test_a_run_keeps_the_credit_that_its_update_saw(recipe, several, tmp_path, monkeypatch):
    tiny_runs.use(monkeypatch)
    seen, update = [], Policy.update

    def updated(self, batch, loss):
        seen.append(batch)
        return update(self, batch, loss)

    monkeypatch.setattr(Policy, "update", updated)
    folder = loop.train(
        tiny_runs.config(tmp_path, "run", recipe=recipe, reward="tiny_runs:shortness", steps=1, samples=3, eval_every=0)
    )
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    batch = seen[0]  # of the policy, not of its critic
    assert len(rows) == 3
    for row, expected in zip(rows, batch.advantages.split(batch.offsets.diff().tolist()), strict=False):
        got = row["credit"] if several else [row["credit"]] * len(expected)
        assert got == pytest.approx(expected.tolist(), rel=1e-5) and ("tokens" in row) == several
        assert not several or "".join(row["tokens"]).startswith(row["completion"])
