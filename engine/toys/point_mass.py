"""Off-policy mirror descent on a point that is pushed towards a goal: a replay, two critics, a value, an old policy.

    x' = x + a / 2 + noise, in two dimensions        reward = -|x'|^2        the episode is cut after some steps

What its limits are is exact; what it learns is a small experiment.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fuserl.engine.checks import Figure, at_least, at_most
from fuserl.engine.mirror import replayed, small, tsallis
from fuserl.kernels.gae import gae
from fuserl.kernels.gaussian_logprob import gaussian_logprob

DIMENSIONS, STEPS, POINTS = 2, 20, 16


@dataclass(frozen=True)
class Settings:
    """What the off-policy form is run with."""

    kappa: float = 1.0
    lam: float = 0.2
    q: float = 1.0
    renewed: int = 100  # steps of the environment between renewals of the old policy
    batch: int = 256
    tau: float = 0.02
    gamma: float = 0.95
    lr: float = 3e-3


class Replay:
    """The newest `size` transitions, each a row of numbers, drawn with replacement."""

    def __init__(self, size: int, width: int):
        self.rows, self.count = torch.zeros(size, width), 0

    def add(self, rows: Tensor) -> None:
        """Keep (n, width), in the place of the oldest."""
        at = (self.count + torch.arange(len(rows))) % len(self.rows)
        self.rows[at] = rows
        self.count += len(rows)

    def draw(self, count: int, random: torch.Generator) -> Tensor:
        """(count, width)."""
        known = min(self.count, len(self.rows))
        return self.rows[torch.randint(known, (count,), generator=random)]


def network(inputs: int, outputs: int) -> nn.Module:
    """Two layers of 32."""
    return nn.Sequential(nn.Linear(inputs, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, outputs))


class Learner:
    """Policy, its old copy, two critics, a value and its slow copy; `step` plays and updates once."""

    def __init__(self, settings: Settings, seed: int = 0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.policy, self.value = network(DIMENSIONS, 2 * DIMENSIONS), network(DIMENSIONS, 1)
            self.critics = nn.ModuleList(network(2 * DIMENSIONS, 1) for _ in range(2))
        self.settings, self.random = settings, torch.Generator().manual_seed(seed)
        self.old, self.slow = copy.deepcopy(self.policy), copy.deepcopy(self.value)
        self.optimizers = [
            torch.optim.Adam(m.parameters(), settings.lr) for m in (self.policy, self.value, self.critics)
        ]
        self.replay, self.points, self.taken = Replay(20000, 3 * DIMENSIONS + 1), self._begun(), 0

    def _begun(self) -> Tensor:
        return 4 * torch.rand(POINTS, DIMENSIONS, generator=self.random) - 2

    def _noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.random)

    def acted(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reparameterised actions of the policy, and its mean and log_std."""
        mean, log_std = self.policy(states).chunk(2, -1)
        log_std = log_std.clamp(-5, 1)
        return mean + log_std.exp() * self._noise(mean), mean, log_std

    def logprob(self, policy: nn.Module, states: Tensor, actions: Tensor) -> Tensor:
        """log pi(a|s), (n,)."""
        mean, log_std = policy(states).chunk(2, -1)
        return gaussian_logprob(actions, mean, log_std.clamp(-5, 1)).logprob

    def step(self) -> float:
        """Move every point once and update everything once; returns the mean reward of what was replayed."""
        settings = self.settings
        with torch.no_grad():
            actions = self.acted(self.points)[0]
            after = self.points + actions.clamp(-1, 1) / 2 + 0.05 * self._noise(actions)
            rewards = -after.square().sum(-1, keepdim=True)
        self.replay.add(torch.cat([self.points, actions, rewards, after], -1))
        self.taken += 1
        self.points = self._begun() if self.taken % STEPS == 0 else after
        rows = self.replay.draw(settings.batch, self.random)
        states, actions, rewards, after = rows.split((DIMENSIONS, DIMENSIONS, 1, DIMENSIONS), -1)
        fresh, mean, log_std = self.acted(states)
        logprob = gaussian_logprob(fresh, mean, log_std).logprob
        both = torch.stack([each(torch.cat([states, fresh], -1)).squeeze(-1) for each in self.critics])
        held = self.logprob(self.old, states, fresh)
        actor = replayed(logprob, held, both.amin(0), kappa=settings.kappa, lam=settings.lam, q=settings.q)
        with torch.no_grad():
            wanted = rewards + settings.gamma * self.slow(after)
            aim = both.amin(0) - settings.lam * tsallis(logprob, settings.q)
        value = (self.value(states).squeeze(-1) - aim).square().mean()
        critic = sum((each(torch.cat([states, actions], -1)) - wanted).square().mean() for each in self.critics)
        losses = (actor + small(mean, log_std)).mean(), value, critic
        gradients = [torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
                     for loss, module in zip(losses, (self.policy, self.value, self.critics), strict=True)]  # fmt: skip
        for optimizer, each in zip(self.optimizers, gradients, strict=True):
            for parameter, gradient in zip(optimizer.param_groups[0]["params"], each, strict=True):
                parameter.grad = gradient
            optimizer.step()
        with torch.no_grad():
            for ours, theirs in zip(self.slow.parameters(), self.value.parameters(), strict=True):
                ours.lerp_(theirs, settings.tau)
        if self.taken % settings.renewed == 0:
            self.old.load_state_dict(self.policy.state_dict())
        return float(rewards.mean())


def played(policy: nn.Module, points: int = 256) -> float:
    """The mean reward of a policy's means over an episode."""
    states, total = 4 * torch.rand(points, DIMENSIONS, generator=torch.Generator().manual_seed(9)) - 2, 0.0
    with torch.no_grad():
        for _ in range(STEPS):
            states = states + policy(states)[:, :DIMENSIONS].clamp(-1, 1) / 2
            total -= float(states.square().sum(-1).mean()) / STEPS
    return total


def learnt(settings: Settings, steps: int = 300, seed: int = 0) -> tuple[float, float]:
    """Mean rewards before and after steps of learning."""
    learner = Learner(settings, seed)
    before = played(learner.policy)
    for _ in range(steps):
        learner.step()
    return before, played(learner.policy)


def limits() -> list[Figure]:
    """SAC's loss where lam = kappa, with its gradient; the Gaussian divergence and the advantage scan against loops."""
    random = torch.Generator().manual_seed(0)
    states, noise = (torch.randn(64, DIMENSIONS, generator=random, dtype=torch.float64) for _ in range(2))
    learner = Learner(Settings())
    policy, old, critic = (copy.deepcopy(m).double() for m in (learner.policy, learner.policy, learner.critics[0]))
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.mul_(0.9)
    found = []
    for ours in (True, False):
        mean, log_std = policy(states).chunk(2, -1)
        actions = mean + log_std.exp() * noise
        q, logprob = critic(torch.cat([states, actions], -1)).squeeze(-1), learner.logprob(policy, states, actions)
        held = learner.logprob(old, states, actions)
        loss = (replayed(logprob, held, q, kappa=0.3, lam=0.3) if ours else 0.3 * logprob - q).mean()
        gradients = torch.autograd.grad(loss, list(policy.parameters()))
        found.append(torch.cat([loss[None].detach(), *(each.flatten() for each in gradients)]))
    (mean, log_std), (ref, ref_log) = (torch.randn(2, 5, 3, generator=random, dtype=torch.float64) for _ in range(2))
    kl = gaussian_logprob(mean, mean, log_std, ref_mean=ref, ref_log_std=ref_log).kl
    loop = [
        sum(
            float(b - a) + (math.exp(2 * a) + float(m - r) ** 2) / (2 * math.exp(2 * b)) - 0.5
            for m, a, r, b in zip(*rows, strict=True)
        )
        for rows in zip(mean, log_std, ref, ref_log, strict=True)
    ]
    rewards, values = torch.randn(2, 9, generator=random, dtype=torch.float64)
    scan, after, advantage = gae(rewards, values, gamma=0.99, lam=0.95)[0], 0.0, 0.0
    wanted = torch.zeros(9, dtype=torch.float64)
    for t in range(8, -1, -1):
        advantage = float(rewards[t]) + 0.99 * after - float(values[t]) + 0.99 * 0.95 * advantage
        after, wanted[t] = float(values[t]), advantage
    return [
        at_most("loss and gradient with lam = kappa apart from SAC's", float((found[0] - found[1]).abs().max()), 0.0),
        at_most("Gaussian KL apart from a loop's", float((kl - kl.new_tensor(loop)).abs().max()), 1e-6),
        at_most("advantage scan apart from a loop's", float((scan - wanted).abs().max()), 1e-6),
    ]


def figures(*several: Settings, steps: int = 300, seed: int = 0) -> list[Figure]:
    """What the off-policy form learns, with each of some settings."""
    found = []
    for settings in several or (Settings(),):
        before, after = learnt(settings, steps, seed)
        name = f"lam {settings.lam}, q {settings.q}"
        found.append(at_least(f"point's mean reward, {name}, from {before:.3f}", after, before / 3))
    return found
