"""Training through linear_policy_loss is training through log-probs and autograd, with a product less."""

import pytest
import tiny_runs
import torch

from fuserl.engine import loop, policy
from fuserl.engine.config import Config
from fuserl.kernels.head_outputs import Outputs
from fuserl.kernels.linear_logprob import linear_logprob

SHORT = "tiny_runs:shortness"


def two_passes(
    hidden,
    weight,
    ids,
    token_loss,
    *,
    outputs,
    live,
    scope=None,
    offsets=None,
    params=(),
    reference=None,
    chunk=None,
    **head,
):
    """What linear_policy_loss returns, by linear_logprob and autograd through it."""
    rows = torch.arange(len(ids)) if live is None else live.nonzero().squeeze(-1)
    out = linear_logprob(hidden, weight, ids, outputs=outputs, **head)
    losses, statistics = token_loss(Outputs(**{name: x[rows] for name, x in vars(out).items()}), rows)
    found = {name: torch.full_like(x, torch.nan) for name, x in vars(out).items()}
    for name, x in vars(out).items():
        found[name][rows] = x.detach()[rows]
    return losses.sum(), Outputs(**found), {name: x.detach() for name, x in statistics.items()}


def both(monkeypatch, train):
    """The metrics of the same run, one pass and two; every reward the same number."""
    one = train("one")
    monkeypatch.setattr(policy, "linear_policy_loss", two_passes)
    two = train("two")
    assert [row.get("reward") for row in one] == [row.get("reward") for row in two]
    assert [row.get("accuracy") for row in one] == [row.get("accuracy") for row in two]
    return one, two


@pytest.mark.parametrize(
    ("recipe", "options"),
    [("grpo", {"beta": 0.1, "entropy_coef": 0.01, "minibatches": 2}), ("dapo", {}), ("gspo", {}), ("ppo", {})],
)
def test_the_same_run_on_a_tiny_model(tmp_path, monkeypatch, recipe, options):
    tiny_runs.use(monkeypatch)
    train = lambda name: tiny_runs.run(tmp_path, name, recipe=recipe, reward=SHORT, steps=20, **options)  # noqa: E731
    one, two = both(monkeypatch, train)
    assert len({row["reward"] for row in one if "reward" in row}) > 3, "a curve, or equality says little"
    # Sums in another order differ by 1e-7, which Adam's division by a small gradient makes larger from step to step.
    for a, b in zip(one, two, strict=True):
        for name in {"loss", "entropy", "grad_norm"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), f"{name} at step {a['step']}"


@pytest.mark.slow
def test_the_same_run_on_the_default_model(tmp_path, monkeypatch):
    """Rounding differs by 1e-7 a step and a draw changes only where that moves a sum past its random number."""

    def train(name):
        settings = {"recipe": "grpo", "steps": 8, "eval_problems": 40, "out": str(tmp_path / name)}
        return tiny_runs.rows(loop.train(Config.from_dict(settings)))

    one, _ = both(monkeypatch, train)
    assert len({row["reward"] for row in one if "reward" in row}) > 3
