"""What each part of the recipe is worth: one change at a time, on synthetic stays of known best AUROC, or on real ones.

    python tests/benchmarks/ablation.py                           # all variants, 3 seeds: 2 to 3 hours on one core
    python tests/benchmarks/ablation.py --seeds 0 --variants default "temporal loss weight 0"
    python tests/benchmarks/ablation.py --data PATH/TO/mimic-iv-demo --observation-hours 24 --batch-size 8 \
        --max-epochs 12 --seeds 0
    python tests/benchmarks/ablation.py --list

Every run is added to tests/benchmarks/ablation.md as soon as it is done, and a run that stands there is not made again:
the script may be stopped at any time and started anew. Seed by seed, so that an early stop leaves a fair comparison.
A seed sets the split, the weights and the order of batches. Of synthetic stays, training and validation have as many as
train.py takes of 2,000; test stays are all the others of 5,000, since 400 would leave an AUROC uncertain by 0.02. Real
stays are held out once each, in 5 folds by patient. Test AUROC is that of the weights with the lowest validation loss;
"of the way" is (AUROC - 0.5) / (AUROC of the true risk of the test stays - 0.5).
"""

import argparse
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from common import hashing_vectors, log_epochs, machine, markdown, synthetic_stays, train, train_and_test
from sklearn.metrics import roc_auc_score
from torch import nn

TABLE = Path(__file__).with_name("ablation.md")
RUN_COLUMNS = ["variant", "seed", "data", "AUROC", "of the way", "validation loss", "epochs", "seconds"]


# ---------------------------------------------------------------------------------------------------------------------
# Changes that no setting makes: each alters a fresh model, given the training stays
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def positions_of_size_one(model, dataset):
    model.position_scale.fill_(1.0)


def no_input_normalisation(model, dataset):
    model.set_input_statistics(
        torch.zeros_like(model.event_mean), torch.ones_like(model.event_scale), model.static_weight
    )


def scale_per_column(model, dataset):
    """Each column to variance 1, so that the time is one voice among 774, instead of each part of an event."""
    factor = (dataset.share_of_variance * dataset.input_dim).sqrt().to(model.event_scale)
    model.set_input_statistics(model.event_mean, model.event_scale * factor, model.static_weight)


def static_numbers_weigh_as_flags(model, dataset):
    model.static_weight.fill_(1.0)


def number_of_events_unseen(model, dataset):
    model.static_weight[-1] = 0.0  # numbers come last, the number of events last of them


@torch.no_grad()
def small_bias_of_the_projection(model, dataset):
    model.input_projection.bias.mul_(0.1)


@torch.no_grad()
def layers_at_full_size(model, dataset):
    for layer in model.transformer_encoder:
        layer.attention_scale.fill_(1.0)
        layer.feedforward_scale.fill_(1.0)


@torch.no_grad()
def layers_without_attention(model, dataset):
    for layer in model.transformer_encoder:
        layer.attention_scale.zero_().requires_grad_(False)


@torch.no_grad()
def pooling_query_of_size_one(model, dataset):
    model.query_vector.mul_(50)


class PostNormLayer(train.EncoderLayer):
    """The layer of Vaswani et al. 2017: what a part adds is normalised together with its input, after the sum."""

    def forward(self, events, lengths, attention_mask, maps=None):
        query, key, value = self.query_key_value(events).unflatten(1, (3, self.n_heads, -1)).unbind(1)
        attended = train.attend_within_stays(query, key, value, lengths).flatten(1)
        events = self.norm_attention(events + self.dropout(self.attention_output(attended)))
        return self.norm_feedforward(events + self.dropout(self.feedforward(events)))


def post_norm(model, dataset):
    """The layers' class and their scale change; the model's last LayerNorm, which post-norm does not need, stays."""
    for layer in model.transformer_encoder:
        layer.__class__ = PostNormLayer


class Variant(NamedTuple):
    """The default with these settings, and with this change to the fresh model."""

    settings: dict
    change: Callable[[nn.Module, train.ClinicalSequenceDataset], None] | None = None


VARIANTS = {
    "default": Variant({}),
    "number of events unseen": Variant({}, number_of_events_unseen),
    "sparsity weight 0": Variant({"sparsity_weight": 0.0}),
    "sparsity weight 0.4": Variant({"sparsity_weight": 0.4}),
    "layers without attention": Variant({}, layers_without_attention),
    "layers at full size from the start": Variant({}, layers_at_full_size),
    "small bias of the projection": Variant({}, small_bias_of_the_projection),
    "static numbers weigh as flags": Variant({}, static_numbers_weigh_as_flags),
    "temporal loss weight 0": Variant({"temporal_weight": 0.0}),
    "no input normalisation": Variant({}, no_input_normalisation),
    "input scaled per column": Variant({}, scale_per_column),
    "positions of size 1": Variant({}, positions_of_size_one),
    "post-norm": Variant({}, post_norm),
    "learning rate 5e-4": Variant({"learning_rate": 5e-4}),
    "learning rate 2e-3": Variant({"learning_rate": 2e-3}),
    "no warm-up": Variant({"warmup_steps": 0}),
    "dropout 0.2": Variant({"dropout": 0.2}),
    "dropout 0.4": Variant({"dropout": 0.4}),
    "batch size 16": Variant({"batch_size": 16}),
    "batch size 64": Variant({"batch_size": 64}),
    "no averaging of weights": Variant({"weight_averaging": 0.0}),
    "pooling query of size 1": Variant({}, pooling_query_of_size_one),
    "tau 6 h": Variant({"tau_hours": 6.0}),
    "tau 96 h": Variant({"tau_hours": 96.0}),
}


# ---------------------------------------------------------------------------------------------------------------------
# The table: runs are read back from it
# ---------------------------------------------------------------------------------------------------------------------


def read_runs() -> pd.DataFrame:
    """The runs that stand in ablation.md, as text."""
    text = TABLE.read_text("utf-8") if TABLE.exists() else ""
    lines = text[text.find("| variant | seed |") :].splitlines()[2:] if "| variant | seed |" in text else []
    rows = [re.split(r" *\| *", line.strip("| ")) for line in lines if line.startswith("|")]
    return pd.DataFrame(rows, columns=RUN_COLUMNS)


def summary(runs: pd.DataFrame) -> str:
    """A row per variant: mean and standard deviation over the seeds; the difference is over the seeds of both."""
    numbers = runs.replace("-", "nan").astype(
        {"AUROC": float, "of the way": float, "validation loss": float, "seconds": float}
    )
    default = numbers[numbers.variant == "default"].set_index("seed").AUROC
    rows = []
    for name in (name for name in VARIANTS if name in set(runs.variant)):
        group = numbers[numbers.variant == name].set_index("seed")
        gain = (group.AUROC - default).dropna()
        rows.append(
            [
                name,
                f"{group.AUROC.mean():.3f} ({group.AUROC.std():.3f})".replace("nan", "-"),
                f"{gain.mean():+.3f} ({gain.std():.3f})".replace("nan", "-").replace("+-", "-"),
                f"{group['of the way'].mean():.1%}".replace("nan%", "-"),
                f"{group['validation loss'].mean():.3f}",
                f"{group.seconds.mean():.0f}",
                len(group),
            ]
        )
    return markdown(
        [
            "variant",
            "test AUROC, mean (sd)",
            "gain over the default (sd)",
            "of the way",
            "validation loss",
            "seconds",
            "seeds",
        ],
        rows,
    )


def write_table(runs: pd.DataFrame) -> None:
    parts = [
        "# Ablation",
        "Written by `ablation.py`, which says how to read it: one change to the default at a time, "
        "text through the hashing encoder.",
    ]
    for data, group in runs.groupby("data", sort=False):
        parts.append(f"## {data}\n\n{summary(group)}")
    parts += [machine(), f"## Runs\n\n{markdown(RUN_COLUMNS, runs.to_numpy().tolist())}"]
    train.write_whole(TABLE, lambda path: path.write_text("\n\n".join(parts) + "\n", "utf-8"))


def many_test_stays(table: train.StayTable, share: float, seed: int) -> train.Split:
    """train.py's split, of which only a share is trained on and validated; no patient of these is tested."""
    split = train.split_by_patient(table, seed)
    train_stays, validation_stays = (part[: round(share * len(part))] for part in (split.train, split.validation))
    patients = table.stays.patient_id
    used = patients.isin(patients.iloc[[*train_stays, *validation_stays]])
    return train.Split(train_stays, validation_stays, (~used).to_numpy().nonzero()[0])


def stays_and_splits(options) -> tuple[train.StayTable, np.ndarray | None, str, Callable[[int], list[train.Split]]]:
    """The table, the true risks where there are such, what the data are called, and the splits of a seed."""
    if not options.data:
        table, true_risk = synthetic_stays(options.all)
        return (
            table,
            true_risk,
            f"{options.sample} synthetic stays",
            lambda seed: [many_test_stays(table, options.sample / options.all, seed)],
        )
    settings = train.Settings(observation_hours=options.observation_hours)
    table, _ = train.choose_cohort(train.read_stays(options.data, options.cache_dir)[0], settings)
    when = f", {options.observation_hours:g} h after admission" if options.observation_hours else ""
    name = f"{len(table.stays)} stays of {Path(options.data).name}{when}, 5 folds"
    name += f", batches of {options.batch_size}, {options.max_epochs} epochs at most"
    name += f", width {options.d_model}, {options.n_layers} layers"
    return table, None, name, lambda seed: list(train.cross_validation_splits(table, 5, seed))


def score_variant(variant: Variant, table, splits, vectors, true_risk, settings) -> list[str]:
    """AUROC, of the way, validation loss, epochs and seconds: of one run, or pooled over one run per fold."""
    runs = [
        train_and_test(table, split, vectors, replace(settings, **variant.settings), variant.change) for split in splits
    ]
    stays = np.concatenate([split.test for split in splits])
    auroc = roc_auc_score(table.labels[stays], np.concatenate([run.probabilities for run in runs]))
    best = math.nan if true_risk is None else roc_auc_score(table.labels[stays], true_risk[stays])
    return [
        f"{auroc:.4f}",
        f"{(auroc - 0.5) / (best - 0.5):.4f}".replace("nan", "-"),
        f"{np.mean([run.validation_loss for run in runs]):.4f}",
        f"{np.mean([run.epochs for run in runs]):.0f}",
        f"{sum(run.seconds for run in runs):.0f}",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=2000, metavar="STAYS", help="train and validate as of this many")
    parser.add_argument("--all", type=int, default=5000, metavar="STAYS", help="synthetic stays in all")
    parser.add_argument("--data", help="real stays instead, as train.py --data takes them")
    parser.add_argument("--observation-hours", type=float, default=0.0, help="as in train.py")
    parser.add_argument("--cache-dir", default="clinical_LF_precomp_emb", help="where query.sql's result is kept")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=train.Settings().batch_size,
        help="of the default; smaller where stays are few",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help="see --list"
    )
    parser.add_argument("--max-epochs", type=int, default=train.Settings().max_epochs)
    parser.add_argument("--d-model", type=int, default=train.Settings().d_model, help="64 is quick, and decides alike")
    parser.add_argument("--n-layers", type=int, default=train.Settings().n_layers)
    parser.add_argument("--verbose", action="store_true", help="show every epoch")
    parser.add_argument("--list", action="store_true", help="name the variants and stop")
    options = parser.parse_args()
    if options.list:
        return print(
            "\n".join(
                f"{name:36}{variant.settings or variant.change.__name__}" if name != "default" else name
                for name, variant in VARIANTS.items()
            )
        )
    if options.verbose:
        log_epochs()
    table, true_risk, data, splits_of = stays_and_splits(options)
    vectors = hashing_vectors(table)
    default = train.check_settings(
        train.Settings(
            max_epochs=options.max_epochs,
            batch_size=options.batch_size,
            observation_hours=options.observation_hours,
            d_model=options.d_model,
            n_layers=options.n_layers,
        )
    )
    for seed in options.seeds:
        splits = splits_of(seed)
        for name in options.variants:
            runs = read_runs()  # anew each time: another process may add to it
            if ((runs.variant == name) & (runs.seed == str(seed)) & (runs.data == data)).any():
                continue
            row = [
                name,
                str(seed),
                data,
                *score_variant(VARIANTS[name], table, splits, vectors, true_risk, replace(default, seed=seed)),
            ]
            write_table(pd.concat([read_runs(), pd.DataFrame([row], columns=RUN_COLUMNS)], ignore_index=True))
            print("  ".join(f"{column} {value}" for column, value in zip(RUN_COLUMNS, row, strict=True)), flush=True)


if __name__ == "__main__":
    main()
