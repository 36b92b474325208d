"""Models that transformers generates with: the same draws, texts and updates as elsewhere, only slower."""

import warnings

import pytest
import tiny_models
import tiny_runs
import torch
from test_attention_families import tiny
from test_turns import PROMPTS, Talker, answered, check, given, plain, spans
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fuserl.engine import generation
from fuserl.engine.batch import batch_of
from fuserl.engine.generation import generate
from fuserl.engine.losses import Loss
from fuserl.engine.policy import Policy, Sampling, Updating

OTHERS = {
    "nemotron": {}, "bloom": {}, "mamba": dict(state_size=4), "gpt_oss": dict(num_local_experts=4),
    "gpt_bigcode": dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
}  # fmt: skip
FAMILIES = pytest.mark.parametrize("family", OTHERS)


@pytest.fixture
def borrowed(monkeypatch):
    """All models are taken for ones that we cannot decode."""
    monkeypatch.setattr(generation.families, "unsupported", lambda model: "a test")
    generation._warned.cache_clear()


def other(family):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    model = tiny(family, **OTHERS[family])
    if family == "mamba":
        # Its recurrences err by a thousandth with weights as large as those of the others.
        for parameter in model.parameters():
            parameter.data.mul_(1 / 6 if parameter.dim() > 1 else 1)
    return model


@pytest.mark.filterwarnings("ignore:generate")
def test_it_draws_what_our_own_decoding_draws(borrowed, monkeypatch):
    settings = dict(group_size=4, max_new_tokens=30, top_k=20, stop=("9",), seed=4)
    found, few = (generate(tiny_models.model(), Talker(), PROMPTS, rows=rows, **settings) for rows in (None, 3))
    with pytest.raises(ValueError, match="kv_gb must be None"):
        generate(tiny_models.model(), Talker(), PROMPTS, kv_gb=1.0, **settings)
    monkeypatch.undo()
    mine = generate(tiny_models.model(), Talker(), PROMPTS, **settings)
    assert torch.equal(found.tokens, mine.tokens) and found.texts == mine.texts and found.finish == mine.finish
    assert torch.allclose(found.rollout_logprobs, mine.rollout_logprobs, atol=2e-5)
    assert torch.equal(found.tokens, few.tokens)
    assert set(mine.finish) == {"stop", "length"}


@pytest.mark.filterwarnings("ignore:generate")
def test_replies_and_beginnings_too(borrowed, monkeypatch):
    found, calls = answered(tiny_models.model())
    monkeypatch.undo()
    mine, others = answered(tiny_models.model())
    assert torch.equal(found.tokens, mine.tokens) and sorted(calls) == sorted(others)
    assert torch.equal(found.trained, mine.trained)


@FAMILIES
def test_logprobs_are_those_of_a_plain_forward_and_the_reason_is_said_once(family):
    model = other(family)
    generation._warned.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            rollouts = generate(
                model, Talker(), PROMPTS, group_size=2, max_new_tokens=9, forced=[[], [5], [], [5], [6, 7], []]
            )
    assert [str(each.message) for each in said if "transformers' own generate" in str(each.message)]
    assert sum("transformers' own generate" in str(each.message) for each in said) == 1
    before = model.config._attn_implementation
    check(model, rollouts)
    assert model.generation_config.eos_token_id == 2 and before == "eager"


@pytest.mark.filterwarnings("ignore:Policy")
@FAMILIES
def test_an_update_learns_the_same_as_from_plain_forwards(family):
    rollouts, batch = given(), batch_of(given(), torch.ones(2))
    model = other(family)
    loss = sum(-plain(model, rollouts, b)[rollouts.trained[span]].sum() for b, span in enumerate(spans(rollouts)))
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model = other(family)
    policy = Policy(model, Talker(), Sampling(), Updating(lr=0.0, max_grad_norm=1e9))
    found = {}
    policy.optimizer.step = lambda: (
        found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}) or {}
    )
    policy.update(batch, Loss(lambda out, part: (-out.logprob, {})))
    largest = max(each.abs().max() for each in expected.values())
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert (gradient - expected[name]).abs().max() <= 1e-5 * largest, name


def test_a_model_is_left_as_it_was(borrowed):
    model = tiny_models.model().train()
    settings = model.generation_config
    with pytest.raises(KeyError), pytest.warns(UserWarning, match="a test"):
        generate(
            model, Talker(), PROMPTS, max_new_tokens=3, stop=("x",), reply=lambda *_: {}["broken"], stop_ids=range(64)
        )
    assert model.training and model.generation_config is settings


@pytest.mark.filterwarnings("ignore:Policy", "ignore:generate")
@pytest.mark.parametrize("family", ["nemotron", "mamba"])
def test_a_run_trains_such_a_model(family, tmp_path, monkeypatch):
    tiny_runs.use(monkeypatch, lambda: other(family))
    made = tiny_runs.run(tmp_path, "run", steps=2, reward="tiny_runs:shortness")
    steps = [row for row in made if "tokens" in row]
    assert len(steps) == 2 and all(row["mismatch_max"] < 1e-4 and row["grad_norm"] > 0 for row in steps)
