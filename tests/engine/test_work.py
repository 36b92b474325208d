"""Work of a model's passes: operations as torch counts those of a plain forward and backward, keys one by one."""

import pytest
import tiny_models
import torch
from torch.utils.flop_counter import FlopCounterMode

from fuserl.engine import adapters
from fuserl.engine.batch import Rollouts
from fuserl.engine.prompts import Prompt
from fuserl.engine.work import Costs, Work


def counted(function):
    """Operations of the matrix products that torch runs in a function."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def products(model, tokens, rows, *, backward):
    """Operations outside attention: of the layers over `tokens`, of the head over the last `rows` of them."""
    model.set_attn_implementation("eager")

    def run():
        states = model.get_decoder()(tokens[None], attention_mask=None).last_hidden_state[0, len(tokens) - rows :]
        loss = model.get_output_embeddings()(states).sum()
        if backward:
            loss.backward()

    with torch.set_grad_enabled(backward):
        whole = counted(run)
    # Eager attention multiplies every query with every key, those to come as well: two products, and four backward.
    config = model.config.get_text_config()
    full = 4 * config.num_attention_heads * config.head_dim * len(tokens) ** 2 * config.num_hidden_layers
    return whole - full * (3 if backward else 1)


def attention(width, seen):
    """Operations of one layer's attention: each query alone with the keys that it sees."""
    heads, each = width
    return sum(
        counted(lambda k=k: torch.softmax(torch.ones(heads, 1, each) @ torch.ones(heads, each, k), -1)
                @ torch.ones(heads, k, each))
        for k in seen
    )  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("rows", [11, 4])
def test_operations_are_those_that_torch_counts(family, rows):
    model, tokens = tiny_models.model(family), torch.arange(11)
    costs = Costs(model, torch.float32)
    windows = {"llama": [11] * 3, "mistral": [6] * 3, "gemma2": [7, 11, 7]}[family]
    if family != "llama":
        assert min(windows) < len(tokens)
    seen = sum(attention((4, 8), [min(p + 1, window) for p in range(11)]) for window in windows)
    assert costs.forward(tokens, rows).flops == products(model, tokens, rows, backward=False) + seen
    assert costs.update(tokens, rows).flops == products(model, tokens, rows, backward=True) + 3 * seen
    assert costs.forward(tokens, rows).tokens == 11


def test_frozen_weights_have_no_gradient_to_compute():
    model, tokens = tiny_models.model(), torch.arange(9)
    whole = Costs(model, torch.float32).update(tokens, 9).flops
    adapters.frozen(model, ["*.mlp.*", "lm_head.*"])
    fewer = Costs(model, torch.float32).update(tokens, 9).flops
    assert fewer == whole - 2 * 9 * (3 * 3 * 32 * 48 + 64 * 32)
    attention = 3 * 3 * 4 * 32 * 45
    assert fewer == products(model, tokens, 9, backward=True) + attention


def test_adapters_count_and_what_they_stand_beside_is_frozen():
    model = tiny_models.model()
    plain = Costs(model, torch.float32).forward(torch.arange(9), 0).flops
    adapted = adapters.lora(model, rank=2, alpha=2.0, targets=["q_proj"])
    costs = Costs(adapted, torch.float32)
    assert costs.forward(torch.arange(9), 0).flops == plain + 2 * 9 * 3 * 2 * (32 + 32)
    assert costs.trained == 3 * 2 * (32 + 32) and costs.head_trained == 0


def test_a_token_is_multiplied_with_the_experts_that_it_uses():
    import transformers

    sizes = {**tiny_models.SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)).eval()
    model.config._experts_implementation = "eager"
    tokens = torch.arange(9)
    found = Costs(model, torch.float32).forward(tokens, 9).flops
    assert found == products(model, tokens, 9, backward=False) + 3 * 4 * 32 * 45


def test_a_layer_that_is_no_attention_has_weights_alone():
    import transformers

    model = tiny_models.model()
    whole, position = Costs(model, torch.float32).forward(torch.arange(9), 9).flops, torch.arange(9)
    model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    assert Costs(model, torch.float32).forward(position, 9).flops == whole - 4 * 32 * 45
    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    other = Costs(transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)), torch.float32)
    assert other.weights > 0 and other.forward(position, 0).flops == 2 * 9 * other.weights


def rollouts(prompts, lengths):
    """Rollouts of prompts of these tokens, with so many tokens each."""
    group = torch.tensor([g for g, several in enumerate(lengths) for _ in several])
    flat = [each for several in lengths for each in several]
    return Rollouts(
        prompts=[Prompt("") for _ in prompts], prompt_tokens=[torch.tensor(each) for each in prompts], group=group,
        tokens=torch.zeros(sum(flat), dtype=torch.int64), offsets=torch.tensor([0, *flat]).cumsum(0),
        rollout_logprobs=torch.zeros(sum(flat)), texts=[""] * len(flat), finish=["stop"] * len(flat),
    )  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("begin", [[], list(range(20))], ids=["apart", "alike"])
def test_generation_reads_each_prompt_once_and_every_drawn_token_but_the_last(family, begin):
    prompts, lengths = [[*begin, 1, 2, 3], [*begin, 4], [*begin, 5, 6]], [[3, 1, 9], [1, 1, 1], [5, 2, 2]]
    made, costs = rollouts(prompts, lengths), Costs(tiny_models.model(family), torch.float32)
    windows = {"llama": [99] * 3, "mistral": [6] * 3, "gemma2": [7, 99, 7]}[family]
    read, drawn = costs.generation(made)
    tokens = [(None, p) for p in range(len(begin))]
    tokens += [(g, p) for g, prompt in enumerate(prompts) for p in range(len(begin), len(prompt))]
    fed = [(g, b, len(prompts[g]) + t) for g, several in enumerate(lengths) for b, n in enumerate(several)
           for t in range(n - 1)]  # fmt: skip
    keys = sum(min(p + 1, w) for _, p in tokens for w in windows)
    later = sum(min(p + 1, w) for _, _, p in fed for w in windows)
    assert read.tokens == len(tokens) and drawn.tokens == sum(map(sum, lengths))
    assert read.flops == 2 * costs.weights * len(tokens) + 4 * 32 * keys + 2 * costs.head * 3
    assert drawn.flops == 2 * (costs.weights + costs.head) * len(fed) + 4 * 32 * later
    # What each pass must read: a key and a value (2 heads of 8) of every token that one of its rollouts sees, once.
    stored = 0
    for w in windows:
        for t in range(max(map(max, lengths)) - 1):
            needed = set()
            for g, b, p in fed:
                if p == len(prompts[g]) + t:
                    place = [(g, None if k < len(prompts[g]) else b, k) for k in range(max(0, p + 1 - w), p + 1)]
                    needed.update(place)
            stored += len(needed)
    weights = 4 * (costs.weights + costs.head)
    assert drawn.bytes == 8 * weights + 4 * 2 * 2 * 8 * stored
    assert read.bytes == weights + 4 * 2 * 2 * 8 * len(tokens) * 3


def test_work_adds_up():
    assert sum([Work(1, 2.0, 3.0), Work(4, 5.0, 6.0)], Work()) == Work(5, 7.0, 9.0)
