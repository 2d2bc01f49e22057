//! The alert rules and the Grafana board in `deploy/monitoring`, judged by a real Prometheus that scrapes a whole chain;
//! and that a key_id and a request are called the same in kube-apiserver, plug-in and key service.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use keelson_e2e::apiserver::Proxy;
use keelson_e2e::assets::{Kubernetes, root};
use keelson_e2e::chain::{Chain, SecretsThrough, fresh_folder, run_folder};
use keelson_e2e::driver::Driver;
use keelson_e2e::process::{self, Lifetime, Process, Spec};
use keelson_e2e::{Error, Result, http, pki, ports, wait};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(60);

#[test]
fn promtool_accepts_the_rules_and_each_alert_fires_when_it_should() -> Result<()> {
    for (rules, stories) in [
        ("alerts.yaml", "alerts_test.yaml"),
        ("kms-server-alerts.yaml", "kms-server-alerts_test.yaml"),
    ] {
        promtool(&["check", "rules", rules])?;
        let tested = promtool(&["test", "rules", stories])?;
        assert!(tested.contains("SUCCESS"), "{tested}");
        let (rules, tests) = (read(rules)?, read(stories)?);
        let alerts = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: "));
        for alert in alerts {
            let fires = format!("alertname=\"{alert}\"");
            assert!(tests.contains(&fires), "no test makes {alert} fire");
        }
    }
    Ok(())
}

#[test]
fn prometheus_loads_the_rules_evaluates_the_board_and_tells_of_an_outage() -> Result<()> {
    let mut chain =
        Chain::for_test("monitoring", Some(Kubernetes::V1_37), SecretsThrough::V1, |config| {
            config.more.push(("PROBE_INTERVAL_IN_SECONDS", "1".to_owned()));
        })?;
    let dir = run_folder("e2e/monitoring-prometheus");
    fresh_folder(&dir)?;
    let proxy = chain.kubectl()?.proxy(&dir, Lifetime::WithParent)?;
    let prometheus = Prometheus::start(&dir, &chain, &proxy)?;
    prometheus.has_loaded_every_rule()?;
    prometheus.scrapes(3)?;
    assert_eq!(prometheus.firing()?, BTreeSet::new());

    use_everything(&mut chain)?;
    for expression in board()? {
        prometheus.answers(&expression)?;
    }
    let joined = "kmsplugin_key_id_info * on (key_id_hash) group_right () \
                  apiserver_envelope_encryption_key_id_hash_total{transformation_type=\"to_storage\"}";
    prometheus.answers(joined)?;

    chain.key_service.server.kill()?;
    let alert = wait::until("an alert", SOON, &[&prometheus.process], || {
        let alerts = prometheus.alerts().map_err(|error| error.to_string())?;
        let of_plugin = |alert: &&Value| alert["labels"]["alertname"] == "KmsPluginNotReady";
        let alert = alerts.iter().find(of_plugin).filter(|alert| alert["state"] == "firing");
        alert.cloned().ok_or_else(|| format!("{alerts:?}"))
    })?;
    let summary = alert["annotations"]["summary"].as_str().unwrap_or_default();
    let instance = format!("127.0.0.1:{}", chain.plugin.config.health_port);
    assert!(summary.ends_with(&format!("for {instance}")), "{alert}");
    prometheus.answers("up{job=\"kms-server\"} == 0")
}

/// What kube-apiserver says about a key_id and a request in its metrics and its log is what plug-in and key service say.
#[test]
fn a_key_id_and_a_request_have_one_name_everywhere() -> Result<()> {
    let mut chain = Chain::for_test("names", Some(Kubernetes::V1_37), SecretsThrough::V2, |_| ())?;
    chain.kubectl()?.create_secret("named", "password", "x")?;
    let hashes = labels(&api_server_metrics(&chain)?, KEY_ID_HASH_TOTAL, "key_id_hash");
    let (_, own) = chain.plugin.probe("/metrics")?;
    assert_eq!(hashes, labels(&own, "kmsplugin_key_id_info", "key_id_hash"));
    assert!(
        hashes.len() == 1 && hashes.iter().all(|hash| hash.starts_with("sha256:")),
        "{hashes:?}"
    );

    // Level 6 names the uid of each call. Both caches are cold, so that reading the secret asks the key service.
    chain.plugin.server.kill()?;
    chain.plugin.start()?;
    let apiserver = &mut chain.cluster_mut()?.apiserver;
    apiserver.server.change(|spec| spec.args.push("--v=6".into()));
    apiserver.restart()?;
    assert_eq!(chain.kubectl()?.secret_value("named", "password")?, "x");
    let log = chain.cluster()?.apiserver.server.running()?.log().to_owned();
    let logged = labels(&text(&log)?, "", "uid");
    let asked = unwraps(&text(&chain.key_service.audit)?);
    let known: Vec<_> = asked.iter().filter(|uid| logged.contains(*uid)).collect();
    assert!(!known.is_empty(), "kube-apiserver: {logged:?}; audit file: {asked:?}");
    // The only others are the plug-in's own background work.
    let others: Vec<_> = asked.iter().filter(|uid| !logged.contains(*uid)).collect();
    assert!(others.iter().all(|uid| uid.starts_with("probe-")), "{others:?}");
    Ok(())
}

const KEY_ID_HASH_TOTAL: &str = "apiserver_envelope_encryption_key_id_hash_total";

/// Whatever a panel of the board shows happens at least once, also what should not.
fn use_everything(chain: &mut Chain) -> Result<()> {
    let kubectl = chain.kubectl()?;
    kubectl.create_secret("secret", "password", "x")?;
    kubectl.create_configmap("configmap", "key", "x")?;
    let driver = Driver::connect(&chain.plugin.config.socket)?;
    let mut sealed = driver.v2_encrypt(&[7; 32])?;
    driver.v2_decrypt(&sealed)?;
    driver.v1_decrypt(&driver.v1_encrypt(b"x")?)?;
    sealed.ciphertext[0] ^= 1;
    assert!(driver.v2_decrypt(&sealed).is_err());
    chain.plugin.reconfigure(|config| config.more.push(("DEK_MAX_AGE_IN_HOURS", "100".to_owned())))
}

fn unwraps(audit: &str) -> BTreeSet<String> {
    let records = audit.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let unwraps = records.filter(|record| record["action"] == "unwrap");
    unwraps.filter_map(|record| Some(record["correlation"].as_str()?.to_owned())).collect()
}

/// The values of one label, or of one field of a log line, in all lines that begin with `start`.
fn labels(text: &str, start: &str, label: &str) -> BTreeSet<String> {
    let begin = format!("{label}=\"");
    let lines = text.lines().filter(|line| line.starts_with(start));
    let values = lines.filter_map(|line| line.split_once(&begin)?.1.split_once('"'));
    values.map(|(value, _)| value.to_owned()).collect()
}

fn api_server_metrics(chain: &Chain) -> Result<String> {
    chain.kubectl()?.run(&["get", "--raw", "/metrics"], b"")
}

/// A Prometheus that looks every second.
struct Prometheus {
    process: Process,
    port: u16,
}

impl Prometheus {
    fn start(dir: &Path, chain: &Chain, apiserver: &Proxy) -> Result<Self> {
        let port = ports::free()?;
        // What takes minutes in the rules is proven with promtool.
        let rules = read("alerts.yaml")?;
        let patience = rules.lines().map(|line| match line.trim_start().starts_with("for: ") {
            true => "        for: 1s\n".to_owned(),
            false => format!("{line}\n"),
        });
        pki::write_file(&dir.join("alerts.yaml"), &patience.collect::<String>())?;
        let config = dir.join("prometheus.yaml");
        pki::write_file(&config, &scrape_config(chain, apiserver))?;
        let spec = Spec::new("prometheus", &program("prometheus")?, dir, Lifetime::WithParent)
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", dir.join("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"));
        let prometheus = Self { process: Process::start(&spec)?, port };
        wait::until("Prometheus", SOON, &[&prometheus.process], || {
            match http::get(port, "/-/ready")? {
                (200, _) => Ok(()),
                (status, body) => Err(format!("{status} {body}")),
            }
        })?;
        Ok(prometheus)
    }

    /// As many as the file has, and none of them has failed.
    fn has_loaded_every_rule(&self) -> Result<()> {
        let names = read("alerts.yaml")?.matches("- alert: ").count();
        wait::until("the evaluation of the rules", SOON, &[&self.process], || {
            let data = self.ask("rules").map_err(|error| error.to_string())?;
            let rules = data["groups"][0]["rules"].as_array().cloned().unwrap_or_default();
            let healthy = rules.iter().filter(|rule| rule["health"] == "ok").count();
            if healthy == names { Ok(()) } else { Err(data.to_string()) }
        })
    }

    fn scrapes(&self, targets: usize) -> Result<()> {
        wait::until("the first scrape of each program", SOON, &[&self.process], || {
            let up = self.query("up == 1").map_err(|error| error.to_string())?;
            if up.len() == targets { Ok(()) } else { Err(format!("{up:?}")) }
        })
    }

    /// Waits until there is something to show.
    fn answers(&self, expression: &str) -> Result<()> {
        let what = format!("something to show for {expression}");
        wait::until(&what, SOON, &[&self.process], || match self.query(expression) {
            Ok(found) if found.is_empty() => Err("nothing is there".to_owned()),
            Ok(_) => Ok(()),
            Err(error) => Err(error.to_string()),
        })
    }

    fn firing(&self) -> Result<BTreeSet<String>> {
        let alerts = self.alerts()?;
        let firing = alerts.iter().filter(|alert| alert["state"] == "firing");
        Ok(firing.map(|alert| alert["labels"]["alertname"].to_string()).collect())
    }

    fn alerts(&self) -> Result<Vec<Value>> {
        Ok(self.ask("alerts")?["alerts"].as_array().cloned().unwrap_or_default())
    }

    fn query(&self, expression: &str) -> Result<Vec<Value>> {
        let encoded: String = expression.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let data = self.ask(&format!("query?query={encoded}"))?;
        Ok(data["result"].as_array().cloned().unwrap_or_default())
    }

    /// The data of an answer that is a success.
    fn ask(&self, what: &str) -> Result<Value> {
        let answer = http::get(self.port, &format!("/api/v1/{what}"));
        let (status, body) = answer.map_err(|text| Error::answer("Prometheus", text))?;
        let mut json: Value = serde_json::from_str(&body).unwrap_or_default();
        if status == 200 && json["status"] == "success" {
            return Ok(json["data"].take());
        }
        Err(Error::answer("Prometheus", format!("{status} {body}")))
    }
}

/// `kubectl proxy` brings kube-apiserver's metrics, with the administrator's rights.
fn scrape_config(chain: &Chain, apiserver: &Proxy) -> String {
    let job = |name: &str, port: u16| {
        format!("- {{job_name: {name}, static_configs: [{{targets: ['127.0.0.1:{port}']}}]}}\n")
    };
    format!(
        "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: [alerts.yaml]\nscrape_configs:\n{}{}{}",
        job("kmsplugin", chain.plugin.config.health_port),
        job("kms-server", chain.key_service.health_port),
        job("kube-apiserver", apiserver.port),
    )
}

/// Each expression of the board as Grafana would send it for all nodes.
fn board() -> Result<Vec<String>> {
    let board = read("grafana-dashboard.json")?;
    let board: Value = serde_json::from_str(&board)
        .map_err(|error| Error::answer("grafana-dashboard.json", error.to_string()))?;
    let panels = board["panels"].as_array().into_iter().flatten();
    let targets = panels.filter_map(|panel| panel["targets"].as_array()).flatten();
    let expressions = targets.filter_map(|target| target["expr"].as_str());
    let expressions: Vec<_> = expressions
        .map(|text| text.replace("$instance", ".*").replace("$__rate_interval", "1m"))
        .collect();
    assert!(expressions.len() > 20, "{expressions:?}");
    Ok(expressions)
}

fn read(name: &str) -> Result<String> {
    text(&monitoring().join(name))
}

fn text(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(Error::machine(format!("read {}", path.display())))
}

fn monitoring() -> PathBuf {
    root().join("deploy/monitoring")
}

fn promtool(args: &[&str]) -> Result<String> {
    let mut command = Command::new(program("promtool")?);
    command.args(args).current_dir(monitoring());
    let printed = process::stdout(command, b"")?;
    Ok(String::from_utf8_lossy(&printed).into_owned())
}

/// Where the package puts it.
fn program(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found =
        std::env::split_paths(&path).map(|folder| folder.join(name)).find(|it| it.is_file());
    found.ok_or_else(|| Error::Missing {
        what: name.to_owned(),
        remedy: "run `apt-get install prometheus` as root, or `cargo xtask test --e2e`".to_owned(),
    })
}
