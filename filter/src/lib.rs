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
use crate::vm::{Desk, Vm, vm};
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
        proxy_wasm::set_root_context(|context| Box::new(super::Root::new(context)));
    }}
}

/// Ticks of a root context without one of the root that serves the VM, after which that one is taken to be gone.
const GONE_TICKS: u32 = 3;

/// One root context of a VM; which one it is, its root id tells.
struct Root {
    context: u32,
    /// Of the gate's.
    desk: Option<Rc<Desk>>,
    /// Of the one that serves the VM, if that is another: its ticks so far, and how often it has not ticked since.
    other: (u64, u32),
}

impl Root {
    fn new(context: u32) -> Self {
        Root { context, desk: None, other: (0, 0) }
    }

    /// Whether it is this root that serves the VM: sends its settlements, asks for news, tells its metrics. The last one that was configured
    /// does; when Envoy has ended it, one that is left.
    fn serves(&mut self, vm: &Vm, desk: &Rc<Desk>) -> bool {
        if vm.root() != Some(self.context) {
            let ticks = vm.ticks();
            self.other = if self.other.0 == ticks { (ticks, self.other.1 + 1) } else { (ticks, 0) };
            if vm.root().is_some() && self.other.1 < GONE_TICKS {
                return false;
            }
            vm.serve_by(self.context, desk);
        }
        vm.has_ticked();
        true
    }

    /// What a root context does as soon as somebody rings for it, or hears from the policy service.
    fn come(&self, vm: &Vm) {
        let Some(desk) = &self.desk else { return };
        desk.came();
        questions::flush(desk, self.context);
        if vm.root() != Some(self.context) {
            return;
        }
        watching::finish_due(vm, self.context);
        attempt::go_on(vm, self.context);
        if vm.settlements.borrow().is_urgent() {
            self.settle(vm, host::now_ms());
        }
    }

    fn settle(&self, vm: &Vm, now_ms: u64) {
        if let Some(id) = vm.id() {
            let cluster = &vm.config().policy_cluster;
            vm.settlements.borrow_mut().flush(id, self.context, cluster, &mut vm.keyring.borrow_mut(), now_ms);
        }
    }
}

impl Context for Root {
    fn on_http_call_response(&mut self, token: u32, _: usize, body_size: usize, _: usize) {
        let vm = vm();
        let Some(desk) = &self.desk else { return };
        // Only a 200 carries a body that reads as an answer.
        let body = host::buffer(Buffer::CallResponseBody, 0, body_size);
        let was_asked = desk.questions.borrow_mut().answered(token, body.as_deref().unwrap_or_default());
        if let Some(id) = vm.id().filter(|_| !was_asked)
            && !watching::answered(&vm, id, token, body.as_deref())
        {
            let answer = body.and_then(|body| serde_json::from_slice(&body).ok());
            vm.settlements.borrow_mut().answered(id, token, answer, &mut vm.keyring.borrow_mut(), host::now_ms());
        }
        self.come(&vm);
    }

    /// Envoy ends this root context: its configuration is no longer in force, and all its streams are over.
    fn on_done(&mut self) -> bool {
        if self.desk.is_some() {
            vm().is_left_by(self.context);
        }
        true
    }
}

impl RootContext for Root {
    fn on_configure(&mut self, size: usize) -> bool {
        if host::property("plugin_root_id").is_none_or(|id| id != b"gate") {
            return true;
        }
        match Config::parse(&host::buffer(Buffer::PluginConfiguration, 0, size).unwrap_or_default()) {
            Ok(config) => {
                let vm = vm();
                let desk = Rc::new(Desk::new(&vm, self.context, config));
                vm.watching.borrow_mut().begin();
                vm.serve_by(self.context, &desk);
                self.desk = Some(desk);
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
        let Some(desk) = self.desk.clone() else { return };
        desk.came();
        questions::flush(&desk, self.context);
        if !self.serves(&vm, &desk) {
            return;
        }
        metrics::publish(vm.load(), now_ms);
        self.settle(&vm, now_ms);
        if let Some(id) = vm.id() {
            watching::tick(&vm, id, self.context);
        }
        attempt::go_on(&vm, self.context);
    }

    /// A stream asks for an admission, or has ended and somebody waits for its settlement.
    fn on_queue_ready(&mut self, queue: u32) {
        host::dequeue(queue);
        self.come(&vm());
    }

    fn create_http_context(&self, context: u32) -> Option<Box<dyn HttpContext>> {
        Some(match &self.desk {
            Some(desk) => Box::new(GateStream::new(context, desk.clone())),
            None => Box::new(AttemptStream::new(context)),
        })
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }
}
