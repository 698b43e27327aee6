//! The kernels of kilter: batch statistics and normalisation, optimizer steps and random fills, at the speed of
//! memory and with the same bits for any thread count and SIMD level.
//!
//! The map, from the ground up:
//!
//! * [`error`]: what is said when lengths or values do not fit.
//! * [`real`], [`storage`]: the arithmetic of a kernel (f32, f64) and what lies in memory (f64, f32, f16, bf16).
//! * [`stored`]: arrays whose element type is known at run time only.
//! * [`simd`]: the CPU level, the door through which a kernel gets wide registers, streaming stores.
//! * [`kernel`]: the trait of everything that runs, and [`kernel::launch`], which splits it over threads.
//! * [`lanes`], [`sum`]: the two loops that kernels are made of: map over runs, sum over runs.
//! * [`moments`]: count, mean and centred second moment: per block, and merged.
//! * [`norm`]: batch norm over planes (channels first) and over columns (channels last); layer and RMS norm over
//!   rows; group and instance norm.
//! * [`ema`]: exponential moving averages.
//! * [`optim`]: one Step kernel that carries every update rule over many tensors.
//! * [`rng`], [`init`]: Philox4x32-10 and the fills made from it.
//! * [`exp`], [`loss`]: the exponential and the logarithm; softmax with cross-entropy.
//! * [`probe`]: the yardsticks: how fast this machine moves the same bytes with no arithmetic.
//!
//! A kernel is a struct that borrows its slices. Its `new` checks every length, so one that exists is valid:
//!
//! ```
//! use kilter_core::{init::{Fill, Normal}, kernel::launch};
//! let mut weights = vec![0f32; 1000];
//! launch(Fill::new(&mut weights, Normal, 42, 0, 0.0, 0.05));
//! assert!(weights.iter().all(|w| w.abs() < 0.5));
//! ```
//!
//! The order of every addition is a function of the operation, the dtype, the shape and the axis alone: lanes and
//! blocks have fixed sizes, work is halved at places that depend on the shape, and partial results merge along that
//! fixed tree. Nothing contracts a product and a sum into one rounding.

pub mod ema;
pub mod error;
pub mod exp;
pub mod init;
pub mod kernel;
pub mod lanes;
pub mod loss;
pub mod moments;
pub mod norm;
pub mod optim;
pub mod probe;
pub mod real;
pub mod rng;
pub mod simd;
pub mod storage;
pub mod stored;
pub mod sum;

pub use error::Error;
pub use half::{bf16, f16};
