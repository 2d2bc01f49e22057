//! `kmsctl verify`: what in etcd is encrypted, by whom and under which key, what is left of an earlier time, and,
//! on the way to KMS v2, what to do next.
//!
//! Reads only. No value is decrypted, no key is asked for, and nothing of a value is printed.

mod census;
mod judge;
mod plan;
mod target;

use std::path::PathBuf;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use kms_api::client::Ca;
use kms_api::etcd::{Etcd, EtcdSettings};
use serde::Serialize;

use self::census::{Census, Found};
use self::judge::{Expected, State};
use self::plan::{Advice, plan};
use self::target::{Target, targets};
use crate::error::Error;
use crate::output::{Format, Output};
use crate::source::encryption_config::Provider;
use crate::source::{etcd, registry};

pub(crate) const EXAMPLES: &str = "\
Examples:
  kmsctl verify --encryption-config /etc/kubernetes/enc/encryption-config.yaml \\
    --etcd-cacert /etc/kubernetes/pki/etcd/ca.crt \\
    --etcd-cert /etc/kubernetes/pki/apiserver-etcd-client.crt --etcd-key /etc/kubernetes/pki/apiserver-etcd-client.key
  kmsctl verify --socket /etc/kubernetes/kmsplugin/kms.sock --resource secrets,configmaps -o json

With --encryption-config the step of a migration to KMS v2 and the next thing to do are shown too (docs/migration.md).
Without it and without a key_id only what is not encrypted at all counts as left.

Exit codes: 0 everything is current, 1 something is left, 2 it could not be found out.";

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// etcd's client URLs; the first that answers is asked
    #[arg(
        long,
        env = "ETCDCTL_ENDPOINTS",
        value_name = "URL",
        value_delimiter = ',',
        default_value = "https://127.0.0.1:2379"
    )]
    etcd_endpoints: Vec<String>,
    /// PEM file of the CA that signed etcd's certificate
    #[arg(long, env = "ETCDCTL_CACERT", value_name = "FILE")]
    etcd_cacert: Option<PathBuf>,
    /// PEM file of a client certificate that etcd accepts
    #[arg(long, env = "ETCDCTL_CERT", value_name = "FILE", requires = "etcd_key")]
    etcd_cert: Option<PathBuf>,
    /// PEM file of its private key
    #[arg(long, env = "ETCDCTL_KEY", value_name = "FILE", requires = "etcd_cert")]
    etcd_key: Option<PathBuf>,
    /// kube-apiserver's --etcd-prefix
    #[arg(long, value_name = "PREFIX", default_value = "/registry")]
    etcd_prefix: String,
    /// kube-apiserver's --encryption-provider-config: who writes each resource now
    #[arg(long, value_name = "FILE")]
    encryption_config: Option<PathBuf>,
    /// Socket of the plug-in whose Status names the current key_id; by default the endpoint in the configuration
    #[arg(long, value_name = "SOCKET", conflicts_with = "key_id")]
    socket: Option<String>,
    /// The current key_id, where the socket cannot be reached
    #[arg(long, value_name = "KEY_ID")]
    key_id: Option<String>,
    /// Resources to look at, such as secrets or widgets.example.com; by default those in the configuration, or secrets
    #[arg(long, value_name = "RESOURCE", value_delimiter = ',')]
    resource: Vec<String>,
    /// How long one call may take
    #[arg(long, default_value_t = 30, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=600))]
    timeout: u64,
}

/// Looks at everything, prints what was found, and fails where something is left.
pub(crate) async fn run(args: Args, output: &mut Output<'_>) -> Result<(), Error> {
    let report = examine(&args).await.map_err(|error| Error::NotVerified(Box::new(error)))?;
    show(&report, output)?;
    if report.left + report.unreadable > 0 {
        let left = report.left + report.unreadable;
        return Err(Error::Left { left, objects: report.objects });
    }
    Ok(())
}

/// Objects of one resource that were written alike, and whether that is as it should be.
#[derive(Debug, Serialize)]
struct Row {
    resource: String,
    provider: String,
    /// key_id of KMS v2, root key version of KMS v1, name of a local key.
    key: Option<String>,
    objects: u64,
    state: &'static str,
    why: Option<String>,
    /// A key in etcd, for `kmsctl inspect`.
    example: String,
    #[serde(skip)]
    judged: State,
}

/// The members are the command's JSON, in this order.
#[derive(Debug, Serialize)]
struct Report {
    objects: u64,
    left: u64,
    unreadable: u64,
    rows: Vec<Row>,
    /// None without an encryption configuration.
    migration: Option<Vec<Advice>>,
    /// Something was there to compare with.
    #[serde(skip)]
    compared: bool,
}

async fn examine(args: &Args) -> Result<Report, Error> {
    let timeout = Duration::from_secs(args.timeout);
    let expected = target::expected(args, timeout).await?;
    let prefix = format!("{}/", args.etcd_prefix.trim_end_matches('/'));
    let targets = targets(&args.resource, expected.config.as_ref(), &prefix)?;
    let mut etcd = etcd::connect(endpoints(args, timeout)).await?;
    if etcd.range(prefix.as_bytes(), &etcd::end_of(&prefix), 1).await?.kvs.is_empty() {
        return Err(Error::NothingStored { prefix });
    }
    let census = count(&mut etcd, &targets, &prefix, &v1_names(&expected)).await?;

    let looked: Vec<String> = targets.into_iter().filter_map(|target| target.resource).collect();
    let rows = rows(&expected, census);
    let sum = |wanted: fn(&State) -> bool| -> u64 {
        rows.iter().filter(|row| wanted(&row.judged)).map(|row| row.objects).sum()
    };
    Ok(Report {
        objects: sum(|_| true),
        left: sum(|state| matches!(state, State::Left(_))),
        unreadable: sum(|state| matches!(state, State::Unreadable(_))),
        migration: expected.config.as_ref().map(|config| plan(config, &looked, &rows)),
        compared: expected.config.is_some() || matches!(expected.key_ids, judge::KeyIds::Given(_)),
        rows,
    })
}

async fn count(
    etcd: &mut Etcd,
    targets: &[Target],
    prefix: &str,
    v1_names: &[String],
) -> Result<Census, Error> {
    let mut census = Census::default();
    for target in targets {
        let bar = progress(target.resource.as_deref().unwrap_or("everything else"));
        let place = format!("{prefix}{}", target.folder);
        etcd::each_page(etcd, &place, |page, left| {
            bar.set_length(bar.position() + left);
            for entry in page {
                let key = entry.key.get(prefix.len()..).unwrap_or_default();
                let found = Found::look(&entry.value, v1_names);
                match target.resource_of(key, &found) {
                    Some(resource) if !registry::never_encrypted(key) => {
                        census.count(&resource, &entry.key, found);
                    }
                    _ => {}
                }
                bar.inc(1);
            }
        })
        .await?;
        bar.finish_and_clear();
    }
    Ok(census)
}

fn rows(expected: &Expected, census: Census) -> Vec<Row> {
    let row = |((resource, found), tally): ((String, Found), census::Tally)| {
        let judged = expected.judge(&resource, &found);
        let (state, why) = match &judged {
            State::Current => ("current", None),
            State::Encrypted => ("encrypted", None),
            State::Left(why) => ("left", Some(why.clone())),
            State::Unreadable(why) => ("unreadable", Some(why.clone())),
        };
        let (provider, key) = match found {
            Found::Identity => ("identity".to_owned(), None),
            Found::Local { kind, key } => (kind.to_string(), Some(key)),
            Found::KmsV1 { provider, crk_version } => (format!("kms v1 {provider}"), crk_version),
            Found::KmsV2 { provider, key_id, .. } => (format!("kms v2 {provider}"), Some(key_id)),
            Found::Broken { .. } => ("unknown".to_owned(), None),
        };
        let census::Tally { objects, example } = tally;
        Row { resource, provider, key, objects, state, why, example, judged }
    };
    census.groups.into_iter().map(row).collect()
}

fn show(report: &Report, output: &mut Output<'_>) -> Result<(), Error> {
    if output.format() == Format::Json {
        return output.json(report);
    }
    let cells = |row: &Row| {
        let state = match &row.why {
            Some(why) => format!("{}: {why}", row.state),
            None => row.state.to_owned(),
        };
        let key = row.key.clone().unwrap_or_else(|| "-".to_owned());
        [row.resource.clone(), row.provider.clone(), key, row.objects.to_string(), state]
    };
    let titles = ["RESOURCE", "PROVIDER", "KEY", "OBJECTS", "STATE"];
    output.list(titles, report.rows.iter().map(cells).collect(), report)?;
    if !report.compared {
        output.note(
            "What is stale is not known: give --encryption-config, or --socket, or --key-id.",
        )?;
    }
    for advice in report.migration.iter().flatten() {
        let resources = advice.resources.join(", ");
        let place = advice.step.place();
        output.note(&format!("Migration to KMS v2 of {resources}, {place}:"))?;
        output.note(&format!("  {}", advice.is))?;
        for line in advice.next.iter().chain(&advice.command) {
            output.note(&format!("  {line}"))?;
        }
    }
    Ok(())
}

fn endpoints(args: &Args, timeout: Duration) -> Vec<EtcdSettings> {
    let settings = |endpoint: &String| {
        // etcdctl takes a bare host and port, and so does its variable.
        let endpoint = match (endpoint.contains("://"), &args.etcd_cacert) {
            (true, _) => endpoint.clone(),
            (false, Some(_)) => format!("https://{endpoint}"),
            (false, None) => format!("http://{endpoint}"),
        };
        EtcdSettings {
            endpoint,
            ca: args.etcd_cacert.clone().map(Ca::File),
            identity: args.etcd_cert.clone().zip(args.etcd_key.clone()),
            timeout,
        }
    };
    args.etcd_endpoints.iter().map(settings).collect()
}

fn v1_names(expected: &Expected) -> Vec<String> {
    let providers = expected.config.iter().flat_map(|config| &config.blocks);
    let names =
        providers.flat_map(|block| &block.providers).filter_map(|provider| match provider {
            Provider::KmsV1 { name } => Some(name.clone()),
            _ => None,
        });
    names.collect()
}

/// On standard error, and only if that is a terminal.
fn progress(resource: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:30} {human_pos}/{human_len}  {msg}");
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(0).with_style(style).with_message(resource.to_owned())
}
