"""The whole program as users run it: train, resume, evaluate; nothing is read before it was known."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from make_sample import make_sample
from small_table import arguments, best_model, small_table
from test_devices import ENVIRONMENT, ROOT, TWO_OF

import explain_clinicalLF as explain
import train
from clinical_lf.items import HISTORY
from clinical_lf.reading import read_stays
from clinical_lf.tables import EVENT_TYPES, KNOWN_ONLY_LATER, LABEL, STATIC_COLUMNS, stay_hours

WRITTEN = Path(__file__).with_name("written.txt").read_text("utf-8").split()


def trained(run, output, **changes):
    """Train with the settings of a finished run but for these -> trainer, best checkpoint."""
    settings = train.load_checkpoint(best_model(run)).settings
    return train.train_model(replace(settings, output_dir=str(output), **changes))


def evaluated(folder, data, checkpoint, *options):
    """The folder with what `train.py --evaluate` writes, and its metrics."""
    assert train.main(arguments(folder, data, "--evaluate", checkpoint, *options)) == 0
    out = folder / "out" / "evaluation"
    return out, json.loads((out / "metrics.json").read_text())


def test_training_writes_every_output_with_each_patient_in_one_part(sample_run):
    out = sample_run / "out"
    kinds = (("attention_weights", "npz"), ("plots", "png"))
    attention = {f"{kind}/attention_epoch_{n}_batch_0.{end}" for n in (1, 2, 3) for kind, end in kinds}
    found = {str(path.relative_to(out)) for kind in ("*", "[!e]*/*") for path in out.glob(kind) if path.is_file()}
    assert found == {".lock", *WRITTEN, *attention}
    assert all((out / name).stat().st_size for name in found - {".lock"})
    shown = [train.load_attention_weights(path)["icu_stay_id"] for path in (out / "attention_weights").iterdir()]
    assert len(shown) == 3 and len(set(map(int, shown))) == 1  # the same stay in every epoch
    history = pd.read_csv(out / "history.csv")
    assert history["epoch"].tolist() == [1, 2, 3] and (history["seconds"] > 0).all()
    content = json.loads((out / "metrics.json").read_text())
    auroc = content["metrics"]["test"]["auroc"]
    assert content["outcome"] == "hospital" and content["outcome_definition"] in (out / "model_card.md").read_text()
    assert content["text_encoder"] == "hashing" and auroc["low"] <= auroc["value"] <= auroc["high"]
    flagged = pd.read_csv(out / "leakage_audit.csv").set_index("name")["flagged"]
    assert flagged["discharge_location"] and not flagged["patient_age"]
    predictions = pd.read_csv(out / "predictions.csv")
    assert list(predictions) == ["icu_stay_id", "patient_id", LABEL, "probability"]
    assert predictions["icu_stay_id"].is_unique and predictions["probability"].between(0, 1).all()
    patients = torch.load(best_model(sample_run), weights_only=True)["patients"]
    together = sum(patients.values(), [])
    assert len(together) == len(set(together)) == 69 and set(patients) == {"train", "validation", "test"}


def test_attention_is_saved_five_times_an_epoch_and_rates_and_averages_follow_their_formulas(finished, tmp_path):
    """Half a cosine after a warm-up of 50 steps or a tenth; a mean that looks back over ever more steps, 50 at most."""
    trainer, _ = trained(finished, tmp_path, batch_size=3, save_attention_every=1)
    paths = sorted((tmp_path / "attention_weights").iterdir())
    assert len(trainer.plan_epoch(1)) == 9
    assert [path.stem for path in paths] == [f"attention_epoch_1_batch_{number}" for number in (0, 2, 4, 6, 8)]
    pooling = train.load_attention_weights(paths[-1])["pooling_weights"]
    assert pooling[0, :, 0].sum(1) == pytest.approx(np.ones(4), abs=1e-4)
    shares = {(0, 0): 0.02, (24, 0): 0.5, (49, 0): 1, (0, 0.1): 0.97553, (99, 0.5): 0.5, (99, 1): 0}
    for (trainer.step, fraction), part in shares.items():
        trainer.set_learning_rate(fraction)
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(part * trainer.settings.learning_rate, abs=1e-7)
    for trainer.step, share in {0: 1, 10: 0.5, 10_000: 0.02}.items():
        averaged = [torch.zeros(1)]
        trainer.average.multi_avg_fn(averaged, [torch.ones(1)], 0)
        assert averaged[0].item() == pytest.approx(share)
    is_number = [category is None for _, category in trainer.preprocessor.static_names]
    assert trainer.model.static_weight.tolist() == [3 if number else 1 for number in is_number]
    for epoch in (3, 4):  # from the fourth on, events' own predictions have a share in the loss
        trainer.train_epoch(epoch)
        assert trainer.objective.loss.event_head.weight.grad.any() == (epoch == 4)


def test_weights_of_the_lowest_validation_loss_are_kept_and_patience_ends_training(finished, tmp_path, monkeypatch):
    found = iter([{"validation_loss": loss, "validation_auroc": 0.5} for loss in (0.7, 0.5, 0.6, 0.6, 0.4)])
    monkeypatch.setattr(train.Trainer, "validate", lambda trainer: next(found))
    trainer, best = trained(finished, tmp_path, max_epochs=5, patience=2)
    assert (trainer.epochs_done, trainer.best_epoch, best.state["epochs_done"]) == (4, 2, 2)


def test_resume_knows_the_same_data_at_another_path_and_refuses_other_data_at_the_same(finished, tmp_path, capfd):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    options = arguments(tmp_path, tmp_path / "data.csv", "--max-epochs", 2, "--resume")
    assert train.main(options) == 0
    assert "Resumed     after epoch 1" in capfd.readouterr().out
    table = pd.read_csv(tmp_path / "data.csv", dtype=str)
    table.assign(event_text=table["event_text"] + ".").to_csv(tmp_path / "data.csv", index=False)
    assert train.main(options) == 2
    assert "(the data)" in capfd.readouterr().err


def test_evaluate_gives_the_probabilities_of_training_also_without_labels_and_while_stays_last(sample_run, tmp_path):
    pd.read_csv(sample_run / "data.csv", dtype=str).drop(columns=LABEL).to_csv(tmp_path / "new.csv", index=False)
    out, content = evaluated(tmp_path, tmp_path / "new.csv", best_model(sample_run), "--trajectory", "24,6")
    scored, before = (pd.read_csv(place / "predictions.csv") for place in (out, sample_run / "out"))
    assert scored[LABEL].isna().all() and content["metrics"] is None and len(scored) == 90
    seen = scored.set_index("icu_stay_id")["seen_in_training"]
    scored, before = (frame.set_index("icu_stay_id")["probability"] for frame in (scored, before))
    assert np.allclose(scored[before.index], before, atol=2e-6)
    rows, table = pd.read_csv(out / "risk_trajectories.csv"), read_stays(sample_run / "data.csv")[0]
    in_a_day = (table.known_minutes_since_intime <= 24 * 60) & (table.minutes_since_intime <= 24 * 60)
    lasting = np.intersect1d(np.unique(table.stay_of_event[in_a_day]), np.flatnonzero(stay_hours(table) > 24))
    assert sorted(rows["icu_stay_id"][rows["hours_after_admission"] == 24]) == sorted(table.stays.icu_stay_id[lasting])
    assert {*rows.hours_after_admission} == {6, 24} and rows.seen_in_training.equals(rows.icu_stay_id.map(seen))


def test_held_out_stays_teach_nothing(finished, tmp_path):
    """With other ages, insurance and events of the test patients, the checkpoint is the same."""
    split, table = finished / "out" / "split.csv", pd.read_csv(finished / "data.csv", dtype=str)
    part = pd.read_csv(split, dtype=str).set_index("patient_id")["part"]
    changed = ["99", "NEW", EVENT_TYPES[0], "Prescription: New | Dose: 1000 mg"]
    columns = ["patient_age", "insurance", "event_type", "event_text"]
    table.loc[table["patient_id"].map(part) == "test", columns] = changed
    table.to_csv(tmp_path / "data.csv", index=False)
    assert train.main(arguments(tmp_path, tmp_path / "data.csv", "--split", split)) == 0
    before, after = (torch.load(best_model(folder), weights_only=True) for folder in (finished, tmp_path))
    assert all(before[name] == after[name] for name in ("preprocessor", "training_items", "patients"))
    for name in ("model", "baseline"):
        assert all(torch.allclose(after[name][key], tensor, atol=1e-6) for key, tensor in before[name].items())


def test_prospective_run_uses_no_column_known_only_later(sample_run, tmp_path):
    assert train.main(arguments(tmp_path, sample_run / "data.csv", "--observation-hours", 24)) == 0
    used = yaml.safe_load((tmp_path / "out" / "settings.yaml").read_text())["static_features"]
    assert used and not set(used) & set(KNOWN_ONLY_LATER)
    stays = [step["stays"] for step in json.loads((tmp_path / "out" / "metrics.json").read_text())["cohort"]]
    assert stays == sorted(stays, reverse=True) and len(stays) == 3


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """A run on stays of which the first two are alike until hour 2; an event of hour 3 is known half an hour later."""
    folder = tmp_path_factory.mktemp("twins")
    table = small_table(n_events=6).assign(last_icu_careunit=lambda t: "MICU " + t[LABEL])
    first, second = table[:6], table.index[6:12]
    same = ["patient_gender", "patient_age"]
    table.loc[second, same] = first[same].to_numpy()
    table.loc[second[:2], "event_text"] = first["event_text"][:2].to_numpy()
    table.drop(index=second[4]).to_csv(folder / "data.csv", index=False)  # later on, they differ in number, too
    features = [name for name in STATIC_COLUMNS if name != "discharge_location"]
    assert train.main(arguments(folder, folder / "data.csv", "--static-features", *features)) == 0
    return folder


def test_stays_of_which_the_same_is_known_at_3_hours_have_equal_risks_and_unseen_patients_alone_judge(twins, capfd):
    out, content = evaluated(twins, twins / "data.csv", best_model(twins), "--trajectory", "3,6")
    risks = pd.read_csv(out / "risk_trajectories.csv").set_index(["hours_after_admission", "icu_stay_id"])
    at_3, at_6 = (risks["probability"].loc[hour] for hour in (3, 6))
    assert at_3[30_000_000] == at_3[30_000_001] and at_6[30_000_000] != at_6[30_000_001]  # which differ later
    assert content["metrics"]["n_stays"] == 8 and len(pd.read_csv(out / "predictions.csv")) == 40  # a fifth of 40
    assert (content["seen_patients"]["stays"], content["seen_patients"]["of"]) == (32, 40)
    assert "32 stays of patients that the model was trained or tuned on are left out" in capfd.readouterr().out


def test_values_that_training_never_saw_are_counted_by_column_with_a_warning_above_a_fifth(twins, tmp_path, capfd):
    table = pd.read_csv(twins / "data.csv", dtype=str)
    table.loc[:5, "patient_race"] = "NEW"
    table.assign(insurance="NEW", marital_status="", event_type="labevent").to_csv(tmp_path / "new.csv", index=False)
    _, content = evaluated(tmp_path, tmp_path / "new.csv", best_model(twins))
    empty = {f"{name} (empty)": 40 for name in ("marital_status", *EVENT_TYPES) if name != "labevent"}
    assert content["unknown_categories"] == {"patient_race": 1, "insurance": 40} | empty
    output = capfd.readouterr().out
    assert "WARNING: insurance: 40 of 40 stays, with a value that no stay of training has" in output
    assert "WARNING: marital_status (empty): 40 of 40 stays" in output
    assert "WARNING: patient_race" not in output


@pytest.mark.slow
def test_item_history_and_another_encoder_train_and_explain(tiny_longformer, finished, tmp_path, monkeypatch):
    data, options = finished / "data.csv", ["--item-history", "--n-layers", 0]
    assert train.main(arguments(tmp_path, data, *options, encoder=tiny_longformer)) == 0
    checkpoint = train.load_checkpoint(best_model(tmp_path))
    assert checkpoint.model.architecture["input_dim"] == 5 + 32 + 1 + len(HISTORY)
    copy = shutil.copytree(tiny_longformer, tmp_path / "another name")
    (copy / "notes.json").write_text("{}")  # other files, the same weights
    assert train.main(arguments(tmp_path, data, "--evaluate", best_model(tmp_path), encoder=copy)) == 0
    monkeypatch.setattr(explain.Effort.__new__, "__defaults__", (1, 100, 40, 10**9, True))  # of `Effort`
    given = {"cache_dir": str(tmp_path / "cache"), "text_encoder": str(tiny_longformer), "n_bootstrap": 20}
    found = explain.run_explainability_analysis(best_model(tmp_path), stays=1, max_stays=3, **given)
    assert "no layers" in found.verdict.set_index("check")["sentence"]["layer attention, none"]
    assert not {"layer_attention_weights", "captum_layer_attributions"} & set(found.figures)


@pytest.mark.slow
def test_shuffled_labels_score_near_one_half(tmp_path):
    table = make_sample(400, seed=2).table.assign(patient_death_time=None, relative_time_to_final_event=None)
    patients = table["patient_id"].unique()
    drawn = np.random.default_rng(0).permutation(np.arange(len(patients)) % 4 == 0).astype(int)
    table[LABEL] = table["patient_id"].map(dict(zip(patients, drawn, strict=True)))
    table.to_csv(tmp_path / "data.csv", index=False)
    options = ["--max-epochs", 3, "--n-bootstrap", 50, "--cross-validate", 2]
    assert train.main(arguments(tmp_path, tmp_path / "data.csv", *options)) == 0
    auroc = json.loads((tmp_path / "out" / "cross_validation.json").read_text())["pooled"]["auroc"]
    assert auroc["low"] < 0.5 < auroc["high"] < auroc["low"] + 0.2


def test_import_does_no_work(tmp_path, tmp_path_factory):
    """Importing makes no file, prints nothing, reads no arguments and brings neither captum nor pyplot."""
    lines = "import sys", "sys.argv = ['x', '--nonsense']", "import train"
    code = "\n".join([*lines, "assert not {'captum', 'matplotlib.pyplot'} & {*sys.modules}"])
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path_factory.mktemp("home"))}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and not done.stdout and not done.stderr and not list(tmp_path.iterdir()), done.stderr


@pytest.mark.slow
def test_two_processes_take_the_same_steps_as_one(tmp_path):
    for name, launcher in {"one.pt": [sys.executable], "two.pt": TWO_OF}.items():
        command = [*launcher, ROOT / "tests" / "processes" / "gradients.py", name]
        subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT, cwd=tmp_path)
    one, other = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one["gradients"], other["gradients"], strict=True))
    assert torch.allclose(one["logits"], other["logits"], atol=1e-4)
