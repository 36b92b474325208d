"""Models, adapters and packages that a run cannot have: one sentence each, and no training."""

import json
import random
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import refusals
import tiny_models
import tiny_runs
import transformers
from refusals import outcome, refused, sentence, training
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from fuserl.engine import models

LOAD = models.load
ENCODER_DECODER = dict(vocab_size=64, d_model=32, d_ff=48, num_layers=1, num_heads=4, d_kv=8)
SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)


@pytest.fixture(autouse=True)
def staged(monkeypatch, tmp_path):
    refusals.stage(monkeypatch, tmp_path)
    monkeypatch.setattr(models, "load", LOAD)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def save(folder, model, **special):
    """A model and a tokenizer of the letters of arithmetic, as transformers writes them."""
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{letter: at for at, letter in enumerate(tiny_runs.LETTERS, 3)}}
    letters = Tokenizer(WordLevel(words, unk_token="<pad>"))
    letters.pre_tokenizer = Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=letters, **{"eos_token": "</s>", "pad_token": "<pad>", **special}
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "good", tiny_models.model())


def spoilt(good, file, change):
    """A copy of the good model in which a file is changed: other bytes, other settings, or None for no file."""
    shutil.copytree(good, "spoilt")
    path = Path("spoilt") / file
    if change is None:
        path.unlink()
    elif isinstance(change, dict):
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    else:
        path.write_bytes(change(path.read_bytes()) if callable(change) else change)
    return "spoilt"


def test_the_good_model_trains(good):
    assert outcome(training("--model", good))[0] == 0 and refusals.started


@pytest.mark.parametrize(
    "name", ["./absent", "/absent", "a/b/c", "absent", "absent/absent", "a b", "https://x.y/z", "~x"]
)
def test_names_of_no_model(name):
    refused(training("--model", name), repr(name))


def test_folders_of_no_model():
    Path("empty").mkdir()
    refused(training("--model", "empty"), "'empty'", "No such file")
    refused(training("--model", "problems.jsonl"), "'problems.jsonl'", "no such folder")
    for text in (None, "3", "[]", "null", "{"):
        if text:
            Path("empty/config.json").write_text(text)
        refused(["eval", "empty", "--data", "problems.jsonl", "--eval-problems", "2"], "'empty'")


def test_a_model_is_no_run(good):
    refused(["train", "--resume", good, "--steps", "3"], "describes a model")
    refused(["train", "--config", f"{good}/config.json", "--out", "out"], "describes a model")
    refused(["export", good, "--out", "new"], "must be a run's folder")
    refused(["report", good], "has no metrics.jsonl")


SPOILT = [
    ("config.json", None, "No such file"),
    ("config.json", b"{", "config.json cannot be read"),
    ("config.json", b"\xff\x00", "config.json cannot be read"),
    ("config.json", b"[" * 100_000, "config.json cannot be read"),
    *[("config.json", text, "names no model_type") for text in (b"[]", b"3", b'"x"', b"null", b"{}")],
    ("config.json", b'{"reasons": {}, "config": {"steps": 3}}', "fuserl export"),
    ("config.json", {"model_type": 3}, "names no model_type"),
    ("config.json", {"model_type": "nope"}, "nope"),
    ("config.json", {"hidden_size": "x"}, "hidden_size"),
    ("config.json", {"num_attention_heads": 0}, "spoilt"),
    ("config.json", {"hidden_size": 64}, "lacks lm_head.weight"),
    ("config.json", {"num_hidden_layers": 4}, "lacks model.layers.3.input_layernorm.weight and 8 more"),
    ("config.json", {"vocab_size": 65}, "lacks lm_head.weight and 1 more"),
    ("config.json", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
    ("model.safetensors", None, "no file named model.safetensors"),
    ("model.safetensors", b"", "SafetensorError"),
    ("model.safetensors", b"\xff" * 100, "SafetensorError"),
    ("model.safetensors", lambda whole: whole[: len(whole) // 2], "SafetensorError"),
    ("tokenizer.json", None, "tokenizer"),
    *[("tokenizer.json", text, "whose tokenizer") for text in (b"", b"{", b"[]", b"{}", b"3", b"\xff")],
    *[("tokenizer_config.json", text, "whose tokenizer") for text in (b"", b"{", b"[]", b"3")],
]


@pytest.mark.parametrize(("file", "change", "says"), SPOILT, ids=lambda value: repr(value)[:40])
def test_spoilt_folders(good, file, change, says):
    status = 1 if says == "bitsandbytes" else 2
    refused(training("--model", spoilt(good, file, change)), says, "spoilt", status=status)


@pytest.mark.parametrize("seed", range(24))
def test_any_damage(good, seed):
    """A folder with bytes changed, cut off or added is refused, or it is still a model."""
    draw = random.Random(seed)
    file = draw.choice(["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])

    def damaged(whole):
        at = draw.randrange(min(len(whole), 4000))
        return draw.choice(
            [whole[:at], whole + b"}", whole[:at] + bytes(draw.choices(range(256), k=3)) + whole[at + 3 :]]
        )

    words = training("--model", spoilt(good, file, damaged))
    status, _, err = outcome(words)
    assert status in (0, 1, 2), err
    assert status == 0 or (not refusals.started and sentence(err, status))


@pytest.mark.parametrize(
    ("family", "config", "says"),
    [
        (
            "T5ForConditionalGeneration",
            dict(vocab_size=64, d_model=32, d_ff=48, num_layers=1, num_heads=4, d_kv=8),
            "T5",
        ),
        ("BertForMaskedLM", SMALL, "BertLMHeadModel attends in both directions"),
        ("BertModel", SMALL, "lacks cls.predictions"),
        ("LlamaForSequenceClassification", dict(**SMALL, pad_token_id=0), "lacks lm_head.weight"),
    ],
)
def test_models_that_are_not_what_is_trained(family, config, says):
    for ending in ("ForConditionalGeneration", "ForMaskedLM", "ForCausalLM", "ForSequenceClassification", "Model"):
        if family.endswith(ending):
            made = getattr(transformers, f"{family.removesuffix(ending)}Config")(**config)
            break
    name = save("other", getattr(transformers, family)(made))
    refused(training("--model", name), says)


WORDS = {
    ("--chat",): "must have a chat template",
    ("--reference", "absent", "--beta", "0.1"): "got 'absent'",
    ("--reference", "larger", "--beta", "0.1"): "it has 80 tokens and the policy 64",
    ("--max-new-tokens", "300"): "must fit the 256 tokens",
    ("--lora-rank", "-1"): "got -1",
    ("--lora-rank", "33"): "at most 32",
    ("--lora-rank", "1000000000"): "at most 32",
    ("--lora-rank", "2", "--lora-targets", "nothing"): "got 'nothing'",
    ("--lora-rank", "2", "--lora-targets", "embed_tokens"): "got 'embed_tokens'",
    ("--lora-rank", "2", "--lora-targets", "["): "got '['",
    ("--lora-rank", "2", "--lora-targets"): "got none",
    ("--lora-rank", "2", "--lora-dropout", "1"): "got 1.0",
    ("--lora-rank", "2", "--lora-alpha", "0"): "got 0.0",
    ("--lora-rank", "2", "--lora-targets", "lm_head", "--lora-dropout", "0.1"): "dropout must be 0 on the head",
    ("--lora-rank", "2", "--freeze", "*"): "must leave a parameter to train",
    ("--freeze", "*"): "must leave a parameter to train",
    ("--freeze", "nothing"): "got 'nothing'",
    ("--freeze", "["): "got '['",
}


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_what_does_not_go_with_the_model(good, words):
    if "larger" in words:
        save("larger", tiny_models.model(vocab_size=80))
    refused(training("--model", good, *words), WORDS[words])


def test_tokens_that_the_model_does_not_have():
    refused(training("--model", save("few", tiny_models.model(vocab_size=8))), "18 tokens and 8 embeddings")


def test_answers_that_nothing_can_end():
    name = save("endless", tiny_models.model(), eos_token=None)
    words = training("--model", name, "--chat", "--no-chat", "--stop", recipe="sft", group_size=None)
    refused(words, "end-of-text token")


def test_weights_that_are_not_used_are_named(good):
    status, _, err = outcome(training("--model", spoilt(good, "config.json", {"num_hidden_layers": 2})))
    assert status == 0 and "fuserl: spoilt holds weights that are not used: model.layers.2." in err


PACKAGES = {  # what a run needs each for
    "transformers": [],
    "safetensors": [],
    "rich": [],
    "peft": ["--lora-rank", "2"],
    "math_verify": ["--reward", "math_equal"],
    "reasoning_gym": ["--task", "reasoning_gym:chain_sum", "--data"],
    "pyarrow": ["--data", "problems.parquet"],
    "tensorboard": ["--trackers", "tensorboard"],
    "wandb": ["--trackers", "wandb"],
}


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_that_are_not_installed(package, monkeypatch):
    tiny_runs.use(monkeypatch)
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    words = PACKAGES[package]
    data = None if words[-1:] == ["--data"] else "problems.jsonl"
    line = refused(training(*[word for word in words if data or word != "--data"], data=data), package, status=1)
    assert 'Run: pip install "fuserl[' in line


def test_a_package_that_is_broken(monkeypatch, tmp_path):
    tiny_runs.use(monkeypatch)
    (tmp_path / "peft.py").write_text("import absent_thing")
    monkeypatch.delitem(sys.modules, "peft", raising=False)
    refused(training("--lora-rank", "2"), "peft is installed but cannot be imported", "absent_thing", status=1)


def test_a_gpu_that_is_not_there():
    refused(training("--device", "cuda:99"), "torch must see cuda:99", status=1)


@pytest.mark.parametrize(("backend", "status"), [("cpp", 2), ("triton", 1)])
def test_a_backend_that_cannot_run(backend, status, good, monkeypatch):
    monkeypatch.setenv("FUSERL_BACKEND", backend)
    refused(training("--model", good), repr(backend), status=status)
