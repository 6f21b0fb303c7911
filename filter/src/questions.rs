//! The questions of this VM's requests, asked and answered. The gate's root context makes the callouts, so that none of them ends with the
//! stream that began it. A stream rings for it; Envoy lets the root answer the bell once it has read what has come on all connections.

use crate::gate::SharedGate;
use crate::host;
use crate::vm::Vm;
use keyward_core::edge::{ADMIT_PATH, AdmitAnswer};
use keyward_core::questions::Batch;
use std::time::Duration;

/// A stream that waits for its answer.
pub struct Waiting {
    pub gate: SharedGate,
    pub context: u32,
}

/// Sends what waits, as far as it may go now; nobody waits for longer than is configured. In the root's own name, on every tick as well.
pub fn flush(vm: &Vm, root: u32) {
    let config = vm.config();
    let now_ms = host::monotonic_ms();
    let overdue = vm.questions.borrow_mut().overdue(config.admit_timeout_ms, now_ms);
    if !overdue.is_empty() {
        overdue.into_iter().for_each(|waiting| hand(&waiting, None));
        host::act_for(root);
    }
    loop {
        let goes = |waiting: &mut Waiting| waiting.gate.borrow_mut().leaves();
        let Some(batch) = vm.questions.borrow_mut().next(config.admit_timeout_ms, now_ms, goes) else { return };
        let headers =
            vec![(":method", "POST"), (":path", ADMIT_PATH), (":authority", "keyward-policy"), ("content-type", "application/x-ndjson")];
        match host::call(&config.policy_cluster, headers, &batch.body(), Duration::from_millis(batch.left_ms)) {
            Some(token) => vm.questions.borrow_mut().sent(token, batch, now_ms),
            None => tell(batch, &[], root),
        }
    }
}

/// The end of a callout of the root's. `false`: it was none of these.
pub fn answered(vm: &Vm, root: u32, token: u32, body: &[u8]) -> bool {
    let batch = vm.questions.borrow_mut().take(token);
    let Some(batch) = batch else { return false };
    tell(batch, body, root);
    flush(vm, root);
    true
}

fn tell(batch: Batch<Waiting>, body: &[u8], root: u32) {
    batch.answered(body).for_each(|(waiting, answer)| hand(&waiting, answer));
    host::act_for(root);
}

/// Hands a stream its answer, unless it is gone.
fn hand(waiting: &Waiting, answer: Option<AdmitAnswer>) {
    if host::act_for(waiting.context) {
        waiting.gate.borrow_mut().answered(answer);
    }
}
