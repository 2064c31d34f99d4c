"""What a run writes into its folder: tables, JSON, pictures, the model card; one class is the writer of all of it."""

import importlib.metadata
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from scipy.special import expit

from clinical_lf import audit, metrics, plots, trees
from clinical_lf.files import WORDS, delete_quietly, logger, write_json, write_whole
from clinical_lf.meds import meds_predictions
from clinical_lf.metrics import METRIC_WORDS, figure_text
from clinical_lf.tables import EVENT_TYPES, LABEL, LABELS, ReadReport, Split, StayTable

HERE = Path(__file__).resolve().parent
SAMPLE = HERE.parent / "sample_train.csv"
PACKAGES = ("torch", "transformers", "accelerate", "duckdb", "sqlglot", "scikit-learn", "numpy")
Content = dict[str, Any]  # plain data, as JSON holds it


class Predictions(NamedTuple):
    """Stays and the risks that a model gave them."""

    stays: pd.DataFrame  # (n): STAY_COLUMNS
    probabilities: np.ndarray  # (n)
    thresholds: Content  # of validation stays, as `metrics.thresholds_of` returns them, or (n) of each

    @property
    def columns(self) -> metrics.Columns:
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
        self.folder, self.pictures, self.settings, self.started = folder, folder / "plots", settings, time.time()
        self.resampling = {"n_bootstrap": settings["n_bootstrap"], "seed": settings["seed"]}

    def begin(self, resume: bool = False) -> None:
        """Clear the folder, unless this run resumes the one in it; write what repeats the run."""
        if not resume:
            self.clear()
        repeated = {name: value for name, value in self.settings.items() if name not in ("resume", "dry_run")}
        self.text("settings.yaml", yaml.safe_dump(repeated, sort_keys=False, allow_unicode=True))
        self.json("run.json", self.record())

    def clear(self) -> None:
        """Move what a run left to a folder with its date; remove it if it has no model, or one of the sample alone."""
        left = list(chain.from_iterable(map(self.folder.glob, WORDS["written_by_a_run"])))
        models = [path for path in self.folder.rglob("best_model.pth") if {path, path.parents[1]} & {*left}]
        said, own = self.folder / "settings.yaml", Path(SAMPLE.name)
        is_of_sample = said.exists() and f"data: {own}\n" in said.read_text("utf-8", "replace")
        is_of_sample &= not own.exists() or SAMPLE.samefile(own)  # else it is a table of one's own
        if not models or is_of_sample:
            for path in left:
                delete_quietly(path)
            return
        home, date = self.folder.resolve(), datetime.fromtimestamp(max(path.stat().st_mtime for path in models))
        is_alone = os.path.ismount(home) or not os.access(home.parent, os.W_OK)
        aside = (home if is_alone else home.parent) / f"{home.name}-{date:%Y-%m-%d-%H%M%S}"
        while aside.exists():
            aside = aside.with_name(f"{aside.name}-again")
        for path in left:  # checkpoints last: where this is stopped, the next start moves the rest
            target = aside / path.relative_to(self.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, target)
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
        plain = json.loads(json.dumps(content, default=str), parse_constant=lambda word: None)
        write_json(self.folder / name, plain)

    def end(self, name: str, content: Content) -> Content:
        """Write what was found and how long the run took, log where it lies; return what was found."""
        self.json(name, content)
        self.json("run.json", self.record() | {"seconds": round(time.time() - self.started, 1)})
        logger.info(f"Written     {self.folder}")
        return content

    def write_split(self, patients: dict[str, list[int]]) -> None:
        """Write patient_id and part, as --split reads it."""
        self.patients = patients
        parts = pd.Series(patients, name="patient_id").explode().dropna().sort_values().rename_axis("part")
        self.table("split.csv", parts.reset_index()[["patient_id", "part"]])

    def write_audit(self, table: StayTable, split: Split, report: ReadReport) -> None:
        """Write and log the leakage audit of the table and the split."""
        found = audit.audit_table(table, split, report, self.settings)
        texts = audit.audit_texts(table.take(split.train))
        self.table("leakage_audit.csv", found)
        self.table("leakage_audit_texts.csv", texts)
        self.audit = json.loads(found.to_json(orient="records"))
        self.used = ", ".join(sorted({*found["name"][found["flagged"]]} & {*self.settings["static_features"]}))
        logger.info(f"Audit       {audit.audit_summary(found)}")
        if self.used:
            logger.warning(WORDS["log"]["used"].format(names=self.used))
        if telling := [text[:80] for text in texts["text"][texts["flagged"]]]:
            more = f" and {len(telling) - 5} more" * (len(telling) > 5)
            logger.warning(WORDS["log"]["telling"].format(texts=f"{'; '.join(telling[:5])}{more}"))

    def write_evaluation(self, scored: Predictions, known: Predictions, caption: str, title: str) -> Content:
        """Write predictions and, of those of known outcome, tables and plots; log and return their figures."""
        frame = scored.stays.assign(probability=scored.probabilities).astype({LABEL: "Int64"})
        frame = frame.filter(["icu_stay_id", "patient_id", LABEL, "probability", "fold", "seen_in_training"])
        self.table("predictions.csv", frame.rename(columns={LABEL: LABELS[self.settings["outcome"]]}))
        if self.settings["labels"]:
            self.table("predictions.parquet", meds_predictions(scored.stays, pd.Series(scored.probabilities)))
        if known.stays.empty:
            return {}
        labels, risks, _ = known.columns
        figures = metrics.evaluate_predictions(*known.columns, **self.resampling)
        groups = metrics.subgroups_of_stays(known.stays)
        self.subgroups = metrics.subgroup_table(known.columns, groups, known.thresholds, **self.resampling)
        counted = self.subgroups.loc[:, "group":"prevalence"].to_dict("records")
        figures["conformal_sets"] = {"percent": metrics.LEVEL, "coverage": counted}
        self.table("subgroups.csv", self.subgroups)
        self.table("calibration.csv", metrics.calibration_table(labels, risks))
        ranking = plots.plot_roc_and_pr(labels, risks, figures, caption)
        plots.save_figure(self.pictures / "roc_and_precision_recall.png", ranking)
        plots.save_figure(self.pictures / "calibration.png", plots.plot_calibration(labels, risks, figures, caption))
        logger.info(f"{title}; in brackets 95 % intervals")
        for name, words in METRIC_WORDS.items():
            prevalence = f" at prevalence {figures['prevalence']:.3f}" if name == "auprc" else ""
            logger.info(f"            {words:22s} {figure_text(figures[name], 3, '')}{prevalence}")
        return figures

    def report_training(
        self, described: Content, predictions: dict[str, Predictions], table: StayTable, history: pd.DataFrame
    ) -> Content:
        """Write and log metrics, predictions, plots and model card of the held-out stays; return the metrics.

        `predictions` may hold what boosted trees, trained alike, give the held-out stays, by the name `trees`.
        """
        part, validation = "test" if "test" in predictions else "validation", predictions["validation"]
        scored, encoder = predictions[part], f"text encoder: {described['text_encoder']}"
        title = WORDS["log"]["trained"].format(**described["training"], part=part.capitalize(), words=scored.words())
        figures = self.write_evaluation(scored, scored, f"{encoder} · {scored.words(part)}", title)
        curves = plots.plot_training_curves(history, f"{encoder} · {validation.words('validation')}")
        plots.save_figure(self.pictures / "training_curves.png", curves)
        of_validation = metrics.evaluate_predictions(*validation.columns, **self.resampling)
        counts = np.bincount(table.event_type, minlength=len(EVENT_TYPES) + 1).tolist()
        tripod_ai = {  # what a TRIPOD+AI report asks for found these and subgroups.csv
            "patients_per_part": {part: len(members) for part, members in self.patients.items()},
            "missing_per_column": table.static_columns.isna().mean().round(4).to_dict(),
            "events_per_type": dict(zip((*EVENT_TYPES, "other"), counts)),
        }
        content = described | {"thresholds": scored.thresholds, "metrics": {part: figures, "validation": of_validation}}
        of_trees = predictions.get("trees", scored).probabilities
        found = trees.compared(scored.columns, of_trees, **self.resampling) if "trees" in predictions else {}
        content |= {"leakage_audit": self.audit, "tripod_ai": tripod_ai, "boosted_trees": found}
        if found:
            logger.info(f"Trees       {WORDS['trees']['few'] if figures['too_few_to_read'] else trees.sentence(found)}")
        facts = globals() | {"folder": self, "part": part, "scored": scored, "figures": figures}  # metrics: the module
        self.text("model_card.md", render("model_card.md.j2", content | facts))
        if part == "validation":
            logger.warning("Validation  these stays chose the epoch: the figures flatter the model")
        return self.end("metrics.json", content)

    def report_evaluation(
        self, described: Content, predictions: Predictions, is_seen: np.ndarray, unseen_items: pd.DataFrame
    ) -> Content:
        """Write and log what a checkpoint says of other stays, (n,) seen ones without a figure; items: a row a text."""
        stays, encoder = predictions.stays, f"text encoder: {described['text_encoder']}"
        is_judged = ~is_seen & stays[LABEL].notna().to_numpy()
        judged = Predictions(stays[is_judged], predictions.probabilities[is_judged], predictions.thresholds)
        overlap = "no patient was trained or tuned on"
        if is_seen.any():
            overlap = f"{is_seen.sum()} stays of patients that the model was trained or tuned on are left out"
            logger.warning(f"Evaluation  {overlap} of figures and pictures")
        title = f"Evaluation  of known outcome {judged.words()}"
        scored = predictions._replace(stays=stays.assign(seen_in_training=is_seen))
        figures = self.write_evaluation(scored, judged, f"{encoder} · {judged.words()} · {overlap}", title)
        unseen = unseen_items.groupby("item", as_index=False).sum()
        self.table("unseen_in_training.csv", unseen.sort_values("of_new_item", ascending=False, kind="stable"))
        share = float(unseen["of_new_item"].sum() / max(unseen["events"].sum(), 1))
        if unseen["events"].any():
            logger.info(f"Unseen      {share:.1%} of these stays' events are of items or units that training never saw")
        content = described | {"thresholds": predictions.thresholds}
        content |= {"seen_patients": {"stays": int(is_seen.sum()), "of": len(is_seen), "note": overlap}}
        content |= {"metrics": figures or None, "unseen_in_training": {"of_new_item": round(share, 4)}}
        return self.end("metrics.json", content)

    def report_spread(self, outcomes: Sequence[tuple[Content, dict[str, Predictions]]], unit: str) -> Content:
        """Write and log the figures of each fold or seed, their mean and spread, and the pooled predictions'."""
        contents, predictions = zip(*outcomes)
        part = "test" if "test" in predictions[0] else "validation"
        tested = [own[part] for own in predictions]
        values = [{name: content["metrics"][part][name]["value"] for name in METRIC_WORDS} for content in contents]
        spread = pd.DataFrame(values, index=range(1, 1 + len(values)), dtype=float)
        moments = spread.agg(["mean", "std"])
        self.table(f"{unit}s.csv", pd.concat([spread, moments]).rename_axis(unit).reset_index())
        for name, (mean, deviation) in moments[["auroc", "auprc"]].items():
            logger.info(f"{unit.capitalize() + 's':11s} {METRIC_WORDS[name]} {mean:.3f} (sd {deviation:.3f})")
        if unit == "seed":  # each stay once, with its mean risk over the seeds
            what, file = f"mean risk of {len(outcomes)} seeds", "seeds.json"
            mean_of = lambda part: np.mean([own[part].probabilities for own in predictions], axis=0)
            thresholds = metrics.thresholds_of(predictions[0]["validation"].columns[0], mean_of("validation"))
            scored = Predictions(tested[0].stays, mean_of(part), thresholds)
        else:
            what, file = "the test stays of all folds", "cross_validation.json"
            parts = [own.stays.assign(fold=number, **own.thresholds) for number, own in enumerate(tested, start=1)]
            stays = pd.concat(parts, ignore_index=True)
            risks = np.concatenate([own.probabilities for own in tested])
            scored = Predictions(stays, risks, stays[list(tested[0].thresholds)].to_dict("list"))
        encoder, title = contents[0]["text_encoder"], f"Pooled      {what}: {scored.words()}"
        pooled = self.write_evaluation(scored, scored, f"text encoder: {encoder} · {what}, {scored.words()}", title)
        figures = moments.rename({"std": "sd"}).T.assign(**{f"{unit}s": spread.T.to_numpy().tolist()})
        content = {"text_encoder": encoder, f"{unit}s": len(outcomes), "spread": figures.to_dict("index")}
        return self.end(file, content | {"pooled": pooled, "cohort": contents[0]["cohort"]})


def render(template: str, content: Content) -> str:
    """Return a page of templates/; in HTML every text is escaped: event texts are whatever was typed."""
    strict: Content = {"undefined": StrictUndefined, "autoescape": select_autoescape(["html.j2"])}
    pages = Environment(loader=FileSystemLoader(HERE / "templates"), trim_blocks=True, lstrip_blocks=True, **strict)
    pages.globals |= {"expit": expit, "map": map, "zip": zip}
    return pages.get_template(template).render(content)


def data_in_words(data: str) -> str:
    """Return the name of a data set; of the bundled sample also that no patient is behind it."""
    return WORDS["data"].get(Path(data).name, Path(data).name)


def moment_of_prediction(observation_hours: float, labels: str) -> str:
    """Return when a model predicts, and from what."""
    kind = "labels" if labels else "hours" if observation_hours else "whole"
    return WORDS["moments"][kind].format(hours=observation_hours)
