"""Show what a trained model bases each prediction on, and measure how far that explanation can be trusted.

    python explain_clinicalLF.py                                     # the bundled sample, after `python train.py`
    python explain_clinicalLF.py --data PATH/TO/mimic-iv --stays 4   # held-out stays of that data, four shown in full
    python explain_clinicalLF.py --checkpoint best_model.pth --data NEW.csv --save-dir OUT
    python explain_clinicalLF.py --selfcheck                         # does the method find planted causes? exits 1 if not

Four views of one model, on the logit (log-odds of death) and never on the probability, which saturates:
Integrated Gradients (what moves the logit from the average stay to this one), replacement (the logit if one event were unremarkable),
attention (where the model looks), and the layers between. They differ; `faithfulness.json` says how much each is worth.

Axes: B stays, L events of a stay, C = 774 inputs of an event, S static inputs, H heads. Masks are True at real events.
Explains this model, not causes of death. Research software: not a medical device, not for clinical use.
"""

from __future__ import annotations

import base64
import copy
import importlib.util
import io
import json
import logging
import math
import re
import sys
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from captum.attr import IntegratedGradients, LayerIntegratedGradients
from jinja2 import Environment, StrictUndefined
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
from tqdm import tqdm

import train
from train import (
    BLUE,
    EVENT_TYPES,
    GREEN,
    GREY,
    LABEL,
    ORANGE,
    VERMILLION,
    ClinicalTransformer,
    InputError,
    calibration_table,
    new_figure,
    tidy,
)

__all__ = [
    "ExplainSettings",
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
MAX_MAP_EVENTS, MAX_MAP_BINS = 3000, 64  # layer maps grow with the square of the events
GRADIENT_EVENTS, FORWARD_EVENTS = 2048, 8192  # events per pass: some 100 kB each with, 30 kB without gradients
FLOOR = 0.05  # logit; effects below it are too small to call shared or not


@dataclass(frozen=True)
class ExplainSettings:
    """What a person may want to change; everything about the model comes from its checkpoint.

    >>> ExplainSettings(stays=2).max_stays
    100
    """

    checkpoint: str = train.option("trained_models/clinical_LF/checkpoints/best_model.pth", "Checkpoint to explain.")
    data: str = train.option(
        "sample_train.csv", "MIMIC-IV folder, nested Parquet or flat table; its held-out stays are used."
    )
    save_dir: str = train.option(
        "trained_models/clinical_LF/explainability", "Folder for figures, tables and the report."
    )
    stays: int = train.option(
        4, "Stays shown in full: highest, lowest, most uncertain, most wrong, and so on in turn.", low=0
    )
    max_stays: int = train.option(100, "Held-out stays analysed at most, drawn at random; 0 takes all.", low=0)
    text_encoder: str = train.option("", "Encoder of the checkpoint, if it was a local folder; else it is known.")
    labels: str = train.option("", "Labels of a MEDS data set, if other than the checkpoint's own.")
    cache_dir: str = train.option("clinical_LF_precomp_emb", "Folder of the embedding cache.")
    hf_cache: str = train.option("hf_cache", "Folder of downloaded encoder weights.")
    max_replacements: int = train.option(
        500, "Events of a stay replaced one by one at most, the most attributed first; 0: every event.", low=0
    )
    layer_stays: int = train.option(20, "Stays attributed to layers at most (those shown in full always are).", low=0)
    ig_steps: int = train.option(
        50, "Steps of Integrated Gradients; tried again with four times as many where it is not complete.", low=2
    )
    untrained_models: int = train.option(
        4, "Untrained models that show what heads do without any training (at least 4).", low=4
    )
    decision_threshold: float = train.option(
        0.5, "Risk at which a decision would change: without which events would it?", above=0, below=1
    )
    checked_stays: int = train.option(
        40, "Stays on which deletion, infidelity and randomisation are measured at most.", low=0
    )
    n_bootstrap: int = train.option(1000, "Bootstrap samples behind every 95 % interval.", low=1)
    seed: int = train.option(0, "Seed of the choice of stays, random orders, untrained models and the bootstrap.")
    selfcheck: bool = train.option(False, "Check the explanations on synthetic stays whose causes are known, and stop.")
    selfcheck_seeds: int = train.option(5, "Samples made and models trained by --selfcheck.", low=1)
    selfcheck_stays: int = train.option(2000, "Stays that each of these models is trained on.", low=100)
    selfcheck_epochs: int = train.option(50, "Epochs at most of each of these models.", low=1)


# ---------------------------------------------------------------------------------------------------------------------
# Load
# ---------------------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A trained model and the stays it is explained on, which it has not seen in training."""

    checkpoint: train.Checkpoint
    table: train.StayTable
    dataset: train.ClinicalSequenceDataset
    logits: np.ndarray  # (n_stays) float64
    held_out: bool  # patients of the checkpoint's own test split; False: none of its patients is in the data

    def inputs(self, stay: int) -> tuple[Tensor, Tensor]:
        """(1, L, C) events and (1, S) static inputs of a stay, where the model is."""
        sequence, static, _ = self.dataset[stay]
        device = next(self.checkpoint.model.parameters()).device
        return sequence.unsqueeze(0).to(device), static.unsqueeze(0).to(device)


def load_run(
    checkpoint_path: str | Path,
    test_data_path: str | Path = "sample_train.csv",
    text_encoder: str = "",
    cache_dir: str | Path = "clinical_LF_precomp_emb",
    hf_cache: str | Path = "hf_cache",
    labels: str = "",
) -> Run:
    """Checkpoint and the stays of the data whose patients it was neither trained nor tuned on, in its own cohort settings.

    Raises `InputError` where a file cannot be read, the encoder is another one, or no such stay exists.
    """
    accelerator = full_precision()
    checkpoint = train.load_checkpoint(checkpoint_path, accelerator.device)
    trained = replace(checkpoint.settings, labels=labels or checkpoint.settings.labels)
    table, _ = train.read_stays(
        train.data_path(str(test_data_path)), cache_dir, need_label=False, task=trained.meds_task
    )
    settings = replace(
        trained,
        data=str(test_data_path),
        cache_dir=str(cache_dir),
        hf_cache=str(hf_cache),
        text_encoder=train.encoder_to_load(checkpoint, text_encoder),
    )
    table, _ = train.choose_cohort(table, settings)
    patients = table.stays.patient_id
    seen = patients.isin(checkpoint.patients["train"] + checkpoint.patients["validation"])
    if seen.all():
        raise InputError(
            f"{test_data_path}: all {len(patients)} stays are of patients that this model was trained or tuned on; "
            "explaining them would flatter it. Give --data with other patients."
        )
    held_out = bool(patients.isin(checkpoint.patients["test"]).any())
    table = table.take(np.flatnonzero(~seen)).with_own_texts()
    _, vectors = train.embed_texts(table.texts, settings, accelerator, expected=checkpoint.text_encoder)
    return make_run(checkpoint, table, vectors, held_out, accelerator)


def full_precision() -> Accelerator:
    """Return the process's accelerator, also one that trained in bf16, without autocast: differences of logits need all digits."""
    return Accelerator(kwargs_handlers=[AutocastKwargs(enabled=False)])


def make_run(
    checkpoint: train.Checkpoint, table: train.StayTable, vectors: np.ndarray, held_out: bool, accelerator: Accelerator
) -> Run:
    """Score the stays and keep all that an explanation needs."""
    dataset = train.ClinicalSequenceDataset(table, checkpoint.preprocessor, vectors)
    logits = train.predict_logits(checkpoint.model, dataset, checkpoint.settings, accelerator)
    return Run(checkpoint, table, dataset, logits, held_out)


def choose_stays(run: Run, shown: int, most: int, seed: int) -> tuple[list[int], dict[int, str]]:
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
    others = np.random.default_rng(seed).permutation([stay for stay in range(len(risk)) if stay not in why])
    chosen = [*why, *others.tolist()]
    return sorted(chosen[: max(most, len(why))] if most else chosen), why


# ---------------------------------------------------------------------------------------------------------------------
# Attend
# ---------------------------------------------------------------------------------------------------------------------


class Attention(NamedTuple):
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
def attend(model: ClinicalTransformer, sequence: Tensor, static: Tensor) -> Attention:
    """Attention of the pass over one stay, (1, L, C) and (1, S); the layers' of its last 3,000 events where it is longer."""
    is_event = torch.ones(sequence.shape[:2], dtype=torch.bool, device=sequence.device)
    layers = _ReducedMaps()
    recent = max(0, sequence.shape[1] - MAX_MAP_EVENTS)
    events = model.encode(sequence, is_event, None if recent else layers)  # (L, D)
    if recent:
        model.encode(sequence[:, recent:], is_event[:, recent:], layers)
    query = model.query_vector.expand(1, -1, -1)
    pooling = model.attention_pooling(query, events.unsqueeze(0), is_event)[1][0, :, 0]  # (Hp, L)
    received, maps, means = zip(*layers)
    rollout = attention_rollout(list(means), pooling.mean(0)[recent:])
    pad = lambda x, value: F.pad(x, (recent, 0), value=value).cpu().numpy()
    return Attention(
        pooling.cpu().numpy(),
        pad(torch.stack(received), math.nan),
        torch.stack(maps).cpu().numpy(),
        pad(rollout, math.nan),
        query_key_scores(model, events).cpu().numpy(),
    )


def attention_rollout(layer_maps: Sequence[Tensor], pooling: Tensor) -> Tensor:
    """(L,): pooling weights (L,) times the product of (map + identity) / 2 over layers (L, L), first layer last.

    Abnar & Zuidema 2020; the skip connection counts as much as attention. A vector times matrices: no (L, L) product.
    """
    share = pooling / pooling.sum()
    for weights in reversed(layer_maps):
        share = 0.5 * share + 0.5 * share @ weights
    return share


def query_key_scores(model: ClinicalTransformer, events: Tensor) -> Tensor:
    """(Hp, L): the pooling query's scaled similarity with the key of each event (L, D), before the softmax."""
    pooling = model.attention_pooling
    query = pooling.query_projection(model.query_vector)[0, 0].unflatten(0, (pooling.n_heads, -1))  # (Hp, D/Hp)
    keys = pooling.key(events).unflatten(1, (pooling.n_heads, -1))  # (L, Hp, D/Hp)
    return torch.einsum("hd,lhd->hl", query, keys) / math.sqrt(query.shape[1])


def untrained_like(model: ClinicalTransformer, seed: int) -> ClinicalTransformer:
    """The same architecture and input statistics with fresh random weights."""
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = ClinicalTransformer(**model.architecture)
    fresh.set_input_statistics(model.event_mean.cpu(), model.event_scale.cpu(), model.static_weight.cpu())
    return fresh.to(device).eval()


def with_new_classifier(model: ClinicalTransformer, seed: int) -> ClinicalTransformer:
    """A copy whose classifier alone is as before training."""
    changed = copy.deepcopy(model)
    changed.classifier.load_state_dict(untrained_like(model, seed).classifier.state_dict())
    return changed


# ---------------------------------------------------------------------------------------------------------------------
# Attribute
# ---------------------------------------------------------------------------------------------------------------------


class Attribution(NamedTuple):
    """Integrated Gradients of the logit; events and statics of a stay sum to logit - baseline_logit, up to gap_error."""

    events: Tensor  # (B, L, C), exactly 0 at padding
    statics: Tensor  # (B, S)
    logits: np.ndarray  # (B,) float64
    baseline_logits: np.ndarray
    gap_errors: np.ndarray  # (B,) sum of the attributions minus the difference of the logits
    n_steps: np.ndarray  # (B,) steps that were taken in the end
    complete: np.ndarray  # (B,) bool: |gap error| <= 0.02 + 0.01 * |difference|


def is_complete(gap_error: float, difference: float) -> bool:
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
    """Integrated Gradients of (B, L, C) events and (B, S) statics on the logit, from a baseline event and baseline statics.

    `baseline` is the checkpoint's: the mean training event at every position and the mean statics; None is zeros. Stays
    are done one by one, without padding. Where the sum misses the difference of logits it is done again with 4 times the
    steps. Raises ValueError for NaN or infinite inputs of real events.

    >>> found = captum_analysis(model, sequences, static_features, attention_mask)
    >>> found.events.shape == sequences.shape and bool(found.complete.all())
    True
    """
    model.eval()
    attributions, statics, rows = torch.zeros_like(sequences), torch.zeros_like(static_features), []
    for stay, is_event in enumerate(event_mask(sequences, attention_mask)):
        length = int(is_event.nonzero().max()) + 1 if is_event.any() else 0
        arguments = (
            sequences[stay : stay + 1, :length],
            static_features[stay : stay + 1],
            is_event[None, :length],
            baseline,
        )
        check_finite(*arguments[:3])
        *found, row = integrated_gradients(model, *arguments, n_steps)
        if retry and not row[-1]:
            *found, row = integrated_gradients(model, *arguments, 4 * n_steps)
        attributions[stay, :length], statics[stay] = found[0][0], found[1][0]
        rows.append(row)
    columns = [np.array(column) for column in zip(*rows)]
    return Attribution(attributions, statics, *columns)


def event_mask(sequences: Tensor, attention_mask: Tensor | np.ndarray | None) -> Tensor:
    """Return (B, L) bool, True at real events, from a mask of any number type; None: every event is real."""
    if attention_mask is None:
        return torch.ones(sequences.shape[:2], dtype=torch.bool, device=sequences.device)
    mask = torch.as_tensor(attention_mask, device=sequences.device).bool()
    if mask.shape != sequences.shape[:2]:
        raise ValueError(
            f"attention_mask is {tuple(mask.shape)}; it must be {tuple(sequences.shape[:2])}, as the events."
        )
    return mask


def check_finite(sequence: Tensor, static: Tensor, is_event: Tensor) -> None:
    if not (torch.isfinite(sequence[is_event]).all() and torch.isfinite(static).all()):
        raise ValueError(
            "an input of a real event or a static input is NaN or infinite: nothing can be attributed to it. "
            "Look for missing text vectors, or for times that were not encoded."
        )


def baselines_like(sequence: Tensor, static: Tensor, baseline: dict[str, Tensor] | None) -> tuple[Tensor, Tensor]:
    """(1, L, C) and (1, S): the baseline event at every position, and the baseline statics."""
    if baseline is None:
        return torch.zeros_like(sequence), torch.zeros_like(static)
    return baseline["event"].to(sequence).expand_as(sequence), baseline["static"].to(static).expand_as(static)


def integrated_gradients(
    model: ClinicalTransformer,
    sequence: Tensor,
    static: Tensor,
    is_event: Tensor,
    baseline: dict[str, Tensor] | None,
    n_steps: int,
) -> tuple[Tensor, Tensor, tuple]:
    """One stay: attributions (1, L, C) and (1, S), and the row (logit, baseline logit, gap error, steps, complete)."""
    sequence = torch.where(is_event[..., None], sequence, 0)  # what padding holds must not become 0 * NaN
    starts = baselines_like(sequence, static, baseline)
    steps_per_pass = max(1, GRADIENT_EVENTS // max(1, sequence.shape[1]))
    events, statics = IntegratedGradients(model.logits).attribute(
        (sequence, static),
        starts,
        additional_forward_args=(is_event,),
        n_steps=n_steps,
        method="gausslegendre",
        internal_batch_size=steps_per_pass,
    )
    events = events * is_event[..., None]
    with torch.no_grad():
        logit, start = (float(model.logits(*pair, is_event)) for pair in ((sequence, static), starts))
    gap = float(events.double().sum() + statics.double().sum()) - (logit - start)
    return events.detach(), statics.detach(), (logit, start, gap, n_steps, is_complete(gap, logit - start))


def event_parts(input_dim: int, value_channel: bool = False) -> dict[str, slice]:
    """Which of an event's inputs are its type, its text, its time and (with the value channel) its value."""
    n_types, last = len(EVENT_TYPES), input_dim - (2 if value_channel else 0)
    return {
        "type": slice(0, n_types),
        "text": slice(n_types, last - 1),
        "time": slice(last - 1, last),
        "value": slice(last, input_dim),
    }


def sum_over_columns(values: np.ndarray, names: Sequence[tuple[str, str | None]]) -> dict[str, float]:
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
    mask = event_mask(sequences, attention_mask)
    check_finite(sequences, static_features, mask)
    layers: dict[str, nn.Module] = {"input_projection": model.input_projection}
    layers |= {f"encoder layer {number}": layer for number, layer in enumerate(model.transformer_encoder, start=1)}
    rows = []
    for name, layer in layers.items():
        attributions, gaps, complete = np.zeros(mask.shape), [], []
        for stay, is_event in enumerate(mask):
            sequence, static = sequences[stay : stay + 1, is_event], static_features[stay : stay + 1]
            found, gap, is_full = layer_attribution(model, layer, sequence, static, baseline, n_steps)
            attributions[stay, is_event.cpu()] = found
            gaps.append(gap)
            complete.append(is_full)
        row = {"attribution": attributions, "gap_error": np.array(gaps), "complete": np.array(complete)}
        rows.append({"layer": name, **row})
    return rows


def layer_attribution(
    model: ClinicalTransformer,
    layer: nn.Module,
    sequence: Tensor,
    static: Tensor,
    baseline: dict[str, Tensor] | None,
    n_steps: int,
) -> tuple[np.ndarray, float, bool]:
    """Return (L,) attributions of one stay's real events, (1, L, C), to one layer, the gap error, and whether it is complete.

    The outputs of a stay's layer are packed, (L, D), so that Captum sees L rows per step.
    """
    start, _ = baselines_like(sequence, static, baseline)
    with torch.no_grad():
        difference = float(model.logits(sequence, static) - model.logits(start, static))
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
        if is_complete(gap, difference):
            break
    return attribution, gap, is_complete(gap, difference)


@torch.no_grad()
def replaced_logits(
    model: ClinicalTransformer,
    sequence: Tensor,
    static: Tensor,
    keep: np.ndarray,
    baseline: dict[str, Tensor] | None,
    keep_static: np.ndarray | None = None,
) -> np.ndarray:
    """Return the float64 logits (n,) of n variants of one stay, (1, L, C) and (1, S).

    `keep` (n, L) and `keep_static` (n, S; None: all) say what stays as it is; the rest is as in the baseline. A replaced
    event holds its place, and the number of events is what it was: nothing is masked, for a softmax would hand the weight
    of a masked event to the others, and harmless events would seem to matter.
    """
    event, mean_static = baselines_like(sequence, static, baseline)
    keep = torch.as_tensor(keep, dtype=torch.bool, device=sequence.device)
    keep_static = np.ones((len(keep), static.shape[1]), bool) if keep_static is None else keep_static
    keep_static = torch.as_tensor(keep_static, device=sequence.device)
    logits = np.zeros(len(keep))
    per_pass = max(1, FORWARD_EVENTS // max(1, sequence.shape[1]))
    for first in range(0, len(keep), per_pass):
        part = slice(first, first + per_pass)
        events = torch.where(keep[part, :, None], sequence, event)  # (n, L, C)
        statics = torch.where(keep_static[part], static, mean_static)  # (n, S)
        logits[part] = model.logits(events, statics).squeeze(1).double().cpu().numpy()
    return logits


def replace_each_event(
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
    everything = replaced_logits(model, sequence, static, np.ones((1, n_events), bool), baseline)[0]
    rows_per_part = max(1, 64 * FORWARD_EVENTS // max(1, n_events))  # the mask itself, (L, L), is made in parts
    for first in range(0, len(which), rows_per_part):
        part = which[first : first + rows_per_part]
        without = replaced_logits(model, sequence, static, part[:, None] != np.arange(n_events), baseline)
        scores[part] = everything - without
    return scores


class Ablation(NamedTuple):
    if_unremarkable: np.ndarray  # (B, L) by how much the logit falls then; 0 at padding, NaN where not asked for
    groups: pd.DataFrame  # stay (index in the batch), kind, group, n_events, ablation, shapley (NaN unless asked for)


def ablation_analysis(
    model: ClinicalTransformer,
    sequences: Tensor,
    static_features: Tensor,
    attention_mask: Tensor | None = None,
    baseline: dict[str, Tensor] | None = None,
    event_groups: dict[str, Sequence[str]] | None = None,
    static_names: Sequence[str] | None = None,
    shapley_samples: int = 0,
    seed: int = 0,
    which: np.ndarray | None = None,
) -> Ablation:
    """Measure by how much the logits of (B, L, C) events and (B, S) statics fall if each event, or group, were unremarkable.

    To be unremarkable is to be as in the baseline: single events (at the positions `which`, else all), then the events of
    one value of each entry of `event_groups` (kind -> L labels), and the static inputs of one name (S names, a one-hot
    group repeats its name). The number of events is held. Shapley values (sampled orders) are over the groups of the first kind and the statics
    together. No gradient is computed. Masked events are left out: a stay is its real events, in their order.

    >>> found = ablation_analysis(model, sequences, static_features, attention_mask)
    >>> found.if_unremarkable.shape == sequences.shape[:2]
    True
    """
    model.eval()
    mask = event_mask(sequences, attention_mask)
    check_finite(sequences, static_features, mask)
    names = list(static_names or [f"static {column}" for column in range(static_features.shape[1])])
    kinds = event_groups or {"all events": ["all"] * sequences.shape[1]}
    scores, tables = np.zeros(mask.shape), []
    for stay, is_event in enumerate(mask):
        sequence, static = sequences[stay : stay + 1, is_event], static_features[stay : stay + 1]
        positions = is_event.nonzero().squeeze(1).cpu().numpy()
        chosen = None if which is None else np.flatnonzero(np.isin(positions, which))
        scores[stay, positions] = replace_each_event(model, sequence, static, baseline, chosen)
        for number, (kind, labels) in enumerate(kinds.items()):
            groups = feature_groups(kind, np.asarray(labels, dtype=object)[positions], [] if number else names)
            samples = 0 if number else shapley_samples
            found = ablate_groups(model, sequence, static, baseline, groups, samples, seed)
            tables.append(found.assign(stay=stay))
    return Ablation(scores, pd.concat(tables, ignore_index=True))


def feature_groups(kind: str, labels: Sequence[str], static_names: Sequence[str]) -> pd.DataFrame:
    """Return kind, group, n_events and members: positions of events or columns of statics."""
    events, statics = pd.Series(list(labels), dtype=object), pd.Series(list(static_names), dtype=object)
    rows = [(kind, name, len(part), part.index.to_numpy()) for name, part in events.groupby(events)]
    rows += [("static", name, 0, part.index.to_numpy()) for name, part in statics.groupby(statics, sort=False)]
    return pd.DataFrame(rows, columns=["kind", "group", "n_events", "members"])


def ablate_groups(
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
        return replaced_logits(model, sequence, static, absent @ of_events == 0, baseline, absent @ of_statics == 0)

    alone = np.eye(len(groups), dtype=bool)
    whole = logits_with(np.ones((1, len(groups))))[0]
    result = groups[["kind", "group", "n_events"]].assign(ablation=whole - logits_with(~alone), shapley=np.nan)
    if shapley_samples:
        result["shapley"] = shapley_values(logits_with, len(groups), shapley_samples, seed)
    return result


def shapley_values(
    logits_with: Callable[[np.ndarray], np.ndarray], n_groups: int, n_orders: int, seed: int
) -> np.ndarray:
    """Return (groups,): what each group adds to the logit as groups arrive, mean of random orders (Castro et al. 2009)."""
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

FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75)  # of a stay's events taken away or given
N_RANDOM_ORDERS = 3
N_RESETS = 10  # random models that each stay is explained with
ORDERS = {"attribution": "Integrated Gradients", "if_unremarkable": "replacement", "attention": "pooling attention"}


def bootstrap(values: np.ndarray, patients: np.ndarray, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, float]:
    """Mean of (n,) values and its 95 % interval over resampled patients; NaN values are left out.

    The interval is NaN with fewer than three patients: resampling them says nothing.
    """
    known = ~np.isnan(np.asarray(values, float))
    frame = pd.DataFrame({"patient": np.asarray(patients)[known], "value": np.asarray(values, float)[known]})
    sums = frame.groupby("patient")["value"].agg(["sum", "count"])
    result = {
        "value": float(frame["value"].mean()),
        "low": math.nan,
        "high": math.nan,
        "n": len(frame),
        "n_patients": len(sums),
    }
    if len(sums) >= 3:
        draws = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=n_bootstrap)
        means = (draws @ sums["sum"].to_numpy()) / (draws @ sums["count"].to_numpy())
        result["low"], result["high"] = (float(limit) for limit in np.quantile(means, [0.025, 0.975]))
    return result


def rank_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman correlations of the rows of (m, L) with the rows of (n, L) -> (m, n); NaN where a row is constant."""
    ranks = [rankdata(np.atleast_2d(rows), axis=1) for rows in (first, second)]
    centred = [rows - rows.mean(1, keepdims=True) for rows in ranks]
    lengths = [np.sqrt((rows**2).sum(1)) for rows in centred]
    with np.errstate(invalid="ignore", divide="ignore"):
        return (centred[0] @ centred[1].T) / np.outer(*lengths)


def random_orders(n_events: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"random {number}": rng.random(n_events) for number in range(1, N_RANDOM_ORDERS + 1)}


def random_by_text(texts: pd.Series, seed: int, n_draws: int = 20) -> np.ndarray:
    """(n_draws, L) random values, the same for events of the same text, as any model without sense of time would give."""
    codes, distinct = pd.factorize(texts)
    return np.random.default_rng(seed).random((n_draws, len(distinct)))[:, codes]


def deletion_insertion(
    model: ClinicalTransformer,
    sequence: Tensor,
    static: Tensor,
    baseline: dict[str, Tensor] | None,
    scores: dict[str, np.ndarray],
) -> pd.DataFrame:
    """Return how the logit of one stay changes as events become unremarkable (deletion) or stop being so (insertion).

    The highest scores of `scores` (order -> (L,)) come first. Columns direction, order, fraction, change: the logit minus
    that of the whole stay (deletion) or of a stay whose events say nothing (insertion).
    """
    n_events = sequence.shape[1]
    fractions = np.array([0.0, *FRACTIONS])
    place = np.stack([np.argsort(np.argsort(-score, kind="stable")) for score in scores.values()])  # (orders, L)
    first = place[:, None] < np.ceil(fractions * n_events)[:, None]  # (orders, fractions, L)
    keep = np.stack([~first, first])  # (2, orders, fractions, L)
    logits = replaced_logits(model, sequence, static, keep.reshape(-1, n_events), baseline).reshape(keep.shape[:3])
    change = logits - logits[:, :, :1]
    names = pd.MultiIndex.from_product([["deletion", "insertion"], scores, fractions])
    return pd.Series(change.ravel(), names.set_names(["direction", "order", "fraction"])).rename("change").reset_index()


def with_one_random_order(curves: pd.DataFrame) -> pd.DataFrame:
    """Curves in which all random orders have the one name `random`, to be averaged."""
    return curves.assign(order=curves["order"].str.replace(r"random \d+", "random", regex=True))


def gains_over_random(curves: pd.DataFrame, settings: ExplainSettings) -> list[dict[str, Any]]:
    """Return how much further an order moves the logit than random orders, mean over the fractions; paired by stay."""
    part = with_one_random_order(curves[curves["fraction"] > 0])
    means = part.groupby(["icu_stay_id", "patient_id", "direction", "order"])["change"].mean().unstack("order")
    verbs = {"deletion": "making events unremarkable", "insertion": "giving events to a stay whose events say nothing"}
    rows = []
    for direction, verb in verbs.items():
        table = means.xs(direction, level="direction")
        patients = table.index.get_level_values("patient_id").to_numpy()
        for order, title in ORDERS.items():
            gain = (table[order] - table["random"]).to_numpy() * (-1 if direction == "deletion" else 1)
            found = bootstrap(gain, patients, settings.n_bootstrap, settings.seed)
            words = f"{verb} in order of {title} moves the logit {{value:.2f}} [{{low:.2f}}, {{high:.2f}}] further "
            asked = None if order == "attention" else (">", 0.0)
            rows.append(criterion(direction, order, found, asked, words + "than in random order", limit="low"))
    return rows


def criterion(
    check: str,
    method: str,
    found: dict[str, float],
    threshold: tuple[str, float] | None,
    sentence: str,
    limit: str = "value",
) -> dict[str, Any]:
    """One line of faithfulness.json: what was measured, what it should be, whether it is, in plain words.

    `limit` names what must hold the threshold: the value, or a limit of its interval (the value where there is none).
    """
    held = found["value"] if math.isnan(found[limit]) else found[limit]
    passed = (
        None
        if threshold is None
        else bool(
            held > threshold[1]
            if threshold[0] == ">"
            else held >= threshold[1]
            if threshold[0] == ">="
            else held <= threshold[1]
        )
    )
    words = sentence.format(**{name: found[name] for name in ("value", "low", "high", "n")}).replace(" [nan, nan]", "")
    verdict = "" if passed is None else f" (should be {threshold[0]} {threshold[1]:g}{': yes' if passed else ': NO'})"
    return {
        "check": check,
        "method": method,
        **found,
        "threshold": None if threshold is None else " ".join(map(str, threshold)),
        "passed": passed,
        "sentence": words[:1].upper() + words[1:] + verdict + ".",
    }


def stay_infidelity(
    model: ClinicalTransformer,
    sequence: Tensor,
    static: Tensor,
    attribution: np.ndarray,
    baseline: dict[str, Tensor] | None,
    seed: int,
    n_samples: int = 60,
) -> float:
    """Return the infidelity (Yeh et al. 2019) of (L,) scores, relative to the same values dealt out at random (= 1).

    How well their sums predict by how much the logit falls when a random tenth of the events becomes unremarkable.
    """
    rng, n_events = np.random.default_rng(seed), sequence.shape[1]
    taken = rng.random((n_samples, n_events)) < max(0.1, 1.5 / n_events)
    logits = replaced_logits(model, sequence, static, np.vstack([np.zeros(n_events, bool), taken]) == 0, baseline)
    fall = logits[0] - logits[1:]  # (n_samples,)
    error = np.mean((taken @ attribution - fall) ** 2)
    dealt = np.stack([rng.permutation(attribution) for _ in range(10)])
    chance = np.mean((taken @ dealt.T - fall[:, None]) ** 2)
    return float(error / chance) if chance > 0 else math.nan


def input_spread(dataset: train.ClinicalSequenceDataset, most: int = 20_000) -> Tensor:
    """(C,) standard deviation of each input over the first events of the dataset; 0 for one that never varies."""
    return dataset.events(torch.arange(min(most, len(dataset.text)))).std(0)


def stay_sensitivity(
    sequence: Tensor, explain_it: Callable[[Tensor], np.ndarray], spread: Tensor, seed: int, n_samples: int = 3
) -> float:
    """Return the largest relative change of (L,) scores under noise of 2 % of each input's spread (Yeh et al. 2019)."""
    generator = torch.Generator().manual_seed(seed)
    scores, changes = explain_it(sequence), []
    for _ in range(n_samples):
        noise = 2 * torch.rand(sequence.shape, generator=generator) - 1
        changes.append(explain_it(sequence + 0.02 * spread.to(sequence) * noise.to(sequence)) - scores)
    return float(np.linalg.norm(changes, axis=1).max() / np.linalg.norm(scores))


def event_totals(
    model: ClinicalTransformer, sequence: Tensor, static: Tensor, baseline: dict[str, Tensor] | None, n_steps: int
) -> np.ndarray:
    """(L,) Integrated Gradients of each event of one stay, without a second try."""
    return (
        captum_analysis(model, sequence, static, baseline=baseline, n_steps=n_steps, retry=False)
        .events[0]
        .double()
        .sum(1)
        .cpu()
        .numpy()
    )


def check_stays(
    run: Run, events: pd.DataFrame, stays: Sequence[int], settings: ExplainSettings
) -> tuple[list[dict], pd.DataFrame]:
    """Deletion and insertion, infidelity, sensitivity, randomisation and agreement on some stays -> criteria, curves."""
    model, baseline = run.checkpoint.model, run.checkpoint.baseline
    new_classifiers = [with_new_classifier(model, settings.seed + 1 + number) for number in range(4)]
    curves, rows, spread = [], [], input_spread(run.dataset)
    by_stay = dict(tuple(events.groupby("icu_stay_id")))
    for number, stay in enumerate(tqdm(stays, desc="check", leave=False, delay=2)):
        sequence, static = run.inputs(stay)
        ids = run.table.stays.loc[stay, ["icu_stay_id", "patient_id"]].to_dict()
        scores = {order: np.nan_to_num(by_stay[ids["icu_stay_id"]][order].to_numpy(float)) for order in ORDERS}
        if sequence.shape[1] < 10:
            continue
        table = deletion_insertion(
            model, sequence, static, baseline, scores | random_orders(sequence.shape[1], settings.seed + stay)
        )
        curves.append(table.assign(**ids))
        row = {
            **ids,
            "attention agreement": rank_correlation(scores["attention"], np.abs(scores["attribution"]))[0, 0],
            "replacement agreement": rank_correlation(scores["if_unremarkable"], scores["attribution"])[0, 0],
            "infidelity attribution": stay_infidelity(
                model, sequence, static, scores["attribution"], baseline, settings.seed
            ),
            "infidelity replacement": stay_infidelity(
                model, sequence, static, scores["if_unremarkable"], baseline, settings.seed
            ),
        }
        # Other random models for every stay: stays share their events' texts, and one model errs alike on all of them.
        untrained = [untrained_like(model, settings.seed + 1 + 1000 * stay + number) for number in range(N_RESETS)]
        for name, models in (("all layers", untrained), ("classifier", new_classifiers)):
            others = np.stack([event_totals(changed, sequence, static, baseline, 10) for changed in models])
            row[f"reset {name}"] = np.abs(rank_correlation(others, scores["attribution"])).mean()
        dealt = random_by_text(by_stay[ids["icu_stay_id"]]["event_text"], settings.seed)
        row["reset by chance"] = np.abs(rank_correlation(dealt, scores["attribution"])).mean()
        if number < 10:
            row["sensitivity attribution"] = stay_sensitivity(
                sequence, lambda x: event_totals(model, x, static, baseline, settings.ig_steps), spread, settings.seed
            )
            strongest = np.argsort(-np.abs(scores["attribution"]))[:50]
            row["sensitivity replacement"] = stay_sensitivity(
                sequence,
                lambda x: replace_each_event(model, x, static, baseline, strongest)[strongest],
                spread,
                settings.seed,
            )
        rows.append(row)
    if not rows:
        return [], pd.DataFrame(columns=["icu_stay_id", "patient_id", "direction", "order", "fraction", "change"])
    all_curves = pd.concat(curves, ignore_index=True)
    return gains_over_random(all_curves, settings) + measured_criteria(pd.DataFrame(rows), settings), all_curves


MEASURED = {
    "infidelity attribution": (
        "infidelity",
        "attribution",
        ("<=", 0.5),
        "Integrated Gradients predict what replacing events does with {value:.2f} "
        "[{low:.2f}, {high:.2f}] of the error that the same values dealt out at random have",
    ),
    "infidelity replacement": (
        "infidelity",
        "if_unremarkable",
        ("<=", 0.2),
        "single replacements predict what replacing several events does with {value:.2f} "
        "[{low:.2f}, {high:.2f}] of the error that the same values dealt out at random have",
    ),
    "sensitivity attribution": (
        "sensitivity",
        "attribution",
        ("<=", 0.1),
        "noise of 2 % of each input's spread changes Integrated Gradients by {value:.1%} at most, mean of {n} stays",
    ),
    "sensitivity replacement": (
        "sensitivity",
        "if_unremarkable",
        ("<=", 0.1),
        "noise of 2 % of each input's spread changes replacement scores by {value:.1%} at most, mean of {n} stays",
    ),
    "reset all layers": (
        "randomisation",
        "attribution",
        ("<=", 0.2),
        "with all layers reset to random weights, attributions keep a rank correlation of {value:.2f} "
        f"[{{low:.2f}}, {{high:.2f}}] with the model's own (absolute value, mean of {N_RESETS} resets for each of {{n}} stays)",
    ),
    "reset by chance": (
        "randomisation by chance",
        "attribution",
        None,
        "random values, one for each distinct text of a stay, have a rank correlation of {value:.2f} "
        "[{low:.2f}, {high:.2f}] with the model's own attributions (absolute value): less cannot be expected of a reset model",
    ),
    "reset classifier": (
        "randomisation of the classifier",
        "attribution",
        None,
        "with only the classifier reset, attributions keep a rank correlation of {value:.2f} "
        "[{low:.2f}, {high:.2f}] with the model's own (absolute value)",
    ),
    "attention agreement": (
        "agreement",
        "attention",
        None,
        "pooling attention agrees with |attribution| by a rank correlation of {value:.2f} [{low:.2f}, {high:.2f}]: "
        "where the model looks is not the same as what moves its prediction",
    ),
    "replacement agreement": (
        "agreement",
        "if_unremarkable",
        None,
        "replacement agrees with Integrated Gradients by a rank correlation of {value:.2f} [{low:.2f}, {high:.2f}]",
    ),
}


def measured_criteria(rows: pd.DataFrame, settings: ExplainSettings) -> list[dict[str, Any]]:
    """One criterion per column of measurements of single stays."""
    return [
        criterion(
            check,
            method,
            bootstrap(rows[column].to_numpy(float), rows["patient_id"].to_numpy(), settings.n_bootstrap, settings.seed),
            threshold,
            sentence,
        )
        for column, (check, method, threshold, sentence) in MEASURED.items()
        if column in rows
    ]


def completeness_criterion(stays: pd.DataFrame, settings: ExplainSettings) -> dict[str, Any]:
    first = stays["complete"] & (stays["n_steps"] == settings.ig_steps)
    found = {"value": float(stays["complete"].mean()), "low": math.nan, "high": math.nan, "n": len(stays)}
    return criterion(
        "completeness",
        "attribution",
        found,
        (">=", 0.99),
        "attributions sum to the difference of the logits (within 0.02 + 1 %) for {value:.1%} of {n} stays; "
        f"{first.mean():.1%} needed no more than {settings.ig_steps} steps, the rest {4 * settings.ig_steps}; what remains is flagged",
    )


class LinearStay(nn.Module):
    """Logit = sum of the events times w + statics times v + c: the one model whose attributions are known exactly."""

    def __init__(self, input_dim: int, static_dim: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.w, self.v = (nn.Parameter(torch.randn(n, generator=generator)) for n in (input_dim, static_dim))

    def logits(self, sequences: Tensor, static_features: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        is_event = torch.ones(sequences.shape[:2]) if attention_mask is None else attention_mask
        return ((sequences @ self.w * is_event).sum(1) + static_features @ self.v + 0.5).unsqueeze(1)


def check_linear_model(seed: int = 0) -> dict[str, Any]:
    """On a linear model Integrated Gradients are w * (x - baseline): the largest difference, which should be rounding."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    model, x, s, baseline = LinearStay(20, 7, seed), draw(1, 12, 20), draw(1, 7), {"event": draw(20), "static": draw(7)}
    found = captum_analysis(model, x, s, baseline=baseline)
    with torch.no_grad():
        exact = model.w * (x - baseline["event"]), model.v * (s - baseline["static"])
        error = max(float((mine - true).abs().max()) for mine, true in zip(found, exact))
    return criterion(
        "linear model",
        "attribution",
        {"value": error, "low": math.nan, "high": math.nan, "n": 1},
        ("<=", 1e-4),
        "on a linear model Integrated Gradients differ from the exact answer by {value:.1e} at most",
    )


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


def static_word(column: str) -> str:
    return STATIC_WORDS.get(column, column.replace("_", " "))


def item_of(text: str) -> str:
    """Return what an event is, without its numbers: `Lab: Lactate (Blood, Blood Gas)`, up to the first bar."""
    first = re.sub(r"(?<![\w.-])\d+(?:\.\d+)?\s*%?(?![\w-])", "", str(text).split(" | ", 1)[0])
    return re.sub(r"\s+", " ", first).strip()


def is_abnormal(text: str) -> bool:
    """Return whether the text itself says so: a flag, or a level outside the reference range."""
    return bool(re.search(r"\| Flag: abnormal|\| Level: (?!within range)", str(text)))


def organ_system(item: str) -> str:
    """Return the organ system of an item by `ORGAN_SYSTEMS`, or `other`."""
    found = (system for system, pattern in ORGAN_SYSTEMS.items() if re.search(pattern, item.lower()))
    return next(found, "other")


def window_names() -> np.ndarray:
    """Return `last 6 h`, `6 to 12 h`, ..., `more than 96 h`."""
    edges = CLOCK_WINDOWS_HOURS
    between = [f"{low} to {high} h" for low, high in zip(edges[1:-2], edges[2:-1])]
    return np.array([f"last {edges[1]} h", *between, f"more than {edges[-2]} h"], dtype=object)


def clock_window(hours_to_end: np.ndarray) -> np.ndarray:
    """Return the names of the windows before the end that (n,) hours lie in."""
    place = np.searchsorted(CLOCK_WINDOWS_HOURS, hours_to_end, "right") - 1
    return window_names()[np.clip(place, 0, len(CLOCK_WINDOWS_HOURS) - 2)]


def name_inputs(preprocessor: train.ClinicalDataPreprocessor, input_dim: int = 774) -> pd.DataFrame:
    """Return the clinical name of every input: `input` ("event" or "static"), `column`, `part`, `name`.

    Single numbers of a text vector have no clinical meaning, and the names say so.

    >>> name_inputs(preprocessor)["name"][2]
    'event type: labevent'
    """
    parts = event_parts(input_dim, preprocessor.value_channel)
    n_text = parts["text"].stop - parts["text"].start
    names = [("type", f"event type: {name}") for name in EVENT_TYPES]
    names += [("text", f"event text, number {i + 1} of {n_text} (no meaning alone)") for i in range(n_text)]
    names.append(("time", "time to the final event"))
    if preprocessor.value_channel:
        names += [("value", "value among its item's training values"), ("value", "has a value")]
    rows = [("event", column, part, name) for column, (part, name) in enumerate(names)]
    for column, (name, category) in enumerate(preprocessor.static_names):
        word = static_word(name)
        rows.append(("static", column, name, word if category is None else f"{word}: {category}"))
    return pd.DataFrame(rows, columns=["input", "column", "part", "name"])


def map_features_to_clinical(
    position_features: Tensor | np.ndarray, feature_mapping: pd.DataFrame, pos: int
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


def real_events(attention_weights: dict[str, Any]) -> list[np.ndarray]:
    """Return the positions of the real events of each stay of a pass; padding has no output and no weight."""
    used = _pooling_weights(attention_weights).sum(1) > 0
    if "transformer_output" in attention_weights:
        used |= np.abs(_to_numpy(attention_weights["transformer_output"])).sum(2) > 0
    return [np.flatnonzero(row) for row in used]


def _weights_and_events(attention_weights: dict[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return, for each stay of a pass, its (Hp, L) pooling weights and the positions of its real events."""
    return list(zip(_pooling_weights(attention_weights), real_events(attention_weights)))


def _described(record: Stay | None, position: int) -> dict[str, Any]:
    """Return when and what the event at a position is, where the stay's record is known."""
    if record is None:
        return {}
    event = record.events.iloc[position]
    return {"hours_to_end": float(event["hours_to_end"])} | event[["event_type", "event_text"]].to_dict()


def analyze_critical_time_periods(
    attention_weights: dict[str, Any], threshold: float = 0.1, record: Stay | None = None, relative: bool = False
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
    for stay, (weights, events) in enumerate(_weights_and_events(attention_weights)):
        least = threshold / len(events) if relative else threshold
        for head, position in np.argwhere(weights > least):
            weight = float(weights[head, position])
            row = {"stay": stay, "head": int(head) + 1, "position": int(position), "importance": weight}
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
    attention_weights: dict[str, Any], record: Stay | None = None, n_windows: int = 10, top: int = 3
) -> list[dict[str, Any]]:
    """List the events with the largest pooling weight of each head in each part of each stay.

    Parts are tenths of the stay's events or, with a record, clock windows before the end. Return dicts of stay, window,
    head, rank, position, importance, and with a record hours_to_end, event_type, event_text.

    >>> rows = analyze_feature_importance_over_time(attention_weights, n_windows=2, top=1)
    >>> [row["position"] for row in rows if row["stay"] == 0 and row["head"] == 1]
    [0, 2]
    """
    rows = []
    for stay, (weights, events) in enumerate(_weights_and_events(attention_weights)):
        parts = np.arange(len(events)) * n_windows // max(1, len(events)) + 1
        if record is not None:
            parts = clock_window(record.events["hours_to_end"].to_numpy())
        for part in pd.unique(parts):
            inside = events[parts == part]
            for head, values in enumerate(weights[:, inside], start=1):
                for rank, place in enumerate(np.argsort(-values, kind="stable")[:top], start=1):
                    row = {"stay": stay, "window": part, "head": head, "rank": rank, "position": int(inside[place])}
                    rows.append(row | {"importance": float(values[place])} | _described(record, inside[place]))
    return rows


def analyze_layer_attention_patterns(attention_weights: dict[str, Any], near: int = 5) -> list[dict[str, Any]]:
    """Measure, per stay and layer, how much events look at others within `near` positions and beyond.

    Return dicts of stay, layer (1-based), `attention_matrix` (L, L), the mean over heads without padding, and the mean
    weight within `near` (`local_attention`) and beyond (`global_attention`; NaN if there are none); the same per head
    in `head_matrices` (H, L, L), `head_local_attention`, `head_global_attention` (H,), and `head_local_share` of all
    weight beside `local_share_by_chance`. Maps read from a file are of equal bins of events: L is then their number.

    >>> [(row["layer"], row["attention_matrix"].shape) for row in analyze_layer_attention_patterns(attention_weights)]
    [(1, (4, 4)), (1, (2, 2))]
    """
    length, rows = _pooling_weights(attention_weights).shape[2], []
    for stay, events in enumerate(real_events(attention_weights)):
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


def analyze_temporal_feature_attribution(attention_weights: dict[str, Any], feature_mapping: Stay) -> pd.DataFrame:
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
    weights = _pooling_weights(attention_weights)[0][:, real_events(attention_weights)[0]].T  # (L, Hp)
    table = pd.DataFrame(weights, columns=[f"attention_head_{head}" for head in range(1, weights.shape[1] + 1)])
    windows = clock_window(events["hours_to_end"].to_numpy())
    table.insert(0, "window", pd.Categorical(windows, window_names(), ordered=True))
    table.insert(1, "n_events", 1)
    if "attribution" in events:
        size = events["attribution"].abs().to_numpy()
        table["attribution"] = events["attribution"].to_numpy()
        table["share_of_attribution"] = size / size.sum()
    return table.groupby("window", observed=True).sum().reset_index()


def analyze_static_feature_attribution(attention_weights: dict[str, Any], static_features: Stay) -> pd.DataFrame:
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
# Tables: the same for the pictures, the report and the files
# ---------------------------------------------------------------------------------------------------------------------


def describe_events(run: Run, stay: int) -> pd.DataFrame:
    """A stay's events, one row each, in the order of the model's input."""
    table, rows = run.table, slice(run.table.offsets[stay], run.table.offsets[stay + 1])
    person = table.stays.loc[stay]
    texts = table.texts[table.text[rows]]
    minutes = table.minutes_since_intime[rows].astype(float)
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
            "is_abnormal": [is_abnormal(text) for text in texts],
        }
    )


class Explained(NamedTuple):
    """All that was computed of one stay."""

    stay: dict[str, Any]
    events: pd.DataFrame
    statics: pd.DataFrame
    groups: pd.DataFrame
    layers: pd.DataFrame
    attention: Attention


def explain_stay(run: Run, stay: int, settings: ExplainSettings, shown: str = "", layers: bool = True) -> Explained:
    """Every view of one stay; `shown` is why it is shown in full (then also Shapley values), or "". `layers`: theirs too."""
    model, baseline = run.checkpoint.model, run.checkpoint.baseline
    sequence, static = run.inputs(stay)
    events = describe_events(run, stay)
    ids = {"icu_stay_id": events["icu_stay_id"].iloc[0], "patient_id": events["patient_id"].iloc[0]}
    found = captum_analysis(model, sequence, static, baseline=baseline, n_steps=settings.ig_steps)
    attention = attend(model, sequence, static)
    names = run.checkpoint.preprocessor.static_names
    strongest = np.argsort(-np.abs(found.events[0].sum(1).cpu().numpy()))[: settings.max_replacements or None]
    ablation = ablation_analysis(
        model,
        sequence,
        static,
        None,
        baseline,
        {"event type": events["event_type"], "clock window": clock_window(events["hours_to_end"].to_numpy())},
        [column for column, _ in names],
        shapley_samples=25 if shown else 0,
        seed=settings.seed,
        which=np.sort(strongest),
    )
    events = add_scores(
        events, found, ablation.if_unremarkable[0], attention, run.checkpoint.preprocessor.value_channel
    )
    group_scores = ablation.groups.drop(columns="stay")
    statics = static_table(run, stay, found, group_scores, names).assign(**ids)
    groups = group_table(events, statics, group_scores).assign(**ids)
    by_layer = (
        [
            pd.DataFrame({name: value if name == "layer" else value[0] for name, value in row.items()}).assign(
                event=np.arange(len(events))
            )
            for row in layer_analysis(model, sequence, static, None, baseline, settings.ig_steps)
        ]
        if layers
        else [pd.DataFrame(columns=["layer", "attribution", "gap_error", "complete", "event"])]
    )
    row = {
        **ids,
        "label": events["label"].iloc[0],
        "probability": float(run.checkpoint.probabilities(found.logits)[0]),
        "logit": found.logits[0],
        "baseline_logit": found.baseline_logits[0],
        "gap_error": found.gap_errors[0],
        "n_steps": found.n_steps[0],
        "complete": bool(found.complete[0]),
        "n_events": len(events),
        "why_shown": shown,
    }
    return Explained(row, events, statics, groups, pd.concat(by_layer, ignore_index=True).assign(**ids), attention)


def add_scores(
    events: pd.DataFrame,
    found: Attribution,
    if_unremarkable: np.ndarray,
    attention: Attention,
    value_channel: bool,
) -> pd.DataFrame:
    """The table of a stay's events with every score of every event."""
    values = found.events[0].double().cpu().numpy()  # (L, C)
    parts = {
        f"attribution_{name}": values[:, columns].sum(1)
        for name, columns in event_parts(values.shape[1], value_channel).items()
    }
    total = sum(parts.values())
    heads = {f"attention_head_{head}": weights for head, weights in enumerate(attention.pooling, start=1)}
    return events.assign(
        attribution=total,
        **parts,
        if_unremarkable=if_unremarkable,
        attention=attention.pooling.mean(0),
        **heads,
        rollout=attention.rollout,
        complete=bool(found.complete[0]),
    )


def static_table(
    run: Run, stay: int, found: Attribution, groups: pd.DataFrame, names: list[tuple[str, str | None]]
) -> pd.DataFrame:
    """feature, value, attribution, ablation: one row per static column."""
    sums = sum_over_columns(found.statics[0].double().cpu().numpy(), names)
    ablation = groups[groups["kind"] == "static"].set_index("group")["ablation"]
    values = run.table.take(np.array([stay])).static_columns.loc[0, list(sums)]
    return pd.DataFrame(
        {
            "feature": list(map(static_word, sums)),
            "value": ["Unknown" if pd.isna(value) else str(value) for value in values],
            "attribution": list(sums.values()),
            "ablation": ablation[list(sums)].to_numpy(),
        }
    )


def group_table(events: pd.DataFrame, statics: pd.DataFrame, groups: pd.DataFrame) -> pd.DataFrame:
    """The ablated groups with the attribution they sum to, and whether both tell the same."""
    sums = {("event type", name): value for name, value in events.groupby("event_type")["attribution"].sum().items()}
    windows = events["attribution"].groupby(clock_window(events["hours_to_end"].to_numpy())).sum()
    sums |= {("clock window", name): value for name, value in windows.items()}
    sums |= {("static", name): value for name, value in zip(statics["feature"], statics["attribution"])}
    groups = groups.assign(
        group=[static_word(name) if kind == "static" else name for kind, name in zip(groups["kind"], groups["group"])]
    )
    attribution = np.array([sums[key] for key in zip(groups["kind"], groups["group"])])
    return groups.assign(attribution=attribution)


def head_properties(events: pd.DataFrame) -> dict[str, np.ndarray]:
    """What a head's weights are compared with, (L,) each."""
    types = {f"event type: {name}": (events["event_type"] == name).to_numpy(float) for name in EVENT_TYPES}
    return {
        "recency": -events["hours_to_end"].to_numpy(float),
        "abnormal flag": events["is_abnormal"].to_numpy(float),
        "|attribution|": np.abs(events["attribution"].to_numpy(float)),
        **types,
    }


def head_correlations(attention: Attention, properties: dict[str, np.ndarray]) -> np.ndarray:
    """(all heads, properties) rank correlations over a stay's events; layers' heads first, pooling heads last."""
    weights = np.concatenate([attention.received.reshape(-1, attention.received.shape[2]), attention.pooling])
    seen = ~np.isnan(weights).any(0)
    return rank_correlation(weights[:, seen], np.stack(list(properties.values()))[:, seen])


def untrained_correlations(
    run: Run, stays: Sequence[int], events: dict[int, pd.DataFrame], settings: ExplainSettings
) -> np.ndarray:
    """(models, heads, properties): mean correlations of untrained models on the same stays, with their own attributions."""
    means, baseline = [], run.checkpoint.baseline
    for number in tqdm(range(settings.untrained_models), desc="untrained models", leave=False, delay=2):
        model = untrained_like(run.checkpoint.model, settings.seed + 1000 + number)
        found = []
        for stay in stays:
            sequence, static = run.inputs(stay)
            own = events[stay].assign(attribution=event_totals(model, sequence, static, baseline, 10))
            found.append(head_correlations(attend(model, sequence, static), head_properties(own)))
        means.append(nan_mean(np.stack(found)))
    return np.stack(means)


def nan_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis without NaN; NaN where there is nothing else, and no warning."""
    count = (~np.isnan(values)).sum(0)
    return np.where(count, np.nansum(values, axis=0) / np.maximum(count, 1), np.nan)


def head_table(run: Run, explained: dict[int, Explained], settings: ExplainSettings) -> pd.DataFrame:
    """What each head's weights go with, measured, against untrained models: nobody names a head here."""
    usable = {stay: found for stay, found in explained.items() if len(found.events) >= 10}
    if not usable:
        return pd.DataFrame(
            columns=["layer", "head", "property", "correlation", "low", "high", "null_99", "has_role", "n_stays"]
        )
    properties = list(head_properties(next(iter(usable.values())).events))
    measured = np.stack(
        [head_correlations(found.attention, head_properties(found.events)) for found in usable.values()]
    )  # (stays, heads, properties)
    patients = np.array([found.stay["patient_id"] for found in usable.values()])
    some = list(usable)[:30]
    null = np.abs(untrained_correlations(run, some, {stay: usable[stay].events for stay in some}, settings))
    n_layers, n_heads = next(iter(usable.values())).attention.received.shape[:2]
    is_pooling, rows = np.arange(measured.shape[1]) >= n_layers * n_heads, []
    for head in range(measured.shape[1]):
        limits = [
            np.nanquantile(kind, 0.99) if not np.isnan(kind).all() else math.nan
            for kind in np.moveaxis(null[:, is_pooling == is_pooling[head]], 2, 0)
        ]
        where = (
            ("pooling", head - n_layers * n_heads + 1)
            if is_pooling[head]
            else (f"layer {head // n_heads + 1}", head % n_heads + 1)
        )
        for name, values, limit in zip(properties, measured[:, head].T, limits):
            found = bootstrap(values, patients, settings.n_bootstrap, settings.seed)
            beyond = found["low"] > limit or found["high"] < -limit
            rows.append((*where, name, found["value"], found["low"], found["high"], limit, bool(beyond), found["n"]))
    return pd.DataFrame(
        rows, columns=["layer", "head", "property", "correlation", "low", "high", "null_99", "has_role", "n_stays"]
    )


def query_similarity_table(explained: dict[int, Explained], settings: ExplainSettings) -> pd.DataFrame:
    """How near the query vector is to the keys of each event type, against the mean of the stay; per pooling head."""
    parts = []
    for found in explained.values():
        scores = found.attention.scores - found.attention.scores.mean(1, keepdims=True)  # (Hp, L)
        for head, values in enumerate(scores, start=1):
            parts.append(found.events[["patient_id", "event_type"]].assign(head=head, similarity=values))
    rows = []
    for (head, name), part in pd.concat(parts).groupby(["head", "event_type"]):
        result = bootstrap(
            part["similarity"].to_numpy(), part["patient_id"].to_numpy(), settings.n_bootstrap, settings.seed
        )
        rows.append((head, name, result["value"], result["low"], result["high"], result["n"]))
    return pd.DataFrame(rows, columns=["head", "event_type", "similarity", "low", "high", "n_events"])


def window_table(events: pd.DataFrame, settings: ExplainSettings) -> pd.DataFrame:
    """Share of each clock window in a stay's |attribution|, mean over stays with interval, and the sentence that says so."""
    part = events.assign(
        window=pd.Categorical(clock_window(events["hours_to_end"].to_numpy()), window_names(), ordered=True),
        absolute=events["attribution"].abs(),
        one=1.0,
    )
    sums = part.pivot_table(
        index=["icu_stay_id", "patient_id"], columns="window", values=["absolute", "one"], aggfunc="sum", observed=True
    ).fillna(0)
    rows = []
    for window in sums["absolute"].columns:
        share, of_events = (sums[name][window] / sums[name].sum(axis=1) for name in ("absolute", "one"))
        found = bootstrap(
            share.to_numpy(), share.index.get_level_values("patient_id"), settings.n_bootstrap, settings.seed
        )
        interval = "" if math.isnan(found["low"]) else f" [{100 * found['low']:.0f}, {100 * found['high']:.0f}]"
        where = f"in the {window}" if window.startswith("last") else f"{window} before the end"
        rows.append(
            (
                window,
                found["value"],
                found["low"],
                found["high"],
                float(of_events.mean()),
                int((sums["one"][window] > 0).sum()),
                f"Events {where} carry {100 * found['value']:.0f} %{interval} of the attribution; they are {100 * of_events.mean():.0f} % of the events.",
            )
        )
    return pd.DataFrame(rows, columns=["window", "share", "low", "high", "share_of_events", "n_stays", "sentence"])


def trajectory(run: Run, stay: int, most: int = 60) -> pd.DataFrame:
    """Risk of one stay as its events arrive, from the first alone to all: each with the times it has in the whole stay."""
    sequence, static = run.inputs(stay)
    n_events = sequence.shape[1]
    seen = np.unique(np.linspace(1, n_events, min(most, n_events)).astype(int))
    keep = np.arange(n_events) < seen[:, None]
    logits = replaced_logits(run.checkpoint.model, sequence, static, keep, run.checkpoint.baseline)
    minutes = run.table.minutes_since_intime[run.table.offsets[stay] : run.table.offsets[stay + 1]]
    return pd.DataFrame(
        {
            "icu_stay_id": run.table.stays["icu_stay_id"][stay],
            "hours_since_admission": minutes[seen - 1] / 60,
            "n_events": seen,
            "probability": run.checkpoint.probabilities(logits),
        }
    )


def attention_of(found: Explained) -> dict[str, Any]:
    """What the attention pictures of one stay need."""
    return {
        "icu_stay_id": found.stay["icu_stay_id"],
        "layer_maps": found.attention.maps,
        "pooling": found.attention.pooling,
        "hours": found.events["hours_to_end"].to_numpy(),
        "texts": found.events["event_text"].tolist(),
    }


def explain(run: Run, settings: ExplainSettings) -> dict[str, Any]:
    """All tables of a run, as the report and the pictures take them; writes nothing."""
    chosen, why = choose_stays(run, settings.stays, settings.max_stays, settings.seed)
    logger.info(
        f"Explaining  {len(chosen)} of {len(run.table.stays)} stays that the model has not seen, {len(why)} of them in full"
    )
    with_layers = {
        *why,
        *np.random.default_rng(settings.seed).permutation([s for s in chosen if s not in why])[
            : max(0, settings.layer_stays - len(why))
        ],
    }
    explained = {
        stay: explain_stay(run, stay, settings, why.get(stay, ""), stay in with_layers)
        for stay in tqdm(chosen, desc="explain", leave=False, delay=2)
    }
    tables: dict[str, Any] = {
        name: pd.concat(
            [getattr(found, name) for found in explained.values() if len(getattr(found, name))], ignore_index=True
        )
        for name in ("events", "statics", "groups")
    }
    tables["layers"] = pd.concat(
        [explained[stay].layers for stay in chosen if stay in with_layers] or [explained[chosen[0]].layers],
        ignore_index=True,
    )
    stays = pd.DataFrame([found.stay for found in explained.values()])
    risks = run.checkpoint.probabilities(run.logits)
    tables["stays"] = stays.assign(
        risk_percentile=[100 * float((risks <= risk + 1e-9).mean()) for risk in stays["probability"]]
    )
    tables["heads"] = head_table(run, explained, settings)
    tables["query_similarity"] = query_similarity_table(explained, settings)
    tables["windows"] = window_table(tables["events"], settings)
    tables["trajectory"] = (
        pd.concat([trajectory(run, stay) for stay in why], ignore_index=True) if why else pd.DataFrame()
    )
    tables |= findings(run, {stay: explained[stay].events for stay in why}, tables["events"], settings)
    checked = np.random.default_rng(settings.seed).permutation(chosen)[: settings.checked_stays]
    criteria, tables["curves"] = check_stays(run, tables["events"], sorted(checked.tolist()), settings)
    tables["faithfulness"] = pd.DataFrame(
        [completeness_criterion(tables["stays"], settings), *criteria, check_linear_model(settings.seed)]
    )
    tables["attentions"] = {
        explained[stay].stay["icu_stay_id"]: attention_of(explained[stay]) for stay in why or chosen[:1]
    }
    highest = stays["icu_stay_id"][stays["probability"].idxmax()]
    tables["attention"] = tables["attentions"].get(highest, next(iter(tables["attentions"].values())))
    return tables


# ---------------------------------------------------------------------------------------------------------------------
# Findings: items, organ systems, and the events that decide
# ---------------------------------------------------------------------------------------------------------------------
DECISIVE_COLUMNS = ["icu_stay_id", "threshold", "probability", "probability_without", "event", "event_text"]
MOST_DECISIVE = 64  # events replaced at most before the search for a changed decision is given up


def _important_items(events: pd.DataFrame, n_items: int) -> tuple[list[str], int]:
    """Return the items of the largest mean |push| among those that enough patients have, and how many that is."""
    sizes = events.assign(size=events["attribution"].abs()).groupby("item")
    table = sizes.agg(size=("size", "mean"), n_patients=("patient_id", "nunique"))
    least = min(max(3, 0.05 * events["patient_id"].nunique()), table["n_patients"].max())  # one patient is no finding
    common = table[table["n_patients"] >= least]
    return common["size"].nlargest(n_items).index.tolist(), math.ceil(least)


def item_table(events: pd.DataFrame, n_items: int = 20) -> pd.DataFrame:
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
            rho = float(rank_correlation(known["value"].to_numpy(), known["attribution"].to_numpy())[0, 0])
        push = part["attribution"]
        row = {"item": item, "n_events": len(part), "n_patients": part["patient_id"].nunique(), "push": push.mean()}
        row |= {"size": push.abs().mean(), "rho": rho, "n_values": len(known)}
        rows.append(row | {"sentence": _item_in_words(row)})
    columns = ["item", "n_events", "n_patients", "push", "size", "rho", "n_values", "sentence"]
    return pd.DataFrame(rows, columns=columns)


def _item_in_words(row: dict[str, Any]) -> str:
    """Say which values of an item push: `Lab: Lactate pushes towards death when high (rho 0.87, n 40).`"""
    if math.isnan(row["rho"]):
        return f"{row['item']}: too few values to say which of them push (n {row['n_values']})."
    where = f"(rho {row['rho']:.2f}, n {row['n_values']})"
    if abs(row["rho"]) < 0.3:
        return f"{row['item']}: value and push are hardly related {where}."
    return f"{row['item']} pushes towards death when {'high' if row['rho'] > 0 else 'low'} {where}."


def level_table(events: pd.DataFrame, items: Sequence[str]) -> pd.DataFrame:
    """Return the mean push of each item at each level that its texts name: item, level, push, n_events, n_patients."""
    levels = events["event_text"].str.extract(r"\| Level: ([^|]+)", expand=False).str.strip()
    known = events.assign(level=levels)[levels.notna() & events["item"].isin(list(items))]
    columns = {"push": ("attribution", "mean"), "n_events": ("event", "size"), "n_patients": ("patient_id", "nunique")}
    return known.groupby(["item", "level"]).agg(**columns).reset_index()


def system_table(events: pd.DataFrame) -> pd.DataFrame:
    """Return the total push of each organ system in each stay: icu_stay_id, patient_id, system, push, n_events."""
    items = events["item"].unique()
    systems = events["item"].map({item: organ_system(item) for item in items})
    parts = events.assign(system=systems).groupby(["icu_stay_id", "patient_id", "system"])
    return parts.agg(push=("attribution", "sum"), n_events=("event", "size")).reset_index()


def decisive_events(run: Run, stay: int, events: pd.DataFrame, threshold: float) -> pd.DataFrame:
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
        return run.checkpoint.probabilities(
            replaced_logits(
                model,
                sequence,
                static,
                keep,
                baseline,
            )
        )

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


def findings(
    run: Run, shown: dict[int, pd.DataFrame], events: pd.DataFrame, settings: ExplainSettings
) -> dict[str, pd.DataFrame]:
    """Return the tables items, levels, systems and decisive; `shown` are the events of the stays shown in full."""
    items = item_table(events)
    decisive = [decisive_events(run, stay, own, settings.decision_threshold) for stay, own in shown.items()]
    return {
        "items": items,
        "levels": level_table(events, items["item"]),
        "systems": system_table(events),
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
    "attribution_value": "value",
    "attribution_type": "type",
    "attribution_time": "time",
}
SIGNED = LinearSegmentedColormap.from_list("signed", [BLUE, "#ffffff", VERMILLION])
SHARES = LinearSegmentedColormap.from_list("shares", ["#003f38", "#ffffff", "#5b3000"])  # below and above an even share
HEAD_COLOURS = (BLUE, ORANGE, GREEN, VERMILLION, "#CC79A7", "#56B4E9", "#000000", GREY)
MARKERS = "osD^vPX*"
LESS_SAID = ("Reference", "Flag", "Priority", "Comment", "Status", "Form", "Strength", "Test", "Location")


def _cut(text: object, width: int) -> str:
    """Return the text on one line of at most `width` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= width else line[: width - 1].rstrip(" ·,(") + "…"


def _percent(probability: float) -> str:
    """Return `42 %`; never 0 or 100, which no prediction is."""
    if probability < 0.01:
        return "under 1 %"
    return "over 99 %" if probability > 0.99 else f"{100 * probability:.0f} %"


def _outcome(label: float) -> str:
    if pd.isna(label):
        return "outcome unknown"
    return "died" if label else "survived"


def _signed(value: float) -> str:
    """Return `+0.31`, `−0.31` or, where it is small, `+0.004`; a dash where there is no number."""
    if pd.isna(value):
        return "–"
    if abs(value) < 0.0005:
        return "0"
    return f"{value:+.{2 if abs(value) >= 0.1 else 3}f}".replace("-", "−")


def _count(number: int, word: str) -> str:
    """Return `1 stay`, `2 stays`."""
    return f"{number:,} {word}" + ("" if number == 1 else "s")


def _short_text(text: str, width: int = 46) -> str:
    """Return an event's text for one line: what, value, level; `Lactate · 5.2 mmol/L · far above range`."""
    first, *parts = str(text).split(" | ")
    kept = [part for part in parts if part.split(":")[0] not in LESS_SAID]
    kept = kept or [part for part in parts if part.startswith(("Test", "Comment"))][:1]
    said = [re.sub(r"^Lab: | \((Blood, |\d-)[^)]*\)", "", first)]
    said += [re.sub(r"^[A-Z]\w+: ", "", part) for part in kept]
    return _cut(" · ".join(said), width)


def _for_plot(text: object, width: int = 46, shorten: Callable[[Any, int], str] = _short_text) -> str:
    """Return a text shortened, and without what Matplotlib would read as mathematics."""
    return shorten(text, width).replace("$", r"\$")


def _means_by(table: pd.DataFrame, group: str, value: str) -> pd.DataFrame:
    """Return `bootstrap` of `value` in each group -> mean, low, high, n (rows), n_patients; one row per group."""
    found = {}
    for name, part in table.groupby(group, observed=True):
        found[name] = bootstrap(part[value].to_numpy(), part["patient_id"].to_numpy())
    columns = ["value", "low", "high", "n", "n_patients"]
    return pd.DataFrame(list(found.values()), index=list(found), columns=columns).rename(columns={"value": "mean"})


def _stay_shares(events: pd.DataFrame, bins: pd.Series, column: str) -> pd.DataFrame:
    """Return (stays, bins): a stay's shares of its total |column| by bin; bins (n events,) are categories."""
    keys = [events["patient_id"], events["icu_stay_id"], bins.to_numpy()]
    table = events[column].abs().groupby(keys).sum().unstack(fill_value=0)
    table = table.reindex(columns=bins.cat.categories, fill_value=0)
    return table.div(table.sum(axis=1).replace(0, np.nan), axis=0)


def _column_means(shares: pd.DataFrame) -> pd.DataFrame:
    """Return mean, low, high of each column over stays, 95 % interval over patients."""
    patients = shares.index.get_level_values("patient_id").to_numpy()
    found = [bootstrap(shares[name].to_numpy(), patients) for name in shares]
    return pd.DataFrame(found, index=shares.columns).rename(columns={"value": "mean"})


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
    axes: Axes, table: pd.DataFrame, at: np.ndarray, color: Any, marker: str = "o", label: str = ""
) -> None:
    """Draw means with their intervals as horizontal bars at the heights `at`; `color` one or one per row."""
    axes.hlines(
        at,
        table["low"],
        table["high"],
        color=color,
        linewidth=1.1,
    )
    axes.scatter(
        table["mean"],
        at,
        color=color,
        marker=marker,
        s=16,
        label=label or None,
        zorder=3,
    )


def _vertical_errors(axes: Axes, x: np.ndarray, table: pd.DataFrame, color: str, marker: str, label: str = "") -> None:
    """Draw means with their intervals as vertical bars, in percent."""
    axes.vlines(
        x,
        100 * table["low"],
        100 * table["high"],
        color=color,
        linewidth=1,
    )
    axes.scatter(
        x,
        100 * table["mean"],
        color=color,
        marker=marker,
        s=16,
        label=label or None,
        zorder=3,
    )


def _rows(axes: Axes, left: Sequence[str], right: Sequence[str] = ()) -> None:
    """Name the rows of a panel, first on top, at the left and, small, at the right."""
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


def _small_bar(figure: Any, image: Any, axes: Any, label: str, ticks: Any = None, words: Any = None) -> None:
    """Draw the bar of a picture's colours."""
    bar = figure.colorbar(
        image,
        ax=axes,
        pad=0.01,
        aspect=40,
        ticks=ticks,
    )
    if words is not None:
        bar.set_ticks(ticks, labels=words)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _largest_in_words(values: np.ndarray, hours: np.ndarray, texts: Sequence[str], is_push: bool) -> list[str]:
    """Name the three largest of a stay's pushes (logit) or weights (1: an even share), or say that none stands out."""
    top = np.argsort(-np.nan_to_num(np.abs(values)), kind="stable")[:3]
    if is_push and np.nanmax(np.abs(values)) < FLOOR:
        return [f"no event mattered: none moves the logit by {FLOOR}"]
    if not is_push and np.nanmax(values) < 1.5:
        return [f"no event stands out: {np.nanmin(values):.2f} to {np.nanmax(values):.2f} of an even share"]
    amounts = [_signed(values[event]) if is_push else f"{values[event]:.1f} ×" for event in top]
    return [f"{amount} at {hours[event]:.1f} h: {_for_plot(texts[event], 40)}" for amount, event in zip(amounts, top)]


def _stems(subfigure: Any, rows: list[tuple[str, np.ndarray, bool]], hours: np.ndarray, texts: Sequence[str]) -> None:
    """Draw a panel per (name, values (L,), is it a push) over hours to the end; the largest are dark, and named."""
    grid = subfigure.subplots(
        len(rows),
        2,
        sharex="col",
        width_ratios=[3, 2.6],
        squeeze=False,
    )
    for (name, values, is_push), (axes, words) in zip(rows, grid):
        top = np.argsort(-np.nan_to_num(np.abs(values)), kind="stable")[:3]
        dark = np.where(values[top] >= 0, VERMILLION, BLUE) if is_push else "black"
        level = 0 if is_push else 1  # an even share
        axes.vlines(
            hours,
            level,
            values,
            color="#b5b5b5",
            linewidth=0.9,
        )
        axes.vlines(
            hours[top],
            level,
            values[top],
            linewidth=1.4,
            color=dark,
        )
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
    figure = _page(question, caption, 0.85 * n_layers + 1.4)
    grid = figure.subplots(
        n_layers,
        n_heads + 1,
        sharex=True,
        sharey=True,
        squeeze=False,
    )
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
    grid[-1, n_heads // 2].set_xlabel(f"event looked at: {TO_END}; event that looks: downwards, same scale", fontsize=8)
    steps = np.linspace(-reach, reach, 5)
    words = [f"1/{2**-step:.0f}" if step < 0 else f"{2**step:.0f}" for step in steps]
    _small_bar(
        figure,
        image,
        grid,
        "attention, times an even share",
        steps,
        words,
    )
    return figure


def _draw_sequence_importance(tables: Tables, caption: str) -> Figure:
    """Draw `attention` of one stay (pooling (heads, L), hours, texts), and where in all stays a head looks."""
    events, attention = tables["events"], tables["attention"]
    pooling, hours = np.asarray(attention["pooling"], dtype=float), np.asarray(attention["hours"], dtype=float)
    question = "Which events, and which part of the stay, does each pooling head weigh?"
    figure = _page(question, caption, 1.0 * len(pooling) + 3.4)
    upper, lower = _bands(figure, [len(pooling), 2.0])
    title = "weight of every event, times an even share; its three heaviest named"
    upper.suptitle(f"Stay {attention['icu_stay_id']}: {title}", fontsize=9)
    rows = [(f"head {head}", weights * len(hours), False) for head, weights in enumerate(pooling, 1)]
    _stems(upper, rows, hours, attention["texts"])
    length = (events["hours_since_admission"] + events["hours_to_end"]).clip(lower=1e-9)
    tenths = range(1, 11)
    place = events["hours_since_admission"] / length
    decile = pd.cut(place, np.linspace(0, 1, 11), include_lowest=True, labels=tenths)
    even = _stay_shares(events.assign(one=1.0), decile, "one")
    panels = lower.subplots(
        1,
        len(pooling),
        sharex=True,
        sharey=True,
        squeeze=False,
    )[0]
    for head, axes in enumerate(panels, 1):
        more = _stay_shares(events, decile, f"attention_head_{head}") - even
        _vertical_errors(
            axes,
            np.array(tenths),
            _column_means(more),
            "black",
            "o",
        )
        axes.axhline(0, color="black", linewidth=0.5)
        axes.set_xticks([1, 4, 7, 10])
        tidy(axes, "", "points more than\nan even share, %" if head == 1 else "", f"head {head}")
    lower.supxlabel("tenth of the stay's time (1: after admission, 10: before the end)", fontsize=8)
    n_stays = _count(events["icu_stay_id"].nunique(), "stay")
    lower.suptitle(f"Mean of {n_stays}, 95 % interval over patients", fontsize=9)
    return figure


def _draw_sequence_importance_combined(tables: Tables, caption: str) -> Figure:
    """Draw attention and pushes of one stay over time, and their shares in the windows before the end of all."""
    events, windows = tables["events"], tables.get("windows")
    figure = _page("When in the stay lies the evidence: by attention, and by what moves the prediction?", caption, 7.2)
    upper, lower = _bands(figure, [1.25, 1])
    icu_stay_id = tables["attention"].get("icu_stay_id", events["icu_stay_id"].iloc[0])
    own = events[events["icu_stay_id"] == icu_stay_id].sort_values("event")
    upper.suptitle(f"Stay {icu_stay_id}: every event; attention in times an even share, pushes in logit", fontsize=9)
    rows = [
        ("pooling\nattention", own["attention"].to_numpy(float) * len(own), False),
        ("attention\nrollout", own["rollout"].to_numpy(float) * len(own), False),
        ("push", own["attribution"].to_numpy(float), True),
        ("if\nunremarkable", own["if_unremarkable"].to_numpy(float), True),
    ]
    _stems(upper, rows, own["hours_to_end"].to_numpy(), own["event_text"].to_numpy())
    names = window_names()
    bins = pd.Series(pd.Categorical(clock_window(events["hours_to_end"].to_numpy()), names, ordered=True))
    used = [name for name in names if (bins == name).any()]
    position = np.arange(len(used))[::-1]  # the end of the stay at the right, as above
    axes = lower.subplots()
    even = _column_means(_stay_shares(events.assign(one=1.0), bins, "one")[used])
    axes.bar(
        position,
        100 * even["mean"],
        width=0.8,
        color="#e3e3e3",
        label="share of the events",
        zorder=0,
    )
    measures = {
        "attention": "pooling attention",
        "rollout": "rollout",
        "attribution": "|push|",
        "if_unremarkable": "|if unremarkable|",
    }
    for at, (column, word) in enumerate(measures.items()):
        shares = _column_means(_stay_shares(events, bins, column)[used])
        _vertical_errors(
            axes,
            position + 0.1 * (at - 1.5),
            shares,
            HEAD_COLOURS[at],
            MARKERS[at],
            word,
        )
    reach = events.groupby("icu_stay_id")["hours_to_end"].max()
    starts = dict(zip(names, CLOCK_WINDOWS_HOURS))
    axes.set_xticks(position, [f"{name}\n{_count((reach >= starts[name]).sum(), 'stay')}" for name in used])
    axes.set_ylim(0, 1.35 * axes.get_ylim()[1])
    axes.legend(fontsize=7, frameon=False, ncols=5, loc="upper center")
    title = f"Mean of {_count(len(reach), 'stay')}, 95 % interval over patients"
    tidy(axes, f"{TO_END}; stays that reach back so far", "share, %", title)
    if windows is not None and len(windows):
        lower.supxlabel(textwrap.fill(" ".join(windows["sentence"].astype(str)[:2]), 115), fontsize=7.5)
    return figure


def _draw_head_specialization(tables: Tables, caption: str) -> Figure:
    """Draw `heads`, one row per layer, head and property: correlation, has_role."""
    heads = tables["heads"]
    if heads.empty:
        figure = _page("What does a head follow more than untrained heads do?", caption, 1.5)
        figure.text(0.5, 0.5, "No stay is long enough to measure what heads follow.", ha="center")
        return figure
    properties = heads["property"].unique()
    names = heads[["layer", "head"]].drop_duplicates().to_records(index=False).tolist()
    values = heads.pivot(index="property", columns=["layer", "head"], values="correlation").loc[properties, names]
    has_role = heads.pivot(index="property", columns=["layer", "head"], values="has_role").loc[properties, names]
    has_role = has_role.to_numpy(bool)
    question = (
        f"What does a head follow more than untrained heads do? {has_role.any(0).sum()} of {len(names)} have a role"
    )
    figure = _page(question, caption, 0.28 * len(properties) + 1.9)
    axes = figure.subplots()
    image = axes.imshow(
        values,
        cmap=SIGNED,
        vmin=-1,
        vmax=1,
        aspect="auto",
        alpha=np.where(has_role, 1.0, 0.35),
    )
    for row, column in np.argwhere(has_role):
        axes.add_patch(
            Rectangle(
                (column - 0.5, row - 0.5),
                1,
                1,
                fill=False,
                linewidth=1.2,
            )
        )
    kinds = [name.removeprefix("event type: ") for name in properties]
    axes.set_yticks(
        range(len(kinds)), [f"event is: {TYPE_WORDS[kind]}" if kind in TYPE_WORDS else kind for kind in kinds]
    )
    axes.set_xticks(range(len(names)), [head for _, head in names])
    for at, (layer, head) in enumerate(names):
        if head == 1:
            axes.text(at - 0.4, -0.75, layer, fontsize=8)
            axes.axvline(at - 0.5, color="black", linewidth=1)
    tidy(axes, "head; framed: beyond 99 % of untrained heads with its whole interval, and it moves the prediction", "")
    axes.tick_params(labelsize=7.5)
    _small_bar(figure, image, axes, "rank correlation within the stay")
    return figure


def _importance_rows(panels: tuple[Axes, Axes], title: str, table: pd.DataFrame, unit: str) -> None:
    """Draw mean signed and mean absolute push of each `group` of a table, with the numbers of rows and patients."""
    left, right = panels
    size = _means_by(table.assign(size=table["attribution"].abs()), "group", "size").sort_values(
        "mean", ascending=False
    )
    mean = _means_by(table, "group", "attribution").loc[size.index]
    at = np.arange(len(size))
    _error_dots(left, mean, at, [VERMILLION if value >= 0 else BLUE for value in mean["mean"]])
    _error_dots(right, size, at, "black")
    left.axvline(0, color="black", linewidth=0.7)
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
    systems = system_table(events).rename(columns={"system": "group", "push": "attribution"})
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
    figure = _page("What moves this model's prediction, in which direction and how far?", caption, 0.2 * n_rows + 3.6)
    halves = _bands(figure, [sum(part) + 4 for part in heights])
    for half, blocks, ratios, unit in zip(halves, (per_event, per_stay), heights, ("events", "stays")):
        grid = half.subplots(2, 2, sharex="col", height_ratios=ratios)
        for (title, table), panels in zip(blocks.items(), grid):
            _importance_rows(tuple(panels), title, table, unit)
        grid[1, 1].set_xlim(left=0)
        grid[1, 0].set_xlabel(f"mean push, {LOGIT}", fontsize=8)
        grid[1, 1].set_xlabel("mean size, logit", fontsize=8)
        for axes in grid[1]:
            _ticks(axes, 4)
    return figure


def _draw_item_importance(tables: Tables, caption: str) -> Figure:
    """Draw the items that matter most as a beeswarm: a dot per event, coloured by its value's place in the item."""
    events, items = tables["events"], tables["items"]
    figure = _page("Which items push, and is it their high or their low values?", caption, 0.26 * len(items) + 1.7)
    axes = figure.subplots()
    draw = np.random.default_rng(0)
    norm = Normalize(0, 1)
    for at, item in enumerate(items["item"]):
        part = events[events["item"] == item]
        part = part.assign(place=part["value"].rank(pct=True)).sample(min(len(part), 400), random_state=0)
        height = at + draw.uniform(-0.32, 0.32, len(part))
        known = part["place"].notna().to_numpy()
        axes.scatter(
            part["attribution"][~known],
            height[~known],
            s=5,
            color="#bbbbbb",
            linewidths=0,
        )
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
    axes.axvline(0, color="black", linewidth=0.7)
    tidy(axes, f"push, {LOGIT}; one dot an event, at most 400 an item; grey: no value", "")
    rho = [f"{rho:+.2f} ({n})" if rho == rho else "" for rho, n in zip(items["rho"], items["n_values"])]
    _rows(axes, [_for_plot(item, 42, _cut) for item in items["item"]], rho)
    axes.set_title("rho of value and push (n)", fontsize=7.5, loc="right")
    colors = ScalarMappable(norm, "viridis")
    words = ["lowest", "middle", "highest"]
    _small_bar(
        figure,
        colors,
        axes,
        "value among those of its item",
        [0, 0.5, 1],
        words,
    )
    return figure


def _draw_query_vector_analysis(tables: Tables, caption: str) -> Figure:
    """Draw `query_similarity`, one row per pooling head and event type: similarity, low, high, n_events."""
    table = tables["query_similarity"].rename(columns={"similarity": "mean"})
    kinds = [kind for kind in (*EVENT_TYPES, "unknown") if kind in set(table["event_type"])]
    heads = table["head"].unique()
    question = "Which types of event does the learned query look for, by pooling head?"
    figure = _page(question, caption, 0.25 * len(kinds) + 1.9)
    panels = figure.subplots(
        1,
        len(heads),
        sharex=True,
        sharey=True,
        squeeze=False,
    )[0]  # type: ignore[index]
    for axes, head in zip(panels, heads):
        rows = table[table["head"] == head].set_index("event_type").reindex(kinds)
        _error_dots(axes, rows, np.arange(len(kinds)), BLUE)
        axes.axvline(0, color="black", linewidth=0.7)
        tidy(axes, "", "", f"head {head}")
        _ticks(axes, 3)
    names = [f"{TYPE_WORDS.get(kind, kind)} (n = {n:,.0f})" for kind, n in zip(kinds, rows["n_events"])]
    _rows(panels[0], names)
    label = "query·key score minus the stay's mean (right: looked for), 95 % interval over patients"
    panels[len(panels) // 2].set_xlabel(label, fontsize=8, x=0 if len(panels) % 2 == 0 else 0.5)
    return figure


def _signed_bars(axes: Axes, values: np.ndarray, names: list[str]) -> None:
    """Draw horizontal bars, first on top, with their values; colours by sign."""
    at = np.arange(len(values))
    axes.barh(at, values, color=[VERMILLION if value >= 0 else BLUE for value in values], height=0.7)
    axes.axvline(0, color="black", linewidth=0.7)
    axes.margins(x=0.27)
    tidy(axes, LOGIT, "")
    _rows(axes, names)
    _ticks(axes, 5)
    for y, value in zip(at, values):
        side = "left" if value >= 0 else "right"
        axes.annotate(
            f" {_signed(value)} ",
            (value, y),
            ha=side,
            va="center",
            fontsize=6.5,
        )


def _draw_captum_attributions(tables: Tables, caption: str, n: int = 7) -> Figure:
    """Draw the pushes of the stay with the highest risk: timeline, strongest events, statics; parts in all stays."""
    events, stays = tables["events"], tables["stays"]
    row = stays[stays["icu_stay_id"] == _shown_stay(stays)].iloc[0]
    own, statics = (table[table["icu_stay_id"] == row["icu_stay_id"]] for table in (events, tables["statics"]))
    own = own.sort_values("attribution", ascending=False)
    question = f"Which events push the prediction of stay {row['icu_stay_id']}? Risk {_percent(row['probability'])}, "
    figure = _page(question + _outcome(row["label"]), caption, 8.0)
    line, bars, below = _bands(figure, [1, 2.2, 1.3])
    axes = line.subplots()
    colors = np.where(own["attribution"] >= 0, VERMILLION, BLUE)
    axes.vlines(
        own["hours_to_end"],
        0,
        own["attribution"],
        color=colors,
        linewidth=1.1,
    )
    axes.axhline(0, color="black", linewidth=0.5)
    axes.invert_xaxis()
    sums = [_signed(part["attribution"].sum()) for part in (own, statics)]
    title = f"All {len(own)} events: sum {sums[0]}; patient and admission {sums[1]}; starting from logit "
    title += f"{_signed(row['baseline_logit'])} gives {_signed(row['logit'])}"
    if not row["complete"]:
        title += f" (gap {_signed(row['gap_error'])}: not complete)"
    tidy(axes, TO_END, "logit\n(up: towards death)", title)
    named = pd.concat([own[own["attribution"] > 0].head(n), own[own["attribution"] < 0].tail(n)])
    named = named[named["attribution"].abs() >= 0.0005]
    texts = [_for_plot(text, 58) for text in named["event_text"]]
    words = [f"{text}  {hours:.1f} h" for text, hours in zip(texts, named["hours_to_end"])]
    _signed_bars(bars.subplots(), named["attribution"].to_numpy(), words)
    bars.suptitle("The strongest events for and against, with the hours left to the end", fontsize=9)
    left, right = below.subplots(1, 2, width_ratios=[1.5, 1])
    top = statics.sort_values("attribution", key=abs, ascending=False).head(8)
    words = [_for_plot(f"{name}: {value}", 38) for name, value in zip(top["feature"], top["value"])]
    _signed_bars(left, top["attribution"].to_numpy(), words)
    left.set_title("Patient and admission", fontsize=9)
    _parts_of_events(right, events)
    return figure


def _parts_of_events(axes: Axes, events: pd.DataFrame) -> None:
    """Draw how much of an event's push is due to its text, type, time and value."""
    used = [column for column in PART_WORDS if column in events and events[column].any()]
    parts = events.melt("patient_id", used, "part", "size").replace({"part": PART_WORDS})
    table = _means_by(parts.assign(size=parts["size"].abs()), "part", "size").sort_values("mean", ascending=False)
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
        found = rank_correlation(part[first].to_numpy(float), part[second].to_numpy(float))[0, 0]
        rows.append((*names, found))
    return pd.DataFrame(rows, columns=[*keys, "correlation"])


def _draw_captum_layer_attributions(tables: Tables, caption: str) -> Figure:
    """Draw `layers` (layer, icu_stay_id, event, attribution, gap_error): one stay over its events, all stays below."""
    layers, stays = tables["layers"], tables["stays"]
    names = layers["layer"].unique()
    stay = _shown_stay(stays[stays["icu_stay_id"].isin(layers["icu_stay_id"])])
    question = "Does the evidence stay with its events on the way through the layers?"
    figure = _page(f"{question} (Statics held fixed: another question than captum_attributions)", caption, 5.4)
    upper, lower = _bands(figure, [1.2, 1])
    own = layers[layers["icu_stay_id"] == stay]
    wide = own.pivot(index="layer", columns="event", values="attribution").loc[names]
    events = tables["events"]
    hours = events[events["icu_stay_id"] == stay].sort_values("event")["hours_to_end"].to_numpy()
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
    found = _rank_agreement(both, ["layer", "icu_stay_id", "patient_id"], "attribution", "attribution_first")
    axes, at = subfigure.subplots(), np.arange(len(names))
    heights = found["layer"].map(dict(zip(names, at))) + np.random.default_rng(0).uniform(-0.2, 0.2, len(found))
    axes.scatter(found["correlation"], heights, s=5, color="#b5b5b5")
    _error_dots(axes, _means_by(found, "layer", "correlation").reindex(names), at, "black")
    n_stays = _count(layers["icu_stay_id"].nunique(), "stay")
    gap = layers["gap_error"].abs().max()
    title = f"Agreement with {names[0].replace('_', ' ')}; the sums miss at most {gap:.2f} logit"
    tidy(axes, f"rank correlation of a stay's events, {n_stays}; black: mean, 95 % interval", "", title)
    _rows(axes, [name.replace("_", " ") for name in names])
    axes.set_xlim(min(0.0, found["correlation"].min()) - 0.03, 1.03)
    _ticks(axes, 6)


def _group_order(name: str) -> int:
    """Return the place of event types and clock windows in their own order; other groups stay as they come."""
    order = [*EVENT_TYPES, *window_names()]
    return order.index(name) if name in order else 0


def _draw_groups(axes: Axes, rows: pd.DataFrame, kind: str) -> None:
    """Draw attribution and ablation of the groups of one kind, mean per stay that has the group."""
    names = sorted(rows["group"].unique(), key=_group_order)
    at = np.arange(len(names))
    measures = (("attribution", "push, summed", BLUE, "o"), ("ablation", "if unremarkable", VERMILLION, "s"))
    for shift, (value, word, color, marker) in zip((-0.14, 0.14), measures):
        _error_dots(
            axes,
            _means_by(rows, "group", value).reindex(names),
            at + shift,
            color,
            marker,
            word,
        )
    axes.axvline(0, color="black", linewidth=0.7)
    tidy(axes, "", "")
    stays = rows.groupby("group")["icu_stay_id"].nunique()
    words = [_count(stays[name], "stay") for name in names]
    _rows(axes, [TYPE_WORDS.get(name, _for_plot(name, 40)) for name in names], words)
    axes.set_title(f"by {kind}" if kind != "static" else "patient and admission", fontsize=8.5, loc="left")
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
    panels[-1].set_xlabel(f"mean per stay that has the group, {LOGIT}; each panel has its own scale", fontsize=8)
    handles = panels[0].get_legend_handles_labels()
    upper.legend(
        *handles,
        loc="outside upper center",
        ncols=2,
        fontsize=7.5,
        frameon=False,
    )
    axes = lower.subplots()
    known = events.dropna(subset=["if_unremarkable"])
    axes.hexbin(
        known["attribution"],
        known["if_unremarkable"],
        gridsize=60,
        bins="log",
        cmap="Greys",
        mincnt=1,
    )
    axes.axline(
        (0, 0),
        slope=1,
        color=VERMILLION,
        linewidth=0.7,
        linestyle="--",
    )
    agreement = _rank_agreement(known, ["icu_stay_id", "patient_id"], "attribution", "if_unremarkable")["correlation"]
    median = f"median rank correlation within a stay {agreement.median():.2f}"
    title = f"{_count(len(known), 'event')} (dashed: equal); {median}"
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
    """Draw `curves`, as `deletion_insertion` gives them, of all checked stays: a panel for each direction."""
    curves = with_one_random_order(tables["curves"])
    n_stays = _count(curves["icu_stay_id"].nunique(), "stay")
    question = "Do the events that an explanation ranks first move the prediction most?"
    figure = _page(question, f"{caption} · measured on {n_stays}", 3.4)
    (body,) = _bands(figure, [1])
    means = curves.groupby(["direction", "order", "fraction"])["change"].mean()
    verbs = {"deletion": "made unremarkable", "insertion": "given back to a stay that says nothing"}
    for axes, (direction, verb) in zip(body.subplots(1, 2), verbs.items()):
        for order, style in ORDER_STYLES.items():
            line = means[direction, order]
            axes.plot(100 * line.index, line, label=ORDERS.get(order, "random order"), **style)
        axes.axhline(0, color="black", linewidth=0.5)
        tidy(axes, "% of the events, highest first", "change of the logit", f"Events {verb}")
        _ticks(axes, 5, 5)
    handles = axes.get_legend_handles_labels()
    body.legend(
        *handles,
        loc="outside upper center",
        ncols=4,
        fontsize=7.5,
        frameon=False,
    )
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
    """Draw all pictures, by file name without .png; `deletion_insertion` only where stays were checked.

    >>> draw_figures(tables)["item_importance"].savefig("items.png")  # doctest: +SKIP
    """
    checked = len(tables.get("curves", ())) > 0
    return {name: draw_figure(name, tables, caption) for name in FIGURES if checked or name != "deletion_insertion"}


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
The push of an event is its share of the prediction on the logit scale, found by Integrated Gradients between a stay
whose events say nothing and this one: {{ doubling | signed }} doubles the odds of death, {{ -doubling | signed }}
halves them. “Odds through it” compares the odds of death with those if this event alone were unremarkable,
that is, replaced by the mean event of training; the number of events stays what it is.</p>
<h2>All explained stays</h2>
<p>{{ cohort }}</p>
{{ table("Stays shown below", ["stay", "shown because", "#predicted risk", "outcome"], shown) }}
{% if calibration is not none %}
{{ calibration_chart() }}
{% endif %}
<p>{{ windows | join(" ") }}</p>
{{ figure("feature_importance") }}
{% if items %}
<h3>Items</h3>
<p>{{ items | join(" ") }}</p>
{{ figure("item_importance") }}
{{ table("Mean push of an item at each level of its texts, logit (events)", ["item"] + level_names, levels) }}
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
{% if checks %}
<p>{{ summary }}</p>
{{ table("Checks of the explanations against the model itself", ["check", "what was found", "result"], checks) }}
{% else %}
<p>They were not checked in this run.</p>
{% endif %}
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
EVENTS_LISTED, EVENTS_DRAWN = 10, 600  # of a stay


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


def _plain_number(value: object) -> str:
    """Return a number without needless digits, anything else as it is."""
    try:
        return f"{float(str(value)):.3g}"
    except ValueError:
        return str(value)


def _event_rows(events: pd.DataFrame, temperature: float) -> list[list[str]]:
    """Return the cells of the strongest events, as `EVENT_COLUMNS` names them."""
    rows = []
    for row in events.itertuples():
        clock = "" if pd.isna(row.event_time) else f"{pd.Timestamp(row.event_time):%Y-%m-%d %H:%M}"
        hours = [f"{row.hours_since_admission:.1f}", f"{row.hours_to_end:.1f}"]
        rows.append([row.event_text, clock, *hours, _signed(row.attribution), _odds(row.if_unremarkable, temperature)])
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
    return {"ticks": ticks, "reach": f"+{reach:.2g}", "risks": " ".join(risks), "events": stems, "note": note}


def _calibration_sentence(table: pd.DataFrame | None, probability: float) -> str:
    """Say what became of the stays with about this risk."""
    if table is None:
        return "There are too few stays to say how far a risk of this size can be trusted."
    row = table.loc[(table["mean_risk"] - probability).abs().idxmin()]
    interval = f"95 % interval {100 * row['low']:.0f} to {100 * row['high']:.0f} %"
    died = f"{row['deaths']:.0f} died: {100 * row['observed_rate']:.0f} %, {interval}."
    return f"Of the {row['n']:.0f} stays with the most similar risks (mean {_percent(row['mean_risk'])}), {died}"


def _decisive_sentence(decisive: pd.DataFrame, stay: Any) -> str:
    """Say without which events the decision would be another one."""
    if "threshold" not in decisive or not len(decisive):
        return ""
    row = decisive.iloc[0]
    which = "this event" if len(decisive) == 1 else f"these {len(decisive)} events"
    texts = "; ".join(_short_text(text, 80) for text in decisive["event_text"])
    without = f"{_percent(row['probability_without'])} instead of {_percent(row['probability'])}"
    return f"Without {which} the risk would be {without}, on the other side of {_percent(row['threshold'])}: {texts}."


def _stay_context(stay: Any, tables: Tables, calibration: pd.DataFrame | None, temperature: float) -> dict[str, Any]:
    """Return what the template says of one stay, a row of `stays`."""
    parts = {}
    for name in ("events", "statics", "trajectory", "systems", "decisive"):
        table = tables.get(name, pd.DataFrame(columns=["icu_stay_id"]))
        parts[name] = table[table["icu_stay_id"] == stay.icu_stay_id]
    events, statics = parts["events"], parts["statics"].sort_values("attribution", key=abs, ascending=False)
    towards = events[events["attribution"] >= FLOOR].nlargest(EVENTS_LISTED, "attribution")
    away = events[events["attribution"] <= -FLOOR].nsmallest(EVENTS_LISTED, "attribution")
    start = f"{_percent(expit(stay.baseline_logit / temperature))} (logit {_signed(stay.baseline_logit)})"
    sums = f"A stay whose events say nothing starts at {start}. The {_count(len(events), 'event')} add "
    sums += f"{_signed(events['attribution'].sum())}, patient and admission {_signed(statics['attribution'].sum())}, "
    sums += f"which gives logit {_signed(stay.logit)}: {_percent(stay.probability)}."
    place = f"Percentile {stay.risk_percentile:.0f} of the risks of all held-out stays. "
    static_rows = []
    for row in statics.itertuples():
        static_rows.append([row.feature, _plain_number(row.value), _signed(row.attribution), _signed(row.ablation)])
    system_rows = []
    for row in parts["systems"].itertuples():
        system_rows.append([row.system, f"{row.n_events:,}", _signed(row.push)])
    return {
        "icu_stay_id": stay.icu_stay_id,
        "why_shown": stay.why_shown,
        "risk": _percent(stay.probability),
        "outcome": _outcome(stay.label),
        "place": place + _calibration_sentence(calibration, stay.probability),
        "sums": sums,
        "gap": "" if stay.complete else _signed(stay.gap_error),
        "decisive": _decisive_sentence(parts["decisive"], stay),
        "timeline": _timeline(events, parts["trajectory"]),
        "towards": _event_rows(towards, temperature),
        "away": _event_rows(away, temperature),
        "systems": system_rows,
        "statics": static_rows,
    }


def _cohort_sentence(stays: pd.DataFrame, n_events: int) -> str:
    """Say how many stays were explained, how they ended, and whether the parts add up."""
    known = stays["label"].dropna()
    ends = "Their outcomes are unknown."
    if len(known):
        of_known = "" if len(known) == len(stays) else " of known outcome"
        ends = f"{int(known.sum()):,} of {_count(len(known), 'stay')}{of_known} ended with death in hospital."
    who = f"{_count(len(stays), 'held-out stay')} of {_count(stays['patient_id'].nunique(), 'patient')}"
    flagged = int((~stays["complete"].astype(bool)).sum())
    adds = f"For all{f' but {flagged}' if flagged else ''} of them the parts add up to the prediction."
    return f"{who} with {_count(n_events, 'event')}. {ends} {adds}"


def _level_cells(levels: pd.DataFrame, items: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Return the names of the levels, far below to far above, and for each item its mean push (events) at each."""
    order = ["far below range", "slightly below range", "below range", "within range"]
    order += ["slightly above range", "above range", "far above range"]
    found = levels["level"].unique()
    names = [name for name in order if name in found] + sorted(set(found) - set(order))
    cells = {}
    for row in levels.itertuples():
        cells[row.item, row.level] = f"{_signed(row.push)} ({row.n_events})"
    known = [item for item in items["item"] if item in set(levels["item"])]
    return names, [[item, *(cells.get((item, name), "") for name in names)] for item in known]


def _check_rows(faithfulness: pd.DataFrame | None, verdict_holds: bool) -> tuple[str, list[list[str]]]:
    """Return how many checks are passed, in a sentence (none is counted under a bad verdict), and the cells of each."""
    if faithfulness is None or not len(faithfulness):
        return "", []
    words = {True: "passed", False: "falls short"}
    rows = []
    for row in faithfulness.itertuples():
        rows.append([f"{row.check}: {row.method}", row.sentence, words.get(row.passed, "not judged")])
    if not verdict_holds:
        return "The model fails the verdict above: how right its explanations are says nothing about patients.", rows
    results = [row[2] for row in rows]
    fallen = results.count("falls short")
    judged = fallen + results.count("passed")
    warning = " Where one falls short, trust the explanations less." if fallen else ""
    return f"{judged - fallen} of {judged} checks with a threshold are passed.{warning}", rows


def _picture(figure: Figure) -> dict[str, str]:
    """Return a figure as the base64 of its PNG, with its question for those who cannot see it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"data": data, "question": " ".join(figure.get_suptitle().split())}


def _stay_links(shown: pd.DataFrame) -> list[list[Any]]:
    """Return the cells of the stays shown in full, the first a link to its section."""
    rows: list[list[Any]] = []
    for row in shown.itertuples():
        link = Markup('<a href="#stay-{0}">Stay {0}</a>').format(row.icu_stay_id)
        rows.append([link, row.why_shown, _percent(row.probability), _outcome(row.label)])
    return rows


def render_report(tables: Tables, figures: dict[str, Figure], info: dict[str, Any]) -> str:
    """Return the whole report.html: verdict, cohort, each stay with `why_shown`, the checks, the technical appendix.

    tables: stays, events, statics, trajectory, windows, faithfulness, and where present verdict, items, levels,
    systems, decisive; figures by file name without .png; info: text_encoder, and optionally data, checkpoint, setting
    (a sentence: which events the model sees), temperature (probability = sigmoid(logit / temperature)) and calibration
    (as `calibration_table` gives it, of all test stays; else of the explained stays, from 20).
    """
    stays, temperature = tables["stays"], info.get("temperature", 1.0)
    calibration = info.get("calibration")
    known = stays[stays["label"].notna()]
    if calibration is None and len(known) >= 20:
        n_bins = int(np.clip(len(known) // 10, 2, 10))
        calibration = calibration_table(known["label"], known["probability"], n_bins=n_bins)
    shown = stays[stays["why_shown"] != ""].sort_values("probability", ascending=False)
    words = {"data": "data", "checkpoint": "checkpoint", "text_encoder": "text encoder"}
    facts = [f"{word}: {info[key]}" for key, word in words.items() if info.get(key)]
    items, levels = tables.get("items"), tables.get("levels")
    level_names, level_rows = ([], []) if items is None or levels is None else _level_cells(levels, items)
    verdict = tables.get("verdict")
    verdict_holds = verdict is None or bool(verdict["passed"].ne(False).all())
    summary, checks = _check_rows(tables.get("faithfulness"), verdict_holds)
    windows = tables.get("windows")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"signed": _signed, "percent_of": lambda share: f"{100 * share:.0f} %"}
    return environment.from_string(REPORT).render(
        appendix=APPENDIX,
        blue=BLUE,
        calibration=calibration,
        checks=checks,
        cohort=_cohort_sentence(stays, len(tables["events"])),
        disclaimer=DISCLAIMER,
        doubling=math.log(2) * temperature,
        event_columns=EVENT_COLUMNS,
        facts=" · ".join(facts),
        floor=FLOOR,
        items=[] if items is None else items["sentence"][items["rho"].abs() >= 0.3].tolist(),
        level_names=[f"#{name}" for name in level_names],
        levels=level_rows,
        most=EVENTS_LISTED,
        pictures={name: _picture(figure) for name, figure in figures.items()},
        setting=info.get("setting", ""),
        shown=_stay_links(shown),
        stays=[_stay_context(row, tables, calibration, temperature) for row in shown.itertuples()],
        summary=summary,
        verdict=[] if verdict is None else verdict["sentence"].tolist(),
        verdict_holds=verdict_holds,
        windows=[] if windows is None else windows["sentence"].tolist(),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Self-check: synthetic stays whose causes are known
# ---------------------------------------------------------------------------------------------------------------------


def planted_scores(events: pd.DataFrame, truth: pd.DataFrame) -> pd.DataFrame:
    """Per stay and method: precision@k of the k events that truly act, share of right signs, mean |score| of causal and of decoy events.

    `truth` has the rows of `events`: true_effect (logit), role, group.
    """
    table, rows = events.assign(true_effect=truth["true_effect"].to_numpy(), role=truth["role"].to_numpy()), []
    for (stay, patient), part in table.groupby(["icu_stay_id", "patient_id"], sort=False):
        causal = part["true_effect"].to_numpy() != 0
        if not causal.any():
            continue
        for order in ORDERS:
            score = part[order].to_numpy(float)
            top = np.argsort(-np.abs(score), kind="stable")[: causal.sum()]
            decoys = np.abs(score[(part["role"] == "decoy").to_numpy()])
            rows.append(
                {
                    "icu_stay_id": stay,
                    "patient_id": patient,
                    "method": order,
                    "precision": causal[top].mean(),
                    "chance": causal.mean(),
                    "right_sign": (np.sign(score[causal]) == np.sign(part["true_effect"].to_numpy()[causal])).mean(),
                    "causal": np.abs(score[causal]).mean(),
                    "decoy": decoys.mean() if len(decoys) else math.nan,
                }
            )
    return pd.DataFrame(rows)


def redundant_sums(events: pd.DataFrame, truth: pd.DataFrame) -> pd.DataFrame:
    """Sum of the attributions and of the true effects of each redundant group (either event is enough)."""
    part = events.assign(
        true_effect=truth["true_effect"].to_numpy(), role=truth["role"].to_numpy(), group=truth["group"].to_numpy()
    )
    part = part[part["role"] == "redundant"]
    return part.groupby(["patient_id", "group"])[["attribution", "if_unremarkable", "true_effect"]].sum().reset_index()


def planted_criteria(scores: pd.DataFrame, sums: pd.DataFrame, settings: ExplainSettings) -> list[dict[str, Any]]:
    """What the issue asks of planted truth: attention is measured too, and nothing is asked of it."""
    rows, options = [], (settings.n_bootstrap, settings.seed)
    for order, title in ORDERS.items():
        part, asked = scores[scores["method"] == order], order != "attention"
        patients = part["patient_id"].to_numpy()
        precision, sign = (bootstrap(part[name].to_numpy(), patients, *options) for name in ("precision", "right_sign"))
        rows.append(
            criterion(
                "planted precision@k",
                order,
                precision,
                (">=", 0.9) if asked else None,
                f"of the events that {title} ranks first, {{value:.3f}} [{{low:.3f}}, {{high:.3f}}] are causes (chance {part['chance'].mean():.2f})",
                limit="low",
            )
        )
        if asked:
            rows.append(
                criterion(
                    "planted sign",
                    order,
                    sign,
                    (">=", 0.95),
                    f"{title} gives {{value:.1%}} [{{low:.1%}}, {{high:.1%}}] of the causes the right sign",
                )
            )
        ratio = {
            "value": float(part["causal"].mean() / part["decoy"].mean()),
            "low": math.nan,
            "high": math.nan,
            "n": len(part),
        }
        rows.append(
            criterion(
                "causes over decoys",
                order,
                ratio,
                (">=", 10.0) if asked else None,
                f"{title} gives a cause {{value:.1f}} times as much as an event that only looks alarming",
            )
        )
    ratio = {
        "value": float(sums["attribution"].mean() / sums["true_effect"].mean()),
        "low": math.nan,
        "high": math.nan,
        "n": len(sums),
    }
    error = ratio | {"value": abs(ratio["value"] - 1)}
    rows.append(
        criterion(
            "redundant groups",
            "attribution",
            error,
            ("<=", 0.25),
            f"attributions of redundant evidence sum to {ratio['value']:.2f} of its true effect "
            f"(replacement: {sums['if_unremarkable'].mean() / sums['true_effect'].mean():.2f}); off by {{value:.0%}} in {{n}} stays",
        )
    )
    return rows


# Of the sample's effects: a cause then moves the logit by 1.5 (median). With the full effects seven in ten true logits lie beyond
# 4, and training has no reason to learn how far beyond: attributions cannot have the size of the truth (tests/make_sample.py).
SELFCHECK_EFFECTS = 0.35


def load_sample_maker() -> Any:
    """tests/make_sample.py as a module, wherever the program was started."""
    path = train.HERE / "tests" / "make_sample.py"
    if not path.exists():
        raise InputError(
            f"{path}: not found. --selfcheck needs the generator of the sample; run it in a checkout of the repository."
        )
    spec = importlib.util.spec_from_file_location("make_sample", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train_on_sample(seed: int, folder: Path, settings: ExplainSettings) -> tuple[Run, pd.DataFrame]:
    """A model trained on a fresh sample, ready to be explained, and the truth about the events of all stays."""
    maker = load_sample_maker()
    sample = maker.make_sample(
        round(settings.selfcheck_stays / 0.64), seed, SELFCHECK_EFFECTS
    )  # train.py trains on 64 %
    maker.write_csv(sample, folder / "sample.csv")
    options = train.check_settings(
        train.Settings(
            data=str(folder / "sample.csv"),
            text_encoder="hashing",
            output_dir=str(folder),
            cache_dir=settings.cache_dir,
            seed=seed,
            max_epochs=settings.selfcheck_epochs,
            save_attention_every=0,
        )
    )
    accelerator = full_precision()
    table, _ = train.read_stays(folder / "sample.csv", settings.cache_dir)
    text_encoder, vectors = train.embed_texts(table.texts, options, accelerator)
    split = train.split_by_patient(table, seed)
    trainer = train.Trainer(table, split, vectors, text_encoder, options, folder, accelerator)
    trainer.fit()
    checkpoint = train.load_checkpoint(folder / "checkpoints" / "best_model.pth", accelerator.device)
    return make_run(checkpoint, table.take(split.test), vectors, True, accelerator), sample.events.assign(
        event_text=sample.table["event_text"]
    )


def truth_of(events: pd.DataFrame, truth: pd.DataFrame) -> pd.DataFrame:
    """The truth about the events of a table, matched by stay, text and order; ValueError where they do not belong together."""
    left, right = (
        frame.assign(again=frame.groupby(["icu_stay_id", "event_text"]).cumcount())
        for frame in (events[["icu_stay_id", "event_text"]], truth)
    )
    found = left.merge(right, on=["icu_stay_id", "event_text", "again"], how="left", validate="one_to_one")
    if found["true_effect"].isna().any():
        raise ValueError("some events are not in the truth: events and truth are of different samples.")
    return found


def selfcheck(settings: ExplainSettings) -> list[dict[str, Any]]:
    """Train on samples with known causes, explain, and compare; returns every criterion."""
    scores, sums, runs = [], [], []
    for seed in range(settings.selfcheck_seeds):
        with tempfile.TemporaryDirectory() as folder:
            run, truth = train_on_sample(seed, Path(folder), settings)
        tables = explain(run, replace(settings, seed=seed))
        logger.info(f"Seed {seed}      {len(tables['stays'])} stays explained")
        known = truth_of(tables["events"], truth)
        renamed = tables["events"].assign(patient_id=tables["events"]["patient_id"].astype(str) + f" of sample {seed}")
        scores.append(planted_scores(renamed, known))
        sums.append(redundant_sums(renamed, known))
        runs.append(tables["faithfulness"].assign(seed=seed))
    criteria = planted_criteria(pd.concat(scores), pd.concat(sums), settings)
    return [row | {"seed": "all"} for row in criteria] + pd.concat(runs).to_dict("records")


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------

TABLE_FILES = {
    "stays": "stays.csv",
    "events": "event_attributions.parquet",
    "statics": "static_attributions.csv",
    "groups": "group_importance.csv",
    "layers": "layer_attributions.parquet",
    "heads": "head_roles.csv",
    "query_similarity": "query_similarity.csv",
    "windows": "time_windows.csv",
    "trajectory": "risk_trajectories.csv",
    "curves": "deletion_insertion.csv",
    "items": "item_importance.csv",
    "levels": "item_levels.csv",
    "systems": "organ_systems.csv",
    "decisive": "decisive_events.csv",
}


def run_explainability_analysis(
    checkpoint_path: str | Path = ExplainSettings.checkpoint,
    test_data_path: str | Path = ExplainSettings.data,
    save_dir: str | Path | None = ExplainSettings.save_dir,
    **options: Any,
) -> dict[str, pd.DataFrame]:
    """Explain held-out stays with a checkpoint alone; returns the tables and, with a `save_dir`, writes them and the pictures.

    `options` are fields of `ExplainSettings` (stays, max_stays, text_encoder, cache_dir, seed, ...). Keys of the result: stays,
    events, statics, groups, layers, heads, query_similarity, windows, trajectory, curves, faithfulness. Raises `InputError` for
    anything that the caller can mend.

    >>> tables = run_explainability_analysis("best_model.pth", "new.csv", save_dir=None, stays=2)  # doctest: +SKIP
    """
    try:
        settings = ExplainSettings(
            checkpoint=str(checkpoint_path), data=str(test_data_path), save_dir=str(save_dir or ""), **options
        )
    except TypeError as error:
        raise InputError(
            f"run_explainability_analysis: {str(error).split('() ')[-1]}; the options are the fields of ExplainSettings."
        ) from None
    train.check_limits(settings)
    run = load_run(
        settings.checkpoint,
        settings.data,
        settings.text_encoder,
        settings.cache_dir,
        settings.hf_cache,
        settings.labels,
    )
    tables = explain(run, settings)
    for sentence in tables["faithfulness"]["sentence"]:
        logger.info(f"Check       {sentence}")
    if save_dir:
        written = write_everything(Path(save_dir), run, tables, settings)
        logger.info("Written     " + "\n            ".join(map(str, written)))
    return {name: tables[name] for name in (*TABLE_FILES, "faithfulness", "attention")}


def write_everything(folder: Path, run: Run, tables: dict[str, Any], settings: ExplainSettings) -> list[Path]:
    """Tables, faithfulness.json, the nine pictures and the report; the one place that writes."""
    written = []
    for name, file in TABLE_FILES.items():
        save = (
            (lambda path, table=tables[name]: table.to_parquet(path, index=False))
            if file.endswith("parquet")
            else (lambda path, table=tables[name]: table.to_csv(path, index=False, float_format="%.6g"))
        )
        written.append(train.write_whole(folder / file, save))
    written.append(train.write_json(folder / "faithfulness.json", faithfulness_record(run, tables)))
    trained = run.checkpoint.settings
    setting = (
        f"The model predicts {trained.observation_hours:g} h after ICU admission from what was known then."
        if trained.observation_hours
        else "The model reads the whole stay up to discharge or death, so it describes a stay that has ended and does not foresee."
    )
    caption = f"{len(tables['stays'])} held-out stays of {tables['stays']['patient_id'].nunique()} patients · text encoder: {run.checkpoint.text_encoder}"
    figures = draw_figures(tables, caption)
    written += [train.save_figure(folder / f"{name}.png", figure) for name, figure in figures.items()]
    info = {
        "data": Path(settings.data).name,
        "checkpoint": Path(settings.checkpoint).name,
        "text_encoder": run.checkpoint.text_encoder,
        "setting": setting,
        "temperature": run.checkpoint.temperature,
        "calibration": calibration_of(run),
    }
    page_text = render_report(tables, figures, info)
    return [*written, train.write_whole(folder / "report.html", lambda path: path.write_text(page_text, "utf-8"))]


def faithfulness_record(run: Run, tables: dict[str, Any]) -> dict[str, Any]:
    """What faithfulness.json holds: every check in plain words, and the curves behind the first; no NaN, which is not JSON."""
    curves = tables["curves"]
    means = (
        curves.assign(order=curves["order"].str.replace(r" \d+$", "", regex=True))
        .groupby(["direction", "order", "fraction"])["change"]
        .mean()
    )
    plain = lambda rows: [
        {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
        for row in rows
    ]
    return {
        "text_encoder": run.checkpoint.text_encoder,
        "stays": len(tables["stays"]),
        "held_out_split": run.held_out,
        "checks": plain(tables["faithfulness"].astype(object).to_dict("records")),
        "curves": plain(means.reset_index().to_dict("records")),
    }


def calibration_of(run: Run) -> pd.DataFrame | None:
    """Calibration of all held-out stays of known outcome; None where they are too few to say anything."""
    known = ~np.isnan(run.table.labels)
    if known.sum() < 20:
        return None
    return train.calibration_table(
        run.table.labels[known],
        run.checkpoint.probabilities(run.logits[known]),
        n_bins=int(np.clip(known.sum() // 10, 2, 10)),
    )


def run_selfcheck(settings: ExplainSettings) -> int:
    """Print every criterion with its value and threshold; 0 if none falls short, else 1."""
    rows = pd.DataFrame(selfcheck(settings))
    fallen = rows[rows["passed"].eq(False)]
    for row in rows.itertuples():
        verdict = {True: "ok", False: "SHORT"}.get(row.passed, "")
        logger.info(
            f"{verdict:6s}seed {row.seed!s:4s}{row.check:32s}{row.method:12s}{row.value:9.3g} [{row.low:.3g}, {row.high:.3g}]".replace(
                "[nan, nan]", ""
            )
            + (f"  asked: {row.threshold}" if isinstance(row.threshold, str) else "")
        )
    if settings.save_dir:
        content = json.loads(rows.to_json(orient="records"))
        logger.info(f"Written     {train.write_json(Path(settings.save_dir) / 'selfcheck.json', content)}")
    logger.info(f"Self-check  {len(fallen)} of {rows['passed'].notna().sum()} criteria fall short")
    return 1 if len(fallen) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit code: 0 done, 1 the self-check fell short, 2 something to mend, 130 interrupted."""
    settings = train.settings_from(argv, ExplainSettings, __doc__)
    train.log_to_stdout()
    options = {
        name: value for name, value in asdict(settings).items() if name not in ("checkpoint", "data", "save_dir")
    }
    try:
        if settings.selfcheck:
            train.check_limits(settings)
            return run_selfcheck(settings)
        run_explainability_analysis(settings.checkpoint, settings.data, settings.save_dir, **options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. Nothing half-written is left.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
