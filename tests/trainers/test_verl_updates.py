"""verl's whole ppo_loss on a model's packed log-probs, with its heads, advantages and losses and with ours.

A batch goes verl's way: advantages of rewards, left and right padding taken out, the model's forward with a fused head,
and the loss of the actor with its entropy bonus, KL term and rollout weights.
"""

import importlib
from unittest import mock

import numpy
import pytest
import sequence_ranks  # noqa: F401 - an attention of packed rows by its name
import torch
import trl_runs
from rivals import VerlConfig, rival, verl_losses, verl_updates
from tolerance import check_rows

core = verl_losses()
updates, padding = verl_updates()
common = rival("verl", "verl.models.transformers.dense_common")
tensordict = pytest.importorskip("tensordict", reason="pip install tensordict")
ours = importlib.import_module("fuserl.trainers.verl")
ours.unpatch()  # importing it has patched
B, PROMPT, REPLY, RANKS, EPS = 6, 5, 7, 2, 2**-23
CASES = {
    "vanilla": ("fuserl_grpo", "grpo", "grpo", "token-mean"),
    "gspo": ("fuserl_gspo", "grpo", "fuserl_grpo", "seq-mean-token-mean"),
    "cispo": ("fuserl_cispo", "rloo", "fuserl_rloo", "token-mean"),
    "sapo": ("fuserl_sapo", "grpo", "fuserl_grpo", "seq-mean-token-mean"),
    "gpg": ("fuserl_gpg", "opo", "fuserl_opo", "seq-mean-token-sum-norm"),
    "dro": ("fuserl_dro", "rloo", "fuserl_rloo", "seq-mean-token-sum"),
    "geo_mean": ("fuserl_gmpo", "grpo", "grpo", "seq-mean-token-mean"),
}


def config(mode, aggregation):
    """verl's ActorConfig, as far as its loss asks."""
    return VerlConfig(
        clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=3.0, tau_pos=1.0, tau_neg=1.05,
        policy_loss=VerlConfig(loss_mode=mode, dro_beta=0.3), loss_agg_mode=aggregation, loss_scale_factor=None,
        entropy_coeff=0.01, use_kl_loss=True, kl_loss_type="low_var_kl", kl_loss_coef=0.05, global_batch_info={},
    )  # fmt: skip


def rollouts():
    """Prompts padded on the left, replies on the right, a tool's token among them; three of each prompt."""
    draw = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 64, (B, PROMPT + REPLY), generator=draw)
    first, last = torch.tensor([0, 0, 0, 2, 2, 2]), torch.tensor([7, 3, 5, 1, 6, 2])
    places = torch.arange(PROMPT + REPLY)
    attention = ((places >= first[:, None]) & (places < PROMPT + last[:, None])).long()
    mask = attention[:, PROMPT:].clone()
    mask[0, 2] = 0
    rewards = torch.randn(B, generator=draw)[:, None] * (torch.arange(REPLY) == last[:, None] - 1)
    noise = 0.3 * torch.randn(3, B, REPLY, generator=draw)
    return ids * attention, attention, mask, rewards, noise


def log_probs(model, ids, attention):
    """(B, REPLY) of the replies by the definition."""
    position = (attention.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(ids, attention_mask=attention, position_ids=position).logits[:, PROMPT - 1 : -1]
    return (logits / 0.8).log_softmax(-1).gather(-1, ids[:, PROMPT:, None])[..., 0]


def batch(estimator, dtype):
    """What verl's trainer hands to an actor, laid out by verl."""
    ids, attention, mask, rewards, noise = rollouts()
    groups = numpy.array(["a", "a", "a", "b", "b", "b"])
    advantages, _ = core.get_adv_estimator_fn(estimator)(rewards.to(dtype), mask, index=groups)
    old = log_probs(trl_runs.model(torch.float64), ids, attention).to(dtype)
    data = tensordict.TensorDict({
        "input_ids": ids, "attention_mask": attention, "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
        "prompts": ids[:, :PROMPT], "responses": ids[:, PROMPT:], "response_mask": mask, "advantages": advantages,
        "old_log_probs": old + noise[0].to(dtype), "ref_log_prob": old + noise[1].to(dtype),
        "rollout_is_weights": noise[2].exp().to(dtype),
    }, batch_size=[B])  # fmt: skip
    sizes = {"dp_size": RANKS, "batch_num_tokens": RANKS * int(mask.sum()), "global_batch_size": RANKS * B}
    for name, size in sizes.items():
        data[name] = tensordict.NonTensorData(size)
    return padding.left_right_2_no_padding(data)


def update(mode, estimator, aggregation, dtype=torch.float32, backend="torch"):
    """(loss, gradients, metrics, sizes of the loss's terms) of one micro-batch."""
    data, model = batch(estimator, dtype), trl_runs.model(dtype)
    model.set_attn_implementation("alone")
    ids, positions = (data[name].values()[None] for name in ("input_ids", "position_ids"))
    forward = getattr(common, f"forward_with_{backend}_backend")
    found = forward(model, ids, None, positions, temperature=0.8, return_dict=True, use_cache=False)
    texts, names = data["input_ids"].offsets(), ("log_probs", "entropy")
    output = {name: torch.nested.nested_tensor_from_jagged(found[name].view(-1), texts) for name in names}
    sizes, aggregate = [data["advantages"].abs().sum()], core.agg_loss

    def recorded(**given):
        sizes.append(aggregate(**given | {"loss_mat": given["loss_mat"].detach().abs()}))
        return aggregate(**given)

    with mock.patch.object(core, "agg_loss", recorded), mock.patch.object(updates, "agg_loss", recorded):
        loss, metrics = updates.ppo_loss(config(mode, aggregation), output, data)
    loss.backward()
    return (
        loss.detach().double(), {name: parameter.grad for name, parameter in model.named_parameters()},
        {name: float(getattr(value, "aggregate", lambda value=value: value)()) for name, value in metrics.items()},
        sum(sizes),
    )  # fmt: skip


@pytest.mark.parametrize("theirs", CASES)
def test_ppo_loss(theirs):
    """Ours at most twice as far from float64 as verl's own."""
    mode, estimator, our_estimator, aggregation = CASES[theirs]
    true = update(theirs, estimator, aggregation, torch.float64)
    plain = update(theirs, estimator, aggregation)
    with ours.patch():
        got = update(mode, our_estimator, aggregation, backend="triton")
    assert (got[0] - true[0]).abs() <= 2 * (plain[0] - true[0]).abs() + 4 * EPS * true[3]
    assert got[1].keys() == true[1].keys() and got[2].keys() == plain[2].keys()
    for name, gradient in true[1].items():
        check_rows(name, *(x.reshape(len(x), -1) for x in (got[1][name], gradient, plain[1][name])), torch.float32)
    for name, value in got[2].items():
        assert value == pytest.approx(true[2][name], rel=1e-4, abs=1e-6), name
