"""preference_loss gives the numbers of TRL's and Liger's functions of summed log-probs, where these are installed."""

from types import SimpleNamespace

import pytest
import torch
from paired_rollouts import by_hand, rollouts
from rivals import rival
from tolerance import check

from fuserl.kernels.preference_loss import preference_loss
from fuserl.kernels.preferences import CPO, DPO, KTO, ORPO, Hinge, SimPO


def trl(package, trainer, method, **settings):
    """A method of one of TRL's trainers, on the settings that it reads and nothing else."""
    usual = {"alpha": 0.0, "label_smoothing": 0.0, "accelerator": SimpleNamespace(device="cpu")}
    owner = getattr(rival("trl", f"trl.experimental.{package}.{package}_trainer"), trainer)
    return lambda *sums: getattr(owner, method)(SimpleNamespace(**usual, **settings), *sums)


def liger(name, function, **settings):
    """The static method of Liger's fused loss, which returns a mean over pairs; here their sum."""
    owner = getattr(rival("liger-kernel", f"liger_kernel.chunked_loss.{name}"), function)

    def losses(*sums):
        found = owner.preference_loss_fn(*sums[:2], torch.zeros(2 * len(sums[0]), 1), *sums[2:], **settings)
        return (found[0] * len(sums[0]),)

    return losses


# name: (form, theirs, made when it is asked for, whether of means and whether with a reference)
CASES = {
    "trl cpo": (CPO(0.2, nll=0.0), lambda: trl("cpo", "CPOTrainer", "cpo_loss", loss_type="sigmoid", beta=0.2), 0, 0),
    "trl hinge": (Hinge(0.2), lambda: trl("cpo", "CPOTrainer", "cpo_loss", loss_type="hinge", beta=0.2), 0, 0),
    "trl simpo": (
        SimPO(2.0, 0.6),
        lambda: trl("cpo", "CPOTrainer", "cpo_loss", loss_type="simpo", beta=2.0, simpo_gamma=0.6), 1, 0,
    ),
    "trl orpo": (ORPO(0.1, nll=0.0), lambda: trl("orpo", "ORPOTrainer", "odds_ratio_loss", beta=0.1), 1, 0),
    "liger dpo": (DPO(0.3), lambda: liger("dpo_loss", "LigerFusedLinearDPOFunction", beta=0.3), 0, 1),
    "liger robust": (
        DPO(0.3, 0.2, robust=True),
        lambda: liger(
            "dpo_loss", "LigerFusedLinearDPOFunction", beta=0.3, loss_type="robust", label_smoothing=0.2
        ), 0, 1,
    ),
    "liger cpo": (
        CPO(0.3, 0.0, 0.1),
        lambda: liger("cpo_loss", "LigerFusedLinearCPOFunction", beta=0.3, label_smoothing=0.1), 0, 0,
    ),
    "liger simpo": (
        SimPO(2.0, 0.6, 0.1),
        lambda: liger("simpo_loss", "LigerFusedLinearSimPOFunction", beta=2.0, gamma=0.6, label_smoothing=0.1), 1, 0,
    ),
    "liger orpo": (ORPO(0.2, nll=0.0), lambda: liger("orpo_loss", "LigerFusedLinearORPOFunction", beta=0.2), 1, 0),
}  # fmt: skip


def summed(x, offsets, mean):
    parts = x.split(offsets.diff().tolist())
    return torch.stack([part.mean() if mean else part.sum() for part in parts]).chunk(2)


@pytest.mark.parametrize("name", CASES)
def test_of_pairs(name):
    form, make, mean, with_reference = CASES[name]
    theirs, x = make(), rollouts(form=form, given=())
    if not with_reference:
        x.pop("ref_logprobs", None)
    found = {}
    for who, dtype in (("truth", torch.float64), ("theirs", torch.float32), ("ours", torch.float32)):
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in x.items()}
        leaf = given["logprobs"].clone().requires_grad_()
        if who == "ours":
            loss = preference_loss(**{**given, "logprobs": leaf}, form=form)[0].sum()
        else:
            refs = summed(given["ref_logprobs"], x["offsets"], mean) if with_reference else ()
            if name == "trl orpo":  # which returns what is to be subtracted
                loss = -theirs(*summed(leaf, x["offsets"], mean))[0].sum()
            else:
                loss = theirs(*summed(leaf, x["offsets"], mean), *refs)[0].sum()
        found[who] = [loss.detach()[None], torch.autograd.grad(loss, leaf)[0]]
    if name == "trl orpo":  # which takes its sums to float32
        losses, gradient, *_ = by_hand(x, form, torch.ones(len(x["offsets"]) // 2))
        found["truth"] = [losses.sum()[None], gradient]
    for a, b, c in zip(found["ours"], found["truth"], found["theirs"], strict=True):
        torch.testing.assert_close(c.double(), b.double(), rtol=1e-4, atol=1e-5)
        check(name, a, b, c, torch.float32)


def test_of_rollouts_without_a_pair():
    module = rival("liger-kernel", "liger_kernel.chunked_loss.kto_loss")
    x = rollouts(form=KTO(), given=())
    fn = module.LigerFusedLinearKTOFunction.preference_loss_fn

    def theirs(dtype):
        sums = [torch.cat(summed(x[name].to(dtype), x["offsets"], False)) for name in ("logprobs", "ref_logprobs")]
        loss, *rewards = fn(sums[0], x["desirable"], *sums, beta=0.3, kl=x["baseline"].to(dtype))
        return torch.stack([loss * len(x["desirable"]), *rewards])

    ours, _, statistics = preference_loss(**x, form=KTO(0.3))
    found = torch.stack([ours.sum(), *statistics[5:7]])
    check("kto", found, theirs(torch.float64), theirs(torch.float32), torch.float32)
