//! What is promised of our plug-in beyond calls per second: its start, Status while the key service hangs, and an API
//! server's calls within the original's pod (12m of a CPU, 15 MiB).

use std::time::Duration;

use keelson_e2e::Result;
use keelson_e2e::cgroup::{Cgroup, Limits};
use keelson_e2e::chain::Chain;
use keelson_e2e::driver::Driver;
use kms_core::clock::{Clock, SystemClock};

use super::Finding;

const STARTS: usize = 5;
const STATUS_CALLS: usize = 500;
const STATUS_WINDOWS: usize = 20;
/// kube-apiserver asks every minute, every ten seconds while it is not content, and whenever it is asked for its health:
/// as often as a kubelet does that.
const TICK: Duration = Duration::from_secs(10);
const TICKS: u32 = 4;

pub(super) fn findings(chain: &mut Chain) -> Result<Vec<Finding>> {
    eprintln!(
        "-> cold starts, Status without the key service, an API server's calls in the original's pod"
    );
    Ok(vec![cold_start(chain)?, status_while_the_service_hangs(chain)?, within_the_pod(chain)?])
}

fn cold_start(chain: &mut Chain) -> Result<Finding> {
    let mut times = Vec::new();
    for _ in 0..STARTS {
        chain.plugin.server.stop()?;
        times.push(chain.plugin.cold_start()?);
    }
    times.sort_unstable();
    let median = times[STARTS / 2];
    let text = format!("{median:.1?} from exec to Status with a key_id (< 100 ms)");
    Ok(Finding { text, held: median < Duration::from_millis(100) })
}

fn status_while_the_service_hangs(chain: &Chain) -> Result<Finding> {
    let driver = Driver::connect(&chain.plugin.config.socket)?;
    driver.status_times(STATUS_CALLS)?;
    chain.key_service.server.freeze()?;
    let windows: Result<Vec<_>> =
        (0..STATUS_WINDOWS).map(|_| driver.status_times(STATUS_CALLS)).collect();
    chain.key_service.server.thaw()?;
    let mut p99: Vec<_> = windows?.iter().map(|times| times[STATUS_CALLS * 99 / 100]).collect();
    p99.sort_unstable();
    // Whoever waits for the service waits in every window; the machine's other work does not.
    let (best, middle) = (p99[0], p99[STATUS_WINDOWS / 2]);
    let text = format!(
        "Status p99 {best:.0?} while the key service hangs (< 1 ms; of the quietest {STATUS_CALLS} calls of \
         {STATUS_WINDOWS} times as many; in the middle {middle:.0?})"
    );
    Ok(Finding { text, held: best < Duration::from_millis(1) })
}

fn within_the_pod(chain: &mut Chain) -> Result<Finding> {
    let group = Cgroup::create(Limits::POD);
    chain.plugin.server.stop()?;
    if let Ok(group) = &group {
        chain.plugin.server.confine(group);
    }
    let started = chain.plugin.cold_start()?;
    let clock = SystemClock::new();
    let begun = clock.now();
    // Each call of the driver fails after kube-apiserver's 3 s.
    let slowest = calls_of_an_api_server(chain, &clock)?;
    let elapsed = clock.now() - begun;
    let process = chain.plugin.server.running()?;
    let millicores = process.cpu_time()?.as_secs_f64() / elapsed.as_secs_f64() * 1000.0;
    let used =
        format!("an API server's calls take {millicores:.1}m of a CPU, start included (<= 12m)");
    let mut held = millicores <= 12.0;
    let how = match &group {
        Ok(group) => {
            let counts = group.counts()?;
            held &= counts.out_of_memory_kills == 0;
            format!(
                "in a control group (v{}) with 12m and 15 MiB: started in {started:.1?}, slowest call {slowest:.1?}, \
                 throttled in {} of {} periods, {} killed for memory",
                group.version(),
                counts.throttled_periods,
                counts.periods,
                counts.out_of_memory_kills
            )
        }
        Err(error) => format!("by CPU time, because no control group can be made here ({error})"),
    };
    chain.plugin.server.stop()?;
    Ok(Finding { text: format!("{used}; {how}"), held })
}

/// Two API servers' worth: one with KMS v1, one with KMS v2. Returns what the slowest call took.
fn calls_of_an_api_server(chain: &Chain, clock: &SystemClock) -> Result<Duration> {
    let driver = Driver::connect(&chain.plugin.config.socket)?;
    let mut slowest = Duration::ZERO;
    let mut timed = |call: &dyn Fn() -> Result<()>| -> Result<()> {
        let before = clock.now();
        call()?;
        slowest = slowest.max(clock.now() - before);
        Ok(())
    };
    timed(&|| driver.v1_version().map(drop))?;
    timed(&|| driver.v2_encrypt(&[1; 32]).map(drop))?;
    let seed = driver.v2_encrypt(&[2; 32])?;
    for _ in 0..TICKS {
        timed(&|| driver.v2_status().map(drop))?;
        timed(&|| driver.v1_decrypt(&driver.v1_encrypt(b"ping")?).map(drop))?;
        timed(&|| driver.v2_decrypt(&seed).map(drop))?;
        std::thread::sleep(TICK);
    }
    Ok(slowest)
}
