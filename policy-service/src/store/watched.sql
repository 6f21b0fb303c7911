-- Version 6: the token that a request came with, as in `tokens`: when it stops working, so does the request.
ALTER TABLE requests ADD COLUMN token BLOB NOT NULL DEFAULT x'';
