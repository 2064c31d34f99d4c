"""The launchers of several processes: one writer, each test stay once, encoding split between the processes."""

import json
import os
import subprocess
import sys

import pandas as pd
import pytest
from small_table import arguments, leftovers, small_table

import train

# Without MPI, accelerate's --cpu starts one process whatever --num_processes says; --multi_gpu starts them all, on CPUs too.
LAUNCHERS = {
    "accelerate launch --cpu": (
        1,
        [
            "-m",
            "accelerate.commands.launch",
            "--cpu",
            "--num_processes",
            "2",
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
        ],
    ),
    "accelerate launch --multi_gpu": (
        2,
        [
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            "29531",
        ],
    ),
    "torchrun": (2, ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29532"]),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launcher_trains_with_one_writer_and_each_stay_once(launcher, tmp_path, tiny_longformer):
    n_processes, command = LAUNCHERS[launcher]
    data = small_table()
    data["event_text"] = [f"Lab: Lactate | Value: {i} mmol/L" + " and so on" * (i % 40) for i in range(len(data))]
    data.to_csv(tmp_path / "data.csv", index=False)
    argv = arguments(tmp_path, tmp_path / "data.csv", encoder=tiny_longformer)
    done = subprocess.run(
        [sys.executable, *command, train.__file__, *argv],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        f"on {n_processes} x cpu" in done.stdout
        and done.stdout.count("epoch  1/1") == 1
        and done.stdout.count("Written ") == 1
    )
    predictions, content = (
        pd.read_csv(tmp_path / "out" / "predictions.csv"),
        json.loads((tmp_path / "out" / "metrics.json").read_text()),
    )
    test = train.split_by_patient(train.read_stays(tmp_path / "data.csv")[0], 0).test
    assert predictions.icu_stay_id.is_unique and len(predictions) == len(test) == content["metrics"]["test"]["n_stays"]
    assert len(list(tmp_path.glob("cache/*/part-*"))) == n_processes and not leftovers(
        tmp_path
    )  # each process saved its share
