"""What a run writes into its folder: predictions in words, plain JSON, and nothing that an earlier run left."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from clinical_lf.metrics import thresholds_of
from clinical_lf.run_folder import Predictions, RunFolder, moment_of_prediction
from clinical_lf.tables import LABEL


def test_predictions_say_who_they_are_of_and_give_their_columns():
    stays = pd.DataFrame({"icu_stay_id": range(3), "patient_id": [1, 1, 2], LABEL: [1.0, 1, 0]})
    known = Predictions(stays, expit([0.0, 1, -1]), {})
    labels, risks, patients = known.columns
    assert labels.tolist() == [1, 1, 0] and patients.tolist() == [1, 1, 2]
    assert risks == pytest.approx([0.5, 0.731, 0.269], abs=1e-3)
    few = "(too few to read: 1 stays of one outcome, below 10)"
    assert known.words("test") == f"3 test stays of 2 patients, 2 deaths {few}"
    many = Predictions(pd.concat([stays] * 10, ignore_index=True), np.tile(risks, 10), {})
    assert many.words() == "30 stays of 2 patients, 20 deaths"


def test_moment_of_prediction_is_said_in_a_sentence():
    wanted = {"foresees nothing": (0, ""), "24 h after": (24.0, ""), "each MEDS label": (0, "x@24h")}
    for words, given in wanted.items():
        assert words in moment_of_prediction(*given) and moment_of_prediction(*given).endswith(".")


def test_json_has_null_for_nan_and_infinity_however_deep(tmp_path):
    content = {"a": [math.nan, {"b": (math.inf, 1.5)}], "c": "nan", "d": -math.inf, "e": 0}
    plain = {"a": [None, {"b": [None, 1.5]}], "c": "nan", "d": None, "e": 0}
    RunFolder(tmp_path, {"n_bootstrap": 1, "seed": 0}).json("x.json", content)
    assert json.loads((tmp_path / "x.json").read_text()) == plain


@pytest.mark.parametrize("what", ["resumed", "finished", "without a model", "of the sample", "of another sample"])
def test_begin_moves_a_finished_run_aside_and_removes_any_other_and_nothing_else(what, tmp_path, monkeypatch):
    """With the whole of the folders that are the program's own; a table may have the sample's name."""
    left = ["run.json", "settings.yaml", "checkpoints/best_model.pth", "plots/calibration.png", "predictions.parquet"]
    left += ["evaluation/predictions.csv", "explainability/report.html", "fold_2/run.json", "seed_3/x.csv", "seeds.csv"]
    others = ["notes.csv", "notes/run.json", "plots/mine.png", "checkpoints/mine.pt", "seed_of_mine/model.pth"]
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


def test_figures_are_logged_with_intervals_and_prevalence(tmp_path, log):
    stays = pd.DataFrame({"icu_stay_id": range(40), "patient_id": range(40), LABEL: np.arange(40) % 4 == 0})
    stays = stays.assign(patient_gender="F", patient_age=50, patient_race="WHITE", first_icu_careunit="MICU")
    risks, settings = np.linspace(0.1, 0.9, 40), {"n_bootstrap": 50, "seed": 0, "outcome": "hospital", "labels": ""}
    scored = Predictions(stays, risks, thresholds_of(stays[LABEL], risks))
    RunFolder(tmp_path, settings).write_evaluation(scored, scored, "", "Test        40 stays")
    assert "40 stays; in brackets 95 % intervals" in log.text and "at prevalence 0.250" in log.text
