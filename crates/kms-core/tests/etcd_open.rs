//! Case 30 of what kube-apiserver demands: values that Kubernetes itself wrote, opened without it; and everything near
//! them refused.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kms_core::etcd::object::{ObjectError, SourceType, V1Body, V2Object};
use kms_core::etcd::open::{self, OpenError, V1Mode};
use kms_core::etcd::prefix::{StoredValue, classify};

const VECTORS: &str = include_str!("data/etcd-vectors.txt");

/// One value, and what opens it.
struct Vector {
    key: Vec<u8>,
    etcd: Vec<u8>,
    stored: Vec<u8>,
    plain: Vec<u8>,
}

fn vector(name: &str) -> Vector {
    let mut lines = VECTORS.lines().skip_while(|line| *line != name).skip(1);
    let mut vector =
        Vector { key: Vec::new(), etcd: Vec::new(), stored: Vec::new(), plain: Vec::new() };
    while let Some((member, value)) =
        lines.next().and_then(|line| line.strip_prefix("  ")?.split_once(' '))
    {
        let value = value.trim();
        match member {
            "etcd" => vector.etcd = value.as_bytes().to_vec(),
            "key" => vector.key = hex(value),
            "stored" => vector.stored = hex(value),
            "plain" => vector.plain = hex(value),
            other => panic!("{other}"),
        }
    }
    assert!(!vector.stored.is_empty(), "there is no vector {name:?}");
    vector
}

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

fn v2_object(stored: &[u8]) -> V2Object {
    let Ok(StoredValue::KmsV2 { provider: "kms-provider", body }) = classify(stored) else {
        panic!("not a KMS v2 value of kms-provider");
    };
    V2Object::decode(body).unwrap()
}

const RECORDS: [(&str, SourceType); 2] = [
    ("upstream testKMSv2ProviderLegacyData v1.27.0", SourceType::AesGcmKey),
    ("upstream testKMSv2ProviderLegacyData v1.28.0", SourceType::HkdfSha256XnonceAesGcmSeed),
];

#[test]
fn case_30_the_complete_records_of_kubernetes_tests_open() {
    for (name, source_type) in RECORDS {
        let Vector { etcd, stored, .. } = vector(name);
        let object = v2_object(&stored);
        assert_eq!((object.source_type, object.key_id.as_str()), (source_type, "1"));
        assert_eq!(object.annotations["local-kek.kms.kubernetes.io"], b"encrypted-local-kek");
        let source = STANDARD.decode(&object.encrypted_dek_source).unwrap();
        let opened = open::kms_v2(&object, &source, &etcd).unwrap();
        assert!(opened.as_slice().starts_with(b"k8s\0"), "{name}");
        let namespace = b"kms-v2-legacy-data";
        assert!(opened.as_slice().windows(namespace.len()).any(|window| window == namespace));

        let elsewhere = [&etcd[..], b"2"].concat();
        let refused = open::kms_v2(&object, &source, &elsewhere).map(drop);
        assert_eq!(refused, Err(OpenError::NotAuthentic), "{name}");
    }
}

#[test]
fn case_30_a_seed_is_used_whole_and_is_no_key() {
    let Vector { etcd, stored, .. } = vector(RECORDS[1].0);
    let object = v2_object(&stored);
    let source = STANDARD.decode(&object.encrypted_dek_source).unwrap();
    let longer = [&source[..], &[0]].concat();
    // HMAC fills a short key up with zeros, so that one more zero is the same key, but not any other byte.
    assert!(open::kms_v2(&object, &longer, &etcd).is_ok());
    let longer = [&source[..], &[1]].concat();
    assert!(open::kms_v2(&object, &longer, &etcd).is_err());
    let as_key = V2Object { source_type: SourceType::AesGcmKey, ..object };
    assert!(open::kms_v2(&as_key, &source, &etcd).is_err());
}

#[test]
fn case_30_the_recorded_gcm_values_of_kubernetes_tests_open() {
    let Vector { key, etcd, stored, plain } = vector("upstream TestGCMLegacyDataCompatibility");
    assert_eq!(open::aesgcm(&stored, &key, &etcd).unwrap().as_slice(), plain);

    let Vector { key, etcd, stored, plain } =
        vector("upstream TestExtendedNonceGCMLegacyDataCompatibility");
    let object = V2Object {
        encrypted_data: stored,
        source_type: SourceType::HkdfSha256XnonceAesGcmSeed,
        ..v2_object(&vector(RECORDS[1].0).stored)
    };
    assert_eq!(open::kms_v2(&object, &key, &etcd).unwrap().as_slice(), plain);
}

#[test]
fn case_30_local_keys_of_every_size_open_their_values() {
    for bits in [128, 192, 256] {
        let Vector { key, etcd, stored, plain } = vector(&format!("aesgcm {bits}"));
        assert_eq!(open::aesgcm(&stored, &key, &etcd).unwrap().as_slice(), plain);
        let refused = open::aesgcm(&stored, &key, b"/registry/secrets/default/other").map(drop);
        assert_eq!(refused, Err(OpenError::NotAuthentic));

        let Vector { key, stored, plain, .. } = vector(&format!("aescbc {bits}"));
        assert_eq!(open::aescbc(&stored, &key).unwrap().as_slice(), plain);
    }
    let Vector { key, stored, plain, .. } = vector("secretbox");
    assert_eq!(open::secretbox(&stored, &key).unwrap().as_slice(), plain);
}

#[test]
fn case_30_a_kms_v1_value_opens_in_either_mode_under_a_name_with_colons() {
    for (name, mode) in [("kms v1 gcm", V1Mode::Gcm), ("kms v1 cbc", V1Mode::Cbc)] {
        let Vector { key, etcd, stored, plain } = vector(name);
        let stored = [b"k8s:enc:kms:v1:team:a:", stored.as_slice()].concat();
        let Ok(StoredValue::KmsV1 { provider: "team:a", body }) = classify(&stored) else {
            panic!("{:?}", classify(&stored));
        };
        let body = V1Body::decode(body).unwrap();
        assert_eq!(body.encrypted_dek, b"wrapped:dek");
        let (opened, by) = open::kms_v1(&body, &key, &etcd).unwrap();
        assert_eq!((opened.as_slice(), by), (plain.as_slice(), mode));
        let elsewhere = open::kms_v1(&body, &key, b"/registry/secrets/default/other");
        match mode {
            V1Mode::Gcm => assert_eq!(elsewhere.map(drop), Err(OpenError::NotAuthentic)),
            V1Mode::Cbc => assert_eq!(elsewhere.unwrap().0.as_slice(), plain, "CBC proves nothing"),
        }
        let wrong = open::kms_v1(&body, &[0; 32], &etcd).map(drop);
        assert_eq!(wrong, Err(OpenError::NotAuthentic));
    }
}

#[test]
fn case_30_a_value_cut_off_anywhere_gives_no_object() {
    let Vector { key, etcd, stored, .. } = vector("aesgcm 256");
    for len in 0..stored.len() {
        let refused = open::aesgcm(&stored[..len], &key, &etcd).map(drop).unwrap_err();
        let short = OpenError::TooShort { len, min: 28 };
        assert_eq!(refused, if len < 28 { short } else { OpenError::NotAuthentic });
    }
    let Vector { key, stored, .. } = vector("secretbox");
    for len in 0..stored.len() {
        assert!(open::secretbox(&stored[..len], &key).is_err(), "{len}");
    }
    let Vector { key, stored, .. } = vector("aescbc 256");
    for len in 0..stored.len() {
        assert!(open::aescbc(&stored[..len], &key).is_err(), "{len}");
    }
    let Vector { key, etcd, stored, .. } = vector("kms v1 gcm");
    for len in 0..stored.len() {
        let opened =
            V1Body::decode(&stored[..len]).ok().map(|body| open::kms_v1(&body, &key, &etcd));
        assert!(opened.is_none_or(|opened| opened.is_err()), "{len}");
    }
    let prefix = b"k8s:enc:kms:v2:kms-provider:".len();
    for (name, _) in RECORDS {
        let Vector { etcd, stored, .. } = vector(name);
        let complete = v2_object(&stored);
        let source = STANDARD.decode(&complete.encrypted_dek_source).unwrap();
        for len in 0..stored.len() - prefix {
            match V2Object::decode(&stored[prefix..prefix + len]) {
                Err(_) => {}
                // Only what comes after the data may be missing; the last field is the type of the source.
                Ok(cut) => assert!(
                    cut.encrypted_data == complete.encrypted_data
                        && (cut.source_type == complete.source_type
                            || open::kms_v2(&cut, &source, &etcd).is_err()),
                    "{name} {len}"
                ),
            }
        }
    }
}

#[test]
fn case_30_a_source_type_that_is_not_known_is_refused() {
    let Vector { stored, .. } = vector(RECORDS[1].0);
    let body = stored.strip_prefix(b"k8s:enc:kms:v2:kms-provider:").unwrap();
    assert_eq!(body.last(), Some(&1));
    let changed = [&body[..body.len() - 1], &[2]].concat();
    assert_eq!(V2Object::decode(&changed), Err(ObjectError::SourceType(2)));
}
