"""No step of any recipe holds logits of all its tokens: neither as a tensor, nor inside an operator."""

import multiprocessing
import resource

import pytest
import tiny_models
import tiny_runs
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fuserl.engine import catalogue, models

VOCABULARY = 331  # no other size in a run
CHUNK, DRAWN = 16, 64  # rows that a head may hold; places of a pass that draws
PAIRS = ("dpo", "reward_model", "sft", "vpo", "r_to_q")  # what they learn from is short: they get more of it
LARGE, LONG = 16_384, 120  # vocabulary and completions whose logits are 250 MB
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


def _peaks(folder, reports):
    """Bytes that runs in chunks and in one add to the most that the process has held before each."""
    torch.set_num_threads(1)
    models.load = lambda *_: (tiny_models.model(vocab_size=LARGE), tiny_runs.Characters())
    settings = dict(SIZES, recipe="mdpo", eval_problems=0, steps=1, epochs=1, reward="tiny_runs:modest")
    peaks = []
    for name, tokens, chunk in (("short", 2, CHUNK), ("long", LONG, CHUNK), ("whole", LONG, 2**15)):
        tiny_runs.run(folder, name, **settings | {"max_new_tokens": tokens, "chunk": chunk})
        peaks.append(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    reports.put([peaks[1] - peaks[0], peaks[2] - peaks[1]])


def test_memory_of_a_long_batch_is_far_below_its_logits(tmp_path):
    """Of a divergence over the whole vocabulary; with one chunk for all, the measurement sees the logits."""
    context = multiprocessing.get_context("spawn")
    reports = context.SimpleQueue()
    process = context.Process(target=_peaks, args=(tmp_path, reports))
    process.start()
    process.join()
    assert process.exitcode == 0
    logits = 4 * SIZES["groups"] * SIZES["group_size"] * LONG * LARGE
    chunked, whole = reports.get()
    assert 4 * chunked < logits < whole
