"""Every system on two ranks, its weights whole or cut over them, has the figures of one rank, from a checkpoint too."""

import json
import shutil

import pytest
import system_runs
import tiny_runs
from ranks import on_ranks

from fuserl.engine import loop, ranks
from fuserl.engine.follower import Follower
from fuserl.engine.metrics import Run

RANKS, STEPS = 2, 3
# A loss that sums four log-probs of up to 16 nats, kept in float32, may be off by the last bit of each.
NEAR = {"kl_bayes": 4e-6}
QUICK = {"kl_bayes best"}  # whose weights are cut, kept, and put back


def trained(folder, name, case, *, again=False, **changes):
    """Train in folder/name, or its last step `again`.

    This rank's rows of metrics, with all their digits, go to folder/name.rank.json, or to "name again".
    """
    rows, kind = [], Run if ranks.first() else Follower
    with pytest.MonkeyPatch.context() as patch:
        system_runs.use(patch, case)
        log = kind.log
        patch.setattr(kind, "log", lambda run, row: (rows.append(row), log(run, row)))
        patch.setattr(kind, "evaluated", lambda run, step, row: rows.append({"step": step, **row}))
        settings = dict(steps=STEPS, micro_tokens=24, groups=3, lr=0.002, save_every=1)
        asked = system_runs.config(folder, name, case, **{**settings, **changes})
        loop.train(asked, resume=folder / name if again else None)
    (folder / f"{name}{' again' if again else ''}.{ranks.rank()}.json").write_text(json.dumps(tiny_runs.numbers(rows)))


def on_each(folder, case):
    for shard in ("none", "full"):
        trained(folder, shard, case, shard=shard)
        if ranks.first():
            shutil.rmtree(max((folder / shard / "checkpoints").iterdir()))
        ranks.everyones("removed")
        trained(folder, shard, case, again=True, shard=shard)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow) for case in system_runs.OF_SYSTEMS]
)
def test_figures_of_two_ranks_are_those_of_one(case, tmp_path):
    trained(tmp_path, "one", case)
    on_ranks(RANKS, on_each, tmp_path, case, seconds=300)
    one = figures(tmp_path, "one")
    last = one[-1]["step"]
    assert sum("tokens" in row for row in one) == last >= STEPS
    for shard in ("none", "full"):
        for rank in range(RANKS):
            same(one, figures(tmp_path, shard, rank), case)
            same([row for row in one if row["step"] == last], figures(tmp_path, f"{shard} again", rank), case)


def figures(folder, name, rank=0):
    return json.loads((folder / f"{name}.{rank}.json").read_text())


def same(one, several, case):
    assert [row.keys() for row in one] == [row.keys() for row in several]
    for expected, got in zip(one, several, strict=True):
        assert got == pytest.approx(expected, rel=1e-6, abs=NEAR.get(case, 1e-6), nan_ok=True)
