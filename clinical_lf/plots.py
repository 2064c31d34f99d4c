"""What all pictures are drawn with, and those of a run: Figures made without pyplot, so no global state changes."""

import io
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import font_manager
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from scipy.special import logit

from clinical_lf.files import write_whole
from clinical_lf.metrics import METRIC_WORDS, calibration_table, figure_text, smooth_rates

BLUE, ORANGE, VERMILLION, GREY = "#0072B2", "#E69F00", "#D55E00", "#767676"  # of Okabe and Ito, for all eyes
FALLBACKS = ["DejaVu Sans", "Noto Sans CJK SC", "Microsoft YaHei", "PingFang SC"]  # fonts that have µ and ≥, Chinese
REFERENCE = {"color": GREY, "linestyle": "--", "linewidth": 1}  # a line to compare with


def png_of(figure: Figure, dpi: int = 150, compress_level: int = 6) -> bytes:
    """Return a figure as the bytes of a PNG file, its texts with fonts to fall back on."""
    buffer, known = io.BytesIO(), set(font_manager.get_font_names())
    for text in figure.findobj(Text):
        text.set_fontfamily([*text.get_fontfamily(), *(name for name in FALLBACKS if name in known)])
    figure.savefig(buffer, format="png", dpi=dpi, pil_kwargs={"compress_level": compress_level})
    return buffer.getvalue()


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG, hardly compressed: a twelfth larger, a tenth faster."""
    write_whole(path, lambda name: name.write_bytes(png_of(figure, compress_level=1)))


def new_figure(title: str, caption: str, height: float, width: float = 7.2) -> Figure:
    """Return a page-wide figure: the question on top, a caption line below; constrained layout keeps both clear."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    figure.suptitle(textwrap.fill(title, 88), fontsize=11)
    figure.supxlabel(textwrap.fill(caption, int(16 * width)), fontsize=7.5, color="#444444")
    return figure


def tidy(axes: Any, xlabel: str = "", ylabel: str = "", title: str = "", ticks: Any = (), **legend: Any) -> None:
    """Label the axes, take off half the frame; `ticks`: at most so many, plain, along x and y; `legend`: its place."""
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(fontsize=8, frameon=False, **legend)
    for axis, most in zip((axes.xaxis, axes.yaxis), ticks):
        axis.set_major_locator(MaxNLocator(most))
        axes.ticklabel_format(axis=axis.axis_name, useOffset=False, style="plain")


def bands(figure: Any, heights: list[float]) -> list[Any]:
    """Return subfigures one below the other."""
    return list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])


def small_bar(figure: Any, image: Any, axes: Any, label: str, names: dict[float, str], **options: Any) -> None:
    """Draw the bar of a picture's colours with names at their places, or ticks of its own where there are none."""
    bar = figure.colorbar(image, ax=axes, pad=0.01, **{"aspect": 40, **options})
    if names:
        bar.set_ticks(list(names), labels=list(names.values()))
        bar.minorticks_off()
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def plot_training_curves(history: pd.DataFrame, caption: str = "") -> Figure:
    """Draw history, one row per epoch: epoch, train_loss, validation_loss, validation_auroc, learning_rate."""
    figure = new_figure("Does training still help on patients it does not see?", caption, height=3.2)
    curves = history.set_index("epoch")
    best, limits = curves["validation_loss"].idxmin(), (curves.index[0] - 0.5, curves.index[-1] + 0.5)
    loss, auroc, rate = panels = figure.subplots(1, 3, subplot_kw={"xlim": limits})
    style = {"marker": "o", "markersize": 3 if len(history) < 30 else 0, "linewidth": 1.4}
    loss.plot(curves["train_loss"], color=BLUE, label="training, all terms", **style)
    for axes, name in ((loss, "validation_loss"), (auroc, "validation_auroc")):
        axes.plot(curves[name], color=VERMILLION, linestyle="--", label="validation, BCE", **style)
        axes.axvline(best, color="black", linewidth=0.8, linestyle=":")
    rate.plot(curves["learning_rate"], color=GREY, **style)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    rate.yaxis.get_offset_text().set_fontsize(8)
    rate.set_ylim(0, 1.08 * curves["learning_rate"].max())
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.22)}  # inside, it would lie on some curve
    tidy(loss, "epoch", "loss", f"Loss (validation lowest in epoch {best})", **below)
    tidy(auroc, "epoch", "AUROC", "Validation AUROC")
    tidy(rate, "epoch", "learning rate", "Learning rate")
    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(5))
    return figure


def plot_roc_and_pr(died: np.ndarray, risks: np.ndarray, figures: dict[str, Any], caption: str = "") -> Figure:
    """Draw ROC and precision-recall curves of held-out stays; figures as `evaluate_predictions` returns them."""
    from sklearn.metrics import precision_recall_curve, roc_curve

    figure = new_figure("How well does the predicted risk tell deaths from survivors?", caption, height=4.25)
    square = {"xlim": (-0.02, 1.02), "ylim": (-0.02, 1.02), "box_aspect": 1}
    roc, pr = figure.subplots(1, 2, subplot_kw=square)
    if 0 < died.sum() < len(died):
        false_alarms, found, _ = roc_curve(died, risks)
        precision, recall, _ = precision_recall_curve(died, risks)
        precision[-1] = precision[-2]  # scikit-learn ends at 1, also where the highest risk survived
        roc.plot(false_alarms, found, color=BLUE, label="model")
        pr.step(recall, precision, where="post", color=BLUE, label="model")
    else:
        roc.text(0.5, 0.6, "only one outcome: no curve", ha="center", fontsize=8)
    roc.plot([0, 1], [0, 1], label="no better than chance", **REFERENCE)
    pr.axhline(died.mean(), label=f"chance: the death rate, {died.mean():.2f}", **REFERENCE)
    auroc, auprc = (f"{METRIC_WORDS[name]} {figure_text(figures[name])}" for name in ("auroc", "auprc"))
    tidy(roc, "1 - specificity (survivors called deaths)", "sensitivity (deaths found)", auroc, loc="lower right")
    tidy(pr, "recall (deaths found)", "precision (alarms that were deaths)", auprc, loc="best")
    return figure


def plot_calibration(died: np.ndarray, risks: np.ndarray, figures: dict[str, Any], caption: str = "") -> Figure:
    """Draw observed death rate against predicted risk in bins of equal size, and the histogram of risks below."""
    table = calibration_table(died, risks)
    figure = new_figure("Do as many die as the predicted risk says?", caption, height=5.6, width=5.6)
    curve, histogram = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    top = min(1.0, np.ceil(10 * max(table["high"].max(), risks.max()) + 0.2) / 10)
    curve.plot([0, top], [0, top], label="perfect agreement", **REFERENCE)
    if not figures["too_few_to_read"]:
        order, logits = np.argsort(risks), logit(risks.clip(1e-7, 1 - 1e-7))
        smooth = smooth_rates(np.ones((1, len(died))), died, logits)[0]
        curve.plot(risks[order], smooth[order], color=ORANGE, linewidth=1.4, label="smooth (logistic spline)")
    rate, sizes = table["observed_rate"], " to ".join(map(str, sorted({table["n"].min(), table["n"].max()})))
    bars = {"yerr": np.clip([rate - table["low"], table["high"] - rate], 0, None), "capsize": 2, "linewidth": 1}
    bars["label"] = f"{len(table)} bins of {sizes} stays, 95 % interval (Wilson, by stay)"
    curve.errorbar(table["mean_risk"], rate, fmt="o", color=BLUE, markersize=4, **bars)
    curve.set(xlim=(-0.01 * top, top * 1.01), ylim=(-0.01 * top, top * 1.01))
    names = ("calibration_intercept", "calibration_slope", "ici", "brier")
    words = "\n".join(f"{METRIC_WORDS[name]} {figure_text(figures[name])}" for name in names)
    # Below the axes: inside, the legend would lie on the points of some model or other.
    tidy(curve, "", "observed death rate", words, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=2)
    style = {"bins": np.linspace(0, top, 31), "color": [BLUE, VERMILLION], "label": ["survived", "died"]}
    histogram.hist([risks[died == 0], risks[died == 1]], stacked=True, **style)
    histogram.margins(y=0.5)  # room for the legend
    histogram.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    tidy(histogram, "predicted risk of death", "stays", loc="best")
    return figure


def draw_saved_attention(record: dict[str, Any], name: str, text_encoder: str, hours_label: str) -> Figure:
    """Draw what `train.load_attention_weights` read of a file of this name: its layers, if any, over the pooling."""
    layer_maps = [weights[0].mean(0) for weights in record["layer_attention_weights"]]  # (bins, bins), rows look
    weights = record["pooling_weights"][0, :, 0].astype(float)  # (heads, L)
    hours, n_events = record["hours_to_final_event"].astype(float), weights.shape[1]  # (L,)
    whose = f"{name.replace('_', ' ')}, a training stay · risk {record['probability']:.2f}"
    title, height = f"Where does the model look in ICU stay {record['icu_stay_id']}?", 4.6 if layer_maps else 2.5
    figure = new_figure(title, f"{whose} · text encoder: {text_encoder}", height)
    *upper, lower = bands(figure, [1.2, 1] if layer_maps else [1])
    for part in upper:
        panels = part.subplots(1, len(layer_maps), sharey=True, squeeze=False)[0]
        draw_shares(part, panels, n_events * np.asarray(layer_maps, dtype=float), extent=(0, 100, 100, 0))
        for layer, axes in enumerate(panels, start=1):
            tidy(axes, "event looked at, %", "event that looks, % of stay" if layer == 1 else "", f"layer {layer}")
    per_cell = -(-n_events // 600)  # more columns than pixels would drop events unseen
    cells = n_events * np.maximum.reduceat(weights, np.arange(0, n_events, per_cell), axis=1)
    axes = lower.subplots()
    draw_shares(lower, [axes], cells[None])
    shown = np.unique(np.linspace(0, cells.shape[1] - 1, 9).round().astype(int))
    axes.set_xticks(shown, [f"{hours[cell * per_cell]:.{int(np.ptp(hours) < 20)}f}" for cell in shown])
    axes.set_yticks(range(len(cells)), [f"head {head}" for head in range(1, len(cells) + 1)])
    width = "each event equally wide" if per_cell == 1 else f"each column the heaviest of {per_cell} events"
    tidy(axes, f"{hours_label} ({width})", "", "Pooling: attention to each event")
    return figure


def draw_shares(figure: SubFigure, panels: Any, shares: np.ndarray, **options: Any) -> None:
    """Draw multiples of even attention (panels, rows, columns) on one scale: 1 is white, less purple, more orange."""
    # A few pairs take most of the weight: a cap at the 99.5th percentile keeps the rest visible.
    top = max(float(np.quantile(shares, 0.995)), 2.0)
    options |= {"cmap": "PuOr_r", "norm": LogNorm(1 / top, top, clip=True)}
    for axes, panel_shares in zip(panels, shares):
        image = axes.imshow(panel_shares, aspect="auto", interpolation="nearest", **options)
    names = {1 / top: f"1/{top:.2g}", 1: "1", top: f"{top:.2g}"}
    small_bar(figure, image, panels, "attention, 1 where it is even", names, aspect=20, extend="both")
