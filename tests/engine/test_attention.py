"""Attention over packed rollouts against ordinary forwards, and everything that must not be attended silently."""

import types

import pytest
import tiny_models
import torch
from tolerance import check, check_rows

from fuserl import attention

LENGTHS = [6, 1, 4, 9, 3, 0, 5]
GROUP = torch.tensor([2, 0, 0, 2, 0, 2, 0])
OFFSETS = torch.tensor([0, *LENGTHS]).cumsum(0)
PACKINGS = pytest.mark.parametrize("prefix", [0, 20], ids=["own_prompts", "shared_prefix"])
FAMILIES = pytest.mark.parametrize("family", list(tiny_models.FAMILIES))


def texts(prefix=0):
    """Three ragged prompts that begin alike, and seven ragged rollouts of two of them, in no order."""
    draw = torch.Generator().manual_seed(1)

    def ids(n):
        return torch.randint(3, tiny_models.VOCABULARY, (n,), generator=draw)

    common = ids(prefix)
    return [torch.cat([common, ids(n)]) for n in (17, 9, 23)], ids(sum(LENGTHS))


def one_by_one(model, prompts, tokens):
    """Logits (N, V) that predict each token, from one ordinary forward per rollout."""
    rows = []
    for b, group in enumerate(GROUP.tolist()):
        own = tokens[OFFSETS[b] : OFFSETS[b + 1]]
        logits = model(torch.cat([prompts[group], own])[None], use_cache=False).logits[0]
        rows.append(logits[len(prompts[group]) - 1 :][: len(own)])
    return torch.cat(rows)


def padded(model, prompts, tokens, side="right"):
    """The same from one padded batch."""
    whole = [torch.cat([prompts[g], tokens[OFFSETS[b] : OFFSETS[b + 1]]]) for b, g in enumerate(GROUP.tolist())]
    size = max(map(len, whole))
    ids, mask = torch.zeros(2, len(whole), size, dtype=torch.int64)
    starts = [size - len(text) if side == "left" else 0 for text in whole]
    for b, (start, text) in enumerate(zip(starts, whole, strict=True)):
        ids[b, start : start + len(text)] = text
        mask[b, start : start + len(text)] = 1
    position = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=position, use_cache=False).logits
    first = [start + len(prompts[g]) - 1 for start, g in zip(starts, GROUP.tolist(), strict=True)]
    return torch.cat([logits[b, at : at + LENGTHS[b]] for b, at in enumerate(first)])


def packed(model, prompts, tokens):
    layout = attention.pack(prompts, GROUP, tokens, OFFSETS)
    return model(**layout.inputs()).logits[0, layout.predictor]


def with_gradients(model, forward, *arguments):
    model.zero_grad()
    logits = forward(model, *arguments)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weights.to(logits)).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def reference(family, dtype=torch.float32):
    # Only "eager" knows Gemma2's softcap.
    model = tiny_models.model(family, dtype)
    model.set_attn_implementation("eager" if family == "gemma2" else "sdpa")
    return model


def attached(family, dtype=torch.float32, **changes):
    model = tiny_models.model(family, dtype, **changes)
    attention.attach(model)
    return model


@FAMILIES
@PACKINGS
def test_packed_equals_unpacked(family, prefix):
    truth, truth_gradients = with_gradients(reference(family, torch.float64), one_by_one, *texts(prefix))
    plain, plain_gradients = with_gradients(reference(family), padded, *texts(prefix))
    got, gradients = with_gradients(attached(family), packed, *texts(prefix))
    check("logits", got, truth, plain, torch.float32)
    for name, gradient in gradients.items():
        check_rows(name, gradient, truth_gradients[name], plain_gradients[name], torch.float32)


@FAMILIES
@PACKINGS
def test_packed_equals_unpacked_in_float64(family, prefix):
    with torch.no_grad():
        truth = one_by_one(reference(family, torch.float64), *texts(prefix))
        got = packed(attached(family, torch.float64), *texts(prefix))
    # Norms and rotary angles (and eager's softmax, for Gemma2) are float32 in transformers whatever the model's dtype.
    limit = 1e-5 if family == "gemma2" else 1e-12
    assert (got - truth).abs().max() < limit * truth.abs().max()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(family, reentrant):
    model = attached(family).train()
    logits, gradients = with_gradients(model, packed, *texts(20))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again, gradients_again = with_gradients(model, packed, *texts(20))
    assert torch.equal(logits, again)
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)


@PACKINGS
def test_no_rollout_sees_another(prefix):
    model, (prompts, tokens) = attached("llama"), texts(prefix)
    with torch.no_grad():
        before = packed(model, prompts, tokens)
        for b, length in enumerate(LENGTHS):
            changed = tokens.clone()
            changed[OFFSETS[b] : OFFSETS[b + 1]] = 5
            same = torch.ones(len(tokens), dtype=torch.bool)
            same[OFFSETS[b] : OFFSETS[b + 1]] = False
            after = packed(model, prompts, changed)
            assert torch.equal(before[same], after[same])
            assert length < 2 or not torch.equal(before[~same], after[~same])


@FAMILIES
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_batch_is_masked_as_by_transformers(family, side):
    with torch.no_grad():
        expected = padded(reference(family), *texts(), side)
        got = padded(attached(family), *texts(), side)
    if family == "gemma2":
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(got, expected)


@FAMILIES
def test_without_segments_it_is_causal(family):
    ids = texts()[0][2][None]
    with torch.no_grad():
        expected, got = reference(family)(ids).logits, attached(family)(ids).logits
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)


@FAMILIES
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_transformers_own_generation_still_works(family, cache):
    settings = dict(
        max_new_tokens=12, do_sample=False, eos_token_id=None, cache_implementation=cache, disable_compile=True
    )
    prompts = texts()[0]
    ids = torch.stack([prompts[0][-9:], prompts[1]])
    expected = reference(family).generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert torch.equal(attached(family).generate(ids, attention_mask=torch.ones_like(ids), **settings), expected)


def test_pack_lays_out_prompts_once():
    prompts = [torch.tensor([10, 11, 12]), torch.tensor([99]), torch.tensor([20, 21])]
    tokens = torch.tensor([1, 2, 3, 4, 5, 6, 7])
    layout = attention.pack(prompts, torch.tensor([2, 0, 2]), tokens, torch.tensor([0, 2, 6, 7]))
    assert layout.input_ids.tolist() == [[10, 11, 12, 3, 4, 5, 20, 21, 1]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2]]
    assert layout.predictor.tolist() == [7, 8, 2, 3, 4, 5, 7]
    assert layout.segments.parent.tolist() == [-1, 0, -1, 2, 2]
    assert layout.segments.length.tolist() == [3, 3, 2, 1, 0]


def test_pack_shares_what_all_prompts_begin_with():
    prompts, tokens = texts(prefix=20)
    layout = attention.pack(prompts, GROUP, tokens, OFFSETS)
    fed = sum(max(length - 1, 0) for length in LENGTHS)
    assert layout.input_ids.shape[1] == 20 + 17 + 23 + fed
    same = attention.pack([prompts[0], prompts[0]], torch.tensor([0, 1]), tokens[:2], torch.tensor([0, 1, 2]))
    assert same.input_ids.shape[1] == len(prompts[0]) + 1  # every prompt keeps a token of its own


@pytest.mark.parametrize(
    ("group", "offsets", "message"),
    [([0, 3], [0, 1, 2], "got 3"), ([0, 1], [0, 1, 3], "offsets"), ([0, 1], [0, 2], "offsets"),
     ([0, 1], [0, 3, 2], "offsets"), ([0, 2], [0, 1, 2], "got 2")],
)  # fmt: skip
def test_pack_refuses(group, offsets, message):
    prompts = [torch.tensor([1]), torch.tensor([1]), torch.tensor([], dtype=torch.int64)]
    with pytest.raises(ValueError, match=message):
        attention.pack(prompts, torch.tensor(group), torch.tensor([7, 8]), torch.tensor(offsets))


def test_nothing_is_ignored_silently():
    model, (prompts, tokens) = attached("llama"), texts()
    inputs = attention.pack(prompts, GROUP, tokens, OFFSETS).inputs()
    with pytest.raises(ValueError, match="attention_mask must be absent beside segments"):
        model(**{**inputs, "attention_mask": (inputs["input_ids"] != inputs["input_ids"][0, 0]).long()})
    with pytest.raises(ValueError, match="attention_mask must be absent beside segments"):
        model(**{name: value for name, value in inputs.items() if name != "attention_mask"})
    with pytest.raises(ValueError, match="segments must describe the whole input"):
        model(**{**inputs, "input_ids": inputs["input_ids"][:, 1:], "position_ids": inputs["position_ids"][:, 1:]})
    for unknown in ({"s_aux": torch.ones(4)}, {"is_causal": False}, {"output_attentions": True}):
        with pytest.raises(ValueError, match=f"{next(iter(unknown))} must be absent"):
            model(**inputs, **unknown)


def test_a_window_that_never_arrives_is_refused():
    config = types.SimpleNamespace(layer_types=["sliding_attention"])
    module, x = types.SimpleNamespace(config=config, layer_idx=0), torch.ones(1, 2, 3, 4)
    with pytest.raises(ValueError, match="sliding_window must be given"):
        attention.attention(module, x, x, x, None, segments=object())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["linear_attention"]}, "layers of type linear_attention"),
        ({"num_kv_shared_layers": 2}, "shares keys"),
        ({"use_bidirectional_attention": True}, "both directions"),
    ],
)
def test_attach_refuses_models_that_would_go_wrong(change, message):
    model = tiny_models.model()
    for name, value in change.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=message):
        attention.attach(model)
    model = tiny_models.model()
    type(model)._supports_attention_backend, before = False, type(model)._supports_attention_backend
    try:
        assert "AttentionInterface" in attention.unsupported(model)
    finally:
        type(model)._supports_attention_backend = before
