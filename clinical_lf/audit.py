"""What tells the outcome that should not: columns, counts and texts, for training and for the explainer's verdict."""

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from clinical_lf.files import WORDS
from clinical_lf.items import mask_numbers
from clinical_lf.metrics import fewest
from clinical_lf.tables import LABEL, ReadReport, Split, StayTable, stay_hours

PURE = 0.98  # share of the stays with a text that end alike, above which it knows the outcome
CHANCE = 0.01  # how often chance may flag one of all texts
LEAK_AUROC = 0.95  # no single bedside fact ranks deaths this well; what does knows the outcome
# What is left out or mended on reading, but belongs into the audit.
REPAIRED = "stay_without_end stay_after_death stay_with_death_and_label_0 length_recomputed event_after_the_end".split()


def audit_table(
    table: StayTable, split: Split, report: ReadReport, observation_hours: float = 0.0, prospective: bool = False
) -> pd.DataFrame:
    """Return the audit of a table and its split: `leakage_audit` of its columns, of stays' times, and of counts."""
    part = np.empty(len(table.stays), dtype=object)
    for name, members in split._asdict().items():
        part[members] = name
    stays, record = table.stays.assign(part=part), stay_hours(table)
    hours = 24 * stays["icu_length_of_stay_in_days"].astype(float)
    columns = table.static_columns
    columns["first event, hours after ICU admission"] = table.minutes_since_intime[table.offsets[:-1]] / 60
    columns["last event, hours after ICU admission"] = last = table.minutes_since_intime[table.offsets[1:] - 1] / 60
    # What two columns tell together: a length that ran past the record would know who died before it.
    columns["length of stay less the record's span, hours"] = hours - record
    columns["length of stay less the last event, hours"] = hours - last
    known, end_hours = report.counts | report.notes, observation_hours or record[table.stay_of_event]
    counts = dict.fromkeys(WORDS["impossible"], 0) | {code: known[code] for code in REPAIRED if code in known}
    counts["event_known_after_prediction"] = int((table.known_minutes_since_intime > 60 * end_hours).sum())
    counts["admission_with_two_labels"] = int((stays.groupby("admission_id")[LABEL].nunique() > 1).sum())
    for unit in ("patient", "admission"):
        counts[f"{unit}_in_two_parts"] = int((stays.groupby(f"{unit}_id")["part"].nunique() > 1).sum())
    return leakage_audit(columns, table.labels, stays["patient_id"].to_numpy(), part == "train", counts, prospective)


def leakage_audit(
    columns: pd.DataFrame,
    labels: ArrayLike,
    patient_ids: ArrayLike,
    is_train: np.ndarray,
    counts: dict[str, int],
    prospective: bool = False,
) -> pd.DataFrame:
    """Return what, alone, tells the outcome, and what cannot be: a row per column (n rows), and per count.

    Each column gets the AUROC of its own small model, cross-validated on training patients. counts: how often what
    words.yaml calls `impossible` occurs, or REPAIRED, which are allowed.
    """
    y, patients = np.asarray(labels)[is_train].astype(int), np.asarray(patient_ids)[is_train]
    folds, rows = patient_folds(y, patients), []
    for name in columns:
        auroc, reason = single_column_auroc(columns.loc[is_train, name], y, folds), ""
        flagged = max(auroc, 1 - auroc) > LEAK_AUROC
        if np.isnan(auroc):
            reason = "Not judged: too few training patients of one outcome to cross-validate."
        elif flagged:
            reason = f"Alone it tells deaths from survivors (AUROC {auroc:.2f}): it knows the outcome."
        rows.append((name, "column", auroc, pd.NA, flagged, reason))
    for code, count in counts.items():
        is_excused, reason = code in REPAIRED, WORDS["impossible"].get(code, "This should not occur.")
        if is_excused:
            reason = "Left out or mended while reading."
        elif code == "event_known_after_prediction" and not prospective:
            is_excused, reason = True, f"Expected: the retrospective mode reads the whole stay. {reason}"
        flagged = count > 0 and not is_excused
        rows.append((WORDS["reasons"][code], "count", np.nan, count, flagged, reason if count else ""))
    audit = pd.DataFrame(rows, columns=["name", "kind", "auroc", "count", "flagged", "reason"])
    return audit.astype({"auroc": float, "count": "Int64", "flagged": bool})


def patient_folds(labels: np.ndarray, patient_ids: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return up to five folds, indices to fit on and to judge by: whole patients, deaths spread; none with too few."""
    from sklearn.model_selection import StratifiedGroupKFold

    n_folds = min(5, fewest(pd.Series(labels).groupby(patient_ids).max().to_numpy()))
    if n_folds < 2:
        return []
    return list(StratifiedGroupKFold(n_folds, shuffle=True, random_state=0).split(labels, labels, patient_ids))


def single_column_auroc(column: pd.Series, labels: np.ndarray, folds: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Return the cross-validated AUROC of one column (n,) alone, labels (n,); NaN where no fold can tell.

    Numbers and times go through a small tree (missing is a value), all else through smoothed death rates per category.
    """
    from sklearn import metrics, preprocessing, tree

    is_time = pd.api.types.is_datetime64_any_dtype(column)
    if is_time or pd.api.types.is_numeric_dtype(column):
        numbers = (column - column.min()).dt.total_seconds() if is_time else column
        values = numbers.to_numpy(dtype=float, na_value=np.nan)[:, None]
        least = max(5, len(values) // 50)
        model = tree.DecisionTreeRegressor(max_leaf_nodes=16, min_samples_leaf=least, random_state=0)
        score = model.predict
    else:
        values = column.astype(object).fillna("Unknown").astype(str).to_numpy(dtype=object)[:, None]
        model = preprocessing.TargetEncoder(target_type="binary")
        score = model.transform
    pairs, total = 0, 0.0  # by fold: pooled, the folds' own death rates would bias the AUROC below 0.5
    for to_fit, held_out in folds:
        n_deaths = labels[held_out].sum()
        fold_pairs = n_deaths * (len(held_out) - n_deaths)
        if fold_pairs and len(np.unique(labels[to_fit])) == 2:
            model.fit(values[to_fit], labels[to_fit])
            pairs += fold_pairs
            total += fold_pairs * metrics.roc_auc_score(labels[held_out], score(values[held_out]).ravel())
    return float(total / pairs) if pairs else np.nan


def audit_texts(table: StayTable) -> pd.DataFrame:
    """Return how each text, numbers masked, tells known outcomes by its presence. Purity: the share that end alike.

    chance: twice Fisher's exact one-sided p-value over patients, times the texts (Bonferroni), where one may tell.
    """
    from scipy.stats import hypergeom

    table = table.take(~np.isnan(table.labels))
    codes, texts = pd.factorize(np.array([mask_numbers(text) for text in table.texts], dtype=object))
    events = pd.DataFrame({"text": codes[table.text], "stay": table.stay_of_event, "hours": table.minutes_to_end / 60})
    present = events[["text", "stay"]].drop_duplicates()
    died = present.assign(died=table.labels[present["stay"]]).groupby("text")["died"]
    stays, deaths = died.size(), died.sum()  # with each text
    found = pd.DataFrame({"text": texts[stays.index], "stays": stays, "deaths": deaths.astype(int)})
    survivors, n_deaths, n_survivors = stays - deaths, table.labels.sum(), (1 - table.labels).sum()
    found["auroc"] = auroc = 0.5 + (deaths / max(n_deaths, 1) - survivors / max(n_survivors, 1)) / 2
    found["purity"] = np.maximum(deaths, survivors) / stays
    found["median_hours_to_end"] = events.groupby("text")["hours"].median()
    means_death = auroc > 0.5
    usual = np.where(means_death, n_survivors, n_deaths) / max(len(table.stays), 1)  # share of the other outcome
    is_pure = np.where(means_death, survivors, deaths) / stays < np.minimum(1 - PURE, usual / 10)
    tells = is_pure | (np.maximum(auroc, 1 - auroc) > LEAK_AUROC)
    patient, patients = pd.factorize(table.stays["patient_id"])
    is_dead = np.bincount(patient, table.labels, len(patients)) > 0  # with any stay
    people = present.assign(patient=patient[present["stay"]]).drop_duplicates(["text", "patient"])
    people = people.assign(died=is_dead[people["patient"]]).groupby("text")["died"]
    own = np.where(means_death, people.sum(), people.size() - people.sum())
    n_own = np.where(means_death, is_dead.sum(), (~is_dead).sum())
    chances = hypergeom.sf(own[tells] - 1, len(patients), n_own[tells], people.size()[tells])
    found.loc[tells, "chance"] = np.minimum(1, 2 * len(stays) * chances)
    found["flagged"] = found["chance"] < CHANCE
    return found.sort_values(["flagged", "stays"], ascending=False, kind="stable", ignore_index=True)


def leaking_texts(table: StayTable) -> dict[str, float]:
    """Return the flagged texts of `audit_texts` and their AUROC, either way."""
    found = audit_texts(table).query("flagged")
    return dict(zip(found["text"], np.maximum(found["auroc"], 1 - found["auroc"])))


def audit_summary(audit: pd.DataFrame) -> str:
    """Return one line for the log of every run: how much was checked and what was flagged, by name."""
    aurocs = audit[audit["kind"] != "count"].set_index("name")["auroc"]
    found = []
    for row in audit[audit["flagged"]].itertuples():
        found.append(f"{row.count} {row.name}" if row.kind == "count" else f"{row.name} (AUROC {row.auroc:.2f} alone)")
    verdict = f"FLAGGED: {', '.join(found)}" if found else "nothing flagged"
    if not found and aurocs.notna().any():
        verdict += f" (the most telling alone: {aurocs.idxmax()}, AUROC {aurocs.max():.2f})"
    unjudged = f"; {aurocs.isna().sum()} columns not judged, too few deaths" if aurocs.isna().any() else ""
    return f"Leakage audit of {len(aurocs)} columns and {len(audit) - len(aurocs)} counts: {verdict}{unjudged}"
