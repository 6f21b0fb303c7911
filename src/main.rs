//! The `keyward` command.

mod audit;
mod cli;
mod client;
mod commands;
mod demo;
mod doctor;
mod envoy;
mod failure;
mod manifest;
mod reference;
mod secret;
mod up;
mod vault;
mod vault_string;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let options = cli::Options::parse();
    match cli::run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if !failure.message.is_empty() {
                eprintln!("keyward: {}", failure.message);
            }
            ExitCode::from(failure.code as u8)
        }
    }
}
