-- Times are nanoseconds since 1970. UUIDs are lower-case text with hyphens. Nothing here is key material: root keys
-- are named, never held, and of an API key only the SHA-256 is kept.

CREATE TABLE instances (
    id         TEXT PRIMARY KEY,
    name       TEXT NOT NULL UNIQUE,
    created_at INTEGER NOT NULL
) STRICT;

-- The key pair that signs tokens lives in the HSM under this id; the public half is kept so that tokens can be
-- checked while the HSM is away.
CREATE TABLE signing_keys (
    id         TEXT PRIMARY KEY,
    modulus    BLOB NOT NULL,
    exponent   BLOB NOT NULL,
    created_at INTEGER NOT NULL
) STRICT;

-- One role each, in one instance or (NULL) in every instance.
CREATE TABLE service_ids (
    id          TEXT PRIMARY KEY,
    name        TEXT NOT NULL,
    description TEXT,
    role        TEXT NOT NULL,
    instance_id TEXT REFERENCES instances (id),
    created_at  INTEGER NOT NULL
) STRICT;

CREATE TABLE api_keys (
    id         TEXT PRIMARY KEY,
    service_id TEXT NOT NULL REFERENCES service_ids (id),
    name       TEXT NOT NULL,
    hash       BLOB NOT NULL UNIQUE,
    created_at INTEGER NOT NULL,
    revoked_at INTEGER
) STRICT;

-- state: -1 while its first version is being made in the HSM, then as on the wire (1 active, 5 destroyed).
CREATE TABLE keys (
    id          TEXT PRIMARY KEY,
    instance_id TEXT NOT NULL REFERENCES instances (id),
    name        TEXT NOT NULL,
    description TEXT,
    tags        TEXT NOT NULL DEFAULT '[]',
    imported    INTEGER NOT NULL,
    state       INTEGER NOT NULL,
    expires_at  INTEGER,
    created_at  INTEGER NOT NULL,
    created_by  TEXT NOT NULL,
    rotated_at  INTEGER,
    deleted_at  INTEGER,
    deleted_by  TEXT
) STRICT;

CREATE INDEX keys_by_instance ON keys (instance_id, state, id);

-- number: 1, 2, 3 ... in the order in which they became active; NULL while the HSM is making it.
CREATE TABLE key_versions (
    id         TEXT PRIMARY KEY,
    key_id     TEXT NOT NULL REFERENCES keys (id),
    number     INTEGER,
    created_at INTEGER NOT NULL,
    UNIQUE (key_id, number)
) STRICT;
