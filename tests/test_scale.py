"""What lets the whole of MIMIC-IV be read: limits of memory, kept work, mapped arrays, own texts only."""

import shutil

import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
from accelerate import Accelerator
from small_table import small_table
from test_query import TABLES, leftovers, write_folder

import train


@pytest.fixture(scope="module")
def sample():
    return train.read_stays(train.SAMPLE)[0]


def test_table_of_some_stays_and_events_has_those_and_their_texts_only(sample):
    keep_event = sample.event_type != train.EVENT_TYPES.index("labevent")
    part = sample.take(np.array([5, 3]), keep_event)
    own = part.with_own_texts()
    for new, stay in enumerate((5, 3)):
        events = np.flatnonzero((sample.stay_of_event == stay) & keep_event)
        rows = slice(own.offsets[new], own.offsets[new + 1])
        assert own.texts[own.text[rows]].tolist() == sample.texts[sample.text[events]].tolist()
        np.testing.assert_array_equal(own.minutes_to_end[rows], sample.minutes_to_end[events])
    assert sorted(own.texts) == sorted(set(part.texts[part.text])) and len(own.texts) < len(sample.texts)


def test_every_connection_has_the_limits(tmp_path, monkeypatch):
    limits, connect = [], train.open_duckdb

    def watched(*arguments):
        con = connect(*arguments)
        settings = "current_setting('memory_limit'), current_setting('threads'), current_setting('TimeZone')"
        limits.append(con.execute(f"SELECT {settings}").fetchall()[0])
        return con

    monkeypatch.setattr(train, "open_duckdb", watched)
    train.read_stays(write_folder(tmp_path / "mimic"), tmp_path, memory_limit="900MiB", threads=1)
    assert len(limits) >= 2 and set(limits) == {("900.0 MiB", 1, "UTC")}


@pytest.mark.parametrize("limit", ["much", "GB", ""])
def test_limit_that_is_none_is_a_clear_error(limit, tmp_path):
    with pytest.raises(train.InputError, match="--memory-limit"):
        train.open_duckdb(limit, 1, tmp_path)


def test_query_that_runs_out_of_memory_keeps_its_tables_and_goes_on(tmp_path, monkeypatch):
    folder, loaded = write_folder(tmp_path / "mimic"), []
    monkeypatch.setattr(train, "ROWS_PER_SLICE", 6)
    whole = train.run_mimic_query(folder, tmp_path / "whole")

    def load(database, table, path):
        loaded.append(table)
        load_table(database, table, path)

    def collect(database, query, result):
        collect_stays(database, query, result)
        next(result.glob("part_0001.parquet")).unlink()  # one slice is done, the next is not
        raise duckdb.OutOfMemoryException("no more")

    load_table, collect_stays = train.load_mimic_table, train.collect_stays
    monkeypatch.setattr(train, "load_mimic_table", load)
    with monkeypatch.context() as patch:
        patch.setattr(train, "collect_stays", collect)
        with pytest.raises(train.InputError, match="query.sql stopped.*--memory-limit 1GB"):
            train.run_mimic_query(folder, tmp_path, "1GB")
    first = next(tmp_path.glob("query_results/*/*/part_0000.parquet")).stat().st_mtime_ns
    result = train.run_mimic_query(folder, tmp_path)
    assert sorted(loaded) == sorted(train.MIMIC_TABLES) and (result / "part_0000.parquet").stat().st_mtime_ns == first
    assert pyarrow.parquet.read_table(result).equals(pyarrow.parquet.read_table(whole))
    assert not list(tmp_path.glob("query_results/unfinished-*")) and not leftovers(tmp_path)


def test_rows_far_from_every_stay_are_not_stored_and_the_others_lie_by_patient(tmp_path):
    labs = TABLES["hosp/labevents"] + "\n1,11,1,2150-01-06 10:00:00,,1,1,mg/dL,0.5,1.2,,STAT,"  # between stays 101, 102
    with train.open_duckdb("1GB", 1, tmp_path / "spilled", tmp_path / "mimic.duckdb") as database:
        for table, path in train.find_mimic_files(write_folder(tmp_path / "mimic", labevents=labs)).items():
            train.load_mimic_table(database, table, path)
        stored = database.execute("SELECT patient, charttime FROM labevents").fetchall()
    assert len(stored) == 11  # all labs of the tables above
    assert [patient for patient, _ in stored] == sorted(patient for patient, _ in stored)
    assert max(time for _, time in stored).month == 1 and 6 not in {time.day for _, time in stored}


def assert_same_table(one, two):
    pd.testing.assert_frame_equal(one.stays, two.stays)
    for name in ("offsets", "texts", *train.EVENT_ARRAYS):
        first, second = getattr(one, name), getattr(two, name)
        np.testing.assert_array_equal(first, second)
        assert first.dtype == second.dtype


def test_second_start_maps_the_arrays_of_the_first_until_the_source_changes(sample, tmp_path, monkeypatch):
    source = shutil.copy(train.SAMPLE, tmp_path / "data.csv")
    monkeypatch.setattr(train, "KEEP_ARRAYS_FROM", 0)
    first, report = train.read_stays(source, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(train, "open_duckdb", lambda *limits: pytest.fail("the source was read again"))
        second, same_report = train.read_stays(source, tmp_path / "cache")
    assert_same_table(first, sample)
    assert_same_table(second, sample)
    assert report == same_report and not second.minutes_to_end.flags.owndata
    rows = source.read_text("utf-8").splitlines(keepends=True)
    source.write_text("".join(rows[:-1]), "utf-8")
    assert len(train.read_stays(source, tmp_path / "cache")[0].text) == len(sample.text) - 1
    assert not leftovers(tmp_path / "cache")


def test_damaged_arrays_are_made_anew(sample, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "KEEP_ARRAYS_FROM", 0)
    train.read_stays(train.SAMPLE, tmp_path)
    array = next(tmp_path.rglob("minutes_to_end.npy"))
    array.write_bytes(array.read_bytes()[:-100])
    assert_same_table(train.read_stays(train.SAMPLE, tmp_path)[0], sample)


def test_kept_arrays_do_not_hide_that_the_source_lacks_a_feature(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "KEEP_ARRAYS_FROM", 0)
    small_table(4).drop(columns="marital_status").to_csv(tmp_path / "data.csv", index=False)
    train.read_stays(tmp_path / "data.csv", tmp_path, static_features=["patient_age"])
    with pytest.raises(train.InputError, match="missing columns marital_status"):
        train.read_stays(tmp_path / "data.csv", tmp_path, static_features=["marital_status"])


def test_small_source_leaves_nothing_in_the_cache(tmp_path):
    train.read_stays(train.SAMPLE, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_out_of_memory_does_not_blame_the_file(tmp_path):
    with pytest.raises(train.InputError, match="--memory-limit 8MB .*Nothing is wrong with the data") as caught:
        train.read_stays(train.SAMPLE, tmp_path, memory_limit="8MB", threads=1)
    assert "CSV must be" not in str(caught.value)


def test_arrays_beyond_memory_end_in_one_sentence(tmp_path, monkeypatch, capsys):
    def allocate(*_):
        raise MemoryError("Unable to allocate 17 GiB")

    monkeypatch.setattr(train, "run", allocate)
    assert train.main([]) == 2
    message = capsys.readouterr().err
    assert "memory does not suffice (Unable to allocate 17 GiB)" in message and message.count("\n") == 1
    monkeypatch.setattr(train, "_load_arrays", allocate)
    with pytest.raises(train.InputError, match="--memory-limit 1GB .*Nothing is wrong with the data"):
        train.read_stays(train.SAMPLE, tmp_path, memory_limit="1GB")


def test_prospective_cohort_has_the_texts_that_it_reads(sample):
    settings = train.check_settings(train.Settings(data=str(train.SAMPLE), observation_hours=6))
    table = train.read_source(settings.data, settings, Accelerator()).table
    known = sample.known_minutes_since_intime <= 6 * 60
    assert set(table.texts) == set(table.texts[table.text]) == set(sample.texts[sample.text[known]]) < set(sample.texts)
