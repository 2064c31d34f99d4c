"""What lets the whole of MIMIC-IV be read: limits of memory, work that is kept, arrays that are mapped, own texts only."""

import duckdb
import numpy as np
import pyarrow.parquet
import pytest
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
    train.read_stays(write_folder(tmp_path / "mimic"), tmp_path, memory_limit="300MiB", threads=1)
    assert len(limits) >= 2 and set(limits) == {("300.0 MiB", 1, "UTC")}


@pytest.mark.parametrize("limit", ["much", "GB", ""])
def test_limit_that_is_none_is_a_clear_error(limit):
    with pytest.raises(train.InputError, match="--memory-limit"):
        train.open_duckdb(limit, 1)


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
        with pytest.raises(train.InputError, match="--memory-limit 1GB.*goes on from there"):
            train.run_mimic_query(folder, tmp_path, "1GB")
    first = next(tmp_path.glob("query_results/*/*/part_0000.parquet")).stat().st_mtime_ns
    result = train.run_mimic_query(folder, tmp_path)
    assert sorted(loaded) == sorted(train.MIMIC_TABLES) and (result / "part_0000.parquet").stat().st_mtime_ns == first
    assert pyarrow.parquet.read_table(result).equals(pyarrow.parquet.read_table(whole))
    assert not list(tmp_path.glob("query_results/unfinished-*")) and not leftovers(tmp_path)


def test_rows_far_from_every_stay_are_not_stored_and_the_others_lie_by_patient(tmp_path):
    labs = TABLES["hosp/labevents"] + "\n1,11,1,2150-01-06 10:00:00,,1,1,mg/dL,0.5,1.2,,STAT,"  # between stays 101, 102
    working = tmp_path / "working"
    working.mkdir()
    with train.open_duckdb("1GB", 1, working / "mimic.duckdb") as database:
        for table, path in train.find_mimic_files(write_folder(tmp_path / "mimic", labevents=labs)).items():
            train.load_mimic_table(database, table, path)
        stored = database.execute("SELECT patient, charttime FROM labevents").fetchall()
    assert len(stored) == 11  # all labs of the tables above
    assert [patient for patient, _ in stored] == sorted(patient for patient, _ in stored)
    assert max(time for _, time in stored).month == 1 and 6 not in {time.day for _, time in stored}
