"""Score the labels of one split of a MEDS data set: `run.py SPLIT` and the options of `train.py --evaluate`."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

import train
from clinical_lf.meds import MedsTask
from clinical_lf.settings import settings_from


def labels_of_split(settings: train.Settings, split: str) -> pd.DataFrame:
    """Return the label rows of a split's subjects; the benchmark gives those of all."""
    splits = pd.read_parquet(Path(settings.data) / "metadata" / "subject_splits.parquet")
    labels = pd.concat(map(pd.read_parquet, MedsTask(settings.labels).files))
    return labels[labels["subject_id"].isin(splits["subject_id"][splits["split"] == split])]


def main(argv: Sequence[str]) -> int:
    """Run the program; return its exit code. predictions.parquet is the one Parquet file below --output-dir then."""
    split, *options = argv
    settings = settings_from(options, train.Settings, __doc__)
    folder = Path(settings.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = folder / f"labels_{split}"  # of another ending: the benchmark takes all *.parquet for predictions
    labels_of_split(settings, split).to_parquet(chosen)
    if code := train.main([*options, "--labels", str(chosen)]):
        return code
    os.replace(folder / "evaluation" / "predictions.parquet", folder / "predictions.parquet")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
