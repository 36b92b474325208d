"""Compile Triton kernels for machines that are not here, and read from the machine code what they use.

A launch tells the compiler which arguments 16 divides; without that there are no wide loads, and the figures mean
nothing. So every kernel is compiled with and without it. It cannot be done in a process that has TRITON_INTERPRET=1.
"""

import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def compile_ahead(kernel, target, types, settings, aligned=()):
    """The compiled kernel for one of TARGETS.

    `types` maps run-time arguments to Triton's type names, `settings` compile-time arguments and options to values;
    `aligned` names the arguments that are multiples of 16.
    """
    options = {name: value for name, value in settings.items() if name in _OPTIONS}
    constants = {name: value for name, value in settings.items() if name not in _OPTIONS}
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[target], options=options)


def resources(compiled):
    """Registers a thread, bytes of shared memory, and bytes or registers spilled; on AMD, the scalars among those.

    A scalar register is spilled into a lane of a vector register, not to memory.
    """
    shared = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        found = {name: int(re.search(rf"\.{name}:\s+(\d+)", compiled.asm["amdgcn"])[1]) for name in _AMD}
        spills = found["vgpr_spill_count"] + found["sgpr_spill_count"] + found["private_segment_fixed_size"]
        return {
            "registers": found["vgpr_count"], "shared": shared, "spills": spills, "scalars": found["sgpr_spill_count"],
        }  # fmt: skip
    listing = _resource_usage(compiled.asm["cubin"])
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", listing)[1]) for name in ("REG", "STACK", "LOCAL"))
    return {"registers": registers, "shared": shared, "spills": stack + local}


_AMD = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")


def _resource_usage(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
