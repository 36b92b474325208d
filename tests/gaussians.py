"""Normal distributions of independent dimensions in extended precision, and how far arithmetic may be from them."""

import math

import numpy as np
import torch

TENSORS = ("actions", "mean", "scale", "ref_mean", "ref_scale")
VIEWS = ("each", "row", "dimension", "one")  # what a scale tells apart: (N, D), (N, 1), (D,), ()


def view_of(name, *shape):
    """The shape of a scale."""
    return {"each": shape, "row": (*shape[:-1], 1), "dimension": shape[-1:], "one": ()}[name]


def drawn(*shape, view="each", ref_view="each", logs=True, dtype=torch.float32, device="cpu", apart=0.3):
    """Tensors of a call by name: a policy, a reference not far from it, and actions of either."""
    mean, noise, shift = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    scale = 0.7 * torch.randn(view_of(view, *shape), dtype=torch.float64)
    near = scale if view == ref_view else torch.zeros(view_of(ref_view, *shape), dtype=torch.float64)
    ref_scale = near + apart * torch.randn(near.shape, dtype=torch.float64)
    tensors = mean + noise * scale.exp(), mean, scale, mean + apart * shift, ref_scale
    tensors = dict(zip(TENSORS, tensors, strict=True))
    if not logs:
        tensors |= {name: tensors[name].exp() for name in ("scale", "ref_scale")}
    return {name: x.to(dtype).to(device) for name, x in tensors.items()}


def by_hand(tensors, g, logs=True, mask=None, average=False, rough=False):
    """(value, what it may err by in machine epsilons) of logprob, entropy, kl and the gradients to TENSORS.

    `g` (3, ...) comes from above. Each element is some products of a few roundings, and a rounding of an argument of
    exp is that argument in epsilons. Where `rough`, log std - log ref_std may err as each of the two does.
    """
    shape = tensors["actions"].shape
    a, m, s, m_ref, s_ref = (_long(tensors[name]) for name in TENSORS)
    keep = np.ones(shape, bool) if mask is None else np.broadcast_to(mask.cpu().numpy(), shape)
    a, m, m_ref = (np.where(keep, x, 0) for x in (a, m, m_ref))
    s, s_ref = (np.where(keep, x, 0 if logs else 1) for x in (s, s_ref))
    std, ref_std = (np.exp(s), np.exp(s_ref)) if logs else (s, s_ref)
    log, log_ref = (s, s_ref) if logs else (np.log(s), np.log(s_ref))
    t = s - s_ref if logs else np.log1p((s - s_ref) / s_ref)
    z, w, less_one, rest = (a - m) / std, (m - m_ref) / ref_std, np.expm1(2 * t), _rest(2 * t)
    half = np.longdouble("0.918938533204672741780329736405617640")  # log(2 pi) / 2
    count = 8 + 2 * np.abs(log) + 2 * np.abs(log_ref)
    lost = count * (np.abs(less_one) + np.abs(2 * t)) if rough else 0
    lost_slope = count * (1 + np.abs(less_one)) if rough else 0

    weight = np.maximum(keep.sum(-1, keepdims=True), 1) if average else 1
    g_l, g_e, g_k = (_long(x)[..., None] / weight for x in g)
    size = np.abs(g_k) * (np.abs(less_one) + w**2)
    terms = {
        "logprob": (-(z**2) / 2 - log - half, z**2 + np.abs(log) + half),
        "entropy": (log + half + 0.5, np.abs(log) + half + 0.5),
        "kl": ((rest + w**2) / 2, np.abs(rest) + w**2 + lost / count),
    }
    to_log = g_l * (z**2 - 1) + g_e + g_k * less_one
    size_log = np.abs(g_l) * (z**2 + 1) + np.abs(g_e) + np.abs(g_k) * (np.abs(less_one) + lost_slope / count)
    per, per_ref = (1, 1) if logs else (1 / std, 1 / ref_std)
    gradients = {
        "actions": (-g_l * z / std, np.abs(g_l * z / std)),
        "mean": (g_l * z / std + g_k * w / ref_std, np.abs(g_l * z / std) + np.abs(g_k * w / ref_std)),
        "scale": (to_log * per, size_log * per),
        "ref_mean": (-g_k * w / ref_std, np.abs(g_k * w / ref_std)),
        "ref_scale": (
            -g_k * (less_one + w**2) * per_ref, (size + np.abs(g_k) * lost_slope / count) * per_ref,
        ),
    }  # fmt: skip
    for name, pair in terms.items():
        yield name, *(_tensor((np.where(keep, x, 0) / weight).sum(-1)) for x in (pair[0], pair[1] * count))
    for name, pair in gradients.items():
        summed = (_summed(np.where(keep, x, 0), tensors[name].shape) for x in (pair[0], pair[1] * count))
        yield name, *map(_tensor, summed)


def _long(x):
    return x.detach().cpu().double().numpy().astype(np.longdouble)


def _tensor(x):
    return torch.from_numpy(np.asarray(x, np.float64))


def _rest(x):
    """e^x - 1 - x, by its series where even long doubles cancel."""
    series = sum(x**k / math.factorial(k) for k in range(2, 12))
    return np.where(np.abs(x) < 0.05, series, np.expm1(x) - x)


def _summed(x, shape):
    """The gradient to what was broadcast from `shape`."""
    shape = (1,) * (x.ndim - len(shape)) + tuple(shape), tuple(shape)
    axes = tuple(i for i, size in enumerate(shape[0]) if size == 1)
    return x.sum(axes, keepdims=True).reshape(shape[1])
