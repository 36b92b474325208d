"""sample: against one read of the logits and against torch's sampler, without cuts and with each."""

import pytest
import torch
from measure import Provider, compare

from fuserl.kernels.sample import sample

CASES = {"all": {}, "top_k": {"top_k": 50}, "top_p": {"top_p": 0.95}, "top_k_top_p": {"top_k": 50, "top_p": 0.95}}


def inputs(device, smoke):
    """Logits of one decode step, and the names of its rows."""
    rows, vocabulary, dtype = (256, 151936, torch.bfloat16) if device == "cuda" else (64, 49152, torch.float32)
    if smoke:
        rows, vocabulary = 4, 1000
    logits = (torch.randn(rows, vocabulary, device=device) * 4).to(dtype)
    return logits, torch.arange(rows, device=device)


def cut(logits, top_k=0, top_p=1.0):
    """Logits with -inf for tokens that are cut."""
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        logits = logits.scatter(-1, order, ordered.masked_fill(p.cumsum(-1) - p >= top_p, -torch.inf))
    return logits


def eager(logits, cuts):
    """Tokens by torch.multinomial, and their log-probs, before and after the cuts."""
    left, full = (x.log_softmax(-1) for x in (cut(logits.float(), **cuts), logits.float()))
    ids = torch.multinomial(left.exp(), 1)
    return ids[:, 0], left.gather(-1, ids)[:, 0], full.gather(-1, ids)[:, 0]


@pytest.mark.parametrize("case", CASES)
def test_sample(benchmark, device, smoke, case):
    cuts, (logits, names) = CASES[case], inputs(device, smoke)
    truth = [x.double().log_softmax(-1) for x in (cut(logits.double(), **cuts), logits)]

    def right(result):
        ids, *logprobs = result
        for got, expected in zip(logprobs, truth, strict=True):
            torch.testing.assert_close(got.double(), expected.gather(-1, ids[:, None])[:, 0], rtol=1e-5, atol=2e-5)

    compare(
        benchmark,
        Provider("read the logits: x.sum()", logits.sum),
        Provider("fuserl", lambda: sample(logits, **cuts, seed=0, rollout_ids=names, positions=names), right),
        Provider("torch eager", lambda: eager(logits, cuts), right),
        smoke=smoke,
        rounds=15,
    )
