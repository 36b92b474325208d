"""What gaussian_logprob is tried on for the numerics page, and how a trainer writes it."""

from __future__ import annotations

import torch
from subjects import Subject
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from fuserl.kernels import gaussian_logprob

_DIMENSIONS = 32
_NAMES = ("logprob", "entropy", "kl", "d_mean", "d_log_std", "d_ref_mean", "d_ref_log_std")


def normals(kind: str, rows: int) -> tuple[Tensor, ...]:
    """Actions, means and scales of a policy and of a reference, and the gradients that come from above."""
    spread, apart = {"usual": (0.3, 0.3), "near": (0.3, 1e-4), "wide": (4.0, 1.0)}[kind]
    mean, log_std = torch.randn(rows, _DIMENSIONS), spread * torch.randn(rows, _DIMENSIONS)
    actions = mean + log_std.exp() * torch.randn(rows, _DIMENSIONS)
    ref_mean = mean + apart * log_std.exp() * torch.randn(rows, _DIMENSIONS)
    return actions, mean, log_std, ref_mean, log_std + apart * torch.randn(rows, _DIMENSIONS), torch.randn(3, rows)


def gaussian_logprob_run(backend: str, actions, mean, log_std, ref_mean, ref_log_std, g) -> dict[str, Tensor]:
    """The op with all of its results, and autograd through it."""
    leaves = [x.clone().requires_grad_() for x in (mean, log_std, ref_mean, ref_log_std)]
    out = gaussian_logprob.gaussian_logprob(
        actions, *leaves[:2], ref_mean=leaves[2], ref_log_std=leaves[3], entropy=True, backend=backend
    )
    return dict(zip(_NAMES, (*out, *torch.autograd.grad(out, leaves, list(g))), strict=True))


def gaussian_logprob_eager(actions, mean, log_std, ref_mean, ref_log_std, g) -> dict[str, Tensor]:
    """By torch.distributions."""
    leaves = [x.clone().requires_grad_() for x in (mean, log_std, ref_mean, ref_log_std)]
    policy, reference = Normal(leaves[0], leaves[1].exp()), Normal(leaves[2], leaves[3].exp())
    found = policy.log_prob(actions), policy.entropy(), kl_divergence(policy, reference)
    out = [x.sum(-1) for x in found]
    return dict(zip(_NAMES, (*out, *torch.autograd.grad(out, leaves, list(g))), strict=True))


SUBJECTS = {
    "gaussian_logprob": Subject(
        inputs=normals,
        run=gaussian_logprob_run,
        eager=gaussian_logprob_eager,
        implemented=gaussian_logprob.IMPLS,
        kinds={
            "usual": "32 dimensions, standard deviations around 1 and a reference 0.3 of them away",
            "near": "a reference 1e-4 away",
            "wide": "standard deviations from 1e-5 to 1e5, a reference one away",
        },
        dtypes=(torch.float32,),
    ),
}
