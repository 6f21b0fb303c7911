//! Files that hold secrets: made once, readable by their owner only.

use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// Reads a secret file, or creates it with what `make` gives. A file that others can read is refused.
pub fn read_or_create(path: &Path, make: impl FnOnce() -> Result<String, String>) -> Result<String, String> {
    match std::fs::metadata(path) {
        Ok(meta) if meta.permissions().mode() & 0o077 != 0 => Err("others can read it: chmod 600".to_owned()),
        Ok(_) => std::fs::read_to_string(path).map(|text| text.trim().to_owned()).map_err(|error| error.to_string()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let text = make()?;
            create(path, &text)?;
            Ok(text)
        }
        Err(error) => Err(error.to_string()),
    }
}

/// Writes a new file with mode 0600, durable before it returns.
pub fn create(path: &Path, text: &str) -> Result<(), String> {
    let write = || {
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    write().map_err(|error: std::io::Error| error.to_string())
}
