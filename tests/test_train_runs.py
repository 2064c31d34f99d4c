"""What a run reads besides its data and leaves in its folder: splits, seeds, folds, settings, a card."""

import json
import re
from unittest.mock import Mock

import pandas as pd
import pytest
import torch
import yaml
from small_table import arguments, best_model

import train
from clinical_lf.encoders import CLINICAL_LONGFORMER
from clinical_lf.tables import LABEL

read_json = lambda folder, name="metrics.json": json.loads((folder / "out" / name).read_text())
read_csv = lambda folder, name: pd.read_csv(folder / "out" / name)


def run(folder, finished, *options, code=0, **more):
    """Run train.py on the data of the finished run into another folder."""
    assert train.main(arguments(folder, finished / "data.csv", *options, **more)) == code


def test_settings_file_repeats_the_run_to_the_bit_and_options_overrule_it(finished, tmp_path):
    assert train.main([str(finished / "out" / "settings.yaml"), "--output-dir", str(tmp_path / "out")]) == 0
    for name in ("predictions.csv", "split.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (finished / "out" / name).read_bytes()
    first, second = (torch.load(best_model(folder), weights_only=True)["model"] for folder in (finished, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert yaml.safe_load((tmp_path / "out" / "settings.yaml").read_text())["output_dir"] == str(tmp_path / "out")


def test_run_says_how_it_came_about(finished):
    said = read_json(finished, "run.json")
    assert said["seconds"] > 0 and said["versions"]["torch"] == torch.__version__
    assert set(said) >= {"command", "date", "commit"}
    content, card = read_json(finished), (finished / "out" / "model_card.md").read_text()
    block, test = content["tripod_ai"], content["metrics"]["test"]
    assert sum(block["events_per_type"].values()) == 120 and block["missing_per_column"]["patient_age"] == 0
    assert content["cohort"][0]["stays"] == 40 and sum(block["patients_per_part"].values()) == 40
    assert f"{test['n_stays']} stays of {test['n_patients']} patients, {test['n_deaths']} deaths" in card
    assert f"| AUPRC | {test['auprc']['value']:.2f} (95 % interval {test['auprc']['low']:.2f}" in card
    assert "not for clinical use" in card and "{" not in card and "nan" not in card
    tested, said = read_csv(finished, "predictions.csv"), re.compile(r"risk of ([\d.]+) or.* (\d+) alarms for (\d+) of")
    threshold, *counts = map(float, said.search(card).groups())
    own = tested.loc[tested["probability"] >= threshold, LABEL]
    assert counts == [len(own), own.sum()] and threshold == content["thresholds"]["alarm"]
    (whole, *_) = test["conformal_sets"]["coverage"]
    low, high = content["thresholds"]["died_from"], content["thresholds"]["survived_to"]
    assert whole["both_possible"] == tested["probability"].between(low, high).sum()
    assert "known only when the stay has ended" in card


def test_split_file_gives_each_part_its_patients(finished, tmp_path):
    split = read_csv(finished, "split.csv")
    split.replace({"part": {"train": "test", "test": "train"}}).to_csv(tmp_path / "split.csv", index=False)
    run(tmp_path, finished, "--split", tmp_path / "split.csv")
    assert {*read_csv(tmp_path, "predictions.csv")["patient_id"]} == {*split["patient_id"][split["part"] == "train"]}


def test_no_test_learns_from_all_patients_and_says_that_it_was_not_tested(finished, tmp_path):
    run(tmp_path, finished, "--no-test")
    assert read_csv(tmp_path, "split.csv")["part"].value_counts().to_dict() == {"train": 32, "validation": 8}
    assert "test" not in read_json(tmp_path)["metrics"]
    assert "Not tested" in (tmp_path / "out" / "model_card.md").read_text()


def test_seeds_share_a_split_and_give_one_table(finished, tmp_path):
    run(tmp_path, finished, "--seeds", 2)
    table = read_csv(tmp_path, "seeds.csv").set_index("seed")
    assert table.index.tolist() == ["1", "2", "mean", "std"]
    assert table["brier"]["mean"] == pytest.approx(table["brier"][:2].mean(), rel=1e-4)
    one, two, pooled = (read_csv(tmp_path, f"{place}predictions.csv") for place in ("seed_1/", "seed_2/", ""))
    assert not one["probability"].equals(two["probability"]) and one["icu_stay_id"].equals(two["icu_stay_id"])
    assert pooled["probability"].to_numpy() == pytest.approx((one + two)["probability"].to_numpy() / 2)


def test_cross_validation_holds_out_every_stay_once_and_pictures_all(finished, tmp_path):
    run(tmp_path, finished, "--cross-validate", 2)
    assert all((tmp_path / "out" / name).exists() for name in ("plots/calibration.png", "subgroups.csv", "folds.csv"))
    assert read_csv(tmp_path, "calibration.csv")["n"].sum() == 40
    predictions = read_csv(tmp_path, "predictions.csv")
    assert predictions["icu_stay_id"].is_unique and len(predictions) == 40
    for number, held_out in predictions.groupby("fold"):
        parts = read_csv(tmp_path, f"fold_{number}/split.csv").set_index("patient_id")["part"]
        assert parts.index.is_unique and set(held_out["patient_id"]) == set(parts.index[parts == "test"])


def test_evaluation_is_written_beside_its_checkpoint_of_the_data_it_names(finished, capfd):
    """All but the test stays are of patients that the model knows: they are left out of figures."""
    options = list(map(str, ["--evaluate", best_model(finished), "--cache-dir", finished / "cache"]))
    stale = finished / "out" / "evaluation" / "risk_trajectories.csv"
    assert train.main([*options, "--trajectory", "24"]) == 0 and stale.exists()
    assert train.main(options) == 0 and not stale.exists()
    assert f"Reading     {finished / 'data.csv'}" in capfd.readouterr().out
    assert len(read_csv(finished, "evaluation/predictions.csv")) == 40
    judged = read_json(finished, "evaluation/metrics.json")["metrics"]
    assert judged["n_stays"] == read_json(finished)["metrics"]["test"]["n_stays"]


def test_ctrl_c_in_the_middle_of_an_epoch_loses_that_epoch_alone(finished, tmp_path, monkeypatch, capfd):
    set_learning_rate, steps = train.Trainer.set_learning_rate, []

    def interrupted(trainer, share_of_training):
        steps.append(trainer.epochs_done)
        if steps.count(1) == 2:
            raise KeyboardInterrupt
        set_learning_rate(trainer, share_of_training)

    options = ["--batch-size", 8, "--max-epochs", 2]
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "set_learning_rate", interrupted)
        run(tmp_path / "stopped", finished, *options, code=130)
    assert "go on with the same command and --resume" in capfd.readouterr().err
    run(tmp_path / "stopped", finished, *options, "--resume")
    run(tmp_path / "straight", finished, *options)
    stopped, straight = (tmp_path / name / "out" for name in ("stopped", "straight"))
    assert (stopped / "predictions.csv").read_bytes() == (straight / "predictions.csv").read_bytes()
    latest = (out / "checkpoints" / "latest_checkpoint.pth" for out in (stopped, straight))
    found, expected = (torch.load(path, weights_only=True)["model"] for path in latest)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_dry_run_says_what_would_be_done_and_trains_nothing(finished, tmp_path, capfd, monkeypatch):
    """Of the sample without network it plans with the encoder hashing."""
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", Mock(side_effect=ConnectionError("no network")))
    monkeypatch.setattr(train, "SAMPLE", finished / "data.csv")
    monkeypatch.chdir(tmp_path)
    run(tmp_path, finished, "--dry-run", "--seeds", 3, encoder=CLINICAL_LONGFORMER)
    shown = capfd.readouterr().out
    assert shown.index("hashing encoder instead") < shown.index("texts with hashing")
    assert "encode 8 of 8 texts with hashing" in shown and "train 3 times at most 1 epochs" in shown
    assert "MB of disk" in shown and "MB of vectors in memory" in shown
    assert "test: too few to read: 4 stays of one outcome, below 10" in shown and "train: too few" not in shown
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]
