"""tests/selfcheck.py: scores against a truth that is known by hand."""

import numpy as np
import pandas as pd
import pytest
import selfcheck


def test_planted_scores_of_the_truth_itself_are_perfect():
    columns = {"attribution": [2.0, 0, -1, 0.1, 0.5], "if_absent": [0.0, 3, 0, 0, 0], "attention": 0.2}
    columns |= {"relevance": columns["attribution"], "rollout": 0.2}
    columns |= {"true_effect": [2.0, 0, -1, 0, 0], "role": ["cause", "decoy", "cause", "background", "lone"]}
    scores = selfcheck.planted_scores(pd.DataFrame(columns | {"icu_stay_id": 1, "patient_id": 1})).set_index("method")
    names = ["precision", "right_sign", "cause", "decoys", "traps"]
    assert scores.loc["attribution", names].tolist() == [1, 1, 1.5, 0, 0.5]
    assert scores.loc["if_absent", "precision"] == 0.5 and scores.loc["attention", "chance"] == 0.4


def test_errors_of_redundant_groups_are_told_apart_by_size_and_traps_that_move_the_model_are_its_error():
    columns = {"size": [1, 2, 2], "attribution": 1.5, "joint": [1.0, 3, 1], "alone": 2.0, "true": 2.0}
    rows = {row["check"]: row["value"] for row in selfcheck.of_redundancy(pd.DataFrame(columns))}
    assert rows["redundant, 1"] == 0 and rows["redundant, 1: in the stay"] == rows["redundant, 1: model"] == 0.5
    assert rows["redundant, 2"] == pytest.approx(0.25) and rows["redundant, 2: model"] == 0
    columns = {"role": ["cause", "cause", "early", "lone", "decoy"], "true_effect": [2.0, -2, 0, 0, 0]}
    columns |= {"if_absent": [1.0, -1, 1, 0.5, 0], "attribution": [2.0, -2, 2, 1, 0]}
    assert [row["value"] for row in selfcheck.of_traps(pd.DataFrame(columns))] == [0.75, 0.75]


def test_a_latest_lactate_after_a_higher_one_is_held_to_what_is_said_of_causes():
    columns = {"patient_id": 1, "icu_stay_id": [1, 1, 2, 3], "event": [0, 3, 1, 2], "value": [9.0, 5, 8, 8]}
    columns |= {"kind": ["lactate", "lactate", "lactate", "vasopressor"], "true_effect": [0, 1.0, 2, 3]}
    events = pd.DataFrame(columns | {"attribution": [0, 1.0, 1, 1], "if_absent": [0, 0.5, 1, 1.5]})
    assert [row["value"] for row in selfcheck.of_latest(events)] == pytest.approx([2, 1])
    assert [row["n"] for row in selfcheck.of_latest(events)] == [1, 1]


def test_truth_is_matched_by_stay_text_and_order_and_another_samples_is_an_error():
    truth = pd.DataFrame({"icu_stay_id": 1, "event_text": ["a", "b", "a"], "true_effect": [1.0, 2, 3]})
    events = pd.DataFrame({"icu_stay_id": 1, "event_text": ["a", "a", "b"]})
    assert selfcheck.with_truth(events, truth)["true_effect"].tolist() == [1, 3, 2]
    with pytest.raises(ValueError, match="different samples"):
        selfcheck.with_truth(events.assign(event_text="c"), truth)


def test_what_falls_short_is_returned_and_nothing_is_asked_of_attention():
    found = {"value": 0.95, "low": 0.85, "high": 1.0, "n": 3}
    short, unasked = (selfcheck.criterion("planted precision@k", by, found, chance=0.2) for by in ("m", "attention"))
    short |= {"seed": "all", "recipe": "774 inputs"}
    said = "of the events that m ranks first, 0.950 [0.850, 1.000] are causes (chance 0.20)"
    assert short["sentence"] == said and short["passed"] is False and unasked["passed"] is None
    of_size = selfcheck.criterion("redundant, {size}", "m", {"value": 0.3}, size=2)
    assert of_size["check"] == "redundant, 2" and of_size["passed"] is False and np.isnan(of_size["low"])
    assert selfcheck.say(pd.DataFrame([short])) == 1
    assert selfcheck.say(pd.DataFrame([short | {"passed": True}])) == 0
