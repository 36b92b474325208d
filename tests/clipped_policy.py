"""Tokens for policy_loss, the calls that its tests make, and its definition by hand, far from the code under test."""

import math

import numpy as np
import torch

ON_POLICY, IMPORTANCE, CLIPPED = (), ("old_logprobs",), ("old_logprobs", "weights")
EVERYTHING = ("old_logprobs", "ref_logprobs", "weights", "mask")
CASES = {  # inputs besides logprobs and advantages, and numbers
    "on policy": (ON_POLICY, {}),
    "plain importance sampling": (IMPORTANCE, {"low": math.inf, "high": math.inf}),
    "clipped": (CLIPPED, {"low": 0.1, "high": 0.3}),
    "dual": ((*CLIPPED, "mask"), {"dual": 1.5}),
    "k1": (("old_logprobs", "ref_logprobs", "mask"), {"beta": 0.1, "kl": "k1"}),
    "k2": (EVERYTHING, {"beta": -0.1, "kl": "k2", "dual": 2.0}),
    "k3": (EVERYTHING, {"beta": 0.1, "kl": "k3"}),
    "k3 watched only": (("old_logprobs", "ref_logprobs"), {"low": 1.0}),
    "k3 on policy": (("ref_logprobs", "mask"), {"beta": 1.0}),
}


def tokens(*shape, dtype=torch.float32, device="cpu"):
    """Every input of the op: policies that differ enough for each bound to hold somewhere; a tenth of A is 0."""
    old = -3 * torch.rand(shape, dtype=dtype)
    inputs = {
        "logprobs": old + torch.randn(shape, dtype=dtype) * 0.5,
        "advantages": torch.randn(shape, dtype=dtype) * (torch.rand(shape) > 0.1),
        "old_logprobs": old,
        "ref_logprobs": old + torch.randn(shape, dtype=dtype) * 0.3 - 0.1,
        "weights": torch.rand(shape, dtype=dtype),
        "mask": torch.rand(shape) < 0.8,
    }
    return {name: x.to(device) for name, x in inputs.items()}


def chosen(inputs, names):
    """Only logprobs, advantages and the named inputs."""
    return {name: x for name, x in inputs.items() if name in ("logprobs", "advantages", *names)}


def by_hand(inputs, g, low=0.2, high=0.2, dual=None, beta=0.0, kl="k3"):
    """Minimum and maximum as the papers write them, in NumPy's long double."""
    shape, g = g.shape, g.double().cpu().numpy().astype(np.longdouble)
    x = {name: t.double().cpu().numpy().astype(np.longdouble) for name, t in inputs.items()}
    logprob, a, w = x["logprobs"], x["advantages"], x.get("weights", 1.0) * x.get("mask", 1.0)
    keep = x.get("mask", np.ones(shape)) != 0
    log_ratio = logprob - x.get("old_logprobs", logprob)
    ratio = np.exp(log_ratio)
    gain, bounded = ratio * a, np.clip(ratio, 1 - low, 1 + high) * a
    objective, flows = np.minimum(gain, bounded), gain <= bounded
    floor = (dual or np.inf) * np.where(a < 0, a, -1.0)
    beyond = (a < 0) & (objective < floor)
    objective = np.where(beyond, floor, objective)
    d = x.get("ref_logprobs", logprob) - logprob
    value, slope = {"k1": (-d, 0 * d + 1), "k2": (d * d / 2, -d), "k3": (np.expm1(d) - d, -np.expm1(d))}[kl]
    low_holds, high_holds = ~flows & (ratio < 1) & ~beyond, ~flows & (ratio > 1) & ~beyond
    sums = [keep, low_holds, high_holds, beyond, np.expm1(log_ratio) - log_ratio, value, ratio, ratio**2]
    numbers = [np.sum(s, where=keep) for s in sums]
    numbers += [np.max(ratio, where=keep, initial=-np.inf), np.min(ratio, where=keep, initial=np.inf)]
    losses, gradient = w * (beta * value - objective), g * w * (beta * slope - (flows & ~beyond) * gain)
    return [torch.from_numpy(np.asarray(r, np.float64)) for r in (losses, gradient, numbers)]
