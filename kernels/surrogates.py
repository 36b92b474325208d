"""The gain of a token as its ratio grows, and the importance weight of one that another engine sampled.

    Clip    ratio A, or bound A beyond the bounds, where no gradient flows
    Weight  bounded ratio, which carries no gradient, times A logprob
    Gate    4 / tau sigmoid(tau (ratio - 1)) A

Bounds and tau are those of the sign of A. Each gain is proportional to A for each sign, so an importance weight, which
is never negative, multiplies A before anything else is decided.
"""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = ["Clip", "Gate", "Truncate", "Weight", "Within"]


class Clip(NamedTuple):
    """The clipped surrogate: min(ratio A, clip(ratio, 1 - low, 1 + high) A), and at least dual A where A < 0.

    Args:
        low, high: how far the ratio may go below and above 1; infinity for no clip.
        dual: above 1; where A < 0 the loss is at most -dual A; None for no such bound.

    Source: PPO (arXiv:1707.06347, eq. 7); dual clip (1912.09729, eq. 5); high > low is DAPO (2503.14476). With dual >=
    1 + high it is the two-sided clip of INTELLECT-2 (2505.07291), called delta elsewhere.
    """

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None


class Weight(NamedTuple):
    """Log-probs weighted by the bounded ratio, which carries no gradient: clip(ratio, *bounds) A logprob.

    Args:
        positive, negative: least and largest weight where A > 0 and where A < 0; (1, 1) is the plain policy gradient.

    Source: CISPO (arXiv:2506.13585, eq. 4-5) with (1 - low, 1 + high) twice; TOPR (2503.14286) with (1, 1) and (0, 1).
    """

    positive: tuple[float, float] = (0.0, math.inf)
    negative: tuple[float, float] = (0.0, math.inf)


class Gate(NamedTuple):
    """A soft gate on the ratio: 4 / tau sigmoid(tau (ratio - 1)) A, whose slope falls from 1 at ratio 1 to both sides.

    Args:
        positive, negative: tau where A > 0 and where A < 0; the larger, the narrower is the gate.

    Source: SAPO (arXiv:2511.20347).
    """

    positive: float = 1.0
    negative: float = 1.05


class Truncate(NamedTuple):
    """Importance weights held to [least, most], as V-trace truncates its own (arXiv:1802.01561, eq. 1)."""

    most: float
    least: float = 0.0


class Within(NamedTuple):
    """Importance weights as they are in [least, most], and 0 outside: such a token takes no part (arXiv:2510.18855)."""

    least: float
    most: float


KINDS = (Clip, Weight, Gate)
CLIP, WEIGHT, GATE = range(3)


class Bounds(NamedTuple):
    """A surrogate as kernels take it; the four are below and above for A > 0, then for A < 0."""

    kind: int
    factors: tuple[float, float, float, float]  # in the place of the ratio beyond each bound; tau of a gate
    log_ratios: tuple[float, float, float, float]


class Correction(NamedTuple):
    """An importance weight as kernels take it: bounds of its logarithm, and what it is below and above them."""

    log_least: float = -math.inf
    log_most: float = math.inf
    below: float = 0.0
    above: float = math.inf


def bounds_of(kind: int, numbers: tuple[float, float, float, float]) -> Bounds:
    """Bounds out of what `numbers_of` gave."""
    if kind == GATE:
        positive, negative, _, _ = numbers
        return Bounds(kind, (positive, positive, negative, negative), (-math.inf, math.inf, -math.inf, math.inf))
    if kind == WEIGHT:
        return Bounds(kind, numbers, tuple(_log(number) for number in numbers))
    low, high, dual, _ = numbers
    log_low = math.log1p(-low) if low < 1 else -math.inf
    return Bounds(kind, (0.0, 1 + high, 1 - low, dual), (-math.inf, math.log1p(high), log_low, math.log(dual)))


def numbers_of(surrogate: Clip | Weight | Gate) -> tuple[int, float, float, float, float]:
    """Which surrogate it is, and its numbers, checked, as arguments of a registered op."""
    if isinstance(surrogate, Clip):
        low, high, dual = surrogate
        if not (low >= 0 and high >= 0):
            raise ValueError(
                f"policy_loss: low and high must be at least 0; got {low} and {high}. Use math.inf for no clip."
            )
        if dual is not None and not dual > 1:
            raise ValueError(f"policy_loss: dual must be above 1; got {dual}. Use None for no such bound.")
        return CLIP, float(low), float(high), math.inf if dual is None else float(dual), 0.0
    if isinstance(surrogate, Weight):
        for name, (least, most) in zip(surrogate._fields, surrogate, strict=True):
            _require_bounds(name, least, most)
        return WEIGHT, *map(float, (*surrogate.positive, *surrogate.negative))
    if isinstance(surrogate, Gate):
        if not all(0 < tau < math.inf for tau in surrogate):
            raise ValueError(
                "policy_loss: positive and negative of a Gate must be finite and above 0; got "
                f"{surrogate.positive} and {surrogate.negative}. A small tau is a wide gate."
            )
        return GATE, float(surrogate.positive), float(surrogate.negative), 0.0, 0.0
    names = ", ".join(kind.__name__ for kind in KINDS)
    raise ValueError(f"policy_loss: surrogate must be one of {names}; got {surrogate!r}. Import one from fuserl.")


def correction_of(importance: Truncate | Within | None) -> Correction:
    """The correction that `importance` asks for, checked; every weight as it is for None."""
    if importance is None:
        return Correction()
    if not isinstance(importance, (Truncate, Within)):
        raise ValueError(
            f"policy_loss: importance must be Truncate, Within or None; got {importance!r}. Import one from fuserl."
        )
    least, most = importance.least, importance.most
    _require_bounds("importance", least, most)
    outside = (float(least), float(most)) if isinstance(importance, Truncate) else (0.0, 0.0)
    return Correction(_log(least), _log(most), *outside)


def _require_bounds(name: str, least: float, most: float) -> None:
    if not (0 <= least <= most and most > 0):
        raise ValueError(
            f"policy_loss: {name} must hold 0 <= least <= most and most > 0; got {least} and {most}. Use 0 and "
            "math.inf for no bounds."
        )


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf
