-- Version 5: what a running request was admitted for, so that it can be judged anew when the rules change.
ALTER TABLE requests ADD COLUMN endpoint TEXT NOT NULL DEFAULT '';
-- The model as asked for.
ALTER TABLE requests ADD COLUMN asked TEXT;
-- The token that it came with, as in `tokens`.
ALTER TABLE requests ADD COLUMN token BLOB NOT NULL DEFAULT x'';
