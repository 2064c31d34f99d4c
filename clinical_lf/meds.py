"""A MEDS data set (Medical Event Data Standard): each label row is one stay that ends with its prediction."""

import re
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from duckdb import DuckDBPyConnection

from clinical_lf.duck import column_types, first_value, quoted
from clinical_lf.files import InputError, logger, refusal
from clinical_lf.tables import LABEL, Split, StayTable, has_both_outcomes, split_of_parts

MADE_LABELS = re.compile(r"mortality-in-icu@(\d+(?:\.\d+)?)h")
MEDS_PARTS = {"train": "train", "tuning": "validation", "held_out": "test"}


class MedsTask(NamedTuple):
    """Which labels of a MEDS data set, and how many hours before the prediction are read (0: all that there are)."""

    labels: str
    history_hours: float = 0.0
    gap_hours: float = 0.0


def is_meds(folder: Path) -> bool:
    """Return whether a folder holds a MEDS data set: `data/` with Parquet files beside `metadata/codes.parquet`."""
    return (folder / "metadata" / "codes.parquet").is_file() and (folder / "data").is_dir()


def register_meds(con: DuckDBPyConnection, root: Path, task: MedsTask) -> dict[str, int]:
    """Make the tables `stay_rows` and `event_rows` of a MEDS data set; return how many labels are left out, and why."""
    data, codes = quoted(root / "data" / "**" / "*.parquet"), quoted(root / "metadata" / "codes.parquet")
    kinds, facts = (quoted(Path(__file__).with_name(f"meds_{name}.csv")) for name in ("kinds", "facts"))
    text = Path(__file__).with_name("meds.sql").read_text("utf-8")
    parts = text.format(data=data, codes=codes, kinds=kinds, facts=facts, **task._asdict()).split("-- name: ")[1:]
    statements = dict(part.split("\n", 1) for part in parts)
    con.execute(statements["codes"])
    if made := MADE_LABELS.fullmatch(task.labels):
        hours = float(made[1])
        con.execute(statements["made labels"], {"hours": hours})
        left_out = {"label_of_ended_stay": first_value(con, "DELETE FROM label_rows WHERE lasts IS NOT TRUE")}
        if not first_value(con, "SELECT count(*) FROM label_rows"):
            raise refusal("no_stay_to_label", labels=task.labels, hours=hours + task.gap_hours)
    else:  # a Parquet file, or a folder of them, in the MEDS label schema
        path = Path(task.labels)
        if not path.exists():
            raise refusal("no_labels", labels=path)
        given = quoted(path / "**" / "*.parquet" if path.is_dir() else path)
        con.execute(f"CREATE TEMP TABLE label_rows AS SELECT * FROM read_parquet({given}, union_by_name = true)")
        present = column_types(con, "label_rows")
        if missing := [name for name in ("subject_id", "prediction_time", "boolean_value") if name not in present]:
            raise InputError(f"--labels {path}: no column {', '.join(missing)}, which the MEDS label schema has.")
        twice = "FROM label_rows GROUP BY subject_id, prediction_time HAVING count(DISTINCT boolean_value) > 1"
        if conflicts := first_value(con, f"SELECT count(*) FROM (SELECT subject_id {twice})"):
            raise refusal("contradicting_labels", labels=task.labels, count=conflicts)
        late = "m.subject_id = label_rows.subject_id AND m.code = 'MEDS_DEATH' AND m.time <= prediction_time"
        left_out = {"label_after_death": first_value(con, f"DELETE FROM label_rows USING meds_rows AS m WHERE {late}")}
    con.execute(statements["stays"])
    return left_out


def meds_split(table: StayTable, root: Path) -> Split | None:
    """Return the split that a MEDS data set brings; None where it brings none, or a part of it lacks an outcome."""
    path = root / "metadata" / "subject_splits.parquet"
    if not path.is_file():
        return None
    split = split_of_parts(table, pd.read_parquet(path).set_index("subject_id")["split"].map(MEDS_PARTS))
    if all(has_both_outcomes(table, stays) for stays in split):
        logger.info(f"Split       the data set's own, {path.name}")
        return split
    logger.warning(f"Split       WARNING: a part of {path.name} lacks an outcome here; patients are split anew")
    return None


def meds_predictions(stays: pd.DataFrame, probabilities: pd.Series) -> pd.DataFrame:
    """Return the predictions in the MEDS prediction schema, which `meds-evaluation` scores."""
    types = {"subject_id": "int64", "prediction_time": "datetime64[us]", "boolean_value": "boolean"}
    predictions = stays[["patient_id", "icu_outtime", LABEL]].set_axis([*types], axis=1).astype(types)
    predictions["predicted_boolean_value"] = probabilities >= 0.5
    predictions["predicted_boolean_probability"] = probabilities.astype("float32")
    return predictions
