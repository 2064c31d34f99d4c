"""How long it takes to explain one stay, and in how much memory: all that explain_clinicalLF.py does but pictures.

    python tests/benchmarks/bench_explain.py --events 500 3000

The model has its full size and one epoch of training; the stay has the events of many synthetic ones. Each length in a
process of its own, since peak memory never falls.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from common import machine, markdown, peak_memory_gb, run_alone, train

import explain_clinicalLF as explain


def one_long_stay(table: train.StayTable, n_events: int) -> train.StayTable:
    """The first stay with the first `n_events` events of the table, in the order of their time to the end."""
    order = np.argsort(-table.minutes_to_end[:n_events], kind="stable")
    arrays = {
        name: getattr(table, name)[:n_events][order]
        for name in ("event_type", "text", "minutes_since_intime", "known_minutes_since_intime", "minutes_to_end")
    }
    return replace(table, stays=table.stays.iloc[:1].reset_index(drop=True), offsets=np.array([0, n_events]), **arrays)


def steps(run: explain.Run, settings: explain.ExplainSettings) -> Iterator[tuple[str, float]]:
    """Seconds of the single steps on the one stay of the run, and of all of them together as the program takes them."""
    model, (sequence, static), baseline = run.checkpoint.model, run.inputs(0), run.checkpoint.baseline
    removed = np.arange(min(settings.max_replacements, sequence.shape[1]))
    for name, step in (
        (
            f"Integrated Gradients, {settings.ig_steps} steps",
            lambda: explain.captum_analysis(model, sequence, static, baseline=baseline, n_steps=settings.ig_steps),
        ),
        (
            f"replacement of {len(removed)} events",
            lambda: explain.replace_each_event(model, sequence, static, baseline, removed),
        ),
        ("attention of every layer and head", lambda: explain.attend(model, sequence, static)),
        ("everything, as the program does it", lambda: explain.explain(run, settings)),
    ):
        started = time.monotonic()
        step()
        yield name, time.monotonic() - started


def measure(n_events: int) -> None:
    """One length: prints a row of the table as soon as its step is done."""
    import selfcheck  # found where `common` put tests/ on the path

    settings = explain.ExplainSettings(stays=1)
    with tempfile.TemporaryDirectory() as folder:
        size = selfcheck.Size(max(100, n_events // 4), 1, cache_dir=folder)  # twice the events needed
        trained, _ = selfcheck.train_on_sample(0, Path(folder), size)
    run = explain.make_run(
        trained.checkpoint,
        one_long_stay(trained.table, n_events),
        trained.vectors,
        True,
        explain.full_precision(),
    )
    before = peak_memory_gb()
    for name, seconds in steps(run, settings):
        print(f"{n_events}|{name}|{seconds:.1f}|{before:.2f}|{peak_memory_gb():.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, nargs="+", default=[500, 3000])
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        return measure(options.alone)
    rows = []
    for n_events in options.events:
        done = run_alone(__file__, "--alone", n_events)
        print(done.stderr, file=sys.stderr)
        rows += [line.split("|") for line in done.stdout.splitlines() if line.count("|") == 4]
    print(markdown(["events", "what", "seconds", "GB before", "GB at the peak so far"], rows))
    print("\n" + machine())


if __name__ == "__main__":
    main()
