//! The answer on its way to the caller: what its headers say, what of it passes, when it must end, and its record.

use super::translating::Translating;
use super::{Refused, ended};
use crate::attempt::{Clocks, Flight};
use crate::edge::{Outcome, RequestId, Settlement};
use crate::meter::{Measured, Meter, Passed};
use crate::operation::{Dialect, Form};
use crate::refusal::{Code, Headroom, Refusal};
use crate::usage::Looks;
use crate::watch;

/// Stage 5: forwarded; the answer is awaited or passing.
#[derive(Debug)]
pub struct Answering {
    pub(super) dialect: Dialect,
    pub(super) id: RequestId,
    pub(super) clamp: Option<u64>,
    pub(super) headroom: Option<Headroom>,
    /// The chunk with usage, of a stream in the caller's dialect, is there only because the gate asked for it.
    pub(super) adds_usage: bool,
    pub(super) stream: bool,
    pub(super) looks: Looks,
    /// What passes as text is what is paid.
    pub(super) is_text: bool,
    /// What the caller's body is.
    pub(super) form: Option<Form>,
    /// The events are those of the Responses API.
    pub(super) is_response: bool,
    /// The object that is gone if the provider says yes.
    pub(super) deletes: Option<String>,
    /// Output tokens that money is held for.
    pub(super) output_limit: Option<u64>,
    /// More passed than that.
    pub(super) beyond: bool,
    pub(super) meter: Option<Meter>,
    /// The provider speaks another dialect.
    pub(super) translating: Option<Translating>,
    pub(super) complete: bool,
    pub(super) breaking: Option<Breaking>,
}

/// An answer that must end before its end.
#[derive(Debug)]
pub(super) struct Breaking {
    code: Code,
    /// The event that tells the caller, until it has been put into the stream.
    words: Option<Vec<u8>>,
}

/// What to do with an answer's headers.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct HeaderEdits {
    pub remove: Vec<&'static str>,
    pub set: Vec<(&'static str, String)>,
    /// They wait until the body has come whole: [`Answering::whole`] then gives status and body.
    pub wait: bool,
}

impl Answering {
    /// The answer's headers have come, of which the flight's last try saw those of the provider. `unix_ms`: now.
    pub fn headers(&mut self, flight: &mut Flight, unix_ms: u64) -> Result<HeaderEdits, Refused> {
        let head = flight.hand_over();
        if let Some(refused) = flight.refused() {
            return Err(refused);
        }
        // Without a head, Envoy made the answer up.
        let terms = head.as_ref().and_then(|head| flight.translation(head.target, unix_ms));
        let head = head.unwrap_or_default();
        let tells = terms.as_ref().and_then(|_| flight.permit().aim(head.target)).map_or(self.looks.tells, |aim| aim.upstream.tells);
        let withhold = self.adds_usage && terms.is_none();
        let meter = Meter::new(&head.content_type, head.encoded, withhold, Looks { tells, ..self.looks });
        let mut edits = HeaderEdits { remove: Vec::new(), set: vec![("x-keyward-request-id", self.id.to_string())], wait: false };
        let targets = &flight.permit().plan().targets;
        if let Some(target) = targets.get(head.target).filter(|_| terms.is_some() || (targets.len() > 1 && head.tries > 0)) {
            let model = target.model.as_deref().unwrap_or_default();
            edits.set.push(("x-keyward-served-by", format!("{}/{model}", target.provider)));
        }
        if head.tries > 0 {
            edits.set.push(("x-keyward-attempts", head.tries.to_string()));
        }
        if meter.rewrites() || terms.is_some() {
            edits.remove.push("content-length");
        }
        if let Some(terms) = terms {
            let translating = Translating::new(terms, head.status, meter.has_events(), self.form);
            if translating.is_whole() {
                edits.wait = true;
                edits.set.push(("content-type", "application/json".to_owned()));
            }
            self.translating = Some(translating);
        }
        if let Some(clamp) = self.clamp {
            edits.set.push(("x-keyward-max-tokens", clamp.to_string()));
        }
        // Over the provider's own, which are of an account that many keys share.
        edits.set.extend(self.headroom.iter().flat_map(Headroom::headers));
        self.meter = Some(meter);
        Ok(edits)
    }

    /// A piece of the answer's body. At most `room` bytes may be held back after it.
    pub fn piece(&mut self, piece: &[u8], end: bool, room: usize) -> Passed {
        self.complete |= end;
        let Some(meter) = &mut self.meter else { return Passed::AsIs };
        if let Some(breaking) = &mut self.breaking {
            if let Some(translating) = &self.translating {
                // What is written is whole events, so the words may stand here; what comes is read all the same.
                meter.piece(piece, end, 0);
                let words = if translating.is_whole() { None } else { breaking.words.take() };
                return Passed::Instead(words.unwrap_or_default());
            }
            return meter.last_piece(piece, &mut breaking.words);
        }
        let mut passed = meter.piece(piece, end, room);
        if let Some(translating) = &mut self.translating {
            passed = Passed::Instead(translating.piece(piece, end, room));
        }
        if !end && self.output_limit.is_some_and(|limit| meter.exceeds(limit)) {
            self.beyond = true;
            self.break_off(Code::CapExhausted);
        }
        passed
    }

    /// The answer is to end here: what passes next of a stream is an error event in the caller's dialect, between two events,
    /// and nothing after it. The first reason stays.
    pub fn break_off(&mut self, code: Code) {
        if self.breaking.is_none() {
            let words = error_event(code, self.dialect, self.is_response, self.id);
            self.breaking = Some(Breaking { code, words: Some(words) });
        }
    }

    /// Why the answer is to end here.
    pub fn breaks_off(&self) -> Option<Code> {
        self.breaking.as_ref().map(|breaking| breaking.code)
    }

    /// The caller has been told; the stream has only to be cut.
    pub fn has_said_so(&self) -> bool {
        self.breaking.as_ref().is_some_and(|breaking| breaking.words.is_none())
    }

    /// The answer is a stream of events, into which words of ours can be put.
    pub fn has_events(&self) -> bool {
        self.meter.as_ref().is_some_and(Meter::has_events)
    }

    /// Bytes of the answer that are held back now.
    pub fn held(&self) -> usize {
        self.meter.as_ref().map_or(0, Meter::held) + self.translating.as_ref().map_or(0, Translating::held)
    }

    /// Status and body of an answer that has waited and come whole.
    pub fn whole(&mut self) -> Result<(u16, String), Refused> {
        let translated = self.translating.as_mut().map(Translating::whole);
        let refused = |refusal| Refused { refusal, dialect: self.dialect, request_id: self.id, asked: true };
        translated.unwrap_or_else(|| Ok((502, String::new()))).map_err(refused)
    }

    /// The admitted request could not be put together: nothing was forwarded.
    pub fn failed(&self) -> Refused {
        let refusal = Refusal::new(Code::PolicyUnavailable, "the request could not be forwarded; nothing left").retry_after(1);
        Refused { refusal, dialect: self.dialect, request_id: self.id, asked: true }
    }

    /// The answer ended without a last piece: by its headers, or by trailers.
    pub fn ended(&mut self) {
        self.complete = true;
    }

    /// The request is over, however it went. `ms`: since its headers came; `clocks`: now.
    pub fn over(self, flight: &Flight, ms: u64, clocks: Clocks) -> Settlement {
        let readable = !matches!(self.meter, Some(Meter::Opaque { .. }));
        let measured = self.meter.map_or(Measured::default(), Meter::finish);
        // A stream's usage is final once it was told, whatever follows; a document's only when the document is whole.
        let usage = measured.usage.filter(|_| measured.is_final && (self.complete || self.stream));
        let status = flight.status();
        let done = status.is_some_and(|status| (200..300).contains(&status));
        // One that came whole before it could be broken off was not.
        let broken = self.breaking.filter(|breaking| !self.complete || breaking.words.is_none());
        Settlement {
            ended: broken.map(|breaking| breaking.code).or(flight.refusal().map(|refusal| refusal.code)),
            req: self.id,
            outcome: if self.complete { Outcome::Complete } else { Outcome::Cut },
            sent: flight.may_have_been_sent(),
            status,
            usage,
            input: measured.input.filter(|_| usage.is_none()),
            visible: Some(measured.visible_bytes.max(measured.running_output)).filter(|_| readable && usage.is_none() && self.is_text),
            beyond: self.beyond,
            tries: flight.tries(clocks.now_ms),
            created: if done { measured.ids } else { Vec::new() },
            deleted: self.deletes.filter(|_| done && self.complete),
            ms,
            at: clocks.unix_ms,
        }
    }
}

/// The error event that ends a stream, as the SDKs of its dialect understand it (OpenAI: any event whose data has `error`; its
/// Responses API names it `error` besides; Anthropic: the event `error`).
fn error_event(code: Code, dialect: Dialect, is_response: bool, id: RequestId) -> Vec<u8> {
    let data = ended(code, dialect, id).answer().body;
    match (dialect, is_response) {
        (Dialect::OpenAi | Dialect::Gemini, false) => format!("data: {data}\n\n"),
        (Dialect::OpenAi | Dialect::Gemini, true) => {
            let inner = data.strip_prefix('{').unwrap_or(&data);
            let message = serde_json::Value::from(watch::refusal(code).message);
            format!(
                "event: error\ndata: {{\"type\":\"error\",\"code\":\"{}\",\"message\":{message},\"param\":null,{inner}\n\n",
                code.name()
            )
        }
        (Dialect::Anthropic, _) => format!("event: error\ndata: {data}\n\n"),
    }
    .into_bytes()
}
