"""The notebook runs as it stands, and what an analysis returns is at home in one."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure
from small_table import best_model, small_table

import explain_clinicalLF as explain
import train

NOTEBOOK = Path(__file__).parent / "notebook.ipynb"


def test_explanation_lies_beside_its_checkpoint(explained, sample_run):
    assert explained.report == sample_run / "out" / "explainability" / "report.html" and explained.report.exists()
    tested = pd.read_csv(sample_run / "out" / "predictions.csv")["icu_stay_id"]
    assert set(explained.stays["icu_stay_id"]) <= set(tested)


def test_tables_are_attributes_and_the_text_is_short(explained):
    assert explained.events is explained["events"] and len(repr(explained)) < 500 and "events (" in repr(explained)
    with pytest.raises(AttributeError, match="no nonsense; its tables are stays"):
        explained.nonsense  # noqa: B018


def test_report_and_figures_show_themselves(explained):
    assert "<iframe" in explained._repr_html_()
    figure = explained.figures["feature_importance"]
    assert isinstance(figure, Figure) and figure._repr_png_().startswith(b"\x89PNG")


def test_data_frame_of_other_patients_is_explained_and_named_as_other_data(sample_run, caplog, monkeypatch):
    few = {"stays": 1, "max_stays": 3, "checked_stays": 1, "n_bootstrap": 20, "layer_stays": 0}
    frame = small_table(12, first_id=90_000_000)
    monkeypatch.setattr(train.logger, "propagate", True)
    cache_dir = str(sample_run / "cache")
    other = explain.run_explainability_analysis(best_model(sample_run), frame, None, cache_dir=cache_dir, **few)
    assert len(other.stays) == 3 and "these are other data" in caplog.text and "<table" in other._repr_html_()


@pytest.mark.parametrize("given", [pd.DataFrame({"a": [1]}), None, {}])
def test_what_is_no_path_given_as_checkpoint_is_refused_in_a_sentence(given):
    with pytest.raises(train.InputError, match=f"path of a best_model.pth, not a {type(given).__name__}"):
        explain.run_explainability_analysis(given)


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
