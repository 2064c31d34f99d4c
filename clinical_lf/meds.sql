-- A MEDS data set as the tables stay_rows and event_rows, in DuckDB: statements with names (`-- name:`), run in order
-- by meds.py. Parameters in dollars are bound; those in braces are lists of files.

-- name: rows
-- The columns that say something; a data set without one of them has it empty.
CREATE TEMP VIEW meds_rows AS
SELECT subject_id, time, code, numeric_value::DOUBLE AS number, text_value, unit, route, statusdescription,
       race, insurance, marital_status
FROM (
    SELECT * FROM read_parquet({data}, union_by_name = true, hive_partitioning = false)
    UNION ALL BY NAME
    SELECT NULL::FLOAT AS numeric_value, NULL::VARCHAR AS text_value, NULL::VARCHAR AS unit, NULL::VARCHAR AS route,
           NULL::VARCHAR AS statusdescription, NULL::VARCHAR AS race, NULL::VARCHAR AS insurance,
           NULL::VARCHAR AS marital_status
    WHERE false
)

-- name: codes
-- What a code says, once per code. Its first part is the kind; the last of three or more is the unit where the code has
-- numbers ("LAB//50971//mEq/L"); a START, STOP or END in second place is a status; the rest are words.
CREATE TEMP TABLE meds_codes AS
WITH used AS (
    SELECT code, string_split(code, '//') AS parts, count(number) > 0 AS has_numbers
    FROM meds_rows WHERE time IS NOT NULL GROUP BY code
),
described AS (
    SELECT code, any_value(nullif(trim(regexp_replace(description, '\s+', ' ', 'g')), '')) AS description
    FROM read_parquet({codes}) GROUP BY code
),
named AS (
    SELECT code, parts[1] AS kind, description,
           CASE WHEN has_numbers AND len(parts) > 2 AND NOT regexp_full_match(parts[-1], '\d*|UNK')
                THEN parts[-1] END AS code_unit,
           CASE WHEN parts[2] IN ('START', 'STOP', 'END') THEN lower(parts[2]) END AS code_status,
           list_filter(parts[2:], lambda part: part NOT IN ('START', 'STOP', 'END', 'UNK', '')) AS words
    FROM used LEFT JOIN described USING (code)
)
SELECT code, kind, code_unit, code_status, event_type, coalesce(number_word, 'Value') AS number_word,
       CASE event_type WHEN 'ingredient' THEN 2 ELSE 3 END AS digits,
       concat_ws(': ', coalesce(text_word, replace(kind, '_', ' ')), coalesce(description, nullif(
           array_to_string(list_filter(words, lambda word: word IS DISTINCT FROM code_unit), ' '), ''))) AS item
FROM named LEFT JOIN (VALUES
    ('LAB', 'labevent', 'Lab', 'Value'),
    ('MEDICATION', 'prescription', 'Prescription', 'Dose'),
    ('INFUSION_START', 'ingredient', 'Ingredient', 'Rate'),
    ('INFUSION_END', 'ingredient', 'Ingredient', 'Amount'),
    ('PROCEDURE', 'procedure_event', 'Procedure', 'Value'),
    ('MICROBIOLOGY', 'microbiology', 'Microbiology', 'Value')
) AS kinds(kind, event_type, text_word, number_word) USING (kind)

-- name: made labels
-- `--labels mortality-in-icu@24h`: one label per ICU stay that lasts until the prediction and the gap after it. A code
-- of discharge says DIED or EXPIRED; a death before the discharge is one too.
CREATE TEMP TABLE label_rows AS
WITH stays AS (
    SELECT DISTINCT subject_id, time AS intime,
           (SELECT min(time) FROM meds_rows AS o WHERE o.subject_id = i.subject_id AND o.time > i.time
            AND o.code LIKE 'ICU_DISCHARGE%') AS outtime,
           (SELECT min_by(struct_pack(at := time, died := regexp_matches(code, 'DIED|EXPIRED')), time)
            FROM meds_rows AS d WHERE d.subject_id = i.subject_id AND d.time > i.time
            AND d.code LIKE 'HOSPITAL_DISCHARGE%') AS discharge,
           (SELECT min(time) FROM meds_rows AS m WHERE m.subject_id = i.subject_id AND m.code = 'MEDS_DEATH') AS death
    FROM meds_rows AS i WHERE code LIKE 'ICU_ADMISSION%'
)
SELECT subject_id, intime + to_seconds($hours * 3600) AS prediction_time,
       coalesce(discharge.died, false) OR coalesce(death <= coalesce(discharge.at, outtime), false) AS boolean_value,
       least(outtime, discharge.at, death) > intime + to_seconds(($hours + $gap) * 3600) AS lasts
FROM stays

-- name: label conflicts
SELECT count(*) FROM (
    SELECT subject_id FROM label_rows GROUP BY subject_id, prediction_time HAVING count(DISTINCT boolean_value) > 1
)

-- name: late labels
DELETE FROM label_rows USING meds_rows AS m
WHERE m.subject_id = label_rows.subject_id AND m.code = 'MEDS_DEATH' AND m.time <= prediction_time

-- name: samples
-- One sequence per label row: the subject's events up to and including the prediction, the last hours of them if asked.
CREATE TEMP TABLE samples AS
SELECT row_number() OVER (ORDER BY subject_id, prediction_time) AS icu_stay_id, subject_id, prediction_time,
       any_value(boolean_value)::INTEGER AS label,
       prediction_time - to_seconds($history_hours * 3600) AS since
FROM label_rows GROUP BY subject_id, prediction_time

-- name: facts
-- What is known of a patient beside the events, with the time since when; the latest before the prediction counts.
CREATE TEMP TABLE facts AS
WITH from_codes(kind, part, name) AS (VALUES
    ('GENDER', 2, 'gender'), ('SEX', 2, 'gender'), ('RACE', 2, 'race'), ('ETHNICITY', 2, 'race'),
    ('INSURANCE', 2, 'insurance'), ('MARITAL_STATUS', 2, 'marital_status'), ('ICU_ADMISSION', 2, 'careunit'),
    ('HOSPITAL_ADMISSION', 2, 'admission_type'), ('HOSPITAL_ADMISSION', 3, 'admission_location')
),
said AS (
    SELECT subject_id, time, name, split_part(code, '//', part) AS value
    FROM meds_rows JOIN from_codes ON split_part(code, '//', 1) = kind
    UNION ALL
    UNPIVOT (SELECT subject_id, time, race, insurance, marital_status FROM meds_rows)
    ON race, insurance, marital_status INTO NAME name VALUE value
)
SELECT subject_id, coalesce(time, TIMESTAMP '0001-01-01') AS since, name, value
FROM said WHERE value NOT IN ('', 'UNK')

-- name: events
CREATE TEMP TABLE event_rows AS
SELECT icu_stay_id, time AS event_time, time AS event_known_time, coalesce(event_type, lower(kind)) AS event_type,
       concat_ws(' | ', item,
           number_word || ': ' || coalesce(
               nullif(CASE WHEN TRY_CAST(text_value AS DOUBLE) IS NULL THEN trim(text_value) END, '___'),
               regexp_replace(CAST(round(number * scale) / scale AS VARCHAR), '\.0$', '')
               || coalesce(' ' || coalesce(nullif(unit, ''), code_unit), '')),
           'Route: ' || nullif(trim(route), ''),
           'Status: ' || coalesce(nullif(trim(statusdescription), ''), code_status)) AS event_text,
       epoch(prediction_time - time) / 60 AS relative_time_to_final_event
FROM (
    SELECT *, pow(10, greatest(0, digits - 1 - coalesce(floor(log10(abs(nullif(number, 0)))), 0))) AS scale
    FROM meds_rows JOIN meds_codes USING (code)
) AS r
JOIN samples AS s
  ON s.subject_id = r.subject_id AND r.time <= prediction_time AND ($history_hours = 0 OR r.time > since)
WHERE kind NOT IN ('MEDS_BIRTH', 'MEDS_DEATH') AND NOT regexp_matches(code, '(^|//)(DIED|EXPIRED)($|//)')

-- name: stays
CREATE TEMP TABLE stay_rows AS
WITH first_events AS (SELECT icu_stay_id, min(event_time) AS first_time FROM event_rows GROUP BY icu_stay_id),
known AS (
    SELECT icu_stay_id, name, max_by(value, f.since) AS value
    FROM samples JOIN facts AS f ON f.subject_id = samples.subject_id AND f.since <= prediction_time
    GROUP BY icu_stay_id, name
)
SELECT s.subject_id AS patient_id, icu_stay_id AS admission_id, icu_stay_id,
       CASE WHEN $history_hours > 0 THEN since ELSE coalesce(first_time, prediction_time) END AS icu_intime,
       prediction_time AS icu_outtime, NULL::TIMESTAMP AS patient_death_time, label AS patient_expired_in_hospital,
       gender AS patient_gender, floor(date_diff('day', birth, prediction_time) / 365.25) AS patient_age,
       race AS patient_race, marital_status, admission_type, admission_location, insurance,
       careunit AS first_icu_careunit, NULL AS last_icu_careunit, NULL::DOUBLE AS icu_length_of_stay_in_days,
       NULL AS discharge_location
FROM samples AS s
LEFT JOIN first_events USING (icu_stay_id)
LEFT JOIN (PIVOT known ON name IN ('gender', 'race', 'marital_status', 'admission_type', 'admission_location',
           'insurance', 'careunit') USING any_value(value) GROUP BY icu_stay_id) USING (icu_stay_id)
LEFT JOIN (SELECT subject_id, min(time) AS birth FROM meds_rows WHERE code = 'MEDS_BIRTH' GROUP BY subject_id)
       AS births ON births.subject_id = s.subject_id
