"""The command line: flags from Config, nearest names, exit codes, and a help that loads nothing."""

import json
import subprocess
import sys
import time

import pytest

from fuserl.engine import catalogue, cli
from fuserl.engine.config import Config, kind, settings


@pytest.fixture
def trained(monkeypatch):
    """Configurations that `fuserl train` hands to the loop, which does not run."""
    from fuserl.engine import loop

    seen = []
    monkeypatch.setattr(loop, "train", lambda config, resume: seen.append(config))
    return seen


def refused(arguments, capsys):
    """The one line that a wrong command line gets, with status 2."""
    try:
        status = cli.main(arguments)
    except SystemExit as leaving:
        status = leaving.code
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and err.count("\n") == 1, (status, out, err)
    return err


VALUES = {int: ("3", 3), float: ("0.25", 0.25), str: ("text", "text"), bool: (None, True), tuple: ("x", ("x",))}


@pytest.mark.parametrize("dashes", [False, True])
def test_every_setting_is_a_flag(dashes, trained):
    special = {"device": ("cuda:1", "cuda:1"), "dtype": ("bfloat16", "bfloat16"), "recipe": ("sft", "sft")}
    special |= {"schedule": ("linear", "linear"), "shard": ("full", "full")}
    special |= {"rollout": ("vllm", "vllm"), "importance": ("mask", "mask"), "importance_bound": ("2.5", 2.5)}
    arguments, expected = ["train", "sft"], {}
    for setting in settings():
        text, expected[setting.name] = special.get(setting.name, VALUES[kind(setting.name)[0]])
        if setting.name != "recipe":
            name = setting.name.replace("_", "-") if dashes else setting.name
            arguments += [f"--{name}", *([text] if text else [])]
    assert cli.main(arguments) == 0 and trained == [Config(**expected)]


def test_defaults_are_those_of_config(trained):
    assert cli.main(["train"]) == 0 and trained == [Config()]


def test_values_behind_an_equals_sign_and_escapes(trained):
    cli.main(["train", "--task=reasoning_gym:gcd:max_value=9", "--stop", "\\n", "END_", "--no-partial_credit"])
    assert trained == [Config(task="reasoning_gym:gcd:max_value=9", stop=("\n", "END_"))]


def test_who_draws_decides_anew_how_tokens_are_weighed(trained, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"config": Config(device="cpu").resolved().to_dict()}))
    for words, chosen in (([], "none"), (["--overlap"], "truncate"), (["--overlap", "--importance", "mask"], "mask")):
        cli.main(["train", "--config", str(path), *words])
        assert trained[-1].resolved().importance == chosen


def test_flags_win_over_a_file(trained, tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"config": {"steps": 3, "groups": 5, "recipe": "sft"}}')
    cli.main(["train", "--config", str(path), "--steps", "4"])
    assert trained == [Config(steps=4, groups=5, recipe="sft")]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--grop_size", "4"], "unknown argument '--grop-size'. Did you mean '--group-size'?"),
        (["train", "--learning-rat=1"], "unknown argument '--learning-rat'"),
        (["train", "--group", "4"], "Did you mean '--groups'?"),
        (["train", "grop"], "unknown recipe 'grop'. Did you mean 'grpo'?"),
        (["train", "grpo", "sft"], "unknown argument 'sft'"),
        (["train", "--num_generations", "4"], "unknown argument '--num-generations'. It is --group-size here."),
        (["train", "sft", "--beta", "4"], "unknown argument '--beta'"),
        (["train", "--beta", "x"], "argument --beta: must be a number; got 'x'"),
        (["train", "--resume", "absent"], "--resume must name a run's folder; absent has no config.json"),
        (["train", "--low", "nan"], "low must be a number; got nan"),
        (["eval"], "the following arguments are required: RUN|MODEL"),
        (["eval", "x", "--step", "4"], "Did you mean '--steps'?"),
        (["export", "absent", "--out", "x"], "it must be a run's folder, which has a config.json; got 'absent'"),
        (["export", "absent"], "the following arguments are required: --out"),
        (["report", "absent"], "absent must be the folder of a run"),
        (["check", "grop"], "Did you mean 'grpo'?"),
        (["train", "--groups", "x"], "argument --groups: must be an integer >= 1; got 'x'"),
        (["train", "--groups", "0"], "groups must be an integer >= 1; got 0"),
        (["train", "--lr"], "argument --lr: expected one argument"),
        (["train", "--config", "absent.json"], "absent.json must be a TOML or JSON file"),
        (["list", "--x"], "unknown argument '--x'"),
        (["bench", "--smok"], "Did you mean '--smoke'?"),
        (["trian"], "unknown command 'trian'. Did you mean 'train'?"),
    ],
)
def test_wrong_arguments_are_one_line_and_name_the_nearest(arguments, says, capsys, trained):
    assert says in refused(arguments, capsys) and trained == []


def test_errors_of_the_run_are_one_line_unless_debugging(monkeypatch, capsys):
    from fuserl.engine import loop

    def fail(config, resume):
        raise error

    monkeypatch.setattr(loop, "train", fail)
    monkeypatch.delenv("FUSERL_DEBUG", raising=False)
    for error, status in ((ValueError("task: no"), 2), (RuntimeError("reward: no"), 1), (KeyboardInterrupt(), 130)):
        assert cli.main(["train"]) == status
        err = capsys.readouterr().err
        assert str(error) in err and "Traceback" not in err
    monkeypatch.setenv("FUSERL_DEBUG", "1")
    error = RuntimeError("reward: no")
    with pytest.raises(RuntimeError):
        cli.main(["train"])


def test_options_of_the_recipe_are_flags(trained):
    cli.main(["train", "ppo", "--value_coef", "0.5", "--no-whiten", "--critic-lr=0.1"])
    assert trained == [Config(recipe="ppo", options={"value_coef": 0.5, "whiten": False, "critic_lr": 0.1})]


def test_the_recipe_of_a_file_has_its_options(trained, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('recipe = "dapo"\nhigh = 0.3\nsteps = 7\nstop = ["x"]\n')
    cli.main(["train", "--config", str(path), "--attempts", "2"])
    assert trained == [Config(recipe="dapo", steps=7, stop=("x",), options={"high": 0.3, "attempts": 2})]


def test_resume_takes_the_run_s_own_settings(monkeypatch, tmp_path, capsys):
    from fuserl.engine import loop

    seen = []
    monkeypatch.setattr(loop, "train", lambda config, resume: seen.append((config, resume)))
    (tmp_path / "config.json").write_text('{"config": {"recipe": "ppo", "steps": 3, "lam": 0.9}}')
    assert cli.main(["train", "--resume", str(tmp_path), "--steps", "5"]) == 0
    assert seen == [(Config(recipe="ppo", steps=5, options={"lam": 0.9}), tmp_path)]
    assert "leave out --config and --out" in refused(["train", "--resume", str(tmp_path), "--out", "x"], capsys)


def test_check_fails_where_a_figure_falls_outside(monkeypatch, capsys):
    from fuserl.engine.checks import Figure

    assert cli.main(["check", "grpo"]) == 0 and "  ok  on-policy gradient" in capsys.readouterr().out
    monkeypatch.setattr(catalogue, "show", lambda name: [Figure("sum", 1.0, 1.0), Figure("share", 0.5, 0.6)])
    assert cli.main(["check"]) == 1
    out = capsys.readouterr().out
    assert out.count("  NO  share: 0.5 (expected 0.6)") == len(catalogue.RECIPES) == out.count("  ok  sum")


def test_list_numbers_every_recipe(capsys):
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == list(catalogue.RECIPES)
    assert lines[0].split()[0] == "1" and catalogue.RECIPES["grpo"] in lines[list(catalogue.RECIPES).index("grpo")]


def test_doctor_prints_every_op_in_every_backend(capsys):
    import fuserl
    from fuserl.engine import doctor
    from fuserl.kernels.dispatch import BACKENDS

    table = doctor.ops()
    assert set(table) == set(fuserl.OPS) and all(tuple(row) == BACKENDS for row in table.values())
    assert all(row["reference"] is None for row in table.values())
    assert cli.main(["doctor"]) in (0, 1)
    out = capsys.readouterr().out
    assert all(f"{op:<20} {backend}" in out for op in table for backend in BACKENDS) and "torch" in out


def test_doctor_fails_when_an_op_runs_in_plain_torch_only(monkeypatch, capsys):
    from fuserl.engine import doctor

    monkeypatch.setattr(doctor, "ops", lambda: {"an_op": {"cpu": "no compiler.", "reference": None}})
    assert cli.main(["doctor"]) == 1
    assert "an_op: only the plain torch reference runs here" in capsys.readouterr().out


def test_bench_passes_its_arguments_on(monkeypatch):
    from fuserl.engine import bench

    seen = []
    monkeypatch.setattr(bench, "main", lambda only, **options: seen.append((only, options)) or 0)
    assert cli.main(["bench", "group_advantage", "--smoke"]) == 0
    assert seen == [("group_advantage", {"smoke": True, "save": False})]


def test_help_is_complete_fast_and_loads_nothing_heavy():
    code = (
        "import sys; from fuserl.engine import cli\ntry: cli.main(['train', '--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'rich', 'reasoning_gym') if name in sys.modules])"
    )
    started = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert time.perf_counter() - started < 5  # about 0.1 s when nothing else runs
    assert out.endswith("[]\n")
    assert all(f"--{setting.name.replace('_', '-')}" in out for setting in settings() if setting.name != "recipe")


def test_usage_names_the_commands(capsys):
    for arguments, status in ((["--help"], 0), ([], 2)):
        with pytest.raises(SystemExit) as leaving:
            cli.main(arguments)
        assert leaving.value.code == status
    shown = capsys.readouterr()
    assert all(f"  {name} " in shown.out + shown.err for name in ("train", "list", "bench", "doctor"))
