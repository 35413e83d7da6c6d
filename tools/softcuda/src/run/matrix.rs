//! Products of matrices by a warp.

use std::ffi::c_int;

use super::thread::Thread;
use super::warp::{How, Warp, meet};

/// The type of the numbers of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are PTX's")]
#[repr(u32)]
pub enum Element {
    F16,
    Bf16,
    Tf32,
    F32,
    S8,
    U8,
    S32,
}

impl Element {
    /// The type of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "f16" => Self::F16,
            "bf16" => Self::Bf16,
            "tf32" => Self::Tf32,
            "f32" => Self::F32,
            "s8" => Self::S8,
            "u8" => Self::U8,
            "s32" => Self::S32,
            _ => return None,
        })
    }

    pub(super) fn from_number(number: u32) -> Self {
        [Self::F16, Self::Bf16, Self::Tf32, Self::F32, Self::S8, Self::U8, Self::S32][number as usize % 7]
    }

    /// Width in bits.
    pub fn bits(self) -> u32 {
        match self {
            Self::F16 | Self::Bf16 => 16,
            Self::S8 | Self::U8 => 8,
            _ => 32,
        }
    }
}

/// The value of half-precision bits.
pub fn f16_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let rest = u32::from(bits & 0x7fff) << 13;
    let value =
        if rest >= 0x7c00 << 13 { f32::from_bits(rest | 0x7f80_0000) } else { f32::from_bits(rest) * 2_f32.powi(112) };
    f32::from_bits(value.to_bits() | sign)
}

/// The nearest half-precision bits, ties to even.
pub fn f32_to_f16(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = (bits >> 16 & 0x8000) as u16;
    let rest = bits & 0x7fff_ffff;
    let out = if rest > 0x7f80_0000 {
        return 0x7fff;
    } else if rest >= 0x477f_f000 {
        0x7c00
    } else if rest < 0x3880_0000 {
        // One unit of 0.5 in the last place is the smallest half.
        ((f32::from_bits(rest) + 0.5).to_bits() - 0.5_f32.to_bits()) as u16
    } else {
        ((rest + 0xfff + (rest >> 13 & 1) - 0x3800_0000) >> 13) as u16
    };
    out | sign
}

/// The nearest bfloat16 bits, ties to even.
pub fn f32_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() { 0x7fff } else { ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16 }
}

/// Number `i` of packed registers.
fn number(registers: &[u32], i: usize, element: Element) -> f32 {
    match element {
        Element::F16 => f16_to_f32((registers[i / 2] >> (16 * (i % 2))) as u16),
        Element::Bf16 => f32::from_bits(registers[i / 2] >> (16 * (i % 2)) << 16),
        // The unit does not see the low bits.
        Element::Tf32 => f32::from_bits(registers[i] & !0x1fff),
        Element::F32 | Element::S32 => f32::from_bits(registers[i]),
        Element::S8 => f32::from((registers[i / 4] >> (8 * (i % 4))) as i8),
        Element::U8 => f32::from((registers[i / 4] >> (8 * (i % 4))) as u8),
    }
}

pub(super) fn pack(registers: &mut [u32], i: usize, element: Element, value: u32) {
    let wide = element.bits();
    let per = (32 / wide) as usize;
    let shift = wide * (i % per) as u32;
    let mask = if wide == 32 { u32::MAX } else { ((1 << wide) - 1) << shift };
    let register = &mut registers[i / per];
    *register = *register & !mask | value << shift & mask;
}

/// Matrices of a product, row by row.
pub(super) struct Scratch {
    left: [f32; 1024],
    right: [f32; 1024],
    sum: [f32; 1024],
    whole: [i32; 1024],
}

impl Default for Scratch {
    fn default() -> Self {
        Self { left: [0.0; 1024], right: [0.0; 1024], sum: [0.0; 1024], whole: [0; 1024] }
    }
}

/// Where number `i` of a lane is in the left matrix (`[m, k]`), the right one (`[k, n]`) and the sum (`[m, n]`).
struct Layout {
    wmma: bool,
    n: usize,
    k: usize,
    element: Element,
}

impl Layout {
    fn left(&self, lane: usize, i: usize) -> usize {
        let (row, column) = (lane / 4, lane % 4);
        if self.wmma {
            return lane + 32 * i;
        }
        let (row, column) = match self.element.bits() {
            32 => (row + 8 * (i % 2), column + 4 * (i / 2)),
            16 => (row + 8 * (i / 2 % 2), column * 2 + i % 2 + 8 * (i / 4)),
            _ => (row + 8 * (i / 4 % 2), column * 4 + i % 4 + 16 * (i / 8)),
        };
        row * self.k + column
    }

    fn right(&self, lane: usize, i: usize) -> usize {
        if self.wmma {
            return lane + 32 * i;
        }
        let row = match self.element.bits() {
            32 => lane % 4 + 4 * i,
            16 => lane % 4 * 2 + i % 2 + 8 * (i / 2),
            _ => lane % 4 * 4 + i % 4 + 16 * (i / 4),
        };
        row * self.n + lane / 4
    }

    fn sum(&self, lane: usize, i: usize) -> usize {
        if self.wmma { lane + 32 * i } else { (lane / 4 + 8 * (i / 2)) * self.n + lane % 4 * 2 + i % 2 }
    }
}

/// Computes what all lanes take. `false` if one is missing.
pub(super) fn complete(warp: &mut Warp, need: u32) -> bool {
    if need != u32::MAX || warp.lanes.iter().any(|lane| lane.form != warp.lanes[0].form) {
        return false;
    }
    // SAFETY: the form is a constant of generated code, eight numbers.
    let form = unsafe { std::slice::from_raw_parts(warp.lanes[0].form as *const u32, 8) };
    let [m, n, k] = [form[1], form[2], form[3]].map(|size| size as usize);
    let [d, a, b, c] = [form[4], form[5], form[6], form[7]].map(Element::from_number);
    let layout = Layout { wmma: form[0] != 0, n, k, element: a };
    let integers = c == Element::S32;
    let scratch = &mut *warp.scratch;
    for (at, lane) in warp.lanes.iter().enumerate() {
        for i in 0..m * k / 32 {
            scratch.left[layout.left(at, i)] = number(&lane.given[..8], i, a);
        }
        for i in 0..k * n / 32 {
            scratch.right[layout.right(at, i)] = number(&lane.given[8..16], i, b);
        }
        for i in 0..m * n / 32 {
            let to = layout.sum(at, i);
            if integers {
                scratch.whole[to] = lane.given[16 + i] as i32;
            } else {
                scratch.sum[to] = number(&lane.given[16..], i, c);
            }
        }
    }
    for row in 0..m {
        for step in 0..k {
            let left = scratch.left[row * k + step];
            let right = &scratch.right[step * n..(step + 1) * n];
            if integers {
                for (sum, &right) in scratch.whole[row * n..(row + 1) * n].iter_mut().zip(right) {
                    *sum = sum.wrapping_add((left * right) as i32);
                }
            } else {
                for (sum, &right) in scratch.sum[row * n..(row + 1) * n].iter_mut().zip(right) {
                    *sum += left * right;
                }
            }
        }
    }
    for (at, lane) in warp.lanes.iter_mut().enumerate() {
        lane.taken = [0; 8];
        for i in 0..m * n / 32 {
            let from = layout.sum(at, i);
            let value = match d {
                Element::F16 => f32_to_f16(scratch.sum[from]).into(),
                Element::S32 => scratch.whole[from] as u32,
                _ => scratch.sum[from].to_bits(),
            };
            pack(&mut lane.taken, i, d, value);
        }
    }
    true
}

pub(super) unsafe extern "C" fn matrix(
    thread: *mut Thread,
    form: *const u32,
    a: *const u32,
    b: *const u32,
    c: *const u32,
    d: *mut u32,
    line: u32,
) -> c_int {
    // SAFETY: called by generated code with its thread and arrays of eight registers.
    unsafe {
        let linear = (*thread).linear as usize;
        let lane = &mut super::block::block_of(thread).warps[linear / 32].lanes[linear % 32];
        for (i, from) in [a, b, c].into_iter().enumerate() {
            lane.given[8 * i..8 * i + 8].copy_from_slice(std::slice::from_raw_parts(from, 8));
        }
        lane.form = form as usize;
        if !meet(thread, How::Matrix, u32::MAX, line) {
            return 0;
        }
        let lane = &super::block::block_of(thread).warps[linear / 32].lanes[linear % 32];
        std::slice::from_raw_parts_mut(d, 8).copy_from_slice(&lane.taken);
    }
    1
}
