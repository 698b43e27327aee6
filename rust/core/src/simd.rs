//! The CPU level, the door through which a kernel gets wide registers, and stores that go past the caches.
//!
//! Kernels are plain loops over fixed lanes. Compiled once per CPU level behind [`run`], they become wide
//! instructions; the lanes fix the order of additions, so every level gives the same bits.

use crate::error::Error;
use crate::kernel::Kernel;
use half::{bf16, f16};
use std::sync::OnceLock;

/// What the CPU offers, as far as kernels use it. Other architectures than x86-64 run `Baseline`: on AArch64 that
/// includes NEON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What every CPU of the architecture has: SSE2 on x86-64, NEON on AArch64.
    Baseline,
    /// 256-bit registers.
    Avx2,
    /// 512-bit registers of a CPU that rounds to bfloat16 by itself, for the kernels in which they were measured to win.
    Avx512,
}

impl Level {
    /// All levels, lowest first.
    pub const ALL: [Level; 3] = [Level::Baseline, Level::Avx2, Level::Avx512];

    /// The name in `KILTER_SIMD`.
    pub fn name(self) -> &'static str {
        match self {
            Level::Baseline => "baseline",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
        }
    }

    /// Whether kernels are compiled small rather than wide at this level: processors without AVX2 are rare, and their copy
    /// of every kernel would be the larger half of the wheel. The bits are the same.
    #[inline(always)]
    pub(crate) const fn compact(self) -> bool {
        cfg!(target_arch = "x86_64") && matches!(self, Level::Baseline)
    }

    #[inline(never)] // it is long, and part of every launch
    fn detected() -> Level {
        #[cfg(target_arch = "x86_64")]
        {
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512bf16");
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c") {
                return if avx512 { Level::Avx512 } else { Level::Avx2 };
            }
        }
        Level::Baseline
    }
}

static LEVEL: OnceLock<Level> = OnceLock::new();

/// The level in use: what the CPU has, capped by `KILTER_SIMD`.
pub fn level() -> Level {
    *LEVEL.get_or_init(|| configured().unwrap_or_else(|_| Level::detected()))
}

/// Reads `KILTER_SIMD`; a level that the CPU lacks falls to the next lower one.
pub fn configured() -> Result<Level, Error> {
    let Ok(name) = std::env::var("KILTER_SIMD") else { return Ok(Level::detected()) };
    match Level::ALL.into_iter().find(|level| level.name() == name) {
        Some(cap) => Ok(cap.min(Level::detected())),
        None => Err(Error::new("KILTER_SIMD", "baseline, avx2 or avx512", format_args!("{name:?}"))),
    }
}

/// Runs a kernel on this thread with the registers of [`level`].
pub fn run<K: Kernel>(kernel: K) -> K::Out {
    run_at(level(), kernel)
}

/// Runs a kernel with the registers of `level`, or of the highest level below it that the CPU has.
pub fn run_at<K: Kernel>(level: Level, kernel: K) -> K::Out {
    let out = enter(level, kernel);
    fence();
    out
}

/// As [`run_at`], for a part of a kernel that is running: it streams nothing, so that no fence ends it.
pub(crate) fn enter<K: Kernel>(level: Level, kernel: K) -> K::Out {
    #[cfg(target_arch = "x86_64")]
    return match level.min(Level::detected()).min(K::TOP) {
        // SAFETY: `detected` found every feature that the door enables.
        Level::Avx512 => unsafe { avx512(kernel) },
        // SAFETY: as above.
        Level::Avx2 => unsafe { avx2(kernel) },
        Level::Baseline => baseline(kernel),
    };
    #[cfg(not(target_arch = "x86_64"))]
    baseline(kernel)
}

// The doors are not inlined, so that each kernel has a symbol of its own whose assembly can be checked.

#[inline(never)]
fn baseline<K: Kernel>(kernel: K) -> K::Out {
    kernel.run(Level::Baseline)
}

#[cfg(target_arch = "x86_64")]
#[inline(never)]
#[target_feature(enable = "avx2,f16c")]
fn avx2<K: Kernel>(kernel: K) -> K::Out {
    kernel.run(Level::Avx2)
}

#[cfg(target_arch = "x86_64")]
#[inline(never)]
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn avx512<K: Kernel>(kernel: K) -> K::Out {
    kernel.run(Level::Avx512)
}

/// Outputs of calls that touch this many bytes and more go past the caches: they would not stay there anyway, and an
/// ordinary store reads its line first.
pub const STREAM_BYTES: usize = 24 << 20;

/// Streaming stores need this alignment.
pub const STREAM_ALIGN: usize = 16;

/// Writes `line` to `to`, which starts at a multiple of [`STREAM_ALIGN`], past the caches. Falls back to ordinary
/// stores where that does not hold. Visible to other threads after the door's fence.
#[inline(always)]
pub fn stream<T: Copy, const L: usize>(level: Level, line: &[T; L], to: &mut [T]) {
    let to: &mut [T; L] = to.try_into().expect("a streamed line has the length of its target");
    #[cfg(target_arch = "x86_64")]
    if size_of::<[T; L]>().is_multiple_of(16) && to.as_ptr().addr().is_multiple_of(STREAM_ALIGN) {
        use std::arch::x86_64::{_mm_loadu_ps, _mm_stream_ps, _mm256_loadu_ps, _mm256_stream_ps};
        let to: *mut f32 = to.as_mut_ptr().cast();
        if level >= Level::Avx2 && size_of::<[T; L]>().is_multiple_of(32) && to.addr().is_multiple_of(32) {
            let from: *const f32 = line.as_ptr().cast();
            for i in 0..size_of::<[T; L]>() / 32 {
                // SAFETY: both arrays have size_of::<[T; L]>() bytes, i * 32 + 32 of them at most are touched; T is Copy,
                // its bytes move unchanged; `to` is aligned to 32; the door of `level` has AVX.
                unsafe { _mm256_stream_ps(to.add(i * 8), _mm256_loadu_ps(from.add(i * 8))) };
            }
            return;
        }
        // Through memory, so that what computes the line is not narrowed to the width of these stores.
        let from: *const f32 = std::hint::black_box(line).as_ptr().cast();
        for i in 0..size_of::<[T; L]>() / 16 {
            // SAFETY: as above, with 16 bytes; SSE2 is part of x86-64.
            unsafe { _mm_stream_ps(to.add(i * 4), _mm_loadu_ps(from.add(i * 4))) };
        }
        return;
    }
    let _ = level;
    *to = *line;
}

/// Widens with the CPU's own instruction, which is exact; false where `level` has none or `L` is no multiple of 8.
#[inline(always)]
pub fn widen_halves<const L: usize>(level: Level, from: &[f16; L], to: &mut [f32; L]) -> bool {
    #[cfg(target_arch = "x86_64")]
    if L.is_multiple_of(8) && level >= Level::Avx2 {
        // SAFETY: `detected` found F16C where the level is Avx2 or above.
        unsafe { f16c_widen(from, to) };
        return true;
    }
    let _ = (level, from, to);
    false
}

/// Narrows with the CPU's own instruction, to nearest even; false where `level` has none or `L` is no multiple of 8.
#[inline(always)]
pub fn narrow_halves<const L: usize>(level: Level, from: &[f32; L], to: &mut [f16; L]) -> bool {
    #[cfg(target_arch = "x86_64")]
    if L.is_multiple_of(8) && level >= Level::Avx2 {
        // SAFETY: `detected` found F16C where the level is Avx2 or above.
        unsafe { f16c_narrow(from, to) };
        return true;
    }
    let _ = (level, from, to);
    false
}

/// Narrows in wide registers, with the bits of [`crate::storage::Storage::narrow`]: compilers find them in some loops
/// only. False where `level` has none or `L` is no multiple of 16.
#[inline(always)]
pub fn narrow_bfloats<const L: usize>(level: Level, from: &[f32; L], to: &mut [bf16; L]) -> bool {
    #[cfg(target_arch = "x86_64")]
    if L.is_multiple_of(16) && level >= Level::Avx2 {
        match level {
            // SAFETY: `detected` found AVX-512.
            Level::Avx512 => unsafe { avx512_narrow_bfloats(from, to) },
            // SAFETY: `detected` found AVX2.
            _ => unsafe { avx2_narrow_bfloats(from, to) },
        }
        return true;
    }
    let _ = (level, from, to);
    false
}

/// Widens in 512-bit registers, which compilers narrow otherwise; false where `level` has none or `L` is no multiple of 16.
#[inline(always)]
pub fn widen_bfloats<const L: usize>(level: Level, from: &[bf16; L], to: &mut [f32; L]) -> bool {
    #[cfg(target_arch = "x86_64")]
    if L.is_multiple_of(16) && level >= Level::Avx512 {
        // SAFETY: `detected` found AVX-512.
        unsafe { avx512_widen_bfloats(from, to) };
        return true;
    }
    let _ = (level, from, to);
    false
}

/// Sends `values` through memory where registers have 512 bits. Compilers take such a register apart and put the lanes
/// together again with shuffles where a loop's first operation has the same number for every lane; what lies in memory
/// they load at once.
#[inline(always)]
pub fn settle<T>(level: Level, values: &mut T) {
    #[cfg(target_arch = "x86_64")]
    if level >= Level::Avx512 {
        // SAFETY: no instruction; the compiler takes it that one changed `values`, to values that it may have.
        unsafe { std::arch::asm!("/* {0} */", in(reg) &raw mut *values, options(nostack, preserves_flags)) };
    }
    let _ = (level, values);
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn avx512_widen_bfloats<const L: usize>(from: &[bf16; L], to: &mut [f32; L]) {
    use std::arch::x86_64::*;
    for i in 0..L / 16 {
        // SAFETY: sixteen elements from 16 * i on lie in both arrays; bf16 is two bytes of bits.
        unsafe {
            let sixteen = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.as_ptr().add(16 * i).cast()));
            let wide = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(sixteen));
            _mm512_storeu_ps(to.as_mut_ptr().add(16 * i), wide);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn avx512_narrow_bfloats<const L: usize>(from: &[f32; L], to: &mut [bf16; L]) {
    use std::arch::x86_64::*;
    for i in 0..L / 16 {
        // SAFETY: sixteen elements from 16 * i on lie in both arrays; bf16 is two bytes of bits.
        unsafe {
            let x = _mm512_loadu_ps(from.as_ptr().add(16 * i));
            // The CPU's own rounding takes denormals for zeros.
            if _mm512_fpclass_ps_mask::<0x20>(x) == 0 {
                let line: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(x));
                _mm256_storeu_si256(to.as_mut_ptr().add(16 * i).cast(), line);
                continue;
            }
            let bits = _mm512_castps_si512(x);
            let upper = _mm512_srli_epi32::<16>(bits);
            let odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
            let sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
            let rounded = _mm512_srli_epi32::<16>(sum);
            let all = _mm512_mask_or_epi32(rounded, nan, upper, _mm512_set1_epi32(0x40));
            _mm256_storeu_si256(to.as_mut_ptr().add(16 * i).cast(), _mm512_cvtepi32_epi16(all));
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn avx2_narrow_bfloats<const L: usize>(from: &[f32; L], to: &mut [bf16; L]) {
    use std::arch::x86_64::*;
    // The upper half of each of eight floats, rounded to nearest even; of a NaN the upper half as it is, but quiet.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn upper(x: __m256) -> __m256i {
        let bits = _mm256_castps_si256(x);
        let upper = _mm256_srli_epi32::<16>(bits);
        let odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
        let sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
        let quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
        _mm256_blendv_epi8(_mm256_srli_epi32::<16>(sum), quiet, nan)
    }
    for i in 0..L / 16 {
        // SAFETY: sixteen elements from 16 * i on lie in both arrays; bf16 is two bytes of bits.
        unsafe {
            let low = upper(_mm256_loadu_ps(from.as_ptr().add(16 * i)));
            let high = upper(_mm256_loadu_ps(from.as_ptr().add(16 * i + 8)));
            let sixteen = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(low, high));
            _mm256_storeu_si256(to.as_mut_ptr().add(16 * i).cast(), sixteen);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn f16c_widen<const L: usize>(from: &[f16; L], to: &mut [f32; L]) {
    use std::arch::x86_64::{_mm_loadu_si128, _mm256_cvtph_ps, _mm256_storeu_ps};
    for i in 0..L / 8 {
        // SAFETY: eight elements from 8 * i on lie in both arrays; f16 is two bytes of bits.
        unsafe {
            let eight = _mm_loadu_si128(from.as_ptr().add(8 * i).cast());
            _mm256_storeu_ps(to.as_mut_ptr().add(8 * i), _mm256_cvtph_ps(eight));
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn f16c_narrow<const L: usize>(from: &[f32; L], to: &mut [f16; L]) {
    use std::arch::x86_64::{_MM_FROUND_TO_NEAREST_INT, _mm_storeu_si128, _mm256_cvtps_ph, _mm256_loadu_ps};
    for i in 0..L / 8 {
        // SAFETY: as in `f16c_widen`.
        unsafe {
            let eight = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm256_loadu_ps(from.as_ptr().add(8 * i)));
            _mm_storeu_si128(to.as_mut_ptr().add(8 * i).cast(), eight);
        }
    }
}

/// Asks memory for the line in which element `index` of `from` lies, or would lie: it may be past the end.
#[inline(always)]
pub fn prefetch_at<T>(from: &[T], index: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing and never faults, wherever it points; `wrapping_add` makes no claim about the place.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(from.as_ptr().wrapping_add(index).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (from, index);
}

/// Asks memory for the line of `place`, to be used soon.
#[inline(always)]
pub fn prefetch<T>(place: &T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch of a valid reference; it changes nothing that a program can see.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(place).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = place;
}

/// Asks memory for the line of `place`, to be used later: it goes to the second cache.
#[inline(always)]
pub fn prefetch_far<T>(place: &T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as in `prefetch`.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(place).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = place;
}

/// As [`prefetch_at`], of a line that will be written: other cores give up their copies of it meanwhile.
#[inline(always)]
pub fn prefetch_to_write<T>(to: &[T], index: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as in `prefetch_at`. Processors without the instruction take it for none.
    unsafe {
        let place = to.as_ptr().wrapping_add(index);
        std::arch::asm!("prefetchw [{0}]", in(reg) place, options(nostack, preserves_flags, readonly));
    }
    let _ = (to, index);
}

/// Orders the streaming stores of this thread before whatever it does next.
#[inline(always)]
fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the instruction is part of x86-64 and touches no memory.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}
