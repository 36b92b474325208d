"""Which models may be given packed rollouts: families whose packed logits and gradients were tried against plain ones.

A layer that mixes tokens by anything but the attention function, or that calls it without the layout, would let
rollouts see each other in silence. No look at a model shows that there is none, so an untried family is refused.
"""

from __future__ import annotations

from torch import nn

TESTED = frozenset({
    "apertus", "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4",
    "gpt2", "gpt_neox", "granite", "helium", "hunyuan_v1_dense", "llama", "ministral", "mistral", "mixtral", "olmo",
    "olmo2", "olmo3", "olmoe", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss",
    "smollm3", "starcoder2",
})  # fmt: skip
_LAYER_TYPES = {"full_attention", "sliding_attention"}


def unsupported(model: nn.Module) -> str | None:
    """Why this model's forward cannot be given `segments`, or None if it can.

    Args:
        model: a transformers causal language model.
    """
    config, name = model.config.get_text_config(), type(model).__name__
    types = set(getattr(config, "layer_types", None) or ())
    parameters = {each.rpartition(".")[2] for each, _ in model.named_parameters()}
    if getattr(config, "kv_lora_rank", None):
        return f"{name} has latent attention"
    if parameters & {"sinks", "sink"}:
        return f"{name} has attention sinks"
    if parameters & {"A_log", "ssm_state"} or any(isinstance(module, nn.Conv1d) for module in model.modules()):
        return f"{name} has state-space or convolution layers"
    if types - _LAYER_TYPES:
        return f"{name} has layers of type {', '.join(sorted(types - _LAYER_TYPES))}"
    if not getattr(model, "_supports_attention_backend", False):
        return f"{name} does not call attention through transformers' AttentionInterface"
    if getattr(config, "num_kv_shared_layers", 0):
        return f"{name} shares keys and values between layers"
    if bidirectional(model):
        return f"{name} attends in both directions"
    if config.model_type not in TESTED:
        return f"{name} is of the family {config.model_type}, in which packed rollouts were never tried"
    return None


def bidirectional(model: nn.Module) -> bool:
    """Whether a token's state depends on what comes after it, so that the model is no language model to draw from."""
    encodes = any(getattr(module, "is_causal", True) is False for module in model.get_decoder().modules())
    return encodes or getattr(model.config.get_text_config(), "use_bidirectional_attention", False)
