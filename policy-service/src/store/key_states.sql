-- Version 7: states of credentials that outlast a restart, under the gates' names of them.
CREATE TABLE key_states (
    name     TEXT PRIMARY KEY,
    -- JSON: "rejected" or "exhausted".
    state    TEXT NOT NULL,
    -- Unix milliseconds; NULL: until an operator acts.
    until_ms INTEGER,
    -- The end is a guess.
    probe    INTEGER NOT NULL CHECK (probe IN (0, 1))
) STRICT, WITHOUT ROWID;
