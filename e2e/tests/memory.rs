//! The original's pod has a limit of 15 MiB: the plug-in stays under it while 32 callers encrypt and decrypt, and
//! under 10 MiB as it is usually configured; under 12 MiB in the build with the FIPS module, whose self-tests leave more
//! behind.

use keelson_e2e::chain::{Chain, SecretsThrough};
use keelson_e2e::driver::Driver;
use keelson_e2e::{Error, Result};

const MIB: u64 = 1024 * 1024;
const CALLERS: usize = 32;

#[test]
fn the_plug_in_fits_into_the_original_s_pod_under_load() -> Result<()> {
    let mut chain = Chain::for_test("memory", None, SecretsThrough::V1, |_| ())?;
    let driver = Driver::connect(&chain.plugin.config.socket)?;
    assert_eq!(driver.hammer(CALLERS, 400)?, CALLERS * 400 * 4);
    assert_below(usual(&chain)?, &chain)?;

    // With a new DEK for each Encrypt, every call goes to the service and each Decrypt fills the cache.
    chain.plugin.restart_with(|config| config.new_dek = true)?;
    chain.plugin.wait_for_probe("/healthz/readiness", 200)?;
    let driver = Driver::connect(&chain.plugin.config.socket)?;
    assert_eq!(driver.hammer(CALLERS, 10)?, CALLERS * 10 * 4);
    assert_below(15 * MIB, &chain)
}

/// What is promised of the build that runs, by its own word.
fn usual(chain: &Chain) -> Result<u64> {
    let (_, metrics) = chain.plugin.probe("/metrics")?;
    let module = metrics.lines().find(|line| line.starts_with("kmsplugin_crypto_module_info{"));
    let module = module.ok_or_else(|| Error::answer("kmsplugin", "no cryptographic module"))?;
    Ok(if module.contains("fips=\"true\"") { 12 * MIB } else { 10 * MIB })
}

fn assert_below(limit: u64, chain: &Chain) -> Result<()> {
    let peak = chain.plugin.server.running()?.peak_memory()?;
    assert!(peak < limit, "VmHWM is {} KiB of {}", peak / 1024, limit / 1024);
    println!("kmsplugin's VmHWM: {} KiB of {}", peak / 1024, limit / 1024);
    Ok(())
}
