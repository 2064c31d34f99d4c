"""A table in any form is read as it was meant, mended and counted, or refused in a sentence that shows no row of it."""

import gzip
import shutil
from io import BytesIO
from itertools import product
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_table import MARK, arguments, leftovers, small_table, to_parquet

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


CASES = yaml.safe_load(Path(__file__).with_name("reading_cases.yaml").read_text("utf-8"))


@pytest.mark.parametrize("column, wanted, values", CASES["cells"])
def test_bad_cells_are_refused(column, wanted, values, tmp_path):
    message = f"data.csv: column {column} is not {wanted} in 3 rows, first row 1, 2, 3 after the header"
    for value in values:
        assert_refused(message, as_csv(put(small_table(), {column: value}), tmp_path), tmp_path)


def table_of(case):
    table = small_table().assign(**case.get("all", {}), **case.get("others", {}))
    table = table[:0] if case.get("rows") == "all" else put(table, case.get("set", {}), case.get("rows", [0, 1, 2]))
    return table.drop(columns=case.get("drop", [])).rename(columns=case.get("rename", {}))


@pytest.mark.parametrize("source, name", [(source, name) for source in ("flat", "nested") for name in CASES[source]])
def test_table_is_read_as_it_was_meant_or_refused_in_a_sentence(source, name, tmp_path, log):
    case, nested = CASES[source][name], tmp_path / "data.parquet"
    path = as_csv(table_of(case), tmp_path) if source == "flat" else to_parquet(table_of(case), nested, nested=True)
    if "refused" in case:
        assert_refused(case["refused"], path, tmp_path)
        return
    table, report = read_stays(path)
    report.log(len(table.stays))
    assert report.counts == case.get("counts", {}) and len(table.text) == case.get("events", 120)
    assert {code: report.notes[code] for code in report.notes if code != "length_recomputed"} == case.get("notes", {})
    if not case.get("counts"):
        minutes = table.minutes_since_intime[: table.offsets[1]]
        assert minutes.tolist() == pytest.approx(case.get("minutes", [60, 120, 180]), abs=1e-6, rel=0)
    warned = [line for line in log.messages if "WARNING: " in line]
    assert all(case.get("warned", "no warning") in line for line in warned) and bool(warned) == ("warned" in case)


def test_rows_that_stand_twice_and_columns_that_are_moved_or_added_change_nothing(tmp_path):
    table = small_table()
    for changed, counts in ((pd.concat([table, table[:7]]), {"event_repeated": 7}), (table[table.columns[::-1]], {})):
        read, report = read_stays(as_csv(changed.assign(note="x", events_seen="3"), tmp_path))
        assert report.counts == counts and len(read.text) == 120 and not report.sources


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


def test_odd_texts_are_read_as_they_are_and_trained_on(tmp_path):
    rows = slice(0, len(ODD_TEXTS))
    path = as_csv(put(small_table(), {"event_text": ODD_TEXTS}, rows), tmp_path)
    table, report = read_stays(path)
    assert not report.counts and table.texts[table.text[rows]].tolist() == ODD_TEXTS
    assert train.main(arguments(tmp_path, path, "--item-history")) == 0


def test_texts_that_say_they_are_missing_are_one_empty_text(tmp_path):
    read, _ = read_stays(as_csv(put(small_table(), {"event_text": ["nan", "", " NULL "]}, [0, 1, 3]), tmp_path))
    assert len(read.text) == 120 and (read.texts[read.text] == "").sum() == 3
    assert len(set(read.texts)) == len(read.texts)


def test_column_that_no_feature_needs_may_be_missing_and_labels_where_none_is_needed(tmp_path):
    path = as_csv(small_table().drop(columns=["insurance", "discharge_location", "patient_race"]), tmp_path)
    assert len(read_stays(path, static_features=["patient_age", "patient_gender"])[0].stays) == 40
    with pytest.raises(InputError, match="missing columns patient_race, insurance\\. "):
        read_stays(path, static_features=train.DEFAULT_STATIC_FEATURES)
    assert np.isnan(read_stays(small_table().drop(columns=LABEL), need_label=False)[0].labels).all()


CSV = small_table().to_csv(index=False)
LINES = CSV.splitlines()
LATIN = small_table().assign(patient_race="Ñandú").to_csv(index=False).encode("latin-1")
ZIPPED = gzip.compress(CSV.encode())


FLAT, NESTED = to_parquet(small_table()), to_parquet(small_table(), nested=True)
FIRST, LAST = small_table()[:60], small_table()[60:]


def holding(content):
    """What writes this content to a path, or a dictionary of names and contents into the path's folder."""

    def write(path):
        for name, part in (content if isinstance(content, dict) else {path.name: content}).items():
            (path.parent / name).parent.mkdir(parents=True, exist_ok=True)
            (path.parent / name).write_bytes(part if isinstance(part, bytes) else part.encode())

    return write


parquet_with = lambda **columns: pd.read_parquet(BytesIO(FLAT)).assign(**columns).to_parquet()
FLAT_AND_NESTED = holding({"a.parquet": to_parquet(FIRST), "b.parquet": to_parquet(LAST, nested=True)})
ONE_CUT_SHORT = holding({"a.parquet": FLAT, "b.parquet": FLAT[:-100]})
IN_HOURS = small_table().assign(**{END: lambda table: table[END].astype(float) / 60}).to_csv(index=False)
CUT_ROW = "\n".join([*LINES[:50], LINES[50][:60], *LINES[51:]])
RAGGED, NO_END = "more or fewer values than the header", "end of GZIP stream"
TWICE = "patient_race," + CSV.replace("\n", "\nx,")[:-2]
PARQUET = pd.DataFrame({"icu_stay_id": [1], "events": [[5]]}).to_parquet(index=False)
BAD_FILES = {
    "no such file": ("none.csv", lambda p: None, "no such file or folder"),
    "a glob without files": ("none*.parquet", lambda p: None, "nor a pattern that one fits"),
    "empty CSV": ("data.csv", holding(""), "the file is empty"),
    "empty Parquet": ("data.parquet", holding(""), "the file is empty"),
    "neither file nor folder": ("/dev/null", lambda p: None, "--data takes a folder"),
    "a link to nothing": ("data.csv", lambda p: p.symlink_to("gone"), "--data takes a folder"),
    "another kind of file": ("data.xlsx", holding("PK"), "--data takes a folder"),
    "empty folder": ("folder", Path.mkdir, "is no complete MIMIC-IV folder"),
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
    "events are numbers": ("data.parquet", holding(PARQUET), "missing columns"),
    "times are numbers": ("data.parquet", holding(parquet_with(icu_intime=7)), "column icu_intime is not a time"),
    "ids are floats": ("data.parquet", holding(parquet_with(patient_id=2.0**54)), "stored as floating point"),
    "hours for minutes": ("data.csv", holding(IN_HOURS), "is in hours in 120 of 120 events"),
    "one column twice": ("data.csv", holding(TWICE), "columns patient_race stand twice"),
    "Parquet that is none": ("data.parquet", holding("x" * 99), "no whole Parquet file). Copy or export it again"),
    "one bad shard": ("*.parquet", ONE_CUT_SHORT, "b.parquet: no whole Parquet file)"),
    "another schema": ("*.parquet", FLAT_AND_NESTED, "b.parquet: its columns, or their types, are not those"),
    "empty Spark folder": ("stays.parquet", Path.mkdir, "the folder holds no part files"),
    "CSV and Parquet": ("*", holding({"a.parquet": FLAT, "data.csv": CSV}), "all of one kind"),
    "nested and flat mixed": ("*.parquet", FLAT_AND_NESTED, "must share a schema"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_refused(name, tmp_path):
    file_name, write, fragment = BAD_FILES[name]
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / file_name)
    assert_refused(fragment, tmp_path / "data" / file_name, tmp_path)


def as_spark_writes(nested):
    """Parts in folders by a column, beside files that are no data."""
    parts = {"year=2149": FIRST, "year=2150/month=1": LAST}
    files = {f"{place}/part-00000.snappy.parquet": to_parquet(parts[place], nested=nested) for place in parts}
    files |= {f"{place}/.part-00000.snappy.parquet.crc": "x" for place in parts}
    files |= {"_temporary/part-00009.parquet": FLAT, "_SUCCESS": "x", "._part-00000.parquet": "x"}
    return lambda path: holding(files)(path / "any")


# BigQuery exports each element of an array in structs called list and element.
in_structs = lambda events: {"list": [{"element": event} for event in events]}
EXPORTED = pd.read_parquet(BytesIO(NESTED)).assign(events=lambda table: table["events"].map(in_structs)).to_parquet()
CSV_PARTS = {"part-00000.csv": FIRST.to_csv(index=False), "part-00001.csv": LAST.to_csv(index=False)}
GOOD_FILES = {
    "stays.parquet": as_spark_writes(nested=False),
    "export": as_spark_writes(nested=False),
    "nested": as_spark_writes(nested=True),
    "stays.csv": lambda path: holding(CSV_PARTS)(path / "any"),
    "parts": lambda path: holding(CSV_PARTS)(path / "any"),
    "stays[1].csv": holding({"stays[1].csv": CSV, "stays1.csv": CSV[:-60]}),  # beside what fits it as a pattern
    "UPPER.CSV.GZ": holding(ZIPPED),
    "UPPER[1].PARQUET": holding(FLAT),
    "data.csv": holding(CSV.encode("utf-8-sig")),  # a byte order mark
    "lines.csv": holding(CSV.replace("\n", "\r\n")),
    "data.csv.gz": holding(ZIPPED),
    "flat.parquet": holding(FLAT),
    "nested.parquet": holding(NESTED),
    "exported.parquet": holding(EXPORTED),
    "*.csv": holding({"a.csv": FIRST.to_csv(index=False), "b.csv": LAST[LAST.columns[::-1]].to_csv(index=False)}),
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
    for frame in (table, pd.read_csv(path, parse_dates=["icu_intime", "icu_outtime", "event_time"])):
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


@pytest.mark.slow
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


def test_data_frame_that_passes_the_limit_of_memory_has_a_folder_to_spill_into(tmp_path, monkeypatch):
    """DuckDB makes the last folder of its path only."""
    large, check = "CREATE TEMP TABLE large AS SELECT random() AS x FROM range(4000000) ORDER BY x", reading._check
    monkeypatch.setattr(reading, "_check", lambda con, *others: con.execute(large) and check(con, *others))
    assert len(read_stays(small_table(), tmp_path / "new" / "cache", memory_limit="40MB")[0].stays) == 40
    assert (tmp_path / "new" / "cache" / "query_results").is_dir()


QUICK = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
ODD = """nan|NaN|inf|-inf|infinity|epoch|1e308|-1e308|1e-320|9007199254740993|9223372036854775807|-9223372036854775808
99999999999999999999|0|-0|1|1.0|1.5|0x1F|true|NULL|None|\\N|2150-03-01|2150-03-01 09:00:00|2150-03-01T09:00:00Z
2150-02-30|0001-01-01|9999-12-31 23:59:59|290000-01-01|-0044-03-15 (BC)|12:00|47|2820|-2820|labevent|LABEVENT|😀|"|""
'|;|,|#|\ufeff|\u202e|\ufffd|=1+1|'; DROP TABLE stays; --|{}|[1]"""
TEXT = st.text(max_size=20).filter(lambda text: not any(0xD800 <= ord(c) < 0xE000 for c in text))
CELL = st.sampled_from([*ODD.replace("\n", "|").split("|"), "", " ", "a\0b", "\r\n", "x" * 5000]) | TEXT
CELL = CELL | st.integers().map(str) | st.floats().map(str)
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


@pytest.mark.slow
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
edit_of = lambda column: st.tuples(st.just(column[0]), ROW, st.just("stay"), VALUES[column[1]])
TYPED_EDIT = st.sampled_from(list(ALL_COLUMNS.items())).flatmap(edit_of)


@pytest.mark.slow
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
