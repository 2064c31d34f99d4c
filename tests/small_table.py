"""A flat table of a few rows per stay, for tests that damage it: quick to read, to train on and to look through."""

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import torch

import train
from clinical_lf.tables import EVENT_COLUMNS, EVENT_TYPES, STAY_COLUMNS

LACTATE = "Lab: Lactate (Blood, Blood Gas)"
MARK = "Zebedee"  # stands for patient text: it must never reach the log
TINY = ("--d-model 32 --n-layers 1 --n-heads 2 --max-epochs 1 --n-bootstrap 20 --save-attention-every 0").split()


def small_table(n_patients=40, n_events=3, first_id=10_000_000):
    """(n_patients * n_events) rows, one stay of 48 h per patient, every second patient died; all values are text."""
    rng, rows = np.random.default_rng(0), []
    start = pd.Timestamp("2150-03-01 08:00:00")
    ends = ("HOME", ""), ("DIED", start + pd.Timedelta(hours=47))
    for i in range(n_patients):
        died = i % 2
        stay = dict(patient_id=first_id + i, admission_id=20_000_000 + i, icu_stay_id=30_000_000 + i)
        stay |= dict(patient_gender="FM"[i % 3 % 2], patient_age=40 + i, patient_expired_in_hospital=died)
        stay |= dict(icu_intime=start, icu_outtime=start + pd.Timedelta(hours=48), icu_length_of_stay_in_days=2.0)
        stay |= dict(patient_race="WHITE", marital_status="SINGLE", insurance="Medicare", admission_type="URGENT")
        stay |= dict(admission_location="EMERGENCY ROOM", first_icu_careunit="MICU", last_icu_careunit="MICU")
        stay |= dict(zip(("discharge_location", "patient_death_time"), ends[died]))
        for hour in range(1, n_events + 1):
            time = start + pd.Timedelta(hours=hour)
            event = dict(event_time=time, event_known_time=time + pd.Timedelta(minutes=30))
            event |= dict(relative_time_to_final_event=(47 if died else 48) * 60 - 60 * hour)
            text = f"{LACTATE} | Value: {rng.integers(1, 9)} mmol/L | Comment: {MARK}"
            rows.append(stay | event | dict(event_type=EVENT_TYPES[hour % 5], event_text=text))
    return pd.DataFrame(rows)[[*STAY_COLUMNS, *EVENT_COLUMNS]].astype(str)


def to_parquet(table, path=None, nested=False):
    """The table with its types, as Parquet: flat, or one row per stay with an array of structs; bytes if no path."""
    kinds = {"BIGINT": "Int64", "DOUBLE": "float64", "VARCHAR": "string"}
    typed = table.replace("", pd.NA).copy()
    for name, kind in {**STAY_COLUMNS, **EVENT_COLUMNS}.items():
        is_time, column = kind == "TIMESTAMP", typed[name]
        typed[name] = pd.to_datetime(column, format="ISO8601") if is_time else column.astype(kinds[kind])
    if nested:
        events = [group[list(EVENT_COLUMNS)].to_dict("records") for _, group in typed.groupby("icu_stay_id")]
        typed = typed[list(STAY_COLUMNS)].drop_duplicates("icu_stay_id").assign(events=events)
    return typed.to_parquet(path, index=False) or path


def arguments(folder, data, *more, encoder="hashing"):
    """The command line of a small run into `folder`; of options given twice the later one counts."""
    places = ["--cache-dir", folder / "cache", "--output-dir", folder / "out"]
    return [*TINY, "--no-baseline", *map(str, ["--data", data, "--text-encoder", encoder, *places, *more])]


best_model = lambda folder: folder / "out" / "checkpoints" / "best_model.pth"
# Temporary files below a folder: hidden ones but the locks.
leftovers = lambda folder: [path for path in folder.rglob(".*") if path.name != ".lock"]


def run_python(*words, folder=None, **environment):
    """Return what Python prints that is called with these words, one thread each; fail with its errors if it fails."""
    command, environment = [sys.executable, *map(str, words)], os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


@torch.no_grad()
def padded_logits(model, dataset):
    """The logits (B,) of a dataset's stays by the ordinary way: padded, and one pass."""
    batch = train.collate_stays([dataset[stay] for stay in range(len(dataset))])
    return model.logits(batch["sequences"], batch["static_features"], batch["attention_mask"]).squeeze(1)


class LinearStay(torch.nn.Module):
    """Logit = sum of the events times w + statics times v + c: the one model whose attributions are known exactly."""

    def __init__(self, input_dim, static_dim, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.w, self.v = (torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (input_dim, static_dim))

    def logits(self, sequences, static_features, attention_mask=None):
        is_event = torch.ones(sequences.shape[:2]) if attention_mask is None else attention_mask
        return ((sequences @ self.w * is_event).sum(1) + static_features @ self.v + 0.5).unsqueeze(1)

    def score_packed(self, events, static_features, layout, layer_weights=None, rows=None):
        padded = train.unpack(events if rows is None else events[rows], layout)
        return self.logits(padded, static_features, layout.attention_mask), {}
