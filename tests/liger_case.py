"""Ours and Liger's of one name against a definition in float64, for the drop-in's tests."""

import importlib.util

import torch
from tolerance import check, check_rows

PERMUTATIONS = 8
LIGER = importlib.util.find_spec("liger_kernel") is not None  # without it ours is held against the definition alone


def values_and_gradients(call, leaves, dtype=None):
    """What `call(*leaves)` returns, (loss, others), detached in one list, and the gradients of twice the loss."""
    leaves = [None if x is None else x.to(dtype or x.dtype).clone().requires_grad_() for x in leaves]
    loss, others = call(*leaves)
    gradients = torch.autograd.grad(2 * loss, [x for x in leaves if x is not None])
    return [loss.detach(), *(x.detach() for x in others)], gradients


def compare(ours, definition, leaves, theirs=None):
    """Ours within the allowance around the definition, in values and gradients; Liger near it where it is given.

    Leaves are hidden (..., D), weight (V, D) and bias or None. A scalar may cancel, so that one float32 evaluation may
    be right by luck: plain is some of them, which differ in the order of the sums over D.
    """
    dtype, width = leaves[0].dtype, leaves[0].shape[-1]
    truth, d_truth = values_and_gradients(definition, leaves, torch.float64)
    plain = []
    for order in [torch.arange(width), *(torch.randperm(width) for _ in range(PERMUTATIONS))]:
        permuted = leaves[0][..., order], leaves[1][:, order], *leaves[2:]
        values, gradients = values_and_gradients(definition, permuted, torch.float32)
        plain.append([*values, *(g[..., order.argsort()] for g in gradients[:2]), *gradients[2:]])
    got, d_got = values_and_gradients(ours, leaves)
    assert len(got) == len(truth)
    for n, (a, b, *c) in enumerate(zip(got, truth, *plain, strict=False)):
        assert a.shape == b.shape and a.dtype == torch.float32
        check(f"value {n}", *(x.expand(len(plain), *x.shape) for x in (a, b)), torch.stack(c), torch.float32)
    plain = [each[len(got) :] for each in plain]
    for name, a, b, *c in zip(("d_hidden", "d_weight", "d_bias"), d_got, d_truth, *plain, strict=False):
        rows = [x.expand(len(plain), *x.shape) for x in (a, b)]
        check_rows(name, *(x.reshape(-1, x.shape[-1]) for x in (*rows, torch.stack(c))), dtype, torch.float32)
    if theirs is not None:
        other, d_other = values_and_gradients(theirs, leaves)
        for a, b in zip((*other, *d_other), (*truth, *d_truth), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
