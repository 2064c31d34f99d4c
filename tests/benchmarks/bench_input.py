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
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from common import machine, synthetic_stays, train

TESTS = Path(__file__).resolve().parents[1]


def fastest(work: Callable[[], object], rounds: int) -> float:
    """Return the least CPU seconds of some rounds after one to warm up; unlike clock time, others hardly move them."""
    work()
    seconds = []
    for _ in range(rounds):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return min(seconds)


def take_turns(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the least CPU seconds of each way; they take turns, so that a busy machine hits all."""
    found = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, work in ways.items():
            found[name] = min(found[name], fastest(work, 1))
    return found


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stays", type=int, default=800, help="synthetic stays")
    parser.add_argument("--rounds", type=int, default=3, help="the fastest counts")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table, _ = synthetic_stays(options.stays)
    preprocessor = train.ClinicalDataPreprocessor().fit(table)
    vectors = np.random.default_rng(0).normal(size=(len(table.texts), 768)).astype(np.float32)
    dataset = train.ClinicalSequenceDataset(table, preprocessor, vectors)
    batches = train.plan_batches(dataset.lengths, 32, 16384, seed=0)
    n_events = dataset.lengths.sum()
    print(f"{len(batches)} batches of {n_events / len(batches):,.0f} events")
    for name, size in sent_bytes(dataset, max(batches, key=lambda stays: dataset.lengths[stays].sum())).items():
        print(f"sent        {name:24s} {size:10.2f} bytes an event")

    # What is computed grows with the events, what the processor launches does not: stays of one event show it alone.
    firsts = table.take(np.arange(len(table.stays)), np.isin(np.arange(len(table.text)), table.offsets[:-1]))
    short = train.ClinicalSequenceDataset(firsts, preprocessor, vectors)
    stays = np.arange(min(32, len(firsts.stays)))
    seconds = fastest(lambda: [short.packed(stays) for _ in range(100)], options.rounds) / 100
    print(f"processor   {1e6 * seconds:.0f} microseconds a batch: {1e6 * seconds / 16384:.4f} an event of 16,384")

    packed = lambda: list(map(dataset.packed, batches))
    padded = lambda: padded_batches(dataset, batches)
    for name, seconds in take_turns({"packed": packed, "padded": padded}, options.rounds).items():
        print(f"input, CPU  {name:24s} {1e6 * seconds / n_events:10.4f} microseconds an event")

    model = train.ClinicalTransformer(dataset.input_dim, dataset.static.shape[1])
    objective = train.TrainingObjective(model, train.TemporalAwareLoss(256), preprocessor)
    few = batches[:4]
    n_events = sum(dataset.lengths[stays].sum() for stays in few)
    ways = {
        "packed": lambda: step(objective, list(map(dataset.packed, few))),
        "padded": lambda: step(objective, padded_batches(dataset, few)),
    }
    for name, seconds in take_turns(ways, options.rounds).items():
        print(f"step, CPU   {name:24s} {1e6 * seconds / n_events:10.2f} microseconds an event")
    scenario = [sys.executable, str(TESTS / "test_devices.py"), "packed_input"]
    done = subprocess.run(scenario, capture_output=True, text=True, cwd=TESTS.parent)
    lines = [line for line in done.stdout.splitlines() if " waits, " in line]
    print("\n".join(f"waits       {line}" for line in lines) or "waits       not measured: no pretended device")
    print(machine())


if __name__ == "__main__":
    main()
