"""Where a run computes, and what it will do and need, said before it does."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from clinical_lf import files, metrics
from clinical_lf.files import WORDS, logger
from clinical_lf.tables import Split, StayTable


def make_accelerator(precision: str = "auto", timeout: timedelta = timedelta(days=7)) -> Accelerator:
    """Return where to compute: "auto" is bf16 on GPUs that have it themselves, not by emulation, else "no"."""
    if precision == "auto":
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if has_bf16 else "no"
    # The others wait for the first process, which may run the query and encode for hours.
    handlers = [InitProcessGroupKwargs(timeout=timeout), DistributedDataParallelKwargs(broadcast_buffers=False)]
    return Accelerator(mixed_precision=precision, cpu=only_cpu(), kwargs_handlers=handlers)


def only_cpu() -> bool:
    """Return whether Accelerate must be told to take the CPU: for torchrun's processes there, and on Apple's GPUs."""
    if torch.backends.mps.is_available():
        logger.info("Device      the CPU: Apple's GPUs know no float64, which scores and explanations need")
        return True
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()


def describe_plan(table: StayTable, splits: list[Split], is_missing: np.ndarray, encoder: Any, settings: Any) -> None:
    """Log the parts' sizes, with a warning where figures will be luck, and what is to be done: is_missing (n_texts)."""
    for split in splits:
        stays = " / ".join(str(len(part)) for part in split)
        deaths = " / ".join(f"{table.labels[part].sum():.0f}" for part in split)
        logger.info(WORDS["log"]["split"].format(stays=stays, deaths=deaths))
    for name, part in splits[0]._asdict().items() if len(splits) == 1 else ():  # of folds, all are read together
        if len(part) and (words := metrics.too_few(table.labels[part])):
            logger.warning(f"Split       WARNING: {name}: {words}; {WORDS['log'][f'few_{name}']}")
    n_trainings, megabytes = max(len(splits), settings.seeds), 4e-6 * encoder.dim  # of a float32 vector
    again = f"{n_trainings} times " if n_trainings > 1 else ""
    disk, free = megabytes * is_missing.sum(), files.free_disk(Path(settings.cache_dir)) / 1e6
    sizes = {"missing": is_missing.sum(), "n": len(is_missing), "disk": disk, "free": free / 1e3}
    sizes |= {"held": megabytes * len(table.texts), "epochs": settings.max_epochs}
    logger.info(WORDS["log"]["plan"].format(**sizes, id=encoder.id, again=again))
    if disk > free:
        logger.warning("Plan        WARNING: too little disk is free. Free some, or take --cache-dir on another disk.")
    if settings.dry_run:
        logger.info("Dry run     nothing was encoded or trained")
