"""What the tables of many stays add up to: correlations, means, shares of windows, items, organ systems."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from make_sample import make_sample
from scipy.stats import spearmanr

from clinical_lf import findings
from clinical_lf.items import read_text

CASES = yaml.safe_load(Path(__file__).with_name("explain_cases.yaml").read_text("utf-8"))
WINDOWS = ("last 6 h", "6 to 12 h", "12 to 24 h", "24 to 48 h", "48 to 96 h", "more than 96 h")


def test_rank_correlation_equals_scipy_and_is_missing_for_a_constant():
    first, second = np.array([[1.0, 5, 2, 2], [1, 1, 1, 1]]), np.array([[3.0, 9, 1, 4]])
    found = findings.rank_correlation(first, second)
    assert found[0, 0] == pytest.approx(spearmanr(first[0], second[0])[0]) and np.isnan(found[1, 0])


def test_means_by_weighs_rows_equally_and_bounds_the_mean():
    table = pd.DataFrame({"patient_id": [1, 1, 2, 3, 4], "kind": list("aaaab"), "size": [1.0, 2, 3, 6, 5]})
    found = findings.means_by(table, "kind", "size")
    assert found["mean"].to_dict() == {"a": 3.0, "b": 5.0} and found.n_patients.to_dict() == {"a": 3, "b": 1}
    assert found.low["a"] < 3 < found.high["a"] and np.isnan(found.low["b"])


def test_clock_windows_are_closed_at_their_far_end():
    """A model at 24 h has no event more than 24 h before its end."""
    edges = {0: 0, 6: 0, 6.01: 1, 12: 1, 12.01: 2, 24: 2, 24.01: 3, 48: 3, 48.01: 4, 96: 4, 96.01: 5, 4000: 5, -0.1: 0}
    found = findings.clock_window(np.array([*edges]))
    assert found.codes.tolist() == [*edges.values()] and tuple(found.categories) == WINDOWS and found.ordered


# ---- Items
def events_of(values, pushes, item="Lab: Lactate (Blood, Blood Gas)"):
    table = {"icu_stay_id": 1, "patient_id": range(len(values)), "item": item, "value": values, "attribution": pushes}
    return pd.DataFrame(table | {"if_typical": pushes, "tells_outcome": False, "is_static": False})


@pytest.mark.parametrize("pushes, words", CASES["items"])
def test_items_have_a_direction_only_beyond_the_floor_and_where_an_interval_excludes_zero(pushes, words):
    others, n = events_of(np.full(1200, np.nan), 0.0, "Lab: Other").assign(patient_id=np.arange(1200) % 12), len(pushes)
    row, _ = findings.item_table(pd.concat([events_of(np.arange(n), np.array(pushes)), others])).to_dict("records")
    assert words in row["sentence"] and row["n_events"] == n
    assert row["is_finding"] == (row["kind"] not in ("small", "either"))
    assert row["size"] == pytest.approx(np.abs(pushes).mean())


def test_an_item_that_pushes_as_all_events_do_is_no_finding():
    """Where pushes count from far below all stays, every event pushes towards death."""
    alike, more = (events_of(np.full(12, np.nan), push, item) for item, push in (("Lab: Sodium", 0.2), ("Lab: B", 0.4)))
    table = findings.item_table(pd.concat([alike, more, *[alike] * 20])).set_index("item")
    assert table["is_finding"].to_dict() == {"Lab: Sodium": False, "Lab: B": True}
    assert "+0.19 [+0.19, +0.19] against the average event" in table.loc["Lab: B", "sentence"]


def test_rank_correlation_of_an_item_equals_scipy_and_its_interval_is_over_patients():
    part = events_of(np.arange(40.0), np.arange(40) + 30 * np.sin(np.arange(40)))
    found, few = (findings.rho_with_interval(rows, 500, 0) for rows in (part, part.assign(patient_id=0)))
    assert found["rho"] == pytest.approx(spearmanr(part["value"], part["if_typical"])[0])
    assert 0 < found["rho_low"] < found["rho"] < found["rho_high"] < 1 and np.isnan(few["rho"])
    apart = findings.rho_with_interval(part.assign(patient_id=part.index // 4), 500, 0)
    assert apart["rho"] == found["rho"] and apart["rho_low"] != found["rho_low"]


def test_statics_are_findings_as_items_are():
    numbers = {"icu_stay_id": 1, "patient_id": range(12), "attribution": np.arange(12.0), "ablation": np.arange(12.0)}
    statics = pd.DataFrame(numbers | {"feature": "length of stay", "value": [*map(str, range(11)), "Unknown"]})
    row = findings.item_table(findings.with_statics({"statics": statics, "events": events_of([1.0], [0.0])})).iloc[0]
    assert "length of stay: the higher, the higher the predicted risk (its average" in row["sentence"]
    assert row["is_static"] and row["n_values"] == 11


def test_items_of_one_patient_are_no_finding_and_the_largest_come_first():
    parts = [events_of([1.0] * 5, [size] * 5, item) for item, size in (("Lab: A", 0.5), ("Lab: B", -2.0))]
    one = events_of([1.0] * 5, [9.0] * 5, "Lab: C").assign(patient_id=1, tells_outcome=True)
    table = findings.item_table(pd.concat([*parts, one]))
    assert table["item"].tolist() == ["Lab: B", "Lab: A"] and not table["tells_outcome"].any()
    assert findings.item_table(one)["tells_outcome"].tolist() == [True]  # where all are of one patient


# ---- Organ systems
def test_organ_system_of_an_item_is_what_it_was():
    """The sample's, some that ask for a word's edge, and the 200 most frequent of real sources, with their events."""
    rows = pd.read_csv(Path(__file__).with_name("organ_systems_decided.csv"))
    decided = dict(zip(rows["item"], rows["organ_system"]))
    assert {item: findings.organ_system(item) for item in decided} == decided
    assert {read_text(text).item for text in make_sample().table["event_text"].unique()} <= decided.keys()
    assert findings.organ_system("Prescription: Nystatin Oral Suspension") == "infection"
    other = rows["events"].where(rows["organ_system"] == "other", 0).groupby(rows["of"]).sum()
    assert (other <= 0.1 * rows.groupby("of")["events"].sum()).all() and len(other) == 3


def test_organ_systems_sum_all_pushes_of_a_stay():
    rows = pd.DataFrame({"icu_stay_id": [1, 1, 1, 2, 2], "attribution": [51.0, 8, 2, 14, 6], "event": 0})
    items = ["Lab: Lactate (Blood, Blood Gas)", "Prescription: Propofol", "Lab: Something"]
    table = findings.system_table(rows.assign(patient_id=1, item=[*items, *items[:2]]))
    assert table.groupby("icu_stay_id")[["push", "n_events"]].sum().values.tolist() == [[61, 3], [20, 2]]
    of_first = table[table["icu_stay_id"] == 1].set_index("system")["push"].to_dict()
    assert of_first == {"circulation": 51, "brain and sedation": 8, "other": 2}
