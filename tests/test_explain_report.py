"""The pictures and the page of explain_clinicalLF.py, drawn from tables whose numbers are made up."""

import functools
import html.parser
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from make_sample import make_sample
from matplotlib.figure import Figure
from matplotlib.text import Text
from scipy.special import expit

import explain_clinicalLF as explain
import train

ATTACK = 'Lab: <script>alert(1)</script> & "$x_{$ (Blood, Chemistry) | Value: <b>9</b> | Level: far above range'
NAMES = (
    "layer_attention_weights",
    "sequence_importance",
    "sequence_importance_combined",
    "head_specialization",
    "feature_importance",
    "item_importance",
    "query_vector_analysis",
    "captum_attributions",
    "captum_layer_attributions",
    "captum_ablation_attributions",
)
PROPERTIES = ("recency", "abnormal flag", "|attribution|", *(f"event type: {kind}" for kind in explain.EVENT_TYPES))
STATICS = {
    "patient_gender": "gender",
    "patient_age": "age",
    "patient_race": "race",
    "insurance": "insurance",
    "admission_type": "admission type",
    "first_icu_careunit": "first care unit",
}


def mock_events(sample, generator):
    """Events with the true effect plus noise as attribution, in the schema of event_attributions.parquet."""
    table = sample.table.reset_index(drop=True)
    n, stay = len(table), table.icu_stay_id
    effect = sample.events.true_effect.to_numpy() + generator.normal(0, 0.05, n)
    weights = pd.DataFrame(generator.exponential(1, (n, 4)) + np.abs(effect)[:, None] * [0, 1, 2, 0.2])
    weights = weights / weights.groupby(stay).transform("sum")
    return pd.DataFrame(
        {
            "icu_stay_id": stay,
            "patient_id": table.patient_id,
            "label": table.patient_expired_in_hospital,
            "event": table.groupby("icu_stay_id").cumcount(),
            "event_time": table.event_time,
            "hours_since_admission": (table.event_time - pd.to_datetime(table.icu_intime)).dt.total_seconds() / 3600,
            "hours_to_end": table.relative_time_to_final_event / 60,
            "event_type": table.event_type,
            "event_text": table.event_text,
            "item": table.event_text.map(explain.item_of),
            "value": [train.parse_value(text)[1] for text in table.event_text],
            "is_abnormal": table.event_text.str.contains("Flag: abnormal"),
            "in_history": "",
            "attribution": effect,
            "attribution_text": 0.8 * effect,
            "attribution_type": 0.05 * effect,
            "attribution_time": 0.15 * effect,
            "attribution_history": 0.0,
            "if_unremarkable": 0.7 * effect + generator.normal(0, 0.05, n),
            "attention": weights.mean(axis=1),
            **{f"attention_head_{head}": weights[head - 1] for head in (1, 2, 3, 4)},
            "rollout": 1 / table.groupby("icu_stay_id").event_text.transform("size"),
            "complete": True,
        }
    )


def mock_stays(sample, events, statics):
    stays = sample.stays[["icu_stay_id", "patient_id", "label"]].reset_index(drop=True)
    totals = sum(
        table.groupby("icu_stay_id").attribution.sum().reindex(stays.icu_stay_id).to_numpy()
        for table in (events, statics)
    )
    stays = stays.assign(
        baseline_logit=-5.0,
        logit=totals - 5.0,
        probability=expit(totals - 5.0),
        gap_error=0.0,
        n_steps=50,
        complete=True,
        n_events=stays["icu_stay_id"].map(events["icu_stay_id"].value_counts()),
        n_replaced=stays["icu_stay_id"].map(events["icu_stay_id"].value_counts()),
        why_shown="",
    )
    stays["risk_percentile"] = 100 * stays.probability.rank(pct=True)
    error = (stays.label - stays.probability).abs()
    for why, at in (
        ("most wrong", error.idxmax()),
        ("most uncertain", (stays.probability - 0.5).abs().idxmin()),
        ("lowest risk", stays.probability.idxmin()),
        ("highest risk", stays.probability.idxmax()),
    ):
        stays.loc[at, "why_shown"] = why
    stays.loc[stays.probability.idxmin(), ["complete", "gap_error"]] = [False, 0.3]
    return stays


def mock_statics(sample, generator):
    first = sample.table.groupby("icu_stay_id", sort=False).first().reset_index()
    rows = first.melt(["icu_stay_id", "patient_id"], list(STATICS), "feature", "value").replace({"feature": STATICS})
    return rows.assign(attribution=generator.normal(0, 0.2, len(rows)), ablation=generator.normal(0, 0.2, len(rows)))


def mock_groups(events, statics, stays):
    bins = pd.cut(
        events.hours_to_end,
        [-1, 6, 12, 24, 48, np.inf],
        labels=["last 6 h", "6 to 12 h", "12 to 24 h", "24 to 48 h", "more than 48 h"],
    ).astype(str)
    parts = [
        events.assign(kind="event type", group=events.event_type),
        events.assign(kind="clock window", group=bins),
        statics.rename(columns={"feature": "group", "ablation": "if_unremarkable"}).assign(kind="static"),
    ]
    rows = (
        pd.concat(parts)
        .groupby(["icu_stay_id", "patient_id", "kind", "group"], sort=False)
        .agg(n_events=("attribution", "size"), attribution=("attribution", "sum"), ablation=("if_unremarkable", "sum"))
        .reset_index()
    )
    shown = rows.icu_stay_id.isin(stays.icu_stay_id[stays.why_shown != ""])
    return rows.assign(shapley=(0.5 * rows.attribution + 0.5 * rows.ablation).where(shown))


def mock_heads(generator):
    names = [(f"layer {layer}", head) for layer in (1, 2, 3, 4) for head in range(1, 9)]
    rows = [
        (layer, head, name, generator.normal(0, 0.2), generator.uniform(0.2, 0.35))
        for layer, head in names + [("pooling", head) for head in range(1, 5)]
        for name in PROPERTIES
    ]
    heads = pd.DataFrame(rows, columns=["layer", "head", "property", "correlation", "null_99"])
    heads = heads.assign(low=heads.correlation - 0.07, high=heads.correlation + 0.07, n_stays=60)
    return heads.assign(has_role=(heads.low > heads.null_99) | (heads.high < -heads.null_99))


FAITHFULNESS = pd.DataFrame(
    [
        {
            "check": "deletion",
            "method": "if_unremarkable",
            "value": 1.2,
            "passed": True,
            "sentence": "Further than chance.",
        },
        {
            "check": "infidelity",
            "method": "if_unremarkable",
            "value": 0.31,
            "passed": False,
            "sentence": "Misses more than it should.",
        },
        {"check": "agreement", "method": "attention", "value": 0.2, "passed": None, "sentence": "They often differ."},
    ]
)


@functools.lru_cache
def mock_tables(n_stays=60):
    """All tables that the drawing functions and the report take, with one hostile text in the shown stay."""
    generator, sample = np.random.default_rng(0), make_sample(max(n_stays, 10), seed=3)
    kept = [len(part) and part.icu_stay_id.isin(sample.stays.icu_stay_id[-n_stays:]) for part in sample[:3]]
    sample = sample._replace(
        **{name: part[keep] for name, part, keep in zip(("table", "events", "stays"), sample, kept)}
    )
    events, statics = mock_events(sample, generator), mock_statics(sample, generator)
    stays = mock_stays(sample, events, statics)
    stay = explain._shown_stay(stays)
    events.loc[events[events.icu_stay_id == stay].attribution.idxmax(), ["event_text", "item"]] = [
        ATTACK,
        ATTACK.split(" | ")[0],
    ]
    own, n_bins = events[events.icu_stay_id == stay], 24
    layers = pd.concat(
        [
            events[["icu_stay_id", "patient_id", "event"]].assign(
                layer=name,
                attribution=events.attribution + generator.normal(0, 0.1 * at, len(events)),
                gap_error=0.002 * at,
            )
            for at, name in enumerate(
                ("input_projection", "encoder layer 1", "encoder layer 2", "encoder layer 3", "encoder layer 4")
            )
        ]
    )
    similarity = pd.DataFrame(
        [(head, kind, generator.normal(0, 0.5), 100 * head) for head in range(1, 5) for kind in explain.EVENT_TYPES],
        columns=["head", "event_type", "similarity", "n_events"],
    )
    windows = pd.DataFrame(
        {
            "window": ["last 6 h", "6 to 12 h"],
            "share": [0.41, 0.1],
            "low": [0.35, 0.05],
            "high": [0.47, 0.2],
            "share_of_events": [0.3, 0.12],
            "n_stays": n_stays,
            "sentence": [
                "Events in the last 6 h carry 41 % of all push [35, 47].",
                "Events 6 to 12 h before the end carry 10 % [5, 20].",
            ],
        }
    )
    hours = np.linspace(0, own.hours_since_admission.max(), 12)
    shown = stays.icu_stay_id[stays.why_shown != ""]
    items = explain._item_table(events)
    decisive = own.nlargest(2, "attribution")[["icu_stay_id", "event", "event_text"]]
    return {
        "items": items,
        "levels": explain._level_table(events, items["item"]),
        "systems": explain._system_table(events),
        "decisive": decisive.assign(threshold=0.5, probability=0.61, probability_without=0.18),
        "stays": stays,
        "events": events,
        "statics": statics,
        "groups": mock_groups(events, statics, stays),
        "layers": layers,
        "heads": mock_heads(generator),
        "windows": windows,
        "faithfulness": FAITHFULNESS,
        "query_similarity": similarity.assign(low=similarity.similarity - 0.1, high=similarity.similarity + 0.1),
        "attention": {
            "icu_stay_id": stay,
            "layer_maps": generator.dirichlet(np.full(n_bins, 0.3), (4, 8, n_bins)),
            "pooling": own[[f"attention_head_{head}" for head in range(1, 5)]].to_numpy().T,
            "hours": own.hours_to_end.to_numpy(),
            "texts": own.event_text.to_list(),
        },
        "trajectory": pd.concat(
            [
                pd.DataFrame(
                    {
                        "icu_stay_id": one,
                        "hours_since_admission": hours,
                        "probability": expit(np.cumsum(generator.normal(0, 0.5, 12))),
                    }
                )
                for one in shown
            ]
        ),
    }


INFO = {
    "text_encoder": "hashing",
    "data": "synthetic",
    "checkpoint": "best_model.pth",
    "setting": "The model sees every event up to the final one.",
}
CAPTION = "text encoder: hashing · 6 held-out stays of 6 patients"


@functools.lru_cache
def figures():
    return explain.draw_figures(mock_tables(6), CAPTION)


@functools.lru_cache
def report():
    names = ("query_vector_analysis", "feature_importance")
    return explain._render_report(mock_tables(6), {name: explain._picture(figures()[name]) for name in names}, INFO)


def words_of(figure):
    return " ".join(
        " ".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))).split()
    )


@pytest.mark.parametrize("name", NAMES)
def test_figure_asks_a_question_and_says_what_it_explains_and_of_whom(name):
    figure = figures()[name]
    assert isinstance(figure, Figure) and figure.get_figwidth() == 7.2 and "?" in figure.get_suptitle()
    caption = " ".join(figure.get_supxlabel().split())
    assert "explains this model, not causes of death" in caption and CAPTION in caption
    assert any(axes.get_xlabel() for axes in figure.axes)


@pytest.mark.parametrize("name", ["sequence_importance", "sequence_importance_combined", "captum_attributions"])
def test_figure_names_events_by_text_even_where_the_text_is_hostile(name):
    assert "<script>" in words_of(figures()[name])
    figures()[name].draw_without_rendering()  # an unescaped "$x_{$" would raise here


def test_feature_importance_shows_types_items_and_statics_by_name_with_n():
    words = words_of(figures()["feature_importance"])
    events = mock_tables(6)["events"]
    n = (events.event_type == "labevent").sum()
    strongest = (
        events[events.groupby("item").patient_id.transform("nunique") >= 3]
        .groupby("item")
        .attribution.agg(lambda a: a.abs().mean())
        .idxmax()
    )
    for expected in ("IV ingredient", strongest.split(" (")[0], "admission type", f"{n} / 6"):
        assert expected in words


def test_head_specialization_counts_only_heads_beyond_the_untrained_band():
    heads = mock_tables(6)["heads"]
    n = heads[heads.has_role].groupby(["layer", "head"]).ngroups
    assert f"{n} of 36 have a role" in words_of(figures()["head_specialization"])
    without = explain.draw_figure("head_specialization", {"heads": heads.assign(has_role=False)})
    assert "0 of 36" in words_of(without)


def test_means_by_weighs_rows_equally_and_bounds_the_mean():
    table = pd.DataFrame({"patient_id": [1, 1, 2, 3, 4], "kind": list("aaaab"), "size": [1.0, 2, 3, 6, 5]})
    found = explain._means_by(table, "kind", "size")
    assert found["mean"].to_dict() == {"a": 3.0, "b": 5.0} and found.n_patients.to_dict() == {"a": 3, "b": 1}
    assert found.low["a"] < 3 < found.high["a"] and np.isnan(found.low["b"])


def test_shares_add_up_to_one_over_bins_whatever_the_lengths_of_the_stays():
    events = mock_tables(6)["events"]
    names = explain.CLOCK_WINDOWS
    windows = pd.Series(pd.Categorical(explain._clock_window(events["hours_to_end"].to_numpy()), names))
    for column in ("attribution", "attention"):
        shares = explain._stay_shares(events, windows, column)
        np.testing.assert_allclose(shares.sum(axis=1), 1)
        assert list(shares) == list(names) and len(shares) == 6


@pytest.mark.parametrize(
    "text, short",
    [
        (
            "Lab: Lactate (Blood, Blood Gas) | Value: 5.2 mmol/L | Reference: 0.5-2 | Level: far above range",
            "Lactate · 5.2 mmol/L · far above range",
        ),
        ("Lab: Sodium (Urine, Chemistry) | Value: 30 mEq/L", "Sodium (Urine, Chemistry) · 30 mEq/L"),
        ("Microbiology: URINE | Test: URINE CULTURE | Comment: NO GROWTH.", "Microbiology: URINE · URINE CULTURE"),
        ("Procedure: EKG (4-Procedures) | Status: FinishedRunning", "Procedure: EKG"),
        ("", ""),
    ],
)
def test_short_text_keeps_what_value_and_level(text, short):
    assert explain._short_text(text) == short and len(explain._short_text(text, 12)) <= 12


def test_figures_survive_one_stay_without_label_and_without_head_roles():
    tables = {
        name: table[table.icu_stay_id == mock_tables(6)["attention"]["icu_stay_id"]]
        if "icu_stay_id" in table
        else table
        for name, table in mock_tables(6).items()
        if isinstance(table, pd.DataFrame)
    }
    tables |= {
        "attention": mock_tables(6)["attention"],
        "heads": tables["heads"].iloc[:0],
        "stays": tables["stays"].assign(label=np.nan),
    }
    drawn = explain.draw_figures(tables)
    page = explain._render_report(tables, {}, {})
    assert set(drawn) == set(NAMES) and "outcome unknown" in page
    assert "1 held-out stay of 1 patient with" in page and "Their outcomes are unknown." in page


def test_report_escapes_event_texts():
    assert "<script" not in report() and "&lt;script&gt;alert(1)&lt;/script&gt;" in report()
    assert "<b>9" not in report() and "&lt;b&gt;9&lt;/b&gt;" in report()


def test_report_is_self_contained_and_accessible():
    assert (
        report().startswith("<!DOCTYPE html>") and '<html lang="en">' in report() and "default-src 'none'" in report()
    )
    assert all(address.startswith(("data:", "#")) for address in re.findall(r'(?:src|href)="([^"]*)"', report()))
    assert report().count("<img alt=") == report().count("<img") == 2 and report().count("<svg") == report().count(
        'role="img"'
    )
    assert report().count("<table>") == report().count("<thead>") == report().count("<caption>") > 10


def test_report_tells_risk_outcome_scores_and_gap_of_every_shown_stay():
    shown = mock_tables(6)["stays"].query("why_shown != ''")
    assert report().count('<section class="stay"') == len(shown) >= 3
    for expected in (
        *shown.why_shown,
        "falls short",
        "Misses more than it should.",
        "1 of 2 checks",
        "falls short: Replacement foretells what replacing several events does.",
        "of push</th>",
        "do not add up",
        INFO["setting"],
    ):
        assert expected in report()


def test_report_and_pictures_say_of_how_many_events_replacements_are():
    tables = mock_tables(6)
    assert "replaced one by one" not in explain._cohort_sentence(tables["stays"])
    events, n_events = tables["events"], len(tables["events"])
    left_out = events["event"] >= 20
    events.loc[left_out, "if_unremarkable"] = np.nan
    known = n_events - left_out.sum()
    assert explain._replaced_in_words(events) == f"; {known:,} of {n_events:,} events replaced one by one"
    tables["stays"]["n_replaced"] = 20
    assert "120 events, the strongest of each stay, were replaced" in explain._cohort_sentence(tables["stays"])
    for name in ("sequence_importance_combined", "captum_ablation_attributions"):
        figure = explain.draw_figure(name, tables)
        said = " ".join(text.get_text() for text in figure.findobj(Text))
        assert f"{known:,} of {n_events:,} events" in said


def test_report_says_without_which_events_the_decision_would_be_another():
    assert "Without these 2 events the risk would be 18 % instead of 61 %, on the other side of 50 %: " in report()


def test_report_says_that_no_event_mattered_instead_of_listing_them():
    tables = mock_tables(6)
    quiet = tables["events"].assign(attribution=0.01, if_unremarkable=0.01)
    page = explain._render_report(tables | {"events": quiet}, {}, INFO)
    assert page.count("No event of this stay mattered") == (tables["stays"]["why_shown"] != "").sum()
    assert "push most towards" not in page and "× 1.0" not in page


def test_report_begins_with_the_verdict():
    verdict = pd.DataFrame({"sentence": ["This model does not discriminate."], "passed": [False]})
    page = explain._render_report(mock_tables(6) | {"verdict": verdict}, {}, INFO)
    assert page.index("This model does not discriminate.") < page.index("How to read the numbers")
    assert "checks with a threshold are passed" not in page


@pytest.mark.parametrize("discriminates", [True, False])
def test_log_names_findings_only_of_a_model_that_discriminates(discriminates, caplog):
    found = {"name": ["discrimination"], "sentence": ["AUROC"], "passed": [discriminates]}
    with caplog.at_level("INFO", train.logger.name):
        explain._log_what_was_found(mock_tables(6) | {"verdict": pd.DataFrame(found)})
    assert ("Findings" in caplog.text) == discriminates and "Checks" in caplog.text


@pytest.mark.parametrize(
    "logit, words",
    [(0.0, "the same"), (-0.03, "the same"), (2.5, "× 12"), (-0.35, "÷ 1.4"), (9.0, "× over 1,000"), (np.nan, "–")],
)
def test_odds_are_written_as_a_person_would(logit, words):
    assert explain._odds(logit) == words
    assert explain._odds(2 * logit, temperature=2.0) == words


# ---- Findings


def events_of(values, pushes, item="Lab: Lactate (Blood, Blood Gas)"):
    texts = [f"{item} | Value: {value} mmol/L | Level: above range" for value in values]
    table = {"icu_stay_id": 1, "patient_id": range(len(values)), "event": 0, "item": item, "value": values}
    return pd.DataFrame(table | {"attribution": pushes, "event_text": texts})


@pytest.mark.parametrize("sign, word", [(1, "when high (rho 1.00"), (-1, "when low (rho -1.00"), (0, "too few values")])
def test_items_say_which_values_push_towards_death(sign, word):
    values = np.arange(12.0 if sign else 4.0)
    table = explain._item_table(events_of(values, sign * values**3 if sign else values))
    assert word in table["sentence"][0] and f"n {len(values)})" in table["sentence"][0]
    assert table["size"][0] == pytest.approx((values**3).mean() if sign else values.mean())


def test_item_whose_events_all_push_away_is_said_to_push_away():
    values = np.arange(12.0)
    assert (
        "pushes away from death, least when high" in explain._item_table(events_of(values, values - 20))["sentence"][0]
    )


def test_items_by_level_are_means_of_the_push():
    levels = explain._level_table(events_of([1.0, 2, 3], [1.0, 0, 5]), ["Lab: Lactate (Blood, Blood Gas)"])
    assert levels[["level", "push", "n_events"]].values.tolist() == [["above range", 2.0, 3]]


@pytest.mark.parametrize(
    "text, system",
    [
        ("Lab: Lactate (Blood, Blood Gas)", "circulation"),
        ("Prescription: NORepinephrine", "circulation"),
        ("Lab: Creatinine (Blood, Chemistry)", "kidney and fluids"),
        ("Lab: Lactate Dehydrogenase (LD) (Blood, Chemistry)", "other"),
        ("Lab: Platelet Count (Blood, Hematology)", "blood and coagulation"),
        ("Procedure: Invasive Ventilation (2-Ventilation)", "respiration"),
        ("Prescription: Piperacillin-Tazobactam", "infection"),
        ("Prescription: Propofol", "brain and sedation"),
    ],
)
def test_organ_system_of_an_item(text, system):
    assert explain._organ_system(text) == system


def test_organ_systems_sum_all_pushes_of_a_stay():
    events = mock_tables(6)["events"]
    found = explain._system_table(events).groupby("icu_stay_id")[["push", "n_events"]].sum()
    np.testing.assert_allclose(found["push"], events.groupby("icu_stay_id")["attribution"].sum())
    assert found["n_events"].sum() == len(events)


def decisive(effects, threshold):
    """The set for a stay whose logit is the sum of its events' effects, one input each; the mean event is 0."""
    sequence = torch.tensor(effects)[None, :, None]
    model = SimpleNamespace(logits_of_rows=lambda events, rows, statics: events[rows].sum(1))
    baseline = {"event": torch.zeros(1), "static": torch.zeros(1)}
    checkpoint = SimpleNamespace(model=model, baseline=baseline, probabilities=expit)
    run = SimpleNamespace(checkpoint=checkpoint, inputs=lambda stay: (sequence, torch.zeros(1, 1)))
    events = pd.DataFrame({"icu_stay_id": 1, "event": range(len(effects)), "event_text": "", "attribution": effects})
    return explain._decisive_events(run, 0, events, threshold)


def test_decisive_events_are_the_fewest_that_change_the_decision():
    table = decisive([0.2, 3.0, -1.0, 0.1], 0.5)  # logit 2.3; without the 3.0 it is -0.7
    assert table["event"].tolist() == [1]
    assert table["probability"][1] == pytest.approx(expit(2.3))
    assert table["probability_without"][1] == pytest.approx(expit(-0.7))


def test_decisive_events_of_a_low_risk_are_those_against():
    assert decisive([0.5, -2.0, -0.1], 0.5)["event"].tolist() == [1]


def test_decisive_events_are_none_where_no_set_is_enough():
    assert decisive([0.5, 0.4], 0.4).empty  # a stay that says nothing has a risk of 50 %


class _Tags(html.parser.HTMLParser):
    """Raises where a tag closes that is not the open one."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_closes_every_tag():
    parser = _Tags()
    parser.feed(report())
    assert parser.open == []


def browse(path):
    """What headless Chromium says on its console about a page, and the page's text after loading."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs Chromium: `apt-get install chromium`")
    done = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--no-first-run",
            "--disable-component-update",
            f"--user-data-dir={path.parent / 'profile'}",
            "--enable-logging=stderr",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line], done.stdout


def test_report_opens_in_chromium_without_network_request_or_console_message(tmp_path):
    path = tmp_path / "report.html"
    path.write_text(report(), encoding="utf-8")
    console, page = browse(path)
    assert console == [] and "How right are these explanations?" in page and "&lt;script&gt;" in page
    # The same page with one request, which its policy forbids, must be noticed: else the line above proves nothing.
    path.write_text(report().replace("<main>", '<main><img src="http://example.org/x.png">'), encoding="utf-8")
    assert browse(path)[0]
