//! The boundaries between the crates, checked against what cargo resolves: who may use whom, what may never enter
//! the pure core, and how long a file may be.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use keelson_e2e::{Error, Result, assets, process};
use serde::Deserialize;

use crate::cargo;

/// Every violation, one line each.
///
/// # Errors
/// When cargo cannot tell.
pub(crate) fn violations() -> Result<Vec<String>> {
    let args = ["metadata", "--format-version", "1", "--locked"];
    let text = process::stdout(cargo::command(&args), b"")?;
    let metadata: Metadata = serde_json::from_slice(&text)
        .map_err(|error| Error::answer("cargo metadata", error.to_string()))?;
    let mut found = arrows(&metadata);
    found.extend(pure_core(&metadata));
    found.extend(long_files(&assets::root())?);
    Ok(found)
}

/// Our crates, and which of ours each may use in what it ships.
const MAY_USE: &[(&str, &[&str])] = &[
    ("kms-core", &[]),
    ("kms-daemon", &[]),
    ("kms-api", &["kms-core"]),
    ("kms-hsm", &["kms-core"]),
    ("pkcs11-shim", &[]),
    ("kms-plugin", &["kms-api", "kms-core", "kms-daemon", "kms-hsm"]),
    ("kms-server", &["kms-api", "kms-core", "kms-daemon", "kms-hsm"]),
    ("kmsctl", &["kms-api", "kms-core", "kms-hsm"]),
    ("keelson-benches", &["kms-api", "kms-core", "kms-hsm", "kms-server"]),
    ("keelson-e2e", &["kms-api", "kms-core"]),
    ("xtask", &["keelson-e2e", "kms-core"]),
];

/// I/O and its runtimes: kms-core is bytes in, bytes out.
const NEVER_IN_CORE: &[&str] =
    &["tokio", "hyper", "tonic", "sqlx", "cryptoki", "rustix", "mio", "socket2"];

const LONGEST_FILE: usize = 600;

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    resolve: Resolve,
}

#[derive(Deserialize)]
struct Package {
    id: String,
    name: String,
    /// None for a member of the workspace.
    source: Option<String>,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    /// None for what is shipped, else "dev" or "build".
    kind: Option<String>,
}

#[derive(Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
    deps: Vec<Edge>,
}

#[derive(Deserialize)]
struct Edge {
    pkg: String,
    dep_kinds: Vec<Kind>,
}

#[derive(Deserialize)]
struct Kind {
    kind: Option<String>,
}

fn arrows(metadata: &Metadata) -> Vec<String> {
    let ours: BTreeSet<&str> = members(metadata).map(|package| package.name.as_str()).collect();
    let law: BTreeMap<&str, &[&str]> = MAY_USE.iter().copied().collect();
    let mut found = Vec::new();
    for package in members(metadata) {
        let Some(allowed) = law.get(package.name.as_str()) else {
            found.push(format!("{}: a crate that xtask/src/walls.rs does not know", package.name));
            continue;
        };
        let shipped = package.dependencies.iter().filter(|dependency| dependency.kind.is_none());
        for dependency in shipped.map(|dependency| dependency.name.as_str()) {
            if ours.contains(dependency) && !allowed.contains(&dependency) {
                found.push(format!("{} must not use {dependency}", package.name));
            }
        }
    }
    found
}

fn pure_core(metadata: &Metadata) -> Vec<String> {
    let names: BTreeMap<&str, &str> =
        metadata.packages.iter().map(|p| (p.id.as_str(), p.name.as_str())).collect();
    let shipped: BTreeMap<&str, Vec<&str>> = metadata
        .resolve
        .nodes
        .iter()
        .map(|node| {
            let edges =
                node.deps.iter().filter(|edge| edge.dep_kinds.iter().any(|k| k.kind.is_none()));
            (node.id.as_str(), edges.map(|edge| edge.pkg.as_str()).collect())
        })
        .collect();
    let mut reached = BTreeSet::new();
    let mut open: Vec<&str> =
        members(metadata).filter(|p| p.name == "kms-core").map(|p| p.id.as_str()).collect();
    while let Some(id) = open.pop() {
        if reached.insert(id) {
            open.extend(shipped.get(id).into_iter().flatten());
        }
    }
    reached
        .into_iter()
        .filter_map(|id| names.get(id).copied())
        .filter(|name| NEVER_IN_CORE.contains(name))
        .map(|name| format!("kms-core must stay pure, but pulls in {name}"))
        .collect()
}

fn members(metadata: &Metadata) -> impl Iterator<Item = &Package> {
    metadata.packages.iter().filter(|package| package.source.is_none())
}

fn long_files(root: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let folders = ["crates", "benches", "e2e", "xtask", "fuzz/fuzz_targets"];
    let mut open: Vec<_> =
        folders.iter().map(|folder| root.join(folder)).filter(|f| f.exists()).collect();
    while let Some(folder) = open.pop() {
        let read = Error::machine(format!("read {}", folder.display()));
        for entry in fs::read_dir(&folder).map_err(read)?.flatten() {
            let path = entry.path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path)
                    .map_err(Error::machine(format!("read {}", path.display())))?;
                let lines = text.lines().count();
                if lines > LONGEST_FILE {
                    found
                        .push(format!("{}: {lines} lines, at most {LONGEST_FILE}", path.display()));
                }
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TREE: &str = r#"{
        "packages": [
            {"id": "1", "name": "kms-core", "source": null, "dependencies": [
                {"name": "kms-api", "kind": null}, {"name": "kms-hsm", "kind": "dev"}]},
            {"id": "2", "name": "kms-api", "source": null, "dependencies": []},
            {"id": "3", "name": "kms-hsm", "source": null, "dependencies": []},
            {"id": "4", "name": "bytes", "source": "registry", "dependencies": []},
            {"id": "5", "name": "tokio", "source": "registry", "dependencies": []},
            {"id": "6", "name": "newcomer", "source": null, "dependencies": []}],
        "resolve": {"nodes": [
            {"id": "1", "deps": [
                {"pkg": "4", "dep_kinds": [{"kind": null}]}, {"pkg": "5", "dep_kinds": [{"kind": "dev"}]}]},
            {"id": "4", "deps": [{"pkg": "5", "dep_kinds": [{"kind": null}]}]}]}
    }"#;

    #[test]
    fn arrows_point_down_only_and_every_crate_has_a_place() {
        let metadata = serde_json::from_str(TREE).unwrap();
        let expected = [
            "kms-core must not use kms-api",
            "newcomer: a crate that xtask/src/walls.rs does not know",
        ];
        assert_eq!(arrows(&metadata), expected);
    }

    #[test]
    fn what_the_core_ships_is_followed_to_the_end() {
        let metadata = serde_json::from_str(TREE).unwrap();
        assert_eq!(pure_core(&metadata), ["kms-core must stay pure, but pulls in tokio"]);
        let without = TREE.replace(
            r#""5", "dep_kinds": [{"kind": null}]"#,
            r#""5", "dep_kinds": [{"kind": "dev"}]"#,
        );
        assert!(pure_core(&serde_json::from_str(&without).unwrap()).is_empty());
    }
}
