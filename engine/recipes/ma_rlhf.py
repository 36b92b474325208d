"""1 MA-RLHF: PPO whose decision is a macro action, a run of tokens (Chai et al., arXiv:2410.02743).

    macro k = tokens [b_k, b_k+1) of a rollout; the last token, which has the reward, is always one by itself
    V[k] = sum of sigma values in k,   R[k] = the same of r[t] = -beta (old_logprobs - ref_logprobs)[t], and the reward
    delta[k] = R[k] + gamma V[k + 1] - V[k],   A[k] = delta[k] + gamma lam A[k + 1],   returns = A + V
    loss = PPO's, whitened nowhere, where every token of k has A[k] and its value the return of k

Limit: macros of one token (n = 1) are PPO, bit for bit.

Ours: the paper draws at --temperature 0.8. `repeat_times` is 4, in a fresh order for each rollout. The perplexity rule
cuts where the perplexity rises; the released code cuts a token before. Constituents and statements are found without a
parser, as `parsing` says. A ratio "macro" makes one term of each macro, weighing as much as one token: both ratios
agree on-policy. `reward_agg` "mean" is the released code's, which averages the KL penalty; "sum" is the paper's text.
"""

from functools import partial

from fuserl.engine import prompts, rewards
from fuserl.engine.checks import Figure
from fuserl.engine.contracts import require_one_of
from fuserl.engine.losses import clipped, squared_value, summed, token_mean
from fuserl.engine.macro_actions import clipped_macros, macro_generalised, segmented
from fuserl.engine.recipe import Recipe, actor_critic
from fuserl.engine.rollouts import sampled

DEFAULTS = {"minibatches": 4}


def recipe(
    config,
    *,
    segmentation: str = "ngram",
    n: int = 5,
    repeat_times: int = 4,
    leaves: int = 5,
    sigma: str = "equal",
    reward_agg: str = "mean",
    ratio: str = "token",
    reward_clip: float = 2.5,
    clip: float = 0.2,
    beta: float = 0.05,
    gamma: float = 1.0,
    lam: float = 0.95,
    value_coef: float = 0.5,
    value_clip: float = 0.2,
    separate_critic: bool = False,
    critic_lr: float | None = None,
) -> Recipe:
    """MA-RLHF on the configured task.

    Args:
        segmentation: where macros end: ngram, randomised, perplexity, constituents or statements.
        n: tokens of a macro, for ngram.
        repeat_times: how often each length of 1, 2, 3, 5 and 10 occurs in a rollout, for randomised.
        leaves: most words of a macro, for constituents.
        sigma: what a macro averages over: equal, unit (its last token) or position (1 / place).
        reward_agg: a macro's reward is the mean by sigma, or the sum.
        ratio: of each token, or of each macro.
        reward_clip: rewards are held to minus and plus this.
        clip: the ratio is clipped to 1 -+ clip.
        beta: weight of the KL divergence to the initial model, in the reward.
        gamma: discount of later rewards, per macro.
        lam: discount of later temporal differences: 0 trusts the values, 1 the returns.
        value_coef: weight of the value loss, for a head on the policy's trunk.
        value_clip: the values may move this far from the old ones in one update.
        separate_critic: a value model of its own, started as a copy of the policy.
        critic_lr: learning rate of the separate critic; default the policy's.
    """
    require_one_of("ma_rlhf", "ratio", ratio, ("token", "macro"))
    rollout, rule = segmented(
        sampled(config.group_size), segmentation, n=n, repeat_times=repeat_times, leaves=leaves, seed=config.seed
    )
    make = clipped_macros if ratio == "macro" else partial(clipped, reduce=token_mean)
    policy = make(low=clip, high=clip)
    loss, critic = actor_critic(policy, squared_value(clip=value_clip), value_coef, separate_critic, critic_lr)
    reads = ("old_logprobs", "ref_logprobs") if beta else ("ref_logprobs",) if segmentation == "perplexity" else ()
    return Recipe(
        name="ma_rlhf",
        prompts=prompts.sampler(config),
        rollout=rollout,
        reward=rewards.scorer(config),
        advantage=macro_generalised(
            rule, gamma=gamma, lam=lam, beta=beta, sigma=sigma, reward_agg=reward_agg, reward_clip=reward_clip
        ),
        loss=loss,
        reads=("values", *reads),
        critic=critic,
    )


def show() -> list[Figure]:
    """The limit, the telescoped sum, how far a reward at the end reaches, and how much noise of the critic is left."""
    from fuserl.engine.toys import ma_rlhf

    return ma_rlhf.figures(macro_generalised, summed(clipped(reduce=token_mean), squared_value(clip=0.2), 0.5))
