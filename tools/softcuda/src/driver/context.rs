//! Contexts: one for each device.

use std::ffi::{c_int, c_uint, c_void};

use crate::{counts, settings};

use super::error::{INVALID_CONTEXT, INVALID_DEVICE, SUCCESS};
use super::{CUresult, state};

type Context = *mut c_void;

fn handle(device: Option<usize>) -> Context {
    device.map_or(std::ptr::null_mut(), |device| (device + 1) as Context)
}

fn number(context: Context) -> Option<usize> {
    (context as usize).checked_sub(1)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut Context, device: c_int) -> CUresult {
    if device < 0 || device as usize >= settings::get().devices {
        return INVALID_DEVICE;
    }
    // SAFETY: the caller gives a place for the handle.
    unsafe { *context = handle(Some(device as usize)) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(_device: c_int) -> CUresult {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetCurrent(context: Context) -> CUresult {
    state::set_current(number(context));
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetCurrent(context: *mut Context) -> CUresult {
    // SAFETY: the caller gives a place for the handle.
    unsafe { *context = handle(state::current()) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetDevice(device: *mut c_int) -> CUresult {
    let Some(current) = state::current() else { return INVALID_CONTEXT };
    // SAFETY: the caller gives a place for the number.
    unsafe { *device = current as c_int };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSynchronize() -> CUresult {
    counts::call("cuCtxSynchronize", 0);
    match state::current_device() {
        Ok(mut device) => device.status(),
        Err(code) => code,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int) -> CUresult {
    // SAFETY: the caller gives places for the numbers.
    unsafe { (*least, *greatest) = (0, -5) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetFlags(_flags: c_uint) -> CUresult {
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceCanAccessPeer(can: *mut c_int, _device: c_int, _peer: c_int) -> CUresult {
    // Copies between devices work; kernels see the memory of their own device only.
    // SAFETY: the caller gives a place for the number.
    unsafe { *can = 0 };
    SUCCESS
}
