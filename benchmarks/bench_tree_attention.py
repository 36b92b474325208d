"""tree_attention forward and backward: a prompt and its rollouts against torch's attention, repeated and masked."""

import torch
from measure import Provider, compare
from torch.nn.functional import scaled_dot_product_attention

from fuserl.kernels.tree_attention import tree_attention

SIZES = {"cpu": (512, 16, 64, 8, 8, 64), "cuda": (16384, 16, 1024, 32, 8, 128), "smoke": (40, 3, 20, 2, 1, 16)}


class Group:
    """A prompt and its rollouts: tokens, and the same with the prompt before each rollout.

    Args:
        device: of the tensors.
        smoke: tiny sizes.
    """

    def __init__(self, device: str, smoke: bool):
        prompt, rollouts, length, heads, kv_heads, dim = SIZES["smoke" if smoke else device]
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.segments = [-1, *[0] * rollouts], [prompt, *[length] * rollouts]
        tokens, self.prompt = prompt + rollouts * length, prompt
        self.pairs = prompt * (prompt + 1) // 2 + rollouts * (prompt * length + length * (length + 1) // 2)
        q, g = torch.randn(2, tokens, heads, dim, device=device).to(dtype)
        k, v = torch.randn(2, tokens, kv_heads, dim, device=device).to(dtype)
        self.packed, self.g = (q, k, v), g
        own = torch.arange(prompt, tokens, device=device).view(rollouts, length)
        self.rows = torch.cat([torch.arange(prompt, device=device).expand(rollouts, -1), own], dim=1)

    def leaves(self, rows=None, dtype=None):
        """q, k, v that require gradients: (L, H, D), or (B, H, T, D) of the tokens in `rows`."""
        found = self.packed if rows is None else [x[rows].transpose(1, 2).contiguous() for x in self.packed]
        return [x.to(dtype or x.dtype).clone().requires_grad_() for x in found]

    def fuserl(self, backend):
        """The op in one of its backends."""
        leaves = self.leaves()

        def run():
            out, _ = tree_attention(*leaves, self.segments, backend=backend)
            return out.detach(), *torch.autograd.grad(out, leaves, self.g)

        return run

    def repeated(self):
        """Causal attention of every rollout behind its own copy of the prompt."""
        leaves, g = self.leaves(self.rows), self.g[self.rows].transpose(1, 2).contiguous()
        g[1:, :, : self.prompt] = 0

        def run():
            out = scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
            return out.detach(), *torch.autograd.grad(out, leaves, g)

        return run

    def masked(self):
        """One attention over all tokens under a boolean mask."""
        leaves, g = self.leaves(torch.arange(len(self.g))[None]), self.g.transpose(0, 1)[None].contiguous()
        mask = self.mask()

        def run():
            out = scaled_dot_product_attention(*leaves, attn_mask=mask, enable_gqa=True)
            return out.detach(), *torch.autograd.grad(out, leaves, g)

        return run

    def mask(self):
        """(L, L), True where a token sees another."""
        length = torch.tensor(self.segments[1], device=self.g.device)
        owner = torch.repeat_interleave(torch.arange(len(length), device=self.g.device), length)
        related = (owner[:, None] == owner) | (owner == 0)
        return related & torch.ones_like(related).tril()

    def products(self):
        """The seven products alone, as many multiplications as the visible pairs need."""
        tokens = len(self.g)
        rows = self.g.transpose(0, 1).contiguous()
        columns = rows[:, : self.pairs // tokens].contiguous()
        scores = torch.bmm(rows, columns.mT)

        def run():
            for _ in range(3):
                torch.bmm(rows, columns.mT)
            for _ in range(4):
                torch.bmm(scores, columns)

        return run

    def truth(self):
        """out, dq, dk and dv in float64 by the equations, of the first key head, some rows at a time."""
        kv_heads, heads = self.packed[1].shape[1], self.g.shape[1]
        q, k, v, g = (x[:, : x.shape[1] // kv_heads].double().transpose(0, 1) for x in (*self.packed, self.g))
        out, dq, dk, dv = (torch.zeros_like(x) for x in (q, q, k, v))
        mask, scale = self.mask(), self.g.shape[2] ** -0.5
        for begin in range(0, len(self.g), 1024):
            rows = slice(begin, begin + 1024)
            p = (scale * q[:, rows] @ k.mT).masked_fill(~mask[rows], -torch.inf).softmax(-1)
            out[:, rows] = p @ v
            ds = p * (g[:, rows] @ v.mT - (g[:, rows] * out[:, rows]).sum(-1, keepdim=True)) * scale
            dq[:, rows] = ds @ k
            dk += (ds.mT @ q[:, rows]).sum(0, keepdim=True)
            dv += (p.mT @ g[:, rows]).sum(0, keepdim=True)
        return [x.transpose(0, 1) for x in (out, dq, dk, dv)], heads // kv_heads

    def gate(self, truth, rows=None):
        """Compares outputs and gradients with `truth`, those of repeated tokens added up."""
        expected, queries = truth
        limit = 2e-2 if self.g.dtype == torch.bfloat16 else 1e-5

        def right(results):
            if rows is not None:
                out = torch.empty_like(self.g)
                out[rows] = results[0].transpose(1, 2)
                results = out, *(self.summed(x, rows) for x in results[1:])
            for got, exact, heads in zip(results, expected, (queries, queries, 1, 1), strict=True):
                wrong = (got[:, :heads].double() - exact).norm()
                assert wrong <= limit * exact.norm(), f"errs by {wrong / exact.norm():.1e} in norm"

        return right

    def summed(self, x, rows):
        """Gradients of repeated tokens, (B, H, T, D), added up per token."""
        total = torch.zeros(len(self.g), x.shape[1], x.shape[3], device=x.device)
        return total.index_put_((rows,), x.transpose(1, 2).float(), accumulate=True).to(x.dtype)


def test_tree_attention_forward_backward(benchmark, device, smoke):
    group = Group(device, smoke)
    truth, whole = group.truth(), torch.arange(len(group.g), device=device)[None]
    gate = group.gate(truth)
    compare(
        benchmark,
        Provider("the seven products alone", group.products()),
        Provider("fuserl", group.fuserl(None), gate),
        Provider("torch SDPA, prompts repeated", group.repeated(), group.gate(truth, group.rows)),
        Provider("torch SDPA, dense mask", group.masked(), group.gate(truth, whole)),
        Provider("flash-attn per part", group.fuserl("flash"), gate),
        smoke=smoke,
    )
