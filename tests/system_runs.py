"""Runs of every recipe, with the options that change its arithmetic, on the tiny model: for proofs over all of them."""

import json

import tiny_models
import tiny_runs
import torch

from fuserl.engine import atomic, catalogue, models, webs

VERDICTS = dict(stop=tuple("\n12345"), max_new_tokens=12)
FEW = dict(rounds=2, groups=2, group_size=2)
REHEARSED = dict(solved=0.75, presamples=4)


def uneven(completion, answer):
    """1 for some problems whatever is said, 0 for others, and by chance for the rest."""
    kind = sum(map(ord, answer)) % 4
    return 1.0 if kind == 0 else 0.0 if kind == 2 else float(len(completion) % 2)


def answered(prompt, text):
    """A tool that says the same to everyone, twice."""
    return "1+" if text.count("1+") < 2 else None


# A case begins with the name of its recipe.
CASES = {name: {} for name in catalogue.RECIPES} | {
    "grpo steps": {"minibatches": 2, "epochs": 2},
    "grpo terms": {"beta": 0.1, "entropy_coef": 0.01, "dual": 3.0},
    "gspo": {"minibatches": 2},
    "dapo": {"attempts": 2, "overlong_buffer": 2},
    "reinforce_pp": {"group_baseline": True},
    "ma_rlhf macros": {"ratio": "macro", "segmentation": "randomised", "separate_critic": True},
    "arena_rl greedy": {"anchor": "greedy", "topology": "swiss"},
    "kl_bayes best": {"objective": "dpg", "target": "moments", "proposal": "best", "beta": 2.0},
    "kl_bayes pointwise": {"objective": "dpg", "target": "pointwise", "baseline": False},
    "cgpo two tasks": {"optimizer": "crpg,codpo", "k": "2,3", "weights": "1,0.5"},
    "cgpo crraft": {"optimizer": "crraft"},
    "cgpo warm-up": {"optimizer": "codpo", "dpo_steps": 1},
    "vpo online": {"online": True},
    "vpo reference": {"calibration": "reference"},
    "r_to_q": {"beams": "1,3", "guided": True},
    "rover scaled": {"rho": 0.5, "scale_by_std": True},
    "dph_rl": REHEARSED,
    "dph_rl interleaved": {**REHEARSED, "interleaved": True, "divergence": "reverse"},
    "dph_rl definition": {
        **REHEARSED, "divergence": "jensen_shannon_definition", "mean_share": 0.15, "eta": 0.2,
    },
    "dph_rl leash": {**REHEARSED, "divergence": "jensen_shannon_definition", "mean_share": 0.15, "beta": 0.1},
    "dph_rl none": {**REHEARSED, "divergence": "none", "beta": 0.1},
    "ace dapo": {"base": "dapo", "attempts": 2},
    "rorecomp critic": {"advantages": "critic"},
    "rorecomp group": {"advantages": "group", "alpha": 0.8},
    "advantage_alignment": {"rounds": 2, "past_every": 1, "past": 2},
    "advantage_alignment trust": {**FEW, "game": "trust", "alternate": True, "entropy_coef": 0.0},
    "advantage_alignment alternatives": {**FEW, "alternatives": 1},
    "sdpo sampled": {"alpha": 1.0, "sampled_form": True, "self_teacher": "initial"},
    "sdpo topk": {"alpha": 0.5, "topk": 5, "self_teacher": "current"},
    "sdpo mixed": {"self_teacher": "mixed", "is_clip": 2.0, "epochs": 2},
    "sdpo question": {"question": 3, "skip_solved": True},
    "pre_rl": {"switch": 1},
    "pre_rl renewed": {"switch": 1, "beta": 0.1},
    "pre_rl mixed": {"mixed": True, "probe": True, "pre_samples": "both", "rl_samples": "positive"},
    "rep_exp": {"k": 2, "bonus": 0.1, "off_if_none_correct": False},
    "rep_exp lasting": {"k": 2, "lasting": True, "pool": 4, "select": 2},
    "self_interference": {"beta": 0.1},
    "self_interference solved": {"beta": 0.1, "groups": 1, "steps": 6},  # some prompts alone in their step
    "self_interference alone": {"beta": 0.0, "greedy_pass": False},
    "laser": {"w1": 0, "w2": 1, "tau": 0.5, **VERDICTS},
    "laser quiet": {"w1": 0, "alpha": 0.0, **VERDICTS},
    "laser reference": {"w1": 1, "c_ref": None, "alpha": 1.0, "eval_samples": 2, **VERDICTS},
    "vas": {"n": 3, "t_upd": 2, "beta": 0.0},
    "med_grpo": {"baseline": 6, "recompute": 2},
    "med_grpo tasks": {"normalise": False, "adv_norm": "task_batch_std"},
    "c_grpo": {**tiny_runs.ENDING, "group_size": 8},  # only what ends by itself is right
    "c_grpo answered": {**tiny_runs.ENDING, "group_size": 8},
    "mdpo": {"epochs": 2},
    **{f"vla_opd {form}": {"form": form} for form in ("reverse_kl", "hard_ce", "ppo", "reinforce")},
}  # fmt: skip
OF_SYSTEMS = [case for case in CASES if case.split()[0] in catalogue.SYSTEMS]


def use(patch, case):
    """Let a case run on the tiny model in float64, in which no rounding becomes another token."""
    patch.setattr(models, "load", lambda *_: (tiny_models.model(dtype=torch.float64), tiny_runs.Characters()))
    if case == "c_grpo answered":
        patch.setattr(webs, "reply", answered)


def config(folder, name, case, **changes):
    """The configuration of a case's run in folder/name."""
    settings = {"recipe": case.split()[0], "reward": "system_runs:uneven", **changes, **CASES[case]}
    found = tiny_runs.config(folder, name, **settings)
    if case == "cgpo two tasks":
        several = [folder / "one", folder / "two"]
        for each in several:
            each.mkdir(exist_ok=True)
        return found.replace(data=" + ".join(map(tiny_runs.problems, several)))
    return found.replace(data=media(folder)) if case.startswith("med_grpo") else found


def media(folder):
    """A file of sums without a task, of intervals and of captions, in letters that the tiny tokenizer knows."""
    kinds = [({"task": "TAG"}, "0-{n}"), ({"task": "VS"}, "{n} {n}"), ({}, "{n}")]
    rows = [
        {"prompt": f"{n}+{at}=", "answer": answer.format(n=n + 1), "dataset": "d", **task}
        for n in range(8)
        for at, (task, answer) in enumerate(kinds)
    ]
    atomic.write_text(folder / "media.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "media.jsonl")
