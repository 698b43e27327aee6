//! Work that can be halved, and how it is spread over threads. The only place that knows rayon.

use crate::error::Error;
use crate::simd::{self, Level};
use rayon::ThreadPool;
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::Instant;

/// Work on borrowed slices: it knows its bytes, can halve itself, can run, and can merge two results.
///
/// Where it halves is a function of the shape alone; with the constants of [`launch`] that fixes the tree along which
/// results merge, for any number of threads.
pub trait Kernel: Sized + Send {
    /// What a run hands back: nothing, or partial results.
    type Out: Send;

    /// The highest level that this kernel is compiled for. `Avx512` where 512-bit registers were measured to be faster
    /// than 256-bit ones, `Baseline` where the kernel is too rare for a second copy in the wheel.
    const TOP: Level = Level::Avx2;

    /// Bytes read and written.
    fn bytes(&self) -> usize;

    /// Two parts, or the whole where it cannot be split.
    fn halve(self) -> Result<(Self, Self), Self>;

    /// Does the work with the registers of `level`, which each door passes as a constant. `#[inline(always)]` on every
    /// implementation: the body must melt into the door that has the CPU features.
    fn run(self, level: Level) -> Self::Out;

    /// The result of both parts.
    fn merge(left: Self::Out, right: Self::Out) -> Self::Out;
}

/// Work of fewer bytes is not split.
const SMALLEST: usize = 1 << 18;

/// Parts are no larger than this where that makes no more than [`PARTS`] of them.
const LARGEST: usize = 1 << 20;

/// No more than about this many parts, so that partial results stay small.
const PARTS: usize = 32;

/// About so many parts of work between the two sizes.
const FEW: usize = 8;

/// From this many bytes on a second thread is worth the hand-over to a worker that is awake: a few microseconds.
const SHARED_BYTES: usize = 1 << 19;

/// From this many bytes on it is worth waking a worker: some tens of microseconds.
const WAKING_BYTES: usize = 8 << 20;

/// How many microseconds workers stay awake after a launch. No longer, for the core may be another library's: the threads
/// of a matrix product spin as well. They do not yield it meanwhile: since Linux 6.18 that costs a whole slice each time.
const LINGER: u64 = 50;

/// How many at most during a launch that could not use them because they slept when it began.
const WATCH: u64 = 2000;

/// How often a thread that is done looks whether the others are, before it sleeps: some tens of microseconds.
const SPINS: usize = 2000;

/// Runs a kernel on as many threads as it is worth, and merges the parts along a tree that depends on the shape only.
pub fn launch<K: Kernel>(kernel: K) -> K::Out {
    launch_on(threads(), kernel)
}

/// [`launch`] on at most so many threads: the same bits. On one where the kernel is part of what all threads do.
pub(crate) fn launch_on<K: Kernel>(threads: usize, kernel: K) -> K::Out {
    let bytes = kernel.bytes();
    let grain = grain(bytes);
    if bytes <= grain {
        return simd::run(kernel);
    }
    let parts = cut(kernel, grain);
    let run = |i: usize| {
        // Each part is claimed once: the lock is always free.
        if let Ok(mut part) = parts[i].part.try_lock()
            && let Part::Waits(kernel) = std::mem::replace(&mut *part, Part::Runs)
        {
            *part = Part::Done(simd::run(kernel));
        }
    };
    spread(parts.len(), &run, bytes, threads);
    merge(parts)
}

/// Work of so many bytes is cut into parts of at most this many.
pub fn grain(bytes: usize) -> usize {
    (bytes / FEW).clamp(SMALLEST, LARGEST).max(bytes / PARTS)
}

/// A part of a kernel's work.
enum Part<K: Kernel> {
    Waits(K),
    Runs,
    Done(K::Out),
}

/// A leaf of the tree along which results merge. The depths of all leaves, from left to right, say what tree it is.
struct Leaf<K: Kernel> {
    depth: usize,
    part: Mutex<Part<K>>,
}

/// Cuts a kernel into parts of at most `grain` bytes.
fn cut<K: Kernel>(kernel: K, grain: usize) -> Vec<Leaf<K>> {
    let (mut leaves, mut rest) = (vec![], vec![(0, kernel)]);
    while let Some((depth, kernel)) = rest.pop() {
        match if kernel.bytes() <= grain { Err(kernel) } else { kernel.halve() } {
            Ok((left, right)) => {
                rest.push((depth + 1, right));
                rest.push((depth + 1, left));
            }
            Err(kernel) => leaves.push(Leaf { depth, part: Mutex::new(Part::Waits(kernel)) }),
        }
    }
    leaves
}

/// Merges the results of the two halves of each node, the deepest first.
fn merge<K: Kernel>(leaves: Vec<Leaf<K>>) -> K::Out {
    let mut done: Vec<(usize, K::Out)> = vec![];
    for Leaf { mut depth, part } in leaves {
        let Ok(Part::Done(mut out)) = part.into_inner() else { unreachable!("every part has run") };
        while let Some((_, left)) = done.pop_if(|(left, _)| *left == depth) {
            out = K::merge(left, out);
            depth -= 1;
        }
        done.push((depth, out));
    }
    done.pop().expect("the whole has at least one part").1
}

/// Does `run(0)` to `run(parts - 1)` on this thread and those workers that it is worth to call, and returns when all are
/// done. Not generic, so that the hand-over exists once and not for every kernel.
fn spread(parts: usize, run: &(dyn Fn(usize) + Sync), bytes: usize, threads: usize) {
    let next = AtomicUsize::new(0);
    let work = || {
        // Each thread claims the next part until none is left.
        loop {
            let part = next.fetch_add(1, Ordering::Relaxed);
            if part >= parts {
                break;
            }
            run(part);
        }
    };
    let most = threads.min(parts) - 1;
    if most == 0 || bytes < SHARED_BYTES {
        return work();
    }
    let crew = crew();
    let helpers = if bytes < WAKING_BYTES { most.min(crew.awake()) } else { most };
    if helpers == 0 {
        work();
    } else {
        crew.share(&work, helpers);
    }
    crew.rest();
}

/// Threads that kernels may use: `KILTER_NUM_THREADS`, or the cores of this process's affinity mask.
pub fn threads() -> usize {
    static THREADS: OnceLock<usize> = OnceLock::new();
    *THREADS.get_or_init(|| configured_threads().unwrap_or(1))
}

/// Reads `KILTER_NUM_THREADS`.
pub fn configured_threads() -> Result<usize, Error> {
    let Ok(text) = std::env::var("KILTER_NUM_THREADS") else {
        return Ok(std::thread::available_parallelism().map_or(1, usize::from));
    };
    match text.trim().parse() {
        Ok(n) if (1..=1024).contains(&n) => Ok(n),
        _ => Err(Error::new("KILTER_NUM_THREADS", "a whole number from 1 to 1024", format_args!("{text:?}"))),
    }
}

/// The workers, and those that replace them in a forked child: threads do not survive a fork, so the child leaks the
/// pool it inherited and starts its own at the first launch.
struct Crew {
    pool: OnceLock<ThreadPool>,
    /// Workers that are awake.
    awake: AtomicUsize,
    /// Until when workers stay awake, in microseconds since [`START`]: during and shortly after each launch.
    until: AtomicU64,
    next: OnceLock<Box<Crew>>,
}

impl Crew {
    const fn new() -> Self {
        Self { pool: OnceLock::new(), awake: AtomicUsize::new(0), until: AtomicU64::new(0), next: OnceLock::new() }
    }

    fn pool(&self) -> &ThreadPool {
        self.pool.get_or_init(|| {
            rayon::ThreadPoolBuilder::new()
                .num_threads((threads() - 1).max(1))
                .thread_name(|i| format!("kilter-{i}"))
                .build()
                .expect("the operating system refuses threads; KILTER_NUM_THREADS=1 needs none")
        })
    }

    /// How many workers are awake. Where launches follow each other closely and none is, wakes one for the next.
    fn awake(&'static self) -> usize {
        let (awake, now) = (self.awake.load(Ordering::Relaxed), now());
        if now < self.until.load(Ordering::Relaxed) {
            self.until.store(now + WATCH, Ordering::Relaxed);
            if awake == 0 {
                self.pool().spawn(|| self.stay());
            }
        }
        awake
    }

    /// Notes that a launch has ended.
    fn rest(&self) {
        self.until.store(now() + LINGER, Ordering::Relaxed);
    }

    /// Does `work` on this thread and on `helpers` workers, and returns when all are done.
    fn share(&'static self, work: &(dyn Fn() + Sync), helpers: usize) {
        let running = AtomicUsize::new(helpers);
        self.pool().in_place_scope(|scope| {
            for _ in 0..helpers {
                scope.spawn(|_| {
                    work();
                    running.fetch_sub(1, Ordering::Release);
                    self.stay();
                });
            }
            work();
            // The others end at about the same time: looking for that moment is shorter than sleeping until it.
            for _ in 0..SPINS {
                if running.load(Ordering::Acquire) == 0 {
                    break;
                }
                std::hint::spin_loop();
            }
        });
    }

    /// Keeps this worker awake for a while after what it does now.
    fn stay(&'static self) {
        if !STAYS.replace(true) {
            self.awake.fetch_add(1, Ordering::Relaxed);
            rayon::spawn(|| self.linger());
        }
    }

    /// Looks for work until it is time to sleep.
    fn linger(&self) {
        while now() < self.until.load(Ordering::Relaxed) {
            rayon::yield_now();
            std::hint::spin_loop();
        }
        self.awake.fetch_sub(1, Ordering::Relaxed);
        STAYS.set(false);
    }
}

/// When the first launch that was worth a worker began.
static START: OnceLock<Instant> = OnceLock::new();

/// Microseconds since [`START`].
fn now() -> u64 {
    START.get_or_init(Instant::now).elapsed().as_micros() as u64
}

thread_local! {
    /// Whether this worker stays awake.
    static STAYS: Cell<bool> = const { Cell::new(false) };
}

static FIRST: Crew = Crew::new();
static FORKS: AtomicUsize = AtomicUsize::new(0);

/// To be called in a child process right after a fork.
pub fn after_fork() {
    FORKS.fetch_add(1, Ordering::Relaxed);
}

fn crew() -> &'static Crew {
    let mut crew = &FIRST;
    for _ in 0..FORKS.load(Ordering::Relaxed) {
        crew = crew.next.get_or_init(|| Box::new(Crew::new()));
    }
    crew
}
