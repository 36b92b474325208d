"""Every Triton kernel, for every machine we name, without one at hand: it compiles and spills no register."""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter and the compiler cannot share a process", allow_module_level=True)

from ahead_of_time import TARGETS, compile_ahead, resources

from fuserl.kernels import policy_loss, sample, softmax_rows

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
    settings = {"ERROR": True, "MORE": True, "SEGMENTS": 16, **softmax_rows.MERGE_LAUNCH}
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


TOKENS = ("logprob_ptr", "advantage_ptr", "old_ptr", "ref_ptr", "weight_ptr", "loss_ptr", "derivative_ptr")


def policy_kernels(number):
    """As `kernels`, of policy_loss for log-probs of type `number`: everything, and the least that there can be."""
    partial = {"partial_ptr": f"*{number}"}
    numbers = {p.name: p.annotation_type for p in policy_loss._token_kernel.params if p.annotation_type}
    every = {**dict.fromkeys(TOKENS, f"*{number}"), "mask_ptr": "*i1", **partial, "N": "i32", **numbers}
    terms = {"TERMS": 17 if number == "fp64" else 9, **policy_loss.TOKEN_LAUNCH}
    for kind in (1, 2, 3):
        yield "policy tokens", policy_loss._token_kernel, every, {"KL_KIND": kind, **terms}
    least = dict.fromkeys(("old_ptr", "ref_ptr", "weight_ptr", "mask_ptr", "derivative_ptr"))
    types = {name: type_ for name, type_ in every.items() if name not in least}
    yield "policy tokens", policy_loss._token_kernel, types, {"KL_KIND": 0, **least, **terms}
    types = {**partial, "statistics_ptr": f"*{number}", "programs": "i32"}
    yield "policy merge", policy_loss._merge_kernel, types, policy_loss.MERGE_LAUNCH


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
def test_policy_loss_spills_nothing(target, aligned):
    for name, kernel, types, settings in policy_kernels("fp32"):
        divisible = [argument for argument in types if aligned and argument.endswith("_ptr")]
        used = resources(compile_ahead(kernel, target, types, settings, divisible))
        assert used["spills"] == 0, f"{name} {settings}: {used}"
        print(f"{target:7} {'aligned' if aligned else '':8} {name} {settings}: {used}")


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
