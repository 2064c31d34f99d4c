"""The calls that the description's notebook has, written as its users write them."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import explain_clinicalLF as explain
import train

N_EVENTS, INPUT_DIM, STATIC_DIM = (6, 3), 14, 4  # real events of two stays, padded to 8


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
    assert found.removal.shape == (2, 8) and (found.removal[~batch.mask] == 0).all()
    np.testing.assert_allclose(found.removal[1, :3], single.removal[0], atol=1e-5)
    both = found.groups[found.groups["stay"] == 1]["ablation"]
    np.testing.assert_allclose(both, single.groups["ablation"], atol=1e-5)
    assert found.groups.query("kind == 'all events'")["n_events"].tolist() == list(N_EVENTS)


def test_a_mask_of_another_shape_is_an_error(model, batch):
    with pytest.raises(ValueError, match=r"must be \(2, 8\)"):
        explain.captum_analysis(model, batch.sequences, batch.static, batch.mask[:, :5])


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
