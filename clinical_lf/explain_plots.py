"""Pictures of an explanation, from its tables; towards death is vermillion and right or up, away from it blue."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from clinical_lf import explain_report as report
from clinical_lf.explain_report import FLOOR, TYPE_WORDS, counted, of_stay, removed_in_words, short_text, signed
from clinical_lf.files import WORDS, InputError
from clinical_lf.findings import CLOCK_WINDOWS, means_by, with_statics
from clinical_lf.plots import BLUE, GREY, ORANGE, VERMILLION, bands, draw_shares, new_figure, small_bar, tidy
from clinical_lf.tables import EVENT_TYPES

Tables = dict[str, Any]
SIGNED = LinearSegmentedColormap.from_list("signed", [BLUE, "#ffffff", VERMILLION])
BAND = "#eaf0ea"  # what lies within the floor
TO_END = "hours before the final event or observation limit"
LOGIT = f"logit (right: towards death; band: below {FLOOR})"
METHOD_STYLES = {"attribution": ("#9ecae1", "-", 4), "if_absent": ("black", "--", 1.2)}  # colour, line, its width
METHOD_STYLES |= {"relevance": (BLUE, "-.", 1.4), "attention": (ORANGE, "-.", 1.4), "random": ("0.5", ":", 1.4)}
ABOVE = {"loc": "outside upper center", "ncols": 5, "fontsize": 7.5, "frameon": False}  # a legend above all panels


def plain(text: object, width: int = 46, shorten: Callable[[Any, int], str] = short_text) -> str:
    """Return a text shortened, and without what Matplotlib would read as mathematics."""
    return shorten(text, width).replace("$", r"\$")


def page(name: str, caption: str, height: float, **facts: Any) -> Figure:
    """Return a page-wide figure with its question, caption and the line that none of them goes without."""
    return new_figure(WORDS["questions"][name].format(**facts), f"{caption} · {report.DISCLAIMER}".lstrip(" ·"), height)


def dots(axes: Axes, means: pd.DataFrame, color: Any, shift: float = 0, **style: Any) -> None:
    """Draw means with their intervals as bars at 0, 1, ... and a shift; `color` one or one per row."""
    at = np.arange(len(means)) + shift
    axes.hlines(at, means["low"], means["high"], color=color, linewidth=1.1)
    axes.scatter(means["mean"], at, color=color, s=16, zorder=3, **style)


def name_rows(axes: Axes, left: Any, right: Any = (), n_ticks: int = 6, floor: float = FLOOR, **words: Any) -> None:
    """Name the rows of a panel, first on top, at the left and, small, at the right; a band around 0 is the floor."""
    tidy(axes, ticks=(n_ticks,), **words)
    axes.axvspan(-floor, floor, color=BAND, linewidth=0, zorder=0)
    axes.axvline(0, color="black", linewidth=0.7)
    axes.set_yticks(range(len(left)), left, fontsize=7.5)
    axes.set(ylim=(len(left) - 0.4, -0.6), axisbelow=True)
    axes.grid(axis="x", color="#eeeeee")
    for at, text in enumerate(right):
        axes.text(1.01, at, text, fontsize=7, va="center", transform=axes.get_yaxis_transform())


def draw_grid(figure: Any, values: pd.DataFrame, names: Any, top: float, label: str, **options: Any) -> Axes:
    """Draw signed values (rows, columns) with the names of the rows and the bar of their colours; grey: no value."""
    axes = figure.subplots()
    image = axes.imshow(values, SIGNED, Normalize(-top, top), aspect="auto", interpolation="nearest", **options)
    axes.set_facecolor("#e3e3e3")
    axes.set_yticks(range(len(names)), names)
    small_bar(figure, image, axes, label, {})
    return axes


def draw_stems(figure: Figure, title: str, rows: list[tuple], events: pd.DataFrame) -> Figure:
    """Draw a panel per (name, values (L,), is it a push or a weight) over hours to the end; name the three largest."""
    hours, texts = (events[name].to_numpy() for name in ("hours_to_end", "event_text"))
    (body,) = bands(figure, [1])
    body.suptitle(title, fontsize=9)
    grid = body.subplots(len(rows), 2, sharex="col", width_ratios=[3, 2.6], squeeze=False)
    for (name, values, is_push), (axes, beside) in zip(rows, grid):
        values, level = (values, 0) if is_push else (values * len(hours), 1)
        sizes = np.nan_to_num(np.abs(values))
        top = np.argsort(-sizes, kind="stable")[:3]
        amounts = [signed(value) if is_push else f"{value:.1f} ×" for value in values[top]]
        said = [f"{amount} at {hours[event]:.1f} h: {plain(texts[event], 44)}" for event, amount in zip(top, amounts)]
        if is_push and sizes.max() < FLOOR:
            said = [f"no event stands out: none of {np.isfinite(values).sum()} reaches {FLOOR}"]
        elif not is_push and sizes.max() < 1.5:
            said = [f"no event stands out: {np.nanmin(values):.2f} to {sizes.max():.2f} of an even share"]
        axes.axhspan(-FLOOR * is_push, FLOOR * is_push, color=BAND, linewidth=0)
        axes.vlines(hours, level, values, color="#b5b5b5", linewidth=0.9)
        dark = np.where(values[top] >= 0, VERMILLION, BLUE) if is_push else "black"
        axes.vlines(hours[top], level, values[top], linewidth=1.4, color=dark)
        axes.axhline(level, color="black", linewidth=0.5)
        tidy(axes, "", name, ticks=(8, 3))
        beside.axis("off")
        beside.text(0, 0.5, "\n".join(said), fontsize=6.5, va="center", linespacing=2.2, transform=beside.transAxes)
    axes.set_xlabel(TO_END, fontsize=9)
    axes.margins(x=0.01)
    axes.invert_xaxis()
    return figure


def draw_layer_attention_weights(tables: Tables, caption: str) -> Figure:
    """Draw the layers' maps of `attention`, (1, heads, bins, bins) each: rows look, columns are looked at."""
    attention, stay = tables["attention"], tables["attention"]["icu_stay_id"]
    maps = np.concatenate(attention["layer_attention_weights"]).astype(float)
    hours = of_stay(tables["events"], stay)["hours_to_end"].tolist()[-attention["n_mapped"] :]  # of long stays the end
    n_layers, n_heads, n_bins, _ = maps.shape
    maps = np.concatenate([maps, maps.mean(1, keepdims=True)], axis=1)
    caption = f"{report.verdict_on_layers(tables['verdict'])} {caption}"
    figure: Any = page("layer_attention_weights", caption, 0.85 * n_layers + 1.4, stay=stay, n=len(hours))
    grid = figure.subplots(n_layers, n_heads + 1, sharex=True, sharey=True, squeeze=False)
    draw_shares(figure, grid.ravel(), len(hours) * maps.reshape(-1, n_bins, n_bins), extent=(0, n_bins, n_bins, 0))
    ticks, places = [f"{hours[at]:.0f}" for at in (0, len(hours) // 2, -1)], [0, n_bins / 2, n_bins]
    for (layer, head), axes in np.ndenumerate(grid):
        axes.set(xticks=places, xticklabels=ticks, yticks=places, yticklabels=ticks)
        axes.tick_params(labelsize=6)
        for label, side in zip(axes.get_xticklabels(), ("left", "center", "right")):
            label.set_horizontalalignment(side)
        axes.set_ylabel("" if head else f"layer {layer + 1}", fontsize=8)
        axes.set_title("" if layer else f"head {head + 1}" if head < n_heads else "mean", fontsize=8)
    grid[-1, n_heads // 2].set_xlabel(f"event looked at: {TO_END}; event that looks: downwards, same scale", fontsize=8)
    return figure


def draw_sequence_importance(tables: Tables, caption: str) -> Figure:
    """Draw the pooling weights of `attention`, (1, heads, 1, L)."""
    attention, own = tables["attention"], of_stay(tables["events"], tables["attention"]["icu_stay_id"])
    rows = [(f"head {head}", weights, False) for head, weights in enumerate(attention["pooling_weights"][0, :, 0], 1)]
    title = f"Stay {attention['icu_stay_id']}: weight of every event, times an even share; its three heaviest are dark"
    return draw_stems(page("sequence_importance", caption, len(rows) + 1.2), title, rows, own)


def draw_sequence_importance_combined(tables: Tables, caption: str) -> Figure:
    """Draw attention and pushes of one stay over time."""
    icu_stay_id = tables["attention"]["icu_stay_id"]
    own = of_stay(tables["events"], icu_stay_id)
    own = own.assign(relevance=own["relevance"] / max(own["relevance"].abs().mean(), 1e-12))
    better = "rollout" if own["in_history"].ne("").any() else "relevance"  # of the two, by tests/selfcheck.py
    names = {"attention": "pooling\nattention", better: better, "attribution": "push", "if_absent": "if\nabsent"}
    rows = [(name, own[key].to_numpy(float), key not in ("attention", "rollout")) for key, name in names.items()]
    title = f"Stay {icu_stay_id}: push and absence in logit, all else in times its mean{removed_in_words(own)}"
    return draw_stems(page("sequence_importance_combined", caption, 5.0), title, rows, own)


def draw_head_specialization(tables: Tables, caption: str) -> Figure:
    """Draw `heads`, one row per layer, head and property: correlation, effect (pale where it is below FLOOR)."""
    grid = tables["heads"].set_index(["property", "layer", "head"]).unstack(["layer", "head"], sort=False)
    values, matters, n_logits = grid["correlation"], grid["effect"] > FLOOR, grid["n_switched_off"].max(axis=None)
    found = f" {matters.any().sum()} of {len(values.columns)} heads matter"
    figure = page("head_specialization", caption, 0.28 * len(grid) + 1.9, found=found)
    labels = [f"event is: {TYPE_WORDS[name]}" if name in TYPE_WORDS else name for name in grid.index]
    axes = draw_grid(figure, values, labels, 1, "rank correlation within the stay", alpha=np.where(matters, 1, 0.35))
    for at, (layer, head) in enumerate(values):
        if head == 1:
            axes.text(at - 0.4, -0.75, layer, fontsize=8)
            axes.axvline(at - 0.5, color="black", linewidth=1)
    tidy(axes, f"head; pale: without it {n_logits} logits move by {FLOOR} or less on average", "")
    axes.set_xticks(range(len(values.columns)), [head for _, head in values], fontsize=7.5)
    return figure


def draw_feature_importance(tables: Tables, caption: str) -> Figure:
    """Draw event types per event, organ systems and statics per stay; for items see `item_importance`."""
    systems = tables["systems"].rename(columns={"push": "attribution"})
    types = tables["events"].replace({"event_type": TYPE_WORDS})
    blocks = (
        ("Event types, per event", "events / patients", types, "event_type"),
        ("Organ systems, sum of a stay's events", "stays / patients", systems, "system"),
        ("Patient and admission, per stay", "stays / patients", tables["statics"], "feature"),
    )
    n_rows = [table[group].nunique() for *_, table, group in blocks]
    figure = page("feature_importance", caption, 0.2 * sum(n_rows) + 3.4)
    panels = figure.subplots(3, 1, height_ratios=[n + 1 for n in n_rows])
    for axes, (title, counted_in, table, group) in zip(panels, blocks):
        size = table["attribution"].abs().groupby(table[group]).mean().sort_values(ascending=False)
        mean = means_by(table, group, "attribution").loc[size.index]
        axes.barh(range(len(size)), size, color="#dddddd")
        dots(axes, mean, np.select([mean["mean"] > 0, mean["mean"] < 0], [VERMILLION, BLUE], GREY))
        names = [plain(name, 60, report.cut) for name in size.index]
        name_rows(axes, names, [f"{n:,} / {k:,}" for n, k in zip(mean["n"], mean["n_patients"])])
        axes.set_title(title, fontsize=8.5, loc="left")
        axes.set_title(counted_in, fontsize=7.5, loc="right")
    panels[-1].set_xlabel(f"dot: mean push, grey: mean size, {LOGIT}", fontsize=8)
    return figure


def draw_item_importance(tables: Tables, caption: str) -> Figure:
    """Draw the items and statics that matter most: a dot per event or stay, coloured by its value's place."""
    items, events = tables["items"], with_statics(tables).sample(frac=1, random_state=0)
    events["place"] = events.groupby("item")["value"].rank(pct=True)
    shown = events[events["item"].isin(items["item"])].groupby("item").head(400)
    at = pd.Index(items["item"]).get_indexer(shown["item"])
    height = at + np.random.default_rng(0).uniform(-0.32, 0.32, len(at))
    figure = page("item_importance", caption, 0.26 * len(items) + 1.7)
    style: dict[str, Any] = {"vmin": 0, "vmax": 1, "linewidths": 0, "plotnonfinite": True}
    axes, style["cmap"] = figure.subplots(), colormaps["viridis"].with_extremes(bad="#bbbbbb")
    image = axes.scatter(shown["attribution"], height, 6, shown["place"], **style)
    names = ["(!) " * row.tells_outcome + plain(row.item, 40, report.cut) for row in items.itertuples()]
    rho = [f"{signed(row.rho)} ({row.n_values})" * (row.kind in ("typical", "average")) for row in items.itertuples()]
    name_rows(axes, names, rho, xlabel=f"push, {LOGIT}\na dot an event or stay; grey: no value; (!): tells the outcome")
    axes.set_title("rho of number and what it does (n), where it is a finding", fontsize=7.5, loc="right")
    small_bar(figure, image, axes, "value among those of its item", {0: "lowest", 0.5: "middle", 1: "highest"})
    return figure


def draw_query_vector_analysis(tables: Tables, caption: str) -> Figure:
    """Draw `query_similarity`, one row per pooling head and event type: similarity, low, high, n_events."""
    table = tables["query_similarity"].rename(columns={"similarity": "mean"})
    kinds = [kind for kind in (*EVENT_TYPES, "unknown") if kind in set(table["event_type"])]
    figure, heads = page("query_vector_analysis", caption, 0.25 * len(kinds) + 1.9), table["head"].unique()
    panels = figure.subplots(1, len(heads), sharex=True, sharey=True, squeeze=False)[0]
    for axes, head in zip(panels, heads):
        rows = table[table["head"] == head].set_index("event_type").reindex(kinds)
        dots(axes, rows, BLUE)
        names = [f"{TYPE_WORDS.get(kind, kind)} (n = {n:,.0f})" for kind, n in rows["n_events"].items()]
        name_rows(axes, names, n_ticks=3, floor=0, title=f"head {head}")
    label = "query·key score minus the stay's mean (right: looked for), 95 % interval over patients"
    panels[len(panels) // 2].set_xlabel(label, fontsize=8, x=0 if len(panels) % 2 == 0 else 0.5)
    return figure


def draw_heatmap(figure: Any, events: pd.DataFrame) -> None:
    """Draw the push of a stay's items over the hours, the items that push most on top; grey: no event."""
    sizes = events["attribution"].abs().groupby(events["item"]).sum().nlargest(12)
    sizes, hours = sizes[sizes >= FLOOR], events["hours_to_end"]
    if sizes.empty:
        return
    edges = np.linspace(min(0, hours.min()), max(hours.max(), 1e-9), 25)
    sums = events.pivot_table("attribution", "item", np.digitize(hours, edges[1:-1]), "sum")
    grid = sums.reindex(sizes.index, columns=range(24))
    names, extent = [plain(item, 40) for item in sizes.index], (edges[0], edges[-1], len(sizes) - 0.5, -0.5)
    axes = draw_grid(figure, grid, names, max(grid.abs().max(axis=None), FLOOR), "push, logit", extent=extent)
    axes.invert_xaxis()
    tidy(axes, TO_END, "", "Push of the stay's items over time; grey: none then")


def draw_captum_attributions(tables: Tables, caption: str, icu_stay_id: int | None = None) -> Figure:
    """Draw one stay, by default that of the highest risk: pushes and risk over time, the strongest events."""
    stays = tables["stays"].set_index("icu_stay_id")
    row = stays.loc[icu_stay_id or stays["probability"].idxmax()]
    events, statics, arriving = (of_stay(tables[name], row.name) for name in ("events", "statics", "trajectory"))
    push, hours = events["attribution"], events["hours_to_end"]
    facts = {"stay": row.name, "risk": report.percent(row["probability"]), "outcome": report.outcome(row["label"])}
    line, middle, over_time = bands(page("captum_attributions", caption, 8.4, **facts), [1.35, 2.1, 1.55])
    said = f"All {counted(len(events), 'event')}: sum {signed(push.sum())}; patient and admission "
    said += f"{signed(statics['attribution'].sum())}; starting from logit {signed(row['baseline_logit'])} gives "
    gap = f" (gap {signed(row['gap_error'])}{'' if row['complete'] else ': not complete'})"
    said += signed(row["logit"]) + gap * bool(abs(row["gap_error"]) >= 0.005)
    axes = line.subplots()
    axes.axhspan(-FLOOR, FLOOR, color=BAND, linewidth=0)
    axes.vlines(hours, 0, push, color=np.where(push >= 0, VERMILLION, BLUE), linewidth=1.1)
    axes.axhline(0, color="black", linewidth=0.5)
    tidy(axes, TO_END, "logit\n(up: towards death)", said)
    if len(arriving):
        risk, end = axes.twinx(), events["hours_since_admission"].max() + hours.min()
        risk.plot(end - arriving["hours_since_admission"], 100 * arriving["probability"], color=GREY, linewidth=1.2)
        risk.set_ylim(-4, 100)
        early = "; before the\nend extrapolated" if arriving["extrapolated"].any() else ""
        risk.set_ylabel(f"grey: risk as events\narrive, %{early}", fontsize=8, color=GREY)
        risk.tick_params(labelsize=8)
    axes.invert_xaxis()
    middle.suptitle("The strongest events for and against, with the hours left to the end", fontsize=9)
    named, texts = report.strongest(events, 7), []
    for event in named.itertuples():
        history, mark = f"  {event.in_history}" if event.in_history else "", "(!) " if event.tells_outcome else ""
        texts.append(f"{mark}{plain(event.event_text, 56)}{history}  {event.hours_to_end:.1f} h")
    axes, values = middle.subplots(), named["attribution"]
    if named.empty:
        axes.text(0.5, 0.5, f"nothing here moves the logit by {FLOOR}", ha="center", transform=axes.transAxes)
    bars = axes.barh(range(len(values)), values, color=np.where(values >= 0, VERMILLION, BLUE), height=0.7)
    axes.bar_label(bars, [f" {signed(value)} " for value in values], fontsize=6.5)
    axes.margins(x=0.27)
    name_rows(axes, texts, xlabel=LOGIT)
    draw_heatmap(over_time, events)
    return line.figure


def draw_captum_layer_attributions(tables: Tables, caption: str) -> Figure:
    """Draw `layers` (layer, icu_stay_id, event, attribution, gap_error): the stay of the highest risk."""
    layers, risks = tables["layers"], tables["stays"].set_index("icu_stay_id")["probability"]
    stay = risks[layers["icu_stay_id"].unique()].idxmax()
    caption = f"{report.verdict_on_layers(tables['verdict'])} Held fixed: what passes them by. {caption}"
    own = of_stay(tables["layers"], stay)
    wide = own.pivot(index="layer", columns="event", values="attribution").loc[own["layer"].unique()]
    names, top = [name.replace("_", " ") for name in wide.index], max(np.quantile(wide.abs(), 0.99), 1e-12)
    figure = page("captum_layer_attributions", caption, 3.2)
    axes = draw_grid(figure, wide, names, top, "logit (up: towards death)")
    hours = of_stay(tables["events"], stay)["hours_to_end"].to_numpy()
    title = f"Stay {stay}, {counted(len(hours), 'event')}; the sums miss at most {own['gap_error'].abs().max():.2g}"
    tidy(axes, f"{TO_END}; each event equally wide", "", title)
    ticks = np.unique(np.linspace(0, len(hours) - 1, 9).round().astype(int))
    axes.set_xticks(ticks, [f"{hours[tick]:.0f}" for tick in ticks])
    return figure


def draw_captum_ablation_attributions(tables: Tables, caption: str) -> Figure:
    """Draw `groups`: attribution and ablation per stay, kind and group."""
    groups = tables["groups"]
    order, sizes = [*EVENT_TYPES, *CLOCK_WINDOWS], groups.groupby("kind", sort=False)["group"].nunique()
    (body,) = bands(page("captum_ablation_attributions", caption, 0.23 * sizes.sum() + 2.2), [1])
    panels = body.subplots(len(sizes), 1, height_ratios=sizes, squeeze=False)[:, 0]
    for axes, (kind, rows) in zip(panels, groups.groupby("kind", sort=False)):
        names = sorted(rows["group"].unique(), key=lambda name: order.index(name) if name in order else 0)
        pushes, falls = (means_by(rows, "group", value).reindex(names) for value in ("attribution", "ablation"))
        dots(axes, pushes, BLUE, -0.14, label="push, summed")
        dots(axes, falls, VERMILLION, 0.14, marker="s", label="if absent (patient and admission: if average)")
        labels = [TYPE_WORDS.get(name, plain(name, 40)) for name in names]
        name_rows(axes, labels, [counted(n, "stay") for n in pushes["n"]])
        axes.set_title(f"by {kind}" if kind != "static" else "patient and admission", fontsize=8.5, loc="left")
    panels[-1].set_xlabel(f"mean per stay that has the group, {LOGIT}", fontsize=8)
    body.legend(*panels[0].get_legend_handles_labels(), **ABOVE)
    return body.figure


def draw_deletion_insertion(tables: Tables, caption: str) -> Figure:
    """Draw `curves` of all checked stays, mean by direction, order and fraction: a panel for each direction."""
    curves, events = tables["curves"], tables["events"]
    n_stays = counted(curves["icu_stay_id"].nunique(), "stay")
    removed = removed_in_words(events[events["icu_stay_id"].isin(curves["icu_stay_id"])])
    caption = f"{caption} · measured on {n_stays}{removed}{', the others count as 0' if removed else ''}"
    (body,) = bands(page("deletion_insertion", caption, 3.4), [1])
    means = curves.groupby(["direction", "order", "fraction"])["change"].mean()
    for axes, direction, moved in zip(body.subplots(1, 2), ("deletion", "insertion"), ("taken out", "given back")):
        for order, (color, line, width) in METHOD_STYLES.items():
            curve, label = means[direction, order], report.METHOD_WORDS.get(order, "random order")
            axes.plot(100 * curve.index, curve, color=color, linestyle=line, linewidth=width, label=label)
        axes.axhline(0, color="black", linewidth=0.5)
        title = f"Change of the logit as events are {moved}"
        tidy(axes, f"% of the events {moved}, highest first", "change of the logit", title, ticks=(5, 5))
    body.legend(*axes.get_legend_handles_labels(), **ABOVE)
    return body.figure


FIGURES: dict[str, Callable[[Tables, str], Figure]] = {name: globals()[f"draw_{name}"] for name in WORDS["questions"]}


def draw_figure(name: str, tables: Tables, caption: str = "") -> Figure:
    """Draw one picture (`FIGURES` names them) from the tables of `run_explainability_analysis`."""
    if name not in FIGURES:
        raise InputError(f"no picture is called {name}; there are {', '.join(FIGURES)}.")
    return FIGURES[name](tables, caption)


def draw_figures(tables: Tables, caption: str = "") -> dict[str, Figure]:
    """Draw all pictures, by file name without .png; of checks, heads and layers only where there are any."""
    n_maps = len(tables["attention"]["layer_attention_weights"])
    found = {"deletion_insertion": len(tables["curves"]), "head_specialization": len(tables["heads"])}
    found |= {"layer_attention_weights": n_maps, "captum_layer_attributions": n_maps * len(tables["layers"])}
    return {name: draw_figure(name, tables, caption) for name in FIGURES if found.get(name, True)}
