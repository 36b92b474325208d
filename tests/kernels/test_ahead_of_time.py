"""Every Triton kernel, for every machine we name, without one at hand: it compiles and spills no register."""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter and the compiler cannot share a process", allow_module_level=True)

from ahead_of_time import TARGETS, compile_ahead, resources

from fuserl.kernels import softmax_rows

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
    for error in (False, True):
        yield "gradient", softmax_rows._gradient_kernel, types, {"ERROR": error, **softmax_rows.GRADIENT_LAUNCH}


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
