//! How the commands are given secrets: by the environment, a terminal that does not echo, or standard input; never by the
//! command line, where others can see them.

use crate::failure::{Exit, Failure};
use std::io::{IsTerminal, Read};
use zeroize::Zeroizing;

/// Far more than a vault string or a secret has; a wrong file is not read to its end.
pub const MAX_INPUT: u64 = 1 << 20;

/// The secret in the environment variable `name`; without one, what is typed or piped in.
pub fn read(name: Option<&str>, question: &str) -> Result<Zeroizing<String>, Failure> {
    let text = match name {
        Some(name) => from_environment(name)?,
        None if std::io::stdin().is_terminal() => ask(question)?,
        None => {
            // Room for all of it: a buffer that grows leaves copies behind.
            let mut text = Zeroizing::new(String::with_capacity(8 * 1024));
            std::io::stdin().take(MAX_INPUT).read_to_string(&mut text).map_err(|error| error.to_string())?;
            text
        }
    };
    Ok(Zeroizing::new(text.trim().to_owned()))
}

pub fn ask(question: &str) -> Result<Zeroizing<String>, Failure> {
    let explain = |error| Failure::from(format!("there is no terminal to ask at ({error}): name an environment variable instead"));
    rpassword::prompt_password(question).map(Zeroizing::new).map_err(explain)
}

/// A variable that is empty is not set.
pub fn environment(name: &str) -> Option<Zeroizing<String>> {
    std::env::var(name).ok().filter(|text| !text.is_empty()).map(Zeroizing::new)
}

pub fn from_environment(name: &str) -> Result<Zeroizing<String>, Failure> {
    environment(name).ok_or_else(|| Failure::new(Exit::Invalid, format!("the environment variable {name} is not set")))
}
