"""3 KL-BAYES: KL-regularised RL as variational inference, and other ways to a target (Korbak et al., arXiv:2205.11275).

    J = E_pi r - beta KL(pi || prior) = beta log Z - beta KL(pi || p),   p = prior exp(r / beta) / Z: the posterior
    kl_rl   grad E_pi[(r' - b) log pi],   r' = r + beta (log prior - log pi), no gradient: reverse KL to p
    dpg     grad E_q[(P / (Z q) - b) log pi]: forward KL to p = P / Z (arXiv:2012.11635)
    fdpg    grad E_pi[(-f'(pi Z / P) - b) log pi]: any f-divergence (arXiv:2302.08215)

P is the posterior's, or one with a moment of the reward, or the prior where the reward is at least 1 (`targets`).

Limit: beta 0 is REINFORCE with the mean of the group's others as baseline (RLOO's), and collapses. fdpg with
reverse_kl has the gradient of kl_rl over beta, and with forward_kl that of dpg.

Ours: Z of each prompt apart, a plain mean until its moving average takes over; the coefficient of a moment goes on
being fitted, on every batch. Where q is not pi, expectations under pi have weights pi / q. The proposal "best" takes
the policy's weights when the batch's estimate of KL(p || pi) is below that of KL(p || q).

Check: two tokens of a vocabulary of 8, all 64 sequences enumerated as a batch of a uniform proposal.
"""

from fuserl.engine import prompts, rewards, targets
from fuserl.engine.checks import Figure
from fuserl.engine.contracts import numbers
from fuserl.engine.proposals import Proposal
from fuserl.engine.recipe import Recipe
from fuserl.engine.rollouts import sampled


def recipe(
    config,
    *,
    objective: str = "kl_rl",
    target: str = "posterior",
    beta: float = 0.1,
    divergence: str = "jensen_shannon",
    moment: str = "0.9",
    moment_lr: float = 0.5,
    moment_steps: int = 20,
    z_rate: float = 0.99,
    baseline: bool = True,
    proposal: str = "policy",
) -> Recipe:
    """KL-BAYES on the configured task.

    Args:
        objective: kl_rl, dpg or fdpg.
        target: posterior of the reward, moments or pointwise.
        beta: weight of the KL divergence to the initial model: temperature of the posterior.
        divergence: for fdpg: forward_kl, reverse_kl, jensen_shannon or total_variation.
        moment: mean reward that the target is to have, for moments; or, between commas, means of a reward's facts phi.
        moment_lr: step size of its coefficient.
        moment_steps: steps of its coefficient on each batch.
        z_rate: of the moving average of Z.
        baseline: take what changes no expectation off the credit.
        proposal: who draws: policy, or best: the policy when it was nearest to the target.
    """
    rollout, best = sampled(config.group_size), Proposal.of(config, proposal)
    moments = targets.Moments(numbers("kl_bayes", "moment", moment), lr=moment_lr, steps=moment_steps)
    kept = {"partition": targets.Partition(z_rate)}
    kept |= {"moments": moments} if target == "moments" else {}
    kept |= {"proposal": best} if best else {}
    return Recipe(
        name="kl_bayes",
        prompts=prompts.sampler(config),
        rollout=best.drawing(rollout) if best else rollout,
        reward=targets.with_distinct(rewards.scorer(config)),
        advantage=targets.inferred(objective, target, beta=beta, divergence=divergence, baseline=baseline, **kept),
        loss=targets.reinforced(),
        reads=("old_logprobs", "ref_logprobs"),
        state=kept,
    )


def show() -> list[Figure]:
    """The identity and its gradient, the collapse without KL and none with it, and a sampled gradient, enumerated."""
    from fuserl.engine.toys import kl_bayes

    return kl_bayes.figures(targets.inferred, targets.reinforced())
