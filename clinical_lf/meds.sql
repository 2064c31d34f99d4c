-- A MEDS data set as the tables stay_rows and event_rows, in DuckDB: parts with names (`-- name:`), run by meds.py.
-- What stands in braces is filled in, the files and the hours of the task; $hours, those of made labels, is bound.

-- name: codes
-- The columns that say something; a data set without one of them has it empty.
CREATE TEMP VIEW meds_rows AS
SELECT subject_id, time, code, numeric_value::DOUBLE AS number, text_value, unit, route, statusdescription,
       race AS patient_race, insurance, marital_status
FROM (
    FROM read_parquet({data}, union_by_name = true, hive_partitioning = false)
    UNION ALL BY NAME
    SELECT NULL::FLOAT AS numeric_value, '' AS text_value, '' AS unit, '' AS route, '' AS statusdescription,
           '' AS race, '' AS insurance, '' AS marital_status WHERE false
);
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
)
SELECT code, parts[1] AS kind, event_type, coalesce(number_word, 'Value') AS number_word,
       CASE WHEN has_numbers AND len(parts) > 2 AND NOT regexp_full_match(parts[-1], '\d*|UNK')
            THEN parts[-1] END AS code_unit,
       CASE WHEN parts[2] IN ('START', 'STOP', 'END') THEN lower(parts[2]) END AS code_status,
       nullif(array_to_string(list_filter(parts[2:], lambda part:
           part NOT IN ('START', 'STOP', 'END', 'UNK', '', coalesce(code_unit, ''))), ' '), '') AS words,
       concat_ws(': ', coalesce(text_word, replace(parts[1], '_', ' ')), coalesce(description, words)) AS item
FROM used LEFT JOIN described USING (code) LEFT JOIN read_csv({kinds}, header = true) AS k ON k.kind = parts[1]

-- name: made labels
-- `--labels mortality-in-icu@24h`: one label per ICU stay that lasts until the prediction and the gap after it. A code
-- of discharge says DIED or EXPIRED; a death before the discharge is one too.
CREATE TEMP TABLE label_rows AS
WITH ends AS (FROM meds_rows WHERE regexp_matches(code, '^(ICU_DISCHARGE|HOSPITAL_DISCHARGE|MEDS_DEATH$)'))
SELECT subject_id, i.time + to_seconds($hours * 3600) AS prediction_time,
       min(e.time) FILTER (e.time > i.time AND e.code LIKE 'ICU_DISCHARGE%') AS outtime,
       min_by(struct_pack(at := e.time, died := regexp_matches(e.code, 'DIED|EXPIRED')), e.time)
       FILTER (e.time > i.time AND e.code LIKE 'HOSPITAL_DISCHARGE%') AS discharge,
       min(e.time) FILTER (e.code = 'MEDS_DEATH') AS death,
       coalesce((discharge).died OR death <= coalesce((discharge).at, outtime), false) AS boolean_value,
       least(outtime, (discharge).at, death) > i.time + to_seconds(($hours + {gap_hours}::DOUBLE) * 3600) AS lasts
FROM meds_rows AS i LEFT JOIN ends AS e USING (subject_id) WHERE i.code LIKE 'ICU_ADMISSION%'
GROUP BY subject_id, i.time

-- name: stays
-- One sequence per label row: the subject's events up to and including the prediction, the last hours of them if asked.
CREATE TEMP TABLE samples AS
SELECT row_number() OVER (ORDER BY subject_id, prediction_time) AS icu_stay_id, subject_id, prediction_time,
       any_value(boolean_value)::INTEGER AS label,
       CASE WHEN {history_hours} > 0 THEN prediction_time - to_seconds({history_hours}::DOUBLE * 3600) END AS since
FROM label_rows GROUP BY subject_id, prediction_time;
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
    SELECT *, CASE event_type WHEN 'ingredient' THEN 2 ELSE 3 END AS digits,
           pow(10, greatest(0, digits - 1 - coalesce(floor(log10(abs(nullif(number, 0)))), 0))) AS scale
    FROM meds_rows JOIN meds_codes USING (code)
) AS r
JOIN samples AS s ON s.subject_id = r.subject_id AND r.time <= prediction_time AND (since IS NULL OR r.time > since)
WHERE kind NOT IN ('MEDS_BIRTH', 'MEDS_DEATH') AND NOT regexp_matches(code, '(^|//)(DIED|EXPIRED)($|//)');
-- What is known of a patient beside the events, with the time since when; the latest before the prediction counts.
CREATE TEMP TABLE stay_rows AS
WITH facts AS (
    SELECT subject_id, time, name, split_part(code, '//', part) AS value
    FROM meds_rows JOIN read_csv({facts}, header = true) ON split_part(code, '//', 1) = kind
    UNION ALL
    UNPIVOT (SELECT subject_id, time, patient_race, insurance, marital_status FROM meds_rows)
    ON patient_race, insurance, marital_status INTO NAME name VALUE value
),
known AS (
    SELECT icu_stay_id, name, value, coalesce(time, TIMESTAMP '0001-01-01') AS since_when
    FROM samples JOIN facts USING (subject_id)
    WHERE value NOT IN ('', 'UNK') AND (time IS NULL OR time <= prediction_time)
)
SELECT subject_id AS patient_id, icu_stay_id AS admission_id, icu_stay_id, label AS patient_expired_in_hospital,
       coalesce(since, first_time, prediction_time) AS icu_intime, prediction_time AS icu_outtime,
       said.* EXCLUDE (icu_stay_id), floor(date_diff('day', birth, prediction_time) / 365.25) AS patient_age,
       NULL::TIMESTAMP AS patient_death_time, NULL::DOUBLE AS icu_length_of_stay_in_days, NULL AS last_icu_careunit,
       NULL AS discharge_location
FROM samples
LEFT JOIN (SELECT subject_id, min(time) AS birth FROM meds_rows WHERE code = 'MEDS_BIRTH' GROUP BY 1) USING (subject_id)
LEFT JOIN (SELECT icu_stay_id, min(event_time) AS first_time FROM event_rows GROUP BY icu_stay_id) USING (icu_stay_id)
LEFT JOIN (PIVOT known ON name IN ('patient_gender', 'patient_race', 'marital_status', 'admission_type',
           'admission_location', 'insurance', 'first_icu_careunit')
           USING max_by(value, since_when) GROUP BY icu_stay_id) AS said USING (icu_stay_id)
