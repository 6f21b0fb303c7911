//! Log lines on standard error, for people or for machines. No secret, token, prompt or answer is ever a field.

use clap::ValueEnum;
use std::io::IsTerminal;
use tracing::{Level, Metadata};
use tracing_subscriber::filter::{EnvFilter, FilterExt, LevelFilter, filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One readable line each
    Text,
    /// One JSON object a line: timestamp, level, target, message, and the event's own fields beside them
    Json,
}

/// Starts logging for the whole process. `level` holds unless `RUST_LOG` says otherwise; a second start changes nothing.
pub fn start(format: LogFormat, level: &str) {
    // The hint lets whatever is off cost nothing.
    let seen = filter_fn(may_be_seen).with_max_level_hint(LevelFilter::TRACE);
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| level.into()).and(seen);
    let lines = fmt::layer().with_writer(std::io::stderr);
    let lines = match format {
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).with_current_span(false).with_span_list(false).boxed(),
    };
    let _ = tracing_subscriber::registry().with(lines.with_filter(filter)).try_init();
}

/// HTTP libraries print whole headers, credentials included, when they are asked for details: nobody may ask.
fn may_be_seen(metadata: &Metadata<'_>) -> bool {
    metadata.target().starts_with("keyward") || *metadata.level() <= Level::INFO
}
