"""What stands in the place of OpenRLHF's functions, against OpenRLHF's own, and both against float64."""

import importlib
import importlib.metadata
import itertools
import subprocess
import sys

import pytest
import torch
import trl_runs
from hypothesis import given, settings
from hypothesis import strategies as st
from rivals import openrlhf
from tolerance import check, check_rows

actors, losses = openrlhf("openrlhf.models.actor"), openrlhf("openrlhf.models.loss")
makers = openrlhf("openrlhf.trainer.ppo_utils.experience_maker")
ours = importlib.import_module("fuserl.trainers.openrlhf")
B, T, V = 5, 9, 64


@pytest.fixture(autouse=True)
def eager():
    """OpenRLHF compiles its entropy; its numbers are meant here."""
    with torch.compiler.set_stance("force_eager"):
        yield


def theirs(path):
    return (ours._LOOPS if path in ours._LOOPS.replacements else ours._MODELS).original(path)


CORRECTIONS = [
    {"is_correction_level": level, "is_correction_mode": mode, "is_correction_gating": gating,
     "is_correction_threshold": (0.7, 1.5) if gating == "ratio" else (0.0, 0.02)}
    for level, mode, gating in itertools.product(("token", "seq"), ("mask", "clip"), ("ratio", "binary_kl", "tv"))
    if mode == "mask" or (level, gating) == ("token", "ratio")
]  # fmt: skip
OPTIONS = [
    {}, {"clip_eps_high": 0.28, "dual_clip": 1.5}, {"token_level_loss": False}, {"policy_loss_type": "gspo"},
    {"policy_loss_type": "gspo", "is_correction_level": "token", "dual_clip": 3.0}, *CORRECTIONS,
]  # fmt: skip


def batch(seed, rows=B, length=T):
    """Log-probs of three policies, advantages of both signs and zero, and a mask with an empty row and a full one."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(5, rows, length, generator=draw)
    rollout = -noise[0].abs() - 0.1
    old = rollout + 0.2 * noise[1]
    logprobs = old + noise[2] * torch.tensor([0.1, 1.0, 30.0])[torch.randint(3, (rows, 1), generator=draw)]
    advantages = noise[3] * (noise[4] > -1)
    lengths = torch.randint(length + 1, (rows,), generator=draw)
    lengths[:2] = torch.tensor([0, length])[:rows]
    mask = torch.arange(length) < lengths[:, None]
    return logprobs, old, advantages, mask.long(), rollout


def outcome(forward, loss, given, dtype, **sizes):
    """The five outputs, and the gradient of the first."""
    logprobs, old, advantages, mask, rollout = (x.to(dtype) if x.is_floating_point() else x for x in given)
    logprobs = logprobs.detach().clone().requires_grad_()
    found = forward(loss, logprobs, old, advantages, mask, rollout, **sizes)
    return found, torch.autograd.grad(found[0], logprobs)[0]


def same_policy_loss(options, given, **sizes):
    loss, original = losses.PolicyLoss(**options), theirs("openrlhf.models.loss:PolicyLoss.forward")
    true, d_true = outcome(original, loss, given, torch.float64, **sizes)
    plain, d_plain = outcome(original, loss, given, torch.float32, **sizes)
    got, d_got = outcome(ours.policy_loss_forward, loss, given, torch.float32, **sizes)
    for at, (a, b, c) in enumerate(zip(got, true, plain, strict=True)):
        assert (a is None) == (c is None), f"output {at}"
        if a is not None:
            check(f"output {at}", a.detach(), b.detach(), c.detach(), torch.float32)
    check("gradient", d_got, d_true, d_plain, torch.float32)


@pytest.mark.parametrize("sizes", [{}, {"dp_size": 2, "batch_num_tokens": 40.0, "global_batch_size": 12}])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(map(str, options.values())) or "plain")
def test_policy_loss(options, sizes):
    for seed in range(4):
        same_policy_loss(options, batch(seed), **sizes)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**30), st.sampled_from(OPTIONS), st.integers(2, 6), st.integers(1, 12))
def test_policy_loss_of_random_batches(seed, options, rows, length):
    same_policy_loss(options, batch(seed, rows, length))


def test_policy_loss_of_what_is_masked():
    """Masked tokens may hold anything; OpenRLHF's own is NaN there."""
    logprobs, old, advantages, mask, rollout = batch(0)
    results = []
    for each in (old, old.masked_fill(mask == 0, torch.nan)):
        given = logprobs, each, advantages, mask, rollout
        results.append(outcome(ours.policy_loss_forward, losses.PolicyLoss(), given, torch.float32))
    clean, dirty = results
    assert torch.equal(clean[0][0], dirty[0][0]) and torch.equal(clean[1], dirty[1])


def test_policy_loss_without_a_mask_and_with_one_advantage_per_row():
    logprobs, old, advantages, _, rollout = batch(1)
    given = logprobs, old, advantages[:, :1].expand(B, T).contiguous(), torch.ones(B, T).long(), rollout
    expected = outcome(ours.policy_loss_forward, losses.PolicyLoss(), given, torch.float32)
    found = ours.policy_loss_forward(losses.PolicyLoss(), logprobs, old, advantages[:, :1])
    assert torch.equal(found[0], expected[0][0])


def test_refused_policy_losses():
    logprobs, old, advantages, mask, _ = batch(1)
    with pytest.raises(ValueError, match="rollout_log_probs must be given"):
        ours.policy_loss_forward(losses.PolicyLoss(is_correction_level="seq"), logprobs, old, advantages, mask)
    with pytest.raises(ValueError, match="policy_loss_type must be ppo or gspo; got 'a2c'"):
        ours.policy_loss_forward(losses.PolicyLoss(policy_loss_type="a2c"), logprobs, old, advantages, mask)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("gamma", "lambd"), [(1.0, 1.0), (0.97, 0.9), (0.0, 0.5)])
def test_advantages_and_returns(masked, gamma, lambd):
    _, _, rewards, mask, values = batch(3)
    mask = mask if masked else None
    maker, sums = (theirs(path) for path in ours._LOOPS.replacements)
    plain = *maker(None, values, rewards, mask, gamma, lambd), sums(None, rewards, mask, gamma)
    later, counted = [torch.zeros(B)], rewards.double() * (1 if mask is None else mask)
    for reward in counted.flip(1).unbind(1):  # OpenRLHF's own adds up in float32
        later.insert(0, reward + gamma * later[0])
    truth = *maker(None, values.double(), rewards.double(), mask, gamma, lambd), torch.stack(later[:-1], 1)
    got = (
        *ours.get_advantages_and_returns(None, values, rewards, mask, gamma, lambd),
        ours.get_cumulative_returns(None, rewards, mask, gamma),
    )
    for name, a, b, c in zip(("advantages", "returns", "sums"), got, truth, plain, strict=True):
        assert a.dtype == c.dtype
        check(name, a, b, c, torch.float32)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_from_logits(temperature):
    logits, labels, g = 4 * torch.randn(B, T, V), torch.randint(V, (B, T)), torch.randn(2, B, T)

    def both(one, other, x):
        x = x.detach().clone().requires_grad_()
        found = one(x * 1, labels, temperature), other(x)
        return found, torch.autograd.grad(sum((a * b).sum() for a, b in zip(found, g, strict=True)), x)[0]

    original = (theirs(f"openrlhf.models.utils:{name}") for name in ("log_probs_from_logits", "compute_entropy"))
    original = tuple(original)
    (true, d_true), (plain, d_plain) = (both(*original, logits.to(dtype)) for dtype in (torch.float64, torch.float32))
    got, d_got = both(ours.log_probs_from_logits, ours.entropy_from_logits, logits)
    for name, a, b, c in zip(("log-probs", "entropies"), got, true, plain, strict=True):
        check(name, a.detach(), b.detach(), c.detach(), torch.float32)
    check_rows("gradient", d_got, d_true, d_plain, torch.float32, ids=labels)


def actor(dtype, temperature=0.8):
    """OpenRLHF's Actor around a tiny Llama."""
    made = actors.Actor(trl_runs.model(dtype), temperature=temperature)
    made.packing_samples = False  # as it sets it where it loads the model itself
    return made


def tokens():
    """Left-padded prompts of 4 and completions of 3, as OpenRLHF lays them out."""
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(3, V, (3, 7), generator=draw)
    attention = torch.ones_like(ids)
    attention[0, :2] = 0
    attention[1, 6] = 0
    action = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 1, 1]])
    return ids, attention, action


def defined(made, ids, attention):
    """Log-probs and entropies (B, L - 1) by the definition, in the dtype of the model."""
    position = (attention.cumsum(-1) - 1).masked_fill(attention == 0, 1)
    logits = made.model(ids, attention_mask=attention, position_ids=position).logits / made.temperature
    logp = logits.log_softmax(-1)[:, :-1]
    return logp.gather(-1, ids[:, 1:, None])[..., 0], -(logp.exp() * logp).sum(-1)


def gradients(made, loss):
    loss.backward()
    return {name: parameter.grad for name, parameter in made.named_parameters()}


def test_actor():
    """Log-probs and entropies of the actions, and their gradients."""
    ids, attention, action = tokens()
    weights = torch.randn(2, *action.shape) * action
    results = []
    for dtype, how in ((torch.float64, None), (torch.float32, None), (torch.float32, ours.patch)):
        made = actor(dtype)
        if how is None:
            logprobs, entropies = (x[:, -3:] for x in defined(made, ids, attention))
            logprobs = logprobs * action
        else:
            with how():
                logprobs, output = made(ids, action, attention, return_output=True, return_entropy=True)
            assert "logits" not in output and output.entropy.shape == (3, 6)
            entropies = output.entropy[:, -3:]
        found = logprobs, entropies * action
        loss = sum((x * w).sum() for x, w in zip(found, weights, strict=True))
        results.append((found, gradients(made, loss)))
    (true, d_true), (plain, d_plain), (got, d_got) = results
    for name, a, b, c in zip(("log-probs", "entropies"), got, true, plain, strict=True):
        check(name, a.detach(), b.detach(), c.detach(), torch.float32)
    for name in d_true:
        check_rows(name, *(x[name].reshape(len(x[name]), -1) for x in (d_got, d_true, d_plain)), torch.float32)


def test_actor_with_a_compiled_backbone():
    ids, attention, action = tokens()
    graphs, results = [], []
    for compiled in (False, True):
        made = actor(torch.float64)
        if compiled:
            made.model.model.compile(backend=lambda graph, given: graphs.append(graph) or graph)
        with ours.patch(), torch.compiler.set_stance("default"):
            logprobs = made(ids, action, attention)
        results.append((logprobs.detach(), gradients(made, logprobs.sum())))
    assert graphs
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_actor_as_other_callers_use_it():
    """The reference model's and the preference trainers' call, and those that are left to OpenRLHF."""
    ids, attention, action = tokens()
    made = actor(torch.float32)
    calls = (
        dict(action_mask=action), dict(return_logprobs=True), dict(return_output=True),
        dict(action_mask=action, return_output=True), dict(return_output=True, return_entropy=True),
    )  # fmt: skip
    with torch.no_grad():
        for call in calls:
            expected = made(ids, attention_mask=attention, **call)
            with ours.patch():
                got = made(ids, attention_mask=attention, **call)
            if "return_logprobs" in call:
                seen = attention[:, 1:]
                torch.testing.assert_close(got * seen, expected * seen, rtol=1e-5, atol=1e-5)
                assert not (got * (1 - seen)).any()
            elif "action_mask" in call:
                got, expected = (x[0] if isinstance(x, tuple) else x for x in (got, expected))
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
            else:
                torch.testing.assert_close(got.logits, expected.logits)
                if "return_entropy" in call:
                    torch.testing.assert_close(got.entropy, expected.entropy, rtol=1e-5, atol=1e-5)


@pytest.fixture
def unpadded(monkeypatch):
    """flash_attn's functions that OpenRLHF packs with, in torch."""
    packing = sys.modules["openrlhf.models.ring_attn_utils"]

    def take(x, indices):
        return x[indices]

    def unpad(x, mask):
        indices = mask.flatten().nonzero().flatten()
        return x.flatten(0, 1)[indices], indices, None, None, None

    def pad(x, indices, batch, length):
        return x.new_zeros(batch * length, *x.shape[1:]).index_copy(0, indices, x).view(batch, length, *x.shape[1:])

    functions = {"index_first_axis": take, "unpad_input": unpad, "pad_input": pad}
    for name, function in functions.items():
        monkeypatch.setattr(packing, name, function)
    monkeypatch.setattr(packing, "rearrange", lambda x, _: x.flatten(0, 1))


@pytest.mark.parametrize("call", ["actions", "every token"])
def test_actor_of_packed_samples(unpadded, monkeypatch, call):
    """Ragged samples in one row, by OpenRLHF's own packing; the head sees the actions alone."""
    seen, op = [], ours.linear_logprob
    monkeypatch.setattr(ours, "linear_logprob", lambda *given, **more: seen.append(more["mask"]) or op(*given, **more))
    ids, attention, action = tokens()
    more = dict(action_mask=action) if call == "actions" else dict(return_logprobs=True)
    made = actor(torch.float32)
    made.packing_samples = True
    counted = action if call == "actions" else attention[:, 1:]
    with torch.no_grad():
        expected = made(ids, attention_mask=attention, **more)
        with ours.patch():
            got = made(ids, attention_mask=attention, **more)
    live = counted * attention[:, -counted.shape[1] :]
    torch.testing.assert_close(got * live, expected * live, rtol=1e-5, atol=1e-5)
    assert [mask.sum().item() for mask in seen] == [(counted * attention[:, -1 - counted.shape[1] : -1]).sum().item()]


def test_the_head_never_sees_the_prompt(monkeypatch):
    seen, op = [], ours.linear_logprob
    monkeypatch.setattr(ours, "linear_logprob", lambda *given, **more: seen.append(more["mask"]) or op(*given, **more))
    ids, attention, action = tokens()
    with ours.patch():
        actor(torch.float32)(ids, action, attention)
    assert [mask.sum().item() for mask in seen] == [action.sum().item()]


def test_every_place_is_replaced_and_restored():
    before = {path: theirs(path) for path in ours._MODELS.replacements | ours._LOOPS.replacements}
    with ours.patch():
        found = ours.report().replaced
        assert (
            actors.log_probs_from_logits is ours.log_probs_from_logits
            and actors.compute_entropy is ours.entropy_from_logits
        )
        assert losses.PolicyLoss.forward is ours.policy_loss_forward
        assert makers.RemoteExperienceMaker.get_cumulative_returns is ours.get_cumulative_returns
        assert len(found) == 6 and all(found.values())
        ours.patch()
    assert {path: theirs(path) for path in before} == before and ours.report().replaced == {}


WORKER = """
import sys
sys.path[:0] = sys.argv[1:]
import fuserl.trainers.openrlhf as ours
ours.patch_worker()
assert not [name for name in sys.modules if name.startswith(("openrlhf", "deepspeed", "vllm"))]
from rivals import openrlhf
actors = openrlhf("openrlhf.models.actor")
assert actors.Actor.forward is ours.actor_forward and actors.compute_entropy is ours.entropy_from_logits
assert len(ours.report().replaced) == 4 and len([what for what in ours.report().left if "Maker" in what]) == 2
makers = openrlhf(ours._MAKER)
assert makers.RemoteExperienceMaker.get_cumulative_returns is ours.get_cumulative_returns
assert len(ours.report().replaced) == 6 and not [what for what in ours.report().left if "Maker" in what]
ours.unpatch()
assert actors.Actor.forward is not ours.actor_forward
"""


def test_a_worker_is_patched_as_it_loads():
    """Nothing is loaded by the hook itself."""
    subprocess.run([sys.executable, "-c", WORKER, *sys.path], check=True, timeout=120)


def test_a_worker_that_has_loaded_already():
    try:
        ours.patch_worker()
        assert len(ours.report().replaced) == 6
    finally:
        ours.unpatch()
    assert actors.Actor.forward is not ours.actor_forward


def test_without_openrlhf_the_import_gives_the_line_for_pip(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.delitem(sys.modules, "fuserl.trainers.openrlhf")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'openrlhf>=0\.11\.2,<0\.12'"):
        importlib.import_module("fuserl.trainers.openrlhf")
