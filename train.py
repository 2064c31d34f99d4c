"""Predict in-hospital mortality from the event texts of an ICU stay: a frozen text encoder and a small transformer.

    python train.py --data PATH/TO/mimic-iv     # or without --data the bundled synthetic sample; README.md has more

Every event (a drug order, a procedure, a lab result, a culture, an IV ingredient) is a short text; Clinical-Longformer
turns each distinct text into a vector once; a transformer reads the stay's events and pools them by attention. The
sections stand in the order in which data flow. Sources, figures, pictures and pages are in clinical_lf/.

Axes: B stays in a batch, L events of a stay, N events of a whole batch without padding, E text dimension, D model
dimension, S static dimension, H heads. Times carry their unit in the name. Masks are True at real events. Research
software: not a medical device, not for clinical use.
"""

import hashlib
import json
import math
import operator
import os
import sys
import time
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle, groupby, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeVar, cast

import numpy as np
import pandas as pd
import scipy
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import Dataset

from clinical_lf import encoders, files, items, metrics, plan, tables, trees
from clinical_lf.encoders import CLINICAL_LONGFORMER, EncoderUnreachable, HashingEncoder, HuggingFaceEncoder
from clinical_lf.files import InputError, Progress, logger, write_whole
from clinical_lf.items import HISTORY, STATISTICS
from clinical_lf.meds import MedsTask, is_meds, meds_split
from clinical_lf.reading import read_stays
from clinical_lf.settings import check_limits, cli_name, setting, settings_from
from clinical_lf.tables import EVENT_TYPES, STATIC_COLUMNS, ReadReport, Split, StayTable

SAMPLE = Path(__file__).resolve().parent / "sample_train.csv"
THE_FRAME = "the data frame"  # what a run's settings name where the data are no file
CHECKPOINT_FORMAT = 6  # raise it when what a model reads of a text changes, as items and their numbers

# ---- Settings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Every number a person may want to change. The checkpoint carries it."""

    data: str = setting("", "MIMIC-IV or MEDS folder, nested Parquet (or glob), flat CSV or Parquet; else the sample.")
    vitals: str = setting(
        "", "Add vitals.sql's events: bare for MIMIC-IV, or its result as Parquet.", alone="vitals.sql"
    )
    output_dir: str = setting("trained_models/clinical_LF", "Folder for checkpoints, plots, metrics and predictions.")
    cache_dir: str = setting("clinical_LF_precomp_emb", "Folder for vectors, query results and encoder weights.")
    memory_limit: str = setting("33%", "Memory for reading the data: a share of the machine's, or a size like 16GB.")

    text_encoder: str = setting(CLINICAL_LONGFORMER, "Hugging Face id (or id@revision), a folder, or 'hashing'.")
    max_text_tokens: int = setting(512, "Texts are cut after this many tokens.", low=1)
    item_history: bool = setting(False, "Nine more inputs per event, its item's history; trees help to train.")
    static_features: list[str] = setting([], "Static columns to use; default: all that are known at the prediction.")

    observation_hours: float = setting(0.0, "Predict this many hours after ICU admission; 0 reads whole stays.", low=0)
    gap_hours: float = setting(0.0, "Leave out stays that end within so many hours after the prediction.", low=0)
    outcome: Literal["hospital", "icu", "30d"] = setting("hospital", "Death to predict; of MEDS data --labels says it.")
    labels: str = setting("", "With MEDS data: its labels, or mortality-in-hospital@24h, -in-icu@24h, -within-30d@24h.")
    history_hours: float = setting(0.0, "With MEDS data: hours before the prediction to read; 0 reads all.", low=0)
    first_stay_only: bool = setting(False, "Keep only the first ICU stay of each patient.")

    d_model: int = setting(256, "Width of the transformer.", low=1)
    n_layers: int = setting(4, "Transformer layers; with 0 events meet in the pooling alone.", low=0)
    n_heads: int = setting(8, "Attention heads of each layer.", low=1)
    n_pooling_heads: int = setting(4, "Attention heads that pool the events.", low=1)
    dropout: float = setting(0.1, "Dropout everywhere but in attention, whose kernels take none.", low=0, below=1)

    temporal_weight: float = setting(0.05, "Share of events' own predictions in the loss, from epoch 4.", low=0, high=1)
    tau_hours: float = setting(24.0, "An event tau hours earlier weighs 1/e in the temporal loss.", above=0)
    learning_rate: float = setting(1e-3, "Peak learning rate of AdamW.", above=0)
    weight_decay: float = setting(0.1, "Weight decay of AdamW.", low=0)
    max_epochs: int = setting(10, "Epochs at most; the learning rate falls to 0 over them.", low=1)
    patience: int = setting(8, "Stop after this many epochs without a better validation loss.", low=1)
    # However many processes share a step, its rate stays. With many GPUs raise the batch, and the rate by its root.
    batch_size: int = setting(32, "Stays per step at most, of all processes together.", low=1)
    max_events_per_batch: int = setting(16384, "Events per step and process at most; bounds a GPU's memory.", low=1)
    mixed_precision: Literal["auto", "no", "bf16"] = setting("auto", "auto is bf16 on CUDA devices that have it.")
    seed: int = setting(0, "Seed of split, weights, order of batches and bootstrap.", low=0, below=2**31)
    n_bootstrap: int = setting(1000, "Bootstrap samples of patients behind every 95 % interval.", low=0)
    save_attention_every: int = setting(50, "Save the attention of every so many batches; 0 saves none.", low=0)

    no_test: bool = setting(False, "Keep no test stays: split 80/20 to train and validate, and test elsewhere.")
    split: str = setting("", "CSV file of patient_id and part (train, validation, test), as a run's split.csv.")
    seeds: int = setting(1, "Train this many times on one split, seeds from --seed on, and report the spread.", low=1)
    cross_validate: int = setting(0, "Train once for each of so many patient-level folds and report the spread.", low=0)
    resume: bool = setting(False, "Go on from latest_checkpoint.pth in the output folder.")
    init_from: str = setting("", "Checkpoint whose weights training starts from, as of another hospital.")
    evaluate: str = setting("", "Checkpoint, or folder of folds or seeds, that scores --data (default: its own).")
    trajectory: str = setting("", "With --evaluate: hours after admission at which to score stays, e.g. 6,12,24,48.")
    no_baseline: bool = setting(False, "Fit no boosted trees beside the model.")
    dry_run: bool = setting(False, "Read the data, say what the run will do and need, and stop.")

    @property
    def prospective(self) -> bool:
        """Whether the end of what is read is a moment of prediction, not the end of the stay."""
        return self.observation_hours > 0 or bool(self.labels)


DEFAULT_STATIC_FEATURES = (
    "patient_gender patient_age patient_race marital_status admission_type admission_location insurance "
    "first_icu_careunit icu_length_of_stay_in_days number_of_events"
).split()
NUMERIC_STATIC_FEATURES = ("patient_age", "icu_length_of_stay_in_days", "number_of_events")


def check_settings(settings: Settings) -> Settings:
    """Fill in the static features of the mode and refuse settings that contradict each other (InputError)."""
    check_limits(settings)
    hidden = tables.KNOWN_ONLY_LATER if settings.prospective else ()
    chosen = settings.static_features or [name for name in DEFAULT_STATIC_FEATURES if name not in hidden]
    unknown = " ".join(name for name in chosen if name not in STATIC_COLUMNS)
    late = " ".join(name for name in chosen if name in hidden)
    modes = [name for name in ("evaluate", "cross_validate") if getattr(settings, name)]
    modes += ["seeds"] * (settings.seeds > 1)
    modes += [name for name in ("resume", "init_from") if getattr(settings, name) and settings.evaluate]
    parts = [name for name in ("evaluate", "cross_validate", "no_test") if getattr(settings, name)]
    parts += ["split"] * (bool(settings.split) and parts[:1] != ["no_test"])
    width, labels = settings.d_model, bool(settings.labels)
    broken = {"unknown_static": unknown, "late_static": late, "one_fold": settings.cross_validate == 1}
    broken["odd_width"] = any(width % divisor for divisor in (settings.n_heads, settings.n_pooling_heads, 2))
    broken |= {"gap_of_whole_stays": settings.gap_hours and not settings.prospective}
    broken |= {"hours_and_labels": labels and settings.observation_hours}
    broken |= {"outcome_and_labels": labels and settings.outcome != Settings.outcome}
    broken |= {"history_without_labels": settings.history_hours and not labels}
    broken |= {"trajectory_of_nothing": settings.trajectory and not settings.evaluate}
    broken |= {"two_modes": len(modes) > 1, "two_tests": len(parts) > 1}
    found = {"unknown": unknown, "late": late, "columns": ", ".join(STATIC_COLUMNS), "width": width}
    found |= {"modes": ", ".join(map(cli_name, modes)), "parts": ", ".join(map(cli_name, parts))}
    for key in filter(broken.get, broken):
        raise files.refusal(key, **found)
    trajectory_hours(settings.trajectory)
    data = settings.data or ("" if settings.evaluate else SAMPLE.name)
    return replace(settings, data=data, static_features=list(chosen))


def trajectory_hours(text: str) -> list[float]:
    """Return the hours of --trajectory, ascending. Raises InputError."""
    hours = np.unique(pd.to_numeric(text.split(",") if text else [], errors="coerce"))
    if not ((hours > 0) & (hours < math.inf)).all():
        raise InputError(f"--trajectory {text}: give hours above 0, such as 6,12,24,48.")
    return hours.tolist()


# ---- Preprocessing ---------------------------------------------------------------------------------------------------


class ClinicalDataPreprocessor:
    """Encoders of event types, times and static columns, fitted on the training stays alone; their state is plain."""

    def __init__(self, static_features: Sequence[str] = DEFAULT_STATIC_FEATURES, item_history: bool = False) -> None:
        self.numeric = [name for name in static_features if name in NUMERIC_STATIC_FEATURES]
        self.categorical = [name for name in static_features if name not in NUMERIC_STATIC_FEATURES]
        self.item_history = item_history

    def fit(self, table: StayTable, first: Self | None = None) -> Self:
        """Learn categories, means and scales from the training stays, and nothing from any other.

        first: of the model that training starts from, which knows times and numbers by its scales: they stay.
        """
        stays, minutes = table.static_columns, table.minutes_to_end.astype(float)
        numbers = self._numbers_of(stays, self.numeric)
        state = {
            "categorical": self.categorical,
            "categories": [sorted({*stays[name].dropna().astype(str), "Unknown"}) for name in self.categorical],
            "numeric": self.numeric,
            "item_history": self.item_history,
            "with_values": tables.columns_with_values(table, [*self.categorical, *self.numeric]),
            "means": numbers.mean().fillna(0).tolist(),
            "scales": numbers.std(ddof=0).replace(0, 1).fillna(1).tolist(),
            "smallest": numbers.min().fillna(0).tolist(),
            "largest": numbers.max().fillna(0).tolist(),
            "time_mean": float(minutes.mean()),
            "time_scale": float(minutes.std()) or 1.0,
            "item_quantiles": items.item_quantiles(table),
        }
        if first is not None:
            before = first.state_dict()
            state |= {name: before[name] for name in ("time_mean", "time_scale")}
            state["item_quantiles"] |= before["item_quantiles"]
            for name, mean, scale in zip(before["numeric"], before["means"], before["scales"]):
                if name in self.numeric:
                    place = self.numeric.index(name)
                    state["means"][place], state["scales"][place] = mean, scale
        return self.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Return what was learnt, as plain data: so a checkpoint loads without pickle."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> Self:
        """Take over what `state_dict` gave. Raises ValueError where its parts do not fit together."""
        self._state = state
        self.categorical, self.numeric = state["categorical"], state["numeric"]
        self.item_history = state["item_history"]
        self.event_type_encoder = _one_hot(list(EVENT_TYPES))
        self.time_scaler = _scaler(state["time_mean"], state["time_scale"])
        of_categories = zip(self.categorical, state["categories"], strict=True)
        self.static_encoders: dict[str, Any] = {name: _one_hot(categories) for name, categories in of_categories}
        self._limits = {}  # least and greatest that training saw
        of_numbers = (state[name] for name in ("numeric", "means", "scales", "smallest", "largest"))
        for name, mean, scale, *limits in zip(*of_numbers, strict=True):
            self.static_encoders[name], self._limits[name] = _scaler(mean, scale), limits
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
        """S, the number of static inputs."""
        return len(self.static_names)

    def encode_event_type(self, event_types: Sequence[str]) -> np.ndarray:
        """(n) names -> (n, 5) one-hot float32; an unknown type is all zeros."""
        names = np.asarray(event_types, dtype=object).reshape(-1, 1)
        return self.event_type_encoder.transform(names).astype(np.float32)

    def encode_relative_time(self, minutes: np.ndarray) -> np.ndarray:
        """(n) minutes to the final event -> (n, 1) float32, mean 0 and scale 1 on the training events."""
        numbers = np.asarray(minutes, float).reshape(-1, 1)  # of no event, where an explanation takes all out
        return (self.time_scaler.transform(numbers) if len(numbers) else numbers).astype(np.float32)

    def decode_hours(self, encoded: Tensor) -> Tensor:
        """Return the inverse of `encode_relative_time`, in hours, for a tensor of any shape."""
        return (encoded * float(self.time_scaler.scale_[0]) + float(self.time_scaler.mean_[0])) / 60

    def _numbers_of(self, stays: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
        """Return numeric columns as they are scaled: the number of events, which spans powers of ten, as logarithm."""
        numbers = stays[columns].astype(float)
        return numbers.assign(**{name: np.log1p(numbers[name]) for name in columns if name == "number_of_events"})

    def unknown_categories(self, table: StayTable) -> dict[str, int]:
        """Return, by column with any, how many stays have a value, or no value in any stay, that training never saw."""
        present = tables.columns_with_values(table, [*self.categorical, *self.numeric])
        counts = {f"{name} (empty)": len(table.stays) for name in self._state["with_values"] if name not in present}
        for column in self.categorical:
            words = table.stays[column].dropna().astype(str)
            counts[column] = int((~words.isin(self.static_encoders[column].categories_[0])).sum())
        return {column: count for column, count in counts.items() if count}

    def encode_static_features(self, stays: pd.DataFrame, static_columns: Sequence[str] | None = None) -> np.ndarray:
        """Return (n, S) float32 of n stays' columns (default: those fitted on): one-hot groups, then numbers.

        A missing number is the training mean. One beyond what training saw counts as the nearest seen: six hours into a
        stay few events have happened yet.
        """
        columns = [*self.categorical, *self.numeric] if static_columns is None else list(static_columns)
        if unknown := ", ".join(column for column in columns if column not in self.static_encoders):
            raise InputError(f"not among the static columns that the preprocessor was fitted on: {unknown}.")
        parts = [np.zeros((len(stays), 0))]
        for column in columns:
            encoder = self.static_encoders[column]
            if column in self.categorical:
                words = stays[column].astype(object).where(stays[column].notna(), "Unknown").astype(str)
                parts.append(encoder.transform(words.to_numpy(object).reshape(-1, 1)))
            else:
                numbers = self._numbers_of(stays, [column]).to_numpy().clip(*self._limits[column])
                parts.append(np.nan_to_num(encoder.transform(numbers)))
        return np.hstack(parts).astype(np.float32)


def _one_hot(categories: Sequence[str]) -> Any:
    """Return a fitted encoder of these categories; an unknown one is all zeros."""
    from sklearn.preprocessing import OneHotEncoder

    names = [np.array(categories, dtype=object)]
    encoder = OneHotEncoder(categories=names, sparse_output=False, handle_unknown="ignore")
    return encoder.fit(np.array([[categories[0]]], dtype=object))


def _scaler(mean: float, scale: float) -> Any:
    """Return a scaler of one number, fitted on two that have this mean and scale."""
    from sklearn.preprocessing import StandardScaler

    return StandardScaler().fit([[mean - scale], [mean + scale]])


# ---- Text embedding: every distinct text becomes a vector once, kept under the text's MD5 ----------------------------

PLAN_CHUNK = 2_048  # texts tokenised at a time: bounds memory, and several processes share the chunks
KEY = np.dtype("V16")  # an MD5 as one value; numpy's strings would lose the zero bytes at its end
T = TypeVar("T")


def clean_text(text: Any) -> str:
    """Return the text, "" where it is missing (None, NaN), with ? for lone surrogates, which no tokenizer takes."""
    return str("" if pd.isna(text) else text).encode("utf-8", "replace").decode("utf-8")


def text_keys(texts: Iterable[str]) -> np.ndarray:
    """Return the MD5 of each text's UTF-8, lone surrogates included: (n,) keys of 16 bytes."""
    hashes = (hashlib.md5(text.encode("utf-8", "surrogatepass"), usedforsecurity=False) for text in texts)
    return np.frombuffer(b"".join(md5.digest() for md5 in hashes), KEY)


def checksum(keys: np.ndarray, vectors: np.ndarray) -> str:
    """Return the CRC-32 of a part of the cache, about a second a GB, as eight hex digits."""
    return f"{zlib.crc32(vectors.data, zlib.crc32(keys.data)):08x}"


class EmbeddingCache:
    """Vectors of one encoder on disk, keyed by the text's MD5.

    Each append makes one immutable part, `part-<time>-<checksum>/` with `keys.npy` (n, 16) uint8 and `vectors.npy`
    (n, dim) float32, written whole: several processes may append, and a killed one leaves no half part. Vectors are
    memory-mapped. A part that is damaged, by its checksum, or foreign is ignored with a warning: its texts are missing.
    """

    def __init__(self, folder: Path, dim: int, legacy_folders: Sequence[Path] = ()) -> None:
        self.folder, self.dim = Path(folder), dim
        self.legacy_folders = [self.folder, *legacy_folders]  # may hold single <md5>.npy files
        self._seen: set[Path] = set()  # the parts taken in
        self._parts: list[np.ndarray] = []  # their vectors, memory-mapped
        self._keys = np.zeros(0, KEY)  # of all rows
        self.refresh()

    def refresh(self) -> None:
        """Take in the parts that any process has added since the last look."""
        self._is_stale, keys, damaged = False, [self._keys], []
        new = sorted({*self.folder.glob("part-*")} - self._seen)
        self._seen.update(new)
        for path in new:
            try:
                part_keys = np.load(path / "keys.npy", allow_pickle=False)
                vectors = np.load(path / "vectors.npy", mmap_mode="r", allow_pickle=False)
                is_part = (part_keys.shape, vectors.shape) == ((len(vectors), 16), (len(part_keys), self.dim))
                is_part &= (part_keys.dtype, vectors.dtype) == (np.uint8, np.float32)
                # A name that an earlier version gave has no checksum: its part is taken as it is.
                if not is_part or path.name[-9] == "-" and not path.name.endswith(checksum(part_keys, vectors)):
                    raise ValueError("no part of this cache, or other bits than were written")
            except Exception:  # numpy parses a damaged header as Python text, and many things can go wrong there
                damaged.append(path.name)
                continue
            keys.append(np.ascontiguousarray(part_keys).view(KEY)[:, 0])
            self._parts.append(np.asarray(vectors))
        if damaged:
            logger.warning(files.WORDS["log"]["damaged_parts"].format(count=len(damaged), names=", ".join(damaged[:3])))
        self._keys = np.concatenate(keys)
        self._ends = np.cumsum([len(vectors) for vectors in self._parts], dtype=np.int64)  # row behind each part's last
        # Of equal keys the later part's counts.
        self._sorted_keys, from_end = np.unique(self._keys[::-1], return_index=True)
        self._sorted_rows = len(self._keys) - 1 - from_end

    def locate(self, keys: np.ndarray) -> np.ndarray:
        """Return the row number of each key, -1 where there is none: (n,) int64."""
        if self._is_stale:
            self.refresh()
        if not len(self._sorted_keys):
            return np.full(len(keys), -1)
        place = np.searchsorted(self._sorted_keys, keys).clip(max=len(self._sorted_keys) - 1)
        return np.where(self._sorted_keys[place] == keys, self._sorted_rows[place], -1)

    def missing(self, keys: np.ndarray) -> np.ndarray:
        """Return (n,) True where a key has no vector."""
        return self.locate(keys) < 0

    def gather(self, keys: np.ndarray) -> np.ndarray:
        """Return the keys' vectors, (n, dim) float32. Raises KeyError where a key has none."""
        rows = self.locate(keys)
        if (n_missing := (rows < 0).sum()) > 0:
            raise KeyError(f"{n_missing} of {len(rows)} texts have no vector in {self.folder}")
        vectors = np.empty((len(rows), self.dim), np.float32)
        part_of_row = np.searchsorted(self._ends, rows, side="right")
        for part in np.unique(part_of_row):
            here = part_of_row == part
            vectors[here] = self._parts[part][rows[here] - self._ends[part]]  # counted from its end
        return vectors

    def append(self, keys: np.ndarray, vectors: np.ndarray) -> None:
        """Add (n,) keys and their (n, dim) float32 vectors as one part. Raises InputError for NaN or a full disk."""
        if vectors.shape != (len(keys), self.dim):
            raise ValueError(f"keys {keys.shape}, vectors {vectors.shape} do not fit a cache of dimension {self.dim}")
        if not np.isfinite(vectors).all():
            raise InputError("the text encoder gave NaN or infinity: its weights are damaged, or try float32")

        digits, rows = keys.view(np.uint8).reshape(-1, 16), np.ascontiguousarray(vectors, np.float32)

        def write(part: Path) -> None:
            part.mkdir()
            np.save(part / "keys.npy", digits, allow_pickle=False)
            np.save(part / "vectors.npy", rows, allow_pickle=False)

        with files.lock_folder(self.folder):
            write_whole(self.folder / f"part-{time.time_ns():020d}-{checksum(digits, rows)}", write)
        self._is_stale = True

    def adopt_legacy(self, keys: np.ndarray) -> None:
        """Copy vectors of single `<md5>.npy` files, (dim,) or (1, dim), into parts, for keys that have none yet."""
        for folder in filter(Path.is_dir, self.legacy_folders):
            names = {entry.name for entry in os.scandir(folder)}
            found = [key for key in keys[self.missing(keys)] if f"{key.tobytes().hex()}.npy" in names]
            for start in range(0, len(found), 50_000):  # bounds memory
                block = np.array(found[start : start + 50_000], KEY)
                vectors = np.full((len(block), self.dim), np.nan, np.float32)
                for key, vector in zip(block, vectors):
                    with suppress(Exception):  # whatever is wrong with it
                        vector[:] = np.load(folder / f"{key.tobytes().hex()}.npy", allow_pickle=False).reshape(self.dim)
                is_good = np.isfinite(vectors).all(axis=1)
                if is_good.any():
                    self.append(block[is_good], vectors[is_good])
                if not is_good.all():
                    logger.warning(files.WORDS["log"]["damaged_files"].format(count=(~is_good).sum()))


class ClinicalTextEncoder:
    """Vectors of texts: distinct texts only, planned in batches, cached under their MD5.

    name: `hashing`, or what `encoders.HuggingFaceEncoder` takes; that object, `encoder`, loads, tokenises and computes.
    Each id (of a local folder: its content), pooling and max_tokens has a cache of its own, whatever dtype or device.
    """

    flush_seconds = 30.0  # a killed run loses at most this much work

    def __init__(
        self,
        name: str | Path = CLINICAL_LONGFORMER,
        max_tokens: int = 512,
        cache_dir: Path = Path("clinical_LF_precomp_emb"),
        weights_dir: Path | None = None,
        devices: Sequence[str | torch.device] | None = None,
        dtype: str = "auto",
    ) -> None:
        cache_dir, self.n_encoded = Path(cache_dir), 0
        weights_dir = weights_dir or (Path("hf_cache") if Path("hf_cache").is_dir() else cache_dir / "hf_cache")
        self.encoder: HashingEncoder | HuggingFaceEncoder = HashingEncoder()
        if str(name) != HashingEncoder.id:
            self.encoder = HuggingFaceEncoder(str(name), max_tokens, cache_dir, weights_dir, devices or (), dtype)
        self.id, self.dim = self.encoder.id, self.encoder.dim
        is_default = self.encoder.cache_name == "yikuan8--Clinical-Longformer-cls-512"
        self.cache = EmbeddingCache(cache_dir / self.encoder.cache_name, self.dim, [cache_dir] if is_default else [])

    @property
    def identity(self) -> tuple[str, str]:
        """Return its id, and what a copy under another name shares: weights, vocabulary and pooling, or nothing."""
        weights = encoders.read_description(self.cache.folder / "encoder.json").get("weights", "")
        return self.id, weights and f"{weights}-{self.encoder.pooling}"

    def encode_event_text_batch(self, texts: Iterable[Any], batch_size: int = 32) -> np.ndarray:
        """Return the texts' vectors, (n, dim) float32, new ones computed and kept; missing text is the empty string."""
        return self.cache.gather(self.embed(texts, progress=False, batch_size=batch_size))

    def vectors(self, texts: Iterable[Any]) -> np.ndarray:
        """Return the vectors of texts that `embed` has seen, (n, dim) float32. Raises KeyError for others."""
        self.cache.refresh()  # another process may have encoded them
        return self.cache.gather(text_keys(map(clean_text, texts)))

    def embed(
        self, texts: Iterable[Any], rank: int = 0, world: int = 1, progress: bool = True, batch_size: int = 64
    ) -> np.ndarray:
        """See to it that every text is in the cache; return the texts' keys (n,).

        Each of several processes calls this with all texts and does its share. Batches are planned over all texts,
        cached or not: a run that was stopped keeps what it did, and, started again, gives the same vectors bit for bit.
        """
        texts = [clean_text(text) for text in texts]
        keys = text_keys(texts)
        distinct = np.unique(keys, return_index=True)[1]
        longest_first = np.array(sorted(distinct, key=lambda number: -len(texts[number])), int)
        size = min(PLAN_CHUNK, max(64, len(distinct) // 16))
        chunks = np.array_split(longest_first, max(1, math.ceil(len(distinct) / size)))[rank::world]
        own = np.concatenate([np.zeros(0, int), *chunks])
        self.cache.refresh()
        self.cache.adopt_legacy(keys[own])
        is_missing = np.zeros(len(texts), bool)
        is_missing[own] = self.cache.missing(keys[own])
        if not is_missing.any():
            return keys
        self.encoder.load(self.cache.folder)
        done: list[tuple[np.ndarray, np.ndarray]] = []  # keys and vectors of a batch
        flushed = time.monotonic()

        def keep() -> None:
            if done:
                self.cache.append(*map(np.concatenate, zip(*done)))
                done.clear()

        with Progress(total=int(is_missing.sum()), desc="encoding", unit=" texts", active=progress) as bar:
            try:
                for numbers, vectors in self._encoded(self._batches(texts, chunks, is_missing, batch_size)):
                    done.append((keys[numbers], vectors))
                    self.n_encoded += len(numbers)
                    bar.update(len(numbers))
                    if time.monotonic() - flushed > self.flush_seconds:
                        keep()
                        flushed = time.monotonic()
            finally:  # also on Ctrl-C
                keep()
        return keys

    def _batches(
        self, texts: list[str], chunks: list[np.ndarray], is_missing: np.ndarray, batch_size: int
    ) -> Iterator[tuple[np.ndarray, list]]:
        """Yield numbers of missing texts and their tokens, longest first, so that memory peaks at once."""
        budget = min(self.encoder.budget, batch_size * self.encoder.max_tokens)  # short texts come by the hundred
        for chunk in filter(lambda numbers: is_missing[numbers].any(), chunks):
            tokens: list = self.encoder.tokenise([texts[i] for i in chunk])
            for batch in split_by_budget(np.array([len(text_tokens) for text_tokens in tokens]), budget):
                if missing := [place for place in batch if is_missing[chunk[place]]]:
                    yield chunk[missing], [tokens[place] for place in missing]

    def _encoded(self, batches: Iterable[tuple[np.ndarray, list]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield numbers and vectors in the order of the batches; one thread per device, two batches ahead."""
        encode = lambda device, numbers, tokens: (numbers, self.encoder.forward(device, tokens))
        pools = [ThreadPoolExecutor(1) for _ in range(self.encoder.n_devices)]
        turns = zip(cycle(enumerate(pools)), batches)
        started = (pool.submit(encode, device, *batch) for (device, pool), batch in turns)
        try:
            yield from run_ahead(started, 2 * len(pools))
        finally:
            for pool in pools:
                pool.shutdown(cancel_futures=True)


def run_ahead(started: Iterator[Future[T]], ahead: int) -> Iterator[T]:
    """Yield the results of work in the order in which it is started, some pieces ahead."""
    waiting = deque(islice(started, ahead))
    while waiting:
        waiting.extend(islice(started, 1))
        yield waiting.popleft().result()


def split_by_budget(lengths: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Yield batches of places, longest first, each with at most `budget` padded tokens and a quarter of padding."""
    order, start = np.argsort(-lengths, kind="stable"), 0
    falling = lengths[order]
    while start < len(order):
        longest = max(1, falling[start])
        alike = np.searchsorted(-falling, -0.75 * longest, side="right") - start
        size = max(1, min(alike, budget // longest))
        yield order[start : start + size]
        start += size


# ---- Dataset ---------------------------------------------------------------------------------------------------------

N_WORKERS = 4  # a thread gathers an event's 3 kB in about a microsecond; four of them keep a GPU busy


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

    An event is its type (5), text vector (E, 768 for Clinical-Longformer), time (1) and, with `--item-history`, HISTORY
    (9). All tensors live where the text vectors live; `packed` makes batches without padding there.
    """

    def __init__(
        self, table: StayTable, preprocessor: ClinicalDataPreprocessor, text_vectors: np.ndarray | Tensor
    ) -> None:
        self.table, self.lengths, self.preprocessor = table, table.lengths, preprocessor
        self.text_vectors = torch.as_tensor(text_vectors)  # (n_texts, E)
        self.device = self.text_vectors.device
        here = lambda array: torch.from_numpy(array).to(self.device)
        self.type_columns = here(preprocessor.encode_event_type((*EVENT_TYPES, "unknown")))  # (6, 5)
        self.event_type, self.text = here(table.event_type), here(table.text)  # (n_events,) each
        columns = [preprocessor.encode_relative_time(table.minutes_to_end)]
        if preprocessor.item_history:
            columns.append(items.encode_history(table, preprocessor.state_dict()["item_quantiles"]))
        self.event_columns = here(np.hstack(columns))  # (n_events, 1 or 10), time first
        self.offsets = here(table.offsets)
        self.static = here(preprocessor.encode_static_features(table.static_columns))  # (n_stays, S)
        self.labels = here(table.labels.astype(np.float32)).unsqueeze(1)  # (n_stays, 1)
        self.n_history = self.event_columns.shape[1] - 1  # all but the time
        self.input_dim = len(EVENT_TYPES) + self.text_vectors.shape[1] + self.event_columns.shape[1]

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
        """Return a batch of these stays; what is sent to the device is the stays' numbers and lengths."""
        layout = layout_of_lengths(self.lengths[stays], self.device)
        numbers = torch.from_numpy(stays).to(self.device, non_blocking=True)  # (B,)
        stay_of_event = layout.place // layout.attention_mask.shape[1]  # (N,)
        rows = self.offsets[numbers][stay_of_event] + layout.position  # (N,)
        return PackedStays(self.events(rows), self.static[numbers], self.labels[numbers], layout)


def collate_stays(stays: Sequence[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
    """Pad to the longest stay; `attention_mask (B, L)` is True at real events."""
    sequences, static, labels = zip(*stays)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return {
        "sequences": nn.utils.rnn.pad_sequence(list(sequences), batch_first=True),  # (B, L, input_dim)
        "static_features": torch.stack(static),  # (B, S)
        "labels": torch.stack(labels),  # (B, 1)
        "attention_mask": torch.arange(int(lengths.max())) < lengths.unsqueeze(1),  # (B, L)
    }


def place_vectors(text_vectors: np.ndarray, device: torch.device) -> Tensor:
    """Return (n_texts, E) on a GPU, if they take less than half of its free memory, else where they are."""
    vectors = torch.from_numpy(text_vectors)
    fits = device.type == "cuda" and vectors.nbytes < torch.cuda.mem_get_info(device)[0] / 2
    return vectors.to(device) if fits else vectors


def packed_batches(
    dataset: ClinicalSequenceDataset, batches: Sequence[np.ndarray], device: torch.device
) -> Iterator[PackedStays]:
    """Yield the batches of stays on the device; where the vectors are not, threads gather ahead in pinned memory."""
    if dataset.device.type == device.type:
        yield from map(dataset.packed, batches)
        return

    def gather(stays: np.ndarray) -> PackedStays:
        batch = dataset.packed(stays)
        return batch._replace(events=batch.events.pin_memory())

    with ThreadPoolExecutor(N_WORKERS) as workers:
        for batch in run_ahead((workers.submit(gather, stays) for stays in batches), N_WORKERS):
            yield send_to_device(batch, device, non_blocking=True)


def plan_batches(
    lengths: np.ndarray, batch_size: int, max_events: int, seed: int | None = None, world: int = 1
) -> list[np.ndarray]:
    """Return the stays of each batch, each stay once: in random order with a seed, else the longest first.

    A batch holds at most `batch_size` stays, its longest first, and each of `world` processes at most `max_events`
    events of it (a longer stay is alone). In training lengths mix: batches of similar ones cost 0.004 of AUROC.
    """
    longest_first, sizes = np.argsort(-lengths, kind="stable"), lengths.tolist()
    order = longest_first if seed is None else np.random.default_rng(seed).permutation(len(lengths))
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
    """Return this process's stays of a batch, and their weight: a process left without computes one with weight 0."""
    share = batch[rank::world]
    return (share, 1.0) if len(share) else (batch[:1], 0.0)


# ---- Model -----------------------------------------------------------------------------------------------------------

D_FEEDFORWARD = 512  # twice the default width; wider brought nothing
LAYER_SCALE = 0.1
LATEST_BIAS = 4.0  # the latest event of each item weighs e^4 = 55 times an earlier one when training begins
MEMORY_KEYS = 16  # of the latest numbers of a stay's items; 64 overfit the synthetic stays
EVENT_DROPOUT = 0.2  # where one event speaks for its item; where all events of an item speak, hiding some only harms


def sinusoidal_positions(positions: Tensor, d_model: int) -> Tensor:
    """(N,) positions of any size -> (N, D): Vaswani et al. 2017, section 3.5."""
    rates = torch.exp(torch.arange(0, d_model, 2, device=positions.device) * (-math.log(10000.0) / d_model))
    angles = positions.unsqueeze(1) * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


def in_full_precision(layer: nn.Module, values: Tensor) -> Tensor:
    """Apply a layer in fp32 also under autocast: logits out of bf16 tie, and are up to 0.4 % off."""
    with torch.autocast(values.device.type, enabled=False):
        return layer(values.float())


def has_variable_length_kernel(query: Tensor) -> bool:
    """Say if the variable-length kernel takes (N, H, D/H): GPU since Ampere, half precision, width 8, 16, ... 256."""
    width, is_half = query.shape[2], query.dtype in (torch.bfloat16, torch.float16)
    fits = query.is_cuda and is_half and width % 8 == 0 and width <= 256
    return fits and torch.cuda.get_device_capability(query.device) >= (8, 0)


def attend_within_stays(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """Softmax attention of packed events (N, H, D/H), each within its own stay; memory grows with N, not its square."""
    if has_variable_length_kernel(query):
        from torch.nn.attention.varlen import varlen_attn  # here: it brings a compiler, two seconds of every start

        longest = max(layout.lengths)
        return cast(Tensor, varlen_attn(query, key, value, layout.ends, layout.ends, longest, longest))
    # Without such a kernel: one fused call per run of stays of equal length.
    runs = [(len(list(alike)), length) for length, alike in groupby(layout.lengths) if length]
    sizes = [n_stays * length for n_stays, length in runs]
    attended = []
    for run, *parts in zip(runs, query.split(sizes), key.split(sizes), value.split(sizes)):
        q, k, v = (part.unflatten(0, run).transpose(1, 2) for part in parts)  # (n_stays, H, length, D/H)
        attended.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1))
    return torch.cat(attended) if attended else query


def attention_weights_within_stays(query: Tensor, key: Tensor, layout: Layout) -> Tensor:
    """(B, H, L, L) weights that `attend_within_stays` used, 0 in rows and columns of padding."""
    padded = lambda heads: unpack(heads.float().flatten(1), layout).unflatten(2, heads.shape[1:])  # (B, L, H, D/H)
    products = torch.einsum("bihd,bjhd->bhij", padded(query), padded(key))
    is_event = layout.attention_mask[:, None, None, :]
    weights = softmax_among(products / math.sqrt(query.shape[2]), is_event)
    return weights * is_event.transpose(2, 3)


def softmax_among(scores: Tensor, is_member: Tensor) -> Tensor:
    """Return the softmax of the last axis's members, 0 for all others, also where there is no member."""
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~is_member, lowest).softmax(-1) * is_member


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer (Xiong et al. 2020) over packed events; what it adds starts small (LayerScale).

    Touvron et al. 2021: a model first learns what each event says by itself, context as far as the data ask for it.
    """

    def __init__(self, d_model: int, n_heads: int, d_feedforward: int, dropout: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm_attention, self.norm_feedforward = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.query_key_value = nn.Linear(d_model, 3 * d_model)
        self.attention_output = nn.Linear(d_model, d_model)
        widen, narrow = nn.Linear(d_model, d_feedforward), nn.Linear(d_feedforward, d_model)
        self.feedforward = nn.Sequential(widen, nn.ReLU(), nn.Dropout(dropout), narrow)
        self.dropout = nn.Dropout(dropout)
        self.attention_scale = nn.Parameter(torch.full((d_model,), LAYER_SCALE))
        self.feedforward_scale = nn.Parameter(torch.full((d_model,), LAYER_SCALE))

    def forward(self, events: Tensor, layout: Layout, layer_weights: list[Tensor] | None = None) -> Tensor:
        """(N, D) -> (N, D); `layer_weights` takes the attention weights (B, H, L, L)."""
        qkv = self.query_key_value(self.norm_attention(events))  # (N, 3 D)
        query, key, value = qkv.unflatten(1, (3, self.n_heads, -1)).unbind(1)  # (N, H, D/H) each
        if layer_weights is not None:
            layer_weights.append(attention_weights_within_stays(query, key, layout))
        attended = attend_within_stays(query, key, value, layout).flatten(1)  # (N, D)
        events = events + self.attention_scale * self.dropout(self.attention_output(attended))
        return events + self.feedforward_scale * self.dropout(self.feedforward(self.norm_feedforward(events)))


class AttentionPooling(nn.Module):
    """Multi-head attention of one learnable query over a stay's events."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.query_projection, self.key, self.value, self.output = (nn.Linear(d_model, d_model) for _ in range(4))

    def scores(self, query: Tensor, events: Tensor) -> Tensor:
        """query (B, 1, D), events (B, L, D) -> (B, H, L): its scaled similarity with each event's key, in fp32."""
        split = (self.n_heads, -1)
        with torch.autocast(events.device.type, enabled=False):
            q = self.query_projection(query.squeeze(1).float()).unflatten(1, split)  # (B, H, C)
            key = torch.einsum("bhc,hcd->bhd", q, self.key.weight.unflatten(0, split))  # (B, H, D)
            of_bias = (q * self.key.bias.unflatten(0, split)).sum(2, keepdim=True)  # (B, H, 1)
            return (key @ events.float().transpose(1, 2) + of_bias) / math.sqrt(q.shape[2])

    def forward(
        self, query: Tensor, events: Tensor, attention_mask: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """query (B, 1, D), events (B, L, D), bias of the scores (B, H, 1, L) -> pooled (B, 1, D), weights (B, H, 1, L).

        All in fp32. The query and what it pools pass the projections of keys and values, not each event: the same sums.
        """
        split = (self.n_heads, -1)
        with torch.autocast(events.device.type, enabled=False):
            scores = self.scores(query, events).unsqueeze(2)  # (B, H, 1, L)
            weights = softmax_among(scores if bias is None else scores + bias, attention_mask[:, None, None, :])
            shares = weights.squeeze(2)  # (B, H, L)
            pooled = shares @ events.float()  # (B, H, D)
            values = torch.einsum("bhd,hcd->bhc", pooled, self.value.weight.unflatten(0, split))  # (B, H, C)
            values = values + shares.sum(2, keepdim=True) * self.value.bias.unflatten(0, split)
            return self.output(values.flatten(1)).unsqueeze(1), weights


class ItemHistoryProjection(nn.Module):
    """Projects events with their history: what their numbers say depends on the text, as a low-rank product of the two.

    Quantiles enter in eight soft steps (Gorishniy et al. 2022, arXiv 2203.05556): low and high values can both be bad.
    Texts of any encoder look much alike: their columns are whitened over items (Su et al. 2021, arXiv 2103.15316).
    """

    n_steps = 8
    item_axes: Tensor  # (5 + E, 5 + E), one axis a row

    def __init__(self, n_plain: int, d_model: int, n_pooling_heads: int = 4) -> None:
        super().__init__()
        self.parts = n_text, _, n_quantiles, n_others = n_plain - 1, 1, len(STATISTICS), len(HISTORY) - len(STATISTICS)
        n_numbers = n_quantiles * self.n_steps + n_others + 1
        self.text, self.numbers = nn.Linear(n_text, d_model), nn.Linear(n_numbers, d_model, bias=False)
        self.text_factor, self.number_factor = nn.Linear(n_text, d_model), nn.Linear(n_numbers, d_model)
        self.product = nn.Linear(d_model, d_model, bias=False)
        self.key = nn.Linear(n_text, MEMORY_KEYS)  # under which a stay keeps its latest numbers
        self.latest_bias = nn.Parameter(torch.full((n_pooling_heads,), LATEST_BIAS))
        self.register_buffer("item_axes", torch.eye(n_text))

    def whiten(self, training_items: Tensor) -> None:
        """Take over the directions in which items (K, 5 + E), each once and normalised, differ, and how far."""
        centred = (training_items - training_items.mean(0)).double()
        variances, axes = torch.linalg.eigh(centred.T @ centred / len(training_items))
        largest = variances.max()
        is_known = variances > 1e-6 * largest  # in all others, items of training do not differ
        spread = (variances[is_known] + 1e-3 * largest).sqrt()
        self.item_axes.zero_()
        self.item_axes[: len(spread)] = (axes[:, is_known] / spread).T

    def of_item(self, projection: nn.Linear, text: Tensor) -> Tensor:
        """Project text (N, 5 + E) -> (N, D) by its whitened columns; in fp32, since whitening makes rounding loud."""
        # The axes join the weights, of which there are fewer than events.
        with torch.autocast(text.device.type, enabled=False):
            return F.linear(text.float(), projection.weight @ self.item_axes, projection.bias)

    def forward(self, events: Tensor) -> Tensor:
        """(N, 5 + E + 1 + 9) -> (N, D)."""
        text, time_to_end, quantiles, others = events.split(self.parts, dim=1)
        edges = torch.arange(self.n_steps, device=events.device)
        steps = ((quantiles.unsqueeze(2) + 1) * self.n_steps / 2 - edges).clamp(0, 1) - 0.5  # (N, 6, 8)
        numbers = torch.cat([steps.flatten(1) * others[:, :1], others, time_to_end / 5], dim=1)  # (N, 52)
        product = self.product(self.of_item(self.text_factor, text) * self.number_factor(numbers))
        return self.of_item(self.text, text) + self.numbers(numbers) + product


class ClinicalTransformer(nn.Module):
    """Probability of death, from a stay's events and its static features.

    What its normalised inputs, scaled positions and small query are worth is measured by tests/benchmarks/ablation.py.
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
        d_feedforward: int = D_FEEDFORWARD,
        n_pooling_heads: int = 4,
        dropout: float = 0.1,
        n_history: int = 0,
    ) -> None:
        super().__init__()
        sizes = {name: size for name, size in locals().items() if isinstance(size, (int, float))}
        self.architecture: dict[str, Any] = sizes
        self.n_plain = input_dim - n_history  # columns before those of an event's history
        self.register_buffer("event_mean", torch.zeros(input_dim))
        self.register_buffer("event_scale", torch.ones(input_dim))
        self.register_buffer("static_weight", torch.ones(static_dim))
        of_history = partial(ItemHistoryProjection, self.n_plain, d_model, n_pooling_heads)
        projection = of_history() if n_history else nn.Linear(input_dim, d_model)
        self.input_projection: ItemHistoryProjection | nn.Linear = projection
        # An average event is all bias. Were that tiny, the LayerNorm would blow up the smallest difference from it, and
        # so the paths of Integrated Gradients. With histories events are alike: it would drown what tells them apart.
        bias = projection.text.bias if isinstance(projection, ItemHistoryProjection) else projection.bias
        nn.init.normal_(bias, std=0.3 if n_history else 1.0)
        self.input_norm = nn.LayerNorm(d_model)
        self.position_scale = nn.Parameter(torch.tensor(0.1))
        self.dropout = nn.Dropout(dropout)
        layers = [EncoderLayer(d_model, n_heads, d_feedforward, dropout) for _ in range(n_layers)]
        self.transformer_encoder = nn.ModuleList(layers)
        self.final_norm = nn.LayerNorm(d_model)
        self.query_vector = nn.Parameter(0.02 * torch.randn(1, 1, d_model))
        self.attention_pooling = AttentionPooling(d_model, n_pooling_heads)
        widths = (d_model + static_dim + MEMORY_KEYS * n_history, 256, 128)
        hidden = [(nn.Linear(*pair), nn.ReLU(), nn.Dropout(dropout)) for pair in zip(widths, widths[1:])]
        self.classifier = nn.Sequential(*hidden[0], *hidden[1], nn.Linear(128, 1))

    def set_input_statistics(
        self, mean: Tensor, scale: Tensor, static_weight: Tensor, training_items: Tensor | None = None
    ) -> None:
        """Set mean and spread of the columns before the history, and factors (S); a history needs items (K, 5 + E)."""
        self.event_mean[: self.n_plain] = mean
        self.event_scale[: self.n_plain] = scale
        self.static_weight.copy_(static_weight)
        if isinstance(self.input_projection, ItemHistoryProjection) and training_items is not None:
            self.input_projection.whiten((training_items - mean[:-1]) / scale[:-1])

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
        Raises InputError for sequences of another shape.
        """
        layout = self._layout_of(sequences, attention_mask)
        layer_weights: list[Tensor] | None = [] if return_attention else None
        logits, attention = self.score_packed(pack(sequences, layout), static_features, layout, layer_weights)
        return (logits.sigmoid(), attention) if return_attention else logits.sigmoid()

    def logits(self, sequences: Tensor, static_features: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, 1): log-odds of death, what losses and attributions are computed on; inputs as those of `forward`."""
        layout = self._layout_of(sequences, attention_mask)
        return self.score_packed(pack(sequences, layout), static_features, layout)[0]

    def _layout_of(self, sequences: Tensor, attention_mask: Tensor | None) -> Layout:
        width = self.architecture["input_dim"]
        if sequences.ndim != 3 or sequences.shape[2] != width:
            shape = tuple(sequences.shape)
            raise InputError(f"sequences of shape {shape}: give (B, L, {width}), a single stay with B = 1.")
        if attention_mask is None:
            attention_mask = torch.ones(sequences.shape[:2], dtype=torch.bool, device=sequences.device)
        return layout_of_mask(attention_mask)

    def score_packed(
        self,
        events: Tensor,
        static_features: Tensor,
        layout: Layout,
        layer_weights: list[Tensor] | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return logits (B, 1), and the dict that `forward` describes, of events without padding (N, input_dim).

        `layer_weights` takes (B, H, L, L) a layer. With `rows` (N,) events are rows of fewer ones, each projected once.
        """
        normalised = (events - self.event_mean) / self.event_scale  # (N, input_dim)
        outputs = self.input_norm(self.input_projection(normalised))  # (N, D)
        outputs = outputs if rows is None else outputs[rows]
        positions = sinusoidal_positions(layout.position, outputs.shape[1])
        outputs = self.dropout(outputs + self.position_scale * positions)
        for layer in self.transformer_encoder:
            outputs = layer(outputs, layout, layer_weights)
        outputs = unpack(self.final_norm(outputs), layout)  # (B, L, D)
        query = self.query_vector.expand(len(outputs), -1, -1)  # (B, 1, D)
        # A memory addressed by text (Schlag et al. 2021, arXiv 2102.11174) keeps apart by item what attention averages.
        projection, is_shown, bias = self.input_projection, layout.attention_mask, None
        memory = outputs.new_zeros(len(outputs), 0)
        if isinstance(projection, ItemHistoryProjection):
            if self.training:  # dropout of keys before the softmax (Li et al. 2023, arXiv 2208.02646)
                is_shown = is_shown & (torch.rand(is_shown.shape, device=is_shown.device) >= EVENT_DROPOUT)
            parts = (projection.of_item(projection.key, normalised[:, : self.n_plain - 1]), events[:, self.n_plain :])
            keys, history = (unpack(part if rows is None else part[rows], layout) for part in parts)  # (B, L, 16 and 9)
            is_latest = history[..., HISTORY.index("is_latest"), None]  # (B, L, 1)
            bias = (projection.latest_bias * is_latest).transpose(1, 2).unsqueeze(2)  # (B, H, 1, L)
            latest = history * is_latest * is_shown.unsqueeze(2)  # (B, L, 9)
            with torch.autocast(keys.device.type, enabled=False):
                memory = (keys.transpose(1, 2) @ latest).flatten(1)  # (B, 144)
        pooled, pooling_weights = self.attention_pooling(query, outputs, is_shown, bias)
        inputs = torch.cat([pooled.squeeze(1), static_features * self.static_weight, memory], dim=1)
        attention = {"transformer_output": outputs, "pooling_weights": pooling_weights, "query_vector": query}
        return in_full_precision(self.classifier, inputs), attention | {"layer_attention_weights": layer_weights}


# ---- Loss ------------------------------------------------------------------------------------------------------------


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
        self, logits: Tensor, events: Tensor, labels: Tensor, hours_to_final_event: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """(B, 1), (B, L, D), (B, 1), (B, L), (B, L) -> loss of each stay (B,)."""
        loss = F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="none").squeeze(1)
        if self.event_head is None:
            return loss
        event_logits = in_full_precision(self.event_head, events).squeeze(2)  # (B, L)
        outcomes = labels.expand_as(event_logits)
        event_loss = F.binary_cross_entropy_with_logits(event_logits, outcomes, reduction="none")
        weights = softmax_among(-hours_to_final_event / self.tau_hours, attention_mask)  # (B, L); cannot underflow
        return (1 - self.weight) * loss + self.weight * (weights * event_loss).sum(1)


class TrainingObjective(nn.Module):
    """Model and loss as one module, so that one wrapper synchronises the gradients of both."""

    def __init__(
        self, model: ClinicalTransformer, loss: TemporalAwareLoss, preprocessor: ClinicalDataPreprocessor
    ) -> None:
        super().__init__()
        self.model, self.loss, self.preprocessor = model, loss, preprocessor

    def forward(self, batch: PackedStays | dict[str, Tensor], time_column: int) -> Tensor:
        """Return the loss of each stay of the batch (B,), packed or as `collate_stays` pads it."""
        if isinstance(batch, dict):
            layout = layout_of_mask(batch["attention_mask"])
            batch = PackedStays(pack(batch["sequences"], layout), batch["static_features"], batch["labels"], layout)
        logits, attention = self.model.score_packed(batch.events, batch.static_features, batch.layout)
        times = unpack(batch.events[:, time_column, None], batch.layout).squeeze(2)  # (B, L)
        hours, is_event = self.preprocessor.decode_hours(times), batch.layout.attention_mask
        return self.loss(logits, attention["transformer_output"], batch.labels, hours, is_event)


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


class Checkpoint(NamedTuple):
    """A trained model and all that is needed to apply and explain it."""

    model: ClinicalTransformer
    preprocessor: ClinicalDataPreprocessor
    settings: Settings
    text_encoder: str  # identity of the encoder its inputs came from
    patients: dict[str, list[int]]  # ids of the patients of each part of the split
    baseline: dict[str, Tensor]  # mean training event (input_dim,) and mean static features (S,)
    state: dict[str, Any]  # everything that the file holds

    def has_read(self, text_encoder: str, weights: str) -> bool:
        """Return whether its inputs came from an encoder: known by its weights if they are known, else by its id."""
        own = self.state.get("encoder_weights")
        return own == weights if own and weights else self.text_encoder == text_encoder

    def is_new_item(self, texts: Iterable[str]) -> np.ndarray:
        """Return whether training never saw the item of each text, or not in its unit: (n,) bool."""
        known = frozenset(self.state["training_items"])
        return np.array([items.item_hash(text) not in known for text in texts], dtype=bool)

    def is_seen(self, stays: pd.DataFrame) -> np.ndarray:
        """Return whether each of n stays is of a patient that the model was trained or tuned on: (n,) bool."""
        return stays["patient_id"].isin(self.patients["train"] + self.patients["validation"]).to_numpy()


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Load a checkpoint, executing nothing in it; the model is in eval mode. Raises InputError for any other file."""
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load compares no sums
            raise zipfile.BadZipFile
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint. Train first, or give the path of a best_model.pth.") from None
    except Exception as error:  # torch.load raises nearly anything for a damaged or hostile file
        raise files.refusal("no_checkpoint", path=path, error=type(error).__name__) from None
    if not isinstance(state, dict) or state.get("program") != "clinical_LF" or not isinstance(state.get("format"), int):
        raise InputError(f"{path}: a checkpoint of another program. Give a best_model.pth that train.py wrote.")
    if state["format"] != CHECKPOINT_FORMAT or state.get("temperature", 1.0) != 1.0:
        raise files.refusal("other_format", path=path, found=state["format"], read=CHECKPOINT_FORMAT)
    try:
        model = ClinicalTransformer(**state["architecture"]).to(device)
        model.load_state_dict(state["model"])
        known = Settings.__dataclass_fields__
        settings = Settings(**{name: value for name, value in state["settings"].items() if name in known})
        preprocessor = ClinicalDataPreprocessor().load_state_dict(state["preprocessor"])
        if not {*state["parts"]} <= {*files.parts_of(state)}:
            raise ValueError("parts are missing")
        json.dumps(state, allow_nan=False, default=lambda tensor: float(tensor.sum()))  # ValueError: NaN or infinity
        baseline = {name: mean.to(device) for name, mean in state["baseline"].items()}
        encoder, patients = state["text_encoder"], state["patients"]
        return Checkpoint(model.eval(), preprocessor, check_settings(settings), encoder, patients, baseline, state)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise files.refusal("unfit_checkpoint", path=path, error=type(error).__name__) from None


# ---- Training --------------------------------------------------------------------------------------------------------

# What a resumed run must share with the run it goes on from.
SETTINGS_OF_A_RUN = (
    "seed outcome vitals static_features item_history observation_hours gap_hours first_stay_only learning_rate "
    "batch_size max_events_per_batch weight_decay temporal_weight tau_hours dropout init_from d_model n_layers n_heads "
    "n_pooling_heads"
).split()
# One number among forty flags goes unheard else: with weight 1 a tenth of the sample's true effect of age is learnt.
NUMBER_WEIGHT = 3.0
TEXT_SHARE = 0.75  # of an event's variance; scaling column by column would leave the time one voice among 774
WARMUP_STEPS = 50  # Adam's second moments settle in about so many
GRADIENT_CLIP = 1.0  # norm; that of most steps is below
TREES_SHARE = 0.5  # of a label, with item history: what trees say that have not seen the patient (Hinton et al. 2015)
PLAIN_EPOCHS = 3  # the temporal loss joins after them: from the first epoch on it costs the sample 0.02 of AUPRC
AVERAGING = 0.98  # decay per step of the running mean of the weights, which is validated and kept
MOST_ATTENTION_FILES = 5  # of an epoch
ATTENTION_FOLDER = f"{Settings.output_dir}/attention_weights"
MAX_MAP_EVENTS, MAX_MAP_BINS = 1024, 64


def input_statistics(dataset: ClinicalSequenceDataset) -> tuple[Tensor, Tensor]:
    """Return mean (input_dim,) and scale (6 + E,) of the events; so scaled, text makes 3/4 of an event's variance."""
    indexed = ((dataset.type_columns, dataset.event_type), (dataset.text_vectors, dataset.text))
    parts = [weighted_sums(rows, torch.bincount(index, minlength=len(rows))) for rows, index in indexed]
    parts.append(weighted_sums(dataset.event_columns, torch.ones_like(dataset.text)))
    mean, mean_square = torch.cat(parts, dim=1).cpu() / len(dataset.text)  # (input_dim,) each
    scale = (mean_square - mean.square()).clamp(min=0).sqrt()
    scale = torch.where(scale > 1e-6, scale, torch.ones_like(scale))  # a column that never varies keeps its size
    n_types, n_text = len(EVENT_TYPES), dataset.text_vectors.shape[1]
    share = torch.full((n_types + n_text + 1,), (1 - TEXT_SHARE) / (n_types + 1))
    share[n_types:-1] = TEXT_SHARE / n_text
    return mean.float(), (scale[: len(share)] / (share * len(share)).sqrt()).float()


def weighted_sums(rows: Tensor, counts: Tensor) -> Tensor:
    """(n, C) rows, each of which counts so many times -> (2, C) float64: their sum and the sum of their squares."""
    sums = torch.zeros(2, rows.shape[1], dtype=torch.float64, device=rows.device)
    for block, count in zip(rows.split(65536), counts.double().split(65536)):
        values = block.double()
        sums += torch.stack([count @ values, count @ values.square()])
    return sums


def items_of_events(dataset: ClinicalSequenceDataset) -> Tensor:
    """Return (K, 5 + E) type and text of each item among the events: texts that differ by their number are one."""
    used, first_event = np.unique(dataset.table.text, return_index=True)
    texts = pd.Series([items.read_text(text).without_value for text in dataset.table.texts[used]])
    rows = torch.from_numpy(first_event[~texts.duplicated()]).to(dataset.device)
    return dataset.events(rows)[:, : -1 - dataset.n_history].cpu()


class TrainingData(NamedTuple):
    """What a model is trained on."""

    table: StayTable
    split: Split
    text_vectors: np.ndarray  # (n_texts, E)
    text_encoder: str  # identity of the encoder of the vectors
    encoder_weights: str = ""  # by which it is known whatever its name


class Trainer:
    """One training run: what the loop needs, so that an epoch reads as the algorithm."""

    def __init__(self, settings: Settings, data: TrainingData, accelerator: Accelerator) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.accelerator, self.text_encoder = settings, accelerator, data.text_encoder
        self.encoder_weights = data.encoder_weights
        self.output, self.is_main = Path(settings.output_dir), accelerator.is_main_process
        table, split, train_table = data.table, data.split, data.table.take(data.split.train)
        first = load_checkpoint(settings.init_from) if settings.init_from else None
        preprocessor = ClinicalDataPreprocessor(settings.static_features, settings.item_history)
        self.preprocessor = preprocessor.fit(train_table, first and first.preprocessor)
        vectors = place_vectors(data.text_vectors, accelerator.device)
        dataset_of = partial(ClinicalSequenceDataset, preprocessor=self.preprocessor, text_vectors=vectors)
        self.train_set, self.validation_set = dataset_of(train_table), dataset_of(table.take(split.validation))
        self.test_set = dataset_of(table.take(split.test)) if len(split.test) else None
        if settings.item_history:
            risks = trees.unseen_risks(train_table, self.train_set.static.cpu().numpy(), settings.seed)
            self.train_set.labels.lerp_(torch.from_numpy(risks).to(self.train_set.labels)[:, None], TREES_SHARE)
        self.time_column = len(EVENT_TYPES) + vectors.shape[1]
        # Whose attention is saved, in every epoch the same stays: of some 512 events, as a picture can show them.
        self.shown = np.argsort(np.abs(self.train_set.lengths - 512), kind="stable")[:MOST_ATTENTION_FILES].tolist()
        self.training_items = sorted(set(map(items.item_hash, table.texts[np.unique(train_table.text)])))
        self.data_fingerprint = table.fingerprint()
        patient_ids = table.stays["patient_id"]
        self.patients = {name: patient_ids.iloc[part].unique().tolist() for name, part in split._asdict().items()}
        model = self.new_model()
        if first is not None:
            self.take_over(model, first)
        loss = TemporalAwareLoss(settings.d_model, settings.tau_hours, settings.temporal_weight)
        objective = TrainingObjective(model, loss, self.preprocessor)
        optimizer = torch.optim.AdamW(objective.parameters(), weight_decay=settings.weight_decay)  # rate: by step
        self.step = self.epochs_done = 0
        self.average = AveragedModel(model.to(accelerator.device), multi_avg_fn=self.average_weights)
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)
        self.threads = ThreadPoolExecutor(2)  # write attention and read losses while training goes on
        self.writing: Future[None] | None = None
        self.history: list[dict[str, float]] = []
        self.thresholds: dict[str, float] = {}  # of the newest epoch
        self.n_parameters = sum(parameter.numel() for parameter in self.model.parameters())

    def new_model(self) -> ClinicalTransformer:
        """Return a model with fresh weights that knows the training events' mean and spread."""
        settings, dataset = self.settings, self.train_set
        names = ("d_model", "n_layers", "n_heads", "n_pooling_heads", "dropout")
        sizes = {name: getattr(settings, name) for name in names} | {"n_history": dataset.n_history}
        model = ClinicalTransformer(dataset.input_dim, self.preprocessor.static_dim, **sizes)
        mean, scale = input_statistics(dataset)
        of_columns = [1.0 if category else NUMBER_WEIGHT for _, category in self.preprocessor.static_names]
        training_items = items_of_events(dataset) if dataset.n_history else None
        model.set_input_statistics(mean[: len(scale)], scale, torch.tensor(of_columns), training_items)
        self.baseline = {"event": mean, "static": dataset.static.mean(0).cpu()}
        return model

    def take_over(self, model: ClinicalTransformer, first: Checkpoint) -> None:
        """Give a new model the weights of another of its sizes; of static inputs those of what both know."""
        path, own, its = self.settings.init_from, model.architecture, first.model.architecture
        sizes = sorted(name for name in own.keys() - {"static_dim", "dropout"} if own[name] != its[name])
        unlike = [f"{name} {own[name]} instead of {its[name]}" for name in sizes]
        if not first.has_read(self.text_encoder, self.encoder_weights):
            unlike.append(f"text encoder {self.text_encoder} instead of {first.text_encoder}")
        if unlike:
            raise files.refusal("unlike_start", path=path, unlike=", ".join(unlike))
        weights, static = first.model.state_dict(), self.preprocessor.static_names
        at, before = (part["classifier.0.weight"].clone() for part in (model.state_dict(), weights))
        at[:, : own["d_model"]] = before[:, : own["d_model"]]
        at[:, own["d_model"] + own["static_dim"] :] = before[:, own["d_model"] + its["static_dim"] :]  # of the memory
        place = {name: own["d_model"] + column for column, name in enumerate(first.preprocessor.static_names)}
        for column, name in enumerate(static, start=own["d_model"]):
            at[:, column] = before[:, place[name]] if name in place else at[:, column]
        model.load_state_dict(weights | {"classifier.0.weight": at, "static_weight": model.static_weight})
        fresh = ", ".join(": ".join(filter(None, name)) for name in static if name not in place)
        logger.info(files.WORDS["log"]["taken_over"].format(path=path, n=sum(name in place for name in static)))
        logger.info(files.WORDS["log"]["fresh"].format(names=fresh or "nothing", of=len(static)))
        if self.test_set is not None and (count := int(first.is_seen(self.test_set.table.stays).sum())):
            logger.warning(files.WORDS["log"]["seen_before"].format(count=count, n=len(self.test_set), path=path))

    @property
    def model(self) -> ClinicalTransformer:
        """The averaged weights: what is validated, kept and explained."""
        return cast(ClinicalTransformer, self.average.module)

    def plan_epoch(self, epoch: int) -> list[np.ndarray]:
        """Return the stays of each step of an epoch, of all processes together."""
        sizes, seed = (self.settings.batch_size, self.settings.max_events_per_batch), self.settings.seed + epoch
        return plan_batches(self.train_set.lengths, *sizes, seed, self.accelerator.num_processes)

    def train_epoch(self, epoch: int) -> float:
        """Pass once over the training stays; return the mean loss of a stay. Depends on seed and epoch alone."""
        settings, rank, world = self.settings, self.accelerator.process_index, self.accelerator.num_processes
        torch.manual_seed(settings.seed + 100_003 * epoch + 17 * rank)
        batches = self.plan_epoch(epoch)
        shares = [share_of_batch(batch, rank, world) for batch in batches]
        loader = packed_batches(self.train_set, [stays for stays, _ in shares], self.accelerator.device)
        bar = Progress(loader, total=len(batches), desc=f"epoch {epoch}", unit=" batches", active=self.is_main)
        attention_every = max(settings.save_attention_every, math.ceil(len(batches) / MOST_ATTENTION_FILES))
        self.objective.train()
        self.accelerator.unwrap_model(self.objective).loss.weight = settings.temporal_weight * (epoch > PLAIN_EPOCHS)
        unread: deque[tuple[np.ndarray, Future[Tensor]]] = deque()
        total_loss, n_stays = 0.0, 0
        for number, batch in enumerate(bar):
            stays, (share, weight) = batches[number], shares[number]
            self.set_learning_rate((epoch - 1 + number / len(batches)) / settings.max_epochs)
            losses = self.objective(batch, self.time_column) * weight  # (B,)
            # Processes average their gradients: scaled so, the average is the gradient of the whole batch's mean.
            loss = losses.sum() * (world / len(stays))
            self.optimizer.zero_grad()
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.objective.parameters(), GRADIENT_CLIP)
            self.optimizer.step()
            self.step += 1
            self.average.update_parameters(self.accelerator.unwrap_model(self.objective).model)
            unread.append((share, self.threads.submit(losses.detach().cpu)))
            if len(unread) > 1:  # the step before; to ask for this one now would leave the device without work
                total_loss += self.read_losses(*unread.popleft())
                bar.set_postfix_str(f"loss {total_loss * world / n_stays:.3f}", refresh=False)
            n_stays += len(stays)
            if settings.save_attention_every and number % attention_every == 0 and self.is_main:
                self.save_attention(epoch, number, self.shown[number // attention_every % len(self.shown)])
        total_loss += self.read_losses(*unread.popleft())
        return float(self.accelerator.reduce(torch.tensor(total_loss, device=self.accelerator.device))) / n_stays

    def average_weights(self, averaged: Any, current: Any, _: Tensor | int) -> None:
        """Move the running mean of the weights; its memory grows with the steps, so that the beginning is forgotten."""
        torch._foreach_lerp_(averaged, current, 1 - min(AVERAGING, self.step / (self.step + 10)))

    def set_learning_rate(self, fraction_of_training: float) -> None:
        """Raise it over the first steps (a tenth of them where they are few), then lower it along half a cosine."""
        warmth = min(1.0, max((self.step + 1) / WARMUP_STEPS, 10 * fraction_of_training))
        cosine = 0.5 * (1 + math.cos(math.pi * fraction_of_training))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * warmth * cosine

    def read_losses(self, stays: np.ndarray, reading: Future[Tensor]) -> float:
        """Return the sum of the losses of a step, checked: the loop waits for the device only here."""
        losses = reading.result()
        self.stop_if_not_finite(losses, self.train_set, stays)
        return float(losses.sum())

    def stop_if_not_finite(self, losses: Tensor, dataset: ClinicalSequenceDataset, stays: np.ndarray) -> None:
        """Raise InputError that names the first stays whose loss is not finite."""
        wrong = stays[~torch.isfinite(losses).numpy()][:5]
        if len(wrong):
            ids = ", ".join(map(str, dataset.table.stays["icu_stay_id"].iloc[wrong]))
            raise files.refusal("infinite_loss", ids=ids, folder=self.output / "checkpoints")

    def fit(self) -> None:
        """Train until the validation loss has rested for `patience` epochs; best_model.pth has the best weights."""
        settings = self.settings
        if not self.epochs_done:
            self.save("latest_checkpoint.pth")
        while self.epochs_done < settings.max_epochs:
            if self.history and self.epochs_done - self.best_epoch >= settings.patience:
                break
            started, epoch = time.monotonic(), self.epochs_done + 1
            row: dict[str, float] = {"epoch": epoch, "train_loss": self.train_epoch(epoch), **self.validate()}
            row |= {"learning_rate": self.optimizer.param_groups[0]["lr"], "seconds": time.monotonic() - started}
            self.history.append(row)
            self.epochs_done = epoch
            if self.is_main:
                write_whole(self.output / "history.csv", partial(pd.DataFrame(self.history).to_csv, index=False))
            rate, is_best = self.train_set.lengths.sum() / row["seconds"], self.best_epoch == epoch
            said = {"most": settings.max_epochs, "rate": rate, "best": "  best" * is_best}
            logger.info(files.WORDS["log"]["epoch"].format(**row, **said))
            if is_best:
                self.save("best_model.pth")
            self.save("latest_checkpoint.pth")
        self.finish_writing()

    def validate(self) -> dict[str, float]:
        """Return loss and AUROC of the validation stays."""
        from sklearn.metrics import roc_auc_score

        logits, labels = self.predict(self.validation_set), self.validation_set.table.labels
        self.stop_if_not_finite(torch.tensor(logits), self.validation_set, np.arange(len(logits)))
        loss = F.binary_cross_entropy_with_logits(torch.tensor(logits), torch.tensor(labels))
        self.thresholds = metrics.thresholds_of(labels, scipy.special.expit(logits))
        return {"validation_loss": float(loss), "validation_auroc": float(roc_auc_score(labels, logits))}

    @property
    def best_epoch(self) -> int:
        """The epoch with the lowest validation loss; the later of two that are equal."""
        return int(min(reversed(self.history), key=operator.itemgetter("validation_loss"))["epoch"])

    def predict(self, dataset: ClinicalSequenceDataset) -> np.ndarray:
        """(n_stays) float64 logits of the averaged weights."""
        return predict_logits(self.model, dataset, self.settings, self.accelerator)

    def save(self, name: str) -> None:
        """Write a checkpoint: plain data and tensors only."""
        if not self.is_main:
            return
        state = {"program": "clinical_LF", "format": CHECKPOINT_FORMAT, "settings": asdict(self.settings)}
        state |= {"architecture": self.model.architecture, "model": self.model.state_dict()}
        state["preprocessor"] = self.preprocessor.state_dict()
        own = "text_encoder encoder_weights patients data_fingerprint baseline training_items thresholds history"
        state |= {part: getattr(self, part) for part in (*own.split(), "epochs_done", "step")}
        if name == "latest_checkpoint.pth":
            state["objective"] = self.accelerator.unwrap_model(self.objective).state_dict()
            state |= {"n_averaged": self.average.n_averaged, "optimizer": self.optimizer.state_dict()}
        state["parts"] = list(files.parts_of(state))
        write_whole(self.output / "checkpoints" / name, lambda path: torch.save(state, path))

    def resume(self) -> None:
        """Go on from latest_checkpoint.pth; refuses one whose data, encoder or model differ."""
        path = self.output / "checkpoints" / "latest_checkpoint.pth"
        if not path.exists():  # stopped before the first checkpoint, or in an earlier fold
            logger.warning(f"Resumed     nothing: {path} does not exist, training starts at epoch 1")
            return
        saved = load_checkpoint(path)  # on the CPU, where AdamW's step counts stay: read there, they cost no wait
        before, now = saved.settings, self.settings
        changed = {cli_name(name): getattr(before, name) != getattr(now, name) for name in SETTINGS_OF_A_RUN}
        changed["the text encoder"] = not saved.has_read(self.text_encoder, self.encoder_weights)
        changed["the data"] = saved.state.get("data_fingerprint") != self.data_fingerprint
        changed |= {"the split": saved.patients != self.patients}
        if reasons := [name for name, differs in changed.items() if differs]:
            raise files.refusal("other_run", path=path, reason=", ".join(reasons))
        if "objective" not in saved.state:
            raise files.refusal("unfit_checkpoint", path=path, error="it is of no use to go on from")
        self.accelerator.unwrap_model(self.objective).load_state_dict(saved.state["objective"])
        self.model.load_state_dict(saved.state["model"])
        self.average.n_averaged.copy_(saved.state["n_averaged"])
        self.optimizer.load_state_dict(saved.state["optimizer"])
        self.history, self.step, self.epochs_done = (saved.state[name] for name in ("history", "step", "epochs_done"))
        if self.epochs_done:  # damaged, it is found now and not when training is over
            load_checkpoint(path.with_name("best_model.pth"))
        logger.info(f"Resumed     after epoch {self.epochs_done} of {path}")

    @torch.no_grad()
    def save_attention(self, epoch: int, batch: int, stay: int) -> None:
        """Save and draw the attention of a stay's last 1,024 events, in a pass of its own, while training goes on."""
        model, table, device = self.model.eval(), self.train_set.table, self.accelerator.device
        sequence, static, _ = self.train_set[stay]
        sequence, end = sequence[-MAX_MAP_EVENTS:].to(device), table.offsets[stay + 1]
        probability, record = model(sequence.unsqueeze(0), static.unsqueeze(0).to(device), return_attention=True)
        record["layer_attention_weights"] = [binned(weights) for weights in record["layer_attention_weights"]]
        record |= {"icu_stay_id": int(table.stays["icu_stay_id"].iloc[stay]), "probability": float(probability)}
        events = slice(end - len(sequence), end)
        record |= {"hours_to_final_event": table.minutes_to_end[events] / 60, "event_type": table.event_type[events]}
        self.finish_writing()

        def write() -> None:
            from clinical_lf.plots import draw_saved_attention, save_figure

            path = save_attention_weights(record, batch, epoch, self.output / "attention_weights")
            hours_label = f"hours before the {'prediction' if self.settings.prospective else 'final event'}"
            figure = draw_saved_attention(load_attention_weights(path), path.stem, self.text_encoder, hours_label)
            save_figure(self.output / "plots" / f"{path.stem}.png", figure)

        self.writing = self.threads.submit(write)

    def finish_writing(self) -> None:
        """Wait for the attention that is being written, if any; what went wrong there is raised here."""
        if self.writing:
            self.writing.result()
        self.writing = None


def binned(weights: Tensor) -> Tensor:
    """(B, H, L, L) -> (B, H, bins, bins): means over at most 64 equal bins of events."""
    return F.adaptive_avg_pool2d(weights, min(weights.shape[-1], MAX_MAP_BINS))


def save_attention_weights(
    attention_weights: dict[str, Any], batch_idx: int, epoch: int, save_dir: str | Path = ATTENTION_FOLDER
) -> Path:
    """Write a pass's attention as attention_epoch_{epoch}_batch_{batch_idx}.npz, binned, without transformer_output."""
    layers = [binned(torch.as_tensor(weights).float()) for weights in attention_weights["layer_attention_weights"]]
    maps = torch.stack(layers).half() if layers else torch.zeros(0)  # (n_layers, B, H, bins, bins)
    kept = attention_weights | {"layer_attention_weights": maps}
    kept.pop("transformer_output", None)
    arrays: dict[str, Any] = {name: torch.as_tensor(value).detach().cpu().numpy() for name, value in kept.items()}
    path = Path(save_dir) / f"attention_epoch_{epoch}_batch_{batch_idx}.npz"
    return write_whole(path, lambda name: np.savez_compressed(name, **arrays))


def load_attention_weights(path: str | Path) -> dict[str, Any]:
    """Return what `save_attention_weights` wrote: exact `pooling_weights`, layers' means (B, H, bins, bins)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        return arrays | {"layer_attention_weights": list(arrays["layer_attention_weights"].astype(np.float32))}
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise files.refusal("no_attention_file", path=path, error=type(error).__name__) from None


@torch.no_grad()
def predict_logits(
    model: ClinicalTransformer, dataset: ClinicalSequenceDataset, settings: Settings, accelerator: Accelerator
) -> np.ndarray:
    """(n_stays) float64 logits, each stay once however many processes there are."""
    model.eval()
    batches = plan_batches(dataset.lengths, 2 * settings.batch_size, settings.max_events_per_batch)
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    loader = packed_batches(dataset, mine, accelerator.device)
    parts = [torch.zeros(0, 1, device=accelerator.device)]  # a process may have no batch
    options = {"desc": "predicting", "unit": " batches", "active": accelerator.is_main_process, "delay": 2}
    for batch in Progress(loader, total=len(mine), **options):
        with accelerator.autocast():
            parts.append(model.score_packed(batch.events, batch.static_features, batch.layout)[0])
    logits = torch.cat(parts).squeeze(1).cpu().double()
    scored = list(zip(np.concatenate([[], *mine]).tolist(), logits.tolist()))
    everywhere = gather_object(scored) if accelerator.num_processes > 1 else scored
    return np.array([logit for _, logit in sorted(everywhere)])


# ---- Main ------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit code."""
    settings = settings_from(argv, Settings, __doc__)
    files.log_to_stdout()
    started = time.time()

    def what_is_kept() -> str:
        latest = sorted(output_folder(settings).rglob("latest_checkpoint.pth"))
        own = [path for path in latest if path.stat().st_mtime > started]  # not an earlier run's, still in its place
        kept = f", {own[-1]} holds the last whole epoch" if own else ""
        return f"Encoded texts are kept{kept}; go on with the same command{' and --resume' * bool(own)}."

    return files.exit_code(lambda: run(check_settings(settings)), what_is_kept)


def run(settings: Settings) -> dict[str, Any]:
    """Go through all phases of a run; return what metrics.json holds."""
    accelerator = plan.make_accelerator(settings.mixed_precision)
    settings = replace(settings, output_dir=str(output_folder(settings)))
    if settings.init_from:
        load_checkpoint(settings.init_from)  # a mistyped one costs no hours of encoding
    with files.lock_folder(Path(settings.output_dir), wait=False) if accelerator.is_main_process else nullcontext():
        if settings.evaluate:
            return evaluate(settings, accelerator)
        settings, source, data = read_training_data(settings, accelerator)
        if settings.dry_run:
            return {}
        if settings.cross_validate or settings.seeds > 1:
            return train_repeatedly(source, data, settings, accelerator)
        return train_and_report(source, data[0], settings, accelerator)[0]


def output_folder(settings: Settings) -> Path:
    """Return where a run writes: --output-dir; an evaluation into its `evaluation`, or that beside its checkpoint."""
    chosen, is_chosen = Path(settings.output_dir), settings.output_dir != Settings.output_dir
    own = chosen if is_chosen else folder_of_run(settings.evaluate)
    return own / "evaluation" if settings.evaluate else chosen


def folder_of_run(checkpoint: str | Path) -> Path:
    """Return the folder of the run that a checkpoint, or a folder of them, belongs to."""
    folder = Path(checkpoint) if Path(checkpoint).is_dir() else Path(checkpoint).parent
    return folder.parent if folder.name == "checkpoints" else folder


def checkpoint_files(path: str | Path) -> list[Path]:
    """Return the checkpoint that a path names: itself, or the best of a run's folder, one a fold or seed."""
    found = sorted(Path(path).glob("**/checkpoints/best_model.pth"), key=lambda file: (len(str(file)), file))
    return found if Path(path).is_dir() and found else [Path(path)]


def data_path(data: str) -> Path:
    """Return the path as given; the bundled sample is also found from another working directory."""
    return SAMPLE if data == SAMPLE.name and not Path(data).exists() else Path(os.path.expanduser(data))


class Source(NamedTuple):
    """The stays of one data set that a run is about, and how they came to be these."""

    table: StayTable
    flow: list[dict[str, Any]]  # a step: its name and counts
    report: ReadReport

    def origin(self, settings: Settings) -> dict[str, Any]:
        """Return what metrics.json says of what is predicted, and of how the stays came to be these."""
        report, kinds = asdict(self.report), [name for name in tables.LABELS if f"-{name}@" in settings.labels]
        kind = [*kinds, "given" if settings.labels else settings.outcome][0]
        said = {"outcome": kind, "outcome_definition": files.WORDS["labels"][kind], "cohort": self.flow}
        return said | {"dropped_or_repaired": report["counts"], "source_tables": report["sources"]}


def read_source(
    settings: Settings, accelerator: Accelerator, data: str | Path | pd.DataFrame = "", need_label: bool = True
) -> Source:
    """Read the settings' data set, or a data frame, choose its cohort and describe it in the log."""
    logger.info(f"Reading     {settings.data}")
    source = data if isinstance(data, pd.DataFrame) else data_path(settings.data)
    task = MedsTask(settings.labels, settings.history_hours, settings.gap_hours) if settings.labels else None
    options = (settings.cache_dir, need_label, task, settings.memory_limit, settings.static_features, settings.outcome)
    with accelerator.main_process_first():  # one process runs the query, the others find its result
        whole, report = read_stays(source, *options, settings.observation_hours > 0, settings.vitals)
    table, flow = tables.choose_cohort(whole, settings.first_stay_only, settings.observation_hours, settings.gap_hours)
    table = table.with_own_texts()
    known = table.labels[~np.isnan(table.labels)]
    deaths = f"{known.mean():.1%} died ({settings.labels or settings.outcome})" if len(known) else "outcome unknown"
    counted = {"stays": len(table.stays), "patients": table.stays["patient_id"].nunique(), "events": len(table.text)}
    logger.info(files.WORDS["log"]["data"].format(**counted, texts=len(np.unique(table.text)), deaths=deaths))
    lengths = " / ".join(f"{int(length):,}" for length in np.quantile(table.lengths, [0, 0.25, 0.5, 0.75, 0.95, 1]))
    logger.info(f"Length      {lengths} events per stay (min, 25 %, median, 75 %, 95 %, max)")
    report.log(len(whole.stays))
    for step in flow if len(flow) > 1 else ():
        logger.info(files.WORDS["log"]["cohort" if len(known) else "cohort_untold"].format(**step))
    return Source(table, flow, report)


def choose_splits(table: StayTable, settings: Settings) -> list[Split]:
    """Return the split that the settings ask for; with --cross-validate one for each fold."""
    if settings.cross_validate:
        return list(tables.cross_validation_splits(table, settings.cross_validate, settings.seed))
    if settings.split:
        return [tables.split_from_file(table, Path(settings.split))]
    own = meds_split(table, Path(settings.data), settings.seed) if settings.labels else None
    return [own or tables.split_by_patient(table, settings.seed, 0.0 if settings.no_test else 0.2)]


def texts_to_encode(texts: np.ndarray, settings: Settings) -> list[str]:
    """Return the texts as the encoder reads them: `--item-history` has the numbers itself, so that far fewer differ."""
    return [items.read_text(text).without_value if settings.item_history else text for text in texts]


def make_text_encoder(
    settings: Settings, texts: list[str], accelerator: Accelerator
) -> tuple[Settings, ClinicalTextEncoder]:
    """Return the settings with the encoder that is to be had, and it, loaded where a text has no vector yet.

    A failure of one process is one of all: none waits in vain. For the bundled sample alone, `hashing` takes the place
    of a Clinical-Longformer that is not to be had.
    """
    devices = [accelerator.device] if accelerator.num_processes > 1 else None  # of several processes each has one
    name, failure = settings.text_encoder, None
    try:
        encoder = ClinicalTextEncoder(name, settings.max_text_tokens, Path(settings.cache_dir), devices=devices)
        if not settings.dry_run and encoder.cache.missing(text_keys(texts)).any():
            encoder.encoder.load(encoder.cache.folder)
    except InputError as error:
        failure = error
    failures = list(filter(None, gather_object([failure])))
    if not failures:
        return settings, encoder
    is_sample = data_path(settings.data).resolve() == SAMPLE.resolve()
    if name != CLINICAL_LONGFORMER or not is_sample or not isinstance(failures[0], EncoderUnreachable):
        raise failures[0]
    logger.warning(files.WORDS["log"]["hashing_instead"])
    return make_text_encoder(replace(settings, text_encoder=HashingEncoder.id), texts, accelerator)


def embed_texts(encoder: ClinicalTextEncoder, texts: list[str], accelerator: Accelerator) -> np.ndarray:
    """Return the texts' vectors (n_texts, E), new ones computed by all processes together; then free the encoder."""
    started, failure = time.monotonic(), None
    try:
        encoder.embed(texts, accelerator.process_index, accelerator.num_processes, accelerator.is_main_process)
    except InputError as error:
        failure = error
    if failures := list(filter(None, gather_object([failure]))):  # waits until all have done their share
        raise failures[0]
    counted = f"{len(set(texts)):,} distinct texts, {encoder.n_encoded:,} of them new"
    logger.info(f"Encoder     {encoder.id}: {counted}, {time.monotonic() - started:.1f} s")
    encoder.encoder.unload()
    return encoder.vectors(texts)


def train_model(
    settings: Settings,
    data: TrainingData | pd.DataFrame | None = None,
    accelerator: Accelerator | None = None,
    at_start: Callable[[Trainer], Any] | None = None,
) -> tuple[Trainer, Checkpoint]:
    """Train on the data, by default those that the settings name, and write no report; `at_start` gets the trainer.

    data: also a data frame, one row per event. Return the trainer, whose datasets are the parts of the split, and the
    checkpoint of the best weights, its own then.
    """
    if isinstance(data := settings.data if data is None else data, pd.DataFrame):
        settings = replace(settings, data=THE_FRAME)
    settings = check_settings(replace(settings, dry_run=False))
    accelerator = accelerator or plan.make_accelerator(settings.mixed_precision)
    if not isinstance(data, TrainingData):
        data = read_training_data(settings, accelerator, data)[2][0]
    trainer = Trainer(settings, data, accelerator)
    if settings.resume:
        trainer.resume()
    if at_start:
        at_start(trainer)
    trainer.fit()
    accelerator.wait_for_everyone()
    best = load_checkpoint(trainer.output / "checkpoints" / "best_model.pth", accelerator.device)
    trainer.model.load_state_dict(best.model.state_dict())
    return trainer, best


def read_training_data(
    settings: Settings, accelerator: Accelerator, data: str | Path | pd.DataFrame = ""
) -> tuple[Settings, Source, list[TrainingData]]:
    """Return the settings with the encoder that is to be had, and the data by split, encoded unless in a dry run."""
    source = read_source(settings, accelerator, data)
    # Split first: a table too small for it is refused before hours of encoding.
    splits = choose_splits(source.table, settings)
    texts = texts_to_encode(source.table.texts, settings)
    settings, encoder = make_text_encoder(settings, texts, accelerator)
    is_missing = encoder.cache.missing(np.unique(text_keys(texts)))
    plan.describe_plan(source.table, splits, is_missing, encoder, settings)
    vectors = np.zeros(0) if settings.dry_run else embed_texts(encoder, texts, accelerator)
    return settings, source, [TrainingData(source.table, split, vectors, *encoder.identity) for split in splits]


def train_and_report(
    source: Source, data: TrainingData, settings: Settings, accelerator: Accelerator
) -> tuple[dict[str, Any], Any]:
    """Train, score held-out stays once, write all; the first process returns what metrics.json has, and risks."""
    from clinical_lf import run_folder

    folder = run_folder.RunFolder(Path(settings.output_dir), asdict(settings))

    def begin(trainer: Trainer) -> None:
        if accelerator.is_main_process:
            folder.begin(resume=trainer.epochs_done > 0)
            folder.write_split(trainer.patients)
            folder.write_audit(data.table, data.split, source.report)
        n_steps, world = len(trainer.plan_epoch(1)), accelerator.num_processes
        precision = "bfloat16 where it suffices" if accelerator.mixed_precision == "bf16" else "float32"
        on = f"{accelerator.device.type.upper()}, {precision}" + f", {world} processes" * (world > 1)
        logger.info(files.WORDS["log"]["model"].format(trainer=trainer, on=on))
        events = trainer.train_set.lengths.sum() / n_steps / world
        logger.info(files.WORDS["log"]["steps"].format(steps=n_steps, events=events))

    trainer, best = train_model(settings, data, accelerator, begin)
    limits = best.state["thresholds"]
    scored = lambda part: run_folder.Predictions(part.table.stays, scipy.special.expit(trainer.predict(part)), limits)
    parts = {"validation": trainer.validation_set, "test": trainer.test_set}
    predictions = {name: scored(dataset) for name, dataset in parts.items() if dataset is not None}
    if not accelerator.is_main_process:
        return {}, None
    training: dict[str, float] = {"epochs": trainer.epochs_done, "best_epoch": trainer.best_epoch}
    seconds = round(sum(row["seconds"] for row in trainer.history), 1)  # of all parts, where it was resumed
    training |= {"seconds": seconds, "parameters": trainer.n_parameters}
    described = {"text_encoder": data.text_encoder, "training": training, **source.origin(settings)}
    if not settings.no_baseline:
        statics = trainer.preprocessor.encode_static_features(data.table.static_columns)
        features = trees.item_summaries(data.table, statics, data.split.train)
        risks = trees.tree_risks(features, data.table.labels, data.split, settings.seed)
        held_out = data.split.test if len(data.split.test) else data.split.validation
        predictions["trees"] = run_folder.Predictions(data.table.stays.iloc[held_out], risks[held_out], limits)
    content = folder.report_training(described, predictions, data.table, pd.DataFrame(trainer.history))
    return content, predictions


class LoadedRun(NamedTuple):
    """Stays of some data as a checkpoint's model reads them: from here a notebook goes on."""

    checkpoint: Checkpoint
    model: ClinicalTransformer
    table: StayTable
    dataset: ClinicalSequenceDataset  # item i: sequence, statics and label of the table's stay i
    logits: np.ndarray  # (n_stays) float64
    settings: Settings  # the checkpoint's, with what was given
    source: Source  # how the stays came to be these


def load_run(
    checkpoint: str | Path | Checkpoint,
    data: str | Path | pd.DataFrame = "",
    accelerator: Accelerator | None = None,
    only_unseen: bool = False,
    **options: Any,
) -> LoadedRun:
    """Return the stays of some data, scored by a checkpoint; nothing is refitted.

    data: as --data takes it (default: the checkpoint's own), or a data frame, one row per event. options: settings that
    overrule the checkpoint's, unless empty. only_unseen: leave out patients that it was trained or tuned on. Raises
    InputError where the data cannot be read, the encoder is another one, or no stay is left.
    """
    accelerator = accelerator or plan.make_accelerator()
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = load_checkpoint(checkpoint, accelerator.device)
    trained, given = checkpoint.settings, {name: value for name, value in options.items() if value != ""}
    if unknown := ", ".join(given.keys() - Settings.__dataclass_fields__.keys()):
        raise InputError(f"{unknown}: no such setting. The options are the fields of train.Settings.")
    given["data"] = THE_FRAME if isinstance(data, pd.DataFrame) else str(data) or trained.data
    given["history_hours"] = given.get("history_hours") or trained.history_hours
    if given.get("labels"):
        given["observation_hours"] = 0.0  # a label has its own time
    elif given["data"] != trained.data and not is_meds(data_path(given["data"])):
        given |= {"labels": "", "history_hours": 0.0}
    if given["data"] != trained.data:  # not the vitals of the data of training
        is_folder = (data_path(given["data"]) / "icu").is_dir()
        given.setdefault("vitals", "vitals.sql" if trained.vitals and is_folder else "")
    # What the checkpoint's settings name may have been replaced; a path in it is not followed.
    encoder = given.get("text_encoder", CLINICAL_LONGFORMER)
    if encoder == CLINICAL_LONGFORMER:
        encoder = "hashing" if checkpoint.text_encoder == "hashing" else trained.text_encoder
        if encoder != CLINICAL_LONGFORMER and Path(encoder).exists():
            raise files.refusal("local_encoder", encoder=checkpoint.text_encoder)
    settings = replace(trained, **(given | {"text_encoder": encoder, "dry_run": False}))
    check_limits(settings)
    if is_early := settings.observation_hours != trained.observation_hours and not settings.labels:
        logger.warning(files.WORDS["log"]["other_moment"].format(own=trained.observation_hours, **asdict(settings)))
    unknown_yet = tables.KNOWN_ONLY_LATER if is_early else {}  # which may be features of this model
    needed = [name for name in settings.static_features if name not in unknown_yet]
    source = read_source(replace(settings, static_features=needed), accelerator, data, need_label=False)
    table = replace(source.table, stays=source.table.stays.assign(**unknown_yet))
    if only_unseen:
        is_seen = checkpoint.is_seen(table.stays)
        if is_seen.all():
            raise files.refusal("all_seen", data=settings.data, count=len(is_seen))
        table = table.take(~is_seen).with_own_texts()
    for column, count in checkpoint.preprocessor.unknown_categories(table).items():
        is_much, counted = count > 0.2 * len(table.stays), f"{column}: {count} of {len(table.stays)} stays"
        said = files.WORDS["log"]["empty" if column.endswith("(empty)") else "unlike"]
        logger.log(30 if is_much else 20, f"Data        {'WARNING: ' * is_much}{counted}, {said}")
    texts = texts_to_encode(table.texts, settings)
    settings, text_encoder = make_text_encoder(settings, texts, accelerator)
    if not checkpoint.has_read(*text_encoder.identity):
        raise files.refusal("other_encoder", trained=checkpoint.text_encoder, given=text_encoder.id)
    vectors = embed_texts(text_encoder, texts, accelerator)
    dataset = ClinicalSequenceDataset(table, checkpoint.preprocessor, vectors)
    logits = predict_logits(checkpoint.model, dataset, settings, accelerator)
    return LoadedRun(checkpoint, checkpoint.model, table, dataset, logits, settings, source)


def load_runs(
    checkpoint: str | Path, data: str | Path | pd.DataFrame, accelerator: Accelerator | None = None, **options: Any
) -> tuple[list[LoadedRun], np.ndarray]:
    """Return the same stays as each model of a folder of folds or seeds reads them, and their mean risks (n_stays)."""
    runs = [load_run(path, data, accelerator, **options) for path in checkpoint_files(checkpoint)]
    if any(not each.table.stays["icu_stay_id"].equals(runs[0].table.stays["icu_stay_id"]) for each in runs):
        raise files.refusal("unlike_models", folder=checkpoint, count=len(runs))
    return runs, np.mean([scipy.special.expit(each.logits) for each in runs], axis=0)


def predict(checkpoint: str | Path, data: str | Path | pd.DataFrame = "", **options: Any) -> pd.DataFrame:
    """Return icu_stay_id, patient_id and probability (of death) of each stay, as --evaluate does, and write nothing.

    checkpoint: also a folder of folds or seeds, whose mean risk counts. The rest is as in `load_run`: observation_hours
    predict from what was known by then, for stays that may last still and have no icu_outtime.

    >>> predict("RUN/checkpoints/best_model.pth", frame).nlargest(5, "probability")  # doctest: +SKIP
    """
    runs, risks = load_runs(checkpoint, data, **options)
    return runs[0].table.stays[["icu_stay_id", "patient_id"]].assign(probability=risks)


def evaluate(settings: Settings, accelerator: Accelerator) -> dict[str, Any]:
    """Score stays with the checkpoint, or the folder of some, that --evaluate names; figures where labels are known."""
    from clinical_lf import run_folder

    taken = "output_dir cache_dir memory_limit text_encoder labels history_hours first_stay_only evaluate n_bootstrap"
    given = {name: getattr(settings, name) for name in f"{taken} no_test split resume init_from vitals".split()}
    given |= {"observation_hours": settings.observation_hours} if settings.observation_hours else {}
    runs, risks = load_runs(settings.evaluate, settings.data, accelerator, **given)
    checkpoint, _, table, *_, own, source = runs[0]
    seen_by_any = lambda stays: np.any([each.checkpoint.is_seen(stays) for each in runs], axis=0)
    rows = []  # of each moment, of the stays that last longer
    for hours in trajectory_hours(settings.trajectory):
        if (tables.stay_hours(table) > hours).any():
            given["observation_hours"] = hours
            (then, *_), at = load_runs(settings.evaluate, settings.data, accelerator, **given)
            frame = then.table.stays[["icu_stay_id", "patient_id"]].assign(hours_after_admission=hours, probability=at)
            rows.append(frame.assign(label=then.table.labels, seen_in_training=seen_by_any(then.table.stays)))
    if settings.trajectory and (own.labels or not rows):
        raise InputError(f"--trajectory {settings.trajectory}: no stay lasts that long (a label has one time).")
    if not accelerator.is_main_process:
        return {}
    is_seen = seen_by_any(table.stays)
    folder = run_folder.RunFolder(Path(settings.output_dir), asdict(own))
    folder.begin()
    if rows:
        folder.table("risk_trajectories.csv", pd.concat(rows, ignore_index=True))
    n_events = np.bincount(table.take(~is_seen).text, minlength=len(table.texts))
    names, is_new = [items.read_text(text).item for text in table.texts], checkpoint.is_new_item(table.texts)
    unseen = pd.DataFrame({"item": names, "events": n_events, "of_new_item": n_events * is_new})
    described = {"text_encoder": checkpoint.text_encoder, "checkpoint": settings.evaluate, **source.origin(own)}
    described |= {"models": len(runs), "unknown_categories": checkpoint.preprocessor.unknown_categories(table)}
    limits = pd.DataFrame([each.checkpoint.state["thresholds"] for each in runs]).mean().to_dict()
    return folder.report_evaluation(described, run_folder.Predictions(table.stays, risks, limits), is_seen, unseen)


def train_repeatedly(
    source: Source, data: Sequence[TrainingData], settings: Settings, accelerator: Accelerator
) -> dict[str, Any]:
    """Train once for each fold, or with several seeds on one split; write the spread, and pooled figures."""
    from clinical_lf import run_folder

    unit = "fold" if settings.cross_validate else "seed"
    folder = run_folder.RunFolder(Path(settings.output_dir), asdict(settings))
    if accelerator.is_main_process:
        folder.begin(settings.resume)
    numbers, outcomes = range(1, 1 + (settings.cross_validate or settings.seeds)), []
    for number in numbers:
        logger.info(f"{unit.capitalize():11s} {number} of {len(numbers)}")
        place = folder.folder / f"{unit}_{number}"
        own = replace(settings, output_dir=str(place), cross_validate=0, seeds=1, split=str(place / "split.csv"))
        if unit == "seed":
            own = replace(own, seed=settings.seed + number - 1, no_test=False)
        outcomes.append(train_and_report(source, data[number - 1 if unit == "fold" else 0], own, accelerator))
    return folder.report_spread(outcomes, unit) if accelerator.is_main_process else {}


if __name__ == "__main__":
    sys.exit(main())
