"""Both ops under data parallelism on two ranks, against one rank that has the whole batch in float64."""

import copy

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from tolerance import check, check_rows
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fuserl.kernels.linear_logprob import linear_logprob
from fuserl.kernels.linear_policy_loss import linear_policy_loss
from fuserl.kernels.whole_weight import whole

VOCABULARY, WIDTH, ROWS, RANKS = 61, 16, 23, 2  # the vocabulary is no multiple of the ranks


class Model(nn.Module):
    """A backbone, and a head that is used outside of the forward."""

    def __init__(self, tied=False, bias=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=bias)
        nn.init.normal_(self.head.weight)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids):
        return 2 * torch.tanh(self.layer(self.embedding(ids)))


class Batch:
    """Tokens of all ranks, rows (RANKS, ROWS), and a loss that is normalised over all of them."""

    def __init__(self):
        torch.manual_seed(1)
        self.ids, self.chosen = torch.randint(VOCABULARY, (2, RANKS, ROWS))
        self.advantages = torch.randn(RANKS, ROWS)

    def losses(self, logprob, advantages, rows, scale=RANKS):
        """Of each row; ranks that average their gradients scale by RANKS."""
        return -scale * advantages[rows].to(logprob.dtype) * logprob * (logprob / 4).exp() / (RANKS * ROWS)

    def loss(self, op, model, rank, hidden, backend=None, scale=RANKS, **options):
        """Of one rank's rows, or of all where rank is None."""
        chosen, advantages = (x.flatten() if rank is None else x[rank] for x in (self.chosen, self.advantages))

        def losses(logprob, rows):
            return self.losses(logprob, advantages, rows, scale)

        head = {"bias": model.head.bias, "chunk": 10, "backend": backend, **options}
        if op == "linear_logprob":
            logprob = linear_logprob(hidden, model.head.weight, chosen, **head).logprob
            return losses(logprob, torch.arange(len(chosen))).sum()
        return linear_policy_loss(
            hidden, model.head.weight, chosen, lambda out, rows: losses(out.logprob, rows), **head
        )[0]


def on_one_rank(model, batch, dtype):
    """Gradients of the whole batch by the definition, by name."""
    model = copy.deepcopy(model).to(dtype)
    batch.loss("linear_policy_loss", model, None, model(batch.ids.flatten()), "reference", scale=1).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def same_gradients(model, whole_batch, *, names=None):
    """Every gradient, put together, is that of the whole batch."""
    truth, plain = whole_batch
    found = dict(model.named_parameters())
    assert found.keys() == truth.keys()
    for name in names or truth:
        got = found[name].grad
        got = got.full_tensor() if isinstance(got, DTensor) else got
        check_rows(
            name,
            *(x.reshape(len(x), -1) if x.dim() > 1 else x[None] for x in (got, truth[name], plain[name])),
            torch.float32,
        )


def made(**options):
    """A model, the batch, its gradients in float64 and in float32."""
    model, batch = Model(**options), Batch()
    return model, batch, (on_one_rank(model, batch, torch.float64), on_one_rank(model, batch, torch.float32))


def fsdp(op, wrapped, tied, reshard, bias):
    model, batch, expected = made(tied=tied, bias=bias)
    for each in wrapped:
        fully_shard(getattr(model, each))
    fully_shard(model, reshard_after_forward=reshard)
    rank = dist.get_rank()
    for _ in range(2):
        model.zero_grad()
        hidden = model(batch.ids[rank])
        assert isinstance(model.head.weight, DTensor) == ("head" in wrapped or reshard)
        batch.loss(op, model, rank, hidden).backward()
        same_gradients(model, expected)


both_ops = pytest.mark.parametrize("op", ["linear_policy_loss", "linear_logprob"])
WRAPPED = {
    "head apart": (["layer", "head"], False, False, True),
    "head in the root": (["layer"], False, True, False),
    "unsharded root": ([], False, False, False),
    "tied": (["layer"], True, True, False),
    "tied, unsharded root": ([], True, False, False),
}


@both_ops
@pytest.mark.parametrize("case", WRAPPED)
def test_fully_sharded(case, op):
    on_ranks(RANKS, fsdp, op, *WRAPPED[case])


def fsdp_accumulates(op):
    """Two micro-batches, the first without synchronisation: the head is reduced in both, which adds up to the same."""
    model, batch, expected = made(tied=True)
    fully_shard(model, reshard_after_forward=True)
    rank = dist.get_rank()
    for last in (False, True):
        model.set_requires_gradient_sync(last)
        (batch.loss(op, model, rank, model(batch.ids[rank])) / 2).backward()
    same_gradients(model, expected)


@both_ops
def test_fully_sharded_accumulation(op):
    on_ranks(RANKS, fsdp_accumulates, op)


def fsdp_with_grad_weight():
    """The whole (V, D) of this rank's tokens: gathered once, averaged once, by the caller."""
    model, batch, expected = made()
    fully_shard(model, reshard_after_forward=True)
    rank, grad_weight = dist.get_rank(), torch.zeros(VOCABULARY, WIDTH)
    for _ in range(2):
        options = {"scale": RANKS / 2, "grad_weight": grad_weight}
        batch.loss("linear_policy_loss", model, rank, model(batch.ids[rank]), **options).backward()
    assert model.head.weight.grad is None
    dist.all_reduce(grad_weight)
    model.head.weight.grad = distribute_tensor(grad_weight / RANKS, model.head.weight.device_mesh, [Shard(0)])
    same_gradients(model, expected)


def test_fully_sharded_with_grad_weight():
    on_ranks(RANKS, fsdp_with_grad_weight)


def mixed_precision(op):
    """Compute in bfloat16, reduce in float32: as FSDP2 does with a parameter inside its module's forward."""
    batch, rank, policy = Batch(), dist.get_rank(), MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    model, gradients = Model(), []
    hidden = [2 * torch.randn(ROWS, WIDTH) for _ in range(RANKS)]
    plain = copy.deepcopy(model).bfloat16()
    for each in range(RANKS):
        batch.loss(op, plain, each, hidden[each].bfloat16()).backward()
        gradients.append(plain.head.weight.grad.float())
        plain.zero_grad()
    for autocast in (False, True):
        sharded = copy.deepcopy(model)
        fully_shard(sharded.head, mp_policy=policy)
        given = (hidden[rank] if autocast else hidden[rank].bfloat16()).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = batch.loss(op, sharded, rank, given)
        loss.backward()
        grad = sharded.head.weight.grad
        assert grad.dtype == torch.float32 and given.grad.dtype == given.dtype
        assert torch.allclose(grad.full_tensor(), sum(gradients) / RANKS, rtol=1e-6, atol=0)


@both_ops
def test_mixed_precision(op):
    on_ranks(RANKS, mixed_precision, op)


def ddp(op, tied):
    model, batch, expected = made(tied=tied, bias=not tied)
    wrapped, rank = DistributedDataParallel(model), dist.get_rank()
    for _ in range(2):
        model.zero_grad()
        batch.loss(op, model, rank, wrapped(batch.ids[rank])).backward()
        same_gradients(model, expected)
    model.zero_grad()
    with wrapped.no_sync():
        (batch.loss(op, model, rank, wrapped(batch.ids[rank])) / 2).backward()
    (batch.loss(op, model, rank, wrapped(batch.ids[rank])) / 2).backward()
    same_gradients(model, expected)


@both_ops
@pytest.mark.parametrize("tied", [False, True])
def test_distributed_data_parallel(tied, op):
    on_ranks(RANKS, ddp, op, tied)


def ddp_with_grad_weight():
    """The head has no .grad to wait for, so it stays out of what is wrapped."""
    model, batch, expected = made()
    backbone = nn.Sequential(model.embedding, model.layer)
    wrapped, rank, grad_weight = DistributedDataParallel(backbone), dist.get_rank(), torch.zeros(VOCABULARY, WIDTH)
    for _ in range(2):
        hidden = 2 * torch.tanh(wrapped(batch.ids[rank]))
        batch.loss("linear_policy_loss", model, rank, hidden, scale=RANKS / 2, grad_weight=grad_weight).backward()
    dist.all_reduce(grad_weight)
    model.head.weight.grad = grad_weight / RANKS
    same_gradients(model, expected)


def test_distributed_data_parallel_with_grad_weight():
    on_ranks(RANKS, ddp_with_grad_weight)


def tensor_parallel(op):
    """A mesh of data x tensor parallel ranks, the head cut over both; with group= by shards, without it gathered."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    data, cut = mesh["dp"], mesh["tp"]
    for group in (None, cut.get_group()):
        model, batch, expected = made(bias=True)
        for name, parameter in list(model.head.named_parameters()):
            setattr(model.head, name, nn.Parameter(distribute_tensor(parameter.detach(), cut, [Shard(0)])))
        if data.size() > 1:
            fully_shard(model.head, mesh=data)
            rank, scale = data.get_local_rank(), RANKS
        else:
            rank, scale = None, 1
        ids = batch.ids.flatten() if rank is None else batch.ids[rank]
        hidden = model(ids)
        batch.loss(op, model, rank, hidden, scale=scale, group=group).backward()
        if data.size() > 1:
            for parameter in (*model.layer.parameters(), *model.embedding.parameters()):
                dist.all_reduce(parameter.grad.div_(data.size()), group=data.get_group())
        same_gradients(model, expected)


@both_ops
@pytest.mark.parametrize("world", [2, 4])
def test_tensor_parallel(world, op):
    on_ranks(world, tensor_parallel, op)


def gathered_once_for_several_calls():
    model, batch, expected = made()
    fully_shard(model, reshard_after_forward=True)
    rank, calls = dist.get_rank(), []
    hidden = [model(batch.ids[rank]) for _ in range(2)]
    redistribute = DTensor.redistribute
    DTensor.redistribute = lambda *a, **k: calls.append(1) or redistribute(*a, **k)
    weight = whole(model.head.weight)
    losses = [
        linear_policy_loss(
            h, weight, batch.chosen[rank], lambda out, rows: batch.losses(out.logprob, batch.advantages[rank], rows)
        )[0]
        for h in hidden
    ]
    (sum(losses) / 2).backward()
    assert len(calls) == 2
    same_gradients(model, expected)


def test_gathered_once_for_several_calls():
    on_ranks(RANKS, gathered_once_for_several_calls)


def hybrid(op):
    """Shards in pairs of ranks, copies of them in two: FSDP2 averages over both dimensions of the mesh."""
    model, batch, expected = made(bias=True)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model.head, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    data = dist.get_rank() // 2  # two ranks each have the same tokens, which leaves the mean as it is
    batch.loss(op, model, data, model(batch.ids[data])).backward()
    same_gradients(model, expected)


@both_ops
def test_hybrid_sharding(op):
    on_ranks(4, hybrid, op)


def plain_and_sharded_heads_are_the_same():
    model, batch, rank = Model(), Batch(), dist.get_rank()
    hidden, chosen = model(batch.ids[rank]).detach(), batch.chosen[rank]
    mesh = init_device_mesh("cpu", (RANKS,))
    head = distribute_tensor(model.head.weight.detach(), mesh, [Shard(0)])
    assert whole(hidden) is hidden and whole(None) is None
    assert torch.equal(whole(head), model.head.weight) and whole(head, dtype=torch.bfloat16).dtype == torch.bfloat16
    plain = linear_logprob(hidden, model.head.weight, chosen).logprob
    assert torch.equal(linear_logprob(hidden, head, chosen).logprob, plain)
    with torch.no_grad():
        check("logprob", linear_logprob(hidden, head, chosen).logprob, plain.double(), plain, torch.float32)


def test_plain_and_sharded_heads_are_the_same():
    on_ranks(RANKS, plain_and_sharded_heads_are_the_same)


def wrong_calls_get_one_sentence():
    model, batch = Model(), Batch()
    mesh, hidden, chosen = init_device_mesh("cpu", (RANKS,)), model(batch.ids[0]), batch.chosen[0]
    sharded = distribute_tensor(hidden.detach(), mesh, [Shard(0)])
    for op in (linear_logprob, lambda *a, **k: linear_policy_loss(*a, lambda out, rows: out.logprob, **k)):
        with pytest.raises(ValueError, match="hidden must be a plain tensor; got a DTensor"):
            op(sharded, model.head.weight, chosen)
        columns = distribute_tensor(model.head.weight.detach(), mesh, [Shard(1)])
        with pytest.raises(ValueError, match=r"cut along the vocabulary, Shard\(0\), over group=; got S"):
            op(hidden, columns, chosen, group=mesh.get_group())
    with pytest.raises(ValueError, match="grad_weight must be a plain tensor"):
        linear_policy_loss(
            hidden, model.head.weight, chosen, lambda out, rows: out.logprob,
            grad_weight=distribute_tensor(torch.zeros(VOCABULARY, WIDTH), mesh, [Shard(0)]),
        )  # fmt: skip


def test_wrong_calls_get_one_sentence():
    on_ranks(RANKS, wrong_calls_get_one_sentence)
