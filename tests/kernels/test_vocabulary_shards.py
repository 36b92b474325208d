"""Both ops of the head with its rows on two and four ranks, against float64 autograd through all logits on one."""

import pytest
import torch
import torch.distributed as dist
from head_case import Case
from ranks import on_ranks
from tolerance import check, check_rows

from fuserl.kernels.head_outputs import OUTPUTS
from fuserl.kernels.linear_logprob import linear_logprob, reference
from fuserl.kernels.linear_policy_loss import linear_policy_loss
from fuserl.kernels.vocabulary_shards import VocabularyShards, chunk_of

SIZES = {1: [301], 2: [150, 151], 4: [100, 1, 0, 200]}  # a rank may hold one row of the head, or none
WORLDS = [2, 4]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]  # ranks of gloo may share one
FLOATS = [torch.float32, torch.bfloat16, torch.float64]
HEADS = [{}, {"bias": True}, {"softcap": 20.0}, {"bias": True, "logit_scale": 1.3, "softcap": 30.0}]


def own(tensor):
    """This rank's rows."""
    return tensor.split(SIZES[dist.get_world_size()])[dist.get_rank()]


def every(shard):
    """The rows of all ranks."""
    shards = [None] * dist.get_world_size()
    dist.all_gather_object(shards, shard)
    return torch.cat(shards)


class Sharded(Case):
    """The case whose head is cut over the ranks, but for the reference."""

    def __init__(self, **options):
        torch.manual_seed(0)  # the numbers that a single rank is tested with
        super().__init__(**options)

    def run(self, loss=None, dtype=None, bias=False, backend=None, grad_weight=None, **options):
        """(loss, d_hidden, d_weight, out, stats) of one call, d_weight of all ranks."""
        if backend == "reference":
            return super().run(loss, dtype, bias, backend=backend, **options)
        hidden = self.hidden.clone().requires_grad_()
        weight = own(self.weight).clone().requires_grad_()
        bias = own(self.bias).clone().requires_grad_() if bias else None
        value, out, stats = linear_policy_loss(
            hidden, weight, self.ids, loss or self.clipped, bias=bias, group=dist.group.WORLD,
            grad_weight=grad_weight, **options,
        )  # fmt: skip
        value.backward()
        self.d_bias = None if bias is None else every(bias.grad)[None]
        return value.detach(), hidden.grad, None if grad_weight is not None else every(weight.grad), out, stats


def compare(case, loss=None, **options):
    """Every result within tests/tolerance.py; the loss, one number, whose error may be small by chance, by its rows."""

    def recorded(out, rows):
        result = (loss or case.clipped)(out, rows)
        losses, stats = result if isinstance(result, tuple) else (result, {})
        return losses, {**stats, "losses": losses}

    truth, true = case.run(recorded, torch.float64, backend="reference", **options), case.d_bias
    plain, plainly = case.run(recorded, torch.float32, backend="reference", **options), case.d_bias
    got = case.run(recorded, **options)
    accumulator = torch.float64 if case.hidden.dtype == torch.float64 else torch.float32
    for name, index in (("d_hidden", 1), ("d_weight", 2)):
        check_rows(name, got[index], truth[index], plain[index], case.hidden.dtype, accumulator)
    if true is not None:
        check_rows("d_bias", case.d_bias, true, plainly, case.bias.dtype, accumulator)
    rows = [vars(out) | stats for *_, out, stats in (got, truth, plain)]
    for name in rows[1]:
        check(name, *(each[name] for each in rows), accumulator)
    error = (plain[4]["losses"] - truth[4]["losses"]).abs().nansum()
    check("loss", got[0][None], truth[0][None], (truth[0] + error)[None], accumulator)


def policy_loss_equals_float64(device):
    for dtype in FLOATS:
        for chunk in (7, None):
            compare(Sharded(dtype=dtype, device=device), chunk=chunk)
    temperature = torch.rand(45).to(device) + 0.5
    for head in HEADS:
        case = Sharded(zero_half=True, device=device)

        def loss(out, rows, case=case):
            return case.advantages[rows].to(out.logprob.dtype) * (out.logprob - out.entropy * out.logprob.exp())

        for options in ({}, {"live": (case.advantages != 0).cpu(), "temperature": temperature}):
            compare(case, loss, outputs=("logprob", "entropy"), chunk=20, **head, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("world", WORLDS)
def test_policy_loss_equals_float64(world, device):
    on_ranks(world, policy_loss_equals_float64, device)


def every_output_and_its_gradient():
    case = Sharded()
    for output in OUTPUTS[:-1]:
        compare(case, lambda out, rows, output=output: getattr(out, output).square(), outputs=(output,), chunk=16)

    def loss(out, rows):
        return out.logprob * out.entropy + out.mean_logprob * 0.1 + out.sum_sq_prob * out.mean_logit + out.is_top1

    logits = case.hidden @ case.weight.T
    case.ids[::2], case.ids[1::2] = logits.argmax(1)[::2], logits[:, :100].argmax(1)[1::2]  # the first of one rank
    compare(case, loss, outputs=OUTPUTS, chunk=20, temperature=0.8)
    is_top1 = case.run(loss, outputs=OUTPUTS)[3].is_top1
    assert torch.equal(is_top1, (logits.argmax(1) == case.ids).float()) and is_top1[::2].all() and not is_top1.all()


@pytest.mark.parametrize("world", WORLDS)
def test_every_output_and_its_gradient(world):
    on_ranks(world, every_output_and_its_gradient)


def scopes():
    case, offsets = Sharded(), torch.tensor([0, 3, 3, 14, 33, 45])
    rollout = torch.arange(5).repeat_interleave(offsets.diff())

    def of_rollouts(out, rows):
        mean = out.logprob.new_zeros(5).index_add(0, rollout[rows], out.logprob)
        return mean[rollout[rows]].exp() * out.logprob

    for chunk in (4, 19, None):
        compare(case, of_rollouts, scope="rollout", offsets=offsets, chunk=chunk)
        compare(case, lambda out, rows: out.logprob.softmax(0) * out.logprob, scope="batch", chunk=chunk)


def test_scopes():
    on_ranks(2, scopes)


def logprob_equals_float64(device):
    for dtype in FLOATS:
        for head in HEADS:
            case = Case(dtype=dtype, device=device)
            mask, temperature = torch.rand(45).to(device) < 0.7, torch.rand(45).to(device) + 0.5
            options = {"mask": mask, "temperature": temperature, **head}
            case.bias = case.bias if options.pop("bias", None) else None
            g = {name: torch.randn(45).to(device) for name in OUTPUTS[:-1]}
            truth = with_gradients(reference, case, g, torch.float64, **options)
            plain = with_gradients(reference, case, g, torch.float32, **options)
            for memory in (None, 10_000):
                found = with_gradients(linear_logprob, case, g, None, chunk=8, memory=memory, **options)
                for name, values in truth.items():
                    if dtype == torch.float64:
                        assert torch.allclose(found[name], values, rtol=1e-11, atol=1e-12 * values.abs().max()), name
                    elif name in OUTPUTS:
                        check(name, found[name], values, plain[name], torch.float32)
                    else:
                        check_rows(name, found[name], values, plain[name], dtype, torch.float32)


def with_gradients(function, case, g, dtype, **options):
    """Outputs and gradients by name; of all ranks where this one has a part."""
    group = {} if function is reference else {"group": dist.group.WORLD}
    cut, joined = (own, every) if group else (lambda x: x, lambda x: x)
    hidden, weight, bias = (
        x if x is None else x.to(dtype or x.dtype).clone().requires_grad_()
        for x in (case.hidden, cut(case.weight), None if case.bias is None else cut(case.bias))
    )
    out = function(hidden, weight, case.ids, outputs=tuple(g), bias=bias, **group, **options)
    sum((getattr(out, name) * x.to(getattr(out, name).dtype)).sum() for name, x in g.items()).backward()
    gradients = {"d_hidden": hidden.grad, "d_weight": joined(weight.grad)}
    gradients |= {} if bias is None else {"d_bias": joined(bias.grad)[None]}
    return {name: x.detach() for name, x in vars(out).items()} | gradients


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("world", WORLDS)
def test_logprob_equals_float64(world, device):
    on_ranks(world, logprob_equals_float64, device)


def large_logits_lose_nothing():
    """Multiples of 1/64 near 1e4, which every product has exactly: only the merging can err."""
    case = Case()
    case.hidden, case.weight = torch.randint(-8, 8, (45, 24)) / 8, torch.randint(-30, 30, (301, 24)) / 8
    case.hidden[:, 0], case.weight[:, 0] = 1024.0, 10.0
    case.bias, g = None, {name: torch.randn(45) for name in ("logprob", "entropy")}
    truth, plain = (with_gradients(reference, case, g, dtype) for dtype in (torch.float64, torch.float32))
    for backend in ("cpu", "reference"):
        found = with_gradients(linear_logprob, case, g, None, backend=backend)
        for name in g:
            check(name, found[name], truth[name], plain[name], torch.float32)
        for name in ("d_hidden", "d_weight"):
            check_rows(name, found[name], truth[name], plain[name], torch.float32)


@pytest.mark.parametrize("world", WORLDS)
def test_large_logits_lose_nothing(world):
    on_ranks(world, large_logits_lose_nothing)


def a_rank_without_a_drawable_token():
    """A bias of -inf over all of a rank's rows; the last token of the batch is one of them."""
    case, sizes = Case(), SIZES[dist.get_world_size()]
    case.bias[: sizes[0]] = -torch.inf
    case.ids = sizes[0] + case.ids % (301 - sizes[0])
    g = {name: torch.randn(45) for name in ("logprob", "entropy", "sum_sq_prob")}
    truth = with_gradients(reference, case, g, torch.float64)
    plain = with_gradients(reference, case, g, torch.float32)
    found = with_gradients(linear_logprob, case, g, None)
    for name in g:
        check(name, found[name], truth[name], plain[name], torch.float32)
    for name in ("d_hidden", "d_weight", "d_bias"):
        check_rows(name, found[name], truth[name], plain[name], torch.float32)
    case.ids[-1] = 0
    out = linear_logprob(
        case.hidden, own(case.weight), case.ids, bias=own(case.bias), outputs=OUTPUTS, group=dist.group.WORLD
    )
    assert out.logprob[-1] == -torch.inf and out.mean_logit.isinf().all() and out.entropy.isfinite().all()


@pytest.mark.parametrize("world", WORLDS)
def test_a_rank_without_a_drawable_token(world):
    on_ranks(world, a_rank_without_a_drawable_token)


def nan_stays_in_its_row():
    case = Case()
    case.hidden[3] = torch.nan
    out = linear_logprob(case.hidden, own(case.weight), case.ids, outputs=OUTPUTS, group=dist.group.WORLD)
    for name, value in vars(out).items():
        assert value[3].isnan() and value.isnan().sum() == 1, name


def test_nan_stays_in_its_row():
    on_ranks(4, nan_stays_in_its_row)


def ten_runs_and_all_ranks_have_the_same_bits():
    case = Sharded()
    first = case.run(chunk=10)
    for _ in range(9):
        assert all(torch.equal(a, b) for a, b in zip(first[:3], case.run(chunk=10)[:3], strict=True))
    ranks = every(torch.cat([first[0][None], first[1].flatten(), first[3].logprob])[None])
    assert (ranks == ranks[0]).all()


@pytest.mark.parametrize("world", WORLDS)
def test_ten_runs_and_all_ranks_have_the_same_bits(world):
    on_ranks(world, ten_runs_and_all_ranks_have_the_same_bits)


def d_hidden_is_rounded_once():
    """Parts of the sum that were rounded to bfloat16 each would differ in half of the elements."""
    case = Sharded(dtype=torch.bfloat16)
    found, single = case.run()[1], Case.run(case)[1]
    assert (found != single).float().mean() < 0.02 and (found != 0).any()


def test_d_hidden_is_rounded_once():
    on_ranks(4, d_hidden_is_rounded_once)


def test_a_token_that_no_rank_has_is_nan():
    """As on a GPU, where nobody looks."""
    shards = VocabularyShards(torch.tensor([3, 2]), "")
    merged = shards._merged(torch.randn(2, 4, 3).double(), torch.tensor([-1, 4, 5]), 4, torch.float32)
    assert merged.isnan().all(0).tolist() == [True, False, True]


def test_a_device_chunk_does_not_follow_the_size_of_a_shard():
    ids = torch.empty(0, device="meta")
    assert chunk_of(None, "group", ids) == 2048 and chunk_of(7, "group", ids) == 7 and chunk_of(None, None, ids) is None


def one_gather_per_chunk_and_one_reduction():
    case, calls = Case(), []
    for name in ("all_gather", "all_reduce"):
        function = getattr(dist, name)
        setattr(dist, name, lambda *a, name=name, f=function, **k: calls.append(name) or f(*a, **k))
    hidden, weight = case.hidden.requires_grad_(), own(case.weight).requires_grad_()
    expected = ["all_gather"] * 6 + ["all_reduce"]  # what the ranks hold, and five chunks
    linear_policy_loss(hidden, weight, case.ids, case.clipped, chunk=10, group=dist.group.WORLD)[0].backward()
    assert calls == expected
    linear_logprob(hidden, weight, case.ids, chunk=10, group=dist.group.WORLD).logprob.sum().backward()
    assert calls == 2 * expected
    linear_logprob(hidden.detach(), weight, case.ids, group=dist.group.WORLD).logprob.sum().backward()
    assert calls == 2 * expected + expected[:2]


def test_one_gather_per_chunk_and_one_reduction():
    on_ranks(2, one_gather_per_chunk_and_one_reduction)


def rows_that_do_not_exist_or_do_not_count():
    case, group = Sharded(rows=0), {"group": dist.group.WORLD}
    assert case.run()[0] == 0
    for live in (torch.zeros(45, dtype=torch.bool), torch.arange(45) % 3 > 0):
        case = Sharded()
        _, d_hidden, d_weight, out, _ = case.run(live=live)
        assert (d_hidden[~live] == 0).all() and out.logprob[~live].isnan().all() and d_weight.isfinite().all()
        case.ids[~live] = -100
        given = case.hidden.view(5, 9, 24), own(case.weight), case.ids.view(5, 9)
        masked = linear_logprob(*given, mask=live.view(5, 9), **group).logprob.flatten()
        assert (masked[~live] == 0).all() and torch.equal(masked[live], out.logprob[live])


def test_rows_that_do_not_exist_or_do_not_count():
    on_ranks(4, rows_that_do_not_exist_or_do_not_count)


def grad_weight_accumulates():
    case = Sharded()
    _, d_hidden, d_weight, *_ = case.run(chunk=10)
    accumulated = torch.ones_like(own(case.weight))
    for _ in range(2):
        again = case.run(chunk=10, grad_weight=accumulated)[1]
    assert torch.equal(again, d_hidden)
    assert torch.allclose(accumulated - 1, 2 * own(d_weight), atol=1e-5)


def test_grad_weight_accumulates():
    on_ranks(2, grad_weight_accumulates)


def autocast_casts_operands():
    case, found = Case(), []
    for cast in (False, True):
        dtype = torch.float32 if cast else torch.bfloat16
        leaves = [x.to(dtype).clone().requires_grad_() for x in (case.hidden, own(case.weight))]
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            logprob = linear_logprob(*leaves, case.ids, group=dist.group.WORLD).logprob
            loss, *_ = linear_policy_loss(*leaves, case.ids, case.clipped, group=dist.group.WORLD)
        gradients = [*torch.autograd.grad(logprob.sum(), leaves), *torch.autograd.grad(loss, leaves)]
        found.append([logprob, loss, *(x.float() for x in gradients)])
    assert all(map(torch.equal, *found))


def test_autocast_casts_operands():
    on_ranks(2, autocast_casts_operands)


def wrong_calls_get_one_sentence_on_every_rank():
    case, group, rank = Case(), dist.group.WORLD, dist.get_rank()
    given = {"hidden": case.hidden, "weight": own(case.weight), "ids": case.ids, "group": group}
    for change in (
        {"ids": case.ids.roll(rank)},
        {"chunk": 10 + rank},
        {"outputs": OUTPUTS[rank:]},
    ):
        with pytest.raises(ValueError, match="every rank of group= must be given the same tokens"):
            linear_logprob(**{**given, **change})
        with pytest.raises(ValueError, match="every rank of group= must be given the same tokens"):
            linear_policy_loss(token_loss=case.clipped, **{**given, **change})
    for id in (-1, 301):
        with pytest.raises(ValueError, match=r"ids must lie in \[0, 301\)"):
            linear_logprob(**{**given, "ids": torch.where(case.ids == case.ids[0], id, case.ids)})
    with pytest.raises(ValueError, match="the reference cannot take group="):
        linear_policy_loss(token_loss=case.clipped, backend="reference", **given)
    alone = {"extra_ids": case.ids}, {"allowed": (case.ids, torch.arange(46))}
    for options in alone:
        outputs = ("logprob", "extra_logprob") if "extra_ids" in options else ("logprob",)
        with pytest.raises(ValueError, match="must be left out with group="):
            linear_logprob(outputs=outputs, **options, **given)
    with pytest.raises(ValueError, match="reference must be left out with group="):
        beside = {"outputs": ("reverse_kl",), "reference": (case.hidden, own(case.weight))}
        linear_policy_loss(token_loss=case.clipped, **beside, **given)


def test_wrong_calls_get_one_sentence_on_every_rank():
    on_ranks(2, wrong_calls_get_one_sentence_on_every_rank)


def compiles_and_passes_opcheck():
    case, name = Case(), dist.group.WORLD.group_name
    leaves = [x.clone().requires_grad_() for x in (case.hidden, own(case.weight), own(case.bias))]

    def loss(hidden, weight, bias):
        return linear_logprob(hidden, weight, case.ids, bias=bias, chunk=10, group=dist.group.WORLD).logprob.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gradients = (torch.autograd.grad(function(*leaves), leaves) for function in (loss, compiled))
    assert all(map(torch.equal, *gradients))
    sizes = torch.tensor(SIZES[dist.get_world_size()])
    settings = name, 1.0, 5.0, 1.0, 1.0, ["logprob", "mean_logprob"], 10, 0, False, "cpu"
    arguments = *leaves, None, None, case.ids, torch.arange(45) % 3 > 0, *[None] * 4, sizes, *settings
    checks = "test_schema", "test_faketensor", "test_autograd_registration"
    torch.library.opcheck(torch.ops.fuserl.linear_logprob, arguments, test_utils=checks)
    own_size = sizes[dist.get_rank()].item()
    arguments = case.ids, None, own_size, [1, 2], "linear_logprob", name
    torch.library.opcheck(torch.ops.fuserl.vocabulary_sizes, arguments, test_utils=checks)


def test_compiles_and_passes_opcheck():
    on_ranks(2, compiles_and_passes_opcheck)
