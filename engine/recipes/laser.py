"""LaSeR (45): reinforcement learning with last-token self-rewarding (Yang et al., arXiv:2510.14943).

    score = beta_v (log pi(z | prompt, answer) - c_ref), z a special token that no text has, right after the answer
    loss  = GRPO's + alpha mean over finished answers of w (score - reward)^2, w such that right and wrong weigh alike
    A'    = (1 - tau) A + tau A_s, A_s of scores held to [0, 1] in groups where they differ (standard deviation > .1)

The squared error begins after step w1, the mixing after step w1 + w2. A verifier that says z and is paid the reward has
log pi(z) = reward / beta_v + log pi_ref(z) - log Z at its KL-regularised best, and Z is nearly 1. An answer cut short
has no score (0 in A_s). With --eval-samples answers are elected by number and by sum of scores.

Limit: with alpha and tau 0, or before w1, it is GRPO.

Ours: z is the last special token that the tokenizer does not use, else its end of text, read at temperature 1 whatever
the sampling's; the mean is over finished answers.

Check: engine/toys/laser.py, a small transformer that is to repeat a digit and is wrong half of the time; three seeds in
a slow test. Sums modulo 7 it does not learn to judge in 300 steps with alpha .1.
"""

from fuserl.engine import prompts, rewards, verdicts
from fuserl.engine.checks import Figure
from fuserl.engine.losses import clipped
from fuserl.engine.mixtures import mixture
from fuserl.engine.recipe import Recipe
from fuserl.engine.rollouts import noted, sampled


def recipe(
    config,
    *,
    alpha: float = 0.1,
    beta_v: float = 0.1,
    c_ref: float | None = -23.0,
    tau: float = 0.1,
    w1: int = 200,
    w2: int = 200,
    verdict: str | None = None,
    verdict_id: int | None = None,
    low: float = 0.2,
    high: float = 0.2,
) -> Recipe:
    """LaSeR on the configured task.

    Args:
        alpha: weight of the squared error.
        beta_v: of the score.
        c_ref: the reference's log-prob of z; None reads it of the reference for every answer.
        tau: share of the scores' advantages.
        w1: steps before the squared error; 0 for a model that has been trained by reinforcement.
        w2: steps from there to the mixing of advantages.
        verdict, verdict_id: the token z, or its id where it has no text.
        low, high: the ratio is clipped to [1 - low, 1 + high].
    """
    scorer, known = rewards.scorer(config), verdicts.known(verdict, verdict_id)
    of = {"beta_v": beta_v, "c_ref": c_ref}
    return Recipe(
        name="laser",
        prompts=prompts.sampler(config),
        rollout=noted(sampled(config.group_size), known),
        reward=scorer,
        packed=lambda batch: verdicts.with_verdicts(batch, temperature=config.temperature, among=batch.step > w1),
        advantage=verdicts.mixed_advantage(tau=tau, w1=w1, w2=w2, **of),
        loss=mixture(clipped(low=low, high=high), verdicts.squared_verdict(alpha=alpha, **of)),
        reads=(*(["old_logprobs"] if tau else []), *(["ref_logprobs"] if c_ref is None else [])),
        evaluate=verdicts.votes(config.eval_samples, scorer, known, **of) if config.eval_samples else None,
    )


def show() -> list[Figure]:
    """The verifier at its best; the squared error's gradient; what is cut; a transformer that knows what is right."""
    from fuserl.engine.toys import laser

    return laser.figures(verdicts.squared_verdict)
