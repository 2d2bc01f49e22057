//! What kube-apiserver stores: [`prefix`] tells who encrypted a value, [`object`] takes it apart,
//! [`open`] gives the object back to whoever has its key.

pub mod object;
pub mod open;
pub mod prefix;
