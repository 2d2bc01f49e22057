//! What a row promises, looked at from every side: kubectl's writes and reads, Status and the four other calls on the
//! socket, readiness with its cause, liveness, metrics.

use std::time::Duration;

use keelson_e2e::chain::Chain;
use keelson_e2e::driver::Driver;
use keelson_e2e::{Error, Result, wait};
use kms_api::grpc::v2::EncryptResponse;

const SOON: Duration = Duration::from_secs(60);
const PAYLOAD: &[u8] = b"sealed before the outage";

/// What was sealed while all was well.
pub(crate) struct Before {
    name: String,
    v1: Vec<u8>,
    v2: EncryptResponse,
}

impl Before {
    /// Waits until the plug-in is ready and seals in every way.
    pub(crate) fn the_outage(chain: &Chain, name: &str) -> Result<Self> {
        chain.plugin.wait_for_probe("/healthz/readiness", 200)?;
        accepted(chain, &format!("{name}-before"))?;
        let driver = Driver::connect(&chain.plugin.config.socket)?;
        let (v1, v2) = (driver.v1_encrypt(PAYLOAD)?, driver.v2_encrypt(PAYLOAD)?);
        Ok(Self { name: name.to_owned(), v1, v2 })
    }

    /// An outage is noticed, and nobody but the operator needs to: all goes on with the DEKs in memory.
    pub(crate) fn goes_on(&self, chain: &Chain, cause: &str, outcome: &str) -> Result<()> {
        not_ready(chain, cause)?;
        self.all_is_served(chain)?;
        let metrics = metrics(chain)?;
        assert!(value(&metrics, "kmsplugin_dek_cache_entries") > 0, "{metrics}");
        let outcome = format!("outcome=\"{outcome}\"");
        let calls = |line: &str| line.starts_with("kmsplugin_provider_calls_total");
        assert!(metrics.lines().any(|line| calls(line) && line.contains(&outcome)), "{metrics}");
        // Still so when the breaker is open.
        wait::until("an open breaker", SOON, &[], || {
            let metrics = self::metrics(chain).map_err(|error| error.to_string())?;
            let open = value(&metrics, "kmsplugin_breakers_open");
            if open == 1 { Ok(()) } else { Err(metrics) }
        })?;
        self.all_is_served(chain)
    }

    /// Nothing is noticed at all, also by the probes that begin now.
    pub(crate) fn is_not_noticed(&self, chain: &Chain) -> Result<()> {
        let probes = |outcome: &str| -> Result<u64> {
            let name = format!(
                "kmsplugin_probes_total{{region=\"IBMCloudPakForMCM\",outcome=\"{outcome}\"}}"
            );
            Ok(line_value(&metrics(chain)?, &name))
        };
        let (ok, failed) = (probes("ok")?, probes("failed")?);
        wait::until("two more probes", SOON, &[], || match probes("ok") {
            Ok(now) if now >= ok + 2 => Ok(()),
            other => Err(format!("{other:?}")),
        })?;
        assert_eq!(probes("failed")?, failed);
        assert_eq!(chain.plugin.probe("/healthz/readiness")?.0, 200);
        self.all_is_served(chain)
    }

    /// Access was withdrawn: every DEK is dropped, and the cause stands wherever somebody looks.
    pub(crate) fn is_refused(&self, chain: &Chain, cause: &str) -> Result<()> {
        not_ready(chain, cause)?;
        self.nothing_is_sealed_or_opened(chain, cause)?;
        let metrics = metrics(chain)?;
        assert_eq!(value(&metrics, "kmsplugin_dek_cache_entries"), 0, "{metrics}");
        assert_eq!(value(&metrics, "kmsplugin_dek_uses"), 0, "{metrics}");
        refused(chain, &format!("{}-refused", self.name), cause)?;
        // What kube-apiserver has in its own memory it shows.
        let name = format!("{}-before", self.name);
        assert_eq!(chain.kubectl()?.secret_value(&name, "password")?, name);
        Ok(())
    }

    /// Nothing is sealed any more, and everything is opened.
    pub(crate) fn only_opens(&self, chain: &Chain, cause: &str) -> Result<()> {
        not_ready(chain, cause)?;
        let driver = Driver::connect(&chain.plugin.config.socket)?;
        refused_by("Status", wait::at_once("Status", || Ok(driver.v2_status().map(drop)))?, cause)?;
        refused_by("v1 Encrypt", driver.v1_encrypt(b"now").map(drop), cause)?;
        refused_by("v2 Encrypt", driver.v2_encrypt(b"now").map(drop), cause)?;
        assert_eq!(wait::at_once("v1 Decrypt", || driver.v1_decrypt(&self.v1))?, PAYLOAD);
        assert_eq!(wait::at_once("v2 Decrypt", || driver.v2_decrypt(&self.v2))?, PAYLOAD);
        let metrics = metrics(chain)?;
        assert!(value(&metrics, "kmsplugin_dek_cache_entries") > 0, "{metrics}");
        refused(chain, &format!("{}-refused", self.name), cause)
    }

    /// kube-apiserver starts with an empty memory, and reads nevertheless.
    pub(crate) fn reads_go_on_in_a_new_kube_apiserver(&self, chain: &mut Chain) -> Result<()> {
        forget_all(chain)?;
        self.is_read(chain)
    }

    /// kube-apiserver starts with an empty memory and can read nothing that needs the plug-in.
    pub(crate) fn reads_end_with_kube_apiserver(
        &self,
        chain: &mut Chain,
        cause: &str,
    ) -> Result<()> {
        forget_all(chain)?;
        let (kubectl, name) = (chain.kubectl()?, format!("{}-before", self.name));
        wait::until(&format!("a read refused with {cause:?}"), SOON, &[], || {
            match kubectl.secret_value(&name, "password") {
                Err(error) if error.to_string().contains(cause) => Ok(()),
                Err(error) => Err(error.to_string()),
                Ok(value) => Err(value),
            }
        })
    }

    /// No DEK is left, and none to be had: as refused, for a reason that passes.
    pub(crate) fn is_unavailable(&self, chain: &Chain, cause: &str) -> Result<()> {
        not_ready(chain, cause)?;
        self.nothing_is_sealed_or_opened(chain, cause)?;
        refused(chain, &format!("{}-refused", self.name), cause)
    }

    /// The cause is gone: no process is restarted and nothing is lost.
    pub(crate) fn is_over(&self, chain: &Chain) -> Result<()> {
        chain.plugin.wait_for_probe("/healthz/readiness", 200)?;
        let metrics = metrics(chain)?;
        assert_eq!(value(&metrics, "kmsplugin_ready"), 1, "{metrics}");
        assert_eq!(value(&metrics, "kmsplugin_breakers_open"), 0, "{metrics}");
        self.all_is_served(chain)
    }

    fn all_is_served(&self, chain: &Chain) -> Result<()> {
        alive(chain)?;
        let driver = Driver::connect(&chain.plugin.config.socket)?;
        wait::at_once("Status", || driver.v2_status())?;
        wait::at_once("v1 Encrypt", || driver.v1_encrypt(b"now"))?;
        wait::at_once("v2 Encrypt", || driver.v2_encrypt(b"now"))?;
        assert_eq!(wait::at_once("v1 Decrypt", || driver.v1_decrypt(&self.v1))?, PAYLOAD);
        assert_eq!(wait::at_once("v2 Decrypt", || driver.v2_decrypt(&self.v2))?, PAYLOAD);
        self.is_read(chain)?;
        accepted(chain, &format!("{}-now", self.name))?;
        chain.kubectl()?.run(&["delete", "secret", &format!("{}-now", self.name)], b"").map(drop)
    }

    /// kube-apiserver may just have been started.
    fn is_read(&self, chain: &Chain) -> Result<()> {
        let (kubectl, name) = (chain.kubectl()?, format!("{}-before", self.name));
        let value = wait::until("a secret is read", SOON, &[], || {
            kubectl.secret_value(&name, "password").map_err(|error| error.to_string())
        })?;
        assert_eq!(value, name);
        Ok(())
    }

    fn nothing_is_sealed_or_opened(&self, chain: &Chain, cause: &str) -> Result<()> {
        let driver = Driver::connect(&chain.plugin.config.socket)?;
        refused_by("Status", wait::at_once("Status", || Ok(driver.v2_status().map(drop)))?, cause)?;
        refused_by("v1 Encrypt", driver.v1_encrypt(b"now").map(drop), cause)?;
        refused_by("v2 Encrypt", driver.v2_encrypt(b"now").map(drop), cause)?;
        refused_by("v1 Decrypt", driver.v1_decrypt(&self.v1).map(drop), cause)?;
        refused_by("v2 Decrypt", driver.v2_decrypt(&self.v2).map(drop), cause)
    }
}

/// Starts kube-apiserver with an empty memory, and does not wait for it: it may not become healthy.
fn forget_all(chain: &mut Chain) -> Result<()> {
    let server = &mut chain.cluster_mut()?.apiserver.server;
    server.kill()?;
    server.start()
}

fn not_ready(chain: &Chain, cause: &str) -> Result<()> {
    wait::until(&format!("readiness without {cause:?}"), SOON, &[], || {
        match chain.plugin.probe("/healthz/readiness") {
            Ok((503, text)) if text.contains(cause) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })?;
    alive(chain)?;
    let metrics = metrics(chain)?;
    assert_eq!(value(&metrics, "kmsplugin_ready"), 0, "{metrics}");
    Ok(())
}

fn alive(chain: &Chain) -> Result<()> {
    for path in ["/healthz", "/healthz/liveness"] {
        let (status, text) = chain.plugin.probe(path)?;
        assert_eq!(status, 200, "{path}: {text}");
    }
    Ok(())
}

fn metrics(chain: &Chain) -> Result<String> {
    chain.plugin.probe("/metrics").map(|(_, text)| text)
}

/// The value of a metric that has no label but the region.
fn value(metrics: &str, name: &str) -> u64 {
    line_value(metrics, &format!("{name}{{region=\"IBMCloudPakForMCM\"}}"))
}

fn line_value(metrics: &str, start: &str) -> u64 {
    let line = metrics.lines().find_map(|line| line.strip_prefix(start));
    line.and_then(|value| value.trim().parse().ok()).unwrap_or_default()
}

/// kube-apiserver may need a moment to connect to a restarted plug-in.
fn accepted(chain: &Chain, name: &str) -> Result<()> {
    let kubectl = chain.kubectl()?;
    wait::until("a secret is accepted", SOON, &[], || {
        match kubectl.create_secret(name, "password", name) {
            // A try that was answered too late has made it.
            Err(error) if !error.to_string().contains("already exists") => Err(error.to_string()),
            _ => Ok(()),
        }
    })?;
    assert_eq!(kubectl.secret_value(name, "password")?, name);
    Ok(())
}

/// The cause reaches whoever runs kubectl.
fn refused(chain: &Chain, name: &str, cause: &str) -> Result<()> {
    let kubectl = chain.kubectl()?;
    wait::until(&format!("a refusal with {cause:?}"), SOON, &[], || {
        match kubectl.create_secret(name, "password", "refused") {
            Err(error) if error.to_string().contains(cause) => Ok(()),
            Err(error) => Err(error.to_string()),
            Ok(_) => Err("the secret was created".to_owned()),
        }
    })
}

fn refused_by(call: &str, answer: Result<()>, cause: &str) -> Result<()> {
    match answer {
        Err(Error::Rpc(status)) if status.message().contains(cause) => Ok(()),
        other => Err(Error::answer(call, format!("{other:?} instead of {cause:?}"))),
    }
}
