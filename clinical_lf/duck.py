"""DuckDB as every source uses it: within limits, in UTC, with errors that hold no row."""

import re
from collections.abc import Iterable, Sequence
from glob import escape
from pathlib import Path
from typing import Any

import duckdb
from duckdb import DuckDBPyConnection

from clinical_lf.files import InputError, free_disk, refusal

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


def csv_rows(path: Path, missing: Sequence[str] = ("",)) -> str:
    """Return the SQL that reads a CSV file as text, guessing nothing of its form; a value in `missing` is NULL."""
    # A buffer of one longest line: DuckDB's own, of sixteen, costs a quarter more CPU time.
    return f"""read_csv({quoted(path)}, all_varchar = true, header = true, delim = ',', quote = '"', escape = '"',
    comment = '', max_line_size = 16000000, buffer_size = 16000000, nullstr = {list(missing)})"""


def first_value(con: DuckDBPyConnection, statement: str) -> Any:
    """Return the first value of the first row that a statement gives, such as how many rows it counted or deleted."""
    return con.execute(statement).fetchall()[0][0]


def column_types(con: DuckDBPyConnection, relation: str) -> dict[str, str]:
    """Return the columns of a table, of a view or of what reads a file, with their types."""
    return {name: kind for name, kind, *_ in con.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall()}


def reason_without_rows(error: Exception) -> str:
    """Return what went wrong, without the row it went wrong in: rows hold patient data."""
    text = str(error)
    reason = re.split(r"[\n:\"']", re.sub(r"^(\w+ )+Error: ", "", text))[0].strip()
    if "sniffing" in reason:
        reason = "a row with more or fewer values than the header, or a quote that never closes"
    if line := re.search(r"Line: ?(\d+)", text):
        reason += f" at line {line[1]}"
    known = r"Invalid unicode|Expected Number of Columns: \d+ Found: \d+|Maximum line size|unterminated quote"
    return ", ".join([f"{type(error).__name__}: {reason}", *re.findall(known, text)[:1]])


def out_of_memory_error(what: str, error: Exception, memory_limit: str, folder: Path) -> InputError:
    """Return the error that says that memory or disk ran out, which no file is to blame for."""
    found = {"error": type(error).__name__, "limit": memory_limit, "free": free_disk(folder) / 1e9, "folder": folder}
    return refusal("out_of_memory", what=what, **found)
