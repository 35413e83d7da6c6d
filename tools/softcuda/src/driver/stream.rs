//! Streams and events. Work is complete when a call returns, so that both only remember.

use std::ffi::{c_int, c_uint, c_void};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use crate::counts;

use super::error::{INVALID_HANDLE, SUCCESS};
use super::{CUresult, state};

type Stream = *mut c_void;

/// An event: when it was recorded.
type Event = *mut Mutex<Option<Instant>>;

/// The error of an earlier launch.
fn status() -> CUresult {
    match state::current_device() {
        Ok(mut device) => device.status(),
        Err(code) => code,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(stream: *mut Stream, _flags: c_uint) -> CUresult {
    // SAFETY: the caller gives a place for the handle.
    unsafe { *stream = Box::into_raw(Box::new(0_u64)).cast() };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreateWithPriority(stream: *mut Stream, flags: c_uint, _priority: c_int) -> CUresult {
    // SAFETY: as the driver demands.
    unsafe { cuStreamCreate(stream, flags) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamDestroy_v2(stream: Stream) -> CUresult {
    if stream.is_null() {
        return INVALID_HANDLE;
    }
    // SAFETY: a handle of `cuStreamCreate`, which the caller gives up.
    drop(unsafe { Box::from_raw(stream.cast::<u64>()) });
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamSynchronize(_stream: Stream) -> CUresult {
    counts::call("cuStreamSynchronize", 0);
    status()
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamQuery(_stream: Stream) -> CUresult {
    status()
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamWaitEvent(_stream: Stream, _event: Event, _flags: c_uint) -> CUresult {
    status()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamIsCapturing(_stream: Stream, capturing: *mut c_int) -> CUresult {
    // SAFETY: the caller gives a place for the number.
    unsafe { *capturing = 0 };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventCreate(event: *mut Event, _flags: c_uint) -> CUresult {
    // SAFETY: the caller gives a place for the handle.
    unsafe { *event = Box::into_raw(Box::new(Mutex::new(None))) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventRecord(event: Event, _stream: Stream) -> CUresult {
    // SAFETY: a handle of `cuEventCreate`.
    let event = unsafe { &*event };
    *event.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    status()
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventSynchronize(_event: Event) -> CUresult {
    counts::call("cuEventSynchronize", 0);
    status()
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventQuery(_event: Event) -> CUresult {
    status()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventDestroy_v2(event: Event) -> CUresult {
    if event.is_null() {
        return INVALID_HANDLE;
    }
    // SAFETY: a handle of `cuEventCreate`, which the caller gives up.
    drop(unsafe { Box::from_raw(event) });
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventElapsedTime(milliseconds: *mut f32, start: Event, end: Event) -> CUresult {
    // SAFETY: handles of `cuEventCreate`.
    let times = unsafe { [&*start, &*end] }.map(|event| *event.lock().unwrap_or_else(PoisonError::into_inner));
    let [Some(start), Some(end)] = times else { return INVALID_HANDLE };
    // SAFETY: the caller gives a place for the number.
    unsafe { *milliseconds = end.saturating_duration_since(start).as_secs_f32() * 1e3 };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventElapsedTime_v2(milliseconds: *mut f32, start: Event, end: Event) -> CUresult {
    // SAFETY: as the driver demands.
    unsafe { cuEventElapsedTime(milliseconds, start, end) }
}
