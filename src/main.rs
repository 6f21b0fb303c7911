//! The `keyward` command.

mod audit;
mod cli;
mod client;
mod demo;
mod doctor;
mod envoy;
mod up;
mod vault;
mod vault_string;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let options = cli::Options::parse();
    match cli::run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("keyward: {message}");
            ExitCode::FAILURE
        }
    }
}
