//! The two ports: the edge API for the filter, the admin API for people.

pub mod admin;
pub mod edge;
pub mod error;
