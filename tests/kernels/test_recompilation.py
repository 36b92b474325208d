"""Nothing is compiled again when lengths, temperatures or clip values change: counted without a GPU.

What Triton compiles for is read from its own binder, by ops that run on CPU tensors as far as their launches; nothing
is launched, and the results are thrown away. What torch.compile compiles is counted by dynamo.
"""

import collections
import os

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fuserl.kernels import dispatch
from fuserl.kernels.divergence import divergence
from fuserl.kernels.gaussian_logprob import gaussian_logprob
from fuserl.kernels.group_advantage import group_advantage
from fuserl.kernels.linear_logprob import linear_logprob
from fuserl.kernels.linear_policy_loss import linear_policy_loss
from fuserl.kernels.policy_loss import policy_loss
from fuserl.kernels.preference_loss import preference_loss
from fuserl.kernels.preferences import CPO, KTO, ORPO
from fuserl.kernels.sample import sample
from fuserl.kernels.sampled_divergence import sampled_divergence
from fuserl.kernels.segment_sum import segment_mean, to_tokens
from fuserl.kernels.surrogates import Clip, Gate, Truncate, Weight
from fuserl.kernels.token_logprob import token_logprob
from fuserl.kernels.topk_divergence import topk_divergence

LENGTHS = (1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 64, 100, 127, 128, 255, 256, 300, 511, 1000)
V = 80
OUTPUTS = ("logprob", "entropy")


def number(n):
    """Another one for every length, as an annealed setting has."""
    return 0.5 + n / 1000


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


def ids(n):
    return torch.arange(n) % V


def of_divergence(kind):
    def step(x, p, q, **options):
        return divergence(p, q, kind, beta=x / 2, alpha=x / 2, temperature=x, **options)

    return lambda n: (leaf(n, V), torch.randn(n, V)), step


def of_policy_loss(surrogate, **fixed):
    """surrogate and the rest of the numbers as functions of the setting."""

    def step(x, logprobs, advantages, old, ref, weights, rollout, entropy, **options):
        given = {"old_logprobs": old, "ref_logprobs": ref, "weights": weights, **fixed}
        if fixed.get("kl_weighted"):
            given |= {"rollout_logprobs": rollout, "importance": Truncate(2 + x, x), "entropy": entropy}
            given["entropy_coef"] = x / 20
        return policy_loss(logprobs, advantages, surrogate=surrogate(x), beta=x / 10, **given, **options)[:1]

    return lambda n: (leaf(n), *(torch.randn(n) for _ in range(6))), step


def of_preference_loss(form):
    def step(x, logprobs, offsets, *desirable, **options):
        given = {"ref_logprobs": torch.zeros_like(logprobs), "desirable": desirable[0]} if desirable else {}
        numbers = form(beta=x) if form is not ORPO else form(lam=x)
        return preference_loss(logprobs, numbers, offsets=offsets, **given, **options)[:1]

    def inputs(n):
        desirable = (torch.ones(2 * n, dtype=torch.bool),) if form is KTO else ()
        return (leaf(6 * n), torch.arange(2 * n + 1) * 3, *desirable)

    return inputs, step


def spread_means(_, x, offsets, **options):
    return [to_tokens(segment_mean(x, offsets, **options), offsets, x.shape[-1], **options)]


def of_sample(cut):
    def step(x, logits, names, **options):
        cuts = {"top_k": int(50 * x), "top_p": x / 2, "min_p": x / 100} if cut else {}
        given = {"temperature": x, "seed": int(1e12 * (x - 0.6)), "rollout_ids": names, "positions": names}
        return sample(logits, **given, **cuts, **options)

    return lambda n: (torch.randn(n, V), ids(n)), step


def gaussian_step(x, policy, actions, mask, **options):
    given = {"log_std": x * policy[:, 8:9], "ref_mean": actions, "ref_log_std": policy.mean(0)[:8]}
    return gaussian_logprob(actions, policy[:, :8], **given, mask=mask, entropy=True, average=True, **options)


def linear_step(x, hidden, weight, ids, **options):
    out = linear_logprob(hidden, weight, ids, outputs=OUTPUTS, temperature=x, softcap=30 + x, chunk=96, **options)
    return out.logprob, out.entropy


def one_pass_step(x, hidden, weight, ids, **options):
    given = {"temperature": x, "logit_scale": x, "chunk": 96}
    return linear_policy_loss(hidden, weight, ids, lambda out, _: -out.logprob, **given, **options)[:1]


# name: (n -> tensors, (setting, *tensors) -> outputs)
REGISTERED = {
    "token_logprob": (
        lambda n: (leaf(n, V), ids(n)),
        lambda x, logits, ids, **options: token_logprob(logits, ids, temperature=x, **options),
    ),
    "token_logprob, temperature per row": (
        lambda n: (leaf(n, V), ids(n), torch.ones(n)),
        lambda x, logits, ids, each, **options: token_logprob(logits, ids, temperature=each * x, **options),
    ),
    "divergence": of_divergence("jensen_shannon"),
    "divergence, alpha": of_divergence("alpha"),
    "topk_divergence": (
        lambda n: (leaf(n, V), ids(5).expand(n, 5).contiguous(), torch.full((n, 5), -2.0)),
        lambda x, *tensors, **options: topk_divergence(*tensors, "forward_kl", temperature=x, **options),
    ),
    "sampled_divergence": (
        lambda n: (leaf(n), torch.randn(n)),
        lambda x, *tensors, **options: [sampled_divergence(*tensors, "k3", clamp=20 * x, **options)],
    ),
    "policy_loss": of_policy_loss(lambda x: Clip(x / 4, x / 3, 2 + x)),
    "policy_loss, k1": of_policy_loss(lambda x: Clip(x / 4, x / 3, 2 + x), kl="k1"),
    "policy_loss, weight": of_policy_loss(lambda x: Weight((x, 2 * x), (x / 2, x)), kl="k1+"),
    "policy_loss, gate, corrected": of_policy_loss(lambda x: Gate(x, 2 * x), kl_weighted=True),
    "preference_loss": of_preference_loss(CPO),
    "preference_loss, odds": of_preference_loss(ORPO),
    "preference_loss, no pairs": of_preference_loss(KTO),
    "gaussian_logprob": (lambda n: (leaf(n, 9), torch.randn(n, 8), torch.rand(n, 8) < 0.7), gaussian_step),
    "segment_mean and to_tokens": (lambda n: (leaf(3 * n), torch.arange(n + 1) * 3), spread_means),
    "sample": of_sample(True),
    "sample, uncut": of_sample(False),
    "linear_logprob": (lambda n: (leaf(n, 8), leaf(V, 8), ids(n)), linear_step),
}
ONE_PASS = {"linear_policy_loss": (REGISTERED["linear_logprob"][0], one_pass_step)}
NO_TRITON = {
    "group_advantage": (
        lambda n: (torch.randn(n), ids(n) // 4),
        lambda x, rewards, group: [group_advantage(rewards, group, eps=x)],
    )
}


def differentiated(outputs, tensors):
    """Run backward, where there is one, as training does."""
    if tensors[0].requires_grad:
        torch.autograd.grad(sum(output.sum() for output in outputs), tensors[0])


@pytest.fixture
def compiled_for(monkeypatch):
    """Kernel's name -> what Triton would compile it for, one entry a variant, of the launches since it was cleared."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    from ahead_of_time import TARGETS
    from triton.compiler import make_backend
    from triton.runtime import jit

    backend, variants = make_backend(TARGETS["sm_90"]), collections.defaultdict(set)

    def run(kernel, *args, grid, warmup, **kwargs):
        binder = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
        variants[f"{kernel.__module__}.{kernel.__name__}"].add(str(binder(*args, **kwargs)[1:]))

    monkeypatch.setattr(jit.JITFunction, "run", run)
    monkeypatch.setattr(dispatch, "why_not", lambda *_: None)
    return variants


def same_at_every_length(step, compiled_for):
    """Run step(n) for every length; each asks for the variants that the first asked for, and no kernel for many."""
    first = None
    for n in LENGTHS:
        compiled_for.clear()
        step(n)
        first = first or dict(compiled_for)
        assert compiled_for == first, f"{n} rows"
    assert first
    return {name: len(variants) for name, variants in first.items()}


@pytest.mark.parametrize("name", [*REGISTERED, *ONE_PASS])
def test_triton_compiles_once(name, compiled_for):
    """Over 20 lengths and as many settings; topk_divergence reads rows of two widths, V and k + 1."""
    inputs, step = (REGISTERED | ONE_PASS)[name]

    def run(n):
        tensors = inputs(n)
        differentiated(step(number(n), *tensors, backend="triton"), tensors)

    counts = same_at_every_length(run, compiled_for)
    assert max(counts.values()) == (2 if name == "topk_divergence" else 1)


def test_triton_compiles_once_for_rollouts(compiled_for):
    """(B, T, V) logits without their last or first token, over 20 lengths."""

    def run(n):
        logits = leaf(3, n + 1, V)
        chosen = torch.zeros(3, n, dtype=torch.int64)
        differentiated(token_logprob(logits[:, :-1], chosen, temperature=number(n), backend="triton"), [logits])
        differentiated(divergence(logits[:, 1:], logits[:, :-1].detach(), "forward_kl", backend="triton"), [logits])

    same_at_every_length(run, compiled_for)


def test_the_count_can_fail(compiled_for):
    """A length that may be specialised on is: 1, a multiple of 16, and the rest are three variants."""
    import triton

    @triton.jit
    def kernel(N):
        pass

    for n in LENGTHS:
        kernel[(1,)](n)
    assert [len(variants) for variants in compiled_for.values()] == [3]


@pytest.mark.parametrize("name", [*REGISTERED, *NO_TRITON])
def test_torch_compiles_at_most_twice(name):
    """Once for the first length, once for any; without length 1, which dynamo always takes for itself.

    So it does with every value of a Python number that an operator is called with: what changes is passed as a tensor.
    """
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    inputs, step = (REGISTERED | NO_TRITON)[name]
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for n in LENGTHS[1:]:
        tensors = inputs(n)
        differentiated(compiled(number(n) if "per row" in name else 0.7, *tensors), tensors)
    assert 1 <= counter.frame_count <= 2
