"""How long it takes to explain one stay, and in how much memory: all that explain_clinicalLF.py does but pictures.

    python tests/benchmarks/bench_explain.py --events 500 3000
    python tests/benchmarks/bench_explain.py --events 500 --stays 100  # CPU seconds of them all

The model has its full size and one epoch of training; the stay has the events of many synthetic ones. Each length in a
process of its own, since peak memory never falls.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from common import machine, markdown, peak_memory_gb, run_alone

import explain_clinicalLF as explain
from clinical_lf.tables import EVENT_ARRAYS, StayTable


def long_stays(table: StayTable, n_stays: int, n_events: int) -> StayTable:
    """Stays of other patients of `n_events` each: the table's events round and round, by their time to the end."""
    rows = np.arange(n_stays * n_events).reshape(n_stays, n_events) % len(table.text)
    order = np.argsort(-table.minutes_to_end[rows], axis=1, kind="stable")
    events = np.take_along_axis(rows, order, axis=1).ravel()
    arrays = {name: getattr(table, name)[events] for name in EVENT_ARRAYS}
    numbers = np.arange(n_stays)
    stays = table.stays.iloc[numbers % len(table.stays)].reset_index(drop=True)
    stays = stays.assign(icu_stay_id=numbers, patient_id=numbers)
    return replace(table, stays=stays, offsets=n_events * np.arange(n_stays + 1), **arrays)


def steps(run: explain.Run, settings: explain.ExplainSettings) -> Iterator[tuple[str, float]]:
    """Seconds of the single steps on the one stay of the run, and of all of them together as the program takes them."""
    model, (sequence, static), baseline = run.checkpoint.model, run.inputs(0), run.checkpoint.baseline
    removed = np.arange(min(explain.Effort().removed, sequence.shape[1]))
    attribute = partial(explain.captum_analysis, model, sequence, static, baseline=baseline, n_steps=explain.IG_STEPS)
    ablate = partial(explain.ablation_analysis, model, sequence, static, None, baseline)
    remove_events = partial(ablate, which=removed, dataset=run.dataset)
    for name, step in (
        (f"Integrated Gradients, {explain.IG_STEPS} steps", attribute),
        (f"absence of {len(removed)} events", remove_events),
        ("attention of every layer and head", lambda: explain.attend(model, sequence, static)),
        ("everything, as the program does it", lambda: explain.explain_stays(run, settings)),
    ):
        started = time.monotonic()
        step()
        yield name, time.monotonic() - started


def whole(run: explain.Run) -> Iterator[tuple[str, float]]:
    """CPU seconds of explaining all stays of the run as the program does it, tables of stays written, no pictures."""
    started = time.process_time()
    explain.explain_stays(run, explain.ExplainSettings(max_stays=0))
    yield f"CPU seconds of all {len(run.table.stays)} stays", time.process_time() - started


def measure(n_events: int, n_stays: int) -> None:
    """One length: prints a row of the table as soon as its step is done."""
    import selfcheck  # found where `common` put tests/ on the path

    with tempfile.TemporaryDirectory() as folder:
        size = selfcheck.Size(max(100, n_events // 4), 1, cache_dir=folder)  # twice the events of one such stay
        trained, _ = selfcheck.train_on_sample(0, Path(folder), size, item_history=False)
    table = long_stays(trained.table, n_stays, n_events)
    run = selfcheck.run_of(trained.checkpoint, table, trained.dataset.text_vectors)
    before = peak_memory_gb()
    for name, seconds in whole(run) if n_stays > 1 else steps(run, explain.ExplainSettings(stays=1)):
        print(f"{n_events}|{name}|{seconds:.1f}|{before:.2f}|{peak_memory_gb():.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, nargs="+", default=[500, 3000])
    parser.add_argument("--stays", type=int, default=1, help="with more than one: only the time of all")
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        return measure(options.alone, options.stays)
    rows = []
    for n_events in options.events:
        done = run_alone(__file__, "--alone", n_events, "--stays", options.stays)
        print(done.stderr, file=sys.stderr)
        rows += [line.split("|") for line in done.stdout.splitlines() if line.count("|") == 4]
    print(markdown(["events", "what", "seconds", "GB before", "GB at the peak so far"], rows))
    print("\n" + machine())


if __name__ == "__main__":
    main()
