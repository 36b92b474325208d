"""The scheduler: nothing lost, doubled or overwritten, over any lengths, ends, refills and shortages of pages."""

import random
from concurrent import futures

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuserl.engine.kv_cache import Pages, free_bytes
from fuserl.engine.scheduling import Rollout, Scheduler, Source
from fuserl.kernels.tree_lines import PAGE


class Cache(Pages):
    """Pages that hold (token, position) in place of keys and values."""

    def __init__(self, most):
        super().__init__(most)
        self.held = {}

    def copy(self, page, to):
        for row in range(PAGE):
            self.held[to * PAGE + row] = self.held.get(page * PAGE + row)


def row(text, at):
    return text.pages[at // PAGE] * PAGE + at % PAGE


def drawn(source, stream, position):
    """The token that a rollout draws, out of what it is and where."""
    return hash((tuple(source.tokens), stream, position)) % 1000


def simulated(scheduler, ends, replies, pages):
    """Runs a schedule as the decoder does; how often each token was read and each rollout finished."""
    finished, fed, preempted, late, passes = [], 0, 0, [], 0
    while scheduler.live or scheduler.waiting:
        passes += 1
        for due, reply in late:
            if due == passes:
                reply.set_result(None)
        for rollout in scheduler.replied():
            rollout.reply = None
            rollout.insert([7, 8, 9])
        before = set(scheduler.live)
        spans = scheduler.plan()
        preempted += len(before - set(scheduler.live))
        assert sum(stop - start for _, start, stop in spans) <= scheduler.rows
        assert len(scheduler.live) <= scheduler.slots
        assert len({id(span.text) for span in spans}) == len(spans)
        for text, start, stop in spans:
            assert text.read == start < stop <= len(text.tokens)
            if isinstance(text, Rollout):
                assert text.source.complete
            for at in range(start, stop):
                pages.held[row(text, at)] = (text.tokens[at], at)
            text.read = stop
            fed += stop - start
        # Whoever may draw finds what it wrote, on pages that nobody else writes on.
        ready = scheduler.ready()
        waited = [rollout for rollout in scheduler.live if rollout.reply is not None]
        assert spans or ready or waited, "nothing to do with work left"
        assert not {span.text for span in spans} & set(waited) and not set(ready) & set(waited)
        for rollout in ready:
            for text in (rollout.source, rollout):
                assert [pages.held[row(text, at)] for at in range(text.read)] == [
                    (text.tokens[at], at) for at in range(text.read)
                ]
        for rollout in ready:
            rollout.draw(drawn(rollout.source, rollout.stream, len(rollout.tokens)), 0.0)
            if len(rollout.tokens) in replies and len(rollout.tokens) + 3 < ends[rollout.stream]:
                rollout.reply = futures.Future()
                late.append((passes + 1 + 5 * (rollout.stream % 3), rollout.reply))
            elif len(rollout.tokens) >= ends[rollout.stream]:
                rollout.finish = "stop"
                finished.append(rollout.stream)
                scheduler.done(rollout)
        assert len(pages.holders) <= pages.most
        assert sum(each > 0 for each in pages.holders) == pages.most - pages.left
    return finished, fed, preempted


def schedule(seed):
    """A random run: (rollouts, pages, scheduler, ends, tokens at which there is a reply)."""
    chance = random.Random(seed)
    shared = [chance.randrange(1000) for _ in range(chance.choice([0, 0, 20, 64, 100, 200]))]
    prompts = [
        shared + [chance.randrange(1000) for _ in range(chance.choice([1, 5, 70, 130]))]
        for _ in range(chance.randint(1, 6))
    ]
    group, longest = chance.randint(1, 6), chance.choice([1, 10, 150])
    ends, rollouts = {}, []
    for number, tokens in enumerate(prompts):
        source = Source(tokens)
        for _ in range(group):
            stream = len(rollouts)
            ends[stream] = chance.randint(1, longest)
            rollouts.append(Rollout([], source=source, number=number, stream=stream))
            rollouts[-1].insert([5] * chance.choice([0, 0, min(3, ends[stream] - 1)]))
    least = -(-max(map(len, prompts)) // PAGE) - (-longest // PAGE)
    pages = Cache(least + chance.choice([0, 1, 3, 100]))
    slots = chance.randint(1, 8)
    common = len(shared) if len(prompts) > 1 else 0
    scheduler = Scheduler(rollouts, pages, slots, slots + chance.choice([0, 30]), common)
    return rollouts, pages, scheduler, ends, {4, 40}


@settings(max_examples=500, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_no_schedule_loses_or_doubles_a_rollout(seed):
    rollouts, pages, scheduler, ends, replies = schedule(seed)
    finished, _, _ = simulated(scheduler, ends, replies, pages)
    assert sorted(finished) == [*range(len(rollouts))]
    assert all(source.unfinished == source.live == 0 for source in scheduler.resident)
    for rollout in rollouts:
        assert len(rollout.tokens) >= ends[rollout.stream] and not rollout.pages
        for at, (token, own) in enumerate(zip(rollout.tokens, rollout.trained, strict=True)):
            assert token == drawn(rollout.source, rollout.stream, at) if own else token in (5, 7, 8, 9)
    kept = [page for source in scheduler.resident for page in source.pages]
    pages.drop(kept)
    assert not any(pages.holders) and sorted(pages.free) == [*range(len(pages.holders))]


def test_the_seeds_meet_every_case():
    """Preemptions, refills, shared beginnings and replies are all among the first schedules."""
    found = []
    for seed in range(60):
        rollouts, pages, scheduler, ends, replies = schedule(seed)
        _, fed, preempted = simulated(scheduler, ends, replies, pages)
        tokens = sum(len(r.tokens) for r in rollouts) + sum(len(s.tokens) for s in {r.source for r in rollouts})
        found.append((preempted > 0, fed < tokens - len(rollouts), len(rollouts) > scheduler.slots))
    assert all(sum(case) > 5 for case in zip(*found, strict=True)), [sum(case) for case in zip(*found, strict=True)]


def test_the_oldest_rollout_is_never_sent_back_and_the_youngest_first():
    source = Source([1] * PAGE)
    rollouts = [Rollout([], source=source, number=0, stream=stream) for stream in range(3)]
    pages = Cache(5)
    scheduler, sent = Scheduler(rollouts, pages, 3, 200), []
    for _ in range(3 * PAGE):
        live = list(scheduler.live)
        for text, _, stop in scheduler.plan():
            text.read = stop
        sent += [each.stream for each in live if each not in scheduler.live]
        for rollout in scheduler.ready():
            rollout.draw(1, 0.0)
            if len(rollout.tokens) == 2 * PAGE:
                rollout.finish = "length"
                scheduler.done(rollout)
    assert sent == [2] and not scheduler.live and not scheduler.waiting


@pytest.mark.parametrize("slots", [1, 4])
def test_prompts_are_read_before_what_is_already_being_drawn(slots):
    sources = [Source([1] * 10) for _ in range(3)]
    rollouts = [Rollout([], source=source, number=n, stream=n) for n, source in enumerate(sources)]
    scheduler = Scheduler(rollouts, Cache(50), slots, 12)
    first = scheduler.plan()
    assert [(span.text, span.start, span.stop) for span in first] == [(sources[0], 0, 10), (sources[1], 0, 2)][:slots]


def test_what_fits_is_half_of_the_free_memory_or_all_there_may_be(monkeypatch):
    assert 2**27 < free_bytes(torch.device("cpu")) < 2**45
    monkeypatch.setattr("builtins.open", lambda *_: (_ for _ in ()).throw(FileNotFoundError()))
    assert free_bytes(torch.device("cpu")) == 2**62
