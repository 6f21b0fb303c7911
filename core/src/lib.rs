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
pub mod meter;
pub mod metrics;
pub mod money;
pub mod operation;
pub mod price;
pub mod refusal;
pub mod token;
pub mod trace;
pub mod usage;
