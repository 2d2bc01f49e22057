use keelson_e2e::{apiserver::ApiServer, assets::*, etcd::Etcd, process::Lifetime};
#[test]
fn plain() {
    for v in [Kubernetes::V1_37, Kubernetes::V1_28] {
        let dir = keelson_e2e::chain::run_folder(&format!("e2e/tmp{}", v.minor()));
        keelson_e2e::chain::fresh_folder(&dir).unwrap();
        let assets = Assets::find(v).unwrap();
        let etcd = Etcd::start(&assets.etcd, &dir, Lifetime::WithParent).unwrap();
        let enc = dir.join("enc.yaml");
        std::fs::write(&enc, "kind: EncryptionConfiguration\napiVersion: apiserver.config.k8s.io/v1\nresources:\n  - resources: [secrets]\n    providers:\n      - identity: {}\n").unwrap();
        let mut a = ApiServer::start(&assets, &etcd, &enc, &dir, Lifetime::WithParent).unwrap();
        a.kubectl.create_secret("s1", "k", "v v").unwrap();
        assert_eq!(a.kubectl.secret_value("s1", "k").unwrap(), "v v");
        a.kubectl.create_configmap("c1", "k", "v v").unwrap();
        assert_eq!(a.kubectl.configmap_value("c1", "k").unwrap(), "v v");
        println!("{}", keelson_e2e::hexdump::canonical(&etcd.printed("/registry/secrets/default/s1").unwrap()));
        a.server.kill().unwrap();
        a.server.start().unwrap();
        a.wait_until_ready().unwrap();
        assert_eq!(a.kubectl.secret_value("s1", "k").unwrap(), "v v");
        println!("{}", a.kubectl.create_secret("s1", "k", "v v").unwrap_err());
        println!("{} {}", a.server.running().unwrap().pid(), a.server.running().unwrap().peak_memory().unwrap());
    }
}
