"""gaussian_logprob against extended precision: results and every gradient, every backend, edges and identities."""

import itertools
import math

import pytest
import torch
from backends import FAST, INTERPRETING, cpu_only, each_backend, each_fast_backend, run_interpreted, threads
from gaussians import TENSORS, VIEWS, by_hand, drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import eps

import fuserl
from fuserl.kernels.gaussian_logprob import GaussianLogprob, gaussian_logprob

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
both_forms = pytest.mark.parametrize("logs", [True, False], ids=["log_std", "std"])

# Fewer dimensions than a vector has, a tile of many rows and one more, rows of a piece of a tile and of several.
SHAPES = [(1,), (1, 1), (5, 1), (1100, 1), (170, 3), (33, 17), (3, 5, 64), (2, 512), (3, 513), (2, 1500), (40, 1030)]
if INTERPRETING:
    SHAPES = [(1,), (5, 1), (70, 3), (3, 513), (2, 1500)]


def call(tensors, backend, logs=True, entropy=True, **options):
    """The op, by TENSORS."""
    names = ("log_std", "ref_log_std") if logs else ("std", "ref_std")
    scales = {name: tensors[each] for name, each in zip(names, ("scale", "ref_scale"), strict=True) if each in tensors}
    given = {name: tensors[name] for name in ("actions", "mean", "ref_mean") if name in tensors}
    return gaussian_logprob(**given, **scales, entropy=entropy, backend=backend, **options)


def run(tensors, g, backend, **options):
    """(logprob, entropy, kl, gradients in the order of the tensors), with g (3, ...) from above."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    out = [x for x in call(leaves, backend, **options) if x is not None]
    return *(x.detach() for x in out), *torch.autograd.grad(out, list(leaves.values()), list(g[: len(out)]))


def equal(some, others):
    assert all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def above(tensors):
    shape = tensors["actions"].shape[:-1]
    return torch.randn(3, *shape, dtype=torch.float64).to(tensors["mean"])


def compare(tensors, backend, **options):
    g, dtype = above(tensors), tensors["mean"].dtype
    truth = by_hand(tensors, g, rough=backend == "reference", **options)
    for got, (name, expected, roundings) in zip(run(tensors, g, backend, **options), truth, strict=True):
        assert got.dtype == dtype and got.shape == expected.shape, name
        allowed = eps(dtype) * roundings + torch.finfo(dtype).smallest_normal
        error = (got.cpu().double() - expected).abs()
        assert (error <= allowed).all(), f"{name}: {(error / allowed).max():.3f} of what is allowed"


def some_mask(tensors):
    shape = tensors["actions"].shape
    mask = torch.rand(shape) < 0.7
    mask.view(-1, shape[-1])[::3] = False
    return mask.to(tensors["actions"].device)


@each_backend
@both_dtypes
@both_forms
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(shape, logs, dtype, device, backend):
    for view in VIEWS:
        tensors = drawn(*shape, view=view, ref_view=view, logs=logs, dtype=dtype, device=device)
        compare(tensors, backend, logs=logs)


@each_backend
@both_forms
def test_every_pair_of_views(logs, device, backend):
    for view, ref_view in itertools.product(VIEWS, repeat=2):
        for shape in ((37, 7), (3, 600))[: 2 - INTERPRETING]:
            tensors = drawn(*shape, view=view, ref_view=ref_view, logs=logs, device=device)
            compare(tensors, backend, logs=logs)
            compare(tensors, backend, logs=logs, mask=some_mask(tensors), average=True)
            compare(tensors, backend, logs=logs, mask=some_mask(tensors)[1])


@each_backend
def test_strides_and_expanded_views(device, backend):
    whole = drawn(6, 40, device=device)
    compare({name: x[:, ::3] for name, x in whole.items()}, backend)
    compare({name: x.t() for name, x in whole.items()}, backend)
    compare({name: x[1:2, :1].expand(5, 7) for name, x in whole.items()}, backend)


@each_backend
def test_a_noise_level_for_each_step(device, backend):
    """A chain of T steps for a batch: scales (T, 1, 1), (T, 1, D) and (1, B, 1)."""
    tensors = drawn(4, 3, 5, device=device)
    for shape in ((4, 1, 1), (4, 1, 5), (1, 3, 1), (1, 1, 5), (3, 5)):
        steps = {"scale": tensors["scale"].flatten()[: math.prod(shape)].reshape(shape)}
        compare({**tensors, **steps, "ref_scale": 0.5 * steps["scale"]}, backend)


@each_backend
@both_forms
def test_a_view_is_its_expansion(logs, device, backend):
    for view in VIEWS:
        tensors = drawn(21, 70, view=view, ref_view=view, logs=logs, device=device)
        wide = {name: x.expand(21, 70).contiguous() for name, x in tensors.items()}
        g = above(tensors)
        got, expected = (run(x, g, backend, logs=logs) for x in (tensors, wide))
        exactly = [0, 1, 2, 3, 4, 6]
        equal([got[i] for i in exactly], [expected[i] for i in exactly])
        for name, some, all_of_them in zip(TENSORS, got[3:], expected[3:], strict=True):
            assert torch.allclose(some, all_of_them.sum_to_size(tensors[name].shape), rtol=1e-4, atol=1e-4), name


@each_backend
@both_forms
def test_masked_dimensions_may_hold_anything(logs, device, backend):
    for view, average in itertools.product(("each", "dimension"), (False, True)):
        tensors = drawn(30, 40, view=view, ref_view=view, logs=logs, device=device)
        mask = some_mask(tensors) if view == "each" else some_mask(tensors)[1]
        g, options = above(tensors), {"logs": logs, "mask": mask, "average": average}
        clean = run(tensors, g, backend, **options)
        for garbage in (torch.nan, torch.inf, -torch.inf, 1e30):
            dirty = {name: torch.where(mask, x, garbage) for name, x in tensors.items()}
            equal(run(dirty, g, backend, **options), clean)
        gradients = clean[3:] if view == "each" else [clean[3], clean[4], clean[6]]
        assert all((x * ~mask == 0).all() for x in gradients)
    none = run(tensors, g, backend, logs=logs, mask=torch.zeros_like(mask), average=average)
    assert not any(x.any() for x in none)


@each_backend
@pytest.mark.parametrize("name", TENSORS)
def test_nan_is_not_hidden(name, device, backend):
    tensors = drawn(9, 70, device=device)
    tensors[name][4, 50] = torch.nan
    shown = [x.isnan().nonzero().tolist() for x in run(tensors, above(tensors), backend)]
    seen = {"actions": (0,), "mean": (0, 2), "scale": (0, 1, 2)}.get(name, (2,))
    assert [bool(x) for x in shown[:3]] == [i in seen for i in range(3)]
    assert all(x in ([], [[4]]) for x in shown[:3]) and all(x in ([], [[4, 50]]) for x in shown[3:]) and any(shown[3:])


@each_backend
def test_a_row_that_nobody_asks_about_has_no_gradient(device, backend):
    tensors = drawn(9, 70, device=device)
    g = above(tensors)
    g[:, 4] = 0
    clean = run(tensors, g, backend)
    for garbage in (torch.nan, torch.inf, -torch.inf):
        dirty = {name: x.clone() for name, x in tensors.items()}
        for x in dirty.values():
            x[4] = garbage
        equal(run(dirty, g, backend)[3:], clean[3:])
    assert not any(x[4].any() for x in clean[3:])


@each_fast_backend
@both_dtypes
@both_forms
def test_small_divergences_keep_their_digits(logs, dtype, device, backend):
    """A divergence of 1e-12 has as many digits as one of 1: expm1(2 t) - 2 t as it reads has none in float32."""
    t = torch.cat([s * torch.logspace(-6, 1, 200, dtype=torch.float64) for s in (1, -1)])[:, None]
    log = torch.randn(400, 1, dtype=torch.float64)
    tensors = drawn(400, 1, logs=logs, dtype=dtype, device=device, apart=0.0)
    scales = (log, log - t) if logs else (log.exp(), (log - t).exp())
    tensors |= {n: x.to(tensors["mean"]) for n, x in zip(("scale", "ref_scale"), scales, strict=True)}
    g = torch.ones_like(above(tensors))
    kl, roundings = list(by_hand(tensors, g, logs=logs))[2][1:]
    got = run(tensors, g, backend, logs=logs)[2].cpu().double()
    counts = 12 + 4 * t[:, 0].abs()
    assert ((got - kl).abs() <= counts * eps(dtype) * kl).all() and (roundings >= kl).all()


@each_backend
@both_forms
def test_a_policy_is_no_way_from_itself(logs, device, backend):
    for view in VIEWS:
        tensors = drawn(50, 20, view=view, ref_view=view, logs=logs, device=device)
        same = {**tensors, "ref_mean": tensors["mean"], "ref_scale": tensors["scale"]}
        g = above(tensors)
        g[:2] = 0
        _, _, kl, *gradients = run(same, g, backend, logs=logs)
        assert not kl.any() and not any(x.any() for x in gradients)


@settings(max_examples=4 if INTERPRETING else 40, deadline=None)
@given(
    rows=st.integers(1, 40), dimensions=st.integers(1, 600), seed=st.integers(0, 999),
    apart=st.sampled_from([1e-4, 0.3, 3.0]), view=st.sampled_from(VIEWS), logs=st.booleans(),
)  # fmt: skip
def test_identities(rows, dimensions, seed, apart, view, logs):
    torch.manual_seed(seed)
    backend = FAST[0][1]
    x = drawn(rows, dimensions, view=view, ref_view=view, logs=logs, apart=apart)
    out = call(x, backend, logs=logs)
    assert (out.kl >= 0).all()
    mean = call(x, backend, logs=logs, average=True)
    assert all(torch.allclose(a, b / dimensions, rtol=1e-6) for a, b in zip(mean, out, strict=True))
    # At its mean the density is highest, and below that by half the squared distance.
    peak = call({**x, "actions": x["mean"]}, backend, logs=logs).logprob
    assert (out.logprob <= peak + 1e-4 * (1 + peak.abs())).all()
    assert torch.allclose(peak + out.entropy, peak * 0 + dimensions / 2, rtol=1e-4, atol=1e-3 * dimensions**0.5)
    if view == "each":
        cut = dimensions // 2 + 1
        parts = [{name: t[:, part] for name, t in x.items()} for part in (slice(0, cut), slice(cut, None))]
        found = [call(part, backend, logs=logs) for part in parts if part["mean"].numel()]
        sums = (sum(each) for each in zip(*found, strict=True))
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-3) for a, b in zip(sums, out, strict=True))


@each_fast_backend
def test_a_chain_is_the_sum_of_its_steps(device, backend):
    """The log-prob of a chain of K denoising steps is that of one vector of all their dimensions."""
    steps = drawn(8, 5, 7, view="row", device=device)
    wide = {name: x.expand(8, 5, 7).transpose(0, 1).reshape(5, 56) for name, x in steps.items()}
    for chain, whole in zip(call(steps, backend), call(wide, backend), strict=True):
        assert torch.allclose(chain.sum(0), whole, rtol=1e-5, atol=1e-5)


@each_backend
@both_forms
def test_equals_torch_distributions(logs, device, backend):
    tensors = drawn(20, 30, view="dimension", ref_view="row", logs=logs, dtype=torch.float64, device=device)
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    g = above(tensors)
    std, ref_std = ((x.exp() if logs else x) for x in (leaves["scale"], leaves["ref_scale"]))
    policy = torch.distributions.Normal(leaves["mean"], std.expand(20, 30))
    other = torch.distributions.Normal(leaves["ref_mean"], ref_std.expand(20, 30))
    kl = torch.distributions.kl_divergence(policy, other)
    out = [x.sum(-1) for x in (policy.log_prob(leaves["actions"]), policy.entropy(), kl)]
    expected = *out, *torch.autograd.grad(out, list(leaves.values()), list(g))
    for a, b in zip(run(tensors, g, backend, logs=logs), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@cpu_only
@both_forms
@pytest.mark.parametrize("view", VIEWS)
def test_gradcheck(view, logs):
    tensors = drawn(3, 4, view=view, ref_view=view, logs=logs, dtype=torch.float64)
    mask = torch.tensor([True, True, False, True])

    def results(*leaves):
        return tuple(call(dict(zip(TENSORS, leaves, strict=True)), "cpu", logs=logs, mask=mask, average=True))

    assert torch.autograd.gradcheck(results, [x.clone().requires_grad_() for x in tensors.values()])


@each_fast_backend
def test_runs_and_threads_and_neighbours_change_nothing(device, backend):
    rows = 3000 if backend == "cpu" else 120
    for view in VIEWS:
        tensors = drawn(rows, 33, view=view, ref_view=view, device=device)
        g = above(tensors)
        whole = run(tensors, g, backend)
        for count in () if INTERPRETING else (*[torch.get_num_threads()] * 9, 1, 2, 3):
            with threads(count):
                equal(run(tensors, g, backend), whole)
        for count in (1, 15, 16, 17, 101):
            part = {name: x[-count:] if len(x.shape) == 2 and len(x) == rows else x for name, x in tensors.items()}
            got = run(part, g[:, -count:], backend)
            of_rows = [0, 1, 2, 3, 4, 6, *([5, 7] if view in ("each", "row") else [])]
            equal([got[i] for i in of_rows], [whole[i][-count:] for i in of_rows])


@cpu_only
def test_threads_change_nothing_where_rows_are_long():
    tensors = drawn(40, 9000, view="dimension", ref_view="one")
    g = above(tensors)
    with threads(1):
        whole = run(tensors, g, "cpu")
    for count in (2, 3):
        with threads(count):
            equal(run(tensors, g, "cpu"), whole)


@cpu_only
@both_forms
def test_every_instruction_set(isa, logs):
    for dtype in (torch.float32, torch.float64):
        for shape in ((70, 1), (70, 5), (9, 700)):
            for view in VIEWS:
                tensors = drawn(*shape, view=view, ref_view=view, logs=logs, dtype=dtype)
                compare(tensors, "cpu", logs=logs, mask=some_mask(tensors))
        test_small_divergences_keep_their_digits(logs, dtype, "cpu", "cpu")


@each_backend
@both_forms
def test_far_actions_and_extreme_scales(logs, device, backend):
    for log_std in (-20.0, -5.0, 5.0, 20.0):
        tensors = drawn(8, 20, logs=logs, device=device)
        for name in ("scale", "ref_scale"):
            tensors[name] = tensors[name] + log_std if logs else tensors[name] * math.exp(log_std)
        tensors["actions"][::2] = tensors["mean"][::2]
        tensors["actions"][1::2] *= 10
        compare(tensors, backend, logs=logs)


@each_backend
def test_an_infinite_action_has_no_density(device, backend):
    tensors = drawn(4, 20, device=device)
    tensors["actions"][1, 3], tensors["actions"][2, 3] = torch.inf, 1e30
    logprob = call(tensors, backend).logprob
    assert (logprob[1:3] == -torch.inf).all() and logprob[[0, 3]].isfinite().all()


@each_backend
def test_sixteen_bits_are_widened(device, backend):
    for dtype in (torch.bfloat16, torch.float16):
        narrow = drawn(11, 7, dtype=dtype, device=device)
        wide = {name: x.float() for name, x in narrow.items()}
        g = above(wide)
        got, expected = run(narrow, g, backend), run(wide, g, backend)
        equal(got[:3], expected[:3])
        equal(got[3:], [x.to(dtype) for x in expected[3:]])
    mixed = {**wide, "mean": narrow["mean"], "scale": narrow["scale"]}
    equal(call(mixed, backend), call(wide, backend))


@each_backend
def test_no_action(device, backend):
    for view in VIEWS:
        tensors = drawn(0, 3, view=view, ref_view=view, device=device)
        found = run(tensors, above(tensors), backend)
        assert all(x.shape == (0,) for x in found[:3])
        assert all(x.shape == t.shape and not x.any() for x, t in zip(found[3:], tensors.values(), strict=True))


@each_backend
def test_only_what_is_asked_for(device, backend):
    x = drawn(7, 5, device=device)
    whole = call(x, backend)
    assert isinstance(whole, GaussianLogprob) and fuserl.gaussian_logprob.__wrapped__ is gaussian_logprob
    plain = gaussian_logprob(x["actions"], x["mean"], x["scale"], backend=backend)
    equal(plain[:1], whole[:1])
    assert plain.entropy is None and plain.kl is None
    same = gaussian_logprob(x["actions"], x["mean"], x["scale"], ref_mean=x["ref_mean"], backend=backend)
    assert same.entropy is None
    equal([same.kl], [call({**x, "ref_scale": x["scale"]}, backend).kl])
    number = gaussian_logprob(x["actions"], x["mean"], std=0.5, ref_mean=x["ref_mean"], ref_std=2, backend=backend)
    half = torch.full((), 0.5, device=device)
    equal([number.logprob], [gaussian_logprob(x["actions"], x["mean"], std=half, backend=backend).logprob])


@each_backend
def test_each_result_alone_has_its_gradient(device, backend):
    tensors = drawn(7, 5, device=device)
    g = above(tensors)
    for i in range(3):
        leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        result = call(leaves, backend)[i]
        only = torch.zeros_like(g)
        only[i] = g[i]
        expected = run(tensors, only, backend)[3:]
        found = torch.autograd.grad(result, list(leaves.values()), g[i], allow_unused=True)
        assert all((b == 0).all() if a is None else torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@each_backend
def test_only_inputs_are_kept_and_only_wanted_gradients_written(device, backend):
    x = drawn(100, 6, view="dimension", ref_view="dimension", device=device)
    policy = {**x, "mean": x["mean"].clone().requires_grad_(), "scale": x["scale"].clone().requires_grad_()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        out = call(policy, backend)
    assert set(kept) == {t.data_ptr() for t in policy.values()}
    g = above(x)
    found = torch.autograd.grad(out, [policy["mean"], policy["scale"]], list(g))
    equal(found, run(x, g, backend)[4:6])
    with torch.no_grad():
        assert not any(each.requires_grad for each in call(policy, backend))


@pytest.mark.gpu
def test_waits_for_nothing():
    tensors = {name: x.requires_grad_() for name, x in drawn(500, 30, view="dimension", device="cuda").items()}
    mask = torch.ones(500, 30, dtype=torch.bool, device="cuda")
    sum(x.sum() for x in call(tensors, "triton", mask=mask)).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sum(x.sum() for x in call(tensors, "triton", mask=mask, average=True)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cpu_only
def test_triton_in_the_interpreter():
    run_interpreted(__file__)
