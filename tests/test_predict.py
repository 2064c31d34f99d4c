"""A trained model is used: predicted with, gone on from in a notebook, fine-tuned; stays may still last."""

import numpy as np
import pandas as pd
import pytest
import torch
from small_table import arguments, best_model, padded_logits
from test_train_training import evaluated, trained

import train
from clinical_lf.tables import LABEL

COMPUTED = ["admission_id", "patient_death_time", "relative_time_to_final_event", LABEL]


@pytest.fixture(scope="module")
def at_12_hours(sample_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("at_12_hours")
    assert train.main(arguments(folder, sample_run / "data.csv", "--observation-hours", 12)) == 0
    return folder, pd.read_csv(sample_run / "data.csv", dtype=str)


def test_prediction_is_that_of_evaluate_for_a_file_and_a_frame(sample_run, tmp_path):
    data, places = sample_run / "data.csv", {"cache_dir": str(tmp_path)}
    out, _ = evaluated(tmp_path, data, best_model(sample_run))
    expected = pd.read_csv(out / "predictions.csv").drop(columns=[LABEL, "seen_in_training"])
    for given in (data, pd.read_csv(data)):
        pd.testing.assert_frame_equal(train.predict(best_model(sample_run), given, **places), expected, atol=1e-6)
    run = train.load_run(best_model(sample_run), data, **places)
    assert run.logits == pytest.approx(padded_logits(run.model, run.dataset), abs=1e-4) and len(run.table.stays) == 90
    with pytest.raises(train.InputError, match="hours: no such setting"):
        train.predict(best_model(sample_run), data, hours=3)


def test_patient_who_is_still_there_is_scored_as_one_who_left_later(at_12_hours):
    folder, table = at_12_hours
    whole = train.predict(best_model(folder), table, cache_dir=str(folder / "cache"))
    lasts = table.drop(columns=COMPUTED).assign(icu_outtime="")
    for now in (lasts, lasts.drop(columns="icu_outtime"), lasts.assign(**{LABEL: np.nan})):
        found = train.predict(best_model(folder), now, cache_dir=str(folder / "cache")).merge(whole, on="icu_stay_id")
        assert len(found) == len(whole)  # those that had ended by then are among `now`, too
        assert found["probability_x"].to_numpy() == pytest.approx(found["probability_y"].to_numpy(), abs=1e-6)
    lasts.to_csv(folder / "now.csv", index=False)
    content = evaluated(folder, folder / "now.csv", best_model(folder))[1]
    assert content["metrics"] is None and "or without an end yet" in content["cohort"][1]["name"]


def test_what_a_prediction_needs_is_named_where_it_is_missing(at_12_hours, sample_run):
    folder, table = at_12_hours
    for column, checkpoint in {"event_known_time": folder, "icu_outtime": sample_run}.items():
        with pytest.raises(train.InputError, match=f"missing columns {column}"):
            train.predict(best_model(checkpoint), table.drop(columns=column), cache_dir=str(folder / "cache"))
    own = train.predict(best_model(sample_run), table, cache_dir=str(folder / "cache"))
    fewer = table.drop(columns=[*COMPUTED, "event_known_time"])
    fewer["icu_outtime"] = table[["patient_death_time", "icu_outtime"]].fillna("9").min(axis=1)  # the end as computed
    again = train.predict(best_model(sample_run), fewer, cache_dir=str(folder / "cache"))
    assert again["probability"].to_numpy() == pytest.approx(own["probability"].to_numpy(), abs=1e-6)


def test_folder_of_seeds_is_evaluated_with_the_mean_risk_and_one_of_other_stays_is_refused(finished, tmp_path):
    assert train.main(arguments(tmp_path, finished / "data.csv", "--seeds", 2, "--max-epochs", 1)) == 0
    out, content = evaluated(tmp_path, finished / "data.csv", tmp_path / "out")
    each = [best_model(tmp_path).parents[1] / f"seed_{n}" / "checkpoints" / "best_model.pth" for n in (1, 2)]
    risks = [train.predict(path, cache_dir=str(tmp_path / "cache"))["probability"] for path in each]
    assert content["models"] == 2 and not risks[0].equals(risks[1])
    assert pd.read_csv(out / "predictions.csv")["probability"].to_numpy() == pytest.approx(sum(risks) / 2, abs=1e-6)


def test_training_on_a_frame_is_that_on_its_file(finished, tmp_path):
    _, best = trained(finished, tmp_path / "frame", data=pd.read_csv(finished / "data.csv"))
    weights = torch.load(best_model(finished), weights_only=True)["model"]
    assert best.settings.data == train.THE_FRAME
    assert all(torch.equal(weight, weights[name]) for name, weight in best.model.state_dict().items())


@pytest.mark.slow
def test_fine_tuning_starts_from_the_other_model_and_knows_new_categories_not(sample_run, tmp_path, log):
    first = str(trained(sample_run, tmp_path, item_history=True)[0].output / "checkpoints" / "best_model.pth")
    options = {"item_history": True, "init_from": first, "learning_rate": 1e-12, "max_epochs": 1}
    start, _ = trained(sample_run, tmp_path / "same", **options)
    before = train.load_run(first, cache_dir=str(sample_run / "cache"))
    assert start.test_set is not None and len(start.test_set) > 5
    at = before.table.stays["icu_stay_id"].isin(start.test_set.table.stays["icu_stay_id"]).to_numpy()
    assert start.predict(start.test_set) == pytest.approx(before.logits[at], abs=1e-5)
    assert "are taken" not in log.text and f"{len(start.test_set)} of {len(start.test_set)} test stays" not in log.text
    other = pd.read_csv(sample_run / "data.csv").eval("patient_age = patient_age + 9").assign(insurance="Another's")
    start, _ = trained(sample_run, tmp_path / "other", data=other, **options)
    names, known = start.preprocessor.static_names, before.checkpoint.preprocessor.static_names
    now, then = (model.classifier[0].weight.detach() for model in (start.model, before.model))
    for column, name in enumerate(names, start=32):
        expected = then[:, 32 + known.index(name)] if name in known else now[:, column]
        assert torch.allclose(now[:, column], expected, atol=1e-6)
    assert ("insurance", "Another's") not in known and "insurance: Another's" in log.text
    assert start.preprocessor.state_dict()["means"] == before.checkpoint.preprocessor.state_dict()["means"]
    with pytest.raises(train.InputError, match="d_model 64 instead of 32"):
        trained(sample_run, tmp_path / "wide", d_model=64, **options)
