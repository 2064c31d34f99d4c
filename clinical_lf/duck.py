"""DuckDB as every source uses it: within limits, in UTC, with errors that hold no row."""

import contextlib
import re
from collections.abc import Iterable, Sequence
from glob import escape
from itertools import islice
from pathlib import Path
from typing import Any

import duckdb
from duckdb import DuckDBPyConnection

from clinical_lf.files import WORDS, InputError, free_disk, refusal

# How programs write a missing value. In capitals NONE is a finding: no bacteria in the urine.
MISSING = ("", "nan", "NaN", "inf", "-inf", "None", "NULL")
FIRST = "array_to_string(min(DISTINCT {}, 3), ', ')"  # the first three of a column, for a message


def open_duckdb(memory_limit: str, spill: Path, database: str | Path = ":memory:") -> DuckDBPyConnection:
    """Connect with a memory limit (InputError if it is none), beyond which `spill` is filled; rows keep no order."""
    con = duckdb.connect(database)
    con.execute(f"SET preserve_insertion_order = false; SET TimeZone = 'UTC'; SET temp_directory = {quoted(spill)}")
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


def sql_case(conditions: dict[str, str]) -> str:
    """Return the SQL for the first name whose condition holds in a row, NULL where none does."""
    return f"CASE {' '.join(f'WHEN {condition} THEN {quoted(name)}' for name, condition in conditions.items())} END"


def csv_rows(paths: Path | Sequence[Path], missing: Sequence[str] = ("",)) -> str:
    """Return the SQL that reads CSV files as text, guessing nothing of their form; a value in `missing` is NULL."""
    listed = file_list([paths] if isinstance(paths, Path) else paths)
    # A buffer of one longest line: DuckDB's own, of sixteen, costs a quarter more CPU time.
    return f"""read_csv({listed}, all_varchar = true, header = true, delim = ',', quote = '"', escape = '"',
    comment = '', max_line_size = 16000000, buffer_size = 16000000, nullstr = {list(missing)})"""


# Of a text time: nothing stands after the seconds, as in 2150-01-31 23:59:00. All others take four times as long.
IS_PLAIN = "strlen({0}) = 19 AND substr({0}, 17, 1) = ':'"


def as_type(column: str, sql_type: str, stored_as: str) -> str:
    """Return the SQL for a column as another type, NULL where it does not fit; times that state their offset in UTC."""
    cast = f"TRY_CAST({column} AS {sql_type})"
    if (sql_type, stored_as) != ("TIMESTAMP", "VARCHAR"):
        return cast  # of a typed time with a zone in UTC, too
    # The cast of a text to TIMESTAMP drops what follows the seconds, offsets as well as PM.
    zoned = rf"TRY_CAST(TRY_CAST(regexp_replace(trim({column}), ' +(Z|[+-]\d)', '\1') AS TIMESTAMPTZ) AS TIMESTAMP)"
    return f"CASE WHEN {IS_PLAIN.format(column)} THEN {cast} ELSE {zoned} END"


def states_zone(column: str, stored_as: str) -> str:
    """Return the SQL for whether a time states its offset from UTC, or its zone."""
    if stored_as != "VARCHAR":
        return str(stored_as.endswith("TIME ZONE"))
    return f"NOT ({IS_PLAIN.format(column)}) AND regexp_matches({column}, ':.*[A-Za-z+-]')"


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
    at_fault = at_fault or list(islice((str(path) for path in parquet if not _is_readable(path)), 1))
    reasons = [words for pattern, words in WORDS["damage"].items() if re.search(pattern, text)]
    reason = reasons[0] if reasons else type(error).__name__  # its own words may hold a value
    if line := re.search(r"Line: ?(\d+)", text):
        reason += f" at line {line[1]}"
    known = re.findall(r"Expected Number of Columns: \d+ Found: \d+|unterminated quote", text)
    return ": ".join([*at_fault, ", ".join([reason, *known[:1]])])


def _is_readable(parquet: Path) -> bool:
    """Return whether a whole Parquet file can be read."""
    with contextlib.suppress(duckdb.Error), duckdb.connect() as con:
        return bool(con.execute(f"SELECT max(hash(COLUMNS(*))) FROM read_parquet({file_list([parquet])})").fetchall())
    return False


def out_of_memory_error(what: str, error: Exception, memory_limit: str, folder: Path) -> InputError:
    """Return the error that says that memory or disk ran out, which no file is to blame for."""
    found = {"error": type(error).__name__, "limit": memory_limit, "free": free_disk(folder) / 1e9, "folder": folder}
    return refusal("out_of_memory", what=what, **found)
