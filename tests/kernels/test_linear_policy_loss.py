"""linear_policy_loss against float64 autograd through all logits, and the promises of its contract, each attacked."""

import pytest
import torch
from head_case import Case, compare, same

from fuserl.kernels import linear_policy_loss as module
from fuserl.kernels.head_outputs import OUTPUTS
from fuserl.kernels.linear_policy_loss import linear_policy_loss
from fuserl.kernels.policy_loss import STATISTICS, merged, policy_loss

DEVICES = [pytest.param("cpu", "cpu"), pytest.param("cuda", "triton", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device,backend", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("chunk", [7, 45, None])
def test_equals_float64(dtype, chunk, device, backend):
    compare(Case(dtype=dtype, device=device), backend=backend, chunk=chunk)


@pytest.mark.parametrize("output", [name for name in OUTPUTS if name != "is_top1"])
def test_gradient_of_every_output(output):
    compare(Case(), lambda out, rows: getattr(out, output).square(), outputs=(output,), chunk=16)


def test_all_outputs_together_with_temperature():
    case = Case()

    def loss(out, rows):
        return out.logprob * out.entropy + out.mean_logprob * 0.1 + out.sum_sq_prob * out.mean_logit + out.is_top1

    compare(case, loss, outputs=OUTPUTS, chunk=20, temperature=0.8)
    compare(case, loss, outputs=OUTPUTS, chunk=20, temperature=torch.rand(45) + 0.5)


HEADS = [{"bias": True}, {"logit_scale": 0.3}, {"softcap": 20.0}, {"bias": True, "logit_scale": 1.3, "softcap": 30.0}]


@pytest.mark.parametrize("device,backend", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_heads_that_are_more_than_a_product(head, dtype, device, backend):
    case = Case(dtype=dtype, device=device, zero_half=True)

    def loss(out, rows):
        return case.advantages[rows].to(out.logprob.dtype) * (out.logprob - out.entropy * out.logprob.exp())

    for options in ({}, {"live": (case.advantages != 0).cpu(), "temperature": 0.8}):
        compare(case, loss, backend, outputs=("logprob", "entropy"), chunk=20, **head, **options)


@pytest.mark.parametrize("chunk", [4, 45, None])
def test_batch_scope(chunk):
    case, live = Case(), torch.rand(45) < 0.6

    def loss(out, rows):
        losses = (out.logprob - out.logprob.mean()).square() * out.logprob.softmax(0)
        return losses, {"rows": torch.full((1, 1), len(rows)).to(losses)}

    compare(case, loss, scope="batch", chunk=chunk, softcap=30.0, bias=True)
    compare(case, loss, scope="batch", chunk=chunk, live=live)
    assert case.run(loss, scope="batch", chunk=chunk, live=live)[4]["rows"].tolist() == [[live.sum()]]
    assert case.run(loss, scope="batch", live=torch.zeros(45, dtype=torch.bool))[0] == 0


def sequence_loss(case, offsets):
    """GSPO's shape: each token's loss is its rollout's length-normalised ratio times the advantage."""
    rollout = torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff())

    def loss(out, rows):
        b = rollout[rows]
        difference = out.logprob - case.old[rows].to(out.logprob.dtype)
        zeros = difference.new_zeros(len(offsets) - 1)
        mean = zeros.index_add(0, b, difference) / zeros.index_add(0, b, torch.ones_like(difference)).clamp(min=1)
        return -(mean.exp() * case.advantages.to(mean.dtype)[offsets[:-1]])[b] / case.rows

    return loss


@pytest.mark.parametrize("chunk", [4, 10, 19, 20, 45, None])
def test_rollout_scope(chunk):
    case, offsets = Case(), torch.tensor([0, 3, 3, 14, 33, 45])
    compare(case, sequence_loss(case, offsets), scope="rollout", offsets=offsets, chunk=chunk)


def test_rollout_scope_with_dead_rollouts():
    case, offsets = Case(), torch.tensor([0, 3, 3, 14, 33, 45])
    dead = torch.zeros(45, dtype=torch.bool)
    dead[3:14] = dead[33:45] = True
    case.advantages[dead] = 0.0
    loss = sequence_loss(case, offsets)
    whole = case.run(loss, scope="rollout", offsets=offsets, chunk=10)
    part = case.run(loss, scope="rollout", offsets=offsets, chunk=10, live=~dead)
    same(whole, part)
    with pytest.raises(ValueError, match="live must be constant within a rollout"):
        dead[4] = False
        case.run(loss, scope="rollout", offsets=offsets, live=~dead)


@pytest.mark.parametrize("chunk", [8, 45])
def test_dropping_dead_rows_changes_nothing(chunk):
    case = Case(zero_half=True)
    live = case.advantages != 0
    whole, part = case.run(chunk=chunk), case.run(chunk=chunk, live=live)
    same(whole, part)
    assert (part[1][~live] == 0).all()
    assert part[3].logprob[~live].isnan().all() and part[3].logprob[live].isfinite().all()
    assert part[4]["ratio"][~live].isnan().all()


def test_dead_rows_cost_no_product_and_are_not_seen(monkeypatch):
    case = Case(zero_half=True)
    live, seen = case.advantages != 0, []
    projected = []
    logits = module.head_products.HeadProducts.logits
    monkeypatch.setattr(
        module.head_products.HeadProducts,
        "logits",
        lambda self, piece: projected.append(piece.stop - piece.start) or logits(self, piece),
    )
    case.run(lambda out, rows: (seen.append(rows), case.clipped(out, rows))[1], live=live, chunk=9)
    assert torch.equal(torch.cat(seen), live.nonzero().squeeze(1)) and sum(projected) == live.sum()


def test_rows_dead_by_clipping_cost_no_backward_product(monkeypatch):
    case = Case(zero_half=True)
    multiplied = []
    accumulate = module.head_products.HeadProducts.accumulate
    monkeypatch.setattr(
        module.head_products.HeadProducts,
        "accumulate",
        lambda self, gradient, *rest: multiplied.append(len(gradient)) or accumulate(self, gradient, *rest),
    )
    _, d_hidden, *_ = case.run(chunk=9)
    assert sum(multiplied) == (d_hidden != 0).any(dim=1).sum() < case.rows


def test_chunk_size_does_not_matter():
    case = Case(rows=101)
    whole = case.run(chunk=101)
    for chunk in (1, 7, 64, 1000):
        same(whole, case.run(chunk=chunk))


def test_no_live_row_and_no_row():
    case = Case()
    value, d_hidden, d_weight, out, _ = case.run(live=torch.zeros(45, dtype=torch.bool))
    assert value == 0 and (d_hidden == 0).all() and (d_weight == 0).all() and out.logprob.isnan().all()
    empty = Case(rows=0)
    assert empty.run()[0] == 0


def test_captured_trainable_tensor_raises():
    case, coefficient = Case(), torch.tensor(0.5, requires_grad=True)
    critic = torch.nn.Linear(24, 1)
    with pytest.raises(ValueError, match=r"captured.*params="):
        case.run(lambda out, rows: out.logprob * coefficient)
    with pytest.raises(ValueError, match="captured"):
        case.run(lambda out, rows: out.logprob * critic(case.hidden[rows]).squeeze(-1))


def test_params_get_their_gradient():
    case, grads = Case(), {}
    for backend in ("cpu", "reference"):
        coefficient = torch.tensor(0.5, requires_grad=True)
        weight = case.weight.clone().requires_grad_()
        loss, *_ = linear_policy_loss(
            case.hidden, weight, case.ids, lambda out, rows, c=coefficient: out.logprob * c.exp(),
            params=(coefficient,), chunk=10, backend=backend,
        )  # fmt: skip
        (3 * loss).backward()
        grads[backend] = coefficient.grad, weight.grad
    assert torch.allclose(grads["cpu"][0], grads["reference"][0], rtol=1e-5)
    same(grads["reference"], grads["cpu"])


def test_loss_that_ignores_its_outputs_raises():
    with pytest.raises(ValueError, match="must depend on its outputs"):
        Case().run(lambda out, rows: out.logprob.detach())


def test_reduced_loss_raises():
    with pytest.raises(ValueError, match="one value per row"):
        Case().run(lambda out, rows: out.logprob.mean())


def fused(case, seen=None):
    """The clipped loss by the op that returns ten numbers for all rows it is given."""

    def loss(out, rows):
        old, advantages = (x[rows].to(out.logprob.dtype) for x in (case.old, case.advantages))
        losses, statistics = policy_loss(out.logprob, advantages, old_logprobs=old)
        if seen is not None:
            seen.append(len(rows))
        return losses / case.rows, {"clip": statistics[None], "ratio": (out.logprob - old).exp()}

    return loss


@pytest.mark.parametrize("backend,chunk,chunks", [("cpu", 10, 5), ("cpu", None, 1), ("reference", 10, 1)])
def test_statistics_of_a_chunk_stand_one_below_the_other(backend, chunk, chunks):
    case = Case()
    loss, d_hidden, d_weight, out, stats = case.run(fused(case), chunk=chunk, backend=backend)
    assert stats["clip"].shape == (chunks, len(STATISTICS)) and stats["clip"].dtype == torch.float32
    assert not stats["clip"].requires_grad and stats["ratio"].shape == (45,)
    whole = policy_loss(out.logprob, case.advantages, old_logprobs=case.old.float())[1]
    assert torch.allclose(merged(stats["clip"]), whole, rtol=1e-5) and whole[0] == 45 and whole[1:3].all()
    same(case.run(backend="reference"), (loss, d_hidden, d_weight))


def test_statistics_of_whole_rollouts():
    case, offsets, seen = Case(), torch.tensor([0, 3, 3, 14, 33, 45]), []
    *_, stats = case.run(fused(case, seen), scope="rollout", offsets=offsets, chunk=12)
    assert seen == [3, 11, 19, 12] and stats["clip"][:, 0].tolist() == seen


def test_statistics_of_another_shape_raise():
    for value in (torch.ones(2, 10), torch.ones(10), torch.tensor(1.0), 1.0):
        with pytest.raises(ValueError, match=r"statistics of that shape or \(1, K\); got .* for clip"):
            Case().run(lambda out, rows, value=value: (-out.logprob, {"clip": value}))
    with pytest.raises(ValueError, match=r"got \(1, 45\) for the loss"):
        Case().run(lambda out, rows: -out.logprob[None])


def test_output_not_asked_for_raises():
    with pytest.raises(AttributeError, match=r"no 'entropy'.*outputs="):
        Case().run(lambda out, rows: out.entropy)


def test_coupled_rows_raise_under_debug(monkeypatch):
    monkeypatch.setenv("FUSERL_DEBUG", "1")
    case = Case()
    case.run(chunk=10)
    with pytest.raises(ValueError, match="each row's loss must depend on that row only"):
        case.run(lambda out, rows: out.logprob - out.logprob.mean(), chunk=10)


def test_frozen_head_and_frozen_hidden(monkeypatch):
    case = Case()
    _, d_hidden, d_weight, *_ = case.run(chunk=10)
    hidden = case.hidden.clone().requires_grad_()
    with monkeypatch.context() as patch:
        patch.setattr(module.head_products.HeadProducts, "_add_weight", None)
        linear_policy_loss(hidden, case.weight, case.ids, case.clipped, chunk=10)[0].backward()
    assert torch.equal(hidden.grad, d_hidden)
    weight = case.weight.clone().requires_grad_()
    with monkeypatch.context() as patch:
        patch.setattr(module.head_products.HeadProducts, "_times_weight", None)
        linear_policy_loss(case.hidden, weight, case.ids, case.clipped, chunk=10)[0].backward()
    assert torch.equal(weight.grad, d_weight)


def test_no_grad_gives_outputs_only():
    case = Case()
    with torch.no_grad():
        loss, out, _ = linear_policy_loss(case.hidden, case.weight, case.ids, case.clipped, chunk=10)
    expected = case.run(chunk=10)
    assert torch.equal(loss, expected[0]) and torch.equal(out.logprob, expected[3].logprob)
    assert not out.logprob.requires_grad


def test_grad_weight_accumulates():
    case = Case()
    _, d_hidden, d_weight, *_ = case.run(chunk=10)
    start = torch.randn(301, 24)
    accumulated, hidden = start.clone(), case.hidden.clone().requires_grad_()
    weight = case.weight.clone().requires_grad_()
    for _ in range(2):
        linear_policy_loss(hidden, weight, case.ids, case.clipped, chunk=10, grad_weight=accumulated)[0].backward()
    assert weight.grad is None
    assert torch.allclose(accumulated - start, 2 * d_weight, atol=1e-5)
    assert torch.allclose(hidden.grad, 2 * d_hidden)
    loss, *_ = linear_policy_loss(hidden, weight, case.ids, case.clipped, grad_weight=accumulated)
    with pytest.raises(RuntimeError, match="root of backward"):
        (2 * loss).backward()


def test_scaled_loss_second_backward_and_second_derivative():
    case = Case()
    _, d_hidden, *_ = case.run()
    hidden = case.hidden.clone().requires_grad_()
    loss, *_ = linear_policy_loss(hidden, case.weight, case.ids, case.clipped)
    (loss * 3).backward(retain_graph=True)
    assert torch.allclose(hidden.grad, 3 * d_hidden)
    with pytest.raises(RuntimeError, match="once per call"):
        loss.backward()
    loss, *_ = linear_policy_loss(hidden, case.weight, case.ids, case.clipped)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_tied_weights():
    case = Case()
    results = []
    for backend in ("cpu", "reference"):
        weight = case.weight.clone().requires_grad_()
        hidden = torch.tanh(weight[case.ids] * 0.5 + case.hidden)
        loss, *_ = linear_policy_loss(hidden, weight, case.ids, lambda o, r: -o.logprob, chunk=10, backend=backend)
        loss.backward()
        results.append((loss.detach(), weight.grad))
    same(*results)


def test_between_compiled_regions():
    case = Case()
    before, after = torch.compile(torch.tanh, backend="aot_eager"), torch.compile(lambda x: x * 2, backend="aot_eager")

    def whole(hidden):
        return after(linear_policy_loss(before(hidden), case.weight, case.ids, case.clipped, chunk=10)[0])

    hidden = case.hidden.clone().requires_grad_()
    expected = torch.autograd.grad(
        2 * linear_policy_loss(torch.tanh(hidden), case.weight, case.ids, case.clipped, chunk=10)[0], hidden
    )[0]
    assert torch.allclose(torch.autograd.grad(whole(hidden), hidden)[0], expected)


def test_ten_runs_are_bit_equal():
    case = Case()
    first = case.run(chunk=10)
    for _ in range(9):
        assert all(torch.equal(a, b) for a, b in zip(first[:3], case.run(chunk=10)[:3], strict=True))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"hidden": torch.zeros(2, 3, 24)}, "hidden must be"),
        ({"weight": torch.zeros(24, 301)}, "weight must be"),
        ({"weight": torch.zeros(301, 24).bfloat16()}, "weight must be torch.float32"),
        ({"ids": torch.zeros(44, dtype=torch.int64)}, "ids must be"),
        ({"outputs": ("logprobs",)}, "outputs must be among"),
        ({"scope": "group"}, "scope must be one of"),
        ({"bias": torch.zeros(24)}, r"bias must be \(301,\)"),
        ({"softcap": -30.0}, "softcap must be positive"),
        ({"scope": "rollout"}, "offsets must be a host tensor"),
        ({"scope": "rollout", "offsets": torch.tensor([0, 44])}, "offsets must rise from 0 to 45"),
        ({"live": torch.ones(45)}, "live must be"),
        ({"grad_weight": torch.zeros(301, 24).bfloat16()}, "grad_weight must be"),
        ({"temperature": -1.0}, "temperature must be positive"),
    ],
)
def test_bad_input_gets_one_sentence(change, message):
    case = Case()
    arguments = {"hidden": case.hidden, "weight": case.weight, "ids": case.ids, **change}
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(token_loss=case.clipped, **arguments)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_casts_operands_and_nothing_else(backend):
    hidden, weight = torch.randn(9, 16), torch.randn(40, 16)
    ids = torch.randint(40, (9,))
    found = []
    for cast in (False, True):
        operands = [x.clone().to(torch.float32 if cast else torch.bfloat16).requires_grad_() for x in (hidden, weight)]
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            loss, out, _ = linear_policy_loss(*operands, ids, lambda out, rows: -out.logprob, backend=backend)
        loss.backward()
        found.append([loss.detach(), out.logprob, *(x.grad.float() for x in operands)])
        assert out.logprob.dtype == torch.float32
    assert all(map(torch.equal, *found))
