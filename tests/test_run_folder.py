"""What a run writes into its folder: predictions in words, plain JSON, and nothing that an earlier run left."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from clinical_lf.files import logger
from clinical_lf.metrics import evaluate_predictions
from clinical_lf.run_folder import Predictions, RunFolder, log_metrics, moment_of_prediction, without_nan
from clinical_lf.tables import LABEL


@pytest.fixture
def predictions():
    stays = pd.DataFrame({"icu_stay_id": range(4), "patient_id": [1, 1, 2, 3], LABEL: [1.0, 1, 0, np.nan]})
    return Predictions(stays, expit([0.0, 1, -1, 2]), {})


def test_predictions_are_risks_in_the_order_of_the_stays_and_say_who_they_are_of(predictions):
    assert predictions.probabilities == pytest.approx([0.5, 0.731, 0.269, 0.881], abs=1e-3)
    known = predictions.take(np.array([True, True, True, False]))
    labels, risks, patients = known.columns
    assert labels.tolist() == [1, 1, 0] and risks[2] == predictions.probabilities[2] and patients.tolist() == [1, 1, 2]
    few = "(too few to read: 1 stays of one outcome, below 10)"
    assert known.words("test") == f"3 test stays of 2 patients, 2 deaths {few}"
    many = Predictions(pd.concat([known.stays] * 10, ignore_index=True), np.tile(known.probabilities, 10), {})
    assert many.words() == "30 stays of 2 patients, 20 deaths"


@pytest.mark.parametrize(
    "hours, labels, words", [(0, "", "foresees nothing"), (24.0, "", "24 h after"), (0, "x@24h", "each MEDS label")]
)
def test_moment_of_prediction_is_said_in_a_sentence(hours, labels, words):
    assert words in moment_of_prediction(hours, labels) and moment_of_prediction(hours, labels).endswith(".")


def test_json_has_null_for_nan_and_infinity_however_deep(tmp_path):
    content = {"a": [math.nan, {"b": (math.inf, 1.5)}], "c": "nan", "d": -math.inf, "e": 0}
    plain = {"a": [None, {"b": [None, 1.5]}], "c": "nan", "d": None, "e": 0}
    RunFolder(tmp_path, {"n_bootstrap": 1, "seed": 0}).json("x.json", content)
    assert without_nan(content) == json.loads((tmp_path / "x.json").read_text()) == plain


@pytest.mark.parametrize("what", ["resumed", "finished", "without a model", "of the sample", "of another sample"])
def test_begin_moves_a_finished_run_aside_and_removes_any_other_and_nothing_else(what, tmp_path, monkeypatch):
    """With the whole of the folders that are the program's own; a table may have the sample's name."""
    left = ["run.json", "settings.yaml", "checkpoints/best_model.pth", "plots/mine.png", "predictions.parquet"]
    left += ["evaluation/predictions.csv", "explainability/report.html", "fold_2/run.json", "seed_3/x.csv", "seeds.csv"]
    others = ["notes.csv", "notes/run.json", "seed_of_mine/model.pth", "folder/x.csv"]
    for name in (*left, *others):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("data: sample_train.csv\n" if "sample" in what else "data: mine.csv\n")
    for model in (tmp_path / "out").rglob("best_model.pth") if what == "without a model" else ():
        model.unlink()
    monkeypatch.chdir(tmp_path)
    if what == "of another sample":
        (tmp_path / "sample_train.csv").touch()
    before = [name for name in left if (tmp_path / "out" / name).exists()]
    given = {"n_bootstrap": 1, "seed": 7, "resume": what == "resumed", "dry_run": False}
    RunFolder(Path("out"), given).begin(what == "resumed")
    new = ["run.json", "settings.yaml"]
    assert [name for name in left if (tmp_path / "out" / name).exists()] == (before if what == "resumed" else new)
    aside = list(tmp_path.glob("out-????-??-??-??????"))
    assert len(aside) == (what in ("finished", "of another sample"))
    assert all((place / name).exists() for place in aside for name in left)
    assert all((tmp_path / "out" / name).exists() for name in others)
    assert (tmp_path / "out" / "settings.yaml").read_text() == "n_bootstrap: 1\nseed: 7\n"
    assert {"command", "date", "commit", "versions"} == set(json.loads((tmp_path / "out" / "run.json").read_text()))


def test_figures_are_logged_with_intervals_and_prevalence(monkeypatch):
    said, stays = [], np.arange(40)
    monkeypatch.setattr(logger, "info", said.append)
    log_metrics(evaluate_predictions(stays % 4 == 0, np.linspace(0.1, 0.9, 40), stays, 50), "Test        40 stays")
    assert "40 stays; in brackets 95 % intervals" in said[0] and "at prevalence 0.250" in "".join(said)
