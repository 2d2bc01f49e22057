//! The types that a gob stream defines before it uses them, and how to step over their values.
//!
//! Only structs are looked into. All else is kept just well enough to be skipped.

use std::collections::BTreeMap;

use super::{GobError, Reader};

pub(super) const BOOL: i64 = 1;
pub(super) const INT: i64 = 2;
pub(super) const UINT: i64 = 3;
pub(super) const FLOAT: i64 = 4;
pub(super) const BYTES: i64 = 5;
pub(super) const STRING: i64 = 6;
pub(super) const COMPLEX: i64 = 7;
pub(super) const INTERFACE: i64 = 8;
/// Ids up to here are Go's own and never defined in a stream.
const LAST_BUILT_IN: i64 = INTERFACE;

/// Deeper than any configuration struct, shallower than the stack.
const MAX_DEPTH: usize = 32;

/// A stream for our struct defines one type. This leaves room for fields of others.
const MAX_TYPES: usize = 64;
const MAX_FIELDS: usize = 64;

/// The types defined so far.
#[derive(Default)]
pub(super) struct Types<'a>(BTreeMap<i64, Type<'a>>);

enum Type<'a> {
    Struct(Vec<Field<'a>>),
    /// Arrays and slices: both send a count and as many elements.
    Sequence {
        element: i64,
    },
    Map {
        key: i64,
        value: i64,
    },
    /// A type that encodes itself: a length and as many bytes.
    Opaque,
}

#[derive(Default)]
pub(super) struct Field<'a> {
    pub(super) name: &'a [u8],
    pub(super) id: i64,
}

impl<'a> Types<'a> {
    /// Reads the definition of type `id`.
    pub(super) fn define(&mut self, id: i64, message: &mut Reader<'a>) -> Result<(), GobError> {
        if id <= LAST_BUILT_IN || self.0.len() == MAX_TYPES || self.0.contains_key(&id) {
            return Err(GobError::Definition);
        }
        self.0.insert(id, read_type(message)?);
        Ok(())
    }

    /// The fields of struct `id`.
    pub(super) fn fields(&self, id: i64) -> Result<&[Field<'a>], GobError> {
        match self.0.get(&id) {
            Some(Type::Struct(fields)) => Ok(fields),
            Some(_) => Err(GobError::NotAStruct),
            None if id <= LAST_BUILT_IN => Err(GobError::NotAStruct),
            None => Err(GobError::UnknownType(id)),
        }
    }

    /// Steps over a value of type `id`.
    pub(super) fn skip(&self, id: i64, value: &mut Reader<'_>) -> Result<(), GobError> {
        self.skip_nested(id, value, MAX_DEPTH)
    }

    fn skip_nested(&self, id: i64, value: &mut Reader<'_>, depth: usize) -> Result<(), GobError> {
        let depth = depth.checked_sub(1).ok_or(GobError::TooDeep)?;
        match id {
            BOOL | INT | UINT | FLOAT => return value.unsigned().map(drop),
            BYTES | STRING => return value.bytes().map(drop),
            COMPLEX => {
                value.unsigned()?;
                return value.unsigned().map(drop);
            }
            INTERFACE => return skip_interface(value),
            _ => {}
        }
        match self.0.get(&id).ok_or(GobError::UnknownType(id))? {
            Type::Opaque => value.bytes().map(drop),
            Type::Struct(fields) => value.each_field(|index, value| {
                let field = fields.get(index).ok_or(GobError::Number)?;
                self.skip_nested(field.id, value, depth)
            }),
            Type::Sequence { element } => {
                each(value, |value| self.skip_nested(*element, value, depth))
            }
            Type::Map { key, value: element } => each(value, |value| {
                self.skip_nested(*key, value, depth)?;
                self.skip_nested(*element, value, depth)
            }),
        }
    }
}

/// A count and as many elements. Each takes a byte at least, so a count beyond the bytes that
/// are there is a lie, told to keep the reader busy.
fn each<'a>(
    value: &mut Reader<'a>,
    mut read: impl FnMut(&mut Reader<'a>) -> Result<(), GobError>,
) -> Result<(), GobError> {
    let count = value.unsigned()?;
    if count > value.remaining() as u64 {
        return Err(GobError::Truncated);
    }
    for _ in 0..count {
        read(value)?;
    }
    Ok(())
}

/// The name of the type inside, empty for nil; else its id and the value with its length.
fn skip_interface(value: &mut Reader<'_>) -> Result<(), GobError> {
    if value.bytes()?.is_empty() {
        return Ok(());
    }
    value.signed()?;
    value.bytes().map(drop)
}

/// Go's `wireType`: a struct in which exactly one field is set, that of the kind.
fn read_type<'a>(message: &mut Reader<'a>) -> Result<Type<'a>, GobError> {
    let mut read = None;
    message.each_field(|kind, value| {
        let this = match kind {
            // ArrayT has a length as third field; the count before the elements repeats it.
            0 | 1 => Type::Sequence { element: read_ids(value)?.0 },
            2 => Type::Struct(read_struct(value)?),
            3 => {
                let (key, element) = read_ids(value)?;
                Type::Map { key, value: element }
            }
            4..=6 => {
                read_ids(value)?;
                Type::Opaque
            }
            _ => return Err(GobError::Definition),
        };
        match read.replace(this) {
            None => Ok(()),
            Some(_) => Err(GobError::Definition),
        }
    })?;
    read.ok_or(GobError::Definition)
}

/// A wire type of at most two numbers after its `CommonType`.
fn read_ids(value: &mut Reader<'_>) -> Result<(i64, i64), GobError> {
    let mut ids = (0, 0);
    value.each_field(|index, value| {
        match index {
            0 => skip_common(value)?,
            1 => ids.0 = value.signed()?,
            2 => ids.1 = value.signed()?,
            _ => return Err(GobError::Definition),
        }
        Ok(())
    })?;
    Ok(ids)
}

fn read_struct<'a>(value: &mut Reader<'a>) -> Result<Vec<Field<'a>>, GobError> {
    let mut fields = Vec::new();
    value.each_field(|index, value| match index {
        0 => skip_common(value),
        1 => each(value, |value| {
            if fields.len() == MAX_FIELDS {
                return Err(GobError::Definition);
            }
            fields.push(read_field(value)?);
            Ok(())
        }),
        _ => Err(GobError::Definition),
    })?;
    Ok(fields)
}

fn read_field<'a>(value: &mut Reader<'a>) -> Result<Field<'a>, GobError> {
    let mut field = Field::default();
    value.each_field(|index, value| {
        match index {
            0 => field.name = value.bytes()?,
            1 => field.id = value.signed()?,
            _ => return Err(GobError::Definition),
        }
        Ok(())
    })?;
    Ok(field)
}

/// `CommonType`: the type's name and id. Go does not compare names, nor do we.
fn skip_common(value: &mut Reader<'_>) -> Result<(), GobError> {
    value.each_field(|index, value| match index {
        0 => value.bytes().map(drop),
        1 => value.signed().map(drop),
        _ => Err(GobError::Definition),
    })
}
