"""policy_loss against extended precision: losses, gradients and statistics, every backend, edges and identities."""

import math

import numpy as np
import pytest
import torch
from backends import FAST, INTERPRETING, cpu_only, each_backend, each_fast_backend, run_interpreted, threads
from clipped_policy import CASES, CISPO, EVERYTHING, IMPORTANCE, PPO, by_hand, chosen, every_input, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import check, eps

import fuserl
from fuserl.kernels import policy_loss as module
from fuserl.kernels import policy_tokens
from fuserl.kernels.policy_loss import STATISTICS, Tokens, merged, named, policy_loss, reference
from fuserl.kernels.sampled_divergence import ESTIMATORS
from fuserl.kernels.surrogates import Clip, Gate, Truncate, bounds_of, correction_of, numbers_of

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])

BLOCK = policy_tokens.TOKEN_LAUNCH["BLOCK"]
SHAPES = [(), (1,), (17,), (3, 5, 7), (BLOCK - 1,), (BLOCK + 1,), (4, 1025)]
UNBOUND = Clip(math.inf, math.inf)
NOTHING = [0.0] * 10 + [-math.inf, math.inf]


def differentiated(losses, inputs, leaves, g):
    """(losses, gradients to logprobs and to entropy), 0 where there is no such input."""
    found = iter(torch.autograd.grad(losses, list(leaves.values()), g))
    gradients = [next(found) if name in leaves else torch.zeros_like(g) for name in ("logprobs", "entropy")]
    return losses.detach(), *gradients


def leaves_of(inputs):
    return {name: inputs[name].detach().requires_grad_() for name in ("logprobs", "entropy") if name in inputs}


def run(inputs, g, backend, **numbers):
    """(losses, gradients, statistics) of the op, with g the gradient that comes from above."""
    leaves = leaves_of(inputs)
    losses, statistics = policy_loss(**{**inputs, **leaves}, backend=backend, **numbers)
    return *differentiated(losses, inputs, leaves, g), statistics


def equal(some, others):
    assert all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def by_definition(inputs, g, dtype, **numbers):
    """The same by autograd through the reference, in `dtype`."""
    inputs = {name: x if x.dtype == torch.bool else x.to(dtype) for name, x in inputs.items()}
    leaves = leaves_of(inputs)
    losses, _, statistics = reference(Tokens(**{**inputs, **leaves}), rule(inputs, **numbers))
    return *differentiated(losses, inputs, leaves, g.to(dtype)), statistics


def rule(inputs, surrogate=PPO, importance=None, beta=0.0, kl="k3", kl_weighted=False, entropy_coef=0.0):
    kind, *bounds = numbers_of(surrogate)
    estimator = ESTIMATORS[kl] if "ref_logprobs" in inputs else (0, False)
    terms = correction_of(importance), beta, *estimator, kl_weighted, entropy_coef
    return module.Rule(bounds_of(kind, tuple(bounds)), *terms)


def compare(inputs, backend, names=EVERYTHING, **numbers):
    inputs, dtype = chosen(inputs, names), inputs["logprobs"].dtype
    g = torch.randn(inputs["logprobs"].shape).to(inputs["logprobs"])
    truth, plain = by_hand(inputs, g, **numbers), by_definition(inputs, g, dtype, **numbers)
    got = run(inputs, g, backend, **numbers)
    assert all(x.dtype == dtype for x in got) and not got[-1].requires_grad
    got, plain = ([x.cpu().flatten() for x in results] for results in (got, plain))
    for i, name in enumerate(("losses", "gradient", "gradient to entropy")):
        check(name, got[i], truth[i].flatten(), plain[i], dtype)
    *_, sums, sizes = truth
    error, plainly = ((each[-1].double() - sums).abs().nan_to_num(0.0) for each in (got, plain))
    allowed = 2 * plainly + 4 * eps(dtype) * sizes.abs()  # a sum of k1 cancels: its error is that of its terms
    assert torch.equal(got[-1].isinf(), sums.isinf()) and (error <= allowed)[sums.isfinite()].all(), (error, allowed)
    counts = [0, 1, 2, 3, STATISTICS.index("importance_cut")]
    assert torch.equal(got[-1][counts].double(), sums[counts]), "counts are exact"


@each_backend
@both_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(shape, dtype, device, backend):
    for names, numbers in CASES.values():
        compare(every_input(*shape, dtype=dtype, device=device), backend, names, **numbers)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_differentiates_itself(case):
    names, numbers = CASES[case]
    inputs = chosen(every_input(500, dtype=torch.float64), names)
    ones = torch.ones(500, dtype=torch.float64)
    gradient = by_definition(inputs, ones, torch.float64, **numbers)[1]
    derivative = reference(Tokens(**inputs), rule(inputs, **numbers))[1]
    assert torch.allclose(derivative, gradient, rtol=1e-12, atol=1e-15)
    assert torch.allclose(derivative, by_hand(inputs, ones, **numbers)[1], rtol=1e-12, atol=1e-15)


def test_cases_meet_every_bound():
    names, numbers = CASES["dual"]
    counts = by_hand(chosen(every_input(4, 1025), names), torch.ones(4, 1025), **numbers)[3][:4]
    assert (counts > 50).all()


@each_backend
def test_strides(device, backend):
    whole = tokens(6, 40, device=device)
    compare({name: x[:, ::3] for name, x in whole.items()}, backend, surrogate=Clip(dual=1.5), beta=0.1)
    compare({name: x.t() for name, x in whole.items()}, backend)
    compare({name: x[1:2, :1].expand(5, 7) for name, x in whole.items()}, backend, beta=0.1)


@each_fast_backend
def test_more_partial_sums_than_one_step_adds(device, backend, monkeypatch):
    monkeypatch.setitem(policy_tokens.TOKEN_LAUNCH, "BLOCK", 128)
    monkeypatch.setitem(policy_tokens.MERGE_LAUNCH, "BLOCK", 16)
    compare(tokens(50 * 128, device=device), backend, surrogate=Clip(dual=1.5), beta=0.1)


@each_fast_backend
@both_dtypes
def test_small_differences_keep_their_digits(dtype, device, backend):
    """Divergences of 1e-8 have as many digits as those of 1: e^d - 1 - d computed as it reads has none in float32."""
    d = torch.logspace(-6, 0.1, 300, dtype=torch.float64).to(dtype)
    d = torch.cat([d, -d, torch.tensor([0.5, -0.5, 1.0, -1.0, math.nextafter(1, 0)], dtype=dtype)])
    inputs = {"logprobs": torch.zeros_like(d), "advantages": torch.zeros_like(d), "ref_logprobs": d}
    inputs = {name: x.to(device) for name, x in inputs.items()}
    truth = by_hand(inputs, torch.ones_like(d), beta=1.0)
    x = d.double().numpy().astype(np.longdouble)
    series = sum(x**k / math.factorial(k) for k in range(2, 9))  # where long double cancels, too
    value = torch.from_numpy(np.where(np.abs(x) < 1e-2, series, np.expm1(x) - x).astype(np.float64))
    losses, gradient, *_ = (x.cpu() for x in run(inputs, torch.ones_like(inputs["logprobs"]), backend, beta=1.0))
    check("k3", losses, value, value, dtype)
    check("its gradient", gradient, truth[1], truth[1], dtype)
    same = torch.full((4,), 1e-4, dtype=dtype, device=device)
    approx_kl = policy_loss(same, same, old_logprobs=0 * same, backend=backend)[1][4:5].cpu()
    x = same[:1].double().cpu()
    check("approx_kl", approx_kl, *[4 * sum(x**k / math.factorial(k) for k in range(2, 7))] * 2, dtype)


@each_fast_backend
@both_dtypes
def test_ratios_of_every_size(dtype, device, backend):
    end = 89 if dtype == torch.float32 else 710
    log_ratio = torch.linspace(-end, end, 4001, dtype=dtype, device=device)
    ones = torch.ones_like(log_ratio)
    losses, _ = policy_loss(log_ratio, -ones, old_logprobs=0 * ones, surrogate=UNBOUND, backend=backend)
    truth = np.exp(log_ratio.cpu().double().numpy().astype(np.longdouble))
    with np.errstate(over="ignore"):
        truth = torch.from_numpy(truth.astype(np.float32 if dtype == torch.float32 else np.float64)).double()
    losses, tiny = losses.cpu().double(), torch.finfo(dtype).tiny
    assert torch.equal(losses.isinf(), truth.isinf()) and (losses[truth <= tiny] <= tiny).all()
    # Rounding x log2(e) costs |x| eps / 2 of the ratio, rounding log2(e) as much at most.
    roundings = 4 + log_ratio.cpu().double().abs() / (2 if backend == "cpu" else 1)
    assert ((losses - truth).abs() <= roundings * eps(dtype) * truth)[(truth > tiny) & truth.isfinite()].all()


@each_backend
@both_dtypes
def test_at_a_bound_the_gradient_flows(dtype, device, backend):
    for bound, a, past in ((0.75, -2.0, -math.inf), (1.28, 2.0, math.inf), (3.0, -2.0, math.inf)):
        at = torch.tensor(math.log1p(bound - 1) if bound < 2 else math.log(bound), dtype=dtype)
        log_ratio = torch.stack([at, torch.nextafter(at, torch.tensor(past, dtype=dtype))]).to(device)
        inputs = {"logprobs": log_ratio, "advantages": torch.full_like(log_ratio, a), "old_logprobs": 0 * log_ratio}
        losses, gradient, _, statistics = run(inputs, 0 * log_ratio + 1, backend, surrogate=Clip(0.25, 0.28, 3.0))
        assert gradient[1] == 0 and torch.allclose(gradient[0], losses[0], rtol=0) and losses[0] * a < 0
        assert torch.allclose(losses, torch.full_like(losses, -bound * a), rtol=4 * eps(dtype))
        assert statistics[1:4].sum() == 1


@each_backend
def test_overflow(device, backend):
    def one(log_ratio, a, **numbers):
        x = {"logprobs": [log_ratio], "advantages": [a], "old_logprobs": [0.0], "weights": [0.5]}
        results = run(
            {k: torch.tensor(v, device=device) for k, v in x.items()}, torch.ones(1, device=device), backend, **numbers
        )
        return results[0].item(), results[1].item()

    for a, log_ratio in ((0.0, 1e4), (-0.0, 1e4), (0.0, math.inf), (0.0, -math.inf)):
        assert (
            one(log_ratio, a)
            == one(log_ratio, a, surrogate=Clip(dual=3.0))
            == one(log_ratio, a, surrogate=UNBOUND)
            == (0, 0)
        )
    assert one(1e4, 2.0) == pytest.approx((-1.2, 0)) and one(1e4, -2.0) == (math.inf, math.inf)
    assert one(1e4, -2.0, surrogate=Clip(dual=3.0)) == (3.0, 0) and one(1e4, 2.0, surrogate=UNBOUND) == (
        -math.inf,
        -math.inf,
    )
    assert one(-1e4, 2.0) == one(-math.inf, 2.0) == (0, 0) and one(-math.inf, -2.0) == pytest.approx((0.8, 0))
    x = torch.tensor([100.0, 1e4, 0.0], device=device)
    statistics = policy_loss(x, 0 * x, old_logprobs=0 * x, backend=backend)[1]
    assert statistics[10] == torch.inf and statistics[11] == 1


@each_backend
def test_masked_tokens_may_hold_anything(device, backend):
    inputs = tokens(BLOCK + 300, device=device)
    clean = run(inputs, torch.ones_like(inputs["logprobs"]), backend, beta=0.1)
    for garbage in (torch.nan, torch.inf, -torch.inf, 1e30):
        dirty = {k: x if k == "mask" else torch.where(inputs["mask"], x, garbage) for k, x in inputs.items()}
        got = run(dirty, torch.ones_like(inputs["logprobs"]), backend, beta=0.1)
        equal(got, clean)
    assert (clean[0][~inputs["mask"]] == 0).all() and (clean[1][~inputs["mask"]] == 0).all()
    for kl in ESTIMATORS:
        nobody = {**inputs, "mask": torch.zeros_like(inputs["mask"])}
        losses, gradient, _, statistics = run(nobody, torch.ones_like(inputs["logprobs"]), backend, beta=0.1, kl=kl)
        assert not losses.any() and not gradient.any() and statistics.tolist() == NOTHING


@each_backend
@pytest.mark.parametrize("name", ["logprobs", "advantages", "old_logprobs", "ref_logprobs", "weights"])
def test_nan_is_not_hidden(name, device, backend):
    inputs = tokens(BLOCK * 2 + 5, device=device)
    inputs["mask"][:] = True
    inputs["advantages"][7] = 0.0
    inputs[name][7] = torch.nan
    losses, *_, statistics = run(inputs, torch.ones_like(inputs["logprobs"]), backend, beta=0.1)
    assert losses[7].isnan() and losses.isnan().sum() == 1
    if name in ("logprobs", "old_logprobs"):
        assert statistics[[4, 8, 9, 10, 11]].isnan().all()
        assert torch.equal(merged(statistics[None]).isnan(), statistics.isnan())
    assert statistics[:4].isfinite().all() and statistics[5].isnan() == (name in ("logprobs", "ref_logprobs"))


@each_backend
def test_empty(device, backend):
    inputs = tokens(0, 3, device=device)
    losses, gradient, _, statistics = run(inputs, torch.ones_like(inputs["logprobs"]), backend, beta=0.1)
    assert losses.shape == gradient.shape == (0, 3)
    assert statistics.tolist() == NOTHING
    assert all(value == 0 for value in named(statistics).values())


@settings(max_examples=8 if INTERPRETING else 40, deadline=None)
@given(count=st.integers(1, 600), cut=st.floats(0, 1), seed=st.integers(0, 999), dual=st.sampled_from([None, 1.2, 4.0]))
def test_identities(count, cut, seed, dual):
    torch.manual_seed(seed)
    x, backend = tokens(count), FAST[0][1]
    a, w, old, ones = x["advantages"], x["weights"], x["old_logprobs"], torch.ones(count)
    losses, gradient, _, statistics = run(chosen(x, ("weights",)), ones, backend, surrogate=Clip(dual=dual))
    assert torch.equal(losses, -a * w) and torch.equal(gradient, -a * w)
    assert statistics.tolist() == [count, 0, 0, 0, 0, 0, count, 0, count, count, 1, 1]
    losses, gradient, *_ = run(chosen(x, IMPORTANCE), ones, backend, surrogate=UNBOUND)
    assert torch.equal(losses, gradient) and torch.allclose(losses, -(x["logprobs"] - old).exp() * a, rtol=1e-5)
    k3 = policy_loss(x["logprobs"], 0 * a, ref_logprobs=x["ref_logprobs"], beta=1.0, backend=backend)[0]
    assert (k3 >= 0).all()
    positive = chosen({**x, "advantages": a.abs()}, IMPORTANCE)
    equal(run(positive, ones, backend, surrogate=Clip(dual=1.01)), run(positive, ones, backend))
    at = int(count * cut)
    parts = [{name: t[part] for name, t in x.items()} for part in (slice(0, at), slice(at, None))]
    results = [
        run(part, torch.ones_like(part["logprobs"]), backend, surrogate=Clip(dual=dual), beta=0.1) for part in parts
    ]
    whole = run(x, ones, backend, surrogate=Clip(dual=dual), beta=0.1)
    equal([torch.cat(both) for both in zip(*results, strict=True)][:2], whole[:2])
    both, exactly = merged(torch.stack([r[-1] for r in results])), [0, 1, 2, 3, 7, 10, 11]
    assert torch.equal(both[exactly], whole[-1][exactly])
    assert torch.allclose(both[4:10], whole[-1][4:10], rtol=1e-5, atol=1e-6)


@each_fast_backend
def test_runs_and_threads_and_neighbours_change_nothing(device, backend):
    x = tokens(50_000 if backend == "cpu" else 3 * BLOCK + 5, device=device)
    ones, rule = torch.ones_like(x["logprobs"]), {"surrogate": Clip(dual=2.0), "beta": 0.1}
    whole = run(x, ones, backend, **rule)
    for count in (*[torch.get_num_threads()] * 9, 1, 2, 3):
        with threads(count):
            equal(run(x, ones, backend, **rule), whole)
    for count in (1, 15, 16, 17, 255, 257, BLOCK + 1):
        part = run({name: t[-count:] for name, t in x.items()}, ones[-count:], backend, **rule)
        equal(part[:3], [result[-count:] for result in whole[:3]])


@cpu_only
def test_every_instruction_set(isa):
    for dtype in (torch.float32, torch.float64):
        compare(tokens(4099, dtype=dtype), "cpu", surrogate=Clip(dual=1.5), beta=0.1)
    test_small_differences_keep_their_digits(torch.float32, "cpu", "cpu")
    test_ratios_of_every_size(torch.float32, "cpu", "cpu")


@cpu_only
@pytest.mark.parametrize("surrogate", [Clip(dual=1.5), Gate()])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("kl_weighted", [False, True])
def test_gradcheck(surrogate, kl, kl_weighted):
    """Where the gradient is that of the value: neither of Weight, nor of k1+ and k3+."""
    x = every_input(40, dtype=torch.float64) | {"rollout_logprobs": None}
    numbers = {"beta": 0.3, "kl": kl, "kl_weighted": kl_weighted, "entropy_coef": 0.2, "importance": Truncate(1.2)}

    def losses(logprobs, entropy):
        given = {**x, "logprobs": logprobs, "entropy": entropy}
        return policy_loss(**given, **numbers, surrogate=surrogate, backend="cpu")[0]

    assert torch.autograd.gradcheck(losses, [x[name].clone().requires_grad_() for name in ("logprobs", "entropy")])


@each_backend
def test_only_the_derivative_is_saved_and_only_when_wanted(device, backend, monkeypatch):
    x, saved, wanted, run_backend = tokens(100, device=device), [], [], module.IMPLS[backend]
    monkeypatch.setitem(module.IMPLS, backend, lambda *each: wanted.append(each[-1]) or run_backend(*each))
    trained = {**x, "logprobs": x["logprobs"].clone().requires_grad_()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        losses, statistics = policy_loss(**trained, backend=backend)
    assert losses.requires_grad and not statistics.requires_grad and saved == [(100,)]
    with torch.no_grad():
        equal(policy_loss(**trained, backend=backend), (losses, statistics))
    equal(policy_loss(**x, backend=backend), (losses, statistics))
    assert wanted == [True, False, False]


@cpu_only
def test_a_second_derivative_is_refused():
    logprobs = torch.zeros(3, requires_grad=True)
    losses, _ = policy_loss(logprobs, torch.ones(3), backend="cpu")
    (gradient,) = torch.autograd.grad(losses.square().sum(), logprobs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@cpu_only
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    def loss(inputs, low):
        losses, statistics = policy_loss(
            **{**inputs, "logprobs": inputs["logprobs"] * 2}, surrogate=Clip(low, dual=2.0), beta=0.1
        )
        return losses.sum(), named(statistics)["ess"]

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for count, low in ((40, 0.2), (41, 0.3), (42, math.inf)):
        inputs = tokens(count)
        inputs["logprobs"].requires_grad_()
        (value, ess), (expected, expected_ess) = compiled(inputs, low), loss(inputs, low)
        gradients = [torch.autograd.grad(v, inputs["logprobs"])[0] for v in (value, expected)]
        assert torch.equal(value, expected) and torch.equal(*gradients) and torch.equal(ess, expected_ess)


@cpu_only
def test_opcheck():
    x = every_input(20)
    bounds, numbers = [-math.inf, math.inf, 0.0, math.inf], [0.1, 0.2]
    names = "logprobs", "advantages", "old_logprobs", "ref_logprobs", "log_weights", "entropy", "weights", "mask"
    for wanted in (True, False):
        x |= {name: x[name].detach().clone().requires_grad_(wanted) for name in ("logprobs", "entropy")}
        every = [x[name] for name in names]
        for kind in (Clip(dual=3.0), CISPO, Gate()):
            code, *first = numbers_of(kind)
            arguments = [*first, *bounds, *numbers], [code, 3, 0, 1, 1, int(wanted)], "cpu"
            torch.library.opcheck(torch.ops.fuserl.policy_loss, (*every, *arguments))
        arguments = [*first, *bounds, 0.0, 0.0], [code, 0, 0, 0, 0, int(wanted)], "cpu"
        torch.library.opcheck(torch.ops.fuserl.policy_loss, (*every[:2], *[None] * 6, *arguments))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"logprobs": torch.zeros(3).bfloat16()}, "logprobs must be float32 or float64; got torch.bfloat16"),
        ({"advantages": torch.zeros(1)}, r"advantages must be \(3,\) torch.float32"),
        ({"advantages": torch.zeros(3).double()}, "advantages must be"),
        ({"old_logprobs": torch.zeros(3, 1)}, "old_logprobs must be"),
        ({"mask": torch.ones(3)}, "mask must be .* torch.bool"),
        ({"weights": torch.zeros(3, device="meta")}, "weights must be .* on cpu"),
        ({"ref_logprobs": torch.zeros(3, requires_grad=True)}, "ref_logprobs must not require a gradient"),
        ({"advantages": torch.zeros(3, requires_grad=True)}, "advantages must not require a gradient"),
        ({"kl": "k4"}, r"kl must be one of k1, k2, k3, k1\+, k3\+; got 'k4'"),
        ({"beta": math.inf}, "beta must be finite"),
        ({"beta": 0.1}, "ref_logprobs must be given"),
        ({"backend": "cudnn"}, "backend must be one of"),
    ],
)
def test_bad_input_gets_one_sentence(change, message):
    arguments = {"logprobs": torch.zeros(3), "advantages": torch.zeros(3), **change}
    with pytest.raises(ValueError, match=f"^policy_loss: .*{message}"):
        fuserl.policy_loss(**arguments)


@pytest.mark.gpu
def test_waits_for_nothing():
    x = tokens(5000, device="cuda")
    x["logprobs"].requires_grad_()
    policy_loss(**x, beta=0.1)[0].sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses, statistics = policy_loss(**x, surrogate=Clip(dual=3.0), beta=0.1)
        losses.sum().backward()
        named(merged(torch.stack([statistics, policy_loss(x["mask"][:0].float(), x["mask"][:0].float())[1]])))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cpu_only
def test_triton_in_the_interpreter():
    run_interpreted(__file__)
