//! Where in etcd kube-apiserver keeps a resource. Nothing is read here.

/// Part of a resource's key between `/registry/` and the namespace.
pub(crate) fn folder(resource: &str) -> Result<String, String> {
    if let Some(group) = resource.strip_prefix("*.") {
        return match group {
            // All of `/registry/`; what is never encrypted is told apart by `never_encrypted`.
            "*" => Ok(String::new()),
            _ => Err(format!(
                "which resources {resource:?} stands for only the cluster knows: name them with --resource"
            )),
        };
    }
    let well_formed = |text: &str| {
        !text.is_empty()
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-".contains(&byte))
    };
    if !well_formed(resource) {
        return Err(format!("{resource:?} is no name of a resource, such as secrets"));
    }
    let (name, group) = resource.split_once('.').unwrap_or((resource, ""));
    let folder = match (name, group) {
        ("replicationcontrollers", "") => "controllers/".to_owned(),
        ("endpoints", "") => "services/endpoints/".to_owned(),
        ("nodes", "") => "minions/".to_owned(),
        ("services", "") => "services/specs/".to_owned(),
        ("ingresses", "extensions" | "networking.k8s.io") => "ingress/".to_owned(),
        (name, "") => format!("{name}/"),
        (name, group) if BUILT_IN.contains(&group) => format!("{name}/"),
        // Custom resources and those of kube-apiserver's own extensions.
        (name, group) => format!("{group}/{name}/"),
    };
    Ok(folder)
}

/// Kubernetes' own groups: their resources lie beside the core ones, under the name alone. Groups of custom
/// resources may end in k8s.io as well.
const BUILT_IN: [&str; 21] = [
    "admissionregistration.k8s.io",
    "apps",
    "authentication.k8s.io",
    "authorization.k8s.io",
    "autoscaling",
    "batch",
    "certificates.k8s.io",
    "coordination.k8s.io",
    "discovery.k8s.io",
    "events.k8s.io",
    "extensions",
    "flowcontrol.apiserver.k8s.io",
    "imagepolicy.k8s.io",
    "internal.apiserver.k8s.io",
    "networking.k8s.io",
    "node.k8s.io",
    "policy",
    "rbac.authorization.k8s.io",
    "resource.k8s.io",
    "scheduling.k8s.io",
    "storage.k8s.io",
];

/// What no API server encrypts, even where `*.*` is configured. `key` begins behind `/registry/`.
pub(crate) fn never_encrypted(key: &[u8]) -> bool {
    let plain: [&[u8]; 3] = [b"masterleases/", b"peerserverleases/", b"ranges/"];
    plain.iter().any(|folder| key.starts_with(folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resource_lies_where_kube_apiserver_puts_it() {
        let cases = [
            ("secrets", "secrets/"),
            ("services", "services/specs/"),
            ("endpoints", "services/endpoints/"),
            ("nodes", "minions/"),
            ("ingresses.networking.k8s.io", "ingress/"),
            ("deployments.apps", "deployments/"),
            ("roles.rbac.authorization.k8s.io", "roles/"),
            ("widgets.example.com", "example.com/widgets/"),
            (
                "customresourcedefinitions.apiextensions.k8s.io",
                "apiextensions.k8s.io/customresourcedefinitions/",
            ),
            ("*.*", ""),
        ];
        for (resource, expected) in cases {
            assert_eq!(folder(resource).as_deref(), Ok(expected), "{resource}");
        }
        for refused in ["", "*.apps", "*.", "../x", "secrets/kube-system"] {
            assert!(folder(refused).is_err(), "{refused}");
        }
    }

    #[test]
    fn leases_of_the_servers_themselves_are_never_encrypted() {
        assert!(never_encrypted(b"masterleases/10.0.0.1") && never_encrypted(b"ranges/serviceips"));
        assert!(!never_encrypted(b"secrets/masterleases/a"));
    }
}
