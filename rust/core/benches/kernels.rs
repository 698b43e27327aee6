//! `cargo bench`: what the kernels move, beside what this machine moves with no arithmetic in the same run.
//!
//! Each row is timed in turn with its yardstick, medians are compared. Path bytes are those that must pass between memory
//! and the core: forward 2 array sizes where a channel's data stays in cache, else 3; backward 3, else 5.
//! `cargo bench -- WORD` runs the rows whose name contains WORD.

use kilter_core::bf16;
use kilter_core::init::{Fill, Normal};
use kilter_core::kernel::{launch, threads};
use kilter_core::norm::groups::{self, Grouped};
use kilter_core::norm::rows::{Backward, Forward};
use kilter_core::norm::{self, Affine, Data, Finish, Shape, Statistics, Upstream};
use kilter_core::optim::{Prepare, Step, Tensor, named};
use kilter_core::probe::{Copy, Update};
use kilter_core::real::Real;
use kilter_core::storage::Storage;
use std::time::{Duration, Instant};

/// A row: a name, path bytes, the work, and the yardstick with its bytes.
struct Row<'a> {
    name: String,
    bytes: usize,
    work: Box<dyn FnMut() + 'a>,
}

fn time(work: &mut dyn FnMut(), repeat: usize) -> f64 {
    let start = Instant::now();
    for _ in 0..repeat {
        work();
    }
    start.elapsed().as_secs_f64() / repeat as f64
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Times a row and its yardstick by turns and prints the line.
fn report(mut row: Row<'_>, yard: &mut dyn FnMut(), yard_bytes: usize, yard_name: &str) {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    if !wanted.is_empty() && !wanted.iter().any(|word| row.name.contains(word)) {
        return;
    }
    (row.work)();
    yard();
    let once = time(&mut row.work, 1);
    let repeat = (2e-3 / once).ceil().max(1.0) as usize;
    let (mut times, mut yards) = (vec![], vec![]);
    let until = Instant::now() + Duration::from_millis(1500);
    while times.len() < 7 || (Instant::now() < until && times.len() < 101) {
        times.push(time(&mut row.work, repeat));
        yards.push(time(yard, 1));
    }
    let (t, y) = (median(times), median(yards));
    let (rate, yardstick) = (row.bytes as f64 / t / 1e9, yard_bytes as f64 / y / 1e9);
    println!(
        "{:44} {:9.3} ms {rate:7.1} GB/s   {:4.0}% of {yard_name} ({yardstick:.1} GB/s)",
        row.name,
        t * 1e3,
        rate / yardstick * 100.0
    );
}

fn filled<S: Storage>(n: usize, stream: u32) -> Vec<S> {
    let mut values = vec![S::default(); n];
    launch(Fill::new(&mut values, Normal, 1, stream, 0.0, 1.0));
    values
}

/// Layer norm, or RMS norm where not `centred`; forward and backward.
fn row_norm<S: Storage>(
    name: &str,
    (rows, width): (usize, usize),
    centred: bool,
    copy: &mut dyn FnMut(),
    copy_bytes: usize,
) {
    let (x, dy) = (filled::<S>(rows * width, 0), filled::<S>(rows * width, 1));
    let mut out = vec![S::default(); rows * width];
    let (gamma, beta) = (vec![S::Real::ONE; width], vec![S::Real::ZERO; width]);
    let [mut hi, mut lo, mut rstd] = [(); 3].map(|()| vec![S::Real::ZERO; rows]);
    let bytes = size_of_val(&x[..]);
    {
        let work = || {
            let mean = centred.then_some([&mut hi[..], &mut lo[..]]);
            launch(Forward::new(&x, None, [&gamma, &beta], 1e-5, mean, &mut rstd, &mut out).unwrap());
        };
        let name = format!("{name} ({rows}, {width}) forward");
        report(Row { name, bytes: 2 * bytes, work: Box::new(work) }, copy, copy_bytes, "copy");
    }
    let work = || {
        let mean = centred.then_some([&hi[..], &lo[..]]);
        launch(Backward::new(&dy, &x, &gamma, mean, &rstd, None, &mut out).unwrap());
    };
    let name = format!("{name} ({rows}, {width}) backward");
    report(Row { name, bytes: 3 * bytes, work: Box::new(work) }, copy, copy_bytes, "copy");
}

fn batch_norm(name: &str, shape: Shape, copy: &mut dyn FnMut(), copy_bytes: usize) {
    let (x, dy) = (filled(shape.len(), 0), filled(shape.len(), 1));
    let mut out = vec![0.0f32; shape.len()];
    let (gamma, beta) = (vec![1.0f32; shape.channels], vec![0.0f32; shape.channels]);
    let mut saved = vec![vec![0.0f32; shape.channels]; 3];
    let rule = Finish { eps: 1e-5, momentum: 0.1, unbiased: true };
    let size = shape.len() * size_of::<f32>();
    let cache = 24 << 20;
    let once = |arrays: usize| norm::one_pass(shape, arrays * 4) || arrays * size < cache;
    {
        let [hi, lo, rstd] = &mut saved[..] else { unreachable!() };
        let work = || {
            let out_stats = Statistics { hi, lo, rstd, running: None };
            let data = Data::new(&x, None, shape).unwrap();
            norm::train(data, rule, &gamma, &beta, None, false, out_stats, &mut out).unwrap();
        };
        let bytes = size * if once(1) { 2 } else { 3 };
        report(
            Row { name: format!("batch norm {name} forward"), bytes, work: Box::new(work) },
            copy,
            copy_bytes,
            "copy",
        );
    }
    let affine = Affine::new(shape.channels, &saved[0], &saved[1], &saved[2], &gamma, &beta).unwrap();
    {
        let work = || norm::apply(&x, shape, affine, None, false, &mut out).unwrap();
        let name = format!("batch norm {name} inference");
        report(Row { name, bytes: size * 2, work: Box::new(work) }, copy, copy_bytes, "copy");
    }
    let work = || {
        let data = Data::new(&x, None, shape).unwrap();
        let up = Upstream::new(&dy, data, affine, None, false).unwrap();
        norm::backward(up, shape.count() as f64, &mut out, None).unwrap();
    };
    let bytes = size * if once(2) { 3 } else { 5 };
    report(Row { name: format!("batch norm {name} backward"), bytes, work: Box::new(work) }, copy, copy_bytes, "copy");
}

/// Group norm, forward and backward; a group (with the channels `last`: a sample) is read again from a cache.
fn group_norm<S: Storage>(name: &str, shape: Grouped, copy: &mut dyn FnMut(), copy_bytes: usize) {
    let (x, dy) = (filled::<S>(shape.len(), 0), filled::<S>(shape.len(), 1));
    let mut out = vec![S::default(); shape.len()];
    let (gamma, beta) = (vec![S::Real::ONE; shape.channels()], vec![S::Real::ZERO; shape.channels()]);
    let [mut mean, mut m2] = [(); 2].map(|()| vec![0.0; shape.groups()]);
    let bytes = size_of_val(&x[..]);
    {
        let work = || groups::forward(&x, shape, 1e-5, &gamma, &beta, &mut mean, &mut m2, &mut out).unwrap();
        report(
            Row { name: format!("{name} forward"), bytes: 2 * bytes, work: Box::new(work) },
            copy,
            copy_bytes,
            "copy",
        );
    }
    let reads = groups::Reads { dy: &dy, x: &x, gamma: &gamma, mean: &mean, m2: &m2, eps: 1e-5 };
    let work = || drop(groups::backward(reads, shape, &mut out).unwrap());
    report(Row { name: format!("{name} backward"), bytes: 3 * bytes, work: Box::new(work) }, copy, copy_bytes, "copy");
}

fn adamw(name: &str, sizes: &[usize]) {
    let total: usize = sizes.iter().sum();
    let mut params: Vec<Vec<f32>> = sizes.iter().map(|n| filled(*n, 0)).collect();
    let grads: Vec<Vec<f32>> = sizes.iter().map(|n| filled(*n, 1)).collect();
    let (mut m, mut v) = (vec![0.0; total], vec![0.0; total]);
    let rule = named::<f32>("adam", &[0.0, 1.0 - 1e-5, 0.9, 0.999, 1e-8, 0.001, 1e-2, 0.0]).unwrap();
    let work = || {
        let tensors = params
            .iter_mut()
            .zip(&grads)
            .map(|(p, g)| Tensor::new("p", f32::stored(p), f32::source(g)).unwrap())
            .collect();
        let slots = vec![f32::stored(&mut m), f32::stored(&mut v)];
        Step::new(&*rule, Prepare::new(1.0, f64::INFINITY), tensors, vec![], slots, None).unwrap().launch();
    };
    let mut arrays = [filled(total, 2), filled(total, 3), filled(total, 4)];
    let g = filled(total, 5);
    let mut yard = || launch(Update::new(vec![&g], arrays.iter_mut().map(|a| &mut a[..]).collect()).unwrap());
    report(
        Row { name: format!("adamw {name}"), bytes: 28 * total, work: Box::new(work) },
        &mut yard,
        28 * total,
        "update",
    );
}

fn main() {
    println!("{} threads, {}", threads(), kilter_core::simd::level().name());
    let n = 64 << 20;
    let (from, mut to) = (filled(n, 0), vec![0.0f32; n]);
    let mut copy = || launch(Copy::new(&from, &mut to).unwrap());
    let shapes = [
        ("(64, 256, 56, 56)", (64, 256, 56 * 56)),
        ("(64, 128, 28, 28)", (64, 128, 28 * 28)),
        ("(64, 56, 56, 256)", (64 * 56 * 56, 256, 1)),
        ("(64, 28, 28, 128)", (64 * 28 * 28, 128, 1)),
        ("(256, 512, 7, 7)", (256, 512, 49)),
        ("(8192, 1024)", (8192, 1024, 1)),
        ("(1024, 256)", (1024, 256, 1)),
        ("(128, 784)", (128, 784, 1)),
    ];
    for (name, (outer, channels, inner)) in shapes {
        batch_norm(name, Shape { outer, channels, inner }, &mut copy, 8 * n);
    }
    for shape in [(4096, 1024), (16384, 768), (512, 512), (131_072, 64), (64, 65_536)] {
        row_norm::<f32>("layer norm", shape, true, &mut copy, 8 * n);
        row_norm::<f32>("RMS norm", shape, false, &mut copy, 8 * n);
        row_norm::<bf16>("bf16 layer norm", shape, true, &mut copy, 8 * n);
        row_norm::<bf16>("bf16 RMS norm", shape, false, &mut copy, 8 * n);
    }
    for (samples, c, side) in [(8, 320, 64), (8, 1280, 16)] {
        for last in [false, true] {
            let shape = Grouped::new(samples, c, side * side, 32, last).unwrap();
            let sizes = if last { [samples, side, side, c] } else { [samples, c, side, side] };
            group_norm::<f32>(&format!("group norm {sizes:?}"), shape, &mut copy, 8 * n);
            group_norm::<bf16>(&format!("bf16 group norm {sizes:?}"), shape, &mut copy, 8 * n);
        }
    }
    adamw("25M", &[25_000_000]);
    adamw("200 x 1,000", &[1000; 200]);
    let mut out = vec![0.0f32; 25_000_000];
    let bytes = size_of_val(&out[..]);
    let work = || launch(Fill::new(&mut out, Normal, 1, 0, 0.0, 1.0));
    report(Row { name: "normal fill 25M".into(), bytes, work: Box::new(work) }, &mut copy, 8 * n, "copy");
}
