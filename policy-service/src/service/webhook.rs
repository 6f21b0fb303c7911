//! Alarms are sent to the organisation's webhook, signed as <https://www.standardwebhooks.com> says, until it takes them or a day
//! is over.

use super::access::{Permission, Principal};
use super::{Service, ServiceError, now_ms};
use crate::metrics::handles;
use crate::store::Mail;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hkdf::Hkdf;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use std::time::Duration;
use zeroize::Zeroizing;

/// How many alarms are taken in hand at a time.
const BATCH: u32 = 20;
const TIMEOUT: Duration = Duration::from_secs(10);
const FIRST_RETRY_MS: u64 = 1_000;
const LAST_RETRY_MS: u64 = 15 * 60_000;
/// An alarm that nobody took for so long is given up.
const GIVE_UP_MS: u64 = 24 * 3_600_000;

/// What is sent.
struct Message {
    url: String,
    id: String,
    timestamp: u64,
    signature: String,
    body: String,
}

impl Service {
    /// What an organisation's messages are signed with: `whsec_` and base64. The receiver needs it.
    pub fn webhook_secret(&self, who: &Principal) -> Result<Zeroizing<String>, ServiceError> {
        who.needs(Permission::WriteTokens)?;
        Ok(Zeroizing::new(format!("whsec_{}", STANDARD.encode(self.webhook_key(&who.organisation)))))
    }

    fn webhook_key(&self, organisation: &str) -> [u8; 32] {
        let mut key = [0; 32];
        // 32 bytes are far below HKDF's limit: this can't fail.
        let _ = Hkdf::<Sha256>::new(Some(b"keyward/webhook/v1"), &self.roots.webhook_master).expand(organisation.as_bytes(), &mut key);
        key
    }

    /// Sends what is due. Gives how many were taken.
    pub async fn send_alarms(&self) -> Result<usize, ServiceError> {
        let mut taken = 0;
        for mail in self.store.due_mail(now_ms(), BATCH).await? {
            let url = self.organisation(&mail.organisation).ok().and_then(|organisation| organisation.webhook());
            let Some(url) = url else {
                // Nobody wants to be told.
                self.store.sent_mail(mail.id, None).await?;
                continue;
            };
            let message = self.message(&mail, url);
            let sent = tokio::task::spawn_blocking(move || deliver(&message)).await.unwrap_or_else(|error| Err(error.to_string()));
            let now = now_ms();
            match sent {
                Ok(()) => {
                    taken += 1;
                    handles().alarms_sent.increment(1);
                    self.store.sent_mail(mail.id, None).await?;
                }
                Err(error) if now.saturating_sub(mail.time_ms) > GIVE_UP_MS => {
                    handles().alarms_lost.increment(1);
                    tracing::error!(
                        organisation = mail.organisation,
                        what = mail.what,
                        error,
                        "an alarm was given up: its webhook did not take it"
                    );
                    self.store.sent_mail(mail.id, None).await?;
                }
                Err(error) => {
                    tracing::warn!(organisation = mail.organisation, what = mail.what, error, "a webhook did not take an alarm");
                    let wait = FIRST_RETRY_MS.saturating_mul(1 << mail.tries.min(20)).min(LAST_RETRY_MS);
                    self.store.sent_mail(mail.id, Some(now.saturating_add(wait))).await?;
                }
            }
        }
        Ok(taken)
    }

    fn message(&self, mail: &Mail, url: String) -> Message {
        let id = format!("alarm_{}", mail.id);
        let data: serde_json::Value = serde_json::from_str(&mail.detail).unwrap_or_default();
        let body = serde_json::json!({
            "type": format!("keyward.{}", mail.what), "organisation": mail.organisation, "time_ms": mail.time_ms, "data": data,
        });
        let (body, timestamp) = (body.to_string(), now_ms() / 1_000);
        let signature = sign(&self.webhook_key(&mail.organisation), &id, timestamp, &body);
        Message { url, id, timestamp, signature, body }
    }
}

/// `v1,` and base64 of HMAC-SHA256 over `id.timestamp.body`.
fn sign(key: &[u8], id: &str, timestamp: u64, body: &str) -> String {
    // HMAC takes keys of any length: this can't fail.
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(key) else { return String::new() };
    mac.update(format!("{id}.{timestamp}.{body}").as_bytes());
    format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()))
}

fn deliver(message: &Message) -> Result<(), String> {
    // A redirect could lead anywhere: it is not followed, and is no success.
    let config = ureq::Agent::config_builder().timeout_global(Some(TIMEOUT)).max_redirects(0).build();
    let answer = ureq::Agent::new_with_config(config)
        .post(&message.url)
        .header("content-type", "application/json")
        .header("webhook-id", &message.id)
        .header("webhook-timestamp", message.timestamp.to_string())
        .header("webhook-signature", &message.signature)
        .send(&message.body);
    match answer {
        Ok(answer) if answer.status().is_success() => Ok(()),
        Ok(answer) => Err(format!("answered {}", answer.status())),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The specification's own example.
    #[test]
    fn messages_are_signed_as_the_specification_says() {
        let key = STANDARD.decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
        let signature = sign(&key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, r#"{"test": 2432232314}"#);
        assert_eq!(signature, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }
}
