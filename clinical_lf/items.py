"""What an event's text says: its item, its number and unit, and what its item was until then in the stay."""

import hashlib
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from clinical_lf.tables import StayTable

# 4, 4.1, .5, 25,000 or 1.1e-05; atomic, so that nothing less is read of it
DIGITS = r"(?>(?:(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)"
NUMBER = re.compile(rf"(?<![\w.]){DIGITS}")  # also before a unit, but not the 2 of PaO2
# Number, or a range whose unit may stand twice (2 mg - 4 mg), what it means (6 (Obeys Commands)), and unit; no titer
# (1:40) and no pair (120/80).
MEASUREMENT = re.compile(
    r"(\| (?:Value|Rate|Dose|Amount): (?:(?:[<>≤≥=~]+|(?i:(?:less|greater|more) than)) ?)?)"
    rf"([-−+]?{DIGITS})(?: ?(?P<unit>[^\W\d_][^\s\d–-]*|%?) ?(?:[-–]|to) ?([-−+]?{DIGITS})(?= ?(?P=unit)))?"
    r"(?! ?[:/] ?\d)(?=[\s%°]|[^\W\d_]|$)(?: \([^|]*\))?([^|]*)"
)

# What the model reads of an event's item; see `item_history`.
STATISTICS = ("value", "minimum", "maximum", "mean", "first", "previous")
HISTORY = (*STATISTICS, "has_value", "log_count", "is_latest")


class TextReading(NamedTuple):
    """What one text says; of an amount and another number the other one counts."""

    item: str  # `Lab: Lactate (Blood, Blood Gas)`: what stands before the first bar
    value: float  # NaN where the text has none
    kind: str  # what has numbers of its own: the item in one unit
    without_value: str  # the text with # for its measurements, for a model that has them from the item's history


def read_text(text: str) -> TextReading:
    """Return what an event's text says: of a range its middle, NaN for numbers beyond what a float holds."""
    item = " ".join(text.split(" | ", 1)[0].split())
    found = min(MEASUREMENT.finditer(text), key=lambda match: match[1].startswith("| Amount"), default=None)
    if found is None:
        return TextReading(item, math.nan, item, text)
    ends = [float(end.replace(",", "").replace("−", "-")) for end in found.group(2, 4) if end]
    value = math.nan if math.inf in map(abs, ends) else sum(ends) / len(ends)
    return TextReading(item, value, f"{item} {found[5].strip()}".strip(), MEASUREMENT.sub(r"\1#\5", text))


def mask_numbers(text: str) -> str:
    """Return the text with # for each number behind its item: texts of an item that differ by those become one."""
    item, bar, parts = text.partition(" | ")
    return item + bar + NUMBER.sub("#", parts)


def item_hash(text: str) -> str:
    """Return eight bytes, in hex, that tell whether two texts are of one item, in one unit, and cannot be read back."""
    return hashlib.md5(read_text(text).kind.encode()).hexdigest()[:16]


def items_and_values(table: StayTable) -> tuple[pd.Categorical, np.ndarray]:
    """Return item with its unit, and number, of each event (n_events,); every distinct text is read once."""
    used, text_of_event = np.unique(table.text, return_inverse=True)
    readings = [read_text(text) for text in table.texts[used]]
    items = pd.Categorical([reading.kind for reading in readings])
    return items[text_of_event], np.array([reading.value for reading in readings], float)[text_of_event]


def item_history(table: StayTable) -> pd.DataFrame:
    """Return (n_events) rows: what each event's item was in its stay until then, in the units of its text.

    STATISTICS are NaN without a number; the first value's previous is itself, and so is that of values of its time:
    of one item at one time none is previous of the other. `is_latest`: none of the item follows.
    """
    items, values = items_and_values(table)
    key = pd.Series(table.stay_of_event.astype(np.int64) * max(len(items.categories), 1) + items.codes)
    value = pd.Series(values)
    of_item = value.groupby(key, sort=False)
    history = pd.DataFrame({"item": items, "value": value, "minimum": of_item.cummin(), "maximum": of_item.cummax()})
    mean = of_item.cumsum() / value.notna().groupby(key, sort=False).cumsum()
    history["mean"] = mean.clip(history["minimum"], history["maximum"])  # rounding must not part what is tied
    history["first"] = of_item.transform("first").where(value.notna())
    at_time = pd.DataFrame({"key": key, "minute": table.minutes_since_intime})
    last_before = of_item.shift(1).where(~at_time.duplicated())  # known at the first of each time
    history["previous"] = last_before.groupby([key, at_time["minute"]], sort=False).transform("first").fillna(value)
    history["count"] = of_item.cumcount() + 1
    history["is_latest"] = ~key.duplicated(keep="last")
    return history


def item_quantiles(table: StayTable) -> dict[str, list[float]]:
    """Return at most 65 quantiles of each item's values over the events, sorted."""
    items, values = items_and_values(table)
    groups = pd.Series(values).dropna().groupby(items[np.isfinite(values)], observed=True)
    return {item: np.quantile(group, np.linspace(0, 1, 65), method="nearest").tolist() for item, group in groups}


def quantiles_in(sorted_values: Sequence[float], numbers: np.ndarray) -> np.ndarray:
    """Return where numbers of any shape lie: -1 below all values, 0 at their median, 1 above all; 0 for NaN."""
    below, up_to = (np.searchsorted(sorted_values, numbers, side) for side in ("left", "right"))
    return np.where(np.isfinite(numbers), (below + up_to) / len(sorted_values) - 1, 0)


def encode_history(table: StayTable, quantiles: dict[str, list[float]]) -> np.ndarray:
    """Return `item_history` as (n_events, 9) float32 HISTORY: numbers as places -1..1 among the item's quantiles."""
    history = item_history(table)
    encoded = np.zeros((len(history), len(HISTORY)), np.float32)
    numbers = history[list(STATISTICS)].to_numpy()  # (n_events, 6)
    for item, rows in history.groupby("item", sort=False, observed=True).indices.items():
        if item in quantiles:
            encoded[rows, :-2] = np.c_[quantiles_in(quantiles[item], numbers[rows]), np.isfinite(numbers[rows, 0])]
    encoded[:, -2:] = np.c_[np.log1p(history["count"]), history["is_latest"]]
    return encoded
