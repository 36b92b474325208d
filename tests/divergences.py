"""Divergences by their textbook generators, in extended precision, and how far arithmetic may be from them.

D(p || q) = sum q f(p / q), so that dD/dp = f'(u) and dD/dq = f(u) - u f'(u) at u = p / q.
"""

import numpy as np
import torch

KINDS = ("forward_kl", "reverse_kl", "jensen_shannon", "alpha", "total_variation", "squared_hellinger", "chi_squared")


def generator(kind, u, beta=0.5, alpha=0.5):
    """f(u) and f'(u)."""
    beta, alpha = np.longdouble(beta), np.longdouble(alpha)
    if kind == "forward_kl":
        return -np.log(u), -1 / u
    if kind == "reverse_kl":
        return u * np.log(u), np.log(u) + 1
    if kind == "jensen_shannon":
        m = beta + (1 - beta) * u
        return (1 - beta) * u * np.log(u / m) - beta * np.log(m), (1 - beta) * np.log(u / m)
    if kind == "alpha":
        return (u**alpha - 1) / (alpha * (alpha - 1)), u ** (alpha - 1) / (alpha - 1)
    if kind == "total_variation":
        return np.abs(u - 1) / 2, np.sign(u - 1) / 2
    if kind == "squared_hellinger":
        return (np.sqrt(u) - 1) ** 2 / 2, (1 - 1 / np.sqrt(u)) / 2
    return (u - 1) ** 2, 2 * (u - 1)


def by_hand(p_logits, q_logits, g, kind, temperature=1.0, temperature_q=None, **numbers):
    """(divergence, entropy, dp, dq), g (2, ...) from above, in extended precision."""
    return [value for value, _ in with_roundings(p_logits, q_logits, g, kind, temperature, temperature_q, **numbers)]


def with_roundings(p_logits, q_logits, g, kind, temperature=1.0, temperature_q=None, rough=False, **numbers):
    """As `by_hand`, each beside what it may err by, in units of the machine epsilon of the sums.

    A rounding of log p is |log p| epsilons of p, and so of every product with it; eight more for the operations on it.
    Only where `rough` may log p - log q err as each of its parts does: for those who take it as their difference, and
    where two temperatures are rounded.
    """
    (log_p, t_p), (log_q, t_q) = _logs(p_logits, q_logits, temperature, temperature_q)
    p, q, g = np.exp(log_p), np.exp(log_q), np.asarray(g.cpu().numpy(), np.longdouble)[..., None]
    u, (f0, slope0) = np.exp(log_p - log_q), generator(kind, np.longdouble(1), **numbers)
    f, slope = generator(kind, u, **numbers)
    f, slope = f - f0 - slope0 * (u - 1), slope - slope0  # the generator that is flat at 1, of the same divergence
    to_q = f - u * slope
    entropy = -(p * log_p).sum(-1, keepdims=True)
    d_p = g[0] * p * (slope - (p * slope).sum(-1, keepdims=True)) - g[1] * p * (log_p + entropy)
    d_q = g[0] * q * (to_q - (q * to_q).sum(-1, keepdims=True))

    count = 8 + 2 * np.maximum(np.abs(log_p), np.abs(log_q))
    digits = count * (p + q + np.abs(p * slope) + np.abs(q * to_q)) if rough else 0 * p
    size_p, size_q = (np.abs(w * s) + w * np.abs(w * s).sum(-1, keepdims=True) for w, s in ((p, slope), (q, to_q)))
    in_value = (count * (np.abs(p * slope) + np.abs(q * to_q)) + digits).sum(-1)
    in_entropy = (count * p * (1 + np.abs(log_p))).sum(-1)
    spread = digits + p * digits.sum(-1, keepdims=True)
    in_p = count * (np.abs(g[0]) * size_p + np.abs(g[1]) * p * (np.abs(log_p) + entropy)) + np.abs(g[0]) * spread
    in_q = count * np.abs(g[0]) * size_q + np.abs(g[0]) * (digits + q * digits.sum(-1, keepdims=True))
    values = (q * f).sum(-1), entropy[..., 0], d_p / t_p, d_q / t_q
    allowed = in_value, in_entropy, in_p / t_p, in_q / t_q
    return [
        tuple(torch.from_numpy(np.asarray(x, np.float64)) for x in each) for each in zip(values, allowed, strict=True)
    ]


def _logs(p_logits, q_logits, temperature, temperature_q):
    """(log softmax, temperature) of both."""
    temperatures = [temperature, temperature if temperature_q is None else temperature_q]
    for logits, t in zip((p_logits, q_logits), temperatures, strict=True):
        t = np.asarray(t.cpu().numpy() if isinstance(t, torch.Tensor) else t, np.longdouble)[..., None]
        z = logits.detach().cpu().double().numpy().astype(np.longdouble) / t
        z = z - z.max(-1, keepdims=True)
        yield z - np.log(np.exp(z).sum(-1, keepdims=True)), t
