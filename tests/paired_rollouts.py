"""Rollouts for preference_loss, the forms that its tests try, and these as their papers write them."""

import numpy as np
import torch
from sequences import each_segment, offsets_of

from fuserl.kernels.preferences import CPO, DPO, IPO, KTO, ORPO, BradleyTerry, Hinge, SimPO

FORMS = {
    "dpo": DPO(beta=0.3),
    "dpo smoothed": DPO(beta=0.3, label_smoothing=0.1, nll=0.5),
    "dpo robust": DPO(beta=0.3, label_smoothing=0.2, robust=True),
    "ipo": IPO(beta=0.2),
    "hinge": Hinge(beta=0.2, nll=0.1),
    "simpo": SimPO(beta=2.5, gamma=0.7, label_smoothing=0.1),
    "cpo": CPO(beta=0.2, nll=0.7, label_smoothing=0.05),
    "orpo": ORPO(lam=0.3),
    "kto": KTO(beta=0.2, desirable=1.3, undesirable=0.8),
    "bradley terry": BradleyTerry(centre=0.02),
}
LENGTHS = [3, 1, 17, 32, 33, 64, 5, 2, 31, 40, 1, 7]


def rollouts(lengths=LENGTHS, form=None, dtype=torch.float32, device="cpu", given=("margins", "indices", "mask")):
    """Arguments of the op for a form: tokens of these lengths, and of what may be given, that which `given` names."""
    offsets = offsets_of(lengths)
    tokens, count = int(offsets[-1]), len(lengths)
    logprobs = -2 * torch.rand(tokens, dtype=torch.float64)
    kto = isinstance(form, KTO)
    inputs = {"logprobs": logprobs.to(dtype), "offsets": offsets}
    if form is None or form.reference is not False:
        inputs["ref_logprobs"] = (logprobs + 0.3 * torch.randn(tokens, dtype=torch.float64) - 0.05).to(dtype)
    if "mask" in given:
        mask = torch.rand(tokens) < 0.8
        mask[offsets[:-1][offsets.diff() > 0]] = True
        inputs["mask"] = mask
    items = count if kto else count // 2
    if kto:
        inputs |= {"desirable": torch.rand(count) < 0.6, "baseline": torch.tensor(0.4, dtype=dtype)}
    elif "indices" in given:  # some rollouts in several pairs, some in none
        inputs |= {name: torch.randint(count, (items,)) for name in ("chosen", "rejected")}
    if "margins" in given:
        inputs["margins"] = torch.randn(items, dtype=torch.float64).to(dtype)
    return {name: x.to(device) for name, x in inputs.items()}


def sides(inputs):
    """(chosen, rejected) rollouts of each loss, None where the baseline stands for one."""
    count = len(inputs["offsets"]) - 1
    if "desirable" in inputs:
        return [(r, None) if good else (None, r) for r, good in enumerate(inputs["desirable"].tolist())]
    if "chosen" in inputs:
        return list(zip(inputs["chosen"].tolist(), inputs["rejected"].tolist(), strict=True))
    return [(p, p + count // 2) for p in range(count // 2)]


def softplus(x):
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def sigmoid(x):
    return 1 / (1 + np.exp(-x)) if x >= 0 else np.exp(x) / (1 + np.exp(x))


def odds(s):
    return s - (np.log(-np.expm1(s)) if s > -0.5 else np.log1p(-np.exp(s)))


def one(form, c, r, m):
    """(loss, derivative to what the form sees of the chosen, of the rejected); c and r are (sum, mean) pairs."""
    if isinstance(form, KTO):
        return None
    if isinstance(form, ORPO):
        apart = odds(c[1]) - odds(r[1])
        wrong = form.lam * sigmoid(-apart)
        return form.lam * softplus(-apart), -wrong / -np.expm1(c[1]), wrong / -np.expm1(r[1])
    if isinstance(form, IPO):
        apart = c[1] - r[1] - (0.5 + m) / form.beta
        return apart**2, 2 * apart, -2 * apart
    if isinstance(form, Hinge):
        apart = form.beta * (c[0] - r[0]) - m
        d = -form.beta if apart < 1 else 0 * apart
        return np.maximum(1 - apart, 0), d, -d
    if isinstance(form, BradleyTerry):
        both, wrong = c[0] + r[0], sigmoid(r[0] - c[0] + m)
        d = 2 * form.centre * both
        return softplus(r[0] - c[0] + m) + form.centre * both**2, d - wrong, d + wrong
    mean, e = isinstance(form, SimPO), form.label_smoothing
    apart = form.beta * (c[mean] - r[mean]) - m - (form.gamma if mean else 0)
    robust = isinstance(form, DPO) and form.robust
    turned, over = (-e, 1 - 2 * e) if robust else (e, 1)
    loss = ((1 - e) * softplus(-apart) + turned * softplus(apart)) / over
    d = form.beta * (turned * sigmoid(apart) - (1 - e) * sigmoid(-apart)) / over
    return loss, d, -d


def by_hand(inputs, form, g):
    """(losses, gradient, rewards, statistics) in NumPy's long double, one pair after the other."""
    wide = {k: x.double().cpu().numpy().astype(np.longdouble) for k, x in inputs.items()}
    g = g.double().cpu().numpy().astype(np.longdouble)
    lp = wide["logprobs"]
    keep = wide.get("mask", np.ones(len(lp))) != 0
    d = np.where(keep, lp - wide.get("ref_logprobs", 0), 0)
    spans = [np.array(list(span), dtype=int)[keep[list(span)]] for span in each_segment(inputs["offsets"].cpu())]
    seen = [(d[s].sum(), d[s].sum() / max(len(s), 1)) for s in spans]
    nll = [-lp[s].sum() / max(len(s), 1) for s in spans]
    mean = isinstance(form, IPO | SimPO | ORPO)
    scale = getattr(form, "beta", getattr(form, "lam", 1))
    rewards = np.array([scale * s[mean] for s in seen])
    losses, gradient, statistics = [], np.zeros_like(lp), np.zeros(8, np.longdouble)
    for i, (c, r) in enumerate(sides(inputs)):
        margin = wide.get("margins", np.zeros(len(lp)))[i]
        if isinstance(form, KTO):
            sign, weight = (1, form.desirable) if r is None else (-1, form.undesirable)
            at = c if r is None else r
            apart = sign * form.beta * (seen[at][0] - wide["baseline"])
            loss = weight * sigmoid(margin - apart)
            slope = -sign * weight * form.beta * sigmoid(apart - margin) * sigmoid(margin - apart)
            gradient[spans[at]] += g[i] * slope
            won, lost = (rewards[at], 0) if r is None else (0, rewards[at])
            statistics += [1, apart, apart > 0, r is None, c is None, won, lost, 0]
        else:
            loss, d_c, d_r = one(form, seen[c], seen[r], margin)
            for at, slope in ((c, d_c), (r, d_r)):
                gradient[spans[at]] += g[i] * slope / (max(len(spans[at]), 1) if mean else 1)
            weight, apart = getattr(form, "nll", 0), rewards[c] - rewards[r]
            loss = loss + weight * nll[c]
            gradient[spans[c]] -= g[i] * weight / max(len(spans[c]), 1)
            statistics += [1, apart, apart > 0, 1, 1, rewards[c], rewards[r], nll[c] if weight else 0]
        losses.append(loss)
    found = np.array(losses), gradient, rewards, statistics
    return [torch.from_numpy(np.asarray(x, np.float64)) for x in found]
