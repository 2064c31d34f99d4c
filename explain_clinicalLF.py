"""Show what a trained model bases each prediction on, and measure how far that explanation can be trusted.

    python explain_clinicalLF.py                                     # the bundled sample, after `python train.py`
    python explain_clinicalLF.py --data PATH/TO/mimic-iv --stays 4   # held-out stays of that data, four shown in full
    python explain_clinicalLF.py --checkpoint best_model.pth --data NEW.csv --save-dir OUT
    python explain_clinicalLF.py --quick                             # the same in half a minute, on a dozen stays

Four views of one model, on the logit (log-odds of death) and never on the probability, which saturates:
Integrated Gradients (what moves the logit from a stay whose events say nothing to this one), replacement (how far the
logit falls if one event were unremarkable), attention (where the model looks), and the layers between. They differ.
`verdict.csv` says whether the model is worth explaining, `faithfulness.json` how much each view is worth.

Axes: B stays, L events of a stay, C = 774 inputs of an event, S static inputs, H heads. Masks are True at real events.
Explains this model, not causes of death. Research software: not a medical device, not for clinical use.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import functools
import html
import io
import json
import logging
import math
import operator
import os
import re
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from captum.attr import IntegratedGradients, LayerIntegratedGradients
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from scipy.special import expit
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn import functional as F

import train
from train import (
    BLUE,
    EVENT_TYPES,
    GREEN,
    GREY,
    HISTORY,
    LABEL,
    ORANGE,
    VERMILLION,
    ClinicalTransformer,
    InputError,
    calibration_table,
    item_of,
    new_figure,
    tidy,
)

__all__ = [
    "Ablation",
    "Attribution",
    "ExplainSettings",
    "Explanation",
    "Stay",
    "ablation_analysis",
    "analyze_critical_time_periods",
    "analyze_feature_importance_over_time",
    "analyze_layer_attention_patterns",
    "analyze_static_feature_attribution",
    "analyze_temporal_feature_attribution",
    "captum_analysis",
    "draw_figure",
    "draw_figures",
    "layer_analysis",
    "map_features_to_clinical",
    "name_inputs",
    "run_explainability_analysis",
    "stay_of",
]

logger = logging.getLogger("clinical_LF")

CLOCK_WINDOWS_HOURS = (0, 6, 12, 24, 48, 96, math.inf)  # before the end of what is read
CLOCK_WINDOWS = ("last 6 h", "6 to 12 h", "12 to 24 h", "24 to 48 h", "48 to 96 h", "more than 96 h")
MAX_MAP_EVENTS, MAX_MAP_BINS = 3000, 64  # layer maps grow with the square of the events
GRADIENT_EVENTS = 2048  # of a pass with gradients, some 100 kB each
FORWARD_EVENTS = 8192  # of a pass without, some 30 kB each
FLOOR = 0.05  # logit; what moves it by less does not matter


@dataclass(frozen=True)
class ExplainSettings:
    """What a person may want to change; everything about the model comes from its checkpoint.

    >>> ExplainSettings(stays=2).max_stays
    100
    """

    checkpoint: str = train.option(
        "trained_models/clinical_LF/checkpoints/best_model.pth",
        "Checkpoint to explain.",
    )
    data: str = train.option(
        "",
        "Data whose held-out stays are used, as train.py takes it; default: the checkpoint's.",
    )
    save_dir: str = train.option(
        "",
        "Folder for figures, tables and the report; default: explainability beside the checkpoint's folder.",
    )
    stays: int = train.option(
        4,
        "Stays shown in full: highest, lowest, most uncertain, most wrong, and so on in turn.",
        low=0,
    )
    max_stays: int = train.option(
        100,
        "Held-out stays analysed at most, drawn at random; 0 takes all.",
        low=0,
    )
    text_encoder: str = train.option(
        "",
        "Encoder of the checkpoint, if it was a local folder; else it is known.",
    )
    labels: str = train.option("", "Labels of a MEDS data set, if other than the checkpoint's own.")
    cache_dir: str = train.option("", "Folder of the embedding cache; default: the checkpoint's own.")
    hf_cache: str = train.option(
        "",
        "Folder of downloaded encoder weights; default: the checkpoint's own.",
    )
    max_replacements: int = train.option(
        100,
        "Events of a stay replaced one by one, the most attributed (and those listed); the others stay empty; 0: all.",
        low=0,
    )
    layer_stays: int = train.option(
        20,
        "Stays attributed to layers at most (those shown in full always are).",
        low=0,
    )
    shapley_orders: int = train.option(
        25,
        "Random orders behind the Shapley values of stays shown in full; 0 leaves them out.",
        low=0,
    )
    ig_steps: int = train.option(
        12,
        "Steps of Integrated Gradients; where it is not complete, tried again with 4 and 16 times as many.",
        low=2,
    )
    untrained_models: int = train.option(
        4,
        "Untrained models that show what heads do without any training (at least 4).",
        low=4,
    )
    decision_threshold: float = train.option(
        0.5,
        "Risk at which a decision would change: without which events would it?",
        above=0,
        below=1,
    )
    checked_stays: int = train.option(
        40,
        "Stays on which deletion, infidelity and randomisation are measured at most.",
        low=0,
    )
    n_bootstrap: int = train.option(1000, "Bootstrap samples behind every 95 % interval.", low=1)
    seed: int = train.option(
        0,
        "Seed of the choice of stays, random orders, untrained models and the bootstrap.",
    )
    quick: bool = train.option(
        False,
        "Show what matters in half a minute: 12 stays, few checks, no layers; a full run's findings may differ.",
    )
    memory_limit: str = train.option(
        "33%",
        "Memory for reading the data: a share of the machine's, or a size like 16GB.",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Load
# ---------------------------------------------------------------------------------------------------------------------


class _Run(NamedTuple):
    """A trained model and the stays it is explained on, which it has not seen in training."""

    checkpoint: train.Checkpoint
    table: train.StayTable
    dataset: train.ClinicalSequenceDataset
    logits: np.ndarray  # (n_stays) float64
    held_out: bool  # patients of the checkpoint's own test split; False: none of its patients is in the data
    vectors: np.ndarray  # (n_texts, E) of the table's texts
    is_new_item: np.ndarray  # (n_texts) bool: training never saw the item of the text

    @property
    def parts(self) -> dict[str, slice]:
        """Which of an event's inputs are its type, its text, its time, and more."""
        return _event_parts(self.dataset.input_dim, self.checkpoint.preprocessor.item_history)

    def inputs(self, stay: int) -> tuple[Tensor, Tensor]:
        """(1, L, C) events and (1, S) static inputs of a stay, where the model is."""
        sequence, static, _ = self.dataset[stay]
        device = next(self.checkpoint.model.parameters()).device
        return sequence.unsqueeze(0).to(device), static.unsqueeze(0).to(device)


def _load_run(
    checkpoint_path: str | Path,
    test_data_path: str | Path | pd.DataFrame = "",
    text_encoder: str = "",
    cache_dir: str | Path = "",
    hf_cache: str | Path = "",
    labels: str = "",
    memory_limit: str = "33%",
) -> _Run:
    """Return the checkpoint with the stays of patients it was neither trained nor tuned on, in its own cohort settings.

    Raises `InputError` where a file cannot be read, the encoder is another one, or no such stay exists.
    """
    accelerator = _full_precision()
    checkpoint = train.load_checkpoint(checkpoint_path, accelerator.device)
    trained = replace(
        checkpoint.settings,
        labels=labels or checkpoint.settings.labels,
        cache_dir=_folder_to_use(cache_dir, checkpoint, "cache_dir"),
        hf_cache=_folder_to_use(hf_cache, checkpoint, "hf_cache"),
    )
    data, shown = _data_to_explain(test_data_path, checkpoint)
    logger.info(f"Reading     {shown}, for {checkpoint_path}")
    table, _ = train.read_stays(
        data,
        trained.cache_dir,
        need_label=False,
        task=trained.meds_task,
        memory_limit=memory_limit,
        static_features=[*checkpoint.preprocessor.categorical, *checkpoint.preprocessor.numeric],
    )
    settings = replace(
        trained,
        data=shown,
        text_encoder=train.encoder_to_load(checkpoint, text_encoder),
    )
    table, _ = train.choose_cohort(table, settings)
    patients = table.stays.patient_id
    seen = train.seen_patients(table.stays, checkpoint)
    if seen.all():
        raise InputError(
            f"{shown}: all {len(patients)} stays are of patients that this model was trained or tuned on; "
            "explaining them would flatter it. Give --data with other patients."
        )
    held_out = bool(patients.isin(checkpoint.patients["test"]).any())
    if not held_out and not seen.any():
        logger.warning(f"Data        WARNING: no patient of {shown} was trained or tested on: these are other data")
    table = table.take(np.flatnonzero(~seen)).with_own_texts()
    train.log_unknown_categories(checkpoint.preprocessor, table.static_columns)
    _, vectors = train.embed_texts(
        table.texts,
        settings,
        accelerator,
        expected=checkpoint.text_encoder,
    )
    return _make_run(checkpoint, table, vectors, held_out, accelerator)


def _folder_to_use(given: str | Path, checkpoint: train.Checkpoint, name: str) -> str:
    """Return the folder given, else the one that training used, where this machine has it, else train.py's default."""
    own = getattr(checkpoint.settings, name)
    return str(given) or (own if os.access(own, os.W_OK) else getattr(train.Settings, name))


def _data_to_explain(
    given: str | Path | pd.DataFrame,
    checkpoint: train.Checkpoint,
) -> tuple[Path | pd.DataFrame, str]:
    """Return the data to read, the checkpoint's own where none are given, and what to call them."""
    if isinstance(given, pd.DataFrame):
        return given, "the data frame"
    own = checkpoint.settings.test_data or checkpoint.settings.data
    path = train.data_path(str(given) or own)
    if not str(given) and not path.exists() and "*" not in own:
        raise InputError(f"{own}: the data that the checkpoint was trained on are not there. Give --data.")
    return path, str(path)


def _full_precision() -> Accelerator:
    """Return the process's accelerator, also after training in bf16, without autocast: differences need all digits."""
    return Accelerator(cpu=train.only_cpu(), kwargs_handlers=[AutocastKwargs(enabled=False)])


def _make_run(
    checkpoint: train.Checkpoint,
    table: train.StayTable,
    vectors: np.ndarray,
    held_out: bool,
    accelerator: Accelerator,
) -> _Run:
    """Score the stays and keep all that an explanation needs."""
    dataset = train.ClinicalSequenceDataset(table, checkpoint.preprocessor, vectors)
    logits = train.predict_logits(checkpoint.model, dataset, checkpoint.settings, accelerator)
    return _Run(checkpoint, table, dataset, logits, held_out, vectors, checkpoint.is_new_item(table.texts))


def _choose_stays(run: _Run, shown: int, most: int, seed: int) -> tuple[list[int], dict[int, str]]:
    """Indices of the stays to analyse, and why each of `shown` of them is shown in full."""
    risk, labels = run.checkpoint.probabilities(run.logits), run.table.labels
    wrong = np.where(np.isnan(labels), -np.inf, np.abs(risk - labels))
    orders = {
        "highest risk": np.argsort(-risk),
        "lowest risk": np.argsort(risk),
        "most uncertain": np.argsort(np.abs(risk - 0.5)),
        "most wrong": np.argsort(-wrong),
    }
    if np.isnan(labels).all():
        del orders["most wrong"]
    why: dict[int, str] = {}
    while len(why) < min(shown, len(risk)):
        name = list(orders)[len(why) % len(orders)]
        why[next(int(stay) for stay in orders[name] if stay not in why)] = name
    deaths = np.flatnonzero(labels == 1)
    if why and len(deaths) and not why.keys() & set(deaths.tolist()):
        why.popitem()
        why[int(deaths[risk[deaths].argmax()])] = "highest risk of those who died"
    others = np.random.default_rng(seed).permutation([stay for stay in range(len(risk)) if stay not in why])
    chosen = [*why, *others.tolist()]
    return sorted(chosen[: max(most, len(why))] if most else chosen), why


# ---------------------------------------------------------------------------------------------------------------------
# Attend
# ---------------------------------------------------------------------------------------------------------------------


class _Attention(NamedTuple):
    """What one pass over one stay looked at; small, however long the stay."""

    pooling: np.ndarray  # (Hp, L) weights of the pooling heads, each sums to 1
    received: np.ndarray  # (n_layers, H, L) weight an event gets from an event on average; NaN before the last 3,000
    maps: np.ndarray  # (n_layers, H, bins, bins) means over equal bins of events
    rollout: np.ndarray  # (L,) pooling followed back through the layers, sums to 1
    scores: np.ndarray  # (Hp, L) scaled similarity of the query vector with the events' keys


class _ReducedMaps(list):
    """Takes each layer's weights (1, H, L, L) as the layer makes them and keeps what is needed of them."""

    def append(self, weights: Tensor) -> None:
        bins = min(weights.shape[-1], MAX_MAP_BINS)
        super().append((weights[0].mean(1), F.adaptive_avg_pool2d(weights[0], bins), weights[0].mean(0)))


@torch.no_grad()
def _attend(model: ClinicalTransformer, sequence: Tensor, static: Tensor) -> _Attention:
    """Return the attention of the pass over one stay, (1, L, C) and (1, S); the layers' of its last 3,000 events."""
    is_event = torch.ones(sequence.shape[:2], dtype=torch.bool, device=sequence.device)
    layers = _ReducedMaps()
    recent = max(0, sequence.shape[1] - MAX_MAP_EVENTS)
    layout = train.layout_of_mask(is_event)
    pooled = model.score_packed(sequence[0], static, layout, None if recent else layers)[1]
    if recent:
        model.encode(sequence[:, recent:], is_event[:, recent:], layers)
    pooling, events = pooled["pooling_weights"][0, :, 0], pooled["transformer_output"][0]  # (Hp, L), (L, D)
    n_heads, n_recent = model.architecture["n_heads"], len(events) - recent
    n_bins = min(n_recent, MAX_MAP_BINS)
    received, maps = pooling.new_zeros(0, n_heads, n_recent), pooling.new_zeros(0, n_heads, n_bins, n_bins)
    for of_events, binned, _ in layers:
        received = torch.cat([received, of_events[None]])
        maps = torch.cat([maps, binned[None]])
    rollout = _attention_rollout([mean for _, _, mean in layers], pooling.mean(0)[recent:])
    pad = lambda x, value: F.pad(x, (recent, 0), value=value).cpu().numpy()
    return _Attention(
        pooling.cpu().numpy(),
        pad(received, math.nan),
        maps.cpu().numpy(),
        pad(rollout, math.nan),
        model.attention_pooling.scores(model.query_vector, events.unsqueeze(0))[0].cpu().numpy(),
    )


def _attention_rollout(layer_maps: Sequence[Tensor], pooling: Tensor) -> Tensor:
    """(L,): pooling weights (L,) times the product of (map + identity) / 2 over layers (L, L), first layer last.

    Abnar & Zuidema 2020; the skip connection counts as much as attention. A vector times matrices: no (L, L) product.
    """
    share = pooling / pooling.sum()
    for weights in reversed(layer_maps):
        share = 0.5 * share + 0.5 * share @ weights
    return share


def _untrained_like(model: ClinicalTransformer, seed: int) -> ClinicalTransformer:
    """The same architecture and input statistics with fresh random weights."""
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = ClinicalTransformer(**model.architecture)
    fresh.load_state_dict(dict(model.named_buffers()), strict=False)
    return fresh.to(device).eval()


# ---------------------------------------------------------------------------------------------------------------------
# Attribute
# ---------------------------------------------------------------------------------------------------------------------


class Attribution(NamedTuple):
    """Integrated Gradients of the logit; events and statics of a stay sum to logit - baseline_logit + gap_error.

    >>> captum_analysis(model, sequences, static_features, attention_mask).events.shape == sequences.shape
    True
    """

    events: Tensor  # (B, L, C), exactly 0 at padding
    statics: Tensor  # (B, S)
    logits: np.ndarray  # (B,) float64
    baseline_logits: np.ndarray
    gap_errors: np.ndarray  # (B,) sum of the attributions minus the difference of the logits
    n_steps: np.ndarray  # (B,) steps that were taken in the end
    complete: np.ndarray  # (B,) bool: |gap error| <= 0.02 + 0.01 * |difference|


def _is_complete(gap_error: float, difference: float) -> bool:
    """A purely relative tolerance would explode where the difference is near 0."""
    return abs(gap_error) <= 0.02 + 0.01 * abs(difference)


def captum_analysis(
    model: ClinicalTransformer,
    sequences: Tensor,
    static_features: Tensor,
    attention_mask: Tensor | None = None,
    baseline: dict[str, Tensor] | None = None,
    n_steps: int = 50,
    retry: bool = True,
) -> Attribution:
    """Return the Integrated Gradients of (B, L, C) events and (B, S) statics on the logit, from a baseline.

    `baseline` is the checkpoint's: the mean training event at every position and the mean statics; None is zeros. Stays
    are done one by one, without padding, and again with 4 and 16 times the steps where the sum misses the difference of
    the logits. Raises ValueError for NaN or infinite inputs of real events.

    >>> found = captum_analysis(model, sequences, static_features, attention_mask)
    >>> found.events.shape == sequences.shape and bool(found.complete.all())
    True
    """
    model.eval()
    attributions, statics, rows = torch.zeros_like(sequences), torch.zeros_like(static_features), []
    for stay, is_event in enumerate(_event_mask(sequences, attention_mask)):
        length = int(is_event.nonzero().max()) + 1 if is_event.any() else 0
        sequence, static, mask = (
            sequences[stay, None, :length],
            static_features[stay, None],
            is_event[None, :length],
        )
        _check_finite(sequence, static, mask)
        # What padding holds must not become 0 * NaN.
        sequence = torch.where(mask[..., None], sequence, 0)
        logit, start = _logits_and_baselines(model, sequence, static, mask, baseline)
        for steps in (n_steps, 4 * n_steps, 16 * n_steps) if retry else (n_steps,):
            events, columns = _integrated_gradients(model, sequence, static, mask, baseline, steps)
            gap = float(events.double().sum() + columns.double().sum()) - (logit - start)
            if _is_complete(gap, logit - start):
                break
        attributions[stay, :length], statics[stay] = events[0], columns[0]
        rows.append((logit, start, gap, steps, _is_complete(gap, logit - start)))
    return Attribution(attributions, statics, *(np.array(column) for column in zip(*rows)))


@torch.no_grad()
def _logits_and_baselines(
    model: ClinicalTransformer,
    sequence: Tensor,
    static: Tensor,
    is_event: Tensor,
    baseline: dict[str, Tensor] | None,
) -> tuple[float, float]:
    """Return the logit of one stay and of its baseline, in one pass."""
    start, start_static = _baselines_like(sequence, static, baseline)
    both = torch.cat([sequence, start]), torch.cat([static, start_static]), is_event.expand(2, -1)
    logit, baseline_logit = model.logits(*both).squeeze(1).tolist()
    return logit, baseline_logit


def _event_mask(sequences: Tensor, attention_mask: Tensor | np.ndarray | None) -> Tensor:
    """Return (B, L) bool, True at real events, from a mask of any number type; None: every event is real."""
    if sequences.dim() != 3:
        raise InputError(
            f"sequences of shape {tuple(sequences.shape)}: give (B, L, C), a single stay with B = 1; statics (B, S)."
        )
    if attention_mask is None:
        return torch.ones(sequences.shape[:2], dtype=torch.bool, device=sequences.device)
    mask = torch.as_tensor(attention_mask, device=sequences.device).bool()
    if mask.shape != sequences.shape[:2]:
        raise ValueError(
            f"attention_mask is {tuple(mask.shape)}; it must be {tuple(sequences.shape[:2])}, as the events."
        )
    return mask


def _check_finite(sequence: Tensor, static: Tensor, is_event: Tensor) -> None:
    if not (torch.isfinite(sequence[is_event]).all() and torch.isfinite(static).all()):
        raise ValueError(
            "an input of a real event or a static input is NaN or infinite: nothing can be attributed to it. "
            "Look for missing text vectors, or for times that were not encoded."
        )


def _baselines_like(
    sequence: Tensor,
    static: Tensor,
    baseline: dict[str, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """(1, L, C) and (1, S): the baseline event at every position, and the baseline statics."""
    if baseline is None:
        return torch.zeros_like(sequence), torch.zeros_like(static)
    return baseline["event"].to(sequence).expand_as(sequence), baseline["static"].to(static).expand_as(static)


def _integrated_gradients(
    model: ClinicalTransformer,
    sequence: Tensor,
    static: Tensor,
    is_event: Tensor,
    baseline: dict[str, Tensor] | None,
    n_steps: int,
) -> tuple[Tensor, Tensor]:
    """Return the attributions (1, L, C) and (1, S) of one stay."""
    starts = _baselines_like(sequence, static, baseline)
    steps_per_pass = max(1, GRADIENT_EVENTS // max(1, sequence.shape[1]))
    events, statics = IntegratedGradients(model.logits).attribute(
        (sequence, static),
        starts,
        additional_forward_args=(is_event,),
        n_steps=n_steps,
        method="gausslegendre",
        internal_batch_size=steps_per_pass,
    )
    return (events * is_event[..., None]).detach(), statics.detach()


def _event_parts(input_dim: int, item_history: bool = False) -> dict[str, slice]:
    """Which of an event's inputs are its type, its text, its time and (with `--item-history`) its item's history."""
    n_types, last = len(EVENT_TYPES), input_dim - (len(HISTORY) if item_history else 0)
    return {
        "type": slice(0, n_types),
        "text": slice(n_types, last - 1),
        "time": slice(last - 1, last),
        "history": slice(last, input_dim),
    }


def _sum_over_columns(values: np.ndarray, names: Sequence[tuple[str, str | None]]) -> dict[str, float]:
    """(S,) values -> one number per static column: a one-hot group is one column."""
    sums = dict.fromkeys((column for column, _ in names), 0.0)
    for (column, _), value in zip(names, values):
        sums[column] += float(value)
    return sums


def layer_analysis(
    model: ClinicalTransformer,
    sequences: Tensor,
    static_features: Tensor,
    attention_mask: Tensor | None = None,
    baseline: dict[str, Tensor] | None = None,
    n_steps: int = 50,
) -> list[dict[str, Any]]:
    """Attribute (B, L, C) events to the outputs of `input_projection` and of each layer, per event.

    Another question than `captum_analysis` answers: statics are held fixed, and deeper layers have already mixed the
    events. Return dicts of layer, attribution (B, L), exactly 0 at padding, and gap_error (B,), complete (B,).

    >>> [row["layer"] for row in layer_analysis(model, sequences, static_features, attention_mask)]
    ['input_projection', 'encoder layer 1', 'encoder layer 2']
    """
    model.eval()
    mask = _event_mask(sequences, attention_mask)
    _check_finite(sequences, static_features, mask)
    layers: dict[str, nn.Module] = {"input_projection": model.input_projection}
    layers |= {f"encoder layer {number}": layer for number, layer in enumerate(model.transformer_encoder, start=1)}
    rows: list[dict[str, Any]] = []
    for name in layers:
        empty = {"gap_error": np.zeros(len(mask)), "complete": np.zeros(len(mask), bool)}
        rows.append({"layer": name, "attribution": np.zeros(mask.shape), **empty})
    for stay, is_event in enumerate(mask):
        sequence, static = sequences[stay, None, is_event], static_features[stay, None]
        both = torch.cat([sequence, _baselines_like(sequence, static, baseline)[0]])
        with torch.no_grad():
            logit, start = model.logits(both, static.expand(2, -1)).squeeze(1).tolist()
        for row, layer in zip(rows, layers.values()):
            found = _layer_attribution(
                model,
                layer,
                sequence,
                static,
                baseline,
                n_steps,
                logit - start,
            )
            (
                row["attribution"][stay, is_event.cpu()],
                row["gap_error"][stay],
                row["complete"][stay],
            ) = found
    return rows


def _layer_attribution(
    model: ClinicalTransformer,
    layer: nn.Module,
    sequence: Tensor,
    static: Tensor,
    baseline: dict[str, Tensor] | None,
    n_steps: int,
    difference: float,
) -> tuple[np.ndarray, float, bool]:
    """Return (L,) attributions of one stay's events, (1, L, C), to one layer, the gap error, whether it is complete.

    They should sum to `difference`. The outputs of a stay's layer are packed, (L, D): Captum sees L rows per step.
    """
    start, _ = _baselines_like(sequence, static, baseline)
    for steps in (n_steps, 4 * n_steps):
        found = LayerIntegratedGradients(model.logits, layer).attribute(
            sequence,
            start,
            additional_forward_args=(static,),
            n_steps=steps,
            method="gausslegendre",
            internal_batch_size=max(GRADIENT_EVENTS, sequence.shape[1]),
        )
        attribution = found.detach().double().sum(1).cpu().numpy()  # (L,)
        gap = float(attribution.sum()) - difference
        if _is_complete(gap, difference):
            break
    return attribution, gap, _is_complete(gap, difference)


@torch.no_grad()
def _replaced_logits(
    model: ClinicalTransformer,
    sequence: Tensor,
    static: Tensor,
    keep: np.ndarray,
    baseline: dict[str, Tensor] | None,
    keep_static: np.ndarray | None = None,
) -> np.ndarray:
    """Return the float64 logits (n,) of n variants of one stay, (1, L, C) and (1, S).

    `keep` (n, L) and `keep_static` (n, S; None: all) say what stays as it is; the rest is as the baseline. A replaced
    event holds its place; the number of events, and what other events tell of it (their items' history), are held.
    Nothing is masked: a softmax would hand the weight of a masked event to the others: harmless events would matter.
    """
    event, mean_static = _baselines_like(sequence, static, baseline)
    n_events = sequence.shape[1]
    events = torch.cat([sequence[0], event[0, :1]])  # (L + 1, C): a variant is rows of these
    own = torch.arange(n_events, device=sequence.device)
    if keep_static is None:
        keep_static = np.ones((len(keep), static.shape[1]), bool)
    variants, which = np.unique(np.hstack([keep, keep_static]), axis=0, return_inverse=True)
    logits = np.zeros(len(variants))
    per_pass = max(1, FORWARD_EVENTS // max(1, n_events))
    for first in range(0, len(variants), per_pass):
        part = slice(first, first + per_pass)
        is_kept = torch.as_tensor(variants[part], device=sequence.device)  # (n, L + S)
        rows = torch.where(is_kept[:, :n_events], own, n_events)  # (n, L)
        statics = torch.where(is_kept[:, n_events:], static, mean_static)  # (n, S)
        logits[part] = model.logits_of_rows(events, rows, statics).squeeze(1).double().cpu().numpy()
    return logits[which]


def _replace_each_event(
    model: ClinicalTransformer,
    sequence: Tensor,
    static: Tensor,
    baseline: dict[str, Tensor] | None,
    which: np.ndarray | None = None,
) -> np.ndarray:
    """Return (L,): by how much the logit falls if this event were unremarkable; positive pushes towards death.

    With `which` (positions) the others are NaN. The cost grows with L per event replaced, the memory does not.
    """
    n_events = sequence.shape[1]
    which = np.arange(n_events) if which is None else np.asarray(which)
    scores = np.full(n_events, math.nan)
    rows_per_part = max(
        1,
        64 * FORWARD_EVENTS // max(1, n_events),
    )  # the mask itself, (L, L), is made in parts
    for first in range(0, len(which), rows_per_part):
        part = which[first : first + rows_per_part]
        keep = np.vstack([np.ones(n_events, bool), part[:, None] != np.arange(n_events)])
        logits = _replaced_logits(model, sequence, static, keep, baseline)
        scores[part] = logits[0] - logits[1:]
    return scores


class Ablation(NamedTuple):
    """By how much the logit falls without single events, and without groups of events or static columns.

    >>> found = ablation_analysis(model, sequences, static_features, attention_mask)
    >>> found.if_unremarkable.shape == attention_mask.shape
    True
    """

    if_unremarkable: np.ndarray  # (B, L) by how much the logit falls then; 0 at padding, NaN where not asked for
    groups: pd.DataFrame  # stay (index in the batch), kind, group, n_events, ablation, shapley (NaN unless asked for)


def ablation_analysis(
    model: ClinicalTransformer,
    sequences: Tensor,
    static_features: Tensor,
    attention_mask: Tensor | None = None,
    baseline: dict[str, Tensor] | None = None,
    event_groups: Mapping[str, Sequence[str] | np.ndarray] | None = None,
    static_names: Sequence[str] | None = None,
    shapley_samples: int = 0,
    seed: int = 0,
    which: np.ndarray | None = None,
) -> Ablation:
    """Measure by how much the logits of (B, L, C) events and (B, S) statics fall if an event, or a group, says nothing.

    To say nothing, to be unremarkable, is to be as in the baseline: single events (at the positions `which`, else all),
    the events of one value of each entry of `_event_groups` (kind -> L labels), the static inputs of one name (S names,
    a one-hot group repeats its name). The number of events is held. Shapley values (sampled orders) are over the groups
    of the first kind and the statics together. No gradient is computed. Masked events are left out: a stay is its real
    events, in their order.

    >>> found = ablation_analysis(model, sequences, static_features, attention_mask)
    >>> found.if_unremarkable.shape == sequences.shape[:2]
    True
    """
    model.eval()
    mask = _event_mask(sequences, attention_mask)
    _check_finite(sequences, static_features, mask)
    names = list(static_names or [f"static {column}" for column in range(static_features.shape[1])])
    kinds = event_groups or {"all events": ["all"] * sequences.shape[1]}
    scores, tables = np.zeros(mask.shape), []
    for stay, is_event in enumerate(mask):
        sequence, static = sequences[stay : stay + 1, is_event], static_features[stay : stay + 1]
        positions = is_event.nonzero().squeeze(1).cpu().numpy()
        chosen = None if which is None else np.flatnonzero(np.isin(positions, which))
        scores[stay, positions] = _replace_each_event(model, sequence, static, baseline, chosen)
        for number, (kind, labels) in enumerate(kinds.items()):
            groups = _feature_groups(
                kind,
                np.asarray(labels, dtype=object)[positions],
                [] if number else names,
            )
            samples = 0 if number else shapley_samples
            found = _ablate_groups(model, sequence, static, baseline, groups, samples, seed)
            tables.append(found.assign(stay=stay))
    return Ablation(scores, pd.concat(tables, ignore_index=True))


def _feature_groups(kind: str, labels: Sequence[str], static_names: Sequence[str]) -> pd.DataFrame:
    """Return kind, group, n_events and members: positions of events or columns of statics."""
    events, statics = (
        pd.Series(list(labels), dtype=object),
        pd.Series(list(static_names), dtype=object),
    )
    rows = [(kind, name, len(part), part.index.to_numpy()) for name, part in events.groupby(events)]
    rows += [("static", name, 0, part.index.to_numpy()) for name, part in statics.groupby(statics, sort=False)]
    return pd.DataFrame(rows, columns=["kind", "group", "n_events", "members"])


def _ablate_groups(
    model: ClinicalTransformer,
    sequence: Tensor,
    static: Tensor,
    baseline: dict[str, Tensor] | None,
    groups: pd.DataFrame,
    shapley_samples: int,
    seed: int,
) -> pd.DataFrame:
    """Return, per group, by how much the logit falls if it alone were unremarkable, and its Shapley value."""
    of_events = np.zeros((len(groups), sequence.shape[1]))  # who is in which group
    of_statics = np.zeros((len(groups), static.shape[1]))
    for number, (kind, members) in enumerate(zip(groups["kind"], groups["members"])):
        (of_statics if kind == "static" else of_events)[number, members] = 1

    def logits_with(present: np.ndarray) -> np.ndarray:
        """Return the logits (n,) of a stay that has only the groups present, (n, groups)."""
        absent = 1.0 - present
        return _replaced_logits(
            model,
            sequence,
            static,
            absent @ of_events == 0,
            baseline,
            absent @ of_statics == 0,
        )

    logits = logits_with(np.vstack([np.ones(len(groups), bool), ~np.eye(len(groups), dtype=bool)]))
    result = groups[["kind", "group", "n_events"]].assign(
        ablation=logits[0] - logits[1:],
        shapley=np.nan,
    )
    if shapley_samples:
        result["shapley"] = _shapley_values(logits_with, len(groups), shapley_samples, seed)
    return result


def _shapley_values(
    logits_with: Callable[[np.ndarray], np.ndarray],
    n_groups: int,
    n_orders: int,
    seed: int,
) -> np.ndarray:
    """Return (groups,): what each group adds to the logit as groups arrive, mean of random orders."""
    generator = torch.Generator().manual_seed(seed)
    orders = np.stack([torch.randperm(n_groups, generator=generator).numpy() for _ in range(n_orders)])
    place = np.argsort(orders, axis=1)  # when each group arrives
    present = place[:, None, :] < np.arange(n_groups + 1)[:, None]  # (orders, arrived, groups)
    logits = logits_with(present.reshape(-1, n_groups)).reshape(n_orders, -1)
    gains = np.take_along_axis(np.diff(logits, axis=1), place, axis=1)
    return gains.mean(0)


# ---------------------------------------------------------------------------------------------------------------------
# Check: how right are the explanations?
# ---------------------------------------------------------------------------------------------------------------------

# Of a stay's events made unremarkable, or left as they are.
FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75)
N_RANDOM_ORDERS = 3
MIN_EVENTS = 10  # a shorter stay has no order of events to speak of
N_RESETS = 4  # random models that a stay is explained with
STAYS_PER_RESET = 4  # that share them
FEW_STEPS = 8  # of Integrated Gradients, where only the order of the events counts
N_PERTURBATIONS, SHARE_PERTURBED = 60, 0.1  # random sets of events that infidelity asks about
N_SLOW = 10  # stays on which the slow checks, noise and cascade, are measured
NOISE = 0.02  # of each input's spread
N_NOISY_EVENTS = 50  # the strongest events, which are replaced again under noise
ORDERS = {
    "attribution": "Integrated Gradients",
    "if_unremarkable": "replacement",
    "attention": "pooling attention",
}
CASCADE = {  # the model from its output down, by the beginnings of its parameters' names
    "classifier": ("classifier",),
    "pooling": ("query_vector", "attention_pooling"),
    "layers": ("transformer_encoder", "final_norm"),
    "projection": ("",),
}
COMPARE = {">": operator.gt, ">=": operator.ge, "<=": operator.le}


def _bootstrap(
    values: np.ndarray,
    patients: np.ndarray,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Return the mean of (n,) values and its 95 % interval over resampled patients; NaN values are left out.

    The interval is NaN with fewer than three patients: resampling them says nothing.
    """
    values = np.asarray(values, float)
    known = values[~np.isnan(values)]
    names, patient = np.unique(np.asarray(patients)[~np.isnan(values)], return_inverse=True)
    result = {
        "value": float(known.mean()) if len(known) else math.nan,
        "low": math.nan,
        "high": math.nan,
    }
    if len(names) >= 3:
        drawn = _patients_drawn(len(names), n_bootstrap, seed)
        means = (drawn @ np.bincount(patient, known)) / (drawn @ np.bincount(patient))
        result["low"], result["high"] = train.interval_of(means)
    return result | {"n": len(known), "n_patients": len(names)}


@functools.lru_cache(maxsize=1)  # most figures are of the same patients
def _patients_drawn(n_patients: int, n_bootstrap: int, seed: int) -> np.ndarray:
    """Return (n_bootstrap, n_patients): how often each patient is drawn."""
    resamples = train.patient_resamples(np.arange(n_patients), n_patients, n_bootstrap, seed)
    return np.concatenate(list(resamples))


def _without_interval(value: float, n: int) -> dict[str, float]:
    """Return what `_bootstrap` gives, for a number that has no interval."""
    return {"value": value, "low": math.nan, "high": math.nan, "n": n}


def _rank_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return Spearman correlations (m, n) of the rows of (m, L) with those of (n, L); NaN where a row is constant."""
    ranks = [rankdata(np.atleast_2d(rows), axis=1) for rows in (first, second)]
    centred = [rows - rows.mean(1, keepdims=True) for rows in ranks]
    lengths = [np.sqrt((rows**2).sum(1)) for rows in centred]
    with np.errstate(invalid="ignore", divide="ignore"):
        return (centred[0] @ centred[1].T) / np.outer(*lengths)


def _random_orders(n_events: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"random {number}": rng.random(n_events) for number in range(1, N_RANDOM_ORDERS + 1)}


def _deletion_insertion(
    model: ClinicalTransformer,
    sequence: Tensor,
    static: Tensor,
    baseline: dict[str, Tensor] | None,
    scores: dict[str, np.ndarray],
) -> pd.DataFrame:
    """Return how the logit of one stay changes as events become unremarkable (deletion) or stop being so (insertion).

    The highest of `scores` (order -> (L,)) come first; NaN (not replaced one by one) counts as 0. Columns direction,
    order, fraction, change: the logit minus that of the whole stay (deletion) or of a stay whose events say nothing
    (insertion).
    """
    n_events = sequence.shape[1]
    fractions = np.array([0.0, *FRACTIONS])
    known = [np.nan_to_num(score) for score in scores.values()]
    place = np.stack([np.argsort(np.argsort(-score, kind="stable")) for score in known])  # (orders, L)
    first = place[:, None] < np.ceil(fractions * n_events)[:, None]  # (orders, fractions, L)
    keep = np.stack([~first, first])  # (2, orders, fractions, L)
    logits = _replaced_logits(model, sequence, static, keep.reshape(-1, n_events), baseline).reshape(keep.shape[:3])
    change = logits - logits[:, :, :1]
    names = pd.MultiIndex.from_product([["deletion", "insertion"], scores, fractions])
    return pd.Series(change.ravel(), names.set_names(["direction", "order", "fraction"])).rename("change").reset_index()


def _with_one_random_order(curves: pd.DataFrame) -> pd.DataFrame:
    """Return the curves with the one name `random` for all random orders, to be averaged."""
    return curves.assign(order=curves["order"].str.replace(r"random \d+", "random", regex=True))


def _gains_over_random(curves: pd.DataFrame, settings: ExplainSettings) -> list[dict[str, Any]]:
    """Return how much further an order moves the logit than random orders, mean over the fractions; paired by stay."""
    part = _with_one_random_order(curves[curves["fraction"] > 0])
    means = part.groupby(["icu_stay_id", "patient_id", "direction", "order"])["change"].mean().unstack("order")
    verbs = {
        "deletion": "making events unremarkable",
        "insertion": "giving events to a stay whose events say nothing",
    }
    rows = []
    for direction, verb in verbs.items():
        table = means.xs(direction, level="direction")
        patients = table.index.get_level_values("patient_id").to_numpy()
        for order, title in ORDERS.items():
            gain = (table[order] - table["random"]).to_numpy() * (-1 if direction == "deletion" else 1)
            found = _bootstrap(gain, patients, settings.n_bootstrap, settings.seed)
            words = f"{verb} in order of {title} moves the logit {{value:.2f}} [{{low:.2f}}, {{high:.2f}}] further "
            asked = None if order == "attention" else (">", 0.0)
            rows.append(_criterion(direction, order, found, asked, words + "than in random order", limit="low"))
    return rows


def _criterion(
    check: str,
    method: str,
    found: dict[str, float],
    threshold: tuple[str, float] | None,
    sentence: str,
    limit: str = "value",
) -> dict[str, Any]:
    """Return one line of faithfulness.json: what was measured, what it should be, whether it is, in plain words.

    `limit` names what must hold the threshold: the value, or a limit of its interval (the value where there is none).
    """
    held = found["value"] if math.isnan(found[limit]) else found[limit]
    words = sentence.format(**found).replace(" [nan, nan]", "")
    row = {"check": check, "method": method, **found, "threshold": None, "passed": None}
    if threshold is not None and not math.isnan(held):
        sign, bound = threshold
        passed = bool(COMPARE[sign](held, bound))
        row |= {"threshold": f"{sign} {bound:g}", "passed": passed}
        words += f" (should be {sign} {bound:g}: {'yes' if passed else 'NO'})"
    return row | {"sentence": words[:1].upper() + words[1:] + "."}


def _stay_infidelity(
    model: ClinicalTransformer,
    sequence: Tensor,
    static: Tensor,
    scores: dict[str, np.ndarray],
    baseline: dict[str, Tensor] | None,
    seed: int,
) -> dict[str, float]:
    """Return the infidelity (Yeh et al. 2019) of (L,) scores, relative to the same values dealt at random.

    How well their sums predict by how much the logit falls when a random tenth of the events becomes unremarkable, of
    those events that all scores know: where only the strongest are replaced one by one, the others say nothing of it.
    """
    known = ~np.isnan(np.array(list(scores.values()))).any(0)  # (L,)
    rng, n_known = np.random.default_rng(seed), known.sum()
    taken = rng.random((N_PERTURBATIONS, n_known)) < max(SHARE_PERTURBED, 1.5 / n_known)
    keep = np.ones((N_PERTURBATIONS + 1, len(known)), bool)
    keep[1:, known] = ~taken
    logits = _replaced_logits(model, sequence, static, keep, baseline)
    fall = logits[0] - logits[1:]  # (N_PERTURBATIONS,)
    found = {}
    for name, whole in scores.items():
        score = whole[known]
        dealt = np.stack([rng.permutation(score) for _ in range(10)])
        chance = np.mean((taken @ dealt.T - fall[:, None]) ** 2)
        found[name] = float(np.mean((taken @ score - fall) ** 2) / chance) if chance > 0 else math.nan
    return found


def _input_spread(dataset: train.ClinicalSequenceDataset, most: int = 20_000) -> Tensor:
    """Return the standard deviation (C,) of each input over the dataset's first events; 0 for one that never varies."""
    return dataset.events(torch.arange(min(most, len(dataset.text)))).std(0)


def _stay_sensitivity(
    sequence: Tensor,
    scores_of: Callable[[Tensor], np.ndarray],
    spread: Tensor,
    seed: int,
    n_samples: int = 3,
) -> float:
    """Return the largest relative change of (L,) scores under noise of 2 % of each input's spread (Yeh et al. 2019)."""
    generator = torch.Generator().manual_seed(seed)
    scores, changes = scores_of(sequence), []
    for _ in range(n_samples):
        noise = 2 * torch.rand(sequence.shape, generator=generator) - 1
        changes.append(scores_of(sequence + NOISE * spread.to(sequence) * noise.to(sequence)) - scores)
    return float(np.linalg.norm(changes, axis=1).max() / np.linalg.norm(scores))


def _event_totals(
    model: ClinicalTransformer,
    sequence: Tensor,
    static: Tensor,
    baseline: dict[str, Tensor] | None,
    n_steps: int,
) -> np.ndarray:
    """Return the Integrated Gradients of each event of one stay, (L,), without a second try."""
    events, _ = _integrated_gradients(
        model,
        sequence,
        static,
        _event_mask(sequence, None),
        baseline,
        n_steps,
    )
    return events[0].double().sum(1).cpu().numpy()


def _reset_down_to(
    part: str,
    model: ClinicalTransformer,
    untrained: ClinicalTransformer,
) -> ClinicalTransformer:
    """Return a copy of the model with the untrained one's weights from the classifier down to a part of `CASCADE`."""
    parts = list(CASCADE)
    kept = {}
    for name, weights in model.state_dict().items():
        of_part = next(key for key, beginnings in CASCADE.items() if name.startswith(beginnings))
        if parts.index(of_part) > parts.index(part):
            kept[name] = weights
    changed = copy.deepcopy(untrained)
    changed.load_state_dict(kept, strict=False)
    return changed


def _stay_randomisation(
    models: Sequence[ClinicalTransformer],
    sequence: Tensor,
    static: Tensor,
    baseline: dict[str, Tensor] | None,
    own: np.ndarray,
) -> dict[str, float]:
    """Return squared rank correlations: the model's own attributions with random models', and theirs with each other.

    Chance alone gives sqrt(2 / (pi (L - 1))), and similar texts look alike to any model: what counts is the excess.
    """
    resets = np.stack([_event_totals(model, sequence, static, baseline, FEW_STEPS) for model in models])
    with_own = float(np.mean(_rank_correlation(resets, own) ** 2))
    pairs = np.triu_indices(len(resets), 1)
    among = float(np.mean(_rank_correlation(resets, resets)[pairs] ** 2))
    return {"model and reset": with_own, "reset and reset": among, "reset excess": with_own - among}


def _check_stay(
    run: _Run,
    stay: int,
    scores: dict[str, np.ndarray],
    untrained: Sequence[ClinicalTransformer],
    settings: ExplainSettings,
) -> tuple[dict[str, float], pd.DataFrame]:
    """Return what the quick checks measure on one stay, scores by `ORDERS`, and its deletion and insertion."""
    model, baseline = run.checkpoint.model, run.checkpoint.baseline
    sequence, static = run.inputs(stay)
    orders = scores | _random_orders(sequence.shape[1], settings.seed + stay)
    own, replacement = scores["attribution"], scores["if_unremarkable"]
    known = ~np.isnan(replacement)
    row = {
        "attention agreement": _rank_correlation(scores["attention"], np.abs(own))[0, 0],
        "replacement agreement": _rank_correlation(replacement[known], own[known])[0, 0],
    }
    named = {"infidelity attribution": own, "infidelity replacement": replacement}
    row |= _stay_infidelity(model, sequence, static, named, baseline, settings.seed)
    row |= _stay_randomisation(untrained, sequence, static, baseline, own)
    return row, _deletion_insertion(model, sequence, static, baseline, orders)


def _check_stay_slowly(
    run: _Run,
    stay: int,
    own: np.ndarray,
    untrained: ClinicalTransformer,
    spread: Tensor,
    settings: ExplainSettings,
) -> dict[str, float]:
    """Return how much noise changes a stay's scores, and what a cascade of resets leaves of its attributions (L,)."""
    model, baseline = run.checkpoint.model, run.checkpoint.baseline
    sequence, static = run.inputs(stay)
    strongest = np.argsort(-np.abs(own))[:N_NOISY_EVENTS]

    def attribution_of(events: Tensor) -> np.ndarray:
        return _event_totals(model, events, static, baseline, settings.ig_steps)

    def replacement_of(events: Tensor) -> np.ndarray:
        return _replace_each_event(model, events, static, baseline, strongest)[strongest]

    row = {}
    for part in list(CASCADE)[:-1]:
        changed = _reset_down_to(part, model, untrained)
        other = _event_totals(changed, sequence, static, baseline, FEW_STEPS)
        row[f"reset to {part}"] = _rank_correlation(other, own)[0, 0] ** 2
    row["sensitivity attribution"] = _stay_sensitivity(sequence, attribution_of, spread, settings.seed)
    row["sensitivity replacement"] = _stay_sensitivity(sequence, replacement_of, spread, settings.seed)
    return row


def _check_stays(
    run: _Run,
    events: pd.DataFrame,
    stays: Sequence[int],
    settings: ExplainSettings,
    done: Callable[[int], Any] = lambda stay: None,
) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    """Measure the explanations of some stays -> criteria, curves. Calls `done` with each stay."""
    rows: list[dict[str, Any]] = []
    curves, spread = [], _input_spread(run.dataset)
    for stay in stays:
        ids = run.table.stays.loc[stay, ["icu_stay_id", "patient_id"]].to_dict()
        part = _of_stay(events, ids["icu_stay_id"])
        done(stay)
        if len(part) < MIN_EVENTS:
            continue
        if len(rows) % STAYS_PER_RESET == 0:  # other random models now and then: one model errs alike on all stays
            first = settings.seed + 1 + 1000 * stay
            untrained = [_untrained_like(run.checkpoint.model, first + number) for number in range(N_RESETS)]
        scores = {order: part[order].to_numpy(float) for order in ORDERS}
        row, curve = _check_stay(run, stay, scores, untrained, settings)
        if len(rows) < N_SLOW and not settings.quick:
            row |= _check_stay_slowly(run, stay, scores["attribution"], untrained[0], spread, settings)
        rows.append(row | ids)
        curves.append(curve.assign(**ids))
    if not rows:
        return [], pd.DataFrame(columns=["icu_stay_id", "patient_id", "direction", "order", "fraction", "change"])
    all_curves = pd.concat(curves, ignore_index=True)
    return _gains_over_random(all_curves, settings) + _measured_criteria(
        pd.DataFrame(rows),
        settings,
    ), all_curves


class _Measure(NamedTuple):
    """What is said of one column of measurements of single stays."""

    check: str
    method: str
    sentence: str
    threshold: tuple[str, float] | None = None
    limit: str = "value"  # what must hold the threshold


# Formats with which an interval is written into a sentence.
TWO, THREE = (f"{{value:.{digits}f}} [{{low:.{digits}f}}, {{high:.{digits}f}}]" for digits in (2, 3))
MEASURES = {
    "infidelity attribution": _Measure(
        "infidelity",
        "attribution",
        f"Integrated Gradients predict what making events unremarkable does with {TWO} of the "
        "error that the same values dealt out at random have",
        ("<=", 0.5),
    ),
    "infidelity replacement": _Measure(
        "infidelity",
        "if_unremarkable",
        f"single replacements predict what replacing several of these events does with {TWO} of the "
        "error that the same values dealt out at random have",
        ("<=", 0.2),
    ),
    "sensitivity attribution": _Measure(
        "sensitivity",
        "attribution",
        "noise of 2 % of each input's spread changes Integrated Gradients by {value:.1%} at most, mean of {n} stays",
        ("<=", 0.1),
    ),
    "sensitivity replacement": _Measure(
        "sensitivity",
        "if_unremarkable",
        "noise of 2 % of each input's spread changes single replacements by {value:.1%} at most, mean of {n} stays",
        ("<=", 0.1),
    ),
    "reset excess": _Measure(
        "randomisation",
        "attribution",
        "attributions agree with those of random models more than random models do with each other by {value:.3f} "
        "[{low:.3f}, {high:.3f}], squared rank correlations paired by stay",
        ("<=", 0.05),
        "high",
    ),
    "model and reset": _Measure(
        "randomisation, model and reset",
        "attribution",
        f"with all weights reset, attributions keep a squared rank correlation of {THREE} with "
        f"the model's own (mean of {N_RESETS} random models for each of {{n}} stays)",
    ),
    "reset and reset": _Measure(
        "randomisation, reset and reset",
        "attribution",
        f"two random models agree by a squared rank correlation of {THREE}: stays are short, and "
        "similar texts look alike to any model",
    ),
    "reset to classifier": _Measure(
        "cascade, classifier",
        "attribution",
        f"with the classifier reset, attributions keep a squared rank correlation of {TWO} with "
        "the model's own: so much of the order of events is settled before the classifier",
    ),
    "reset to pooling": _Measure(
        "cascade, pooling",
        "attribution",
        f"with the pooling reset as well, {TWO}",
    ),
    "reset to layers": _Measure(
        "cascade, layers",
        "attribution",
        f"with the layers reset as well, {TWO}; what then remains is the projection's",
    ),
    "attention agreement": _Measure(
        "agreement",
        "attention",
        f"pooling attention and |attribution| rank a stay's events with a correlation of {TWO}; "
        "at 1 the events that the model looks at most would also be those that move its prediction most",
    ),
    "replacement agreement": _Measure(
        "agreement",
        "if_unremarkable",
        f"replacement agrees with Integrated Gradients by a rank correlation of {TWO}, over the events replaced alone",
    ),
}


def _measured_criteria(rows: pd.DataFrame, settings: ExplainSettings) -> list[dict[str, Any]]:
    """Return one criterion per column of measurements of single stays."""
    criteria, patients = [], rows["patient_id"].to_numpy()
    for column, measure in MEASURES.items():
        if column not in rows:  # the slow ones, with --quick
            continue
        found = _bootstrap(rows[column].to_numpy(float), patients, settings.n_bootstrap, settings.seed)
        criteria.append(
            _criterion(
                measure.check,
                measure.method,
                found,
                measure.threshold,
                measure.sentence,
                measure.limit,
            )
        )
    return criteria


def _completeness_criterion(stays: pd.DataFrame, settings: ExplainSettings) -> dict[str, Any]:
    first = stays["complete"] & (stays["n_steps"] == settings.ig_steps)
    words = "attributions sum to the difference of the logits (within 0.02 + 1 %) for {value:.1%} of {n} stays; "
    words += f"{first.mean():.1%} needed no more than {settings.ig_steps} steps; what remains is flagged"
    found = _without_interval(float(stays["complete"].mean()), len(stays))
    return _criterion("completeness", "attribution", found, (">=", 0.99), words)


# ---------------------------------------------------------------------------------------------------------------------
# Name: clinical words for inputs, events and windows
# ---------------------------------------------------------------------------------------------------------------------

STATIC_WORDS = {
    "patient_gender": "gender",
    "patient_age": "age (years)",
    "patient_race": "race",
    "icu_length_of_stay_in_days": "length of ICU stay (days)",
    "first_icu_careunit": "first care unit",
    "last_icu_careunit": "last care unit",
}

# What an item says about which organ system; the first pattern that is found in its name, in lower case, decides.
ORGAN_SYSTEMS = {
    "infection": r"microbiology|culture|swab|white blood|\bwbc|neutrophil|lymphocyt|bands|vancomycin|cef|cillin|bactam"
    r"|penem|floxacin|mycin\b|conazole|nidazole|vaccine",
    "circulation": r"epinephrine|phenylephrine|vasopressin|dobutamine|dopamine|milrinone|midodrine|\w+olol\b|amiodarone"
    r"|diltiazem|dipine|\w+pril\b|hydralazine|nitroglycerin|digoxin|statin\b|aspirin|troponin|creatine kinase|ck-mb|bnp"
    r"|lactate \(|cardi|\bekg|echo\b|arterial line|pa catheter|ccopac|pacemaker|iabp",
    "respiration": r"po2|pco2|total co2|ph \(blood|base excess|oxygen|\bo2\b|required o2|peep|tidal|ventilat|intubat"
    r"|extubat|alveolar|chest|bronch|thoracentesis|albuterol|ipratropium",
    "liver and gut": r"bilirubin|aminotransferase|alkaline|albumin|lipase|amylase|ammonia|prazole|famotidine|ranitidine"
    r"|lactulose|ondansetron|senna|docusate|bisacodyl|endoscopy|paracentesis|stool",
    "blood and coagulation": r"h[ae]moglobin|h[ae]matocrit|platelet|red blood|red cell|\brdw|\bmch|\bmcv|\binr|\bptt?\b"
    r"|fibrinogen|heparin|warfarin|phytonadione|blood ingredient|haptoglobin|ferritin",
    "brain and sedation": r"propofol|fentanyl|morphine|morphone|codone|midazolam|lorazepam|diazepam|dexmedetomidine"
    r"|ketamine|haloperidol|quetiapine|olanzapine|levetiracetam|gabapentin|acetaminophen|naloxone|curium|curonium|\beeg"
    r"|\bct scan|\bicp\b|csf",
    "kidney and fluids": r"urine|creatinine|urea|gfr|dialysis|crrt|prismasate|foley|furosemide|thiazide"
    r"|sodium|potassium|chloride|bicarbonate|anion gap|magnesium|phosph(?!atase)|calcium|osmol"
    r"|\bwater\b|fluid|ringer|\bivf\b",
    "metabolism and nutrition": r"glucose|insulin|dextrose|d5w|glucagon|thyro|cort|predniso|calor|nutrition|protein"
    r"|carbohydrate|triglyceride|thiamine|folic|multivitamin",
}
LESS_SAID = (
    "Reference",
    "Flag",
    "Priority",
    "Comment",
    "Status",
    "Form",
    "Strength",
    "Test",
    "Location",
)
METHOD_WORDS = {
    "attribution": "push",
    "if_unremarkable": "replacement",
    "attention": "pooling attention",
}
CHECK_WORDS = {  # what each check of faithfulness.json asks of a method
    "completeness": "{method} adds up to the prediction",
    "deletion": "{method} ranks first what counts (events made unremarkable)",
    "insertion": "{method} ranks first what counts (events given back)",
    "infidelity": "{method} foretells what replacing several events does",
    "sensitivity": "{method} hardly changes under small noise",
    "randomisation": "{method} is this model's own, not any model's",
    "randomisation, model and reset": "likeness to the push in random models",
    "randomisation, reset and reset": "likeness of random models to each other",
    "cascade, classifier": "likeness once the classifier is random",
    "cascade, pooling": "likeness once the pooling is random, too",
    "cascade, layers": "likeness once the layers are random, too",
    "agreement": "{method} ranks a stay's events as the push does",
}


def _static_word(column: str) -> str:
    return STATIC_WORDS.get(column, column.replace("_", " "))


def _is_abnormal(text: str) -> bool:
    """Return whether the text itself says so: a flag, or a level outside the reference range."""
    return bool(re.search(r"\| Flag: abnormal|\| Level: (?!within range)", str(text)))


def _organ_system(item: str) -> str:
    """Return the organ system of an item by `ORGAN_SYSTEMS`, or `other`."""
    found = (system for system, pattern in ORGAN_SYSTEMS.items() if re.search(pattern, item.lower()))
    return next(found, "other")


def _clock_window(hours_to_end: np.ndarray) -> np.ndarray:
    """Return the names of the windows before the end that (n,) hours lie in."""
    place = np.searchsorted(CLOCK_WINDOWS_HOURS, hours_to_end, "right") - 1
    return np.array(CLOCK_WINDOWS, dtype=object)[np.clip(place, 0, len(CLOCK_WINDOWS_HOURS) - 2)]


def _cut(text: object, width: int) -> str:
    """Return the text on one line of at most `width` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= width else line[: width - 1].rstrip(" ·,(") + "…"


def _percent(probability: float) -> str:
    """Return `42 %`; never 0 or 100, which no prediction is."""
    if pd.isna(probability):
        return "–"
    if probability < 0.01:
        return "under 1 %"
    return "over 99 %" if probability > 0.99 else f"{100 * probability:.0f} %"


def _outcome(label: float) -> str:
    if pd.isna(label):
        return "outcome unknown"
    return "died" if label else "survived"


def _signed(value: float) -> str:
    """Return `+0.31`, `−0.31` or, where it is small, `+0.031`, `+0.0031`; a dash where there is no number."""
    if pd.isna(value):
        return "–"
    if abs(value) < 0.0005:
        return "0"
    digits = 2 + int(abs(value) < 0.1) + int(abs(value) < 0.01)
    return f"{value:+.{digits}f}".replace("-", "−")


def _replaced_in_words(events: pd.DataFrame) -> str:
    """Return `; 620 of 3,000 events replaced one by one`, or nothing where all are."""
    n_replaced = events["if_unremarkable"].count()
    return "" if n_replaced == len(events) else f"; {n_replaced:,} of {len(events):,} events replaced one by one"


def _count(number: int, word: str) -> str:
    """Return `1 stay`, `2 stays`."""
    return f"{number:,} {word}" + ("" if number == 1 else "s")


def _plain_number(value: object) -> str:
    """Return a number without needless digits, anything else as it is."""
    try:
        return f"{float(str(value)):.3g}"
    except ValueError:
        return str(value)


def _short_text(text: str, width: int = 46) -> str:
    """Return an event's text for one line: what, value, level; `Lactate · 5.2 mmol/L · far above range`."""
    first, *parts = str(text).split(" | ")
    kept = [part for part in parts if part.split(":")[0] not in LESS_SAID]
    kept = kept or [part for part in parts if part.startswith(("Test", "Comment"))][:1]
    said = [re.sub(r"^Lab: | \((Blood, |\d-)[^)]*\)", "", first)]
    said += [re.sub(r"^[A-Z]\w+: ", "", part) for part in kept]
    return _cut(" · ".join(said), width)


def name_inputs(preprocessor: train.ClinicalDataPreprocessor, input_dim: int = 774) -> pd.DataFrame:
    """Return the clinical name of every input: `input` ("event" or "static"), `column`, `part`, `name`.

    Single numbers of a text vector have no clinical meaning, and the names say so.

    >>> name_inputs(preprocessor)["name"][2]
    'event type: labevent'
    """
    parts = _event_parts(input_dim, preprocessor.item_history)
    n_text = parts["text"].stop - parts["text"].start
    names = [("type", f"event type: {name}") for name in EVENT_TYPES]
    names += [("text", f"event text, number {i + 1} of {n_text} (no meaning alone)") for i in range(n_text)]
    names.append(("time", "time to the final event"))
    if preprocessor.item_history:
        names += [("history", f"its item until then: {name.replace('_', ' ')}") for name in HISTORY]
    rows = [("event", column, part, name) for column, (part, name) in enumerate(names)]
    for column, (name, category) in enumerate(preprocessor.static_names):
        word = _static_word(name)
        rows.append(("static", column, name, word if category is None else f"{word}: {category}"))
    return pd.DataFrame(rows, columns=["input", "column", "part", "name"])


def map_features_to_clinical(
    position_features: Tensor | np.ndarray,
    feature_mapping: pd.DataFrame,
    pos: int,
) -> pd.DataFrame:
    """Sum (L, C) attributions of one stay's inputs at position `pos` by what the inputs mean -> part, attribution.

    `feature_mapping` is `name_inputs(preprocessor)`. Raise `InputError` for hidden units, which mean nothing clinical.

    >>> found = captum_analysis(model, sequences, static_features, attention_mask)
    >>> inputs = name_inputs(preprocessor, sequences.shape[2])
    >>> map_features_to_clinical(found.events[0], inputs, pos=2)["part"].tolist()
    ['type', 'text', 'time']
    """
    values = _to_numpy(position_features)
    inputs = pd.DataFrame(columns=["input", "part"])
    if isinstance(feature_mapping, pd.DataFrame):
        inputs = feature_mapping[feature_mapping["input"] == "event"]
    if values.ndim != 2 or values.shape[1] != len(inputs):
        raise InputError(
            "hidden units have no clinical meaning: attribute the inputs, found = captum_analysis(model, sequences, "
            "static_features, attention_mask), and call map_features_to_clinical(found.events[0], "
            "name_inputs(preprocessor), pos)."
        )
    table = pd.DataFrame({"part": inputs["part"].to_numpy(), "attribution": values[pos]})
    return table.groupby("part", sort=False)["attribution"].sum().reset_index()


class Stay(NamedTuple):
    """One stay of the tables, for the small analyses below; `stay_of(tables, icu_stay_id)` makes it.

    >>> Stay(pd.DataFrame({"hours_to_end": [2.0, 1.0]})).statics is None
    True
    """

    events: pd.DataFrame  # hours_to_end, event_type, event_text and, once attributed, attribution
    statics: pd.DataFrame | None = None


def stay_of(tables: dict[str, pd.DataFrame], icu_stay_id: int) -> Stay:
    """Return one stay out of what `run_explainability_analysis` returned.

    >>> stay_of(tables, 1).events["event_text"].iloc[0]
    'Lab: Lactate | Value: 9 mmol/L'
    """
    parts = [tables[name] for name in ("events", "statics")]
    events, statics = (part[part["icu_stay_id"] == icu_stay_id].reset_index(drop=True) for part in parts)
    if not len(events):
        raise InputError(f"icu_stay_id {icu_stay_id} is not among the stays analysed.")
    return Stay(events, statics)


def _to_numpy(values: Any) -> np.ndarray:
    """Return a tensor, wherever it is, or an array as float32 or float64 numbers."""
    if isinstance(values, Tensor):
        values = values.detach().float().cpu()
    return np.asarray(values, dtype=float)


def _pooling_weights(attention_weights: dict[str, Any]) -> np.ndarray:
    """Return (B, Hp, L) of a pass, or of what `train.load_attention_weights` read."""
    return _to_numpy(attention_weights["pooling_weights"])[:, :, 0]


def _real_events(attention_weights: dict[str, Any]) -> list[np.ndarray]:
    """Return the positions of the real events of each stay of a pass; padding has no output and no weight."""
    used = _pooling_weights(attention_weights).sum(1) > 0
    if "transformer_output" in attention_weights:
        used |= np.abs(_to_numpy(attention_weights["transformer_output"])).sum(2) > 0
    return [np.flatnonzero(row) for row in used]


def _weights_and_events(
    attention_weights: dict[str, Any],
    record: Stay | None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return, for each stay of a pass, its (Hp, L) pooling weights and the positions of its real events."""
    events = _real_events(attention_weights)
    for positions in events:
        if record is not None and len(positions) != len(record.events):
            raise InputError(
                f"the pass is over a stay of {len(positions)} events, the record is of one of {len(record.events)}: "
                "give the record of the stay that the model read."
            )
    return list(zip(_pooling_weights(attention_weights), events))


def _described(record: Stay | None, position: int) -> dict[str, Any]:
    """Return when and what the event at a position is, where the stay's record is known."""
    if record is None:
        return {}
    event = record.events.iloc[position]
    return {"hours_to_end": float(event["hours_to_end"])} | event[["event_type", "event_text"]].to_dict()


def analyze_critical_time_periods(
    attention_weights: dict[str, Any],
    threshold: float = 0.1,
    record: Stay | None = None,
    relative: bool = False,
) -> list[dict[str, Any]]:
    """List the events that a pooling head gives more than `threshold` of its weight, largest first.

    Weights of a stay of L events are about 1/L each: 0.1 is much in a stay of 500 events and nothing in one of five.
    With `relative` the threshold counts in multiples of 1/L. Return dicts of stay (index in the batch), head (1-based),
    position, importance (the weight), times_even_share (the weight times L) and interpretation; with a record (then the
    pass is over this one stay) also hours_to_end, event_type, event_text.

    >>> [period["position"] for period in analyze_critical_time_periods(attention_weights, threshold=0.5)]
    [0, 2]
    """
    rows = []
    for stay, (weights, events) in enumerate(_weights_and_events(attention_weights, record)):
        least = threshold / len(events) if relative else threshold
        for head, position in np.argwhere(weights > least):
            weight = float(weights[head, position])
            row = {
                "stay": stay,
                "head": int(head) + 1,
                "position": int(position),
                "importance": weight,
            }
            row["times_even_share"] = weight * len(events)
            row |= _described(record, position)
            rows.append(row | {"interpretation": _weight_in_words(row, len(events))})
    return sorted(rows, key=lambda row: -row["importance"])


def _weight_in_words(row: dict[str, Any], n_events: int) -> str:
    """Say what a pooling weight means: `Head 2 gives 41 % of its weight to event 3 of 12, 4.9 times an even share.`"""
    words = f"Head {row['head']} gives {100 * row['importance']:.0f} % of its weight to event {row['position'] + 1}"
    words += f" of {n_events}, {row['times_even_share']:.1f} times an even share"
    if "event_text" in row:
        words += f": {row['hours_to_end']:.1f} h before the end, {row['event_text']}"
    return words + "."


def analyze_feature_importance_over_time(
    attention_weights: dict[str, Any],
    record: Stay | None = None,
    n_windows: int = 10,
    top: int = 3,
) -> list[dict[str, Any]]:
    """List the events with the largest pooling weight of each head in each part of each stay.

    Parts are tenths of the stay's events or, with a record, clock windows before the end. Return dicts of stay, window,
    head, rank, position, importance, and with a record hours_to_end, event_type, event_text.

    >>> rows = analyze_feature_importance_over_time(attention_weights, n_windows=2, top=1)
    >>> [row["position"] for row in rows if row["stay"] == 0 and row["head"] == 1]
    [0, 2]
    """
    rows = []
    for stay, (weights, events) in enumerate(_weights_and_events(attention_weights, record)):
        parts = np.arange(len(events)) * n_windows // max(1, len(events)) + 1
        if record is not None:
            parts = _clock_window(record.events["hours_to_end"].to_numpy())
        for part in pd.unique(parts):
            inside = events[parts == part]
            for head, values in enumerate(weights[:, inside], start=1):
                for rank, place in enumerate(np.argsort(-values, kind="stable")[:top], start=1):
                    row = {
                        "stay": stay,
                        "window": part,
                        "head": head,
                        "rank": rank,
                        "position": int(inside[place]),
                    }
                    rows.append(row | {"importance": float(values[place])} | _described(record, inside[place]))
    return rows


def analyze_layer_attention_patterns(
    attention_weights: dict[str, Any],
    near: int = 5,
) -> list[dict[str, Any]]:
    """Measure, per stay and layer, how much events look at others within `near` positions and beyond.

    Return dicts of stay, layer (1-based), `attention_matrix` (L, L), the mean over heads without padding, and the mean
    weight within `near` (`local_attention`) and beyond (`global_attention`; NaN if there are none); the same per head
    in `head_matrices` (H, L, L), `head_local_attention`, `head_global_attention` (H,), and `head_local_share` of all
    weight beside `local_share_by_chance`. Maps read from a file are of equal bins of events: L is then their number.

    >>> [(row["layer"], row["attention_matrix"].shape) for row in analyze_layer_attention_patterns(attention_weights)]
    [(1, (4, 4)), (1, (2, 2))]
    """
    length, rows = _pooling_weights(attention_weights).shape[2], []
    for stay, events in enumerate(_real_events(attention_weights)):
        for layer, weights in enumerate(attention_weights["layer_attention_weights"], start=1):
            matrices = _to_numpy(weights[stay])
            spacing = length / matrices.shape[2]  # events in a bin; 1: not binned
            real = np.unique((events / spacing).astype(int))
            matrices = matrices[:, real][:, :, real]
            rows.append({"stay": stay, "layer": layer} | _local_and_global(matrices, real * spacing, near))
    return rows


def _local_and_global(matrices: np.ndarray, place: np.ndarray, near: int) -> dict[str, Any]:
    """Return what `analyze_layer_attention_patterns` says of one layer's (H, L, L) weights between these places."""
    is_near = np.abs(place[:, None] - place) <= near
    local = matrices[:, is_near].mean(1)
    beyond = matrices[:, ~is_near].mean(1) if (~is_near).any() else np.full(len(matrices), math.nan)
    return {
        "attention_matrix": matrices.mean(0),
        "local_attention": float(local.mean()),
        "global_attention": float(beyond.mean()),
        "head_matrices": matrices,
        "head_local_attention": local,
        "head_global_attention": beyond,
        "head_local_share": matrices[:, is_near].sum(1) / matrices.sum((1, 2)),
        "local_share_by_chance": float(is_near.mean()),
    }


def analyze_temporal_feature_attribution(
    attention_weights: dict[str, Any],
    feature_mapping: Stay,
) -> pd.DataFrame:
    """Return, per clock window of one stay, n_events, the share of each head's pooling weight and, where the stay is
    attributed, the signed sum of its attributions and the window's share of their absolute values.

    `feature_mapping` says what stands at each position: `stay_of(tables, icu_stay_id)`.

    >>> record = stay_of(tables, icu_stay_id)
    >>> table = analyze_temporal_feature_attribution(attention_weights, record)
    >>> table[["window", "n_events", "attribution"]].values.tolist()
    [['last 6 h', 2, 2.0], ['6 to 12 h', 1, -1.0], ['24 to 48 h', 1, 1.0]]
    """
    if not isinstance(feature_mapping, Stay):
        raise InputError(
            "attention weighs whole events, not features: give the stay that was read, as in "
            "analyze_temporal_feature_attribution(attention_weights, stay_of(tables, icu_stay_id))."
        )
    events = feature_mapping.events
    first = {"pooling_weights": attention_weights["pooling_weights"][:1]}
    pooling, inside = _weights_and_events(first, feature_mapping)[0]
    weights = pooling[:, inside].T  # (L, Hp)
    table = pd.DataFrame(
        weights,
        columns=[f"attention_head_{head}" for head in range(1, weights.shape[1] + 1)],
    )
    table.insert(0, "window", _windows_of(events))
    table.insert(1, "n_events", 1)
    if "attribution" in events:
        size = events["attribution"].abs().to_numpy()
        table["attribution"] = events["attribution"].to_numpy()
        table["share_of_attribution"] = size / size.sum()
    return table.groupby("window", observed=True).sum().reset_index()


def analyze_static_feature_attribution(
    attention_weights: dict[str, Any],
    static_features: Stay,
) -> pd.DataFrame:
    """Return the statics of one stay, largest first: feature, value, attribution, share of the stay's |attribution|.

    Static features pass by the attention, so no weight can speak of them: `static_features` is the attributed stay,
    `stay_of(tables, icu_stay_id)`.

    >>> analyze_static_feature_attribution(attention_weights, stay_of(tables, icu_stay_id))["feature"].tolist()
    ['age', 'sex']
    """
    statics = static_features.statics if isinstance(static_features, Stay) else None
    if statics is None or "attribution" not in static_features.events:
        raise InputError(
            "attention never reaches the static features: give the stay with its attributions, as in "
            "analyze_static_feature_attribution(attention_weights, stay_of(tables, icu_stay_id))."
        )
    table = statics[["feature", "value", "attribution"]]
    size = table["attribution"].abs()
    share = size / (size.sum() + static_features.events["attribution"].abs().sum())
    table = table.assign(share_of_attribution=share)
    return table.sort_values("share_of_attribution", ascending=False, ignore_index=True)


# ---------------------------------------------------------------------------------------------------------------------
# Verdict: is there anything to explain? Said before any score of the explanations
# ---------------------------------------------------------------------------------------------------------------------

SPREAD_FLOOR = 0.2  # standard deviation of the logits; below it all stays have the same risk, for whatever reason
UNSEEN_SHARE = 0.2  # of the events; beyond it a stay is read by a model that does not know its words


class _Finding(NamedTuple):
    """One sentence of the verdict; `passed` is False where a reader should stop, None where nothing is judged."""

    name: str
    sentence: str
    passed: bool | None = None
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan


def _discrimination(
    labels: np.ndarray,
    probabilities: np.ndarray,
    patients: np.ndarray,
    n_bootstrap: int,
    seed: int,
) -> list[_Finding]:
    """Say whether (n,) risks rank deaths above survivors, and whether as many died as predicted; NaN: unknown."""
    known = ~np.isnan(labels)
    died, n_known = int(np.nansum(labels)), int(known.sum())
    if not 0 < died < n_known:
        words = f"Outcomes known: {n_known} stays, {died} deaths. Whether the model discriminates here cannot be said."
        return [_Finding("discrimination", words)]
    metrics = train.evaluate_predictions(
        labels[known],
        probabilities[known],
        patients[known],
        n_bootstrap,
        seed,
    )
    auroc, slope = metrics["auroc"], metrics["calibration_slope"]
    low = auroc["value"] if auroc["low"] is None else auroc["low"]
    found = f"AUROC {train.figure_text(auroc)} on {n_known} stays, {died} deaths"
    words = f"This model discriminates: {found}."
    if low <= 0.5:
        words = f"This model does not discriminate: {found}. What follows explains noise."
    risk, rate = _percent(probabilities[known].mean()), _percent(died / n_known)
    calibration = f"Calibration: {risk} predicted on average, {rate} died; slope {train.figure_text(slope)}; "
    calibration += "1 is right, below it risks are too extreme."
    return [
        _Finding("discrimination", words, low > 0.5, auroc["value"], low, auroc["high"]),
        _Finding("calibration", calibration, None, slope["value"]),
    ]


def _spread_of(logits: np.ndarray) -> _Finding:
    """Say whether (n,) logits differ at all."""
    spread = float(np.std(logits))
    if spread < SPREAD_FLOOR and len(logits) > 2:
        words = f"Its predictions hardly differ between stays (standard deviation of the logits {spread:.3f})"
        return _Finding("spread", f"{words}: there is nothing to explain.", False, spread)
    words = f"Its predictions differ between stays (standard deviation of the logits {spread:.2f})."
    return _Finding("spread", words, True, spread)


def _likeness(unseen: np.ndarray, held_out: bool) -> list[_Finding]:
    """Say whose stays these are, and whether the model knows what happens in them; `unseen` (n_events,) bool."""
    whose = "These patients are the model's own held-out test patients."
    if not held_out:
        whose = "None of these patients is in the data that the model was made from: what follows holds for them only."
    share = float(np.mean(unseen))
    words = f"{100 * share:.0f} % of their events are of items that training never saw."
    holds = share <= UNSEEN_SHARE
    if not holds:
        words = f"These stays are not like those it was trained on: {words}"
    return [_Finding("patients", whose), _Finding("likeness", words, holds, share)]


def _leaking_items(
    items: np.ndarray,
    stay_of_event: np.ndarray,
    labels: np.ndarray,
) -> dict[str, float]:
    """Return item -> AUROC of its mere presence, for items (n_events,) that alone tell deaths from survivors.

    Nothing is judged with fewer than ten stays of either outcome; stays of unknown outcome do not count.
    """
    died = labels[stay_of_event]
    pairs = (
        pd.DataFrame({"stay": stay_of_event, "item": items, "died": died}).dropna().drop_duplicates(["stay", "item"])
    )
    n_deaths, n_known = np.nansum(labels), (~np.isnan(labels)).sum()
    if min(n_deaths, n_known - n_deaths) < train.TOO_FEW:
        return {}
    counts = pairs.groupby("item")["died"].agg(["sum", "count"])
    among_deaths = counts["sum"] / n_deaths
    among_survivors = (counts["count"] - counts["sum"]) / (n_known - n_deaths)
    auroc = 0.5 + 0.5 * (among_deaths - among_survivors).abs()
    return auroc[auroc > train.LEAK_AUROC].to_dict()


def _leaks_in_words(leaks: dict[str, float]) -> _Finding:
    if not leaks:
        return _Finding("single items", "No item alone tells the outcome of these stays.", True)
    worst = max(leaks, key=lambda item: leaks[item])
    words = f"One text alone tells the outcome: {worst} (AUROC {leaks[worst]:.2f} by its presence)"
    more = f", and {len(leaks) - 1} more" if len(leaks) > 1 else ""
    return _Finding(
        "single items",
        f"{words}{more}. It may be written because of the outcome.",
        False,
        leaks[worst],
    )


def _baseline_in_words(run: _Run) -> _Finding:
    """Say what the baseline of all attributions is, beside what is predicted and what happens."""
    checkpoint = run.checkpoint
    event, static = checkpoint.baseline["event"], checkpoint.baseline["static"]
    sequence = event.expand(1, int(np.median(run.table.lengths)), -1)
    device = next(checkpoint.model.parameters()).device
    with torch.no_grad():
        logit = float(checkpoint.model.logits(sequence.to(device), static[None].to(device)))
    risk = float(checkpoint.probabilities(np.array(logit)))
    risks = checkpoint.probabilities(run.logits)
    known = run.table.labels[~np.isnan(run.table.labels)]
    died = f", and {_percent(known.mean())} died" if len(known) else ""
    above = f"{(risks > risk).sum()} of {len(risks)} stays"
    words = (
        f"Pushes are counted from a stay whose events say nothing: risk {100 * risk:.2g} %, while these stays have "
        f"{_percent(risks.mean())} on average{died}. It is no patient: each of its events is the mean of all "
        f"training events, so that none stands out; {above} lie above it."
    )
    return _Finding("baseline", words, None, logit)


def _leaks_of(run: _Run) -> dict[str, float]:
    """Return the `_leaking_items` of all stays of a run."""
    items = np.array([item_of(text) for text in run.table.texts], dtype=object)[run.table.text]
    return _leaking_items(items, run.table.stay_of_event, run.table.labels)


def _verdict_table(run: _Run, leaks: dict[str, float], settings: ExplainSettings) -> pd.DataFrame:
    """Return the sentences to read before any explanation: name, sentence, passed, value, low, high."""
    patients = run.table.stays["patient_id"].to_numpy()
    risks = run.checkpoint.probabilities(run.logits)
    trained = run.checkpoint.settings  # its resamples give the interval that train.py says
    findings = _discrimination(run.table.labels, risks, patients, trained.n_bootstrap, trained.seed)
    findings.append(_spread_of(run.logits))
    findings += _likeness(run.is_new_item[run.table.text], run.held_out)
    findings.append(_leaks_in_words(leaks))
    findings.append(_baseline_in_words(run))
    return pd.DataFrame(findings).astype({"passed": object})


# ---------------------------------------------------------------------------------------------------------------------
# Tables: the same for the pictures, the report and the files
# ---------------------------------------------------------------------------------------------------------------------

HEAD_STAYS = 15  # whose attention is compared with untrained models'
OFF_STAYS = 10  # whose attention is switched off
TIME_SHUFFLES = 5
QUICK_LOOK = "A quick look: its figures come from fewer stays, checks and resamples than a full run's, and may differ."
EVENTS_LISTED = 10  # of a stay, in the report, on either side
KEPT_STAYS = 1000  # drawn at random: their tables stay in memory for summaries and pictures; the files have all stays


def _history_in_words(history: pd.DataFrame) -> list[str]:
    """Return how each number of `train.item_history` stood among its item's until then: `highest of 7`, or ""."""
    words = []
    for row in history[["value", "minimum", "maximum", "count"]].itertuples():
        extreme = {row.maximum: "highest", row.minimum: "lowest"}.get(row.value, "")
        words.append(f"{extreme} of {row.count}" if extreme and row.minimum < row.maximum else "")
    return words


def _describe_events(run: _Run, stay: int) -> pd.DataFrame:
    """Return a stay's events, one row each, in the order of the model's input."""
    table, rows = run.table, slice(run.table.offsets[stay], run.table.offsets[stay + 1])
    person = table.stays.loc[stay]
    texts = table.texts[table.text[rows]]
    minutes = table.minutes_since_intime[rows].astype(float)
    uses_history = run.checkpoint.preprocessor.item_history
    history = _history_in_words(train.item_history(table.take(np.array([stay])))) if uses_history else ""
    return pd.DataFrame(
        {
            "icu_stay_id": person["icu_stay_id"],
            "patient_id": person["patient_id"],
            "label": person[LABEL],
            "event": np.arange(len(texts)),
            "event_time": person["icu_intime"] + pd.to_timedelta(np.round(minutes * 60), unit="s"),
            "hours_since_admission": minutes / 60,
            "hours_to_end": table.minutes_to_end[rows] / 60,
            "event_type": np.array([*EVENT_TYPES, "unknown"], dtype=object)[table.event_type[rows]],
            "event_text": texts,
            "item": [item_of(text) for text in texts],
            "value": [train.parse_value(text)[1] for text in texts],
            "in_history": history,
            "is_abnormal": [_is_abnormal(text) for text in texts],
            "is_new_item": run.is_new_item[table.text[rows]],
        }
    )


class _Explained(NamedTuple):
    """All that was computed of one stay."""

    stay: dict[str, Any]
    events: pd.DataFrame
    statics: pd.DataFrame
    groups: pd.DataFrame
    layers: pd.DataFrame
    attention: _Attention

    def without_maps(self) -> _Explained:
        """Return all but the layers' maps: half a megabyte that only the pictures of a stay shown in full need."""
        return self._replace(attention=self.attention._replace(maps=np.empty(0)))


def _explain_stay(
    run: _Run,
    stay: int,
    settings: ExplainSettings,
    shown: str = "",
    layers: bool = True,
) -> _Explained:
    """Return every view of one stay; `shown` is why it is shown in full (then also Shapley values), or ""."""
    model, baseline = run.checkpoint.model, run.checkpoint.baseline
    sequence, static = run.inputs(stay)
    events = _describe_events(run, stay)
    ids = events.loc[0, ["icu_stay_id", "patient_id"]].to_dict()
    found = captum_analysis(model, sequence, static, baseline=baseline, n_steps=settings.ig_steps)
    attention = _attend(model, sequence, static)
    values = found.events[0].double().cpu().numpy()  # (L, C)
    ablation = ablation_analysis(
        model,
        sequence,
        static,
        baseline=baseline,
        event_groups=_event_groups(events),
        static_names=[column for column, _ in run.checkpoint.preprocessor.static_names],
        shapley_samples=settings.shapley_orders if shown else 0,
        seed=settings.seed,
        which=_events_to_replace(values.sum(1), settings.max_replacements),
    )
    events = _add_scores(events, values, ablation.if_unremarkable[0], attention, run.parts)
    statics = _static_table(run, stay, found, ablation.groups)
    by_layer = _layer_table(run, stay, settings) if layers else pd.DataFrame()
    row = ids | {
        "label": events["label"].iloc[0],
        "probability": float(run.checkpoint.probabilities(found.logits)[0]),
        "logit": found.logits[0],
        "baseline_logit": found.baseline_logits[0],
        "logit_without_time": _logit_without_time(run, stay, settings.seed),
        "gap_error": found.gap_errors[0],
        "n_steps": found.n_steps[0],
        "complete": bool(found.complete[0]),
        "n_events": len(events),
        "n_replaced": events["if_unremarkable"].count(),
        "why_shown": shown,
    }
    events["complete"] = row["complete"]
    groups = _group_table(events, statics, ablation.groups)
    statics, groups, by_layer = (table.assign(**ids) for table in (statics, groups, by_layer))
    return _Explained(row, events, statics, groups, by_layer, attention)


def _events_to_replace(push: np.ndarray, most: int) -> np.ndarray:
    """Return which events of a stay are replaced one by one: the strongest by push (L,), and those that are listed."""
    order = np.argsort(push)
    strongest = np.argsort(-np.abs(push))[: most or None]
    return np.unique(np.concatenate([strongest, order[:EVENTS_LISTED], order[-EVENTS_LISTED:]]))


def _event_groups(events: pd.DataFrame) -> dict[str, np.ndarray]:
    """Return how events are grouped: kind -> (L,) names."""
    return {
        "event type": events["event_type"].to_numpy(),
        "clock window": _clock_window(events["hours_to_end"].to_numpy()),
    }


@torch.no_grad()
def _logit_without_time(run: _Run, stay: int, seed: int) -> float:
    """Return the mean logit of a stay whose events are dealt at random to its places and times."""
    sequence, static = run.inputs(stay)
    generator = torch.Generator().manual_seed(seed)
    orders = torch.stack([torch.randperm(sequence.shape[1], generator=generator) for _ in range(TIME_SHUFFLES)])
    dealt = sequence[0, orders.to(sequence.device)]  # (TIME_SHUFFLES, L, C)
    dealt[:, :, run.parts["time"]] = sequence[:, :, run.parts["time"]]
    parts = dealt.split(max(1, FORWARD_EVENTS // sequence.shape[1]))
    logits = [run.checkpoint.model.logits(part, static.expand(len(part), -1)) for part in parts]
    return float(torch.cat(logits).double().mean())


def _layer_table(run: _Run, stay: int, settings: ExplainSettings) -> pd.DataFrame:
    """Return layer, event, attribution, gap_error and complete of one stay."""
    parts = []
    for row in layer_analysis(
        run.checkpoint.model,
        *run.inputs(stay),
        baseline=run.checkpoint.baseline,
        n_steps=settings.ig_steps,
    ):
        attribution = row["attribution"][0]
        table = pd.DataFrame({"event": np.arange(len(attribution)), "attribution": attribution})
        parts.append(
            table.assign(
                layer=row["layer"],
                gap_error=row["gap_error"][0],
                complete=row["complete"][0],
            )
        )
    return pd.concat(parts, ignore_index=True)


def _add_scores(
    events: pd.DataFrame,
    values: np.ndarray,
    if_unremarkable: np.ndarray,
    attention: _Attention,
    parts: dict[str, slice],
) -> pd.DataFrame:
    """Return the table of a stay's events with every score of every event; values (L, C) are attributions."""
    scores = {f"attribution_{name}": values[:, columns].sum(1) for name, columns in parts.items()}
    heads = {f"attention_head_{head}": weights for head, weights in enumerate(attention.pooling, start=1)}
    return events.assign(
        attribution=values.sum(1),
        **scores,
        if_unremarkable=if_unremarkable,
        attention=attention.pooling.mean(0),
        **heads,
        rollout=attention.rollout,
    )


def _static_table(run: _Run, stay: int, found: Attribution, groups: pd.DataFrame) -> pd.DataFrame:
    """Return feature, value, attribution, ablation: one row per static column."""
    sums = _sum_over_columns(
        found.statics[0].double().cpu().numpy(),
        run.checkpoint.preprocessor.static_names,
    )
    ablation = groups[groups["kind"] == "static"].set_index("group")["ablation"]
    values = run.table.take(np.array([stay])).static_columns.loc[0, list(sums)]
    return pd.DataFrame(
        {
            "feature": [_static_word(column) for column in sums],
            "value": ["Unknown" if pd.isna(value) else str(value) for value in values],
            "attribution": list(sums.values()),
            "ablation": ablation[list(sums)].to_numpy(),
        }
    )


def _group_table(events: pd.DataFrame, statics: pd.DataFrame, groups: pd.DataFrame) -> pd.DataFrame:
    """Return the ablated groups with the attribution that they sum to."""
    sums: dict[tuple[str, str], float] = {}
    for kind, names in _event_groups(events).items():
        for name, value in events["attribution"].groupby(names).sum().items():
            sums[kind, name] = value
    for name, value in zip(statics["feature"], statics["attribution"]):
        sums["static", name] = value
    is_static = groups["kind"] == "static"
    groups = groups.assign(group=groups["group"].where(~is_static, groups["group"].map(_static_word)))
    return groups.assign(attribution=[sums[key] for key in zip(groups["kind"], groups["group"])])


def _head_properties(events: pd.DataFrame) -> dict[str, np.ndarray]:
    """Return what a head's weights are compared with, (L,) each."""
    types = {f"event type: {name}": (events["event_type"] == name).to_numpy(float) for name in EVENT_TYPES}
    return {
        "recency": -events["hours_to_end"].to_numpy(float),
        "abnormal flag": events["is_abnormal"].to_numpy(float),
        "|attribution|": np.abs(events["attribution"].to_numpy(float)),
        **types,
    }


def _head_correlations(attention: _Attention, properties: dict[str, np.ndarray]) -> np.ndarray:
    """Return (all heads, properties) rank correlations over a stay's events; the pooling heads come last."""
    of_layers = attention.received.reshape(-1, attention.received.shape[2])
    weights = np.concatenate([of_layers, attention.pooling])
    seen = ~np.isnan(weights).any(0)
    return _rank_correlation(weights[:, seen], np.stack(list(properties.values()))[:, seen])


def _untrained_correlations(
    run: _Run,
    explained: dict[int, _Explained],
    settings: ExplainSettings,
) -> np.ndarray:
    """Return (models, heads, properties): mean correlations of untrained models, with their own attributions."""
    means, baseline = [], run.checkpoint.baseline
    for number in range(settings.untrained_models):
        model = _untrained_like(run.checkpoint.model, settings.seed + 1000 + number)
        found = []
        for stay, of_stay in explained.items():
            sequence, static = run.inputs(stay)
            own = _event_totals(model, sequence, static, baseline, FEW_STEPS)
            properties = _head_properties(of_stay.events.assign(attribution=own))
            found.append(_head_correlations(_attend(model, sequence, static), properties))
        means.append(_nan_mean(np.stack(found)))
    return np.stack(means)


def _nan_mean(values: np.ndarray) -> np.ndarray:
    """Return the mean over the first axis without NaN; NaN where there is nothing else, and no warning."""
    count = (~np.isnan(values)).sum(0)
    return np.where(count, np.nansum(values, axis=0) / np.maximum(count, 1), np.nan)


HEAD_COLUMNS = (
    "layer",
    "head",
    "property",
    "correlation",
    "low",
    "high",
    "null_99",
    "effect",
    "has_role",
    "n_stays",
)


def _head_names(model: ClinicalTransformer) -> list[tuple[str, int]]:
    """Return (layer, head), counted from 1, of all heads; the pooling heads come last."""
    n_layers, n_heads = len(model.transformer_encoder), model.architecture["n_heads"]
    names = [(f"layer {layer + 1}", head + 1) for layer in range(n_layers) for head in range(n_heads)]
    return names + [("pooling", head + 1) for head in range(model.architecture["n_pooling_heads"])]


@torch.no_grad()
def _logits_without(
    model: ClinicalTransformer,
    dataset: train.ClinicalSequenceDataset,
    stays: np.ndarray,
    switched: Sequence[tuple[nn.Linear, slice]] = (),
) -> np.ndarray:
    """Return the logits of stays while these inputs of these layers count as 0; the weights are put back."""
    saved = [linear.weight[:, columns].clone() for linear, columns in switched]
    for linear, columns in switched:
        linear.weight[:, columns] = 0
    logits = np.zeros(len(stays))
    batches = train.plan_batches(dataset.lengths[stays], len(stays), FORWARD_EVENTS)
    device = next(model.parameters()).device
    for places, batch in zip(
        batches,
        train.packed_batches(dataset, [stays[part] for part in batches], device),
    ):
        found, _ = model.score_packed(batch.events, batch.static_features, batch.layout)
        logits[places] = found.squeeze(1).double().cpu().numpy()
    for (linear, columns), weights in zip(switched, saved):
        linear.weight[:, columns] = weights
    return logits


def _head_effects(run: _Run, stays: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return how far logits move without each head, (heads, stays), and without all attention of layers, (stays,)."""
    model = run.checkpoint.model
    switches: list[tuple[nn.Linear, slice]] = []
    layers: list[Any] = [layer.attention_output for layer in model.transformer_encoder]
    kinds = [(linear, model.architecture["n_heads"]) for linear in layers]
    for linear, n_heads in [
        *kinds,
        (model.attention_pooling.output, model.architecture["n_pooling_heads"]),
    ]:
        width = linear.in_features // n_heads
        switches += [(linear, slice(head * width, (head + 1) * width)) for head in range(n_heads)]
    logits = functools.partial(_logits_without, model, run.dataset, np.array(stays))
    whole = logits()
    moves = [np.abs(logits([switch]) - whole) for switch in switches]
    return np.stack(moves), np.abs(logits([(linear, slice(None)) for linear in layers]) - whole)


def _head_table(
    run: _Run,
    explained: dict[int, _Explained],
    effects: np.ndarray,
    settings: ExplainSettings,
) -> pd.DataFrame:
    """Return what each head's weights go with, measured against untrained models; effects (heads,) of switching it off.

    A head has a role where the correlation lies beyond the untrained models' and the head moves the logit beyond FLOOR.
    """
    usable = {stay: found for stay, found in explained.items() if len(found.events) >= MIN_EVENTS}
    if not usable:
        return pd.DataFrame(columns=HEAD_COLUMNS)
    properties = list(_head_properties(next(iter(usable.values())).events))
    measured = [_head_correlations(found.attention, _head_properties(found.events)) for found in usable.values()]
    by_head = np.stack(measured, axis=2)  # (heads, properties, stays)
    patients = np.array([found.stay["patient_id"] for found in usable.values()])
    some = dict(list(usable.items())[: 4 if settings.quick else HEAD_STAYS])
    null = np.abs(_untrained_correlations(run, some, settings))  # (models, heads, properties)
    names = _head_names(run.checkpoint.model)
    is_pooling = np.array([layer == "pooling" for layer, _ in names])
    rows = []
    for number, (layer, head) in enumerate(names):
        alike = null[:, is_pooling == is_pooling[number]]
        for column, name in enumerate(properties):
            values = alike[:, :, column][~np.isnan(alike[:, :, column])]
            limit = float(np.quantile(values, 0.99)) if len(values) else math.nan
            found = _bootstrap(by_head[number, column], patients, settings.n_bootstrap, settings.seed)
            low, high, effect = found["low"], found["high"], float(effects[number])
            has_role = (low > limit or high < -limit) and effect > FLOOR
            rows.append((layer, head, name, found["value"], low, high, limit, effect, has_role, found["n"]))
    return pd.DataFrame(rows, columns=HEAD_COLUMNS)


def _means_by(
    table: pd.DataFrame,
    keys: str | list[str],
    value: str,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Return `_bootstrap` of `value` in each group -> mean, low, high, n (rows), n_patients; one row per group."""
    found = {}
    for name, part in table.groupby(keys, observed=True):
        found[name] = _bootstrap(
            part[value].to_numpy(),
            part["patient_id"].to_numpy(),
            n_bootstrap,
            seed,
        )
    columns = ["value", "low", "high", "n", "n_patients"]
    return pd.DataFrame(list(found.values()), list(found), columns).rename(columns={"value": "mean"})


def _windows_of(events: pd.DataFrame) -> pd.Series:
    """Return the clock window of each event, as categories from the last hours back."""
    windows = _clock_window(events["hours_to_end"].to_numpy())
    return pd.Series(pd.Categorical(windows, CLOCK_WINDOWS, ordered=True))


def _stay_shares(events: pd.DataFrame, bins: pd.Series, column: str) -> pd.DataFrame:
    """Return (stays, bins): a stay's shares of its total |column| by bin; bins (n events,) are categories."""
    keys = [events["patient_id"], events["icu_stay_id"], bins.to_numpy()]
    table = events[column].abs().groupby(keys).sum().unstack(fill_value=0)
    table = table.reindex(columns=bins.cat.categories, fill_value=0)
    return table.div(table.sum(axis=1).replace(0, np.nan), axis=0)


def _column_means(shares: pd.DataFrame, n_bootstrap: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Return mean, low, high of each column over stays, 95 % interval over patients."""
    patients = shares.index.get_level_values("patient_id").to_numpy()
    found = [_bootstrap(shares[name].to_numpy(), patients, n_bootstrap, seed) for name in shares]
    return pd.DataFrame(found, index=shares.columns).rename(columns={"value": "mean"})


def _query_similarity_table(
    explained: dict[int, _Explained],
    settings: ExplainSettings,
) -> pd.DataFrame:
    """Return how near each pooling head's query is to the keys of each event type, against the mean of the stay."""
    parts = []
    for found in explained.values():
        scores = found.attention.scores - found.attention.scores.mean(1, keepdims=True)  # (Hp, L)
        for head, values in enumerate(scores, start=1):
            parts.append(found.events[["patient_id", "event_type"]].assign(head=head, similarity=values))
    found = _means_by(
        pd.concat(parts),
        ["head", "event_type"],
        "similarity",
        settings.n_bootstrap,
        settings.seed,
    )
    found.index = pd.MultiIndex.from_tuples(list(found.index), names=["head", "event_type"])
    return found.reset_index().rename(columns={"mean": "similarity", "n": "n_events"})


def _window_table(events: pd.DataFrame, settings: ExplainSettings) -> pd.DataFrame:
    """Return each clock window's share in a stay's |attribution|, mean over stays, and the sentence that says so."""
    windows = _windows_of(events)
    of_events = _stay_shares(events.assign(one=1.0), windows, "one")
    shares = _column_means(
        _stay_shares(events, windows, "attribution"),
        settings.n_bootstrap,
        settings.seed,
    )
    table = shares.rename(columns={"mean": "share"})[["share", "low", "high"]]
    table = table.assign(share_of_events=of_events.mean(), n_stays=(of_events > 0).sum())
    table = table[table["n_stays"] > 0].rename_axis("window").reset_index()
    return table.assign(sentence=[_window_in_words(row) for row in table.itertuples()])


def _window_in_words(row: Any) -> str:
    """Say how much of the push lies in a window: `Events in the last 6 h carry 17 % [13, 21] of all push; ...`"""
    interval = "" if math.isnan(row.low) else f" [{100 * row.low:.0f}, {100 * row.high:.0f}]"
    where = f"in the {row.window}" if row.window.startswith("last") else f"{row.window} before the end"
    words = f"Events {where} carry {100 * row.share:.0f} %{interval} of all push; "
    return f"{words}they are {100 * row.share_of_events:.0f} % of the events."


def _trajectory_table(run: _Run, stay: int, most: int = 20) -> pd.DataFrame:
    """Return the risk of one stay at up to `most` hours, each from what was known by then (`train.known_at`)."""
    table = run.table.take(np.array([stay]))
    last = float(table.minutes_since_intime.max()) / 60
    then = {hours: train.known_at(table, hours) for hours in np.linspace(last / most, last, most).tolist()}
    then = {hours: known for hours, known in then.items() if len(known.stays)}
    found = pd.DataFrame({"hours_since_admission": list(then), "n_events": 0, "probability": math.nan})
    if then:
        joined = train.stacked(list(then.values()))
        dataset = train.ClinicalSequenceDataset(joined, run.checkpoint.preprocessor, run.vectors)
        logits = _logits_without(run.checkpoint.model, dataset, np.arange(len(then)))
        found = found.assign(
            n_events=joined.lengths,
            probability=run.checkpoint.probabilities(logits),
        )
    return found.assign(icu_stay_id=run.table.stays["icu_stay_id"][stay])


def _attention_of(found: _Explained) -> dict[str, Any]:
    """Return what the attention pictures of one stay need."""
    return {
        "icu_stay_id": found.stay["icu_stay_id"],
        "layer_maps": found.attention.maps,
        "pooling": found.attention.pooling,
        "hours": found.events["hours_to_end"].to_numpy(),
        "texts": found.events["event_text"].tolist(),
    }


def _use_of_time(stays: pd.DataFrame, settings: ExplainSettings) -> _Finding:
    """Say how far the model's logits are from those of a model that does not know when things happened."""
    moved = (stays["logit"] - stays["logit_without_time"]).abs().to_numpy()
    found = _bootstrap(moved, stays["patient_id"].to_numpy(), settings.n_bootstrap, settings.seed)
    words = f"With its events shuffled over its times, a stay's logit moves by {TWO} on average".format(**found)
    words = words.replace(" [nan, nan]", "")
    uses = found["value"] > FLOOR
    words += ": the model uses when things happened." if uses else ": this model hardly uses when things happened."
    return _Finding("time", words, None, found["value"], found["low"], found["high"])


def _use_of_layer_attention(moved: np.ndarray, n_layers: int) -> _Finding:
    """Say what the attention of so many layers is worth, from (stays,) moves of the logit without it."""
    mean = float(moved.mean())
    if not n_layers:
        return _Finding("layer attention", "The model has no layers: events meet in the pooling alone.", None, 0.0)
    words = f"Without the layers' attention, a stay's logit moves by {mean:.2f} on average"
    words += "." if mean > FLOOR else ": its maps say next to nothing about the predictions."
    return _Finding("layer attention", words, None, mean)


class _Work:
    """A progress bar of the whole run, with the time left; what a stay costs grows with its length."""

    def __init__(
        self,
        run: _Run,
        chosen: Sequence[int],
        checked: Sequence[int],
        settings: ExplainSettings,
    ) -> None:
        lengths = run.table.lengths
        self.explaining = lengths * (50 + np.minimum(lengths, settings.max_replacements or lengths.max()))
        self.checking = lengths * 250  # passes over an event, about
        total = int(self.explaining[list(chosen)].sum() + self.checking[list(checked)].sum())
        self.bar = train.Progress(total=total, desc="explain", unit=" passes", unit_scale=True)

    def explained(self, stay: int) -> None:
        self.bar.update(int(self.explaining[stay]))

    def checked(self, stay: int) -> None:
        self.bar.update(int(self.checking[stay]))


def _some_of(stays: Sequence[int], most: int, seed: int) -> list[int]:
    """Return at most so many of the stays, drawn at random, in order."""
    return sorted(np.random.default_rng(seed).permutation(list(stays))[:most].tolist())


def _explain(
    run: _Run,
    settings: ExplainSettings,
    write: Callable[[_Explained], None] = lambda found: None,
) -> dict[str, Any]:
    """Return the tables of a run, as the report and the pictures take them; `write` is called with every stay.

    With more than `KEPT_STAYS` all tables but `stays` are of so many of them.
    """
    chosen, why = _choose_stays(run, settings.stays, settings.max_stays, settings.seed)
    checked = _some_of(chosen, settings.checked_stays, settings.seed)
    others = [stay for stay in chosen if stay not in why]
    with_layers = {*why, *_some_of(others, max(0, settings.layer_stays - len(why)), settings.seed)}
    whole = f"{len(run.table.stays)} stays that the model has not seen"
    logger.info(f"Explaining  {len(chosen)} of {whole}, {len(why)} of them in full")
    kept = {*chosen[:1], *checked, *with_layers, *_some_of(chosen, KEPT_STAYS, settings.seed)}
    if len(kept) < len(chosen):
        logger.info(f"            summaries and pictures are of {len(kept):,} of them, drawn at random")
    leaks, work = _leaks_of(run), _Work(run, chosen, checked, settings)
    explained, rows = {}, []
    for stay in chosen:
        found = _explain_stay(run, stay, settings, why.get(stay, ""), stay in with_layers)
        found.events["tells_outcome"] = found.events["item"].isin(leaks)
        write(found)
        rows.append(found.stay)
        if stay in kept:
            explained[stay] = found if stay in [*why, chosen[0]] else found.without_maps()
        work.explained(stay)
    tables = _joined_tables(explained)
    risks = run.checkpoint.probabilities(run.logits)
    percentiles = [100 * float((risks <= risks[stay]).mean()) for stay in chosen]
    tables["stays"] = pd.DataFrame(rows).assign(risk_percentile=percentiles)
    criteria, tables["curves"] = _check_stays(run, tables["events"], checked, settings, work.checked)
    work.bar.close()
    effects, of_layers = _head_effects(run, _some_of(chosen, OFF_STAYS, settings.seed))
    tables["heads"] = _head_table(run, explained, effects.mean(1), settings)
    tables["query_similarity"] = _query_similarity_table(explained, settings)
    tables["windows"] = _window_table(tables["events"], settings)
    shown = [_trajectory_table(run, stay) for stay in why]
    tables["trajectory"] = pd.concat(shown, ignore_index=True) if shown else pd.DataFrame()
    tables |= _findings(
        run,
        {stay: explained[stay].events for stay in why},
        tables["events"],
        settings,
    )
    completeness = _completeness_criterion(tables["stays"], settings)
    tables["faithfulness"] = pd.DataFrame([completeness, *criteria])
    more = [
        _use_of_time(tables["stays"], settings),
        _use_of_layer_attention(of_layers, len(run.checkpoint.model.transformer_encoder)),
    ]
    if settings.quick:
        more.append(_Finding("quick", QUICK_LOOK))
    tables["verdict"] = pd.concat(
        [_verdict_table(run, leaks, settings), pd.DataFrame(more)],
        ignore_index=True,
    )
    tables["attentions"] = {found.stay["icu_stay_id"]: _attention_of(found) for found in _of_interest(explained, why)}
    highest = tables["stays"]["icu_stay_id"][tables["stays"]["probability"].idxmax()]
    tables["attention"] = tables["attentions"].get(highest, next(iter(tables["attentions"].values())))
    return tables


def _of_interest(explained: dict[int, _Explained], why: dict[int, str]) -> list[_Explained]:
    """Return what was found of the stays shown in full, or of the first if there are none."""
    return [explained[stay] for stay in why or list(explained)[:1]]


def _joined_tables(explained: dict[int, _Explained]) -> dict[str, Any]:
    """Return the tables of all stays as one each."""
    tables: dict[str, Any] = {}
    for name in ("events", "statics", "groups", "layers"):
        parts = [getattr(found, name) for found in explained.values()]
        tables[name] = pd.concat(
            [part for part in parts if len(part)] or parts[:1],
            ignore_index=True,
        )
    return tables


# ---------------------------------------------------------------------------------------------------------------------
# Findings: items, organ systems, and the events that decide
# ---------------------------------------------------------------------------------------------------------------------
DECISIVE_COLUMNS = [
    "icu_stay_id",
    "threshold",
    "probability",
    "probability_without",
    "event",
    "event_text",
]
MOST_DECISIVE = 64  # events replaced at most before the search for a changed decision is given up


def _important_items(events: pd.DataFrame, n_items: int) -> tuple[list[str], int]:
    """Return the items of the largest mean |push| among those that enough patients have, and how many that is."""
    sizes = events.assign(size=events["attribution"].abs()).groupby("item")
    table = sizes.agg(size=("size", "mean"), n_patients=("patient_id", "nunique"))
    least = min(
        max(3, 0.05 * events["patient_id"].nunique()),
        table["n_patients"].max(),
    )  # one patient is no finding
    common = table[table["n_patients"] >= least]
    return common["size"].nlargest(n_items).index.tolist(), math.ceil(least)


def _item_table(events: pd.DataFrame, n_items: int = 20) -> pd.DataFrame:
    """Return the items that matter most: item, n_events, n_patients, push (mean, logit), size (mean |push|), n_values.

    `rho` is the rank correlation of the value and the push over the item's events that have a value (NaN below 10), and
    `sentence` says it in words.
    """
    rows = []
    for item in _important_items(events, n_items)[0]:
        part = events[events["item"] == item]
        known = part.dropna(subset=["value"])
        rho = math.nan
        if len(known) >= 10 and known["value"].nunique() > 2:
            rho = float(_rank_correlation(known["value"].to_numpy(), known["attribution"].to_numpy())[0, 0])
        push = part["attribution"]
        row = {
            "item": item,
            "n_events": len(part),
            "n_patients": part["patient_id"].nunique(),
            "push": push.mean(),
            "size": push.abs().mean(),
            "rho": rho,
            "n_values": len(known),
            "tells_outcome": bool(part.get("tells_outcome", pd.Series(False)).any()),
        }
        rows.append(row | {"sentence": _item_in_words(row, push.max() > 0)})
    return pd.DataFrame(rows)


def _item_in_words(row: dict[str, Any], towards_death: bool) -> str:
    """Say which values of an item push: `Lab: Lactate pushes towards death when high (rho 0.87, n 40).`"""
    item, rho, n_values = row["item"], row["rho"], row["n_values"]
    direction = "towards" if row["push"] > 0 else "away from"
    if math.isnan(rho):
        few = f"; too few values to say whether high or low ones do (n {n_values})" if n_values else ""
        return f"{item} pushes {direction} death, {_signed(row['push'])} on average{few}."
    where = f"(rho {rho:.2f}, n {n_values})"
    if abs(rho) < 0.3:
        return f"{item} pushes {direction} death, hardly depending on its value {where}."
    end = "high" if rho > 0 else "low"
    if not towards_death:  # all of its events push away
        return f"{item} pushes away from death, least when {end} {where}."
    return f"{item} pushes towards death when {end} {where}."


def _level_table(events: pd.DataFrame, items: Sequence[str]) -> pd.DataFrame:
    """Return the mean push of each item at each level that its texts name: item, level, push, n_events, n_patients."""
    levels = events["event_text"].str.extract(r"\| Level: ([^|]+)", expand=False).str.strip()
    known = events.assign(level=levels)[levels.notna() & events["item"].isin(list(items))]
    columns = {
        "push": ("attribution", "mean"),
        "n_events": ("event", "size"),
        "n_patients": ("patient_id", "nunique"),
    }
    return known.groupby(["item", "level"]).agg(**columns).reset_index()


def _system_table(events: pd.DataFrame) -> pd.DataFrame:
    """Return the total push of each organ system in each stay: icu_stay_id, patient_id, system, push, n_events."""
    items = events["item"].unique()
    systems = events["item"].map({item: _organ_system(item) for item in items})
    parts = events.assign(system=systems).groupby(["icu_stay_id", "patient_id", "system"])
    return parts.agg(push=("attribution", "sum"), n_events=("event", "size")).reset_index()


def _decisive_events(run: _Run, stay: int, events: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Find the smallest set of a stay's events without which its risk would lie on the other side of the threshold.

    Events are replaced by the mean event, the most attributed to the present side first, until the decision changes;
    then each is given back that the change does not need. Return a row per event of the set: icu_stay_id, threshold,
    probability, probability_without (of the whole set), event, event_text; none where no set of 64 events is enough.
    """
    model, baseline = run.checkpoint.model, run.checkpoint.baseline
    sequence, static = run.inputs(stay)

    def risk_without(sets: list[np.ndarray]) -> np.ndarray:
        keep = np.ones((len(sets), len(events)), bool)
        for row, taken in zip(keep, sets):
            row[taken] = False
        return run.checkpoint.probabilities(_replaced_logits(model, sequence, static, keep, baseline))

    risk = risk_without([np.array([], int)])[0]
    side = 1 if risk >= threshold else -1
    push = side * events["attribution"].to_numpy(float)
    order = np.argsort(-push, kind="stable")[: min(MOST_DECISIVE, int((push > 0).sum()))]
    risks = risk_without([order[:count] for count in range(1, len(order) + 1)])
    changed = np.flatnonzero((risks >= threshold) != (risk >= threshold))
    if not len(changed):
        return pd.DataFrame(columns=DECISIVE_COLUMNS)
    chosen = order[: changed[0] + 1]
    for event in chosen[::-1]:
        fewer = chosen[chosen != event]
        if (risk_without([fewer])[0] >= threshold) != (risk >= threshold):
            chosen = fewer
    found = events.iloc[np.sort(chosen)].assign(threshold=threshold, probability=risk)
    return found.assign(probability_without=risk_without([chosen])[0])[DECISIVE_COLUMNS]


def _findings(
    run: _Run,
    shown: dict[int, pd.DataFrame],
    events: pd.DataFrame,
    settings: ExplainSettings,
) -> dict[str, pd.DataFrame]:
    """Return the tables items, levels, systems and decisive; `shown` are the events of the stays shown in full."""
    items = _item_table(events)
    decisive = [_decisive_events(run, stay, own, settings.decision_threshold) for stay, own in shown.items()]
    return {
        "items": items,
        "levels": _level_table(events, items["item"]),
        "systems": _system_table(events),
        "decisive": pd.concat(decisive, ignore_index=True) if decisive else pd.DataFrame(columns=DECISIVE_COLUMNS),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Draw: functions take tables and return a Figure; towards death is vermillion and right or up, away from it blue
# ---------------------------------------------------------------------------------------------------------------------
Tables = dict[str, Any]

DISCLAIMER = "explains this model, not causes of death"
TO_END = "hours before the final event or observation limit"
LOGIT = "logit (right: towards death)"
TYPE_WORDS = dict(zip(EVENT_TYPES, ("Prescription", "Procedure", "Lab", "Culture", "IV ingredient")))
PART_WORDS = {
    "attribution_text": "text",
    "attribution_history": "history",
    "attribution_type": "type",
    "attribution_time": "time",
}
SIGNED = LinearSegmentedColormap.from_list("signed", [BLUE, "#ffffff", VERMILLION])
SHARES = LinearSegmentedColormap.from_list(
    "shares",
    ["#003f38", "#ffffff", "#5b3000"],
)  # below and above an even share
OVER_TIME = {
    "attention": "pooling attention",
    "rollout": "attention rollout",
    "attribution": "push",
    "if_unremarkable": "if unremarkable",
}
HEAD_COLOURS = (BLUE, ORANGE, GREEN, VERMILLION, "#CC79A7", "#56B4E9", "#000000", GREY)
MARKERS = "osD^vPX*"


def _for_plot(text: object, width: int = 46, shorten: Callable[[Any, int], str] = _short_text) -> str:
    """Return a text shortened, and without what Matplotlib would read as mathematics."""
    return shorten(text, width).replace("$", r"\$")


def _shown_stay(stays: pd.DataFrame) -> int:
    """Return the stay drawn where there is room for one: that of the highest risk."""
    return stays.loc[stays["probability"].idxmax(), "icu_stay_id"]


def _page(question: str, caption: str, height: float) -> Figure:
    """Return a page-wide figure with its question, caption and the line that none of them goes without."""
    return new_figure(question, f"{caption} · {DISCLAIMER}" if caption else DISCLAIMER, height)


def _bands(figure: Any, heights: Sequence[float]) -> list[Any]:
    """Return subfigures one below the other."""
    return list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])


def _error_dots(
    axes: Axes,
    table: pd.DataFrame,
    at: np.ndarray,
    color: Any,
    marker: str = "o",
    label: str = "",
    upright: bool = False,
) -> None:
    """Draw means with their intervals as bars across the places `at`; `color` one or one per row."""
    lines = axes.vlines if upright else axes.hlines
    lines(at, table["low"], table["high"], color=color, linewidth=1.1)
    x, y = (at, table["mean"]) if upright else (table["mean"], at)
    axes.scatter(x, y, color=color, marker=marker, s=16, label=label or None, zorder=3)


def _rows(axes: Axes, left: Sequence[str], right: Sequence[str] = ()) -> None:
    """Name the rows of a panel, first on top, at the left and, small, at the right; a line stands at 0."""
    axes.axvline(0, color="black", linewidth=0.7)
    at = range(len(left))
    axes.set_yticks(at, left, fontsize=7.5)
    axes.set_ylim(len(left) - 0.4, -0.6)
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)
    if len(right):
        other = axes.secondary_yaxis("right")
        other.set_yticks(at, right, fontsize=7)
        other.tick_params(length=0)
        other.spines["right"].set_visible(False)


def _ticks(axes: Axes, x: int = 5, y: int = 0) -> None:
    """Have at most so many ticks, and no offset or power of ten beside an axis."""
    axes.xaxis.set_major_locator(MaxNLocator(x))
    if y:
        axes.yaxis.set_major_locator(MaxNLocator(y))
    axes.ticklabel_format(axis="both" if y else "x", useOffset=False, style="plain")


def _legend_above(subfigure: Any, axes: Axes) -> None:
    """Name the marks of a panel in one line above all panels."""
    handles, words = axes.get_legend_handles_labels()
    subfigure.legend(handles, words, loc="outside upper center", ncols=4, fontsize=7.5, frameon=False)


def _small_bar(
    figure: Any,
    image: Any,
    axes: Any,
    label: str,
    ticks: Any = None,
    words: Any = None,
) -> None:
    """Draw the bar of a picture's colours."""
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=40, ticks=ticks)
    if words is not None:
        bar.set_ticks(ticks, labels=words)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _largest_in_words(
    values: np.ndarray,
    hours: np.ndarray,
    texts: Sequence[str],
    is_push: bool,
) -> list[str]:
    """Name the three largest of a stay's pushes (logit) or weights (1: an even share), or say that none stands out."""
    sizes = np.nan_to_num(np.abs(values))
    if is_push and sizes.max() < FLOOR:
        return [f"no event mattered: none moves the logit by {FLOOR}"]
    if not is_push and sizes.max() < 1.5:
        return [f"no event stands out: {np.nanmin(values):.2f} to {sizes.max():.2f} of an even share"]
    words = []
    for event in np.argsort(-sizes, kind="stable")[:3]:
        amount = _signed(values[event]) if is_push else f"{values[event]:.1f} ×"
        words.append(f"{amount} at {hours[event]:.1f} h: {_for_plot(texts[event], 44)}")
    return words


def _stems(
    subfigure: Any,
    rows: list[tuple[str, np.ndarray, bool]],
    hours: np.ndarray,
    texts: Sequence[str],
) -> None:
    """Draw a panel per (name, values (L,), is it a push) over hours to the end; the largest are dark, and named."""
    grid = subfigure.subplots(len(rows), 2, sharex="col", width_ratios=[3, 2.6], squeeze=False)
    for (name, values, is_push), (axes, words) in zip(rows, grid):
        top = np.argsort(-np.nan_to_num(np.abs(values)), kind="stable")[:3]
        dark = np.where(values[top] >= 0, VERMILLION, BLUE) if is_push else "black"
        level = 0 if is_push else 1  # an even share
        axes.vlines(hours, level, values, color="#b5b5b5", linewidth=0.9)
        axes.vlines(hours[top], level, values[top], linewidth=1.4, color=dark)
        axes.axhline(level, color="black", linewidth=0.5)
        axes.margins(x=0.01)
        tidy(axes, TO_END if axes is grid[-1][0] else "", "")
        axes.set_ylabel(name, fontsize=7.5)
        axes.yaxis.set_major_locator(MaxNLocator(3))
        words.axis("off")
        for line, said in enumerate(_largest_in_words(values, hours, texts, is_push)):
            words.text(
                0,
                0.85 - 0.34 * line,
                said,
                fontsize=6.5,
                va="center",
                transform=words.transAxes,
            )
    grid[-1][0].invert_xaxis()


def _draw_layer_attention_weights(tables: Tables, caption: str) -> Figure:
    """Draw `attention`: layer_maps (layers, heads, bins, bins), rows look, columns are looked at; hours (L,)."""
    attention = tables["attention"]
    maps = np.asarray(attention["layer_maps"], dtype=float)
    hours = np.asarray(attention["hours"], dtype=float)[-MAX_MAP_EVENTS:]  # maps of a longer stay are those of its end
    n_layers, n_heads, n_bins, _ = maps.shape
    maps = np.concatenate([maps, maps.mean(1, keepdims=True)], axis=1)
    doublings = np.log2(np.maximum(maps * len(hours), 2.0**-9))  # 0: an even share, 1/L
    reach = 4 if np.nanquantile(np.abs(doublings), 0.9) > 2 else 2
    question = (
        f"Which events does each head of each layer look at? Stay {attention['icu_stay_id']}, {len(hours)} events"
    )
    caption = f"{_verdict_on(tables, 'layer attention')} {caption}".strip()
    figure = _page(question, caption, 0.85 * n_layers + 1.4)
    grid = figure.subplots(n_layers, n_heads + 1, sharex=True, sharey=True, squeeze=False)
    ticks = [f"{hours[at]:.0f}" for at in (0, len(hours) // 2, -1)]
    style: dict[str, Any] = {
        "cmap": SHARES,
        "vmin": -reach,
        "vmax": reach,
        "extent": (0, n_bins, n_bins, 0),
        "aspect": "auto",
    }
    for (layer, head), axes in np.ndenumerate(grid):
        image = axes.imshow(doublings[layer, head], **style)
        axes.set_xticks([0, n_bins / 2, n_bins], ticks, fontsize=6)
        axes.set_yticks([0, n_bins / 2, n_bins], ticks, fontsize=6)
        for label, side in zip(axes.get_xticklabels(), ("left", "center", "right")):
            label.set_horizontalalignment(side)
        if layer == 0:
            axes.set_title(f"head {head + 1}" if head < n_heads else "mean", fontsize=8)
        if head == 0:
            axes.set_ylabel(f"layer {layer + 1}", fontsize=8)
    grid[-1, n_heads // 2].set_xlabel(
        f"event looked at: {TO_END}; event that looks: downwards, same scale",
        fontsize=8,
    )
    steps = np.linspace(-reach, reach, 5)
    words = [f"1/{2**-step:.0f}" if step < 0 else f"{2**step:.0f}" for step in steps]
    _small_bar(figure, image, grid, "attention, times an even share", steps, words)
    return figure


def _verdict_on(tables: Tables, name: str) -> str:
    """Return the sentence of the verdict of this name, or nothing."""
    verdict = tables.get("verdict")
    if verdict is None:
        return ""
    return " ".join(verdict["sentence"][verdict["name"] == name])


def _of_stay(table: pd.DataFrame, icu_stay_id: int) -> pd.DataFrame:
    """Return the rows of one stay."""
    return table[table["icu_stay_id"] == icu_stay_id]


def _draw_sequence_importance(tables: Tables, caption: str) -> Figure:
    """Draw `attention` of one stay (pooling (heads, L), hours, texts), and where in all stays a head looks."""
    attention = tables["attention"]
    pooling = np.asarray(attention["pooling"], dtype=float)
    hours = np.asarray(attention["hours"], dtype=float)
    question = "Which events, and which part of the stay, does each pooling head weigh?"
    figure = _page(question, caption, len(pooling) + 3.4)
    upper, lower = _bands(figure, [len(pooling), 2.0])
    title = "weight of every event, times an even share; its three heaviest are dark"
    upper.suptitle(f"Stay {attention['icu_stay_id']}: {title}", fontsize=9)
    rows = [(f"head {head}", weights * len(hours), False) for head, weights in enumerate(pooling, 1)]
    _stems(upper, rows, hours, attention["texts"])
    _draw_tenths(lower, tables["events"], len(pooling))
    return figure


def _draw_tenths(subfigure: Any, events: pd.DataFrame, n_heads: int) -> None:
    """Draw how much more weight than an even share a pooling head gives to each tenth of the stays."""
    length = events["hours_since_admission"] + events["hours_to_end"]
    place = events["hours_since_admission"] / length.clip(lower=1e-9)
    tenths = np.arange(1, 11)
    decile = pd.cut(place, np.linspace(0, 1, 11), include_lowest=True, labels=tenths)
    even = _stay_shares(events.assign(one=1.0), decile, "one")
    panels = subfigure.subplots(1, n_heads, sharex=True, sharey=True, squeeze=False)[0]
    for head, axes in enumerate(panels, 1):
        more = _stay_shares(events, decile, f"attention_head_{head}") - even
        _error_dots(axes, _column_means(100 * more), tenths, "black", upright=True)
        axes.axhline(0, color="black", linewidth=0.5)
        axes.set_xticks([1, 4, 7, 10])
        tidy(axes, "", "", f"head {head}")
    panels[0].set_ylabel("points more than\nan even share, %", fontsize=8)
    subfigure.supxlabel(
        "tenth of the stay's time (1: after admission, 10: before the end)",
        fontsize=8,
    )
    n_stays = _count(events["icu_stay_id"].nunique(), "stay")
    subfigure.suptitle(f"Mean of {n_stays}, 95 % interval over patients", fontsize=9)


def _draw_sequence_importance_combined(tables: Tables, caption: str) -> Figure:
    """Draw attention and pushes of one stay over time, and their shares in the windows before the end of all."""
    events, windows = tables["events"], tables.get("windows")
    figure = _page(
        "When in the stay lies the evidence: by attention, and by what moves the prediction?",
        caption,
        7.2,
    )
    upper, lower = _bands(figure, [1.25, 1])
    icu_stay_id = tables["attention"]["icu_stay_id"]
    own = _of_stay(events, icu_stay_id).sort_values("event")
    upper.suptitle(
        f"Stay {icu_stay_id}: attention in times an even share, pushes in logit{_replaced_in_words(own)}",
        fontsize=9,
    )
    rows = []
    for column, word in OVER_TIME.items():
        is_push = column not in ("attention", "rollout")
        values = own[column].to_numpy(float)
        rows.append((word.replace(" ", "\n"), values if is_push else values * len(own), is_push))
    _stems(upper, rows, own["hours_to_end"].to_numpy(), own["event_text"].to_numpy())
    _draw_windows(lower, events)
    if windows is not None and len(windows):
        words = " ".join(windows["sentence"].astype(str)[:2])
        lower.supxlabel(textwrap.fill(words, 115), fontsize=7.5)
    return figure


def _draw_windows(subfigure: Any, events: pd.DataFrame) -> None:
    """Draw which share of each measure lies in each window before the end that has events."""
    names, bins = CLOCK_WINDOWS, _windows_of(events)
    used = [name for name in names if name in set(bins)]
    position = np.arange(len(used))[::-1]  # the end of the stay at the right, as above
    axes = subfigure.subplots()
    even = _column_means(_stay_shares(events.assign(one=1.0), bins, "one")[used])
    axes.bar(position, 100 * even["mean"], color="#e3e3e3", label="share of the events", zorder=0)
    for at, (column, word) in enumerate(OVER_TIME.items()):
        shares = _column_means(100 * _stay_shares(events, bins, column)[used])
        style = HEAD_COLOURS[at], MARKERS[at], word
        _error_dots(axes, shares, position + 0.1 * (at - 1.5), *style, upright=True)
    reach = events.groupby("icu_stay_id")["hours_to_end"].max()
    words = []
    for name, start in zip(names, CLOCK_WINDOWS_HOURS):
        if name in used:
            words.append(f"{name}\n{_count((reach >= start).sum(), 'stay')}")
    axes.set_xticks(position, words)
    axes.set_ylim(0, 1.35 * axes.get_ylim()[1])
    axes.legend(fontsize=7, frameon=False, ncols=5, loc="upper center")
    title = f"Mean of {_count(len(reach), 'stay')} and its 95 % interval; sizes of pushes{_replaced_in_words(events)}"
    tidy(axes, f"{TO_END}; stays that reach back so far", "share, %", title)


def _draw_head_specialization(tables: Tables, caption: str) -> Figure:
    """Draw `heads`, one row per layer, head and property: correlation, has_role."""
    heads = tables["heads"]
    question = "What does a head follow more than untrained heads do?"
    if heads.empty:
        figure = _page(question, caption, 1.5)
        figure.text(0.5, 0.5, "No stay is long enough to measure what heads follow.", ha="center")
        return figure
    properties = heads["property"].unique()
    names = heads[["layer", "head"]].drop_duplicates().to_records(index=False).tolist()
    grid = heads.pivot(index="property", columns=["layer", "head"]).loc[properties]
    values = grid["correlation"][names].to_numpy(float)
    has_role = grid["has_role"][names].to_numpy(bool)
    n_roles = has_role.any(0).sum()
    figure = _page(
        f"{question} {n_roles} of {len(names)} have a role",
        caption,
        0.28 * len(properties) + 1.9,
    )
    axes = figure.subplots()
    strength = np.where(has_role, 1.0, 0.35)
    image = axes.imshow(values, cmap=SIGNED, vmin=-1, vmax=1, aspect="auto", alpha=strength)
    for row, column in np.argwhere(has_role):
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, linewidth=1.2))
    for at, (layer, head) in enumerate(names):
        if head == 1:
            axes.text(at - 0.4, -0.75, layer, fontsize=8)
            axes.axvline(at - 0.5, color="black", linewidth=1)
    tidy(
        axes,
        f"head; framed: follows beyond 99 % of untrained heads, and moves the logit by over {FLOOR}",
        "",
    )
    axes.set_xticks(range(len(names)), [head for _, head in names], fontsize=7.5)
    axes.set_yticks(
        range(len(properties)),
        [_property_word(name) for name in properties],
        fontsize=7.5,
    )
    _small_bar(figure, image, axes, "rank correlation within the stay")
    return figure


def _property_word(name: str) -> str:
    """Return what a head may follow, in a reader's words: `event type: labevent` -> `event is: Lab`."""
    kind = name.removeprefix("event type: ")
    return f"event is: {TYPE_WORDS[kind]}" if kind in TYPE_WORDS else name


def _importance_rows(panels: tuple[Axes, Axes], title: str, table: pd.DataFrame, unit: str) -> None:
    """Draw mean signed and mean absolute push of each `group` of a table, with the numbers of rows and patients."""
    left, right = panels
    size = _means_by(table.assign(size=table["attribution"].abs()), "group", "size")
    size = size.sort_values("mean", ascending=False)
    mean = _means_by(table, "group", "attribution").loc[size.index]
    at = np.arange(len(size))
    _error_dots(left, mean, at, np.where(mean["mean"] >= 0, VERMILLION, BLUE))
    _error_dots(right, size, at, "black")
    tidy(left, "", "")
    tidy(right, "", "")
    counts = [f"{n:,} / {patients:,}" for n, patients in zip(size["n"], size["n_patients"])]
    _rows(left, [_for_plot(name, 44, _cut) for name in size.index])
    _rows(right, [""] * len(at), counts)
    left.set_title(title, fontsize=8.5, loc="left")
    right.set_title(f"{unit} / patients", fontsize=7.5, loc="right")


def _draw_feature_importance(tables: Tables, caption: str) -> Figure:
    """Draw event types and items per event, organ systems and statics per stay, each pair on an axis of its own."""
    events, statics = tables["events"], tables["statics"]
    items, least = _important_items(events, 12)
    kinds = events["event_type"].map(TYPE_WORDS).fillna(events["event_type"])
    of_items = events[events["item"].isin(items)]
    systems = _system_table(events).rename(columns={"system": "group", "push": "attribution"})
    per_event = {
        "Event types, per event": events.assign(group=kinds),
        f"Items, per event (of {least} patients or more)": of_items.assign(group=of_items["item"]),
    }
    per_stay = {
        "Organ systems, sum of a stay's events": systems,
        "Patient and admission, per stay": statics.assign(group=statics["feature"]),
    }
    heights = [[table["group"].nunique() for table in part.values()] for part in (per_event, per_stay)]
    n_rows = sum(heights[0]) + sum(heights[1])
    figure = _page(
        "What moves this model's prediction, in which direction and how far?",
        caption,
        0.2 * n_rows + 3.6,
    )
    halves = _bands(figure, [sum(part) + 4 for part in heights])
    for half, blocks, ratios, unit in zip(
        halves,
        (per_event, per_stay),
        heights,
        ("events", "stays"),
    ):
        grid = half.subplots(2, 2, sharex="col", height_ratios=ratios)
        for (title, table), panels in zip(blocks.items(), grid):
            _importance_rows(tuple(panels), title, table, unit)
        grid[1, 1].set_xlim(left=0)
        grid[1, 0].set_xlabel(f"mean push, {LOGIT}", fontsize=8)
        grid[1, 1].set_xlabel("mean size, logit", fontsize=8)
        for axes in grid[1]:
            _ticks(axes, 3)
    return figure


def _draw_item_importance(tables: Tables, caption: str) -> Figure:
    """Draw the items that matter most as a beeswarm: a dot per event, coloured by its value's place in the item."""
    events, items = tables["events"], tables["items"]
    figure = _page(
        "Which items push, and is it their high or their low values?",
        caption,
        0.26 * len(items) + 1.7,
    )
    axes = figure.subplots()
    draw = np.random.default_rng(0)
    norm = Normalize(0, 1)
    for at, item in enumerate(items["item"]):
        part = events[events["item"] == item]
        part = part.assign(place=part["value"].rank(pct=True)).sample(
            min(len(part), 400),
            random_state=0,
        )
        height = at + draw.uniform(-0.32, 0.32, len(part))
        known = part["place"].notna().to_numpy()
        axes.scatter(part["attribution"][~known], height[~known], s=5, color="#bbbbbb", linewidths=0)
        place = part["place"][known]
        axes.scatter(
            part["attribution"][known],
            height[known],
            c=place,
            s=6,
            cmap="viridis",
            norm=norm,
            linewidths=0,
        )
    tidy(axes, f"push, {LOGIT}; a dot an event; grey: no value; (!): tells the outcome", "")
    _ticks(axes, 6)
    names, rho = [], []
    for item in items.itertuples():
        names.append(("(!) " if item.tells_outcome else "") + _for_plot(item.item, 40, _cut))
        rho.append("" if math.isnan(item.rho) else f"{item.rho:+.2f} ({item.n_values})".replace("-", "−"))
    _rows(axes, names, rho)
    axes.set_title("rho of value and push (n)", fontsize=7.5, loc="right")
    colors = ScalarMappable(norm, "viridis")
    words = ["lowest", "middle", "highest"]
    _small_bar(figure, colors, axes, "value among those of its item", [0, 0.5, 1], words)
    return figure


def _draw_query_vector_analysis(tables: Tables, caption: str) -> Figure:
    """Draw `query_similarity`, one row per pooling head and event type: similarity, low, high, n_events."""
    table = tables["query_similarity"].rename(columns={"similarity": "mean"})
    kinds = [kind for kind in (*EVENT_TYPES, "unknown") if kind in set(table["event_type"])]
    heads = table["head"].unique()
    question = "Which types of event does the learned query look for, by pooling head?"
    figure = _page(question, caption, 0.25 * len(kinds) + 1.9)
    panels = figure.subplots(1, len(heads), sharex=True, sharey=True, squeeze=False)[0]  # type: ignore[index]
    for axes, head in zip(panels, heads):
        rows = table[table["head"] == head].set_index("event_type").reindex(kinds)
        _error_dots(axes, rows, np.arange(len(kinds)), BLUE)
        _rows(axes, [f"{TYPE_WORDS.get(kind, kind)} (n = {n:,.0f})" for kind, n in zip(kinds, rows["n_events"])])
        tidy(axes, "", "", f"head {head}")
        _ticks(axes, 3)
    label = "query·key score minus the stay's mean (right: looked for), 95 % interval over patients"
    panels[len(panels) // 2].set_xlabel(label, fontsize=8, x=0 if len(panels) % 2 == 0 else 0.5)
    return figure


def _signed_bars(axes: Axes, values: np.ndarray, names: list[str]) -> None:
    """Draw horizontal bars, first on top, with their values; colours by sign."""
    at = np.arange(len(values))
    axes.barh(at, values, color=np.where(values >= 0, VERMILLION, BLUE), height=0.7)
    axes.margins(x=0.27)
    tidy(axes, LOGIT, "")
    _rows(axes, names)
    _ticks(axes, 5)
    for y, value in zip(at, values):
        side = "left" if value >= 0 else "right"
        axes.annotate(f" {_signed(value)} ", (value, y), ha=side, va="center", fontsize=6.5)


def _draw_captum_attributions(tables: Tables, caption: str) -> Figure:
    """Draw the pushes of the stay with the highest risk: timeline, strongest events, statics; parts in all stays."""
    stays = tables["stays"]
    icu_stay_id = _shown_stay(stays)
    row = _of_stay(stays, icu_stay_id).iloc[0]
    events = _of_stay(tables["events"], icu_stay_id)
    statics = _of_stay(tables["statics"], icu_stay_id)
    question = f"Which events push the prediction of stay {icu_stay_id}?"
    figure = _page(
        f"{question} Risk {_percent(row['probability'])}, {_outcome(row['label'])}",
        caption,
        8.0,
    )
    line, bars, below = _bands(figure, [1, 2.2, 1.3])
    _draw_pushes(line.subplots(), events, _sums_in_words(row, events, statics))
    bars.suptitle("The strongest events for and against, with the hours left to the end", fontsize=9)
    _draw_strongest(bars.subplots(), events)
    left, right = below.subplots(1, 2, width_ratios=[1.5, 1])
    top = statics.sort_values("attribution", key=abs, ascending=False).head(8)
    words = []
    for feature, value in zip(top["feature"], top["value"]):
        words.append(_for_plot(f"{feature}: {_plain_number(value)}", 38))
    _signed_bars(left, top["attribution"].to_numpy(), words)
    left.set_title("Patient and admission", fontsize=9)
    _parts_of_events(right, tables["events"])
    return figure


def _sums_in_words(row: pd.Series, events: pd.DataFrame, statics: pd.DataFrame) -> str:
    """Say how a stay's parts add up to its logit, and whether they do."""
    of_events = _signed(events["attribution"].sum())
    of_statics = _signed(statics["attribution"].sum())
    words = f"All {_count(len(events), 'event')}: sum {of_events}; patient and admission {of_statics}; "
    words += f"starting from logit {_signed(row['baseline_logit'])} gives {_signed(row['logit'])}"
    if not row["complete"]:
        words += f" (gap {_signed(row['gap_error'])}: not complete)"
    return words


def _draw_pushes(axes: Axes, events: pd.DataFrame, title: str) -> None:
    """Draw the push of every event of a stay over the hours to the end."""
    push = events["attribution"]
    colors = np.where(push >= 0, VERMILLION, BLUE)
    axes.vlines(events["hours_to_end"], 0, push, color=colors, linewidth=1.1)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.invert_xaxis()
    tidy(axes, TO_END, "logit\n(up: towards death)", title)


def _draw_strongest(axes: Axes, events: pd.DataFrame, n: int = 7) -> None:
    """Draw the n events of a stay that push most towards death and the n that push most away, if they push at all."""
    towards = events.nlargest(n, "attribution").query("attribution >= 0.0005")
    away = events.nsmallest(n, "attribution").query("attribution <= -0.0005")
    named = pd.concat([towards, away[::-1]])
    words = []
    tells = named.get("tells_outcome", pd.Series(False, named.index))
    for text, history, hours, mark in zip(
        named["event_text"],
        named["in_history"],
        named["hours_to_end"],
        tells,
    ):
        words.append(
            f"{'(!) ' if mark else ''}{_for_plot(text, 56)}  {history} {hours:.1f} h".replace(
                "   ",
                "  ",
            )
        )
    _signed_bars(axes, named["attribution"].to_numpy(), words)


def _parts_of_events(axes: Axes, events: pd.DataFrame) -> None:
    """Draw how much of an event's push is due to its text, type, time and value."""
    used = [column for column in PART_WORDS if column in events and events[column].any()]
    parts = events.melt("patient_id", used, "part", "size").replace({"part": PART_WORDS})
    table = _means_by(parts.assign(size=parts["size"].abs()), "part", "size").sort_values(
        "mean",
        ascending=False,
    )
    _error_dots(axes, table, np.arange(len(table)), "black")
    _rows(axes, table.index)
    axes.set_xlim(left=0)
    n_stays = _count(events["icu_stay_id"].nunique(), "stay")
    tidy(axes, "mean size per event, logit", "", f"What counts? {n_stays}")
    _ticks(axes, 3)


def _rank_agreement(table: pd.DataFrame, keys: list[str], first: str, second: str) -> pd.DataFrame:
    """Return the rank correlation of two columns in each group: the keys, and `correlation`."""
    rows = []
    for names, part in table.groupby(keys, sort=False):
        found = _rank_correlation(part[first].to_numpy(float), part[second].to_numpy(float))[0, 0]
        rows.append((*names, found))
    return pd.DataFrame(rows, columns=[*keys, "correlation"])


def _draw_captum_layer_attributions(tables: Tables, caption: str) -> Figure:
    """Draw `layers` (layer, icu_stay_id, event, attribution, gap_error): one stay over its events, all stays below."""
    layers, stays = tables["layers"], tables["stays"]
    names = layers["layer"].unique()
    stay = _shown_stay(stays[stays["icu_stay_id"].isin(layers["icu_stay_id"])])
    question = "Does the evidence stay with its events on the way through the layers?"
    caption = f"{_verdict_on(tables, 'layer attention')} Patient and admission: held fixed. {caption}".strip()
    figure = _page(question, caption, 5.4)
    upper, lower = _bands(figure, [1.2, 1])
    own = _of_stay(layers, stay)
    wide = own.pivot(index="layer", columns="event", values="attribution").loc[names]
    hours = _of_stay(tables["events"], stay).sort_values("event")["hours_to_end"].to_numpy()
    axes, top = upper.subplots(), max(np.quantile(wide.abs(), 0.99), 1e-12)
    image = axes.imshow(
        wide,
        aspect="auto",
        cmap=SIGNED,
        vmin=-top,
        vmax=top,
        interpolation="nearest",
    )
    _small_bar(upper, image, axes, "logit (up: towards death)")
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    title = f"Stay {stay}: Integrated Gradients at each layer, {_count(len(hours), 'event')}"
    tidy(axes, f"{TO_END}; each event equally wide", "", title)
    ticks = np.unique(np.linspace(0, len(hours) - 1, 9).round().astype(int))
    axes.set_xticks(ticks, [f"{hours[at]:.0f}" for at in ticks])
    _draw_layer_agreement(lower, layers)
    return figure


def _draw_layer_agreement(subfigure: Any, layers: pd.DataFrame) -> None:
    """Draw how far each layer's attributions agree with the first layer's; a grey dot a stay."""
    names = layers["layer"].unique()
    first = layers[layers["layer"] == names[0]][["icu_stay_id", "event", "attribution"]]
    both = layers.merge(first, on=["icu_stay_id", "event"], suffixes=("", "_first"))
    found = _rank_agreement(
        both,
        ["layer", "icu_stay_id", "patient_id"],
        "attribution",
        "attribution_first",
    )
    axes, at = subfigure.subplots(), np.arange(len(names))
    spread = np.random.default_rng(0).uniform(-0.2, 0.2, len(found))
    heights = found["layer"].map(dict(zip(names, at))) + spread
    axes.scatter(found["correlation"], heights, s=5, color="#b5b5b5")
    _error_dots(axes, _means_by(found, "layer", "correlation").reindex(names), at, "black")
    n_stays = _count(layers["icu_stay_id"].nunique(), "stay")
    gap = layers["gap_error"].abs().max()
    title = f"Agreement with {names[0].replace('_', ' ')}; the sums miss at most {gap:.2g} logit"
    tidy(
        axes,
        f"rank correlation of a stay's events, {n_stays}; black: mean, 95 % interval",
        "",
        title,
    )
    _rows(axes, [name.replace("_", " ") for name in names])
    axes.set_xlim(min(0.0, found["correlation"].min()) - 0.03, 1.03)
    _ticks(axes, 6)


def _group_order(name: str) -> int:
    """Return the place of event types and clock windows in their own order; other groups stay as they come."""
    order = [*EVENT_TYPES, *CLOCK_WINDOWS]
    return order.index(name) if name in order else 0


def _draw_groups(axes: Axes, rows: pd.DataFrame, kind: str) -> None:
    """Draw attribution and ablation of the groups of one kind, mean per stay that has the group."""
    names = sorted(rows["group"].unique(), key=_group_order)
    at = np.arange(len(names))
    measures = (
        ("attribution", "push, summed", BLUE, "o"),
        ("ablation", "if unremarkable", VERMILLION, "s"),
    )
    for shift, (value, word, color, marker) in zip((-0.14, 0.14), measures):
        _error_dots(
            axes,
            _means_by(rows, "group", value).reindex(names),
            at + shift,
            color,
            marker,
            word,
        )
    tidy(axes, "", "")
    stays = rows.groupby("group")["icu_stay_id"].nunique()
    words = [_count(stays[name], "stay") for name in names]
    _rows(axes, [TYPE_WORDS.get(name, _for_plot(name, 40)) for name in names], words)
    axes.set_title(
        f"by {kind}" if kind != "static" else "patient and admission",
        fontsize=8.5,
        loc="left",
    )
    _ticks(axes, 6)


def _draw_captum_ablation_attributions(tables: Tables, caption: str) -> Figure:
    """Draw `groups` (attribution, ablation per stay, kind and group) and `events` (attribution, if_unremarkable)."""
    groups, events = tables["groups"], tables["events"]
    kinds = groups["kind"].unique()
    sizes = [groups[groups["kind"] == kind]["group"].nunique() for kind in kinds]
    question = "What would the prediction be if a group of events, or one event, were unremarkable?"
    figure = _page(question, caption, 0.23 * sum(sizes) + 5.2)
    upper, lower = _bands(figure, [0.23 * sum(sizes) + 1.6, 2.6])
    panels = upper.subplots(len(kinds), 1, height_ratios=sizes, squeeze=False)[:, 0]
    for axes, kind in zip(panels, kinds):
        _draw_groups(axes, groups[groups["kind"] == kind], kind)
    panels[-1].set_xlabel(
        f"mean per stay that has the group, {LOGIT}; each panel has its own scale",
        fontsize=8,
    )
    _legend_above(upper, panels[0])
    axes = lower.subplots()
    known = events.dropna(subset=["if_unremarkable"])
    axes.hexbin(
        known["attribution"],
        known["if_unremarkable"],
        gridsize=60,
        bins="log",
        vmin=0.1,  # so that one event is no white dot
        cmap="Greys",
        mincnt=1,
    )
    axes.axline((0, 0), slope=1, color=VERMILLION, linewidth=0.7, linestyle="--")
    agreement = _rank_agreement(
        known,
        ["icu_stay_id", "patient_id"],
        "attribution",
        "if_unremarkable",
    )["correlation"]
    median = f"median rank correlation within a stay {agreement.median():.2f}"
    title = f"{len(known):,} of {_count(len(events), 'event')} (dashed: equal); {median}"
    tidy(axes, "push, logit", "if unremarkable, logit", title)
    _ticks(axes, 6, 5)
    return figure


ORDER_STYLES: dict[str, dict[str, Any]] = {
    "attribution": {"color": "#9ecae1", "linewidth": 4},
    "if_unremarkable": {"color": "black", "linestyle": "--", "linewidth": 1.2},
    "attention": {"color": ORANGE, "linestyle": "-.", "linewidth": 1.4},
    "random": {"color": "0.5", "linestyle": ":", "linewidth": 1.4},
}


def _draw_deletion_insertion(tables: Tables, caption: str) -> Figure:
    """Draw `curves`, as `_deletion_insertion` gives them, of all checked stays: a panel for each direction."""
    curves = _with_one_random_order(tables["curves"])
    n_stays = _count(curves["icu_stay_id"].nunique(), "stay")
    question = "Do the events that an explanation ranks first move the prediction most?"
    checked = tables["events"]["icu_stay_id"].isin(curves["icu_stay_id"])
    replaced = _replaced_in_words(tables["events"][checked])
    if replaced:
        replaced += ", the others count as 0"
    figure = _page(question, f"{caption} · measured on {n_stays}{replaced}", 3.4)
    (body,) = _bands(figure, [1])
    means = curves.groupby(["direction", "order", "fraction"])["change"].mean()
    verbs = {"deletion": "made unremarkable", "insertion": "given to a stay that says nothing"}
    for axes, (direction, verb) in zip(body.subplots(1, 2), verbs.items()):
        for order, style in ORDER_STYLES.items():
            line = means[direction, order]
            axes.plot(100 * line.index, line, label=ORDERS.get(order, "random order"), **style)
        axes.axhline(0, color="black", linewidth=0.5)
        tidy(axes, "% of the events, highest first", "change of the logit", f"Events {verb}")
        _ticks(axes, 5, 5)
    _legend_above(body, axes)
    return figure


FIGURES: dict[str, Callable[[Tables, str], Figure]] = {
    "layer_attention_weights": _draw_layer_attention_weights,
    "sequence_importance": _draw_sequence_importance,
    "sequence_importance_combined": _draw_sequence_importance_combined,
    "head_specialization": _draw_head_specialization,
    "feature_importance": _draw_feature_importance,
    "item_importance": _draw_item_importance,
    "query_vector_analysis": _draw_query_vector_analysis,
    "captum_attributions": _draw_captum_attributions,
    "captum_layer_attributions": _draw_captum_layer_attributions,
    "captum_ablation_attributions": _draw_captum_ablation_attributions,
    "deletion_insertion": _draw_deletion_insertion,
}


def draw_figure(name: str, tables: Tables, caption: str = "") -> Figure:
    """Draw one picture (`FIGURES` names them) from the tables of `run_explainability_analysis`.

    >>> draw_figure("captum_attributions", tables)  # doctest: +SKIP
    """
    if name not in FIGURES:
        raise InputError(f"no picture is called {name}; there are {', '.join(FIGURES)}.")
    return FIGURES[name](tables, caption)


def draw_figures(tables: Tables, caption: str = "") -> dict[str, Figure]:
    """Draw all pictures, by file name without .png; of checks only after checks, of layers only where there are any.

    >>> draw_figures(tables)["item_importance"].savefig("items.png")  # doctest: +SKIP
    """
    left_out = set() if len(tables.get("curves", ())) else {"deletion_insertion"}
    if not len(tables["attention"]["layer_maps"]):
        left_out |= {"layer_attention_weights", "captum_layer_attributions"}
    return {name: draw_figure(name, tables, caption) for name in FIGURES if name not in left_out}


# ---------------------------------------------------------------------------------------------------------------------
# Report: one page that needs nothing else; the template escapes every text, since event texts are whatever was typed
# ---------------------------------------------------------------------------------------------------------------------
REPORT = """<!DOCTYPE html>
{% macro table(caption, columns, rows) %}
{% if rows %}
<table><caption>{{ caption }}</caption><thead><tr>
{% for name in columns %}
<th scope="col"{% if name[0] == "#" %} class="n"{% endif %}>{{ name.lstrip("#") }}</th>
{% endfor %}
</tr></thead><tbody>
{% for row in rows %}
<tr>
{% for name in columns %}
{% set tag = "td" if loop.index0 else "th" %}
<{{ tag }}{% if not loop.index0 %} scope="row"{% endif %}{% if name[0] == "#" %} class="n"{% endif %}>
{{- row[loop.index0] -}}
</{{ tag }}>
{% endfor %}
</tr>
{% endfor %}
</tbody></table>
{% else %}
<p>{{ caption }}: none.</p>
{% endif %}
{% endmacro %}
{% macro figure(name) %}
{% if name in pictures %}
<figure><img alt="{{ pictures[name].question }}" src="data:image/png;base64,{{ pictures[name].data }}">
<figcaption>{{ name }}.png</figcaption></figure>
{% endif %}
{% endmacro %}
{% macro line(x1, y1, x2, y2, color="#999", width=1) %}
<line x1="{{ x1 }}" y1="{{ y1 }}" x2="{{ x2 }}" y2="{{ y2 }}" stroke="{{ color }}" stroke-width="{{ width }}"/>
{% endmacro %}
{% macro text(x, y, words, anchor="middle") %}
<text x="{{ x }}" y="{{ y }}" text-anchor="{{ anchor }}">{{ words }}</text>
{% endmacro %}
{% macro timeline(drawn) %}
<figure><svg viewBox="0 0 960 400" role="img" aria-label="Timeline: predicted risk above, push of each event below;
 the strongest are listed in the tables">
{{ text(78, 14, "Predicted risk of death as events arrive", "start") }}
{{ text(78, 164, "Push of each event on the final prediction, logit (up: towards death)", "start") }}
{% for y, label in [(25, "100 %"), (75, "50 %"), (125, "0 %"), (175, drawn.reach), (355, "−" ~ drawn.reach[1:])] %}
{{ line(78, y, 945, y, "#ddd") }}{{ text(70, y + 4, label, "end") }}
{% endfor %}
{% for x, label in drawn.ticks %}
{{ line(x, 355, x, 360) }}{{ text(x, 374, label) }}
{% endfor %}
{{ text(511, 392, "hours since ICU admission") }}{{ line(78, 265, 945, 265, "#333") }}
<polyline points="{{ drawn.risks }}" fill="none" stroke="#333" stroke-width="1.8"/>
{% for x, tip, color, words in drawn.events %}
<g><title>{{ words }}</title>{{ line(x, 265, x, tip, color, 2) }}</g>
{% endfor %}
</svg><figcaption>{{ drawn.note }}Orange and up: towards death; blue and down: away from it.</figcaption></figure>
{% endmacro %}
{% macro calibration_chart() %}
<figure><svg viewBox="0 0 250 240" width="250" role="img" aria-label="Observed deaths in groups of similar risk">
{{ line(45, 195, 220, 20) }}{{ line(45, 195, 220, 195) }}{{ line(45, 20, 45, 195) }}
{{ text(132, 230, "predicted risk") }}
<text transform="translate(12 108) rotate(-90)" text-anchor="middle">observed deaths, %</text>
{% for share in [0, 0.5, 1] %}
{{ text(45 + 175 * share, 211, share | percent_of) }}{{ text(40, 199 - 175 * share, (100 * share) | int, "end") }}
{% endfor %}
{% for row in calibration.itertuples() %}
{% set x = 45 + 175 * row.mean_risk %}
{{ line(x, 195 - 175 * row.low, x, 195 - 175 * row.high, blue, 1.5) }}
<circle cx="{{ x }}" cy="{{ 195 - 175 * row.observed_rate }}" r="4" fill="{{ blue }}"/>
{% endfor %}
</svg><figcaption>Do as many die as predicted? Dots: groups of similar risk, 95 % interval.</figcaption></figure>
{% endmacro %}
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>Why the model predicts what it predicts</title>
<style>
body { font: 15px/1.5 system-ui, "Segoe UI", Arial, sans-serif; color: #1b1b1b; background: #fff; }
body { max-width: 62rem; margin: 0 auto; padding: 1.5rem }
h1 { font-size: 1.7rem; margin: 0 0 .3rem } h3 { font-size: 1.05rem; margin: 1.4rem 0 .3rem }
h2 { font-size: 1.3rem; margin: 2.4rem 0 .5rem; padding-top: .6rem; border-top: 2px solid #1b1b1b }
p { margin: .4rem 0 .7rem; max-width: 50rem } a { color: #005a91 }
.note { background: #f3f3f3; border-left: 4px solid #0072B2; padding: .6rem 1rem; max-width: 50rem }
.warn { border-color: #D55E00 } .risk { font-size: 2rem; font-weight: 600; margin-right: .6rem }
.small { font-size: .85rem; color: #4a4a4a }
table { border-collapse: collapse; width: 100%; margin: .4rem 0 1rem; font-size: .88rem }
caption { text-align: left; font-weight: 600; padding: .3rem 0 }
th, td { text-align: left; vertical-align: top; padding: .28rem .6rem .28rem 0; border-bottom: 1px solid #ddd }
th, td { overflow-wrap: anywhere } tbody th { font-weight: 400 }
thead th { border-bottom: 1.5px solid #1b1b1b; vertical-align: bottom; overflow-wrap: normal }
td.n, th.n { text-align: right } td.n { white-space: nowrap; font-variant-numeric: tabular-nums }
figure { margin: 1rem 0; break-inside: avoid } figure img, svg { max-width: 100%; height: auto }
figcaption { font-size: .85rem; color: #4a4a4a } svg text { font: 12px system-ui, Arial, sans-serif; fill: #333 }
@media print {
  body { max-width: none; padding: 0; font-size: 11px } section.stay, h2.appendix { break-before: page }
  tr { break-inside: avoid } h3, caption { break-after: avoid } a { color: inherit; text-decoration: none }
}
</style></head><body><main>
<h1>Why the model predicts what it predicts</h1>
<p class="small">{{ facts }}</p>
{% if verdict %}
<div class="note{{ "" if verdict_holds else " warn" }}"><strong>Is there anything to explain?</strong>
{% for sentence in verdict %}
<p>{{ sentence }}</p>
{% endfor %}
</div>
{% endif %}
<p class="note warn">This page <strong>{{ disclaimer }}</strong>.
It is made for research, not for the care of a patient. {{ setting }}</p>
<p class="note"><strong>How to read the numbers.</strong>
The push of an event is its share of the way from a stay whose events say nothing to this one, found by Integrated
Gradients on the logit scale: a stay’s pushes sum to that whole way, {{ doubling | signed }} doubles the odds of death,
{{ -doubling | signed }} halves them. “Odds through it” asks another question: what if this event alone were
unremarkable, that is, replaced by the mean event of training, and all others stayed? So a push of +2.6 can stand beside
× 1.9: the push is summed along the whole way, the odds are one step back at its end, where much else already speaks for
the same outcome and one event more or less changes little.</p>
<h2>All explained stays</h2>
<p>{{ cohort }}</p>
{{ table("Stays shown below", ["stay", "shown because", "#predicted risk", "outcome"], shown) }}
{% if calibration is not none %}
{{ calibration_chart() }}
{% endif %}
{{ table("When the evidence comes: share of all push, mean over stays", window_columns, windows) }}
{{ figure("feature_importance") }}
{% if items %}
<h3>Items</h3>
<p>{{ items | join(" ") }}</p>
{{ figure("item_importance") }}
{{ table("Mean push of an item and of each level in its texts, logit (events)", ["item"] + level_names, levels) }}
{% endif %}
{{ figure("captum_ablation_attributions") }}
{{ figure("sequence_importance_combined") }}
{% for stay in stays %}
<section class="stay" id="stay-{{ stay.icu_stay_id }}"><h2>Stay {{ stay.icu_stay_id }}: {{ stay.why_shown }}</h2>
<p><span class="risk">{{ stay.risk }}</span>
predicted risk of death in hospital; <strong>{{ stay.outcome }}</strong>.</p>
<p>{{ stay.place }} {{ stay.sums }}</p>
{% if stay.gap %}
<p class="note warn">For this stay the parts do not add up to the prediction (gap {{ stay.gap }} logit):
read its numbers with care.</p>
{% endif %}
{% if stay.decisive %}
<p class="note">{{ stay.decisive }}</p>
{% endif %}
{{ timeline(stay.timeline) }}
{% if stay.towards or stay.away %}
{{ table("The events that push most towards death (up to " ~ most ~ ")", event_columns, stay.towards) }}
{{ table("The events that push most away from death (up to " ~ most ~ ")", event_columns, stay.away) }}
{% else %}
<p class="note">No event of this stay mattered: none moves the logit by {{ floor }}.</p>
{% endif %}
{{ table("Organ systems", ["system", "#events", "#push, logit"], stay.systems) }}
{{ table("Patient and admission", ["what", "value", "#push, logit", "#if average, logit"], stay.statics) }}
</section>
{% endfor %}
<h2 id="scores">How right are these explanations?</h2>
<p>{{ summary }}</p>
{{ table("Checks of the explanations against the model itself", ["check", "what was found", "result"], checks) }}
<h2 class="appendix">Technical appendix: layers and heads</h2>
<p>Attention says where the model looks, not what moves its prediction; the two often differ.</p>
{% for name in appendix %}
{{ figure(name) }}
{% endfor %}
</main></body></html>
"""
APPENDIX = (
    "captum_attributions",
    "sequence_importance",
    "layer_attention_weights",
    "captum_layer_attributions",
    "head_specialization",
    "query_vector_analysis",
    "deletion_insertion",
)
EVENT_COLUMNS = [
    "event",
    "time",
    "#hours after admission",
    "#hours before the end",
    "#push, logit",
    "#odds through it",
]
WINDOW_COLUMNS = [
    "before the end",
    "#share of push",
    "#95 % interval from",
    "#to",
    "#share of events",
    "#stays",
]
WINDOW_WORDS: dict[str, Callable[[Any], str]] = {
    "window": str,
    "share": _percent,
    "low": _percent,
    "high": _percent,
}
WINDOW_WORDS |= {"share_of_events": _percent, "n_stays": str}
TELLS = " [this text alone tells the outcome]"
EVENTS_DRAWN = 600  # of a stay


def _odds(logit: float, temperature: float = 1.0) -> str:
    """Return a difference of logits as odds, as a person writes it: `× 12`, `÷ 1.4`, `the same`."""
    if pd.isna(logit):
        return "–"
    times = math.exp(min(abs(logit) / temperature, 20))
    if times < 1.05:
        return "the same"
    if times > 1000:
        number = "over 1,000"
    else:
        number = f"{times:.0f}" if times >= 9.95 else f"{times:.1f}"
    return f"{'×' if logit > 0 else '÷'} {number}"


def _event_rows(events: pd.DataFrame, temperature: float) -> list[list[str]]:
    """Return the cells of the strongest events, as `EVENT_COLUMNS` names them."""
    rows = []
    for row in events.itertuples():
        clock = "" if pd.isna(row.event_time) else f"{pd.Timestamp(row.event_time):%Y-%m-%d %H:%M}"
        hours = [f"{row.hours_since_admission:.1f}", f"{row.hours_to_end:.1f}"]
        history = f" ({row.in_history})" if row.in_history else ""
        text = row.event_text + history + (TELLS if getattr(row, "tells_outcome", False) else "")
        rows.append([text, clock, *hours, _signed(row.attribution), _odds(row.if_unremarkable, temperature)])
    return rows


def _timeline(events: pd.DataFrame, trajectory: pd.DataFrame) -> dict[str, Any]:
    """Return the coordinates of a stay's timeline: risks between 25 and 125, stems between 175 and 355 pixels."""
    strongest = events["attribution"].abs().nlargest(EVENTS_DRAWN).index
    drawn = events.loc[strongest].sort_values("event")
    last = max(events["hours_since_admission"].max(), 1e-3)
    reach = max(events["attribution"].abs().max(), 1e-9)

    def across(hours: float) -> float:
        return round(78 + 867 * min(hours, last) / last, 1)

    risks = []
    for row in trajectory.sort_values("hours_since_admission").itertuples():
        risks.append(f"{across(row.hours_since_admission)},{125 - 100 * row.probability:.1f}")
    stems = []
    for row in drawn.itertuples():
        words = f"{row.hours_since_admission:.1f} h: {row.event_text} ({_signed(row.attribution)})"
        tip = round(265 - 90 * row.attribution / reach, 1)
        color = VERMILLION if row.attribution >= 0 else BLUE
        stems.append((across(row.hours_since_admission), tip, color, words))
    ticks = [(across(hours), f"{hours:g}") for hours in MaxNLocator(9).tick_values(0, last) if 0 <= hours <= last]
    note = "" if len(drawn) == len(events) else f"The {len(drawn):,} strongest of {len(events):,} events are drawn. "
    return {
        "ticks": ticks,
        "reach": f"+{reach:.2g}",
        "risks": " ".join(risks),
        "events": stems,
        "note": note,
    }


def _calibration_sentence(table: pd.DataFrame | None, probability: float) -> str:
    """Say what became of the stays with about this risk."""
    if table is None:
        return "There are too few stays to say how far a risk of this size can be trusted."
    row = table.loc[(table["mean_risk"] - probability).abs().idxmin()]
    interval = f"95 % interval {100 * row['low']:.0f} to {100 * row['high']:.0f} %"
    died = f"{row['deaths']:.0f} died: {100 * row['observed_rate']:.0f} %, {interval}."
    return f"Of the {row['n']:.0f} stays with the most similar risks (mean {_percent(row['mean_risk'])}), {died}"


def _decisive_sentence(decisive: pd.DataFrame) -> str:
    """Say without which events the decision would be another one."""
    if "threshold" not in decisive or not len(decisive):
        return ""
    row = decisive.iloc[0]
    which = "this event" if len(decisive) == 1 else f"these {len(decisive)} events"
    texts = "; ".join(_short_text(text, 80) for text in decisive["event_text"])
    without = f"{_percent(row['probability_without'])} instead of {_percent(row['probability'])}"
    return f"Without {which} the risk would be {without}, on the other side of {_percent(row['threshold'])}: {texts}."


def _cells(table: pd.DataFrame, **written: Callable[[Any], str]) -> list[tuple[str, ...]]:
    """Return the cells of a table for the report: the columns named, each as its function writes it."""
    if not len(table):
        return []
    columns = [table[name].map(write) for name, write in written.items()]
    return list(zip(*columns))


def _stay_context(
    stay: Any,
    tables: Tables,
    calibration: pd.DataFrame | None,
    temperature: float,
) -> dict[str, Any]:
    """Return what the template says of one stay, a row of `stays`."""
    parts = {}
    for name in ("events", "statics", "trajectory", "systems", "decisive"):
        table = tables.get(name, pd.DataFrame(columns=["icu_stay_id"]))
        parts[name] = _of_stay(table, stay.icu_stay_id)
    events, statics = (
        parts["events"],
        parts["statics"].sort_values("attribution", key=abs, ascending=False),
    )
    towards = events[events["attribution"] >= FLOOR].nlargest(EVENTS_LISTED, "attribution")
    away = events[events["attribution"] <= -FLOOR].nsmallest(EVENTS_LISTED, "attribution")
    start = f"{_percent(expit(stay.baseline_logit / temperature))} (logit {_signed(stay.baseline_logit)})"
    sums = f"A stay whose events say nothing starts at {start}. The {_count(len(events), 'event')} add "
    sums += f"{_signed(events['attribution'].sum())}, patient and admission {_signed(statics['attribution'].sum())}, "
    sums += f"which gives logit {_signed(stay.logit)}: {_percent(stay.probability)}."
    place = f"Percentile {stay.risk_percentile:.0f} of the risks of all held-out stays. "
    return {
        "icu_stay_id": stay.icu_stay_id,
        "why_shown": stay.why_shown,
        "risk": _percent(stay.probability),
        "outcome": _outcome(stay.label),
        "place": place + _calibration_sentence(calibration, stay.probability),
        "sums": sums,
        "gap": "" if stay.complete else _signed(stay.gap_error),
        "decisive": _decisive_sentence(parts["decisive"]),
        "timeline": _timeline(events, parts["trajectory"]),
        "towards": _event_rows(towards, temperature),
        "away": _event_rows(away, temperature),
        "systems": _cells(parts["systems"], system=str, n_events=str, push=_signed),
        "statics": _cells(
            statics,
            feature=str,
            value=_plain_number,
            attribution=_signed,
            ablation=_signed,
        ),
    }


def _cohort_sentence(stays: pd.DataFrame) -> str:
    """Say how many stays were explained, how they ended, and whether the parts add up."""
    known = stays["label"].dropna()
    ends = "Their outcomes are unknown."
    if len(known):
        of_known = "" if len(known) == len(stays) else " of known outcome"
        ends = f"{int(known.sum()):,} of {_count(len(known), 'stay')}{of_known} ended with death in hospital."
    who = f"{_count(len(stays), 'held-out stay')} of {_count(stays['patient_id'].nunique(), 'patient')}"
    flagged = int((~stays["complete"].astype(bool)).sum())
    adds = f"For all{f' but {flagged}' if flagged else ''} of them the parts add up to the prediction."
    n_events, n_replaced = stays["n_events"].sum(), stays["n_replaced"].sum()
    if n_replaced < n_events:
        adds += (
            f" {n_replaced:,} events, the strongest of each stay, were replaced one by one; in orders of replacement "
        )
        adds += "the others stand as 0."
    return f"{who} with {_count(n_events, 'event')}. {ends} {adds}"


def _level_cells(levels: pd.DataFrame, items: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Return the names of the columns, far below to far above, and for each item its mean push (events) in each."""
    order = ["far below range", "slightly below range", "below range", "within range"]
    order += ["slightly above range", "above range", "far above range"]
    found = levels["level"].unique()
    names = [name for name in order if name in found] + sorted(set(found) - set(order))
    parts = pd.concat([items.assign(level="all"), levels])
    parts["cell"] = parts["push"].map(_signed) + " (" + parts["n_events"].astype(str) + ")"
    cells = parts.pivot(index="item", columns="level", values="cell")
    cells = cells.reindex(index=items["item"], columns=["all", *names]).fillna("")
    return list(cells), cells.reset_index().to_numpy().tolist()


def _check_rows(faithfulness: pd.DataFrame) -> list[list[str]]:
    """Return the cells of each check: what is asked, what was found, the result."""
    results = {True: "passed", False: "falls short"}
    rows = []
    for row in faithfulness.itertuples():
        asked = CHECK_WORDS[row.check].format(method=METHOD_WORDS[row.method])
        rows.append([asked[0].upper() + asked[1:], row.sentence, results.get(row.passed, "not judged")])
    return rows


def _checks_in_words(checks: list[list[str]], verdict: pd.DataFrame | None) -> str:
    """Say how many checks are passed, and which are not; none is counted where the verdict warns."""
    if verdict is not None and verdict["passed"].eq(False).any():
        return "The verdict warns: how right the explanations are says nothing about patients."
    fallen = [asked for asked, _, result in checks if result == "falls short"]
    n_judged = len(fallen) + sum(result == "passed" for _, _, result in checks)
    words = f"{n_judged - len(fallen)} of {n_judged} checks with a threshold are passed."
    if fallen:
        words += f" Trust the explanations less, since this falls short: {'; '.join(fallen)}."
    return words


def _png_of(figure: Figure, dpi: int = 100) -> bytes:
    """Return a figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def _picture(figure: Figure) -> dict[str, str]:
    """Return a figure as the base64 of its PNG, with its question for those who cannot see it."""
    data = base64.b64encode(_png_of(figure, 150)).decode("ascii")
    return {"data": data, "question": " ".join(figure.get_suptitle().split())}


def _stay_links(shown: pd.DataFrame) -> list[list[Any]]:
    """Return the cells of the stays shown in full, the first a link to its section."""
    rows: list[list[Any]] = []
    for row in shown.itertuples():
        link = Markup('<a href="#stay-{0}">Stay {0}</a>').format(row.icu_stay_id)
        rows.append([link, row.why_shown, _percent(row.probability), _outcome(row.label)])
    return rows


def _calibration_of(labels: np.ndarray, risks: np.ndarray) -> pd.DataFrame | None:
    """Return the calibration of (n,) stays of known outcome; None where they are too few, below 20."""
    known = ~np.isnan(labels)
    if known.sum() < 20:
        return None
    return calibration_table(
        labels[known],
        risks[known],
        n_bins=int(np.clip(known.sum() // 10, 2, 10)),
    )


def _template() -> Template:
    """Return the report's template; every text that goes into it is escaped."""
    environment = Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"signed": _signed, "percent_of": lambda share: f"{100 * share:.0f} %"}
    return environment.from_string(REPORT)


def _render_report(tables: Tables, pictures: dict[str, dict[str, str]], info: dict[str, Any]) -> str:
    """Return the whole report.html: verdict, cohort, each stay with `why_shown`, the checks, the technical appendix.

    tables: stays, events, statics, trajectory, windows, faithfulness, and where present verdict, items, levels,
    systems, decisive; pictures: what `_picture` makes of figures, by file name without .png; info: text_encoder, and
    optionally data, checkpoint, setting (a sentence: which events the model sees), temperature (probability =
    sigmoid(logit / temperature)) and calibration (as `calibration_table` gives it, of all test stays; else of the
    explained stays, from 20).
    """
    stays, temperature = tables["stays"], info.get("temperature", 1.0)
    of_explained = _calibration_of(stays["label"].to_numpy(float), stays["probability"].to_numpy())
    calibration = info.get("calibration", of_explained)
    shown = stays[stays["why_shown"] != ""].sort_values("probability", ascending=False)
    words = {"data": "data", "checkpoint": "checkpoint", "text_encoder": "text encoder"}
    facts = [f"{word}: {info[key]}" for key, word in words.items() if info.get(key)]
    items, levels = tables.get("items"), tables.get("levels")
    level_names, level_rows = ([], []) if items is None or levels is None else _level_cells(levels, items)
    verdict = tables.get("verdict")
    checks, windows = _check_rows(tables["faithfulness"]), tables.get("windows")
    return _template().render(
        appendix=APPENDIX,
        blue=BLUE,
        calibration=calibration,
        checks=checks,
        cohort=_cohort_sentence(stays),
        disclaimer=DISCLAIMER,
        doubling=math.log(2) * temperature,
        event_columns=EVENT_COLUMNS,
        facts=" · ".join(facts),
        floor=FLOOR,
        items=[] if items is None else items["sentence"][items["rho"].abs() >= 0.3].tolist(),
        level_names=[f"#{name}" for name in level_names],
        levels=level_rows,
        most=EVENTS_LISTED,
        pictures=pictures,
        setting=info.get("setting", ""),
        shown=_stay_links(shown),
        stays=[_stay_context(row, tables, calibration, temperature) for row in shown.itertuples()],
        summary=_checks_in_words(checks, verdict),
        verdict=[] if verdict is None else verdict["sentence"].tolist(),
        verdict_holds=verdict is None or bool(verdict["passed"].ne(False).all()),
        window_columns=WINDOW_COLUMNS,
        windows=[] if windows is None else _cells(windows, **WINDOW_WORDS),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------

STAY_TABLES = ("events", "statics", "groups")  # written while stays are explained
STAYS_A_PART = 100  # that are written at a time
TABLE_FILES = {
    "stays": "stays.csv",
    "events": "event_attributions.parquet",
    "statics": "static_attributions.csv",
    "groups": "group_importance.csv",
    "layers": "layer_attributions.parquet",
    "heads": "head_roles.csv",
    "query_similarity": "query_similarity.csv",
    "windows": "time_windows.csv",
    "verdict": "verdict.csv",
    "trajectory": "risk_trajectories.csv",
    "curves": "deletion_insertion.csv",
    "items": "item_importance.csv",
    "levels": "item_levels.csv",
    "systems": "organ_systems.csv",
    "decisive": "decisive_events.csv",
}


LOGGED_FINDINGS = (
    "discrimination",
    "calibration",
    "patients",
    "time",
    "quick",
)  # of the verdict, beside what warns
ITEMS_LOGGED = 5


class Explanation(dict[str, Any]):
    """The tables of an analysis: `found.events` is `found["events"]`; a notebook shows its report and its figures.

    >>> run_explainability_analysis(checkpoint).events["attribution"].sum()  # doctest: +SKIP
    """

    def __init__(self, tables: dict[str, Any], text_encoder: str, report: Path | None) -> None:
        super().__init__(tables)
        self.text_encoder, self.report = text_encoder, report

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"an explanation has no {name}; its tables are {', '.join(self)}")

    def __repr__(self) -> str:
        sizes = [f"{name} ({len(table):,})" for name, table in self.items() if isinstance(table, pd.DataFrame)]
        return f"Explanation of {len(self['stays'])} stays; tables: {', '.join(sizes)}; report: {self.report}"

    @functools.cached_property
    def figures(self) -> dict[str, Figure]:
        """The pictures by name; each shows itself where a notebook's cell ends with it."""
        drawn = draw_figures(self, _caption_of(self, self.text_encoder))
        for figure in drawn.values():
            setattr(figure, "_repr_png_", functools.partial(_png_of, figure))  # noqa: B010 (what notebooks look for)
        return drawn

    def _repr_html_(self) -> str:
        if self.report is None or not self.report.exists():
            return self["stays"].to_html(index=False)
        page = html.escape(self.report.read_text("utf-8"), quote=True)
        return f'<iframe srcdoc="{page}" style="width:100%;height:50rem;border:1px solid #ddd"></iframe>'


def _caption_of(tables: Tables, text_encoder: str) -> str:
    """Return what stands below every picture: whose stays these are, and what read their texts."""
    stays = tables["events"].drop_duplicates("icu_stay_id")
    n_patients = stays["patient_id"].nunique()
    return f"{_count(len(stays), 'held-out stay')} of {_count(n_patients, 'patient')} · text encoder: {text_encoder}"


def run_explainability_analysis(
    checkpoint_path: str | Path = ExplainSettings.checkpoint,
    test_data_path: str | Path | pd.DataFrame = ExplainSettings.data,
    save_dir: str | Path | None = ExplainSettings.save_dir,
    **options: Any,
) -> Explanation:
    """Explain held-out stays with a checkpoint alone; return the tables, and write them and the pictures.

    The data default to the checkpoint's own and may be a data frame; `save_dir` defaults to a folder beside the
    checkpoint's, None writes nothing.

    `options` are fields of `ExplainSettings` (stays, max_stays, text_encoder, cache_dir, seed, ...). The keys of the
    result are those of `TABLE_FILES`, faithfulness and attention. Raises `InputError` for what the caller can mend.

    >>> tables = run_explainability_analysis("best_model.pth", "new.csv", save_dir=None, stays=2)  # doctest: +SKIP
    """
    if not logger.handlers and ("ipykernel" in sys.modules or not logging.root.handlers):  # nobody would see the log
        train.log_to_stdout()
    if not isinstance(checkpoint_path, str | os.PathLike):
        raise InputError(
            f"the checkpoint is the path of a best_model.pth, not a {type(checkpoint_path).__name__}; data come second."
        )
    is_frame = isinstance(test_data_path, pd.DataFrame)
    folder = train.run_folder(checkpoint_path) / "explainability" if save_dir == "" else save_dir
    try:
        settings = ExplainSettings(
            checkpoint=str(checkpoint_path),
            data="the data frame" if is_frame else str(test_data_path),
            save_dir=str(folder or ""),
            **options,
        )
    except TypeError as error:
        reason = str(error).split("() ")[-1]
        words = f"run_explainability_analysis: {reason}; the options are the fields of ExplainSettings."
        raise InputError(words) from None
    train.check_limits(settings)
    settings = _in_half_a_minute(settings) if settings.quick else settings
    given = (
        settings.text_encoder,
        settings.cache_dir,
        settings.hf_cache,
        settings.labels,
        settings.memory_limit,
    )
    run = _load_run(settings.checkpoint, test_data_path, *given)
    own = run.checkpoint.settings
    settings = replace(settings, data=settings.data or own.test_data or own.data)
    with contextlib.nullcontext(lambda found: None) if folder is None else _stay_files(Path(folder)) as write:
        tables = _explain(run, settings, write)
    _log_what_was_found(tables)
    found = {name: tables[name] for name in (*TABLE_FILES, "faithfulness", "attention")}
    if folder is None:
        return Explanation(found, run.checkpoint.text_encoder, None)
    _write_everything(Path(folder), run, tables, settings)
    logger.info(f"Written     {Path(folder) / 'report.html'}, and its tables and pictures beside it")
    return Explanation(found, run.checkpoint.text_encoder, Path(folder) / "report.html")


def _log_what_was_found(tables: Tables) -> None:
    """Log what a person needs: the verdict, whether the explanations hold, and what matters most."""
    verdict, items, stays = tables["verdict"], tables["items"], tables["stays"]
    said = verdict[verdict["name"].isin(LOGGED_FINDINGS) | verdict["passed"].eq(False)]
    for finding in said.itertuples():
        level = logging.WARNING if finding.passed is False else logging.INFO
        logger.log(level, f"Verdict     {finding.sentence}")
    logger.info(f"Checks      {_checks_in_words(_check_rows(tables['faithfulness']), verdict)}")
    if verdict.loc[verdict["name"].eq("discrimination"), "passed"].eq(False).any():
        return  # what such a model finds are no findings
    for sentence in items["sentence"][:ITEMS_LOGGED]:
        logger.info(f"Findings    {sentence}")
    stay = _shown_stay(stays)
    sentence = _decisive_sentence(_of_stay(tables["decisive"], stay))
    if sentence:
        logger.info(f"Stay        {stay}, of the highest risk: {sentence}")


def _in_half_a_minute(settings: ExplainSettings) -> ExplainSettings:
    """Return the settings of --quick: fewer stays, checks and resamples of each, never more than was asked for."""
    most = {"max_stays": 12, "checked_stays": 4, "layer_stays": 0, "shapley_orders": 0}
    most |= {"max_replacements": 50, "n_bootstrap": 200}
    fewer: dict[str, Any] = {name: min(getattr(settings, name) or limit, limit) for name, limit in most.items()}
    return replace(settings, **fewer, stays=min(settings.stays, 2))


def _write_everything(
    folder: Path,
    run: _Run,
    tables: dict[str, Any],
    settings: ExplainSettings,
) -> None:
    """Write tables, faithfulness.json, the pictures and the report; the one place that writes."""
    for name, file in TABLE_FILES.items():
        if name in STAY_TABLES:
            continue
        train.write_whole(folder / file, functools.partial(_write_table, tables[name], file))
    train.write_json(folder / "faithfulness.json", _faithfulness_record(run, tables))
    figures = draw_figures(tables, _caption_of(tables, run.checkpoint.text_encoder))
    pictures = {name: _picture(figure) for name, figure in figures.items()}  # drawn once
    for name, picture in pictures.items():
        png = base64.b64decode(picture["data"])
        train.write_whole(folder / f"{name}.png", functools.partial(Path.write_bytes, data=png))
    info = {
        "data": train.data_in_words(settings.data),
        "checkpoint": Path(settings.checkpoint).name,
        "text_encoder": run.checkpoint.text_encoder,
        "setting": train.moment_of_prediction(
            run.checkpoint.settings.observation_hours,
            run.checkpoint.settings.labels,
        ),
        "temperature": run.checkpoint.temperature,
        "calibration": _calibration_of(run.table.labels, run.checkpoint.probabilities(run.logits)),
    }
    page_text = _render_report(tables, pictures, info)
    train.write_whole(folder / "report.html", lambda path: path.write_text(page_text, "utf-8"))


@contextlib.contextmanager
def _stay_files(folder: Path) -> Iterator[Callable[[_Explained], None]]:
    """Yield what appends a stay's tables to files; they appear in the folder when all stays are done."""
    folder.mkdir(parents=True, exist_ok=True)
    waiting: list[tuple[pd.DataFrame, ...]] = []
    parquet: list[pq.ParquetWriter] = []  # the one of the events, once their columns are known

    with tempfile.TemporaryDirectory(prefix=".partial_", dir=folder) as hidden:

        def append_waiting() -> None:
            for name, parts in zip(STAY_TABLES, zip(*waiting)):
                table, path = pd.concat(parts, ignore_index=True), Path(hidden) / TABLE_FILES[name]
                if path.suffix == ".csv":
                    table.to_csv(
                        path,
                        mode="a",
                        header=not path.exists(),
                        index=False,
                        float_format="%.6g",
                    )
                    continue
                schema = parquet[0].schema if parquet else None
                rows = pa.Table.from_pandas(table, schema, preserve_index=False)
                if not parquet:
                    parquet.append(pq.ParquetWriter(path, rows.schema))
                parquet[0].write_table(rows)
            waiting.clear()

        def add(found: _Explained) -> None:
            waiting.append(tuple(getattr(found, name) for name in STAY_TABLES))
            if len(waiting) == STAYS_A_PART:
                append_waiting()

        try:
            yield add
            append_waiting()
        finally:
            for writer in parquet:
                writer.close()
        for path in Path(hidden).iterdir():
            path.replace(folder / path.name)


def _write_table(table: pd.DataFrame, file: str, path: Path) -> None:
    if file.endswith("parquet"):
        table.to_parquet(path, index=False)
    else:
        table.to_csv(path, index=False, float_format="%.6g")


def _faithfulness_record(run: _Run, tables: dict[str, Any]) -> dict[str, Any]:
    """Return what faithfulness.json holds: the verdict, every check in plain words, and the curves behind the first."""
    curves = _with_one_random_order(tables["curves"])
    means = curves.groupby(["direction", "order", "fraction"])["change"].mean().reset_index()
    return {
        "text_encoder": run.checkpoint.text_encoder,
        "stays": len(tables["stays"]),
        "held_out_split": run.held_out,
        "verdict": _plain_rows(tables["verdict"]),
        "checks": _plain_rows(tables["faithfulness"]),
        "curves": _plain_rows(means),
    }


def _plain_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows as dicts without NaN, which is not JSON."""
    return json.loads(table.to_json(orient="records", double_precision=15))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit code."""
    settings = train.settings_from(argv, ExplainSettings, __doc__)
    train.log_to_stdout()
    options = asdict(settings)
    places = [options.pop(name) for name in ("checkpoint", "data", "save_dir")]
    work = functools.partial(run_explainability_analysis, *places, **options)
    return train.exit_code(work, lambda: "Nothing half-written is left.")


if __name__ == "__main__":
    sys.exit(main())
