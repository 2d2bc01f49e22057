//! What kube-apiserver stores: [`prefix`] tells who encrypted a value, [`object`] takes it apart.

pub mod object;
pub mod prefix;
