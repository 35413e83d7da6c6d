//! Launches.

use std::ffi::{c_uint, c_void};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::memory::state::{ALLOCATED, WRITTEN};
use crate::run::{Fault, FaultKind, Launch, run};
use crate::translate::symbol;
use crate::{counts, finding, log, settings};

use super::error::{INVALID_VALUE, LAUNCH_FAILED, NOT_SUPPORTED, SUCCESS};
use super::module::Function;
use super::{CUresult, state};

/// What a device of this kind would refuse, in words.
fn refused(function: &Function, grid: [u32; 3], block: [u32; 3], shared: u32) -> Option<String> {
    let threads: u64 = block.iter().map(|&size| u64::from(size)).product();
    let kernel = &function.kernel;
    let most = function.most_shared.load(Ordering::Relaxed);
    if grid.contains(&0) || grid[1] > 65535 || grid[2] > 65535 || grid[0] > i32::MAX as u32 {
        Some(format!("a grid of {grid:?} blocks"))
    } else if block.contains(&0) || threads > 1024 || block[2] > 64 {
        Some(format!("a block of {block:?} threads"))
    } else if shared > most {
        Some(format!("{shared} bytes of shared memory, of at most {most}"))
    } else if kernel.required_block.is_some_and(|required| required != block) {
        Some(format!(
            "a block of {block:?} threads, where the kernel demands {:?}",
            kernel.required_block.unwrap_or_default()
        ))
    } else if kernel.most_threads.is_some_and(|most| threads > u64::from(most)) {
        Some(format!(
            "a block of {block:?} threads, where the kernel allows {}",
            kernel.most_threads.unwrap_or_default()
        ))
    } else {
        None
    }
}

#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments, reason = "as the driver's function")]
pub unsafe extern "C" fn cuLaunchKernel(
    function: *const Function,
    gx: c_uint,
    gy: c_uint,
    gz: c_uint,
    bx: c_uint,
    by: c_uint,
    bz: c_uint,
    dynamic: c_uint,
    _stream: *mut c_void,
    params: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> CUresult {
    // SAFETY: a handle of `cuModuleGetFunction`.
    let function = unsafe { &*function };
    let (grid, block) = ([gx, gy, gz], [bx, by, bz]);
    let kernel = &function.kernel;
    let name = kernel.name.as_str();
    if let Some(why) = refused(function, grid, block, dynamic) {
        log::finding(&format!("kernel `{name}`: the launch is refused: {why}"));
        return INVALID_VALUE;
    }
    if !extra.is_null() || (params.is_null() && !kernel.parameters.is_empty()) {
        log::finding(&format!("kernel `{name}`: parameters in `extra` are not supported"));
        return NOT_SUPPORTED;
    }
    let library = match function.module.library() {
        Ok(library) => library,
        Err(why) => {
            log::finding(&format!("kernel `{name}` cannot be compiled: {why}"));
            return NOT_SUPPORTED;
        }
    };
    let Some(entry) = library.entry(&symbol(name)) else { return LAUNCH_FAILED };
    let settings = settings::get();
    let Some(mut device) = state::device(function.module.device) else { return LAUNCH_FAILED };
    let failed = device.status();
    if failed != SUCCESS {
        return failed;
    }
    if let Some((line, register)) = kernel.unset.first().filter(|_| settings.uninitialized) {
        let text = function.module.ptx.lines().nth(*line as usize - 1).unwrap_or("").trim();
        log::finding(&format!(
            "kernel `{name}`: uninitialized register `%{register}`, which no path to PTX line {line} writes: `{text}`"
        ));
        device.fail(LAUNCH_FAILED);
        return SUCCESS;
    }
    let end = kernel.parameters.last().map_or(0, |&(at, size)| u64::from(at + size));
    if end > state::PARAMETERS {
        return INVALID_VALUE;
    }
    let area = device.parameters;
    for (i, &(at, size)) in kernel.parameters.iter().enumerate() {
        device.memory.mark(area + u64::from(at), size.into(), WRITTEN);
        // SAFETY: the area is large enough, and the caller gives a pointer to each parameter.
        unsafe {
            std::ptr::copy_nonoverlapping(
                (*params.add(i)).cast::<u8>(),
                (area + u64::from(at)) as *mut u8,
                size as usize,
            )
        };
    }
    let began = Instant::now();
    let launch = Launch {
        entry,
        grid,
        block,
        shared: kernel.shared + dynamic,
        dynamic,
        params: area,
        base: device.memory.base(),
        span: device.memory.span(),
        globals: &function.module.globals,
        number: state::next_launch(),
        deadline: began + Duration::from_secs(settings.timeout),
        races: settings.races,
        exits_allowed: !settings.barriers,
        distinct: settings.counts.is_some(),
        threads: settings.threads,
        spoiled: device.spoiled,
    };
    let (kinds, fault, origin) = run(&launch);
    let seconds = began.elapsed().as_secs_f64();
    device.memory.mark(area, end, ALLOCATED);
    let blocks: u64 = grid.iter().map(|&size| u64::from(size)).product();
    let threads = blocks * block.iter().map(|&size| u64::from(size)).product::<u64>();
    counts::launch(name, blocks, threads, seconds, &kinds);
    log::line(&format!("launch {name} grid {grid:?} block {block:?} shared {dynamic}: {:.3} ms", seconds * 1e3));
    let describe =
        |fault: &Fault| finding::describe(name, fault, &function.module.ptx, &function.module.parsed, &device.memory);
    let origin = origin.map(|origin| describe(&origin));
    let text = fault.as_ref().map(|fault| match (&fault.kind, &origin) {
        (FaultKind::Undefined(_), Some(origin)) => format!("{}; the first such read: {origin}", describe(fault)),
        _ => describe(fault),
    });
    if let Some(origin) = origin {
        finding::remember(device.spoiled, origin);
        device.spoiled = if device.spoiled == 127 { 2 } else { device.spoiled + 1 };
    }
    let (Some(fault), Some(text)) = (fault, text) else { return SUCCESS };
    log::finding(&text);
    match finding::result(&fault) {
        // A device would not have got here, so that it is an error of the launch itself.
        NOT_SUPPORTED => NOT_SUPPORTED,
        code => {
            device.fail(code);
            SUCCESS
        }
    }
}
