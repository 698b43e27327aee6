//! The Python extension of kilter: opens arrays, launches kernels, computes nothing.
//!
//! Every function fills arrays that are given to it and returns None, but for the loss, which returns its number. The CUDA
//! backend has functions of the same names and arguments. What the arguments mean stands in `_kilter.pyi` and, in full, at
//! the public functions.

mod array;
mod gate;
mod groups;
mod init;
mod loss;
mod norm;
mod norm_backward;
mod optim;
mod probe;
mod rows;
mod stats;

use pyo3::prelude::*;

/// The level of SIMD instructions in use: baseline, avx2 or avx512.
#[pyfunction]
fn simd_level() -> &'static str {
    kilter_core::simd::level().name()
}

/// The number of threads in use.
#[pyfunction]
fn num_threads() -> usize {
    kilter_core::kernel::threads()
}

/// To be called in a child process right after a fork.
#[pyfunction]
fn after_fork() {
    kilter_core::kernel::after_fork();
}

#[pymodule]
fn _kilter(m: &Bound<'_, PyModule>) -> PyResult<()> {
    kilter_core::simd::configured().map_err(gate::error)?;
    kilter_core::kernel::configured_threads().map_err(gate::error)?;
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    m.add("KilterError", m.py().get_type::<gate::KilterError>())?;
    m.add("LayoutError", m.py().get_type::<gate::LayoutError>())?;
    m.add_function(wrap_pyfunction!(simd_level, m)?)?;
    m.add_function(wrap_pyfunction!(num_threads, m)?)?;
    m.add_function(wrap_pyfunction!(after_fork, m)?)?;
    norm::register(m)?;
    norm_backward::register(m)?;
    rows::register(m)?;
    groups::register(m)?;
    stats::register(m)?;
    optim::register(m)?;
    init::register(m)?;
    loss::register(m)?;
    probe::register(m)
}
