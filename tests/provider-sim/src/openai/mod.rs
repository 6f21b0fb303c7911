//! The OpenAI chat completions dialect.

pub mod error;
pub mod request;
pub mod response;
