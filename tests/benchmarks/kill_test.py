"""Kill runs with SIGKILL at random moments, go on with --resume, and compare with the run that was never killed.

    python tests/benchmarks/kill_test.py --kills 20

A run reads a small table, encodes 1,200 texts with a tiny random Longformer and trains eight epochs on the CPU. After
each kill every cache part and checkpoint must load. When a run has ended, its weights and predictions must equal those
of the uninterrupted run bit for bit, no text may be saved twice, and no temporary file may be left.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = map(str, (Path(__file__).resolve().parents[1], Path(__file__).resolve().parents[2]))
from conftest import save_longformer  # noqa: E402
from small_table import arguments, leftovers, small_table  # noqa: E402

import train  # noqa: E402

EPOCHS = 8
KILLS_PER_RUN = 4


def start(argv, log):
    """A forked process that runs the program: its imports are done, so that kills meet work and not imports."""
    if pid := os.fork():
        return pid
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)
    train.ClinicalTextEncoder.flush_seconds = 0.05
    train.PLAN_CHUNK = 64
    signal.alarm(300)  # a run that hangs is a failure
    os._exit(train.main(argv))


def make_encoder(folder):
    """Made in a process of its own: this one must have no threads, whose locks a fork would copy."""
    if pid := os.fork():
        assert os.waitpid(pid, 0)[1] == 0
        return folder
    save_longformer(folder)
    os._exit(0)


def finish(argv, log):
    status = os.waitpid(start(argv, log), 0)[1]
    assert status == 0, f"the run ended with {os.waitstatus_to_exitcode(status)}:\n{Path(log).read_text()[-3000:]}"


def kill_after(seconds, argv, log):
    """Whether the run was still alive when it was killed."""
    pid = start(argv, log)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if not os.WIFSIGNALED(status):
        assert status == 0, f"a rerun failed:\n{Path(log).read_text()[-3000:]}"
    return os.WIFSIGNALED(status)


def checkpoints(folder):
    paths = sorted((folder / "out" / "checkpoints").glob("*.pth"))
    return {path.name: torch.load(path, weights_only=True) for path in paths}


def saved_keys(folder):
    """MD5 of each saved text, one row per row of every part; fails where a part is damaged."""
    keys = [np.load(path) for path in folder.glob("cache/*/part-*/keys.npy")]
    vectors = [np.load(path) for path in folder.glob("cache/*/part-*/vectors.npy")]
    assert sum(map(len, keys)) == sum(map(len, vectors)) and all(np.isfinite(array).all() for array in vectors)
    return np.concatenate(keys) if keys else np.zeros((0, 16), np.uint8)


def phase(folder):
    """What a kill met: the place is told by what the run had written."""
    states = checkpoints(folder)
    if not states:
        return "reading or encoding" if not len(saved_keys(folder)) else "encoding"
    return "reporting" if states["latest_checkpoint.pth"]["epochs_done"] == EPOCHS else "training"


def same(one, two):
    """Equal bit for bit, through dicts and lists, but for the seconds that an epoch took."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one if key != "seconds")
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def assert_same_result(folder, reference):
    ours, theirs = checkpoints(folder), checkpoints(reference)
    for name, state in theirs.items():
        parts = [part for part in state if part != "settings"]  # settings hold the folder's name and --resume
        differing = [part for part in parts if not same(ours[name][part], state[part])]
        assert not differing, f"{name} differs from that of the uninterrupted run: {', '.join(differing)}"
    assert (folder / "out" / "predictions.csv").read_bytes() == (reference / "out" / "predictions.csv").read_bytes()
    keys = saved_keys(folder)
    assert len(np.unique(keys, axis=0)) == len(keys), "a text was encoded that had been saved"
    assert not leftovers(folder), "a temporary file is left"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng, kills = random.Random(options.seed), []
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        table = small_table(60, 20)
        lactate = "Lab: Lactate (Blood, Blood Gas)"
        repeated = [" | Comment: repeated" * (i % 40) for i in range(len(table))]
        table["event_text"] = [f"{lactate} | Value: {i} mmol/L{more}" for i, more in enumerate(repeated)]
        table.to_csv(root / "data.csv", index=False)
        encoder = make_encoder(root / "encoder")
        options_of_all = ["--max-epochs", EPOCHS, "--patience", 99, "--batch-size", 2, "--resume"]
        run = lambda folder: arguments(folder, root / "data.csv", *options_of_all, encoder=encoder)
        started = time.monotonic()
        finish(run(root / "reference"), root / "log")
        whole = time.monotonic() - started
        runs = 0
        while len(kills) < options.kills:
            folder, runs = root / f"run_{runs}", runs + 1
            if runs % 2 == 0:  # every second run finds its texts encoded, so that kills meet the training
                shutil.copytree(root / "reference" / "cache", folder / "cache")
            for _ in range(min(KILLS_PER_RUN, options.kills - len(kills))):
                if not kill_after(rng.uniform(0, (0.3 if runs % 2 == 0 else 0.5) * whole), run(folder), root / "log"):
                    break
                kills.append(phase(folder))
            finish(run(folder), root / "log")
            assert_same_result(folder, root / "reference")
    counts = {name: kills.count(name) for name in sorted(set(kills))}
    found = {"kills": len(kills), "runs": runs, "during": counts, "seconds_of_an_uninterrupted_run": round(whole, 1)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
