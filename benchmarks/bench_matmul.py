"""float32 matrix products on CPU: those of a linear layer, and of a vocabulary head, forward and backward.

torch takes its own from MKL; oneDNN, which it carries too, serves float32 only when asked by name.
"""

import pytest
import torch
from measure import Provider, compare, near

from fuserl.kernels.matmul import matmul, native

# Rows, inner dimension, columns, and which factor's columns stand together: b = weight.T, or a = gradient.T.
CASES = {
    "a token of 64 rollouts, up": (64, 576, 1536, "b"),
    "a token of 64 rollouts, down": (64, 1536, 576, "b"),
    "2048 tokens, up": (2048, 576, 1536, "b"),
    "2048 tokens, d_input": (2048, 1536, 576, ""),
    "2048 tokens, d_weight": (1536, 2048, 576, "a"),
    "head, 512 rows of logits": (512, 576, 49152, "b"),
    "head, d_hidden": (512, 49152, 576, ""),
    "head, d_weight": (49152, 512, 576, "a"),
}


@pytest.mark.parametrize("case", CASES)
def test_matmul(benchmark, device, smoke, case):
    if not native(torch.device(device), torch.float32):
        pytest.skip("products are torch's on this machine")
    n, k, m, by_columns = CASES[case]
    n, m = (min(n, 64), min(m, 64)) if smoke else (n, m)
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(*((k, n) if by_columns == "a" else (n, k)), generator=draw)
    b = torch.randn(*((m, k) if by_columns == "b" else (k, m)), generator=draw)
    a, b = a.T if by_columns == "a" else a, b.T if by_columns == "b" else b
    out = torch.empty(n, m)
    right = near((a.double() @ b.double(),), rtol=1e-4, atol=1e-3)

    def onednn():
        return (torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], ""),)

    compare(
        benchmark,
        Provider("torch.mm", lambda: (torch.mm(a, b, out=out),)),
        Provider("fuserl", lambda: (matmul(a, b, out=out),), right),
        Provider("oneDNN", onednn, right),
        rounds=25,
        operations=2 * n * k * m,
        smoke=smoke,
    )
