//! Every length and every start: the loops over groups of 16 against loops over one element at a time.

mod common;

use common::{RULES, bits, integers, numbers, state_of, step};
use kilter_core::init::{Fill, Normal, Uniform, Words};
use kilter_core::lanes::{LANES, Stores, map, map_add};
use kilter_core::real::Real;
use kilter_core::rng::{GROUP, group, normal_pair, unit};
use kilter_core::simd::{Level, run_at};
use kilter_core::storage::Storage;
use kilter_core::sum::{Sum, totals};
use kilter_core::{bf16, f16};
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

fn map_adds_every_element<S: Storage>() {
    let (x, v) = (numbers::<S>(LONGEST + LANES, 1), numbers::<S::Real>(LONGEST + LANES, 2));
    for n in lengths() {
        let at = n % LANES..n % LANES + n;
        for (level, stores) in LOOPS.into_iter().flat_map(|level| STORES.map(|stores| (level, stores))) {
            let (mut y, mut a, mut b) = (x.clone(), v.clone(), v.clone());
            let sums = [&mut a[at.clone()], &mut b[at.clone()]];
            let (from, to) = ([&x[at.clone()]], [&mut y[at.clone()]]);
            map_add(level, from, [&v[at.clone()]], to, sums, stores, [&[]; 1], |[x], [v]| ([x * v], [x, x - v]));
            for i in 0..x.len() {
                let (wide, inside) = (x[i].widen(), at.contains(&i));
                let wanted = if inside {
                    (S::narrow(wide * v[i]), v[i] + wide, v[i] + (wide - v[i]))
                } else {
                    (x[i], v[i], v[i])
                };
                assert!((y[i], a[i], b[i]) == wanted, "place {i} of {at:?}, {stores:?} at {level:?}");
            }
        }
    }
}

#[test]
fn maps_with_sums() {
    every_dtype!(map_adds_every_element);
}

/// Sums of whole numbers are exact in every order: each element must count exactly once.
fn sums_count_every_element<S: Storage>() {
    let (x, w) = (integers::<S>(LONGEST, 1), integers::<S::Real>(LONGEST, 2));
    for n in lengths() {
        // In one run, and in three, so that a run starts inside a chain.
        for (level, cuts) in
            LOOPS.into_iter().flat_map(|level| [[0, n, n], [0, n / 3, n / 2]].map(|cuts| (level, cuts)))
        {
            let mut sum = Sum::<S::Real, 2>::ZERO;
            for run in [cuts[0]..cuts[1], cuts[1]..cuts[2], cuts[2]..n] {
                sum.add(level, [&x[run.clone()]], [&w[run]], [], |[x], [w]| [x, x * w]);
            }
            let plain: f64 = x[..n].iter().map(|x| x.widen().to_f64()).sum();
            let product: f64 = x[..n].iter().zip(&w).map(|(x, w)| x.widen().to_f64() * w.to_f64()).sum();
            assert_eq!(sum.total(level), [plain, product], "{n} elements, cut at {cuts:?}");
            assert_eq!(
                totals(level, &[sum, Sum::ZERO, sum], 2),
                [[plain, product], [0.0; 2], [0.0; 2]],
                "{n} elements"
            );
            if n > 0 {
                sum.clear();
                sum.add(level, [&x[..n]], [&w[..n]], [], |[x], [w]| [x, x * w]);
                assert_eq!(sum.total(level), [plain, product], "{n} elements, anew");
            }
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
            sum.total(level)[0]
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
    let (seed, stream, attempt) = (0x0123_4567_89AB_CDEF, 9, 5);
    let word = |k: usize, i: usize| group(seed, stream, attempt, (i / GROUP) as u64)[k][i % LANES];
    let scaled = |z: f32| S::narrow(S::Real::from_f64(0.5) + S::Real::from_f64(3.0) * S::Real::from_f32(z));
    for n in lengths() {
        let (mut uniform, mut normal) = (vec![S::default(); n], vec![S::default(); n]);
        let mut words = vec![0; n];
        for level in [Level::Baseline, Level::Avx2] {
            run_at(level, Fill::new(&mut uniform, Uniform, seed, stream, 0.5, 3.0).attempt(attempt));
            run_at(level, Fill::new(&mut normal, Normal, seed, stream, 0.5, 3.0).attempt(attempt));
            run_at(level, Words::new(&mut words, seed, stream, attempt));
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

/// State in the arithmetic type, or in bfloat16 where that is f32.
fn a_step_is_one_of_each_element<S: Storage, A: Storage<Real = S::Real>>() {
    let (p, g) = (numbers::<S>(LONGEST + LANES, 1), numbers::<S>(LONGEST + LANES, 2));
    for rule in RULES {
        for n in lengths() {
            let start = n % LANES;
            let g = &g[start..start + n];
            let state = state_of::<A>(rule, n);
            let (mut whole, mut whole_state) = (p.clone(), state.clone());
            step(rule, &[n], &mut whole[start..start + n], g, &mut whole_state, &mut [], |step| step.launch());
            for i in 0..n {
                let mut one = [p[start + i]];
                let mut one_state: Vec<Vec<A>> = state.iter().map(|slot| vec![slot[i]]).collect();
                step(rule, &[1], &mut one, &g[i..i + 1], &mut one_state, &mut [], |step| step.launch());
                assert!(whole[start + i] == one[0], "{}: parameter {i} of {n}", rule.0);
                assert!(whole_state.iter().zip(&one_state).all(|(a, b)| a[i] == b[0]), "{}: state {i} of {n}", rule.0);
            }
            assert!(n < LANES || whole != p, "{} does nothing", rule.0);
            let untouched = whole[..start] == p[..start] && whole[start + n..] == p[start + n..];
            assert!(untouched, "{}, {n} elements: wrote past its end", rule.0);
        }
    }
}

fn every_rule<S: Storage>() {
    a_step_is_one_of_each_element::<S, S::Real>();
}

#[test]
fn steps() {
    every_dtype!(every_rule);
    a_step_is_one_of_each_element::<f32, bf16>();
    a_step_is_one_of_each_element::<f16, bf16>();
}
