"""A MIMIC-IV folder through query.sql, and the account of its rows; made up: no row here comes from a patient."""

import gzip
import re
from collections import ChainMap
from dataclasses import astuple
from datetime import datetime
from pathlib import Path
from unittest.mock import Mock

import duckdb
import pandas as pd
import pyarrow.parquet
import pytest
import sqlglot
import yaml
from small_table import leftovers, run_python
from test_reading import assert_same_table

from clinical_lf import duck, mimic, tables
from clinical_lf.files import HALF_WRITTEN, WORDS, InputError
from clinical_lf.mimic import EVENT_TABLES, MIMIC_TABLES, run_mimic_query
from clinical_lf.reading import read_stays

MIMIC = Path(__file__).resolve().parent / "mimic"
at = lambda time: datetime.fromisoformat(f"2150-01-{time}")
IN, OUT = "2150-01-01 10:00:00", "2150-01-03 10:00:00"
STAY_201 = f"2,21,201,MICU,MICU,{IN},{OUT},2"
# Patient 1: admission 11 with the ICU stays 101 and 102. Patient 2: admission 21, stay 201, dies before ICU discharge.
# Patient 3: admission 31, stay 301, without any event.
FOLDERS = dict(reversed(table.split("/")) for table in sorted(MIMIC_TABLES))
TABLES = {name: (MIMIC / part / f"{name}.csv").read_text("utf-8").rstrip("\n") for name, part in FOLDERS.items()}
HEADERS = {name: text.split("\n")[0] for name, text in TABLES.items()}
LAB, QUERY = HEADERS["labevents"], mimic.QUERY_FILE.read_text("utf-8")
CASES = yaml.safe_load((MIMIC.parent / "mimic_cases.yaml").read_text("utf-8"))  # inputs, and what is read of them


def write_folder(folder, **changed):
    """The tables as a MIMIC-IV folder, every second one gzipped; `changed`: other texts, or bytes, by name."""
    for number, (name, text) in enumerate((TABLES | changed).items()):
        path = folder / FOLDERS[name] / (f"{name}.csv" if number % 2 else f"{name}.csv.gz")
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is not None:
            content = text if isinstance(text, bytes) else text.encode()
            path.write_bytes(content if number % 2 or content is text else gzip.compress(content))
    return folder


def broken_mimic(folder, **changed):
    """A MIMIC-IV folder whose tables have a header and no rows, but those that are given."""
    return write_folder(folder, **HEADERS | changed)


def swapped(name, old, new):
    """What `write_folder` takes to change a table: its name, and its text with something else in it."""
    assert old in TABLES[name]
    return {name: TABLES[name].replace(old, new)}


def changed_tables(changes):
    """What `write_folder` takes to change tables as CASES has it."""
    cut = lambda text: gzip.compress(text.encode(), mtime=0)[:-20]
    changed = [swapped(*change) if change[2:] else {change[0]: change[-1]} for change in changes if change[1:]]
    return ChainMap(*changed, {change[0]: cut(TABLES[change[0]]) for change in changes if not change[1:]})


def rows_of(tmp_path, **changed):
    """{stay id: row as a dict} of the query's result on the folder of the tables."""
    result = run_mimic_query(write_folder(tmp_path / "it's a mimic[1]", **changed), tmp_path)
    return {row["icu_stay_id"]: row for row in pyarrow.parquet.read_table(result).to_pylist()}


of_events = lambda row: [event["event_text"] for event in row["events"] or []]


def expected(name, column):
    """The rows of a file of what is expected, all text, by the values of a column."""
    return list(pd.read_csv(MIMIC / f"expected_{name}.csv", dtype=str, keep_default_na=False).groupby(column))


stays = pytest.fixture(lambda tmp_path_factory: rows_of(tmp_path_factory.mktemp("query")), scope="module")


def test_query_yields_every_stay_with_the_columns_of_the_contract_hospital_death_and_age_at_admission(stays):
    """Age counts on from the anchor year."""
    assert {stay: row["patient_expired_in_hospital"] for stay, row in stays.items()} == {101: 0, 102: 0, 201: 1, 301: 0}
    assert list(stays) == [101, 102, 201, 301] and not stays[301]["events"]
    assert set(stays[101]) == {*tables.STAY_COLUMNS, *tables.LABELS.values(), "events"}
    assert set(stays[101]["events"][0]) == set(tables.EVENT_COLUMNS)
    assert stays[101]["patient_death_time"] is None and stays[201]["patient_death_time"] == at("02 09:30")
    assert (stays[101]["patient_age"], stays[201]["patient_age"]) == (72, 50)


def test_queries_have_no_table_but_those_that_are_read():
    trees = sqlglot.parse(f"{QUERY};{mimic.VITALS_FILE.read_text('utf-8')}", read="bigquery")
    used = [table for tree in trees for table in tree.find_all(sqlglot.exp.Table) if table.db]
    assert {f"{table.db.rsplit('_', 1)[1]}/{table.name}" for table in used} == set(MIMIC_TABLES)


@pytest.mark.parametrize("stay, wanted", expected("events", "icu_stay_id"))
def test_events_lie_between_admission_and_the_final_event_with_their_texts_and_known_times(stay, wanted, stays):
    """Both ends are included, and death counts though ICU discharge is later. What is missing is left out of a text.

    Known by store and end times, None where unknown; a culture stored on a day is known at its end.
    """
    events = stays[int(stay)]["events"]
    for name in tables.EVENT_COLUMNS:
        assert [str(event[name]) for event in events] == wanted[name].tolist()
    keys = [(event["event_time"], event["event_type"], event["event_text"]) for event in events]
    assert keys == sorted(keys)


def test_orders_of_the_admissions_hour_count_from_the_admission(tmp_path):
    given = [f"\n21,2150-01-01 {hour}:00:00,,Heparin,,1,UNIT,," for hour in ("09", "10", "11")]
    later = swapped("icustays", f"2,21,201,MICU,MICU,{IN}", "2,21,201,MICU,MICU,2150-01-01 10:23:00")
    events = rows_of(tmp_path, prescriptions="".join([HEADERS["prescriptions"], *given]), **later)[201]["events"]
    times = [event["event_time"] for event in events if event["event_type"] == "prescription"]
    assert times == [at("01 10:23"), at("01 11:00")]


ENDS = [("03 10", "", 2), ("03 10", "02 10", 1), ("03 10", "09 10", 2), ("", "02 22", 1.5), ("", "", None)]


@pytest.mark.parametrize("discharge, death, days", ENDS)
def test_stay_ends_at_discharge_or_death_whichever_is_known_and_first(discharge, death, days, tmp_path):
    discharge, death = (day and f"2150-01-{day}:00:00" for day in (discharge, death))
    stay = swapped("icustays", STAY_201, f"2,21,201,MICU,MICU,{IN},{discharge},9")
    rows = rows_of(tmp_path, **stay, **swapped("admissions", "2150-01-02 09:30:00", death))
    assert rows[201]["icu_length_of_stay_in_days"] == days
    table, _ = read_stays(tmp_path / "it's a mimic[1]", tmp_path)
    hours = dict(zip(table.stays["icu_stay_id"], tables.stay_hours(table)))
    assert hours.get(201) == (days and days * 24) and table.minutes_to_end.min() == 0


@pytest.mark.parametrize("part, cases", expected("parts", "part"))
def test_level_says_how_far_a_value_lies_from_its_range_and_numbers_keep_what_a_clinician_writes(part, cases, tmp_path):
    values = zip(cases["valuenum"], cases["ref_range_lower"], cases["ref_range_upper"])
    rows = [f"1,11,1,2150-01-01 11:{minute:02}:00,,,{x},,{lo},{hi},,," for minute, (x, lo, hi) in enumerate(values)]
    written = of_events(rows_of(tmp_path, labevents="\n".join([LAB, *rows]))[101])
    assert [text.partition(f" | {part}: ")[2].split(" | ")[0] for text in written] == cases["says"].tolist()


def test_value_that_is_no_number_is_missing_and_a_time_with_an_offset_is_converted(tmp_path):
    rows = {Path(table).name: [HEADERS[Path(table).name]] for table in EVENT_TABLES}
    for case in CASES["events"]:
        rows[case["table"]].append(case["row"])
    found = rows_of(tmp_path, **{name: "\n".join(lines) for name, lines in rows.items()}).values()
    events = pd.DataFrame(sum((stay["events"] or [] for stay in found), []))
    said = events["event_time"].astype(str) + " " + events["event_text"]
    assert sorted(said) == sorted(case["event"] for case in CASES["events"] if case["event"])


def test_long_comment_is_read(tmp_path):
    long = f"{LAB}\n1,11,1,2150-01-10 11:00:00,,1,1,,,,,,{'x' * 3_000_000}"
    assert len(of_events(rows_of(tmp_path, labevents=long)[102])[0]) > 3_000_000


def test_result_is_reused_until_a_file_changes_and_what_killed_runs_left_is_cleared_away(tmp_path, monkeypatch):
    for name in (f".query{HALF_WRITTEN}killed", "unfinished-of-another-folder"):
        (tmp_path / "query_results" / name).mkdir(parents=True)
        (tmp_path / "query_results" / name / "mimic.duckdb").write_bytes(bytes(1000))
    folder = write_folder(tmp_path / "mimic")
    first = run_mimic_query(folder, tmp_path)
    made = first.stat().st_mtime_ns
    assert run_mimic_query(folder, tmp_path) == first and first.stat().st_mtime_ns == made
    assert list(tmp_path.glob("query_results/[!.]*")) == [first]
    write_folder(folder, **swapped("prescriptions", "Heparin", "Insulin"))
    second = run_mimic_query(folder, tmp_path)
    monkeypatch.setattr(duckdb, "__version__", "another")  # which may round ties another way
    assert len({first, second, run_mimic_query(folder, tmp_path)}) == 3 and not leftovers(tmp_path)


def test_slice_that_is_too_large_is_halved_and_without_memory_the_next_run_goes_on(tmp_path, monkeypatch):
    """Slices of patients give together what one gives."""
    folder, write = write_folder(tmp_path / "mimic"), mimic.files.write_whole
    whole = run_mimic_query(folder, tmp_path / "whole")
    monkeypatch.setattr(mimic, "load_mimic_table", Mock(wraps=mimic.load_mimic_table))

    def of_little_memory(path, *arguments):
        if path.name in ("part_00000003.parquet", "part_00000002.parquet"):
            raise duckdb.OutOfMemoryException("no more")
        return write(path, *arguments)

    with monkeypatch.context() as patch, pytest.raises(InputError, match="query.sql stopped.*--memory-limit 1GB"):
        patch.setattr(mimic.files, "write_whole", of_little_memory)
        run_mimic_query(folder, tmp_path, "1GB")
    first = next(tmp_path.glob("query_results/*/*/part_00000001.parquet")).stat().st_mtime_ns
    result = run_mimic_query(folder, tmp_path)
    loaded = sorted(call.args[1] for call in mimic.load_mimic_table.call_args_list)
    assert loaded == sorted(mimic.find_mimic_files(folder, QUERY))
    assert (result / "part_00000001.parquet").stat().st_mtime_ns == first
    assert pyarrow.parquet.read_table(result).equals(pyarrow.parquet.read_table(whole))
    assert list(tmp_path.glob("query_results/[!.]*")) == [result] and not leftovers(tmp_path)


@pytest.mark.parametrize("kind", ["empty", "text", "cut", "another version", "flipped"])
def test_working_database_that_is_damaged_is_begun_anew(kind, tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "mimic")
    with monkeypatch.context() as patch, pytest.raises(InputError, match="stopped"):
        patch.setattr(mimic, "collect_stays", Mock(side_effect=duckdb.OutOfMemoryException("no more")))
        run_mimic_query(folder, tmp_path)
    (path,) = tmp_path.glob("query_results/unfinished-*/mimic.duckdb")
    is_ours, begin = path.read_bytes(), {"another version": 12, "flipped": 12288, "cut": 20000}.get(kind, 0)
    rest = {"another version": b"\xff" + is_ours[13:], "flipped": bytes(255 ^ byte for byte in is_ours[12288:])}
    path.write_bytes(is_ours[:begin] + rest.get(kind, b"text" * (kind == "text")))
    assert len(pyarrow.parquet.read_table(run_mimic_query(folder, tmp_path))) == 4 and not path.exists()


def test_every_connection_has_the_limits(tmp_path, monkeypatch):
    limits, connect = [], duck.open_duckdb

    def watched(*arguments):
        con = connect(*arguments)
        settings = "current_setting('memory_limit'), current_setting('TimeZone'), current_setting('temp_directory')"
        limits.append(con.execute(f"SELECT {settings}").fetchall()[0])
        return con

    monkeypatch.setattr(duck, "open_duckdb", watched)
    read_stays(write_folder(tmp_path / "mimic"), tmp_path, memory_limit="900MiB")
    assert len(limits) >= 2 and {limit[:2] for limit in limits} == {("900.0 MiB", "UTC")}
    assert all(Path(place).is_relative_to(tmp_path / "query_results") for *_, place in limits)


def test_rows_far_from_every_stay_are_not_stored_and_the_others_lie_by_patient(tmp_path):
    labs = TABLES["labevents"] + "\n1,11,1,2150-01-06 10:00:00,,1,1,,,,,,"  # between stays 101 and 102
    labs += "\n2,21,1,2150-01-10 12:00:00,,1,1,,,,,,"  # in a stay, of another patient
    with duck.open_duckdb("1GB", tmp_path / "spilled", tmp_path / "mimic.duckdb") as database:
        for table, path in mimic.find_mimic_files(write_folder(tmp_path / "mimic", labevents=labs), QUERY).items():
            mimic.load_mimic_table(database, table, path, QUERY)
        patients, times = zip(*database.execute("SELECT patient, charttime FROM labevents").fetchall())
    assert len(times) == 11 and list(patients) == sorted(patients)  # all labs of the tables above
    assert max(times).month == 1 and 6 not in {time.day for time in times}


def test_stay_across_a_clock_change_is_as_long_in_every_time_zone(tmp_path):
    """In New York, the hour from 2 to 3 of 8 March 2150 does not exist: in the first stay, were it not for UTC."""
    later = lambda date: f"2150-03-{int(date[1]) + 6:02d}"
    moved = {name: re.sub(r"2150-01-(\d\d)", later, text) for name, text in TABLES.items()}
    program = "import clinical_lf.reading as r, sys; print(*r.read_stays(*sys.argv[1:])[0].minutes_to_end)"
    words = ("-c", program, write_folder(tmp_path / "mimic", **moved), tmp_path / "cache")
    there = run_python(*words, TZ="America/New_York", PYTHONPATH=str(mimic.QUERY_FILE.parent))
    here = read_stays(write_folder(tmp_path / "unmoved"), tmp_path / "here")[0].minutes_to_end
    assert [float(minutes) for minutes in there.split()] == here.tolist() and here.max() == 2880


def read(tmp_path, outcome="hospital", **changed):
    return read_stays(write_folder(tmp_path / "mimic", **changed), tmp_path, outcome=outcome)


accounts = lambda report: {account.table: account for account in report.sources}
figures = lambda report: {account.table: astuple(account)[1:] for account in report.sources}


@pytest.mark.parametrize("case", CASES["stays"])
def test_stay_has_the_label_of_the_outcome_or_is_left_out_counted_and_named(case, tmp_path, log):
    table, report = read(tmp_path, case.get("outcome", "hospital"), **changed_tables(case["changes"]))
    labels, code = dict(zip(table.stays.icu_stay_id.tolist(), table.labels.tolist())), case.get("code")
    assert labels == case["labels"] and report.counts == {"stay_without_events": 1} | ({code: 1} if code else {})
    (stay,) = {101, 102, 201} - set(labels) or {None}
    if code:
        assert f"1 {WORDS['reasons'][code]}: icu_stay_id {stay}" in log.text and ".parquet" not in log.text


def test_every_row_of_every_table_is_accounted_for(tmp_path, log):
    foreign = "\n7,71,1,2150-01-01 12:00:00,,1,1,,,,,,\n7,71,1,2150-01-01 12:00:00,,1,1,,,,,,"
    repeated = "\n1,11,1,2150-01-01 10:00:00,2150-01-01 11:00:00,2.40,2.4,mg/dL,0.5,1.2,abnormal,STAT,___"
    labs = TABLES["labevents"] + foreign + "\n1,11,1,,,1,1,,,,,," + repeated
    cultures = TABLES["microbiologyevents"] + "\n1,11,2150-03-01 00:00:00,,,,URINE,,,,,"  # far from every stay
    _, report = read(tmp_path, labevents=labs, microbiologyevents=cultures)
    found, lost = (
        figures(report),
        {"without a time": 1, "outside the ICU stays": 3, "repeated, or of a stay that was dropped": 1},
    )
    assert found["hosp/labevents"] == (15, 13, 8, lost, {})
    assert found["icu/procedureevents"] == (4, 4, 2, {"rewritten, never done": 1, "of a negative duration": 1}, {})
    given = {"rewritten, never given": 1, "of a negative amount or duration": 1}
    assert found["icu/ingredientevents"] == (4, 4, 2, given, {})
    lost, noted = {"outside the ICU stays": 1}, {"(used or not) have a day without a time: its end is taken": 2}
    assert found["hosp/microbiologyevents"] == (3, 3, 2, lost, noted) and found["icu/icustays"] == (4, 4, 4, {}, {})
    report.log(1)
    line = "hosp/labevents                  15           8   2 of patients or admissions without an ICU stay, 1 without"
    assert line in log.text and "1 duplicate events; 1 stays without events (counted by table above, too)" in log.text


def test_vitals_of_a_folder_or_an_export_are_accounted_for_and_change_nothing_else(tmp_path):
    """Of an hour of an item the last value is told, of some the lowest and the highest; what is known later, apart."""
    folder = write_folder(tmp_path / "mimic")
    without, (table, report) = read_stays(folder, tmp_path)[0], read_stays(folder, tmp_path, vitals="vitals.sql")
    lost = {"of other items": 1, "without a time": 1, "without a plausible value": 3, "thinned out of their hour": 3}
    assert figures(report)["icu/chartevents"] == (30, 29, 19, lost | {"outside the ICU stays": 2}, {})
    lost = {"of other items": 1, "without a plausible value": 1, "outside the ICU stays": 1}
    assert figures(report)["icu/outputevents"] == (5, 5, 2, lost, {}) and "event_of_unknown_type" not in report.counts
    assert_same_table(table.take([0, 1, 2], table.event_type < len(tables.EVENT_TYPES)).with_own_texts(), without)
    query, vitals = (run_mimic_query(folder, tmp_path, query_file=file) for file in (None, mimic.VITALS_FILE))
    assert_same_table(read_stays(query / "*.parquet", vitals=f"{vitals}/*.parquet")[0], table)
    rows, others = pyarrow.parquet.read_table(vitals), tmp_path / "others.parquet"
    for (_, wanted), row in zip(expected("vitals", "icu_stay_id"), rows.to_pylist(), strict=True):
        assert [[*map(str, event.values())] for event in row["events"]] == wanted.iloc[:, 1:].values.tolist()
    pyarrow.parquet.write_table(rows.set_column(0, "icu_stay_id", [[1, 2, 3]]), others)
    (folder / "icu" / "chartevents.csv.gz").unlink()
    flat, alone = MIMIC / "expected_parts.csv", "vitals.sql"
    for data, given in ((folder, alone), (query, alone), (query, others), (query, "none"), (flat, vitals)):
        words = f"^--vitals {given}: no events of the stays of .*{data.name}|icu/chartevents.csv.* not found"
        with pytest.raises(InputError, match=words):
            read_stays(data, tmp_path, vitals=str(given))


def test_reason_why_a_row_is_no_event_is_read_from_the_query(tmp_path, monkeypatch):
    """A condition that is added to query.sql with its reason is counted by it; one without, as outside the stays."""
    given = "    AND (l.hadm_id = s.admission_id OR l.hadm_id IS NULL)\n"
    more = "    AND IFNULL(l.valuenum, 0) < 7.0  -- else: high, it's said\n    AND l.itemid <> 4\n"
    (tmp_path / "query.sql").write_text(QUERY.replace(given, given + more))
    monkeypatch.setattr(mimic, "QUERY_FILE", tmp_path / "query.sql")
    table, report = read(tmp_path)
    labs = accounts(report)["hosp/labevents"]
    assert labs.in_stays == (table.event_type == 2).sum() == 5
    # High beyond the stays, too (9.1 and 9.2); the pH of 7.32, glucose and creatinine of 7 in them.
    assert labs.lost == {"high, it's said": 5, "outside the ICU stays": 1}


@pytest.mark.parametrize("table", EVENT_TABLES)
def test_row_without_any_value_has_no_fault_but_its_missing_time(table):
    fault = mimic.faults_of_rows(QUERY)[table]
    nothing = ", ".join(f"NULL::{kind} AS {name}" for name, kind in MIMIC_TABLES[table].items())
    timed = nothing.replace("NULL::TIMESTAMP", "TIMESTAMP '2150-01-01'")
    for row, expected in ((nothing, "without a time"), (timed, None)):
        assert duckdb.sql(f"SELECT {fault} FROM (SELECT {row})").fetchall() == [(expected,)]


def test_stays_whose_admission_or_patient_is_missing_are_counted(tmp_path):
    more = "".join(f"\n{ids},MICU,MICU,{IN},{OUT},2" for ids in ("4,41,401", "1,,402", "1,11,", "2,11,403"))
    order = "\n11,2150-01-01 11:00:00,,Aspirin,,1,TAB,,"  # of patient 1, whose admission patient 2 claims, too
    orders = {"icustays": TABLES["icustays"] + more, "prescriptions": TABLES["prescriptions"] + order}
    table, report = read(tmp_path, **orders, **swapped("patients", "\n3,M", "\n33,M"))
    words = ["whose hadm_id is not in hosp/admissions", "whose subject_id is not in hosp/patients", "without hadm_id"]
    words += ["whose hadm_id is of another subject_id in hosp/admissions", "without stay_id"]
    assert accounts(report)["icu/icustays"].lost == dict.fromkeys(words, 1)
    assert accounts(report)["hosp/prescriptions"].of_cohort == 3 and 403 not in set(table.stays.icu_stay_id)


def test_table_of_another_release_is_a_warning_that_names_it(tmp_path, log):
    read(tmp_path, **swapped("ingredientevents", "\n201,", "\n999,"))[1].log(1)
    assert "icu/ingredientevents contributes nothing: 4 rows read, 0 of the cohort" in log.text


def test_a_table_in_both_forms_is_an_error_that_names_both(tmp_path):
    folder = write_folder(tmp_path / "mimic")
    (folder / "hosp" / "patients.csv").touch()
    with pytest.raises(InputError, match=r"patients\.csv and .*patients\.csv\.gz are the same table"):
        run_mimic_query(folder, tmp_path)


def test_stale_shards_of_an_earlier_export_and_one_without_the_outcome_are_refused(tmp_path):
    (result,) = run_mimic_query(write_folder(tmp_path / "mimic"), tmp_path).glob("*.parquet")
    for name in ("new-000.parquet", "old-000.parquet"):
        (tmp_path / name).write_bytes(result.read_bytes())
    with pytest.raises(InputError, match=r"4 stays .*first icu_stay_id 101 in .*new-000.*old-000"):
        read_stays(tmp_path / "*.parquet")
    rows = pyarrow.parquet.read_table(result).drop_columns([*tables.LABELS.values()][1:])
    pyarrow.parquet.write_table(rows, tmp_path / "earlier.parquet")
    assert read_stays(tmp_path / "earlier.parquet")[0].labels.tolist() == [0, 0, 1]
    with pytest.raises(InputError, match="missing columns patient_expired_within_30d"):
        read_stays(tmp_path / "earlier.parquet", outcome="30d")


@pytest.mark.parametrize("case", CASES["tables"])
def test_bad_table_is_an_input_error_without_its_rows(case, tmp_path):
    with pytest.raises(InputError, match=case["message"]) as caught:
        rows_of(tmp_path, **changed_tables([case["change"]]))
    assert "sixfold" not in str(caught.value) and "2150" not in str(caught.value) and caught.value.__cause__ is None
    assert not list(tmp_path.glob("query_results/[!.]*")) and not leftovers(tmp_path)
