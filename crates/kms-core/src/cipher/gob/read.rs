//! Numbers, byte strings and messages of a gob stream. Knows nothing of types.

use super::GobError;

/// The bytes not yet read.
pub(super) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(super) fn remaining(&self) -> usize {
        self.0.len()
    }

    /// Nothing may be left.
    pub(super) fn finish(&self) -> Result<(), GobError> {
        if self.0.is_empty() { Ok(()) } else { Err(GobError::LeftOver) }
    }

    /// A byte below 128 is the number; else it is the negated count of the bytes that follow.
    pub(super) fn unsigned(&mut self) -> Result<u64, GobError> {
        let first = *self.take(1)?.first().ok_or(GobError::Truncated)?;
        if first < 0x80 {
            return Ok(u64::from(first));
        }
        let count = usize::from(first.wrapping_neg());
        if count > 8 {
            return Err(GobError::Number);
        }
        Ok(self.take(count)?.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    /// The lowest bit is the sign: set, the rest is complemented.
    pub(super) fn signed(&mut self) -> Result<i64, GobError> {
        let number = self.unsigned()?;
        let magnitude = (number >> 1).cast_signed();
        Ok(if number & 1 == 0 { magnitude } else { !magnitude })
    }

    /// A length and as many bytes.
    pub(super) fn bytes(&mut self) -> Result<&'a [u8], GobError> {
        let len = self.unsigned()?;
        self.take(usize::try_from(len).map_err(|_| GobError::Truncated)?)
    }

    /// A length and a part of that length, to be read on its own.
    pub(super) fn sub_reader(&mut self) -> Result<Self, GobError> {
        self.bytes().map(Self)
    }

    /// A struct: each field after the distance from the one before, in rising order, then zero.
    pub(super) fn each_field(
        &mut self,
        mut read: impl FnMut(usize, &mut Self) -> Result<(), GobError>,
    ) -> Result<(), GobError> {
        let mut next: usize = 0;
        loop {
            let delta = self.unsigned()?;
            if delta == 0 {
                return Ok(());
            }
            let delta = usize::try_from(delta).map_err(|_| GobError::Number)?;
            next = next.checked_add(delta).ok_or(GobError::Number)?;
            read(next - 1, self)?;
        }
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], GobError> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(GobError::Truncated)?;
        self.0 = rest;
        Ok(taken)
    }
}
