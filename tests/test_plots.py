"""The pictures of a run: they draw what was computed, survive small and odd data, move no global state."""

import warnings
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy.special import expit
from test_metrics import simulate

from clinical_lf import metrics, plots

LOSSES = {"train_loss": [0.6, 0.5, 0.4], "validation_loss": [0.62, 0.55, 0.58]}
AUROC_AND_RATE = {"validation_auroc": [0.6, 0.7, np.nan], "learning_rate": [1e-4, 3e-4, 1e-4]}
HISTORY = pd.DataFrame({"epoch": [1, 2, 3]} | LOSSES | AUROC_AND_RATE)


def predictions(n):
    labels, logits = simulate(n)
    return labels, expit(logits)


def scored(n: int) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Labels and risks of n stays, and their figures."""
    labels, risks = predictions(n)
    return labels, risks, metrics.evaluate_predictions(labels, risks, np.arange(n), n_bootstrap=20)


def attention(n, n_layers=4):
    """The picture of what `train.load_attention_weights` reads of a file."""
    layers, pooling = [np.full((1, 2, 5, 5), 0.2)] * n_layers, np.full((1, 4, 1, n), 1 / n)
    names = {"icu_stay_id": 3, "probability": 0.25, "hours_to_final_event": np.arange(n)}
    record = names | {"layer_attention_weights": layers, "pooling_weights": pooling}
    return plots.draw_saved_attention(record, "attention_epoch_1_batch_0", "made up", "hours before")


FIGURES = {
    "training": lambda n: plots.plot_training_curves(HISTORY, "made up"),
    "roc": lambda n: plots.plot_roc_and_pr(*scored(n), "made up"),
    "calibration": lambda n: plots.plot_calibration(*scored(n), "made up"),
    "attention": attention,
    "attention without layers": lambda n: attention(1300, n_layers=0),
}


@pytest.mark.parametrize("name", FIGURES)
def test_plot_has_question_caption_and_axis_labels_and_moves_no_global_state(name, tmp_path):
    before, figure = dict(matplotlib.rcParams), FIGURES[name](60)
    assert isinstance(figure, Figure)
    assert figure.get_suptitle().endswith("?") and figure.get_supxlabel().endswith("made up")
    assert any(axes.get_xlabel() for axes in figure.axes) and any(axes.get_ylabel() for axes in figure.axes)
    figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000 and dict(matplotlib.rcParams) == before
    if name in ("roc", "calibration"):
        FIGURES[name](2).savefig(tmp_path / "plot.png")  # of two stays, which both survived


def test_training_curves_mark_the_epoch_of_the_lowest_validation_loss():
    loss = plots.plot_training_curves(HISTORY).axes[0]
    assert loss.get_title() == "Loss (validation lowest in epoch 2)" and list(loss.lines[-1].get_xdata()) == [2, 2]
    for axes in plots.plot_training_curves(HISTORY[:1]).axes:
        assert [tick for tick in axes.get_xticks() if 0.5 <= tick <= 1.5] == [1]


def test_calibration_points_are_the_table_and_the_prevalence_line_lies_at_the_death_rate():
    _, smooth, points = (line.get_xydata() for line in FIGURES["calibration"](150).axes[0].lines[:3])
    table = metrics.calibration_table(*predictions(150))
    assert points == pytest.approx(table[["mean_risk", "observed_rate"]].to_numpy())
    _, risks, found = scored(150)
    assert smooth[:, 0] == pytest.approx(np.sort(risks))
    assert np.abs(smooth[:, 1] - smooth[:, 0]).mean() == pytest.approx(found["ici"]["value"])
    rate = predictions(60)[0].mean()
    lines = {line.get_label(): line for line in FIGURES["roc"](60).axes[1].lines}
    assert lines[f"chance: the death rate, {rate:.2f}"].get_ydata() == pytest.approx([rate] * 2)


def test_saved_attention_is_drawn_with_its_stay_risk_and_encoder():
    figure = attention(9)
    assert "ICU stay 3?" in figure.get_suptitle()
    caption = " ".join(figure.get_supxlabel().split())
    assert caption == "attention epoch 1 batch 0, a training stay · risk 0.25 · text encoder: made up"
    assert any(axes.get_xlabel().startswith("hours before (each event") for axes in figure.axes)


def test_a_sign_that_the_font_lacks_is_drawn_by_one_that_the_system_has(monkeypatch):
    figure = plots.new_figure("µ ≥ \N{POSITION INDICATOR}?", "", 1.0)  # in STIX, not in DejaVu
    with pytest.warns(UserWarning, match="POSITION INDICATOR"):
        plots.png_of(figure)
    monkeypatch.setattr(plots, "FALLBACKS", ["No Such Font", "STIXGeneral"])
    with warnings.catch_warnings(action="error"):
        assert plots.png_of(figure).startswith(b"\x89PNG")
