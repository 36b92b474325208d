"""The registered policy losses beside verl's own: values, gradients and metrics, both against verl's in float64."""

import importlib
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rivals import VerlConfig, verl_losses
from tolerance import check_rows

core = verl_losses()
ours = importlib.import_module("fuserl.trainers.verl_losses").LOSSES
THEIRS = {
    "fuserl_grpo": "vanilla", "fuserl_gspo": "gspo", "fuserl_cispo": "cispo", "fuserl_sapo": "sapo",
    "fuserl_gpg": "gpg", "fuserl_dro": "dro", "fuserl_gmpo": "geo_mean",
}  # fmt: skip
OF_TOKENS = [name for name in THEIRS if name != "fuserl_gmpo"]
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
GLOBAL = {"dp_size": 4, "batch_num_tokens": 977, "global_batch_size": 64, "loss_scale_factor": 30}
EPS = 2**-23


def config(info=None, **given):
    """verl's ActorConfig, as far as losses ask."""
    settings = {
        "clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": 0.28, "clip_ratio_c": 1.5, "tau_pos": 1.0,
        "tau_neg": 1.05, "policy_loss": VerlConfig(dro_beta=0.3), "global_batch_info": info or {},
    }  # fmt: skip
    return VerlConfig(**settings | given)


class Batch:
    """Log-probs and advantages of ragged samples, a tool's tokens among them, and one sample without any."""

    def __init__(self, count=5, length=13, spread=0.5, weighted=False, empty=True):
        shape = count, length
        self.old = -3 * torch.rand(shape)
        self.new = self.old + spread * torch.randn(shape)
        self.advantages = torch.randn(count, 1).expand(shape) * (torch.rand(count, 1) < 0.8)
        self.mask = (torch.arange(length) < torch.randint(1, length + 1, (count, 1))) & (torch.rand(shape) < 0.9)
        self.mask[:, 0] = True
        if empty:
            self.mask[-1] = False
        self.weights = torch.rand(shape) * 2 if weighted else None

    def run(self, function, mode, settings, dtype=torch.float32):
        """(loss, gradient, metrics) of a loss."""
        new = self.new.to(dtype).clone().requires_grad_()
        given = [self.old.to(dtype), new, self.advantages.to(dtype), self.mask]
        weights = None if self.weights is None else self.weights.to(dtype)
        loss, metrics = function(*given, loss_agg_mode=mode, config=settings, rollout_is_weights=weights)
        return loss.detach().double(), torch.autograd.grad(loss, new)[0], metrics


def theirs(name, mode):
    """verl's loss under the mode, which its sapo does not read, and where it leaves what it aggregated."""
    function, aggregate, seen = core.POLICY_LOSS_REGISTRY[THEIRS[name]], core.agg_loss, []

    def called(*arguments, **given):
        def recorded(**call):
            call["loss_agg_mode"] = mode
            seen[:] = [aggregate(**call | {"loss_mat": call["loss_mat"].detach().abs()}).item()]
            return aggregate(**call)

        with mock.patch.object(core, "agg_loss", recorded):
            return function(*arguments, **given)

    return called, seen


def compare(name, batch, mode, settings):
    """Ours at most twice as far from float64 as verl's; the loss, one number, by the sum of its terms' sizes too."""
    function, seen = theirs(name, mode)
    plain = batch.run(function, mode, settings)
    true = batch.run(function, mode, settings, torch.float64)
    got = batch.run(ours[name], mode, settings)
    size = seen[0] if seen else batch.advantages.abs().sum()
    assert (got[0] - true[0]).abs() <= 2 * (plain[0] - true[0]).abs() + 4 * EPS * size
    assert (plain[0] - true[0]).abs() <= 1e-5 * size
    check_rows("gradient", got[1], true[1], plain[1], torch.float32)
    assert got[2].keys() == plain[2].keys() and all(isinstance(value, float) for value in got[2].values())
    for metric, value in got[2].items():
        assert value == pytest.approx(plain[2][metric], rel=1e-4, abs=1e-6), metric
    return got


@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["alone", "of_ranks"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OF_TOKENS)
def test_losses_of_tokens(name, mode, weighted, info):
    compare(name, Batch(weighted=weighted), mode, config(info))


@pytest.mark.parametrize("weighted", [False, True])
def test_loss_of_samples(weighted):
    """verl's mean is that of the micro-batch; the whole batch's has its denominator."""
    batch = Batch(count=12, weighted=weighted, empty=False)
    mode = "seq-mean-token-mean"
    loss, gradient, _ = compare("fuserl_gmpo", batch, mode, config())
    whole = batch.run(ours["fuserl_gmpo"], mode, config(GLOBAL))
    factor = len(batch.mask) * GLOBAL["dp_size"] / GLOBAL["global_batch_size"]
    torch.testing.assert_close(whole[0], loss * factor, rtol=1e-6, atol=0)
    torch.testing.assert_close(whole[1], gradient * factor, rtol=1e-6, atol=1e-9)


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.sampled_from(OF_TOKENS), st.sampled_from(MODES), st.integers(1, 9),
       st.integers(1, 40), st.sampled_from([0.01, 0.3, 2.0]), st.booleans())  # fmt: skip
def test_random_batches(seed, name, mode, count, length, spread, weighted):
    torch.manual_seed(seed)
    batch = Batch(count, length, spread, weighted, empty=count > 1)
    compare(name, batch, mode, config())


@pytest.mark.parametrize("name", ["fuserl_grpo", "fuserl_gspo", "fuserl_cispo"])
def test_ratios_beyond_where_verl_cuts_them(name):
    """verl cuts the log-ratio at 20, a sample's at 10: the bounds have taken over by then, and gradients are 0."""
    batch = Batch(count=4, length=3, empty=False)
    batch.mask[:] = True
    batch.new = batch.old + torch.tensor([25.0, -25.0, 25.0, -25.0])[:, None]
    batch.advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None].expand(4, 3)
    function, _ = theirs(name, "token-mean")
    other, got = batch.run(function, "token-mean", config()), batch.run(ours[name], "token-mean", config())
    torch.testing.assert_close(got[0], other[0], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(got[1], other[1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", THEIRS)
def test_what_is_masked_may_be_anything(name):
    batch, mode = Batch(), "seq-mean-token-mean"
    expected = batch.run(ours[name], mode, config())
    for x in (batch.new, batch.old):
        x[~batch.mask] = torch.nan
    got = batch.run(ours[name], mode, config())
    assert torch.equal(got[0], expected[0]) and got[2] == expected[2]
    assert torch.equal(got[1], torch.where(batch.mask, expected[1], 0.0))


def test_masks_of_numbers_and_log_probs_of_bfloat16():
    batch = Batch()
    expected = batch.run(ours["fuserl_grpo"], "token-mean", config())
    batch.mask = batch.mask.long()
    got = batch.run(ours["fuserl_grpo"], "token-mean", config())
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert batch.run(ours["fuserl_grpo"], "token-mean", config(), torch.bfloat16)[1].dtype == torch.bfloat16


def test_a_micro_batch_without_tokens_has_a_loss_of_zero():
    batch = Batch()
    batch.mask[:] = False
    for mode in MODES:
        loss, gradient, metrics = batch.run(ours["fuserl_grpo"], mode, config())
        assert loss == 0 and not gradient.any() and not any(metrics.values())


def test_refusals():
    batch = Batch()
    with pytest.raises(ValueError, match=r"loss_agg_mode must be one of token-mean, .*; got 'mean'"):
        batch.run(ours["fuserl_grpo"], "mean", config())
    with pytest.raises(ValueError, match="fuserl_gmpo: loss_agg_mode must be 'seq-mean-token-mean'"):
        batch.run(ours["fuserl_gmpo"], "token-mean", config())
    with pytest.raises(ValueError, match=r"batch_num_tokens must be given when dp_size > 1; got None and 2"):
        batch.run(ours["fuserl_grpo"], "token-mean", config({"dp_size": 2}))
    with pytest.raises(ValueError, match="config must be verl's ActorConfig"):
        batch.run(ours["fuserl_grpo"], "token-mean", None)
    with pytest.raises(ValueError, match="dual must be above 1"):
        batch.run(ours["fuserl_grpo"], "token-mean", config(clip_ratio_c=0.9))
    with pytest.raises(ValueError, match="dro_beta must be positive; got None"):
        batch.run(ours["fuserl_dro"], "token-mean", config(policy_loss=VerlConfig(dro_beta=None)))
    with pytest.raises(TypeError, match="tokens_of_everyone"):
        batch.run(ours["fuserl_grpo"], "token-mean", config({"tokens_of_everyone": 3}))
