-- One row per ICU stay of MIMIC-IV with its timed events as short clinical texts: what train.py learns from.
--
-- BigQuery Standard SQL over MIMIC-IV v3.1; for v2.2 rename the data sets to mimiciv_hosp and mimiciv_icu. Paste it
-- into the BigQuery console and export the result as Parquet, or let `python train.py --data FOLDER` run this same
-- text locally. It keeps to what both BigQuery and DuckDB (through sqlglot) read alike: `||` makes NULL of a NULL, so
-- IFNULL(' | Name: ' || part, '') leaves out a part that is missing.
--
-- Numbers are rounded to 2 significant digits, a result beside its reference range to what the range needs, without
-- trailing zeros and float noise (49.999998807907104 ml is 50 ml): the same dose then gives the same text, which is
-- encoded once. FLOOR(LOG10(ABS(x))) is the place of the first digit (0 for 1 to 9); zero has none.
--
-- A condition that ends in `-- else:` says why a row of its table is no event: the local account of rows counts by it.

WITH stays AS (
  SELECT
    icu.subject_id AS patient_id,
    icu.hadm_id AS admission_id,
    icu.stay_id AS icu_stay_id,
    icu.intime AS icu_intime,
    icu.outtime AS icu_outtime,
    -- Only deathtime will do: patients.dod has a day but no time (and counts deaths after discharge), and dischtime of
    -- the dead is often midnight of that day. Where deathtime is missing the stay is bounded by its ICU discharge.
    adm.deathtime AS patient_death_time,
    -- The final event is ICU discharge or death, whichever is first: charting goes on after death, and what is charted
    -- then gives the label away. A stay without outtime ends at its death. IF, not LEAST: BigQuery's LEAST is NULL as
    -- soon as one argument is. NULL only where both are: train.py drops and counts such a stay, unless it predicts for it.
    COALESCE(IF(adm.deathtime < icu.outtime, adm.deathtime, icu.outtime), adm.deathtime) AS final_time,
    -- Events are read until then; of a patient who is still there, all.
    COALESCE(IF(adm.deathtime < icu.outtime, adm.deathtime, icu.outtime), adm.deathtime, DATETIME '9999-01-01 00:00:00')
      AS read_until,
    -- Three labels, of which --outcome names one; NULL is unknown. In hospital, by the hospital's own flag: a survivor
    -- of the ICU may still die on the ward.
    adm.hospital_expire_flag AS patient_expired_in_hospital,
    -- In the ICU: before or at discharge from it, or where it has none.
    CASE
      WHEN adm.hospital_expire_flag = 0 THEN 0
      WHEN adm.deathtime <= COALESCE(icu.outtime, adm.deathtime) THEN 1
      WHEN adm.deathtime > icu.outtime THEN 0
    END AS patient_expired_in_icu,
    -- Within 30 days of ICU admission, in days, for dod has no time. It is known for a year after the last discharge:
    -- without it the patient was alive then, unless the hospital says otherwise. A death before the stay is a mistake.
    CASE
      WHEN DATE_DIFF(IFNULL(DATE(pat.dod), DATE(adm.deathtime)), DATE(icu.intime), DAY) > 30 THEN 0
      WHEN DATE_DIFF(IFNULL(DATE(pat.dod), DATE(adm.deathtime)), DATE(icu.intime), DAY) >= 0 THEN 1
      WHEN pat.dod IS NULL AND adm.deathtime IS NULL AND IFNULL(adm.hospital_expire_flag, 0) <> 1 THEN 0
    END AS patient_expired_within_30d,
    pat.gender AS patient_gender,
    -- anchor_age is the age in anchor_year (over 89 it is set to 91); years are shifted per patient, differences hold.
    pat.anchor_age + EXTRACT(YEAR FROM icu.intime) - pat.anchor_year AS patient_age,
    adm.race AS patient_race,
    adm.marital_status,
    adm.admission_type,
    adm.admission_location,
    adm.insurance,
    icu.first_careunit AS first_icu_careunit,
    icu.last_careunit AS last_icu_careunit,
    adm.discharge_location  -- never a feature: its value DIED is the label
  FROM `physionet-data.mimiciv_3_1_icu.icustays` AS icu
  INNER JOIN `physionet-data.mimiciv_3_1_hosp.admissions` AS adm
    ON adm.hadm_id = icu.hadm_id AND adm.subject_id = icu.subject_id
  INNER JOIN `physionet-data.mimiciv_3_1_hosp.patients` AS pat ON pat.subject_id = icu.subject_id
  WHERE icu.stay_id IS NOT NULL
),

-- Every event below is kept only from ICU admission to the final event, both included. Without that bound a quarter
-- of the survivors' events, and a twelfth of the others', come from after the ICU: the label leaks.
-- Hospital tables know no ICU stay. Labs and cultures belong to the stay in which their patient's blood was drawn: one
-- lab in a hundred and one culture in forty have no hadm_id and lie inside an admission all the same; a row of another
-- admission is not the stay's. Orders always have their hadm_id, ICU tables the stay's id.

prescription_events AS (
  -- An order is known when it starts. No duration: stoptime is moved to the moment an order is discontinued, which for
  -- the dying is their death, so a "planned" duration would tell the future. The form is form_unit_disp because
  -- form_rx is all but empty. Doses stay text: "1-2" and "25,000" are doses too.
  -- All orders start at a full hour: those of the hour in which the patient came to the ICU count from that moment.
  SELECT
    s.icu_stay_id,
    GREATEST(rx.starttime, s.icu_intime) AS event_time,
    GREATEST(rx.starttime, s.icu_intime) AS event_known_time,
    'prescription' AS event_type,
    'Prescription: ' || COALESCE(NULLIF(TRIM(REGEXP_REPLACE(rx.drug, r'\s+', ' ')), ''), 'unnamed')
      || IFNULL(' | Strength: ' || NULLIF(TRIM(REGEXP_REPLACE(rx.prod_strength, r'\s+', ' ')), ''), '')
      || IFNULL(' | Form: ' || NULLIF(TRIM(rx.form_unit_disp), ''), '')
      || IFNULL(' | Dose: ' || NULLIF(TRIM(REGEXP_REPLACE(
        rx.dose_val_rx, r'(?i)^\s*[+-]?(nan|inf|infinity|[\d.]+e\+?\d{3,})\s*$', ''
      )), '')
        || IFNULL(' ' || NULLIF(TRIM(rx.dose_unit_rx), ''), ''), '')
      || IFNULL(' | Route: ' || NULLIF(TRIM(rx.route), ''), '') AS event_text
  FROM stays AS s
  INNER JOIN `physionet-data.mimiciv_3_1_hosp.prescriptions` AS rx ON rx.hadm_id = s.admission_id
  WHERE (rx.starttime >= s.icu_intime OR rx.starttime = DATETIME_TRUNC(s.icu_intime, HOUR))
    AND rx.starttime <= s.read_until
    AND s.icu_intime <= s.read_until
),

procedure_rows AS (
  SELECT
    s.icu_stay_id,
    p.*,
    p.value * CASE p.valueuom WHEN 'min' THEN 1 WHEN 'hour' THEN 60 WHEN 'day' THEN 1440 END AS minutes
  FROM stays AS s
  INNER JOIN `physionet-data.mimiciv_3_1_icu.procedureevents` AS p ON p.stay_id = s.icu_stay_id
  WHERE p.starttime BETWEEN s.icu_intime AND s.read_until
    AND IFNULL(TRIM(p.statusdescription), '') <> 'Rewritten'  -- else: rewritten, never done
    AND IFNULL(p.value, 0) >= 0  -- else: of a negative duration
    AND IFNULL(p.endtime, p.starttime) >= p.starttime  -- else: of a negative duration
),

procedure_events AS (
  -- The text tells the duration, so it is known at the end; over an hour one digit of it is enough ("for 700 min").
  -- A task without a unit (an X-ray, a call to the family) is a moment that MIMIC stores as one minute: no duration.
  -- "Rewritten" rows were replaced by others and never took place; a negative duration is a mistake of charting.
  SELECT
    p.icu_stay_id,
    p.starttime AS event_time,
    p.endtime AS event_known_time,
    'procedure_event' AS event_type,
    'Procedure: ' || COALESCE(TRIM(REGEXP_REPLACE(d.label, r'\s+', ' ')), 'item ' || CAST(p.itemid AS STRING))
      || IFNULL(' (' || TRIM(d.category) || ')', '')
      || IFNULL(' | Location: ' || NULLIF(TRIM(REGEXP_REPLACE(p.location, r'\s+', ' ')), ''), '')
      || IFNULL(' | Status: ' || NULLIF(TRIM(p.statusdescription), ''), '')
      || IFNULL(' | for ' || REGEXP_REPLACE(CAST(
        ROUND(p.minutes, CAST(IF(p.minutes > 60, -FLOOR(LOG10(ABS(NULLIF(p.minutes, 0)))), 0) AS INT))
        AS STRING), r'\.0$', '') || ' min', '') AS event_text
  FROM procedure_rows AS p
  LEFT JOIN `physionet-data.mimiciv_3_1_icu.d_items` AS d ON d.itemid = p.itemid
),

lab_rows AS (
  -- Beside a reference range, digits below about a tenth of its width are noise: hematocrit 34.6 (40-51) is written 35,
  -- but creatinine 1.23 (0.5-1.2) and pH 7.32 (7.35-7.45) keep their digits. Beyond the range by more than its width, 2
  -- significant digits do (creatinine 4.56 is 4.6), and always that many are kept (TSH 0.02), as without a range.
  SELECT
    s.icu_stay_id,
    l.*,
    ROUND(l.ref_range_upper - l.ref_range_lower, 6) AS width,  -- 5.1 - 4.1 is 0.9999999999999996
    1 - IFNULL(FLOOR(LOG10(ABS(NULLIF(l.valuenum, 0)))), 0) AS own_digits,
    1 - FLOOR(LOG10(ABS(NULLIF(ROUND(l.ref_range_upper - l.ref_range_lower, 6), 0)))) AS range_digits
  FROM stays AS s
  INNER JOIN `physionet-data.mimiciv_3_1_hosp.labevents` AS l ON l.subject_id = s.patient_id
  WHERE l.charttime BETWEEN s.icu_intime AND s.read_until
    AND (l.hadm_id = s.admission_id OR l.hadm_id IS NULL)
),

lab_values AS (
  -- Numbers to text, and text cleaned: "___" is what de-identification left, "N/A" is no unit. Clock times and dates
  -- that people typed into a comment go (events have their time in a column of its own, dates are shifted per patient,
  -- and a time makes every text unique); titers such as 1:40 stay.
  SELECT
    icu_stay_id,
    charttime,
    storetime,
    itemid,
    valuenum AS x,
    ref_range_lower AS lo,
    ref_range_upper AS hi,
    NULLIF(width, 0) AS width,
    COALESCE(
      REGEXP_REPLACE(CAST(ROUND(valuenum, CAST(IF(
        valuenum BETWEEN ref_range_lower - width AND ref_range_upper + width AND range_digits > own_digits,
        range_digits,
        own_digits
      ) AS INT)) AS STRING), r'\.0$', ''),
      NULLIF(NULLIF(TRIM(REGEXP_REPLACE(REGEXP_REPLACE(
        value, r'(?i)^\s*[+-]?(nan|inf|infinity|[\d.]+e\+?\d{3,})\s*$', ''  -- no number, so no value
      ), r'\s+', ' ')), ''), '___')
    ) AS value,
    REGEXP_REPLACE(CAST(ROUND(ref_range_lower, 4) AS STRING), r'\.0$', '') AS lo_text,
    REGEXP_REPLACE(CAST(ROUND(ref_range_upper, 4) AS STRING), r'\.0$', '') AS hi_text,
    NULLIF(NULLIF(TRIM(valueuom), ''), 'N/A') AS unit,
    NULLIF(TRIM(flag), '') AS flag,
    NULLIF(NULLIF(TRIM(REGEXP_REPLACE(REGEXP_REPLACE(
      comments,
      r'\b([0-2]\d:[0-5]\d( ?[AaPp][Mm])?|\d:[0-5]\d ?[AaPp][Mm]|\d{4}-\d{2}-\d{2}|\d{1,2}/\d{1,2}/\d{2,4})\b', '___'
    ), r'\s+', ' ')), ''), '___') AS comment
  FROM lab_rows
),

lab_items AS (
  SELECT
    itemid,
    COALESCE(TRIM(REGEXP_REPLACE(label, r'\s+', ' ')), 'item ' || CAST(itemid AS STRING))
      || IFNULL(' (' || TRIM(fluid) || ', ' || TRIM(category) || ')', '') AS name
  FROM `physionet-data.mimiciv_3_1_hosp.d_labitems`
),

lab_events AS (
  -- event_time is when the blood was drawn; its result is known only at storetime (NULL: unknown, never assumed).
  -- The level says in words how far a value lies from its reference range, for text encoders read numbers badly. The
  -- more extreme of two yardsticks counts, the ratio to the limit and the distance in widths of the range: the ratio
  -- alone misses pH and sodium, the width alone misses platelets. A range of no width (0-0) leaves the ratio, and where
  -- the limit is 0 too, plainly "above range". A range whose limits are swapped gives no level. The level is that of
  -- the value before rounding. No priority: it says how the ward ordered, and doubles the number of texts.
  SELECT
    v.icu_stay_id,
    v.charttime AS event_time,
    v.storetime AS event_known_time,
    'labevent' AS event_type,
    'Lab: ' || COALESCE(d.name, 'item ' || CAST(v.itemid AS STRING))
      || IFNULL(' | Value: ' || v.value || IFNULL(' ' || v.unit, ''), '')
      || COALESCE(
        ' | Reference: ' || v.lo_text || '-' || v.hi_text,
        ' | Reference: at least ' || v.lo_text,
        ' | Reference: at most ' || v.hi_text,
        ''
      )
      || IFNULL(' | Level: ' || CASE
        WHEN v.x IS NULL OR COALESCE(v.lo, v.hi) IS NULL OR v.lo > v.hi THEN NULL
        WHEN v.x > v.hi THEN CASE
          WHEN (v.hi > 0 AND v.x > 2 * v.hi) OR v.x > v.hi + 2 * v.width THEN 'far above range'
          WHEN (v.hi > 0 AND v.x > 1.25 * v.hi) OR v.x > v.hi + 0.5 * v.width THEN 'above range'
          WHEN v.hi = 0 AND v.width IS NULL THEN 'above range'
          ELSE 'slightly above range' END
        WHEN v.x < v.lo THEN CASE
          WHEN (v.lo > 0 AND v.x < v.lo / 2) OR v.x < v.lo - 2 * v.width THEN 'far below range'
          WHEN (v.lo > 0 AND v.x < 0.8 * v.lo) OR v.x < v.lo - 0.5 * v.width THEN 'below range'
          WHEN v.lo = 0 AND v.width IS NULL THEN 'below range'
          ELSE 'slightly below range' END
        ELSE 'within range'
      END, '')
      || IFNULL(' | Flag: ' || v.flag, '')
      || IFNULL(' | Comment: ' || v.comment, '') AS event_text
  FROM lab_values AS v
  LEFT JOIN lab_items AS d ON d.itemid = v.itemid
),

microbiology_rows AS (
  SELECT
    s.icu_stay_id,
    s.icu_intime,
    s.read_until,
    m.*,
    COALESCE(m.charttime, IF(
      DATETIME_ADD(CAST(m.chartdate AS DATETIME), INTERVAL 86399 SECOND) < s.read_until,
      DATETIME_ADD(CAST(m.chartdate AS DATETIME), INTERVAL 86399 SECOND),
      s.read_until
    )) AS event_time
  FROM stays AS s
  INNER JOIN `physionet-data.mimiciv_3_1_hosp.microbiologyevents` AS m ON m.subject_id = s.patient_id
  WHERE (m.hadm_id = s.admission_id OR m.hadm_id IS NULL)
    AND COALESCE(m.charttime, CAST(m.chartdate AS DATETIME)) <= s.read_until
    AND COALESCE(m.charttime, DATETIME_ADD(CAST(m.chartdate AS DATETIME), INTERVAL 86399 SECOND)) >= s.icu_intime
),

microbiology_events AS (
  -- charttime is missing where only the day of the culture is known: it was taken by the end of that day, and counts
  -- from there, or from the final event where that comes first. A result without storetime is known by the end of its
  -- storedate, if it has one. The comment is added only where no organism grew ("NO GROWTH."): beside an organism it
  -- repeats the laboratory's standing advice.
  SELECT
    m.icu_stay_id,
    m.event_time,
    COALESCE(m.storetime, DATETIME_ADD(CAST(m.storedate AS DATETIME), INTERVAL 86399 SECOND)) AS event_known_time,
    'microbiology' AS event_type,
    'Microbiology: ' || COALESCE(NULLIF(TRIM(REGEXP_REPLACE(m.spec_type_desc, r'\s+', ' ')), ''), 'unnamed specimen')
      || IFNULL(' | Test: ' || NULLIF(TRIM(REGEXP_REPLACE(m.test_name, r'\s+', ' ')), ''), '')
      || IFNULL(' | Organism: ' || NULLIF(TRIM(REGEXP_REPLACE(m.org_name, r'\s+', ' ')), ''), '')
      || IFNULL(' | Antibiotic: ' || NULLIF(TRIM(m.ab_name), ''), '')
      || IFNULL(' | Interpretation: ' || CASE TRIM(m.interpretation)
        WHEN 'S' THEN 'susceptible'
        WHEN 'R' THEN 'resistant'
        WHEN 'I' THEN 'intermediate'
        WHEN 'P' THEN 'pending'
      END, '')
      || IF(m.org_name IS NULL, IFNULL(' | Comment: ' || NULLIF(NULLIF(TRIM(REGEXP_REPLACE(REGEXP_REPLACE(
        m.comments,
        r'\b([0-2]\d:[0-5]\d( ?[AaPp][Mm])?|\d:[0-5]\d ?[AaPp][Mm]|\d{4}-\d{2}-\d{2}|\d{1,2}/\d{1,2}/\d{2,4})\b', '___'
      ), r'\s+', ' ')), ''), '___'), ''), '') AS event_text
  FROM microbiology_rows AS m
),

ingredient_rows AS (
  SELECT
    s.icu_stay_id,
    i.*,
    1 - IFNULL(FLOOR(LOG10(ABS(NULLIF(IFNULL(i.rate, i.amount), 0)))), 0) AS digits
  FROM stays AS s
  INNER JOIN `physionet-data.mimiciv_3_1_icu.ingredientevents` AS i ON i.stay_id = s.icu_stay_id
  WHERE i.starttime BETWEEN s.icu_intime AND s.read_until
    AND IFNULL(TRIM(i.statusdescription), '') <> 'Rewritten'  -- else: rewritten, never given
    AND IFNULL(i.amount, 0) >= 0  -- else: of a negative amount or duration
    AND IFNULL(i.rate, 0) >= 0  -- else: of a negative amount or duration
    AND IFNULL(i.endtime, i.starttime) >= i.starttime  -- else: of a negative amount or duration
),

ingredient_events AS (
  -- An infusion says its rate, and no amount: that is rate times duration, known at the end, and another number each
  -- time (6 of 7 million distinct texts). What is given at once has no rate and says its amount. The status is that of
  -- the whole infusion: known at its end. "Rewritten" rows were never given; a negative amount is a mistake of charting.
  SELECT
    i.icu_stay_id,
    i.starttime AS event_time,
    i.endtime AS event_known_time,
    'ingredient' AS event_type,
    'Ingredient: ' || COALESCE(TRIM(REGEXP_REPLACE(d.label, r'\s+', ' ')), 'item ' || CAST(i.itemid AS STRING))
      || COALESCE(
        ' | Rate: ' || REGEXP_REPLACE(CAST(ROUND(i.rate, CAST(i.digits AS INT)) AS STRING), r'\.0$', '')
          || IFNULL(' ' || NULLIF(TRIM(i.rateuom), ''), ''),
        ' | Amount: ' || REGEXP_REPLACE(CAST(ROUND(i.amount, CAST(i.digits AS INT)) AS STRING), r'\.0$', '')
          || IFNULL(' ' || NULLIF(TRIM(i.amountuom), ''), ''),
        ''
      )
      || IFNULL(' | Status: ' || NULLIF(TRIM(i.statusdescription), ''), '') AS event_text
  FROM ingredient_rows AS i
  LEFT JOIN `physionet-data.mimiciv_3_1_icu.d_items` AS d ON d.itemid = i.itemid
),

all_events AS (
  SELECT * FROM prescription_events
  UNION ALL
  SELECT * FROM procedure_events
  UNION ALL
  SELECT * FROM lab_events
  UNION ALL
  SELECT * FROM microbiology_events
  UNION ALL
  SELECT * FROM ingredient_events
),

sequences AS (
  -- Times are often equal (one blood draw, thirty results): type, text and known time break the tie, so that the same
  -- data always gives the same sequence.
  SELECT
    s.icu_stay_id,
    ARRAY_AGG(STRUCT(
      e.event_time AS event_time,
      e.event_known_time AS event_known_time,
      e.event_type AS event_type,
      e.event_text AS event_text,
      DATETIME_DIFF(s.final_time, e.event_time, SECOND) / 60 AS relative_time_to_final_event  -- minutes
    ) ORDER BY e.event_time, e.event_type, e.event_text, e.event_known_time) AS events
  FROM stays AS s
  INNER JOIN all_events AS e ON e.icu_stay_id = s.icu_stay_id
  GROUP BY s.icu_stay_id
)

-- A stay without events stays in the result, with an empty array: train.py counts what it drops.
SELECT
  s.patient_id,
  s.admission_id,
  s.icu_stay_id,
  s.icu_intime,
  s.icu_outtime,
  s.patient_death_time,
  s.patient_expired_in_hospital,
  s.patient_expired_in_icu,
  s.patient_expired_within_30d,
  s.patient_gender,
  s.patient_age,
  s.patient_race,
  s.marital_status,
  s.admission_type,
  s.admission_location,
  s.insurance,
  s.first_icu_careunit,
  s.last_icu_careunit,
  -- To the final event, as the record is: los runs to outtime, hours past a death, and the difference tells who died.
  DATETIME_DIFF(s.final_time, s.icu_intime, SECOND) / 86400 AS icu_length_of_stay_in_days,
  s.discharge_location,
  q.events
FROM stays AS s
LEFT JOIN sequences AS q ON q.icu_stay_id = s.icu_stay_id
