//! The same bits for every CPU level, every number of threads and every split, and for one call or several.

mod common;

use common::{INPUTS, RULES, Rule, about, bits, numbers, pass, state_of, step};
use kilter_core::bf16;
use kilter_core::ema::Ema;
use kilter_core::init::{Fill, Normal, Uniform, Variate, Words};
use kilter_core::kernel::{Kernel, grain, launch};
use kilter_core::loss::{Logits, Smoothing, SoftmaxCrossEntropy, Targets};
use kilter_core::norm::groups::{self, Grouped};
use kilter_core::norm::rows::{Backward, Forward, Residual};
use kilter_core::norm::{self, Affine, Shape};
use kilter_core::optim::Scan;
use kilter_core::probe::{Copy, Update};
use kilter_core::real::Real;
use kilter_core::simd::{Level, run_at};
use kilter_core::storage::Storage;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::process::Command;

/// Runs the parts that `launch` makes, one after the other.
fn tree<K: Kernel>(level: Level, kernel: K) -> K::Out {
    fn part<K: Kernel>(level: Level, kernel: K, grain: usize) -> K::Out {
        if kernel.bytes() <= grain {
            return run_at(level, kernel);
        }
        match kernel.halve() {
            Err(whole) => run_at(level, whole),
            Ok((left, right)) => K::merge(part(level, left, grain), part(level, right, grain)),
        }
    }
    let grain = grain(kernel.bytes());
    part(level, kernel, grain)
}

/// Halves `depth` times, or as often as it goes; the second half of each part first.
fn shatter<K: Kernel<Out = ()>>(level: Level, kernel: K, depth: usize) {
    if depth == 0 {
        return run_at(level, kernel);
    }
    match kernel.halve() {
        Err(whole) => run_at(level, whole),
        Ok((left, right)) => {
            shatter(level, right, depth - 1);
            shatter(level, left, depth - 1);
        }
    }
}

/// A way to run a kernel that hands nothing back.
trait Runner {
    fn run<K: Kernel<Out = ()>>(&self, kernel: K);
}
struct Launch;
struct Whole(Level);
struct Tree(Level);
struct Shatter(Level, usize);
impl Runner for Launch {
    fn run<K: Kernel<Out = ()>>(&self, kernel: K) {
        launch(kernel);
    }
}
impl Runner for Whole {
    fn run<K: Kernel<Out = ()>>(&self, kernel: K) {
        run_at(self.0, kernel);
    }
}
impl Runner for Tree {
    fn run<K: Kernel<Out = ()>>(&self, kernel: K) {
        tree(self.0, kernel);
    }
}
impl Runner for Shatter {
    fn run<K: Kernel<Out = ()>>(&self, kernel: K) {
        shatter(self.0, kernel, self.1);
    }
}

fn fill<S: Storage>(n: usize, variate: impl Variate, runner: &impl Runner) -> Vec<u64> {
    let mut out = vec![S::default(); n];
    runner.run(Fill::new(&mut out, variate, 7 << 33 | 5, 3, 0.5, 2.0));
    bits(&out)
}

fn ema<S: Storage>(n: usize, runner: &impl Runner) -> Vec<u64> {
    let (mut s, x) = (numbers::<S::Real>(n, 1), numbers::<S>(n, 2));
    runner.run(Ema::new(&mut s, &x, 0.1).unwrap());
    bits(&s)
}

/// Over tensors of several lengths, some of them empty; with masters or without.
fn stepped<S: Storage, A: Storage<Real = S::Real>>(
    n: usize,
    rule: Rule,
    masters: bool,
    runner: &impl Runner,
) -> Vec<u64> {
    let (mut p, g) = (numbers::<S>(n, 1), numbers::<S>(n, 2));
    let (mut state, mut exact) = (state_of::<A>(rule, n), numbers::<S::Real>(if masters { n } else { 0 }, 4));
    let (mut lengths, mut left) = (vec![], n);
    for cut in [0, 1, n / 3, 0, 37, n] {
        lengths.push(cut.min(left));
        left -= cut.min(left);
    }
    step(rule, &lengths, &mut p, &g, &mut state, &mut exact, |step| runner.run(step));
    [bits(&p), bits(&exact), state.iter().flat_map(|slot| bits(slot)).collect()].concat()
}

fn words(n: usize, runner: &impl Runner) -> Vec<u64> {
    let mut out = vec![0; n];
    runner.run(Words::new(&mut out, u64::MAX, 3, 1));
    out.into_iter().map(u64::from).collect()
}

fn probes(n: usize, runner: &impl Runner) -> Vec<u64> {
    let (g, mut a, mut b) = (numbers::<f32>(n, 1), numbers::<f32>(n, 2), numbers::<f32>(n, 3));
    runner.run(Update::new(vec![&g], vec![&mut a, &mut b]).unwrap());
    let mut copy = vec![0.0; n];
    runner.run(Copy::new(&g, &mut copy).unwrap());
    [bits(&a), bits(&b), bits(&copy)].concat()
}

fn elementwise<S: Storage>(n: usize, runner: &impl Runner) -> Vec<Vec<u64>> {
    // Of long arrays a few: how they are split is not the rules' affair.
    let rules = if n > 10_000 { &RULES[8..11] } else { &RULES[..] };
    let steps = rules.iter().map(|rule| stepped::<S, S::Real>(n, *rule, rule.3 == 2, runner));
    let mut all = vec![
        fill::<S>(n, Normal, runner),
        fill::<S>(n, Uniform, runner),
        ema::<S>(n, runner),
        words(n, runner),
        probes(n, runner),
        stepped::<bf16, bf16>(n, RULES[10], true, runner),
    ];
    all.extend(steps);
    all
}

fn elementwise_is_the_same_for_every_split<S: Storage>() {
    for n in [0, 1, 15, 16, 63, 64, 129, 1000, 70_001] {
        let whole = elementwise::<S>(n, &Whole(Level::Baseline));
        for level in Level::ALL {
            assert!(whole == elementwise::<S>(n, &Whole(level)), "{n} elements at {level:?}");
            for depth in [1, 2, 5, 30] {
                assert!(whole == elementwise::<S>(n, &Shatter(level, depth)), "{n} at {level:?}, depth {depth}");
            }
        }
    }
    let n = 600_000;
    let whole = elementwise::<S>(n, &Launch);
    for level in [Level::Baseline, Level::Avx2] {
        assert!(whole == elementwise::<S>(n, &Tree(level)), "launched, and in order at {level:?}");
    }
}

#[test]
fn elementwise_kernels() {
    every_dtype!(elementwise_is_the_same_for_every_split);
}

fn a_scan_follows_one_tree<S: Storage>() {
    for n in [0, 1, 100, 4097, 1_500_000] {
        let x = about::<S>(10.0, n, 1);
        let scan = || Scan::new(vec![S::source(&x[..n / 3]), S::source(&x[n / 3..])]);
        let launched = launch(scan());
        let exact: f64 = x.iter().map(|x| x.widen().to_f64().powi(2)).sum();
        assert!((launched.squares - exact).abs() <= 1e-12 * exact && launched.finite);
        for level in Level::ALL {
            assert_eq!(launched, tree(level, scan()), "{n} elements at {level:?}");
        }
    }
}

/// The loss and its gradient for labels or soft targets, smoothed, with and without weights, in both types.
fn cross_entropy((samples, classes): (usize, usize), launch: impl Fn(SoftmaxCrossEntropy<'_>) -> f64) -> Vec<Vec<u64>> {
    let n = samples * classes;
    let labels: Vec<f64> = (0..samples).map(|n| (7 * n % classes) as f64).collect();
    let q = vec![1.0 / classes as f64; n];
    let weights: Vec<f64> = about::<f64>(3.0, samples, 4);
    let (z64, z32) = (about::<f64>(0.0, n, 3), about::<f32>(0.0, n, 3));
    let mut found = vec![];
    for targets in [Targets::Labels(&labels), Targets::Soft(&q)] {
        for weights in [None, Some(&weights[..])] {
            let (mut dz64, mut dz32) = (vec![0.0; n], vec![0.0; n]);
            let losses = [Logits::F64(&z64, &mut dz64), Logits::F32(&z32, &mut dz32)].map(|logits| {
                let smoothing = Smoothing { on: 0.9, off: 0.02 };
                SoftmaxCrossEntropy::new(logits, classes, targets, smoothing, weights).map(&launch).unwrap()
            });
            found.extend([bits(&losses), bits(&dz64), bits(&dz32)]);
        }
    }
    found
}

fn losses_follow_one_tree() {
    for shape in [(0, 3), (1, 1), (51, 10), (1000, 10), (7, 513), (5, 40_000), (90_000, 3)] {
        let launched = cross_entropy(shape, |kernel| kernel.launch());
        for level in Level::ALL {
            assert!(launched == cross_entropy(shape, |kernel| tree(level, kernel)), "{shape:?} at {level:?}");
        }
    }
}

#[test]
fn reductions() {
    every_dtype!(a_scan_follows_one_tree);
    losses_follow_one_tree();
}

/// Resident and not, channels first and last, split inside the plane, by samples, by channels, or not at all.
const SHAPES: [(usize, usize, usize); 11] = [
    (1, 1, 2),
    (3, 5, 7),
    (6, 40, 49),
    (2, 4, 784),
    (5, 3, 5000),
    (2, 2, 140_000),
    (9, 1, 1),
    (37, 3, 1),
    (50, 16, 1),
    (700, 100, 1),
    (4000, 65, 1),
];

fn fused_equals_the_chain<S: Storage>(inputs: common::Inputs) {
    for (outer, channels, inner) in SHAPES {
        let shape = Shape { outer, channels, inner };
        let (one, several) = (pass::<S>(shape, inputs, true), pass::<S>(shape, inputs, false));
        for (fused, chain) in one.results.iter().zip(&several.results) {
            assert!(fused == chain, "{} of {shape:?} with {inputs:?}", fused.0);
        }
    }
}

#[test]
fn one_call_equals_several() {
    let resident = SHAPES.map(|(outer, channels, inner)| norm::one_pass(Shape { outer, channels, inner }, 4));
    assert!(resident.contains(&true) && resident.contains(&false));
    for inputs in INPUTS {
        every_dtype!(fused_equals_the_chain, inputs);
    }
}

/// Rows alone, in groups that are not full, of several blocks, and so many that they are split.
const ROWS: [(usize, usize); 9] =
    [(0, 3), (1, 1), (5, 16), (37, 3), (70, 64), (33, 4097), (3, 70_001), (9000, 65), (700, 1000)];

/// Layer norm or RMS norm, forward and backward, with a residual and the gradient of the sum where `extra`.
fn row_norm<S: Storage>(
    (rows, width): (usize, usize),
    (centred, extra): (bool, bool),
    forward: &impl Runner,
    backward: impl FnOnce(Backward<'_, S>) -> norm::Sums,
) -> Vec<u64> {
    let n = rows * width;
    let (x, dy, other) = (about::<S>(3.0, n, 1), numbers::<S>(n, 2), numbers::<S>(n, 3));
    let (gamma, beta) = (about::<S::Real>(1.0, width, 4), numbers::<S::Real>(width, 5));
    let [mut hi, mut lo, mut rstd] = [(); 3].map(|()| vec![S::Real::ZERO; rows]);
    let (mut y, mut dx, mut sum) = (x.clone(), x.clone(), x.clone());
    let mean = centred.then_some([&mut hi[..], &mut lo[..]]);
    let residual = extra.then_some(Residual { residual: &other, sum: &mut sum });
    forward.run(Forward::new(&x, residual, [&gamma, &beta], 1e-5, mean, &mut rstd, &mut y).unwrap());
    let mean = centred.then_some([&hi[..], &lo[..]]);
    let dsum = extra.then_some(&other[..]);
    let sums = backward(Backward::new(&dy, &sum, &gamma, mean, &rstd, dsum, &mut dx).unwrap());
    [bits(&y), bits(&sum), bits(&hi), bits(&lo), bits(&rstd), bits(&dx), bits(&sums.dy), bits(&sums.dy_xhat)].concat()
}

fn rows_are_the_same_for_every_split<S: Storage>() {
    for shape in ROWS {
        for kind in [(true, false), (true, true), (false, false)] {
            let whole = row_norm::<S>(shape, kind, &Launch, |kernel| launch(kernel));
            for level in Level::ALL {
                let split = row_norm::<S>(shape, kind, &Shatter(level, 30), |kernel| tree(level, kernel));
                assert!(whole == split, "{shape:?} {kind:?} at {level:?}");
            }
        }
    }
}

#[test]
fn rows() {
    every_dtype!(rows_are_the_same_for_every_split);
}

/// An array so large that it is split, against its samples one by one.
#[test]
fn normalising_a_large_array_equals_normalising_its_parts() {
    for (outer, channels, inner) in [(6, 10, 9000), (9000, 60, 1)] {
        let shape = Shape { outer, channels, inner };
        let (x, v) = (numbers::<f32>(shape.len(), 1), [1, 2, 3, 4, 5].map(|seed| numbers::<f32>(channels, seed)));
        let affine = Affine::new(channels, &v[0], &v[1], &v[2], &v[3], &v[4]).unwrap();
        let (mut whole, mut parts) = (x.clone(), x.clone());
        norm::apply(&x, shape, affine, None, true, &mut whole).unwrap();
        let run = channels * inner;
        for (x, y) in x.chunks(run).zip(parts.chunks_mut(run)) {
            norm::apply(x, Shape { outer: 1, ..shape }, affine, None, true, y).unwrap();
        }
        assert!(bits(&whole) == bits(&parts), "{shape:?}");
    }
}

/// Everything that group norm gives, forward and backward.
fn group_norm<S: Storage>(x: &[S], dy: &[S], shape: Grouped) -> Vec<Vec<u64>> {
    let (gamma, beta) = (about::<S::Real>(1.0, shape.channels(), 4), numbers::<S::Real>(shape.channels(), 5));
    let [mut mean, mut m2] = [(); 2].map(|()| vec![0.0; shape.groups()]);
    let (mut y, mut dx) = (x.to_vec(), x.to_vec());
    groups::forward(x, shape, 1e-5, &gamma, &beta, &mut mean, &mut m2, &mut y).unwrap();
    let reads = groups::Reads { dy, x, gamma: &gamma, mean: &mean, m2: &m2, eps: 1e-5 };
    let sums = groups::backward(reads, shape, &mut dx).unwrap();
    vec![bits(&y), bits(&mean), bits(&m2), bits(&dx), bits(&sums.dy), bits(&sums.dy_xhat)]
}

/// (samples, channels, inner, groups): by places and by runs, in chunks of several groups and of one.
const GROUPED: [(usize, usize, usize, usize); 7] = [
    (3, 12, 1, 4),
    (5, 6, 49, 6),
    (40, 64, 49, 8),
    (9, 6, 70, 2),
    (20, 48, 361, 16),
    (6, 4, 20_000, 2),
    (70, 600, 1, 3),
];

fn a_sample_is_the_same_alone<S: Storage>(last: bool) {
    for (samples, channels, inner, parts) in GROUPED {
        let shape = Grouped::new(samples, channels, inner, parts, last).unwrap();
        let one = Grouped::new(1, channels, inner, parts, last).unwrap();
        let (x, dy) = (about::<S>(3.0, shape.len(), 1), numbers::<S>(shape.len(), 2));
        let whole = group_norm(&x, &dy, shape);
        let alone: Vec<_> =
            x.chunks(one.len()).zip(dy.chunks(one.len())).map(|(x, dy)| group_norm(x, dy, one)).collect();
        for k in 0..4 {
            let parts: Vec<u64> = alone.iter().flat_map(|results| results[k].clone()).collect();
            assert!(whole[k] == parts, "result {k} of {shape:?}");
        }
        // The gradients of gamma and beta are the sums over the samples, but for the order of adding.
        for k in 4..6 {
            for c in 0..channels {
                let exact: f64 = alone.iter().map(|results| f64::from_bits(results[k][c])).sum();
                let size = (samples * inner) as f64;
                assert!((f64::from_bits(whole[k][c]) - exact).abs() <= 1e-6 * size, "sum {k}, {c} of {shape:?}");
            }
        }
    }
}

#[test]
fn samples_are_independent() {
    for last in [false, true] {
        every_dtype!(a_sample_is_the_same_alone, last);
    }
}

/// Prints a hash of everything; run by [`threads_and_levels`] in processes of their own, as both are chosen once.
#[test]
#[ignore = "a part of threads_and_levels"]
fn print_hash() {
    let mut hash = DefaultHasher::new();
    for (outer, channels, inner) in [(6, 40, 49), (160, 8, 784), (2, 2, 300_000), (8000, 64, 1), (100_000, 3, 1)] {
        let shape = Shape { outer, channels, inner };
        for inputs in INPUTS {
            pass::<f32>(shape, inputs, true).results.hash(&mut hash);
        }
        pass::<f64>(shape, INPUTS[3], true).results.hash(&mut hash);
        pass::<bf16>(shape, INPUTS[1], false).results.hash(&mut hash);
        pass::<kilter_core::f16>(shape, INPUTS[1], false).results.hash(&mut hash);
    }
    for shape in [(30_000, 64), (3000, 1000), (40, 65_537)] {
        row_norm::<f32>(shape, (true, true), &Launch, |kernel| launch(kernel)).hash(&mut hash);
        row_norm::<bf16>(shape, (false, false), &Launch, |kernel| launch(kernel)).hash(&mut hash);
    }
    elementwise::<f32>(600_000, &Launch).hash(&mut hash);
    cross_entropy((60_000, 10), |kernel| kernel.launch()).hash(&mut hash);
    let large = [(3, 2, 1_000_000, 1), (1, 6, 700_000, 3), (2000, 8, 49, 8), (4, 64, 5000, 16), (3000, 300, 1, 30)];
    for (samples, channels, inner, parts) in GROUPED.into_iter().chain(large) {
        for last in [false, true] {
            let shape = Grouped::new(samples, channels, inner, parts, last).unwrap();
            let (x, dy) = (about::<f32>(3.0, shape.len(), 1), numbers::<f32>(shape.len(), 2));
            group_norm(&x, &dy, shape).hash(&mut hash);
        }
    }
    println!("hash {:x} {:?} {}", hash.finish(), kilter_core::simd::level(), kilter_core::kernel::threads());
}

#[test]
fn threads_and_levels() {
    let run = |threads: &str, level: &str| {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "print_hash", "--ignored", "--nocapture"]);
        let done = child.env("KILTER_NUM_THREADS", threads).env("KILTER_SIMD", level).output().unwrap();
        let text = String::from_utf8(done.stdout).unwrap();
        let found = text.split("hash ").nth(1).unwrap_or_else(|| panic!("no hash in {text}"));
        let words: Vec<_> = found.split_whitespace().map(str::to_string).collect();
        assert_eq!(words[2], threads);
        words[0].clone()
    };
    let first = run("1", "baseline");
    for (threads, level) in [("1", "avx512"), ("2", "avx512"), ("3", "baseline"), ("7", "avx2")] {
        assert_eq!(first, run(threads, level), "{threads} threads at {level}");
    }
}
