//! The bare grpc-go echo, from `benches/go-echo`: what a plug-in in Go costs before it protects anything.

use std::path::PathBuf;
use std::process::Command;

use keelson_e2e::{Error, Result, assets, process};

use crate::packages::is_program;

/// Builds it below cargo's target folder. `None` where Go is not installed: then there is nothing to compare with.
///
/// # Errors
/// When the build fails, with what Go printed.
pub(crate) fn build() -> Result<Option<PathBuf>> {
    if !is_program("go") {
        return Ok(None);
    }
    let folder = assets::target_folder().join("bench");
    std::fs::create_dir_all(&folder)
        .map_err(Error::machine(format!("make {}", folder.display())))?;
    let program = folder.join("bench-go-echo");
    let mut go = Command::new("go");
    go.args(["build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o"])
        .arg(&program)
        .arg(".")
        .current_dir(assets::root().join("benches/go-echo"))
        .env("GOWORK", "off")
        .env("GOFLAGS", "-mod=readonly");
    process::stdout(go, b"")?;
    Ok(Some(program))
}
