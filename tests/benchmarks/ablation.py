"""What each part of the recipe is worth: one change to the default at a time, on held-out folds of real stays.

    python tests/benchmarks/ablation.py --data PATH/TO/set_a_4h.parquet --out ablation      # all variants, five folds
    python tests/benchmarks/ablation.py --data mimic-iv --observation-hours 24 --folds 0 1 --variants default "no layer"
    python tests/benchmarks/ablation.py --data ... --item-history --d-model 64 --n-layers 1 --max-epochs 5 --out small
    python tests/benchmarks/ablation.py --list

Takes the options of train.py, too; they make the default, whose text encoder is `hashing` unless they say otherwise. A
seed sets the folds by patient, the weights and the order of batches. A fold's test stays are scored by the weights with
the lowest validation loss; figures are of the test stays of all folds and seeds together, intervals (95 %) resample
patients, and a variant is compared with the default on the stays that both have scored. Each run is kept in --out and
not made again: stop at any time, start anew, with more folds, seeds or variants, or in another process beside this one.
The table is printed after every fold and stands in --out/ablation.md.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from common import Ranking, log_epochs, machine, markdown, ranking, train, train_and_test

from clinical_lf import files
from clinical_lf.plan import make_accelerator
from clinical_lf.settings import settings_from
from clinical_lf.tables import StayTable, cross_validation_splits

N_FOLDS = 5
HEADER = ["variant", "AUROC", "AUPRC", "AUROC less the default's", "AUPRC less the default's"]
HEADER += ["validation loss", "epochs", "seconds", "runs"]


# ---------------------------------------------------------------------------------------------------------------------
# Changes that no setting makes: each alters the trainer before its first epoch
# ---------------------------------------------------------------------------------------------------------------------


def fresh_models(trainer: train.Trainer) -> list[train.ClinicalTransformer]:
    """Return the model that learns and the average of its weights."""
    return [trainer.accelerator.unwrap_model(trainer.objective).model, trainer.model]


def layers(trainer: train.Trainer) -> list[train.EncoderLayer]:
    return [layer for model in fresh_models(trainer) for layer in cast(list, model.transformer_encoder)]


def scale_layers(trainer: train.Trainer, size: float) -> None:
    """Set how much attention and feed-forward part of each layer add at first; nothing at all for good with 0."""
    for layer in layers(trainer):
        for scale in (layer.attention_scale, layer.feedforward_scale):
            scale.data.fill_(size)
            scale.requires_grad_(size > 0)


def full_size_layers(trainer: train.Trainer) -> None:
    scale_layers(trainer, 1.0)


def no_layer(trainer: train.Trainer) -> None:
    scale_layers(trainer, 0.0)


def no_attention_in_layers(trainer: train.Trainer) -> None:
    for layer in layers(trainer):
        layer.attention_scale.data.zero_()
        layer.attention_scale.requires_grad_(False)


def unit_positions(trainer: train.Trainer) -> None:
    for model in fresh_models(trainer):
        model.position_scale.data.fill_(1.0)


def raw_inputs(trainer: train.Trainer) -> None:
    for model in fresh_models(trainer):
        model.event_mean.zero_()
        model.event_scale.fill_(1.0)


def inputs_scaled_by_column(trainer: train.Trainer) -> None:
    """Each column gets variance 1: the time is then one voice among 774, instead of each part of an event."""
    n_types, n_text = trainer.train_set.type_columns.shape[1], trainer.train_set.text_vectors.shape[1]
    share = torch.full((n_types + n_text + 1,), (1 - train.TEXT_SHARE) / (n_types + 1))
    share[n_types:-1] = train.TEXT_SHARE / n_text
    for model in fresh_models(trainer):
        model.event_scale[: len(share)] *= (share * len(share)).sqrt().to(model.event_scale)


def light_static_numbers(trainer: train.Trainer) -> None:
    for model in fresh_models(trainer):
        model.static_weight.fill_(1.0)


def unseen_number_of_events(trainer: train.Trainer) -> None:
    for model in fresh_models(trainer):
        model.static_weight[-1] = 0.0  # numbers come last, the number of events last of them


def no_memory(trainer: train.Trainer) -> None:
    for model in fresh_models(trainer):
        for parameter in cast(train.ItemHistoryProjection, model.input_projection).key.parameters():
            parameter.requires_grad_(False).zero_()


def labels_alone(trainer: train.Trainer) -> None:
    """Take back what trees say of the training stays."""
    labels = torch.from_numpy(trainer.train_set.table.labels).unsqueeze(1)
    trainer.train_set.labels.copy_(labels)


def unit_pooling_query(trainer: train.Trainer) -> None:
    for model in fresh_models(trainer):
        model.query_vector.data *= 50


class Variant(NamedTuple):
    """The default with these settings, and with this change to the trainer."""

    settings: dict[str, Any]
    at_start: Callable[[train.Trainer], None] | None = None


ONE_LAYER = {"item_history": True, "n_layers": 1}
VARIANTS = {
    "default": Variant({}),
    "no layer": Variant({}, no_layer),
    "layers without attention": Variant({}, no_attention_in_layers),
    "layers at full size from the start": Variant({}, full_size_layers),
    "one layer": Variant({"n_layers": 1}),
    "item history": Variant({"item_history": True}),
    "item history, no layer": Variant({"item_history": True, "n_layers": 0}),
    "item history, one layer": Variant(ONE_LAYER),
    "item history, one layer, labels alone": Variant(ONE_LAYER, labels_alone),
    "item history, one layer, no memory": Variant(ONE_LAYER, no_memory),
    "item history, one layer, no temporal loss": Variant(ONE_LAYER | {"temporal_weight": 0.0}),
    "no temporal loss": Variant({"temporal_weight": 0.0}),
    "temporal loss 0.1": Variant({"temporal_weight": 0.1}),
    "number of events unseen": Variant({}, unseen_number_of_events),
    "static numbers weigh as flags": Variant({}, light_static_numbers),
    "inputs as they are": Variant({}, raw_inputs),
    "inputs scaled by column": Variant({}, inputs_scaled_by_column),
    "positions of size 1": Variant({}, unit_positions),
    "pooling query of size 1": Variant({}, unit_pooling_query),
    "learning rate half": Variant({"learning_rate": train.Settings.learning_rate / 2}),
    "learning rate double": Variant({"learning_rate": 2 * train.Settings.learning_rate}),
    "dropout 0": Variant({"dropout": 0.0}),
    "dropout 0.3": Variant({"dropout": 0.3}),
    "weight decay 1": Variant({"weight_decay": 1.0}),
}


# ---------------------------------------------------------------------------------------------------------------------
# Runs: a file each, a row per test stay
# ---------------------------------------------------------------------------------------------------------------------


def recipe_folder(folder: Path, settings: train.Settings, table: StayTable) -> Path:
    """Return the folder, which holds runs of one recipe only: its recipe.json says which."""
    where = ("output_dir", "cache_dir", "memory_limit", "n_bootstrap")
    recipe = {name: value for name, value in asdict(settings).items() if name not in where}
    recipe |= {"data": Path(settings.data).name, "stays": len(table.stays), "events": len(table.text)}
    path = folder / "recipe.json"
    if not path.exists():
        return files.write_json(path, recipe).parent
    before = json.loads(path.read_text("utf-8"))
    changed = [name for name, value in recipe.items() if before.get(name) != value]
    if changed:
        sys.exit(f"error: {folder} holds runs of another recipe ({', '.join(changed)}). Give another --out.")
    return folder


def run_fold(data: train.TrainingData, settings: train.Settings, variant: Variant) -> pd.DataFrame:
    """Return the test stays with the risk that a model of this variant gives them, and what the run took."""
    done = train_and_test(data, settings, variant.at_start)
    stays = data.table.stays.iloc[data.split.test][["patient_id", "icu_stay_id"]]
    stays = stays.assign(died=data.table.labels[data.split.test], risk=done.probabilities)
    return stays.assign(validation_loss=done.validation_loss, epochs=done.epochs, seconds=done.seconds)


def read_runs(folder: Path) -> dict[str, pd.DataFrame]:
    """Return the stays of all runs of each variant, indexed by seed, fold and stay; the default first."""
    found = {}
    for name in VARIANTS:
        parts = {path.stem: pd.read_csv(path) for path in sorted((folder / name.replace(" ", "_")).glob("*.csv"))}
        if parts:
            found[name] = pd.concat(parts, names=["run", None]).set_index("icu_stay_id", append=True).droplevel(1)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def ranking_of(stays: pd.DataFrame, n_bootstrap: int) -> Ranking:
    return ranking(stays["died"].to_numpy(), stays["risk"].to_numpy(), stays["patient_id"].to_numpy(), n_bootstrap)


def row_of(name: str, stays: pd.DataFrame, default: pd.DataFrame | None, n_bootstrap: int) -> list[str]:
    """Return the figures of a variant, and what they are beyond the default's on the stays of both."""
    cells = [name, *ranking_of(stays, n_bootstrap).words()]
    both = stays.index.intersection(default.index) if default is not None and name != "default" else []
    if default is not None and len(both):
        own, other = (ranking_of(part.loc[both], n_bootstrap) for part in (stays, default))
        cells += own.less(other).words(signed=True)
    else:
        cells += ["-", "-"]
    runs = stays.groupby("run").first()
    cells += [f"{runs['validation_loss'].mean():.4f}", f"{runs['epochs'].mean():.0f}"]
    return [*cells, f"{runs['seconds'].sum():.0f}", str(len(runs))]


def write_table(folder: Path, settings: train.Settings, command: str) -> str:
    """Write ablation.md of all the runs in the folder; return its table."""
    runs = read_runs(folder)
    rows = [row_of(name, stays, runs.get("default"), settings.n_bootstrap) for name, stays in runs.items()]
    recipe = json.loads((folder / "recipe.json").read_text("utf-8"))
    usual = asdict(train.check_settings(train.Settings()))
    changed = [f"{name} {value}" for name, value in recipe.items() if name in usual and usual[name] != value]
    facts = f"{recipe['stays']:,} stays, {recipe['events']:,} events; not as usual: {', '.join(changed)}."
    table = markdown(HEADER, rows)
    text = "\n\n".join(["# Ablation", f"`{command}`", facts, table, machine()]) + "\n"
    files.write_whole(folder / "ablation.md", lambda path: path.write_text(text, "utf-8"))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--folds", type=int, nargs="+", choices=range(N_FOLDS), default=list(range(N_FOLDS)))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument(
        "--out", type=Path, default=Path("trained_models/ablation"), help="folder for the runs and their table"
    )
    parser.add_argument("--verbose", action="store_true", help="show every epoch")
    parser.add_argument("--list", action="store_true", help="name the variants and stop")
    options, of_train = parser.parse_known_args()
    if options.list:
        return print("\n".join(VARIANTS))
    if options.verbose:
        log_epochs()
    of_train = ["--text-encoder", "hashing", *of_train]
    default = train.check_settings(settings_from(of_train, train.Settings, __doc__))
    accelerator = make_accelerator(default.mixed_precision)
    table = train.read_source(default, accelerator).table
    folder = recipe_folder(options.out, default, table)

    @cache
    def encoded(item_history: bool) -> tuple[str, np.ndarray]:
        settings = replace(default, item_history=item_history)
        texts = train.texts_to_encode(table.texts, settings)
        settings, encoder = train.make_text_encoder(settings, texts, accelerator)
        return encoder.id, train.embed_texts(encoder, texts, accelerator)

    for seed in options.seeds:
        splits = list(cross_validation_splits(table, N_FOLDS, seed))
        for fold in options.folds:
            for name in options.variants:
                path = folder / name.replace(" ", "_") / f"seed_{seed}_fold_{fold}.csv"
                settings = replace(default, seed=seed, **VARIANTS[name].settings)
                if path.exists():
                    continue
                encoder, vectors = encoded(settings.item_history)
                data = train.TrainingData(table, splits[fold], vectors, encoder)
                run = run_fold(data, settings, VARIANTS[name])
                files.write_whole(path, lambda place: run.to_csv(place, index=False))
            print(write_table(folder, default, shlex.join(["python", *sys.argv])), flush=True)


if __name__ == "__main__":
    main()
