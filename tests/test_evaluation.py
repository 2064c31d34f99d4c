"""Figures of held-out predictions, subgroups, decision curve, calibration, temperature and the leakage audit."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score
from small_table import small_table

import train


def simulate(n, seed=0, mean=-1.0, spread=1.5):
    """Labels drawn from the very risks: perfectly calibrated."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(mean, spread, n)
    return (generator.random(n) < expit(logits)).astype(int), logits


def test_auroc_of_a_hand_example():
    result = train.evaluate_predictions([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8], [1, 2, 3, 4], n_bootstrap=50)
    assert result["auroc"]["value"] == pytest.approx(0.75)  # 3 of 4 pairs in order
    assert result["auprc"]["value"] == pytest.approx((1 + 2 / 3) / 2)
    assert result["brier"]["value"] == pytest.approx((0.01 + 0.16 + 0.65**2 + 0.04) / 4)
    assert (result["n_stays"], result["n_patients"], result["n_deaths"], result["prevalence"]) == (4, 4, 2, 0.5)


@pytest.mark.parametrize("decimals", [1, 8])  # with many ties and with none
def test_figures_equal_scikit_learn(decimals):
    labels, logits = simulate(200)
    risks = expit(logits).round(decimals)
    result = train.evaluate_predictions(labels, risks, np.arange(200), n_bootstrap=0)
    for name, function in (("auroc", roc_auc_score), ("auprc", average_precision_score), ("brier", brier_score_loss)):
        assert result[name]["value"] == pytest.approx(function(labels, risks))
        assert result[name]["low"] is None


def test_calibration_of_calibrated_predictions_is_zero_and_one():
    labels, logits = simulate(20_000)
    result = train.evaluate_predictions(labels, expit(logits), np.arange(20_000), n_bootstrap=50)
    assert result["calibration_intercept"]["value"] == pytest.approx(0, abs=0.06)
    assert result["calibration_slope"]["value"] == pytest.approx(1, abs=0.06)
    assert result["calibration_slope"]["low"] < 1 < result["calibration_slope"]["high"]


def test_slope_is_halved_by_doubled_logits_and_intercept_shifted_by_an_added_constant():
    labels, logits = simulate(2000)
    slope, doubled, shifted = (
        train.evaluate_predictions(labels, expit(z), np.arange(2000), n_bootstrap=0)
        for z in (logits, 2 * logits, logits + 1)
    )
    assert doubled["calibration_slope"]["value"] == pytest.approx(slope["calibration_slope"]["value"] / 2, abs=1e-4)
    difference = shifted["calibration_intercept"]["value"] - slope["calibration_intercept"]["value"]
    assert difference == pytest.approx(-1, abs=1e-6)


def test_calibration_fit_solves_the_score_equations_even_from_far():
    labels, logits = simulate(500)
    result = train.evaluate_predictions(labels, expit(logits * 6 - 8), np.arange(500), n_bootstrap=0)
    clipped = (logits * 6 - 8).clip(-16.12, 16.12)  # probabilities are kept 1e-7 from 0 and 1
    assert expit(result["calibration_intercept"]["value"] + clipped).mean() == pytest.approx(labels.mean(), abs=1e-4)


def test_interval_widens_when_patients_repeat_stays():
    labels, logits = simulate(100)
    labels, risks = np.repeat(labels, 4), np.repeat(expit(logits), 4)
    by_patient, by_stay = (
        train.evaluate_predictions(labels, risks, ids, n_bootstrap=500)["auroc"]
        for ids in (np.repeat(np.arange(100), 4), np.arange(400))
    )
    ratio = (by_patient["high"] - by_patient["low"]) / (by_stay["high"] - by_stay["low"])
    assert by_patient["value"] == by_stay["value"] and 1.6 < ratio < 2.4  # sqrt(4) in theory


def test_interval_is_that_of_a_plain_bootstrap_loop():
    labels, logits = simulate(300)
    generator, loop = np.random.default_rng(1), []
    for _ in range(500):
        rows = generator.integers(0, 300, 300)
        loop.append(roc_auc_score(labels[rows], logits[rows]))
    figure = train.evaluate_predictions(labels, expit(logits), np.arange(300), n_bootstrap=2000)["auroc"]
    assert [figure["low"], figure["high"]] == pytest.approx(list(np.quantile(loop, [0.025, 0.975])), abs=0.015)


def test_single_class_gives_none_with_a_reason_and_is_json():
    result = json.loads(json.dumps(train.evaluate_predictions([0, 0, 0], [0.1, 0.2, 0.3], [1, 2, 3], n_bootstrap=20)))
    assert result["auroc"]["value"] is None and "both outcomes" in result["auroc"]["reason"]
    assert result["brier"]["value"] == pytest.approx((0.01 + 0.04 + 0.09) / 3)
    assert result["n_resamples_skipped"] == 20
    empty = train.evaluate_predictions([], [], [])
    assert empty["n_stays"] == 0 and empty["prevalence"] is None and empty["brier"]["value"] is None


def test_resamples_without_a_death_are_skipped_and_counted():
    labels, risks = np.r_[np.zeros(29), 1], np.linspace(0.1, 0.9, 30)
    result = train.evaluate_predictions(labels, risks, np.arange(30), n_bootstrap=1000)
    assert 300 < result["n_resamples_skipped"] < 430  # (29 / 30) ** 30 = 0.36


def test_separated_outcomes_have_no_slope():
    result = train.evaluate_predictions([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9], [1, 2, 3, 4], n_bootstrap=50)
    assert result["calibration_slope"]["value"] is None and result["calibration_slope"]["reason"]
    assert result["calibration_intercept"]["value"] == pytest.approx(0, abs=1e-6)
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(
    "labels, risks", [([0, 2], [0.1, 0.2]), ([0, 1], [0.1, np.nan]), ([0, 1], [0.1, 1.2]), ([0], [])]
)
def test_impossible_values_are_refused(labels, risks):
    with pytest.raises(ValueError):
        train.evaluate_predictions(labels, risks, np.arange(len(labels)))


def test_race_is_grouped_by_its_first_words():
    races = [
        "WHITE - BRAZILIAN",
        "BLACK/CAPE VERDEAN",
        "HISPANIC OR LATINO",
        "HISPANIC/LATINO - CUBAN",
        "ASIAN",
        "NATIVE HAWAIIAN OR OTHER PACIFIC ISLANDER",
        "UNABLE TO OBTAIN",
        "PATIENT DECLINED TO ANSWER",
        None,
    ]
    assert [train.race_group(race) for race in races] == [
        "WHITE",
        "BLACK",
        "HISPANIC",
        "HISPANIC",
        "ASIAN",
        "NATIVE HAWAIIAN",
        "UNKNOWN",
        "UNKNOWN",
        "UNKNOWN",
    ]


def test_subgroups_come_from_the_columns_of_the_table():
    stays = pd.DataFrame(
        {
            "patient_gender": ["F", None],
            "patient_age": [44, 80],
            "patient_race": ["ASIAN - KOREAN", None],
            "first_icu_careunit": ["MICU", "SICU"],
        }
    )
    assert train.subgroups_of_stays(stays).values.tolist() == [
        ["F", "under 45", "ASIAN", "MICU"],
        ["Unknown", "80 and over", "UNKNOWN", "SICU"],
    ]


def test_subgroup_with_few_deaths_says_too_few():
    labels, logits = simulate(300)
    died = np.flatnonzero(labels == 1)
    groups = pd.DataFrame({"sex": np.where(np.isin(np.arange(300), died[:9]), "F", "M")})  # 9 women, all died
    table = train.subgroup_table(labels, expit(logits), np.arange(300), groups, n_bootstrap=50).set_index("value")
    assert (
        table.loc["F", "note"].endswith("below 10")
        and np.isnan(table.loc["F", "auroc"])
        and table.loc["F", "stays"] == 9
    )
    men = groups.sex == "M"
    assert table.loc["M", "auroc"] == pytest.approx(roc_auc_score(labels[men], logits[men]))
    assert table.loc["all stays", "deaths"] == labels.sum() and table.loc["M", "note"] == ""


def test_net_benefit_by_hand():
    curve = train.decision_curve([1, 0, 0, 1, 0], [0.9, 0.6, 0.1, 0.3, 0.2], [0.5, 0.2])
    assert curve.model.tolist() == pytest.approx([1 / 5 - 1 / 5 * 1, 2 / 5 - 2 / 5 * 0.25])
    assert curve.treat_all.tolist() == pytest.approx([0.4 - 0.6, 0.4 - 0.6 * 0.25])
    assert curve.treat_none.tolist() == [0, 0] and curve.share_treated.tolist() == pytest.approx([0.4, 0.8])


def test_net_benefit_interval_holds_the_value_and_narrows_with_patients():
    labels, logits = simulate(400)
    widths = []
    for n in (100, 400):
        curve = train.decision_curve(labels[:n], expit(logits[:n]), [0.2], np.arange(n), n_bootstrap=300)
        assert curve["low"][0] < curve["model"][0] < curve["high"][0]
        widths.append(curve["high"][0] - curve["low"][0])
    assert 1.5 < widths[0] / widths[1] < 2.7  # sqrt(4) in theory


def test_operating_point_by_hand():
    labels = [1, 1, 1, 1, 1, 0, 0, 0]
    risks = [0.9, 0.8, 0.7, 0.6, 0.1, 0.65, 0.5, 0.3]
    groups = pd.DataFrame({"sex": list("FFFMMFMM")})
    points = train.operating_points(labels, risks, np.arange(8), groups, n_bootstrap=50).set_index("value")
    whole, men = points.loc["all stays"], points.loc["M"]
    assert whole["threshold"] == 0.6 and whole["sensitivity"] == 0.8 and whole["specificity"] == pytest.approx(2 / 3)
    assert whole["alarms_per_true_death"] == pytest.approx(5 / 4) and whole["low"] <= 5 / 4 <= whole["high"]
    assert (men["alarms"], men["deaths_found"], men["sensitivity"]) == (1, 1, 0.5) and "too few" in men["note"]


def test_operating_point_without_deaths_is_an_empty_table():
    assert train.operating_points([0, 0], [0.1, 0.2], [1, 2], pd.DataFrame(index=range(2))).empty


@pytest.mark.parametrize("deaths, note", [(9, "too few to read: 9 stays of one outcome, below 10"), (10, "")])
def test_figures_of_fewer_than_ten_of_an_outcome_are_too_few_to_read(deaths, note):
    labels = (np.arange(40) < deaths).astype(int)
    assert train.evaluate_predictions(labels, np.linspace(0, 1, 40), np.arange(40), n_bootstrap=0)["note"] == note


def test_calibration_table_by_hand():
    table = train.calibration_table([0, 0, 1, 1, 1, 1], [0.1, 0.2, 0.3, 0.7, 0.8, 0.9], n_bins=2)
    assert table.n.tolist() == [3, 3] and table.mean_risk.tolist() == pytest.approx([0.2, 0.8])
    assert table.observed_rate.tolist() == pytest.approx([1 / 3, 1])
    z2 = 1.959964**2
    assert table.low[1] == pytest.approx(1 / (1 + z2 / 3), abs=1e-4)  # Wilson, 3 of 3
    assert len(train.calibration_table([0, 1], [0.5, 0.5])) == 1  # all tied: one bin


def test_temperature_recovers_doubled_logits():
    labels, logits = simulate(50_000)
    once = train.fit_temperature(logits, labels)
    assert once == pytest.approx(1, abs=0.05)
    assert train.fit_temperature(2 * logits, labels) == pytest.approx(2 * once, rel=1e-4)


@pytest.mark.parametrize(
    "logits, labels", [([-1.0, 2.0], [0, 1]), ([1.0, -2.0], [0, 1]), ([1.0, 2.0], [1, 1]), ([], [])]
)
def test_temperature_is_one_where_the_data_set_none(logits, labels):
    assert train.fit_temperature(logits, labels) == 1.0


def audit_input(n=240):
    generator = np.random.default_rng(3)
    labels = (np.arange(n) % 6 == 0).astype(int)
    home = generator.choice(["HOME", "REHAB"], n)
    stays = pd.DataFrame(
        {
            "copy": labels,
            "where": np.where(labels == 1, "DIED", home),
            "noise": generator.normal(size=n),
            "unit": generator.choice(list("abcdefgh"), n),
            "death_time": pd.Series(pd.NaT, range(n)).mask(labels == 1, pd.Timestamp("2150-01-01")),
        }
    )
    both_ends = np.where(labels == 1, generator.choice([1, 9], n), generator.uniform(3, 7, n))
    per_stay = pd.DataFrame({"number of events": generator.poisson(50, n), "both ends": both_ends})
    return stays, per_stay, labels, np.arange(n) // 2 * 2 + labels, np.repeat(["train", "test"], [n * 3 // 4, n // 4])


def test_audit_flags_what_equals_the_label_and_not_noise():
    audit = train.leakage_audit(*audit_input(), counts={"events after the final event": 0}).set_index("name")
    assert audit.index[audit.flagged].tolist() == ["copy", "where", "death_time", "both ends"]
    assert (audit.auroc[audit.flagged] == 1).all()
    assert audit.auroc[["noise", "unit", "number of events"]].between(0.2, 0.8).all()
    assert "AUROC 1.00" in audit.reason["where"] and audit.reason["noise"] == ""
    assert "FLAGGED: copy (AUROC 1.00 alone), where" in train.audit_summary(audit.reset_index())


def test_audit_looks_at_training_patients_only():
    stays, per_stay, labels, patients, split = audit_input()
    stays["copy"] = np.where(split == "train", 0, labels)  # the label, but in the test split only
    audit = train.leakage_audit(stays, per_stay, labels, patients, split, counts={}).set_index("name")
    assert audit.auroc["copy"] == 0.5 and not audit.flagged["copy"]


@pytest.mark.parametrize("prospective", [False, True])
def test_audit_counts_late_knowledge_but_flags_it_only_in_prospective_mode(prospective):
    stays, per_stay, labels, patients, split = audit_input()
    counts = {train.KNOWN_LATER: 7, "patients in two splits": 1, "admissions in two splits": 0}
    audit = train.leakage_audit(stays[["noise"]], per_stay[[]], labels, patients, split, counts, prospective)
    audit = audit.set_index("name")
    assert audit.flagged[list(counts)].tolist() == [prospective, True, False]
    assert audit["count"][train.KNOWN_LATER] == 7 and audit.reason[train.KNOWN_LATER]
    assert "1 patients in two splits" in train.audit_summary(audit.reset_index())


def test_audit_judges_no_column_with_one_death():
    labels, table = np.array([1, 0, 0, 0]), pd.DataFrame({"age": [1, 2, 3, 4]})
    audit = train.leakage_audit(table, table, labels, np.arange(4), np.repeat("train", 4), counts={})
    assert audit.auroc.isna().all() and not audit.flagged.any() and "too few" in train.audit_summary(audit)


def test_constant_column_alone_has_auroc_one_half():
    labels = simulate(150)[0]
    folds = train.patient_folds(labels, np.arange(150))
    for column in (pd.Series(["x"] * 150), pd.Series(np.ones(150)), pd.Series([pd.NA] * 150, dtype="Int64")):
        assert train.single_column_auroc(column, labels, folds) == 0.5


def test_folds_keep_patients_whole_and_are_no_more_than_the_deaths():
    patients = np.repeat(["c", "a", "d", "b", "e", "f"], 2)
    labels = np.isin(patients, ["a", "b", "c"]).astype(int)
    held_out = [stays for _, stays in train.patient_folds(labels, patients)]
    assert sorted(np.concatenate(held_out)) == list(range(12)) and len(held_out) == 3
    assert sum(len(set(patients[stays])) for stays in held_out) == 6
    assert [labels[stays].sum() for stays in held_out] == [2, 2, 2]  # one patient who died, two stays, in each


def test_split_counts_name_what_crosses():
    counts = train.split_counts([1, 1, 2, 3], [10, 11, 20, 20], ["train", "test", "train", "train"])
    assert counts == {"patients in two splits": 1, "admissions in two splits": 0}


def test_recalibration_undoes_a_wrong_intercept_and_slope():
    rng = np.random.default_rng(0)
    logits = rng.normal(-1, 1.5, 4000)
    labels = (rng.random(4000) < 1 / (1 + np.exp(-logits))).astype(float)
    wrong = 1 / (1 + np.exp(-(2 * logits + 1)))
    risks = train.recalibrated(labels, wrong, np.arange(4000))
    figures = train.evaluate_predictions(labels, risks, np.arange(4000), n_bootstrap=0)
    assert figures["calibration_slope"]["value"] == pytest.approx(1, abs=0.02)
    assert figures["calibration_intercept"]["value"] == pytest.approx(0, abs=0.02)


def test_recalibration_on_too_few_deaths_is_left_out():
    assert train.recalibrated([1.0] * 9 + [0.0] * 90, np.linspace(0.1, 0.9, 99), np.arange(99)) is None


def test_audit_of_texts_flags_an_item_that_only_the_dead_have_and_no_other(tmp_path):
    table = small_table(120)
    died = table[train.LABEL] == "1"
    first = table.index % 3 == 0
    table.loc[died & first, "event_text"] = "Discharge: expired"
    table.loc[first & ~died, "event_text"] = [f"Lab: Sodium | Value: {i}" for i in range(60)]
    table.loc[table.index % 3 == 1, "event_text"] = "Prescription: Heparin | Dose: 5000 UNIT"
    table.to_csv(tmp_path / "data.csv", index=False)
    texts = train.audit_texts(train.read_stays(tmp_path / "data.csv")[0]).set_index("item")
    assert texts.index[texts.flagged].tolist() == ["Discharge: expired", "Lab: Sodium | Value: #"]
    assert texts.loc["Discharge: expired", ["stays", "deaths", "auroc", "purity"]].tolist() == [60, 60, 1.0, 1.0]
    assert texts.loc["Discharge: expired", "median_hours_to_end"] == 46
    assert texts.loc["Prescription: Heparin | Dose: # UNIT", "auroc"] == 0.5
