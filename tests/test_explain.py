"""explain_clinicalLF.py: attributions, ablations, attention, checks and files, on small models with known answers."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from captum.attr import ShapleyValueSampling
from scipy.stats import spearmanr
from small_table import LinearStay, best_model
from test_explain_report import NAMES

import explain_clinicalLF as explain
import train

N_EVENTS, INPUT_DIM, STATIC_DIM = 7, 14, 4  # an event: 5 type, 8 text, 1 time
PARTS = ("type", "text", "time", "history")


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = train.ClinicalTransformer(
            INPUT_DIM, STATIC_DIM, d_model=16, n_layers=2, n_heads=2, d_feedforward=32, n_pooling_heads=2
        )
        made.query_vector.data.normal_()
    return made.eval()


@pytest.fixture
def stay():
    """One stay and a baseline: sequence (1, 7, 14), static (1, 4)."""
    draw = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(*shape, generator=draw)
    return SimpleNamespace(
        sequence=normal(1, N_EVENTS, INPUT_DIM),
        static=normal(1, STATIC_DIM),
        baseline={"event": normal(INPUT_DIM), "static": normal(STATIC_DIM)},
    )


def logit(model, sequence, static, mask=None):
    with torch.no_grad():
        return float(model.logits(sequence, static, mask))


# ---- Attribution


def test_attribution_on_a_linear_model_is_weight_times_difference(stay):
    linear = LinearStay(INPUT_DIM, STATIC_DIM)
    found = explain.captum_analysis(linear, stay.sequence, stay.static, baseline=stay.baseline)
    torch.testing.assert_close(found.events, linear.w.data * (stay.sequence - stay.baseline["event"]))
    torch.testing.assert_close(found.statics, linear.v.data * (stay.static - stay.baseline["static"]))


def test_attribution_sums_to_the_difference_of_the_logits(model, stay):
    found = explain.captum_analysis(model, stay.sequence, stay.static, baseline=stay.baseline)
    start = logit(model, stay.baseline["event"].expand(1, N_EVENTS, -1), stay.baseline["static"][None])
    assert found.complete.all()
    total = float(found.events.sum() + found.statics.sum())
    assert total == pytest.approx(logit(model, stay.sequence, stay.static) - start, abs=0.02)
    assert total - found.gap_errors[0] == pytest.approx(found.logits[0] - found.baseline_logits[0], abs=1e-6)


def test_attribution_ignores_padding_and_other_stays(model, stay):
    alone = explain.captum_analysis(model, stay.sequence, stay.static, baseline=stay.baseline)
    padded = torch.full((2, N_EVENTS + 200, INPUT_DIM), math.nan)
    padded[0, :N_EVENTS], padded[1] = stay.sequence[0], 1.0
    mask = torch.ones(2, N_EVENTS + 200, dtype=torch.bool)
    mask[0, N_EVENTS:] = False
    found = explain.captum_analysis(
        model, padded, stay.static.expand(2, -1), mask, stay.baseline, n_steps=50, retry=False
    )
    torch.testing.assert_close(found.events[0, :N_EVENTS], alone.events[0], rtol=0, atol=1e-6)
    assert (found.events[0, N_EVENTS:] == 0).all()


def test_attribution_of_an_event_masked_in_the_middle_is_zero(model, stay):
    mask = torch.ones(1, N_EVENTS, dtype=torch.bool)
    mask[0, 3] = False
    found = explain.captum_analysis(model, stay.sequence, stay.static, mask, stay.baseline)
    assert (found.events[0, 3] == 0).all() and (found.events[0, 2] != 0).any()


def test_attribution_is_the_same_twice(model, stay):
    once, twice = (explain.captum_analysis(model, stay.sequence, stay.static).events for _ in range(2))
    assert torch.equal(once, twice)


@pytest.mark.parametrize("where", ["sequence", "static"])
def test_attribution_of_nan_is_an_error(model, stay, where):
    getattr(stay, where).view(-1)[2] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        explain.captum_analysis(model, stay.sequence, stay.static)


class WavyStay(LinearStay):
    """Logit = sine of what the linear model says: two steps do not follow it."""

    def logits(self, sequences, static_features, attention_mask=None):
        return super().logits(sequences, static_features, attention_mask).sin()


def test_retry_takes_more_steps_where_it_does_not_add_up(stay):
    wavy, static = WavyStay(INPUT_DIM, STATIC_DIM), stay.static
    once = explain.captum_analysis(wavy, stay.sequence, static, n_steps=2, retry=False)
    assert once.n_steps[0] == 2 and not once.complete[0]
    again = explain.captum_analysis(wavy, stay.sequence, static, n_steps=2)
    assert again.n_steps[0] in (8, 32) and again.complete[0] and abs(again.gap_errors[0]) < abs(once.gap_errors[0])


@pytest.mark.parametrize("n_layers", [0, 2])
def test_attention_is_that_of_the_models_own_pass_also_where_it_prefers_the_latest(n_layers):
    n_history = len(train.HISTORY)
    sizes = {"d_model": 16, "n_heads": 2, "d_feedforward": 32, "n_pooling_heads": 2, "n_history": n_history}
    model = train.ClinicalTransformer(INPUT_DIM + n_history, STATIC_DIM, n_layers=n_layers, **sizes).eval()
    sequence, static = torch.randn(1, 9, INPUT_DIM + n_history), torch.randn(1, STATIC_DIM)
    sequence[..., -1] = torch.arange(9) % 3 == 0  # is_latest
    found = explain._attend(model, sequence, static)
    own = model(sequence, static, return_attention=True)[1]["pooling_weights"][0, :, 0].detach().numpy()
    assert np.allclose(found.pooling, own, atol=1e-6) and found.pooling[:, ::3].sum() > 1.9  # of 2 heads
    assert found.maps.shape == (n_layers, 2, 9, 9)
    assert found.rollout.sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("item_history, width", [(False, 774), (True, 783)])
def test_event_parts_cover_every_input_once(item_history, width):
    parts = explain._event_parts(width, item_history)
    columns = [column for name in PARTS for column in range(width)[parts[name]]]
    assert columns == list(range(width)) and len(range(width)[parts["text"]]) == 768


def test_layer_attributions_add_up_at_every_layer(model, stay):
    rows = explain.layer_analysis(model, stay.sequence, stay.static, baseline=stay.baseline)
    difference = logit(model, stay.sequence, stay.static) - logit(
        model, stay.baseline["event"].expand(1, N_EVENTS, -1), stay.static
    )
    assert [row["layer"] for row in rows] == ["input_projection", "encoder layer 1", "encoder layer 2"]
    for row in rows:
        assert row["attribution"].shape == (1, N_EVENTS)
        assert row["attribution"].sum() == pytest.approx(difference, abs=0.03)


# ---- Ablation


def replaced(stay, *events):
    """The stay with the baseline's event at these places."""
    sequence = stay.sequence.clone()
    sequence[0, list(events)] = stay.baseline["event"]
    return sequence


def test_unremarkable_events_equal_a_loop_over_replacements(model, stay):
    full = logit(model, stay.sequence, stay.static)
    expected = [full - logit(model, replaced(stay, event), stay.static) for event in range(N_EVENTS)]
    found = explain._replace_each_event(model, stay.sequence, stay.static, stay.baseline)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_unremarkable_events_in_small_passes_and_of_some_are_the_same(model, stay, monkeypatch):
    whole = explain._replace_each_event(model, stay.sequence, stay.static, stay.baseline)
    monkeypatch.setattr(explain, "FORWARD_EVENTS", 1)
    some = explain._replace_each_event(model, stay.sequence, stay.static, stay.baseline, np.array([1, 4]))
    np.testing.assert_allclose(some[[1, 4]], whole[[1, 4]], atol=1e-5)
    assert np.isnan(some).sum() == N_EVENTS - 2


def test_an_event_that_is_unremarkable_already_changes_nothing(model, stay):
    found = explain._replace_each_event(model, replaced(stay, 2, 5), stay.static, stay.baseline)
    np.testing.assert_allclose(found[[2, 5]], 0, atol=1e-6)
    assert np.abs(found[[0, 1, 3, 4, 6]]).min() > 1e-6


def test_groups_equal_a_loop_over_replacements_without_gradients(model, stay, monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: pytest.fail("ablation needs no gradient"))
    labels, names = list("aabbbca"), ["sex", "sex", "age", "race"]
    found = explain.ablation_analysis(model, stay.sequence, stay.static, None, stay.baseline, {"letter": labels}, names)
    scores = found.groups.set_index(["kind", "group"])["ablation"]
    full, inside = logit(model, stay.sequence, stay.static), torch.tensor([label == "b" for label in labels])
    replaced, static = stay.sequence.clone(), stay.static.clone()
    replaced[0, inside], static[0, :2] = stay.baseline["event"], stay.baseline["static"][:2]
    assert scores["letter", "b"] == pytest.approx(full - logit(model, replaced, stay.static), abs=1e-5)
    assert scores["static", "sex"] == pytest.approx(full - logit(model, stay.sequence, static), abs=1e-5)
    assert len(scores) == 6 and found.groups["n_events"].tolist() == [3, 3, 1, 0, 0, 0]


def test_shapley_values_sum_to_the_difference_of_the_logits(model, stay):
    found = explain.ablation_analysis(
        model, stay.sequence, stay.static, None, stay.baseline, {"letter": list("aabbbca")}, shapley_samples=3
    )
    start = logit(model, stay.baseline["event"].expand(1, N_EVENTS, -1), stay.baseline["static"][None])
    assert found.groups["shapley"].sum() == pytest.approx(logit(model, stay.sequence, stay.static) - start, abs=1e-4)


def test_shapley_values_are_those_of_captum(model, stay):
    found = explain.ablation_analysis(
        model, stay.sequence, stay.static, None, stay.baseline, {"letter": list("aabbbca")}, shapley_samples=4, seed=2
    )
    letters = torch.tensor([0, 0, 1, 1, 1, 2, 0])[None, :, None].repeat(1, 1, INPUT_DIM)
    masks = (letters, torch.arange(3, 7)[None])
    starts = (stay.baseline["event"].expand_as(stay.sequence), stay.baseline["static"][None])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(2)
        events, statics = ShapleyValueSampling(model.logits).attribute(
            (stay.sequence, stay.static), starts, target=0, feature_mask=masks, n_samples=4
        )
    expected = [*events[0, [0, 2, 5], 0].tolist(), *statics[0].tolist()]
    np.testing.assert_allclose(found.groups["shapley"], expected, atol=1e-5)


# ---- Attention


def test_attend_gives_the_weights_of_the_very_pass(model, stay):
    found = explain._attend(model, stay.sequence, stay.static)
    with torch.no_grad():
        _, attention = model(stay.sequence, stay.static, return_attention=True)
    np.testing.assert_allclose(found.pooling, attention["pooling_weights"][0, :, 0], atol=1e-6)
    np.testing.assert_allclose(found.maps, torch.cat(attention["layer_attention_weights"]), atol=1e-6)
    np.testing.assert_allclose(found.received, found.maps.mean(2), atol=1e-6)


def test_attend_softmax_of_query_key_scores_is_the_pooling(model, stay):
    found = explain._attend(model, stay.sequence, stay.static)
    np.testing.assert_allclose(torch.from_numpy(found.scores).softmax(1), found.pooling, atol=1e-6)


def test_attend_bounds_the_maps_of_a_long_stay(model, stay, monkeypatch):
    monkeypatch.setattr(explain, "MAX_MAP_EVENTS", 4)
    found = explain._attend(model, stay.sequence, stay.static)
    assert found.maps.shape == (2, 2, 4, 4) and found.pooling.shape == (2, N_EVENTS)
    assert np.isnan(found.rollout[:3]).all() and found.rollout[3:].sum() == pytest.approx(1, abs=1e-5)


def test_rollout_through_layers_that_look_at_themselves_is_the_pooling():
    pooling = torch.tensor([0.2, 0.3, 0.5])
    torch.testing.assert_close(explain._attention_rollout([torch.eye(3)] * 4, pooling), pooling)


def test_rollout_through_one_layer_that_looks_at_the_first_event():
    to_first = torch.tensor([[1.0, 0], [1, 0]])
    torch.testing.assert_close(
        explain._attention_rollout([to_first], torch.tensor([0.0, 1.0])), torch.tensor([0.5, 0.5])
    )


def test_untrained_model_keeps_the_input_statistics_and_the_callers_random_state(model):
    before = torch.get_rng_state()
    fresh = explain._untrained_like(model, 3)
    assert torch.equal(fresh.event_mean, model.event_mean) and not torch.equal(
        fresh.classifier[0].weight, model.classifier[0].weight
    )
    assert torch.equal(torch.get_rng_state(), before)


# ---- Check


def test_rank_correlation_equals_scipy_and_is_missing_for_a_constant():
    first, second = np.array([[1.0, 5, 2, 2], [1, 1, 1, 1]]), np.array([[3.0, 9, 1, 4]])
    found = explain._rank_correlation(first, second)
    assert found[0, 0] == pytest.approx(spearmanr(first[0], second[0])[0]) and np.isnan(found[1, 0])


def test_bootstrap_of_equal_values_has_no_width_and_leaves_out_nan():
    found = explain._bootstrap(np.array([2.0, 2, math.nan, 2]), np.array([1, 2, 3, 4]), 50)
    assert (found["value"], found["low"], found["high"], found["n"]) == (2, 2, 2, 3)


def test_bootstrap_resamples_patients_not_rows():
    found = explain._bootstrap(np.array([0.0] * 50 + [1.0]), np.array([1] * 50 + [2]), 50)
    assert math.isnan(found["low"])  # two patients: nothing to resample


def test_deletion_and_insertion_on_a_linear_model(stay):
    linear, fractions = LinearStay(INPUT_DIM, STATIC_DIM), len(explain.FRACTIONS) + 1
    effects = explain._replace_each_event(linear, stay.sequence, stay.static, stay.baseline)
    curves = explain._deletion_insertion(
        linear, stay.sequence, stay.static, stay.baseline, {"if_unremarkable": effects}
    )
    first = curves[curves["fraction"] == 0.05].set_index("direction")["change"]
    assert len(curves) == 2 * fractions
    assert first["deletion"] == pytest.approx(-effects.max(), abs=1e-5) and first["insertion"] == pytest.approx(
        effects.max(), abs=1e-5
    )


def test_replaced_are_the_strongest_events_and_those_that_are_listed():
    push = np.concatenate([np.linspace(1, 2, 100), -np.linspace(0.01, 0.1, 50)])
    which = explain._events_to_replace(push, 30)
    towards, away = np.arange(70, 100), np.arange(140, 150)  # all of the strongest push towards death
    assert which.tolist() == [*towards, *away]
    assert explain._events_to_replace(push, 0).tolist() == list(range(150))


def test_events_that_were_not_replaced_are_left_out_of_infidelity_and_rank_in_the_middle(stay):
    linear = LinearStay(INPUT_DIM, STATIC_DIM)
    effects = explain._replace_each_event(linear, stay.sequence, stay.static, stay.baseline)
    inputs = linear, stay.sequence, stay.static
    partly = effects.copy()
    partly[3] = math.nan
    found = explain._stay_infidelity(*inputs, {"truth": effects, "partly": partly}, stay.baseline, seed=0)
    assert found["truth"] == pytest.approx(0, abs=1e-8) and found["partly"] == pytest.approx(0, abs=1e-8)
    curves = explain._deletion_insertion(*inputs, stay.baseline, {"unknown": partly, "zero": np.nan_to_num(partly)})
    change = curves.set_index("order")["change"]
    np.testing.assert_array_equal(change["unknown"], change["zero"])


def test_infidelity_of_the_truth_about_a_linear_model_is_zero(stay):
    linear = LinearStay(INPUT_DIM, STATIC_DIM)
    effects = explain._replace_each_event(linear, stay.sequence, stay.static, stay.baseline)
    scores = {"truth": effects, "none": np.zeros(N_EVENTS)}
    found = explain._stay_infidelity(linear, stay.sequence, stay.static, scores, stay.baseline, seed=0)
    assert found["truth"] == pytest.approx(0, abs=1e-8) and found["none"] == pytest.approx(1)


def test_sensitivity_of_a_constant_explanation_is_zero_and_of_the_input_small(stay):
    score = lambda explanation: explain._stay_sensitivity(stay.sequence, explanation, torch.ones(INPUT_DIM), seed=0)
    assert score(lambda x: np.ones(N_EVENTS)) == 0
    assert 0 < score(lambda x: x[0].sum(1).numpy()) < 0.2


def test_a_criterion_says_in_words_whether_it_holds():
    row = explain._criterion(
        "c", "m", {"value": 0.5, "low": 0.1, "high": 0.9, "n": 3}, (">=", 0.2), "it is {value:.1f}", limit="low"
    )
    assert row["passed"] is False and row["sentence"] == "It is 0.5 (should be >= 0.2: NO)."


# ---- Name and the small analyses


def test_item_drops_numbers_but_keeps_names():
    assert explain.item_of("Lab: Lactate (Blood, Blood Gas) | Value: 5.2 mmol/L") == "Lab: Lactate (Blood, Blood Gas)"
    assert explain.item_of("Ingredient: Dextrose 5%") == "Ingredient: Dextrose"
    assert explain.item_of("Lab: Vitamin B12 (Blood)") == "Lab: Vitamin B12 (Blood)"


def test_history_names_the_extremes_of_an_item_until_then():
    rows = [(2.1, 2.1, 2.1, 1), (4.0, 2.1, 4.0, 2), (3.0, 2.1, 4.0, 3), (2.1, 2.1, 4.0, 4), (math.nan,) * 3 + (5,)]
    history = pd.DataFrame(rows, columns=["value", "minimum", "maximum", "count"])
    assert explain._history_in_words(history) == ["", "highest of 2", "", "lowest of 4", ""]


def test_abnormal_is_what_the_text_says():
    texts = [
        "Lab: A | Flag: abnormal",
        "Lab: A | Level: far above range",
        "Lab: A | Level: within range",
        "Prescription: A",
    ]
    assert [explain._is_abnormal(text) for text in texts] == [True, True, False, False]


def test_clock_windows_begin_at_their_lower_edge():
    assert explain._clock_window(np.array([0, 5.9, 6, 95, 96, 4000])).tolist() == [
        "last 6 h",
        "last 6 h",
        "6 to 12 h",
        "48 to 96 h",
        "more than 96 h",
        "more than 96 h",
    ]


@pytest.fixture
def attention():
    """The dict of a pass over two stays, of 4 and 2 events, with two pooling heads and one layer of one head."""
    pooling = torch.tensor(
        [[[0.7, 0.1, 0.1, 0.1], [0.05, 0.05, 0.2, 0.7]], [[0.5, 0.5, 0, 0], [1, 0, 0, 0]]]
    ).unsqueeze(2)
    output = torch.ones(2, 4, 3)
    output[1, 2:] = 0
    layer = torch.full((2, 1, 4, 4), 0.25)
    layer[1] = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    return {"pooling_weights": pooling, "transformer_output": output, "layer_attention_weights": [layer]}


@pytest.fixture
def described():
    events = pd.DataFrame(
        {
            "hours_to_end": [30.0, 8, 2, 1],
            "event_type": "labevent",
            "event_text": list("abcd"),
            "attribution": [1.0, -1, 0, 2],
        }
    )
    return explain.Stay(
        events, pd.DataFrame({"feature": ["age", "sex"], "value": ["70", "F"], "attribution": [-3.0, 1.0]})
    )


def test_critical_time_periods_are_read_per_head(attention):
    rows = explain.analyze_critical_time_periods(attention, threshold=0.3)
    assert [(row["stay"], row["head"], row["position"]) for row in rows] == [
        (1, 2, 0),
        (0, 1, 0),
        (0, 2, 3),
        (1, 1, 0),
        (1, 1, 1),
    ]


def test_critical_time_periods_carry_hours_and_text_of_a_stay(attention, described):
    rows = explain.analyze_critical_time_periods({"pooling_weights": attention["pooling_weights"][:1]}, 0.5, described)
    assert [(row["hours_to_end"], row["event_text"]) for row in rows] == [(30, "a"), (1, "d")]


@pytest.mark.parametrize(
    "analyse",
    [
        lambda weights, stay: explain.analyze_critical_time_periods(weights, 0.1, stay),
        explain.analyze_feature_importance_over_time,
        explain.analyze_temporal_feature_attribution,
    ],
)
def test_record_of_another_stay_than_that_of_the_pass_is_refused_in_a_sentence(analyse, attention, described):
    other = described._replace(events=described.events[:3])
    with pytest.raises(train.InputError, match="over a stay of 4 events, the record is of one of 3: give"):
        analyse(attention, other)


def test_feature_importance_over_time_leaves_padding_out(attention):
    table = pd.DataFrame(explain.analyze_feature_importance_over_time(attention, n_windows=2, top=1))
    assert table[(table["stay"] == 1) & (table["head"] == 1)]["position"].tolist() == [0, 1]
    assert table[(table["stay"] == 0) & (table["head"] == 2)]["position"].tolist() == [0, 3]


def test_layer_patterns_drop_padded_rows(attention):
    whole, padded = explain.analyze_layer_attention_patterns(attention, near=1)
    assert padded["head_matrices"].shape == (1, 2, 2) and padded["local_attention"] == 0.5
    assert np.isnan(padded["global_attention"])
    assert whole["head_local_share"][0] == pytest.approx(whole["local_share_by_chance"])


def test_temporal_attribution_sums_by_clock_window(attention, described):
    table = explain.analyze_temporal_feature_attribution(attention, described).set_index("window")
    assert table.loc["last 6 h", "n_events"] == 2 and table.loc["last 6 h", "attribution"] == 2
    assert table["share_of_attribution"].tolist() == [0.5, 0.25, 0.25] and table.loc[
        "24 to 48 h", "attention_head_1"
    ] == pytest.approx(0.7)


def test_static_attribution_is_a_share_of_everything(attention, described):
    table = explain.analyze_static_feature_attribution(attention, described)
    assert table["feature"].tolist() == ["age", "sex"] and table["share_of_attribution"].tolist() == [3 / 8, 1 / 8]
    with pytest.raises(ValueError, match="attention never reaches"):
        explain.analyze_static_feature_attribution(attention, explain.Stay(described.events))


# ---- From a checkpoint to the files


@pytest.fixture(scope="module")
def run(sample_run):
    return explain._load_run(best_model(sample_run), cache_dir=sample_run / "cache")


@pytest.fixture
def tables(explained):
    return explained


def test_only_stays_of_held_out_patients_are_explained(run):
    assert run.held_out and set(run.table.stays["patient_id"]) == set(run.checkpoint.patients["test"])
    assert len(run.logits) == len(run.table.stays)


def test_data_of_training_patients_alone_is_refused(run, sample_run):
    table = pd.read_csv(sample_run / "data.csv", dtype=str)
    seen = table[table["patient_id"].astype(int).isin(run.checkpoint.patients["train"])]
    with pytest.raises(train.InputError, match="trained or tuned on"):
        explain._load_run(best_model(sample_run), seen, cache_dir=sample_run / "cache")


def test_parts_of_every_event_sum_to_its_attribution(tables):
    events, stays = tables["events"], tables["stays"].set_index("icu_stay_id")
    np.testing.assert_allclose(
        events[[f"attribution_{part}" for part in PARTS]].sum(axis=1), events["attribution"], atol=1e-5
    )
    total = (
        events.groupby("icu_stay_id")["attribution"].sum()
        + tables["statics"].groupby("icu_stay_id")["attribution"].sum()
    )
    np.testing.assert_allclose(
        total, (stays["logit"] - stays["baseline_logit"] + stays["gap_error"])[total.index], atol=1e-4
    )


def test_groups_carry_the_attribution_of_their_events(tables):
    groups = tables["groups"].groupby(["icu_stay_id", "kind"])["attribution"].sum().unstack()
    np.testing.assert_allclose(groups["event type"], groups["clock window"], atol=1e-6)
    np.testing.assert_allclose(
        groups["event type"], tables["events"].groupby("icu_stay_id")["attribution"].sum(), atol=1e-6
    )


def test_event_times_are_those_of_the_data(tables, sample_run):
    data = pd.read_csv(sample_run / "data.csv", parse_dates=["event_time"])
    stay = tables["stays"]["icu_stay_id"].iloc[0]
    mine, theirs = (
        frame[frame["icu_stay_id"] == stay]["event_time"].sort_values().to_numpy() for frame in (tables["events"], data)
    )
    assert (mine.astype("datetime64[s]") == theirs.astype("datetime64[s]")).all()


def test_heads_are_compared_with_untrained_models(tables):
    heads = tables["heads"]
    assert set(heads["layer"]) == {"layer 1", "layer 2", "pooling"} and heads["correlation"].abs().max() <= 1
    beyond = (heads["low"] > heads["null_99"]) | (heads["high"] < -heads["null_99"])
    assert ((beyond & (heads["effect"] > explain.FLOOR)) == heads["has_role"]).all()


def test_shares_of_windows_sum_to_one_and_are_said_in_words(tables):
    assert (
        tables["windows"]["share"].sum() == pytest.approx(1)
        and tables["windows"]["sentence"].str.endswith("of the events.").all()
    )


def test_a_stay_of_the_tables_serves_the_small_analyses(tables, run):
    stay = explain.stay_of(tables, tables["stays"]["icu_stay_id"].iloc[0])
    index = int(np.flatnonzero(run.table.stays["icu_stay_id"] == tables["stays"]["icu_stay_id"].iloc[0])[0])
    with torch.no_grad():
        _, attention = run.checkpoint.model(*run.inputs(index), return_attention=True)
    assert explain.analyze_temporal_feature_attribution(attention, stay)["n_events"].sum() == len(stay.events)
    with pytest.raises(train.InputError, match="not among"):
        explain.stay_of(tables, -1)


def test_files_have_all_stays_where_memory_has_few(run, tmp_path, monkeypatch):
    monkeypatch.setattr(explain, "KEPT_STAYS", 3)
    monkeypatch.setattr(explain, "STAYS_A_PART", 2)
    settings = explain.ExplainSettings(
        stays=1, max_stays=5, checked_stays=0, layer_stays=0, shapley_orders=0, ig_steps=2, n_bootstrap=10
    )
    with explain._stay_files(tmp_path) as write:
        tables = explain._explain(run, settings, write)
    assert len(tables["stays"]) == 5 and 3 <= tables["events"]["icu_stay_id"].nunique() < 5
    events, statics = (tmp_path / explain.TABLE_FILES[name] for name in ("events", "statics"))
    assert pd.read_parquet(events)["icu_stay_id"].unique().tolist() == tables["stays"]["icu_stay_id"].tolist()
    assert len(pd.read_csv(statics)) == 5 * tables["statics"].groupby("icu_stay_id").size().iloc[0]
    assert len(list(tmp_path.iterdir())) == 3  # nothing half-written is left


def test_a_death_is_among_the_stays_that_are_shown(run):
    quiet = int(run.logits.argmin())  # neither the highest risk nor, with one stay shown, any other
    stays = run.table.stays.assign(**{explain.LABEL: (np.arange(len(run.logits)) == quiet).astype(int)})
    _, why = explain._choose_stays(run._replace(table=replace(run.table, stays=stays)), 1, 6, seed=0)
    assert why == {quiet: "highest risk of those who died"}


def test_every_file_is_written(tables):
    names = {path.name for path in tables.report.parent.iterdir()}
    pictures = {f"{name}.png" for name in (*NAMES, "deletion_insertion")}
    assert names >= pictures | set(explain.TABLE_FILES.values()) | {"faithfulness.json", "report.html"}
    assert tables["faithfulness"]["sentence"].str.len().min() > 20


def test_chosen_stays_are_shown_for_a_reason(run):
    stays = run.table.stays.assign(**{explain.LABEL: 1})
    chosen, why = explain._choose_stays(run._replace(table=replace(run.table, stays=stays)), 3, 6, seed=0)
    assert len(chosen) == 6 and list(why.values()) == ["highest risk", "lowest risk", "most uncertain"]
    assert next(iter(why)) == run.logits.argmax()


def test_risk_as_events_arrive_is_that_of_what_was_known_by_then(run):
    table = explain._trajectory_table(run, 0, most=3)
    for row in table.itertuples():
        known = train.known_at(run.table.take(np.array([0])), row.hours_since_admission)
        dataset = train.ClinicalSequenceDataset(known, run.checkpoint.preprocessor, run.vectors)
        logits = train.predict_logits(run.checkpoint.model, dataset, run.checkpoint.settings, explain._full_precision())
        assert row.probability == pytest.approx(run.checkpoint.probabilities(logits)[0], abs=1e-5)
        assert row.n_events == len(dataset[0][0])


def test_a_result_that_came_later_changes_no_earlier_risk(run):
    before = explain._trajectory_table(run, 0, most=4)
    known = run.table.known_minutes_since_intime.copy()
    known[known > 60 * before["hours_since_admission"].iloc[1]] += 1e6  # as if it had never come
    after = explain._trajectory_table(
        run._replace(table=replace(run.table, known_minutes_since_intime=known)), 0, most=4
    )
    np.testing.assert_allclose(after["probability"][:2], before["probability"][:2])


def test_a_head_that_is_switched_off_and_on_again_leaves_the_model_as_it_was(run):
    before = {name: values.clone() for name, values in run.checkpoint.model.state_dict().items()}
    effects, of_layers = explain._head_effects(run, [0, 1])
    assert effects.shape == (len(explain._head_names(run.checkpoint.model)), 2) and of_layers.shape == (2,)
    assert (effects[-1] > 0).all()
    for name, values in run.checkpoint.model.state_dict().items():
        assert torch.equal(values, before[name]), name


def test_every_input_has_a_clinical_name(run):
    names = explain.name_inputs(run.checkpoint.preprocessor, run.dataset.input_dim)
    assert (names["input"] == "event").sum() == 774 and (
        names["input"] == "static"
    ).sum() == run.checkpoint.preprocessor.static_dim
    assert (
        names["name"][2] == "event type: labevent"
        and "gender: F" in set(names["name"])
        and "age (years)" in set(names["name"])
    )


@pytest.mark.parametrize(
    "arguments, message",
    [(["--checkpoint", "missing.pth"], "no such checkpoint"), (["--untrained_models", "1"], "must be at least 4")],
)
def test_main_says_what_to_mend_and_returns_2(arguments, message, capsys):
    assert explain.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_unknown_option_is_named(sample_run):
    with pytest.raises(train.InputError, match="no_such_option"):
        explain.run_explainability_analysis(best_model(sample_run), None, None, no_such_option=1)
