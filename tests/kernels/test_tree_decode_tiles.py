"""The Triton kernels of tree_decode for every machine we name, without one at hand: they compile, none spills."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter and the compiler cannot share a process", allow_module_level=True)

from ahead_of_time import TARGETS, compile_ahead, resources

from fuserl import tree_decode
from fuserl.kernels import tree_decode_tiles

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STRIDES = ("stride_k", "stride_k_head", "stride_v", "stride_v_head")


def kernels(dtype, dim, rows, cap=False, window=False, page=64):
    """(name, kernel, types of its run-time arguments, its settings) for heads of `dim` numbers of `dtype`."""
    launch = tree_decode_tiles.launch(dim, DTYPES[dtype], rows)
    partial = dict.fromkeys(("sums_ptr", "top_ptr", "total_ptr"), "*fp32")
    types = {**dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{dtype}"), **partial}
    types |= dict.fromkeys(("item_ptr", "member_ptr", "last_ptr", "page_ptr"), "*i32")
    types |= dict.fromkeys(("window", "tiles", "heads", "repeat", *STRIDES), "i32") | dict.fromkeys(
        ("scale", "softcap"), "fp32"
    )
    switches = {"D": dim, "EXACT": dtype == "fp32"}
    settings = {**switches, "CAP": cap, "WINDOW": window, "PAGE": page, **launch}
    yield "attend", tree_decode_tiles._attend_kernel, types, settings
    types = {**partial, "slot_ptr": "*i32", "bounds_ptr": "*i32", "out_ptr": f"*{dtype}", "lse_ptr": "*fp32"}
    settings = {**switches, "BLOCK_D": launch["BLOCK_D"], **tree_decode_tiles.MERGE_LAUNCH}
    yield "merge", tree_decode_tiles._merge_kernel, {**types, "heads": "i32"}, settings


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype,dim", [("bf16", 64), ("bf16", 128), ("bf16", 256), ("fp32", 64), ("fp32", 256)])
def test_nothing_is_spilled(target, dtype, dim):
    for rows in (4, 64):
        for name, kernel, types, settings in kernels(dtype, dim, rows):
            divisible = [each for each in types if each.endswith("_ptr") or each in STRIDES]
            used = resources(compile_ahead(kernel, target, types, settings, divisible))
            print(f"{target:7} {name} {settings}: {used}")
            # On AMD scalars go to lanes of vector registers, which costs an instruction and no memory.
            assert used["spills"] == used.get("scalars", 0), f"{name} {settings}: {used}"


def test_caps_windows_and_the_other_dtypes_compile():
    for name, kernel, types, settings in kernels("fp16", 80, 16, cap=True, window=True, page=0):
        assert compile_ahead(kernel, "sm_90", types, settings).asm["cubin"], name


def test_no_length_is_compiled_in():
    kernel = tree_decode_tiles._attend_kernel
    fixed = {p.name for p in kernel.params if p.is_constexpr or not p.do_not_specialize}
    assert not fixed & {"window", "tiles"}


def on_gpu(prompt, lengths):
    rows = prompt + sum(lengths)
    starts = torch.tensor([0, prompt, *lengths[:-1]]).cumsum(0)
    q, k, v = (torch.randn(n, h, 64, device="cuda").bfloat16() for n, h in ((len(lengths), 4), (rows, 2), (rows, 2)))
    segments = [-1, *[0] * len(lengths)], starts, [prompt, *lengths]
    return tree_decode(q, k, v, segments, range(1, len(lengths) + 1))


@pytest.mark.gpu
def test_one_compilation_over_twenty_lengths():
    compiled = []
    for n in range(20):
        on_gpu(64 + 137 * n, [16 + 5 * m + n for m in range(8)])
        both = tree_decode_tiles._attend_kernel, tree_decode_tiles._merge_kernel
        compiled.append([sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in both])
    assert compiled[0] == compiled[-1], f"recompiled: {compiled}"
