"""The page of metrics: what every number of a row of metrics.jsonl is, and how the harder ones are measured."""

from __future__ import annotations

from docstrings import docstring, prose, table

from fuserl.engine import meter, mismatch, panels, work
from fuserl.engine import page as report_page

_INTRODUCTION = """\
# Metrics

A run's `metrics.jsonl` has a JSON object per step and one per evaluation; those of evaluations have `accuracy`,
`problems` or `eval_s`. What is no number (of tokens that nobody drew, say) is null. Trackers are told the same names,
and `fuserl report` draws them under the titles below. A recipe or a reward may add numbers of its own."""
WHAT = {
    "step": "turns of the loop so far",
    "seconds": "the step took; checkpoints and evaluations come on top",
    "elapsed": "seconds since the run started, without the time between a stop and a resume",
    "tokens": "of the completions that the step learns from",
    "skipped": "1 where gradients were not finite and the weights stayed as they were",
    "problems": "held-out problems of an evaluation",
    "correct": "held-out problems whose greedy completion has a reward of at least 1",
    "accuracy_low": "lower end of the accuracy's 95 % interval",
    "accuracy_high": "upper end of it",
    "samples": "completions of each held-out problem that pass@k is estimated from",
    "reward": "mean of the step's completions",
    "accuracy": "share of the held-out problems whose greedy completion is correct",
    "pass@k": "chance that one of k completions of a held-out problem is correct, for each k",
    "nll": "negative log-likelihood of a token of the data, nats",
    "pair_accuracy": "share of the pairs whose chosen completion is ranked above the rejected one",
    "margin": "by how much, on average",
    "mixed": "share of the groups whose rewards differ",
    "live": "share of the completions that can have a gradient; the others cost no pass",
    "reward_std": "standard deviation of the step's rewards",
    "entropy": "of the policy at a trained token, nats",
    "kl": "divergence of the policy from the reference, nats a token",
    "approx_kl": "divergence from the policy that the update started from, nats a token",
    "clipped_low": "share of the trained tokens whose ratio was clipped from below",
    "clipped_high": "from above, where the advantage is positive",
    "clipped_dual": "from above, where it is negative",
    "ratio": "probability of a token by the policy over that when the update started, mean",
    "ratio_max": "the largest",
    "ratio_min": "the smallest",
    "ess": "effective sample size of these ratios, as a share of the tokens",
    "mismatch": "distance of a token's log-prob when the update starts from that with which it was drawn, nats, mean",
    "mismatch_max": "the largest",
    "mismatch_ess": "effective sample size of the importance weights of tokens, as a share of them",
    "mismatch_rollout_ess": "of those of whole rollouts, as a share of them",
    "importance": "weight with which a loss corrects for the mismatch, mean; 1 where it does not",
    "importance_cut": "share of the weights at a bound of the correction",
    "staleness": "optimizer steps between the weights that drew the completions and those that learn from them first",
    "length": "tokens of a completion, mean",
    "truncated": "share of the completions that were cut for length",
    "loss": "of the policy",
    "value_loss": "of the value model",
    "explained_variance": "share of the returns' variance that the values explain",
    "grad_norm": "of the gradient before it is scaled down",
    "lr": "learning rate",
    "generate_s": "seconds in which completions were drawn",
    "ahead_s": "with `--overlap`, seconds in which the step's completions were drawn behind the update before; rates "
    "of generation are of these, and `generate_s` is what nothing hid: the wait for the next step's",
    "reward_s": "seconds in which they were judged",
    "score_s": "seconds of forward passes for log-probs and values that the update refers to",
    "update_s": "seconds of the update: forward, backward, optimizer",
    "other_s": "the rest of the step's seconds",
    "save_s": "seconds of the checkpoint written before this step",
    "eval_s": "seconds of the evaluation",
    "generate_tokens_per_s": "tokens drawn, a second of `generate_s`",
    "read_tokens_per_s": "tokens of prompts read, a second of `generate_s`; a prompt is read once for its group",
    "update_tokens_per_s": "tokens passed forward and backward, prompts among them, a second of `update_s`",
    "generate_tflops": "1e12 operations a second of `generate_s`",
    "update_tflops": "1e12 operations a second of `update_s`",
    "generate_gb_per_s": "1e9 bytes that generation had to read, a second of `generate_s`",
    "generate_share": "of the machine's best in `generate_s`",
    "update_share": "of the machine's best in `update_s`",
    "host_gb": "most memory that the process has held so far, GB",
    "gpu_gb": "most GPU memory that its tensors have held so far, GB",
    "timeouts": "completions whose reward took too long and counts as 0",
}


def page() -> str:
    """The page: a table for each section of a report, then how mismatch, time and work are measured."""
    found = [(panel.section, name, panel.title) for panel in panels.PANELS for name in panel.series if name in WHAT]
    drawn = {name for _, name, _ in found}
    body = [_INTRODUCTION, "## Counts", _table([(name, "") for name in WHAT if name not in drawn])]
    for section, title in report_page._SECTIONS.items():
        listed = [(name, panel) for of, name, panel in found if of == section]
        body += [f"## {title}", _table(listed)] if listed else []
    for title, text in (
        ("How mismatch is measured", mismatch.__doc__),
        ("How time is measured", meter.__doc__),
        ("How work is counted", work.__doc__),
    ):
        body += [f"## {title}", docstring(text)]
    return "\n\n".join(body) + "\n"


def _table(metrics: list[tuple[str, str]]) -> str:
    """Metrics with the titles under which a report draws them."""
    return table(["metric", "drawn as", "what"], [[f"`{name}`", title, prose(WHAT[name])] for name, title in metrics])
