"""Completions that are not all the policy's own: begun by others, or answered where they end, and trained in part."""

import asyncio
import dataclasses
import itertools
import random
from concurrent import futures

import pytest
import tiny_models
import torch
from tiny_models import Letters

from fuserl.engine import decoding, generation
from fuserl.engine.batch import Rollouts, batch_of
from fuserl.engine.generation import generate
from fuserl.engine.losses import Loss
from fuserl.engine.policy import Policy, Sampling, Updating
from fuserl.engine.prompts import Prompt
from fuserl.engine.rollouts import joined, selected
from fuserl.engine.scheduling import Scheduler

PROMPTS = [Prompt(text) for text in ("ABC", "K:Q3TTRLA4BCC<Y", "9876543210")]


class Talker(Letters):
    """Letters that also encode a reply."""

    def __call__(self, text, add_special_tokens=True):
        return super().__call__(text)


def spans(rollouts):
    return [slice(*pair) for pair in zip(rollouts.offsets.tolist(), rollouts.offsets.tolist()[1:], strict=False)]


def plain(model, rollouts, b):
    """Log-probs (n,) of every token of a completion, from one ordinary forward of each of its chunks."""
    prompt, found = rollouts.prompt_tokens[rollouts.group[b]], []
    model.set_attn_implementation("eager")
    for tokens in rollouts.tokens[spans(rollouts)[b]].split(rollouts.chunks[b]):
        logits = model(torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1]
        found.append(logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])
    return torch.cat(found)


def check(model, rollouts):
    """Drawn tokens have the log-probs of an ordinary forward over all that stands before them; the others have none."""
    assert rollouts.rollout_logprobs.isnan().tolist() == (~rollouts.trained).tolist()
    for b, span in enumerate(spans(rollouts)):
        own = rollouts.trained[span]
        with torch.no_grad():
            expected = plain(model, rollouts, b)[own]
        assert torch.allclose(rollouts.rollout_logprobs[span][own], expected, atol=2e-5)


def test_completions_begin_as_they_are_told_to():
    model = tiny_models.model()
    forced = [[], [5, 6, 7], [9] * 70, [1], [], [8, 8]]
    rollouts = generate(model, Talker(), PROMPTS, group_size=2, max_new_tokens=75, stop_ids=(), forced=forced)
    check(model, rollouts)
    for ids, span, text in zip(forced, spans(rollouts), rollouts.texts, strict=True):
        assert rollouts.tokens[span].tolist()[: len(ids)] == ids and text.startswith(Talker().decode(ids, False, False))
        assert rollouts.trained[span].tolist() == [at >= len(ids) for at in range(75)]


def test_what_a_policy_drew_itself_may_be_put_before_it_again():
    """A forced beginning continues as the completion that it was taken from."""
    model, settings = tiny_models.model("gemma3"), dict(group_size=2, max_new_tokens=70, stop_ids=(), rows=16)
    whole = generate(model, Talker(), PROMPTS, **settings)
    forced = [whole.tokens[span][:at].tolist() for at, span in zip((0, 1, 5, 40, 64, 69), spans(whole), strict=True)]
    again = generate(model, Talker(), PROMPTS, forced=forced, **settings)
    assert torch.equal(whole.tokens, again.tokens)
    assert torch.equal(whole.rollout_logprobs[again.trained], again.rollout_logprobs[again.trained])


def answered(model, **settings):
    """Three replies to each completion, each when the policy has written a '9' or ended its text."""
    calls = []

    def reply(prompt, text):
        calls.append((prompt.text, text))
        said = sum(each == prompt.text for each, _ in calls)
        return None if said > 3 else "9AB" if said == 2 else "QRS"

    chosen = dict(max_new_tokens=90, stop=("9", "A"), reply=reply, rows=16)
    return generate(model, Talker(), PROMPTS, **{**chosen, **settings}), calls


def test_replies_are_read_and_not_drawn():
    model = tiny_models.model()
    rollouts, calls = answered(model)
    check(model, rollouts)
    for b, span in enumerate(spans(rollouts)):
        mine = [text for prompt, text in calls if prompt == PROMPTS[b].text]
        whole = Talker().decode(rollouts.tokens[span].tolist(), True, False)
        assert all(whole.startswith(text) for text in mine) and len(mine) <= 4
        given = rollouts.trained[span].logical_not().sum()
        left_out = given == 3 * (len(mine) - 1) and rollouts.finish[b] == "length"
        assert given == 3 * min(3, len(mine)) or left_out
        if rollouts.finish[b] == "stop":
            assert len(mine) == 4 and mine[-1] == whole
            ended = whole[-1] in "9A" and rollouts.tokens[span][-1] != 2
            assert rollouts.texts[b] == (whole[:-1] if ended else whole)
    assert "stop" in rollouts.finish
    # The reply's own '9' and 'A' end nothing, and what comes before them is shown.
    assert any("9AB" in text for text in rollouts.texts)


def test_a_continued_rollout_reads_nothing_twice(monkeypatch):
    read, forward = [], decoding.Decoder._forward

    def counting(self, spans):
        read.extend(stop - start for _, start, stop in spans)
        return forward(self, spans)

    monkeypatch.setattr(decoding.Decoder, "_forward", counting)
    rollouts, _ = answered(tiny_models.model())
    # All but each completion's last token.
    assert sum(read) == sum(map(len, rollouts.prompt_tokens)) + len(rollouts.tokens) - len(rollouts)


def test_replies_change_no_bit_whatever_is_beside_and_however_little_room_there_is():
    model = tiny_models.model()
    together, _ = answered(model)
    tight, _ = answered(model, kv_gb=3 * 24576 / 1e9)
    assert torch.equal(together.tokens, tight.tokens) and together.texts == tight.texts
    assert torch.equal(together.rollout_logprobs.nan_to_num(1), tight.rollout_logprobs.nan_to_num(1))


class Late:
    """Replies that come some passes after they were asked for, in any order."""

    def __init__(self, monkeypatch, seed):
        self.chance, self.waiting, self.beside = random.Random(seed), [], 0
        answer, drawn, wait = generation.Ending._answer, decoding.Decoder._drawn, Scheduler.wait

        def later(ending, rollout):
            self.waiting.append((futures.Future(), answer(ending, rollout)))
            return self.waiting[-1][0]

        def beside(decoder, *given):
            found = drawn(decoder, *given)
            self.beside += bool(found and self.waiting)
            self.come(0.2)
            return found

        def waits(scheduler):
            self.come(1.0)
            wait(scheduler)

        monkeypatch.setattr(generation.Ending, "_answer", later)
        monkeypatch.setattr(decoding.Decoder, "_drawn", beside)
        monkeypatch.setattr(Scheduler, "wait", waits)

    def come(self, share):
        for each in [each for each in self.waiting if self.chance.random() < share]:
            self.waiting.remove(each)
            each[0].set_result(each[1])


@pytest.mark.parametrize("seed", range(2))
def test_replies_that_come_late_change_no_bit(seed, monkeypatch):
    model = tiny_models.model()
    at_once, _ = answered(model)
    late = Late(monkeypatch, seed)
    for room in (None, 3 * 24576 / 1e9):
        before = late.beside
        found, _ = answered(model, kv_gb=room)
        assert torch.equal(at_once.tokens, found.tokens) and at_once.texts == found.texts
        assert torch.equal(at_once.rollout_logprobs.nan_to_num(1), found.rollout_logprobs.nan_to_num(1))
        assert late.beside > before  # passes that drew while somebody waited


@pytest.mark.filterwarnings("ignore:generate")
@pytest.mark.parametrize("own", [True, False])
def test_replies_may_be_awaited(own, monkeypatch):
    if not own:
        monkeypatch.setattr(generation.families, "unsupported", lambda model: "a test")
    settings = dict(max_new_tokens=40, stop=("9", "A"))

    def reply(prompt, text):
        return None if text.count("QRS") > 2 else f"QRS{len(text)}"

    async def awaited(prompt, text):
        await asyncio.sleep(0)
        return reply(prompt, text)

    async def broken(prompt, text):
        raise KeyError("broken")

    model = tiny_models.model()
    at_once, found = (generate(model, Talker(), PROMPTS, reply=each, **settings) for each in (reply, awaited))
    assert torch.equal(at_once.tokens, found.tokens) and at_once.finish == found.finish
    assert (~found.trained).sum() > 9
    with pytest.raises(KeyError, match="broken"):
        generate(model, Talker(), PROMPTS, reply=broken, **settings)


def test_what_a_reply_says_ends_nothing():
    calls = []
    generate(
        tiny_models.model(), Talker(), PROMPTS, max_new_tokens=90, stop=tuple("9AKQGei"), stop_ids=(),
        reply=lambda prompt, text: calls.append(text) or "9AB",
    )  # fmt: skip
    assert len(calls) > 9 and all(text[-1] in "9AKQGei" for text in calls)


def test_a_reply_without_room_is_left_out():
    rollouts = generate(
        tiny_models.model(), Talker(), PROMPTS, max_new_tokens=20, stop=tuple("0123456789ABCDEFGHIJ"),
        reply=lambda prompt, text: "n" * 7,
    )  # fmt: skip
    assert all(len(rollouts.tokens[span]) <= 20 for span in spans(rollouts))
    assert set(rollouts.finish) == {"length"} and all(rollouts.trained[span][-1] for span in spans(rollouts))


@pytest.mark.parametrize("forced", [[[1]], [[1] * 9, [], []]])
def test_forced_tokens_that_do_not_fit_are_refused(forced):
    with pytest.raises(ValueError, match="forced must hold fewer than 9"):
        generate(tiny_models.model(), Talker(), PROMPTS, max_new_tokens=9, forced=forced)


@pytest.mark.parametrize("carry", [0, 5, 15])
def test_chunks_of_bounded_context(carry):
    """Each chunk sees the prompt and itself; the text is that of all tokens, what was carried over once."""
    model, settings = tiny_models.model("gemma3"), dict(group_size=3, max_new_tokens=50, chunk=(16, carry), rows=16)
    rollouts = generate(model, Talker(), PROMPTS, **settings)
    check(model, rollouts)
    for b, span in enumerate(spans(rollouts)):
        pieces = rollouts.tokens[span].split(rollouts.chunks[b])
        assert all(len(piece) == 16 for piece in pieces[:-1]) and len(pieces[-1]) <= 16
        assert all(one[16 - carry :].tolist() == other[:carry].tolist() for one, other in itertools.pairwise(pieces))
        own = [at >= carry or not number for number, piece in enumerate(pieces) for at in range(len(piece))]
        assert rollouts.trained[span].tolist() == own
        said = rollouts.tokens[span][torch.tensor(own)].tolist()
        assert rollouts.texts[b] == Talker().decode(said, True, False)
        assert len(said) == 50 if rollouts.finish[b] == "length" else said[-1] == 2
    tight = generate(model, Talker(), PROMPTS, kv_gb=3 * 24576 / 1e9, **settings)
    assert torch.equal(rollouts.tokens, tight.tokens)
    assert torch.equal(rollouts.rollout_logprobs.nan_to_num(1), tight.rollout_logprobs.nan_to_num(1))


@pytest.mark.filterwarnings("ignore:generate")
@pytest.mark.parametrize("own", [True, False])
def test_no_random_number_is_used_twice(own, monkeypatch):
    """Of each rollout one for each token that it says, over chunks, replies and waits for room."""
    draw, names = generation.Sampling.draw, []

    def named(self, logits, streams, positions):
        names.extend(zip(streams.tolist(), positions.tolist(), strict=True))
        return draw(self, logits, streams, positions)

    monkeypatch.setattr(generation.Sampling, "draw", named)
    if not own:
        monkeypatch.setattr(generation.families, "unsupported", lambda model: "a test")
    rollouts, _ = answered(tiny_models.model(), chunk=(9, 4), kv_gb=4 * 24576 / 1e9 if own else None)
    assert len(names) == len(set(names)) == rollouts.trained.sum()
    for number in range(3):
        places = sorted(place for stream, place in names if stream == number << 32)
        said = len(rollouts.tokens[spans(rollouts)[number]]) - 4 * (len(rollouts.chunks[number]) - 1)
        assert places[0] == 0 and places[-1] == said - 1


def test_a_chunk_that_holds_all_changes_nothing():
    model = tiny_models.model()
    whole, chunked = (generate(model, Talker(), PROMPTS, max_new_tokens=20, chunk=each) for each in (None, (21, 3)))
    assert torch.equal(whole.tokens, chunked.tokens) and whole.chunks == chunked.chunks


def test_replies_within_chunks():
    model = tiny_models.model()
    rollouts, _ = answered(model, chunk=(9, 4))
    check(model, rollouts)
    assert any(len(chunks) > 2 for chunks in rollouts.chunks) and any("9AB" in text for text in rollouts.texts)


@pytest.mark.parametrize("chunk", [(4, 4), (4, -1), (0, 0)])
def test_chunks_that_do_not_move_on_are_refused(chunk):
    with pytest.raises(ValueError, match="chunk must be"):
        generate(tiny_models.model(), Talker(), PROMPTS, max_new_tokens=9, chunk=chunk)


def given():
    """Two rollouts of 4 and 5 tokens with tokens of others in every place, the second in two chunks."""
    return Rollouts(
        prompts=PROMPTS[:2],
        prompt_tokens=[torch.tensor([3, 4, 5]), torch.tensor([6, 7])],
        group=torch.tensor([0, 1]),
        tokens=torch.tensor([11, 12, 13, 14, 21, 22, 23, 24, 25]),
        offsets=torch.tensor([0, 4, 9]),
        rollout_logprobs=torch.tensor([torch.nan, -1, -2, -3, -4, torch.nan, torch.nan, -5, torch.nan]),
        texts=["a", "b"],
        finish=["stop", "stop"],
        scores=(torch.tensor([1.0, 2.0]), {}),
        trained=torch.tensor([0, 1, 1, 1, 1, 0, 0, 1, 0]).bool(),
        chunks=[[4], [2, 3]],
    )


def test_a_batch_holds_trained_tokens_and_their_whole_completions():
    batch = batch_of(given(), torch.tensor([1.0, 2.0]))
    assert batch.tokens.tolist() == [12, 13, 14, 21, 24] and batch.rollout.tolist() == [0, 0, 0, 1, 1]
    assert batch.offsets.tolist() == [0, 3, 5] and batch.place.tolist() == [1, 2, 3, 0, 3]
    assert batch.counts.tokens == 5 and not batch.rollout_logprobs.isnan().any()
    part = batch.rollouts_at(torch.tensor([1]))
    assert part.place.tolist() == [0, 3] and [x.tolist() for x in part.completions[0]] == [[21, 22], [23, 24, 25]]
    both = [index.tolist() for index in batch.micro_batches(torch.arange(2), 14)]
    assert both == [[0, 1]] and len(list(batch.micro_batches(torch.arange(2), 13))) == 2
    whole = dataclasses.replace(given(), trained=None, chunks=None)
    assert batch_of(whole, torch.ones(2)).place is None and whole.chunks == [[4], [5]]
    assert batch_of(dataclasses.replace(given(), trained=None), torch.ones(2)).place is not None


def test_rollouts_taken_apart_and_together_keep_what_is_trained():
    apart = [selected(given(), torch.tensor([group]), torch.tensor([1.0, 2.0])) for group in (0, 1)]
    assert torch.equal(joined(apart).trained, given().trained) and joined(apart).chunks == given().chunks


def test_a_policy_passes_turns_on():
    policy = Policy(tiny_models.model(), Talker(), Sampling(max_new_tokens=20, stop=("9", "A")), Updating())
    rollouts = policy.generate(PROMPTS, forced=[[5], [6], [7]], chunk=(8, 2), reply=lambda *_: "Q")
    assert rollouts.tokens[rollouts.offsets[:-1]].tolist() == [5, 6, 7] and max(map(len, rollouts.chunks)) > 1
    out, batch = [], batch_of(rollouts, torch.ones(3))
    policy.update(batch, Loss(lambda seen, part: (out.append(seen.logprob.detach()) or -seen.logprob, {})))
    assert (torch.cat(out) - batch.rollout_logprobs).abs().max() < 2e-5


@pytest.mark.parametrize("micro_tokens", [4096, 8])
def test_an_update_learns_the_trained_tokens_behind_all_that_was_said(micro_tokens):
    """The gradient is that of the trained tokens' log-probs under ordinary forwards, however the batch is cut."""
    rollouts, batch = given(), batch_of(given(), torch.ones(2))
    model = tiny_models.model()
    loss = sum(-plain(model, rollouts, b)[rollouts.trained[span]].sum() for b, span in enumerate(spans(rollouts)))
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model = tiny_models.model()
    policy = Policy(model, Talker(), Sampling(), Updating(lr=0.0, micro_tokens=micro_tokens, max_grad_norm=1e9))
    found = {}
    policy.optimizer.step = lambda: found.update({n: p.grad.clone() for n, p in model.named_parameters()}) or {}
    policy.update(batch, Loss(lambda out, part: (-out.logprob, {})))
    largest = max(each.abs().max() for each in expected.values())
    for name, gradient in found.items():
        assert (gradient - expected[name]).abs().max() <= 1e-5 * largest, name
