"""gaussian_logprob against extended precision: results and every gradient, every backend, edges and identities."""

import itertools
import math

import pytest
import torch
from backends import FAST, INTERPRETING, cpu_only, each_backend, each_fast_backend, run_interpreted, threads
from gaussians import TENSORS, VIEWS, by_hand, drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import eps

import fuserl
from fuserl.kernels.gaussian_logprob import GaussianLogprob, gaussian_logprob

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
both_forms = pytest.mark.parametrize("logs", [True, False], ids=["log_std", "std"])

# Fewer dimensions than a vector has, a tile of many rows and one more, rows of a piece of a tile and of several.
SHAPES = [(1,), (1, 1), (5, 1), (1100, 1), (170, 3), (33, 17), (3, 5, 64), (2, 512), (3, 513), (2, 1500), (40, 1030)]
if INTERPRETING:
    SHAPES = [(1,), (5, 1), (70, 3), (3, 513), (2, 1500)]


def call(tensors, backend, logs=True, entropy=True, **options):
    """The op, by TENSORS."""
    names = ("log_std", "ref_log_std") if logs else ("std", "ref_std")
    scales = {name: tensors[each] for name, each in zip(names, ("scale", "ref_scale"), strict=True) if each in tensors}
    given = {name: tensors[name] for name in ("actions", "mean", "ref_mean") if name in tensors}
    return gaussian_logprob(**given, **scales, entropy=entropy, backend=backend, **options)


def run(tensors, g, backend, **options):
    """(logprob, entropy, kl, gradients in the order of the tensors), with g (3, ...) from above."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    out = [x for x in call(leaves, backend, **options) if x is not None]
    return *(x.detach() for x in out), *torch.autograd.grad(out, list(leaves.values()), list(g[: len(out)]))


def equal(some, others):
    assert all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def above(tensors):
    shape = tensors["actions"].shape[:-1]
    return torch.randn(3, *shape, dtype=torch.float64).to(tensors["mean"])


def compare(tensors, backend, **options):
    g, dtype = above(tensors), tensors["mean"].dtype
    truth = by_hand(tensors, g, rough=backend == "reference", **options)
    for got, (name, expected, roundings) in zip(run(tensors, g, backend, **options), truth, strict=True):
        assert got.dtype == dtype and got.shape == expected.shape, name
        allowed = eps(dtype) * roundings + torch.finfo(dtype).smallest_normal
        error = (got.cpu().double() - expected).abs()
        assert (error <= allowed).all(), f"{name}: {(error / allowed).max():.3f} of what is allowed"


def some_mask(tensors):
    shape = tensors["actions"].shape
    mask = torch.rand(shape) < 0.7
    mask.view(-1, shape[-1])[::3] = False
    return mask.to(tensors["actions"].device)


@each_backend
@both_dtypes
@both_forms
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(shape, logs, dtype, device, backend):
    for view in VIEWS:
        tensors = drawn(*shape, view=view, ref_view=view, logs=logs, dtype=dtype, device=device)
        compare(tensors, backend, logs=logs)


@each_backend
@both_forms
def test_every_pair_of_views(logs, device, backend):
    for view, ref_view in itertools.product(VIEWS, repeat=2):
        for shape in ((37, 7), (3, 600)):
            tensors = drawn(*shape, view=view, ref_view=ref_view, logs=logs, device=device)
            compare(tensors, backend, logs=logs)
            compare(tensors, backend, logs=logs, mask=some_mask(tensors), average=True)
            compare(tensors, backend, logs=logs, mask=some_mask(tensors)[1])
