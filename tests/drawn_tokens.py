"""What the tests of drawing tokens share: logits, cuts, names of rows, and the definition in float64."""

import math

import torch

from fuserl.kernels.philox import random_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CUTS = [
    {}, {"temperature": 0.3}, {"temperature": 0.0}, {"temperature": 30.0}, {"top_k": 1}, {"top_k": 7}, {"top_p": 0.8},
    {"top_p": 1e-6}, {"top_p": 0.999}, {"min_p": 0.05}, {"min_p": 1.0}, {"top_k": 40, "top_p": 0.7},
    {"top_k": 300, "top_p": 0.9, "min_p": 0.01, "temperature": 0.7}, {"top_k": 3, "min_p": 0.3},
]  # fmt: skip


def peaky(rows, vocabulary, dtype=torch.float32):
    return (4 * torch.randn(rows, vocabulary)).to(dtype)


def names(rows, device="cpu"):
    """Seed, rollouts and positions that differ in every row, and in every word of the counter."""
    at = torch.arange(rows, device=device)
    return {"seed": -(2**40) - 3, "rollout_ids": at * 2**33 - 5, "positions": at % 3 + (at << 34)}


def allowed(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Log-probs (N, V) float64 after the cuts, by a sort; and the uncut ones."""
    x = logits.double()
    greedy = temperature == 0
    full = (x / (temperature or 1.0)).log_softmax(-1)
    cut = full.clone()
    if 0 < top_k < x.shape[1]:
        cut[x < x.topk(top_k).values[:, -1:]] = -torch.inf
    if top_p < 1:
        p, order = cut.softmax(-1).sort(descending=True, stable=True)
        before = p.cumsum(-1) - p
        last = (before < top_p).sum(-1, keepdim=True) - 1
        cut[x < x.gather(-1, order).gather(-1, last.clamp_min(0))] = -torch.inf
    if min_p > 0:
        cut[full < full.amax(-1, keepdim=True) + math.log(min_p) - 1e-9] = -torch.inf
    if greedy:
        cut = torch.full_like(full, -torch.inf).scatter(-1, x.argmax(-1, keepdim=True), 0.0)
    return cut.log_softmax(-1), full


def uniforms(rows):
    """The numbers in [0, 1) that `names` stand for."""
    given = names(rows)
    bits = random_bits(given["seed"], given["rollout_ids"], given["positions"]).tolist()
    return torch.tensor([bit % 2**64 / 2**64 for bit in bits], dtype=torch.float64)


def grid(count):
    """`count` numbers evenly over [0, 2^64), as int64."""
    bits = [(2 * i + 1) * 2**63 // count for i in range(count)]
    return torch.tensor([(bit + 2**63) % 2**64 - 2**63 for bit in bits])
