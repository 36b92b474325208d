"""The vocabulary head and the logits that ops are timed on, and when a gradient through the head is right."""

import torch
from measure import relative_error
from torch import Tensor


def operands(device: str, smoke: bool) -> tuple[Tensor, Tensor]:
    """Hidden states (N, D) and a head's weight (V, D): a small model's, or on a GPU a large one's in bfloat16."""
    rows, width, vocabulary = (2048, 576, 49152) if device == "cpu" else (16384, 4096, 128256)
    if smoke:
        rows, width, vocabulary = 64, 16, 500
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden, weight = torch.randn(rows, width, device=device), torch.randn(vocabulary, width, device=device) * 0.1
    return hidden.to(dtype), weight.to(dtype)


def logits(device: str, smoke: bool) -> Tensor:
    """Peaky logits (N, V): of a small model, or on a GPU those of a large one's vocabulary in bfloat16."""
    rows, vocabulary = (1024, 49152) if device == "cpu" else (8192, 151936)
    if smoke:
        rows, vocabulary = 16, 1000
    return (4 * torch.randn(rows, vocabulary, device=device)).to(torch.bfloat16 if device == "cuda" else torch.float32)


def check_gradient(got: Tensor, truth: Tensor, *, of: str = "d_hidden", coarse: float = 2e-2) -> float:
    """The relative error of got in norm; AssertionError where rounding does not explain it.

    Args:
        got: of any floating dtype.
        truth: of got's shape, in float64, or another library's.
        of: what it is the gradient to.
        coarse: relative error allowed in bfloat16; in any other dtype it is 1e-4.
    """
    error = relative_error(got, truth)
    assert error < (coarse if got.dtype == torch.bfloat16 else 1e-4), f"relative error {error:.1e} of {of}"
    return error
