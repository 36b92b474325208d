"""gaussian_logprob as an operator of torch, and what it says to what it cannot take."""

import pytest
import torch
from backends import cpu_only
from gaussians import TENSORS, drawn

import fuserl
from fuserl.kernels.gaussian_logprob import gaussian_logprob

pytestmark = cpu_only


def loss(tensors, average):
    names = "actions", "mean", "log_std", "ref_mean", "ref_log_std"
    given = dict(zip(names, tensors, strict=True))
    mask = torch.ones(given["mean"].shape[-1:], dtype=torch.bool)
    logprob, entropy, kl = gaussian_logprob(**given, mask=mask, average=average, entropy=True)
    alone = gaussian_logprob(given["actions"], given["mean"], std=0.5).logprob
    return (logprob.exp() - 0.01 * entropy + kl).sum() + alone.mean()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_compiles_without_a_graph_break(dynamic, average):
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for count in (40, 41, 42):
        tensors = [x.requires_grad_() for x in drawn(count, 7, view="dimension", ref_view="row").values()]
        value, expected = compiled(tensors, average), loss(tensors, average)
        gradients = [torch.autograd.grad(v, tensors) for v in (value, expected)]
        assert torch.equal(value, expected)
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(*gradients, strict=True))


def test_the_operator_is_what_eager_calls_run():
    tensors = [x.requires_grad_() for x in drawn(9, 5, view="row", ref_view="one").values()]
    g = [torch.randn(9) for _ in range(3)]
    names = "log_std", "ref_mean", "ref_log_std"
    eager = gaussian_logprob(*tensors[:2], **dict(zip(names, tensors[2:], strict=True)), entropy=True)
    registered = torch.ops.fuserl.gaussian_logprob(*tensors, None, [1, 0, 1], None)
    results = [(*out, *torch.autograd.grad(out, tensors, g)) for out in (eager, registered)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_opcheck():
    op, backward = torch.ops.fuserl.gaussian_logprob, torch.ops.fuserl.gaussian_logprob_backward
    for wanted in (True, False):
        x = [t.requires_grad_(wanted) for t in drawn(6, 5, view="dimension", ref_view="row").values()]
        mask = torch.rand(6, 5) < 0.7
        for average in (0, 1):
            torch.library.opcheck(op, (*x, mask, [1, average, 1], "cpu"))
        torch.library.opcheck(op, (*x[:3], None, None, None, [1, 0, 0], "cpu"))
    x, g = [t.detach() for t in x], torch.randn(3, 6)
    torch.library.opcheck(backward, (*x, mask, *g, [1, 0, 1], [True] * 5, "cpu"))
    few = [False, True, True, False, False]
    torch.library.opcheck(backward, (*x[:3], None, None, None, g[0], None, None, [0, 1, 0], few, "cpu"))


def test_fake_tensors_have_the_shapes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in drawn(4, 3, 5).values()]
        out = gaussian_logprob(*fakes[:3], ref_mean=fakes[3], ref_log_std=fakes[4], entropy=True)
        assert [x.shape for x in out] == [(4, 3)] * 3


def test_a_second_derivative_is_refused():
    actions, mean, log_std, *_ = drawn(3, 4).values()
    out = gaussian_logprob(actions, mean.requires_grad_(), log_std)
    (gradient,) = torch.autograd.grad(out.logprob.square().sum(), mean, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


X = torch.zeros(3, 2)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"actions": torch.zeros(3, 2).long()}, r"actions must be \(..., D\) of a floating dtype"),
        ({"actions": torch.zeros(3, 0), "mean": torch.zeros(3, 0)}, "actions must be .* D > 0"),
        ({"actions": torch.zeros(())}, "actions must be"),
        ({"mean": torch.zeros(2)}, r"mean must be \(3, 2\) like actions; got \(2,\)"),
        ({"mean": X.double()}, "mean must be torch.float32 on cpu like actions; got torch.float64"),
        ({"ref_mean": torch.zeros(3, 1)}, r"ref_mean must be \(3, 2\)"),
        ({"log_std": torch.zeros(3)}, r"log_std must be broadcastable to \(3, 2\); got \(3,\)"),
        ({"log_std": torch.zeros(1, 3, 2)}, "log_std must be broadcastable"),
        ({"log_std": torch.zeros(2, 2)}, "log_std must be broadcastable"),
        ({"log_std": torch.zeros(2).double()}, "log_std must be torch.float32 on cpu"),
        ({"log_std": X, "std": X}, "log_std or std must be given, one of them; got both"),
        ({"log_std": None}, "log_std or std must be given, one of them; got neither"),
        ({"ref_mean": X, "ref_std": X}, "ref_std must be None where the policy's scale is log_std"),
        ({"log_std": None, "std": X, "ref_mean": X, "ref_log_std": X}, "ref_log_std must be None where"),
        ({"ref_log_std": X}, "ref_mean must be given with the reference's scale"),
        ({"mask": torch.ones(3, 2)}, r"mask must be \(3, 2\) or \(2,\) torch.bool"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, "mask must be"),
        ({"mean": torch.zeros(3, 2, device="meta")}, "mean must be .* on cpu"),
        ({"backend": "cudnn"}, "backend must be one of"),
    ],
)
def test_bad_input_gets_one_sentence(change, message):
    arguments = {"actions": X, "mean": X, "log_std": X, **change}
    with pytest.raises(ValueError, match=f"^gaussian_logprob: .*{message}"):
        fuserl.gaussian_logprob(**arguments)


def test_the_binding_refuses_what_does_not_fit():
    from fuserl import _C

    x, out = drawn(3, 2), torch.empty(3)
    given, nothing = [x[name] for name in TENSORS[:3]], [None] * 3
    bad = [
        ([x["actions"], x["mean"][:2], x["scale"]], nothing, [out, None, None]),
        ([x["actions"], x["mean"], torch.zeros(3)], nothing, [out, None, None]),
        ([x["actions"], x["mean"], x["scale"].t()], nothing, [out, None, None]),
        (given, [None, None, torch.ones(1, dtype=torch.bool)], [out, None, None]),
        (given, nothing, [out, None, out]),
        (given, nothing, [out[:2], None, None]),
    ]
    for tensors, others, results in bad:
        with pytest.raises(ValueError, match=r"^gaussian_logprob_forward: .* must "):
            _C.gaussian_logprob_forward(*tensors, others, True, results, 1)
    with pytest.raises(ValueError, match=r"^gaussian_logprob_backward: ref_mean must be given"):
        _C.gaussian_logprob_backward(*given, nothing, True, [out, None, None], [None, None, None, x["mean"], None], 1)
    given, others = [x[name] for name in TENSORS[:3]], [x["ref_mean"], x["ref_scale"], None]
    with pytest.raises(ValueError, match=r"^gaussian_logprob_backward: kl of g must be given"):
        _C.gaussian_logprob_backward(*given, others, True, [out, None, None], [None, None, None, x["mean"], None], 1)
