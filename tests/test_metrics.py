"""Figures of held-out predictions and their intervals, subgroups and operating point, decision curve, calibration."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy.optimize import brentq
from scipy.special import expit
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from clinical_lf import metrics

CASES = yaml.safe_load(Path(__file__).with_name("metrics_cases.yaml").read_text("utf-8"))
CALIBRATION = ("calibration_intercept", "calibration_slope")


def simulate(n):
    """Labels drawn from the very risks, perfectly calibrated, and the logits of these."""
    generator = np.random.default_rng(0)
    logits = generator.normal(-1.0, 1.5, n)
    return (generator.random(n) < expit(logits)).astype(int), logits


def figures(labels, risks, n_bootstrap=0, patients=None):
    patients = np.arange(len(labels)) if patients is None else patients
    return metrics.evaluate_predictions(labels, risks, patients, n_bootstrap=n_bootstrap)


@pytest.mark.parametrize("decimals", [1, 8])  # with many ties and with none
def test_figures_and_intervals_are_those_of_scikit_learn_in_a_plain_bootstrap_loop(decimals):
    labels, logits = simulate(300)
    risks, drawn = expit(logits).round(decimals), np.random.default_rng(1).integers(0, 300, (300, 300))
    result, without = figures(labels, risks, 2000), figures(labels, risks)
    widths = {roc_auc_score: 0.015, average_precision_score: 0.03, brier_score_loss: 0.01}
    for name, (score, width) in zip(("auroc", "auprc", "brier"), widths.items()):
        assert result[name]["value"] == without[name]["value"] == pytest.approx(score(labels, risks))
        bounds = np.quantile([score(labels[rows], risks[rows]) for rows in drawn], [0.025, 0.975])
        assert [result[name]["low"], result[name]["high"]] == pytest.approx(list(bounds), abs=width)
        assert name == "auroc" or without[name]["low"] is None


def test_calibration_tells_scale_and_shift_of_the_logits_and_is_shown_by_many_stays_alone():
    labels, logits = simulate(20_000)
    changed = {"right": logits, "extreme": 2 * logits, "shifted": logits + 1, "far": 6 * logits - 8}
    found = {name: figures(labels, expit(z), 20) for name, z in changed.items()}
    intercepts, slopes, icis = ({name: found[name][key]["value"] for name in changed} for key in (*CALIBRATION, "ici"))
    assert [intercepts["right"], slopes["right"], icis["right"]] == pytest.approx([0, 1, 0], abs=0.06)
    assert found["right"]["calibration_slope"]["low"] < 1 < found["right"]["calibration_slope"]["high"]
    assert found["right"]["ici"]["low"] == 0 and slopes["extreme"] == pytest.approx(slopes["right"] / 2, abs=1e-4)
    assert icis["extreme"] == pytest.approx(np.abs(expit(2 * logits) - expit(logits)).mean(), abs=0.01)
    assert intercepts["shifted"] - intercepts["right"] == pytest.approx(-1, abs=1e-6)
    clipped = changed["far"].clip(-16.12, 16.12)  # probabilities are kept 1e-7 from 0 and 1
    assert expit(intercepts["far"] + clipped).mean() == pytest.approx(labels.mean(), abs=1e-4)
    found |= {n: figures(labels[:n], expit(logits[:n]), 200) for n in (200, 5)}  # too few to show it, and one outcome
    assert [name for name, result in found.items() if metrics.is_shown_calibrated(result)] == ["right"]


def test_interval_widens_when_patients_repeat_stays():
    labels, logits = simulate(100)
    labels, risks = np.repeat(labels, 4), np.repeat(expit(logits), 4)
    by_patient, by_stay = (figures(labels, risks, 500, np.arange(400) // each)["auroc"] for each in (4, 1))
    ratio = (by_patient["high"] - by_patient["low"]) / (by_stay["high"] - by_stay["low"])
    assert by_patient["value"] == by_stay["value"] and 1.6 < ratio < 2.4  # sqrt(4) in theory


def score_bound(auroc, m, n):
    """The lower bound of Newcombe's method 5, by its equation."""
    theirs = lambda t: 1 + (m + n - 2) / 2 * ((1 - t) / (2 - t) + t / (1 + t))
    return brentq(lambda t: (auroc - t) ** 2 - 1.96**2 * t * (1 - t) * theirs(t) / (m * n), 1e-6, auroc - 1e-6)


@pytest.mark.parametrize("state, outcomes", CASES["states"].items())
def test_model_is_shown_to_discriminate_not_shown_or_ranks_in_reverse(state, outcomes):
    labels = np.array(list(outcomes)).astype(int)
    result = figures(labels, np.linspace(0.1, 0.9, len(labels)), 200)
    assert metrics.discrimination(result) == state and result["too_few_to_read"] == (state in ("few", "one outcome"))
    words = f"too few to read: {metrics.fewest(labels)} stays of one outcome, below 10"
    assert metrics.too_few(labels) == (words if result["too_few_to_read"] else "")
    if state in ("few", "shown"):  # separated: no resample has a pair out of order, yet nothing is certain
        assert result["auroc"]["low"] == pytest.approx(score_bound(1.0, labels.sum(), (1 - labels).sum()), abs=1e-3)
        assert [result[name]["high"] for name in ("auroc", "auprc")] == [1.0, None]
        four_each = np.repeat(np.arange(len(labels)), 4)
        copies = figures(labels[four_each], labels[four_each] / 2, 50, patients=four_each)["auroc"]
        assert copies["low"] == pytest.approx(result["auroc"]["low"], abs=0.04)


def test_single_class_or_separated_outcomes_give_none_with_a_reason_and_resamples_of_one_are_skipped():
    result = json.loads(json.dumps(figures([0, 0, 0], [0.1, 0.2, 0.3], 20)))
    assert result["auroc"]["value"] is None and "both outcomes" in result["auroc"]["reason"]
    assert result["brier"]["value"] == pytest.approx((0.01 + 0.04 + 0.09) / 3)
    assert result["n_resamples_skipped"] == 20 and metrics.figure_text(result["auroc"]) == "not defined"
    one_death = figures(np.r_[np.zeros(29), 1], np.linspace(0.1, 0.9, 30), 1000)
    assert 300 < one_death["n_resamples_skipped"] < 430  # (29 / 30) ** 30 = 0.36
    empty = metrics.evaluate_predictions([], [], [])
    assert empty["n_stays"] == 0 and empty["prevalence"] is None and empty["brier"]["value"] is None
    result = figures([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9], 50)
    assert [result[name]["value"] for name in CALIBRATION] == [pytest.approx(0, abs=1e-6), None]
    assert result["calibration_slope"]["reason"]
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("labels, risks", CASES["refused"])
def test_impossible_values_are_refused(labels, risks):
    with pytest.raises(ValueError):
        figures(labels, risks)


@pytest.mark.parametrize("low, high, words", CASES["words"])
def test_figure_in_words_has_its_interval(low, high, words):
    assert metrics.figure_text({"value": 0.81, "low": low, "high": high}) == words


def test_mean_with_interval_resamples_patients_and_leaves_out_nan():
    assert [*metrics.mean_with_interval(np.array([2.0, 2, math.nan, 2]), np.arange(4), 50).values()] == [2, 2, 2, 3, 3]
    two = metrics.mean_with_interval(np.array([0.0] * 50 + [1.0]), np.array([1] * 50 + [2]), 50)
    assert math.isnan(two["low"])  # two patients: nothing to resample


# ---- Subgroups and clinical use
def test_race_is_grouped_by_its_first_words_and_other_subgroups_come_from_the_columns_of_the_table():
    races = pd.Series(CASES["races"]).explode().rename_axis("group").reset_index(name="patient_race")
    stays = races.assign(patient_gender="F", patient_age=44, first_icu_careunit="MICU")
    stays.loc[0, ["patient_gender", "patient_age"]] = [None, 80]
    found = metrics.subgroups_of_stays(stays)
    assert found["race"].tolist() == races["group"].tolist()
    assert found.iloc[0].tolist() == ["Unknown", "80 and over", "WHITE", "MICU"]
    assert found.iloc[1].tolist() == ["F", "0 to 44", "BLACK", "MICU"]


def test_subgroup_has_figures_with_twenty_of_either_outcome_and_is_hidden_with_less_than_ten_patients():
    labels, logits = simulate(300)
    died, stays = np.flatnonzero(labels == 1), np.arange(300)
    few = np.where(np.isin(stays, died[:19]), "19 died", "others")
    groups = pd.DataFrame({"sex": few, "unit": np.select([stays < 9, stays < 20], ["A", "B"], "C"), "same": "D"})
    limits = metrics.thresholds_of(labels, expit(logits))
    table = metrics.subgroup_table((labels, expit(logits), stays), groups, limits, n_bootstrap=50).set_index("value")
    dead, others, is_other = table.loc["19 died"], table.loc["others"], few == "others"
    assert dead["too_few_to_read"] and dead["auroc":].isna().all() and (dead["stays"], dead["deaths"]) == (19, 19)
    assert others["auroc"] == pytest.approx(roc_auc_score(labels[is_other], logits[is_other]))
    assert table.loc["all stays", "deaths"] == labels.sum() and not others["too_few_to_read"]
    assert table["patients"][table["group"].isin(["unit", "same"])].to_dict() == {"B": 11, "C": 280}
    one = metrics.subgroup_table((labels[:9], expit(logits[:9]), stays[:9]), groups[:9], limits, n_bootstrap=0)
    assert one["value"].tolist() == ["all stays"]


def test_operating_point_by_hand():
    labels, risks = np.array([1, 1, 1, 1, 1, 0, 0, 0]), np.array([0.9, 0.8, 0.7, 0.60009, 0.1, 0.65, 0.5, 0.3])
    limits = metrics.thresholds_of(labels, risks)
    assert limits == {"alarm": 0.6, "died_from": 0.0, "survived_to": 1.0}  # so few exclude no outcome
    columns = (labels, risks, np.arange(8))
    (whole,) = metrics.subgroup_table(columns, pd.DataFrame(index=range(8)), limits, n_bootstrap=0).to_dict("records")
    assert whole["threshold"] == 0.6 and whole["sensitivity"] == 0.8 and whole["specificity"] == pytest.approx(2 / 3)
    names = ["alarms", "deaths_found", "both_possible", "alarms_per_true_death"]
    assert [whole[name] for name in names] == [5, 4, 8, 5 / 4]
    assert math.isnan(metrics.thresholds_of([0, 0], [0.1, 0.2])["alarm"])  # no death, no point


@pytest.mark.parametrize("n", [12, 60, 400])
def test_conformal_sets_are_those_of_p_values_and_hold_nine_of_ten_of_either_outcome(n):
    labels, logits = simulate(60 * n)
    held: tuple[list, list] = [], []
    for died, risks in zip(labels.reshape(60, n), expit(logits).round(3).reshape(60, n)):
        old, new = slice(n // 2), slice(n // 2, n)
        limits = metrics.thresholds_of(died[old], risks[old])
        possible = risks[new] <= limits["survived_to"], risks[new] >= limits["died_from"]
        for outcome, unlike in ((0, risks), (1, 1 - risks)):
            before = unlike[old][died[old] == outcome]
            p_values = (1 + (before >= unlike[new, None] - 1e-9).sum(1)) / (1 + len(before))
            assert (possible[outcome] == (p_values > 0.1)).all()
            held[outcome].extend(possible[outcome][died[new] == outcome])
    assert all(0.89 < np.mean(of_outcome) <= (0.93 if n == 400 else 1) for of_outcome in held)


def test_calibration_table_by_hand():
    table = metrics.calibration_table([0, 0, 1, 1, 1, 1], [0.1, 0.2, 0.3, 0.7, 0.8, 0.9])
    assert table.n.tolist() == [3, 3] and table.mean_risk.tolist() == pytest.approx([0.2, 0.8])
    assert table.observed_rate.tolist() == pytest.approx([1 / 3, 1])
    assert table.low[1] == pytest.approx(1 / (1 + 1.959964**2 / 3), abs=1e-4)  # Wilson, 3 of 3
    assert len(metrics.calibration_table([0, 1], [0.5, 0.5])) == 1  # all tied: one bin
