"""The table of stays: parts of it, what is known by an hour, the cohort, and splits that keep patients whole."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from accelerate import Accelerator
from make_sample import make_sample
from small_table import arguments, small_table
from test_reading import assert_same_table, put

import train
from clinical_lf import tables
from clinical_lf.files import InputError
from clinical_lf.reading import read_stays
from clinical_lf.tables import KNOWN_ONLY_LATER, choose_cohort, known_at, split_by_patient, split_from_file


@pytest.fixture(scope="module")
def sample():
    """90 synthetic stays; some are of one patient."""
    return read_stays(make_sample(90, seed=1).table)[0]


small = lambda n_patients=40, **columns: read_stays(small_table(n_patients).assign(**columns))[0]
patients_of = lambda table, split: [set(table.stays["patient_id"].to_numpy()[part]) for part in split]


@pytest.mark.parametrize("chosen", [[5, 3], [0], np.arange(90) % 7 == 2, slice(80, None)])
def test_part_has_its_stays_in_their_order_their_events_and_their_texts_only(chosen, sample):
    keep_event = sample.event_type != 2
    part = sample.take(chosen, keep_event)
    own = part.with_own_texts()
    stays = np.arange(90)[chosen]
    assert part.stays["icu_stay_id"].tolist() == sample.stays["icu_stay_id"].to_numpy()[stays].tolist()
    assert part.offsets[-1] == len(part.text) and own.stays.index.tolist() == list(range(len(stays)))
    for new, stay in enumerate(stays):
        events = np.flatnonzero((sample.stay_of_event == stay) & keep_event)
        rows = slice(own.offsets[new], own.offsets[new + 1])
        assert own.texts[own.text[rows]].tolist() == sample.texts[sample.text[events]].tolist()
        for name in tables.EVENT_ARRAYS.keys() - {"text"}:
            np.testing.assert_array_equal(getattr(own, name)[rows], getattr(sample, name)[events])
    assert sorted(own.texts) == sorted(set(part.texts[part.text])) and len(own.texts) < len(sample.texts)
    assert part.texts is sample.texts and own.static_columns["number_of_events"].tolist() == own.lengths.tolist()


def test_parts_stacked_again_are_the_whole(sample):
    parts = [sample.take(np.arange(first, last)) for first, last in ((0, 30), (30, 31), (31, 90))]
    assert_same_table(tables.stacked(parts), sample)
    assert tables.stacked(parts).fingerprint() == sample.fingerprint()
    assert tables.stacked(parts[::-1]).fingerprint() != sample.fingerprint()


def test_fingerprint_changes_with_what_is_read():
    for changed in ({"event_text": "x"}, {"patient_expired_in_hospital": "1"}, {"event_known_time": ""}):
        assert small(4).fingerprint() == small(4).fingerprint() != small(4, **changed).fingerprint()


def test_only_what_was_known_by_the_hour_is_read_and_times_count_to_it():
    """Events of hours 1, 2, 3 are known half an hour later; nobody knows when the first stay's were."""
    table = read_stays(put(small_table(4), {"event_known_time": ""}))[0]
    now = known_at(table, 2.5)
    assert now.stays["icu_stay_id"].tolist() == [30_000_001, 30_000_002, 30_000_003]
    assert now.minutes_to_end.tolist() == [90, 30] * 3 and now.minutes_since_intime.tolist() == [60, 120] * 3
    assert now.stays[list(KNOWN_ONLY_LATER)].isna().all(axis=None)
    assert not table.stays[list(KNOWN_ONLY_LATER)].isna().any(axis=None) and not len(known_at(table, 1.25).stays)
    foretold = small(4, event_known_time="2150-03-01 08:00:00")  # no event is read before it happens
    assert known_at(foretold, 2).lengths.tolist() == [2] * 4


def test_cohort_is_those_still_there_with_something_known_and_the_flow_counts_them():
    """The dead of the small table leave after 47 h, survivors after 48 h."""
    table = read_stays(put(small_table(), {"event_known_time": ""}))[0]
    cohort, flow = choose_cohort(table, observation_hours=24)
    assert [[*step.values()][1:] for step in flow] == [[40, 40, 120, 20], [40, 40, 120, 20], [39, 39, 117, 20]]
    assert flow[1]["name"] == "still in the ICU and alive 24 h after admission"
    cohort, flow = choose_cohort(table, observation_hours=24, gap_hours=23)
    assert flow[1]["stays"] == 20 and set(cohort.labels) == {0.0}
    assert tables.stay_hours(table).tolist() == [48, 47] * 20
    # Described in subgroups by what is known only later; no feature of the cohort knows it.
    assert cohort.stays["last_icu_careunit"].tolist() == ["MICU"] * 19
    assert choose_cohort(table)[0] is table


def test_first_stay_of_each_patient_is_the_earliest():
    frame = small_table(6).assign(patient_id=["1"] * 9 + ["2"] * 9)
    frame.loc[frame["icu_stay_id"].isin(["30000002", "30000004"]), "icu_intime"] = "2150-03-01 07:00:00"
    cohort, flow = choose_cohort(read_stays(frame)[0], first_stay_only=True)
    assert cohort.stays["icu_stay_id"].tolist() == [30_000_002, 30_000_004]
    assert [*flow[-1].values()] == ["first ICU stay of each patient", 2, 2, 6, 0]


NOBODY = [({}, 100, 0, "40; still"), ({}, 24, 30, "40; still"), ({"event_known_time": ""}, 24, 0, "40; with an event")]


@pytest.mark.parametrize("columns, hours, gap, steps", NOBODY)
def test_cohort_of_nobody_is_refused(columns, hours, gap, steps):
    with pytest.raises(InputError, match=f"no stay is left .*: {steps}.*: 0\\). Lower --observation-hours"):
        choose_cohort(small(**columns), observation_hours=hours, gap_hours=gap)


def test_prospective_cohort_has_the_texts_that_it_reads(tmp_path):
    sample = read_stays(train.SAMPLE)[0]
    settings = train.Settings(data=str(train.SAMPLE), cache_dir=str(tmp_path), observation_hours=6.0)
    table = train.read_source(train.check_settings(settings), Accelerator()).table
    known = sample.known_minutes_since_intime <= 6 * 60
    assert set(table.texts) == set(table.texts[table.text]) == set(sample.texts[sample.text[known]]) < set(sample.texts)


def test_split_keeps_patients_whole_and_the_share_of_deaths_in_each_part(sample):
    patients = sample.stays["patient_id"]
    parts = patients_of(sample, split_by_patient(sample, seed=3))
    assert sum(map(len, parts)) == len(set.union(*parts)) == patients.nunique() < len(patients)
    assert np.array([len(part) for part in parts]) / patients.nunique() == pytest.approx([0.64, 0.16, 0.2], abs=0.02)
    table = small(100)
    split = split_by_patient(table, seed=3)
    assert [len(part) for part in split] == [64, 16, 20] and [table.labels[part].mean() for part in split] == [0.5] * 3
    assert all((one == two).all() for one, two in zip(split, split_by_patient(table, seed=3)))
    assert not np.array_equal(split.test, split_by_patient(table, seed=4).test)
    assert [len(part) for part in split_by_patient(table, seed=3, test_fraction=0)] == [80, 20, 0]


def test_folds_of_cross_validation_keep_patients_whole_and_test_every_stay_once(sample):
    tested = []
    for split in tables.cross_validation_splits(sample, 3, seed=0):
        parts = patients_of(sample, split)
        assert sum(map(len, parts)) == len(set.union(*parts)) == sample.stays["patient_id"].nunique()
        assert len(parts[1]) == pytest.approx(len(parts[0]) / 4, abs=4)
        tested += split.test.tolist()
    assert sorted(tested) == list(range(90))


def test_split_file_gives_each_part_its_patients_and_names_those_that_have_none(tmp_path, log):
    table, ids = small(), range(10_000_000, 10_000_030)
    rows = pd.DataFrame({"patient_id": ids, "part": ["test"] * 20 + ["train"] * 6 + ["validation"] * 4, "note": "x"})
    pd.concat([rows, rows[:3].assign(note="y")])[::-1].to_csv(tmp_path / "split.csv", index=False)
    split = split_from_file(table, tmp_path / "split.csv")
    assert patients_of(table, split) == [{*ids[20:26]}, {*ids[26:]}, {*ids[:20]}]
    assert "10 stays are of 10 patients in no part" in log.text
    rows[20:].to_csv(tmp_path / "untested.csv", index=False)
    assert len(split_from_file(table, tmp_path / "untested.csv").test) == 0


BAD_SPLITS = yaml.safe_load(Path(__file__).with_name("bad_inputs.yaml").read_text("utf-8"))["splits"]


@pytest.mark.parametrize("content, words", BAD_SPLITS)
def test_bad_split_file_is_refused(content, words, tmp_path):
    if content is not None:
        (tmp_path / "split.csv").write_text(content)
    with pytest.raises(InputError, match=f"--split .*split.csv: {words}"):
        split_from_file(small(4), tmp_path / "split.csv")


@pytest.mark.parametrize("n_patients, deaths", [(1, 0), (2, 1), (5, 2)])
def test_too_few_patients_for_a_split_or_folds_are_refused(n_patients, deaths):
    with pytest.raises(InputError, match=f"^{n_patients} patients, {deaths} of whom died: too few to split"):
        split_by_patient(small(n_patients), seed=0)
    with pytest.raises(InputError, match=f"--cross-validate 2: only {deaths + 7} patients of one outcome; it takes 10"):
        list(tables.cross_validation_splits(small(n_patients + 14), 2, seed=0))
    ends = dict.fromkeys(("patient_death_time", "relative_time_to_final_event"), "")
    with pytest.raises(InputError, match="40 patients, 0 of whom died: a part of the split has one outcome only"):
        split_by_patient(small(patient_expired_in_hospital="0", **ends), seed=0)


def test_too_little_to_learn_from_is_refused_before_encoding(tmp_path, capfd):
    small_table(5).to_csv(tmp_path / "data.csv", index=False)
    for options, fragment in ([], "too few to split"), (["--observation-hours", 100], "no stay is left"):
        assert train.main(arguments(tmp_path, tmp_path / "data.csv", *options)) == 2
        assert fragment in capfd.readouterr().err and not list(tmp_path.rglob("part-*"))
