"""tree_attention, forward and with backward: a prompt and its rollouts against torch's, repeated and masked."""

import math

import pytest
import torch
from measure import Provider, compare, seconds
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fuserl.kernels.tree_attention import tree_attention

# prompt, rollouts, tokens of each, query heads, key heads, head dimension
SIZES = {
    "cpu": (512, 16, 64, 8, 8, 64),
    "cuda": (16384, 16, 1024, 32, 8, 128),
    "long": (16384, 16, 16384, 32, 8, 128),
    "smoke": (40, 3, 20, 2, 1, 16),
}
LONG_NEEDS = 96e9  # bytes: tensors of all providers stand at once
CAUSAL = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


def operations(pairs: int, heads: int, dim: int, gradients: bool) -> int:
    """Multiplications and additions of useful products: two a pair forward, five backward with the scores made anew."""
    return 2 * pairs * heads * dim * (7 if gradients else 2)


class Group:
    """A prompt and its rollouts: tokens, and the same with the prompt before each rollout.

    Args:
        device: of the tensors.
        size: one of SIZES.
        gradients: whether what it measures goes backward too.
    """

    def __init__(self, device: str, size: str, gradients: bool = True):
        prompt, rollouts, length, heads, kv_heads, dim = SIZES[size]
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.segments, self.gradients = ([-1, *[0] * rollouts], [prompt, *[length] * rollouts]), gradients
        tokens, self.prompt = prompt + rollouts * length, prompt
        self.pairs = prompt * (prompt + 1) // 2 + rollouts * (prompt * length + length * (length + 1) // 2)
        self.operations = operations(self.pairs, heads, dim, gradients)
        q, g = (torch.randn(tokens, heads, dim, device=device, dtype=dtype) for _ in range(2))
        k, v = (torch.randn(tokens, kv_heads, dim, device=device, dtype=dtype) for _ in range(2))
        self.packed, self.g = (q, k, v), g
        own = torch.arange(prompt, tokens, device=device).view(rollouts, length)
        self.rows = torch.cat([torch.arange(prompt, device=device).expand(rollouts, -1), own], dim=1)

    def results(self, out, leaves, g):
        """out, and the gradients of q, k and v where they are measured."""
        return out.detach(), *(torch.autograd.grad(out, leaves, g) if self.gradients else ())

    def leaves(self, rows=None, dtype=None):
        """q, k, v that require gradients: (L, H, D), or (B, H, T, D) of the tokens in `rows`."""
        found = self.packed if rows is None else [x[rows].transpose(1, 2).contiguous() for x in self.packed]
        return [x.to(dtype or x.dtype).clone().requires_grad_(self.gradients) for x in found]

    def fuserl(self, backend):
        """The op in one of its backends."""
        leaves = self.leaves()

        def run():
            out, _ = tree_attention(*leaves, self.segments, backend=backend)
            return self.results(out, leaves, self.g)

        return run

    def repeated(self):
        """Causal attention of every rollout behind its own copy of the prompt."""
        leaves, g = self.leaves(self.rows), self.g[self.rows].transpose(1, 2).contiguous()
        g[1:, :, : self.prompt] = 0  # of a prompt's outputs the first copy's count

        def run():
            out = scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
            return self.results(out, leaves, g)

        return run

    def masked(self):
        """One attention over all tokens under a boolean mask."""
        leaves, g = self.leaves(torch.arange(len(self.g))[None]), self.g.transpose(0, 1)[None].contiguous()
        mask = self.mask()

        def run():
            out = scaled_dot_product_attention(*leaves, attn_mask=mask, enable_gqa=True)
            return self.results(out, leaves, g)

        return run

    def mask(self):
        """(L, L), True where a token sees another."""
        length = torch.tensor(self.segments[1], device=self.g.device)
        owner = torch.repeat_interleave(torch.arange(len(length), device=self.g.device), length)
        related = (owner[:, None] == owner) | (owner == 0)
        return related & torch.ones_like(related).tril()

    def causal_tokens(self) -> int:
        """Tokens of a causal text in which as many pairs attend."""
        return round((math.sqrt(8 * self.pairs + 1) - 1) / 2)

    def causal(self):
        """(name, run): torch's attention on that text, by whichever of its backends is the fastest here."""
        (heads, dim), kv_heads = self.g.shape[1:], self.packed[1].shape[1]
        shapes = [(1, n, self.causal_tokens(), dim) for n in (heads, kv_heads, kv_heads, heads)]
        *leaves, g = (torch.randn(shape, device=self.g.device, dtype=self.g.dtype) for shape in shapes)
        leaves = [x.requires_grad_(self.gradients) for x in leaves]

        def by(backend):
            def run():
                with sdpa_kernel(backend):
                    out = scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=heads != kv_heads)
                return self.results(out, leaves, g)

            return run

        found = []
        for backend in CAUSAL:
            try:
                by(backend)()
                found.append((seconds(by(backend)), backend.name.split("_")[0].lower(), by(backend)))
            except RuntimeError:  # not for this device, dtype or number of heads
                continue
        return min(found)[1:]

    def products(self):
        """The products alone, as many multiplications as the visible pairs need."""
        tokens = len(self.g)
        rows = self.g.transpose(0, 1).contiguous()
        columns = rows[:, : self.pairs // tokens].contiguous()
        scores = torch.bmm(rows, columns.mT)

        def run():
            for _ in range(3 if self.gradients else 1):
                torch.bmm(rows, columns.mT)
            for _ in range(4 if self.gradients else 1):
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

    def torch_truth(self):
        """out, dq, dk and dv by torch's attention with prompts repeated, where a mask of all pairs has no room."""
        return self.once(self.repeated()()), self.g.shape[1]

    def once(self, results):
        """Of results with repeated prompts those by token: out, and the gradients added up."""
        out = torch.empty_like(self.g)
        out[self.rows] = results[0].transpose(1, 2)
        return out, *(self.summed(x, self.rows) for x in results[1:])

    def gate(self, truth, repeated=False):
        """Compares outputs and gradients with `truth`, those of repeated tokens added up."""
        expected, queries = truth
        keys = queries * self.packed[1].shape[1] // self.g.shape[1]
        limit = 2e-2 if self.g.dtype == torch.bfloat16 else 1e-5

        def right(results):
            results = self.once(results) if repeated else results
            for got, exact, heads in zip(results, expected, (queries, queries, keys, keys), strict=False):
                wrong = (got[:, :heads].double() - exact).norm()
                assert wrong <= limit * exact.double().norm(), f"errs by {wrong / exact.double().norm():.1e} in norm"

        return right

    def summed(self, x, rows):
        """Gradients of repeated tokens, (B, H, T, D), added up per token."""
        total = torch.zeros(len(self.g), x.shape[1], x.shape[3], device=x.device)
        for row, of_row in zip(rows, x, strict=True):
            total.index_add_(0, row, of_row.transpose(0, 1).float())
        return total.to(x.dtype)


def measured(benchmark, device, smoke, gradients):
    """The group of rollouts that fits everything, beside everything."""
    group = Group(device, "smoke" if smoke else device, gradients)
    truth = group.truth()
    gate, products = group.gate(truth), Provider("the products alone", group.products())
    floors = [products]
    if device == "cuda":
        name, run = group.causal()
        floors.insert(0, Provider(f"torch SDPA ({name}), a causal text of as many pairs", run))
    compare(
        benchmark,
        floors[0],
        Provider("fuserl", group.fuserl(None), gate),
        *floors[1:],
        Provider("torch SDPA, prompts repeated", group.repeated(), group.gate(truth, repeated=True)),
        Provider("torch SDPA, dense mask", group.masked(), gate_of_one(group, truth)),
        Provider("flash-attn per part", group.fuserl("flash"), gate),
        operations=group.operations,
        smoke=smoke,
    )


def gate_of_one(group, truth):
    """As `Group.gate`, of results (1, H, L, D)."""
    gate = group.gate(truth)
    return lambda results: gate([x[0].transpose(0, 1) for x in results])


def test_tree_attention_forward(benchmark, device, smoke):
    measured(benchmark, device, smoke, gradients=False)


def test_tree_attention_forward_backward(benchmark, device, smoke):
    measured(benchmark, device, smoke, gradients=True)


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "forward_backward"])
def test_tree_attention_of_long_rollouts(benchmark, device, smoke, gradients):
    """Rollouts as long as their prompt, of which no mask of all pairs has room."""
    if device == "cuda":
        torch.cuda.empty_cache()
    room = torch.cuda.mem_get_info()[0] if device == "cuda" else 0
    if room < LONG_NEEDS and not smoke:
        pytest.skip(f"needs {LONG_NEEDS / 1e9:.0f} GB of device memory; {room / 1e9:.0f} are free")
    group = Group(device, "smoke" if smoke else "long", gradients)
    truth = group.torch_truth()
    floor = Provider("the products alone", group.products())
    if device == "cuda":
        name, run = group.causal()
        floor = Provider(f"torch SDPA ({name}), a causal text of as many pairs", run)
    compare(
        benchmark,
        floor,
        Provider("fuserl", group.fuserl(None), group.gate(truth)),
        Provider("torch SDPA, prompts repeated", group.repeated(), group.gate(truth, repeated=True)),
        Provider("flash-attn per part", group.fuserl("flash"), group.gate(truth)),
        rounds=3,
        operations=group.operations,
        smoke=smoke,
    )
