"""What is said of an explanation: words for numbers and texts, the sentences of checks and findings, and the page."""

import base64
import math
import re
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.special import logit
from scipy.stats import binomtest

from clinical_lf.files import WORDS
from clinical_lf.plots import png_of
from clinical_lf.run_folder import render

FLOOR = 0.05  # logit; what moves it by less does not matter
MIN_PATIENTS = 10  # behind a finding: fewer agree by chance
FEW = 3  # patients; of fewer, which have no interval, nothing is said about the model
EVENTS_LISTED = 10  # of a stay, in the report, on either side
DISCLAIMER = "explains this model, not causes of death"
TYPE_WORDS, METHOD_WORDS, STATIC_WORDS = WORDS["event_types"], WORDS["methods"], WORDS["static"]
LESS_SAID = "Reference Flag Priority Comment Status Form Strength Test Location".split()


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
        numbers = {name: check.found.get(name, math.nan) for name in ("value", "low", "high", "n")}
        interval = "" if pd.isna([numbers["low"], numbers["high"]]).any() else " [{low:.2f}, {high:.2f}]"
        method, says = METHOD_WORDS.get(check.method, ""), WORDS["says"][check.name]
        facts = {"is": ("{value:.2f}" + interval).format(**numbers), "method": method, "Method": method.capitalize()}
        sentence = (says if isinstance(says, str) else says[check.passed is False]).format(**check.found | facts)
        asked = f" (Asked: {check.threshold}: {'yes' if check.passed else 'NO'}.)" if check.threshold else ""
        row = {"check": check.name, "method": check.method, **numbers, "threshold": check.threshold}
        rows.append(row | {"passed": check.passed, "sentence": sentence + asked})
    return pd.DataFrame(rows).astype({"passed": object})


def static_word(column: str) -> str:
    """Return what a static column is called."""
    return STATIC_WORDS.get(column, column.replace("_", " "))


def cut(text: object, width: int) -> str:
    """Return the text on one line of at most `width` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= width else line[: width - 1].rstrip(" ·,(") + "…"


def percent(probability: float, digits: int = 0) -> str:
    """Return `42 %`; never 0 or 100, which no prediction is."""
    if probability < 0.01:
        return "under 1 %"
    return "over 99 %" if probability > 0.99 else f"{100 * probability:.{digits}f} %"


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
    times = math.exp(min(abs(logit), 20))
    if math.isnan(times) or times < 1.05:
        return "–" if math.isnan(times) else "the same"
    number = "over 1,000" if times > 1000 else f"{times:.0f}" if times >= 9.95 else f"{times:.1f}"
    return f"{'×' if logit > 0 else '÷'} {number}"


def counted(number: int, word: str) -> str:
    """Return `1 stay`, `2 stays`."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def plain_number(value: object) -> str:
    """Return a number without needless digits, anything else as it is."""
    number = pd.to_numeric(str(value), errors="coerce")
    return str(value) if pd.isna(number) else f"{number:,.0f}" if abs(number) >= 999.5 else f"{number:.3g}"


def short_text(text: str, width: int = 46) -> str:
    """Return an event's text for one line: what, value, level; `Lactate · 5.2 mmol/L · far above range`."""
    first, *parts = str(text).split(" | ")
    kept = [part for part in parts if part.split(":")[0] not in LESS_SAID]
    kept = kept or [part for part in parts if part.startswith(("Test", "Comment"))][:1]
    said = [re.sub(r"^Lab: | \((Blood, |\d-)[^)]*\)", "", first), *(re.sub(r"^[A-Z]\w+: ", "", part) for part in kept)]
    return cut(" · ".join(said), width)


def removed_in_words(events: pd.DataFrame) -> str:
    """Return `; 620 of 3,000 events taken out one by one`, or nothing where all are."""
    n_removed = events["if_absent"].count()
    return "" if n_removed == len(events) else f"; {n_removed:,} of {len(events):,} events taken out one by one"


def item_kind(row: dict[str, Any]) -> str:
    """Return which sentence of words.yaml an item deserves: a direction only where its interval excludes 0."""
    if row["size"] < FLOOR:
        return "small"
    if row["number_size"] >= FLOOR and (row["rho_low"] > 0 or row["rho_high"] < 0):
        return "average" if row["is_static"] else "typical"
    is_known = row["n_patients"] >= MIN_PATIENTS and abs(row["beyond"]) >= FLOOR
    return "push" if is_known and (row["beyond_low"] > 0 or row["beyond_high"] < 0) else "either"


def item_sentence(row: dict[str, Any]) -> str:
    """Say what an item does: `Lab: Lactate: the higher its number, the higher the predicted risk (...).`"""
    direction, end = "towards" if row["beyond"] > 0 else "away from", "higher" if row["rho"] > 0 else "lower"
    numbers = [signed(row[f"beyond{name}"]) for name in ("", "_low", "_high")]
    mean = "{} [{}, {}] ".format(*numbers) + ("a stay" if row["is_static"] else "against the average event")
    return WORDS["items"][row["kind"]].format(**row, direction=direction, end=end, mean=mean)


def similar_sentence(labels: np.ndarray, risks: np.ndarray, at: int) -> str:
    """Say what became of those of (n,) stays whose risks are nearest to that of the stay at a place, without itself."""
    others = np.flatnonzero(~np.isnan(labels) & (np.arange(len(labels)) != at))
    if len(others) < 20:
        return "There are too few stays to say how far a risk of this size can be trusted."
    distance = np.abs(logit(risks[others].clip(1e-7, 1 - 1e-7)) - logit(risks[at].clip(1e-7, 1 - 1e-7)))
    nearest = others[np.argsort(distance, kind="stable")[: int(np.clip(len(others) // 10, 20, 100))]]
    deaths = int(labels[nearest].sum())
    bounds = binomtest(deaths, len(nearest)).proportion_ci(method="wilson")
    facts = {"n": len(nearest), "deaths": deaths, "low": 100 * bounds.low, "high": 100 * bounds.high}
    facts |= {"least": percent(risks[nearest].min()), "most": percent(risks[nearest].max())}
    return WORDS["page"]["similar"].format(**facts, observed_rate=100 * deaths / len(nearest))


def decisive_sentence(decisive: pd.DataFrame) -> str:
    """Say without which events the decision would be another one; nothing where they hardly move the risk."""
    if decisive.empty:
        return ""
    row, n = decisive.iloc[0], len(decisive)
    if abs(logit(row["probability"]) - logit(row["probability_without"])) < FLOOR:
        return ""
    risks = row[["probability", "probability_without", "threshold"]].astype(float)
    digits = next((digits for digits in range(3) if risks.map(lambda risk: percent(risk, digits)).is_unique), 3)
    texts = [short_text(text, 80) for text in decisive["event_text"]]
    texts = texts[:EVENTS_LISTED] + [f"and {n - EVENTS_LISTED} more"] * (n > EVENTS_LISTED)
    said = {name: percent(risk, digits) for name, risk in risks.items()} | {"texts": "; ".join(texts)}
    return WORDS["page"]["decisive"].format(**said, which="this event" if n == 1 else f"these {n} events")


def of_stay(table: pd.DataFrame, icu_stay_id: int) -> pd.DataFrame:
    """Return the rows of a table that are of one stay."""
    return table[table["icu_stay_id"] == icu_stay_id]


def strongest(events: pd.DataFrame, most: int) -> pd.DataFrame:
    """Return the events that push most towards and away from death, at most so many of each, each by FLOOR or more."""
    towards = events.nlargest(most, "attribution").query(f"attribution >= {FLOOR}")
    away = events.nsmallest(most, "attribution").query(f"attribution <= -{FLOOR}")
    return pd.concat([towards, away[::-1]])


def cohort_sentence(stays: pd.DataFrame) -> str:
    """Say how many stays were explained, how they ended, and whether the parts add up."""
    known, ends = stays["label"].dropna(), "Their outcomes are unknown."
    if len(known):
        of_known = "" if len(known) == len(stays) else " of known outcome"
        ends = f"{int(known.sum()):,} of {counted(len(known), 'stay')}{of_known} ended with death."
    who = f"{counted(len(stays), 'unseen stay')} of {counted(stays['patient_id'].nunique(), 'patient')}"
    flagged = int((~stays["complete"].astype(bool)).sum())
    adds = f"For all{f' but {flagged}' if flagged else ''} of them the parts add up to the prediction."
    return f"{who} with {counted(stays['n_events'].sum(), 'event')}. {ends} {adds}"


def verdict_on_layers(verdict: pd.DataFrame) -> str:
    """Return what the verdict says of the layers' attention."""
    return " ".join(verdict["sentence"][verdict["check"].str.startswith("layer attention")])


def question_of(row: Any) -> str:
    """Return what a check asks."""
    return WORDS["asks"][row.check].format(Method=METHOD_WORDS.get(row.method, "").capitalize())


def checks_sentence(faithfulness: pd.DataFrame, verdict: pd.DataFrame) -> str:
    """Say how many checks are passed, and which are not; none is counted where the verdict warns."""
    is_warned = verdict["passed"].eq(False).any()
    if is_warned or set(faithfulness["check"]) == {"completeness"}:
        return WORDS["page"]["warned" if is_warned else "few"]
    fallen = [question_of(row) for row in faithfulness[faithfulness["passed"].eq(False)].itertuples()]
    n_judged, n_stays = faithfulness["passed"].notna().sum(), faithfulness["n"].min()
    words = WORDS["page"]["fallen" if fallen else "passed"]
    return words.format(passed=n_judged - len(fallen), judged=n_judged, n=n_stays, fallen="; ".join(fallen))


def picture_of(figure: Figure) -> dict[str, Any]:
    """Return a figure as PNG, as its base64, and its question for those who cannot see it."""
    png, question = png_of(figure), " ".join(figure.get_suptitle().split())
    return {"png": png, "data": base64.b64encode(png).decode("ascii"), "question": question}


def render_report(tables: dict[str, Any], pictures: dict[str, dict[str, Any]], info: dict[str, Any]) -> str:
    """Return report.html of an explanation's tables, pictures (`picture_of`, by file name) and info about the run."""
    shown = tables["stays"].query("why_shown != ''").sort_values("probability", ascending=False)
    tables = tables | {"statics": tables["statics"].sort_values("attribution", key=abs, ascending=False)}
    return render("report.html.j2", globals() | locals())  # the page calls the functions above by their names
