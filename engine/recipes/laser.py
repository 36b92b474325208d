"""45 LaSeR: reinforcement learning with last-token self-rewarding (Yang et al., arXiv:2510.14943).

    score = beta_v (log pi(z | prompt, answer) - c_ref), z a special token that no text has, right after the answer
    loss  = GRPO's + alpha mean over finished answers of w (score - reward)^2, w such that right and wrong weigh alike
    A'    = (1 - tau) A + tau A_s, A_s of scores held to [0, 1] in groups where they differ (standard deviation > .1)

The squared error begins after step w1, the mixing of advantages after step w1 + w2. A verifier that says z and is paid
the reward has log pi(z) = reward / beta_v + log pi_ref(z) - log Z at its KL-regularised best, and Z is nearly 1. An
answer that was cut has no score (0 in A_s). With `eval_samples`, answers are elected by number and by sum of scores.

Limit: with alpha and tau 0, or before w1, it is GRPO.

Ours: the mean is over finished answers; z is the last special token that the tokenizer does not use, else its end of
text; its log-prob is at temperature 1 whatever the sampling's.

Check: toys/laser.py, a small transformer that is to repeat a digit and is wrong half of the time: one seed here, three
in a slow test. Sums modulo 7 it does not learn to judge in 300 steps with alpha .1.
"""

import dataclasses
import math

from fuserl.engine import prompts, rewards, verdicts
from fuserl.engine.checks import Figure, at_least, at_most
from fuserl.engine.contracts import require
from fuserl.engine.losses import clipped
from fuserl.engine.mixtures import mixture
from fuserl.engine.recipe import Recipe
from fuserl.engine.toys import laser as toys


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
        verdict: the token z.
        verdict_id: its id, where it has no text.
        low, high: the ratio is clipped to [1 - low, 1 + high].
    """
    for name, value in (("w1", w1), ("w2", w2)):
        require("laser", name, value, value >= 0, "an integer >= 0")
    scorer, of = rewards.scorer(config), {"beta_v": beta_v, "c_ref": c_ref}
    number = lambda policy: verdicts.token(policy.tokenizer, verdict, verdict_id)  # noqa: E731

    def rollout(policy, asked):
        rollouts = policy.generate(asked, group_size=config.group_size)
        return dataclasses.replace(rollouts, facts=verdicts.known(rollouts, number(policy)))

    return Recipe(
        name="laser",
        prompts=prompts.sampler(config),
        rollout=rollout,
        reward=scorer,
        packed=lambda batch: verdicts.with_verdicts(batch, temperature=config.temperature, among=batch.step > w1),
        advantage=verdicts.mixed_advantage(tau=tau, after=w1 + w2, **of),
        loss=mixture(clipped(low=low, high=high), verdicts.squared_verdict(alpha=alpha, **of)),
        reads=(*(["old_logprobs"] if tau else []), *(["ref_logprobs"] if c_ref is None else [])),
        evaluate=verdicts.votes(config.eval_samples, scorer, number, **of) if config.eval_samples else None,
    )


def show() -> list[Figure]:
    """The verifier at its best; the squared error's gradient; what is cut; a transformer that knows what is right."""
    log_z = math.log1p(math.exp(-23) * math.expm1(1 / 0.1))
    loss = verdicts.squared_verdict(alpha=0.1, beta_v=0.1, c_ref=-23.0)
    best = verdicts.scores(1 / 0.1 - 23 - log_z, None, beta_v=0.1, c_ref=-23.0)
    cut, single = toys.cut(loss), toys.single(loss)
    learnt = toys.learnt(loss, seeds=(0,))
    return [
        at_most("log Z where pi_ref(z) is e^-23", log_z, 1e-5),
        Figure("the score of the verifier's best for a right answer", best, 1.0, 1e-6),
        Figure("gradient apart from 2 alpha w (score - reward) beta_v (onehot - p)", toys.gradient_apart(loss), 0),
        Figure("gradient of answers that were cut", cut, 0, 0.0),
        Figure("whether the loss of right answers alone is finite (1 is yes)", single, 1.0),
        at_least("balanced accuracy of the score, wrong answers never shown", learnt["accuracy"], 0.9),
        at_most("next-token KL to the model without the term", learnt["kl"], 0.02),
    ]
