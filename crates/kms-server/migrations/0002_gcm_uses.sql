-- How often a version may have been used with AES-GCM, rounded up to whole blocks: servers reserve a block before they
-- use it, and a crash loses what was left of it.
ALTER TABLE key_versions ADD COLUMN gcm_uses INTEGER NOT NULL DEFAULT 0;
