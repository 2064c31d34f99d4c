"""What the tables of many stays add up to: windows before the end, items, organ systems; tables in, tables out."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from clinical_lf.explain_report import MIN_PATIENTS, item_kind, item_sentence
from clinical_lf.metrics import bootstrap, interval_of, mean_with_interval

# Windows before the end of what is read, and the hours at their far end, which they include.
CLOCK_WINDOWS = {"last 6 h": 6.0, "6 to 12 h": 12, "12 to 24 h": 24, "24 to 48 h": 48, "48 to 96 h": 96}
CLOCK_WINDOWS["more than 96 h"] = math.inf
# What stands in an item's name (_ is the edge of a word), and the organ system that it is of.
NAMES = pd.read_csv(Path(__file__).with_name("organ_systems.csv"), dtype=str, keep_default_na=False)
ORGAN_SYSTEMS = [(re.compile(re.escape(part).replace("_", r"\b")), system) for part, system in NAMES.to_numpy()]


def rank_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return Spearman correlations (m, n) of the rows of (m, L) with those of (n, L); NaN where a row is constant."""
    ranks = [rankdata(np.atleast_2d(rows), axis=1) for rows in (first, second)]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.corrcoef(*ranks)[: len(ranks[0]), len(ranks[0]) :]


def means_by(table: pd.DataFrame, keys: str | list[str], value: str, *resampling: int) -> pd.DataFrame:
    """Return mean, low, high, n (rows), n_patients of `value` in each group; 95 % intervals over patients."""
    groups = table.groupby(keys, observed=True)
    found = {name: mean_with_interval(part[value], part["patient_id"], *resampling) for name, part in groups}
    table = pd.DataFrame.from_dict(found, "index", columns=["value", "low", "high", "n", "n_patients"])
    return table.rename_axis(keys).rename(columns={"value": "mean"})


def clock_window(hours_to_end: Any) -> pd.Categorical:
    """Return the windows before the end that (n,) hours lie in; a model at 24 h has none beyond `12 to 24 h`."""
    return pd.cut(np.asarray(hours_to_end), [-math.inf, *CLOCK_WINDOWS.values()], labels=list(CLOCK_WINDOWS))


def with_statics(tables: dict[str, Any]) -> pd.DataFrame:
    """Return the events, and below them the statics of each stay as items of their own; numbers are values."""
    statics = tables["statics"].rename(columns={"feature": "item", "ablation": "if_typical"})
    own = {"value": pd.to_numeric(statics["value"], errors="coerce"), "tells_outcome": False, "is_static": True}
    return pd.concat([tables["events"].assign(is_static=False), statics.assign(**own)], ignore_index=True)


def weighted_ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the ranks of values (n,), less their mean, in samples (R, n) that say how often each was drawn."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    drawn = np.add.reduceat(weights[:, np.argsort(group, kind="stable")], sizes.cumsum() - sizes, axis=1)  # (R, groups)
    middle, total = drawn.cumsum(1) - drawn / 2, drawn.sum(1, keepdims=True)
    return (middle[:, group] - total / 2) / total


def rho_with_interval(part: pd.DataFrame, n_bootstrap: int, seed: int) -> dict[str, float]:
    """Return the rank correlation of an item's numbers with what they do, its 95 % interval over patients, and n.

    What a number does: how far the logit falls if it becomes typical (of statics: average); size: its mean, unsigned.
    NaN below ten values, ten patients or three different values: so few agree by chance.
    """
    known = part.dropna(subset=["value", "if_typical"])
    found = {"rho": math.nan, "rho_low": math.nan, "rho_high": math.nan, "n_values": len(known)}
    found["number_size"] = known["if_typical"].abs().mean()
    if known["patient_id"].nunique() < MIN_PATIENTS or known["value"].nunique() < 3:
        return found

    def correlation(weights: np.ndarray) -> np.ndarray:
        first, second = (weighted_ranks(known[name].to_numpy(), weights) for name in ("value", "if_typical"))  # (R, n)
        covariance = lambda one, other: (weights * one * other).sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return covariance(first, second) / np.sqrt(covariance(first, first) * covariance(second, second))

    low, high = interval_of(bootstrap(correlation, known["patient_id"], n_bootstrap, seed))
    return found | {"rho": float(correlation(np.ones((1, len(known))))[0]), "rho_low": low, "rho_high": high}


def item_table(rows: pd.DataFrame, n_bootstrap: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Return the 20 items and statics (`with_statics`) that matter most, and what these stays show of them.

    `beyond`, its limits too: the mean push less that of all events; of statics, which count from their mean, itself.
    """
    found, average = [], rows.loc[~rows["is_static"], "attribution"].mean()
    sizes = rows.assign(size=rows["attribution"].abs()).groupby("item")
    known = sizes.agg(size=("size", "mean"), n=("patient_id", "nunique"))
    least = min(max(3, 0.05 * rows["patient_id"].nunique()), known["n"].max())  # one patient is no finding
    for item, size in known.loc[known["n"] >= least, "size"].nlargest(20).items():
        part = rows[rows["item"] == item]
        push, is_static = part["attribution"], bool(part["is_static"].iloc[0])
        mean = mean_with_interval(push - (0 if is_static else average), part["patient_id"], n_bootstrap, seed)
        row = {"item": item, "n_events": mean["n"], "n_patients": mean["n_patients"], "beyond": mean["value"]}
        row |= {"beyond_low": mean["low"], "beyond_high": mean["high"], "push": push.mean(), "size": size}
        row |= rho_with_interval(part, n_bootstrap, seed) | {"is_static": is_static}
        row |= {"tells_outcome": bool(part["tells_outcome"].any()), "kind": item_kind(row)}
        found.append(row | {"is_finding": row["kind"] not in ("small", "either"), "sentence": item_sentence(row)})
    return pd.DataFrame(found)


def organ_system(item: str) -> str:
    """Return the organ system of an item, or `other`: the first row found decides."""
    return next((system for part, system in ORGAN_SYSTEMS if part.search(item.lower())), "other")


def system_table(events: pd.DataFrame) -> pd.DataFrame:
    """Return the total push of each organ system in each stay: icu_stay_id, patient_id, system, push, n_events."""
    systems = events["item"].map({item: organ_system(item) for item in events["item"].unique()})
    parts = events.assign(system=systems).groupby(["icu_stay_id", "patient_id", "system"])
    return parts.agg(push=("attribution", "sum"), n_events=("event", "size")).reset_index()
