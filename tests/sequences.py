"""Ragged segments, and what runs along them as the textbooks have it: one token at a time, in NumPy's precision."""

import numpy as np
import pytest
import torch
from backends import INTERPRETING

from fuserl.kernels import scan_tiles, segment_sum

if INTERPRETING:  # which takes its time over each lane
    scan_tiles.LAUNCH.update(BLOCK=32, TILES=4)
    segment_sum.LAUNCH.update(BLOCK=32)
TILE = 32 if INTERPRETING else 4096  # of the C++; a multiple of Triton's
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
# Empty segments at every place, single tokens, whole tiles and a token more or less, several tiles and a part of one.
RAGGED = [0, 1, 5, 0, 0, TILE - 1, 1, TILE, TILE + 1, 17, 5 * TILE + 3, 0]
SHAPES = {"ragged": RAGGED, "one": [1], "empty first": [0, 0, 3], "none": [0, 0], "long": [6 * TILE - 5]}


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def each_segment(offsets):
    return [range(begin, end) for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]


def wide(x, precision, shape=None):
    """As NumPy rows (C, N) of a precision."""
    x = torch.as_tensor(x, dtype=torch.float64) if not isinstance(x, torch.Tensor) else x.detach().cpu()
    x = x if shape is None else x.expand(shape)
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]).numpy().astype(precision)


def rows_of(x):
    return torch.from_numpy(x.astype(np.float64))


def scan_by_hand(b, a, offsets, *, mask=None, forward=False, exclusive=False, precision=np.longdouble):
    """The definition over the tokens that the mask keeps."""
    keep = wide(torch.ones_like(b, dtype=torch.bool) if mask is None else mask, bool, b.shape)
    b, a = wide(b, precision), wide(a, precision, b.shape)
    out = np.zeros_like(b)
    for row in range(len(b)):
        for segment in each_segment(offsets):
            passed = precision(0)
            for t in segment if forward else reversed(segment):
                if keep[row, t]:
                    came = passed if forward else a[row, t] * passed
                    x = b[row, t] + came
                    out[row, t] = came if exclusive else x
                    passed = a[row, t] * x if forward else x
    return rows_of(out)


def gae_by_hand(rewards, values, gamma, lam, offsets, *, mask=None, bootstrap=None, precision=np.longdouble):
    """(advantages, returns) over the tokens that the mask keeps."""
    keep = wide(torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask, bool, rewards.shape)
    gamma, lam, r = (wide(x, precision, rewards.shape) for x in (gamma, lam, rewards))
    v = wide(values, precision)
    beyond = np.zeros((len(r), len(offsets) - 1)) if bootstrap is None else wide(bootstrap, precision)
    out = np.zeros((2, *r.shape), precision)
    for row in range(len(r)):
        for s, segment in enumerate(each_segment(offsets)):
            value, advantage = precision(beyond[row, s]), precision(0)
            for t in reversed(segment):
                if keep[row, t]:
                    delta = r[row, t] + gamma[row, t] * value - v[row, t]
                    advantage = delta + gamma[row, t] * lam[row, t] * advantage
                    value = v[row, t]
                    out[:, row, t] = advantage, advantage + value
    return rows_of(out[0]), rows_of(out[1])
