"""vLLM as the source of completions, against an imitation of it that draws from a transformers model."""

import dataclasses
import sys

import fake_vllm
import pytest
import tiny_models
import tiny_runs
import torch
from tiny_runs import numbers, rows, run

from fuserl.engine import adapters, catalogue, generation, learners, loop, sources
from fuserl.engine.ahead import Ahead
from fuserl.engine.batch import batch_of
from fuserl.engine.scheduling import Rollout, Source

SHORT = "tiny_runs:shortness"
ROUNDING = 1e-4  # of a log-prob of a model of three layers in float32, taken in two ways; other weights are off by 0.1


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    tiny_runs.use(monkeypatch)
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setattr(fake_vllm.LLM, "made", [])


def made(tmp_path, **changes):
    """The policy, the recipe and the resolved configuration of a run that has not begun."""
    config = tiny_runs.config(tmp_path, "run", reward=SHORT, rollout="vllm", **changes).resolved()
    recipe = catalogue.recipe(config)
    return learners.of(config, recipe)[0], recipe, config


def gap(policy, rollouts):
    """The largest difference between the log-probs that came with rollouts and those of the policy as it is."""
    batch = policy.score(batch_of(rollouts, torch.zeros(len(rollouts))), ["old_logprobs"])
    return float((batch.old_logprobs - rollouts.rollout_logprobs).abs().max())


def disturb(policy):
    """An update, as far as those who draw can tell."""
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.add_(0.5 * torch.randn_like(parameter))
    policy.optimizer.count += 1


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.5}, {"lora_rank": 2}], ids=str)
def test_completions_come_from_the_weights_of_the_last_sync(tmp_path, changes):
    policy, recipe, config = made(tmp_path, **changes)
    prompts = recipe.prompts(1)
    assert gap(policy, policy.generate(prompts, group_size=3)) > 0.1  # it has none of ours yet
    for _ in range(2):
        policy.sync()
        rollouts = policy.generate(prompts, group_size=3)
        assert gap(policy, rollouts) < ROUNDING
        disturb(policy)
        # The same draws again: the weights that drew are still the old ones, and so is what was kept of the prompts.
        policy.calls -= 1
        again = policy.generate(prompts, group_size=3)
        assert torch.equal(again.tokens, rollouts.tokens) and gap(policy, again) > 0.1
    assert vars(fake_vllm.LLM.made[0]).items() >= {"dtype": "float32", "seed": config.seed, "memory": 0.3}.items()


def test_rollouts_are_as_those_of_the_embedded_engine(tmp_path):
    policy, recipe, _ = made(tmp_path, stop=("1", "="), max_new_tokens=9)
    policy.sync()
    prompts = recipe.prompts(1)
    ours, own = policy.generate(prompts, group_size=12), sources.Own(policy.model, policy.tokenizer)
    ended = generation.Ending(policy.tokenizer, ("1", "="), frozenset([2]), 9, prompts, None, None)

    def drawn(tokens):
        return Rollout(tokens, source=Source([]), number=0, stream=0)

    assert ours.prompts == prompts and torch.equal(ours.group, torch.arange(2).repeat_interleave(12))
    assert len({*ours.finish}) == 2 and len({*ours.texts}) > 8
    for b, (text, finish) in enumerate(zip(ours.texts, ours.finish, strict=True)):
        tokens = ours.tokens[ours.offsets[b] : ours.offsets[b + 1]].tolist()
        assert text == ended.text(drawn(tokens)) and finish == ended.reason(drawn(tokens))
        assert all(ended.reason(drawn(tokens[:n])) is None for n in range(1, len(tokens)))
    theirs = own.generate(prompts, group_size=12, max_new_tokens=9, stop=("1", "="))
    assert all(map(torch.equal, ours.prompt_tokens, theirs.prompt_tokens))
    lengths = [each.offsets.diff().float() for each in (ours, theirs)]
    error = sum(each.var() / len(each) for each in lengths).sqrt()
    assert (lengths[0].mean() - lengths[1].mean()).abs() < 4 * error  # fixed seeds: four standard errors


def test_cuts_are_those_asked_for_and_greedy_is_greedy(tmp_path):
    policy, recipe, _ = made(tmp_path, top_k=1)
    policy.sync()
    prompts = recipe.prompts(1)
    drawn, greedy = policy.generate(prompts), policy.generate(prompts, greedy=True)
    own = sources.Own(policy.model, policy.tokenizer)
    expected = own.generate(prompts, temperature=0.0, max_new_tokens=4, stop=("\n",))
    assert torch.equal(drawn.tokens, expected.tokens) and torch.equal(greedy.tokens, expected.tokens)
    assert drawn.rollout_logprobs.abs().max() == 0


def test_streams_name_the_draws_of_prompts(tmp_path):
    policy, recipe, _ = made(tmp_path)
    one, two = recipe.prompts(1)
    settings = dict(group_size=4, max_new_tokens=4, seed=7)
    both = policy.source.generate([one, two], **settings)
    alone = policy.source.generate([two], **settings, streams=[1])
    assert torch.equal(both.tokens[both.offsets[4] :], alone.tokens)
    other = policy.source.generate([two], **settings)
    assert not torch.equal(other.tokens, alone.tokens)


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}, {"dtype": "bfloat16"}], ids=str)
def test_a_run_gives_vllm_its_weights_at_every_step(tmp_path, changes):
    first, again = (
        numbers(run(tmp_path, name, reward=SHORT, rollout="vllm", steps=4, **changes)) for name in ("a", "b")
    )
    steps = [row for row in first if "tokens" in row]
    gaps = [row["mismatch_max"] for row in steps if row.get("mismatch_max") is not None]
    assert first == again and len(gaps) > 1 and max(gaps) < (0.5 if "dtype" in changes else ROUNDING)
    assert [row["staleness"] for row in steps] == [0] * 4
    assert len({row["accuracy"] for row in first if "accuracy" in row}) == 2


def test_without_the_weights_a_run_would_show_it(tmp_path, monkeypatch):
    from fuserl.engine.vllm import Vllm

    monkeypatch.setattr(Vllm, "sync", lambda self: None)
    steps = [row for row in run(tmp_path, "run", reward=SHORT, rollout="vllm") if "tokens" in row]
    assert max(row["mismatch_max"] for row in steps if row.get("mismatch_max") is not None) > 0.1


def test_with_overlap_vllm_draws_from_the_weights_of_the_step_before(tmp_path):
    policy, recipe, config = made(tmp_path, overlap=True)
    assert config.importance == "truncate" and type(policy.source).__name__ == "Vllm"
    with Ahead(policy, recipe, overlap=True) as ahead:
        assert gap(policy, ahead.take(1)[0]) < ROUNDING
        _, rollouts = ahead.waiting()
        assert gap(policy, rollouts) < ROUNDING
        disturb(policy)
        assert gap(policy, ahead.take(2)[0]) > 0.1
        assert gap(policy, ahead.waiting()[1]) < ROUNDING


@pytest.mark.parametrize("overlap", [False, True])
def test_a_resumed_run_is_as_one_that_never_stopped(tmp_path, overlap):
    settings = dict(reward=SHORT, rollout="vllm", overlap=overlap, save_every=2, eval_problems=0)
    whole = numbers(run(tmp_path, "whole", steps=6, **settings))
    folder = loop.train(tiny_runs.config(tmp_path, "parts", steps=4, **settings))
    loop.train(tiny_runs.config(tmp_path, "parts", steps=6, **settings), resume=folder)
    assert numbers(rows(folder)) == whole


def test_weights_go_with_adapters_folded_in():
    model = tiny_models.model(tie_word_embeddings=True)
    plain = {name: parameter.clone() for name, parameter in model.named_parameters()}
    adapted = adapters.lora(model, rank=2, alpha=8.0, targets=("q_proj", "down_proj"))
    with torch.no_grad():
        for parameter in adapters.trained(adapted).values():
            parameter.normal_()
    expected = dict(adapters.merged(adapted).named_parameters())
    got = dict(adapters.folded(adapted))
    assert got.keys() == expected.keys() == plain.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)
    assert sum(not torch.equal(got[name], plain[name]) for name in got) == 2 * 3


@pytest.mark.parametrize(
    ("changes", "model", "says"),
    [
        ({}, dict(num_experts=4), "must be dense; LlamaForCausalLM has num_experts = 4"),
        ({"lora_rank": 2, "lora_targets": ("lm_head",)}, dict(tie_word_embeddings=True), "weights of its own"),
        ({"recipe": "sft"}, {}, "rollout: the recipe must draw completions; sft"),
        ({"vllm_memory": 0.0}, {}, "vllm_memory must be a number > 0"),
    ],
)
def test_what_vllm_cannot_do_is_refused(tmp_path, monkeypatch, changes, model, says):
    tiny_runs.use(monkeypatch, lambda: tiny_models.model(**model))
    with pytest.raises(ValueError, match=says):
        run(tmp_path, "run", rollout="vllm", **changes)
    assert not fake_vllm.LLM.made


def test_ranks_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for changes in ({"rollout": "vllm"}, {"overlap": True}):
        with pytest.raises(ValueError, match="must have one rank; it has 2"):
            run(tmp_path, "run", reward=SHORT, **changes)


def test_a_gpu_that_vllm_would_not_take_is_refused(tmp_path):
    _, recipe, config = made(tmp_path)
    sources.check(config, recipe)
    with pytest.raises(ValueError, match=r"takes the first GPU .* got cuda:1"):
        sources.check(dataclasses.replace(config, device="cuda:1"), recipe)


def test_settings_that_only_the_embedded_engine_has_are_refused(tmp_path):
    policy, recipe, _ = made(tmp_path)
    prompts = recipe.prompts(1)
    assert len(policy.source.generate(prompts, max_new_tokens=4, rows=None)) == 2
    with pytest.raises(ValueError, match=r"in one go, .* got rows, stop_ids\."):
        policy.source.generate(prompts, max_new_tokens=4, rows=8, stop_ids=[1])


def test_a_missing_vllm_is_named_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    tiny_runs.use(monkeypatch, lambda: pytest.fail("loaded"))
    with pytest.raises(RuntimeError, match=r'pip install "fuserl\[vllm\]"'):
        run(tmp_path, "run", reward=SHORT, rollout="vllm")


def test_a_completion_that_is_given_up_is_an_error(tmp_path, monkeypatch):
    policy, recipe, _ = made(tmp_path)
    monkeypatch.setattr(fake_vllm.LLM, "gives_up", True)
    with pytest.raises(RuntimeError, match=r"8 of 8 were given up \(abort\)"):
        policy.generate(recipe.prompts(1), group_size=4)
