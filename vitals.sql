-- Vital signs, scores, ventilator settings and outputs of the ICU stays of query.sql, as more of its events: what
-- `--vitals` adds to them. One row per stay that has any, and the same array of events.
--
-- BigQuery Standard SQL over MIMIC-IV v3.1, run in the two ways of query.sql. chartevents has 430 million rows, most of
-- them care that was charted: only the items below are read, by number, and of what is measured anew every few minutes
-- an hour keeps what a nurse would write down. The columns beside the events count what that leaves out; their names
-- begin with the table. Numbers are rounded to 3 significant digits, without trailing zeros.

WITH stays AS (
  -- As in query.sql: the final event is ICU discharge or death, whichever is first; NULL of a patient who is still there.
  SELECT
    icu.stay_id AS icu_stay_id,
    icu.intime AS icu_intime,
    COALESCE(IF(adm.deathtime < icu.outtime, adm.deathtime, icu.outtime), adm.deathtime) AS final_time
  FROM `physionet-data.mimiciv_3_1_icu.icustays` AS icu
  INNER JOIN `physionet-data.mimiciv_3_1_hosp.admissions` AS adm
    ON adm.hadm_id = icu.hadm_id AND adm.subject_id = icu.subject_id
  INNER JOIN `physionet-data.mimiciv_3_1_hosp.patients` AS pat ON pat.subject_id = icu.subject_id
  WHERE icu.stay_id IS NOT NULL
),

items AS (
  -- kind: of a `number` the last of an hour is kept, of `extremes` also the lowest and the highest of it, a `score` has
  -- words beside its number, a `mode` has only words, an `output` is an amount of its own and always kept.
  -- low, high: what is plausible, both included, in the unit that is told. Those of vital signs, FiO2, PEEP and glucose
  -- are the MIMIC Code Repository's; the others are wide: no patient is beyond them, a slip of the keyboard is.
  SELECT * FROM UNNEST(ARRAY<STRUCT<itemid INT64, kind STRING, low FLOAT64, high FLOAT64, unit STRING>>[
    (220045, 'extremes', 1, 299, 'bpm'),  -- Heart Rate
    (220050, 'extremes', 1, 399, 'mmHg'),  -- Arterial Blood Pressure systolic
    (220051, 'extremes', 1, 299, 'mmHg'),  -- Arterial Blood Pressure diastolic
    (220052, 'extremes', 1, 299, 'mmHg'),  -- Arterial Blood Pressure mean
    (225309, 'extremes', 1, 399, 'mmHg'),  -- ART BP Systolic
    (225310, 'extremes', 1, 299, 'mmHg'),  -- ART BP Diastolic
    (225312, 'extremes', 1, 299, 'mmHg'),  -- ART BP Mean
    (220179, 'extremes', 1, 399, 'mmHg'),  -- Non Invasive Blood Pressure systolic
    (220180, 'extremes', 1, 299, 'mmHg'),  -- Non Invasive Blood Pressure diastolic
    (220181, 'extremes', 1, 299, 'mmHg'),  -- Non Invasive Blood Pressure mean
    (220277, 'extremes', 1, 100, '%'),  -- O2 saturation pulseoxymetry
    (220210, 'number', 1, 69, 'insp/min'),  -- Respiratory Rate
    (224690, 'number', 1, 69, 'insp/min'),  -- Respiratory Rate (Total)
    (224688, 'number', 0, 69, 'insp/min'),  -- Respiratory Rate (Set)
    (224689, 'number', 0, 69, 'insp/min'),  -- Respiratory Rate (spontaneous)
    (223761, 'number', 10, 50, '°C'),  -- Temperature Fahrenheit
    (223762, 'number', 10, 50, '°C'),  -- Temperature Celsius
    (226329, 'number', 10, 50, '°C'),  -- Blood Temperature CCO (C)
    (220739, 'score', 1, 4, ''),  -- GCS - Eye Opening
    (223900, 'score', 1, 5, ''),  -- GCS - Verbal Response
    (223901, 'score', 1, 6, ''),  -- GCS - Motor Response
    (228096, 'score', -5, 4, ''),  -- Richmond-RAS Scale
    (223835, 'number', 20, 100, '%'),  -- Inspired O2 Fraction
    (220339, 'number', 0, 100, 'cmH2O'),  -- PEEP set
    (224700, 'number', 0, 100, 'cmH2O'),  -- Total PEEP Level
    (224684, 'number', 0, 3000, 'mL'),  -- Tidal Volume (set)
    (224685, 'number', 0, 3000, 'mL'),  -- Tidal Volume (observed)
    (224686, 'number', 0, 3000, 'mL'),  -- Tidal Volume (spontaneous)
    (224695, 'number', 0, 150, 'cmH2O'),  -- Peak Insp. Pressure
    (224696, 'number', 0, 150, 'cmH2O'),  -- Plateau Pressure
    (224687, 'number', 0, 100, 'L/min'),  -- Minute Volume
    (223849, 'mode', 0, 0, ''),  -- Ventilator Mode
    (229314, 'mode', 0, 0, ''),  -- Ventilator Mode (Hamilton)
    (225664, 'number', 1, 10000, 'mg/dL'),  -- Glucose finger stick (range 70-100)
    (226537, 'number', 1, 10000, 'mg/dL'),  -- Glucose (whole blood); that in serum is a lab already
    (226512, 'number', 20, 500, 'kg'),  -- Admission Weight (Kg)
    (226531, 'number', 20, 500, 'kg'),  -- Admission Weight (lbs.)
    (224639, 'number', 20, 500, 'kg'),  -- Daily Weight
    (226559, 'output', 0, 5000, 'ml'),  -- Foley
    (226560, 'output', 0, 5000, 'ml'),  -- Void
    (226561, 'output', 0, 5000, 'ml'),  -- Condom Cath
    (226563, 'output', 0, 5000, 'ml'),  -- Suprapubic
    (226564, 'output', 0, 5000, 'ml'),  -- R Nephrostomy
    (226565, 'output', 0, 5000, 'ml'),  -- L Nephrostomy
    (226557, 'output', 0, 5000, 'ml'),  -- R Ureteral Stent
    (226558, 'output', 0, 5000, 'ml'),  -- L Ureteral Stent
    (226567, 'output', 0, 5000, 'ml'),  -- Straight Cath
    (226584, 'output', 0, 5000, 'ml'),  -- Ileoconduit
    (227488, 'output', 0, 5000, 'ml'),  -- GU Irrigant Volume In: what of the next is no urine
    (227489, 'output', 0, 5000, 'ml'),  -- GU Irrigant/Urine Volume Out
    (226627, 'output', 0, 5000, 'ml'),  -- OR Urine
    (226631, 'output', 0, 5000, 'ml'),  -- PACU Urine
    (226588, 'output', 0, 5000, 'ml'),  -- Chest Tube #1
    (226589, 'output', 0, 5000, 'ml'),  -- Chest Tube #2
    (229413, 'output', 0, 5000, 'ml'),  -- Chest Tube #3
    (229414, 'output', 0, 5000, 'ml'),  -- Chest Tube #4
    (226592, 'output', 0, 5000, 'ml'),  -- Mediastinal
    (226612, 'output', 0, 5000, 'ml'),  -- Pericardial
    (226606, 'output', 0, 5000, 'ml'),  -- Cerebral Ventricular #1
    (226607, 'output', 0, 5000, 'ml'),  -- Cerebral Ventricular #2
    (226610, 'output', 0, 5000, 'ml'),  -- Lumbar
    (226599, 'output', 0, 5000, 'ml'),  -- Jackson Pratt #1
    (226600, 'output', 0, 5000, 'ml'),  -- Jackson Pratt #2
    (226619, 'output', 0, 5000, 'ml'),  -- Pigtail #1
    (226620, 'output', 0, 5000, 'ml'),  -- Pigtail #2
    (227701, 'output', 0, 5000, 'ml')  -- Drainage Bag
  ])
),

named_items AS (
  -- A unit in a label goes: it may be another than the one that is told.
  SELECT
    i.*,
    COALESCE(
      TRIM(REGEXP_REPLACE(REGEXP_REPLACE(d.label, r'\s+', ' '), r' (Fahrenheit|Celsius|\((C|Kg|lbs\.)\))$', '')),
      'item ' || CAST(i.itemid AS STRING)
    ) AS name
  FROM items AS i
  LEFT JOIN `physionet-data.mimiciv_3_1_icu.d_items` AS d ON d.itemid = i.itemid
),

item_rows AS (
  -- The eyes' "None" is a finding that readers of CSV may take for a missing value. FiO2 is a share or a percentage.
  SELECT
    c.stay_id AS icu_stay_id,
    c.charttime,
    c.storetime,
    c.itemid,
    CASE c.itemid
      WHEN 223761 THEN (c.valuenum - 32) / 1.8
      WHEN 226531 THEN c.valuenum * 0.45359237
      WHEN 223835 THEN IF(c.valuenum <= 1, c.valuenum * 100, c.valuenum)
      ELSE c.valuenum
    END AS x,
    IF(
      c.itemid = 220739 AND c.valuenum = 1, 'None', NULLIF(TRIM(REGEXP_REPLACE(c.value, r'\s+', ' ')), '')
    ) AS words
  FROM `physionet-data.mimiciv_3_1_icu.chartevents` AS c
  UNION ALL
  SELECT
    o.stay_id,
    o.charttime,
    o.storetime,
    o.itemid,
    o.value,
    CAST(NULL AS STRING)
  FROM `physionet-data.mimiciv_3_1_icu.outputevents` AS o
),

rows_in_stays AS (
  -- An hour ends at whole hours after ICU admission, and so may what is read of a stay (--observation-hours). What was
  -- charted in one hour and stored in another counts apart: what is kept of an hour must not depend on what came later.
  SELECT
    s.icu_stay_id,
    s.final_time,
    r.charttime,
    r.storetime,
    r.x,
    r.words,
    i.*,
    IFNULL(IF(i.kind = 'mode', r.words IS NOT NULL, r.x BETWEEN i.low AND i.high), FALSE) AS is_plausible,
    GREATEST(1, CAST(CEIL(DATETIME_DIFF(r.charttime, s.icu_intime, SECOND) / 3600) AS INT)) AS charted_hour,
    GREATEST(1, CAST(CEIL(DATETIME_DIFF(r.storetime, s.icu_intime, SECOND) / 3600) AS INT)) AS known_hour
  FROM stays AS s
  INNER JOIN item_rows AS r ON r.icu_stay_id = s.icu_stay_id
  INNER JOIN named_items AS i ON i.itemid = r.itemid
  WHERE r.charttime BETWEEN s.icu_intime AND COALESCE(s.final_time, r.charttime)
),

ranked AS (
  -- Of equal values the last of the hour is its lowest and its highest.
  SELECT
    *,
    ROW_NUMBER() OVER (hour_of_item ORDER BY charttime DESC, storetime DESC, x, words) AS from_last,
    ROW_NUMBER() OVER (hour_of_item ORDER BY x, charttime DESC, storetime DESC) AS from_lowest,
    ROW_NUMBER() OVER (hour_of_item ORDER BY x DESC, charttime DESC, storetime DESC) AS from_highest
  FROM rows_in_stays
  WINDOW hour_of_item AS (PARTITION BY icu_stay_id, itemid, charted_hour, known_hour, is_plausible)
),

told AS (
  -- Of a score's words those before the first stop, without the number: " 0  Alert and calm", "-1 Awakens to voice (eye
  -- opening/contact) > 10 sec".
  SELECT
    *,
    CASE
      WHEN NOT is_plausible THEN 'implausible'
      WHEN kind = 'output' OR from_last = 1 THEN 'event'
      WHEN kind = 'extremes' AND 1 IN (from_lowest, from_highest) THEN 'event'
      ELSE 'thinned out'
    END AS fate,
    IF(kind = 'output', 'output', 'vital') AS event_type,
    IF(kind = 'output', 'Output: ' || name || ' | Amount: ', 'Vital: ' || name || ' | Value: ')
      || IF(kind = 'mode', words, REGEXP_REPLACE(CAST(
        ROUND(x, CAST(2 - IFNULL(FLOOR(LOG10(ABS(NULLIF(x, 0)))), 0) AS INT))
        AS STRING), r'\.0$', ''))
      || IFNULL(' ' || NULLIF(unit, ''), '')
      || IF(kind = 'score', IFNULL(' (' || NULLIF(TRIM(
        REGEXP_REPLACE(words, r'^ ?[+-]?\d+(\.\d+)? ?|[,;(].*$', '')
      ), '') || ')', ''), '') AS event_text
  FROM ranked
)

SELECT
  icu_stay_id,
  ARRAY_AGG(IF(fate = 'event', STRUCT(
    charttime AS event_time,
    storetime AS event_known_time,
    event_type,
    event_text,
    DATETIME_DIFF(final_time, charttime, SECOND) / 60 AS relative_time_to_final_event  -- minutes
  ), NULL) IGNORE NULLS ORDER BY charttime, event_type, event_text, storetime) AS events,
  COUNTIF(fate = 'implausible' AND event_type = 'vital') AS chartevents_without_a_plausible_value,
  COUNTIF(fate = 'implausible' AND event_type = 'output') AS outputevents_without_a_plausible_value,
  COUNTIF(fate = 'thinned out') AS chartevents_thinned_out_of_their_hour
FROM told
GROUP BY icu_stay_id
