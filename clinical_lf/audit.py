"""What tells the outcome that should not: columns, counts and texts, for training and for the explainer's verdict."""

import numpy as np
import pandas as pd

from clinical_lf.files import WORDS
from clinical_lf.items import mask_numbers
from clinical_lf.metrics import fewest
from clinical_lf.tables import LABEL, ReadReport, Split, StayTable, stay_hours

PURE = 0.98  # share of the stays with a text that end alike, above which it knows the outcome
CHANCE = 0.01  # how often chance may flag one of all texts
LEAK_AUROC = 0.95  # no single bedside fact ranks deaths this well; what does knows the outcome
REPAIRED = WORDS["repaired"]  # what is left out or mended on reading, but belongs into the audit


def audit_table(table: StayTable, split: Split, report: ReadReport, settings: dict) -> pd.DataFrame:
    """Return the audit of a run's table and split: `leakage_audit` of its columns, of stays' times, and of counts."""
    hours, record = 24 * table.stays["icu_length_of_stay_in_days"].astype(float), stay_hours(table)
    columns = table.static_columns
    columns["first event, hours after ICU admission"] = table.minutes_since_intime[table.offsets[:-1]] / 60
    columns["last event, hours after ICU admission"] = last = table.minutes_since_intime[table.offsets[1:] - 1] / 60
    # What two columns tell together: a length that ran past the record would know who died before it.
    columns["length of stay less the record's span, hours"] = hours - record
    columns["length of stay less the last event, hours"] = hours - last
    known, end_hours = report.counts | report.notes, settings["observation_hours"] or record[table.stay_of_event]
    counts = dict.fromkeys(WORDS["impossible"], 0) | {code: known[code] for code in REPAIRED if code in known}
    counts["event_known_after_prediction"] = int((table.known_minutes_since_intime > 60 * end_hours).sum())
    counts["admission_with_two_labels"] = int((table.stays.groupby("admission_id")[LABEL].nunique() > 1).sum())
    for unit in ("patient", "admission"):
        ids = np.concatenate([table.stays[f"{unit}_id"].iloc[part].dropna().unique() for part in split])
        counts[f"{unit}_in_two_parts"] = int((np.unique(ids, return_counts=True)[1] > 1).sum())
    if settings["outcome"] != "hospital":  # of two stays of an admission one may end with that death
        del counts["admission_with_two_labels"]
    is_prospective = bool(settings["labels"]) or settings["observation_hours"] > 0
    return leakage_audit(columns.iloc[split.train], table.stays.iloc[split.train], counts, is_prospective)


def leakage_audit(facts: pd.DataFrame, stays: pd.DataFrame, counts: dict[str, int], prospective: bool) -> pd.DataFrame:
    """Return which facts alone tell the outcome of training stays (n), and what cannot be: a row per fact and count.

    Each column of facts (n rows) gets the AUROC of its own small model, cross-validated by patient. counts: how often
    what words.yaml calls `impossible` occurs, or REPAIRED, which are allowed.
    """
    y, rows = stays[LABEL].to_numpy(int), []
    folds = patient_folds(y, stays["patient_id"].to_numpy())
    for name, column in facts.items():
        auroc = single_column_auroc(column, y, folds)
        reason = "Not judged: too few training patients of one outcome to cross-validate." if np.isnan(auroc) else ""
        if flagged := max(auroc, 1 - auroc) > LEAK_AUROC:
            reason = f"Alone it tells deaths from survivors (AUROC {auroc:.2f}): it knows the outcome."
        rows.append((name, "column", auroc, pd.NA, flagged, reason))
    for code, count in counts.items():
        reason = "Left out or mended while reading." if code in REPAIRED else WORDS["impossible"][code]
        if is_expected := code == "event_known_after_prediction" and not prospective:
            reason = f"Expected: the retrospective mode reads the whole stay. {reason}"
        flagged = count > 0 and code not in REPAIRED and not is_expected
        rows.append((WORDS["reasons"][code], "count", np.nan, count, flagged, reason if count else ""))
    audit = pd.DataFrame(rows, columns=["name", "kind", "auroc", "count", "flagged", "reason"])
    return audit.astype({"auroc": float, "count": "Int64", "flagged": bool})


def patient_folds(labels: np.ndarray, patient_ids: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return up to five folds, indices to fit on and to judge by: whole patients, deaths spread; none with too few."""
    from sklearn.model_selection import StratifiedGroupKFold

    n_folds = min(5, fewest(pd.Series(labels).groupby(patient_ids).max().to_numpy()))
    folds = StratifiedGroupKFold(max(2, n_folds), shuffle=True, random_state=0)
    return list(folds.split(labels, labels, patient_ids)) if n_folds > 1 else []


def single_column_auroc(column: pd.Series, labels: np.ndarray, folds: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Return the cross-validated AUROC of one column (n,) alone, labels (n,); NaN where no fold can tell.

    Numbers go through a small tree (missing is a value), all else through smoothed death rates per category.
    """
    from sklearn import metrics, preprocessing, tree

    if pd.api.types.is_numeric_dtype(column):
        values, least = column.to_numpy(dtype=float, na_value=np.nan)[:, None], max(5, len(column) // 50)
        model = tree.DecisionTreeRegressor(max_leaf_nodes=16, min_samples_leaf=least, random_state=0)
        score = model.predict
    else:
        values = column.astype(object).fillna("Unknown").astype(str).to_numpy(dtype=object)[:, None]
        model = preprocessing.TargetEncoder(target_type="binary")
        score = model.transform
    aurocs, pairs = [], []  # by fold: pooled, the folds' own death rates would bias the AUROC below 0.5
    for to_fit, held_out in folds:
        if fewest(labels[to_fit]) and fewest(labels[held_out]):
            model.fit(values[to_fit], labels[to_fit])
            aurocs.append(metrics.roc_auc_score(labels[held_out], score(values[held_out]).ravel()))
            pairs.append(labels[held_out].sum() * (1 - labels[held_out]).sum())
    return float(np.average(aurocs, weights=pairs)) if pairs else np.nan


def audit_texts(table: StayTable) -> pd.DataFrame:
    """Return how each text, numbers masked, tells known outcomes by its presence. Purity: the share that end alike.

    chance: twice Fisher's exact one-sided p-value over patients, times the texts (Bonferroni), where one may tell.
    """
    from scipy.stats import hypergeom

    table = table.take(~np.isnan(table.labels))
    codes, texts = pd.factorize(np.array([mask_numbers(text) for text in table.texts], dtype=object))
    events = pd.DataFrame({"text": codes[table.text], "stay": table.stay_of_event, "hours": table.minutes_to_end / 60})
    known = table.stays[["patient_id"]].assign(died=table.labels.astype(int))
    known["dead"] = known.groupby("patient_id")["died"].transform("max")  # in any stay
    present = events[["text", "stay"]].drop_duplicates().join(known, on="stay")
    people = present.drop_duplicates(["text", "patient_id"]).groupby("text")["dead"].agg(["size", "sum"])
    n_people, n_dead = known.drop_duplicates("patient_id")["dead"].agg(["size", "sum"])
    found = present.groupby("text")["died"].agg(stays="size", deaths="sum")
    (stays, deaths), n, n_deaths = found.to_numpy().T, len(table.stays), table.labels.sum()
    auroc = 0.5 + (deaths / max(n_deaths, 1) - (stays - deaths) / max(n - n_deaths, 1)) / 2
    hours = events.groupby("text")["hours"].median()
    found = found.assign(auroc=auroc, purity=np.maximum(deaths, stays - deaths) / stays, median_hours_to_end=hours)
    alike = lambda of_these, died: np.where(auroc > 0.5, died, of_these - died)  # those that end as the text says
    usual = (n - alike(n, n_deaths)) / max(n, 1)  # share of the other outcome
    tells = (stays - alike(stays, deaths)) / stays < np.minimum(1 - PURE, usual / 10)
    tells |= np.maximum(auroc, 1 - auroc) > LEAK_AUROC
    drawn = np.column_stack([alike(*people.to_numpy().T) - 1, alike(n_people, n_dead), people["size"]])[tells]
    chances = hypergeom.sf(drawn[:, 0], n_people, drawn[:, 1], drawn[:, 2])
    found.loc[tells, "chance"] = np.minimum(1, 2 * len(stays) * chances)
    found.insert(0, "text", texts[found.index])
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
