"""What several benchmarks share: memory, the machine's name, the synthetic stays, and one training run of train.py."""

import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate.state import AcceleratorState

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from make_sample import make_sample  # noqa: E402

import train  # noqa: E402


def machine() -> str:
    """The machine and the versions, for the last line of a benchmark."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    place = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    if torch.cuda.is_available():
        place += f", {torch.cuda.get_device_name()}"
    versions = ", ".join(f"{name} {number}" for name, number in train.versions().items())
    return (
        f"{place}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}; "
        f"Python {platform.python_version()}, {versions}"
    )


def peak_memory_gb() -> float:
    """Most resident memory this process ever had (Linux; getrusage would also count the process that started it)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def run_alone(script: str, *arguments) -> subprocess.CompletedProcess:
    """Run `script` with `arguments` in a process of its own: its peak memory is then that run's alone."""
    return subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True)


def synthetic_stays(n_stays: int, seed: int = 0) -> tuple[train.StayTable, np.ndarray]:
    """`n_stays` synthetic stays, read as a user's table would be, and each stay's true risk (n_stays,)."""
    sample = make_sample(n_stays, seed)
    with tempfile.TemporaryDirectory() as folder:
        sample.table.to_parquet(Path(folder) / "sample.parquet")
        table, _ = train.read_stays(Path(folder) / "sample.parquet")
    risks = sample.stays.set_index("icu_stay_id").true_risk
    return table, risks[table.stays.icu_stay_id].to_numpy()


def hashing_vectors(table: train.StayTable) -> np.ndarray:
    """(n_texts, 768) vectors of the hashing encoder, which needs no weights."""
    with tempfile.TemporaryDirectory() as cache:
        return train.HashingTextEncoder(Path(cache)).encode_event_text_batch(table.texts, batch_size=2048)


class TrainingRun(NamedTuple):
    probabilities: np.ndarray  # (n_test) of the test stays, by the weights with the lowest validation loss
    validation_loss: float
    epochs: int
    seconds: float


def train_and_test(table, split, vectors, settings, change=None) -> TrainingRun:
    """Train on a split as train.py does and score its test stays; `change(model, dataset)` alters the fresh model."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):  # no bars
        AcceleratorState._reset_state()  # it would keep the precision of the run before
        accelerator = train.make_accelerator(settings)
        settings = replace(settings, output_dir=folder, save_attention_every=0)
        trainer = train.Trainer(table, split, vectors, "hashing", settings, Path(folder), accelerator)
        if change:
            for model in (accelerator.unwrap_model(trainer.objective).model, trainer.model):
                change(model, trainer.train_set)
        trainer.fit()
        best = torch.load(Path(folder) / "checkpoints" / "best_model.pth", weights_only=True)["model"]
        trainer.model.load_state_dict(best)
        assert trainer.test_set is not None
        logits = trainer.predict(trainer.test_set)
        accelerator.free_memory()  # it would keep every model of the process
    loss = min(row["validation_loss"] for row in trainer.history)
    return TrainingRun(1 / (1 + np.exp(-logits)), loss, trainer.epochs_done, time.monotonic() - started)


def log_epochs() -> None:
    """Show train.py's line per epoch on stderr, for long runs."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    train.logger.setLevel(logging.INFO)


def markdown(header, rows) -> str:
    """A markdown table of a header and rows of strings."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
