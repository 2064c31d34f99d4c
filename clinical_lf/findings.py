"""What the tables of many stays add up to: windows before the end, items, organ systems; tables in, tables out."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from clinical_lf.explain_report import item_sentence, window_sentence
from clinical_lf.metrics import mean_with_interval

# Windows before the end of what is read, and the hour at which each begins.
CLOCK_WINDOWS = {"last 6 h": 0, "6 to 12 h": 6, "12 to 24 h": 12, "24 to 48 h": 24, "48 to 96 h": 48}
CLOCK_WINDOWS["more than 96 h"] = 96
# What stands in an item's name (_ is the edge of a word), and the organ system that it is of.
NAMES = pd.read_csv(Path(__file__).with_name("organ_systems.csv"), dtype=str, keep_default_na=False)
ORGAN_SYSTEMS = [(re.compile(re.escape(part).replace("_", r"\b")), system) for part, system in NAMES.to_numpy()]


def rank_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return Spearman correlations (m, n) of the rows of (m, L) with those of (n, L); NaN where a row is constant."""
    ranks = [rankdata(np.atleast_2d(np.asarray(rows, float)), axis=1) for rows in (first, second)]
    centred = [rows - rows.mean(1, keepdims=True) for rows in ranks]
    lengths = [np.sqrt((rows**2).sum(1)) for rows in centred]
    with np.errstate(invalid="ignore", divide="ignore"):
        return (centred[0] @ centred[1].T) / np.outer(*lengths)


def rank_agreement(table: pd.DataFrame, keys: list[str], first: str, second: str) -> pd.DataFrame:
    """Return the rank correlation of two columns in each group: the keys, and `correlation`."""
    groups = table.groupby(keys, sort=False)
    rows = [(*names, rank_correlation(part[first], part[second])[0, 0]) for names, part in groups]
    return pd.DataFrame(rows, columns=[*keys, "correlation"])


def means_by(
    table: pd.DataFrame, keys: str | list[str], value: str, n_bootstrap: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Return mean, low, high, n (rows), n_patients of `value` in each group; 95 % intervals over patients."""
    groups = table.groupby(keys, observed=True)
    found = {name: mean_with_interval(part[value], part["patient_id"], n_bootstrap, seed) for name, part in groups}
    columns = ["value", "low", "high", "n", "n_patients"]
    return pd.DataFrame(list(found.values()), list(found), columns).rename(columns={"value": "mean"})


def clock_window(hours_to_end: Any) -> pd.Categorical:
    """Return the windows before the end that (n,) hours lie in, from the last hours back."""
    place = np.searchsorted(list(CLOCK_WINDOWS.values()), np.asarray(hours_to_end), "right") - 1
    return pd.Categorical.from_codes(np.maximum(place, 0), list(CLOCK_WINDOWS), ordered=True)


def stay_shares(events: pd.DataFrame, bins: Any, column: str = "") -> pd.DataFrame:
    """Return (stays, bins): a stay's shares of its total |column| by bin, by default of its events."""
    bins = pd.Categorical(bins)
    values = events[column].abs() if column else pd.Series(1.0, events.index)
    table = values.groupby([events["patient_id"], events["icu_stay_id"], np.asarray(bins)]).sum().unstack(fill_value=0)
    table = table.reindex(columns=bins.categories, fill_value=0)
    return table.div(table.sum(axis=1).replace(0, np.nan), axis=0)


def column_means(shares: pd.DataFrame, n_bootstrap: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Return mean, low, high of each column over stays, 95 % interval over patients."""
    patients = shares.index.get_level_values("patient_id").to_numpy()
    found = [mean_with_interval(shares[name].to_numpy(), patients, n_bootstrap, seed) for name in shares]
    return pd.DataFrame(found, index=shares.columns).rename(columns={"value": "mean"})


def window_table(events: pd.DataFrame, n_bootstrap: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Return each clock window's share in a stay's |attribution|, mean over stays, and the sentence that says so."""
    windows = clock_window(events["hours_to_end"])
    of_events = stay_shares(events, windows)
    shares = column_means(stay_shares(events, windows, "attribution"), n_bootstrap, seed)
    table = shares.rename(columns={"mean": "share"})[["share", "low", "high"]]
    table = table.assign(share_of_events=of_events.mean(), n_stays=(of_events > 0).sum())
    table = table[table["n_stays"] > 0].rename_axis("window").reset_index()
    return table.assign(sentence=[window_sentence(row) for row in table.itertuples()])


def important_items(events: pd.DataFrame, n_items: int) -> tuple[list[str], int]:
    """Return the items of the largest mean |push| among those that enough patients have, and how many that is."""
    sizes = events.assign(size=events["attribution"].abs()).groupby("item")
    table = sizes.agg(size=("size", "mean"), n_patients=("patient_id", "nunique"))
    n_patients = events["patient_id"].nunique()
    least = min(max(3, 0.05 * n_patients), table["n_patients"].max())  # one patient is no finding
    common = table[table["n_patients"] >= least]
    return common["size"].nlargest(n_items).index.tolist(), math.ceil(least)


def item_table(events: pd.DataFrame, n_items: int = 20) -> pd.DataFrame:
    """Return the items that matter most; rho is the rank correlation of value and push, NaN below 10 values."""
    rows = []
    for item in important_items(events, n_items)[0]:
        part = events[events["item"] == item]
        known, push = part.dropna(subset=["value"]), part["attribution"]
        is_judged = len(known) >= 10 and known["value"].nunique() > 2
        rho = float(rank_correlation(known["value"], known["attribution"])[0, 0]) if is_judged else math.nan
        row = {"item": item, "n_events": len(part), "n_patients": part["patient_id"].nunique(), "push": push.mean()}
        row |= {"size": push.abs().mean(), "highest_push": push.max(), "rho": rho, "n_values": len(known)}
        row |= {"tells_outcome": bool(part["tells_outcome"].any()), "sentence": item_sentence(row)}
        rows.append(row)
    return pd.DataFrame(rows)


def organ_system(item: str) -> str:
    """Return the organ system of an item, or `other`: the first row found decides."""
    name = item.lower()
    return next((system for part, system in ORGAN_SYSTEMS if part.search(name)), "other")


def system_table(events: pd.DataFrame) -> pd.DataFrame:
    """Return the total push of each organ system in each stay: icu_stay_id, patient_id, system, push, n_events."""
    systems = events["item"].map({item: organ_system(item) for item in events["item"].unique()})
    parts = events.assign(system=systems).groupby(["icu_stay_id", "patient_id", "system"])
    return parts.agg(push=("attribution", "sum"), n_events=("event", "size")).reset_index()
