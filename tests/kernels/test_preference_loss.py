"""preference_loss against the papers in extended precision: losses, gradients, rewards, statistics, every backend."""

import math

import numpy as np
import pytest
import torch
from backends import FAST, INTERPRETING, cpu_only, each_backend, each_fast_backend, run_interpreted, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from paired_rollouts import FORMS, LENGTHS, by_hand, rollouts
from tolerance import check, eps

import fuserl
from fuserl import CPO, DPO, IPO, KTO, ORPO, BradleyTerry, Hinge, SimPO
from fuserl.kernels import preference_loss as module
from fuserl.kernels import preference_pairs
from fuserl.kernels.preference_loss import Given, merged, named, preference_loss, reference

if INTERPRETING:  # which takes its time over each lane
    preference_pairs.SUM_LAUNCH.update(BLOCK=32)
    preference_pairs.PAIR_LAUNCH.update(BLOCK=16)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
each_form = pytest.mark.parametrize("name", FORMS)
NAMES = ("losses", "gradient", "rewards", "statistics")
MANY = [*LENGTHS * 4, 0, 1]


def run(inputs, form, g, backend):
    """(losses, gradient, rewards, statistics), with g the gradient that comes from above."""
    logprobs = inputs["logprobs"].detach().requires_grad_()
    losses, rewards, statistics = preference_loss(**{**inputs, "logprobs": logprobs, "form": form}, backend=backend)
    return losses.detach(), torch.autograd.grad(losses, logprobs, g)[0], rewards, statistics


def by_definition(inputs, form, g):
    """The same by autograd through the reference."""
    logprobs = inputs["logprobs"].detach().requires_grad_()
    tensors = Given(*(inputs.get(name) for name in Given._fields))
    losses, rewards, statistics, _ = reference(logprobs, tensors, form.rule())
    return losses.detach(), torch.autograd.grad(losses, logprobs, g)[0], rewards, statistics


def gradients_of(inputs, form):
    items = module.Given(*(inputs.get(name) for name in Given._fields)).sizes(inputs["logprobs"])[1]
    return torch.randn(items).to(inputs["logprobs"])


def compare(inputs, form, backend):
    dtype, g = inputs["logprobs"].dtype, gradients_of(inputs, form)
    got, truth, plain = run(inputs, form, g, backend), by_hand(inputs, form, g), by_definition(inputs, form, g)
    assert all(x.dtype == dtype for x in got) and not got[2].requires_grad and not got[3].requires_grad
    for name, a, b, c in zip(NAMES, got, truth, plain, strict=True):
        if name == "statistics":  # a margin errs as the two rewards whose difference it is
            a, b, c = (x[[1, 5, 6, 7]] for x in (a, b, c))
        check(name, a.cpu(), b, c.cpu(), dtype)
    assert torch.equal(got[3][[0, 2, 3, 4]].cpu().double(), truth[3][[0, 2, 3, 4]]), "counts are exact"


@each_backend
@both_dtypes
@each_form
def test_equals_the_papers(name, dtype, device, backend):
    form = FORMS[name]
    for what in ((), ("margins", "indices", "mask"), ("indices",)):
        what = [each for each in what if each != "margins" or not isinstance(form, ORPO)]
        compare(rollouts(MANY[:-2] if form == FORMS["orpo"] else MANY, form, dtype, device, what), form, backend)


@each_form
def test_the_reference_differentiates_itself(name):
    form = FORMS[name]
    inputs = rollouts(LENGTHS, form, torch.float64, given=("mask",))
    tensors = Given(*(inputs.get(each) for each in Given._fields))
    gradient = by_definition(inputs, form, torch.ones(tensors.sizes(inputs["logprobs"])[1]).double())[1]
    derivative = reference(inputs["logprobs"], tensors, form.rule())[3]
    each = derivative.sum(0) if isinstance(form, KTO) else derivative.flatten()
    spread = each.repeat_interleave(inputs["offsets"].diff()) * inputs["mask"]
    assert torch.allclose(spread, gradient, rtol=1e-10, atol=1e-13) and gradient.abs().max() > 1e-3


@each_backend
def test_scores_without_tokens(device, backend):
    """A reward head's scores, and sums or means of log-probs that somebody else made."""
    offsets = torch.arange(13)
    for name, form in FORMS.items():
        if name in ("dpo smoothed", "hinge", "cpo"):  # whose nll needs tokens
            form = form._replace(nll=0.0)
        inputs = rollouts([1] * 12, form, device=device, given=("indices",))
        tokens = run(inputs, form, gradients_of(inputs, form), backend)[0]
        assert torch.equal(inputs.pop("offsets").cpu(), offsets)
        got = run(inputs, form, gradients_of(inputs, form), backend)
        assert torch.equal(got[0], tokens), name
    for form in (CPO(), DPO(nll=0.1)):
        with pytest.raises(ValueError, match=r"nll of .* must be 0 for scores"):
            preference_loss(torch.zeros(4), form)


@each_fast_backend
def test_margins_of_every_size_keep_their_digits(device, backend):
    """log(1 + e^-m) from 1e-40 to 1e4, and the gradient that is left of a pair long settled."""
    m = torch.cat([torch.linspace(-90, 90, 721), torch.tensor([1e4, -1e4, 1e-8, 0.0])]).to(device)
    inputs = {"logprobs": torch.cat([m, 0 * m]).to(device)}
    losses, gradient, _, statistics = run(inputs, BradleyTerry(), torch.ones_like(m), backend)
    wide = m.cpu().double().numpy().astype(np.longdouble)
    truth = np.where(wide > -60, np.log1p(np.exp(-wide.clip(-60))), -wide)
    wrong = 1 / (1 + np.exp(wide))
    for got, expected in ((losses, truth), (-gradient[: len(m)], wrong)):
        expected = torch.from_numpy(expected.astype(np.float64))
        tiny = torch.finfo(torch.float32).tiny
        assert ((got.cpu().double() - expected).abs() <= eps(torch.float32) * expected + tiny).all()
    assert torch.equal(gradient[len(m) :], -gradient[: len(m)]) and statistics[2] == (m > 0).sum()


@each_fast_backend
@both_dtypes
def test_odds_of_certain_and_impossible_rollouts(dtype, device, backend):
    """log(1 - e^s) near 0 and far below it; no 0 times infinity where a probability is 1 or 0."""
    sizes = torch.cat([torch.logspace(-12, 3, 61, dtype=torch.float64), torch.tensor([math.log(2), 1.0])])
    s, q = (-sizes).to(dtype), torch.full((63,), -0.7, dtype=dtype)
    for chosen, rejected in ((s, q), (q, s), (s, s.flip(0))):
        inputs = {"logprobs": torch.cat([chosen, rejected]).to(device)}
        losses, gradient, *_ = run(inputs, ORPO(lam=0.5, nll=0.0), torch.ones_like(chosen).to(device), backend)
        c, r = (x.double().numpy().astype(np.longdouble) for x in (chosen, rejected))
        log_rest = [np.where(x > -0.5, np.log(-np.expm1(x)), np.log1p(-np.exp(x))) for x in (c, r)]
        apart = c - r - (log_rest[0] - log_rest[1])
        truth = 0.5 * (np.maximum(-apart, 0) + np.log1p(np.exp(-np.abs(apart))))
        wrong = 0.5 * np.exp(-np.logaddexp(0, apart))
        slopes = np.concatenate([-wrong / -np.expm1(c), wrong / -np.expm1(r)])
        for got, expected in ((losses, truth), (gradient, slopes)):
            expected = torch.from_numpy(expected.astype(np.float64))
            # At e^-1e3 the double of an odds ratio has lost as many digits as that has before its point.
            allowed = 4 * eps(dtype) * (1 + 1e3 * (dtype == torch.float64)) * expected.abs()
            assert ((got.cpu().double() - expected).abs() <= allowed + torch.finfo(dtype).tiny).all()

    def ends(c, r):
        x = {"logprobs": torch.tensor([c, r], dtype=dtype, device=device)}
        losses, gradient, *_ = run(x, ORPO(lam=1.0, nll=0.0), torch.ones(1, dtype=dtype, device=device), backend)
        return losses.item(), *gradient.tolist()

    loss, falling, rising = ends(0.0, math.log(0.2))
    assert loss == 0 and rising == 0 and falling == pytest.approx(-0.25)  # the odds of the rejected
    assert ends(1e-7, math.log(0.2)) == pytest.approx((0.0, -0.25, 0.0))
    assert ends(-1e4, -1e4) == pytest.approx((math.log(2), -0.5, 0.5))
    assert ends(-0.5, 0.0)[0] == math.inf and ends(-0.5, -math.inf) == (0, 0, 0)
    assert ends(-math.inf, -0.5)[:2] == pytest.approx((math.inf, -1 / (1 - math.exp(-0.5)) * (1 - math.exp(-0.5))))


@each_backend
def test_infinite_and_missing_log_probs(device, backend):
    def one(form, c, r, ref=0.0):
        x = {"logprobs": torch.tensor([c, r], device=device)}
        return [y.tolist() for y in run(x, form, torch.ones(1, device=device), backend)][:2]

    assert one(DPO(), -math.inf, -1.0) == [[math.inf], pytest.approx([-0.1, 0.1])]
    assert one(DPO(), -1.0, -math.inf) == [[0.0], pytest.approx([0.0, 0.0])]
    assert one(DPO(label_smoothing=0.1), -1.0, -math.inf)[0] == [math.inf]
    assert one(Hinge(), -math.inf, -1.0) == [[math.inf], pytest.approx([-0.1, 0.1])]
    assert one(DPO(beta=1.0), 1e4, -1e4)[0] == [0.0] and one(DPO(beta=1.0), -1e4, 1e4)[0] == [2e4]
    for form in (DPO(), SimPO(), ORPO(), IPO(), Hinge(), BradleyTerry(0.1)):
        losses, gradient = one(form, math.nan, -1.0)
        assert math.isnan(losses[0]) and math.isnan(gradient[0]), form


@each_backend
def test_nan_shows_in_its_pair_alone(device, backend):
    for form in FORMS.values():
        inputs = rollouts(LENGTHS, form, device=device, given=())
        inputs["logprobs"][4] = math.nan  # of the third rollout
        losses, gradient, rewards, statistics = run(inputs, form, gradients_of(inputs, form), backend)
        assert losses[2].isnan() and losses.isnan().sum() == 1 and rewards.isnan().sum() == 1
        assert gradient[4:21].isnan().all() and statistics[1].isnan() and statistics[[0, 3, 4]].isfinite().all()


@each_backend
def test_no_rollouts_and_no_pairs(device, backend):
    nothing, zero = torch.zeros(0, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    losses, gradient, rewards, statistics = run({"logprobs": nothing, "offsets": zero}, CPO(), nothing, backend)
    assert losses.shape == gradient.shape == rewards.shape == (0,) and not statistics.any()
    assert all(value == 0 for value in named(statistics).values())
    some = {**rollouts([3, 2], device=device, given=()), "chosen": zero[:0], "rejected": zero[:0]}
    losses, gradient, rewards, _ = run(some, DPO(), nothing, backend)
    assert losses.shape == (0,) and not gradient.any() and gradient.shape == (5,)
    empty = rollouts([0, 0, 0, 0], FORMS["dpo"], device=device, given=())
    losses, gradient, *_ = run(empty, DPO(), torch.ones(2, device=device), backend)
    assert losses.tolist() == pytest.approx([math.log(2)] * 2) and gradient.shape == (0,)


@settings(max_examples=6 if INTERPRETING else 40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=16).filter(lambda x: len(x) % 2 == 0),
    seed=st.integers(0, 99),
)
def test_identities(lengths, seed):
    torch.manual_seed(seed)
    backend = FAST[0][1]
    x = rollouts(lengths, given=())
    half, ones = len(lengths) // 2, torch.ones(len(lengths) // 2)
    same = {**x, "ref_logprobs": x["logprobs"]}
    assert torch.allclose(run(same, DPO(0.1), ones, backend)[0], ones * math.log(2))
    assert torch.allclose(run(same, IPO(0.5), ones, backend)[0], ones)
    losses, gradient, rewards, statistics = run(x, DPO(0.3), ones, backend)
    plain = {"logprobs": rewards}
    assert torch.allclose(run(plain, BradleyTerry(), ones, backend)[0], losses, rtol=1e-4, atol=1e-6)
    turned = {**x, "chosen": torch.arange(half) + half, "rejected": torch.arange(half)}
    other = run(turned, DPO(0.3), ones, backend)
    assert torch.allclose((other[0] - losses).double(), (rewards[:half] - rewards[half:]).double(), atol=1e-4)
    smoothed = run(x, DPO(0.3, 0.25), ones, backend)[0]
    assert torch.allclose(smoothed, 0.75 * losses + 0.25 * other[0], rtol=1e-5)
    robust = run(x, DPO(0.3, 0.25, robust=True), ones, backend)[0]
    assert torch.allclose(robust, 1.5 * losses - 0.5 * other[0], rtol=1e-4, atol=1e-5)
    kto = {**x, "desirable": torch.arange(len(lengths)) < half}
    each = run(kto, KTO(0.3), torch.ones(len(lengths)), backend)
    assert torch.allclose(each[0], torch.sigmoid(rewards * (1 - 2 * kto["desirable"].float())), rtol=1e-4)
    alone = [run({**x, "chosen": torch.tensor([p]), "rejected": torch.tensor([p + half])}, DPO(0.3), ones[:1], backend)
             for p in range(half)]  # fmt: skip
    assert torch.equal(torch.cat([a[0] for a in alone]), losses)
    assert torch.equal(sum(a[1] for a in alone), gradient)
    both = merged(torch.stack([a[3] for a in alone]))
    assert torch.allclose(both, statistics, rtol=1e-5, atol=1e-5)


@each_backend
def test_named_are_means(device, backend):
    inputs = rollouts(LENGTHS, CPO(), device=device, given=())
    _, rewards, statistics = preference_loss(**inputs, form=CPO(), backend=backend)
    won, lost = rewards.cpu().chunk(2)
    nll = -torch.stack([x.mean() for x in inputs["logprobs"].cpu().split(LENGTHS)])[:6].mean()
    expected = (won - lost).mean(), (won > lost).float().mean(), won.mean(), lost.mean(), nll
    names = "margin", "accuracy", "chosen_reward", "rejected_reward", "nll"
    for name, value in zip(names, expected, strict=True):
        assert named(statistics)[name].item() == pytest.approx(value.item(), rel=1e-5), name
    good = torch.tensor([True] * 9 + [False] * 3, device=device)
    inputs = rollouts(LENGTHS, KTO(), device=device, given=()) | {"desirable": good}
    _, rewards, statistics = preference_loss(**inputs, form=KTO(), backend=backend)
    seen = named(statistics)
    assert seen["chosen_reward"].item() == pytest.approx(rewards[good].mean().item(), rel=1e-5)
    assert seen["rejected_reward"].item() == pytest.approx(rewards[~good].mean().item(), rel=1e-5)


@each_fast_backend
def test_runs_and_threads_and_neighbours_change_nothing(device, backend):
    lengths = MANY if INTERPRETING else [*MANY, 40_000, 33_000] * 3
    inputs = rollouts(lengths, DPO(), device=device)
    g, form = gradients_of(inputs, DPO()), DPO(nll=0.2)
    whole = run(inputs, form, g, backend)
    for count in (*[torch.get_num_threads()] * 9, 1, 2, 3):
        with threads(count):
            assert all(torch.equal(a, b) for a, b in zip(run(inputs, form, g, backend), whole, strict=True))


@cpu_only
def test_every_instruction_set_is_right_and_gives_the_same_bits(isa):
    from fuserl import _C

    for what in (("margins", "indices", "mask"), ()):
        inputs = rollouts([*LENGTHS, 70_000, 5], given=what)
        compare(inputs, DPO(nll=0.2), "cpu")
        found = run(inputs, DPO(nll=0.2), torch.ones(7), "cpu")
        _C.set_isa("baseline")
        same = run(inputs, DPO(nll=0.2), torch.ones(7), "cpu")
        _C.set_isa(isa)
        assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True))


@cpu_only
@each_form
def test_gradcheck(name):
    form = FORMS[name]
    x = rollouts([3, 1, 4, 2], form, torch.float64, given=("indices", "mask"))

    def losses(logprobs):
        return preference_loss(**{**x, "logprobs": logprobs}, form=form, backend="cpu")[0]

    assert torch.autograd.gradcheck(losses, x["logprobs"].clone().requires_grad_())


@cpu_only
def test_only_numbers_of_pairs_are_saved_and_a_second_derivative_is_refused():
    x, saved = rollouts(LENGTHS, DPO(), given=()), []
    logprobs = x["logprobs"].clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        losses, *_ = preference_loss(**{**x, "logprobs": logprobs}, form=DPO(), backend="cpu")
    assert saved == [(2, 6), (13,)]
    (gradient,) = torch.autograd.grad(losses.square().sum(), logprobs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@cpu_only
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    def loss(logprobs, others, form):
        losses, _, statistics = preference_loss(logprobs * 2, form, **others)
        return losses.sum(), named(statistics)["margin"]

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for form in (DPO(0.2), KTO(), ORPO()):
        inputs = rollouts(LENGTHS, form, given=("indices", "mask"))
        logprobs = inputs.pop("logprobs").requires_grad_()
        (value, margin), (expected, wanted) = (f(logprobs, inputs, form) for f in (compiled, loss))
        gradients = [torch.autograd.grad(v, logprobs)[0] for v in (value, expected)]
        assert torch.equal(value, expected) and torch.equal(*gradients) and torch.equal(margin, wanted)


@cpu_only
@each_form
def test_opcheck(name):
    form = FORMS[name]
    x = rollouts([3, 1, 4, 2], form)
    tensors = [x.get(each) for each in Given._fields]
    if isinstance(form, KTO):
        tensors[-1] = tensors[-1].reshape(1)
    link, mean, *numbers = form.rule()
    arguments = *tensors, numbers, [link, int(mean)], "cpu"
    torch.library.opcheck(torch.ops.fuserl.preference_loss, (x["logprobs"].clone().requires_grad_(), *arguments))
    losses, *_, derivative = torch.ops.fuserl.preference_loss(x["logprobs"], *arguments)
    arguments = losses, derivative, *tensors[:4], not isinstance(form, KTO), x["logprobs"].shape, "cpu"
    torch.library.opcheck(torch.ops.fuserl.preference_gradient, arguments)


OFFSETS = torch.tensor([0, 1, 3])


@cpu_only
@pytest.mark.parametrize(
    "change,message",
    [
        ({"logprobs": torch.zeros(3).half()}, "logprobs must be .* float32 or float64"),
        ({"logprobs": torch.zeros(2, 2)}, r"offsets must be None for \(R, T\); got a tensor. A row begins"),
        ({"offsets": OFFSETS.int()}, r"offsets must be \(3,\) torch.int64"),
        ({"offsets": torch.tensor([0, 4, 3])}, "offsets must not decrease"),
        ({"offsets": torch.tensor([0, 2, 2])}, "offsets must begin with 0 and end with 3"),
        ({"offsets": torch.tensor([0, 1, 2, 3])}, "rollouts must be even without chosen and rejected; got 3"),
        ({"ref_logprobs": None}, "ref_logprobs must be given for DPO; got None"),
        ({"form": SimPO()}, "ref_logprobs must be None for SimPO; got a tensor"),
        ({"ref_logprobs": torch.zeros(3, requires_grad=True)}, "ref_logprobs must not require a gradient"),
        ({"margins": torch.zeros(2)}, r"margins must be \(1,\) torch.float32"),
        ({"chosen": torch.zeros(1, dtype=torch.int64)}, "rejected must be given for chosen; got None"),
        ({"chosen": torch.tensor([2]), "rejected": torch.tensor([0])}, "chosen must name rollouts, 0 to 1; got 2"),
        ({"chosen": torch.tensor([0]), "rejected": torch.tensor([-1])}, "rejected must name rollouts"),
        ({"desirable": torch.ones(2).bool()}, "desirable must be None for DPO"),
        ({"form": KTO()}, "desirable must be given for KTO"),
        ({"mask": torch.ones(2).bool()}, r"mask must be \(3,\) torch.bool"),
        ({"form": DPO(beta=0.0)}, "beta of DPO must be a finite number > 0; got 0.0"),
        ({"form": DPO(label_smoothing=0.6)}, r"label_smoothing of DPO must be in \[0, 0.5\]; got 0.6"),
        ({"form": DPO(label_smoothing=0.5, robust=True)}, r"label_smoothing of DPO must be in \[0, 0.5\)"),
        ({"form": IPO(math.inf)}, "beta of IPO must be"),
        ({"form": Hinge(nll=-1.0)}, "nll of Hinge must be"),
        ({"form": KTO(desirable=-1.0)}, "desirable of KTO must be"),
        ({"form": SimPO(gamma=math.nan)}, "gamma of SimPO must be a finite number"),
        ({"form": ORPO(lam=-1.0)}, "lam of ORPO must be"),
        ({"form": BradleyTerry(-1.0)}, "centre of BradleyTerry must be"),
        ({"backend": "cudnn"}, "backend must be one of"),
    ],
)
def test_bad_input_gets_one_sentence(change, message):
    arguments = {"logprobs": torch.zeros(3), "form": DPO(), "offsets": OFFSETS, "ref_logprobs": torch.zeros(3)}
    with pytest.raises(ValueError, match=f"^preference_loss: .*{message}"):
        fuserl.preference_loss(**{**arguments, **change})


@pytest.mark.gpu
def test_waits_for_nothing():
    given = [(form, rollouts(LENGTHS, form, device="cuda")) for form in FORMS.values()]
    ones = torch.ones(12, device="cuda")
    for _ in range(2):  # the first time it compiles
        for form, inputs in given:
            statistics = run(inputs, form, ones[: 12 if isinstance(form, KTO) else 6], "triton")[3]
            named(merged(statistics[None]))
        torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@cpu_only
def test_triton_in_the_interpreter():
    run_interpreted(__file__)
