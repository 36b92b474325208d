"""Every Triton kernel, for every machine we name, without one at hand: it compiles and spills no register."""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter and the compiler cannot share a process", allow_module_level=True)

from ahead_of_time import TARGETS, compile_ahead, resources

from fuserl.kernels import (
    divergence_rows,
    gaussian_tiles,
    policy_tokens,
    preference_pairs,
    sample,
    sampled_divergence,
    scan_tiles,
    segment_sum,
    softmax_rows,
)

SIZES = {"temperature": "fp32", "N": "i32", "R": "i32", "V": "i32", "stride_a": "i64", "stride_r": "i32"}
ALIGNED = ("x_ptr", "out_ptr", "V", "stride_a", "stride_r", "out_stride_a", "out_stride_r")


def kernels(dtype):
    """(name, kernel, types of its run-time arguments, its settings) for logits of `dtype`."""
    number = "fp64" if dtype == "fp64" else "fp32"
    x, ids, numbers = {"x_ptr": f"*{dtype}"}, {"id_ptr": "*i64"}, f"*{number}"
    for more in (False, True):
        types = {**x, "partial_ptr": numbers, **SIZES}
        yield "segment", softmax_rows._segment_kernel, types, {"MORE": more, **softmax_rows.STATISTICS_LAUNCH}
    types = {**x, **ids, "partial_ptr": numbers, "statistics_ptr": numbers, **SIZES, "segments": "i32"}
    settings = {"ERROR": True, "MORE": True, "SEGMENTS": 16, "SEGMENT": 16384, **softmax_rows.MERGE_LAUNCH}
    yield "merge", softmax_rows._merge_kernel, types, settings
    types = {**x, **ids, "lse_ptr": numbers, "coefficients_ptr": numbers, "out_ptr": f"*{dtype}", **SIZES}
    types |= {"out_stride_a": "i64", "out_stride_r": "i32"}
    for error, tanh in ((False, False), (True, False), (True, True)):
        settings = {"ERROR": error, "THROUGH_TANH": tanh, **softmax_rows.GRADIENT_LAUNCH}
        yield "gradient", softmax_rows._gradient_kernel, types, settings


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
def test_no_spills(target, dtype, aligned):
    for name, kernel, types, settings in kernels(dtype):
        divisible = [argument for argument in types if aligned and argument in ALIGNED]
        compiled = compile_ahead(kernel, target, types, {"row_temperature_ptr": None, **settings}, divisible)
        used = resources(compiled)
        assert used["spills"] == 0, f"{name} {settings}: {used}"
        print(f"{target:7} {dtype} {'aligned' if aligned else '':8} {name} {settings}: {used}")


def test_wide_loads():
    """Aligned bfloat16 logits travel sixteen bytes at a time."""
    for name, kernel, types, settings in kernels("bf16"):
        if name in ("segment", "gradient"):
            divisible = [argument for argument in types if argument in ALIGNED]
            compiled = compile_ahead(kernel, "sm_90", types, {"row_temperature_ptr": None, **settings}, divisible)
            assert "ld.global.v4.b32" in compiled.asm["ptx"], f"{name} {settings}"


@pytest.mark.parametrize("dtype", ["fp16", "fp64"])
def test_row_temperature_and_the_other_dtypes_compile(dtype):
    for _, kernel, types, settings in kernels(dtype):
        types = {**types, "row_temperature_ptr": "*fp64" if dtype == "fp64" else "*fp32"}
        assert compile_ahead(kernel, "sm_90", types, settings).asm["cubin"]


INPUTS = ("logprob_ptr", "advantage_ptr", "old_ptr", "ref_ptr", "weight_ptr", "rollout_ptr", "entropy_ptr")
TOKENS = (*INPUTS, "log_weight_ptr", "loss_ptr", "derivative_ptr")


def policy_kernels(number):
    """As `kernels`, of policy_loss for log-probs of type `number`: everything, and the least that there can be."""
    kernel, partial = policy_tokens._token_kernel, {"partial_ptr": f"*{number}"}
    numbers = {p.name: p.annotation_type for p in kernel.params if p.annotation_type}
    every = {**dict.fromkeys(TOKENS, f"*{number}"), "mask_ptr": "*i1", **partial, "N": "i32", **numbers}
    fixed = {"SCORE": False, "WEIGHTED": False, "TERMS": 17 if number == "fp64" else 9, **policy_tokens.TOKEN_LAUNCH}

    def of(settings, *absent):
        absent = dict.fromkeys(absent)
        types = {name: type_ for name, type_ in every.items() if name not in absent}
        return "policy tokens", kernel, types, {**fixed, **settings, **absent}

    for kind in (1, 2, 3):
        yield of({"SURROGATE": 0, "KL": kind}, "rollout_ptr", "log_weight_ptr", "entropy_ptr")
    for kind in (0, 1, 2):
        yield of({"SURROGATE": kind, "KL": 3, "WEIGHTED": True}, "log_weight_ptr")
    yield of({"SURROGATE": 1, "KL": 3, "SCORE": True}, "rollout_ptr")
    least = [name for name in (*TOKENS[2:], "mask_ptr") if name != "loss_ptr"]
    yield of({"SURROGATE": 0, "KL": 0}, *least)
    types = {**partial, "statistics_ptr": f"*{number}", "programs": "i32"}
    yield "policy merge", policy_tokens._merge_kernel, types, {"SUMS": 10, **policy_tokens.MERGE_LAUNCH}


def check_spills(target, kernels, divisible):
    """No kernel spills where the arguments whose names have these ends are divisible by 16."""
    for name, kernel, types, settings in kernels:
        aligned = [argument for argument in types if argument.endswith(divisible)]
        used = resources(compile_ahead(kernel, target, types, settings, aligned))
        assert used["spills"] == 0, f"{name} {settings}: {used}"
        print(f"{target:7} {divisible} {name} {settings}: {used}")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
def test_policy_loss_spills_nothing(target, aligned):
    check_spills(target, policy_kernels("fp32"), "_ptr" if aligned else ())


@pytest.mark.parametrize("target", TARGETS)
def test_policy_loss_in_double_compiles(target):
    for _, kernel, types, settings in policy_kernels("fp64"):
        assert compile_ahead(kernel, target, types, settings).asm


def test_policy_loss_reads_widely():
    """Aligned float32 tokens travel sixteen bytes at a time."""
    name, kernel, types, settings = next(policy_kernels("fp32"))
    compiled = compile_ahead(kernel, "sm_90", types, settings, [t for t in types if t.endswith("_ptr")])
    assert "ld.global.v4.b32" in compiled.asm["ptx"], name


def sample_kernel(dtype, cuts, row_temperature):
    """Types of the run-time arguments of sample's kernel, and its settings."""
    kernel = sample._row_kernel
    pointers = {"x_ptr": f"*{dtype}", "rollout_ptr": "*i64", "position_ptr": "*i64", "id_ptr": "*i64"}
    numbers = {p.name: p.annotation_type for p in kernel.params if p.annotation_type}
    types = {**pointers, "logprob_ptr": "*fp32", **numbers, "V": "i32", "stride": "i64"}
    settings = {"TOP_K": cuts, "TOP_P": cuts, "CUT": cuts or row_temperature, **sample.LAUNCH}
    if row_temperature:
        types["temperature_ptr"] = "*fp32"
    else:
        settings["temperature_ptr"] = None
    return kernel, types, settings


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_sample_spills_nothing(target, dtype):
    for cuts, row_temperature in ((False, False), (True, True)):
        kernel, types, settings = sample_kernel(dtype, cuts, row_temperature)
        for divisible in (["x_ptr", "V", "stride"], []):
            used = resources(compile_ahead(kernel, target, types, settings, divisible))
            # Unaligned, the compiler for sm_80 gives up a few scalars of the row, outside the loops, for occupancy.
            assert used["spills"] <= (0 if divisible else 16), f"{settings} {divisible}: {used}"
            print(f"{target:7} {dtype} {'aligned' if divisible else '':8} sample {settings}: {used}")


def test_sample_reads_widely_and_fuses_no_product():
    """Aligned bfloat16 logits travel sixteen bytes at a time; every backend rounds each product of a weight."""
    kernel, types, settings = sample_kernel("bf16", True, True)
    ptx = compile_ahead(kernel, "sm_90", types, settings, ["x_ptr", "V", "stride"]).asm["ptx"]
    assert "ld.global.v4.b32" in ptx and "fma.rn.f32" not in ptx


def divergence_kernels(dtype, kind):
    """As `kernels`, of divergence for logits of `dtype`; a gradient to p, and one to both."""
    number = "fp64" if dtype == "fp64" else "fp32"
    terms = {"KIND": kind, "TERMS": 17, "LOG_TERMS": 26} if number == "fp64" else {"TERMS": 9, "LOG_TERMS": 12}
    logits, rows = {"p_ptr": f"*{dtype}", "q_ptr": f"*{dtype}"}, ("temperature_ptr", "statistics_ptr", "partial_ptr")
    sizes = {"N": "i32", "V": "i32"} | {f"{name}_{side}": "i64" for side in "pq" for name in ("stride_a", "stride_r")}
    sizes |= {"R_p": "i32", "R_q": "i32", "parameter": "fp64"}
    settings = {**terms, "KIND": kind, **divergence_rows.SUMS_LAUNCH}
    yield "sums", divergence_rows._sums_kernel, {**logits, **dict.fromkeys(rows, f"*{number}"), **sizes}, settings
    types = {**dict.fromkeys(rows[1:], f"*{number}"), "N": "i32", "segments": "i32", "scale": "fp64"}
    yield "merge", divergence_rows._merge_kernel, types, {"SEGMENTS": 16, **divergence_rows.MERGE_LAUNCH}
    types = {**logits, **dict.fromkeys((*rows[:2], "g_ptr"), f"*{number}"), "out_p_ptr": f"*{dtype}", **sizes}
    types |= {"out_stride_a": "i64", "out_stride_r": "i64", "scale": "fp64"}
    settings = {**terms, "KIND": kind, **divergence_rows.GRADIENT_LAUNCH}
    yield "gradient", divergence_rows._gradient_kernel, types, {**settings, "out_q_ptr": None}
    yield "gradient", divergence_rows._gradient_kernel, {**types, "out_q_ptr": f"*{dtype}"}, settings


WIDE = ("p_ptr", "q_ptr", "out_p_ptr", "out_q_ptr", "V", "stride_a_p", "stride_r_p", "stride_a_q", "stride_r_q")
WIDE += ("out_stride_a", "out_stride_r")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", range(5))
def test_divergence_spills_nothing(target, kind):
    for name, kernel, types, settings in divergence_kernels("bf16", kind):
        divisible = [argument for argument in types if argument in WIDE]
        compiled = compile_ahead(kernel, target, types, settings, divisible)
        used = resources(compiled)
        assert used["spills"] == 0, f"{name} {settings}: {used}"
        assert target != "sm_90" or name == "merge" or "ld.global.v4.b32" in compiled.asm["ptx"], f"{name} {settings}"
        print(f"{target:7} {name} {settings}: {used}")


@pytest.mark.parametrize("kind", range(5))
def test_divergence_of_the_other_dtypes_compiles(kind):
    for dtype in ("fp32", "fp16", "fp64"):
        for _, kernel, types, settings in divergence_kernels(dtype, kind):
            assert compile_ahead(kernel, "sm_90", types, settings).asm["cubin"]


@pytest.mark.parametrize("number", ["fp32", "fp64"])
def test_sampled_divergence_spills_nothing(number):
    terms = {"TERMS": 17, "LOG_TERMS": 26} if number == "fp64" else {"TERMS": 9, "LOG_TERMS": 12}
    pointers = ("logprob_ptr", "ref_ptr", "value_ptr", "derivative_ptr")
    types = {**dict.fromkeys(pointers, f"*{number}"), "N": "i32", "parameter": "fp64", "scale": "fp64", "clamp": "fp64"}
    for estimator, kind in [(0, kind) for kind in range(5)] + [(1, 0), (2, 0), (3, 0)]:
        settings = {"ESTIMATOR": estimator, "SCORE": estimator == 3, "KIND": kind, **terms, **sampled_divergence.LAUNCH}
        used = resources(compile_ahead(sampled_divergence._kernel, "sm_90", types, settings, pointers))
        assert used["spills"] == 0, f"{settings}: {used}"


SCANS = {  # what of the pointers there is
    "scan": ("b", "x"),
    "scan with links, ragged": ("b", "a", "offsets", "x"),
    "gae": ("b", "value", "x", "returns"),
    "gae with everything": ("b", "offsets", "value", "gamma", "lam", "bootstrap", "mask", "x", "returns"),
}


def scan_kernels(number):
    """As `kernels`, of discounted_scan, gae and the sums of segments for numbers of type `number`."""
    kernel = scan_tiles._tile_kernel
    numbers = {p.name: p.annotation_type for p in kernel.params if p.annotation_type}
    for name, there in SCANS.items():
        pointers = {p: f"*{number}" for p in scan_tiles._POINTERS if p.removesuffix("_ptr") in (*there, "state")}
        pointers |= {p: type_ for p, type_ in (("offsets_ptr", "*i64"), ("mask_ptr", "*i1")) if p in pointers}
        absent = dict.fromkeys(p for p in scan_tiles._POINTERS if p not in pointers)
        types = {**pointers, "N": "i32", "segments": "i32", "programs": "i32", **numbers}
        for write in (False, True):
            for forward in (False, True)[: 2 - ("value" in there)]:
                yield name, kernel, types, {**absent, "FORWARD": forward, "WRITE": write, **scan_tiles.LAUNCH}
    types = {"x_ptr": f"*{number}", "offsets_ptr": "*i64", "out_ptr": f"*{number}", "N": "i32", "segments": "i32"}
    yield "segment sum", segment_sum._sum_kernel, types, segment_sum.LAUNCH
    yield "to tokens", segment_sum._spread_kernel, {**types, "programs": "i32"}, segment_sum.LAUNCH


@pytest.mark.parametrize("target", TARGETS)
def test_scans_spill_nothing(target):
    check_spills(target, scan_kernels("fp32"), "_ptr")


def test_scans_in_double_compile():
    for _, kernel, types, settings in scan_kernels("fp64"):
        assert compile_ahead(kernel, "sm_90", types, settings).asm["cubin"]


def preference_kernels(number):
    """As `kernels`, of preference_loss for log-probs of type `number`: everything, and the least that there can be."""
    kernel, double = preference_pairs._sum_kernel, "*fp64"
    every = {"logprob_ptr": f"*{number}", "ref_ptr": f"*{number}", "mask_ptr": "*i1", "offsets_ptr": "*i64"}
    every |= {"score_ptr": double, "nll_ptr": double, "length_ptr": double, "reward_ptr": f"*{number}", "scale": "fp64"}
    for mean, least in ((True, {}), (False, {"ref_ptr": None, "mask_ptr": None})):
        types = {name: type_ for name, type_ in every.items() if name not in least}
        yield "preference sums", kernel, types, {"MEAN": mean, **least, **preference_pairs.SUM_LAUNCH}
    kernel = preference_pairs._pair_kernel
    every = {"score_ptr": double, "nll_ptr": double, "length_ptr": double, "chosen_ptr": "*i64", "rejected_ptr": "*i64"}
    every |= {"desirable_ptr": "*i1", "baseline_ptr": f"*{number}", "margin_ptr": f"*{number}"}
    every |= {"loss_ptr": f"*{number}", "derivative_ptr": f"*{number}", "partial_ptr": double, "P": "i32", "R": "i32"}
    every |= {p.name: p.annotation_type for p in kernel.params if p.annotation_type}
    for link in range(5):
        absent = ("chosen_ptr", "rejected_ptr") if link == 3 else ("desirable_ptr", "baseline_ptr")
        least = dict.fromkeys(absent)
        types = {name: type_ for name, type_ in every.items() if name not in least}
        settings = {"LINK": link, "MEAN": link == 4, **least, **preference_pairs.PAIR_LAUNCH}
        yield "preference pairs", kernel, types, settings


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
def test_preference_loss_spills_nothing(target, aligned):
    check_spills(target, preference_kernels("fp32"), "_ptr" if aligned else ())


def test_preference_loss_in_double_compiles():
    for _, kernel, types, settings in preference_kernels("fp64"):
        assert compile_ahead(kernel, "sm_90", types, settings).asm["cubin"]


def gaussian_kernels(number):
    """As `kernels`, of gaussian_logprob for numbers of type `number`: everything, in every view, and the least."""
    inputs = ("action_ptr", "mean_ptr", "scale_ptr", "ref_mean_ptr", "ref_scale_ptr")
    results = ("logprob_ptr", "entropy_ptr", "kl_ptr")
    sizes = {"N": "i32", "D": "i32", **dict.fromkeys(inputs, f"*{number}"), "mask_ptr": "*i1"}
    ends = {
        "forward": (gaussian_tiles._forward_kernel, results),
        "backward": (gaussian_tiles._backward_kernel, [f"g_{name}" for name in results] + [f"d_{x}" for x in inputs]),
    }
    terms = {"TERMS": 17, "LOG_TERMS": 26} if number == "fp64" else {"TERMS": 9, "LOG_TERMS": 12}
    for name, (kernel, more) in ends.items():
        every = sizes | dict.fromkeys(more, f"*{number}")
        views = (True, True, True, 8), (True, False, False, 1024), (False, True, False, 8), (False, False, True, 1024)
        for row, dimension, logs, block in views:
            apart = {"PER_ROW": row, "PER_DIMENSION": dimension, "REF_PER_ROW": dimension, "REF_PER_DIMENSION": row}
            rows = gaussian_tiles.TILE // block
            fixed = {"LOGS": logs, **apart, "ROWS": rows, "BLOCK": block, **terms, **gaussian_tiles.LAUNCH}
            yield f"gaussian {name}", kernel, every, {"MASK_PER_ROW": row, **fixed}
        least = [x for x in every if x.removeprefix("g_").removeprefix("d_").startswith(("ref", "mask", "ent", "kl"))]
        types = {x: type_ for x, type_ in every.items() if x not in least}
        yield f"gaussian {name}", kernel, types, {"MASK_PER_ROW": False, **fixed, **dict.fromkeys(least)}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
def test_gaussian_logprob_spills_nothing(target, aligned):
    check_spills(target, gaussian_kernels("fp32"), ("_ptr", "D") if aligned else ())


def test_gaussian_logprob_in_double_compiles():
    for _, kernel, types, settings in gaussian_kernels("fp64"):
        assert compile_ahead(kernel, "sm_90", types, settings).asm["cubin"]
