"""Packed rollouts: a forest of token segments laid end to end, and attention within it in plain torch.

    p0 p1 p2 | a0 a1 | b0 b1 b2 ||| q0 q1 | c0 c1        a1 sees p0 p1 p2 a0 a1;  c1 sees q0 q1 c0 c1

What all prompts begin with (few-shot examples, a system message) stands once, in front of them all. `Segments` attends
by `tree_attention` where it can, and else block by block, so that no score between two trees is ever computed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fuserl.kernels.tree_attention import tree_attention

_WORTH_SHARING = 16  # tokens


@dataclass(frozen=True)
class Scores:
    """How one layer turns queries and keys into scores: `softcap * tanh(scaling * q.k / softcap)` within a window."""

    scaling: float
    window: int | None = None  # a query at position p sees keys at positions > p - window
    softcap: float | None = None
    dropout: float = 0.0


@dataclass(frozen=True)
class Segments:
    """A forest of token segments laid end to end: a root (prompt) and, right after it, its descendants (rollouts).

    Args:
        parent: (S,) int64 on the host, the segment each one continues, -1 for a root.
        length: (S,) int64 on the host, tokens of each.
        position: (L,) int64, the position of each token in its own text.
    """

    parent: Tensor
    length: Tensor
    position: Tensor
    _blocks: dict = field(default_factory=dict, repr=False, compare=False)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """Exact attention, in one kernel or block by block: no score between two trees is ever computed."""
        if query.shape[0] != 1 or query.shape[2] != len(self.position) or key.shape[2] != len(self.position):
            raise ValueError(
                f"attention: segments must describe the whole input; got {len(self.position)} positions for query "
                f"{tuple(query.shape)} and key {tuple(key.shape)}. Pass **packed.inputs() and no cache"
            )
        if query.device.type in ("cpu", "cuda") and query.dtype != torch.float64 and scores.dropout == 0:
            given = (x[0].transpose(0, 1) for x in (query, key, value))
            numbers = {"scale": scores.scaling, "window": scores.window, "softcap": scores.softcap}
            return tree_attention(*given, self, **numbers)[0].transpose(0, 1)[None]
        pieces = [
            dense(query[:, :, asking], _columns(key, seen), _columns(value, seen), mask, scores)
            for asking, seen, mask in self.blocks(scores.window, query.device)
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)

    def blocks(self, window: int | None, device: torch.device) -> list[tuple[slice, tuple[slice, ...], Tensor]]:
        """(queries, keys, mask) of every block, the queries of all blocks together being the whole input in order.

        A tree is one block; where the root's children have children of their own (a prefix that all prompts share),
        each child is a block with its descendants, which sees the root besides. mask: True where a query sees a key.
        """
        found = self._blocks.get((window, device))
        if found is None:
            made = (self._block(first, last, root, window) for first, last, root in self._cuts())
            found = [(asking, seen, mask.to(device)) for asking, seen, mask in made]
            self._blocks[window, device] = found
        return found

    def _cuts(self) -> list[tuple[int, int, int | None]]:
        """Segments first..last of every block, and the root apart that it sees besides."""
        parent = self.parent.tolist()
        roots = [s for s, up in enumerate(parent) if up < 0]
        cuts: list[tuple[int, int, int | None]] = []
        for root, end in zip(roots, [*roots[1:], len(parent)], strict=True):
            children = [s for s in range(root + 1, end) if parent[s] == root]
            if len(children) == end - root - 1:
                cuts.append((root, end, None))
            else:
                cuts.append((root, root + 1, None))
                cuts += [(a, b, root) for a, b in zip(children, [*children[1:], end], strict=True)]
        return cuts

    def _block(self, first: int, last: int, root: int | None, window: int | None):
        parent = self.parent.tolist()
        ends = [0, *self.length.cumsum(0).tolist()]
        apart = [] if root is None else [root]
        members = torch.tensor([*apart, *range(first, last)])
        # line[i, j]: the j-th member is the i-th itself or one of its ancestors.
        line = torch.eye(len(members), dtype=torch.bool)
        place = {segment: i for i, segment in enumerate(members.tolist())}
        for segment, i in place.items():
            if parent[segment] in place:
                line[i] |= line[place[parent[segment]]]
        owner = torch.repeat_interleave(torch.arange(len(members)), self.length[members])
        asking = slice(ends[first], ends[last])
        seen = (*(slice(ends[r], ends[r + 1]) for r in apart), asking)
        host = self.position.cpu()
        position = torch.cat([host[span] for span in seen])
        asked = slice(len(position) - (asking.stop - asking.start), None)
        behind = position[asked, None] - position[None, :]
        mask = line[owner[asked]][:, owner] & (behind >= 0)
        if window is not None:
            mask &= behind < window
        return asking, seen, mask


@dataclass(frozen=True)
class Packed:
    """What one forward pass of a model needs to score every trained token of B rollouts.

    Args:
        input_ids: (1, L) int64: the prompts' common beginning, then per group the rest of its prompt and its rollouts,
            each without its last token unless they are laid out whole.
        position_ids: (1, L) int64.
        segments: which tokens see which.
        predictor: (N,) int64, where in L the hidden state stands that predicts trained token n.
        reader: (N,) int64, where the one stands that has read token n, for rollouts laid out whole.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Segments
    predictor: Tensor
    reader: Tensor | None = None

    def inputs(self) -> dict:
        """Keyword arguments for the model's forward."""
        # A 4-D mask is passed through by transformers as it is: no (L, L) one is built that nobody would read.
        marker = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.input_ids.device)
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "attention_mask": marker,
            "segments": self.segments,
            "use_cache": False,
        }

    def to(self, device) -> Packed:
        """The same on `device` (the segments' sizes stay on the host)."""
        segments = Segments(self.segments.parent, self.segments.length, self.segments.position.to(device))
        reader = None if self.reader is None else self.reader.to(device)
        ids, places = self.input_ids.to(device), self.position_ids.to(device)
        return Packed(ids, places, segments, self.predictor.to(device), reader)


def pack(prompt_tokens: list[Tensor], group: Tensor, tokens: Tensor, offsets: Tensor, *, whole: bool = False) -> Packed:
    """Lays out each group's prompt once, followed by its rollouts without their last tokens, which predict nothing.

    What all prompts begin with stands once in front of them all. Groups without a rollout take no space; rollouts may
    come in any order.

    Args:
        prompt_tokens: G tensors (T_g,) int64.
        group: (B,) int64, the prompt of each rollout.
        tokens: (N,) int64, the rollouts end to end.
        offsets: (B + 1,) int64, where each begins and ends.
        whole: lay out the last tokens too, for what is read off the states at the tokens themselves.

    Returns:
        `Packed` on the device of `tokens`.

    Raises:
        ValueError: an empty prompt with a rollout, ids out of range, or offsets that do not span `tokens`.
    """
    host = offsets.tolist()
    owner = group.tolist()
    if len(host) != len(owner) + 1 or host[0] != 0 or host[-1] != len(tokens) or host != sorted(host):
        raise ValueError(
            f"pack: offsets must rise from 0 to {len(tokens)} in {len(owner)} steps; got {host[:3]}..{host[-1:]}. Give "
            "the start of every rollout and the end of the last"
        )
    device = tokens.device
    members: dict[int, list[int]] = {}
    for rollout, prompt in enumerate(owner):
        if not 0 <= prompt < len(prompt_tokens) or len(prompt_tokens[prompt]) == 0:
            raise ValueError(
                f"pack: group must name one of {len(prompt_tokens)} prompts that are not empty; got {prompt}. Check "
                "ids and prompts"
            )
        members.setdefault(prompt, []).append(rollout)
    forest = _Forest(device)
    shared = common_prefix([prompt_tokens[prompt] for prompt in members])
    trunk = forest.add(prompt_tokens[owner[0]][:shared], -1) if shared else -1
    predictor, reader = (torch.empty(len(tokens), dtype=torch.int64) for _ in range(2))
    for prompt in sorted(members):
        branch = forest.add(prompt_tokens[prompt][shared:], trunk)
        last = forest.size - 1
        for rollout in members[prompt]:
            begin, end = host[rollout], host[rollout + 1]
            reader[begin:end] = torch.arange(forest.size, forest.size + end - begin)
            predictor[begin:end] = reader[begin:end] - 1
            predictor[begin : min(begin + 1, end)] = last
            forest.add(tokens[begin : end if whole else max(end - 1, begin)], branch)
    return forest.packed(predictor.to(device), reader.to(device) if whole else None)


def common_prefix(texts: list[Tensor]) -> int:
    """How many tokens all texts begin with (few-shot examples, a system message), fewer than the shortest has.

    0 for a single text, and where it would be too few to be worth treating apart.
    """
    if len(texts) < 2:
        return 0
    size = min(map(len, texts)) - 1
    equal = torch.stack([ids[:size] for ids in texts]).eq(texts[0][:size]).all(0)
    shared = int(equal.long().cumprod(0).sum())
    return shared if shared >= _WORTH_SHARING else 0


class _Forest:
    """Segments laid end to end, each continuing an earlier one."""

    def __init__(self, device: torch.device):
        self.device, self.size = device, 0
        self.ids: list[Tensor] = [torch.empty(0, dtype=torch.int64, device=device)]
        self.parent: list[int] = []
        self.length: list[int] = []
        self.depth: list[int] = []  # position after each segment

    def add(self, ids: Tensor, parent: int) -> int:
        """Appends a segment; its number."""
        self.ids.append(ids.to(self.device))
        self.parent.append(parent)
        self.length.append(len(ids))
        self.depth.append(len(ids) + (self.depth[parent] if parent >= 0 else 0))
        self.size += len(ids)
        return len(self.parent) - 1

    def packed(self, predictor: Tensor, reader: Tensor | None) -> Packed:
        """The model's input."""
        places = [torch.arange(end - length, end) for end, length in zip(self.depth, self.length, strict=True)]
        position = torch.cat([torch.empty(0, dtype=torch.int64), *places]).to(self.device)
        parent, length = (torch.tensor(x, dtype=torch.int64) for x in (self.parent, self.length))
        return Packed(torch.cat(self.ids)[None], position[None], Segments(parent, length, position), predictor, reader)


def _columns(x: Tensor, spans: tuple[slice, ...]) -> Tensor:
    return x[:, :, spans[0]] if len(spans) == 1 else torch.cat([x[:, :, span] for span in spans], dim=2)


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
    """Attention under a boolean mask (True: may see) that broadcasts to (B, H, Lq, Lk); None: causal.

    Args:
        query: (B, H, Lq, D); key and value (B, Hkv, Lk, D), H a multiple of Hkv.
    """
    if scores.softcap is not None:
        return explicit(query, key, value, mask, scores)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=scores.dropout, scale=scores.scaling,
        is_causal=mask is None, enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


def explicit(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
    """`dense` step by step, with the scores in memory: `softmax(softcap * tanh(scaling q.k / softcap)) v`."""
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    repeat = query.shape[1] // key.shape[1]
    if repeat > 1:
        key, value = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
    raw = (query @ key.mT) * scores.scaling
    if scores.softcap is not None:
        raw = torch.tanh(raw / scores.softcap) * scores.softcap
    raw = raw if raw.dtype == torch.float64 else raw.float()
    # Not -inf: a padding row that may see nothing is to give something finite that nobody reads, not NaN.
    weights = raw.masked_fill(~mask, torch.finfo(raw.dtype).min).softmax(-1).to(value.dtype)
    return F.dropout(weights, scores.dropout) @ value
