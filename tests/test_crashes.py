"""Killed runs end as if they had not been killed; a full disk, Ctrl-C, a second run and a loss of NaN are clear."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_table import arguments, best_model, leftovers, run_python, small_table
from test_mimic import HEADERS, broken_mimic

import train
from clinical_lf.files import HALF_WRITTEN


@pytest.fixture
def data(tmp_path):
    small_table().to_csv(tmp_path / "data.csv", index=False)
    return tmp_path / "data.csv"


@pytest.mark.slow
def test_killed_runs_end_with_the_bits_of_the_run_that_was_never_killed():
    """Three kills at random moments; kill_test.py checks weights, predictions, saved texts and temporary files."""
    script = Path(__file__).parent / "benchmarks" / "kill_test.py"
    assert json.loads(run_python(script, "--kills", 3, "--seed", 3).splitlines()[-1])["kills"] == 3


def epochs_done(folder: Path) -> int:
    """Return how many epochs the latest checkpoint has behind it, -1 where there is none."""
    path = folder / "out" / "checkpoints" / "latest_checkpoint.pth"
    return torch.load(path, weights_only=True)["epochs_done"] if path.exists() else -1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_run_is_refused_and_a_stopped_one_says_how_to_go_on(number, data, tmp_path, capfd, request):
    """While a run trains, another into its folder is refused; after Ctrl-C, --resume takes up the last checkpoint."""
    argv = arguments(tmp_path, data, "--max-epochs", 9999, "--patience", 9999)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in a shell's background ignores it
    process = subprocess.Popen([sys.executable, train.__file__, *argv], text=True, **pipes)
    signal.signal(signal.SIGINT, before)
    request.addfinalizer(process.kill)  # also where the test fails
    end = time.monotonic() + 60
    while epochs_done(tmp_path) < 1:
        if process.poll() is not None or time.monotonic() > end:
            process.kill()  # a child that lives would keep its pipes open, and communicate() waiting
            pytest.fail(f"the process never came that far: {process.communicate()}")
        time.sleep(0.02)
    assert train.main(argv) == 2 and "another run writes here" in capfd.readouterr().err
    process.send_signal(number)
    stderr, reached = process.communicate(timeout=30)[1], epochs_done(tmp_path)
    assert process.returncode == 128 + number and "go on with the same command and --resume" in stderr
    assert "latest_checkpoint.pth holds the last whole epoch" in stderr and "Traceback" not in stderr
    assert not leftovers(tmp_path / "out")
    assert train.main(arguments(tmp_path, data, "--max-epochs", reached + 1, "--patience", 9999, "--resume")) == 0
    assert epochs_done(tmp_path) == reached + 1


@pytest.mark.slow
def test_cross_validation_goes_on_with_the_fold_it_was_stopped_in(data, tmp_path):
    argv, predictions = arguments(tmp_path, data, "--cross-validate", 2), tmp_path / "out" / "predictions.csv"
    assert train.main(argv) == 0
    expected = predictions.read_bytes()
    for path in (tmp_path / "out" / "fold_2").rglob("*.pth"):
        path.unlink()
    assert train.main([*argv, "--resume"]) == 0 and predictions.read_bytes() == expected


def test_resume_without_a_checkpoint_says_so_and_starts_anew_without_what_a_killed_run_left(data, tmp_path, capfd):
    folder = tmp_path / "out" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / f".0a1b2c3d{HALF_WRITTEN}best_model.pth").write_bytes(b"half")
    (folder / ".mine").write_text("not the program's")
    assert train.main(arguments(tmp_path, data, "--resume")) == 0 and epochs_done(tmp_path) == 1
    assert "training starts at epoch 1" in capfd.readouterr().out and leftovers(tmp_path / "out") == [folder / ".mine"]


def test_run_into_the_folder_of_a_finished_one_moves_all_of_that_aside_once_it_begins(finished, tmp_path, capfd):
    out = shutil.copytree(finished / "out", tmp_path / "out")
    (out / "notes.csv").write_text("not the program's")
    mine = {".lock", "notes.csv"}
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} - mine
    best = best_model(tmp_path).read_bytes()
    assert train.main(arguments(tmp_path, "mistyped.csv")) == 2 and best_model(tmp_path).read_bytes() == best
    assert train.main(arguments(tmp_path, finished / "data.csv", "--seed", 1)) == 0
    (aside,) = tmp_path.glob("out-2*")
    assert f"Moved       the run that was in {out} to {aside}\n" in capfd.readouterr().out
    assert {str(path.relative_to(aside)) for path in aside.rglob("*") if path.is_file()} == names
    assert (aside / "checkpoints" / "best_model.pth").read_bytes() == best != best_model(tmp_path).read_bytes()
    assert all((out / name).exists() for name in mine)


def test_loss_of_nan_stops_at_most_a_step_later_and_keeps_the_best_checkpoint(data, tmp_path, capfd, monkeypatch):
    assert train.main(arguments(tmp_path, data, "--batch-size", 3)) == 0
    best, forward, steps = best_model(tmp_path).read_bytes(), train.TrainingObjective.forward, []

    def spoiled(self, batch, time_column):
        steps.append(len(batch.labels))
        losses = forward(self, batch, time_column)
        return losses + torch.where((torch.arange(len(losses)) == 2) & (len(steps) == 3), torch.nan, 0.0)

    monkeypatch.setattr(train.TrainingObjective, "forward", spoiled)
    capfd.readouterr()
    assert train.main(arguments(tmp_path, data, "--batch-size", 3, "--max-epochs", 2, "--resume")) == 2
    assert steps == [3, 3, 3, 3]  # of nine; the third has the stay without a loss
    message = capfd.readouterr().err
    assert "the loss is not finite for icu_stay_id 300000" in message
    assert "," not in message.split("icu_stay_id")[1].split(".")[0]  # one stay
    assert best_model(tmp_path).read_bytes() == best and epochs_done(tmp_path) == 1


STAY = f"{HEADERS['icustays']}\n1,2,3,MICU,MICU,2150-01-01 00:00:00,2150-01-02 00:00:00,1"
FULL, STOPPED = r"No space left|cannot be written|Is the disk full\?", r"query.sql stopped \(IOException\)"
SMALL_DISKS = [("--output-dir", size, "data.csv", FULL) for size in (64, 600, 1500)]
SMALL_DISKS += [("--cache-dir", 16, "data.csv", FULL), ("--cache-dir", 8, "mimic", STOPPED)]


@pytest.mark.parametrize("option, size, source, words", SMALL_DISKS)
def test_full_disk_is_a_clear_error_and_leaves_no_half(option, size, source, words, data, tmp_path, request, capfd):
    folder = tmp_path / f"disk_{size}"  # a tmpfs of so many kB
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    request.addfinalizer(lambda: subprocess.run(["umount", folder], check=True))
    broken_mimic(tmp_path / "mimic", icustays=STAY)
    assert train.main(arguments(tmp_path, tmp_path / source, option, folder)) == 2
    message = capfd.readouterr().err
    assert re.search(words, message) and "Traceback" not in message and not leftovers(folder)
    for path in folder.rglob("*.pth"):
        train.load_checkpoint(path)
