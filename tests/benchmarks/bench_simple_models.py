"""This model against simple ones, on identical patient splits: AUROC and AUPRC of the test stays with 95 % intervals.

    python tests/benchmarks/bench_simple_models.py --sample 2000 --seeds 0 1 2 --out simple_models_sample.md
    python tests/benchmarks/bench_simple_models.py --data PATH/TO/mimic-iv-demo --cross-validate 5
    python tests/benchmarks/bench_simple_models.py --sample 400 --only "label rate" "logistic regression"

Every model sees the same training stays and tunes itself on the same validation stays (by log loss, as ours stops).
A seed makes a split (--cross-validate: folds, whose held-out predictions are pooled). Intervals resample patients,
the same for the trees on item summaries and for what is compared with them. On the sample, "of the way"
is (AUROC - 0.5) / (AUROC of the true risk of the same test stays - 0.5).
"""

import argparse
import math
import re
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from common import hashing_vectors, log_epochs, machine, markdown, ranking, synthetic_stays, train, train_and_test
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from clinical_lf import trees
from clinical_lf.items import mask_numbers
from clinical_lf.reading import read_stays
from clinical_lf.tables import EVENT_TYPES, Split, StayTable, choose_cohort, cross_validation_splits, split_by_patient

TREES = "boosted trees, item summaries"


class Data(NamedTuple):
    """What the models of one split and seed are given."""

    table: StayTable
    vectors: np.ndarray  # (n_texts, 768)
    split: Split
    settings: train.Settings


# ---------------------------------------------------------------------------------------------------------------------
# Features of the simple models: one row per stay of the whole table, what is learnt comes from the training stays
# ---------------------------------------------------------------------------------------------------------------------


def static_features(data: Data) -> np.ndarray:
    """(n_stays, S): what the transformer gets."""
    preprocessor = train.ClinicalDataPreprocessor(data.settings.static_features).fit(data.table.take(data.split.train))
    return preprocessor.encode_static_features(data.table.static_columns)


def mean_text_features(data: Data) -> np.ndarray:
    """(n_stays, S + 6 + E): static features, event counts per type and the mean text vector."""
    table, stay, n = data.table, data.table.stay_of_event, len(data.table.stays)
    counts = np.zeros((n, len(EVENT_TYPES) + 1))
    np.add.at(counts, (stay, table.event_type), 1)
    per_text = pd.DataFrame({"stay": stay, "text": table.text}).value_counts().reset_index()
    means = np.zeros((n, data.vectors.shape[1]))
    for chunk in np.array_split(np.arange(len(per_text)), len(per_text) // 20_000 + 1):  # bounds memory
        rows = per_text.iloc[chunk]
        np.add.at(means, rows["stay"], data.vectors[rows["text"]] * rows["count"].to_numpy()[:, None])
    return np.hstack([static_features(data), np.log1p(counts), means / table.lengths[:, None]])


def count_features(data: Data) -> np.ndarray:
    """(n_stays, S + K): static features and how often each text occurs, numbers masked.

    Counted are texts that occur in at least 1 % of the training stays.
    A text still has its level word and its priority, so that "Lactate, far above range" is a column of its own.
    """
    table = data.table
    kinds, _ = pd.factorize(np.array([mask_numbers(text) for text in table.texts], dtype=object))
    counts = pd.crosstab(table.stay_of_event, kinds[table.text])
    frequent = (counts.iloc[data.split.train] > 0).mean() >= 0.01
    return np.hstack([static_features(data), counts.loc[:, frequent]])


def item_features(data: Data) -> np.ndarray:
    """(n_stays, K): statics and the summaries of items that train.py's own trees are given, empty columns left out."""
    features = trees.item_summaries(data.table, static_features(data), data.split.train)
    return features[:, ~np.isnan(features[data.split.train]).all(0)]


# ---------------------------------------------------------------------------------------------------------------------
# Models: each takes the data of a split and returns the probabilities of its test stays
# ---------------------------------------------------------------------------------------------------------------------


def label_rate(data: Data) -> np.ndarray:
    return np.full(len(data.split.test), data.table.labels[data.split.train].mean())


def best_on_validation(models, features: np.ndarray, data: Data) -> np.ndarray:
    """Fit each model on the training stays and take the one with the least log loss on the validation stays."""
    labels, split = data.table.labels, data.split
    fits = [model.fit(features[split.train], labels[split.train]) for model in models]
    best = min(fits, key=lambda fit: log_loss(labels[split.validation], fit.predict_proba(features[split.validation])))
    return best.predict_proba(features[split.test])[:, 1]


def logistic_regression(data: Data) -> np.ndarray:
    models = [
        make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000)) for c in (1e-4, 1e-3, 1e-2, 1e-1, 1)
    ]
    return best_on_validation(models, mean_text_features(data), data)


def logistic_regression_on_items(data: Data) -> np.ndarray:
    """The trees' features, an item that was never measured as the training median."""
    models = [
        make_pipeline(SimpleImputer(strategy="median"), StandardScaler(), LogisticRegression(C=c, max_iter=2000))
        for c in (1e-4, 1e-3, 1e-2, 1e-1)
    ]
    return best_on_validation(models, item_features(data).astype(float), data)


def sparse_logistic_regression(data: Data) -> np.ndarray:
    """L1: on the sample it knows what no other model does, that the label hangs on a sum over few kinds of text."""
    models = [LogisticRegression(C=c, l1_ratio=1.0, solver="liblinear", max_iter=1000) for c in (0.03, 0.1, 0.3, 1, 3)]
    return best_on_validation(models, count_features(data), data)


def boosted_trees(features: np.ndarray, data: Data) -> np.ndarray:
    """Size and number of trees and share of features per split as suit the validation stays best."""
    return trees.tree_risks(features, data.table.labels, data.split, data.settings.seed)[data.split.test]


def ours(data: Data) -> np.ndarray:
    inputs = train.TrainingData(data.table, data.split, data.vectors, "hashing")
    return train_and_test(inputs, data.settings).probabilities


def without_text(data: Data) -> np.ndarray:
    return ours(data._replace(vectors=np.zeros_like(data.vectors)))


def with_times_shuffled(data: Data) -> np.ndarray:
    """Events change places within their stay: each keeps its type and text, and gets another's time and position."""
    table, rng = data.table, np.random.default_rng(data.settings.seed)
    order = np.lexsort((rng.random(len(table.text)), table.stay_of_event))
    return ours(data._replace(table=replace(table, event_type=table.event_type[order], text=table.text[order])))


def with_item_history(data: Data) -> np.ndarray:
    """The flag as train.py has it: texts are encoded without the number that the history holds."""
    vectors = hashing_vectors(data.table, item_history=True)
    return ours(data._replace(vectors=vectors, settings=replace(data.settings, item_history=True)))


MODELS = {
    "label rate": label_rate,
    "logistic regression, mean text": logistic_regression,
    "sparse logistic regression, text counts": sparse_logistic_regression,
    "logistic regression, item summaries": logistic_regression_on_items,
    "boosted trees, mean text": lambda data: boosted_trees(mean_text_features(data), data),
    TREES: lambda data: boosted_trees(item_features(data), data),
    "this model": ours,
    "this model, text zeros": without_text,
    "this model, times shuffled": with_times_shuffled,
    "this model, item history": with_item_history,
}


# ---------------------------------------------------------------------------------------------------------------------
# Comparison
# ---------------------------------------------------------------------------------------------------------------------


def held_out(name: str, data: Data, splits: list[Split]) -> tuple[np.ndarray, np.ndarray, float]:
    """Stays and their probabilities over all splits (one, or folds), and the seconds that took."""
    started = time.monotonic()
    risks = [MODELS[name](data._replace(split=split)) for split in splits]
    return np.concatenate([split.test for split in splits]), np.concatenate(risks), time.monotonic() - started


def compare(data: Data, splits, names, true_risk) -> tuple[list[list[str]], dict[str, tuple[float, float]]]:
    """A row per model, and each model's (AUROC, share of the way to the best reachable one)."""
    stays = np.concatenate([split.test for split in splits])
    labels, patients = data.table.labels[stays], data.table.stays.patient_id.to_numpy()[stays]
    results = {name: held_out(name, data, splits)[1:] for name in names}
    best = math.nan
    if true_risk is not None:
        best = roc_auc_score(labels, true_risk[stays])
        results["the true risk (best reachable)"] = (true_risk[stays], 0.0)
    rows, figures = [], {}
    of_risks = partial(ranking, labels, patients=patients, n_bootstrap=data.settings.n_bootstrap)
    for name, (risks, seconds) in results.items():
        found = of_risks(risks=risks)
        figures[name] = found.value[0], (found.value[0] - 0.5) / (best - 0.5)
        against = ["-", "-"]
        if TREES in results and name != TREES:
            against = found.less(of_risks(risks=results[TREES][0])).words(signed=True)
        way = f"{figures[name][1]:.1%}" if true_risk is not None else "-"
        rows.append([name, *found.words(), *against, way, f"{seconds:.0f}"])
    return rows, figures


def spread(figures: list[dict]) -> str:
    """Mean and standard deviation over the seeds."""
    rows = []
    for name in figures[0]:
        auroc, share = np.array([figure[name] for figure in figures]).T
        rows.append(
            [
                name,
                f"{auroc.mean():.3f} ({auroc.std(ddof=1):.3f})",
                f"{share.mean():.1%} ({share.std(ddof=1):.1%})" if np.isfinite(share).all() else "-",
            ]
        )
    return markdown(["model", "AUROC, mean over seeds (sd)", "of the way (sd)"], rows)


def read_data(options) -> tuple[Data, np.ndarray | None, str]:
    """The table with its text vectors, the true risks where there are such, and a line that describes it."""
    settings = train.check_settings(
        train.Settings(
            observation_hours=options.observation_hours,
            n_bootstrap=options.bootstrap,
            max_epochs=options.max_epochs,
            batch_size=options.batch_size,
            d_model=options.d_model,
            n_layers=options.n_layers,
        )
    )
    table, true_risk = (
        synthetic_stays(options.sample) if not options.data else (read_stays(options.data, options.cache_dir)[0], None)
    )
    if options.observation_hours:
        id_of_risk = table.stays.icu_stay_id
        table, _ = choose_cohort(table, observation_hours=options.observation_hours)
        true_risk = None if true_risk is None else true_risk[id_of_risk.isin(table.stays.icu_stay_id)]
    title = (
        f"{len(table.stays):,} stays of {table.stays.patient_id.nunique():,} patients, "
        f"{len(table.text):,} events, {table.labels.mean():.1%} died; hashing encoder"
    )
    undivided = Split(*np.split(np.arange(len(table.stays)), [0, 0]))  # `held_out` sets the splits of a seed
    return Data(table, hashing_vectors(table), undivided, settings), true_risk, title


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", help="anything that train.py --data takes")
    source.add_argument("--sample", type=int, metavar="STAYS", help="this many synthetic stays")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--cross-validate", type=int, default=0, metavar="K", help="K folds by patient, pooled")
    parser.add_argument("--observation-hours", type=float, default=0.0, help="as in train.py")
    parser.add_argument("--only", nargs="+", default=[""], help="models whose name matches one of these patterns")
    parser.add_argument("--max-epochs", type=int, default=train.Settings().max_epochs)
    parser.add_argument(
        "--batch-size", type=int, default=train.Settings().batch_size, help="smaller where stays are few"
    )
    parser.add_argument("--d-model", type=int, default=train.Settings().d_model, help="64 is quick, and decides alike")
    parser.add_argument("--n-layers", type=int, default=train.Settings().n_layers)
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples behind every interval")
    parser.add_argument("--cache-dir", default="clinical_LF_precomp_emb", help="where query.sql's result is kept")
    parser.add_argument("--out", type=Path, help="file for the tables, in markdown")
    parser.add_argument("--verbose", action="store_true", help="show every epoch")
    options = parser.parse_args()
    if options.verbose:
        log_epochs()
    data, true_risk, title = read_data(options)
    names = [name for name in MODELS if any(re.search(pattern, name) for pattern in options.only)]
    parts, figures = [title], []
    for seed in options.seeds:
        splits = (
            list(cross_validation_splits(data.table, options.cross_validate, seed))
            if options.cross_validate
            else [split_by_patient(data.table, seed)]
        )
        seeded = data._replace(settings=replace(data.settings, seed=seed))
        rows, figure = compare(seeded, splits, names, true_risk)
        how = " / ".join(str(len(part)) for part in splits[0]) + " stays to train, validate and test"
        if options.cross_validate:
            how = f"{options.cross_validate} folds by patient, held-out predictions pooled"
        header = ["model", "AUROC", "AUPRC", "AUROC less the trees'", "AUPRC less the trees'", "of the way", "seconds"]
        parts.append(f"Seed {seed}: {how}\n\n{markdown(header, rows)}")
        figures.append(figure)
        print(("\n\n".join(parts) if len(figures) == 1 else "\n" + parts[-1]), flush=True)
    if len(figures) > 1:
        parts.append(spread(figures))
        print("\n" + parts[-1])
    parts.append(machine())
    print("\n" + parts[-1])
    if options.out:
        options.out.write_text("\n\n".join(parts) + "\n", "utf-8")


if __name__ == "__main__":
    main()
