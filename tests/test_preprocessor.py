"""The preprocessor: fitted on training stays alone, plain-data state, unknown categories and missing values."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from make_sample import make_sample
from small_table import small_table

import train


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "sample.csv"
    make_sample(40, seed=3).table.to_csv(path, index=False)
    return train.read_stays(path)[0]


def fitted(table, **options):
    return train.ClinicalDataPreprocessor(**options).fit(table)


def test_event_type_has_five_columns_and_unknown_is_all_zeros(table):
    encoded = fitted(table).encode_event_type([*train.EVENT_TYPES, "transfusion"])
    assert np.array_equal(encoded, np.vstack([np.eye(5), np.zeros(5)]))


def test_relative_time_has_mean_zero_and_scale_one_on_training_events(table):
    encoded = fitted(table).encode_relative_time(table.minutes_to_end)
    assert encoded.shape == (len(table.text), 1)
    assert encoded.mean() == pytest.approx(0, abs=1e-4) and encoded.std() == pytest.approx(1, abs=1e-4)


def test_decode_hours_inverts_relative_time(table):
    import torch

    preprocessor = fitted(table)
    encoded = torch.from_numpy(preprocessor.encode_relative_time(np.array([0.0, 60.0, 6000.0])))
    assert torch.allclose(preprocessor.decode_hours(encoded).squeeze(1), torch.tensor([0.0, 1.0, 100.0]), atol=1e-4)


def test_static_features_of_unknown_category_are_all_zeros(table):
    preprocessor = fitted(table, static_features=["insurance"])
    stays = table.stays.head(1).assign(insurance="never seen")
    assert not preprocessor.encode_static_features(stays).any()


def test_static_features_missing_category_is_unknown_and_missing_number_is_training_mean(table):
    preprocessor = fitted(table, static_features=["insurance", "patient_age"])
    encoded = preprocessor.encode_static_features(
        table.static_columns.head(1).assign(insurance=None, patient_age=math.nan)
    )[0]
    on = [name for name, value in zip(preprocessor.static_names, encoded) if value]
    assert on == [("insurance", "Unknown")] and encoded[-1] == 0


def test_static_numbers_have_mean_zero_and_scale_one(table):
    encoded = fitted(table, static_features=["patient_age"]).encode_static_features(table.static_columns)
    assert encoded.mean() == pytest.approx(0, abs=1e-5) and encoded.std() == pytest.approx(1, abs=1e-5)


def test_number_of_events_is_scaled_by_its_logarithm_and_counts_what_is_read(table):
    preprocessor = fitted(table, static_features=["number_of_events"])
    logs = np.log1p(table.lengths)
    assert np.allclose(
        preprocessor.encode_static_features(table.static_columns)[:, 0], (logs - logs.mean()) / logs.std(), atol=1e-5
    )
    first_half = table.take(np.arange(len(table.stays)), keep_event=np.arange(len(table.text)) % 2 == 0)
    assert np.array_equal(first_half.static_columns.number_of_events, first_half.lengths)


def test_number_beyond_the_training_range_counts_as_the_nearest_seen(table):
    preprocessor = fitted(table, static_features=["patient_age", "number_of_events"])
    encoded = preprocessor.encode_static_features(table.static_columns)
    beyond = table.static_columns.head(2).assign(patient_age=[-1.0, 200.0], number_of_events=[1, 10**6])
    assert np.array_equal(preprocessor.encode_static_features(beyond), [encoded.min(0), encoded.max(0)])


def test_fit_is_not_moved_by_other_stays(table):
    first, rest = np.arange(20), np.arange(20, len(table.stays))
    before = fitted(table.take(first)).state_dict()
    changed = table.stays.copy()
    changed.loc[rest, "patient_age"] = 1000.0
    import dataclasses

    after = fitted(dataclasses.replace(table, stays=changed).take(first)).state_dict()
    assert before == after


def test_state_is_plain_data_and_round_trips(table):
    preprocessor = fitted(table, item_history=True)
    state = json.loads(json.dumps(preprocessor.state_dict()))
    copy = train.ClinicalDataPreprocessor().load_state_dict(state)
    assert np.array_equal(
        copy.encode_static_features(table.static_columns), preprocessor.encode_static_features(table.static_columns)
    )
    assert np.array_equal(copy.encode_history(table), preprocessor.encode_history(table))


@pytest.mark.parametrize(
    "text, item, value",
    [
        (
            "Lab: Lactate (Blood, Blood Gas) | Value: 2.4 mmol/L | Reference: 0.5-2 | Level: slightly above range",
            "Lab: Lactate (Blood, Blood Gas) mmol/L",
            2.4,
        ),
        ("Lab: pH (Urine, Hematology) | Value: NEG", "Lab: pH (Urine, Hematology)", math.nan),
        (
            "Prescription: Heparin | Strength: 5000 Units / mL Vial | Dose: 5000 UNIT | Route: SC",
            "Prescription: Heparin UNIT",
            5000,
        ),
        ("Prescription: Heparin | Dose: 5-10 mg", "Prescription: Heparin", math.nan),
        (
            "Ingredient: Dextrose 5% | Amount: 50 ml | Rate: 25 mL/hour | Status: FinishedRunning",
            "Ingredient: Dextrose mL/hour",
            25,
        ),
        (
            "Ingredient: Calcium (ingr) | Rate: 1.1e-05 grams/hour | Status: ChangeDose/Rate",
            "Ingredient: Calcium (ingr) grams/hour",
            1.1e-05,
        ),
        ("", "", math.nan),
    ],
)
def test_parse_value_item_and_number(text, item, value):
    found = train.parse_value(text)
    assert found[0] == item and (found[1] == value or math.isnan(found[1]) and math.isnan(value))


def test_quantiles_are_clipped_and_zero_without_a_number():
    assert train.quantiles_in([0.0, 1.0, 2.0, 3.0], np.array([-5, 1.5, 99, math.nan])).tolist() == [-1, 0, 1, 0]


@pytest.fixture(scope="module")
def lactates(tmp_path_factory):
    """Two stays: lactates of 2, 6 and 1 with a culture among them, and one lactate of 6."""
    rows = small_table(n_patients=2, n_events=4).iloc[:5].copy()
    lactate, culture = "Lab: Lactate (Blood, Blood Gas) | Value: {} mmol/L", "Microbiology: Blood | Test: Culture"
    rows["event_text"] = [lactate.format(2), culture, lactate.format(6), lactate.format(1), lactate.format(6)]
    path = tmp_path_factory.mktemp("lactates") / "table.csv"
    rows.to_csv(path, index=False)
    return train.read_stays(path)[0]


def test_item_history_of_lactates_counts_events_up_to_it(lactates):
    history = train.item_history(lactates)
    of_lactate = history[history["item"] == "Lab: Lactate (Blood, Blood Gas) mmol/L"]
    expected = {
        "value": [2, 6, 1, 6],
        "minimum": [2, 2, 1, 6],
        "maximum": [2, 6, 6, 6],
        "mean": [2, 4, 3, 6],
        "first": [2, 2, 2, 6],
        "previous": [2, 2, 6, 6],
        "count": [1, 2, 3, 1],
        "is_latest": [False, False, True, True],
    }
    assert of_lactate[list(expected)].to_dict("list") == expected
    np.testing.assert_allclose(of_lactate["hours_since_previous"], [math.nan, 2, 1, math.nan])


def test_item_history_does_not_know_what_follows(lactates):
    """Only is_latest may change where a stay is cut off after its second lactate."""
    until_then = lactates.minutes_since_intime <= 3 * 60
    cut = train.item_history(lactates.take(np.arange(2), keep_event=until_then))
    known = train.item_history(lactates)[until_then].reset_index(drop=True)
    pd.testing.assert_frame_equal(cut.drop(columns="is_latest"), known.drop(columns="is_latest"))


def test_encoded_history_has_quantiles_of_training_values_and_no_number_for_new_items(lactates):
    preprocessor = fitted(lactates.take(np.array([0])), item_history=True)
    encoded = preprocessor.encode_history(lactates)
    value, log_count = encoded[:, train.HISTORY.index("value")], encoded[:, train.HISTORY.index("log_count")]
    assert value[[0, 2, 3, 4]] == pytest.approx([0, 2 / 3, -2 / 3, 2 / 3], abs=0.08)
    assert encoded[1, train.HISTORY.index("has_value")] == 0 and log_count[3] == pytest.approx(math.log(4))
