"""The launchers of several processes: one writer, each test stay once, encoding split between the processes."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from small_table import TINY, arguments, leftovers, run_python, small_table

import train
from clinical_lf.reading import read_stays
from clinical_lf.tables import split_by_patient

LAUNCHERS = yaml.safe_load(Path(__file__).with_name("launchers.yaml").read_text("utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("n_processes, options", [launcher.values() for launcher in LAUNCHERS])
def test_launcher_trains_with_one_writer_and_each_stay_once(n_processes, options, tmp_path, tiny_longformer):
    data = small_table()
    data["event_text"] = [f"Lab: Lactate | Value: {i} mmol/L" + " and so on" * (i % 40) for i in range(len(data))]
    data.to_csv(tmp_path / "data.csv", index=False)
    argv = arguments(tmp_path, tmp_path / "data.csv", encoder=tiny_longformer)
    said = run_python(*options.split(), train.__file__, *argv, folder=tmp_path)
    assert "on CPU, float32" in said and (", 2 processes" in said) == (n_processes == 2)
    assert said.count("epoch  1/1") == 1 and said.count("Written ") == 1
    predictions = pd.read_csv(tmp_path / "out" / "predictions.csv")
    content = json.loads((tmp_path / "out" / "metrics.json").read_text())
    test = split_by_patient(read_stays(tmp_path / "data.csv")[0], 0).test
    assert predictions.icu_stay_id.is_unique and len(predictions) == len(test) == content["metrics"]["test"]["n_stays"]
    assert len(list(tmp_path.glob("cache/*/part-*"))) == n_processes  # each process saved its share
    assert not leftovers(tmp_path)


@pytest.mark.slow
def test_two_processes_without_network_both_fall_back_to_hashing(tmp_path):
    """On the bundled sample, here a small one beside a copy of the program, with nobody at the hub's address."""
    program = Path(train.__file__).parent
    for name in ("train.py", "table.sql"):
        shutil.copy(program / name, tmp_path)
    shutil.copytree(program / "clinical_lf", tmp_path / "clinical_lf")
    small_table().to_csv(tmp_path / "sample_train.csv", index=False)
    hub_and_program = {"HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": str(tmp_path)}
    said = run_python(Path(__file__).parent / "processes" / "forked.py", *TINY, folder=tmp_path, **hub_and_program)
    assert said.count("read with the hashing encoder instead") == 2  # one warning of each process
    metrics = json.loads((tmp_path / "trained_models" / "clinical_LF" / "metrics.json").read_text())
    assert metrics["text_encoder"] == "hashing" and not leftovers(tmp_path / "trained_models")
