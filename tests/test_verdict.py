"""The verdict before the score: each broken model gets its sentence, and the good one none."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from small_table import LinearStay

import explain_clinicalLF as explain
import train

N_STAYS = 80
LABELS = np.tile([1.0, 0, 0, 0], N_STAYS // 4)
PATIENTS = np.arange(N_STAYS)


def good_risks():
    """Risks that rank most deaths above most survivors."""
    noise = np.random.default_rng(0).normal(0, 1, N_STAYS)
    return 1 / (1 + np.exp(-(3 * LABELS - 2 + noise)))


def of(findings, name):
    return next(finding for finding in findings if finding.name == name)


def test_good_model_discriminates():
    found = of(explain._discrimination(LABELS, good_risks(), PATIENTS, 200, 0), "discrimination")
    assert found.passed is True and found.low > 0.5 and found.sentence.startswith("This model discriminates")


def test_shuffled_labels_leave_nothing_but_noise_to_explain():
    labels = np.random.default_rng(1).permutation(LABELS)
    found = of(explain._discrimination(labels, good_risks(), PATIENTS, 200, 0), "discrimination")
    assert found.passed is False and found.low <= 0.5
    assert found.sentence.startswith("This model does not discriminate") and "explains noise" in found.sentence


def test_calibration_says_what_was_predicted_and_what_happened():
    risks = np.where(LABELS == 1, 0.6, 0.2)
    found = of(explain._discrimination(LABELS, risks, PATIENTS, 50, 0), "calibration")
    assert found.passed is None and "30 % predicted on average, 25 % died" in found.sentence


@pytest.mark.parametrize("labels", [np.full(N_STAYS, np.nan), np.zeros(N_STAYS)], ids=["unknown", "one outcome"])
def test_without_both_outcomes_nothing_is_said_of_discrimination(labels):
    (found,) = explain._discrimination(labels, good_risks(), PATIENTS, 50, 0)
    assert found.passed is None and "cannot be said" in found.sentence


def test_untrained_model_hardly_tells_stays_apart():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = train.ClinicalTransformer(14, 4, 16, 2, 2, 32, 2).eval()
        with torch.no_grad():
            logits = model.logits(torch.randn(20, 6, 14), torch.randn(20, 4)).squeeze(1).numpy()
    found = explain._spread_of(logits)
    assert found.passed is False and "nothing to explain" in found.sentence
    assert explain._spread_of(10 * logits / logits.std()).passed is True


def test_foreign_stays_are_said_to_be_foreign():
    unseen = np.arange(10) < 4
    found = of(explain._likeness(unseen, held_out=False), "likeness")
    assert (
        found.passed is False
        and found.sentence.startswith("These stays are not like those")
        and "40 %" in found.sentence
    )
    assert of(explain._likeness(unseen & False, held_out=True), "likeness").passed is True


def test_items_that_training_never_saw_are_found_by_their_hash():
    texts = ["Lab: Lactate (Blood) | Value: 9 mmol/L", "Lab: Sodium (Blood) | Value: 140 mEq/L"]
    known = [train.item_hash("Lab: Lactate (Blood) | Value: 1.2 mmol/L")]
    checkpoint = train.Checkpoint(*[None] * 7, state={"training_items": known})
    assert checkpoint.is_new_item(texts).tolist() == [False, True]


def test_planted_leak_is_named_and_a_common_item_is_not():
    deaths = np.flatnonzero(LABELS == 1)
    stays = np.concatenate([np.arange(N_STAYS), deaths, deaths])
    items = np.array(["Lab: Sodium"] * N_STAYS + ["Procedure: Comfort measures"] * 2 * len(deaths), dtype=object)
    leaks = explain._leaking_items(items, stays, LABELS)
    assert leaks == {"Procedure: Comfort measures": 1.0}
    found = explain._leaks_in_words(leaks)
    assert found.passed is False
    assert found.sentence.startswith("One text alone tells the outcome: Procedure: Comfort measures (AUROC 1.00")
    assert explain._leaks_in_words(explain._leaking_items(items[:N_STAYS], stays[:N_STAYS], LABELS)).passed is True


def test_an_item_that_only_survivors_have_is_a_leak_too_and_few_deaths_say_nothing():
    survivors = np.flatnonzero(LABELS == 0)
    items = np.array(["Procedure: Discharge teaching"] * len(survivors), dtype=object)
    assert list(explain._leaking_items(items, survivors, LABELS)) == ["Procedure: Discharge teaching"]
    few = np.where(np.arange(N_STAYS) < 36, LABELS, np.nan)  # nine deaths
    assert explain._leaking_items(items, survivors, few) == {}


# ---- What the model uses


def test_a_model_that_sums_its_events_uses_no_time():
    linear = LinearStay(14, 4)
    inputs = (torch.randn(1, 7, 14), torch.randn(1, 4))
    run = SimpleNamespace(
        checkpoint=SimpleNamespace(model=linear), inputs=lambda stay: inputs, parts=explain._event_parts(14)
    )
    with torch.no_grad():
        logit = float(linear.logits(*inputs))
    assert explain._logit_without_time(run, 0, seed=1) == pytest.approx(logit, abs=1e-4)
    stays = pd.DataFrame({"logit": [logit] * 4, "logit_without_time": [logit] * 4, "patient_id": range(4)})
    assert "hardly uses" in explain._use_of_time(stays, explain.ExplainSettings(n_bootstrap=10)).sentence
    moved = stays.assign(logit_without_time=logit - 1)
    found = explain._use_of_time(moved, explain.ExplainSettings(n_bootstrap=10))
    assert (found.value, found.low, found.high) == (1, 1, 1) and "uses when" in found.sentence


# ---- Randomisation


@pytest.fixture(scope="module")
def models():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = train.ClinicalTransformer(14, 4, 16, 2, 2, 32, 2).eval()
    return model, explain._untrained_like(model, 1)


def test_every_weight_belongs_to_one_part_of_the_cascade(models):
    model, fresh = models
    own, other = model.state_dict(), fresh.state_dict()
    changed = {}
    for part in explain.CASCADE:
        state = explain._reset_down_to(part, model, fresh).state_dict()
        changed[part] = {name for name in state if not torch.equal(state[name], own[name])}
        assert all(torch.equal(state[name], other[name]) for name in changed[part])
    assert all(name.startswith("classifier") for name in changed["classifier"])
    assert changed["classifier"] < changed["pooling"] < changed["layers"] < changed["projection"]
    assert changed["projection"] == {name for name in own if not torch.equal(own[name], other[name])}


def test_random_models_that_are_the_model_itself_agree_with_it_no_more_than_with_each_other(models):
    model, _ = models
    sequence, static = torch.randn(1, 12, 14), torch.randn(1, 4)
    own = explain._event_totals(model, sequence, static, None, explain.FEW_STEPS)
    found = explain._stay_randomisation([model, model], sequence, static, None, own)
    assert found["model and reset"] == pytest.approx(1) and found["reset excess"] == pytest.approx(0)


def test_gain_over_random_resamples_patients_not_stays():
    orders = [*explain.ORDERS, "random 1"]
    rows = []
    for stay in range(6):  # two patients: nothing to resample
        for direction in ("deletion", "insertion"):
            rows += [(stay, stay % 2, direction, order, 0.5, float(stay)) for order in orders]
    curves = pd.DataFrame(rows, columns=["icu_stay_id", "patient_id", "direction", "order", "fraction", "change"])
    found = explain._gains_over_random(curves, explain.ExplainSettings(n_bootstrap=10))
    assert all(row["n"] == 6 and np.isnan(row["low"]) for row in found)
