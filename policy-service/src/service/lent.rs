//! Credentials that are lent to a running service, from a vault string: in memory until it stops, stored nowhere.

use super::{Loaded, ORGANISATION, Service, ServiceError, now_ms};
use crate::config;
use crate::directory::{Directory, shared_account};
use hmac::{Hmac, KeyInit, Mac};
use keyward_core::hex;
use sha2::Sha256;
use std::collections::HashMap;
use std::sync::Arc;
use zeroize::Zeroizing;

/// What is lent.
pub struct Loan {
    pub provider: String,
    /// With the provider, what tells it from others.
    pub label: String,
    /// Provider account whose limits it shares; `None`: its own.
    pub account: Option<String>,
    pub secret: Zeroizing<String>,
}

/// A loan that the service uses.
#[derive(Clone)]
pub struct Lent {
    /// The same at every start of this installation, so that ledger and audit go on naming it so.
    pub id: String,
    pub provider: String,
    pub account: String,
    pub label: String,
    pub since_ms: u64,
    secret: Zeroizing<String>,
}

impl Service {
    /// Uses these credentials after the stored ones, in place of those lent before. All or none: an error names the loan
    /// that can't be used, and nothing changes.
    pub async fn lend_credentials(&self, loans: Vec<Loan>) -> Result<(), ServiceError> {
        let since_ms = now_ms();
        let mut lent: Vec<Lent> = Vec::with_capacity(loans.len());
        for Loan { provider, label, account, secret } in loans {
            self.check(&provider, &secret)?;
            let id = self.lent_id(&provider, &label);
            if lent.iter().any(|other| other.id == id) {
                return Err(ServiceError::Conflict(format!("{provider} {label:?} is lent twice")));
            }
            let account = account.unwrap_or_else(|| id.clone());
            lent.push(Lent { id, provider, account, label, since_ms, secret });
        }
        if let Ok(mut slot) = self.lent.write() {
            *slot = lent;
        }
        self.reload().await
    }

    /// What is lent, for lists.
    pub fn lent(&self) -> Vec<Lent> {
        self.lent.read().map(|lent| lent.clone()).unwrap_or_default()
    }

    /// Adds what is lent, after what is stored.
    pub(super) fn add_lent(&self, directory: &mut Directory, secrets: &mut HashMap<String, Loaded>) {
        let Some(organisation) = directory.organisations.get_mut(ORGANISATION).map(Arc::make_mut) else { return };
        for Lent { id, provider, account, secret, .. } in self.lent() {
            let account = (account != id).then(|| shared_account(ORGANISATION, &provider, &account));
            organisation.accounts.extend(account.clone().map(|account| (id.clone(), account)));
            organisation.lent.push((id.clone(), provider));
            secrets.insert(id, Loaded { secret, account });
        }
    }

    /// What is lent can't be taken away here: it would be back at the next start.
    pub fn not_lent(&self, id: &str) -> Result<(), ServiceError> {
        match self.lent().iter().find(|lent| lent.id == id) {
            None => Ok(()),
            Some(lent) => Err(ServiceError::Conflict(format!(
                "{id} comes from a vault string: remove {} {:?} from the string (keyward vault remove-key) and start again",
                lent.provider, lent.label
            ))),
        }
    }

    /// What every credential must be.
    fn check(&self, provider: &str, secret: &str) -> Result<(), ServiceError> {
        let invalid = |field: &str, message: String| ServiceError::Invalid(field.to_owned(), message);
        let organisation = self.organisation(ORGANISATION)?;
        if !organisation.document.knows_provider(provider) {
            return Err(invalid("provider", organisation.document.unknown_provider(provider)));
        }
        config::check_secret(secret).map_err(|message| invalid("secret", message))
    }

    /// Tells nothing about the secret, and is not the same in another installation.
    fn lent_id(&self, provider: &str, label: &str) -> String {
        // HMAC takes keys of any length: this can't fail.
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(&self.roots.pepper) else { return String::new() };
        mac.update(provider.as_bytes());
        mac.update(&[0]);
        mac.update(label.as_bytes());
        let digits = hex::encode(&mac.finalize().into_bytes());
        format!("cred_{}", digits.get(..16).unwrap_or(&digits))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Kind;
    use crate::service::bed::{credential, started, who};
    use crate::store::Expect;

    const LENT: &str = "sk-proj-Lent4Qw8Zx2Vb6Nm1Kj9Hg5Fd3Sa7Po";
    const STORED: &str = "sk-proj-Stored3Er6Ty9Ui2Op5As8Df1Gh4Jk7";

    fn loan(provider: &str, label: &str, secret: &str) -> Loan {
        Loan { provider: provider.to_owned(), label: label.to_owned(), account: None, secret: Zeroizing::new(secret.to_owned()) }
    }

    /// Providers and secrets that a request would be given, in order.
    fn used(service: &Service) -> Vec<(String, String)> {
        let memory = service.memory();
        let organisation = &memory.directory.organisations[ORGANISATION];
        let of = |provider: &str| organisation.credentials(provider, None, None).unwrap_or_default();
        let pairs = |provider: &str| -> Vec<_> {
            of(provider).iter().map(|id| (provider.to_owned(), memory.secrets[id].secret.to_string())).collect()
        };
        [pairs("anthropic"), pairs("openai")].concat()
    }

    async fn store(service: &Service, secret: &str) -> String {
        service.put_credential(&who(), Some("main"), &credential(secret), Expect::Absent).await.unwrap().0
    }

    #[tokio::test]
    async fn lent_credentials_are_used_and_not_stored() {
        let data = tempfile::tempdir().unwrap();
        let running = started(data.path()).await;
        running.service.lend_credentials(vec![loan("openai", "main", LENT)]).await.unwrap();
        // A later change of what is stored loads everything anew: what is lent stays, and comes last.
        let stored = store(&running.service, STORED).await;
        let both = vec![("openai".to_owned(), STORED.to_owned()), ("openai".to_owned(), LENT.to_owned())];
        assert_eq!(used(&running.service), both);
        let id = running.service.lent()[0].id.clone();
        assert_eq!((id.len(), running.service.lent()[0].account == id), ("cred_".len() + 16, true));

        let refused = running.service.not_lent(&id);
        assert!(matches!(refused, Err(ServiceError::Conflict(text)) if text.contains("vault string") && !text.contains(LENT)));
        running.service.delete_object(&who(), Kind::Credential, &stored, Expect::Anything).await.unwrap();
        assert_eq!(used(&running.service), [("openai".to_owned(), LENT.to_owned())]);
        assert!(running.service.organisation(ORGANISATION).unwrap().document.credentials.is_empty());
        running.stop().await;

        // The next start knows nothing of it until it is lent again, then under the same id.
        let running = started(data.path()).await;
        assert_eq!(used(&running.service), []);
        running.service.lend_credentials(vec![loan("anthropic", "main", LENT), loan("openai", "main", STORED)]).await.unwrap();
        let ids: Vec<String> = running.service.lent().into_iter().map(|lent| lent.id).collect();
        assert_eq!((ids[1] == id, ids[0] == id), (true, false), "provider and label make the id, not the secret");
        running.stop().await;
        let other = tempfile::tempdir().unwrap();
        let running = started(other.path()).await;
        running.service.lend_credentials(vec![loan("openai", "main", LENT)]).await.unwrap();
        assert_ne!(running.service.lent()[0].id, id, "another installation, another id");
        running.stop().await;
    }

    #[tokio::test]
    async fn a_loan_that_can_t_be_used_changes_nothing() {
        let data = tempfile::tempdir().unwrap();
        let running = started(data.path()).await;
        running.service.lend_credentials(vec![loan("openai", "main", LENT)]).await.unwrap();
        for second in [loan("nobody", "x", LENT), loan("openai", "x", ""), loan("openai", "x", "two words"), loan("openai", "main", STORED)]
        {
            assert!(running.service.lend_credentials(vec![loan("openai", "main", STORED), second]).await.is_err());
            assert_eq!(used(&running.service), [("openai".to_owned(), LENT.to_owned())]);
        }
        running.stop().await;
    }
}
