"""explain_clinicalLF.py: attributions, ablations, attention, checks, verdict, files, on models with known answers."""

import doctest
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from matplotlib import pyplot as plt
from scipy.special import expit
from small_table import LinearStay, best_model, padded_logits

import explain_clinicalLF as explain
import train
from clinical_lf.explain_plots import FIGURES
from clinical_lf.explain_report import FLOOR, check_table
from clinical_lf.files import InputError, logger
from clinical_lf.items import HISTORY
from clinical_lf.reading import read_stays
from clinical_lf.tables import LABEL, known_at, stacked

N_EVENTS, INPUT_DIM, STATIC_DIM = 7, 14, 4  # an event: 5 type, 8 text, 1 time
EVERY_EVENT = torch.ones(1, N_EVENTS, dtype=torch.bool)
PARTS = ("type", "text", "time", "history")
ANALYSES = (explain.captum_analysis, explain.layer_analysis, explain.ablation_analysis)
LINEAR = LinearStay(INPUT_DIM, STATIC_DIM)
CASES = yaml.safe_load(Path(__file__).with_name("explain_cases.yaml").read_text("utf-8"))


def random_model(input_dim, static_dim, n_history=0):
    """A small model with two layers, whose query is random too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = train.ClinicalTransformer(input_dim, static_dim, 16, 2, 2, 32, 2, n_history=n_history).eval()
        made.query_vector.data.normal_()
        return made


@pytest.fixture(scope="module")
def model():
    return random_model(INPUT_DIM, STATIC_DIM)


@pytest.fixture
def stay():
    """One stay, sequence (1, 7, 14) and static (1, 4), a baseline, and `nothing`: its event at every position."""
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(1))
    inputs, baseline = (normal(1, N_EVENTS, INPUT_DIM), normal(1, STATIC_DIM)), {"event": normal(INPUT_DIM)}
    baseline["static"], nothing = normal(STATIC_DIM), baseline["event"].expand(1, N_EVENTS, -1)
    return SimpleNamespace(sequence=inputs[0], static=inputs[1], inputs=inputs, baseline=baseline, nothing=nothing)


@pytest.fixture(scope="module")
def batch():
    """Two stays of 6 and 3 events, padded to 8 with what must never count."""
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(1))
    sequences, mask = normal(2, 8, INPUT_DIM), torch.arange(8) < torch.tensor([[6], [3]])
    sequences[~mask] = 1e3
    return SimpleNamespace(sequences=sequences, static=normal(2, STATIC_DIM), mask=mask, lengths=(6, 3))


@pytest.fixture(scope="module")
def attention_weights(model, batch):
    with torch.no_grad():
        return model(batch.sequences, batch.static, batch.mask, return_attention=True)[1]


def logit(model, sequence, static, mask=None):
    with torch.no_grad():
        return float(model.logits(sequence, static, mask))


# ---- Attribution
def test_attribution_on_a_linear_model_is_weight_times_difference(stay):
    found = explain.captum_analysis(LINEAR, *stay.inputs, baseline=stay.baseline)
    torch.testing.assert_close(found.events, LINEAR.w.data * (stay.sequence - stay.baseline["event"]))
    torch.testing.assert_close(found.statics, LINEAR.v.data * (stay.static - stay.baseline["static"]))


def test_attributions_sum_to_the_difference_of_the_logits_also_at_every_layer_and_are_the_same_twice(model, stay):
    found, again = (explain.captum_analysis(model, *stay.inputs, baseline=stay.baseline) for _ in range(2))
    total, own = float(found.events.sum() + found.statics.sum()), logit(model, *stay.inputs)
    difference = own - logit(model, stay.nothing, stay.baseline["static"][None])
    assert found.complete.all() and total == pytest.approx(difference, abs=0.02)
    assert total - found.gap_errors[0] == pytest.approx(found.logits[0] - found.baseline_logits[0], abs=1e-6)
    assert torch.equal(found.events, again.events)
    rows = explain.layer_analysis(model, *stay.inputs, baseline=stay.baseline)
    difference = own - logit(model, stay.nothing, stay.static)
    assert [row["layer"] for row in rows] == ["input_projection", "encoder layer 1", "encoder layer 2"]
    assert all(row["attribution"].shape == (1, N_EVENTS) for row in rows)
    assert [row["attribution"].sum() for row in rows] == pytest.approx([difference] * 3, abs=0.03)


def test_attribution_ignores_masked_events_whatever_they_are_and_wherever_they_stand(model, stay):
    """Padding, and another stay in the batch: see `test_analyses_take_a_batch_and_its_mask_of_any_type`."""
    mask, damaged = torch.arange(N_EVENTS)[None] != 3, stay.sequence.clone()
    damaged[0, 3] = math.nan
    found, other = (explain.captum_analysis(model, given, stay.static, mask) for given in (stay.sequence, damaged))
    assert (found.events[0, 3] == 0).all() and (found.events[0, 2] != 0).any()
    torch.testing.assert_close(other.events, found.events, rtol=0, atol=1e-6)


def test_retry_takes_more_steps_where_it_does_not_add_up(stay, monkeypatch):
    linear = LINEAR.logits
    monkeypatch.setattr(LINEAR, "logits", lambda *inputs: linear(*inputs).sin())  # two steps do not follow a sine
    once = sum(part.sum().item() for part in explain.integrated_gradients(LINEAR, *stay.inputs, EVERY_EVENT, None, 2))
    missed = abs(once - (LINEAR.logits(*stay.inputs) - LINEAR.logits(*map(torch.zeros_like, stay.inputs))).item())
    assert missed > 0.05
    again = explain.captum_analysis(LINEAR, *stay.inputs, n_steps=2)
    assert again.n_steps[0] in (8, 32) and again.complete[0] and abs(again.gap_errors[0]) < missed


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_analyses_take_a_batch_and_its_mask_of_any_type(model, batch, dtype):
    whole = (model, batch.sequences, batch.static, batch.mask.to(dtype))
    alone = (model, batch.sequences[1:, :3], batch.static[1:])
    found, single = (explain.captum_analysis(*inputs) for inputs in (whole, alone))
    arrays = explain.captum_analysis(model, *(part.numpy() for part in whole[1:]))
    assert found.events.shape == batch.sequences.shape and (found.events[~batch.mask] == 0).all()
    assert torch.equal(arrays.events, found.events) and torch.equal(arrays.statics, found.statics)
    assert found.complete.all()
    torch.testing.assert_close(found.events[1, :3], single.events[0], atol=1e-5, rtol=1e-4)
    for row, other in zip(*(explain.layer_analysis(*inputs) for inputs in (whole, alone)), strict=True):
        assert row["attribution"].shape == (2, 8) and (row["attribution"][~batch.mask] == 0).all()
        assert row["complete"].tolist() == [True, True]
        np.testing.assert_allclose(row["attribution"][1, :3], other["attribution"][0], atol=1e-5)
    found, single = (explain.ablation_analysis(*inputs) for inputs in (whole, alone))
    assert found.if_absent.shape == (2, 8) and (found.if_absent[~batch.mask] == 0).all()
    np.testing.assert_allclose(found.if_absent[1, :3], single.if_absent[0], atol=1e-5)
    np.testing.assert_allclose(found.groups.query("stay == 1")["ablation"], single.groups["ablation"], atol=1e-5)
    assert found.groups.query("kind == 'all events'")["n_events"].tolist() == list(batch.lengths)


@pytest.mark.parametrize("analyse", ANALYSES)
@pytest.mark.parametrize("given, words", CASES["wrong_inputs"])
def test_inputs_that_cannot_be_meant_are_refused_in_a_sentence(analyse, given, words, model, batch):
    with pytest.raises(InputError, match=re.escape(words)):
        analyse(model, *eval(given, vars(batch) | {"nan": math.nan}))


@pytest.mark.parametrize("call, words", CASES["wrong_calls"])
def test_a_wrong_call_is_told_in_a_sentence(call, words, model, batch, attention, described, tmp_path):
    for name in ("table.npz", "fold_10/checkpoints/best_model.pth", "fold_2/checkpoints/best_model.pth"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("stay,weight\n1,0.5\n")
    known = {"tables": {name: table.assign(icu_stay_id=1) for name, table in described._asdict().items()}}
    known |= {"other": described._replace(events=described.events[:3]), "here": str(tmp_path), "names": {0: "pulse"}}
    known |= {"inputs": pd.DataFrame({"input": "event", "part": ["type"] * 3}), "torch": torch, "described": described}
    with pytest.raises(InputError, match=re.escape(words)):
        eval(call, vars(explain) | vars(batch) | known | {"model": model, "attention": attention})


# ---- Ablation
def test_groups_equal_a_loop_over_shorter_stays_without_gradients(model, stay, monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: pytest.fail("ablation needs no gradient"))
    letters, names = {"letter": list("aabbbca")}, ["sex", "sex", "age", "race"]
    groups = explain.ablation_analysis(model, *stay.inputs, None, stay.baseline, letters, names).groups
    scores, static = groups.set_index(["kind", "group"])["ablation"], stay.static.clone()
    static[0, :2] = stay.baseline["static"][:2]
    without_b = stay.sequence[:, [0, 1, 5, 6]]  # what is left where its events had not been there
    left = [logit(model, without_b, stay.static), logit(model, stay.sequence, static)]
    falls = scores[[("letter", "b"), ("static", "sex")]].tolist()
    assert falls == pytest.approx(logit(model, *stay.inputs) - np.array(left), abs=1e-5)
    assert len(scores) == 6 and groups["n_events"].tolist() == [3, 3, 1, 0, 0, 0]


@pytest.fixture(scope="module", params=[False, True], ids=["774 inputs", "item history"])
def any_run(sample_run, request):
    """Twenty stays of the sample and a model of either recipe with random weights and vectors of eight numbers."""
    table = read_stays(sample_run / "data.csv")[0].take(np.arange(20))
    preprocessor = train.ClinicalDataPreprocessor(item_history=request.param).fit(table)
    vectors = torch.randn(len(table.texts), 8, generator=torch.Generator().manual_seed(2))
    dataset = train.ClinicalSequenceDataset(table, preprocessor, vectors)
    made = random_model(dataset.input_dim, preprocessor.static_dim, dataset.n_history)
    checkpoint = train.Checkpoint(made, preprocessor, train.Settings(), "", {}, {}, {})
    typical = explain.typical_texts(table.texts, preprocessor.state_dict()["item_quantiles"])
    run = explain.Run(checkpoint, table, dataset, np.zeros(20), 20, np.zeros(len(table.texts), bool), typical)
    return run._replace(logits=read_anew(run, table))


def read_anew(run, table):
    """The logits of stays by the ordinary way: a dataset of what is in their table."""
    dataset = train.ClinicalSequenceDataset(table, run.checkpoint.preprocessor, run.dataset.text_vectors)
    return padded_logits(run.checkpoint.model, dataset).double().numpy()


def falls_of(run, stay):
    """By how much the logit of a stay falls as its table loses one event after another."""
    table, places = run.table, np.arange(len(run.table.text))
    own = range(table.offsets[stay], table.offsets[stay + 1])
    left = [table.take(np.array([stay]), keep_event=places != event) for event in own]
    return run.logits[stay] - read_anew(run, stacked(left))


def test_an_absent_event_has_the_effect_that_the_table_without_it_has(any_run, monkeypatch):
    lactates = pd.Series(any_run.table.texts[any_run.table.text]).str.startswith("Lab: Lactate").to_numpy()
    counts = np.bincount(any_run.table.stay_of_event[lactates])
    stay = int(counts.argmax())  # its latest lactate follows others
    given, expected = (any_run.checkpoint.model, *any_run.inputs(stay)), falls_of(any_run, stay)
    absence = partial(explain.ablation_analysis, *given, dataset=any_run.dataset, first=stay)
    np.testing.assert_allclose(absence().if_absent[0], expected, atol=2e-5)
    assert counts.max() >= 2 and np.abs(expected).max() > 1e-3
    monkeypatch.setattr(explain, "FORWARD_EVENTS", 1)
    of_two = np.where(np.isin(np.arange(len(expected)), [1, 4]), expected, np.nan)
    np.testing.assert_allclose(absence(which=np.array([1, 4])).if_absent[0], of_two, atol=2e-5)
    if any_run.checkpoint.preprocessor.item_history:
        with pytest.raises(InputError, match="Give dataset="):  # the histories of others are in no tensor
            explain.ablation_analysis(*given)


@pytest.mark.slow
def test_without_the_decisive_events_the_table_gives_the_other_decision(any_run):
    """Thresholds ask for a share of the strongest event's effect: it is enough, or not."""
    sizes = {0.9: [], 1.3: []}
    for stay in range(20):
        falls, before = falls_of(any_run, stay), any_run.logits[stay]
        columns = {"icu_stay_id": stay, "event": np.arange(len(falls)), "event_text": "", "attribution": falls}
        for share, counted in sizes.items():
            threshold = float(expit(before - share * falls[np.abs(falls).argmax()]))
            found = explain.decisive_events(any_run, stay, pd.DataFrame(columns), threshold)
            counted.append(len(found))
            if share > 1 and found.empty:  # all other events speak for the other side
                continue
            gone = any_run.table.offsets[stay] + found["event"].to_numpy(int)
            kept = ~np.isin(np.arange(len(any_run.table.text)), gone)
            (risk,) = expit(read_anew(any_run, any_run.table.take(np.array([stay]), keep_event=kept)))
            assert (risk < threshold) != (expit(before) < threshold)
            np.testing.assert_allclose(found["probability_without"].astype(float), risk, atol=1e-5)
    assert min(sizes[0.9]) == 1 and np.mean(sizes[1.3]) > 1.5


def test_a_typical_number_is_that_of_the_nearest_text_that_says_the_same_and_its_history_follows(any_run):
    far = " | Value: 9 mmol/L | Level: far above range | Flag: abnormal"
    texts = (far, " | Value: 2 mmol/L", " | Value: 1.9 mmol/L | Flag: low", " | Value: 4 mmol/L | Comment: x", "")
    texts = np.array([f"Lab: Lactate{text}" for text in texts])
    known = {"Lab: Lactate mmol/L": [1.0, 1.5, 2.0, 3.0, 12.0], "Lab: Sodium mEq/L": [100.0, 140.0]}
    assert explain.typical_texts(texts, known).tolist() == [1, 1, 1, -1, -1]  # 4 is in the upper quarter
    assert explain.typical_texts(texts, {}).tolist() == [-1] * 5
    alone, own = any_run.table.take(np.array([0])), any_run.table.text[: any_run.table.offsets[1]]
    typical = any_run.typical_texts[own]
    changed = np.flatnonzero((typical >= 0) & (typical != own))
    other = [replace(alone, text=np.where(np.arange(len(own)) == event, typical[event], own)) for event in changed]
    found = explain.if_typical(any_run, 0, np.arange(len(own)))
    np.testing.assert_allclose(found[changed], any_run.logits[0] - read_anew(any_run, stacked(other)), atol=2e-5)
    assert len(changed) > 2 and np.isnan(found[typical < 0]).all()


# ---- Attention
@pytest.mark.parametrize("n_layers, n_history", [(2, 0), (0, len(HISTORY)), (2, len(HISTORY))])
def test_attention_is_that_of_the_models_own_pass_also_where_it_prefers_the_latest(n_layers, n_history):
    width = INPUT_DIM + n_history
    made = train.ClinicalTransformer(width, STATIC_DIM, 16, n_layers, 2, 32, 2, n_history=n_history).eval()
    sequence, static = torch.randn(1, 9, width), torch.randn(1, STATIC_DIM)
    sequence[..., -1] = torch.arange(9) % 3 == 0  # is_latest, where the model has it
    found = explain.attend(made, sequence, static)
    with torch.no_grad():
        own = made(sequence, static, return_attention=True)[1]
    np.testing.assert_allclose(found.pooling, own["pooling_weights"][0, :, 0], atol=1e-6)
    assert found.maps.shape == (n_layers, 2, 9, 9) and found.rollout.sum() == pytest.approx(1, abs=1e-5)
    if n_layers:
        np.testing.assert_allclose(found.maps, torch.cat(own["layer_attention_weights"]), atol=1e-6)
        np.testing.assert_allclose(found.received, found.maps.mean(2), atol=1e-6)
    if n_history:
        assert found.pooling[:, ::3].sum() > 1.9  # of 2 heads
    else:
        np.testing.assert_allclose(torch.from_numpy(found.scores).softmax(1), found.pooling, atol=1e-6)


def test_attend_bounds_the_maps_of_a_long_stay(model, stay, monkeypatch):
    monkeypatch.setattr(explain, "MAX_MAP_EVENTS", 4)
    found = explain.attend(model, *stay.inputs)
    assert found.maps.shape == (2, 2, 4, 4) and found.pooling.shape == (2, N_EVENTS)
    assert np.isnan(found.rollout[:3]).all() and found.rollout[3:].sum() == pytest.approx(1, abs=1e-5)


def test_rollout_and_relevance_are_products_over_the_layers_of_maps_and_of_their_gradients(model, stay, monkeypatch):
    maps, identity = [], torch.eye(N_EVENTS)

    def through_maps(query, key, value, layout):
        maps.append(train.attention_weights_within_stays(query, key, layout)[0])
        return torch.einsum("hij,jhd->ihd", maps[-1], value)

    found = explain.attend(model, *stay.inputs)
    monkeypatch.setattr(train, "attend_within_stays", through_maps)
    layout = train.layout_of_lengths(np.array([N_EVENTS]), torch.device("cpu"))
    own, seen = model.score_packed(stay.sequence[0], stay.static, layout)
    weights = [seen["pooling_weights"], *maps[::-1]]
    moves = [weight * slope for weight, slope in zip(weights, torch.autograd.grad(own, weights))]
    rollout, relevance = weights[0][0, :, 0].mean(0), 0
    for mean in (weight.mean(0) for weight in weights[1:]):
        rollout = rollout @ (identity + mean) / 2
    for sign in (1, -1):
        share = (sign * moves[0][0, :, 0]).relu().mean(0)
        for move in moves[1:]:
            share = share @ (identity + (sign * move).relu().mean(0))
        relevance += sign * share
    np.testing.assert_allclose(found.rollout, rollout.detach(), atol=1e-6)
    np.testing.assert_allclose(found.relevance, relevance.detach(), atol=1e-6)
    assert found.relevance.min() < 0 < found.relevance.max()


def test_untrained_model_keeps_the_input_statistics_and_the_callers_random_state(model):
    before, fresh = torch.get_rng_state(), explain.untrained_like(model, 3)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(fresh.event_mean, model.event_mean)
    assert not torch.equal(fresh.classifier[0].weight, model.classifier[0].weight)


# ---- Checks
def test_deletion_and_insertion_on_a_linear_model(stay):
    effects = (stay.sequence[0] @ LINEAR.w).detach().numpy()
    curves = explain.deletion_insertion(LINEAR, explain.OneStay(*stay.inputs), {"if_absent": effects})
    first = curves[curves["fraction"] == 0.05].set_index("direction")["change"]
    assert len(curves) == 2 * (len(explain.FRACTIONS) + 1)
    assert first[["deletion", "insertion"]].tolist() == pytest.approx([-effects.max(), effects.max()], abs=1e-5)


def test_listed_are_the_highest_and_the_lowest_events():
    push = np.concatenate([np.linspace(1, 2, 100), -np.linspace(0.01, 0.1, 50)])
    assert explain.listed_events(push).tolist() == [*range(90, 100), *range(140, 150)]


def test_infidelity_of_the_truth_about_a_linear_model_is_zero_also_where_some_events_are_unknown(stay):
    effects = (stay.sequence[0] @ LINEAR.w).detach().numpy()
    partly = np.where(np.arange(N_EVENTS) == 3, math.nan, effects)  # ranks in the middle
    scores = {"truth": effects, "none": np.zeros(N_EVENTS), "half": effects / 2}
    for given in (scores, scores | {"partly": partly}):
        found = explain.infidelity(LINEAR, explain.OneStay(*stay.inputs), given, seed=0)
        assert found["truth"] == pytest.approx(0, abs=1e-8) and found["none"] == pytest.approx(1)
        assert 0 < found["half"] < 1 and found.get("partly", 0) == pytest.approx(0, abs=1e-8)
    columns = {"attribution": effects, "if_absent": partly, "attention": 1.0, "relevance": 0.0}
    orders = explain.orders_of(pd.DataFrame(columns), np.random.default_rng(0))
    assert len(orders) == 9 and orders["if_absent"][3] == 0
    np.testing.assert_array_equal(orders["if_absent, lowest first"], -np.nan_to_num(partly))
    np.testing.assert_array_equal(orders["attribution, by size"], np.abs(effects))


def test_random_models_that_are_the_model_itself_agree_with_it_no_more_than_with_each_other(model, stay):
    own, _ = explain.integrated_gradients(model, *stay.inputs, EVERY_EVENT, None, explain.FEW_STEPS)
    found = explain.randomisation([model, model], *stay.inputs, None, own[0].sum(1).numpy())
    assert found["model and reset"] == pytest.approx(1) and found["reset excess"] == pytest.approx(0)


def test_gain_over_random_resamples_patients_not_stays():
    orders = [*explain.METHODS, "random", "random"]
    orders += ["attribution, lowest first", "if_absent, lowest first", "attribution, by size"]
    rows = pd.MultiIndex.from_product([range(6), ["deletion", "insertion"], orders])
    curves = pd.DataFrame(index=rows.set_names(["icu_stay_id", "direction", "order"])).reset_index()
    curves["patient_id"] = curves["icu_stay_id"] % 2  # two patients: nothing to resample
    change = {"attribution": 1.0, "attribution, lowest first": 0.5, "attribution, by size": -0.75}
    curves = curves.assign(fraction=0.5, change=curves["order"].map(change).fillna(0))
    checks = explain.gains_over_random(curves, explain.ExplainSettings(n_bootstrap=10))
    assert all(check.found["n"] == 6 and np.isnan(check.found["low"]) for check in checks)
    gains = {(check.name, check.method): check.found["value"] for check in checks}
    assert gains["insertion", "attribution"] == 1 and gains["deletion", "attribution"] == -1
    assert gains["insertion", "attention"] == 0 and gains["deletion, by size", "attribution"] == 0.75
    assert gains["deletion, lowest first", "attribution"] == 0.5


@pytest.mark.parametrize("found, asked, limit, passed", CASES["judged"])
def test_a_check_is_held_to_its_threshold_by_the_limit_of_its_interval(found, asked, limit, passed):
    assert explain.judged("deletion", "attention", found, asked, limit).passed is passed


# ---- Verdict
N_STAYS = 80
LABELS = np.tile([1.0, 0, 0, 0], N_STAYS // 4)
SHUFFLED = np.random.default_rng(1).permutation(LABELS)
FEW = np.where(np.arange(N_STAYS) < 36, LABELS, np.nan)
GOOD_RISKS = expit(3 * LABELS - 2 + np.random.default_rng(0).normal(0, 1, N_STAYS))
VERDICTS = {  # labels, risks, whether it passes, and what is said
    "good": (LABELS, GOOD_RISKS, True, "shown to discriminate: AUROC 0.9; on 80 stays, 20 deaths"),
    "shuffled": (SHUFFLED, GOOD_RISKS, False, "not shown that this model discriminates; not shown to be calibrated"),
    "reversed": (1 - LABELS, GOOD_RISKS, False, "ranks in reverse"),
    "few deaths": (FEW, GOOD_RISKS, False, "too few to read; 36 stays, 9 deaths"),
    "two risks": (LABELS, 0.2 + 0.4 * LABELS, True, "30 % predicted on average, 25 % died; slope not defined"),
    "unknown": (np.full(N_STAYS, np.nan), GOOD_RISKS, None, "cannot be said"),
    "one outcome": (np.zeros(N_STAYS), GOOD_RISKS, None, "cannot be said"),
}


@pytest.mark.parametrize("labels, risks, passed, said", VERDICTS.values(), ids=VERDICTS)
def test_verdict_says_whether_the_model_discriminates_and_is_calibrated(labels, risks, passed, said):
    checks = explain.discrimination(labels, risks, np.arange(N_STAYS), 200, 0)
    table = check_table(checks)
    is_alone = passed is None or "reverse" in said  # of such a model no slope is read
    assert [check.passed for check in checks] == [passed, None][: 1 if is_alone else 2]
    assert all(words in "; ".join(table["sentence"]) for words in said.split("; ")) and "noise" not in str(table)


def verdict_of(run, leaks):
    """Whether what may warn holds, and all that is said."""
    table = check_table(explain.verdict_of(run, leaks)).set_index("check")
    return table["passed"][["spread", "likeness", "single texts"]].tolist(), "\n".join(table["sentence"])


def test_verdict_on_the_models_own_test_stays(run):
    spread = run._replace(logits=4 * run.logits)
    passed, words = verdict_of(spread, {})
    assert passed == [True] * 3 and "own held-out" in words and "Of no text do more than 98 %" in words
    nothing = run.checkpoint.baseline["event"].expand(1, int(np.median(run.table.lengths)), -1)
    start = logit(run.checkpoint.model, nothing, run.checkpoint.baseline["static"][None])
    assert f"risk {100 * expit(start):.2g} %" in words and "24 % died" in words
    assert f"; {(spread.logits > start).sum()} of {len(run.logits)} stays lie above it" in words
    assert "2 of these 17 stays are of the model's own held-out" in verdict_of(run._replace(held_out=2), {})[1]


def test_verdict_warns_of_an_untrained_model_foreign_stays_and_a_text_that_tells_the_outcome(run):
    fresh = explain.untrained_like(run.checkpoint.model, 0)
    logits = explain.logits_without(fresh, run.dataset, np.arange(len(run.logits)))
    other = run._replace(checkpoint=run.checkpoint._replace(model=fresh), logits=logits, held_out=0)
    other = other._replace(is_new_item=np.ones(len(run.is_new_item), bool))
    passed, words = verdict_of(other, {"Procedure: Comfort measures": 1.0, "Lab: Sodium": 0.96})
    assert passed == [False] * 3
    warnings = "nothing to explain; none of them is of its own; These stays are not like those; 100.0% of their; \n2 "
    for warning in (*warnings.split("; "), "most of all: Procedure: Comfort measures (AUROC 1.00"):
        assert warning in words
    assert run.checkpoint.is_new_item([run.table.texts[0] + " | Value: 7 mmol/L", "Lab: Nonsense"]).tolist() == [0, 1]


def test_use_of_time_is_how_far_shuffling_moves_the_logit_and_a_sum_uses_none(stay, explained):
    run = SimpleNamespace(checkpoint=SimpleNamespace(model=LINEAR), parts=explain.event_parts(INPUT_DIM))
    run.logits, run.inputs = np.array([logit(LINEAR, *stay.inputs) + 1]), lambda at: stay.inputs
    assert explain.moved_by_shuffling(run, 0, seed=1) == pytest.approx(1, abs=1e-4)
    moved = explained.stays["moved_by_shuffling"].mean()
    row = explained.verdict[explained.verdict["check"].str.startswith("time")].iloc[0]
    assert row["value"] == pytest.approx(moved) and (row["check"] == "time") == (moved > FLOOR)


# ---- Small analyses of one pass
@pytest.fixture
def attention():
    """The dict of a pass over two stays, of 4 and 2 events, with two pooling heads and one layer of one head."""
    pooling = torch.tensor([[[0.7, 0.1, 0.1, 0.1], [0.05, 0.05, 0.2, 0.7]], [[0.5, 0.5, 0, 0], [1, 0, 0, 0]]])
    output, layer = torch.ones(2, 4, 3), torch.full((2, 1, 4, 4), 0.25)
    output[1, 2:], layer[1], layer[1, :, :2, :2] = 0, 0, 0.5
    return {"pooling_weights": pooling[:, :, None], "transformer_output": output, "layer_attention_weights": [layer]}


@pytest.fixture
def described():
    columns = {"hours_to_end": [30.0, 8, 2, 1], "event_type": "labevent", "event_text": list("abcd")}
    statics = pd.DataFrame({"feature": ["age", "sex"], "value": ["70", "F"], "attribution": [-3.0, 1.0]})
    return explain.Stay(pd.DataFrame(columns | {"attribution": [1.0, -1, 0, 2]}), statics)


def test_critical_time_periods_are_read_per_head_and_described(attention, described, attention_weights, batch):
    find = explain.analyze_critical_time_periods
    places = [(row["stay"], row["head"], row["position"]) for row in find(attention, threshold=0.3)]
    assert places == [(1, 2, 0), (0, 1, 0), (0, 2, 3), (1, 1, 0), (1, 1, 1)]
    rows = find({"pooling_weights": attention["pooling_weights"][:1]}, 0.5, described)
    assert [(row["hours_to_end"], row["event_text"]) for row in rows] == [(30, "a"), (1, "d")]
    periods = find(attention_weights, threshold=0.1)
    pooling, first = attention_weights["pooling_weights"][:, :, 0], periods[0]
    assert len(periods) == (pooling > 0.1).sum() and first["importance"] == pytest.approx(float(pooling.max()))
    assert float(pooling[first["stay"], first["head"] - 1, first["position"]]) == first["importance"]
    assert f"event {first['position'] + 1} of {batch.lengths[first['stay']]}" in first["interpretation"]
    above = find(attention_weights, threshold=1.0, relative=True)
    assert all(row["importance"] > 1 / batch.lengths[row["stay"]] for row in above)
    assert {row["stay"] for row in above} == {0, 1}


def test_importance_over_time_leaves_padding_out_and_counts_hours_of_a_record(attention, attention_weights, described):
    table = pd.DataFrame(explain.analyze_feature_importance_over_time(attention, n_windows=2, top=1))
    places = table.groupby(["stay", "head"])["position"].apply(list)
    assert places[1, 1] == [0, 1] and places[0, 2] == [0, 3]
    rows = explain.analyze_feature_importance_over_time(attention_weights)
    assert max(row["position"] for row in rows if row["stay"] == 1) == 2
    assert sum(row["importance"] for row in rows if row["stay"] == 0) == pytest.approx(2)  # two heads, all events
    first = {"pooling_weights": attention["pooling_weights"][:1]}
    rows = explain.analyze_feature_importance_over_time(first, described, top=1)
    found = [(row["window"], row["event_text"]) for row in rows if row["head"] == 2]
    assert found == [("24 to 48 h", "a"), ("6 to 12 h", "b"), ("last 6 h", "d")]


def test_layer_patterns_drop_padded_rows_and_bins_of_padding(attention, attention_weights, batch):
    whole, padded = explain.analyze_layer_attention_patterns(attention, near=1)
    assert padded["head_matrices"].shape == (1, 2, 2) and padded["local_attention"] == 0.5
    assert np.isnan(padded["global_attention"])
    assert whole["head_local_share"][0] == pytest.approx(whole["local_share_by_chance"])
    maps = torch.ones(1, 2, 4, 4) * torch.tensor([1.0, 1, 1, 0])  # eight places in four bins, five of them events
    pooling = torch.tensor([1.0] * 5 + [0] * 3).reshape(1, 1, 1, 8)
    weights = {"pooling_weights": pooling, "layer_attention_weights": [maps]}
    (row,) = explain.analyze_layer_attention_patterns(weights, near=2)
    assert row["attention_matrix"].shape == (3, 3) and row["local_share_by_chance"] == pytest.approx(7 / 9)
    assert row["head_local_share"].tolist() == pytest.approx([7 / 9, 7 / 9])
    rows = explain.analyze_layer_attention_patterns(attention_weights)
    assert [(row["stay"], row["layer"]) for row in rows] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    for row in rows:
        n_events = batch.lengths[row["stay"]]
        np.testing.assert_allclose(row["attention_matrix"].sum(1), np.ones(n_events), atol=1e-5)
        assert type(row["local_attention"]) is float and type(row["global_attention"]) is float
        assert row["head_matrices"].shape == (2, n_events, n_events)
    assert rows[0]["local_attention"] == pytest.approx(1 / 6)  # within 5 of 6 events: all of them


def test_attention_that_training_saves_serves_every_analysis(attention_weights, tmp_path):
    loaded = train.load_attention_weights(train.save_attention_weights(attention_weights, 50, 3, save_dir=tmp_path))
    for analyse in (explain.analyze_critical_time_periods, explain.analyze_feature_importance_over_time):
        assert analyse(loaded) == analyse(attention_weights)
    for mine, theirs in zip(*map(explain.analyze_layer_attention_patterns, (loaded, attention_weights))):
        np.testing.assert_allclose(mine["attention_matrix"], theirs["attention_matrix"], atol=1e-3)


def test_temporal_attribution_sums_by_clock_window_and_static_is_a_share_of_everything(attention, described):
    table = explain.analyze_temporal_feature_attribution(attention, described).set_index("window")
    assert table.loc["last 6 h", ["n_events", "attribution"]].tolist() == [2, 2]
    assert table["share_of_attribution"].tolist() == [0.5, 0.25, 0.25]
    assert table.loc["24 to 48 h", "attention_head_1"] == pytest.approx(0.7)
    table = explain.analyze_static_feature_attribution(attention, described)
    assert table["feature"].tolist() == ["age", "sex"] and table["share_of_attribution"].tolist() == [3 / 8, 1 / 8]


def test_history_names_the_extremes_of_an_item_until_then():
    history = pd.DataFrame(CASES["history"], columns=["value", "minimum", "maximum", "count", "words"])
    assert explain.history_in_words(history) == history["words"].tolist()


def test_examples_in_docstrings_are_true(model, batch, run, attention, described):
    """Run them, on two stays of 4 and 2 events and tables of one."""
    attention["pooling_weights"][:, 1, 0] = torch.tensor([[0.1, 0.2, 0.6, 0.1], [0.5, 0.5, 0, 0]])
    text, tables = "Lab: Lactate | Value: 9 mmol/L", described._asdict().items()
    tables = {name: table.assign(icu_stay_id=1, event_text=text) for name, table in tables}
    given = {"model": model, "sequences": batch.sequences, "static_features": batch.static, "icu_stay_id": 1}
    given |= {"attention_mask": batch.mask, "attention_weights": attention, "tables": tables}
    given["preprocessor"] = run.checkpoint.preprocessor
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    for name in explain.__all__:
        for example in finder.find(getattr(explain, name), name, globs=vars(explain) | given):
            runner.run(example)
    assert runner.failures == 0 and runner.tries > 8


# ---- From a checkpoint to the files
@pytest.fixture(scope="module")
def run(sample_run):
    return explain.load_unseen(best_model(sample_run), "", explain.ExplainSettings(cache_dir=str(sample_run / "cache")))


def test_only_stays_of_held_out_patients_are_explained_and_data_of_others_alone_refused(run, sample_run):
    assert run.held_out == len(run.logits) == len(run.table.stays)
    assert set(run.table.stays["patient_id"]) == set(run.checkpoint.patients["test"])
    table = pd.read_csv(sample_run / "data.csv", dtype=str)
    seen = table[table["patient_id"].astype(int).isin(run.checkpoint.patients["train"])]
    settings = partial(explain.ExplainSettings, cache_dir=str(sample_run / "cache"))
    with pytest.raises(InputError, match="trained or tuned on"):
        explain.load_unseen(best_model(sample_run), seen, settings())
    (first, last), other = run.table.stays["icu_stay_id"].iloc[[0, -1]], seen["icu_stay_id"].iloc[0]
    with pytest.raises(InputError, match=rf"ids {other} \(seen in training\), 7 \(not in the data\):"):
        explain.load_unseen(best_model(sample_run), "", settings(stay_ids=f"{first},{other} 7"))
    asked = explain.load_unseen(best_model(sample_run), "", settings(stay_ids=f"{last}, {first}"))
    chosen, why = explain.choose_stays(asked, settings(stays=4), 1)
    assert chosen == [*why] == [0, len(run.logits) - 1] and {*why.values()} == {"asked for"}


def test_parts_of_every_event_sum_to_its_attribution_and_all_to_the_logit(explained):
    events, stays = explained["events"], explained["stays"].set_index("icu_stay_id")
    np.testing.assert_allclose(sum(events[f"attribution_{part}"] for part in PARTS), events["attribution"], atol=1e-5)
    sums = [explained[name].groupby("icu_stay_id")["attribution"].sum()[stays.index] for name in ("events", "statics")]
    np.testing.assert_allclose(sum(sums), stays["logit"] - stays["baseline_logit"] + stays["gap_error"], atol=1e-4)
    groups = explained["groups"].groupby(["icu_stay_id", "kind"])["attribution"].sum().unstack().loc[stays.index]
    for kind, total in (("event type", sums[0]), ("clock window", sums[0]), ("static", sums[1])):
        np.testing.assert_allclose(groups[kind], total, atol=1e-6)


def test_events_have_the_times_of_the_data_and_are_abnormal_where_their_text_says_so(explained, sample_run):
    data, stay = pd.read_csv(sample_run / "data.csv", parse_dates=["event_time"]), explained["stays"]["icu_stay_id"][0]
    frames = [frame[frame["icu_stay_id"] == stay] for frame in (explained["events"], data)]
    mine, theirs = (frame["event_time"].sort_values().to_numpy("datetime64[s]") for frame in frames)
    assert (mine == theirs).all()
    says_so = explained["events"]["event_text"].str.contains(r"\| Flag: abnormal|\| Level: (?!within range)")
    assert (explained["events"]["is_abnormal"] == says_so).all() and 0 < says_so.mean() < 1


def test_a_stay_of_the_tables_serves_the_small_analyses(explained, run):
    icu_stay_id = explained["stays"]["icu_stay_id"].iloc[0]
    stay = explain.stay_of(explained, icu_stay_id)
    index = run.table.stays["icu_stay_id"].tolist().index(icu_stay_id)
    with torch.no_grad():
        _, attention = run.checkpoint.model(*run.inputs(index), return_attention=True)
    assert explain.analyze_temporal_feature_attribution(attention, stay)["n_events"].sum() == len(stay.events)
    own = explained.attention
    record = explain.stay_of(explained, str(own["icu_stay_id"]))
    (first, *_) = explain.analyze_critical_time_periods(own, 0.0, record)
    heads = explained.events.query(f"icu_stay_id == {own['icu_stay_id']}").filter(like="attention_head_")
    assert first["importance"] == pytest.approx(heads.max(axis=None))
    assert first["event_text"] == record.events["event_text"][first["position"]]
    assert len(explain.analyze_layer_attention_patterns(own)) == 2
    assert explain.analyze_temporal_feature_attribution(own, record)["n_events"].sum() == len(record.events)


def test_shap_draws_what_sums_to_the_logit_by_items_and_statics(explained):
    shap = pytest.importorskip("shap")
    found, stays, events = explain.to_shap(explained), explained["stays"], explained["events"]
    gaps = found.values.sum(1) + found.base_values - stays["logit"]
    assert (gaps.abs() <= 0.02 + 0.01 * (stays["logit"] - stays["baseline_logit"]).abs()).all()
    last = events[(events["icu_stay_id"] == stays["icu_stay_id"][1]) & events["value"].notna()].iloc[-1]
    column = found.feature_names.index(last["item"])
    of_item = events[(events["icu_stay_id"] == last["icu_stay_id"]) & (events["item"] == last["item"])]
    assert found.data[1, column] == last["value"]
    assert found.values[1, column] == pytest.approx(of_item["attribution"].sum())
    for draw, given in ((shap.plots.beeswarm, found), (shap.plots.bar, found), (shap.plots.waterfall, found[0])):
        draw(given, show=False)
        plt.close("all")


def test_every_file_is_written(explained):
    names = {path.name for path in explained.report.parent.iterdir()}
    shown = explained.stays["icu_stay_id"][explained.stays["why_shown"] != ""]
    pictures = {f"{name}.png" for name in (*FIGURES, *(f"stay_{stay}" for stay in shown))}
    assert names == pictures | set(explain.TABLE_FILES.values()) | {"faithfulness.json", "report.html"}
    assert explained["faithfulness"]["sentence"].str.len().min() > 20


def test_chosen_stays_are_shown_for_a_reason_and_a_death_is_among_them(run):
    with_labels = lambda y: run._replace(table=replace(run.table, stays=run.table.stays.assign(**{LABEL: 1.0 * y})))
    asked = lambda shown, most=0: explain.ExplainSettings(stays=shown, max_stays=most)
    chosen, why = explain.choose_stays(with_labels(run.logits * 0 + 1), asked(3, 6), 10**9)
    assert len(chosen) == 6 and list(why.values()) == ["highest risk", "lowest risk", "most uncertain of the others"]
    assert next(iter(why)) == run.logits.argmax()
    quiet = int(run.logits.argmin())  # neither the highest risk nor, with one stay shown, any other
    _, why = explain.choose_stays(with_labels(np.arange(len(run.logits)) == quiet), asked(1, 6), 10**9)
    assert why == {quiet: "highest risk of those who died"}
    lengths, most = run.table.lengths, 6 * int(np.median(run.table.lengths))
    chosen, why = explain.choose_stays(run, asked(3), most)
    assert lengths[chosen].max() <= most // 6 and {*why} < {*chosen}
    assert most - most // 6 < lengths[chosen].sum() <= most
    chosen, why = explain.choose_stays(run, asked(3), 1)  # there is none so short: the shortest ones
    assert len(chosen) == len(why) == 3 and lengths[chosen].max() <= np.sort(lengths)[2]


def test_risk_as_events_arrive_is_that_of_what_was_known_by_then_and_of_nothing_later(run):
    table = explain.trajectory_table(run, 0, 4)
    trained, accelerator = run.checkpoint, explain.float32_accelerator()
    last, end = table.iloc[-1], float((run.table.minutes_since_intime + run.table.minutes_to_end)[0]) / 60
    assert last["probability"] == pytest.approx(expit(run.logits[0])) and last["n_events"] == run.table.lengths[0]
    assert last["hours_since_admission"] == pytest.approx(end) and len(table) == 4
    for row in table[:-1].itertuples():
        known = known_at(run.table.take(np.array([0])), row.hours_since_admission)
        dataset = train.ClinicalSequenceDataset(known, trained.preprocessor, run.dataset.text_vectors)
        (risk,) = expit(train.predict_logits(trained.model, dataset, trained.settings, accelerator))
        assert row.probability == pytest.approx(risk, abs=1e-5) and row.n_events == len(dataset[0][0])
    known = run.table.known_minutes_since_intime.copy()
    known[known > 60 * table["hours_since_admission"].iloc[1]] += 1e6  # as if it had never come
    later = run._replace(table=replace(run.table, known_minutes_since_intime=known))
    np.testing.assert_allclose(explain.trajectory_table(later, 0, 4)["probability"][:2], table["probability"][:2])


def test_heads_are_correlated_with_what_events_are_and_switched_off_and_on_again(explained, run):
    heads = explained["heads"]
    numbers = heads.groupby("layer", sort=False)["head"].unique().map(list)
    assert list(numbers.items()) == [("layer 1", [1, 2]), ("layer 2", [1, 2]), ("pooling", [1, 2, 3, 4])]
    assert heads["correlation"].abs().max() <= 1 and (heads["effect"] >= 0).all()
    before = {name: values.clone() for name, values in run.checkpoint.model.state_dict().items()}
    effects, of_layers = explain.head_effects(run, [0, 1])
    assert effects.shape == (2 * 2 + 4, 2) and of_layers.shape == (2,) and (effects[-1] > 0).all()
    for name, values in run.checkpoint.model.state_dict().items():
        assert torch.equal(values, before[name]), name


@pytest.mark.parametrize("case", CASES["decisive"])
def test_decisive_events_are_the_fewest_that_change_the_decision(case):
    effects, events, threshold = case["effects"], case["events"], case["threshold"]
    model, inputs = LinearStay(1, 1), (torch.tensor(effects)[None, :, None], torch.zeros(1, 1))
    model.w.data[:] = 1  # the logit is 0.5 and the sum of the effects
    run = SimpleNamespace(checkpoint=SimpleNamespace(model=model), one=lambda stay: explain.OneStay(*inputs))
    columns = {"icu_stay_id": 1, "event": range(len(effects)), "event_text": ""}
    stay = pd.DataFrame(columns | {"attribution": case.get("pushes", effects)})
    table, whole = explain.decisive_events(run, 0, stay, threshold), 0.5 + sum(effects)
    assert table["event"].tolist() == events
    left = whole - sum(effects[event] for event in events)
    risks = table[["probability", "probability_without"]].to_numpy(float)
    np.testing.assert_allclose(risks, [expit([whole, left])] * len(events) or np.empty((0, 2)), rtol=1e-5)


def test_every_input_has_a_part_and_a_clinical_name_and_those_of_a_position_are_mapped_to_them(run):
    preprocessor = run.checkpoint.preprocessor
    names = explain.name_inputs(preprocessor, run.dataset.input_dim)
    assert names["input"].value_counts().to_dict() == {"event": 774, "static": preprocessor.static_dim}
    assert names["name"][2] == "event type: labevent" and {"gender: F", "age (years)"} <= set(names["name"])
    table = explain.map_features_to_clinical(torch.arange(3.0)[:, None] * torch.ones(3, 774), names, pos=2)
    assert table.values.tolist() == [["type", 10.0], ["text", 1536.0], ["time", 2.0]]
    for width, item_history in ((774, False), (783, True)):
        parts = explain.event_parts(width, item_history)
        columns = [column for name in PARTS for column in range(width)[parts[name]]]
        assert columns == list(range(width)) and len(range(width)[parts["text"]]) == 768


@pytest.mark.parametrize("check, discriminates", [("", True), ("", False), (", few", False), (", reversed", False)])
def test_log_names_findings_only_of_a_model_that_discriminates(explained, check, discriminates, monkeypatch):
    said = []
    monkeypatch.setattr(logger, "info", said.append)
    verdict = pd.DataFrame({"check": [f"discrimination{check}"], "sentence": ["AUROC"], "passed": [discriminates]})
    explain.log_what_was_found({**explained, "verdict": verdict, "items": explained["items"].assign(is_finding=True)})
    assert ("Findings" in "".join(said)) == discriminates and "Checks" in "".join(said)
