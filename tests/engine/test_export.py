"""Export: what transformers loads from the folder is the model that was trained, and the folder is whole or absent."""

import json

import pytest
import tiny_models
import torch
import transformers
from test_adapters import HEAD, adapted, logits, snapshot
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tolerance import check
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fuserl import attention
from fuserl.engine import adapters, export

FAMILIES = pytest.mark.parametrize("family", list(tiny_models.FAMILIES))


def eager(model):
    model.set_attn_implementation("eager")  # "sdpa" of some transformers versions forgets Gemma2's soft cap
    return model


def loaded(folder, **options):
    return eager(AutoModelForCausalLM.from_pretrained(folder, **options))


@FAMILIES
@pytest.mark.parametrize("tied", [False, True], ids=["own_head", "tied_head"])
def test_a_loaded_folder_gives_the_same_bits(family, tied, tmp_path):
    model = tiny_models.model(family, tie_word_embeddings=tied).train()
    attention.attach(model)
    adapters.checkpoint_activations(model)
    before = snapshot(model)
    folder = export.write(model, None, tmp_path / "new" / "trained")
    assert folder == tmp_path / "new" / "trained" and model.training
    assert model.config._attn_implementation == attention.NAME
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    again = loaded(folder)
    assert again.dtype == torch.float32 and torch.equal(logits(again), logits(eager(model).eval()))
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
    assert "fuserl" not in (folder / "config.json").read_text()
    assert [path.name for path in folder.parent.iterdir()] == ["trained"]
    assert {path.name for path in folder.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # readable for all or for none


@pytest.mark.parametrize("tied", [False, True], ids=["own_head", "tied_head"])
@pytest.mark.parametrize("targets", [("all-linear",), HEAD], ids=["body", "head_too"])
def test_adapters_are_folded_in(targets, tied, tmp_path):
    model = adapted(targets, tied=tied)
    output = logits(model)
    again = loaded(export.write(model, None, tmp_path / "trained"))
    assert type(again) is transformers.LlamaForCausalLM
    wide = adapted(targets, tied=tied).to(torch.float64)
    check("logits", logits(again), logits(wide), output, torch.float32)
    assert not torch.allclose(logits(again), logits(tiny_models.model(tie_word_embeddings=tied)), atol=1e-2)
    assert torch.equal(logits(model), output) and adapters.present(model)


@pytest.mark.parametrize("made", [tiny_models.model, adapted], ids=["plain", "lora"])
def test_another_dtype(made, tmp_path):
    model = made()
    again = loaded(export.write(model, None, tmp_path / "trained", dtype=torch.bfloat16), dtype="auto")
    assert json.loads((tmp_path / "trained" / "config.json").read_text())["dtype"] == "bfloat16"
    expected = adapters.merged(model).state_dict()
    assert all(torch.equal(tensor, expected[name].bfloat16()) for name, tensor in again.state_dict().items())
    assert adapters.base(model).dtype == torch.float32


def test_the_tokenizer_comes_along(tmp_path):
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"one": 0, "?": 1}, unk_token="?")), eos_token="?"
    )
    words.chat_template = "{{ messages[0].content }}"
    folder = export.write(tiny_models.model(), words, tmp_path / "trained")
    again = AutoTokenizer.from_pretrained(folder)
    assert again("one").input_ids == words("one").input_ids and again.chat_template == words.chat_template


def test_generation_settings_that_contradict_themselves_are_kept(tmp_path):
    model = tiny_models.model()
    settings = model.generation_config
    settings.temperature, settings.do_sample = 0.6, False
    folder = export.write(model, None, tmp_path / "trained")
    assert model.generation_config is settings
    written = json.loads((folder / "generation_config.json").read_text())
    assert written["temperature"] == 0.6 and written["eos_token_id"] == 2
    assert loaded(folder).generation_config.temperature == 0.6


def test_what_is_there_is_not_overwritten(tmp_path):
    model, taken = tiny_models.model(), tmp_path / "taken"
    taken.mkdir()
    export.write(model, None, taken)
    before = {path.name: path.read_bytes() for path in taken.iterdir()}
    (tmp_path / "file").write_text("mine")
    for folder in (taken, tmp_path / "file"):
        with pytest.raises(ValueError, match=r"write: folder must not exist yet or be empty; got .*(taken|file)'"):
            export.write(tiny_models.model("qwen3"), None, folder)
    assert {path.name: path.read_bytes() for path in taken.iterdir()} == before
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("where", ["weights", "tokenizer", "publish"])
def test_a_write_that_fails_leaves_nothing(where, tmp_path, monkeypatch):
    class Full:
        def save_pretrained(self, draft):
            if where == "tokenizer":
                raise OSError(28, "No space left on device")

    def full(*arguments, **named):
        raise OSError(28, "No space left on device")

    if where == "weights":
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    elif where == "publish":
        monkeypatch.setattr(export.atomic, "publish_folder", full)
    with pytest.raises(RuntimeError, match=r"write: cannot write .*trained \(.*No space left.*\)\. Make room"):
        export.write(tiny_models.model(), Full(), tmp_path / "trained")
    assert list(tmp_path.iterdir()) == []


def test_bars_stay_quiet(tmp_path, capsys):
    export.write(adapted(), None, tmp_path / "trained")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("targets", [None, ("all-linear",)], ids=["plain", "adapted"])
def test_a_reward_model_is_a_classifier_of_one_label(targets, tmp_path):
    model = adapted(targets) if targets else tiny_models.model()
    score = torch.nn.Linear(32, 1, bias=False)
    folder = export.write(model, None, tmp_path / "scored", score=score)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = torch.tensor([[5, 9, 11, 3]])
    with torch.no_grad():
        hidden = adapters.base(model).eval().base_model(ids).last_hidden_state
    assert torch.allclose(again(ids).logits, score(hidden[:, -1]), atol=1e-4)
    assert again.config.num_labels == 1 and "lm_head.weight" not in again.state_dict()
