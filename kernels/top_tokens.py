"""The likeliest tokens of each row, or given ones, with their log-probs, straight from hidden states.

    z = head(hidden @ weight.T) / temperature      ids[n] = the k largest of z[n]      logprobs = log_softmax(z)[ids]

Chunks of rows stream through one buffer of logits, and nothing but k numbers a row is kept: no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fuserl.kernels import head_outputs
from fuserl.kernels.head_products import HeadProducts, Lora, pieces, taken_rows
from fuserl.kernels.softmax_rows import accumulator

_NAME = "top_tokens"


@torch.no_grad()
def top_tokens(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    ids: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    temperature: float = 1.0,
    lora: tuple[Tensor, Tensor, float] | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of each row, the likeliest first, with their log-probs; those of given tokens with `ids`.

    Args:
        hidden: (N, D) of a floating dtype; logits are float32 whatever it is (float64 from float64).
        weight: (V, D), the head, of hidden's dtype.
        k: how many, 1 to V; with 1 it is the first among equals.
        ids: (N, k) int64, tokens to look up instead.
        bias, softcap, logit_scale, temperature, lora: what the head does to the product, as in `linear_logprob`.
        chunk: rows at a time, as there.

    Returns:
        (ids, logprobs), (N, k) int64 and float32 (float64 from float64), of the distribution over all V tokens.

    Raises:
        ValueError: k out of range, or a wrong shape or dtype.

    Memory: one chunk of float32 logits.
    """
    if not 1 <= k <= len(weight):
        raise ValueError(f"top_tokens: k must be 1 to {len(weight)}, the vocabulary; got {k}. Ask for fewer tokens.")
    hidden, weight = head_outputs.as_autocast(hidden), head_outputs.as_autocast(weight)
    head_outputs.check_head(_NAME, hidden, weight, bias)
    head_outputs.check_chunk(_NAME, chunk)
    dtype, count = accumulator(hidden.dtype), len(hidden)
    terms = {"bias": bias, "softcap": softcap, "logit_scale": logit_scale, "temperature": temperature}
    head = head_outputs.head_of(_NAME, hidden[..., 0], dtype, **terms)
    with torch.autocast(hidden.device.type, enabled=False):
        chunk = taken_rows(None, hidden, weight, chunk)[2]
        given = {"dtype": dtype, "bias": bias, "inner": head.inner, "lora": None if lora is None else Lora(*lora)}
        products = HeadProducts(hidden, weight, None, chunk=chunk, **given)
        found = hidden.new_empty((count, k), dtype=torch.int64) if ids is None else ids
        logprobs = hidden.new_empty((count, k), dtype=dtype)
        for piece in pieces(0, count, chunk):
            z = products.logits(piece).div_(head.temperatures(slice(None))[0])
            if ids is None:
                # topk says nothing of which comes first among equals.
                found[piece] = z.argmax(-1, keepdim=True) if k == 1 else z.topk(k)[1]
            logprobs[piece] = z.gather(-1, found[piece]) - z.logsumexp(-1, keepdim=True)
    return found, logprobs
