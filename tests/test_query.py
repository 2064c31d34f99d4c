"""query.sql through sqlglot and DuckDB on a made-up MIMIC-IV folder: no row here comes from a patient."""

import gzip
import os
import re
import subprocess
import sys
from datetime import datetime

import pyarrow.parquet
import pytest
from small_table import leftovers

import train

IN, OUT = "2150-01-01 10:00:00", "2150-01-03 10:00:00"
LAB = (
    "subject_id,hadm_id,itemid,charttime,storetime,value,valuenum,valueuom,ref_range_lower,ref_range_upper,"
    "flag,priority,comments"
)

# Patient 1: admission 11 with the ICU stays 101 and 102. Patient 2: admission 21, stay 201, dies before ICU discharge.
# Patient 3: admission 31, stay 301, without any event.
TABLES = {
    "hosp/patients": """subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod
1,F,70,2148,2011 - 2013,2150-06-01
2,M,50,2150,2011 - 2013,2150-01-02
3,M,91,2150,2011 - 2013,""",
    "hosp/admissions": """hadm_id,deathtime,admission_type,admission_location,discharge_location,insurance,\
marital_status,race,hospital_expire_flag
11,,URGENT,EMERGENCY ROOM,HOME,Medicare,,WHITE,0
21,2150-01-02 09:30:00,EW EMER.,EMERGENCY ROOM,DIED,Other,SINGLE,ASIAN,1
31,,URGENT,EMERGENCY ROOM,HOME,Other,SINGLE,WHITE,0""",
    "icu/icustays": f"""subject_id,hadm_id,stay_id,first_careunit,last_careunit,intime,outtime,los
3,31,301,MICU,MICU,{IN},{OUT},2
1,11,102,SICU,SICU,2150-01-10 10:00:00,2150-01-11 10:00:00,1
1,11,101,MICU,SICU,{IN},{OUT},2
2,21,201,MICU,MICU,{IN},{OUT},2""",
    "hosp/d_labitems": """itemid,label,fluid,category
1,Creatinine,Blood,Chemistry
2,pH,Blood,Blood Gas
3,Glucose,Urine,Hematology
4,,Blood,Chemistry""",
    "icu/d_items": """itemid,label,abbreviation,category
10,Dextrose  5%,D5,Ingredients
11,Invasive Ventilation,Vent,2-Ventilation
12,Chest X-Ray,CXR,5-Imaging""",
    "hosp/labevents": f"""{LAB}
1,11,1,2150-01-01 09:59:59,2150-01-01 11:00:00,9.1,9.1,mg/dL,0.5,1.2,,STAT,
1,11,1,2150-01-01 10:00:00,2150-01-01 11:00:00,2.40,2.4,mg/dL,0.5,1.2,abnormal,STAT,___
1,11,1,2150-01-03 10:00:00,,0.9,0.9,mg/dL,0.5,1.2,,ROUTINE,"CALLED  TO ___
AT 10:30 PM, titer 1:40"
1,11,1,2150-01-03 10:00:01,2150-01-03 11:00:00,9.2,9.2,mg/dL,0.5,1.2,,STAT,
1,11,2,2150-01-10 10:00:00,2150-01-10 11:00:00,7.3200001,7.3200001,units,7.35,7.45,,,
1,11,3,2150-01-10 11:00:00,2150-01-10 12:00:00,___,,N/A,0,0,,,NEG.
1,11,3,2150-01-10 12:00:00,2150-01-10 12:00:00,>300,,mg/dL,,,,,
1,11,4,2150-01-10 13:00:00,2150-01-10 13:00:00,1234.56,1234.56, ,,,,,
1,,1,2150-01-10 14:00:00,2150-01-10 14:00:00,7,7,mg/dL,0.5,1.2,,,
2,21,1,2150-01-02 09:30:00,2150-01-02 09:40:00,3,3,mg/dL,0.5,1.2,,STAT,
2,21,1,2150-01-02 09:31:00,2150-01-02 09:40:00,4,4,mg/dL,0.5,1.2,,STAT,""",
    "hosp/microbiologyevents": """subject_id,hadm_id,chartdate,charttime,storedate,storetime,\
spec_type_desc,test_name,org_name,ab_name,interpretation,comments
2,21,2150-01-02 00:00:00,,2150-01-04 00:00:00,,BLOOD CULTURE,"Blood Culture, Routine",ESCHERICHIA COLI,CEFEPIME,R,unused
2,,2150-01-01 00:00:00,2150-01-01 12:00:00,,,URINE,URINE CULTURE,,,,NO  GROWTH.""",
    "hosp/prescriptions": f"""hadm_id,starttime,stoptime,drug,prod_strength,dose_val_rx,\
dose_unit_rx,form_unit_disp,route
21,{IN},2150-01-02 09:30:00,Norepinephrine,8mg/250mL,0.1,mcg/kg/min,BAG,IV
21,{IN},,Heparin,,"25,000",UNIT,,""",
    "icu/procedureevents": f"""stay_id,starttime,endtime,itemid,value,valueuom,location,statusdescription
201,{IN},2150-01-01 22:00:00,11,0.5,day,,FinishedRunning
201,{IN},2150-01-01 10:01:00,12,1,None,,FinishedRunning
201,{IN},2150-01-01 10:20:00,12,20,min,,Rewritten
201,{IN},2150-01-01 09:00:00,12,-60,min,,FinishedRunning""",
    "icu/ingredientevents": f"""stay_id,starttime,endtime,itemid,amount,amountuom,rate,rateuom,statusdescription
201,{IN},2150-01-01 11:00:00,10,49.999998807907104,ml,50,mL/hour,FinishedRunning
201,{IN},2150-01-01 11:30:00,99,0,ml,,,Stopped
201,{IN},2150-01-01 11:30:00,99,-5,ml,,,FinishedRunning
201,{IN},2150-01-01 11:30:00,99,5,ml,,,Rewritten""",
}


def write_folder(folder, **changed):
    """The tables above as a MIMIC-IV folder, every second one gzipped; `changed` maps a table's name to other text."""
    for number, (table, text) in enumerate(TABLES.items()):
        text = changed.get(table.split("/")[1], text)
        (folder / table).parent.mkdir(parents=True, exist_ok=True)
        if text is not None:
            path = folder / (f"{table}.csv" if number % 2 else f"{table}.csv.gz")
            path.write_bytes(text.encode() if number % 2 else gzip.compress(text.encode()))
    return folder


@pytest.fixture(scope="module")
def stays(tmp_path_factory):
    """{stay id: row as a dict} of the query's result."""
    folder = write_folder(tmp_path_factory.mktemp("it's a mimic"))
    rows = rows_of(folder, tmp_path_factory.mktemp("cache"))
    assert list(rows) == [101, 102, 201, 301]
    return rows


def rows_of(folder, cache):
    """{stay id: row as a dict} of the query's result on this folder."""
    return {
        row["icu_stay_id"]: row for row in pyarrow.parquet.read_table(train.run_mimic_query(folder, cache)).to_pylist()
    }


def kept_results(cache):
    """What runs left in the folder of results, beside the lock."""
    return [path for path in (cache / "query_results").iterdir() if path.name != ".lock"]


def texts(stay, event_type):
    return [event["event_text"] for event in stay["events"] if event["event_type"] == event_type]


def test_stay_columns_have_the_names_and_order_of_the_contract(stays):
    assert list(stays[101]) == [
        "patient_id",
        "admission_id",
        "icu_stay_id",
        "icu_intime",
        "icu_outtime",
        "patient_death_time",
        "patient_expired_in_hospital",
        "patient_gender",
        "patient_age",
        "patient_race",
        "marital_status",
        "admission_type",
        "admission_location",
        "insurance",
        "first_icu_careunit",
        "last_icu_careunit",
        "icu_length_of_stay_in_days",
        "discharge_location",
        "events",
    ]


def test_label_is_hospital_death_and_later_death_is_not(stays):
    assert {stay: row["patient_expired_in_hospital"] for stay, row in stays.items()} == {101: 0, 102: 0, 201: 1, 301: 0}
    assert stays[101]["patient_death_time"] is None and stays[201]["patient_death_time"] == datetime(2150, 1, 2, 9, 30)


def test_age_counts_on_from_the_anchor_year(stays):
    assert (stays[101]["patient_age"], stays[201]["patient_age"]) == (72, 50)


def test_events_lie_from_admission_to_discharge_both_included(stays):
    times = [event["event_time"] for event in stays[101]["events"]]
    assert times == [datetime(2150, 1, 1, 10), datetime(2150, 1, 3, 10)]


def test_events_after_death_are_left_out_though_icu_discharge_is_later(stays):
    assert max(event["event_time"] for event in stays[201]["events"]) == datetime(2150, 1, 2, 9, 30)


def test_two_stays_of_one_admission_share_no_event(stays):
    assert len(stays[101]["events"]) == 2 and len(stays[102]["events"]) == 5


def test_stay_without_events_is_kept(stays):
    assert not stays[301]["events"]


def test_minutes_to_final_event_end_at_death_or_discharge(stays):
    assert [e["relative_time_to_final_event"] for e in stays[101]["events"]] == [48 * 60, 0]
    assert stays[201]["events"][0]["relative_time_to_final_event"] == 23.5 * 60


def test_events_are_ordered_by_time_type_and_text(stays):
    keys = [(e["event_time"], e["event_type"], e["event_text"]) for e in stays[201]["events"]]
    assert keys == sorted(keys) and len(keys) == 9


def test_lab_text_has_value_range_level_and_flag(stays):
    assert texts(stays[101], "labevent")[0] == (
        "Lab: Creatinine (Blood, Chemistry) | Value: 2.4 mg/dL | Reference: 0.5-1.2 | Level: above range | "
        "Flag: abnormal"
    )


def test_lab_comment_loses_clock_time_and_line_break_but_not_titer(stays):
    assert texts(stays[101], "labevent")[1].endswith(
        "| Level: within range | Comment: CALLED TO ___ AT ___, titer 1:40"
    )


def test_lab_parts_that_are_missing_are_left_out(stays):
    assert texts(stays[102], "labevent") == [
        "Lab: pH (Blood, Blood Gas) | Value: 7.32 units | Reference: 7.35-7.45 | Level: slightly below range",
        "Lab: Glucose (Urine, Hematology) | Reference: 0-0 | Comment: NEG.",
        "Lab: Glucose (Urine, Hematology) | Value: >300 mg/dL",
        "Lab: item 4 (Blood, Chemistry) | Value: 1200",
        "Lab: Creatinine (Blood, Chemistry) | Value: 7 mg/dL | Reference: 0.5-1.2 | Level: far above range",
    ]


def test_other_texts_follow_the_wording(stays):
    assert texts(stays[201], "prescription") == [
        "Prescription: Heparin | Dose: 25,000 UNIT",
        "Prescription: Norepinephrine | Strength: 8mg/250mL | Form: BAG | Dose: 0.1 mcg/kg/min | Route: IV",
    ]
    assert texts(stays[201], "procedure_event") == [
        "Procedure: Chest X-Ray (5-Imaging) | Status: FinishedRunning",
        "Procedure: Invasive Ventilation (2-Ventilation) | Status: FinishedRunning | for 700 min",
    ]
    assert texts(stays[201], "ingredient") == [
        "Ingredient: Dextrose 5% | Rate: 50 mL/hour | Status: FinishedRunning",
        "Ingredient: item 99 | Amount: 0 ml | Status: Stopped",
    ]
    assert texts(stays[201], "microbiology") == [
        "Microbiology: URINE | Test: URINE CULTURE | Comment: NO GROWTH.",
        "Microbiology: BLOOD CULTURE | Test: Blood Culture, Routine | Organism: ESCHERICHIA COLI | "
        "Antibiotic: CEFEPIME | Interpretation: resistant",
    ]


def test_known_time_follows_store_and_end_times_and_is_null_where_unknown(stays):
    assert [e["event_known_time"] for e in stays[101]["events"]] == [datetime(2150, 1, 1, 11), None]
    known = {e["event_text"].split(" | ")[0]: e["event_known_time"] for e in stays[201]["events"]}
    assert known["Ingredient: Dextrose 5%"] == datetime(2150, 1, 1, 11)
    assert known["Procedure: Invasive Ventilation (2-Ventilation)"] == datetime(2150, 1, 1, 22)
    assert known["Prescription: Norepinephrine"] == datetime(2150, 1, 1, 10)
    assert known["Microbiology: URINE"] is None


def culture(stays):
    return next(e for e in stays[201]["events"] if "BLOOD CULTURE" in e["event_text"])


def test_culture_without_times_is_known_at_the_end_of_its_store_date(stays):
    assert culture(stays)["event_known_time"] == datetime(2150, 1, 4, 23, 59, 59)


def test_culture_with_a_day_only_counts_from_its_end_but_never_after_the_final_event(stays, tmp_path):
    assert culture(stays)["event_time"] == datetime(2150, 1, 2, 9, 30)  # the patient died on that day
    text = TABLES["hosp/microbiologyevents"].replace("2,21,2150-01-02", "2,21,2150-01-01")
    earlier = rows_of(write_folder(tmp_path / "mimic", microbiologyevents=text), tmp_path)
    assert culture(earlier)["event_time"] == datetime(2150, 1, 1, 23, 59, 59)


def test_lab_of_another_admission_is_left_out_and_one_of_none_belongs_to_the_stay_of_its_time(tmp_path):
    lab = f"{LAB}\n1,%s,1,2150-01-10 14:00:00,,7,7,mg/dL,0.5,1.2,,,"
    for admission, events in (("", 1), ("11", 1), ("12", 0)):
        folder = write_folder(tmp_path / f"mimic{admission}", labevents=lab % admission)
        assert len(rows_of(folder, tmp_path)[102]["events"] or []) == events


def test_orders_of_the_admissions_hour_count_from_the_admission(tmp_path):
    orders = "hadm_id,starttime,drug,prod_strength,dose_val_rx,dose_unit_rx,form_unit_disp,route"
    for start in ("2150-01-01 09:00:00", "2150-01-01 10:00:00", "2150-01-01 11:00:00"):
        orders += f"\n21,{start},Heparin,,1,UNIT,,"
    stays = TABLES["icu/icustays"].replace(f"2,21,201,MICU,MICU,{IN}", "2,21,201,MICU,MICU,2150-01-01 10:23:00")
    folder = write_folder(tmp_path / "mimic", prescriptions=orders, icustays=stays)
    events = [e for e in rows_of(folder, tmp_path)[201]["events"] if e["event_type"] == "prescription"]
    assert [e["event_time"] for e in events] == [datetime(2150, 1, 1, 10, 23), datetime(2150, 1, 1, 11)]


@pytest.mark.parametrize(
    "discharge, death, days",
    [
        ("2150-01-03 10:00:00", "", 2),
        ("2150-01-03 10:00:00", "2150-01-02 10:00:00", 1),
        ("2150-01-03 10:00:00", "2150-01-09 10:00:00", 2),
        ("", "2150-01-02 22:00:00", 1.5),
        ("", "", None),
    ],
)
def test_stay_ends_at_discharge_or_death_whichever_is_known_and_first(discharge, death, days, tmp_path):
    stays = f"{TABLES['icu/icustays'].splitlines()[0]}\n2,21,201,MICU,MICU,{IN},{discharge},9"
    admissions = TABLES["hosp/admissions"].replace("2150-01-02 09:30:00", death)
    folder = write_folder(tmp_path / "mimic", icustays=stays, admissions=admissions)
    assert rows_of(folder, tmp_path)[201]["icu_length_of_stay_in_days"] == days


LEVELS = [
    (2.4, 0.5, 1.2, "above range"),
    (2.5, 0.5, 1.2, "far above range"),
    (1.3, 0.5, 1.2, "slightly above range"),
    (1.2, 0.5, 1.2, "within range"),
    (0.5, 0.5, 1.2, "within range"),
    (7.0, 7.35, 7.45, "far below range"),
    (7.29, 7.35, 7.45, "below range"),
    (150, 133, 145, "slightly above range"),
    (160, 133, 145, "above range"),
    (170, 133, 145, "far above range"),
    (40, 150, 400, "far below range"),
    (140, 150, 400, "slightly below range"),
    (-5, -2, 2, "below range"),
    (30, 0, 0, "above range"),
    (9, "", 4, "far above range"),
    (3, 4, "", "below range"),
    (5, 4, "", "within range"),
    (9, 4, 2, None),
]


def test_level_says_how_far_a_value_lies_from_its_range(tmp_path):
    rows = [
        f"1,11,1,2150-01-01 11:{minute:02}:00,,,{value},u,{low},{high},,,"
        for minute, (value, low, high, _) in enumerate(LEVELS)
    ]
    folder = write_folder(tmp_path / "mimic", labevents="\n".join([LAB, *rows]))
    stay = pyarrow.parquet.read_table(train.run_mimic_query(folder, tmp_path)).to_pylist()[0]
    written = [text.partition(" | Level: ")[2] or None for text in texts(stay, "labevent")]
    assert written == [level for *_, level in LEVELS]


ROUNDINGS = [
    ("49.999998807907104", "", "", "50"),
    ("0.0312456", "", "", "0.031"),
    ("15432.4", "", "", "15000"),
    ("0", "", "", "0"),
    ("34.6", "40", "51", "35"),
    ("1.234", "0.5", "1.2", "1.23"),
    ("1.025", "1.001", "1.035", "1.025"),
    ("4.56", "0.5", "1.2", "4.6"),
    ("345", "70", "100", "350"),
    ("0.021", "0.27", "4.2", "0.021"),
    ("-4.04", "-2", "2", "-4"),
    ("4.04", "4.1", "5.1", "4"),
]


def test_numbers_are_rounded_to_what_a_clinician_would_write(tmp_path):
    rows = [
        f"1,11,1,2150-01-01 11:{minute:02}:00,,,{value},,{low},{high},,,"
        for minute, (value, low, high, _) in enumerate(ROUNDINGS)
    ]
    folder = write_folder(tmp_path / "mimic", labevents="\n".join([LAB, *rows]))
    stay = pyarrow.parquet.read_table(train.run_mimic_query(folder, tmp_path)).to_pylist()[0]
    values = [text.split(" | ")[1] for text in texts(stay, "labevent")]
    assert values == [f"Value: {written}" for *_, written in ROUNDINGS]


def test_result_is_reused_until_a_file_changes(tmp_path):
    folder = write_folder(tmp_path / "mimic")
    first = train.run_mimic_query(folder, tmp_path)
    made = first.stat().st_mtime_ns
    assert train.run_mimic_query(folder, tmp_path) == first and first.stat().st_mtime_ns == made
    write_folder(folder, prescriptions=TABLES["hosp/prescriptions"].replace("Heparin", "Insulin"))
    assert train.run_mimic_query(folder, tmp_path) != first
    assert not leftovers(tmp_path)


def test_what_a_killed_run_left_is_cleared_away(tmp_path):
    left = tmp_path / "query_results" / f".query{train.HALF_WRITTEN}killed"
    left.mkdir(parents=True)
    (left / "mimic.duckdb").write_bytes(bytes(1000))
    train.run_mimic_query(write_folder(tmp_path / "mimic"), tmp_path)
    assert not leftovers(tmp_path)


def test_slices_of_stays_give_the_same_result(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "mimic")
    whole = train.run_mimic_query(folder, tmp_path / "whole")
    monkeypatch.setattr(train, "ROWS_PER_SLICE", 6)
    sliced = train.run_mimic_query(folder, tmp_path / "sliced")
    assert pyarrow.parquet.read_table(whole).equals(pyarrow.parquet.read_table(sliced))


def test_folder_without_tables_names_them(tmp_path):
    with pytest.raises(train.InputError, match=r"hosp/labevents\.csv.*not found"):
        train.run_mimic_query(write_folder(tmp_path, labevents=None), tmp_path)


def test_missing_column_is_named(tmp_path):
    folder = write_folder(tmp_path, d_labitems="itemid,label,category\n1,Creatinine,Chemistry")
    with pytest.raises(train.InputError, match="d_labitems.*no column fluid"):
        train.run_mimic_query(folder, tmp_path)


def test_truncated_gzip_is_an_input_error(tmp_path):
    path = next(path for path in write_folder(tmp_path).rglob("*.csv.gz"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(train.InputError, match="cannot be read"):
        train.run_mimic_query(tmp_path, tmp_path)


@pytest.mark.parametrize(
    "broken",
    [
        TABLES["hosp/labevents"].replace("2.40,2.4,", "2.40,two,"),
        TABLES["hosp/labevents"].replace("2.40,2.4,", "2.40,"),
    ],
)
def test_malformed_rows_are_an_input_error_without_their_content(tmp_path, broken):
    with pytest.raises(train.InputError, match="labevents") as caught:
        train.run_mimic_query(write_folder(tmp_path, labevents=broken), tmp_path)
    assert "two" not in str(caught.value) and "2150" not in str(caught.value)
    assert caught.value.__cause__ is None and not kept_results(tmp_path)


def test_query_has_no_table_but_those_that_are_read():
    tree = train.sqlglot.parse_one(train.QUERY_FILE.read_text(encoding="utf-8"), read="bigquery")
    used = [table for table in tree.find_all(train.sqlglot.exp.Table) if table.db]
    assert {f"{table.db.rsplit('_', 1)[1]}/{table.name}" for table in used} == set(train.MIMIC_TABLES)


# ---- what the folder path counts, leaves out and refuses ----


def read(tmp_path, **changed):
    return train.read_stays(write_folder(tmp_path / "mimic", **changed), tmp_path)


def account(repairs, table):
    return next(account for account in repairs.sources if account.table == table)


ADMISSIONS, STAYS, LABS = TABLES["hosp/admissions"], TABLES["icu/icustays"], TABLES["hosp/labevents"]
STAY_201 = f"2,21,201,MICU,MICU,{IN},{OUT},2"
BAD_STAYS = {
    "no discharge and no death": (
        {"icustays": STAYS.replace(f"101,MICU,SICU,{IN},{OUT}", f"101,MICU,SICU,{IN},")},
        101,
    ),
    "no admission time": ({"icustays": STAYS.replace(STAY_201, f"2,21,201,MICU,MICU,,{OUT},2")}, 201),
    "no flag": ({"admissions": ADMISSIONS.replace("ASIAN,1", "ASIAN,")}, 201),
    "a flag of 2": ({"admissions": ADMISSIONS.replace("ASIAN,1", "ASIAN,2")}, 201),
    "a death in the stay and flag 0": ({"admissions": ADMISSIONS.replace("ASIAN,1", "ASIAN,0")}, 201),
    "dead before the stay": ({"admissions": ADMISSIONS.replace("2150-01-02 09:30", "2149-12-31 09:30")}, 201),
}


@pytest.mark.parametrize("name", BAD_STAYS)
def test_one_bad_stay_is_left_out_counted_and_named(name, tmp_path, caplog):
    changed, stay = BAD_STAYS[name]
    table, repairs = read(tmp_path, **changed)
    assert stay not in table.stays.icu_stay_id.tolist() and len(table.stays) == 2
    (reason,) = [reason for reason in repairs if "without events" not in reason and "duplicate" not in reason]
    assert repairs[reason] == 1 and f"{reason}: icu_stay_id {stay}" in caplog.text and ".parquet" not in caplog.text


def test_stay_without_discharge_ends_at_its_death(tmp_path):
    table, repairs = read(tmp_path, icustays=STAYS.replace(STAY_201, f"2,21,201,MICU,MICU,{IN},,"))
    assert table.stays.icu_stay_id.tolist() == [101, 102, 201]
    assert train.stay_hours(table)[2] == 23.5 and table.minutes_to_end.min() == 0


def test_every_row_of_every_table_is_accounted_for(tmp_path):
    foreign = "\n7,71,1,2150-01-01 12:00:00,,1,1,,,,,,\n7,71,1,2150-01-01 12:00:00,,1,1,,,,,,"
    _, repairs = read(tmp_path, labevents=LABS + foreign + "\n1,11,1,,,1,1,,,,,,")
    assert account(repairs, "hosp/labevents") == train.SourceTable(
        "hosp/labevents", 14, 12, 8, {"without a time": 1, "outside the ICU stays": 3}
    )
    assert account(repairs, "icu/procedureevents").lost == {"rewritten, never done": 1, "of a negative duration": 1}
    assert account(repairs, "icu/ingredientevents")[1:4] == (4, 4, 2)
    assert account(repairs, "hosp/microbiologyevents").noted == {
        "(used or not) have a day without a time: its end is taken": 1
    }
    assert account(repairs, "icu/icustays")[1:4] == (4, 4, 4)


def test_stays_whose_admission_or_patient_is_missing_are_counted(tmp_path):
    stays = STAYS + f"\n4,41,401,MICU,MICU,{IN},{OUT},2\n1,,402,MICU,MICU,{IN},{OUT},2"
    _, repairs = read(tmp_path, icustays=stays, patients=TABLES["hosp/patients"].replace("\n3,M", "\n33,M"))
    assert account(repairs, "icu/icustays").lost == {
        "whose hadm_id is not in hosp/admissions": 1,
        "whose subject_id is not in hosp/patients": 1,
        "without hadm_id": 1,
    }


def test_table_of_another_release_is_a_warning_that_names_it(tmp_path, caplog):
    _, repairs = read(tmp_path, ingredientevents=TABLES["icu/ingredientevents"].replace("\n201,", "\n999,"))
    repairs.log()
    assert "icu/ingredientevents contributes nothing: 4 rows read, 0 of the cohort" in caplog.text


@pytest.mark.parametrize("table", train.MIMIC_KEYS)
def test_key_that_stands_twice_is_an_error(table, tmp_path):
    text = TABLES[table]
    with pytest.raises(train.InputError, match=f"{table}: 1 values of {train.MIMIC_KEYS[table]} stand in more"):
        read(tmp_path, **{table.split("/")[1]: text + "\n" + text.splitlines()[1]})


def test_a_table_in_both_forms_is_an_error_that_names_both(tmp_path):
    folder = write_folder(tmp_path / "mimic")
    (folder / "hosp" / "patients.csv").write_text(TABLES["hosp/patients"])
    with pytest.raises(train.InputError, match=r"patients\.csv and .*patients\.csv\.gz are the same table"):
        train.read_stays(folder, tmp_path)


def test_stale_shards_of_an_earlier_export_are_refused(tmp_path):
    (result,) = train.run_mimic_query(write_folder(tmp_path / "mimic"), tmp_path).glob("*.parquet")
    for name in ("new-000.parquet", "old-000.parquet"):
        (tmp_path / name).write_bytes(result.read_bytes())
    with pytest.raises(train.InputError, match=r"4 stays .*first icu_stay_id 101 in .*new-000.*old-000"):
        train.read_stays(tmp_path / "*.parquet")


@pytest.mark.parametrize("word", ["nan", "NaN", "inf", "None", "NULL"])
def test_words_for_a_missing_value_are_no_value(word, tmp_path):
    row = f"1,11,1,2150-01-10 11:00:00,,{word},{word},{word},0.5,1.2,{word},,{word}"
    table, _ = read(tmp_path, labevents=f"{LAB}\n{row}")
    assert "Lab: Creatinine (Blood, Chemistry) | Reference: 0.5-1.2" in table.texts.tolist()


def test_none_in_capitals_is_a_finding(tmp_path):
    table, _ = read(tmp_path, labevents=f"{LAB}\n1,11,3,2150-01-10 11:00:00,,NONE,,,,,,,")
    assert "Lab: Glucose (Urine, Hematology) | Value: NONE" in table.texts.tolist()


def test_rows_that_begin_with_a_hash_and_long_comments_are_read(tmp_path):
    items = TABLES["hosp/d_labitems"].replace("1,Creatinine,", '1,"#Creatinine",') + "\n#5,x,Blood,x"
    with pytest.raises(train.InputError, match=r"d_labitems.*itemid \(BIGINT\) in 1 rows"):
        read(tmp_path, d_labitems=items)
    long = f"{LAB}\n1,11,1,2150-01-10 11:00:00,,1,1,,,,,,{'x' * 3_000_000}"
    assert max(map(len, read(tmp_path, labevents=long)[0].texts)) > 3_000_000


def test_stay_across_a_clock_change_is_as_long_in_every_time_zone(tmp_path):
    """In New York, the hour from 2 to 3 of 8 March 2150 does not exist."""
    later = lambda date: f"2150-03-{int(date[1]) + 6:02d}"
    moved = {table.split("/")[1]: re.sub(r"2150-01-(\d\d)", later, text) for table, text in TABLES.items()}
    folder = write_folder(tmp_path / "mimic", **moved)
    program = (
        "import sys, train; table, _ = train.read_stays(sys.argv[1], sys.argv[2]);"
        "print(table.stays.icu_length_of_stay_in_days.tolist(), table.minutes_to_end.max())"
    )
    command = [sys.executable, "-c", program, str(folder), str(tmp_path / "cache")]
    environment = os.environ | {"TZ": "America/New_York", "PYTHONPATH": str(train.HERE)}
    there = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    table, _ = train.read_stays(write_folder(tmp_path / "unmoved"), tmp_path / "here")
    days = table.stays["icu_length_of_stay_in_days"].tolist()
    assert (
        there.strip() == f"{days} {table.minutes_to_end.max()}" and 2.0 in days and table.minutes_to_end.max() == 2880
    )
