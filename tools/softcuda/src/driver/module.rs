//! Modules and functions.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use crate::compile::{Library, hash};
use crate::memory::state::WRITTEN;
use crate::translate::{Kernel, Options, Translation, translate};
use crate::{assemble, fault, log, settings};

use super::device::most_shared;
use super::error::{INVALID_PTX, INVALID_VALUE, NOT_FOUND, OUT_OF_MEMORY, SUCCESS};
use super::{CUresult, state};

/// A loaded module.
pub struct Module {
    pub(super) device: usize,
    pub(super) ptx: String,
    pub(super) parsed: crate::ptx::Module,
    pub(super) translation: Translation,
    /// Addresses of its variables.
    pub(super) globals: Vec<u64>,
    library: OnceLock<Result<Library, String>>,
}

/// A kernel of a module.
pub struct Function {
    pub(super) module: Arc<Module>,
    pub(super) kernel: Kernel,
    /// Shared memory that a launch may ask for.
    pub(super) most_shared: AtomicU32,
}

impl Module {
    /// The compiled module; the error was logged.
    pub(super) fn library(&self) -> Result<&Library, String> {
        let compiled = self.library.get_or_init(|| Library::new(&self.translation.source, settings::get()));
        compiled.as_ref().map_err(Clone::clone)
    }
}

fn load(ptx: &str) -> Result<Module, CUresult> {
    let settings = settings::get();
    let device = state::current().ok_or(super::error::INVALID_CONTEXT)?;
    let number = hash(&[ptx]);
    if settings.dump {
        let _ = std::fs::create_dir_all(&settings.folder);
        let _ = std::fs::write(settings.folder.join(format!("{number:016x}.ptx")), ptx);
    }
    let refused = |why: String| {
        log::finding(&format!("module {number:016x} is refused: {why}"));
        INVALID_PTX
    };
    let parsed = crate::ptx::Module::parse(ptx).map_err(|error| refused(error.to_string()))?;
    let assembled = assemble::check(ptx, &parsed.target, settings).map_err(refused)?;
    let options = Options {
        uninitialized: settings.uninitialized,
        strict: settings.strict,
        races: settings.races,
        distinct: settings.counts.is_some(),
    };
    let translation = translate(&parsed, options);
    let mut globals = Vec::new();
    let mut device_state = state::current_device()?;
    for array in &translation.globals {
        let size = u64::from(array.size.max(1));
        let address = device_state.memory.allocate(size).ok_or(OUT_OF_MEMORY)?;
        device_state.memory.mark(address, size, WRITTEN);
        // SAFETY: the range was allocated above, which is zero, and the values are no longer than the variable.
        unsafe {
            std::ptr::copy_nonoverlapping(
                array.bytes.as_ptr(),
                address as *mut u8,
                array.bytes.len().min(size as usize),
            )
        };
        globals.push(address);
    }
    let names: Vec<&str> = translation.kernels.iter().map(|kernel| kernel.name.as_str()).collect();
    log::line(&format!("module {number:016x} {}, assembled for {assembled}: {}", parsed.target, names.join(", ")));
    Ok(Module { device, ptx: ptx.to_owned(), parsed, translation, globals, library: OnceLock::new() })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadData(module: *mut *const Module, image: *const c_void) -> CUresult {
    // SAFETY: PTX ends with zero. Other images begin with a number that PTX does not begin with.
    let image = unsafe { CStr::from_ptr(image.cast()) };
    let text = image.to_string_lossy();
    if !text.contains(".version") {
        log::finding("a module is refused: it is not PTX");
        return INVALID_PTX;
    }
    let faulty = settings::get().fault.as_ref().and_then(|wanted| fault::put(&text, wanted));
    if let Some((_, change)) = &faulty {
        log::line(&format!("fault put in on purpose: {change}"));
    }
    match load(faulty.as_ref().map_or(&text, |(text, _)| text)) {
        Ok(loaded) => {
            // SAFETY: the caller gives a place for the handle.
            unsafe { *module = Arc::into_raw(Arc::new(loaded)) };
            SUCCESS
        }
        Err(code) => code,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadDataEx(
    module: *mut *const Module,
    image: *const c_void,
    _count: u32,
    _options: *mut c_int,
    _values: *mut *mut c_void,
) -> CUresult {
    // SAFETY: as the driver demands.
    unsafe { cuModuleLoadData(module, image) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleUnload(module: *const Module) -> CUresult {
    // SAFETY: a handle of `cuModuleLoadData`, which the caller gives up. Functions keep their module.
    let module = unsafe { Arc::from_raw(module) };
    if let Some(mut device) = state::device(module.device) {
        for &address in &module.globals {
            device.memory.free(address);
        }
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetFunction(
    function: *mut *const Function,
    module: *const Module,
    name: *const c_char,
) -> CUresult {
    // SAFETY: a handle of `cuModuleLoadData`, and a text that ends with zero.
    let (module, name) = unsafe {
        Arc::increment_strong_count(module);
        (Arc::from_raw(module), CStr::from_ptr(name).to_string_lossy())
    };
    let Some(kernel) = module.translation.kernels.iter().find(|kernel| kernel.name == name).cloned() else {
        log::finding(&format!("a module has no kernel `{name}`"));
        return NOT_FOUND;
    };
    // Functions live as long as the process, as their handles may be used until then.
    let found = Function { module, kernel, most_shared: AtomicU32::new(48 << 10) };
    // SAFETY: the caller gives a place for the handle.
    unsafe { *function = Box::into_raw(Box::new(found)) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetGlobal_v2(
    address: *mut u64,
    size: *mut usize,
    module: *const Module,
    name: *const c_char,
) -> CUresult {
    // SAFETY: a handle of `cuModuleLoadData`, and a text that ends with zero.
    let (module, name) = unsafe { (&*module, CStr::from_ptr(name).to_string_lossy()) };
    let Some(at) = module.translation.globals.iter().position(|array| array.name == name) else { return NOT_FOUND };
    // SAFETY: the caller gives places, or null for what it does not want.
    unsafe {
        if !address.is_null() {
            *address = module.globals[at];
        }
        if !size.is_null() {
            *size = module.translation.globals[at].size as usize;
        }
    }
    SUCCESS
}

/// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`.
const SHARED: c_int = 8;

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFuncSetAttribute(function: *const Function, attribute: c_int, value: c_int) -> CUresult {
    // SAFETY: a handle of `cuModuleGetFunction`.
    let function = unsafe { &*function };
    if attribute == SHARED {
        if value < 0 || value as u32 + function.kernel.shared > most_shared() {
            return INVALID_VALUE;
        }
        function.most_shared.store(value as u32, Ordering::Relaxed);
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFuncGetAttribute(
    value: *mut c_int,
    attribute: c_int,
    function: *const Function,
) -> CUresult {
    // SAFETY: a handle of `cuModuleGetFunction`.
    let function = unsafe { &*function };
    let found = match attribute {
        0 => function.kernel.most_threads.unwrap_or(1024) as c_int,
        1 => function.kernel.shared as c_int,
        SHARED => function.most_shared.load(Ordering::Relaxed) as c_int,
        _ => 0,
    };
    // SAFETY: the caller gives a place for the number.
    unsafe { *value = found };
    SUCCESS
}
