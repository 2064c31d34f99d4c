"""What an event's text says, and what its item was until then in the stay: hand examples."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small_table import LACTATE, small_table

from clinical_lf import items
from clinical_lf.reading import read_stays

IN_UNIT = f"{LACTATE} mmol/L"
TEXTS_FILE = Path(__file__).with_name("event_texts.csv")
EVENT_TEXTS = pd.read_csv(TEXTS_FILE, keep_default_na=False, na_values={"value": "nan"})


@pytest.mark.parametrize("marked, item, value, unit", EVENT_TEXTS.to_numpy().tolist(), ids=EVENT_TEXTS["marked"])
def test_text_is_read_as_item_number_unit_and_the_rest(marked, item, value, unit):
    """Braces mark what is a measurement."""
    text, without_value = re.sub("[{}]", "", marked), re.sub("{.*?}", "#", marked)
    assert items.read_text(text) == pytest.approx((item, value, f"{item} {unit}".strip(), without_value), nan_ok=True)


def test_masked_numbers_stand_behind_the_item_and_the_hash_is_of_the_item_and_its_unit():
    text = "Lab: PaO2 5% | Value: 4.1 mmol/L | 1.1E-05 | Dose: -25,000-.5"
    assert items.mask_numbers(text) == "Lab: PaO2 5% | Value: # mmol/L | # | Dose: -#-#"
    assert items.mask_numbers("Lab: 50912") == "Lab: 50912"
    low, high, *others = (items.item_hash(f"Lab: A | Value: {end}") for end in ("1 mg/dL", "9 mg/dL", "9 mmol/L", "9"))
    assert low == high and len({low, *others}) == 3 and len(low) == 16
    assert len(set(map(items.item_hash, ("Lab: 50912", "Lab: 50931", "NaCl 0.45 %", "NaCl 0.9 %")))) == 4


@pytest.fixture(scope="module")
def lactates():
    """Two stays: lactates of 2, 6 and 1 with a culture among them, and one lactate of 6."""
    rows = small_table(n_patients=2, n_events=4).iloc[:5].copy()
    values = [f"{LACTATE} | Value: {value} mmol/L" for value in (2, 6, 1, 6)]
    rows["event_text"] = [values[0], "Microbiology: Blood | Test: Culture", *values[1:]]
    return read_stays(rows)[0]


def test_item_history_of_lactates_counts_events_up_to_it_and_does_not_know_what_follows(lactates):
    history = items.item_history(lactates)
    columns = "value minimum maximum mean first previous count is_latest".split()
    first_two = [[2, 2, 2, 2, 2, 2, 1, False], [6, 2, 6, 4, 2, 2, 2, False]]
    expected = [*first_two, [1, 1, 6, 3, 2, 6, 3, True], [6, 6, 6, 6, 6, 6, 1, True]]
    assert history[history["item"] == IN_UNIT][columns].values.tolist() == expected
    # Only is_latest may change where a stay is cut off after its second lactate.
    until_then = lactates.minutes_since_intime <= 3 * 60
    cut = items.item_history(lactates.take(np.arange(2), keep_event=until_then))
    known = history[until_then].reset_index(drop=True)
    pd.testing.assert_frame_equal(cut.drop(columns="is_latest"), known.drop(columns="is_latest"))


def test_previous_is_of_an_earlier_time_in_the_tables_order_and_a_tied_mean_is_not_rounded_apart():
    rows = small_table(n_patients=1, n_events=5)
    rows["event_text"] = [f"{LACTATE} | Value: {value} mmol/L" for value in (0.1, 9, 2, 4, 0.7)]
    rows.loc[[1, 2], ["event_time", "relative_time_to_final_event"]] = rows.loc[0, ["event_time"]].iloc[0], "2820"
    rows.loc[[1, 2], "relative_time_to_final_event"] = rows.loc[0, "relative_time_to_final_event"]
    table = read_stays(rows)[0]
    history = items.item_history(table)
    first, again = history["value"].tolist()[:3], history["value"].tolist()[3:]
    assert history["previous"].tolist() == [*first, first[-1], again[0]] and again == [4, 0.7]
    tied = items.item_history(replace(table, text=np.full(5, table.text[-1])))
    assert (tied["mean"] == 0.7).all() and (tied["minimum"] == tied["mean"]).all()


def test_history_is_told_by_an_items_65_quantiles_and_has_no_number_of_items_that_training_never_saw(lactates):
    (name,), (values,) = zip(*items.item_quantiles(lactates).items())
    assert name == IN_UNIT and len(values) == 65 and values == sorted(values) and set(values) == {1, 2, 6}
    encoded = items.encode_history(lactates, {IN_UNIT: [1.5, 2.0, 2.0, 5.0]})  # of 2, a culture, 6, 1 and 6
    assert encoded[:, 0].tolist() == [0, 0, 1, -1, 1]
    low, high = -2 / 3, 2 / 3  # of 1 and 6 among 1, 2, 6; 2 is at 0, the mean 4 between 2 and 6, 3 as well
    expected = [
        [0, 0, 0, 0, 0, 0, 1, math.log(2), 0],
        [0, 0, 0, 0, 0, 0, 0, math.log(2), 1],
        [high, 0, high, 1 / 3, 0, 0, 1, math.log(3), 0],
        [low, low, high, 1 / 3, 0, high, 1, math.log(4), 1],
        [high, high, high, high, high, high, 1, math.log(2), 1],
    ]
    encoded = items.encode_history(lactates, {IN_UNIT: [1.0, 2.0, 6.0]})
    assert encoded.shape == (5, len(items.HISTORY)) and encoded.dtype == np.float32
    np.testing.assert_allclose(encoded, expected, atol=1e-6)
    unknown = items.encode_history(lactates, {})
    assert not unknown[:, :7].any() and np.array_equal(unknown[:, 7:], encoded[:, 7:])
