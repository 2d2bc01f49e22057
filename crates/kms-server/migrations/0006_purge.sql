-- When the purge of a destroyed key began. From then on the HSM may lack its versions, and nobody misses them.
ALTER TABLE keys ADD COLUMN purge_begun_at INTEGER;

-- What was purged: the ids of keys and of their versions, and nothing else of them. No id comes back, and with it a key
-- that somebody has a WDEK of, or a count of uses that begins anew.
CREATE TABLE purged (
    id TEXT PRIMARY KEY,
    at INTEGER NOT NULL
) STRICT;

CREATE TRIGGER no_purged_key BEFORE INSERT ON keys
WHEN EXISTS (SELECT 1 FROM purged WHERE id = NEW.id)
BEGIN
    SELECT RAISE(ABORT, 'this id was purged and is never used again');
END;

CREATE TRIGGER no_purged_version BEFORE INSERT ON key_versions
WHEN EXISTS (SELECT 1 FROM purged WHERE id = NEW.id)
BEGIN
    SELECT RAISE(ABORT, 'this id was purged and is never used again');
END;
