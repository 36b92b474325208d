"""Tiny random models of several families, and a tokenizer of 64 letters, for tests."""

import types

import torch
import transformers

VOCABULARY = 64
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_GEMMA = dict(sliding_window=7, query_pre_attn_scalar=5)
FAMILIES = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", dict(sliding_window=6)),
    "gemma3": ("Gemma3", dict(**_GEMMA, layer_types=["sliding_attention", "full_attention", "sliding_attention"])),
    "gemma2": ("Gemma2", dict(**_GEMMA, attn_logit_softcapping=5.0, final_logit_softcapping=4.0)),
}


def model(family="llama", dtype=torch.float32, **changes):
    """A model of a family, its weights large enough that attention is far from uniform and greedy choices from ties."""
    name, options = FAMILIES[family]
    config = getattr(transformers, f"{name}TextConfig" if family == "gemma3" else f"{name}Config")
    torch.manual_seed(3)
    made = getattr(transformers, f"{name}ForCausalLM")(config(**{**SIZES, **options, **changes}))
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(6)
    return made.to(dtype).eval()


class Letters:
    """One token per letter: '0'..'9', 'a'.. and on; token 2 ends a text and is not shown."""

    def __call__(self, text):
        return types.SimpleNamespace(input_ids=[ord(letter) - 48 for letter in text])

    def decode(self, tokens, skip_special_tokens, clean_up_tokenization_spaces):
        return "".join(chr(token + 48) for token in tokens if not (skip_special_tokens and token == 2))
