"""The preprocessor: fitted on training stays alone, plain-data state, unknown categories, missing and absurd values."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_sample import make_sample
from small_table import small_table

import train
from clinical_lf import items
from clinical_lf.files import InputError
from clinical_lf.reading import read_stays
from clinical_lf.tables import EVENT_TYPES, STATIC_COLUMNS

SMALL = read_stays(small_table(6, 3))[0]


@pytest.fixture(scope="module")
def table():
    return read_stays(make_sample(40, seed=3).table)[0]


def fitted(table, names=train.DEFAULT_STATIC_FEATURES, **options):
    return train.ClinicalDataPreprocessor(names, **options).fit(table)


def test_types_have_a_column_each_and_time_and_numbers_mean_zero_and_scale_one_and_hours_come_back(table):
    preprocessor = fitted(table, ["patient_age"])
    encoded = preprocessor.encode_event_type([*EVENT_TYPES, "transfusion"])
    assert np.array_equal(encoded, np.vstack([np.eye(5), np.zeros(5)]))
    times = preprocessor.encode_relative_time(table.minutes_to_end)
    assert times.shape == (len(table.text), 1)
    for encoded in (times, preprocessor.encode_static_features(table.static_columns)):
        assert encoded.mean() == pytest.approx(0, abs=1e-4) and encoded.std() == pytest.approx(1, abs=1e-4)
    hours = preprocessor.decode_hours(torch.from_numpy(times))[:, 0].numpy()
    assert np.allclose(hours, table.minutes_to_end / 60, atol=1e-3)


def test_new_category_is_all_zeros_and_counted_a_missing_one_unknown_a_missing_number_the_mean(table):
    preprocessor = fitted(table, ["insurance", "marital_status", "patient_age"])
    stays = table.stays.head(3).assign(insurance="never seen", marital_status=None, patient_age=math.nan)
    encoded = preprocessor.encode_static_features(stays)
    on = [name for name, value in zip(preprocessor.static_names, encoded[0], strict=True) if value]
    assert on == [("marital_status", "Unknown")] and (encoded == encoded[0]).all()
    part = replace(table.take(np.arange(3)), stays=stays)
    counts = {"insurance": 3, "marital_status (empty)": 3, "patient_age (empty)": 3}  # one that is missing is not new
    assert preprocessor.unknown_categories(part) == counts


def test_number_of_events_is_scaled_by_its_logarithm_and_numbers_beyond_training_count_as_the_nearest_seen(table):
    encode, logs = fitted(table, ["patient_age", "number_of_events"]).encode_static_features, np.log1p(table.lengths)
    encoded = encode(table.static_columns)
    assert np.allclose(encoded[:, 1], (logs - logs.mean()) / logs.std(), atol=1e-5)
    beyond = table.static_columns.head(2).assign(patient_age=[-1.0, 200.0], number_of_events=[1, 10**6])
    assert np.array_equal(encode(beyond), [encoded.min(0), encoded.max(0)])
    every_other = table.take(np.arange(len(table.stays)), keep_event=np.arange(len(table.text)) % 2 == 0)
    assert np.array_equal(every_other.static_columns["number_of_events"], every_other.lengths)


def test_fit_is_not_moved_by_other_stays(table):
    first, rest = np.arange(20), np.arange(20, len(table.stays))
    changed = table.stays.copy()
    changed.loc[rest, "patient_age"], changed.loc[rest, "insurance"] = 1000.0, "new"
    minutes = table.minutes_to_end + 1000 * np.isin(table.stay_of_event, rest)
    other = replace(table, stays=changed, minutes_to_end=minutes.astype(np.float32))
    before, after = (fitted(each.take(first), item_history=True).state_dict() for each in (table, other))
    assert before == after
    rest = table.take(rest)  # whose history is told by the quantiles of those fitted on
    expected = items.encode_history(rest, items.item_quantiles(table.take(first)))
    vectors = np.zeros((len(rest.texts), 1), np.float32)
    dataset = train.ClinicalSequenceDataset(rest, fitted(table.take(first), item_history=True), vectors)
    assert np.array_equal(dataset.event_columns[:, 1:], expected)


def test_state_is_plain_data_and_round_trips(table):
    preprocessor = fitted(table, item_history=True)
    copy = train.ClinicalDataPreprocessor().load_state_dict(json.loads(json.dumps(preprocessor.state_dict())))
    assert copy.static_names == preprocessor.static_names and copy.item_history
    inputs = {"static_features": table.static_columns, "relative_time": table.minutes_to_end}
    for name, value in inputs.items():
        again, encoded = (getattr(each, f"encode_{name}")(value) for each in (copy, preprocessor))
        assert np.array_equal(again, encoded)


def test_static_features_take_the_columns_wanted_and_encoders_are_public():
    """Of a preprocessor of ages 40 and 60, with one gender that is known."""
    stays = SMALL.stays.assign(patient_gender=["F", None] * 3, patient_age=[40.0, 60.0] * 3)
    preprocessor = fitted(replace(SMALL, stays=stays), ["patient_gender", "patient_age"])
    encode, encoders = preprocessor.encode_static_features, preprocessor.static_encoders
    few = stays[["patient_gender", "patient_age"]].head(2)
    assert encode(few, ["patient_age", "patient_gender"]).tolist() == [[-1, 1, 0], [1, 0, 1]]
    assert encode(few, ["patient_age"]).tolist() == [[-1], [1]]
    with pytest.raises(InputError, match="fitted on: insurance"):
        encode(few, ["insurance"])
    assert preprocessor.event_type_encoder.categories_[0].tolist() == list(EVENT_TYPES)
    assert preprocessor.time_scaler.transform([[SMALL.minutes_to_end.astype(float).mean()]]).tolist() == [[0]]
    assert encoders["patient_gender"].categories_[0].tolist() == ["F", "Unknown"]
    assert encoders["patient_age"].inverse_transform([[1]]).tolist() == [[60]]


NUMBERS = st.floats(-1e30, 1e30) | st.sampled_from([math.nan, 0.0, 1e-320, -1e30])
WORDS = st.text(max_size=9) | st.sampled_from([None, "", "nan", "Unknown", "😀", "x" * 5000, "1", "1.0"])


@settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_whatever_the_reader_lets_pass_is_encoded_as_finite_numbers(data):
    drawn = {}
    for name in data.draw(st.lists(st.sampled_from(STATIC_COLUMNS[:-1]), max_size=3, unique=True)):
        is_number = name in train.NUMERIC_STATIC_FEATURES
        drawn[name] = data.draw(st.lists(NUMBERS if is_number else WORDS, min_size=6, max_size=6))
    table = replace(SMALL, stays=SMALL.stays.assign(**drawn))
    preprocessor = fitted(table.take(np.arange(4)), STATIC_COLUMNS, item_history=True)
    encoded = preprocessor.encode_static_features(table.static_columns)
    assert encoded.shape == (6, preprocessor.static_dim) and np.isfinite(encoded).all()
    assert np.isfinite(preprocessor.encode_relative_time(table.minutes_to_end)).all()
