"""Tables of the spool's SQLite database: one list of statements for each version, applied in order, never edited.

`PRAGMA user_version` is the number of versions applied. Times are ISO 8601 with zone, except `*_at_s`, which are
seconds since the epoch and only steer the gateway's own work.
"""

VERSIONS: tuple[tuple[str, ...], ...] = (
    (
        # A study as one patient's: two patients under one Study Instance UID are two rows (design §4.8).
        """
        CREATE TABLE study (
            id INTEGER PRIMARY KEY,
            study_instance_uid TEXT NOT NULL,
            patient_id TEXT NOT NULL,
            facts TEXT NOT NULL,               -- storage.wire.StudyFacts, JSON
            lane TEXT NOT NULL,
            lane_rank INTEGER NOT NULL,        -- order on the uplink, 0 first
            first_received_at TEXT NOT NULL,
            last_received_at_s REAL NOT NULL,
            complete_at TEXT,                  -- the centre has all that was announced; NULL again when more arrives
            inventory_due_at_s REAL NOT NULL,
            inventory_tries INTEGER NOT NULL DEFAULT 0,
            UNIQUE (study_instance_uid, patient_id)
        )
        """,
        # One set of bytes. Same SOP Instance UID with other bytes is a second row (variant = 1).
        """
        CREATE TABLE instance (
            id INTEGER PRIMARY KEY,
            study_id INTEGER NOT NULL REFERENCES study (id),
            sop_instance_uid TEXT NOT NULL,
            sha256 TEXT NOT NULL,
            series_instance_uid TEXT NOT NULL,
            size_bytes INTEGER NOT NULL,
            facts TEXT NOT NULL,               -- storage.wire.InstanceFacts, JSON
            variant INTEGER NOT NULL DEFAULT 0,
            received_at_s REAL NOT NULL,
            pack_id TEXT REFERENCES pack (pack_id),
            damaged_at TEXT,                   -- the spool file is not what was received; kept, shown, not sent
            archived_at TEXT,                  -- a verified receipt names its UID and digest
            archived_at_s REAL,
            freed_at TEXT,                     -- the spool file was removed, keep_days after the receipt
            UNIQUE (sop_instance_uid, sha256)
        )
        """,
        # What is waiting to be packed: the only instances that the uplink looks for again and again.
        """
        CREATE INDEX instance_waiting ON instance (study_id, series_instance_uid)
            WHERE pack_id IS NULL AND archived_at IS NULL AND damaged_at IS NULL
        """,
        "CREATE INDEX instance_unsent ON instance (id) WHERE archived_at IS NULL",
        "CREATE INDEX instance_kept ON instance (archived_at_s) WHERE archived_at IS NOT NULL AND freed_at IS NULL",
        "CREATE INDEX instance_of_pack ON instance (pack_id)",
        "CREATE INDEX instance_of_study ON instance (study_id)",
        "CREATE INDEX instance_by_digest ON instance (sha256)",
        "CREATE INDEX study_announced ON study (inventory_due_at_s) WHERE complete_at IS NULL",
        """
        CREATE TABLE pack (
            pack_id TEXT PRIMARY KEY,
            study_id INTEGER NOT NULL REFERENCES study (id),
            -- planned: the file is built; put: it is in the store; refused: file removed, built again at next_try_at_s
            state TEXT NOT NULL CHECK (state IN ('planned', 'put', 'refused', 'receipted')),
            size_bytes INTEGER NOT NULL,
            sha256 TEXT NOT NULL,
            planned_at_s REAL NOT NULL,
            tries INTEGER NOT NULL DEFAULT 0,
            next_try_at_s REAL NOT NULL DEFAULT 0,
            last_error TEXT NOT NULL DEFAULT '',
            receipt TEXT                       -- storage.wire.Receipt as signed, a JSON list: the proof
        )
        """,
        "CREATE INDEX pack_open ON pack (next_try_at_s) WHERE state <> 'receipted'",
        # What a person must look at. Never deleted by the gateway, only resolved.
        """
        CREATE TABLE quarantine (
            id INTEGER PRIMARY KEY,
            kind TEXT NOT NULL CHECK (kind IN ('refused_data_set', 'variant', 'damaged', 'refused_by_centre',
                'missing_at_centre', 'report_refused')),
            subject TEXT NOT NULL,             -- SOP Instance UID, pack id or Study Instance UID
            reason TEXT NOT NULL,
            sha256 TEXT,                       -- of the kept bytes, for refused_data_set: quarantine/<sha256>
            size_bytes INTEGER,
            calling_ae_title TEXT NOT NULL DEFAULT '',
            times INTEGER NOT NULL DEFAULT 1,  -- a sender that keeps trying is one row
            first_at TEXT NOT NULL,
            last_at TEXT NOT NULL,
            resolved_at TEXT,
            UNIQUE (kind, subject, reason)
        )
        """,
        # Reports on their way home; written by dicom_gateway/returns.py, which draws the states.
        """
        CREATE TABLE report_delivery (
            report_id INTEGER PRIMARY KEY,
            cursor INTEGER NOT NULL,
            study_instance_uid TEXT NOT NULL,
            item TEXT NOT NULL,                -- storage.wire.FeedItem, JSON
            state TEXT NOT NULL CHECK (state IN ('announced', 'received', 'delivered')),
            received_at TEXT,
            delivered_at TEXT,
            tries INTEGER NOT NULL DEFAULT 0,  -- in this state
            error TEXT NOT NULL DEFAULT '',    -- why the last try did not do it
            next_try_at_s REAL NOT NULL DEFAULT 0
        )
        """,
        "CREATE INDEX report_delivery_of_study ON report_delivery (study_instance_uid)",
        "CREATE INDEX report_delivery_open ON report_delivery (cursor) WHERE state <> 'delivered'",
        # What the centre must be told of them, until it has heard it.
        """
        CREATE TABLE report_acknowledgement (
            report_id INTEGER NOT NULL REFERENCES report_delivery (report_id),
            step TEXT NOT NULL,
            at TEXT NOT NULL,
            detail TEXT NOT NULL DEFAULT '',
            tries INTEGER NOT NULL DEFAULT 0,
            next_try_at_s REAL NOT NULL DEFAULT 0,
            told_at TEXT,
            PRIMARY KEY (report_id, step, detail)
        )
        """,
        "CREATE INDEX report_acknowledgement_open ON report_acknowledgement (next_try_at_s) WHERE told_at IS NULL",
        "CREATE TABLE setting (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    ),
    (
        # The patient is more than the Patient ID, which may be empty: a digest of all that is said (enrol.py).
        "ALTER TABLE study RENAME COLUMN patient_id TO patient_key",
        # How often the centre failed on this very pack (HTTP 500).
        "ALTER TABLE pack ADD COLUMN centre_faults INTEGER NOT NULL DEFAULT 0",
        """
        CREATE TABLE quarantine_2 (
            id INTEGER PRIMARY KEY,
            kind TEXT NOT NULL CHECK (kind IN ('refused_data_set', 'variant', 'damaged', 'refused_by_centre',
                'missing_at_centre', 'report_refused', 'orphan')),
            subject TEXT NOT NULL,             -- SOP Instance UID, pack id, Study Instance UID, or a file's name
            reason TEXT NOT NULL,
            sha256 TEXT,                       -- refused_data_set: quarantine/<sha256>; NULL: the bytes are not kept
            size_bytes INTEGER,
            calling_ae_title TEXT NOT NULL DEFAULT '',
            times INTEGER NOT NULL DEFAULT 1,
            first_at TEXT NOT NULL,
            last_at TEXT NOT NULL,
            resolved_at TEXT,
            UNIQUE (kind, subject, reason)
        )
        """,
        "INSERT INTO quarantine_2 SELECT * FROM quarantine",
        "DROP TABLE quarantine",
        "ALTER TABLE quarantine_2 RENAME TO quarantine",
    ),
)
