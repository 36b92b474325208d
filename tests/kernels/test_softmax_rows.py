"""The two row kernels against float64: every statistic, the gradient of every statistic, every backend."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from backends import INTERPRETING, each_backend, run_interpreted
from tolerance import check, check_rows

from fuserl.kernels import softmax_rows
from fuserl.kernels.softmax_rows import accumulator, reference, reference_gradient

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMES = ("logprob", "entropy", "lse", "lse_error", "mean_logit", "sum_sq_prob", "is_top1", "mean_logprob")
SEGMENT = softmax_rows.STATISTICS_LAUNCH["SEGMENT"]
TILE = softmax_rows.STATISTICS_LAUNCH["DEPTH"] * softmax_rows.STATISTICS_LAUNCH["LANES"]


def peaky(*shape, dtype=torch.float32, device="cpu"):
    """Logits with large probabilities: uniform ones make every check vacuous."""
    return (torch.randn(*shape) * 4).to(device, dtype)


def some_ids(logits):
    """An id per row; every other one is the most likely, where is_top1 holds and nothing else has the same logit."""
    ids = torch.randint(logits.shape[-1], (logits.shape[0] * logits.shape[1],), device=logits.device)
    ids[::2] = logits.reshape(-1, logits.shape[-1]).argmax(-1)[::2]
    return ids


def exactly(tensor):
    """The tensor's values in NumPy's long double: for float64, float64 is no truth."""
    return tensor.double().cpu().numpy().astype(np.longdouble)


@np.errstate(invalid="ignore")
def true_statistics(logits, ids, temperature):
    """The definition in long double, rows in the order of NAMES."""
    z = exactly(logits).reshape(len(ids), -1) / exactly(torch.as_tensor(temperature)).reshape(-1, 1)
    top = z.max(1, keepdims=True)
    lse = top + np.log(np.exp(z - top).sum(1, keepdims=True))
    chosen = np.take_along_axis(z, ids.cpu().numpy()[:, None], 1)
    p = np.exp(z - lse)
    entropy = -np.where(p > 0, p * (z - lse), 0).sum(1)
    rows = [(chosen - lse)[:, 0], entropy, lse[:, 0], 0 * entropy, z.mean(1), (p * p).sum(1), (chosen == top)[:, 0]]
    rows.append((z - lse).mean(1))
    return torch.from_numpy(np.stack(rows).astype(np.float64)).to(logits.device)


@np.errstate(invalid="ignore")
def true_gradient(logits, ids, lse, coefficients, temperature):
    """The formula in long double, for the lse and the coefficients given."""
    temperature = exactly(torch.as_tensor(temperature)).reshape(-1, 1)
    logp = exactly(logits).reshape(len(ids), -1) / temperature - exactly(lse)[:, None]
    p = np.exp(logp)
    a, b, c, d, e = exactly(coefficients)[:, :, None]
    gradient = a + p * (b + d * p) + c * np.where(p > 0, p * logp, 0)
    gradient += e * (np.arange(logits.shape[-1]) == ids.cpu().numpy()[:, None])
    return torch.from_numpy((gradient / temperature).astype(np.float64)).to(logits.device).view(logits.shape)


def allowed(plain, truth, logits):
    """Plain torch; for float64, which has no wider accumulator, no better than summing V terms one after another."""
    if logits.dtype != torch.float64:
        return plain
    return truth + (plain - truth).abs() + logits.shape[-1] * torch.finfo(torch.float64).eps / 2 * truth.abs()


def split(temperature):
    """(temperature, row_temperature) as the kernels take them."""
    return (1.0, temperature) if isinstance(temperature, torch.Tensor) else (temperature, None)


def compare_statistics(logits, ids, backend, temperature=1.0):
    truth = true_statistics(logits, ids, temperature)
    plain = allowed(reference(logits, ids, temperature), truth, logits)
    dtype = accumulator(logits.dtype)
    for rows, chosen in softmax_rows._CHOSEN_ROWS.items():
        got = softmax_rows.forward(logits, ids, *split(temperature), rows, backend)
        assert got.shape == (rows, len(ids)) and got.dtype == dtype and got.is_contiguous()
        for i, row in zip(chosen, got, strict=True):
            if NAMES[i] != "lse_error":
                check(NAMES[i], row, truth[i], plain[i], dtype)
    return got


def compare_gradient(logits, ids, backend, temperature=1.0, out=None):
    """Any coefficients; the first of several rows is dead, and its lse unreadable."""
    dtype = accumulator(logits.dtype)
    lse = true_statistics(logits, ids, temperature)[2].to(dtype)
    coefficients = torch.randn(5, len(ids)).to(logits.device, dtype)
    out = torch.full(logits.shape, torch.nan, dtype=logits.dtype, device=logits.device) if out is None else out
    if len(ids) > 1:
        coefficients[:, 0] = 0.0
    truth = true_gradient(logits, ids, lse, coefficients, temperature)
    plain = allowed(reference_gradient(logits, ids, lse, coefficients, temperature).to(out.dtype), truth, logits)
    if len(ids) > 1:
        lse[0] = torch.nan
    softmax_rows.gradient(logits, ids, lse, coefficients, *split(temperature), out, backend)
    check_rows("gradient", out, truth, plain, out.dtype, dtype, ids=ids)
    assert len(ids) == 1 or (out[0, 0] == 0).all()


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 17), (2, 2, TILE + 1), (3, 1, 1000), (1, 2, 257)], ids=str)
def test_equals_float64(shape, dtype, device, backend):
    logits = peaky(*shape, dtype=dtype, device=device)
    ids = some_ids(logits)
    compare_statistics(logits, ids, backend)
    compare_gradient(logits, ids, backend)


@each_backend
def test_rows_of_several_segments(device, backend):
    for columns in (SEGMENT, SEGMENT + 1, 2 * SEGMENT + TILE - 1):
        logits = peaky(1, 2, columns, device=device)
        ids = torch.tensor([columns - 1, SEGMENT - 1], device=device)
        compare_statistics(logits, ids, backend)
        compare_gradient(logits, ids, backend)


@each_backend
def test_strides(device, backend):
    logits = peaky(3, 5, 300, device=device)[:, 1:, 7:260]
    ids = some_ids(logits)
    compare_statistics(logits, ids, backend)
    out = torch.full((6, 4, 300), torch.nan, device=device)
    compare_gradient(logits, ids, backend, out=out[::2, :, 20:273])
    out[::2, :, 20:273] = torch.nan
    assert out.isnan().all(), "written outside the view"


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_temperature(dtype, device, backend):
    logits = peaky(2, 3, 500, dtype=dtype, device=device)
    ids = some_ids(logits)
    for temperature in (0.7, 3.0, (torch.rand(6) + 0.5).to(device, dtype)):
        compare_statistics(logits, ids, backend, temperature)
        compare_gradient(logits, ids, backend, temperature)


@each_backend
@pytest.mark.parametrize("case", ["-inf tile", "-inf segment", "1e4", "-120", "one left", "two tops", "last id"])
def test_edges(case, device, backend):
    logits = peaky(1, 3, SEGMENT + 40 if case == "-inf segment" else TILE + 60, device=device)
    ids = some_ids(logits)
    if case.startswith("-inf"):
        logits[..., : SEGMENT + 3 if case == "-inf segment" else TILE + 3] = -torch.inf
        ids = ids % 30 + logits.shape[-1] - 30
    elif case == "1e4":
        logits += torch.where(logits > 4, 1e4, -1e4)
    elif case == "-120":
        logits -= 120
    elif case == "one left":
        logits.fill_(-torch.inf)[0].scatter_(1, ids[:, None], 2.0)
    elif case == "two tops":
        logits[..., 3] = logits[..., TILE + 5] = 30.0
        ids[1:] = torch.tensor([3, TILE + 5])
    else:
        ids[:] = logits.shape[-1] - 1
    compare_statistics(logits, ids, backend)
    compare_gradient(logits, ids, backend)


@each_backend
@pytest.mark.parametrize("case", ["all large", "one spike"])
def test_the_mean_log_prob_keeps_its_digits_at_large_logits(case, device, backend):
    """All near 1e4, mean_logit less lse has three decimals; one there, that is what mean_logit from it would have."""
    logits = peaky(1, 3, SEGMENT + TILE + 60, device=device)
    if case == "all large":
        logits += 1e4
    else:
        logits[..., SEGMENT + 7] = 1e4
    ids = some_ids(logits)
    found, truth = compare_statistics(logits, ids, backend), true_statistics(logits, ids, 1.0)
    assert ((found[7] - truth[7]).abs() <= 1e-6 * truth[7].abs()).all()
    assert ((found[4] - truth[4]).abs() <= 1e-6 * logits.abs().mean()).all()


@each_backend
def test_an_unlikely_id_of_weight_zero(device, backend):
    logits = peaky(1, 2, 100, device=device)
    logits[..., 7] = -torch.inf
    statistics = compare_statistics(logits, torch.full((2,), 7, device=device), backend)
    assert (statistics[0] == -torch.inf).all() and (statistics[4] == -torch.inf).all()


@each_backend
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_undefined_rows_are_nan_and_stay_alone(device, backend):
    logits = peaky(1, 8, 500, device=device)
    ids = some_ids(logits)
    clean = softmax_rows.forward(logits, ids, 1.0, None, 8, backend)
    logits[0, 1, 3], logits[0, 4, 499], logits[0, 6] = torch.nan, torch.inf, -torch.inf
    spoilt = softmax_rows.forward(logits, ids, 1.0, None, 8, backend)
    assert spoilt[:, [1, 4]].isnan().all()
    assert spoilt[[0, 1], 6].isnan().all()
    rest = [0, 2, 3, 5, 7]
    assert torch.equal(spoilt[:, rest], clean[:, rest])
    out = torch.zeros_like(logits)
    softmax_rows.gradient(logits, ids, spoilt[2], torch.ones(5, 8, device=device), 1.0, None, out, backend)
    assert out[0, [1, 4, 6]].isnan().all() and out[0, rest].isfinite().all()


@each_backend
@pytest.mark.parametrize("bad", [-1, 50, 2**32 + 3])
def test_an_id_out_of_range(bad, device, backend):
    logits, ids = peaky(1, 3, 50, device=device), torch.tensor([2, bad, 49], device=device)
    if backend == "cpu":
        with pytest.raises(ValueError, match="1"):
            softmax_rows.forward(logits, ids, 1.0, None, 3, backend)
        return
    statistics = softmax_rows.forward(logits, ids, 1.0, None, 8, backend)
    assert statistics[:, 1].isnan().all() and statistics[:, [0, 2]].isfinite().all()


@each_backend
def test_lse_error_makes_the_gradient_exact_at_large_logits(device, backend):
    logits = peaky(1, 3, 400, device=device) + 12345.6
    ids, ones = some_ids(logits), torch.ones(3, device=device)
    exact = logits.double()
    statistics = softmax_rows.forward(logits, ids, 1.0, None, 4, backend)
    lse = exact.logsumexp(-1)[0]
    assert (statistics[2].double() + statistics[3].double() - lse).abs().max() < 1e-5
    assert (statistics[2].double() - lse).abs().max() > 1e-5, "then the test shows nothing"
    coefficients = torch.stack([ones, -400 * ones, 0 * ones, 0 * ones, 0 * ones])
    out = torch.full_like(logits, torch.nan)
    softmax_rows.gradient(logits, ids, statistics[2:4].contiguous(), coefficients, 1.0, None, out, backend)
    plain = 1 - 400 * logits.log_softmax(-1).exp()
    check_rows("gradient", out, 1 - 400 * exact.softmax(-1), plain, torch.float32)


@each_backend
def test_a_single_coefficient_keeps_a_row_alive(device, backend):
    logits, coefficients = peaky(1, 5, 40, device=device), torch.eye(5, device=device)
    ids, lse = some_ids(logits), logits.double().logsumexp(-1)[0].float()
    out = torch.full_like(logits, torch.nan)
    softmax_rows.gradient(logits, ids, lse, coefficients, 1.0, None, out, backend)
    truth = true_gradient(logits, ids, lse, coefficients, 1.0)
    check_rows("gradient", out, truth, reference_gradient(logits, ids, lse, coefficients), torch.float32)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [17, TILE + 9])
def test_gradient_through_tanh(columns, dtype, device, backend):
    """Of u where the logits are tanh(u), saturated ones and barred tokens among them; a dead row stays 0."""
    logits = torch.tanh(torch.randn(1, 3, columns)).to(device, dtype)
    logits[0, 0, 0], logits[0, 2, 3], logits[0, 1, 1:9], logits[0, 1, -1] = torch.nan, 1.0, -torch.inf, -torch.inf
    ids, lse = some_ids(logits), (logits.double() / 0.1).logsumexp(-1)[0].to(accumulator(dtype))
    coefficients, out = torch.randn(5, 3).to(device, accumulator(dtype)), torch.full_like(logits, torch.nan)
    coefficients[:, 0] = 0.0
    softmax_rows.gradient(logits, ids, lse, coefficients, 0.1, None, out, backend, through_tanh=True)
    assert (out[0, 0] == 0).all() and out[0, 2, 3] == 0
    assert (out[0, 1, 1:9] == 0).all() and out[0, 1, -1] == 0
    logits[0, 1, 1:9] = logits[0, 1, -1] = -1.0  # where 1 - x^2 makes the formula 0 as well
    live, out, x = (ids[1:], lse[1:], coefficients[:, 1:], 0.1), out[:, 1:], logits[:, 1:]
    truth = true_gradient(x, *live) * (1 - x.double().square())
    check_rows("gradient", out, truth, reference_gradient(x, *live, True), dtype, accumulator(dtype), ids=ids[1:])


@each_backend
def test_in_place(device, backend):
    logits = peaky(2, 2, TILE + 9, device=device)
    ids, coefficients = some_ids(logits), torch.randn(5, 4, device=device)
    lse = logits.logsumexp(-1).flatten()
    expected = torch.empty_like(logits)
    softmax_rows.gradient(logits, ids, lse, coefficients, 0.9, None, expected, backend)
    softmax_rows.gradient(logits, ids, lse, coefficients, 0.9, None, logits, backend)
    assert torch.equal(logits, expected)


@each_backend
def test_bfloat16_gradient_of_float32_logits(device, backend):
    if backend == "cpu":
        pytest.skip("the C++ kernel writes the dtype of the logits")
    logits = peaky(1, 2, 300, device=device)
    out = torch.full(logits.shape, torch.nan, dtype=torch.bfloat16, device=device)
    compare_gradient(logits, some_ids(logits), backend, out=out)


@each_backend
def test_a_row_does_not_depend_on_its_neighbours(device, backend):
    logits = peaky(1, 19, 3000, device=device)
    ids = some_ids(logits)
    whole = softmax_rows.forward(logits, ids, 1.0, None, 8, backend)
    for rows in (slice(0, 1), slice(4, 6), slice(7, 19)):
        part = softmax_rows.forward(logits[:, rows], ids[rows], 1.0, None, 8, backend)
        assert backend == "reference" or torch.equal(part, whole[:, rows])
    assert torch.equal(softmax_rows.forward(logits, ids, 1.0, None, 8, backend), whole)


@each_backend
def test_no_rows(device, backend):
    logits, ids = torch.empty(2, 0, 9, device=device), torch.empty(0, dtype=torch.int64, device=device)
    assert softmax_rows.forward(logits, ids, 1.0, None, 7, backend).shape == (7, 0)
    softmax_rows.gradient(logits, ids, torch.empty(0), torch.empty(5, 0), 1.0, None, logits, backend)


@pytest.mark.skipif(INTERPRETING, reason="says nothing of Triton")
def test_the_table_of_gradients_is_what_autograd_finds():
    logits = peaky(2, 3, 40, dtype=torch.float64).requires_grad_()
    ids = some_ids(logits)
    _, entropy, lse, _, _, squares, *_ = reference(logits, ids, 0.8).detach()
    zero, one = torch.zeros(6).double(), torch.ones(6).double()
    table = {
        0: (zero, -one, zero, zero, one),
        1: (zero, -entropy, -one, zero, zero),
        2: (zero, one, zero, zero, zero),
        4: (one / 40, zero, zero, zero, zero),
        5: (zero, -2 * squares, zero, 2 * one, zero),
        7: (one / 40, -one, zero, zero, zero),
    }
    for row, coefficients in table.items():
        (expected,) = torch.autograd.grad(reference(logits, ids, 0.8)[row].sum(), logits)
        got = reference_gradient(logits.detach(), ids, lse, torch.stack(coefficients), 0.8)
        assert torch.allclose(got, expected, rtol=1e-10, atol=1e-14), NAMES[row]
    log_softmax = (logits / 0.8).log_softmax(-1)
    assert torch.allclose(reference(logits, ids, 0.8)[0], log_softmax.gather(-1, ids.view(2, 3, 1)).flatten())
    assert torch.allclose(entropy, torch.distributions.Categorical(logits=logits / 0.8).entropy().flatten())


@pytest.mark.skipif(INTERPRETING, reason="is the other process")
def test_triton_in_the_interpreter():
    run_interpreted(__file__)


@pytest.mark.skipif(INTERPRETING, reason="says nothing of Triton")
def test_imports_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None; import torch; from fuserl.kernels import softmax_rows as s; "
        "assert s.forward(torch.zeros(1, 1, 4), torch.tensor([2]), 1.0, None, 3, 'reference').shape == (3, 1)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_thirty_one():
    stride = 2**31 + 64
    memory = torch.empty(stride + 1000, dtype=torch.bfloat16, device="cuda")
    logits = memory.as_strided((2, 1, 1000), (stride, stride, 1))
    logits.copy_(peaky(2, 1, 1000))
    compare_statistics(logits, some_ids(logits), "triton")
    compare_gradient(logits, some_ids(logits), "triton", out=logits.float().bfloat16())


@pytest.mark.gpu
def test_does_not_wait_and_compiles_once_for_every_length():
    logits = peaky(1, 64, 1024, device="cuda")
    ids, coefficients = some_ids(logits), torch.randn(5, 64, device="cuda")
    compiled = []
    for rows, temperature in ((64, 1.0), (1, 0.5), (33, 2.0), (16, 1.0)):
        part, given = logits[:, :rows], coefficients[:, :rows].contiguous()
        torch.cuda.set_sync_debug_mode("error" if compiled else "default")
        try:
            statistics = softmax_rows.forward(part, ids[:rows], temperature, None, 4, "triton")
            out = torch.empty_like(part)
            softmax_rows.gradient(part, ids[:rows], statistics[2:], given, temperature, None, out, "triton")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        kernels = softmax_rows._segment_kernel, softmax_rows._merge_kernel, softmax_rows._gradient_kernel
        compiled.append([sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels])
    assert compiled[0] == compiled[-1], f"recompiled: {compiled}"
