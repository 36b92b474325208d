"""Tile sizes of the Triton kernels of tree_attention, by dtype and head dimension."""

import torch

# (queries, keys, warps, stages) of the forward, dq and dk/dv kernels up to a head dimension: what compiles without a
# register spilled for sm_80, sm_90 and sm_100, and for gfx942, whose wavefronts are twice as wide.
_HALVES = {
    64: ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2)),
    128: ((128, 32, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
    256: ((64, 32, 8, 2), (32, 64, 8, 1), (32, 32, 8, 1)),
}
_CAPPED_HALVES = {
    64: ((128, 64, 8, 3), (64, 64, 8, 2), (32, 64, 4, 2)),
    128: ((128, 32, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
    256: _HALVES[256],
}
# Where 227 KiB of shared memory feed products of four warps at once.
_HOPPER_HALVES = {**_HALVES, 128: ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 8, 2))}
_FLOATS = {
    64: ((16, 16, 4, 1), (32, 32, 8, 1), (16, 16, 4, 1)),
    128: ((16, 16, 4, 1), (16, 16, 8, 1), (16, 16, 4, 1)),
    256: ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 4, 1)),
}
_AMD_HALVES = {
    64: ((64, 64, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1)),
    128: ((128, 32, 8, 1), (64, 32, 4, 1), (32, 32, 4, 1)),
    256: ((32, 32, 4, 1), (32, 16, 4, 1), (32, 16, 4, 1)),
}
_AMD_FLOATS = dict.fromkeys((64, 128, 256), 3 * ((16, 16, 4, 1),))


def launch(
    dim: int, dtype: torch.dtype, capped: bool, amd: bool = torch.version.hip is not None, hopper: bool = False
) -> dict[str, dict]:
    """Tile sizes and options of the three kernels with products; a cap's tanh takes registers."""
    halves = _AMD_HALVES if amd else _CAPPED_HALVES if capped else _HOPPER_HALVES if hopper else _HALVES
    table = (_AMD_FLOATS if amd else _FLOATS) if dtype == torch.float32 else halves
    width = max(16, 1 << (dim - 1).bit_length())
    names = ("BLOCK_Q", "BLOCK_K", "num_warps", "num_stages")
    rows = table[max(64, width)]
    return {
        kernel: {**dict(zip(names, row, strict=True)), "BLOCK_D": width, "enable_fp_fusion": True}
        for kernel, row in zip(("forward", "queries", "keys"), rows, strict=True)
    }
