"""The pictures and the page of explain_clinicalLF.py, drawn from tables whose numbers are made up."""

import functools
import html.parser
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
from make_sample import make_sample
from matplotlib.figure import Figure
from scipy.special import expit

import explain_clinicalLF as explain

ATTACK = 'Lab: <script>alert(1)</script> & "$x_{$ (Blood, Chemistry) | Value: <b>9</b> | Level: far above range'
NAMES = (
    "layer_attention_weights",
    "sequence_importance",
    "sequence_importance_combined",
    "head_specialization",
    "feature_importance",
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
            "item": table.event_text.str.split(" | ", regex=False).str[0],
            "is_abnormal": table.event_text.str.contains("Flag: abnormal"),
            "attribution": effect,
            "attribution_text": 0.8 * effect,
            "attribution_type": 0.05 * effect,
            "attribution_time": 0.15 * effect,
            "attribution_value": 0.0,
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
        .agg(
            n_events=("attribution", "size"),
            attribution=("attribution", "sum"),
            ablation=("if_unremarkable", "sum"),
        )
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
    stay = explain.shown_stay(stays)
    events.loc[events[events.icu_stay_id == stay].attribution.idxmax(), ["event_text", "item"]] = [
        ATTACK,
        ATTACK.split(" | ")[0],
    ]
    own, n_bins = events[events.icu_stay_id == stay], 24
    layers = pd.concat(
        [
            events[["icu_stay_id", "event"]].assign(
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
            "n_stays": n_stays,
            "sentence": [
                "Events in the last 6 h carry 41 % of the attribution [35, 47].",
                "Events 6 to 12 h before the end carry 10 % [5, 20].",
            ],
        }
    )
    hours = np.linspace(0, own.hours_since_admission.max(), 12)
    shown = stays.icu_stay_id[stays.why_shown != ""]
    return {
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
    return explain.render_report(
        mock_tables(6), {name: figures()[name] for name in ("query_vector_analysis", "feature_importance")}, INFO
    )


def words_of(figure):
    return " ".join(
        " ".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))).split()
    )


@pytest.mark.parametrize("name", NAMES)
def test_figure_asks_a_question_and_says_what_it_explains_and_of_whom(name):
    figure = figures()[name]
    assert isinstance(figure, Figure) and figure.get_figwidth() == 7.2 and "?" in figure.get_suptitle()
    assert "explains this model, not causes of death" in figure.get_supxlabel() and CAPTION in figure.get_supxlabel()
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
    assert "0 of 36" in words_of(explain.draw_head_specialization(heads.assign(has_role=False)))


def test_means_by_weighs_rows_equally_and_bounds_the_mean():
    table = pd.DataFrame({"patient_id": [1, 1, 2, 3, 4], "kind": list("aaaab"), "size": [1.0, 2, 3, 6, 5]})
    found = explain.means_by(table, "kind", "size")
    assert found["mean"].to_dict() == {"a": 3.0, "b": 5.0} and found.n_patients.to_dict() == {"a": 3, "b": 1}
    assert found.low["a"] < 3 < found.high["a"] and np.isnan(found.low["b"])


def test_shares_add_up_to_one_over_bins_whatever_the_lengths_of_the_stays():
    events = mock_tables(6)["events"]
    bins = pd.cut(events.hours_to_end, explain.HOUR_EDGES, right=False, labels=explain.HOUR_LABELS)
    shares = explain.shares_by(events, bins, ["attribution", "attention"])
    assert [table["mean"].sum() for table in shares.values()] == pytest.approx([1, 1])


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
    assert explain.short_text(text) == short and len(explain.short_text(text, 12)) <= 12


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
    assert set(drawn) == set(NAMES) and "outcome unknown" in explain.render_report(tables, {}, {})


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
    assert report().count("<table>") == report().count("<thead><tr><th scope=") == report().count("<caption>")


def test_report_tells_risk_outcome_scores_and_gap_of_every_shown_stay():
    shown = mock_tables(6)["stays"].query("why_shown != ''")
    assert report().count('<section class="stay"') == len(shown) >= 3
    for expected in (
        *shown.why_shown,
        "falls short",
        "Misses more than it should.",
        "1 of 2 checks",
        "do not add up",
        INFO["setting"],
    ):
        assert expected in report()


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
