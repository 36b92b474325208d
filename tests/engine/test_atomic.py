"""Files and folders that are whole or absent: what is left when writing stops at any point."""

import os
import stat

import pytest

from fuserl.engine import atomic


class Stopped(BaseException):
    """What no handler of errors catches."""


def stop_at(monkeypatch, name):
    def stopped(*args, **kwargs):
        raise Stopped

    monkeypatch.setattr(os, name, stopped)


def kind(descriptor):
    return "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_and_replaced(tmp_path):
    atomic.write_text(tmp_path / "file", "één\n")
    assert (tmp_path / "file").read_bytes() == "één\n".encode()
    atomic.write_bytes(tmp_path / "file", b"\x00\xff")
    assert (tmp_path / "file").read_bytes() == b"\x00\xff" and names(tmp_path) == ["file"]


def test_a_file_keeps_its_old_content_when_writing_stops(tmp_path, monkeypatch):
    atomic.write_text(tmp_path / "file", "old")
    stop_at(monkeypatch, "fsync")
    with pytest.raises(Stopped):
        atomic.write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old" and names(tmp_path) == ["file"]


def test_a_file_is_on_disk_before_its_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append(f"sync {kind(descriptor)}"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    atomic.write_text(tmp_path / "file", "text")
    assert events == ["sync file", "rename", "sync folder"]


def test_a_folder_appears_whole(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(atomic, "sync", lambda path: synced.append(path.name))
    with atomic.draft_folder(tmp_path / "new", "model") as draft:
        (draft / "inner").mkdir()
        (draft / "inner" / "weights").write_text("w")
        assert not (tmp_path / "new" / "model").exists() and draft.name.startswith(".model.")
        atomic.publish_folder(draft, tmp_path / "new" / "model")
    assert names(tmp_path / "new") == ["model"]
    assert (tmp_path / "new" / "model" / "inner" / "weights").read_text() == "w"
    # The new parent's own name too; then all that is in the draft; then the name that it got.
    assert synced[0] == tmp_path.name and synced[-1] == "new"
    assert {"inner", "weights", draft.name} == set(synced[1:-1])


def test_a_draft_that_is_not_handed_over_goes(tmp_path):
    with pytest.raises(Stopped), atomic.draft_folder(tmp_path, "model") as draft:
        (draft / "weights").write_text("half")
        raise Stopped
    assert names(tmp_path) == []


def test_a_folder_in_use_is_not_replaced(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("old")
    with pytest.raises(OSError), atomic.draft_folder(tmp_path, "model") as draft:
        (draft / "weights").write_text("new")
        atomic.publish_folder(draft, tmp_path / "model")
    assert (tmp_path / "model" / "weights").read_text() == "old" and names(tmp_path) == ["model"]


def test_a_discarded_folder_is_out_of_sight_before_anything_in_it_goes(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("w")
    seen = []
    monkeypatch.setattr(atomic.shutil, "rmtree", lambda path, **_: seen.extend([path, *names(path)]))
    atomic.discard_folder(tmp_path / "model")
    assert not (tmp_path / "model").exists() and seen[1:] == ["weights"]
    monkeypatch.undo()
    atomic.discard_folder(tmp_path / "model")  # there is none
    atomic.remove_drafts(tmp_path)
    assert names(tmp_path) == []


def test_what_the_killed_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / ".a.0123.draft").mkdir()
    (tmp_path / ".a.0123.draft" / "weights").write_text("w")
    (tmp_path / ".b.0123.draft").write_text("")
    (tmp_path / "c.draft").write_text("mine")
    (tmp_path / ".d").write_text("mine")
    (tmp_path / ".e.0123.draft").symlink_to(tmp_path)
    atomic.remove_drafts(tmp_path)
    assert names(tmp_path) == [".d", "c.draft"]
    (tmp_path / ".a.0123.draft").write_text("")
    (tmp_path / ".b.0123.draft").write_text("")
    atomic.remove_drafts(tmp_path, "a")
    assert names(tmp_path) == [".b.0123.draft", ".d", "c.draft"]


def test_files_and_folders_get_the_rights_that_the_user_asks_for(tmp_path):
    mask = os.umask(0o027)
    try:
        atomic.write_text(tmp_path / "file", "")
        with atomic.draft_folder(tmp_path, "model") as draft:
            atomic.publish_folder(draft, tmp_path / "model")
    finally:
        os.umask(mask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o750


def test_sha256_at_its_known_points(tmp_path):
    # FIPS 180-4's own examples: the empty message and "abc".
    (tmp_path / "file").write_bytes(b"")
    assert atomic.sha256(tmp_path / "file") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    (tmp_path / "file").write_bytes(b"abc")
    assert atomic.sha256(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_file_that_another_writes_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "trace"
    path.write_text("old")
    with pytest.raises(Stopped), atomic.draft_file(path) as draft:
        draft.write_text("half")
        raise Stopped
    assert names(tmp_path) == ["trace"] and path.read_text() == "old"
    with pytest.raises(FileNotFoundError), atomic.draft_file(path):
        pass
    synced, sync = [], atomic.sync
    monkeypatch.setattr(atomic, "sync", lambda path: synced.append(path.name) or sync(path))
    with atomic.draft_file(path) as draft:
        draft.write_text("new")
        assert path.read_text() == "old" and draft.name.startswith(".trace.")
    assert names(tmp_path) == ["trace"] and path.read_text() == "new"
    assert synced == [draft.name, tmp_path.name]
