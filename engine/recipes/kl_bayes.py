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

import torch

from fuserl.engine import prompts, rewards, targets
from fuserl.engine.checks import Figure, at_most
from fuserl.engine.contracts import require, require_one_of
from fuserl.engine.proposals import Proposal
from fuserl.engine.recipe import Recipe
from fuserl.engine.rollouts import sampled
from fuserl.engine.toys import kl_bayes as toy


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
        moment: mean reward that the target is to have, for moments; or means of the facts phi (B, K) of a reward,
            with commas between them.
        moment_lr: step size of its coefficient.
        moment_steps: steps of its coefficient on each batch.
        z_rate: of the moving average of Z.
        baseline: take what changes no expectation off the credit.
        proposal: who draws: policy, or best: the policy when it was nearest to the target.
    """
    require_one_of("kl_bayes", "objective", objective, ("kl_rl", "dpg", "fdpg"))
    require_one_of("kl_bayes", "proposal", proposal, ("policy", "best"))
    apart = proposal == "best" and (config.overlap or config.rollout != "embedded")
    require("kl_bayes", "proposal", proposal, not apart, "policy where rollouts are drawn ahead or by vLLM")
    best, partition = Proposal() if proposal == "best" else None, targets.Partition(z_rate)
    moments = targets.Moments(_numbers(moment), lr=moment_lr, steps=moment_steps)
    rollout, scorer = sampled(config.group_size), rewards.scorer(config)
    state = {"partition": partition} | ({"proposal": best} if best else {})

    def diverse(rollouts):
        scores, facts = scorer(rollouts)
        return scores, facts | {f"distinct_{n}": targets.distinct(rollouts.tokens, rollouts.offsets, n) for n in (1, 2)}

    return Recipe(
        name="kl_bayes",
        prompts=prompts.sampler(config),
        rollout=best.drawing(rollout) if best else rollout,
        reward=diverse,
        advantage=targets.inferred(
            objective, target, beta=beta, divergence=divergence, partition=partition, moments=moments,
            baseline=baseline, proposal=best,
        ),
        loss=targets.reinforced(),
        reads=("old_logprobs", "ref_logprobs"),
        state=state | ({"moments": moments} if target == "moments" else {}),
    )  # fmt: skip


def _numbers(moment: str) -> list[float]:
    try:
        return [float(x) for x in moment.split(",")]
    except ValueError as error:
        raise ValueError(
            f"kl_bayes: moment must be numbers with commas between them; got {moment!r}. Give one per feature."
        ) from error


def show() -> list[Figure]:
    """The identity and its gradient, the collapse without KL and none with it, and a sampled gradient, enumerated."""
    world, beta, loss = toy.Enumerable(moved=1.0), 0.5, targets.reinforced()
    p, log_z = world.posterior(beta)
    bound = beta * (log_z - toy.divergence(world.logs(world.table.logits).detach(), p))
    value = float(world.objective(beta).detach())
    exact = targets.inferred(beta=beta, baseline=False)
    slope = -torch.autograd.grad(world.objective(beta), world.table.logits)[0]
    batch = exact(world.every())
    ours = world.table.gradient(batch, loss)
    drawn = toy.sampled_error(world, targets.inferred(beta=beta), loss, slope)
    free = toy.Enumerable(lr=400.0).trained(targets.inferred(beta=0.0, baseline=False), loss, 300)
    held = toy.Enumerable(lr=10.0).trained(exact, loss, 2000)
    forward = toy.Enumerable(lr=4.0).trained(targets.inferred("dpg", beta=beta, baseline=False), loss, 2000)
    return [
        at_most("E r - beta KL apart from beta (log Z - KL(pi || p))", abs(value - bound), 1e-12),
        at_most("the mean credit of a batch apart from it", abs(float(batch.advantages.mean()) - bound), 1e-12),
        at_most("its gradient apart from autograd's", float((ours - slope).abs().max()), 1e-10),
        at_most("entropy where beta is 0", toy.entropy(free), 0.01),
        at_most("KL(pi || p) where beta is 0.5", toy.divergence(held, p), 1e-4),
        at_most("entropy apart from that of p", abs(toy.entropy(held) - toy.entropy(p)), 0.01),
        at_most("KL(p || pi) after dpg", toy.divergence(p, forward), 1e-3),
        at_most("gradient of 100,000 draws: standard errors from the exact one", drawn, 4),
    ]
