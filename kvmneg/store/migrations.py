# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ladder of schema versions of the embedded store: MIGRATIONS[n] brings version n to n + 1, in one transaction.

A released step is never changed; a change of the schema is a step of its own at the end.
"""

# The fence is the newest row of its own history: pinning is one insert, so that fence, generation and audit
# record cannot part, and generations have no gap and no way back.
_FENCE_AND_GRANTS = """
CREATE TABLE fence_history (
    generation INTEGER PRIMARY KEY,
    action     TEXT NOT NULL CHECK (action IN ('pin', 'unpin')),
    digest     TEXT NOT NULL,
    text       TEXT CHECK ((action = 'pin') = (text IS NOT NULL)),
    at         TEXT NOT NULL,
    uid        INTEGER NOT NULL,
    pid        INTEGER NOT NULL,
    process    TEXT NOT NULL,
    reason     TEXT NOT NULL
);
CREATE TRIGGER fence_history_next BEFORE INSERT ON fence_history
    WHEN NEW.generation <> (SELECT COALESCE(MAX(generation), 0) + 1 FROM fence_history)
    BEGIN SELECT RAISE(ABORT, 'generations of the fence go up one by one'); END;
CREATE TRIGGER fence_history_update BEFORE UPDATE ON fence_history
    BEGIN SELECT RAISE(ABORT, 'the history of the fence is never rewritten'); END;
CREATE TRIGGER fence_history_delete BEFORE DELETE ON fence_history
    BEGIN SELECT RAISE(ABORT, 'the history of the fence is never rewritten'); END;

CREATE TABLE contracts (
    digest TEXT PRIMARY KEY CHECK (length(digest) = 64 AND digest NOT GLOB '*[^0-9a-f]*'),
    body   BLOB NOT NULL
);
CREATE TABLE grants (
    id         INTEGER PRIMARY KEY,
    vm         TEXT NOT NULL,
    digest     TEXT NOT NULL REFERENCES contracts (digest),
    generation INTEGER NOT NULL,
    uid        INTEGER NOT NULL,
    pid        INTEGER NOT NULL,
    begun_at   TEXT NOT NULL,
    deadline   REAL NOT NULL,
    state      TEXT NOT NULL CHECK (state IN ('begun', 'started', 'ended', 'expired')),
    finished   INTEGER -- the order of finishing
        CHECK ((state IN ('ended', 'expired')) = (finished IS NOT NULL))
);
CREATE UNIQUE INDEX grants_held ON grants (vm) WHERE finished IS NULL;
CREATE INDEX grants_by_uid ON grants (uid) WHERE finished IS NULL;
CREATE INDEX grants_due ON grants (deadline) WHERE state = 'begun';
CREATE INDEX grants_finished ON grants (finished) WHERE finished IS NOT NULL;
CREATE INDEX grants_by_contract ON grants (digest);

CREATE TABLE reports (
    digest       TEXT PRIMARY KEY,
    combo_digest TEXT NOT NULL,
    at           TEXT NOT NULL,
    body         BLOB NOT NULL,
    seen         INTEGER NOT NULL UNIQUE -- order of recording: a clock may go back
);
"""

# What changes the fence, its proposals, roll-back sets and leases: kvmneg.store.audit.
_AUDIT = """
CREATE TABLE audit (
    id         INTEGER PRIMARY KEY,
    generation INTEGER NOT NULL, -- of the fence, once the change was made
    action     TEXT NOT NULL CHECK (action <> ''),
    at         TEXT NOT NULL,
    uid        INTEGER NOT NULL,
    pid        INTEGER NOT NULL,
    process    TEXT NOT NULL,
    reason     TEXT NOT NULL,
    detail     TEXT NOT NULL -- JSON, an object
);
CREATE TRIGGER audit_next BEFORE INSERT ON audit
    WHEN NEW.id <> (SELECT COALESCE(MAX(id), 0) + 1 FROM audit)
    BEGIN SELECT RAISE(ABORT, 'the audit has no gaps'); END;
CREATE TRIGGER audit_update BEFORE UPDATE ON audit
    BEGIN SELECT RAISE(ABORT, 'the audit is never rewritten'); END;
CREATE TRIGGER audit_delete BEFORE DELETE ON audit
    BEGIN SELECT RAISE(ABORT, 'the audit is never rewritten'); END;
"""

_WAIVERS = """
CREATE TABLE waivers (
    boot    TEXT NOT NULL,
    pid     INTEGER NOT NULL,
    started INTEGER NOT NULL, -- clock ticks since that boot: with the number, one process
    reason  TEXT NOT NULL,
    PRIMARY KEY (boot, pid, started)
) WITHOUT ROWID;
"""

# A grant becomes a lease: of a user's VM (nobody blocks another user's UUID) and of one of its incarnations, which is
# the grant's number and never used again; holders are the processes that keep it, reported_sets what VMMs really set.
_LEASES = """
CREATE TABLE reported_sets (
    digest TEXT PRIMARY KEY CHECK (length(digest) = 64 AND digest NOT GLOB '*[^0-9a-f]*'),
    body   BLOB NOT NULL
);
CREATE TABLE leases (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    vm         TEXT NOT NULL,
    digest     TEXT NOT NULL REFERENCES contracts (digest),
    generation INTEGER NOT NULL,
    uid        INTEGER NOT NULL,
    pid        INTEGER NOT NULL,
    begun_at   TEXT NOT NULL,
    deadline   REAL NOT NULL,
    state      TEXT NOT NULL CHECK (state IN ('begun', 'started', 'saved', 'ended', 'expired')),
    finished   INTEGER -- the order of finishing
        CHECK ((state IN ('ended', 'expired')) = (finished IS NOT NULL)),
    boot       TEXT NOT NULL, -- that of the host when the guest last ran: none outlives it
    reported   TEXT REFERENCES reported_sets (digest),
    pid_started INTEGER NOT NULL DEFAULT 0 -- of the asker: clock ticks since that boot
);
INSERT INTO leases
    SELECT id, vm, digest, generation, uid, pid, begun_at, deadline, state, finished, '', NULL, 0
    FROM grants;
DROP TABLE grants;
ALTER TABLE leases RENAME TO grants;
CREATE UNIQUE INDEX grants_held ON grants (vm, uid) WHERE finished IS NULL;
CREATE INDEX grants_by_uid ON grants (uid) WHERE finished IS NULL;
CREATE INDEX grants_due ON grants (deadline) WHERE state = 'begun';
CREATE INDEX grants_finished ON grants (finished) WHERE finished IS NOT NULL;
CREATE INDEX grants_by_contract ON grants (digest);
CREATE INDEX grants_by_reported ON grants (reported) WHERE reported IS NOT NULL;
CREATE TABLE holders (
    lease   INTEGER NOT NULL REFERENCES grants (id) ON DELETE CASCADE,
    pid     INTEGER NOT NULL,
    started INTEGER NOT NULL, -- clock ticks since boot: with the number, one process
    by      TEXT NOT NULL CHECK (by IN ('connection', 'process')),
    PRIMARY KEY (lease, pid, started)
) WITHOUT ROWID;
CREATE INDEX holders_by_process ON holders (pid, started);
"""

# Where the level stands beside the fence's history (kvmneg.store.levels). A pool that floats does so at what its latest
# report offers. `step` tells what a pin was part of.
_LEVELS = """
ALTER TABLE fence_history ADD COLUMN step TEXT
    CHECK (step IS NULL OR (action = 'pin' AND step IN ('raise', 'lower', 'lower-abort')));
CREATE TABLE level (
    id       INTEGER PRIMARY KEY CHECK (id = 1),
    breached INTEGER NOT NULL DEFAULT 0, -- whether the last thing told was a breach
    proposal TEXT NOT NULL DEFAULT '' CHECK (proposal IN ('', 'raise', 'lower')),
    report   TEXT, -- of the level that floats
    text     TEXT
);
INSERT INTO level (id, report) VALUES (1, (SELECT digest FROM reports ORDER BY seen DESC LIMIT 1));
CREATE TRIGGER level_delete BEFORE DELETE ON level
    BEGIN SELECT RAISE(ABORT, 'there is always one level'); END;
CREATE TABLE proposals (
    id         INTEGER PRIMARY KEY DEFAULT 1 CHECK (id = 1), -- one is open at a time
    kind       TEXT NOT NULL CHECK (kind IN ('raise', 'lower')),
    digest     TEXT NOT NULL,
    text       TEXT NOT NULL,
    base       INTEGER NOT NULL, -- the generation whose fence it shall replace
    generation INTEGER NOT NULL, -- at which it was opened
    urgent     INTEGER NOT NULL,
    at         TEXT NOT NULL,
    deadline   REAL CHECK ((kind = 'raise') = (deadline IS NOT NULL)),
    uid        INTEGER NOT NULL,
    pid        INTEGER NOT NULL,
    process    TEXT NOT NULL,
    reason     TEXT NOT NULL,
    plan       TEXT NOT NULL -- JSON
);
"""

# Combos have a row of their own, so that a history of many is read without opening their reports. What was measured
# is evidence: nothing deletes or rewrites it. The time of recording again is the combo's (last_at), not the report's.
_COMBOS_AND_ROLLS = """
CREATE TABLE combos (
    digest   TEXT PRIMARY KEY,
    document TEXT, -- JSON; NULL where the combo was recorded in its reports only
    report   TEXT NOT NULL REFERENCES reports (digest), -- its newest
    first_at TEXT NOT NULL,
    last_at  TEXT NOT NULL,
    seen     INTEGER NOT NULL UNIQUE -- of its newest report
);
INSERT INTO combos (digest, report, first_at, last_at, seen)
    SELECT combo_digest, digest, (SELECT MIN(at) FROM reports WHERE combo_digest = newest.combo_digest),
        (SELECT MAX(at) FROM reports WHERE combo_digest = newest.combo_digest), seen
    FROM reports AS newest
    WHERE seen = (SELECT MAX(seen) FROM reports WHERE combo_digest = newest.combo_digest);
CREATE TRIGGER reports_delete BEFORE DELETE ON reports
    BEGIN SELECT RAISE(ABORT, 'a report is kept for ever'); END;
CREATE TRIGGER reports_update BEFORE UPDATE OF digest, combo_digest, at, body ON reports
    BEGIN SELECT RAISE(ABORT, 'a report is never rewritten'); END;
CREATE TRIGGER combos_delete BEFORE DELETE ON combos
    BEGIN SELECT RAISE(ABORT, 'a combo is kept for ever'); END;

CREATE TABLE rolls (
    place   INTEGER PRIMARY KEY, -- the order of adding
    combo   TEXT NOT NULL UNIQUE REFERENCES combos (digest),
    at      TEXT NOT NULL,
    uid     INTEGER NOT NULL,
    pid     INTEGER NOT NULL,
    process TEXT NOT NULL,
    reason  TEXT NOT NULL
);
"""

# A database made from the copy of a lost one begins its history above every generation that is known of that.
_HISTORY_MAY_BEGIN_LATER = """
DROP TRIGGER fence_history_next;
CREATE TRIGGER fence_history_next BEFORE INSERT ON fence_history
    WHEN NEW.generation < 1 OR
        NEW.generation <> COALESCE((SELECT MAX(generation) + 1 FROM fence_history), NEW.generation)
    BEGIN SELECT RAISE(ABORT, 'generations of the fence go up one by one'); END;
"""

MIGRATIONS = (
    _FENCE_AND_GRANTS,
    _AUDIT,
    _WAIVERS,
    _LEASES,
    _LEVELS,
    _COMBOS_AND_ROLLS,
    _HISTORY_MAY_BEGIN_LATER,
)
