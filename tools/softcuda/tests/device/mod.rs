//! Runs kernels through the driver's functions, as a program does.
#![allow(dead_code, unreachable_pub, reason = "each test uses a part of it")]

use std::ffi::{CString, c_void};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use cuda::driver::*;

/// A parameter of a kernel.
#[derive(Clone, Copy)]
pub enum Value {
    /// An address, or another number of 64 bits.
    Wide(u64),
    /// A number of 32 bits.
    Word(u32),
    /// A structure of at most 32 bytes.
    Structure([u32; 8]),
}

/// What came of a launch.
#[derive(Debug)]
pub struct Outcome {
    /// What the launch returned.
    pub launch: CUresult,
    /// What the synchronization after it returned.
    pub wait: CUresult,
    /// What the log says.
    pub findings: Vec<String>,
}

impl Outcome {
    /// Whether all went well.
    #[track_caller]
    pub fn good(&self) {
        assert!(self.launch == 0 && self.wait == 0 && self.findings.is_empty(), "{self:?}");
    }

    /// Whether the program sees `code`, and one line of the log contains all of `words`.
    #[track_caller]
    pub fn fails(&self, code: CUresult, words: &[&str]) {
        assert!(self.launch == code || self.wait == code, "{self:?}");
        assert!(self.findings.iter().any(|line| words.iter().all(|word| line.contains(word))), "{words:?} in {self:?}");
    }
}

/// The device of this process, for one test at a time.
pub struct Device {
    _one: MutexGuard<'static, ()>,
}

fn log() -> std::path::PathBuf {
    std::env::temp_dir().join(format!("softcuda-test-{}.log", std::process::id()))
}

impl Device {
    /// The device, with the checks that `checks` names.
    pub fn new(checks: &str) -> Self {
        Self::with(checks, &[])
    }

    /// The device, with other variables as well.
    pub fn with(checks: &str, variables: &[(&str, &str)]) -> Self {
        static ONE: Mutex<()> = Mutex::new(());
        static ONCE: Once = Once::new();
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        ONCE.call_once(|| {
            // SAFETY: all tests wait here before they read the environment.
            unsafe {
                std::env::set_var("SOFTCUDA_CHECKS", checks);
                // The error of one kernel is not that of the next test.
                std::env::set_var("SOFTCUDA_STICKY", "0");
                std::env::set_var("SOFTCUDA_LOG", log());
                std::env::set_var("SOFTCUDA_TIMEOUT", "2");
                std::env::set_var("SOFTCUDA_SM", "90");
                for (name, value) in variables {
                    std::env::set_var(name, value);
                }
            }
        });
        assert_eq!(cuInit(0), 0);
        assert_eq!(cuCtxSetCurrent(std::ptr::without_provenance_mut(1)), 0);
        cuCtxSynchronize();
        Self { _one: one }
    }

    /// Memory that was not written.
    pub fn allocate(&self, bytes: usize) -> u64 {
        let mut address = 0;
        // SAFETY: the place is that of a variable.
        assert_eq!(unsafe { cuMemAlloc_v2(&mut address, bytes) }, 0);
        address
    }

    /// Memory with values.
    pub fn upload<T: Copy>(&self, values: &[T]) -> u64 {
        let address = self.allocate(size_of_val(values));
        // SAFETY: the range is that of the slice.
        assert_eq!(unsafe { cuMemcpyHtoD_v2(address, values.as_ptr().cast(), size_of_val(values)) }, 0);
        address
    }

    /// Frees memory.
    pub fn free(&self, address: u64) {
        assert_eq!(cuMemFree_v2(address), 0);
    }

    /// Reads values.
    #[track_caller]
    pub fn download<T: Copy + Default>(&self, address: u64, count: usize) -> Vec<T> {
        let mut out = vec![T::default(); count];
        // SAFETY: the range is that of the vector.
        assert_eq!(unsafe { cuMemcpyDtoH_v2(out.as_mut_ptr().cast(), address, size_of_val(&out[..])) }, 0);
        out
    }

    /// Loads a module and runs its kernel `k`.
    pub fn run(&self, ptx: &str, grid: [u32; 3], block: [u32; 3], shared: u32, values: &[Value]) -> Outcome {
        let before = std::fs::read_to_string(log()).unwrap_or_default().len();
        let (launch, wait) = self.launch(ptx, grid, block, shared, values);
        let text = std::fs::read_to_string(log()).unwrap_or_default();
        let findings =
            text[before..].lines().filter_map(|line| Some(line.split_once("FINDING ")?.1.to_owned())).collect();
        Outcome { launch, wait, findings }
    }

    fn launch(
        &self,
        ptx: &str,
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
        values: &[Value],
    ) -> (CUresult, CUresult) {
        let text = CString::new(ptx).unwrap();
        let (mut module, mut function) = (std::ptr::null(), std::ptr::null());
        let mut words: Vec<[u32; 8]> = values
            .iter()
            .map(|value| match *value {
                Value::Wide(value) => [value as u32, (value >> 32) as u32, 0, 0, 0, 0, 0, 0],
                Value::Word(value) => [value, 0, 0, 0, 0, 0, 0, 0],
                Value::Structure(words) => words,
            })
            .collect();
        let mut params: Vec<*mut c_void> = words.iter_mut().map(|word| std::ptr::from_mut(word).cast()).collect();
        // SAFETY: handles are those that the functions before return, and each parameter has its place.
        unsafe {
            let loaded = cuModuleLoadData(&mut module, text.as_ptr().cast());
            if loaded != 0 {
                return (loaded, 0);
            }
            assert_eq!(cuModuleGetFunction(&mut function, module, c"k".as_ptr()), 0);
            if shared > 48 << 10 {
                assert_eq!(cuFuncSetAttribute(function, 8, shared as i32), 0);
            }
            let [gx, gy, gz] = grid;
            let [bx, by, bz] = block;
            let null = std::ptr::null_mut();
            let launched = cuLaunchKernel(
                function,
                gx,
                gy,
                gz,
                bx,
                by,
                bz,
                shared,
                null,
                params.as_mut_ptr(),
                std::ptr::null_mut(),
            );
            (launched, cuCtxSynchronize())
        }
    }
}

/// A module with the kernel `k` that takes `wide` numbers of 64 bits, loaded into `%rd1`, `%rd2`, ... and converted to global
/// addresses. `%r1` is the number of the thread, `%r2` of the block, `%rd10` four times the thread's number.
pub fn kernel(declarations: &str, wide: usize, body: &str) -> String {
    let params: Vec<String> = (1..=wide).map(|i| format!(".param .u64 p{i}")).collect();
    let loads: String = (1..=wide).map(|i| format!("ld.param.u64 %rd{i}, [p{i}];\n")).collect();
    format!(
        ".version 8.5\n.target sm_90\n.address_size 64\n{declarations}\n.visible .entry k({})\n{{\n\
         .reg .pred %p<10>;\n.reg .b16 %h<20>;\n.reg .b32 %r<60>;\n.reg .b64 %rd<30>;\n.reg .f32 %f<40>;\n.reg .f64 %d<10>;\n\
         {loads}mov.u32 %r1, %tid.x;\nmov.u32 %r2, %ctaid.x;\nmul.wide.u32 %rd10, %r1, 4;\n{body}\nret;\n}}\n",
        params.join(", ")
    )
}
