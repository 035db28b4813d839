import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from swiftkv_train.errors import RunError, UserError
from swiftkv_train.fetch.provenance import already_there, write_provenance
from swiftkv_train.staging import staged


def make(final):
    existed = final.exists()
    with staged(final) as stage:
        (stage / "a").write_text("one")
        (stage / "deep").mkdir()
        (stage / "deep/b").write_text("two")
        assert final.exists() == existed
        write_provenance(stage, "here", "1")


def left_in(directory):
    return sorted(path.name for path in directory.iterdir())


def test_it_appears_whole(tmp_path):
    make(tmp_path / "new/out")
    assert left_in(tmp_path / "new") == ["out"]
    assert left_in(tmp_path / "new/out") == ["a", "deep", "fetch.json"]
    assert already_there(tmp_path / "new/out", "here", "1")


def test_an_empty_directory_may_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    assert not already_there(tmp_path / "out", "here", "1")
    make(tmp_path / "out")
    assert already_there(tmp_path / "out", "here", "1")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, ValueError])
def test_an_interrupted_one_leaves_nothing(tmp_path, stop):
    def work():
        with staged(tmp_path / "out") as stage:
            (stage / "a").write_text("one")
            raise stop

    with pytest.raises(stop):
        work()
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        Exception("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_clear_line(tmp_path, error):
    with pytest.raises(RunError, match="disk is full") as caught, staged(tmp_path / "out"):
        raise error
    assert "\n" not in str(caught.value)
    assert left_in(tmp_path) == []


def test_what_a_killed_process_left_is_removed_and_a_living_one_is_not(tmp_path):
    script = (
        "import sys, time, pathlib\n"
        "from swiftkv_train.staging import staged\n"
        "with staged(pathlib.Path(sys.argv[1])) as stage:\n"
        "    (stage / 'a').write_text('half')\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "out")])
    partial = tmp_path / f".out.partial-{process.pid}"
    deadline = time.monotonic() + 20
    while not (partial / "a").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    with staged(tmp_path / "out"):
        assert partial.exists()
        # left before it is renamed, so that the name stays free
        process.send_signal(signal.SIGKILL)
        process.wait()
    (tmp_path / "out").rmdir()
    assert left_in(tmp_path) == [partial.name]
    (tmp_path / ".other.partial-1").mkdir()
    make(tmp_path / "out")
    assert left_in(tmp_path) == [".other.partial-1", "out"]


def test_a_directory_filled_meanwhile_is_kept(tmp_path):
    def work():
        with staged(tmp_path / "out") as stage:
            (stage / "a").write_text("mine")
            (tmp_path / "out").mkdir()
            (tmp_path / "out/a").write_text("yours")

    with pytest.raises(UserError, match="meanwhile"):
        work()
    assert (tmp_path / "out/a").read_text() == "yours"
    assert left_in(tmp_path) == ["out"]


def test_a_file_where_a_directory_should_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a directory"):
        already_there(tmp_path / "file", "here", "1")
    with pytest.raises(UserError, match="is not a directory"), staged(tmp_path / "file/out"):
        pass


def test_a_place_that_may_not_be_written(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*out: Permission denied"), staged(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied", "somewhere")  # root is never refused by the system


def test_any_other_failure_to_write_is_one_line(tmp_path):
    with pytest.raises(RunError, match=r"could not write .*out: .*File too large"), staged(tmp_path / "out"):
        raise Exception("I/O error: File too large (os error 27)")


def test_a_mistake_in_the_program_is_not_hidden(tmp_path):
    with pytest.raises(ZeroDivisionError), staged(tmp_path / "out"):
        raise ZeroDivisionError


def change(out):
    (out / "a").write_text("0ne")


def shorten(out):
    (out / "deep/b").write_text("t")


def remove(out):
    (out / "a").unlink()


def spoil(out):
    (out / "fetch.json").write_text('{"source": ')


def strip(out):
    (out / "fetch.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change, "out/a was changed"),
        (shorten, "deep/b was changed"),
        (remove, "out/a is missing"),
        (spoil, "fetch.json is damaged"),
        (strip, "did not write"),
    ],
)
def test_damage_is_seen_and_never_repaired_over(tmp_path, damage, message):
    make(tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(UserError, match=message):
        already_there(tmp_path / "out", "here", "1")


@pytest.mark.parametrize(("source", "version"), [("elsewhere", "1"), ("here", "2")])
def test_another_source_or_version_is_refused(tmp_path, source, version):
    make(tmp_path / "out")
    with pytest.raises(UserError, match=r"already holds here \(1\)"):
        already_there(tmp_path / "out", source, version)


def replace(final, meanwhile=lambda final: None):
    assert not already_there(final, "here", "2", ("1",))
    with staged(final, lambda: not already_there(final, "here", "2", ("1",))) as stage:
        (stage / "a").write_text("new")
        write_provenance(stage, "here", "2")
        meanwhile(final)


def test_an_earlier_version_is_replaced(tmp_path):
    make(tmp_path / "out")
    replace(tmp_path / "out")
    assert left_in(tmp_path) == ["out"]
    assert left_in(tmp_path / "out") == ["a", "fetch.json"]
    assert already_there(tmp_path / "out", "here", "2", ("1",))


def test_an_earlier_version_stays_where_it_cannot_be_replaced(tmp_path, monkeypatch):
    make(tmp_path / "out")
    before = (tmp_path / "out/a").read_text()
    rename = os.rename

    def refusing(source, target):
        if ".partial-" in str(source):
            raise OSError(errno.EIO, "Input/output error", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refusing)
    with pytest.raises(RunError, match="Input/output error"):
        replace(tmp_path / "out")
    assert left_in(tmp_path) == ["out"]
    assert (tmp_path / "out/a").read_text() == before


def add(out):
    (out / "deep/mine").write_text("mine")


@pytest.mark.parametrize(
    ("damage", "message"), [(change, "out/a was changed"), (add, "earlier version of here, with deep/mine besides")]
)
def test_what_a_user_did_to_an_earlier_version_is_kept(tmp_path, damage, message):
    make(tmp_path / "out")
    before = {path: path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=message):
        replace(tmp_path / "out", meanwhile=damage)
    with pytest.raises(UserError, match=message):
        already_there(tmp_path / "out", "here", "2", ("1",))
    assert left_in(tmp_path) == ["out"]
    after = {path: path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert len(before.items() ^ after.items()) in (1, 2)  # what the user did and no more


def test_a_link_to_an_earlier_version_is_not_replaced(tmp_path):
    make(tmp_path / "elsewhere")
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a symbolic link"):
        already_there(tmp_path / "out", "here", "2", ("1",))
