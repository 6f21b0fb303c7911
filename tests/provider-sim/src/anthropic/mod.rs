//! The Anthropic messages dialect.

pub mod error;
pub mod form;
pub mod history;
pub mod request;
pub mod response;
