//! The one encoding under every authentication code: fields with their lengths before them.
//!
//! Two different lists of fields never encode alike, so no byte can move from one field to its
//! neighbour. Nothing here is ever decoded again.

/// A list of fields, begun with a label that names what is authenticated.
pub(crate) struct Canonical(Vec<u8>);

impl Canonical {
    pub(crate) fn new(label: &str) -> Self {
        Self(Vec::with_capacity(256)).field(label.as_bytes())
    }

    /// Adds bytes of any length.
    pub(crate) fn field(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(&length(bytes.len()));
        self.0.extend_from_slice(bytes);
        self
    }

    /// Adds a number, as eight bytes with no length before them.
    pub(crate) fn number(mut self, number: i64) -> Self {
        self.0.extend_from_slice(&number.to_be_bytes());
        self
    }

    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

/// A length as it stands before its field.
pub(crate) fn length(len: usize) -> [u8; 8] {
    (len as u64).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moving_a_byte_between_fields_changes_the_encoding() {
        let one = Canonical::new("t").field(b"ab").field(b"c").into_bytes();
        let other = Canonical::new("t").field(b"a").field(b"bc").into_bytes();
        assert_ne!(one, other);
    }

    #[test]
    fn an_empty_field_is_not_an_absent_one() {
        assert_ne!(Canonical::new("t").field(b"").into_bytes(), Canonical::new("t").into_bytes());
    }
}
