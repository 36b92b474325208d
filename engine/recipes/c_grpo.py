"""53. C-GRPO: citation-aware rubric rewards of search agents (Zhang et al., arXiv:2601.06021).

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
from fuserl.engine.checks import Figure, at_least, at_most
from fuserl.engine.contracts import require, require_one_of
from fuserl.engine.losses import clipped, token_mean
from fuserl.engine.recipe import Recipe
from fuserl.engine.rollouts import sampled, scored
from fuserl.engine.toys import c_grpo as toy

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
    require("c_grpo", "alpha", alpha, 0 <= alpha <= 1, "in [0, 1]")
    require_one_of("c_grpo", "normalize", normalize, citations.NORMALIZE)
    require_one_of("c_grpo", "bonus", bonus, citations.BONUS)
    judge = judges.configured(config)
    reward = citations.citation_aware(judge, connect=bfs, alpha=alpha, normalize=normalize, bonus=bonus)
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


def show(seeds: int = 2) -> list[Figure]:
    """Chains with and without a break, rewards of groups, and the agent in its web."""
    chain = ("<E0> is near <E1>.", "<E1> is near <E2>.")
    right, broken = [citations.connected(chain, supported) for supported in ((True, True), (False, True))]
    worst = citations.mixed([0.0, 1.0], [1.0, 0.2], alpha=0.3)[0]
    group = citations.mixed([1.0] * 3, [0.2, 0.4, 0.8], alpha=0.3)
    learnt = [toy.learnt(alpha, seeds) for alpha in (0.0, 0.3)]
    return [
        Figure("rubrics of a whole chain", sum(right) / 2, 1),
        Figure("rubrics behind a break", sum(broken) / 2, 0),
        Figure("the same by shares of supported ones", toy.unconnected(), 0.5),
        Figure("reward of a wrong answer with all rubrics", worst, 0, 0),
        *(
            Figure(f"reward at R_r = {r}", got, wanted)
            for r, got, wanted in zip((0.2, 0.4, 0.8), group, (0.775, 0.85, 1.0), strict=True)
        ),
        at_most("rubrics earned after outcomes alone", learnt[0].rubric, 0.5),
        at_least("rubrics earned after C-GRPO", learnt[1].rubric, 0.8),
        at_least("right answers above those of outcomes", learnt[1].outcome - learnt[0].outcome, -0.03),
    ]
