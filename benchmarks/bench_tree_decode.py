"""tree_decode: a token for every rollout of a prompt whose keys stand once, against a cache per rollout."""

import torch
from measure import Provider, compare
from torch.nn.functional import scaled_dot_product_attention

from fuserl.kernels.tree_decode import tree_decode

SIZES = {"cpu": (4096, 16, 256, 12, 4, 64), "cuda": (16384, 16, 1024, 32, 8, 128), "smoke": (40, 3, 20, 2, 1, 16)}


def test_tree_decode(benchmark, device, smoke):
    prompt, rollouts, length, heads, kv_heads, dim = SIZES["smoke" if smoke else device]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows = prompt + rollouts * length
    q = torch.randn(rollouts, heads, dim, device=device).to(dtype)
    k, v = torch.randn(2, rows, kv_heads, dim, device=device).to(dtype)
    segments = [-1, *[0] * rollouts], [0, *range(prompt, rows, length)], [prompt, *[length] * rollouts]
    own = torch.arange(prompt, rows, device=device).view(rollouts, length)
    lines = torch.cat([torch.arange(prompt, device=device).expand(rollouts, -1), own], dim=1)
    apart = [x[lines].transpose(1, 2).contiguous() for x in (k, v)]
    truth = scaled_dot_product_attention(q.double()[:, :, None], *(x.double() for x in apart), enable_gqa=True)

    def ours():
        return tree_decode(q, k, v, segments, range(1, rollouts + 1))[0]

    def repeated():
        return scaled_dot_product_attention(q[:, :, None], *apart, enable_gqa=True)

    def bytes_once():
        return k.sum() + v.sum()

    def right(out):
        wrong = (out.double().view_as(truth) - truth).norm()
        assert wrong <= (2e-2 if dtype == torch.bfloat16 else 1e-5) * truth.norm(), f"errs by {wrong:.1e} in norm"

    compare(
        benchmark,
        Provider("reading keys and values once", bytes_once),
        Provider("fuserl", ours, right),
        Provider("torch SDPA, a cache per rollout", repeated, right),
        smoke=smoke,
    )
