//! Where stored values come from.

pub mod input;
