//! Streams and events. Work is complete when a call returns, so that both only remember.

use std::ffi::{c_int, c_uint, c_void};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use crate::counts;

use super::error::{INVALID_CONTEXT, INVALID_HANDLE, SUCCESS};
use super::{CUresult, state};

type Stream = *mut c_void;

/// An event: its device, and when it was recorded.
pub struct Recorded {
    device: usize,
    at: Mutex<Option<Instant>>,
}

type Event = *mut Recorded;

/// The error of an earlier launch on a device. Handles know their device, so that any thread may wait.
fn status(device: Option<usize>) -> CUresult {
    match device.and_then(state::device) {
        Some(mut device) => device.status(),
        None => INVALID_CONTEXT,
    }
}

/// The device of a stream, or the current one for the stream without a handle.
fn of_stream(stream: Stream) -> Option<usize> {
    // Small numbers are the driver's own streams.
    if (stream as usize) < 16 {
        return state::current();
    }
    // SAFETY: a handle of `cuStreamCreate`.
    Some(unsafe { *stream.cast::<usize>() })
}

fn of_event(event: Event) -> Option<usize> {
    // SAFETY: a handle of `cuEventCreate`, or null.
    unsafe { event.as_ref() }.map(|event| event.device)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(stream: *mut Stream, _flags: c_uint) -> CUresult {
    let Some(device) = state::current() else { return INVALID_CONTEXT };
    // SAFETY: the caller gives a place for the handle.
    unsafe { *stream = Box::into_raw(Box::new(device)).cast() };
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
    drop(unsafe { Box::from_raw(stream.cast::<usize>()) });
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamSynchronize(stream: Stream) -> CUresult {
    counts::call("cuStreamSynchronize", 0);
    status(of_stream(stream))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamQuery(stream: Stream) -> CUresult {
    status(of_stream(stream))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamWaitEvent(stream: Stream, _event: Event, _flags: c_uint) -> CUresult {
    status(of_stream(stream))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamIsCapturing(_stream: Stream, capturing: *mut c_int) -> CUresult {
    // SAFETY: the caller gives a place for the number.
    unsafe { *capturing = 0 };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventCreate(event: *mut Event, _flags: c_uint) -> CUresult {
    let Some(device) = state::current() else { return INVALID_CONTEXT };
    // SAFETY: the caller gives a place for the handle.
    unsafe { *event = Box::into_raw(Box::new(Recorded { device, at: Mutex::new(None) })) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventRecord(event: Event, _stream: Stream) -> CUresult {
    // SAFETY: a handle of `cuEventCreate`.
    let event = unsafe { &*event };
    *event.at.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    status(Some(event.device))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventSynchronize(event: Event) -> CUresult {
    counts::call("cuEventSynchronize", 0);
    status(of_event(event))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventQuery(event: Event) -> CUresult {
    status(of_event(event))
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
    let times = unsafe { [&*start, &*end] }.map(|event| *event.at.lock().unwrap_or_else(PoisonError::into_inner));
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
