"""verl's policy losses by policy_loss: one pass over the log-probs; `fuserl.trainers.verl` registers them.

    loss = sum of weights * (what `policy_loss` gives each token)
    weights = rollout_is_weights * response_mask / (what loss_agg_mode divides by), of the whole batch and all ranks

Each takes verl's arguments and returns (loss, metrics), metrics being numbers, waited for once. Every loss_agg_mode is
honoured by every loss of tokens, by fuserl_sapo too, where verl's own takes seq-mean-token-mean whatever is asked.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fuserl.kernels.policy_loss import STATISTICS, policy_loss
from fuserl.kernels.surrogates import Clip, Gate, Weight

__all__ = ["LOSSES"]

_MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")


def grpo(
    old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
    loss_agg_mode: str = "token-mean", config: object = None, rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """The clipped loss of PPO and GRPO with dual clip: verl's "vanilla".

    Args:
        old_log_prob, log_prob, advantages: (B, T); the gradient is log_prob's.
        response_mask: (B, T), 0 where a token does not count.
        loss_agg_mode: "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm" or
            "seq-mean-token-mean".
        config: verl's ActorConfig: clip_ratio, clip_ratio_low, clip_ratio_high, clip_ratio_c, global_batch_info.
        rollout_is_weights: (B, T), what each token's loss is multiplied by, or None.

    Returns:
        The loss, differentiable in log_prob, and actor/pg_clipfrac, actor/ppo_kl and actor/pg_clipfrac_lower.

    Raises:
        ValueError: on a wrong shape or setting.

    Source: arXiv:1707.06347, dual clip 1912.09729.
    """
    call = _Call("fuserl_grpo", old_log_prob, log_prob, advantages, response_mask, config)
    surrogate = Clip(*call.clip(), dual=float(config.get("clip_ratio_c", 3.0)))
    return call.loss(surrogate, call.weights(loss_agg_mode, rollout_is_weights))


def gspo(
    old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean", config: object = None, rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """GSPO's clipped loss, with a sample's mean log-ratio at each of its tokens; arguments as `grpo` has them.

    Where A < 0 the ratio is cut at e^10, as verl does. Source: arXiv:2507.18071, eq. 5-7.
    """
    call = _Call("fuserl_gspo", old_log_prob, log_prob, advantages, response_mask, config)
    mean = call.mean_of_samples(call.log_ratio().detach())
    call.logprobs = mean[:, None] + (call.logprobs - call.logprobs.detach())
    call.old = torch.zeros_like(call.old)
    return call.loss(Clip(*call.clip(), dual=math.exp(10)), call.weights(loss_agg_mode, rollout_is_weights))


def cispo(
    old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
    loss_agg_mode: str = "token-mean", config: object = None, rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """CISPO's loss: log-probs weighted by the clipped ratio, which carries no gradient; arguments as `grpo` has them.

    Source: arXiv:2506.13585.
    """
    call = _Call("fuserl_cispo", old_log_prob, log_prob, advantages, response_mask, config)
    low, high = call.clip()
    bounds = max(0.0, 1 - low), 1 + high
    loss, metrics = call.loss(Weight(bounds, bounds), call.weights(loss_agg_mode, rollout_is_weights))
    # verl counts the tokens without an advantage too, which no bound of a surrogate holds.
    share = call.outside(bounds[0], bounds[1]).sum() / call.mask.sum().clamp(min=1)
    return loss, metrics | {"actor/pg_clipfrac": share.item(), "actor/pg_clipfrac_lower": 0.0}


def sapo(
    old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean", config: object = None, rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """SAPO's loss, a soft gate on the ratio with config's tau_pos and tau_neg; other arguments as `grpo` has them.

    Source: arXiv:2511.20347.
    """
    call = _Call("fuserl_sapo", old_log_prob, log_prob, advantages, response_mask, config)
    surrogate = Gate(float(config.tau_pos), float(config.tau_neg))
    return call.loss(surrogate, call.weights(loss_agg_mode, rollout_is_weights))


def gpg(
    old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
    loss_agg_mode: str = "token-mean", config: object = None, rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """GPG's loss, -advantages log_prob, without metrics; arguments as `grpo` has them.

    Source: arXiv:2504.02546.
    """
    call = _Call("fuserl_gpg", old_log_prob, log_prob, advantages, response_mask, config)
    return call.loss(Weight((1, 1), (1, 1)), call.weights(loss_agg_mode, rollout_is_weights))[0], {}


def dro(
    old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
    loss_agg_mode: str = "token-mean", config: object = None, rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """DRO's loss, -advantages log_prob + dro_beta log_ratio^2 / 2; arguments as `grpo` has them.

    Raises:
        ValueError: config.policy_loss.dro_beta is not positive, or as `grpo`.
    """
    call = _Call("fuserl_dro", old_log_prob, log_prob, advantages, response_mask, config)
    beta = config.policy_loss.dro_beta
    if beta is None or not beta > 0:
        raise ValueError(f"fuserl_dro: policy_loss.dro_beta must be positive; got {beta}. Set it.")
    weights = call.weights(loss_agg_mode, rollout_is_weights)
    loss, _ = call.loss(Weight((1, 1), (1, 1)), weights, beta=float(beta), kl="k2")
    return loss, {"actor/ppo_kl": -call.mean(call.log_ratio().detach()).item()}


def gmpo(
    old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean", config: object = None, rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """GMPO's loss, the geometric mean of a sample's clipped ratios; verl's "geo_mean", over the whole batch.

        loss = -mean of advantages * exp(mean of min(log_ratio, clip_ratio_high)) where A > 0, max and -low where A < 0

    Args:
        old_log_prob, log_prob, advantages, response_mask, config, rollout_is_weights: as `grpo` has them; the weights
            of a sample are averaged geometrically.
        loss_agg_mode: "seq-mean-token-mean", the only one that a loss of samples has.

    Returns:
        As `grpo`; actor/pg_clipfrac counts tokens clipped with A > 0, actor/pg_clipfrac_lower with A < 0.

    Raises:
        ValueError: another loss_agg_mode, or as `grpo`.

    Source: arXiv:2507.20673.
    """
    call = _Call("fuserl_gmpo", old_log_prob, log_prob, advantages, response_mask, config)
    if loss_agg_mode != "seq-mean-token-mean":
        raise ValueError(
            f"fuserl_gmpo: loss_agg_mode must be 'seq-mean-token-mean'; got {loss_agg_mode!r}. A loss of samples has "
            "no token mean: set actor.loss_agg_mode."
        )
    (low, high), a, log_ratio = call.clip(), call.advantages, call.log_ratio()
    held = torch.where(a > 0, log_ratio.clamp(max=high), torch.where(a < 0, log_ratio.clamp(min=-low), 0.0))
    log_weights = None if rollout_is_weights is None else call.mean_of_samples((rollout_is_weights + 1e-10).log())
    weights = call.weights("seq-mean-token-sum", None)[:, 0]  # of a sample, as of each of its tokens there
    logprobs = call.mean_of_samples(held)
    losses, _ = policy_loss(
        logprobs, call.mean_of_samples(a), old_logprobs=torch.zeros_like(weights), mask=call.mask.any(-1),
        weights=weights if log_weights is None else weights * log_weights.exp(), surrogate=Clip(math.inf, math.inf),
    )  # fmt: skip
    log_ratio = log_ratio.detach()
    out = (log_ratio < -low) | (log_ratio > high)
    metrics = {
        "actor/pg_clipfrac": call.mean(out & (a > 0)),
        "actor/ppo_kl": -call.mean(log_ratio),
        "actor/pg_clipfrac_lower": call.mean(out & (a < 0)),
    }
    return losses.sum(), dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))


LOSSES = {
    "fuserl_grpo": grpo,
    "fuserl_gspo": gspo,
    "fuserl_cispo": cispo,
    "fuserl_sapo": sapo,
    "fuserl_gpg": gpg,
    "fuserl_dro": dro,
    "fuserl_gmpo": gmpo,
}


class _Call:
    """What verl gives a loss, as policy_loss takes it."""

    def __init__(self, name, old_log_prob, log_prob, advantages, response_mask, config):
        if config is None:
            raise ValueError(f"{name}: config must be verl's ActorConfig; got None. Pass the actor's configuration.")
        self.name, self.config = name, config
        self.logprobs = log_prob if log_prob.dtype in (torch.float32, torch.float64) else log_prob.float()
        self.old, self.advantages = (x.detach().to(self.logprobs.dtype) for x in (old_log_prob, advantages))
        self.mask, self.numbers = response_mask.bool(), response_mask

    def log_ratio(self) -> Tensor:
        """(B, T), 0 where the mask is."""
        return torch.where(self.mask, self.logprobs - self.old, 0.0)

    def outside(self, least: float, most: float) -> Tensor:
        """(B, T) bool: tokens of the mask whose ratio is beyond the bounds."""
        log_ratio = self.logprobs.detach() - self.old
        log_least = math.log(least) if least > 0 else -math.inf
        return ((log_ratio < log_least) | (log_ratio > math.log(most))) & self.mask

    def clip(self) -> tuple[float, float]:
        """clip_ratio_low and clip_ratio_high, each clip_ratio where it is None."""
        sides = self.config.clip_ratio_low, self.config.clip_ratio_high
        return tuple(float(self.config.clip_ratio if side is None else side) for side in sides)

    def weights(self, mode: str, rollout_is_weights: Tensor | None) -> Tensor:
        """(B, T) that make the sum over tokens what verl's agg_loss makes of the mode."""
        like = self.logprobs
        weights = _weights(
            self.name,
            self.numbers.to(like.dtype).sum(-1, keepdim=True),
            like.shape[-1],
            mode,
            **self.config.global_batch_info,
        )
        if self.numbers.dtype != torch.bool:
            weights = weights * self.numbers
        if rollout_is_weights is not None:
            weights = weights * rollout_is_weights.detach().to(like.dtype)
        return weights.to(like.dtype).expand(like.shape)

    def loss(self, surrogate, weights: Tensor, *, beta: float = 0.0, kl: str = "k1") -> tuple[Tensor, dict]:
        """The sum of policy_loss over the tokens, and verl's metrics out of its statistics."""
        losses, statistics = policy_loss(
            self.logprobs, self.advantages, old_logprobs=self.old, ref_logprobs=self.old, weights=weights,
            mask=self.mask, surrogate=surrogate, beta=beta, kl=kl,
        )  # fmt: skip
        found = dict(zip(STATISTICS, statistics.tolist(), strict=True))
        count = max(1.0, found["tokens"])
        return losses.sum(), {
            "actor/pg_clipfrac": (found["clipped_low"] + found["clipped_high"]) / count,
            "actor/ppo_kl": -found["kl"] / count,
            "actor/pg_clipfrac_lower": found["clipped_dual"] / count,
        }

    def mean_of_samples(self, x: Tensor) -> Tensor:
        """(B,) means of (B, T) over the tokens of the mask; 0 where a sample has none."""
        return torch.where(self.mask, x, 0.0).sum(-1) / self.mask.sum(-1).clamp(min=1)

    def mean(self, x: Tensor) -> Tensor:
        """Mean of (B, T) over the tokens of the mask."""
        return torch.where(self.mask, x, 0.0).sum() / self.mask.sum().clamp(min=1)


def _weights(
    name: str, lengths: Tensor, width: int, mode: str, *, dp_size: int = 1, batch_num_tokens: int | None = None,
    global_batch_size: int | None = None, loss_scale_factor: float | None = None,
) -> Tensor:  # fmt: skip
    """(B, 1) or (1, 1) of a token that counts, out of how many each sample has, (B, 1)."""
    if mode not in _MODES:
        raise ValueError(f"{name}: loss_agg_mode must be one of {', '.join(_MODES)}; got {mode!r}. Correct the name.")
    if mode == "token-sum":
        return torch.full_like(lengths[:1], dp_size)
    of_tokens = mode == "token-mean"
    count = batch_num_tokens if of_tokens else global_batch_size
    if count is None and dp_size > 1:
        wanted = "batch_num_tokens" if of_tokens else "global_batch_size"
        raise ValueError(
            f"{name}: {wanted} must be given when dp_size > 1; got None and {dp_size}. Set it in global_batch_info."
        )
    if count is None:
        count = (lengths.sum() if of_tokens else (lengths > 0).sum()).clamp(min=1)
    if mode == "seq-mean-token-mean":
        return dp_size / count / (lengths + 1e-8)
    scale = 1 if mode != "seq-mean-token-sum-norm" else width if loss_scale_factor is None else loss_scale_factor
    return torch.ones_like(lengths[:1]) * dp_size / count / scale
