-- Version 5: sums by window of keys, teams and organisations; what a request was held for; shadow mode; alarms.

-- One row for each: the key's id, `team/ORGANISATION/NAME`, `org/ORGANISATION`. Money in nanodollars.
CREATE TABLE accounts (
    id        TEXT PRIMARY KEY,
    -- The day, from 1970-01-01 UTC, of the day's and the month's window. It never goes back.
    day       INTEGER NOT NULL,
    in_flight INTEGER NOT NULL CHECK (in_flight >= 0),
    day_spent INTEGER NOT NULL CHECK (day_spent >= 0),
    day_reserved INTEGER NOT NULL CHECK (day_reserved >= 0),
    day_requests INTEGER NOT NULL,
    day_tokens INTEGER NOT NULL,
    day_tokens_reserved INTEGER NOT NULL,
    day_alarmed INTEGER NOT NULL,
    month_spent INTEGER NOT NULL CHECK (month_spent >= 0),
    month_reserved INTEGER NOT NULL CHECK (month_reserved >= 0),
    month_requests INTEGER NOT NULL,
    month_tokens INTEGER NOT NULL,
    month_tokens_reserved INTEGER NOT NULL,
    month_alarmed INTEGER NOT NULL,
    total_spent INTEGER NOT NULL CHECK (total_spent >= 0),
    total_reserved INTEGER NOT NULL CHECK (total_reserved >= 0),
    total_requests INTEGER NOT NULL,
    total_tokens INTEGER NOT NULL,
    total_tokens_reserved INTEGER NOT NULL,
    total_alarmed INTEGER NOT NULL,
    -- Requests and tokens of the last minute, where a rate limits them.
    recent    BLOB NOT NULL,
    -- How long requests take, in milliseconds; 0: not known.
    usual_ms  INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- What was spent before is of the whole life; of today and this month the days' sums tell.
INSERT INTO accounts
    SELECT k.id, today.day, k.in_flight,
        coalesce((SELECT max(sum(nanodollars), 0) FROM usage u WHERE u.key_id = k.id AND u.day = today.day), 0), k.reserved,
        coalesce((SELECT sum(requests) FROM usage u WHERE u.key_id = k.id AND u.day = today.day), 0),
        coalesce((SELECT sum(input + cache_read + cache_write + output) FROM usage u WHERE u.key_id = k.id AND u.day = today.day), 0), 0, 0,
        coalesce((SELECT max(sum(nanodollars), 0) FROM usage u WHERE u.key_id = k.id AND u.day BETWEEN today.month AND today.day), 0), k.reserved,
        coalesce((SELECT sum(requests) FROM usage u WHERE u.key_id = k.id AND u.day BETWEEN today.month AND today.day), 0),
        coalesce((SELECT sum(input + cache_read + cache_write + output) FROM usage u WHERE u.key_id = k.id AND u.day BETWEEN today.month AND today.day), 0), 0, 0,
        k.spent, k.reserved,
        coalesce((SELECT sum(requests) FROM usage u WHERE u.key_id = k.id), 0),
        coalesce((SELECT sum(input + cache_read + cache_write + output) FROM usage u WHERE u.key_id = k.id), 0), 0, 0, x'', 0
    FROM keys k, (SELECT unixepoch('now') / 86400 AS day, unixepoch('now', 'start of month') / 86400 AS month) today;
INSERT INTO accounts
    SELECT 'team/' || k.organisation || '/' || k.team, max(a.day), sum(a.in_flight), sum(day_spent), sum(day_reserved), sum(day_requests), sum(day_tokens), 0, 0,
        sum(month_spent), sum(month_reserved), sum(month_requests), sum(month_tokens), 0, 0,
        sum(total_spent), sum(total_reserved), sum(total_requests), sum(total_tokens), 0, 0, x'', 0
    FROM keys k JOIN accounts a ON a.id = k.id WHERE k.team IS NOT NULL GROUP BY k.organisation, k.team;
INSERT INTO accounts
    SELECT 'org/' || k.organisation, max(a.day), sum(a.in_flight), sum(day_spent), sum(day_reserved), sum(day_requests), sum(day_tokens), 0, 0,
        sum(month_spent), sum(month_reserved), sum(month_requests), sum(month_tokens), 0, 0,
        sum(total_spent), sum(total_reserved), sum(total_requests), sum(total_tokens), 0, 0, x'', 0
    FROM keys k JOIN accounts a ON a.id = k.id WHERE a.id = k.id GROUP BY k.organisation;

ALTER TABLE keys ADD COLUMN limits TEXT NOT NULL DEFAULT '{}';
ALTER TABLE keys ADD COLUMN enforce TEXT NOT NULL DEFAULT 'enforce' CHECK (enforce IN ('enforce', 'shadow'));
UPDATE keys SET limits = json_object('budgets', json_array(json_object('window', 'total', 'cap', cap))) WHERE cap IS NOT NULL;
ALTER TABLE keys DROP COLUMN cap;
ALTER TABLE keys DROP COLUMN spent;
ALTER TABLE keys DROP COLUMN reserved;
ALTER TABLE keys DROP COLUMN in_flight;

-- The team that it was reserved on, whatever the key's is now.
ALTER TABLE requests ADD COLUMN team TEXT;
-- `METHOD /path`, and the model as it was asked for.
ALTER TABLE requests ADD COLUMN endpoint TEXT NOT NULL DEFAULT '';
ALTER TABLE requests ADD COLUMN asked TEXT;
ALTER TABLE requests ADD COLUMN admitted_ms INTEGER NOT NULL DEFAULT 0;
-- The day whose windows it is charged to.
ALTER TABLE requests ADD COLUMN day INTEGER NOT NULL DEFAULT 0;
ALTER TABLE requests ADD COLUMN hold_tokens INTEGER NOT NULL DEFAULT 0;
ALTER TABLE requests ADD COLUMN hold_output INTEGER NOT NULL DEFAULT 0;
-- Tokens it is charged.
ALTER TABLE requests ADD COLUMN tokens INTEGER NOT NULL DEFAULT 0;
-- Some budget holds it to its hold: a charge above that freezes the key.
ALTER TABLE requests ADD COLUMN bounded INTEGER NOT NULL DEFAULT 1;
-- Levels with a limit per minute: 1 the key, 2 the team, 4 the organisation.
ALTER TABLE requests ADD COLUMN rated INTEGER NOT NULL DEFAULT 0;
UPDATE requests SET day = unixepoch('now') / 86400 WHERE state IN (0, 3);

-- What keys in shadow mode would have been refused.
CREATE TABLE would_refuse (
    organisation TEXT NOT NULL,
    day          INTEGER NOT NULL,
    key_id       TEXT NOT NULL,
    code         TEXT NOT NULL,
    provider     TEXT NOT NULL,
    model        TEXT NOT NULL,
    requests     INTEGER NOT NULL,
    PRIMARY KEY (organisation, day, key_id, code, provider, model)
) STRICT, WITHOUT ROWID;

-- Alarms on their way to a webhook; each is gone when it has arrived, or is too old.
CREATE TABLE outbox (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    organisation TEXT NOT NULL,
    what         TEXT NOT NULL,
    -- JSON.
    detail       TEXT NOT NULL,
    time_ms      INTEGER NOT NULL,
    tries        INTEGER NOT NULL DEFAULT 0,
    -- Not to be tried before.
    next_ms      INTEGER NOT NULL
) STRICT;
