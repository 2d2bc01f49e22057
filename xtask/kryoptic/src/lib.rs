//! Nothing: this package only says how its dependency is built.
