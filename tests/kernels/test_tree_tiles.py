"""The Triton kernels of tree_attention for every machine we name, without one at hand: they compile, none spills."""

import itertools
import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter and the compiler cannot share a process", allow_module_level=True)

from ahead_of_time import TARGETS, compile_ahead, resources

from fuserl.kernels import tree_launch, tree_tiles

SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
FOREST = dict.fromkeys(("start_ptr", "parent_ptr", "segment_ptr", "last_ptr", "position_ptr"), "*i32")
NUMBERS = {**dict.fromkeys(("L", "window", "heads", "repeat"), "i32"), "scale": "fp32", "softcap": "fp32"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def kernels(target, dtype, dim, cap=False, window=False):
    """(name, kernel, types of its run-time arguments, its settings) for heads of `dim` numbers of `dtype`."""
    launch = tree_launch.launch(dim, DTYPES[dtype], cap, target.startswith("gfx"), target == "sm_90")
    tensors = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{dtype}")
    arriving = {"d_out_ptr": f"*{dtype}", "lse_ptr": "*fp32", "delta_ptr": "*fp32"}
    switches = {"D": dim, "CAP": cap, "WINDOW": window, "EXACT": dtype == "fp32"}
    types = {**tensors, "out_ptr": f"*{dtype}", "lse_ptr": "*fp32", **FOREST, **NUMBERS}
    yield "forward", tree_tiles._forward_kernel, types, {**switches, **launch["forward"]}
    types = {**tensors, **arriving, "dq_ptr": f"*{dtype}", **FOREST, **NUMBERS}
    yield "queries", tree_tiles._queries_kernel, types, {**switches, **launch["queries"]}
    numbers = {"partial_ptr": "*fp32", "item_ptr": "*i32", "last_ptr": "*i32", "position_ptr": "*i32", **NUMBERS}
    yield "keys", tree_tiles._keys_kernel, {**tensors, **arriving, **numbers}, {**switches, **launch["keys"]}
    types = {"partial_ptr": "*fp32", "dk_ptr": f"*{dtype}", "dv_ptr": f"*{dtype}", "first_ptr": "*i32"}
    blocks = {name: launch["keys"][name] for name in ("BLOCK_D", "BLOCK_K")}
    settings = {"D": dim, **blocks, **tree_tiles.MERGE_LAUNCH}
    yield "merge", tree_tiles._merge_kernel, {**types, "L": "i32", "kv_heads": "i32"}, settings


USUAL = [("sm_90", "bf16", 64), ("sm_90", "bf16", 128), ("sm_90", "bf16", 256), ("sm_80", "bf16", 128)]
USUAL += [("sm_100", "bf16", 128), ("gfx942", "bf16", 128), ("sm_90", "fp32", 64), ("sm_90", "fp32", 256)]
WIDTHS = (16, 32, 64, 128, 256)  # of blocks: another head dimension takes the next one
REST = [
    each for each in itertools.product(TARGETS, DTYPES, WIDTHS)
    if each not in USUAL and not (each[0] == "gfx942" and each[1] == "fp32")
]  # fmt: skip


@pytest.mark.parametrize("target,dtype,dim", [*USUAL, *(pytest.param(*each, marks=pytest.mark.slow) for each in REST)])
@pytest.mark.parametrize("scores", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "cap and window"])
def test_nothing_is_spilled(target, dtype, dim, scores):
    if target == "gfx942" and scores:
        pytest.skip("its tiles are chosen for plain scores")
    for name, kernel, types, settings in kernels(target, dtype, dim, cap=scores, window=scores):
        used = resources(compile_ahead(kernel, target, types, settings, [t for t in types if t.endswith("_ptr")]))
        print(f"{target:7} {name} {settings}: {used}")
        # On AMD scalars go to lanes of vector registers, which costs an instruction and no memory. Far below the 255
        # registers that there are the compiler may give up a few numbers for more blocks at a time.
        few = 48 if used["registers"] <= 128 else 0
        assert used["spills"] - used.get("scalars", 0) <= few and used["shared"] <= SHARED[target], f"{name}: {used}"


@pytest.mark.parametrize("target,dtype,dim", [("sm_90", "bf16", 80), ("sm_90", "fp32", 64), ("gfx942", "fp16", 128)])
def test_caps_windows_and_the_other_dtypes_compile(target, dtype, dim):
    for name, kernel, types, settings in kernels(target, dtype, dim, cap=True, window=True):
        assert compile_ahead(kernel, target, types, settings).metadata.shared <= SHARED[target], name


def test_hopper_multiplies_four_warps_at_once():
    for name, kernel, types, settings in kernels("sm_90", "bf16", 128):
        ptx = compile_ahead(kernel, "sm_90", types, settings, [t for t in types if t.endswith("_ptr")]).asm["ptx"]
        assert name == "merge" or ("wgmma.mma_async" in ptx and "mma.sync" not in ptx), name


def test_no_length_is_compiled_in():
    """Numbers that change from batch to batch are neither constants nor looked at for divisors."""
    for _, kernel, _, settings in kernels("sm_90", "bf16", 128):
        changing = {p.name for p in kernel.params} & {"L", "window", "begin", "end"}
        fixed = {p.name for p in kernel.params if p.is_constexpr or not p.do_not_specialize}
        assert not changing & fixed and not changing & set(settings)
