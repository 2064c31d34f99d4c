"""Nothing is read before it was known, and a model is judged by patients that it has not seen."""

import json

import pandas as pd
import pytest
from small_table import arguments, best_model, small_table

import train


def twins_until_hour_3():
    """The first two stays have the same patient's data and events until hour 3; one dies, in another unit."""
    table = small_table(n_events=6).assign(last_icu_careunit=lambda t: "MICU " + t[train.LABEL])
    first, second = table[:6], table.index[6:12]
    same = ["patient_gender", "patient_age"]
    table.loc[second, same] = first[same].to_numpy()
    table.loc[second[:3], "event_text"] = first["event_text"][:3].to_numpy()
    return table.drop(index=second[4])  # later on, they differ in number, too


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("twins")
    twins_until_hour_3().to_csv(folder / "data.csv", index=False)
    features = [name for name in train.STATIC_COLUMNS if name != "discharge_location"]
    assert train.main(arguments(folder, folder / "data.csv", "--static-features", *features)) == 0
    return folder


def evaluated(folder, *options):
    checkpoint = best_model(folder)
    assert train.main(arguments(folder, folder / "data.csv", "--evaluate", checkpoint, *options)) == 0
    return json.loads((folder / "out" / "evaluation" / "metrics.json").read_text())


def test_stays_equal_until_hour_3_have_equal_risks_at_3_hours_though_they_differ_later(trained):
    evaluated(trained, "--trajectory", "3,6", "--include-seen")
    risks = pd.read_csv(trained / "out" / "evaluation" / "risk_trajectories.csv")
    at_3, at_6 = (risks[risks.hours_after_admission == hour].set_index("icu_stay_id").probability for hour in (3, 6))
    assert at_3[30_000_000] == at_3[30_000_001]
    assert at_6[30_000_000] != at_6[30_000_001]


def test_evaluation_judges_by_unseen_patients_unless_asked(trained):
    content = evaluated(trained)
    assert content["metrics"]["n_stays"] == 8  # a fifth of 40
    assert (content["seen_patients"]["stays"], content["seen_patients"]["of"]) == (32, 40)
    content = evaluated(trained, "--include-seen")
    assert content["metrics"]["n_stays"] == 40 and content["seen_patients"]["included"]


def test_values_that_training_never_saw_are_counted_by_column_with_a_warning_above_a_fifth(trained, capfd):
    data = pd.read_csv(trained / "data.csv", dtype=str)
    data.loc[:5, "patient_race"] = "NEW"
    data.assign(insurance="NEW").to_csv(trained / "new.csv", index=False)
    checkpoint = best_model(trained)
    assert train.main(arguments(trained, trained / "new.csv", "--evaluate", checkpoint)) == 0
    content = json.loads((trained / "out" / "evaluation" / "metrics.json").read_text())
    assert content["unknown_categories"] == {"patient_race": 1, "insurance": 40}
    output = capfd.readouterr().out
    assert "WARNING: insurance: 40 of 40 stays have values unknown to the model" in output
    assert "WARNING: patient_race" not in output
