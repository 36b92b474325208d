"""Attention over packed rollouts: `attn_implementation="fuserl"`, for transformers models of any trainer.

    from fuserl import attention
    attention.attach(model)                                  # or from_pretrained(..., attn_implementation="fuserl")
    packed = attention.pack(prompt_tokens, group, tokens, offsets)
    hidden = model.model(**packed.inputs()).last_hidden_state[0].index_select(0, packed.predictor)

A group's prompt stands once in the packed input, followed by its rollouts; each rollout attends to its own tokens and
to the prompt, never to a sibling or another group:

    p0 p1 p2 | a0 a1 | b0 b1 b2 ||| q0 q1 | c0 c1        a1 sees p0 p1 p2 a0 a1;  c1 sees q0 q1 c0 c1

The layout travels as the keyword `segments` through the model's forward to the attention function, so nothing global is
set and gradient checkpointing recomputes the same thing. Without `segments` this is transformers' "sdpa", padding and
all: a padded batch is masked as there, never attended silently.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from fuserl.families import unsupported
from fuserl.kernels.tree_layout import Packed, Scores, Segments, dense, pack

__all__ = ["NAME", "Packed", "Segments", "attach", "attention", "pack"]

NAME = "fuserl"
# Arguments that models send along to every attention function and that do not change what attention computes here.
_IRRELEVANT = {"position_ids", "use_cache", "cache_position", "output_hidden_states", "return_dict", "layer_idx",
               "num_items_in_batch"}  # fmt: skip


class Layout(Protocol):
    """What `segments=` accepts: something that knows which keys each query of a pass may see."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """Attention of one layer: query (1, H, L, D), key and value (1, Hkv, L, D) -> (1, H, L, D)."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    segments: Layout | None = None,
    **others,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in every layer.

    Args:
        query: (B, H, L, D); key and value (B, Hkv, Lk, D).
        attention_mask: what transformers made of the padding mask; with `segments`, nothing or the marker of
            `Packed.inputs`.
        segments: who sees whom, for packed input.

    Returns:
        (B, L, H, D), and None in place of the weights.

    Raises:
        ValueError: something in the call would be ignored: an unknown argument, or a padding mask beside `segments`; or
            the model did not pass `segments` on.
    """
    for name, given in others.items():
        harmless = given is None or given is (name == "is_causal") or name in _IRRELEVANT
        if not harmless:
            raise ValueError(f"attention: {name} must be absent, as {NAME!r} would ignore it; got {given!r:.80}. "
                             f"Use attn_implementation='sdpa' or 'eager' for this model")  # fmt: skip
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, dropout)
    # Under autocast values come 16-bit from their projection, queries and keys float32 from the rotary embedding.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if segments is not None:
        if attention_mask is not None and attention_mask.shape != (1, 1, 1, 1):
            raise ValueError(
                f"attention: attention_mask must be absent beside segments; got shape {tuple(attention_mask.shape)}. "
                "Pass **packed.inputs() alone: packed input has no padding"
            )
        _check_window(module, sliding_window)
        return segments.attend(module.layer_idx, query, key, value, scores).transpose(1, 2).contiguous(), None
    if attention_mask is not None and attention_mask.numel() == 1 < key.shape[2]:
        raise ValueError(
            f"attention: segments must arrive with packed input; got None. {type(module).__name__} drops what it does "
            "not know: use another model"
        )
    if attention_mask is None and query.shape[2] == 1:
        # A single query comes last: causal, it sees every key.
        attention_mask = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool, device=query.device)
    elif attention_mask is not None and attention_mask.dtype != torch.bool:
        raise ValueError(f"attention: attention_mask must be bool; got {attention_mask.dtype}. Give True where visible")
    return dense(query, key, value, attention_mask, scores).transpose(1, 2).contiguous(), None


def attach(model: nn.Module) -> None:
    """Sets the model's attention to "fuserl".

    Raises:
        ValueError: the model has layers that would silently ignore the layout.
    """
    reason = unsupported(model)
    if reason is not None:
        raise ValueError(f"attach: model must use full or sliding-window attention only; {reason}. Use another model")
    model.set_attn_implementation(NAME)


def _check_window(module: nn.Module, window: int | None) -> None:
    """A windowed layer whose window never reaches the attention function would see too far: refuse it."""
    types = getattr(getattr(module, "config", None), "layer_types", None)
    if types and types[module.layer_idx] == "sliding_attention" and window is None:
        raise ValueError(
            f"attention: sliding_window must be given for layer {module.layer_idx}; got None. "
            f"{type(module).__name__} keeps its window to itself: use another model"
        )


def _mask(*args, **kwargs) -> Tensor | None:
    """The boolean mask of transformers' "sdpa": padding is masked under "fuserl" exactly as there."""
    return AttentionMaskInterface._global_mapping["sdpa"](*args, **kwargs)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _mask)
