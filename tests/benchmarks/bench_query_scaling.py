"""query.sql on a MIMIC-IV folder made N times larger: time, peak memory and counts.

    python tests/benchmarks/bench_query_scaling.py PATH/TO/mimic-iv-demo --copies 1 50 --memory-limit 8GB

Every copy has patients, admissions and stays of its own (ids shifted), so the result must have exactly N times the
stays and events of the original. The folder is made in a temporary place and removed at the end.
"""

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import duckdb

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train  # noqa: E402

ID_STEP = 100_000_000  # the ids of MIMIC-IV have eight digits


def make_folder(source: Path, target: Path, copies: int) -> int:
    """Write `copies` shifted copies of the MIMIC-IV folder `source` into `target` as csv.gz; returns its bytes."""
    written = 0
    for table, path in train.find_mimic_files(source).items():
        reader = f"read_csv({train.sql_quoted(path)}, all_varchar=true, header=true)"
        columns = [row[0] for row in duckdb.sql(f"DESCRIBE SELECT * FROM {reader}").fetchall()]
        ids = [name for name in columns if name in ("subject_id", "hadm_id", "stay_id")]
        shifted = ", ".join(f"CAST({name} AS BIGINT) + copy * {ID_STEP} AS {name}" for name in ids)
        rows = (
            f"SELECT * EXCLUDE (copy) REPLACE ({shifted}) FROM {reader}, range({copies}) AS copies(copy)"
            if ids
            else f"SELECT * FROM {reader}"
        )
        output = target / f"{table}.csv.gz"
        output.parent.mkdir(parents=True, exist_ok=True)
        duckdb.execute(f"COPY ({rows}) TO {train.sql_quoted(output)} (HEADER, COMPRESSION gzip)")
        written += output.stat().st_size
    return written


def peak_memory_gb() -> float:
    """Most resident memory this process ever had (Linux; getrusage would also count the process that started it)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def run_once(folder: Path, memory_limit: str) -> None:
    """Run the query on `folder` in this process and print what it took (peak memory is that of the whole process)."""
    before = peak_memory_gb()
    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        result = train.run_mimic_query(folder, Path(cache), memory_limit=memory_limit)
        seconds = time.perf_counter() - start
        stays, events = duckdb.sql(
            f"SELECT count(*), sum(len(events)) FROM {train.sql_quoted(result / '*.parquet')}"
        ).fetchall()[0]
        size = sum(part.stat().st_size for part in result.iterdir())
    print(
        f"{stays:>9,} stays {events:>12,} events {seconds:8.1f} s   peak {peak_memory_gb():5.2f} GB "
        f"({before:.2f} GB before)   result {size / 2**20:7.1f} MB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 10, 50])
    parser.add_argument("--memory-limit", default="8GB")
    parser.add_argument("--run-once", action="store_true", help="only run the query on FOLDER, in this process")
    settings = parser.parse_args()
    if settings.run_once:
        return run_once(settings.folder, settings.memory_limit)
    print(
        f"{platform.machine()}, Python {platform.python_version()}, DuckDB {duckdb.__version__}, "
        f"memory_limit {settings.memory_limit}"
    )
    for copies in settings.copies:
        with tempfile.TemporaryDirectory() as place:
            size = make_folder(settings.folder, Path(place), copies)
            print(f"x{copies:<4} {size / 2**20:7.1f} MB csv.gz", end=" ", flush=True)
            subprocess.run(
                [sys.executable, __file__, place, "--run-once", "--memory-limit", settings.memory_limit], check=True
            )  # a process of its own: its peak memory is this run's alone


if __name__ == "__main__":
    main()
