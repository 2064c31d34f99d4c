"""The way of events into the model: packed where the texts' vectors live, against padded by collate_stays.

    python tests/benchmarks/bench_input.py
    python tests/benchmarks/bench_input.py --stays 100 --rounds 1        # half a minute, to see it work

Bytes that a batch sends to the device; microseconds that the processor spends on a batch whose vectors live on the
device (as long for a batch of any size, hence measured on stays of one event); both paths on the CPU, input alone and
with the model's step; waits for the device, on the pretended one where it lies beside the checkout.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import machine, synthetic_stays, train

TESTS = Path(__file__).resolve().parents[1]


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds of some work; unlike clock time, others on the machine hardly move them."""
    started = time.process_time()
    work()
    return time.process_time() - started


def compare(title: str, packed: Callable[[], object], padded: Callable[[], object], n_events: int, rounds: int) -> None:
    """Print both ways' fastest round, and their ratio within a round, whose order turns so that neither gains by it."""
    packed(), padded()  # to warm up
    rows = []
    for number in range(rounds):
        turn = (packed, padded)[:: 1 if number % 2 else -1]
        seconds = {work: cpu_seconds(work) for work in turn}
        rows.append((seconds[packed], seconds[padded]))
    found = np.array(rows)  # (rounds, 2)
    fastest = 1e6 * found.min(0) / n_events
    ratio = found[:, 0] / found[:, 1]
    low, middle, high = np.quantile(ratio, [0.25, 0.5, 0.75])
    print(f"{title}  packed {fastest[0]:.2f}, padded {fastest[1]:.2f} microseconds an event in the fastest round")
    spread = f"quartiles {low:.3f} and {high:.3f}, all {rounds} rounds {ratio.min():.3f} to {ratio.max():.3f}"
    print(f"{title}  packed / padded: median {middle:.3f}, {spread}")


def padded_batches(dataset: train.ClinicalSequenceDataset, batches: list[np.ndarray]) -> list[dict]:
    """Return all batches as a DataLoader with `collate_stays` makes them."""
    return [train.collate_stays([dataset[stay] for stay in stays]) for stays in batches]


def step(objective: train.TrainingObjective, batches: list) -> None:
    """One forward and backward pass of each batch."""
    for batch in batches:
        objective(batch, 773).mean().backward()
    objective.zero_grad()


def sent_bytes(dataset: train.ClinicalSequenceDataset, stays: np.ndarray) -> dict[str, float]:
    """Return the bytes an event that a batch sends: stays' numbers and lengths, gathered events, padded ones."""
    n_events = dataset.lengths[stays].sum()
    padded = padded_batches(dataset, [stays])[0]
    return {
        "vectors on the device": 2 * stays.astype(np.int64).nbytes / n_events,
        "vectors on the host": dataset.packed(stays).events.nbytes / n_events,
        "padded": padded["sequences"].nbytes / n_events,
    }


def processor_seconds(dataset: train.ClinicalSequenceDataset, stays: np.ndarray, rounds: int) -> float:
    """Return what a batch takes the processor whose vectors are on the device: launches, as many for any size.

    What is computed grows with the events; stays of one event each show the launches alone.
    """
    table = dataset.table
    is_first = np.isin(np.arange(len(table.text)), table.offsets[:-1])
    firsts = table.take(np.arange(len(table.stays)), is_first)
    preprocessor = train.ClinicalDataPreprocessor().fit(table)
    short = train.ClinicalSequenceDataset(firsts, preprocessor, dataset.text_vectors)
    return min(cpu_seconds(lambda: [short.packed(stays) for _ in range(100)]) for _ in range(rounds + 1)) / 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stays", type=int, default=800, help="synthetic stays")
    parser.add_argument("--rounds", type=int, default=15, help="of both paths")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table, _ = synthetic_stays(options.stays)
    preprocessor = train.ClinicalDataPreprocessor().fit(table)
    vectors = np.random.default_rng(0).normal(size=(len(table.texts), 768)).astype(np.float32)
    dataset = train.ClinicalSequenceDataset(table, preprocessor, vectors)
    batches = train.plan_batches(dataset.lengths, 32, 16384)  # of similar length: the padded path at its best
    n_events = int(dataset.lengths.sum())
    per_batch = n_events / len(batches)
    print(f"{len(batches)} batches of {per_batch:,.0f} events")
    for name, size in sent_bytes(dataset, max(batches, key=lambda stays: dataset.lengths[stays].sum())).items():
        print(f"sent        {name:24s} {size:10.2f} bytes an event")
    micros = 1e6 * processor_seconds(dataset, np.arange(32), options.rounds)
    shares = f"{micros / per_batch:.3f} an event here, {micros / 16384:.3f} of 16,384"
    print(f"processor   {micros:.0f} microseconds a batch of 32 stays: {shares}")
    packed, padded = partial(map, dataset.packed), partial(padded_batches, dataset)
    compare("input, CPU", lambda: list(packed(batches)), lambda: padded(batches), n_events, options.rounds)
    model = train.ClinicalTransformer(dataset.input_dim, dataset.static.shape[1])
    objective = train.TrainingObjective(model, train.TemporalAwareLoss(256), preprocessor)
    few = batches[:4]
    n_events = sum(int(dataset.lengths[stays].sum()) for stays in few)
    take = partial(step, objective)
    compare("step, CPU ", lambda: take(list(packed(few))), lambda: take(padded(few)), n_events, options.rounds)
    scenario = [sys.executable, str(TESTS / "test_devices.py"), "packed_input"]
    done = subprocess.run(scenario, capture_output=True, text=True, cwd=TESTS.parent)
    lines = [line for line in done.stdout.splitlines() if " waits, " in line]
    print("\n".join(f"waits       {line}" for line in lines) or "waits       not measured: no pretended device")
    print(machine())


if __name__ == "__main__":
    main()
