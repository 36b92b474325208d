"""What stands in the place of verl's heads and log-probs: contract, numbers, every place where it is bound, shards."""

import importlib
import sys
import types

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from rivals import rival, verl_losses
from tolerance import check, check_rows
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from zero_3 import ZeroParamStatus

core = verl_losses()
theirs = rival("verl", "verl.utils.torch_functional")
fused = rival("verl", "verl.utils.experimental.torch_functional")
kernel = rival("verl", "verl.utils.kernel.linear_cross_entropy")
ours = importlib.import_module("fuserl.trainers.verl")
ours.unpatch()  # importing it has patched
B, T, D, V = 3, 11, 24, 301


@pytest.fixture(autouse=True)
def unpatched():
    ours.unpatch()
    yield
    ours.unpatch()


@pytest.fixture
def patched(unpatched):
    with ours.patch():
        yield


def with_gradients(function, leaves, g, dtype=torch.float32):
    """Outputs of the function, and the gradients of their sum with g."""
    leaves = [leaf.detach().to(dtype).clone().requires_grad_() for leaf in leaves]
    found = function(*leaves)
    loss = sum((x * y.to(x.dtype)).sum() for x, y in zip(found, g, strict=False))
    return [x.detach() for x in found], torch.autograd.grad(loss, leaves)


def compare(function, other, leaves, ids=None):
    """Ours at most twice as far from float64 as theirs."""
    g = torch.randn(2, B, T)
    true, d_true = with_gradients(function, leaves, g, torch.float64)
    got, d_got = with_gradients(function, leaves, g)
    found, d_found = with_gradients(other, leaves, g)
    for at, (a, b, c) in enumerate(zip(got, true, found, strict=True)):
        assert (a.dtype, a.shape) == (c.dtype, c.shape)
        torch.testing.assert_close(c.double(), b, rtol=1e-4, atol=1e-4)
        check(f"output {at}", a, b, c, torch.float32)
    for a, b, c in zip(d_got, d_true, d_found, strict=True):
        check_rows("gradient", a, b, c, torch.float32, ids=ids)


def operands(dtype=torch.float32):
    """Hidden states and a head that gives logits of standard deviation 4, and tokens."""
    hidden, weight = torch.randn(B, T, D).to(dtype), (4 * torch.randn(V, D) / D**0.5).to(dtype)
    return hidden, weight, torch.randint(V, (B, T))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("backend", ["torch", "liger"])
def test_head(temperature, backend):
    if backend == "liger":
        rival("liger-kernel", "liger_kernel.ops")
    *leaves, ids = operands()
    given = {"input_ids": ids, "temperature": temperature}
    compare(
        lambda h, w: ours.FusedLinearForPPO(impl_backend=backend)(h, w, **given),
        lambda h, w: fused.FusedLinearForPPO(chunk_size=7, impl_backend=backend)(h, w, **given), leaves,
    )  # fmt: skip


def test_head_of_packed_tokens():
    hidden, weight, ids = operands()
    head = ours.FusedLinearForPPO()
    expected = head(hidden, weight, ids)
    for shape in ((B * T,), (1, B * T)):
        found = head(hidden.view(*shape, D), weight, ids.view(shape).int())
        assert all(torch.equal(a, b.view(shape)) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", [(B,), (B, 1), (B, T)])
def test_temperature_of_samples(shape):
    """verl's head takes a number; the logits of a sample divided by its own are the definition."""
    hidden, weight, ids = operands()
    temperature = 0.5 + torch.rand(shape)
    found = ours.FusedLinearForPPO()(hidden, weight, ids, temperature)
    logits = hidden.double() @ weight.double().T / temperature.view(B, -1, 1)
    logprob = theirs.logprobs_from_logits(logits, ids)
    torch.testing.assert_close(found[0].double(), logprob, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1].double(), theirs.entropy_from_logits(logits), rtol=1e-5, atol=1e-5)


def test_temperature_of_one_packed_row():
    """(N,) beside ids (1, N) is one number per token."""
    hidden, weight, ids = operands()
    temperature = 0.5 + torch.rand(B * T)
    head = ours.FusedLinearForPPO()
    packed = head(hidden.view(1, B * T, D), weight, ids.view(1, B * T), temperature)
    apart = head(hidden, weight, ids, temperature.view(B, T))
    assert all(torch.equal(a.view(B, T), b) for a, b in zip(packed, apart, strict=True))


def test_a_frozen_head_is_not_differentiated(monkeypatch):
    """A product less: no gradient of the head is made, and the states' is the same."""
    hidden, weight, ids = operands()
    head_products = importlib.import_module("fuserl.kernels.head_products")
    results, products, matmul = [], [], head_products.matmul
    for trained in (True, False):
        calls = []
        monkeypatch.setattr(head_products, "matmul", lambda *a, calls=calls, **k: calls.append(a) or matmul(*a, **k))
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        ours.FusedLinearForPPO()(h, w, ids)[0].sum().backward()
        results.append(h.grad)
        products.append(len(calls))
        assert (w.grad is not None) == trained
    assert torch.equal(*results) and products == [3, 2]


def test_cross_entropy_of_a_head():
    """Of hidden states in any shape, flat as verl's kernel returns it."""
    hidden, weight, ids = operands()
    expected = ours.FusedLinearForPPO()(hidden, weight, ids, 0.7)
    found = ours.linear_cross_entropy(hidden, weight, ids, 0.7, "none", None)
    assert all(torch.equal(a, b.flatten()) for a, b in zip(found, expected, strict=True))


def test_from_logits():
    logits, ids = 4 * torch.randn(B, T, V), torch.randint(V, (B, T))
    compare(
        lambda x: (ours.logprobs_from_logits(x, ids, inplace_backward=False), ours.entropy_from_logits(x)),
        lambda x: (theirs.logprobs_from_logits(x, ids), theirs.entropy_from_logits(x)), [logits], ids,
    )  # fmt: skip
    flat = logits.flatten(0, 1)
    found = ours.entropy_from_logits_with_chunking(flat, chunk_size=5)
    true, plain = theirs.entropy_from_logits(flat.double()), theirs.entropy_from_logits_with_chunking(flat, 5)
    check("entropy", found, true, plain, torch.float32)


@pytest.mark.parametrize("strides", ["contiguous", "transposed"])
def test_the_gradient_over_the_logits(strides):
    """In place where verl asks for it; the same numbers in any case."""
    made, ids = torch.randn(T, V), torch.randint(V, (T,))
    results = []
    for inplace in (True, False):
        leaf = made.clone().requires_grad_()
        logits = leaf * 1.0 if strides == "contiguous" else (leaf.t() * 1.0).contiguous().t()
        before = logits.detach().clone()
        ours.logprobs_from_logits(logits, ids, inplace_backward=inplace).sum().backward()
        assert torch.equal(logits.detach(), before) != inplace
        results.append(leaf.grad)
    assert torch.equal(*results)


def test_an_ignored_label_has_log_prob_0_and_no_gradient():
    hidden, weight, ids = operands()
    ids[0, 3] = -100
    h = hidden.clone().requires_grad_()
    logprob, entropy = ours.FusedLinearForPPO()(h, weight, ids)
    (logprob.sum() + entropy.sum()).backward()
    assert logprob[0, 3] == entropy[0, 3] == 0 and not h.grad[0, 3].any() and h.grad[0, 4].any()
    logits = torch.randn(B, T, V, requires_grad=True)
    found = ours.logprobs_from_logits(logits, ids, inplace_backward=False)
    assert found[0, 3] == 0 and not torch.autograd.grad(found.sum(), logits)[0][0, 3].any()


def test_results_of_bfloat16_are_float32():
    """verl rounds the entropy, and on a CPU log-probs too."""
    hidden, weight, ids = operands(torch.bfloat16)
    true = ours.FusedLinearForPPO()(hidden.double(), weight.double(), ids)
    for a, b in zip(ours.FusedLinearForPPO()(hidden, weight, ids), true, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    assert ours.logprobs_from_logits(torch.randn(B, V).bfloat16(), ids[:, 0]).dtype == torch.float32


@pytest.mark.parametrize("hidden,weight", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_head_of_another_dtype(hidden, weight):
    """FSDP2's master weights beside bfloat16 states."""
    x, w = torch.randn(9, D).to(hidden).requires_grad_(), torch.randn(V, D).to(weight).requires_grad_()
    ids = torch.randint(V, (9,))
    found = ours.FusedLinearForPPO()(x, w, ids)[0]
    found.sum().backward()
    truth = (x.double() @ w.to(hidden).double().T).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)
    assert (x.grad.dtype, w.grad.dtype) == (hidden, weight)


def test_autocast():
    hidden, weight, ids = operands()
    with torch.autocast("cpu", torch.bfloat16):
        found = ours.FusedLinearForPPO()(hidden, weight, ids)[0]
    torch.testing.assert_close(found, ours.FusedLinearForPPO()(hidden.bfloat16(), weight.bfloat16(), ids)[0])


def test_entropy_compiles_whole():
    """verl's engines compile it with dynamic shapes."""
    compiled = torch.compile(ours.entropy_from_logits, dynamic=True, fullgraph=True, backend="aot_eager")
    for rows in (5, 8):
        logits = torch.randn(rows, V)
        torch.testing.assert_close(compiled(logits), ours.entropy_from_logits(logits))


def test_every_place_is_replaced_and_restored(monkeypatch):
    """Also in Megatron's modules, which bind a method of a class, and in engines that bind a function."""
    bound = {"linear_cross_entropy": kernel.linear_cross_entropy, "logprobs_from_logits": theirs.logprobs_from_logits}
    engine = types.ModuleType("verl.models.mcore.model_forward_fused")
    vars(engine).update(bound)
    monkeypatch.setitem(sys.modules, engine.__name__, engine)
    before = {path: ours._HOST.original(path) for path in ours._HOST.replacements}
    registries = [set(core.POLICY_LOSS_REGISTRY), set(core.ADV_ESTIMATOR_REGISTRY)]
    with ours.patch(), ours.patch():
        assert engine.linear_cross_entropy is ours.linear_cross_entropy
        assert engine.logprobs_from_logits is ours.logprobs_from_logits
        assert fused.FusedLinearForPPO is ours.FusedLinearForPPO
        assert core.compute_gae_advantage_return is ours.gae_advantage
        assert core.get_policy_loss_fn("fuserl_gspo") is ours.LOSSES["fuserl_gspo"]
        assert core.get_adv_estimator_fn("fuserl_rloo") is ours.ESTIMATORS["fuserl_rloo"]
        report = ours.report()
        assert f"{engine.__name__}.linear_cross_entropy" in str(report) and "fuserl_gmpo" in str(report)
    assert {path: ours._HOST.original(path) for path in before} == before and vars(engine).items() >= bound.items()
    assert [set(core.POLICY_LOSS_REGISTRY), set(core.ADV_ESTIMATOR_REGISTRY)] == registries
    assert ours.report().replaced == {}


def test_importing_patches_and_a_taken_name_is_refused(monkeypatch):
    """verl does no more than import what external_lib names."""
    monkeypatch.delitem(sys.modules, ours.__name__)
    monkeypatch.setattr(sys.modules["fuserl.trainers"], "verl", ours)  # which the import below replaces
    again = importlib.import_module(ours.__name__)
    assert theirs.logprobs_from_logits is again.logprobs_from_logits and again.report().replaced
    again.unpatch()
    monkeypatch.setitem(core.POLICY_LOSS_REGISTRY, "fuserl_grpo", print)
    with pytest.raises(RuntimeError, match="verl must not have fuserl_grpo yet"):
        ours.patch()
    assert ours.report().replaced == {} and core.POLICY_LOSS_REGISTRY["fuserl_grpo"] is print


def test_gdpo_of_verl_stands_on_our_groups(patched, monkeypatch):
    """verl calls compute_grpo_outcome_advantage from its others by name."""
    rewards, mask, index = torch.randn(6, 4), torch.ones(6, 4), ["a", "b"] * 3
    got = core.compute_gdpo_outcome_advantage(rewards.clone(), mask, index)[0]
    ours.unpatch()
    torch.testing.assert_close(got, core.compute_gdpo_outcome_advantage(rewards, mask, index)[0], rtol=1e-5, atol=1e-5)


def test_refusals():
    hidden, weight, ids = operands()
    head = ours.FusedLinearForPPO()
    with pytest.raises(ValueError, match="impl_backend must be 'torch' or 'liger'; got 'cuda'"):
        ours.FusedLinearForPPO(impl_backend="cuda")
    with pytest.raises(ValueError, match="reduction must be 'none', as verl asks; got 'mean'"):
        ours.linear_cross_entropy(hidden, weight, ids, 1.0, "mean")
    with pytest.raises(ValueError, match=r"temperature must have one number per sample, \(3,\); got \(11,\)"):
        head(hidden, weight, ids, torch.ones(T))
    with pytest.raises(ValueError, match="temperature must be positive"):
        head(hidden, weight, ids, 0.0)
    with pytest.raises(ValueError, match="the head must be whole"):  # as FSDP1 has it
        head(hidden, weight.flatten(), ids)
    weight.ds_status = ZeroParamStatus.INFLIGHT
    for call in (head, ours.linear_cross_entropy):
        with pytest.raises(ValueError, match=r"the head must be whole, \(V, D\); got \(301, 24\), as ZeRO-3"):
            call(hidden, weight, ids)


def test_without_verl_the_import_gives_the_line_for_pip(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.delitem(sys.modules, "fuserl.trainers.verl")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'verl>=0\.9\.1,<0\.10'"):
        importlib.import_module("fuserl.trainers.verl")


class Model(nn.Module):
    """A backbone and a head that verl's forward takes the weight of."""

    def __init__(self, tied):
        super().__init__()
        torch.manual_seed(3)
        self.embedding, self.layer, self.lm_head = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, V, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, ids):
        hidden = 2 * torch.tanh(self.layer(self.embedding(ids)))
        return ours.FusedLinearForPPO().forward(hidden, self.lm_head.weight, ids, temperature=0.8)


def gradients(model, ids):
    """Of an update's loss, whole."""
    logprob, entropy = model(ids)
    (-logprob.mean() - 0.1 * entropy.mean()).backward()
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}


def on_data_parallel(kind, tied, dtype):
    """verl's sharding: layers, and an untied head and embedding, each a unit of its own, then the root."""
    ids = torch.randint(V, (2, 2, T), generator=torch.Generator().manual_seed(5))
    model, whole = Model(tied), Model(tied)
    if kind == "ddp":
        model = DistributedDataParallel(model)
    else:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for unit in [model.layer, *([] if tied else [model.embedding, model.lm_head]), model]:
            fully_shard(unit, mp_policy=policy)
        assert tied or isinstance(model.lm_head.weight, DTensor)
    got, expected = gradients(model, ids[dist.get_rank()]), gradients(whole, ids.flatten(0, 1))
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        limit = 1e-5 if dtype == torch.float32 else 0.03
        assert got[name].dtype == torch.float32 and (got[name] - gradient).norm() < limit * gradient.norm(), name
    if dtype == torch.bfloat16:
        head = got["embedding.weight" if tied else "lm_head.weight"]
        assert not torch.equal(head, head.bfloat16().float()), "reduced in 16 bits"


@pytest.mark.parametrize(("kind", "tied", "dtype"), [
    ("ddp", False, torch.float32), ("fsdp2", False, torch.float32), ("fsdp2", True, torch.float32),
    ("fsdp2", False, torch.bfloat16), ("fsdp2", True, torch.bfloat16),
])  # fmt: skip
def test_two_ranks(kind, tied, dtype):
    """Under FSDP2 a head of its own reaches the forward as a DTensor, a tied one whole: gradients of the batch."""
    on_ranks(2, on_data_parallel, kind, tied, dtype)


def on_tensor_parallel():
    """Megatron's head with its sequence parallelism, whose backward sums the addends of the ranks."""
    hidden, weight, ids = operands()
    g = torch.randn(2, B * T)
    rank, group = dist.get_rank(), dist.group.WORLD
    h, w = hidden.clone().requires_grad_(), weight.split([150, V - 150])[rank].clone().requires_grad_()
    found = ours.linear_cross_entropy(h, w, ids, 0.7, "none", group)
    sum((x * y).sum() for x, y in zip(found, g, strict=True)).backward()
    dist.all_reduce(h.grad)
    whole = [x.clone().requires_grad_() for x in (hidden, weight)]
    expected = ours.linear_cross_entropy(*whole, ids, 0.7)
    sum((x * y).sum() for x, y in zip(expected, g, strict=True)).backward()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(h.grad, whole[0].grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(w.grad, whole[1].grad.split([150, V - 150])[rank], rtol=1e-4, atol=1e-5)


def test_megatron_cuts_the_vocabulary():
    on_ranks(2, on_tensor_parallel)
