-- Where the chain of each node was when an anchor was last written: whoever moves the log away while the server is
-- down does not begin the chain anew.
CREATE TABLE audit_heads (
    node TEXT PRIMARY KEY,
    seq  INTEGER NOT NULL,
    hash TEXT NOT NULL
) STRICT;

-- The key in the HSM that signs anchors. One for all nodes; there is never a second row.
CREATE TABLE audit_keys (
    one        INTEGER PRIMARY KEY CHECK (one = 1),
    id         TEXT NOT NULL UNIQUE,
    modulus    BLOB NOT NULL,
    exponent   BLOB NOT NULL,
    created_at INTEGER NOT NULL
) STRICT;
