"""VPO (10): preferences with a signed regulariser of the value (Cen et al., arXiv:2405.19320), online or offline.

    loss = mean over pairs of DPO's + sign alpha beta E_cal[log p / p_ref]
    sign   +1 online: optimism, what calibrates becomes less likely; -1 offline: pessimism, it is an anchor
    J*(r) = beta log Z = -beta E_cal[log p / p_ref] for the r that p implies, where E_cal[r] = 0

Offline the data's pairs are learnt from, and its chosen completions, or both, calibrate. Online two completions of each
prompt are drawn and an oracle prefers one by the rewards; each step goes once through all pairs that there are.

Limit: with alpha 0 the loss and its gradient are DPO's.

Ours: online the reference draws one completion of each prompt to calibrate, anew each step, which is held within
beta log p / p_ref = -+bound, as nothing else bounds optimism. The paper's alpha weighs a sum over N pairs and grows as
sqrt(N) offline: here, beside the mean, it is 1 / sqrt(N), N the pairs of the run, and 0.1 online. That optimism pays
online is not claimed: on a toy of twelve arms its regret was no different from DPO's.

Check: engine/toys/vpo.py: a closed form, and 40 offline problems (in a slow test 200) with rewards in [-1, 1] and a
reference of normal logits times 2, both our choice; there alpha is the sum's.
"""

from functools import partial

from fuserl.engine import comparisons, evaluation, mixtures, prompts, rewards
from fuserl.engine.advantages import uniform
from fuserl.engine.checks import Figure
from fuserl.engine.contracts import require, require_one_of
from fuserl.engine.losses import Loss, summed
from fuserl.engine.preferences import preference, value_bonus
from fuserl.engine.recipe import Recipe
from fuserl.engine.rollouts import pairs

FIXED = {"group_size": 2}


def objective(*, beta: float, alpha: float, bound: float, online: bool, calibration: str) -> Loss:
    """The loss: of pairs alone where the data's completions calibrate, else of pairs and what the reference drew."""
    bonus = partial(value_bonus, beta=beta, alpha=-alpha)
    if online:
        bonus = partial(value_bonus, beta=beta, alpha=alpha, bound=bound)
    if calibration == "reference":
        return mixtures.mixture(preference(beta=beta), bonus())
    return summed(preference(beta=beta), bonus(chosen=calibration == "chosen"), 1.0)


def recipe(
    config,
    *,
    online: bool = False,
    beta: float = 0.1,
    alpha: float | None = None,
    bound: float = 3.0,
    calibration: str | None = None,
    oracle: str = "larger",
    second: str = "policy",
    replay: int | None = None,
) -> Recipe:
    """VPO on the configured pairs, or on the policy's own.

    Args:
        online: compare the policy's own completions by their rewards, and explore; else learn from the data's pairs.
        beta: how strongly the policy is held to the initial model.
        alpha: weight of the value; default 0.1 online, 1 / sqrt(pairs of the run) offline.
        bound: of what calibrates, online, in units of the implied reward.
        calibration: what calibrates: chosen or responses of the data, or reference; default chosen, online reference.
        oracle: how rewards are preferred online: larger, or bradley_terry by chance.
        second: who draws a pair's second completion online: policy or reference.
        replay: earlier steps whose pairs each step learns from again online; default all.
    """
    known = ("reference",) if online else ("chosen", "responses", "reference")
    calibration = calibration or known[0]
    require_one_of("vpo", "calibration", calibration, known)
    require("vpo", "overlap", config.overlap, not (online and config.overlap), "off: the reference draws in between")
    if alpha is None:
        alpha = 0.1 if online else (config.steps * config.groups) ** -0.5
    require("vpo", "alpha", alpha, alpha >= 0, "a number >= 0; the sign is that of online")
    reward, buffer = rewards.scorer(config, required=online), comparisons.Buffer(oracle, replay, config.seed)
    if online:
        draw = comparisons.calibrated(comparisons.drawn(reward, second=second))
        slots = {"rollout": draw, "batches": buffer.grown, "state": {"buffer": buffer}}
    else:
        judged = partial(evaluation.of_completions, pairs, preference(beta=beta))
        slots = {"rollout": pairs, "learns_from": ("chosen", "rejected"), "evaluate": judged}
        if calibration == "reference":
            slots |= {"rollout": comparisons.calibrated(pairs), "batches": comparisons.beside}
    return Recipe(
        name="vpo",
        prompts=prompts.sampler(config),
        reward=reward,
        advantage=uniform,
        loss=objective(beta=beta, alpha=alpha, bound=bound, online=online, calibration=calibration),
        reads=("ref_logprobs",),
        **slots,
    )


def show() -> list[Figure]:
    """DPO's limit, the sign of the value's gradient, its closed form, and what pessimism is worth offline."""
    from fuserl.engine.toys import vpo

    return vpo.figures(objective)
