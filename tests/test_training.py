"""The whole program as users run it: train, resume, evaluate, other encoders, two processes."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from make_sample import make_sample
from small_table import arguments, best_model, small_table

import explain_clinicalLF
import train


@pytest.fixture
def data(sample_run):
    return sample_run / "data.csv"


def test_history_has_a_row_for_every_epoch(sample_run):
    history = pd.read_csv(sample_run / "out" / "history.csv")
    assert history["epoch"].tolist() == [1, 2, 3] and (history["seconds"] > 0).all()


def test_resume_knows_the_same_data_at_another_path_and_refuses_other_data_at_the_same(finished, tmp_path, capfd):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    options = arguments(tmp_path, tmp_path / "data.csv", "--max-epochs", 2, "--resume")
    assert train.main(options) == 0
    assert "Resumed     after epoch 1" in capfd.readouterr().out
    table = pd.read_csv(tmp_path / "data.csv", dtype=str)
    table.assign(event_text=table["event_text"] + ".").to_csv(tmp_path / "data.csv", index=False)
    assert train.main(options) == 2
    assert "other data" in capfd.readouterr().err


def weights(folder, name="best_model.pth"):
    return torch.load(folder / "out" / "checkpoints" / name, weights_only=True)["model"]


def test_training_writes_every_output(sample_run):
    names = {str(path.relative_to(sample_run / "out")) for path in (sample_run / "out").rglob("*") if path.is_file()}
    plots = {
        f"plots/{name}.png" for name in ("training_curves", "roc_and_precision_recall", "calibration", "decision_curve")
    }
    expected = {
        "metrics.json",
        "predictions.csv",
        "leakage_audit.csv",
        "subgroups.csv",
        "checkpoints/best_model.pth",
        "checkpoints/latest_checkpoint.pth",
        "attention_weights/attention_epoch_1_batch_0.npz",
    } | plots
    assert expected <= names


@pytest.mark.parametrize(
    "script, settings", [(train, train.Settings), (explain_clinicalLF, explain_clinicalLF.ExplainSettings)]
)
def test_help_names_every_setting_of_both_scripts(script, settings, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and "95 % interval" in " ".join(shown.split())
    assert all(f"--{field.name}" in shown for field in dataclasses.fields(settings))


def test_metrics_name_the_encoder_and_carry_intervals(sample_run):
    content = json.loads((sample_run / "out" / "metrics.json").read_text())
    auroc = content["metrics"]["test"]["auroc"]
    assert content["text_encoder"] == "hashing" and auroc["low"] <= auroc["value"] <= auroc["high"]


def test_predictions_hold_each_test_stay_once(sample_run):
    predictions = pd.read_csv(sample_run / "out" / "predictions.csv")
    assert list(predictions.columns) == ["icu_stay_id", "patient_id", "patient_expired_in_hospital", "probability"]
    assert predictions.icu_stay_id.is_unique and predictions.probability.between(0, 1).all()


def test_saved_attention_is_bounded_and_sums_to_one(sample_run):
    saved = train.load_attention_weights(sample_run / "out" / "attention_weights" / "attention_epoch_1_batch_0.npz")
    assert saved["pooling_weights"][0, :, 0].sum(1) == pytest.approx(np.ones(4), abs=1e-4)
    assert max(saved["layer_attention_weights"][0].shape[2:]) <= train.MAX_MAP_BINS


def test_attention_is_saved_at_most_five_times_an_epoch_spread_evenly(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "draw_attention", lambda path, **options: path)
    small_table().to_csv(tmp_path / "data.csv", index=False)
    sizes = {"d_model": 32, "n_layers": 1, "n_heads": 2, "d_feedforward": 32, "max_epochs": 1, "batch_size": 3}
    folders = {"cache_dir": str(tmp_path / "cache"), "output_dir": str(tmp_path / "out")}
    options = {"text_encoder": "hashing", "save_attention_every": 1}
    trainer, _ = train.train_model(train.Settings(str(tmp_path / "data.csv"), **options, **folders, **sizes))
    names = {path.stem for path in (tmp_path / "out" / "attention_weights").iterdir()}
    assert len(trainer.plan_epoch(1)) == 9
    assert names == {f"attention_epoch_1_batch_{number}" for number in (0, 2, 4, 6, 8)}


def test_no_patient_is_in_two_splits(sample_run):
    patients = torch.load(best_model(sample_run), weights_only=True)["patients"]
    together = sum(patients.values(), [])
    assert len(together) == len(set(together)) and set(patients) == {"train", "validation", "test"}


def test_evaluate_gives_the_same_probabilities_as_the_training_run(sample_run, data):
    checkpoint = best_model(sample_run)
    assert train.main(arguments(sample_run, data, "--evaluate", checkpoint)) == 0
    scored = pd.read_csv(sample_run / "out" / "evaluation" / "predictions.csv").set_index("icu_stay_id").probability
    before = pd.read_csv(sample_run / "out" / "predictions.csv").set_index("icu_stay_id").probability
    assert np.allclose(scored[before.index], before, atol=2e-6)


def test_evaluate_without_labels_writes_predictions(sample_run, data, tmp_path):
    unlabelled = tmp_path / "new.csv"
    pd.read_csv(data, dtype=str).drop(columns="patient_expired_in_hospital").to_csv(unlabelled, index=False)
    checkpoint = best_model(sample_run)
    assert train.main(arguments(tmp_path, unlabelled, "--evaluate", checkpoint)) == 0
    scored = pd.read_csv(tmp_path / "out" / "evaluation" / "predictions.csv")
    assert scored.patient_expired_in_hospital.isna().all() and scored.probability.notna().all()


def test_evaluate_trajectory_scores_stays_while_they_last(sample_run, data, tmp_path):
    checkpoint = best_model(sample_run)
    assert train.main(arguments(tmp_path, data, "--evaluate", checkpoint, "--trajectory", "6,24")) == 0
    rows = pd.read_csv(tmp_path / "out" / "evaluation" / "risk_trajectories.csv")
    table = train.read_stays(data)[0]
    in_a_day = (table.known_minutes_since_intime <= 24 * 60) & (table.minutes_since_intime <= 24 * 60)
    lasting = np.intersect1d(np.unique(table.stay_of_event[in_a_day]), np.flatnonzero(train.stay_hours(table) > 24))
    assert set(rows.hours_after_admission) == {6, 24} and (rows.hours_after_admission == 24).sum() == len(lasting)


def test_resume_ends_with_exactly_the_weights_of_an_uninterrupted_run(sample_run, tmp_path, monkeypatch):
    settings = train.load_checkpoint(best_model(sample_run)).settings
    settings = dataclasses.replace(settings, output_dir=str(tmp_path / "out"))
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "out_of_patience", lambda trainer: trainer.epochs_done == 1)
        train.train_model(settings)
    train.train_model(dataclasses.replace(settings, resume=True))
    straight, resumed = weights(sample_run, "latest_checkpoint.pth"), weights(tmp_path, "latest_checkpoint.pth")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_prospective_run_uses_no_column_known_only_later(data, tmp_path):
    assert train.main(arguments(tmp_path, data, "--max-epochs", 1, "--observation-hours", 24)) == 0
    content = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert not set(content["settings"]["static_features"]) & set(train.KNOWN_ONLY_LATER)
    assert [step["stays"] for step in content["cohort"]] == sorted(
        (step["stays"] for step in content["cohort"]), reverse=True
    )


def test_audit_alone_names_discharge_location(data, tmp_path):
    assert train.main(arguments(tmp_path, data, "--audit")) == 0
    audit = pd.read_csv(tmp_path / "out" / "leakage_audit.csv").set_index("name")
    assert audit.flagged["discharge_location"] and not audit.flagged["patient_age"]


def test_item_history_temperature_scaling_and_an_encoder_of_another_size_train_and_evaluate(
    tiny_longformer, finished, tmp_path
):
    data, options = finished / "data.csv", ["--item-history", "--temperature-scaling", "--n-layers", 0]
    assert train.main(arguments(tmp_path, data, *options, encoder=tiny_longformer)) == 0
    checkpoint = train.load_checkpoint(best_model(tmp_path))
    assert checkpoint.model.architecture["input_dim"] == 5 + 32 + 1 + len(train.HISTORY)
    assert train.main(arguments(tmp_path, data, "--evaluate", best_model(tmp_path), encoder=tiny_longformer)) == 0
    given = {"cache_dir": str(tmp_path / "cache"), "text_encoder": str(tiny_longformer), "n_bootstrap": 20}
    found = explain_clinicalLF.run_explainability_analysis(
        best_model(tmp_path), stays=1, max_stays=3, checked_stays=1, **given
    )
    assert "no layers" in found.verdict.set_index("name")["sentence"]["layer attention"]
    assert not {"layer_attention_weights", "captum_layer_attributions"} & set(found.figures)


def test_shuffled_labels_score_near_one_half(tmp_path):
    """With labels that mean nothing, held-out patients cannot be told apart."""
    table = make_sample(400, seed=2).table
    patients = table.patient_id.unique()
    drawn = pd.Series(
        np.random.default_rng(0).permutation(np.arange(len(patients)) % 4 == 0).astype(int), index=patients
    )
    table["patient_expired_in_hospital"] = table.patient_id.map(drawn)
    table.to_csv(tmp_path / "shuffled.csv", index=False)
    assert train.main(arguments(tmp_path, tmp_path / "shuffled.csv", "--max-epochs", 3, "--n-bootstrap", 50)) == 0
    auroc = json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"]["test"]["auroc"]
    assert auroc["low"] < 0.5 < auroc["high"]


def test_import_does_no_work(tmp_path, tmp_path_factory):
    """Importing makes no file, prints nothing, reads no arguments and leaves matplotlib and warnings alone."""
    code = (
        "import sys, warnings; sys.argv = ['x', '--nonsense']; before = list(warnings.filters); "
        "import train; import sys;"
        "assert 'captum' not in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={
            "PYTHONPATH": str(Path(train.__file__).parent),
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path_factory.mktemp("home")),
        },
    )
    assert done.returncode == 0 and not done.stdout and not done.stderr and not list(tmp_path.iterdir()), done.stderr


GRADIENT_SCRIPT = """
import sys, torch
import train
from accelerate import Accelerator
settings = train.Settings(
    data=sys.argv[1],
    cache_dir=sys.argv[2],
    output_dir=sys.argv[3],
    text_encoder='hashing',
    d_model=32,
    n_layers=1,
    n_heads=2,
    d_feedforward=32,
    dropout=0.0,
    gradient_clip=1e9,
    max_events_per_batch=65536,
    batch_size=12,
    save_attention_every=0,
)
settings = train.check_settings(settings)
accelerator = Accelerator(cpu=True)
trainer = train.Trainer(settings, train.read_training_data(settings, accelerator), accelerator)
loss = trainer.train_epoch(1)
gradients = [p.grad for p in accelerator.unwrap_model(trainer.objective).parameters()]
logits = trainer.predict(trainer.test_set)
if accelerator.is_main_process:
    torch.save({'gradients': gradients, 'loss': loss, 'logits': torch.from_numpy(logits.copy())}, sys.argv[4])
"""


@pytest.mark.slow
def test_two_processes_take_the_same_steps_as_one(data, tmp_path):
    """Same losses, gradients of the last step and held-out logits, each stay once: one process or two."""
    script = tmp_path / "gradients.py"
    script.write_text(GRADIENT_SCRIPT)
    results = []
    for launcher in (
        [sys.executable],
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517"],
    ):
        out = tmp_path / f"{len(results)}.pt"
        command = [*launcher, str(script), str(data), str(tmp_path / "cache"), str(tmp_path), str(out)]
        subprocess.run(
            command,
            check=True,
            capture_output=True,
            env={**os.environ, "PYTHONPATH": str(Path(train.__file__).parent), "OMP_NUM_THREADS": "1"},
        )
        results.append(torch.load(out, weights_only=True))
    one, two = results
    assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one["gradients"], two["gradients"]))
    assert torch.allclose(one["logits"], two["logits"], atol=1e-4)
