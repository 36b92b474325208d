"""sample against the float64 definition, Philox's own vectors and statistics; every backend draws the same token."""

import math

import pytest
import torch
from backends import INTERPRETING, cpu_only, each_backend, run_interpreted, threads
from drawn_tokens import CUTS, DTYPES, allowed, grid, names, peaky, uniforms
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import check

from fuserl.kernels import sample as module
from fuserl.kernels.sample import IMPLS, LAUNCH, sample

ROWS = 2 if INTERPRETING else 8
SOME_CUTS = CUTS[::4] if INTERPRETING else CUTS  # a program takes a second in the interpreter
VOCABULARIES = [1, 33, LAUNCH["BLOCK"] + 1] if INTERPRETING else [1, 2, 17, 64, 1000, 1024, 1025, 4097, 20_000]


@each_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_equals_the_definition(vocabulary, dtype, device, backend):
    rows = 2 if INTERPRETING else 40
    logits = peaky(rows, vocabulary, dtype)
    logits[0, 1:] = -torch.inf
    u = uniforms(rows)
    for cuts in SOME_CUTS:
        ids, logprob, full_logprob = (
            x.cpu() for x in sample(logits.to(device), **cuts, **names(rows, device), backend=backend)
        )
        assert ids.dtype == torch.int64 and logprob.dtype == full_logprob.dtype == torch.float32
        cut, full = allowed(logits, **cuts)
        mass = cut.exp().cumsum(-1)
        after, before = (mass.gather(-1, at.clamp_min(0)[:, None])[:, 0] for at in (ids, ids - 1))
        before = torch.where(ids == 0, 0.0, before)
        if cuts.get("temperature") != 0:
            # Not nearer to a border than the rounding of the weights moves it.
            assert ((before <= u + 1e-6) & (u - 1e-6 <= after)).all(), cuts
        at = ids[:, None]
        assert cut.gather(-1, at).isfinite().all(), cuts
        expected = (full if cuts.get("temperature") == 0 else cut).gather(-1, at)[:, 0]
        plain = (logits.float() / (cuts.get("temperature") or 1.0)).log_softmax(-1).gather(-1, at)[:, 0]
        check("full_logprob", full_logprob, full.gather(-1, at)[:, 0], plain, torch.float32)
        error = (plain - full.gather(-1, at)[:, 0]).abs().max()
        check("logprob", logprob, expected, expected + error, torch.float32)


@cpu_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_backends_and_instruction_sets_draw_the_same(dtype, isa):
    logits = peaky(60, 30_001, dtype)
    logits[5] = logits[5].round()  # ties
    logits[6] = 0.0
    logits[7] *= 3000
    logits[8, 100:] = -torch.inf
    temperature = torch.linspace(0, 2, 60)
    temperature[10], temperature[11] = 1e-30, 1e30
    for cuts in (*CUTS, {"temperature": temperature}, {"temperature": temperature, "top_k": 9, "top_p": 0.5}):
        expected = sample(logits, **cuts, **names(60), backend="reference")
        got = sample(logits, **cuts, **names(60), backend="cpu")
        assert torch.equal(got[0], expected[0]), cuts
        assert torch.allclose(torch.stack(got[1:]), torch.stack(expected[1:]), rtol=1e-6, atol=1e-6)


def differing_weights(backend):
    """How many of the weights of some logits are not those of the definition, to the last bit.

    Beside a token of weight a, one of weight b is cut just below top_p = a / (a + b) and stays just above it.
    """
    count, bits = 12 if INTERPRETING else 300, module.weight_bits(2)
    least = -7 if INTERPRETING else -23  # where b is a few units; the float32 logarithm of Triton does not see it
    logits = torch.stack([torch.zeros(count), least * torch.rand(count)], 1)
    weights = module._weights(logits, torch.tensor(module._LOG2E) / torch.tensor(0.7), bits).double()
    differing = 0
    for row, (a, b) in zip(logits[:, None], weights.tolist(), strict=True):
        share, step = a / (a + b), max(2e-8 * b / (a + b), 2.0**-52)  # a third of what the last bit of b makes
        below, above = (
            sample(row, temperature=0.7, top_p=share * (1 + s), **names(1), backend=backend)[1] for s in (-step, step)
        )
        differing += not (below == 0 and above < 0)
    return differing


@cpu_only
def test_weights_are_the_same_to_the_last_bit(isa):
    assert differing_weights("cpu") == 0


@pytest.mark.skipif(not INTERPRETING, reason="asks Triton, in the interpreter")
def test_weights_of_triton_are_the_same_to_the_last_bit():
    assert differing_weights("triton") == 0


@pytest.mark.skipif(not INTERPRETING, reason="compares with Triton, in the interpreter")
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_triton_draws_the_same(vocabulary):
    logits = peaky(4, vocabulary)
    logits[1] = logits[1].round()
    logits[2] *= 3000
    temperature = torch.tensor([1.0, 0.0, 0.5, 1e30])
    for cuts in (*CUTS[::4], {"temperature": temperature, "top_k": 9, "top_p": 0.5}):
        got, expected = (sample(logits, **cuts, **names(4), backend=each) for each in ("triton", "reference"))
        assert torch.equal(got[0], expected[0]), cuts
        assert torch.allclose(torch.stack(got[1:]), torch.stack(expected[1:]), rtol=1e-6, atol=1e-6)


@pytest.fixture
def uniform(monkeypatch):
    """A function that gives the random bits of every row of the reference."""

    def fix(bits):
        monkeypatch.setattr("fuserl.kernels.sample.random_bits", lambda *_: torch.as_tensor(bits))

    return fix


@cpu_only
def test_every_token_is_drawn_as_often_as_it_is_likely(uniform):
    """An even grid of random bits gives each token its share to within one draw: exact, no statistics."""
    count, logits = 20_000, peaky(1, 40)
    uniform(grid(count))
    for cuts in CUTS:
        ids = sample(logits.expand(count, -1), **cuts, **names(count), backend="reference")[0]
        p = allowed(logits, **cuts)[0].exp()[0]
        assert (torch.bincount(ids, minlength=40) - count * p).abs().max() <= 1.1, cuts


@cpu_only
def test_the_ends_of_the_unit_interval_draw_tokens_that_can_be_drawn(uniform):
    logits = peaky(200, 5000)
    logits[:, :3] = logits[:, -3:] = -torch.inf
    for bits, rank in ((0, 0), (-1, -1)):
        uniform(torch.full((200,), bits))
        for cuts in ({}, {"top_k": 11}, {"top_p": 0.9}, {"min_p": 0.1}):
            ids, logprob, _ = sample(logits, **cuts, **names(200), backend="reference")
            possible = allowed(logits, **cuts)[0]
            if cuts:
                assert ids.tolist() == [row.isfinite().nonzero()[rank].item() for row in possible]
            assert possible.gather(-1, ids[:, None]).isfinite().all() and logprob.isfinite().all()


@cpu_only
@pytest.mark.parametrize("cuts", [{}, {"temperature": 1.2, "top_k": 30, "top_p": 0.9, "min_p": 0.02}])
def test_a_million_draws(cuts):
    """Chi-squared at a fixed seed, within five standard deviations; and no draw leans on the one before."""
    count, logits = 1_000_000, torch.randn(1, 64)
    given = {"seed": 11, "rollout_ids": torch.arange(count) // 1000, "positions": torch.arange(count) % 1000}
    ids = sample(logits.expand(count, -1), **cuts, **given)[0]
    expected = count * allowed(logits, **cuts)[0].exp()[0]
    drawn = torch.bincount(ids, minlength=64).double()
    assert (drawn[expected == 0] == 0).all()
    drawn, expected = drawn[expected > 0], expected[expected > 0]
    assert len(expected) > 15 and expected.amin() > 100
    statistic, freedom = ((drawn - expected).square() / expected).sum(), len(expected) - 1
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)
    lag = torch.stack([ids[:-1], ids[1:]]).double()
    assert torch.corrcoef(lag)[0, 1].abs() < 5 / math.sqrt(count)


@each_backend
def test_a_row_does_not_depend_on_the_others_on_threads_or_on_the_run(device, backend):
    rows, vocabulary = (5, 300) if INTERPRETING else (300, 5000)
    logits, given = peaky(rows, vocabulary).to(device), names(rows, device)
    cuts = {"temperature": 0.8, "top_k": 500, "top_p": 0.9}
    for each in ({}, cuts):
        together = sample(logits, **each, **given, backend=backend)
        for count in (1, 2) if INTERPRETING else (1, 2, 3):
            with threads(count):
                for _ in range(1 if INTERPRETING else 4):
                    again = sample(logits, **each, **given, backend=backend)
                    assert all(torch.equal(a, b) for a, b in zip(again, together, strict=True))
        for size in (1, 3) if INTERPRETING else (1, 2, 8, 15, 16, 17):
            part = {**given, **{name: given[name][-size:] for name in ("rollout_ids", "positions")}}
            some = sample(logits[-size:], **each, **part, backend=backend)
            assert all(torch.equal(a, b[-size:]) for a, b in zip(some, together, strict=True))


@cpu_only
def test_each_name_makes_its_own_draw():
    logits, ids = torch.zeros(1, 50_000).expand(400, -1), torch.arange(400)
    draws = [
        sample(logits, seed=seed, rollout_ids=rollouts, positions=positions)[0]
        for seed in (0, 1, 2**32, 2**63, -1)
        for rollouts, positions in ((ids, 0 * ids), (0 * ids, ids + 1), (ids << 32, 0 * ids + 7), (0 * ids, ids << 32))
    ]
    together = torch.cat(draws)
    assert len(together.unique()) > len(together) * 0.85  # 8000 draws of 50000: a birthday is not a pattern
    assert sample(logits, seed=2**64 + 1, rollout_ids=ids, positions=0 * ids)[0].equal(draws[4])
    assert sample(logits, seed=2**64 - 1, rollout_ids=ids, positions=0 * ids)[0].equal(draws[16])


@each_backend
def test_ties_stay_together(device, backend):
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 0.0, 2.0, -torch.inf, 0.0, -0.0]], device=device).repeat(ROWS, 1)
    given = names(ROWS, device)
    for cuts, kept in (
        ({"top_k": 1}, 2), ({"top_k": 2}, 2), ({"top_k": 3}, 5), ({"top_k": 5}, 5), ({"top_k": 6}, 6),
        ({"top_k": 7}, 9), ({"top_k": 10}, 9), ({"top_k": 99}, 9), ({"top_p": 1e-9}, 2), ({"top_p": 0.6}, 5),
        ({"min_p": 1.0}, 2), ({"min_p": 0.36}, 5), ({"top_k": 3, "top_p": 0.5}, 2), ({"top_k": 1, "min_p": 0.3}, 2),
    ):  # fmt: skip
        ids, logprob, full = sample(logits, **cuts, **given, backend=backend)
        likely = logits[0].sort(descending=True).values[:kept]
        expected = logits[0, ids] - likely.logsumexp(0)
        assert torch.allclose(logprob, expected, atol=1e-6), cuts
        assert torch.allclose(full, logits[0].log_softmax(0)[ids], atol=1e-6)
    ids = sample(logits, temperature=0, **given, backend=backend)[0]
    assert (ids == 1).all(), "the first of the largest"


@each_backend
def test_greedy_ignores_the_cuts_and_mixes_with_draws(device, backend):
    rows = 6 if INTERPRETING else 64
    logits, given = peaky(rows, 700).to(device), names(rows, device)
    greedy = sample(logits, temperature=0.0, top_k=3, top_p=0.1, min_p=0.5, **given, backend=backend)
    truth = logits.log_softmax(-1)
    assert torch.equal(greedy[0], logits.argmax(-1)) and torch.equal(greedy[1], greedy[2])
    assert torch.allclose(greedy[1], truth.amax(-1), atol=1e-6)
    warm = sample(logits, temperature=0.7, top_k=30, **given, backend=backend)
    temperature = torch.where(torch.arange(rows, device=device) % 2 == 0, 0.0, 0.7)
    mixed = sample(logits, temperature=temperature, top_k=30, **given, backend=backend)
    for got, even, odd in zip(mixed, greedy, warm, strict=True):
        assert torch.equal(got[::2], even[::2]) and torch.equal(got[1::2], odd[1::2])


@each_backend
def test_edges(device, backend):
    def draw(logits, **cuts):
        logits = torch.as_tensor(logits, device=device)
        return [x.cpu() for x in sample(logits, **cuts, **names(len(logits), device), backend=backend)]

    for cuts in SOME_CUTS:
        ids, logprob, full = draw(torch.full((3, 1), -120.0), **cuts)
        assert ids.tolist() == [0] * 3 and logprob.tolist() == full.tolist() == [0.0] * 3
        one_hot = torch.full((2, 50), -torch.inf)
        one_hot[:, 49] = 1e4
        ids, logprob, _ = draw(one_hot, **cuts)
        assert ids.tolist() == [49] * 2 and logprob.tolist() == [0.0] * 2
        for shift in (1e4, -1e4):
            row = torch.tensor([[0.0, 2.0, 1.0, -3.0]] * (1 if INTERPRETING else 5))
            got, expected = draw(row + shift, **cuts), draw(row, **cuts)
            assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    largest = torch.finfo(torch.float32).max
    for cuts in ({}, {"top_k": 2}, {"top_p": 0.5}):
        ids, logprob, _ = draw([[largest, -largest, -largest]] * 3, **cuts)
        assert ids.tolist() == [0] * 3 and logprob.tolist() == [0.0] * 3
        ids, logprob, _ = draw([[0.0] * 700] * 3, **cuts)  # everything is a tie
        assert torch.allclose(logprob, torch.tensor(-math.log(700.0)))
    empty = sample(torch.zeros(0, 5, device=device), **names(0, device), backend=backend)
    assert [len(x) for x in empty] == [0, 0, 0]


@each_backend
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_say_nothing(wrong, device, backend):
    rows, vocabulary = 4, LAUNCH["BLOCK"] + 40
    logits, given = peaky(rows, vocabulary).to(device), names(rows, device)
    if wrong == -torch.inf:
        logits[2] = wrong
    else:
        logits[2, -3] = wrong
    for cuts in ({}, {"temperature": 0}, {"top_k": 4, "top_p": 0.4}):
        if device == "cpu":
            with pytest.raises(ValueError, match=r"^sample: logits must have a finite maximum and no NaN.* row 2 has"):
                sample(logits, **cuts, **given, backend=backend)
        else:
            ids, *logprobs = sample(logits, **cuts, **given, backend=backend)
            assert (ids == -1).tolist() == [False, False, True, False]
            assert all(x.isnan().equal(ids == -1) for x in logprobs)


@each_backend
def test_strides(device, backend):
    whole = peaky(6, 12 if INTERPRETING else 90).to(device)
    views = {
        "every other row": whole[::2], "columns": whole[:, 7:60], "transposed": whole.t(), "steps": whole[:, ::3],
        "one row for all": whole[:1].expand(5, -1),
    }  # fmt: skip
    for name, view in views.items():
        given = names(len(view), device)
        got, expected = (sample(x, top_p=0.9, **given, backend=backend) for x in (view, view.contiguous()))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), name
    given = {**names(12, device), "rollout_ids": torch.arange(24, device=device)[::2]}
    got = sample(whole.repeat(2, 1), **given, backend=backend)
    given["rollout_ids"] = given["rollout_ids"].contiguous()
    assert torch.equal(got[0], sample(whole.repeat(2, 1), **given, backend=backend)[0])


@cpu_only
@settings(max_examples=60)
@given(
    rows=st.integers(1, 9), vocabulary=st.integers(1, 3000), spread=st.sampled_from([0.0, 0.1, 3.0, 100.0]),
    top_k=st.integers(0, 3000), top_p=st.floats(1e-3, 1.0), min_p=st.sampled_from([0.0, 0.01, 0.9]),
    temperature=st.sampled_from([0.0, 0.1, 1.0, 5.0]), seed=st.integers(-(2**63), 2**64),
)  # fmt: skip
def test_identities(rows, vocabulary, spread, top_k, top_p, min_p, temperature, seed):
    torch.manual_seed(abs(seed) % 1000)
    logits, cuts = spread * torch.randn(rows, vocabulary), {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    given = {**names(rows), "seed": seed, "temperature": temperature}
    fast, slow = (sample(logits, **cuts, **given, backend=backend) for backend in ("cpu", "reference"))
    assert torch.equal(fast[0], slow[0])
    _, logprob, full = fast
    assert (logprob >= full).all() and (logprob <= 1e-6).all()
    assert torch.equal(sample(logits, **given)[0], sample(logits, top_k=vocabulary, **given)[0])


@pytest.mark.gpu
def test_waits_for_nothing():
    logits, given = peaky(64, 50_000).cuda().bfloat16(), names(64, "cuda")
    temperature = torch.ones(64, device="cuda")
    for cuts in ({}, {"top_k": 50, "top_p": 0.9}):
        sample(logits, temperature=temperature, **cuts, **given)
        torch.cuda.set_sync_debug_mode("error")
        try:
            sample(logits, temperature=temperature, **cuts, **given)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_thirty_one():
    stride = 2**31 + 64
    far = torch.empty(stride + 1000, dtype=torch.bfloat16, device="cuda").as_strided((2, 1000), (stride, 1))
    near = peaky(2, 1000, torch.bfloat16).cuda()
    far.copy_(near)
    got, expected = (sample(logits, top_p=0.9, **names(2, "cuda")) for logits in (far, near))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_draws_what_a_cpu_draws(dtype):
    logits = peaky(60, 100_001, dtype)
    for cuts in CUTS:
        got = sample(logits.cuda(), **cuts, **names(60, "cuda"))
        expected = sample(logits, **cuts, **names(60))
        assert torch.equal(got[0].cpu(), expected[0]), cuts


def test_every_backend_is_tried():
    assert set(IMPLS) == {"triton", "cpu", "reference"}


@cpu_only
def test_triton_in_the_interpreter():
    run_interpreted(__file__)
