"""A table in any form is read as it was meant, mended and counted, or refused in a sentence that shows no row of it."""

import gzip
import shutil
from itertools import product
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_table import MARK, arguments, leftovers, small_table, to_parquet
from test_mimic import broken_mimic

import train
from clinical_lf import duck, reading
from clinical_lf.files import WORDS, InputError
from clinical_lf.reading import read_stays
from clinical_lf.tables import EVENT_ARRAYS, EVENT_COLUMNS, EVENT_TYPES, LABEL, STATIC_COLUMNS, STAY_COLUMNS

END = "relative_time_to_final_event"


def as_csv(table, folder):
    table.to_csv(folder / "data.csv", index=False)
    return folder / "data.csv"


def assert_refused(fragment, path, folder):
    """The message is one line that names the file and holds the fragment, and nothing of a row; nothing is left."""
    with pytest.raises(InputError) as caught:
        read_stays(path, folder / "cache")
    message = str(caught.value)
    assert fragment in message and MARK not in message and "\n" not in message
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert not leftovers(folder)


def assert_same_table(one, two):
    pd.testing.assert_frame_equal(one.stays, two.stays)
    for name in ("offsets", "texts", *EVENT_ARRAYS):
        first, second = getattr(one, name), getattr(two, name)
        np.testing.assert_array_equal(first, second)
        assert first.dtype == second.dtype


def put(table, cells, rows=slice(0, 3)):
    for column, value in cells.items():
        table.loc[table.index[rows], column] = value
    return table


TIME, NUMBER, NO_TIME = "a time like 2150-01-31 23:59:00", "a finite number", WORDS["reasons"]["event_without_time"]
BAD_CELLS = [
    ("patient_id", "an integer", ["abc", "", "#10000000", "99999999999999999999"]),  # no comment begins with #
    ("icu_stay_id", "an integer", ["30000000.5"]),
    ("patient_age", NUMBER, ["old", "inf", "1e300"]),  # the last is beyond float32
    (LABEL, "0 or 1", ["2", "-1", "0.5", "yes", "nan", ""]),
    ("event_time", TIME, ["31/12/2150 8 am", "infinity"]),
    ("event_known_time", TIME, ["-infinity"]),
    ("icu_outtime", TIME, ["infinity"]),
    ("icu_intime", TIME, [""]),
    (END, NUMBER, ["soon", "inf"]),
]


@pytest.mark.parametrize("column, wanted, values", BAD_CELLS)
def test_bad_cells_are_refused(column, wanted, values, tmp_path):
    message = f"data.csv: column {column} is not {wanted} in 3 rows, first row 1, 2, 3 after the header"
    for value in values:
        assert_refused(message, as_csv(put(small_table(), {column: value}), tmp_path), tmp_path)


BAD_TABLES = {
    "header only": (lambda t: t[:0], "a header but no rows"),
    "no label": (lambda t: t.drop(columns=LABEL), f"missing columns {LABEL}"),
    "no two columns": (lambda t: t.drop(columns=["icu_intime", "event_text"]), "columns icu_intime, event_text"),
    "capitals": (lambda t: t.rename(columns={"patient_id": "PATIENT_ID"}), "missing columns patient_id"),
    "label differs within a stay": (lambda t: put(t, {LABEL: "1"}, [0]), f"first icu_stay_id 30000000 in {LABEL}"),
    "age differs": (lambda t: put(t, {"patient_age": "77"}, [4]), "first icu_stay_id 30000001 in patient_age"),
    "two patients": (lambda t: put(t, {"patient_id": "5"}, [0]), "first icu_stay_id 30000000 in patient_id"),
    "age on one row only": (lambda t: put(t, {"patient_age": ""}, [0]), "contradict themselves"),
    "id in two ways": (lambda t: put(t, {"insurance": "x", "icu_stay_id": "030000000"}, [0]), "in insurance"),
    "hours for minutes": (lambda t: t.assign(**{END: t[END].astype(float) / 60}), "is in hours in 120 of 120 events"),
    "hours in some rows": (lambda t: put(t, {END: "47"}), f"{END} differs by more than 2 minutes"),
    "after the end": (lambda t: put(t, {END: "-100"}), f"{END} differs by more than 2 minutes"),
    "no event": (lambda t: t.assign(event_time="", **{END: ""}), f"dropped: 120 {NO_TIME}"),
    "ends before it begins": (lambda t: t.assign(icu_outtime="2149-01-01", **{END: ""}), "no stay has an event"),
}


def test_refusal_ends_the_program_with_code_2_and_a_line(tmp_path, capfd):
    path = as_csv(put(small_table(), {"patient_age": "old"}), tmp_path)
    assert train.main(arguments(tmp_path, path)) == 2
    output = capfd.readouterr()
    assert output.err.startswith(f"error: {path}: column patient_age") and output.err.count("\n") == 1
    assert MARK not in output.out + output.err and not (tmp_path / "out" / "predictions.csv").exists()


BEFORE, AFTER, NEVER = ({"event_time": time, END: ""} for time in ("2150-03-01 07:00:00", "2150-03-08 07:00:00", ""))
REPAIRS = {
    "duplicate rows": (lambda t: pd.concat([t, t[:7]]), {"event_repeated": 7}, 120),
    "before admission": (lambda t: put(t, BEFORE), {"event_before_admission": 3, "stay_without_events": 1}, 117),
    "after the end": (lambda t: put(t, AFTER), {"event_after_the_end": 3, "stay_without_events": 1}, 117),
    "without a time": (lambda t: put(t, NEVER, slice(0, 2)), {"event_without_time": 2}, 118),
    "unknown type": (lambda t: put(t, {"event_type": "transfusion"}), {"event_of_unknown_type": 3}, 120),
    "no type": (lambda t: put(t, {"event_type": ""}), {"event_of_unknown_type": 3}, 120),
    "no relative time": (lambda t: put(t, {END: ""}), {}, 120),
    "relative time NaN": (lambda t: put(t, {END: "nan"}), {}, 120),
    "label written as 0.0": (lambda t: put(t, {LABEL: "0.0"}, [0]), {}, 120),
    "columns in another order": (lambda t: t[t.columns[::-1]], {}, 120),
    "extra columns": (lambda t: t.assign(note="x", events_seen="3"), {}, 120),
    "no discharge": (lambda t: put(t, {"icu_outtime": "", END: ""}), {"stay_without_end": 1}, 117),
}


@pytest.mark.parametrize("name", REPAIRS)
def test_repair_is_counted(name, tmp_path):
    damage, expected, n_events = REPAIRS[name]
    table, report = read_stays(as_csv(damage(small_table()), tmp_path))
    assert report.counts == expected and len(table.text) == n_events and not report.sources


def test_length_of_stay_runs_to_death_or_discharge_and_others_are_noted(tmp_path):
    table, report = read_stays(as_csv(small_table(), tmp_path))
    assert table.stays["icu_length_of_stay_in_days"].to_numpy() == pytest.approx(np.where(table.labels, 47 / 24, 2))
    assert report.notes == {"length_recomputed": 20} and not report.counts


def test_ids_above_two_to_the_53_keep_their_digits(tmp_path):
    ids = [str(2**53 + 1 + i // 3) for i in range(120)]
    table = small_table().assign(icu_stay_id=ids, patient_id=ids)
    for path in (as_csv(table, tmp_path), to_parquet(table, tmp_path / "flat.parquet")):
        assert read_stays(path)[0].stays.icu_stay_id.tolist() == [2**53 + 1 + i for i in range(40)]


ODD_TEXTS = ["", "x" * 100_000, "a\0b", 'say "a",\r\nthen b', '""",', "   ", "# no comment", "'; DROP TABLE stays; --"]
ODD_TEXTS += ["😀 \U0001f9ea", "\u202eשלום مرحبا", "\ufffd"]


@pytest.mark.parametrize("text", ODD_TEXTS, ids=range(len(ODD_TEXTS)))
def test_odd_text_is_read_as_it_is(text, tmp_path):
    table, report = read_stays(as_csv(put(small_table(), {"event_text": text}), tmp_path))
    assert not report.counts and table.texts[table.text[:3]].tolist() == [text] * 3


def test_all_odd_texts_are_trained_on(tmp_path):
    table = put(small_table(), {"event_text": ODD_TEXTS}, slice(0, len(ODD_TEXTS)))
    assert train.main(arguments(tmp_path, as_csv(table, tmp_path), "--item-history")) == 0


def test_texts_that_say_they_are_missing_are_one_empty_text(tmp_path):
    table = put(small_table(), {"event_text": ["nan", "", " NULL "]}, [0, 1, 3])
    read, _ = read_stays(as_csv(table, tmp_path))
    assert len(read.text) == 120 and (read.texts[read.text] == "").sum() == 3
    assert len(set(read.texts)) == len(read.texts)


def test_column_that_no_feature_needs_may_be_missing_and_labels_where_none_is_needed(tmp_path):
    path = as_csv(small_table().drop(columns=["insurance", "discharge_location", "patient_race"]), tmp_path)
    assert len(read_stays(path, static_features=["patient_age", "patient_gender"])[0].stays) == 40
    with pytest.raises(InputError, match="missing columns patient_race, insurance\\. "):
        read_stays(path, static_features=train.DEFAULT_STATIC_FEATURES)
    unlabelled = small_table().drop(columns=LABEL)
    assert np.isnan(read_stays(unlabelled, need_label=False)[0].labels).all()


CSV = small_table().to_csv(index=False)
LINES = CSV.splitlines()
LATIN = small_table().assign(patient_race="Ñandú").to_csv(index=False).encode("latin-1")
ZIPPED = gzip.compress(CSV.encode())


def holding(content):
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


def nested_and_flat(path):
    to_parquet(small_table()[:60], path.with_name("a.parquet"))
    to_parquet(small_table()[60:], path.with_name("b.parquet"), nested=True)


def parquet_with(path, **columns):
    pd.read_parquet(to_parquet(small_table(), path)).assign(**columns).to_parquet(path)


CUT_ROW = "\n".join([*LINES[:50], LINES[50][:60], *LINES[51:]])
RAGGED, NO_END = "more or fewer values than the header", "end of GZIP stream"
INFINITE, UNFIT = put(small_table(), {END: "inf"}, [5]), f"column {END} is not {NUMBER} in 1 rows"
PARQUET = pd.DataFrame({"icu_stay_id": [1], "events": [[5]]}).to_parquet(index=False)
BAD_FILES = {
    "no such file": ("none.csv", lambda p: None, "no such file or folder"),
    "a glob without files": ("none*.parquet", lambda p: None, "nor a pattern that one fits"),
    "empty CSV": ("data.csv", holding(""), "the file is empty"),
    "empty Parquet": ("data.parquet", holding(""), "the file is empty"),
    "another kind of file": ("data.xlsx", holding("PK"), "--data takes a folder"),
    "empty folder": ("folder", Path.mkdir, "is no complete MIMIC-IV folder"),
    "MIMIC-IV without stays": ("mimic", broken_mimic, "icu/icustays has no rows"),
    "no header": ("data.csv", holding("\n".join(LINES[1:])), "missing columns patient_id"),
    "semicolons": ("data.csv", holding(CSV.replace(",", ";")), "missing columns"),
    "Latin-1": ("data.csv", holding(LATIN), "(not UTF-8 at line 2). CSV must be UTF-8"),
    "UTF-16": ("data.csv", holding(CSV.encode("utf-16")), "data.csv: "),
    "lone surrogate": ("data.csv", holding(CSV.encode().replace(b"URGENT", b"\xed\xa0\x80")), "CSV must be UTF-8"),
    "a row cut short": ("data.csv", holding(CUT_ROW), RAGGED),
    "the last row cut short": ("data.csv", holding(CSV[:-60]), RAGGED),
    "an open quote": ("data.csv", holding(CSV.replace("Lab:", '"Lab:', 1)), "a quote that never closes"),
    "gzip cut short": ("data.csv.gz", holding(ZIPPED[:-300]), NO_END),
    "gzip without its end": ("data.csv.gz", holding(ZIPPED[:-4]), NO_END),
    "no gzip": ("data.csv.gz", holding(CSV), "not a GZIP stream"),
    "Parquet cut short": ("data.parquet", holding(PARQUET[:-100]), "cannot be read"),
    "another Parquet": ("data.parquet", pd.DataFrame({"a": [1]}).to_parquet, "missing columns"),
    "events are numbers": ("data.parquet", holding(PARQUET), "cannot be read"),
    "times are numbers": ("data.parquet", lambda p: parquet_with(p, icu_intime=7), "column icu_intime is not a time"),
    "ids are floats": ("data.parquet", lambda p: parquet_with(p, patient_id=2.0**54), "stored as floating point"),
    "infinity, typed": ("data.parquet", lambda p: to_parquet(INFINITE, p), UNFIT),
    "infinity, nested": ("data.parquet", lambda p: to_parquet(INFINITE, p, nested=True), UNFIT),
    "nested and flat mixed": ("*.parquet", nested_and_flat, "must share a schema"),
}


for name, (damage, words) in BAD_TABLES.items():
    BAD_FILES[f"table: {name}"] = ("data.csv", holding(damage(small_table()).to_csv(index=False)), words)


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_refused(name, tmp_path):
    file_name, write, fragment = BAD_FILES[name]
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / file_name)
    assert_refused(fragment, tmp_path / "data" / file_name, tmp_path)


def as_bigquery_exports(path):
    """Each element of an array in structs called list and element."""
    table = pd.read_parquet(to_parquet(small_table(), path, nested=True))
    table["events"] = [{"list": [{"element": event} for event in events]} for events in table["events"]]
    table.to_parquet(path)


def with_columns_in_two_orders(path):
    table = small_table()
    table[:60].to_csv(path.with_name("a.csv"), index=False)
    table[60:][table.columns[::-1]].to_csv(path.with_name("b.csv"), index=False)


GOOD_FILES = {
    "data.csv": holding(CSV.encode("utf-8-sig")),  # a byte order mark
    "lines.csv": holding(CSV.replace("\n", "\r\n")),
    "data.csv.gz": holding(ZIPPED),
    "flat.parquet": lambda path: to_parquet(small_table(), path),
    "nested.parquet": lambda path: to_parquet(small_table(), path, nested=True),
    "exported.parquet": as_bigquery_exports,
    "*.csv": with_columns_in_two_orders,
    "o'neill.csv": holding(CSV),
    "data [1].csv": holding(CSV),
}


@pytest.mark.parametrize("name", GOOD_FILES)
def test_same_table_in_any_form_reads_the_same(name, tmp_path):
    GOOD_FILES[name](tmp_path / name)
    assert_same_table(read_stays(tmp_path / name, tmp_path / "cache")[0], read_stays(small_table())[0])
    assert not (tmp_path / "cache").exists()  # of so small a source nothing is kept


def test_data_frame_is_read_as_its_file(tmp_path):
    table = small_table()
    path = as_csv(table, tmp_path)
    typed = pd.read_csv(path, parse_dates=["icu_intime", "icu_outtime", "event_time"])
    for frame in (table, typed):
        assert_same_table(read_stays(frame)[0], read_stays(path)[0])
    with pytest.raises(InputError, match="the data frame: missing columns icu_intime"):
        read_stays(table.drop(columns="icu_intime"))
    with pytest.raises(InputError, match="Give a path, or the data frame itself"):
        read_stays(str(table))


@pytest.fixture
def keep_all(monkeypatch):
    monkeypatch.setattr(reading, "KEEP_ARRAYS_FROM", 0)


def test_second_start_maps_the_arrays_of_the_first_until_the_source_changes(keep_all, tmp_path, monkeypatch):
    source, cache = shutil.copy(train.SAMPLE, tmp_path / "data.csv"), tmp_path / "cache"
    sample = read_stays(pd.read_csv(source, dtype=str, keep_default_na=False))[0]
    first, report = read_stays(source, cache)
    with monkeypatch.context() as patch:
        patch.setattr(duck, "open_duckdb", lambda *limits: pytest.fail("the source was read again"))
        second, same_report = read_stays(source, cache)
    assert_same_table(first, sample)
    assert_same_table(second, sample)
    assert report == same_report and not second.minutes_to_end.flags.owndata
    rows = source.read_text("utf-8").splitlines(keepends=True)
    source.write_text("".join(rows[:-1]), "utf-8")
    assert len(read_stays(source, cache)[0].text) == len(sample.text) - 1 and not leftovers(cache)


def test_damaged_arrays_are_made_anew(keep_all, tmp_path):
    frame = pd.concat([small_table(), small_table()[:7]])
    path, (table, report) = as_csv(frame, tmp_path), read_stays(frame)
    read_stays(path, tmp_path)
    halved, emptied = lambda content: content[: len(content) // 2], lambda content: b""
    flipped = lambda content: content[:-9] + bytes([content[-9] ^ 4]) + content[-8:]
    names = ("minutes_to_end.npy", "stays.parquet", "report.json", "sums.json")
    for name, damaged in product(names, (halved, emptied, flipped)):
        kept = next(tmp_path.rglob(name))
        content = kept.read_bytes()
        kept.write_bytes(damaged(content))
        again, same_report = read_stays(path, tmp_path)
        assert_same_table(again, table)
        assert same_report == report and report.counts == {"event_repeated": 7}
        assert next(tmp_path.rglob(name)).read_bytes() == content


def test_kept_arrays_do_not_hide_that_the_source_lacks_a_feature(keep_all, tmp_path):
    path = as_csv(small_table(4).drop(columns="marital_status"), tmp_path)
    read_stays(path, tmp_path, static_features=["patient_age"])
    with pytest.raises(InputError, match="missing columns marital_status"):
        read_stays(path, tmp_path, static_features=["marital_status"])


SHORT = r"reading stopped \({}\) with --memory-limit {} .*Nothing is wrong with the data\.$"
LIMITS = {limit: f"^--memory-limit {limit}: give a size like" for limit in ("much", "GB", "")}
LIMITS |= {"8MB": SHORT.format("OutOfMemoryException", "8MB"), "1GB": SHORT.format("MemoryError", "1GB")}


@pytest.mark.parametrize("limit", LIMITS)
def test_limit_of_memory_that_is_none_is_said_and_too_low_a_one_does_not_blame_the_file(limit, tmp_path, monkeypatch):
    """In DuckDB, or beside it where the arrays have no room."""
    monkeypatch.setattr(reading, "StayTable", Mock(side_effect=MemoryError("Unable to allocate 17 GiB")))
    with pytest.raises(InputError, match=LIMITS[limit]):
        read_stays(train.SAMPLE, tmp_path, memory_limit=limit)


def test_data_frame_that_passes_the_limit_of_memory_has_a_folder_to_spill_into(tmp_path):
    """DuckDB makes the last folder of its path only."""
    read_stays(small_table(), tmp_path / "new" / "cache")
    assert (tmp_path / "new" / "cache" / "query_results").is_dir()


QUICK = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
ODD = """nan|NaN|inf|-inf|infinity|epoch|1e308|-1e308|1e-320|9007199254740993|9223372036854775807|-9223372036854775808
99999999999999999999|0|-0|1|1.0|1.5|0x1F|true|NULL|None|\\N|2150-03-01|2150-03-01 09:00:00|2150-03-01T09:00:00Z
2150-02-30|0001-01-01|9999-12-31 23:59:59|290000-01-01|-0044-03-15 (BC)|12:00|47|2820|-2820|labevent|LABEVENT|😀|"|""
'|;|,|#|\ufeff|\u202e|\ufffd|=1+1|'; DROP TABLE stays; --|{}|[1]"""
CELL = (
    st.sampled_from([*ODD.replace("\n", "|").split("|"), "", " ", "a\0b", "\r\n", "x" * 5000])
    | st.text(max_size=20).filter(lambda text: not any(0xD800 <= ord(c) < 0xE000 for c in text))
    | st.integers().map(str)
    | st.floats().map(str)
)
ALL_COLUMNS = {**STAY_COLUMNS, **EVENT_COLUMNS}
ROW, REACH = st.integers(0, 11), st.sampled_from(["row", "stay", "table"])
EDIT = st.tuples(st.sampled_from(list(ALL_COLUMNS)), ROW, REACH, CELL)
BASE = small_table(4, 3)


def edited(edits):
    """The table of 4 stays with 3 events, some cells changed: on one row, on a whole stay or everywhere."""
    table = BASE.copy()
    for column, row, reach, value in edits:
        rows = {"row": slice(row, row + 1), "stay": slice(row // 3 * 3, row // 3 * 3 + 3), "table": slice(None)}[reach]
        table.iloc[rows, table.columns.get_loc(column)] = "" if value is None else str(value)
    return table


def loads_or_is_refused(path):
    """Whether it loads; then its arrays fit together, hold what they may, and can be encoded."""
    try:
        table, report = read_stays(path)
    except InputError as error:
        assert path.name in str(error)
        return False
    assert report.counts.keys() <= WORDS["reasons"].keys()
    assert all(type(n) is int and n > 0 for n in report.counts.values())
    n_stays, n_events = len(table.stays), len(table.text)
    assert table.offsets[0] == 0 and table.offsets[-1] == n_events and len(table.offsets) == n_stays + 1
    assert (table.lengths > 0).all() and table.stays.icu_stay_id.is_unique and set(table.labels) <= {0.0, 1.0}
    assert all(type(text) is str for text in table.texts) and len(set(table.texts)) == len(table.texts)
    for name, kind in EVENT_ARRAYS.items():
        array = getattr(table, name)
        assert array.shape == (n_events,) and array.dtype == kind and not np.ma.isMaskedArray(array)
    assert set(table.event_type) <= set(range(len(EVENT_TYPES) + 1)) and set(table.text) == set(range(len(table.texts)))
    for minutes in (table.minutes_to_end, table.minutes_since_intime):
        assert np.isfinite(minutes).all() and (minutes >= 0).all()
    assert not np.isinf(table.known_minutes_since_intime).any()
    assert (np.diff(table.minutes_since_intime)[np.diff(table.stay_of_event) == 0] >= 0).all()
    encoded = train.ClinicalDataPreprocessor(list(STATIC_COLUMNS), item_history=True).fit(table)
    assert np.isfinite(encoded.encode_static_features(table.static_columns)).all()
    assert np.isfinite(encoded.encode_relative_time(table.minutes_to_end)).all()
    return True


@QUICK
@given(st.lists(EDIT, min_size=1, max_size=4))
def test_any_cells_load_or_are_refused_in_a_csv_as_in_parquet_of_text_columns(tmp_path, edits):
    table = edited(edits)
    table.to_parquet(tmp_path / "table.parquet", index=False)
    assert loads_or_is_refused(as_csv(table, tmp_path)) == loads_or_is_refused(tmp_path / "table.parquet")


VALUES = {
    "BIGINT": st.integers(-(2**63), 2**63 - 1),
    "DOUBLE": st.floats(),
    "VARCHAR": st.text(max_size=9).filter(str.isprintable) | st.none(),
    "TIMESTAMP": st.datetimes(pd.Timestamp("1900-01-01"), pd.Timestamp("2200-01-01")) | st.none(),
}
TYPED_EDIT = st.sampled_from(list(ALL_COLUMNS.items())).flatmap(
    lambda column: st.tuples(st.just(column[0]), ROW, st.just("stay"), VALUES[column[1]])
)


@QUICK
@given(st.lists(TYPED_EDIT, max_size=3), st.booleans())
def test_any_typed_values_in_parquet_load_or_are_refused(tmp_path, edits, nested):
    assert loads_or_is_refused(to_parquet(edited(edits), tmp_path / "table.parquet", nested)) or edits


@QUICK
@given(st.lists(st.tuples(st.integers(0, 3000), st.binary(max_size=3), st.integers(0, 3)), min_size=1, max_size=4))
def test_any_bytes_in_a_csv_load_or_are_refused(tmp_path, splices):
    content = BASE.to_csv(index=False).encode()
    for place, new, removed in splices:
        content = content[:place] + new + content[place + removed :]
    (tmp_path / "table.csv").write_bytes(content)
    loads_or_is_refused(tmp_path / "table.csv")
