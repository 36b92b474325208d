"""Keys and values of texts that are being read, in pages of 64 tokens, and the layout that writes and reads them.

A page belongs to every text that holds it: what several texts begin with stands once. Where a page lies, and which
other texts are read in the same pass, changes no bit of what a token gets on a CPU: see `tree_decode`.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fuserl.kernels import tree_decode
from fuserl.kernels.tree_layout import Scores
from fuserl.kernels.tree_lines import PAGE, Lines
from fuserl.kernels.tree_segments import Rule


class Pages:
    """Pages by number, how many texts hold each, and their storage, which grows as they are taken.

    Args:
        most: pages there may ever be.
    """

    growth = 0.25  # where there are too few, by what part of them there are to be more, at least

    def __init__(self, most: int):
        self.most = most
        self.holders: list[int] = []  # of every page that there is
        self.free: list[int] = []
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.moved = 0  # how often some storage has come to lie elsewhere

    @property
    def left(self) -> int:
        """How many more can be taken."""
        return self.most - len(self.holders) + len(self.free)

    def take(self, count: int) -> list[int]:
        """Pages that nobody holds; at most `left`."""
        if count > len(self.free):
            # Not one page more than is wanted, or a cache that grows page by page would be copied each time.
            there = len(self.holders)
            grown = min(self.most, max(there + count - len(self.free), there + int(there * self.growth)))
            self.free += range(there, grown)
            self.holders += [0] * (grown - there)
        taken = [self.free.pop() for _ in range(count)]
        self.share(taken)
        return taken

    def share(self, pages: list[int]) -> None:
        """One more text holds these."""
        for page in pages:
            self.holders[page] += 1

    def drop(self, pages: list[int]) -> None:
        """One text fewer holds these."""
        for page in pages:
            self.holders[page] -= 1
            if self.holders[page] == 0:
                self.free.append(page)

    def copy(self, page: int, to: int) -> None:
        """Copies all that a page holds."""
        self.fit()
        for x in itertools.chain.from_iterable(self.layers.values()):
            x[PAGE * to : PAGE * (to + 1)] = x[PAGE * page : PAGE * (page + 1)]

    def fit(self) -> None:
        """Lets all layers that have storage have it for every page."""
        for index, (keys, _) in list(self.layers.items()):
            self.layer(index, keys.transpose(0, 1)[None])

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (rows, Hkv, D) of one layer, in the dtype and on the device of `like` (1, Hkv, L, D)."""
        before = self.layers.get(index)
        if before is None or len(before[0]) < PAGE * len(self.holders):
            grown = tuple(like.new_empty(PAGE * len(self.holders), like.shape[1], like.shape[3]) for _ in range(2))
            for new, old in zip(grown, before or (), strict=False):
                new[: len(old)] = old
            self.layers[index] = grown
            self.moved += 1
        return self.layers[index]


def page_bytes(model) -> int:
    """Bytes of one page in all layers of a transformers model."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    device = next(model.parameters()).device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    return 2 * PAGE * config.num_hidden_layers * heads * dim * dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """What a cache may take where nobody said: nine tenths of a GPU's free memory, half of a host's."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + kept) * 9 // 10
    try:
        with open("/proc/meminfo") as lines:
            found = dict(line.split(":") for line in lines)
        return int(found["MemAvailable"].split()[0]) * 1024 // 2
    except (OSError, KeyError):  # not Linux: such a machine pages
        return 2**62


class Pass:
    """One pass of the model over token rows; rows beyond these are padding.

    Args:
        pages: where keys and values are kept.
        stored: (n,) int64 on the device of the model, the row of the storage of each token.
        lines: what each of the n tokens sees.
    """

    def __init__(self, pages: Pages, stored: Tensor, lines: Lines):
        self.pages, self.stored, self.lines = pages, stored, lines
        self.served: set[int] = set()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """Stores the rows' keys and values, then lets each row see its line up to itself."""
        if query.shape[0] != 1:
            raise ValueError(f"attend: query must have batch 1; got {tuple(query.shape)}. Give input_ids (1, rows)")
        self.served.add(layer)
        n = len(self.stored)
        asked, *given = (x[0, :, :n].transpose(0, 1) for x in (query, key, value))
        kept = self.pages.layer(layer, key)
        for to, x in zip(kept, given, strict=True):
            to[self.stored] = x
        rule = Rule(scores.scaling, scores.window, scores.softcap)
        found, _ = tree_decode.attend(asked, *kept, self.lines, rule)
        out = query.new_zeros(query.shape[2], *found.shape[1:])
        out[:n] = found
        return out.transpose(0, 1)[None]
