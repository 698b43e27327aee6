//! The one place where the interpreter is released and errors become Python's.

use kilter_core::Error;
use pyo3::create_exception;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

create_exception!(kilter, KilterError, PyValueError, "An argument does not fit; the message names it.");
create_exception!(kilter, LayoutError, KilterError, "An input would have to be copied first; Python does that.");

/// An error of the core as Python's.
pub fn error(error: Error) -> PyErr {
    KilterError::new_err(error.to_string())
}

/// Runs `work` without the interpreter's lock.
pub fn run<R: Send>(py: Python<'_>, work: impl FnOnce() -> Result<R, Error> + Send) -> PyResult<R> {
    py.detach(work).map_err(error)
}
