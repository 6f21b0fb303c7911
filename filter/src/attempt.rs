//! The attempt: Envoy's callbacks of one try, on the provider cluster's own filter chain.

use crate::host::{self, Map};
use crate::vm::{SharedFlight, vm};
use keyward_core::attempt::RequestEdits;
use keyward_core::operation::Dialect;
use keyward_core::refusal::{Code, Refusal};
use proxy_wasm::traits::{Context, HttpContext};
use proxy_wasm::types::Action;

#[derive(Default)]
pub struct AttemptStream {
    flight: Option<SharedFlight>,
}

impl Context for AttemptStream {}

impl HttpContext for AttemptStream {
    fn on_http_request_headers(&mut self, _: usize, _: bool) -> Action {
        self.flight = vm().flight_of_stream();
        // The borrow ends before anything else is called.
        let edits =
            self.flight.as_ref().and_then(|flight| flight.borrow_mut().begin(&host::headers(Map::RequestHeaders).pairs(), host::now_ms()));
        // No permit, a VM that was reloaded under the request, or headers that could not be written: nothing leaves.
        if !edits.is_some_and(|edits| write(&edits)) {
            let refusal = Refusal::new(Code::PolicyUnavailable, "this request was not admitted").retry_after(1);
            let answer = refusal.answer(Dialect::OpenAi, "");
            let headers: Vec<(&str, &str)> = answer.headers.iter().map(|(n, v)| (*n, v.as_str())).collect();
            host::send_response(answer.status, &headers, &answer.body);
            return Action::Pause;
        }
        Action::Continue
    }

    fn on_http_response_headers(&mut self, _: usize, _: bool) -> Action {
        if let Some(flight) = &self.flight {
            let headers = host::headers(Map::ResponseHeaders);
            for name in flight.borrow_mut().answered(&headers.pairs(), host::now_ms()) {
                host::remove_header(Map::ResponseHeaders, &name);
            }
        }
        Action::Continue
    }
}

fn write(edits: &RequestEdits) -> bool {
    for name in &edits.remove {
        host::remove_header(Map::RequestHeaders, name);
    }
    edits.set.iter().all(|(name, value)| host::set_header(Map::RequestHeaders, name, value))
}
