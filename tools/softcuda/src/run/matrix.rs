//! Products of matrices by a warp.

use std::ffi::c_int;

use super::thread::Thread;
use super::warp::{How, Lane, Warp, meet};

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

pub(super) fn pack(registers: &mut [u32], i: usize, element: Element, value: u32) {
    let wide = element.bits();
    let per = (32 / wide) as usize;
    let shift = wide * (i % per) as u32;
    let mask = if wide == 32 { u32::MAX } else { ((1 << wide) - 1) << shift };
    let register = &mut registers[i / per];
    *register = *register & !mask | value << shift & mask;
}

/// Matrices of a product, row by row, and where the numbers of lanes are in them.
pub(super) struct Scratch {
    left: [f32; 1024],
    right: [f32; 1024],
    sum: [f32; 1024],
    whole: [i32; 1024],
    /// The form that the places are of.
    form: usize,
    places: [Vec<u16>; 3],
}

impl Default for Scratch {
    fn default() -> Self {
        let places = [Vec::new(), Vec::new(), Vec::new()];
        Self { left: [0.0; 1024], right: [0.0; 1024], sum: [0.0; 1024], whole: [0; 1024], form: 0, places }
    }
}

impl Scratch {
    /// Looks up where numbers are, once for products of one form.
    fn arrange(&mut self, form: usize, layout: &Layout, m: usize) {
        if self.form == form {
            return;
        }
        self.form = form;
        let [left, right, sum] = &mut self.places;
        let fill = |places: &mut Vec<u16>, count: usize, place: &dyn Fn(usize, usize) -> usize| {
            places.clear();
            places.extend((0..32 * count).map(|at| place(at / count, at % count) as u16));
        };
        fill(left, m * layout.k / 32, &|lane, i| layout.left(lane, i));
        fill(right, layout.k * layout.n / 32, &|lane, i| layout.right(lane, i));
        fill(sum, m * layout.n / 32, &|lane, i| layout.sum(lane, i));
    }
}

/// Puts the numbers that lanes bring from register `from` on to their places.
fn spread(lanes: &[Lane; 32], from: usize, places: &[u16], element: Element, to: &mut [f32; 1024]) {
    fn each(
        lanes: &[Lane; 32],
        from: usize,
        places: &[u16],
        to: &mut [f32; 1024],
        number: impl Fn(&[u32], usize) -> f32,
    ) {
        for (lane, places) in lanes.iter().zip(places.chunks_exact(places.len() / 32)) {
            let registers = &lane.given[from..from + 8];
            for (i, &place) in places.iter().enumerate() {
                to[usize::from(place) % 1024] = number(registers, i);
            }
        }
    }
    match element {
        Element::F16 => each(lanes, from, places, to, |r, i| f16_to_f32((r[i / 2] >> (16 * (i % 2))) as u16)),
        Element::Bf16 => each(lanes, from, places, to, |r, i| f32::from_bits(r[i / 2] >> (16 * (i % 2)) << 16)),
        // The unit does not see the low bits.
        Element::Tf32 => each(lanes, from, places, to, |r, i| f32::from_bits(r[i] & !0x1fff)),
        Element::F32 | Element::S32 => each(lanes, from, places, to, |r, i| f32::from_bits(r[i])),
        Element::S8 => each(lanes, from, places, to, |r, i| f32::from((r[i / 4] >> (8 * (i % 4))) as i8)),
        Element::U8 => each(lanes, from, places, to, |r, i| f32::from((r[i / 4] >> (8 * (i % 4))) as u8)),
    }
}

/// Adds the product of `left` and `right`, `N` columns wide, to `sum`.
fn multiply<const N: usize>(left: &[f32], right: &[f32], sum: &mut [f32], k: usize) {
    for (left, sum) in left.chunks_exact(k).zip(sum.as_chunks_mut::<N>().0) {
        let mut total = *sum;
        for (&left, right) in left.iter().zip(right.as_chunks::<N>().0) {
            for (total, &right) in total.iter_mut().zip(right) {
                *total += left * right;
            }
        }
        *sum = total;
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
    scratch.arrange(warp.lanes[0].form, &layout, m);
    spread(&warp.lanes, 0, &scratch.places[0], a, &mut scratch.left);
    spread(&warp.lanes, 8, &scratch.places[1], b, &mut scratch.right);
    if integers {
        for (lane, places) in warp.lanes.iter().zip(scratch.places[2].chunks_exact(m * n / 32)) {
            for (&place, &value) in places.iter().zip(&lane.given[16..]) {
                scratch.whole[usize::from(place)] = value as i32;
            }
        }
        for at in 0..m * n {
            let pairs = (0..k).map(|step| scratch.left[at / n * k + step] * scratch.right[step * n + at % n]);
            scratch.whole[at] = pairs.fold(scratch.whole[at], |sum, product| sum.wrapping_add(product as i32));
        }
    } else {
        spread(&warp.lanes, 16, &scratch.places[2], c, &mut scratch.sum);
        let (left, right, sum) = (&scratch.left[..m * k], &scratch.right[..k * n], &mut scratch.sum[..m * n]);
        match n {
            8 => multiply::<8>(left, right, sum, k),
            16 => multiply::<16>(left, right, sum, k),
            _ => multiply::<32>(left, right, sum, k),
        }
    }
    let flags = flags(&warp.lanes, scratch, [m, n, k], [a, b, c]);
    for (at, lane) in warp.lanes.iter_mut().enumerate() {
        lane.flags_taken = 0;
        lane.taken = [0; 8];
        for i in 0..m * n / 32 {
            let from = usize::from(scratch.places[2][at * (m * n / 32) + i]);
            let value = match d {
                Element::F16 => f32_to_f16(scratch.sum[from]).into(),
                Element::S32 => scratch.whole[from] as u32,
                _ => scratch.sum[from].to_bits(),
            };
            pack(&mut lane.taken, i, d, value);
            if let Some(flags) = &flags {
                lane.flags_taken |= u32::from(flags[from]) << (i as u32 * d.bits() / 32);
            }
        }
    }
    true
}

/// Which numbers of the result are not defined: those whose row, column or summand has one that is not. `None` if all are.
fn flags(lanes: &[Lane; 32], scratch: &Scratch, [m, n, k]: [usize; 3], kinds: [Element; 3]) -> Option<Vec<bool>> {
    if lanes.iter().all(|lane| lane.flags == [0; 3]) {
        return None;
    }
    let (mut rows, mut columns, mut out) = (vec![false; m], vec![false; n], vec![false; m * n]);
    for (which, (places, kind)) in scratch.places.iter().zip(kinds).enumerate() {
        let count = places.len() / 32;
        for (at, &place) in places.iter().enumerate() {
            let register = (at % count) as u32 * kind.bits() / 32;
            if lanes[at / count].flags[which] >> register & 1 == 1 {
                match which {
                    0 => rows[usize::from(place) / k] = true,
                    1 => columns[usize::from(place) % n] = true,
                    _ => out[usize::from(place)] = true,
                }
            }
        }
    }
    for (at, flag) in out.iter_mut().enumerate() {
        *flag |= rows[at / n] || columns[at % n];
    }
    Some(out)
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
        lane.flags = [(*thread).flags[0], (*thread).flags[1], (*thread).flags[2]];
        if !meet(thread, How::Matrix, u32::MAX, line) {
            return 0;
        }
        let lane = &super::block::block_of(thread).warps[linear / 32].lanes[linear % 32];
        std::slice::from_raw_parts_mut(d, 8).copy_from_slice(&lane.taken);
        (*thread).flags[3] = lane.flags_taken;
    }
    1
}
