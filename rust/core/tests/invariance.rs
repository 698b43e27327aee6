//! The same bits for every CPU level, every number of threads and every split, and for one call or several.

mod common;

use common::{INPUTS, about, bits, numbers, pass};
use kilter_core::ema::Ema;
use kilter_core::init::{Fill, Normal, Uniform, Variate, Words};
use kilter_core::kernel::{Kernel, launch};
use kilter_core::norm::{self, Affine, Shape};
use kilter_core::optim::rules::{Adam, AdamOptions, AmsGrad};
use kilter_core::optim::{Prepare, Rule, Scan, Step, Tensor};
use kilter_core::probe::{Copy, Update};
use kilter_core::real::Real;
use kilter_core::simd::{Level, run_at};
use kilter_core::storage::Storage;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::process::Command;

const ADAM: AdamOptions =
    AdamOptions { lr: 1e-2, l2: 0.1, keep: 0.99, beta1: 0.9, beta2: 0.999, eps: 1e-8, bias1: 0.1, bias2: 0.001 };

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
    let grain = (1 << 20).max(kernel.bytes() / 32);
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

/// Over tensors of several lengths, some of them empty.
fn step<S: Storage, const N: usize>(n: usize, rule: impl Rule<S::Real, N>, runner: &impl Runner) -> Vec<u64> {
    let (mut p, g) = (numbers::<S>(n, 1), numbers::<S>(n, 2));
    let mut state = [(); N].map(|()| about::<S::Real>(4.0, n, 3));
    let mut masters = numbers::<S::Real>(n, 4);
    let (mut tensors, mut rest) = (Vec::new(), &mut p[..]);
    for cut in [0, 1, n / 3, 0, 37, n] {
        let (tensor, after) = rest.split_at_mut(cut.min(rest.len()));
        let from = n - after.len() - tensor.len();
        let g = &g[from..from + tensor.len()];
        tensors.push(Tensor::new("p", tensor, g).unwrap());
        rest = after;
    }
    let slots = state.each_mut().map(|slot| &mut slot[..]);
    runner.run(Step::new(rule, Prepare::new(0.5, 1.0), tensors, slots, Some(&mut masters)).unwrap());
    [bits(&p), bits(&masters), state.map(|slot| bits(&slot)).concat()].concat()
}

fn words(n: usize, runner: &impl Runner) -> Vec<u64> {
    let mut out = vec![0; n];
    runner.run(Words::new(&mut out, u64::MAX, 3, 1));
    out.into_iter().map(u64::from).collect()
}

fn probes(n: usize, runner: &impl Runner) -> Vec<u64> {
    let (g, mut a, mut b) = (numbers::<f32>(n, 1), numbers::<f32>(n, 2), numbers::<f32>(n, 3));
    runner.run(Update::new(&g, vec![&mut a, &mut b]).unwrap());
    let mut copy = vec![0.0; n];
    runner.run(Copy::new(&g, &mut copy).unwrap());
    [bits(&a), bits(&b), bits(&copy)].concat()
}

fn elementwise<S: Storage>(n: usize, runner: &impl Runner) -> Vec<Vec<u64>> {
    let adam = Adam::new(ADAM);
    vec![
        fill::<S>(n, Normal, runner),
        fill::<S>(n, Uniform, runner),
        ema::<S>(n, runner),
        step::<S, 2>(n, adam, runner),
        step::<S, 3>(n, AmsGrad(adam), runner),
        words(n, runner),
        probes(n, runner),
    ]
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
        let scan = || Scan::new(vec![&x[..n / 3], &x[n / 3..]]);
        let launched = launch(scan());
        let exact: f64 = x.iter().map(|x| x.widen().to_f64().powi(2)).sum();
        assert!((launched.squares - exact).abs() <= 1e-12 * exact && launched.finite);
        for level in Level::ALL {
            assert_eq!(launched, tree(level, scan()), "{n} elements at {level:?}");
        }
    }
}

#[test]
fn reductions() {
    every_dtype!(a_scan_follows_one_tree);
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
        pass::<kilter_core::bf16>(shape, INPUTS[1], false).results.hash(&mut hash);
        pass::<kilter_core::f16>(shape, INPUTS[1], false).results.hash(&mut hash);
    }
    elementwise::<f32>(600_000, &Launch).hash(&mut hash);
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
