"""The synthetic sample: committed file, format, realism, and the truth it plants."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from make_sample import CAUSAL_ROLES, TABLE_COLUMNS, magnitude_level, make_sample, write_csv
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

COMMITTED = Path(__file__).resolve().parent.parent / "sample_train.csv"


@pytest.fixture(scope="module")
def sample():
    return make_sample()


@pytest.fixture(scope="module")
def large():
    return make_sample(2000, seed=1)


per_stay = lambda sample: sample.table.drop_duplicates("icu_stay_id").reset_index(drop=True)


def test_committed_file_is_what_the_generator_makes_each_time_and_another_seed_makes_another(sample, tmp_path):
    write_csv(sample, tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == COMMITTED.read_bytes()
    assert COMMITTED.stat().st_size <= 6e6
    assert make_sample().table.equals(sample.table)
    assert not make_sample(seed=1).table["event_text"].equals(sample.table["event_text"])


def test_size_prevalence_shares_of_event_types_and_holes_are_as_documented(sample):
    stays, text = per_stay(sample), sample.table["event_text"]
    assert tuple(sample.table.columns) == tuple(TABLE_COLUMNS)
    assert len(stays) == 300 and 210 <= stays["patient_id"].nunique() <= 230
    assert sample.table.groupby("icu_stay_id").size().between(20, 200).all()
    assert 0.15 <= stays["patient_expired_in_hospital"].mean() <= 0.25
    assert stays["patient_id"].value_counts().max() == 2
    share = sample.table["event_type"].value_counts(normalize=True)
    assert set(share.index) == {"prescription", "procedure_event", "labevent", "microbiology", "ingredient"}
    assert 0.45 < share["labevent"] < 0.58 and 0.25 < share["ingredient"] < 0.36 and share.min() > 0.02
    assert sample.table["marital_status"].isna().any()
    assert text.str.fullmatch(r"Microbiology: .*Comment: NO GROWTH\.").any()
    assert text.str.fullmatch(r"Lab: Anisocytosis \(Blood, Hematology\) \| Comment: OCCASIONAL\.").any()
    assert text.nunique() < 0.2 * len(text)


def test_events_lie_inside_the_stay_count_down_to_its_end_and_are_known_as_their_type_says(large):
    table = large.table
    final = table[["icu_outtime", "patient_death_time"]].min(axis=1)
    assert (table["event_time"] >= table["icu_intime"]).all() and (table["event_time"] <= final).all()
    minutes = (final - table["event_time"]).dt.total_seconds() / 60
    assert (minutes == table["relative_time_to_final_event"]).all()
    assert (table["event_known_time"].dropna() >= table["event_time"][table["event_known_time"].notna()]).all()
    assert table.groupby("icu_stay_id")["event_time"].is_monotonic_increasing.all()
    delay = (table["event_known_time"] - table["event_time"]).dt.total_seconds() / 3600
    by_type = delay.groupby(table["event_type"]).agg(["min", "max", "count", "size"])
    assert by_type.loc["labevent", ["min", "max"]].tolist() == [0.5, 3.0]
    assert by_type.loc["microbiology", "min"] >= 24 and by_type.loc["microbiology", "max"] <= 72
    assert by_type.loc["prescription", "max"] == 0
    assert (by_type["count"] < by_type["size"])[["labevent", "microbiology"]].all()


def test_stays_of_one_patient_are_consistent_and_no_one_returns_from_death(large):
    stays = per_stay(large).sort_values(["patient_id", "icu_intime"])
    fixed = ["patient_gender", "patient_race", "patient_age"]
    assert (stays.groupby("patient_id")[fixed].nunique() == 1).all(axis=None)
    assert (stays.groupby("admission_id")["patient_expired_in_hospital"].nunique() == 1).all()
    assert stays["admission_id"].nunique() < len(stays) and stays["icu_stay_id"].is_unique
    died = stays["patient_expired_in_hospital"] == 1
    assert ((stays["discharge_location"] == "DIED") == died).all()
    assert (stays["patient_death_time"].notna() == died).all()
    assert 0.25 < (stays["patient_death_time"] > stays["icu_outtime"])[died].mean() < 0.65
    again = stays["patient_id"].eq(stays["patient_id"].shift(-1))
    next_start = stays["icu_intime"].shift(-1)[again]
    assert (next_start > stays["icu_outtime"][again]).all()
    assert not (next_start > stays["patient_death_time"][again]).any()
    assert 0.2 * len(stays) < again.sum() < 0.3 * len(stays)


def test_true_effects_are_those_of_causal_roles_and_sum_with_age_and_intercept_to_the_logit(large):
    effects = large.events.groupby("icu_stay_id")["true_effect"].sum().reindex(large.stays["icu_stay_id"]).to_numpy()
    logit = large.intercept + large.stays["age_effect"] + effects
    np.testing.assert_allclose(logit, large.stays["true_logit"], atol=1e-9)
    np.testing.assert_allclose(1 / (1 + np.exp(-logit)), large.stays["true_risk"], atol=1e-12)
    assert large.events["icu_stay_id"].equals(large.table["icu_stay_id"])
    causal = large.events["role"].isin(CAUSAL_ROLES)
    assert ((large.events["true_effect"] != 0) == causal).all()
    assert 0.05 <= causal.mean() <= 0.15
    assert 0.23 <= (large.events["role"] == "decoy").mean() <= 0.27


def test_lactate_counts_by_its_number_and_only_late_and_effects_of_groups_sum_to_the_group(large):
    lactate = large.table[large.events["kind"] == "lactate"]
    value = lactate["event_text"].str.extract(r"Value: ([\d.]+) mmol/L")[0].astype(float)
    late = lactate["relative_time_to_final_event"] <= 24 * 60
    effect = large.events.loc[lactate.index, "true_effect"]
    np.testing.assert_allclose(effect, np.where(late, 2.5 + 1.7 * np.log2(value / 4), 0), atol=1e-9)
    groups = large.events[large.events["group"] != ""].groupby(["kind", "group"])["true_effect"].agg(["sum", "size"])
    np.testing.assert_allclose(groups.loc["airway", "sum"], 4.4)
    np.testing.assert_allclose(groups.loc["liver", "sum"], 6.8)
    assert set(groups.loc["airway", "size"]) == {1, 2} and set(groups.loc["liver", "size"]) == {2}


def test_effect_scale_scales_the_true_logit_and_nothing_else():
    full, half = make_sample(60, seed=2), make_sample(60, seed=2, effect_scale=0.5)
    assert half.table["event_text"].equals(full.table["event_text"]) and half.intercept == full.intercept / 2
    np.testing.assert_allclose(half.events["true_effect"], full.events["true_effect"] / 2)
    np.testing.assert_allclose(half.stays["true_logit"], full.stays["true_logit"] / 2)


def test_what_is_no_cause_does_not_tell_the_label_and_counts_of_causes_reach_the_best_auroc(large):
    label = large.stays["label"]
    size = large.table.groupby("icu_stay_id").size().to_numpy()
    decoys = (large.events["role"] == "decoy").groupby(large.events["icu_stay_id"]).sum().to_numpy()
    days = per_stay(large)["icu_length_of_stay_in_days"]
    for name, score in (("events", size), ("decoys", decoys), ("length of stay", days)):
        assert abs(roc_auc_score(label, score) - 0.5) < 0.06, name
    events = large.events.assign(kind=large.events["kind"].where(large.events["role"].isin(CAUSAL_ROLES), "none"))
    counts = pd.crosstab(events["icu_stay_id"], events["kind"]).drop(columns="none").clip(upper=2)
    features, half = np.column_stack([counts, large.stays["age_effect"]]), len(counts) // 2
    model = LogisticRegression(C=10, max_iter=500).fit(features[:half], label[:half])
    reached = roc_auc_score(label[half:], model.decision_function(features[half:]))
    best = roc_auc_score(label[half:], large.stays["true_risk"][half:])
    assert best > 0.92 and (reached - 0.5) / (best - 0.5) > 0.95


LEVELS = {0.9: "far below", 1.5: "below", 1.9: "slightly below", 2: "within", 4: "within"}
LEVELS |= {4.5: "slightly above", 5.5: "above", 8.5: "far above"}


@pytest.mark.parametrize("value", LEVELS)
def test_magnitude_level_of_a_range_from_2_to_4(value):
    assert magnitude_level(value, 2, 4) == f"{LEVELS[value]} range"


def test_too_few_stays_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="n_stays is 3"):
        make_sample(3)
