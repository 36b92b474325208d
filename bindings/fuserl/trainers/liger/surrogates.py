"""The token losses of Liger's GRPO class: plain torch on the few numbers that a token has.

    log_ratio = logprob - old        ratio = exp(log_ratio), or of its mean over the rollout ("sequence")
    grpo, bnpo, dr_grpo, dapo, luspo:  -min(min(ratio, delta) A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) A)
    cispo:  -min(ratio, epsilon_high) A logprob        sapo:  -4 / t sigmoid(t (ratio - 1)) A       (t by the sign of A)
    vespo:  -phi A logprob,    phi = e^lam w^k e^(-lam w),    w = exp(sum of the rollout's log_ratio)  (k, lam by A's)
    each times vllm_is_ratio (in vespo it is part of w), plus beta k3 (times ratio with use_bias_correction_kl)

The factors min(ratio, epsilon_high) and phi carry no gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fuserl.kernels.head_outputs import Outputs, requirer
from fuserl.kernels.segment_sum import segment_sum, to_tokens

_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
_SMOOTH = ("cispo", "sapo", "vespo")  # whose own rule stands in the place of the clip, and which take single tokens
LEAST_LOG_WEIGHT = math.log(1e-8)  # of a rollout's log-weight in vespo


@dataclass(frozen=True)
class Settings:
    """What LigerFusedLinearGRPOLoss is told once, by its names; checked when made."""

    beta: float
    epsilon_low: float
    epsilon_high: float
    loss_type: str
    max_completion_length: int | None
    importance_sampling_level: str
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    delta: float | None
    use_bias_correction_kl: bool
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float

    def __post_init__(self):
        require, kind, level = requirer("LigerFusedLinearGRPOLoss"), self.loss_type, self.importance_sampling_level
        kinds = (*_CLIPPED, *_SMOOTH)
        require(kind in kinds, f"loss_type must be one of {', '.join(kinds)}", repr(kind), "Correct the name.")
        require(
            level == "token" or (level == "sequence" and kind in _CLIPPED),
            f"importance_sampling_level must be 'token'{' or sequence' if kind in _CLIPPED else ''} with {kind}",
            repr(level), f"Sequence-level ratios are for {', '.join(_CLIPPED)}.",
        )  # fmt: skip
        for name in ("sapo_temperature_pos", "sapo_temperature_neg", "delta"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} must be positive", value, "Correct the number.")
        require(
            self.delta is None or kind in _CLIPPED, f"delta must be left out with {kind}, which has no such bound",
            self.delta, f"It is for {', '.join(_CLIPPED)}.",
        )  # fmt: skip
        require(
            kind != "dr_grpo" or self.max_completion_length is not None,
            "max_completion_length must be given with dr_grpo", None, "It is the loss's denominator.",
        )  # fmt: skip

    @property
    def scope(self) -> str:
        """What linear_policy_loss must show of the tokens at once."""
        sequence = self.importance_sampling_level == "sequence" or self.loss_type == "vespo"
        return "rollout" if sequence else "token"

    def surrogate(self, logprob: Tensor, log_weight: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """Policy loss of each token, and whether its ratio is clipped, (n,) bool.

        Args:
            log_weight: (n,), log of the ratio; in vespo of the rollout's weight w.
            a: (n,), advantages.
        """
        kind, ratio = self.loss_type, log_weight.exp()
        if kind in _CLIPPED:
            low, high = 1 - self.epsilon_low, 1 + self.epsilon_high
            bounded = ratio if self.delta is None else ratio.clamp(max=self.delta)
            losses = -torch.min(bounded * a, ratio.clamp(low, high) * a)
            return losses, (ratio < low) & (a < 0) | (ratio > high) & (a > 0)
        if kind == "cispo":
            losses = -ratio.clamp(max=self.epsilon_high).detach() * a * logprob
            return losses, (ratio > self.epsilon_high) & (a > 0)
        if kind == "sapo":
            t = torch.where(a > 0, self.sapo_temperature_pos, self.sapo_temperature_neg).to(a.dtype)
            return -4 / t * torch.sigmoid(t * (ratio - 1)) * a, torch.zeros_like(a, dtype=torch.bool)
        k = torch.where(a >= 0, self.vespo_k_pos, self.vespo_k_neg).to(a.dtype)
        lam = torch.where(a >= 0, self.vespo_lambda_pos, self.vespo_lambda_neg).to(a.dtype).clamp(min=1e-4)
        phi = (lam + k * log_weight - lam * ratio).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        return -phi.detach() * a * logprob, torch.zeros_like(a, dtype=torch.bool)


@dataclass
class TokenLoss:
    """The loss as linear_policy_loss calls it: on some tokens of n, weighted, with its two sums for the metrics.

    Args:
        mask, advantages, weights: (n,), the mask's value, and what a token's loss is multiplied by.
        old, reference: (n,), log-probs; None for the policy's own, and for no KL term.
        ratio: (n,), vllm_is_ratio, or None.
        log_ratio: (B,), its logarithm's sum over each rollout, for vespo.
        offsets: (B + 1,) on the device, where each rollout begins among the n; for the scope "rollout".
    """

    settings: Settings
    mask: Tensor
    advantages: Tensor
    weights: Tensor
    old: Tensor | None
    reference: Tensor | None
    ratio: Tensor | None
    log_ratio: Tensor | None
    offsets: Tensor | None

    def __call__(self, out: Outputs, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses (n,), and in "sums" (1, 2) the masked sums of the KL and of the clipped tokens."""
        settings, logprob = self.settings, out.logprob
        log_weight = self._log_weight(logprob - (logprob.detach() if self.old is None else self.old[rows]), rows)
        losses, clipped = settings.surrogate(logprob, log_weight, self.advantages[rows])
        if self.ratio is not None and settings.loss_type != "vespo":
            losses = losses * self.ratio[rows]
        mask, kl = self.mask[rows], torch.zeros_like(losses)
        if self.reference is not None:
            difference = self.reference[rows] - logprob
            kl = torch.expm1(difference) - difference
            if settings.use_bias_correction_kl:
                kl = kl * self._correction(log_weight, logprob, rows).exp()
            losses = losses + settings.beta * kl
        sums = torch.stack([(kl * mask).sum(), (clipped * mask).sum()])
        return losses * self.weights[rows], {"sums": sums[None]}

    def _log_weight(self, log_ratio: Tensor, rows: Tensor) -> Tensor:
        if self.settings.scope == "token":
            return log_ratio
        if self.settings.loss_type != "vespo":
            total = self._over_rollouts(log_ratio, rows)
            return total / self._over_rollouts(torch.ones_like(log_ratio), rows).clamp(min=1)
        total = self._over_rollouts(log_ratio.detach().clamp(-20, 20), rows)
        if self.log_ratio is not None:
            total = total + to_tokens(self.log_ratio, self.offsets, len(self.mask))[rows]
        return total.clamp(LEAST_LOG_WEIGHT, 20)

    def _correction(self, log_weight: Tensor, logprob: Tensor, rows: Tensor) -> Tensor:
        """Log of the ratio that corrects the KL: that of the surrogate, but a token's own in vespo."""
        if self.settings.loss_type != "vespo":
            return log_weight
        return logprob - (logprob.detach() if self.old is None else self.old[rows])

    def _over_rollouts(self, x: Tensor, rows: Tensor) -> Tensor:
        """The masked sum of (n,) over the rollout that each token is of; in a fixed order."""
        every = x.new_zeros(len(self.mask)).index_copy(0, rows, x * self.mask[rows])
        return to_tokens(segment_sum(every, self.offsets), self.offsets, len(self.mask))[rows]
