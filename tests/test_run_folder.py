"""What a run writes into its folder: predictions in words, plain JSON, and nothing that an earlier run left."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from clinical_lf.files import logger
from clinical_lf.metrics import evaluate_predictions
from clinical_lf.run_folder import LEFT_BY_A_RUN, Predictions, RunFolder, log_metrics, moment_of_prediction, without_nan
from clinical_lf.tables import LABEL


@pytest.fixture
def predictions():
    stays = pd.DataFrame({"icu_stay_id": range(4), "patient_id": [1, 1, 2, 3], LABEL: [1.0, 1, 0, np.nan]})
    return Predictions(stays, expit([0.0, 1, -1, 2]))


def test_predictions_are_risks_in_the_order_of_the_stays_and_say_who_they_are_of(predictions):
    assert predictions.probabilities == pytest.approx([0.5, 0.731, 0.269, 0.881], abs=1e-3)
    known = predictions.take(np.array([True, True, True, False]))
    labels, risks, patients = known.columns
    assert labels.tolist() == [1, 1, 0] and risks[2] == predictions.probabilities[2] and patients.tolist() == [1, 1, 2]
    few = "(too few to read: 1 stays of one outcome, below 10)"
    assert known.words("test") == f"3 test stays of 2 patients, 2 deaths {few}"
    many = Predictions(pd.concat([known.stays] * 10, ignore_index=True), np.tile(known.probabilities, 10))
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


@pytest.mark.parametrize("resume", [False, True])
def test_begin_removes_what_an_earlier_run_left_and_nothing_else_unless_it_resumes(tmp_path, resume):
    left = [pattern.replace("*", "1") for pattern in LEFT_BY_A_RUN]
    folders = ["evaluation/run.json", "explainability/report.html", "fold_2/run.json", "seed_3/run.json"]
    folders += ["evaluation/predictions.csv", "explainability/stays.csv"]  # with all that is in them
    others = ["notes.csv", "notes/run.json", "plots/mine.png", "fold_9/notes.csv", "checkpoints/best_model.pth"]
    for name in (*left, *folders, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    RunFolder(tmp_path, {"n_bootstrap": 1, "seed": 7, "resume": resume, "dry_run": False}).begin(resume)
    assert [name for name in (*left, *folders) if (tmp_path / name).exists()] == ([*left, *folders] if resume else [])
    assert all((tmp_path / name).exists() for name in others)
    assert (tmp_path / "settings.yaml").read_text() == "n_bootstrap: 1\nseed: 7\n"
    assert {"command", "date", "commit", "versions"} == set(json.loads((tmp_path / "run.json").read_text()))


def test_figures_are_logged_with_intervals_and_prevalence(monkeypatch):
    said, stays = [], np.arange(40)
    monkeypatch.setattr(logger, "info", said.append)
    log_metrics(evaluate_predictions(stays % 4 == 0, np.linspace(0.1, 0.9, 40), stays, 50), "Test        40 stays")
    assert "40 stays; in brackets 95 % intervals" in said[0] and "at prevalence 0.250" in "".join(said)
