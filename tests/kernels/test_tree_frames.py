"""Plans that stay where they are: one pass after another in the same arrays gets the bits of a plan of its own."""

import torch
from backends import cpu_only, each_fast_backend, run_interpreted

from fuserl.kernels import tree_decode
from fuserl.kernels.tree_frames import FixedLines
from fuserl.kernels.tree_lines import PAGE, Lines
from fuserl.kernels.tree_segments import Rule

QUERIES = 16
PROMPTS = 2
WINDOWS = (None, 40)


def pages(tokens):
    return -(-tokens // PAGE)


def some_lines(generator, count, longest):
    """Lines of `count` rollouts of two prompts, in pages out of order, and how many pages there are."""
    lengths = torch.randint(1, longest, (PROMPTS + count,), generator=generator).tolist()
    order = torch.randperm(sum(map(pages, lengths)) + 3, generator=generator).tolist()
    start, page = [], []
    for length in lengths:
        start.append(PAGE * len(page))
        page += order[len(page) : len(page) + pages(length)]
    parent = [-1] * PROMPTS + [at % PROMPTS for at in range(count)]
    leaf = range(PROMPTS, PROMPTS + count)
    last = [lengths[parent[segment]] + lengths[segment] - 1 for segment in leaf]
    return Lines(*map(tuple, (parent, start, lengths, leaf, last, page))), len(order)


@each_fast_backend
def test_one_pass_after_another(device, backend):
    generator = torch.Generator().manual_seed(0)
    fixed = FixedLines(QUERIES, torch.device(device))
    kept = []
    for count, longest in ((6, 540), (1, 3), (3, 530), (11, 70)):
        lines, there = some_lines(generator, count, longest)
        k, v = torch.randn(2, PAGE * there, 2, 16, generator=generator).to(device)
        q = 2 * torch.randn(QUERIES, 4, 16, generator=generator).to(device)
        if not fixed.take(lines, WINDOWS):
            fixed = FixedLines(QUERIES, torch.device(device))
            fixed.take(lines, WINDOWS)
        for window in WINDOWS:
            rule = Rule(0.3, window, None)
            kept.append(fixed.plan(window).arrays[0].data_ptr())
            found = tree_decode.attend(q, k, v, fixed, rule, backend)
            plain = tree_decode.attend(q[:count], k, v, lines, rule, backend)
            for ours, theirs in zip(found, plain, strict=True):
                assert torch.equal(ours[:count], theirs)
            assert (found[0][count:] == 0).all() and (found[1][count:] == -torch.inf).all()
    assert len(set(kept)) < len(kept) - 2


@cpu_only
def test_what_outgrows_its_room_is_refused():
    generator = torch.Generator().manual_seed(0)
    fixed = FixedLines(QUERIES, torch.device("cpu"))
    assert fixed.take(some_lines(generator, 3, 60)[0], [None]) and fixed.plan(None).most == 2
    room = [len(x) for x in fixed.plan(None).arrays]
    assert room == [8, 8, 8, QUERIES + 1, QUERIES, 8]
    assert fixed.take(some_lines(generator, 2, 60)[0], [None])
    assert (fixed.plan(None).arrays[3].diff() >= 0).all()
    assert not fixed.take(some_lines(generator, 6, 60)[0], [None])
    three_of_one = Lines((-1,), (0,), (9,), (0, 0, 0), (8, 8, 8), (0,))
    assert not fixed.take(three_of_one, [None])
    assert all(x.data_ptr() % 16 == 0 for x in fixed.plan(None).arrays)


@cpu_only
def test_in_the_interpreter():
    run_interpreted(__file__)
