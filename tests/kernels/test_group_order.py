"""group_ranks, pass_at_k_advantage and pair_advantage: against enumeration in float64, and what each is a form of."""

import itertools
import math

import pytest
import torch
from backends import cpu_only, each_backend

from fuserl.kernels.group_advantage import group_advantage
from fuserl.kernels.group_ranks import group_ranks
from fuserl.kernels.pair_advantage import pair_advantage
from fuserl.kernels.pass_at_k_advantage import pass_at_k_advantage

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def case(kind, dtype=torch.float64, device="cpu"):
    """Rewards of ragged groups in any order, with ties."""
    sizes = torch.tensor([1, 2, 6, 0, 7, 3])
    group = torch.arange(len(sizes)).repeat_interleave(sizes)[torch.randperm(int(sizes.sum()))]
    rewards = torch.randint(2, (len(group),)) if kind == "binary" else torch.randn(len(group)).mul(3).round().div(3)
    rewards = rewards.to(dtype) + (1e4 if kind == "far" else 0)
    rewards[group == 5] = 0.1
    return rewards.to(device), group.to(device)


def enumerated(rewards, group, k, baseline, scale, eps):
    """The definition: over all subsets."""
    out = torch.empty(len(rewards), dtype=torch.float64)
    for b in range(len(rewards)):
        members = (group == group[b]).nonzero().flatten().tolist()
        r, tries = rewards.double().tolist(), min(k, len(members))
        subsets = list(itertools.combinations(members, tries))
        best = torch.tensor([max(r[i] for i in s) for s in subsets], dtype=torch.float64)
        inside = torch.tensor([b in s for s in subsets])
        rest = torch.tensor([max((r[i] for i in s if i != b), default=r[b]) for s in subsets], dtype=torch.float64)
        others = best[~inside].mean() if (~inside).any() else best[inside].mean()
        taken = {None: 0.0, "mean": best.mean(), "leave_one_out": others, "rest": rest[inside].mean()}[baseline]
        x = torch.tensor([r[i] for i in members], dtype=torch.float64)
        deviation = {"group": x.std(correction=min(1, len(x) - 1)), "best": best.std(correction=0)}.get(scale)
        out[b] = best[inside].mean() - taken
        if scale:
            spread = len((x if scale == "group" else best).unique()) > 1
            out[b] = out[b] / (deviation + eps) if spread else 0.0
    return out


@each_backend
@pytest.mark.parametrize("scale", [None, "group", "best"])
@pytest.mark.parametrize("baseline", [None, "mean", "leave_one_out", "rest"])
@pytest.mark.parametrize("kind", ["binary", "ties", "far"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pass_at_k_over_all_subsets(kind, baseline, scale, dtype, device, backend):
    rewards, group = case(kind, dtype, device)
    for k in (1, 2, 3, 6, 9):
        if k == 1 and baseline == "rest":
            continue
        truth = enumerated(rewards.cpu(), group.cpu(), k, baseline, scale, 1e-3)
        got = pass_at_k_advantage(rewards, group, k, baseline=baseline, scale=scale, eps=1e-3, backend=backend)
        assert got.dtype == dtype
        # Sums of up to 35 rewards in double: their rounding over eps, and that of the result.
        allowed = (
            35 * 2.2e-16 * float(rewards.abs().max()) / (1e-3 if scale else 1)
            + 2 * torch.finfo(dtype).eps * truth.abs()
        )
        assert ((got.cpu().double() - truth).abs() <= allowed).all()
        if baseline == "mean":
            sums = torch.zeros(6, dtype=torch.float64).index_add(0, group.cpu(), got.cpu().double())
            assert sums.abs().max() <= 20 * torch.finfo(dtype).eps * max(1.0, float(got.abs().max()))
        if baseline is not None:
            assert (got[group == 5] == 0).all()


def test_pass_at_k_by_its_formula_and_its_neighbours():
    rewards, group = case("binary", torch.float64)
    for k in (1, 2, 4):
        chosen = group == 4
        n, c = 7, int(rewards[chosen].sum())
        mean = 1 - math.comb(n - c, k) / math.comb(n, k)
        wrong = 1 - mean - math.comb(n - c - 1, k - 1) / math.comb(n - 1, k - 1)
        got = pass_at_k_advantage(rewards, group, k)[chosen]
        torch.testing.assert_close(got, rewards[chosen] * (1 - mean - wrong) + wrong, rtol=0, atol=1e-14)
    for baseline in ("mean", "leave_one_out"):
        plain = group_advantage(rewards, group, baseline=baseline, scale=None)
        torch.testing.assert_close(pass_at_k_advantage(rewards, group, 1, baseline=baseline), plain, rtol=0, atol=1e-14)
    three, one = torch.tensor([1.0, 5.0, 3.0]), torch.zeros(3, dtype=torch.int64)
    assert pass_at_k_advantage(three, one, 3, baseline="rest").tolist() == [0, 2, 0]
    n, c, k = 16, 3, 4  # pass@4 is their mean
    with_it = pass_at_k_advantage((torch.arange(n) < c).double(), torch.zeros(n, dtype=torch.int64), k, baseline=None)
    assert float(with_it.mean()) == pytest.approx(0.607143, abs=1e-6)


def test_max_at_k_is_unbiased():
    """k A averaged is the gradient of the expected best of k, over every outcome of three draws of three arms."""
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    values, n, k = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64), 3, 2
    p, one = logits.softmax(0), torch.zeros(n, dtype=torch.int64)
    expected = sum(p[i] * p[j] * torch.maximum(values[i], values[j]) for i in range(3) for j in range(3))
    (truth,) = torch.autograd.grad(expected, logits, retain_graph=True)
    for baseline in (None, "leave_one_out", "rest"):
        found = torch.zeros(3, dtype=torch.float64)
        for draw in itertools.product(range(3), repeat=n):
            a = pass_at_k_advantage(values[list(draw)], one, k, baseline=baseline)
            score = torch.eye(3, dtype=torch.float64)[list(draw)] - p.detach()
            found += p.detach()[list(draw)].prod() * k * (a[:, None] * score).mean(0)
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-13)


@each_backend
def test_ranks(device, backend):
    rewards, group = case("ties", torch.float64, device)
    for ties in ("mean", "best"):
        got = group_ranks(rewards, group, ties=ties, backend=backend)
        for b in range(len(rewards)):
            members = rewards[group == group[b]]
            worse, same = int((members < rewards[b]).sum()), int((members == rewards[b]).sum()) - 1
            score = (worse + same * (0.5 if ties == "mean" else 1)) / max(len(members) - 1, 1)
            assert float(got[b]) == (score if len(members) > 1 else 0.5)
    again = group_ranks((rewards * 3 + 1).exp(), group, backend=backend)
    assert torch.equal(again, group_ranks(rewards, group, backend=backend))
    flat = group_advantage(group_ranks(rewards, group), group)[group == 5]
    assert (flat == 0).all()
    sixteen = torch.randn(16, device=device)
    one = torch.zeros(16, dtype=torch.int64, device=device)
    top = group_advantage(group_ranks(sixteen, one), one).max()
    assert float(top) == pytest.approx(0.5 / (math.sqrt(16 * 17 / 12) / 15), abs=2e-5)  # 1.5753


@pytest.mark.parametrize("device", DEVICES)
def test_pairs(device):
    rewards, group = case("ties", torch.float64, device)
    together = group[:, None] == group
    margins = torch.where(together, rewards[:, None] - rewards, 0.0)
    got = pair_advantage(margins, group, eps=0.0)
    torch.testing.assert_close(got, group_advantage(rewards, group, eps=0.0), rtol=0, atol=1e-13)
    shuffled = margins.gather(1, torch.argsort(torch.rand_like(margins), 1))
    torch.testing.assert_close(pair_advantage(shuffled, group, eps=0.0), got, rtol=0, atol=1e-13)
    square = torch.randn(5, 4, 4, device=device)
    square = square - square.mT
    dense = pair_advantage(square)
    assert dense.shape == (5, 4) and dense.sum(1).abs().max() < 1e-6
    rows = pair_advantage(square.flatten(0, 1), torch.arange(5, device=device).repeat_interleave(4))
    torch.testing.assert_close(rows.view(5, 4), dense, rtol=0, atol=1e-6)
    below = square.double().square().sum((1, 2), keepdim=True)[..., 0] / 24 + 1e-6
    torch.testing.assert_close(dense.double(), square.double().mean(2) / below.sqrt(), rtol=1e-6, atol=1e-7)
    cycle = torch.tensor([[[0.0, 1, -1], [-1, 0, 1], [1, -1, 0]]], device=device)
    assert (pair_advantage(cycle) == 0).all() and (pair_advantage(0 * cycle, eps=0.0) == 0).all()
    assert torch.equal(pair_advantage(square, scale=False), square.double().mean(2).float())


@each_backend
def test_permuted_empty_nan_and_ten_runs(device, backend):
    rewards, group = case("ties", torch.float64, device)
    order = torch.randperm(len(rewards), device=device)
    hurt = torch.where(torch.arange(len(group), device=device) == int((group == 2).nonzero()[0]), torch.nan, rewards)
    options = {"baseline": "rest", "scale": "group", "backend": backend}
    for function in (
        lambda r, g: group_ranks(r, g, backend=backend),
        lambda r, g: pass_at_k_advantage(r, g, 3, **options),
    ):
        once = function(rewards, group)
        assert torch.equal(function(rewards[order], group[order]), once[order])
        assert all(torch.equal(function(rewards, group), once) for _ in range(9))
        assert function(rewards[:0], group[:0]).shape == (0,)
        found = function(hurt, group)
        assert found[group == 2].isnan().all() and torch.equal(found[group != 2], once[group != 2])


@each_backend
def test_infinite_rewards(device, backend):
    """Ranks take them as they are; a difference of two infinities is NaN, in its group alone."""
    rewards = torch.tensor([math.inf, 1.0, -math.inf, 0.0, 2.0], device=device)
    group = torch.tensor([0, 0, 0, 3, 3], device=device)
    assert group_ranks(rewards, group, backend=backend).tolist() == [1, 0.5, 0, 0, 1]
    for baseline in ("mean", "leave_one_out", "rest"):
        got = pass_at_k_advantage(rewards, group, 2, baseline=baseline, backend=backend)
        assert got[:3].isnan().all() and got[3:].isfinite().all(), baseline


@each_backend
def test_large_groups(device, backend):
    """Of one group of thousands, against what its sorted rewards say."""
    rewards, group = torch.randn(3000, dtype=torch.float64, device=device), torch.zeros(3000, dtype=torch.int64)
    group, sorted_to = group.to(device), rewards.sort().indices
    ranks = torch.empty_like(rewards).scatter(0, sorted_to, torch.arange(3000, device=device).double() / 2999)
    assert torch.equal(group_ranks(rewards, group, backend=backend), ranks)
    two = pass_at_k_advantage(rewards, group, 2, baseline=None, backend=backend)
    pairs = torch.maximum(rewards[:, None], rewards).fill_diagonal_(0).sum(1) / 2999
    torch.testing.assert_close(two, pairs, rtol=0, atol=1e-11)


@cpu_only
def test_opcheck():
    rewards, group = case("ties", torch.float32)
    torch.library.opcheck(torch.ops.fuserl.group_ranks, (rewards, group, True, "cpu"))
    torch.library.opcheck(torch.ops.fuserl.pass_at_k_advantage, (rewards, group, 2, 1, 2, 1e-6, "cpu"))


def test_compiles_whole():
    rewards, group = case("ties", torch.float32)
    for function in (
        group_ranks,
        lambda r, g: pass_at_k_advantage(r, g, 3),
        lambda r, g: pair_advantage(r[:, None] * r, g),
    ):
        compiled = torch.compile(lambda r, g, f=function: f(r * 2, g), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(rewards, group), function(rewards * 2, group))


def test_bad_input():
    rewards, group = case("ties")
    for message, call in {
        "group_ranks: rewards must be": lambda: group_ranks(rewards.half(), group),
        "group_ranks: group must be": lambda: group_ranks(rewards, group.int()),
        "group_ranks: ties must be": lambda: group_ranks(rewards, group, ties="worst"),
        "pass_at_k_advantage: baseline must be": lambda: pass_at_k_advantage(rewards, group, 2, baseline="best"),
        "pass_at_k_advantage: k must be": lambda: pass_at_k_advantage(rewards, group, 1, baseline="rest"),
        "group_ranks: group must hold ids": lambda: group_ranks(rewards, group + 99),
        "pass_at_k_advantage: group must hold ids": lambda: pass_at_k_advantage(rewards, group - 1, 2),
        "pair_advantage: margins must be": lambda: pair_advantage(torch.ones(2, 3, 4)),
        "pair_advantage: group must be": lambda: pair_advantage(torch.ones(2, 3), group),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
