"""What a run reads besides its data and leaves in its folder: splits, other test data, seeds, settings, a card."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from small_table import arguments, best_model, small_table

import train


def metrics_of(folder, name="metrics.json"):
    return json.loads((folder / "out" / name).read_text())


def test_settings_file_repeats_the_run_and_options_overrule_it(finished, tmp_path):
    assert train.main([str(finished / "out" / "settings.yaml"), "--output-dir", str(tmp_path / "out")]) == 0
    for name in ("predictions.csv", "split.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (finished / "out" / name).read_bytes()
    assert yaml.safe_load((tmp_path / "out" / "settings.yaml").read_text())["output_dir"] == str(tmp_path / "out")


def test_run_says_how_it_came_about(finished):
    run = json.loads((finished / "out" / "run.json").read_text())
    assert (
        run["seconds"] > 0
        and run["versions"]["torch"] == torch.__version__
        and set(run) >= {"command", "date", "commit"}
    )


def test_model_card_and_tripod_block_hold_the_figures(finished):
    content, card = metrics_of(finished), (finished / "out" / "model_card.md").read_text()
    block = content["tripod_ai"]
    assert sum(block["events_per_type"].values()) == 120 and block["missing_per_column"]["patient_age"] == 0
    assert block["flow"][0]["stays"] == 40 and sum(block["patients_per_part"].values()) == 40
    assert {"subgroups", "operating_points", "calibration"} <= set(block)
    assert f"{content['metrics']['test']['n_stays']} stays" in card and "not for clinical use" in card
    assert "{" not in card and "nan" not in card


def test_split_file_gives_each_part_its_patients(finished, tmp_path):
    split = pd.read_csv(finished / "out" / "split.csv")
    swapped = split.assign(part=split["part"].replace({"train": "test", "test": "train"}))
    swapped.to_csv(tmp_path / "split.csv", index=False)
    options = arguments(tmp_path, finished / "data.csv", "--split", tmp_path / "split.csv")
    assert train.main(options) == 0
    tested = set(pd.read_csv(tmp_path / "out" / "predictions.csv")["patient_id"])
    assert tested == set(split.loc[split["part"] == "train", "patient_id"])


@pytest.mark.parametrize(
    "content, fragment",
    [
        ("a,b\n1,2\n", "cannot be read as CSV with patient_id and part"),
        ("patient_id,part\n10000000,train\n10000000,test\n", "a patient is in two parts"),
        ("patient_id,part\n10000000,train\n", "its part train holds no stays of both outcomes"),
    ],
)
def test_bad_split_file_is_refused(content, fragment, finished, tmp_path, capfd):
    (tmp_path / "split.csv").write_text(content)
    assert train.main(arguments(tmp_path, finished / "data.csv", "--split", tmp_path / "split.csv")) == 2
    assert fragment in capfd.readouterr().err


def test_test_data_are_tested_on_and_never_learnt_from(finished, tmp_path, capfd):
    """Of 30 external stays, 10 are of patients that --data has too."""
    small_table(30, first_id=10_000_030).to_csv(tmp_path / "external.csv", index=False)
    options = arguments(tmp_path, finished / "data.csv", "--test-data", tmp_path / "external.csv")
    assert train.main(options) == 0
    assert "10 stays are of patients that --data has too" in capfd.readouterr().out
    split = pd.read_csv(tmp_path / "out" / "split.csv")
    assert set(split.loc[split["part"] == "test", "patient_id"]) == set(range(10_000_040, 10_000_060))
    assert (split["part"] != "test").sum() == 40
    assert metrics_of(tmp_path)["metrics"]["test"]["n_stays"] == 20


def test_appended_stays_keep_their_texts(tmp_path):
    tables = []
    for number, first_id in enumerate((1, 100)):
        path = tmp_path / f"{number}.csv"
        small_table(4, first_id=first_id).replace(":", f"{number}:", regex=False).to_csv(path, index=False)
        tables.append(train.read_stays(path)[0])
    both = train.append_stays(*tables)
    words = np.concatenate([table.texts[table.text] for table in tables])
    assert (both.texts[both.text] == words).all() and both.lengths.tolist() == [3] * 8
    assert both.take(np.arange(4, 8)).minutes_to_end.tolist() == tables[1].minutes_to_end.tolist()


def test_no_test_learns_from_all_patients_and_says_that_it_was_not_tested(finished, tmp_path):
    assert train.main(arguments(tmp_path, finished / "data.csv", "--no-test")) == 0
    split = pd.read_csv(tmp_path / "out" / "split.csv")
    assert split["part"].value_counts().to_dict() == {"train": 32, "validation": 8}
    assert "test" not in metrics_of(tmp_path)["metrics"]
    assert "Not tested" in (tmp_path / "out" / "model_card.md").read_text()


def test_seeds_share_a_split_and_give_one_table(finished, tmp_path):
    assert train.main(arguments(tmp_path, finished / "data.csv", "--seeds", 2)) == 0
    table = pd.read_csv(tmp_path / "out" / "seeds.csv")
    assert table["seed"].tolist() == ["1", "2", "mean", "std"]
    parts = [pd.read_csv(tmp_path / "out" / f"seed_{number}" / "predictions.csv") for number in (1, 2)]
    assert not parts[0]["probability"].equals(parts[1]["probability"])
    pooled = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert pooled["probability"].to_numpy() == pytest.approx((parts[0] + parts[1])["probability"].to_numpy() / 2)


def test_cross_validation_holds_out_every_stay_once_and_pictures_all(finished, tmp_path):
    assert train.main(arguments(tmp_path, finished / "data.csv", "--cross-validate", 2)) == 0
    for name in ("plots/calibration.png", "subgroups.csv", "operating_points.csv", "folds.csv"):
        assert (tmp_path / "out" / name).exists()
    assert pd.read_csv(tmp_path / "out" / "calibration.csv")["n"].sum() == 40
    predictions = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert predictions["icu_stay_id"].is_unique and len(predictions) == 40 and predictions["fold"].nunique() == 2


def test_folds_of_cross_validation_keep_patients_whole(sample_run):
    table = train.read_stays(sample_run / "data.csv")[0]
    patients = table.stays["patient_id"].to_numpy()
    assert len(np.unique(patients)) < len(patients)
    tested = []
    for split in train.cross_validation_splits(table, 3, seed=0):
        parts = [set(patients[part]) for part in split]
        assert sum(map(len, parts)) == len(set.union(*parts)) == len(np.unique(patients))
        tested += split.test.tolist()
    assert sorted(tested) == list(range(len(patients)))


def test_evaluation_is_written_beside_its_checkpoint(finished):
    places = ["--data", finished / "data.csv", "--cache-dir", finished / "cache"]
    options = [*map(str, ["--evaluate", best_model(finished), *places])]
    stale = finished / "out" / "evaluation" / "risk_trajectories.csv"
    assert train.main([*options, "--trajectory", "24"]) == 0 and stale.exists()
    assert train.main(options) == 0 and not stale.exists()
    assert len(pd.read_csv(finished / "out" / "evaluation" / "predictions.csv")) == 40


def test_evaluation_without_data_takes_those_of_the_checkpoint(finished, capfd):
    """All but the test stays are of patients that the model knows: they are left out."""
    options = ["--evaluate", best_model(finished), "--cache-dir", finished / "cache"]
    assert train.main(list(map(str, options))) == 0
    assert f"Reading     {finished / 'data.csv'}" in capfd.readouterr().out
    content = json.loads((finished / "out" / "evaluation" / "metrics.json").read_text())
    assert content["metrics"]["n_stays"] == metrics_of(finished)["metrics"]["test"]["n_stays"]


def test_new_run_removes_what_an_earlier_one_left_and_nothing_else(finished):
    out = finished / "out"
    assert not (out / "fold_9").exists() and not (out / "attention_weights" / "attention_epoch_9_batch_0.npz").exists()
    assert (out / "notes.csv").exists() and (out / "explainability" / "notes.csv").exists()


def test_ctrl_c_in_the_middle_of_an_epoch_loses_that_epoch_alone(finished, tmp_path, monkeypatch, capfd):
    set_learning_rate, steps = train.Trainer.set_learning_rate, []

    def interrupted(trainer, share_of_training):
        steps.append(trainer.epochs_done)
        if steps.count(1) == 2:
            raise KeyboardInterrupt
        set_learning_rate(trainer, share_of_training)

    options = ["--batch-size", 8, "--max-epochs", 2]
    monkeypatch.setattr(train.Trainer, "set_learning_rate", interrupted)
    assert train.main(arguments(tmp_path / "stopped", finished / "data.csv", *options)) == 130
    assert "go on with the same command and --resume" in capfd.readouterr().err
    monkeypatch.undo()
    assert train.main(arguments(tmp_path / "stopped", finished / "data.csv", *options, "--resume")) == 0
    assert train.main(arguments(tmp_path / "straight", finished / "data.csv", *options)) == 0
    written = [(tmp_path / name / "out" / "predictions.csv").read_bytes() for name in ("stopped", "straight")]
    assert written[0] == written[1]


def test_log_gets_a_line_of_progress_with_the_time_left_and_no_bar(monkeypatch, caplog, capfd):
    monkeypatch.setattr(train, "SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr(train.logger, "handlers", [])
    monkeypatch.setattr(train.logger, "propagate", True)
    with caplog.at_level("INFO", logger="clinical_LF"):
        for _ in train.Progress(range(3), desc="counting", unit=" sheep", mininterval=0):
            pass
    assert "counting" in caplog.text and "of 3 sheep" in caplog.text and " left" in caplog.text
    assert capfd.readouterr().err == ""


def test_dry_run_says_what_would_be_done_and_trains_nothing(finished, tmp_path, capfd):
    assert train.main(arguments(tmp_path, finished / "data.csv", "--dry-run", "--seeds", 3)) == 0
    shown = capfd.readouterr().out
    assert "encode 8 of 8 texts with hashing, about" in shown and "train 3 times at most 1 epochs" in shown
    assert "GB of disk in cache" in shown and "GB of memory" in shown
    assert "test: too few to read: 4 stays of one outcome, below 10" in shown and "train: too few" not in shown
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]


def test_plan_of_a_resumed_run_counts_the_epochs_that_are_left(tmp_path):
    def left(n_trainings, **more):
        return train.epochs_left(train.Settings(output_dir=str(tmp_path), max_epochs=5, **more), n_trainings)

    for folder in (tmp_path, tmp_path / "fold_1", tmp_path / "fold_2"):
        folder.mkdir(exist_ok=True)
        (folder / "history.csv").write_text("epoch,train_loss\n1,0.5\n2,0.4\n")
    assert left(1) == 5 and left(1, resume=True) == 3
    assert left(3, cross_validate=3) == 15 and left(3, cross_validate=3, resume=True) == 11
    assert left(3, seeds=3, resume=True) == 15


def test_plan_of_the_sample_without_network_is_that_of_hashing(finished, tmp_path, capfd, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    monkeypatch.setattr(train, "SAMPLE", finished / "data.csv")
    options = arguments(tmp_path, "data.csv", "--dry-run", "--hf-cache", tmp_path, encoder=train.CLINICAL_LONGFORMER)
    assert train.main(options) == 0
    shown = capfd.readouterr().out
    assert shown.index("hashing encoder instead") < shown.index("texts with hashing") and "unknown" not in shown


def test_typical_time_is_not_that_of_a_slow_round(monkeypatch):
    clock = iter([0.0, 0.1, 0.1, 0.2, 0.2, 30.2])  # rounds of 0.1, 0.1 and 30 s
    monkeypatch.setattr(train.time, "monotonic", lambda: next(clock))
    assert train.typical_seconds(lambda: None) == pytest.approx(0.1)


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_tracker_that_is_not_installed_is_named(tracker, finished, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    assert train.main(arguments(tmp_path, finished / "data.csv", "--report-to", tracker)) == 2
    assert f"pip install {tracker}" in capfd.readouterr().err


def test_tensorboard_gets_every_epoch(finished, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ["--report-to", "tensorboard", "--max-epochs", 2]
    assert train.main(arguments(tmp_path, finished / "data.csv", *options)) == 0
    events = EventAccumulator(str(tmp_path / "out" / "clinical_LF")).Reload()
    assert [event.step for event in events.Scalars("validation_loss")] == [1, 2]
