"""Tokens for policy_loss, the calls that its tests make, and its definition by hand, far from the code under test."""

import math

import numpy as np
import torch

from fuserl.kernels.surrogates import Clip, Gate, Truncate, Weight, Within

ON_POLICY, IMPORTANCE, CLIPPED = (), ("old_logprobs",), ("old_logprobs", "weights")
EVERYTHING = ("old_logprobs", "ref_logprobs", "weights", "mask")
PPO, CISPO, TOPR = Clip(0.2, 0.2), Weight((0.8, 1.3), (0.8, 1.3)), Weight((1.0, 1.0), (0.0, 1.0))
CASES = {  # inputs besides logprobs and advantages, and numbers
    "on policy": (ON_POLICY, {}),
    "plain importance sampling": (IMPORTANCE, {"surrogate": Clip(math.inf, math.inf)}),
    "clipped": (CLIPPED, {"surrogate": Clip(0.1, 0.3)}),
    "dual": ((*CLIPPED, "mask"), {"surrogate": Clip(dual=1.5)}),
    "k1": (("old_logprobs", "ref_logprobs", "mask"), {"beta": 0.1, "kl": "k1"}),
    "k2": (EVERYTHING, {"beta": -0.1, "kl": "k2", "surrogate": Clip(dual=2.0)}),
    "k3": (EVERYTHING, {"beta": 0.1, "kl": "k3"}),
    "k1+": (EVERYTHING, {"beta": 0.1, "kl": "k1+"}),
    "k3+": (("old_logprobs", "ref_logprobs"), {"beta": 0.1, "kl": "k3+"}),
    "k3 watched only": (("old_logprobs", "ref_logprobs"), {"surrogate": Clip(low=1.0)}),
    "k3 on policy": (("ref_logprobs", "mask"), {"beta": 1.0}),
    "k1 weighted": (EVERYTHING, {"beta": 0.1, "kl": "k1", "kl_weighted": True}),
    "k2 weighted": (EVERYTHING, {"beta": 0.1, "kl": "k2", "kl_weighted": True}),
    "k3 weighted": (EVERYTHING, {"beta": 0.1, "kl_weighted": True}),
    "k3 weighted on policy": (("ref_logprobs",), {"beta": 0.5, "kl_weighted": True}),
    "cispo": (EVERYTHING, {"surrogate": CISPO}),
    "topr": (("old_logprobs", "mask"), {"surrogate": TOPR}),
    "weighted on policy": (("ref_logprobs",), {"surrogate": CISPO, "beta": 0.2}),
    "gate": (EVERYTHING, {"surrogate": Gate(), "beta": 0.1}),
    "gate, narrow": (("old_logprobs",), {"surrogate": Gate(3.0, 0.4)}),
    "entropy": ((*EVERYTHING, "entropy"), {"entropy_coef": 0.3, "beta": 0.1}),
    "truncated importance": ((*EVERYTHING, "rollout_logprobs"), {"importance": Truncate(1.3, 0.4), "beta": 0.1}),
    "masked importance": ((*EVERYTHING, "rollout_logprobs"), {"importance": Within(0.5, 2.0), "surrogate": Gate()}),
    "masked weights": ((*CLIPPED, "log_weights"), {"importance": Within(0.7, 1.4), "surrogate": CISPO}),
    "every weight": (("rollout_logprobs", "mask"), {}),
    "all": (
        (*EVERYTHING, "log_weights", "entropy"),
        {
            "surrogate": Clip(dual=1.5),
            "importance": Truncate(1.2),
            "beta": 0.1,
            "kl_weighted": True,
            "entropy_coef": 0.1,
        },
    ),
}


def tokens(*shape, dtype=torch.float32, device="cpu"):
    """Inputs of a clip with a KL term: policies so far apart that every bound holds somewhere; a tenth of A is 0."""
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


def every_input(*shape, dtype=torch.float32, device="cpu"):
    """Those, what the engine that sampled has to say, given in both ways, and entropies."""
    inputs = tokens(*shape, dtype=dtype, device=device)
    others = {
        "rollout_logprobs": inputs["old_logprobs"].cpu() + torch.randn(shape, dtype=dtype) * 0.4,
        "log_weights": torch.randn(shape, dtype=dtype) * 0.4,
        "entropy": torch.rand(shape, dtype=dtype),
    }
    return inputs | {name: x.to(device) for name, x in others.items()}


def chosen(inputs, names):
    """Only logprobs, advantages and the named inputs."""
    return {name: x for name, x in inputs.items() if name in ("logprobs", "advantages", *names)}


def gain_by_hand(surrogate, ratio, logprob, a):
    """(gain, its derivative to logprob, where it is held below, and above), as the papers write them."""
    zero, nowhere = np.zeros_like(ratio), np.zeros(ratio.shape, bool)
    if isinstance(surrogate, Gate):
        tau = np.where(a > 0, *surrogate)
        sigmoid = 1 / (1 + np.exp(-tau * (ratio - 1)))
        return 4 / tau * sigmoid * a, 4 * sigmoid * (1 - sigmoid) * ratio * a, nowhere, nowhere
    if isinstance(surrogate, Weight):
        least, most = (np.where(a > 0, *pair) for pair in zip(*surrogate, strict=True))
        weight = np.minimum(np.maximum(ratio, least), most)
        return weight * a * logprob, weight * a, (ratio < least) & (a != 0), (ratio > most) & (a != 0)
    low, high, dual = surrogate
    gain, bounded = ratio * a, np.clip(ratio, 1 - low, 1 + high) * a
    objective, flows = np.minimum(gain, bounded), gain <= bounded
    floor = (dual or np.inf) * np.where(a < 0, a, -1.0)
    beyond = (a < 0) & (objective < floor)
    slope = np.where(flows & ~beyond, gain, zero)
    return np.where(beyond, floor, objective), slope, ~flows & (ratio < 1) & ~beyond, (~flows & (ratio > 1)) | beyond


def importance_by_hand(x, logprob, importance):
    """(weight, where a bound of it is met) of the numbers x."""
    old = x.get("old_logprobs", logprob)
    raw = np.exp(x["log_weights"] if "log_weights" in x else old - x.get("rollout_logprobs", old))
    if importance is None:
        return raw, np.zeros(raw.shape, bool)
    cut = (raw < importance.least) | (raw > importance.most)
    kept = np.where(cut, 0, raw)
    return np.clip(raw, importance.least, importance.most) if isinstance(importance, Truncate) else kept, cut


def by_hand(inputs, g, surrogate=PPO, importance=None, beta=0.0, kl="k3", kl_weighted=False, entropy_coef=0.0):
    """Losses, the gradients to logprobs and entropy, statistics, and the sizes of what each sums; in long double."""
    shape, g = g.shape, g.double().cpu().numpy().astype(np.longdouble)
    x = {name: t.double().cpu().numpy().astype(np.longdouble) for name, t in inputs.items()}
    logprob, w = x["logprobs"], x.get("weights", 1.0) * x.get("mask", np.ones(shape))
    keep = x.get("mask", np.ones(shape)) != 0
    log_ratio = logprob - x.get("old_logprobs", logprob)
    ratio = np.exp(log_ratio)
    importance, cut = importance_by_hand(x, logprob, importance)
    a = importance * x["advantages"]
    gain, dgain, low_holds, high_holds = gain_by_hand(surrogate, ratio, logprob, a)
    d = x.get("ref_logprobs", logprob) - logprob
    value, slope = {"k1": (-d, 0 * d + 1), "k2": (d * d / 2, -d), "k3": (np.expm1(d) - d, -np.expm1(d))}[kl[:2]]
    if kl.endswith("+"):
        slope = -d
    if kl_weighted and "ref_logprobs" in x:
        value, slope = ratio * value, ratio * (value + slope)
    sums = [keep, low_holds, high_holds & (a > 0), high_holds & (a < 0), np.expm1(log_ratio) - log_ratio, value]
    numbers = [np.sum(s, where=keep) for s in (*sums, importance, cut, ratio, ratio**2)]
    extremes = [np.max(ratio, where=keep, initial=-np.inf), np.min(ratio, where=keep, initial=np.inf)]
    sizes = [np.sum(np.abs(s), where=keep) for s in (*sums, importance, cut, ratio, ratio**2)]
    losses = w * (beta * value - gain - entropy_coef * x.get("entropy", 0.0))
    gradients = g * w * (beta * slope - dgain), -g * w * entropy_coef
    results = losses, *gradients, numbers + extremes, sizes + extremes
    return [torch.from_numpy(np.asarray(r, np.float64)) for r in results]
