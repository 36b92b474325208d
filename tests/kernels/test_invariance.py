"""A row's numbers are its own: the same bits run after run, alone and among others, on any threads, however far away.

Promised for what we compute row by row. The products of the linear ops are a library's, whose rows depend on how many
there are; a fixed number of them takes that away, and the last tests say how.
"""

import pytest
import torch
from backends import INTERPRETING, run_interpreted, threads

from fuserl.kernels import softmax_rows
from fuserl.kernels.divergence import KINDS, divergence
from fuserl.kernels.group_advantage import group_advantage
from fuserl.kernels.linear_logprob import linear_logprob
from fuserl.kernels.linear_policy_loss import linear_policy_loss
from fuserl.kernels.policy_loss import policy_loss
from fuserl.kernels.sample import sample
from fuserl.kernels.sampled_divergence import sampled_divergence
from fuserl.kernels.surrogates import Clip
from fuserl.kernels.token_logprob import token_logprob
from fuserl.kernels.topk_divergence import topk_divergence

BACKENDS = [
    pytest.param("cpu", "triton" if INTERPRETING else "cpu", id="interpreter" if INTERPRETING else "cpu"),
    pytest.param("cuda", "triton", marks=pytest.mark.gpu, id="cuda"),
]
COMPILED = BACKENDS[INTERPRETING:]  # NumPy does the same thing ten times
native = pytest.mark.skipif(INTERPRETING, reason="the C++ kernels are tested outside the interpreter")
COUNTS = (1, 8, 17) if INTERPRETING else (1, 2, 8, 15, 16, 17, 300)  # the interpreter takes milliseconds a row
ROWS = max(COUNTS)
V = 130 if INTERPRETING else 5003
OUTPUTS = ("logprob", "entropy", "mean_logprob", "sum_sq_prob", "mean_logit", "is_top1")


def differentiated(outputs, g, *leaves):
    """Outputs, and the gradients of their sums with the rows' own weights."""
    gradients = torch.autograd.grad(sum((output * g).sum() for output in outputs), leaves)
    return [*(output.detach() for output in outputs), *gradients]


def by_token_logprob(backend, g, x, _, ids, temperature):
    x = x.clone().requires_grad_()
    return differentiated(token_logprob(x, ids, temperature=temperature, backend=backend), g, x)


def by_softmax_rows(backend, g, x, _, ids, temperature):
    statistics = softmax_rows.forward(x[None], ids, 1.0, temperature, 8, backend)
    out, coefficients = torch.empty_like(x), torch.stack([g, -g, g * g, -g, g])
    softmax_rows.gradient(
        x[None], ids, statistics[2:4].contiguous(), coefficients, 1.0, temperature, out[None], backend
    )
    return [*statistics, out]


def by_divergence(kind):
    def run(backend, g, x, y, _, temperature):
        p, q = x.clone().requires_grad_(), y.clone().requires_grad_()
        value, entropy = divergence(p, q, kind, temperature=temperature, detach_q=False, backend=backend)
        return [*differentiated([value], g, p, q), entropy.detach()]

    return run


def by_topk_divergence(backend, g, x, y, _, temperature):
    x, (teacher, ids) = x.clone().requires_grad_(), y.log_softmax(-1).topk(7)
    found = topk_divergence(x, ids, teacher, "forward_kl", temperature=temperature, backend=backend)
    return differentiated(found, g, x)


def by_sample(backend, g, x, _, ids, temperature):
    given = {"seed": 3, "rollout_ids": ids, "positions": ids, "backend": backend}
    return [*sample(x, top_k=40, top_p=0.9, min_p=1e-3, temperature=temperature, **given), *sample(x, **given)]


def by_policy_loss(backend, g, x, y, *_):
    logprobs = x[:, 0].clone().requires_grad_()
    given = {
        "old_logprobs": y[:, 0],
        "ref_logprobs": y[:, 1],
        "weights": y[:, 2],
        "beta": 0.1,
        "surrogate": Clip(dual=2.0),
    }
    losses, _ = policy_loss(logprobs, y[:, 3], **given, backend=backend)
    return differentiated([losses], g, logprobs)


def by_sampled_divergence(backend, g, x, y, *_):
    logprobs = x[:, 0].clone().requires_grad_()
    return differentiated([sampled_divergence(logprobs, y[:, 0].clone(), "k3", backend=backend)], g, logprobs)


BY_ROW = {
    "token_logprob": by_token_logprob,
    "softmax_rows": by_softmax_rows,
    **{f"divergence, {kind}": by_divergence(kind) for kind in KINDS},
    "topk_divergence": by_topk_divergence,
    "sample": by_sample,
    "policy_loss": by_policy_loss,
    "sampled_divergence": by_sampled_divergence,
}


def rows(device="cpu"):
    """Weights, two peaky logits, tokens and temperatures of 300 rows."""
    made = torch.randn(ROWS), 4 * torch.randn(ROWS, V), 4 * torch.randn(ROWS, V), torch.randint(V, (ROWS,))
    return [x.to(device) for x in (*made, 0.5 + torch.rand(ROWS))]


def equal(some, others):
    """Whether all bits are the same; a row stands in the last dimension of statistics, else in the first."""
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("device,backend", BACKENDS)
@pytest.mark.parametrize("name", BY_ROW)
def test_neighbours_change_nothing(name, device, backend):
    """1, 2, 8, 15, 16 and 17 rows of 300, from the front, from the back and mixed."""
    whole = BY_ROW[name](backend, *(every := rows(device)))
    for count in COUNTS:
        places = torch.randperm(ROWS)[:count], torch.arange(count), torch.arange(ROWS - count, ROWS)
        for chosen in places[:1] if INTERPRETING else places:
            chosen = chosen.to(device)
            assert equal(BY_ROW[name](backend, *(x[chosen] for x in every)), [x[chosen] for x in whole]), count


@native
@pytest.mark.parametrize("name", BY_ROW)
def test_threads_change_nothing(name):
    whole = BY_ROW[name]("cpu", *(every := rows()))
    for count in (1, 2, 3, 7):
        with threads(count):
            assert equal(BY_ROW[name]("cpu", *every), whole), count


def head(width=96, vocabulary=2003, device="cpu"):
    """Hidden states of 300 rows, a head, tokens, weights."""
    made = torch.randn(ROWS, width), torch.randn(vocabulary, width) * 4 / width**0.5, torch.randint(vocabulary, (ROWS,))
    return [x.to(device) for x in (*made, torch.randn(ROWS))]


def by_linear_logprob(backend, hidden, weight, ids, g, **options):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = linear_logprob(hidden, weight, ids, outputs=OUTPUTS, softcap=30.0, backend=backend, **options)
    found = vars(out)
    return [*differentiated([found[name] for name in OUTPUTS[:-1]], g, hidden, weight), found["is_top1"]]


def by_linear_policy_loss(backend, hidden, weight, ids, g, **options):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()

    def token_loss(out, rows):
        return g[rows] * (out.logprob - 0.1 * out.entropy)

    options = {"outputs": ("logprob", "entropy"), "backend": backend, **options}
    loss, out, _ = linear_policy_loss(hidden, weight, ids, token_loss, **options)
    return [*differentiated([loss], 1.0, hidden, weight), out.logprob, out.entropy]


def by_group_advantage(_, g, x, *rest):
    return [group_advantage(g, torch.arange(ROWS, device=g.device) // 7)]


@pytest.mark.parametrize("device,backend", COMPILED)
@pytest.mark.parametrize("name", [*BY_ROW, "group_advantage"])
def test_ten_runs(name, device, backend):
    function = (BY_ROW | {"group_advantage": by_group_advantage})[name]
    first = function(backend, *(every := rows(device)))
    assert all(equal(function(backend, *every), first) for _ in range(9))


@pytest.mark.parametrize("device,backend", COMPILED)
@pytest.mark.parametrize("function", [by_linear_logprob, by_linear_policy_loss])
@pytest.mark.parametrize("options", [{}, {"chunk": 64}, {"chunk": 77}])
def test_ten_runs_of_the_head(function, options, device, backend):
    first = function(backend, *(every := head(device=device)), **options)
    assert all(equal(function(backend, *every, **options), first) for _ in range(9))


@native
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("width,vocabulary", [(96, 2003), (576, 4000), (1536, 1000)])
@pytest.mark.parametrize("function", [by_linear_logprob, by_linear_policy_loss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_told_to_be_invariant(dtype, function, width, vocabulary, number):
    """Outputs and d_hidden of a row, alone and among others, some of which have no gradient, or are masked."""
    hidden, weight, ids, g = head(width, vocabulary)
    hidden, weight, g = hidden.to(dtype), weight.to(dtype), g.masked_fill(torch.arange(ROWS) % 3 == 0, 0.0)

    def run(chosen, **options):
        given = hidden[chosen], weight, ids[chosen], g[chosen]
        found = function("cpu", *given, batch_invariant=True, **options)
        return [x for x in found if x.shape[:1] == ids[chosen].shape]

    with threads(number):
        whole = run(torch.arange(ROWS))
        assert len(whole) >= 3
        for count in COUNTS:
            chosen = torch.randperm(ROWS)[:count]
            assert equal(run(chosen), [x[chosen] for x in whole]), count
        if function is by_linear_logprob:
            assert equal(run(torch.arange(ROWS), memory=10**9), whole)


@native
def test_products_of_other_sizes_differ_by_rounding():
    hidden, weight, ids, _ = head(576, 4000)
    whole = linear_logprob(hidden, weight, ids).logprob
    for count in COUNTS:
        part = linear_logprob(hidden[:count], weight, ids[:count]).logprob
        torch.testing.assert_close(part, whole[:count], rtol=1e-6, atol=1e-5)


FAR = 2**30  # elements from row to row: the third begins where 31 bits end


def far_rows(near, tmp_path):
    """The same three rows, 2**30 elements apart, in a file of zeros that takes no room, or in the GPU's memory."""
    size = 2 * FAR + near.shape[1]
    if near.is_cuda:
        memory = torch.empty(size, dtype=near.dtype, device=near.device)
    else:
        path = tmp_path / "rows"
        with path.open("wb") as file:
            file.truncate(size * near.itemsize)
        memory = torch.from_file(str(path), shared=True, size=size, dtype=near.dtype)
    far = memory.as_strided(near.shape, (FAR, 1))
    return far.copy_(near)


@pytest.mark.parametrize("device,backend", BACKENDS)
def test_rows_that_begin_beyond_31_bits(device, backend, tmp_path):
    """Forward and gradients, read from and written to addresses that 32-bit arithmetic does not reach."""
    near = (4 * torch.randn(3, 700, device=device)).bfloat16()
    far, other = far_rows(near, tmp_path), near.flip(0).contiguous()
    ids, g = torch.randint(700, (3,), device=device), torch.randn(3, device=device)

    def run(x):
        found = [*token_logprob(x, ids, backend=backend), *divergence(x, other, "reverse_kl", backend=backend)]
        found += divergence(other, x, "jensen_shannon", backend=backend)
        found += sample(x, seed=1, top_k=9, rollout_ids=ids, positions=ids, backend=backend)
        leaf = x.detach().requires_grad_()
        return found + differentiated(token_logprob(leaf, ids, inplace_backward=True, backend=backend), g, leaf)

    expected = run(near.clone())
    assert equal(run(far), expected)
    assert torch.equal(far, expected[-1]), "the gradient took the logits' place"


@native
def test_more_than_31_bits_of_elements():
    """One row of 50,000 logits seen 43,000 times: 2.15e9 elements that take no memory."""
    vocabulary, count = 50_000, 43_000
    assert vocabulary * count > 2**31
    p, q = ((4 * torch.randn(1, vocabulary)).bfloat16() for _ in range(2))
    ids, names = torch.tensor([vocabulary - 1]), torch.tensor([11])
    functions = {
        "token_logprob": lambda p, q, ids, names: token_logprob(p, ids),
        "divergence": lambda p, q, ids, names: divergence(p, q, "reverse_kl"),
        "sample": lambda p, q, ids, names: sample(p, seed=1, rollout_ids=names, positions=names),
    }
    for name, function in functions.items():
        alone = function(p, q, ids, names)
        among = function(*(x.expand(count, *x.shape[1:]) for x in (p, q, ids, names)))
        assert all(torch.equal(b, a.expand(count)) for a, b in zip(alone, among, strict=True)), name


@pytest.mark.skipif(INTERPRETING, reason="this is that process")
def test_triton_in_the_interpreter():
    run_interpreted(__file__)
