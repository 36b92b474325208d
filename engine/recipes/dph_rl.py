"""17 DPH-RL: f-divergence from what the initial policy solves (Li et al., arXiv:2509.07430).

    before     `presamples` answers of the initial policy to every problem of the run; solved: a share `solved` is right
    explored   the other problems: GRPO's surrogate with clip, dual clip and the mean over tokens, no KL
    rehearsed  one right answer of each solved problem: eta f(u), u = exp(logprob - that of the initial policy)
    loss       their sum over a step's problems of either kind, each by its own mean; `interleaved`: an update each

f is one of `generators`; jensen_shannon_definition has a second term on explored rollouts in a share of the steps, and
"none" rehearses nothing: with `beta` it is GRPO with its KL.

Limit: where the initial policy solves nothing it is GRPO with the mean over tokens.

Ours: problems are those that the run will ask; solved is all right (8 of 8); stored log-probs are scored by the model
that learns; a step that has solved problems only explores one of them; the second term's steps are drawn by the seed.

Check: engine/toys/dph_rl.py: the initial policy gives eight arms, two are rewarded; two seeds, in a slow test eight,
with reverse and jensen_shannon. The means are of p and q near enough that no value is held to its bound.
"""

from fuserl.engine import generators, prompts, rewards
from fuserl.engine.advantages import standardized
from fuserl.engine.checks import Figure
from fuserl.engine.contracts import require_one_of
from fuserl.engine.losses import Loss, clipped, summed, token_mean
from fuserl.engine.mixtures import mixture, parted
from fuserl.engine.recipe import Recipe
from fuserl.engine.rehearsal import Rehearsal
from fuserl.engine.rollouts import sampled


def recipe(
    config,
    *,
    divergence: str = "forward",
    eta: float = 0.05,
    alpha: float = 0.2,
    presamples: int = 8,
    solved: float = 1.0,
    interleaved: bool = False,
    mean_share: float = 0.1,
    low: float = 0.2,
    high: float = 0.28,
    dual: float | None = 3.0,
    beta: float = 0.0,
) -> Recipe:
    """DPH-RL on the configured task.

    Args:
        divergence: forward, jensen_shannon, alpha, reverse, jensen_shannon_definition or none.
        eta: weight of the rehearsal: .01 to .05 (forward, alpha), .05 to .2 (jensen_shannon).
        alpha: of the divergence of that name.
        presamples: answers of the initial policy to every problem (k).
        solved: share of them that must be right for a problem to be rehearsed.
        interleaved: rehearse in an update of its own.
        mean_share: share of the steps in which jensen_shannon_definition has its term on explored rollouts.
        low, high: the ratio is clipped to [1 - low, 1 + high].
        dual: bound of the loss of tokens with a negative advantage, in units of it.
        beta: weight of the reverse KL divergence to the reference on explored rollouts.
    """
    sampler, scorer = prompts.sampler(config), rewards.scorer(config)
    stored = Rehearsal(scorer, presamples=presamples, solved=solved)
    second = generators.by_chance(mean_share, config.seed)
    clip = {"low": low, "high": high, "dual": dual}
    loss = both(divergence, eta=eta, alpha=alpha, beta=beta, when=second, **clip)
    return Recipe(
        name="dph_rl",
        prompts=sampler,
        rollout=sampled(config.group_size) if divergence == "none" else stored.exploring(sampler, config),
        reward=scorer,
        advantage=stored.rehearsing(standardized, sampler),
        loss=loss,
        reads=loss.reads,
        batches=parted if interleaved else None,
        state={"rehearsal": stored},
    )


def both(divergence: str, *, eta: float, alpha: float = 0.2, beta: float = 0.0, when=bool, **clip) -> Loss:
    """The surrogate of objective 0, in the steps `when` with the definition's second term, and eta f of objective 1."""
    require_one_of("dph_rl", "divergence", divergence, (*generators.KINDS, "none"))
    explored = clipped(**clip, beta=beta, reduce=token_mean)
    if divergence == "jensen_shannon_definition":
        explored = summed(explored, generators.towards_mean(eta=eta, when=when), 1.0)
    kind, weight = ("forward", 0.0) if divergence == "none" else (divergence, eta)
    return mixture(explored, generators.generated(kind, eta=weight, alpha=alpha))


def show() -> list[Figure]:
    """The generators' means and derivatives; what is forgotten is pulled back; the arms that stay, forward and none."""
    from fuserl.engine.toys import dph_rl

    return dph_rl.figures(standardized, both)
