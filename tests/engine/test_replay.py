"""Recorded decode passes, replayed operation by operation on a CPU, get the bits of passes that run one by one."""

from types import SimpleNamespace

import pytest
import tape
import tiny_models
import torch
from test_attention_families import EACH, tiny
from test_turns import answered
from tiny_models import Letters

from fuserl import attention, layers
from fuserl.engine import decoding, replay
from fuserl.engine.generation import generate
from fuserl.engine.kv_cache import Pages, Pass, page_bytes
from fuserl.engine.prompts import Prompt
from fuserl.engine.scheduling import Scheduler
from fuserl.kernels import matmul, tree_decode
from fuserl.kernels.tree_lines import PAGE, Lines

RAGGED = [Prompt(text) for text in ("ABC", "Z", "K:Q3TTRLA4BCC<Y", "abcdabcdabcdefabcdbacdacd", "9876543210")]
ALIKE = [Prompt("1234567890ABCDEFGHIJ:" + own) for own in ("a", "bcdefgh", "bcd", "aa", "QRS", "ik")]


def same(one, other):
    """Whether two calls of generate gave the same bits."""
    logprobs = [each.rollout_logprobs.nan_to_num(1) for each in (one, other)]
    return torch.equal(one.tokens, other.tokens) and torch.equal(*logprobs) and one.finish == other.finish


@EACH
def test_every_family_gets_the_same_bits(family, monkeypatch):
    """Ragged prompts, rows that end, rows that take their places."""
    model, settings = tiny(family), dict(group_size=3, max_new_tokens=20, rows=8, stop=("9", "A", "k"))
    plain = generate(model, Letters(), RAGGED, **settings)
    used = tape.attach(monkeypatch)
    assert same(generate(model, Letters(), RAGGED, **settings), plain)
    assert used.replayed > 9 * used.warmed


def test_a_model_that_asks_for_numbers_runs_pass_by_pass(monkeypatch):
    """Experts one by one, each for the tokens that the host has found for it."""
    model = tiny("mixtral")
    model.set_experts_implementation("eager")
    plain = generate(model, Letters(), RAGGED, max_new_tokens=9)
    used = tape.attach(monkeypatch)
    replay._warned.cache_clear()
    with pytest.warns(UserWarning, match="decode passes run without CUDA graphs: .* waits for the GPU"):
        assert same(generate(model, Letters(), RAGGED, max_new_tokens=9), plain)
    assert (used.warmed, used.recorded) == (1, 0)


@pytest.mark.parametrize("prompts", [RAGGED, ALIKE], ids=["ragged", "alike"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_where_rollouts_give_way_and_the_cache_moves(family, prompts, monkeypatch):
    model, settings = tiny_models.model(family), dict(group_size=3, max_new_tokens=140, stop_ids=(), rows=16)
    plain = generate(model, Letters(), prompts, **settings)
    used, step = tape.attach(monkeypatch), replay.Steps._step

    def still(self, shape):
        before = self.pages.moved
        found = step(self, shape)
        assert self.pages.moved == before  # nothing recorded makes room
        return found

    monkeypatch.setattr(replay.Steps, "_step", still)
    roomy = generate(model, Letters(), prompts, **settings)
    assert same(roomy, plain) and 1 < used.recorded < 9 and used.replayed > 100
    tight = generate(model, Letters(), prompts, kv_gb=10 * page_bytes(model) / 1e9, **settings)
    assert same(tight, plain)
    with pytest.raises(RuntimeError, match="kv_gb must have room for a rollout"):
        generate(model, Letters(), prompts, kv_gb=4 * page_bytes(model) / 1e9, **settings)


def test_replies_and_chunks(monkeypatch):
    model = tiny_models.model()
    some = ({}, {"chunk": (9, 4)}, {"rows": 3})  # with three rows a pass may read one token of a reply of three
    plain = [answered(model, **settings)[0] for settings in some]
    used = tape.attach(monkeypatch)
    recorded = [answered(model, **settings)[0] for settings in some]
    assert all(map(same, plain, recorded)) and used.replayed > 50


def narrow(monkeypatch):
    """A model of which a pass on a CPU may have any number of rows."""
    monkeypatch.setattr(matmul, "_preferred", lambda: True)
    return layers.attach(tiny_models.model(hidden_size=128, intermediate_size=128, head_dim=64))


def test_shapes_follow_the_rows_that_are_left(monkeypatch):
    model, settings = narrow(monkeypatch), dict(group_size=7, max_new_tokens=70, rows=24, stop_ids=(2, 7))
    assert decoding.row_by_row(model)
    plans, plan = [], Scheduler.plan
    monkeypatch.setattr(Scheduler, "plan", lambda self: plans.append(self) or plan(self))
    plain = generate(model, Letters(), RAGGED, **settings)
    used, rows = tape.attach(monkeypatch), []
    step = replay.Steps._step

    def noted(self, shape):
        rows.append(shape.numbers.shape[1])
        return step(self, shape)

    monkeypatch.setattr(replay.Steps, "_step", noted)
    assert same(generate(model, Letters(), RAGGED, **settings), plain)
    assert plans.count(plans[0]) == plans.count(plans[-1]) == len(plans) / 2  # nobody waits longer for a place
    assert len(set(rows)) > 3 and set(rows) <= {24, 16, 8, 4, 2, 1} and used.replayed > used.recorded


def test_padding_writes_to_its_own_page_which_nobody_reads(monkeypatch):
    model, settings = tiny_models.model("gemma3"), dict(group_size=3, max_new_tokens=70, rows=32)
    plain = generate(model, Letters(), RAGGED, **settings)
    tape.attach(monkeypatch)
    run, wrote = replay.Steps.run, []

    def watched(self, numbers, *lines):
        self.pages.fit()
        own = slice(self.spare, self.spare + PAGE)
        for kept in self.pages.layers.values():
            for x in kept:
                x[own] = torch.nan
        before = {index: [x.clone() for x in kept] for index, kept in self.pages.layers.items()}
        found = run(self, numbers, *lines)
        for index, kept in self.pages.layers.items():
            for old, new in zip(before[index], kept, strict=True):
                changed = (old.view(torch.int32) != new.view(torch.int32)).flatten(1).any(1)
                changed[own] = False
                assert set(changed.nonzero()[:, 0].tolist()) <= set(numbers[2])
                assert not new[numbers[2]].isnan().any()
        wrote.append(len(numbers[0]))
        return found

    monkeypatch.setattr(replay.Steps, "run", watched)
    assert same(generate(model, Letters(), RAGGED, **settings), plain)
    assert max(wrote) == 15 and min(wrote) < 15


def steps(monkeypatch, draw, **shapes):
    made, cpu = replay.Steps, torch.device("cpu")
    return made(draw, Pages(9), cpu, recorder=tape.Tape(monkeypatch), **{"most": 24, "padded": False, **shapes})


def test_which_shape(monkeypatch):
    some, one = steps(monkeypatch, None), steps(monkeypatch, None, padded=True)
    assert [some.rows(n) for n in (1, 2, 3, 4, 5, 9, 16, 17, 24)] == [1, 2, 4, 4, 8, 16, 16, 24, 24]
    assert {one.rows(n) for n in range(1, 25)} == {24}


def test_a_replay_reads_its_buffers_and_the_weights_as_they_are(monkeypatch):
    weight = torch.ones(5, dtype=torch.int64)
    made = steps(monkeypatch, lambda numbers, layout: ((numbers * weight[:, None]).sum(0), numbers[4] + 0))
    nothing = Lines((), (), (), (), (), ())
    for scale in (1, 1, 1, 10, 100):
        weight.fill_(scale)
        numbers = torch.randint(1, 99, (5, 5 + scale % 2)).tolist()
        total, counts = made.run(numbers, nothing, [])
        assert total.tolist() == [scale * sum(row) for row in zip(*numbers, strict=True)]
        assert counts.tolist() == numbers[4]
    assert (made.recorder.warmed, made.recorder.recorded, made.recorder.replayed) == (1, 1, 4)
    made.pages.moved += 1
    made.run(numbers, nothing, [])
    assert (made.recorder.warmed, made.recorder.recorded, made.recorder.replayed) == (1, 2, 5)


@pytest.mark.parametrize(
    ("step", "name"),
    [
        (lambda x: x[x > 0], "index"), (lambda x: x.nonzero(), "nonzero"), (lambda x: x * x.sum().item(), "scalar"),
        (lambda x: x.masked_select(x > 0), "masked_select"), (lambda x: x.repeat_interleave(x.abs()), "interleave"),
        (lambda x: x.to("meta"), "_to_copy"), (lambda x: x.unique(), "unique"), (lambda x: x if x.any() else -x, "sc"),
        (lambda x: x[x.abs()], None), (lambda x: x.repeat_interleave(2), None), (lambda x: x.to(torch.int8), None),
    ],
)  # fmt: skip
def test_what_no_recording_can_repeat_is_noticed(step, name):
    with replay._Noticing() as noticing:
        step(torch.tensor([0, 1, -2]))
    assert noticing.found is None if name is None else name in noticing.found


@EACH
def test_no_family_asks_for_a_number_nor_copies_between_devices(family, monkeypatch):
    """On a device of torch's that has no memory, so that what came from the host, or went there, would be seen."""
    monkeypatch.setattr(tree_decode, "attend", lambda q, *_: (torch.empty_like(q), None))
    model = tiny(family).to("meta", torch.bfloat16)
    attention.attach(model)
    numbers, marker = torch.zeros(5, 8, dtype=torch.int64), torch.ones(1, 1, 1, 1, dtype=torch.bool)
    made = SimpleNamespace(model=model, marker=marker.to("meta"), layers=model.config.num_hidden_layers)
    pages, numbers = Pages(9), numbers.to("meta")
    pages.take(1)
    for _ in range(2):  # the first makes the storage
        with torch.no_grad(), replay._Noticing() as noticing:
            layout = Pass(pages, numbers[2], None)
            logits = decoding.Decoder._logits(made, numbers[0:1], numbers[1:2], layout, 0)
        assert noticing.found is None and logits.shape == (8, tiny_models.VOCABULARY)


def test_passes_run_one_by_one_where_recording_fails(monkeypatch):
    model, settings = tiny_models.model(), dict(group_size=2, max_new_tokens=12)
    plain = generate(model, Letters(), RAGGED, **settings)
    used = tape.attach(monkeypatch)

    def fails(step):
        raise RuntimeError("operation not permitted when stream is capturing")

    used.record = fails
    replay._warned.cache_clear()
    with pytest.warns(UserWarning, match="without CUDA graphs: RuntimeError: operation not permitted"):
        assert same(generate(model, Letters(), RAGGED, **settings), plain)
    assert (used.warmed, used.replayed) == (2, 0)


def test_where_passes_are_recorded():
    assert replay.recorder(tiny_models.model()) is None


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "error", "settings"),
    [
        (torch.float32, 1e-3, dict(group_size=3)),
        # All passes of the power of two of rows that they are padded to: no product may have other bits.
        (torch.bfloat16, 1e-2, dict(group_size=4, stop_ids=())),
    ],
    ids=["fp32", "bf16"],
)
def test_on_a_gpu(dtype, error, settings, monkeypatch):
    model, settings = tiny_models.model(dtype=dtype).cuda(), dict(max_new_tokens=70, rows=16, **settings)
    plain = generate(model, Letters(), ALIKE[:4], temperature=0, graphs=False, **settings)
    replayed, record = [], replay.Recorder.record

    def counted(self, step):
        again, found = record(self, step)
        return lambda: (replayed.append(1), again()), found

    monkeypatch.setattr(replay.Recorder, "record", counted)
    recorded = generate(model, Letters(), ALIKE[:4], temperature=0, **settings)
    assert len(replayed) > 50
    assert torch.equal(plain.tokens, recorded.tokens)
    assert torch.allclose(plain.rollout_logprobs, recorded.rollout_logprobs, atol=error)
    drawn = [generate(model, Letters(), ALIKE, seed=4, **settings) for _ in range(2)]
    assert same(*drawn)
