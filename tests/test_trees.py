"""clinical_lf/trees.py: what the trees are given, and how a model is compared with them."""

import json

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.metrics import average_precision_score, roc_auc_score
from small_table import arguments, small_table

import train
from clinical_lf import trees
from clinical_lf.reading import read_stays
from clinical_lf.tables import Split

RANDOM = np.random.default_rng(0)
DIED = (np.arange(200) % 4 == 0).astype(float)


def test_summaries_of_an_item_are_those_of_its_numbers_and_texts_without_one_are_counted_whole(tmp_path, monkeypatch):
    table = small_table(4, 5)
    table["event_text"] = "Culture | Organism: B"
    lactates = [f"Lab: Lactate | Value: {number} mmol/L" for number in (4, 1, 7)]
    table.loc[:4, "event_text"] = [*lactates, *["Culture | Organism: A"] * 2]
    stays, _ = read_stays(table, tmp_path)
    found = trees.item_summaries(stays, np.zeros((4, 1)), np.arange(4))
    assert found.shape == (4, 1 + 6 + 6 + 1)  # only culture B, of three stays, and no number
    monkeypatch.setattr(trees, "FEWEST_STAYS", 1)
    found = trees.item_summaries(stays, np.zeros((4, 1)), np.arange(4))
    numbers = found[:, 7:25].reshape(4, 3, 6)
    lactate = np.flatnonzero(~np.isnan(numbers[0, :, 0]))
    np.testing.assert_allclose(numbers[0, lactate], [[7, 1, 7, 4, 4, 3]])  # last, least, most, mean, first, deviation
    assert np.isnan(numbers[1:]).all() and sorted(found[0, 25:]) == [0, 2, 3] and sorted(found[1, 25:]) == [0, 0, 5]


@pytest.fixture(autouse=True)
def few_trees(monkeypatch):
    monkeypatch.setattr(trees, "SIZES", [(4, 1.0, 20)])


def test_trees_find_low_and_high_values_and_leave_out_what_training_never_saw():
    values, order = RANDOM.normal(size=600), np.arange(600)
    died = (np.abs(values) > 1).astype(float)
    features = np.column_stack([values, np.where(order < 400, np.nan, died)]).astype(np.float32)
    risks = trees.tree_risks(features, died, Split(order[:300], order[300:400], order[400:]), 0)
    assert roc_auc_score(died[400:], risks[400:]) > 0.98 and 0 < risks.min() < risks.max() < 1


def test_comparison_equals_scikit_learn_and_says_who_is_shown_to_be_ahead():
    good, bad = (expit(2 * DIED * strength + RANDOM.normal(size=200)) for strength in (1.5, 0.2))
    columns = lambda risks: (DIED, risks, np.arange(200))
    found = trees.compared(columns(good), bad, n_bootstrap=200, seed=0)
    mean = expit((logit(good) + logit(bad)) / 2)
    for metric, score in (("auroc", roc_auc_score), ("auprc", average_precision_score)):
        values = {name: found[name][metric]["value"] for name in found}
        assert values["trees"] == pytest.approx(score(DIED, bad))
        assert values["model_less_trees"] == pytest.approx(score(DIED, good) - score(DIED, bad))
        assert values["mean_of_both_less_trees"] == pytest.approx(score(DIED, mean) - score(DIED, bad))
        assert found["model_less_trees"][metric]["low"] < values["model_less_trees"]
    for model, other, said in ((good, bad, "rank better"), (bad, good, "rank worse"), (good, good, "is not shown")):
        assert said in trees.sentence(trees.compared(columns(model), other, n_bootstrap=200, seed=0))
    assert trees.compared((DIED * 0, good, np.arange(200)), bad, n_bootstrap=9, seed=0) == {}


def test_a_run_says_what_trees_find_in_the_same_stays(tmp_path, capfd):
    small_table().to_csv(tmp_path / "data.csv", index=False)
    given = [word for word in arguments(tmp_path, tmp_path / "data.csv", "--no-test") if word != "--no-baseline"]
    assert train.main(given) == 0 and "Trees       Too few of one outcome" in capfd.readouterr().out  # 8 stays judge
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["boosted_trees"].keys() == {"trees", "mean_of_both", "model_less_trees", "mean_of_both_less_trees"}
    model, less = metrics["metrics"]["validation"]["auroc"]["value"], metrics["boosted_trees"]["model_less_trees"]
    assert model - metrics["boosted_trees"]["trees"]["auroc"]["value"] == pytest.approx(less["auroc"]["value"])


def test_half_a_training_label_is_what_trees_say_that_never_saw_the_patient(tmp_path):
    table = small_table(80, 2)
    table.loc[[0, 1, 2, 4], "event_text"] = "Lab: Rare | Value: 5 mg"  # its deviation is known of one stay, in one fold
    stays, _ = read_stays(table, tmp_path)
    telling, idle = (trees.unseen_risks(stays, column[:, None], 0) for column in (stays.labels, RANDOM.normal(size=80)))
    assert roc_auc_score(stays.labels, telling) > 0.95 > 0.8 > roc_auc_score(stays.labels, idle)
    assert not trees.unseen_risks(stays.take(np.flatnonzero(stays.labels == 0)[:9]), np.zeros((9, 1)), 0).any()
    seen, small = [], {"text_encoder": "hashing", "d_model": 32, "n_layers": 0, "max_epochs": 1, "item_history": True}
    settings = train.Settings(output_dir=str(tmp_path / "out"), cache_dir=str(tmp_path), **small)
    train.train_model(settings, table, at_start=seen.append)
    of_table, risks = seen[0].train_set.table.labels, 2 * seen[0].train_set.labels[:, 0].numpy()
    expected = trees.unseen_risks(seen[0].train_set.table, seen[0].train_set.static.numpy(), 0)
    np.testing.assert_allclose(risks - of_table, expected, atol=1e-6)
