"""Reading a big table, at three sizes: seconds and peak memory of read_stays; then padding and reading of items.

    python tests/benchmarks/bench_data.py                                       # up to 5,000,000 events, 20,000 stays
    python tests/benchmarks/bench_data.py --stays 1000 2000 --data ../shared/mimic-iv-demo

The tables are synthetic, written by DuckDB to Parquet: 250 events per stay on average (50 to 450), one distinct text
per ten events, all columns of query.sql; flat (every stay's columns on each of its rows) and nested. --data names real
stays, on whose lengths the padding of batches is reckoned.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import duckdb
import numpy as np
from common import machine, peak_memory_gb, run_alone, train

from clinical_lf.duck import quoted
from clinical_lf.reading import read_stays
from clinical_lf.tables import StayTable

STAYS = """
    SELECT i // 2 AS patient_id, i AS admission_id, i AS icu_stay_id,
           TIMESTAMP '2150-01-01' + INTERVAL (i) HOUR AS icu_intime, icu_intime + INTERVAL 7200 MINUTE AS icu_outtime,
           CASE WHEN died THEN icu_outtime + INTERVAL 1 DAY END AS patient_death_time,
           died::INTEGER AS patient_expired_in_hospital, CASE i % 2 WHEN 0 THEN 'F' ELSE 'M' END AS patient_gender,
           20 + i % 70 AS patient_age, 'WHITE' AS patient_race, 'MARRIED' AS marital_status, 'URGENT' AS admission_type,
           'EMERGENCY ROOM' AS admission_location, 'Medicare' AS insurance, 'MICU' AS first_icu_careunit,
           'MICU' AS last_icu_careunit, 5.0 AS icu_length_of_stay_in_days, 'HOME' AS discharge_location
    FROM (SELECT range AS i, hash(range) % 9 = 0 AS died FROM range({stays}))"""
EVENTS = """
    SELECT icu_stay_id AS stay, icu_intime + INTERVAL (minute) MINUTE AS event_time,
           event_time + INTERVAL 1 HOUR AS event_known_time, 'labevent' AS event_type,
           'Lab: Item ' || text % 800 || ' (Blood, Chemistry) | Value: ' || text // 800 || ' mg/dL'
               || ' | Level: within range | Flag: none | Priority: ROUTINE' AS event_text,
           7200 - minute AS relative_time_to_final_event
    FROM (SELECT *, hash(icu_stay_id, number) % {texts} AS text, hash(number, icu_stay_id) % 7200 AS minute
          FROM (SELECT *, unnest(range((50 + hash(icu_stay_id) % 401)::BIGINT)) AS number FROM stays))"""
FORMS = {
    "flat": "SELECT stays.*, events.* EXCLUDE stay FROM stays JOIN events ON stay = icu_stay_id",
    "nested": """SELECT stays.*, events FROM stays JOIN (
                          SELECT stay, list(struct_pack(event_time, event_known_time, event_type, event_text,
                                                        relative_time_to_final_event)) AS events
                          FROM events GROUP BY stay) ON stay = icu_stay_id""",
}


def write_table(path: Path, n_stays: int, form: str) -> None:
    """Write the synthetic table as Parquet; the same for the same arguments."""
    with duckdb.connect() as con:
        con.execute("CREATE TABLE stays AS " + STAYS.format(stays=n_stays))
        con.execute("CREATE VIEW events AS " + EVENTS.format(texts=25 * n_stays))
        con.execute(f"COPY ({FORMS[form]}) TO {quoted(path)} (FORMAT parquet, COMPRESSION zstd)")


def load(path: str) -> None:
    """In this process: read the table and print what it took."""
    before, started = peak_memory_gb(), time.perf_counter()
    table, report = read_stays(path)
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - started,
                "peak_gb": peak_memory_gb(),
                "before_gb": before,
                "events": len(table.text),
                "stays": len(table.stays),
                "texts": len(np.unique(table.text)),
                "dropped": sum(report.counts.values()),
            }
        )
    )


def compare_sizes(form: str, sizes: list[int]) -> None:
    """Load tables of these numbers of stays, each in a process of its own."""
    for n_stays in sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "table.parquet"
            write_table(path, n_stays, form)
            run = run_alone(__file__, "--load", path)
            if run.returncode:
                sys.exit(run.stderr)
            r, size = json.loads(run.stdout.splitlines()[-1]), path.stat().st_size / 2**20
        grown = (r["peak_gb"] - r["before_gb"]) * 2**30 / r["events"]
        print(
            f"{form:6}  {r['stays']:7,} stays  {r['events']:10,} events  {r['texts']:8,} texts  {size:6.0f} MB file  "
            f"{r['seconds']:6.1f} s  peak {r['peak_gb']:5.2f} GB ({r['before_gb']:.2f} before; {grown:5.0f} bytes "
            f"per event)  {r['dropped']:,} duplicates dropped",
            flush=True,
        )


def padding(lengths: np.ndarray, batches: list[np.ndarray]) -> float:
    """Share of the padded events that is padding."""
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    return 1 - lengths.sum() / padded


def fastest(work, times=3) -> float:
    """Seconds of the fastest of a few passes."""
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def padding_and_items(table: StayTable) -> None:
    """Padding of the batches of training and scoring, and the time of one item against a loop over its events."""
    settings, lengths = train.Settings(), table.lengths
    training, scoring = (
        train.plan_batches(lengths, settings.batch_size, settings.max_events_per_batch, seed) for seed in (0, None)
    )
    print(
        f"padding (the pooling's alone) of {len(lengths)} stays of {lengths.min()} to {lengths.max():,} events: "
        f"{padding(lengths, training):.1%} in {len(training)} batches of training, "
        f"{padding(lengths, scoring):.1%} in {len(scoring)} of scoring"
    )
    preprocessor = train.ClinicalDataPreprocessor().fit(table)
    vectors = np.zeros((len(table.texts), 768), np.float32)
    dataset = train.ClinicalSequenceDataset(table, preprocessor, vectors)
    whole = fastest(lambda: [dataset[stay] for stay in range(len(dataset))])
    rows = range(min(len(table.text), 20_000))  # what an item costs that is built event by event
    loop = fastest(lambda: [dataset.events(slice(row, row + 1)) for row in rows]) / len(rows) * len(table.text)
    print(
        f"__getitem__: {whole / len(dataset) * 1e3:.2f} ms per stay, {len(table.text) / whole:,.0f} events/s; "
        f"event by event {loop / len(dataset) * 1e3:.2f} ms per stay, {loop / whole:.0f} times"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stays", type=int, nargs="*", default=[5_000, 10_000, 20_000], help="sizes to load")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--data", help="real stays for padding and items: anything that train.py --data takes")
    parser.add_argument("--cache-dir", default="clinical_LF_precomp_emb", help="where query.sql's result is kept")
    parser.add_argument("--load", help="only load this file, in this process (what the script starts for each size)")
    options = parser.parse_args()
    if options.load:
        return load(options.load)
    for form in options.forms:
        compare_sizes(form, options.stays)
    padding_and_items(read_stays(options.data or train.SAMPLE, options.cache_dir)[0])
    print(machine())


if __name__ == "__main__":
    main()
