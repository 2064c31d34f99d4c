"""Figures of held-out predictions with intervals over patients: discrimination, calibration, clinical use, subgroups.

n stays, R bootstrap resamples, G distinct probabilities, k coefficients. Outcome 1 is death.
"""

import math
import re
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import expit, logit

from clinical_lf.files import WORDS

METRIC_WORDS = WORDS["metrics"]
METRICS = tuple(METRIC_WORDS)
TOO_FEW = 10  # stays of either outcome, of a part as of a subgroup: with fewer, a figure is luck
SENSITIVITY = 0.8  # of the operating point: this share of the deaths is found
THRESHOLDS = np.arange(0.01, 0.61, 0.01)  # of the decision curve


def evaluate_predictions(
    labels: ArrayLike, probabilities: ArrayLike, patient_ids: ArrayLike, n_bootstrap: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Return figures of held-out predictions with 95 % intervals from resampling patients with all of their stays.

    labels (n,) 0/1, probabilities (n,) in [0, 1], patient_ids (n,). JSON-ready counts and, per name in METRICS,
    {"value", "low", "high"}; None where there is none (with a "reason"). Resamples with one outcome only, which all but
    Brier need both of, are skipped and counted. Raises ValueError for lengths or values that make no sense.
    """
    died, risks = checked_predictions(labels, probabilities)
    n_stays, n_deaths = len(died), int(died.sum())
    figures_of = partial(weighted_metrics, labels=died, probabilities=risks)
    draws = bootstrap(figures_of, patient_ids, n_stays, n_bootstrap, seed)  # (R, 5)
    values = figures_of(np.ones((1, n_stays)))[0] if n_stays else np.full(len(METRICS), np.nan)
    result: dict[str, Any] = {"n_stays": n_stays, "n_patients": len(np.unique(np.asarray(patient_ids)))}
    result |= {"n_deaths": n_deaths, "prevalence": n_deaths / n_stays if n_stays else None, "n_bootstrap": n_bootstrap}
    result |= {"n_resamples_skipped": int(np.isnan(draws[:, 0]).sum()), "too_few_to_read": bool(too_few(died))}
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


def fewest(died: np.ndarray) -> int:
    """Return how many stays the rarer outcome has."""
    return int(min(died.sum(), len(died) - died.sum()))


def too_few(died: np.ndarray) -> str:
    """Return `too few to read: 9 stays of one outcome, below 10`, or nothing where figures of these are no luck."""
    n = fewest(died)
    return f"too few to read: {n} stays of one outcome, below {TOO_FEW}" if n < TOO_FEW else ""


def bootstrap(statistic: Callable, patient_ids: ArrayLike, n_stays: int, n_bootstrap: int, seed: int = 0) -> np.ndarray:
    """Return a statistic (R, ...) of stay weights (R, n), how often a patient is drawn, when patients are resampled."""
    patient_of_stay, patients = pd.factorize(np.asarray(patient_ids))
    if len(patient_of_stay) != n_stays:
        raise ValueError(f"{n_stays} labels but {len(patient_of_stay)} patient ids")
    draws, generator, chunk = [], np.random.default_rng(seed), max(1, 2_000_000 // max(1, n_stays))
    for first in range(0, n_bootstrap if len(patients) > 1 else 0, chunk):  # 16 MB of weights at a time
        size = min(chunk, n_bootstrap - first)
        times_drawn = generator.multinomial(len(patients), np.full(len(patients), 1 / len(patients)), size)
        draws.append(statistic(times_drawn[:, patient_of_stay].astype(float)))
    return np.concatenate(draws or [statistic(np.empty((0, n_stays)))])


@lru_cache(maxsize=1)  # most means are of the same patients
def patients_drawn(n_patients: int, n_bootstrap: int, seed: int) -> np.ndarray:
    """Return how often each patient is drawn in each resample: (R, n_patients)."""
    return bootstrap(lambda weights: weights, np.arange(n_patients), n_patients, n_bootstrap, seed)


def mean_with_interval(values: np.ndarray, patient_ids: np.ndarray, n_bootstrap: int = 1000, seed: int = 0) -> dict:
    """Return the mean of those of (n,) values that are not NaN and its 95 % interval over resampled patients."""
    values = np.asarray(values, float)
    known = values[~np.isnan(values)]
    names, patient = np.unique(np.asarray(patient_ids)[~np.isnan(values)], return_inverse=True)
    low = high = math.nan
    if len(names) >= 3:  # resampling one or two says nothing
        drawn = patients_drawn(len(names), n_bootstrap, seed)
        low, high = interval_of((drawn @ np.bincount(patient, known)) / (drawn @ np.bincount(patient)))
    mean = float(known.mean()) if len(known) else math.nan
    return {"value": mean, "low": low, "high": high, "n": len(known), "n_patients": len(names)}


def interval_of(draws: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of draws (R,); an infinite one keeps its rank, so the interval is honestly unbounded."""
    draws = draws[~np.isnan(draws)]
    low, high = np.quantile(draws, [0.025, 0.975], method="inverted_cdf") if len(draws) else (math.nan, math.nan)
    return float(low), float(high)


def with_interval(value: float, draws: np.ndarray) -> dict[str, Any]:
    """Return value, low and high as JSON can hold them, and a reason where one of them does not exist."""
    low, high = interval_of(draws)
    numbers = {"value": float(value), "low": low, "high": high}
    result: dict[str, Any] = {name: number if math.isfinite(number) else None for name, number in numbers.items()}
    if result["value"] is None:
        result["reason"] = "needs stays of both outcomes whose probabilities neither tie all nor separate the outcomes"
    elif math.isinf(low) or math.isinf(high):
        result["reason"] = "a missing bound is unbounded: in some resamples the probabilities separate the outcomes"
    return result


def figure_text(figure: dict[str, Any], digits: int = 2, words: str = "95 % interval ") -> str:
    """Return a figure with its interval, `0.81 (95 % interval 0.70 to 0.90)`."""
    if figure["value"] is None:
        return "not defined"
    parts = [figure[name] for name in ("value", "low", "high")]
    value, low, high = ("unbounded" if part is None else f"{part:.{digits}f}" for part in parts)
    return value if parts[1:] == [None, None] else f"{value} ({words}{low} to {high})"


def weighted_metrics(weights: np.ndarray, labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return the figures in METRICS per row of stay weights (R, n), as (R, 5); NaN where a row lacks an outcome."""
    figures = np.full((len(weights), len(METRICS)), np.nan)
    figures[:, 2] = weights @ (probabilities - labels) ** 2 / weights.sum(1)
    both = (weights @ labels > 0) & (weights @ (1 - labels) > 0)
    if both.any():
        logits = logit(probabilities.clip(1e-7, 1 - 1e-7))  # those of 0 and 1 are infinite
        figures[both, :2] = weighted_ranking(weights[both], labels, probabilities)
        figures[both, 3:4] = logistic_fits(weights[both], labels, np.ones((len(labels), 1)), logits)
        figures[both, 4] = calibration_slopes(weights[both], labels, logits)
    return figures


def weighted_ranking(weights: np.ndarray, labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return AUROC and average precision (R, 2) for rows of stay weights (R, n) that hold both outcomes."""
    order = np.argsort(probabilities, kind="stable")
    first_of_tie = np.flatnonzero(np.diff(probabilities[order], prepend=-1.0) > 0)
    weights, died = weights[:, order], labels[order]
    deaths = np.add.reduceat(weights * died, first_of_tie, axis=1)  # (R, G), rising risk
    stays = np.add.reduceat(weights, first_of_tie, axis=1)
    survivors = stays - deaths
    n_deaths, n_survivors = deaths.sum(1), survivors.sum(1)
    below = survivors.cumsum(1) - survivors / 2  # a tie counts a half
    auroc = (deaths * below).sum(1) / (n_deaths * n_survivors)
    found = n_deaths[:, None] - deaths.cumsum(1) + deaths  # of the stays at or above each risk
    alarms = stays.sum(1, keepdims=True) - stays.cumsum(1) + stays
    average_precision = (deaths * (found / np.maximum(alarms, 1))).sum(1) / n_deaths
    return np.column_stack([auroc, average_precision])


def calibration_slopes(weights: np.ndarray, labels: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Return the slope of death on logits (n,) per row of weights (R, n); infinite where they separate outcomes."""
    died, survived = (weights > 0) & (labels == 1), (weights > 0) & (labels == 0)  # (R, n)
    lowest_death, lowest_survivor = (np.where(part, logits, np.inf).min(1) for part in (died, survived))
    highest_death, highest_survivor = (np.where(part, logits, -np.inf).max(1) for part in (died, survived))
    deaths_above, deaths_below = highest_survivor <= lowest_death, highest_death <= lowest_survivor
    neither = ~(deaths_above | deaths_below)
    slopes = np.select([neither, deaths_above & deaths_below, deaths_above], [0, np.nan, np.inf], -np.inf)
    if neither.any():
        scale = logits.std()
        features = np.column_stack([np.ones(len(logits)), (logits - logits.mean()) / scale])
        slopes[neither] = logistic_fits(weights[neither], labels, features, np.zeros(1))[:, 1] / scale
    return slopes


def logistic_fits(weights: np.ndarray, labels: np.ndarray, features: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Return weighted logistic regressions by Newton, one per row of weights (R, n) at once: coefficients (R, k)."""
    n_features = features.shape[1]
    products = (features[:, :, None] * features[:, None, :]).reshape(len(features), -1)  # (n, k * k)
    ridge = 1e-9 * np.eye(n_features)  # where every risk is near 0 or 1, the curvature is flat
    coefficients = np.zeros((len(weights), n_features))
    for _ in range(100):
        risks = expit(coefficients @ features.T + offset)  # (R, n)
        gradient = (weights * (labels - risks) @ features)[:, :, None]
        curvature = (weights * risks * (1 - risks) @ products).reshape(-1, n_features, n_features)
        step = np.linalg.solve(curvature + ridge, gradient)[:, :, 0].clip(-2, 2)  # longer steps can oscillate
        coefficients += step
        if np.abs(step).max() < 1e-7:
            break
    return np.where(np.abs(step).max(1, keepdims=True) < 1e-4, coefficients, np.nan)


def race_group(race: Any) -> str:
    """Return MIMIC's 30-odd values by their first words: `BLACK/CAPE VERDEAN` is BLACK; not saying is UNKNOWN."""
    words = re.split("/| - | OR ", "" if pd.isna(race) else str(race).strip().upper())[0]
    return "UNKNOWN" if words.startswith(("UNABLE", "PATIENT DECLINED", "UNKNOWN")) or not words else words


def subgroups_of_stays(stays: pd.DataFrame) -> pd.DataFrame:
    """Return the groups reported on, one row per stay: sex, age band, race, care unit (from the table's columns)."""
    edges, names = [-np.inf, 45, 65, 80, np.inf], ["under 45", "45 to 64", "65 to 79", "80 and over"]
    ages = pd.cut(stays["patient_age"].astype(float), edges, right=False, labels=names)
    races = stays["patient_race"].map(race_group)
    groups = {"sex": stays["patient_gender"], "age band": ages, "race": races, "care unit": stays["first_icu_careunit"]}
    return pd.DataFrame({name: group.astype(object).fillna("Unknown") for name, group in groups.items()})


def subgroup_table(
    died: ArrayLike, risks: ArrayLike, patients: ArrayLike, groups: pd.DataFrame, n_bootstrap: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Return sizes, the figures of `evaluate_predictions` and what an alarm costs, of all stays and per group.

    groups has one row per stay and one column per grouping. One threshold holds for everyone, the highest that finds
    80 % of all deaths. Below TOO_FEW of either outcome a group has no METRICS.
    """
    died, risks = checked_predictions(died, risks)
    patients, rows, threshold = np.asarray(patients), [], math.nan
    if died.any():
        threshold = float(np.sort(risks[died == 1])[-math.ceil(SENSITIVITY * died.sum())])
    members: list[tuple[Any, str, Any]] = [("all", "all stays", np.ones(len(groups), dtype=bool))]
    youngest_first = lambda value: (not str(value).startswith("under"), str(value))  # else behind "45 to 64"
    for name, column in groups.items():
        members += [(name, value, column == value) for value in sorted(column.unique(), key=youngest_first)]
    for group, value, is_member in members:
        own = died[is_member], risks[is_member], patients[is_member]
        dead, alarm, is_few = own[0] == 1, own[1] >= threshold, bool(too_few(own[0]))
        figures = evaluate_predictions(*own, 0 if is_few else n_bootstrap, seed)
        cost = lambda weights: weights @ alarm / (weights @ (alarm & dead))  # infinite where no death is found
        row = {"group": group, "value": value, "stays": len(dead), "patients": figures["n_patients"]}
        row |= {"deaths": figures["n_deaths"], "prevalence": figures["prevalence"], "too_few_to_read": is_few}
        row |= {"threshold": threshold, "alarms": int(alarm.sum()), "deaths_found": int(alarm[dead].sum())}
        with np.errstate(divide="ignore", invalid="ignore"):
            row |= {"sensitivity": alarm[dead].sum() / dead.sum(), "specificity": (~alarm[~dead]).sum() / (~dead).sum()}
            row["alarms_per_true_death"] = cost(np.ones((1, len(dead))))[0]
            row["alarms_low"], row["alarms_high"] = interval_of(bootstrap(cost, own[2], len(dead), n_bootstrap, seed))
        for metric in METRICS:
            for part, column in (("value", metric), ("low", f"{metric}_low"), ("high", f"{metric}_high")):
                row[column] = math.nan if is_few or figures[metric][part] is None else figures[metric][part]
        rows.append(row)
    return pd.DataFrame(rows)


def decision_curve(
    labels: ArrayLike, probabilities: ArrayLike, thresholds: ArrayLike = THRESHOLDS, **resampling: Any
) -> pd.DataFrame:
    """Return the net benefit per stay of treating those at or above each risk threshold, all, or none.

    Net benefit = true positives / n - false positives / n * t / (1 - t): t is the risk at which one would just treat.
    With patient_ids, n_bootstrap and seed, as `bootstrap` takes them, low and high bound the model's.
    """
    died, risks = checked_predictions(labels, probabilities)
    limits = np.asarray(thresholds, dtype=float)
    if not ((limits > 0) & (limits < 1)).all() or not len(died):
        raise ValueError("a decision curve needs at least one stay, and thresholds above 0 and below 1")
    is_treated = risks >= limits[:, None]  # (thresholds, n)
    odds, prevalence = limits / (1 - limits), died.mean()
    gains = np.where(died == 1, 1.0, -odds[:, None]) * is_treated
    columns = {"threshold": limits, "model": gains.mean(1), "treat_all": prevalence - (1 - prevalence) * odds}
    columns |= {"treat_none": 0.0, "share_treated": is_treated.mean(1)}
    mean_gains = lambda weights: weights @ gains.T / weights.sum(1, keepdims=True)
    draws = bootstrap(mean_gains, n_stays=len(died), **resampling) if resampling else ()
    if len(draws):
        columns["low"], columns["high"] = np.quantile(draws, [0.025, 0.975], axis=0)
    return pd.DataFrame(columns)


def calibration_table(labels: ArrayLike, probabilities: ArrayLike, n_bins: int | None = None) -> pd.DataFrame:
    """Return mean risk and observed death rate, 95 % Wilson interval by stay, in bins of equal size, ten at most."""
    from scipy.stats import binomtest

    died, risks = checked_predictions(labels, probabilities)
    n_bins = n_bins or int(np.clip(len(died) // 10, 2, 10))
    bins = pd.qcut(pd.Series(risks), n_bins, labels=False, duplicates="drop").fillna(0)
    stays = pd.DataFrame({"bin": bins, "risk": risks, "died": died}).groupby("bin")
    counts = {"n": ("died", "size"), "deaths": ("died", "sum")}
    table = stays.agg(**counts, mean_risk=("risk", "mean"), observed_rate=("died", "mean"))
    table = table.reset_index(drop=True).astype({"deaths": int})
    intervals = [binomtest(deaths, n).proportion_ci(method="wilson") for deaths, n in zip(table["deaths"], table["n"])]
    return table.assign(low=[bounds.low for bounds in intervals], high=[bounds.high for bounds in intervals])
