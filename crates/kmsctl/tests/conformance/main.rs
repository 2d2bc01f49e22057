//! `kmsctl conformance` against a plug-in that does everything right, and against ones that do one thing wrong: each
//! fault must be found by the cases that are about it, and by no other.

#[cfg(test)]
mod double;
#[cfg(test)]
mod faults;
#[cfg(test)]
mod server;
#[cfg(test)]
mod usage;

#[cfg(test)]
mod program {
    use std::process::{Command, Output};

    use serde_json::Value;
    use tokio::sync::Semaphore;

    use crate::server::Server;

    /// Some cases measure time: few runs at once, whatever the number of test threads.
    static TURNS: Semaphore = Semaphore::const_new(2);

    /// kmsctl as an operator runs it, and what came of it.
    pub(crate) async fn conformance(arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kmsctl"));
        let _turn = TURNS.acquire().await.unwrap();
        command.arg("conformance").args(arguments).env_clear();
        tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
    }

    /// As [`report`]; where a server is found to be slow that is not, the machine had other work to do, and it is judged
    /// again.
    pub(crate) async fn calm_report(
        server: &Server,
        more: &[&str],
        timeout: &str,
    ) -> (Option<i32>, Value) {
        let mut judged = report(server, more, timeout).await;
        for _ in 0..ATTEMPTS {
            if !is_late(&judged.1, &[]) {
                break;
            }
            judged = report(server, more, timeout).await;
        }
        judged
    }

    /// How often one is judged again that is slow.
    pub(crate) const ATTEMPTS: usize = 10;

    /// Whether a time was too long where none should be.
    pub(crate) fn is_late(report: &Value, expected: &[&str]) -> bool {
        let measured = ["status-prompt", "status-shared"];
        let failed = names(report, "fail");
        measured.iter().any(|name| failed.contains(name) && !expected.contains(name))
    }

    /// The JSON report on a server.
    pub(crate) async fn report(
        server: &Server,
        more: &[&str],
        timeout: &str,
    ) -> (Option<i32>, Value) {
        let arguments = [&["--socket", &server.socket, "-o", "json", "--timeout", timeout], more];
        let output = conformance(&arguments.concat()).await;
        let text = std::str::from_utf8(&output.stdout).unwrap();
        let report =
            serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text} {output:?}"));
        (output.status.code(), report)
    }

    /// The names of the cases with this result, in the order of their numbers.
    pub(crate) fn names<'a>(report: &'a Value, result: &str) -> Vec<&'a str> {
        let cases = report["cases"].as_array().unwrap();
        let cases = cases.iter().filter(|case| case["result"] == result);
        cases.map(|case| case["name"].as_str().unwrap()).collect()
    }
}
