//! Opens arrays: the only place that turns a NumPy array into a slice.
//!
//! A function first names all its arrays to one [`Opening`], which checks dtype, layout and flags of each and notes where
//! it lies. Only when the writable ones overlap nothing are slices handed out, each array's once.

use crate::gate::{KilterError, LayoutError, Outcome, error};
use kilter_core::{Error, bf16, f16};
use numpy::npyffi::flags::{NPY_ARRAY_ALIGNED, NPY_ARRAY_C_CONTIGUOUS, NPY_ARRAY_WRITEABLE};
use numpy::npyffi::{NPY_TYPES, PyArrayObject};
use numpy::{PyArrayDescrMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use std::cell::Cell;
use std::fmt;

/// Element types that arrays may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    F64,
    F32,
    F16,
    Bf16,
    U32,
}

impl Dtype {
    /// NumPy's name.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F64 => "float64",
            Dtype::F32 => "float32",
            Dtype::F16 => "float16",
            Dtype::Bf16 => "bfloat16",
            Dtype::U32 => "uint32",
        }
    }
}

/// A Rust type that is the element type of some arrays.
pub trait Element: Copy + Send + Sync {
    /// The dtype of those arrays.
    const DTYPE: Dtype;
}

impl Element for f64 {
    const DTYPE: Dtype = Dtype::F64;
}
impl Element for f32 {
    const DTYPE: Dtype = Dtype::F32;
}
impl Element for f16 {
    const DTYPE: Dtype = Dtype::F16;
}
impl Element for bf16 {
    const DTYPE: Dtype = Dtype::Bf16;
}
impl Element for u32 {
    const DTYPE: Dtype = Dtype::U32;
}

/// The number that NumPy gave to the bfloat16 of ml_dtypes; -1 where that is not installed.
fn bfloat16_number(py: Python<'_>) -> i32 {
    static NUMBER: PyOnceLock<i32> = PyOnceLock::new();
    let find = || -> PyResult<i32> {
        let scalar = py.import("ml_dtypes")?.getattr("bfloat16")?;
        py.import("numpy")?.getattr("dtype")?.call1((scalar,))?.getattr("num")?.extract()
    };
    *NUMBER.get_or_init(py, || find().unwrap_or(-1))
}

fn dtype(name: Name<'_>, array: &Bound<'_, PyUntypedArray>) -> Outcome<Dtype> {
    let number = array.dtype().num();
    Ok(match number {
        n if n == NPY_TYPES::NPY_DOUBLE as i32 => Dtype::F64,
        n if n == NPY_TYPES::NPY_FLOAT as i32 => Dtype::F32,
        n if n == NPY_TYPES::NPY_HALF as i32 => Dtype::F16,
        n if n == NPY_TYPES::NPY_UINT as i32 => Dtype::U32,
        n if n >= 256 && n == bfloat16_number(array.py()) => Dtype::Bf16,
        _ => {
            let wanted = "dtype float64, float32, float16 or bfloat16";
            return Err(error(Error::new(name, wanted, array.dtype().as_any())));
        }
    })
}

/// What an array is called in messages: `name`, or `role[name]` for one of a list.
#[derive(Clone, Copy)]
pub struct Name<'a> {
    role: &'static str,
    name: &'a str,
}

impl<'a> Name<'a> {
    /// The array `name` of the list `role`.
    pub fn of(role: &'static str, name: &'a str) -> Self {
        Self { role, name }
    }
}

impl<'a> From<&'a str> for Name<'a> {
    fn from(name: &'a str) -> Self {
        Self { role: "", name }
    }
}

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.role {
            "" => write!(f, "{}", self.name),
            role => write!(f, "{role}[{}]", self.name),
        }
    }
}

/// An array that was checked and noted, but not yet opened.
pub struct Noted<'a> {
    name: Name<'a>,
    /// Its element type.
    pub dtype: Dtype,
    start: *mut u8,
    len: usize,
    writable: bool,
    opened: Cell<bool>,
    shape: &'a [usize],
}

impl<'a> Noted<'a> {
    /// The extent of every axis.
    pub fn shape(&self) -> &'a [usize] {
        self.shape
    }

    /// What it is called in messages.
    pub fn name(&self) -> Name<'a> {
        self.name
    }
}

/// The arrays of one call, before any of them is opened.
pub struct Opening<'a> {
    ranges: Vec<(usize, usize, bool, Name<'a>)>,
}

impl Default for Opening<'_> {
    /// Room for the arrays of most calls: growing to it takes four allocations.
    fn default() -> Self {
        Self { ranges: Vec::with_capacity(24) }
    }
}

impl<'a> Opening<'a> {
    /// Notes an array that is read.
    pub fn read(&mut self, name: impl Into<Name<'a>>, array: &'a Bound<'_, PyAny>) -> Outcome<Noted<'a>> {
        self.note(name.into(), array, false)
    }

    /// Notes an array that is written.
    pub fn write(&mut self, name: impl Into<Name<'a>>, array: &'a Bound<'_, PyAny>) -> Outcome<Noted<'a>> {
        self.note(name.into(), array, true)
    }

    /// Notes an array that may be missing.
    pub fn maybe(&mut self, name: &'a str, array: Option<&'a Bound<'_, PyAny>>) -> Outcome<Option<Noted<'a>>> {
        array.map(|array| self.read(name, array)).transpose()
    }

    /// Notes an array that is written unless it is missing.
    pub fn maybe_write(&mut self, name: &'a str, array: Option<&'a Bound<'_, PyAny>>) -> Outcome<Option<Noted<'a>>> {
        array.map(|array| self.write(name, array)).transpose()
    }

    fn note(&mut self, name: Name<'a>, array: &'a Bound<'_, PyAny>, writable: bool) -> Outcome<Noted<'a>> {
        let Ok(array) = array.cast::<PyUntypedArray>() else {
            return Err(error(Error::new(name, "a NumPy array", array.get_type().qualname()?)));
        };
        let dtype = dtype(name, array)?;
        let object: *mut PyArrayObject = array.as_array_ptr();
        // SAFETY: `cast` checked that the object is an ndarray and the Bound keeps it alive.
        let (start, flags) = unsafe { ((*object).fields.data.cast::<u8>(), (*object).fields.flags) };
        let needed = NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED;
        if flags & needed != needed || array.dtype().is_native_byteorder() == Some(false) {
            let wanted =
                format!("{name}: expected a C-contiguous, aligned array of native byte order, got another layout");
            return Err(LayoutError::new_err(wanted).into());
        }
        if writable && flags & NPY_ARRAY_WRITEABLE == 0 {
            return Err(error(Error::new(name, "a writable array", "a read-only one")));
        }
        let (len, shape) = (array.len(), array.shape());
        if len > 0 {
            let from = start.addr();
            self.ranges.push((from, from + len * array.dtype().itemsize(), writable, name));
        }
        let opened = Cell::new(false);
        Ok(Noted { name, dtype, start, len, writable, opened, shape })
    }

    /// Refuses writable arrays that share memory with any other.
    pub fn check(mut self) -> Outcome<Checked> {
        self.ranges.sort_unstable_by_key(|range| range.0);
        // The furthest end so far of any range, and of the writable ones.
        let (mut any, mut written): (Option<usize>, Option<usize>) = (None, None);
        for (i, (start, end, writable, name)) in self.ranges.iter().enumerate() {
            let rival = if *writable { any } else { written };
            if let Some(j) = rival.filter(|j| self.ranges[*j].1 > *start) {
                let (out, other) = if *writable { (name, &self.ranges[j].3) } else { (&self.ranges[j].3, name) };
                let message = format!("{out}: expected memory of its own, got memory shared with {other}");
                return Err(KilterError::new_err(message).into());
            }
            if any.is_none_or(|j| self.ranges[j].1 < *end) {
                any = Some(i);
            }
            if *writable && written.is_none_or(|j| self.ranges[j].1 < *end) {
                written = Some(i);
            }
        }
        Ok(Checked(()))
    }
}

/// Says that no writable array of this call shares memory with another.
pub struct Checked(());

impl Checked {
    /// The elements of an array.
    pub fn read<'a, T: Element>(&self, array: &Noted<'a>) -> Outcome<&'a [T]> {
        self.fits(array, T::DTYPE, false)?;
        if array.len == 0 {
            return Ok(&[]);
        }
        // SAFETY: `note` found the array aligned, C-contiguous, of native byte order; `fits` that its elements are T;
        // `check` that no slice of this call writes to it. The caller holds the array for 'a, so it is neither freed nor
        // resized (NumPy refuses to resize a referenced array). Writes from elsewhere during a call are the data races
        // that every NumPy function has; the public documentation forbids them.
        Ok(unsafe { std::slice::from_raw_parts(array.start.cast(), array.len) })
    }

    /// The elements of an array, or None where it is missing.
    pub fn maybe<'a, T: Element>(&self, array: &Option<Noted<'a>>) -> Outcome<Option<&'a [T]>> {
        array.as_ref().map(|array| self.read(array)).transpose()
    }

    /// The elements of an array that is written.
    pub fn write<'a, T: Element>(&self, array: &Noted<'a>) -> Outcome<&'a mut [T]> {
        self.fits(array, T::DTYPE, true)?;
        if array.len == 0 {
            return Ok(&mut []);
        }
        // SAFETY: as in `read`; besides, `note` found the array writable, `check` that it shares memory with no other of
        // this call, and `fits` that this is the only slice of it.
        Ok(unsafe { std::slice::from_raw_parts_mut(array.start.cast(), array.len) })
    }

    /// The elements of an array that is written unless it is missing.
    pub fn maybe_write<'a, T: Element>(&self, array: &Option<Noted<'a>>) -> Outcome<Option<&'a mut [T]>> {
        array.as_ref().map(|array| self.write(array)).transpose()
    }

    #[inline(never)] // once for all element types
    fn fits(&self, array: &Noted<'_>, dtype: Dtype, write: bool) -> Outcome<()> {
        if array.dtype != dtype {
            return Err(error(Error::new(array.name, dtype.name(), array.dtype.name())));
        }
        if write && (!array.writable || array.opened.replace(true)) {
            return Err(KilterError::new_err(format!("{}: opened for writing twice", array.name)).into());
        }
        Ok(())
    }
}
