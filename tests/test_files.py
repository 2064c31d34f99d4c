"""Files are whole or not there, a folder has one writer, a log gets lines of progress, errors are one line."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import duckdb
import pytest
from small_table import run_python

from clinical_lf import files
from clinical_lf.files import HALF_WRITTEN, InputError


def left_by_a_killed_run(folder):
    half = folder / f".0123{HALF_WRITTEN}part-x"
    half.mkdir(parents=True)
    return half


STOPS = {
    "No space left.*Free space": OSError(28, "No space left on device"),
    "unexpected pos 5.*--output-dir": RuntimeError("unexpected pos 5\nat write"),  # as torch.save says it
    "by hand": KeyboardInterrupt("by hand"),
}


@pytest.mark.parametrize("words, error", STOPS.items())
def test_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path, words, error):
    path = files.write_whole(tmp_path / "new" / "file", lambda name: name.write_text("old"))

    def stop_half_way(name):
        name.write_text("half")
        raise error

    with pytest.raises(KeyboardInterrupt if words == "by hand" else InputError, match=words):
        files.write_whole(path, stop_half_way)
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_folder_below_a_file_is_a_clear_error(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    for write in (lambda: files.write_json(path / "state.json", {}), lambda: write_in(path / "cache")):
        with pytest.raises(InputError, match="cannot be written"):
            write()
    assert path.read_text() == "mine"


def write_in(folder):
    with files.lock_folder(folder):
        (folder / "written").touch()


def test_what_a_living_writer_holds_is_left_alone_and_a_dead_ones_removed(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(files, "SECONDS_UNTIL_SAID", 0.1)
    with files.lock_folder(tmp_path):
        orphan = left_by_a_killed_run(tmp_path)
        writer = multiprocessing.get_context("fork").Process(target=lambda: (files.log_to_stdout(), write_in(tmp_path)))
        writer.start()
        time.sleep(0.5)
        assert orphan.exists() and not (tmp_path / "written").exists()  # the other writer waits
        assert capfd.readouterr().out == f"Waiting     for another run that writes into {tmp_path}\n"
    writer.join()
    assert not orphan.exists() and (tmp_path / "written").exists()


def test_folder_that_cannot_lock_is_written_all_the_same(tmp_path, monkeypatch):
    orphan = left_by_a_killed_run(tmp_path)
    monkeypatch.setattr(files.FileLock, "acquire", Mock(side_effect=OSError(37, "No locks available")))
    write_in(tmp_path)
    assert orphan.exists() and (tmp_path / "written").exists()  # it may be a living writer's


def test_folder_held_by_another_run_is_refused_without_waiting_and_what_it_half_wrote_is_left(tmp_path):
    held = tmp_path / "cache"
    with files.lock_folder(held):
        half, orphan = map(left_by_a_killed_run, (held, tmp_path / "plots"))  # plots has no lock of its own
        with pytest.raises(InputError, match="another run writes here"), files.lock_folder(held, wait=False):
            pass
        write_in(tmp_path)
        assert half.exists() and not orphan.exists()
    with files.lock_folder(held, wait=False):
        assert not half.exists()


@pytest.mark.parametrize("name, left", [("new/out", []), ("new", [".lock"]), (".", [".lock"])])
def test_start_that_fails_before_it_writes_leaves_nothing_of_its_own_making(name, left, tmp_path):
    """A cache's lock stays, for which others may wait, and so does that of a folder that was there."""
    with pytest.raises(KeyError), files.lock_folder(tmp_path / name, wait=name == "new"):
        raise KeyError
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == left
    assert (tmp_path / name).parent.exists() == bool(left)


def test_text_that_a_console_of_cp1252_cannot_show_is_escaped_in_the_log():
    code = r"from clinical_lf import files; files.log_to_stdout(); files.logger.info('Reading \u2265.csv')"
    root = Path(files.__file__).parent.parent
    assert run_python("-c", code, folder=root, PYTHONIOENCODING="cp1252") == "Reading \\u2265.csv\n"


@pytest.mark.parametrize("is_watched", [False, True])
def test_progress_is_lines_with_the_time_left_in_a_log_and_a_bar_where_watched(is_watched, monkeypatch, log, capfd):
    monkeypatch.setattr(files, "SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr(files.logger, "handlers", [])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_watched)
    list(files.Progress(range(3), desc="counting", unit=" sheep", mininterval=0))
    bar = capfd.readouterr().err
    assert ("counting" in bar and "3/3" in bar) == is_watched and ("" == bar) == (not is_watched)
    assert all(words in log.text for words in ("counting", "of 3 sheep", " left")) == (not is_watched)


SAID = {
    "error: give other data": InputError("give other data"),
    "error: data.csv: No space left on device. Is the disk full": OSError(28, "No space left on device", "data.csv"),
    "error: the memory does not suffice (17 GiB)": MemoryError("17 GiB"),
    "Interrupted. The texts are kept.": KeyboardInterrupt(),
    "error: Truncated file in page 3. Is the disk full": OSError("Truncated file\n in page 3"),
    "error: TimeoutError. Is the disk full": TimeoutError(),
    "error: the memory does not suffice (MemoryError)": MemoryError(),
}


@pytest.mark.parametrize("words, error", SAID.items())
def test_error_that_a_person_can_mend_is_one_line(words, error, capfd):
    code = 130 if words.startswith("Interrupted") else 2
    assert files.exit_code(Mock(side_effect=error), lambda: "The texts are kept.") == code
    (line,) = capfd.readouterr().err.strip().split("\n")
    assert line.startswith(words)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_the_work_with_a_sentence_also_within_a_query(number, capfd, monkeypatch):
    """DuckDB makes a RuntimeError of it. Afterwards the signal means what it meant before."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)

    def query():
        threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
        duckdb.connect().execute("SELECT count(DISTINCT md5(range::VARCHAR)) FROM range(5_000_000)").fetchall()
        time.sleep(9)  # a fast machine is done before the signal comes

    assert files.exit_code(query, lambda: "The texts are kept.") == 128 + number
    assert capfd.readouterr().err == "\nInterrupted. The texts are kept.\n"
    assert (signal.signal(signal.SIGINT, before[0]), signal.getsignal(signal.SIGTERM))[1] == before[1]


def test_work_that_is_done_says_nothing_and_other_errors_keep_their_traceback(capfd):
    assert files.exit_code(lambda: "done", str) == 0 and capfd.readouterr().err == ""
    with pytest.raises(ZeroDivisionError):
        files.exit_code(lambda: 1 / 0, str)
