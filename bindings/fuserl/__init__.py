"""Fused kernels for reinforcement-learning post-training of language models.

The ops are imported on first use, so that `import fuserl` costs nothing:

    import fuserl
    logprob, entropy = fuserl.token_logprob(logits, ids)
"""

from importlib import import_module
from importlib.metadata import version as _version

__version__ = _version("fuserl")

OPS = (
    "chunked_context_attention",
    "discounted_scan",
    "divergence",
    "gae",
    "gaussian_logprob",
    "group_advantage",
    "linear_divergence",
    "linear_logprob",
    "linear_policy_loss",
    "linear_topk_divergence",
    "policy_loss",
    "preference_loss",
    "sample",
    "sampled_divergence",
    "segment_sum",
    "token_logprob",
    "topk_divergence",
    "tree_attention",
    "tree_decode",
)
# What stands on other ops or is given to one, and the file it lives in.
_FORMS = {
    "BradleyTerry": "preferences",
    "CPO": "preferences",
    "Clip": "surrogates",
    "DPO": "preferences",
    "Gate": "surrogates",
    "Hinge": "preferences",
    "IPO": "preferences",
    "KTO": "preferences",
    "ORPO": "preferences",
    "SimPO": "preferences",
    "Truncate": "surrogates",
    "Weight": "surrogates",
    "Within": "surrogates",
    "group_ranks": "group_ranks",
    "lambda_returns": "returns",
    "pair_advantage": "pair_advantage",
    "pass_at_k_advantage": "pass_at_k_advantage",
    "returns": "returns",
    "segment_mean": "segment_sum",
    "to_tokens": "segment_sum",
    "vtrace": "returns",
}
__all__ = [*OPS, *_FORMS, "backends"]


def backends() -> dict[str, str | None]:
    """Name every backend; the value is None where it can run on this machine, else the reason why it cannot."""
    from fuserl.kernels.dispatch import backends

    return backends()


def __getattr__(name: str):
    if name in OPS or name in _FORMS:
        found = getattr(import_module(f"fuserl.kernels.{_FORMS.get(name, name)}"), name)
        if not isinstance(found, type):
            found = import_module("fuserl.arrays").taking_arrays(found)
        globals()[name] = found
        return found
    raise AttributeError(f"module 'fuserl' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__():
    return sorted([*globals(), *OPS, *_FORMS])
