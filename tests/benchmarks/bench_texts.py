"""Do the shorter texts of query.sql lose anything? The same stays, rows, folds and columns; only texts differ.

    python tests/benchmarks/bench_texts.py --data PATH/TO/mimic-iv-demo --observation-hours 24 --seeds 0 1 2 3 4
    python tests/benchmarks/bench_texts.py --sample 2000 --models "this model" --max-epochs 10 --d-model 64

The texts before are today's with the RULES put back: infusions also said their amount and numbers had 3 digits,
procedures lasted to the minute, labs had a digit more and their priority. A seed makes five folds by patient; each
model's held-out risks are compared stay by stay, and intervals resample patients. "Fixed trees" have one size, which
costs a twentieth of the tuned ones and leaves the comparison less to chance.
"""

import argparse
import sys
import tempfile
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
from bench_simple_models import MODELS, Data, boosted_trees, item_features
from common import ROOT, Ranking, hashing_vectors, machine, markdown, ranking, train

from clinical_lf import mimic, trees
from clinical_lf.items import items_and_values, read_text
from clinical_lf.reading import read_stays
from clinical_lf.tables import StayTable, choose_cohort, cross_validation_splits

Words = list[tuple[str, str]]  # what is written now, and what stood there before
RULES: dict[str, Words] = {
    "infusions: amount beside the rate, 3 digits": [
        (
            "IFNULL(i.rate, i.amount), 0)))), 0) AS digits",
            "i.rate, 0)))), 0) AS digits,\n    1 - IFNULL(FLOOR(LOG10(ABS(NULLIF(i.amount, 0)))), 0) AS amount_digits",
        ),
        ("|| COALESCE(\n        ' | Rate: '", "|| IFNULL(' | Amount: ' || AMOUNT, '') || IFNULL(' | Rate: '"),
        (
            """, ''),
        ' | Amount: ' || REGEXP_REPLACE(CAST(ROUND(i.amount, CAST(i.digits AS INT)) AS STRING), r'\\.0$', '')
          || IFNULL(' ' || NULLIF(TRIM(i.amountuom), ''), ''),
        ''
      )""",
            ", ''), '')",
        ),
        (
            "AMOUNT,",
            "REGEXP_REPLACE(CAST(ROUND(i.amount, CAST(GREATEST(0, 1 + i.amount_digits) AS INT)) AS STRING), "
            "r'\\.0$', '') || IFNULL(' ' || NULLIF(TRIM(i.amountuom), ''), ''),",
        ),
        ("ROUND(i.rate, CAST(i.digits AS INT))", "ROUND(i.rate, CAST(GREATEST(0, 1 + i.digits) AS INT))"),
    ],
    "procedures: to the minute": [("IF(p.minutes > 60, -FLOOR(LOG10(ABS(NULLIF(p.minutes, 0)))), 0)", "0")],
    "labs: a digit more": [
        (
            """IF(
        valuenum BETWEEN ref_range_lower - width AND ref_range_upper + width AND range_digits > own_digits,
        range_digits,
        own_digits
      )""",
            "GREATEST(0, own_digits, COALESCE(range_digits, own_digits + 1))",
        )
    ],
    "labs: priority": [
        ("AS flag,\n", "AS flag,\n    NULLIF(TRIM(priority), '') AS priority,\n"),
        (
            "|| IFNULL(' | Comment: ' || v.comment",
            "|| IFNULL(' | Priority: ' || v.priority, '') || IFNULL(' | Comment: ' || v.comment",
        ),
    ],
}
SAMPLE: Words = [
    ("    return as_charted(lab, in_steps)", "    return in_steps"),
    ("lab_delay(rng, n), values", "lab_delay(rng, n), as_charted(lab, values)"),  # the truth stays today's
    ("rounded(minutes, -first_digit(minutes)) if minutes > 60 else minutes", "minutes"),
    (
        '        f"Comment:',
        '        "Priority: " + ("STAT" if lab.category == "Blood Gas" else "ROUTINE"),\n        f"Comment:',
    ),
    ('Value: ART."', 'Value: ART. | Priority: STAT"'),
    ("written = rounded(rate, 1 - first_digit(rate))", "written, amount = rate, rate * minutes / 60"),
    ("| Rate: {written:.6g}", "| Amount: {amount:g} {unit} | Rate: {written}"),
]
MEAN_TEXT = "logistic regression, mean text"
FIXED = "fixed trees, item summaries"


def fixed_trees(data: Data) -> np.ndarray:
    with patch.object(trees, "SIZES", [(4, 0.3, 100)]):
        return boosted_trees(item_features(data), data)


CHOICES: dict[str, Callable[[Data], np.ndarray]] = {FIXED: fixed_trees, **MODELS}


def put_back(text: str, words: Words) -> str:
    """Return a text with words replaced; each must stand there once."""
    for now, before in words:
        if text.count(now) != 1:
            raise SystemExit(f"stands {text.count(now)} times, not once: {now}")
        text = text.replace(now, before)
    return text


def read_folder(folder: str, cache: str, rules: list[str], settings: train.Settings) -> StayTable:
    """Return the cohort of a MIMIC-IV folder, by query.sql with some of the former rules, and print its counts."""
    query = (ROOT / "query.sql").read_text("utf-8")
    for rule in rules:
        query = put_back(query, RULES[rule])
    labs = mimic.MIMIC_TABLES["hosp/labevents"]
    with tempfile.TemporaryDirectory() as place:
        mimic.QUERY_FILE = Path(place) / "query.sql"
        mimic.QUERY_FILE.write_text(query, "utf-8")
        mimic.MIMIC_TABLES["hosp/labevents"] = labs | {"priority": "VARCHAR"}
        table, report = read_stays(folder, cache)
        mimic.MIMIC_TABLES["hosp/labevents"] = labs
    doubles = report.counts.get("event_repeated", 0)
    print(f"{len(table.text) + doubles:,} rows, {doubles} doubles, {len(table.texts):,} texts with {rules}", flush=True)
    return choose_cohort(table, observation_hours=settings.observation_hours)[0]


def read_sample(n_stays: int, seed: int, words: Words) -> StayTable:
    """Return synthetic stays by tests/make_sample.py with some of its words put back."""
    module = types.ModuleType("former_sample")
    sys.modules["former_sample"] = module
    module.__file__ = str(ROOT / "tests" / "make_sample.py")
    exec(put_back(Path(module.__file__).read_text("utf-8"), words), module.__dict__)
    table, _ = read_stays(module.make_sample(n_stays, seed).table)
    print(f"{len(table.text):,} events, {len(table.texts):,} texts", flush=True)
    return table


def items_changed(before: StayTable, now: StayTable) -> str:
    """Return how many items (what trees read) stand in one of the two only, and how far their numbers lie apart."""
    items = [{read_text(text).item for text in table.texts[np.unique(table.text)]} for table in (before, now)]
    last = []
    for table in (before, now):
        item, value = items_and_values(table)
        events = pd.DataFrame({"stay": table.stay_of_event, "item": item.astype(object), "value": value}).dropna()
        last.append(events.groupby(["stay", "item"]).value.mean())
    both = pd.concat(last, axis=1, join="inner", keys=["before", "now"])
    apart = (both.now - both.before).abs() / both.before.abs().clip(lower=1e-9)
    return (
        f"items: {len(items[0])} before, {len(items[1])} now, {len(items[0] & items[1])} in both; an item's mean in a "
        f"stay differs in {(apart > 1e-9).mean():.0%}, by {apart.median():.2%} (median), {apart.quantile(0.99):.1%} "
        f"(99 in 100 less), {apart.max():.1%} at most"
    )


def held_out(name: str, table: StayTable, settings: train.Settings, seed: int) -> np.ndarray:
    """Return the held-out risk (n_stays,) of each stay over five folds by patient."""
    needs_vectors = "item summaries" not in name
    vectors = hashing_vectors(table) if needs_vectors else np.zeros((len(table.texts), 1), np.float32)
    risks = np.full(len(table.stays), np.nan)
    for split in cross_validation_splits(table, 5, seed):
        risks[split.test] = CHOICES[name](Data(table, vectors, split, replace(settings, seed=seed)))
    return risks


def mean_of(rankings: list[Ranking]) -> Ranking:
    """Return the mean over seeds; all resampled the same patients."""
    return Ranking(
        np.mean([found.value for found in rankings], axis=0), np.mean([found.draws for found in rankings], axis=0)
    )


def compare(name: str, before: StayTable, now: StayTable, settings: train.Settings, seeds: list[int]) -> list[str]:
    """Return a row: AUROC and AUPRC before, now, and now less before, means over the seeds."""
    found: dict[str, list[Ranking]] = {"before": [], "now": []}
    for seed in seeds:
        for when, table in (("before", before), ("now", now)):
            risks = held_out(name, table, settings, seed)
            patients = table.stays.patient_id.to_numpy()
            found[when].append(ranking(table.labels, risks, patients, settings.n_bootstrap))
    means = {when: mean_of(rankings) for when, rankings in found.items()}
    change = means["now"].less(means["before"])
    single = [now.value[0] - before.value[0] for before, now in zip(found["before"], found["now"], strict=True)]
    spread = f"{np.std(single, ddof=1):.3f}" if len(seeds) > 1 else "-"
    return [name, *means["before"].words(), *means["now"].words(), *change.words(signed=True), spread]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", help="a MIMIC-IV folder")
    source.add_argument("--sample", type=int, metavar="STAYS", help="this many synthetic stays")
    parser.add_argument("--rules", nargs="+", default=[""], help="put back only the rules that begin so")
    parser.add_argument("--models", nargs="+", default=[FIXED], help=", ".join(CHOICES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--observation-hours", type=float, default=0.0, help="as in train.py")
    parser.add_argument("--bootstrap", type=int, default=1000)
    parser.add_argument("--max-epochs", type=int, default=train.Settings().max_epochs)
    parser.add_argument("--d-model", type=int, default=train.Settings().d_model)
    parser.add_argument("--cache-dir", default="clinical_LF_precomp_emb", help="where query.sql's results are kept")
    options = parser.parse_args()
    settings = train.check_settings(
        train.Settings(
            observation_hours=options.observation_hours,
            n_bootstrap=options.bootstrap,
            max_epochs=options.max_epochs,
            d_model=options.d_model,
        )
    )
    if options.data:
        rules = [rule for rule in RULES if any(rule.startswith(start) for start in options.rules)]
        before = read_folder(options.data, options.cache_dir, rules, settings)
        now = read_folder(options.data, options.cache_dir, [], settings)
    else:
        before, now = (read_sample(options.sample, 0, words) for words in (SAMPLE, []))
    assert before.stays.icu_stay_id.equals(now.stays.icu_stay_id) and (before.labels == now.labels).all()
    print(f"{len(now.stays):,} stays, {now.labels.sum():.0f} deaths; {len(before.text):,} and {len(now.text):,} events")
    print(items_changed(before, now), flush=True)
    rows = [compare(name, before, now, settings, options.seeds) for name in options.models]
    header = ["model", "AUROC before", "AUPRC before", "AUROC now", "AUPRC now"]
    print(markdown([*header, "AUROC now less before", "AUPRC now less before", "sd over seeds"], rows))
    print(machine())


if __name__ == "__main__":
    main()
