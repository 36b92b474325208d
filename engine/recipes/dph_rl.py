"""17 DPH-RL: f-divergence from what the initial policy solves (Li et al., arXiv:2509.07430). Long for its options.

    before     `presamples` answers of the initial policy to every problem of the run; solved: a share `solved` is right
    explored   the other problems: GRPO's surrogate with clip, dual clip and the mean over tokens, no KL
    rehearsed  one right answer of each solved problem: eta f(u), u = exp(logprob - that of the initial policy)
    loss       their sum over a step's problems of either kind, each by its own mean; `interleaved`: an update each

f is one of `generators`: forward, jensen_shannon, alpha, reverse, or jensen_shannon_definition, which has a second term
on explored rollouts in a share of the steps; "none" rehearses nothing, and with `beta` is GRPO with its KL.

Limit: where the initial policy solves nothing it is GRPO with the mean over tokens.

Ours: problems are those that the run will ask; solved is all right (8 of 8); stored log-probs are scored by the model
that learns; a step that has solved problems only explores one of them; the second term's steps are drawn by the seed.

Check: eight arms are what the initial policy gives, and rewards are for two (toys/dph_rl.py): two seeds here, eight and
reverse and jensen_shannon in a slow test. The means are of p and q near enough that no value is held to its bound.
"""

import dataclasses
import itertools
import math
import random

from fuserl.engine import generators, prompts, rewards
from fuserl.engine.advantages import standardized
from fuserl.engine.checks import Figure, at_least
from fuserl.engine.contracts import require, require_one_of
from fuserl.engine.losses import clipped, summed, token_mean
from fuserl.engine.mixtures import emptied, joined, mixture, only, woven
from fuserl.engine.recipe import Recipe
from fuserl.engine.rehearsal import Rehearsal
from fuserl.engine.toys import dph_rl as toys

KINDS = (*generators.KINDS, "none")
DEFINITION = "jensen_shannon_definition"


def recipe(
    config,
    *,
    divergence: str = "forward",
    eta: float = 0.05,
    alpha: float = 0.2,
    presamples: int = 8,
    solved: float = 1.0,
    interleaved: bool = False,
    mean_share: float = 0.1,
    low: float = 0.2,
    high: float = 0.28,
    dual: float | None = 3.0,
    beta: float = 0.0,
) -> Recipe:
    """DPH-RL on the configured task.

    Args:
        divergence: forward, jensen_shannon, alpha, reverse, jensen_shannon_definition or none.
        eta: weight of the rehearsal: .01 to .05 (forward, alpha), .05 to .2 (jensen_shannon).
        alpha: of the divergence of that name.
        presamples: answers of the initial policy to every problem (k).
        solved: share of them that must be right for a problem to be rehearsed.
        interleaved: rehearse in an update of its own.
        mean_share: share of the steps in which jensen_shannon_definition has its term on explored rollouts.
        low, high: the ratio is clipped to [1 - low, 1 + high].
        dual: bound of the loss of tokens with a negative advantage, in units of it.
        beta: weight of the reverse KL divergence to the reference on explored rollouts.
    """
    require("dph_rl", "presamples", presamples, presamples >= 1, "an integer >= 1")
    require("dph_rl", "solved", solved, 0 < solved <= 1, "in (0, 1]")
    require("dph_rl", "mean_share", mean_share, 0 <= mean_share <= 1, "in [0, 1]")
    sampler, scorer = prompts.sampler(config), rewards.scorer(config)
    stored = Rehearsal(scorer, samples=presamples, threshold=solved)

    def rollout(policy, asked):
        if divergence != "none" and not stored.drawn:
            every = itertools.chain.from_iterable(map(sampler, range(1, config.steps + 1)))
            stored.draw(policy, [*every], config.groups)
        return policy.generate(stored.unsolved(asked) or asked[:1], group_size=config.group_size)

    def second_half(step):
        return random.Random(f"{config.seed} {step}").random() < mean_share

    clip = {"low": low, "high": high, "dual": dual}
    loss = both(divergence, eta=eta, alpha=alpha, beta=beta, when=second_half, **clip)
    return Recipe(
        name="dph_rl",
        prompts=sampler,
        rollout=rollout,
        reward=scorer,
        advantage=lambda batch: mixed(batch, stored.batch(sampler(batch.step), batch)),
        loss=loss,
        reads=loss.reads,
        batches=apart if interleaved else None,
        state={"rehearsal": stored},
    )


def mixed(explored, rehearsed):
    """Explored rollouts with their advantages as objective 0 and rehearsed ones, if any, as 1."""
    explored = explored.with_advantages(standardized(explored))
    return woven(joined(explored, emptied(explored) if rehearsed is None else rehearsed))


def apart(batch):
    """The two objectives of a batch as a batch each; without an empty one."""
    return [only(batch, each.lengths > 0) for each in batch.objectives if each.counts.rollouts]


def both(divergence: str, *, eta: float, alpha: float = 0.2, beta: float = 0.0, when=bool, **clip):
    """The surrogate of objective 0 and eta f of objective 1."""
    require_one_of("dph_rl", "divergence", divergence, KINDS)
    explored = surrogate = clipped(**clip, beta=beta, reduce=token_mean)
    if divergence == DEFINITION:
        second = generators.towards_mean(eta=eta, when=when)
        known = lambda batch: None if beta or second.live(batch) is None else surrogate.live(batch)  # noqa: E731
        explored = dataclasses.replace(summed(surrogate, second, 1.0), live=known)
    kind = "forward" if divergence == "none" else divergence
    return mixture(explored, generators.generated(kind, eta=0.0 if divergence == "none" else eta, alpha=alpha))


def show() -> list[Figure]:
    """The generators' means and derivatives; what is forgotten is pulled back; the arms that stay, forward and none."""
    found, a = [], 0.2
    for kind, name, at_one in (("forward", "KL", 1.0), ("jensen_shannon", "2 JS", 0.5), ("alpha", "alpha", 1.0)):
        loss = both(kind, eta=1.0, alpha=a)
        value, slope, curvature = toys.at_one(loss)
        found += [
            Figure(f"{kind}: mean of f apart from {name}", toys.mean_apart(loss, kind, a), 0, 1e-12),
            Figure(f"{kind}: f(1) and f'(1)", max(abs(value), abs(slope)), 0, 1e-12),
            Figure(f"{kind}: f''(1)", curvature, at_one, 1e-6),
        ]
    stops, pulls = (toys.forgotten(both(k, eta=1.0), d) for k, d in (("jensen_shannon", 30.0), ("forward", 10.0)))
    kept, lost = (toys.arms(both(kind, eta=0.2), mixed, seeds=(0, 1)) for kind in ("forward", "none"))
    return [
        *found,
        Figure("jensen_shannon where u = e^-30: f", stops[0], math.log(2), 1e-9),
        Figure("its gradient there", stops[1], 0, 1e-9),
        Figure("forward's gradient where u = e^-10", pulls[1], math.expm1(-10)),
        at_least("effective number of right arms, forward over none", kept["number"] / lost["number"], 2.0),
        at_least("least probability of a right arm, forward over none", kept["least"] / lost["least"], 20.0),
        at_least("probability of what is rewarded, forward", kept["rewarded"], 0.9),
    ]
