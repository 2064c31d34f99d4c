"""A first honest baseline of every run: boosted trees on summaries of each item, of the network's own stays."""

import itertools
from typing import Any

import numpy as np
import pandas as pd
import scipy

from clinical_lf import metrics
from clinical_lf.audit import patient_folds
from clinical_lf.files import WORDS
from clinical_lf.items import item_history, mask_numbers
from clinical_lf.tables import EVENT_TYPES, Split, StayTable

SUMMARIES = ("value", "minimum", "maximum", "mean", "first", "deviation")  # value: the last
MOST_KINDS, SMALLEST_SHARE, FEWEST_STAYS = 300, 0.01, 3  # of items, and of training stays that have one
USUAL = {"learning_rate": 0.05, "min_samples_leaf": 10, "l2_regularization": 1.0, "early_stopping": False}
SIZES = [*itertools.product((2, 4, 8, 16), (0.3, 1.0), (300,))]  # leaves of a tree, share of features a split, trees


def item_summaries(table: StayTable, statics: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Return (n_stays, K) float32: statics (n_stays, S), number of events by type, and what each frequent item was.

    That is SUMMARIES of its numbers (NaN without one; trees split on that) and how often it came. Events without a
    number count by their whole text, numbers masked: an organism is no item's head. training: the stays that choose.
    """
    history, stays, n_stays = item_history(table), table.stay_of_event, len(table.stays)
    history["deviation"] = history["value"].groupby([stays, history["item"]], observed=True).transform("std")
    has_value, items = history["value"].notna().to_numpy(), history["item"].cat
    masked, _ = pd.factorize(np.array([mask_numbers(text) for text in table.texts], dtype=object))
    kind = np.where(has_value, items.codes, len(items.categories) + masked[table.text])  # numbers of items come first
    events = pd.DataFrame({"stay": stays, "kind": kind})
    n_having = events[np.isin(stays, training)].drop_duplicates()["kind"].value_counts()
    kept = n_having.index[n_having >= max(FEWEST_STAYS, SMALLEST_SHARE * len(training))][:MOST_KINDS]
    at = kept.get_indexer(kind)  # (n_events,) column of the kind, -1 where it is not kept
    numbers = np.full((n_stays, len(kept), len(SUMMARIES)), np.nan, np.float32)
    known = np.flatnonzero(has_value & (at >= 0))  # oldest first: of an item the last one stays
    numbers[stays[known], at[known]] = history[list(SUMMARIES)].to_numpy(np.float32)[known]
    counts = np.zeros((n_stays, len(kept)), np.float32)
    np.add.at(counts, (stays[at >= 0], at[at >= 0]), 1)
    by_type = [np.bincount(stays[table.event_type == code], minlength=n_stays) for code in range(1 + len(EVENT_TYPES))]
    return np.hstack([statics, np.stack(by_type, axis=1), numbers.reshape(n_stays, -1), counts], dtype=np.float32)


def tree_risks(features: np.ndarray, labels: np.ndarray, split: Split, seed: int) -> np.ndarray:
    """Return the risks (n_stays,) by boosted trees of the size and number that suit the validation stays best."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    fits = []  # of each size: the lowest loss, the stage that has it, and the model
    features = features[:, ~np.isnan(features[split.train]).all(0)]
    for leaves, share, most in SIZES:
        size = {"max_leaf_nodes": leaves, "max_features": share, "max_iter": most}
        model = HistGradientBoostingClassifier(**size, random_state=seed, **USUAL)
        model.fit(features[split.train], labels[split.train])
        staged = np.stack([risks[:, 1] for risks in model.staged_predict_proba(features[split.validation])])
        losses = -np.log(np.where(labels[split.validation] == 1, staged, 1 - staged).clip(1e-15)).mean(1)
        fits.append((losses.min(), int(losses.argmin()), model))
    _, stage, model = min(fits, key=lambda fit: fit[0])
    return next(itertools.islice(model.staged_predict_proba(features), stage, None))[:, 1]


def unseen_risks(table: StayTable, statics: np.ndarray, seed: int) -> np.ndarray:
    """Return the risks (n_stays,) by trees that never saw the patient, of five folds; the labels where few died."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    died = table.labels
    if len(folds := patient_folds(died, table.stays["patient_id"].to_numpy())) < 5:
        return died
    model = HistGradientBoostingClassifier(max_leaf_nodes=6, max_features=0.3, max_iter=150, random_state=seed, **USUAL)
    features, risks = item_summaries(table, statics, np.arange(len(died))), np.empty(len(died))
    for fitted, judged in folds:
        known = ~np.isnan(features[fitted]).all(0)  # elsewhere NaN stays: trees send it where it fits
        model.fit(features[np.ix_(fitted, known)], died[fitted])
        risks[judged] = model.predict_proba(features[np.ix_(judged, known)])[:, 1]
    return risks


def compared(columns: metrics.Columns, of_trees: np.ndarray, **resampling: int) -> dict[str, Any]:
    """Return AUROC and AUPRC of the trees and of the mean of both log-odds, and how far the model lies above them.

    columns: with the model's risks. Differences are paired: 95 % intervals over resampled patients (n_bootstrap, seed),
    the same for all. Nothing where one outcome is missing.
    """
    died, own, patients = columns
    if not metrics.fewest(died):
        return {}
    log_odds = [scipy.special.logit(risks.clip(1e-7, 1 - 1e-7)) for risks in (own, of_trees)]
    risks = (own, of_trees, scipy.special.expit((log_odds[0] + log_odds[1]) / 2))

    def compare(weights: np.ndarray) -> np.ndarray:
        weights = weights[(weights @ died > 0) & (weights @ (1 - died) > 0)]
        model, by_trees, both = (metrics.weighted_ranking(weights, died, of_one) for of_one in risks)  # (R, 2) each
        return np.stack([by_trees, both, model - by_trees, both - by_trees], axis=1)  # (R, 4, 2)

    values, draws = compare(np.ones((1, len(died))))[0], metrics.bootstrap(compare, patients, **resampling)
    names = ("trees", "mean_of_both", "model_less_trees", "mean_of_both_less_trees")
    figures = [map(metrics.with_interval, values[i], draws[:, i].T) for i in range(len(names))]
    return {name: dict(zip(("auroc", "auprc"), pair)) for name, pair in zip(names, figures)}


def sentence(found: dict[str, Any]) -> str:
    """Say what `compared` found, and whether the network is shown to rank better than the trees."""
    in_words = lambda own: {metric: metrics.figure_text(figure, 3, "") for metric, figure in own.items()}
    texts = {name: in_words(own) for name, own in found.items()}
    lows, highs = zip(*((figure["low"], figure["high"]) for figure in found["model_less_trees"].values()))
    is_ahead, is_behind = any((low or 0) > 0 for low in lows), any((high or 0) < 0 for high in highs)
    key = "open" if is_ahead == is_behind else "ahead" if is_ahead else "behind"
    return WORDS["trees"]["found"].format(**texts, verdict=WORDS["trees"][key])
