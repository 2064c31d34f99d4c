"""Predict in-hospital mortality from the event texts of an ICU stay: a frozen text encoder and a small transformer.

    python train.py                                             # the bundled synthetic sample, a few minutes on a CPU
    python train.py --data PATH/TO/mimic-iv                     # MIMIC-IV or its open demo: has hosp/ and icu/
    python train.py --data "exported/*.parquet"                 # what query.sql returned in BigQuery
    python train.py --data mimic-iv --observation-hours 24      # predict 24 h after ICU admission, from what was known
    python train.py settings.yaml --max-epochs 20               # settings from a file; options overrule it
    python train.py --evaluate trained_models/clinical_LF/checkpoints/best_model.pth --data NEW.csv
    accelerate launch --num_processes 8 train.py --data PATH/TO/mimic-iv

Every event (a drug order, a procedure, a lab result, a culture, an IV ingredient) is a short text; Clinical-Longformer
turns each distinct text into a vector once; a transformer reads the stay's events and pools them by attention.

The sections, in the order in which data flow, and what each gives to the next:

    Settings         Settings: every number that a person may want to change, checked
    Reading          StayTable: the stays, and their events in flat arrays; a Split of the stays by patient
    Preprocessing    ClinicalDataPreprocessor: encoders of types, times and static columns, fitted on training stays
    Text embedding   (n_texts, E): one vector for each distinct text, computed once and kept on disk
    Dataset          batches of stays: sequences, static features, labels, and which positions are events
    Model            ClinicalTransformer: (B, 1) probability of death, and on request the attention of that very pass
    Loss             TrainingObjective: the loss of each stay of a batch
    Checkpoints      files that are whole or not there; Checkpoint: a model with all that applying it needs
    Training         Trainer: epochs until the validation loss rests; best_model.pth
    Evaluation       figures of held-out stays with intervals, subgroups, calibration, leakage audit
    Plots            matplotlib figures of these
    Main             the phases of a run, one after the other, and the files that they leave

Axes: B stays in a batch, L events of a stay, N events of a whole batch without padding, E text dimension, D model
dimension, S static dimension, H heads. Times carry their unit in the name. Masks are True at real events.

Research software: not a medical device, not for clinical use.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import glob
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import math
import operator
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from itertools import chain, cycle, groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, cast, get_args, get_origin, get_type_hints

import duckdb
import numpy as np
import pandas as pd
import psutil
import sqlglot
import torch
import transformers
import yaml
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    gather_object,
    send_to_device,
)
from duckdb import DuckDBPyConnection
from filelock import FileLock, Timeout
from jinja2 import Environment, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar
from scipy.special import expit
from scipy.special import logit as log_odds
from scipy.stats import binomtest
from sklearn.feature_extraction import FeatureHasher
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import precision_recall_curve, roc_auc_score, roc_curve
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict, train_test_split
from sklearn.preprocessing import OneHotEncoder, StandardScaler, TargetEncoder
from sklearn.tree import DecisionTreeRegressor
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import HfArgumentParser

logger = logging.getLogger("clinical_LF")

HERE = Path(__file__).resolve().parent
SAMPLE = HERE / "sample_train.csv"
EVENT_TYPES = ("prescription", "procedure_event", "labevent", "microbiology", "ingredient")
CLINICAL_LONGFORMER = "yikuan8/Clinical-Longformer"
CHECKPOINT_FORMAT = 3
SECONDS_BETWEEN_LINES = 30  # of progress, in a log


class InputError(ValueError):
    """Something that the person who runs the program can mend: says what is wrong, where, and how to mend it."""


class Progress(tqdm):
    """A bar where somebody watches, a terminal or a notebook; in a log a line every 30 s with the time left."""

    def __init__(self, *arguments: Any, active: bool = True, **options: Any) -> None:
        self.is_watched = sys.stderr.isatty() or "ipykernel" in sys.modules
        self.last_shown = time.monotonic()
        if not self.is_watched:
            line = "{desc:12s}{percentage:3.0f} %, {n_fmt} of {total_fmt}{unit}, {remaining} left{postfix}"
            options |= {"file": io.StringIO(), "bar_format": line}
        super().__init__(*arguments, disable=not active, leave=False, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Show how far it is; an empty message wipes the bar."""
        if self.is_watched:
            super().display(msg, pos)
        elif msg is None and time.monotonic() - self.last_shown > SECONDS_BETWEEN_LINES:
            self.last_shown = time.monotonic()
            logger.info(str(self))


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------


def option(default: Any, help_text: str, **limits: Any) -> Any:
    """A settings field with its one-sentence help and its limits: low, high (allowed), above, below (not allowed)."""
    metadata = {"help": help_text.replace("%", "%%"), "limits": limits}  # a lone percent sign is argparse's
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """Every number a person may want to change. The checkpoint carries it."""

    data: str = option(
        "",
        "MIMIC-IV or MEDS folder, nested Parquet (or a glob), or a flat CSV/Parquet file; "
        "default: the bundled sample, with --evaluate the data that the model was trained on.",
    )
    output_dir: str = option("trained_models/clinical_LF", "Folder for checkpoints, plots, metrics and predictions.")
    cache_dir: str = option("clinical_LF_precomp_emb", "Folder for the embedding cache and the query's result.")
    hf_cache: str = option("hf_cache", "Folder for downloaded encoder weights.")
    memory_limit: str = option("33%", "Memory for reading the data: a share of the machine's, or a size like 16GB.")
    threads: int = option(0, "Threads that read the data; 0 takes all cores.", low=0)

    text_encoder: str = option(CLINICAL_LONGFORMER, "Hugging Face id or local path of an encoder, or 'hashing'.")
    text_encoder_revision: str = option("main", "Branch, tag or commit of the encoder on the hub.")
    max_text_tokens: int = option(512, "Texts are cut after this many tokens.", low=1)
    text_encoder_dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "Precision of the frozen encoder.")
    item_history: bool = option(
        False,
        "More inputs per event: what its item was until then in this stay (number, extremes, mean, count, ...).",
    )
    static_features: list[str] = option([], "Static columns to use; default: all that are known at the prediction.")

    observation_hours: float = option(
        0.0,
        "Predict this many hours after ICU admission; 0 reads the whole stay.",
        low=0,
    )
    gap_hours: float = option(0.0, "Leave out stays that end within this many hours after the prediction.", low=0)
    labels: str = option(
        "",
        "With a MEDS data set: file or folder of its labels, or mortality-in-icu@24h to make them.",
    )
    history_hours: float = option(0.0, "With a MEDS data set: hours before the prediction to read; 0 reads all.", low=0)
    first_stay_only: bool = option(False, "Keep only the first ICU stay of each patient.")

    d_model: int = option(256, "Width of the transformer.", low=1)
    n_layers: int = option(4, "Transformer layers; with 0 events meet in the pooling alone.", low=0)
    n_heads: int = option(8, "Attention heads of each layer.", low=1)
    d_feedforward: int = option(512, "Width of the feed-forward part of each layer.", low=1)
    n_pooling_heads: int = option(4, "Attention heads that pool the events.", low=1)
    dropout: float = option(
        0.1,
        "Dropout everywhere but inside attention (fused kernels take none there).",
        low=0,
        below=1,
    )

    weight_averaging: float = option(
        0.98,
        "Decay per step of the running mean of the weights that is validated and kept.",
        low=0,
        below=1,
    )
    temporal_weight: float = option(
        0.0,
        "Share of the loss given to the events' own predictions; 0 is plain BCE.",
        low=0,
        high=1,
    )
    sparsity_weight: float = option(
        0.0,
        "Weight of the penalty on how evenly events speak to the pooling; 0 is none.",
        low=0,
    )
    tau_hours: float = option(24.0, "An event that lies tau hours earlier weighs 1/e in the temporal loss.", above=0)
    learning_rate: float = option(1e-3, "Peak learning rate of AdamW.", above=0)
    weight_decay: float = option(0.1, "Weight decay of AdamW.", low=0)
    warmup_steps: int = option(50, "Steps over which the learning rate rises to its peak.", low=0)
    gradient_clip: float = option(1.0, "Largest norm of the gradient.", above=0)
    max_epochs: int = option(10, "Epochs at most; the learning rate falls to 0 over them.", low=1)
    patience: int = option(8, "Stop after this many epochs without a better validation loss.", low=1)
    batch_size: int = option(
        32,
        "Stays per step at most, of all processes together: a step is the same however many share it, so the learning "
        "rate is not scaled with them. With many GPUs raise it, and the rate by the square root of the factor.",
        low=1,
    )
    max_events_per_batch: int = option(
        16384,
        "Events per step and process at most (a longer stay is alone): bounds a GPU's memory.",
        low=1,
    )
    vectors_on: Literal["auto", "device", "host"] = option(
        "auto",
        "Where the texts' vectors live: auto is the GPU if they take less than half of its free memory.",
    )
    mixed_precision: Literal["auto", "no", "bf16"] = option("auto", "auto is bf16 on CUDA devices that have it.")
    seed: int = option(0, "Seed of the split, the weights, the order of batches and the bootstrap.", low=0, below=2**31)
    n_bootstrap: int = option(1000, "Bootstrap samples of patients behind every 95 % interval.", low=0)
    save_attention_every: int = option(50, "Save the attention of every so many batches; 0 saves none.", low=0)

    test_data: str = option("", "Test on the stays of this data set; --data is then split 80/20 to train and validate.")
    no_test: bool = option(
        False,
        "Keep no test stays: split 80/20 to train and validate. For a model that is tested elsewhere.",
    )
    split: str = option(
        "",
        "CSV file of patient_id and part (train, validation, test), as each run writes its split.csv.",
    )
    seeds: int = option(
        1,
        "Train this many times on one split, with seeds from --seed on, and report the spread.",
        low=1,
    )

    resume: bool = option(False, "Go on from latest_checkpoint.pth in the output folder.")
    evaluate: str = option("", "Checkpoint with which to score --data, without training.")
    include_seen: bool = option(
        False,
        "With --evaluate: judge also by patients that the model was trained or tuned on.",
    )
    trajectory: str = option("", "With --evaluate: hours after admission at which to score each stay, e.g. 6,12,24,48.")
    temperature_scaling: bool = option(False, "Calibrate by one temperature fitted on the validation split.")
    cross_validate: int = option(0, "Repeat training over this many patient-level folds and report the spread.", low=0)
    report_to: Literal["none", "tensorboard", "wandb"] = option(
        "none",
        "Also send each epoch's figures to this tracker.",
    )
    dry_run: bool = option(False, "Read the data, say what the run will do, take and need, and stop.")
    audit: bool = option(False, "Only run the leakage audit: write leakage_audit.csv and stop.")

    @property
    def prospective(self) -> bool:
        """Whether the end of what is read is a moment of prediction, not the end of the stay."""
        return self.observation_hours > 0 or bool(self.labels)

    @property
    def meds_task(self) -> MedsTask | None:
        """What is predicted from a MEDS data set; None for any other table."""
        return MedsTask(self.labels, self.history_hours, self.gap_hours) if self.labels else None

    @property
    def sizes(self) -> dict[str, Any]:
        """The model's sizes and its dropout, as `ClinicalTransformer` takes them."""
        names = ("d_model", "n_layers", "n_heads", "d_feedforward", "n_pooling_heads", "dropout")
        return {name: getattr(self, name) for name in names}


# What a prospective model cannot know at the moment of prediction.
KNOWN_ONLY_LATER = ("icu_length_of_stay_in_days", "last_icu_careunit", "discharge_location")
DEFAULT_STATIC_FEATURES = (
    "patient_gender",
    "patient_age",
    "patient_race",
    "marital_status",
    "admission_type",
    "admission_location",
    "insurance",
    "first_icu_careunit",
    "icu_length_of_stay_in_days",
    "number_of_events",
)
NUMERIC_STATIC_FEATURES = ("patient_age", "icu_length_of_stay_in_days", "number_of_events")


class SettingsParser(HfArgumentParser):
    """Options from the fields of a settings class; their limits, which argparse does not know, are `check_limits`'s."""

    def add_argument(self, *names: str, limits: Any = None, **options: Any) -> argparse.Action:
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}. --help lists all options.\n")

    def read_file(self, path: Path) -> dict[str, Any]:
        """What a settings file says: names of settings and their values."""
        try:
            content = yaml.safe_load(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            self.error(f"{path}: cannot be read as a settings file ({type(error).__name__})")
        if not isinstance(content, dict):
            self.error(f"{path}: no settings file; it holds lines such as 'max_epochs: 20'")
        known = {action.dest for action in self._actions}
        unknown = [str(name) for name in content if name not in known]
        if unknown:
            self.error(f"{path}: unknown settings {', '.join(unknown)}")
        return content


def settings_from(argv: Sequence[str] | None, kind: Any, description: str | None) -> Any:
    """Settings of a command line (default: the program's own); a first argument *.yaml holds some, options overrule it.

    Ends the program with code 2, as argparse does, where the line makes no sense.
    """
    parser = SettingsParser(
        kind,
        usage="%(prog)s [settings.yaml] [options]",
        description=str(description).split("\n\n")[0],
        epilog="A first argument *.yaml names a file of settings, such as a run's settings.yaml; options overrule it.",
        allow_abbrev=False,
    )
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0].endswith((".yaml", ".yml")):
        parser.set_defaults(**parser.read_file(Path(words.pop(0))))
    settings, unknown = parser.parse_args_into_dataclasses(
        args=words,
        return_remaining_strings=True,
        look_for_args_file=False,
    )
    if unknown:
        parser.error(f"unknown option {' '.join(unknown)}")
    return settings


LIMITS = {
    "low": ("at least", operator.ge),
    "high": ("at most", operator.le),
    "above": ("above", operator.gt),
    "below": ("below", operator.lt),
}


def check_limits(settings: Any) -> None:
    """Refuse a value of another type, outside its field's limits or not among its choices (`InputError`)."""
    kinds = get_type_hints(type(settings))
    for entry in fields(settings):
        value, kind, limits = getattr(settings, entry.name), kinds[entry.name], entry.metadata["limits"]
        wanted = " and ".join(f"{LIMITS[side][0]} {limit:g}" for side, limit in limits.items())
        if get_origin(kind) is Literal:
            is_sound, wanted = value in get_args(kind), f"one of {', '.join(get_args(kind))}"
        elif kind in (int, float):
            is_number = isinstance(value, (int, kind)) and not isinstance(value, bool) and math.isfinite(value)
            is_sound = is_number and all(LIMITS[side][1](value, limit) for side, limit in limits.items())
        else:
            is_sound = isinstance(value, get_origin(kind) or kind)
        if not is_sound:
            wanted = wanted or f"of type {kind.__name__}"
            raise InputError(f"{flag(entry.name)} {value}: out of range; it must be {wanted}.")


def flag(name: str) -> str:
    """The option of a setting: `d_model` is `--d-model`."""
    return f"--{name.replace('_', '-')}"


def check_settings(settings: Settings) -> Settings:
    """Fill in the static features of the mode and refuse settings that contradict each other (`InputError`)."""
    check_limits(settings)
    hidden = KNOWN_ONLY_LATER if settings.prospective else ()
    chosen = settings.static_features or [name for name in DEFAULT_STATIC_FEATURES if name not in hidden]
    unknown = [name for name in chosen if name not in STATIC_COLUMNS]
    late = [name for name in chosen if name in hidden]
    divisors = (settings.n_heads, settings.n_pooling_heads, 2)
    modes = [name for name in ("evaluate", "audit", "cross_validate") if getattr(settings, name)]
    modes += ["seeds"] if settings.seeds > 1 else []
    modes += ["resume"] if settings.resume and {"evaluate", "audit"} & set(modes) else []
    splitting = [name for name in ("evaluate", "cross_validate", "test_data", "no_test") if getattr(settings, name)]
    splitting += ["split"] if settings.split and {"evaluate", "cross_validate"} & set(splitting) else []
    rules = (
        (
            unknown,
            f"--static-features {' '.join(unknown)}: no such column. Choose from {', '.join(STATIC_COLUMNS)}.",
        ),
        (
            late,
            f"--static-features {' '.join(late)}: known only after the prediction. "
            "Leave these columns out, or drop --observation-hours.",
        ),
        (
            any(settings.d_model % divisor for divisor in divisors),
            f"--d-model {settings.d_model}: out of range; it must be a multiple of --n-heads, --n-pooling-heads and 2.",
        ),
        (settings.cross_validate == 1, "--cross-validate 1: out of range; it takes at least 2 folds."),
        (
            settings.gap_hours and not settings.prospective,
            "--gap-hours needs --observation-hours: there is no gap where the whole stay is read.",
        ),
        (
            settings.labels and settings.observation_hours,
            "--observation-hours and --labels: a MEDS label has its own time of prediction. Give one of the two.",
        ),
        (
            settings.history_hours and not settings.labels,
            "--history-hours needs a MEDS data set and its --labels.",
        ),
        (settings.trajectory and not settings.evaluate, "--trajectory needs --evaluate CHECKPOINT."),
        (len(modes) > 1, f"{', '.join(map(flag, modes))}: these do not go together. Run one after the other."),
        (
            len(splitting) > 1,
            f"{', '.join(map(flag, splitting))}: each says which stays test the model. Give one of them.",
        ),
    )
    for broken, message in rules:
        if broken:
            raise InputError(message)
    trajectory_hours(settings.trajectory)
    data = settings.data or ("" if settings.evaluate else SAMPLE.name)
    return replace(settings, data=data, static_features=list(chosen))


def trajectory_hours(text: str) -> list[float]:
    """The hours of --trajectory, ascending. Raises `InputError`."""
    try:
        hours = sorted({float(part) for part in text.split(",")} if text else ())
    except ValueError:
        hours = [math.nan]
    if not all(0 < hour < math.inf for hour in hours):
        raise InputError(f"--trajectory {text}: give hours above 0, such as 6,12,24,48.")
    return hours


# ---------------------------------------------------------------------------------------------------------------------
# Files: whole or not there, one writer at a time
# ---------------------------------------------------------------------------------------------------------------------

HALF_WRITTEN = "-half-written-"  # in temporary names: the next to hold the folder removes what a killed run left
CHOOSE_ANOTHER_FOLDER = "choose another folder (--output-dir, --cache-dir)"


def write_whole(path: Path, write: Callable[[Path], Any]) -> Path:
    """Write a file, or a folder of files, through a temporary name, which `write` gets: nobody meets half of it."""
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}{HALF_WRITTEN}{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        for written in temporary.iterdir() if temporary.is_dir() else [temporary]:
            with open(written, "rb+") as file:
                os.fsync(file.fileno())  # else a power cut may leave the name without the content
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise InputError(f"{path}: cannot be written ({reason}). Free space, or {CHOOSE_ANOTHER_FOLDER}.") from None
    finally:
        remove(temporary)
    return path


def write_json(path: Path, content: Any) -> Path:
    """Write plain data, indented; what JSON has no word for as its text."""
    text = json.dumps(content, indent=2, default=str, allow_nan=False) + "\n"
    return write_whole(path, lambda name: name.write_text(text, "utf-8"))


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises OSError or ValueError where there is none."""
    return json.loads(path.read_text("utf-8"))


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there and ours to remove."""
    with contextlib.suppress(OSError):  # as where its own folder is a file
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextlib.contextmanager
def hold(folder: Path, wait: bool = True) -> Iterator[None]:
    """Hold a folder against other runs, and remove what killed ones left half-written in it.

    Raises InputError where the folder cannot be written or, unless `wait`, where another run holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}): {CHOOSE_ANOTHER_FOLDER}.") from None
    lock = FileLock(folder / ".lock", timeout=-1 if wait else 0)  # falls with the process that has it
    try:
        lock.acquire()
    except Timeout:
        raise InputError(f"{folder}: another run writes here. Wait for it, or {CHOOSE_ANOTHER_FOLDER}.") from None
    except OSError:  # some network disks cannot lock: then nothing is removed
        logger.debug(f"{folder}: this disk has no locks")
    else:
        for left in folder.rglob(f".*{HALF_WRITTEN}*"):
            if left.parent == folder or not (left.parent / ".lock").exists():  # else that folder's own holder does it
                remove(left)
    try:
        yield
    finally:
        lock.release()


# ---------------------------------------------------------------------------------------------------------------------
# Reading MIMIC-IV: query.sql, run locally by DuckDB
# ---------------------------------------------------------------------------------------------------------------------

QUERY_FILE = HERE / "query.sql"
ACCOUNT = "_source_tables.json"  # beside the result: where the rows of the tables went; no reader of Parquet minds it
ROWS_PER_SLICE = 2_000_000  # event rows of the tables behind one slice of patients: what has to fit in memory at once

# The tables and columns that query.sql reads, with their types. Types are stated, never sniffed: a column that looks
# like numbers or is empty in the rows sniffed (labevents.value, location) would change its type, and so its text.
MIMIC_TABLES = {
    "icu/icustays": "subject_id BIGINT, hadm_id BIGINT, stay_id BIGINT, intime TIMESTAMP, outtime TIMESTAMP, "
    "first_careunit VARCHAR, last_careunit VARCHAR",
    "hosp/patients": "subject_id BIGINT, gender VARCHAR, anchor_age BIGINT, anchor_year BIGINT",
    "hosp/admissions": "hadm_id BIGINT, deathtime TIMESTAMP, admission_type VARCHAR, admission_location VARCHAR, "
    "discharge_location VARCHAR, insurance VARCHAR, marital_status VARCHAR, race VARCHAR, "
    "hospital_expire_flag BIGINT",
    "hosp/d_labitems": "itemid BIGINT, label VARCHAR, fluid VARCHAR, category VARCHAR",
    "icu/d_items": "itemid BIGINT, label VARCHAR, category VARCHAR",
    "hosp/prescriptions": "hadm_id BIGINT, starttime TIMESTAMP, drug VARCHAR, prod_strength VARCHAR, "
    "dose_val_rx VARCHAR, dose_unit_rx VARCHAR, form_unit_disp VARCHAR, route VARCHAR",
    "icu/procedureevents": "stay_id BIGINT, starttime TIMESTAMP, endtime TIMESTAMP, itemid BIGINT, value DOUBLE, "
    "valueuom VARCHAR, location VARCHAR, statusdescription VARCHAR",
    "hosp/labevents": "subject_id BIGINT, hadm_id BIGINT, itemid BIGINT, charttime TIMESTAMP, storetime TIMESTAMP, "
    "value VARCHAR, valuenum DOUBLE, valueuom VARCHAR, ref_range_lower DOUBLE, ref_range_upper DOUBLE, "
    "flag VARCHAR, comments VARCHAR",
    "hosp/microbiologyevents": "subject_id BIGINT, hadm_id BIGINT, chartdate TIMESTAMP, charttime TIMESTAMP, "
    "storedate TIMESTAMP, storetime TIMESTAMP, spec_type_desc VARCHAR, test_name VARCHAR, org_name VARCHAR, "
    "ab_name VARCHAR, interpretation VARCHAR, comments VARCHAR",
    "icu/ingredientevents": "stay_id BIGINT, starttime TIMESTAMP, endtime TIMESTAMP, itemid BIGINT, amount DOUBLE, "
    "amountuom VARCHAR, rate DOUBLE, rateuom VARCHAR, statusdescription VARCHAR",
}
MIMIC_KEYS = {  # a key that stood twice would double whatever is joined to it
    "icu/icustays": "stay_id",
    "hosp/patients": "subject_id",
    "hosp/admissions": "hadm_id",
    "hosp/d_labitems": "itemid",
    "icu/d_items": "itemid",
}


class EventTable(NamedTuple):
    """An event table of MIMIC-IV: of which event type its rows are, when they happen, and why one of them is no event.

    The first fault that holds counts; query.sql leaves out the same rows. What has no fault and is no event lies
    outside the ICU stays of its patient.
    """

    event_type: str
    time: str
    faults: dict[str, str]


NO_START = {"without a start": "starttime IS NULL"}
EVENT_TABLES = {
    "hosp/prescriptions": EventTable("prescription", "starttime", NO_START),
    "icu/procedureevents": EventTable(
        "procedure_event",
        "starttime",
        NO_START
        | {
            "rewritten, never done": "trim(statusdescription) = 'Rewritten'",
            "of a negative duration": "value < 0 OR endtime < starttime",
        },
    ),
    "hosp/labevents": EventTable("labevent", "charttime", {"without a time": "charttime IS NULL"}),
    "hosp/microbiologyevents": EventTable(
        "microbiology",
        "coalesce(charttime, chartdate)",
        {"without a day": "charttime IS NULL AND chartdate IS NULL"},
    ),
    "icu/ingredientevents": EventTable(
        "ingredient",
        "starttime",
        NO_START
        | {
            "rewritten, never given": "trim(statusdescription) = 'Rewritten'",
            "of a negative amount or duration": "amount < 0 OR rate < 0 OR endtime < starttime",
        },
    ),
}

# How programs write a missing value. In capitals NONE is a finding: no bacteria in the urine.
MISSING = ("", "nan", "NaN", "inf", "-inf", "None", "NULL")

# One CSV file, every column as text; nothing about its form is guessed. A buffer of one longest line: DuckDB's own, of
# sixteen, costs a quarter more CPU time.
CSV_ROWS = """
    read_csv({path}, all_varchar = true, header = true, delim = ',', quote = '"', escape = '"', comment = '',
             max_line_size = 16000000, buffer_size = 16000000, nullstr = {missing})
"""


def find_mimic_files(folder: Path) -> dict[str, Path]:
    """Return the file of every table that query.sql reads; InputError names what is missing or double."""
    found, missing = {}, []
    for table in MIMIC_TABLES:
        paths = [path for path in (folder / f"{table}.csv", folder / f"{table}.csv.gz") if path.is_file()]
        if len(paths) == 2:
            raise InputError(f"{paths[0]} and {paths[1]} are the same table. Remove the one that is not to be read.")
        if paths:
            found[table] = paths[0]
        else:
            missing.append(f"{table}.csv[.gz]")
    if missing:
        raise InputError(
            f"{folder} is no complete MIMIC-IV folder: {', '.join(missing)} not found. Give the "
            "folder that holds hosp/ and icu/, as downloaded from PhysioNet."
        )
    return found


def sql_quoted(text: str | Path) -> str:
    """Return `text` as an SQL string literal."""
    return "'" + str(text).replace("'", "''") + "'"


def csv_rows(path: Path, missing: Sequence[str] = ("",)) -> str:
    """Return the SQL that reads a CSV file as text; a value in `missing` is NULL."""
    return CSV_ROWS.format(path=sql_quoted(path), missing=list(missing))


def reason_without_rows(error: Exception) -> str:
    """Return what went wrong, without the row it went wrong in: rows hold patient data."""
    text = str(error)
    reason = re.split(r"[\n:\"']", re.sub(r"^(\w+ )+Error: ", "", text))[0].strip()
    if "sniffing" in reason:
        reason = "a row with more or fewer values than the header, or a quote that never closes"
    reason = f"{type(error).__name__}: {reason}"
    if line := re.search(r"Line: ?(\d+)", text):
        reason += f" at line {line[1]}"
    known = r"Invalid unicode|Expected Number of Columns: \d+ Found: \d+|Maximum line size|unterminated quote"
    if cause := re.search(known, text):
        reason += f", {cause[0]}"
    return reason


def query_for_duckdb(text: str) -> str:
    """Return query.sql in DuckDB's dialect, its BigQuery tables replaced by local ones of the same name."""
    tree = sqlglot.parse_one(text, read="bigquery")
    for table in list(tree.find_all(sqlglot.exp.Table)):
        if table.db:  # a common table expression has no data set
            table.replace(sqlglot.exp.to_table(table.name, alias=table.alias))
    return tree.sql(dialect="duckdb")


def open_duckdb(memory_limit: str, threads: int, spill: Path, database: str | Path = ":memory:") -> DuckDBPyConnection:
    """Connect to DuckDB within the limits that all its work here has; what passes them spills into a folder.

    Raises `InputError` for a limit that is none.
    """
    con = duckdb.connect(database)
    con.execute("SET preserve_insertion_order = false")  # what needs an order states it
    con.execute("SET TimeZone = 'UTC'")
    con.execute(f"SET temp_directory = {sql_quoted(spill)}")
    if threads:
        con.execute(f"SET threads = {threads}")
    try:
        con.execute(f"SET memory_limit = {sql_quoted(memory_limit)}")
    except duckdb.Error:
        con.close()
        raise InputError(f"--memory-limit {memory_limit}: give a size like 16GB, or a share like 33%.") from None
    return con


def first_value(con: DuckDBPyConnection, statement: str, *values: Any) -> Any:
    """Return the first value of the first row that a statement gives, such as how many rows it counted or deleted."""
    return con.execute(statement, values).fetchall()[0][0]


def column_types(con: DuckDBPyConnection, relation: str) -> dict[str, str]:
    """Return the columns of a table, of a view or of what reads a file, with their types."""
    return {name: kind for name, kind, *_ in con.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall()}


def first_three(rows: Sequence[tuple]) -> str:
    """Return what the first rows of a result begin with, for a message."""
    return ", ".join(str(row[0]) for row in rows[:3])


def first_that_holds(conditions: dict[str, str]) -> str:
    """Return the SQL for the first reason whose condition holds in a row, NULL where none does."""
    cases = [f"WHEN {condition} THEN {sql_quoted(reason)}" for reason, condition in conditions.items()]
    return f"CASE {' '.join(cases)} END"


def without_zeros(counts: dict[str, int]) -> dict[str, int]:
    """Return the counts of what occurred at all."""
    return {name: count for name, count in counts.items() if count}


# Of an event table only what lies within a day of a stay is stored, by patient: a slice of patients is then read
# alone. Beside it what is no event for a reason of its own, for the account. Rows are numbered as they pass, those that
# are not stored too: counting them apart would read the file twice.
EVENT_TABLE = """
CREATE TABLE {name} AS
SELECT r.* EXCLUDE (number)
FROM (
    SELECT r.*, patient, nextval('{name}_of_cohort') AS number
    FROM (SELECT {typed} FROM (SELECT *, nextval('{name}_read') AS number FROM {rows}) WHERE number > 0) AS r
    JOIN (SELECT DISTINCT {key}, subject_id AS patient FROM icustays) AS k ON k.{key} = r.{key}
) AS r
WHERE number > 0 AND ({fault} IS NOT NULL OR EXISTS (
    FROM icustays AS i
    WHERE i.{key} = r.{key} AND {time} >= i.intime - INTERVAL 1 DAY
        AND {time} <= coalesce(i.outtime, 'infinity') + INTERVAL 1 DAY
))
ORDER BY patient
"""
OTHER_TABLE = """
CREATE TABLE {name} AS
SELECT {typed} FROM (SELECT *, nextval('{name}_read') AS number FROM {rows}) WHERE number > 0
"""


def load_mimic_table(database: DuckDBPyConnection, table: str, path: Path) -> None:
    """Copy one CSV file into `database`, typed; of event tables the rows about ICU stays. InputError if damaged."""
    name, rows = Path(table).name, csv_rows(path, MISSING)
    columns = dict(column.split() for column in MIMIC_TABLES[table].split(", "))
    typed = ", ".join(f"CAST({column} AS {kind}) AS {column}" for column, kind in columns.items())
    parts = {"name": name, "typed": typed, "rows": rows}
    statement = OTHER_TABLE
    if table in EVENT_TABLES:
        parts |= {"time": EVENT_TABLES[table].time, "fault": first_that_holds(EVENT_TABLES[table].faults)}
        parts["key"] = next(key for key in ("stay_id", "subject_id", "hadm_id") if key in columns)
        statement = EVENT_TABLE
    try:
        header = column_types(database, rows)
        if absent := [column for column in columns if column not in header]:
            raise InputError(f"{path} has no column {', '.join(absent)}: it is not the table {table} of MIMIC-IV.")
        for counted in ("read", "of_cohort"):
            database.execute(f"CREATE OR REPLACE SEQUENCE {name}_{counted}")
        database.execute(statement.format(**parts)).fetchall()
    except duckdb.ConversionException:
        raise InputError(f"{path} has values that do not fit: {unfit_values(database, columns, rows)}.") from None
    except duckdb.OutOfMemoryException:
        raise
    except duckdb.Error as error:
        raise InputError(
            f"{path} cannot be read ({reason_without_rows(error)}). Is the download complete? Compare the file "
            "with SHA256SUMS.txt of the data set and fetch it again."
        ) from None
    if table in MIMIC_KEYS:
        check_key(database, table)
    if table == "icu/icustays":
        database.execute("DELETE FROM icustays WHERE stay_id IS NULL")


def unfit_values(database: DuckDBPyConnection, columns: dict[str, str], rows: str) -> str:
    """Return the columns with values of another type, and in how many rows."""
    found = []
    for column, kind in columns.items():
        unfit = f"SELECT count(*) FROM {rows} WHERE {column} IS NOT NULL AND TRY_CAST({column} AS {kind}) IS NULL"
        if count := first_value(database, unfit):
            found.append(f"{column} ({kind}) in {count} rows")
    return ", ".join(found)


def check_key(database: DuckDBPyConnection, table: str) -> None:
    """Raise InputError if a key of a table stands twice: all that is joined to it would be doubled."""
    name, key = Path(table).name, MIMIC_KEYS[table]
    twice = database.execute(
        f"SELECT {key} FROM {name} WHERE {key} IS NOT NULL GROUP BY {key} HAVING count(*) > 1 ORDER BY {key}"
    ).fetchall()
    if twice:
        raise InputError(
            f"{table}: {len(twice)} values of {key} stand in more than one row, first {first_three(twice)}. "
            "Are two releases or two copies mixed? Each may stand once."
        )


class SourceTable(NamedTuple):
    """Where the rows of a table went: read = of other patients + in_stays + lost; what is not known is None."""

    table: str
    read: int
    # Of the ICU stays' patients (orders: admissions; procedures, ingredients: the stays themselves).
    of_cohort: int | None
    in_stays: int | None
    lost: dict[str, int]
    noted: dict[str, int] = {}  # rows of the cohort with something to know, kept or not


LOST_STAYS = """
    SELECT CASE WHEN icu.hadm_id IS NULL THEN 'without hadm_id'
                WHEN adm.hadm_id IS NULL THEN 'whose hadm_id is not in hosp/admissions'
                WHEN pat.subject_id IS NULL THEN 'whose subject_id is not in hosp/patients'
           END AS reason, count(*)
    FROM icustays AS icu
    LEFT JOIN admissions AS adm ON adm.hadm_id = icu.hadm_id
    LEFT JOIN patients AS pat ON pat.subject_id = icu.subject_id
    GROUP BY reason ORDER BY reason
"""
DAYS_ONLY = "SELECT count(*) FROM microbiologyevents WHERE charttime IS NULL AND chartdate IS NOT NULL"
LAST_NUMBER = "SELECT coalesce(max(last_value), 0) FROM duckdb_sequences() WHERE sequence_name = ?"


def account_for_rows(database: DuckDBPyConnection) -> list[SourceTable]:
    """Count the rows of every table: read, of the cohort, lost and why. Those in stays are counted later."""
    accounts = []
    for table in MIMIC_TABLES:
        name = Path(table).name
        read = first_value(database, LAST_NUMBER, f"{name}_read")
        account = SourceTable(table, read, None, None, {})
        if table == "icu/icustays":
            lost = dict(database.execute(LOST_STAYS).fetchall())
            in_stays = lost.pop(None, 0)
            lost["without stay_id"] = read - in_stays - sum(lost.values())
            account = SourceTable(table, read, read, in_stays, without_zeros(lost))
        elif table in EVENT_TABLES:
            fault = first_that_holds(EVENT_TABLES[table].faults)
            faults = f"SELECT {fault} AS fault, count(*) FROM {name} GROUP BY fault ORDER BY fault"
            lost = dict(database.execute(faults).fetchall())
            lost.pop(None, 0)
            of_cohort = first_value(database, LAST_NUMBER, f"{name}_of_cohort")
            account = SourceTable(table, read, of_cohort, None, lost)
        if table == "hosp/microbiologyevents":
            days = first_value(database, DAYS_ONLY)
            account = account._replace(noted={"(used or not) have a day without a time: its end is taken": days})
        accounts.append(account)
    return accounts


def run_mimic_query(folder: Path, cache_dir: Path, memory_limit: str = "33%", threads: int = 0) -> Path:
    """Run query.sql on a MIMIC-IV folder; the nested table (one row per ICU stay) as a folder of Parquet files.

    It is kept in `cache_dir`/query_results and used again while query and folder are unchanged. Tables go to a DuckDB
    file on disk first, patients are then worked through in slices, each of which becomes one Parquet file. What is done
    when a run is stopped or fails for want of memory or disk is kept: the next run goes on from there.

    Raises InputError for a folder that is not MIMIC-IV or is damaged.
    """
    folder, results = Path(folder), Path(cache_dir) / "query_results"
    files, query = find_mimic_files(folder), QUERY_FILE.read_text(encoding="utf-8")
    stats = [(str(path.relative_to(folder)), *size_and_time(path)) for path in files.values()]
    made_of = (query, MIMIC_TABLES, EVENT_TABLES, EVENT_TABLE, MISSING, ROWS_PER_SLICE, stats)
    target = results / f"{md5_of(made_of)}.parquet"
    working = results / f"unfinished-{target.stem}"
    if target.exists():
        return target
    with hold(results):
        if target.exists():  # another run made it while this one waited
            return target
        for unfinished in results.glob("unfinished-*"):
            if unfinished != working:
                remove(unfinished)
        try:
            with _working_database(working, memory_limit, threads) as database:
                done = {row[0] for row in database.execute("SHOW TABLES").fetchall()}
                for table, path in Progress(files.items(), desc="reading MIMIC-IV", unit=" tables"):
                    if Path(table).name not in done:
                        load_mimic_table(database, table, path)
                accounts = [account._asdict() for account in account_for_rows(database)]
                write_json(working / target.name / ACCOUNT, accounts)
                collect_stays(database, query_for_duckdb(query), working / target.name)
        except (duckdb.OutOfMemoryException, duckdb.IOException) as error:
            raise no_room("query.sql", error, memory_limit, results) from None  # the next run goes on from here
        except InputError:  # the folder has to be mended first
            remove(working)
            raise
        os.replace(working / target.name, target)
        remove(working)
    return target


def size_and_time(path: Path) -> tuple[int, int]:
    """Return what changes with a file: its bytes and when it was written, in nanoseconds."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def md5_of(made_of: tuple) -> str:
    """Return the name under which a result is kept, by all that it is made of."""
    return hashlib.md5(repr(made_of).encode()).hexdigest()


def _working_database(working: Path, memory_limit: str, threads: int) -> DuckDBPyConnection:
    """Open the database of a run, or of a stopped one that goes on; one that was left damaged is begun anew."""
    limits = (memory_limit, threads, working / "spilled")
    working.mkdir(exist_ok=True)
    try:
        return open_duckdb(*limits, working / "mimic.duckdb")
    except (duckdb.SerializationException, duckdb.FatalException):
        remove(working)
        working.mkdir()
        return open_duckdb(*limits, working / "mimic.duckdb")


def no_room(what: str, error: Exception, memory_limit: str, folder: Path) -> InputError:
    """Return the error that says that memory or disk ran out, which no file is to blame for."""
    return InputError(
        f"{what} stopped ({type(error).__name__}) with --memory-limit {memory_limit} and {free_disk(folder) / 1e9:.0f} "
        f"GB left on the disk of {folder}: it needs more of the one or the other. Nothing is wrong with the data."
    )


def free_disk(folder: Path) -> int:
    """Return how many bytes are free where a folder is, or will be."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free


def collect_stays(database: DuckDBPyConnection, query: str, result: Path) -> None:
    """Run the query for one slice of the patients after the other; each becomes a Parquet file in `result`."""
    patients = database.execute(
        "SELECT DISTINCT subject_id FROM mimic.icustays WHERE subject_id IS NOT NULL ORDER BY 1"
    ).fetchall()
    if not patients:
        raise InputError("icu/icustays has no rows: nothing to learn from.")
    names = [Path(table).name for table in EVENT_TABLES]
    count = " + ".join(f"(SELECT count(*) FROM mimic.{name})" for name in names)
    n_slices = min(len(patients), 1 + first_value(database, f"SELECT {count}") // ROWS_PER_SLICE)
    for number, part in enumerate(Progress(np.array_split(patients, n_slices), desc="building events", unit=" slices")):
        path = result / f"part_{number:04d}.parquet"
        if path.exists():
            continue
        for name, patient in [("icustays", "subject_id"), *((name, "patient") for name in names)]:
            database.execute(
                f"CREATE OR REPLACE TEMP VIEW {name} AS SELECT * FROM mimic.{name} "
                f"WHERE {patient} BETWEEN {part[0, 0]} AND {part[-1, 0]}"
            )
        rows = f"SELECT * FROM ({query}) ORDER BY patient_id, icu_stay_id"
        options = "FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 2048"
        write_whole(path, lambda name: database.execute(f"COPY ({rows}) TO {sql_quoted(name)} ({options})").fetchall())


# ---------------------------------------------------------------------------------------------------------------------
# Reading MEDS: any hospital's data in the Medical Event Data Standard (MEDS), with a file of labels
# ---------------------------------------------------------------------------------------------------------------------

# The columns that say something; a data set without one of them has it empty.
MEDS_ROWS = """
CREATE TEMP VIEW meds_rows AS
SELECT subject_id, time, code, numeric_value::DOUBLE AS number, text_value, unit, route, statusdescription,
       race, insurance, marital_status
FROM (
    SELECT * FROM read_parquet({data}, union_by_name = true, hive_partitioning = false)
    UNION ALL BY NAME
    SELECT NULL::FLOAT AS numeric_value, NULL::VARCHAR AS text_value, NULL::VARCHAR AS unit, NULL::VARCHAR AS route,
           NULL::VARCHAR AS statusdescription, NULL::VARCHAR AS race, NULL::VARCHAR AS insurance,
           NULL::VARCHAR AS marital_status
    WHERE false
)
"""

# What a code says, once per code. Its first part is the kind; the last of three or more is the unit where the code has
# numbers ("LAB//50971//mEq/L"); a START, STOP or END in second place is a status; the rest are words.
MEDS_CODES = r"""
CREATE TEMP TABLE meds_codes AS
WITH used AS (
    SELECT code, string_split(code, '//') AS parts, count(number) > 0 AS has_numbers
    FROM meds_rows WHERE time IS NOT NULL GROUP BY code
),
described AS (
    SELECT code, any_value(nullif(trim(regexp_replace(description, '\s+', ' ', 'g')), '')) AS description
    FROM read_parquet({codes}) GROUP BY code
),
named AS (
    SELECT code, parts[1] AS kind, description,
           CASE WHEN has_numbers AND len(parts) > 2 AND NOT regexp_full_match(parts[-1], '\d*|UNK')
                THEN parts[-1] END AS code_unit,
           CASE WHEN parts[2] IN ('START', 'STOP', 'END') THEN lower(parts[2]) END AS code_status,
           list_filter(parts[2:], lambda part: part NOT IN ('START', 'STOP', 'END', 'UNK', '')) AS words
    FROM used LEFT JOIN described USING (code)
)
SELECT code, kind, code_unit, code_status, event_type, coalesce(number_word, 'Value') AS number_word,
       CASE event_type WHEN 'ingredient' THEN 2 ELSE 3 END AS digits,
       concat_ws(': ', coalesce(text_word, replace(kind, '_', ' ')), coalesce(description, nullif(
           array_to_string(list_filter(words, lambda word: word IS DISTINCT FROM code_unit), ' '), ''))) AS item
FROM named LEFT JOIN (VALUES
    ('LAB', 'labevent', 'Lab', 'Value'),
    ('MEDICATION', 'prescription', 'Prescription', 'Dose'),
    ('INFUSION_START', 'ingredient', 'Ingredient', 'Rate'),
    ('INFUSION_END', 'ingredient', 'Ingredient', 'Amount'),
    ('PROCEDURE', 'procedure_event', 'Procedure', 'Value'),
    ('MICROBIOLOGY', 'microbiology', 'Microbiology', 'Value')
) AS kinds(kind, event_type, text_word, number_word) USING (kind)
"""

# `--labels mortality-in-icu@24h`: one label per ICU stay that lasts until the prediction and the gap after it. A code
# of discharge says DIED or EXPIRED; a death before the discharge is one too.
MADE_LABELS = re.compile(r"mortality-in-icu@(\d+(?:\.\d+)?)h")
MEDS_MORTALITY_LABELS = """
CREATE TEMP TABLE label_rows AS
WITH stays AS (
    SELECT DISTINCT subject_id, time AS intime,
           (SELECT min(time) FROM meds_rows AS o WHERE o.subject_id = i.subject_id AND o.time > i.time
            AND o.code LIKE 'ICU_DISCHARGE%') AS outtime,
           (SELECT min_by(struct_pack(at := time, died := regexp_matches(code, 'DIED|EXPIRED')), time)
            FROM meds_rows AS d WHERE d.subject_id = i.subject_id AND d.time > i.time
            AND d.code LIKE 'HOSPITAL_DISCHARGE%') AS discharge,
           (SELECT min(time) FROM meds_rows AS m WHERE m.subject_id = i.subject_id AND m.code = 'MEDS_DEATH') AS death
    FROM meds_rows AS i WHERE code LIKE 'ICU_ADMISSION%'
)
SELECT subject_id, intime + to_seconds($hours * 3600) AS prediction_time,
       coalesce(discharge.died, false) OR coalesce(death <= coalesce(discharge.at, outtime), false) AS boolean_value,
       least(outtime, discharge.at, death) > intime + to_seconds(($hours + $gap) * 3600) AS lasts
FROM stays
"""

MEDS_LABEL_CONFLICTS = """
SELECT count(*) FROM (
    SELECT subject_id FROM label_rows GROUP BY subject_id, prediction_time HAVING count(DISTINCT boolean_value) > 1
)
"""
MEDS_LATE_LABELS = """
DELETE FROM label_rows USING meds_rows AS m
WHERE m.subject_id = label_rows.subject_id AND m.code = 'MEDS_DEATH' AND m.time <= prediction_time
"""

# What is known of a patient beside the events, with the time since when; the latest before the prediction counts.
MEDS_FACTS = """
CREATE TEMP TABLE facts AS
WITH from_codes(kind, part, name) AS (VALUES
    ('GENDER', 2, 'gender'), ('SEX', 2, 'gender'), ('RACE', 2, 'race'), ('ETHNICITY', 2, 'race'),
    ('INSURANCE', 2, 'insurance'), ('MARITAL_STATUS', 2, 'marital_status'), ('ICU_ADMISSION', 2, 'careunit'),
    ('HOSPITAL_ADMISSION', 2, 'admission_type'), ('HOSPITAL_ADMISSION', 3, 'admission_location')
),
said AS (
    SELECT subject_id, time, name, split_part(code, '//', part) AS value
    FROM meds_rows JOIN from_codes ON split_part(code, '//', 1) = kind
    UNION ALL
    UNPIVOT (SELECT subject_id, time, race, insurance, marital_status FROM meds_rows)
    ON race, insurance, marital_status INTO NAME name VALUE value
)
SELECT subject_id, coalesce(time, TIMESTAMP '0001-01-01') AS since, name, value
FROM said WHERE value NOT IN ('', 'UNK')
"""

# One sequence per label row: the subject's events up to and including the prediction, the last hours of them if asked.
MEDS_SAMPLES = """
CREATE TEMP TABLE samples AS
SELECT row_number() OVER (ORDER BY subject_id, prediction_time) AS icu_stay_id, subject_id, prediction_time,
       any_value(boolean_value)::INTEGER AS label,
       prediction_time - to_seconds($history_hours * 3600) AS since
FROM label_rows GROUP BY subject_id, prediction_time
"""
MEDS_EVENTS = r"""
CREATE TEMP TABLE event_rows AS
SELECT icu_stay_id, time AS event_time, time AS event_known_time, coalesce(event_type, lower(kind)) AS event_type,
       concat_ws(' | ', item,
           number_word || ': ' || coalesce(
               nullif(CASE WHEN TRY_CAST(text_value AS DOUBLE) IS NULL THEN trim(text_value) END, '___'),
               regexp_replace(CAST(round(number * scale) / scale AS VARCHAR), '\.0$', '')
               || coalesce(' ' || coalesce(nullif(unit, ''), code_unit), '')),
           'Route: ' || nullif(trim(route), ''),
           'Status: ' || coalesce(nullif(trim(statusdescription), ''), code_status)) AS event_text,
       epoch(prediction_time - time) / 60 AS relative_time_to_final_event
FROM (
    SELECT *, pow(10, greatest(0, digits - 1 - coalesce(floor(log10(abs(nullif(number, 0)))), 0))) AS scale
    FROM meds_rows JOIN meds_codes USING (code)
) AS r
JOIN samples AS s
  ON s.subject_id = r.subject_id AND r.time <= prediction_time AND ($history_hours = 0 OR r.time > since)
WHERE kind NOT IN ('MEDS_BIRTH', 'MEDS_DEATH') AND NOT regexp_matches(code, '(^|//)(DIED|EXPIRED)($|//)')
"""
MEDS_STAYS = """
CREATE TEMP TABLE stay_rows AS
WITH first_events AS (SELECT icu_stay_id, min(event_time) AS first_time FROM event_rows GROUP BY icu_stay_id),
known AS (
    SELECT icu_stay_id, name, max_by(value, f.since) AS value
    FROM samples JOIN facts AS f ON f.subject_id = samples.subject_id AND f.since <= prediction_time
    GROUP BY icu_stay_id, name
)
SELECT s.subject_id AS patient_id, icu_stay_id AS admission_id, icu_stay_id,
       CASE WHEN $history_hours > 0 THEN since ELSE coalesce(first_time, prediction_time) END AS icu_intime,
       prediction_time AS icu_outtime, NULL::TIMESTAMP AS patient_death_time, label AS patient_expired_in_hospital,
       gender AS patient_gender, floor(date_diff('day', birth, prediction_time) / 365.25) AS patient_age,
       race AS patient_race, marital_status, admission_type, admission_location, insurance,
       careunit AS first_icu_careunit, NULL AS last_icu_careunit, NULL::DOUBLE AS icu_length_of_stay_in_days,
       NULL AS discharge_location
FROM samples AS s
LEFT JOIN first_events USING (icu_stay_id)
LEFT JOIN (PIVOT known ON name IN ('gender', 'race', 'marital_status', 'admission_type', 'admission_location',
           'insurance', 'careunit') USING any_value(value) GROUP BY icu_stay_id) USING (icu_stay_id)
LEFT JOIN (SELECT subject_id, min(time) AS birth FROM meds_rows WHERE code = 'MEDS_BIRTH' GROUP BY subject_id)
       AS births ON births.subject_id = s.subject_id
"""


class MedsTask(NamedTuple):
    """Which labels of a MEDS data set, and how many hours before the prediction are read (0: all that there are)."""

    labels: str
    history_hours: float = 0.0
    gap_hours: float = 0.0


def is_meds(folder: Path) -> bool:
    """Return whether a folder holds a MEDS data set: `data/` with Parquet files beside `metadata/codes.parquet`."""
    return (folder / "metadata" / "codes.parquet").is_file() and (folder / "data").is_dir()


def register_meds(con: DuckDBPyConnection, root: Path, task: MedsTask) -> dict[str, int]:
    """Make the tables `stay_rows` and `event_rows` of a MEDS data set; return how many labels were left out, and why.

    A label row becomes one stay that ends with its prediction, so that whatever is read of it is known by then. Raises
    `InputError` for labels that are none; DuckDB's own errors for files that cannot be read.
    """
    con.execute(MEDS_ROWS.format(data=sql_quoted(root / "data" / "**" / "*.parquet")))
    con.execute(MEDS_CODES.format(codes=sql_quoted(root / "metadata" / "codes.parquet")))
    made = MADE_LABELS.fullmatch(task.labels)
    left_out = _make_mortality_labels(con, task, float(made[1])) if made else _read_labels(con, task)
    history = {"history_hours": task.history_hours}
    con.execute(MEDS_SAMPLES, history)
    con.execute(MEDS_FACTS)
    con.execute(MEDS_EVENTS, history)
    con.execute(MEDS_STAYS, history)
    return left_out


def _make_mortality_labels(con: DuckDBPyConnection, task: MedsTask, hours: float) -> dict[str, int]:
    con.execute(MEDS_MORTALITY_LABELS, {"hours": hours, "gap": task.gap_hours})
    short = first_value(con, "DELETE FROM label_rows WHERE lasts IS NOT TRUE")
    least = f"{hours + task.gap_hours:g} h"
    if not first_value(con, "SELECT count(*) FROM label_rows"):
        raise InputError(f"--labels {task.labels}: no ICU stay lasts {least}, or no code begins with ICU_ADMISSION.")
    return {f"ICU stays that ended or whose patient died within {least}, without a label": short}


def _read_labels(con: DuckDBPyConnection, task: MedsTask) -> dict[str, int]:
    """Labels of a Parquet file or a folder of them, in the MEDS label schema."""
    path = Path(task.labels)
    if not path.exists():
        raise InputError(
            f"--labels {path}: no such file or folder; or give mortality-in-icu@24h, which makes labels itself."
        )
    files = sql_quoted(path / "**" / "*.parquet" if path.is_dir() else path)
    con.execute(f"CREATE TEMP TABLE label_rows AS SELECT * FROM read_parquet({files}, union_by_name = true)")
    present = column_types(con, "label_rows")
    if missing := [name for name in ("subject_id", "prediction_time", "boolean_value") if name not in present]:
        raise InputError(f"--labels {path}: no column {', '.join(missing)}, which the MEDS label schema has.")
    if conflicts := first_value(con, MEDS_LABEL_CONFLICTS):
        raise InputError(f"--labels {path}: {conflicts} subjects and times have labels that contradict each other.")
    return {"labels at or after the patient's death, left out": first_value(con, MEDS_LATE_LABELS)}


# ---------------------------------------------------------------------------------------------------------------------
# Reading: MIMIC-IV folder, nested Parquet or flat table -> flat arrays
# ---------------------------------------------------------------------------------------------------------------------

STAY_COLUMNS = {
    "patient_id": "BIGINT",
    "admission_id": "BIGINT",
    "icu_stay_id": "BIGINT",
    "icu_intime": "TIMESTAMP",
    "icu_outtime": "TIMESTAMP",
    "patient_death_time": "TIMESTAMP",
    "patient_expired_in_hospital": "DOUBLE",
    "patient_gender": "VARCHAR",
    "patient_age": "DOUBLE",
    "patient_race": "VARCHAR",
    "marital_status": "VARCHAR",
    "admission_type": "VARCHAR",
    "admission_location": "VARCHAR",
    "insurance": "VARCHAR",
    "first_icu_careunit": "VARCHAR",
    "last_icu_careunit": "VARCHAR",
    "icu_length_of_stay_in_days": "DOUBLE",
    "discharge_location": "VARCHAR",
}
EVENT_COLUMNS = {
    "event_time": "TIMESTAMP",
    "event_known_time": "TIMESTAMP",
    "event_type": "VARCHAR",
    "event_text": "VARCHAR",
    "relative_time_to_final_event": "DOUBLE",
}
LABEL = "patient_expired_in_hospital"
STATIC_COLUMNS = (*tuple(STAY_COLUMNS)[7:], "number_of_events")  # what may be used as a static feature
EVENT_ARRAYS = {
    "event_type": np.int8,
    "text": np.int32,
    "minutes_since_intime": np.float32,
    "known_minutes_since_intime": np.float32,
    "minutes_to_end": np.float32,
}


@dataclass(frozen=True)
class StayTable:
    """ICU stays with their events in flat arrays: the events of stay i are `offsets[i]:offsets[i + 1]`, oldest first.

    `minutes_to_end` counts from the event to the end of what is read: the final event (ICU discharge or death,
    whichever is first), or in prospective mode the moment of prediction.
    """

    stays: pd.DataFrame  # (n_stays): STAY_COLUMNS
    offsets: np.ndarray  # (n_stays + 1) int64
    event_type: np.ndarray  # (n_events) int8: index in EVENT_TYPES, len(EVENT_TYPES) if it is none of them
    text: np.ndarray  # (n_events) int32: index in texts
    minutes_since_intime: np.ndarray  # (n_events) float32
    known_minutes_since_intime: np.ndarray  # (n_events) float32, NaN where nobody knows when the ward knew
    minutes_to_end: np.ndarray  # (n_events) float32
    texts: np.ndarray  # (n_texts) of str: distinct texts

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def static_columns(self) -> pd.DataFrame:
        """(n_stays): STATIC_COLUMNS.

        Attention sees shares of events; with their number a model can tell two from one in ten.
        """
        return self.stays.assign(number_of_events=self.lengths)[list(STATIC_COLUMNS)]

    @property
    def labels(self) -> np.ndarray:
        """(n_stays) float64: 1 died in hospital, 0 survived, NaN unknown."""
        return self.stays[LABEL].to_numpy(float)

    @property
    def stay_of_event(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.stays)), self.lengths)

    def fingerprint(self) -> str:
        """Return 32 hex digits of the stays and their events: the same wherever they lie, others once they change."""
        digest = hashlib.md5(usedforsecurity=False)
        of_stays = (self.stays["icu_stay_id"].to_numpy(), self.offsets, self.labels)
        of_events = (self.event_type, self.text, self.minutes_to_end, self.known_minutes_since_intime)
        of_texts = pd.util.hash_array(np.asarray(self.texts, dtype=object))
        for array in (*of_stays, *of_events, of_texts):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def take(self, stays: np.ndarray, keep_event: np.ndarray | None = None) -> StayTable:
        """Return the table of these stays (indices in their order, or a mask) and of events that `keep_event` marks."""
        stays = np.arange(len(self.stays))[stays]
        lengths = self.lengths[stays]
        offsets = sums_before(lengths)
        moved_by = self.offsets[stays] - offsets[:-1]
        events = np.arange(offsets[-1]) + np.repeat(moved_by, lengths)
        if keep_event is not None:
            is_kept = keep_event[events]
            events, offsets = events[is_kept], sums_before(is_kept)[offsets]
        arrays = {name: getattr(self, name)[events] for name in EVENT_ARRAYS}
        return StayTable(self.stays.iloc[stays].reset_index(drop=True), offsets, texts=self.texts, **arrays)

    def with_own_texts(self) -> StayTable:
        """Return the table without the texts that none of its events has: they need no vector."""
        used = np.flatnonzero(np.bincount(self.text, minlength=len(self.texts)))
        number = np.zeros(len(self.texts), np.int32)
        number[used] = np.arange(len(used))
        return replace(self, text=number[self.text], texts=self.texts[used])


def sums_before(counts: np.ndarray) -> np.ndarray:
    """Return the sum of what stands before each place, and of all: (n,) -> (n + 1) int64."""
    return np.concatenate([[0], np.cumsum(counts)])


def stacked(tables: Sequence[StayTable]) -> StayTable:
    """Return one table of the stays of all, which have the same texts."""
    stays = pd.concat([table.stays for table in tables], ignore_index=True)
    offsets = sums_before(np.concatenate([table.lengths for table in tables]))
    arrays = {name: np.concatenate([getattr(table, name) for table in tables]) for name in EVENT_ARRAYS}
    return StayTable(stays, offsets, texts=tables[0].texts, **arrays)


def append_stays(first: StayTable, second: StayTable) -> StayTable:
    """Return one table of the stays of both, and of the texts of both."""
    codes, texts = pd.factorize(np.concatenate([first.texts, second.texts]))
    of_first, of_second = np.split(codes.astype(np.int32), [len(first.texts)])
    first = replace(first, text=of_first[first.text], texts=texts)
    second = replace(second, text=of_second[second.text], texts=texts)
    return stacked([first, second])


class Repairs(dict[str, int]):
    """How many stays and events were dropped or mended, by reason; and what else is to be known of the rows read."""

    def __init__(self, counts: dict[str, int]) -> None:
        super().__init__(without_zeros(counts))
        self.sources: list[SourceTable] = []  # of a MIMIC-IV folder: where the rows of each table went
        self.notes: dict[str, int] = {}  # counts of what is no repair

    def state(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return {"counts": self, "notes": self.notes, "sources": [account._asdict() for account in self.sources]}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Repairs:
        """Return what `state` was of."""
        repairs = cls(state["counts"])
        repairs.notes = state["notes"]
        repairs.sources = [SourceTable(**account) for account in state["sources"]]
        return repairs

    def log(self) -> None:
        """Print the account of the source tables as one table, and name those that contribute nothing."""
        if not self.sources:
            return
        logger.info("Rows        table                         read        used   not used, and why")
        for table, read, of_cohort, in_stays, lost, noted in self.sources:
            used = "" if in_stays is None else f"{in_stays:12,}"
            elsewhere = 0 if of_cohort is None else read - of_cohort
            reasons = without_zeros({"of patients or admissions without an ICU stay": elsewhere} | lost | noted)
            words = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
            logger.info(f"            {table:22s} {read:11,}{used}   {words}".rstrip())
            if in_stays == 0:
                logger.warning(
                    f"Rows        WARNING: {table} contributes nothing: {read:,} rows read, {of_cohort:,} of the "
                    "cohort. Is it of the same release as icu/icustays?"
                )


def read_stays(
    data: str | Path | pd.DataFrame,
    cache_dir: str | Path = "clinical_LF_precomp_emb",
    need_label: bool = True,
    task: MedsTask | None = None,
    memory_limit: str = "33%",
    threads: int = 0,
    static_features: Sequence[str] = STATIC_COLUMNS,
) -> tuple[StayTable, Repairs]:
    """Read a MIMIC-IV folder, nested Parquet or flat CSV/Parquet; also say how much was repaired or dropped, and why.

    data may be a data frame, one row per event. task: what is predicted, where the folder is a MEDS data set. Of the
    columns that describe a stay, only the static_features must be there. Raises `InputError` for a table that cannot
    be read as it was meant.
    """
    results = Path(cache_dir) / "query_results"

    def read(source: Path | pd.DataFrame, name: str) -> tuple[StayTable, Repairs]:
        spill = results / f".spilled{HALF_WRITTEN}{uuid.uuid4().hex}"
        try:
            with open_duckdb(memory_limit, threads, spill) as con:
                return _read_tables(con, source, name, need_label, task, static_features)
        except (duckdb.OutOfMemoryException, MemoryError) as error:  # numpy's arrays need room beside DuckDB
            raise no_room(f"{name}: reading", error, memory_limit, results) from None
        except duckdb.Error as error:
            raise InputError(
                f"{name}: cannot be read ({reason_without_rows(error)}). CSV must be UTF-8 with a header and the "
                "columns of the README's data table; Parquet files of one glob must share a schema."
            ) from None

    if isinstance(data, pd.DataFrame):
        return read(data, "the data frame")
    path = existing_source(str(data), task)
    if path.is_dir() and task is None:
        path = run_mimic_query(path, Path(cache_dir), memory_limit, threads) / "*.parquet"
    kept = kept_arrays(path, results, need_label, task)
    if kept is None:
        return read(path, str(data))
    with contextlib.suppress(OSError, ValueError):  # not there, or damaged
        return load_arrays(kept, static_features)
    with hold(results):
        with contextlib.suppress(OSError, ValueError):  # another run made them while this one waited
            return load_arrays(kept, static_features)
        content = read(path, str(data))
        remove(kept)
        write_whole(kept, lambda folder: save_arrays(folder, *content))
    return load_arrays(kept)


def existing_source(data: str, task: MedsTask | None) -> Path:
    """Return the path of a data set. Raises `InputError` where there is none, or labels where they have no use."""
    path = Path(data)
    if "\n" in data:
        raise InputError("the data's path is a text of several lines. Give a path, or the data frame itself.")
    if not path.exists() and not any(sign in data for sign in "*?["):
        raise InputError(
            f"{data}: no such file or folder. --data takes a MIMIC-IV folder, a Parquet file or glob, or a CSV file."
        )
    if is_meds(path) != (task is not None):
        raise InputError(
            f"{data}: a MEDS data set and --labels go together: a file or folder of labels, or mortality-in-icu@24h."
        )
    return path


# A value as trimmed text, NULL where it only says that it is missing.
GIVEN = """
    CREATE TEMP MACRO given(value) AS
    CASE WHEN trim(CAST(value AS VARCHAR)) NOT IN ({missing}) THEN trim(CAST(value AS VARCHAR)) END;
    CREATE TEMP MACRO text_of(value) AS
    CASE WHEN given(value) IS NULL AND trim(value) <> '' THEN '' ELSE coalesce(CAST(value AS VARCHAR), '') END
"""


def _read_tables(
    con: DuckDBPyConnection,
    data: Path | pd.DataFrame,
    source: str,
    need_label: bool,
    task: MedsTask | None,
    static_features: Sequence[str],
) -> tuple[StayTable, Repairs]:
    """Check and load the stays of a source; DuckDB's own errors for what cannot be read. Messages name the `source`."""
    words = [sql_quoted(word) for word in MISSING if "inf" not in word]  # here infinity is an error that names its row
    con.execute(GIVEN.format(missing=", ".join(words)))
    left_out: dict[str, int] = {}
    if task:
        kind = "meds"
        left_out = register_meds(con, Path(source), task)
    else:
        kind = _register_source(con, data)
    _check_columns(con, source, need_label, static_features)
    _check_values(con, source, kind, need_label)
    table, repairs = _load_arrays(con, source, kind, need_label, left_out)
    if kind == "nested":
        repairs.sources = _account_for_events(con, Path(data), table)
    return table, repairs


# What was read of a big source is kept as arrays: a later start maps them into memory instead of reading it again.
ARRAYS_VERSION = 3  # raise it when what is made of a source changes: arrays that were kept before are then made anew
KEEP_ARRAYS_FROM = 2**24  # bytes of the source; a smaller one is read in seconds


def kept_arrays(path: Path, results: Path, need_label: bool, task: MedsTask | None) -> Path | None:
    """Return the folder for the arrays of a source as its files are now; None for a small one, whose are not kept."""
    patterns = [path]
    if task:
        labels = Path(task.labels)
        patterns = [path / "**" / "*.parquet", labels, labels / "**" / "*.parquet"]
    names: list[str] = []
    for pattern in patterns:
        names += sorted(glob.glob(str(pattern), recursive=True))
    stats = [(str(file.absolute()), *size_and_time(file)) for file in map(Path, names)]
    if sum(size for _, size, _ in stats) < KEEP_ARRAYS_FROM:
        return None
    made_of = (ARRAYS_VERSION, STAY_COLUMNS, EVENT_COLUMNS, EVENT_TYPES, need_label, task, stats)
    return results / f"{md5_of(made_of)}.arrays"


def save_arrays(folder: Path, table: StayTable, repairs: Repairs) -> None:
    """Write a table into a new folder: one .npy for each array, the stays and the texts as Parquet."""
    folder.mkdir()
    for name in ("offsets", *EVENT_ARRAYS):
        np.save(folder / f"{name}.npy", getattr(table, name), allow_pickle=False)
    table.stays.to_parquet(folder / "stays.parquet")
    pd.DataFrame({"text": table.texts}).to_parquet(folder / "texts.parquet")
    (folder / "repairs.json").write_text(json.dumps(repairs.state()), "utf-8")


def load_arrays(folder: Path, static_features: Sequence[str] = ()) -> tuple[StayTable, Repairs]:
    """Read what `save_arrays` wrote; events are mapped into memory, not read.

    Raises OSError where it is not there, ValueError where it is damaged, or has none of a feature: its source, read for
    others, may lack the column.
    """
    arrays = {name: np.load(folder / f"{name}.npy", "c", allow_pickle=False) for name in ("offsets", *EVENT_ARRAYS)}
    table = StayTable(
        stays=pd.read_parquet(folder / "stays.parquet"),
        texts=pd.read_parquet(folder / "texts.parquet")["text"].to_numpy(object),
        **{name: np.asarray(array) for name, array in arrays.items()},
    )
    if any(table.stays[name].isna().all() for name in static_features if name in table.stays):
        raise ValueError
    return table, Repairs.of_state(read_json(folder / "repairs.json"))


# BigQuery's exports wrap each element of an array in structs called list and element.
NESTED_ROWS = """
    CREATE VIEW stay_rows AS SELECT * EXCLUDE events FROM {rows};
    CREATE VIEW event_rows AS
    SELECT icu_stay_id, event.* FROM (SELECT icu_stay_id, unnest({events}) AS event FROM {rows})
"""
FLAT_ROWS = """
    CREATE VIEW stay_rows AS SELECT * FROM {rows};
    CREATE VIEW event_rows AS SELECT * FROM {rows}
"""


def _register_source(con: DuckDBPyConnection, path: Path | pd.DataFrame) -> str:
    """Make views `stay_rows` and `event_rows` over the file or frame, columns as is; return 'nested' or 'flat'."""
    if isinstance(path, pd.DataFrame):
        con.register("stay_rows", path)
        con.register("event_rows", path)
        return "flat"
    is_csv = path.name.lower().endswith((".csv", ".csv.gz"))
    if not is_csv and not path.name.lower().endswith(".parquet"):
        raise InputError(f"{path}: --data takes a folder, *.parquet, *.csv or *.csv.gz.")
    if path.exists() and path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty. Copy or export it again.")
    rows = csv_rows(path) if is_csv else f"read_parquet({sql_quoted(path)}, filename = 'file_of_row')"
    types = column_types(con, rows)
    if "events" not in types:
        con.execute(FLAT_ROWS.format(rows=rows))
        return "flat"
    events = "events" if types["events"].endswith("[]") else "list_transform(events.list, lambda e: e.element)"
    con.execute(NESTED_ROWS.format(rows=rows, events=events))
    return "nested"


def _check_columns(con: DuckDBPyConnection, source: str, need_label: bool, static_features: Sequence[str]) -> None:
    """Refuse a table without a column that is needed, or whose ids lost digits."""
    stay_columns, event_columns = column_types(con, "stay_rows"), column_types(con, "event_rows")
    unneeded = set(STATIC_COLUMNS) - set(static_features) | (set() if need_label else {LABEL})
    missing = [name for name in STAY_COLUMNS if name not in stay_columns and name not in unneeded]
    missing += [name for name in EVENT_COLUMNS if name not in event_columns]
    if missing:
        raise InputError(
            f"{source}: missing columns {', '.join(missing)}. query.sql yields them all; the README's data table lists "
            "them. A static column that --static-features leaves out may be missing."
        )
    for name in ("patient_id", "admission_id", "icu_stay_id"):
        if stay_columns[name] not in ("DOUBLE", "FLOAT"):
            continue
        if lost := first_value(con, f"SELECT count(*) FROM stay_rows WHERE abs({name}) > 9007199254740992"):
            raise InputError(
                f"{source}: column {name} is stored as floating point and passes 2^53 in {lost} rows, where ids "
                "lose digits. Export it as INT64."
            )


# Values that are no number or time. A column that has its type already has none: it is not written out to look.
UNREADABLE = "(TRY_CAST({0} AS {1}) IS NULL AND given({0}) IS NOT NULL)"
# Values that a type takes but a table should not have: DuckDB rounds 1.5 to an integer, and infinity is a number and a
# time. Per type: the condition, and what the message asks for.
UNFIT = {
    "BIGINT": ("TRY_CAST({0} AS BIGINT) <> TRY_CAST({0} AS DOUBLE)", "an integer"),
    "TIMESTAMP": ("NOT isfinite(TRY_CAST({0} AS TIMESTAMP))", "a time like 2150-01-31 23:59:00"),
    "DOUBLE": ("abs(nullif(TRY_CAST({0} AS DOUBLE), 'NaN'::DOUBLE)) > 1e30", "a finite number"),
}
BAD_ROWS = """
    SELECT number FROM (SELECT row_number() OVER () AS number, * FROM {view})
    WHERE {condition} ORDER BY number LIMIT 3
"""
DOUBLE_STAYS = """
    SELECT icu_stay_id, list_sort(list(DISTINCT file_of_row)) AS files
    FROM stay_rows GROUP BY icu_stay_id HAVING count(*) > 1 ORDER BY icu_stay_id
"""


def _typed(name: str, kind: str) -> str:
    """SQL for a column as its type; what stands for a missing value is NULL."""
    return f"given({name})" if kind == "VARCHAR" else f"TRY_CAST({name} AS {kind})"


def _check_values(con: DuckDBPyConnection, source: str, kind: str, need_label: bool) -> None:
    """Unreadable values, missing keys and stays that contradict themselves are errors that name the first places.

    A flat table is somebody's own make: a stay without admission time or label is a mistake of making it. In what the
    query returned it is a fault of the data: `_load_arrays` drops that stay.
    """
    needed = ["patient_id", "admission_id", "icu_stay_id"]
    if kind != "nested":
        needed += ["icu_intime"]
    for view, columns in (("stay_rows", STAY_COLUMNS), ("event_rows", EVENT_COLUMNS)):
        present, checks = column_types(con, view), {}
        for name, column_kind in columns.items():
            if name in present and column_kind != "VARCHAR":
                checks[name] = UNFIT[column_kind][0].format(name)
                if present[name] != column_kind:
                    checks[name] += f" OR {UNREADABLE.format(name, column_kind)}"
                if name in needed:
                    checks[name] += f" OR {_typed(name, column_kind)} IS NULL"
        if LABEL in checks and kind != "nested":
            value = f"TRY_CAST({LABEL} AS DOUBLE)"
            checks[LABEL] += f" OR {value} NOT IN (0, 1)" + (f" OR {value} IS NULL" if need_label else "")
        _raise_first(con, source, view, checks)
    if kind == "nested":
        _refuse_double_stays(con, source)
    else:
        _refuse_contradictions(con, source)


def _raise_first(con: DuckDBPyConnection, source: str, view: str, checks: dict[str, str]) -> None:
    """Raise InputError for the first column whose condition holds anywhere; all are counted in one pass."""
    counts = [f"count(*) FILTER (WHERE {condition})" for condition in checks.values()]
    found = con.execute(f"SELECT {', '.join(counts)} FROM {view}").fetchall()[0]
    for (name, condition), count in zip(checks.items(), found):
        if not count:
            continue
        bad = con.execute(BAD_ROWS.format(view=view, condition=condition)).fetchall()
        meaning = "0 or 1" if name == LABEL else UNFIT[(STAY_COLUMNS | EVENT_COLUMNS)[name]][1]
        raise InputError(
            f"{source}: column {name} is not {meaning} in {count} rows, first row {first_three(bad)} "
            "after the header. Mend or remove these rows."
        )


def _refuse_double_stays(con: DuckDBPyConnection, source: str) -> None:
    """One stay in two rows of nested Parquet: most often shards of an earlier export beside those of a later one."""
    twice = con.execute(DOUBLE_STAYS).fetchall()
    if twice:
        stay, files = twice[0]
        raise InputError(
            f"{source}: {len(twice)} stays stand in more than one row, first icu_stay_id {stay} in "
            f"{', '.join(files[:3])}. Are these files of two exports? Keep those of one."
        )


def _refuse_contradictions(con: DuckDBPyConnection, source: str) -> None:
    """In a flat table each row of a stay repeats the stay's columns: they must agree."""
    present, conflicts = column_types(con, "stay_rows"), {}
    for name, kind in STAY_COLUMNS.items():
        if name != "icu_stay_id" and name in present:
            conflicts[name] = f"count(DISTINCT coalesce(CAST({_typed(name, kind)} AS VARCHAR), '')) > 1"
    found = con.execute(
        f"SELECT TRY_CAST(icu_stay_id AS BIGINT) AS stay, {', '.join(conflicts.values())} FROM stay_rows "
        f"GROUP BY stay HAVING {' OR '.join(conflicts.values())} ORDER BY stay"
    ).fetchall()
    if found:
        names = [name for name, bad in zip(conflicts, found[0][1:]) if bad]
        raise InputError(
            f"{source}: {len(found)} stays contradict themselves, first icu_stay_id {first_three(found)} in "
            f"{', '.join(names)}. A stay has one value of each stay column on all its rows."
        )


# Why a stay is left out: the first condition that holds. The columns' names in MIMIC-IV stand beside ours.
STAY_FAULTS = {
    "stays without icu_intime (icustays.intime), dropped": "icu_intime IS NULL",
    "stays without icu_outtime (icustays.outtime) or a death time (admissions.deathtime), dropped": (
        "final_time IS NULL"
    ),
    "stays that begin after the death of their patient (admissions.deathtime), dropped": (
        "patient_death_time < icu_intime"
    ),
    "stays whose icu_outtime (icustays.outtime) is before their icu_intime, dropped": "final_time < icu_intime",
    f"stays whose {LABEL} (admissions.hospital_expire_flag) is neither 0 nor 1, dropped": (
        f"coalesce({LABEL} NOT IN (0, 1), $need_label)"
    ),
    f"stays that end with a death (admissions.deathtime) though {LABEL} is 0, dropped": (
        f"{LABEL} = 0 AND patient_death_time = final_time"
    ),
}

# The length of a stay is that of its record, recomputed: MIMIC-IV's own runs to outtime, hours past a death.
ALL_STAYS = """
    CREATE TEMP TABLE all_stays AS
    SELECT *, {fault} AS fault
    FROM (
        SELECT * REPLACE (
                   CASE WHEN $is_meds THEN NULL ELSE epoch(final_time - icu_intime) / 86400 END
                   AS icu_length_of_stay_in_days
               ), icu_length_of_stay_in_days AS stated_days
        FROM (SELECT *, least(icu_outtime, patient_death_time) AS final_time FROM ({stays}))
    )
"""
FAULTY_STAYS = """
    SELECT fault, count(*), list_sort(list(icu_stay_id))[:3]
    FROM all_stays WHERE fault IS NOT NULL GROUP BY fault ORDER BY fault
"""
OTHER_LENGTHS = """
    SELECT count(*) FROM all_stays WHERE fault IS NULL AND abs(stated_days - icu_length_of_stay_in_days) > 0.01
"""
STAYS = """
    CREATE TEMP TABLE stays AS
    SELECT row_number() OVER (ORDER BY icu_stay_id) - 1 AS stay, * EXCLUDE (fault, stated_days)
    FROM all_stays WHERE fault IS NULL
"""
# Texts are numbered first: what is compared, sorted and counted of events are numbers, which are small and of one size.
# Each is read as it is written, and cleaned once.
ALL_TEXTS = """
    CREATE TEMP TABLE all_texts AS
    SELECT written, event_text, dense_rank() OVER (ORDER BY event_text) AS code
    FROM (SELECT written, text_of(written) AS event_text FROM (SELECT DISTINCT event_text AS written FROM event_rows))
"""
EVENTS = """
    CREATE TEMP TABLE events AS
    SELECT stay, event_type, code, stated,
           epoch(event_time - icu_intime) / 60 AS minutes,
           epoch(known_time - icu_intime) / 60 AS known,
           epoch(final_time - event_time) / 60 AS to_end
    FROM (
        SELECT TRY_CAST(icu_stay_id AS BIGINT) AS icu_stay_id,
               TRY_CAST(event_time AS TIMESTAMP) AS event_time,
               TRY_CAST(event_known_time AS TIMESTAMP) AS known_time,
               coalesce(list_position($types, given(event_type)) - 1, len($types))::TINYINT AS event_type,
               event_text AS written,
               TRY_CAST(relative_time_to_final_event AS DOUBLE) AS stated
        FROM event_rows
    ) AS e
    JOIN stays USING (icu_stay_id)
    JOIN all_texts AS t ON t.written IS NOT DISTINCT FROM e.written
"""
TEXTS = """
    CREATE TEMP TABLE texts AS
    SELECT row_number() OVER (ORDER BY event_text) - 1 AS text, code, event_text
    FROM (SELECT DISTINCT code, event_text FROM all_texts) SEMI JOIN events USING (code)
"""
ARRAYS = """
    SELECT event_type, text::INTEGER AS text, minutes::FLOAT AS minutes_since_intime,
           known::FLOAT AS known_minutes_since_intime, to_end::FLOAT AS minutes_to_end
    FROM events JOIN texts USING (code)
    ORDER BY stay, minutes_since_intime, event_type, text, known
"""


def _load_arrays(
    con: DuckDBPyConnection,
    source: str,
    kind: str,
    need_label: bool,
    left_out: dict[str, int],
) -> tuple[StayTable, Repairs]:
    """Load stays, events and distinct texts, sorted; the work is DuckDB's, Python sees only flat arrays."""
    report, notes = _load_stays(con, kind, need_label)
    con.execute(ALL_TEXTS)
    con.execute(EVENTS, {"types": list(EVENT_TYPES)})
    report = left_out | report | _repair_events(con, source)
    con.execute(TEXTS)
    stays = con.execute("SELECT * EXCLUDE (stay, final_time) FROM stays ORDER BY stay").df()
    if stays.empty and not any(report.values()):
        raise InputError(f"{source}: the table has a header but no rows.")
    counted = con.execute("SELECT stay, count(*) AS events FROM events GROUP BY stay ORDER BY stay").fetchnumpy()
    report["stays without events, dropped"] = len(stays) - len(counted["stay"])
    offsets = sums_before(counted["events"])
    arrays = {name: np.empty(offsets[-1], kind) for name, kind in EVENT_ARRAYS.items()}
    filled = 0
    for batch in con.sql(ARRAYS).to_arrow_reader(2**20):  # never all of them twice in memory
        for name, array in arrays.items():
            array[filled : filled + len(batch)] = batch[name].to_numpy(zero_copy_only=False)  # NULL becomes NaN
        filled += len(batch)
    is_unknown = arrays["event_type"] == len(EVENT_TYPES)
    report["events of unknown type, kept (their type is all zeros)"] = int(is_unknown.sum())
    repairs = Repairs(report)
    repairs.notes = notes
    if not filled:
        raise InputError(
            f"{source}: no stay has an event between icu_intime and the final event (dropped: {dict(repairs)})."
        )
    stays = stays.iloc[counted["stay"]].reset_index(drop=True)
    texts = con.execute("SELECT event_text FROM texts ORDER BY text").fetchnumpy()["event_text"]
    return StayTable(stays, offsets, texts=texts, **arrays), repairs


def _load_stays(con: DuckDBPyConnection, kind: str, need_label: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Make the table `stays`; return how many were left out, and what to note of the others."""
    present, columns = column_types(con, "stay_rows"), ["TRY_CAST(icu_stay_id AS BIGINT) AS icu_stay_id"]
    for name, column_kind in STAY_COLUMNS.items():
        if name != "icu_stay_id":
            value = f"any_value({_typed(name, column_kind)})" if name in present else f"NULL::{column_kind}"
            columns.append(f"{value} AS {name}")
    grouped = f"SELECT {', '.join(columns)} FROM stay_rows GROUP BY 1"
    statement = ALL_STAYS.format(fault=first_that_holds(STAY_FAULTS), stays=grouped)
    con.execute(statement, {"is_meds": kind == "meds", "need_label": need_label})
    report = {}
    for reason, count, first in con.execute(FAULTY_STAYS).fetchall():
        report[reason] = count
        logger.warning(
            f"Dropped     {count:,} {reason}: icu_stay_id {', '.join(map(str, first))}{', ...' * (count > 3)}"
        )
    con.execute(STAYS)
    return report, {LENGTH_DIFFERS: first_value(con, OTHER_LENGTHS)}


LENGTH_DIFFERS = "stays whose icu_length_of_stay_in_days was not the record's, recomputed"

# What is left out or mended, but belongs into the leakage audit.
REPAIRED = (*(reason for reason in STAY_FAULTS if "death" in reason), LENGTH_DIFFERS)

COMPARED_TIMES = """
    SELECT count(*) FILTER (WHERE abs(to_end) > 60) AS compared,
           count(*) FILTER (WHERE abs(to_end) > 60 AND abs(stated * 60 - to_end) < 2) AS in_hours,
           count(*) FILTER (WHERE abs(stated - to_end) > 2) AS differ
    FROM events WHERE isfinite(stated) AND to_end IS NOT NULL
"""
DIFFERING_STAYS = """
    SELECT DISTINCT icu_stay_id FROM events JOIN stays USING (stay)
    WHERE isfinite(stated) AND abs(stated - to_end) > 2 ORDER BY icu_stay_id LIMIT 3
"""
AFTER_THE_END = "events after the final event, dropped (they leak the label)"
EVENT_FAULTS = {
    "events without a time, dropped": "minutes IS NULL OR to_end IS NULL",
    "events before ICU admission, dropped": "minutes < 0",
    AFTER_THE_END: "to_end < 0",
}


def _repair_events(con: DuckDBPyConnection, source: str) -> dict[str, int]:
    """Drop events that belong to no stay's time, and duplicates; say how many. Contradicting times are an error."""
    compared, in_hours, differ = con.execute(COMPARED_TIMES).fetchall()[0]
    if differ and in_hours > 0.5 * compared:
        raise InputError(
            f"{source}: relative_time_to_final_event is in hours in {in_hours} of {compared} events. "
            "It must be minutes: multiply by 60."
        )
    if differ:
        first = first_three(con.execute(DIFFERING_STAYS).fetchall())
        raise InputError(
            f"{source}: relative_time_to_final_event differs by more than 2 minutes from LEAST(icu_outtime, "
            f"patient_death_time) - event_time in {differ} events, first icu_stay_id {first}. Recompute it in minutes."
        )
    report = {}
    for reason, condition in EVENT_FAULTS.items():
        report[reason] = first_value(con, f"DELETE FROM events WHERE {condition}")
    before = first_value(con, "SELECT count(*) FROM events")
    after = first_value(con, "CREATE OR REPLACE TEMP TABLE events AS SELECT DISTINCT * EXCLUDE stated FROM events")
    return report | {"duplicate events, dropped": before - after}


def _account_for_events(con: DuckDBPyConnection, path: Path, table: StayTable) -> list[SourceTable]:
    """Return the account of the MIMIC-IV tables, completed by the events that were read: every row is in it once."""
    if not (path.parent / ACCOUNT).is_file():
        return []
    accounts = [SourceTable(**account) for account in read_json(path.parent / ACCOUNT)]
    found = dict(con.execute("SELECT event_type, count(*) FROM event_rows GROUP BY event_type").fetchall())
    used = dict(zip(EVENT_TYPES, np.bincount(table.event_type, minlength=len(EVENT_TYPES)).tolist()))
    for number, account in enumerate(accounts):
        if account.table not in EVENT_TABLES or account.of_cohort is None:
            continue
        event_type = EVENT_TABLES[account.table].event_type
        in_stays, lost = found.get(event_type, 0), dict(account.lost)
        lost["outside the ICU stays"] = account.of_cohort - sum(lost.values()) - in_stays
        lost["repeated, or of a stay that was dropped"] = in_stays - used[event_type]
        accounts[number] = account._replace(in_stays=used[event_type], lost=without_zeros(lost))
    return accounts


class CohortStep(NamedTuple):
    name: str
    stays: int
    patients: int
    events: int
    deaths: int


def choose_cohort(table: StayTable, settings: Settings) -> tuple[StayTable, list[CohortStep]]:
    """First stays only and the moment of prediction, with the flow of numbers from all stays to those analysed."""
    flow: list[CohortStep] = []

    def note(name: str, current: StayTable) -> StayTable:
        n_patients, n_deaths = current.stays["patient_id"].nunique(), int(np.nansum(current.labels))
        flow.append(CohortStep(name, len(current.stays), n_patients, len(current.text), n_deaths))
        if not len(current.stays):
            steps = "; ".join(f"{step.name}: {step.stays}" for step in flow)
            raise InputError(f"no stay is left ({steps}). Lower --observation-hours or --gap-hours.")
        return current

    table = note("all stays with events", table)
    if settings.first_stay_only:
        by_time = table.stays.sort_values(["icu_intime", "icu_stay_id"], kind="stable")
        first = by_time.drop_duplicates("patient_id").index
        table = note("first ICU stay of each patient", table.take(np.sort(first)))
    if settings.observation_hours > 0:
        least = settings.observation_hours + settings.gap_hours
        longer = table.take(stay_hours(table) > least)
        table = note(f"still in the ICU and alive {least:g} h after admission", longer)
        described = table.stays.set_index("icu_stay_id")[list(KNOWN_ONLY_LATER)]  # in subgroups, never a feature
        table = known_at(table, settings.observation_hours)
        later = described.loc[table.stays["icu_stay_id"]].reset_index(drop=True)
        table = replace(table, stays=table.stays.assign(**later))
        table = note(f"with an event known {settings.observation_hours:g} h after admission", table)
    return table, flow


def stay_hours(table: StayTable) -> np.ndarray:
    """(n_stays) hours from ICU admission to the final event, ICU discharge or death, whichever is first."""
    final = table.stays[["icu_outtime", "patient_death_time"]].min(axis=1)
    return ((final - table.stays.icu_intime).dt.total_seconds() / 3600).to_numpy()


def known_at(table: StayTable, hours: float) -> StayTable:
    """Return what the ward knew `hours` after ICU admission; stays of which nothing was known go.

    Times count to that moment, and columns known only later are missing, as where a model is trained to predict then.
    """
    minutes = hours * 60
    known = (table.known_minutes_since_intime <= minutes) & (table.minutes_since_intime <= minutes)  # NaN <= x is False
    n_known = np.bincount(table.stay_of_event[known], minlength=len(table.stays))
    part = table.take(n_known > 0, keep_event=known)
    stays = part.stays.assign(icu_length_of_stay_in_days=np.nan, last_icu_careunit=None, discharge_location=None)
    return replace(part, stays=stays, minutes_to_end=(minutes - part.minutes_since_intime).astype(np.float32))


class Split(NamedTuple):
    train: np.ndarray  # indices of stays
    validation: np.ndarray
    test: np.ndarray


def has_both_outcomes(table: StayTable, stays: np.ndarray) -> bool:
    """Return whether there are deaths and survivors among these stays."""
    return {0, 1} <= set(table.labels[stays])


def split_by_patient(table: StayTable, seed: int, test_share: float = 0.2) -> Split:
    """Return 64 / 16 / 20 % of the patients, stratified by whether any of their stays ended in death; indices of stays.

    A test_share of 0 leaves 80 / 20 % to train and validate.
    """
    outcome = pd.Series(table.labels).groupby(table.stays["patient_id"]).max()
    rest, test = outcome.index, outcome.index[:0]
    try:
        if test_share:
            rest, test = train_test_split(rest, test_size=test_share, stratify=outcome, random_state=seed)
        train, validation = train_test_split(rest, test_size=0.2, stratify=outcome[rest], random_state=seed)
    except ValueError:
        raise InputError(
            f"{len(outcome)} patients, {int(outcome.sum())} of whom died: too few to split by patient with both "
            "outcomes in each part. It takes some 10 patients of either outcome."
        ) from None
    parts = [np.flatnonzero(table.stays["patient_id"].isin(part)) for part in (train, validation, test)]
    if not all(has_both_outcomes(table, part) for part in parts if len(part)):
        raise InputError(
            f"{len(outcome)} patients, {int(outcome.sum())} of whom died: a part of the split has one outcome only. "
            "Use more patients."
        )
    return Split(*parts)


def cross_validation_splits(table: StayTable, folds: int, seed: int) -> Iterator[Split]:
    """Patient-level folds; a fifth of the other patients of each fold validates."""
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    inner = StratifiedGroupKFold(5, shuffle=True, random_state=seed)
    labels, patients = table.labels, table.stays.patient_id.to_numpy()
    deaths = len(np.unique(patients[labels == 1]))
    if deaths < folds + 4:
        raise InputError(f"--cross-validate {folds}: only {deaths} patients died; use fewer folds.")
    for rest, test in splitter.split(labels, labels, patients):
        train, validation = next(inner.split(labels[rest], labels[rest], patients[rest]))
        yield Split(rest[train], rest[validation], test)


# ---------------------------------------------------------------------------------------------------------------------
# Preprocessing
# ---------------------------------------------------------------------------------------------------------------------


class ClinicalDataPreprocessor:
    """Encoders of event types, times and static columns, fitted on the training stays alone.

    The state is plain data (`state_dict`), so that a checkpoint loads without pickle.
    """

    def __init__(self, static_features: Sequence[str] = DEFAULT_STATIC_FEATURES, item_history: bool = False) -> None:
        self.numeric = [name for name in static_features if name in NUMERIC_STATIC_FEATURES]
        self.categorical = [name for name in static_features if name not in NUMERIC_STATIC_FEATURES]
        self.item_history = item_history

    def fit(self, table: StayTable) -> ClinicalDataPreprocessor:
        """Learn categories, means and scales from the training stays, and nothing from any other."""
        stays = table.static_columns
        categories = [
            sorted({*column.dropna().astype(str), "Unknown"}) for _, column in stays[self.categorical].items()
        ]
        numbers = self._numbers_of(stays, self.numeric)
        minutes = table.minutes_to_end.astype(float)
        state = {
            "categorical": self.categorical,
            "categories": categories,
            "numeric": self.numeric,
            "item_history": self.item_history,
            "means": numbers.mean().fillna(0).tolist(),
            "scales": numbers.std(ddof=0).replace(0, 1).fillna(1).tolist(),
            "smallest": numbers.min().fillna(0).tolist(),
            "largest": numbers.max().fillna(0).tolist(),
            "time_mean": float(minutes.mean()),
            "time_scale": float(minutes.std()) or 1.0,
        }
        if self.item_history:
            state["item_quantiles"] = item_quantiles(table)
        return self.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> ClinicalDataPreprocessor:
        """Take over what `state_dict` gave. Raises ValueError where its parts do not fit together."""
        self._state = state
        self.categorical, self.numeric = state["categorical"], state["numeric"]
        self.item_history = state["item_history"]
        self.event_type_encoder = _one_hot(list(EVENT_TYPES))
        self.time_scaler = _scaler(state["time_mean"], state["time_scale"])
        self.static_encoders: dict[str, Any] = {}
        for column, categories in zip(self.categorical, state["categories"], strict=True):
            self.static_encoders[column] = _one_hot(categories)
        for column, mean, scale in zip(self.numeric, state["means"], state["scales"], strict=True):
            self.static_encoders[column] = _scaler(mean, scale)
        limits = zip(state["smallest"], state["largest"], strict=True)
        self._limits = dict(zip(self.numeric, limits, strict=True))  # least and greatest that training saw
        return self

    @property
    def static_names(self) -> list[tuple[str, str | None]]:
        """(S) pairs of column and category (None for a number): what each static input means."""
        names: list[tuple[str, str | None]] = []
        for column, categories in zip(self.categorical, self._state["categories"]):
            names += [(column, category) for category in categories]
        return names + [(column, None) for column in self.numeric]

    @property
    def static_dim(self) -> int:
        return len(self.static_names)

    def encode_event_type(self, event_types: Sequence[str]) -> np.ndarray:
        """(n) names -> (n, 5) one-hot float32; an unknown type is all zeros."""
        names = np.asarray(event_types, dtype=object).reshape(-1, 1)
        return self.event_type_encoder.transform(names).astype(np.float32)

    def encode_relative_time(self, minutes: np.ndarray) -> np.ndarray:
        """(n) minutes to the final event -> (n, 1) float32, mean 0 and scale 1 on the training events."""
        return self.time_scaler.transform(np.asarray(minutes, float).reshape(-1, 1)).astype(np.float32)

    def decode_hours(self, encoded: Tensor) -> Tensor:
        """Inverse of `encode_relative_time`, in hours, for a tensor of any shape."""
        return (encoded * float(self.time_scaler.scale_[0]) + float(self.time_scaler.mean_[0])) / 60

    def _numbers_of(self, stays: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
        """Return numeric columns as they are scaled: the number of events, which spans powers of ten, as logarithm."""
        numbers = stays[columns].astype(float)
        return numbers.assign(**{name: np.log1p(numbers[name]) for name in columns if name == "number_of_events"})

    def unknown_categories(self, stays: pd.DataFrame) -> dict[str, int]:
        """Return, by column with any, how many of the stays have a value that training never saw."""
        counts = {}
        for column in self.categorical:
            words = stays[column].dropna().astype(str)
            counts[column] = int((~words.isin(self.static_encoders[column].categories_[0])).sum())
        return without_zeros(counts)

    def encode_static_features(self, stays: pd.DataFrame, static_columns: Sequence[str] | None = None) -> np.ndarray:
        """Return (n, S) float32 of n stays, as `StayTable.static_columns`: one-hot groups, then numbers.

        `static_columns` names other columns. A missing number is the training mean. One beyond what training saw counts
        as the nearest seen: six hours into a stay few events have happened yet.
        """
        columns = [*self.categorical, *self.numeric] if static_columns is None else list(static_columns)
        if unknown := [column for column in columns if column not in self.static_encoders]:
            raise InputError(f"not among the static columns that the preprocessor was fitted on: {', '.join(unknown)}.")
        parts = [np.zeros((len(stays), 0)), *(self._encode_static(stays, column) for column in columns)]
        return np.hstack(parts).astype(np.float32)

    def _encode_static(self, stays: pd.DataFrame, column: str) -> np.ndarray:
        """Return one static column of n stays, (n, 1) or (n, categories)."""
        encoder = self.static_encoders[column]
        if column in self.categorical:
            words = with_unknown(stays[column]).astype(str)
            return encoder.transform(words.to_numpy(object).reshape(-1, 1))
        numbers = self._numbers_of(stays, [column]).to_numpy().clip(*self._limits[column])
        return np.nan_to_num(encoder.transform(numbers))

    def encode_history(self, table: StayTable) -> np.ndarray:
        """(n_events, len(HISTORY)) float32: `item_history` as the model reads it.

        Numbers are quantiles in -1..1 of the item's values in training, 0 where it has none.
        Raises KeyError if not fitted.
        """
        history, quantiles = item_history(table), self._state["item_quantiles"]
        encoded = np.zeros((len(history), len(HISTORY)), np.float32)
        numbers = history[list(STATISTICS)].to_numpy()  # (n_events, 6)
        for item, rows in history.groupby("item", sort=False, observed=True).indices.items():
            if item in quantiles:
                encoded[rows, : len(STATISTICS)] = quantiles_in(quantiles[item], numbers[rows])
                encoded[rows, HISTORY.index("has_value")] = np.isfinite(numbers[rows, 0])
        encoded[:, HISTORY.index("log_count")] = np.log1p(history["count"])
        encoded[:, HISTORY.index("is_latest")] = history["is_latest"]
        return encoded


def with_unknown(column: pd.Series) -> pd.Series:
    """Return the column as objects, Unknown where it is missing."""
    return column.astype(object).where(column.notna(), "Unknown")


def _one_hot(categories: Sequence[str]) -> OneHotEncoder:
    """Return a fitted encoder of these categories; an unknown one is all zeros."""
    encoder = OneHotEncoder(
        categories=[np.array(categories, dtype=object)],
        sparse_output=False,
        handle_unknown="ignore",
    )
    return encoder.fit(np.array([[categories[0]]], dtype=object))


def _scaler(mean: float, scale: float) -> StandardScaler:
    """Return a fitted scaler of one number."""
    scaler = StandardScaler()
    scaler.mean_ = np.array([mean])
    scaler.scale_ = np.array([scale])
    scaler.var_ = np.array([scale**2])
    scaler.n_features_in_ = 1
    return scaler


N_QUANTILES = 65
DIGITS = r"\d+(?:\.\d+)?(?:e-?\d+)?"  # 4, 4.1 or 1.1e-05, as SQL writes a rate below 0.0001
NUMBER = rf"(?<![\w.]){DIGITS}"  # also before a unit, but not the 2 of PaO2
MEASUREMENT = re.compile(rf"(\| (Value|Rate|Dose|Amount): [<>]?)(-?{DIGITS})(?= |$)([^|]*)")  # number and unit


def without_numbers(text: str) -> str:
    return re.sub(NUMBER, "#", text)


def item_of(text: str) -> str:
    """What an event is, without its numbers: `Lab: Lactate (Blood, Blood Gas) | Value: 5.2 ...` -> up to the bar."""
    head = re.sub(rf"{NUMBER}(?![\w-])\s*%?", "", text.split(" | ", 1)[0])
    return " ".join(head.split())


def parse_value(text: str) -> tuple[str, float]:
    """Item with its unit, and number of an event's text; NaN where it has no number. An amount counts last."""
    item, found = item_of(text), MEASUREMENT.findall(text)
    if not found:
        return item, math.nan
    _, _, number, unit = min(found, key=lambda parts: parts[1] == "Amount")
    return f"{item} {unit.strip()}".strip(), float(number)


def without_value(text: str) -> str:
    """The text with its numbers masked, for a model that has them from the item's history."""
    return MEASUREMENT.sub(r"\1#\4", text)


def items_and_values(table: StayTable) -> tuple[pd.Categorical, np.ndarray]:
    """(n_events) item and number of each event; every distinct text is read once."""
    used, text_of_event = np.unique(table.text, return_inverse=True)
    parsed = pd.DataFrame(map(parse_value, table.texts[used]), columns=["item", "value"])
    items = pd.Categorical(parsed["item"])
    return items[text_of_event], parsed["value"].to_numpy(float)[text_of_event]


def item_hash(text: str) -> str:
    """Return eight bytes, in hex, that tell whether two texts are of one item and cannot be read back."""
    return hashlib.md5(item_of(text).encode()).hexdigest()[:16]


def item_quantiles(table: StayTable) -> dict[str, list[float]]:
    """At most 65 quantiles of each item's values over the training events, sorted."""
    items, values = items_and_values(table)
    grid = np.linspace(0, 1, N_QUANTILES)
    groups = pd.Series(values).dropna().groupby(items[np.isfinite(values)], observed=True)
    return {item: np.quantile(group, grid, method="nearest").tolist() for item, group in groups}


def quantiles_in(sorted_values: Sequence[float], numbers: np.ndarray) -> np.ndarray:
    """Where numbers of any shape lie among sorted values: -1 below all, 0 at the median, 1 above all; NaN becomes 0."""
    below = np.searchsorted(sorted_values, numbers, "left")
    up_to = np.searchsorted(sorted_values, numbers, "right")
    return np.where(np.isfinite(numbers), (below + up_to) / len(sorted_values) - 1, 0)


# What the model reads of an event's item; see `item_history`.
STATISTICS = ("value", "minimum", "maximum", "mean", "first", "previous")
HISTORY = (*STATISTICS, "has_value", "log_count", "is_latest")


def item_history(table: StayTable) -> pd.DataFrame:
    """(n_events) What each event's item was in its stay until then, the event included, in the units of its text.

    `item`, then its STATISTICS (NaN without a number; the first value's previous is itself), `count`,
    `hours_since_previous` (NaN at the first), and `is_latest`: no event of the item follows.
    """
    items, values = items_and_values(table)
    key = pd.Series(table.stay_of_event.astype(np.int64) * max(len(items.categories), 1) + items.codes)
    value, hours = pd.Series(values), pd.Series(table.minutes_since_intime.astype(float) / 60)
    of_item = value.groupby(key, sort=False)
    n_values = value.notna().groupby(key, sort=False).cumsum()
    return pd.DataFrame(
        {
            "item": items,
            "value": value,
            "minimum": of_item.cummin(),
            "maximum": of_item.cummax(),
            "mean": of_item.cumsum() / n_values,
            "first": of_item.transform("first").where(value.notna()),
            "previous": of_item.shift(1).fillna(value),
            "count": of_item.cumcount() + 1,
            "hours_since_previous": hours - hours.groupby(key, sort=False).shift(1),
            "is_latest": ~key.duplicated(keep="last"),
        }
    )


# ---------------------------------------------------------------------------------------------------------------------
# Text embedding: every distinct text becomes a vector once, kept under the text's MD5
# ---------------------------------------------------------------------------------------------------------------------

PLAN_CHUNK = 2_048  # texts tokenised at a time: bounds memory, and several processes share the chunks
KEY = np.dtype("V16")  # an MD5 as one value; numpy's strings would lose the zero bytes at its end


Batch = tuple[np.ndarray, list]  # numbers of texts and their tokens
T = TypeVar("T")


class EncoderUnreachable(InputError):
    """The text encoder's weights are neither on this machine nor can they be downloaded."""


def clean_text(text: Any) -> str:
    """Return the text itself, or the empty string where it is missing (None, NaN)."""
    if isinstance(text, str):
        return text
    return "" if pd.isna(text) else str(text)


def without_surrogates(text: str) -> str:
    """Return the text with question marks for lone surrogates, which no tokenizer takes."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def text_keys(texts: Iterable[str]) -> np.ndarray:
    """Return the MD5 of each text's UTF-8, lone surrogates included: (n,) keys of 16 bytes."""
    encoded = (text.encode("utf-8", "surrogatepass") for text in texts)
    return np.frombuffer(b"".join(hashlib.md5(text, usedforsecurity=False).digest() for text in encoded), KEY)


def text_numbers(texts: Iterable[str]) -> np.ndarray:
    """Return the first half of each text's MD5 as a number, (n,) int64: enough to tell which texts were seen before."""
    return text_keys(texts).view("<i8").reshape(-1, 2)[:, 0].copy()


def single_file_name(key: np.void) -> str:
    """Return the name of a vector's file in the earlier layout."""
    return f"{key.tobytes().hex()}.npy"


class EmbeddingCache:
    """Vectors of one encoder on disk, keyed by the text's MD5.

    Each append makes one immutable part, `part-<time>-<id>/` with `keys.npy` (n, 16) uint8 and `vectors.npy` (n, dim)
    float32, written whole: several processes may append, and a killed one leaves no half part. Vectors are
    memory-mapped, only keys are read. Row numbers from `locate` stay valid for the life of the object.
    A part that is cut short, of another dimension or not plain arrays is ignored with a warning: its texts are missing.
    """

    def __init__(self, folder: Path, dim: int, legacy_folders: Sequence[Path] = ()) -> None:
        self.folder, self.dim = Path(folder), dim
        self.legacy_folders = [self.folder, *legacy_folders]  # may hold single <md5>.npy files
        self._seen: set[str] = set()  # names of the parts taken in
        self._parts: list[np.ndarray] = []  # their vectors, memory-mapped
        self._ends = np.zeros(0, np.int64)  # row number behind the last row of each part
        self._keys = np.zeros(0, KEY)  # of all rows
        self.refresh()

    def refresh(self) -> None:
        """Take in the parts that any process has added since the last look."""
        self._is_stale, keys, damaged = False, [self._keys], []
        for path in sorted(self.folder.glob("part-*")):
            if path.name in self._seen:
                continue
            self._seen.add(path.name)
            try:
                part_keys, vectors = self._open_part(path)
            except Exception:  # numpy parses a damaged header as Python text, and many things can go wrong there
                damaged.append(path.name)
                continue
            keys.append(part_keys)
            self._parts.append(vectors)
        if damaged:
            logger.warning(
                f"{len(damaged)} damaged parts of the embedding cache are ignored, their texts are encoded anew: "
                + ", ".join(damaged[:3])
            )
        self._keys = np.concatenate(keys)
        self._ends = np.cumsum([len(vectors) for vectors in self._parts], dtype=np.int64)
        # Of equal keys the later part's counts.
        self._sorted_keys, from_end = np.unique(self._keys[::-1], return_index=True)
        self._sorted_rows = len(self._keys) - 1 - from_end

    def _open_part(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """Return a part's keys (n,) and memory-mapped vectors (n, dim); raises anything where it is damaged."""
        keys = np.load(path / "keys.npy", allow_pickle=False)
        vectors = np.load(path / "vectors.npy", mmap_mode="r", allow_pickle=False)
        are_keys = keys.dtype == np.uint8 and keys.shape == (len(vectors), 16)
        are_vectors = vectors.dtype == np.float32 and vectors.shape == (len(keys), self.dim)
        if not are_keys or not are_vectors:
            raise ValueError("not a part of this cache")
        one_value_each = np.ascontiguousarray(keys).view(KEY)  # (n, 1)
        return one_value_each[:, 0], np.asarray(vectors)

    def locate(self, keys: np.ndarray) -> np.ndarray:
        """Return the row number of each key, -1 where there is none: (n,) int64."""
        if self._is_stale:
            self.refresh()
        n_keys = len(self._sorted_keys)
        if n_keys == 0:
            return np.full(len(keys), -1)
        place = np.searchsorted(self._sorted_keys, keys).clip(max=n_keys - 1)
        is_found = self._sorted_keys[place] == keys
        return np.where(is_found, self._sorted_rows[place], -1)

    def missing(self, keys: np.ndarray) -> np.ndarray:
        """Return (n,) True where a key has no vector."""
        return self.locate(keys) < 0

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors of rows that `locate` found: (n,) -> (n, dim) float32. Raises KeyError for a -1."""
        if (n_missing := (rows < 0).sum()) > 0:
            raise KeyError(f"{n_missing} of {len(rows)} texts have no vector in {self.folder}")
        vectors = np.empty((len(rows), self.dim), np.float32)
        part_of_row = np.searchsorted(self._ends, rows, side="right")
        for part in np.unique(part_of_row):
            here = part_of_row == part
            first_row = self._ends[part] - len(self._parts[part])
            vectors[here] = self._parts[part][rows[here] - first_row]
        return vectors

    def gather(self, keys: np.ndarray) -> np.ndarray:
        """Return the keys' vectors, (n, dim) float32. Raises KeyError where a key has none."""
        return self.take(self.locate(keys))

    def mapped(self, keys: np.ndarray) -> np.ndarray:
        """Return what `gather` does, memory-mapped from one file that all processes share and later runs find again."""
        path = self.folder / f"gathered-{hashlib.md5(keys.tobytes()).hexdigest()}"
        try:
            with hold(self.folder):  # of several processes the first one writes
                if not path.exists():
                    self._write_gathered(path, keys)
        except InputError:  # the folder is not ours to write to, or full
            return self.gather(keys)
        return np.memmap(path, np.float32, "c", shape=(len(keys), self.dim))

    def _write_gathered(self, path: Path, keys: np.ndarray) -> None:
        """Write the keys' vectors to one file; of such files, each as large as the vectors, three are kept."""
        self.refresh()  # other processes have done their share
        rows = self.locate(keys)

        def write(name: Path) -> None:
            with open(name, "wb") as file:
                for start in range(0, len(rows), 16_384):
                    self.take(rows[start : start + 16_384]).tofile(file)

        for of_other_texts in sorted(self.folder.glob("gathered-*"), key=os.path.getmtime)[:-2]:
            remove(of_other_texts)
        write_whole(path, write)

    def append(self, keys: np.ndarray, vectors: np.ndarray) -> None:
        """Add (n,) keys and their (n, dim) float32 vectors as one part. Raises InputError for NaN or a full disk."""
        if vectors.shape != (len(keys), self.dim):
            raise ValueError(f"keys {keys.shape}, vectors {vectors.shape} do not fit a cache of dimension {self.dim}")
        if not np.isfinite(vectors).all():
            raise InputError("the text encoder gave NaN or infinity: its weights are damaged, or try float32")

        def write(part: Path) -> None:
            part.mkdir()
            np.save(part / "keys.npy", keys.view(np.uint8).reshape(-1, 16), allow_pickle=False)
            np.save(part / "vectors.npy", vectors.astype(np.float32), allow_pickle=False)

        with hold(self.folder):
            write_whole(self.folder / f"part-{time.time_ns():020d}-{uuid.uuid4().hex}", write)
        self._is_stale = True

    def adopt_legacy(self, keys: np.ndarray) -> None:
        """Copy vectors of single `<md5>.npy` files, (dim,) or (1, dim), into parts, for keys that have none yet."""
        n_damaged = 0
        for folder in filter(Path.is_dir, self.legacy_folders):
            files = {entry.name for entry in os.scandir(folder)}
            found = [key for key in keys[self.missing(keys)] if single_file_name(key) in files]
            for start in range(0, len(found), 50_000):  # bounds memory
                block = np.array(found[start : start + 50_000], KEY)
                vectors = np.stack([self._read_single(folder / single_file_name(key)) for key in block])
                is_good = np.isfinite(vectors).all(axis=1)
                n_damaged += (~is_good).sum()
                if is_good.any():
                    self.append(block[is_good], vectors[is_good])
        if n_damaged:
            logger.warning(
                f"{n_damaged} single .npy files are damaged or of another dimension, their texts are encoded"
            )

    def _read_single(self, path: Path) -> np.ndarray:
        """Return the (dim,) vector of a file of the earlier layout; NaN whatever is wrong with it."""
        try:
            return np.load(path, allow_pickle=False).astype(np.float32).reshape(self.dim)
        except Exception:
            return np.full(self.dim, np.nan, np.float32)


class TextEncoder:
    """What all encoders share: distinct texts only, planned in batches, cached. A subclass has `_load`, `_tokenise`
    (texts -> anything with a length), `_forward` (device number, tokenised texts -> (n, dim) float32) and these:

    id (for logs and metrics), dim, cache, n_encoded (texts encoded by this object).
    """

    id: str
    dim: int
    cache: EmbeddingCache
    flush_seconds = 30.0  # a killed run loses at most this much work
    budget = 200_000  # tokens in a batch
    max_tokens = 512  # of a text
    n_devices = 1
    n_encoded = 0

    def bytes_of_weights(self) -> int:
        """Return the size of the encoder's files on disk."""
        return 0

    def _load(self) -> None:
        """Make ready to encode. Raises InputError where the weights are unusable."""
        raise NotImplementedError

    def _tokenise(self, texts: Sequence[str]) -> list:
        """Return each text's tokens."""
        raise NotImplementedError

    def _forward(self, device_number: int, tokens: list) -> np.ndarray:
        """Return the vectors of tokenised texts: (n, dim) float32."""
        raise NotImplementedError

    def encode_event_text_batch(self, texts: Iterable[Any], batch_size: int = 32) -> np.ndarray:
        """Return the texts' vectors, (n, dim) float32; missing text is the empty string.

        Each distinct text is computed once and kept in the cache. A batch has at most as many tokens as `batch_size`
        texts of full length, so that short texts come by the hundred.
        """
        return self.cache.gather(self.embed(texts, progress=False, batch_size=batch_size))

    def vectors(self, texts: Iterable[Any]) -> np.ndarray:
        """Return the vectors of texts that `embed` has seen, (n, dim) float32. Raises KeyError for others."""
        self.cache.refresh()  # another process may have encoded them
        return self.cache.gather(text_keys(map(clean_text, texts)))

    def embed(
        self,
        texts: Iterable[Any],
        rank: int = 0,
        world: int = 1,
        progress: bool = True,
        batch_size: int = 64,
    ) -> np.ndarray:
        """See to it that every text is in the cache; return the texts' keys (n,).

        Of several processes each calls this with all texts and its rank, and has done its share when it returns.
        Batches are planned over all texts, cached or not: a run that was killed and started again forms the same
        batches and gives the same vectors, bit for bit. What is done is kept when the run is stopped.
        """
        texts = [clean_text(text) for text in texts]
        keys = text_keys(texts)
        chunks = self._chunks(texts, keys)[rank::world]
        own = np.concatenate([np.zeros(0, int), *chunks])
        self.cache.refresh()
        self.cache.adopt_legacy(keys[own])
        is_missing = np.zeros(len(texts), bool)
        is_missing[own] = self.cache.missing(keys[own])
        if is_missing.any():
            self._load()
            with Progress(total=int(is_missing.sum()), desc="encoding", unit=" texts", active=progress) as bar:
                self._fill_cache(keys, self._batches(texts, chunks, is_missing, batch_size), bar)
        return keys

    def _chunks(self, texts: list[str], keys: np.ndarray) -> list[np.ndarray]:
        """Return the numbers of the distinct texts, longest first, in chunks that are tokenised together."""
        _, distinct = np.unique(keys, return_index=True)
        if not len(distinct):
            return []
        lengths = np.array([len(texts[number]) for number in distinct])
        longest_first = distinct[np.argsort(-lengths, kind="stable")]
        size = min(PLAN_CHUNK, max(64, len(distinct) // 16))
        return np.array_split(longest_first, math.ceil(len(distinct) / size))

    def _fill_cache(self, keys: np.ndarray, batches: Iterable[Batch], bar: tqdm) -> None:
        """Encode the batches, and write what is done as a part of the cache every `flush_seconds`."""
        done: list[tuple[np.ndarray, np.ndarray]] = []  # keys and vectors of a batch
        flushed = time.monotonic()
        try:
            for numbers, vectors in self._encoded(batches):
                done.append((keys[numbers], vectors))
                self.n_encoded += len(numbers)
                bar.update(len(numbers))
                if time.monotonic() - flushed > self.flush_seconds:
                    self._keep(done)
                    flushed = time.monotonic()
        finally:  # also on Ctrl-C
            self._keep(done)

    def _keep(self, done: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Write the batches as one part of the cache, and empty the list."""
        if done:
            keys, vectors = zip(*done)
            self.cache.append(np.concatenate(keys), np.concatenate(vectors))
            done.clear()

    def _batches(
        self,
        texts: list[str],
        chunks: list[np.ndarray],
        is_missing: np.ndarray,
        batch_size: int,
    ) -> Iterator[Batch]:
        """Yield numbers of missing texts and their tokens, longest first, so that memory peaks at once."""
        budget = min(self.budget, batch_size * self.max_tokens)
        for chunk in chunks:
            if not is_missing[chunk].any():
                continue
            tokens = self._tokenise([texts[i] for i in chunk])
            lengths = np.array([len(text_tokens) for text_tokens in tokens])
            for batch in split_by_budget(lengths, budget):
                missing = [place for place in batch if is_missing[chunk[place]]]
                if missing:
                    yield chunk[missing], [tokens[place] for place in missing]

    def _encoded(self, batches: Iterable[Batch]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield numbers and vectors in the order of the batches; one thread per device, two batches ahead."""

        def encode(device: int, numbers: np.ndarray, tokens: list) -> tuple[np.ndarray, np.ndarray]:
            return numbers, self._forward(device, tokens)

        pools = [ThreadPoolExecutor(1) for _ in range(self.n_devices)]
        devices = cycle(enumerate(pools))
        started = (pool.submit(encode, device, *batch) for (device, pool), batch in zip(devices, batches))
        try:
            yield from in_order(started, 2 * self.n_devices)
        finally:
            for pool in pools:
                pool.shutdown(cancel_futures=True)


def in_order(started: Iterable[Future[T]], ahead: int) -> Iterator[T]:
    """Yield the results of work in the order in which it is started, some pieces ahead."""
    waiting: deque[Future[T]] = deque()
    for future in started:
        waiting.append(future)
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    for future in waiting:
        yield future.result()


def split_by_budget(lengths: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Yield batches of places, longest first, each with at most `budget` padded tokens and a quarter of padding."""
    order = np.argsort(-lengths, kind="stable")
    falling = lengths[order]
    start = 0
    while start < len(order):
        longest = max(1, falling[start])
        alike = np.searchsorted(-falling, -0.75 * longest, side="right") - start
        size = max(1, min(alike, budget // longest))
        yield order[start : start + size]
        start += size


def soft_bins(number: float, per_octave: int) -> list[tuple[int, int]]:
    """Return the two bins nearest to a number's magnitude and their whole weights, 16 together: near numbers share.

    Magnitude is the logarithm to base 2, straight between powers of 2, which any machine computes exactly.
    """
    mantissa, exponent = math.frexp(number + 1 / 64)  # below 1/64 all numbers are near 0
    place = (exponent + 2 * mantissa) * per_octave
    lower = math.floor(place)
    weight = round(16 * (place - lower))
    return [(lower, 16 - weight), (lower + 1, weight)]


class HashingTextEncoder(TextEncoder):
    """An encoder without weights: what a text says of its item, its numbers, words and character n-grams, hashed.

    "Level: far above range" means one thing of lactate and another of glucose, so each part of a text counts together
    with the item it stands behind. A vector is mostly that, and changes smoothly with the numbers, coarse and fine.
    Counts and the +-1 projection are whole numbers, exact in float32: the same vector on every machine, in any batch.
    A vector's elements have mean 0 and variance about 1 (norm about 28).
    """

    id, dim, n_features = "hashing", 768, 2**14
    bins_per_octave = (1, 4, 16)
    weights = np.sqrt(np.array([0.5, 0.15, 0.05, 0.3], np.float32))  # of items, words, characters, numbers

    def __init__(self, cache_dir: Path = Path("clinical_LF_precomp_emb")) -> None:
        self.cache = EmbeddingCache(Path(cache_dir) / "hashing-v5-768", self.dim)

    @staticmethod
    def _parts_of_item(text: str) -> list[str]:
        item, *parts = text.split(" | ")
        return [item, *(f"{item} {part}" for part in parts)]

    def _numbers_of_item(self, text: str) -> Iterator[tuple[str, int]]:
        """Words for the soft bins of each number behind the item, with their weights."""
        item, *parts = text.split(" | ")
        for part in parts:
            what = f"{item} {without_numbers(part)}"
            for place, number in enumerate(re.findall(NUMBER, part)):
                for per_octave in self.bins_per_octave:
                    for bin_number, weight in soft_bins(float(number), per_octave):
                        yield f"{what} {place} {per_octave} {bin_number}", weight

    def _load(self) -> None:
        counts = {"n_features": self.n_features, "norm": None, "dtype": np.float32}  # signed whole counts
        self._vectorizers = (
            HashingVectorizer(analyzer=self._parts_of_item, **counts),
            HashingVectorizer(token_pattern=r"[^\s|:(),]+", ngram_range=(1, 2), **counts),
            HashingVectorizer(analyzer="char_wb", ngram_range=(3, 4), **counts),
            FeatureHasher(self.n_features, input_type="pair", dtype=np.float32),
        )

    def _tokenise(self, texts: Sequence[str]) -> list[str]:
        return [without_surrogates(text).lower() for text in texts]

    def _forward(self, device_number: int, texts: list[str]) -> np.ndarray:
        vectors = np.zeros((len(texts), self.dim), np.float32)
        plain = [without_numbers(text) for text in texts]
        numbers = [list(self._numbers_of_item(text)) for text in texts]
        inputs = (plain, plain, plain, numbers)
        bits = hashing_bits(len(inputs), self.n_features, self.dim)
        for part, vectorizer in enumerate(self._vectorizers):
            counts = vectorizer.transform(inputs[part])  # (n, n_features) sparse
            used = np.unique(counts.indices)
            signs = bits[part, used].astype(np.float32) * 2 - 1  # (n_used, dim)
            squares = np.asarray(counts.multiply(counts).sum(axis=1)).reshape(-1, 1)
            projected = (counts[:, used] @ signs) / np.sqrt(np.maximum(squares, 1))
            vectors += self.weights[part] * projected
        return vectors


@cache
def hashing_bits(*shape: int) -> np.ndarray:
    """Return random 0 and 1, int8: numpy promises that no version changes what RandomState gives."""
    return np.random.RandomState(768).randint(0, 2, shape, np.int8)


class ClinicalTextEncoder(TextEncoder):
    """A frozen Hugging Face encoder; a text's vector is the last layer's output at the first (CLS) token, or what a
    sentence-transformers folder asks for (see `folder_pooling`).

    name: a hub id, downloaded once to `weights_dir` (Clinical-Longformer to `clinical_longformer/` there), or a folder.
    Vectors are kept in a folder of `cache_dir` of their own for each id, revision, pooling and max_tokens, for a local
    folder each content. They are reused whatever dtype ("auto", "float32", "bfloat16") or device made them.
    devices: None for all CUDA devices, else the CPU (Apple's GPUs are not used). Raises InputError when the weights are
    unusable, EncoderUnreachable when they are nowhere to be had; both when built with an empty cache, else when first
    needed. Runs no foreign code.
    """

    def __init__(
        self,
        name: str | Path = CLINICAL_LONGFORMER,
        revision: str | None = None,
        max_tokens: int = 512,
        cache_dir: Path = Path("clinical_LF_precomp_emb"),
        weights_dir: Path = Path("hf_cache"),
        devices: Sequence[str | torch.device] | None = None,
        dtype: str = "auto",
    ) -> None:
        self.name, self.revision, self.max_tokens = str(name), revision, max_tokens
        self._is_local = not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", self.name) or Path(self.name).is_dir()
        if self._is_local:
            self._folder = Path(self.name)
            self.id = f"{self._folder.resolve().name}@{folder_fingerprint(self._folder)}"
        else:
            self.id = self.name + (f"@{revision}" if revision else "")
            short = "clinical_longformer" if self.id == CLINICAL_LONGFORMER else as_file_name(self.id)
            self._folder = Path(weights_dir) / short
        self.pooling, self.dim = self._pooling_and_dim(Path(cache_dir))
        cache_folder = Path(cache_dir) / f"{as_file_name(self.id)}-{self.pooling}-{max_tokens}"
        is_default = (self.id, self.pooling, max_tokens) == (CLINICAL_LONGFORMER, "cls", 512)
        self.cache = EmbeddingCache(cache_folder, self.dim, [Path(cache_dir)] if is_default else [])
        devices = devices or [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
        self._devices = [torch.device(device) for device in devices]
        self._models: list[nn.Module] = []  # one for each device, once loaded
        self.n_devices, self._dtype = len(self._devices), encoder_dtype(dtype, self._devices[0])
        self.budget = 32_768 if self._devices[0].type == "cuda" else 2_048

    def _pooling_and_dim(self, cache_dir: Path) -> tuple[str, int]:
        """Return pooling and dimension: the model's own, or the cache's where its weights are no longer here."""
        if not self._is_local and not (self._folder / "config.json").is_file():
            for path in sorted(cache_dir.glob(f"{as_file_name(self.id)}-*-{self.max_tokens}/encoder.json")):
                described = read_description(path)
                if described.get("encoder") == self.id:
                    return described["pooling"], described["dim"]
        dim = self._config().hidden_size
        with usable_encoder(self._folder):
            return folder_pooling(self._folder), dim

    def _config(self) -> transformers.PretrainedConfig:
        """Return the model's configuration, downloaded first where it is not here."""
        if self._is_local and not (self._folder / "config.json").is_file():
            raise InputError(
                f"{self._folder} is no text encoder: a folder with config.json, weights and tokenizer is needed, "
                "as save_pretrained writes it"
            )
        if not self._is_local:
            download_encoder(self.name, self.revision, self._folder)
        with usable_encoder(self._folder):
            return transformers.AutoConfig.from_pretrained(self._folder, trust_remote_code=False)

    def bytes_of_weights(self) -> int:
        return sum(path.stat().st_size for path in self._folder.glob("*") if path.is_file())

    def _load(self) -> None:
        if self._models:
            return
        config = self._config()
        with usable_encoder(self._folder):
            tokenizer = transformers.AutoTokenizer.from_pretrained(self._folder, trust_remote_code=False)
            model, info = transformers.AutoModel.from_pretrained(
                self._folder,
                trust_remote_code=False,
                weights_only=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
            self._length_limit = min(self.max_tokens, token_limit(config, self._folder))
        if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):  # transformers makes up an empty one
            raise InputError(f"{self._folder} has no tokenizer: copy tokenizer.json (or vocab files) from its source")
        lost = [key for key in info["missing_keys"] if "pooler" not in key]
        if lost or config.is_encoder_decoder:
            raise InputError(f"{self._folder} holds no complete encoder: {len(lost)} of its weights are missing")
        self._tokenizer, self._pad = tokenizer, tokenizer.pad_token_id or 0
        self._n_tokens_known = model.get_input_embeddings().num_embeddings
        self._check_weights(model)
        self._window = common_window(config) if self._length_limit <= 1024 else None  # a longer band takes much memory
        if self._window is not None:
            model = longformer_as_roberta(model)
        model = model.to(self._dtype).eval().requires_grad_(False)
        is_fp32_on_cpu = self._devices[0].type == "cpu" and self._dtype == torch.float32
        if is_fp32_on_cpu and torch.backends.mkldnn.is_available():
            use_one_dnn(model)
        # the last device takes the model itself, the others copies of it
        others = [copy.deepcopy(model).to(device) for device in self._devices[:-1]]
        self._models = [*others, model.to(self._devices[-1])]

    def _check_weights(self, model: nn.Module) -> None:
        """Refuse weights other than those the cache was made with; describe them there, where nothing does."""
        path = self.cache.folder / "encoder.json"
        weights = model_fingerprint(model, self._tokenizer)
        described = read_description(path)
        if described.get("weights", weights) != weights:
            raise InputError(
                f"{self.cache.folder} holds vectors of other weights than {self._folder}: "
                "give the old weights, or move that cache folder away"
            )
        description = {
            "encoder": self.id,
            "revision": self.revision,
            "pooling": self.pooling,
            "max_tokens": self.max_tokens,
            "dim": self.dim,
            "weights": weights,
        }
        if described != description:
            write_json(path, description)

    def _tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        clean = [without_surrogates(text) for text in texts]
        options = {"truncation": True, "max_length": self._length_limit, "return_attention_mask": False}
        tokens = self._tokenizer(clean, **options)["input_ids"]
        return [text_tokens or [self._pad] for text_tokens in tokens]

    @torch.inference_mode()
    def _forward(self, device_number: int, tokens: list[list[int]]) -> np.ndarray:
        device = self._devices[device_number]
        texts = [torch.tensor(text_tokens) for text_tokens in tokens]
        ids = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=self._pad)  # (n, L)
        lengths = torch.tensor([len(text) for text in texts])
        is_token = torch.arange(ids.shape[1]) < lengths[:, None]  # (n, L)
        highest = int(ids.max())
        if highest >= self._n_tokens_known:
            raise InputError(
                f"{self._folder}: its tokenizer gives token number {highest}, its model knows {self._n_tokens_known}. "
                "They are of two models: copy both from one source."
            )
        mask = is_token.long() if self._window is None else band_mask(is_token, self._window)
        mask = mask if mask is None else mask.to(device)
        hidden = self._models[device_number](input_ids=ids.to(device), attention_mask=mask).last_hidden_state
        return pool_tokens(hidden.float(), is_token.to(device), self.pooling).cpu().numpy()


def make_text_encoder(settings: Settings, accelerator: Accelerator) -> TextEncoder:
    """Return the encoder of `--text-encoder`; of several processes each encodes on its own device."""
    cache_dir = Path(settings.cache_dir)
    if settings.text_encoder == HashingTextEncoder.id:
        return HashingTextEncoder(cache_dir)
    return ClinicalTextEncoder(
        settings.text_encoder,
        None if settings.text_encoder_revision == "main" else settings.text_encoder_revision,
        settings.max_text_tokens,
        cache_dir,
        weights_dir=Path(settings.hf_cache),
        devices=[accelerator.device] if accelerator.num_processes > 1 else None,
        dtype=settings.text_encoder_dtype,
    )


POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}


def folder_pooling(folder: Path) -> str:
    """Return how a model folder makes a text's vector: "cls", "mean" or "last" token, "-unit" behind it if normalised.

    A sentence-transformers folder says it in `1_Pooling/config.json` and `modules.json`; CLS where nothing is said.
    """
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return "cls"
    wishes = read_json(path)
    modes = [name for name, is_on in wishes.items() if name.startswith("pooling_mode_") and is_on]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise InputError(f"{path} asks for {' and '.join(modes) or 'nothing'}; known are {', '.join(POOLINGS)}, one.")
    modules = folder / "modules.json"
    listed = modules.read_text("utf-8") if modules.is_file() else ""
    if ".Dense" in listed:
        raise InputError(f"{modules} has a Dense layer behind the pooling, which is not run here: give another encoder")
    return POOLINGS[modes[0]] + ("-unit" if ".Normalize" in listed else "")


def pool_tokens(hidden: Tensor, is_token: Tensor, pooling: str) -> Tensor:
    """Return one vector per text: hidden (n, L, dim), is_token (n, L) -> (n, dim)."""
    mode, _, unit = pooling.partition("-")
    if mode == "cls":
        vectors = hidden[:, 0]
    elif mode == "mean":
        vectors = (hidden * is_token[:, :, None]).sum(1) / is_token.sum(1, keepdim=True)
    else:
        last = is_token.sum(1) - 1
        vectors = hidden[torch.arange(len(hidden), device=hidden.device), last]
    return F.normalize(vectors, dim=1) if unit else vectors


class OneDnnLinear(nn.Module):
    """A Linear through oneDNN, as bfloat16 has it anyway: on AMD processors twice as fast as MKL, torch's choice."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")


def use_one_dnn(model: nn.Module) -> None:
    """Put a OneDnnLinear in the place of every Linear of the model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, OneDnnLinear(child))


def common_window(config: transformers.PretrainedConfig) -> int | None:
    """Return a Longformer's attention window if all its layers have the same; None for any other model."""
    windows = set(config.attention_window) if config.model_type == "longformer" else set()
    return windows.pop() if len(windows) == 1 else None


def band_mask(is_token: Tensor, window: int) -> Tensor | None:
    """Return Longformer's local attention as a mask for SDPA, True where attention may look; None for everywhere.

    is_token (n, L) bool -> (n, 1, 1, L) while the window covers every pair of tokens, else (n, 1, L, L).
    """
    length = is_token.shape[1]
    if length <= window // 2 + 1:
        return None if is_token.all() else is_token[:, None, None, :]
    place = torch.arange(length)
    distance = (place[:, None] - place[None, :]).abs()  # (L, L)
    in_window = (distance <= window // 2) & is_token[:, None, :]  # (n, L, L)
    is_self = distance == 0  # padding looks at itself, so that no softmax runs over nothing
    return (in_window | is_self)[:, None]


def longformer_as_roberta(longformer: nn.Module) -> nn.Module:
    """Return the same weights in RoBERTa's layers: without global attention (`*_global`) only the band differs."""
    names = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act "
        "max_position_embeddings type_vocab_size layer_norm_eps pad_token_id"
    )
    config = transformers.RobertaConfig(**{name: getattr(longformer.config, name) for name in names.split()})
    roberta = transformers.RobertaModel._from_config(config, attn_implementation="sdpa", add_pooling_layer=False)
    not_there = re.compile(r"_global\.|^pooler\.|position_ids$")
    kept = {name: weight for name, weight in longformer.state_dict().items() if not not_there.search(name)}
    roberta.load_state_dict(kept, strict=True)
    return roberta


KIN_OF_ROBERTA = "roberta xlm-roberta camembert longformer roberta-prelayernorm xlm-roberta-xl mpnet".split()


def token_limit(config: transformers.PretrainedConfig, folder: Path) -> int:
    """Return after how many tokens a text is cut: where the model's positions end, or where its folder wants it.

    RoBERTa's kin count positions from behind the padding token; a sentence-transformers folder has a wish of its own.
    """
    positions = getattr(config, "max_position_embeddings", None) or 1_000_000
    if config.model_type in KIN_OF_ROBERTA:
        positions -= config.pad_token_id + 1
    path = folder / "sentence_bert_config.json"
    wishes = read_json(path) if path.is_file() else {}
    return min(positions, wishes.get("max_seq_length") or positions)


def encoder_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the named dtype; "auto" is bfloat16 where the hardware multiplies it, else float32.

    It does on CUDA devices from Ampere, and on processors with AMX or AVX-512-BF16.
    """
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        checks = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
        has_bfloat16 = any(check() for check in checks if check)
    return torch.bfloat16 if has_bfloat16 else torch.float32


def as_file_name(encoder: str) -> str:
    """Return an encoder's id as the name of a folder."""
    return re.sub(r"[^\w.-]", "--", encoder)


def read_description(path: Path) -> dict[str, Any]:
    """Return what a cache folder's encoder.json says; nothing where it is missing or damaged."""
    try:
        return dict(read_json(path))
    except (OSError, ValueError, TypeError):
        return {}


def folder_fingerprint(folder: Path) -> str:
    """Return 12 hex digits that change with a model folder's files: names, sizes, first and last MB of each."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*")):
        if path.suffix in (".json", ".txt", ".model", ".safetensors", ".bin") and path.is_file():
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            with open(path, "rb") as file:
                digest.update(file.read(2**20))
                file.seek(max(0, path.stat().st_size - 2**20))
                digest.update(file.read(2**20))
    return digest.hexdigest()[:12]


def model_fingerprint(model: nn.Module, tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    """Return 12 hex digits of the loaded weights (a thousandth of them) and the vocabulary, whatever their files."""
    digest = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    for name, value in sorted(model.state_dict().items()):
        if not name.startswith("pooler."):  # never used, and random where the files have none
            digest.update(name.encode() + value.flatten()[::997].float().numpy().tobytes())
    return digest.hexdigest()[:12]


@contextlib.contextmanager
def usable_encoder(folder: Path) -> Iterator[None]:
    """Keep transformers quiet, and turn whatever it raises about a folder into an InputError."""
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise InputError(f"{folder} cannot be used as a text encoder ({type(error).__name__}: {reason})") from error
    finally:
        transformers.utils.logging.enable_progress_bar()
        transformers.utils.logging.set_verbosity(verbosity)


def download_encoder(name: str, revision: str | None, folder: Path) -> None:
    """Download a model's files (weights, config, tokenizer; no code) to `folder`, unless they are there.

    Goes on where it was stopped. Of several processes the first one downloads.
    """
    from huggingface_hub import HfApi, snapshot_download

    if (folder / "config.json").is_file():
        return
    partial = folder.with_name(f".{folder.name}.partial")
    with hold(folder.parent):
        if (folder / "config.json").is_file():  # another process was faster
            return
        try:  # one request without retries: on a machine without network this fails within seconds
            siblings = HfApi(token=False).model_info(name, revision=revision, timeout=10).siblings or []
            is_safe = any(re.match(r"model.*\.safetensors", file.rfilename) for file in siblings)
            wanted = ["*.json", "*.txt", "*.model", "model*.safetensors" if is_safe else "pytorch_model*.bin"]
            snapshot_download(name, revision=revision, local_dir=partial, token=False, allow_patterns=wanted)
            partial.rename(folder)
        except Exception as error:
            raise EncoderUnreachable(
                f"the text encoder {name} is neither in {folder} nor can it be downloaded ({type(error).__name__}). "
                f"Either copy its files there from a machine with network, where `hf download {name} --local-dir PATH` "
                "gets them (or give that folder as --text-encoder PATH), or run with --text-encoder hashing, which "
                "needs no weights"
            ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Dataset
# ---------------------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Where each of a batch's packed events belongs: the events of a stay stand together, oldest first."""

    lengths: list[int]  # events of each stay, known to the CPU: nobody waits for the device to say it
    ends: Tensor  # (B + 1) int32: the events of stay i are ends[i]:ends[i + 1]
    place: Tensor  # (N,) of each event in the flattened (B, L)
    attention_mask: Tensor  # (B, L)

    @property
    def position(self) -> Tensor:
        """(N,) the number of each event within its stay."""
        return self.place % self.attention_mask.shape[1]


def layout_of_lengths(lengths: np.ndarray, device: torch.device) -> Layout:
    """Return the layout of stays with these numbers of events, without waiting for the device."""
    counts = torch.from_numpy(lengths).to(device, non_blocking=True)  # (B,)
    ends = F.pad(counts.cumsum(0), (1, 0))  # (B + 1)
    n_events, longest = int(lengths.sum()), int(lengths.max())
    stay = torch.arange(len(lengths), device=device).repeat_interleave(counts, output_size=n_events)  # (N,)
    position = torch.arange(n_events, device=device) - ends[stay]  # (N,)
    attention_mask = torch.arange(longest, device=device) < counts.unsqueeze(1)  # (B, L)
    return Layout(lengths.tolist(), ends.int(), stay * longest + position, attention_mask)


def layout_of_mask(attention_mask: Tensor) -> Layout:
    """Return the layout of the events that a mask (B, L) of any number type marks in a padded batch."""
    attention_mask = attention_mask.bool()
    counts = attention_mask.sum(1)  # (B,)
    place = attention_mask.flatten().nonzero().squeeze(1)  # (N,)
    return Layout(counts.tolist(), F.pad(counts.cumsum(0), (1, 0)).int(), place, attention_mask)


def pack(padded: Tensor, layout: Layout) -> Tensor:
    """(B, L, D) -> (N, D): the real events alone."""
    return padded.flatten(0, 1).index_select(0, layout.place)


def unpack(packed: Tensor, layout: Layout) -> Tensor:
    """(N, D) packed events -> (B, L, D), zeros at padding."""
    n_stays, longest = layout.attention_mask.shape
    padded = packed.new_zeros(n_stays * longest, packed.shape[1])
    return padded.index_copy(0, layout.place, packed).unflatten(0, (n_stays, longest))


class PackedStays(NamedTuple):
    """A batch of stays without padding: what the model is trained on and scores."""

    events: Tensor  # (N, input_dim)
    static_features: Tensor  # (B, S)
    labels: Tensor  # (B, 1)
    layout: Layout


class ClinicalSequenceDataset(Dataset):
    """One item per ICU stay, whole: `(sequence (L, 5 + E + 1), static (S,), label (1,))`, oldest event first.

    The columns of an event are its type (5), its text vector (E, 768 for Clinical-Longformer), its time (1) and, with
    `--item-history`, its HISTORY (9). All tensors live where the text vectors live; `packed` gives
    batches without padding, made there.
    """

    def __init__(
        self,
        table: StayTable,
        preprocessor: ClinicalDataPreprocessor,
        text_vectors: np.ndarray | Tensor,
    ) -> None:
        self.table, self.lengths = table, table.lengths
        self.text_vectors = torch.as_tensor(text_vectors)  # (n_texts, E)
        self.type_columns = self._here(preprocessor.encode_event_type((*EVENT_TYPES, "unknown")))  # (6, 5)
        self.event_type, self.text = self._here(table.event_type), self._here(table.text)  # (n_events,) each
        columns = [preprocessor.encode_relative_time(table.minutes_to_end)]
        if preprocessor.item_history:
            columns.append(preprocessor.encode_history(table))
        self.event_columns = self._here(np.hstack(columns))  # (n_events, 1 or 10), time first
        self.offsets = self._here(table.offsets)
        self.static = self._here(preprocessor.encode_static_features(table.static_columns))  # (n_stays, S)
        self.labels = self._here(table.labels.astype(np.float32)).unsqueeze(1)  # (n_stays, 1)

    def _here(self, array: np.ndarray) -> Tensor:
        """The array as a tensor where the text vectors live."""
        return torch.from_numpy(array).to(self.device)

    @property
    def device(self) -> torch.device:
        return self.text_vectors.device

    @property
    def input_dim(self) -> int:
        return len(EVENT_TYPES) + self.text_vectors.shape[1] + self.event_columns.shape[1]

    @property
    def n_history(self) -> int:
        return self.event_columns.shape[1] - 1  # all but the time

    @property
    def share_of_variance(self) -> Tensor:
        """(6 + E,) How much of an event's variance each normalised column is given: the text's have three quarters."""
        n_types, n_text = len(EVENT_TYPES), self.text_vectors.shape[1]
        share = torch.full((n_types + n_text + 1,), 0.25 / (n_types + 1))
        share[n_types:-1] = 0.75 / n_text
        return share

    def __len__(self) -> int:
        return len(self.table.stays)

    def __getitem__(self, stay: int) -> tuple[Tensor, Tensor, Tensor]:
        rows = slice(self.table.offsets[stay], self.table.offsets[stay + 1])
        return self.events(rows), self.static[stay], self.labels[stay]

    def events(self, rows: slice | Tensor) -> Tensor:
        """(n, input_dim): the model's inputs for some rows of the flat event arrays."""
        types = self.type_columns[self.event_type[rows].long()]  # (n, 5)
        texts = self.text_vectors[self.text[rows].long()]  # (n, E)
        return torch.cat([types, texts, self.event_columns[rows]], dim=1)

    def packed(self, stays: np.ndarray) -> PackedStays:
        """A batch of these stays; what is sent to the device is the stays' numbers and lengths."""
        layout = layout_of_lengths(self.lengths[stays], self.device)
        numbers = torch.from_numpy(stays).to(self.device, non_blocking=True)  # (B,)
        stay_of_event = layout.place // layout.attention_mask.shape[1]  # (N,)
        rows = self.offsets[numbers][stay_of_event] + layout.position  # (N,)
        return PackedStays(self.events(rows), self.static[numbers], self.labels[numbers], layout)


def collate_stays(items: Sequence[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
    """Pad to the longest stay; `attention_mask (B, L)` is True at real events."""
    sequences, static, labels = zip(*items)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return {
        "sequences": nn.utils.rnn.pad_sequence(list(sequences), batch_first=True),  # (B, L, input_dim)
        "static_features": torch.stack(static),  # (B, S)
        "labels": torch.stack(labels),  # (B, 1)
        "attention_mask": torch.arange(int(lengths.max())) < lengths.unsqueeze(1),  # (B, L)
    }


def pack_stays(padded: dict[str, Tensor]) -> PackedStays:
    """Return what `collate_stays` gave, without its padding."""
    layout = layout_of_mask(padded["attention_mask"])
    events = pack(padded["sequences"], layout)
    return PackedStays(events, padded["static_features"], padded["labels"], layout)


def place_vectors(text_vectors: np.ndarray, where: str, device: torch.device) -> Tensor:
    """(n_texts, E) on the device (auto: if they take less than half of its free memory), or left where they are."""
    vectors = torch.from_numpy(text_vectors)
    fits = False
    if where == "auto" and device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        fits = vectors.nbytes < free / 2
    return vectors.to(device) if where == "device" or fits else vectors


N_WORKERS = 4  # a thread gathers an event's 3 kB in about a microsecond; four of them keep a GPU busy


def packed_batches(
    dataset: ClinicalSequenceDataset,
    batches: Sequence[np.ndarray],
    device: torch.device,
) -> Iterator[PackedStays]:
    """Yield the batches of stays on the device; where the vectors are not, threads gather ahead in pinned memory."""
    if dataset.device.type == device.type:
        yield from map(dataset.packed, batches)
        return

    def gather(stays: np.ndarray) -> PackedStays:
        batch = dataset.packed(stays)
        return batch._replace(events=batch.events.pin_memory())

    with ThreadPoolExecutor(N_WORKERS) as workers:
        started = (workers.submit(gather, stays) for stays in batches)
        for batch in in_order(started, N_WORKERS):
            yield send_to_device(batch, device, non_blocking=True)


def plan_batches(
    lengths: np.ndarray,
    batch_size: int,
    max_events: int,
    seed: int | None = None,
    world: int = 1,
) -> list[np.ndarray]:
    """Return the stays of each batch, each stay once: in random order with a seed, else the longest first.

    A batch holds at most `batch_size` stays, its longest first, and each of `world` processes at most `max_events`
    events of it (a longer stay is alone). In training, lengths mix: batches of stays of similar length cost 0.004 of
    AUROC on real stays (with item history), and packed events need no such thing.
    """
    sizes = lengths.tolist()
    order = np.argsort(-lengths, kind="stable")
    if seed is not None:
        order = np.random.default_rng(seed).permutation(len(lengths))
    batches: list[list[int]] = [[]]
    for stay in order.tolist():
        batch = sorted([*batches[-1], stay], key=lambda member: -sizes[member])
        n_events = sum(sizes[member] for member in batch[::world])  # of the process that has most
        if len(batch) <= batch_size and (n_events <= max_events or len(batch) <= world):
            batches[-1] = batch
        else:
            batches.append([stay])
    return [np.array(batch) for batch in batches if batch]


def share_of_batch(batch: np.ndarray, rank: int, world: int) -> tuple[np.ndarray, float]:
    """This process's stays of a batch, and their weight: a process left without a stay computes one with weight 0."""
    share = batch[rank::world]
    return (share, 1.0) if len(share) else (batch[:1], 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


def sinusoidal_positions(positions: Tensor, d_model: int) -> Tensor:
    """(N,) positions of any size -> (N, D): Vaswani et al. 2017, section 3.5."""
    rates = torch.exp(torch.arange(0, d_model, 2, device=positions.device) * (-math.log(10000.0) / d_model))
    angles = positions.unsqueeze(1) * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


def full_precision(values: Tensor) -> torch.autocast:
    """A context in which autocast is off where the values are."""
    return torch.autocast(values.device.type, enabled=False)


def in_full_precision(layer: nn.Module, values: Tensor) -> Tensor:
    """Apply a layer in fp32 also under autocast: logits out of bf16 tie, and are up to 0.4 % off."""
    with full_precision(values):
        return layer(values.float())


def has_variable_length_kernel(query: Tensor) -> bool:
    """Whether the variable-length kernel takes (N, H, D/H): GPU since Ampere, half precision, width 8, 16, ... 256."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    width = query.shape[2]
    return width % 8 == 0 and width <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def attend_within_stays(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """Softmax attention of packed events (N, H, D/H), each within its own stay; memory grows with N, not its square.

    One variable-length kernel for the batch where there is one, else a fused call per run of stays of equal length.
    """
    if has_variable_length_kernel(query):
        from torch.nn.attention.varlen import varlen_attn  # here: it brings a compiler, two seconds of every start

        longest = max(layout.lengths)
        of_all = varlen_attn(query, key, value, layout.ends, layout.ends, longest, longest)
        return cast(Tensor, of_all)  # without the auxiliary output, which nobody asked for
    runs = [(len(list(alike)), length) for length, alike in groupby(layout.lengths) if length]
    sizes = [n_stays * length for n_stays, length in runs]
    attended = []
    for run, *parts in zip(runs, query.split(sizes), key.split(sizes), value.split(sizes)):
        q, k, v = (part.unflatten(0, run).transpose(1, 2) for part in parts)  # (n_stays, H, length, D/H)
        attended.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1))
    return torch.cat(attended) if attended else query


def attention_weights_within_stays(query: Tensor, key: Tensor, layout: Layout) -> Tensor:
    """(B, H, L, L) weights that `attend_within_stays` used, 0 in rows and columns of padding."""

    def padded(heads: Tensor) -> Tensor:  # (N, H, D/H) -> (B, L, H, D/H)
        return unpack(heads.float().flatten(1), layout).unflatten(2, heads.shape[1:])

    products = torch.einsum("bihd,bjhd->bhij", padded(query), padded(key))
    is_event = layout.attention_mask[:, None, None, :]
    weights = softmax_among(products / math.sqrt(query.shape[2]), is_event)
    return weights * is_event.transpose(2, 3)


def softmax_among(scores: Tensor, is_member: Tensor) -> Tensor:
    """Return the softmax of the last axis's members, 0 for all others, also where there is no member."""
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~is_member, lowest).softmax(-1) * is_member


LAYER_SCALE = 0.1


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer (Xiong et al. 2020) over packed events.

    What a layer adds starts small and is scaled per channel (LayerScale, Touvron et al. 2021): with a thousand stays a
    model first has to learn what each event says by itself, and context only as far as the data ask for it.
    """

    def __init__(self, d_model: int, n_heads: int, d_feedforward: int, dropout: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm_attention, self.norm_feedforward = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.query_key_value = nn.Linear(d_model, 3 * d_model)
        self.attention_output = nn.Linear(d_model, d_model)
        self.feedforward = nn.Sequential(
            nn.Linear(d_model, d_feedforward),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(d_feedforward, d_model),
        )
        self.dropout = nn.Dropout(dropout)
        self.attention_scale = nn.Parameter(torch.full((d_model,), LAYER_SCALE))
        self.feedforward_scale = nn.Parameter(torch.full((d_model,), LAYER_SCALE))

    def forward(self, events: Tensor, layout: Layout, maps: list[Tensor] | None = None) -> Tensor:
        """(N, D) -> (N, D); `maps` takes the attention weights (B, H, L, L)."""
        qkv = self.query_key_value(self.norm_attention(events))  # (N, 3 D)
        query, key, value = qkv.unflatten(1, (3, self.n_heads, -1)).unbind(1)  # (N, H, D/H) each
        if maps is not None:
            maps.append(attention_weights_within_stays(query, key, layout))
        attended = attend_within_stays(query, key, value, layout).flatten(1)  # (N, D)
        events = events + self.attention_scale * self.dropout(self.attention_output(attended))
        return events + self.feedforward_scale * self.dropout(self.feedforward(self.norm_feedforward(events)))


class AttentionPooling(nn.Module):
    """Multi-head attention of one learnable query over a stay's events.

    In training it is not shown a share of them, another one at each step: dropout of keys before the softmax (Li et al.
    2023, arXiv 2208.02646).
    """

    def __init__(self, d_model: int, n_heads: int, event_dropout: float = 0.0) -> None:
        super().__init__()
        self.n_heads, self.event_dropout = n_heads, event_dropout
        self.query_projection, self.key, self.value, self.output = (nn.Linear(d_model, d_model) for _ in range(4))

    def scores(self, query: Tensor, events: Tensor) -> Tensor:
        """query (B, 1, D), events (B, L, D) -> (B, H, L): its scaled similarity with each event's key, in fp32."""
        split = (self.n_heads, -1)
        with full_precision(events):
            q = self.query_projection(query.squeeze(1).float()).unflatten(1, split)  # (B, H, C)
            key = torch.einsum("bhc,hcd->bhd", q, self.key.weight.unflatten(0, split))  # (B, H, D)
            of_bias = (q * self.key.bias.unflatten(0, split)).sum(2, keepdim=True)  # (B, H, 1)
            return (key @ events.float().transpose(1, 2) + of_bias) / math.sqrt(q.shape[2])

    def forward(
        self,
        query: Tensor,
        events: Tensor,
        attention_mask: Tensor,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """query (B, 1, D), events (B, L, D) -> pooled (B, 1, D), weights (B, H, 1, L), all in fp32.

        `bias (B, H, 1, L)` is added to the scores. The query and what it pools pass the projections of keys and values,
        not each event: the numbers are the same, and padding costs next to nothing.
        """
        if self.training and self.event_dropout > 0:
            is_shown = torch.rand(attention_mask.shape, device=events.device) >= self.event_dropout  # (B, L)
            attention_mask = attention_mask & is_shown
        split = (self.n_heads, -1)
        with full_precision(events):
            scores = self.scores(query, events).unsqueeze(2)  # (B, H, 1, L)
            if bias is not None:
                scores = scores + bias
            weights = softmax_among(scores, attention_mask[:, None, None, :])
            shares = weights.squeeze(2)  # (B, H, L)
            pooled = shares @ events.float()  # (B, H, D)
            values = torch.einsum("bhd,hcd->bhc", pooled, self.value.weight.unflatten(0, split))  # (B, H, C)
            values = values + shares.sum(2, keepdim=True) * self.value.bias.unflatten(0, split)
            return self.output(values.flatten(1)).unsqueeze(1), weights


LATEST_BIAS = 4.0  # the latest event of each item weighs e^4 = 55 times an earlier one when training begins
EVENT_DROPOUT = 0.2  # where one event speaks for its item; where all events of an item speak, hiding some only harms


class ItemHistoryProjection(nn.Module):
    """Projects events with their history: what their numbers say depends on the text, as a low-rank product of the two.

    Quantiles enter in eight soft steps (piecewise linear encoding, Gorishniy et al. 2022, arXiv 2203.05556): an item's
    low and high values can then both be bad. The text stands for the item. Texts of any encoder look much alike, so its
    columns are whitened over the items of training (as sentence vectors are, Su et al. 2021, arXiv 2103.15316).
    """

    n_steps = 8
    item_axes: Tensor  # (5 + E, 5 + E), one axis a row

    def __init__(self, n_plain: int, d_model: int) -> None:
        super().__init__()
        n_quantiles, n_others = len(STATISTICS), len(HISTORY) - len(STATISTICS)
        n_numbers = n_quantiles * self.n_steps + n_others + 1
        self.parts = (n_plain - 1, 1, n_quantiles, n_others)
        self.text, self.numbers = nn.Linear(n_plain - 1, d_model), nn.Linear(n_numbers, d_model, bias=False)
        self.text_factor, self.number_factor = nn.Linear(n_plain - 1, d_model), nn.Linear(n_numbers, d_model)
        self.product = nn.Linear(d_model, d_model, bias=False)
        self.register_buffer("item_axes", torch.eye(n_plain - 1))

    def whiten(self, items: Tensor) -> None:
        """Take over the directions in which items (K, 5 + E), each once and normalised, differ, and how far."""
        centred = (items - items.mean(0)).double()
        variances, axes = torch.linalg.eigh(centred.T @ centred / len(items))
        largest = variances.max()
        is_known = variances > 1e-6 * largest  # in all others, items of training do not differ
        spread = (variances[is_known] + 1e-3 * largest).sqrt()
        self.item_axes.zero_()
        self.item_axes[: len(spread)] = (axes[:, is_known] / spread).T

    def of_item(self, projection: nn.Linear, text: Tensor) -> Tensor:
        """Project text (N, 5 + E) -> (N, D) by its whitened columns; in fp32, since whitening makes rounding loud.

        The axes join the weights, of which there are fewer than events.
        """
        with full_precision(text):
            return F.linear(text.float(), projection.weight @ self.item_axes, projection.bias)

    @property
    def bias(self) -> nn.Parameter:
        return self.text.bias

    def forward(self, events: Tensor) -> Tensor:
        """(N, 5 + E + 1 + 9) -> (N, D)."""
        text, time_to_end, quantiles, others = events.split(self.parts, dim=1)
        time_to_end = time_to_end / 5
        edges = torch.arange(self.n_steps, device=events.device)
        steps = ((quantiles.unsqueeze(2) + 1) * self.n_steps / 2 - edges).clamp(0, 1) - 0.5  # (N, 6, 8)
        has_value = others[:, :1]
        numbers = torch.cat([steps.flatten(1) * has_value, others, time_to_end], dim=1)  # (N, 52)
        product = self.product(self.of_item(self.text_factor, text) * self.number_factor(numbers))
        return self.of_item(self.text, text) + self.numbers(numbers) + product


class ClinicalTransformer(nn.Module):
    """Probability of death in hospital, from a stay's events and its static features.

    Pre-norm layers, inputs normalised by the training events' mean and spread and again after the projection, positions
    at a learnable small scale, a small query vector: tests/benchmarks/ablation.py measures what each is worth.
    """

    event_mean: Tensor  # (input_dim,)
    event_scale: Tensor  # (input_dim,)
    static_weight: Tensor  # (S,)

    def __init__(
        self,
        input_dim: int,
        static_dim: int,
        d_model: int = 256,
        n_layers: int = 4,
        n_heads: int = 8,
        d_feedforward: int = 512,
        n_pooling_heads: int = 4,
        dropout: float = 0.1,
        n_history: int = 0,
    ) -> None:
        super().__init__()
        self.architecture: dict[str, Any] = {
            "input_dim": input_dim,
            "static_dim": static_dim,
            "d_model": d_model,
            "n_layers": n_layers,
            "n_heads": n_heads,
            "d_feedforward": d_feedforward,
            "n_pooling_heads": n_pooling_heads,
            "dropout": dropout,
            "n_history": n_history,
        }
        self.n_plain = input_dim - n_history  # columns before those of an event's history
        self.register_buffer("event_mean", torch.zeros(input_dim))
        self.register_buffer("event_scale", torch.ones(input_dim))
        self.register_buffer("static_weight", torch.ones(static_dim))
        self.input_projection: ItemHistoryProjection | nn.Linear = (
            ItemHistoryProjection(self.n_plain, d_model) if n_history else nn.Linear(input_dim, d_model)
        )
        # An average event is all bias. Were that tiny, the LayerNorm would blow the smallest difference from it up,
        # and a path from the average event, as Integrated Gradients takes, would cross logits that no stay ever has.
        # Events with their history start out more alike: the same bias would drown what tells them apart.
        nn.init.normal_(self.input_projection.bias, std=0.3 if n_history else 1.0)
        self.input_norm = nn.LayerNorm(d_model)
        self.position_scale = nn.Parameter(torch.tensor(0.1))
        self.dropout = nn.Dropout(dropout)
        self.transformer_encoder = nn.ModuleList(
            EncoderLayer(d_model, n_heads, d_feedforward, dropout) for _ in range(n_layers)
        )
        self.final_norm = nn.LayerNorm(d_model)
        self.query_vector = nn.Parameter(0.02 * torch.randn(1, 1, d_model))
        self.attention_pooling = AttentionPooling(d_model, n_pooling_heads, EVENT_DROPOUT if n_history else 0.0)
        self.latest_bias = nn.Parameter(torch.full((n_pooling_heads,), LATEST_BIAS)) if n_history else None
        self.classifier = nn.Sequential(
            nn.Linear(d_model + static_dim, 256),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(256, 128),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(128, 1),
        )

    def set_input_statistics(
        self,
        mean: Tensor,
        scale: Tensor,
        static_weight: Tensor,
        items: Tensor | None = None,
    ) -> None:
        """Set mean and spread of the events' columns before their history, and the factor of each static column (S).

        A model with item history needs the training events' `items (K, 5 + E)`, type and text of each.
        """
        self.event_mean[: self.n_plain] = mean
        self.event_scale[: self.n_plain] = scale
        self.static_weight.copy_(static_weight)
        if isinstance(self.input_projection, ItemHistoryProjection) and items is not None:
            self.input_projection.whiten((items - mean[:-1]) / scale[:-1])

    def forward(
        self,
        sequences: Tensor,
        static_features: Tensor,
        attention_mask: Tensor | None = None,
        return_attention: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        """(B, L, input_dim), (B, S), (B, L) -> probability (B, 1); on request also the attention of this very pass.

        The dict holds `transformer_output (B, L, D)`, `pooling_weights (B, 4, 1, L)`, `query_vector (B, 1, D)` and
        `layer_attention_weights`, a list with (B, 8, L, L) per layer. The weights cost memory like the square of L.
        """
        logits, attention = self.score(sequences, static_features, attention_mask, return_attention)
        return (logits.sigmoid(), attention) if return_attention else logits.sigmoid()

    def logits(self, sequences: Tensor, static_features: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, 1): log-odds of death, what losses and attributions are computed on."""
        return self.score(sequences, static_features, attention_mask)[0]

    def score(
        self,
        sequences: Tensor,
        static_features: Tensor,
        attention_mask: Tensor | None = None,
        return_attention: bool = False,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Logits (B, 1), and the dict that `forward` describes; the layers' weights are there on request alone."""
        width = self.architecture["input_dim"]
        if sequences.ndim != 3 or sequences.shape[2] != width:
            shape = tuple(sequences.shape)
            raise InputError(f"sequences of shape {shape}: give (B, L, {width}), a single stay with B = 1.")
        if attention_mask is None:
            attention_mask = torch.ones(sequences.shape[:2], dtype=torch.bool, device=sequences.device)
        layout = layout_of_mask(attention_mask)
        return self.score_packed(pack(sequences, layout), static_features, layout, [] if return_attention else None)

    def score_packed(
        self,
        events: Tensor,
        static_features: Tensor,
        layout: Layout,
        maps: list[Tensor] | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The same for events without padding (N, input_dim), or for `rows` (N,) of fewer, each projected once.

        `maps` takes each layer's attention weights, as in `encode`.
        """
        outputs = unpack(self.encode_packed(events, layout, maps, rows), layout)  # (B, L, D)
        query = self.query_vector.expand(len(outputs), -1, -1)  # (B, 1, D)
        bias = None
        if self.latest_bias is not None:
            is_latest = events[:, self.n_plain + HISTORY.index("is_latest"), None]  # (N, 1)
            is_latest = unpack(is_latest if rows is None else is_latest[rows], layout)  # (B, L, 1)
            bias = (self.latest_bias * is_latest).transpose(1, 2).unsqueeze(2)  # (B, H, 1, L)
        pooled, pooling_weights = self.attention_pooling(query, outputs, layout.attention_mask, bias)
        inputs = torch.cat([pooled.squeeze(1), static_features * self.static_weight], dim=1)  # (B, D + S)
        attention = {
            "transformer_output": outputs,
            "pooling_weights": pooling_weights,
            "query_vector": query,
            "layer_attention_weights": maps,
        }
        return in_full_precision(self.classifier, inputs), attention

    def logits_of_rows(self, events: Tensor, rows: Tensor, static_features: Tensor) -> Tensor:
        """(n, 1) logits of n stays that consist of `rows` (n, L) of events (M, input_dim), with statics (n, S)."""
        layout = layout_of_lengths(np.full(len(rows), rows.shape[1]), events.device)
        return self.score_packed(events, static_features, layout, rows=rows.flatten())[0]

    def encode(self, sequences: Tensor, attention_mask: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """(B, L, input_dim) -> (N, D): the stays' real events, contextualised, without padding."""
        layout = layout_of_mask(attention_mask)
        return self.encode_packed(pack(sequences, layout), layout, maps)

    def encode_packed(
        self,
        events: Tensor,
        layout: Layout,
        maps: list[Tensor] | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """(N, input_dim) -> (N, D), contextualised; `maps` takes each layer's attention weights (B, H, L, L)."""
        normalised = (events - self.event_mean) / self.event_scale  # (N, input_dim)
        outputs = self.input_norm(self.input_projection(normalised))  # (N, D)
        outputs = outputs if rows is None else outputs[rows]
        positions = sinusoidal_positions(layout.position, outputs.shape[1])
        outputs = self.dropout(outputs + self.position_scale * positions)
        for layer in self.transformer_encoder:
            outputs = layer(outputs, layout, maps)
        return self.final_norm(outputs)


# ---------------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------------


def temporal_weights(hours_to_final_event: Tensor, attention_mask: Tensor, tau_hours: float) -> Tensor:
    """(B, L) -> (B, L): exp(-hours / tau), summing to 1 over a stay's events, by a softmax, which cannot underflow."""
    return softmax_among(-hours_to_final_event / tau_hours, attention_mask)


class TemporalAwareLoss(nn.Module):
    """BCE of the stay's logit, mixed with each event's own prediction of the outcome; recent events weigh more.

    The second part is target replication (Lipton et al. 2016, arXiv 1511.03677) with weights that fall off with time:
    (1 - weight) * BCE(stay) + weight * sum_i w_i * BCE(event i), w_i ~ exp(-hours_i / tau). Weight 0 is plain BCE.
    """

    def __init__(self, d_model: int, tau_hours: float = 24.0, weight: float = 0.3) -> None:
        super().__init__()
        self.tau_hours, self.weight = tau_hours, weight
        self.event_head = nn.Linear(d_model, 1) if weight else None

    def forward(
        self,
        logits: Tensor,
        events: Tensor,
        labels: Tensor,
        hours_to_final_event: Tensor,
        attention_mask: Tensor,
    ) -> Tensor:
        """(B, 1), (B, L, D), (B, 1), (B, L), (B, L) -> loss of each stay (B,)."""
        loss = F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="none").squeeze(1)
        if self.event_head is None:
            return loss
        event_logits = in_full_precision(self.event_head, events).squeeze(2)  # (B, L)
        outcomes = labels.expand_as(event_logits)
        event_loss = F.binary_cross_entropy_with_logits(event_logits, outcomes, reduction="none")
        weights = temporal_weights(hours_to_final_event, attention_mask, self.tau_hours)
        return (1 - self.weight) * loss + self.weight * (weights * event_loss).sum(1)


def evenness(values: Tensor, attention_mask: Tensor) -> Tensor:
    """How evenly a stay's events speak, 0..1 (B,): L1 / L2 (Hoyer 2004) of what they hand to the pooling heads.

    values (B, L, H, D/H). Of the events' distances from their mean: 1 where all lie equally far from it,
    2 sqrt(k - 1) / k where one of k says something and the others say the same. Few events of a stay matter to its
    outcome. A plain norm would say so too, but can push all to nothing before the first has been learnt; this one knows
    no scale.
    """
    values, is_event = values.float(), attention_mask.unsqueeze(2).float()  # (B, L, 1)
    n_events = is_event.sum(1).clamp(min=1)  # (B, 1)
    mean = (values * is_event.unsqueeze(3)).sum(1) / n_events.unsqueeze(2)  # (B, H, D/H)
    distances = (values - mean.unsqueeze(1)).norm(dim=3) * is_event  # (B, L, H)
    l1 = distances.sum(1) / n_events  # (B, H)
    l2 = (distances.square().sum(1) / n_events).clamp(min=1e-12).sqrt()  # (B, H)
    return (l1 / l2).mean(1)


class TrainingObjective(nn.Module):
    """Model and loss as one module, so that one wrapper synchronises the gradients of both."""

    def __init__(
        self,
        model: ClinicalTransformer,
        loss: TemporalAwareLoss,
        preprocessor: ClinicalDataPreprocessor,
        sparsity_weight: float = 0.2,
    ) -> None:
        super().__init__()
        self.model, self.loss = model, loss
        self.preprocessor, self.sparsity_weight = preprocessor, sparsity_weight

    def forward(self, batch: PackedStays | dict[str, Tensor], time_column: int) -> Tensor:
        """Loss of each stay of the batch (B,), packed or as `collate_stays` pads it."""
        stays = pack_stays(batch) if isinstance(batch, dict) else batch
        logits, attention = self.model.score_packed(stays.events, stays.static_features, stays.layout)
        outputs = attention["transformer_output"]  # (B, L, D)
        attention_mask = stays.layout.attention_mask  # (B, L)
        times = unpack(stays.events[:, time_column, None], stays.layout).squeeze(2)  # (B, L)
        hours = self.preprocessor.decode_hours(times)
        losses = self.loss(logits, outputs, stays.labels, hours, attention_mask)
        if not self.sparsity_weight:
            return losses
        pooling = self.model.attention_pooling
        values = pooling.value(outputs).unflatten(2, (pooling.n_heads, -1))  # (B, L, H, D/H)
        return losses + self.sparsity_weight * evenness(values, attention_mask)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and files
# ---------------------------------------------------------------------------------------------------------------------


def save_figure(path: Path, figure: Figure) -> Path:
    return write_whole(path, lambda name: figure.savefig(name, dpi=150, format="png"))


class Checkpoint(NamedTuple):
    """A trained model and all that is needed to apply and explain it."""

    model: ClinicalTransformer
    preprocessor: ClinicalDataPreprocessor
    settings: Settings
    text_encoder: str  # identity of the encoder its inputs came from
    patients: dict[str, list[int]]  # ids of the patients of each part of the split
    baseline: dict[str, Tensor]  # mean training event (input_dim,) and mean static features (S,)
    temperature: float  # probability = sigmoid(logit / temperature)
    state: dict[str, Any]  # everything that the file holds

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        return expit(logits / self.temperature)

    def is_new_item(self, texts: Iterable[str]) -> np.ndarray:
        """Return whether training never saw the item of each text: (n,) bool."""
        known = frozenset(self.state["training_items"])
        return np.array([item_hash(text) not in known for text in texts], dtype=bool)


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Load a checkpoint, executing nothing in it; the model is in eval mode. Raises `InputError` for any other file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint. Train first, or give the path of a best_model.pth.") from None
    except Exception as error:  # torch.load raises nearly anything for a damaged or hostile file
        raise InputError(
            f"{path}: not a checkpoint of this program, or damaged ({type(error).__name__}). Train again, or use "
            "another file."
        ) from None
    if not isinstance(state, dict) or state.get("program") != "clinical_LF" or not isinstance(state.get("format"), int):
        raise InputError(f"{path}: a checkpoint of another program. Give a best_model.pth that train.py wrote.")
    if state["format"] != CHECKPOINT_FORMAT:
        raise InputError(
            f"{path}: written by another version (format {state['format']}, this one reads {CHECKPOINT_FORMAT}). Train "
            "anew, or explain it with the train.py that wrote it."
        )
    try:
        model = ClinicalTransformer(**state["architecture"]).to(device)
        model.load_state_dict(state["model"])
        known = {entry.name for entry in fields(Settings)}
        settings = Settings(**{name: value for name, value in state["settings"].items() if name in known})
        preprocessor = ClinicalDataPreprocessor().load_state_dict(state["preprocessor"])
        if not (
            set(STATIC_COLUMNS) >= {*preprocessor.categorical, *preprocessor.numeric}
            and state["temperature"] > 0
            and model.architecture["static_dim"] == preprocessor.static_dim
            and {"train", "validation", "test"} <= set(state["patients"])
            and {"training_items", "training_texts"} <= set(state)
        ):
            raise ValueError
        return Checkpoint(
            model.eval(),
            preprocessor,
            check_settings(settings),
            state["text_encoder"],
            state["patients"],
            {name: mean.to(device) for name, mean in state["baseline"].items()},
            state["temperature"],
            state,
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(
            f"{path}: the checkpoint lacks parts or they do not fit together ({type(error).__name__}). Train again."
        ) from None


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def input_statistics(dataset: ClinicalSequenceDataset) -> tuple[Tensor, Tensor]:
    """Mean and scale (input_dim,) of the dataset's events. Scaled so, the text makes 3/4 of an event's variance.

    Scaling column by column would leave the time one voice among 774. A column that never varies keeps its size.
    """
    n_events, n_texts = len(dataset.text), len(dataset.text_vectors)
    n_of_type = torch.bincount(dataset.event_type, minlength=len(dataset.type_columns))
    parts = [
        weighted_sums(dataset.type_columns, n_of_type),
        weighted_sums(dataset.text_vectors, torch.bincount(dataset.text, minlength=n_texts)),
        weighted_sums(dataset.event_columns, torch.ones_like(dataset.text)),
    ]
    mean, mean_square = torch.cat(parts, dim=1).cpu() / n_events  # (input_dim,) each
    scale = (mean_square - mean.square()).clamp(min=0).sqrt()
    scale = torch.where(scale > 1e-6, scale, torch.ones_like(scale))
    share = dataset.share_of_variance
    return mean.float(), (scale[: len(share)] / (share * len(share)).sqrt()).float()


def items_of_events(dataset: ClinicalSequenceDataset) -> Tensor:
    """Return (K, 5 + E) type and text of each item among the events: texts that differ by their number are one."""
    used, first_event = np.unique(dataset.table.text, return_index=True)
    items = pd.Series(dataset.table.texts[used]).map(without_value)
    events = first_event[~items.duplicated()]
    rows = torch.from_numpy(events).to(dataset.device)
    return dataset.events(rows)[:, : -1 - dataset.n_history].cpu()


def weighted_sums(rows: Tensor, counts: Tensor) -> Tensor:
    """(n, C) rows, each of which counts so many times -> (2, C) float64: their sum and the sum of their squares."""
    sums = torch.zeros(2, rows.shape[1], dtype=torch.float64, device=rows.device)
    for block, count in zip(rows.split(65536), counts.double().split(65536)):
        values = block.double()
        sums += torch.stack([count @ values, count @ values.square()])
    return sums


# What a resumed run must share with the run it goes on from.
SETTINGS_OF_A_RUN = (
    "seed static_features item_history observation_hours gap_hours first_stay_only learning_rate batch_size "
    "max_events_per_batch weight_decay warmup_steps gradient_clip temporal_weight sparsity_weight tau_hours "
    "dropout weight_averaging"
).split()
# One number among forty flags goes unheard else: with weight 1 a tenth of the sample's true effect of age is learnt.
NUMBER_WEIGHT = 3.0


class TrainingData(NamedTuple):
    """What a model is trained on."""

    table: StayTable
    split: Split
    text_vectors: np.ndarray  # (n_texts, E)
    text_encoder: str  # identity of the encoder of the vectors


class Trainer:
    """One training run: what the loop needs, so that an epoch reads as the algorithm."""

    def __init__(
        self,
        settings: Settings,
        data: TrainingData,
        accelerator: Accelerator,
        draw_attention: Callable[[Path], Any] | None = None,
    ) -> None:
        """draw_attention: takes each attention file as it is written."""
        torch.manual_seed(settings.seed)
        self.settings, self.accelerator, self.draw_attention = settings, accelerator, draw_attention
        self.output, self.text_encoder = Path(settings.output_dir), data.text_encoder
        table, split = data.table, data.split
        train_table = table.take(split.train)
        self.preprocessor = ClinicalDataPreprocessor(settings.static_features, settings.item_history)
        self.preprocessor.fit(train_table)
        vectors = place_vectors(data.text_vectors, settings.vectors_on, accelerator.device)
        dataset_of = partial(ClinicalSequenceDataset, preprocessor=self.preprocessor, text_vectors=vectors)
        self.train_set = dataset_of(train_table)
        self.validation_set = dataset_of(table.take(split.validation))
        self.test_set = dataset_of(table.take(split.test)) if len(split.test) else None
        self.time_column = len(EVENT_TYPES) + vectors.shape[1]
        texts = table.texts[np.unique(train_table.text)]
        self.training_items = sorted({item_hash(text) for text in texts})
        self.training_texts = torch.from_numpy(np.sort(text_numbers(texts)))
        self.data_fingerprint = table.fingerprint()
        patient_ids = table.stays["patient_id"]
        self.patients = {name: patient_ids.iloc[part].unique().tolist() for name, part in split._asdict().items()}
        model = self.new_model()
        loss = TemporalAwareLoss(settings.d_model, settings.tau_hours, settings.temporal_weight)
        objective = TrainingObjective(model, loss, self.preprocessor, settings.sparsity_weight)
        rate, decay = settings.learning_rate, settings.weight_decay
        optimizer = torch.optim.AdamW(objective.parameters(), lr=rate, weight_decay=decay)
        self.average = AveragedModel(model.to(accelerator.device), multi_avg_fn=self.average_weights)
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)
        self.threads = ThreadPoolExecutor(2)  # write attention and read losses while training goes on
        self.writing: Future[None] | None = None
        self.history: list[dict[str, float]] = []
        self.step = self.epochs_done = 0
        self.temperature = 1.0

    def new_model(self) -> ClinicalTransformer:
        """A model with fresh weights that knows the training events' mean and spread."""
        model = ClinicalTransformer(
            self.train_set.input_dim,
            self.preprocessor.static_dim,
            **self.settings.sizes,
            n_history=self.train_set.n_history,
        )
        mean, scale = input_statistics(self.train_set)
        is_number = [category is None for _, category in self.preprocessor.static_names]
        static_weight = torch.where(torch.tensor(is_number), NUMBER_WEIGHT, 1.0)  # (S,)
        items = items_of_events(self.train_set) if self.train_set.n_history else None
        model.set_input_statistics(mean[: len(scale)], scale, static_weight, items)
        self.baseline = {"event": mean, "static": self.train_set.static.mean(0).cpu()}
        return model

    @property
    def model(self) -> ClinicalTransformer:
        """The averaged weights: what is validated, kept and explained."""
        return cast(ClinicalTransformer, self.average.module)

    def plan_epoch(self, epoch: int) -> list[np.ndarray]:
        """The stays of each step of an epoch, of all processes together."""
        settings, world = self.settings, self.accelerator.num_processes
        most = settings.max_events_per_batch
        return plan_batches(self.train_set.lengths, settings.batch_size, most, settings.seed + epoch, world)

    def train_epoch(self, epoch: int) -> float:
        """One pass over the training stays; mean loss of a stay. Depends on the seed and the epoch's number alone."""
        settings, rank, world = self.settings, self.accelerator.process_index, self.accelerator.num_processes
        torch.manual_seed(settings.seed + 100_003 * epoch + 17 * rank)
        lengths, batches = self.train_set.lengths, self.plan_epoch(epoch)
        shares = [share_of_batch(batch, rank, world) for batch in batches]
        loader = packed_batches(self.train_set, [stays for stays, _ in shares], self.accelerator.device)
        is_main = self.accelerator.is_main_process
        bar = Progress(loader, total=len(batches), desc=f"epoch {epoch}", unit=" batches", active=is_main)
        attention_every = max(settings.save_attention_every, math.ceil(len(batches) / MOST_ATTENTION_FILES))
        self.objective.train()
        unread: deque[tuple[np.ndarray, Future[Tensor]]] = deque()
        total_loss, n_stays, n_events = 0.0, 0, 0
        started = time.monotonic()
        for number, batch in enumerate(bar):
            stays, (share, weight) = batches[number], shares[number]
            self.set_learning_rate((epoch - 1 + number / len(batches)) / settings.max_epochs)
            losses = self.objective(batch, self.time_column) * weight  # (B,)
            # Processes average their gradients: scaled so, the average is the gradient of the whole batch's mean.
            loss = losses.sum() * (world / len(stays))
            self.optimizer.zero_grad()
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.objective.parameters(), settings.gradient_clip)
            self.optimizer.step()
            self.step += 1
            self.average.update_parameters(self.accelerator.unwrap_model(self.objective).model)
            unread.append((share, self.threads.submit(losses.detach().cpu)))
            if len(unread) > 1:  # the step before; to ask for this one now would leave the device without work
                total_loss += self.read_losses(*unread.popleft())
                rate = n_events / (time.monotonic() - started)
                bar.set_postfix_str(f"loss {total_loss * world / n_stays:.3f}, {rate:,.0f} events/s", refresh=False)
            n_stays += len(stays)
            n_events += int(lengths[stays].sum())
            if settings.save_attention_every and number % attention_every == 0 and is_main:
                self.save_attention(epoch, number, stays)
        total_loss += self.read_losses(*unread.popleft())
        sums = self.accelerator.reduce(torch.tensor([total_loss], device=self.accelerator.device))
        return float(sums[0]) / n_stays

    def read_losses(self, stays: np.ndarray, reading: Future[Tensor]) -> float:
        """The sum of the losses of a step, checked: the loop waits for the device only here."""
        losses = reading.result()
        self.stop_if_not_finite(losses, self.train_set, stays)
        return float(losses.sum())

    @torch.no_grad()
    def average_weights(
        self,
        averaged: tuple[Tensor, ...] | list[Tensor],
        current: tuple[Tensor, ...] | list[Tensor],
        n_averaged: Tensor | int,
    ) -> None:
        """Move the running mean of the weights; its memory grows with the steps, so that the beginning is forgotten."""
        decay = min(self.settings.weight_averaging, self.step / (self.step + 10))
        torch._foreach_lerp_(averaged, current, 1 - decay)

    def set_learning_rate(self, share_of_training: float) -> None:
        """Raise it linearly over the first steps, then lower it along half a cosine: no single validation decides.

        Where steps are few, the first tenth of them warms up.
        """
        warmth = min(1.0, max((self.step + 1) / max(self.settings.warmup_steps, 1), 10 * share_of_training))
        cosine = 0.5 * (1 + math.cos(math.pi * share_of_training))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * warmth * cosine

    def stop_if_not_finite(self, losses: Tensor, dataset: ClinicalSequenceDataset, stays: np.ndarray) -> None:
        """Raise `InputError` that names the first stays whose loss is not finite."""
        wrong = stays[~torch.isfinite(losses).numpy()][:5]
        if len(wrong):
            ids = ", ".join(map(str, dataset.table.stays["icu_stay_id"].iloc[wrong]))
            raise InputError(
                f"the loss is not finite for icu_stay_id {ids}. The best checkpoint so far stays in "
                f"{self.output / 'checkpoints'}. Lower --learning-rate and train anew, or --resume with "
                "--mixed-precision no."
            )

    def fit(self) -> None:
        """Train until the validation loss has rested for `patience` epochs; best_model.pth has the best weights."""
        if not self.epochs_done:
            self.save("latest_checkpoint.pth")
        while self.epochs_done < self.settings.max_epochs and not self.out_of_patience():
            started = time.monotonic()
            row: dict[str, float] = {"epoch": self.epochs_done + 1}
            row["train_loss"] = self.train_epoch(self.epochs_done + 1)
            row |= self.validate()
            row["learning_rate"] = self.optimizer.param_groups[0]["lr"]
            row["seconds"] = time.monotonic() - started
            self.history.append(row)
            self.log_epoch()
            self.epochs_done += 1
            if self.best_epoch == self.epochs_done:
                self.save("best_model.pth")
            self.save("latest_checkpoint.pth")
        self.finish_writing()

    def validate(self) -> dict[str, float]:
        """Loss and AUROC of the validation stays."""
        logits, labels = self.predict(self.validation_set), self.validation_set.table.labels
        self.stop_if_not_finite(torch.tensor(logits), self.validation_set, np.arange(len(logits)))
        loss = F.binary_cross_entropy_with_logits(torch.tensor(logits), torch.tensor(labels))
        return {"validation_loss": float(loss), "validation_auroc": float(roc_auc_score(labels, logits))}

    def log_epoch(self) -> None:
        """Log the newest epoch, write history.csv, and give the epoch to the trackers of --report-to."""
        row = dict(self.history[-1])
        epoch, seconds = int(row["epoch"]), row["seconds"]
        self.accelerator.log(row, step=epoch)
        if not self.accelerator.is_main_process:
            return
        frame = pd.DataFrame(self.history)
        write_whole(self.output / "history.csv", lambda path: frame.to_csv(path, index=False))
        best = "  best" if self.best_epoch == epoch else ""
        logger.info(
            f"epoch {epoch:2d}/{self.settings.max_epochs}  train loss {row['train_loss']:.4f}  "
            f"validation loss {row['validation_loss']:.4f}  AUROC {row['validation_auroc']:.3f}  "
            f"lr {row['learning_rate']:.1e}  {self.train_set.lengths.sum() / seconds:7,.0f} events/s  "
            f"{seconds:5.1f} s{best}"
        )

    def out_of_patience(self) -> bool:
        if not self.history:
            return False
        return self.epochs_done - self.best_epoch >= self.settings.patience

    @property
    def best_epoch(self) -> int:
        """The epoch with the lowest validation loss; the later of two that are equal."""
        return int(min(reversed(self.history), key=operator.itemgetter("validation_loss"))["epoch"])

    def predict(self, dataset: ClinicalSequenceDataset) -> np.ndarray:
        return predict_logits(self.model, dataset, self.settings, self.accelerator)

    def save(self, name: str) -> None:
        """Write a checkpoint: plain data and tensors only."""
        if not self.accelerator.is_main_process:
            return
        state = {
            "program": "clinical_LF",
            "format": CHECKPOINT_FORMAT,
            "settings": asdict(self.settings),
            "architecture": self.model.architecture,
            "model": self.model.state_dict(),
            "preprocessor": self.preprocessor.state_dict(),
            "text_encoder": self.text_encoder,
            "patients": self.patients,
            "data_fingerprint": self.data_fingerprint,
            "baseline": self.baseline,
            "training_items": self.training_items,
            "training_texts": self.training_texts,
            "temperature": self.temperature,
            "history": self.history,
            "epochs_done": self.epochs_done,
            "step": self.step,
        }
        if name == "latest_checkpoint.pth":
            state |= {
                "objective": self.accelerator.unwrap_model(self.objective).state_dict(),
                "n_averaged": self.average.n_averaged,
                "optimizer": self.optimizer.state_dict(),
            }
        write_whole(self.output / "checkpoints" / name, lambda path: torch.save(state, path))

    def resume(self) -> None:
        """Go on from latest_checkpoint.pth; refuses one whose data, encoder or model differ."""
        path = self.output / "checkpoints" / "latest_checkpoint.pth"
        if not path.exists():  # stopped before the first checkpoint, or in an earlier fold
            logger.warning(f"Resumed     nothing: {path} does not exist, training starts at epoch 1")
            return
        saved = load_checkpoint(path)  # on the CPU, where AdamW's step counts stay: read there, they cost no wait
        before, now = asdict(saved.settings), asdict(self.settings)
        changed = [name for name in SETTINGS_OF_A_RUN if before[name] != now[name]]
        same = (
            saved.state.get("data_fingerprint") == self.data_fingerprint
            and saved.patients == self.patients
            and saved.text_encoder == self.text_encoder
            and saved.model.architecture == self.model.architecture
        )
        if changed or not same:
            differences = ", ".join(changed) or "other data, patients, encoder or model sizes"
            raise InputError(
                f"{path}: this run differs from the one to resume ({differences}). Give the same settings, or train "
                "anew without --resume."
            )
        self.accelerator.unwrap_model(self.objective).load_state_dict(saved.state["objective"])
        self.model.load_state_dict(saved.state["model"])
        self.average.n_averaged.copy_(saved.state["n_averaged"])
        self.optimizer.load_state_dict(saved.state["optimizer"])
        self.history, self.step = saved.state["history"], saved.state["step"]
        self.epochs_done = saved.state["epochs_done"]
        logger.info(f"Resumed     after epoch {self.epochs_done} of {path}")

    def save_attention(self, epoch: int, batch: int, stays: np.ndarray) -> None:
        """Attention of one stay of the batch, in a pass of its own without dropout; written while training goes on."""
        stay = int(min(stays, key=lambda s: abs(int(self.train_set.lengths[s]) - 512)))
        record = attention_record(self.model, self.train_set, stay, self.accelerator.device)
        self.finish_writing()
        self.writing = self.threads.submit(self._write_attention, record, batch, epoch)

    def _write_attention(self, record: dict[str, Any], batch: int, epoch: int) -> None:
        path = save_attention_weights(record, batch, epoch, self.output / "attention_weights")
        if self.draw_attention:
            self.draw_attention(path)

    def finish_writing(self) -> None:
        """Wait for the attention that is being written, if any; what went wrong there is raised here."""
        if self.writing:
            self.writing.result()
        self.writing = None


MOST_ATTENTION_FILES = 5  # of an epoch
MAX_MAP_EVENTS, MAX_MAP_BINS = 1024, 64


@torch.no_grad()
def attention_record(
    model: ClinicalTransformer,
    dataset: ClinicalSequenceDataset,
    stay: int,
    device: torch.device,
) -> dict[str, Any]:
    """What `model(..., return_attention=True)` gives for a stay's last 1,024 events, and which events they are."""
    model.eval()
    sequence, static, _ = dataset[stay]
    sequence = sequence[-MAX_MAP_EVENTS:].to(device)
    probability, attention = model(sequence.unsqueeze(0), static.unsqueeze(0).to(device), return_attention=True)
    end = dataset.table.offsets[stay + 1]
    events = slice(end - len(sequence), end)
    attention["layer_attention_weights"] = [binned(weights) for weights in attention["layer_attention_weights"]]
    return attention | {
        "icu_stay_id": int(dataset.table.stays["icu_stay_id"].iloc[stay]),
        "probability": float(probability),
        "hours_to_final_event": dataset.table.minutes_to_end[events] / 60,
        "event_type": dataset.table.event_type[events],
    }


def binned(weights: Tensor) -> Tensor:
    """(B, H, L, L) -> (B, H, bins, bins): means over at most 64 equal bins of events."""
    return F.adaptive_avg_pool2d(weights, min(weights.shape[-1], MAX_MAP_BINS))


def save_attention_weights(
    attention_weights: dict[str, Any],
    batch_idx: int,
    epoch: int,
    save_dir: str | Path = "trained_models/clinical_LF/attention_weights",
) -> Path:
    """Write the attention of a pass (`return_attention=True`) as attention_epoch_{epoch}_batch_{batch_idx}.npz.

    Bounded however long the stays: layers' maps are binned and in half precision, `transformer_output` is left out.
    """
    arrays = {name: value for name, value in attention_weights.items() if name != "transformer_output"}
    maps = [binned(torch.as_tensor(weights).float()) for weights in arrays["layer_attention_weights"]]
    of_layers = torch.stack(maps).half() if maps else torch.zeros(0)  # (n_layers, B, H, bins, bins)
    arrays["layer_attention_weights"] = of_layers
    arrays = {name: torch.as_tensor(value).detach().cpu().numpy() for name, value in arrays.items()}

    def write(path: Path) -> None:
        with open(path, "wb") as file:  # savez would add a suffix to a path
            np.savez_compressed(file, **arrays)

    return write_whole(Path(save_dir) / f"attention_epoch_{epoch}_batch_{batch_idx}.npz", write)


def load_attention_weights(path: str | Path) -> dict[str, Any]:
    """Return what `save_attention_weights` wrote, as the `analyze_*` functions of the explainer take it.

    `pooling_weights (B, 4, 1, L)` are exact; `layer_attention_weights`, (B, 8, bins, bins) a layer, are means.
    """
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    arrays["layer_attention_weights"] = list(arrays["layer_attention_weights"].astype(np.float32))
    return arrays


@torch.no_grad()
def predict_logits(
    model: ClinicalTransformer,
    dataset: ClinicalSequenceDataset,
    settings: Settings,
    accelerator: Accelerator,
) -> np.ndarray:
    """(n_stays) float64 logits, each stay once however many processes there are."""
    model.eval()
    batches = plan_batches(dataset.lengths, 2 * settings.batch_size, settings.max_events_per_batch)
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    loader = packed_batches(dataset, mine, accelerator.device)
    parts = [torch.zeros(0, 1, device=accelerator.device)]  # a process may have no batch
    options = {"active": accelerator.is_main_process, "delay": 2}
    for batch in Progress(loader, total=len(mine), desc="predicting", unit=" batches", **options):
        with accelerator.autocast():
            parts.append(model.score_packed(batch.events, batch.static_features, batch.layout)[0])
    logits = torch.cat(parts).squeeze(1).cpu().double()
    scored = list(zip(np.concatenate([[], *mine]).tolist(), logits.tolist()))
    everywhere = gather_object(scored) if accelerator.num_processes > 1 else scored
    return np.array([logit for _, logit in sorted(everywhere)])


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation: discrimination, calibration, clinical use, subgroups, leakage
# ---------------------------------------------------------------------------------------------------------------------
# n stays, R bootstrap resamples, G distinct probabilities, k coefficients. Outcome 1 is death in hospital.

METRICS = ("auroc", "auprc", "brier", "calibration_intercept", "calibration_slope")
TOO_FEW = 10  # stays of either outcome, of a part as of a subgroup: with fewer, a figure is luck


def evaluate_predictions(
    labels: ArrayLike,
    probabilities: ArrayLike,
    patient_ids: ArrayLike,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Return figures of held-out predictions with 95 % intervals from resampling patients with all of their stays.

    labels (n,) 0/1, probabilities (n,) in [0, 1], patient_ids (n,). JSON-ready counts and, per name in METRICS,
    {"value", "low", "high"}; None where a figure does not exist (then with a "reason"). Resamples with one outcome only
    are skipped (all but Brier need both) and counted. Raises ValueError for lengths or values that make no sense.
    """
    died, risks = checked_predictions(labels, probabilities)
    n_stays, n_deaths = len(died), int(died.sum())
    figures_of = partial(weighted_metrics, labels=died, probabilities=risks)
    draws = bootstrap_draws(figures_of, patient_ids, n_stays, n_bootstrap, seed)  # (R, 5)
    values = figures_of(np.ones((1, n_stays)))[0] if n_stays else np.full(len(METRICS), np.nan)
    result: dict[str, Any] = {
        "n_stays": n_stays,
        "n_patients": len(np.unique(np.asarray(patient_ids))),
        "n_deaths": n_deaths,
        "prevalence": n_deaths / n_stays if n_stays else None,
        "n_bootstrap": n_bootstrap,
        "n_resamples_skipped": int(np.isnan(draws[:, 0]).sum()),
        "note": too_few_to_read(died),
    }
    return result | {name: with_interval(values[i], draws[:, i]) for i, name in enumerate(METRICS)}


def checked_predictions(labels: ArrayLike, probabilities: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return both as (n,) float64. Raises ValueError for what no prediction can be."""
    died, risks = np.asarray(labels, dtype=float).ravel(), np.asarray(probabilities, dtype=float).ravel()
    if len(died) != len(risks):
        raise ValueError(f"{len(died)} labels but {len(risks)} probabilities")
    if not np.isin(died, (0, 1)).all():
        raise ValueError("labels must be 0 or 1; leave out stays whose outcome is unknown")
    if not ((risks >= 0) & (risks <= 1)).all():  # false for NaN too
        raise ValueError("probabilities must lie between 0 and 1 and must not be NaN")
    return died, risks


def too_few_to_read(died: np.ndarray) -> str:
    """Return a warning for figures of so few stays that they are luck, else an empty text."""
    n_deaths = int(died.sum())
    fewest = min(n_deaths, len(died) - n_deaths)
    return f"too few to read: {fewest} stays of one outcome, below {TOO_FEW}" if fewest < TOO_FEW else ""


def patient_resamples(patient_ids: ArrayLike, n_stays: int, n_bootstrap: int, seed: int) -> Iterator[np.ndarray]:
    """Yield weights of stays (R, n): how often each patient, with all of their stays, was drawn; 16 MB at a time."""
    patient_of_stay, patients = pd.factorize(np.asarray(patient_ids))
    if len(patient_of_stay) != n_stays:
        raise ValueError(f"{n_stays} labels but {len(patient_of_stay)} patient ids")
    if len(patients) < 2:
        return
    generator, chunk = np.random.default_rng(seed), max(1, 2_000_000 // n_stays)
    for first in range(0, n_bootstrap, chunk):
        size = min(chunk, n_bootstrap - first)
        times_drawn = generator.multinomial(len(patients), np.full(len(patients), 1 / len(patients)), size)
        yield times_drawn[:, patient_of_stay].astype(float)


def bootstrap_draws(
    statistic: Callable[[np.ndarray], np.ndarray],
    patient_ids: ArrayLike,
    n_stays: int,
    n_bootstrap: int,
    seed: int,
) -> np.ndarray:
    """Return what a statistic of stay weights (R, n) gives for all resamples of the patients: (R, ...)."""
    resamples = patient_resamples(patient_ids, n_stays, n_bootstrap, seed)
    of_none = statistic(np.empty((0, n_stays)))
    return np.concatenate([of_none, *map(statistic, resamples)])


def interval_of(draws: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of draws (R,); an infinite one keeps its rank, so the interval is honestly unbounded."""
    draws = draws[~np.isnan(draws)]
    if not len(draws):
        return math.nan, math.nan
    low, high = np.quantile(draws, [0.025, 0.975], method="inverted_cdf")
    return float(low), float(high)


def with_interval(value: float, draws: np.ndarray) -> dict[str, Any]:
    """Return value, low and high as JSON can hold them, and a reason where one of them does not exist."""
    low, high = interval_of(draws)
    result = without_nan({"value": float(value), "low": low, "high": high})
    if result["value"] is None:
        result["reason"] = "needs stays of both outcomes whose probabilities neither tie all nor separate the outcomes"
    elif math.isinf(low) or math.isinf(high):
        result["reason"] = "a missing bound is unbounded: in some resamples the probabilities separate the outcomes"
    return result


def weighted_metrics(weights: np.ndarray, labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return the figures in METRICS per row of stay weights (R, n), as (R, 5); NaN where a row lacks an outcome."""
    figures = np.full((len(weights), len(METRICS)), np.nan)
    errors = (probabilities - labels) ** 2
    figures[:, 2] = weights @ errors / weights.sum(1)
    has_deaths = weights @ labels > 0
    has_survivors = weights @ (1 - labels) > 0
    both = has_deaths & has_survivors
    if not both.any():
        return figures
    weights = weights[both]
    logits = finite_log_odds(probabilities)
    constant = np.ones((len(labels), 1))
    figures[both, :2] = weighted_ranking(weights, labels, probabilities)
    figures[both, 3:4] = logistic_fits(weights, labels, constant, offset=logits)
    figures[both, 4] = calibration_slopes(weights, labels, logits)
    return figures


def finite_log_odds(probabilities: np.ndarray) -> np.ndarray:
    """Return the logits of risks, those of 0 and 1 as of a ten-millionth from there."""
    return log_odds(probabilities.clip(1e-7, 1 - 1e-7))


def weighted_ranking(weights: np.ndarray, labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return AUROC and average precision (R, 2) for rows of stay weights (R, n) that hold both outcomes."""
    order = np.argsort(probabilities, kind="stable")
    steps = np.diff(probabilities[order], prepend=-1.0)
    first_of_tie = np.flatnonzero(steps > 0)
    weights, died = weights[:, order], labels[order]
    # (R, G), rising risk
    deaths = np.add.reduceat(weights * died, first_of_tie, axis=1)
    stays = np.add.reduceat(weights, first_of_tie, axis=1)
    survivors = stays - deaths
    n_deaths = deaths.sum(1)
    n_survivors = survivors.sum(1)
    below = survivors.cumsum(1) - survivors / 2  # a tie counts a half
    pairs = (deaths * below).sum(1)
    auroc = pairs / (n_deaths * n_survivors)
    # of the stays at or above each risk
    found = n_deaths[:, None] - deaths.cumsum(1) + deaths
    alarms = stays.sum(1, keepdims=True) - stays.cumsum(1) + stays
    precision = found / np.maximum(alarms, 1)
    average_precision = (deaths * precision).sum(1) / n_deaths
    return np.column_stack([auroc, average_precision])


def calibration_slopes(weights: np.ndarray, labels: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Return the slope of death on logits (n,) per row of weights (R, n); infinite where they separate outcomes."""
    is_drawn = weights > 0
    died = is_drawn & (labels == 1)  # (R, n)
    survived = is_drawn & (labels == 0)
    lowest_death, highest_death = range_within(logits, died)
    lowest_survivor, highest_survivor = range_within(logits, survived)
    deaths_above = highest_survivor <= lowest_death
    deaths_below = highest_death <= lowest_survivor
    slopes = np.full(len(weights), np.nan)  # stays so where all are tied: no slope at all
    slopes[deaths_above & ~deaths_below] = np.inf
    slopes[deaths_below & ~deaths_above] = -np.inf
    finite = ~(deaths_above | deaths_below)
    if finite.any():
        scale = logits.std()
        standardised = (logits - logits.mean()) / scale
        features = np.column_stack([np.ones(len(logits)), standardised])
        fits = logistic_fits(weights[finite], labels, features)
        slopes[finite] = fits[:, 1] / scale
    return slopes


def range_within(values: np.ndarray, is_member: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and the greatest of values (n,) among the members of each row (R, n)."""
    lowest = np.where(is_member, values, np.inf).min(1)
    highest = np.where(is_member, values, -np.inf).max(1)
    return lowest, highest


def logistic_fits(
    weights: np.ndarray,
    labels: np.ndarray,
    features: np.ndarray,
    offset: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Return weighted logistic regressions by Newton, one per row of weights (R, n) at once: coefficients (R, k)."""
    n_features = features.shape[1]
    products = features[:, :, None] * features[:, None, :]
    products = products.reshape(len(features), -1)  # (n, k * k)
    ridge = 1e-9 * np.eye(n_features)  # where every risk is near 0 or 1, the curvature is flat
    coefficients = np.zeros((len(weights), n_features))
    for _ in range(100):
        risks = expit(coefficients @ features.T + offset)  # (R, n)
        residuals = weights * (labels - risks)
        gradient = (residuals @ features)[:, :, None]
        variances = weights * risks * (1 - risks)
        curvature = (variances @ products).reshape(-1, n_features, n_features)
        step = np.linalg.solve(curvature + ridge, gradient)[:, :, 0]
        step = step.clip(-2, 2)  # longer steps can oscillate
        coefficients += step
        if np.abs(step).max() < 1e-7:
            break
    last_step = np.abs(step).max(1, keepdims=True)
    return np.where(last_step < 1e-4, coefficients, np.nan)


def race_group(race: Any) -> str:
    """Return MIMIC's 30-odd values by their first words: `BLACK/CAPE VERDEAN` is BLACK; not saying is UNKNOWN."""
    words = "" if pd.isna(race) else str(race).strip().upper()
    words = re.split("/| - | OR ", words)[0]
    return "UNKNOWN" if words.startswith(("UNABLE", "PATIENT DECLINED", "UNKNOWN")) or not words else words


def subgroups_of_stays(stays: pd.DataFrame) -> pd.DataFrame:
    """Return the groups reported on, one row per stay: sex, age band, race, care unit (from the table's columns)."""
    bands = pd.cut(
        stays["patient_age"].astype(float),
        [-np.inf, 45, 65, 80, np.inf],
        right=False,
        labels=["under 45", "45 to 64", "65 to 79", "80 and over"],
    )
    groups = {
        "sex": stays["patient_gender"],
        "age band": bands,
        "race": stays["patient_race"].map(race_group),
        "care unit": stays["first_icu_careunit"],
    }
    return pd.DataFrame({name: with_unknown(group) for name, group in groups.items()})


def members_of_groups(groups: pd.DataFrame) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield grouping, value and which stays (n,) belong to it: first all stays, then every value of each column."""
    yield "all", "all stays", np.ones(len(groups), dtype=bool)
    for name, column in groups.items():
        values = sorted(column.unique(), key=str)
        values.sort(key=lambda value: not str(value).startswith("under"))  # the youngest before "45 to 64"
        for value in values:
            yield str(name), value, (column == value).to_numpy()


def subgroup_table(
    labels: ArrayLike,
    probabilities: ArrayLike,
    patient_ids: ArrayLike,
    groups: pd.DataFrame,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Return `evaluate_predictions` per group, sizes first; a plain note below TOO_FEW of either outcome.

    groups has one row per stay, in the order of labels, and one column per grouping.
    """
    died, risks = checked_predictions(labels, probabilities)
    patients, rows = np.asarray(patient_ids), []
    for name, value, is_member in members_of_groups(groups):
        note = too_few_to_read(died[is_member])
        resamples = 0 if note else n_bootstrap
        figures = evaluate_predictions(died[is_member], risks[is_member], patients[is_member], resamples, seed)
        row = {
            "group": name,
            "value": value,
            "stays": figures["n_stays"],
            "patients": figures["n_patients"],
            "deaths": figures["n_deaths"],
            "prevalence": figures["prevalence"],
            "note": note,
        }
        for metric in METRICS:
            figure = dict.fromkeys(("value", "low", "high"), np.nan) if note else figures[metric]
            row |= {metric: figure["value"], f"{metric}_low": figure["low"], f"{metric}_high": figure["high"]}
        rows.append(row)
    figure_columns = [name for name in rows[0] if name.startswith(METRICS)]
    return pd.DataFrame(rows).astype(dict.fromkeys(figure_columns, float))


SENSITIVITY = 0.8  # of the operating point: this share of the deaths is found


def operating_points(
    labels: ArrayLike,
    probabilities: ArrayLike,
    patient_ids: ArrayLike,
    groups: pd.DataFrame,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Return what an alarm costs at the highest threshold that finds 80 % of these deaths, for all stays and per group.

    One threshold for everyone: sensitivity, specificity, and alarms per true death with its 95 % interval.
    """
    died, risks = checked_predictions(labels, probabilities)
    if not died.any():
        return pd.DataFrame()
    n_to_find = math.ceil(SENSITIVITY * died.sum())
    threshold = float(np.sort(risks[died == 1])[-n_to_find])
    patients, rows = np.asarray(patient_ids), []
    is_alarm = risks >= threshold
    for name, value, is_member in members_of_groups(groups):
        alarm, dead = is_alarm[is_member], died[is_member] == 1
        cost = partial(alarms_per_death, is_alarm=alarm, died=dead)
        low, high = interval_of(bootstrap_draws(cost, patients[is_member], len(dead), n_bootstrap, seed))
        row = {
            "group": name,
            "value": value,
            "threshold": threshold,
            "stays": len(dead),
            "deaths": int(dead.sum()),
            "alarms": int(alarm.sum()),
            "deaths_found": int((alarm & dead).sum()),
            "sensitivity": share(alarm & dead, dead),
            "specificity": share(~alarm & ~dead, ~dead),
            "alarms_per_true_death": float(cost(np.ones((1, len(dead))))[0]),
            "low": low,
            "high": high,
            "note": too_few_to_read(died[is_member]),
        }
        rows.append(row)
    return pd.DataFrame(rows)


def share(part: np.ndarray, whole: np.ndarray) -> float:
    """Return how much of what `whole` marks `part` marks; NaN of nothing."""
    return float(part.sum() / whole.sum()) if whole.any() else math.nan


def alarms_per_death(weights: np.ndarray, is_alarm: np.ndarray, died: np.ndarray) -> np.ndarray:
    """Return alarms for each death found (R,) by rows of stay weights (R, n); infinite where none is found."""
    alarms, found = weights @ is_alarm, weights @ (is_alarm & died)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(alarms > 0, alarms / found, np.nan)


THRESHOLDS = np.arange(0.01, 0.61, 0.01)  # of the decision curve


def decision_curve(
    labels: ArrayLike,
    probabilities: ArrayLike,
    thresholds: ArrayLike = THRESHOLDS,
    patient_ids: ArrayLike = (),
    n_bootstrap: int = 0,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the net benefit per stay of treating those at or above each risk threshold, all, or none.

    Net benefit = true positives / n - false positives / n * t / (1 - t): t is the risk at which one would just treat.
    With patient_ids and n_bootstrap, low and high bound the model's by resampling patients.
    """
    died, risks = checked_predictions(labels, probabilities)
    limits = np.asarray(thresholds, dtype=float)
    if not ((limits > 0) & (limits < 1)).all() or not len(died):
        raise ValueError("a decision curve needs at least one stay, and thresholds above 0 and below 1")
    is_treated = risks >= limits[:, None]  # (thresholds, n)
    odds, prevalence = limits / (1 - limits), died.mean()
    worth = np.where(died == 1, 1.0, -odds[:, None])  # of treating a stay: (thresholds, n)
    gains = worth * is_treated
    curve = pd.DataFrame(
        {
            "threshold": limits,
            "model": gains.mean(1),
            "treat_all": prevalence - (1 - prevalence) * odds,
            "treat_none": 0.0,
            "share_treated": is_treated.mean(1),
        }
    )

    def mean_gains(weights: np.ndarray) -> np.ndarray:
        return weights @ gains.T / weights.sum(1, keepdims=True)

    draws = bootstrap_draws(mean_gains, patient_ids, len(died), n_bootstrap, seed) if n_bootstrap else ()
    if len(draws):
        curve["low"], curve["high"] = np.quantile(draws, [0.025, 0.975], axis=0)
    return curve


def calibration_table(labels: ArrayLike, probabilities: ArrayLike, n_bins: int = 10) -> pd.DataFrame:
    """Return mean predicted risk and observed death rate in up to n_bins bins of equal size (fewer where risks tie).

    The 95 % Wilson interval takes stays as independent: a little too narrow where patients have several stays.
    """
    died, risks = checked_predictions(labels, probabilities)
    bins = pd.qcut(pd.Series(risks), n_bins, labels=False, duplicates="drop").fillna(0)
    stays = pd.DataFrame({"bin": bins, "risk": risks, "died": died})
    table = stays.groupby("bin").agg(
        n=("died", "size"),
        deaths=("died", "sum"),
        mean_risk=("risk", "mean"),
        observed_rate=("died", "mean"),
    )
    table = table.reset_index(drop=True).astype({"deaths": int})
    intervals = [binomtest(deaths, n).proportion_ci(method="wilson") for deaths, n in zip(table["deaths"], table["n"])]
    return table.assign(low=[bounds.low for bounds in intervals], high=[bounds.high for bounds in intervals])


def calibration_bins(n_stays: int) -> int:
    """Return how many bins so many stays fill: 10 stays each at least, 10 bins at most."""
    return int(np.clip(n_stays // 10, 2, 10))


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> float:
    """Return the T > 0 for which sigmoid(logit / T) has the least log loss on these stays (n,); convex in 1 / T.

    It is 1 (with a warning) where the data set no such T: it would go to 0 (all on the right side) or infinity.
    """
    scores, died = np.asarray(logits, dtype=float).ravel(), np.asarray(labels, dtype=float).ravel()
    margins = np.where(died == 1, scores, -scores)  # positive: on the right side of 0.5

    def log_loss(inverse: float) -> float:
        return float(np.logaddexp(0, -inverse * margins).sum())

    inverse = minimize_scalar(log_loss, bounds=(0.02, 50), method="bounded", options={"xatol": 1e-7}).x
    if not 0.021 < inverse < 49 or not 0 < died.sum() < len(died):
        logger.warning(
            f"Temperature scaling left out: {len(died)} validation stays ({died.sum():.0f} deaths) "
            "do not determine a temperature"
        )
        return 1.0
    return float(1 / inverse)


MIN_STAYS_OF_ITEM = 20  # fewer stays say little of an item
PURE = 0.98  # share of the stays with an item that end alike, above which it knows the outcome
LEAK_AUROC = 0.95  # no single bedside fact ranks deaths this well; a column that does knows the outcome
KNOWN_LATER = "events known only after the moment of prediction"
IMPOSSIBLE = {
    "events after the final event": "They happened after ICU discharge or death; the query should have cut them off.",
    KNOWN_LATER: "A bedside model could not have read them.",
    "patients in two splits": "The same patient is trained on and tested on.",
    "admissions in two splits": "The same hospital admission, hence the same outcome, is trained on and tested on.",
    "stays with conflicting labels": "Rows of one stay, or stays of one admission, disagree on the outcome.",
}


def recalibrated(labels: ArrayLike, probabilities: ArrayLike, patient_ids: ArrayLike) -> np.ndarray | None:
    """Return the risks (n,) with intercept and slope of their logits fitted anew, on four fifths of other patients.

    What a model would say after the least adaptation to another hospital (Cox 1958; Steyerberg 2019, chapter 20).
    None where fewer than ten patients have either outcome.
    """
    labels, probabilities = checked_predictions(labels, probabilities)
    patients = pd.Series(np.asarray(patient_ids))
    if patients.groupby(labels).nunique().reindex([0.0, 1.0], fill_value=0).min() < TOO_FEW:
        return None
    logits = finite_log_odds(probabilities)[:, None]
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    model = LogisticRegression(C=np.inf)
    return cross_val_predict(model, logits, labels, groups=patients, cv=folds, method="predict_proba")[:, 1]


def split_counts(patient_ids: ArrayLike, admission_ids: ArrayLike, split: ArrayLike) -> dict[str, int]:
    """Return how many patients and admissions occur in more than one split: both must be 0."""
    counts = {}
    for name, ids in (("patients", patient_ids), ("admissions", admission_ids)):
        n_splits = pd.Series(split).groupby(np.asarray(ids)).nunique()
        counts[f"{name} in two splits"] = int((n_splits > 1).sum())
    return counts


def leakage_audit(
    stays: pd.DataFrame,
    per_stay: pd.DataFrame,
    labels: ArrayLike,
    patient_ids: ArrayLike,
    split: ArrayLike,
    counts: dict[str, int],
    prospective: bool = False,
) -> pd.DataFrame:
    """Return what, alone, tells the outcome, and what cannot be: a row per column of stays and per_stay, and per count.

    stays (n rows): candidate columns. per_stay (n rows): numbers such as how many events, or hours from admission to
    the first. Each gets the AUROC of its own small model, cross-validated on the patients of the split "train" only.
    counts: how often impossible things occur (names in IMPOSSIBLE; others are allowed). What became known only after
    the moment of prediction is to be expected in retrospective mode, hence flagged only if prospective.
    """
    is_train = np.asarray(split) == "train"
    y, patients = np.asarray(labels)[is_train].astype(int), np.asarray(patient_ids)[is_train]
    folds, rows = patient_folds(y, patients), []
    for kind, table in (("column", stays), ("per stay", per_stay)):
        for name in table:
            auroc = single_column_auroc(table.loc[is_train, name], y, folds)
            flagged, reason = max(auroc, 1 - auroc) > LEAK_AUROC, ""
            if np.isnan(auroc):
                reason = "Not judged: too few training patients of one outcome to cross-validate."
            elif flagged:
                reason = f"Alone it tells deaths from survivors (AUROC {auroc:.2f}): it knows the outcome."
            rows.append((name, kind, auroc, pd.NA, bool(flagged), reason))
    excused = dict.fromkeys(REPAIRED, "Left out or mended while reading.")
    if not prospective:
        excused[KNOWN_LATER] = f"Expected: the retrospective mode reads the whole stay. {IMPOSSIBLE[KNOWN_LATER]}"
    for name, count in counts.items():
        reason = excused.get(name) or IMPOSSIBLE.get(name, "This should not occur.")
        flagged = count > 0 and name not in excused
        rows.append((name, "count", np.nan, int(count), flagged, reason if count else ""))
    audit = pd.DataFrame(rows, columns=["name", "kind", "auroc", "count", "flagged", "reason"])
    return audit.astype({"auroc": float, "count": "Int64", "flagged": bool})


Folds = list[tuple[np.ndarray, np.ndarray]]  # indices of the stays to fit on, and of those to judge by


def patient_folds(labels: np.ndarray, patient_ids: np.ndarray) -> Folds:
    """Return at most five folds of whole patients, deaths spread; none where an outcome has one patient only."""
    died = pd.Series(labels).groupby(patient_ids).max()
    n_folds = int(min(5, died.sum(), (1 - died).sum()))
    if n_folds < 2:
        return []
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=0)
    return list(splitter.split(labels, labels, patient_ids))


def single_column_auroc(column: pd.Series, labels: np.ndarray, folds: Folds) -> float:
    """Return the cross-validated AUROC of one column (n,) alone, labels (n,); NaN where no fold can tell.

    Numbers and times go through a small tree (missing is a value), all else through smoothed death rates per category.
    AUROC is taken within folds and averaged by pairs: pooled, the folds' own death rates would bias it below 0.5.
    """
    is_time = pd.api.types.is_datetime64_any_dtype(column)
    if is_time or pd.api.types.is_numeric_dtype(column):
        numbers = (column - column.min()).dt.total_seconds() if is_time else column
        values = numbers.to_numpy(dtype=float, na_value=np.nan)[:, None]
        model = DecisionTreeRegressor(max_leaf_nodes=16, min_samples_leaf=max(5, len(values) // 50), random_state=0)
        score = model.predict
    else:
        values = with_unknown(column).astype(str).to_numpy(dtype=object)[:, None]
        model = TargetEncoder(target_type="binary")
        score = model.transform
    pairs, total = 0, 0.0
    for to_fit, held_out in folds:
        n_deaths = labels[held_out].sum()
        fold_pairs = n_deaths * (len(held_out) - n_deaths)
        if fold_pairs and len(np.unique(labels[to_fit])) == 2:
            model.fit(values[to_fit], labels[to_fit])
            pairs += fold_pairs
            total += fold_pairs * roc_auc_score(labels[held_out], score(values[held_out]).ravel())
    return float(total / pairs) if pairs else math.nan


def audit_texts(table: StayTable) -> pd.DataFrame:
    """Return how each item, a text without its numbers, tells the outcome of n stays by its presence alone.

    One row per item: stays with it, deaths among them, purity (share of the more frequent outcome), AUROC of its
    presence, median hours to the end of what is read. Flagged where at least MIN_STAYS_OF_ITEM stays have it and the
    AUROC passes LEAK_AUROC either way, or the purity PURE, and that not by chance among so many items.
    """
    codes, items = pd.factorize(np.array([without_numbers(text) for text in table.texts], dtype=object))
    events = pd.DataFrame(
        {"item": codes[table.text], "stay": table.stay_of_event, "hours_to_end": table.minutes_to_end / 60}
    )
    present = events[["item", "stay"]].drop_duplicates()
    died = present.assign(died=table.labels[present["stay"]]).groupby("item")["died"]
    stays, deaths = died.size(), died.sum()  # with each item
    survivors = stays - deaths
    n_deaths, n_survivors = table.labels.sum(), (1 - table.labels).sum()
    auroc = 0.5 + (deaths / max(n_deaths, 1) - survivors / max(n_survivors, 1)) / 2
    is_telling = np.maximum(auroc, 1 - auroc) > LEAK_AUROC
    purity = np.maximum(deaths, survivors) / stays
    rate = np.where(deaths > survivors, n_deaths, n_survivors) / len(table.stays)
    is_chance = len(stays) * rate**stays >= 0.05  # all alike, times the items looked at
    is_pure = (purity > PURE) & ~is_chance
    found = pd.DataFrame(
        {
            "item": items[stays.index],
            "stays": stays,
            "deaths": deaths.astype(int),
            "auroc": auroc,
            "purity": purity,
            "median_hours_to_end": events.groupby("item")["hours_to_end"].median(),
            "flagged": (stays >= MIN_STAYS_OF_ITEM) & (is_pure | is_telling),
        }
    )
    return found.sort_values(["flagged", "stays"], ascending=False, kind="stable", ignore_index=True)


def audit_summary(audit: pd.DataFrame) -> str:
    """One line for the log of every run: how much was checked and what was flagged, by name."""
    aurocs = audit[audit.kind != "count"].set_index("name").auroc
    found = []
    for row in audit[audit["flagged"]].to_dict("records"):
        if row["kind"] == "count":
            found.append(f"{row['count']} {row['name']}")
        else:
            found.append(f"{row['name']} (AUROC {row['auroc']:.2f} alone)")
    verdict = f"FLAGGED: {', '.join(found)}" if found else "nothing flagged"
    if not found and aurocs.notna().any():
        verdict += f" (the most telling alone: {aurocs.idxmax()}, AUROC {aurocs.max():.2f})"
    unjudged = f"; {aurocs.isna().sum()} columns not judged, too few deaths" if aurocs.isna().any() else ""
    return f"Leakage audit of {len(aurocs)} columns and {len(audit) - len(aurocs)} counts: {verdict}{unjudged}"


# ---------------------------------------------------------------------------------------------------------------------
# Plots: each returns a matplotlib Figure, drawn without pyplot so that no global state changes
# ---------------------------------------------------------------------------------------------------------------------
BLUE, ORANGE, VERMILLION = "#0072B2", "#E69F00", "#D55E00"  # of Okabe and Ito, for all eyes
GREEN, GREY = "#009E73", "#767676"
REFERENCE = {"color": GREY, "linestyle": "--", "linewidth": 1}  # a line to compare with
METRIC_WORDS = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "brier": "Brier score",
    "calibration_intercept": "calibration intercept",
    "calibration_slope": "calibration slope",
}


def new_figure(title: str, caption: str, height: float, width: float = 7.2) -> Figure:
    """Return a page-wide figure: the question on top, a caption line below; constrained layout keeps both clear."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    figure.suptitle(textwrap.fill(title, 88), fontsize=11)
    if caption:
        figure.supxlabel(textwrap.fill(caption, int(16 * width)), fontsize=7.5, color="#444444")
    return figure


Corner = Literal["", "best", "lower right", "upper center"]


def tidy(axes: Axes, xlabel: str, ylabel: str, title: str = "", legend: Corner = "") -> None:
    """Label the axes, take off the frame's upper and right side, and put the legend, if any, into its corner."""
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(fontsize=8, frameon=False, loc=legend)


def metric_text(metrics: dict[str, Any], name: str) -> str:
    """Return `AUROC 0.81 (95 % interval 0.70 to 0.90)`, or that it is not defined."""
    return f"{METRIC_WORDS[name]} {figure_text(metrics[name])}"


def figure_text(figure: dict[str, Any], digits: int = 2, words: str = "95 % interval ") -> str:
    """Return a figure with its interval, `0.81 (95 % interval 0.70 to 0.90)`."""
    if figure["value"] is None:
        return "not defined"
    value, low, high = (
        "unbounded" if figure[part] is None else f"{figure[part]:.{digits}f}" for part in ("value", "low", "high")
    )
    is_unbounded = low == high == "unbounded"
    return value if is_unbounded else f"{value} ({words}{low} to {high})"


def plot_training_curves(history: pd.DataFrame, caption: str = "") -> Figure:
    """Draw history, one row per epoch: epoch, train_loss, validation_loss, validation_auroc, learning_rate."""
    figure = new_figure("Does training still help on patients it does not see?", caption, height=2.9)
    loss, auroc, rate = figure.subplots(1, 3)
    style = {"marker": "o", "markersize": 3 if len(history) < 30 else 0, "linewidth": 1.4}
    held_out = {"color": VERMILLION, "linestyle": "--", **style}
    epochs, validation = history["epoch"], history["validation_loss"]
    loss.plot(epochs, history["train_loss"], color=BLUE, label="training, all terms", **style)
    loss.plot(epochs, validation, label="validation, BCE", **held_out)
    auroc.plot(epochs, history["validation_auroc"], **held_out)
    rate.plot(epochs, history["learning_rate"], color=GREY, **style)
    loss_title = "Loss"
    if validation.notna().any():
        best = int(epochs[validation.idxmin()])
        loss_title = f"Loss (validation lowest in epoch {best})"
        for axes in (loss, auroc):
            axes.axvline(best, color="black", linewidth=0.8, linestyle=":")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    rate.yaxis.get_offset_text().set_fontsize(8)
    rate.set_ylim(bottom=0)
    tidy(loss, "epoch", "loss", loss_title, legend="best")
    tidy(auroc, "epoch", "AUROC", "Validation AUROC")
    tidy(rate, "epoch", "learning rate", "Learning rate")
    for axes in (loss, auroc, rate):
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return figure


def plot_roc_and_pr(labels: ArrayLike, probabilities: ArrayLike, metrics: dict[str, Any], caption: str = "") -> Figure:
    """Draw ROC and precision-recall curves of held-out stays; metrics as `evaluate_predictions` returns them."""
    died, risks = checked_predictions(labels, probabilities)
    figure = new_figure("How well does the predicted risk tell deaths from survivors?", caption, height=4.25)
    roc, pr = figure.subplots(1, 2)
    if 0 < died.sum() < len(died):
        false_alarms, found, _ = roc_curve(died, risks)
        precision, recall, _ = precision_recall_curve(died, risks)
        precision[-1] = precision[-2]  # scikit-learn ends at 1, also where the highest risk survived
        roc.plot(false_alarms, found, color=BLUE, label="model")
        pr.step(recall, precision, where="post", color=BLUE, label="model")
    else:
        roc.text(0.5, 0.6, "only one outcome: no curve", ha="center", fontsize=8)
    prevalence = died.mean() if len(died) else 0.0
    roc.plot([0, 1], [0, 1], label="no better than chance", **REFERENCE)
    pr.axhline(prevalence, label=f"chance: the death rate, {prevalence:.2f}", **REFERENCE)
    alarms, deaths = "1 - specificity (survivors called deaths)", "sensitivity (deaths found)"
    tidy(roc, alarms, deaths, metric_text(metrics, "auroc"), legend="lower right")
    alarms, deaths = "precision (alarms that were deaths)", "recall (deaths found)"
    tidy(pr, deaths, alarms, metric_text(metrics, "auprc"), legend="best")
    for axes in (roc, pr):
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), box_aspect=1)
    return figure


def plot_calibration(labels: ArrayLike, probabilities: ArrayLike, metrics: dict[str, Any], caption: str = "") -> Figure:
    """Draw observed death rate against predicted risk in bins of equal size, and the histogram of risks below."""
    died, risks = checked_predictions(labels, probabilities)
    table = calibration_table(died, risks, calibration_bins(len(died)))
    figure = new_figure("Do as many die as the predicted risk says?", caption, height=5.6, width=5.6)
    curve, histogram = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    top = min(1.0, np.ceil(10 * max(table["high"].max(), risks.max()) + 0.2) / 10)
    below, above = table["observed_rate"] - table["low"], table["high"] - table["observed_rate"]
    smallest, largest = int(table["n"].min()), int(table["n"].max())
    size = f"{smallest}" if smallest == largest else f"{smallest} to {largest}"
    curve.plot([0, top], [0, top], label="perfect agreement", **REFERENCE)
    curve.errorbar(
        table["mean_risk"],
        table["observed_rate"],
        yerr=np.clip([below, above], 0, None),
        fmt="o",
        color=BLUE,
        capsize=2,
        markersize=4,
        linewidth=1,
        label=f"{len(table)} bins of {size} stays, 95 % interval (Wilson, by stay)",
    )
    curve.set(xlim=(-0.01 * top, top * 1.01), ylim=(-0.01 * top, top * 1.01))
    words = [metric_text(metrics, name) for name in ("calibration_intercept", "calibration_slope", "brier")]
    tidy(curve, "", "observed death rate", "\n".join(words), legend="upper center")
    # Below the axes: inside, the legend would lie on the points of some model or other.
    curve.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=2)
    histogram.hist(
        [risks[died == 0], risks[died == 1]],
        bins=np.linspace(0, top, 31),
        stacked=True,
        color=[BLUE, VERMILLION],
        label=["survived", "died"],
    )
    histogram.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    tidy(histogram, "predicted risk of death in hospital", "stays", legend="best")
    return figure


def plot_decision_curve(curve: pd.DataFrame, caption: str = "") -> Figure:
    """Draw a curve as `decision_curve` returns it; what treating all would lose beyond the axes is not shown."""
    question = "At which risk thresholds does acting on the model beat treating all or none?"
    figure = new_figure(question, caption, height=3.8)
    axes, thresholds = figure.subplots(), curve["threshold"]
    axes.plot(thresholds, curve["treat_all"], color=ORANGE, linestyle="--", label="treat all")
    axes.plot(thresholds, curve["treat_none"], color=GREY, linestyle=":", label="treat none")
    axes.plot(thresholds, curve["model"], color=BLUE, label="treat by the model")
    lowest, highest = curve["model"].min(), max(curve["model"].max(), curve["treat_all"].max(), 0.01)
    if "low" in curve:
        axes.fill_between(
            thresholds,
            curve["low"],
            curve["high"],
            color=BLUE,
            alpha=0.15,
            linewidth=0,
            label="95 % interval",
        )
        lowest, highest = min(lowest, curve["low"].min()), max(highest, curve["high"].max())
    axes.set_ylim(min(lowest, -0.1 * highest) - 0.03 * highest, 1.08 * highest)
    tidy(axes, "risk threshold at which one would treat", "net benefit per stay", legend="best")
    return figure


def plot_attention_heatmap(
    layer_maps: Sequence[np.ndarray],
    pooling: ArrayLike,
    hours: ArrayLike,
    title: str,
    caption: str = "",
    hours_label: str = "hours after ICU admission",
) -> Figure:
    """Draw self-attention of each layer (bins, bins) over pooling weights (heads, n) of one stay's n events.

    Weights are shown as multiples of 1/n, the share that each event has where attention is even. A map's rows look, its
    columns are looked at; hours (n,) are the events' times, first event first.
    """
    weights, times = np.asarray(pooling, dtype=float), np.asarray(hours, dtype=float)
    n_events = weights.shape[1]
    figure = new_figure(title, caption, height=4.6 if len(layer_maps) else 2.5)
    heights = [1.2, 1] if len(layer_maps) else [1]
    *upper, lower = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part in upper:  # none where the model has no layers
        panels = np.atleast_1d(part.subplots(1, len(layer_maps), sharey=True))
        draw_shares(part, panels, n_events * np.asarray(layer_maps, dtype=float), extent=(0, 100, 100, 0))
        for layer, axes in enumerate(panels, start=1):
            looks = "event that looks, % of stay" if layer == 1 else ""
            tidy(axes, "event looked at, %", looks, f"layer {layer}")
    per_cell = -(-n_events // 600)  # more columns than pixels would drop events unseen
    cells = n_events * np.maximum.reduceat(weights, np.arange(0, n_events, per_cell), axis=1)
    axes = lower.subplots()
    draw_shares(lower, np.array([axes]), cells[None])
    shown = np.unique(np.linspace(0, cells.shape[1] - 1, 9).round().astype(int))
    decimals = 0 if np.ptp(times) >= 20 else 1
    axes.set_xticks(shown, [f"{times[cell * per_cell]:.{decimals}f}" for cell in shown])
    axes.set_yticks(range(len(cells)), [f"head {head}" for head in range(1, len(cells) + 1)])
    width = "each event equally wide" if per_cell == 1 else f"each column the heaviest of {per_cell} events"
    tidy(axes, f"{hours_label} ({width})", "", "Pooling: weight of each event in the prediction")
    return figure


def draw_shares(figure: SubFigure, panels: np.ndarray, shares: np.ndarray, **options: Any) -> None:
    """Draw multiples of even attention (panels, rows, columns) on one scale: 1 is white, less purple, more orange."""
    # A few pairs take most of the weight: a cap at the 99.5th percentile keeps the rest visible.
    top = max(float(np.quantile(shares, 0.995)), 2.0)
    options |= {"norm": LogNorm(1 / top, top), "cmap": "PuOr_r", "aspect": "auto", "interpolation": "nearest"}
    for axes, panel_shares in zip(panels, shares):
        image = axes.imshow(np.clip(panel_shares, 1 / top, top), **options)
    bar = figure.colorbar(image, ax=panels, pad=0.01, extend="both")
    bar.set_ticks([1 / top, 1, top], labels=[f"1/{top:.2g}", "1", f"{top:.2g}"])
    bar.minorticks_off()
    bar.set_label("weight, 1 where it is even", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def plot_risk_trajectories(trajectories: pd.DataFrame, caption: str = "", n_individual: int = 4) -> Figure:
    """Draw trajectories, one row per stay and time: icu_stay_id, hours_after_admission, probability, label (0/1).

    Single stays are chosen without looking at their risk: the longest followed of each outcome, then by stay.
    """
    figure = new_figure("How does the predicted risk move during the stay?", caption, height=4.0)
    single, mean = figure.subplots(1, 2, sharey=True)
    times = np.sort(trajectories["hours_after_admission"].unique())
    for label, color, line, word in ((1, VERMILLION, "-", "died"), (0, BLUE, "--", "survived")):
        group = trajectories[trajectories["label"] == label].sort_values("hours_after_admission")
        style = {"color": color, "linestyle": line, "marker": "o"}
        if len(group):
            draw_single_stays(single, group, n_individual, word, style)
            draw_mean_risk(mean, group, times, word, style, height=1.07 if label else 1.02)
    tidy(single, "", "predicted risk of death", legend="best")
    tidy(mean, "", "", legend="best")
    titles = (
        f"Up to {n_individual} stays of each outcome",
        "Mean and middle half of the n stays still there",
    )
    for axes, title in zip((single, mean), titles):
        axes.set_xlabel("hours after ICU admission (log scale)", fontsize=9)
        axes.set_title(title, fontsize=9, pad=24)
        axes.set_xscale("log", base=2)
        axes.set_xticks(times, [f"{hour:g}" for hour in times], minor=False)
        axes.set_ylim(0, 1)
    return figure


def draw_single_stays(axes: Axes, group: pd.DataFrame, n_stays: int, word: str, style: dict[str, Any]) -> None:
    """Draw the longest followed stays of a group, the first of them named in the legend."""
    followed = group.groupby("icu_stay_id").size().sort_index()
    followed = followed.sort_values(ascending=False, kind="stable")
    label: str | None = word
    for icu_stay_id in followed.index[:n_stays]:
        one = group[group["icu_stay_id"] == icu_stay_id]
        hours = one["hours_after_admission"]
        axes.plot(hours, one["probability"], label=label, markersize=3, linewidth=1, **style)
        label = None


def draw_mean_risk(
    axes: Axes,
    group: pd.DataFrame,
    times: np.ndarray,
    word: str,
    style: dict[str, Any],
    height: float,
) -> None:
    """Draw a group's mean risk and the middle half of its stays; above the axes, at `height`, how many are there."""
    by_hour = group.groupby("hours_after_admission")["probability"].describe(percentiles=[0.25, 0.75])
    color, where = style["color"], ("data", "axes fraction")
    axes.plot(by_hour.index, by_hour["mean"], label=word, markersize=4, **style)
    axes.fill_between(by_hour.index, by_hour["25%"], by_hour["75%"], color=color, alpha=0.15, linewidth=0)
    for hour, n_stays in by_hour["count"].reindex(times, fill_value=0).items():
        place = (hour, height)
        axes.annotate(f"n={n_stays:.0f}", place, xycoords=where, color=color, fontsize=7, ha="center")


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit code."""
    settings = settings_from(argv, Settings, __doc__)
    log_to_stdout()

    def what_is_kept() -> str:
        latest = output_folder(settings) / "checkpoints" / "latest_checkpoint.pth"
        kept = f", {latest} holds the last whole epoch" if latest.exists() else ""
        return f"Encoded texts are kept{kept}; go on with the same command and --resume."

    return exit_code(lambda: run(check_settings(settings)), what_is_kept)


def exit_code(work: Callable[[], object], what_is_kept: Callable[[], str]) -> int:
    """Do the work; return 0 if it is done, 2 where a person can mend something, 130 if interrupted: said in a line."""
    try:
        work()
    except InputError as error:
        words = str(error)
    except OSError as error:
        words = f"{error.filename or 'a file'}: {error.strerror or error}. Is the disk full, or the file not yours?"
    except MemoryError as error:
        words = f"the memory does not suffice ({error}): take fewer stays or a larger machine."
    except KeyboardInterrupt:
        print(f"\nInterrupted. {what_is_kept()}", file=sys.stderr)
        return 130
    else:
        return 0
    print(f"error: {words}", file=sys.stderr)
    return 2


def log_to_stdout() -> None:
    """Send the log, plain messages of the first process, to the standard output."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO if int(os.environ.get("RANK", "0")) == 0 else logging.WARNING)


def make_accelerator(settings: Settings, timeout: timedelta = timedelta(days=7)) -> Accelerator:
    """Return where to compute, and what it reports to: bf16 on GPUs that have it themselves, not by emulation.

    timeout: how long processes wait for one another. The first runs the query and encodes for hours; others wait then.
    """
    precision, tracker = settings.mixed_precision, settings.report_to
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise InputError(f"--report-to {tracker}: the package {tracker} is not installed. Run: pip install {tracker}")
    if precision == "auto":
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if has_bf16 else "no"
    handlers = [InitProcessGroupKwargs(timeout=timeout), DistributedDataParallelKwargs(broadcast_buffers=False)]
    return Accelerator(
        mixed_precision=precision,
        cpu=only_cpu(),
        log_with=None if tracker == "none" else tracker,
        project_dir=settings.output_dir,
        kwargs_handlers=handlers,
    )


def only_cpu() -> bool:
    """Return whether Accelerate must be told to take the CPU: for torchrun's processes there, and on Apple's GPUs."""
    if torch.backends.mps.is_available():
        logger.info("Device      the CPU: Apple's GPUs know no float64, which scores and explanations need")
        return True
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()


def run(settings: Settings) -> dict[str, Any]:
    """Go through all phases of a run; return what metrics.json holds."""
    accelerator = make_accelerator(settings)
    settings = replace(settings, output_dir=str(output_folder(settings)))
    output = Path(settings.output_dir)
    with hold(output, wait=False) if accelerator.is_main_process else contextlib.nullcontext():
        if settings.evaluate:
            return evaluate_checkpoint(settings, accelerator)
        started = time.monotonic()
        source = read_source(settings.data, settings, accelerator)
        external = read_source(settings.test_data, settings, accelerator) if settings.test_data else None
        # Split first: a table too small for it is refused before hours of encoding.
        table, splits = source.table, choose_splits(source.table, settings)
        if external is not None:
            table, splits = with_test_stays(table, splits[0], external.table)
        if accelerator.is_main_process:
            describe_splits(table, splits)
        if settings.audit:
            return {"audit": write_audit(table, splits[0], source.repairs, settings, Results(output, settings))}
        settings = with_reachable_encoder(table.texts, settings, accelerator)
        if accelerator.is_main_process:
            describe_plan(table, splits, settings, accelerator, time.monotonic() - started)
        if settings.dry_run:
            return {}
        encoder, vectors = embed_texts(table.texts, settings, accelerator)
        data = [TrainingData(table, split, vectors, encoder) for split in splits]
        if settings.cross_validate or settings.seeds > 1:
            return train_repeatedly(source, data, settings, accelerator)
        return train_and_report(source, data[0], settings, accelerator).content


def output_folder(settings: Settings) -> Path:
    """Return where a run writes: --output-dir; an evaluation into its `evaluation`, or that beside its checkpoint."""
    if not settings.evaluate:
        return Path(settings.output_dir)
    is_chosen = settings.output_dir != Settings.output_dir
    return (Path(settings.output_dir) if is_chosen else run_folder(settings.evaluate)) / "evaluation"


def run_folder(checkpoint: str | Path) -> Path:
    """Return the folder of the run that a checkpoint belongs to: the one above `checkpoints`, else its own."""
    folder = Path(checkpoint).parent
    return folder.parent if folder.name == "checkpoints" else folder


def data_path(data: str) -> Path:
    """Return the path as given; the bundled sample is also found from another working directory."""
    return SAMPLE if data == SAMPLE.name and not Path(data).exists() else Path(data)


class Source(NamedTuple):
    """The stays of one data set that a run is about, and how they came to be these."""

    table: StayTable
    flow: list[CohortStep]
    repairs: Repairs
    whole: StayTable  # before the cohort was chosen

    def origin(self) -> dict[str, Any]:
        """Return what metrics.json says of how the stays came to be these."""
        return {
            "cohort": [step._asdict() for step in self.flow],
            "dropped_or_repaired": self.repairs,
            "source_tables": [account._asdict() for account in self.repairs.sources],
        }


def read_source(data: str, settings: Settings, accelerator: Accelerator, need_label: bool = True) -> Source:
    """Read a data set, choose its cohort and describe it in the log."""
    logger.info(f"Reading     {data}")
    with accelerator.main_process_first():  # one process runs the query, the others find its result
        whole, repairs = read_stays(
            data_path(data),
            settings.cache_dir,
            need_label,
            settings.meds_task,
            settings.memory_limit,
            settings.threads,
            settings.static_features,
        )
    table, flow = choose_cohort(whole, settings)
    if not settings.trajectory:  # which scores more of each stay than its cohort has
        table = table.with_own_texts()
    describe(table, repairs, flow)
    return Source(table, flow, repairs, whole)


def describe(table: StayTable, repairs: Repairs, flow: list[CohortStep]) -> None:
    """Log size, lengths, what was dropped and why, and the flow of the cohort, where there is one."""
    repairs.log()
    n_patients, n_texts = table.stays["patient_id"].nunique(), len(np.unique(table.text))
    known = table.labels[~np.isnan(table.labels)]
    deaths = f"{known.mean():.1%} died in hospital" if len(known) else "outcome unknown"
    logger.info(
        f"Data        {len(table.stays):,} ICU stays of {n_patients:,} patients, {len(table.text):,} events, "
        f"{n_texts:,} distinct texts, {deaths}"
    )
    quantiles = np.quantile(table.lengths, [0, 0.25, 0.5, 0.75, 0.95, 1])
    lengths = " / ".join(f"{int(quantile):,}" for quantile in quantiles)
    logger.info(f"Length      {lengths} events per stay (min, 25 %, median, 75 %, 95 %, max)")
    dropped = "; ".join(f"{count:,} {reason.removesuffix(', dropped')}" for reason, count in repairs.items())
    counted = " (counted by table above, too)" if dropped and repairs.sources else ""
    logger.info(f"Dropped     {dropped or 'nothing'}{counted}")
    if len(flow) == 1:
        return
    for step in flow:
        logger.info(
            f"Cohort      {step.stays:7,} stays {step.patients:7,} patients "
            f"{step.events:11,} events {step.deaths:6,} deaths  {step.name}"
        )


def choose_splits(table: StayTable, settings: Settings) -> list[Split]:
    """Return the split that the settings ask for; with --cross-validate one for each fold."""
    if settings.cross_validate:
        return list(cross_validation_splits(table, settings.cross_validate, settings.seed))
    if settings.split:
        return [split_from_file(table, Path(settings.split))]
    own = meds_split(table, Path(settings.data)) if settings.labels else None
    if own is not None:
        return [own]
    test_share = 0.0 if settings.no_test or settings.test_data else 0.2
    return [split_by_patient(table, settings.seed, test_share)]


def split_from_file(table: StayTable, path: Path) -> Split:
    """Return the stays of the patients that a CSV file (patient_id, part) puts into train, validation and test."""
    try:
        rows = pd.read_csv(path)
        part_of_patient = rows.drop_duplicates().set_index("patient_id")["part"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"--split {path}: cannot be read as CSV with patient_id and part ({error}).") from None
    if part_of_patient.index.has_duplicates:
        raise InputError(f"--split {path}: a patient is in two parts. Give each patient one.")
    parts, split = split_of_parts(table, part_of_patient)
    left_out = len(parts) - sum(map(len, split))
    if left_out:
        logger.warning(f"Split       WARNING: {left_out} stays are of patients in no part of {path}; they are left out")
    for name, stays in zip(Split._fields, split):
        if not has_both_outcomes(table, stays) and (len(stays) or name != "test"):
            raise InputError(f"--split {path}: its part {name} holds no stays of both outcomes in this data.")
    return split


def split_of_parts(table: StayTable, part_of_patient: pd.Series) -> tuple[np.ndarray, Split]:
    """Return each stay's part (n_stays), and the split that these make; a patient without a part is in none."""
    parts = table.stays["patient_id"].map(part_of_patient).to_numpy()
    return parts, Split(*(np.flatnonzero(parts == name) for name in Split._fields))


MEDS_PARTS = {"train": "train", "tuning": "validation", "held_out": "test"}


def meds_split(table: StayTable, root: Path) -> Split | None:
    """Return the split that a MEDS data set brings; None where it brings none, or a part of it lacks an outcome."""
    path = root / "metadata" / "subject_splits.parquet"
    if not path.is_file():
        return None
    rows = pd.read_parquet(path)
    _, split = split_of_parts(table, rows.set_index("subject_id")["split"].map(MEDS_PARTS))
    if all(has_both_outcomes(table, stays) for stays in split):
        logger.info(f"Split       the data set's own, {path.name}")
        return split
    logger.warning(f"Split       WARNING: a part of {path.name} lacks an outcome here; patients are split anew")
    return None


def with_test_stays(table: StayTable, split: Split, external: StayTable) -> tuple[StayTable, list[Split]]:
    """Return one table of both data sets, and its split: external stays, of patients not in the first, are the test."""
    is_new = ~external.stays["patient_id"].isin(table.stays["patient_id"]).to_numpy()
    if not is_new.all():
        logger.warning(
            f"Test data   WARNING: {(~is_new).sum()} stays are of patients that --data has too; they are left out"
        )
    if not has_both_outcomes(external, is_new):
        raise InputError("--test-data: no stays of both outcomes are left. Give stays of patients that --data has not.")
    both = append_stays(table, external.take(is_new))
    return both, [split._replace(test=np.arange(len(table.stays), len(both.stays)))]


def describe_splits(table: StayTable, splits: Sequence[Split]) -> None:
    """Log the sizes of the parts; warn where a part has so few of an outcome that its figures are luck."""
    for split in splits:
        stays = " / ".join(str(len(part)) for part in split)
        deaths = " / ".join(f"{table.labels[part].sum():.0f}" for part in split)
        logger.info(
            f"Split       {stays} stays, {deaths} deaths (training, validation, test), no patient in two of them"
        )
    if len(splits) > 1:
        return  # of folds, the stays of all are read together
    for name, part in splits[0]._asdict().items():
        note = too_few_to_read(table.labels[part])
        if not len(part) or not note:
            continue
        if name == "validation":
            logger.info(f"Split       {name}: {note}; which epoch is best is partly luck")
        else:
            logger.warning(f"Split       WARNING: {name}: {note}; --cross-validate 5 tests on every stay once")


def describe_plan(
    table: StayTable,
    splits: Sequence[Split],
    settings: Settings,
    accelerator: Accelerator,
    seconds_read: float,
) -> None:
    """Log what the run will do, about how long it takes by rates measured here, and what it needs of what is free."""
    texts = list(dict.fromkeys(texts_to_encode(table.texts, settings)))
    encoding = measure_encoding(texts, settings, accelerator)
    lengths, split, dim = table.lengths, splits[0], encoding.dim
    scored = lengths[split.validation].sum() / lengths[split.train].sum() / 3  # without a backward pass
    epoch = (1 + scored) * measure_epoch(lengths[split.train], dim, settings, accelerator)
    n_trainings = max(len(splits), settings.seeds)
    left = epochs_left(settings, n_trainings)
    total = encoding.seconds + left * epoch
    again = f"{n_trainings} times " if n_trainings > 1 else ""
    length = f"{again}at most {settings.max_epochs}"
    if left < n_trainings * settings.max_epochs:
        length = f"at most {left} more"
    duration = f", {words_of(encoding.seconds)}" if encoding.n_new else ""
    logger.info(
        f"Plan        read, done in {words_of(seconds_read)}; encode {encoding.n_new:,} of {len(texts):,} texts with "
        f"{settings.text_encoder}{duration};\n"
        f"            train {length} epochs, each {words_of(epoch)}; "
        f"in all {words_of(total)} at the speed of just now;\n"
        "            then figures and pictures, some seconds"
    )
    describe_needs(table, lengths[split.train], encoding, settings, accelerator.device)
    if settings.dry_run:
        logger.info("Dry run     nothing was encoded or trained")


def epochs_left(settings: Settings, n_trainings: int) -> int:
    """Return how many epochs a run's trainings have to go at most; where one goes on, its history says what is done."""
    done = 0
    if settings.resume:
        unit = "fold" if settings.cross_validate else "seed"
        histories = "history.csv" if n_trainings == 1 else f"{unit}_*/history.csv"
        done = sum(len(pd.read_csv(path)) for path in Path(settings.output_dir).glob(histories))
    return max(0, n_trainings * settings.max_epochs - done)


WORKSPACE = 3e8  # bytes that torch and the drawing take besides, as measured on the sample and on the demo
REMEDIES = {
    "disk": "Free some, or take --cache-dir on another disk.",
    "memory": "Take fewer stays, a lower --max-events-per-batch or a larger machine.",
    "GPU": "Take a lower --max-events-per-batch, or --vectors-on host.",
}


def describe_needs(
    table: StayTable,
    lengths: np.ndarray,
    encoding: Encoding,
    settings: Settings,
    device: torch.device,
) -> None:
    """Log how many GB of disk and memory a run needs and how many there are; warn where that is too little.

    lengths: of the training stays. What the encoder takes is measured, what training takes is reckoned.
    """
    cache = Path(settings.cache_dir).absolute()
    own = psutil.Process().memory_info().rss
    vectors, step = 4 * encoding.dim * len(table.texts), bytes_of_step(lengths, encoding.dim, settings)
    training = own + vectors + WORKSPACE + step * (device.type == "cpu")
    needs = {
        f"disk in {cache.name}": (4 * encoding.dim * encoding.n_new, free_disk(cache)),
        # What the program holds already is of what it needs.
        "memory": (max(training, encoding.memory), psutil.virtual_memory().available + own),
    }
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = vectors if settings.vectors_on == "device" or vectors < free / 2 else 0  # as `place_vectors` decides
        measured = torch.cuda.max_memory_allocated(device)  # by the encoder, among others
        needs["GPU memory"] = (max(step + held, measured), free)
    words = [f"{need / 1e9:.2g} GB of {what} ({free / 1e9:.0f} GB free)" for what, (need, free) in needs.items()]
    weights = f"; the encoder's weights, {encoding.weights / 1e9:.2g} GB, are in place" if encoding.weights else ""
    logger.info(f"Needs       about {', '.join(words)}{weights}")
    for what, (need, free) in needs.items():
        if need > free:
            logger.warning(f"Needs       WARNING: too little {what} is free. {REMEDIES[what.split()[0]]}")


def words_of(seconds: float) -> str:
    """Return a time as a person says it: `about 0.4 s`, `about 12 min`, or `an unknown time`."""
    for size, unit in ((3600, "h"), (60, "min"), (1, "s")):
        if seconds >= 2 * size:
            return f"about {float(f'{seconds / size:.2g}'):g} {unit}"
    return "an unknown time" if math.isnan(seconds) else f"about {seconds:.1f} s"


def texts_to_encode(texts: np.ndarray, settings: Settings) -> np.ndarray:
    """Return the texts as the encoder reads them: `--item-history` has the numbers itself, so that far fewer differ."""
    return np.array([without_value(text) for text in texts], dtype=object) if settings.item_history else texts


class Encoding(NamedTuple):
    """What it takes to encode the texts that have no vector yet."""

    n_new: int
    dim: int  # of a vector
    seconds: float = 0.0  # NaN where the encoder is not to be had
    memory: int = 0  # bytes of the process with the encoder loaded
    weights: int = 0  # bytes of the encoder's files


def measure_encoding(texts: Sequence[str], settings: Settings, accelerator: Accelerator) -> Encoding:
    """Return what encoding takes, measured on a tenth of the new texts at most."""

    def encode(some: Sequence[str]) -> None:
        encoder._forward(0, encoder._tokenise(some))

    try:
        encoder = make_text_encoder(settings, accelerator)
        encoder.cache.refresh()
        cleaned = list(map(clean_text, texts))
        missing = np.flatnonzero(encoder.cache.missing(text_keys(cleaned)))
        if not len(missing):
            return Encoding(0, encoder.dim)
        encoder._load()
    except EncoderUnreachable as error:  # a run stops at `embed_texts`
        if settings.dry_run:
            logger.warning(f"Encoder     WARNING: {error}")
        return Encoding(len(texts), 768, math.nan)
    for most in (32, 512):  # few texts overrate what a fast encoder takes: each batch has its fixed work
        some = [cleaned[number] for number in missing[:: max(10, len(missing) // most)]]
        seconds = typical_seconds(partial(encode, some))
        if seconds > 0.5:
            break
    return Encoding(
        len(missing),
        encoder.dim,
        len(missing) / len(some) * seconds / accelerator.num_processes,
        psutil.Process().memory_info().rss,
        encoder.bytes_of_weights(),
    )


def typical_seconds(work: Callable[[], object]) -> float:
    """Return the median time of the rounds of work that 2 s hold, after a first, which is slower.

    On a busy machine a single round may take ten times what most take.
    """
    work()
    seconds: list[float] = []
    while sum(seconds) < 2 and len(seconds) < 20:
        started = time.monotonic()
        work()
        seconds.append(time.monotonic() - started)
    return float(np.median(seconds))


def measure_epoch(lengths: np.ndarray, dim: int, settings: Settings, accelerator: Accelerator) -> float:
    """Return the seconds of training on stays of these lengths: three batches of made-up events stand for all."""
    most = min(settings.max_events_per_batch, 4096)
    batches = plan_batches(lengths, settings.batch_size, most)  # the longest first
    device, input_dim = accelerator.device, len(EVENT_TYPES) + dim + 1
    with torch.random.fork_rng(devices=[]):
        model = ClinicalTransformer(input_dim, 1, **settings.sizes).to(device)

    def step(batch: np.ndarray) -> None:
        sequences = torch.ones(len(batch), int(lengths[batch].max()), input_dim, device=device)
        model(sequences, torch.zeros(len(batch), 1, device=device)).sum().backward()
        model.query_vector.detach().sum().item()  # waits for the device

    chosen = [batches[int(share * len(batches))] for share in (1 / 6, 1 / 2, 5 / 6)]
    seconds = [typical_seconds(partial(step, batch)) for batch in chosen]
    return float(np.mean(seconds)) * len(batches) / accelerator.num_processes


def bytes_of_step(lengths: np.ndarray, dim: int, settings: Settings) -> int:
    """Return about how many bytes a training step takes: inputs, what layers keep for the way back, padding to pool."""
    batches = plan_batches(lengths, settings.batch_size, settings.max_events_per_batch, settings.seed)
    n_events = max(int(lengths[batch].sum()) for batch in batches)
    n_padded = max(len(batch) * int(lengths[batch].max()) for batch in batches)
    floats_per_layer = 10 * settings.d_model + 2 * settings.d_feedforward
    floats_per_event = 3 * dim + settings.n_layers * floats_per_layer
    return 4 * (n_events * floats_per_event + n_padded * 3 * settings.d_model)


class Scored(NamedTuple):
    """Stays and the risks that a model gave them."""

    stays: pd.DataFrame  # (n): STAY_COLUMNS
    probabilities: np.ndarray  # (n)

    def take(self, is_taken: np.ndarray) -> Scored:
        """Those that a mask (n,) marks."""
        return Scored(self.stays[is_taken].reset_index(drop=True), self.probabilities[is_taken])

    @property
    def known(self) -> Scored:
        """Those whose outcome is known."""
        return self.take(self.stays[LABEL].notna().to_numpy())

    @property
    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Labels, probabilities and patients (n), as the functions of "Evaluation" take them."""
        return self.stays[LABEL].to_numpy(float), self.probabilities, self.stays["patient_id"].to_numpy()

    def evaluate(self, settings: Settings) -> dict[str, Any]:
        """Return the figures of `evaluate_predictions`."""
        return evaluate_predictions(*self.columns, settings.n_bootstrap, settings.seed)

    def words(self, kind: str = "") -> str:
        """Return what these of known outcome are: `62 test stays of 44 patients, 13 deaths`, and whether too few."""
        stays = f"{kind} stays".strip()
        n_patients = self.stays["patient_id"].nunique()
        n_deaths = int(self.stays[LABEL].sum())
        warning = too_few_to_read(self.stays[LABEL].to_numpy(float))
        return f"{len(self.stays)} {stays} of {n_patients} patients, {n_deaths} deaths{warning and f' ({warning})'}"


class Results:
    """The folder of a run, and the one place that writes into it what a person reads: tables, JSON, figures, pages."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings, self.started = folder, settings, time.time()

    def begin(self) -> None:
        """Remove what an earlier run left, unless this one resumes it; write what repeats the run."""
        if not self.settings.resume:
            for path in self.find(LEFT_BY_A_RUN):
                remove(path)
            for path in self.find(FOLDERS_LEFT):
                remove(path.parent)
                logger.info(f"Removed     {path.parent}, of the model that was here before")
        repeated = {name: value for name, value in asdict(self.settings).items() if name not in ("resume", "dry_run")}
        self.text("settings.yaml", yaml.safe_dump(repeated, sort_keys=False, allow_unicode=True))
        self.json("run.json", self.record())

    def find(self, patterns: Sequence[str]) -> list[Path]:
        """Return what the folder has of these."""
        return list(chain.from_iterable(map(self.folder.glob, patterns)))

    def record(self) -> dict[str, Any]:
        """Return how the run came about: command, date, commit, versions."""
        date = datetime.fromtimestamp(self.started, tz=UTC).isoformat(timespec="seconds")
        return {
            "command": shlex.join(["python", *sys.argv]),
            "date": date,
            "commit": commit_of_program(),
            "versions": versions(),
        }

    def table(self, name: str, frame: pd.DataFrame) -> None:
        write_whole(self.folder / name, lambda path: frame.to_csv(path, index=False, float_format="%.6g"))

    def text(self, name: str, content: str) -> None:
        write_whole(self.folder / name, lambda path: path.write_text(content, "utf-8"))

    def json(self, name: str, content: Any) -> None:
        write_json(self.folder / name, without_nan(content))

    def figure(self, name: str, figure: Figure) -> None:
        save_figure(self.folder / "plots" / name, figure)

    def end(self) -> None:
        """Write how long the run took, and log what its folder holds."""
        self.json("run.json", self.record() | {"seconds": round(time.time() - self.started, 1)})
        names = [f"{path.name}{'/' * path.is_dir()}" for path in self.folder.glob("[!.]*")]
        words = textwrap.wrap(", ".join(sorted(names)), 108)
        logger.info("\n            ".join([f"Written     {self.folder}", *words]))


# What a run writes and a shorter or other one would not write again; models are replaced after the first epoch.
LEFT_BY_A_RUN = (
    "metrics.json",
    "model_card.md",
    "predictions.*",
    "history.csv",
    "risk_trajectories.csv",
    "plots/risk_trajectories.png",
    "plots/attention_epoch_*_batch_*.png",
    "attention_weights/attention_epoch_*_batch_*.npz",
    "folds.csv",
    "seeds.csv",
    "seeds.json",
    "cross_validation.json",
)
# A folder that holds this file is the program's own, and of an earlier model.
FOLDERS_LEFT = ("evaluation/run.json", "explainability/report.html", "fold_*/run.json", "seed_*/run.json")


def without_nan(content: Any) -> Any:
    """Return nested plain data with null for what JSON has no word for: NaN and infinity."""
    if isinstance(content, dict):
        return {name: without_nan(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    names = ("torch", "transformers", "accelerate", "duckdb", "sqlglot", "scikit-learn", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


def commit_of_program() -> str | None:
    """Return the commit of this file's repository, with a plus where files differ from it; None outside one."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


class Outcome(NamedTuple):
    """What a training leaves: what metrics.json holds, and the scored stays (empty in processes but the first)."""

    content: dict[str, Any]
    scored: Scored | None


def draw_attention(path: Path, settings: Settings, text_encoder: str) -> Path:
    """Draw a file of `save_attention_weights` as a heatmap of the same name in plots/."""
    record = load_attention_weights(path)
    layer_maps = [weights[0].mean(0) for weights in record["layer_attention_weights"]]  # (bins, bins) each
    figure = plot_attention_heatmap(
        layer_maps,
        record["pooling_weights"][0, :, 0],  # (heads, L)
        record["hours_to_final_event"],
        title=f"Where does the model look in ICU stay {record['icu_stay_id']}?",
        caption=f"{path.stem.replace('_', ' ')}, a training stay · risk {record['probability']:.2f} "
        f"· text encoder: {text_encoder}",
        hours_label="hours before the " + ("prediction" if settings.prospective else "final event"),
    )
    return save_figure(Path(settings.output_dir) / "plots" / f"{path.stem}.png", figure)


def train_model(
    settings: Settings,
    data: TrainingData | None = None,
    accelerator: Accelerator | None = None,
    at_start: Callable[[Trainer], Any] | None = None,
) -> tuple[Trainer, Checkpoint]:
    """Train on the data, by default those that the settings name, and write no report.

    Return the trainer, whose datasets are the parts of the split, and the checkpoint of the best weights, which the
    trainer then has, too. `at_start` is given the trainer before its first epoch.
    """
    settings, accelerator = check_settings(settings), accelerator or make_accelerator(settings)
    data = data or read_training_data(settings, accelerator)
    draw = partial(draw_attention, settings=settings, text_encoder=data.text_encoder)
    trainer = Trainer(settings, data, accelerator, draw)
    if settings.resume:
        trainer.resume()
    if at_start:
        at_start(trainer)
    trainer.fit()
    accelerator.wait_for_everyone()
    best = load_checkpoint(trainer.output / "checkpoints" / "best_model.pth", accelerator.device)
    trainer.model.load_state_dict(best.model.state_dict())
    return trainer, best


def read_training_data(settings: Settings, accelerator: Accelerator) -> TrainingData:
    """Return the data that the settings name, split and encoded."""
    table = read_source(settings.data, settings, accelerator).table
    split = choose_splits(table, settings)[0]
    settings = with_reachable_encoder(table.texts, settings, accelerator)
    encoder, vectors = embed_texts(table.texts, settings, accelerator)
    return TrainingData(table, split, vectors, encoder)


def train_and_report(source: Source, data: TrainingData, settings: Settings, accelerator: Accelerator) -> Outcome:
    """Train, score the test stays once with the best weights, and write everything."""
    results, audit = Results(Path(settings.output_dir), settings), list[dict]()

    def begin(trainer: Trainer) -> None:
        if accelerator.is_main_process:
            results.begin()
            results.table("split.csv", split_table(trainer.patients))
            audit.extend(write_audit(data.table, data.split, source.repairs, settings, results))
        describe_training(trainer)
        if settings.report_to != "none":
            accelerator.project_configuration.set_directories(settings.output_dir)
            said = {name: str(value) for name, value in asdict(settings).items()}
            accelerator.init_trackers("clinical_LF", said, {"wandb": {"dir": settings.output_dir}})

    trainer, best = train_model(settings, data, accelerator, begin)
    for tracker in accelerator.trackers:
        tracker.finish()
    datasets = {"validation": trainer.validation_set}
    if trainer.test_set is not None:
        datasets["test"] = trainer.test_set
    logits = {name: trainer.predict(dataset) for name, dataset in datasets.items()}
    if not accelerator.is_main_process:
        return Outcome({}, None)
    if settings.temperature_scaling:
        trainer.temperature = fit_temperature(logits["validation"], trainer.validation_set.table.labels)
        state = best.state | {"temperature": trainer.temperature}
        write_whole(trainer.output / "checkpoints" / "best_model.pth", lambda path: torch.save(state, path))
    scored = {
        name: Scored(datasets[name].table.stays, expit(values / trainer.temperature)) for name, values in logits.items()
    }
    described = source.origin() | {"leakage_audit": audit}
    return report_training(trainer, data.table, scored, described, results)


def split_table(patients: dict[str, list[int]]) -> pd.DataFrame:
    """Return patient_id and part, as --split reads it."""
    rows = [(patient, part) for part, members in patients.items() for patient in members]
    return pd.DataFrame(rows, columns=["patient_id", "part"]).sort_values("patient_id")


FEW_EVENTS = 4096  # of a step on one GPU: it has computed them before the next step's kernels are launched


def describe_training(trainer: Trainer) -> None:
    """Log the sizes of the model and of a step, and what it runs on."""
    accelerator, n_parameters = trainer.accelerator, count_parameters(trainer.model)
    device = {"cpu": "the CPU", "cuda": "the GPU"}.get(accelerator.device.type, accelerator.device.type)
    precision = "bfloat16 where it suffices" if accelerator.mixed_precision == "bf16" else "float32"
    world = accelerator.num_processes
    where = f"{device}, {precision}" if world == 1 else f"{world} processes, each on {device}, {precision}"
    logger.info(
        f"Model       {n_parameters:,} parameters, {trainer.train_set.input_dim} inputs per event, "
        f"{trainer.preprocessor.static_dim} of the stay, on {where}"
    )
    n_steps = len(trainer.plan_epoch(1))
    events = trainer.train_set.lengths.sum() / n_steps / world
    each = " in each process" if world > 1 else ""
    logger.info(
        f"Steps       {n_steps:,} an epoch, of {events:,.0f} events on average{each}; "
        '"best" marks the lowest validation loss so far: those weights are kept'
    )
    if world > 1 and events < FEW_EVENTS and accelerator.device.type != "cpu":
        logger.warning(f"Steps       WARNING: below {FEW_EVENTS:,} events a GPU mostly waits: raise --batch-size")


def count_parameters(model: nn.Module) -> int:
    """Return how many numbers a model has learnt."""
    return sum(parameter.numel() for parameter in model.parameters())


def report_training(
    trainer: Trainer,
    table: StayTable,
    scored: dict[str, Scored],
    origin: dict[str, Any],
    results: Results,
) -> Outcome:
    """Write metrics, predictions, plots and model card of the held-out stays; log the summary a person looks for."""
    settings, part = trainer.settings, "test" if "test" in scored else "validation"
    caption = f"text encoder: {trainer.text_encoder} · {scored[part].words(part)}"
    validation = f"text encoder: {trainer.text_encoder} · {scored['validation'].words('validation')}"
    metrics, tables = write_evaluation(results, scored[part], settings, caption)
    results.figure("training_curves.png", plot_training_curves(pd.DataFrame(trainer.history), validation))
    training = {
        "epochs": trainer.epochs_done,
        "best_epoch": trainer.best_epoch,
        "seconds": round(sum(row["seconds"] for row in trainer.history), 1),  # of all parts, where it was resumed
        "parameters": count_parameters(trainer.model),
        "temperature": trainer.temperature,
    }
    content = {
        "text_encoder": trainer.text_encoder,
        "metrics": {part: metrics, "validation": scored["validation"].evaluate(settings)},
        "training": training,
        **origin,
        "tripod_ai": tripod_block(table, origin["cohort"], trainer.patients, tables),
        "settings": asdict(settings),
        "versions": versions(),
    }
    results.json("metrics.json", content)
    results.text("model_card.md", model_card(content, part, results.record()))
    title = f"{part.capitalize():11s} {scored[part].words()}; weights of epoch {trainer.best_epoch}, trained in "
    log_metrics(metrics, f"{title}{training['seconds']:.0f} s")
    if part == "validation":
        logger.warning("Validation  these stays chose the epoch: the figures flatter the model (--no-test)")
    results.end()
    return Outcome(content, scored[part])


def write_evaluation(
    results: Results,
    scored: Scored,
    settings: Settings,
    caption: str,
    judged: Scored | None = None,
) -> tuple[dict[str, Any], dict[str, pd.DataFrame]]:
    """Write predictions and, where outcomes are known, figures, tables and plots; return the figures and the tables.

    judged: those of the scored stays that figures and plots are of; all, if not given.
    """
    write_predictions(results, scored, settings)
    known = (judged or scored).known
    if known.stays.empty:
        return {}, {}
    metrics, groups = known.evaluate(settings), subgroups_of_stays(known.stays)
    labels, risks, patients = known.columns
    resampling = {"n_bootstrap": settings.n_bootstrap, "seed": settings.seed}
    tables = {
        "subgroups": subgroup_table(*known.columns, groups, **resampling),
        "operating_points": operating_points(*known.columns, groups, **resampling),
        "decision_curve": decision_curve(labels, risks, patient_ids=patients, **resampling),
        "calibration": calibration_table(labels, risks, calibration_bins(len(labels))),
    }
    for name, table in tables.items():
        results.table(f"{name}.csv", table)
    results.figure("roc_and_precision_recall.png", plot_roc_and_pr(labels, risks, metrics, caption))
    results.figure("calibration.png", plot_calibration(labels, risks, metrics, caption))
    results.figure("decision_curve.png", plot_decision_curve(tables["decision_curve"], caption))
    return metrics, tables


def write_predictions(results: Results, scored: Scored, settings: Settings) -> None:
    """Write one row per stay: ids, label where known, predicted probability; of MEDS data also in its own schema."""
    frame = scored.stays.filter(["icu_stay_id", "patient_id", LABEL, "fold"]).astype({LABEL: "Int64"})
    frame.insert(3, "probability", scored.probabilities)
    results.table("predictions.csv", frame)
    if settings.labels:
        frame = meds_predictions(scored)
        write_whole(results.folder / "predictions.parquet", lambda path: frame.to_parquet(path, index=False))


def meds_predictions(scored: Scored) -> pd.DataFrame:
    """Return the predictions in the MEDS prediction schema, which `meds-evaluation` scores."""
    return pd.DataFrame(
        {
            "subject_id": scored.stays["patient_id"].astype("int64"),
            "prediction_time": scored.stays["icu_outtime"].astype("datetime64[us]"),
            "boolean_value": scored.stays[LABEL].astype("boolean"),
            "predicted_boolean_value": scored.probabilities >= 0.5,
            "predicted_boolean_probability": scored.probabilities.astype(np.float32),
        }
    )


def log_metrics(metrics: dict[str, Any], title: str) -> None:
    """Log each figure with its interval."""
    logger.info(f"{title}; in brackets 95 % intervals")
    for name in [name for name in METRICS if name in metrics]:
        prevalence = f" at prevalence {metrics['prevalence']:.3f}" if name == "auprc" else ""
        logger.info(f"            {METRIC_WORDS[name]:22s} {figure_text(metrics[name], 3, '')}{prevalence}")


def tripod_block(
    table: StayTable,
    flow: list[dict],
    patients: dict[str, list[int]],
    tables: dict[str, pd.DataFrame],
) -> dict[str, Any]:
    """Return what a TRIPOD+AI report asks for: flow, missing values, events, calibration, groups, operating point."""
    counts = np.bincount(table.event_type, minlength=len(EVENT_TYPES) + 1)
    return {
        "flow": flow,
        "patients_per_part": {part: len(members) for part, members in patients.items()},
        "missing_per_column": table.static_columns.isna().mean().round(4).to_dict(),
        "events_per_type": dict(zip((*EVENT_TYPES, "other"), counts.tolist())),
        **{name: rows.to_dict("records") for name, rows in tables.items() if name != "decision_curve"},
    }


MODEL_CARD = """\
# Model card

Predicts whether a patient dies in hospital, from the events of an ICU stay as texts. {{ moment }}
Research software: not a medical device, not for clinical use.

Made {{ run.date }} by `{{ run.command }}`, commit {{ run.commit }}, from {{ data }}.

## Model

{{ "{:,}".format(training.parameters) }} parameters, trained in {{ training.epochs }} epochs (best: {{
training.best_epoch }}); text encoder `{{ text_encoder }}`;
static features: {{ settings.static_features | join(", ") }}. Probability = sigmoid(logit / {{
"%.3g" % training.temperature }}).

## Patients

{% for step in tripod_ai.flow %}
- {{ "{:,} stays, {:,} deaths".format(step.stays, step.deaths) }}: {{ step.name }}
{% endfor %}

| part | patients |
|---|---|
{% for name, n_patients in tripod_ai.patients_per_part.items() %}
| {{ name }} | {{ "{:,}".format(n_patients) }} |
{% endfor %}

| column | missing |
|---|---|
{% for name, missing in tripod_ai.missing_per_column.items() if missing %}
| {{ name }} | {{ "{:.1%}".format(missing) }} |
{% else %}
| all | 0 |
{% endfor %}

| type | events |
|---|---|
{% for name, n_events in tripod_ai.events_per_type.items() if n_events %}
| {{ name }} | {{ "{:,}".format(n_events) }} |
{% endfor %}

## Figures of the {{ part }} stays, with 95 % intervals from resampling patients

{{ figures.n_stays }} stays of {{ figures.n_patients }} patients, {{ figures.n_deaths }} deaths. {{
figures.note | capitalize }}

| figure | value |
|---|---|
{% for name, words in METRIC_WORDS.items() %}
| {{ words }} | {{ figure_text(figures[name]) }} |
{% endfor %}

{% set whole = tripod_ai.operating_points[0] %}
An alarm at every risk of {{ "%.2f" % whole.threshold }} or more, the highest threshold that finds {{
"{:.0%}".format(SENSITIVITY) }} of these deaths: {{ whole.alarms }} alarms for {{ whole.deaths_found }} of {{
whole.deaths }} deaths. The threshold was chosen on these very stays, which flatters it.

| group | stays | deaths | AUROC | alarms per true death |
|---|---|---|---|---|
{% for row in tripod_ai.subgroups[1:] %}
{% set point = tripod_ai.operating_points[loop.index] %}
{% set auroc = "%.2f (%.2f to %.2f)" % (row.auroc, row.auroc_low, row.auroc_high) %}
{% set alarms = "%.1f" % point.alarms_per_true_death %}
| {{ row.group }}: {{ row.value }} | {{ row.stays }} | {{ row.deaths }} | {{
"too few" if row.note else auroc }} | {{ "too few" if point.note else alarms }} |
{% endfor %}

## Limits

{% if part == "validation" %}
- Not tested: the stays of these figures chose the epoch, which flatters the model.
{% elif settings.test_data %}
- Tested on another data set than it was trained on.
{% else %}
- Tested on stays of the same data set: other hospitals may differ.
{% endif %}
- Groups with fewer than {{ TOO_FEW }} stays of either outcome are too few to judge; no difference of groups is tested.
{% if text_encoder == "hashing" %}
- Texts were read by the hashing encoder, which knows no language: nothing is said of Longformer.
{% endif %}
{% if not calibrated %}
- Its probabilities are not shown to be calibrated: calibration slope {{ figure_text(figures.calibration_slope) }}.
{% endif %}
{% if flagged %}
- The leakage audit flags {{ flagged | join(", ") }}; the model uses {{ used | join(", ") or "none of it" }}.
{% endif %}
"""


def data_in_words(data: str) -> str:
    """Return the name of a data set; of the bundled sample also that no patient is behind it."""
    name = Path(data).name
    return f"{name} (synthetic: its figures say nothing about patients)" if name == SAMPLE.name else name


def model_card(content: dict[str, Any], part: str, record: dict[str, Any]) -> str:
    """Return the model card of a run, from what metrics.json holds and how the run came about."""
    figures, settings = content["metrics"][part], content["settings"]
    slope = figures["calibration_slope"]
    has_interval = None not in (slope["low"], slope["high"])
    flagged = [row["name"] for row in content["leakage_audit"] if row["flagged"]]
    template = Environment(trim_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True)
    return template.from_string(MODEL_CARD).render(
        content,
        data=data_in_words(settings["data"]),
        METRIC_WORDS=METRIC_WORDS,
        SENSITIVITY=SENSITIVITY,
        TOO_FEW=TOO_FEW,
        figure_text=figure_text,
        part=part,
        figures=figures,
        run=record,
        moment=moment_of_prediction(settings["observation_hours"], settings["labels"]),
        calibrated=has_interval and slope["low"] <= 1 <= slope["high"],
        flagged=flagged,
        used=sorted(set(flagged) & set(settings["static_features"])),
    )


def moment_of_prediction(observation_hours: float, labels: str) -> str:
    """Return when a model predicts, and from what."""
    if labels:
        return "It predicts at the time of each MEDS label, from the events up to it."
    if observation_hours:
        return f"It predicts {observation_hours:g} h after ICU admission, from what was known then."
    return RETROSPECTIVE


RETROSPECTIVE = (
    "It reads the whole stay up to discharge or death: it describes a stay that has ended and foresees nothing."
)


def with_reachable_encoder(texts: np.ndarray, settings: Settings, accelerator: Accelerator) -> Settings:
    """Return the settings, with `hashing` for the bundled sample where Clinical-Longformer is not to be had.

    On a user's data `embed_texts` then stops. What one process cannot reach, none takes.
    """
    is_sample = data_path(settings.data).resolve() == SAMPLE.resolve()
    if not is_sample or settings.text_encoder != CLINICAL_LONGFORMER:
        return settings
    is_reached = True
    try:
        encoder = make_text_encoder(settings, accelerator)
        keys = text_keys(map(clean_text, texts_to_encode(texts, settings)))
        if encoder.cache.missing(keys).any():
            encoder._load()
    except EncoderUnreachable:
        is_reached = False
    if all(gather_object([is_reached])):
        return settings
    logger.warning(
        "Encoder     WARNING: Clinical-Longformer cannot be reached; the sample is read with the hashing "
        "encoder instead. Results say nothing about Clinical-Longformer."
    )
    return replace(settings, text_encoder=HashingTextEncoder.id)


def embed_texts(
    texts: np.ndarray,
    settings: Settings,
    accelerator: Accelerator,
    expected: str | None = None,
) -> tuple[str, np.ndarray]:
    """Return the encoder's identity and the texts' vectors (n_texts, E); only new ones are computed, by all processes.

    The vectors are memory-mapped. A failure of one process is one of all, so that none waits for another in vain.
    """
    started = time.monotonic()
    texts = texts_to_encode(texts, settings)
    failure = None
    try:
        encoder = make_text_encoder(settings, accelerator)
        if expected is not None and encoder.id != expected:
            raise InputError(
                f"the checkpoint was trained on vectors of {expected}, but --text-encoder gives {encoder.id}. "
                "Give the same encoder."
            )
        keys = encoder.embed(texts, accelerator.process_index, accelerator.num_processes, accelerator.is_main_process)
    except InputError as error:
        failure = error
    failures = list(filter(None, gather_object([failure])))  # waits until all have done their share
    if failures:
        raise failures[0]
    vectors = encoder.cache.mapped(keys)
    logger.info(
        f"Encoder     {encoder.id}: {len(set(texts)):,} distinct texts, {encoder.n_encoded:,} of them new, "
        f"{time.monotonic() - started:.1f} s"
    )
    return encoder.id, vectors


def encoder_to_load(checkpoint: Checkpoint, given: str) -> str:
    """Return the encoder given, if it is not the default, else the checkpoint's; its own paths are not followed."""
    if given and given != CLINICAL_LONGFORMER:
        return given
    if checkpoint.text_encoder == "hashing":  # also where the sample fell back to it
        return "hashing"
    name = checkpoint.settings.text_encoder
    if name != CLINICAL_LONGFORMER and Path(name).exists():
        raise InputError(
            f"the checkpoint was trained on vectors of a local encoder, {checkpoint.text_encoder}; "
            "paths inside a checkpoint are not followed. "
            "Give its folder as --text-encoder PATH."
        )
    return name


def write_audit(table: StayTable, split: Split, repairs: Repairs, settings: Settings, results: Results) -> list[dict]:
    """Write and log the leakage audit of the table and the split; return the rows of leakage_audit.csv."""
    part = np.empty(len(table.stays), dtype=object)
    for name, members in split._asdict().items():
        part[members] = name
    audit = leakage_audit(
        table.static_columns,
        numbers_to_audit(table),
        table.labels,
        table.stays["patient_id"].to_numpy(),
        part,
        impossible_counts(table, part, repairs, settings),
        prospective=settings.prospective,
    )
    texts = audit_texts(table.take(split.train))
    results.table("leakage_audit.csv", audit)
    results.table("leakage_audit_texts.csv", texts)
    flagged = set(audit.loc[audit["flagged"] & (audit["kind"] == "column"), "name"])
    used = sorted(flagged & set(settings.static_features))
    logger.info(f"Audit       {audit_summary(audit)}{'; the model does not use it' if flagged and not used else ''}")
    if used:
        logger.warning(
            f"Audit       WARNING: {', '.join(used)} is used as a feature and tells the label. "
            "Leave it out of --static-features."
        )
    if found := texts["item"][texts["flagged"]].tolist():
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        named = "; ".join(item[:80] for item in found[:5])
        logger.warning(
            f"Audit       WARNING: the presence of {named}{more} tells the outcome: see leakage_audit_texts.csv"
        )
    return json.loads(audit.to_json(orient="records"))


def numbers_to_audit(table: StayTable) -> pd.DataFrame:
    """Return numbers of each stay, in hours, that might tell the outcome though no column of the table does."""
    first = table.minutes_since_intime[table.offsets[:-1]] / 60
    last = table.minutes_since_intime[table.offsets[1:] - 1] / 60
    hours = 24 * table.stays["icu_length_of_stay_in_days"].astype(float)
    return pd.DataFrame(
        {
            "first event, hours after ICU admission": first,
            "last event, hours after ICU admission": last,
            # What two columns tell together: a length that ran past the record would know who died before it.
            "length of stay less the record's span, hours": hours - stay_hours(table),
            "length of stay less the last event, hours": hours - last,
        }
    )


def impossible_counts(table: StayTable, part: np.ndarray, repairs: Repairs, settings: Settings) -> dict[str, int]:
    """Return how often what `IMPOSSIBLE` names occurs, and what was left out or mended while reading."""
    stays, known = table.stays, repairs | repairs.notes
    end_hours = settings.observation_hours or stay_hours(table)[table.stay_of_event]
    return {
        "events after the final event": repairs.get(AFTER_THE_END, 0),
        KNOWN_LATER: int((table.known_minutes_since_intime > 60 * end_hours).sum()),
        "stays with conflicting labels": int((stays.groupby("admission_id")[LABEL].nunique() > 1).sum()),
        **split_counts(stays["patient_id"].to_numpy(), stays["admission_id"].to_numpy(), part),
        **{reason: known[reason] for reason in REPAIRED if reason in known},
    }


def evaluate_checkpoint(settings: Settings, accelerator: Accelerator) -> dict[str, Any]:
    """Score a table with a trained model, refitting nothing; figures where labels are known, trajectories if asked."""
    checkpoint = load_checkpoint(settings.evaluate, accelerator.device)
    encoder = encoder_to_load(checkpoint, settings.text_encoder)
    own = settings_of_evaluation(checkpoint.settings, settings, encoder)
    source = read_source(own.data, own, accelerator, need_label=False)
    table = source.table
    text_encoder, vectors = embed_texts(table.texts, own, accelerator, expected=checkpoint.text_encoder)

    def score(part: StayTable) -> np.ndarray:
        dataset = ClinicalSequenceDataset(part, checkpoint.preprocessor, vectors)
        return checkpoint.probabilities(predict_logits(checkpoint.model, dataset, own, accelerator))

    scored = Scored(table.stays, score(table))
    trajectories = score_trajectories(source.whole, own, score) if own.trajectory else None
    if not accelerator.is_main_process:
        return {}
    results = Results(Path(own.output_dir), own)
    results.begin()
    unknown = log_unknown_categories(checkpoint.preprocessor, table.static_columns)
    seen = seen_patients(table.stays, checkpoint)
    judged, overlap = choose_unseen(scored, seen, own.include_seen)
    caption = f"text encoder: {text_encoder} · {judged.known.words()} · {overlap}"
    metrics, _ = write_evaluation(results, scored, own, caption, judged)
    if metrics:
        log_metrics(metrics, f"Evaluation  of known outcome {judged.known.words()}")
    after = after_recalibration(judged.known, own) if metrics else None
    unseen = unseen_in_training(checkpoint, table.take(~seen | own.include_seen))
    results.table("unseen_in_training.csv", unseen)
    if trajectories is not None:
        hidden = set() if own.include_seen else set(table.stays["patient_id"][seen])
        write_trajectories(results, trajectories, hidden, checkpoint.settings, f"{text_encoder} · {overlap}")
    content = {
        "text_encoder": text_encoder,
        "checkpoint": settings.evaluate,
        **source.origin(),
        "seen_patients": {"stays": int(seen.sum()), "of": len(seen), "included": own.include_seen, "note": overlap},
        "unknown_categories": unknown,
        "metrics": metrics or None,
        "metrics_after_recalibration": after,
        "unseen_in_training": shares_unseen(unseen),
    }
    results.json("metrics.json", content)
    results.end()
    return content


def unseen_in_training(checkpoint: Checkpoint, table: StayTable) -> pd.DataFrame:
    """Return one row per item: its events, and those whose item, or whose very text, training never saw."""
    events = np.bincount(table.text, minlength=len(table.texts))
    is_new_text = ~np.isin(text_numbers(table.texts), checkpoint.state["training_texts"].cpu().numpy())
    frame = pd.DataFrame({"item": list(map(item_of, table.texts)), "events": events})
    frame = frame.assign(of_new_item=events * checkpoint.is_new_item(table.texts), of_new_text=events * is_new_text)
    return frame.groupby("item", as_index=False).sum().sort_values("of_new_text", ascending=False, kind="stable")


def shares_unseen(unseen: pd.DataFrame) -> dict[str, float]:
    """Return the shares of all events whose item, and whose text, training never saw; log them."""
    if unseen.empty:
        return {}
    shares = (unseen[["of_new_item", "of_new_text"]].sum() / unseen["events"].sum()).round(4).to_dict()
    logger.info(
        f"Unseen      {shares['of_new_item']:.1%} of these stays' events are of items that training never saw, "
        f"{shares['of_new_text']:.1%} of texts that it never saw"
    )
    return shares


def after_recalibration(scored: Scored, settings: Settings) -> dict[str, Any] | None:
    """Return Brier score and calibration after refitting intercept and slope; None where outcomes are too few."""
    risks = recalibrated(*scored.columns)
    if risks is None:
        return None
    metrics = scored._replace(probabilities=risks).evaluate(settings)
    metrics = {name: metrics[name] for name in ("brier", "calibration_intercept", "calibration_slope")}
    log_metrics(metrics, "Recalibrated, intercept and slope fitted on other patients of these stays")
    return metrics


def settings_of_evaluation(trained: Settings, settings: Settings, text_encoder: str) -> Settings:
    """Return the settings that a model was trained with, but for where data and results lie and what is asked."""
    given = (
        "data output_dir cache_dir hf_cache evaluate include_seen trajectory n_bootstrap first_stay_only "
        "memory_limit threads test_data no_test split resume"
    )
    own = replace(trained, text_encoder=text_encoder, **{name: getattr(settings, name) for name in given.split()})
    if not settings.data:
        return replace(own, data=trained.test_data or trained.data)
    if not settings.labels:
        return replace(own, labels="", history_hours=settings.history_hours)
    hours = settings.history_hours or trained.history_hours
    # A label has its own time.
    return replace(own, labels=settings.labels, history_hours=hours, observation_hours=0.0)


def seen_patients(stays: pd.DataFrame, checkpoint: Checkpoint) -> np.ndarray:
    """Return whether each of n stays is of a patient that the model was trained or tuned on: (n,) bool."""
    return stays["patient_id"].isin(checkpoint.patients["train"] + checkpoint.patients["validation"]).to_numpy()


def choose_unseen(scored: Scored, seen: np.ndarray, include: bool) -> tuple[Scored, str]:
    """Return the stays to judge the model by, and what to say of those of patients that it knows."""
    if not seen.any():
        return scored, "no patient was trained or tuned on"
    if include:
        words = f"{seen.sum()} stays of patients that the model was trained or tuned on are included and flatter it"
        logger.warning(f"Evaluation  WARNING: {words}")
        return scored, words
    words = f"{seen.sum()} stays of patients that the model was trained or tuned on are left out"
    logger.warning(f"Evaluation  {words} of figures and pictures; --include-seen judges by them, too")
    return scored.take(~seen), words


def log_unknown_categories(preprocessor: ClinicalDataPreprocessor, stays: pd.DataFrame) -> dict[str, int]:
    """Return how many stays have a value that training never saw, by column; log it, as a warning above a fifth."""
    unknown = preprocessor.unknown_categories(stays)
    for column, count in unknown.items():
        words = f"{column}: {count} of {len(stays)} stays have values unknown to the model"
        if count > 0.2 * len(stays):
            logger.warning(f"Data        WARNING: {words}")
        else:
            logger.info(f"Data        {words}")
    return unknown


def score_trajectories(table: StayTable, settings: Settings, score: Callable[[StayTable], np.ndarray]) -> pd.DataFrame:
    """Return each stay's risk at several hours after admission, from what was known then; a stay leaves at its end."""
    rows = []
    for hour in trajectory_hours(settings.trajectory):
        present = known_at(table.take(stay_hours(table) > hour), hour)
        if len(present.stays):
            frame = present.stays[["icu_stay_id", "patient_id"]]
            rows.append(frame.assign(hours_after_admission=hour, probability=score(present), label=present.labels))
    if not rows:
        raise InputError(f"--trajectory {settings.trajectory}: no stay lasts that long.")
    return pd.concat(rows, ignore_index=True)


def write_trajectories(
    results: Results,
    trajectories: pd.DataFrame,
    hidden: set[int],
    trained: Settings,
    text_encoder: str,
) -> None:
    """Write the risks, and their picture without the hidden patients; warn of a model that only saw whole stays."""
    mode = "The model was trained on whole stays: early risks are extrapolations"
    if trained.prospective:
        mode = moment_of_prediction(trained.observation_hours, trained.labels)
    else:
        logger.warning(f"Trajectory  WARNING: {mode}")
    caption = f"{mode} · text encoder: {text_encoder}"
    results.table("risk_trajectories.csv", trajectories)
    shown = trajectories[~trajectories["patient_id"].isin(hidden)].reset_index(drop=True)
    if len(shown):
        results.figure("risk_trajectories.png", plot_risk_trajectories(shown, caption))


def train_repeatedly(
    source: Source,
    data: Sequence[TrainingData],
    settings: Settings,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Train once for each fold, or with several seeds on one split; write the spread, and pooled figures."""
    unit, results = "fold" if settings.cross_validate else "seed", Results(Path(settings.output_dir), settings)
    if accelerator.is_main_process:
        results.begin()
    numbers, outcomes = range(1, 1 + (settings.cross_validate or settings.seeds)), []
    for number in numbers:
        logger.info(f"{unit.capitalize():11s} {number} of {len(numbers)}")
        folder = results.folder / f"{unit}_{number}"
        own = replace(settings, output_dir=str(folder), cross_validate=0, seeds=1, split=str(folder / "split.csv"))
        if unit == "seed":
            own = replace(own, seed=settings.seed + number - 1, no_test=False)
        outcomes.append(train_and_report(source, data[number - 1 if unit == "fold" else 0], own, accelerator))
    if not accelerator.is_main_process:
        return {}
    return report_spread(data[0].table, outcomes, unit, results)


def report_spread(table: StayTable, outcomes: Sequence[Outcome], unit: str, results: Results) -> dict[str, Any]:
    """Write and log the figures of each fold or seed, their mean and spread, and those of the pooled predictions."""
    common = outcomes[0].content
    rows = []
    for outcome in outcomes:
        metrics = outcome.content["metrics"]
        figures = metrics.get("test", metrics["validation"])
        rows.append({name: figures[name]["value"] for name in METRICS})
    spread = pd.DataFrame(rows, index=range(1, 1 + len(rows)), dtype=float)
    moments = spread.agg(["mean", "std"])
    results.table(f"{unit}s.csv", pd.concat([spread, moments]).rename_axis(unit).reset_index())
    scored = pooled_predictions(outcomes, unit)
    what = "the test stays of all folds" if unit == "fold" else f"mean risk of {len(outcomes)} seeds"
    caption = f"text encoder: {common['text_encoder']} · {what}, {scored.words()}"
    pooled, tables = write_evaluation(results, scored, results.settings, caption)
    summary = {}
    for name, values in spread.items():
        summary[name] = {"mean": values.mean(), "sd": values.std(), f"{unit}s": values.tolist()}
    content = {
        "text_encoder": common["text_encoder"],
        f"{unit}s": len(outcomes),
        "spread": summary,
        "pooled": pooled,
        "tripod_ai": tripod_block(table, common["cohort"], {}, tables),
        "settings": asdict(results.settings),
    }
    results.json("cross_validation.json" if unit == "fold" else "seeds.json", content)
    for name in ("auroc", "auprc"):
        mean, deviation = moments[name]
        logger.info(f"{unit.capitalize() + 's':11s} {METRIC_WORDS[name]} {mean:.3f} (sd {deviation:.3f})")
    log_metrics(pooled, f"Pooled      {what}: {scored.words()}")
    results.end()
    return content


def pooled_predictions(outcomes: Sequence[Outcome], unit: str) -> Scored:
    """Return each stay once: with its fold, or with its mean risk over the seeds."""
    parts = [outcome.scored for outcome in outcomes if outcome.scored is not None]
    risks = [part.probabilities for part in parts]
    if unit == "seed":
        return Scored(parts[0].stays, np.mean(risks, axis=0))
    stays = [part.stays.assign(fold=number) for number, part in enumerate(parts, start=1)]
    return Scored(pd.concat(stays, ignore_index=True), np.concatenate(risks))


if __name__ == "__main__":
    sys.exit(main())
