//! Every size that somebody else enforces, or that keeps a parser bounded, with its reason.
//!
//! No limit is written as a bare number anywhere else.

/// Longest `ciphertext` of a KMS v2 EncryptResponse that kube-apiserver accepts (`envelope.go`,
/// `ValidateEncryptedDEKSource`: 1 to 1024 bytes, both included).
pub const MAX_V2_CIPHERTEXT: usize = 1024;

/// What kube-apiserver hands to a KMS v2 Encrypt: the seed of its own data keys (before 1.29 a data key of that length).
pub const V2_SEED: usize = 32;

/// Longest `key_id` that kube-apiserver accepts (`ValidateKeyID`: 1 to 1024 bytes).
pub const MAX_KEY_ID: usize = 1024;

/// Most bytes of annotation keys and values together (`ValidateAnnotations`).
pub const MAX_ANNOTATIONS: usize = 32 * 1024;

/// Longest `cipher` of a KMS v1 EncryptResponse: kube-apiserver stores its length in a `u16`.
pub const MAX_V1_CIPHER: usize = 65_535;

/// Longest payload taken by KMS v1. A cipher of [`MAX_V1_CIPHER`] bytes is base64 within base64,
/// which leaves 9/16 of it, 36,863 bytes, for IV, payload, WDEK and framing.
pub const MAX_PAYLOAD: usize = 32 * 1024;

/// Longest WDEK text. The key service wraps at most 4096 bytes; twice in base64, with hash and
/// IV, that is under 8 KiB. Twice that again for services other than ours.
pub const MAX_WDEK: usize = 16 * 1024;

/// Longest gob stream read: what [`MAX_V1_CIPHER`] bytes of base64 can hold.
pub const MAX_GOB: usize = MAX_V1_CIPHER / 4 * 3;

/// Longest value read from etcd: the request size above which etcd itself warns
/// (`recommendedMaxRequestBytes`). Its default is 1.5 MiB.
pub const MAX_ETCD_VALUE: usize = 10 * 1024 * 1024;

/// Longest line of an audit log. Names and ids fill less than 1 KiB of it, and a correlation id of the caller's is kept
/// short where it is read.
pub const MAX_AUDIT_LINE: usize = 64 * 1024;
