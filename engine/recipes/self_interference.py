"""SELF (43): training only where greedy decoding fails (The Reasoning Boundary Paradox, arXiv:2510.02230).

    each prompt is answered greedily by the policy as it is; those answered right are dropped from the step
    loss = GRPO's on the rest + beta KL(initial || policy), the forward one, over the whole vocabulary

A step whose prompts are all answered right is skipped. Held-out answers say who wins: the change of log p(correct),
by how likely they were before (`change_from_0_to_0.1`, ...); --eval-samples adds pass@k. With `interference` N each
evaluation also tries what an update on each of N held-out problems does to all of them; `fuserl report` draws the
matrix. That from gradients is in engine/interference.py.

Limit: without the greedy pass and with beta 0 it is GRPO; the gradient of the divergence to the logits is
policy - initial.

Ours: beta 0.001 (the released script has 0); tokens are averaged over the batch; --teacher names another model than the
initial one.

Check: engine/toys/shared_softmax.py: two problems, one softmax, 400 steps, 20 seeds. Nearly every run of GRPO ends near
p = (.998, .001), and how many of twenty end at the other answer is luck: their mean is (.93, .07) and pass@8 .61 here,
where (.979, .018) and .547 are expected.
"""

from fuserl.engine import distilling, prompts, rewards
from fuserl.engine.advantages import standardized
from fuserl.engine.checks import Figure
from fuserl.engine.interference import Trial, Winners, skipping, unsolved_by_greedy
from fuserl.engine.losses import Loss, clipped, summed, token_mean
from fuserl.engine.recipe import Recipe
from fuserl.engine.rollouts import sampled
from fuserl.engine.second_models import Teacher

DEFAULTS = {"group_size": 8, "lr": 1e-6, "minibatches": 2}


def objective(beta: float, **bounds: float) -> Loss:
    """GRPO's surrogate, and the forward KL where it has a weight."""
    surrogate = clipped(reduce=token_mean, **bounds)
    return summed(surrogate, distilling.distilled("forward_kl"), beta) if beta else surrogate


def recipe(
    config, *, beta: float = 0.001, greedy_pass: bool = True, low: float = 0.2, high: float = 0.2, interference: int = 0
) -> Recipe:
    """SELF on the configured task.

    Args:
        beta: weight of the forward KL divergence from the initial model.
        greedy_pass: drop the prompts that greedy decoding answers right.
        low, high: the ratio is clipped to [1 - low, 1 + high].
        interference: held-out problems of the matrix that each evaluation measures; 0 measures none.
    """
    scorer, loss, winners = rewards.scorer(config), objective(beta, low=low, high=high), Winners()
    trial = interference and Trial(interference, config.group_size, scorer, standardized, loss)
    return Recipe(
        name="self_interference",
        prompts=prompts.sampler(config),
        rollout=unsolved_by_greedy(config.group_size, scorer) if greedy_pass else sampled(config.group_size),
        reward=scorer,
        advantage=standardized,
        loss=skipping(loss) if greedy_pass else loss,
        teacher=Teacher() if beta else None,
        evaluate=(lambda policy, held: winners(policy, held) | trial(policy, held)) if trial else winners,
        state={"winners": winners},
    )


def show() -> list[Figure]:
    """pass@k enumerated, the divergence's gradient, the paradox in one softmax, and who gets rich."""
    from fuserl.engine.toys import shared_softmax

    return shared_softmax.figures(standardized, objective)
