"""Any source to a StayTable: two relations `stay_rows` and `event_rows`, checked, then loaded as flat arrays."""

import contextlib
import os
import uuid
from collections import Counter
from collections.abc import Sequence
from glob import glob
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
from duckdb import DuckDBPyConnection

from clinical_lf import duck, files, tables
from clinical_lf.duck import FIRST
from clinical_lf.files import InputError, logger
from clinical_lf.meds import MedsTask, is_meds, meds_account, meds_files, register_meds
from clinical_lf.mimic import complete_account, run_mimic_query
from clinical_lf.tables import EVENT_COLUMNS, EVENT_TYPES, LABEL, STATIC_COLUMNS, STAY_COLUMNS, ReadReport, StayTable

# What was read of a big source is kept as arrays: a later start maps them into memory instead of reading it again.
ARRAYS_VERSION = 5  # raise it when what is made of a source changes: arrays that were kept before are then made anew
KEEP_ARRAYS_FROM = 2**24  # bytes of the source; a smaller one is read in seconds
IDS = ("patient_id", "admission_id", "icu_stay_id")

# Values that a type takes but a table should not have: DuckDB rounds 1.5 to an integer, and infinity is a number and a
# time. Per type: the condition on the value and what is written, and what the message asks for.
UNFIT = {
    "BIGINT": ("{0} <> TRY_CAST({0}_written AS DOUBLE)", "an integer"),
    "TIMESTAMP": ("NOT isfinite({0})", "a time like 2150-01-31 23:59:00"),
    "DOUBLE": ("abs(nullif({0}, 'NaN'::DOUBLE)) > 1e30", "a finite number"),
}


def read_stays(
    data: str | Path | pd.DataFrame,
    cache_dir: str | Path = "clinical_LF_precomp_emb",
    need_label: bool = True,
    task: MedsTask | None = None,
    memory_limit: str = "33%",
    static_features: Sequence[str] = STATIC_COLUMNS,
    outcome: str = "hospital",
) -> tuple[StayTable, ReadReport]:
    """Read a MIMIC-IV folder, nested Parquet or flat CSV/Parquet; also say how much was repaired or dropped, and why.

    data may be a data frame, one row per event. task: what is predicted of a MEDS data set; outcome: of others, as in
    tables.LABELS. Of what describes a stay, only the static_features must be there. Raises InputError for a table that
    cannot be read as it was meant.
    """
    results, parts = Path(cache_dir) / "query_results", list[Path]()

    def read(source: Path | list[Path] | pd.DataFrame, name: str) -> tuple[StayTable, ReadReport]:
        spill = results / f".spilled{files.HALF_WRITTEN}{uuid.uuid4().hex}"
        try:
            with duck.open_duckdb(memory_limit, spill) as con:
                kind, counts = _register_source(con, source, task, need_label)
                if outcome != "hospital" and task is None:
                    _choose_label(con, name, tables.LABELS[outcome], need_label)
                _check(con, name, kind, need_label, static_features)
                notes = _load_stays(con, name, kind, need_label, counts)
                table = _load_events(con, name, counts, notes)
                notes = {"length_recomputed": 0} | files.without_zeros(notes)
                sources = complete_account(con, parts[0].parent, table) if kind == "nested" else []
                sources += meds_account(con) if task else []
                return table, ReadReport(files.without_zeros(counts), notes, sources)
        except (duckdb.OutOfMemoryException, MemoryError) as error:  # numpy's arrays need room beside DuckDB
            raise duck.out_of_memory_error(f"{name}: reading", error, memory_limit, results) from None
        except duckdb.Error as error:
            is_csv = any(map(_is_csv, parts))
            reason = duck.reason_without_rows(error, [] if is_csv else parts).removeprefix(f"{name}: ")
            raise files.refusal("unreadable_csv" if is_csv else "unreadable", source=name, reason=reason) from None

    if isinstance(data, pd.DataFrame):
        with contextlib.suppress(OSError):  # a folder to spill into: DuckDB makes the last one of a path only
            results.mkdir(parents=True, exist_ok=True)
        return read(data, "the data frame")
    path = Path(os.path.expanduser(data))
    if "\n" in str(data):
        raise InputError("the data's path is a text of several lines. Give a path, or the data frame itself.")
    if not path.exists() and not table_files(path):
        raise files.refusal("no_source", source=data)
    if is_meds(path) != (task is not None):
        raise files.refusal("meds_without_labels", source=data)
    parts = meds_files(path, task) if task else table_files(path)
    if not parts and path.suffix.lower() in (".parquet", ".csv"):
        raise files.refusal("no_parts", source=data)
    parts = parts or files.parquet_files(run_mimic_query(path, Path(cache_dir), memory_limit))
    source = path if task else parts
    kept = kept_arrays(parts, results, need_label, task, outcome)
    if kept is None:
        return read(source, str(data))
    with contextlib.suppress(OSError, ValueError):  # not there, or damaged
        return tables.load_arrays(kept, static_features)
    with files.lock_folder(results):
        with contextlib.suppress(OSError, ValueError):  # another run made them while this one waited
            return tables.load_arrays(kept, static_features)
        content = read(source, str(data))
        files.delete_quietly(kept)
        files.write_whole(kept, lambda folder: tables.save_arrays(folder, *content))
    return tables.load_arrays(kept)


def table_files(path: Path) -> list[Path]:
    """Return the files of a table: one that exists, the Parquet parts in a folder, else all that fit a pattern."""
    if path.is_dir():
        return [] if (path / "hosp").is_dir() or (path / "icu").is_dir() else files.parquet_files(path)
    names = [] if path.is_file() else sorted(glob(str(path), recursive=True))
    return sum(map(table_files, map(Path, names)), [path] if path.is_file() else [])


def _is_csv(path: Path) -> bool:
    return path.name.lower().endswith((".csv", ".csv.gz"))


def kept_arrays(parts: list[Path], results: Path, need_label: bool, task: MedsTask | None, outcome: str) -> Path | None:
    """Return the folder for the arrays of a source as its files are now; None for a small one, whose are not kept."""
    stats = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in parts]
    if sum(size for _, size, _ in stats) < KEEP_ARRAYS_FROM:
        return None
    key = files.cache_key(ARRAYS_VERSION, STAY_COLUMNS, EVENT_COLUMNS, EVENT_TYPES, need_label, task, outcome, stats)
    return results / f"{key}.arrays"


def _register_source(
    con: DuckDBPyConnection, data: Path | list[Path] | pd.DataFrame, task: MedsTask | None, need_label: bool
) -> tuple[str, dict]:
    """Make `stay_rows` and `event_rows`, columns as is; return 'nested', 'flat' or 'meds', and what was left out."""
    # A value as trimmed text, NULL where it only says that it is missing. Here infinity is an error.
    words = [*(word for word in duck.MISSING if "inf" not in word), *("NA", "N/A", "<NA>", "NaT", "null", "\\N")]
    text, missing = "trim(CAST(value AS VARCHAR))", ", ".join(map(duck.quoted, words))
    con.execute(f"CREATE TEMP MACRO null_if_missing(value) AS CASE WHEN {text} NOT IN ({missing}) THEN {text} END")
    if isinstance(data, pd.DataFrame):
        con.register("stay_rows", data)
        con.register("event_rows", data)
        return "flat", {}
    if task and isinstance(data, Path):
        return "meds", register_meds(con, data, task, need_label)
    parts = [data] if isinstance(data, Path) else data
    is_csv, listed = _is_csv(parts[0]), duck.file_list(parts)
    for path in parts:
        if _is_csv(path) != is_csv or not (is_csv or path.name.lower().endswith(".parquet")):
            raise files.refusal("not_a_table", path=path)
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty. Copy or export it again.")
    rows = duck.csv_rows(parts) if is_csv else f"read_parquet({listed}, filename = 'file_of_row')"
    types = duck.column_types(con, rows)
    if "events" not in types:
        con.execute(f"CREATE VIEW stay_rows AS FROM {rows}; CREATE VIEW event_rows AS FROM {rows}")
        return "flat", {}
    # BigQuery's exports wrap each element of an array in structs called list and element.
    events = "events" if types["events"].endswith("[]") else "list_transform(events.list, lambda e: e.element)"
    event_rows = f"SELECT icu_stay_id, event.* FROM (SELECT icu_stay_id, unnest({events}) AS event FROM {rows})"
    con.execute(f"CREATE VIEW stay_rows AS SELECT * EXCLUDE events FROM {rows}; CREATE VIEW event_rows AS {event_rows}")
    return "nested", {}


def _choose_label(con: DuckDBPyConnection, source: str, column: str, need_label: bool) -> None:
    """Let another column of `stay_rows` be the label. InputError where it is needed and missing."""
    is_there = column in duck.column_types(con, "stay_rows")
    if need_label and not is_there:
        raise files.refusal("missing_columns", source=source, columns=column)
    label, days = column if is_there else "NULL", 30 if column.endswith("30d") else "NULL"
    con.execute(f"""
        SET VARIABLE days = {days};  -- a stay may last longer, and end with a death that is none of these
        ALTER VIEW stay_rows RENAME TO rows_of_stays;
        CREATE VIEW stay_rows AS SELECT COLUMNS(lambda name: name <> '{LABEL}'), {label} AS {LABEL} FROM rows_of_stays
    """)


def _check(con: DuckDBPyConnection, source: str, kind: str, need_label: bool, static_features: Sequence[str]) -> None:
    """Make the views `typed_stay_rows` and `typed_event_rows`; refuse what is missing or unreadable in them."""
    stay_types, event_types = duck.column_types(con, "stay_rows"), duck.column_types(con, "event_rows")
    unneeded = set(STATIC_COLUMNS) - set(static_features) | (set() if need_label else {LABEL})
    missing = [name for name in STAY_COLUMNS if name not in stay_types.keys() | unneeded]
    if missing := missing + [name for name in EVENT_COLUMNS if name not in event_types]:
        raise files.refusal("missing_columns", source=source, columns=", ".join(missing))
    numbered = {name.lower() for name in stay_types}  # DuckDB numbers the second of a name
    if twice := [name for name in (*STAY_COLUMNS, *EVENT_COLUMNS) if f"{name}_1" in numbered]:
        raise files.refusal("repeated_columns", source=source, columns=", ".join(twice))
    for name in [name for name in IDS if stay_types[name] in ("DOUBLE", "FLOAT")]:
        if lost := duck.first_value(con, f"SELECT count(*) FROM stay_rows WHERE abs({name}) > 9007199254740992"):
            raise files.refusal("ids_without_digits", source=source, column=name, count=lost)
    # A flat table is somebody's own make, and lacks these by mistake; of the query's stays, `_load_stays` drops such.
    needed = IDS if kind == "nested" else (*IDS, "icu_intime", *[LABEL] * need_label)
    zoned, naive = Counter[str](), Counter[str]()
    for view, columns, present in (("stay_rows", STAY_COLUMNS, stay_types), ("event_rows", EVENT_COLUMNS, event_types)):
        names = [name for name in columns if name in present and columns[name] != "VARCHAR"]
        typed = ", ".join(f"{duck.as_type(name, columns[name], present[name])} AS {name}" for name in names)
        others = [f"{name} AS {name}_written" for name in names]
        others += [f"CAST(NULL AS {columns[name]}) AS {name}" for name in columns if name not in present]
        con.execute(f"CREATE TEMP VIEW typed_{view} AS SELECT * REPLACE ({typed}), {', '.join(others)} FROM {view}")
        checks = {}
        for name in names:
            is_bad = {  # condition: whether it applies to this column
                UNFIT[columns[name]][0].format(name): True,
                f"{name} IS NULL": name in needed,
                f"{name} IS NULL AND null_if_missing({name}_written) IS NOT NULL": present[name] != columns[name],
                f"{name} NOT IN (0, 1)": name == LABEL and kind != "nested",
                f"contains({name}_written, 'E')": name in IDS and present[name] == "VARCHAR",  # 3.00E+07 lost digits
            }
            checks[name] = " OR ".join(condition for condition, applies in is_bad.items() if applies)
        times = {
            name: duck.states_zone(f"{name}_written", present[name]) for name in names if columns[name] == "TIMESTAMP"
        }
        counted = [f"count_if({condition})" for condition in checks.values()]
        for name, has_zone in times.items():
            counted += [f"count({name}) FILTER ({has_zone})", f"count({name}) FILTER (NOT ({has_zone}))"]
        found = con.execute(f"SELECT {', '.join(counted)} FROM typed_{view}").fetchall()[0]  # all in one pass
        for (name, condition), count in zip(checks.items(), found):
            if count:
                bad = f"(SELECT row_number() OVER () AS number, * FROM typed_{view}) WHERE {condition}"
                first = duck.first_value(con, f"SELECT {FIRST.format('number')} FROM {bad}")
                wanted = "0 or 1" if name == LABEL else UNFIT[columns[name]][1]
                raise files.refusal("unfit_values", source=source, column=name, wanted=wanted, count=count, first=first)
        zoned.update(dict(zip(times, found[len(checks) :: 2])))
        naive.update(dict(zip(times, found[len(checks) + 1 :: 2])))
    if zoned.total() and naive.total():
        words = {"zoned": ", ".join(+zoned), "naive": ", ".join(+naive)}
        raise files.refusal("mixed_zones", source=source, n_zoned=zoned.total(), n_naive=naive.total(), **words)


def _load_stays(
    con: DuckDBPyConnection, source: str, kind: str, need_label: bool, counts: dict[str, int]
) -> dict[str, int]:
    """Make the table `stays`, count and log those left out; return how many are mended, or implausible."""
    if kind == "nested":  # most often shards of an earlier export beside those of a later one
        twice = f"SELECT icu_stay_id, {FIRST.format('file_of_row')} FROM typed_stay_rows GROUP BY 1 HAVING count(*) > 1"
        if found := con.execute(f"{twice} ORDER BY 1").fetchall():
            raise files.refusal("repeated_stays", source=source, count=len(found), stay=found[0][0], files=found[0][1])
    values, conflicts = [], []
    for name, sql_type in STAY_COLUMNS.items():
        value = f"null_if_missing({name})" if sql_type == "VARCHAR" else name
        text = f"coalesce(CAST({value} AS VARCHAR), '')"
        values.append(f"any_value({value}) AS {name}")
        conflicts.append(f"CASE WHEN min({text}) <> max({text}) THEN '{name}' END")
    # The length of a stay is that of its record, recomputed: MIMIC-IV's own runs to outtime, hours past a death.
    statement = f"""
        CREATE TEMP TABLE stays AS
        SELECT conflicts, least(icu_outtime, patient_death_time) AS final_time, icu_length_of_stay_in_days AS said_days,
               CASE WHEN icu_intime IS NULL THEN 'stay_without_intime'
                    WHEN final_time IS NULL THEN 'stay_without_end'
                    WHEN patient_death_time < icu_intime THEN 'stay_after_death'
                    WHEN final_time < icu_intime THEN 'stay_ends_before_it_begins'
                    WHEN coalesce({LABEL} NOT IN (0, 1), $need_label) THEN 'stay_with_unfit_label'
                    WHEN {LABEL} = 0 AND final_time = patient_death_time
                         AND coalesce(date_diff('day', icu_intime, final_time) <= getvariable('days'), true)
                         THEN 'stay_with_death_and_label_0'
               END AS fault,
               * EXCLUDE conflicts REPLACE (CASE WHEN $is_meds THEN NULL ELSE epoch(final_time - icu_intime) / 86400 END
                                            AS icu_length_of_stay_in_days)
        FROM (SELECT {", ".join(values)}, concat_ws(', ', {", ".join(conflicts)}) AS conflicts
              FROM typed_stay_rows AS s GROUP BY s.icu_stay_id)
    """
    con.execute(statement, {"is_meds": kind == "meds", "need_label": need_label})
    odd = f"count(*), {FIRST.format('icu_stay_id')}, min_by(conflicts, icu_stay_id) FROM stays WHERE conflicts <> ''"
    count, first, columns = con.execute(f"SELECT {odd}").fetchall()[0]
    if count:
        raise files.refusal("contradicting_rows", source=source, count=count, first=first, columns=columns)
    faulty = f"SELECT fault, count(*), {FIRST.format('icu_stay_id')} FROM stays WHERE fault <> '' GROUP BY 1 ORDER BY 1"
    for code, count, first in con.execute(faulty).fetchall():
        counts[code], more = count, ", ..." * (count > 3)
        logger.warning(f"Dropped     {count:,} {files.WORDS['reasons'][code]}: icu_stay_id {first}{more}")
    odd_time = " OR ".join(f"year({name}) NOT BETWEEN 1900 AND 2299" for name in STAY_COLUMNS if "time" in name)
    noted = {"length_recomputed": "abs(said_days - icu_length_of_stay_in_days) > 0.01 AND fault IS NULL"}
    noted |= {"stay_with_odd_age": "patient_age NOT BETWEEN 0 AND 130", "stay_with_odd_time": odd_time}
    counted = ", ".join(f"count_if({condition})" for condition in noted.values())
    notes = dict(zip(noted, con.execute(f"SELECT {counted} FROM stays").fetchall()[0]))
    con.execute("DELETE FROM stays WHERE fault <> ''")
    return notes


def _load_events(con: DuckDBPyConnection, source: str, counts: dict[str, int], notes: dict[str, int]) -> StayTable:
    """Return the table of stays and events, sorted; count what is left out or odd. Refuses contradicting times."""
    # Texts are numbered first: what is compared, sorted and counted of events are numbers, which are small and of one
    # size. Each is read as it is written, and cleaned once.
    con.execute("""
        CREATE TEMP TABLE texts AS
        SELECT *, dense_rank() OVER (ORDER BY cleaned) - 1 AS text
        FROM (SELECT written, CASE WHEN null_if_missing(written) IS NULL AND trim(written) <> '' THEN ''
                                   ELSE coalesce(CAST(written AS VARCHAR), '') END AS cleaned
              FROM (SELECT DISTINCT event_text AS written FROM typed_event_rows))
    """)
    types = list(EVENT_TYPES)
    con.execute(f"""
        CREATE TEMP TABLE events AS
        SELECT icu_stay_id, event_type, text, stated, epoch(event_time - icu_intime) / 60 AS minutes,
               epoch(known_time - icu_intime) / 60 AS known, epoch(final_time - event_time) / 60 AS to_end
        FROM (
            SELECT icu_stay_id, event_time, event_known_time AS known_time, event_text AS written,
                   coalesce(list_position({types}, null_if_missing(event_type)) - 1, len({types}))::TINYINT
                       AS event_type, relative_time_to_final_event AS stated
            FROM typed_event_rows
        ) AS e
        JOIN stays USING (icu_stay_id)
        JOIN texts AS t ON t.written IS NOT DISTINCT FROM e.written
    """)
    compared, in_hours, differ, first = con.execute(f"""
        SELECT count_if(abs(to_end) > 60), count_if(abs(to_end) > 60 AND abs(stated * 60 - to_end) < 2),
               count(other), {FIRST.format("other")}
        FROM (SELECT *, CASE WHEN abs(stated - to_end) > 2 THEN icu_stay_id END AS other FROM events)
        WHERE isfinite(stated) AND to_end IS NOT NULL
    """).fetchall()[0]
    if differ and in_hours > 0.5 * compared:
        raise files.refusal("hours_for_minutes", source=source, count=in_hours, compared=compared)
    if differ:
        raise files.refusal("other_minutes", source=source, count=differ, first=first)
    odd = {"event_with_odd_time": "greatest(abs(minutes), abs(known)) > 63115200"}  # 120 years from ICU admission
    for code, condition in (odd | {"event_known_too_soon": "known < minutes - 1440"}).items():
        notes[code] = duck.first_value(con, f"SELECT count_if({condition}) FROM events")
    faults = {"event_without_time": "minutes IS NULL OR to_end IS NULL", "event_before_admission": "minutes < 0"}
    for code, condition in (faults | {"event_after_the_end": "to_end < 0"}).items():
        counts[code] = duck.first_value(con, f"DELETE FROM events WHERE {condition}")
    before = duck.first_value(con, "SELECT count(*) FROM events")
    distinct = "CREATE OR REPLACE TEMP TABLE events AS SELECT DISTINCT * EXCLUDE stated FROM events"
    counts["event_repeated"] = before - duck.first_value(con, distinct)
    stays = con.execute("""
        SELECT icu_stay_id, stays.* EXCLUDE (icu_stay_id, final_time, fault, said_days, conflicts),
               coalesce(number, 0) AS n_events
        FROM stays LEFT JOIN (SELECT icu_stay_id, count(*) AS number FROM events GROUP BY 1) USING (icu_stay_id)
        ORDER BY icu_stay_id
    """).df()
    counts["stay_without_events"] = int((stays["n_events"] == 0).sum())
    stays = stays[stays["n_events"] > 0].reset_index(drop=True)
    if stays.empty:
        reasons = "; ".join(f"{count} {files.WORDS['reasons'][code]}" for code, count in counts.items() if count)
        raise files.refusal("no_events" if reasons else "no_rows", source=source, reasons=reasons)
    offsets = tables.sums_before(stays.pop("n_events").to_numpy())
    arrays = {name: np.empty(offsets[-1], kind) for name, kind in tables.EVENT_ARRAYS.items()}
    filled = 0
    batches = con.sql("""
        SELECT event_type, text::INTEGER AS text, minutes AS minutes_since_intime,
               known AS known_minutes_since_intime, to_end AS minutes_to_end
        FROM events ORDER BY icu_stay_id, minutes, event_type, text, known
    """)
    for batch in batches.to_arrow_reader(2**20):  # never all of them twice in memory
        for name, array in arrays.items():
            array[filled : filled + len(batch)] = batch[name].to_numpy(zero_copy_only=False)  # NULL becomes NaN
        filled += len(batch)
    counts["event_of_unknown_type"] = int((arrays["event_type"] == len(EVENT_TYPES)).sum())
    texts = con.execute("SELECT DISTINCT cleaned FROM texts ORDER BY cleaned").fetchnumpy()["cleaned"]
    return StayTable(stays, offsets, texts=texts, **arrays).with_own_texts()
