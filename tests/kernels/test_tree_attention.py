"""tree_attention against one dense masked softmax in float64, on forests of every shape; outputs and all gradients.

Triton runs here on the CPU, under its interpreter, which must be chosen before triton is imported: one test starts this
file again in a process of its own with TRITON_INTERPRET=1, where the same tests take the Triton backend.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backends import threads
from forests import FORESTS, dense, forest, inputs, plainly, with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import check, check_rows

from fuserl.kernels import tree_segments, tree_tiles
from fuserl.kernels.tree_attention import IMPLS, tree_attention

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETING:
    BACKENDS = [("cpu", "triton")]
else:
    BACKENDS = [("cpu", "cpu"), ("cpu", "reference"), pytest.param("cuda", "triton", marks=pytest.mark.gpu)]
each_backend = pytest.mark.parametrize("device,backend", BACKENDS)
cpu_only = pytest.mark.skipif(INTERPRETING, reason="says nothing of Triton, or would take it minutes")

DTYPES = (
    [torch.float32, torch.float16, torch.bfloat16] if INTERPRETING else [torch.float32, torch.bfloat16, torch.float64]
)
SHAPES = [(2, 1, 16), (1, 1, 80)] if INTERPRETING else [(2, 1, 16), (1, 1, 80), (4, 4, 64), (6, 2, 128), (2, 1, 256)]
SCORES = {
    "plain": {},
    "scale": {"scale": 0.5},
    "window": {"window": 20},
    "softcap": {"softcap": 3.0},
    "all": {"scale": 0.3, "window": 1, "softcap": 8.0},
}
NAMES = ("out", "lse", "dq", "dk", "dv")


def reordered(tensors, segments, order, **options):
    """As `plainly`, in another order of the head dimension."""
    *arrays, g_lse = tensors
    out, lse, *gradients = plainly([*(x[..., order] for x in arrays), g_lse], segments, **options)
    back = order.argsort()
    return out[..., back], lse, *(x[..., back] for x in gradients)


def compare(tensors, segments, backend, **options):
    """Outputs and gradients of a backend within what the equations err in plain float32 torch on the same values.

    No order of a sum is the right one: plain torch sums over the head dimension in four, and what it errs in the worst
    counts. On a GPU products of 16-bit numbers take 16-bit weights, and the backward makes the scores anew in other
    tiles: there plain torch does so too.
    """
    dtype = tensors[0].dtype
    got = [x.cpu() for x in with_gradients(tree_attention, tensors, segments, backend=backend, **options)]
    here = [x.cpu() for x in tensors]
    truth = with_gradients(dense, [x.double() for x in here], segments, **options)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert got[0].dtype == got[2].dtype == dtype and got[1].dtype == wide
    if dtype == torch.float64:
        for each, expected in zip(got, truth, strict=True):
            torch.testing.assert_close(each, expected, rtol=1e-10, atol=1e-12)
        return
    here = [x.float() for x in here]
    orders = [torch.randperm(here[0].shape[2]) for _ in range(4)]
    if backend == "triton":
        plains = [plainly(here, segments, **options, weights=dtype, order=order) for order in orders]
    else:
        plains = [reordered(here, segments, order, **options) for order in orders]
    for n, name in enumerate(NAMES):
        plain = max((each[n] for each in plains), key=lambda x, n=n: (x - truth[n]).norm())
        if n < 2:
            check(name, got[n], truth[n], plain, dtype if n == 0 else wide)
        else:
            check_rows(name, got[n], truth[n], plain, dtype)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["groups", "deep", "any_order"] if INTERPRETING else FORESTS)
def test_equals_the_dense_softmax(name, dtype, device, backend):
    segments = FORESTS[name]
    compare(inputs(segments[1], dtype=dtype, device=device), segments, backend)


@each_backend
@pytest.mark.parametrize("scores", ["window", "softcap"] if INTERPRETING else SCORES)
def test_scores(scores, device, backend):
    for name in ("deep",) if INTERPRETING else ("groups", "deep", "any_order"):
        segments = FORESTS[name]
        compare(inputs(segments[1], device=device), segments, backend, **SCORES[scores])


@each_backend
@pytest.mark.parametrize("heads,kv_heads,dim", SHAPES)
def test_heads_and_head_dims(heads, kv_heads, dim, device, backend):
    segments = FORESTS["group"]
    for dtype in (torch.float32,) if INTERPRETING else (torch.float32, torch.bfloat16):
        compare(inputs(segments[1], heads, kv_heads, dim, dtype, device), segments, backend)


@each_backend
def test_random_trees(device, backend):
    for seed in range(1 if INTERPRETING else 12):
        segments = forest(seed)
        options = {"window": 30} if seed % 3 == 2 else {}
        compare(inputs(segments[1], device=device), segments, backend, **options)


@each_backend
def test_a_long_prefix_is_reduced_in_parts(device, backend, monkeypatch):
    """More queries than one task of the backward takes, over a prefix that all of them see."""
    monkeypatch.setattr(tree_tiles, "_LEAST", 100)
    tree_tiles._items.cache_clear()
    sizes = [70, *[50] * 5] if INTERPRETING else [200, *[100] * 12]
    segments = ([-1, *[0] * (len(sizes) - 2), 1], sizes)
    compare(inputs(sizes, device=device), segments, backend)
    compare(inputs([sum(sizes)], device=device), ([-1], [sum(sizes)]), backend, window=300)
    tree_tiles._items.cache_clear()


@each_backend
def test_no_tokens(device, backend):
    for segments in (([], []), ([-1, 0], [0, 0])):
        out, lse, *gradients = with_gradients(
            tree_attention, inputs([0], device=device), segments, backend=backend
        )  # fmt: skip
        assert out.shape == gradients[0].shape == (0, 2, 16) and lse.shape == (0, 2)


@each_backend
def test_no_segment_sees_a_stranger(device, backend):
    """Changing one branch changes no bit of what does not descend from it."""
    segments = FORESTS["deep"]
    tensors = inputs(segments[1], device=device)
    before = tree_attention(*tensors[:3], segments, backend=backend)
    kin = {2: (2, 3, 4, 5, 6), 6: (6,), 7: (7,)}
    owner = torch.repeat_interleave(torch.arange(8), torch.tensor(segments[1])).to(device)
    for changed, descendants in kin.items():
        others = torch.stack([owner != s for s in descendants]).all(0)
        moved = [torch.where((owner == changed)[:, None, None], x + 1, x) for x in tensors[:3]]
        after = tree_attention(*moved, segments, backend=backend)
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old[others], new[others]) and not torch.equal(old[~others], new[~others])


@each_backend
def test_partial_results_merge(device, backend):
    """A rollout's own tokens, and its prompt's by plain torch, merged by their lse, are the two together."""
    prompt, own = 50, 37
    q, k, v, *_ = inputs([prompt + own], device=device)
    out, lse = tree_attention(q, k, v, ([-1, 0], [prompt, own]), backend=backend)
    part, part_lse = tree_attention(q[prompt:], k[prompt:], v[prompt:], ([-1], [own]), backend=backend)
    scores = torch.einsum("ihd,jd->ihj", q[prompt:], k[:prompt, 0]) / 4
    other, other_lse = scores.softmax(-1) @ v[:prompt, 0], scores.logsumexp(-1)
    merged = torch.logaddexp(part_lse, other_lse)
    both = part * (part_lse - merged).exp()[..., None] + other * (other_lse - merged).exp()[..., None]
    torch.testing.assert_close(merged, lse[prompt:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both, out[prompt:], rtol=1e-4, atol=1e-5)


@each_backend
def test_ten_runs_give_the_same_bits(device, backend):
    sizes = [40, *[30] * 3] if INTERPRETING else [200, *[90] * 12]
    segments, tensors = ([-1, *[0] * (len(sizes) - 1)], sizes), inputs(sizes, device=device)
    first = with_gradients(tree_attention, tensors, segments, backend=backend)
    for _ in range(1 if INTERPRETING else 9):
        again = with_gradients(tree_attention, tensors, segments, backend=backend)
        assert all(map(torch.equal, first, again))


@each_backend
def test_strided_inputs_and_large_scores(device, backend):
    segments = FORESTS["group"]
    q, k, v, g, g_lse = inputs(segments[1], device=device)
    q = q.transpose(0, 1).contiguous().transpose(0, 1)
    k, v = torch.stack([k, v], dim=-1).unbind(-1)
    compare((q, k, v, g, g_lse), segments, backend)
    compare((40 * q, k, v, g, g_lse), segments, backend)


@each_backend
def test_only_what_is_asked_for_gets_a_gradient(device, backend):
    segments = FORESTS["group"]
    q, k, v, g, _ = inputs(segments[1], device=device)
    every = with_gradients(
        tree_attention, (q, k, v, g, torch.zeros(len(q), 2, device=device)), segments, backend=backend
    )
    leaf = k.clone().requires_grad_()
    out, _ = tree_attention(q, leaf, v, segments, backend=backend)
    out.backward(g)
    assert torch.equal(leaf.grad, every[3])
    with torch.no_grad():
        assert not tree_attention(q, leaf, v, segments, backend=backend)[0].requires_grad


@cpu_only
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), window=st.sampled_from([None, 1, 7, 64]))
def test_any_forest(seed, window):
    segments = forest(seed, segments=seed % 9 + 1, longest=100)
    if sum(segments[1]):
        torch.manual_seed(seed)
        compare(inputs(segments[1]), segments, "cpu", window=window)


@cpu_only
def test_gradcheck():
    segments = FORESTS["empty_root"]
    q, k, v, *_ = inputs(segments[1], dim=4, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for options in ({}, {"window": 5, "softcap": 2.0}):
        assert torch.autograd.gradcheck(lambda *x, o=options: tree_attention(*x, segments, backend="cpu", **o), leaves)


@cpu_only
def test_every_instruction_set_and_number_of_threads(isa):
    segments, found = ([-1, *[0] * 12], [130, *[90] * 12]), []
    tensors = inputs(segments[1], heads=6, kv_heads=2)
    compare(tensors, segments, "cpu", softcap=5.0)
    for count in (1, 3):
        with threads(count):
            found.append(with_gradients(tree_attention, tensors, segments, backend="cpu"))
    assert all(map(torch.equal, *found))


@cpu_only
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's record of the peak")
@pytest.mark.parametrize("segments", [([-1], [8192]), ([-1, *[0] * 8], [4096, *[1024] * 8])], ids=["text", "group"])
def test_memory_is_that_of_the_results(segments):
    """No scores are kept, nothing is padded, transposed or converted: beside out and gradients there are tiles."""
    code = f"""
import re, torch
from pathlib import Path
from fuserl import tree_attention
torch.set_num_threads(1)
def memory(field): return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
def run(parent, length):
    leaves = [torch.randn(sum(length), 4, 64, requires_grad=True) for _ in range(3)]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    out, _ = tree_attention(*leaves, (parent, length))
    results = out.detach(), *torch.autograd.grad(out, leaves, out.detach())
    return (memory("VmHWM") - before) / sum(x.nbytes for x in results)
run([-1], [64])
print(run(*{segments}))
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert 0.5 < float(found) < 1.5


@cpu_only
def test_compiles_into_one_graph():
    def loss(q, k, v, parent, length):
        out, lse = tree_attention(q, k, v, (parent, length), window=9, backend="cpu")
        return (out * out).sum() + lse.sum()

    segments = [torch.tensor(x) for x in FORESTS["group"]]
    leaves = [[x.clone().requires_grad_() for x in inputs(FORESTS["group"][1])[:3]] for _ in range(1)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*leaves[0], *segments), leaves[0])
    found = torch.autograd.grad(compiled(*leaves[0], *segments), leaves[0])
    assert all(map(torch.equal, expected, found))


@cpu_only
def test_opcheck():
    parent, length = (torch.tensor(x) for x in FORESTS["groups"])
    q, k, v, *_ = inputs(FORESTS["groups"][1])
    for wanted in (True, False):
        leaves = [x.clone().requires_grad_(wanted) for x in (q, k, v)]
        for numbers in ((0.25, None, None), (0.25, 7, 3.0)):
            torch.library.opcheck(torch.ops.fuserl.tree_attention, (*leaves, parent, length, *numbers, "cpu"))


@cpu_only
def test_one_layout_for_every_layer():
    parent, length = (torch.tensor(x) for x in FORESTS["deep"])
    assert tree_segments.layout(parent, length) is tree_segments.layout(parent.clone(), length.clone())


@cpu_only
@pytest.mark.parametrize(
    "change,message",
    [
        ({"q": torch.zeros(3, 2)}, r"q must be \(L, H, D\)"),
        ({"q": torch.zeros(3, 2, 8).long()}, "q must be .* got .* torch.int64"),
        ({"q": torch.zeros(3, 2, 264)}, "D up to 256"),
        ({"k": torch.zeros(4, 2, 8)}, "k must be"),
        ({"k": torch.zeros(3, 3, 8), "v": torch.zeros(3, 3, 8)}, "Hkv a divisor of 2"),
        ({"v": torch.zeros(3, 1, 8)}, "v must be"),
        ({"v": torch.zeros(3, 2, 8).double()}, "v must be torch.float32"),
        ({"segments": ([-1], [4])}, "length must sum to the tokens of q; got 4 for 3"),
        ({"segments": ([-1, 2], [1, 2])}, "parent must name one of 2 segments"),
        ({"segments": ([1, 0], [1, 2])}, "got a circle at 0"),
        ({"segments": ([-1, -1], [4, -1])}, "length must not be negative"),
        ({"segments": ([-1], [1, 2])}, r"segments must be two \(S,\) arrays"),
        ({"segments": ([-1],)}, "segments must be"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"softcap": -1.0}, "softcap must be positive"),
        ({"window": 0}, "window must be positive"),
    ],
)
def test_refuses(change, message):
    zeros = torch.zeros(3, 2, 8)
    call = {"q": zeros, "k": zeros, "v": zeros, "segments": ([-1, 0], [1, 2]), **change}
    with pytest.raises(ValueError, match=message):
        tree_attention(**call)


def run_on_gpu(lengths):
    segments = [-1, *[0] * (len(lengths) - 1)], lengths
    q, k, v, g, _ = inputs(lengths, heads=4, kv_heads=2, dim=64, dtype=torch.bfloat16, device="cuda")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, _ = tree_attention(*leaves, segments)
    return torch.autograd.grad(out, leaves, g)


@pytest.mark.gpu
def test_one_compilation_over_twenty_lengths():
    kernels = (tree_tiles._forward_kernel, tree_tiles._queries_kernel, tree_tiles._keys_kernel)
    compiled = []
    for n in range(20):
        run_on_gpu([64 + 37 * n, *[16 + 5 * m for m in range(n % 7)]])
        compiled.append([sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels])
    assert compiled[0] == compiled[-1], f"recompiled: {compiled}"


@pytest.mark.gpu
def test_waits_for_nothing():
    run_on_gpu([300, 50, 60])
    segments = [-1, 0, 0], [300, 50, 60]
    leaves = [x.requires_grad_() for x in inputs(segments[1], 4, 2, 64, torch.bfloat16, "cuda")[:3]]
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, lse = tree_attention(*leaves, segments)
        (out.float().sum() + lse.sum()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cpu_only
def test_triton_in_the_interpreter():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-2000:]
    assert " passed" in process.stdout and set(IMPLS) >= {"triton", "cpu", "reference"}
