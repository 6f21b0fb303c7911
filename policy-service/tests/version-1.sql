-- The schema of version 1, as installations have it. It never changes again.
CREATE TABLE keys (
    id           TEXT PRIMARY KEY,
    -- HMAC-SHA256(pepper, SHA-256(token)): opens nothing by itself.
    token_hash   BLOB NOT NULL UNIQUE,
    organisation TEXT NOT NULL,
    label        TEXT NOT NULL,
    allow        TEXT NOT NULL,
    status       TEXT NOT NULL CHECK (status IN ('active', 'frozen', 'revoked')),
    created_ms   INTEGER NOT NULL,
    expires_ms   INTEGER,
    cap          INTEGER CHECK (cap >= 0),
    spent        INTEGER NOT NULL DEFAULT 0 CHECK (spent >= 0),
    reserved     INTEGER NOT NULL DEFAULT 0 CHECK (reserved >= 0),
    in_flight    INTEGER NOT NULL DEFAULT 0 CHECK (in_flight >= 0),
    chain_epoch  INTEGER NOT NULL DEFAULT 0,
    chain_seq    INTEGER NOT NULL,
    chain_mac    BLOB NOT NULL
) STRICT;

CREATE TABLE requests (
    req         BLOB PRIMARY KEY,
    -- Empty for a tombstone: a VOID that came before its ADMIT.
    key_id      TEXT NOT NULL,
    state       INTEGER NOT NULL,
    fingerprint BLOB NOT NULL,
    provider    TEXT NOT NULL,
    model       TEXT NOT NULL,
    stream      INTEGER NOT NULL,
    choices     INTEGER NOT NULL,
    hold        INTEGER NOT NULL,
    hold_input  INTEGER NOT NULL,
    clamp       INTEGER,
    charge      INTEGER NOT NULL DEFAULT 0,
    expires_ms  INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX requests_held ON requests (expires_ms) WHERE state = 0;
CREATE INDEX requests_ended ON requests (expires_ms) WHERE state > 0;

CREATE TABLE audit (
    key_id TEXT NOT NULL,
    seq    INTEGER NOT NULL,
    -- The exact bytes that were MACed.
    entry  BLOB NOT NULL,
    mac    BLOB NOT NULL,
    PRIMARY KEY (key_id, seq)
) STRICT, WITHOUT ROWID;

CREATE TABLE vms (
    vm      BLOB PRIMARY KEY,
    seq     INTEGER NOT NULL,
    mac     BLOB NOT NULL,
    seen_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE credentials (
    id         TEXT PRIMARY KEY,
    provider   TEXT NOT NULL,
    label      TEXT NOT NULL,
    account    TEXT NOT NULL,
    version    INTEGER NOT NULL,
    sealed     BLOB NOT NULL,
    created_ms INTEGER NOT NULL
) STRICT;

CREATE TABLE admin_tokens (
    id         TEXT PRIMARY KEY,
    token_hash BLOB NOT NULL UNIQUE,
    role       TEXT NOT NULL,
    created_ms INTEGER NOT NULL
) STRICT;

CREATE TABLE meta (
    name  TEXT PRIMARY KEY,
    value BLOB NOT NULL
) STRICT, WITHOUT ROWID;
PRAGMA user_version = 1;
