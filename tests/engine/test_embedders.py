"""Embedders: unit vectors, the same for the same text, by hashing, by a local model, and by a server."""

import asyncio
import json
import zlib

import pytest
import tiny_models
import tiny_runs
import torch
import transformers
from loopback import Pauses, Reply, in_turn, serving
from tolerance import check

from fuserl.engine import embedders, models
from fuserl.engine.config import Config
from fuserl.engine.embedders import Hashing, LocalEmbedder, ServedEmbedder
from fuserl.engine.endpoint import Endpoint

TEXTS = ["1+1=2", "", "23", "0 1\n2 3"]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No proxy, no key."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def units(vectors, count):
    return (
        vectors.dtype == torch.float32
        and len(vectors) == count
        and torch.allclose(vectors.norm(dim=1), torch.ones(count))
    )


def test_hashing_is_a_function_of_the_letters():
    embed = Hashing()
    texts = ["the cat sat on the mat", "the cat sat on a mat", "prices fell again", "", " ", "\ud800", "A b", "a B"]
    got = embed(texts)
    assert units(got, 8) and got.shape == (8, 256) and torch.equal(got, embed(texts)) and torch.equal(got[6], got[7])
    assert torch.equal(got[3:5], torch.cat([embed([""]), embed([" "])]))
    assert got[0] @ got[1] > 0.6 > 0.3 > got[0] @ got[2]
    assert embed([]).shape == (0, 256) and Hashing(7)(texts).shape == (8, 7)
    with pytest.raises(ValueError, match="embedder: size must be at least 1; got 0"):
        Hashing(0)


def test_hashing_has_known_values():
    expected = torch.zeros(16)
    for feature in (b" abcd ", b" ab", b"abc", b"bcd", b"cd "):
        code = zlib.crc32(feature)
        expected[(code >> 1) % 16] += 1.0 if code % 2 == 0 else -1.0
    assert expected.min() < 0 < expected.max()
    assert torch.allclose(Hashing(16)(["abcd"])[0], expected / expected.norm())


def trunk(family="llama"):
    return tiny_models.model(family).model


def theirs(model, ids, begin=0):
    with torch.no_grad():
        hidden = model(torch.tensor([ids])).last_hidden_state[0, begin:]
    return torch.nn.functional.normalize(hidden.mean(0), dim=0)


@pytest.mark.parametrize("tokens", [1, 12, 4096])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_local_model_gives_the_mean_of_its_last_states(family, tokens):
    model, words = trunk(family), tiny_runs.Characters()
    got = LocalEmbedder(model, words, tokens=tokens)(TEXTS)
    ids = [words(text).input_ids or [2] for text in TEXTS]
    wide = torch.stack([theirs(trunk(family).double(), each) for each in ids])
    assert units(got, 4)
    check("vectors", got, wide, torch.stack([theirs(model, each) for each in ids]), torch.float32)
    assert LocalEmbedder(model, words)([]).shape == (0, 32)


def test_contexts_are_read_and_not_counted():
    model, words = trunk(), tiny_runs.Characters()
    got = LocalEmbedder(model, words)(["2", "2", "34"], contexts=["1+1=", "1-1=", "1+1="])
    expected = [theirs(model, words(text).input_ids, 4) for text in ("1+1=2", "1-1=2", "1+1=34")]
    assert torch.allclose(got, torch.stack(expected), atol=1e-5) and not torch.allclose(got[0], got[1], atol=1e-3)
    with pytest.raises(ValueError, match="zip"):
        LocalEmbedder(model, words)(["2", "3"], contexts=["1"])


def test_what_a_model_has_no_room_for_is_left_out():
    model, words = trunk(), tiny_runs.Characters()
    model.config.max_position_embeddings = 6
    long = "0123456789"
    embed = LocalEmbedder(model, words)
    assert torch.allclose(embed([long])[0], theirs(model, words(long[:6]).input_ids), atol=1e-5)
    assert torch.allclose(embed(["01"], contexts=[long])[0], theirs(model, words("678901").input_ids, 4), atol=1e-5)
    assert torch.allclose(embed([long], contexts=[long])[0], theirs(model, words(long[:6]).input_ids), atol=1e-5)


def test_a_folder_is_an_embedder_with_or_without_a_head(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_tokenizer", lambda source: tiny_runs.Characters())
    tiny_models.model().save_pretrained(tmp_path / "headed")
    tiny_models.model().model.save_pretrained(tmp_path / "trunk")
    expected = LocalEmbedder(trunk(), tiny_runs.Characters())(TEXTS)
    for folder in ("headed", "trunk"):
        embed = embedders.configured(Config(device="cpu", embedder=str(tmp_path / folder)).resolved())
        assert torch.allclose(embed(TEXTS), expected, atol=1e-6)
        assert not any(each.requires_grad for each in embed.model.parameters()) and not embed.model.training
    sizes = dict(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    bert = transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False)
    bert.save_pretrained(tmp_path / "bert")
    embed = embedders.configured(Config(device="cpu", embedder=str(tmp_path / "bert")).resolved())
    assert torch.allclose(
        embed(["12", "123"])[0], theirs(bert.eval(), tiny_runs.Characters()("12").input_ids), atol=1e-5
    )


def test_a_model_that_is_not_whole_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_tokenizer", lambda source: tiny_runs.Characters())
    trunk().save_pretrained(tmp_path / "cut")
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    (tmp_path / "cut" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(
        ValueError, match=r"must hold every weight of LlamaModel .* it lacks layers\.3\..*a whole model"
    ):
        embedders.configured(Config(device="cpu", embedder=str(tmp_path / "cut")).resolved())


def vectors(number, asked):
    text = asked.body["input"]
    return Reply({"data": [{"index": 0, "embedding": [float(len(text)), 3.0, 0]}]})


def test_a_server_embeds_each_text_once():
    with serving(vectors) as server:
        embed = embedders.configured(Config(device="cpu", embedder=server.url, embedder_model="small").resolved())
        got = embed(["abcd", "", "abcd"])
        assert torch.allclose(got, torch.tensor([[0.8, 0.6, 0.0], [0.0, 1.0, 0.0], [0.8, 0.6, 0.0]]))
        assert got.dtype == torch.float32 and embed([]).shape[0] == 0

        async def inside():  # of an event loop, as in a notebook
            return embed(["abcd"])

        assert torch.equal(asyncio.run(inside()), got[:1]) and len(server.asked) == 2
    assert {asked.path for asked in server.asked} == {"/v1/embeddings"}
    assert sorted(asked.body["input"] for asked in server.asked) == ["", "abcd"]
    assert server.asked[0].body["model"] == "small"


@pytest.mark.parametrize(
    "body", [{}, {"data": []}, {"data": [{"embedding": []}]}, {"data": [{"embedding": "AAA="}]},
             {"data": [{"embedding": ["1"]}]}, {"data": [{"embedding": None}]}],
)  # fmt: skip
def test_an_answer_without_a_vector_is_refused(body):
    with serving(in_turn(Reply(body))) as server, pytest.raises(RuntimeError, match="must answer as OpenAI's servers"):
        ServedEmbedder(Endpoint(server.url, "small", sleep=Pauses()))(["a"])


def test_vectors_of_two_lengths_are_refused():
    says = r"all vectors must have one length; .* gave \[1, 2\]"

    def ragged(number, asked):
        return Reply({"data": [{"embedding": [1.0] * len(asked.body["input"])}]})

    with serving(ragged) as server, pytest.raises(RuntimeError, match=says):
        ServedEmbedder(Endpoint(server.url, "small", sleep=Pauses()))(["a", "ab"])


def test_the_default_is_hashing_and_a_server_needs_a_model():
    assert isinstance(embedders.configured(Config(device="cpu").resolved()), Hashing)
    with pytest.raises(ValueError, match=r"embedder: a server must be told its model; .* Add --embedder-model NAME"):
        embedders.configured(Config(device="cpu", embedder="http://host").resolved())
