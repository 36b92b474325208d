"""Arrays of NumPy and of any library with DLPack: every op gives what it gives for tensors, and copies nothing."""

import inspect

import numpy
import pytest
import torch

import fuserl
from fuserl.arrays import as_tensor

RANDOM = numpy.random.default_rng(0)
LOGITS, OTHERS = (RANDOM.standard_normal((6, 20)).astype("f4") for _ in range(2))
HIDDEN, WEIGHT = RANDOM.standard_normal((6, 8)).astype("f4"), RANDOM.standard_normal((20, 8)).astype("f4")
IDS, LISTED = RANDOM.integers(20, size=6), numpy.argsort(OTHERS)[:, -3:].copy()
TOKENS, LOGPROBS = RANDOM.standard_normal((2, 6)).astype("f4"), -RANDOM.random(6).astype("f4")
OFFSETS, GROUP = numpy.array([0, 2, 6]), numpy.array([0, 0, 1, 1, 1, 0])
TEACHER = numpy.log(numpy.full((6, 3), 0.2, "f4"))
MATRIX = RANDOM.standard_normal((2, 3, 3)).astype("f4")
QUERIES = RANDOM.standard_normal((6, 2, 64)).astype("f4")
PARENT, LENGTH = [-1, 0], [2, 4]


def squares(out, rows):
    return out.logprob.square()


# What each is called with; an op that comes to be must be added.
CALLS = {
    "chunked_context_attention": lambda f, a: f(a(QUERIES), a(QUERIES), a(QUERIES), [2], [[[2, 2]]]),
    "discounted_scan": lambda f, a: f(a(LOGPROBS), 0.9, offsets=a(OFFSETS)),
    "divergence": lambda f, a: f(a(LOGITS), a(OTHERS), "reverse_kl"),
    "gae": lambda f, a: f(a(TOKENS), a(TOKENS), gamma=1.0, lam=0.9),
    "gaussian_logprob": lambda f, a: f(a(LOGITS), a(OTHERS), std=0.5)[0],
    "group_advantage": lambda f, a: f(a(LOGPROBS), a(GROUP)),
    "group_ranks": lambda f, a: f(a(LOGPROBS), a(GROUP)),
    "lambda_returns": lambda f, a: f(a(TOKENS), a(TOKENS), gamma=1.0, lam=0.9),
    "linear_divergence": lambda f, a: f(a(HIDDEN), a(WEIGHT), a(HIDDEN), a(WEIGHT), "forward_kl"),
    "linear_logprob": lambda f, a: f(a(HIDDEN), a(WEIGHT), a(IDS)).logprob,
    "linear_policy_loss": lambda f, a: f(a(HIDDEN), a(WEIGHT), a(IDS), squares)[0],
    "linear_topk_divergence": lambda f, a: f(a(HIDDEN), a(WEIGHT), a(LISTED), a(TEACHER), "forward_kl"),
    "pair_advantage": lambda f, a: f(a(MATRIX)),
    "pass_at_k_advantage": lambda f, a: f(a((LOGPROBS > -0.5).astype("f4")), a(GROUP), k=2),
    "policy_loss": lambda f, a: f(a(LOGPROBS), a(LOGPROBS), old_logprobs=a(LOGPROBS)),
    "preference_loss": lambda f, a: f(a(LOGPROBS), fuserl.SimPO()),
    "returns": lambda f, a: f(a(TOKENS), gamma=0.9),
    "sample": lambda f, a: f(a(LOGITS), seed=1, rollout_ids=a(IDS), positions=a(IDS)),
    "sampled_divergence": lambda f, a: f(a(LOGPROBS), a(LOGPROBS), "k3"),
    "segment_mean": lambda f, a: f(a(LOGPROBS), a(OFFSETS)),
    "segment_sum": lambda f, a: f(a(LOGPROBS), a(OFFSETS)),
    "to_tokens": lambda f, a: f(a(LOGPROBS[:2].copy()), a(OFFSETS), 6),
    "token_logprob": lambda f, a: f(a(LOGITS), a(IDS)),
    "topk_divergence": lambda f, a: f(a(LOGITS), a(LISTED), a(TEACHER), "forward_kl"),
    "tree_attention": lambda f, a: f(a(QUERIES), a(QUERIES), a(QUERIES), (PARENT, LENGTH)),
    "tree_decode": lambda f, a: f(a(QUERIES[:1]), a(QUERIES), a(QUERIES), (PARENT, [0, 2], LENGTH), [1]),
    "vtrace": lambda f, a: f(a(TOKENS), a(TOKENS), a(TOKENS), gamma=0.9),
}


class Foreign:
    """An array of another library: it can do nothing but be shared."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_every_op_is_called():
    assert set(CALLS) == {name for name in fuserl.__all__ if inspect.isfunction(getattr(fuserl, name))} - {"backends"}


@pytest.mark.parametrize("library", [numpy.asarray, Foreign], ids=["numpy", "dlpack"])
@pytest.mark.parametrize("name", CALLS)
def test_as_tensors(name, library):
    op = getattr(fuserl, name)
    got, expected = CALLS[name](op, library), CALLS[name](op, torch.from_numpy)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_memory_is_shared():
    array = numpy.zeros(3)
    for tensor in (as_tensor(array), as_tensor(Foreign(array))):
        array[1] += 1
        assert tensor.tolist() == array.tolist()


def test_read_only_array_is_copied():
    array = numpy.zeros(3)
    array.flags.writeable = False
    as_tensor(array)[0] = 1
    assert array[0] == 0


def test_tensor_keeps_its_gradient_and_its_graph():
    logits = torch.randn(6, 20, requires_grad=True)

    def loss(logits):
        return fuserl.token_logprob(logits, torch.from_numpy(IDS))[0].sum()

    (eager,), (compiled,) = (
        torch.autograd.grad(f(logits), logits) for f in (loss, torch.compile(loss, fullgraph=True))
    )
    assert eager.count_nonzero() > 0 and torch.equal(eager, compiled)
