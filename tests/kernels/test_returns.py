"""returns, lambda_returns and vtrace against textbook loops in float64, and the limits where they meet.

Triton takes the same tests under its interpreter, in the process that test_discounted_scan starts.
"""

import math

import numpy as np
import pytest
import torch
from backends import INTERPRETING, cpu_only, each_backend
from sequences import both_dtypes, each_segment, gae_by_hand, offsets_of
from tolerance import check

from fuserl.kernels.gae import gae
from fuserl.kernels.returns import lambda_returns, returns, vtrace

LENGTHS = [5, 0, 1, 90, 17]


def inputs(dtype=torch.float64, share=None):
    """log-ratios, rewards, values (2, N), values beyond each segment, mask or None, offsets."""
    offsets = offsets_of(LENGTHS)
    three = torch.randn(3, 2, int(offsets[-1]), dtype=dtype)
    mask = None if share is None else torch.rand(three[0].shape) < share
    return 0.5 * three[0], three[1], three[2], torch.randn(2, len(LENGTHS), dtype=dtype), mask, offsets


def vtrace_by_hand(log_ratio, rewards, values, bootstrap, mask, offsets, *, gamma, lam, rho, c, advantage_rho):
    """IMPALA's equation 1 as a double sum, in float64: products of c over the tokens before each difference."""
    out = torch.zeros(2, *rewards.shape, dtype=torch.float64)
    for row in range(len(rewards)):
        for s, segment in enumerate(each_segment(offsets)):
            kept = [t for t in segment if mask is None or mask[row, t]]
            w = log_ratio[row, kept].double().exp().tolist()
            r, v = (x[row, kept].double().tolist() for x in (rewards, values))
            v.append(float(bootstrap[row, s]))
            targets = []
            for i in range(len(kept)):
                total, product = v[i], 1.0
                for j in range(i, len(kept)):
                    total += product * min(rho, w[j]) * (r[j] + gamma * v[j + 1] - v[j])
                    product *= gamma * lam * min(c, w[j])
                targets.append(total)
            targets.append(v[-1])
            for i, t in enumerate(kept):
                out[0, row, t] = targets[i]
                out[1, row, t] = min(advantage_rho, w[i]) * (r[i] + gamma * targets[i + 1] - v[i])
    return out


@each_backend
@pytest.mark.parametrize("share", [None, 0.6])
@pytest.mark.parametrize(
    "bounds",
    [
        {"lam": 1.0, "rho": 1.0, "c": 1.0, "advantage_rho": 1.0},
        {"lam": 0.9, "rho": 2.0, "c": 0.7, "advantage_rho": math.inf},
    ],
)
def test_vtrace(bounds, share, device, backend):
    log_ratio, rewards, values, beyond, mask, offsets = inputs(share=share)
    truth = vtrace_by_hand(log_ratio, rewards, values, beyond, mask, offsets, gamma=0.95, **bounds)
    bad = [x if mask is None else torch.where(mask, x, torch.nan).to(device) for x in (log_ratio, rewards, values)]
    there = {"bootstrap": beyond, "offsets": offsets, **({} if mask is None else {"mask": mask})}
    there = {name: x.to(device) for name, x in there.items()}
    got = vtrace(*(x.to(device) for x in bad), gamma=0.95, backend=backend, **bounds, **there)
    for some, others in zip(got, truth, strict=True):
        assert torch.allclose(some.cpu(), others, atol=1e-11)


@each_backend
@both_dtypes
@pytest.mark.parametrize("share", [None, 0.6])
def test_returns_and_lambda_returns(share, dtype, device, backend):
    _, rewards, values, beyond, mask, offsets = inputs(dtype, share)
    for bootstrap in (None, beyond):
        how = {"mask": mask, "bootstrap": bootstrap}
        there = {name: None if x is None else x.to(device) for name, x in {**how, "offsets": offsets}.items()}
        for lam in (0.8, 1.0):
            truth, plain = (
                gae_by_hand(rewards, values, 0.9, lam, offsets, precision=precision, **how)[1]
                for precision in (np.longdouble, rewards.numpy().dtype.type)
            )
            got = lambda_returns(
                rewards.to(device), values.to(device), gamma=0.9, lam=lam, backend=backend, **there
            ).cpu()
            check("lambda-returns", got, truth, plain, dtype)
        check("returns", returns(rewards.to(device), gamma=0.9, backend=backend, **there).cpu(), truth, plain, dtype)


@each_backend
def test_where_they_meet(device, backend):
    log_ratio, rewards, values, beyond, mask, offsets = (x.to(device) for x in inputs(share=0.7))
    how = dict(gamma=0.9, bootstrap=beyond, mask=mask, offsets=offsets, backend=backend)
    same = torch.zeros_like(log_ratio)
    targets, advantages = vtrace(same, rewards, values, **how)
    assert torch.allclose(targets, returns(rewards, **how), atol=1e-12)  # on policy
    assert torch.allclose(advantages, targets - torch.where(mask, values, 0.0), atol=1e-12)
    targets, _ = vtrace(same, rewards, values, lam=0.8, **how)
    both = gae(rewards, values, lam=0.8, **how)[1], lambda_returns(rewards, values, lam=0.8, **how)
    assert all(torch.allclose(targets, each, atol=1e-12) for each in both)
    dense = returns(rewards, gamma=0.9, bootstrap=beyond[:, 0], backend=backend)
    assert torch.allclose(dense[:, -1], rewards[:, -1] + 0.9 * beyond[:, 0])


@each_backend
@pytest.mark.parametrize("share", [None, 0.7])
def test_gradients(share, device, backend):
    leaves = [x if x is None else x.to(device) for x in inputs(share=share)]
    *leaves, mask, _ = leaves
    offsets = offsets_of([2, 0, 1, 6, 3]).to(device)
    leaves = [x[:, : 12 if i < 3 else 5].clone().requires_grad_() for i, x in enumerate(leaves)]
    mask = None if mask is None else mask[:, :12]
    how = dict(offsets=offsets, mask=mask, backend=backend, gamma=0.9)
    check = dict(fast_mode=INTERPRETING)
    assert torch.autograd.gradcheck(
        lambda w, r, v, beyond: vtrace(w, r, v, bootstrap=beyond, lam=0.8, rho=1.3, **how), leaves, **check
    )
    assert torch.autograd.gradcheck(
        lambda r, v, beyond: lambda_returns(r, v, bootstrap=beyond, lam=0.8, **how), leaves[1:], **check
    )
    assert torch.autograd.gradcheck(
        lambda r, beyond: returns(r, bootstrap=beyond, **how), (leaves[1], leaves[3]), **check
    )


@cpu_only
def test_wrong_arguments_are_refused():
    x = torch.ones(8)
    with pytest.raises(ValueError, match=r"^vtrace: rho must be positive; got 0"):
        vtrace(x, x, x, gamma=1.0, rho=0)
    with pytest.raises(ValueError, match=r"^vtrace: rewards must broadcast to \(8,\)"):
        vtrace(x, x[:3], x, gamma=1.0)
    with pytest.raises(ValueError, match=r"^returns: bootstrap must be \(1,\)"):
        returns(x, gamma=1.0, offsets=torch.tensor([0, 8]), bootstrap=torch.ones(2))
    with pytest.raises(ValueError, match=r"^lambda_returns: gamma must broadcast"):
        lambda_returns(x, x, gamma=torch.ones(2), lam=1.0)


@cpu_only
def test_compile():
    log_ratio, rewards, values, beyond, mask, offsets = inputs(share=0.7)

    def all_of_them(w, r, v):
        how = dict(gamma=0.9, bootstrap=beyond, mask=mask, offsets=offsets)
        return *vtrace(w, r, v, **how), returns(r, **how), lambda_returns(r, v, lam=0.8, **how)

    compiled = torch.compile(all_of_them, fullgraph=True, backend="aot_eager")
    for some, others in zip(compiled(log_ratio, rewards, values), all_of_them(log_ratio, rewards, values), strict=True):
        assert torch.allclose(some, others, atol=1e-13)
