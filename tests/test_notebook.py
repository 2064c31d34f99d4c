"""The notebook runs as it stands, and what an analysis returns is at home in one."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure
from small_table import arguments, small_table

import explain_clinicalLF as explain
import train

NOTEBOOK = Path(__file__).parent / "notebook.ipynb"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook")
    small_table().to_csv(folder / "data.csv", index=False)
    assert train.main(arguments(folder, folder / "data.csv")) == 0
    return folder


OPTIONS = {"stays": 1, "max_stays": 3, "checked_stays": 1, "n_bootstrap": 20, "layer_stays": 0}


@pytest.fixture(scope="module")
def found(trained):
    """The checkpoint explained on its own data, results beside it: neither is named."""
    checkpoint = trained / "out" / "checkpoints" / "best_model.pth"
    return explain.run_explainability_analysis(checkpoint, cache_dir=str(trained / "cache"), **OPTIONS)


def test_explanation_lies_beside_its_checkpoint(found, trained):
    assert found.report == trained / "out" / "explainability" / "report.html" and found.report.exists()
    tested = pd.read_csv(trained / "out" / "predictions.csv")["icu_stay_id"]
    assert set(found.stays["icu_stay_id"]) <= set(tested)


def test_tables_are_attributes_and_the_text_is_short(found):
    assert found.events is found["events"] and len(repr(found)) < 500 and "events (" in repr(found)
    with pytest.raises(AttributeError, match="no nonsense; its tables are stays"):
        found.nonsense  # noqa: B018


def test_report_and_figures_show_themselves(found):
    assert "<iframe" in found._repr_html_()
    figure = found.figures["feature_importance"]
    assert isinstance(figure, Figure) and figure._repr_png_().startswith(b"\x89PNG")


def test_data_frame_of_other_patients_is_explained_and_named_as_other_data(trained, caplog, monkeypatch):
    checkpoint = trained / "out" / "checkpoints" / "best_model.pth"
    frame = small_table(12, first_id=90_000_000)
    monkeypatch.setattr(train.logger, "propagate", True)
    other = explain.run_explainability_analysis(checkpoint, frame, None, cache_dir=str(trained / "cache"), **OPTIONS)
    assert len(other.stays) == 3 and "these are other data" in caplog.text and "<table" in other._repr_html_()


@pytest.mark.slow
def test_notebook_runs_from_top_to_bottom(tmp_path):
    pytest.importorskip("nbclient")
    code = (
        "import nbformat, nbclient, sys; book = nbformat.read(sys.argv[1], 4);"
        "resources = {'metadata': {'path': sys.argv[2]}};"
        "nbclient.NotebookClient(book, timeout=600, kernel_name='python3', resources=resources).execute()"
    )
    command = [sys.executable, "-c", code, str(NOTEBOOK), str(tmp_path)]
    root = str(Path(train.__file__).parent)
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root})
    assert done.returncode == 0, done.stderr[-3000:]
