"""What preference_loss is tried on for the numerics page, and how a trainer writes it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from subjects import Subject
from torch import Tensor

from fuserl.kernels import preference_loss
from fuserl.kernels.preferences import DPO, ORPO

_DPO, _ORPO = DPO(beta=0.1, label_smoothing=0.1), ORPO(lam=0.1)


def pairs_of(kind: str, rows: int) -> tuple[Tensor, ...]:
    """Log-probs of the policy and of the reference, where rollouts begin, and the gradients that come from above."""
    count = 8 if rows < 1000 else 64
    cuts = torch.randperm(rows - 1)[: count - 1].sort().values + 1
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), cuts, torch.tensor([rows])])
    spread = {"usual": 0.1, "near": 1e-4, "far": 3.0}[kind]
    reference = -3 * torch.rand(rows)
    return reference - spread * torch.rand(rows), reference, offsets, torch.randn(count // 2)


def preference_loss_run(backend: str, logprobs: Tensor, reference: Tensor, offsets: Tensor, g: Tensor):
    """The op in two forms, and autograd through it."""
    leaf, op = logprobs.clone().requires_grad_(), preference_loss.preference_loss
    dpo, _, statistics = op(leaf, _DPO, offsets=offsets, ref_logprobs=reference, backend=backend)
    orpo, *_ = op(leaf, _ORPO, offsets=offsets, backend=backend)
    gradients = [torch.autograd.grad(losses, leaf, g)[0] for losses in (dpo, orpo)]
    names = "losses", "odds", "gradient", "d_odds", "statistics"
    return dict(zip(names, (dpo, orpo, *gradients, statistics[[1, 5, 6], None]), strict=True))


def preference_loss_eager(logprobs: Tensor, reference: Tensor, offsets: Tensor, g: Tensor):
    """The losses as trainers write them, of sums by index."""
    leaf, lengths = logprobs.clone().requires_grad_(), offsets.diff()
    rollout = torch.arange(len(lengths)).repeat_interleave(lengths)

    def sums(x):
        return x.new_zeros(len(lengths)).index_add(0, rollout, x)

    won, lost = (0.1 * (sums(leaf) - sums(reference))).chunk(2)
    dpo = -0.9 * F.logsigmoid(won - lost) - 0.1 * F.logsigmoid(lost - won)
    chosen, rejected = (sums(leaf) / lengths).chunk(2)
    odds = chosen - rejected - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    orpo = -chosen - 0.1 * F.logsigmoid(odds)
    gradients = [torch.autograd.grad(losses, leaf, g, retain_graph=True)[0] for losses in (dpo, orpo)]
    statistics = torch.stack([(won - lost).sum(), won.sum(), lost.sum()])[:, None]
    names = "losses", "odds", "gradient", "d_odds", "statistics"
    return dict(zip(names, (dpo, orpo, *gradients, statistics), strict=True))


SUBJECTS = {
    "preference_loss": Subject(
        inputs=pairs_of,
        run=preference_loss_run,
        eager=preference_loss_eager,
        implemented=preference_loss.IMPLS,
        kinds={
            "usual": "DPO and ORPO of ragged pairs, log-probs apart by up to 0.1 from the reference",
            "near": "by 1e-4",
            "far": "by 3",
        },
        dtypes=(torch.float32,),
    ),
}
