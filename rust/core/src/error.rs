//! What is said when arguments do not fit.

use std::fmt;

/// An argument that does not fit: its name, what was wanted, what came. One word, as it is handed on in many places.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error(Box<[String; 3]>);

impl Error {
    /// The argument `argument` should have been `wanted` but was `got`.
    pub fn new(argument: impl fmt::Display, wanted: impl fmt::Display, got: impl fmt::Display) -> Self {
        Self(Box::new([argument.to_string(), wanted.to_string(), got.to_string()]))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [argument, wanted, got] = &*self.0;
        write!(f, "{argument}: expected {wanted}, got {got}")
    }
}

impl std::error::Error for Error {}

/// Refuses a slice of another length than `wanted`.
pub fn length<T>(argument: &str, slice: &[T], wanted: usize) -> Result<(), Error> {
    if slice.len() == wanted { Ok(()) } else { Err(wrong(argument, wanted, slice.len())) }
}

#[cold]
#[inline(never)]
fn wrong(argument: &str, wanted: usize, got: usize) -> Error {
    Error::new(argument, format_args!("{wanted} elements"), got)
}
