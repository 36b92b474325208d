"""C-GRPO (53): citation-aware rubric rewards of search agents (Zhang et al., arXiv:2601.06021).

    R_r = share of the question's rubrics whose entities the response names, that the pages it cites support, and that
          hang together with the answer through supported rubrics;   R_o = 1 where the answer is right, else 0
    R = (1 - alpha) R_o + alpha R_o R_r / (largest R_r of the group),   A as GRPO's
    loss = mean over all tokens of -w min(ratio A, clip(ratio, 1 - low, 1 + high) A)
    w = exp(old_logprob - rollout_logprob), 0 outside [1/2, 2]

Limit: with alpha 0 the reward is the outcome: GRPO.

Ours: the default task is a generated web with calls search, open and find. Without a --judge that writes, names and
sentences are looked up by rule, letter for letter, and the outcome is what the task's verifier says. `normalize` is
"paper" by default: a group's bonus does not depend on how hard its rubrics are. Held-out problems are judged by R_o.

Check: an agent that picks pages from tables, on webs of three hops with a page that tells the answer alone, trained by
these slots: outcomes alone end with few rubrics earned, C-GRPO with all of them, and as many right answers.
"""

from fuserl.engine import citations, evaluation, judges, prompts, webs
from fuserl.engine.advantages import standardized
from fuserl.engine.checks import Figure
from fuserl.engine.losses import clipped, token_mean
from fuserl.engine.recipe import Recipe
from fuserl.engine.rollouts import sampled, scored

DEFAULTS = {"task": "web", "max_new_tokens": 192, "few_shot": 0, "groups": 16, "group_size": 8, "importance": "mask"}


def recipe(
    config,
    *,
    alpha: float = 0.3,
    normalize: str = "paper",
    bonus: str = "positive",
    bfs: bool = True,
    low: float = 0.2,
    high: float = 0.28,
) -> Recipe:
    """C-GRPO on the configured task, whose problems have "rubrics" and "pages".

    Args:
        alpha: weight of the rubrics beside the outcome.
        normalize: paper divides the rubric reward by the group's largest; release does not, for bonus positive.
        bonus: positive rewards the rubrics of right answers only, negative those of wrong ones only, or both.
        bfs: a rubric counts only where it hangs together with the answer; else every supported one does.
        low, high: the ratio is clipped to [1 - low, 1 + high].
    """
    judge = judges.configured(config)
    reward = citations.citation_aware(judge, alpha=alpha, connect=bfs, bonus=bonus, normalize=normalize)
    scorer = judges.JudgedScorer(reward, judge)

    def outcome(rollouts):
        facts = scorer(rollouts)[1]
        return facts["outcome"], facts

    return Recipe(
        name="c_grpo",
        prompts=prompts.sampler(config),
        rollout=scored(sampled(config.group_size, reply=webs.reply), scorer),
        reward=None,
        advantage=standardized,
        loss=clipped(low=low, high=high, reduce=token_mean),
        evaluate=evaluation.talked(webs.reply, outcome, config.eval_samples),
    )


def show() -> list[Figure]:
    """Chains with and without a break, rewards of groups, and the agent in its web."""
    from fuserl.engine.toys import c_grpo

    return c_grpo.figures(standardized, clipped(high=0.28, reduce=token_mean))
