//! The parts of a message as bytes: numbers big-endian, everything else with its length before it.

use super::wire::Garbled;
use crate::pkcs11::{Known, Token};
use crate::statistics::{BOUNDS, Statistics, Times};
use crate::vault::{Circuit, Sealed, VaultError, Wrapped};
use kms_core::secret::SecretBytes;
use std::collections::BTreeMap;
use std::time::Duration;
use uuid::Uuid;
use zeroize::Zeroizing;

/// Fills a packet that was made large enough before: one that grows leaves unwiped copies behind.
pub(super) struct Writer(pub(super) Zeroizing<Vec<u8>>);

/// Room for everything about a message that has no length of its own.
pub(super) const HEAD: usize = 256;

impl Writer {
    pub(super) fn new(weight: usize) -> Self {
        Self(Zeroizing::new(Vec::with_capacity(HEAD + weight)))
    }

    pub(super) fn raw(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub(super) fn u8(&mut self, number: u8) {
        self.raw(&[number]);
    }

    pub(super) fn u32(&mut self, number: u32) {
        self.raw(&number.to_be_bytes());
    }

    pub(super) fn u64(&mut self, number: u64) {
        self.raw(&number.to_be_bytes());
    }

    pub(super) fn flag(&mut self, flag: bool) {
        self.u8(u8::from(flag));
    }

    /// What is longer than a packet is refused before it is encoded, or comes from a token that has gone wild and is
    /// too long for the packet anyway.
    pub(super) fn len(&mut self, len: usize) {
        self.u32(u32::try_from(len).unwrap_or(u32::MAX));
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.len(bytes.len());
        self.raw(bytes);
    }

    pub(super) fn text(&mut self, text: &str) {
        self.bytes(text.as_bytes());
    }

    pub(super) fn tagged_text(&mut self, tag: u8, text: &str) {
        self.u8(tag);
        self.text(text);
    }

    pub(super) fn tagged_id(&mut self, tag: u8, id: Uuid) {
        self.u8(tag);
        self.raw(id.as_bytes());
    }

    pub(super) fn ids(&mut self, ids: &[Uuid]) {
        self.len(ids.len());
        ids.iter().for_each(|id| self.raw(id.as_bytes()));
    }

    pub(super) fn wrapped(&mut self, wrapped: &Wrapped) {
        self.bytes(&wrapped.iv);
        self.bytes(&wrapped.ciphertext);
        self.bytes(&wrapped.hash);
    }

    pub(super) fn sealed(&mut self, sealed: &Sealed) {
        self.bytes(&sealed.iv);
        self.bytes(&sealed.ciphertext);
    }

    pub(super) fn known(&mut self, Known { token, check_value }: &Known) {
        self.text(&token.label);
        self.text(&token.serial);
        self.u64(token.slot);
        self.bytes(check_value);
    }

    pub(super) fn circuit(&mut self, circuit: Circuit) {
        self.u8(match circuit {
            Circuit::Closed => 0,
            Circuit::Repairing => 1,
            Circuit::Open => 2,
            Circuit::Refused => 3,
        });
    }

    pub(super) fn statistics(&mut self, counted: &Statistics) {
        self.len(counted.functions.len());
        for (name, times) in &counted.functions {
            self.text(name);
            self.times(times);
        }
        self.len(counted.codes.len());
        for (name, count) in &counted.codes {
            self.text(name);
            self.u64(*count);
        }
        self.times(&counted.waits);
        for number in [
            counted.logins,
            counted.reconnects,
            counted.sessions,
            counted.busy,
            counted.most_sessions,
            counted.queued,
            counted.most_queued,
        ] {
            self.u64(number);
        }
    }

    /// About how many bytes `counted` becomes.
    pub(super) fn weight_of(counted: &Statistics) -> usize {
        let names = counted.functions.keys().chain(counted.codes.keys());
        let times = 8 * (BOUNDS.len() + 4);
        names.map(|name| name.len() + times).sum::<usize>() + 2 * times
    }

    fn times(&mut self, times: &Times) {
        times.counts.iter().for_each(|count| self.u64(*count));
        self.u64(times.sum.as_secs());
        self.u32(times.sum.subsec_nanos());
    }

    pub(super) fn option<T>(&mut self, value: Option<T>, write: impl FnOnce(&mut Self, T)) {
        self.flag(value.is_some());
        if let Some(value) = value {
            write(self, value);
        }
    }

    pub(super) fn result<T>(
        &mut self,
        result: &Result<T, VaultError>,
        write: impl FnOnce(&mut Self, &T),
    ) {
        match result {
            Ok(value) => {
                self.u8(0);
                write(self, value);
            }
            Err(VaultError::NotFound) => self.u8(1),
            Err(VaultError::NotAuthentic) => self.u8(2),
            Err(VaultError::BadInput(what)) => self.tagged_text(3, what),
            Err(VaultError::Exists) => self.u8(4),
            Err(VaultError::Capacity(what)) => self.tagged_text(5, what),
            Err(VaultError::Credential(what)) => self.tagged_text(6, what),
            Err(VaultError::Policy(what)) => self.tagged_text(7, what),
            Err(VaultError::Unavailable { cause }) => self.tagged_text(8, cause),
            Err(VaultError::TimedOut) => self.u8(9),
            Err(VaultError::Busy) => self.u8(10),
        }
    }
}

/// What is left of a packet.
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn end<T>(&self, message: T) -> Result<T, Garbled> {
        if self.0.is_empty() { Ok(message) } else { Err(Garbled) }
    }

    pub(super) fn take(&mut self, len: usize) -> Result<&'a [u8], Garbled> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(Garbled)?;
        self.0 = rest;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], Garbled> {
        self.take(N)?.try_into().map_err(|_| Garbled)
    }

    pub(super) fn u8(&mut self) -> Result<u8, Garbled> {
        Ok(u8::from_be_bytes(self.array()?))
    }

    pub(super) fn u32(&mut self) -> Result<u32, Garbled> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64, Garbled> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    pub(super) fn flag(&mut self) -> Result<bool, Garbled> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Garbled),
        }
    }

    pub(super) fn circuit(&mut self) -> Result<Circuit, Garbled> {
        match self.u8()? {
            0 => Ok(Circuit::Closed),
            1 => Ok(Circuit::Repairing),
            2 => Ok(Circuit::Open),
            3 => Ok(Circuit::Refused),
            _ => Err(Garbled),
        }
    }

    pub(super) fn duration(&mut self) -> Result<Duration, Garbled> {
        let (secs, nanos) = (self.u64()?, self.u32()?);
        if nanos < 1_000_000_000 { Ok(Duration::new(secs, nanos)) } else { Err(Garbled) }
    }

    pub(super) fn len(&mut self) -> Result<usize, Garbled> {
        usize::try_from(self.u32()?).map_err(|_| Garbled)
    }

    pub(super) fn bytes(&mut self) -> Result<&'a [u8], Garbled> {
        let len = self.len()?;
        self.take(len)
    }

    pub(super) fn vec(&mut self) -> Result<Vec<u8>, Garbled> {
        Ok(self.bytes()?.to_vec())
    }

    pub(super) fn secret(&mut self) -> Result<SecretBytes, Garbled> {
        Ok(SecretBytes::new(self.vec()?))
    }

    pub(super) fn text(&mut self) -> Result<String, Garbled> {
        Ok(std::str::from_utf8(self.bytes()?).map_err(|_| Garbled)?.to_owned())
    }

    pub(super) fn id(&mut self) -> Result<Uuid, Garbled> {
        Ok(Uuid::from_bytes(self.array()?))
    }

    pub(super) fn ids(&mut self) -> Result<Vec<Uuid>, Garbled> {
        let len = self.len()?;
        let bytes = self.take(len.checked_mul(16).ok_or(Garbled)?)?;
        bytes.chunks_exact(16).map(|id| Uuid::from_slice(id).map_err(|_| Garbled)).collect()
    }

    pub(super) fn wrapped(&mut self) -> Result<Wrapped, Garbled> {
        Ok(Wrapped { iv: self.vec()?, ciphertext: self.vec()?, hash: self.vec()? })
    }

    pub(super) fn sealed(&mut self) -> Result<Sealed, Garbled> {
        Ok(Sealed { iv: self.vec()?, ciphertext: self.vec()? })
    }

    pub(super) fn known(&mut self) -> Result<Known, Garbled> {
        let token = Token { label: self.text()?, serial: self.text()?, slot: self.u64()? };
        Ok(Known { token, check_value: self.vec()? })
    }

    pub(super) fn statistics(&mut self) -> Result<Statistics, Garbled> {
        Ok(Statistics {
            functions: self.map(Self::times)?,
            codes: self.map(Self::u64)?,
            waits: self.times()?,
            logins: self.u64()?,
            reconnects: self.u64()?,
            sessions: self.u64()?,
            busy: self.u64()?,
            most_sessions: self.u64()?,
            queued: self.u64()?,
            most_queued: self.u64()?,
        })
    }

    /// Names in their order, each once.
    fn map<T>(
        &mut self,
        mut read: impl FnMut(&mut Self) -> Result<T, Garbled>,
    ) -> Result<BTreeMap<String, T>, Garbled> {
        let mut map = BTreeMap::new();
        for _ in 0..self.len()? {
            let name = self.text()?;
            if map.last_key_value().is_some_and(|(last, _)| *last >= name) {
                return Err(Garbled);
            }
            map.insert(name, read(self)?);
        }
        Ok(map)
    }

    fn times(&mut self) -> Result<Times, Garbled> {
        let mut times = Times::default();
        for count in &mut times.counts {
            *count = self.u64()?;
        }
        times.sum = self.duration()?;
        Ok(times)
    }

    pub(super) fn option<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, Garbled>,
    ) -> Result<Option<T>, Garbled> {
        self.flag()?.then(|| read(self)).transpose()
    }

    pub(super) fn result<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, Garbled>,
    ) -> Result<Result<T, VaultError>, Garbled> {
        Ok(Err(match self.u8()? {
            0 => return Ok(Ok(read(self)?)),
            1 => VaultError::NotFound,
            2 => VaultError::NotAuthentic,
            3 => VaultError::BadInput(self.text()?),
            4 => VaultError::Exists,
            5 => VaultError::Capacity(self.text()?),
            6 => VaultError::Credential(self.text()?),
            7 => VaultError::Policy(self.text()?),
            8 => VaultError::Unavailable { cause: self.text()? },
            9 => VaultError::TimedOut,
            10 => VaultError::Busy,
            _ => return Err(Garbled),
        }))
    }
}
