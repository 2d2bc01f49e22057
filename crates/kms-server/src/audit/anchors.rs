//! Anchors: the HSM signs how far the chain goes, at the start, once in a while as long as records come, when a file is
//! begun, and at the end.
//!
//! Nobody waits for them. A record is durable without; an anchor that comes late leaves the records since the last one
//! without proof until the HSM is back, and that is what the log and the metrics say.

use super::AuditError;
use super::node::beside;
use crate::app::App;
use crate::store::{SigningKey, StoreError};
use crate::token::random_uuid;
use kms_core::audit::anchor::{Anchor, KeyError, PublicKey, Statement};
use kms_core::audit::verify::MAX_ANCHOR_DELAY;
use kms_core::audit::{Content, Link, NotARecord};
use kms_daemon::lifecycle::Shutdown;
use kms_hsm::VaultError;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

/// As long as records come. The bound that is promised is a minute: this leaves room for a slow HSM.
const INTERVAL: Duration = Duration::from_secs(30);
/// After a failure.
const RETRY: Duration = Duration::from_secs(1);
/// While the database does not keep the key that was made, it is twice as long after each failure, and no longer than this.
const LONGEST_RETRY: Duration = Duration::from_secs(16);
/// So many failures in a row are told: at a start the HSM is not there at once.
const TOLD: u32 = 5;
/// How often it is signed anew because too many records came meanwhile.
const ATTEMPTS: usize = 3;

/// Writes anchors, and keeps outside of the log what it takes to see that its end is gone.
#[derive(Debug)]
pub struct Anchors<'a> {
    app: &'a App,
    key: Option<SigningKey>,
    /// The key pair that was begun, so that no attempt makes another one.
    begun: Option<Uuid>,
    /// The line of the last anchor: while it is the last of all, there is nothing to prove.
    last: Option<Link>,
    failures: u32,
}

/// Why there is no anchor now.
#[derive(Debug, thiserror::Error)]
enum Late {
    #[error("HSM: {0}")]
    Vault(#[from] VaultError),
    #[error("the HSM's key cannot be used: {0}")]
    Key(#[from] KeyError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Audit(#[from] AuditError),
    #[error("{}: {cause}", path.display())]
    File { path: PathBuf, cause: io::Error },
    #[error("the time cannot be written: {0}")]
    Time(#[from] time::error::Format),
    #[error(transparent)]
    Encode(#[from] NotARecord),
    #[error("more records come than the HSM signs for")]
    TooSlow,
    #[error(
        "another server on this database has the name {node:?}, too, and writes a chain of its own under it: give each \
         server its own NODE_ID, and move the audit log of the one that is renamed away"
    )]
    SharedName { node: String },
}

impl<'a> Anchors<'a> {
    #[must_use]
    pub fn new(app: &'a App) -> Anchors<'a> {
        Anchors { app, key: None, begun: None, last: None, failures: 0 }
    }

    /// Writes anchors until the shutdown is requested.
    pub async fn keep(&mut self, shutdown: &Shutdown) {
        loop {
            self.anchor().await;
            let pause = self.pause();
            tokio::select! {
                () = shutdown.requested() => return,
                () = self.app.audit.sink.begun() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    fn pause(&self) -> Duration {
        match (self.failures, self.begun) {
            (0, _) => INTERVAL,
            (_, None) => RETRY,
            // Each attempt asks the HSM for the key once more.
            (more, Some(_)) => {
                RETRY.saturating_mul(1 << more.saturating_sub(1).min(10)).min(LONGEST_RETRY)
            }
        }
    }

    /// Writes one anchor, if there is anything since the last.
    pub async fn anchor(&mut self) {
        let head = self.app.audit.head();
        if head.seq == 0 || self.last == Some(head) {
            return;
        }
        let written = self.try_anchor().await;
        self.app.metrics.anchored(written.is_ok(), self.app.clock.wall());
        match &written {
            Err(late) if self.failures + 1 == TOLD => tracing::error!(
                "No anchor can be written, so nothing but the chain protects the audit records since the last one: {late}"
            ),
            Ok(()) if self.failures >= TOLD => {
                tracing::info!("Anchors are written to the audit log again.")
            }
            _ => {}
        }
        self.failures = if written.is_err() { self.failures.saturating_add(1) } else { 0 };
    }

    async fn try_anchor(&mut self) -> Result<(), Late> {
        let key = match &self.key {
            Some(key) => key.clone(),
            None => self.find_key().await?,
        };
        self.be_alone().await?;
        let anchor = self.sign(&key).await?;
        let link = self.app.audit.anchor(anchor.clone()).await?;
        self.last = Some(link);
        let node = self.app.audit.sink.node();
        self.app.audit.told(|told| told.tried = Some(link));
        self.app.store.keep_audit_head(node, link).await?;
        self.app.audit.told(|told| told.kept = Some(link));
        self.write_beside("anchor", standing_alone(&anchor)?).await
    }

    /// Two chains of one name would each look like the other's forgery: nothing is signed on top of that.
    async fn be_alone(&self) -> Result<(), Late> {
        let node = self.app.audit.sink.node();
        // Without the database nobody can say; the anchor does not wait for it.
        let Ok(Some(there)) = self.app.store.audit_head(node).await else { return Ok(()) };
        if self.app.audit.told(|told| told.may_be(there)) {
            return Ok(());
        }
        Err(Late::SharedName { node: node.to_owned() })
    }

    async fn sign(&self, key: &SigningKey) -> Result<Anchor<'static>, Late> {
        let audit = &self.app.audit;
        for _ in 0..ATTEMPTS {
            let head = audit.head();
            let at = self.app.now().format(&Rfc3339)?;
            let statement = Statement { node: audit.sink.node(), at: &at, head, key: key.id };
            let signature = self.app.vault.sign(key.id, &statement.signed_bytes()).await?;
            let behind = usize::try_from(audit.head().seq - head.seq).unwrap_or(usize::MAX);
            // As many again may come before the anchor is written.
            if behind < MAX_ANCHOR_DELAY / 2 {
                return Ok(Anchor::new(&statement, signature).into_owned());
            }
        }
        Err(Late::TooSlow)
    }

    /// The key that all servers on this database use; made where there is none. Its public half goes beside the log.
    async fn find_key(&mut self) -> Result<SigningKey, Late> {
        let app = self.app;
        let key = match app.store.audit_key().await? {
            Some(key) => key,
            None => {
                let made = self.make_key().await?;
                app.store.keep_audit_key(&made).await?
            }
        };
        self.begun = None;
        let public = PublicKey::from_parts(&key.public.n, &key.public.e)?;
        self.write_beside("pem", public.pem().into_bytes()).await?;
        self.key = Some(key.clone());
        Ok(key)
    }

    /// Under one id until the database keeps it: what an attempt has made, the next one finds.
    async fn make_key(&mut self) -> Result<SigningKey, Late> {
        let app = self.app;
        let id = match self.begun {
            Some(id) => id,
            None => random_uuid(&*app.vault).await?,
        };
        self.begun = Some(id);
        let made = app.vault.make_signing_key(id).await;
        if made == Err(VaultError::Exists) {
            // Half a pair, of a crash in the middle of it. No database names it.
            self.begun = None;
        }
        Ok(SigningKey { id, public: made?, created_at: app.now() })
    }

    /// Whole or not at all: somebody else may read it at any time.
    async fn write_beside(&self, extension: &str, bytes: Vec<u8>) -> Result<(), Late> {
        let audit_file = self.app.audit.sink.path();
        let path = beside(audit_file, extension);
        let unfinished = beside(audit_file, &format!("{extension}.new"));
        let to = path.clone();
        let written = tokio::task::spawn_blocking(move || replace(&unfinished, &to, &bytes)).await;
        let written = written.unwrap_or_else(|panicked| Err(io::Error::other(panicked)));
        written.map_err(|cause| Late::File { path, cause })
    }
}

/// As the line that would follow at once on what it covers: whoever keeps it can check it without the log.
fn standing_alone(anchor: &Anchor<'_>) -> Result<Vec<u8>, Late> {
    let (line, _) = anchor.head().extend(&Content::Anchor(anchor.clone()))?;
    Ok(line)
}

fn replace(unfinished: &Path, path: &Path, bytes: &[u8]) -> io::Result<()> {
    std::fs::write(unfinished, bytes)?;
    std::fs::rename(unfinished, path)
}
