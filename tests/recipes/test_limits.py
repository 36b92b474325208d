"""Every recipe's check: its figures hold, and each part of it that is put wrong makes one of them fail."""

import dataclasses
import functools
from importlib import import_module

import pytest
import torch

from fuserl.engine import (
    advantages,
    beams,
    catalogue,
    citations,
    constrained,
    distilling,
    elliptical,
    generators,
    judges,
    losses,
    macro_actions,
    mirror,
    openings,
    opponent_shaping,
    preferences,
    recomposition,
    targets,
    tournaments,
    verdicts,
)
from fuserl.engine.advantages import centred
from fuserl.engine.batch import Batch
from fuserl.engine.losses import rollout_mean, rollout_sum, token_mean
from fuserl.engine.task_rewards import Quantiles
from fuserl.engine.toys import cgpo as toy_cgpo
from fuserl.engine.toys import ma_rlhf as toy_ma_rlhf
from fuserl.engine.toys import r_to_q, vpo
from fuserl.engine.variance_sampling import VarianceSampler


def scaled(make):
    """A loss, or a way to make one, whose every value is a thousandth too large."""

    @functools.wraps(make)
    def wrong(*arguments, **options):
        loss = make(*arguments, **options)

        def larger(out, batch):
            each, statistics = loss(out, batch)
            return 1.001 * each, statistics

        return dataclasses.replace(loss, function=larger)

    return wrong


def larger(advantage):
    """An advantage that is a thousandth too large, or a way to make one."""

    def wrong(*batch, **options):
        if options:
            return larger(advantage(**options))
        given = advantage(*batch)
        return 1.001 * given if isinstance(given, torch.Tensor) else given.replace(advantages=1.001 * given.advantages)

    return wrong


def without(bound):
    """policy_loss that does as if this bound of a clip were not there."""
    real = losses.policy_loss

    def wrong(*tensors, surrogate, **options):
        return real(*tensors, surrogate=surrogate._replace(**{bound: torch.inf}), **options)

    return wrong


real_pairs, likeliest = preferences._pairs, beams._likeliest
real_pairs = preferences._pairs
real_sums = targets.sums


def smoothed(**options):
    return preferences.preference(**{**options, "label_smoothing": 0.1})


def without_last(batch, begins):
    """Macros that take the last token of a rollout with them."""
    return torch.cat([(begins | batch.last.roll(1)).nonzero().squeeze(-1), torch.tensor([len(begins)])])


MUTATIONS = {
    "grpo-loss": ("grpo", "recipe", "clipped", scaled(losses.clipped)),
    "grpo-reduction": ("grpo", losses, "rollout_mean", rollout_sum),
    "grpo-low": ("grpo", losses, "policy_loss", without("low")),
    "grpo-high": ("grpo", losses, "policy_loss", without("high")),
    "dr_grpo-length": ("dr_grpo", "recipe", "mean_over", lambda length: losses.mean_over(length + 1)),
    "dr_grpo-reduction": ("dr_grpo", "recipe", "mean_over", lambda length: rollout_mean),
    "dr_grpo-advantage": ("dr_grpo", "recipe", "centred", advantages.standardized),
    "dr_grpo-baseline": ("dr_grpo", "recipe", "leave_one_out", centred),
    "dapo-reduction": ("dapo", "recipe", "token_mean", rollout_sum),
    "dapo-clip": ("dapo", losses, "policy_loss", without("high")),
    "gspo-loss": ("gspo", "recipe", "clipped_rollouts", scaled(losses.clipped_rollouts)),
    "gspo-ratio": ("gspo", "recipe", "clipped_rollouts", lambda **bounds: losses.clipped(**bounds)),
    "gspo-clip": ("gspo", "recipe", "clipped_rollouts", lambda low, high: losses.clipped_rollouts(low=9, high=9)),
    "cispo-loss": ("cispo", "recipe", "truncated", scaled(losses.truncated)),
    "cispo-bound": ("cispo", "recipe", "truncated", lambda low, high: losses.truncated(low=low, high=high + 1)),
    "cispo-clip": ("cispo", "recipe", "truncated", lambda **bounds: losses.clipped(**bounds, reduce=token_mean)),
    "max_rl-advantage": ("max_rl", "recipe", "over_mean", larger(advantages.over_mean)),
    "max_rl-scale": ("max_rl", "recipe", "over_mean", centred),
    "max_rl-mean": ("max_rl", Batch, "group_mean", Batch.group_sum),
    "rloo-baseline": ("rloo", "recipe", "leave_one_out", centred),
    "rloo-reduction": ("rloo", "recipe", "rollout_sum", rollout_mean),
    "reinforce_pp-advantage": ("reinforce_pp", "recipe", "normalised", larger(advantages.normalised)),
    "reinforce_pp-sums": ("reinforce_pp", advantages, "discounted", lambda x, batch, factor: x),
    "reinforce_pp-scale": ("reinforce_pp", advantages, "whitened", lambda x: x - x.mean()),
    "ppo-advantage": ("ppo", "recipe", "generalised", larger(advantages.generalised)),
    "ppo-sums": ("ppo", advantages, "gae", lambda rewards, values, **_: (rewards - values, rewards)),
    "ppo-end": ("ppo", advantages, "token_rewards", lambda batch, beta: batch.to_tokens(batch.rewards)),
    "dpo-loss": ("dpo", "recipe", "preference", scaled(preferences.preference)),
    "dpo-smoothing": ("dpo", "recipe", "preference", smoothed),
    "dpo-pairs": ("dpo", preferences, "_pairs", lambda batch: real_pairs(batch)[::-1]),
    "reward_model-loss": ("reward_model", "recipe", "bradley_terry", scaled(preferences.bradley_terry)),
    "reward_model-last": ("reward_model", Batch, "last", property(lambda self: self.rollout >= 0)),
    "vpo-value": ("vpo", "recipe", "value_bonus", scaled(preferences.value_bonus)),
    "vpo-pairs": ("vpo", "recipe", "preference", scaled(preferences.preference)),
    "vpo-form": ("vpo", vpo, "value_bonus", scaled(preferences.value_bonus)),
    "r_to_q-loss": ("r_to_q", "recipe", "preference", lambda beta: preferences.preference(beta=0.9 * beta)),
    "r_to_q-implied": ("r_to_q", r_to_q, "implicit", lambda batch, beta: 1.001 * advantages.implicit(batch, beta)),
    "r_to_q-beams": ("r_to_q", beams, "_likeliest", lambda logits, count: likeliest(-logits, count)),
    "arena_rl-advantage": ("arena_rl", "recipe", "standardized", larger(advantages.standardized)),
    "arena_rl-orders": ("arena_rl", judges.Judge, "both_orders", lambda judge, *texts, **more: judge.pairwise(*texts)),
    "arena_rl-bracket": ("arena_rl", tournaments, "_bracket", lambda count: list(range(count))),
    "cgpo-bound": ("cgpo", constrained, "log_ratios", lambda batch: torch.zeros_like(batch.rewards)),
    "cgpo-verdicts": ("cgpo", toy_cgpo, "PASSES", torch.ones(4, dtype=torch.float64)),
    "cgpo-calibration": ("cgpo", toy_cgpo, "calibrated", lambda score, group, stored: score),
    "c_grpo-chain": ("c_grpo", citations, "connected", lambda rubrics, supported: list(supported)),
    "c_grpo-bonus": ("c_grpo", citations, "mixed", lambda right, share, alpha, **how: [*right]),
    "sft-loss": ("sft", "recipe", "negative_logprob", scaled(losses.negative_logprob)),
    "sdpo-loss": ("sdpo", "recipe", "self_distilled", lambda alpha, **options: scaled(losses.clipped)()),
    "sdpo-mask": ("sdpo", "recipe", "taught", lambda batch: batch.rollout_logprobs),
    "self_interference-loss": ("self_interference", "recipe", "summed", scaled(losses.summed)),
    "self_interference-advantage": ("self_interference", "recipe", "standardized", lambda batch: -batch.rewards),
    "mdpo-loss": ("mdpo", "recipe", "proximal", scaled(mirror.proximal)),
    "mdpo-clip": ("mdpo", mirror, "clipped", lambda **options: losses.clipped(reduce=options["reduce"], high=0.0)),
    "vla_opd-gap": ("vla_opd", "recipe", "gap", larger(lambda batch: batch.extra["teacher_logprob"])),
    "vla_opd-loss": ("vla_opd", distilling, "truncated", scaled(losses.truncated)),
    "sft-reduction": ("sft", losses.negative_logprob, "__kwdefaults__", {"reduce": rollout_mean}),
    "ace-penalty": ("ace", advantages, "PENALTIES", {"softplus": torch.relu}),
    "ace-advantage": ("ace", "recipe", "overconfident", lambda advantage, alpha: advantage),
    "ma_rlhf-last": ("ma_rlhf", macro_actions, "steps_of", without_last),
    "ma_rlhf-sigma": ("ma_rlhf", macro_actions, "_weights", lambda sigma, place, *_: (place == 0).double()),
    "ma_rlhf-every": ("ma_rlhf", toy_ma_rlhf, "every", lambda n: macro_actions.every(n + 1)),
    "kl_bayes-sums": ("kl_bayes", targets, "sums", lambda batch: real_sums(batch)[::-1]),
    "kl_bayes-loss": ("kl_bayes", targets, "rollout_sum", rollout_mean),
    "rover-loss": ("rover", "recipe", "token_mean", rollout_sum),
    "rover-next": ("rover", Batch, "last", property(lambda self: self.rollout >= 0)),
    "dph_rl-generator": ("dph_rl", generators, "generated", scaled(generators.generated)),
    "pre_rl-loss": ("pre_rl", "recipe", "clipped", scaled(losses.clipped)),
    "pre_rl-advantage": ("pre_rl", openings, "centred", advantages.standardized),
    "pre_rl-samples": ("pre_rl", openings, "only", lambda batch, chosen: batch),
    "advantage_alignment-now": (
        "advantage_alignment", opponent_shaping, "shaping_weights", lambda a, gamma, **_: torch.zeros_like(a),
    ),
    "rep_exp-ridge": ("rep_exp", elliptical, "left_out", lambda b: b),
    "rep_exp-picks": ("rep_exp", elliptical, "coreset", lambda h, size, lamb: [*range(size)]),
    "med_grpo-scale": ("med_grpo", Quantiles, "normalised", lambda self, key, values: values.double()),
    "vas-walk": ("vas", VarianceSampler, "_walked", lambda self, step: [0] * (self.groups - self.weighted)),
    "laser-loss": ("laser", verdicts, "squared_verdict", scaled(verdicts.squared_verdict)),
    "rorecomp-choice": ("rorecomp", recomposition, "priority", lambda batch, *_: batch.rewards > 2),
}  # fmt: skip


# Figures of a recipe that are means over random problems, with sampling errors for tolerances.
SAMPLED = {"r_to_q": 3, "vpo": 2, "arena_rl": 3, "cgpo": 6}
# Figures of a recipe that are means over random groups, or of training that is cut short, with tolerances for that.


@pytest.mark.parametrize("name", catalogue.RECIPES)
def test_figures_hold(name):
    figures = catalogue.show(name)
    assert figures and all(figure.what and figure.holds for figure in figures), figures
    assert sum(figure.tolerance >= 1e-5 for figure in figures) == SAMPLED.get(name, 0)


def one_of_each():
    """All mutations; those behind the first one of a recipe are slow tests, as each runs the recipe's whole check."""
    seen = set()
    for mutation, (name, *_) in MUTATIONS.items():
        yield pytest.param(mutation, marks=[pytest.mark.slow] if name in seen else [])
        seen.add(name)


@pytest.mark.parametrize("mutation", one_of_each())
def test_what_is_put_wrong_shows_in_a_figure(mutation, monkeypatch):
    name, where, attribute, wrong = MUTATIONS[mutation]
    where = import_module(f"fuserl.engine.recipes.{name}") if where == "recipe" else where
    if where is losses and attribute == "rollout_mean":  # a default argument of the losses, bound when they were made
        where, attribute, wrong = losses.clipped, "__kwdefaults__", {**losses.clipped.__kwdefaults__, "reduce": wrong}
    monkeypatch.setattr(where, attribute, wrong)
    assert not all(figure.holds for figure in catalogue.show(name))


def test_every_recipe_is_put_wrong():
    assert {name for name, *_ in MUTATIONS.values()} == set(catalogue.RECIPES)
