"""Skipping rows known dead never changes a loss: every update of every recipe's run, with and without its `live`."""

import copy
import dataclasses

import pytest
import system_runs
import torch

from fuserl.engine import catalogue, loop
from fuserl.engine.losses import every_token
from fuserl.engine.policy import Policy

# Batches keep log-probs and weights in float32, all else is float64 here.
TOLERANCE = 8 * torch.finfo(torch.float32).eps
# No token of these is ever known to be dead.
WHOLE = {
    "sft", "dpo", "reward_model", "ppo", "dapo", "ace dapo", "grpo terms", "ma_rlhf", "kl_bayes best", "cgpo",
    "cgpo crraft", "cgpo warm-up", "vpo", "vpo online", "vpo reference", "r_to_q", "rover", "rover scaled",
    "dph_rl none", "dph_rl leash", "rorecomp", "rorecomp critic", "advantage_alignment",
    "advantage_alignment alternatives", "pre_rl renewed", "rep_exp", "self_interference", "mdpo", "vla_opd",
    "vla_opd reverse_kl", "vla_opd hard_ce", "vla_opd ppo", "vla_opd reinforce",
}  # fmt: skip
QUICK = {*catalogue.RECIPES, "grpo steps", "kl_bayes pointwise", "self_interference solved", "laser reference"}


class Descent:
    """Plain gradient descent in the optimizer's place: AdamW would make a step of a gradient's last bit."""

    def __init__(self, parameters, lr=0.1):
        self.parameters, self.lr, self.gradients = parameters, lr, []

    @torch.no_grad()
    def step(self):
        """Keep the gradients, where one is not 0, and take a step."""
        each = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        if any(gradient.any() for gradient in each.values()):
            self.gradients.append(each)
        for name, gradient in each.items():
            self.parameters[name].sub_(gradient, alpha=self.lr)
            self.parameters[name].grad = None
        return {"grad_norm": torch.nn.utils.get_total_norm(each.values())}


def tried(policy, batch, loss, update):
    """The figures of an update by plain descent, the gradients of its steps, and the weights that it ended with."""
    weights = {name: x.detach().clone() for name, x in policy.parameters().items()}
    followed = {name: copy.deepcopy(second.state_dict()) for name, second in policy.seconds.items()}
    actor = copy.copy(policy)
    actor.optimizer = Descent(policy.parameters())
    figures = update(actor, batch, loss)
    after = {name: x.detach().clone() for name, x in policy.parameters().items()}
    with torch.no_grad():
        for name, x in policy.parameters().items():
            x.copy_(weights[name])
    for name, state in followed.items():
        policy.seconds[name].load_state_dict(state)
    return figures, actor.optimizer.gradients, after


def apart(one, other):
    """The norm of the difference of two gradients, over that of the first."""
    assert one.keys() == other.keys()
    difference = torch.nn.utils.get_total_norm([one[name] - other[name] for name in one])
    return float(difference / torch.nn.utils.get_total_norm(one.values()))


def watched(seen, update=Policy.update):
    """An update that is tried both ways first."""

    def both(policy, batch, loss):
        live = loss.live(batch)
        on, off = (tried(policy, batch, each, update) for each in (loss, dataclasses.replace(loss, live=every_token)))
        assert len(on[1]) == len(off[1])
        for few, every in zip(on[1], off[1], strict=True):
            assert apart(every, few) <= TOLERANCE
        assert apart(off[2], on[2]) <= TOLERANCE
        for name in ("loss", "grad_norm"):
            assert on[0].get(name, 0.0) == pytest.approx(off[0].get(name, 0.0), rel=TOLERANCE, abs=TOLERANCE)
        seen.append((1.0 if live is None else float(live.double().mean()), len(on[1])))
        return update(policy, batch, loss)

    return both


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow) for case in system_runs.CASES]
)
def test_skipping_dead_rows_changes_no_update(case, tmp_path, monkeypatch):
    seen = []
    system_runs.use(monkeypatch, case)
    monkeypatch.setattr(Policy, "update", watched(seen))
    loop.train(system_runs.config(tmp_path, "run", case, groups=4, steps=2, eval_every=0, eval_problems=0))
    assert any(steps for _, steps in seen) and (min(seen)[0] < 1) == (case not in WHOLE)
