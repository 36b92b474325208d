"""The surrogates, importance weights and divergences of policy_loss: what equals what, edges, and what is refused."""

import math

import pytest
import torch
from backends import FAST, INTERPRETING, cpu_only, each_backend, each_fast_backend, run_interpreted, threads
from clipped_policy import CISPO, TOPR, chosen, every_input, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

import fuserl
from fuserl.kernels.policy_loss import STATISTICS, named, policy_loss
from fuserl.kernels.sampled_divergence import ESTIMATORS, sampled_divergence
from fuserl.kernels.surrogates import Clip, Gate, Truncate, Weight, Within

SURROGATES = [Clip(), Clip(dual=3.0), CISPO, TOPR, Weight(), Weight((1, 1), (1, 1)), Weight((0, 1), (0, 1)), Gate()]
BACKEND = FAST[0][1] if INTERPRETING else "cpu"


def run(inputs, backend=BACKEND, **numbers):
    """(losses, gradient to logprobs, statistics by name)."""
    logprobs = inputs["logprobs"].detach().requires_grad_()
    losses, statistics = policy_loss(**{**inputs, "logprobs": logprobs}, backend=backend, **numbers)
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    return losses.detach(), gradient, dict(zip(STATISTICS, statistics.tolist(), strict=True))


def one(log_ratio, a, backend, device, log_weight=None, **numbers):
    """(loss, gradient) of one token."""
    x = {"logprobs": log_ratio, "advantages": a, "old_logprobs": 0.0, "log_weights": log_weight}
    x = {name: torch.tensor([value], device=device) for name, value in x.items() if value is not None}
    losses, gradient, _ = run(x, backend, **numbers)
    return losses.item(), gradient.item()


@each_backend
@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
def test_on_policy_every_gradient_is_that_of_the_plain_policy_gradient(surrogate, device, backend):
    x = chosen(tokens(700, device=device), ("weights", "mask"))
    x["old_logprobs"] = x["logprobs"].clone()
    for inputs in (x, chosen(x, ("weights", "mask"))):
        _, gradient, statistics = run(inputs, backend, surrogate=surrogate)
        plain = -x["advantages"] * x["weights"] * x["mask"]
        assert torch.allclose(gradient, plain, rtol=1e-6 if isinstance(surrogate, Gate) else 0, atol=0)
        assert statistics["clipped_low"] == statistics["clipped_high"] == statistics["clipped_dual"] == 0


@each_backend
@pytest.mark.parametrize("delta", [1.3, 1.5, 4.0])
def test_the_two_sided_clip_of_intellect_is_the_dual_clip(delta, device, backend):
    """min(min(ratio, delta) A, clip(ratio) A), as TRL writes it, for delta >= 1 + high."""
    x = chosen(tokens(900, device=device), ("old_logprobs",))
    logprobs = x["logprobs"].double().requires_grad_()
    ratio, a = (logprobs - x["old_logprobs"]).exp(), x["advantages"].double()
    written = -torch.minimum(ratio.clamp(max=delta) * a, ratio.clamp(0.8, 1.3) * a)
    (slope,) = torch.autograd.grad(written.sum(), logprobs)
    losses, gradient, statistics = run(x, backend, surrogate=Clip(0.2, 0.3, delta))
    assert torch.allclose(losses.double(), written.detach(), rtol=1e-6)
    assert torch.allclose(gradient.double(), slope, rtol=1e-6)
    assert statistics["clipped_dual"] > 0


@each_backend
@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
def test_a_weight_multiplies_the_advantage(surrogate, device, backend):
    x = every_input(600, device=device)
    x = chosen(x, ("old_logprobs", "ref_logprobs", "log_weights", "mask"))
    heavier = {name: value for name, value in x.items() if name != "log_weights"}
    heavier["advantages"] = x["advantages"] * x["log_weights"].exp()
    for some, other in zip(
        run(x, backend, surrogate=surrogate, beta=0.1),
        run(heavier, backend, surrogate=surrogate, beta=0.1),
        strict=True,
    ):
        if isinstance(some, torch.Tensor):
            assert torch.allclose(some, other, rtol=1e-5, atol=1e-7)
        else:
            assert all(some[name] == other[name] for name in ("clipped_low", "clipped_high", "clipped_dual"))


@each_backend
def test_log_weights_of_tokens_are_those_of_rollout_logprobs(device, backend):
    x = every_input(600, device=device)
    given = chosen(x, ("old_logprobs", "mask"))
    for bounds in (None, Truncate(1.2, 0.5), Within(0.5, 2.0)):
        one = run({**given, "rollout_logprobs": x["rollout_logprobs"]}, backend, importance=bounds)
        gap = x["old_logprobs"] - x["rollout_logprobs"]
        two = run({**given, "log_weights": gap}, backend, importance=bounds)
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) and one[2] == two[2]
    on_policy = chosen(x, ("rollout_logprobs",))
    one = run(on_policy, backend)
    two = run({**chosen(x, ()), "log_weights": x["logprobs"] - x["rollout_logprobs"]}, backend)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])  # the weight has no gradient


@each_backend
def test_bounds_of_importance_weights(device, backend):
    """A weight at a bound is kept; truncated ones are the bound, masked ones are 0 and no part of the clip counts."""
    at = torch.tensor([0.5, 2.0], dtype=torch.float64).log()
    log_weights = torch.cat([at, torch.tensor([0.4999, 2.0001, 1.0, 1e30]).double().log()]).float().to(device)
    ones = torch.ones_like(log_weights)
    x = {"logprobs": 2 * ones, "advantages": ones, "old_logprobs": 0 * ones, "log_weights": log_weights}
    losses, _, seen = run(x, backend, importance=Within(0.5, 2.0))
    assert torch.allclose(losses, -1.2 * torch.tensor([0.5, 2, 0, 0, 1, 0], device=device))
    assert (seen["importance"], seen["importance_cut"], seen["clipped_high"]) == (pytest.approx(3.5), 3, 3)
    losses, _, seen = run(x, backend, importance=Truncate(2.0, 0.5))
    assert torch.allclose(losses, -1.2 * torch.tensor([0.5, 2, 0.5, 2, 1, 2], device=device))
    assert (seen["importance"], seen["importance_cut"], seen["clipped_high"]) == (pytest.approx(8), 3, 6)
    losses, _, seen = run({**x, "mask": ones == 2}, backend, importance=Within(1.5, 2.0))
    assert not losses.any() and seen["importance"] == seen["importance_cut"] == 0


@each_backend
def test_losses_of_rollart(device, backend):
    """Its off-policy losses in the log-ratio of each token, written out."""
    x = {name: value.double() for name, value in chosen(tokens(500, device=device), ("old_logprobs",)).items()}
    logprobs = x["logprobs"].clone().requires_grad_()
    ratio, a, e = (logprobs - x["old_logprobs"]).exp(), x["advantages"], 0.2
    clip = torch.minimum(ratio * a, ratio.clamp(1 - e, 1 + e) * a)
    held = ratio.detach()
    vanilla = -a * logprobs
    pairs = [
        (torch.where(a < 0, -torch.maximum(clip, (1 + 2 * e) * a), -clip), {"surrogate": Clip(e, e, 1 + 2 * e)}),
        (vanilla, {"surrogate": Weight((1, 1), (1, 1))}),
        (held.clamp(0, 1) * vanilla, {"surrogate": Weight((0, 1), (0, 1))}),
        (held.clamp(0.9, 1.1) * vanilla, {"surrogate": Weight((0.9, 1.1), (0.9, 1.1))}),
        (torch.where(a > 0, 1.0, held.clamp(0, 1)) * vanilla, {"surrogate": Weight((1, 1), (0, 1))}),
        (
            vanilla + 0.05 * (logprobs - x["old_logprobs"]).square(),
            {"surrogate": Weight((1, 1), (1, 1)), "ref_logprobs": x["old_logprobs"], "beta": 0.1, "kl": "k2"},
        ),
    ]
    for written, numbers in pairs:
        (slope,) = torch.autograd.grad(written.sum(), logprobs, retain_graph=True)
        losses, gradient, _ = run(x, backend, **numbers)
        assert torch.allclose(losses, written.detach(), rtol=1e-12) and torch.allclose(gradient, slope, rtol=1e-12)


@each_backend
@pytest.mark.parametrize("kl", ESTIMATORS)
def test_the_divergence_is_that_of_sampled_divergence(kl, device, backend):
    x = chosen(tokens(400, dtype=torch.float64, device=device), ("ref_logprobs",))
    logprobs = x["logprobs"].clone().requires_grad_()
    value = sampled_divergence(logprobs, x["ref_logprobs"], kl, backend=backend)
    (slope,) = torch.autograd.grad(value.sum(), logprobs)
    losses, gradient, statistics = run({**x, "advantages": 0 * x["logprobs"]}, backend, beta=1.0, kl=kl)
    assert torch.allclose(losses, value.detach(), rtol=1e-12) and torch.allclose(gradient, slope, rtol=1e-12)
    assert statistics["kl"] == pytest.approx(value.sum().item(), rel=1e-12)


@cpu_only
def test_weighted_divergences_are_right_on_average_off_policy():
    """Averages under the old policy over a vocabulary: value and gradient of KL(policy || reference), by k1 and k3."""
    z, old, ref = (torch.randn(9, dtype=torch.float64) for _ in range(3))
    z.requires_grad_()
    logp, log_old, log_ref = (x.log_softmax(0) for x in (z, old, ref))
    divergence = (logp.exp() * (logp - log_ref)).sum()
    (slope,) = torch.autograd.grad(divergence, z, retain_graph=True)
    given = {"advantages": 0 * old, "old_logprobs": log_old, "ref_logprobs": log_ref, "weights": log_old.exp()}
    for kl, right in (("k1", True), ("k3", True), ("k2", False)):
        losses, _ = policy_loss(logp, **given, beta=1.0, kl=kl, kl_weighted=True)
        (got,) = torch.autograd.grad(losses.sum(), z, retain_graph=True)
        assert torch.allclose(losses.sum(), divergence, rtol=1e-12) == right
        assert torch.allclose(got, slope, rtol=1e-10, atol=1e-14) == right


@settings(max_examples=8 if INTERPRETING else 40, deadline=None)
@given(tau=st.floats(0.05, 20), seed=st.integers(0, 99))
def test_a_gate_is_steepest_near_one_and_bounded(tau, seed):
    torch.manual_seed(seed)
    x = chosen(tokens(300), ("old_logprobs",))
    losses, gradient, _ = run(x, surrogate=Gate(tau, tau))
    plain = -(x["logprobs"] - x["old_logprobs"]).exp() * x["advantages"]
    assert (losses.abs() <= 4 / tau * x["advantages"].abs() * (1 + 1e-6)).all()
    assert (gradient.abs() <= plain.abs() * (1 + 1e-6)).all() and (gradient * plain >= 0).all()


@each_backend
def test_overflow(device, backend):
    def of(*token, **numbers):
        return one(*token, backend, device, **numbers)

    for a, log_ratio in ((0.0, 1e4), (-0.0, 1e4), (0.0, math.inf), (0.0, -math.inf)):
        for surrogate in SURROGATES:
            for log_weight in (None, 1e4, -1e4, math.inf, -math.inf):
                assert of(log_ratio, a, surrogate=surrogate, log_weight=log_weight) == (0, 0), surrogate
    for a in (2.0, -2.0):
        assert of(1e4, a, surrogate=Gate(2.0, 2.0)) == (pytest.approx(-2 * a), 0)
        assert of(-1e4, a, surrogate=Gate(2.0, 2.0))[1] == 0
        assert of(-math.inf, a, surrogate=Gate(2.0, 2.0)) == (pytest.approx(-2 * a / (1 + math.exp(2.0))), 0)
        assert of(1e4, a, surrogate=Weight((0, 5), (0, 5))) == (-5e4 * a, -5 * a)
        assert of(-math.inf, a, surrogate=Weight()) == (0, 0)  # ratio log ratio goes to 0
        assert of(0.0, a, log_weight=1e4, importance=Truncate(2.0)) == (-2 * a, -2 * a)
        assert of(0.0, a, log_weight=math.inf, importance=Within(0.5, 2.0)) == (0, 0)
        assert of(0.0, a, log_weight=-math.inf) == (0, 0) and of(0.0, a, log_weight=1e4) == (-math.inf * a,) * 2


@each_backend
@pytest.mark.parametrize(
    "name", ["rollout_logprobs", "log_weights", "entropy", "advantages", "logprobs", "ref_logprobs"]
)
@pytest.mark.parametrize("surrogate", [Clip(), CISPO, Gate()])
def test_nan_is_not_hidden(name, surrogate, device, backend):
    x = every_input(1030, device=device)
    del x["rollout_logprobs" if name == "log_weights" else "log_weights"]
    x["mask"][:] = True
    x["advantages"][7] = 0.0
    x[name][7] = torch.nan
    numbers = {"importance": Within(0.5, 2.0), "entropy_coef": 0.1, "beta": 0.1, "kl_weighted": True}
    losses, _, statistics = run(x, backend, surrogate=surrogate, **numbers)
    assert losses[7].isnan() and losses.isnan().sum() == 1
    assert math.isnan(statistics["importance"]) == (name in ("rollout_logprobs", "log_weights"))
    x["mask"][7] = False
    losses, gradient, statistics = run(x, backend, surrogate=surrogate, **numbers)
    assert losses.isfinite().all() and gradient.isfinite().all() and losses[7] == gradient[7] == 0
    assert all(math.isfinite(value) for value in statistics.values())


@each_backend
def test_the_gradient_to_entropy(device, backend):
    x = every_input(600, device=device)
    del x["log_weights"]
    leaf, g = x["entropy"].clone().requires_grad_(), torch.randn(600, device=device)
    losses, _ = policy_loss(**{**x, "entropy": leaf}, entropy_coef=0.3, backend=backend)
    (gradient,) = torch.autograd.grad(losses, leaf, g)
    assert torch.allclose(gradient, -0.3 * g * x["weights"] * x["mask"], rtol=1e-6)
    losses, _ = policy_loss(**{**x, "entropy": leaf / 0}, backend=backend)
    assert losses.isfinite().all(), "a coefficient of 0 looks at no entropy"
    bare = {"logprobs": x["logprobs"].clone().requires_grad_(), "advantages": x["advantages"], "entropy": leaf}
    losses, _ = policy_loss(**bare, entropy_coef=-0.3, backend=backend)
    gradients = torch.autograd.grad(losses, [bare["logprobs"], leaf], g)
    assert torch.allclose(gradients[1], 0.3 * g) and torch.allclose(gradients[0], -g * x["advantages"])


@each_fast_backend
def test_runs_threads_and_neighbours_change_nothing(device, backend):
    x = every_input(3000, device=device)
    del x["rollout_logprobs"]
    numbers = {"importance": Truncate(1.3), "entropy_coef": 0.1, "beta": 0.1, "kl_weighted": True}
    for surrogate in (Clip(dual=2.0), CISPO, Gate()):
        whole = run(x, backend, surrogate=surrogate, **numbers)
        for count in (*[torch.get_num_threads()] * 9, 1, 2, 3):
            with threads(count):
                again = run(x, backend, surrogate=surrogate, **numbers)
            assert torch.equal(again[0], whole[0]) and torch.equal(again[1], whole[1]) and again[2] == whole[2]
        for count in (1, 17, 513):
            part = run({name: t[-count:] for name, t in x.items()}, backend, surrogate=surrogate, **numbers)
            assert torch.equal(part[0], whole[0][-count:]) and torch.equal(part[1], whole[1][-count:])


@cpu_only
@pytest.mark.parametrize("surrogate", [Clip(dual=2.0), CISPO, Gate()])
def test_compiles_without_a_graph_break(surrogate):
    def loss(inputs, most):
        numbers = {"importance": Truncate(most), "entropy_coef": 0.1, "beta": 0.1, "kl": "k3+"}
        losses, statistics = policy_loss(
            **{**inputs, "logprobs": inputs["logprobs"] * 2}, surrogate=surrogate, **numbers
        )
        return losses.sum(), named(statistics)["importance"]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for count, most in ((40, 1.2), (41, 1.3)):
        x = every_input(count)
        del x["log_weights"]
        leaves = [x[name].requires_grad_() for name in ("logprobs", "entropy")]
        (value, weight), (expected, expected_weight) = compiled(x, most), loss(x, most)
        gradients, wanted = (torch.autograd.grad(each, leaves) for each in (value, expected))
        assert torch.equal(value, expected) and torch.equal(weight, expected_weight)
        assert all(torch.equal(some, other) for some, other in zip(gradients, wanted, strict=True))


ROLLOUT = {"rollout_logprobs": torch.zeros(3)}


@pytest.mark.parametrize(
    "change,message",
    [
        ({"surrogate": Clip(-0.1)}, "low and high must be at least 0"),
        ({"surrogate": Clip(high=math.nan)}, "low and high must be at least 0"),
        ({"surrogate": Clip(dual=1.0)}, "dual must be above 1"),
        ({"surrogate": Weight((2, 1))}, "positive must hold 0 <= least <= most and most > 0; got 2 and 1"),
        ({"surrogate": Weight(negative=(0, 0))}, "negative must hold"),
        ({"surrogate": Weight(negative=(math.nan, 1))}, "negative must hold"),
        ({"surrogate": Gate(0.0)}, "positive and negative of a Gate must be finite and above 0; got 0.0 and 1.05"),
        ({"surrogate": Gate(negative=math.inf)}, "positive and negative of a Gate"),
        ({"surrogate": "cispo"}, "surrogate must be one of Clip, Weight, Gate; got 'cispo'"),
        ({"surrogate": (0.2, 0.2, None)}, "surrogate must be one of"),
        ({**ROLLOUT, "importance": 2.0}, "importance must be Truncate, Within or None; got 2.0"),
        ({**ROLLOUT, "importance": Truncate(-1.0)}, "importance must hold"),
        ({**ROLLOUT, "importance": Within(2.0, 1.0)}, "importance must hold"),
        ({"importance": Truncate(2.0)}, "rollout_logprobs or log_weights must be given with importance"),
        ({**ROLLOUT, "log_weights": torch.zeros(3)}, "rollout_logprobs must be None with log_weights"),
        ({"rollout_logprobs": torch.zeros(4)}, r"rollout_logprobs must be \(3,\)"),
        ({"log_weights": torch.zeros(3, requires_grad=True)}, "log_weights must not require a gradient"),
        ({"entropy": torch.zeros(3).double()}, "entropy must be"),
        ({"entropy_coef": 0.1}, "entropy must be given when entropy_coef is not 0"),
        ({"entropy_coef": math.nan}, "entropy_coef must be finite"),
        ({"ref_logprobs": torch.zeros(3), "kl": "k3+", "kl_weighted": True}, "kl_weighted must be False with k3\\+"),
    ],
)
def test_bad_input_gets_one_sentence(change, message):
    arguments = {"logprobs": torch.zeros(3), "advantages": torch.zeros(3), **change}
    with pytest.raises(ValueError, match=f"^policy_loss: .*{message}"):
        fuserl.policy_loss(**arguments)


def test_the_types_are_found_where_the_ops_are():
    assert fuserl.Clip is Clip and "Clip" in dir(fuserl)


@cpu_only
def test_triton_in_the_interpreter():
    run_interpreted(__file__)
