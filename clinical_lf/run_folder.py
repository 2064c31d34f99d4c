"""What a run writes into its folder: tables, JSON, pictures, the model card; one class is the writer of all of it."""

import importlib.metadata
import json
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from matplotlib.figure import Figure
from scipy.special import expit

from clinical_lf import audit, metrics, plots
from clinical_lf.files import WORDS, delete_quietly, logger, write_json, write_whole
from clinical_lf.meds import meds_predictions
from clinical_lf.metrics import METRIC_WORDS, figure_text
from clinical_lf.tables import EVENT_TYPES, LABEL, LABELS, ReadReport, Split, StayTable

HERE = Path(__file__).resolve().parent
SAMPLE = HERE.parent / "sample_train.csv"
PACKAGES = ("torch", "transformers", "accelerate", "duckdb", "sqlglot", "scikit-learn", "numpy")
# What a run writes; all else in its folder stays where it is.
WRITTEN_BY_A_RUN = (
    "run.json settings.yaml split.csv metrics.json model_card.md predictions.* history.csv leakage_audit*.csv "
    "folds.csv subgroups.csv decision_curve.csv calibration.csv cross_validation.json seeds.* plots checkpoints "
    "unseen_in_training.csv risk_trajectories.csv attention_weights evaluation explainability fold_[0-9]* seed_[0-9]*"
).split()
Content = dict[str, Any]  # plain data, as JSON holds it


class Predictions(NamedTuple):
    """Stays and the risks that a model gave them."""

    stays: pd.DataFrame  # (n): STAY_COLUMNS
    probabilities: np.ndarray  # (n)
    thresholds: Content  # of validation stays, as `metrics.thresholds_of` returns them, or (n) of each

    def take(self, is_taken: np.ndarray) -> Self:
        """Return those that a mask (n,) marks."""
        stays = self.stays[is_taken].reset_index(drop=True)
        return self._replace(stays=stays, probabilities=self.probabilities[is_taken])

    @property
    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Labels, probabilities and patients (n), as the functions of `metrics` take them."""
        return self.stays[LABEL].to_numpy(float), self.probabilities, self.stays["patient_id"].to_numpy()

    def words(self, kind: str = "") -> str:
        """Return what these of known outcome are: `62 test stays of 44 patients, 13 deaths`, and whether too few."""
        died, n_patients = self.columns[0], self.stays["patient_id"].nunique()
        warning = f" ({words})" if (words := metrics.too_few(died)) else ""
        return f"{len(died)} {f'{kind} stays'.strip()} of {n_patients} patients, {int(died.sum())} deaths{warning}"


class RunFolder:
    """The folder of a run with these settings, the one place that writes into it what a person reads."""

    def __init__(self, folder: Path, settings: Content) -> None:
        self.folder, self.settings, self.started = folder, settings, time.time()
        self.resampling = {"n_bootstrap": settings["n_bootstrap"], "seed": settings["seed"]}
        self.audit: list[Content] = []

    def begin(self, resume: bool = False) -> None:
        """Clear the folder, unless this run resumes the one in it; write what repeats the run."""
        if not resume:
            self.clear()
        repeated = {name: value for name, value in self.settings.items() if name not in ("resume", "dry_run")}
        self.text("settings.yaml", yaml.safe_dump(repeated, sort_keys=False, allow_unicode=True))
        self.json("run.json", self.record())

    def clear(self) -> None:
        """Move what a run left to a folder with its date; remove it if it has no model, or one of the sample alone."""
        left = list(chain.from_iterable(map(self.folder.glob, WRITTEN_BY_A_RUN)))
        models = [
            *self.folder.glob("checkpoints/best_model.pth"),
            *self.folder.glob("*_[0-9]*/checkpoints/best_model.pth"),
        ]
        said = self.folder / "settings.yaml"
        is_of_sample = said.exists() and f"data: {SAMPLE.name}\n" in said.read_text("utf-8", "replace")
        is_of_sample &= not Path(SAMPLE.name).exists() or SAMPLE.samefile(
            SAMPLE.name
        )  # else it is a table of one's own
        if not models or is_of_sample:
            for path in left:
                delete_quietly(path)
            return
        home, date = self.folder.resolve(), datetime.fromtimestamp(max(path.stat().st_mtime for path in models))
        is_alone = os.path.ismount(home) or not os.access(home.parent, os.W_OK)
        aside = (home if is_alone else home.parent) / f"{home.name}-{date:%Y-%m-%d-%H%M%S}"
        while aside.exists():
            aside = aside.with_name(f"{aside.name}-again")
        aside.mkdir()
        for path in sorted(left, key=lambda path: path.name == "checkpoints"):  # last: a next start moves the rest
            shutil.move(path, aside / path.name)
        logger.info(f"Moved       the run that was in {self.folder} to {aside}")

    def record(self) -> Content:
        """Return how the run came about: command, date, commit (with a plus where files differ from it), versions."""
        command = ["git", "-C", str(HERE), "describe", "--always", "--abbrev=40", "--dirty=+"]
        try:
            commit = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            commit = None
        date = datetime.fromtimestamp(self.started, tz=UTC).isoformat(timespec="seconds")
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        return {"command": shlex.join(["python", *sys.argv]), "date": date, "commit": commit, "versions": versions}

    def table(self, name: str, frame: pd.DataFrame) -> None:
        """Write a table as CSV or Parquet, by the name's ending."""
        write = frame.to_parquet if name.endswith(".parquet") else partial(frame.to_csv, float_format="%.6g")
        write_whole(self.folder / name, partial(write, index=False))

    def text(self, name: str, content: str) -> None:
        """Write a text."""
        write_whole(self.folder / name, lambda path: path.write_text(content, "utf-8"))

    def json(self, name: str, content: Any) -> None:
        """Write plain data; NaN and infinity, for which JSON has no word, as null."""
        write_json(self.folder / name, without_nan(content))

    def figure(self, name: str, figure: Figure) -> None:
        """Write a picture into plots/."""
        plots.save_figure(self.folder / "plots" / name, figure)

    def end(self) -> None:
        """Write how long the run took, and log what its folder holds."""
        self.json("run.json", self.record() | {"seconds": round(time.time() - self.started, 1)})
        names = [f"{path.name}{'/' * path.is_dir()}" for path in self.folder.glob("[!.]*")]
        words = textwrap.wrap(", ".join(sorted(names)), 108)
        logger.info("\n            ".join([f"Written     {self.folder}", *words]))

    def write_split(self, patients: dict[str, list[int]]) -> None:
        """Write patient_id and part, as --split reads it."""
        self.patients = patients
        rows = [(patient, part) for part, members in patients.items() for patient in members]
        self.table("split.csv", pd.DataFrame(rows, columns=["patient_id", "part"]).sort_values("patient_id"))

    def write_audit(self, table: StayTable, split: Split, report: ReadReport) -> None:
        """Write and log the leakage audit of the table and the split."""
        hours, is_prospective = self.settings["observation_hours"], bool(self.settings["labels"])
        found = audit.audit_table(table, split, report, hours, is_prospective or hours > 0)
        if self.settings["outcome"] != "hospital":  # of two stays of an admission one may end with that death
            found = found[found["name"] != WORDS["reasons"]["admission_with_two_labels"]]
        texts = audit.audit_texts(table.take(split.train))
        self.table("leakage_audit.csv", found)
        self.table("leakage_audit_texts.csv", texts)
        self.audit = json.loads(found.to_json(orient="records"))
        flagged = set(found.loc[found["flagged"] & (found["kind"] == "column"), "name"])
        used = sorted(flagged & set(self.settings["static_features"]))
        unused = "; the model does not use it" if flagged and not used else ""
        logger.info(f"Audit       {audit.audit_summary(found)}{unused}")
        if used:
            logger.warning(WORDS["log"]["used"].format(names=", ".join(used)))
        if telling := texts["text"][texts["flagged"]].tolist():
            more = f" and {len(telling) - 5} more" if len(telling) > 5 else ""
            named = "; ".join(text[:80] for text in telling[:5])
            logger.warning(WORDS["log"]["telling"].format(texts=f"{named}{more}"))

    def write_evaluation(self, scored: Predictions, known: Predictions, caption: str) -> tuple[Content, pd.DataFrame]:
        """Write predictions and, of those of known outcome, figures, tables and plots; return figures and subgroups."""
        frame = scored.stays.filter(["icu_stay_id", "patient_id", LABEL, "fold"]).astype({LABEL: "Int64"})
        frame.insert(3, "probability", scored.probabilities)
        self.table("predictions.csv", frame.rename(columns={LABEL: LABELS[self.settings["outcome"]]}))
        if self.settings["labels"]:
            self.table("predictions.parquet", meds_predictions(scored.stays, pd.Series(scored.probabilities)))
        if known.stays.empty:
            return {}, pd.DataFrame()
        labels, risks, patients = known.columns
        figures = metrics.evaluate_predictions(*known.columns, **self.resampling)
        groups = metrics.subgroups_of_stays(known.stays)
        subgroups = metrics.subgroup_table(known.columns, groups, known.thresholds, **self.resampling)
        counted = subgroups.loc[:, "group":"prevalence"].to_dict("records")
        figures["conformal_sets"] = {"percent": metrics.LEVEL, "coverage": counted}
        curve = metrics.decision_curve(labels, risks, patient_ids=patients, **self.resampling)
        self.table("subgroups.csv", subgroups)
        self.table("decision_curve.csv", curve)
        self.table("calibration.csv", metrics.calibration_table(labels, risks))
        self.figure("roc_and_precision_recall.png", plots.plot_roc_and_pr(labels, risks, figures, caption))
        self.figure("calibration.png", plots.plot_calibration(labels, risks, figures, caption))
        self.figure("decision_curve.png", plots.plot_decision_curve(curve, caption))
        return figures, subgroups

    def report_training(
        self, described: Content, predictions: dict[str, Predictions], table: StayTable, history: pd.DataFrame
    ) -> Content:
        """Write metrics, predictions, plots and model card of the held-out stays; log them; return the metrics."""
        part, validation = "test" if "test" in predictions else "validation", predictions["validation"]
        scored, encoder = predictions[part], f"text encoder: {described['text_encoder']}"
        figures, subgroups = self.write_evaluation(scored, scored, f"{encoder} · {scored.words(part)}")
        curves = plots.plot_training_curves(history, f"{encoder} · {validation.words('validation')}")
        self.figure("training_curves.png", curves)
        of_validation = metrics.evaluate_predictions(*validation.columns, **self.resampling)
        counts = np.bincount(table.event_type, minlength=len(EVENT_TYPES) + 1).tolist()
        tripod_ai = {  # what a TRIPOD+AI report asks for beside these and subgroups.csv
            "patients_per_part": {part: len(members) for part, members in self.patients.items()},
            "missing_per_column": table.static_columns.isna().mean().round(4).to_dict(),
            "events_per_type": dict(zip((*EVENT_TYPES, "other"), counts)),
        }
        content = described | {"thresholds": scored.thresholds}
        content["metrics"] = {part: figures, "validation": of_validation}
        content |= {"leakage_audit": self.audit, "tripod_ai": tripod_ai}
        self.json("metrics.json", content)
        more: Content = {"folder": self, "part": part, "figures": figures, "subgroups": subgroups.to_dict("records")}
        more["metrics"] = metrics  # the module, whose functions the card calls: the content's of that name are numbers
        self.text("model_card.md", render("model_card.md.j2", globals() | content | more))
        facts = described["training"] | {"part": part.capitalize(), "words": scored.words()}
        log_metrics(figures, WORDS["log"]["trained"].format(**facts))
        if part == "validation":
            logger.warning("Validation  these stays chose the epoch: the figures flatter the model (--no-test)")
        self.end()
        return content

    def report_evaluation(
        self,
        described: Content,
        predictions: Predictions,
        is_seen: np.ndarray,
        unseen_items: pd.DataFrame,  # item, events and of_new_item (of items that training never saw), a row per text
        trajectories: pd.DataFrame | None,
        is_prospective: bool,
    ) -> Content:
        """Write and log what a checkpoint says of other stays; of patients it has seen (n,) no figure is made."""
        judged = predictions.take(~is_seen & predictions.stays[LABEL].notna().to_numpy())
        overlap = "no patient was trained or tuned on"
        if is_seen.any():
            overlap = f"{is_seen.sum()} stays of patients that the model was trained or tuned on are left out"
            logger.warning(f"Evaluation  {overlap} of figures and pictures")
        caption = f"text encoder: {described['text_encoder']} · {judged.words()} · {overlap}"
        figures, _ = self.write_evaluation(predictions, judged, caption)
        if figures:
            log_metrics(figures, f"Evaluation  of known outcome {judged.words()}")
        unseen = unseen_items.groupby("item", as_index=False).sum()
        self.table("unseen_in_training.csv", unseen.sort_values("of_new_item", ascending=False, kind="stable"))
        share = float(unseen["of_new_item"].sum() / max(unseen["events"].sum(), 1))
        logger.info(f"Unseen      {share:.1%} of these stays' events are of items that training never saw")
        if trajectories is not None:
            moment = moment_of_prediction(self.settings["observation_hours"], self.settings["labels"])
            if not is_prospective:
                moment = WORDS["moments"]["extrapolated"]
                logger.warning(f"Trajectory  WARNING: {moment}")
            self.table("risk_trajectories.csv", trajectories)
            seen_patients = predictions.stays["patient_id"][is_seen]
            shown = trajectories[~trajectories["patient_id"].isin(seen_patients)].reset_index(drop=True)
            if len(shown):
                who = f"text encoder: {described['text_encoder']} · {shown['icu_stay_id'].nunique()} stays · {overlap}"
                self.figure("risk_trajectories.png", plots.plot_risk_trajectories(shown, f"{moment} · {who}"))
        content = described | {"thresholds": predictions.thresholds}
        content |= {"seen_patients": {"stays": int(is_seen.sum()), "of": len(is_seen), "note": overlap}}
        content |= {"metrics": figures or None, "unseen_in_training": {"of_new_item": round(share, 4)}}
        self.json("metrics.json", content)
        self.end()
        return content

    def report_spread(self, outcomes: Sequence[tuple[Content, dict[str, Predictions]]], unit: str) -> Content:
        """Write and log the figures of each fold or seed, their mean and spread, and the pooled predictions'."""
        contents = [content for content, _ in outcomes]
        figures = [content["metrics"].get("test", content["metrics"]["validation"]) for content in contents]
        columns = {name: [figure[name]["value"] for figure in figures] for name in METRIC_WORDS}
        spread = pd.DataFrame(columns, index=range(1, 1 + len(figures)), dtype=float)
        moments = spread.agg(["mean", "std"])
        self.table(f"{unit}s.csv", pd.concat([spread, moments]).rename_axis(unit).reset_index())
        parts = {name: [predictions[name] for _, predictions in outcomes] for name in outcomes[0][1]}
        tested, encoder = parts.get("test", parts["validation"]), contents[0]["text_encoder"]
        what = f"mean risk of {len(outcomes)} seeds" if unit == "seed" else "the test stays of all folds"
        if unit == "seed":  # each stay once, with its mean risk over the seeds
            means = {name: np.mean([one.probabilities for one in own], axis=0) for name, own in parts.items()}
            thresholds = metrics.thresholds_of(parts["validation"][0].columns[0], means["validation"])
            scored = Predictions(tested[0].stays, means["test"], thresholds)
        else:
            stays = [part.stays.assign(fold=number) for number, part in enumerate(tested, start=1)]
            limits = pd.concat([pd.DataFrame(part.thresholds, index=part.stays.index) for part in tested])
            risks = np.concatenate([part.probabilities for part in tested])
            scored = Predictions(pd.concat(stays, ignore_index=True), risks, limits.to_dict("list"))
        pooled, _ = self.write_evaluation(scored, scored, f"text encoder: {encoder} · {what}, {scored.words()}")
        summary = {}
        for name, values in spread.items():
            summary[name] = {"mean": values.mean(), "sd": values.std(), f"{unit}s": values.tolist()}
        content = {"text_encoder": encoder, f"{unit}s": len(outcomes), "spread": summary, "pooled": pooled}
        content["cohort"] = contents[0]["cohort"]
        self.json("cross_validation.json" if unit == "fold" else "seeds.json", content)
        for name, (mean, deviation) in moments[["auroc", "auprc"]].items():
            logger.info(f"{unit.capitalize() + 's':11s} {METRIC_WORDS[name]} {mean:.3f} (sd {deviation:.3f})")
        log_metrics(pooled, f"Pooled      {what}: {scored.words()}")
        self.end()
        return content


def render(template: str, content: Content) -> str:
    """Return a page of templates/; in HTML every text is escaped: event texts are whatever was typed."""
    strict: Content = {"undefined": StrictUndefined, "autoescape": select_autoescape(["html.j2"])}
    pages = Environment(loader=FileSystemLoader(HERE / "templates"), trim_blocks=True, lstrip_blocks=True, **strict)
    pages.globals |= {"expit": expit, "map": map, "zip": zip}
    return pages.get_template(template).render(content)


def without_nan(content: Any) -> Any:
    """Return nested plain data with None for NaN and infinity."""
    return json.loads(json.dumps(content, default=str), parse_constant=lambda word: None)


def log_metrics(figures: Content, title: str) -> None:
    """Log each figure with its interval."""
    logger.info(f"{title}; in brackets 95 % intervals")
    for name, words in METRIC_WORDS.items():
        prevalence = f" at prevalence {figures['prevalence']:.3f}" if name == "auprc" else ""
        logger.info(f"            {words:22s} {figure_text(figures[name], 3, '')}{prevalence}")


def data_in_words(data: str) -> str:
    """Return the name of a data set; of the bundled sample also that no patient is behind it."""
    name = Path(data).name
    return WORDS["data"].get(name, name)


def moment_of_prediction(observation_hours: float, labels: str) -> str:
    """Return when a model predicts, and from what."""
    kind = "labels" if labels else "hours" if observation_hours else "whole"
    return WORDS["moments"][kind].format(hours=observation_hours)
