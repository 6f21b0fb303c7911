//! What the body of an error says, read as far as it came.

use super::time::{duration, rfc3339, wait};
use crate::json::{JsonError, Scalar, Scanner, Span, Visitor};

/// Bytes that are read.
const MAX_BODY: usize = 64 << 10;
/// Bytes of a message that are read: Gemini's names the time only after a line for each quota.
const MAX_MESSAGE: usize = 2048;
const MAX_CODE: usize = 128;

/// What a code or a message tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hint {
    /// The account's quota or money is used up.
    Exhausted,
    /// The same in words that stand anywhere in a message; a 429 can't be made to repeat them.
    NoCredit,
    /// The key's own cap is used up.
    KeySpent,
    /// It is the key's cap that could be raised.
    RaiseKey,
    /// A quota that comes back once a day.
    PerDay,
    Overloaded,
    /// There is no such key, or no longer.
    BadKey,
    /// The key or its project may not do this.
    Denied,
    /// The key was made for other endpoints.
    LacksScope,
    /// It is about what was asked, or from where: every key would have got the same answer.
    Request,
}

/// Codes, types, statuses and reasons, compared without case.
const CODES: [(&str, Hint); 36] = [
    // OpenAI, and others in its form.
    ("insufficient_quota", Hint::Exhausted),
    ("billing_hard_limit_reached", Hint::Exhausted),
    ("billing_not_active", Hint::Exhausted),
    ("exceeded_current_quota_error", Hint::Exhausted),
    ("insufficient_balance", Hint::Exhausted),
    ("insufficient_credits", Hint::Exhausted),
    ("invalid_api_key", Hint::Denied),
    ("account_deactivated", Hint::Denied),
    ("organization_deactivated", Hint::Denied),
    ("organization_restricted", Hint::Denied),
    ("access_terminated", Hint::Denied),
    ("insufficient_permissions", Hint::Denied),
    ("missing_scope", Hint::LacksScope),
    ("model_not_found", Hint::Request),
    ("content_policy_violation", Hint::Request),
    ("content_filter", Hint::Request),
    ("moderation_blocked", Hint::Request),
    ("unsupported_country_region_territory", Hint::Request),
    ("engine_overloaded", Hint::Overloaded),
    ("engine_overloaded_error", Hint::Overloaded),
    // Anthropic.
    ("billing_error", Hint::Exhausted),
    ("permission_error", Hint::Denied),
    ("authentication_error", Hint::Denied),
    ("overloaded_error", Hint::Overloaded),
    // Google.
    ("permission_denied", Hint::Denied),
    ("unauthenticated", Hint::Denied),
    ("billing_disabled", Hint::Exhausted),
    ("api_key_invalid", Hint::BadKey),
    ("api_key_service_blocked", Hint::Denied),
    ("consumer_suspended", Hint::Denied),
    ("consumer_invalid", Hint::Denied),
    // Azure.
    ("permissiondenied", Hint::Denied),
    ("authorizationfailed", Hint::Denied),
    ("authenticationtypedisabled", Hint::Denied),
    // Resend.
    ("daily_quota_exceeded", Hint::Exhausted),
    ("monthly_quota_exceeded", Hint::Exhausted),
];

/// How messages begin that have no telling code. Only the beginning is the provider's for sure: what follows may be the caller's.
/// "You exceeded your current quota" isn't among them: Gemini says it also of a minute's.
const BEGINNINGS: [(&str, Hint); 11] = [
    ("your credit balance is too low", Hint::Exhausted),
    ("you have reached your specified api usage limits", Hint::Exhausted),
    ("you have reached your specified workspace api usage limits", Hint::Exhausted),
    ("insufficient balance", Hint::Exhausted),
    ("key limit exceeded", Hint::KeySpent),
    ("this organization has been disabled", Hint::BadKey),
    ("you have insufficient permissions for this operation", Hint::LacksScope),
    ("access denied due to", Hint::Denied),
    // A file or cache of another account, or of none, asked for with a good key.
    ("you do not have permission to access the file", Hint::Request),
    ("cachedcontent not found", Hint::Request),
    // A 429 of OpenAI's that no waiting helps: the one request is above the limit of a whole minute.
    ("request too large for", Hint::Request),
];

const ANYWHERE: [(&str, Hint); 3] = [
    ("used all available credits", Hint::NoCredit),
    ("credit balance is too low", Hint::NoCredit),
    ("create a key with a higher", Hint::RaiseKey),
];

/// What stands before a time in a message.
const BEFORE_WAIT: [&str; 3] = ["try again in ", "retry in ", "retry after "];
const BEFORE_DATE: &str = "regain access on ";

/// What a body said.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Says {
    /// A code or a message was there at all.
    pub anything: bool,
    /// The error had a type: it is of a form in which messages don't begin with the caller's words.
    pub typed: bool,
    codes: u16,
    words: u16,
    /// Longest wait that a field or a date names, in milliseconds.
    pub wait_ms: Option<u64>,
    /// Wait that a message names in passing.
    pub prose_ms: Option<u64>,
}

impl Says {
    pub fn has(&self, hint: Hint) -> bool {
        (self.codes | self.words) & bit(hint) != 0
    }

    /// Leaves only what codes told.
    pub fn forget_words(&mut self) {
        self.words = 0;
    }

    fn code(&mut self, code: &[u8]) {
        let known = CODES.iter().filter(|(known, _)| known.as_bytes().eq_ignore_ascii_case(code));
        known.for_each(|(_, hint)| self.codes |= bit(*hint));
    }

    fn message(&mut self, text: &[u8], now_ms: u64) {
        let text = String::from_utf8_lossy(text).to_ascii_lowercase();
        let begins = BEGINNINGS.iter().filter(|(known, _)| text.starts_with(known));
        let has = ANYWHERE.iter().filter(|(known, _)| text.contains(known));
        begins.chain(has).for_each(|(_, hint)| self.words |= bit(*hint));
        // The last one: a name that the caller gave can only stand before it.
        let named = BEFORE_WAIT.iter().flat_map(|words| text.match_indices(words)).filter_map(|(at, words)| {
            let (wait_ms, _) = duration(text.as_bytes().get(at + words.len()..)?)?;
            Some((at, wait_ms))
        });
        self.prose_ms = named.max().map(|(_, wait_ms)| wait_ms).or(self.prose_ms);
        if self.has(Hint::Exhausted)
            && let Some((_, date)) = text.split_once(BEFORE_DATE)
        {
            self.wait_ms = self.wait_ms.max(return_date(date).and_then(|at| at.checked_sub(now_ms)));
        }
    }
}

fn bit(hint: Hint) -> u16 {
    1 << hint as u16
}

/// Unix milliseconds of "2026-12-01 at 00:00 UTC", the hour perhaps missing, or of an RFC 3339 time.
fn return_date(text: &str) -> Option<u64> {
    let whole = text.split_ascii_whitespace().next()?;
    let date = text.get(..10)?;
    let clock = text.get(10..).and_then(|rest| rest.strip_prefix(" at ")).and_then(|rest| rest.get(..5)).unwrap_or("00:00");
    rfc3339(whole).or_else(|| rfc3339(&format!("{date}T{clock}:00Z")))
}

/// Reads a body, whole or cut, of any kind.
pub fn read(body: &[u8], now_ms: u64) -> Says {
    let mut reader = Reader { says: Says::default(), places: Vec::new(), slot: Slot::Other, now_ms };
    // What was understood before an end or an error counts.
    let _ = Scanner::default().feed(body.get(..MAX_BODY).unwrap_or(body), &mut reader);
    reader.says
}

/// Where in the document the reader is. What isn't named here may be an echo of the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Outside, or in an array that wraps the document, as Gemini's stream has it.
    Outside,
    Document,
    /// `error`.
    Error,
    /// `error.details`, Google's, and one of them.
    Details,
    Detail,
    DetailMetadata,
    Violations,
    Violation,
    /// `error.metadata`, OpenRouter's, and the headers it repeats there.
    Metadata,
    Headers,
    Other,
}

/// What the next value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    Code,
    /// The code that is the error's type.
    Type,
    Message,
    Wait,
    Quota,
    /// An object or array of its own; `error` may also be just a message.
    Place(Place),
    Other,
}

struct Reader {
    says: Says,
    places: Vec<Place>,
    slot: Slot,
    now_ms: u64,
}

impl Reader {
    fn place(&self) -> Place {
        self.places.last().copied().unwrap_or(Place::Outside)
    }
}

impl Visitor for Reader {
    type Error = JsonError;

    fn open(&mut self, object: bool, _: u64) -> Result<(), JsonError> {
        let place = match (self.place(), self.slot, object) {
            (Place::Outside, _, true) => Place::Document,
            (Place::Outside, _, false) => Place::Outside,
            (Place::Details, _, true) => Place::Detail,
            (Place::Violations, _, true) => Place::Violation,
            (_, Slot::Place(place), _) if object != matches!(place, Place::Details | Place::Violations) => place,
            _ => Place::Other,
        };
        self.places.push(place);
        self.slot = Slot::Other;
        Ok(())
    }

    fn close(&mut self, _: u64) -> Result<(), JsonError> {
        self.places.pop();
        self.slot = Slot::Other;
        Ok(())
    }

    fn key(&mut self, key: Option<&[u8]>) -> Result<(), JsonError> {
        self.slot = match (self.place(), key) {
            (Place::Other | Place::Outside, _) | (_, None) => Slot::Other,
            (place, Some(key)) => slot(place, &key.to_ascii_lowercase()),
        };
        Ok(())
    }

    fn wants(&self) -> usize {
        match self.slot {
            Slot::Message | Slot::Place(Place::Error) => MAX_MESSAGE,
            Slot::Code | Slot::Type | Slot::Wait | Slot::Quota => MAX_CODE,
            Slot::Place(_) | Slot::Other => 0,
        }
    }

    fn scalar(&mut self, value: Scalar<'_>, _: Span) -> Result<(), JsonError> {
        let says = &mut self.says;
        let speaks = matches!(self.slot, Slot::Code | Slot::Type | Slot::Message | Slot::Place(Place::Error));
        says.anything |= speaks && value != Scalar::Null;
        says.typed |= self.slot == Slot::Type && matches!(value, Scalar::Str { .. });
        match (self.slot, value) {
            (Slot::Code | Slot::Type, Scalar::Str { text, len }) if len == text.len() as u64 => says.code(text),
            (Slot::Message | Slot::Place(Place::Error), Scalar::Str { text, .. }) => says.message(text, self.now_ms),
            (Slot::Quota, Scalar::Str { text, .. }) if text.windows(6).any(|part| part == b"PerDay") => says.codes |= bit(Hint::PerDay),
            (Slot::Wait, Scalar::Str { text, .. } | Scalar::Num(text)) => says.wait_ms = says.wait_ms.max(wait(text, self.now_ms)),
            _ => {}
        }
        Ok(())
    }
}

/// What a key in lower case leads to.
fn slot(place: Place, key: &[u8]) -> Slot {
    match (place, key) {
        (Place::Document | Place::Error, b"error") => Slot::Place(Place::Error),
        (Place::Error, b"type") => Slot::Type,
        (Place::Document | Place::Error, b"code" | b"type" | b"status" | b"name") | (Place::Detail, b"reason") => Slot::Code,
        (Place::Document | Place::Error, b"message" | b"detail") => Slot::Message,
        (Place::Error, b"details") => Slot::Place(Place::Details),
        (Place::Error, b"metadata") => Slot::Place(Place::Metadata),
        (Place::Detail, b"violations") => Slot::Place(Place::Violations),
        (Place::Detail, b"metadata") => Slot::Place(Place::DetailMetadata),
        (Place::Metadata, b"headers") => Slot::Place(Place::Headers),
        (Place::Violation, b"quotaid") | (Place::DetailMetadata, b"quota_limit") => Slot::Quota,
        (Place::Detail, b"retrydelay")
        | (Place::Document | Place::Error, b"retry_after")
        | (Place::Metadata, b"retry_after_seconds" | b"retry_after_seconds_raw")
        | (Place::Headers, b"x-ratelimit-reset" | b"retry-after") => Slot::Wait,
        _ => Slot::Other,
    }
}
