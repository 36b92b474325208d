"""From bfloat16 hidden states and head: logits in float32, so log-probs as good as float32 arithmetic makes them.

Held against float64 of the same bfloat16 values. The bar is 1.5 times the error of a float32 product and a float32
log-softmax; a library that stores its logits in bfloat16 errs by hundredths, more than a clip range of 0.2 should bear.
"""

import pytest
import torch

from fuserl.kernels.linear_logprob import linear_logprob
from fuserl.kernels.linear_policy_loss import linear_policy_loss

DEVICES = [pytest.param("cpu", "cpu"), pytest.param("cuda", "triton", marks=pytest.mark.gpu)]
ROWS, WIDTH, VOCABULARY = 256, 1024, 16384


def by_linear_logprob(hidden, weight, ids, backend):
    out = linear_logprob(hidden, weight, ids, outputs=("logprob", "entropy"), backend=backend)
    return out.logprob, out.entropy


def by_linear_policy_loss(hidden, weight, ids, backend):
    given = {"outputs": ("logprob", "entropy"), "backend": backend, "chunk": 100}
    _, out, _ = linear_policy_loss(hidden.requires_grad_(), weight, ids, lambda out, rows: -out.logprob, **given)
    return out.logprob, out.entropy


def of_logits(logits, ids):
    logp = logits.log_softmax(-1)
    return logp.gather(1, ids[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("device,backend", DEVICES)
@pytest.mark.parametrize("std", [1.0, 4.0])
@pytest.mark.parametrize("function", [by_linear_logprob, by_linear_policy_loss])
def test_log_probs_from_bfloat16(function, std, device, backend):
    hidden = torch.randn(ROWS, WIDTH, device=device).bfloat16()
    weight = (std * torch.randn(VOCABULARY, WIDTH, device=device) / WIDTH**0.5).bfloat16()
    ids = torch.randint(VOCABULARY, (ROWS,), device=device)
    truth = of_logits(hidden.double() @ weight.double().T, ids)
    if device == "cpu":
        logits = hidden.float() @ weight.float().T
    else:
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    tiles = of_logits((hidden @ weight.T).float(), ids)
    names = ("logprob", "entropy")
    for name, got, true, plain, tile in zip(
        names, function(hidden, weight, ids, backend), truth, of_logits(logits, ids), tiles, strict=True
    ):
        error, allowed, rounded = ((x.detach() - true).abs().max().item() for x in (got, plain, tile))
        print(f"{device} std {std} {name}: {error:.1e}, float32 {allowed:.1e}, bfloat16 logits {rounded:.1e}")
        assert error <= 1.5 * allowed
        assert rounded > 1000 * error or name == "entropy"
