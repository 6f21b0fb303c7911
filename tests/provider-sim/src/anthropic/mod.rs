//! The Anthropic messages dialect.

pub mod error;
pub mod request;
pub mod response;
