"""What users do to it: each case gives one clear message and exit code 2, or a counted repair; never a traceback."""

import gzip
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import save_longformer
from small_table import MARK, arguments, best_model, leftovers, small_table, to_parquet

import train


def assert_clear(result, fragment, capfd, folder):
    """Exit code 2, a message that holds the fragment, no patient text, no traceback and nothing half-written."""
    output = "".join(capfd.readouterr())
    assert result == 2 and fragment in output.split("error: ")[-1], output
    assert "Traceback" not in output and MARK not in output
    assert not leftovers(folder) and not (folder / "out" / "predictions.csv").exists()


def run(*argv):
    try:
        return train.main([*map(str, argv)])
    except SystemExit as stop:  # argparse
        return stop.code


# ---- cells of the table ----


def put(column, value, rows=slice(0, 3)):
    def damage(table):
        table.loc[table.index[rows], column] = value
        return table

    return damage


def hours_for_minutes(table):
    return table.assign(relative_time_to_final_event=table.relative_time_to_final_event.astype(float) / 60)


def drop(*columns):
    return lambda table: table.drop(columns=list(columns))


END, LABEL = "relative_time_to_final_event", train.LABEL
BAD_TABLES = {
    "header only": (lambda table: table[:0], "a header but no rows"),
    "a column missing": (drop("event_known_time"), "missing columns event_known_time"),
    "labels missing as a column": (drop(LABEL), f"missing columns {LABEL}"),
    "two columns missing": (drop("icu_intime", "event_text"), "missing columns icu_intime, event_text"),
    "a column's name in capitals": (
        lambda table: table.rename(columns={"patient_id": "PATIENT_ID"}),
        "missing columns patient_id",
    ),
    "text for an id": (put("patient_id", "abc"), "column patient_id is not an integer in 3 rows, first row 1, 2, 3"),
    "a fraction for an id": (put("icu_stay_id", "30000000.5"), "column icu_stay_id is not an integer in 3 rows"),
    "an id beyond 2^63": (put("admission_id", "99999999999999999999"), "column admission_id is not an integer"),
    "no id": (put("patient_id", ""), "column patient_id is not an integer"),
    "a row that begins with #": (put("patient_id", "#10000000"), "column patient_id is not an integer"),
    "text for an age": (put("patient_age", "old"), "column patient_age is not a finite number in 3 rows"),
    "infinite age": (put("patient_age", "inf"), "column patient_age is not a finite number"),
    "age beyond float32": (put("patient_age", "1e300"), "column patient_age is not a finite number"),
    "label 2": (put(LABEL, "2"), f"column {LABEL} is not 0 or 1 in 3 rows"),
    "label -1": (put(LABEL, "-1"), f"column {LABEL} is not 0 or 1"),
    "label 0.5": (put(LABEL, "0.5"), f"column {LABEL} is not 0 or 1"),
    "label yes": (put(LABEL, "yes"), f"column {LABEL} is not 0 or 1"),
    "label NaN": (put(LABEL, "nan"), f"column {LABEL} is not 0 or 1"),
    "label missing": (put(LABEL, ""), f"column {LABEL} is not 0 or 1"),
    "label differs within a stay": (put(LABEL, "1", slice(0, 1)), f"first icu_stay_id 30000000 in {LABEL}"),
    "age differs within a stay": (put("patient_age", "77", slice(4, 5)), "first icu_stay_id 30000001 in patient_age"),
    "a stay of two patients": (
        put("patient_id", "5", slice(0, 1)),
        "contradict themselves, first icu_stay_id 30000000 in patient_id",
    ),
    "age known on one row only": (put("patient_age", "", slice(0, 1)), "contradict themselves"),
    "stay id written in two ways": (
        lambda t: put("insurance", "x", slice(0, 1))(put("icu_stay_id", "030000000", slice(0, 1))(t)),
        "in insurance",
    ),
    "date of the wrong form": (
        put("event_time", "31/12/2150 8 am"),
        "column event_time is not a time like 2150-01-31 23:59:00",
    ),
    "no admission time": (put("icu_intime", ""), "column icu_intime is not a time"),
    "infinite event time": (put("event_time", "infinity"), "column event_time is not a time"),
    "infinite known time": (put("event_known_time", "-infinity"), "column event_known_time is not a time"),
    "infinite discharge": (put("icu_outtime", "infinity"), "column icu_outtime is not a time"),
    "relative time is text": (put(END, "soon"), f"column {END} is not a finite number"),
    "relative time infinite": (put(END, "inf"), f"column {END} is not a finite number"),
    "relative time negative": (put(END, "-100"), f"{END} differs by more than 2 minutes"),
    "relative time in hours": (
        hours_for_minutes,
        "is in hours in 120 of 120 events. It must be minutes: multiply by 60",
    ),
    "relative time in hours in some rows": (put(END, "47"), "differs by more than 2 minutes"),
    "no event in any stay": (
        lambda table: table.assign(event_time="", relative_time_to_final_event=""),
        "no stay has an event",
    ),
    "stays end before they begin": (
        lambda table: table.assign(icu_outtime="2149-01-01", relative_time_to_final_event=""),
        "no stay has an event",
    ),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_table_is_refused(name, tmp_path, capfd):
    damage, fragment = BAD_TABLES[name]
    damage(small_table()).to_csv(tmp_path / "data.csv", index=False)
    assert_clear(run(*arguments(tmp_path, tmp_path / "data.csv")), fragment, capfd, tmp_path)


# ---- the table as a whole: enough to read, not enough to learn from ----

TOO_LITTLE = {
    "one class": (lambda table: table.assign(patient_expired_in_hospital="0"), [], "has one outcome only"),
    "one patient": (lambda table: table[:3], [], "1 patients, 0 of whom died: too few"),
    "one patient per class": (lambda table: table[:6], [], "2 patients, 1 of whom died: too few"),
    "nine patients": (lambda table: table[[i % 9 != 8 for i in range(120)]][:15], [], "too few"),
    "nobody left": (lambda table: table, ["--observation-hours", "100"], "no stay is left"),
    "nobody left after the gap": (
        lambda table: table,
        ["--observation-hours", "24", "--gap-hours", "30"],
        "Lower --observation-hours",
    ),
    "nothing known in time": (
        lambda table: table.assign(event_known_time=""),
        ["--observation-hours", "24"],
        "no stay is left",
    ),
    "more folds than deaths": (lambda table: table, ["--cross-validate", "30"], "only 20 patients died"),
}


@pytest.mark.parametrize("name", TOO_LITTLE)
def test_too_little_to_learn_from_is_refused_before_encoding(name, tmp_path, capfd):
    damage, options, fragment = TOO_LITTLE[name]
    damage(small_table()).to_csv(tmp_path / "data.csv", index=False)
    assert_clear(run(*arguments(tmp_path, tmp_path / "data.csv", *options)), fragment, capfd, tmp_path)
    assert not list(tmp_path.rglob("part-*"))


# ---- repairs, counted ----

REPAIRS = {
    "duplicate rows": (lambda table: pd.concat([table, table[:7]]), {"duplicate events, dropped": 7}, 120),
    "events before admission": (
        lambda t: put(END, "")(put("event_time", "2150-03-01 07:00:00")(t)),
        {"events before ICU admission, dropped": 3},
        117,
    ),
    "events after the end": (
        lambda t: put(END, "")(put("event_time", "2150-03-08 07:00:00")(t)),
        {"events after the final event, dropped (they leak the label)": 3},
        117,
    ),
    "events without a time": (put("event_time", "", slice(0, 2)), {"events without a time, dropped": 2}, 118),
    "a stay without events": (
        put("event_time", ""),
        {"events without a time, dropped": 3, "stays without events, dropped": 1},
        117,
    ),
    "unknown event type": (
        put("event_type", "transfusion"),
        {"events of unknown type, kept (their type is all zeros)": 3},
        120,
    ),
    "no event type": (put("event_type", ""), {"events of unknown type, kept (their type is all zeros)": 3}, 120),
    "relative time missing": (put(END, ""), {}, 120),
    "relative time NaN": (put(END, "nan"), {}, 120),
    "label written as 1.0": (put(LABEL, "0.0", slice(0, 1)), {}, 120),
    "columns in another order": (lambda table: table[table.columns[::-1]], {}, 120),
    "extra columns": (lambda table: table.assign(note="x", events_seen="3"), {}, 120),
    "ids above 2^53": (lambda table: table.assign(icu_stay_id=table.icu_stay_id.astype(int) + 2**53), {}, 120),
}


@pytest.mark.parametrize("name", REPAIRS)
def test_repair_is_counted(name, tmp_path):
    damage, expected, n_events = REPAIRS[name]
    damage(small_table()).to_csv(tmp_path / "data.csv", index=False)
    table, report = train.read_stays(tmp_path / "data.csv")
    stated = {reason.replace("\n", " "): count for reason, count in report.items()}
    assert {reason: stated.get(reason) for reason in expected} == expected and len(table.text) == n_events
    assert bool(expected) == bool(stated)


def test_ids_above_two_to_the_53_keep_their_digits(tmp_path):
    ids = [str(2**53 + 1 + i // 3) for i in range(120)]
    for path in (tmp_path / "flat.csv", tmp_path / "flat.parquet"):
        table = small_table().assign(icu_stay_id=ids, patient_id=ids)
        table.to_csv(path, index=False) if path.suffix == ".csv" else to_parquet(table, path)
        assert train.read_stays(path)[0].stays.icu_stay_id.tolist() == [2**53 + 1 + i for i in range(40)]


TEXTS = {
    "empty": "",
    "100,000 characters": "x" * 100_000,
    "emoji": "😀 \U0001f9ea",
    "NUL": "a\0b",
    "CRLF inside quotes": 'say "a",\r\nthen b',
    "quotes": '""",',
    "right to left": "\u202eשלום مرحبا",
    "only blanks": "   ",
    "replacement": "\ufffd",
    "hash": "# no comment",
    "SQL": "'; DROP TABLE stays; --",
}


@pytest.mark.parametrize("name", TEXTS)
def test_odd_text_is_read_as_it_is(name, tmp_path):
    put("event_text", TEXTS[name])(small_table()).to_csv(tmp_path / "data.csv", index=False)
    table, report = train.read_stays(tmp_path / "data.csv")
    assert not report and [table.texts[i] for i in table.text[:3]] == [TEXTS[name]] * 3


def test_texts_that_say_they_are_missing_are_one_empty_text(tmp_path):
    table = small_table()
    table.loc[[0, 1, 3], "event_text"] = ["nan", "", " NULL "]
    table.to_csv(tmp_path / "data.csv", index=False)
    read, _ = train.read_stays(tmp_path / "data.csv")
    assert len(read.text) == 120 and (read.texts[read.text] == "").sum() == 3
    assert len(set(read.texts)) == len(read.texts)


@pytest.mark.parametrize("nested", [False, True])
def test_columns_that_have_their_type_are_still_searched_for_infinity(tmp_path, nested):
    table = small_table()
    table.loc[5, END] = "inf"
    to_parquet(table, tmp_path / "data.parquet", nested)
    with pytest.raises(train.InputError, match=f"column {END} is not a finite number in 1 rows"):
        train.read_stays(tmp_path / "data.parquet")


def test_all_odd_texts_are_trained_on(tmp_path, capfd):
    put("event_text", [*TEXTS.values()], slice(0, len(TEXTS)))(small_table()).to_csv(tmp_path / "data.csv", index=False)
    assert run(*arguments(tmp_path, tmp_path / "data.csv", "--item-history")) == 0
    assert "Traceback" not in "".join(capfd.readouterr())


# ---- files ----


def csv_text(table=None):
    return (small_table() if table is None else table).to_csv(index=False)


def cut_row(path):
    lines = csv_text().splitlines()
    path.write_text("\n".join([*lines[:50], lines[50][:60], *lines[51:]]))


def nested_and_flat(path):
    to_parquet(small_table()[:60], path.with_name("a.parquet"))
    to_parquet(small_table()[60:], path.with_name("b.parquet"), nested=True)


def broken_mimic(path):
    (path / "hosp").mkdir(parents=True)
    (path / "icu").mkdir()
    for table, columns in train.MIMIC_TABLES.items():
        (path / f"{table}.csv").write_text(",".join(column.split()[0] for column in columns.split(", ")) + "\n")


def mimic_without_a_table(path):
    broken_mimic(path)
    (path / "hosp" / "labevents.csv").unlink()


def mimic_without_a_column(path):
    broken_mimic(path)
    (path / "icu" / "icustays.csv").write_text("subject_id,hadm_id\n1,2\n")


BAD_FILES = {
    "no such file": ("none.csv", lambda path: None, "no such file or folder"),
    "a glob without files": ("none*.parquet", lambda path: None, "No files found"),
    "empty CSV": ("data.csv", lambda path: path.write_bytes(b""), "the file is empty"),
    "empty Parquet": ("data.parquet", lambda path: path.write_bytes(b""), "the file is empty"),
    "another kind of file": ("data.xlsx", lambda path: path.write_bytes(b"PK"), "--data takes a folder"),
    "empty folder": ("folder", lambda path: path.mkdir(), "is no complete MIMIC-IV folder"),
    "MIMIC-IV without a table": ("mimic", mimic_without_a_table, "hosp/labevents.csv[.gz] not found"),
    "MIMIC-IV without a column": ("mimic", mimic_without_a_column, "has no column stay_id"),
    "MIMIC-IV without stays": ("mimic", broken_mimic, "icu/icustays has no rows"),
    "no header": (
        "data.csv",
        lambda path: path.write_text("\n".join(csv_text().splitlines()[1:])),
        "missing columns patient_id",
    ),
    "semicolons": ("data.csv", lambda path: path.write_text(csv_text().replace(",", ";")), "missing columns"),
    "Latin-1": (
        "data.csv",
        lambda path: path.write_bytes(csv_text(small_table().assign(patient_race="Ñandú")).encode("latin-1")),
        "at line 2, Invalid unicode). CSV must be UTF-8",
    ),
    "UTF-16": ("data.csv", lambda path: path.write_text(csv_text(), "utf-16"), "data.csv: "),
    "lone surrogate": (
        "data.csv",
        lambda path: path.write_bytes(csv_text().encode().replace(b"URGENT", b"\xed\xa0\x80")),
        "CSV must be UTF-8",
    ),
    "a row cut short": ("data.csv", cut_row, "more or fewer values than the header"),
    "the last row cut short": (
        "data.csv",
        lambda path: path.write_text(csv_text()[:-60]),
        "more or fewer values than the header",
    ),
    "a quote that never closes": (
        "data.csv",
        lambda path: path.write_text(csv_text().replace("Lab:", '"Lab:', 1)),
        "a quote that never closes",
    ),
    "gzip cut short": (
        "data.csv.gz",
        lambda path: path.write_bytes(gzip.compress(csv_text().encode())[:-300]),
        "end of GZIP stream",
    ),
    "gzip without its end": (
        "data.csv.gz",
        lambda path: path.write_bytes(gzip.compress(csv_text().encode())[:-4]),
        "end of GZIP stream",
    ),
    "no gzip": ("data.csv.gz", lambda path: path.write_text(csv_text()), "not a GZIP stream"),
    "Parquet cut short": (
        "data.parquet",
        lambda path: path.write_bytes(to_parquet(small_table(), path).read_bytes()[:5000]),
        "cannot be read",
    ),
    "Parquet of another schema": (
        "data.parquet",
        lambda path: pd.DataFrame({"a": [1]}).to_parquet(path),
        "missing columns",
    ),
    "Parquet whose events are numbers": (
        "data.parquet",
        lambda path: pd.DataFrame({"icu_stay_id": [1], "events": [[5]]}).to_parquet(path),
        "cannot be read",
    ),
    "Parquet whose times are numbers": (
        "data.parquet",
        lambda path: pd.read_parquet(to_parquet(small_table(), path)).assign(icu_intime=7).to_parquet(path),
        "column icu_intime is not a time",
    ),
    "Parquet ids as floats beyond 2^53": (
        "data.parquet",
        lambda path: pd.read_parquet(to_parquet(small_table(), path)).assign(patient_id=2.0**54).to_parquet(path),
        "stored as floating point",
    ),
    "nested and flat mixed": ("*.parquet", nested_and_flat, "must share a schema"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_refused(name, tmp_path, capfd):
    file_name, write, fragment = BAD_FILES[name]
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / file_name)
    assert_clear(run(*arguments(tmp_path, tmp_path / "data" / file_name)), fragment, capfd, tmp_path)


GOOD_FILES = {
    "BOM": ("data.csv", lambda path: path.write_text(csv_text(), "utf-8-sig")),
    "CRLF": ("data.csv", lambda path: path.write_bytes(csv_text().replace("\n", "\r\n").encode())),
    "gzip": ("data.csv.gz", lambda path: path.write_bytes(gzip.compress(csv_text().encode()))),
    "flat Parquet": ("data.parquet", lambda path: to_parquet(small_table(), path)),
    "nested Parquet": ("data.parquet", lambda path: to_parquet(small_table(), path, nested=True)),
    "a quote in the name": ("o'neill.csv", lambda path: path.write_text(csv_text())),
    "brackets in the name": ("data [1].csv", lambda path: path.write_text(csv_text())),
}


@pytest.mark.parametrize("name", GOOD_FILES)
def test_same_table_in_any_form_reads_the_same(name, tmp_path):
    file_name, write = GOOD_FILES[name]
    (tmp_path / "plain.csv").write_text(csv_text())
    write(tmp_path / file_name)
    table, plain = train.read_stays(tmp_path / file_name)[0], train.read_stays(tmp_path / "plain.csv")[0]
    assert all(
        np.array_equal(getattr(table, name), getattr(plain, name))
        for name in ("offsets", "event_type", "text", "minutes_to_end", "texts")
    )
    assert table.stays.astype(str).equals(plain.stays.astype(str))


def test_files_of_one_glob_may_order_their_columns_differently(tmp_path):
    table = small_table()
    table[:60].to_csv(tmp_path / "a.csv", index=False)
    table[60:][table.columns[::-1]].to_csv(tmp_path / "b.csv", index=False)
    assert len(train.read_stays(tmp_path / "*.csv")[0].text) == 120


def test_column_that_no_chosen_feature_needs_may_be_missing(tmp_path, capfd):
    table = small_table().drop(columns=["insurance", "discharge_location", "patient_race"])
    table.to_csv(tmp_path / "data.csv", index=False)
    few = ["--static-features", "patient_age", "patient_gender"]
    assert run(*arguments(tmp_path, tmp_path / "data.csv", *few)) == 0
    result = run(*arguments(tmp_path, tmp_path / "data.csv", "--output-dir", tmp_path / "all"))
    assert result == 2 and "missing columns patient_race, insurance" in capfd.readouterr().err


def test_data_frame_is_read_as_its_file(tmp_path):
    table = small_table()
    table.to_csv(tmp_path / "data.csv", index=False)
    typed = pd.read_csv(tmp_path / "data.csv", parse_dates=["icu_intime", "icu_outtime", "event_time"])
    expected = train.read_stays(tmp_path / "data.csv")[0]
    for frame in (table, typed):
        assert train.read_stays(frame)[0].fingerprint() == expected.fingerprint()
    with pytest.raises(train.InputError, match="the data frame: missing columns icu_intime"):
        train.read_stays(table.drop(columns="icu_intime"))
    with pytest.raises(train.InputError, match="Give a path, or the data frame itself"):
        train.read_stays(str(table))


# ---- options and folders ----


@pytest.mark.parametrize(
    "content, fragment",
    [
        ("max_epoch: 3", "unknown settings max_epoch"),
        ("- 3", "no settings file"),
        ("a: [", "cannot be read as a settings file"),
        ("mixed_precision: fp8", "--mixed-precision fp8: out of range; it must be one of auto, no, bf16"),
        ("d_model: wide", "invalid int value"),
        ("patience: [1]", "--patience [1]: out of range; it must be at least 1"),
    ],
)
def test_bad_settings_file_is_refused(content, fragment, tmp_path, capfd):
    (tmp_path / "s.yaml").write_text(content)
    assert_clear(run(tmp_path / "s.yaml"), fragment, capfd, tmp_path)


BAD_OPTIONS = [
    (["--nonsense", "3"], "unknown option --nonsense 3"),
    (["--d-model", "wide"], "invalid int value"),
    (["--audit", "maybe"], "--audit"),
    (["--d-model", "30"], "--d-model 30: out of range"),
    (["--n-heads", "0"], "--n-heads 0: out of range"),
    (["--learning-rate", "nan"], "--learning-rate nan"),
    (["--learning-rate", "-1"], "--learning-rate"),
    (["--dropout", "1"], "--dropout 1.0"),
    (["--weight-averaging", "-0.1"], "--weight-averaging"),
    (["--temporal-weight", "2"], "--temporal-weight"),
    (["--warmup-steps", "-1"], "--warmup-steps"),
    (["--observation-hours", "nan"], "--observation-hours nan"),
    (["--observation-hours", "-6"], "--observation-hours"),
    (["--seed", "-1"], "--seed -1"),
    (["--batch-size", "0"], "--batch-size 0"),
    (["--cross-validate", "1"], "--cross-validate 1"),
    (["--mixed-precision", "fp8"], "--mixed-precision: invalid choice: 'fp8'"),
    (["--text-encoder-dtype", "int8"], "--text-encoder-dtype"),
    (["--gap-hours", "6"], "--gap-hours needs --observation-hours"),
    (["--static-features", "shoe_size"], "no such column"),
    (["--trajectory", "6"], "--trajectory needs --evaluate"),
    (["--observation-hours", "6", "--static-features", "discharge_location"], "known only after the prediction"),
    (["--evaluate", "x.pth", "--trajectory", "six"], "give hours above 0"),
    (["--evaluate", "x.pth", "--trajectory", "6,-1"], "give hours above 0"),
    (["--evaluate", "x.pth", "--resume"], "do not go together"),
    (["--audit", "--cross-validate", "3"], "do not go together"),
    (["--evaluate", "none.pth"], "no such checkpoint"),
    (["--seeds", "0"], "--seeds 0: out of range; it must be at least 1"),
    (["--seeds", "2", "--cross-validate", "3"], "do not go together"),
    (["--test-data", "x.csv", "--no-test"], "each says which stays test the model"),
    (["--split", "x.csv", "--cross-validate", "3"], "each says which stays test the model"),
    (["--report-to", "nobody"], "--report-to: invalid choice"),
]


@pytest.mark.parametrize("options, fragment", BAD_OPTIONS)
def test_bad_option_is_refused(options, fragment, tmp_path, capfd):
    assert_clear(run(*arguments(tmp_path, "none.csv", *options)), fragment, capfd, tmp_path)


@pytest.mark.parametrize(
    "option, place",
    [
        ("--output-dir", "file"),
        ("--output-dir", "file/below"),
        ("--output-dir", "/proc/none"),
        ("--cache-dir", "file"),
        ("--output-dir", "with_a_file"),
    ],
)
def test_unwritable_folder_is_refused(option, place, tmp_path, capfd):
    (tmp_path / "data.csv").write_text(csv_text())
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "with_a_file").mkdir()
    (tmp_path / "with_a_file" / "checkpoints").write_text("not a folder")
    assert_clear(run(*arguments(tmp_path, tmp_path / "data.csv", option, tmp_path / place)), "cannot", capfd, tmp_path)
    assert (tmp_path / "file").read_text() == "not a folder"


def test_unwritable_cache_of_a_mimic_folder_is_refused(tmp_path, capfd):
    broken_mimic(tmp_path / "mimic")
    (tmp_path / "file").write_text("not a folder")
    assert_clear(
        run(*arguments(tmp_path, tmp_path / "mimic", "--cache-dir", tmp_path / "file")),
        "query_results: cannot be written",
        capfd,
        tmp_path,
    )


# ---- checkpoints ----


class Malicious:
    def __reduce__(self):
        return Path.mkdir, (Path("let_in"),)


def changed(**parts):
    def write(state, path):
        torch.save({name: value for name, value in {**state, **parts}.items() if value is not None}, path)

    return write


def cut(state, path):
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:5000])


BAD_CHECKPOINTS = {
    "truncated": (cut, "not a checkpoint of this program, or damaged"),
    "empty": (lambda state, path: path.write_bytes(b""), "not a checkpoint of this program, or damaged"),
    "a text file": (lambda state, path: path.write_text("weights"), "not a checkpoint of this program, or damaged"),
    "a folder": (lambda state, path: path.mkdir(), "not a checkpoint of this program, or damaged"),
    "a list": (lambda state, path: torch.save([1, 2], path), "of another program"),
    "of another program": (changed(program="other"), "of another program"),
    "without a format": (changed(format=None), "of another program"),
    "of a newer version": (changed(format=99), "written by another version (format 99"),
    "without weights": (changed(model=None), "lacks parts"),
    "of another architecture": (changed(architecture={"depth": 3}), "lacks parts"),
    "without patients": (changed(patients={}), "lacks parts"),
    "with settings that are a list": (changed(settings=[1]), "lacks parts"),
    "with a preprocessor that is a number": (changed(preprocessor=5), "lacks parts"),
    "with temperature zero": (changed(temperature=0.0), "lacks parts"),
    "with a scale too few": (
        lambda state, path: changed(preprocessor={**state["preprocessor"], "scales": [1.0]})(state, path),
        "lacks parts",
    ),
    "of another encoder": (changed(text_encoder="tiny@123"), "trained on vectors of tiny@123"),
    "malicious, as torch saves it": (
        lambda state, path: torch.save({**state, "evil": Malicious()}, path),
        "not a checkpoint of this program, or damaged",
    ),
    "malicious, as in torch 1.5": (
        lambda state, path: torch.save(Malicious(), path, _use_new_zipfile_serialization=False),
        "or damaged",
    ),
    "malicious, a bare pickle": (lambda state, path: path.write_bytes(pickle.dumps(Malicious())), "or damaged"),
}


@pytest.mark.parametrize("option", ["--evaluate", "--resume"])
@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_bad_checkpoint_is_refused_and_nothing_in_it_is_executed(name, option, finished, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write, fragment = BAD_CHECKPOINTS[name]
    path = tmp_path / "out" / "checkpoints" / "latest_checkpoint.pth"
    path.parent.mkdir(parents=True)
    write(torch.load(finished / "out" / "checkpoints" / "latest_checkpoint.pth", weights_only=True), path)
    options = ["--evaluate", path] if option == "--evaluate" else ["--resume"]
    fragment = "differs from the one to resume" if (name, option) == ("of another encoder", "--resume") else fragment
    assert_clear(
        run(*arguments(tmp_path, finished / "data.csv", "--cache-dir", finished / "cache", *options)),
        fragment,
        capfd,
        tmp_path,
    )
    assert not Path("let_in").exists()


def test_path_inside_a_checkpoint_is_not_followed(finished, tmp_path, capfd):
    folder, state = (save_longformer(tmp_path / "encoder"), torch.load(best_model(finished), weights_only=True))
    torch.save(
        {**state, "text_encoder": "encoder@1", "settings": {**state["settings"], "text_encoder": str(folder)}},
        tmp_path / "evil.pth",
    )
    options = arguments(
        tmp_path, finished / "data.csv", "--evaluate", tmp_path / "evil.pth", encoder=train.CLINICAL_LONGFORMER
    )
    assert_clear(run(*options), "paths inside a checkpoint are not followed", capfd, tmp_path)


@pytest.mark.parametrize(
    "lost, fragment",
    [
        ("tokenizer", "has no tokenizer"),
        ("config.json", "is no text encoder"),
        ("model", "cannot be used as a text encoder"),
    ],
)
def test_incomplete_model_folder_is_refused(lost, fragment, tmp_path, capfd):
    folder = save_longformer(tmp_path / "encoder")
    names = ("tokenizer", "vocab", "merges", "special_tokens") if lost == "tokenizer" else (lost,)
    for path in folder.iterdir():
        path.unlink() if path.name.startswith(names) else None
    (tmp_path / "data.csv").write_text(csv_text())
    assert_clear(run(*arguments(tmp_path, tmp_path / "data.csv", encoder=folder)), fragment, capfd, tmp_path)


def test_resume_with_other_settings_is_refused(finished, capfd):
    before = (finished / "out" / "metrics.json").read_bytes()
    for options, fragment in (
        (["--learning-rate", "0.1"], "(learning_rate)"),
        (["--weight-decay", "0.5"], "(weight_decay)"),
        (["--d-model", "64"], "model sizes"),
    ):
        assert run(*arguments(finished, finished / "data.csv", "--resume", *options)) == 2
        assert fragment in capfd.readouterr().err
    assert (finished / "out" / "metrics.json").read_bytes() == before


def test_scoring_one_stay_of_one_class_writes_predictions_without_metrics(finished, tmp_path):
    small_table()[:3].to_csv(tmp_path / "one.csv", index=False)
    assert run(*arguments(tmp_path, tmp_path / "one.csv", "--evaluate", best_model(finished))) == 0
    assert len(pd.read_csv(tmp_path / "out" / "evaluation" / "predictions.csv")) == 1


def test_event_types_never_seen_in_training_are_scored(finished, tmp_path):
    small_table().assign(event_type="transfusion", insurance="never seen").to_csv(tmp_path / "new.csv", index=False)
    assert run(*arguments(tmp_path, tmp_path / "new.csv", "--evaluate", best_model(finished))) == 0
    assert pd.read_csv(tmp_path / "out" / "evaluation" / "predictions.csv").probability.between(0, 1).all()
