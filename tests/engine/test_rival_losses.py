"""The same numbers as TRL's and verl's policy losses: value and gradient, theirs in float64 as the truth.

Their functions take padded rows and ours packed tokens; the advantages are those of rollouts, as theirs are.
"""

from types import SimpleNamespace

import pytest
import torch
from batches import ragged
from rivals import VerlConfig, rival, verl_losses
from tolerance import check

from fuserl.engine.importance import mean_importance, rollout_importance, token_importance
from fuserl.engine.losses import (
    asymmetric,
    clipped,
    clipped_rollouts,
    decoupled,
    gated,
    geometric_rollouts,
    mean_over,
    rollout_mean,
    token_mean,
    truncated,
)
from fuserl.kernels.surrogates import Truncate, Within

LENGTHS = (5, 3, 7, 4, 6, 7)
T = max(LENGTHS)


def case():
    """A batch whose rollouts have one advantage each, none of them 0, and the log-probs of its policy."""
    batch = ragged(LENGTHS, (0, 0, 1, 1, 2, 2), seed=3)
    batch = batch.replace(advantages=batch.to_tokens(batch.rewards))
    return batch, batch.old_logprobs + 0.4 * torch.randn(len(batch.tokens))


def padded(batch, values, dtype):
    """Packed values (N,) as rows of T, 0 beyond the end of each."""
    rows = values.new_zeros(len(LENGTHS), T, dtype=dtype)
    rows[mask_of(batch)] = values.to(dtype)
    return rows


def mask_of(batch):
    return torch.arange(T) < batch.lengths[:, None]


def verl(name, weight=None, **config):
    """A loss of verl's registry; weight(gap) makes importance weights of old - rollout, in rows and with the mask."""

    def loss(logprob, batch, dtype):
        functions = verl_losses()
        old, rollout, a = (
            padded(batch, x, dtype) for x in (batch.old_logprobs, batch.rollout_logprobs, batch.advantages)
        )
        settings = {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "tau_pos": 1.0, "tau_neg": 1.05}
        mask, kind = mask_of(batch).to(dtype), VerlConfig
        if name == "sapo" or name == "cispo":
            kind = functions.ActorConfig
        settings = kind(**{**settings, "global_batch_info": {}, "policy_loss": VerlConfig(dro_beta=0.3), **config})
        weights = None if weight is None else weight((old - rollout) * mask, mask)
        mode = config.get("mode", "token-mean")
        return functions.get_policy_loss_fn(name)(old, logprob, a, mask, mode, settings, weights)[0]

    return loss


class Silent(dict):
    """Metrics that nobody reads."""

    def __missing__(self, key):
        return []


def trl(module="trl.trainer.grpo_trainer", trainer="GRPOTrainer", weight=None, **settings):
    """_compute_loss of a trainer that holds no model; settings of its arguments."""

    def loss(logprob, batch, dtype):
        numbers = {"delta": None, "use_bias_correction_kl": False, "sapo_temperature_pos": 1.0, **settings}
        args = SimpleNamespace(**{"sapo_temperature_neg": 1.05, "steps_per_generation": 1, **numbers})
        same = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1)
        one = torch.ones((), dtype=dtype)
        self = SimpleNamespace(
            args=args, accelerator=same, _metrics={"train": Silent()}, model=SimpleNamespace(training=True),
            _get_per_token_logps_and_entropies=lambda *_, **__: (logprob, torch.zeros_like(logprob), None),
            aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, tools=None,
            importance_sampling_level="token", beta=0.0, epsilon_low=0.2, epsilon_high=0.28, loss_type="grpo",
            use_vllm=weight is not None, vllm_importance_sampling_correction=weight is not None,
            current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False, max_completion_length=20,
        )  # fmt: skip
        vars(self).update({name: value for name, value in settings.items() if name in vars(self)})
        mask = mask_of(batch)
        ids, (old, ref, rollout) = (
            mask.long(),
            (padded(batch, x, dtype) for x in (batch.old_logprobs, batch.ref_logprobs, batch.rollout_logprobs)),
        )
        inputs = {
            "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids,
            "completion_mask": mask.to(dtype),
            "advantages": batch.rewards.to(dtype), "old_per_token_logps": old, "ref_per_token_logps": ref,
            "num_items_in_batch": mask.sum() * one,
        }  # fmt: skip
        if weight is not None:
            inputs["importance_sampling_ratio"] = weight((old - rollout) * mask, mask)
        return getattr(rival("trl", module), trainer)._compute_loss(self, None, inputs)

    return loss


def by_token(bound):
    return lambda gap, mask: bound(gap.exp())


def by_rollout(bound):
    return lambda gap, mask: bound(gap.sum(1, keepdim=True).exp()).expand_as(gap)


def by_mean(bound):
    return lambda gap, mask: bound((gap.sum(1, keepdim=True) / mask.sum(1, keepdim=True)).exp()).expand_as(gap)


def at_most(most):
    return lambda weight: weight.clamp(max=most)


def within(least, most):
    return lambda weight: weight.masked_fill((weight < least) | (weight > most), 0.0)


DAPO = {"low": 0.2, "high": 0.28, "reduce": token_mean}
GMPO = {
    "module": "trl.experimental.gmpo.gmpo_trainer",
    "trainer": "GMPOTrainer",
    "epsilon_low": 0.4,
    "epsilon_high": 0.4,
}
PAIRS = {  # ours, theirs
    "verl vanilla": (clipped(dual=3.0, **DAPO), verl("vanilla")),
    "verl vanilla, rollout-mean": (
        clipped(low=0.2, high=0.28, dual=1.5), verl("vanilla", clip_ratio_c=1.5, mode="seq-mean-token-mean")
    ),
    "verl vanilla, truncated": (
        decoupled(importance=token_importance(Truncate(1.2)), dual=3.0, **DAPO),
        verl("vanilla", by_token(at_most(1.2))),
    ),
    "verl vanilla, a rollout's weight": (
        decoupled(importance=rollout_importance(Truncate(1.2)), dual=3.0, **DAPO),
        verl("vanilla", by_rollout(at_most(1.2))),
    ),
    "verl gspo": (
        clipped_rollouts(low=0.03, high=0.04),
        verl("gspo", clip_ratio_low=0.03, clip_ratio_high=0.04, mode="seq-mean-token-mean"),
    ),
    "verl gspo by token": (
        clipped_rollouts(low=0.03, high=0.04, per_token=True, reduce=token_mean),
        verl("gspo", clip_ratio_low=0.03, clip_ratio_high=0.04),
    ),
    "verl sapo": (gated(), verl("sapo")),
    "verl cispo": (truncated(low=0.2, high=0.28), verl("cispo")),
    "verl cispo, masked": (
        truncated(low=0.2, high=0.28, importance=token_importance(Within(0.7, 1.3))),
        verl("cispo", by_token(within(0.7, 1.3))),
    ),
    "verl gpg": (asymmetric(negative=(1.0, 1.0)), verl("gpg")),
    "verl geo_mean": (
        geometric_rollouts(low=0.3, high=0.4), verl("geo_mean", clip_ratio_low=0.3, clip_ratio_high=0.4)
    ),
    "verl geo_mean, truncated": (
        geometric_rollouts(low=0.3, high=0.4, importance=mean_importance(Truncate(9.0))),
        verl("geo_mean", by_mean(at_most(9.0)), clip_ratio_low=0.3, clip_ratio_high=0.4),
    ),
    "verl dro": (asymmetric(negative=(1.0, 1.0), beta=0.3, kl="k2"), verl("dro")),
    "trl grpo": (clipped(low=0.2, high=0.28, beta=0.1), trl(beta=0.1)),
    "trl dapo": (clipped(**DAPO), trl(loss_type="dapo")),
    "trl dr_grpo": (clipped(low=0.2, high=0.28, reduce=mean_over(20)), trl(loss_type="dr_grpo")),
    "trl delta": (clipped(dual=1.4, **DAPO), trl(loss_type="dapo", delta=1.4)),
    "trl delta at the bound": (clipped(dual=1.28, **DAPO), trl(loss_type="dapo", delta=1.28)),
    "trl bias-corrected kl": (clipped(beta=0.1, kl_weighted=True, **DAPO), trl(
        loss_type="dapo", beta=0.1, use_bias_correction_kl=True
    )),
    "trl cispo": (truncated(low=1.0, high=0.3), trl(loss_type="cispo", epsilon_high=1.3)),
    "trl sapo": (gated(), trl(loss_type="sapo")),
    "trl gspo": (
        clipped_rollouts(low=0.03, high=0.04),
        trl(importance_sampling_level="sequence", epsilon_low=0.03, epsilon_high=0.04),
    ),
    "trl gspo with kl": (
        clipped_rollouts(low=0.03, high=0.04, beta=0.1),
        trl(importance_sampling_level="sequence", epsilon_low=0.03, epsilon_high=0.04, beta=0.1),
    ),
    "trl gmpo": (geometric_rollouts(), trl(**GMPO)),
    "trl truncated": (
        clipped(beta=0.1, importance=token_importance(Truncate(1.2, 0.9)), **DAPO),
        trl(loss_type="dapo", beta=0.1, weight=by_token(lambda weight: weight.clamp(0.9, 1.2))),
    ),
    "trl masked rollouts": (
        clipped(importance=rollout_importance(Within(0.5, 2.0)), **DAPO),
        trl(loss_type="dapo", weight=by_rollout(within(0.5, 2.0))),
    ),
}  # fmt: skip


def evaluated(loss, logprob):
    leaf = logprob.clone().requires_grad_()
    value = loss(leaf)
    return value.detach().double(), torch.autograd.grad(value, leaf)[0].double()


@pytest.mark.parametrize("name", PAIRS)
def test_loss_and_gradient(name):
    ours, theirs = PAIRS[name]
    batch, logprob = case()
    if name == "verl dro":
        batch = batch.replace(ref_logprobs=batch.old_logprobs)
    got = evaluated(lambda leaf: ours(SimpleNamespace(logprob=leaf), batch)[0].sum(), logprob)
    truth, other = (
        evaluated(lambda leaf, dtype=dtype: theirs(leaf, batch, dtype), padded(batch, logprob, dtype))
        for dtype in (torch.float64, torch.float32)
    )
    assert (truth[1] != 0).sum() > 5
    torch.testing.assert_close(other, truth, rtol=1e-4, atol=1e-6)
    check("gradient", got[1], *(each[1][mask_of(batch)] for each in (truth, other)), torch.float32)
    assert abs(got[0] - truth[0]) <= 1e-6 * max(1, abs(truth[0]))


def test_the_cases_meet_their_bounds():
    batch, logprob = case()
    ratio, a = (logprob - batch.old_logprobs).exp(), batch.advantages
    weight = (batch.old_logprobs - batch.rollout_logprobs).exp()
    for held in (
        (a < 0) & (ratio < 0.8),
        (a > 0) & (ratio > 1.28),
        (a < 0) & (ratio > 1.4),
        weight > 1.3,
        weight < 0.7,
    ):
        assert held.any()
    assert rollout_mean(batch).sum() == pytest.approx(1)
