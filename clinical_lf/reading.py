"""Any source to a StayTable: two relations `stay_rows` and `event_rows`, checked, then loaded as flat arrays."""

from __future__ import annotations

import contextlib
import glob
import uuid
from collections.abc import Sequence
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
from duckdb import DuckDBPyConnection

from clinical_lf import duck, files, tables
from clinical_lf.files import InputError, logger
from clinical_lf.meds import MedsTask, is_meds, register_meds
from clinical_lf.mimic import complete_account, run_mimic_query
from clinical_lf.tables import (
    EVENT_ARRAYS,
    EVENT_COLUMNS,
    EVENT_TYPES,
    LABEL,
    STATIC_COLUMNS,
    STAY_COLUMNS,
    ReadReport,
    StayTable,
)

# What was read of a big source is kept as arrays: a later start maps them into memory instead of reading it again.
ARRAYS_VERSION = 4  # raise it when what is made of a source changes: arrays that were kept before are then made anew
KEEP_ARRAYS_FROM = 2**24  # bytes of the source; a smaller one is read in seconds
IDS = ("patient_id", "admission_id", "icu_stay_id")

# given: a value as trimmed text, NULL where it only says that it is missing. Here infinity is an error.
MACROS = """
    CREATE TEMP MACRO given(value) AS
    CASE WHEN trim(CAST(value AS VARCHAR)) NOT IN ({missing}) THEN trim(CAST(value AS VARCHAR)) END;
    CREATE TEMP MACRO text_of(value) AS
    CASE WHEN given(value) IS NULL AND trim(value) <> '' THEN '' ELSE coalesce(CAST(value AS VARCHAR), '') END
"""
FLAT_ROWS = "CREATE VIEW stay_rows AS SELECT * FROM {rows}; CREATE VIEW event_rows AS SELECT * FROM {rows}"
# BigQuery's exports wrap each element of an array in structs called list and element.
NESTED_ROWS = """
    CREATE VIEW stay_rows AS SELECT * EXCLUDE events FROM {rows};
    CREATE VIEW event_rows AS
    SELECT icu_stay_id, event.* FROM (SELECT icu_stay_id, unnest({events}) AS event FROM {rows})
"""
# Values that are no number or time. A column that has its type already has none: it is not written out to look.
UNREADABLE = "(TRY_CAST({0} AS {1}) IS NULL AND given({0}) IS NOT NULL)"
# Values that a type takes but a table should not have: DuckDB rounds 1.5 to an integer, and infinity is a number and a
# time. Per type: the condition, and what the message asks for.
UNFIT = {
    "BIGINT": ("TRY_CAST({0} AS BIGINT) <> TRY_CAST({0} AS DOUBLE)", "an integer"),
    "TIMESTAMP": ("NOT isfinite(TRY_CAST({0} AS TIMESTAMP))", "a time like 2150-01-31 23:59:00"),
    "DOUBLE": ("abs(nullif(TRY_CAST({0} AS DOUBLE), 'NaN'::DOUBLE)) > 1e30", "a finite number"),
}
BAD_ROWS = """
    SELECT number FROM (SELECT row_number() OVER () AS number, * FROM {view})
    WHERE {condition} ORDER BY number LIMIT 3
"""
DOUBLE_STAYS = """
    SELECT icu_stay_id, list_sort(list(DISTINCT file_of_row)) AS files
    FROM stay_rows GROUP BY icu_stay_id HAVING count(*) > 1 ORDER BY icu_stay_id
"""
# Why a stay or an event is left out: the first condition that holds. Keys are those of words.yaml's reasons.
STAY_FAULTS = {
    "stay_without_intime": "icu_intime IS NULL",
    "stay_without_end": "final_time IS NULL",
    "stay_after_death": "patient_death_time < icu_intime",
    "stay_ends_before_it_begins": "final_time < icu_intime",
    "stay_with_unfit_label": f"coalesce({LABEL} NOT IN (0, 1), $need_label)",
    "stay_with_death_and_label_0": f"{LABEL} = 0 AND patient_death_time = final_time",
}
EVENT_FAULTS = {
    "event_without_time": "minutes IS NULL OR to_end IS NULL",
    "event_before_admission": "minutes < 0",
    "event_after_the_end": "to_end < 0",
}
# The length of a stay is that of its record, recomputed: MIMIC-IV's own runs to outtime, hours past a death.
ALL_STAYS = """
    CREATE TEMP TABLE all_stays AS
    SELECT *, {fault} AS fault
    FROM (
        SELECT * REPLACE (CASE WHEN $is_meds THEN NULL ELSE epoch(final_time - icu_intime) / 86400 END
                          AS icu_length_of_stay_in_days),
               icu_length_of_stay_in_days AS stated_days
        FROM (SELECT *, least(icu_outtime, patient_death_time) AS final_time FROM ({stays}))
    )
"""
FAULTY_STAYS = """
    SELECT fault, count(*), list_sort(list(icu_stay_id))[:4]
    FROM all_stays WHERE fault IS NOT NULL GROUP BY fault ORDER BY fault
"""
OTHER_LENGTHS = """
    SELECT count(*) FROM all_stays WHERE fault IS NULL AND abs(stated_days - icu_length_of_stay_in_days) > 0.01
"""
STAYS = """
    CREATE TEMP TABLE stays AS
    SELECT row_number() OVER (ORDER BY icu_stay_id) - 1 AS stay, * EXCLUDE (fault, stated_days)
    FROM all_stays WHERE fault IS NULL
"""
# Texts are numbered first: what is compared, sorted and counted of events are numbers, which are small and of one size.
# Each is read as it is written, and cleaned once.
ALL_TEXTS = """
    CREATE TEMP TABLE all_texts AS
    SELECT written, event_text, dense_rank() OVER (ORDER BY event_text) AS code
    FROM (SELECT written, text_of(written) AS event_text FROM (SELECT DISTINCT event_text AS written FROM event_rows))
"""
EVENTS = """
    CREATE TEMP TABLE events AS
    SELECT stay, event_type, code, stated, epoch(event_time - icu_intime) / 60 AS minutes,
           epoch(known_time - icu_intime) / 60 AS known, epoch(final_time - event_time) / 60 AS to_end
    FROM (
        SELECT TRY_CAST(icu_stay_id AS BIGINT) AS icu_stay_id, TRY_CAST(event_time AS TIMESTAMP) AS event_time,
               TRY_CAST(event_known_time AS TIMESTAMP) AS known_time, event_text AS written,
               coalesce(list_position($types, given(event_type)) - 1, len($types))::TINYINT AS event_type,
               TRY_CAST(relative_time_to_final_event AS DOUBLE) AS stated
        FROM event_rows
    ) AS e
    JOIN stays USING (icu_stay_id)
    JOIN all_texts AS t ON t.written IS NOT DISTINCT FROM e.written
"""
COMPARED_TIMES = """
    SELECT count(*) FILTER (WHERE abs(to_end) > 60) AS compared,
           count(*) FILTER (WHERE abs(to_end) > 60 AND abs(stated * 60 - to_end) < 2) AS in_hours,
           count(*) FILTER (WHERE abs(stated - to_end) > 2) AS differ
    FROM events WHERE isfinite(stated) AND to_end IS NOT NULL
"""
DIFFERING_STAYS = """
    SELECT DISTINCT icu_stay_id FROM events JOIN stays USING (stay)
    WHERE isfinite(stated) AND abs(stated - to_end) > 2 ORDER BY icu_stay_id LIMIT 3
"""
TEXTS = """
    CREATE TEMP TABLE texts AS
    SELECT row_number() OVER (ORDER BY event_text) - 1 AS text, code, event_text
    FROM (SELECT DISTINCT code, event_text FROM all_texts) SEMI JOIN events USING (code)
"""
ARRAYS = """
    SELECT event_type, text::INTEGER AS text, minutes::FLOAT AS minutes_since_intime,
           known::FLOAT AS known_minutes_since_intime, to_end::FLOAT AS minutes_to_end
    FROM events JOIN texts USING (code)
    ORDER BY stay, minutes_since_intime, event_type, text, known
"""


def read_stays(
    data: str | Path | pd.DataFrame,
    cache_dir: str | Path = "clinical_LF_precomp_emb",
    need_label: bool = True,
    task: MedsTask | None = None,
    memory_limit: str = "33%",
    static_features: Sequence[str] = STATIC_COLUMNS,
) -> tuple[StayTable, ReadReport]:
    """Read a MIMIC-IV folder, nested Parquet or flat CSV/Parquet; also say how much was repaired or dropped, and why.

    data may be a data frame, one row per event. task: what is predicted, where the folder is a MEDS data set. Of the
    columns that describe a stay, only the static_features must be there. Raises InputError for a table that cannot
    be read as it was meant.
    """
    results = Path(cache_dir) / "query_results"

    def read(source: Path | pd.DataFrame, name: str) -> tuple[StayTable, ReadReport]:
        spill = results / f".spilled{files.HALF_WRITTEN}{uuid.uuid4().hex}"
        try:
            with duck.open_duckdb(memory_limit, spill) as con:
                return _read_tables(con, source, name, need_label, task, static_features)
        except (duckdb.OutOfMemoryException, MemoryError) as error:  # numpy's arrays need room beside DuckDB
            raise duck.out_of_memory_error(f"{name}: reading", error, memory_limit, results) from None
        except duckdb.Error as error:
            raise InputError(
                f"{name}: cannot be read ({duck.reason_without_rows(error)}). CSV must be UTF-8 with a header and the "
                "columns of the README's data table; Parquet files of one glob must share a schema."
            ) from None

    if isinstance(data, pd.DataFrame):
        return read(data, "the data frame")
    path = existing_source(str(data), task)
    if path.is_dir() and task is None:
        path = run_mimic_query(path, Path(cache_dir), memory_limit) / "*.parquet"
    kept = kept_arrays(path, results, need_label, task)
    if kept is None:
        return read(path, str(data))
    with contextlib.suppress(OSError, ValueError):  # not there, or damaged
        return tables.load_arrays(kept, static_features)
    with files.lock_folder(results):
        with contextlib.suppress(OSError, ValueError):  # another run made them while this one waited
            return tables.load_arrays(kept, static_features)
        content = read(path, str(data))
        files.delete_quietly(kept)
        files.write_whole(kept, lambda folder: tables.save_arrays(folder, *content))
    return tables.load_arrays(kept)


def existing_source(data: str, task: MedsTask | None) -> Path:
    """Return the path of a data set. Raises InputError where there is none, or labels where they have no use."""
    path = Path(data)
    if "\n" in data:
        raise InputError("the data's path is a text of several lines. Give a path, or the data frame itself.")
    if not path.exists() and not any(sign in data for sign in "*?["):
        raise InputError(
            f"{data}: no such file or folder. --data takes a MIMIC-IV folder, a Parquet file or glob, or a CSV file."
        )
    if is_meds(path) != (task is not None):
        raise InputError(
            f"{data}: a MEDS data set and --labels go together: a file or folder of labels, or mortality-in-icu@24h."
        )
    return path


def kept_arrays(path: Path, results: Path, need_label: bool, task: MedsTask | None) -> Path | None:
    """Return the folder for the arrays of a source as its files are now; None for a small one, whose are not kept."""
    patterns = [path]
    if task:
        labels = Path(task.labels)
        patterns = [path / "**" / "*.parquet", labels, labels / "**" / "*.parquet"]
    names = [name for pattern in patterns for name in sorted(glob.glob(str(pattern), recursive=True))]
    stats = [(str(file.absolute()), *files.size_and_time(file)) for file in map(Path, names)]
    if sum(size for _, size, _ in stats) < KEEP_ARRAYS_FROM:
        return None
    key = files.cache_key(ARRAYS_VERSION, STAY_COLUMNS, EVENT_COLUMNS, EVENT_TYPES, need_label, task, stats)
    return results / f"{key}.arrays"


def _read_tables(
    con: DuckDBPyConnection,
    data: Path | pd.DataFrame,
    source: str,
    need_label: bool,
    task: MedsTask | None,
    static_features: Sequence[str],
) -> tuple[StayTable, ReadReport]:
    """Check and load the stays of a source; DuckDB's own errors for what cannot be read. Messages name the `source`."""
    con.execute(MACROS.format(missing=", ".join(duck.quoted(word) for word in duck.MISSING if "inf" not in word)))
    kind, counts = "meds", {}
    if task:
        counts = register_meds(con, Path(source), task)
    else:
        kind = _register_source(con, data)
    _check_columns(con, source, need_label, static_features)
    _check_values(con, source, kind, need_label)
    _check_rows_of_stays(con, source, kind)
    _load_stays(con, kind, need_label, counts)
    notes = {"length_recomputed": duck.first_value(con, OTHER_LENGTHS)}
    table = _load_events(con, source, counts)
    sources = complete_account(con, Path(str(data)).parent, table) if kind == "nested" else []
    return table, ReadReport(files.without_zeros(counts), notes, sources)


def _register_source(con: DuckDBPyConnection, path: Path | pd.DataFrame) -> str:
    """Make views `stay_rows` and `event_rows` over the file or frame, columns as is; return 'nested' or 'flat'."""
    if isinstance(path, pd.DataFrame):
        con.register("stay_rows", path)
        con.register("event_rows", path)
        return "flat"
    is_csv = path.name.lower().endswith((".csv", ".csv.gz"))
    if not is_csv and not path.name.lower().endswith(".parquet"):
        raise InputError(f"{path}: --data takes a folder, *.parquet, *.csv or *.csv.gz.")
    if path.exists() and path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty. Copy or export it again.")
    rows = duck.csv_rows(path) if is_csv else f"read_parquet({duck.quoted(path)}, filename = 'file_of_row')"
    types = duck.column_types(con, rows)
    if "events" not in types:
        con.execute(FLAT_ROWS.format(rows=rows))
        return "flat"
    events = "events" if types["events"].endswith("[]") else "list_transform(events.list, lambda e: e.element)"
    con.execute(NESTED_ROWS.format(rows=rows, events=events))
    return "nested"


def _check_columns(con: DuckDBPyConnection, source: str, need_label: bool, static_features: Sequence[str]) -> None:
    """Refuse a table without a column that is needed, or whose ids lost digits."""
    stay_columns, event_columns = duck.column_types(con, "stay_rows"), duck.column_types(con, "event_rows")
    unneeded = set(STATIC_COLUMNS) - set(static_features) | (set() if need_label else {LABEL})
    missing = [name for name in STAY_COLUMNS if name not in stay_columns and name not in unneeded]
    if missing := missing + [name for name in EVENT_COLUMNS if name not in event_columns]:
        raise InputError(
            f"{source}: missing columns {', '.join(missing)}. query.sql yields them all; the README's data table lists "
            "them. A static column that --static-features leaves out may be missing."
        )
    for name in [name for name in IDS if stay_columns[name] in ("DOUBLE", "FLOAT")]:
        if lost := duck.first_value(con, f"SELECT count(*) FROM stay_rows WHERE abs({name}) > 9007199254740992"):
            raise InputError(
                f"{source}: column {name} is stored as floating point and passes 2^53 in {lost} rows, where ids "
                "lose digits. Export it as INT64."
            )


def _typed(name: str, kind: str) -> str:
    """Return the SQL for a column as its type; what stands for a missing value is NULL."""
    return f"given({name})" if kind == "VARCHAR" else f"TRY_CAST({name} AS {kind})"


def _check_values(con: DuckDBPyConnection, source: str, kind: str, need_label: bool) -> None:
    """Refuse unreadable and missing values; the message names the first rows.

    A flat table is somebody's own make: a stay without admission time or label is a mistake of making it. In what the
    query returned it is a fault of the data: `_load_stays` drops that stay.
    """
    needed = IDS if kind == "nested" else (*IDS, "icu_intime")
    for view, columns in (("stay_rows", STAY_COLUMNS), ("event_rows", EVENT_COLUMNS)):
        present, checks = duck.column_types(con, view), {}
        for name in [name for name in columns if name in present and columns[name] != "VARCHAR"]:
            value, own = _typed(name, columns[name]), UNFIT[columns[name]][0].format(name)
            is_bad = [own, UNREADABLE.format(name, columns[name]) if present[name] != columns[name] else ""]
            is_bad.append(f"{value} IS NULL" if name in needed else "")
            if name == LABEL and kind != "nested":
                is_bad += [f"{value} NOT IN (0, 1)", f"{value} IS NULL" if need_label else ""]
            checks[name] = " OR ".join(filter(None, is_bad))
        counts = [f"count(*) FILTER (WHERE {condition})" for condition in checks.values()]
        found = con.execute(f"SELECT {', '.join(counts)} FROM {view}").fetchall()[0]  # all in one pass
        for (name, condition), count in zip(checks.items(), found):
            if count:
                bad = con.execute(BAD_ROWS.format(view=view, condition=condition)).fetchall()
                meaning = "0 or 1" if name == LABEL else UNFIT[columns[name]][1]
                raise InputError(
                    f"{source}: column {name} is not {meaning} in {count} rows, first row {duck.first_three(bad)} "
                    "after the header. Mend or remove these rows."
                )


def _check_rows_of_stays(con: DuckDBPyConnection, source: str, kind: str) -> None:
    """Refuse a stay in two rows of nested Parquet, and stays of a flat table whose rows contradict each other."""
    if kind == "nested":  # most often shards of an earlier export beside those of a later one
        if twice := con.execute(DOUBLE_STAYS).fetchall():
            raise InputError(
                f"{source}: {len(twice)} stays stand in more than one row, first icu_stay_id {twice[0][0]} in "
                f"{', '.join(twice[0][1][:3])}. Are these files of two exports? Keep those of one."
            )
        return
    present, conflicts = duck.column_types(con, "stay_rows"), {}
    for name in [name for name in STAY_COLUMNS if name in present and name != "icu_stay_id"]:
        value = f"coalesce(CAST({_typed(name, STAY_COLUMNS[name])} AS VARCHAR), '')"
        conflicts[name] = f"count(DISTINCT {value}) > 1"
    found = con.execute(
        f"SELECT TRY_CAST(icu_stay_id AS BIGINT) AS stay, {', '.join(conflicts.values())} FROM stay_rows "
        f"GROUP BY stay HAVING {' OR '.join(conflicts.values())} ORDER BY stay"
    ).fetchall()
    if found:
        names = [name for name, is_bad in zip(conflicts, found[0][1:]) if is_bad]
        raise InputError(
            f"{source}: {len(found)} stays contradict themselves, first icu_stay_id {duck.first_three(found)} in "
            f"{', '.join(names)}. A stay has one value of each stay column on all its rows."
        )


def _load_stays(con: DuckDBPyConnection, kind: str, need_label: bool, counts: dict[str, int]) -> None:
    """Make the table `stays`; add to the counts how many were left out, and log their first ids."""
    present, columns = duck.column_types(con, "stay_rows"), ["TRY_CAST(icu_stay_id AS BIGINT) AS icu_stay_id"]
    for name, column_kind in STAY_COLUMNS.items():
        if name != "icu_stay_id":
            value = f"any_value({_typed(name, column_kind)})" if name in present else f"NULL::{column_kind}"
            columns.append(f"{value} AS {name}")
    grouped = f"SELECT {', '.join(columns)} FROM stay_rows GROUP BY 1"
    statement = ALL_STAYS.format(fault=duck.sql_case(STAY_FAULTS), stays=grouped)
    con.execute(statement, {"is_meds": kind == "meds", "need_label": need_label})
    for code, count, first in con.execute(FAULTY_STAYS).fetchall():
        counts[code] = count
        ids = ", ".join(map(str, first[:3])) + ", ..." * (count > 3)
        logger.warning(f"Dropped     {count:,} {files.wording('reasons')[code]}: icu_stay_id {ids}")
    con.execute(STAYS)


def _load_events(con: DuckDBPyConnection, source: str, counts: dict[str, int]) -> StayTable:
    """Load stays, events and distinct texts, sorted; add to the counts what was left out of events.

    The work is DuckDB's, Python sees only flat arrays. Contradicting times are an InputError.
    """
    con.execute(ALL_TEXTS)
    con.execute(EVENTS, {"types": list(EVENT_TYPES)})
    compared, in_hours, differ = con.execute(COMPARED_TIMES).fetchall()[0]
    if differ and in_hours > 0.5 * compared:
        raise InputError(
            f"{source}: relative_time_to_final_event is in hours in {in_hours} of {compared} events. "
            "It must be minutes: multiply by 60."
        )
    if differ:
        first = duck.first_three(con.execute(DIFFERING_STAYS).fetchall())
        raise InputError(
            f"{source}: relative_time_to_final_event differs by more than 2 minutes from LEAST(icu_outtime, "
            f"patient_death_time) - event_time in {differ} events, first icu_stay_id {first}. Recompute it in minutes."
        )
    for code, condition in EVENT_FAULTS.items():
        counts[code] = duck.first_value(con, f"DELETE FROM events WHERE {condition}")
    before = duck.first_value(con, "SELECT count(*) FROM events")
    distinct = "CREATE OR REPLACE TEMP TABLE events AS SELECT DISTINCT * EXCLUDE stated FROM events"
    counts["event_repeated"] = before - duck.first_value(con, distinct)
    con.execute(TEXTS)
    stays = con.execute("SELECT * EXCLUDE (stay, final_time) FROM stays ORDER BY stay").df()
    if stays.empty and not any(counts.values()):
        raise InputError(f"{source}: the table has a header but no rows.")
    counted = con.execute("SELECT stay, count(*) AS events FROM events GROUP BY stay ORDER BY stay").fetchnumpy()
    counts["stay_without_events"] = len(stays) - len(counted["stay"])
    offsets = tables.sums_before(counted["events"])
    arrays = {name: np.empty(offsets[-1], kind) for name, kind in EVENT_ARRAYS.items()}
    filled = 0
    for batch in con.sql(ARRAYS).to_arrow_reader(2**20):  # never all of them twice in memory
        for name, array in arrays.items():
            array[filled : filled + len(batch)] = batch[name].to_numpy(zero_copy_only=False)  # NULL becomes NaN
        filled += len(batch)
    counts["event_of_unknown_type"] = int((arrays["event_type"] == len(EVENT_TYPES)).sum())
    if not filled:
        reasons = [f"{count} {files.wording('reasons')[code]}" for code, count in counts.items() if count]
        raise InputError(
            f"{source}: no stay has an event between icu_intime and the final event "
            f"(dropped: {'; '.join(reasons) or 'nothing'})."
        )
    stays = stays.iloc[counted["stay"]].reset_index(drop=True)
    texts = con.execute("SELECT event_text FROM texts ORDER BY text").fetchnumpy()["event_text"]
    return StayTable(stays, offsets, texts=texts, **arrays)
