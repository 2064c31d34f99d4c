"""Make a synthetic ICU table whose truth is known: `sample_train.csv`, and any number of further stays for tests.

    python tests/make_sample.py                          write sample_train.csv beside train.py
    python tests/make_sample.py --stays 2000 --seed 1 --out /tmp/big.csv

No row comes from a patient. The texts have the wording of query.sql and the item names of MIMIC-IV. Whether a stay's
patient dies is drawn from a risk that is a plain sum on the logit:

    logit = INTERCEPT + age effect + sum of the true effects of the stay's events

| kind          | event                                              | true effect on the logit                   |
|---------------|----------------------------------------------------|--------------------------------------------|
| lactate       | lab, far above range (4.1 to 15 mmol/L)            | 2.5 + 1.7 log2(value / 4); 0 if > 24 h to end |
| platelets     | lab, far below range (10 to 70 K/uL)               | 3.4 + 0.9 log2(70 / value)                 |
| vasopressor   | prescription of norepinephrine                     | 4.4                                        |
| blood culture | culture with an organism                           | 4.4                                        |
| liver         | bilirubin AND INR far above range: only together   | 6.8 for the pair, half each; one alone: 0  |
| airway        | invasive ventilation OR cisatracurium: one will do | 4.4, shared equally by those that are there|
| extubation    | procedure                                          | -4.8                                       |
| feeding       | enteral nutrition, an ingredient                   | -4.1                                       |

Effects of events of one kind add up; a stay has at most two of a kind. Kinds are independent of each other, and harm
and protection are about balanced: a sum far from zero would drown in the number of events that attention averages over.
A quarter of all events are decoys (troponin, potassium, defibrillation, ...): alarming to read, without any effect, and
as independent of the label as the rest, the background. Roles of events, in `Sample.events`:

    cause, late_cause (lactate that counts), joint_cause, redundant            true_effect is not 0
    early (lactate too long before the end), lone (half a liver pair)          looks like a cause, true_effect is 0
    decoy, background                                                          true_effect is 0
"""

import argparse
import itertools
from collections import namedtuple
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import yaml
from sklearn.metrics import roc_auc_score

CAUSAL_ROLES = ("cause", "late_cause", "joint_cause", "redundant")
INTERCEPT = -9.9  # gives 20 to 25 % deaths
AGE_EFFECT = 1.5  # logit per 15 years beyond 65
LATE_MINUTES = 24 * 60  # a high lactate counts within this time of the end of the stay
DECOY_SHARE = 0.25  # of all events of a stay, whatever causes it has
TABLE_COLUMNS = pd.read_csv(Path(__file__).parents[1].resolve() / "clinical_lf" / "columns.csv")["column"].tolist()


class Sample(NamedTuple):
    """What `make_sample` returns; `table` and `events` have the same rows in the same order."""

    table: pd.DataFrame  # one row per event, the columns of query.sql flattened
    events: pd.DataFrame  # icu_stay_id, kind, role, true_effect (logit), group ("" or one id per pair and stay)
    stays: pd.DataFrame  # icu_stay_id, patient_id, age_effect, true_logit, true_risk, label
    intercept: float  # of the true logit
    best_auroc: float  # AUROC of the true risk for the labels: no model can be expected to do better


# ---- Texts: the wording of query.sql ----
# A blood test as MIMIC-IV names it, its reference range, and the values it takes here: between the smallest and the
# largest in steps, so that routine values repeat, and their texts with them.
Lab = namedtuple("Lab", "label category unit low high smallest largest step comment", defaults=[""])


def magnitude_level(value, low, high):
    """Where a value lies against its reference range, in the seven words of query.sql."""
    width = high - low
    if value > high:
        if (high > 0 and value > 2 * high) or value > high + 2 * width:
            return "far above range"
        return "above range" if value > 1.25 * high or value > high + 0.5 * width else "slightly above range"
    if value < low:
        if value < low / 2 or value < low - 2 * width:
            return "far below range"
        return "below range" if value < 0.8 * low or value < low - 0.5 * width else "slightly below range"
    return "within range"


def rounded(value, digits):
    """Numbers (n,) to so many digits after the point (n,), below 0 before it; halves away from zero, as SQL rounds."""
    scale = 10.0 ** np.abs(digits)
    shifted = np.where(digits < 0, value / scale, value * scale)
    whole = np.sign(shifted) * np.floor(np.abs(shifted) + 0.5 + 1e-9)
    return np.where(digits < 0, whole * scale, whole / scale)


def first_digit(value):
    """The place of a number's first digit: 0 for 1 to 9, 1 for 10 to 99."""
    return np.floor(np.log10(np.abs(np.where(value == 0, 1, value))) + 1e-9)


def as_charted(lab, values):
    """Values (n,) rounded as query.sql writes them: 2 digits, and near the reference range what the range needs."""
    width = lab.high - lab.low
    near = (values >= lab.low - width) & (values <= lab.high + width)
    own, of_range = 1 - first_digit(values), 1 - first_digit(width)
    return rounded(values, np.where(near, np.maximum(own, of_range), own))


def lab_text(lab, value, comment=""):
    """One result, e.g. `Lab: Lactate (Blood, Blood Gas) | Value: 5.2 mmol/L | Reference: 0.5-2 | Level: ...`."""
    level = magnitude_level(value, lab.low, lab.high)
    said = f"Lab: {lab.label} (Blood, {lab.category}) | {f'Value: {value:.6g} {lab.unit}'.rstrip()}"
    said += f" | Reference: {lab.low:g}-{lab.high:g} | Level: {level}" + " | Flag: abnormal" * (level != "within range")
    return said + (f" | Comment: {comment}" if comment else "")


def lab_texts(rng, lab, values):
    """Texts (object array) of an array of values; each distinct text is written once, which keeps this fast."""
    value_list, value_index = np.unique(values, return_inverse=True)
    comment_index = (rng.random(len(values)) < 0.5).astype(int)
    code, where = np.unique(value_index * 2 + comment_index, return_inverse=True)
    texts = [lab_text(lab, value_list[c // 2], lab.comment if c % 2 else "") for c in code]
    return np.array(texts, dtype=object)[where]


def draw_values(rng, lab, n):
    """`n` values of a test, more of them near the smaller end when the range spans more than a factor of 4."""
    position = rng.random(n)
    if lab.smallest > 0 and lab.largest / lab.smallest > 4:
        values = lab.smallest * (lab.largest / lab.smallest) ** position
    else:
        values = lab.smallest + (lab.largest - lab.smallest) * (position + rng.random(n)) / 2
    return as_charted(lab, np.clip(np.round(np.round(values / lab.step) * lab.step, 3), lab.smallest, lab.largest))


def procedure_text(label, category, minutes, location=""):
    """One procedure, with the status that nearly all of MIMIC-IV's have; what is over in a moment has no duration."""
    place = f" | Location: {location}" if location else ""
    written = rounded(minutes, -first_digit(minutes)) if minutes > 60 else minutes
    length = f" | for {written:.0f} min" if minutes > 1 else ""
    return f"Procedure: {label} ({category}){place} | Status: FinishedRunning{length}"


# ---- The catalogue: what happens in an ICU ----
CATALOGUE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
LABS = {role: [Lab(*row) for row in rows] for role, rows in CATALOGUE["labs"].items()}
LACTATE, PLATELETS, BILIRUBIN, INR = LABS["cause"]
FREE_TEXT_LABS = np.array(CATALOGUE["free_text_labs"], dtype=object)


# ---- Events: functions of an array of events give (texts, minutes until all that the text says is known) ----
def lab_events(rng, lab, n):
    """`n` results of one test; also returns their values."""
    values = draw_values(rng, lab, n)
    return lab_texts(rng, lab, values), lab_delay(rng, n), values


def lab_delay(rng, n):
    """Results come half an hour to three hours after the blood was drawn; for 1 % the time was not stored."""
    return np.where(rng.random(n) < 0.01, np.nan, rng.integers(30, 181, n))


def prescription_events(rng, kind, n):
    """`n` orders of one kind; an order is known when it is made."""
    return rng.choice(np.array(CATALOGUE["prescriptions"][kind], dtype=object), n), np.zeros(n)


def procedure_events(rng, kind, n):
    """`n` procedures of one kind; their text tells how long they took, so they are known at their end."""
    variants, weight = [], []
    for label, category, durations, locations in CATALOGUE["procedures"][kind]:
        ways = list(itertools.product(durations, locations))
        variants += [(procedure_text(label, category, minutes, location), minutes) for minutes, location in ways]
        weight += [1 / len(ways)] * len(ways)  # procedures are equally frequent, however many variants there are
    return pick(rng, variants, n, weight)


def culture_events(rng, kind, n):
    """`n` cultures of one kind, reported after one to three days; for 3 % that time was not stored."""
    delay = np.where(rng.random(n) < 0.03, np.nan, rng.integers(24 * 60, 72 * 60 + 1, n))
    return rng.choice(np.array(CATALOGUE["cultures"][kind], dtype=object), n), delay


def ingredient_events(rng, kind, n):
    """`n` ingredients of one kind; a text tells the status, so it is known at the end."""
    variants, statuses = [], ("FinishedRunning", "FinishedRunning", "ChangeDose/Rate")
    for label, unit, rates in CATALOGUE["ingredients"][kind]:
        if not rates:
            texts = [f"Amount: {amount} {unit} | Status: FinishedRunning" for amount in (30, 60, 100, 250)]
            variants += [(f"Ingredient: {label} | {text}", 1) for text in texts]
        for rate, minutes, status in itertools.product(rates, (60, 120, 240), statuses):
            written = rounded(rate, 1 - first_digit(rate))
            variants.append((f"Ingredient: {label} | Rate: {written:.6g} mL/hour | Status: {status}", minutes))
    return pick(rng, variants, n)


def pick(rng, variants, n, weight=None):
    """`n` draws of (text, minutes) pairs -> texts (n,), minutes (n,)."""
    edges = np.cumsum(np.ones(len(variants)) if weight is None else weight)
    where = np.minimum(np.searchsorted(edges, rng.random(n) * edges[-1], side="right"), len(variants) - 1)
    texts, minutes = zip(*variants)
    return np.array(texts, dtype=object)[where], np.array(minutes, dtype=float)[where]


def part(stay, event_type, texts, delay, kind, role, effect=0.0, minutes=np.nan, group=""):
    """Events of one kind as a table; scalars are repeated. `minutes` to the end of the stay, NaN: to be drawn."""
    columns = dict(stay=stay, event_type=event_type, event_text=texts, delay=delay, kind=kind, role=role)
    return pd.DataFrame(columns | dict(true_effect=effect, minutes=minutes, group=group))


# In the order in which `fill` takes them.
MAKERS = {"ingredient": ingredient_events, "prescription": prescription_events, "procedure_event": procedure_events}
MAKERS["microbiology"] = culture_events


# ---- Planting ----
def stays_with(rng, n_stays, probability, second=0.0):
    """Stay number of every event of a kind: a stay has it with `probability`, and then twice with `second`."""
    return np.repeat(np.arange(n_stays), (rng.random(n_stays) < probability) * (1 + (rng.random(n_stays) < second)))


def plant_lactate(rng, duration):
    """High lactates. A tenth of those in stays of more than 36 h lie over 30 h before the end and do not count."""
    stay = stays_with(rng, len(duration), 0.34, second=0.2)
    texts, delay, values = lab_events(rng, LACTATE, len(stay))
    early = (duration[stay] > 36 * 60) & (rng.random(len(stay)) < 0.1)
    # nothing between 22 and 30 hours: the truth should not hang on minutes
    start, stop = np.where(early, 30 * 60, 0), np.where(early, duration[stay], np.minimum(duration[stay], 22 * 60))
    minutes = np.floor(start + (stop - start) * rng.random(len(stay)))
    effect = np.where(minutes <= LATE_MINUTES, 2.5 + 1.7 * np.log2(values / 4), 0)
    return part(stay, "labevent", texts, delay, "lactate", np.where(early, "early", "late_cause"), effect, minutes)


def plant_simple(rng, n_stays):
    """Platelets far below range, the fewer the worse; then the kinds whose every event has the same effect."""
    stay = stays_with(rng, n_stays, 0.32, second=0.2)
    texts, delay, values = lab_events(rng, PLATELETS, len(stay))
    yield part(stay, "labevent", texts, delay, "platelets", "cause", 3.4 + 0.9 * np.log2(70 / values))
    for kind, event_type, probability, second, effect in CATALOGUE["simple"]:
        stay = stays_with(rng, n_stays, probability, second)
        yield part(stay, event_type, *MAKERS[event_type](rng, kind, len(stay)), kind, "cause", effect)


def plant_liver(rng, n_stays):
    """Bilirubin and INR, which count only together: 20 % of stays have both, 2 % only the one, 2 % only the other."""
    draw = rng.random(n_stays)
    both = draw < 0.20
    for lab, has in ((BILIRUBIN, draw < 0.22), (INR, both | ((draw >= 0.22) & (draw < 0.24)))):
        stay = np.flatnonzero(has)
        texts, delay, _ = lab_events(rng, lab, len(stay))
        role, effect = np.where(both[stay], "joint_cause", "lone"), np.where(both[stay], 6.8 / 2, 0.0)
        yield part(stay, "labevent", texts, delay, "liver", role, effect, group=np.where(both[stay], "liver", ""))


def plant_airway(rng, n_stays):
    """Ventilation or a paralysing drug: 32 % of stays have one, a quarter of these have both, which adds nothing."""
    draw = rng.random(n_stays)
    ventilated, paralysed = draw < 0.20, (draw >= 0.12) & (draw < 0.32)
    effect = 4.4 / np.maximum(ventilated.astype(int) + paralysed, 1)
    for event_type, has in (("procedure_event", ventilated), ("prescription", paralysed)):
        stay = np.flatnonzero(has)
        texts, delay = MAKERS[event_type](rng, "airway", len(stay))
        yield part(stay, event_type, texts, delay, "airway", "redundant", effect[stay], group="airway")


def fill(rng, role, count):
    """Events without effect: `count` (n_stays,) of them, of all types. `role` is "decoy" or "background".

    Of the background's lab results 6 % are free text without a number.
    """
    stay = np.repeat(np.arange(len(count)), count)
    edges = {"background": (0.52, 0.90, 0.955, 0.985), "decoy": (0.58, 0.74, 0.88, 0.95)}[role]
    type_index = np.searchsorted(edges, rng.random(len(stay)), side="right")
    tested = stay[type_index == 0]
    lab_index = rng.integers(0, len(LABS[role]), len(tested))
    if role == "background":
        lab_index[rng.random(len(tested)) < 0.06] = -1
    for index, lab in enumerate(LABS[role]):
        chosen = tested[lab_index == index]
        yield part(chosen, "labevent", *lab_events(rng, lab, len(chosen))[:2], role, role)
    chosen = tested[lab_index == -1]
    yield part(chosen, "labevent", rng.choice(FREE_TEXT_LABS, len(chosen)), lab_delay(rng, len(chosen)), role, role)
    for index, (event_type, maker) in enumerate(MAKERS.items(), start=1):
        chosen = stay[type_index == index]
        yield part(chosen, event_type, *maker(rng, role, len(chosen)), role, role)


def plant_events(rng, n_stays):
    """All events of all stays -> (events, duration in minutes (n_stays,)). Only lactate needs to know the duration."""
    causes = [*plant_simple(rng, n_stays), *plant_liver(rng, n_stays), *plant_airway(rng, n_stays)]
    n_causes = np.bincount(np.concatenate([cause["stay"] for cause in causes]), minlength=n_stays)
    # much happens in long stays; the label is tied to the length only weakly, since harm and protection both count
    days = np.clip(2.3 * np.exp(0.7 * rng.standard_normal(n_stays) + 0.04 * (n_causes - 4)), 0.5, 20)
    duration = np.round(days * 24 * 60)
    # most stays have 20 to 35 events and a few up to 200: attention sees shares of events, effects are counts
    size = 22 * days**0.1 * np.exp(0.15 * rng.standard_normal(n_stays))
    size *= np.where(rng.random(n_stays) < 0.01, 1 + 4 * rng.random(n_stays), 1)
    size = np.clip(np.round(size), 20, 200).astype(int)
    lactate = plant_lactate(rng, duration)
    # the causes take the place of other events, so that the number of events tells nothing about the label
    n_fill = size - n_causes - np.bincount(lactate["stay"], minlength=n_stays)
    n_decoys = np.minimum(rng.binomial(size, DECOY_SHARE), n_fill)
    filled = [*fill(rng, "decoy", n_decoys), *fill(rng, "background", n_fill - n_decoys)]
    events = pd.concat([lactate, *causes, *filled], ignore_index=True)
    anywhere = np.floor(rng.random(len(events)) * duration[events["stay"]])
    events["minutes"] = events["minutes"].fillna(pd.Series(anywhere)).astype(int)
    return events, duration.astype(int)


# ---- Stays, admissions, patients ----
def draw_labels(rng, events, n_stays, effect_scale):
    """Age, true logit and risk, and the label drawn from it -> DataFrame (n_stays rows)."""
    age = np.clip(np.round(65 + 15 * rng.standard_normal(n_stays)), 18, 91).astype(int)
    age_effect = effect_scale * AGE_EFFECT * (age - 65) / 15
    event_effect = np.bincount(events["stay"], weights=events["true_effect"], minlength=n_stays)
    logit = effect_scale * INTERCEPT + age_effect + event_effect
    risk = 1 / (1 + np.exp(-logit))
    label = (rng.random(n_stays) < risk).astype(int)
    return pd.DataFrame(dict(patient_age=age, age_effect=age_effect, true_logit=logit, true_risk=risk, label=label))


def pair_up(rng, stays, share=0.27):
    """Joins stays to patients after their labels were drawn, so that a label still follows from its own stay alone.

    Two stays of one patient have the same age; two of one admission also the same label, as MIMIC-IV has one per
    admission; and no patient who died comes back. Returns the number of the first stay of each second stay, else -1,
    and whether both belong to one admission.
    """
    order = np.lexsort((rng.random(len(stays)), stays["patient_age"]))
    first, second = order[:-1:2], order[1::2]
    age, label = stays["patient_age"].to_numpy(), stays["label"].to_numpy()
    first, second = np.where(label[first] > label[second], (second, first), (first, second))  # survivors come first
    same_admission = (label[first] == 1) | ((label[first] == label[second]) & (rng.random(len(first)) < 0.4))
    chosen = rng.permutation(np.flatnonzero(age[first] == age[second]))[: round(share * len(stays))]
    earlier, shares_admission = np.full(len(stays), -1), np.zeros(len(stays), dtype=bool)
    earlier[second[chosen]], shares_admission[second[chosen]] = first[chosen], same_admission[chosen]
    return earlier, shares_admission


def choose(rng, name, n):
    """`n` draws of a static column."""
    shares = CATALOGUE["shares"][name]
    return pick(rng, [(option, 0) for option in shares], n, list(shares.values()))[0]


def add_people(rng, stays, earlier, shares_admission):
    """Ids and static columns: drawn per stay, then copied from the first stay of the same patient or admission."""
    n, own = len(stays), np.arange(len(stays))
    patient, admission = np.where(earlier >= 0, earlier, own), np.where(shares_admission, earlier, own)
    stays["patient_id"] = 10_000_000 + 7 * np.unique(patient, return_inverse=True)[1]
    stays["admission_id"] = 20_000_000 + 7 * np.unique(admission, return_inverse=True)[1]
    stays["icu_stay_id"] = 30_000_000 + 7 * own
    for name in ("patient_gender", "patient_race", "marital_status", "insurance"):
        stays[name] = choose(rng, name, n)[patient]
    for name in ("admission_type", "admission_location", "discharge_location"):
        stays[name] = choose(rng, name, n)[admission]
    stays.loc[stays["label"] == 1, "discharge_location"] = "DIED"
    stays["first_icu_careunit"] = choose(rng, "careunit", n)
    stays["last_icu_careunit"] = np.where(rng.random(n) < 0.1, choose(rng, "careunit", n), stays["first_icu_careunit"])


def add_times(rng, stays, duration, earlier, shares_admission):
    """ICU times and death. The stay ends (`final`) with ICU discharge or death, which is what `duration` counts to.

    Three in five of those who die do so in the ICU, the others in hospital, up to twelve days after it.
    """
    n, has_earlier = len(stays), earlier >= 0
    start = rng.integers(0, 80 * 365 * 24 * 60, n)  # minutes since 2110: MIMIC-IV shifts its dates, too
    gap = np.where(shares_admission, rng.integers(24 * 60, 5 * 24 * 60, n), rng.integers(30, 300, n) * 24 * 60)
    dies, in_icu = stays["label"].to_numpy() == 1, rng.random(n) < 0.6
    comes_back = np.zeros(n, dtype=bool)  # to the ICU in the same admission: such a stay ends alive
    comes_back[earlier[shares_admission]] = True
    in_icu &= dies & ~comes_back
    after_final = np.where(in_icu, rng.integers(0, 61, n), 0)  # the bed is left a little later
    start[has_earlier] = (start + duration + after_final)[earlier[has_earlier]] + gap[has_earlier]
    final = start + duration
    death = np.where(in_icu, final, final + rng.integers(6 * 60, 12 * 24 * 60, n)).astype(float)
    death[earlier[shares_admission]] = death[shares_admission]
    stays["final"] = clock(final)
    stays["icu_intime"], stays["icu_outtime"] = clock(start), clock(final + after_final)
    stays["patient_death_time"] = clock(np.where(dies, death, np.nan))
    stays["icu_length_of_stay_in_days"] = np.round(duration / (24 * 60), 4)


def clock(minutes):
    """Minutes since 2110 -> datetime64[s]; NaN -> NaT."""
    times = np.datetime64("2110-01-01T00:00:00", "s") + np.nan_to_num(minutes).astype("int64").astype("timedelta64[m]")
    return np.where(np.isnan(minutes), np.datetime64("NaT", "s"), times)


# ---- Everything together ----
def make_sample(n_stays=300, seed=0, effect_scale=1.0):
    """A table of `n_stays` synthetic ICU stays (20 to 200 events each) with its truth, the same for the same arguments.

    `effect_scale` multiplies the intercept and every effect: risks near 0 and 1 are easy to tell apart, but a model has
    no reason to learn how far beyond 4 a logit lies, so that sizes of effects are better compared with a scale below 1.
    Two seeds share ids, so tables of two seeds should not be put into one. Raises ValueError below 10 stays.
    """
    if n_stays < 10:
        raise ValueError(f"n_stays is {n_stays}; 10 is the least for which both outcomes can be expected.")
    rng = np.random.default_rng(seed)
    events, duration = plant_events(rng, n_stays)
    events["true_effect"] *= effect_scale
    stays = draw_labels(rng, events, n_stays, effect_scale)
    earlier, shares_admission = pair_up(rng, stays)
    add_people(rng, stays, earlier, shares_admission)
    add_times(rng, stays, duration, earlier, shares_admission)
    order = {"stay": True, "minutes": False, "event_type": True, "event_text": True}
    events = events.sort_values(list(order), ascending=list(order.values()), kind="stable", ignore_index=True)
    events.insert(0, "icu_stay_id", stays["icu_stay_id"].to_numpy()[events["stay"]])
    truth = events[["icu_stay_id", "kind", "role", "true_effect", "group"]].copy()
    truth["group"] += np.where(truth["group"] != "", " " + truth["icu_stay_id"].astype(str), "")
    of_stays = stays[["icu_stay_id", "patient_id", "age_effect", "true_logit", "true_risk", "label"]].copy()
    best = roc_auc_score(stays["label"], stays["true_risk"]) if stays["label"].nunique() == 2 else float("nan")
    return Sample(build_table(stays, events), truth, of_stays, effect_scale * INTERCEPT, float(best))


def build_table(stays, events):
    """The flat table, one row per event, in the order of `events`."""
    rows = stays.rename(columns={"label": "patient_expired_in_hospital"}).loc[events["stay"]].reset_index(drop=True)
    rows["event_time"] = rows["final"] - events["minutes"].to_numpy().astype("timedelta64[m]").astype("timedelta64[s]")
    known = (events["delay"].fillna(0) * 60).to_numpy().astype("timedelta64[s]")
    rows["event_known_time"] = (rows["event_time"] + known).where(events["delay"].notna())
    rows["event_type"], rows["event_text"] = events["event_type"], events["event_text"]
    rows["relative_time_to_final_event"] = events["minutes"]
    return rows[TABLE_COLUMNS]


def write_csv(sample, path):
    """Writes the table; the same bytes on every machine."""
    sample.table.to_csv(path, index=False, date_format="%Y-%m-%d %H:%M:%S", lineterminator="\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stays", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "sample_train.csv")
    arguments = parser.parse_args()
    sample = make_sample(arguments.stays, arguments.seed)
    write_csv(sample, arguments.out)
    size = f"{len(sample.stays):,} stays, {len(sample.table):,} events, {sample.stays['label'].mean():.1%} died"
    print(f"{arguments.out}: {size}; best AUROC any model can reach (true risk): {sample.best_auroc:.3f}")
