"""What a killed process leaves beside an export, or in the cache of rows, is gone when the next one begins; no other's is."""

import os
import signal
import subprocess
import sys

import pytest

from sftjax.data.cache import entry
from sftjax.hf.staging import DAY, MARK, host, staged

KINDS = {
    "export": (staged, "from sftjax.hf.staging import staged as begin"),
    "cache": (lambda place, _: entry(place.parent, place.name), "from sftjax.data.cache import entry as begin"),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def left(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def written(begin, place):
    with begin(place, "source") as tmp:
        (tmp / "file").touch()


def kill_within(kind, place):
    arguments = (str(place), "source") if kind == "export" else (place.parent, place.name)
    code = f"import os\nfrom pathlib import *\n{KINDS[kind][1]}\nwith begin(*{arguments}) as tmp:\n"
    code += f"    (tmp / 'file').write_text('half')\n    os.kill(os.getpid(), {signal.SIGKILL:d})"
    return subprocess.run([sys.executable, "-c", code]).returncode


def test_what_a_killed_process_left_goes_when_the_next_begins(kind, tmp_path):
    assert kill_within(kind, tmp_path / "out") == -signal.SIGKILL
    assert len(left(tmp_path)) == 1
    written(KINDS[kind][0], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_being_written_stays(kind, tmp_path):
    begin = KINDS[kind][0]
    with begin(tmp_path / "out", "source") as tmp:
        (tmp / "file").touch()
        written(begin, tmp_path / "out")
        assert (tmp / "file").is_file()


@pytest.mark.parametrize(
    "name, age, stays",
    [
        (".out.elsewhere.1.00000000.tmp", 0, True),  # another machine's, whose processes nobody here knows
        (".out.elsewhere.1.00000000.tmp", 2 * DAY, False),
        (f".out.{host()}.{os.getpid()}.00000000.tmp", 2 * DAY, False),
        (f".out.{host()}.{2**22 + 1}.00000000.tmp", 0, False),  # no kernel gives that number
        (f".outer.{host()}.{2**22 + 1}.00000000.tmp", 2 * DAY, True),
        (".out.backup", 2 * DAY, True),
    ],
    ids=["another's, new", "another's, old", "own, old", "dead, new", "of another export", "of nobody"],
)
def test_only_what_is_abandoned_goes(tmp_path, name, age, stays):
    (tmp_path / name).mkdir()
    (tmp_path / name / "file").touch()
    for path in (tmp_path / name / "file", tmp_path / name):
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    written(staged, tmp_path / "out")
    assert left(tmp_path) == [name] * stays


def test_a_directory_stays_as_long_as_a_file_in_it_is_new(tmp_path):
    (old := tmp_path / ".out.elsewhere.1.00000000.tmp").mkdir()
    (old / "file").touch()
    os.utime(old, (0, 0))
    written(staged, tmp_path / "out")
    assert left(tmp_path) == [old.name]


def test_an_earlier_export_that_is_all_there_is_stays(tmp_path):
    """Killed between the two renames that put a new one in its place."""
    (old := tmp_path / f".out.{host()}.{2**22 + 1}.00000000.old").mkdir()
    (old / MARK).touch()
    for stays in (True, False):
        written(staged, tmp_path / "out")
        assert old.exists() == stays
