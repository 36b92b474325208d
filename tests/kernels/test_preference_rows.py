"""preference_loss of padded rollouts, (R, T): the same numbers as of the tokens alone, one after the other."""

import math

import pytest
import torch
from backends import INTERPRETING, cpu_only, each_backend, each_fast_backend, run_interpreted, threads
from paired_rollouts import FORMS, rollouts

from fuserl import DPO, KTO
from fuserl.kernels import preference_pairs
from fuserl.kernels.preference_loss import Given, preference_loss

if INTERPRETING:  # which takes its time over each lane
    preference_pairs.SUM_LAUNCH.update(BLOCK=32)
    preference_pairs.PAIR_LAUNCH.update(BLOCK=16)


def run(inputs, form, backend):
    """(losses, gradient, rewards, statistics), with the gradient that comes from above a number for each loss."""
    logprobs = inputs["logprobs"].detach().requires_grad_()
    losses, rewards, statistics = preference_loss(**{**inputs, "logprobs": logprobs, "form": form}, backend=backend)
    g = torch.arange(1, len(losses) + 1).to(losses)
    return losses.detach(), torch.autograd.grad(losses, logprobs, g)[0], rewards, statistics


def padded(lengths, form, device):
    """Packed rollouts, the same in rows with NaN behind them, and the mask."""
    packed = rollouts(lengths, form, device=device, given=())
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    rows = {name: x for name, x in packed.items() if name != "offsets"} | {"mask": mask.to(device)}
    for name in ("logprobs", "ref_logprobs"):
        if name in packed:
            rows[name] = torch.full(mask.shape, math.nan).masked_scatter(mask, packed[name].cpu()).to(device)
    return packed, rows, mask


@each_backend
@pytest.mark.parametrize("name", FORMS)
def test_padded_rollouts_are_packed_ones(name, device, backend):
    form = FORMS[name]
    packed, rows, mask = padded([3, 1, 37, 5], form, device)
    expected, got = run(packed, form, backend), run(rows, form, backend)
    assert got[1].shape == mask.shape and not got[1][~mask].any()
    for a, b in zip((got[0], got[1][mask], *got[2:]), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-6)


@each_backend
def test_rows_of_one_length_need_no_mask(device, backend):
    for form in (DPO(), KTO()):
        packed = rollouts([33] * 4, form, device=device, given=("indices",))
        rows = {name: x.view(4, 33) if name.endswith("logprobs") else x for name, x in packed.items()}
        del rows["offsets"]
        got, expected = run(rows, form, backend), run(packed, form, backend)
        assert got[1].shape == (4, 33) and got[1].is_contiguous()
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a.flatten(), b)


@each_backend
def test_rows_of_no_tokens(device, backend):
    nothing = torch.zeros(4, 0, device=device)
    losses, gradient, rewards, _ = run({"logprobs": nothing, "ref_logprobs": nothing}, DPO(), backend)
    assert losses.tolist() == pytest.approx([math.log(2)] * 2) and not rewards.any() and gradient.shape == (4, 0)


@each_fast_backend
def test_threads_and_runs_change_nothing(device, backend):
    lengths = [3, 1, 40, 5] if INTERPRETING else [30_000, 1, 70_000, 5]
    _, rows, _ = padded(lengths, DPO(), device)
    whole = run(rows, DPO(), backend)
    for count in (*[torch.get_num_threads()] * 9, 1, 2, 3):
        with threads(count):
            again = run(rows, DPO(), backend)
        assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))


@cpu_only
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend):
    _, rows, _ = padded([3, 1, 4, 2], DPO(), "cpu")
    for mask in (rows["mask"], None):
        given = Given(None, mask, None, None, rows["ref_logprobs"].nan_to_num(), None, None, None)
        arguments = *given, [0.1, 0.0, 1.0, 0.0, 0.0, 0.0], [0, 0], backend
        x = rows["logprobs"].nan_to_num()
        torch.library.opcheck(torch.ops.fuserl.preference_loss, (x.clone().requires_grad_(), *arguments))
        losses, *_, derivative = torch.ops.fuserl.preference_loss(x, *arguments)
        arguments = losses, derivative, *given[:4], True, x.shape, backend
        torch.library.opcheck(torch.ops.fuserl.preference_gradient, arguments)


@cpu_only
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    def loss(logprobs, ref_logprobs, mask):
        return preference_loss(logprobs * 2, DPO(), mask=mask, ref_logprobs=ref_logprobs)[0].sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lengths in ([3, 1, 4, 2], [5, 9, 4, 2, 1, 3]):
        _, rows, _ = padded(lengths, DPO(), "cpu")
        inputs = rows["logprobs"].requires_grad_(), rows["ref_logprobs"], rows["mask"]
        value, expected = compiled(*inputs), loss(*inputs)
        gradients = [torch.autograd.grad(v, inputs[0])[0] for v in (value, expected)]
        assert torch.equal(value, expected) and torch.equal(*gradients)


@cpu_only
def test_triton_in_the_interpreter():
    run_interpreted(__file__)
