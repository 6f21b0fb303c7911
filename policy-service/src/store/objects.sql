-- Objects at providers (answers, files, conversations) by the key that made them, with the credential that reaches them.
CREATE TABLE objects (
    organisation TEXT NOT NULL,
    provider     TEXT NOT NULL,
    id           TEXT NOT NULL,
    key_id       TEXT NOT NULL,
    credential   TEXT NOT NULL,
    created_ms   INTEGER NOT NULL,
    PRIMARY KEY (organisation, provider, id)
) STRICT, WITHOUT ROWID;
