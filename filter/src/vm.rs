//! What one VM keeps between callbacks: the flights that gate and attempt share, and its identity towards the service.
//! It is one per worker thread, and gone after a trap.

use crate::attempt::Paused;
use crate::config::Config;
use crate::host;
use crate::load::Load;
use crate::questions::Waiting;
use crate::settlements::Settlements;
use crate::watching::Watching;
use keyward_core::attempt::Flight;
use keyward_core::edge::{RequestId, VmId};
use keyward_core::hex;
use keyward_core::keyring::Keyring;
use keyward_core::questions::Questions;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

/// Filter state that hands a flight from the gate to the attempt.
pub const FLIGHT: &str = "keyward.flight";
/// Filter state that names the cluster to the route.
pub const TARGET: &str = "keyward.target";

/// Filter state that tells the access log whose request it was.
pub const KEY: &str = "keyward.key";

/// Filter state that tells the access log why a request was refused or ended.
pub const REASON: &str = "keyward.reason";

pub type SharedFlight = Rc<RefCell<Flight>>;

/// What a root context of the gate has for its streams: the configuration, the questions that they ask, and a bell.
pub struct Desk {
    pub config: Rc<Config>,
    pub questions: RefCell<Questions<Waiting>>,
    /// A queue whose messages Envoy brings to the root context.
    bell: Option<u32>,
    /// It was rung, and the root context has not come yet.
    rung: Cell<bool>,
}

impl Desk {
    /// Called by the root context. Without a queue settlements go with the tick, and nothing is asked.
    pub fn new(vm: &Vm, root: u32, config: Config) -> Self {
        let name = vm.id().map(|id| format!("keyward/bell/{}/{root}", hex::encode(&id.0)));
        let bell = name.and_then(|name| host::register_queue(&name));
        Desk { config: Rc::new(config), questions: RefCell::default(), bell, rung: Cell::new(false) }
    }

    /// The root context is to come soon. `false`: it can't be called.
    pub fn ring(&self) -> bool {
        if !self.rung.get() {
            self.rung.set(self.bell.is_some_and(host::enqueue));
        }
        self.rung.get()
    }

    /// The root context has come.
    pub fn came(&self) {
        self.rung.set(false);
    }
}

#[derive(Default)]
pub struct Vm {
    pub config: RefCell<Rc<Config>>,
    pub settlements: RefCell<Settlements>,
    pub watching: RefCell<Watching>,
    pub keyring: RefCell<Keyring>,
    /// Tries that stand still for a while.
    pub paused: RefCell<Vec<Paused>>,
    flights: RefCell<HashMap<RequestId, SharedFlight>>,
    id: Cell<Option<VmId>>,
    node: RefCell<Option<Rc<str>>>,
    /// The gate's root context that serves this VM, what it has for its streams, and how often it has ticked. After a new configuration
    /// there are several root contexts for a while, and with two listeners always.
    root: Cell<Option<u32>>,
    desk: RefCell<Option<Rc<Desk>>>,
    ticks: Cell<u64>,
    /// Request ids to come, drawn many at a time: each call to the host costs.
    ids: RefCell<Vec<[u8; 16]>>,
    waiting_bytes: Cell<u64>,
    held_bytes: Cell<usize>,
    streams: Cell<u64>,
    kept_bytes: Cell<u64>,
}

/// Streams that one callback of a root context lets go on, or answers. What is done for one runs when the callback is over, and there calls
/// into the VM, which then lets the next go on: each stands on the stack of the one before (proxy-wasm-cpp-host, issue 326), and some
/// hundred of them ended the VM.
pub const AT_ONCE: usize = 16;

/// Bytes of answers that all streams of a VM may hold back together; beyond, answers pass unheld.
const MAX_HELD: usize = 8 * 1024 * 1024;

/// Bytes of request bodies that a VM keeps to send them again by itself; beyond, requests have one try.
const MAX_KEPT: u64 = 20 * 1024 * 1024;

thread_local! {
    static VM: Rc<Vm> = Rc::default();
}

/// This worker's VM.
pub fn vm() -> Rc<Vm> {
    VM.with(Rc::clone)
}

impl Vm {
    pub fn config(&self) -> Rc<Config> {
        self.config.borrow().clone()
    }

    /// The VM's random id, drawn at its first use.
    pub fn id(&self) -> Option<VmId> {
        if self.id.get().is_none() {
            self.id.set(host::random().map(VmId));
        }
        self.id.get()
    }

    /// From now on this root context of the gate serves the VM.
    pub fn serve_by(&self, root: u32, desk: &Rc<Desk>) {
        *self.config.borrow_mut() = desk.config.clone();
        *self.desk.borrow_mut() = Some(desk.clone());
        self.root.set(Some(root));
    }

    /// The root context that serves the VM.
    pub fn root(&self) -> Option<u32> {
        self.root.get()
    }

    /// This root context is no more, and nothing that it has sent will be answered.
    pub fn is_left_by(&self, root: u32) {
        self.settlements.borrow_mut().is_left_by(root, &mut self.keyring.borrow_mut(), host::now_ms());
        self.watching.borrow_mut().is_left_by(root);
        if self.root.get() == Some(root) {
            self.root.set(None);
        }
    }

    /// How often the root context that serves the VM has ticked.
    pub fn ticks(&self) -> u64 {
        self.ticks.get()
    }

    pub fn has_ticked(&self) {
        self.ticks.set(self.ticks.get().wrapping_add(1));
    }

    /// The root context that serves the VM is to come soon.
    pub fn ring(&self) {
        if let Some(desk) = self.desk.borrow().as_ref() {
            desk.ring();
        }
    }

    /// What waits for the policy service goes at once, not with the next tick.
    pub fn hurry(&self) {
        if self.settlements.borrow_mut().hurry() {
            self.ring();
        }
    }

    /// Envoy's node id.
    pub fn node(&self) -> Rc<str> {
        let read = || Rc::from(host::property("node\0id").and_then(|id| String::from_utf8(id).ok()).unwrap_or_default());
        self.node.borrow_mut().get_or_insert_with(read).clone()
    }

    /// A new request's id. `None` without randomness.
    pub fn request_id(&self) -> Option<RequestId> {
        let mut ids = self.ids.borrow_mut();
        if ids.is_empty() {
            ids.extend_from_slice(host::random::<256>()?.as_chunks().0);
        }
        ids.pop().map(RequestId)
    }

    pub fn take_off(&self, id: RequestId, flight: Flight) -> SharedFlight {
        let flight = Rc::new(RefCell::new(flight));
        self.flights.borrow_mut().insert(id, flight.clone());
        flight
    }

    /// This stream is over: what of it stands still is let go.
    pub fn goes_on_no_more(&self, context: u32) {
        let mut paused = self.paused.borrow_mut();
        if !paused.is_empty() {
            paused.retain(|paused| !paused.is_of(context));
        }
    }

    pub fn land(&self, id: RequestId) {
        self.flights.borrow_mut().remove(&id);
    }

    /// The flight that this stream's filter state names.
    pub fn flight_of_stream(&self) -> Option<SharedFlight> {
        let id = host::property(FLIGHT)?;
        let id = RequestId::parse(std::str::from_utf8(&id).ok()?)?;
        self.flights.borrow().get(&id).cloned()
    }

    /// Changes how many body bytes wait; `false` when that is more than this worker may hold.
    pub fn wait_with(&self, before: u64, after: u64) -> bool {
        let total = self.waiting_bytes.get().saturating_sub(before).saturating_add(after);
        self.waiting_bytes.set(total);
        total <= self.config().max_waiting_bytes
    }

    /// Takes room for a body that is kept; `false`: there is none.
    pub fn keep(&self, bytes: u64) -> bool {
        let total = self.kept_bytes.get().saturating_add(bytes);
        let fits = total <= MAX_KEPT;
        if fits {
            self.kept_bytes.set(total);
        }
        fits
    }

    pub fn let_go(&self, bytes: u64) {
        self.kept_bytes.set(self.kept_bytes.get().saturating_sub(bytes));
    }

    /// Counts a stream; `false` when the worker has as many as its memory is meant for.
    pub fn open_stream(&self) -> bool {
        let fits = self.streams.get() < self.config().max_streams;
        self.streams.set(self.streams.get() + u64::from(fits));
        fits
    }

    pub fn close_stream(&self) {
        self.streams.set(self.streams.get().saturating_sub(1));
    }

    /// What is open in this VM.
    pub fn load(&self) -> Load {
        let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        Load { streams: number(self.streams.get()), waiting: number(self.waiting_bytes.get()), held: number(self.held_bytes.get() as u64) }
    }

    /// How much a stream that holds `held` bytes now may hold.
    pub fn room_to_hold(&self, held: usize) -> usize {
        MAX_HELD.saturating_sub(self.held_bytes.get().saturating_sub(held))
    }

    /// A stream held `before` bytes and holds `after` now.
    pub fn hold(&self, before: usize, after: usize) {
        self.held_bytes.set(self.held_bytes.get().saturating_sub(before).saturating_add(after));
    }
}
