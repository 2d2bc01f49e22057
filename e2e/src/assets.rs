//! Where the real programs are: Kubernetes and etcd from `cargo xtask envtest`, ours from `cargo build --release`.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// A Kubernetes release that the chain is proven with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kubernetes {
    /// The current one.
    V1_37,
    /// The oldest supported one: sends the raw socket path as authority and wants `v2beta1` from Status.
    V1_28,
}

impl Kubernetes {
    /// As in file and directory names.
    pub fn minor(self) -> &'static str {
        match self {
            Self::V1_37 => "1.37",
            Self::V1_28 => "1.28",
        }
    }
}

/// The programs of Kubernetes and etcd.
#[derive(Debug, Clone)]
pub struct Assets {
    pub kube_apiserver: PathBuf,
    pub kubectl: PathBuf,
    pub etcd: PathBuf,
    /// A folder given by KUBEBUILDER_ASSETS need not have it; the harness reads etcd without it.
    pub etcdctl: Option<PathBuf>,
}

impl Assets {
    /// Finds the programs: in the folder that KUBEBUILDER_ASSETS names (current release only), else where
    /// `cargo xtask envtest` links them.
    ///
    /// # Errors
    /// When one is missing, naming it and the command that gets it.
    pub fn find(kubernetes: Kubernetes) -> Result<Self> {
        let given = std::env::var_os("KUBEBUILDER_ASSETS")
            .filter(|folder| !folder.is_empty() && kubernetes == Kubernetes::V1_37);
        Self::in_folder(&given.map_or_else(|| envtest_folder(kubernetes), PathBuf::from))
    }

    /// The programs in `folder`.
    ///
    /// # Errors
    /// When one is missing.
    pub fn in_folder(folder: &Path) -> Result<Self> {
        let etcdctl = folder.join("etcdctl");
        Ok(Self {
            kube_apiserver: program(folder, "kube-apiserver", REMEDY)?,
            kubectl: program(folder, "kubectl", REMEDY)?,
            etcd: program(folder, "etcd", REMEDY)?,
            etcdctl: etcdctl.is_file().then_some(etcdctl),
        })
    }
}

/// The variable that names the folder with our programs, if they are not to be those of the ordinary release build.
pub const PROGRAMS: &str = "KEELSON_PROGRAMS";

/// Our own programs, as released.
#[derive(Debug, Clone)]
pub struct Programs {
    pub kmsplugin: PathBuf,
    pub kms_server: PathBuf,
    pub kmsctl: PathBuf,
}

impl Programs {
    /// Those in the folder that [`PROGRAMS`] names, else the release build.
    ///
    /// # Errors
    /// When one was not built.
    pub fn find() -> Result<Self> {
        const REMEDY: &str = "run `cargo build --release`";
        let folder = programs_folder();
        Ok(Self {
            kmsplugin: program(&folder, "kmsplugin", REMEDY)?,
            kms_server: program(&folder, "kms-server", REMEDY)?,
            kmsctl: program(&folder, "kmsctl", REMEDY)?,
        })
    }
}

/// kmsplugin as released with the provider `pkcs11`, beside the ordinary one.
///
/// # Errors
/// When it was not built.
pub fn kmsplugin_on_hsm() -> Result<PathBuf> {
    const REMEDY: &str = "run `cargo xtask test --e2e on_hsm`, which builds it";
    program(&programs_folder().join(ON_HSM), "kmsplugin", REMEDY)
}

/// Where the build with the provider `pkcs11` is, below the folder of the programs.
pub const ON_HSM: &str = "on-hsm";

fn programs_folder() -> PathBuf {
    std::env::var_os(PROGRAMS).map_or_else(|| target_folder().join("release"), PathBuf::from)
}

/// The workspace's root.
pub fn root() -> PathBuf {
    let crate_folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    crate_folder.parent().unwrap_or(crate_folder).to_owned()
}

/// Where cargo builds.
pub fn target_folder() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// Where `cargo xtask envtest` links the programs of one release.
pub fn envtest_folder(kubernetes: Kubernetes) -> PathBuf {
    target_folder().join("envtest").join(kubernetes.minor())
}

const REMEDY: &str =
    "run `cargo xtask envtest --all`, or set KUBEBUILDER_ASSETS to a folder that has it";

fn program(folder: &Path, name: &str, remedy: &str) -> Result<PathBuf> {
    let path = folder.join(name);
    if path.is_file() {
        return Ok(path);
    }
    Err(Error::Missing { what: path.display().to_string(), remedy: remedy.to_owned() })
}
