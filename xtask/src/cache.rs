//! Where what takes long to build is kept: outside the clone, under a key made of everything that went into it.

use std::path::PathBuf;

use keelson_e2e::{Error, Result};

/// `~/.cache/keelson/KIND`.
///
/// # Errors
/// When the user has no home.
pub(crate) fn folder(kind: &str) -> Result<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")));
    let cache = cache.ok_or_else(|| Error::Missing {
        what: "a cache folder".to_owned(),
        remedy: "set HOME or XDG_CACHE_HOME".to_owned(),
    })?;
    Ok(cache.join("keelson").join(kind))
}

/// A name for exactly these inputs.
pub(crate) fn key(inputs: &[&str]) -> String {
    let mut digest = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
    for input in inputs {
        digest.update(&input.len().to_be_bytes());
        digest.update(input.as_bytes());
    }
    digest.finish().as_ref().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_depends_on_every_input_and_on_its_place() {
        assert_eq!(key(&["a", "b"]), key(&["a", "b"]));
        assert_ne!(key(&["a", "b"]), key(&["ab", ""]));
        assert_ne!(key(&["a", "b"]), key(&["b", "a"]));
    }
}
