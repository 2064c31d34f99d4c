"""Figures of held-out predictions and their intervals, subgroups and operating point, decision curve, calibration."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import brentq
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


@pytest.mark.parametrize("decimals", [1, 8])  # with many ties and with none
def test_figures_equal_scikit_learn(decimals):
    labels, logits = simulate(200)
    risks, names = expit(logits).round(decimals), ("auroc", "auprc", "brier")
    result, theirs = figures(labels, risks), (roc_auc_score, average_precision_score, brier_score_loss)
    assert values(result, *names) == pytest.approx([function(labels, risks) for function in theirs])
    assert [result[name]["low"] for name in names[1:]] == [None] * 2


def test_calibration_of_calibrated_predictions_is_zero_and_one_and_shown_by_many_stays_alone():
    labels, logits = simulate(20_000)
    result = figures(labels, expit(logits), 50)
    assert values(result, *CALIBRATION, "ici") == pytest.approx([0, 1, 0], abs=0.06)
    assert result["calibration_slope"]["low"] < 1 < result["calibration_slope"]["high"] and result["ici"]["low"] == 0
    assert metrics.is_shown_calibrated(result)
    for part in (slice(200), slice(5)):  # too few to show it, and one outcome
        assert not metrics.is_shown_calibrated(figures(labels[part], expit(logits[part]), 200))
    too_extreme, shifted = (figures(labels, expit(z), 50) for z in (2 * logits, logits + 0.5))
    assert not metrics.is_shown_calibrated(too_extreme) and not metrics.is_shown_calibrated(shifted)
    assert too_extreme["ici"]["value"] == pytest.approx(np.abs(expit(2 * logits) - expit(logits)).mean(), abs=0.01)


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
    result = figures(labels, expit(logits), 2000)
    for name, score, width in (("auroc", roc_auc_score, 0.015), ("auprc", average_precision_score, 0.03)):
        loop = [score(labels[rows], logits[rows]) for rows in drawn]
        bounds = [result[name]["low"], result[name]["high"]]
        assert bounds == pytest.approx(list(np.quantile(loop, [0.025, 0.975])), abs=width)


def score_bound(auroc, m, n):
    """The lower bound of Newcombe's method 5, by its equation."""
    theirs = lambda t: 1 + (m + n - 2) / 2 * ((1 - t) / (2 - t) + t / (1 + t))
    return brentq(lambda t: (auroc - t) ** 2 - 1.96**2 * t * (1 - t) * theirs(t) / (m * n), 1e-6, auroc - 1e-6)


STATES = {  # deaths and survivors by rising risk
    "few": "000111",
    "shown": "0" * 12 + "1" * 10,
    "reversed": "1" * 10 + "0" * 12,
    "not shown": "01" * 12,
    "one outcome": "0" * 12,
}


@pytest.mark.parametrize("state", STATES)
def test_model_is_shown_to_discriminate_not_shown_or_ranks_in_reverse(state):
    labels = np.array(list(STATES[state])).astype(int)
    result = figures(labels, np.linspace(0.1, 0.9, len(labels)), 200)
    assert metrics.discrimination(result) == state and result["too_few_to_read"] == (state in ("few", "one outcome"))
    words = f"too few to read: {metrics.fewest(labels)} stays of one outcome, below 10"
    assert metrics.too_few(labels) == (words if result["too_few_to_read"] else "")
    if state in ("few", "shown"):  # separated: no resample has a pair out of order, yet nothing is certain
        counts = int(labels.sum()), int((1 - labels).sum())
        assert result["auroc"]["low"] == pytest.approx(score_bound(1.0, *counts), abs=1e-3)
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
    assert values(result, *CALIBRATION) == [pytest.approx(0, abs=1e-6), None] and result["calibration_slope"]["reason"]
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(
    "labels, risks", [([0, 2], [0.1, 0.2]), ([0, 1], [0.1, math.nan]), ([0, 1], [0.1, 1.2]), ([0], [])]
)
def test_impossible_values_are_refused(labels, risks):
    with pytest.raises(ValueError):
        figures(labels, risks)


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


def test_subgroup_has_figures_with_twenty_of_either_outcome_and_never_less_than_ten_patients():
    labels, logits = simulate(300)
    died, stays = np.flatnonzero(labels == 1), np.arange(300)
    few = np.where(np.isin(stays, died[:19]), "19 died", "others")
    unit = np.where(stays < 3, "A", np.where(stays < 9, "B", np.where(stays < 20, "C", "D")))
    groups = pd.DataFrame({"sex": few, "unit": unit})
    limits = metrics.thresholds_of(labels, expit(logits))
    table = metrics.subgroup_table((labels, expit(logits), stays), groups, limits, n_bootstrap=50).set_index("value")
    dead, others, is_other = table.loc["19 died"], table.loc["others"], few == "others"
    assert dead["too_few_to_read"] and dead["sensitivity":].isna().all() and (dead["stays"], dead["deaths"]) == (19, 19)
    assert others["auroc"] == pytest.approx(roc_auc_score(labels[is_other], logits[is_other]))
    assert table.loc["all stays", "deaths"] == labels.sum() and not others["too_few_to_read"]
    assert table["patients"][table["group"] == "unit"].to_dict() == {"A or B or C": 20, "D": 280}
    one = metrics.subgroup_table((labels[:9], expit(logits[:9]), stays[:9]), groups[:9], limits, n_bootstrap=0)
    assert one["value"].tolist() == ["all stays", "19 died or others", "A or B"]


def test_operating_point_by_hand():
    labels, risks = np.array([1, 1, 1, 1, 1, 0, 0, 0]), np.array([0.9, 0.8, 0.7, 0.60009, 0.1, 0.65, 0.5, 0.3])
    limits = metrics.thresholds_of(labels, risks)
    assert limits == {"alarm": 0.6, "died_from": 0.0, "survived_to": 1.0}  # so few exclude no outcome
    columns = (labels, risks, np.arange(8))
    (whole,) = metrics.subgroup_table(columns, pd.DataFrame(index=range(8)), limits, n_bootstrap=50).to_dict("records")
    assert whole["threshold"] == 0.6 and whole["sensitivity"] == 0.8 and whole["specificity"] == pytest.approx(2 / 3)
    assert whole["alarms_per_true_death"] == 5 / 4 and whole["alarms_low"] <= 5 / 4 <= whole["alarms_high"]
    assert (whole["alarms"], whole["deaths_found"], whole["both_possible"]) == (5, 4, 8)
    assert math.isnan(metrics.thresholds_of([0, 0], [0.1, 0.2])["alarm"])  # no death, no point


@pytest.mark.parametrize("n", [12, 60, 400])
def test_conformal_sets_are_those_of_p_values_and_hold_nine_of_ten_of_either_outcome(n):
    labels, logits = simulate(60 * n)
    held: tuple[list, list] = [], []
    for part in np.split(np.arange(60 * n), 60):
        died, risks, new = labels[part], expit(logits[part]).round(3), slice(n // 2, n)
        possible = metrics.possible_outcomes(risks[new], metrics.thresholds_of(died[: n // 2], risks[: n // 2]))
        for outcome, unlike in ((0, risks), (1, 1 - risks)):
            before = unlike[: n // 2][died[: n // 2] == outcome]
            p_values = (1 + (before >= unlike[new, None] - 1e-9).sum(1)) / (1 + len(before))
            assert (possible[:, outcome] == (p_values > 0.1)).all()
            held[outcome].extend(possible[died[new] == outcome, outcome])
    assert all(0.89 < np.mean(of_outcome) <= (0.93 if n == 400 else 1) for of_outcome in held)


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
