//! Loads and stores of matrices by a warp: `wmma.load`, `wmma.store`, `ldmatrix`, `stmatrix`.

use std::ffi::c_int;

use crate::counts::Kind;

use super::block::{Block, SHARED, WRITE, block_of};
use super::check::{is_undefined, spoil};
use super::matrix::{Element, pack};
use super::thread::Thread;
use super::warp::{How, meet};

fn count(block: &mut Block, address: u64, size: u32, written: bool) {
    let shared = address.wrapping_sub(block.threads[0].shared) < SHARED as u64;
    let kind = match (shared, written) {
        (true, false) => Kind::SharedRead,
        (true, true) => Kind::SharedWritten,
        (false, false) => Kind::GlobalRead,
        (false, true) => Kind::GlobalWritten,
    };
    block.counts[kind as usize] += u64::from(size);
}

pub(super) unsafe extern "C" fn moves(
    thread: *mut Thread,
    form: *const u32,
    address: u64,
    stride: u32,
    values: *mut u32,
    line: u32,
) -> c_int {
    // SAFETY: called by generated code with its thread, a form of six numbers and eight registers.
    let (form, values) = unsafe { (std::slice::from_raw_parts(form, 6), std::slice::from_raw_parts_mut(values, 8)) };
    let &[what, rows, columns, element, flag, registers] = form else { return 0 };
    // SAFETY: as above.
    let (block, linear) = unsafe { (block_of(thread), (*thread).linear as usize) };
    if what >= 2 {
        let lane = &mut block.warps[linear / 32].lanes[linear % 32];
        lane.address = address;
        lane.form = form.as_ptr() as usize;
        lane.given[..8].copy_from_slice(values);
        // SAFETY: as above.
        lane.flags = unsafe { [(*thread).flags[0], 0, 0] };
        // SAFETY: as above.
        unsafe {
            if !meet(thread, How::Move, u32::MAX, line) {
                return 0;
            }
            let lane = &block_of(thread).warps[linear / 32].lanes[linear % 32];
            values.copy_from_slice(&lane.taken);
            (*thread).flags[3] = lane.flags_taken;
        }
        return 1;
    }
    // A fragment is opaque: number e of a matrix, row by row, is number e / 32 of lane e % 32.
    let element = Element::from_number(element);
    let size = element.bits() / 8;
    let write = what == 1;
    // SAFETY: as above.
    let given = unsafe { (*thread).flags[0] };
    let mut taken = 0;
    for i in 0..rows * columns / 32 {
        let e = linear as u32 % 32 + 32 * i;
        let (row, column) = (u64::from(e / columns), u64::from(e % columns));
        let to = if flag != 0 { row * u64::from(stride) + column } else { column * u64::from(stride) + row };
        let at = address + to * u64::from(size);
        if !block.access(linear, if write { WRITE } else { 0 }, at, size, size, line) {
            return 0;
        }
        count(block, at, size, write);
        let per = 32 / element.bits();
        if write && given >> (i / per) & 1 == 1 {
            spoil(block, at, size);
        } else if !write && is_undefined(block, linear, at, size, line) {
            taken |= 1 << (i / per);
        }
        let shift = element.bits() * (i % per);
        // SAFETY: the address was checked, and it is aligned.
        unsafe {
            if write {
                let value = values[(i / per) as usize] >> shift;
                match size {
                    1 => *(at as *mut u8) = value as u8,
                    2 => *(at as *mut u16) = value as u16,
                    _ => *(at as *mut u32) = value,
                }
            } else if i / per < registers {
                let value = match size {
                    1 => u32::from(*(at as *const u8)),
                    2 => u32::from(*(at as *const u16)),
                    _ => *(at as *const u32),
                };
                pack(values, i as usize, element, value);
            }
        }
    }
    // SAFETY: as above.
    unsafe { (*thread).flags[3] = taken };
    1
}

/// Moves rows whose addresses the lanes give, when all lanes have come. `false` if one is missing.
pub(super) unsafe fn complete(thread: *mut Thread, need: u32, line: u32) -> bool {
    // SAFETY: called by a thread of the block.
    let (block, first) = unsafe { (block_of(thread), (*thread).linear as usize / 32 * 32) };
    let at = first / 32;
    let form = block.warps[at].lanes[0].form;
    if need != u32::MAX || block.warps[at].lanes.iter().any(|lane| lane.form != form) {
        return false;
    }
    // SAFETY: the form is a constant of generated code, six numbers.
    let form = unsafe { std::slice::from_raw_parts(form as *const u32, 6) };
    let (write, turned, count_of) = (form[0] == 3, form[4] != 0, form[5] as usize);
    for row in 0..8 * count_of {
        let address = block.warps[at].lanes[row].address;
        if !block.access(first + row, if write { WRITE } else { 0 }, address, 16, 16, line) {
            // The fault is remembered; the caller sees it.
            return true;
        }
        count(block, address, 16, write);
    }
    for lane in &mut block.warps[at].lanes {
        lane.flags_taken = 0;
    }
    for i in 0..count_of {
        for lane in 0..32 {
            let mut value = 0;
            for j in 0..2 {
                let (row, column) = if turned { (lane % 4 * 2 + j, lane / 4) } else { (lane / 4, lane % 4 * 2 + j) };
                let address = block.warps[at].lanes[8 * i + row].address + 2 * column as u64;
                if write && block.warps[at].lanes[lane].flags[0] >> i & 1 == 1 {
                    spoil(block, address, 2);
                } else if !write && is_undefined(block, first + lane, address, 2, line) {
                    block.warps[at].lanes[lane].flags_taken |= 1 << i;
                }
                // SAFETY: the row was checked.
                unsafe {
                    if write {
                        *(address as *mut u16) = (block.warps[at].lanes[lane].given[i] >> (16 * j)) as u16;
                    } else {
                        value |= u32::from(*(address as *const u16)) << (16 * j);
                    }
                }
            }
            block.warps[at].lanes[lane].taken[i] = value;
        }
    }
    true
}
