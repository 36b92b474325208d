"""MMR1-VAS (57): variance-aware sampling of prompts (Leng et al., arXiv:2509.21268).

    VPS(x) = a P (1 - P) + b TDS       P and TDS of n completions of x, made anew for all x every t_upd steps
    floor(lam groups) prompts of a step with probability VPS / sum VPS, the others by a shuffled walk; then GRPO

Limit: with lam 0 the prompts are those of the plain sampler, and a run is GRPO's, bit for bit.

Two cautions: P (1 - P) is the reward's total variance, not the part within trajectories; and the paper's lower bound of
the variance between them does not follow (a Lipschitz condition gives an upper one): TDS is a heuristic.

Ours: scores take a policy, so those of the first step are equal; a completion is right where its reward is at
least 1; TDS is 1 - self-BLEU of token ids (the release's training notes feed self-BLEU itself, which is
diversity="similarity"); a generator stands for a data set of `pool` problems. The completions that scores take are
counted in `refresh_rollouts`.
"""

from fuserl.engine import prompts, rewards
from fuserl.engine.advantages import standardized
from fuserl.engine.checks import Figure
from fuserl.engine.losses import clipped
from fuserl.engine.recipe import Recipe
from fuserl.engine.variance_sampling import VarianceSampler, refreshed


def recipe(
    config,
    *,
    lam: float = 0.5,
    a: float = 0.8,
    b: float = 0.2,
    n: int = 32,
    t_upd: int = 35,
    diversity: str = "self_bleu",
    momentum: float = 0.0,
    min_max: bool = True,
    pool: int = 128,
    low: float = 0.2,
    high: float = 0.2,
    beta: float = 0.01,
) -> Recipe:
    """Variance-aware sampling on the configured task.

    Args:
        lam: share of a step's prompts that is drawn by score.
        a, b: weights in a score of the variance of the outcomes, and of the diversity of the completions.
        n: completions of each prompt that its score is made of.
        t_upd: steps between scores.
        diversity: self_bleu (1 - self-BLEU-123), distinct (distinct-3), edit_distance or similarity (self-BLEU).
        momentum: share of its old score that a prompt keeps.
        min_max: bring scores to [0, 1] over the data set.
        pool: problems that stand for a generator's; a file has its own.
        low, high: the ratio is clipped to [1 - low, 1 + high].
        beta: weight of the KL divergence to the initial model.
    """
    every, scorer = prompts.pool(config, pool), rewards.scorer(config)
    sampler = VarianceSampler(
        len(every), groups=config.groups, seed=config.seed, lam=lam, a=a, b=b, momentum=momentum, min_max=min_max
    )
    return Recipe(
        name="vas",
        prompts=lambda step: [every[place] for place in sampler.places(step)],
        rollout=refreshed(sampler, every, scorer, group_size=config.group_size, n=n, t_upd=t_upd, diversity=diversity),
        reward=scorer,
        advantage=standardized,
        loss=clipped(low=low, high=high, beta=beta),
        state={"sampler": sampler},
    )


def show() -> list[Figure]:
    """What is true of the variance, how often a prompt is drawn, and ten banks of bandits of which few teach."""
    from fuserl.engine.toys import vas

    return vas.figures(standardized, clipped())
