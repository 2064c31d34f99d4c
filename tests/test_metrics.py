"""Figures of held-out predictions and their intervals, subgroups and operating point, decision curve, calibration."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from clinical_lf import metrics

CALIBRATION = ("calibration_intercept", "calibration_slope")


def simulate(n):
    """Labels drawn from the very risks, perfectly calibrated, and the logits of these."""
    generator = np.random.default_rng(0)
    logits = generator.normal(-1.0, 1.5, n)
    return (generator.random(n) < expit(logits)).astype(int), logits


def figures(labels, risks, n_bootstrap=0, patients=None):
    patients = np.arange(len(labels)) if patients is None else patients
    return metrics.evaluate_predictions(labels, risks, patients, n_bootstrap=n_bootstrap)


def values(result, *names):
    return [result[name]["value"] for name in names]


def test_figures_of_a_hand_example():
    result = figures([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8], 50)
    by_hand = [0.75, (1 + 2 / 3) / 2, (0.01 + 0.16 + 0.65**2 + 0.04) / 4]  # 3 of 4 pairs in order
    assert values(result, "auroc", "auprc", "brier") == pytest.approx(by_hand)
    assert [result[name] for name in ("n_stays", "n_patients", "n_deaths", "prevalence")] == [4, 4, 2, 0.5]


@pytest.mark.parametrize("decimals", [1, 8])  # with many ties and with none
def test_figures_equal_scikit_learn(decimals):
    labels, logits = simulate(200)
    risks, names = expit(logits).round(decimals), ("auroc", "auprc", "brier")
    result, theirs = figures(labels, risks), (roc_auc_score, average_precision_score, brier_score_loss)
    assert values(result, *names) == pytest.approx([function(labels, risks) for function in theirs])
    assert [result[name]["low"] for name in names] == [None] * 3


def test_calibration_of_calibrated_predictions_is_zero_and_one():
    labels, logits = simulate(20_000)
    result = figures(labels, expit(logits), 50)
    assert values(result, *CALIBRATION) == pytest.approx([0, 1], abs=0.06)
    assert result["calibration_slope"]["low"] < 1 < result["calibration_slope"]["high"]


def test_slope_is_halved_by_doubled_logits_and_intercept_shifted_by_an_added_constant_even_from_far():
    labels, logits = simulate(2000)
    changed = (logits, 2 * logits, logits + 1, 6 * logits - 8)
    intercepts, slopes = zip(*(values(figures(labels, expit(z)), *CALIBRATION) for z in changed))
    assert slopes[1] == pytest.approx(slopes[0] / 2, abs=1e-4)
    assert intercepts[2] - intercepts[0] == pytest.approx(-1, abs=1e-6)
    clipped = (logits * 6 - 8).clip(-16.12, 16.12)  # probabilities are kept 1e-7 from 0 and 1
    assert expit(intercepts[3] + clipped).mean() == pytest.approx(labels.mean(), abs=1e-4)


def test_interval_widens_when_patients_repeat_stays():
    labels, logits = simulate(100)
    labels, risks = np.repeat(labels, 4), np.repeat(expit(logits), 4)
    patients = (np.arange(400) // 4, np.arange(400))
    by_patient, by_stay = (figures(labels, risks, 500, ids)["auroc"] for ids in patients)
    ratio = (by_patient["high"] - by_patient["low"]) / (by_stay["high"] - by_stay["low"])
    assert by_patient["value"] == by_stay["value"] and 1.6 < ratio < 2.4  # sqrt(4) in theory


def test_interval_is_that_of_a_plain_bootstrap_loop():
    labels, logits = simulate(300)
    drawn = np.random.default_rng(1).integers(0, 300, (500, 300))
    loop = [roc_auc_score(labels[rows], logits[rows]) for rows in drawn]
    figure = figures(labels, expit(logits), 2000)["auroc"]
    assert [figure["low"], figure["high"]] == pytest.approx(list(np.quantile(loop, [0.025, 0.975])), abs=0.015)


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
    assert values(result, *CALIBRATION) == [pytest.approx(0, abs=1e-6), None] and result["calibration_slope"]["reason"]
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(
    "labels, risks", [([0, 2], [0.1, 0.2]), ([0, 1], [0.1, math.nan]), ([0, 1], [0.1, 1.2]), ([0], [])]
)
def test_impossible_values_are_refused(labels, risks):
    with pytest.raises(ValueError):
        figures(labels, risks)


@pytest.mark.parametrize("deaths", [9, 10])
def test_figures_of_fewer_than_ten_of_an_outcome_are_too_few_to_read(deaths):
    labels = (np.arange(40) < deaths).astype(int)
    assert figures(labels, np.linspace(0, 1, 40))["too_few_to_read"] == (deaths < 10)
    words = "too few to read: 9 stays of one outcome, below 10"
    assert metrics.too_few(labels) == (words if deaths < 10 else "")


def test_figure_in_words_has_its_interval():
    text = lambda low, high: metrics.figure_text({"value": 0.81, "low": low, "high": high})
    assert text(0.7, 0.9) == "0.81 (95 % interval 0.70 to 0.90)" and text(None, None) == "0.81"
    assert text(0.7, None).endswith("to unbounded)")


def test_mean_with_interval_resamples_patients_and_leaves_out_nan():
    found = metrics.mean_with_interval(np.array([2.0, 2, math.nan, 2]), np.array([1, 2, 3, 4]), 50)
    assert list(found.values()) == [2, 2, 2, 3, 3]
    two = metrics.mean_with_interval(np.array([0.0] * 50 + [1.0]), np.array([1] * 50 + [2]), 50)
    assert math.isnan(two["low"])  # two patients: nothing to resample


# ---- Subgroups and clinical use
def test_race_is_grouped_by_its_first_words_and_other_subgroups_come_from_the_columns_of_the_table():
    races = (
        "WHITE - BRAZILIAN; BLACK/CAPE VERDEAN; HISPANIC OR LATINO; HISPANIC/LATINO - CUBAN; ASIAN; UNABLE TO OBTAIN"
    )
    races += "; PATIENT DECLINED TO ANSWER; NATIVE HAWAIIAN OR OTHER PACIFIC ISLANDER"
    groups = "WHITE BLACK HISPANIC HISPANIC ASIAN UNKNOWN UNKNOWN".split()
    found = [metrics.race_group(race) for race in [*races.split("; "), None]]
    assert found == [*groups, "NATIVE HAWAIIAN", "UNKNOWN"]
    columns = {"patient_gender": ["F", None], "patient_age": [44, 80], "patient_race": ["ASIAN - KOREAN", None]}
    stays = pd.DataFrame(columns | {"first_icu_careunit": ["MICU", "SICU"]})
    wanted = [["F", "under 45", "ASIAN", "MICU"], ["Unknown", "80 and over", "UNKNOWN", "SICU"]]
    assert metrics.subgroups_of_stays(stays).values.tolist() == wanted


def test_subgroup_with_few_deaths_says_too_few():
    labels, logits = simulate(300)
    died = np.flatnonzero(labels == 1)
    groups = pd.DataFrame({"sex": np.where(np.isin(np.arange(300), died[:9]), "F", "M")})  # 9 women, all died
    table = metrics.subgroup_table(labels, expit(logits), np.arange(300), groups, n_bootstrap=50).set_index("value")
    women, men, is_man = table.loc["F"], table.loc["M"], groups.sex == "M"
    assert women["too_few_to_read"] and np.isnan(women["auroc"]) and women["stays"] == 9
    assert men["auroc"] == pytest.approx(roc_auc_score(labels[is_man], logits[is_man]))
    assert table.loc["all stays", "deaths"] == labels.sum() and not men["too_few_to_read"]


def test_operating_point_by_hand():
    labels, risks = [1, 1, 1, 1, 1, 0, 0, 0], [0.9, 0.8, 0.7, 0.6, 0.1, 0.65, 0.5, 0.3]
    groups = pd.DataFrame({"sex": list("FFFMMFMM")})
    points = metrics.subgroup_table(labels, risks, np.arange(8), groups, n_bootstrap=50).set_index("value")
    whole, men = points.loc["all stays"], points.loc["M"]
    assert whole["threshold"] == 0.6 and whole["sensitivity"] == 0.8 and whole["specificity"] == pytest.approx(2 / 3)
    assert whole["alarms_per_true_death"] == 5 / 4 and whole["alarms_low"] <= 5 / 4 <= whole["alarms_high"]
    assert (men["alarms"], men["deaths_found"], men["sensitivity"]) == (1, 1, 0.5) and men["too_few_to_read"]
    (row,) = metrics.subgroup_table([0, 0], [0.1, 0.2], [1, 2], pd.DataFrame(index=range(2))).to_dict("records")
    assert math.isnan(row["threshold"]) and row["alarms"] == 0 and math.isnan(row["sensitivity"])  # no death, no point


def test_net_benefit_by_hand_and_its_interval_holds_it_and_narrows_with_patients():
    curve = metrics.decision_curve([1, 0, 0, 1, 0], [0.9, 0.6, 0.1, 0.3, 0.2], [0.5, 0.2])
    assert curve.model.tolist() == pytest.approx([1 / 5 - 1 / 5 * 1, 2 / 5 - 2 / 5 * 0.25])
    assert curve.treat_all.tolist() == pytest.approx([0.4 - 0.6, 0.4 - 0.6 * 0.25])
    assert curve.treat_none.tolist() == [0, 0] and curve.share_treated.tolist() == pytest.approx([0.4, 0.8])
    (labels, logits), widths = simulate(400), []
    for n in (100, 400):
        curve = metrics.decision_curve(labels[:n], expit(logits[:n]), [0.2], patient_ids=np.arange(n), n_bootstrap=300)
        assert curve["low"][0] < curve["model"][0] < curve["high"][0]
        widths.append(curve["high"][0] - curve["low"][0])
    assert 1.5 < widths[0] / widths[1] < 2.7  # sqrt(4) in theory


def test_calibration_table_by_hand():
    table = metrics.calibration_table([0, 0, 1, 1, 1, 1], [0.1, 0.2, 0.3, 0.7, 0.8, 0.9], n_bins=2)
    assert table.n.tolist() == [3, 3] and table.mean_risk.tolist() == pytest.approx([0.2, 0.8])
    assert table.observed_rate.tolist() == pytest.approx([1 / 3, 1])
    assert table.low[1] == pytest.approx(1 / (1 + 1.959964**2 / 3), abs=1e-4)  # Wilson, 3 of 3
    assert len(metrics.calibration_table([0, 1], [0.5, 0.5])) == 1  # all tied: one bin
