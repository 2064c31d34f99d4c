-- Stays and events of any source, in DuckDB: parts with names (`-- name:`), run by reading.py after it has typed the
-- rows of the source. What stands in braces is filled in, lists of columns; what the run is about is bound ($).

-- name: given stays
-- A stay has a row here, or several where its rows contradict each other.
CREATE TEMP TABLE given_stays AS
SELECT DISTINCT * REPLACE ({cleaned}) FROM (SELECT {columns} FROM typed_stay_rows)

-- name: repeated stays
-- Most often of an earlier export beside a later one: how many, and the first with its files.
SELECT count(*), min(icu_stay_id), arg_min(files, icu_stay_id)
FROM (SELECT icu_stay_id, array_to_string(min(DISTINCT file_of_row, 3), ', ') AS files
      FROM typed_stay_rows GROUP BY icu_stay_id HAVING count(*) > 1)

-- name: contradicting rows
FROM given_stays QUALIFY count(*) OVER (PARTITION BY icu_stay_id) > 1 ORDER BY icu_stay_id

-- name: stays
-- The length of a stay is that of its record, recomputed: MIMIC-IV's own runs to outtime, hours past a death. A stay may
-- last, without an end yet, where what is predicted of it is not asked at its end.
CREATE TEMP TABLE stays AS
SELECT least(icu_outtime, patient_death_time) AS final_time, icu_length_of_stay_in_days AS said_days,
       CASE WHEN icu_intime IS NULL THEN 'stay_without_intime'
            WHEN final_time IS NULL AND NOT $may_last THEN 'stay_without_end'
            WHEN patient_death_time < icu_intime THEN 'stay_after_death'
            WHEN final_time < icu_intime THEN 'stay_ends_before_it_begins'
            WHEN coalesce(patient_expired_in_hospital NOT IN (0, 1), $need_label) THEN 'stay_with_unfit_label'
            WHEN patient_expired_in_hospital = 0 AND final_time = patient_death_time
                 AND coalesce(date_diff('day', icu_intime, final_time) <= $days::INTEGER, true)
                 THEN 'stay_with_death_and_label_0'
       END AS fault,
       * REPLACE (CASE WHEN $is_meds THEN NULL ELSE epoch(final_time - icu_intime) / 86400 END
                  AS icu_length_of_stay_in_days)
FROM given_stays

-- name: faulty stays
SELECT fault, count(*), array_to_string(min(DISTINCT icu_stay_id, 3), ', ') FROM stays
WHERE fault <> '' GROUP BY fault ORDER BY fault

-- name: noted stays
SELECT count_if(abs(said_days - icu_length_of_stay_in_days) > 0.01 AND fault IS NULL) AS length_recomputed,
       count_if(patient_age NOT BETWEEN 0 AND 130) AS stay_with_odd_age,
       count_if(year(icu_intime) NOT BETWEEN 1900 AND 2299 OR year(icu_outtime) NOT BETWEEN 1900 AND 2299
                OR year(patient_death_time) NOT BETWEEN 1900 AND 2299) AS stay_with_odd_time
FROM stays

-- name: events
-- Texts are numbered first: what is compared, sorted and counted of events are numbers, which are small and of one
-- size. Each is read as it is written, and cleaned once.
CREATE TEMP TABLE texts AS
SELECT event_text, CASE WHEN null_if_missing(event_text) IS NULL AND trim(event_text) <> '' THEN ''
                        ELSE coalesce(event_text, '') END AS cleaned,
       (dense_rank() OVER (ORDER BY cleaned) - 1)::INTEGER AS text
FROM (SELECT DISTINCT event_text FROM typed_event_rows);
CREATE TEMP TABLE events AS
SELECT icu_stay_id, text, epoch(event_time - icu_intime) / 60 AS minutes_since_intime,
       coalesce(list_position({types}, null_if_missing(event_type)) - 1, len({types}))::TINYINT AS event_type,
       epoch(event_known_time - icu_intime) / 60 AS known_minutes_since_intime,
       epoch(final_time - event_time) / 60 AS minutes_to_end,
       CASE WHEN isfinite(relative_time_to_final_event) THEN relative_time_to_final_event END AS stated,
       CASE WHEN minutes_since_intime IS NULL THEN 'event_without_time'
            WHEN minutes_since_intime < 0 THEN 'event_before_admission'
            WHEN minutes_to_end < 0 THEN 'event_after_the_end' END AS fault
FROM typed_event_rows AS e JOIN stays USING (icu_stay_id)
JOIN texts AS t ON t.event_text IS NOT DISTINCT FROM e.event_text

-- name: odd times
-- How many stated times are far enough from the end to tell hours from minutes, how many of these are in hours, and
-- which stays have one that differs; how many times are 120 years or more away, or known a day before they happened.
WITH told AS (
    SELECT *, stated IS NOT NULL AND abs(minutes_to_end) > 60 AS is_far,
           CASE WHEN abs(stated - minutes_to_end) > 2 THEN icu_stay_id END AS other
    FROM events
)
SELECT count_if(is_far), count_if(is_far AND abs(stated * 60 - minutes_to_end) < 2), count(other),
       array_to_string(min(DISTINCT other, 3), ', '),
       count_if(greatest(abs(minutes_since_intime), abs(known_minutes_since_intime)) > 63115200),
       count_if(known_minutes_since_intime < minutes_since_intime - 1440)
FROM told

-- name: distinct events
CREATE OR REPLACE TEMP TABLE events AS SELECT DISTINCT * EXCLUDE (stated, fault) FROM events WHERE fault IS NULL
