//! The questions of a root context's streams, asked and answered. The root makes the callouts, so that none of them ends with the stream that
//! began it; a root lives longer than its streams. A stream rings for it; Envoy lets the root answer the bell once it has read what has
//! come on all connections.

use crate::gate::SharedGate;
use crate::host;
use crate::vm::Desk;
use keyward_core::edge::ADMIT_PATH;
use std::time::Duration;

/// A stream that waits for its answer.
pub struct Waiting {
    pub gate: SharedGate,
    pub context: u32,
}

/// Sends what waits, as far as it may go now, and tells streams what there is to be told. Called by the root context, in its own name.
pub fn flush(desk: &Desk, root: u32) {
    let Desk { config, questions, .. } = desk;
    let now_ms = host::monotonic_ms();
    questions.borrow_mut().expire(config.admit_timeout_ms, now_ms);
    loop {
        let goes = |waiting: &Waiting| waiting.gate.borrow().asks();
        let Some(mut batch) = questions.borrow_mut().next(config.admit_timeout_ms, now_ms, goes) else { break };
        let headers =
            vec![(":method", "POST"), (":path", ADMIT_PATH), (":authority", "keyward-policy"), ("content-type", "application/x-ndjson")];
        let body = std::mem::take(&mut batch.body);
        match host::call(&config.policy_cluster, headers, &body, Duration::from_millis(batch.left_ms)) {
            Some(token) => {
                batch.waiting().for_each(|waiting| waiting.gate.borrow_mut().has_asked());
                questions.borrow_mut().sent(token, batch, now_ms);
            }
            None => questions.borrow_mut().failed(batch),
        }
    }
    tell(desk, root);
}

/// Tells one of those streams that are to be told something; the bell is rung for the rest. One that goes on runs into its attempt as soon
/// as this callback is over, and may find the attempt's VM to be loaded anew: others that went on in the same callback would run into
/// the middle of that, and Envoy would end them.
fn tell(desk: &Desk, root: u32) {
    let next = desk.questions.borrow_mut().tell();
    let Some((waiting, answer)) = next else { return };
    if host::act_for(waiting.context) {
        waiting.gate.borrow_mut().answered(answer);
    }
    host::act_for(root);
    if desk.questions.borrow().has_to_tell() {
        desk.ring();
    }
}
