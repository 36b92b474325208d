"""VLA-OPD (66): on-policy distillation with a reverse KL per token (Zhong et al., arXiv:2603.26666).

    the student acts, in states of its own; a frozen teacher scores the action tokens that it took
    r[t] = teacher_logprob[t] - old_logprob[t], raw: no reward of the environment, no return to go, no normalisation
    loss = mean over all tokens of -stop_gradient(r) logprob        expected gradient: that of KL(student || teacher)

`form` names the others: exact divergences over the whole vocabulary (reverse_kl, forward_kl), the cross-entropy of the
teacher's likeliest token (hard_ce), r under a clipped ratio (ppo), and r of the student as it is at each step
(reinforce).

Limit: with one epoch and one minibatch ppo and reinforce have the gradient of opd, and its expectation over the
vocabulary is that of reverse_kl.

Ours: without --teacher the teacher is the model as it starts, which reads each question behind itself solved; a user's
teacher reads what the student reads. Text is the action space: tokens end where the episode does, and both models share
one vocabulary, or are refused. `--task grid` is played: an arm acts a line a turn and reads where it is, which is
neither drawn nor taught; with chunk=N it makes up to N moves a line, with bins=256 a move is seven numbers.

Check: engine/toys/carrying.py; demonstrations in which nothing slips, and 5 seeds.
"""

from fuserl.engine import evaluation, hindsight, prompts, rewards
from fuserl.engine.advantages import uniform
from fuserl.engine.checks import Figure
from fuserl.engine.distilling import gap, on_policy
from fuserl.engine.recipe import Recipe
from fuserl.engine.rollouts import sampled, scored
from fuserl.engine.second_models import Teacher

DEFAULTS = {"group_size": 8, "lr": 5e-6}


def recipe(config, *, form: str = "opd", low: float = 0.2, high: float = 0.2, weigh_lengths: bool = False) -> Recipe:
    """On-policy distillation from --teacher, or from the model that is shown the answer.

    Args:
        form: opd, reverse_kl, forward_kl, hard_ce, ppo or reinforce.
        low, high: the ratio is clipped to [1 - low, 1 + high], with ppo.
        weigh_lengths: weigh each rollout by its length over max_new_tokens.
    """
    scorer, of_gap = rewards.scorer(config), form in ("opd", "ppo")
    reward = scorer if config.teacher else hindsight.Shown(scorer, hindsight.answered)
    reply = getattr(prompts.configured(config).source, "reply", None)  # of a task that is played
    draw = sampled(config.group_size, reply=reply)
    judge = evaluation.talked(reply, scorer, config.eval_samples)
    played = {"rollout": scored(draw, reward), "reward": None, "evaluate": judge}
    return Recipe(
        name="vla_opd",
        prompts=prompts.sampler(config),
        **(played if reply else {"rollout": draw, "reward": reward}),
        advantage=gap if of_gap else uniform,
        loss=on_policy(form, low=low, high=high, most=config.max_new_tokens if weigh_lengths else None),
        reads=("old_logprobs", "teacher_logprob") if of_gap else (),
        teacher=Teacher(),
    )


def show() -> list[Figure]:
    """The gradient's identity, three optima that are known, and the arm on its grid."""
    from fuserl.engine.toys import carrying, tied

    return [*tied.identity(gap, on_policy), *tied.optima(on_policy), *carrying.figures(gap, on_policy("opd"))]
