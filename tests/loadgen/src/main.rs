//! `loadgen`: sends a bounded number of HTTP/1.1 requests to a loopback address and prints what came back, and when.
//!
//! It shares the machine with what it measures, so it is made to cost little: one thread, one task per keep-alive
//! connection, request bytes built once, responses followed to their end and never kept.

mod http;
mod load;
mod options;
mod report;

use std::process::ExitCode;

use clap::Parser;

use crate::options::Options;

fn main() -> ExitCode {
    let options = Options::parse();
    let json = options.json;
    let plan = match options.into_plan() {
        Ok(plan) => plan,
        Err(why) => return fail(&why),
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(why) => return fail(&why.to_string()),
    };
    let report = runtime.block_on(load::run(&plan));
    if json {
        println!("{}", report.to_json());
    } else {
        print!("{report}");
    }
    ExitCode::SUCCESS
}

fn fail(why: &str) -> ExitCode {
    eprintln!("loadgen: {why}");
    ExitCode::from(2)
}
