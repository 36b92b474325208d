"""Liger's fused-linear losses over our ops, by its names: the `import` line is all that changes.

    from fuserl.trainers.liger import LigerFusedLinearGRPOLoss    # was liger_kernel.chunked_loss

Written after liger-kernel 0.8.5, which need not be installed. Arguments, defaults and returns are Liger's; each module
says where results differ. Two things do everywhere: a loss's backward runs once, as its gradients exist after the
forward, and an option that has no effect in Liger raises here. `report()` lists what is here and what is left to Liger.
"""

from fuserl.trainers.liger.cross_entropy import (
    CrossEntropyOutput,
    LigerFusedLinearCrossEntropyFunction,
    LigerFusedLinearCrossEntropyLoss,
    LigerFusedLinearScaledCrossEntropyFunction,
    LigerFusedLinearScaledCrossEntropyTPFunction,
    liger_fused_linear_cross_entropy,
    liger_fused_linear_scaled_cross_entropy_tp,
)
from fuserl.trainers.liger.distillation import LigerFusedLinearJSD, LigerFusedLinearJSDLoss
from fuserl.trainers.liger.grpo import LigerFusedLinearGRPOFunction, LigerFusedLinearGRPOLoss
from fuserl.trainers.liger.preference import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearKTOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)
from fuserl.trainers.patching import Report

__all__ = [
    "CrossEntropyOutput",
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearCrossEntropyFunction",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearGRPOFunction",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearJSD",
    "LigerFusedLinearJSDLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearScaledCrossEntropyFunction",
    "LigerFusedLinearScaledCrossEntropyTPFunction",
    "LigerFusedLinearSimPOLoss",
    "liger_fused_linear_cross_entropy",
    "liger_fused_linear_scaled_cross_entropy_tp",
    "report",
]

_LEFT = {
    "LigerFusedLinearCosineSimilarityLoss": "the cosine of two rows of logits is no function of the outputs we have",
    "LigerFusedLinearKLDivLoss": "its teacher is a (tokens, vocabulary) tensor; use fuserl.linear_topk_divergence",
    "LigerFusedLinearPreferenceBase, LigerFusedLinearPPOBase, LigerFusedLinearDistillationBase":
        "for losses of your own use fuserl.linear_policy_loss, which takes any",
    "LigerFusedLinearDPOFunction, ...JSDFunction, and the like": "call the class of the same name that ends in Loss",
    "RMSNorm, rope, SwiGLU and other layers": "they are no losses; both libraries run side by side",
}  # fmt: skip


def report() -> Report:
    """What of liger-kernel has a name here, and what is left to it, with the reason."""
    ours = {name: [f"fuserl.trainers.liger.{name}"] for name in __all__ if name != "report"}
    return Report("liger-kernel 0.8.5", ours, dict(_LEFT))


def __getattr__(name: str):
    if name.lower().startswith("liger"):
        raise AttributeError(
            f"fuserl.trainers.liger: the name must be one that it has; got {name}. Keep importing it from "
            "liger_kernel; report() says why it is left."
        )
    raise AttributeError(f"module 'fuserl.trainers.liger' has no attribute {name!r}; it has {', '.join(__all__)}")
