"""SDPO (32): reinforcement learning via self-distillation (arXiv:2601.20802).

    the teacher is the policy that has read more: a right solution among its siblings, and feedback on the very attempt
    q[t] = teacher(. | question, solution, feedback, y[<t])        p[t] = policy(. | question, y[<t]), on the same y
    loss = mean over the taught tokens of D_alpha(p, q): KL(q || p) for 0, KL(p || q) for 1, between them
           (1 - alpha) KL(p || m) + alpha KL(q || m),  m = (1 - alpha) p + alpha q

over the whole vocabulary, the policy's topk likeliest tokens, or from the sampled tokens alone. A rollout without a
solution or feedback is not taught. With `question` every step asks that one problem, and `attempts` and `discovered`
say when it was solved.

Limit: KL(p || q) has the gradient of the score function with the reward log q - log p; topk of the whole vocabulary is
the full divergence.

Ours: alpha 0 and the average teacher, as the released code's settings; the first right sibling is shown; notes are cut
at reprompt_tokens characters, which are no fewer tokens; a reward gives feedback by an attribute of that name.

Check: engine/toys/feedback.py: 8 problems of 6 tokens, 150 steps, 4 seeds.
"""

from fuserl.engine import prompts, rewards
from fuserl.engine.checks import Figure
from fuserl.engine.distilling import self_distilled, taught
from fuserl.engine.hindsight import Discovery, Shown, reprompted
from fuserl.engine.recipe import Recipe
from fuserl.engine.rollouts import sampled
from fuserl.engine.second_models import Teacher

DEFAULTS = {"group_size": 8}


def recipe(
    config,
    *,
    alpha: float = 0.0,
    topk: int = 0,
    tail: bool = True,
    sampled_form: bool = False,
    is_clip: float | None = None,
    self_teacher: str = "average",
    rate: float = 0.05,
    success: float = 1.0,
    reprompt_tokens: int = 10240,
    skip_solved: bool = False,
    question: int | None = None,
) -> Recipe:
    """SDPO on the configured task.

    Args:
        alpha: 0 is KL(teacher || policy), 1 KL(policy || teacher), between them a generalised Jensen-Shannon.
        topk: of the policy's tokens that the divergence is over; 0 is the whole vocabulary.
        tail: the tokens beyond topk count as one more; without it both are normalised over the topk.
        sampled_form: from the log-probs of the sampled tokens alone; alpha must be 1.
        is_clip: most of each token's ratio to its old log-prob, by which it counts; default no ratio.
        self_teacher: weights of the teacher: average, mixed with the initial model's, current, initial or old.
        rate: of the average, or the policy's share of the mixed logits.
        success: reward of a right solution.
        reprompt_tokens: most of what the teacher is shown beside the question.
        skip_solved: rollouts that succeed are not taught.
        question: number of the one problem to ask at every step; default all of the task.
    """
    scorer = rewards.scorer(config)
    notes = reprompted(scorer, success=success, most=reprompt_tokens, skip_solved=skip_solved)
    found = Discovery(notes, success)
    return Recipe(
        name="sdpo",
        prompts=prompts.sampler(config) if question is None else prompts.repeated(config, question),
        rollout=sampled(config.group_size),
        reward=Shown(scorer, notes if question is None else found),
        advantage=taught,
        loss=self_distilled(alpha, k=topk, tail=tail, sampled=sampled_form, is_clip=is_clip),
        teacher=Teacher(self_teacher, rate),
        state={} if question is None else {"discovery": found},
    )


def show() -> list[Figure]:
    """The gradient's identity, the family's ends, topk of all, and feedback beside a reward that is all or nothing."""
    from fuserl.engine.toys import feedback

    return [*feedback.limits(self_distilled), *feedback.figures(taught, self_distilled(0.0))]
