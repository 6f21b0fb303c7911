-- Version 2: organisations, configuration, key rotation, usage by day, the administrators' own chain.
CREATE TABLE organisations (
    id         TEXT PRIMARY KEY,
    label      TEXT NOT NULL,
    created_ms INTEGER NOT NULL,
    -- Counts changes of the organisation's configuration.
    rev        INTEGER NOT NULL DEFAULT 0,
    -- End of the chain of administrative changes, named by `adm_` + id.
    chain_epoch INTEGER NOT NULL DEFAULT 0,
    chain_seq   INTEGER NOT NULL DEFAULT 0,
    chain_mac   BLOB NOT NULL
) STRICT;

-- Teams, policies, provider settings, pools, routes.
CREATE TABLE objects_of_configuration (
    organisation TEXT NOT NULL REFERENCES organisations (id),
    kind         TEXT NOT NULL,
    name         TEXT NOT NULL,
    body         TEXT NOT NULL,
    version      INTEGER NOT NULL,
    -- Made by `apply`, which then may remove it.
    managed      INTEGER NOT NULL,
    created_ms   INTEGER NOT NULL,
    updated_ms   INTEGER NOT NULL,
    PRIMARY KEY (organisation, kind, name)
) STRICT, WITHOUT ROWID;

-- Tokens of keys: one that does not expire, and older ones while a rotation overlaps.
CREATE TABLE tokens (
    -- HMAC-SHA256(pepper, SHA-256(token)): opens nothing by itself.
    token_hash BLOB PRIMARY KEY,
    key_id     TEXT NOT NULL,
    expires_ms INTEGER
) STRICT, WITHOUT ROWID;
CREATE INDEX tokens_of_key ON tokens (key_id);
INSERT INTO tokens (token_hash, key_id) SELECT token_hash, id FROM keys;

CREATE TABLE keys_2 (
    id           TEXT PRIMARY KEY,
    organisation TEXT NOT NULL,
    team         TEXT,
    policy       TEXT,
    label        TEXT NOT NULL,
    allow        TEXT NOT NULL,
    tags         TEXT NOT NULL DEFAULT '{}',
    -- Personal data and the salt of the hash that commits to it in the chain; both go when the data are erased.
    personal      TEXT,
    personal_salt BLOB,
    status       TEXT NOT NULL CHECK (status IN ('active', 'frozen', 'revoked')),
    version      INTEGER NOT NULL DEFAULT 1,
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
INSERT INTO keys_2 (id, organisation, label, allow, status, created_ms, expires_ms, cap, spent, reserved, in_flight, chain_epoch, chain_seq, chain_mac)
    SELECT id, organisation, label, allow, status, created_ms, expires_ms, cap, spent, reserved, in_flight, chain_epoch, chain_seq, chain_mac FROM keys;
DROP TABLE keys;
ALTER TABLE keys_2 RENAME TO keys;
CREATE INDEX keys_of_team ON keys (organisation, team);

CREATE TABLE credentials_2 (
    id           TEXT PRIMARY KEY,
    organisation TEXT NOT NULL,
    name         TEXT NOT NULL,
    provider     TEXT NOT NULL,
    label        TEXT NOT NULL,
    account      TEXT NOT NULL,
    -- Where the secret was read from, as the configuration says it; never the secret.
    source       TEXT,
    -- Counts secrets; part of what each is sealed with.
    version      INTEGER NOT NULL,
    sealed       BLOB NOT NULL,
    revision     INTEGER NOT NULL,
    managed      INTEGER NOT NULL,
    created_ms   INTEGER NOT NULL,
    updated_ms   INTEGER NOT NULL,
    UNIQUE (organisation, name)
) STRICT;
INSERT INTO credentials_2 (id, organisation, name, provider, label, account, version, sealed, revision, managed, created_ms, updated_ms)
    SELECT id, 'org_default', id, provider, label, account, version, sealed, 1, 0, created_ms, created_ms FROM credentials;
DROP TABLE credentials;
ALTER TABLE credentials_2 RENAME TO credentials;

ALTER TABLE admin_tokens ADD COLUMN organisation TEXT NOT NULL DEFAULT 'org_default';
ALTER TABLE admin_tokens ADD COLUMN team TEXT;
ALTER TABLE admin_tokens ADD COLUMN label TEXT NOT NULL DEFAULT '';
ALTER TABLE admin_tokens ADD COLUMN expires_ms INTEGER;
ALTER TABLE admin_tokens ADD COLUMN revoked_ms INTEGER;

-- What was charged, by day (days since 1970-01-01 UTC of the settlement), key and model.
CREATE TABLE usage (
    organisation TEXT NOT NULL,
    day          INTEGER NOT NULL,
    key_id       TEXT NOT NULL,
    provider     TEXT NOT NULL,
    model        TEXT NOT NULL,
    requests     INTEGER NOT NULL,
    input        INTEGER NOT NULL,
    cache_read   INTEGER NOT NULL,
    cache_write  INTEGER NOT NULL,
    output       INTEGER NOT NULL,
    nanodollars  INTEGER NOT NULL,
    PRIMARY KEY (organisation, day, key_id, provider, model)
) STRICT, WITHOUT ROWID;

-- Answers to writes that carried an Idempotency-Key, sealed: some hold a token.
CREATE TABLE idempotency (
    token_id    TEXT NOT NULL,
    key         TEXT NOT NULL,
    fingerprint BLOB NOT NULL,
    -- NULL while the first request is still under way, or died.
    answer      BLOB,
    created_ms  INTEGER NOT NULL,
    PRIMARY KEY (token_id, key)
) STRICT, WITHOUT ROWID;
CREATE INDEX idempotency_age ON idempotency (created_ms);
