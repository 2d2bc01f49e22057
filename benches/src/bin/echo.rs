//! `bench-echo SOCKET`: the echo as a process of its own, on one thread as the plug-in is.

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let Some(path) = std::env::args_os().nth(1) else {
        eprintln!("usage: bench-echo SOCKET");
        return ExitCode::from(2);
    };
    match serve(Path::new(&path)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-echo: {}: {error}", Path::new(&path).display());
            ExitCode::FAILURE
        }
    }
}

fn serve(path: &Path) -> std::io::Result<()> {
    tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()?
        .block_on(keelson_benches::serve(path))
}
