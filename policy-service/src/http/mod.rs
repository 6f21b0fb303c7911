//! The service's two ports: the edge API for the filter, the admin API for people and tools.

pub mod admin;
pub mod api;
mod audit;
mod configuration;
mod credentials;
pub mod edge;
mod error;
mod keys;
mod observe;
mod standing;
mod tokens;
