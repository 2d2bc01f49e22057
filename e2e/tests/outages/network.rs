//! The way to the key service: no name, an expired certificate.

use keelson_e2e::Result;
use keelson_e2e::pki::Validity;

use crate::CHAIN;
use crate::columns::Before;

pub(crate) const UNREACHABLE: &str = "Unavailable: the key service cannot be reached";

#[test]
fn dns_does_not_know_the_key_service() -> Result<()> {
    CHAIN.with(|chain| {
        let before = Before::the_outage(chain, "dns")?;
        let whole = chain.plugin.config.clone();
        // Reserved for names that nobody has (RFC 6761).
        let url = whole.url.replace("127.0.0.1", "key-service.invalid");
        chain.plugin.reload_with(|config| config.url.clone_from(&url))?;
        before.goes_on(chain, UNREACHABLE, "unreachable")?;
        chain.plugin.restart_with(|_| ())?;
        before.is_unavailable(chain, UNREACHABLE)?;
        chain.plugin.reload_with(|config| *config = whole)?;
        before.is_over(chain)
    })
}

#[test]
fn the_certificate_of_the_key_service_has_expired() -> Result<()> {
    CHAIN.with(|chain| {
        let before = Before::the_outage(chain, "certificate")?;
        chain.key_service.server.stop()?;
        chain.key_service.pki.issue(Validity::Ended)?;
        chain.key_service.server.start()?;
        before.goes_on(chain, "certificate expired", "unreachable")?;
        chain.plugin.restart_with(|_| ())?;
        before.is_unavailable(chain, "certificate expired")?;
        chain.key_service.server.stop()?;
        chain.key_service.pki.issue(Validity::Now)?;
        chain.key_service.server.start()?;
        before.is_over(chain)
    })
}
