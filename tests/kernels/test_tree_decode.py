"""tree_decode: against one dense softmax in float64, alone and among others, and what it refuses."""

import itertools

import pytest
import torch
from backends import INTERPRETING, cpu_only, each_backend, run_interpreted
from forests import FORESTS, forest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import check

from fuserl import tree_attention, tree_decode
from fuserl.kernels.tree_decode import IMPLS
from fuserl.kernels.tree_lines import Lines


def cache(segments, gap=3):
    """(parent, start, length) in a cache with room behind every segment, and its rows."""
    parent, length = segments
    ends = torch.tensor([0, *(n + gap for n in length)]).cumsum(0).tolist()
    return (parent, ends[:-1], length), ends[-1]


def inputs(rows, queries, heads=4, kv_heads=2, dim=16, dtype=torch.float32, device="cpu"):
    """q, k and v, peaky; what no segment holds is NaN to whoever reads it."""
    q, (k, v) = 2 * torch.randn(queries, heads, dim), torch.randn(2, rows, kv_heads, dim)
    return [x.to(dtype).to(device) for x in (q, k, v)]


def poisoned(x, segments):
    """The cache with NaN in every row that no segment holds."""
    held = torch.zeros(len(x), dtype=torch.bool)
    for first, size in zip(*segments[1:], strict=True):
        held[first : first + size] = True
    return torch.where(held.to(x.device)[:, None, None], x, torch.nan)


def dense(q, k, v, segments, leaf, *, position=None, scale=None, window=None, softcap=None, weights=None):
    """(out, lse) in the dtype of q, a query at a time; the weights rounded to the dtype `weights` if given."""
    parent, start, length = segments
    out, lse = torch.zeros_like(q), torch.full_like(q[..., 0], -torch.inf)
    for b, segment in enumerate(leaf):
        line = []
        while segment >= 0:
            line = [*range(start[segment], start[segment] + length[segment]), *line]
            segment = parent[segment]
        line = line if position is None else line[: position[b] + 1]
        line = line if window is None else line[-window:]
        keys, values = (x[line].repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("hd,jhd->hj", q[b], keys) * (q.shape[2] ** -0.5 if scale is None else scale)
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        if line:
            p = scores.softmax(-1) if weights is None else scores.softmax(-1).to(weights).to(q.dtype)
            out[b], lse[b] = torch.einsum("hj,jhd->hd", p, values), scores.logsumexp(-1)
    return out, lse


def compare(tensors, segments, leaf, backend, **options):
    q, *stored = tensors
    got = tree_decode(q, *(poisoned(x, segments) for x in stored), segments, leaf, backend=backend, **options)
    truth = dense(*(x.double().cpu() for x in tensors), segments, leaf, **options)
    if q.dtype == torch.float64:
        for found, exact in zip(got, truth, strict=True):
            torch.testing.assert_close(found.cpu(), exact, rtol=1e-12, atol=1e-12)
        return
    weights = q.dtype if backend == "triton" else None  # which its products take in the dtype of the values
    nearest = [x.to(found.dtype).double() for x, found in zip(truth, got, strict=True)]
    # A score of few numbers is right by luck in one order of its sum: the worst of some orders is what float32 errs by.
    for order in [torch.arange(q.shape[2]).flip(0), *(torch.randperm(q.shape[2]) for _ in range(3))]:
        turned = [x.float().cpu()[..., order] for x in tensors]
        out, lse = dense(*turned, segments, leaf, weights=weights, **options)
        plain = out[..., order.argsort()].to(q.dtype).double(), lse.double()
        for at, (found, exact) in enumerate(zip(plain, truth, strict=True)):
            further = (found - exact).abs() > (nearest[at] - exact).abs()
            nearest[at] = torch.where(further, found, nearest[at])
    for name, found, exact, near in zip(("out", "lse"), got, truth, nearest, strict=True):
        assert found.dtype == (q.dtype if name == "out" else torch.float32)
        check(name, found.cpu(), exact, near, found.dtype)


@each_backend
@pytest.mark.parametrize("name", sorted(FORESTS))
def test_every_forest(device, backend, name):
    segments, rows = cache(FORESTS[name])
    leaf = [*range(len(segments[0])), 0]
    for options in ({}, {"window": 9}, {"softcap": 2.0, "scale": 0.3}):
        compare(inputs(rows, len(leaf), device=device), segments, leaf, backend, **options)


@each_backend
@pytest.mark.parametrize("seed", range(3))
def test_random_forests(device, backend, seed):
    torch.manual_seed(seed)
    segments, rows = cache(forest(seed))
    leaf = torch.randint(len(segments[0]), (11,)).tolist()
    compare(inputs(rows, 11, heads=6, kv_heads=2, device=device), segments, leaf, backend, window=[None, 20, 1][seed])


@each_backend
@pytest.mark.parametrize("dim,heads,kv_heads", [(64, 3, 1), (80, 2, 2), (128, 8, 2), (256, 2, 1), (40, 5, 1)])
def test_shapes(device, backend, dim, heads, kv_heads):
    segments, rows = cache(([-1, 0, 0, 0], [67, 1, 64, 0]))
    compare(inputs(rows, 4, heads, kv_heads, dim, device=device), segments, [1, 2, 3, 2], backend)


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(device, backend, dtype):
    if dtype == torch.float64 and backend == "triton":
        pytest.skip("Triton's products have at most 32 bits")
    segments, rows = cache(([-1, 0, 0], [100, 9, 70]))
    compare(inputs(rows, 3, dim=64, dtype=dtype, device=device), segments, [1, 2, 2], backend)


@each_backend
def test_a_prompt_of_several_stretches(device, backend):
    sizes = [1025, 30, 513]
    segments, rows = cache(([-1, 0, 0], sizes))
    for options in ({}, {"window": 100}, {"window": 700}):
        compare(inputs(rows, 4, 2, 1, device=device), segments, [1, 2, 1, 2], backend, **options)


@each_backend
def test_strided_caches_and_large_scores(device, backend):
    segments, rows = cache(FORESTS["group"])
    q, k, v = inputs(rows, 4, device=device)
    k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v))
    compare((40 * q, k, v), segments, [0, 1, 2, 3], backend)
    wide = torch.stack([k, v], dim=-1)
    compare((q, wide[..., 0], wide[..., 1]), segments, [0, 1, 2, 3], backend)


@each_backend
def test_it_is_the_last_row_of_tree_attention(device, backend):
    """Of a text, its last tokens; speculated ones are segments of a token each."""
    prompt, own = 40, 3
    q, k, v = inputs(prompt + own, prompt + own, device=device)
    out, lse = tree_attention(q, k, v, ([-1], [prompt + own]), backend="reference", window=30)
    segments = [-1, 0, 1, 2], [0, *range(prompt, prompt + own)], [prompt, 1, 1, 1]
    got = tree_decode(q[-own:], k, v, segments, [1, 2, 3], window=30, backend=backend)
    torch.testing.assert_close(got[0], out[-own:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1], lse[-own:], rtol=1e-5, atol=1e-5)


@each_backend
@pytest.mark.parametrize("name", ["group", "any_order"])
def test_queries_anywhere_in_their_lines(device, backend, name):
    """Every token of every segment: a prompt being read, a rollout's tokens, a text put in between."""
    segments, rows = cache(FORESTS[name])
    parent, _, length = segments
    leaf, position = [], []
    for segment, size in enumerate(length):
        above, up = 0, parent[segment]
        while up >= 0:
            above, up = above + length[up], parent[up]
        leaf += [segment] * size
        position += range(above, above + size)
    for options in ({}, {"window": 9}, {"softcap": 2.0, "scale": 0.3}):
        compare(inputs(rows, len(leaf), device=device), segments, leaf, backend, position=position, **options)


@each_backend
def test_what_no_query_sees_may_be_anything(device, backend):
    """Room behind a text's last token, and with a window what is far before it, is not read."""
    segments, (q, *stored) = ([-1], [0], [1400]), inputs(1400, 2, device=device)
    for window, position in ((None, [700, 30]), (100, [1390, 1300])):
        known = torch.zeros(1400, dtype=torch.bool)
        known[0 if window is None else 1024 : max(position) + 1] = True
        kept = [torch.where(known.to(device)[:, None, None], x, torch.nan) for x in stored]
        got = tree_decode(q, *kept, segments, [0, 0], position=position, window=window, backend=backend)
        want = tree_decode(q, *stored, segments, [0, 0], position=position, window=window, backend=backend)
        assert all(map(torch.equal, got, want))


def test_a_stretch_is_read_by_those_who_see_it():
    plan = Lines((-1,), (0,), (2000,), (0,) * 130, tuple(range(130))).plan(None)
    assert plan.arrays[0].tolist() == [[0, 64, 0, 0, 64], [0, 128, 0, 64, 128], [0, 130, 0, 128, 130]]
    plan = Lines((-1,), (0,), (2000,), (0,) * 2, (1900, 602)).plan(90)
    assert plan.arrays[0].tolist() == [[512, 91, 512, 0, 1], [1536, 365, 1536, 1, 2]]


def paged(x, segments):
    """The cache in pages of 64 rows, in no order and with NaN between the segments; its segments and pages."""
    parent, start, length = segments
    counts = [-(-size // 64) for size in length]
    ends = torch.tensor([0, *counts]).cumsum(0).tolist()
    page = torch.randperm(ends[-1] + 2)[: ends[-1]].tolist()
    stored = [torch.full((64 * (ends[-1] + 2), *each.shape[1:]), torch.nan).to(each) for each in x]
    for first, size, begin in zip(start, length, ends, strict=False):
        for at in range(size):
            for to, each in zip(stored, x, strict=True):
                to[64 * page[begin + at // 64] + at % 64] = each[first + at]
    return stored, (parent, [64 * end for end in ends[:-1]], length), page


@each_backend
def test_pages(device, backend):
    segments, rows = cache(([-1, 0, 0, 2], [150, 64, 0, 70]))
    leaf, position = [1, 3, 3, 3, 0], [213, 219, 180, 151, 70]
    q, *stored = inputs(rows, len(leaf), dim=64, device=device)
    got = stored, segments, None
    for options in ({}, {"window": 75}):
        runs = []
        for kept, forked, page in (got, paged(stored, segments)):
            runs.append(tree_decode(q, *kept, forked, leaf, position=position, page=page, backend=backend, **options))
        assert all(map(torch.equal, *runs))
    compare((q, *stored), segments, leaf, backend, position=position)


@cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 90])
def test_a_token_gets_the_same_bits_however_its_text_is_cut_into_passes(dtype, window):
    """Prompt and rollout, at once or bit by bit, where what comes after a pass may be anything."""
    sizes = [700, 0, 90]
    segments, rows = cache(([-1, 0, 0], sizes))
    q, k, v = inputs(rows, 790, heads=6, kv_heads=2, dim=32, dtype=dtype)
    whole = tree_decode(q, k, v, segments, [0] * 700 + [2] * 90, position=range(790), window=window, backend="cpu")
    for cuts in ([0, 1, 65, 512, 513, 700, 701, 790], [0, 300, 600, 650, 777, 790]):
        for begin, end in itertools.pairwise(cuts):
            sizes = [min(end, 700), 0, max(0, end - 700)]
            so_far = segments[0], segments[1], sizes
            known = [poisoned(x, so_far) for x in (k, v)]
            leaf = [2 if at >= 700 else 0 for at in range(begin, end)]
            span = range(begin, end)
            found = tree_decode(q[begin:end], *known, so_far, leaf, position=span, window=window, backend="cpu")
            assert all(torch.equal(some, all_[begin:end]) for some, all_ in zip(found, whole, strict=True))


@cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_gets_the_same_bits_alone_and_among_others(dtype):
    segments, rows = cache(([-1, *[0] * 9], [600, *range(0, 90, 10)]))
    q, k, v = inputs(rows, 9, heads=6, kv_heads=2, dim=64, dtype=dtype)
    together = tree_decode(q, k, v, segments, [*range(1, 10)], backend="cpu")
    order = torch.randperm(9)
    shuffled = tree_decode(q[order], k, v, segments, (order + 1).tolist(), backend="cpu")
    for b in range(9):
        alone = tree_decode(q[b : b + 1], k, v, segments, [b + 1], backend="cpu")
        assert all(torch.equal(one[0], many[b]) for one, many in zip(alone, together, strict=True))
    assert all(torch.equal(x[order], y) for x, y in zip(together, shuffled, strict=True))


@cpu_only
def test_it_does_not_matter_where_in_the_cache_a_line_stands():
    """A long line's stretches are added from the root down, wherever they lie."""
    parent, length = [-1, 0, 1], [700, 600, 90]
    q, k, v = inputs(sum(length), 1, dim=64)
    straight = tree_decode(q, k, v, (parent, [0, 700, 1300], length), [2], backend="cpu")
    turned = [torch.cat([x[1300:], x[700:1300], x[:700]]) for x in (k, v)]
    assert all(map(torch.equal, straight, tree_decode(q, *turned, (parent, [690, 90, 0], length), [2], backend="cpu")))


@each_backend
def test_ten_runs_give_the_same_bits(device, backend):
    segments, rows = cache(([-1, *[0] * 5], [530, 9, 70, 3, 1, 0]))
    tensors, leaf = inputs(rows, 5, device=device), [1, 2, 3, 4, 5]
    first = tree_decode(*tensors, segments, leaf, backend=backend)
    for _ in range(1 if INTERPRETING else 9):
        assert all(map(torch.equal, first, tree_decode(*tensors, segments, leaf, backend=backend)))


@each_backend
def test_nobody_and_nothing(device, backend):
    out, lse = tree_decode(*inputs(5, 0, device=device), ([-1], [0], [5]), [], backend=backend)
    assert out.shape == (0, 4, 16) and lse.shape == (0, 4)
    out, lse = tree_decode(*inputs(5, 1, device=device), ([-1], [0], [0]), [0], backend=backend)
    assert (out == 0).all() and (lse == -torch.inf).all()


@cpu_only
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), window=st.sampled_from([None, 1, 7, 64]))
def test_any_forest(seed, window):
    torch.manual_seed(seed)
    segments, rows = cache(forest(seed, segments=seed % 9 + 1, longest=100))
    leaf = torch.randint(len(segments[0]), (seed % 5 + 1,)).tolist()
    ends = [sum(segments[2][s] for s in Lines(*segments, (), ()).line(segment)) for segment in leaf]
    position = [seed % (end + 1) - 1 for end in ends]
    tensors = inputs(rows, len(leaf))
    compare(tensors, segments, leaf, "cpu", window=window)
    compare(tensors, segments, leaf, "cpu", window=window, position=position)


@cpu_only
def test_every_instruction_set_and_number_of_threads():
    from fuserl import _C

    segments, rows = cache(([-1, *[0] * 12], [600, *[33] * 12]))
    tensors, leaf = inputs(rows, 12, 6, 2), [*range(1, 13)]
    best, threads = _C.isa(), torch.get_num_threads()
    try:
        for isa in ("baseline", "avx2", "avx512"):
            try:
                _C.set_isa(isa)
            except ValueError:
                continue
            compare(tensors, segments, leaf, "cpu", softcap=5.0)
            found = []
            for count in (1, 3):
                torch.set_num_threads(count)
                found.append(tree_decode(*tensors, segments, leaf, backend="cpu"))
            assert all(map(torch.equal, *found))
    finally:
        _C.set_isa(best)
        torch.set_num_threads(threads)


@cpu_only
def test_opcheck():
    segments, rows = cache(FORESTS["groups"])
    arrays = [torch.tensor(x) for x in (*segments, [1, 4])]
    for numbers in ((0.25, None, None), (0.25, 7, 3.0)):
        given = (*inputs(rows, 2), *arrays, torch.tensor([0, 3]), None, *numbers, "cpu")
        torch.library.opcheck(torch.ops.fuserl.tree_decode, given, test_utils=("test_schema", "test_faketensor"))


@cpu_only
@pytest.mark.parametrize(
    "change,message",
    [
        ({"q": torch.zeros(2, 8)}, r"q must be \(B, H, D\)"),
        ({"k": torch.zeros(4, 2, 16)}, "k must be"),
        ({"v": torch.zeros(5, 1, 8).double()}, "v must be .* got .* torch.float64"),
        ({"k": torch.zeros(5, 3, 8), "v": torch.zeros(5, 3, 8)}, "Hkv a divisor of 2"),
        ({"q": torch.zeros(2, 2, 8, requires_grad=True)}, "must want no gradient"),
        ({"segments": ([-1], [0])}, "segments must be"),
        ({"segments": ([-1, 2], [0, 3], [3, 2])}, "got parent 2, start 0|got parent 2"),
        ({"segments": ([-1, 0], [0, 3], [3, 3])}, "start 3 and length 3 for segment 1"),
        ({"segments": ([1, 0], [0, 3], [3, 2])}, "got a circle"),
        ({"leaf": [0]}, "leaf must have one segment for each of 2 queries"),
        ({"leaf": [0, 2]}, "leaf must name segments 0 to 1"),
        ({"position": [0]}, "position must be one for each of 2 queries"),
        ({"position": [3, 3]}, r"below the length of its line; got 2 for lines of \[3, 5\]"),
        ({"page": [0]}, "page must number the 0 pages"),
        ({"position": [[0, 1]]}, "all arrays on the host"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"window": 0}, "window must be positive"),
    ],
)
def test_refuses(change, message):
    zeros = torch.zeros(5, 1, 8)
    call = {"q": torch.zeros(2, 2, 8), "k": zeros, "v": zeros, "segments": ([-1, 0], [0, 3], [3, 2]), "leaf": [0, 1]}
    with pytest.raises(ValueError, match=message):
        tree_decode(**{**call, **change})


@cpu_only
def test_triton_in_the_interpreter():
    run_interpreted(__file__)
    assert set(IMPLS) == {"triton", "cpu", "reference"}
