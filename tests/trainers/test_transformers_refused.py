"""What a patched model refuses, each with one sentence, and adapters on its head that are off."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from patched_models import adapted, batch, defined, exactly, patched, tiny

from fuserl.trainers import transformers as ours


def test_adapters_that_are_off_or_refused():
    given = batch()
    model = patched(adapted(torch.float32, target_modules=["lm_head"]))
    with model.disable_adapter():
        torch.testing.assert_close(model(**given).loss, tiny()(**given).loss)
    expected = model(**given).loss
    model.merge_adapter()
    torch.testing.assert_close(model(**given).loss, expected, rtol=1e-4, atol=0)
    refused = dict(lora_dropout=0.1), dict(use_dora=True), dict(lora_bias=True)
    for options in refused:
        with pytest.raises(ValueError, match="an adapter on the head must be one LoRA"):
            patched(adapted(torch.float32, target_modules=["lm_head"], **options))(**given)


class Renormalised(transformers.LlamaForCausalLM):
    """A model with a factor of the logits that its configuration does not name."""

    def forward(self, *arguments, labels=None, **keywords):
        found = super().forward(*arguments, **keywords)
        found.logits = found.logits * 0.5
        found.loss = None if labels is None else self.loss_function(found.logits, labels, self.config.vocab_size)
        return found


class Twice(transformers.LlamaForCausalLM):
    """A model that uses its head twice."""

    def forward(self, *arguments, **keywords):
        super().forward(*arguments, **keywords)
        return super().forward(*arguments, **keywords)


class Unused(transformers.LlamaForCausalLM):
    """A model whose loss is computed from hidden states already, as with Liger's forward."""

    def forward(self, *arguments, labels=None, **keywords):
        states = self.model(*arguments, **keywords).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=(states @ self.lm_head.weight.T).sum())


class Older(transformers.LlamaForCausalLM):
    """A model that computes its cross entropy itself."""

    def forward(self, *arguments, labels=None, **keywords):
        found = super().forward(*arguments, **keywords)
        found.loss = F.cross_entropy(found.logits.view(-1, self.config.vocab_size), labels.view(-1))
        return found


class Alone(transformers.LlamaForCausalLM):
    """A model that has a loss of its own."""

    def forward(self, *arguments, labels=None, **keywords):
        found = super().forward(*arguments, **keywords)
        found.loss = found.logits.sum()
        return found


@pytest.mark.parametrize(("kind", "sentence"), [
    (Renormalised, "must do to its logits what its configuration names, 8 of 8; Renormalised makes 4"),
    (Twice, "the head must be used once in a forward; Twice uses it again"),
    (Unused, "the head must be used once in a forward; Unused does not use it"),
    (Older, "must take its loss from loss_function; Older does not"),
    (Alone, "must take its loss from loss_function; Alone does not"),
])  # fmt: skip
def test_models_that_are_refused(kind, sentence):
    with pytest.raises(ValueError, match=sentence):
        patched(kind(tiny().config).train())(**batch())


def test_refusals():
    given = batch()
    for changed, sentence in (
        (dict(outputs=("logprob",), labels=None), "labels must be given with outputs"),
        (dict(temperature=0.5, labels=None), "temperature must be 1 without outputs"),
        (dict(logits_to_keep=2), r"labels must be \(3, 2\), one per position; got \(3, 11\)"),
        (dict(return_dict=False), "return_dict must be True where no logits are made"),
        (dict(outputs=("logits",)), "outputs"),
    ):
        with pytest.raises(ValueError, match=sentence):
            patched(tiny())(**given | changed)
    model = defined(tiny())
    with pytest.raises(ValueError, match="loss must be transformers' causal one; got 'exactly'"):
        patched(model)(**given)
    assert model.loss_function is exactly and "forward" not in vars(model.lm_head)
    model = patched(tiny())
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match=r"the head must be a linear layer.*got Sequential"):
        model(**given)
    model = tiny()
    model.lm_head.forward = model.lm_head.forward
    with pytest.raises(ValueError, match="the head must have its own forward"):
        patched(model)(**given)
    with pytest.raises(ValueError, match="must be a transformers model with a head; got LlamaModel"):
        ours.patch(tiny().model)
    model = tiny()
    model.forward = lambda **given: None
    with pytest.raises(ValueError, match="the model's forward must be a method; got function"):
        ours.patch(model)
