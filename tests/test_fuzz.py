"""Any small table loads with its invariants kept or is refused with the program's own error; so too the cache."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_table import small_table, to_parquet

import train

QUICK = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
ODD = [
    "",
    " ",
    "nan",
    "NaN",
    "inf",
    "-inf",
    "infinity",
    "epoch",
    "1e308",
    "-1e308",
    "1e-320",
    "9007199254740993",
    "9223372036854775807",
    "-9223372036854775808",
    "99999999999999999999",
    "0",
    "-0",
    "1",
    "1.0",
    "1.5",
    "0x1F",
    "true",
    "NULL",
    "None",
    "\\N",
    "2150-03-01",
    "2150-03-01 09:00:00",
    "2150-03-01T09:00:00Z",
    "2150-02-30",
    "0001-01-01",
    "9999-12-31 23:59:59",
    "290000-01-01",
    "-0044-03-15 (BC)",
    "12:00",
    "47",
    "2820",
    "-2820",
    "labevent",
    "LABEVENT",
    "😀",
    "a\0b",
    "\r\n",
    '"',
    '""',
    "'",
    ";",
    ",",
    "#",
    "\ufeff",
    "\u202e",
    "\ufffd",
    "x" * 5000,
    "=1+1",
    "'; DROP TABLE stays; --",
    "{}",
    "[1]",
]
CELL = (
    st.sampled_from(ODD)
    | st.text(max_size=20).filter(lambda text: not any(0xD800 <= ord(c) < 0xE000 for c in text))
    | st.integers().map(str)
    | st.floats().map(str)
)
COLUMNS = [*train.STAY_COLUMNS, *train.EVENT_COLUMNS]
EDIT = st.tuples(st.sampled_from(COLUMNS), st.integers(0, 11), st.sampled_from(["row", "stay", "table"]), CELL)
BASE = small_table(4, 3)


def edited(edits):
    """The table of 4 stays with 3 events, some cells changed: on one row, on a whole stay or everywhere."""
    table = BASE.copy()
    for column, row, reach, value in edits:
        rows = {"row": slice(row, row + 1), "stay": slice(row // 3 * 3, row // 3 * 3 + 3), "table": slice(None)}[reach]
        table.iloc[rows, table.columns.get_loc(column)] = value
    return table


def loads_or_is_refused(path):
    try:
        table, report = train.read_stays(path)
    except train.InputError as error:
        assert str(path.name) in str(error)
        return False
    assert_invariants(table)
    assert all(type(count) is int and count > 0 for count in report.values())
    return True


def assert_invariants(table):
    n_events = len(table.text)
    assert (
        table.offsets[0] == 0
        and table.offsets[-1] == n_events
        and (np.diff(table.offsets) > 0).all()
        and len(table.offsets) == len(table.stays) + 1
    )
    assert ((table.event_type >= 0) & (table.event_type <= len(train.EVENT_TYPES))).all()
    assert ((table.text >= 0) & (table.text < len(table.texts))).all() and all(
        type(text) is str for text in table.texts
    )
    assert (
        len(set(table.texts)) == len(table.texts)
        and table.stays.icu_stay_id.is_unique
        and set(np.unique(table.labels)) <= {0.0, 1.0}
    )
    assert (
        np.isfinite(table.minutes_to_end).all()
        and (table.minutes_to_end >= 0).all()
        and not np.isinf(table.known_minutes_since_intime).any()
    )
    assert np.isfinite(table.minutes_since_intime).all() and (table.minutes_since_intime >= 0).all()
    for array in (
        table.event_type,
        table.text,
        table.minutes_since_intime,
        table.known_minutes_since_intime,
        table.minutes_to_end,
    ):
        assert len(array) == n_events and not np.ma.isMaskedArray(array)
    later = np.diff(table.minutes_since_intime)
    assert (later[np.diff(table.stay_of_event) == 0] >= 0).all()
    encoded = train.ClinicalDataPreprocessor(list(train.STATIC_COLUMNS), item_history=True).fit(table)
    assert (
        np.isfinite(encoded.encode_static_features(table.static_columns)).all()
        and np.isfinite(encoded.encode_relative_time(table.minutes_to_end)).all()
    )


@QUICK
@given(st.lists(EDIT, min_size=1, max_size=4))
def test_any_cells_in_a_csv_load_or_are_refused(tmp_path_factory, edits):
    path = tmp_path_factory.mktemp("fuzz") / "table.csv"
    edited(edits).to_csv(path, index=False)
    loads_or_is_refused(path)


@QUICK
@given(st.lists(EDIT, min_size=1, max_size=4))
def test_any_cells_in_parquet_of_text_columns_load_or_are_refused_as_in_a_csv(tmp_path_factory, edits):
    folder = tmp_path_factory.mktemp("fuzz")
    table = edited(edits)
    table.to_csv(folder / "table.csv", index=False)
    table.to_parquet(folder / "table.parquet", index=False)
    assert loads_or_is_refused(folder / "table.csv") == loads_or_is_refused(folder / "table.parquet")


VALUES = {
    "BIGINT": st.integers(-(2**63), 2**63 - 1),
    "DOUBLE": st.floats(),
    "VARCHAR": st.text(max_size=9).filter(str.isprintable) | st.none(),
    "TIMESTAMP": st.datetimes(pd.Timestamp("1900-01-01"), pd.Timestamp("2200-01-01")) | st.none(),
}
TYPED_EDIT = st.sampled_from([*train.STAY_COLUMNS.items(), *train.EVENT_COLUMNS.items()]).flatmap(
    lambda column: st.tuples(st.just(column[0]), st.integers(0, 3), st.just("stay"), VALUES[column[1]])
)


@QUICK
@given(st.lists(TYPED_EDIT, min_size=1, max_size=3), st.booleans())
def test_any_typed_values_in_parquet_load_or_are_refused(tmp_path_factory, edits, nested):
    path = tmp_path_factory.mktemp("fuzz") / "table.parquet"
    table = BASE.copy()
    for column, stay, _, value in edits:
        table.iloc[3 * stay : 3 * stay + 3, table.columns.get_loc(column)] = "" if value is None else str(value)
    loads_or_is_refused(to_parquet(table, path, nested))


@QUICK
@given(st.lists(st.tuples(st.integers(0, 3000), st.binary(max_size=3), st.integers(0, 3)), min_size=1, max_size=4))
def test_any_bytes_in_a_csv_load_or_are_refused(tmp_path_factory, splices):
    path = tmp_path_factory.mktemp("fuzz") / "table.csv"
    content = BASE.to_csv(index=False).encode()
    for place, new, removed in splices:
        content = content[:place] + new + content[place + removed :]
    path.write_bytes(content)
    loads_or_is_refused(path)


TEXTS = [f"text {i}" for i in range(6)]


@QUICK
@given(st.data())
def test_any_damage_to_a_cache_part_leaves_right_vectors_or_none(tmp_path_factory, data):
    """Bytes of the header, the keys or the vectors change: never an exception, never a vector of another length."""
    encoder = train.HashingTextEncoder(tmp_path_factory.mktemp("fuzz"))
    encoder.embed(TEXTS, progress=False)
    good = encoder.vectors(TEXTS)
    (part,) = encoder.cache.folder.glob("part-*")
    path = part / data.draw(st.sampled_from(["keys.npy", "vectors.npy"]))
    content = bytearray(path.read_bytes())
    reach = data.draw(st.sampled_from([128, len(content)]))  # the header is short: half of the examples aim at it
    for place in data.draw(st.lists(st.integers(0, reach - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), reach // 2]))])
    again = train.HashingTextEncoder(encoder.cache.folder.parent)
    again.embed(TEXTS, progress=False)
    vectors = again.vectors(TEXTS)
    assert vectors.shape == good.shape
    assert path.name == "vectors.npy" or all(any(np.array_equal(vector, other) for other in good) for vector in vectors)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_undamaged_table_loads(kind, tmp_path):
    path = tmp_path / f"table.{kind}"
    BASE.to_csv(path, index=False) if kind == "csv" else to_parquet(BASE, path)
    assert loads_or_is_refused(path)
