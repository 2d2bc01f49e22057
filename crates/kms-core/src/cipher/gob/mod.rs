//! Go's `encoding/gob` for one struct: what the original plug-in wrote, byte for byte.
//!
//! Written is only the one canonical stream. Read is whatever Go may send for a struct with these
//! fields: any type id and field order, zero fields left out, further fields, whole type
//! definitions for those. The reader is bounded by its input: no length is believed before the
//! bytes are there, and nothing is allocated for what is skipped.

mod read;
mod types;

use thiserror::Error;

use crate::limits::MAX_GOB;
use read::Reader;
use types::{BYTES, Field, INT, STRING, Types};

/// The struct inside a KMS v1 cipher, named as in Go.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Secret {
    /// `KP_CONFIG.VERSION` of the configuration that wrote it.
    pub kp_version: i64,
    /// The WDEK's text as the key service returned it.
    pub wrapped_dek: Vec<u8>,
    /// IV and blocks in base64.
    pub cipher: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum GobError {
    #[error("{0} bytes are more than a stored value can hold")]
    TooLong(usize),
    #[error("it ends too early")]
    Truncated,
    #[error("bytes are left over at the end")]
    LeftOver,
    #[error("a number is out of range")]
    Number,
    #[error("type {0} is used but not defined")]
    UnknownType(i64),
    #[error("a type definition is malformed")]
    Definition,
    #[error("types are nested too deeply")]
    TooDeep,
    #[error("the value is not a struct")]
    NotAStruct,
    #[error("the struct has none of the fields KpVersion, WrappedDEK, Cipher")]
    NoField,
    #[error("field {0} has another type than it must have")]
    FieldType(&'static str),
    #[error("field Cipher is not text")]
    NotText,
}

/// The definition of the struct as Go 1.13 sent it: message length, type id -65, then the wire
/// type. It never differs, so it is kept as bytes.
const DEFINITION: &[u8] = b"\x3c\xff\x81\x03\x01\x01\x06Secret\x01\xff\x82\x00\x01\x03\
    \x01\x09KpVersion\x01\x04\x00\
    \x01\x0aWrappedDEK\x01\x0a\x00\
    \x01\x06Cipher\x01\x0c\x00\
    \x00\x00";

/// The type id in [`DEFINITION`]: the first that Go gave to a type of a program's own.
const TYPE_ID: i64 = 65;

/// The one stream that this struct encodes to. Zero fields are left out, as Go does.
#[must_use]
pub fn encode(secret: &Secret) -> Vec<u8> {
    let mut message = Vec::with_capacity(secret.wrapped_dek.len() + secret.cipher.len() + 32);
    put_signed(&mut message, TYPE_ID);
    let mut previous = 0;
    let mut begin_field = |message: &mut Vec<u8>, number: u64| {
        put_unsigned(message, number - previous);
        previous = number;
    };
    if secret.kp_version != 0 {
        begin_field(&mut message, 1);
        put_signed(&mut message, secret.kp_version);
    }
    for (number, bytes) in [(2, secret.wrapped_dek.as_slice()), (3, secret.cipher.as_bytes())] {
        if !bytes.is_empty() {
            begin_field(&mut message, number);
            put_unsigned(&mut message, bytes.len() as u64);
            message.extend_from_slice(bytes);
        }
    }
    put_unsigned(&mut message, 0);

    let mut stream = Vec::with_capacity(DEFINITION.len() + message.len() + 9);
    stream.extend_from_slice(DEFINITION);
    put_unsigned(&mut stream, message.len() as u64);
    stream.extend_from_slice(&message);
    stream
}

/// Reads a stream that holds exactly one value.
///
/// # Errors
/// It is not a gob stream, or its value has no field of ours or one of another type.
pub fn decode(stream: &[u8]) -> Result<Secret, GobError> {
    if stream.len() > MAX_GOB {
        return Err(GobError::TooLong(stream.len()));
    }
    let mut stream = Reader::new(stream);
    let mut types = Types::default();
    loop {
        let mut message = stream.sub_reader()?;
        let id = message.signed()?;
        if id < 0 {
            types.define(id.checked_neg().ok_or(GobError::Number)?, &mut message)?;
            message.finish()?;
            continue;
        }
        let secret = read_secret(&types, id, &mut message)?;
        message.finish()?;
        stream.finish()?;
        return Ok(secret);
    }
}

fn read_secret(types: &Types, id: i64, message: &mut Reader<'_>) -> Result<Secret, GobError> {
    let fields = types.fields(id)?;
    check_fields(fields)?;
    let mut secret = Secret::default();
    message.each_field(|index, value| {
        let field = fields.get(index).ok_or(GobError::Number)?;
        match field.name {
            b"KpVersion" => secret.kp_version = value.signed()?,
            b"WrappedDEK" => secret.wrapped_dek = value.bytes()?.to_vec(),
            b"Cipher" => {
                let text = std::str::from_utf8(value.bytes()?).map_err(|_| GobError::NotText)?;
                text.clone_into(&mut secret.cipher);
            }
            _ => types.skip(field.id, value)?,
        }
        Ok(())
    })?;
    Ok(secret)
}

/// As Go's decoder: fields meet by name, must agree in type, and at least one must meet.
fn check_fields(fields: &[Field<'_>]) -> Result<(), GobError> {
    let ours: [(&str, i64); 3] = [("KpVersion", INT), ("WrappedDEK", BYTES), ("Cipher", STRING)];
    let mut met = false;
    for (name, id) in ours {
        let mut same_name = fields.iter().filter(|field| field.name == name.as_bytes());
        let Some(field) = same_name.next() else { continue };
        if same_name.next().is_some() {
            return Err(GobError::Definition);
        }
        if field.id != id {
            return Err(GobError::FieldType(name));
        }
        met = true;
    }
    if met { Ok(()) } else { Err(GobError::NoField) }
}

/// Small numbers are themselves; larger ones follow the negated count of their bytes.
fn put_unsigned(out: &mut Vec<u8>, number: u64) {
    if let Ok(small @ 0..0x80) = u8::try_from(number) {
        out.push(small);
        return;
    }
    let bytes = number.to_be_bytes();
    let significant = &bytes[(number.leading_zeros() / 8) as usize..];
    out.push((significant.len() as u8).wrapping_neg());
    out.extend_from_slice(significant);
}

/// The sign goes to the lowest bit.
fn put_signed(out: &mut Vec<u8>, number: i64) {
    put_unsigned(out, ((number << 1) ^ (number >> 63)).cast_unsigned());
}

#[cfg(test)]
mod tests;
