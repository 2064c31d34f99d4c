"""The notebook runs as it stands, and what an analysis returns is at home in one."""

from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure
from small_table import best_model, run_python, small_table

import explain_clinicalLF as explain

NOTEBOOK = Path(__file__).resolve().parent / "notebook.ipynb"


def test_explanation_lies_beside_its_checkpoint_and_is_at_home_in_a_notebook(explained, sample_run):
    assert explained.report == sample_run / "out" / "explainability" / "report.html" and explained.report.exists()
    tested = pd.read_csv(sample_run / "out" / "predictions.csv")["icu_stay_id"]
    assert set(explained.stays["icu_stay_id"]) <= set(tested)
    assert explained.events is explained["events"] and len(repr(explained)) < 500 and "events (" in repr(explained)
    with pytest.raises(AttributeError, match="no nonsense; its tables are .*stays"):
        explained.nonsense  # noqa: B018
    assert "<iframe" in explained._repr_html_()
    figure = explained.figures["feature_importance"]
    assert isinstance(figure, Figure) and figure._repr_png_().startswith(b"\x89PNG")


def test_data_frame_of_other_patients_is_explained_and_named_as_other_data(sample_run, log, monkeypatch):
    monkeypatch.setattr(explain.Effort.__new__, "__defaults__", (1, 100, 40, 10**9, True))  # of `Effort`
    few = {"stays": 1, "max_stays": 3, "n_bootstrap": 20, "cache_dir": str(sample_run / "cache")}
    frame = small_table(12, first_id=90_000_000)
    other = explain.run_explainability_analysis(best_model(sample_run), frame, None, **few)
    assert len(other.stays) == 3 and "these are other data" in log.text and "<table" in other._repr_html_()
    asked = [30_000_007, 30_000_002]
    of_run = explain.run_explainability_analysis(sample_run / "out", frame, None, stay_ids=asked, **few)
    assert {*of_run.stays["icu_stay_id"]} == {*asked} and of_run.curves.empty
    alone = explain.run_explainability_analysis(best_model(sample_run), frame[:3], None, **few)  # one stay
    assert alone.verdict["check"].tolist() == ["patients, other", "likeness", "baseline, of few", "few stays"]
    assert alone.faithfulness["check"].tolist() == ["completeness"] and not alone["items"]["is_finding"].any()


@pytest.mark.slow
def test_quick_look_takes_no_more_than_was_asked_for_and_says_what_it_is(sample_run):
    given = {"stays": 1, "quick": True, "cache_dir": str(sample_run / "cache")}
    found = explain.run_explainability_analysis(best_model(sample_run), "", None, **given)
    assert found.stays["n_events"].sum() <= explain.QUICK.events and (found.stays["why_shown"] != "").sum() == 1
    assert found.curves["icu_stay_id"].nunique() == explain.QUICK.checked and found.layers.empty
    assert "captum_layer_attributions" not in found.figures
    assert "fewer and shorter stays than a full run's, of some 1,200 events" in found.verdict["sentence"].iloc[-1]


@pytest.mark.slow
def test_notebook_runs_from_top_to_bottom(tmp_path):
    pytest.importorskip("nbclient")
    code = "import nbformat, nbclient, sys; book, place = nbformat.read(sys.argv[1], 4), {'path': sys.argv[2]};"
    code += "run = nbclient.NotebookClient(book, timeout=600, kernel_name='python3', resources={'metadata': place});"
    run_python("-c", f"{code} run.execute()", NOTEBOOK, tmp_path, PYTHONPATH=str(NOTEBOOK.parent.parent))
