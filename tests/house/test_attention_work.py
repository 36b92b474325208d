"""What the benchmark of tree_attention counts: the pairs that attend, and the operations of their products."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils import flop_counter

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import bench_tree_attention as bench


def test_the_pairs_of_a_group():
    group = bench.Group("cpu", "smoke")
    assert group.pairs == group.mask().sum()
    tokens = group.causal_tokens()
    assert abs(tokens * (tokens + 1) // 2 - group.pairs) <= tokens


@pytest.mark.parametrize("tokens,heads,dim", [(24, 2, 16), (40, 3, 8)])
def test_operations_are_those_that_torch_counts(tokens, heads, dim):
    q = torch.randn(heads, tokens, dim)
    with flop_counter.FlopCounterMode(display=False) as counted:
        (q @ q.mT).softmax(-1) @ q
    pairs, shape = tokens**2, (1, heads, tokens, dim)
    assert bench.operations(pairs, heads, dim, gradients=False) == counted.get_total_flops()
    backward = flop_counter.sdpa_backward_flop_count(shape, shape, shape, shape)
    assert bench.operations(pairs, heads, dim, gradients=True) == counted.get_total_flops() + backward


@pytest.mark.parametrize("gradients", [False, True])
def test_both_truths_and_the_gates_agree(gradients):
    group = bench.Group("cpu", "smoke", gradients)
    of_torch, of_equations = group.torch_truth(), group.truth()
    group.gate(of_torch)(group.fuserl("reference")())
    group.gate(of_equations)(group.fuserl("reference")())
    group.gate(of_equations, repeated=True)(group.repeated()())
    bench.gate_of_one(group, of_equations)(group.masked()())
    wrong = [x + 1 for x in group.fuserl("reference")()]
    with pytest.raises(AssertionError, match="errs by"):
        group.gate(of_torch)(wrong)


def test_the_causal_text_runs():
    group = bench.Group("cpu", "smoke")
    name, run = group.causal()
    out, *gradients = run()
    assert name in ("flash", "efficient", "cudnn") and out.shape[2] == group.causal_tokens() and len(gradients) == 3
