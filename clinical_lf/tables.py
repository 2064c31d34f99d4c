"""Stays and their events as flat arrays: the table, the report of its reading, the cohort, and the split by patient."""

import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd

from clinical_lf.files import WORDS, InputError, logger, refusal
from clinical_lf.metrics import fewest

EVENT_TYPES = ("prescription", "procedure_event", "labevent", "microbiology", "ingredient")
OTHER_TYPES = ("vital", "output")  # known, but the model has no input for them: as those of unknown type
# {column: SQL type} of stays and of their events, in the order of the file.
COLUMNS = pd.read_csv(Path(__file__).with_name("columns.csv"), index_col="column")
STAY_COLUMNS, EVENT_COLUMNS = (rows["type"].to_dict() for _, rows in COLUMNS.groupby("table", sort=False))
LABEL = "patient_expired_in_hospital"  # in a table that was read it holds the outcome that was chosen
LABELS = {"hospital": LABEL, "icu": "patient_expired_in_icu", "30d": "patient_expired_within_30d"}  # of a source
STATIC_COLUMNS = (*tuple(STAY_COLUMNS)[7:], "number_of_events")  # what may be used as a static feature
# What a prospective model cannot know at the moment of prediction, and what stands there then.
KNOWN_ONLY_LATER = {"icu_length_of_stay_in_days": np.nan, "last_icu_careunit": None, "discharge_location": None}
# At 80 years float32 holds every fourth minute. The model is given float32, of what is scaled by then.
MINUTES = ("minutes_since_intime", "known_minutes_since_intime", "minutes_to_end")
EVENT_ARRAYS = {"event_type": np.int8, "text": np.int32} | dict.fromkeys(MINUTES, np.float64)


@dataclass(frozen=True)
class StayTable:
    """ICU stays and their events in flat arrays: those of stay i are at `offsets[i]:offsets[i + 1]`, oldest first."""

    stays: pd.DataFrame  # (n_stays): STAY_COLUMNS
    offsets: np.ndarray  # (n_stays + 1) int64
    event_type: np.ndarray  # (n_events) int8: index in EVENT_TYPES, len(EVENT_TYPES) if it is none of them
    text: np.ndarray  # (n_events) int32: index in texts
    minutes_since_intime: np.ndarray  # (n_events) float64
    known_minutes_since_intime: np.ndarray  # (n_events) float64, NaN where nobody knows when the ward knew
    minutes_to_end: np.ndarray  # (n_events) float64: to ICU discharge or death; prospectively to the prediction
    texts: np.ndarray  # (n_texts) of str: distinct texts

    @property
    def lengths(self) -> np.ndarray:
        """(n_stays) numbers of events."""
        return np.diff(self.offsets)

    @property
    def static_columns(self) -> pd.DataFrame:
        """(n_stays): STATIC_COLUMNS. Attention sees shares of events; with their number a model can tell 2 from 20."""
        return self.stays.assign(number_of_events=self.lengths)[list(STATIC_COLUMNS)]

    @property
    def labels(self) -> np.ndarray:
        """(n_stays) float64: 1 died, 0 survived, NaN unknown."""
        return self.stays[LABEL].to_numpy(float)

    @property
    def stay_of_event(self) -> np.ndarray:
        """(n_events) index of the stay of each event."""
        return np.repeat(np.arange(len(self.stays)), self.lengths)

    def take(self, stays: np.ndarray, keep_event: np.ndarray | None = None) -> Self:
        """Return the table of these stays (indices in their order, or a mask) and of events that `keep_event` marks."""
        stays = np.arange(len(self.stays))[stays]
        offsets = np.cumulative_sum(self.lengths[stays], include_initial=True)
        events = np.arange(offsets[-1]) + np.repeat(self.offsets[stays] - offsets[:-1], np.diff(offsets))
        if keep_event is not None:
            is_kept = keep_event[events]
            events, offsets = events[is_kept], np.cumulative_sum(is_kept, include_initial=True)[offsets]
        arrays = {name: getattr(self, name)[events] for name in EVENT_ARRAYS}
        return replace(self, stays=self.stays.iloc[stays].reset_index(drop=True), offsets=offsets, **arrays)

    def with_own_texts(self) -> Self:
        """Return the table without the texts that none of its events has: they need no vector."""
        is_used = np.bincount(self.text, minlength=len(self.texts)) > 0
        number = np.cumsum(is_used, dtype=np.int32) - 1  # of each text that is used: how many of these precede it
        return replace(self, text=number[self.text], texts=self.texts[is_used])

    def fingerprint(self) -> str:
        """Return 32 hex digits of the stays and their events: the same wherever they lie, others once they change."""
        digest = hashlib.md5(usedforsecurity=False)
        of_stays = (self.stays["icu_stay_id"].to_numpy(), self.offsets, self.labels)
        of_events = (self.event_type, self.text, self.minutes_to_end, self.known_minutes_since_intime)
        for array in (*of_stays, *of_events, pd.util.hash_array(np.asarray(self.texts, dtype=object))):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def stacked(tables: Sequence[StayTable]) -> StayTable:
    """Return one table of the stays of all, which have the same texts."""
    stays = pd.concat([table.stays for table in tables], ignore_index=True)
    offsets = np.cumulative_sum(np.concatenate([table.lengths for table in tables]), include_initial=True)
    arrays = {name: np.concatenate([getattr(table, name) for table in tables]) for name in EVENT_ARRAYS}
    return StayTable(stays, offsets, texts=tables[0].texts, **arrays)


@dataclass
class SourceAccount:
    """Where the rows of a table went: read = of other patients + in_stays + lost; what is not known is None."""

    table: str
    read: int
    of_cohort: int | None = None  # of the ICU stays' patients (orders: admissions; procedures, ingredients: stays)
    in_stays: int | None = None
    lost: dict[str, int] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)  # rows of the cohort with something to know, kept or not


@dataclass
class ReadReport:
    """What was left out or mended on reading, by keys of words.yaml's reasons, and where a folder's rows went."""

    counts: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)  # counts of what is no fault
    sources: list[SourceAccount] = field(default_factory=list)

    def log(self, n_stays: int) -> None:
        """Log what was left out of n_stays and more, what is implausible, and where the rows of source tables went."""
        reasons, warnings, total = WORDS["reasons"], WORDS["warnings"], " (counted by table above, too)"
        if self.sources:
            logger.info("Rows        table                         read        used   not used, and why")
        for source in self.sources:
            used = "" if source.in_stays is None else f"{source.in_stays:12,}"
            elsewhere = 0 if source.of_cohort is None else source.read - source.of_cohort
            fates = {"of patients or admissions without an ICU stay": elsewhere} | source.lost | source.noted
            why = ", ".join(f"{count:,} {reason}" for reason, count in fates.items() if count)
            logger.info(f"            {source.table:22s} {source.read:11,}{used}   {why}".rstrip())
            if source.in_stays == 0:
                logger.warning(warnings["table_gives_nothing"].format(source=source))
        dropped = "; ".join(f"{count:,} {reasons[code]}" for code, count in self.counts.items())
        logger.info(f"Cleaned     {dropped or 'nothing'}{total * bool(dropped and self.sources)}")
        fault = ("stay_", "label_after_death")  # codes of no other: a stay that had ended is not what was asked for
        without = {reasons[code]: count for code, count in self.counts.items() if code.startswith(fault)}
        without |= next((of.lost for of in self.sources if of.table == "icu/icustays"), {})  # as without an admission
        if (lost := sum(without.values())) > 0.05 * (lost + n_stays):  # so many are no slips of the pen
            found = {"lost": lost, "read": lost + n_stays, "share": lost / (lost + n_stays)}
            logger.warning(warnings["stays_lost"].format(reasons="; ".join(without), **found))
        for code, what in WORDS["implausible"].items():
            if count := self.notes.get(code):
                logger.warning(warnings["implausible"].format(what=what.format(count=count)))


def columns_with_values(table: StayTable, columns: Sequence[str]) -> list[str]:
    """Return those of the static columns that have any value, and the types of which there is any event."""
    types = [(*EVENT_TYPES, "events of other types")[number] for number in np.unique(table.event_type)]
    return [*table.static_columns[list(columns)].dropna(axis=1, how="all"), *types]


def save_arrays(folder: Path, table: StayTable, report: ReadReport) -> None:
    """Write a table into a new folder: one .npy for each array, the stays and the texts as Parquet."""
    folder.mkdir()
    for name in ("offsets", *EVENT_ARRAYS):
        np.save(folder / f"{name}.npy", getattr(table, name), allow_pickle=False)
    table.stays.to_parquet(folder / "stays.parquet")
    pd.DataFrame({"text": table.texts}).to_parquet(folder / "texts.parquet")
    (folder / "report.json").write_text(json.dumps(asdict(report)), "utf-8")
    sums = {path.name: zlib.crc32(path.read_bytes()) for path in folder.iterdir()}
    (folder / "sums.json").write_text(json.dumps(sums), "utf-8")


def load_arrays(folder: Path, static_features: Sequence[str] = ()) -> tuple[StayTable, ReadReport]:
    """Map into memory what `save_arrays` wrote; OSError if absent, ValueError if damaged or without a feature."""
    sums = json.loads((folder / "sums.json").read_text("utf-8"))
    if any(zlib.crc32((folder / name).read_bytes()) != crc for name, crc in sums.items()):
        raise ValueError("it has changed since it was written")
    arrays = {name: np.asarray(np.load(folder / f"{name}.npy", "c")) for name in ("offsets", *EVENT_ARRAYS)}
    stays, texts = (pd.read_parquet(folder / f"{name}.parquet") for name in ("stays", "texts"))
    if any(stays[name].isna().all() for name in static_features if name in stays):  # it was read for other features
        raise ValueError("a column is missing")
    report = json.loads((folder / "report.json").read_text("utf-8"))
    report["sources"] = [SourceAccount(**account) for account in report["sources"]]
    return StayTable(stays, texts=texts["text"].to_numpy(object), **arrays), ReadReport(**report)


def choose_cohort(
    table: StayTable, first_stay_only: bool = False, observation_hours: float = 0.0, gap_hours: float = 0.0
) -> tuple[StayTable, list[dict[str, Any]]]:
    """Return the stays to analyse, as known by observation_hours if any, and the flow to them; InputError if none."""
    steps, flow = {"all stays with events": table}, list[dict[str, Any]]()
    if first_stay_only:
        earliest = table.stays.sort_values(["icu_intime", "icu_stay_id"]).drop_duplicates("patient_id").index
        steps["first ICU stay of each patient"] = table = table.take(np.sort(earliest))
    if observation_hours > 0:
        least, hours = observation_hours + gap_hours, stay_hours(table)
        no_end = " (or without an end yet)" if np.isinf(hours).any() else ""
        steps[f"still in the ICU and alive {least:g} h after admission{no_end}"] = table = table.take(hours > least)
        table = known_at(table, observation_hours, is_described=True)  # in subgroups; it is never a feature
        steps[f"with an event known {observation_hours:g} h after admission"] = table
    for name, now in steps.items():
        counts = {"stays": len(now.stays), "patients": now.stays["patient_id"].nunique(), "events": len(now.text)}
        died = None if np.isnan(now.labels).all() else int(np.nansum(now.labels))
        flow.append({"name": name} | counts | {"deaths": died})
    if table.stays.empty:
        so_far = "; ".join(f"{step['name']}: {step['stays']}" for step in flow)
        raise InputError(f"no stay is left ({so_far}). Lower --observation-hours or --gap-hours.")
    return table, flow


def stay_hours(table: StayTable) -> np.ndarray:
    """(n_stays) hours from ICU admission to ICU discharge or death, whichever is first; inf without either."""
    final = table.stays[["icu_outtime", "patient_death_time"]].min(axis=1)
    return ((final - table.stays["icu_intime"]).dt.total_seconds() / 3600).fillna(np.inf).to_numpy()


def known_at(table: StayTable, hours: float, is_described: bool = False) -> StayTable:
    """Return what the ward knew `hours` after ICU admission, times up to then; stays of which it knew nothing go."""
    minutes = hours * 60
    known = (table.known_minutes_since_intime <= minutes) & (table.minutes_since_intime <= minutes)  # NaN <= x is False
    part = table.take(np.unique(table.stay_of_event[known]), keep_event=known)
    unknown = {} if is_described else KNOWN_ONLY_LATER
    return replace(part, stays=part.stays.assign(**unknown), minutes_to_end=minutes - part.minutes_since_intime)


class Split(NamedTuple):
    """Indices of the stays of each part."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def has_both_outcomes(table: StayTable, stays: np.ndarray) -> bool:
    """Return whether there are deaths and survivors among these stays."""
    return {0, 1} <= set(table.labels[stays])


def split_by_patient(table: StayTable, seed: int, test_fraction: float = 0.2) -> Split:
    """Return 64 / 16 / 20 % of the patients (80 / 20 / 0 without test_fraction), stratified by whether they died."""
    from sklearn.model_selection import train_test_split

    outcome = pd.Series(table.labels).groupby(table.stays["patient_id"]).max()
    counted = f"{len(outcome)} patients, {int(outcome.sum())} of whom died"
    rest, test = outcome.index, outcome.index[:0]
    try:
        if test_fraction:
            rest, test = train_test_split(rest, test_size=test_fraction, stratify=outcome, random_state=seed)
        train, validation = train_test_split(rest, test_size=0.2, stratify=outcome[rest], random_state=seed)
    except ValueError:
        raise refusal("too_few_patients", patients=counted) from None
    split = Split(*(np.flatnonzero(table.stays["patient_id"].isin(part)) for part in (train, validation, test)))
    if not all(has_both_outcomes(table, part) for part in split if len(part)):
        raise InputError(f"{counted}: a part of the split has one outcome only. Use more patients.")
    return split


def cross_validation_splits(table: StayTable, folds: int, seed: int) -> Iterator[Split]:
    """Yield patient-level folds; a fifth of the other patients of each fold validates."""
    from sklearn.model_selection import StratifiedGroupKFold

    splitter, inner = (StratifiedGroupKFold(n, shuffle=True, random_state=seed) for n in (folds, 5))
    labels, patients = table.labels, table.stays["patient_id"].to_numpy()
    died, needed = pd.Series(labels).groupby(patients).max(), max(folds + 4, 5 + 5 // (folds - 1))
    if (least := fewest(died.to_numpy())) < needed:  # so that some 5 of either outcome are left beside each fold
        raise InputError(f"--cross-validate {folds}: only {least} patients of one outcome; it takes {needed}.")
    for rest, test in splitter.split(labels, labels, patients):
        train, validation = next(inner.split(labels[rest], labels[rest], patients[rest]))
        yield Split(rest[train], rest[validation], test)


def split_of_parts(table: StayTable, part_of_patient: pd.Series, path: str) -> Split:
    """Return the split that a file's train, validation and test by patient make, and say how many are in no part."""
    if twice := int(part_of_patient.index.duplicated().sum()):
        raise refusal("patient_in_two_parts", path=path, count=twice)
    patients = table.stays["patient_id"]
    parts = patients.map(part_of_patient)
    if len(others := patients[~parts.isin(Split._fields)]):
        found = {"stays": len(others), "patients": others.nunique(), "path": path}
        logger.warning(WORDS["warnings"]["patient_in_no_part"].format(**found))
    return Split(*(np.flatnonzero(parts == name) for name in Split._fields))


def split_from_file(table: StayTable, path: Path) -> Split:
    """Return the stays of the patients that a CSV file (patient_id, part) puts into train, validation and test."""
    try:
        rows = pd.read_csv(path, usecols=["patient_id", "part"]).drop_duplicates()
    except (OSError, ValueError) as error:
        raise InputError(f"--split {path}: cannot be read as CSV with patient_id and part ({error}).") from None
    if unknown := ", ".join({*rows["part"].dropna().astype(str)} - {*Split._fields}):
        raise refusal("unknown_split", path=f"--split {path}", names=unknown, known=", ".join(Split._fields))
    split = split_of_parts(table, rows.set_index("patient_id")["part"], f"--split {path}")
    for name, stays in zip(Split._fields, split):
        if not has_both_outcomes(table, stays) and (len(stays) or name != "test"):
            raise InputError(f"--split {path}: its part {name} holds no stays of both outcomes in this data.")
    return split
