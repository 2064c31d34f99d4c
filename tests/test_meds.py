"""MEDS in and out, on tiny data sets made here: a label row becomes a stay, predictions go back in that standard."""

import datetime

import numpy as np
import pandas as pd
import pytest
import torch

import train

T0 = datetime.datetime(2150, 1, 1)
CREATININE = "LAB//50912//mg/dL"


def hours(number):
    return T0 + datetime.timedelta(hours=number)


def write_meds(root, rows, codes=(), labels=None, splits=None):
    """A MEDS data set of rows (subject, hour or None, code, number, further columns), and its label file."""
    frames = [{"subject_id": s, "time": None if h is None else hours(h), "code": c, "numeric_value": n, **more}
              for s, h, c, n, more in rows]  # fmt: skip
    (root / "data" / "train").mkdir(parents=True)
    (root / "metadata").mkdir()
    table = pd.DataFrame(frames).astype({"time": "datetime64[us]", "numeric_value": "float32", "code": str})
    table.to_parquet(root / "data" / "train" / "0.parquet")
    pd.DataFrame(list(codes), columns=["code", "description"]).astype(str).to_parquet(root / "metadata/codes.parquet")
    if splits is not None:
        frame = pd.DataFrame(splits.items(), columns=["subject_id", "split"])
        frame.to_parquet(root / "metadata" / "subject_splits.parquet")
    if labels is not None:
        frame = pd.DataFrame(labels, columns=["subject_id", "prediction_time", "boolean_value"])
        frame.assign(prediction_time=[hours(h) for h in frame["prediction_time"]]).to_parquet(root / "labels.parquet")
    return root


def lab(subject, hour, number, code=CREATININE, **more):
    return subject, hour, code, number, more


def read(root, labels=None, history_hours=0.0, gap_hours=0.0):
    """The stays of a data set, and what was left out."""
    task = train.MedsTask(str(labels or root / "labels.parquet"), history_hours, gap_hours)
    return train.read_stays(root, root / "cache", task=task)


def texts_of(table):
    return [str(table.texts[number]) for number in table.text]


def test_stay_of_a_label_row_ends_with_the_prediction_and_times_count_to_it(tmp_path):
    root = write_meds(tmp_path, [lab(1, h, h) for h in (1, 2, 5, 5.01)], labels=[(1, 5, True)])
    table, _ = read(root)
    assert table.minutes_to_end.tolist() == [240, 180, 0]
    assert table.known_minutes_since_intime.tolist() == table.minutes_since_intime.tolist() == [0, 60, 240]
    assert table.labels.tolist() == [1]


def test_history_hours_keep_the_last_hours_alone(tmp_path):
    root = write_meds(tmp_path, [lab(1, h, h) for h in (1, 2, 4, 5)], labels=[(1, 5, False)])
    assert read(root, history_hours=3)[0].minutes_to_end.tolist() == [60, 0]


def test_two_labels_of_a_subject_are_two_sequences(tmp_path):
    root = write_meds(tmp_path, [lab(1, h, h) for h in (1, 2)], labels=[(1, 1, False), (1, 2, True)])
    table, _ = read(root)
    assert table.lengths.tolist() == [1, 2]
    assert table.stays["patient_id"].tolist() == [1, 1]
    assert table.stays["icu_stay_id"].is_unique


@pytest.mark.parametrize(
    "row, text",
    [
        (lab(1, 1, 2.4), "Lab: Creatinine [Mass/volume] | Value: 2.4 mg/dL"),
        (lab(1, 1, 2.399999, unit="umol/L"), "Lab: Creatinine [Mass/volume] | Value: 2.4 umol/L"),
        (lab(1, 1, 137.0, "LAB//SODIUM//mEq/L"), "Lab: SODIUM | Value: 137 mEq/L"),
        (lab(1, 1, None, "LAB//URINE//UNK", text_value="cloudy"), "Lab: URINE | Value: cloudy"),
        (
            lab(1, 1, None, "MEDICATION//START//Aspirin", route="PO"),
            "Prescription: Aspirin | Route: PO | Status: start",
        ),
        (lab(1, 1, 0.123456, "INFUSION_START//7", unit="mcg"), "Ingredient: 7 | Rate: 0.12 mcg"),
        (lab(1, 1, None, "PROCEDURE//CHEST_XRAY"), "Procedure: CHEST_XRAY"),
        (lab(1, 1, None, "TRANSFER_TO//Ward"), "TRANSFER TO: Ward"),
        (lab(1, 1, None, "Blood Pressure", text_value="120/80"), "Blood Pressure | Value: 120/80"),
    ],
)
def test_event_text_says_what_the_query_would(tmp_path, row, text):
    codes = [(CREATININE, "Creatinine [Mass/volume]")]
    assert texts_of(read(write_meds(tmp_path, [row], codes, labels=[(1, 2, True)]))[0]) == [text]


def test_event_type_follows_from_the_first_part_of_the_code(tmp_path):
    codes = ["MEDICATION//START//a", "PROCEDURE//b", "LAB//c", "MICROBIOLOGY//d", "INFUSION_START//e", "TRANSFER_TO//f"]
    root = write_meds(tmp_path, [lab(1, h, None, c) for h, c in enumerate(codes)], labels=[(1, 9, True)])
    assert read(root)[0].event_type.tolist() == [0, 1, 2, 3, 4, len(train.EVENT_TYPES)]


@pytest.mark.parametrize("code", ["HOSPITAL_DISCHARGE//DIED", "DISCHARGE//EXPIRED", "MEDS_BIRTH"])
def test_codes_that_tell_the_outcome_are_no_events(tmp_path, code):
    root = write_meds(tmp_path, [lab(1, 1, 2.4), lab(1, 2, None, code)], labels=[(1, 9, True)])
    assert len(read(root)[0].text) == 1


def test_static_columns_are_those_known_at_the_prediction(tmp_path):
    rows = [
        (1, None, "GENDER//F", None, {}),
        (1, -24 * 365.25 * 60, "MEDS_BIRTH", None, {}),
        (1, 0, "HOSPITAL_ADMISSION//URGENT//ED", None, {"race": "WHITE"}),
        (1, 1, "ICU_ADMISSION//MICU", None, {}),
        (1, 9, "ICU_ADMISSION//SICU", None, {"race": "later"}),
    ]
    stays = read(write_meds(tmp_path, rows, labels=[(1, 5, False)]))[0].stays
    names = ["patient_gender", "patient_age", "patient_race", "admission_type", "admission_location"]
    assert stays.loc[0, names].tolist() == ["F", 60, "WHITE", "URGENT", "ED"]
    assert stays.loc[0, "first_icu_careunit"] == "MICU"
    assert pd.isna(stays.loc[0, "icu_length_of_stay_in_days"])


def icu_stay(subject, end, discharge_code, discharge, death=None):
    rows = [
        lab(subject, 0, None, "ICU_ADMISSION//MICU"),
        lab(subject, 1, 2.4),
        lab(subject, end, None, "ICU_DISCHARGE"),
    ]
    rows.append(lab(subject, discharge, None, discharge_code))
    return rows + ([lab(subject, death, None, "MEDS_DEATH")] if death else [])


def test_made_labels_are_deaths_in_hospital_of_stays_that_last(tmp_path):
    rows = [
        *icu_stay(1, 30, "HOSPITAL_DISCHARGE//HOME", 90),
        *icu_stay(2, 30, "HOSPITAL_DISCHARGE//DIED", 90, death=90),
        *icu_stay(3, 30, "HOSPITAL_DISCHARGE//HOME", 90, death=900),
        *icu_stay(4, 20, "HOSPITAL_DISCHARGE//HOME", 90),
        *icu_stay(5, 30, "HOSPITAL_DISCHARGE//DIED", 22, death=22),
        *icu_stay(6, 30, "HOSPITAL_DISCHARGE//UNK", 90, death=89),
    ]
    table, left_out = read(write_meds(tmp_path, rows), labels="mortality-in-icu@24h")
    assert dict(zip(table.stays["patient_id"], table.labels)) == {1: 0, 2: 1, 3: 0, 6: 1}
    assert left_out["ICU stays that ended or whose patient died within 24 h, without a label"] == 2
    assert len(read(tmp_path, labels="mortality-in-icu@24h", gap_hours=5)[0].stays) == 4
    with pytest.raises(train.InputError, match="no ICU stay lasts"):
        read(tmp_path, labels="mortality-in-icu@24h", gap_hours=7)


def test_label_after_the_death_is_left_out_and_counted(tmp_path):
    rows = [lab(1, 1, 2.4), lab(1, 5, None, "MEDS_DEATH"), lab(2, 1, 2.4)]
    table, left_out = read(write_meds(tmp_path, rows, labels=[(1, 6, True), (1, 4, True), (2, 4, False)]))
    assert table.stays["patient_id"].tolist() == [1, 2]
    assert left_out["labels at or after the patient's death, left out"] == 1


def test_labels_that_contradict_each_other_are_refused(tmp_path):
    root = write_meds(tmp_path, [lab(1, 1, 2.4)], labels=[(1, 4, True), (1, 4, False)])
    with pytest.raises(train.InputError, match="contradict"):
        read(root)


def test_meds_without_labels_and_labels_without_meds_are_refused(tmp_path):
    root = write_meds(tmp_path / "meds", [lab(1, 1, 2.4)])
    with pytest.raises(train.InputError, match="--labels"):
        train.read_stays(root, tmp_path / "cache")
    with pytest.raises(train.InputError, match="MEDS"):
        train.read_stays(train.SAMPLE, tmp_path / "cache", task=train.MedsTask("mortality-in-icu@24h"))


@pytest.mark.parametrize("damage", ["data/train/0.parquet", "metadata/codes.parquet", "labels.parquet"])
def test_damaged_file_is_refused_in_a_sentence(tmp_path, damage):
    root = write_meds(tmp_path, [lab(1, 1, 2.4)], labels=[(1, 4, True)])
    (root / damage).write_bytes(b"PAR1 no more")
    with pytest.raises(train.InputError, match="cannot be read"):
        read(root)


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    """A hospital of 60 subjects whose deaths follow from lactate, with a split of its own."""
    rng = np.random.default_rng(0)
    rows, labels, splits = [], [], {}
    for subject in range(60):
        died = subject % 3 == 0
        values = rng.normal(6 if died else 2, 0.5, 4).clip(0.5)
        rows += [lab(subject, hour, value, "LAB//lactate//mmol/L") for hour, value in enumerate(values)]
        labels.append((subject, 10, died))
        splits[subject] = ("train", "train", "train", "tuning", "held_out")[subject // 3 % 5]
    return write_meds(tmp_path_factory.mktemp("hospital"), rows, labels=labels, splits=splits)


SMALL = ["--text-encoder", "hashing", "--d-model", "16", "--n-layers", "1", "--n-heads", "2", "--n-pooling-heads", "2"]


def run(root, *arguments):
    labels = ["--data", str(root), "--labels", str(root / "labels.parquet"), "--cache-dir", str(root / "cache")]
    assert train.main([*labels, *SMALL, "--n-bootstrap", "10", *map(str, arguments)]) == 0


def test_predictions_pass_meds_evaluation_and_the_data_sets_own_split_is_used(hospital, tmp_path):
    evaluation = pytest.importorskip("meds_evaluation.evaluate")
    polars = pytest.importorskip("polars")
    run(hospital, "--output-dir", tmp_path, "--max-epochs", 2)
    predictions = polars.read_parquet(tmp_path / "predictions.parquet")
    splits = pd.read_parquet(hospital / "metadata" / "subject_splits.parquet").set_index("subject_id")["split"]
    assert sorted(predictions["subject_id"]) == splits.index[splits == "held_out"].tolist()
    assert set(predictions["prediction_time"]) == {hours(10)}
    scores = evaluation.evaluate_binary_classification(predictions)
    assert 0 <= scores["samples_equally_weighted"]["roc_auc_score"] <= 1
    run(hospital, "--evaluate", tmp_path / "checkpoints" / "best_model.pth", "--output-dir", tmp_path / "other")
    assert len(list((tmp_path / "other").rglob("predictions.parquet"))) == 1


def test_split_of_the_data_set_is_left_where_a_part_lacks_an_outcome(hospital, tmp_path):
    table, _ = read(hospital)
    rows = pd.read_parquet(hospital / "metadata" / "subject_splits.parquet")
    (tmp_path / "metadata").mkdir()
    rows[rows["split"] != "train"].to_parquet(tmp_path / "metadata" / "subject_splits.parquet")
    assert train.meds_split(table, tmp_path) is None
    split = train.meds_split(table, hospital)
    assert [len(part) for part in split] == [36, 12, 12]


def test_evaluation_says_which_items_training_never_saw(hospital, tmp_path):
    table, _ = read(hospital)
    texts = table.texts
    state = {"training_items": [train.item_hash("Lab: glucose")], "training_texts": torch.tensor([0])}
    checkpoint = train.Checkpoint(*[None] * 7, state=state)
    unseen = train.unseen_in_training(checkpoint, table)
    assert unseen.to_numpy().tolist() == [["Lab: lactate", 240, 240, 240]]
    state["training_items"] = [train.item_hash(texts[0])]
    state["training_texts"] = torch.from_numpy(train.text_numbers(texts[:1]))
    shares = train.shares_unseen(train.unseen_in_training(checkpoint, table))
    assert shares == {"of_new_item": 0, "of_new_text": pytest.approx(1 - (table.text == 0).mean(), abs=1e-4)}


@pytest.mark.parametrize("labels", [[(7, 4, True)], [(1, 0.5, True)]], ids=["other subjects", "before any event"])
def test_labels_that_fit_no_event_are_refused_in_a_sentence(tmp_path, labels):
    with pytest.raises(train.InputError, match="no stay has an event"):
        read(write_meds(tmp_path, [lab(1, 1, 2.4)], labels=labels))


def test_empty_label_file_is_refused_in_a_sentence(tmp_path):
    root = write_meds(tmp_path, [lab(1, 1, 2.4)], labels=[(1, 4, True)])
    pd.read_parquet(root / "labels.parquet").head(0).to_parquet(root / "labels.parquet")
    with pytest.raises(train.InputError, match="no rows"):
        read(root)


def test_model_of_meds_labels_is_not_said_to_read_whole_stays():
    assert "MEDS label" in train.moment_of_prediction(0.0, "labels.parquet")
    assert "24 h after" in train.moment_of_prediction(24.0, "")
    assert train.moment_of_prediction(0.0, "") == train.RETROSPECTIVE
