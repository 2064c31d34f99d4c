"""The leakage audit: what tells the outcome and should not, columns, counts and texts."""

import numpy as np
import pandas as pd
import pytest
from small_table import LACTATE, MARK, small_table
from test_metrics import CASES

from clinical_lf import audit
from clinical_lf.reading import read_stays
from clinical_lf.tables import EVENT_ARRAYS, LABEL, ReadReport, Split, StayTable

USUAL = {"observation_hours": 0.0, "labels": "", "outcome": "hospital"}
LATE = "events known only after the moment of prediction"
COUNTS = {"event_known_after_prediction": 7, "patient_in_two_parts": 1, "admission_in_two_parts": 0}


def audit_input(n=180):
    """Columns and stays: three columns know the label, three do not."""
    generator, labels = np.random.default_rng(3), (np.arange(n) % 6 == 0).astype(int)
    columns = {
        "copy": labels,
        "where": np.where(labels == 1, "DIED", generator.choice(["HOME", "REHAB"], n)),
        "noise": generator.normal(size=n),
        "unit": generator.choice(list("abcdefgh"), n),
        "number of events": generator.poisson(50, n),
        "both ends": np.where(labels == 1, generator.choice([1, 9], n), generator.uniform(3, 7, n)),
    }
    return pd.DataFrame(columns), pd.DataFrame({LABEL: labels, "patient_id": np.arange(n) // 2 * 2 + labels})


@pytest.mark.parametrize("prospective", [False, True])
def test_audit_flags_what_equals_the_label_and_not_noise_and_late_knowledge_only_in_prospective_mode(prospective):
    audited = audit.leakage_audit(*audit_input(), COUNTS | {"event_after_the_end": 3}, prospective)
    found, rows = audited[audited.kind == "column"].set_index("name"), audited[audited.kind == "count"]
    assert found.index[found.flagged].tolist() == ["copy", "where", "both ends"]
    assert (found.auroc[found.flagged] == 1).all()
    assert found.auroc[["noise", "unit", "number of events"]].between(0.2, 0.8).all()
    assert "AUROC 1.00" in found.reason["where"] and found.reason["noise"] == ""
    assert rows.flagged.tolist() == [prospective, True, False, False] and rows["count"].tolist() == [7, 1, 0, 3]
    assert rows.reason.iloc[0].startswith("Expected") != prospective and rows.reason.iloc[2] == ""
    summary = audit.audit_summary(audited)
    assert "FLAGGED: copy (AUROC 1.00 alone), where" in summary and "1 patients in two parts of the split" in summary


def test_audit_judges_no_column_with_one_death_and_a_constant_alone_has_auroc_one_half():
    stays = pd.DataFrame({LABEL: [1, 0, 0, 0], "patient_id": range(4)})
    found = audit.leakage_audit(pd.DataFrame({"age": [1, 2, 3, 4]}), stays, {}, True)
    assert found.auroc.isna().all() and not found.flagged.any() and "too few" in audit.audit_summary(found)
    labels = np.random.default_rng(0).integers(0, 2, 150)
    folds = audit.patient_folds(labels, np.arange(150))
    for column in (pd.Series(["x"] * 150), pd.Series(np.ones(150)), pd.Series([pd.NA] * 150, dtype="Int64")):
        assert audit.single_column_auroc(column, labels, folds) == 0.5


def test_folds_keep_patients_whole_and_are_no_more_than_the_deaths():
    patients = np.repeat(["c", "a", "d", "b", "e", "f"], 2)
    labels = np.isin(patients, ["a", "b", "c"]).astype(int)
    held_out = [stays for _, stays in audit.patient_folds(labels, patients)]
    assert sorted(np.concatenate(held_out)) == list(range(12)) and len(held_out) == 3
    assert sum(len(set(patients[stays])) for stays in held_out) == 6
    assert [labels[stays].sum() for stays in held_out] == [2, 2, 2]  # one patient who died, two stays, in each


def test_audit_of_a_table_judges_training_stays_and_counts_what_crosses_the_split_and_what_came_late(tmp_path):
    frame, of_stay = small_table(60), np.repeat(np.arange(60), 3)
    frame["icu_length_of_stay_in_days"] = "9"  # far beyond the record of 47 or 48 h
    frame.loc[of_stay == 1, "admission_id"] = frame["admission_id"][0]  # with the other label, too
    frame.loc[of_stay == 50, "patient_id"] = frame["patient_id"][0]
    frame.loc[frame.index % 30 == 2, "event_known_time"] = "2150-03-09 08:00:00"
    frame.loc[(of_stay >= 40) & (frame[LABEL] == "1"), "insurance"] = "None"  # the label, but in other parts only
    table, report = read_stays(frame, tmp_path)
    split = Split(*np.split(np.arange(len(table.stays)), [40, 50]))
    audited = lambda report, **usual: audit.audit_table(table, split, report, USUAL | usual).set_index("name")
    found = {bool(labels): audited(report, labels=labels) for labels in ("", "a file")}
    counts, flagged = found[True]["count"], {flag: set(table.index[table.flagged]) for flag, table in found.items()}
    assert counts["patients in two parts of the split"] == 1 and counts["admissions in two parts of the split"] == 0
    assert counts["admissions with conflicting labels"] == 1 and counts[LATE] == 6
    (recomputed,) = found[True][found[True].index.str.endswith("recomputed")].to_dict("records")
    assert recomputed["count"] == 60 and not recomputed["flagged"]
    assert flagged[True] - flagged[False] == {LATE}
    assert "discharge_location" in flagged[True] and "patient_age" not in flagged[True]
    assert found[True].auroc["insurance"] == 0.5
    assert audited(ReadReport(), observation_hours=2.5)["count"][LATE] > 6  # the third hour's, known at 3.5 h


# ---- Texts
def test_audit_of_texts_flags_an_item_that_only_the_dead_have_and_no_other(tmp_path):
    table, columns = small_table(120), ["stays", "deaths", "auroc", "purity", "median_hours_to_end"]
    table.loc[(table[LABEL] == "1") & (table.index % 3 == 0), "event_text"] = "Discharge: expired"
    texts = audit.audit_texts(read_stays(table, tmp_path)[0]).set_index("text")
    assert texts.index.tolist() == ["Discharge: expired", f"{LACTATE} | Value: # mmol/L | Comment: {MARK}"]
    assert texts.loc["Discharge: expired", columns].tolist() == [60, 60, 1.0, 1.0, 46]
    assert texts["flagged"].tolist() == [True, False] and texts["auroc"].iloc[1] == 0.5


LABELS = np.tile([1.0, 0, 0, 0], 20)


def table_of(events, labels=LABELS, n_each=1):
    """Stays with these labels that have a text each time their number is among its stays: text -> stays."""
    rows = pd.Series(events).explode().sort_values(kind="stable")
    codes, texts = pd.factorize(rows.index)
    offsets = np.searchsorted(rows.to_numpy(int), np.arange(len(labels) + 1))
    arrays = {name: np.zeros(len(rows), kind) for name, kind in EVENT_ARRAYS.items()} | {"text": codes}
    stays = pd.DataFrame({LABEL: labels, "patient_id": np.arange(len(labels)) // n_each})
    return StayTable(stays, offsets, texts=np.array(texts, object), **arrays)


def test_leaking_texts_are_those_of_known_outcome_alone_whatever_common_ones_stand_beside():
    deaths, events = np.flatnonzero(LABELS == 1), {"Procedure: Discharge teaching": np.flatnonzero(LABELS == 0)}
    planted = {"Lab: Sodium": range(80), "Procedure: Comfort measures": [*deaths, *deaths]}
    assert audit.leaking_texts(table_of(planted)) == {"Procedure: Comfort measures": 1.0}
    nine_deaths = table_of(events, np.where(np.arange(80) < 36, LABELS, np.nan))
    assert audit.audit_texts(nine_deaths)[["stays", "deaths"]].iloc[0].tolist() == [27, 0]  # of 36 stays
    assert audit.leaking_texts(nine_deaths) == {"Procedure: Discharge teaching": 1.0}
    assert audit.leaking_texts(table_of(events, np.full(80, np.nan))) == {}


def test_texts_that_come_by_chance_are_no_leaks_however_few_the_deaths():
    generator, n_flagged = np.random.default_rng(0), 0
    for died in np.repeat([2, 5, 18], 20):
        labels = generator.permutation(np.arange(140) < died).astype(float)
        events = {f"Lab: {'x' * n}": generator.permutation(140)[:n] for n in range(1, 101)}
        n_flagged += bool(audit.leaking_texts(table_of(events, labels)))
    assert n_flagged <= 2  # a hundredth of 60, and luck


@pytest.mark.parametrize("n_died, n, first, end, auroc, flagged", CASES["telling"].values(), ids=CASES["telling"])
def test_text_is_flagged_where_its_stays_end_alike_beyond_chance(n_died, n, first, end, auroc, flagged):
    events, labels = {"Lab: Sodium": range(first, end)}, (np.arange(n) < n_died).astype(float)
    text = audit.audit_texts(table_of(events, labels)).iloc[0]
    assert (round(text["auroc"], 3), bool(text["flagged"])) == (auroc, flagged)
    by_patient = audit.audit_texts(table_of(events, labels, n_each=3))["flagged"][0]  # 3 of one patient tell of one
    assert by_patient == (flagged and end - first > 3)
