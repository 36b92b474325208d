"""PreRL and DSRL (35): rewards act on P(y), then on P(y|x) (Tan et al., arXiv:2604.14142).

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

import math

from fuserl.engine import openings, probes, prompts, rewards
from fuserl.engine.checks import Figure
from fuserl.engine.contracts import WEIGHT, require
from fuserl.engine.losses import Loss, clipped, token_mean
from fuserl.engine.mixtures import mixture
from fuserl.engine.recipe import Recipe
from fuserl.engine.reflections import Reflections
from fuserl.engine.rollouts import noted, sampled, scored
from fuserl.engine.second_models import Teacher


def objective(*, weight: float, beta: float = 0.0, **clip: float | None) -> Loss:
    """L_RL of objective 0 and weight L_P of objective 1."""
    require("pre_rl", "weight", weight, 0 <= weight < math.inf, WEIGHT)
    free = clipped(**clip, reduce=lambda batch: weight * token_mean(batch))
    return mixture(clipped(**clip, beta=beta, reduce=token_mean), free)


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
        pre_samples, rl_samples: rollouts that L_P, and that L_RL sees: negative, positive, both or none.
        fixed: L_P's advantages are -1 for wrong and +1 for right, so that groups without a right answer count too.
        low, high: the ratio is clipped to [1 - low, 1 + high].
        dual: bound of the loss of tokens with a negative advantage, in units of it (c).
        beta: weight of the KL divergence to the reference in L_RL.
        bos: the token in the prompt's place; default the tokenizer's beginning of text.
        probe: measure the cosine of both losses' gradients and the ratio of their values: two passes more a step.
    """
    scorer, words, clip = rewards.scorer(config), Reflections(), {"low": low, "high": high, "dual": dual}
    spaces = openings.two_spaces(pre_samples=pre_samples, rl_samples=rl_samples, fixed=fixed)
    draw = noted(sampled(config.group_size), openings.known(bos), words)
    if probe:
        require("pre_rl", "overlap", config.overlap, not config.overlap, "off: probe must have the model to itself")
        draw = probes.aligned(scored(draw, scorer), spaces, clipped(**clip, reduce=token_mean))
    return Recipe(
        name="pre_rl",
        prompts=prompts.sampler(config),
        rollout=draw,
        reward=scorer,
        advantage=openings.phased(spaces, switch=switch, mixed=mixed),
        loss=objective(weight=weight, beta=beta, **clip),
        reference=Teacher(renewed=None if mixed else switch),
        state={"reflections": words},
    )


def show() -> list[Figure]:
    """The gradient of log P(y); where L_P moves mass; L_RL at both sides of the switch; groups that all agree."""
    from fuserl.engine.toys import pre_rl

    return pre_rl.figures(openings.phased, objective)
