//! `bench-load`: the other side of `cargo xtask bench server`. Reads what to do as JSON from standard input, prints what
//! came of it as JSON.
//!
//! One thread, hand-made requests, nothing kept of an answer but its status and its time: it shares the machine with
//! the server that it measures.

mod figures;
mod https;
mod keys;

use std::io::Read;
use std::process::ExitCode;

use figures::Figures;
use serde::Deserialize;
use serde_json::Value;

type Failure = Box<dyn std::error::Error + Send + Sync>;

#[derive(Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
enum Task {
    /// Ask a key service over HTTPS.
    Https(https::Load),
    /// Wrap in the HSM with no server between.
    Vault(keys::Vault),
    /// Put keys into a database, and none into the HSM.
    Fill(keys::Fill),
    /// Put keys into a database and into the HSM.
    Make(keys::Make),
}

fn main() -> ExitCode {
    match run() {
        Ok(answer) => {
            println!("{answer}");
            ExitCode::SUCCESS
        }
        Err(failure) => {
            eprintln!("bench-load: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<Value, Failure> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text)?;
    let task: Task = serde_json::from_str(&text)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let figures = runtime.block_on(async {
        match task {
            Task::Https(load) => load.run().await,
            Task::Vault(vault) => vault.run().await,
            Task::Fill(fill) => fill.run().await.map(|()| Figures::default()),
            Task::Make(make) => make.run().await.map(|()| Figures::default()),
        }
    })?;
    Ok(figures.json())
}
