//! What is measured: prepared tokens and databases, kept below target/bench, and the servers in front of them.

use std::fs;
use std::path::{Path, PathBuf};

use keelson_e2e::chain::fresh_folder;
use keelson_e2e::key_service::KeyService;
use keelson_e2e::kmsctl::Kmsctl;
use keelson_e2e::process::{self, Lifetime, Process, Spec};
use keelson_e2e::{Error, Result, assets, http, pki, ports, wait};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::time::Duration;

use super::{full_token, not_json};

/// Tokens and databases.
pub(super) struct Prepared {
    pub(super) one: State,
    pub(super) full_token: State,
    pub(super) full_database: State,
}

/// One token with its database, and what a caller must know.
#[derive(Clone, Deserialize, Serialize)]
pub(super) struct State {
    pub(super) program: PathBuf,
    pub(super) dir: PathBuf,
    pub(super) instance: String,
    api_key: String,
    /// The key that is used.
    pub(super) key: String,
}

/// What makes a server different from the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// As many HSM sessions, each with a worker, before a token with one key.
    Workers(u32),
    /// Refuses everybody who is known and may be here: one request a second is allowed.
    Noop,
    /// The usual number of workers before a token with thousands of keys.
    FullToken,
}

/// A running server.
pub(super) struct Service {
    pub(super) kind: Kind,
    pub(super) state: State,
    pub(super) config: PathBuf,
    keys_port: u16,
    tokens_port: u16,
    /// Ends with this.
    _process: Process,
}

/// kms-server's default.
pub(super) const USUAL_WORKERS: u32 = 2;
const KEPT: &str = "bench.json";

impl State {
    pub(super) fn with_one_key(programs: &Path) -> Result<State> {
        State::kept(programs, "one", |_| Ok(()))
    }

    pub(super) fn with_keys(programs: &Path, keys: u32) -> Result<State> {
        State::kept(programs, &format!("token-{keys}"), |state| {
            eprintln!("-> make {keys} keys in SoftHSM2, once (minutes)");
            full_token::make(programs, state, keys - 1)
        })
    }

    pub(super) fn with_rows(programs: &Path, rows: u32) -> Result<State> {
        State::kept(programs, &format!("database-{rows}"), |state| {
            eprintln!("-> put {rows} keys into a database, once");
            let config = state.dir.join("kms-server.yaml");
            let fill = json!({"do": "fill", "config": config, "instance": state.instance, "keys": rows - 1});
            run_load(programs, &state.dir, &fill).map(drop)
        })
    }

    /// The state of this name, made now if it is not there. The programs may have changed since it was made.
    fn kept(programs: &Path, name: &str, fill: impl FnOnce(&State) -> Result<()>) -> Result<State> {
        let dir = assets::target_folder().join("bench/server").join(name);
        let program = programs.join("kms-server");
        if let Ok(text) = fs::read_to_string(dir.join(KEPT)) {
            let kept: State = serde_json::from_str(&text).map_err(not_json(KEPT))?;
            return Ok(State { program, ..kept });
        }
        fresh_folder(&dir)?;
        let service = KeyService::start(&program, &dir, false, Lifetime::WithParent)?;
        let key = Kmsctl::new(&programs.join("kmsctl"), &service).create_key("bench")?;
        let KeyService { mut server, instance_id, admin_api_key, .. } = service;
        server.stop()?;
        let state = State { program, dir, instance: instance_id, api_key: admin_api_key, key };
        fill(&state)?;
        // The last thing: what is half made is made anew the next time.
        let text = serde_json::to_string(&state).map_err(not_json(KEPT))?;
        pki::write_private(&state.dir.join(KEPT), &text)?;
        Ok(state)
    }
}

impl Service {
    /// All that are measured. Those that are not, at a time, have nothing to do.
    pub(super) fn all(prepared: &Prepared) -> Result<Vec<Service>> {
        let mut all = Vec::new();
        for kind in [Kind::Workers(1), Kind::Workers(2), Kind::Workers(4), Kind::Noop] {
            all.push(Service::start(&prepared.one, kind)?);
        }
        all.push(Service::start(&prepared.full_token, Kind::FullToken)?);
        Ok(all)
    }

    /// Starts a server with an audit log of its own, and waits until it is ready.
    pub(super) fn start(state: &State, kind: Kind) -> Result<Service> {
        Service::start_and_wait(state, kind).map(|(service, _)| service)
    }

    /// As `start`; also how long that took.
    pub(super) fn start_and_wait(state: &State, kind: Kind) -> Result<(Service, Duration)> {
        let (keys_port, tokens_port, health) = (ports::free()?, ports::free()?, ports::free()?);
        let base = state.dir.join("kms-server.yaml");
        let base = fs::read_to_string(&base)
            .map_err(Error::machine(format!("read {}", base.display())))?;
        let dir = state.dir.join(kind.folder());
        fresh_folder(&dir)?;
        let config = dir.join("kms-server.yaml");
        let text = configuration(&base, kind, &dir, [keys_port, tokens_port, health]);
        pki::write_private(&config, &text)?;
        let spec = Spec::new("kms-server", &state.program, &dir, Lifetime::WithParent)
            .arg("--config")
            .arg(&config)
            .env("SOFTHSM2_CONF", state.dir.join("softhsm2.conf"));
        let (process, took) = start_and_wait(&spec, health)?;
        let state = state.clone();
        Ok((Service { kind, state, config, keys_port, tokens_port, _process: process }, took))
    }

    /// Has bench-load do what `load` says beyond where, and with what.
    pub(super) fn load(&self, programs: &Path, load: Value) -> Result<Value> {
        let mut task = json!({
            "do": "https", "keys_port": self.keys_port, "tokens_port": self.tokens_port,
            "ca": self.state.dir.join("ca.crt"), "instance": self.state.instance,
            "api_key": self.state.api_key, "key": self.state.key, "rate": 0, "most": 0,
        });
        if let (Some(task), Value::Object(load)) = (task.as_object_mut(), load) {
            task.extend(load);
        }
        run_load(programs, &self.state.dir, &task)
    }
}

impl Kind {
    fn folder(self) -> String {
        match self {
            Kind::Workers(workers) => format!("workers-{workers}"),
            Kind::Noop => "noop".to_owned(),
            Kind::FullToken => "full".to_owned(),
        }
    }
}

/// Runs bench-load with this task.
pub(super) fn run_load(programs: &Path, dir: &Path, task: &Value) -> Result<Value> {
    let mut command = std::process::Command::new(programs.join("bench-load"));
    command.env("SOFTHSM2_CONF", dir.join("softhsm2.conf"));
    let printed = process::stdout(command, task.to_string().as_bytes())?;
    serde_json::from_slice(&printed).map_err(not_json("bench-load"))
}

/// `base` with ports, audit log and name of its own. The issuer stays, so that one token is good everywhere.
fn configuration(base: &str, kind: Kind, dir: &Path, ports: [u16; 3]) -> String {
    let workers = if let Kind::Workers(workers) = kind { workers } else { USUAL_WORKERS };
    // Rates are what is measured, so nothing but the no-op is limited by one; and all connections are to one port.
    let rate = u32::from(kind == Kind::Noop);
    let [keys, tokens, health] = ports;
    let mut text = String::new();
    for line in base.lines() {
        let replaced = match line.trim_start().split(':').next() {
            Some("KEYS_ADDRESS") => format!("  KEYS_ADDRESS: \"127.0.0.1:{keys}\""),
            Some("TOKENS_ADDRESS") => format!("  TOKENS_ADDRESS: \"127.0.0.1:{tokens}\""),
            Some("HEALTH_ADDRESS") => format!("  HEALTH_ADDRESS: \"127.0.0.1:{health}\""),
            Some("AUDIT_FILE") => format!(
                "  AUDIT_FILE: \"{}\"\n  NODE_ID: \"{}\"\n  MAX_RATE_PER_INSTANCE: {rate}\n  \
                 MAX_RATE_PER_CALLER: 0\n  MAX_CONNECTIONS: 1024",
                dir.join("audit.log").display(),
                kind.folder()
            ),
            Some("HSM") => format!("HSM:\n  SESSIONS: {workers}"),
            _ => line.to_owned(),
        };
        text.push_str(&replaced);
        text.push('\n');
    }
    text
}

fn start_and_wait(spec: &Spec, health: u16) -> Result<(Process, Duration)> {
    use kms_core::clock::{Clock, SystemClock};
    let clock = SystemClock::new();
    let began = clock.now();
    let process = Process::start(spec)?;
    // Asked more often than elsewhere: the time itself is a result.
    while clock.now() - began < Duration::from_secs(60) && process.ended().is_none() {
        if http::get(health, "/readyz").is_ok_and(|(status, _)| status == 200) {
            return Ok((process, clock.now() - began));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    wait::until("kms-server's readiness", Duration::ZERO, &[&process], || {
        match http::get(health, "/readyz")? {
            (200, _) => Ok(()),
            (status, body) => Err(format!("{status} {body}")),
        }
    })?;
    Ok((process, clock.now() - began))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_differs_from_its_base_in_what_the_measurement_is_about() {
        let base = "SERVER_CONFIG:\n  KEYS_ADDRESS: \"127.0.0.1:1\"\n  ISSUER_URL: \"https://x\"\n  AUDIT_FILE: \"/a\"\nHSM:\n  TOKEN_LABEL: \"t\"\n";
        let text = configuration(base, Kind::Workers(4), Path::new("/d"), [10, 11, 12]);
        assert_eq!(
            text,
            "SERVER_CONFIG:\n  KEYS_ADDRESS: \"127.0.0.1:10\"\n  ISSUER_URL: \"https://x\"\n  AUDIT_FILE: \"/d/audit.log\"\n  \
             NODE_ID: \"workers-4\"\n  MAX_RATE_PER_INSTANCE: 0\n  MAX_RATE_PER_CALLER: 0\n  MAX_CONNECTIONS: 1024\nHSM:\n  SESSIONS: 4\n  TOKEN_LABEL: \"t\"\n"
        );
    }
}
