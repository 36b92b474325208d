"""chunked_context_attention forward and backward as the thinking grows: linear in it, where one long context is not."""

import pytest
import torch
from measure import Provider, compare
from torch.nn.functional import scaled_dot_product_attention

from fuserl.kernels.chunked_context_attention import chunk_lengths, chunked_context_attention

QUERY, CHUNK, CARRY = 64, 512, 256


@pytest.mark.parametrize("thinking", [1024, 2048, 4096, 8192])
def test_chunked_context_attention_forward_backward(benchmark, device, smoke, thinking):
    factor = 16 if device == "cuda" else 1
    query, chunk, carry, thinking = (x * factor // (32 if smoke else 1) for x in (QUERY, CHUNK, CARRY, thinking))
    heads, dim, dtype = (32, 128, torch.bfloat16) if device == "cuda" else (4, 64, torch.float32)
    lengths = chunk_lengths(thinking, chunk, carry)

    def leaves(tokens):
        return [torch.randn(tokens, heads, dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]

    packed, long = leaves(query + sum(lengths)), leaves(query + thinking)

    def chunks():
        out, _ = chunked_context_attention(*packed, [query], [[lengths]])
        return out.detach(), *torch.autograd.grad(out, packed, out.detach())

    def whole():
        out = scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in long), is_causal=True)
        return out.detach(), *torch.autograd.grad(out, long, out.detach())

    def each(results):
        """Every chunk behind the query is an ordinary causal text."""
        start = query
        for length in lengths:
            line = [*range(query), *range(start, start + length)]
            q, k, v = (x[line].detach().float().transpose(0, 1) for x in packed)
            alone = scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0, :, query:].transpose(
                0, 1
            )
            limit = 2e-2 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(results[0][start : start + length].float(), alone, rtol=limit, atol=limit)
            start += length

    compare(
        benchmark,
        Provider("torch SDPA, one context", whole),
        Provider("fuserl, chunks", chunks, each),
        rounds=5,
        smoke=smoke,
    )
