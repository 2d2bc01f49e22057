//! The program itself, run as an operator runs it, against servers on loopback.

#[cfg(test)]
mod audit;
#[cfg(test)]
mod bench;
#[cfg(test)]
mod manage;
#[cfg(test)]
#[expect(dead_code, reason = "kms-api's tests use what is left here")]
#[path = "../../../kms-api/tests/rest/server.rs"]
mod server;
#[cfg(test)]
mod usage;
#[cfg(test)]
mod verify;

#[cfg(test)]
mod program {
    use std::io::Write;
    use std::process::{Command, Output, Stdio};

    use crate::server::Server;

    /// kmsctl with nothing of this process's environment.
    pub(crate) fn kmsctl(arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kmsctl"));
        command.args(arguments).env_clear();
        command
    }

    /// kmsctl with everything set for `server`, and what it said.
    pub(crate) async fn managing(server: &Server, arguments: &[&str], input: &str) -> Output {
        let kms_api::client::Ca::Pem(pem) = &server.ca else { panic!("the server has a PEM CA") };
        let ca = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(ca.path(), pem).unwrap();
        let mut command = kmsctl(arguments);
        command
            .env("KMS_URL", server.url())
            .env("KMS_TOKEN_URL", format!("{}/identity/token", server.url()))
            .env("KMS_INSTANCE_ID", "11111111-2222-3333-4444-555555555555")
            .env("KMS_API_KEY", "an-api-key")
            .env("KMS_CA_FILE", ca.path());
        run(command, input).await
    }

    pub(crate) async fn run(mut command: Command, input: &str) -> Output {
        let input = input.to_owned();
        let run = move || {
            let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            let mut child = pipes.spawn().unwrap();
            // The program may end without reading.
            let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
            child.wait_with_output().unwrap()
        };
        tokio::task::spawn_blocking(run).await.unwrap()
    }

    pub(crate) fn stdout(output: &Output) -> &str {
        std::str::from_utf8(&output.stdout).unwrap()
    }

    pub(crate) fn stderr(output: &Output) -> &str {
        std::str::from_utf8(&output.stderr).unwrap()
    }
}
