"""Losses of preferences as their papers write them, a loop over pairs or rollouts, beside ours: for test_losses."""

import torch
from batches import each_rollout

from fuserl.engine.preferences import bradley_terry, cpo, ipo, kto, orpo, preference, simpo


def pair_formula(b, score, each):
    """The mean over pairs of each(score of the chosen, score of the rejected)."""
    total = 0.0
    for group in b.group.unique():
        one, two = (b.group == group).nonzero().squeeze(-1).tolist()
        chosen, rejected = (one, two) if b.rewards[one] > b.rewards[two] else (two, one)
        total = total + each(*(score(each_rollout(b)[at]) for at in (chosen, rejected)))
    return total / len(b.group.unique())


def preference_formula(x, b, beta, smoothing):
    def each(chosen, rejected):
        p = torch.sigmoid(beta * (chosen - rejected))
        return -(1 - smoothing) * p.log() - smoothing * (1 - p).log()

    return pair_formula(b, lambda span: (x["logprob"][span] - b.ref_logprobs[span].double()).sum(), each)


def bradley_terry_formula(x, b, centre):
    def each(chosen, rejected):
        return (1 + (rejected - chosen).exp()).log() + centre * (chosen + rejected).square()

    return pair_formula(b, lambda span: x["score"][span.stop - 1], each)


def scores_formula(x, b, each, *, mean, ref):
    """A loss of pairs of (score, mean log-prob)."""

    def score(span):
        logprob = x["logprob"][span]
        kept = logprob - b.ref_logprobs[span].double() if ref else logprob
        return (kept.mean() if mean else kept.sum()), logprob.mean()

    return pair_formula(b, score, each)


def odds(s):
    return (s.exp() / (1 - s.exp())).log()


def kto_formula(x, b, beta, desirable, undesirable, baseline):
    total = 0.0
    for span, reward in zip(each_rollout(b), b.rewards.tolist(), strict=True):
        if span.start == span.stop:
            continue
        score = (x["logprob"][span] - b.ref_logprobs[span].double()).sum() - baseline
        sign, weight = (-1, desirable) if reward > 0 else (1, undesirable)
        total = total + weight * torch.sigmoid(sign * beta * score) / len(b.group)
    return total


LOSSES = {
    "preference": (
        preference(beta=0.5, label_smoothing=0.1),
        lambda x, b: preference_formula(x, b, 0.5, 0.1),
    ),
    "bradley_terry": (bradley_terry(centre=0.05), lambda x, b: bradley_terry_formula(x, b, 0.05)),
    "ipo": (
        ipo(beta=0.4),
        lambda x, b: scores_formula(x, b, lambda c, r: (c[0] - r[0] - 1 / 0.8).square(), mean=True, ref=True),
    ),
    "simpo": (
        simpo(beta=2.0, gamma=0.5),
        lambda x, b: scores_formula(
            x, b, lambda c, r: -torch.sigmoid(2 * (c[0] - r[0]) - 0.5).log(), mean=True, ref=False
        ),
    ),
    "cpo": (
        cpo(beta=0.3, nll=0.5),
        lambda x, b: scores_formula(
            x, b, lambda c, r: -torch.sigmoid(0.3 * (c[0] - r[0])).log() - 0.5 * c[1], mean=False, ref=False
        ),
    ),
    "orpo": (
        orpo(lam=0.2),
        lambda x, b: scores_formula(
            x, b, lambda c, r: -0.2 * torch.sigmoid(odds(c[0]) - odds(r[0])).log() - c[1], mean=True, ref=False
        ),
    ),
    "kto": (
        kto(beta=0.3, desirable=1.2, undesirable=0.7, baseline=0.1),
        lambda x, b: kto_formula(x, b, 0.3, 1.2, 0.7, 0.1),
    ),
}
