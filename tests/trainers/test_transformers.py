"""A patched model against itself unpatched, and both against float64: losses, gradients, log-probs, and refusals."""

import copy
import importlib
import importlib.metadata
import inspect
import subprocess
import sys

import pytest
import tiny_models
import torch
import torch.nn.functional as F
import transformers
from patched_models import ADAPTERS, FAMILIES, B, T, adapted, batch, defined, exactly, patched, same, step, tiny
from tolerance import check, check_rows
from torch.utils._python_dispatch import TorchDispatchMode

from fuserl.trainers import heads
from fuserl.trainers import transformers as ours


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_of_every_family(family):
    """Softcaps, factors of the logits, biases, tied weights, auxiliary losses."""
    given = batch()
    true = step(defined(tiny(family, torch.float64)), given)
    same(step(patched(tiny(family)), given), true, step(tiny(family), given))


ITEMS = torch.tensor(29)
CALLS = {
    "number": dict(num_items_in_batch=17), "tensor": dict(num_items_in_batch=ITEMS), "ignored": dict(ignore_index=0),
    "shifted": dict(shift_labels=batch()["labels"].roll(-1, 1)), "positions": dict(position_ids=torch.arange(T)[None]),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_keywords_of_the_loss(call):
    given = batch() | CALLS[call]
    if call == "ignored":
        given["labels"] = given["labels"].clamp(min=0)
    true = step(defined(tiny(dtype=torch.float64)), given)
    same(step(patched(tiny()), given), true, step(tiny(), given))


@pytest.mark.parametrize("more", [{}, {"outputs": ("logprob",)}], ids=["loss", "outputs"])
def test_a_batch_without_a_label_has_no_gradient(more):
    """transformers' loss is NaN there, and its gradient 0 as ours."""
    given = batch()
    given["labels"] = torch.full_like(given["labels"], -100)
    theirs, got = step(tiny(), given), step(patched(tiny()), given, **more)
    assert theirs[0].isnan() and got[0] == 0
    assert not any(gradient.any() for found in (theirs, got) for gradient in found[1].values())


def test_arguments_by_position():
    given = batch()
    model = patched(tiny())
    expected = model(**given).loss
    assert torch.equal(
        model(given["input_ids"], given["attention_mask"], None, None, None, given["labels"]).loss, expected
    )


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_outputs(family, temperature):
    """Log-probs and entropies beside the loss, and their gradients; 0 where there is no label."""
    given, g = batch(), torch.randn(2, B, T)
    targets = F.pad(given["labels"], (0, 1), value=-100)[:, 1:]
    counted = targets != -100

    def by_definition(model):
        found = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"])
        logp = (found.logits / temperature).log_softmax(-1)
        return logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0], -(logp.exp() * logp).sum(-1)

    def by_ours(model):
        found = patched(model)(**given, outputs=("logprob", "entropy"), temperature=temperature)
        assert found.logits is None and not (found.logprob * ~counted).any() and not (found.entropy * ~counted).any()
        assert torch.allclose(found.loss, -found.logprob.sum() / counted.sum())
        return found.logprob, found.entropy

    results = []
    for how, dtype in ((by_ours, torch.float32), (by_definition, torch.float64), (by_definition, torch.float32)):
        model = tiny(family, dtype)
        found = [x * counted for x in how(model)]
        sum((x * y).sum() for x, y in zip(found, g, strict=True)).backward()
        results.append((*found, {name: p.grad for name, p in model.named_parameters()}))
    for at, name in enumerate(("logprob", "entropy")):
        check(name, *(x[at].detach() for x in results), torch.float32)
    for name in results[0][2]:
        check_rows(name, *(x[2][name].reshape(len(x[2][name]), -1) for x in results), torch.float32)


def test_outputs_without_a_loss_and_without_gradient():
    given = batch()
    shifted, model = given.pop("labels").roll(-1, 1), patched(tiny()).eval()
    with torch.no_grad():
        found = model(**given, shift_labels=shifted, outputs=("is_top1", "sum_sq_prob"))
        logp = model(**given).logits.log_softmax(-1)
    assert found.loss is None and found.keys() >= {"is_top1", "sum_sq_prob"} and "logprob" not in found
    counted = shifted != -100
    assert torch.equal(found.is_top1[counted] != 0, (logp.argmax(-1) == shifted)[counted])
    torch.testing.assert_close(found.sum_sq_prob[counted], (2 * logp).exp().sum(-1)[counted])


def test_evaluation_and_generation_are_as_they_were():
    given, model = batch(), tiny().eval()
    plain, tokens = (
        model(**given),
        model.generate(given["input_ids"], max_new_tokens=3, do_sample=False, pad_token_id=0),
    )
    with ours.patch(model):
        got = model(**given)
        assert torch.equal(got.logits, plain.logits) and torch.equal(got.loss, plain.loss)
        again = model.generate(given["input_ids"], max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert torch.equal(again, tokens)
        given.pop("labels")
        assert torch.equal(model.train()(**given).logits, plain.logits)


class Sizes(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        found = function(*arguments, **(keywords or {}))
        for x in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return found


@pytest.mark.parametrize("more", [{}, {"outputs": ("logprob", "entropy")}])
def test_logits_are_never_made(more):
    vocabulary = 1000
    ids = torch.randint(vocabulary, (10, 220))
    sizes = []
    for model in (tiny(vocab_size=vocabulary), patched(tiny(vocab_size=vocabulary))):
        with Sizes() as mode:
            model(input_ids=ids, labels=ids, **(more if hasattr(model, "_fuserl") else {})).loss.backward()
        sizes.append(mode.largest)
    assert sizes[0] >= ids.numel() * vocabulary > 4 * sizes[1]


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_autocast(weights):
    """Hidden states are bfloat16 there, the head float32; ours has its logits in float32, where theirs are rounded."""
    given = batch()
    true = step(defined(tiny(dtype=weights).double()), given)
    with torch.autocast("cpu", torch.bfloat16):
        plain, got = step(tiny(dtype=weights), given), step(patched(tiny(dtype=weights)), given)
    same(got, true, plain, torch.bfloat16)


@pytest.mark.parametrize("of_states, of_head", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_head_of_another_dtype(of_states, of_head):
    """Master weights of the head alone, and a head of half the size: their gradients are of their own dtype."""
    model = patched(tiny(dtype=of_states))
    model.lm_head.to(of_head)
    loss, gradients = step(model, batch())
    with torch.no_grad():
        states = model.model(batch()["input_ids"], batch()["attention_mask"]).last_hidden_state.double()
        logits = states @ model.lm_head.weight.to(of_states).double().T
    torch.testing.assert_close(loss.double(), exactly(logits, batch()["labels"], logits.shape[-1]), rtol=1e-5, atol=0)
    assert gradients["lm_head.weight"].dtype == of_head


def test_recomputed_activations_and_a_compiled_backbone():
    given = batch()
    expected = step(patched(tiny()), given)
    for make in ("recomputed", "compiled", "compiled after"):
        model = tiny()
        if make == "recomputed":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if make == "compiled":
            model.model = torch.compile(model.model, backend="aot_eager")
        ours.patch(model)
        if make == "compiled after":
            model.model = torch.compile(model.model, backend="aot_eager")
        got = step(model, given)
        got[1].update({name.replace("_orig_mod.", ""): x for name, x in got[1].items()})
        torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=0)
        for name, gradient in expected[1].items():
            torch.testing.assert_close(got[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("first", ["peft", "patch"])
@pytest.mark.parametrize("targets", ADAPTERS)
def test_adapters(targets, first):
    given, options = batch(), ADAPTERS[targets]
    reference = adapted(torch.float64, **options)
    defined(reference.get_base_model())
    if first == "peft":
        model = patched(adapted(torch.float32, **options))
    else:
        model = adapted(torch.float32, ours.patch, **options)
    true, plain = step(reference, given), step(adapted(torch.float32, **options), given)
    same(step(model, given), true, plain)
    found = model(**given, outputs=("logprob",))
    assert torch.allclose(found.loss.double(), true[0], rtol=1e-5)


def test_in_and_out():
    """Twice is once, out is out, a copy is patched by itself, and the signature stays."""
    given, model = batch(), tiny()
    plain, signature, attributes = model(**given).loss, inspect.signature(model.forward), set(vars(model))
    with ours.patch(model):
        with ours.patch(model):
            pass
        assert model(**given).logits is None and inspect.signature(model.forward) == signature
        assert ours.report(model).replaced == {"LlamaForCausalLM.forward": ["with labels in training", "with outputs"]}
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.lm_head.weight.zero_()
        assert not torch.equal(twin(**given).loss, model(**given).loss)
    assert model.forward.__func__ is transformers.LlamaForCausalLM.forward and set(vars(model)) <= attributes | {
        "_fuserl_checked"
    }
    assert torch.equal(model(**given).loss, plain) and ours.report(model).replaced == {}
    ours.unpatch(model)
    assert twin(**given).logits is None


def test_what_another_put_over_ours_calls_the_models_own_after():
    given, model = batch(), patched(tiny())
    inner = model.forward
    model.forward = lambda **given: inner(**given)
    ours.unpatch(model)
    assert model(**given).logits is not None
    with pytest.raises(ValueError, match="the model is not patched any more"):
        model(**given, outputs=("logprob",))


def test_made_by_name(tmp_path):
    tiny().save_pretrained(tmp_path)
    for model in (
        ours.AutoFuserlModelForCausalLM.from_pretrained(tmp_path),
        ours.AutoFuserlModelForCausalLM.from_config(tiny().config),
    ):
        assert type(model) is transformers.LlamaForCausalLM and model.train()(**batch()).logits is None


APART = """
import sys, torch, transformers
from fuserl import attention
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="fuserl").eval()
prompts, tokens = [torch.arange(3, 9), torch.arange(5, 8)], torch.arange(20, 30)
layout = attention.pack(prompts, torch.tensor([0, 0, 1]), tokens, torch.tensor([0, 4, 7, 10]))
with torch.no_grad():
    got = model(**layout.inputs()).logits[0, layout.predictor]
    alone = model(torch.cat([prompts[0], tokens[4:7]])[None]).logits[0, 5:8]
torch.testing.assert_close(got[4:7], alone, rtol=1e-4, atol=1e-5)
assert not [name for name in sys.modules if name.startswith(("fuserl.engine", "fuserl.trainers"))]
"""


def test_attention_of_packed_rollouts_without_the_engine(tmp_path):
    """By its name in transformers' registry, in a process that knows no more; and in a patched model."""
    tiny().save_pretrained(tmp_path)
    subprocess.run([sys.executable, "-c", APART, str(tmp_path)], check=True, timeout=120)
    model = ours.AutoFuserlModelForCausalLM.from_pretrained(tmp_path, attn_implementation="fuserl").train()
    assert model.config._attn_implementation == "fuserl"
    torch.testing.assert_close(model(**batch()).loss, tiny()(**batch()).loss, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="model must use full or sliding-window attention"):
        ours.AutoFuserlModelForCausalLM.from_config(tiny("nemotron").config, attn_implementation="fuserl")


class Rows(torch.utils.data.Dataset):
    """Texts of several lengths."""

    def __len__(self):
        return 24

    def __getitem__(self, at):
        draw = torch.Generator().manual_seed(at)
        ids = torch.randint(3, tiny_models.VOCABULARY, (4 + at % 5,), generator=draw)
        return {"input_ids": ids, "labels": ids}


def collate(rows):
    ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    return {"input_ids": ids, "labels": ids.masked_fill(ids == 0, -100)}


def history(model, folder):
    """Losses and gradients' norms of ten steps of transformers' Trainer, and its evaluation."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=10, per_device_train_batch_size=3, gradient_accumulation_steps=2, optim="sgd",
        learning_rate=0.05, lr_scheduler_type="constant", use_cpu=True, report_to="none", logging_steps=1,
        save_strategy="no", disable_tqdm=True, seed=1, max_grad_norm=100.0,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows(), data_collator=collate
    )
    trainer.train()
    log = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
    return torch.tensor([*log, (trainer.evaluate()["eval_loss"], 0.0)], dtype=torch.float64)


def test_ten_steps_of_the_trainer(tmp_path):
    pytest.importorskip("accelerate", reason="pip install accelerate")
    truth = history(defined(tiny(dtype=torch.float64)), tmp_path)
    plain, got = history(tiny(), tmp_path), history(patched(tiny()), tmp_path)
    assert len(got) == 11
    for at, name in enumerate(("losses", "norms")):
        check(name, got[:, at], truth[:, at], plain[:, at], torch.float32)


def test_without_transformers_the_import_gives_the_line_for_pip(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.delitem(sys.modules, "fuserl.trainers.transformers")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'transformers>=5\.5,<6'"):
        importlib.import_module("fuserl.trainers.transformers")


def test_heads_look_inside_wrappers():
    model = tiny()
    wrapped = torch.nn.Module()
    wrapped.module = model
    assert heads.causal_lm(wrapped) is model
