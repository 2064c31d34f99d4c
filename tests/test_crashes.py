"""Killed runs end as if they had not been killed; a full disk, Ctrl-C, a second run and a loss of NaN are clear."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_table import arguments, best_model, leftovers, small_table

import train
from clinical_lf.files import HALF_WRITTEN

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def data(tmp_path):
    small_table().to_csv(tmp_path / "data.csv", index=False)
    return tmp_path / "data.csv"


@pytest.mark.slow
def test_killed_runs_end_with_the_bits_of_the_run_that_was_never_killed():
    """Three kills at random moments; kill_test.py checks weights, predictions, saved texts and temporary files."""
    script = Path(__file__).parent / "benchmarks" / "kill_test.py"
    command = [sys.executable, script, "--kills", "3", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["kills"] == 3


def epochs_done(folder: Path) -> int:
    """Return how many epochs the latest checkpoint has behind it, -1 where there is none."""
    path = folder / "out" / "checkpoints" / "latest_checkpoint.pth"
    return torch.load(path, weights_only=True)["epochs_done"] if path.exists() else -1


@pytest.mark.slow
def test_second_run_is_refused_and_ctrl_c_says_how_to_go_on(data, tmp_path, capfd):
    """While a run trains, another into its folder is refused; after Ctrl-C, --resume takes up the last checkpoint."""
    argv = arguments(tmp_path, data, "--max-epochs", 9999, "--patience", 9999)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, train.__file__, *argv], env=ENVIRONMENT, **pipes)
    end = time.monotonic() + 60
    while epochs_done(tmp_path) < 1:
        if process.poll() is not None or time.monotonic() > end:
            process.kill()  # a child that lives would keep its pipes open, and communicate() waiting
            pytest.fail(f"the process never came that far: {process.communicate()}")
        time.sleep(0.02)
    assert train.main(argv) == 2 and "another run writes here" in capfd.readouterr().err
    process.send_signal(signal.SIGINT)
    stderr, reached = process.communicate(timeout=30)[1], epochs_done(tmp_path)
    assert process.returncode == 130 and "go on with the same command and --resume" in stderr
    assert "latest_checkpoint.pth holds the last whole epoch" in stderr and "Traceback" not in stderr
    assert not leftovers(tmp_path / "out")
    assert train.main(arguments(tmp_path, data, "--max-epochs", reached + 1, "--patience", 9999, "--resume")) == 0
    assert epochs_done(tmp_path) == reached + 1


def test_resume_without_a_checkpoint_starts_at_the_first_epoch_and_says_so(data, tmp_path, capfd):
    assert train.main(arguments(tmp_path, data, "--resume")) == 0
    assert "training starts at epoch 1" in capfd.readouterr().out and epochs_done(tmp_path) == 1


def test_cross_validation_goes_on_with_the_fold_it_was_stopped_in(data, tmp_path):
    argv = arguments(tmp_path, data, "--cross-validate", 2)
    assert train.main(argv) == 0
    expected = (tmp_path / "out" / "predictions.csv").read_bytes()
    for path in (tmp_path / "out" / "fold_2").rglob("*.pth"):
        path.unlink()
    assert train.main([*argv, "--resume"]) == 0
    assert (tmp_path / "out" / "predictions.csv").read_bytes() == expected


def test_what_a_killed_run_left_half_written_is_removed_by_the_next(data, tmp_path):
    folder = tmp_path / "out" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / f".0a1b2c3d{HALF_WRITTEN}best_model.pth").write_bytes(b"half")
    (folder / ".mine").write_text("not the program's")
    assert train.main(arguments(tmp_path, data)) == 0
    assert leftovers(tmp_path / "out") == [folder / ".mine"]


def test_same_seed_gives_the_same_bits(finished, tmp_path):
    assert train.main(arguments(tmp_path, finished / "data.csv")) == 0
    first, second = (torch.load(best_model(folder), weights_only=True)["model"] for folder in (finished, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)


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


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a tmpfs of so many kB and returns its folder."""

    def mount(kilobytes):
        folder = tmp_path / f"disk_{kilobytes}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs the right to mount a tmpfs")
        unmounting.callback(subprocess.run, ["umount", folder], check=True)
        return folder

    with contextlib.ExitStack() as unmounting:
        yield mount


@pytest.mark.parametrize(
    "option, kilobytes", [("--output-dir", 64), ("--output-dir", 600), ("--output-dir", 1500), ("--cache-dir", 16)]
)
def test_full_disk_is_a_clear_error_and_leaves_no_half(option, kilobytes, data, tmp_path, small_disk, capfd):
    folder = small_disk(kilobytes)
    assert train.main(arguments(tmp_path, data, option, folder)) == 2
    message = capfd.readouterr().err.split("error: ")[-1]
    assert "No space left" in message or "cannot be written" in message or "Is the disk full?" in message
    assert "Traceback" not in message and not leftovers(folder)
    for path in folder.rglob("*.pth"):
        train.load_checkpoint(path)


def test_full_disk_under_the_query_is_a_clear_error(tmp_path, small_disk, capfd):
    from test_mimic import broken_mimic

    broken_mimic(tmp_path / "mimic")
    (tmp_path / "mimic" / "icu" / "icustays.csv").write_text(
        "subject_id,hadm_id,stay_id,intime,outtime,los,first_careunit,last_careunit\n"
        "1,2,3,2150-01-01 00:00:00,2150-01-02 00:00:00,1,MICU,MICU\n"
    )
    folder = small_disk(8)
    assert train.main(arguments(tmp_path, tmp_path / "mimic", "--cache-dir", folder)) == 2
    message = capfd.readouterr().err
    assert "query.sql stopped (IOException)" in message and "Traceback" not in message and not leftovers(folder)
