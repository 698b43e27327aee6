//! Work that can be halved, and how it is spread over threads. The only place that knows rayon.

use crate::error::Error;
use crate::simd::{self, Level};
use rayon::ThreadPool;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};

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

/// Work of at most this many bytes is not split.
const GRAIN: usize = 1 << 20;

/// No more than about this many parts, so that partial results stay small.
const PARTS: usize = 32;

/// How often a thread that is done looks whether the others are, before it sleeps: some tens of microseconds.
const SPINS: usize = 2000;

/// Below this many bytes one thread is faster than waking a second.
const PARALLEL_BYTES: usize = 8 << 20;

/// Runs a kernel on as many threads as it is worth, and merges the parts along a tree that depends on the shape only.
pub fn launch<K: Kernel>(kernel: K) -> K::Out {
    launch_on(threads(), kernel)
}

/// [`launch`] on at most so many threads: the same bits. On one where the kernel is part of what all threads do.
pub(crate) fn launch_on<K: Kernel>(threads: usize, kernel: K) -> K::Out {
    let bytes = kernel.bytes();
    let grain = GRAIN.max(bytes / PARTS);
    if bytes <= grain {
        return simd::run(kernel);
    }
    let mut parts = vec![];
    let tree = Tree::cut(kernel, grain, &mut parts);
    let next = AtomicUsize::new(0);
    let work = || {
        // Each thread claims the next part until none is left.
        while let Some(part) = parts.get(next.fetch_add(1, Ordering::Relaxed)) {
            let mut part = part.lock().expect("no part panics while it is claimed");
            if let Part::Waits(kernel) = std::mem::replace(&mut *part, Part::Runs) {
                *part = Part::Done(simd::run(kernel));
            }
        }
    };
    let helpers = if bytes < PARALLEL_BYTES { 0 } else { threads.min(parts.len()) - 1 };
    share(&work, helpers);
    tree.merge(&parts)
}

/// A part of a kernel's work.
enum Part<K: Kernel> {
    Waits(K),
    Runs,
    Done(K::Out),
}

/// How the parts merge.
enum Tree {
    Part(usize),
    Both(Box<(Tree, Tree)>),
}

impl Tree {
    /// Cuts a kernel into parts of at most `grain` bytes.
    fn cut<K: Kernel>(kernel: K, grain: usize, parts: &mut Vec<Mutex<Part<K>>>) -> Self {
        let whole = if kernel.bytes() <= grain { Err(kernel) } else { kernel.halve() };
        match whole {
            Ok((left, right)) => Self::Both(Box::new((Self::cut(left, grain, parts), Self::cut(right, grain, parts)))),
            Err(kernel) => {
                parts.push(Mutex::new(Part::Waits(kernel)));
                Self::Part(parts.len() - 1)
            }
        }
    }

    fn merge<K: Kernel>(self, parts: &[Mutex<Part<K>>]) -> K::Out {
        match self {
            Self::Part(i) => match std::mem::replace(&mut *parts[i].lock().expect("all parts have run"), Part::Runs) {
                Part::Done(out) => out,
                _ => unreachable!("every part was claimed"),
            },
            Self::Both(both) => {
                let (left, right) = *both;
                K::merge(left.merge(parts), right.merge(parts))
            }
        }
    }
}

/// Does `work` on this thread and on `helpers` others, and returns when all are done. Not generic, so that rayon's side
/// of the hand-over exists once and not for every kernel.
fn share(work: &(dyn Fn() + Sync), helpers: usize) {
    if helpers == 0 {
        return work();
    }
    let running = AtomicUsize::new(helpers);
    pool().in_place_scope(|scope| {
        for _ in 0..helpers {
            scope.spawn(|_| {
                work();
                running.fetch_sub(1, Ordering::Release);
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

/// A pool, and the one that replaces it in a forked child: threads do not survive a fork, so the child leaks the
/// pool it inherited and starts its own at the first launch.
struct Generation {
    pool: OnceLock<ThreadPool>,
    next: OnceLock<Box<Generation>>,
}

impl Generation {
    const fn new() -> Self {
        Self { pool: OnceLock::new(), next: OnceLock::new() }
    }
}

static FIRST: Generation = Generation::new();
static FORKS: AtomicUsize = AtomicUsize::new(0);

/// To be called in a child process right after a fork.
pub fn after_fork() {
    FORKS.fetch_add(1, Ordering::Relaxed);
}

fn pool() -> &'static ThreadPool {
    let mut generation = &FIRST;
    for _ in 0..FORKS.load(Ordering::Relaxed) {
        generation = generation.next.get_or_init(|| Box::new(Generation::new()));
    }
    generation.pool.get_or_init(|| {
        rayon::ThreadPoolBuilder::new()
            .num_threads((threads() - 1).max(1))
            .thread_name(|i| format!("kilter-{i}"))
            .build()
            .expect("the operating system refuses threads; KILTER_NUM_THREADS=1 needs none")
    })
}
