//! The questions of this VM's requests, asked and answered. The gate's root context makes the callouts, so that none of them ends with the
//! stream that began it. A stream rings for it; Envoy lets the root answer the bell once it has read what has come on all connections.

use crate::gate::SharedGate;
use crate::host;
use crate::vm::{AT_ONCE, Vm};
use keyward_core::edge::ADMIT_PATH;
use std::time::Duration;

/// A stream that waits for its answer.
pub struct Waiting {
    pub gate: SharedGate,
    pub context: u32,
}

/// Sends what waits, as far as it may go now, and tells streams what there is to be told. Called by the root context that serves this VM,
/// in its own name.
pub fn flush(vm: &Vm, root: u32) {
    let config = vm.config();
    let now_ms = host::monotonic_ms();
    vm.questions.borrow_mut().expire(config.admit_timeout_ms, now_ms);
    loop {
        let goes = |waiting: &Waiting| waiting.gate.borrow().asks();
        let Some(mut batch) = vm.questions.borrow_mut().next(config.admit_timeout_ms, now_ms, goes) else { break };
        let headers =
            vec![(":method", "POST"), (":path", ADMIT_PATH), (":authority", "keyward-policy"), ("content-type", "application/x-ndjson")];
        let body = std::mem::take(&mut batch.body);
        match host::call(&config.policy_cluster, headers, &body, Duration::from_millis(batch.left_ms)) {
            Some(token) => {
                batch.waiting().for_each(|waiting| waiting.gate.borrow_mut().has_asked());
                vm.questions.borrow_mut().sent(token, batch, now_ms);
            }
            None => vm.questions.borrow_mut().failed(batch),
        }
    }
    tell(vm, root);
}

/// Tells some of those streams that are to be told something; the bell is rung for the rest.
fn tell(vm: &Vm, root: u32) {
    if !vm.questions.borrow().has_to_tell() {
        return;
    }
    for _ in 0..AT_ONCE {
        let next = vm.questions.borrow_mut().tell();
        let Some((waiting, answer)) = next else { break };
        if host::act_for(waiting.context) {
            waiting.gate.borrow_mut().answered(answer);
        }
    }
    host::act_for(root);
    if vm.questions.borrow().has_to_tell() {
        vm.ring();
    }
}
