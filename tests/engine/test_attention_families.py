"""Every family whose models may be given packed rollouts: as one text at a time; and the rest, which are refused."""

import pytest
import tiny_models
import torch
import transformers
from test_attention import GROUP, LENGTHS, OFFSETS, one_by_one, packed, padded, texts, with_gradients
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fuserl import attention, families

SIZES = {**tiny_models.SIZES, "pad_token_id": 0}
MIXTURE = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
GEMMA = dict(sliding_window=7, query_pre_attn_scalar=5)
WINDOWS = dict(sliding_window=6, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
OPTIONS = {
    "cohere2": WINDOWS, "exaone4": WINDOWS, "ministral": WINDOWS, "mistral": dict(sliding_window=6), "olmo3": WINDOWS,
    "qwen2": dict(use_sliding_window=True, max_window_layers=1, **WINDOWS), "phi3": dict(sliding_window=6),
    "starcoder2": dict(sliding_window=6), "smollm3": dict(use_sliding_window=True, **WINDOWS),
    "gemma2": dict(attn_logit_softcapping=5.0, final_logit_softcapping=4.0, **GEMMA),
    "gemma3_text": {**WINDOWS, **GEMMA}, "mixtral": MIXTURE, "olmoe": MIXTURE, "qwen2_moe": MIXTURE,
    "qwen3_moe": MIXTURE, "opt": dict(ffn_dim=48, word_embed_proj_dim=32, dropout=0.0),
    "seed_oss": dict(attention_dropout=0.0, residual_dropout=0.0),
    "gpt2": dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
}  # fmt: skip
WINDOWED = [name for name, options in OPTIONS.items() if "sliding_window" in options]
EACH = pytest.mark.parametrize("family", sorted(families.TESTED))
SMALL = dict(num_hidden_layers=2)
REFUSED = {
    "deepseek_v2": "latent attention", "deepseek_v3": "latent attention", "gpt_oss": "attention sinks",
    "jamba": "state-space", "mamba": "state-space", "mamba2": "state-space", "qwen3_next": "state-space",
    "bamba": "state-space", "falcon_h1": "state-space", "recurrent_gemma": "state-space", "lfm2": "state-space",
    "kimi_linear": "latent attention", "minimax": "layers of type linear_attention", "bloom": "AttentionInterface",
    "nemotron": "family nemotron", "gpt_bigcode": "family gpt_bigcode",
}  # fmt: skip
OF_REFUSED = {
    "lfm2": dict(num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"]),
    "nemotron": dict(num_key_value_heads=2),
}


def tiny(family, **changes):
    """A random model as its users make it, its weights large enough that attention is far from uniform."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **OPTIONS.get(family, {}), **changes})
    torch.manual_seed(3)
    made = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(6)
    # Of the plain ones only this knows every cap and window.
    made.set_attn_implementation("eager")
    return made.eval()


def attached(model):
    attention.attach(model)
    return model


def close(got, truth):
    return (got - truth).abs().max() <= 1e-5 * truth.abs().max()


@EACH
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_packed_rollouts_equal_one_text_at_a_time(family, recomputed):
    """Ragged prompts and rollouts; logits and every gradient, of float32, also where activations are recomputed."""
    model = tiny(family)
    truth, expected = with_gradients(model, one_by_one, *texts(20))
    if recomputed:
        model.train().gradient_checkpointing_enable()
        model.enable_input_require_grads()
    got, found = with_gradients(attached(model), packed, *texts(20))
    assert close(got, truth)
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in found.items():
        assert (gradient - expected[name]).abs().max() <= 1e-5 * largest, name


@EACH
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_batch_equals_one_text_at_a_time(family, side):
    model = tiny(family)
    with torch.no_grad():
        truth = one_by_one(model, *texts())
        assert close(padded(attached(model), *texts(), side), truth)


@pytest.mark.parametrize("family", WINDOWED)
def test_a_window_counts_positions(family):
    """Turned around, siblings stand elsewhere in the pack and get the same; without its window a model says more."""
    (prompts, tokens), model = texts(), attached(tiny(family))
    turned = torch.arange(len(LENGTHS)).flip(0)
    pieces = [tokens[OFFSETS[b] : OFFSETS[b + 1]] for b in turned]
    offsets = torch.tensor([0, *map(len, pieces)]).cumsum(0)
    layout = attention.pack(prompts, GROUP[turned], torch.cat(pieces), offsets)
    with torch.no_grad():
        straight = packed(model, prompts, tokens)
        found = model(**layout.inputs()).logits[0, layout.predictor]
        wide = packed(attached(tiny(family, sliding_window=200)), prompts, tokens)
    back = torch.cat([found[offsets[at] : offsets[at + 1]] for at in turned.argsort()])
    assert close(back, straight) and not close(wide, straight)


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_a_family_that_was_never_tried_is_refused_by_name(family):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    config = transformers.AutoConfig.for_model(family, **{**SMALL, **OF_REFUSED.get(family, {})})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=REFUSED[family]) as raised:
        attention.attach(model)
    text = str(raised.value)
    assert type(model).__name__ in text and "\n" not in text


def test_a_model_of_a_tested_family_that_was_changed_is_refused():
    model = tiny("llama")
    model.model.layers[1].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match="LlamaForCausalLM has attention sinks"):
        attention.attach(model)


def test_a_model_that_drops_the_layout_is_refused():
    """Forced on a model that was never tried: an error, not rollouts that see each other."""
    model = tiny("nemotron")
    model.set_attn_implementation(attention.NAME)
    with pytest.raises(ValueError, match="segments must arrive with packed input; got None"):
        packed(model, *texts())


@pytest.mark.slow
def test_the_default_model():
    """Within twice what the plain model's own logits differ by between a padded batch and one text at a time."""
    from fuserl.engine import models

    model, tokenizer = models.load()
    words = ["3 + 4 = 7\n8 - 2 =", "The capital of France is", "6 + 9 = 15\n4 - 7 = -3\n12 + 6 ="]
    prompts = [torch.tensor(tokenizer(text).input_ids) for text in words]
    tokens = torch.randint(3, model.config.vocab_size, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        truth, batched = one_by_one(model, prompts, tokens), padded(model, prompts, tokens)
        got = packed(attached(model), prompts, tokens)
    assert (got - truth).abs().max() <= 2 * (batched - truth).abs().max()
