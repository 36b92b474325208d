"""What other libraries offer for the work of the two ops of the vocabulary head, behind one signature each.

`scorers()` are functions (hidden (N, D), weight (V, D), ids (N,)) -> (logprob (N,), entropy (N,) or None where the
library has none), differentiable; a loss of them is the same three lines for all. `liger_grpo` has its loss built in.
A library that is not installed raises ImportError when it is called.
"""

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


def scorers() -> dict[str, tuple[Callable, bool]]:
    """Provider's name, its function, and whether that gives the entropy."""
    return {
        "torch.compile of eager": (compiled, True),
        _named("trl", "ChunkedLogProbFunction"): (trl, True),
        _named("cut-cross-entropy", "linear_cross_entropy, no entropy"): (cut_cross_entropy, False),
        _named("liger-kernel", "FusedLinearScaledCrossEntropy"): (liger, True),
        _named("verl", "FusedLinearForPPO"): (verl, True),
    }


def eager(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Through all logits, in plain torch."""
    logp = (hidden @ weight.T).float().log_softmax(-1)
    return logp.gather(1, ids[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


compiled = torch.compile(eager)


def trl(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """As `add_fused_lm_head` calls it: tiles of 4096 rows and 32768 tokens, in hidden's dtype."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as tokens

    found = ChunkedLogProbFunction.apply(hidden, weight, None, ids, 1.0, tokens, None, 1.0, ("entropy",))
    return found[0], found[1]


def cut_cross_entropy(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, None]:
    """Its kernels on a GPU, with the filter off so that gradients are exact; on a CPU its `torch_compile`."""
    from cut_cross_entropy import linear_cross_entropy

    options = {"impl": "cce", "filter_eps": None} if hidden.is_cuda else {"impl": "torch_compile"}
    return -linear_cross_entropy(hidden, weight, ids, reduction="none", **options), None


def liger(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What verl plugs in as `impl_backend: liger`; on a CPU it is the torch fallback of the same library."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    nll, entropy = Function.apply(hidden, weight, ids, 1.0, -100, 1, True)
    return -nll, entropy


def verl(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """verl's `impl_backend: torch`."""
    return _verl_functional().FusedLinearForPPO()(hidden, weight, ids)


def liger_grpo(
    hidden: Tensor, weight: Tensor, ids: Tensor, advantages: Tensor, old_logprobs: Tensor, length: int
) -> Tensor:
    """The clipped loss of `LigerFusedLinearGRPOLoss`, mean over tokens; rollouts of `length` tokens.

    Each has one advantage. Not compiled: with `compiled=True` every call builds the compiled function anew.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="bnpo")
    ids = ids.view(-1, length)
    return loss(
        hidden.view(*ids.shape, -1), weight, ids, torch.ones_like(ids, dtype=torch.float32),
        advantages.view_as(ids)[:, 0], old_per_token_logps=old_logprobs.view_as(ids),
    )[0]  # fmt: skip


def _named(package: str, symbol: str) -> str:
    """The symbol with its package and, where that is installed, the version."""
    try:
        return f"{package} {importlib.metadata.version(package)} {symbol}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} {symbol}"


GRPO = _named("liger-kernel", "FusedLinearGRPOLoss(compiled=False), no entropy")


@functools.cache
def _verl_functional():
    """The file alone: importing verl as a package needs ray and starts its machinery."""
    package = importlib.util.find_spec("verl")
    if package is None:
        raise ImportError("No module named 'verl'")
    path = Path(package.origin).parent / "utils" / "experimental" / "torch_functional.py"
    spec = importlib.util.spec_from_file_location("verl_torch_functional", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
