//! How a command fails: what a person reads, and the exit code that a script reads.

/// A failed command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub code: Exit,
    pub message: String,
}

/// Exit codes. 2 is clap's: the command line itself can't be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    Failed = 1,
    /// `diff` found differences, `audit verify` a broken chain, `doctor` faults.
    Differs = 3,
    /// The admin API can't be reached.
    Unreachable = 4,
    /// The admin token is not valid, or its role may not do this.
    Denied = 5,
    NotFound = 6,
    /// It can't be done as things stand, or was changed meanwhile.
    Conflict = 7,
    /// A field or file does not fit.
    Invalid = 8,
}

/// What `keyward --help` says of them.
pub const EXIT_CODES: &str = "Exit codes: 0 done; 1 failed; 2 the command line can't be read; 3 differences or faults were found; 4 the admin API can't be reached; \
5 the admin token may not do this; 6 there is no such object; 7 conflict, or it was changed meanwhile; 8 a field or file does not fit.";

impl Failure {
    pub fn new(code: Exit, message: impl Into<String>) -> Self {
        Failure { code, message: message.into() }
    }
}

impl From<String> for Failure {
    fn from(message: String) -> Self {
        Failure::new(Exit::Failed, message)
    }
}

impl From<&str> for Failure {
    fn from(message: &str) -> Self {
        Failure::new(Exit::Failed, message)
    }
}

impl From<Failure> for String {
    fn from(failure: Failure) -> Self {
        failure.message
    }
}
