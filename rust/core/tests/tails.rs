//! Every length and every start: the loops over groups of 16 against loops over one element at a time.

mod common;

use common::{bits, integers, numbers};
use kilter_core::init::{Fill, Normal, Uniform, Words};
use kilter_core::lanes::{LANES, Stores, Sum, map};
use kilter_core::optim::rules::{Adam, AdamOptions, AmsGrad, Momentum, Nesterov, Sgd};
use kilter_core::optim::{Prepare, Rule, Step, Tensor};
use kilter_core::real::Real;
use kilter_core::rng::{GROUP, group, normal_pair, unit};
use kilter_core::simd::{Level, run_at};
use kilter_core::storage::Storage;
use std::array::from_fn;

/// All short lengths, and those about the ends of a chain (512) and of a block (4096).
fn lengths() -> impl Iterator<Item = usize> {
    (0..=70).chain(505..=520).chain(4090..=4100)
}

const LONGEST: usize = 4100;
/// The loops of the wide levels, and the compact one.
const LOOPS: [Level; 2] = [Level::Avx2, Level::Baseline];
const STORES: [Stores; 3] = [Stores::Cached, Stores::Streamed { from: 16 }, Stores::Streamed { from: 64 }];

fn map_reaches_every_element<S: Storage>() {
    let (x, r) = (numbers::<S>(LONGEST + LANES, 1), numbers::<S>(LONGEST + LANES, 2));
    let v = numbers::<S::Real>(LONGEST + LANES, 3);
    let f = |[x, r]: [S::Real; 2], [v]: [S::Real; 1]| [(x - r) * v, x + v];
    let outside = S::narrow(S::Real::from_f64(77.0));
    for n in lengths() {
        // Short ones from every start, the others from one that is out of step.
        for start in if n <= 70 { 0..LANES } else { n % LANES..n % LANES + 1 } {
            let at = start..start + n;
            let wanted: [Vec<S>; 2] =
                from_fn(|m| at.clone().map(|i| S::narrow(f([x[i].widen(), r[i].widen()], [v[i]])[m])).collect());
            for (level, stores) in LOOPS.into_iter().flat_map(|level| STORES.map(|stores| (level, stores))) {
                let [mut a, mut b] = [(); 2].map(|()| vec![outside; LONGEST + 2 * LANES]);
                // The second output starts elsewhere, so that at most one of the two is aligned.
                let (to_a, to_b) = (&mut a[at.clone()], &mut b[start + 1..start + 1 + n]);
                let (x, v) = ([&x[at.clone()], &r[at.clone()]], [&v[at.clone()]]);
                map(level, x, v, [to_a, to_b], stores, [&[]; 1], f);
                assert!(bits(&a[at.clone()]) == bits(&wanted[0]), "{n} elements from {start}, {stores:?}");
                assert!(bits(&b[start + 1..start + 1 + n]) == bits(&wanted[1]), "{n} from {start}, {stores:?}");
                let untouched = a[..start].iter().chain(&a[at.end..]).chain(&b[..=start]).chain(&b[at.end + 1..]);
                assert!(untouched.into_iter().all(|x| *x == outside), "{n} from {start} wrote past its end");
            }
        }
    }
}

#[test]
fn maps() {
    every_dtype!(map_reaches_every_element);
}

/// Sums of whole numbers are exact in every order: each element must count exactly once.
fn sums_count_every_element<S: Storage>() {
    let (x, w) = (integers::<S>(LONGEST, 1), integers::<S::Real>(LONGEST, 2));
    for n in lengths() {
        // In one run, and in three, so that a run starts inside a chain.
        for (level, cuts) in LOOPS.into_iter().flat_map(|level| [[0, n, n], [0, n / 3, n / 2]].map(|cuts| (level, cuts))) {
            let mut sum = Sum::<S::Real, 2>::ZERO;
            for run in [cuts[0]..cuts[1], cuts[1]..cuts[2], cuts[2]..n] {
                sum.add(level, [&x[run.clone()]], [&w[run]], [], |[x], [w]| [x, x * w]);
            }
            let plain: f64 = x[..n].iter().map(|x| x.widen().to_f64()).sum();
            let product: f64 = x[..n].iter().zip(&w).map(|(x, w)| x.widen().to_f64() * w.to_f64()).sum();
            assert_eq!(sum.total(), [plain, product], "{n} elements, cut at {cuts:?}");
        }
    }
}

#[test]
fn sums() {
    every_dtype!(sums_count_every_element);
}

/// The order of additions depends on places in the run, never on addresses.
fn sums_do_not_see_addresses<S: Storage>() {
    let x = numbers::<S>(LONGEST, 1);
    for n in lengths() {
        let total = |level, run: &[S]| {
            let mut sum = Sum::<S::Real, 1>::ZERO;
            sum.add(level, [run], [], [], |[x], []| [x]);
            sum.total()[0]
        };
        let wanted = total(Level::Avx2, &x[..n]);
        assert_eq!(wanted, total(Level::Baseline, &x[..n]), "{n} elements, compact");
        for start in 1..LANES {
            let mut moved = vec![S::default(); start];
            moved.extend(&x[..n]);
            assert_eq!(wanted, total(Level::Avx2, &moved[start..]), "{n} elements from {start}");
        }
        let exact: f64 = x[..n].iter().map(|x| x.widen().to_f64()).sum();
        assert!((wanted - exact).abs() <= 1e-6 * n as f64, "{n} elements: {wanted}, exactly {exact}");
    }
}

#[test]
fn starts() {
    every_dtype!(sums_do_not_see_addresses);
}

fn fills_follow_their_words<S: Storage>() {
    let (seed, stream) = (0x0123_4567_89AB_CDEF, 9);
    let word = |k: usize, i: usize| group(seed, stream, 0, (i / GROUP) as u64)[k][i % LANES];
    let scaled = |z: f32| S::narrow(S::Real::from_f64(0.5) + S::Real::from_f64(3.0) * S::Real::from_f32(z));
    for n in lengths() {
        let (mut uniform, mut normal) = (vec![S::default(); n], vec![S::default(); n]);
        let mut words = vec![0; n];
        for level in [Level::Baseline, Level::Avx2] {
            run_at(level, Fill::new(&mut uniform, Uniform, seed, stream, 0.5, 3.0));
            run_at(level, Fill::new(&mut normal, Normal, seed, stream, 0.5, 3.0));
            run_at(level, Words::new(&mut words, seed, stream, 0));
            for i in 0..n {
                let k = i % GROUP / LANES;
                let pair = normal_pair(word(k / 2 * 2, i), word(k / 2 * 2 + 1, i));
                assert_eq!(words[i], word(k, i), "word {i} of {n}");
                assert!(uniform[i] == scaled(unit(word(k, i))), "uniform {i} of {n} at {level:?}");
                assert!(normal[i] == scaled(pair[k % 2]), "normal {i} of {n} at {level:?}");
            }
        }
    }
}

#[test]
fn fills() {
    every_dtype!(fills_follow_their_words);
}

fn a_step_follows_its_rule<S: Storage, const N: usize>(rule: impl Rule<S::Real, N>) {
    let (p, g) = (numbers::<S>(LONGEST + LANES, 1), numbers::<S>(LONGEST + LANES, 2));
    let state: [Vec<S::Real>; N] = from_fn(|k| integers::<S::Real>(LONGEST, 3 + k as u64))
        .map(|slot: Vec<S::Real>| slot.into_iter().map(|x| x * x).collect());
    let [scale, limit] = [0.5, 0.75];
    let prepared = |g: S| {
        let g = g.widen().to_f64() * scale;
        S::Real::from_f64(if g > limit {
            limit
        } else if g < -limit {
            -limit
        } else {
            g
        })
    };
    for n in lengths() {
        let start = n % LANES;
        let (mut new_p, mut new_state) = (p.clone(), state.clone().map(|slot| slot[..n].to_vec()));
        let tensor = Tensor::new("p", &mut new_p[start..start + n], &g[start..start + n]).unwrap();
        let slots = new_state.each_mut().map(|slot| &mut slot[..]);
        Step::new(rule, Prepare::new(scale, limit), vec![tensor], slots, None).unwrap().launch();
        for i in 0..n {
            let (wanted, slots) = rule.step(p[start + i].widen(), prepared(g[start + i]), from_fn(|k| state[k][i]));
            assert!(new_p[start + i] == S::narrow(wanted), "parameter {i} of {n}");
            for k in 0..N {
                assert_eq!(new_state[k][i], slots[k], "state {k}, element {i} of {n}");
            }
        }
        let untouched = new_p[..start] == p[..start] && new_p[start + n..] == p[start + n..];
        assert!(untouched, "{n} elements: wrote past its end");
    }
}

fn every_rule<S: Storage>() {
    let (lr, decay) = (1e-2, 0.1);
    let adam = AdamOptions { lr, l2: decay, keep: 0.99, beta1: 0.9, beta2: 0.999, eps: 1e-8, bias1: 0.1, bias2: 0.001 };
    let momentum = Momentum::new(decay, 0.9, 1.0, lr);
    a_step_follows_its_rule::<S, 0>(Sgd::new(lr, decay));
    a_step_follows_its_rule::<S, 1>(momentum);
    a_step_follows_its_rule::<S, 1>(Nesterov(momentum));
    a_step_follows_its_rule::<S, 2>(Adam::new(adam));
    a_step_follows_its_rule::<S, 3>(AmsGrad(Adam::new(adam)));
}

#[test]
fn steps() {
    every_dtype!(every_rule);
}
