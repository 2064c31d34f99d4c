"""Figures of held-out predictions with intervals over patients: discrimination, calibration, clinical use, subgroups.

n stays, R bootstrap resamples, G distinct probabilities, k coefficients. Outcome 1 is death.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import scipy
from numpy.typing import ArrayLike

from clinical_lf.files import WORDS

METRIC_WORDS = WORDS["metrics"]
METRICS = tuple(METRIC_WORDS)
TOO_FEW, TOO_FEW_OF_GROUP = 10, 20  # stays of either outcome: with fewer, a figure is luck
SMALLEST_GROUP = 10  # patients: counts of fewer would tell of a person, and are hidden
SENSITIVITY = 0.8  # of the operating point: at least this share of the validation stays' deaths is found
LEVEL = 90  # percent of either outcome whose conformal set holds it
AUROC_INTERVAL = "Newcombe's score interval, its variance at least the bootstrap's over patients"
Columns = tuple[np.ndarray, np.ndarray, np.ndarray]  # labels, risks and patients, (n) each
SHOWN_CALIBRATED = {"calibration_slope": (0.8, 1.25), "calibration_intercept": (-0.25, 0.25)}  # whole intervals


def evaluate_predictions(
    labels: ArrayLike, probabilities: ArrayLike, patient_ids: ArrayLike, n_bootstrap: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Return figures of held-out predictions with 95 % intervals over patients with all of their stays.

    JSON-ready counts and, per name in METRICS, value, low, high; None with a reason where there is none. Resamples with
    one outcome only are skipped and counted. Raises ValueError for lengths or values that make no sense.
    """
    died, risks = checked_predictions(labels, probabilities)
    n_stays, n_deaths = len(died), int(died.sum())
    figures_of = lambda weights: weighted_metrics(weights, died, risks)
    draws = bootstrap(figures_of, patient_ids, n_bootstrap, seed)  # (R, 6)
    values = figures_of(np.ones((1, n_stays)))[0] if n_stays else np.full(len(METRICS), np.nan)
    result: dict[str, Any] = {"n_stays": n_stays, "n_patients": len(np.unique(np.asarray(patient_ids)))}
    result |= {"n_deaths": n_deaths, "prevalence": n_deaths / n_stays if n_stays else None, "n_bootstrap": n_bootstrap}
    result |= {"n_resamples_skipped": int(np.isnan(draws[:, 0]).sum()), "too_few_to_read": bool(too_few(died))}
    result |= {name: with_interval(values[i], draws[:, i]) for i, name in enumerate(METRICS)}
    if fewest(died) and result["n_patients"] > 1:
        result["auroc"] |= auroc_interval(values[0], died, draws[:, 0], n_stays / result["n_patients"])
    if (ici := result["ici"])["low"] is not None:  # chance alone raises it: it reaches as far below its value as above
        ici["low"] = max(0.0, min(ici["low"], 2 * ici["value"] - ici["high"]))
    return result


def checked_predictions(labels: ArrayLike, probabilities: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return both as (n,) float64. Raises ValueError for what no prediction can be."""
    died, risks = np.asarray(labels, dtype=float).ravel(), np.asarray(probabilities, dtype=float).ravel()
    if len(died) != len(risks):
        raise ValueError(f"{len(died)} labels but {len(risks)} probabilities")
    if not (np.isin(died, (0, 1)) & (risks >= 0) & (risks <= 1)).all():  # false for NaN too
        raise ValueError("labels must be 0 or 1, probabilities between 0 and 1; leave out stays of unknown outcome")
    return died, risks


def fewest(died: np.ndarray) -> int:
    """Return how many stays the rarer outcome has."""
    return int(min(died.sum(), len(died) - died.sum()))


def too_few(died: np.ndarray) -> str:
    """Return `too few to read: 9 stays of one outcome, below 10`, or nothing where figures of these are no luck."""
    n = fewest(died)
    return f"too few to read: {n} stays of one outcome, below {TOO_FEW}" if n < TOO_FEW else ""


def discrimination(figures: dict[str, Any]) -> str:
    """Return whether risks rank deaths above survivors: `shown`, `not shown`, `reversed`, `few` or `one outcome`."""
    low, high = figures["auroc"]["low"], figures["auroc"]["high"]
    if low is None or figures["too_few_to_read"]:
        return "one outcome" if low is None else "few"
    return "shown" if low > 0.5 else "reversed" if high < 0.5 else "not shown"


def is_shown_calibrated(figures: dict[str, Any]) -> bool:
    """Return whether slope and intercept lie within SHOWN_CALIBRATED with their whole intervals."""
    bounds = [(figures[name]["low"], figures[name]["high"], limits) for name, limits in SHOWN_CALIBRATED.items()]
    return all(None not in (low, high) and least <= low and high <= most for low, high, (least, most) in bounds)


def auroc_interval(auroc: float, died: np.ndarray, draws: np.ndarray, per_patient: float) -> dict[str, Any]:
    """Return the AUROC's 95 % interval: Newcombe's score interval (2006, method 5), which has a width at 1, too.

    Its variance, that of exponential scores, is raised to that of the draws (R,) over patients where theirs is larger,
    or by the stays per patient where no pair is out of order. Simulated, it holds the truth in 92 to 98 % of samples of
    140 stays with 4 or 13 deaths, in 89 to 97 % with two stays of each patient; percentiles of the draws in 78 to 93 %.
    """
    least, n_pairs = fewest(died), died.sum() * (1 - died).sum()
    grid, half = np.append(np.linspace(0, 1, 20_001), auroc), len(died) / 2 - 1
    variance = grid * (1 - grid) / n_pairs * (1 + half * (1 - grid) / (2 - grid) + half * grid / (1 + grid))
    raised = per_patient
    if 0 < auroc < 1:  # draws of so few vary a share less than samples do
        raised = np.nanvar(draws) / variance[-1] * least / max(1, least - 1) if len(draws) else 1
    held = grid[(auroc - grid) ** 2 <= 1.959964**2 * max(1, raised) * variance]
    return {"low": float(held.min()), "high": float(held.max()), "interval": AUROC_INTERVAL}


def bootstrap(statistic: Callable, patient_ids: ArrayLike, n_bootstrap: int, seed: int = 0) -> np.ndarray:
    """Return a statistic (R, ...) of stay weights (R, n), how often a patient is drawn, when patients are resampled."""
    patient_of_stay, patients = pd.factorize(np.asarray(patient_ids))
    n_stays, shares = len(patient_of_stay), np.full(len(patients), 1 / max(1, len(patients)))
    draws, generator = [statistic(np.empty((0, n_stays)))], np.random.default_rng(seed)
    chunk = max(1, 2_000_000 // max(1, n_stays))  # 16 MB of weights at a time
    for first in range(0, n_bootstrap if len(patients) > 1 else 0, chunk):
        times_drawn = generator.multinomial(len(patients), shares, min(chunk, n_bootstrap - first))
        draws.append(statistic(times_drawn[:, patient_of_stay].astype(float)))
    return np.concatenate(draws)


def mean_with_interval(values: np.ndarray, patient_ids: np.ndarray, n_bootstrap: int = 1000, seed: int = 0) -> dict:
    """Return the mean of those of (n,) values that are not NaN and its 95 % interval over resampled patients."""
    known = pd.Series(np.asarray(values, float), patient_ids).dropna()
    sums, sizes = known.groupby(level=0).agg(["sum", "size"]).to_numpy().T  # of each patient
    mean = lambda weights: weights @ sums / (weights @ sizes)
    low, high = interval_of(bootstrap(mean, np.arange(len(sums)), n_bootstrap if len(sums) > 2 else 0, seed))
    return {"value": float(known.mean()), "low": low, "high": high, "n": len(known), "n_patients": len(sums)}


def interval_of(draws: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of draws (R,); an infinite one keeps its rank, so the interval is honestly unbounded."""
    draws = draws[~np.isnan(draws)]
    low, high = np.quantile(draws, [0.025, 0.975], method="inverted_cdf") if len(draws) else (math.nan, math.nan)
    return float(low), float(high)


def with_interval(value: float, draws: np.ndarray) -> dict[str, Any]:
    """Return value, low and high as JSON can hold them, and a reason where there is no value."""
    low, high = interval_of(draws)
    if low == high:
        low = high = math.nan  # every resample agrees, which is no certainty
    numbers = {"value": float(value), "low": low, "high": high}
    result: dict[str, Any] = {name: number if math.isfinite(number) else None for name, number in numbers.items()}
    return result if math.isfinite(value) else result | {"reason": WORDS["no_figure"]}


def figure_text(figure: dict[str, Any], digits: int = 2, words: str = "95 % interval ") -> str:
    """Return a figure with its interval, `0.81 (95 % interval 0.70 to 0.90)`."""
    parts = (figure[name] for name in ("value", "low", "high"))
    value, low, high = ("unbounded" if part is None else f"{part:.{digits}f}" for part in parts)
    if value == "unbounded":
        return "not defined"
    return value if low == high == "unbounded" else f"{value} ({words}{low} to {high})"


def weighted_metrics(weights: np.ndarray, labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return the figures in METRICS per row of stay weights (R, n), as (R, 6); NaN where a row lacks an outcome."""
    figures = np.full((len(weights), len(METRICS)), np.nan)
    figures[:, 2] = weights @ (probabilities - labels) ** 2 / weights.sum(1)
    both = (weights @ labels > 0) & (weights @ (1 - labels) > 0)
    if both.any():
        logits = scipy.special.logit(probabilities.clip(1e-7, 1 - 1e-7))  # those of 0 and 1 are infinite
        figures[both, :2] = weighted_ranking(weights[both], labels, probabilities)
        figures[both, 3:4] = logistic_fits(weights[both], labels, np.ones((len(labels), 1)), logits)
        scale, auroc = logits.std() or math.nan, figures[both, 0]  # of risks that all tie there is no slope
        features = np.column_stack([np.ones(len(logits)), (logits - logits.mean()) / scale])
        slopes = logistic_fits(weights[both], labels, features)[:, 1] / scale
        figures[both, 4] = np.select([auroc == 1, auroc == 0], [np.inf, -np.inf], slopes)  # separated: infinite
        off = np.abs(smooth_rates(weights[both], labels, logits) - probabilities)
        figures[both, 5] = (weights[both] * off).sum(1) / weights[both].sum(1)
    return figures


def weighted_ranking(weights: np.ndarray, labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return AUROC and average precision (R, 2) for rows of stay weights (R, n) that hold both outcomes."""
    order = np.argsort(-probabilities, kind="stable")
    first_of_tie = np.flatnonzero(np.diff(-probabilities[order], prepend=-2.0))
    deaths, stays = (np.add.reduceat(part[:, order], first_of_tie, axis=1) for part in (weights * labels, weights))
    found, alarms, survivors = deaths.cumsum(1), stays.cumsum(1), stays - deaths  # (R, G), falling risk
    n_deaths, n_survivors = found[:, -1], alarms[:, -1] - found[:, -1]
    below = n_survivors[:, None] - (alarms - found) + survivors / 2  # a tie counts a half
    auroc = (deaths * below).sum(1) / (n_deaths * n_survivors)
    average_precision = (deaths * (found / np.maximum(alarms, 1))).sum(1) / n_deaths
    return np.column_stack([auroc, average_precision])


def smooth_rates(weights: np.ndarray, labels: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Return the smooth death rate at logits (n,) per row of weights (R, n), as the ICI compares it with the risks.

    ICI: Austin and Steyerberg (2019); smooth: logistic regression on a restricted cubic spline with three knots.
    """
    knots = np.quantile(np.unique(logits), [0.1, 0.5, 0.9]) + np.array([-1e-6, 0, 1e-6])  # never equal
    width = knots[2] - knots[0]
    cubes = ((logits[:, None] - knots) / width).clip(0) ** 3  # (n, 3)
    bend = cubes[:, 0] - cubes[:, 2] - (cubes[:, 1] - cubes[:, 2]) * width / (knots[2] - knots[1])
    features = np.column_stack([np.ones(len(logits)), (logits - knots[1]) / width, bend])
    # A ridge of a hundredth of a stay keeps the curve of separated outcomes finite.
    return scipy.special.expit(logistic_fits(weights, labels, features, ridge=0.01) @ features.T)


def logistic_fits(
    weights: np.ndarray, labels: np.ndarray, features: np.ndarray, offset: np.ndarray | float = 0.0, ridge: float = 1e-9
) -> np.ndarray:
    """Return weighted logistic regressions by Newton, one per row of weights (R, n) at once: coefficients (R, k)."""
    coefficients, (n_stays, k) = np.zeros((len(weights), features.shape[1])), features.shape
    products = (features[:, :, None] * features[:, None, :]).reshape(n_stays, k * k)
    for _ in range(100):
        risks = scipy.special.expit(coefficients @ features.T + offset)  # (R, n)
        gradient = (weights * (labels - risks) @ features - ridge * coefficients)[:, :, None]
        curvature = (weights * risks * (1 - risks) @ products).reshape(-1, k, k)  # flat where all risks are near 0 or 1
        step = np.linalg.solve(curvature + ridge * np.eye(k), gradient)[:, :, 0].clip(-2, 2)  # longer can oscillate
        coefficients += step
        if np.abs(step).max() < 1e-7:
            break
    return np.where(np.abs(step).max(1, keepdims=True) < 1e-4, coefficients, np.nan)


def subgroups_of_stays(stays: pd.DataFrame) -> pd.DataFrame:
    """Return the groups reported on, one row per stay: sex, age band, race, care unit (from the table's columns).

    Race: MIMIC's 30-odd values by their first words, `BLACK/CAPE VERDEAN` is BLACK; not saying is UNKNOWN.
    """
    edges, bands = [-np.inf, 45, 65, 80, np.inf], ["0 to 44", "45 to 64", "65 to 79", "80 and over"]
    ages = pd.cut(stays["patient_age"].astype(float), edges, right=False, labels=bands)
    races = stays["patient_race"].astype("string").str.strip().str.upper().str.split("/| - | OR ", regex=True).str[0]
    races = races.mask(races.str.match("UNABLE|PATIENT DECLINED|UNKNOWN|$", na=True), "UNKNOWN")
    groups = {"sex": stays["patient_gender"], "age band": ages, "race": races, "care unit": stays["first_icu_careunit"]}
    return pd.DataFrame({name: group.astype(object).fillna("Unknown") for name, group in groups.items()})


def thresholds_of(labels: ArrayLike, probabilities: ArrayLike) -> dict[str, float]:
    """Return what validation stays (n,) set for all others, widened to 4 decimals: what is printed is what holds.

    alarm: the highest risk that finds at least SENSITIVITY of the deaths. Class-conditional (Mondrian) conformal sets:
    death is possible from `died_from` on, survival up to `survived_to`, for at least LEVEL % of either outcome in new
    stays like these. Fewer than nine of an outcome exclude it nowhere.
    """
    died, risks = checked_predictions(labels, probabilities)
    deaths, survivors = np.sort(np.append(risks[died == 1], 0)), np.sort(np.append(risks[died == 0], 1))[::-1]
    alarm = deaths[-math.ceil(SENSITIVITY * died.sum())] if died.any() else math.nan
    died_from, survived_to = (part[len(part) * (100 - LEVEL) // 100] for part in (deaths, survivors))
    down = lambda risk: float(np.floor(1e4 * risk) / 1e4)
    return {"alarm": down(alarm), "died_from": down(died_from), "survived_to": -down(-survived_to)}


def subgroup_table(columns: Columns, groups: pd.DataFrame, thresholds: Mapping[str, Any], **more: Any) -> pd.DataFrame:
    """Return counts, the figures of `evaluate_predictions` and what an alarm costs, of all stays and per group.

    groups: a row per stay, a column per grouping. thresholds: as `thresholds_of` returns them, or one per stay. more:
    n_bootstrap, seed. A group of fewer than SMALLEST_GROUP patients is left out; one with fewer than TOO_FEW_OF_GROUP
    of either outcome has counts only.
    """
    limits, rows = pd.DataFrame(dict(thresholds), index=range(len(groups))), []
    dead, alarm, may_die = columns[0] == 1, columns[1] >= limits["alarm"], columns[1] >= limits["died_from"]
    may_survive = columns[1] <= limits["survived_to"]
    counts = pd.DataFrame({"stays": 1, "deaths": dead, "alarms": alarm, "deaths_found": alarm & dead})
    counts = counts.assign(deaths_covered=may_die & dead, survivors_covered=may_survive & ~dead)
    counts = counts.assign(both_possible=may_die & may_survive, none_possible=~may_die & ~may_survive)
    threshold = limits["alarm"].iloc[0] if limits["alarm"].nunique() == 1 else math.nan
    varied = groups.columns[groups.nunique(dropna=False) > 1]  # of one value it would be all stays once more
    groups = groups.astype(str).assign(all="all stays")[["all", *varied]]
    for group in groups:
        for value, members in groups.groupby(group).indices.items():
            died, _, patients = own = tuple(column[members] for column in columns)
            is_few = fewest(died) < (TOO_FEW if group == "all" else TOO_FEW_OF_GROUP)
            row = {"group": group, "value": value, "patients": len(np.unique(patients)), "too_few_to_read": is_few}
            row |= counts.iloc[members].sum().to_dict() | {"prevalence": died.mean(), "threshold": threshold}
            figures = evaluate_predictions(*own, **more) if group == "all" or not is_few else {}
            for metric in METRICS if figures else ():
                parts = (figures[metric][part] for part in ("value", "low", "high"))
                row[metric], row[f"{metric}_low"], row[f"{metric}_high"] = parts
            rows.append(row)
    table = pd.DataFrame(rows).query("group == 'all' or patients >= @SMALLEST_GROUP")
    read = table.query("group == 'all' or not too_few_to_read")
    survivors, found = read["stays"] - read["deaths"], read["deaths_found"]
    rates = {"sensitivity": found / read["deaths"], "alarms_per_true_death": read["alarms"] / found}
    return table.assign(**rates, specificity=(survivors - read["alarms"] + found) / survivors)


def calibration_table(labels: ArrayLike, probabilities: ArrayLike) -> pd.DataFrame:
    """Return mean risk and observed death rate, 95 % Wilson interval by stay, in bins of equal size, ten at most."""
    from scipy.stats import binomtest

    died, risks = checked_predictions(labels, probabilities)
    bins = pd.qcut(risks, int(np.clip(len(died) // 10, 2, 10)), labels=False, duplicates="drop")  # NaN: all tie
    stays = pd.DataFrame({"n": 1, "deaths": died.astype(int), "mean_risk": risks, "observed_rate": died})
    how = {"n": "sum", "deaths": "sum", "mean_risk": "mean", "observed_rate": "mean"}
    table = stays.groupby(np.nan_to_num(bins)).agg(how)
    bounds = [binomtest(deaths, n).proportion_ci(method="wilson") for deaths, n in zip(table["deaths"], table["n"])]
    return table.reset_index(drop=True).join(pd.DataFrame(bounds))
