"""PPO: proximal policy optimisation with a value model (Schulman et al., arXiv:1707.06347; of texts: arXiv:2203.02155).

    r[t] = -beta (old_logprobs - ref_logprobs)[t], and the reward at the last token
    A = generalised advantage estimation of r under the values (gamma, lam), whitened; returns = A + values
    loss = mean over all tokens of -min(ratio A, clip(ratio, 1 - low, 1 + high) A)
         + value_coef max((V - returns)^2, (clip(V, values -+ value_clip) - returns)^2) / 2

The value model is a head on the policy's own trunk, or with `separate_critic` a model of its own.

Limit: with gamma = lam = 1, beta 0, no whitening and values that are all 0 (as they are at the start) A is the reward:
REINFORCE without a baseline.

Ours: beta 0 by default: a verifier's reward needs no leash.
"""

from functools import partial

import torch

from fuserl.engine import checks, prompts, rewards
from fuserl.engine.advantages import generalised
from fuserl.engine.checks import Figure
from fuserl.engine.losses import clipped, squared_value, token_mean
from fuserl.engine.recipe import Recipe, actor_critic
from fuserl.engine.rollouts import sampled

DEFAULTS = {"minibatches": 4}


def recipe(
    config,
    *,
    low: float = 0.2,
    high: float = 0.2,
    beta: float = 0.0,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten: bool = True,
    value_coef: float = 0.5,
    value_clip: float = 0.2,
    separate_critic: bool = False,
    critic_lr: float | None = None,
) -> Recipe:
    """PPO on the configured task.

    Args:
        low, high: the ratio is clipped to [1 - low, 1 + high].
        beta: weight of the KL divergence to the initial model, in the reward.
        gamma: discount of later rewards, per token.
        lam: discount of later temporal differences: 0 trusts the values, 1 the returns.
        whiten: bring advantages to mean 0 and standard deviation 1 over the batch.
        value_coef: weight of the value loss, for a head on the policy's trunk.
        value_clip: the values may move this far from the old ones in one update.
        separate_critic: a value model of its own, started as a copy of the policy.
        critic_lr: learning rate of the separate critic; default the policy's.
    """
    policy = clipped(low=low, high=high, reduce=token_mean)
    loss, critic = actor_critic(policy, squared_value(clip=value_clip), value_coef, separate_critic, critic_lr)
    return Recipe(
        name="ppo",
        prompts=prompts.sampler(config),
        rollout=sampled(config.group_size),
        reward=rewards.scorer(config),
        advantage=generalised(gamma=gamma, lam=lam, beta=beta, whiten=whiten),
        loss=loss,
        reads=("values", "old_logprobs", "ref_logprobs") if beta else ("values",),
        critic=critic,
    )


def show() -> list[Figure]:
    """The limits: REINFORCE with values of 0; one-step differences with lam = 0; right values leave A = 0."""
    batch = checks.example()
    nothing = batch.replace(values=torch.zeros(len(batch.tokens)))
    right = batch.replace(values=batch.to_tokens(batch.rewards))
    some = batch.replace(values=torch.linspace(-1, 1, len(batch.tokens)))
    gae = partial(generalised, gamma=1.0, beta=0.0, whiten=False)
    ahead = torch.where(some.last, some.to_tokens(some.rewards), some.values.roll(-1)) - some.values
    return [
        Figure("A apart from r, values 0", checks.apart(gae(lam=1.0)(nothing).advantages, right.values), 0),
        Figure("A apart from r + V' - V, lam 0", checks.apart(gae(lam=0.0)(some).advantages, ahead), 0),
        Figure("largest A where values are right", float(gae(lam=0.95)(right).advantages.abs().max()), 0),
    ]
