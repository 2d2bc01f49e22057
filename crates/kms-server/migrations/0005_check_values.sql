-- By which each version is known again in a token, and a token without our keys is told from ours: a truncated MAC
-- (kms_hsm::Vault::check_value), no secret. NULL for versions from before this column until the server has seen them.
ALTER TABLE key_versions ADD COLUMN check_value BLOB;

-- The token that the versions were last seen in. There is never a second row.
CREATE TABLE token (
    one    INTEGER PRIMARY KEY CHECK (one = 1),
    serial TEXT NOT NULL
) STRICT;
