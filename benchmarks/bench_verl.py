"""verl's functions by the drop-in and by verl: advantages, head, log-probs and losses, as its driver and workers call.

The floor is what any way must do: a copy of the rewards, the head's matrix products, a read of the logits.
"""

import importlib
import uuid

import numpy as np
import pytest
import torch
from measure import Provider, compare, near, relative_error
from rivals import VerlConfig, rival, verl_losses


@pytest.fixture
def core():
    """verl's algorithms, and nothing patched."""
    found = verl_losses()
    importlib.import_module("fuserl.trainers.verl").unpatch()
    return found


def samples(device, groups, size, length, whole=False):
    """Rewards by token, values, a mask of padded rows and the uids of shuffled groups."""
    count = groups * size
    lengths = torch.randint(length // 2, length + 1, (count, 1), device=device)
    places = torch.arange(length, device=device)
    mask = (places < (length if whole else lengths)).float().expand(count, length).contiguous()
    rewards = torch.where(places == lengths - 1, torch.randn(count, 1, device=device), 0.0)
    uids = np.array([str(uuid.UUID(int=n)) for n in range(groups)], dtype=object).repeat(size)
    return rewards, torch.randn(count, length, device=device), mask, uids[np.random.default_rng(0).permutation(count)]


@pytest.mark.parametrize(("rows", "length"), [(64, 4096), (8, 8192)])
def test_verl_gae(benchmark, device, smoke, core, rows, length):
    ours = importlib.import_module("fuserl.trainers.verl_advantages").gae_advantage
    rewards, values, mask, _ = samples(device, 1, rows, 64 if smoke else length)
    given, masked = (mask, 0.99, 0.95), (lambda found: [torch.where(mask.bool(), x, 0.0) for x in found])
    truth = masked(core.compute_gae_advantage_return(rewards.double(), values.double(), mask.double(), 0.99, 0.95))
    target = torch.empty_like(torch.cat([rewards, values]))
    compare(
        benchmark,
        Provider("copy the same bytes", lambda: target.copy_(torch.cat([rewards, values]))),
        Provider("fuserl", lambda: ours(rewards, values, *given), near(truth)),
        Provider("verl", lambda: masked(core.compute_gae_advantage_return(rewards, values, *given)), near(truth)),
        rounds=3,
        smoke=smoke,
    )


@pytest.mark.parametrize("name", ["grpo", "rloo"])
@pytest.mark.parametrize("length", [1, 1024])
def test_verl_advantages(benchmark, device, smoke, core, name, length):
    """64 groups of 16."""
    ours = importlib.import_module("fuserl.trainers.verl_advantages").ESTIMATORS[f"fuserl_{name}"]
    theirs, (rewards, _, mask, uids) = core.get_adv_estimator_fn(name), samples(device, 4 if smoke else 64, 16, length)
    truth = theirs(rewards.double(), mask.double(), index=uids)
    target = torch.empty_like(rewards)
    compare(
        benchmark,
        Provider("copy the same bytes", lambda: target.copy_(rewards)),
        Provider("fuserl", lambda: ours(rewards, mask, index=uids), near(truth)),
        Provider("verl", lambda: theirs(rewards, mask, index=uids), near(truth)),
        rounds=5,
        smoke=smoke,
    )


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_verl_head(benchmark, device, smoke, core, frozen):
    """FusedLinearForPPO forward and backward of log-probs and entropy, the head a small model's or, on a GPU, large."""
    import head_shape

    ours = importlib.import_module("fuserl.trainers.verl").FusedLinearForPPO()
    theirs = rival("verl", "verl.utils.experimental.torch_functional").FusedLinearForPPO()
    hidden, weight = head_shape.operands(device, smoke)
    hidden, weight = hidden[:1024].requires_grad_(), weight.requires_grad_(not frozen)
    ids, g = torch.randint(len(weight), (len(hidden),), device=device), torch.randn(2, len(hidden), device=device)

    def through(head, *leaves):
        logprob, entropy = head(*leaves, ids)
        loss = (logprob * g[0]).sum() + (0.1 * entropy * g[1]).sum()
        return logprob.detach(), *torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad])

    def plain(hidden, weight, ids):
        logp = (hidden @ weight.T).log_softmax(-1)
        return logp.gather(1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    def products():
        logits = hidden.detach() @ weight.detach().T
        return (logits @ weight.detach(),) if frozen else (logits @ weight.detach(), logits.T @ hidden.detach())

    def right(found):
        coarse = hidden.dtype == torch.bfloat16
        torch.testing.assert_close(found[0].double(), truth[0], rtol=0, atol=0.2 if coarse else 1e-4)
        gradients = zip(found[1:], truth[1:], strict=True)
        return max(relative_error(found[0], truth[0]), *(head_shape.check_gradient(*each) for each in gradients))

    wide = [hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_(not frozen)]
    truth = through(plain, *wide)
    compare(
        benchmark,
        Provider("the products alone", products),
        Provider("fuserl", lambda: through(ours, hidden, weight), right),
        Provider("verl", lambda: through(theirs, hidden, weight), right),
        rounds=3,
        smoke=smoke,
    )


def test_verl_logprobs(benchmark, device, smoke, core):
    """logprobs_from_logits of packed tokens, forward."""
    ours = importlib.import_module("fuserl.trainers.verl").logprobs_from_logits
    theirs = rival("verl", "verl.utils.torch_functional").logprobs_from_logits
    logits = 4 * torch.randn(256, 500 if smoke else 32000, device=device)
    ids = torch.randint(logits.shape[1], (256,), device=device)
    truth = (logits.double().log_softmax(-1).gather(1, ids[:, None])[:, 0],)
    compare(
        benchmark,
        Provider("read the logits", logits.sum),
        Provider("fuserl", lambda: (ours(logits, ids),), near(truth)),
        Provider("verl", lambda: (theirs(logits, ids),), near(truth)),
        rounds=5,
        smoke=smoke,
    )


THEIRS = {"fuserl_grpo": "vanilla", "fuserl_gspo": "gspo", "fuserl_cispo": "cispo", "fuserl_sapo": "sapo"}


@pytest.mark.parametrize("name", THEIRS)
def test_verl_policy_loss(benchmark, device, smoke, core, name):
    """A policy loss of 64 x 4096 tokens with its gradient and metrics."""
    ours = importlib.import_module("fuserl.trainers.verl_losses").LOSSES[name]
    theirs = core.get_policy_loss_fn(THEIRS[name])
    _, values, mask, _ = samples(device, 1, 64, 64 if smoke else 4096)
    old, advantages, mask = -values.abs(), torch.randn(64, 1, device=device).expand_as(values), mask.bool()
    settings = VerlConfig(
        clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=0.28, tau_pos=1.0, tau_neg=1.05, clip_ratio_c=3.0,
        global_batch_info={},
    )  # fmt: skip
    policy = old + 0.2 * torch.randn_like(old)

    def through(function, dtype=torch.float32):
        new = policy.to(dtype).requires_grad_()
        given = [x.to(dtype) for x in (old, new, advantages)]
        loss, _ = function(*given, mask, loss_agg_mode="seq-mean-token-mean", config=settings)
        return loss.detach(), *torch.autograd.grad(loss, new)

    truth, target = through(theirs, torch.float64), torch.empty(4, *old.shape, device=device)
    compare(
        benchmark,
        Provider("copy the same bytes", lambda: target.copy_(old.expand_as(target))),
        Provider("fuserl", lambda: through(ours), near(truth, atol=1e-5, results=1)),
        Provider("verl", lambda: through(theirs), near(truth, atol=1e-5, results=1)),
        smoke=smoke,
    )
