"""A registered op: called directly where tensors are plain, and one node wherever somebody looks."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fuserl.kernels.registration import register


def run(x, factor):
    return x * factor


def keep(ctx, inputs, output):
    ctx.factor = inputs[1]


def backward(ctx, g):
    return g * ctx.factor, None


def fake(x, _):
    return torch.empty_like(x)


OPS = {
    "scaled_probe": register("scaled_probe(Tensor x, float y) -> Tensor", run, fake, keep=keep, backward=backward),
    "constant_probe": register("constant_probe(Tensor x, float y) -> Tensor", run, fake),
}
every = pytest.mark.parametrize("name", OPS)


class Seen(TorchDispatchMode):
    """The ops that come by."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(op.name())
        return op(*args, **(kwargs or {}))


class Wrapped(torch.Tensor):
    """A tensor that is not plain."""

    seen = None

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        cls.seen = op.name()
        return torch.zeros(2)


def test_gradient_is_that_of_the_op_of_torch():
    x = torch.randn(5, requires_grad=True)
    direct, dispatched = (
        torch.autograd.grad(f(x, 3.0).sum(), x) for f in (OPS["scaled_probe"], torch.ops.fuserl.scaled_probe)
    )
    assert torch.equal(direct[0], dispatched[0]) and torch.equal(direct[0], torch.full((5,), 3.0))
    with torch.no_grad():
        assert OPS["scaled_probe"](x, 3.0).grad_fn is None
    assert OPS["scaled_probe"](torch.nn.Parameter(x.detach()), 3.0).grad_fn.name() == "fuserl::scaled_probeBackward"


@every
def test_plain_tensors_pass_by_the_dispatcher(name, monkeypatch):
    monkeypatch.setattr(torch._ops.OpOverload, "__call__", lambda *_: pytest.fail("dispatched"))
    assert OPS[name](torch.ones(2), 3.0).tolist() == [3.0, 3.0]


@every
def test_a_mode_sees_one_node(name):
    x = torch.ones(2)
    with Seen() as seen:
        OPS[name](x, 3.0)
    assert seen.names[0] == f"fuserl::{name}"


@every
def test_a_subclass_sees_one_node(name):
    OPS[name](torch.ones(2).as_subclass(Wrapped), 3.0)
    assert Wrapped.seen == f"fuserl::{name}"


@every
def test_fake_tensors_have_nothing_in_them(name):
    with FakeTensorMode():
        out = OPS[name](torch.ones(2), 3.0)
    assert out.shape == (2,) and type(out).__name__ == "FakeTensor"


@every
def test_compiled_code_has_one_node(name):
    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    x = torch.randn(3, requires_grad=name == "scaled_probe")
    out = torch.compile(lambda x: OPS[name](x, 3.0), backend=backend, fullgraph=True)(x)
    assert torch.equal(out, 3 * x) and targets == [f"fuserl.{name}.default"]
