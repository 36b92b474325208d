"""35 PreRL and DSRL: rewards act on P(y), then on P(y|x) (Tan et al., arXiv:2604.14142). Long for its eleven options.

    L_P  = mean over tokens of CLIP(ratio, A_P), of log-probs behind [BOS] instead of the prompt; A_P = r - group's mean
    L_RL = mean over tokens of CLIP(ratio, A), of log-probs behind the prompt; A = A_P / the group's standard deviation
    step <= switch: weight L_P        later: L_RL        with `mixed`, always: L_RL + weight L_P
    CLIP: -min(ratio A, clip(ratio, 1 - low, 1 + high) A), at most dual |A| where A < 0

Either loss sees rollouts with A < 0 alone ("negative": NSR), A > 0 alone ("positive": PSR), "both" or "none"; the means
are over what it sees. The optimiser goes on through the switch; a reference becomes the policy as it is then.

Limit: after the switch it is GRPO with the mean over tokens, bit for bit; in the warm-up L_RL has no gradient at all.

Ours: the word lists of `transitions` and `reflections`; weights for stale rollouts are L_RL's alone, as nothing drew
from P(y); a reference that the user names is not renewed; `probe` leaves the KL term out.
"""

import dataclasses
import math

import torch

from fuserl.engine import openings, probes, prompts, rewards
from fuserl.engine.advantages import standardized
from fuserl.engine.batch import batch_of
from fuserl.engine.checks import Figure, at_most
from fuserl.engine.contracts import WEIGHT, require
from fuserl.engine.losses import clipped, token_mean
from fuserl.engine.mixtures import emptied, joined, mixture, woven
from fuserl.engine.recipe import Recipe
from fuserl.engine.reflections import Reflections
from fuserl.engine.second_models import Teacher
from fuserl.engine.toys import pre_rl as toys


def recipe(
    config,
    *,
    switch: int = 20,
    weight: float = 0.01,
    mixed: bool = False,
    pre_samples: str = "negative",
    rl_samples: str = "both",
    fixed: bool = False,
    low: float = 0.2,
    high: float = 0.2,
    dual: float | None = 10.0,
    beta: float = 0.0,
    bos: str | None = None,
    probe: bool = False,
) -> Recipe:
    """PreRL, and DSRL after it, on the configured task.

    Args:
        switch: steps of PreRL before ordinary RL (S).
        weight: of L_P (w).
        mixed: both losses in every step, and no switch.
        pre_samples: rollouts that L_P sees: negative, positive, both or none.
        rl_samples: rollouts that L_RL sees: negative, positive, both or none.
        fixed: L_P's advantages are -1 for wrong and +1 for right, so that groups without a right answer count too.
        low, high: the ratio is clipped to [1 - low, 1 + high].
        dual: bound of the loss of tokens with a negative advantage, in units of it (c).
        beta: weight of the KL divergence to the reference in L_RL.
        bos: the token in the prompt's place; default the tokenizer's beginning of text.
        probe: measure the cosine of both losses' gradients and the ratio of their values: two passes more a step.
    """
    clip = {"low": low, "high": high, "dual": dual}
    scorer, words = rewards.scorer(config), Reflections()
    spaces = openings.two_spaces(pre_samples=pre_samples, rl_samples=rl_samples, fixed=fixed)

    return Recipe(
        name="pre_rl",
        prompts=prompts.sampler(config),
        rollout=watched(config, words, bos, probe and (scorer, spaces, clip)),
        reward=scorer,
        advantage=phased(spaces, switch=switch, mixed=mixed),
        loss=both(weight=weight, beta=beta, **clip),
        reference=Teacher(renewed=None if mixed else switch),
        state={"reflections": words},
    )


def watched(config, words: Reflections, bos: str | None, probe):
    """The rollout slot: completions with the token that opens texts, words counted, and what a probe found."""
    if probe and config.overlap:
        raise ValueError("pre_rl: probe must have the model to itself; --overlap updates it meanwhile. Leave one out.")

    def rollout(policy, asked):
        rollouts = policy.generate(asked, group_size=config.group_size)
        opening = torch.full((len(rollouts), 1), openings.token(policy.tokenizer, bos))
        rollouts = dataclasses.replace(rollouts, facts={"opening": opening, **words(rollouts.texts)})
        if not probe:
            return rollouts
        scorer, spaces, clip = probe
        with policy.meter.phase("reward"):
            scores, facts = scorer(rollouts)
        plain = clipped(**clip, reduce=token_mean)
        prompted, free = ((part, plain) for part in spaces(batch_of(rollouts, scores)))
        return dataclasses.replace(rollouts, scores=(scores, facts | probes.alignment(policy, free, prompted)))

    return rollout


def phased(spaces, *, switch: int = 20, mixed: bool = False):
    """The advantage slot: L_RL's rollouts as objective 0 and L_P's as 1, in the steps that are theirs."""
    require("pre_rl", "switch", switch, switch >= 0, "an integer >= 0")

    def advantage(batch):
        prompted, free = spaces(batch)
        if mixed:
            return woven(joined(prompted, free))
        return joined(emptied(prompted), free) if batch.step <= switch else joined(prompted, emptied(free))

    return advantage


def both(*, weight: float = 0.01, beta: float = 0.0, low: float = 0.2, high: float = 0.2, dual: float | None = 10.0):
    """L_RL of objective 0 and weight L_P of objective 1."""
    require("pre_rl", "weight", weight, 0 <= weight < math.inf, WEIGHT)
    clip = {"low": low, "high": high, "dual": dual}
    return mixture(
        clipped(**clip, beta=beta, reduce=token_mean), clipped(**clip, reduce=lambda batch: weight * token_mean(batch))
    )


def show() -> list[Figure]:
    """The gradient of log P(y); where L_P moves mass; L_RL at both sides of the switch; groups that all agree."""
    slots = {"advantage": phased(openings.two_spaces(), switch=3), "loss": both()}
    plain = {"advantage": standardized, "loss": clipped(dual=10.0, reduce=token_mean)}
    warm, after = toys.around_the_switch(slots, plain, weight=0.01, switch=3)
    return [
        at_most("grad log P(y) apart from the posterior's mean of grad log P(y|x)", toys.marginal(both()), 1e-6),
        Figure("L_P's step apart from -|A| (onehot - p)", toys.redistributed(slots["advantage"], both(weight=1.0)), 0),
        Figure("largest gradient of L_RL in the last step of the warm-up", warm[0], 0),
        Figure("that step's gradient apart from weight grad L_P", warm[1], 0),
        Figure("the next step's gradient apart from GRPO's", after, 0, 0.0),
        Figure("loss and gradient where all groups agree", toys.agreed(slots, steps=(3, 4)), 0, 0.0),
    ]
