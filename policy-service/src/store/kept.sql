-- Version 3: a kept answer knows which object it tells of, so that it can be forgotten with that object's personal data.
ALTER TABLE idempotency ADD COLUMN about TEXT;
CREATE INDEX idempotency_about ON idempotency (about) WHERE about IS NOT NULL;
