"""DuckDB as every source uses it: within limits, in UTC, with errors that hold no row."""

import re
from collections.abc import Iterable, Sequence
from glob import escape
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
from duckdb import DuckDBPyConnection

from clinical_lf.files import WORDS, InputError, free_disk, refusal

# How programs write a missing value. In capitals NONE is a finding: no bacteria in the urine.
MISSING = ("", "nan", "NaN", "inf", "-inf", "None", "NULL")
FIRST = "array_to_string(min(DISTINCT {}, 3), ', ')"  # the first three of a column, for a message


def open_duckdb(memory_limit: str, spill: Path, database: str | Path = ":memory:") -> DuckDBPyConnection:
    """Connect with a memory limit (InputError if it is none), beyond which `spill` is filled; rows keep no order."""
    con = duckdb.connect(database)
    con.execute(f"SET preserve_insertion_order = false; SET TimeZone = 'UTC'; SET temp_directory = {quoted(spill)}")
    # A value as trimmed text, NULL where it only says that it is missing. Here infinity is an error.
    words = [*(word for word in MISSING if "inf" not in word), *("NA", "N/A", "<NA>", "NaT", "null", "\\N")]
    text, missing = "trim(CAST(value AS VARCHAR))", ", ".join(map(quoted, words))
    con.execute(f"CREATE TEMP MACRO null_if_missing(value) AS CASE WHEN {text} NOT IN ({missing}) THEN {text} END")
    try:
        con.execute(f"SET memory_limit = {quoted(memory_limit)}")
    except duckdb.Error:
        con.close()
        raise InputError(f"--memory-limit {memory_limit}: give a size like 16GB, or a share like 33%.") from None
    return con


def quoted(text: str | Path) -> str:
    """Return `text` as an SQL string literal."""
    return "'" + str(text).replace("'", "''") + "'"


def file_list(paths: Iterable[Path]) -> str:
    """Return files as the SQL list that read_parquet and read_csv take: each is itself, never a pattern."""
    return f"[{', '.join(quoted(escape(str(path))) for path in paths)}]"


def csv_rows(paths: Sequence[Path], missing: Sequence[str] = ("",)) -> str:
    """Return the SQL that reads CSV files as text, guessing nothing of their form; a value in `missing` is NULL."""
    # A buffer of one longest line: DuckDB's own, of sixteen, costs a quarter more CPU time.
    return f"""read_csv({file_list(paths)}, all_varchar = true, header = true, delim = ',', quote = '"', escape = '"',
    comment = '', max_line_size = 16000000, buffer_size = 16000000, nullstr = {list(missing)})"""


# Of a text time: nothing stands after the seconds, as in 2150-01-31 23:59:00. All others take four times as long.
IS_PLAIN = "strlen({0}) = 19 AND substr({0}, 17, 1) = ':'"
STATES_ZONE = f"NOT ({IS_PLAIN}) AND regexp_matches({{0}}, ':.*[A-Za-z+-]')"
# Values that a type takes but a table should not have: DuckDB rounds 1.5 to an integer, and infinity is a number and a
# time. By the column's name, under which with _written is what stood there.
UNFIT = {
    "BIGINT": "{0} <> TRY_CAST({0}_written AS DOUBLE) OR contains(CAST({0}_written AS VARCHAR), 'E')",  # 3.00E+07
    "TIMESTAMP": "NOT isfinite({0})",
    "DOUBLE": "abs(nullif({0}, 'NaN'::DOUBLE)) > 1e30",
}


def as_type(column: str, sql_type: str, stored_as: str) -> str:
    """Return the SQL for a column as another type, NULL where it does not fit; times that state their offset in UTC."""
    if sql_type == "BOOLEAN":  # 1.0 is true, 0.7 is no label
        column = f"regexp_replace(CAST({column} AS VARCHAR), '[.]0+$', '')"
    cast = f"TRY_CAST({column} AS {sql_type})"
    if (sql_type, stored_as) != ("TIMESTAMP", "VARCHAR"):
        return cast  # of a typed time with a zone in UTC, too
    # The cast of a text to TIMESTAMP drops what follows the seconds, offsets as well as PM.
    zoned = rf"TRY_CAST(TRY_CAST(regexp_replace(trim({column}), ' +(Z|[+-]\d)', '\1') AS TIMESTAMPTZ) AS TIMESTAMP)"
    return f"CASE WHEN {IS_PLAIN.format(column)} THEN {cast} ELSE {zoned} END"


def typed_rows(con: DuckDBPyConnection, rows: str, columns: pd.DataFrame, place: str) -> tuple[str, pd.DataFrame]:
    """Return the SQL of rows with their columns typed, and how many times of each column state a zone, or none.

    columns: `given`, what each is called, or '' if it is not there; `must`, what else makes a value unfit, or '' if
    none is. InputError says where they are, by `place`: the SQL of the file, and of the number of the row.
    """
    types = column_types(con, rows)
    values, written, checks, zones = ["file_of_row"] * ("file_of_row" in types), [], {}, {}
    for column in columns.itertuples():
        name, sql_type, stored_as = column.Index, column.type, types.get(column.given, "")
        stored = f'"{column.given}"' if column.given else "NULL"
        values.append(f"{as_type(stored, sql_type, stored_as)} AS {name}")
        written.append(f"{stored} AS {name}_written")
        if column.given and column.must:
            unread = "{0} IS NULL AND null_if_missing({0}_written) IS NOT NULL" if sql_type != stored_as else "false"
            checks[name] = f"{column.must} OR {UNFIT.get(sql_type, 'false')} OR {unread}".format(name)
        if sql_type == "TIMESTAMP":
            zone = STATES_ZONE.format(f"{name}_written") if stored_as == "VARCHAR" else stored_as.endswith("TIME ZONE")
            zones[name] = f"count({name}) FILTER ({zone}), count({name}) FILTER (NOT ({zone}))"
    read = f"{', '.join(values + written)} FROM {rows})"
    counted = [*(f"count_if({check})" for check in checks.values()), *zones.values()]
    found = con.execute(f"SELECT {', '.join(counted)} FROM (SELECT {read}").fetchall()[0]  # all in one pass
    for column, count in zip(columns.loc[[*checks]].itertuples(), found):
        if count:
            where = f"FROM (SELECT {place}, {read} WHERE {checks[column.Index]}"
            source, first = con.execute(f"SELECT min(place), {FIRST.format('number')} {where}").fetchall()[0]
            facts = {"source": source, "column": column.given, "wanted": column.wanted}
            raise refusal("unfit_values", count=count, first=first, **facts)
    counts = np.reshape(found[len(checks) :], (-1, 2))
    return f"SELECT {', '.join(values)} FROM {rows}", pd.DataFrame(counts, [*zones], ["zoned", "naive"])


def named_statements(path: Path, **filled: Any) -> dict[str, str]:
    """Return the parts of a file of SQL by their names (`-- name:`), what stands in braces filled in."""
    return dict(part.split("\n", 1) for part in path.read_text("utf-8").format(**filled).split("-- name: ")[1:])


def first_value(con: DuckDBPyConnection, statement: str) -> Any:
    """Return the first value of the first row that a statement gives, such as how many rows it counted or deleted."""
    return con.execute(statement).fetchall()[0][0]


def column_types(con: DuckDBPyConnection, relation: str) -> dict[str, str]:
    """Return the columns of a table, of a view or of what reads a file, with their types."""
    return {name: kind for name, kind, *_ in con.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall()}


def reason_without_rows(error: Exception, parquet: Iterable[Path] = ()) -> str:
    """Return which file is at fault, one of `parquet` if DuckDB does not say, and why; nothing of a row."""
    text = str(error).split("\nLINE 1")[0]
    named = re.findall(r"""(?:['"]|stream: |\n  file = )(.+?\.\w+)(?:['"]|$)""", text, re.MULTILINE)
    at_fault = [name for name in named if Path(name).is_file()][-1:]
    for path in () if at_fault else parquet:
        try:  # every value is read
            duckdb.connect().execute(f"SELECT max(hash(COLUMNS(*))) FROM read_parquet({file_list([path])})").fetchall()
        except duckdb.Error:
            at_fault = [str(path)]
            break
    reasons = [words for pattern, words in WORDS["damage"].items() if re.search(pattern, text)]
    line = re.search(r"Line: ?(\d+)", text)
    # DuckDB's own words may hold a value.
    reason = f"{[*reasons, type(error).__name__][0]}{f' at line {line[1]}' if line else ''}"
    return ": ".join([*at_fault, reason])


def out_of_memory_error(what: str, error: Exception, memory_limit: str, folder: Path) -> InputError:
    """Return the error that says that memory or disk ran out, which no file is to blame for."""
    found = {"error": type(error).__name__, "limit": memory_limit, "free": free_disk(folder) / 1e9, "folder": folder}
    return refusal("out_of_memory", what=what, **found)
