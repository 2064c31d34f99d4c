"""Does the method find planted causes? Train on samples of known truth, explain, compare; exit 1 if short of it.

    python tests/selfcheck.py                         # five samples, a model of either recipe for each; two hours
    python tests/selfcheck.py --seeds 1 --stays 500   # a quick look

Every criterion stands in the log with its value, its interval over patients and what is asked, and in --out as JSON.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import make_sample

import explain_clinicalLF as explain
import train
from clinical_lf import files, metrics, tables
from clinical_lf.settings import setting, settings_from

# Of the sample's effects: a cause then moves the logit by 1.5 (median). With the full effects seven in ten true logits
# lie beyond 4, and training has no reason to learn how far beyond: attributions cannot have the size of the truth.
EFFECTS = 0.35
# Each thing measured: what is asked, which limit of its interval must hold that, and the sentence about it.
CRITERIA = pd.read_csv(Path(__file__).with_name("selfcheck.csv"), keep_default_na=False, index_col="check")
UNSIGNED = ("attention", "rollout")  # methods that say where the model looks, not which way: nothing is asked of them
HARMLESS = {"decoys": ("decoy",), "traps": ("early", "lone")}  # what only looks alarming; what elsewhere is a cause


@dataclass(frozen=True)
class Size:
    """How much the self-check takes, and where it is written."""

    stays: int = setting(2000, "Stays that each model is trained on.")
    epochs: int = setting(50, "Epochs of each.")
    seeds: int = setting(5, "Samples.")
    cache_dir: str = setting("clinical_LF_precomp_emb", "Folder of the text vectors.")
    out: str = setting("", "JSON file for the criteria.")


def criterion(check: str, method: str, found: dict[str, Any], **said: Any) -> dict[str, Any]:
    """Return one of CRITERIA as a row, as the checks of an explanation are; nothing is asked of UNSIGNED methods."""
    asked, limit, words = CRITERIA.loc[check]
    row: dict[str, Any] = {"check": check.format(**said), "method": method}
    row |= {part: found.get(part, np.nan) for part in ("value", "low", "high", "n")}
    row["threshold"] = "" if method in UNSIGNED else asked
    row["passed"] = explain.judged(check, method, found, row["threshold"], limit).passed
    return row | {"sentence": words.format(**row, **said)}


def run_of(checkpoint: train.Checkpoint, table: tables.StayTable, vectors: Any) -> explain.Run:
    """Return a model and stays it has not seen, ready to be explained."""
    dataset = train.ClinicalSequenceDataset(table, checkpoint.preprocessor, vectors)
    logits = train.predict_logits(checkpoint.model, dataset, checkpoint.settings, explain.float32_accelerator())
    typical = explain.typical_texts(table.texts, checkpoint.preprocessor.state_dict()["item_quantiles"])
    return explain.Run(checkpoint, table, dataset, logits, len(logits), checkpoint.is_new_item(table.texts), typical)


def train_on_sample(seed: int, folder: Path, size: Size, item_history: bool) -> tuple[explain.Run, pd.DataFrame]:
    """Return a model trained on a fresh sample, with stays it has not seen, and the truth about all stays' events."""
    sample = make_sample.make_sample(round(size.stays / 0.64), seed, EFFECTS)  # train.py trains on 64 %
    make_sample.write_csv(sample, folder / "sample.csv")
    given: dict[str, Any] = {"data": str(folder / "sample.csv"), "output_dir": str(folder), "text_encoder": "hashing"}
    given |= {"cache_dir": size.cache_dir, "seed": seed, "max_epochs": size.epochs, "save_attention_every": 0}
    given["item_history"] = item_history
    trainer, checkpoint = train.train_model(train.Settings(**given), accelerator=explain.float32_accelerator())
    assert trainer.test_set is not None
    run = run_of(checkpoint, trainer.test_set.table, trainer.test_set.text_vectors)
    return run, sample.events.assign(event_text=sample.table["event_text"])


def with_truth(events: pd.DataFrame, truth: pd.DataFrame) -> pd.DataFrame:
    """Return the events with true_effect, role and group, by stay, text and order; ValueError for another sample's."""
    keys = ["icu_stay_id", "event_text"]
    left = events[keys].assign(again=events.groupby(keys).cumcount())
    right = truth.assign(again=truth.groupby(keys).cumcount())
    found = left.merge(right, on=[*keys, "again"], how="left", validate="one_to_one")
    if found["true_effect"].isna().any():
        raise ValueError("some events are not in the truth: events and truth are of different samples.")
    return events.assign(**{name: found[name].to_numpy() for name in truth.columns.difference(keys)})


def planted_scores(events: pd.DataFrame) -> pd.DataFrame:
    """Return, per stay and method: precision@k of the k events that truly act, share of right signs, mean |scores|.

    `events` have true_effect (logit) and role. `cause`, `decoys` and `traps` are the mean |score| of such events.
    """
    rows = []
    for (stay, patient), part in events.groupby(["icu_stay_id", "patient_id"], sort=False):
        effect = part["true_effect"].to_numpy()
        causal = effect != 0
        for method in (*explain.METHODS, "rollout") if causal.any() else ():
            score = part[method].to_numpy(float)
            top = np.argsort(-np.abs(score), kind="stable")[: causal.sum()]
            row = {"icu_stay_id": stay, "patient_id": patient, "method": method}
            row |= {"precision": causal[top].mean(), "chance": causal.mean(), "cause": np.abs(score[causal]).mean()}
            row["right_sign"] = (np.sign(score[causal]) == np.sign(effect[causal])).mean()
            for name, roles in HARMLESS.items():
                of_role = part["role"].isin(roles).to_numpy()
                row[name] = np.abs(score[of_role]).mean() if of_role.any() else np.nan
            rows.append(row)
    return pd.DataFrame(rows)


def redundant_groups(run: explain.Run, events: pd.DataFrame) -> pd.DataFrame:
    """Return each group of redundant events: size, IG sum, the model's effects of it, and the true effect.

    `joint` is how far the logit falls without the group, `alone` how far it rises if the group came to a stay whose
    events say nothing. Where evidence saturates they differ, and Integrated Gradients,
    taken along the way from one end to the other, can equal neither: they are held to the mean of both, the Shapley
    value of the group against all else.
    """
    model, baseline = run.checkpoint.model, run.checkpoint.baseline
    ids, rows = run.table.stays["icu_stay_id"].tolist(), []
    for (stay, _), part in events[events["role"] == "redundant"].groupby(["icu_stay_id", "group"]):
        sequence, static = run.inputs(ids.index(stay))
        is_member = np.isin(np.arange(sequence.shape[1]), part["event"])
        logits = explain.variant_logits(model, run.one(ids.index(stay)), np.stack([is_member | True, ~is_member]))
        nothing, statics = explain.baselines_like(sequence, static, baseline)
        members = torch.from_numpy(is_member)[:, None]
        with torch.no_grad():
            ends = model.logits(torch.cat([torch.where(members, sequence, nothing), nothing]), statics.expand(2, -1))
        row = {"patient_id": part["patient_id"].iloc[0], "size": len(part), "true": part["true_effect"].sum()}
        row |= {"joint": logits[0] - logits[1], "alone": float(ends[0] - ends[1])}
        rows.append(row | {"attribution": part["attribution"].sum()})
    return pd.DataFrame(rows)


def planted_pairs(run: explain.Run, events: pd.DataFrame) -> pd.DataFrame:
    """Return the interaction of each planted pair, a second difference by absence, and its truth.

    The halves of the liver's evidence count only together; of two events of the airway one would do.
    """
    ids, rows = run.table.stays["icu_stay_id"].tolist(), []
    for (stay, _), part in events[events["group"] != ""].groupby(["icu_stay_id", "group"]):
        if len(part) == 2:
            one = run.one(ids.index(stay))
            first, second = (np.arange(one.sequence.shape[1]) != event for event in part["event"])
            keep = np.stack([first | True, first, second, first & second])
            logits = explain.variant_logits(run.checkpoint.model, one, keep)
            kind, true = part["kind"].iloc[0], part["true_effect"].sum()
            row = {"patient_id": part["patient_id"].iloc[0], "kind": kind, "found": logits @ [1, -1, -1, 1]}
            rows.append(row | {"true": true if kind == "liver" else -true})
    return pd.DataFrame(rows)


def of_pairs(pairs: pd.DataFrame, settings: explain.ExplainSettings) -> Iterator[dict[str, Any]]:
    """Yield how far the planted pairs of each kind interact in the model, and how many with the right sign."""
    for kind, part in pairs.groupby("kind"):
        right = np.sign(part["found"]) == np.sign(part["true"])
        for check, values in (("pairs, {kind}", part["found"]), ("pairs, {kind}: sign", right.astype(float))):
            found = metrics.mean_with_interval(values, part["patient_id"], settings.n_bootstrap, settings.seed)
            yield criterion(check, "if_absent", found, kind=kind, truth=part["true"].mean())


def of_latest(events: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield what is said of a stay's latest lactate where an earlier one was higher, against what is said of causes.

    Each as a share of the true effect: 1 is right however far the model falls short of all effects.
    """
    lactates, causes = events[events["kind"] == "lactate"], events[events["true_effect"] != 0]
    of_stay = lactates.groupby(["patient_id", "icu_stay_id"])
    is_latest = of_stay["event"].transform("max") == lactates["event"]
    chosen = lactates[is_latest & (of_stay["value"].cummax() > lactates["value"]) & (lactates["true_effect"] != 0)]
    for method in ("attribution", "if_absent"):
        said = [part[method].sum() / part["true_effect"].sum() for part in (chosen, causes)]
        found = {"value": float(said[0] / said[1]) if len(chosen) else np.nan, "n": len(chosen)}
        yield criterion("latest after higher", method, found)


def of_rank(scores: pd.DataFrame, settings: explain.ExplainSettings) -> Iterator[dict[str, Any]]:
    """Yield what is asked of planted truth, per method; attention, which has no sign, is measured too."""
    checks = {"planted precision@k": "precision", "planted sign": "right_sign"}
    for method, part in scores.groupby("method", sort=False):
        for check, column in list(checks.items())[: 1 if method in UNSIGNED else 2]:
            found = metrics.mean_with_interval(part[column], part["patient_id"], settings.n_bootstrap, settings.seed)
            yield criterion(check, method, found, chance=part["chance"].mean())
        for name in HARMLESS:
            found = {"value": float(part["cause"].mean() / part[name].mean()), "n": int(part[name].count())}
            yield criterion(f"causes over {name}", method, found)


def of_redundancy(groups: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield the explanation's error (IG against the model's effects) and the model's (against the truth), by size."""
    for size, part in groups.groupby("size"):
        push, joint, alone, true = part[["attribution", "joint", "alone", "true"]].mean()
        for check, method, found, wanted in (
            ("redundant, {size}", "attribution", push, (joint + alone) / 2),
            ("redundant, {size}: in the stay", "attribution", push, joint),
            ("redundant, {size}: model", "model", joint, true),
        ):
            error = {"value": float(abs(found / wanted - 1)), "n": len(part)}
            yield criterion(check, method, error, size=size)


def of_traps(events: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield how far the model's own logit moves, and how large the push is, for a trap in shares of a cause's.

    The truth is 0. Where both shares are large the model takes traps for causes, and the explanation says so.
    """
    is_trap, is_cause = events["role"].isin(HARMLESS["traps"]), events["true_effect"] != 0
    for column, method in (("if_absent", "model"), ("attribution", "attribution")):
        size = events[column].abs()
        found = {"value": float(size[is_trap].mean() / size[is_cause].mean()), "n": int(is_trap.sum())}
        yield criterion("traps in shares of causes", method, found, column=column, cause=size[is_cause].mean())


def selfcheck(size: Size, settings: explain.ExplainSettings, item_history: bool) -> list[dict[str, Any]]:
    """Train on samples with known causes, explain, and compare; return every criterion of a recipe."""
    samples, groups, pairs, runs = [], [], [], []
    for seed in range(size.seeds):
        with tempfile.TemporaryDirectory() as folder:
            run, truth = train_on_sample(seed, Path(folder), size, item_history)
        found = explain.explain_stays(run, replace(settings, seed=seed))
        files.logger.info(f"Seed {seed}      {len(found['stays'])} stays explained")
        events = with_truth(found["events"], truth)
        groups.append(redundant_groups(run, events))
        pairs.append(planted_pairs(run, events))
        samples.append(events.assign(patient_id=events["patient_id"].astype(str) + f" of sample {seed}"))
        runs.append(found["faithfulness"].assign(seed=seed))
    events = pd.concat(samples)
    criteria = [*of_rank(planted_scores(events), settings), *of_redundancy(pd.concat(groups)), *of_traps(events)]
    criteria += [*of_pairs(pd.concat(pairs), settings), *of_latest(events)]
    rows = [row | {"seed": "all"} for row in criteria] + pd.concat(runs).to_dict("records")
    return [row | {"recipe": "item history" if item_history else "774 inputs"} for row in rows]


def say(rows: pd.DataFrame) -> int:
    """Log every criterion with its value and threshold; return 0 if none falls short, else 1."""
    for row in rows.itertuples():
        verdict = {True: "ok", False: "SHORT"}.get(row.passed, "")
        interval = "" if np.isnan(row.low) else f" [{row.low:.3g}, {row.high:.3g}]"
        asked = f"  asked: {row.threshold}" if row.threshold else ""
        name = f"{verdict:6s}{row.recipe:13s}seed {row.seed!s:4s}{row.check:32s}{row.method:16s}"
        files.logger.info(f"{name}{row.value:9.3g}{interval}{asked}")
    fallen = int(rows["passed"].eq(False).sum())
    files.logger.info(f"Self-check  {fallen} of {rows['passed'].notna().sum()} criteria fall short")
    return 1 if fallen else 0


def main() -> int:
    size = settings_from(None, Size, __doc__)
    files.log_to_stdout()
    settings = explain.ExplainSettings(stays=0)
    rows = pd.DataFrame([*selfcheck(size, settings, False), *selfcheck(size, settings, True)])
    if size.out:
        files.write_json(Path(size.out), json.loads(rows.to_json(orient="records")))
    return say(rows)


if __name__ == "__main__":
    sys.exit(main())
