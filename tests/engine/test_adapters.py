"""LoRA, freezing, recomputed activations and the head in effect, on tiny models, against peft and plain autograd."""

import copy

import pytest
import tiny_models
import torch
from tiny_models import Letters
from tolerance import check, check_rows

from fuserl import attention
from fuserl.engine import adapters
from fuserl.engine.generation import generate
from fuserl.engine.prompts import Prompt
from fuserl.kernels.linear_policy_loss import linear_policy_loss

pytest.importorskip("peft")

TIED = pytest.mark.parametrize("tied", [False, True], ids=["own_head", "tied_head"])
HEAD = ("all-linear", "lm_head")
PROMPTS = [Prompt(text) for text in ("ABC", "K:Q3TTRLA4BCC<Y", "9876543210")]
GROUP, LENGTHS = torch.tensor([2, 0, 0, 1]), [6, 1, 4, 9]
OFFSETS = torch.tensor([0, *LENGTHS]).cumsum(0)


def adapted(targets=HEAD, *, dtype=torch.float32, family="llama", tied=False, moved=True, **settings):
    """A tiny model with adapters, whose B are drawn where they have `moved` from zero."""
    model = tiny_models.model(family, dtype, tie_word_embeddings=tied)
    torch.manual_seed(7)
    model = adapters.lora(model, **{"rank": 4, "alpha": 6, "targets": targets, **settings})
    for name, parameter in adapters.trained(model).items():
        if moved and "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return model


def ids(n=11, seed=1):
    return torch.randint(3, tiny_models.VOCABULARY, (1, n), generator=torch.Generator().manual_seed(seed))


def logits(model, tokens=None):
    with torch.no_grad():
        return model(ids() if tokens is None else tokens, use_cache=False).logits


def texts():
    prompts = [ids(n, seed=n)[0] for n in (5, 3, 8)]
    return prompts, ids(sum(LENGTHS), seed=2)[0]


def packed_states(model, prompts, tokens):
    layout = attention.pack(prompts, GROUP, tokens, OFFSETS)
    return adapters.base(model).get_decoder()(**layout.inputs()).last_hidden_state[0, layout.predictor]


def snapshot(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_base_and_trained_of_either_kind():
    plain = tiny_models.model(tie_word_embeddings=True)
    assert adapters.base(plain) is plain and not adapters.present(plain)
    assert list(adapters.trained(plain)) == [name for name, _ in plain.named_parameters()]
    assert "lm_head.weight" not in adapters.trained(plain)  # tied: once
    model = adapters.lora(plain, rank=2, alpha=2)
    assert adapters.base(model) is plain and adapters.present(model)
    names = list(adapters.trained(model))
    assert names[0] == "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert len(names) == 2 * 3 * 7 and all("lora_" in name for name in names)


def test_frozen_parameters_are_those_named():
    model = tiny_models.model()
    every = set(adapters.trained(model))
    adapters.frozen(model, ["model.embed_tokens.*", "*.layers.0.*", "*norm*"])
    left = set(adapters.trained(model))
    gone = {n for n in every if n == "model.embed_tokens.weight" or ".layers.0." in n or "norm" in n}
    assert left == every - gone and {n for n in gone if "layers.0" in n} and "lm_head.weight" in left
    adapters.frozen(model, [])
    assert set(adapters.trained(model)) == left


def test_a_tied_weight_freezes_under_either_name():
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        model = tiny_models.model(tie_word_embeddings=True)
        adapters.frozen(model, [name])
        assert not model.lm_head.weight.requires_grad and not model.model.embed_tokens.weight.requires_grad


def test_freezing_nothing_known_or_everything_is_refused_and_freezes_nothing():
    model = tiny_models.model()
    for patterns, message in (
        (
            ["model.norm.*", "model.embed_token.weight"],
            r"got 'model.embed_token.weight'. Did you mean 'model.embed_tok",
        ),
        (["model.*", "lm_head.*"], r"leave a parameter to train; got model.\*, lm_head.\*"),
    ):
        with pytest.raises(ValueError, match=message):
            adapters.frozen(model, patterns)
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_adapters_freeze_by_layer_and_the_base_by_its_plain_names():
    model = adapted()
    adapters.frozen(model, ["*.layers.0.*", "model.layers.1.self_attn.q_proj.weight"])
    names = set(adapters.trained(model))
    assert names and not any(".layers.0." in name for name in names)
    assert any("layers.1.self_attn.q_proj.lora_A" in name for name in names)


@pytest.mark.parametrize(
    ("targets", "count", "modules"),
    [
        (("all-linear",), 21, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (HEAD, 22, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}),
        (("q_proj", "self_attn.v_proj"), 6, {"q_proj", "v_proj"}),
        (("*.layers.1.mlp.*",), 3, {"gate_proj", "up_proj", "down_proj"}),
        (("lm_head",), 1, {"lm_head"}),
    ],
)
def test_targets(targets, count, modules):
    model = adapted(targets, moved=False)
    matrices = [name.removesuffix(".lora_A.default.weight") for name in adapters.trained(model) if "lora_A" in name]
    assert len(matrices) == count and {name.rpartition(".")[2] for name in matrices} == modules


def test_adapters_are_float32():
    model = adapted(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in adapters.trained(model).values()} == {torch.float32}
    assert adapters.base(model).model.embed_tokens.weight.dtype == torch.bfloat16
    assert {x.dtype for x in adapters.head_terms(model)["lora"][:2]} == {torch.float32}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"targets": ("q_proj", "k_porj")}, "got 'k_porj'. Did you mean 'k_proj'"),
        ({"targets": ("embed_tokens",)}, "name a linear layer; got 'embed_tokens'"),
        ({"targets": ()}, "got none"),
        ({"targets": HEAD, "dropout": 0.1}, "lora: dropout must be 0 on the head"),
        ({"dropout": 1.0}, "dropout must be from 0"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"alpha": 0}, "alpha must be above 0"),
    ],
)
def test_wrong_settings_are_refused_and_the_model_stays(wrong, message):
    model = tiny_models.model()
    with pytest.raises(ValueError, match=message):
        adapters.lora(model, **{"rank": 2, "alpha": 2, **wrong})
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="no adapters yet"):
        adapters.lora(adapters.lora(model, rank=2, alpha=2), rank=2, alpha=2)


@TIED
@pytest.mark.filterwarnings("error")
def test_new_adapters_change_no_bit(tied):
    model = tiny_models.model(tie_word_embeddings=tied)
    before, prompts, tokens = logits(model), *texts()
    attention.attach(model)
    settings = dict(group_size=3, max_new_tokens=12, seed=5)
    drawn, states = generate(model, Letters(), PROMPTS, **settings), packed_states(model, prompts, tokens)
    model = adapters.lora(model, rank=4, alpha=8, targets=HEAD)
    assert torch.equal(logits(model), before)
    assert torch.equal(packed_states(model, prompts, tokens), states)
    assert torch.equal(adapters.head_weight(model), adapters.base(model).lm_head.base_layer.weight)
    again = generate(model, Letters(), PROMPTS, **settings)
    assert torch.equal(again.tokens, drawn.tokens) and torch.equal(again.rollout_logprobs, drawn.rollout_logprobs)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_the_engine_works_on_the_peft_model_and_on_its_base(family):
    model = adapted(family=family)
    attention.attach(model)
    assert adapters.base(model).config._attn_implementation == attention.NAME
    prompts, tokens = texts()
    layout = attention.pack(prompts, GROUP, tokens, OFFSETS)
    with torch.no_grad():
        assert torch.equal(model(**layout.inputs()).logits, adapters.base(model)(**layout.inputs()).logits)
    settings = dict(group_size=2, max_new_tokens=12)
    inside = generate(adapters.base(model), Letters(), PROMPTS, **settings)
    around = generate(model, Letters(), PROMPTS, **settings)
    assert torch.equal(inside.tokens, around.tokens)
    assert torch.equal(inside.rollout_logprobs, around.rollout_logprobs)


def test_a_rollout_of_an_adapted_model_gets_the_same_bits_alone_and_among_others():
    model, settings = adapted(), dict(max_new_tokens=20, seed=5, rows=16)
    together = generate(model, Letters(), PROMPTS, group_size=3, **settings)
    for b in range(len(together)):
        group = int(together.group[b])
        alone = generate(model, Letters(), [PROMPTS[group]], group_size=3, streams=[group], **settings)
        mine, other = (slice(*rollouts.offsets[i : i + 2]) for rollouts, i in ((together, b), (alone, b - 3 * group)))
        assert torch.equal(together.tokens[mine], alone.tokens[other])
        assert torch.equal(together.rollout_logprobs[mine], alone.rollout_logprobs[other])


def test_after_a_step_generation_uses_the_adapted_weights():
    model = adapted(moved=False)
    before = generate(model, Letters(), PROMPTS, max_new_tokens=12, temperature=0, stop_ids=())
    optimizer = torch.optim.AdamW(adapters.trained(model).values(), lr=0.1)
    for _ in range(2):
        model(ids()).logits.log_softmax(-1)[0, :, 5].sum().neg().backward()
        optimizer.step()
    after = generate(model, Letters(), PROMPTS, max_new_tokens=12, temperature=0, stop_ids=())
    assert not torch.equal(before.tokens, after.tokens)
    for b, prompt in enumerate(after.prompt_tokens):
        own = after.tokens[after.offsets[b] : after.offsets[b + 1]]
        rows = logits(model, torch.cat([prompt, own])[None])[0, len(prompt) - 1 : -1].log_softmax(-1)
        got = after.rollout_logprobs[after.offsets[b] : after.offsets[b + 1]]
        assert torch.allclose(got, rows.gather(1, own[:, None])[:, 0], atol=2e-5)


def engine_gradients(model):
    """Loss and gradients as the engine takes them: packed states, the adapted head, no logits in memory."""
    attention.attach(model)
    prompts, tokens = texts()
    operands = packed_states(model, prompts, tokens), adapters.head_weight(model), tokens
    loss, *_ = linear_policy_loss(*operands, lambda out, rows: -out.logprob, **adapters.head_terms(model))
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in adapters.trained(model).items()}


def plain_gradients(model):
    """The same from peft's own forward, one rollout at a time, with all logits."""
    prompts, tokens = texts()
    loss = 0.0
    for b, group in enumerate(GROUP.tolist()):
        own = tokens[OFFSETS[b] : OFFSETS[b + 1]]
        rows = model(torch.cat([prompts[group], own])[None], use_cache=False).logits[0, len(prompts[group]) - 1 : -1]
        loss = loss - rows.log_softmax(-1).gather(1, own[:, None]).sum()
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in adapters.trained(model).items()}


@TIED
def test_gradients_equal_autograd_through_peft(tied):
    got_loss, got = engine_gradients(adapted(tied=tied).train())
    plain_loss, plain = plain_gradients(adapted(tied=tied))
    wide = adapted(tied=tied)
    wide.to(torch.float64)
    true_loss, truth = plain_gradients(wide)
    check("loss", got_loss, true_loss, plain_loss, torch.float32)
    assert got.keys() == truth.keys() and {"lm_head.lora_A.default.weight"} < set(got)
    for name, gradient in got.items():
        assert truth[name].norm() > 0
        # As one row: an adapter's own are of four numbers, whose rounding in float32 is a matter of luck.
        check_rows(name, *(x.reshape(1, -1) for x in (gradient, truth[name], plain[name])), torch.float32)


def test_the_head_in_effect():
    plain = tiny_models.model()
    assert adapters.head_weight(plain) is plain.lm_head.weight
    model = adapted(HEAD)
    head = adapters.base(model).lm_head
    assert adapters.head_weight(model) is head.base_layer.weight and not head.weight.requires_grad
    down, up, scale = adapters.head_terms(model)["lora"]
    assert down is head.lora_A["default"].weight and up is head.lora_B["default"].weight and scale == 1.5
    with adapters.without_adapters(model):
        assert adapters.head_terms(model)["lora"] is None
    for model in (plain, adapted(("q_proj",))):
        assert adapters.head_terms(model)["lora"] is None


def test_a_head_that_is_no_product_is_refused():
    import peft

    def made(**settings):
        return peft.get_peft_model(tiny_models.model(), peft.LoraConfig(r=2, **settings))

    doubled = made(target_modules=["lm_head"], use_dora=True)
    copied = made(target_modules=["q_proj"], modules_to_save=["lm_head"])
    for model, message in (
        (copied, "one matrix product; LlamaForCausalLM has a copy of its own"),
        (made(target_modules=["lm_head"], lora_dropout=0.1), r"dropout must be 0 on the head.*got 0.1"),
        (doubled, "head_terms: adapters must be LoRA without"),
    ):
        with pytest.raises(ValueError, match=message):
            adapters.head_weight(model)
            adapters.head_terms(model)
    with pytest.raises(ValueError, match="merged: adapters must be LoRA"):
        adapters.merged(doubled)
    with pytest.raises(ValueError, match="merged: adapters must be LoRA; lm_head is ModulesToSaveWrapper"):
        adapters.merged(copied)


@TIED
def test_without_adapters_is_the_model_as_it_was(tied):
    before, model = logits(tiny_models.model(tie_word_embeddings=tied)), adapted(tied=tied)
    adapters.frozen(model, ["*.layers.0.*"])
    names, after = list(adapters.trained(model)), logits(model)
    assert not torch.allclose(before, after, atol=1e-2)
    with adapters.without_adapters(model) as inside:
        assert inside is model and torch.equal(logits(model), before)
    assert list(adapters.trained(model)) == names and torch.equal(logits(model), after)
    with pytest.raises(KeyError), adapters.without_adapters(model):
        raise KeyError
    assert list(adapters.trained(model)) == names and torch.equal(logits(model), after)
    with pytest.raises(ValueError, match="model must have adapters; got a plain LlamaForCausalLM"):
        adapters.without_adapters(adapters.base(tiny_models.model())).__enter__()


@TIED
@pytest.mark.parametrize("targets", [("all-linear",), HEAD], ids=["body", "head_too"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_merged_is_the_same_function_in_a_plain_model(family, targets, tied):
    model = adapted(targets, family=family, tied=tied)
    before, output = snapshot(model), logits(model)
    plain = adapters.merged(model)
    original = tiny_models.model(family, tie_word_embeddings=tied)
    assert type(plain) is type(original) and list(plain.state_dict()) == list(original.state_dict())
    wide = copy.deepcopy(model).to(torch.float64)
    check("logits", logits(plain), logits(wide), output, torch.float32)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), output)
    shared = plain.lm_head.weight is plain.get_input_embeddings().weight
    assert shared == plain.config.tie_word_embeddings == (tied and targets != HEAD)
    assert adapters.base(model).config.tie_word_embeddings == tied
    assert torch.equal(plain.get_input_embeddings().weight, original.get_input_embeddings().weight)
    assert not {t.data_ptr() for t in plain.parameters()} & {t.data_ptr() for t in model.parameters()}


def test_merging_is_float32_arithmetic_rounded_once():
    model = adapted(("q_proj",), dtype=torch.bfloat16)
    layer = adapters.base(model).model.layers[1].self_attn.q_proj
    product = 1.5 * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
    expected = (layer.weight.float() + product).bfloat16()
    assert torch.equal(adapters.merged(model).model.layers[1].self_attn.q_proj.weight, expected)


def test_adapters_that_are_off_are_not_merged():
    model = adapted()
    with adapters.without_adapters(model):
        assert torch.equal(logits(adapters.merged(model)), logits(tiny_models.model()))


def test_a_head_whose_adapter_has_learnt_nothing_stays_tied():
    plain = adapters.merged(adapted(tied=True, moved=False))
    assert plain.lm_head.weight is plain.model.embed_tokens.weight and plain.config.tie_word_embeddings
    assert torch.equal(logits(plain), logits(tiny_models.model(tie_word_embeddings=True)))


def test_a_plain_model_merges_into_a_copy():
    model = tiny_models.model(tie_word_embeddings=True)
    plain = adapters.merged(model)
    assert plain is not model and torch.equal(logits(plain), logits(model))
    assert plain.lm_head.weight is plain.model.embed_tokens.weight is not model.lm_head.weight


def saved_bytes(model):
    """Gradients, and how many bytes of activations forward keeps for backward."""
    kept, own = {}, {parameter.data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = packed_states(model, *texts())
    states.square().sum().backward()
    return {name: parameter.grad for name, parameter in adapters.trained(model).items()}, sum(kept.values())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("case", ["full", "frozen", "lora", "lora_dropout"])
def test_recomputed_activations_give_the_same_gradients_from_less_memory(family, case):
    def made():
        if case.startswith("lora"):
            model = adapted(("all-linear",), family=family, dropout=0.2 if case == "lora_dropout" else 0.0)
        else:
            model = tiny_models.model(family)
        if case == "frozen":
            adapters.frozen(model, ["model.embed_tokens.*", "*.layers.0.*"])
        attention.attach(model)
        return model.train()

    whole, recomputed = made(), made()
    adapters.checkpoint_activations(recomputed)
    torch.manual_seed(1)
    expected, kept = saved_bytes(whole)
    torch.manual_seed(1)
    gradients, kept_less = saved_bytes(recomputed)
    used = [name for name in expected if expected[name] is not None]
    assert len(used) > 10 and all(torch.equal(expected[name], gradients[name]) for name in used)
    assert kept_less < kept / 4


def test_a_model_that_cannot_recompute_is_refused():
    model = tiny_models.model()
    model.supports_gradient_checkpointing = False
    with pytest.raises(ValueError, match="must be able to recompute its layers; LlamaForCausalLM"):
        adapters.checkpoint_activations(model)
