//! Gets the real kube-apiserver, kubectl, etcd and etcdctl.
//!
//! From the folder that KUBEBUILDER_ASSETS names; else built once from published Go modules and kept outside the
//! clone under a key made of go.mod, go.sum and the flags. `target/envtest/<release>/` links what is used, so that
//! the tests find it.

use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use keelson_e2e::assets::{self, Assets, Kubernetes};
use keelson_e2e::{Error, Result, process};

use crate::cache;
use crate::packages::is_program;
use crate::progress::Step;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Every release that the tests use.
    #[arg(long)]
    all: bool,
    /// One release.
    #[arg(long, value_parser = ["1.37", "1.28"], default_value = "1.37", conflicts_with = "all")]
    version: String,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let releases: &[Kubernetes] = match (args.all, args.version.as_str()) {
        (true, _) => &[Kubernetes::V1_37, Kubernetes::V1_28],
        (false, "1.28") => &[Kubernetes::V1_28],
        (false, _) => &[Kubernetes::V1_37],
    };
    for release in releases {
        let assets = ensure(*release)?;
        println!("Kubernetes {}:", release.minor());
        let programs = [&assets.kube_apiserver, &assets.kubectl, &assets.etcd];
        for program in programs.into_iter().chain(&assets.etcdctl) {
            println!("  {}", program.display());
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether [`ensure`] can succeed: the programs are given, cached or can be built.
pub(crate) fn is_possible() -> bool {
    given_folder().is_some()
        || is_program("go")
        || MODULES.iter().all(|m| m.is_cached().unwrap_or(false))
}

/// The folder that KUBEBUILDER_ASSETS names, as an absolute path: tests run in other folders than this program.
pub(crate) fn given_folder() -> Option<PathBuf> {
    let given = std::env::var_os("KUBEBUILDER_ASSETS").filter(|value| !value.is_empty())?;
    std::path::absolute(given).ok()
}

/// The programs for one release, found or built.
///
/// # Errors
/// When Go is missing or a build fails, with the compiler's last lines.
pub(crate) fn ensure(release: Kubernetes) -> Result<Assets> {
    let folder = match (given_folder(), release) {
        (Some(given), Kubernetes::V1_37) => return Assets::in_folder(&given),
        _ => assets::envtest_folder(release),
    };
    fs::create_dir_all(&folder).map_err(Error::machine(format!("make {}", folder.display())))?;
    let common = match given_folder() {
        Some(given) => given,
        None => {
            let etcd = ETCD.ensure()?;
            link(&etcd, &folder, &["etcd", "etcdctl"])?;
            KUBERNETES.ensure()?
        }
    };
    match release {
        Kubernetes::V1_37 => link(&common, &folder, &["kube-apiserver", "kubectl"])?,
        Kubernetes::V1_28 => {
            if given_folder().is_some() {
                link(&common, &folder, &["etcd"])?;
            }
            link(&common, &folder, &["kubectl"])?;
            link(&OLD_KUBERNETES.ensure()?, &folder, &["kube-apiserver"])?;
        }
    }
    Assets::in_folder(&folder)
}

/// A folder below `xtask/envtest/` with its own go.mod, and the programs that it pins.
struct Module {
    folder: &'static str,
    /// The module whose version is the version of the programs.
    versioned_by: &'static str,
    /// Kubernetes judges features by the version that is linked in; without it, it calls itself v0.0.0.
    link_version: bool,
    programs: &'static [(&'static str, &'static str)],
}

const ETCD: Module = Module {
    folder: "etcd-3.6",
    versioned_by: "go.etcd.io/etcd/server/v3",
    link_version: false,
    programs: &[("etcd", "go.etcd.io/etcd/server/v3"), ("etcdctl", "go.etcd.io/etcd/etcdctl/v3")],
};

const KUBERNETES: Module = Module {
    folder: "kubernetes-1.37",
    versioned_by: "k8s.io/kubernetes",
    link_version: true,
    programs: &[
        ("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
        ("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
    ],
};

const OLD_KUBERNETES: Module = Module {
    folder: "kubernetes-1.28",
    versioned_by: "k8s.io/kubernetes",
    link_version: true,
    programs: &[("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver")],
};

/// What the current release needs.
const MODULES: &[Module] = &[ETCD, KUBERNETES];

impl Module {
    /// The folder with the finished programs; builds those that are not there.
    fn ensure(&self) -> Result<PathBuf> {
        let source = assets::root().join("xtask/envtest").join(self.folder);
        let go_mod = read(&source.join("go.mod"))?;
        let version = version_in(&go_mod, self.versioned_by).ok_or_else(|| {
            Error::answer(self.folder, format!("no version of {}", self.versioned_by))
        })?;
        let flags = self.link_flags(&version);
        let cache = self.cache()?;
        fs::create_dir_all(&cache).map_err(Error::machine(format!("make {}", cache.display())))?;
        for (name, package) in self.programs {
            let target = cache.join(name);
            if !target.is_file() {
                build(&source, package, &flags, &target, &format!("build {name} {version}"))?;
            }
        }
        Ok(cache)
    }

    fn is_cached(&self) -> Result<bool> {
        let cache = self.cache()?;
        Ok(self.programs.iter().all(|(name, _)| cache.join(name).is_file()))
    }

    fn cache(&self) -> Result<PathBuf> {
        let source = assets::root().join("xtask/envtest").join(self.folder);
        let go_mod = read(&source.join("go.mod"))?;
        let version = version_in(&go_mod, self.versioned_by).unwrap_or_default();
        let key = cache::key(&[
            &go_mod,
            &read(&source.join("go.sum"))?,
            &self.link_flags(&version),
            ARCH,
        ]);
        Ok(cache::folder("envtest")?.join(format!("{}-{key}", self.folder)))
    }

    fn link_flags(&self, version: &str) -> String {
        if !self.link_version {
            return "-s -w".to_owned();
        }
        let mut numbers = version.trim_start_matches('v').split('.');
        let (major, minor) = (numbers.next().unwrap_or(""), numbers.next().unwrap_or(""));
        let set =
            |name: &str, value: &str| format!("-X k8s.io/component-base/version.{name}={value}");
        let versions =
            [set("gitVersion", version), set("gitMajor", major), set("gitMinor", minor)].join(" ");
        format!("-s -w {versions}")
    }
}

const ARCH: &str = std::env::consts::ARCH;

/// Builds one program under a temporary name and renames it: a broken build is never taken for a finished one.
fn build(source: &Path, package: &str, link_flags: &str, target: &Path, title: &str) -> Result<()> {
    if !is_program("go") {
        return Err(Error::Missing {
            what: "Go".to_owned(),
            remedy: format!(
                "to {title}, install Go 1.26 or later (https://go.dev/dl), or set KUBEBUILDER_ASSETS to a folder \
                 that has kube-apiserver, kubectl and etcd"
            ),
        });
    }
    let unfinished = target.with_extension(format!("{}.unfinished", std::process::id()));
    let mut go = Command::new("go");
    go.args(["build", "-v", "-trimpath", "-buildvcs=false", "-ldflags", link_flags, "-o"])
        .arg(&unfinished)
        .arg(package)
        .current_dir(source)
        .env("GOWORK", "off")
        .env("GOFLAGS", "-mod=readonly");
    let result = watched(go, title)
        .and_then(|()| fs::rename(&unfinished, target).map_err(Error::machine("keep the program")));
    if result.is_err() {
        // May not exist: the build failed, and that is what is reported.
        let _ = fs::remove_file(&unfinished);
    }
    result
}

/// Runs `go` and shows which package it is at.
fn watched(mut go: Command, title: &str) -> Result<()> {
    use std::os::unix::process::CommandExt;
    go.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).process_group(0);
    let mut step = Step::begin(title);
    let mut child = process::spawn(go, "go")?;
    let mut last_lines = VecDeque::new();
    for line in child.stderr.take().into_iter().flat_map(|pipe| BufReader::new(pipe).lines()) {
        let Ok(line) = line else { break };
        step.at(&line);
        last_lines.push_back(line);
        if last_lines.len() > 30 {
            last_lines.pop_front();
        }
    }
    let status = child.wait().map_err(Error::machine("wait for go"))?;
    process::forget(&child);
    if status.success() {
        step.done();
        return Ok(());
    }
    Err(Error::Command {
        command: format!("{title} (go build)"),
        status: process::describe(status),
        output: Vec::from(last_lines).join("\n"),
    })
}

/// The version with which a go.mod requires `module`.
fn version_in(go_mod: &str, module: &str) -> Option<String> {
    go_mod.lines().find_map(|line| {
        let mut words = line.trim().trim_start_matches("require ").split_whitespace();
        (words.next()? == module).then(|| words.next().map(str::to_owned))?
    })
}

fn link(from: &Path, folder: &Path, names: &[&str]) -> Result<()> {
    for name in names {
        let (target, link) = (from.join(name), folder.join(name));
        if fs::read_link(&link).is_ok_and(|now| now == target) {
            continue;
        }
        // Absent the first time.
        let _ = fs::remove_file(&link);
        std::os::unix::fs::symlink(&target, &link)
            .map_err(Error::machine(format!("link {}", link.display())))?;
    }
    Ok(())
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(Error::machine(format!("read {}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_go_mod() {
        let text = "module x\n\nrequire k8s.io/kubernetes v1.37.2\n\nrequire (\n\tgo.etcd.io/etcd/server/v3 v3.6.16\n\tk8s.io/api v0.37.2 // indirect\n)\n";
        assert_eq!(version_in(text, "k8s.io/kubernetes").as_deref(), Some("v1.37.2"));
        assert_eq!(version_in(text, "go.etcd.io/etcd/server/v3").as_deref(), Some("v3.6.16"));
        assert_eq!(version_in(text, "k8s.io/api").as_deref(), Some("v0.37.2"));
        assert_eq!(version_in(text, "k8s.io/kms"), None);
    }

    #[test]
    fn every_pinned_module_names_its_version_and_links_it() {
        for module in [ETCD, KUBERNETES, OLD_KUBERNETES] {
            let source = assets::root().join("xtask/envtest").join(module.folder);
            let version =
                version_in(&read(&source.join("go.mod")).unwrap(), module.versioned_by).unwrap();
            assert!(module.folder.ends_with(&version[1..version.rfind('.').unwrap()]), "{version}");
        }
        let flags = KUBERNETES.link_flags("v1.37.2");
        assert!(flags.contains("version.gitVersion=v1.37.2 "), "{flags}");
        assert!(
            flags.ends_with("version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=37"),
            "{flags}"
        );
    }
}
