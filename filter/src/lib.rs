//! The filter: one Wasm module with two roots. `gate` is a listener filter, `attempt` an upstream filter of each provider
//! cluster; both run in one VM per worker thread. Decisions are in `keyward_core`; here callbacks become events and
//! effects become host calls.
#![cfg(target_os = "wasi")]

mod attempt;
mod config;
mod gate;
mod host;
mod load;
mod metrics;
mod questions;
mod replay;
mod settlements;
mod vm;
mod watching;

use crate::attempt::AttemptStream;
use crate::config::Config;
use crate::gate::GateStream;
use crate::host::Buffer;
use crate::vm::{Vm, vm};
use keyward_core::edge::VmId;
use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::ContextType;
use std::rc::Rc;
use std::time::Duration;

/// How often settlements are sent that nobody waits for.
const TICK: Duration = Duration::from_millis(50);

#[allow(unsafe_code)]
mod entry {
    use proxy_wasm::types::LogLevel;

    proxy_wasm::main! {{
        proxy_wasm::set_log_level(LogLevel::Info);
        proxy_wasm::set_root_context(|context| Box::new(super::Root { context, is_gate: false }));
    }}
}

/// One root context of a VM; which one it is, its root id tells.
struct Root {
    context: u32,
    is_gate: bool,
}

impl Context for Root {
    fn on_http_call_response(&mut self, token: u32, _: usize, body_size: usize, _: usize) {
        let vm = vm();
        // Only a 200 carries a body that reads as an answer.
        let body = host::buffer(Buffer::CallResponseBody, 0, body_size);
        if questions::answered(&vm, self.context, token, body.as_deref().unwrap_or_default()) {
            return;
        }
        let Some(id) = vm.id() else { return };
        if !watching::answered(&vm, id, token, body.as_deref()) {
            let answer = body.and_then(|body| serde_json::from_slice(&body).ok());
            vm.settlements.borrow_mut().answered(id, token, answer, &mut vm.keyring.borrow_mut(), host::now_ms());
            flush_urgent(&vm, id);
        }
    }
}

impl RootContext for Root {
    fn on_configure(&mut self, size: usize) -> bool {
        self.is_gate = host::property("plugin_root_id").is_some_and(|id| id == b"gate");
        if !self.is_gate {
            return true;
        }
        match Config::parse(&host::buffer(Buffer::PluginConfiguration, 0, size).unwrap_or_default()) {
            Ok(config) => {
                let vm = vm();
                *vm.config.borrow_mut() = Rc::new(config);
                vm.watching.borrow_mut().begin();
                vm.hang_bell();
                host::set_tick_period(TICK);
                true
            }
            Err(error) => {
                log::error!("keyward: the gate's configuration can't be read: {error}");
                false
            }
        }
    }

    fn on_tick(&mut self) {
        let (vm, now_ms) = (vm(), host::now_ms());
        metrics::publish(vm.load(), now_ms);
        if let Some(id) = vm.id() {
            vm.settlements.borrow_mut().flush(id, &vm.config().policy_cluster, &mut vm.keyring.borrow_mut(), now_ms);
            vm.came();
            questions::flush(&vm, self.context);
            watching::tick(&vm, id, self.context);
            attempt::tick(&vm, self.context);
        }
    }

    /// A stream asks for an admission, or has ended and somebody waits for its settlement.
    fn on_queue_ready(&mut self, queue: u32) {
        host::dequeue(queue);
        let vm = vm();
        vm.came();
        questions::flush(&vm, self.context);
        if let Some(id) = vm.id() {
            flush_urgent(&vm, id);
        }
    }

    fn create_http_context(&self, context: u32) -> Option<Box<dyn HttpContext>> {
        Some(if self.is_gate { Box::new(GateStream::new(context)) } else { Box::new(AttemptStream::new(context)) })
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }
}

fn flush_urgent(vm: &Vm, id: VmId) {
    let mut settlements = vm.settlements.borrow_mut();
    if settlements.is_urgent() {
        settlements.flush(id, &vm.config().policy_cluster, &mut vm.keyring.borrow_mut(), host::now_ms());
    }
}
