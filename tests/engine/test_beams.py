"""Beam search: greedy at width 1 bit for bit, exhaustive where it is wide enough, whatever guides it."""

import contextlib
import itertools

import pytest
import tiny_models
import torch
from test_generation import ALIKE, RAGGED, completion
from tiny_models import Letters

from fuserl import families
from fuserl.engine import beams, branches
from fuserl.engine.beams import Beams, search
from fuserl.engine.generation import generate
from fuserl.engine.kv_cache import page_bytes
from fuserl.engine.prompts import Prompt
from fuserl.engine.scheduling import Source


@pytest.mark.parametrize("family", list(tiny_models.FAMILIES))
@pytest.mark.parametrize("prompts", [RAGGED, ALIKE], ids=["ragged", "alike"])
def test_width_1_is_greedy_bit_for_bit(family, prompts):
    model, settings = tiny_models.model(family), dict(max_new_tokens=70, stop=("9", "A"))
    greedy = generate(model, Letters(), prompts, temperature=0, **settings)
    found = search(model, Letters(), prompts, Beams(1), **settings)
    for b in range(len(prompts)):
        assert completion(found, b) == completion(greedy, b)
    assert (found.texts, found.finish) == (greedy.texts, greedy.finish)


def tiny(**changes):
    """A model of five tokens, the third of which ends a text."""
    return tiny_models.model(vocab_size=5, **changes)


TWO = [Prompt("0134"), Prompt("4")]
MOST = 4


def plain_logprobs(model, prompt, tokens):
    """Log-probs (n,) of tokens behind a prompt, from one ordinary forward."""
    model.set_attn_implementation("eager")
    ids = torch.tensor([[ord(letter) - 48 for letter in prompt.text] + tokens])
    with torch.no_grad():
        logits = model(ids).logits[0, -len(tokens) - 1 : -1]
    return logits.double().log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


def texts():
    """All that can be said in at most MOST tokens."""
    for length in range(1, MOST + 1):
        for tokens in itertools.product(range(5), repeat=length):
            if 2 not in tokens[:-1] and (tokens[-1] == 2 or length == MOST):
                yield [*tokens]


def ordered(score):
    """All texts, the one of the largest score first, and the scores."""
    found = sorted(((score(tokens), tokens) for tokens in texts()), key=lambda each: -each[0])
    return [tokens for _, tokens in found], [score for score, _ in found]


def test_a_wide_search_is_exhaustive():
    model, width = tiny(), 5**MOST
    found = search(model, Letters(), TWO, Beams(width), group_size=40, max_new_tokens=MOST)
    for number, prompt in enumerate(TWO):
        expected, scores = ordered(lambda tokens, prompt=prompt: float(plain_logprobs(model, prompt, tokens).sum()))
        for b in range(40):
            tokens, logprobs = completion(found, 40 * number + b)
            assert tokens == expected[b] and sum(logprobs) == pytest.approx(scores[b], abs=1e-5)
            assert found.finish[40 * number + b] == ("stop" if tokens[-1] == 2 else "length")


def test_a_reference_and_a_value_are_added():
    model, other, width = tiny(), tiny(hidden_size=48), 5**MOST
    worth = {number: torch.randn(5, generator=torch.Generator().manual_seed(number)) for number in range(2)}

    def value(asked):
        return [float(worth[number][tokens[-1]]) for number, tokens in asked]

    @contextlib.contextmanager
    def reference():
        yield other

    beams = Beams(width, beta=0.3, value=value)
    found = search(model, Letters(), TWO, beams, group_size=20, max_new_tokens=MOST, reference=reference)
    for number, prompt in enumerate(TWO):

        def score(tokens, number=number, prompt=prompt):
            apart = plain_logprobs(model, prompt, tokens) - plain_logprobs(other, prompt, tokens)
            return 0.3 * float(apart.sum()) + float(worth[number][tokens[-1]])

        expected = ordered(score)[0]
        for b in range(20):
            tokens, logprobs = completion(found, 20 * number + b)
            assert tokens == expected[b]
            assert sum(logprobs) == pytest.approx(float(plain_logprobs(model, prompt, tokens).sum()), abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("width", [2, 5])
def test_a_search_is_that_of_plain_forwards_and_the_same_alone(family, width):
    model, most = tiny_models.model(family), 70
    together = search(model, Letters(), RAGGED, Beams(width), group_size=2, max_new_tokens=most, rows=16)
    for number, prompt in enumerate(RAGGED):
        alone = search(model, Letters(), [prompt], Beams(width), group_size=2, max_new_tokens=most, rows=16)
        for member in range(2):
            tokens, logprobs = completion(together, 2 * number + member)
            assert completion(alone, member) == (tokens, logprobs)
            assert torch.allclose(torch.tensor(logprobs).double(), plain_logprobs(model, prompt, tokens), atol=2e-5)
    kept = plainly(model, RAGGED[1], width, 9)
    short = search(model, Letters(), RAGGED[1:2], Beams(width), group_size=width, max_new_tokens=9)
    assert [completion(short, b)[0] for b in range(width)] == kept


def plainly(model, prompt, width, most):
    """A beam search that reads every text from its beginning."""
    beam = [(0.0, [])]
    for _ in range(most):
        longer = [each for each in beam if each[1][-1:] == [2]]
        for total, tokens in (each for each in beam if each[1][-1:] != [2]):
            each = [float(plain_logprobs(model, prompt, [*tokens, token])[-1]) for token in range(64)]
            longer += [(total + gain, [*tokens, token]) for token, gain in enumerate(each)]
        beam = sorted(longer, key=lambda each: -each[0])[:width]
    return [tokens for _, tokens in beam]


def test_nothing_is_read_twice_and_no_page_is_kept(monkeypatch):
    read, made, forward = [], [], branches.Branches._forward

    def counting(self, spans):
        made.append(self)
        read.extend((text, at) for text, start, stop in spans for at in range(start, stop))
        return forward(self, spans)

    monkeypatch.setattr(branches.Branches, "_forward", counting)
    model, width = tiny_models.model(), 4
    found = search(model, Letters(), RAGGED, Beams(width), group_size=width, max_new_tokens=140, stop_ids=())
    prompts = [at for text, at in read if isinstance(text, Source)]
    assert len(prompts) == sum(len(prompt.text) for prompt in RAGGED)
    # Behind the first token, of which all read the prompt's end, each kept text reads one token at a time.
    assert len(read) - len(prompts) == len(RAGGED) * width * 139
    pages = made[0].pages
    assert not any(pages.holders) and sorted(pages.free) == [*range(len(pages.holders))]
    tight = dict(kv_gb=made[0].each * page_bytes(model) / 1e9, rows=64)
    again = search(model, Letters(), RAGGED, Beams(width), group_size=4, max_new_tokens=140, stop_ids=(), **tight)
    assert torch.equal(found.tokens, again.tokens) and torch.equal(found.rollout_logprobs, again.rollout_logprobs)
    with pytest.raises(RuntimeError, match="kv_gb must have room for a rollout"):
        search(model, Letters(), RAGGED, Beams(5), max_new_tokens=140, kv_gb=tight["kv_gb"])


def test_a_model_without_our_attention_finds_the_same(monkeypatch):
    model, settings = tiny_models.model(), dict(group_size=3, max_new_tokens=12)
    found = search(model, Letters(), RAGGED, Beams(3), **settings)
    monkeypatch.setattr(families, "unsupported", lambda model: "a test")
    with pytest.warns(UserWarning, match="a test"):
        again = search(model, Letters(), RAGGED, Beams(3), **settings)
    assert torch.equal(found.tokens, again.tokens)


def test_of_equals_the_greedy_one_comes_first():
    model = tiny_models.model()
    model.lm_head.weight.data[5:9] = model.lm_head.weight.data[4]
    model.lm_head.weight.data[4:9] *= 3
    greedy = generate(model, Letters(), RAGGED, max_new_tokens=12, temperature=0)
    found = search(model, Letters(), RAGGED, Beams(1), max_new_tokens=12)
    assert torch.equal(found.tokens, greedy.tokens) and 4 in greedy.tokens


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"width": 0}, "width"), ({"width": 3, "branches": 2}, "branches"), ({"width": 1, "beta": 0.0}, "beta"),
     ({"width": 1, "temperature": 0.0}, "temperature")],
)  # fmt: skip
def test_wrong_beams_are_refused(wrong, message):
    with pytest.raises(ValueError, match=f"beams: {message} must"):
        Beams(**wrong)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="group_size must be at most width"):
        search(tiny(), Letters(), TWO, Beams(2), group_size=3, max_new_tokens=3)
    with pytest.raises(ValueError, match="at most the 5 texts"):
        search(tiny(), Letters(), TWO, Beams(9), group_size=6, max_new_tokens=1)
    with pytest.raises(ValueError, match="prompts must not be empty"):
        search(tiny(), Letters(), [Prompt("")], Beams(2), max_new_tokens=3)


def test_the_greedy_token_is_among_few_of_many_equals():
    logits = torch.zeros(3, 64)
    logits[:, :2] = -1  # topk of the rest may take any
    ids, logprobs = beams._likeliest(logits, 2)
    assert ids[:, 0].tolist() == [2, 2, 2] and (ids[:, 1] > 2).all()
    assert logprobs[:, 0].tolist() == logprobs[:, 1].tolist() == pytest.approx(logits.log_softmax(-1)[:, 2].tolist())
