"""Checkpoints: what comes back, what is kept, and what is there after a kill, on a full disk, with damage."""

import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import full

from fuserl.engine import checkpoint

KILLED_SAVES = Path(__file__).with_name("killed_saves.py")


def tensors(step=1):
    return {
        "policy": {"weight": torch.full((3, 4), float(step)), "count": torch.tensor(step)},
        "random": {"cpu": torch.arange(5, dtype=torch.uint8)},
    }


def save(run, step=1, keep=2, **changes):
    return checkpoint.save(run, step, tensors(step), {"step": step}, keep=keep, **changes)


def names(run):
    return sorted(os.listdir(run / "checkpoints"))


def flip(path, at=0, bit=1):
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


def bits(tensor):
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def killed(how, run):
    done = subprocess.run([sys.executable, KILLED_SAVES, how, run], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


def test_a_checkpoint_comes_back(tmp_path):
    assert checkpoint.newest(tmp_path / "absent") is None and checkpoint.newest(tmp_path) is None
    path = save(tmp_path, 20)
    assert path == tmp_path / "checkpoints" / "step-00000020"
    assert sorted(os.listdir(path)) == ["checksums.json", "policy.safetensors", "random.safetensors", "state.json"]
    found = checkpoint.newest(tmp_path)
    assert (found.path, found.step, found.state) == (path, 20, {"step": 20})
    assert torch.equal(found.tensors("policy")["weight"], torch.full((3, 4), 20.0))
    assert found.tensors("policy")["count"].shape == () and found.tensors("random")["cpu"].dtype == torch.uint8
    with pytest.raises(ValueError, match=r"part must be in .* got 'polices'\. Did you mean 'policy'"):
        found.tensors("polices")


@pytest.mark.parametrize("dtype", checkpoint._DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(dtype, tmp_path):
    size = torch.empty(0, dtype=dtype).element_size()
    if dtype is torch.bool:
        given = torch.tensor([[True, False, True]] * 5)
    else:
        given = torch.randint(0, 256, (5, 3 * size), dtype=torch.uint8).view(dtype)  # NaNs with payloads among them
    checkpoint.save(tmp_path, 1, {"part": {"given": given, "scalar": given[0, 0], "empty": given[:0]}}, {})
    back = checkpoint.newest(tmp_path).tensors("part")
    for name, tensor in {"given": given, "scalar": given[0, 0], "empty": given[:0]}.items():
        assert back[name].dtype == dtype and back[name].shape == tensor.shape and bits(back[name]) == bits(tensor)


def test_layouts_and_shared_storage_come_back(tmp_path):
    base = torch.randn(6, 4)
    given = {
        "odd": torch.ones(3, dtype=torch.uint8),
        "whole": base,
        "again": base,
        "rows": base[2:],
        "transposed": base.t(),
        "spread": base[0].expand(3, 4),
        "steps": base.flatten()[::5],
        "trained": torch.nn.Parameter(base + 1),
        "numbers": torch.arange(3),
    }
    checkpoint.save(tmp_path, 1, {"part": given, "nothing": {}}, {})
    back = checkpoint.newest(tmp_path).tensors("part")
    assert back.keys() == given.keys() and all(torch.equal(back[name], given[name]) for name in given)
    assert back["numbers"].data_ptr() % 8 == 0  # an odd number of bytes stands behind it, not before
    assert checkpoint.newest(tmp_path).tensors("nothing") == {}
    back["whole"].zero_()  # what is loaded is the caller's, and the file's no longer
    assert torch.equal(checkpoint.newest(tmp_path).tensors("part")["whole"], base)


@pytest.mark.gpu
def test_tensors_of_a_gpu_come_back_on_the_host(tmp_path):
    given = torch.randn(6, 4, device="cuda", dtype=torch.bfloat16)
    checkpoint.save(tmp_path, 1, {"part": {"given": given.t()}}, {})
    back = checkpoint.newest(tmp_path).tensors("part")["given"]
    assert back.device.type == "cpu" and torch.equal(back, given.t().cpu())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.just(math.nan) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def exact(value):
    """A form in which equality is equality of every bit, type and order."""
    if isinstance(value, float):
        return struct.pack("<d", value)
    if isinstance(value, list):
        return [exact(each) for each in value]
    if isinstance(value, dict):
        return [(key, exact(each)) for key, each in value.items()]
    return type(value), value


@settings(deadline=None, max_examples=150)
@given(state=st.dictionaries(st.text(), JSON, max_size=5))
def test_state_comes_back_bit_for_bit(state):
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(folder, 0, {}, state)
        assert exact(checkpoint.newest(folder).state) == exact(state)


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"a": {"b": [1, (2, 3)]}}, r"a tuple at state\['a'\]\['b'\]\[1\]"),
        ({"a": {1: 2}}, r"keys in state must be texts; got 1 in state\['a'\]"),
        ({"a": torch.ones(1)}, r"a Tensor at state\['a'\]"),
        ({"a": b"x"}, "a bytes at"),
        ([1], "state must be a dict; got list"),
    ],
)
def test_state_that_would_not_come_back_is_refused(state, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        checkpoint.save(tmp_path, 1, {}, state)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"step": -1}, "step must be an integer >= 0; got -1"),
        ({"step": 2.0}, "step must be an integer"),
        ({"keep": 0}, "keep must be an integer >= 1; got 0"),
        ({"tensors": {"../policy": {}}}, r"letters, digits, _ and -; got '\.\./policy'"),
        ({"tensors": {"policy": {"w": torch.ones(2, dtype=torch.complex64)}}}, "complex64.*'w' of 'policy'"),
        ({"tensors": {"policy": {"w": torch.eye(2).to_sparse()}}}, "sparse_coo"),
    ],
)
def test_arguments_that_cannot_be_saved_are_refused(changes, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        checkpoint.save(tmp_path, **{"step": 1, "tensors": {}, "state": {}, **changes})
    assert os.listdir(tmp_path) == []


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 9, 10, 100_000_000):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-00000010", "step-100000000"]
    assert checkpoint.newest(tmp_path).step == 100_000_000
    save(tmp_path, 100_000_001, keep=1)
    assert names(tmp_path) == ["step-100000001"]


def test_a_damaged_one_is_not_counted_among_the_kept(tmp_path, capsys):
    for step in (1, 2):
        save(tmp_path, step)
    flip(tmp_path / "checkpoints/step-00000002/policy.safetensors")
    save(tmp_path, 3)
    flip(tmp_path / "checkpoints/step-00000003/policy.safetensors")
    assert checkpoint.newest(tmp_path).step == 1
    for step in (4, 5):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-00000004", "step-00000005"] and checkpoint.newest(tmp_path).step == 5
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_step_that_is_saved_again_replaces_the_first_only_when_it_is_whole(tmp_path):
    save(tmp_path, 1)
    for value in (2, 3, 4):
        path = checkpoint.save(tmp_path, 2, tensors(value), {"step": value})
        assert checkpoint.newest(tmp_path).state == {"step": value}
    assert path.name == "step-00000002-3" and names(tmp_path) == ["step-00000001", path.name]
    with full(50_000), pytest.raises(RuntimeError):
        checkpoint.save(tmp_path, 2, {"policy": {"w": torch.ones(100_000)}}, {})
    assert checkpoint.newest(tmp_path).state == {"step": 4}


def test_a_kill_at_any_instant_leaves_a_whole_checkpoint(tmp_path):
    *kept, last = killed("at_random", tmp_path / "run")
    assert kept == [f"step-{int(last) + step:08d}" for step in (0, 1)]


def test_a_kill_before_any_call_on_the_disk_leaves_the_old_or_the_new_ones(tmp_path):
    [calls] = killed("at_every_call", tmp_path / "run")
    assert int(calls) > 20


@pytest.mark.parametrize("file", ["policy.safetensors", "random.safetensors", "state.json", "checksums.json"])
def test_every_flipped_bit_is_seen(file, tmp_path):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / file
    for at in range(path.stat().st_size):
        flip(path, at, 1 << at % 8)
        assert checkpoint._damage(path.parent) is not None, at
        flip(path, at, 1 << at % 8)
    assert checkpoint._damage(path.parent) is None


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path):
    path.write_bytes(b"")


def replaced_by_a_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [flip, cut_short, emptied, os.unlink, replaced_by_a_folder])
@pytest.mark.parametrize("file", ["policy.safetensors", "state.json", "checksums.json"])
def test_a_damaged_one_is_named_and_the_one_before_is_taken(file, damage, tmp_path, capsys):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    damage(path / file)
    assert checkpoint.newest(tmp_path).step == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fuserl: checkpoint {path} is left out: {file}")


FOREIGN = [
    ('{"format": 2, "step": 1, "files": {}}', "its format is 2, and this fuserl reads 1"),
    ('{"format": 1, "step": 7, "files": {}}', "not of this checkpoint"),
    ('{"format": 1, "step": 1, "files": {}}', "not of this checkpoint"),
    ('{"format": 1, "step": 1, "files": ["state.json"]}', "not of a checkpoint"),
    ('{"format": 1, "step": 1, "files": {"state.json": null}}', "state.json does not match"),
    ("[1, 2]", "not of a checkpoint"),
    ("[" * 100_000, "not of a checkpoint"),
    ("\0", "not of a checkpoint"),
]


@pytest.mark.parametrize(("manifest", "says"), FOREIGN, ids=range(len(FOREIGN)))
def test_a_foreign_one_is_named(manifest, says, tmp_path, capsys):
    (save(tmp_path, 1) / "checksums.json").write_text(manifest)
    with pytest.raises(ValueError, match="must hold a checkpoint that is whole; none of its 1 is"):
        checkpoint.newest(tmp_path)
    assert says in capsys.readouterr().err


def test_other_things_in_the_folder_are_no_checkpoints(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    for name in ("checkpoint-500", "step-1", "step-00000001-1", ".step-00000001.0a.draft", "step-00000001.old"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / "notes").write_text("mine")
    assert checkpoint.newest(tmp_path) is None and capsys.readouterr().err == ""
    save(tmp_path, 1)
    assert {"checkpoint-500", "notes", "step-00000001"} < set(names(tmp_path)) and checkpoint.newest(tmp_path).step == 1
    shutil.copytree(tmp_path / "checkpoints/step-00000001", tmp_path / "checkpoints/step-00000002")  # renamed by hand
    assert checkpoint.newest(tmp_path).step == 1


def test_a_file_that_cannot_be_written_leaves_the_earlier_checkpoints(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    with (
        full(50_000),
        pytest.raises(RuntimeError, match=r"checkpoint of step 3; .*too large.*intact") as error,
    ):
        checkpoint.save(tmp_path, 3, {"small": {"w": torch.ones(9)}, "policy": {"w": torch.ones(100_000)}}, {})
    assert "\n" not in str(error.value)
    assert names(tmp_path) == ["step-00000001", "step-00000002"] and checkpoint.newest(tmp_path).step == 2
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_a_full_disk_leaves_the_earlier_checkpoints(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("only root can make a small disk")
    try:
        large = {"policy": {"w": torch.ones(200, 1000)}}
        for step in (1, 2):
            save(tmp_path, step)
        with pytest.raises(RuntimeError, match="No space left on device"):
            checkpoint.save(tmp_path, 3, {**large, "critic": large["policy"]}, {})
        assert names(tmp_path) == ["step-00000001", "step-00000002"] and checkpoint.newest(tmp_path).step == 2
        checkpoint.save(tmp_path, 3, large, {})
        assert names(tmp_path) == ["step-00000002", "step-00000003"]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match=r"file/checkpoints must take the checkpoint of step 1; .*Not a directory"):
        save(tmp_path / "file")
    assert checkpoint.newest(tmp_path / "file") is None


def test_files_are_read_by_the_library_of_their_format(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = save(tmp_path)
    back = safetensors.load((path / "policy.safetensors").read_bytes())
    assert torch.equal(back["weight"], tensors()["policy"]["weight"])
    assert json.loads((path / "state.json").read_text()) == {"step": 1}
    assert Path(path / "policy.safetensors").stat().st_size % 8 == 0
