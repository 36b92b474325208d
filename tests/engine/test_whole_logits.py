"""No step of any recipe holds logits of all its tokens: neither as a tensor, nor inside an operator."""

import json
import re
from pathlib import Path

import pytest
import tiny_models
import tiny_runs
import torch
from ranks import on_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fuserl.engine import catalogue, models

VOCABULARY = 331  # no other size in a run
CHUNK, DRAWN = 16, 64  # rows that a head may hold; places of a pass that draws
PAIRS = ("dpo", "reward_model", "sft", "vpo", "r_to_q")  # what they learn from is short: they get more of it
LARGE, LONG = 16_384, 200  # vocabulary and completions whose logits are 420 MB
SIZES = dict(groups=4, group_size=8, max_new_tokens=24, stop=(), chunk=CHUNK, steps=2, eval_problems=2)


class Widest(TorchDispatchMode):
    """The most rows of the vocabulary's width that any operator gave."""

    rows = 0

    def __torch_dispatch__(self, operator, types, given=(), named=None):
        found = operator(*given, **(named or {}))
        for each in tree_leaves(found):
            if isinstance(each, torch.Tensor) and VOCABULARY in each.shape:
                self.rows = max(self.rows, each.numel() // VOCABULARY)
        return found


@pytest.mark.parametrize("recipe", catalogue.RECIPES)
def test_no_tensor_has_the_logits_of_all_tokens(tmp_path, monkeypatch, recipe):
    tiny_runs.use(monkeypatch, lambda: tiny_models.model(vocab_size=VOCABULARY))
    sizes = SIZES | ({"groups": 96} if recipe in PAIRS else {})
    sizes = {name: value for name, value in sizes.items() if name not in catalogue.fixed(recipe)}
    with Widest() as widest:
        rows = tiny_runs.run(tmp_path, "run", recipe=recipe, reward="tiny_runs:modest", **sizes)
    assert max(row.get("tokens", 0) for row in rows) > 2 * DRAWN >= 2 * widest.rows > 0


def peaks(folder):
    """By how many bytes the peak of a long run in chunks is above that of a short one, and in one chunk above that."""
    models.load = lambda *_: (tiny_models.model(vocab_size=LARGE), tiny_runs.Characters())
    settings = dict(
        SIZES, recipe="mdpo", eval_problems=0, steps=1, epochs=1, micro_tokens=2**15, reward="tiny_runs:modest"
    )
    held = []
    for name, tokens, chunk in (("short", 2, CHUNK), ("long", LONG, CHUNK), ("whole", LONG, 2**15)):
        tiny_runs.run(folder, name, **settings | {"max_new_tokens": tokens, "chunk": chunk})
        held.append(1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]))
    (folder / "peaks.json").write_text(json.dumps([held[1] - held[0], held[2] - held[1]]))


def test_memory_of_a_long_batch_is_far_below_its_logits(tmp_path):
    """Of a divergence over the whole vocabulary; with one chunk for all, the measurement sees the logits."""
    on_ranks(1, peaks, tmp_path)  # a process of its own, whose highest mark is its own
    logits = 4 * SIZES["groups"] * SIZES["group_size"] * LONG * LARGE
    chunked, whole = json.loads((tmp_path / "peaks.json").read_text())
    assert 4 * chunked < logits < whole
