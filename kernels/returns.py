"""Returns and their mixtures with values: discounted, lambda-returns, V-trace. Plain torch around `discounted_scan`.

    R[t] = rewards[t] + gamma ((1 - lam) V' + lam R')        returns: lam = 1

V' and R' are those of the segment's next token that the mask keeps; beyond its last one both are `bootstrap`. All are
differentiable in every tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fuserl.kernels.discounted_scan import checked, ends, flat, following, scan
from fuserl.kernels.segment_sum import to_tokens

__all__ = ["lambda_returns", "returns", "vtrace"]


def returns(
    rewards: Tensor,
    *,
    gamma: float | Tensor,
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Discounted sum of each token's reward and those after it.

        returns[t] = rewards[t] + gamma returns[t + 1]

    Args:
        rewards: (..., N) float32 or float64; with gamma, offsets, mask and bootstrap as for `gae`.
        backend: as for `discounted_scan`.

    Returns:
        Of rewards' shape and dtype; 0 where masked.

    Raises:
        ValueError: on a wrong shape, dtype or device, and on CPU for offsets that decrease or miss an end.

    Sibling: `discounted_scan(..., forward=True, exclusive=True)` sums what came before.
    """
    gamma, mask = checked("returns", "rewards", rewards, {"gamma": gamma}, offsets, mask)
    rows, gamma, mask = (flat(x, rewards.shape) for x in (rewards, gamma, mask))
    beyond = bootstrap_rows("returns", bootstrap, rewards, offsets)
    return _mixed(rows, gamma, beyond, mask, offsets, backend).view(rewards.shape)


def lambda_returns(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float | Tensor,
    lam: float | Tensor,
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return of each token mixed with the value of the next one.

        R[t] = rewards[t] + gamma ((1 - lam) values[t + 1] + lam R[t + 1])

    Args:
        rewards, values: (..., N) float32 or float64; with gamma, lam, offsets, mask and bootstrap as for `gae`.
        backend: as for `discounted_scan`.

    Returns:
        Of rewards' shape and dtype; 0 where masked. They are what `gae` returns beside the advantages.

    Raises:
        ValueError: on a wrong shape, dtype or device, and on CPU for offsets that decrease or miss an end.

    Source: TD(lambda), as in Dreamer (arXiv:1912.01603, eq. 6).
    """
    function, others = "lambda_returns", {"values": values, "gamma": gamma, "lam": lam}
    *others, mask = checked(function, "rewards", rewards, others, offsets, mask)
    rows, values, gamma, lam, mask = (flat(x, rewards.shape) for x in (rewards, *others, mask))
    beyond = bootstrap_rows(function, bootstrap, rewards, offsets)
    following = next_values(values, beyond, mask, offsets, backend)
    mixed = rows + gamma * (1 - lam) * following
    return _mixed(mixed, gamma * lam, beyond, mask, offsets, backend).view(rewards.shape)


def vtrace(
    log_ratio: Tensor,
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float | Tensor,
    lam: float | Tensor = 1.0,
    rho: float = 1.0,
    c: float = 1.0,
    advantage_rho: float = 1.0,
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """V-trace: value targets and advantages of a policy from tokens that another one sampled.

        delta[t]   = min(rho, ratio) (rewards[t] + gamma values[t + 1] - values[t]),   ratio = exp(log_ratio)
        targets[t] = values[t] + delta[t] + gamma lam min(c, ratio) (targets[t + 1] - values[t + 1])
        advantages[t] = min(advantage_rho, ratio) (rewards[t] + gamma targets[t + 1] - values[t])

    Args:
        log_ratio: (..., N) float32 or float64: log-prob of the policy minus that of the one that sampled.
        rewards, values: of log_ratio's shape; with gamma, lam, offsets, mask and bootstrap as for `gae`.
        rho: bound of the ratio in delta: which policy's value is learned, infinity the policy's own.
        c: bound of the ratio in the links: how fast, and with what variance.
        advantage_rho: bound of the ratio in the advantages.
        backend: as for `discounted_scan`.

    Returns:
        (targets, advantages) of log_ratio's shape and dtype; 0 where masked. With log_ratio 0 and lam 1 targets are the
        returns. They carry gradients where the inputs do: pass those detached.

    Raises:
        ValueError: on a wrong shape, dtype or device, a bound that is not positive, and on CPU for offsets that
            decrease or miss an end.

    Source: IMPALA (arXiv:1802.01561, eq. 1 and section 4.2); lam, remark 2.
    """
    for name, bound in (("rho", rho), ("c", c), ("advantage_rho", advantage_rho)):
        if not bound > 0:
            raise ValueError(f"vtrace: {name} must be positive; got {bound}. Use math.inf for no bound.")
    others = {"rewards": rewards, "values": values, "gamma": gamma, "lam": lam}
    *others, mask = checked("vtrace", "log_ratio", log_ratio, others, offsets, mask)
    ratio, rewards, values, gamma, lam, mask = (flat(x, log_ratio.shape) for x in (log_ratio, *others, mask))
    beyond = bootstrap_rows("vtrace", bootstrap, log_ratio, offsets)
    ratio = ratio.exp()
    delta = rewards + gamma * next_values(values, beyond, mask, offsets, backend) - values
    links = gamma * lam * ratio.clamp(max=c)
    targets = values + _mixed(ratio.clamp(max=rho) * delta, links, None, mask, offsets, backend)
    ahead = gamma * next_values(targets, beyond, mask, offsets, backend)
    advantages = ratio.clamp(max=advantage_rho) * (rewards + ahead - values)
    found = (x if mask is None else torch.where(mask, x, 0.0) for x in (targets, advantages))
    return tuple(x.view(log_ratio.shape) for x in found)


def _mixed(b, links, beyond, mask, offsets, backend) -> Tensor:
    """The scan of b (C, N) with what comes beyond each segment, (C, B), at its end."""
    if mask is not None:
        b, links = torch.where(mask, b, 0.0), torch.where(mask, links, torch.ones_like(b))
    if beyond is not None:
        b = b + torch.where(ends(b, offsets), links * _spread(beyond, b, offsets), 0.0)
    x = scan(b, links, offsets, backend)
    return x if mask is None else torch.where(mask, x, 0.0)


def next_values(
    values: Tensor, beyond: Tensor | None, mask: Tensor | None, offsets: Tensor | None, backend: str | None
) -> Tensor:
    """Values (C, N) of the next token that the mask keeps; `beyond` (C, B), or 0, where none is left."""
    beyond = None if beyond is None else _spread(beyond, values, offsets)
    if mask is not None:
        passed = torch.where(ends(values, offsets), 0.0 if beyond is None else beyond, 0.0)
        values = scan(torch.where(mask, values, passed), (~mask).to(values.dtype), offsets, backend)
    return following(values, offsets, beyond)


def bootstrap_rows(function: str, bootstrap: Tensor | None, x: Tensor, offsets: Tensor | None) -> Tensor | None:
    """The value beyond each segment of x (..., N), as (C, B); ValueError where there are not as many."""
    if bootstrap is None:
        return None
    segments = 1 if offsets is None else len(offsets) - 1
    shape = x.shape[:-1] if offsets is None else (*x.shape[:-1], segments)
    if bootstrap.shape != shape or bootstrap.dtype != x.dtype or bootstrap.device != x.device:
        raise ValueError(
            f"{function}: bootstrap must be {tuple(shape)} {x.dtype} on {x.device}, one per segment; got "
            f"{tuple(bootstrap.shape)} {bootstrap.dtype} on {bootstrap.device}. Give 0 for a segment that ended."
        )
    return bootstrap.reshape(x.shape[:-1].numel(), segments)


def _spread(per_segment: Tensor, x: Tensor, offsets: Tensor | None) -> Tensor:
    return per_segment.expand(x.shape) if offsets is None else to_tokens(per_segment, offsets, x.shape[1])
