-- A MEDS data set as the tables stay_rows and event_rows, in DuckDB: parts with names (`-- name:`), run by meds.py.
-- What stands in braces is filled in, hours of the task; what the made labels are is bound ($).

-- name: codes
-- A number that is none (NaN, infinity) is missing; one that only text_value has is one all the same.
CREATE TEMP MACRO finite(number) AS CASE WHEN isfinite(number) THEN number END;
CREATE TEMP VIEW meds_rows AS
SELECT * REPLACE (CASE WHEN TRY_CAST(text_value AS DOUBLE) IS NULL THEN nullif(null_if_missing(text_value), '___') END
                  AS text_value),
       coalesce(finite(numeric_value), finite(TRY_CAST(text_value AS DOUBLE))) AS number
FROM data;
-- What a code says, once per code. It begins with its kind, the longest of the known ones or its first part; a START,
-- STOP or END after it is a status. The last of two or more parts is the unit where the code has numbers, or follows the
-- number of a lab ("LAB//50971//mEq/L"); the rest are words, its name where no description is known.
CREATE TEMP TABLE meds_codes AS
WITH used AS (SELECT code, count(number) > 0 AS has_numbers FROM meds_rows WHERE time IS NOT NULL GROUP BY code),
described AS (SELECT code, min(nullif(trim(description), '')) AS description FROM codes GROUP BY code)
SELECT code, event_type, coalesce(number_word, 'Value') AS number_word, description IS NOT NULL AS is_described,
       coalesce(prefix, split_part(code, '//', 1)) AS kind, string_split(substr(code, length(kind) + 3), '//') AS parts,
       CASE WHEN parts[1] IN ('START', 'STOP', 'END') THEN lower(parts[1]) END AS code_status,
       CASE WHEN code_status IS NULL THEN parts ELSE parts[2:] END AS names,
       CASE WHEN len(names) > 1 AND NOT regexp_full_match(names[-1], '\d*|UNK')
             AND (has_numbers OR event_type = 'labevent' AND regexp_full_match(names[-2], '\d+'))
            THEN names[-1] END AS code_unit,
       CASE WHEN code_unit IS NULL THEN names ELSE names[:-2] END AS name_parts,
       nullif(array_to_string(list_filter(name_parts, lambda name: name NOT IN ('UNK', '')), ' '), '') AS words,
       concat_ws(': ', coalesce(text_word, replace(kind, '_', ' ')), coalesce(description, words)) AS said,
       regexp_replace(replace(said, '|', '/'), '\s+', ' ', 'g') AS item
FROM used LEFT JOIN described USING (code)
LEFT JOIN kinds ON starts_with(code || '//', prefix || '//')
QUALIFY row_number() OVER (PARTITION BY code ORDER BY length(prefix) DESC NULLS LAST) = 1

-- name: made labels
-- One label per ICU stay. A discharge counts before the next admission only, and is a death where it says DIED or
-- EXPIRED; a hospital admission during the stay is the stay's own. NULL is what the data do not tell.
CREATE TEMP MACRO first_after(times, moment) AS list_min(list_filter(times, lambda time: time > moment));
CREATE TEMP MACRO end_before(ending, next_begin) AS CASE WHEN coalesce(ending <= next_begin, true) THEN ending END;
CREATE TEMP TABLE label_rows AS
WITH subjects AS (
    SELECT subject_id, max(time) AS followed_until, list(DISTINCT time) FILTER (kind = 'ICU_ADMISSION') AS intimes,
           list(time) FILTER (kind = 'ICU_DISCHARGE') AS outtimes,
           list(time) FILTER (kind = 'HOSPITAL_ADMISSION') AS admissions,
           list(time) FILTER (kind = 'HOSPITAL_DISCHARGE') AS discharges,
           min(time) FILTER (regexp_matches(code, '^MEDS_DEATH$|^[A-Z]+_DISCHARGE.*(DIED|EXPIRED)')) AS death
    FROM meds_rows JOIN meds_codes USING (code) WHERE time IS NOT NULL GROUP BY subject_id
),
stays AS (
    SELECT *, end_before(first_after(outtimes, intime), first_after(intimes, intime)) AS outtime,
           first_after(admissions, coalesce(outtime, intime)) AS next_admission,
           end_before(first_after(discharges, intime), next_admission) AS discharge, intime + INTERVAL 30 DAY AS day_30
    FROM (SELECT *, unnest(intimes) AS intime FROM subjects)
)
SELECT subject_id, intime + to_seconds($hours * 3600) AS prediction_time,
       least(outtime, discharge, death) > prediction_time + to_seconds({gap_hours}::DOUBLE * 3600) AS lasts,
       CASE $outcome WHEN 'hospital' THEN coalesce(discharge, CASE WHEN death <= outtime THEN outtime END)
                     WHEN 'icu' THEN outtime
                     ELSE CASE WHEN death IS NOT NULL OR followed_until >= day_30 THEN day_30 END END AS until,
       CASE WHEN until IS NOT NULL THEN coalesce(death <= until, false) END AS boolean_value
FROM stays

-- name: untold labels
DELETE FROM label_rows WHERE lasts IS NULL OR boolean_value IS NULL

-- name: contradictions
SELECT count(*) FROM (SELECT subject_id FROM label_rows GROUP BY subject_id, prediction_time
                      HAVING count(DISTINCT boolean_value) > 1)

-- name: labels after death
DELETE FROM label_rows USING data AS m
WHERE m.subject_id = label_rows.subject_id AND m.code = 'MEDS_DEATH' AND m.time <= prediction_time

-- name: stays
-- One sequence per label row: the subject's events up to and including the prediction, the last hours of them if asked.
CREATE TEMP TABLE samples AS
SELECT row_number() OVER (ORDER BY subject_id, prediction_time) AS icu_stay_id, subject_id, prediction_time,
       any_value(boolean_value)::INTEGER AS label,
       CASE WHEN {history_hours} > 0 THEN prediction_time - to_seconds({history_hours}::DOUBLE * 3600) END AS since
FROM label_rows GROUP BY subject_id, prediction_time;
CREATE TEMP MACRO tells_outcome(code) AS
    regexp_matches(code, '^MEDS_(BIRTH|DEATH)(//|$)|(^|//)(DIED|EXPIRED)($|//)');
CREATE TEMP TABLE event_rows AS
SELECT icu_stay_id, time AS event_time, time AS event_known_time, coalesce(event_type, lower(kind)) AS event_type,
       concat_ws(' | ', item,
           number_word || ': ' || coalesce(text_value,
                                           regexp_replace(CAST(round(number * scale) / scale AS VARCHAR), '\.0$', ''))
           || CASE WHEN text_value IS NULL OR regexp_full_match(text_value, '[<>≤≥=~]*\s*[\d.,]+(\s*-\s*[\d.,]+)?')
                   THEN coalesce(' ' || coalesce(null_if_missing(unit), code_unit), '') ELSE '' END,
           'Route: ' || null_if_missing(route),
           'Status: ' || coalesce(null_if_missing(statusdescription), code_status)) AS event_text,
       epoch(prediction_time - time) / 60 AS relative_time_to_final_event
FROM (
    SELECT *, CASE event_type WHEN 'ingredient' THEN 2 ELSE 3 END AS digits,
           pow(10, least(300, greatest(0, digits - 1 - coalesce(floor(log10(abs(nullif(number, 0)))), 0)))) AS scale
    FROM meds_rows JOIN meds_codes USING (code)
) AS r
JOIN samples AS s ON s.subject_id = r.subject_id AND r.time <= prediction_time AND (since IS NULL OR r.time > since)
WHERE NOT tells_outcome(code);
-- What is known of a patient beside the events, with the time since when; the latest before the prediction counts.
CREATE TEMP TABLE stay_rows AS
WITH facts AS (
    SELECT subject_id, time, name, split_part(code, '//', part) AS value
    FROM meds_rows JOIN facts ON split_part(code, '//', 1) = kind
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
           USING max_by(value, since_when) GROUP BY icu_stay_id) AS said USING (icu_stay_id);
-- Where the rows of the data went: how many are in no sequence and why, or '' for those in one; how many have a code
-- without a description.
CREATE TEMP VIEW row_fates AS
SELECT CASE WHEN latest IS NULL THEN 'of subjects without a label here'
             WHEN time IS NULL THEN 'without a time: facts of a subject'
             WHEN time > latest THEN 'after the prediction'
             WHEN tells_outcome(code) THEN 'that tell birth or death'
             WHEN NOT EXISTS (FROM samples AS s WHERE s.subject_id = r.subject_id AND r.time <= prediction_time
                              AND (since IS NULL OR r.time > since)) THEN 'before the history' ELSE '' END AS fate,
       count(*), count(*) FILTER (NOT is_described)
FROM data AS r LEFT JOIN (SELECT subject_id, max(prediction_time) AS latest FROM samples GROUP BY 1) USING (subject_id)
LEFT JOIN meds_codes USING (code)
GROUP BY fate ORDER BY fate
