//! The plug-in, judged through its socket by every rule of kube-apiserver that can be seen from outside.

use keelson_e2e::Result;
use keelson_e2e::chain::{Chain, SecretsThrough};

#[test]
fn no_case_of_kmsctl_conformance_fails() -> Result<()> {
    let chain = Chain::for_test("conformance", None, SecretsThrough::V1, |_| ())?;
    let socket = chain.plugin.config.socket.display().to_string();
    let report = chain.kmsctl.run(&["conformance", "--socket", &socket, "--api", "both"], b"")?;
    println!("{report}");
    Ok(())
}
