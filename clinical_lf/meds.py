"""A MEDS data set (Medical Event Data Standard): each label row is one stay that ends with its prediction."""

import re
from pathlib import Path
from typing import NamedTuple

import duckdb
import numpy as np
import pandas as pd
from duckdb import DuckDBPyConnection

from clinical_lf import duck, tables
from clinical_lf.files import WORDS, logger, parquet_files, refusal
from clinical_lf.tables import LABEL, SourceAccount, Split, StayTable

QUERY_FILE = Path(__file__).resolve().parent.parent / "meds.sql"
MADE_LABELS = re.compile(r"mortality-(in-hospital|in-icu|within-30d)@(\d{1,6}(?:\.\d{1,6})?)h")
CSV = {path.stem[5:]: pd.read_csv(path, na_filter=False) for path in Path(__file__).parent.glob("meds_*.csv")}


class MedsTask(NamedTuple):
    """Which labels of a MEDS data set, and how many hours before the prediction are read (0: all that there are)."""

    labels: str
    history_hours: float = 0.0
    gap_hours: float = 0.0

    @property
    def files(self) -> list[Path]:
        """The label file, or those of a folder of them; none where labels are made, or the path is wrong."""
        path = Path(self.labels)
        return parquet_files(path) if path.is_dir() else [path] * path.is_file()


def is_meds(folder: Path) -> bool:
    """Return whether a folder holds a MEDS data set: `metadata/codes.parquet`, or Parquet files in `data/`."""
    return (folder / "metadata" / "codes.parquet").is_file() or bool(parquet_files(folder / "data"))


def make_view(con: DuckDBPyConnection, table: str, paths: list[Path], may_be_empty: str = "") -> pd.Series:
    """Make a view of a table of meds_columns.csv, of files whose types may differ; return how many times have a zone.

    InputError names the file that lacks a column, or has values unfit for its type.
    """
    columns = CSV["columns"].query("table == @table").set_index("column")
    columns.loc[columns.index == may_be_empty, "must"] = "false"
    known, place = columns["names"].str.split("|").explode(), "file_of_row AS place, file_row_number + 1 AS number"
    options = "hive_partitioning = false, filename = 'file_of_row', file_row_number = true"
    rows_of = lambda files: f"read_parquet({duck.file_list(files)}, {options})"
    read, schemas = [], pd.Series({path: str(duck.column_types(con, rows_of([path]))) for path in paths})
    for members in schemas.groupby(schemas, sort=False).groups.values():
        names = [*duck.column_types(con, rows_of(members))][:-2]
        columns["given"] = known[known.isin(names)].groupby("column").first().reindex(columns.index, fill_value="")
        if absent := [*columns.index[columns["must"].ne("") & columns["given"].eq("")]]:
            raise refusal("no_meds_column", path=members[0], column=absent[0], present=", ".join(names[:12]))
        read.append(duck.typed_rows(con, rows_of(members), columns, place))
    con.execute(f"CREATE TEMP VIEW {table} AS {' UNION ALL '.join(rows for rows, _ in read)}")
    return pd.concat(zones for _, zones in read).sum()


def register_meds(con: DuckDBPyConnection, root: Path, task: MedsTask, need_label: bool) -> dict[str, int]:
    """Make the tables `stay_rows` and `event_rows` of a MEDS data set; return how many labels are left out, and why."""
    shards, codes = parquet_files(root / "data"), root / "metadata" / "codes.parquet"
    if not shards or not codes.is_file():
        raise refusal("incomplete_meds", root=root, missing="metadata/codes.parquet" if shards else "data/*.parquet")
    for name in ("kinds", "facts"):
        con.register(name, CSV[name])
    statements = duck.named_statements(QUERY_FILE, **task._asdict())
    zones = make_view(con, "data", shards) + make_view(con, "codes", [codes])
    con.execute(statements["codes"])
    if made := MADE_LABELS.fullmatch(task.labels):
        hours = float(made[2])
        con.execute(statements["made labels"], {"hours": hours, "outcome": made[1].split("-")[1]})
        left_out = {"label_of_ended_stay": duck.first_value(con, "DELETE FROM label_rows WHERE NOT lasts")}
        left_out["label_untold"] = untold = duck.first_value(con, statements["untold labels"])
        if not duck.first_value(con, "SELECT count(*) FROM label_rows"):
            raise refusal("no_stay_to_label", labels=task.labels, hours=hours + task.gap_hours, untold=untold)
    elif not task.files:
        raise refusal("no_labels", labels=task.labels)
    else:  # Parquet in the MEDS label schema
        zones += make_view(con, "labels", task.files, "" if need_label else "boolean_value")
        con.execute("CREATE TEMP TABLE label_rows AS FROM labels")
        if not duck.first_value(con, "SELECT count(*) FROM label_rows SEMI JOIN data USING (subject_id)"):
            raise refusal("labels_of_nobody", labels=task.labels)
        if conflicts := duck.first_value(con, statements["contradictions"]):
            raise refusal("contradicting_labels", labels=task.labels, count=conflicts)
        left_out = {"label_after_death": duck.first_value(con, statements["labels after death"])}
    if (zones > 0).all():
        raise refusal("mixed_offsets", labels=task.labels, root=root)
    con.execute(statements["stays"])
    return left_out


def meds_account(con: DuckDBPyConnection) -> list[SourceAccount]:
    """Return where the rows of data/ went; one that is in the sequences of two labels counts once."""
    fates = con.execute("FROM row_fates").fetchall()
    lost = {fate: count for fate, count, _ in fates}
    noted = {"(used or not) are named by their code, which has no description": sum(count for *_, count in fates)}
    return [SourceAccount("data", sum(lost.values()), in_stays=lost.pop("", 0), lost=lost, noted=noted)]


def meds_split(table: StayTable, root: Path, seed: int = 0) -> Split | None:
    """Return the split that a MEDS data set brings, its held-out subjects never in training; None if it brings none."""
    path = root / "metadata" / "subject_splits.parquet"
    if not path.is_file():
        return None
    try:
        with duck.open_duckdb("33%", path.parent) as con:
            make_view(con, "splits", [path])
            subjects = con.sql("SELECT DISTINCT subject_id, split FROM splits").df()
    except duckdb.Error as error:
        raise refusal("unreadable", source=path, reason=duck.reason_without_rows(error)) from None
    names = subjects["split"].str.lower().str.replace(r"[\W_]", "", regex=True)
    subjects["part"] = names.map(CSV["parts"].set_index("name")["part"])
    if unknown := ", ".join(subjects["split"][subjects["part"].isna()].unique()[:3]):
        raise refusal("unknown_split", path=path, names=unknown, known=", ".join(CSV["parts"]["name"]))
    part_of_subject = subjects.drop_duplicates(["subject_id", "part"]).set_index("subject_id")["part"]
    logger.info(f"Split       the data set's own, {path.name}")
    split, warnings = tables.split_of_parts(table, part_of_subject, str(path)), WORDS["warnings"]
    if not tables.has_both_outcomes(table, split.test):
        logger.warning(warnings["nothing_held_out"].format(path=path.name))
        split = split._replace(test=split.test[:0])
    if not all(tables.has_both_outcomes(table, stays) for stays in split[:2]):
        logger.warning(warnings["tuning_split_anew"].format(path=path.name))
        rest = np.sort(np.concatenate(split[:2]))
        within = tables.split_by_patient(table.take(rest), seed, 0.0)
        split = Split(rest[within.train], rest[within.validation], split.test)
    return split


def meds_predictions(stays: pd.DataFrame, probabilities: pd.Series) -> pd.DataFrame:
    """Return the predictions in the MEDS prediction schema, which `meds-evaluation` scores."""
    types = {"subject_id": "int64", "prediction_time": "datetime64[us]", "boolean_value": "boolean"}
    predictions = stays[["patient_id", "icu_outtime", LABEL]].set_axis([*types], axis=1).astype(types)
    predictions["predicted_boolean_value"] = probabilities >= 0.5
    predictions["predicted_boolean_probability"] = probabilities.astype("float32")
    return predictions
