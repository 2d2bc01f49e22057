-- A policy gives a service ID one role in one place: one key of an instance, one instance, or (NULL) every instance.
CREATE TABLE policies (
    id          TEXT PRIMARY KEY,
    service_id  TEXT NOT NULL REFERENCES service_ids (id),
    role        TEXT NOT NULL,
    instance_id TEXT REFERENCES instances (id),
    key_id      TEXT REFERENCES keys (id),
    created_at  INTEGER NOT NULL,
    CHECK (key_id IS NULL OR instance_id IS NOT NULL)
) STRICT;

CREATE INDEX policies_by_service_id ON policies (service_id);

-- The one role that each service ID had is its first policy. Ids are random in both tables, so one id can be in both.
INSERT INTO policies (id, service_id, role, instance_id, created_at)
    SELECT id, id, role, instance_id, created_at FROM service_ids;

-- From here on service_ids.instance_id only says where a service ID is at home: who manages it.
ALTER TABLE service_ids DROP COLUMN role;

-- A rotated API key keeps its id and gets a new secret; the one before lives on until old_until, if that is said.
-- Tokens name the generation of the secret that they were got with, and end with it.
ALTER TABLE api_keys ADD COLUMN generation INTEGER NOT NULL DEFAULT 1;
ALTER TABLE api_keys ADD COLUMN old_hash BLOB;
ALTER TABLE api_keys ADD COLUMN old_until INTEGER;
ALTER TABLE api_keys ADD COLUMN rotated_at INTEGER;
ALTER TABLE api_keys ADD COLUMN locked_at INTEGER;

CREATE INDEX api_keys_by_old_hash ON api_keys (old_hash);

-- Whose tokens of another issuer speak for which service ID.
CREATE TABLE profiles (
    id         TEXT PRIMARY KEY,
    service_id TEXT NOT NULL REFERENCES service_ids (id),
    name       TEXT NOT NULL UNIQUE,
    issuer     TEXT NOT NULL,
    subject    TEXT NOT NULL,
    created_at INTEGER NOT NULL
) STRICT;
