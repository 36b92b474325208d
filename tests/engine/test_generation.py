"""Generation: against transformers' own, alone and among others bit for bit, and every way to end."""

import drawn_tokens
import pytest
import tiny_models
import torch
from tiny_models import Letters

from fuserl import layers
from fuserl.engine import decoding
from fuserl.engine.generation import generate
from fuserl.engine.kv_cache import page_bytes
from fuserl.engine.prompts import Prompt
from fuserl.engine.scheduling import Scheduler, Source
from fuserl.kernels import matmul

FAMILIES = pytest.mark.parametrize("family", list(tiny_models.FAMILIES))
RAGGED = [Prompt(text) for text in ("ABC", "Z", "K:Q3TTRLA4BCC<Y", "abcdabcdabcdefabcdbacdacd", "9876543210")]
ALIKE = [Prompt("1234567890ABCDEFGHIJ:" + own) for own in ("a", "bcdefgh", "bcd", "aa", "QRS", "ik")]


def completion(rollouts, b):
    span = slice(rollouts.offsets[b], rollouts.offsets[b + 1])
    return rollouts.tokens[span].tolist(), rollouts.rollout_logprobs[span].tolist()


def plain_logits(model, rollouts, b):
    """Logits (n, V) before each token of completion b, from one ordinary forward."""
    prompt = rollouts.prompt_tokens[rollouts.group[b]]
    tokens = torch.tensor(completion(rollouts, b)[0])
    model.set_attn_implementation("eager")  # "sdpa" of some transformers versions forgets the soft cap
    with torch.no_grad():
        return model(torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1], tokens


@FAMILIES
@pytest.mark.parametrize("prompts", [RAGGED, ALIKE], ids=["ragged", "alike"])
def test_greedy_equals_transformers(family, prompts):
    model = tiny_models.model(family)
    rollouts = generate(model, Letters(), prompts, max_new_tokens=12, temperature=0)
    for b, ids in enumerate(rollouts.prompt_tokens):
        expected = model.generate(ids[None], attention_mask=torch.ones(1, len(ids)), max_new_tokens=12, do_sample=False)
        assert completion(rollouts, b)[0] == expected[0, len(ids) :].tolist()


@FAMILIES
def test_logprobs_are_those_of_a_plain_forward(family):
    model = tiny_models.model(family)
    rollouts = generate(model, Letters(), RAGGED, group_size=3, max_new_tokens=60, temperature=0.7, stop_ids=())
    for b in range(len(rollouts)):
        logits, tokens = plain_logits(model, rollouts, b)
        expected = (logits / 0.7).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        assert torch.allclose(torch.tensor(completion(rollouts, b)[1]), expected, atol=2e-5)


def test_cut_distributions_are_renormalised():
    model, cuts = tiny_models.model(), dict(top_k=9, top_p=0.9, min_p=0.02)
    rollouts = generate(model, Letters(), RAGGED, group_size=4, max_new_tokens=9, **cuts)
    for b in range(len(rollouts)):
        logits, tokens = plain_logits(model, rollouts, b)
        allowed = drawn_tokens.allowed(logits, **cuts)[0].float().gather(1, tokens[:, None])[:, 0]
        assert torch.allclose(torch.tensor(completion(rollouts, b)[1]), allowed, atol=2e-5)


@pytest.mark.parametrize("prompts", [RAGGED, ALIKE], ids=["ragged", "alike"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_rollout_gets_the_same_bits_alone_and_among_others(family, prompts):
    model, settings = tiny_models.model(family), dict(max_new_tokens=70, seed=5, rows=16)
    together = generate(model, Letters(), prompts, group_size=3, **settings)
    assert "length" in together.finish and "stop" in together.finish
    order = torch.randperm(len(prompts)).tolist()
    shuffled = generate(model, Letters(), [prompts[i] for i in order], group_size=3, streams=order, **settings)
    for at, i in enumerate(order):
        alone = generate(model, Letters(), [prompts[i]], group_size=5, streams=[i], **settings)
        for member in range(3):
            expected = completion(together, 3 * i + member)
            assert completion(shuffled, 3 * at + member) == expected
            assert completion(alone, member) == expected


@pytest.mark.parametrize("prompts", [RAGGED, ALIKE], ids=["ragged", "alike"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_where_products_are_row_by_row_a_pass_may_have_any_number_of_rows(family, prompts, monkeypatch):
    monkeypatch.setattr(matmul, "_preferred", lambda: True)
    model = layers.attach(tiny_models.model(family, hidden_size=128, intermediate_size=128, head_dim=64))
    assert decoding.row_by_row(model)
    settings = dict(max_new_tokens=70, stop_ids=())
    together = generate(model, Letters(), prompts, group_size=3, **settings)
    tight = generate(model, Letters(), prompts, group_size=3, rows=5, kv_gb=6 * page_bytes(model) / 1e9, **settings)
    assert torch.equal(together.tokens, tight.tokens)
    assert torch.equal(together.rollout_logprobs, tight.rollout_logprobs)
    alone = generate(model, Letters(), prompts[3:4], streams=[3], **settings)
    assert completion(alone, 0) == completion(together, 9)


def test_when_products_are_row_by_row(monkeypatch):
    monkeypatch.setattr(matmul, "_preferred", lambda: True)
    sizes = dict(hidden_size=128, intermediate_size=128, head_dim=64)
    assert not decoding.row_by_row(tiny_models.model(**sizes))
    model = layers.attach(tiny_models.model(**sizes))
    assert decoding.row_by_row(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not decoding.row_by_row(model)
    assert not decoding.row_by_row(layers.attach(tiny_models.model(**{**sizes, "intermediate_size": 120})))
    assert not decoding.row_by_row(layers.attach(tiny_models.model(dtype=torch.float64, **sizes)))
    monkeypatch.setattr(matmul, "_preferred", lambda: False)
    assert not decoding.row_by_row(model)


def test_three_wide_query_heads_per_key_head_too():
    """In this shape, on two threads, torch's own attention gives a row other bits beside others than alone."""
    model = tiny_models.model(hidden_size=48, num_attention_heads=6, num_key_value_heads=2, head_dim=64)
    settings = dict(max_new_tokens=9)
    together = generate(model, Letters(), RAGGED, group_size=12, **settings)
    for i, prompt in enumerate(RAGGED):
        alone = generate(model, Letters(), [prompt], streams=[i], **settings)
        assert completion(alone, 0) == completion(together, 12 * i)


@pytest.mark.parametrize("group_size", [1, 5, 21])
def test_rollouts_wait_for_slots(group_size):
    """More rollouts than slots, groups that are admitted in parts: the same completions in the same order."""
    model, settings = tiny_models.model(), dict(group_size=group_size, max_new_tokens=30, rows=8)
    rollouts = generate(model, Letters(), RAGGED, **settings)
    assert rollouts.group.tolist() == [i for i in range(len(RAGGED)) for _ in range(group_size)]
    for i, prompt in enumerate(RAGGED):
        alone = generate(model, Letters(), [prompt], streams=[i], **settings)
        for member in range(group_size):
            assert completion(alone, member) == completion(rollouts, i * group_size + member)


@pytest.mark.parametrize("prompts", [RAGGED, ALIKE], ids=["ragged", "alike"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_rollout_that_had_to_give_way_gets_the_same_bits(family, prompts, monkeypatch):
    """As many pages as two rollouts and a half need: others wait with what they have drawn, and are read again."""
    sent, preempt = [], Scheduler._preempt

    def counted(self, rollout):
        sent.append(len(rollout.tokens))
        preempt(self, rollout)

    monkeypatch.setattr(Scheduler, "_preempt", counted)
    model, settings = tiny_models.model(family), dict(group_size=3, max_new_tokens=140, stop_ids=(), rows=16)
    roomy = generate(model, Letters(), prompts, **settings)
    assert not sent
    tight = generate(model, Letters(), prompts, kv_gb=9 * page_bytes(model) / 1e9, **settings)
    assert sum(drawn > 60 for drawn in sent) > 3
    assert torch.equal(roomy.tokens, tight.tokens) and torch.equal(roomy.rollout_logprobs, tight.rollout_logprobs)
    with pytest.raises(RuntimeError, match="kv_gb must have room for a rollout"):
        generate(model.train(), Letters(), prompts, kv_gb=3 * page_bytes(model) / 1e9, **settings)
    assert model.training


def test_each_prompt_token_is_read_once(monkeypatch):
    read, forward = [], decoding.Decoder._forward

    def counting(self, spans):
        read.extend(stop - start for text, start, stop in spans if isinstance(text, Source))
        return forward(self, spans)

    monkeypatch.setattr(decoding.Decoder, "_forward", counting)
    generate(tiny_models.model(), Letters(), RAGGED, group_size=21, max_new_tokens=3, rows=8)
    assert sum(read) == sum(len(prompt.text) for prompt in RAGGED)
    read.clear()
    generate(tiny_models.model(), Letters(), ALIKE, group_size=4, max_new_tokens=3, rows=8)
    assert sum(read) == 21 + sum(len(prompt.text) - 21 for prompt in ALIKE)


def test_seeds_and_members_differ_and_repeat():
    def draw(seed):
        return generate(tiny_models.model(), Letters(), RAGGED, group_size=4, max_new_tokens=12, seed=seed).texts

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert len(set(draw(0))) > 10


def test_endings():
    model = tiny_models.model()
    free = generate(model, Letters(), RAGGED, group_size=4, max_new_tokens=40, stop_ids=())
    assert set(free.finish) == {"length"}
    assert (free.offsets.diff() == 40).all()
    at_eos = generate(model, Letters(), RAGGED, group_size=4, max_new_tokens=40)
    ended = generate(model, Letters(), RAGGED, group_size=4, max_new_tokens=40, stop=("9", "A"), stop_ids=(7, 8))
    for b in range(len(free)):
        whole = completion(free, b)[0]
        eos = whole.index(2) + 1 if 2 in whole else 40
        assert completion(at_eos, b)[0] == whole[:eos]
        assert at_eos.finish[b] == ("stop" if 2 in whole else "length")
        assert at_eos.texts[b] == "".join(chr(48 + t) for t in whole[:eos] if t != 2)
        cut = min([whole.index(t) for t in (7, 8, 9, 17) if t in whole], default=None)
        assert ended.finish[b] == ("length" if cut is None else "stop")
        assert completion(ended, b)[0] == (whole if cut is None else whole[: cut + 1])
        assert ended.texts[b] == "".join(chr(48 + t) for t in whole[:cut] if t != 2)
    assert set(ended.finish) >= {"stop"}


def test_a_stop_text_may_span_tokens_and_end_within_one():
    class Pairs(Letters):
        """Two letters per token, so that texts begin and end inside tokens."""

        def decode(self, tokens, skip_special_tokens, clean_up_tokenization_spaces):
            return "".join(f"{chr(48 + t)}{chr(49 + t)}" for t in tokens)

    model = tiny_models.model()
    whole = completion(generate(model, Letters(), RAGGED[:1], max_new_tokens=12, stop_ids=()), 0)[0]
    text = Pairs().decode(whole, False, False)
    stop = text[7:12]  # from inside token 3 to inside token 5
    assert text.index(stop) == 7
    rollouts = generate(model, Pairs(), RAGGED[:1], max_new_tokens=12, stop=(stop,), stop_ids=())
    assert completion(rollouts, 0)[0] == whole[:6]
    assert rollouts.texts == [text[:7]]
    assert rollouts.finish == ["stop"]


def test_the_model_is_left_as_it_was():
    model = tiny_models.model("gemma2").train()
    model.set_attn_implementation("eager")
    rollouts = generate(model, Letters(), RAGGED, max_new_tokens=3)
    assert model.training and model.config._attn_implementation == "eager"
    assert not rollouts.rollout_logprobs.requires_grad

    class Broken(Letters):
        def decode(self, *arguments, **named):
            raise KeyError("broken")

    with pytest.raises(KeyError):
        generate(model, Broken(), RAGGED, max_new_tokens=3, stop=("x",))
    assert model.training and model.config._attn_implementation == "eager"


def test_a_layer_without_attention_is_refused():
    model = tiny_models.model()
    layer = model.model.layers[1].self_attn
    layer.forward = lambda hidden_states, **named: (hidden_states, None)
    with pytest.raises(RuntimeError, match="only 2 called attention"):
        generate(model, Letters(), RAGGED, max_new_tokens=3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"group_size": 0}, "group_size"), ({"max_new_tokens": 0}, "max_new_tokens"), ({"streams": [1]}, "streams"),
     ({"stop": "ab"}, "stop"), ({"stop": ("",)}, "stop"), ({"top_p": 2.0}, "top_p")],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_models.model(), Letters(), RAGGED, **{"max_new_tokens": 3, **wrong})
    with pytest.raises(ValueError, match="prompts"):
        generate(tiny_models.model(), Letters(), [Prompt("")], max_new_tokens=3)


@pytest.mark.slow
def test_the_default_model_gets_the_same_bits_alone_and_among_others():
    """At real widths, where a library's products are known to depend on the number of rows."""
    from fuserl.engine import models

    model, tokenizer = models.load()
    shots = "3 + 4 = 7\n8 - 2 = 6\n6 + 9 = 15\n4 - 7 = -3\n"
    prompts = [Prompt(shots + own) for own in ("5 - 9 =", "12 + 6 =")] + [
        Prompt("The capital of France is"),
        Prompt("A"),
    ]
    settings = dict(max_new_tokens=12, seed=5)
    greedy = generate(model, tokenizer, prompts, max_new_tokens=12, temperature=0)
    together = generate(model, tokenizer, prompts, group_size=3, **settings)
    for i, prompt in enumerate(prompts):
        ids = together.prompt_tokens[i][None]
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert completion(greedy, i)[0] == expected[0, ids.shape[1] :].tolist()
        alone = generate(model, tokenizer, [prompt], group_size=3, streams=[i], **settings)
        assert [completion(alone, m) for m in range(3)] == [completion(together, 3 * i + m) for m in range(3)]


@pytest.mark.gpu
def test_on_a_gpu_in_bfloat16():
    model = tiny_models.model(dtype=torch.bfloat16).cuda()
    rollouts = generate(model, Letters(), ALIKE, group_size=4, max_new_tokens=9, rows=16)
    for b in range(len(rollouts)):
        prompt, tokens = rollouts.prompt_tokens[rollouts.group[b]], torch.tensor(completion(rollouts, b)[0])
        with torch.no_grad():
            logits = model(torch.cat([prompt, tokens])[None].cuda()).logits[0, len(prompt) - 1 : -1].float().cpu()
        expected = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        assert (torch.tensor(completion(rollouts, b)[1]) - expected).abs().max() < 0.5
    again = generate(model, Letters(), ALIKE, group_size=4, max_new_tokens=9, rows=16)
    assert torch.equal(rollouts.tokens, again.tokens)
