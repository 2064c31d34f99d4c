"""The entry for the MEDS-DEV benchmark: its commands, filled in as there, train and predict the labels of a split."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from test_meds import PARTS, make_hospital

import train
from clinical_lf.settings import cli_name

ENTRY = Path(__file__).resolve().with_name("meds_dev")
MODEL = yaml.safe_load((ENTRY / "model.yaml").read_text("utf-8"))
COMMANDS = MODEL["commands"]["supervised"]
PLACES = "dataset_dir labels_dir output_dir model_dir demo split model_initialization_dir".split()  # that it fills in


def test_entry_has_the_benchmarks_keys_and_its_commands_only_options_and_places_that_there_are():
    said, known = MODEL["metadata"], {*map(cli_name, train.Settings.__dataclass_fields__)}
    assert [*MODEL] == ["metadata", "commands"] and [*said] == ["description", "links", "contacts"]
    assert [[*contact] for contact in said["contacts"]] == [["name"]] and "https://" in said["links"][0]
    commands = "".join(COMMANDS.values()).format(**dict.fromkeys(PLACES))
    assert {"--data", "--evaluate"} < {*re.findall(r"--[a-z][\w-]*", commands)} < known


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the benchmark runs its commands in bash")
def test_filled_in_commands_train_and_predict_exactly_the_labels_of_the_held_out_subjects(tmp_path):
    schema, arrow = pytest.importorskip("meds_evaluation.schema"), pytest.importorskip("pyarrow")
    root, labels = make_hospital(tmp_path / "a hospital"), tmp_path / "labels"
    given = pd.read_parquet(root / "labels.parquet")
    labels.mkdir()
    given.to_parquet(labels / "0.parquet")  # of all subjects, as the benchmark's extraction of a task writes them
    held_out = given[[PARTS[i // 3 % 5] == "held_out" for i in range(60)]].reset_index(drop=True)
    folders = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ENTRY.parent.parent)}
    places = {"dataset_dir": root, "labels_dir": labels, "model_dir": ENTRY, "demo": True, "split": "held_out"}
    for mode, command in COMMANDS.items():
        script = ["bash", "-c", f"set -e\n{command.format(**places, output_dir=tmp_path / mode)}"]
        subprocess.run(script, cwd=tmp_path, env=os.environ | folders, check=True)
        places["model_initialization_dir"] = tmp_path / mode
    (written,) = (tmp_path / "predict").rglob("*.parquet")  # the benchmark scores whatever is there
    predictions = pd.read_parquet(written).sort_values("subject_id", ignore_index=True)
    pd.testing.assert_frame_equal(predictions[[*held_out]].astype(held_out.dtypes), held_out)
    schema.PredictionSchema.align(arrow.Table.from_pandas(predictions))
