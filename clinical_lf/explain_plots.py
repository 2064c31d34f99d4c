"""Pictures of an explanation, from its tables; towards death is vermillion and right or up, away from it blue."""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import cm, ticker
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from clinical_lf import explain_report as report
from clinical_lf import findings
from clinical_lf.explain_report import FLOOR, TYPE_WORDS, counted, replaced_in_words, short_text, signed
from clinical_lf.files import WORDS, InputError
from clinical_lf.findings import CLOCK_WINDOWS, clock_window, column_means, means_by, rank_agreement, stay_shares
from clinical_lf.plots import BLUE, GREY, ORANGE, VERMILLION, bands, new_figure, small_bar, tidy
from clinical_lf.tables import EVENT_TYPES

Tables = dict[str, Any]
SIGNED = LinearSegmentedColormap.from_list("signed", [BLUE, "#ffffff", VERMILLION])
SHARES = LinearSegmentedColormap.from_list("shares", ["#003f38", "#ffffff", "#5b3000"])  # below, above an even share
TO_END = "hours before the final event or observation limit"
LOGIT = "logit (right: towards death)"
OVER_TIME = (  # measures of an event: column, word, is it a push, colour and marker
    ("attention", "pooling attention", False, BLUE, "o"),
    ("rollout", "attention rollout", False, ORANGE, "s"),
    ("attribution", "push", True, "#009E73", "D"),
    ("if_unremarkable", "if unremarkable", True, VERMILLION, "^"),
)
METHOD_STYLES = {"attribution": ("#9ecae1", "-", 4), "if_unremarkable": ("black", "--", 1.2)}  # colour, line, its width
METHOD_STYLES |= {"attention": (ORANGE, "-.", 1.4), "random": ("0.5", ":", 1.4)}
ABOVE = {"loc": "outside upper center", "ncols": 4, "fontsize": 7.5, "frameon": False}  # a legend above all panels


def plain(text: object, width: int = 46, shorten: Callable[[Any, int], str] = short_text) -> str:
    """Return a text shortened, and without what Matplotlib would read as mathematics."""
    return shorten(text, width).replace("$", r"\$")


def page(name: str, caption: str, height: float, **facts: Any) -> Figure:
    """Return a page-wide figure with its question, caption and the line that none of them goes without."""
    caption = " · ".join(filter(None, (caption, report.DISCLAIMER)))
    return new_figure(WORDS["questions"][name].format(**facts), caption, height)


def dots(axes: Axes, means: pd.DataFrame, color: Any, shift: float = 0, upright: bool = False, **style: Any) -> None:
    """Draw means with their intervals as bars at 0, 1, ... and a shift; `color` one or one per row."""
    at = np.arange(len(means)) + shift
    (axes.vlines if upright else axes.hlines)(at, means["low"], means["high"], color=color, linewidth=1.1)
    x, y = (at, means["mean"]) if upright else (means["mean"], at)
    axes.scatter(x, y, color=color, s=16, zorder=3, **style)


def name_rows(axes: Axes, left: Any, right: Any = (), n_ticks: int = 6, size: float = 7.5, **words: Any) -> None:
    """Name the rows of a panel, first on top, at the left and, small, at the right; a line stands at 0."""
    tidy(axes, ticks=(n_ticks,), **words)
    axes.axvline(0, color="black", linewidth=0.7)
    axes.set_yticks(range(len(left)), left, fontsize=size)
    axes.set(ylim=(len(left) - 0.4, -0.6), axisbelow=True)
    axes.grid(axis="x", color="#eeeeee")
    if len(right):
        other = axes.secondary_yaxis("right")
        other.set_yticks(range(len(left)), right, fontsize=7)
        other.tick_params(length=0)
        other.spines["right"].set_visible(False)


def draw_stems(figure: Any, title: str, rows: list[tuple], hours: np.ndarray, texts: Sequence[str]) -> None:
    """Draw a panel per (name, values (L,), is it a push or a weight) over hours to the end; name the three largest."""
    figure.suptitle(title, fontsize=9)
    grid = figure.subplots(len(rows), 2, sharex="col", width_ratios=[3, 2.6], squeeze=False)
    for (name, values, is_push), (axes, beside) in zip(rows, grid):
        values, level = (values, 0) if is_push else (values * len(hours), 1)
        sizes = np.nan_to_num(np.abs(values))
        top = np.argsort(-sizes, kind="stable")[:3]
        amounts = [signed(values[event]) if is_push else f"{values[event]:.1f} ×" for event in top]
        said = [f"{amount} at {hours[event]:.1f} h: {plain(texts[event], 44)}" for event, amount in zip(top, amounts)]
        if is_push and sizes.max() < FLOOR:
            said = [f"no event mattered: none moves the logit by {FLOOR}"]
        elif not is_push and sizes.max() < 1.5:
            said = [f"no event stands out: {np.nanmin(values):.2f} to {sizes.max():.2f} of an even share"]
        axes.vlines(hours, level, values, color="#b5b5b5", linewidth=0.9)
        dark = np.where(values[top] >= 0, VERMILLION, BLUE) if is_push else "black"
        axes.vlines(hours[top], level, values[top], linewidth=1.4, color=dark)
        axes.axhline(level, color="black", linewidth=0.5)
        axes.margins(x=0.01)
        tidy(axes, TO_END if axes is grid[-1, 0] else "", "")
        axes.set_ylabel(name, fontsize=7.5)
        axes.yaxis.set_major_locator(ticker.MaxNLocator(3))
        beside.axis("off")
        for line, text in enumerate(said):
            beside.text(0, 0.85 - 0.34 * line, text, fontsize=6.5, va="center", transform=beside.transAxes)
    grid[-1, 0].invert_xaxis()


def draw_layer_attention_weights(tables: Tables, caption: str) -> Figure:
    """Draw `attention`: layer_maps (layers, heads, bins, bins), rows look, columns are looked at; hours (L,)."""
    attention, stay = tables["attention"], tables["attention"]["icu_stay_id"]
    maps = np.asarray(attention["layer_maps"], dtype=float)
    hours = np.asarray(attention["hours"], dtype=float)[-attention["n_mapped"] :]  # of a long stay, its end
    n_layers, n_heads, n_bins, _ = maps.shape
    maps = np.concatenate([maps, maps.mean(1, keepdims=True)], axis=1)
    doublings = np.log2(np.maximum(maps * len(hours), 2.0**-9))  # 0: an even share, 1/L
    reach = 4 if np.nanquantile(np.abs(doublings), 0.9) > 2 else 2
    caption = f"{report.verdict_on_layers(tables['verdict'])} {caption}"
    figure = page("layer_attention_weights", caption, 0.85 * n_layers + 1.4, stay=stay, n=len(hours))
    grid = figure.subplots(n_layers, n_heads + 1, sharex=True, sharey=True, squeeze=False)
    ticks, places = [f"{hours[at]:.0f}" for at in (0, len(hours) // 2, -1)], [0, n_bins / 2, n_bins]
    for (layer, head), axes in np.ndenumerate(grid):
        image = axes.imshow(doublings[layer, head], SHARES, vmin=-reach, vmax=reach, extent=(0, n_bins, n_bins, 0))
        axes.set_aspect("auto")
        axes.set_xticks(places, ticks, fontsize=6)
        axes.set_yticks(places, ticks, fontsize=6)
        for label, side in zip(axes.get_xticklabels(), ("left", "center", "right")):
            label.set_horizontalalignment(side)
        axes.set_ylabel("" if head else f"layer {layer + 1}", fontsize=8)
        if layer == 0:
            axes.set_title(f"head {head + 1}" if head < n_heads else "mean", fontsize=8)
    grid[-1, n_heads // 2].set_xlabel(f"event looked at: {TO_END}; event that looks: downwards, same scale", fontsize=8)
    names = {step: f"1/{2**-step:.0f}" if step < 0 else f"{2**step:.0f}" for step in np.linspace(-reach, reach, 5)}
    small_bar(figure, image, grid, "attention, times an even share", names)
    return figure


def draw_sequence_importance(tables: Tables, caption: str) -> Figure:
    """Draw `attention` of one stay (pooling (heads, L), hours, texts), and where in all stays a head looks."""
    attention, events = tables["attention"], tables["events"]
    pooling, hours = (np.asarray(attention[name], dtype=float) for name in ("pooling", "hours"))
    upper, lower = bands(page("sequence_importance", caption, len(pooling) + 3.4), [len(pooling), 2.0])
    title = f"Stay {attention['icu_stay_id']}: weight of every event, times an even share; its three heaviest are dark"
    rows = [(f"head {head}", weights, False) for head, weights in enumerate(pooling, 1)]
    draw_stems(upper, title, rows, hours, attention["texts"])
    length = events["hours_since_admission"] + events["hours_to_end"]
    place = events["hours_since_admission"] / length.clip(lower=1e-9)
    tenth = pd.cut(place, np.linspace(0, 1, 11), include_lowest=True, labels=np.arange(1, 11))
    panels = lower.subplots(1, len(pooling), sharex=True, sharey=True, squeeze=False)[0]
    for head, axes in enumerate(panels, 1):
        more = stay_shares(events, tenth, f"attention_head_{head}") - stay_shares(events, tenth)
        dots(axes, column_means(100 * more), "black", shift=1, upright=True)
        axes.axhline(0, color="black", linewidth=0.5)
        axes.set_xticks([1, 4, 7, 10])
        tidy(axes, title=f"head {head}")
    panels[0].set_ylabel("points more than\nan even share, %", fontsize=8)
    lower.supxlabel("tenth of the stay's time (1: after admission, 10: before the end)", fontsize=8)
    n_stays = counted(events["icu_stay_id"].nunique(), "stay")
    lower.suptitle(f"Mean of {n_stays}, 95 % interval over patients", fontsize=9)
    return lower.figure


def draw_sequence_importance_combined(tables: Tables, caption: str) -> Figure:
    """Draw attention and pushes of one stay over time, and their shares in the windows before the end of all."""
    events, icu_stay_id = tables["events"], tables["attention"]["icu_stay_id"]
    upper, lower = bands(page("sequence_importance_combined", caption, 7.2), [1.25, 1])
    own = events.query(f"icu_stay_id == {icu_stay_id}").sort_values("event")
    title = f"Stay {icu_stay_id}: attention in times an even share, pushes in logit{replaced_in_words(own)}"
    rows = [(name.replace(" ", "\n"), own[column].to_numpy(float), is_push) for column, name, is_push, *_ in OVER_TIME]
    draw_stems(upper, title, rows, own["hours_to_end"].to_numpy(), own["event_text"].to_numpy())
    bins, axes = clock_window(events["hours_to_end"]), lower.subplots()
    used = [name for name in reversed(CLOCK_WINDOWS) if name in set(bins)]  # the end of the stay at the right, as above
    even = column_means(stay_shares(events, bins)[used])
    axes.bar(range(len(used)), 100 * even["mean"], color="#e3e3e3", label="share of the events", zorder=0)
    for at, (column, name, _, color, marker) in enumerate(OVER_TIME):
        shares = column_means(100 * stay_shares(events, bins, column)[used])
        dots(axes, shares, color, 0.1 * (at - 1.5), True, marker=marker, label=name)
    reach = events.groupby("icu_stay_id")["hours_to_end"].max()
    names = [f"{name}\n{counted((reach >= CLOCK_WINDOWS[name]).sum(), 'stay')}" for name in used]
    axes.set_xticks(range(len(used)), names)
    axes.set_ylim(0, 1.35 * axes.get_ylim()[1])
    axes.legend(fontsize=7, frameon=False, ncols=5, loc="upper center")
    title = f"Mean of {counted(len(reach), 'stay')} and its 95 % interval; sizes of pushes{replaced_in_words(events)}"
    tidy(axes, f"{TO_END}; stays that reach back so far", "share, %", title)
    lower.supxlabel(textwrap.fill(" ".join(tables["windows"]["sentence"][:2]), 115), fontsize=7.5)
    return lower.figure


def draw_head_specialization(tables: Tables, caption: str) -> Figure:
    """Draw `heads`, one row per layer, head and property: correlation, effect (pale where it is below FLOOR)."""
    heads = tables["heads"]
    if heads.empty:
        figure = page("head_specialization", caption, 1.5, found="")
        figure.text(0.5, 0.5, "No stay is long enough to measure what heads follow.", ha="center")
        return figure
    properties = heads["property"].unique()
    names = heads[["layer", "head"]].drop_duplicates().to_records(index=False).tolist()
    grid = heads.pivot(index="property", columns=["layer", "head"]).loc[properties]
    matters = grid["effect"][names].to_numpy(float) > FLOOR
    found = f" {matters.any(0).sum()} of {len(names)} heads matter"
    figure = page("head_specialization", caption, 0.28 * len(properties) + 1.9, found=found)
    axes, values = figure.subplots(), grid["correlation"][names].to_numpy(float)
    image = axes.imshow(values, SIGNED, Normalize(-1, 1), aspect="auto", alpha=np.where(matters, 1.0, 0.35))
    for at, (layer, head) in enumerate(names):
        if head == 1:
            axes.text(at - 0.4, -0.75, layer, fontsize=8)
            axes.axvline(at - 0.5, color="black", linewidth=1)
    tidy(axes, f"head; pale: switched off, it moves the logit by less than {FLOOR}", "")
    axes.set_xticks(range(len(names)), [head for _, head in names], fontsize=7.5)
    labels = [f"event is: {TYPE_WORDS[name]}" if name in TYPE_WORDS else name for name in properties]
    axes.set_yticks(range(len(properties)), labels, fontsize=7.5)
    small_bar(figure, image, axes, "rank correlation within the stay", {})
    return figure


def draw_feature_importance(tables: Tables, caption: str) -> Figure:
    """Draw event types and items per event, organ systems and statics per stay, each pair on an axis of its own."""
    events, systems = tables["events"], tables["systems"].rename(columns={"push": "attribution"})
    items, least = findings.important_items(events, 12)
    types, of_items = events.replace({"event_type": TYPE_WORDS}), events[events["item"].isin(items)]
    blocks = (
        ("Event types, per event", "events / patients", types, "event_type"),
        (f"Items, per event (of {least} patients or more)", "events / patients", of_items, "item"),
        ("Organ systems, sum of a stay's events", "stays / patients", systems, "system"),
        ("Patient and admission, per stay", "stays / patients", tables["statics"], "feature"),
    )
    n_rows = [table[group].nunique() for *_, table, group in blocks]
    pairs = (n_rows[:2], n_rows[2:])
    halves = bands(page("feature_importance", caption, 0.2 * sum(n_rows) + 3.6), [sum(pair) + 4 for pair in pairs])
    grids = [half.subplots(2, 2, sharex="col", height_ratios=pair) for half, pair in zip(halves, pairs)]
    for (title, counted_in, table, group), (left, right) in zip(blocks, np.concatenate(grids)):
        size = means_by(table.assign(size=table["attribution"].abs()), group, "size")
        size = size.sort_values("mean", ascending=False)
        mean = means_by(table, group, "attribution").loc[size.index]
        dots(left, mean, np.where(mean["mean"] >= 0, VERMILLION, BLUE))
        dots(right, size, "black")
        name_rows(left, [plain(name, 44, report.cut) for name in size.index], n_ticks=3)
        name_rows(right, [""] * len(size), [f"{n:,} / {k:,}" for n, k in zip(size["n"], size["n_patients"])], n_ticks=3)
        left.set_title(title, fontsize=8.5, loc="left")
        right.set_title(counted_in, fontsize=7.5, loc="right")
    for _, (left, right) in grids:
        right.set_xlim(left=0)
        left.set_xlabel(f"mean push, {LOGIT}", fontsize=8)
        right.set_xlabel("mean size, logit", fontsize=8)
    return halves[0].figure


def draw_item_importance(tables: Tables, caption: str) -> Figure:
    """Draw the items that matter most as a beeswarm: a dot per event, coloured by its value's place in the item."""
    events, items = tables["events"], tables["items"]
    figure = page("item_importance", caption, 0.26 * len(items) + 1.7)
    axes, norm, draw = figure.subplots(), Normalize(0, 1), np.random.default_rng(0)
    names, rho = [], []
    for at, item in enumerate(items.itertuples()):
        part = events[events["item"] == item.item]
        part = part.assign(place=part["value"].rank(pct=True)).sample(min(len(part), 400), random_state=0)
        height, known = at + draw.uniform(-0.32, 0.32, len(part)), part["place"].notna().to_numpy()
        axes.scatter(part["attribution"][~known], height[~known], s=5, color="#bbbbbb", linewidths=0)
        style = {"c": part["place"][known], "s": 6, "cmap": "viridis", "norm": norm, "linewidths": 0}
        axes.scatter(part["attribution"][known], height[known], **style)
        names.append(("(!) " if item.tells_outcome else "") + plain(item.item, 40, report.cut))
        rho.append("" if np.isnan(item.rho) else f"{item.rho:+.2f} ({item.n_values})".replace("-", "−"))
    name_rows(axes, names, rho, xlabel=f"push, {LOGIT}; a dot an event; grey: no value; (!): tells the outcome")
    axes.set_title("rho of value and push (n)", fontsize=7.5, loc="right")
    ends = {0: "lowest", 0.5: "middle", 1: "highest"}
    small_bar(figure, cm.ScalarMappable(norm, "viridis"), axes, "value among those of its item", ends)
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
        name_rows(axes, names, n_ticks=3, size=8, title=f"head {head}")
    label = "query·key score minus the stay's mean (right: looked for), 95 % interval over patients"
    panels[len(panels) // 2].set_xlabel(label, fontsize=8, x=0 if len(panels) % 2 == 0 else 0.5)
    return figure


def signed_bars(axes: Axes, values: np.ndarray, names: list[str]) -> None:
    """Draw horizontal bars, first on top, with their values; colours by sign."""
    bars = axes.barh(range(len(values)), values, color=np.where(values >= 0, VERMILLION, BLUE), height=0.7)
    axes.bar_label(bars, [f" {signed(value)} " for value in values], fontsize=6.5)
    axes.margins(x=0.27)
    name_rows(axes, names, n_ticks=5, xlabel=LOGIT)


def draw_captum_attributions(tables: Tables, caption: str, icu_stay_id: int | None = None) -> Figure:
    """Draw one stay, by default that of the highest risk: pushes and risk over time, the strongest events, statics."""
    stays, everyone = tables["stays"].set_index("icu_stay_id"), tables["events"]
    icu_stay_id = icu_stay_id or stays["probability"].idxmax()
    row = stays.loc[icu_stay_id]
    own = [tables[name].query(f"icu_stay_id == {icu_stay_id}") for name in ("events", "statics", "trajectory")]
    events, statics, arriving = own
    push, hours = events["attribution"], events["hours_to_end"]
    facts = {"stay": icu_stay_id, "risk": report.percent(row["probability"]), "outcome": report.outcome(row["label"])}
    line, middle, below = bands(page("captum_attributions", caption, 8.0, **facts), [1, 2.2, 1.3])
    said = f"All {counted(len(events), 'event')}: sum {signed(push.sum())}; patient and admission "
    said += f"{signed(statics['attribution'].sum())}; starting from logit {signed(row['baseline_logit'])} gives "
    said += signed(row["logit"]) + ("" if row["complete"] else f" (gap {signed(row['gap_error'])}: not complete)")
    axes = line.subplots()
    axes.vlines(hours, 0, push, color=np.where(push >= 0, VERMILLION, BLUE), linewidth=1.1)
    axes.axhline(0, color="black", linewidth=0.5)
    tidy(axes, TO_END, "logit\n(up: towards death)", said)
    if len(arriving):
        risk, end = axes.twinx(), events["hours_since_admission"].max() + hours.min()
        risk.plot(end - arriving["hours_since_admission"], 100 * arriving["probability"], color=GREY, linewidth=1.2)
        risk.set_ylim(0, 100)
        risk.set_ylabel("grey: risk as\nevents arrive, %", fontsize=8, color=GREY)
        risk.tick_params(labelsize=8)
    axes.invert_xaxis()
    middle.suptitle("The strongest events for and against, with the hours left to the end", fontsize=9)
    towards = events.nlargest(7, "attribution").query("attribution >= 0.0005")
    away = events.nsmallest(7, "attribution").query("attribution <= -0.0005")
    named, texts = pd.concat([towards, away[::-1]]), []
    for event in named.itertuples():
        history, mark = f"  {event.in_history}" if event.in_history else "", "(!) " if event.tells_outcome else ""
        texts.append(f"{mark}{plain(event.event_text, 56)}{history}  {event.hours_to_end:.1f} h")
    signed_bars(middle.subplots(), named["attribution"].to_numpy(), texts)
    left, right = below.subplots(1, 2, width_ratios=[1.5, 1])
    top = statics.sort_values("attribution", key=abs, ascending=False).head(8)
    texts = [plain(f"{name}: {report.plain_number(value)}", 38) for name, value in zip(top["feature"], top["value"])]
    signed_bars(left, top["attribution"].to_numpy(), texts)
    left.set_title("Patient and admission", fontsize=9)
    sizes = everyone.set_index("patient_id").filter(like="attribution_").abs()  # of each event's parts
    table = column_means(sizes.loc[:, sizes.any()]).sort_values("mean", ascending=False)
    dots(right, table, "black")
    names = [part.removeprefix("attribution_") for part in table.index]
    title = f"What counts? {counted(everyone['icu_stay_id'].nunique(), 'stay')}"
    name_rows(right, names, n_ticks=3, size=8, xlabel="mean size per event, logit", title=title)
    right.set_xlim(left=0)
    return line.figure


def draw_captum_layer_attributions(tables: Tables, caption: str) -> Figure:
    """Draw `layers` (layer, icu_stay_id, event, attribution, gap_error): one stay over its events, all stays below."""
    layers, risks = tables["layers"], tables["stays"].set_index("icu_stay_id")["probability"]
    names = layers["layer"].unique()
    labels = [name.replace("_", " ") for name in names]
    stay = risks[layers["icu_stay_id"].unique()].idxmax()
    caption = f"{report.verdict_on_layers(tables['verdict'])} Patient and admission: held fixed. {caption}"
    upper, lower = bands(page("captum_layer_attributions", caption, 5.4), [1.2, 1])
    wide = layers.query(f"icu_stay_id == {stay}").pivot(index="layer", columns="event", values="attribution").loc[names]
    hours = tables["events"].query(f"icu_stay_id == {stay}").sort_values("event")["hours_to_end"].to_numpy()
    axes, top = upper.subplots(), max(np.quantile(wide.abs(), 0.99), 1e-12)
    image = axes.imshow(wide, SIGNED, Normalize(-top, top), aspect="auto", interpolation="nearest")
    small_bar(upper, image, axes, "logit (up: towards death)", {})
    axes.set_yticks(range(len(names)), labels)
    title = f"Stay {stay}: Integrated Gradients at each layer, {counted(len(hours), 'event')}"
    tidy(axes, f"{TO_END}; each event equally wide", "", title)
    ticks = np.unique(np.linspace(0, len(hours) - 1, 9).round().astype(int))
    axes.set_xticks(ticks, [f"{hours[tick]:.0f}" for tick in ticks])
    both = layers.merge(layers[layers["layer"] == names[0]], on=["icu_stay_id", "event"], suffixes=("", "_first"))
    found = rank_agreement(both, ["layer", "icu_stay_id", "patient_id"], "attribution", "attribution_first")
    axes = lower.subplots()
    heights = pd.Index(names).get_indexer(found["layer"]) + np.random.default_rng(0).uniform(-0.2, 0.2, len(found))
    axes.scatter(found["correlation"], heights, s=5, color="#b5b5b5")
    dots(axes, means_by(found, "layer", "correlation").reindex(names), "black")
    gap, n_stays = layers["gap_error"].abs().max(), counted(layers["icu_stay_id"].nunique(), "stay")
    label = f"rank correlation of a stay's events, {n_stays}; black: mean, 95 % interval"
    title = f"Agreement with {labels[0]}; the sums miss at most {gap:.2g} logit"
    name_rows(axes, labels, xlabel=label, title=title)
    axes.set_xlim(min(0.0, found["correlation"].min()) - 0.03, 1.03)
    return lower.figure


def draw_captum_ablation_attributions(tables: Tables, caption: str) -> Figure:
    """Draw `groups` (attribution, ablation per stay, kind and group) and `events` (attribution, if_unremarkable)."""
    groups, events = tables["groups"], tables["events"]
    order, sizes = [*EVENT_TYPES, *CLOCK_WINDOWS], groups.groupby("kind", sort=False)["group"].nunique()
    height = 0.23 * sizes.sum()
    upper, lower = bands(page("captum_ablation_attributions", caption, height + 5.2), [height + 1.6, 2.6])
    panels = upper.subplots(len(sizes), 1, height_ratios=sizes, squeeze=False)[:, 0]
    for axes, (kind, rows) in zip(panels, groups.groupby("kind", sort=False)):
        names = sorted(rows["group"].unique(), key=lambda name: order.index(name) if name in order else 0)
        pushes, falls = (means_by(rows, "group", value).reindex(names) for value in ("attribution", "ablation"))
        dots(axes, pushes, BLUE, -0.14, label="push, summed")
        dots(axes, falls, VERMILLION, 0.14, marker="s", label="if unremarkable")
        labels, stays = [TYPE_WORDS.get(name, plain(name, 40)) for name in names], rows.groupby("group")["icu_stay_id"]
        name_rows(axes, labels, [counted(n, "stay") for n in stays.nunique()[names]])
        axes.set_title(f"by {kind}" if kind != "static" else "patient and admission", fontsize=8.5, loc="left")
    panels[-1].set_xlabel(f"mean per stay that has the group, {LOGIT}; each panel has its own scale", fontsize=8)
    upper.legend(*panels[0].get_legend_handles_labels(), **ABOVE)
    axes, known = lower.subplots(), events.dropna(subset=["if_unremarkable"])
    shown = known["attribution"], known["if_unremarkable"]
    axes.hexbin(*shown, gridsize=60, bins="log", vmin=0.1, cmap="Greys", mincnt=1)  # one event shows
    axes.axline((0, 0), slope=1, color=VERMILLION, linewidth=0.7, linestyle="--")
    agreement = rank_agreement(known, ["icu_stay_id", "patient_id"], "attribution", "if_unremarkable")["correlation"]
    median = f"median rank correlation within a stay {agreement.median():.2f}"
    title = f"{len(known):,} of {counted(len(events), 'event')} (dashed: equal); {median}"
    tidy(axes, "push, logit", "if unremarkable, logit", title, ticks=(6, 5))
    return lower.figure


def draw_deletion_insertion(tables: Tables, caption: str) -> Figure:
    """Draw `curves` of all checked stays, mean by direction, order and fraction: a panel for each direction."""
    curves, events = tables["curves"], tables["events"]
    n_stays = counted(curves["icu_stay_id"].nunique(), "stay")
    replaced = replaced_in_words(events[events["icu_stay_id"].isin(curves["icu_stay_id"])])
    caption = f"{caption} · measured on {n_stays}{replaced}{', the others count as 0' if replaced else ''}"
    (body,) = bands(page("deletion_insertion", caption, 3.4), [1])
    means = curves.groupby(["direction", "order", "fraction"])["change"].mean()
    titles = {"deletion": "Events made unremarkable", "insertion": "Events given to a stay that says nothing"}
    for axes, (direction, title) in zip(body.subplots(1, 2), titles.items()):
        for order, (color, line, width) in METHOD_STYLES.items():
            curve, label = means[direction, order], report.METHOD_WORDS.get(order, "random order")
            axes.plot(100 * curve.index, curve, color=color, linestyle=line, linewidth=width, label=label)
        axes.axhline(0, color="black", linewidth=0.5)
        tidy(axes, "% of the events, highest first", "change of the logit", title, ticks=(5, 5))
    body.legend(*axes.get_legend_handles_labels(), **ABOVE)
    return body.figure


OF_ATTENTION = (draw_layer_attention_weights, draw_sequence_importance, draw_sequence_importance_combined)
OF_PARTS = (draw_head_specialization, draw_feature_importance, draw_item_importance, draw_query_vector_analysis)
OF_PUSHES = (draw_captum_attributions, draw_captum_layer_attributions, draw_captum_ablation_attributions)
DRAWN: tuple[Callable[[Tables, str], Figure], ...] = (*OF_ATTENTION, *OF_PARTS, *OF_PUSHES, draw_deletion_insertion)
FIGURES = {draw.__name__.removeprefix("draw_"): draw for draw in DRAWN}  # words.yaml has the question of each


def draw_figure(name: str, tables: Tables, caption: str = "") -> Figure:
    """Draw one picture (`FIGURES` names them) from the tables of `run_explainability_analysis`."""
    if name not in FIGURES:
        raise InputError(f"no picture is called {name}; there are {', '.join(FIGURES)}.")
    return FIGURES[name](tables, caption)


def draw_figures(tables: Tables, caption: str = "") -> dict[str, Figure]:
    """Draw all pictures, by file name without .png; of checks only after checks, of layers only where there are any."""
    left_out = set() if len(tables["curves"]) else {"deletion_insertion"}
    if not len(tables["attention"]["layer_maps"]):
        left_out |= {"layer_attention_weights", "captum_layer_attributions"}
    return {name: draw_figure(name, tables, caption) for name in FIGURES if name not in left_out}
