"""Show what a trained model bases each prediction on, and measure how far that explanation can be trusted.

    python explain_clinicalLF.py                                     # the bundled sample, after `python train.py`
    python explain_clinicalLF.py --data PATH/TO/mimic-iv --stays 4   # held-out stays of that data, four shown in full
    python explain_clinicalLF.py --checkpoint best_model.pth --data NEW.csv --save-dir OUT
    python explain_clinicalLF.py --quick                             # the same in half a minute, on short stays

Four views of one model, on the logit (log-odds of death) and never on the probability, which saturates:
Integrated Gradients (what moves the logit from a stay whose events say nothing to this one), absence (how far the logit
falls had an event not been there), attention (where the model looks), and the layers between. They differ.
`verdict.csv` says whether the model is worth explaining, `faithfulness.json` how much each view is worth.

Axes: B stays, L events of a stay, C = 774 inputs of an event, S static inputs, H heads. Masks are True at real events.
Explains this model, not causes of death. Research software: not a medical device, not for clinical use.
"""

import copy
import html
import json
import logging
import math
import operator
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from captum.attr import IntegratedGradients, LayerIntegratedGradients
from matplotlib.figure import Figure
from scipy.special import expit
from torch import Tensor, nn
from torch.nn import functional as F

import train
from clinical_lf import audit, explain_report, files, findings, metrics, run_folder
from clinical_lf.explain_plots import FIGURES, draw_captum_attributions, draw_figure, draw_figures
from clinical_lf.explain_report import FEW, FLOOR, Check, counted, percent, static_word
from clinical_lf.files import InputError, logger
from clinical_lf.findings import clock_window, rank_correlation
from clinical_lf.items import HISTORY, item_history, mask_numbers, quantiles_in, read_text
from clinical_lf.metrics import figure_text, mean_with_interval
from clinical_lf.plan import only_cpu
from clinical_lf.plots import png_of
from clinical_lf.settings import check_limits, setting, settings_from
from clinical_lf.tables import EVENT_TYPES, LABEL, known_at, stacked
from train import ClinicalTransformer, load_attention_weights, save_attention_weights

__all__ = [
    "Ablation", "Attribution", "ExplainSettings", "Explanation", "Stay", "ablation_analysis",
    "analyze_critical_time_periods", "analyze_feature_importance_over_time", "analyze_layer_attention_patterns",
    "analyze_static_feature_attribution", "analyze_temporal_feature_attribution", "captum_analysis",
    "draw_figure", "draw_figures", "layer_analysis", "load_attention_weights", "map_features_to_clinical",
    "name_inputs", "run_explainability_analysis", "save_attention_weights", "stay_of", "to_shap",
]  # fmt: skip

Baseline = dict[str, Tensor] | None  # an event (C,) and statics (S,), by the names "event" and "static"; None: zeros
MAX_MAP_EVENTS = 3000  # layer maps grow with the square of the events
GRADIENT_EVENTS = 2048  # of a pass with gradients, some 100 kB each
FORWARD_EVENTS = 8192  # of a pass without, some 30 kB each
IG_STEPS = 12  # nine in ten stays are complete with them; the others are tried again with 4 and 16 times as many
METHODS = ("attribution", "if_absent", "relevance", "attention")
SHARED = train.Settings.__dataclass_fields__  # settings that mean what they mean there; empty, the checkpoint's


@dataclass(frozen=True)
class ExplainSettings:
    """What a person may want to change; everything about the model comes from its checkpoint."""

    checkpoint: str = setting("trained_models/clinical_LF/checkpoints/best_model.pth", "Checkpoint or run's folder.")
    data: str = setting("", "Data whose held-out stays are used, as train.py takes it; default: the checkpoint's.")
    save_dir: str = setting("", "Folder for the report and its files; default: explainability beside checkpoints.")
    stays: int = setting(
        4,
        "Stays shown: highest, lowest, most uncertain, most wrong risk.",
        hint="; --stay-ids takes ids",
        low=0,
        high=50,
    )
    stay_ids: str = setting("", "Ids (icu_stay_id) of the held-out stays to show in full, instead of a choice: 1,2,3.")
    max_stays: int = setting(100, "Held-out stays analysed at most, drawn at random; 0 takes all.", low=0)
    decision_threshold: float = setting(0.5, "Risk of a decision: which events turn it?", above=0, below=1)
    quick: bool = setting(False, "Half a minute's look: short stays, few checks, no layers; a full run may differ.")
    text_encoder: str = field(default="", metadata=SHARED["text_encoder"].metadata)
    labels: str = field(default="", metadata=SHARED["labels"].metadata)
    vitals: str = field(default="", metadata=SHARED["vitals"].metadata)
    cache_dir: str = field(default="", metadata=SHARED["cache_dir"].metadata)
    memory_limit: str = field(default=train.Settings.memory_limit, metadata=SHARED["memory_limit"].metadata)
    n_bootstrap: int = setting(1000, "Bootstrap samples behind every 95 % interval.", low=1)
    seed: int = setting(0, "Seed of the choice of stays, random orders, untrained models and the bootstrap.")


class Effort(NamedTuple):
    """How much a run measures beside what it is asked to show."""

    checked: int = 40  # stays on which deletion, infidelity and randomisation are measured
    removed: int = 100  # events of a stay taken out one by one, beside those that are listed
    numbers: int = 40  # events of a stay, drawn at random, whose number becomes typical, beside those that are listed
    events: int = 10**9  # of all stays that are analysed, together; none has more than a sixth
    layers: bool = True


QUICK = Effort(checked=4, removed=20, numbers=10, events=1200, layers=False)


# ---- Load ------------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A trained model and the stays it is explained on, which it has not seen in training."""

    checkpoint: train.Checkpoint
    table: train.StayTable
    dataset: train.ClinicalSequenceDataset
    logits: np.ndarray  # (n_stays) float64
    held_out: int  # stays of patients of the checkpoint's own test split
    is_new_item: np.ndarray  # (n_texts) bool: training never saw the item of the text, or not in its unit
    typical_texts: np.ndarray  # (n_texts) number of the text that `typical_texts` gives each, -1 without
    asked: tuple[int, ...] = ()  # stays to show, if not a choice
    data: str = ""  # what the data are called

    @property
    def parts(self) -> dict[str, slice]:
        """Which of an event's inputs are its type, its text, its time, and more."""
        return event_parts(self.dataset.input_dim, self.checkpoint.preprocessor.item_history)

    def one(self, stay: int) -> "OneStay":
        """Return a stay whose events can be taken out."""
        return OneStay(*self.inputs(stay), self.dataset, stay)

    def inputs(self, stay: int) -> tuple[Tensor, Tensor]:
        """(1, L, C) events and (1, S) static inputs of a stay, where the model is."""
        sequence, static, _ = self.dataset[stay]
        device = next(self.checkpoint.model.parameters()).device
        return sequence.unsqueeze(0).to(device), static.unsqueeze(0).to(device)


def float32_accelerator() -> Accelerator:
    """Return the process's accelerator, also after training in bf16, without autocast: differences need all digits."""
    return Accelerator(cpu=only_cpu(), kwargs_handlers=[AutocastKwargs(enabled=False)])


def load_unseen(
    checkpoint_path: str | Path, test_data_path: str | Path | pd.DataFrame = "", settings: ExplainSettings | None = None
) -> Run:
    """Return the checkpoint with the stays of patients it was neither trained nor tuned on. Raises InputError."""
    settings, accelerator = settings or ExplainSettings(), float32_accelerator()
    checkpoint = train.load_checkpoint(checkpoint_path, accelerator.device)
    trained, is_frame = checkpoint.settings, isinstance(test_data_path, pd.DataFrame)
    data = train.THE_FRAME if is_frame else str(test_data_path) or trained.data
    if not is_frame and not test_data_path and not train.data_path(data).exists() and "*" not in data:
        raise InputError(f"{data}: the data that the checkpoint was trained on are not there. Give --data.")
    # The folder given, else the one that training used, where this machine has it, else train.py's default.
    own = trained.cache_dir if os.access(trained.cache_dir, os.W_OK) else train.Settings.cache_dir
    given = {"cache_dir": settings.cache_dir or own, "memory_limit": settings.memory_limit}
    given |= {"labels": settings.labels, "vitals": settings.vitals, "text_encoder": settings.text_encoder}
    loaded = train.load_run(checkpoint, test_data_path, accelerator, only_unseen=True, **given)
    held_out = int(loaded.dataset.table.stays["patient_id"].isin(checkpoint.patients["test"]).sum())
    if not held_out and not checkpoint.is_seen(loaded.source.table.stays).any():
        logger.warning(f"Data        WARNING: no patient of {data} was trained or tested on: these are other data")
    table, quantiles = loaded.dataset.table, checkpoint.preprocessor.state_dict().get("item_quantiles", {})
    asked = asked_stays(settings.stay_ids, table.stays, loaded.source.table.stays["icu_stay_id"])
    known = (checkpoint.is_new_item(table.texts), typical_texts(table.texts, quantiles), asked, data)
    return Run(checkpoint, table, loaded.dataset, loaded.logits, held_out, *known)


def typical_texts(texts: np.ndarray, quantiles: dict[str, list[float]]) -> np.ndarray:
    """Return, for each of the texts, the number of that which says the same with a number nearest its item's median.

    Level and flag may differ. -1: it has no number, or no such text lies in the middle half of training's numbers.
    """
    rows = []
    for number, reading in enumerate(map(read_text, texts)):
        known = quantiles.get(reading.kind)
        if known and math.isfinite(reading.value):
            place = float(quantiles_in(known, np.array(reading.value)))  # 0 at the median
            rows.append((number, LEVEL.sub("", reading.without_value), abs(place)))
    found, table = np.full(len(texts), -1), pd.DataFrame(rows, columns=["number", "rest", "distance"])
    if table.empty:
        return found
    best = table.loc[table.groupby("rest")["distance"].transform("idxmin").astype(int), ["number", "distance"]]
    found[table["number"]] = np.where(best["distance"] <= 0.5, best["number"], -1)
    return found


def asked_stays(text: str, stays: pd.DataFrame, of_data: pd.Series) -> tuple[int, ...]:
    """Return the places of the stays whose ids a text names. Raises InputError: which are not there, and why."""
    words, places = text.replace(",", " ").split(), {str(name): at for at, name in enumerate(stays["icu_stay_id"])}
    reasons = dict.fromkeys(of_data.astype(str), "seen in training")
    if absent := [f"{word} ({reasons.get(word, 'not in the data')})" for word in words if word not in places]:
        raise files.refusal("absent_ids", absent=", ".join(absent))
    return tuple(sorted({places[word] for word in words}))


def choose_stays(run: Run, settings: ExplainSettings, most_events: int) -> tuple[list[int], dict[int, str]]:
    """Return the stays to analyse, of `most_events` in all, and why each of those that are shown in full is."""
    risk, labels, lengths = expit(run.logits), run.table.labels, run.table.lengths
    if run.asked:
        return [*run.asked], dict.fromkeys(run.asked, "asked for")
    shown = min(settings.stays, len(lengths))
    longest = max(most_events // 6, np.sort(lengths)[max(shown, 1) - 1])
    usable = np.flatnonzero(lengths <= longest)
    among = "" if len(usable) == len(lengths) else f", of stays of at most {longest} events"
    scores = {"highest risk": -risk, "lowest risk": risk, "most uncertain": np.abs(risk - 0.5)}
    if not np.isnan(labels).all():
        scores["most wrong"] = -np.abs(risk - labels)  # NaN, where the outcome is unknown, come last
    ranked = {name: usable[np.argsort(score[usable])].tolist() for name, score in scores.items()}
    reasons: dict[int, str] = {}
    while len(reasons) < shown:
        name = list(ranked)[len(reasons) % len(ranked)]
        stay = next(stay for stay in ranked[name] if stay not in reasons)
        reasons[stay] = name + " of the others" * (stay != ranked[name][0]) + among
    deaths = [stay for stay in ranked["highest risk"] if labels[stay] == 1]
    if reasons and deaths and not reasons.keys() & set(deaths):
        reasons.popitem()
        reasons[deaths[0]] = f"highest risk of those who died{among}"
    others = np.random.default_rng(settings.seed).permutation([stay for stay in usable if stay not in reasons])
    order = np.array([*reasons, *others], int)
    order = order[: max(settings.max_stays, len(reasons)) if settings.max_stays else None]
    fits = np.cumsum(lengths[order]) <= most_events
    fits[: max(1, len(reasons))] = True
    return sorted(order[fits].tolist()), reasons


# ---- Attend ----------------------------------------------------------------------------------------------------------


class Attention(NamedTuple):
    """What one pass over one stay looked at; small, however long the stay. Layers: of its last 3,000 events."""

    pooling: np.ndarray  # (Hp, L) weights of the pooling heads, each sums to 1
    received: np.ndarray  # (n_layers, H, L) weight an event gets from an event on average; NaN before the last events
    maps: np.ndarray  # (n_layers, H, bins, bins) means over equal bins of events
    rollout: np.ndarray  # (L,) pooling followed back through the layers, sums to 1
    relevance: np.ndarray  # (L,) so of weight times gradient: what speaks for death less what speaks for survival
    scores: np.ndarray  # (Hp, L) scaled similarity of the query vector with the events' keys


@torch.no_grad()
def attend(model: ClinicalTransformer, sequence: Tensor, static: Tensor) -> Attention:
    """Return the attention of the pass over one stay, (1, L, C) and (1, S).

    Rollout (Abnar & Zuidema 2020) takes (identity + map) / 2 for each layer: the skip connection counts as much as
    attention. Relevance (Chefer et al. 2021) takes identity + the mean over heads of what is positive in the map times
    the logit's gradient by it; for survival in the map times the gradient of minus the logit. What the memory of item
    histories says is in neither.
    """
    layers: list[Any] = list(model.transformer_encoder)
    sequence, static, _ = checked_inputs(model, sequence, static)
    seen, recent = {}, max(0, sequence.shape[1] - MAX_MAP_EVENTS)
    layout_of = lambda events: train.layout_of_lengths(np.array([len(events)]), events.device)
    whole = model.score_packed(sequence[0], static, layout_of(sequence[0]))[1]
    events = sequence[0, recent:].detach().requires_grad_()
    layout = layout_of(events)
    keep = lambda part, given, made: seen.update({part: (given[0], made)})
    parts = [part for layer in layers for part in (layer.query_key_value, layer.attention_output)]
    with ExitStack() as hooks, torch.enable_grad():
        for part in parts:
            hooks.enter_context(part.register_forward_hook(keep))
        logit, found = model.score_packed(events, static, layout)
        attended = [seen[layer.attention_output][0] for layer in layers]  # (n, D) each
        gradient, *gradients = torch.autograd.grad(logit, [found["pooling_weights"], *attended])
    pooling, rollout = whole["pooling_weights"][0, :, 0], whole["pooling_weights"][0, :, 0, recent:].mean(0)
    moves, rollout = (found["pooling_weights"] * gradient)[0, :, 0], rollout / rollout.sum()  # (Hp, n), (n,)
    relevance = [(sign * moves).relu().mean(0) for sign in (1, -1)]
    n_bins, n_heads = min(len(events), train.MAX_MAP_BINS), model.architecture["n_heads"]
    received, maps = pooling.new_zeros(0, n_heads, len(events)), pooling.new_zeros(0, n_heads, n_bins, n_bins)
    for layer, gradient in zip(layers[::-1], gradients[::-1]):
        query, key, value = seen[layer.query_key_value][1].unflatten(1, (3, n_heads, -1)).unbind(1)  # (n, H, D/H) each
        weights = train.attention_weights_within_stays(query, key, layout)  # (1, H, n, n)
        moves = weights[0] * torch.einsum("ihd,jhd->hij", gradient.unflatten(1, (n_heads, -1)), value)
        rollout = (rollout + rollout @ weights[0].mean(0)) / 2
        relevance = [share + share @ (sign * moves).relu().mean(0) for sign, share in zip((1, -1), relevance)]
        received, maps = torch.cat([weights.mean(2), received]), torch.cat([train.binned(weights), maps])
    pad = lambda values: F.pad(values, (recent, 0), value=math.nan).cpu().numpy()
    scores = model.attention_pooling.scores(model.query_vector, whole["transformer_output"])[0].cpu().numpy()
    of_layers = (pad(received), maps.cpu().numpy(), pad(rollout), pad(relevance[0] - relevance[1]))
    return Attention(pooling.cpu().numpy(), *of_layers, scores)


def untrained_like(model: ClinicalTransformer, seed: int) -> ClinicalTransformer:
    """Return the same architecture and input statistics with fresh random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = ClinicalTransformer(**model.architecture)
    fresh.load_state_dict(dict(model.named_buffers()), strict=False)
    return fresh.to(next(model.parameters()).device).eval()


# ---- Attribute -------------------------------------------------------------------------------------------------------


class Attribution(NamedTuple):
    """Integrated Gradients of the logit; events and statics of a stay sum to logit - baseline_logit + gap_error."""

    events: Tensor  # (B, L, C), exactly 0 at padding
    statics: Tensor  # (B, S)
    logits: np.ndarray  # (B,) float64
    baseline_logits: np.ndarray
    gap_errors: np.ndarray  # (B,) sum of the attributions minus the difference of the logits
    n_steps: np.ndarray  # (B,) steps that were taken in the end
    complete: np.ndarray  # (B,) bool: |gap error| <= 0.02 + 0.01 * |difference|


def adds_up(gap_error: float, difference: float) -> bool:
    """Say if a sum is right; a purely relative tolerance would explode where the difference is near 0."""
    return abs(gap_error) <= 0.02 + 0.01 * abs(difference)


def captum_analysis(
    model: ClinicalTransformer,
    sequences: Tensor,
    static_features: Tensor,
    attention_mask: Tensor | None = None,
    baseline: Baseline = None,
    n_steps: int = 50,
) -> Attribution:
    """Return the Integrated Gradients of (B, L, C) events and (B, S) statics on the logit, from a baseline.

    `baseline` is the checkpoint's: the mean training event at every position and the mean statics; None is zeros. Stays
    are done one by one, without padding, and again with 4 and 16 times the steps where the sum misses the difference of
    the logits. Arrays are converted; raises InputError for what cannot be meant. Sundararajan et al. 2017, by Captum.

    >>> found = captum_analysis(model, sequences, static_features, attention_mask)
    >>> found.events.shape == sequences.shape and bool(found.complete.all())
    True
    """
    sequences, static_features, is_real = checked_inputs(model.eval(), sequences, static_features, attention_mask)
    attributions, statics, rows = torch.zeros_like(sequences), torch.zeros_like(static_features), []
    for stay, is_event in enumerate(is_real):
        length = int(is_event.nonzero().max()) + 1
        sequence, static, mask = sequences[stay, None, :length], static_features[stay, None], is_event[None, :length]
        sequence = torch.where(mask[..., None], sequence, 0)  # what padding holds must not become 0 * NaN
        starts = baselines_like(sequence, static, baseline)
        with torch.no_grad():
            both = torch.cat([sequence, starts[0]]), torch.cat([static, starts[1]]), mask.expand(2, -1)
            logit, start = model.logits(*both).squeeze(1).tolist()
        for steps in (n_steps, 4 * n_steps, 16 * n_steps):
            events, columns = integrated_gradients(model, sequence, static, mask, baseline, steps)
            gap = float(events.double().sum() + columns.double().sum()) - (logit - start)
            if adds_up(gap, logit - start):
                break
        attributions[stay, :length], statics[stay] = events[0], columns[0]
        rows.append((logit, start, gap, steps, adds_up(gap, logit - start)))
    return Attribution(attributions, statics, *(np.array(column) for column in zip(*rows)))


def checked_inputs(
    model: ClinicalTransformer, sequences: Any, static_features: Any, attention_mask: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (B, L, C) events, (B, S) statics and (B, L) bool, True at real events, as tensors where the model is.

    None as mask: every event is real. Raises InputError for what cannot be meant and for what is NaN or infinite.
    """
    like = next(model.parameters())
    events, statics = (torch.as_tensor(values).to(like) for values in (sequences, static_features))
    if events.dim() != 3 or statics.dim() != 2 or len(events) != len(statics):
        raise files.refusal("no_batch", events=tuple(events.shape), statics=tuple(statics.shape))
    widths = tuple(getattr(model, "architecture", {}).get(name) for name in ("input_dim", "static_dim"))
    if (given := (events.shape[2], statics.shape[1])) != widths and any(widths):
        raise files.refusal("other_width", given=given, read=widths)
    mask = torch.ones(events.shape[:2]) if attention_mask is None else torch.as_tensor(attention_mask)
    if mask.shape != events.shape[:2]:
        raise files.refusal("other_mask", given=tuple(mask.shape), events=tuple(events.shape[:2]))
    is_event = mask.to(like.device).bool()
    if not ((mask == 0) | (mask == 1)).all() or not is_event.any(1).all():
        raise files.refusal("no_mask")
    if not (torch.isfinite(events[is_event]).all() and torch.isfinite(statics).all()):
        raise files.refusal("not_finite")
    return events, statics, is_event


def baselines_like(sequence: Tensor, static: Tensor, baseline: Baseline) -> tuple[Tensor, Tensor]:
    """(1, L, C) and (1, S): the baseline event at every position, and the baseline statics."""
    if baseline is None:
        return torch.zeros_like(sequence), torch.zeros_like(static)
    return baseline["event"].to(sequence).expand_as(sequence), baseline["static"].to(static).expand_as(static)


def integrated_gradients(
    model: ClinicalTransformer, sequence: Tensor, static: Tensor, is_event: Tensor, baseline: Baseline, n_steps: int
) -> tuple[Tensor, Tensor]:
    """Return the attributions (1, L, C) and (1, S) of one stay."""
    starts = baselines_like(sequence, static, baseline)
    per_pass = max(1, GRADIENT_EVENTS // max(1, sequence.shape[1]))
    options = {"n_steps": n_steps, "method": "gausslegendre", "internal_batch_size": per_pass}
    gradients = IntegratedGradients(model.logits)
    events, statics = gradients.attribute((sequence, static), starts, additional_forward_args=(is_event,), **options)
    return (events * is_event[..., None]).detach(), statics.detach()


def layer_analysis(
    model: ClinicalTransformer,
    sequences: Tensor,
    static_features: Tensor,
    attention_mask: Tensor | None = None,
    baseline: Baseline = None,
    n_steps: int = 50,
) -> list[dict[str, Any]]:
    """Attribute (B, L, C) events to the outputs of `input_projection` and of each layer, per event.

    What passes layers by is held fixed: statics, and of item histories the memory, which is then missing in the sums.
    Deeper layers have mixed the events. Return dicts of layer, attribution (B, L), exactly 0 at padding, and gap_error
    (B,), complete (B,).
    """
    sequences, static_features, mask = checked_inputs(model.eval(), sequences, static_features, attention_mask)
    layers: dict[str, nn.Module] = {"input_projection": model.input_projection}
    layers |= {f"encoder layer {number}": layer for number, layer in enumerate(model.transformer_encoder, start=1)}
    stays = [(sequences[stay, None, is_event], static_features[stay, None]) for stay, is_event in enumerate(mask)]
    starts, rows = [baselines_like(*stay, baseline)[0] for stay in stays], []
    with torch.no_grad():
        both = [(torch.cat([stay[0], start]), stay[1].expand(2, -1)) for stay, start in zip(stays, starts)]
        logits = np.array([model.logits(*pair).squeeze(1).tolist() for pair in both])  # (B, 2)
    moved = logits[:, 0] - logits[:, 1]
    for name, layer in layers.items():
        attribution = np.zeros(mask.shape)
        for number, ((sequence, static), start) in enumerate(zip(stays, starts)):
            # The outputs of a stay's layer are packed, (L, D): Captum sees L rows per step.
            per_pass = max(GRADIENT_EVENTS, sequence.shape[1])
            options = {"n_steps": n_steps, "method": "gausslegendre", "internal_batch_size": per_pass}
            gradients = LayerIntegratedGradients(model.logits, layer)
            found = gradients.attribute(sequence, start, additional_forward_args=(static,), **options)
            attribution[number, mask[number].cpu()] = found.detach().double().sum(1).cpu().numpy()  # (L,)
        gaps = attribution.sum(1) - moved
        complete = np.array([adds_up(*pair) for pair in zip(gaps, moved)])
        rows.append({"layer": name, "attribution": attribution, "gap_error": gaps, "complete": complete})
    return rows


class OneStay(NamedTuple):
    """What the model reads of one stay; with its dataset, also what it would read had some events not been there."""

    sequence: Tensor  # (1, L, C)
    static: Tensor  # (1, S)
    dataset: train.ClinicalSequenceDataset | None = None
    number: int = 0  # of the stay in the dataset

    def variants(self, keep: np.ndarray, texts: np.ndarray | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs of n variants of the events that `keep` (n, L) marks: events (M, C), rows (N,), statics (n, S).

        An event of a variant is one of the rows of `events`. Histories, latest flags and number of events are those of
        what is left, made as for any stay; without a dataset the number is held. `texts` (n, L): other texts' numbers.
        """
        own, n_events, n_variants = self.sequence[0], keep.shape[1], len(keep)
        origin = torch.from_numpy(np.tile(np.arange(n_events), n_variants)[keep.ravel()])  # (N,)
        if self.dataset is None:
            return own, origin.to(own.device), self.static.expand(n_variants, -1)
        table = self.dataset.table.take(np.full(n_variants, self.number))
        if texts is not None:
            table = replace(table, text=texts.ravel().astype(table.text.dtype))
        left = table.take(np.arange(n_variants), keep.ravel())
        preprocessor = copy.copy(self.dataset.preprocessor)  # of the statics, the number of events alone changes
        follows = [name == "number_of_events" for name, _ in preprocessor.static_names]
        preprocessor.categorical, preprocessor.numeric = [], ["number_of_events"] * sum(follows)
        made = train.ClinicalSequenceDataset(left, preprocessor, self.dataset.text_vectors)
        statics = self.static.repeat(n_variants, 1)
        statics[:, torch.tensor(follows, device=own.device)] = made.static.to(own.device)
        was = origin.to(made.device) + int(self.dataset.table.offsets[self.number])
        is_new = (made.event_columns != self.dataset.event_columns[was]).any(1) | (made.text != self.dataset.text[was])
        rows = torch.where(is_new, n_events + is_new.cumsum(0) - 1, origin.to(made.device))
        events = torch.cat([own, made.events(is_new.nonzero().squeeze(1)).to(own.device)])  # each is projected once
        return events, rows.to(own.device), statics


@torch.no_grad()
def variant_logits(
    model: ClinicalTransformer,
    stay: OneStay,
    keep: np.ndarray,
    baseline: Baseline = None,
    keep_static: np.ndarray | None = None,
    texts: np.ndarray | None = None,
) -> np.ndarray:
    """Return the float64 logits (n,) of n variants of one stay, each read as a stay of its own.

    Events that `keep` (n, L) leaves out are absent, statics that `keep_static` (n, S; None: all) leaves out as in the
    baseline, and `texts` (n, L) are numbers of the dataset's texts that the events have instead of theirs.
    """
    if keep_static is None:
        keep_static = np.ones((len(keep), stay.static.shape[1]), bool)
    n_events, asked = keep.shape[1], np.hstack([keep, keep_static, *([] if texts is None else [texts])])
    _, first, which = np.unique(asked, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(keep[first].sum(1), kind="stable")  # stays of one length take one call
    logits, per_pass = np.zeros(len(first)), max(1, FORWARD_EVENTS // max(1, n_events))
    for places in (order[start : start + per_pass] for start in range(0, len(order), per_pass)):
        part = first[places]
        events, rows, statics = stay.variants(keep[part], None if texts is None else texts[part])
        is_kept = torch.as_tensor(keep_static[part], device=statics.device)
        statics = torch.where(is_kept, statics, baselines_like(stay.sequence, stay.static, baseline)[1])  # (n, S)
        layout = train.layout_of_lengths(keep[part].sum(1), events.device)
        found, _ = model.score_packed(events, statics, layout, rows=rows)
        logits[places] = found.squeeze(1).double().cpu().numpy()
    return logits[which]


class Ablation(NamedTuple):
    """By how much the logit falls without single events, and without groups of events or static columns."""

    if_absent: np.ndarray  # (B, L) by how much the logit falls then; 0 at padding, NaN where not asked for
    groups: pd.DataFrame  # stay (index in the batch), kind, group, n_events, ablation


def ablation_analysis(
    model: ClinicalTransformer,
    sequences: Tensor,
    static_features: Tensor,
    attention_mask: Tensor | None = None,
    baseline: Baseline = None,
    event_groups: Mapping[str, Sequence[str] | np.ndarray] | None = None,
    static_names: Sequence[str] | None = None,
    which: np.ndarray | None = None,
    dataset: train.ClinicalSequenceDataset | None = None,
    first: int = 0,
) -> Ablation:
    """Measure by how much the logits of (B, L, C) events and (B, S) statics fall had events or groups not been there.

    Taken out are single events (at the positions `which`, else all) and the events of one value of each entry of
    `event_groups` (kind -> L labels); static inputs of one name (S names, a one-hot group repeats its name) become the
    baseline's. With the `dataset` where these stays stand from `first` on, histories and number of events follow;
    without it the number is held, and a model with histories is refused. Masked events are left out.

    >>> found = ablation_analysis(model, sequences, static_features, attention_mask)
    >>> found.if_absent.shape == sequences.shape[:2]
    True
    """
    sequences, static_features, mask = checked_inputs(model.eval(), sequences, static_features, attention_mask)
    if dataset is None and model.architecture["n_history"]:
        raise files.refusal("held_histories")
    n_events, n_statics = sequences.shape[1], static_features.shape[1]
    names: Any = static_names if static_names is not None else [f"static {column}" for column in range(n_statics)]
    kinds = event_groups or {"all events": ["all"] * n_events}
    for name, labels in {"static_names": names, **kinds}.items():
        if len(labels) != (wanted := n_statics if labels is names else n_events):
            raise files.refusal("other_number", name=name, given=len(labels), wanted=wanted)
    names = np.array(names, dtype=object)
    scores, rows = np.zeros(mask.shape), []
    for number, is_event in enumerate(mask):
        stay = OneStay(sequences[number, None, is_event], static_features[number, None], dataset, first + number)
        positions = is_event.nonzero().squeeze(1).cpu().numpy()
        chosen = positions if which is None else np.intersect1d(positions, which)
        every, statics = np.ones(len(positions), bool), np.ones(n_statics, bool)
        left = [(number, "", "", 0, every, statics)]  # kind, group, its events, and what is left without it
        left += [(number, "event", "", 1, positions != event, statics) for event in chosen]
        for kind, labels in kinds.items():
            of_event = np.asarray(labels, dtype=object)[positions]
            counts = pd.Series(of_event).value_counts().sort_index()
            left += [(number, kind, group, count, of_event != group, statics) for group, count in counts.items()]
        left += [(number, "static", name, 0, every, names != name) for name in pd.unique(names)]
        keep, keep_static = (np.array([row[at] for row in left]) for at in (4, 5))
        logits = variant_logits(model, stay, keep, baseline, keep_static)
        falls = logits[0] - logits[1:]
        scores[number, positions] = math.nan
        scores[number, chosen] = falls[: len(chosen)]
        rows += [(*row[:4], fall) for row, fall in zip(left[1 + len(chosen) :], falls[len(chosen) :])]
    return Ablation(scores, pd.DataFrame(rows, columns=["stay", "kind", "group", "n_events", "ablation"]))


# ---- Check: how right are the explanations? --------------------------------------------------------------------------

FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75)  # of a stay's events taken out, or left alone
N_RANDOM_ORDERS = 2
MIN_EVENTS = 10  # a shorter stay has no order of events to speak of
N_RESETS = 4  # random models that a stay is explained with
STAYS_PER_RESET = 4  # that share them
FEW_STEPS = 8  # of Integrated Gradients, where only the order of the events counts
N_PERTURBATIONS, SHARE_PERTURBED = 60, 0.1  # random sets of events that infidelity asks about
COMPARE = {">": operator.gt, ">=": operator.ge, "<=": operator.le}
GAINS = (("deletion", "", -1), ("insertion", "", 1), ("deletion", ", lowest first", 1), ("deletion", ", by size", 1))
# What is measured on each stay: column -> check, method, threshold, and what must hold it.
MEASURES = {
    "infidelity attribution": ("infidelity", "attribution", "<= 0.5", "value"),
    "infidelity absence": ("infidelity", "if_absent", "<= 0.2", "value"),
    "reset excess": ("randomisation", "attribution", "<= 0.05", "high"),
    "attention agreement": ("agreement, by size", "attention", "", ""),
    "relevance agreement": ("agreement", "relevance", "", ""),
    "absence agreement": ("agreement", "if_absent", "", ""),
}


def judged(name: str, method: str, found: dict[str, Any], threshold: str = "", limit: str = "value") -> Check:
    """Return a check; `limit` names what must hold the threshold: the value, or its interval's limit if it has one."""
    held = found["value"] if math.isnan(found.get(limit, math.nan)) else found[limit]
    if not threshold or math.isnan(held):
        return Check(name, found, None, method)
    sign, bound = threshold.split()
    return Check(name, found, bool(COMPARE[sign](held, float(bound))), method, threshold)


def orders_of(part: pd.DataFrame, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return the orders in which a stay's events go or come, (L,) each, highest first; NaN counts as 0."""
    known = {method: np.nan_to_num(part[method].to_numpy(float)) for method in METHODS}
    orders = known | {f"{method}, lowest first": -known[method] for method in METHODS[:2]}
    orders["attribution, by size"] = np.abs(known["attribution"])
    return orders | {f"random {number}": rng.random(len(part)) for number in range(N_RANDOM_ORDERS)}


def deletion_insertion(model: ClinicalTransformer, stay: OneStay, orders: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Return how the logit of one stay changes as events leave it (deletion) or come to it without any (insertion).

    The highest of `orders` (name -> (L,)) come first. Columns direction, order, fraction, change: the logit less that
    of the whole stay (deletion) or of one without events (insertion).
    """
    n_events, fractions = stay.sequence.shape[1], np.array([0.0, *FRACTIONS])
    place = np.stack([np.argsort(np.argsort(-score, kind="stable")) for score in orders.values()])  # (orders, L)
    first = place[:, None] < np.ceil(fractions * n_events)[:, None]  # (orders, fractions, L)
    keep = np.stack([~first, first])  # (2, orders, fractions, L)
    logits = variant_logits(model, stay, keep.reshape(-1, n_events)).reshape(keep.shape[:3])
    change = logits - logits[:, :, :1]
    names = pd.MultiIndex.from_product([["deletion", "insertion"], orders, fractions])
    return pd.Series(change.ravel(), names.set_names(["direction", "order", "fraction"])).rename("change").reset_index()


def gains_over_random(curves: pd.DataFrame, settings: ExplainSettings) -> list[Check]:
    """Return how much further an order moves the logit than random orders, mean over the fractions; paired by stay."""
    part = curves[curves["fraction"] > 0]
    part = part.assign(size=part["change"].abs()).groupby(["icu_stay_id", "patient_id", "direction", "order"])
    means, checks = part[["change", "size"]].mean().unstack("order"), []
    for direction, order, sign in GAINS:
        table = means.xs(direction, level="direction")["size" if order == ", by size" else "change"]
        patients = table.index.get_level_values("patient_id").to_numpy()
        for method in METHODS[: {"": 4, ", lowest first": 2}.get(order, 1)]:
            gain = sign * (table[method + order] - table["random"]).to_numpy()
            found = mean_with_interval(gain, patients, settings.n_bootstrap, settings.seed)
            checks.append(judged(direction + order, method, found, "" if method == "attention" else "> 0", "low"))
    return checks


def infidelity(model: ClinicalTransformer, stay: OneStay, scores: dict[str, np.ndarray], seed: int) -> dict[str, float]:
    """Return the infidelity (Yeh et al. 2019) of (L,) scores, relative to the same values dealt at random.

    How well their sums predict by how much the logit falls without a random tenth of the events, of those that all
    scores know: of weak events of long stays nothing is known.
    """
    known = ~np.isnan(np.array(list(scores.values()))).any(0)  # (L,)
    rng, n_known = np.random.default_rng(seed), known.sum()
    taken = rng.random((N_PERTURBATIONS, n_known)) < max(SHARE_PERTURBED, 1.5 / n_known)
    keep = np.ones((N_PERTURBATIONS + 1, len(known)), bool)
    keep[1:, known] = ~taken
    logits = variant_logits(model, stay, keep)
    fall = logits[0] - logits[1:]  # (N_PERTURBATIONS,)
    found = {}
    for name, whole in scores.items():
        score = whole[known]
        dealt = np.stack([rng.permutation(score) for _ in range(10)])
        chance = np.mean((taken @ dealt.T - fall[:, None]) ** 2)
        found[name] = float(np.mean((taken @ score - fall) ** 2) / chance) if chance > 0 else math.nan
    return found


def randomisation(
    models: Sequence[ClinicalTransformer], sequence: Tensor, static: Tensor, baseline: Baseline, own: np.ndarray
) -> dict[str, float]:
    """Return squared rank correlations: the model's own attributions with random models', and theirs with each other.

    Similar texts look alike to any model: what counts is the excess (Adebayo et al. 2018).
    """
    is_event, resets = torch.ones(sequence.shape[:2], dtype=torch.bool, device=sequence.device), []
    for model in models:
        events, _ = integrated_gradients(model, sequence, static, is_event, baseline, FEW_STEPS)
        resets.append(events[0].double().sum(1).cpu().numpy())
    with_own = float(np.mean(rank_correlation(np.stack(resets), own) ** 2))
    pairs = np.triu_indices(len(resets), 1)
    among = float(np.mean(rank_correlation(np.stack(resets), np.stack(resets))[pairs] ** 2))
    return {"model and reset": with_own, "reset and reset": among, "reset excess": with_own - among}


def check_stays(
    run: Run, events: pd.DataFrame, stays: Sequence[int], settings: ExplainSettings, done: Callable[[int], Any]
) -> tuple[list[Check], pd.DataFrame]:
    """Measure the explanations of some stays -> checks, curves. Calls `done` with each stay."""
    model, baseline = run.checkpoint.model, run.checkpoint.baseline
    rows: list[dict[str, Any]] = []
    curves = [pd.DataFrame(columns=["direction", "order", "fraction", "change", "icu_stay_id", "patient_id"])]
    for stay in stays:
        done(stay)
        ids = run.table.stays.loc[stay, ["icu_stay_id", "patient_id"]].to_dict()
        part = explain_report.of_stay(events, ids["icu_stay_id"])
        if len(part) < MIN_EVENTS:
            continue
        if len(rows) % STAYS_PER_RESET == 0:  # other random models now and then: one model errs alike on all stays
            first = settings.seed + 1 + 1000 * stay
            untrained = [untrained_like(model, first + number) for number in range(N_RESETS)]
        scores = {method: part[method].to_numpy(float) for method in METHODS}
        own, absence = scores["attribution"], scores["if_absent"]
        known = ~np.isnan(absence)
        row = {"attention agreement": rank_correlation(scores["attention"], np.abs(own))[0, 0]}
        row["relevance agreement"] = rank_correlation(scores["relevance"], own)[0, 0]
        row["absence agreement"] = rank_correlation(absence[known], own[known])[0, 0]
        named = {"infidelity attribution": own, "infidelity absence": absence}
        row |= infidelity(model, run.one(stay), named, settings.seed)
        row |= randomisation(untrained, *run.inputs(stay), baseline, own)
        orders = orders_of(part, np.random.default_rng(settings.seed + stay))
        curve = deletion_insertion(model, run.one(stay), orders)
        curve["order"] = curve["order"].replace(r"random \d", "random", regex=True)
        rows.append(row | ids)
        curves.append(curve.assign(**ids))
    all_curves = pd.concat(curves[1:] or curves, ignore_index=True)
    if not rows:
        return [], all_curves
    table = pd.DataFrame(rows)
    checks, patients = gains_over_random(all_curves, settings), table["patient_id"].to_numpy()
    for column, (name, method, threshold, limit) in MEASURES.items():
        found = mean_with_interval(table[column].to_numpy(float), patients, settings.n_bootstrap, settings.seed)
        checks.append(judged(name, method, found | {"resets": N_RESETS}, threshold, limit))
    return checks, all_curves


# ---- Verdict: is there anything to explain? Said before any score of the explanations --------------------------------

SPREAD_FLOOR = 0.2  # standard deviation of the logits; below it all stays have the same risk, for whatever reason
UNSEEN_SHARE = 0.2  # of the events; beyond it a stay is read by a model that does not know its words


def discrimination(labels: np.ndarray, risks: np.ndarray, patients: np.ndarray, *resampling: int) -> list[Check]:
    """Say whether (n,) risks rank deaths above survivors, and whether as many died as predicted; NaN: unknown."""
    known = ~np.isnan(labels)
    found: dict[str, Any] = {"deaths": int(np.nansum(labels)), "n": int(known.sum())}
    columns = (labels[known], risks[known], patients[known])
    figures = metrics.evaluate_predictions(*columns, *resampling)
    if (state := metrics.discrimination(figures)) == "one outcome":
        return [Check("discrimination, unknown", found)]
    found |= {name: figure_text(figures[name]) for name in metrics.METRICS} | {"few": metrics.TOO_FEW}
    found |= {"risk": percent(columns[1].mean()), "rate": percent(columns[0].mean())}
    found["shown"] = "shown" if metrics.is_shown_calibrated(figures) else "not shown"
    name, slope = "discrimination" if "shown" in state else f"discrimination, {state}", figures["calibration_slope"]
    calibration = Check("calibration", found | {"value": math.nan if slope["value"] is None else slope["value"]})
    return [Check(name, found | figures["auroc"], state == "shown"), *[calibration] * (state != "reversed")]


def verdict_of(run: Run, leaks: dict[str, float]) -> list[Check]:
    """Return what is to be read before any explanation."""
    checkpoint, risks, labels = run.checkpoint, expit(run.logits), run.table.labels
    trained = checkpoint.settings  # its resamples give the interval that train.py says
    patients, known, checks = run.table.stays["patient_id"].to_numpy(), labels[~np.isnan(labels)], []
    is_few, whose = len(set(patients)) < FEW, {0: "patients, other", len(risks): "patients"}
    if not is_few:
        checks = discrimination(labels, risks, patients, trained.n_bootstrap, trained.seed)
        spread, worst = float(np.std(run.logits)), max(leaks, key=lambda text: leaks[text], default="")
        checks.append(Check("spread", {"value": spread}, spread >= SPREAD_FLOOR))
        found = {"n": len(leaks), "worst": worst, "value": leaks.get(worst, math.nan)}
        is_told = bool(leaks) or metrics.fewest(known) > 2  # of two, chance tells as well
        checks.append(Check("single texts", found, not leaks) if is_told else Check("single texts, unknown", {}))
    checks.append(Check(whose.get(run.held_out, "patients, some"), {"held_out": run.held_out, "n": len(risks)}))
    unseen = float(np.mean(run.is_new_item[run.table.text]))
    checks.append(Check("likeness", {"value": unseen}, unseen <= UNSEEN_SHARE))
    sequence = checkpoint.baseline["event"].expand(1, int(np.median(run.table.lengths)), -1)
    with torch.no_grad():
        logit = float(checkpoint.model.logits(sequence, checkpoint.baseline["static"][None]))
    found = {"value": logit, "risk": 100 * expit(logit), "mean": percent(risks.mean()), "n": len(risks)}
    found |= {
        "died": f", and {percent(known.mean())} died" * (len(known) > 0),
        "above": int((run.logits > logit).sum()),
    }
    return [*checks, Check("baseline, of few" if is_few else "baseline", found)]


# ---- Tables: the same for the pictures, the report and the files -----------------------------------------------------

OFF_STAYS = 10  # whose attention is switched off
LEVEL = re.compile(r" \| (Level|Flag): [^|]*?(?= \||$)")
ABNORMAL = re.compile(r"\| Flag: abnormal|\| Level: (?!within range)")


def event_parts(input_dim: int, item_history: bool = False) -> dict[str, slice]:
    """Return which of an event's inputs are its type, text, time and (with `--item-history`) its item's history."""
    n_types, last = len(EVENT_TYPES), input_dim - (len(HISTORY) if item_history else 0)
    parts = {"type": slice(0, n_types), "text": slice(n_types, last - 1), "time": slice(last - 1, last)}
    return parts | {"history": slice(last, input_dim)}


def history_in_words(history: pd.DataFrame) -> list[str]:
    """Return how each number of `item_history` stood among its item's until then: `highest of 7`, or ""."""
    words = []
    for row in history[["value", "minimum", "maximum", "count"]].itertuples():
        extreme = {row.maximum: "highest", row.minimum: "lowest"}.get(row.value, "")
        words.append(f"{extreme} of {row.count}" if extreme and row.minimum < row.maximum else "")
    return words


def describe_events(run: Run, stay: int, leaks: Mapping[str, float]) -> pd.DataFrame:
    """Return a stay's events, one row each, in the order of the model's input."""
    table, uses_history = run.table.take(np.array([stay])), run.checkpoint.preprocessor.item_history
    person, texts, minutes = table.stays.loc[0], table.texts[table.text], table.minutes_since_intime
    readings = [read_text(text) for text in texts]
    columns = {
        "icu_stay_id": person["icu_stay_id"],
        "patient_id": person["patient_id"],
        "label": person[LABEL],
        "event": np.arange(len(texts)),
        "event_time": person["icu_intime"] + pd.to_timedelta(np.round(minutes * 60), unit="s"),
        "hours_since_admission": minutes / 60,
        "hours_to_end": table.minutes_to_end / 60,
        "event_type": np.array([*EVENT_TYPES, "unknown"], dtype=object)[table.event_type],
        "event_text": texts,
        "item": [reading.item for reading in readings],
        "value": [reading.value for reading in readings],
        "in_history": history_in_words(item_history(table)) if uses_history else "",
        "is_abnormal": [bool(ABNORMAL.search(text)) for text in texts],
        "tells_outcome": [mask_numbers(text) in leaks for text in texts],
    }
    return pd.DataFrame(columns)


class Explained(NamedTuple):
    """All that was computed of one stay."""

    stay: dict[str, Any]
    events: pd.DataFrame
    statics: pd.DataFrame
    groups: pd.DataFrame
    layers: pd.DataFrame
    attention: Attention


def explain_stay(
    run: Run, stay: int, effort: Effort, leaks: Mapping[str, float], seed: int, reason: str, layers: bool
) -> Explained:
    """Return every view of one stay; `reason` is why it is shown in full, or ""."""
    model, baseline, names = run.checkpoint.model, run.checkpoint.baseline, run.checkpoint.preprocessor.static_names
    sequence, static = run.inputs(stay)
    events = describe_events(run, stay, leaks)
    ids = events.loc[0, ["icu_stay_id", "patient_id"]].to_dict()
    found = captum_analysis(model, sequence, static, baseline=baseline, n_steps=IG_STEPS)
    attention = attend(model, sequence, static)
    values = found.events[0].double().cpu().numpy()  # (L, C)
    kinds = {"event type": events["event_type"], "clock window": clock_window(events["hours_to_end"]).astype(object)}
    push = values.sum(1)
    listed, rows = listed_events(push), slice(run.table.offsets[stay], run.table.offsets[stay + 1])
    which = np.union1d(np.argsort(-np.abs(push))[: effort.removed], listed)  # taken out one by one
    numbers = some_of(np.flatnonzero(run.typical_texts[run.table.text[rows]] >= 0), effort.numbers, seed)
    columns = [static_word(column) for column, _ in names]
    ablation = ablation_analysis(model, sequence, static, None, baseline, kinds, columns, which, run.dataset, stay)
    events = events.assign(
        attribution=push,
        **{f"attribution_{name}": values[:, part].sum(1) for name, part in run.parts.items()},
        if_absent=ablation.if_absent[0],
        if_typical=if_typical(run, stay, np.union1d(numbers, listed if reason else []).astype(int)),
        attention=attention.pooling.mean(0),
        **{f"attention_head_{head}": weights for head, weights in enumerate(attention.pooling, start=1)},
        rollout=attention.rollout,
        relevance=attention.relevance,
        complete=bool(found.complete[0]),
    )
    of_columns = pd.Series(found.statics[0].double().cpu().numpy()).groupby(columns, sort=False).sum()
    groups = ablation.groups.drop(columns="stay")
    falls = groups[groups["kind"] == "static"].set_index("group")["ablation"]
    said = run.table.take(np.array([stay])).static_columns.loc[0, list(dict(names))]
    statics = {"feature": of_columns.index, "value": ["Unknown" if pd.isna(value) else str(value) for value in said]}
    statics |= {"attribution": of_columns.to_numpy(), "ablation": falls[of_columns.index].to_numpy()}
    pushes = events["attribution"]
    sums = {kind: pushes.groupby(labels).sum() for kind, labels in kinds.items()} | {"static": of_columns}
    groups["attribution"] = [sums[kind][group] for kind, group in zip(groups["kind"], groups["group"])]
    parts = [pd.DataFrame()]
    for row in layer_analysis(model, sequence, static, None, baseline, 2 * IG_STEPS) if layers else ():
        of_stay = {name: row[name][0] for name in ("attribution", "gap_error", "complete")}
        parts.append(pd.DataFrame({"event": events["event"], "layer": row["layer"], **of_stay}))
    logit, complete = found.logits[0], bool(found.complete[0])
    row = ids | {"label": events["label"].iloc[0], "probability": float(expit(logit)), "logit": logit}
    row |= {"baseline_logit": found.baseline_logits[0], "gap_error": found.gap_errors[0], "complete": complete}
    row |= {"n_steps": found.n_steps[0], "moved_by_shuffling": moved_by_shuffling(run, stay, seed)}
    row |= {"n_events": len(events), "n_removed": events["if_absent"].count(), "why_shown": reason}
    by_layer = pd.concat(parts, ignore_index=True)
    by_column, by_group, layered = (table.assign(**ids) for table in (pd.DataFrame(statics), groups, by_layer))
    if not layers:  # no picture shows the maps, half a megabyte each
        attention = attention._replace(maps=np.empty(0))
    return Explained(row, events, by_column, by_group, layered, attention)


def listed_events(push: np.ndarray) -> np.ndarray:
    """Return the events that a report may list, those of the highest and of the lowest push (L,)."""
    order, listed = np.argsort(push), explain_report.EVENTS_LISTED
    return np.union1d(order[:listed], order[-listed:])


def if_typical(run: Run, stay: int, which: np.ndarray) -> np.ndarray:
    """Return (L,): by how much the logit falls if an event at `which` had a typical number (`typical_texts`), else NaN.

    Its text is the typical one's, and the history of its item follows.
    """
    one, rows = run.one(stay), slice(run.table.offsets[stay], run.table.offsets[stay + 1])
    own, typical = run.table.text[rows], run.typical_texts[run.table.text[rows]]
    which = which[typical[which] >= 0]
    texts = np.tile(own, (len(which) + 1, 1))  # the stay as it is comes last
    texts[np.arange(len(which)), which] = typical[which]
    logits = variant_logits(run.checkpoint.model, one, np.ones(texts.shape, bool), texts=texts)
    falls = np.full(len(own), math.nan)
    falls[which] = logits[-1] - logits[:-1]
    return falls


@torch.no_grad()
def moved_by_shuffling(run: Run, stay: int, seed: int) -> float:
    """Return how far the logit of a stay moves, mean of five, when its events are dealt to its places and times."""
    sequence, static = run.inputs(stay)
    generator = torch.Generator().manual_seed(seed)
    orders = torch.stack([torch.randperm(sequence.shape[1], generator=generator) for _ in range(5)])
    dealt = sequence[0, orders.to(sequence.device)]  # (5, L, C)
    dealt[:, :, run.parts["time"]] = sequence[:, :, run.parts["time"]]
    parts = dealt.split(max(1, FORWARD_EVENTS // sequence.shape[1]))
    logits = [run.checkpoint.model.logits(part, static.expand(len(part), -1)) for part in parts]
    return float((torch.cat(logits).double() - run.logits[stay]).abs().mean())


@torch.no_grad()
def logits_without(
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
    packed = train.packed_batches(dataset, [stays[part] for part in batches], next(model.parameters()).device)
    for places, batch in zip(batches, packed):
        found, _ = model.score_packed(batch.events, batch.static_features, batch.layout)
        logits[places] = found.squeeze(1).double().cpu().numpy()
    for (linear, columns), weights in zip(switched, saved):
        linear.weight[:, columns] = weights
    return logits


def heads_of(model: ClinicalTransformer) -> dict[tuple[str, int], tuple[nn.Linear, slice]]:
    """Return what each head gives, inputs of a linear layer, by its layer and number from 1; pooling comes last."""
    layers: list[Any] = [layer.attention_output for layer in model.transformer_encoder]
    kinds = [(f"layer {number}", linear, model.architecture["n_heads"]) for number, linear in enumerate(layers, 1)]
    kinds.append(("pooling", model.attention_pooling.output, model.architecture["n_pooling_heads"]))
    found: dict[tuple[str, int], tuple[nn.Linear, slice]] = {}
    for name, linear, n_heads in kinds:
        width = linear.in_features // n_heads
        found |= {(name, head + 1): (linear, slice(head * width, (head + 1) * width)) for head in range(n_heads)}
    return found


def head_effects(run: Run, stays: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return how far logits move without each head, (heads, stays), and without all attention of layers, (stays,)."""
    heads, logits = heads_of(run.checkpoint.model), partial(logits_without, run.checkpoint.model, run.dataset)
    whole = logits(np.array(stays))
    moves = [np.abs(logits(np.array(stays), [head]) - whole) for head in heads.values()]
    of_layers = [head for (name, _), head in heads.items() if name != "pooling"]
    return np.stack(moves), np.abs(logits(np.array(stays), of_layers) - whole)


def head_table(run: Run, explained: dict[int, Explained], effects: np.ndarray, *resampling: int) -> pd.DataFrame:
    """Return the rank correlation of each head's weights with properties of the events, over a stay's events.

    Heads count from 1, the pooling heads come last. effect: how far logits move without the head, the mean of effects
    (heads, n_switched_off stays).
    """
    usable = [found for found in explained.values() if len(found.events) >= MIN_EVENTS]
    columns, measured, properties = ["layer", "head", "property", "correlation", "low", "high", "n_stays"], [], {}
    for found in usable:
        events = found.events
        properties = {
            "recency": -events["hours_to_end"],
            "abnormal flag": events["is_abnormal"],
            "|attribution|": events["attribution"].abs(),
            **{name: events["event_type"] == name for name in EVENT_TYPES},
        }
        received = found.attention.received.reshape(-1, len(events))
        weights = np.concatenate([received, found.attention.pooling])  # (heads, L)
        seen = ~np.isnan(weights).any(0)
        values = np.stack([value.to_numpy(float) for value in properties.values()])
        measured.append(rank_correlation(weights[:, seen], values[:, seen]))
    patients = np.array([found.stay["patient_id"] for found in usable])
    rows = []
    for number, (layer, head) in enumerate(heads_of(run.checkpoint.model) if measured else ()):
        for column, name in enumerate(properties):
            of_stays = np.array([found[number, column] for found in measured])
            mean = mean_with_interval(of_stays, patients, *resampling)
            of_head = (float(effects[number].mean()), effects.shape[1])
            rows.append((layer, head, name, mean["value"], mean["low"], mean["high"], mean["n"], *of_head))
    return pd.DataFrame(rows, columns=[*columns, "effect", "n_switched_off"])


def query_similarity_table(explained: dict[int, Explained], *resampling: int) -> pd.DataFrame:
    """Return how near each pooling head's query is to the keys of each event type, against the mean of the stay."""
    parts = []
    for found in explained.values():
        scores = found.attention.scores - found.attention.scores.mean(1, keepdims=True)  # (Hp, L)
        for head, values in enumerate(scores, start=1):
            parts.append(found.events[["patient_id", "event_type"]].assign(head=head, similarity=values))
    table = findings.means_by(pd.concat(parts), ["head", "event_type"], "similarity", *resampling)
    return table.reset_index().rename(columns={"mean": "similarity", "n": "n_events"})


def trajectory_table(run: Run, stay: int, most: int = 20) -> pd.DataFrame:
    """Return the risk of one stay at `most` hours at most, each from what was known by then (`tables.known_at`).

    The last is the end of what is read, when all is known: the risk that the model predicts.
    """
    table = run.table.take(np.array([stay]))
    end = float((table.minutes_since_intime + table.minutes_to_end).max()) / 60
    then = {hours: known_at(table, hours) for hours in np.linspace(0, end, most + 1)[1:-1].tolist()}
    then = {hours: known for hours, known in then.items() if len(known.stays)}
    risks, n_events = np.zeros(0), [len(known.text) for known in then.values()]
    if then:
        joined = stacked(list(then.values()))
        dataset = train.ClinicalSequenceDataset(joined, run.checkpoint.preprocessor, run.dataset.text_vectors)
        risks = expit(logits_without(run.checkpoint.model, dataset, np.arange(len(then))))
    columns = {"hours_since_admission": [*then, end], "n_events": [*n_events, len(table.text)]}
    columns |= {"probability": [*risks, expit(run.logits[stay])], "icu_stay_id": run.table.stays["icu_stay_id"][stay]}
    return pd.DataFrame(columns).assign(extrapolated=not run.checkpoint.settings.prospective)


DECISIVE_COLUMNS = ["icu_stay_id", "threshold", "probability", "probability_without", "event", "event_text"]
MOST_DECISIVE = 64  # events taken out at most before the search for a changed decision is given up


def decisive_events(run: Run, stay: int, events: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Find the smallest set of a stay's events without which its risk would lie on the other side of the threshold.

    Events are taken out, the most attributed to the present side first, until the decision changes; then each is given
    back that is not needed. Return a row of `DECISIVE_COLUMNS` per event; none if 64 do not suffice.
    """

    def risk_without(sets: list[np.ndarray]) -> np.ndarray:
        keep = np.array([~np.isin(np.arange(len(events)), taken) for taken in sets]).reshape(-1, len(events))
        return expit(variant_logits(run.checkpoint.model, run.one(stay), keep))

    risk = risk_without([np.array([], int)])[0]
    push = events["attribution"].to_numpy(float) * (1 if risk >= threshold else -1)
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


def some_of(numbers: Sequence[int] | np.ndarray, most: int, seed: int) -> list[int]:
    """Return at most so many of the numbers of stays or events, drawn at random, in order."""
    return sorted(np.random.default_rng(seed).permutation(numbers)[:most].tolist())


def explain_stays(run: Run, settings: ExplainSettings) -> dict[str, Any]:
    """Return the tables of a run, as the report and the pictures take them."""
    effort, seed, lengths = QUICK if settings.quick else Effort(), settings.seed, run.table.lengths
    model, n_layers = run.checkpoint.model, len(run.checkpoint.model.transformer_encoder)
    resampling, leaks = (settings.n_bootstrap, seed), audit.leaking_texts(run.table)
    chosen, reasons = choose_stays(run, settings, effort.events)
    is_few = run.table.stays["patient_id"][chosen].nunique() < FEW
    checked = some_of(chosen, 0 if is_few else effort.checked, seed)
    switched, of_interest = some_of(checked or chosen, OFF_STAYS, seed), [*reasons] or chosen[:1]
    logger.info(f"Explaining  {len(chosen)} of {len(lengths)} stays of unseen patients, {len(reasons)} of them in full")
    # Passes over an event that each of them takes; one with gradients counts three times.
    explaining = lengths * (70 + np.minimum(lengths, effort.removed) + np.minimum(lengths, effort.numbers))
    explaining[of_interest] += lengths[of_interest] * 6 * IG_STEPS * effort.layers * (1 + n_layers)
    checking, switching, showing = lengths * 250, lengths * (2 + len(heads_of(model))), lengths * 100
    work = [(explaining, chosen), (checking, checked), (switching, switched), (showing, of_interest)]
    total = int(sum(passes[stays].sum() for passes, stays in work))
    bar = files.Progress(total=total, desc="explain", unit=" passes", unit_scale=True, smoothing=0)
    explained: dict[int, Explained] = {}
    for stay in chosen:
        given = (seed, reasons.get(stay, ""), effort.layers and stay in of_interest)
        explained[stay] = explain_stay(run, stay, effort, leaks, *given)
        bar.update(int(explaining[stay]))
    tables: dict[str, Any] = {}
    for name in ("events", "statics", "groups", "layers"):
        parts = [getattr(found, name) for found in explained.values()]
        tables[name] = pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)
    tables["stays"] = stays = pd.DataFrame([found.stay for found in explained.values()])
    stays["risk_percentile"] = [100 * float((run.logits <= run.logits[stay]).mean()) for stay in chosen]
    done = lambda stay: bar.update(int(checking[stay]))
    checks, tables["curves"] = check_stays(run, tables["events"], checked, settings, done)
    complete = {"value": float(stays["complete"].mean()), "n": len(stays), "steps": IG_STEPS}
    complete["at_once"] = float((stays["complete"] & (stays["n_steps"] == IG_STEPS)).mean())
    checks.insert(0, judged("completeness", "attribution", complete, ">= 0.99"))
    tables["faithfulness"] = explain_report.check_table(checks)
    effects, of_layers = head_effects(run, switched)
    bar.update(int(switching[switched].sum()))
    tables["heads"] = head_table(run, explained, effects, *resampling)
    tables["query_similarity"] = query_similarity_table(explained, *resampling)
    arriving, decisive = [], []
    for stay in of_interest:
        arriving.append(trajectory_table(run, stay))
        decisive.append(decisive_events(run, stay, explained[stay].events, settings.decision_threshold))
        bar.update(int(showing[stay]))
    bar.close()
    tables["trajectory"], tables["decisive"] = (pd.concat(parts, ignore_index=True) for parts in (arriving, decisive))
    tables["items"] = findings.item_table(findings.with_statics(tables), *resampling)
    tables["systems"] = findings.system_table(tables["events"])
    by_time = mean_with_interval(stays["moved_by_shuffling"], stays["patient_id"], *resampling)
    name = "layer attention" if (mean := of_layers.mean()) > FLOOR else "layer attention, idle"
    said = [Check("time" if by_time["low"] > FLOOR else "time, unused", by_time)]
    said.append(Check(name if n_layers else "layer attention, none", {"value": mean, "n": len(of_layers)}))
    said = [*verdict_of(run, leaks), *([Check("few stays", {})] if is_few else said)]
    tables["verdict"] = explain_report.check_table(said + [Check("quick", effort._asdict())] * settings.quick)
    best = max((explained[stay] for stay in of_interest), key=lambda found: found.stay["probability"])
    pictured = {"icu_stay_id": best.stay["icu_stay_id"], "pooling_weights": best.attention.pooling[None, :, None]}
    pictured["layer_attention_weights"] = [maps[None] for maps in best.attention.maps]
    tables["attention"] = pictured | {"n_mapped": min(len(best.events), MAX_MAP_EVENTS)}
    return tables


# ---- In a notebook: names of inputs, and small analyses of one pass --------------------------------------------------


def name_inputs(preprocessor: train.ClinicalDataPreprocessor, input_dim: int = 774) -> pd.DataFrame:
    """Return the clinical name of every input: `input` ("event" or "static"), `column`, `part`, `name`.

    Single numbers of a text vector have no clinical meaning, and the names say so.

    >>> name_inputs(preprocessor)["name"][2]
    'event type: labevent'
    """
    parts = event_parts(input_dim, preprocessor.item_history)
    n_text = parts["text"].stop - parts["text"].start
    names = [("type", f"event type: {name}") for name in EVENT_TYPES]
    names += [("text", f"event text, number {i + 1} of {n_text} (no meaning alone)") for i in range(n_text)]
    names.append(("time", "time to the final event"))
    if preprocessor.item_history:
        names += [("history", f"its item until then: {name.replace('_', ' ')}") for name in HISTORY]
    rows = [("event", column, part, name) for column, (part, name) in enumerate(names)]
    for column, (name, category) in enumerate(preprocessor.static_names):
        word = static_word(name)
        rows.append(("static", column, name, word if category is None else f"{word}: {category}"))
    return pd.DataFrame(rows, columns=["input", "column", "part", "name"])


def map_features_to_clinical(
    position_features: Tensor | np.ndarray, feature_mapping: pd.DataFrame, pos: int
) -> pd.DataFrame:
    """Sum (L, C) attributions of one stay's inputs at position `pos` by what the inputs mean -> part, attribution.

    `feature_mapping` is `name_inputs(preprocessor)`. Raises InputError for hidden units, which mean nothing clinical.

    >>> found = captum_analysis(model, sequences, static_features, attention_mask)
    >>> inputs = name_inputs(preprocessor, sequences.shape[2])
    >>> map_features_to_clinical(found.events[0], inputs, pos=2)["part"].tolist()
    ['type', 'text', 'time']
    """
    values, is_frame = to_numpy(position_features), isinstance(feature_mapping, pd.DataFrame)
    parts = feature_mapping.loc[feature_mapping["input"] == "event", "part"].to_numpy() if is_frame else np.array([])
    if values.ndim != 2 or values.shape[1] != len(parts):
        raise files.refusal("hidden_units")
    if not -len(values) <= pos < len(values):
        raise InputError(f"pos {pos}: there are {len(values)} positions, from 0 on.")
    table = pd.DataFrame({"part": parts, "attribution": values[pos]})
    return table.groupby("part", sort=False)["attribution"].sum().reset_index()


class Stay(NamedTuple):
    """One stay of the tables, for the small analyses below; `stay_of(tables, icu_stay_id)` makes it."""

    events: pd.DataFrame  # hours_to_end, event_type, event_text and, once attributed, attribution
    statics: pd.DataFrame | None = None


def stay_of(tables: dict[str, pd.DataFrame], icu_stay_id: int | str) -> Stay:
    """Return one stay out of what `run_explainability_analysis` returned. Raises InputError if it is not there.

    >>> stay_of(tables, 1).events["event_text"].iloc[0]
    'Lab: Lactate | Value: 9 mmol/L'
    """
    parts = [tables[name] for name in ("events", "statics")]
    events, statics = (part[part["icu_stay_id"].astype(str) == str(icu_stay_id)] for part in parts)
    if not len(events):
        raise InputError(f"icu_stay_id {icu_stay_id} is not among the stays analysed.")
    return Stay(events.reset_index(drop=True), statics.reset_index(drop=True))


def to_numpy(values: Any) -> np.ndarray:
    """Return a tensor, wherever it is, or an array as float32 or float64 numbers."""
    return np.asarray(values.detach().float().cpu() if isinstance(values, Tensor) else values, dtype=float)


def weights_and_events(
    attention_weights: dict[str, Any], record: Stay | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return, for each stay of a pass, its (Hp, L) pooling weights and the positions of its real events.

    With a record, of the first, which must be the record's. Padding has no output and no weight. Raises InputError.
    """
    if not isinstance(attention_weights, Mapping) or "pooling_weights" not in attention_weights:
        raise files.refusal("no_attention")
    if not isinstance(record, Stay | None):
        raise files.refusal("no_record", kind=type(record).__name__)
    weights = to_numpy(attention_weights["pooling_weights"])[: None if record is None else 1, :, 0]  # (B, Hp, L)
    is_used = weights.sum(1) > 0
    if "transformer_output" in attention_weights:
        is_used |= np.abs(to_numpy(attention_weights["transformer_output"])[: len(weights)]).sum(2) > 0
    events = [np.flatnonzero(row) for row in is_used]
    if record is not None and len(events[0]) != len(record.events):
        raise files.refusal("other_record", read=len(events[0]), record=len(record.events))
    return list(zip(weights, events))


def described_event(record: Stay | None, position: int) -> dict[str, Any]:
    """Return when and what the event at a position is, where the stay's record is known."""
    if record is None:
        return {}
    event = record.events.iloc[position]
    return {"hours_to_end": float(event["hours_to_end"])} | event[["event_type", "event_text"]].to_dict()


def to_shap(found: dict[str, Any]) -> Any:
    """Return a `shap.Explanation` of an explanation's stays by items and statics, for SHAP's own plots.

    values: Integrated Gradients, the pushes of all events of an item in a stay summed, 0 without any; data: the number
    of its last event that has one, NaN without; base_values: the baseline's logit. So each row of values and its base
    value sum to the stay's logit (0.02 + 1 %, where it is complete). Raises InputError without the package `shap`.

    >>> shap.plots.waterfall(to_shap(found)[0])  # doctest: +SKIP
    """
    try:
        import shap
    except ImportError:
        raise InputError("to_shap needs the package shap (0.51 works). Run: pip install shap") from None
    stays, rows = found["stays"], findings.with_statics(found).groupby(["icu_stay_id", "item"])
    values = rows["attribution"].sum().unstack(fill_value=0.0).loc[stays["icu_stay_id"]]
    data = rows["value"].last().unstack().loc[values.index, values.columns]
    starts = np.array(stays["baseline_logit"])
    return shap.Explanation(np.array(values), starts, np.array(data), feature_names=[*values])


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
    rows: list[dict[str, Any]] = []
    for stay, (weights, events) in enumerate(weights_and_events(attention_weights, record)):
        for head, position in np.argwhere(weights > (threshold / len(events) if relative else threshold)):
            weight, described = float(weights[head, position]), described_event(record, position)
            row = {"stay": stay, "head": int(head) + 1, "position": int(position), "importance": weight}
            row |= {"times_even_share": weight * len(events)} | described
            words = f"Head {head + 1} gives {100 * weight:.0f} % of its weight to event {position + 1} of {len(events)}"
            words += f", {weight * len(events):.1f} times an even share"
            if described:
                words += f": {described['hours_to_end']:.1f} h before the end, {described['event_text']}"
            rows.append(row | {"interpretation": f"{words}."})
    return sorted(rows, key=lambda row: -row["importance"])


def analyze_feature_importance_over_time(
    attention_weights: dict[str, Any], record: Stay | None = None, n_windows: int = 10, top: int = 3
) -> list[dict[str, Any]]:
    """List the events with the largest pooling weight of each head in each part of each stay.

    Parts are tenths of the stay's events or, with a record, clock windows before the end. Return dicts of stay, window,
    head, rank, position, importance, and with a record hours_to_end, event_type, event_text.
    """
    rows = []
    for stay, (weights, events) in enumerate(weights_and_events(attention_weights, record)):
        parts = np.arange(len(events)) * n_windows // max(1, len(events)) + 1
        if record is not None:
            parts = clock_window(record.events["hours_to_end"]).astype(object)
        for part in pd.unique(parts):
            inside = events[parts == part]
            for head, values in enumerate(weights[:, inside], start=1):
                for rank, place in enumerate(np.argsort(-values, kind="stable")[:top], start=1):
                    row = {"stay": stay, "window": part, "head": head, "rank": rank, "position": int(inside[place])}
                    rows.append(row | {"importance": float(values[place])} | described_event(record, inside[place]))
    return rows


def analyze_layer_attention_patterns(attention_weights: dict[str, Any], near: int = 5) -> list[dict[str, Any]]:
    """Measure, per stay and layer, how much events look at others within `near` positions and beyond.

    Return dicts of stay, layer (1-based), `attention_matrix` (L, L), the mean over heads without padding, and the mean
    weight within `near` (`local_attention`) and beyond (`global_attention`; NaN if none); the same per head in
    `head_matrices` (H, L, L), `head_local_attention` and `head_global_attention` (H,), and `head_local_share` of all
    weight (H,) beside `local_share_by_chance`. Maps read from a file are of equal bins: L is then their number.
    """
    rows, passes = [], weights_and_events(attention_weights)
    if "layer_attention_weights" not in attention_weights:
        raise files.refusal("no_attention")
    for stay, (pooling, events) in enumerate(passes):
        for layer, weights in enumerate(attention_weights["layer_attention_weights"], start=1):
            matrices = to_numpy(weights[stay])
            first = pooling.shape[1] - int(attention_weights.get("n_mapped") or pooling.shape[1])  # maps begin here
            spacing = (pooling.shape[1] - first) / matrices.shape[2]  # events in a bin; 1: not binned
            real = np.unique(((events[events >= first] - first) / spacing).astype(int))
            matrices, place = matrices[:, real][:, :, real], real * spacing
            is_near = np.abs(place[:, None] - place) <= near
            local = matrices[:, is_near].mean(1)
            beyond = matrices[:, ~is_near].mean(1) if (~is_near).any() else np.full(len(matrices), math.nan)
            row: dict[str, Any] = {"stay": stay, "layer": layer, "attention_matrix": matrices.mean(0)}
            row |= {"local_attention": float(local.mean()), "global_attention": float(beyond.mean())}
            row |= {"head_matrices": matrices, "head_local_attention": local, "head_global_attention": beyond}
            row["head_local_share"] = matrices[:, is_near].sum(1) / matrices.sum((1, 2))
            row["local_share_by_chance"] = float(is_near.mean())
            rows.append(row)
    return rows


def analyze_temporal_feature_attribution(attention_weights: dict[str, Any], feature_mapping: Stay) -> pd.DataFrame:
    """Return, per clock window of one stay, n_events, the share of each head's pooling weight and, where the stay is
    attributed, the signed sum of its attributions and the window's share of their absolute values.

    `feature_mapping` says what stands at each position: `stay_of(tables, icu_stay_id)`.
    """
    if not isinstance(feature_mapping, Stay):
        raise files.refusal("no_features")
    events, (pooling, inside) = feature_mapping.events, weights_and_events(attention_weights, feature_mapping)[0]
    columns = {"window": clock_window(events["hours_to_end"]), "n_events": 1}
    columns |= {f"attention_head_{head}": weights[inside] for head, weights in enumerate(pooling, start=1)}
    if "attribution" in events:
        push = events["attribution"].to_numpy()
        columns |= {"attribution": push, "share_of_attribution": np.abs(push) / np.abs(push).sum()}
    return pd.DataFrame(columns).groupby("window", observed=True).sum().reset_index()


def analyze_static_feature_attribution(attention_weights: dict[str, Any], static_features: Stay) -> pd.DataFrame:
    """Return the statics of one stay, largest first: feature, value, attribution, share of the stay's |attribution|.

    Static features pass by the attention, so no weight can speak of them: `static_features` is the attributed stay,
    `stay_of(tables, icu_stay_id)`.
    """
    statics = static_features.statics if isinstance(static_features, Stay) else None
    if statics is None or "attribution" not in static_features.events:
        raise files.refusal("no_statics")
    table, size = statics[["feature", "value", "attribution"]], statics["attribution"].abs()
    share = size / (size.sum() + static_features.events["attribution"].abs().sum())
    table = table.assign(share_of_attribution=share)
    return table.sort_values("share_of_attribution", ascending=False, ignore_index=True)


# ---- Main ------------------------------------------------------------------------------------------------------------

TABLE_FILES = {
    "stays": "stays.csv",
    "events": "event_attributions.parquet",
    "statics": "static_attributions.csv",
    "groups": "group_importance.csv",
    "layers": "layer_attributions.parquet",
    "heads": "head_correlations.csv",
    "query_similarity": "query_similarity.csv",
    "verdict": "verdict.csv",
    "trajectory": "risk_trajectories.csv",
    "curves": "deletion_insertion.csv",
    "items": "item_importance.csv",
    "systems": "organ_systems.csv",
    "decisive": "decisive_events.csv",
}
LOGGED_CHECKS = ("discrimination", "calibration", "patients", "time", "quick", "few")  # and those whose names begin so


class Explanation(dict[str, Any]):
    """The tables of an analysis: `found.events` is `found["events"]`; a notebook shows its report and its figures."""

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

    @property
    def caption(self) -> str:
        """What stands below every picture: whose stays these are, and what read their texts."""
        stays = self["stays"]
        who = f"{counted(len(stays), 'unseen stay')} of {counted(stays['patient_id'].nunique(), 'patient')}"
        return f"{who} · text encoder: {self.text_encoder}"

    @cached_property
    def figures(self) -> dict[str, Figure]:
        """The pictures by name; each shows itself where a notebook's cell ends with it."""
        drawn = draw_figures(self, self.caption)
        for figure in drawn.values():
            setattr(figure, "_repr_png_", partial(png_of, figure, 100))  # noqa: B010 (notebooks look for it)
        return drawn

    def _repr_html_(self) -> str:
        if self.report is None or not self.report.exists():
            return self["stays"].to_html(index=False)
        page = html.escape(self.report.read_text("utf-8"), quote=True)
        return f'<iframe srcdoc="{page}" style="width:100%;height:50rem;border:1px solid #ddd"></iframe>'


def run_explainability_analysis(
    checkpoint_path: str | Path = ExplainSettings.checkpoint,
    test_data_path: str | Path | pd.DataFrame = ExplainSettings.data,
    save_dir: str | Path | None = ExplainSettings.save_dir,
    **options: Any,
) -> Explanation:
    """Explain held-out stays with a checkpoint alone; return the tables, and write them and the pictures.

    The data default to the checkpoint's own and may be a data frame; `save_dir` defaults to a folder beside the
    checkpoint's, None writes nothing. `options` are fields of `ExplainSettings`; the keys of the result are those of
    `TABLE_FILES`, faithfulness and attention. Raises InputError for what the caller can mend.
    """
    if not logger.handlers and ("ipykernel" in sys.modules or not logging.root.handlers):  # nobody would see the log
        files.log_to_stdout()
    if not isinstance(checkpoint_path, str | os.PathLike):
        raise files.refusal("no_path", kind=type(checkpoint_path).__name__)
    path, *others = train.checkpoint_files(checkpoint_path)
    if others:
        raise files.refusal("many_checkpoints", folder=checkpoint_path, count=1 + len(others), first=path)
    folder = train.folder_of_run(path) / "explainability" if save_dir == "" else save_dir
    if not isinstance(ids := options.get("stay_ids", ""), str):
        options["stay_ids"] = " ".join(map(str, np.atleast_1d(ids)))
    try:
        settings = ExplainSettings(checkpoint=str(path), **options)
    except TypeError as error:
        raise files.refusal("unknown_option", reason=str(error).split("() ")[-1]) from None
    check_limits(settings)
    if settings.quick:  # never more than was asked for
        settings = replace(settings, stays=min(settings.stays, 2), n_bootstrap=min(settings.n_bootstrap, 200))
    run = load_unseen(settings.checkpoint, test_data_path, settings)
    tables = explain_stays(run, settings)
    log_what_was_found(tables)
    report = None if folder is None else Path(folder) / "report.html"
    found = Explanation(tables, run.checkpoint.text_encoder, report)
    if report is not None:
        write_everything(report.parent, run, found, path.name)
        logger.info(f"Written     {report}, and its tables and pictures beside it")
    return found


def log_what_was_found(tables: dict[str, Any]) -> None:
    """Log what a person needs: the verdict, whether the explanations hold, and what matters most."""
    verdict, stays = tables["verdict"], tables["stays"]
    for row in verdict[verdict["check"].str.startswith(LOGGED_CHECKS) | verdict["passed"].eq(False)].itertuples():
        logger.log(logging.WARNING if row.passed is False else logging.INFO, f"Verdict     {row.sentence}")
    logger.info(f"Checks      {explain_report.checks_sentence(tables['faithfulness'], verdict)}")
    if verdict.loc[verdict["check"].str.startswith("discrimination"), "passed"].eq(False).any():
        return  # what such a model finds are no findings
    for sentence in tables["items"].query("is_finding")["sentence"][:5]:
        logger.info(f"Findings    {sentence}")
    stay = stays.loc[stays["probability"].idxmax(), "icu_stay_id"]
    if sentence := explain_report.decisive_sentence(explain_report.of_stay(tables["decisive"], stay)):
        logger.info(f"Stay        {stay}, of the highest risk here: {sentence}")


def write_everything(folder: Path, run: Run, found: Explanation, checkpoint: str) -> None:
    """Write tables, faithfulness.json, the pictures and the report."""
    writer = run_folder.RunFolder(folder, asdict(run.checkpoint.settings))
    for name, file in TABLE_FILES.items():
        files.delete_quietly(folder / file)
        if name != "layers" or len(found[name]):  # a quick look has none
            writer.table(file, found[name])
    rows = lambda table: json.loads(table.to_json(orient="records", double_precision=15))
    means = found["curves"].groupby(["direction", "order", "fraction"])["change"].mean().reset_index()
    record = {"text_encoder": found.text_encoder, "stays": len(found["stays"]), "held_out": run.held_out}
    record |= {"verdict": rows(found["verdict"]), "checks": rows(found["faithfulness"]), "curves": rows(means)}
    writer.json("faithfulness.json", record)
    drawn = draw_figures(found, found.caption)
    for stay in found["stays"].loc[found["stays"]["why_shown"] != "", "icu_stay_id"]:
        drawn[f"stay_{stay}"] = draw_captum_attributions(found, found.caption, stay)
    pictures = {name: explain_report.picture_of(figure) for name, figure in drawn.items()}  # drawn once
    for path in (*folder.glob("stay_[0-9]*.png"), *(folder / f"{name}.png" for name in FIGURES)):
        files.delete_quietly(path)  # an earlier explanation may have drawn what this one does not
    for name, picture in pictures.items():
        files.write_whole(folder / f"{name}.png", partial(Path.write_bytes, data=picture["png"]))
    info: dict = {"data": run_folder.data_in_words(run.data), "checkpoint": checkpoint, "level": metrics.LEVEL}
    info |= {"text_encoder": found.text_encoder, "thresholds": run.checkpoint.state["thresholds"]}
    info["setting"] = run_folder.moment_of_prediction(writer.settings["observation_hours"], writer.settings["labels"])
    info |= {"labels": run.table.labels, "risks": expit(run.logits), "ids": run.table.stays["icu_stay_id"].to_numpy()}
    writer.text("report.html", explain_report.render_report(found, pictures, info))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit code."""
    settings = settings_from(argv, ExplainSettings, __doc__)
    files.log_to_stdout()
    options = asdict(settings)
    places = [options.pop(name) for name in ("checkpoint", "data", "save_dir")]
    work = partial(run_explainability_analysis, *places, **options)
    return files.exit_code(work, lambda: "Nothing half-written is left.")


if __name__ == "__main__":
    sys.exit(main())
