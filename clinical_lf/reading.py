"""Any source to a StayTable: two relations `stay_rows` and `event_rows`, checked, then loaded as flat arrays."""

import contextlib
import hashlib
import os
import uuid
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Any, TypeAlias

import duckdb
import numpy as np
import pandas as pd
from duckdb import DuckDBPyConnection

from clinical_lf import duck, files, mimic, tables
from clinical_lf.files import InputError, logger
from clinical_lf.meds import MedsTask, is_meds, meds_account, register_meds
from clinical_lf.tables import EVENT_COLUMNS, EVENT_TYPES, LABEL, STATIC_COLUMNS, STAY_COLUMNS, ReadReport, StayTable

# What was read of a big source is kept as arrays: a later start maps them into memory instead of reading it again.
ARRAYS_VERSION = 6  # raise it when what is made of a source changes: arrays that were kept before are then made anew
KEEP_ARRAYS_FROM = 2**24  # bytes of the source; a smaller one is read in seconds
IDS = ("patient_id", "admission_id", "icu_stay_id")
# Of a prediction before the end all but the first.
MAY_BE_MISSING = ("event_known_time", "admission_id", "patient_death_time", "relative_time_to_final_event")
QUERY_FILE = Path(__file__).resolve().parent.parent / "table.sql"
_CLEANED = ", ".join(f"null_if_missing({name}) AS {name}" for name, kind in STAY_COLUMNS.items() if kind == "VARCHAR")
_FILLED = {"columns": ", ".join(STAY_COLUMNS), "cleaned": _CLEANED, "types": [*EVENT_TYPES, *tables.OTHER_TYPES]}
SQL = duck.named_statements(QUERY_FILE, **_FILLED)
Source: TypeAlias = Path | list[Path] | pd.DataFrame  # a MEDS folder, the files of a table, or one in memory


def read_stays(
    data: str | Path | pd.DataFrame,
    cache_dir: str | Path = "clinical_LF_precomp_emb",
    need_label: bool = True,
    task: MedsTask | None = None,
    memory_limit: str = "33%",
    static_features: Sequence[str] = STATIC_COLUMNS,
    outcome: str = "hospital",
    prospective: bool = False,
    vitals: str = "",
) -> tuple[StayTable, ReadReport]:
    """Read a MIMIC-IV folder, nested Parquet or flat CSV/Parquet; also say how much was repaired or dropped, and why.

    data may be a data frame, one row per event. task: what is predicted of a MEDS data set; outcome: of others, as in
    tables.LABELS. Of what describes a stay, only the static_features must be there. prospective: the prediction is
    before the end of a stay, so that events need the time at which they were known, and stays to be scored no end.
    vitals: "vitals.sql", to run it on the folder, or files of its result. Raises InputError for a table that cannot be
    read as it was meant.
    """
    results, parts, added = Path(cache_dir) / "query_results", list[Path](), list[Path]()
    label, days = LABEL if task else tables.LABELS[outcome], 30 if outcome == "30d" and not task else None
    may_last = prospective and not need_label
    asked = {"need_label": need_label, "may_last": may_last, "days": days}
    unneeded = {*MAY_BE_MISSING[prospective:], *STATIC_COLUMNS} - {*static_features}
    unneeded |= {*[label] * (not need_label), *["icu_outtime"] * may_last}

    def read(source: Source, name: str) -> tuple[StayTable, ReadReport]:
        spill = results / f".spilled{files.HALF_WRITTEN}{uuid.uuid4().hex}"
        try:
            with duck.open_duckdb(memory_limit, spill) as con:
                kind, counts = _register_source(con, source, added, task, need_label)
                shared = "SELECT count(*) FROM given_vitals SEMI JOIN given USING (icu_stay_id)"
                if vitals and not (kind == "nested" and added and duck.first_value(con, shared)):
                    raise files.refusal("vitals_of_nothing", vitals=vitals, source=name)
                _check(con, name, kind, label, need_label, unneeded)
                notes = _load_stays(con, name, kind, asked, counts)
                table = _load_events(con, name, counts, notes)
                notes = {"length_recomputed": 0} | {code: count for code, count in notes.items() if count}
                folders = dict.fromkeys(path.parent for path in [*parts, *added])
                sources = meds_account(con) if task else mimic.complete_account(con, folders)
                return table, ReadReport({code: count for code, count in counts.items() if count}, notes, sources)
        except (duckdb.OutOfMemoryException, MemoryError) as error:  # numpy's arrays need room beside DuckDB
            raise duck.out_of_memory_error(f"{name}: reading", error, memory_limit, results) from None
        except duckdb.Error as error:
            if spill.name in str(error) and not results.exists():  # DuckDB makes the last folder of a path only
                results.mkdir(parents=True)
                return read(source, name)
            is_csv = any(map(_is_csv, parts))
            reason = duck.reason_without_rows(error, [] if is_csv else [*parts, *added]).removeprefix(f"{name}: ")
            raise files.refusal("unreadable_csv" if is_csv else "unreadable", source=name, reason=reason) from None

    if isinstance(data, pd.DataFrame):
        return read(data, "the data frame")
    path = Path(os.path.expanduser(data))
    if "\n" in str(data):
        raise InputError("the data's path is a text of several lines. Give a path, or the data frame itself.")
    if not path.exists() and not table_files(path):
        raise files.refusal("no_source", source=data)
    if is_meds(path) != (task is not None):
        raise files.refusal("meds_without_labels", source=data)
    if task:
        parts = task.files + files.parquet_files(path / "metadata") + files.parquet_files(path / "data")
    elif not (parts := table_files(path)):
        if path.suffix.lower() in (".parquet", ".csv"):
            raise files.refusal("no_parts", source=data)
        queries = [mimic.QUERY_FILE] + [mimic.VITALS_FILE] * (vitals == mimic.VITALS_FILE.name)
        # What is missing is said before hours of work.
        mimic.find_mimic_files(path, "".join(query.read_text("utf-8") for query in queries))
        made = [mimic.run_mimic_query(path, Path(cache_dir), memory_limit, query) for query in queries]
        parts, added = files.parquet_files(made[0]), [*files.parquet_files(made[-1])] * (len(made) > 1)
    if vitals != mimic.VITALS_FILE.name:
        added = table_files(Path(os.path.expanduser(vitals))) if vitals else []
    source, stats = path if task else parts, [(str(part.absolute()), part.stat()) for part in [*parts, *added]]
    if sum(stat.st_size for _, stat in stats) < KEEP_ARRAYS_FROM:
        return read(source, str(data))
    versions = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    made_of = (ARRAYS_VERSION, STAY_COLUMNS, EVENT_COLUMNS, EVENT_TYPES, task, outcome, prospective, asked, versions)
    kept = results / f"{hashlib.md5(repr(made_of).encode()).hexdigest()}.arrays"
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
    """Return the files of a table: one that exists, the parts in a folder (of Spark), else all that fit a pattern."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        if os.path.lexists(path):  # a device, or a link to nothing: no pattern finds more
            raise files.refusal("not_a_table", path=path)
        return sum(map(table_files, map(Path, sorted(glob(str(path), recursive=True)))), list[Path]())
    if (path / "hosp").is_dir() or (path / "icu").is_dir():
        return []
    of_csv = path.glob("[!._]*" if path.suffix.lower() == ".csv" else "part-*")
    return files.parquet_files(path) or sorted(filter(_is_csv, of_csv))


def _is_csv(path: Path) -> bool:
    return path.name.lower().endswith((".csv", ".csv.gz"))


def _register_source(
    con: DuckDBPyConnection, data: Source, added: list[Path], task: MedsTask | None, need_label: bool
) -> tuple[str, dict]:
    """Make `stay_rows` and `event_rows` (arrays with those `added`); return 'nested', 'flat' or 'meds', and counts."""
    if task and isinstance(data, Path):
        return "meds", register_meds(con, data, task, need_label)
    if isinstance(data, list):
        is_csv = _is_csv(data[0])
        for path in data:
            if _is_csv(path) != is_csv or not (is_csv or path.name.lower().endswith(".parquet")):
                raise files.refusal("not_a_table", path=path)
            if path.stat().st_size == 0:
                raise InputError(f"{path}: the file is empty. Copy or export it again.")
        parquet = f"read_parquet({duck.file_list(data)}, filename = 'file_of_row')"
        con.execute(f"CREATE TEMP VIEW given AS FROM {duck.csv_rows(data) if is_csv else parquet}")
    else:
        con.register("given", data)
    if "events" not in duck.column_types(con, "given"):
        con.execute("CREATE TEMP VIEW stay_rows AS FROM given; CREATE TEMP VIEW event_rows AS FROM given")
        return "flat", {}
    if added:
        con.execute(f"CREATE TEMP VIEW given_vitals AS FROM read_parquet({duck.file_list(added)})")
    rows = []
    for relation in ("given", *["given_vitals"] * bool(added)):
        # BigQuery's exports wrap each element of an array in structs called list and element.
        array = "events" if duck.column_types(con, relation).get("events", "[]").endswith("[]") else "events.list"
        rows.append(f"SELECT icu_stay_id, unnest({array}, recursive := true) FROM {relation}")
    con.execute("CREATE TEMP VIEW stay_rows AS SELECT * EXCLUDE events FROM given")
    con.execute(f"CREATE TEMP VIEW event_rows AS {' UNION ALL BY NAME '.join(rows)}")
    return "nested", {}


def _check(con: DuckDBPyConnection, source: str, kind: str, label: str, need_label: bool, unneeded: set[str]) -> None:
    """Make the views `typed_stay_rows` and `typed_event_rows`; refuse what is missing or unreadable in them."""
    types = duck.column_types(con, "stay_rows") | duck.column_types(con, "event_rows")
    columns = tables.COLUMNS.assign(given=tables.COLUMNS.index, must="false").replace({"given": {LABEL: label}})
    is_there, numbered = columns["given"].isin(types), [name.lower() for name in types]
    if missing := ", ".join(columns["given"][~is_there & ~columns["given"].isin(unneeded)]):
        raise files.refusal("missing_columns", source=source, columns=missing)
    if twice := ", ".join(columns["given"][(columns["given"] + "_1").isin(numbered)]):  # DuckDB numbers the second
        raise files.refusal("repeated_columns", source=source, columns=twice)
    for name in [name for name in IDS if types.get(name) in ("DOUBLE", "FLOAT")]:
        if lost := duck.first_value(con, f"SELECT count(*) FROM stay_rows WHERE abs({name}) > 9007199254740992"):
            raise files.refusal("ids_without_digits", source=source, column=name, count=lost)
    # A flat table is somebody's own make, and lacks these by mistake; of the query's stays, `_load_stays` drops such.
    columns.loc[[*IDS, *["icu_intime"] * (kind != "nested")], "must"] = "{0} IS NULL"
    if kind != "nested":
        columns.loc[LABEL, "must"] = f"coalesce({{0}} NOT IN (0, 1), {need_label})"
    columns.loc[~is_there, "given"] = ""
    place, zones = f"{duck.quoted(source)} AS place, row_number() OVER () AS number", {}
    for view, names in {"stay_rows": [*STAY_COLUMNS], "event_rows": ["icu_stay_id", *EVENT_COLUMNS]}.items():
        rows, zones[view] = duck.typed_rows(con, view, columns.loc[names], place)
        con.execute(f"CREATE TEMP VIEW typed_{view} AS {rows}")
    zoned, naive = (counts[counts > 0] for _, counts in pd.concat(zones.values()).items())
    if len(zoned) and len(naive):
        words = {"zoned": ", ".join(zoned.index), "naive": ", ".join(naive.index)}
        raise files.refusal("mixed_zones", source=source, n_zoned=zoned.sum(), n_naive=naive.sum(), **words)


def _load_stays(
    con: DuckDBPyConnection, source: str, kind: str, asked: dict[str, Any], counts: dict[str, int]
) -> dict[str, int]:
    """Make the table `stays`, count and log those left out; return how many are mended, or implausible.

    asked: need_label; may_last, whether a stay may have no end yet; days, if any: a stay may last longer, and end with
    a death that its label, of so many days, does not tell.
    """
    count, first, names = con.execute(SQL["repeated stays"]).fetchall()[0] if kind == "nested" else (0, 0, "")
    if count:
        raise files.refusal("repeated_stays", source=source, count=count, stay=first, files=names)
    con.execute(SQL["given stays"])
    if len(odd := con.sql(SQL["contradicting rows"]).df()):
        stays = odd["icu_stay_id"].drop_duplicates()
        n_values = odd[odd["icu_stay_id"] == stays[0]].nunique(dropna=False)
        first, columns = ", ".join(map(str, stays[:3])), ", ".join(n_values.index[n_values > 1])
        raise files.refusal("contradicting_rows", source=source, count=len(stays), first=first, columns=columns)
    con.execute(SQL["stays"], asked | {"is_meds": kind == "meds"})
    for code, count, first in con.execute(SQL["faulty stays"]).fetchall():
        counts[code], more = count, ", ..." * (count > 3)
        logger.warning(f"Dropped     {count:,} {files.WORDS['reasons'][code]}: icu_stay_id {first}{more}")
    notes = con.sql(SQL["noted stays"]).df().fillna(0).astype(int).iloc[0].to_dict()
    con.execute("DELETE FROM stays WHERE fault <> ''")
    return notes


def _load_events(con: DuckDBPyConnection, source: str, counts: dict[str, int], notes: dict[str, int]) -> StayTable:
    """Return the table of stays and events, sorted; count what is left out or odd. Refuses contradicting times."""
    con.execute(SQL["events"])
    found = con.execute(SQL["odd times"]).fetchall()[0]
    compared, in_hours, differ, first, notes["event_with_odd_time"], notes["event_known_too_soon"] = found
    if differ and in_hours > 0.5 * compared:
        raise files.refusal("hours_for_minutes", source=source, count=in_hours, compared=compared)
    if differ:
        raise files.refusal("other_minutes", source=source, count=differ, first=first)
    fates = dict(con.execute("SELECT fault, count(*) FROM events GROUP BY fault ORDER BY fault DESC").fetchall())
    n_repeated = fates.pop(None, 0) - duck.first_value(con, SQL["distinct events"])
    counts |= fates | {"event_repeated": n_repeated}
    n_events = con.sql("SELECT icu_stay_id, count(*) AS n_events FROM events GROUP BY 1 ORDER BY 1").df()
    stays = n_events.merge(con.sql("SELECT * EXCLUDE (final_time, fault, said_days) FROM stays").df())
    counts["stay_without_events"] = duck.first_value(con, "SELECT count(*) FROM stays") - len(stays)
    if stays.empty:
        reasons = "; ".join(f"{count} {files.WORDS['reasons'][code]}" for code, count in counts.items() if count)
        raise files.refusal("no_events" if reasons else "no_rows", source=source, reasons=reasons)
    offsets = np.cumulative_sum(stays.pop("n_events").to_numpy(), include_initial=True)
    arrays = {name: np.empty(offsets[-1], kind) for name, kind in tables.EVENT_ARRAYS.items()}
    no_input = len(EVENT_TYPES)  # the model has none for what is beyond, be its type known or not
    order = f"icu_stay_id, minutes_since_intime, least(event_type, {no_input}), text, known_minutes_since_intime"
    events = con.sql(f"SELECT {', '.join(arrays)} FROM events ORDER BY {order}")
    filled = 0
    for batch in events.to_arrow_reader(2**20):  # never all of them twice in memory
        for name, array in arrays.items():
            array[filled : filled + len(batch)] = batch[name].to_numpy(zero_copy_only=False)  # NULL becomes NaN
        filled += len(batch)
    counts["event_of_unknown_type"] = int((arrays["event_type"] == no_input + len(tables.OTHER_TYPES)).sum())
    arrays["event_type"].clip(max=no_input, out=arrays["event_type"])
    texts = con.execute("SELECT DISTINCT cleaned FROM texts ORDER BY cleaned").fetchnumpy()["cleaned"]
    return StayTable(stays, offsets, texts=texts, **arrays).with_own_texts()
