"""How long it takes to explain one stay, and in how much memory: everything that explain_clinicalLF.py does but the pictures.

    python tests/benchmarks/bench_explain.py --events 500 3000

The model has its full size and one epoch of training; the stay has the events of many synthetic ones. Each length in a
process of its own, since peak memory never falls.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from common import hashing_vectors, machine, markdown, peak_memory_gb, run_alone, synthetic_stays, train

import explain_clinicalLF as explain


def one_long_stay(table: train.StayTable, n_events: int) -> train.StayTable:
    """The first stay with the first `n_events` events of the table, in the order of their time to the end."""
    order = np.argsort(-table.minutes_to_end[:n_events], kind="stable")
    arrays = {name: getattr(table, name)[:n_events][order] for name in (
        "event_type", "text", "minutes_since_intime", "known_minutes_since_intime", "minutes_to_end")}
    return train.StayTable(table.stays.iloc[:1].reset_index(drop=True), np.array([0, n_events]), texts=table.texts, **arrays)


def steps(run: explain.Run, settings: explain.ExplainSettings) -> list[tuple[str, float]]:
    """Seconds of the single steps on the one stay of the run, and of all of them together as the program takes them."""
    model, (sequence, static), baseline = run.checkpoint.model, run.inputs(0), run.checkpoint.baseline
    rows = []
    for name, step in (
            (f"Integrated Gradients, {settings.ig_steps} steps", lambda: explain.captum_analysis(model, sequence, static, baseline=baseline, n_steps=settings.ig_steps)),
            (f"removal of {min(settings.max_removals, sequence.shape[1])} events", lambda: explain.remove_each_event(
                model, sequence, static, np.arange(min(settings.max_removals, sequence.shape[1])))),
            ("attention of every layer and head", lambda: explain.attend(model, sequence, static)),
            ("everything, as the program does it", lambda: explain.explain(run, settings))):
        started = time.monotonic()
        step()
        rows.append((name, time.monotonic() - started))
        print(f"{name}: {rows[-1][1]:.1f} s", file=sys.stderr, flush=True)
    return rows


def measure(n_events: int) -> None:
    """One length: prints its rows of the table."""
    table, _ = synthetic_stays(300)
    vectors, settings = hashing_vectors(table), train.check_settings(train.Settings(max_epochs=1, save_attention_every=0))
    accelerator = Accelerator(mixed_precision="no")
    with tempfile.TemporaryDirectory() as folder:
        train.Trainer(table, train.split_by_patient(table, 0), vectors, "hashing", settings, Path(folder), accelerator).fit()
        checkpoint = train.load_checkpoint(Path(folder) / "checkpoints" / "best_model.pth", accelerator.device)
    run = explain.make_run(checkpoint, one_long_stay(table, n_events), vectors, True, accelerator)
    before = peak_memory_gb()
    for name, seconds in steps(run, explain.ExplainSettings(stays=1)):
        print(f"{n_events}|{name}|{seconds:.1f}|{before:.2f}|{peak_memory_gb():.2f}")


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
