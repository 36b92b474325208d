"""Attention of a sequence that lies in slices on several ranks, and what one rank that has it whole computes.

The hosts' own (Ulysses, context parallelism, ring attention) want a GPU. All of them give each rank the outputs of its
slice, with every token of its text before it in sight; so does this, by a gather of everything.
"""

import torch
import torch.distributed as dist
from tolerance import check, check_rows
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

RANKS = 2


class Gathered(torch.autograd.Function):
    """The slices of all ranks along a dimension; the gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x, dim):
        ctx.dim = dim
        parts = [torch.empty_like(x) for _ in range(RANKS)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return mine(gradient, ctx.dim), None


def mine(x, dim=1):
    """This rank's slice."""
    return x.chunk(RANKS, dim)[dist.get_rank()]


def alone(module, query, key, value, attention_mask, position_ids=None, **_):
    """Causal, within the texts that start where a position is 0."""
    text = (position_ids == 0).cumsum(1)
    seen = (text[:, :, None] == text[:, None]).tril()[:, None]
    found = scaled_dot_product_attention(query, key, value, seen, enable_gqa=True)
    return found.transpose(1, 2).contiguous(), None


def slices(module, query, key, value, attention_mask, position_ids=None, **_):
    """The same of a sequence in slices."""
    query, key, value = (Gathered.apply(x, 2) for x in (query, key, value))
    return mine(alone(module, query, key, value, None, Gathered.apply(position_ids, 1))[0]), None


AttentionInterface.register("alone", alone)
AttentionInterface.register("slices", slices)


def gradients(model, total):
    """Summed over ranks, or averaged, as data parallelism over all of them does with a loss that each has whole."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for gradient in found.values():
        dist.all_reduce(gradient)
    return found if total else {name: gradient / RANKS for name, gradient in found.items()}


def same(got, true, plain):
    """(numbers, gradients by name): within the tolerance of what the host errs on one rank."""
    for at, (a, b, c) in enumerate(zip(got[0], true[0], plain[0], strict=True)):
        check(f"output {at}", a.detach(), b.detach(), c.detach(), torch.float32)
    assert got[1].keys() == true[1].keys()
    for name in true[1]:
        check_rows(name, *(x[1][name].reshape(len(x[1][name]), -1) for x in (got, true, plain)), torch.float32)
