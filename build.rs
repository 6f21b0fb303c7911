//! Builds the filter for wasm32-wasip1, so that the command line can carry it.

use std::path::PathBuf;
use std::process::Command;

fn main() {
    for input in ["core/src", "core/data", "core/Cargo.toml", "filter", "Cargo.lock", ".cargo/config.toml"] {
        println!("cargo::rerun-if-changed={input}");
    }
    // A target directory of its own: the one in use is locked by the build that runs this.
    let out = PathBuf::from(variable("OUT_DIR"));
    let target = out.join("filter-target");
    let status = Command::new(variable("CARGO"))
        .args(["build", "--locked", "--package", "keyward-filter", "--target", "wasm32-wasip1", "--profile", "filter"])
        .arg("--target-dir")
        .arg(&target)
        // Flags meant for the host must not reach the module.
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env_remove("RUSTC_WRAPPER")
        .status();
    if !status.is_ok_and(|s| s.success()) {
        println!("cargo::error=the filter could not be built; is the target installed? rustup target add wasm32-wasip1");
        return;
    }
    let module = target.join("wasm32-wasip1/filter/keyward_filter.wasm");
    println!("cargo::rustc-env=KEYWARD_FILTER={}", module.display());
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_default()
}
