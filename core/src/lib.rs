//! What Keyward decides, and nothing else: no host calls, sockets, clock or randomness. Time and entropy are arguments.

pub mod admission;
pub mod attempt;
pub mod audit;
pub mod body;
pub mod credentials;
pub mod edge;
pub mod gate;
pub mod hex;
pub mod json;
pub mod limits;
pub mod meter;
pub mod metrics;
pub mod models;
pub mod money;
pub mod multipart;
pub mod operation;
pub mod price;
pub mod recording;
pub mod refusal;
pub mod reserve;
pub mod ring;
pub mod token;
pub mod trace;
pub mod usage;
pub mod verdict;
pub mod watch;
