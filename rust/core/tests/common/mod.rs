//! What the tests share: numbers to feed, bits to compare, batch norm in one call.
#![allow(dead_code)]

use kilter_core::norm::{self, Affine, Data, Finish, Shape, Statistics, Upstream};
use kilter_core::optim::{Prepare, Step, Tensor, named};
use kilter_core::real::Real;
use kilter_core::storage::Storage;

pub const RULE: Finish = Finish { eps: 1e-5, momentum: 0.1, unbiased: true };

/// Numbers of about normal distribution about `mean`, the same for the same seed.
pub fn about<S: Storage>(mean: f64, n: usize, seed: u64) -> Vec<S> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f64 / (1u64 << 24) as f64 - 0.5
    };
    (0..n).map(|_| S::narrow(S::Real::from_f64(mean + 2.0 * (next() + next() + next())))).collect()
}

pub fn numbers<S: Storage>(n: usize, seed: u64) -> Vec<S> {
    about(0.3, n, seed)
}

/// Whole numbers so small that every order of adding them gives the same sum.
pub fn integers<S: Storage>(n: usize, seed: u64) -> Vec<S> {
    let rounded = |x: S| S::narrow(S::Real::from_f64((x.widen().to_f64() * 4.0).round()));
    numbers(n, seed).into_iter().map(rounded).collect()
}

/// The bits of every number; all NaNs count as one.
pub fn bits<S: Storage>(numbers: &[S]) -> Vec<u64> {
    let canonical = |x: f64| if x.is_nan() { f64::NAN } else { x };
    numbers.iter().map(|x| canonical(x.widen().to_f64()).to_bits()).collect()
}

/// A rule by name with its scalars, and how many windows and other slots it has.
pub type Rule = (&'static str, &'static [f64], usize, usize);

pub const RULES: [Rule; 17] = [
    ("sgd", &[1e-2, 0.1], 0, 0),
    ("momentum", &[0.1, 0.9, 0.5, 1e-2, 3e-3], 0, 1),
    ("rmsprop", &[1e-2, 0.1, 1e-8, 0.1, 1.0, 1.0, 0.0], 0, 1),
    ("rmsprop_momentum", &[1e-2, 0.1, 1e-8, 0.1, 1.0, 0.0, 0.9], 0, 2),
    ("rmsprop_centered", &[1e-2, 0.1, 1e-8, 0.1, 1.0, 0.0, 0.0], 0, 2),
    ("rmsprop_centered_momentum", &[1e-2, 0.1, 1e-8, 0.1, 1.0, 0.0, 0.9], 0, 3),
    ("rmsprop_window", &[1e-2, 0.1, 1e-8, 0.3, 0.4, 0.0], 1, 0),
    ("rmsprop_window_momentum", &[1e-2, 0.1, 1e-8, 0.3, 0.4, 0.9], 1, 1),
    ("adadelta", &[1.0, 0.1, 1e-6, 0.9], 0, 2),
    ("adadelta_window", &[1.0, 0.1, 1e-6, 0.3, 0.4, 0.5, 0.2], 2, 1),
    ("adam", &[0.1, 0.99, 0.9, 0.999, 1e-8, 0.001, 1e-2, 0.0], 0, 2),
    ("nadam", &[0.1, 0.99, 0.9, 0.999, 1e-8, 0.001, 1e-2, 1e-3], 0, 2),
    ("amsgrad", &[0.1, 0.99, 0.9, 0.999, 1e-8, 0.001, 1e-2, 0.0], 0, 3),
    ("adamax", &[0.1, 0.9, 0.999, 1e-8, 1e-2], 0, 2),
    ("lion", &[1e-2, 0.99, 0.9, 0.99], 0, 1),
    ("newton", &[1.0, 1e-4, 100.0, 0.01], 0, 1),
    ("curvature", &[0.1], 0, 0),
];

/// The rows of a rule's windows, the oldest first, and then its other slots.
pub fn state_of<A: Storage>((_, _, windows, slots): Rule, n: usize) -> Vec<Vec<A>> {
    (0..3 * windows + slots).map(|k| about(4.0, n, 3 + k as u64)).collect()
}

/// One step of a rule over tensors of these lengths, which follow each other; empty `masters` are none.
pub fn step<S: Storage, A: Storage<Real = S::Real>>(
    (name, h, windows, _): Rule,
    lengths: &[usize],
    p: &mut [S],
    g: &[S],
    state: &mut [Vec<A>],
    masters: &mut [S::Real],
    run: impl FnOnce(Step<'_, S::Real>),
) {
    let rule = named::<S::Real>(name, h).unwrap();
    let (mut tensors, mut rest, mut from) = (vec![], p, 0);
    for n in lengths {
        let (tensor, after) = rest.split_at_mut(*n);
        tensors.push(Tensor::new("p", S::stored(tensor), S::source(&g[from..from + n])).unwrap());
        (rest, from) = (after, from + n);
    }
    let (rows, slots) = state.split_at_mut(3 * windows);
    let windows = rows.chunks_mut(3).map(|rows| rows.iter_mut().map(|row| A::stored(row)).collect()).collect();
    let slots = slots.iter_mut().map(|slot| A::stored(slot)).collect();
    let masters = if masters.is_empty() { None } else { Some(masters) };
    run(Step::new(&*rule, Prepare::new(0.5, 0.75), tensors, windows, slots, masters).unwrap());
}

/// Everything that a forward and a backward pass give.
#[derive(Debug, PartialEq)]
pub struct Pass {
    pub results: Vec<(&'static str, Vec<u64>)>,
}

/// Which inputs a pass has.
#[derive(Debug, Clone, Copy)]
pub struct Inputs {
    pub weights: bool,
    pub residual: bool,
    pub relu: bool,
}

pub const INPUTS: [Inputs; 4] = [
    Inputs { weights: false, residual: false, relu: false },
    Inputs { weights: false, residual: true, relu: true },
    Inputs { weights: true, residual: false, relu: true },
    Inputs { weights: true, residual: true, relu: true },
];

/// A forward and a backward pass, each in one call where `fused`, else step by step.
pub fn pass<S: Storage>(shape: Shape, inputs: Inputs, fused: bool) -> Pass {
    let (n, channels) = (shape.len(), shape.channels);
    let (x, dy, residual) = (about::<S>(3.0, n, 1), numbers::<S>(n, 2), numbers::<S>(n, 3));
    let (gamma, beta) = (about::<S::Real>(1.0, channels, 4), numbers::<S::Real>(channels, 5));
    let weights =
        about::<S::Real>(2.0, shape.count(), 6).into_iter().map(|w| if w < S::Real::ZERO { S::Real::ZERO } else { w });
    let weights: Vec<_> = weights.collect();
    let weights = inputs.weights.then_some(&weights[..]);
    let residual = inputs.residual.then_some(&residual[..]);

    let data = Data::new(&x, weights, shape).unwrap();
    let [mut hi, mut lo, mut rstd] = [(); 3].map(|()| vec![S::Real::ZERO; channels]);
    let (mut running_mean, mut running_var) = (vec![S::Real::ZERO; channels], vec![S::Real::ONE; channels]);
    let (mut y, mut dx, mut dresidual) = (x.clone(), x.clone(), x.clone());
    let out =
        Statistics { hi: &mut hi, lo: &mut lo, rstd: &mut rstd, running: Some((&mut running_mean, &mut running_var)) };
    let moments = if fused {
        norm::train(data, RULE, &gamma, &beta, residual, inputs.relu, out, &mut y).unwrap()
    } else {
        let moments = norm::stats(data);
        norm::finish(moments.count, &moments.mean, &moments.m2, RULE, out).unwrap();
        let affine = Affine::new(channels, &hi, &lo, &rstd, &gamma, &beta).unwrap();
        norm::apply(&x, shape, affine, residual, inputs.relu, &mut y).unwrap();
        moments
    };
    let affine = Affine::new(channels, &hi, &lo, &rstd, &gamma, &beta).unwrap();
    let up = Upstream::new(&dy, data, affine, residual, inputs.relu).unwrap();
    let dr = residual.is_some().then_some(&mut dresidual[..]);
    let sums = if fused {
        norm::backward(up, moments.count, &mut dx, dr).unwrap()
    } else {
        let sums = norm::backward_reduce(up);
        norm::backward_apply(up, moments.count, &sums, &mut dx, dr).unwrap();
        sums
    };
    let results = vec![
        ("count", bits(&[moments.count])),
        ("mean", bits(&moments.mean)),
        ("m2", bits(&moments.m2)),
        ("hi", bits(&hi)),
        ("lo", bits(&lo)),
        ("rstd", bits(&rstd)),
        ("running_mean", bits(&running_mean)),
        ("running_var", bits(&running_var)),
        ("y", bits(&y)),
        ("sum_dy", bits(&sums.dy)),
        ("sum_dy_xhat", bits(&sums.dy_xhat)),
        ("dx", bits(&dx)),
        ("dresidual", bits(&dresidual)),
    ];
    Pass { results }
}

/// Calls a generic function for f64, f32, f16 and bf16.
#[macro_export]
macro_rules! every_dtype {
    ($test:ident $(, $argument:expr)*) => {
        $test::<f64>($($argument),*);
        $test::<f32>($($argument),*);
        $test::<kilter_core::f16>($($argument),*);
        $test::<kilter_core::bf16>($($argument),*);
    };
}
