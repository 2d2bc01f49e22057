//! Values as they lie in a running etcd, page by page, in the order of their keys.

use kms_api::etcd::{Etcd, EtcdError, EtcdSettings, KeyValue};

use crate::error::Error;

/// Keys in the first request. Pages that turn out too long are asked for again in smaller ones.
const PAGE: i64 = 256;

/// Connects to the first endpoint that answers.
pub(crate) async fn connect(candidates: Vec<EtcdSettings>) -> Result<Etcd, Error> {
    let mut failure = Error::Missing { what: "etcd", option: "--etcd-endpoints URL" };
    for settings in candidates {
        match Etcd::connect(&settings).await {
            Ok(etcd) => return Ok(etcd),
            Err(EtcdError::Unreachable { endpoint, cause }) => {
                failure = EtcdError::Unreachable { endpoint, cause }.into();
            }
            Err(error) => return Err(error.into()),
        }
    }
    Err(failure)
}

/// Gives `visit` every key under `prefix` once, and how many are left, this page included. A key that is written
/// meanwhile is seen as it was before or as it is after.
pub(crate) async fn each_page(
    etcd: &mut Etcd,
    prefix: &str,
    mut visit: impl FnMut(&[KeyValue], u64),
) -> Result<(), Error> {
    let (mut from, end, mut limit) = (prefix.as_bytes().to_vec(), end_of(prefix), PAGE);
    loop {
        let page = match etcd.range(&from, &end, limit).await {
            Err(EtcdError::TooLong { .. }) if limit > 1 => {
                limit /= 2;
                continue;
            }
            page => page?,
        };
        visit(&page.kvs, u64::try_from(page.count).unwrap_or_default());
        match page.kvs.last() {
            Some(last) if page.more && last.key >= from => {
                from.clone_from(&last.key);
                from.push(0);
            }
            Some(_) | None if page.more => {
                let cause = "it says there is more, but not what".to_owned();
                return Err(Error::Input { what: "etcd's answer".to_owned(), cause });
            }
            _ => return Ok(()),
        }
    }
}

/// The first key behind all that begin with `prefix`, which ends in '/'.
pub(crate) fn end_of(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}
