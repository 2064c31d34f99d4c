"""What the tables of many stays add up to: correlations, means, shares of windows, items, organ systems."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from make_sample import make_sample
from scipy.stats import spearmanr

from clinical_lf import findings
from clinical_lf.items import read_text

WINDOWS = ("last 6 h", "6 to 12 h", "12 to 24 h", "24 to 48 h", "48 to 96 h", "more than 96 h")


def test_rank_correlation_equals_scipy_is_missing_for_a_constant_and_is_taken_in_each_group():
    first, second = np.array([[1.0, 5, 2, 2], [1, 1, 1, 1]]), np.array([[3.0, 9, 1, 4]])
    found = findings.rank_correlation(first, second)
    assert found[0, 0] == pytest.approx(spearmanr(first[0], second[0])[0]) and np.isnan(found[1, 0])
    table = pd.DataFrame({"stay": [1, 1, 1, 2, 2, 2], "head": 1, "a": [1, 2, 3, 1, 2, 3], "b": [1, 4, 9, 3, 2, 1]})
    found = findings.rank_agreement(table, ["stay", "head"], "a", "b")
    assert found[["stay", "correlation"]].values.tolist() == [[1, pytest.approx(1)], [2, pytest.approx(-1)]]


def test_means_by_weighs_rows_equally_and_bounds_the_mean():
    table = pd.DataFrame({"patient_id": [1, 1, 2, 3, 4], "kind": list("aaaab"), "size": [1.0, 2, 3, 6, 5]})
    found = findings.means_by(table, "kind", "size")
    assert found["mean"].to_dict() == {"a": 3.0, "b": 5.0} and found.n_patients.to_dict() == {"a": 3, "b": 1}
    assert found.low["a"] < 3 < found.high["a"] and np.isnan(found.low["b"])


def test_clock_windows_begin_at_their_lower_edge():
    found = findings.clock_window(np.array([0, 5.9, 6, 95, 96, 4000, -0.1]))
    names = ["last 6 h", "last 6 h", "6 to 12 h", "48 to 96 h", "more than 96 h", "more than 96 h", "last 6 h"]
    assert found.tolist() == names and tuple(found.categories) == WINDOWS and found.ordered


@pytest.fixture
def events():
    """Four stays of three patients, of 2 to 6 events, the later ones nearer to the end."""
    rows = []
    for stay, patient, hours in ((1, 1, [50, 7, 1]), (2, 1, [13, 5]), (3, 2, [100, 20, 9, 3]), (4, 3, range(6))):
        rows += [(stay, patient, at, hour, 1.0 + hour, 1 / len(hours)) for at, hour in enumerate(hours)]
    table = pd.DataFrame(rows, columns="icu_stay_id patient_id event hours_to_end attribution attention".split())
    items = {0: "Lab: Lactate (Blood, Blood Gas)", 1: "Prescription: Propofol", 2: "Lab: Something"}
    return table.assign(item=(table["event"] % 3).map(items))


@pytest.mark.parametrize("column", ["attribution", "attention", ""])
def test_shares_add_up_to_one_over_bins_whatever_the_lengths_of_the_stays(events, column):
    shares = findings.stay_shares(events, findings.clock_window(events["hours_to_end"]), column)
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    assert tuple(shares) == WINDOWS and len(shares) == 4
    assert shares.loc[(1, 2), "last 6 h"] == pytest.approx(6 / 20 if column == "attribution" else 1 / 2)
    means = findings.column_means(shares, 50)
    assert means["mean"].sum() == pytest.approx(1) and means.loc["last 6 h", "low"] <= means.loc["last 6 h", "mean"]


def test_windows_have_their_share_of_the_push_of_the_events_and_a_sentence(events):
    table = findings.window_table(events.assign(hours_to_end=events["hours_to_end"].clip(upper=40)), 50)
    assert table["window"].tolist() == list(WINDOWS[:4]) and table["n_stays"].tolist() == [4, 2, 2, 2]
    assert table["share"].sum() == pytest.approx(1) and table["share_of_events"].sum() == pytest.approx(1)
    assert table["sentence"].str.endswith("of the events.").all()


# ---- Items
def events_of(values, pushes, item="Lab: Lactate (Blood, Blood Gas)"):
    table = {"icu_stay_id": 1, "patient_id": range(len(values)), "event": 0, "item": item, "value": values}
    return pd.DataFrame(table | {"attribution": pushes, "tells_outcome": False})


@pytest.mark.parametrize(
    "n, push_of, words",
    [
        (12, lambda value: value**3, "when high (rho 1.00"),
        (12, lambda value: -(value**3), "when low (rho -1.00"),
        (4, lambda value: value, "too few values"),
        (12, lambda value: value - 20, "pushes away from death, least when high"),
        (12, lambda value: 1 + value % 2, "hardly depending on its value (rho 0.14"),
    ],
)
def test_items_say_which_values_push_towards_death(n, push_of, words):
    (row,) = findings.item_table(events_of(np.arange(n), push_of(np.arange(n)))).to_dict("records")
    assert words in row["sentence"] and f"n {n})" in row["sentence"] and row["n_events"] == n
    assert row["size"] == pytest.approx(abs(push_of(np.arange(n))).mean())


def test_items_of_one_patient_are_no_finding_and_the_largest_come_first():
    parts = [events_of([1.0] * 5, [size] * 5, item) for item, size in (("Lab: A", 0.5), ("Lab: B", -2.0))]
    one = events_of([1.0] * 5, [9.0] * 5, "Lab: C").assign(patient_id=1, tells_outcome=True)
    table = findings.item_table(pd.concat([*parts, one]))
    assert table["item"].tolist() == ["Lab: B", "Lab: A"] and not table["tells_outcome"].any()
    assert findings.item_table(one)["tells_outcome"].tolist() == [True]  # where all are of one patient


# ---- Organ systems
def test_organ_system_of_an_item_is_what_it_was():
    """Decided by the regular expressions before the table: the sample's items, and some that ask for a word's edge."""
    rows = pd.read_csv(Path(__file__).with_name("organ_systems_decided.csv"))
    decided = dict(zip(rows["item"], rows["organ_system"]))
    assert {item: findings.organ_system(item) for item in decided} == decided
    assert {read_text(text).item for text in make_sample().table["event_text"].unique()} <= decided.keys()


def test_organ_systems_sum_all_pushes_of_a_stay(events):
    table = findings.system_table(events)
    found = table.groupby("icu_stay_id")[["push", "n_events"]].sum()
    np.testing.assert_allclose(found["push"], events.groupby("icu_stay_id")["attribution"].sum())
    assert found["n_events"].sum() == len(events)
    of_first = table[table["icu_stay_id"] == 1].set_index("system")["push"].to_dict()
    assert of_first == {"circulation": 51, "brain and sedation": 8, "other": 2}
