"""MEDS in and out, on tiny data sets made here: a label row becomes a stay, predictions go back in that standard."""

import datetime
import json
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from small_table import TINY, best_model

import train
from clinical_lf.files import InputError
from clinical_lf.meds import MedsTask, meds_split
from clinical_lf.reading import read_stays
from clinical_lf.tables import LABEL

T0 = datetime.datetime(2150, 1, 1)
CREATININE = "LAB//50912//mg/dL"
hours = lambda number: None if number is None else T0 + datetime.timedelta(hours=number)
TYPES = {"time": "datetime64[us]", "prediction_time": "datetime64[us]", "numeric_value": "float32", "code": str}
CASES = yaml.safe_load(Path(__file__).with_name("meds_cases.yaml").read_text("utf-8"))
PARTS = ("train", "train", "train", "tuning", "held_out")


def typed(frame, types, as_text=()):
    """The columns in these types; times are those of UTC."""
    kinds = {name: "str" if name in as_text else types[name] for name in frame if name in types}
    zoned = {name: pd.to_datetime(frame[name], utc=True) for name, kind in kinds.items() if "," in str(kind)}
    return frame.assign(**zoned).astype(kinds)


def write_meds(root, rows, labels=None, codes=(), types=TYPES):
    """A MEDS data set of these rows, and the file of its labels (subject, hour, value)."""
    for folder in ("data/train", "metadata"):
        (root / folder).mkdir(parents=True)
    typed(pd.DataFrame(rows), types).to_parquet(root / "data" / "train" / "0.parquet")
    pd.DataFrame(list(codes), columns=["code", "description"]).astype(str).to_parquet(root / "metadata/codes.parquet")
    if labels is not None:
        labels = [(subject, hours(hour), value) for subject, hour, value in labels]
        labels = pd.DataFrame(labels, columns=["subject_id", "prediction_time", "boolean_value"])
        typed(labels, types).to_parquet(root / "labels.parquet")
    return root


def lab(subject, hour, number, code=CREATININE, **more):
    """A row at an hour; None is no time."""
    return {"subject_id": subject, "time": hours(hour), "code": code, "numeric_value": number, **more}


def read(root, labels=None, **hours):
    """The stays of a data set, and the report of reading it."""
    return read_stays(root, root / "cache", task=MedsTask(str(labels or root / "labels.parquet"), **hours))


def test_each_label_of_a_subject_is_a_stay_that_ends_with_the_prediction_and_times_count_to_it(tmp_path):
    root = write_meds(tmp_path, [lab(1, h, h) for h in (1, 2, 5, 5.01)], [(1, 5, True), (1, 2, False)])
    table, report = read(root)
    assert table.lengths.tolist() == [2, 3] and table.minutes_to_end.tolist() == [60, 0, 240, 180, 0]
    assert table.known_minutes_since_intime.tolist() == table.minutes_since_intime.tolist() == [0, 60, 0, 60, 240]
    assert table.labels.tolist() == [0, 1] and not report.counts
    assert table.stays["patient_id"].tolist() == [1, 1] and table.stays["icu_stay_id"].is_unique
    assert read(root, history_hours=4)[0].minutes_to_end.tolist() == [60, 0, 180, 0]  # the last hours alone


def test_static_columns_are_those_known_at_the_prediction(tmp_path):
    rows = [lab(1, None, None, "GENDER//F"), lab(1, -24 * 365.25 * 60, None, "MEDS_BIRTH")]
    rows += [lab(1, 0, None, "HOSPITAL_ADMISSION//URGENT//ED", race="WHITE"), lab(1, 1, None, "ICU_ADMISSION//MICU")]
    rows += [lab(1, 9, None, "ICU_ADMISSION//SICU", race="later")]
    stay = read(write_meds(tmp_path, rows, [(1, 5, False)]))[0].stays.loc[0]
    names = "patient_gender patient_age patient_race admission_type admission_location first_icu_careunit".split()
    assert stay[names].tolist() == ["F", 60, "WHITE", "URGENT", "ED", "MICU"]
    assert pd.isna(stay["icu_length_of_stay_in_days"])


@pytest.mark.parametrize("outcome", ["in-hospital", "in-icu", "within-30d"])
def test_made_labels_say_their_outcome_of_stays_that_last(outcome, tmp_path):
    rows, wanted = [], {"ended": [], None: []}
    for subject, case in enumerate(CASES["made_labels"].values()):
        wanted.setdefault(case[outcome.split("-")[1]], []).append(subject)
        for hour, codes in case["events"].items():
            rows += [lab(subject, hour, None, code) for code in np.atleast_1d(codes)]
    root = write_meds(tmp_path, rows)
    table, report = read(root, labels=f"mortality-{outcome}@24h")
    stays = table.stays[table.stays["icu_outtime"] < hours(100)]
    assert stays.groupby(LABEL)["patient_id"].agg(list).to_dict() == {label: wanted[label] for label in (0, 1)}
    assert report.counts["label_of_ended_stay"] == len(wanted["ended"]) == 2
    assert report.counts.get("label_untold", 0) == len(wanted[None])
    with pytest.raises(InputError, match="no ICU stay lasts 924 h"):
        read(root, labels=f"mortality-{outcome}@24h", gap_hours=900)


def test_label_at_or_after_the_death_is_left_out_and_counted(tmp_path):
    rows = [lab(1, 1, 2.4), lab(1, 5, None, "MEDS_DEATH"), lab(2, 1, 2.4)]
    table, report = read(write_meds(tmp_path, rows, [(1, 6, True), (1, 5, True), (1, 4, True), (2, 4, False)]))
    assert table.stays["patient_id"].tolist() == [1, 2] and report.counts == {"label_after_death": 2}


@pytest.mark.parametrize("name", CASES["read"] | CASES["refused"])
def test_data_set_of_somebody_else_is_read_or_refused_in_a_sentence(name, tmp_path):
    case = (CASES["read"] | CASES["refused"])[name]
    rows = [lab(1, row.pop("hour", 1), row.pop("numeric_value", None), **row) for row in case.get("rows", [{}])]
    types = TYPES | case.get("types", {})
    root = write_meds(tmp_path / "meds", rows, [(1, 9, True)], case.get("codes", {}).items(), types)
    for name, content in case.get("files", {}).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.unlink()
        elif isinstance(content, dict):
            typed(pd.DataFrame(content), types, case.get("as_text", ())).to_parquet(path)
        elif content.startswith("-> "):
            os.symlink(path.rename(root.parent / "disk[2]"), path)
        else:
            path.write_text(content)
    if "says" in case:
        with pytest.raises(InputError, match=case["says"]):
            read(root)
    else:
        table, report = read(root)
        assert table.texts[table.text].tolist() == case["texts"]
        assert table.event_type.tolist() == case.get("event_types", table.event_type.tolist())
        (account,) = report.sources
        assert account.read == account.in_stays + sum(account.lost.values())


def test_meds_without_labels_and_labels_without_meds_are_refused(tmp_path):
    root = write_meds(tmp_path / "meds", [lab(1, 1, 2.4)])
    for data, task in ((root, None), (train.SAMPLE, MedsTask("mortality-in-icu@24h"))):
        with pytest.raises(InputError, match="a MEDS data set .* and --labels go together"):
            read_stays(data, tmp_path / "cache", task=task)


def make_hospital(root):
    """A hospital of 60 subjects whose deaths follow from lactate, with a split of its own."""
    rng, rows = np.random.default_rng(0), []
    for subject in range(60):
        values = rng.normal(2 if subject % 3 else 6, 0.5, 4).clip(0.5)
        rows += [lab(subject, hour, value, "LAB//lactate//mmol/L") for hour, value in enumerate(values)]
    write_meds(root, rows, [(subject, 10, subject % 3 == 0) for subject in range(60)])
    splits = pd.DataFrame({"subject_id": range(60), "split": [PARTS[subject // 3 % 5] for subject in range(60)]})
    splits.to_parquet(root / "metadata" / "subject_splits.parquet")
    return root


hospital = pytest.fixture(lambda tmp_path_factory: make_hospital(tmp_path_factory.mktemp("hospital")), scope="module")
table = pytest.fixture(lambda hospital: read(hospital)[0], scope="module")


def run(root, *options):
    places = ["--data", root, "--labels", root / "labels.parquet", "--cache-dir", root / "cache"]
    assert train.main([*TINY, "--no-baseline", "--text-encoder", "hashing", *map(str, [*places, *options])]) == 0


def test_data_sets_own_split_is_used_and_predictions_are_in_its_schema(hospital, tmp_path, capsys):
    run(hospital, "--output-dir", tmp_path / "out")
    predictions = pd.read_parquet(tmp_path / "out" / "predictions.parquet").sort_values("subject_id")
    held_out = [subject for subject in range(60) if PARTS[subject // 3 % 5] == "held_out"]
    assert predictions["subject_id"].tolist() == held_out and set(predictions["prediction_time"]) == {hours(10)}
    assert predictions["boolean_value"].tolist() == [subject % 3 == 0 for subject in held_out]
    risk = predictions["predicted_boolean_probability"]
    assert (predictions["predicted_boolean_value"] == (risk >= 0.5)).all() and risk.between(0, 1).all()
    items = (0, "lactate//mmol/L"), (1, "glucose//x"), (2, "lactate//mg/dL"), (20, "late//x")
    new = [lab(subject, at, 2.0, f"LAB//{item}") for subject in (91, 92) for at, item in items]
    other = write_meds(tmp_path / "other", new, [(91, 10, True), (92, 10, False)])
    run(other, "--evaluate", best_model(tmp_path), "--output-dir", tmp_path / "scored")
    scored = tmp_path / "scored" / "evaluation"
    assert pd.read_parquet(scored / "predictions.parquet")["subject_id"].tolist() == [91, 92]
    assert "2 after the prediction" in (said := capsys.readouterr().out) and "lost on reading" not in said
    unseen = pd.read_csv(scored / "unseen_in_training.csv").to_numpy().tolist()
    assert unseen == [["Lab: glucose", 2, 2], ["Lab: lactate", 4, 2]]
    assert json.loads((scored / "metrics.json").read_text())["unseen_in_training"] == {"of_new_item": 0.6667}
    evaluation, polars = pytest.importorskip("meds_evaluation.evaluate"), pytest.importorskip("polars")
    scores = evaluation.evaluate_binary_classification(polars.read_parquet(tmp_path / "out" / "predictions.parquet"))
    assert 0 <= scores["samples_equally_weighted"]["roc_auc_score"] <= 1


@pytest.mark.parametrize("name", CASES["splits"])
def test_split_of_the_data_set_keeps_the_held_out_apart_however_it_is_written(name, hospital, table, tmp_path, caplog):
    case, rows = CASES["splits"][name], pd.read_parquet(hospital / "metadata" / "subject_splits.parquet")
    rows = rows.sample(frac=1, random_state=0) if "index" in case else rows  # else pandas keeps no index
    rows = rows[rows["split"] != case.get("without")][case.get("leave_out", 0) :]
    again = rows[: case.get("repeat", 0)]
    rows["split"] = rows["split"].replace(case.get("names", {}))
    rows = pd.concat([rows, again.assign(split="test") if "refused" in case else again])
    rows = rows.astype({"subject_id": str} if case.get("as_text") else {}).rename(columns=case.get("columns", {}))
    rows = rows.set_index("subject_id").rename_axis(case["index"]) if "index" in case else rows
    (tmp_path / "metadata").mkdir()
    assert meds_split(table, tmp_path) is None
    rows.to_parquet(tmp_path / "metadata" / "subject_splits.parquet")
    if "refused" in case:
        with pytest.raises(InputError, match=case["refused"]):
            meds_split(table, tmp_path)
    else:
        split = meds_split(table, tmp_path)
        assert [len(part) for part in split] == case["sizes"] and re.search(case.get("says", ""), caplog.text)
