"""The calls that the description's notebook has, written as its users write them."""

import doctest
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import explain_clinicalLF as explain
import train

N_EVENTS, INPUT_DIM, STATIC_DIM = (6, 3), 14, 4  # real events of two stays, padded to 8
NAMES_OF_COLUMNS: Any = {0: "heart rate"}  # what the description's calls give, though no column has one name


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = train.ClinicalTransformer(
            INPUT_DIM, STATIC_DIM, d_model=16, n_layers=2, n_heads=2, d_feedforward=32, n_pooling_heads=2
        )
        made.query_vector.data.normal_()
    return made.eval()


@pytest.fixture(scope="module")
def batch():
    """Two stays of 6 and 3 events, padded to 8 with what must never count."""
    draw = torch.Generator().manual_seed(1)
    sequences = torch.randn(2, 8, INPUT_DIM, generator=draw)
    mask = torch.arange(8) < torch.tensor(N_EVENTS)[:, None]
    sequences[~mask] = 1e3
    return SimpleNamespace(sequences=sequences, static=torch.randn(2, STATIC_DIM, generator=draw), mask=mask)


@pytest.fixture(params=[torch.bool, torch.int64, torch.float32], ids=str)
def attention_mask(request, batch):
    return batch.mask.to(request.param)


def alone(batch, stay):
    return batch.sequences[stay : stay + 1, : N_EVENTS[stay]], batch.static[stay : stay + 1]


def test_captum_analysis_takes_a_batch_and_its_mask_of_any_type(model, batch, attention_mask):
    found = explain.captum_analysis(model, batch.sequences, batch.static, attention_mask)
    assert found.events.shape == batch.sequences.shape and (found.events[~batch.mask] == 0).all()
    assert found.complete.all()
    torch.testing.assert_close(
        found.events[1, :3], explain.captum_analysis(model, *alone(batch, 1)).events[0], atol=1e-5, rtol=1e-4
    )


def test_layer_analysis_takes_a_batch_and_its_mask_of_any_type(model, batch, attention_mask):
    rows = explain.layer_analysis(model, batch.sequences, batch.static, attention_mask)
    single = explain.layer_analysis(model, *alone(batch, 1))
    assert [row["layer"] for row in rows] == ["input_projection", "encoder layer 1", "encoder layer 2"]
    for row, other in zip(rows, single):
        assert row["attribution"].shape == (2, 8) and (row["attribution"][~batch.mask] == 0).all()
        assert row["complete"].tolist() == [True, True]
        np.testing.assert_allclose(row["attribution"][1, :3], other["attribution"][0], atol=1e-5)


def test_ablation_analysis_takes_a_batch_and_its_mask_of_any_type(model, batch, attention_mask):
    found = explain.ablation_analysis(model, batch.sequences, batch.static, attention_mask)
    single = explain.ablation_analysis(model, *alone(batch, 1))
    assert found.if_unremarkable.shape == (2, 8) and (found.if_unremarkable[~batch.mask] == 0).all()
    np.testing.assert_allclose(found.if_unremarkable[1, :3], single.if_unremarkable[0], atol=1e-5)
    both = found.groups[found.groups["stay"] == 1]["ablation"]
    np.testing.assert_allclose(both, single.groups["ablation"], atol=1e-5)
    assert found.groups.query("kind == 'all events'")["n_events"].tolist() == list(N_EVENTS)


def test_a_mask_of_another_shape_is_an_error(model, batch):
    with pytest.raises(ValueError, match=r"must be \(2, 8\)"):
        explain.captum_analysis(model, batch.sequences, batch.static, batch.mask[:, :5])


# ---- Attention of a pass, and what may be said of it


@pytest.fixture(scope="module")
def attention_weights(model, batch):
    with torch.no_grad():
        return model(batch.sequences, batch.static, batch.mask, return_attention=True)[1]


def test_critical_time_periods_are_dicts_with_position_importance_and_interpretation(attention_weights):
    periods = explain.analyze_critical_time_periods(attention_weights, threshold=0.1)
    pooling = attention_weights["pooling_weights"][:, :, 0]
    assert len(periods) == (pooling > 0.1).sum()
    first = periods[0]
    assert first["importance"] == pytest.approx(float(pooling.max()))
    assert float(pooling[first["stay"], first["head"] - 1, first["position"]]) == first["importance"]
    assert f"event {first['position'] + 1} of {N_EVENTS[first['stay']]}" in first["interpretation"]


def test_critical_time_periods_above_a_multiple_of_the_even_share(attention_weights):
    periods = explain.analyze_critical_time_periods(attention_weights, threshold=1.0, relative=True)
    assert all(row["importance"] > 1 / N_EVENTS[row["stay"]] for row in periods)
    assert {row["stay"] for row in periods} == {0, 1}


def test_feature_importance_over_time_is_a_list_of_dicts_without_padding(attention_weights):
    rows = explain.analyze_feature_importance_over_time(attention_weights)
    assert max(row["position"] for row in rows if row["stay"] == 1) == 2
    assert sum(row["importance"] for row in rows if row["stay"] == 0) == pytest.approx(2)  # two heads, all events


def test_layer_attention_patterns_have_a_matrix_and_floats(attention_weights):
    rows = explain.analyze_layer_attention_patterns(attention_weights)
    assert [(row["stay"], row["layer"]) for row in rows] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    for row in rows:
        n_events = N_EVENTS[row["stay"]]
        np.testing.assert_allclose(row["attention_matrix"].sum(1), np.ones(n_events), atol=1e-5)
        assert type(row["local_attention"]) is float and type(row["global_attention"]) is float
        assert row["head_matrices"].shape == (2, n_events, n_events)
    assert rows[0]["local_attention"] == pytest.approx(1 / 6)  # within 5 of 6 events: all of them


def test_layer_attention_patterns_of_binned_maps_leave_out_bins_of_padding():
    """Eight places in four bins, five of them events: the last bin is padding."""
    pooling = torch.tensor([1.0] * 5 + [0] * 3).reshape(1, 1, 1, 8)
    maps = torch.ones(1, 2, 4, 4) * torch.tensor([1.0, 1, 1, 0])
    weights = {"pooling_weights": pooling, "layer_attention_weights": [maps]}
    (row,) = explain.analyze_layer_attention_patterns(weights, near=2)
    assert row["attention_matrix"].shape == (3, 3) and row["local_share_by_chance"] == pytest.approx(7 / 9)
    assert row["head_local_share"].tolist() == pytest.approx([7 / 9, 7 / 9])


def test_attention_that_training_saves_serves_every_analysis(attention_weights, tmp_path):
    path = train.save_attention_weights(attention_weights, 50, 3, save_dir=tmp_path)
    assert path.name == "attention_epoch_3_batch_50.npz"
    loaded = train.load_attention_weights(path)
    for analyse in (explain.analyze_critical_time_periods, explain.analyze_feature_importance_over_time):
        assert analyse(loaded) == analyse(attention_weights)
    for mine, theirs in zip(*map(explain.analyze_layer_attention_patterns, (loaded, attention_weights))):
        np.testing.assert_allclose(mine["attention_matrix"], theirs["attention_matrix"], atol=1e-3)


@pytest.mark.parametrize("analyse", [explain.captum_analysis, explain.layer_analysis, explain.ablation_analysis])
def test_stay_that_is_no_batch_is_refused_in_a_sentence(analyse, model, batch):
    with pytest.raises(train.InputError, match="a single stay with B = 1"):
        analyse(model, batch.sequences[0], batch.static[0])


@pytest.mark.parametrize(
    "call",
    [
        lambda weights, batch: explain.analyze_temporal_feature_attribution(weights, NAMES_OF_COLUMNS),
        lambda weights, batch: explain.analyze_static_feature_attribution(weights, batch.static),
        lambda weights, batch: explain.map_features_to_clinical(weights["transformer_output"][0], NAMES_OF_COLUMNS, 2),
    ],
    ids=["temporal", "static", "map"],
)
def test_what_attention_cannot_say_names_the_call_that_does(call, attention_weights, batch):
    with pytest.raises(ValueError, match=r"stay_of\(tables, icu_stay_id\)|name_inputs\(preprocessor\)"):
        call(attention_weights, batch)


def test_features_of_a_position_are_mapped_to_what_they_mean(fitted):
    _, preprocessor = fitted
    features = torch.arange(3.0)[:, None] * torch.ones(3, 774)
    table = explain.map_features_to_clinical(features, explain.name_inputs(preprocessor), pos=2)
    assert table.values.tolist() == [["type", 10.0], ["text", 1536.0], ["time", 2.0]]


# ---- The preprocessor's parts by their names


@pytest.fixture(scope="module")
def fitted():
    """Two stays with three events, and the preprocessor fitted on them."""
    stays = pd.DataFrame({"patient_gender": ["F", None], "patient_age": [40.0, 60.0]})
    minutes = np.array([30.0, 0.0, 90.0])
    table = SimpleNamespace(static_columns=stays, minutes_to_end=minutes)
    return stays, train.ClinicalDataPreprocessor(list(stays)).fit(table)


def test_encode_static_features_takes_a_table_and_the_columns_wanted(fitted):
    stays, preprocessor = fitted
    assert preprocessor.encode_static_features(stays, ["patient_age", "patient_gender"]).tolist() == [
        [-1, 1, 0],
        [1, 0, 1],
    ]
    assert preprocessor.encode_static_features(stays, ["patient_age"]).tolist() == [[-1], [1]]
    with pytest.raises(train.InputError, match="fitted on: insurance"):
        preprocessor.encode_static_features(stays, ["insurance"])


def test_encoders_are_public(fitted):
    _, preprocessor = fitted
    assert preprocessor.event_type_encoder.categories_[0].tolist() == list(train.EVENT_TYPES)
    assert preprocessor.time_scaler.transform([[40.0]]).tolist() == [[0]]
    assert preprocessor.static_encoders["patient_gender"].categories_[0].tolist() == ["F", "Unknown"]
    assert preprocessor.static_encoders["patient_age"].inverse_transform([[1]]).tolist() == [[60]]


# ---- What is public


def test_all_functions_and_classes_without_underscore_are_listed_as_public():
    own = {name for name, value in vars(explain).items() if getattr(value, "__module__", "") == explain.__name__}
    assert {name for name in own if not name.startswith("_")} == {*explain.__all__, "main"}


def test_every_public_name_has_an_example():
    for name in explain.__all__:
        assert ">>> " in getattr(explain, name).__doc__, name


def test_examples_in_docstrings_are_true(model, batch, fitted):
    """Run them, on two stays of 4 and 2 events and tables of one."""
    pooling = torch.tensor([[[0.7, 0.1, 0.1, 0.1], [0.1, 0.2, 0.6, 0.1]], [[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0]]])
    names = {"hours_to_end": [30.0, 8, 2, 1], "attribution": [1.0, -1, 0, 2]}
    events = pd.DataFrame({"icu_stay_id": 1, "event_type": "labevent", **names})
    statics = pd.DataFrame({"icu_stay_id": 1, "feature": ["age", "sex"], "value": "", "attribution": [-3.0, 1]})
    given = {
        "model": model,
        "sequences": batch.sequences,
        "static_features": batch.static,
        "attention_mask": batch.mask,
        "attention_weights": {
            "pooling_weights": pooling[:, :, None],
            "layer_attention_weights": [torch.full((2, 1, 4, 4), 0.25)],
        },
        "tables": {"events": events.assign(event_text="Lab: Lactate | Value: 9 mmol/L"), "statics": statics},
        "icu_stay_id": 1,
        "preprocessor": fitted[1],
    }
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    for name in explain.__all__:
        for example in finder.find(getattr(explain, name), name, globs=vars(explain) | given):
            runner.run(example)
    assert runner.failures == 0 and runner.tries > 10
