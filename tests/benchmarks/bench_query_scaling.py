"""From a MIMIC-IV folder to mapped arrays, on stand-ins of four sizes: CPU seconds, peak memory, counts.

    python tests/benchmarks/bench_query_scaling.py PATH/TO/mimic-iv-demo --copies 5 20 80
    python tests/benchmarks/bench_query_scaling.py PATH/TO/mimic-iv-demo --copies 670 --memory-limit 3GB   # full size
    python tests/benchmarks/bench_query_scaling.py PATH/TO/mimic-iv --as-is                                # your own
    python tests/benchmarks/bench_query_scaling.py PATH/TO/mimic-iv --as-is --vitals                    # and vitals.sql

A stand-in has copies of the demo with ids of their own, jittered values, and rows of patients who never were in an ICU,
in MIMIC-IV's own layout: 670 copies are 93,800 stays, 158 million lab rows, 5 GB. Folders and results are made in
--place and removed at the end. Each stage runs in a process of its own: its peak memory is that stage's alone.
"""

import argparse
import resource
import shutil
import tempfile
import time
from pathlib import Path

import duckdb
from common import machine, markdown, peak_memory_gb, run_alone

from clinical_lf import reading
from clinical_lf.duck import quoted
from clinical_lf.mimic import QUERY_FILE, VITALS_FILE, find_mimic_files, run_mimic_query

ID_STEP = 100_000_000  # the ids of MIMIC-IV have eight digits
NOISE = "sqrt(-2 * ln(1 - random())) * cos(2 * pi() * random())"  # standard normal
OUTSIDE = {
    "hosp/labevents": 2.19,
    "hosp/microbiologyevents": 2.05,
    "hosp/prescriptions": 1.65,
}  # rows per row of ICU patients
JITTERED = {
    "hosp/labevents": f"""valuenum: round(TRY_CAST(valuenum AS DOUBLE) * (1 + 0.08 * {NOISE}),
        CAST(length(split_part(value, '.', 2)) AS INTEGER))""",
    "icu/ingredientevents": f"""rate: CAST(rate AS DOUBLE) * exp(0.15 * {NOISE});
        amount: CAST(amount AS DOUBLE) * exp(0.2 * {NOISE})""",
    "icu/procedureevents": f"""value: CASE WHEN CAST(value AS DOUBLE) > 1
        THEN round(CAST(value AS DOUBLE) * exp(0.2 * {NOISE})) ELSE CAST(value AS DOUBLE) END""",
}


def make_folder(source: Path, target: Path, copies: int) -> None:
    """Write a stand-in of `copies` times the MIMIC-IV folder `source` into `target`, as csv.gz."""
    for table, path in find_mimic_files(source, QUERY_FILE.read_text("utf-8")).items():
        rows = f"read_csv({quoted(path)}, all_varchar=true, header=true)"
        columns = [row[0] for row in duckdb.execute(f"DESCRIBE SELECT * FROM {rows}").fetchall()]
        changed = [part.split(":", 1) for part in JITTERED.get(table, "").split(";") if part]
        changed += [
            [name, f"CAST({name} AS BIGINT) + copy * {ID_STEP}"]
            for name in ("subject_id", "hadm_id", "stay_id")
            if name in columns
        ]
        statement = f"SELECT * FROM {rows}"
        if "subject_id" in columns:
            replaced = ", ".join(f"{formula} AS {name.strip()}" for name, formula in changed)
            times = int(copies * OUTSIDE.get(table, 1))
            statement = f"SELECT * EXCLUDE copy REPLACE ({replaced}) FROM {rows}, range({times}) AS copies(copy)"
        (target / table).parent.mkdir(parents=True, exist_ok=True)
        output = quoted(target / f"{table}.csv.gz")
        duckdb.execute(f"COPY ({statement}) TO {output} (HEADER, COMPRESSION gzip)")


def run_stage(stage: str, folder: Path, cache: Path, memory_limit: str, vitals: bool) -> None:
    """Run one stage in this process and print its row: what it took of CPU, clock and memory, and what it gave."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    if stage in (QUERY_FILE.name, VITALS_FILE.name):
        result = run_mimic_query(folder, cache, memory_limit, QUERY_FILE.with_name(stage))
        parts = list(result.glob("*.parquet"))
        gave = f"{len(parts)} parts, {sum(part.stat().st_size for part in parts) / 2**20:,.0f} MB"
    else:
        reading.KEEP_ARRAYS_FROM = 0
        table, _ = reading.read_stays(folder, cache, memory_limit=memory_limit, vitals=VITALS_FILE.name * vitals)
        gave = f"{len(table.stays):,} stays, {len(table.text):,} events, {len(table.texts):,} texts"
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{stage};{cpu:.1f};{time.perf_counter() - started:.0f};{peak_memory_gb():.2f};{gave}")


def measure(folder: Path, place: Path, memory_limit: str, vitals: bool) -> list[list[str]]:
    """Return a row for each stage: from the folder to the nested table, from it to arrays, and a second start."""
    rows, more = [], ["--vitals"] * vitals
    with tempfile.TemporaryDirectory(dir=place) as cache:
        for stage in (QUERY_FILE.name, *[VITALS_FILE.name] * vitals, "first read", "second start"):
            done = run_alone(
                __file__, folder, "--stage", stage, "--place", cache, "--memory-limit", memory_limit, *more
            )
            rows.append((done.stdout.strip().splitlines() or [f"{stage};;;;{done.stderr[-300:]}"])[-1].split(";"))
            print("   ".join(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--copies", type=int, nargs="+", default=[5, 20, 80])
    parser.add_argument("--as-is", action="store_true", help="measure FOLDER itself")
    parser.add_argument("--vitals", action="store_true", help="run vitals.sql, too, and read what it adds")
    parser.add_argument("--memory-limit", default="3GB")
    parser.add_argument("--place", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--stage", help="only this stage, on FOLDER, in this process, with --place as cache")
    options = parser.parse_args()
    if options.stage:
        return run_stage(options.stage, options.folder, options.place, options.memory_limit, options.vitals)
    table = []
    for copies in [1] if options.as_is else options.copies:
        folder = options.folder if options.as_is else Path(tempfile.mkdtemp(dir=options.place))
        try:
            if not options.as_is:
                make_folder(options.folder, folder, copies)
            table += [
                [f"x{copies}", *row] for row in measure(folder, options.place, options.memory_limit, options.vitals)
            ]
        finally:
            if not options.as_is:
                shutil.rmtree(folder)
    print(markdown(["size", "stage", "CPU s", "s", "peak GB", "result"], table))
    print(f"{machine()}; --memory-limit {options.memory_limit}")


if __name__ == "__main__":
    main()
