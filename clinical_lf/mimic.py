"""A MIMIC-IV folder through query.sql in DuckDB: nested Parquet, one row per ICU stay, and the account of its rows."""

import os
import re
from dataclasses import asdict, replace
from pathlib import Path

import duckdb
import numpy as np
import yaml

from clinical_lf import duck, files
from clinical_lf.files import InputError, Progress, refusal
from clinical_lf.tables import EVENT_TYPES, SourceAccount, StayTable

QUERY_FILE = Path(__file__).resolve().parent.parent / "query.sql"
ACCOUNT = "_source_tables.json"  # beside the result: where the rows of the tables went; no reader of Parquet minds it
ROWS_PER_SLICE = 2_000_000  # event rows of the tables behind one slice of patients: what has to fit in memory at once

_TABLES = yaml.safe_load(Path(__file__).with_name("mimic_tables.yaml").read_text("utf-8"))
MIMIC_TABLES = {name: table["columns"] for name, table in _TABLES.items()}  # {table: {column: type}}
MIMIC_KEYS = {name: table["key"] for name, table in _TABLES.items() if "key" in table}
EVENT_TABLES = {name: table["time"] for name, table in _TABLES.items() if "time" in table}
# Of an event table only what lies within a day of a stay is stored, by patient: a slice of patients is then read
# alone. Beside it what is no event for a fault of its own, for the account. Rows are numbered as they pass, those that
# are not stored too: counting them apart would read the file twice.
OTHER_TABLE = "SELECT {typed} FROM (SELECT *, nextval('{name}_read') AS number FROM {rows}) WHERE number > 0"
EVENT_TABLE = f"""
    SELECT r.* EXCLUDE (number)
    FROM (
        SELECT *, {{fault}} AS fault, nextval('{{name}}_of_cohort') AS number
        FROM ({OTHER_TABLE}) JOIN (SELECT DISTINCT {{key}}, subject_id AS patient FROM icustays) USING ({{key}})
    ) AS r
    WHERE number > 0 AND (fault IS NOT NULL OR EXISTS (
        FROM icustays AS i WHERE i.{{key}} = r.{{key}} AND {{time}} BETWEEN i.intime - INTERVAL 1 DAY
            AND coalesce(i.outtime, 'infinity') + INTERVAL 1 DAY
    ))
    ORDER BY patient
"""


def find_mimic_files(folder: Path) -> dict[str, Path]:
    """Return the file of every table that query.sql reads; InputError names what is missing or double."""
    found = {}
    for table in MIMIC_TABLES:
        found[table] = [path for path in (folder / f"{table}.csv", folder / f"{table}.csv.gz") if path.is_file()]
        if len(found[table]) == 2:
            raise refusal("doubled_mimic", paths=" and ".join(map(str, found[table])))
    if missing := [f"{table}.csv[.gz]" for table, paths in found.items() if not paths]:
        raise refusal("incomplete_mimic", folder=folder, missing=", ".join(missing))
    return {table: paths[0] for table, paths in found.items()}


def query_for_duckdb(text: str) -> str:
    """Return SQL of BigQuery in DuckDB's dialect, its tables replaced by local ones of the same name."""
    import sqlglot

    return sqlglot.transpile(re.sub(r"`[\w.-]+\.(\w+)`", r"\1", text), read="bigquery", write="duckdb")[0]


def faults_of_rows(query: str) -> dict[str, str]:
    """Return, by event table, the SQL of why a row is no event: conditions of query.sql that end in `-- else: why`."""
    faults = {table: {"without a time": f"{time} IS NULL"} for table, time in EVENT_TABLES.items()}
    aliases = {alias: f"{part}/{name}" for part, name, alias in re.findall(r"_(hosp|icu)\.(\w+)` AS (\w+)", query)}
    for condition, alias, reason in re.findall(r"^\s+AND (.*?\b(\w+)\..*?)\s+-- else: (.+)$", query, re.MULTILINE):
        of_table, fails = faults[aliases[alias]], f"NOT ({query_for_duckdb(condition.replace(f'{alias}.', ''))})"
        of_table[reason] = f"{of_table[reason]} OR {fails}" if reason in of_table else fails
    return {table: duck.sql_case(conditions) for table, conditions in faults.items()}


def load_mimic_table(database: duckdb.DuckDBPyConnection, table: str, path: Path, fault: str = "NULL") -> None:
    """Copy a CSV file into `database`, typed; of events those near ICU stays or with a `fault`. InputError if unfit."""
    name, rows, columns = Path(table).name, duck.csv_rows(path, duck.MISSING), MIMIC_TABLES[table]
    parts = {"name": name, "rows": rows, "fault": fault, "time": EVENT_TABLES.get(table)}
    parts["typed"] = ", ".join(f"CAST({column} AS {kind}) AS {column}" for column, kind in columns.items())
    parts["key"] = next((key for key in ("stay_id", "subject_id", "hadm_id") if key in columns), None)
    statement = (EVENT_TABLE if table in EVENT_TABLES else OTHER_TABLE).format(**parts)
    try:
        header = duck.column_types(database, rows)
        if absent := [column for column in columns if column not in header]:
            raise InputError(f"{path} has no column {', '.join(absent)}: it is not the table {table} of MIMIC-IV.")
        database.execute(f"CREATE OR REPLACE SEQUENCE {name}_read; CREATE OR REPLACE SEQUENCE {name}_of_cohort")
        database.execute(f"CREATE TABLE {name} AS {statement}").fetchall()
    except duckdb.ConversionException:
        counted = [f"count({column}) - count(TRY_CAST({column} AS {kind}))" for column, kind in columns.items()]
        counts = database.execute(f"SELECT {', '.join(counted)} FROM {rows}").fetchall()[0]
        unfit = [f"{column} ({columns[column]}) in {count} rows" for column, count in zip(columns, counts) if count]
        raise InputError(f"{path} has values that do not fit: {', '.join(unfit)}.") from None
    except duckdb.OutOfMemoryException:
        raise
    except duckdb.Error as error:
        raise refusal("unreadable_mimic", path=path, reason=duck.reason_without_rows(error)) from None
    if unique := MIMIC_KEYS.get(table):
        twice = f"SELECT {unique} FROM {name} WHERE {unique} IS NOT NULL GROUP BY {unique} HAVING count(*) > 1"
        count, first = database.execute(f"SELECT count(*), {duck.FIRST.format(unique)} FROM ({twice})").fetchall()[0]
        if count:
            raise refusal("repeated_keys", table=table, column=unique, count=count, first=first)
    if table == "icu/icustays":
        database.execute("DELETE FROM icustays WHERE stay_id IS NULL")


def account_for_rows(database: duckdb.DuckDBPyConnection) -> list[SourceAccount]:
    """Count the rows of every table: read, of the cohort, lost and why. Events in stays: see `complete_account`."""
    passed = "SELECT sequence_name, coalesce(last_value, 0) FROM duckdb_sequences()"
    accounts, n_passed = [], dict(database.execute(passed).fetchall())
    for table in MIMIC_TABLES:
        name = Path(table).name
        account = SourceAccount(table, n_passed[f"{name}_read"])
        if table == "icu/icustays":
            joined = "icustays LEFT JOIN admissions AS adm USING (hadm_id) LEFT JOIN patients AS pat USING (subject_id)"
            counts = f"SELECT coalesce({duck.sql_case(_TABLES[table]['lost'])}, ''), count(*) FROM {joined} GROUP BY 1"
            lost: dict[str, int] = dict(database.execute(f"{counts} ORDER BY 1").fetchall())
            account.of_cohort, account.in_stays = account.read, lost.pop("", 0)
            lost["without stay_id"] = account.read - account.in_stays - sum(lost.values())
            account.lost = files.without_zeros(lost)
        elif table in EVENT_TABLES:
            counts = f"SELECT fault, count(*) FROM {name} WHERE fault IS NOT NULL GROUP BY fault ORDER BY fault"
            account.lost = dict(database.execute(counts).fetchall())
            account.of_cohort = n_passed[f"{name}_of_cohort"]
        for reason, condition in _TABLES[table].get("noted", {}).items():
            account.noted[reason] = duck.first_value(database, f"SELECT count(*) FROM {name} WHERE {condition}")
        accounts.append(account)
    return accounts


def complete_account(con: duckdb.DuckDBPyConnection, folder: Path, table: StayTable) -> list[SourceAccount]:
    """Return the account that lies beside a query's result, with the events that were read: every row is in it once."""
    if not (folder / ACCOUNT).is_file():
        return []
    accounts = {account["table"]: SourceAccount(**account) for account in files.read_json(folder / ACCOUNT)}
    found = dict(con.execute("SELECT event_type, count(*) FROM event_rows GROUP BY event_type").fetchall())
    used = np.bincount(table.event_type, minlength=len(EVENT_TYPES)).tolist()
    for name, event_type, n_used in zip(EVENT_TABLES, EVENT_TYPES, used):
        account, in_stays = accounts[name], found.get(event_type, 0)
        outside = (account.of_cohort or 0) - sum(account.lost.values()) - in_stays
        lost = {"outside the ICU stays": outside, "repeated, or of a stay that was dropped": in_stays - n_used}
        accounts[name] = replace(account, in_stays=n_used, lost=files.without_zeros(account.lost | lost))
    return list(accounts.values())


def run_mimic_query(folder: Path, cache_dir: Path, memory_limit: str = "33%") -> Path:
    """Return the folder of Parquet files with what query.sql gives for a MIMIC-IV folder: a row per ICU stay."""
    # Kept while both stay the same; a stopped run goes on from its tables and slices.
    folder, results = Path(folder), Path(cache_dir) / "query_results"
    paths, query = find_mimic_files(folder), QUERY_FILE.read_text(encoding="utf-8")
    stats = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in paths.values()]
    key = files.cache_key(query, MIMIC_TABLES, EVENT_TABLES, EVENT_TABLE, duck.MISSING, ROWS_PER_SLICE, stats)
    target, working = results / f"{key}.parquet", results / f"unfinished-{key}"
    if target.exists():
        return target
    with files.lock_folder(results):
        if target.exists():  # another run made it while this one waited
            return target
        for unfinished in set(results.glob("unfinished-*")) - {working}:
            files.delete_quietly(unfinished)
        faults = faults_of_rows(query)
        try:
            with _working_database(working, memory_limit) as database:
                done = {row[0] for row in database.execute("SHOW TABLES").fetchall()}
                for table, path in Progress(paths.items(), desc="reading MIMIC-IV", unit=" tables"):
                    if Path(table).name not in done:
                        load_mimic_table(database, table, path, faults.get(table, "NULL"))
                files.write_json(working / target.name / ACCOUNT, list(map(asdict, account_for_rows(database))))
                collect_stays(database, query_for_duckdb(query), working / target.name)
        except (duckdb.OutOfMemoryException, duckdb.IOException) as error:  # the next run goes on from here
            raise duck.out_of_memory_error("query.sql", error, memory_limit, results) from None
        except InputError:  # the folder has to be mended first
            files.delete_quietly(working)
            raise
        os.replace(working / target.name, target)
        files.delete_quietly(working)
    return target


def _working_database(working: Path, memory_limit: str) -> duckdb.DuckDBPyConnection:
    """Open the database of a run, or of a stopped one that goes on; one that was left damaged is begun anew."""
    working.mkdir(exist_ok=True)
    try:
        return duck.open_duckdb(memory_limit, working / "spilled", working / "mimic.duckdb")
    except (duckdb.SerializationException, duckdb.FatalException):
        files.delete_quietly(working)
        return _working_database(working, memory_limit)


def collect_stays(database: duckdb.DuckDBPyConnection, query: str, result: Path) -> None:
    """Run the query for one slice of the patients after the other; each becomes a Parquet file in `result`."""
    found = "SELECT DISTINCT subject_id FROM mimic.icustays WHERE subject_id IS NOT NULL ORDER BY subject_id"
    patients = database.execute(found).fetchall()
    if not patients:
        raise InputError("icu/icustays has no rows: nothing to learn from.")
    keys = {Path(table).name: "patient" for table in EVENT_TABLES}
    n_rows = sum(duck.first_value(database, f"SELECT count(*) FROM mimic.{name}") for name in keys)
    n_slices = min(len(patients), 1 + n_rows // ROWS_PER_SLICE)
    for number, part in enumerate(Progress(np.array_split(patients, n_slices), desc="building events", unit=" slices")):
        path = result / f"part_{number:04d}.parquet"
        if path.exists():
            continue
        for name, key in {**keys, "icustays": "subject_id"}.items():
            rows = f"SELECT * FROM mimic.{name} WHERE {key} BETWEEN {part[0, 0]} AND {part[-1, 0]}"
            database.execute(f"CREATE OR REPLACE TEMP VIEW {name} AS {rows}")
        copied = f"COPY (SELECT * FROM ({query}) ORDER BY patient_id, icu_stay_id) TO "
        options = "(FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 2048)"
        files.write_whole(path, lambda name: database.execute(f"{copied}{duck.quoted(name)} {options}").fetchall())
