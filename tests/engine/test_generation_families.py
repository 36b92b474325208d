"""Generation of every family against plain forwards, and greedy texts against transformers' own up to a tie."""

import copy

import pytest
import tiny_models
import torch
from test_attention_families import EACH, tiny
from tiny_models import Letters
from tolerance import check, eps

from fuserl.engine import decoding, models
from fuserl.engine.generation import generate
from fuserl.engine.kv_cache import Pages, page_bytes
from fuserl.engine.prompts import Prompt

PROMPTS = [Prompt(text) for text in ("ABC", "Z", "K:Q3TTRLA4BCC<Y", "abcdabcdabcdefabcdbacdacd", "abcdabcdabcdefabcdZ")]


def completion(rollouts, b):
    return rollouts.tokens[rollouts.offsets[b] : rollouts.offsets[b + 1]]


def plain_logits(model, rollouts, b):
    """Logits (n, V) before each token of completion b, from one ordinary forward."""
    prompt, tokens = rollouts.prompt_tokens[rollouts.group[b]], completion(rollouts, b)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1]


def doubled(model):
    """A copy in float64, with experts one by one: grouped products take no float64."""
    exact = copy.deepcopy(model).double()
    if getattr(exact.config, "_experts_implementation", None):
        exact.set_experts_implementation("eager")
    return exact


def parting(model, rollouts, b, theirs):
    """Where a greedy completion leaves transformers' (n,), None if it does not; there it must be at a tie.

    A tie is two largest logits no further apart than float32 forwards err.
    """
    differs = (completion(rollouts, b) != theirs).nonzero()
    if not len(differs):
        return None
    at = int(differs[0])
    plain, exact = (plain_logits(each, rollouts, b)[at].double() for each in (model, doubled(model)))
    best = exact.topk(2).values
    assert best[0] - best[1] <= 2 * (plain - exact).abs().max() + 4 * eps(torch.float32) * best[0].abs(), (b, at)
    return at


def partings(model, tokenizer, prompts, length):
    """How many of the greedy completions leave transformers' at a tie."""
    rollouts = generate(model, tokenizer, prompts, max_new_tokens=length, temperature=0, stop_ids=())
    model.generation_config.eos_token_id = None
    by_length: dict[int, list[int]] = {}
    for b, ids in enumerate(rollouts.prompt_tokens):
        by_length.setdefault(len(ids), []).append(b)
    found = []
    for size, members in by_length.items():
        ids = torch.stack([rollouts.prompt_tokens[b] for b in members])
        model.set_attn_implementation("sdpa")
        theirs = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False, pad_token_id=0
        )
        found += [parting(model, rollouts, b, row[size:]) for b, row in zip(members, theirs, strict=True)]
    return len(found) - found.count(None)


@EACH
def test_logprobs_are_those_of_a_plain_forward(family):
    """Up to what plain float32 forwards err by, in any of several orders of a batch."""
    model = tiny(family)
    rollouts = generate(model, Letters(), PROMPTS, group_size=3, max_new_tokens=20, stop_ids=())
    exact, logprobs = doubled(model), {}
    for name, each in (("plain", model), ("truth", exact)):
        rows = [plain_logits(each, rollouts, b).log_softmax(-1) for b in range(len(rollouts))]
        logprobs[name] = torch.cat(rows).gather(1, rollouts.tokens[:, None])[:, 0]
    check(family, rollouts.rollout_logprobs, logprobs["truth"], logprobs["plain"], torch.float32)


@EACH
def test_the_cache_takes_what_it_is_counted_with(family, monkeypatch):
    made = []

    class Counted(Pages):
        def __init__(self, most):
            super().__init__(most)
            made.append(self)

    monkeypatch.setattr(decoding, "Pages", Counted)
    # These have a key head per query head, whatever their configuration is told.
    model = tiny(family, **(dict(num_key_value_heads=4) if family in ("gpt2", "gpt_neox", "opt") else {}))
    generate(model, Letters(), PROMPTS, max_new_tokens=2)
    stored = sum(x.nbytes for layer in made[0].layers.values() for x in layer)
    assert stored == page_bytes(model) * len(made[0].holders)


def test_greedy_texts_are_those_of_transformers_up_to_a_tie():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (200,), generator=generator).tolist()
    letters = [torch.randint(3, 64, (length,), generator=generator).tolist() for length in lengths]
    prompts = [Prompt("".join(chr(48 + token) for token in each)) for each in letters]
    assert partings(tiny_models.model(), Letters(), prompts, 12) <= 2


@pytest.mark.slow
def test_greedy_texts_of_the_default_model_are_those_of_transformers_up_to_a_tie():
    model, tokenizer = models.load()
    prompts = [Prompt(f"{a} + {b} is {a + b}. {b} times {a % 7} is") for a in range(20) for b in range(3, 43, 4)]
    assert len(prompts) == 200 and partings(model, tokenizer, prompts, 8) <= 4
