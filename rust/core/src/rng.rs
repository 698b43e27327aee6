//! Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011): random words as a pure function of a key and a counter.

use crate::lanes::LANES;
use std::array::from_fn;

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Elements that share a call of [`group`]: 16 counters of four words.
pub const GROUP: usize = 4 * LANES;

/// The outputs of `L` counters: word k of each in row k.
#[inline(always)]
pub fn philox<const L: usize>(mut counter: [[u32; L]; 4], mut key: [u32; 2]) -> [[u32; L]; 4] {
    for _ in 0..10 {
        let [c0, c1, c2, c3] = counter;
        let mut next = [[0; L]; 4];
        for l in 0..L {
            let p0 = c0[l] as u64 * MULTIPLIERS[0] as u64;
            let p1 = c2[l] as u64 * MULTIPLIERS[1] as u64;
            next[0][l] = (p1 >> 32) as u32 ^ c1[l] ^ key[0];
            next[1][l] = p1 as u32;
            next[2][l] = (p0 >> 32) as u32 ^ c3[l] ^ key[1];
            next[3][l] = p0 as u32;
        }
        counter = next;
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// The words of elements `64 * b..64 * b + 64`: element `16 * k + l` has word k of counter
/// `(16 * b + l, stream, attempt)`, the first a 64-bit number.
#[inline(always)]
pub fn group(seed: u64, stream: u32, attempt: u32, b: u64) -> [[u32; LANES]; 4] {
    let first = b.wrapping_mul(LANES as u64);
    let counter = [
        from_fn(|l| first.wrapping_add(l as u64) as u32),
        from_fn(|l| (first.wrapping_add(l as u64) >> 32) as u32),
        [stream; LANES],
        [attempt; LANES],
    ];
    philox(counter, [seed as u32, (seed >> 32) as u32])
}

/// 24 bits of a word as a number in [0, 1).
#[inline(always)]
pub fn unit(word: u32) -> f32 {
    (word >> 8) as i32 as f32 * (1.0 / 16_777_216.0)
}

/// Two independent normal variates from two words (Box, Muller 1958).
#[inline(always)]
pub fn normal_pair(w0: u32, w1: u32) -> [f32; 2] {
    // In (0, 1], so that the logarithm is finite.
    let a = ((w0 >> 8) + 1) as i32 as f32 * (1.0 / 16_777_216.0);
    let r = (-2.0 * ln(a)).sqrt();
    let (sin, cos) = sin_cos_turns(unit(w1));
    [r * cos, r * sin]
}

/// The natural logarithm of a normal positive number: exponent and a polynomial in (m - 1) / (m + 1) of the mantissa m
/// in [sqrt(1/2), sqrt(2)). Within 2 ulp for a in (0, 1]; products and sums are rounded separately.
#[inline(always)]
fn ln(a: f32) -> f32 {
    let bits = a.to_bits();
    let exponent = (bits.wrapping_sub(0x3F35_04F3) as i32) >> 23;
    let m = f32::from_bits(bits.wrapping_sub((exponent as u32) << 23));
    let f = m - 1.0;
    let s = f / (2.0 + f);
    let z = s * s;
    let r = z * ((0.284_987_87 * z + 0.399_999_98) * z + 0.666_666_6);
    exponent as f32 * std::f32::consts::LN_2 + (2.0 * s + s * r)
}

/// sin(2 pi v) and cos(2 pi v) for v in [0, 1): the nearest quarter turn and polynomials in what is left.
#[inline(always)]
fn sin_cos_turns(v: f32) -> (f32, f32) {
    // Adding 1.5 * 2^23 rounds to the nearest whole number and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let shifted = v * 4.0 + ROUND;
    let quarter = shifted.to_bits();
    let r = (v * 4.0 - (shifted - ROUND)) * 1.570_796_4;
    let z = r * r;
    let sin = ((-1.951_529_6e-4 * z + 8.332_161e-3) * z - 1.666_665_5e-1) * (z * r) + r;
    let cos = ((2.443_315_7e-5 * z - 1.388_731_6e-3) * z + 4.166_664_6e-2) * (z * z) + (-0.5 * z + 1.0);
    let (s, c) = if quarter & 1 == 1 { (cos, sin) } else { (sin, cos) };
    let sign_s = (quarter & 2) << 30;
    let sign_c = (quarter.wrapping_add(1) & 2) << 30;
    (f32::from_bits(s.to_bits() ^ sign_s), f32::from_bits(c.to_bits() ^ sign_c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_vectors() {
        let cases = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, wanted) in cases {
            assert_eq!(philox::<1>(counter.map(|word| [word]), key).map(|word| word[0]), wanted);
        }
    }

    #[test]
    fn the_polynomials_follow_the_functions() {
        for i in 0..1 << 24 {
            let a = (i + 1) as f32 / 16_777_216.0;
            let exact = (a as f64).ln();
            assert!((ln(a) as f64 - exact).abs() <= 2.4e-7 * exact.abs().max(f64::MIN_POSITIVE), "ln {a:e}");
            let v = i as f32 / 16_777_216.0;
            let (sin, cos) = sin_cos_turns(v);
            let turn = v as f64 * std::f64::consts::TAU;
            assert!((sin as f64 - turn.sin()).abs() < 2e-7 && (cos as f64 - turn.cos()).abs() < 2e-7, "turn {v}");
        }
    }
}
