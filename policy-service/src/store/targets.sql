-- Where a request may go, if to more than one place: provider, model and what of the hold is each one's (JSON).
ALTER TABLE requests ADD COLUMN targets TEXT;
