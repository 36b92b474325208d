"""CPU operations (csrc/ops.h is the reference for shapes and meaning)."""

from torch import Tensor

compiler: str
intel: bool

def softmax_rows_forward(
    logits: Tensor,
    ids: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    statistics: Tensor,
    threads: int,
) -> None: ...
def softmax_rows_gradient(
    logits: Tensor,
    ids: Tensor,
    lse: Tensor,
    coefficients: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    out: Tensor,
    threads: int,
    through_tanh: bool,
) -> None: ...
def group_advantage(
    rewards: Tensor,
    group: Tensor | None,
    rounds: Tensor | None,
    weights: Tensor | None,
    baselines: Tensor | None,
    scales: Tensor | None,
    channel_weights: Tensor | None,
    out: Tensor,
    members: int,
    baseline: int,
    scale: int,
    keep: int,
    given_baseline: float,
    given_scale: float,
    ddof: int,
    eps: float,
) -> None: ...
def group_ranks(rewards: Tensor, group: Tensor, best: bool, out: Tensor) -> None: ...
def pass_at_k_advantage(
    rewards: Tensor, group: Tensor, out: Tensor, k: int, baseline: int, scale: int, eps: float
) -> None: ...
def policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    log_weights: Tensor | None,
    entropy: Tensor | None,
    weights: Tensor | None,
    mask: Tensor | None,
    surrogate: int,
    factors: tuple[float, float, float, float],
    log_ratios: tuple[float, float, float, float],
    correction: tuple[float, float, float, float],
    beta: float,
    kl: int,
    score: bool,
    kl_weighted: bool,
    entropy_coef: float,
    losses: Tensor,
    derivative: Tensor | None,
    statistics: Tensor,
    threads: int,
) -> None: ...
def preference_loss(
    logprobs: Tensor,
    others: tuple[Tensor | None, ...],
    link: int,
    mean: bool,
    numbers: tuple[float, ...],
    losses: Tensor,
    rewards: Tensor,
    derivative: Tensor,
    statistics: Tensor,
    threads: int,
) -> None: ...
def preference_gradient(
    g: Tensor,
    derivative: Tensor,
    spread: tuple[Tensor | None, ...],
    paired: bool,
    out: Tensor,
    threads: int,
) -> None: ...
def gaussian_logprob_forward(
    actions: Tensor,
    mean: Tensor,
    scale: Tensor,
    others: tuple[Tensor | None, ...],
    logs: bool,
    out: tuple[Tensor | None, ...],
    threads: int,
) -> None: ...
def gaussian_logprob_backward(
    actions: Tensor,
    mean: Tensor,
    scale: Tensor,
    others: tuple[Tensor | None, ...],
    logs: bool,
    g: tuple[Tensor | None, ...],
    out: tuple[Tensor | None, ...],
    threads: int,
) -> None: ...
def sample(
    logits: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    log_min_p: float,
    seed: int,
    rollout_ids: Tensor,
    positions: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    threads: int,
) -> None: ...
def divergence_forward(
    logits_p: Tensor,
    logits_q: Tensor,
    temperatures: Tensor,
    kind: int,
    parameter: float,
    scale: float,
    statistics: Tensor,
    threads: int,
) -> None: ...
def divergence_gradient(
    logits_p: Tensor,
    logits_q: Tensor,
    temperatures: Tensor,
    kind: int,
    parameter: float,
    scale: float,
    statistics: Tensor,
    g: Tensor,
    out_p: Tensor | None,
    out_q: Tensor | None,
    threads: int,
) -> None: ...
def sampled_divergence(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    estimator: int,
    score: bool,
    kind: int,
    parameter: float,
    scale: float,
    clamp: float,
    values: Tensor,
    derivative: Tensor | None,
    threads: int,
) -> None: ...
def discounted_scan(
    b: Tensor, a: Tensor | None, factor: float, offsets: Tensor | None, forward: bool, x: Tensor, threads: int
) -> None: ...
def gae(
    rewards: Tensor,
    values: Tensor,
    gamma: Tensor | None,
    lam: Tensor | None,
    bootstrap: Tensor | None,
    mask: Tensor | None,
    offsets: Tensor | None,
    gamma_of_all: float,
    lam_of_all: float,
    advantages: Tensor,
    returns: Tensor,
    threads: int,
) -> None: ...
def segment_sum(x: Tensor, offsets: Tensor, out: Tensor, threads: int) -> None: ...
def to_tokens(x: Tensor, offsets: Tensor, out: Tensor, threads: int) -> None: ...
def tree_attention_forward(
    tree: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: int,
    window: int,
    scale: float,
    softcap: float,
    out: Tensor,
    lse: Tensor,
    threads: int,
) -> None: ...
def tree_attention_backward(
    tree: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    tokens: int,
    window: int,
    scale: float,
    softcap: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    threads: int,
) -> None: ...
def tree_decode(
    plan: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    scale: float,
    softcap: float,
    out: Tensor,
    lse: Tensor,
    threads: int,
) -> None: ...
def matmul(a: Tensor, b: Tensor, bias: Tensor | None, alpha: float, add: bool, c: Tensor, threads: int) -> None: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
