//! Every call into Envoy. The imports are declared here, raw, because the SDK's wrappers panic on statuses that do occur;
//! here a failed call is a `None` or `false`, and the caller fails closed.
#![allow(unsafe_code)]

use keyward_core::attempt::Clocks;
use std::time::Duration;

/// `proxy_status_t`: only success matters, and a lost compare-and-swap.
const OK: u32 = 0;

#[derive(Debug, Clone, Copy)]
pub enum Map {
    RequestHeaders = 0,
    RequestTrailers = 1,
    ResponseHeaders = 2,
    CallResponseHeaders = 6,
}

#[derive(Debug, Clone, Copy)]
pub enum Buffer {
    RequestBody = 0,
    ResponseBody = 1,
    CallResponseBody = 4,
    PluginConfiguration = 7,
}

#[derive(Debug, Clone, Copy)]
pub enum Metric {
    Counter = 0,
    Gauge = 1,
    Histogram = 2,
}

#[link(wasm_import_module = "env")]
unsafe extern "C" {
    fn proxy_get_current_time_nanoseconds(out: *mut u64) -> u32;
    fn proxy_set_tick_period_milliseconds(period: u32) -> u32;
    fn proxy_get_buffer_bytes(kind: u32, start: usize, max: usize, data: *mut *mut u8, size: *mut usize) -> u32;
    fn proxy_set_buffer_bytes(kind: u32, start: usize, length: usize, data: *const u8, size: usize) -> u32;
    fn proxy_get_header_map_pairs(map: u32, data: *mut *mut u8, size: *mut usize) -> u32;
    fn proxy_remove_header_map_value(map: u32, name: *const u8, name_size: usize) -> u32;
    fn proxy_replace_header_map_value(map: u32, name: *const u8, name_size: usize, value: *const u8, value_size: usize) -> u32;
    fn proxy_get_property(path: *const u8, path_size: usize, data: *mut *mut u8, size: *mut usize) -> u32;
    fn proxy_set_property(path: *const u8, path_size: usize, value: *const u8, value_size: usize) -> u32;
    fn proxy_get_shared_data(key: *const u8, key_size: usize, data: *mut *mut u8, size: *mut usize, cas: *mut u32) -> u32;
    fn proxy_set_shared_data(key: *const u8, key_size: usize, value: *const u8, value_size: usize, cas: u32) -> u32;
    fn proxy_continue_stream(stream: u32) -> u32;
    fn proxy_close_stream(stream: u32) -> u32;
    fn proxy_set_effective_context(context: u32) -> u32;
    #[allow(clippy::too_many_arguments)]
    fn proxy_send_local_response(
        status: u32,
        details: *const u8,
        details_size: usize,
        body: *const u8,
        body_size: usize,
        headers: *const u8,
        headers_size: usize,
        grpc_status: i32,
    ) -> u32;
    fn proxy_call_foreign_function(
        name: *const u8,
        name_size: usize,
        args: *const u8,
        args_size: usize,
        data: *mut *mut u8,
        size: *mut usize,
    ) -> u32;
    fn proxy_register_shared_queue(name: *const u8, name_size: usize, id: *mut u32) -> u32;
    fn proxy_enqueue_shared_queue(id: u32, value: *const u8, value_size: usize) -> u32;
    fn proxy_dequeue_shared_queue(id: u32, data: *mut *mut u8, size: *mut usize) -> u32;
    fn proxy_define_metric(kind: u32, name: *const u8, name_size: usize, id: *mut u32) -> u32;
    fn proxy_get_metric(id: u32, value: *mut u64) -> u32;
    fn proxy_increment_metric(id: u32, offset: i64) -> u32;
    fn proxy_record_metric(id: u32, value: u64) -> u32;
}

#[link(wasm_import_module = "wasi_snapshot_preview1")]
unsafe extern "C" {
    fn clock_time_get(clock: u32, precision: u64, time: *mut u64) -> u16;
}

/// Runs a call that hands out memory (allocated by the SDK's `proxy_on_memory_allocate`, as a boxed slice).
fn received(call: impl FnOnce(*mut *mut u8, *mut usize) -> u32) -> Option<Vec<u8>> {
    let (mut data, mut size) = (std::ptr::null_mut(), 0usize);
    if call(&mut data, &mut size) != OK {
        return None;
    }
    if data.is_null() {
        return Some(Vec::new());
    }
    // SAFETY: on success the host hands over exactly one allocation of `size` bytes, made by our own allocator.
    Some(unsafe { Vec::from_raw_parts(data, size, size) })
}

/// Unix time in milliseconds.
pub fn now_ms() -> u64 {
    let mut nanos = 0;
    // SAFETY: the host writes one u64.
    unsafe { proxy_get_current_time_nanoseconds(&mut nanos) };
    nanos / 1_000_000
}

/// Milliseconds of a clock that is never set, the same in all VMs of the process. `std`'s clock doesn't tell its value.
pub fn monotonic_ms() -> u64 {
    const MONOTONIC: u32 = 1;
    let mut nanos = 0;
    // SAFETY: the host writes one u64.
    unsafe { clock_time_get(MONOTONIC, 1_000_000, &mut nanos) };
    nanos / 1_000_000
}

/// Both clocks.
pub fn clocks() -> Clocks {
    Clocks { now_ms: monotonic_ms(), unix_ms: now_ms() }
}

pub fn set_tick_period(period: Duration) {
    let millis = u32::try_from(period.as_millis()).unwrap_or(u32::MAX);
    // SAFETY: plain values.
    unsafe { proxy_set_tick_period_milliseconds(millis) };
}

/// At most `max` bytes of a buffer from `start`.
pub fn buffer(kind: Buffer, start: usize, max: usize) -> Option<Vec<u8>> {
    // SAFETY: out-pointers live through the call.
    received(|data, size| unsafe { proxy_get_buffer_bytes(kind as u32, start, max, data, size) })
}

/// Replaces `length` bytes of a buffer from its start.
pub fn replace_buffer(kind: Buffer, length: usize, bytes: &[u8]) -> bool {
    // SAFETY: the host copies from the slice during the call.
    unsafe { proxy_set_buffer_bytes(kind as u32, 0, length, bytes.as_ptr(), bytes.len()) == OK }
}

/// A header map as the host gave it.
pub struct HeaderMap(Vec<u8>);

/// All pairs of a header map; none when the map is not there in this phase.
pub fn headers(map: Map) -> HeaderMap {
    // SAFETY: out-pointers live through the call.
    HeaderMap(received(|data, size| unsafe { proxy_get_header_map_pairs(map as u32, data, size) }).unwrap_or_default())
}

impl HeaderMap {
    pub fn pairs(&self) -> Vec<(&[u8], &[u8])> {
        parse_pairs(&self.0).unwrap_or_default()
    }
}

/// Count (u32 LE), a pair of lengths each, then name NUL value NUL each.
fn parse_pairs(bytes: &[u8]) -> Option<Vec<(&[u8], &[u8])>> {
    let number = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?) as usize);
    let count = number(0)?;
    let mut at = count.checked_mul(8)?.checked_add(4)?;
    let mut pairs = Vec::with_capacity(count.min(1_000));
    for i in 0..count {
        let mut part = |lengths_at: usize| {
            let len = number(lengths_at)?;
            let part = bytes.get(at..at.checked_add(len)?)?;
            at = at.checked_add(len)?.checked_add(1)?;
            Some(part)
        };
        pairs.push((part(4 + i * 8)?, part(8 + i * 8)?));
    }
    Some(pairs)
}

fn serialize_pairs(pairs: &[(&str, &str)]) -> Vec<u8> {
    let length = |text: &str| u32::try_from(text.len()).unwrap_or(0).to_le_bytes();
    let mut out = u32::try_from(pairs.len()).unwrap_or(0).to_le_bytes().to_vec();
    for (name, value) in pairs {
        out.extend_from_slice(&length(name));
        out.extend_from_slice(&length(value));
    }
    for (name, value) in pairs {
        for text in [name, value] {
            out.extend_from_slice(text.as_bytes());
            out.push(0);
        }
    }
    out
}

pub fn remove_header(map: Map, name: &[u8]) {
    // SAFETY: the host reads the name during the call.
    unsafe { proxy_remove_header_map_value(map as u32, name.as_ptr(), name.len()) };
}

pub fn set_header(map: Map, name: &str, value: &str) -> bool {
    // SAFETY: the host copies both during the call.
    unsafe { proxy_replace_header_map_value(map as u32, name.as_ptr(), name.len(), value.as_ptr(), value.len()) == OK }
}

/// A property of the stream or of Envoy, the parts of its path parted by NUL (`node\0id`), or filter state by its bare name.
pub fn property(path: &str) -> Option<Vec<u8>> {
    // SAFETY: out-pointers live through the call.
    received(|data, size| unsafe { proxy_get_property(path.as_ptr(), path.len(), data, size) })
}

/// Whether this stream's last try may have had a connection to its provider: it has an address of its own then, but on a Unix socket.
pub fn may_have_connected() -> bool {
    let is_there = |name| property(name).is_some_and(|address| !address.is_empty());
    is_there("upstream\0local_address") || property("upstream\0address").is_some_and(|address| matches!(address.first(), Some(b'/' | b'@')))
}

/// Writes filter state: seen by the attempt, by the route matcher and by the access log as `wasm.{name}`.
pub fn set_filter_state(name: &str, value: impl AsRef<[u8]>) -> bool {
    let value = value.as_ref();
    // SAFETY: the host copies both during the call.
    unsafe { proxy_set_property(name.as_ptr(), name.len(), value.as_ptr(), value.len()) == OK }
}

/// A value shared by all VMs of the process, with its version.
pub fn shared(key: &[u8]) -> Option<(Vec<u8>, u32)> {
    let mut cas = 0;
    // SAFETY: out-pointers live through the call.
    let value = received(|data, size| unsafe { proxy_get_shared_data(key.as_ptr(), key.len(), data, size, &mut cas) })?;
    Some((value, cas))
}

/// Writes a shared value if its version is still `cas` or it is not there (0: whatever it is).
pub fn set_shared(key: &[u8], value: &[u8], cas: u32) -> bool {
    // SAFETY: the host copies both during the call.
    unsafe { proxy_set_shared_data(key.as_ptr(), key.len(), value.as_ptr(), value.len(), cas) == OK }
}

/// A queue whose every message calls `on_queue_ready` of the context that registers it. Of a name that is known it is the same one.
pub fn register_queue(name: &str) -> Option<u32> {
    let mut id = 0;
    // SAFETY: the host reads the name and writes one u32 during the call.
    let status = unsafe { proxy_register_shared_queue(name.as_ptr(), name.len(), &mut id) };
    (status == OK).then_some(id)
}

/// Puts an empty message into a queue.
pub fn enqueue(id: u32) -> bool {
    let message: &[u8] = b"";
    // SAFETY: the host copies the message during the call.
    unsafe { proxy_enqueue_shared_queue(id, message.as_ptr(), message.len()) == OK }
}

/// Takes a message out of a queue; `None`: it is empty.
pub fn dequeue(id: u32) -> Option<Vec<u8>> {
    // SAFETY: out-pointers live through the call.
    received(|data, size| unsafe { proxy_dequeue_shared_queue(id, data, size) })
}

pub fn resume_request() {
    // SAFETY: plain value; stream 0 is the request.
    unsafe { proxy_continue_stream(0) };
}

pub fn resume_response() {
    const RESPONSE: u32 = 1;
    // SAFETY: plain value.
    unsafe { proxy_continue_stream(RESPONSE) };
}

/// Makes the calls that follow act for another context of this VM. `false`: there is none of this id any more.
pub fn act_for(context: u32) -> bool {
    // SAFETY: plain value.
    unsafe { proxy_set_effective_context(context) == OK }
}

/// Ends the stream where it is, towards both sides.
pub fn reset_response() {
    const RESPONSE: u32 = 1;
    // SAFETY: plain value.
    unsafe { proxy_close_stream(RESPONSE) };
}

/// Answers in the provider's place.
pub fn send_response(status: u16, headers: &[(&str, &str)], body: impl AsRef<[u8]>) -> bool {
    let body = body.as_ref();
    let headers = serialize_pairs(headers);
    let details = "keyward";
    // SAFETY: the host copies everything during the call; -1 means no gRPC status.
    unsafe {
        proxy_send_local_response(
            u32::from(status),
            details.as_ptr(),
            details.len(),
            body.as_ptr(),
            body.len(),
            headers.as_ptr(),
            headers.len(),
            -1,
        ) == OK
    }
}

/// Makes Envoy choose the route anew, now that filter state names the target.
pub fn clear_route_cache() -> bool {
    let name = "clear_route_cache";
    // SAFETY: out-pointers live through the call.
    received(|data, size| unsafe { proxy_call_foreign_function(name.as_ptr(), name.len(), std::ptr::null(), 0, data, size) }).is_some()
}

/// Calls a cluster; the answer comes to the context that asked. The SDK's wrapper is used because its dispatcher must
/// know the token.
pub fn call(cluster: &str, headers: Vec<(&str, &str)>, body: &[u8], timeout: Duration) -> Option<u32> {
    proxy_wasm::hostcalls::dispatch_http_call(cluster, headers, Some(body), Vec::new(), timeout).ok()
}

pub fn define_metric(kind: Metric, name: &str) -> Option<u32> {
    let mut id = 0;
    // SAFETY: the host writes one u32.
    let status = unsafe { proxy_define_metric(kind as u32, name.as_ptr(), name.len(), &mut id) };
    (status == OK).then_some(id)
}

pub fn add_to_metric(id: u32, offset: i64) {
    // SAFETY: plain values.
    unsafe { proxy_increment_metric(id, offset) };
}

/// A sample of a histogram, or the value of a gauge.
pub fn record_metric(id: u32, value: u64) {
    // SAFETY: plain values.
    unsafe { proxy_record_metric(id, value) };
}

pub fn metric(id: u32) -> Option<u64> {
    let mut value = 0;
    // SAFETY: the host writes one u64.
    let status = unsafe { proxy_get_metric(id, &mut value) };
    (status == OK).then_some(value)
}

/// Bytes from the host's source of randomness (WASI `random_get`).
pub fn random<const N: usize>() -> Option<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).ok().map(|()| bytes)
}
