"""What is said of an explanation: words for numbers and texts, the sentences of checks and findings, and the page."""

from __future__ import annotations

import base64
import io
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from scipy.special import expit

from clinical_lf.files import wording
from clinical_lf.metrics import calibration_table

FLOOR = 0.05  # logit; what moves it by less does not matter
EVENTS_LISTED = 10  # of a stay, in the report, on either side
DISCLAIMER = "explains this model, not causes of death"
TYPE_WORDS, METHOD_WORDS, STATIC_WORDS = wording("event_types"), wording("methods"), wording("static")
LESS_SAID = "Reference Flag Priority Comment Status Form Strength Test Location".split()
APPENDIX = (
    "sequence_importance layer_attention_weights captum_layer_attributions head_specialization query_vector_analysis "
    "deletion_insertion"
).split()


class Check(NamedTuple):
    """One thing measured of the model (the verdict) or of its explanations; its words are in words.yaml."""

    name: str
    found: dict[str, Any]  # value, low, high, n where there are any, and what the sentence needs beside them
    passed: bool | None = None  # None where nothing is judged
    method: str = ""
    threshold: str = ""  # what was asked


def check_table(checks: list[Check]) -> pd.DataFrame:
    """Return checks as a table: check, method, value, low, high, n, threshold, passed, sentence."""
    rows = []
    for check in checks:
        says, found = wording("says")[check.name], check.found
        sentence = says if isinstance(says, str) else says[check.passed is False]
        facts = found | {"is": with_interval(found), "method": METHOD_WORDS.get(check.method, "")}
        asked = f" (Asked: {check.threshold}: {'yes' if check.passed else 'NO'}.)" if check.threshold else ""
        numbers = {name: found.get(name, math.nan) for name in ("value", "low", "high", "n")}
        row = {"check": check.name, "method": check.method, **numbers, "threshold": check.threshold}
        rows.append(row | {"passed": check.passed, "sentence": capital(sentence.format(**facts)) + asked})
    return pd.DataFrame(rows).astype({"passed": object})


# ---- Words for numbers and texts ----


def capital(words: str) -> str:
    """Return the words, the first letter large."""
    return words[:1].upper() + words[1:]


def with_interval(found: dict[str, Any]) -> str:
    """Return `0.50 [0.41, 0.60]`, or the value alone where there is no interval."""
    value, low, high = (found.get(name, math.nan) for name in ("value", "low", "high"))
    return f"{value:.2f}" if pd.isna(low) or pd.isna(high) else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def static_word(column: str) -> str:
    """Return what a static column is called."""
    return STATIC_WORDS.get(column, column.replace("_", " "))


def cut(text: object, width: int) -> str:
    """Return the text on one line of at most `width` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= width else line[: width - 1].rstrip(" ·,(") + "…"


def percent(probability: float) -> str:
    """Return `42 %`; never 0 or 100, which no prediction is."""
    if pd.isna(probability):
        return "–"
    if probability < 0.01:
        return "under 1 %"
    return "over 99 %" if probability > 0.99 else f"{100 * probability:.0f} %"


def outcome(label: float) -> str:
    """Return how a stay ended."""
    return "outcome unknown" if pd.isna(label) else "died" if label else "survived"


def signed(value: float) -> str:
    """Return `+0.31`, `−0.31` or, where it is small, `+0.031`, `+0.0031`; a dash where there is no number."""
    if pd.isna(value):
        return "–"
    if abs(value) < 0.0005:
        return "0"
    digits = 2 + int(abs(value) < 0.1) + int(abs(value) < 0.01)
    return f"{value:+.{digits}f}".replace("-", "−")


def odds(logit: float) -> str:
    """Return a difference of logits as odds, as a person writes it: `× 12`, `÷ 1.4`, `the same`."""
    times = math.exp(min(abs(logit), 20)) if not pd.isna(logit) else math.nan
    if math.isnan(times) or times < 1.05:
        return "–" if math.isnan(times) else "the same"
    number = "over 1,000" if times > 1000 else f"{times:.0f}" if times >= 9.95 else f"{times:.1f}"
    return f"{'×' if logit > 0 else '÷'} {number}"


def counted(number: int, word: str) -> str:
    """Return `1 stay`, `2 stays`."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def plain_number(value: object) -> str:
    """Return a number without needless digits, anything else as it is."""
    try:
        return f"{float(str(value)):.3g}"
    except ValueError:
        return str(value)


def short_text(text: str, width: int = 46) -> str:
    """Return an event's text for one line: what, value, level; `Lactate · 5.2 mmol/L · far above range`."""
    first, *parts = str(text).split(" | ")
    kept = [part for part in parts if part.split(":")[0] not in LESS_SAID]
    kept = kept or [part for part in parts if part.startswith(("Test", "Comment"))][:1]
    said = [re.sub(r"^Lab: | \((Blood, |\d-)[^)]*\)", "", first)]
    said += [re.sub(r"^[A-Z]\w+: ", "", part) for part in kept]
    return cut(" · ".join(said), width)


def replaced_in_words(events: pd.DataFrame) -> str:
    """Return `; 620 of 3,000 events replaced one by one`, or nothing where all are."""
    n_replaced = events["if_unremarkable"].count()
    return "" if n_replaced == len(events) else f"; {n_replaced:,} of {len(events):,} events replaced one by one"


# ---- Sentences of findings ----


def item_sentence(item: Any) -> str:
    """Say which values of an item push: `Lab: Lactate pushes towards death when high (rho 0.87, n 40).`"""
    direction = "towards" if item.push > 0 else "away from"
    if math.isnan(item.rho):
        few = f"; too few values to say whether high or low ones do (n {item.n_values})" if item.n_values else ""
        return f"{item.item} pushes {direction} death, {signed(item.push)} on average{few}."
    where, end = f"(rho {item.rho:.2f}, n {item.n_values})", "high" if item.rho > 0 else "low"
    if abs(item.rho) < 0.3:
        return f"{item.item} pushes {direction} death, hardly depending on its value {where}."
    if item.highest_push <= 0:  # all of its events push away
        return f"{item.item} pushes away from death, least when {end} {where}."
    return f"{item.item} pushes towards death when {end} {where}."


def window_sentence(row: Any) -> str:
    """Say how much of the push lies in a window: `Events in the last 6 h carry 17 % [13, 21] of all push; ...`"""
    interval = "" if math.isnan(row.low) else f" [{100 * row.low:.0f}, {100 * row.high:.0f}]"
    where = f"in the {row.window}" if row.window.startswith("last") else f"{row.window} before the end"
    words = f"Events {where} carry {100 * row.share:.0f} %{interval} of all push; "
    return f"{words}they are {100 * row.share_of_events:.0f} % of the events."


def calibration_sentence(table: pd.DataFrame | None, probability: float) -> str:
    """Say what became of the stays with about this risk."""
    if table is None:
        return "There are too few stays to say how far a risk of this size can be trusted."
    row = table.loc[(table["mean_risk"] - probability).abs().idxmin()]
    interval = f"95 % interval {100 * row['low']:.0f} to {100 * row['high']:.0f} %"
    died = f"{row['deaths']:.0f} died: {100 * row['observed_rate']:.0f} %, {interval}."
    return f"Of the {row['n']:.0f} stays with the most similar risks (mean {percent(row['mean_risk'])}), {died}"


def decisive_sentence(decisive: pd.DataFrame) -> str:
    """Say without which events the decision would be another one."""
    if decisive.empty:
        return ""
    row = decisive.iloc[0]
    which = "this event" if len(decisive) == 1 else f"these {len(decisive)} events"
    texts = "; ".join(short_text(text, 80) for text in decisive["event_text"])
    without = f"{percent(row['probability_without'])} instead of {percent(row['probability'])}"
    return f"Without {which} the risk would be {without}, on the other side of {percent(row['threshold'])}: {texts}."


def sums_sentence(stay: Any, events: pd.DataFrame, statics: pd.DataFrame) -> str:
    """Say how a stay's parts add up to its risk."""
    start = f"{percent(expit(stay.baseline_logit))} (logit {signed(stay.baseline_logit)})"
    return (
        f"A stay whose events say nothing starts at {start}. The {counted(len(events), 'event')} add "
        f"{signed(events['attribution'].sum())}, patient and admission {signed(statics['attribution'].sum())}, "
        f"which gives logit {signed(stay.logit)}: {percent(stay.probability)}."
    )


def cohort_sentence(stays: pd.DataFrame) -> str:
    """Say how many stays were explained, how they ended, and whether the parts add up."""
    known, ends = stays["label"].dropna(), "Their outcomes are unknown."
    if len(known):
        of_known = "" if len(known) == len(stays) else " of known outcome"
        ends = f"{int(known.sum()):,} of {counted(len(known), 'stay')}{of_known} ended with death in hospital."
    who = f"{counted(len(stays), 'held-out stay')} of {counted(stays['patient_id'].nunique(), 'patient')}"
    flagged = int((~stays["complete"].astype(bool)).sum())
    adds = f"For all{f' but {flagged}' if flagged else ''} of them the parts add up to the prediction."
    n_events, n_replaced = stays["n_events"].sum(), stays["n_replaced"].sum()
    if n_replaced < n_events:
        adds += f" {n_replaced:,} events, the strongest of each stay, were replaced one by one; in orders of "
        adds += "replacement the others stand as 0."
    return f"{who} with {counted(n_events, 'event')}. {ends} {adds}"


def verdict_on_layers(verdict: pd.DataFrame) -> str:
    """Return what the verdict says of the layers' attention."""
    return " ".join(verdict["sentence"][verdict["check"].str.startswith("layer attention")])


def question_of(row: Any) -> str:
    """Return what a check asks."""
    return capital(wording("asks")[row.check].format(method=METHOD_WORDS.get(row.method, "")))


def checks_sentence(faithfulness: pd.DataFrame, verdict: pd.DataFrame) -> str:
    """Say how many checks are passed, and which are not; none is counted where the verdict warns."""
    if verdict["passed"].eq(False).any():
        return "The verdict warns: how right the explanations are says nothing about patients."
    fallen = [question_of(row) for row in faithfulness[faithfulness["passed"].eq(False)].itertuples()]
    n_judged = int(faithfulness["passed"].notna().sum())
    words = f"{n_judged - len(fallen)} of {n_judged} checks with a threshold are passed."
    return f"{words} Trust the explanations less, since this falls short: {'; '.join(fallen)}." if fallen else words


# ---- The page ----


def png_of(figure: Figure, dpi: int = 100) -> bytes:
    """Return a figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def picture_of(figure: Figure) -> dict[str, Any]:
    """Return a figure as PNG, as its base64, and its question for those who cannot see it."""
    png = png_of(figure, 150)
    question = " ".join(figure.get_suptitle().split())
    return {"png": png, "data": base64.b64encode(png).decode("ascii"), "question": question}


def calibration_of(labels: np.ndarray, risks: np.ndarray) -> pd.DataFrame | None:
    """Return the calibration of (n,) stays of known outcome; None where they are too few, below 20."""
    known = ~np.isnan(labels)
    return calibration_table(labels[known], risks[known]) if known.sum() >= 20 else None


def render_report(tables: dict[str, Any], pictures: dict[str, dict[str, Any]], info: dict[str, Any]) -> str:
    """Return the whole report.html: verdict, cohort, each stay with `why_shown`, the checks, the technical appendix.

    tables: those of an explanation; pictures: what `picture_of` makes of figures, by file name without .png; info:
    text_encoder, data, checkpoint, setting (a sentence: which events the model sees), calibration (of all test stays).
    Every text that goes into the page is escaped: event texts are whatever was typed.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"signed": signed, "percent": percent, "outcome": outcome, "odds": odds}
    environment.filters |= {"plain": plain_number, "question": question_of}
    stays, verdict = tables["stays"], tables["verdict"]
    shown = stays[stays["why_shown"] != ""].sort_values("probability", ascending=False)
    sections = []
    for stay in shown.itertuples():
        own = {
            name: tables[name][tables[name]["icu_stay_id"] == stay.icu_stay_id]
            for name in ("events", "statics", "systems", "decisive")
        }
        push = own["events"]["attribution"]
        own["towards"] = own["events"][push >= FLOOR].nlargest(EVENTS_LISTED, "attribution")
        own["away"] = own["events"][push <= -FLOOR].nsmallest(EVENTS_LISTED, "attribution")
        own["statics"] = own["statics"].sort_values("attribution", key=abs, ascending=False)
        words = {
            "place": f"Percentile {stay.risk_percentile:.0f} of the risks of all held-out stays.",
            "similar": calibration_sentence(info["calibration"], stay.probability),
            "sums": sums_sentence(stay, own["events"], own["statics"]),
            "decisive": decisive_sentence(own["decisive"]),
        }
        sections.append((stay, own, words))
    return environment.get_template("report.html.j2").render(
        appendix=APPENDIX,
        checks=tables["faithfulness"],
        cohort=cohort_sentence(stays),
        disclaimer=DISCLAIMER,
        doubling=math.log(2),
        floor=FLOOR,
        info=info,
        items=tables["items"]["sentence"][tables["items"]["rho"].abs() >= 0.3].tolist(),
        most=EVENTS_LISTED,
        pictures=pictures,
        sections=sections,
        summary=checks_sentence(tables["faithfulness"], verdict),
        verdict=verdict,
        verdict_holds=bool(verdict["passed"].ne(False).all()),
        windows=tables["windows"],
    )
