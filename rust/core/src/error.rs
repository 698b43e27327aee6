//! What is said when arguments do not fit.

use std::fmt;

/// An argument that does not fit: its name, what was wanted, what came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    argument: String,
    wanted: String,
    got: String,
}

impl Error {
    /// The argument `argument` should have been `wanted` but was `got`.
    pub fn new(argument: impl fmt::Display, wanted: impl fmt::Display, got: impl fmt::Display) -> Self {
        Self { argument: argument.to_string(), wanted: wanted.to_string(), got: got.to_string() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: expected {}, got {}", self.argument, self.wanted, self.got)
    }
}

impl std::error::Error for Error {}

/// Refuses a slice of another length than `wanted`.
pub fn length<T>(argument: &str, slice: &[T], wanted: usize) -> Result<(), Error> {
    if slice.len() == wanted {
        return Ok(());
    }
    Err(Error::new(argument, format_args!("{wanted} elements"), slice.len()))
}
