"""What several benchmarks share: memory, the machine's name, the synthetic stays, and one training run of train.py."""

import importlib.metadata
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate.state import AcceleratorState
from scipy.special import expit

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from make_sample import make_sample  # noqa: E402

import train  # noqa: E402
from clinical_lf import metrics  # noqa: E402
from clinical_lf.plan import make_accelerator  # noqa: E402
from clinical_lf.reading import read_stays  # noqa: E402
from clinical_lf.run_folder import PACKAGES  # noqa: E402
from clinical_lf.tables import StayTable  # noqa: E402


def machine() -> str:
    """The machine and the versions, for the last line of a benchmark."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    place = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    if torch.cuda.is_available():
        place += f", {torch.cuda.get_device_name()}"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
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


def synthetic_stays(n_stays: int, seed: int = 0) -> tuple[StayTable, np.ndarray]:
    """`n_stays` synthetic stays, read as a user's table would be, and each stay's true risk (n_stays,)."""
    sample = make_sample(n_stays, seed)
    with tempfile.TemporaryDirectory() as folder:
        sample.table.to_parquet(Path(folder) / "sample.parquet")
        table, _ = read_stays(Path(folder) / "sample.parquet")
    risks = sample.stays.set_index("icu_stay_id").true_risk
    return table, risks[table.stays.icu_stay_id].to_numpy()


def hashing_vectors(table: StayTable, item_history: bool = False) -> np.ndarray:
    """Return vectors (n_texts, 768) of the hashing encoder; with item_history of texts without their number."""
    with tempfile.TemporaryDirectory() as cache:
        settings = train.Settings(text_encoder="hashing", cache_dir=cache, item_history=item_history)
        accelerator = make_accelerator(settings.mixed_precision)
        texts = train.texts_to_encode(table.texts, settings)
        settings, encoder = train.make_text_encoder(settings, texts, accelerator)
        return train.embed_texts(encoder, texts, accelerator)


class TrainingRun(NamedTuple):
    probabilities: np.ndarray  # (n_test) of the test stays, by the weights with the lowest validation loss
    validation_loss: float
    epochs: int
    seconds: float


def train_and_test(
    data: train.TrainingData, settings: train.Settings, at_start: Callable[[train.Trainer], None] | None = None
) -> TrainingRun:
    """Train on a split as train.py does and score its test stays; `at_start` is given the trainer to change it."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):  # no bars
        AcceleratorState._reset_state()  # it would keep the precision of the run before
        settings = replace(settings, output_dir=folder, save_attention_every=0)
        trainer, _ = train.train_model(settings, data, at_start=at_start)
        assert trainer.test_set is not None
        risks = expit(trainer.predict(trainer.test_set))
        trainer.accelerator.free_memory()  # it would keep every model of the process
    loss = min(row["validation_loss"] for row in trainer.history)
    return TrainingRun(risks, loss, trainer.epochs_done, time.monotonic() - started)


class Ranking(NamedTuple):
    """AUROC and AUPRC, of some stays (2,) and of resampled patients (R, 2): the same resamples whatever the risks."""

    value: np.ndarray
    draws: np.ndarray

    def less(self, other: "Ranking") -> "Ranking":
        return Ranking(self.value - other.value, self.draws - other.draws)

    def words(self, signed: bool = False) -> list[str]:
        """Return both with their 95 % intervals."""
        sign = "+" if signed else ""
        intervals = [metrics.interval_of(draws) for draws in self.draws.T]
        return [
            f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"
            for value, (low, high) in zip(self.value, intervals, strict=True)
        ]


def ranking(died: np.ndarray, risks: np.ndarray, patients: np.ndarray, n_bootstrap: int) -> Ranking:
    """Return how well the risks (n,) rank those who died; resamples without both outcomes are skipped."""

    def of_resamples(weights: np.ndarray) -> np.ndarray:
        deaths = weights @ died
        both = (deaths > 0) & (deaths < weights.sum(1))
        return metrics.weighted_ranking(weights[both], died, risks)

    draws = metrics.bootstrap(of_resamples, patients, n_bootstrap, seed=0)
    return Ranking(metrics.weighted_ranking(np.ones((1, len(died))), died, risks)[0], draws)


def log_epochs() -> None:
    """Show train.py's line per epoch on stderr, for long runs."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    train.logger.setLevel(logging.INFO)


def markdown(header, rows) -> str:
    """A markdown table of a header and rows of strings."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
