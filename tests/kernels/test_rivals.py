"""The same numbers as TRL, Liger and verl: log-probs, entropies, losses, divergences, gradients, and where they err.

Parity means: both near float64, ours within twice their error. Each known defect of theirs is held against float64,
too, beside ours on the same inputs. The last test runs the file again under Triton's interpreter, for their kernels.
"""

import pytest
import torch
from backends import INTERPRETING, run_interpreted
from rivals import rival
from tolerance import check, check_rows

from fuserl.kernels.divergence import divergence
from fuserl.kernels.linear_logprob import linear_logprob, reference
from fuserl.kernels.linear_policy_loss import linear_policy_loss
from fuserl.kernels.policy_loss import policy_loss
from fuserl.kernels.token_logprob import token_logprob

interpreted = pytest.mark.skipif(not INTERPRETING, reason="runs in test_under_the_interpreter")
B, T, D, V = 3, 15, 24, 301


def trl_logits(logits, ids):
    functions = rival("trl", "trl.trainer.utils")
    return functions.selective_log_softmax_and_entropy(logits, ids)


def trl_two_calls(logits, ids):
    functions = rival("trl", "trl.trainer.utils")
    return functions.selective_log_softmax(logits, ids), functions.entropy_from_logits(logits)


def verl_logits(logits, ids):
    functions = rival("verl", "verl.utils.torch_functional")
    return functions.logprobs_from_logits(logits, ids), functions.entropy_from_logits(logits)


def verl_chunked(logits, ids):
    functions = rival("verl", "verl.utils.torch_functional")
    flat, rows = logits.flatten(0, 1), ids.flatten()
    entropy = functions.entropy_from_logits_with_chunking(flat, chunk_size=7)
    return functions.logprobs_from_logits_naive(flat, rows).view_as(ids), entropy.view_as(ids)


def trl_head(hidden, weight, ids):
    function, rows = rival("trl", "trl.kernels").ChunkedLogProbFunction, ids.flatten()
    found = function.apply(hidden.flatten(0, 1), weight, None, rows, 1.0, 128, None, 1.0, ("entropy",))
    return found[0].view_as(ids), found[1].view_as(ids)


def liger_head(hidden, weight, ids):
    function = rival("liger-kernel", "liger_kernel.ops").LigerFusedLinearScaledCrossEntropyFunction
    nll, entropy = function.apply(hidden.flatten(0, 1), weight, ids.flatten(), 1.0, -100, 1, True)
    return -nll.view_as(ids), entropy.view_as(ids)


def verl_head(hidden, weight, ids):
    return rival("verl", "verl.utils.experimental.torch_functional").FusedLinearForPPO(chunk_size=7)(
        hidden, weight, ids
    )


def our_head(hidden, weight, ids):
    out = linear_logprob(hidden, weight, ids, outputs=("logprob", "entropy"))
    return out.logprob, out.entropy


def true_head(hidden, weight, ids):
    out = reference(hidden, weight, ids, outputs=("logprob", "entropy"))
    return out.logprob, out.entropy


def operands(dtype=torch.float32, width=D, vocabulary=V):
    """Hidden states and a head that gives logits of standard deviation 4, and tokens."""
    hidden, weight = torch.randn(B, T, width).to(dtype), (4 * torch.randn(vocabulary, width) / width**0.5).to(dtype)
    return hidden, weight, torch.randint(vocabulary, (B, T))


def with_gradients(function, leaves, ids, g, dtype=None):
    """Log-prob and entropy, and the gradients of their sums with `g` (2, B, T)."""
    leaves = [leaf.detach().to(dtype or leaf.dtype).clone().requires_grad_() for leaf in leaves]
    outputs = function(*leaves, ids)
    sum((output * weight.to(output.dtype)).sum() for output, weight in zip(outputs, g, strict=True)).backward()
    return [output.detach().double() for output in outputs], [leaf.grad for leaf in leaves]


def compare(ours, theirs, truth, leaves, ids):
    """Ours and theirs near the truth in float64, and ours at most twice as far as theirs."""
    g = torch.randn(2, *ids.shape)
    true, d_true = with_gradients(truth, leaves, ids, g, torch.float64)
    other, d_other = with_gradients(theirs, leaves, ids, g)
    got, d_got = with_gradients(ours, leaves, ids, g)
    for name, a, b, c in zip(("logprob", "entropy"), got, true, other, strict=True):
        torch.testing.assert_close(c, b, rtol=1e-4, atol=1e-4)
        check(name, a, b, c, torch.float32)
    for a, b, c in zip(d_got, d_true, d_other, strict=True):
        assert (c - b).norm() < 1e-4 * b.norm()
        check_rows("gradient", a, b, c, torch.float32)


@pytest.mark.parametrize("theirs", [trl_logits, trl_two_calls, verl_logits, verl_chunked])
def test_from_logits(theirs):
    ids = torch.randint(V, (B, T))
    compare(token_logprob, theirs, token_logprob, [4 * torch.randn(B, T, V)], ids)


@pytest.mark.parametrize("theirs", [trl_head, liger_head, verl_head])
def test_from_hidden_states(theirs):
    *leaves, ids = operands()
    compare(our_head, theirs, true_head, leaves, ids)


@pytest.mark.parametrize("kind", ["bnpo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_loss_of_liger(kind, beta):
    """LigerFusedLinearGRPOLoss and linear_policy_loss with policy_loss inside: value and both gradients."""
    module = rival("liger-kernel", "liger_kernel.chunked_loss")
    hidden, weight, ids = operands()
    mask, advantages = torch.arange(T) < torch.tensor([[T], [4], [9]]), torch.randn(B)
    logprob = our_head(hidden, weight, ids)[0]
    old, ref = (logprob + 0.3 * torch.randn(B, T) for _ in range(2))
    weights = {"bnpo": 1 / mask.sum(), "grpo": 1 / (mask.sum(1, keepdim=True) * B), "dr_grpo": 1 / torch.tensor(B * 20)}
    flat = [x.flatten() for x in (advantages[:, None].expand(B, T), old, ref, weights[kind] * mask)]

    def token_loss(out, rows):
        given = [x[rows].to(out.logprob.dtype) for x in flat]
        names = ("advantages", "old_logprobs", "ref_logprobs", "weights")
        return policy_loss(out.logprob, beta=beta, **dict(zip(names, given, strict=True)))[0]

    def ours(hidden, weight):
        options = {"chunk": 10} if hidden.dtype == torch.float32 else {"backend": "reference"}
        live = None if hidden.dtype == torch.float64 else mask.flatten()
        return linear_policy_loss(hidden.flatten(0, 1), weight, ids.flatten(), token_loss, live=live, **options)[0]

    def theirs(hidden, weight):
        loss = module.LigerFusedLinearGRPOLoss(
            beta=beta, compiled=False, use_ref_model=beta > 0, loss_type=kind, max_completion_length=20
        )
        given = {"ref_per_token_logps": ref, "old_per_token_logps": old}
        return loss(hidden, weight, ids, mask.float(), advantages, **given)[0]

    results = []
    for function, dtype in ((ours, torch.float64), (theirs, torch.float32), (ours, torch.float32)):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden.clone(), weight.clone())]
        loss = function(*leaves)
        results.append([loss.detach().double()[None], *torch.autograd.grad(loss, leaves)])
    true, other, got = results
    torch.testing.assert_close(other[0], true[0], rtol=1e-5, atol=1e-6)
    check("loss", got[0], true[0], other[0], torch.float32)
    for name, a, b, c in zip(("d_hidden", "d_weight"), got[1:], true[1:], other[1:], strict=True):
        assert (c - b).norm() < 1e-5 * b.norm()
        check_rows(name, a.flatten(0, -2), b.flatten(0, -2), c.flatten(0, -2), torch.float32)


def liger_divergence(student, teacher, beta):
    function = rival("liger-kernel", "liger_kernel.chunked_loss.jsd_loss").LigerFusedLinearJSDFunction
    rows = zip(student.flatten(0, 1), teacher.flatten(0, 1), strict=True)
    return torch.stack([function.distillation_loss_fn(p[None], q[None], beta=beta) for p, q in rows]).view(B, T)


def trl_divergence(student, teacher, beta):
    """Of hidden states; an identity matrix as head makes them logits."""
    function = rival("trl", "trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    head = torch.eye(student.shape[-1])
    found = function.apply(student.flatten(0, 1), head, None, teacher.flatten(0, 1), head, None, beta)
    return found[0].view(B, T)


@pytest.mark.parametrize("theirs", [liger_divergence, trl_divergence])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_divergence(theirs, beta):
    kind = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jensen_shannon")
    student, teacher, g = 4 * torch.randn(B, T, V), 4 * torch.randn(B, T, V), torch.randn(B, T)
    results = []
    for function, dtype in ((None, torch.float64), (theirs, torch.float32), (None, torch.float32)):
        p, q = student.to(dtype).clone().requires_grad_(), teacher.to(dtype)
        value = divergence(p, q, kind, beta=beta)[0] if function is None else function(p, q, beta)
        results.append((value.detach().double(), *torch.autograd.grad((value * g).sum(), p)))
    true, other, got = results
    torch.testing.assert_close(other[0], true[0], rtol=1e-5, atol=1e-5)
    check("divergence", got[0], true[0], other[0], torch.float32)
    assert (other[1] - true[1]).norm() < 1e-5 * true[1].norm()
    check_rows("gradient", got[1], true[1], other[1], torch.float32)


def worst(found, truth):
    """Largest absolute error, infinite where NaN."""
    return (found.double() - truth).abs().nan_to_num(torch.inf).max().item()


@pytest.mark.parametrize("theirs", [trl_head, liger_head, verl_head])
def test_bfloat16_logits_are_theirs(theirs):
    """They round logits to bfloat16: log-probs err by hundredths where ours err by millionths."""
    *leaves, ids = operands(torch.bfloat16, 256, 4000)
    truth = true_head(*(leaf.double() for leaf in leaves), ids)[0]
    rival({trl_head: "trl", liger_head: "liger-kernel", verl_head: "verl"}[theirs], "math", exactly=True)
    assert worst(theirs(*leaves, ids)[0], truth) > 0.02
    assert worst(our_head(*leaves, ids)[0], truth) < 2e-5


def test_bfloat16_entropy_is_theirs():
    """verl and Liger return the entropy in the hidden states' dtype."""
    *leaves, ids = operands(torch.bfloat16)
    for package, theirs in (("liger-kernel", liger_head), ("verl", verl_head)):
        rival(package, "math", exactly=True)
        assert theirs(*leaves, ids)[1].dtype == torch.bfloat16
    assert our_head(*leaves, ids)[1].dtype == torch.float32


@pytest.mark.parametrize("theirs", [trl_logits, verl_logits])
def test_bfloat16_log_probs_are_theirs(theirs):
    """Of bfloat16 logits verl and TRL return bfloat16 log-probs on a CPU: a ratio of two is good to a few per cent."""
    rival({trl_logits: "trl", verl_logits: "verl"}[theirs], "math", exactly=True)
    logits, ids = (4 * torch.randn(B, T, V)).bfloat16(), torch.randint(V, (B, T))
    truth = token_logprob(logits.double(), ids)[0]
    assert worst(theirs(logits, ids)[0], truth) > 0.02
    assert worst(token_logprob(logits, ids)[0], truth) < 2e-6


@pytest.mark.parametrize("theirs", [trl_logits, trl_two_calls, verl_logits, verl_chunked])
def test_entropy_with_a_token_that_cannot_be_drawn(theirs):
    """0 log 0 is NaN in theirs."""
    rival("trl" if theirs in (trl_logits, trl_two_calls) else "verl", "math", exactly=True)
    logits, ids = 4 * torch.randn(B, T, V), torch.zeros(B, T, dtype=torch.int64)
    logits[..., 5] = -torch.inf
    assert theirs(logits, ids)[1].isnan().all()
    assert worst(token_logprob(logits, ids)[1], token_logprob(logits.double(), ids)[1]) < 1e-5


def test_entropy_of_large_logits():
    """verl subtracts two numbers of the logits' size: at 1e4 its entropy is wrong in the third digit, ours is not."""
    rival("verl", "math", exactly=True)
    logits, ids = torch.randn(B, T, V) + 1e4, torch.zeros(B, T, dtype=torch.int64)
    truth = token_logprob(logits.double(), ids)[1]
    assert worst(verl_logits(logits, ids)[1], truth) > 5e-4
    assert worst(token_logprob(logits, ids)[1], truth) < 5e-6


def test_frozen_head_is_differentiated_by_verl(monkeypatch):
    """verl multiplies for d_weight, the largest of its products, also where the head wants none."""
    functional = rival("verl", "verl.utils.experimental.torch_functional", exactly=True)
    hidden, weight, ids = operands()
    made = []
    backward = functional._fused_linear_for_ppo_bwd
    monkeypatch.setattr(functional, "_fused_linear_for_ppo_bwd", lambda **k: made.append(backward(**k)) or made[-1])
    verl_head(hidden.requires_grad_(), weight, ids)[0].sum().backward()
    assert made and all(pair[1].shape == weight.shape for pair in made)


@interpreted
def test_liger_kernel_from_logits():
    """Liger's Triton kernel, which wants one row more than there are tokens."""
    function = rival("liger-kernel", "liger_kernel.ops.grpo_loss").fused_selective_log_softmax
    logits, ids = 4 * torch.randn(B, T + 1, V), torch.randint(V, (B, T))
    truth = token_logprob(logits[:, :-1].double(), ids, temperature=0.7, backend="cpu")[0]
    theirs = function(logits, ids, temperature=0.7).double()
    torch.testing.assert_close(theirs, truth, rtol=1e-5, atol=1e-5)
    check("logprob", token_logprob(logits[:, :-1], ids, temperature=0.7)[0], truth, theirs, torch.float32)


@interpreted
@pytest.mark.parametrize("level,wrong", [(0.0, False), (-60.0, False), (-120.0, True)])
def test_verl_kernel_of_low_logits(level, wrong):
    """verl's merge starts its maximum at 0: where all logits are near -120 it takes the log of 0."""
    kernels = rival("verl", "verl.utils.kernel.kernels", exactly=True)
    logits = torch.randn(5, V) + level
    splits = [part.contiguous() for part in logits.split(101, dim=1)]
    top = torch.stack([part.amax(1) for part in splits], 1)
    total = torch.stack([(part - part.amax(1, keepdim=True)).exp().sum(1) for part in splits], 1)
    weighted = torch.stack([((part - part.amax(1, keepdim=True)).exp() * part).sum(1) for part in splits], 1)
    chosen, scalar = logits[:, 7].clone(), torch.zeros(1)
    outputs = [torch.zeros(5) for _ in range(4)]
    kernel = kernels.efficient_entropy_triton_kernel_epilogue
    kernel = getattr(kernel, "fn", kernel)
    strided = [y for x in (top, total, weighted) for y in (x, *x.stride())]
    arguments = [*strided[:3], 5, len(splits), outputs[0], 1, *strided[3:6], outputs[1], 1, *strided[6:], outputs[2], 1]
    kernel[(1,)](*arguments, outputs[3], 1, chosen, 1, scalar, 0, BLOCK_SIZE_M=16, BLOCK_SIZE_N=64)
    ids = torch.full((5,), 7)
    logprob, entropy = token_logprob(logits.double(), ids, backend="cpu")
    assert chosen.isfinite().all() != wrong and outputs[3].isfinite().all() != wrong
    if not wrong:
        torch.testing.assert_close(chosen.double().abs(), logprob.abs(), rtol=1e-4, atol=1e-4)
    check(
        "logprob", *(token_logprob(x, ids, backend="cpu")[0] for x in (logits, logits.double(), logits)), torch.float32
    )
    check("entropy", token_logprob(logits, ids)[1], entropy, token_logprob(logits, ids)[1], torch.float32)


@pytest.mark.skipif(INTERPRETING, reason="this is that process")
def test_under_the_interpreter():
    rival("liger-kernel", "liger_kernel.ops")
    run_interpreted(__file__, "-k", "kernel_from_logits or low_logits")
