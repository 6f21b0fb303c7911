//! Translation between the dialects of callers and providers: requests, answers whole and streamed, errors.
//!
//! Every dialect is read into one form and written from it, so that each is known in one place only. Nothing is lost on the
//! way without being told: what a provider can't do is an error that names the field, or is left out where the route says so.

pub mod answer;
pub mod doc;
pub mod request;
pub mod write;
