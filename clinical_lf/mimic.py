"""A MIMIC-IV folder through query.sql or vitals.sql in DuckDB: nested Parquet, a row per ICU stay, account of rows."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import duckdb
import yaml

from clinical_lf import duck, files
from clinical_lf.files import InputError, Progress, refusal
from clinical_lf.tables import EVENT_TYPES, OTHER_TYPES, SourceAccount

QUERY_FILE, VITALS_FILE = (Path(__file__).resolve().parent.parent / name for name in ("query.sql", "vitals.sql"))
ACCOUNT = "_source_tables.json"  # beside the result: where the rows of the tables went; no reader of Parquet minds it
# Event rows of the tables behind one slice of patients, which has to fit in memory at once; fewer where that is small.
ROWS_PER_SLICE, BYTES_PER_ROW = 2_000_000, 1_500

_TABLES = yaml.safe_load(Path(__file__).with_name("mimic_tables.yaml").read_text("utf-8"))
_STATEMENTS = _TABLES.pop("statements")
MIMIC_TABLES = {name: table["columns"] for name, table in _TABLES.items()}  # {table: {column: type}}
EVENT_TABLES = {name: table["time"] for name, table in _TABLES.items() if "time" in table}
# How a text is read as a type: NaN and infinity (1e999) are missing, a time with an offset (slow to read) is in UTC.
FINITE = "CASE WHEN isfinite(TRY_CAST({0} AS DOUBLE)) IS NOT FALSE THEN {0} END"
READ_AS = {kind: f"{{1}}({FINITE} AS {kind})" for kind in ("BIGINT", "DOUBLE", "TIMESTAMPTZ")} | {"VARCHAR": "{0}"}
READ_AS["TIMESTAMP"] = f"""CASE WHEN {duck.IS_PLAIN} THEN {{1}}({{0}} AS TIMESTAMP)
                           ELSE CAST({READ_AS["TIMESTAMPTZ"]} AS TIMESTAMP) END"""


def find_mimic_files(folder: Path, query: str) -> dict[str, Path]:
    """Return the file of every table that a query reads; InputError names what is missing or double."""
    ends, read = (".csv", ".csv.gz"), [table for table in _TABLES if f"_{table.replace('/', '.')}`" in query]
    found = {table: [*filter(Path.is_file, (folder / f"{table}{end}" for end in ends))] for table in read}
    if missing := [f"{table}.csv[.gz]" for table, paths in found.items() if not paths]:
        raise refusal("incomplete_mimic", folder=folder, missing=", ".join(missing))
    if doubled := [" and ".join(map(str, paths)) for paths in found.values() if len(paths) == 2]:
        raise refusal("doubled_mimic", paths=doubled[0])
    return {table: paths[0] for table, paths in found.items()}


def faults_of_rows(query: str) -> dict[str, str]:
    """Return, by table, the SQL of why a row is of no stay: `lost`, and what the query says behind `-- else:`."""
    faults = {table: dict(says["lost"]) for table, says in _TABLES.items() if "lost" in says}
    aliases = {alias: f"{part}/{name}" for part, name, alias in re.findall(r"_(hosp|icu)\.(\w+)` AS (\w+)", query)}
    for condition, alias, reason in re.findall(r"^\s+AND (.*?\b(\w+)\..*?)\s+-- else: (.+)$", query, re.MULTILINE):
        of_table, fails = faults[aliases[alias]], f"NOT ({condition.replace(f'{alias}.', '')})"
        of_table[reason] = f"{of_table[reason]} OR {fails}" if reason in of_table else fails
    when = lambda conditions: " ".join(f"WHEN {fails} THEN {duck.quoted(why)}" for why, fails in conditions.items())
    return {table: f"CASE {when(conditions)} END" for table, conditions in faults.items()}


def load_mimic_table(database: duckdb.DuckDBPyConnection, table: str, path: Path, query: str) -> None:
    """Copy a CSV file into `database`, typed; of events those near ICU stays, at fault or noted. InputError if bad."""
    name, rows = Path(table).name, duck.csv_rows([path], duck.MISSING)
    columns, says = MIMIC_TABLES[table], _TABLES[table]
    if absent := sorted(columns.keys() - duck.column_types(database, rows)):
        raise InputError(f"{path} has no column {', '.join(absent)}: it is not the table {table} of MIMIC-IV.")
    parts = {"name": name, "rows": rows, "fault": faults_of_rows(query).get(table, "NULL")}
    if "of_items" in says:  # rows of others are counted, and not even typed; with AND they would not be counted
        is_listed = f"CASE WHEN any_row > 0 THEN itemid IN {tuple(re.findall(r'[(]([0-9]+), ', query))} END"
        parts["rows"] = f"(FROM (SELECT *, nextval('{name}_any') AS any_row FROM {rows}) WHERE {is_listed})"
    parts["typed"] = ", ".join(f"{READ_AS[kind]} AS {{0}}".format(column, "CAST") for column, kind in columns.items())
    parts["also"] = " OR ".join(says.get("noted", {"nothing": "false"}).values())
    parts["read"] = _STATEMENTS["read"].format(**parts)
    statement = _STATEMENTS["near stays"].format(**parts, **says) if table in EVENT_TABLES else parts["read"]
    for rows_counted in ("any", "read", "of_cohort"):
        database.execute(f"CREATE OR REPLACE SEQUENCE {name}_{rows_counted}")
    try:
        database.execute(f"CREATE TABLE {name} AS {statement}").fetchall()
    except duckdb.ConversionException:
        counted = [f"count({FINITE}) - count({READ_AS[kind]})".format(c, "TRY_CAST") for c, kind in columns.items()]
        counts = database.execute(f"SELECT {', '.join(counted)} FROM {parts['rows']}").fetchall()[0]
        unfit = [f"{column} ({columns[column]}) in {count} rows" for column, count in zip(columns, counts) if count]
        raise InputError(f"{path} has values that do not fit: {', '.join(unfit)}.") from None
    if unique := says.get("key"):
        twice = f"SELECT {unique} FROM {name} GROUP BY {unique} HAVING count({unique}) > 1"
        count, first = database.execute(f"SELECT count(*), {duck.FIRST.format(unique)} FROM ({twice})").fetchall()[0]
        if count:
            raise refusal("repeated_keys", table=table, column=unique, count=count, first=first)


def account_for_rows(database: duckdb.DuckDBPyConnection, query: str, tables: Iterable[str]) -> list[SourceAccount]:
    """Count the rows of every table: read, of the cohort, lost and why. Events in stays: see `complete_account`."""
    passed = dict(database.execute("SELECT sequence_name, coalesce(last_value, 0) FROM duckdb_sequences()").fetchall())
    accounts, faults = [], faults_of_rows(query)
    for table in tables:
        name, says = Path(table).name, _TABLES[table]
        others = passed[f"{name}_any"] - passed[f"{name}_read"] if "of_items" in says else 0
        account = SourceAccount(table, passed[f"{name}_read"] + others)
        if table in faults:
            counts = f"SELECT {faults[table]} AS fault, count(*) FROM {name} GROUP BY ALL HAVING fault IS NOT NULL"
            account.lost = {"of other items": others} if others else {}
            account.lost |= dict(database.execute(f"{counts} ORDER BY ALL").fetchall())
            account.of_cohort = passed[f"{name}_of_cohort"] + others if table in EVENT_TABLES else account.read
            account.in_stays = account.of_cohort - sum(account.lost.values())  # of events less: see there
        for reason, condition in says.get("noted", {}).items():
            account.noted[reason] = duck.first_value(database, f"SELECT count(*) FROM {name} WHERE {condition}")
        accounts.append(account)
    return accounts


def complete_account(con: duckdb.DuckDBPyConnection, folders: Iterable[Path]) -> list[SourceAccount]:
    """Return the accounts that lie beside queries' results, with the events that were read: every row is in it once."""
    told = [json.loads((folder / ACCOUNT).read_text("utf-8")) for folder in folders if (folder / ACCOUNT).is_file()]
    if not (accounts := {account["table"]: SourceAccount(**account) for account in sum(told, [])}):
        return []
    count = "SELECT event_type, count(*) FROM {} GROUP BY event_type"
    found, used = (dict(con.execute(count.format(rows)).fetchall()) for rows in ("event_rows", "events"))
    for number, (table, event_type) in enumerate(zip(EVENT_TABLES, (*EVENT_TYPES, *OTHER_TYPES))):
        account, name = accounts.get(table), Path(table).name
        if account and account.of_cohort is not None:
            if event_type in OTHER_TYPES:  # vitals.sql counts what it leaves out, in columns of the table's name
                sums = con.sql(f"SELECT coalesce(sum(COLUMNS('^{name}_')), 0) FROM given_vitals").df().iloc[0]
                account.lost |= {why.removeprefix(f"{name}_").replace("_", " "): int(n) for why, n in sums.items()}
            in_stays, account.in_stays = found.get(event_type, 0), used.get(number, 0)
            lost = {"outside the ICU stays": account.of_cohort - sum(account.lost.values()) - in_stays}
            lost["repeated, or of a stay that was dropped"] = in_stays - account.in_stays
            account.lost = {why: n for why, n in (account.lost | lost).items() if n}
    return list(accounts.values())


def run_mimic_query(folder: Path, cache_dir: Path, memory_limit: str = "33%", query_file: Path | None = None) -> Path:
    """Return the folder of Parquet files with what query.sql gives for a MIMIC-IV folder: a row per ICU stay."""
    # Kept while both stay the same; a stopped run goes on from its tables and slices, or if damaged is begun anew.
    results, query_file = cache_dir / "query_results", query_file or QUERY_FILE
    query = query_file.read_text("utf-8")
    paths = find_mimic_files(folder, query)
    stats = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in paths.values()]
    # Which way a tie is rounded (3.05) depends on DuckDB's version.
    tables = {table: _TABLES[table] for table in paths}
    made_of = (query, tables, READ_AS, _STATEMENTS, duck.MISSING, duckdb.__version__, stats)
    key = hashlib.md5(repr(made_of).encode()).hexdigest()
    target, working = results / f"{key}.parquet", results / f"unfinished-{key}"
    if target.exists():
        return target
    import sqlglot  # here: it takes a while, and most starts find the result

    with files.lock_folder(results):
        for unfinished in set(results.glob("unfinished-*")) - {working}:
            files.delete_quietly(unfinished)
        while not target.exists():  # another run may have made it while this one waited
            is_begun, read, result = working.exists(), folder, working / target.name
            working.mkdir(exist_ok=True)
            try:
                with duck.open_duckdb(memory_limit, working / "spilled", working / "mimic.duckdb") as database:
                    done = database.execute("SHOW TABLES").fetchall()
                    for table, read in Progress(paths.items(), desc="reading MIMIC-IV", unit=" tables"):
                        if (Path(table).name,) not in done:
                            load_mimic_table(database, table, read, query)
                    read = folder
                    files.write_json(result / ACCOUNT, list(map(asdict, account_for_rows(database, query, paths))))
                    local = re.sub(r"`[\w.-]+\.(\w+)`", r"\1", query)  # tables of the same names
                    collect_stays(database, sqlglot.transpile(local, read="bigquery", write="duckdb")[0], result)
                os.replace(result, target)
            except (duckdb.Error, InputError) as error:
                if isinstance(error, duckdb.OutOfMemoryException) or "No space left" in str(error):  # the next goes on
                    raise duck.out_of_memory_error(query_file.name, error, memory_limit, results) from None
                files.delete_quietly(working)
                if not is_begun or working.exists():  # else another DuckDB made it, or the disk lost some of it: anew
                    if isinstance(error, InputError):  # it has to be mended first
                        raise
                    raise refusal("unreadable_mimic", path=read, reason=duck.reason_without_rows(error)) from None
        files.delete_quietly(working)
    return target


def collect_stays(database: duckdb.DuckDBPyConnection, query: str, result: Path) -> None:
    """Run the query for one slice of the patients after the other; each becomes a Parquet file in `result`."""
    found = "SELECT DISTINCT subject_id FROM mimic.icustays WHERE subject_id IS NOT NULL ORDER BY subject_id"
    if not (patients := database.execute(found).fetchall()):
        raise InputError("icu/icustays has no rows: nothing to learn from.")
    # Each file is named by how many patients are done with it: a stopped run goes on behind the last.
    done = max((int(path.stem.split("_")[1]) for path in result.glob("part_*.parquet")), default=0)
    most = f"least({ROWS_PER_SLICE}, parse_formatted_bytes(current_setting('memory_limit')) // {BYTES_PER_ROW})"
    n_slices = duck.first_value(database, f"SELECT 1 + sum(estimated_size) // {most} FROM duckdb_tables()")
    of_patients = "SELECT table_name, column_name FROM duckdb_columns() WHERE column_name = 'patient'"
    keys = dict(database.execute(of_patients).fetchall()) | {"icustays": "subject_id"}
    size, by_ids = len(patients) // int(n_slices) or 1, "COLUMNS('^(patient|icu_stay)_id$')"
    copied = f"COPY (SELECT * FROM ({query}) ORDER BY {by_ids}) TO "
    options = "(FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE_BYTES 16000000)"  # a thread that reads holds a group
    with Progress(total=len(patients), initial=done, desc="building events", unit=" patients") as bar:
        while done < len(patients):
            part = patients[done : done + size]
            for name, key in keys.items():
                rows = f"SELECT * FROM mimic.{name} WHERE {key} BETWEEN {part[0][0]} AND {part[-1][0]}"
                database.execute(f"CREATE OR REPLACE TEMP VIEW {name} AS {rows}")
            write = lambda name: database.execute(f"{copied}{duck.quoted(name)} {options}").fetchall()
            try:
                files.write_whole(result / f"part_{done + len(part):08d}.parquet", write)
                done += len(part)
                bar.update(len(part))
            except duckdb.OutOfMemoryException:
                if size == 1:
                    raise
                size //= 2
