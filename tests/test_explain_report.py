"""What is said of an explanation: words for numbers and texts, sentences of checks and findings, and the page."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from clinical_lf import explain_report
from clinical_lf.explain_report import Check, check_table
from clinical_lf.plots import new_figure

ATTACK = 'Lab: <script>alert(1)</script> & "$x_{$ (Blood, Chemistry) | Value: <b>9</b> | Level: far above range'
INFO: dict[str, Any] = {"text_encoder": "hashing", "data": "synthetic", "checkpoint": "best_model.pth"}
INFO |= {"labels": np.array([]), "risks": np.array([])}  # and the ids of the stays, where a page is made
INFO |= {"thresholds": {"died_from": 0.0, "survived_to": 1.0}, "level": 90}
INFO |= {"setting": "The model sees every event up to the final one."}
DELETION = Check("deletion", {"value": 1.2, "low": 1.0, "high": 1.4, "n": 3}, True, "if_absent", "> 0")
INFIDELITY = Check("infidelity", {"value": 0.31}, False, "if_absent", "<= 0.2")
FAITHFULNESS = check_table([DELETION, INFIDELITY, Check("agreement", {"value": 0.2}, None, "attention")])


def loud(explained):
    """The tables of a small run, its pushes and weights enlarged until they matter, hostile texts, checks made up."""
    tables = {name: table.copy() for name, table in explained.items()}
    for name in ("events", "statics", "groups", "layers", "systems"):
        pushes = tables[name].filter(regex="^(attribution|if_absent|ablation|push)").columns
        tables[name][pushes] *= 300
    events, stays, attention = tables["events"], tables["stays"], tables["attention"]
    stay, n_events = attention["icu_stay_id"], attention["pooling_weights"].shape[3]
    own = events["icu_stay_id"] == stay
    events.loc[own, "event_text"] = ATTACK
    events.loc[events["attribution"][own].idxmax(), "item"] = ATTACK.split(" | ")[0]
    stays.loc[stays["icu_stay_id"] == stay, ["complete", "gap_error"]] = [False, 0.3]
    pooling = np.random.default_rng(0).dirichlet(np.full(n_events, 0.3), 4)
    tables["attention"] = attention | {"pooling_weights": pooling[None, :, None]}
    decisive = events[own][["icu_stay_id", "event", "event_text"]][:2]
    tables["decisive"] = decisive.assign(threshold=0.5, probability=0.61, probability_without=0.18)
    passed = tables["verdict"]["passed"].replace(False, True)
    INFO["ids"] = stays["icu_stay_id"].to_numpy()
    return tables | {"faithfulness": FAITHFULNESS, "verdict": tables["verdict"].assign(passed=passed)}


@pytest.fixture(scope="module")
def tables(explained):
    return loud(explained)


@pytest.fixture(scope="module")
def report(tables):
    names = ("query_vector_analysis", "feature_importance")
    pictures = {name: explain_report.picture_of(new_figure(f"Why {name}?", "", 1.0)) for name in names}
    return explain_report.render_report(tables, pictures, INFO)


# ---- Words
WORDINGS = yaml.safe_load(Path(__file__).with_name("wordings.yaml").read_text("utf-8"))


@pytest.mark.parametrize("function", WORDINGS)
def test_numbers_and_texts_are_written_as_a_person_would(function):
    for *given, words in WORDINGS[function]:
        assert getattr(explain_report, function)(*given) == words


def test_checks_say_in_words_whether_they_hold_and_are_counted_unless_the_verdict_warns():
    wanted = [["deletion", True], ["infidelity", False], ["agreement", None]]
    assert FAITHFULNESS[["check", "passed"]].values.tolist() == wanted
    deletion, infidelity, agreement = FAITHFULNESS["sentence"]
    assert deletion.endswith("1.20 [1.00, 1.40] further than in random order. (Asked: > 0: yes.)")
    assert infidelity.startswith("The values of absence predict") and infidelity.endswith("(Asked: <= 0.2: NO.)")
    assert agreement.startswith("Pooling attention") and "Asked" not in agreement
    words = explain_report.checks_sentence(FAITHFULNESS, pd.DataFrame({"passed": [True, None]}))
    assert words.startswith("1 of 2 checks with a threshold are passed, on 3 stays.")
    assert words.endswith("falls short: Absence foretells what taking out several events does.")
    warned = explain_report.checks_sentence(FAITHFULNESS, pd.DataFrame({"passed": [False, True]}))
    assert warned.startswith("The verdict warns") and "1 of 2" not in warned


def test_a_risk_is_set_beside_what_became_of_the_stays_nearest_to_it_without_itself():
    risks, labels = np.linspace(0.05, 0.95, 40), (np.arange(40) >= 20).astype(float)
    said = "Of the 20 other stays of the nearest log-odds (risks of 49 % to 93 %), 19 died: 95 %, 95 % inter"
    assert explain_report.similar_sentence(labels, risks, 39).startswith(said)
    alone = np.arange(40) == 39  # the only death is the stay's own
    assert ", 0 died: 0 %" in explain_report.similar_sentence(alone * 1.0, risks, 39)
    assert "too few stays" in explain_report.similar_sentence(np.where(np.arange(40) < 20, labels, np.nan), risks, 0)


def test_decisive_events_that_hardly_move_the_risk_are_not_named():
    row = pd.DataFrame({"threshold": [0.5], "probability": 0.501, "probability_without": 0.499, "event_text": "x"})
    assert explain_report.decisive_sentence(row) == ""
    assert "Without this event" in explain_report.decisive_sentence(row.assign(probability_without=0.45))


# ---- The page
def test_report_escapes_event_texts_is_self_contained_accessible_and_closes_every_tag(report):
    assert "<script" not in report and "&lt;script&gt;alert(1)&lt;/script&gt;" in report
    assert "<b>9" not in report and "&lt;b&gt;9&lt;/b&gt;" in report
    assert report.startswith("<!DOCTYPE html>") and '<html lang="en">' in report and "default-src 'none'" in report
    assert all(address.startswith(("data:", "#")) for address in re.findall(r'(?:src|href)="([^"]*)"', report))
    assert report.count('<img alt="Why ') == report.count("<img") == 2
    assert report.count("<table>") == report.count("<thead>") == report.count("<caption>") > 8
    opened = []
    for is_end, tag in re.findall("<(/?)([a-z][a-z0-9]*)", report):
        if is_end:
            assert opened.pop() == tag
        elif tag not in ("meta", "link", "img"):
            opened.append(tag)
    assert opened == []


def test_report_tells_risk_outcome_checks_gap_and_decisive_events_of_every_shown_stay(report, tables):
    shown = tables["stays"].query("why_shown != ''")
    assert report.count('<section class="stay"') == len(shown) == 2
    risks, outcomes = shown["probability"].map(explain_report.percent), shown["label"].map(explain_report.outcome)
    judged = ["<td>falls short</td>", "<td>not judged</td>", "1 of 2 checks"]
    judged += ["push, logit</th>", "do not add up", "but for a gap of +0.30, gives"]
    decisive = "Without these 2 events the risk would be 18 % instead of 61 %, on the other side of 50 %: "
    for expected in (*shown["why_shown"], *risks, *outcomes, *judged, decisive, INFO["setting"]):
        assert expected in report
    risk = shown["probability"].iloc[0]
    sets = [(risk, risk, "cannot say"), (0, 0, "death alone"), (1, 1, "survival alone"), (1, 0, "Neither")]
    for low, high, said in sets:
        limits = {"thresholds": {"died_from": low, "survived_to": high}}
        page = explain_report.render_report(tables, {}, INFO | limits).split('<span class="risk">')
        assert any(said in part and outcome in part for part in page for outcome in outcomes)


def test_pictures_say_of_how_many_events_replacements_are(tables):
    events, known = tables["events"], tables["events"]["event"] < 20
    assert explain_report.removed_in_words(events) == ""
    words = explain_report.removed_in_words(events.assign(if_absent=events["if_absent"].where(known)))
    assert words == f"; {known.sum()} of {len(events)} events taken out one by one"


def test_report_begins_with_the_verdict_and_says_that_no_event_mattered_instead_of_listing_them(tables):
    quiet = tables["events"].assign(attribution=0.01, if_absent=0.01)
    verdict = pd.DataFrame({"sentence": ["This model does not discriminate."], "passed": [False]})
    page = explain_report.render_report(tables | {"events": quiet, "verdict": verdict}, {}, INFO)
    assert page.count("No event of this stay mattered") == 2 and "push most towards" not in page and "× 1.0" not in page
    assert page.index("This model does not discriminate.") < page.index("How to read the numbers")
    assert "checks with a threshold are passed" not in page


def one_stay(tables):
    """The tables of the stay whose attention is drawn, of unknown outcome, and no head measured."""
    own = {"heads": tables["heads"][:0]}
    for name, table in tables.items():
        if isinstance(table, pd.DataFrame) and "icu_stay_id" in table:
            own[name] = table[table["icu_stay_id"] == tables["attention"]["icu_stay_id"]]
    return tables | own | {"stays": own["stays"].assign(label=np.nan)}


def test_report_of_one_stay_of_unknown_outcome_says_so(tables):
    page = explain_report.render_report(one_stay(tables), {}, INFO)
    assert "outcome unknown" in page and "1 unseen stay of 1 patient with" in page
    assert "Their outcomes are unknown." in page
