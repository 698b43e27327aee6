//! NaN, infinities, nothing, one of everything, and weights of zero.

mod common;

use common::{INPUTS, Inputs, Pass, RULE, about, bits, numbers, pass};
use kilter_core::kernel::launch;
use kilter_core::moments::Channels;
use kilter_core::norm::{self, Affine, Data, Shape, Statistics, Upstream};
use kilter_core::optim::Scan;
use kilter_core::real::Real;
use kilter_core::storage::Storage;

fn shape((outer, channels, inner): (usize, usize, usize)) -> Shape {
    Shape { outer, channels, inner }
}

fn stats<S: Storage>(x: &[S], weights: Option<&[S::Real]>, shape: Shape) -> Channels {
    norm::stats(Data::new(x, weights, shape).unwrap())
}

/// The place of element (n, c, i).
fn at(shape: Shape, n: usize, c: usize, i: usize) -> usize {
    (n * shape.channels + c) * shape.inner + i
}

fn named<'a>(pass: &'a Pass, name: &str) -> &'a [u64] {
    &pass.results.iter().find(|result| result.0 == name).unwrap().1
}

/// Planes and columns, with whole groups of lanes and without, resident and not.
const SHAPES: [(usize, usize, usize); 6] = [(3, 5, 7), (2, 2, 5000), (4, 6, 49), (40, 3, 1), (9, 64, 1), (300, 20, 1)];

fn one_bad_value_stays_in_its_channel<S: Storage>(bad: f64) {
    for shape in SHAPES.map(shape) {
        let clean = about::<S>(2.0, shape.len(), 1);
        let (n, c, i) = (shape.outer - 1, shape.channels / 2, shape.inner / 2);
        let mut x = clean.clone();
        x[at(shape, n, c, i)] = S::narrow(S::Real::from_f64(bad));
        let (before, after) = (stats(&clean, None, shape), stats(&x, None, shape));
        for channel in 0..shape.channels {
            let (got, wanted) = ((after.mean[channel], after.m2[channel]), (before.mean[channel], before.m2[channel]));
            if channel == c {
                assert!(!got.0.is_finite() && got.1.is_nan(), "{bad} in {shape:?}: {got:?}");
            } else {
                assert_eq!(got, wanted, "{bad} in {shape:?}: channel {channel}, not {c}");
            }
        }
    }
}

#[test]
fn nan_and_infinity() {
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        every_dtype!(one_bad_value_stays_in_its_channel, bad);
    }
}

fn the_mask_keeps_nan<S: Storage>() {
    let of = |x: f64| S::narrow(S::Real::from_f64(x));
    let x = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0, -0.0, 0.0, 1.0].map(of);
    let wanted = [f64::NAN, f64::INFINITY, 0.0, 0.0, 0.0, 0.0, 1.0].map(of);
    let (zero, one) = ([S::Real::ZERO], [S::Real::ONE]);
    let affine = Affine::new(1, &zero, &zero, &one, &one, &zero).unwrap();
    for shape in [(1, 1, 7), (7, 1, 1)].map(shape) {
        let mut y = x;
        norm::apply(&x, shape, affine, None, true, &mut y).unwrap();
        assert_eq!(bits(&y.map(|y| S::narrow(y.widen().abs()))), bits(&wanted), "relu of {shape:?}");
        norm::apply(&x, shape, affine, None, false, &mut y).unwrap();
        assert!(y.iter().zip(&x).all(|(y, x)| y == x || y.widen().to_f64().is_nan() && x.widen().to_f64().is_nan()));
        // The gradient passes where z > 0, and is NaN where z is.
        let data = Data::new(&x, None, shape).unwrap();
        let dy = [of(2.0); 7];
        let up = Upstream::new(&dy, data, affine, None, true).unwrap();
        let sums = norm::Sums { first: 0, dy: vec![0.0], dy_xhat: vec![0.0] };
        let mut dx = x;
        norm::backward_apply(up, 7.0, &sums, &mut dx, None).unwrap();
        assert_eq!(dx[3..].iter().map(|x| x.widen().to_f64()).collect::<Vec<_>>(), [0.0, 0.0, 0.0, 2.0]);
    }
}

#[test]
fn relu() {
    every_dtype!(the_mask_keeps_nan);
}

fn nothing_is_nothing<S: Storage>(inputs: Inputs) {
    for shape in [(0, 3, 5), (0, 3, 1), (4, 0, 5), (4, 0, 1), (4, 3, 0), (0, 0, 0), (0, 8, 49)].map(shape) {
        for fused in [true, false] {
            let empty = pass::<S>(shape, inputs, fused);
            assert_eq!(named(&empty, "count").len(), 1);
            assert_eq!(named(&empty, "mean"), vec![0; shape.channels], "{shape:?} with {inputs:?}");
            assert_eq!(named(&empty, "m2"), vec![0; shape.channels], "{shape:?} with {inputs:?}");
            assert!(named(&empty, "y").is_empty() && named(&empty, "dx").is_empty());
            assert_eq!(named(&empty, "sum_dy"), vec![0; shape.channels], "{shape:?} with {inputs:?}");
        }
    }
    let found = launch(Scan::new(vec![S::source(&[]), S::source(&[])]));
    assert_eq!((found.squares, found.finite), (0.0, true));
}

#[test]
fn empty() {
    for inputs in INPUTS {
        every_dtype!(nothing_is_nothing, inputs);
    }
}

fn one_value_is_its_mean<S: Storage>() {
    for shape in [(1, 1, 1), (1, 7, 1), (1, 1, 2), (1, 40, 1)].map(shape) {
        let x: Vec<S> =
            (0..shape.len()).map(|i| S::narrow(S::Real::from_f64(1e3 + (i / shape.inner) as f64))).collect();
        let found = stats(&x, None, shape);
        assert_eq!(found.count, shape.inner as f64);
        for c in 0..shape.channels {
            assert_eq!(found.mean[c], x[c * shape.inner].widen().to_f64(), "mean of channel {c} of {shape:?}");
            assert_eq!(found.m2[c], 0.0, "m2 of channel {c} of {shape:?}");
        }
    }
}

#[test]
fn one_of_everything() {
    every_dtype!(one_value_is_its_mean);
}

fn a_constant_has_no_variance<S: Storage>() {
    for shape in SHAPES.map(shape) {
        for value in [0.1, 1e4, -3e-3] {
            let value = S::narrow(S::Real::from_f64(value));
            let x = vec![value; shape.len()];
            let (gamma, beta) = (vec![S::Real::ONE; shape.channels], numbers::<S::Real>(shape.channels, 1));
            let [mut hi, mut lo, mut rstd] = [(); 3].map(|()| vec![S::Real::ZERO; shape.channels]);
            let out = Statistics { hi: &mut hi, lo: &mut lo, rstd: &mut rstd, running: None };
            let mut y = x.clone();
            let data = Data::new(&x, None, shape).unwrap();
            let found = norm::train(data, RULE, &gamma, &beta, None, false, out, &mut y).unwrap();
            assert_eq!(found.m2, vec![0.0; shape.channels], "{shape:?}");
            for (i, y) in y.iter().enumerate() {
                assert!(*y == S::narrow(beta[i / shape.inner % shape.channels]), "y of {shape:?} at {i}");
            }
        }
    }
}

#[test]
fn constants() {
    every_dtype!(a_constant_has_no_variance);
}

/// Each sample fills a block, so that a sample of weight zero is a block of weight zero; and all are one part of the work.
const BLOCKS: [(usize, usize, usize); 3] = [(5, 2, 4096), (5, 6, 4096), (5, 1, 6000)];

fn a_block_without_weight_is_not_there<S: Storage>() {
    for shape in BLOCKS.map(shape) {
        let x = about::<S>(5.0, shape.len(), 1);
        let weights: Vec<_> = about::<S::Real>(1.0, shape.count(), 2).into_iter().map(|w| w.abs()).collect();
        for gone in [0, 2, 4] {
            let mut without = weights.clone();
            without[gone * shape.inner..(gone + 1) * shape.inner].fill(S::Real::ZERO);
            let keep = |n: &usize| *n != gone;
            let run = shape.channels * shape.inner;
            let rest: Vec<S> = (0..5).filter(keep).flat_map(|n| &x[n * run..(n + 1) * run]).copied().collect();
            let others: Vec<_> =
                (0..5).filter(keep).flat_map(|n| &weights[n * shape.inner..(n + 1) * shape.inner]).copied().collect();
            let found = stats(&x, Some(&without), shape);
            assert_eq!(found, stats(&rest, Some(&others), Shape { outer: 4, ..shape }), "{shape:?} without {gone}");
        }
    }
}

fn what_has_no_weight_is_not_read<S: Storage>() {
    for shape in SHAPES.into_iter().chain(BLOCKS).chain([(3000, 17, 1)]).map(shape) {
        let clean = about::<S>(5.0, shape.len(), 1);
        let mut weights: Vec<_> = about::<S::Real>(1.0, shape.count(), 2).into_iter().map(|w| w.abs()).collect();
        let mut x = clean.clone();
        for (place, w) in weights.iter_mut().enumerate().filter(|(place, _)| place % 3 == 0 || place % 64 > 40) {
            *w = S::Real::ZERO;
            for c in 0..shape.channels {
                let bad = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY][(place + c) % 3];
                x[at(shape, place / shape.inner, c, place % shape.inner)] = S::narrow(S::Real::from_f64(bad));
            }
        }
        let found = stats(&x, Some(&weights), shape);
        assert_eq!(found, stats(&clean, Some(&weights), shape), "{shape:?}");
        assert!(found.mean.iter().chain(&found.m2).all(|value| value.is_finite()));
        // No weight at all: nothing was seen.
        weights.fill(S::Real::ZERO);
        let none = stats(&x, Some(&weights), shape);
        assert_eq!((none.count, none.m2), (0.0, vec![0.0; shape.channels]), "{shape:?} without weights");
        assert!(none.mean.iter().all(|mean| *mean == 0.0), "{shape:?} without weights: {:?}", none.mean);
    }
}

fn weights_of_one_change_nothing<S: Storage>() {
    for shape in SHAPES.into_iter().chain(BLOCKS).map(shape) {
        let x = about::<S>(5.0, shape.len(), 1);
        let (plain, weighted) = (stats(&x, None, shape), stats(&x, Some(&vec![S::Real::ONE; shape.count()]), shape));
        assert_eq!(plain.count, weighted.count);
        for c in 0..shape.channels {
            let (mean, m2) = (plain.mean[c], plain.m2[c]);
            assert!((weighted.mean[c] - mean).abs() <= 1e-6 * mean.abs(), "mean of channel {c} of {shape:?}");
            assert!((weighted.m2[c] - m2).abs() <= 1e-6 * m2, "m2 of channel {c} of {shape:?}");
        }
    }
}

#[test]
fn weights() {
    every_dtype!(a_block_without_weight_is_not_there);
    every_dtype!(what_has_no_weight_is_not_read);
    every_dtype!(weights_of_one_change_nothing);
}

fn a_scan_tells_finite_from_not<S: Storage>() {
    for n in [1, 16, 17, 5000] {
        for place in [0, n / 2, n - 1] {
            let mut g = numbers::<S>(n, 1);
            assert!(launch(Scan::new(vec![S::source(&g)])).finite);
            for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                g[place] = S::narrow(S::Real::from_f64(bad));
                assert!(!launch(Scan::new(vec![S::source(&g)])).finite, "{bad} at {place} of {n}");
            }
        }
    }
}

#[test]
fn scans() {
    every_dtype!(a_scan_tells_finite_from_not);
    // Finite gradients may have squares that are not.
    let found = launch(Scan::new(vec![f64::source(&[1e200, 1.0])]));
    assert_eq!((found.squares, found.finite), (f64::INFINITY, true));
}
