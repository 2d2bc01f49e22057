//! What the demo does with a running chain, and what that proves. Each claim is checked before it is printed.

use keelson_e2e::chain::{Chain, V1_PROVIDER, V2_PROVIDER};
use keelson_e2e::driver::{self, Driver};
use keelson_e2e::{Error, Result, hexdump};

/// `secret1` through KMS v1 and `configmap1` through KMS v2, by the unmodified kube-apiserver.
pub(super) fn with_kubernetes(chain: &Chain) -> Result<()> {
    let (kubectl, etcd) = (chain.kubectl()?, &chain.cluster()?.etcd);
    command("kubectl create secret generic secret1 -n default --from-literal=password=…");
    print!("{}", kubectl.create_secret("secret1", "password", PASSWORD)?);
    command(
        "kubectl get secret secret1 -n default -o go-template='{{index .data \"password\" | base64decode}}'",
    );
    let read_back = kubectl.secret_value("secret1", "password")?;
    println!("{read_back}");
    check(read_back == PASSWORD, "the secret was not read back as it was written")?;

    command(&format!("etcdctl get {SECRET_KEY} | hexdump -C"));
    let stored = etcd.value(SECRET_KEY)?;
    print!("{}", hexdump::canonical(&etcd.printed(SECRET_KEY)?));
    check_sealed(&stored, &format!("k8s:enc:kms:v1:{V1_PROVIDER}:"))?;
    command(&format!("etcdctl get {SECRET_KEY} | kmsctl inspect -"));
    explain(chain, &etcd.printed(SECRET_KEY)?)?;

    command("kubectl create configmap configmap1 -n default --from-literal=greeting=…");
    print!("{}", kubectl.create_configmap("configmap1", "greeting", PASSWORD)?);
    check(
        kubectl.configmap_value("configmap1", "greeting")? == PASSWORD,
        "the configmap was not read back as it was written",
    )?;
    command(&format!("etcdctl get {CONFIGMAP_KEY} | hexdump -C | head -12"));
    let printed = hexdump::canonical(&etcd.printed(CONFIGMAP_KEY)?);
    println!("{}", printed.lines().take(12).collect::<Vec<_>>().join("\n"));
    check_sealed(&etcd.value(CONFIGMAP_KEY)?, &format!("k8s:enc:kms:v2:{V2_PROVIDER}:"))?;

    println!(
        "
What this proves
* An unmodified kube-apiserver wrote secret1 to etcd through KMS v1 under the original provider name
  (k8s:enc:kms:v1:{V1_PROVIDER}:) and configmap1 through KMS v2 (k8s:enc:kms:v2:{V2_PROVIDER}:), over one socket.
* Neither value can be found in etcd's bytes, and both were read back unchanged.
* The key that protects them is wrapped by a root key that was made inside the HSM and cannot leave it:
  kmsplugin asked kms-server over TLS with a token of its own API key, and kms-server asked SoftHSM2 by PKCS#11."
    );
    Ok(())
}

/// The same without kube-apiserver: the calls that it makes, and the bytes that it would store.
pub(super) fn without_kubernetes(chain: &Chain) -> Result<()> {
    let driver = Driver::connect(&chain.plugin.config.socket)?;
    command("KMS v1: Version, then Encrypt of kube-apiserver's own data key for secret1");
    let [api, name, version] = driver.v1_version()?;
    println!("{name} {version} speaks {api}");
    let mut data_key = [0; 32];
    aws_lc_rs::rand::fill(&mut data_key)
        .map_err(|_| Error::answer("the random source", "no random bytes"))?;
    let cipher = driver.v1_encrypt(&data_key)?;
    let object =
        format!(r#"{{"kind":"Secret","metadata":{{"name":"secret1"}},"data":"{PASSWORD}"}}"#);
    let stored =
        driver::stored_by_v1(V1_PROVIDER, SECRET_KEY, &data_key, &cipher, object.as_bytes())?;
    println!("this is what kube-apiserver would store under {SECRET_KEY}:");
    let printed = [SECRET_KEY.as_bytes(), b"\n", &stored, b"\n"].concat();
    print!("{}", hexdump::canonical(&printed));
    check_sealed(&stored, &format!("k8s:enc:kms:v1:{V1_PROVIDER}:"))?;
    command("KMS v1: Decrypt");
    check(driver.v1_decrypt(&cipher)? == data_key, "the data key came back changed")?;
    println!("the data key came back unchanged");
    command("kmsctl inspect -, with these bytes");
    explain(chain, &printed)?;

    command("KMS v2: Status, Encrypt of a seed, Decrypt");
    let status = driver.v2_status()?;
    println!("{} {} key_id {}", status.version, status.healthz, status.key_id);
    let sealed = driver.v2_encrypt(&data_key)?;
    check(sealed.key_id == status.key_id, "Status and Encrypt name different keys")?;
    check(driver.v2_decrypt(&sealed)? == data_key, "the seed came back changed")?;
    println!("the seed came back unchanged from {} sealed bytes", sealed.ciphertext.len());

    println!(
        "
What this proves
* kmsplugin serves KMS v1 and KMS v2 on one socket; what it returned was opened again unchanged.
* The key that protects it is wrapped by a root key that was made inside the HSM and cannot leave it:
  kmsplugin asked kms-server over TLS with a token of its own API key, and kms-server asked SoftHSM2 by PKCS#11.
What was left out
* kube-apiserver, kubectl and etcd: nothing was stored in a cluster. Install Go 1.26 or later, or set
  KUBEBUILDER_ASSETS to a folder with kube-apiserver, kubectl and etcd, and run the demo again."
    );
    Ok(())
}

const PASSWORD: &str = "correct-horse-battery-staple";
const SECRET_KEY: &str = "/registry/secrets/default/secret1";
const CONFIGMAP_KEY: &str = "/registry/configmaps/default/configmap1";

fn command(text: &str) {
    println!("\n$ {text}");
}

fn explain(chain: &Chain, printed: &[u8]) -> Result<()> {
    print!("{}", chain.kmsctl.run(&["inspect", "-"], printed)?);
    let fields = chain.kmsctl.inspect(printed)?;
    check(
        fields["kp_version"] == 1 && fields["key"] == SECRET_KEY,
        "kmsctl inspect does not find the plug-in's cipher in the stored value",
    )
}

fn check_sealed(stored: &[u8], prefix: &str) -> Result<()> {
    check(
        stored.starts_with(prefix.as_bytes()),
        "the stored value does not start with the provider's prefix",
    )?;
    let plain = PASSWORD.as_bytes();
    check(
        !stored.windows(plain.len()).any(|window| window == plain),
        "the stored value holds the plain text",
    )
}

fn check(holds: bool, otherwise: &str) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::answer("the chain", otherwise)) }
}
