//! How long the server takes from its start until it is ready, with much to know.

use std::time::Duration;

use keelson_e2e::Result;

use super::service::{Kind, Prepared, Service, State};
use crate::bench::Finding;

const STARTS: usize = 3;
const DATABASE: Duration = Duration::from_secs(1);
const TOKEN: Duration = Duration::from_secs(5);

pub(super) fn findings(prepared: &Prepared) -> Result<Vec<Finding>> {
    eprintln!("-> starts with a full database, and with a full token");
    let database = median_start(&prepared.full_database)?;
    let token = median_start(&prepared.full_token)?;
    let finding = |what, took, most| Finding {
        text: format!("ready {took:.2?} after its start with {what} (<= {most:?})"),
        held: took <= most,
    };
    Ok(vec![
        finding("a full database and one key in the token", database, DATABASE),
        finding("a full token", token, TOKEN),
    ])
}

fn median_start(state: &State) -> Result<Duration> {
    let mut times = Vec::new();
    for _ in 0..STARTS {
        let (service, took) = Service::start_and_wait(state, Kind::FullToken)?;
        drop(service);
        times.push(took);
    }
    times.sort_unstable();
    Ok(times[STARTS / 2])
}
