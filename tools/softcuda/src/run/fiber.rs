//! Stacks that threads of a block run on, and the switch between them.

use crate::memory::Mapping;

use super::thread::Thread;

/// The most threads of a block.
pub(super) const MOST: usize = 1024;
/// Bytes of a stack.
pub(super) const STACK: usize = 256 << 10;
/// From one stack to the next: not a multiple of a page, so that tops of stacks do not compete for the same lines of caches.
const STRIDE: usize = STACK + 65 * 64;

#[cfg(not(target_arch = "x86_64"))]
compile_error!("softcuda switches between threads of a block by instructions of x86-64");

/// The stacks of a block.
pub(super) struct Stacks(Mapping);

impl Stacks {
    pub(super) fn new() -> Self {
        Self(Mapping::new(None, MOST * STRIDE + 4096, false))
    }

    /// Prepares a stack on which `function(thread)` runs when it is switched to. The function must not return.
    pub(super) fn prepare(
        &self,
        at: usize,
        function: unsafe extern "C" fn(*mut Thread) -> !,
        thread: *mut Thread,
    ) -> *mut u8 {
        // SAFETY: `at` is below `MOST`, so that the top of the stack is in the mapping, aligned to 16 bytes.
        unsafe {
            let top = self.0.start().add((at + 1) * STRIDE).cast::<usize>();
            let words = [0, 0, 0, function as usize, thread as usize, 0, start as *const () as usize];
            let sp = top.sub(words.len());
            // Popped in this order: r15, r14, r13, r12, rbx, rbp, and the address to return to.
            for (i, word) in words.into_iter().enumerate() {
                sp.add(i).write(word);
            }
            sp.cast()
        }
    }
}

/// Saves where the caller is in `from`, and continues at `to`.
#[unsafe(naked)]
pub(super) unsafe extern "C" fn switch(from: *mut *mut u8, to: *mut u8) {
    core::arch::naked_asm!(
        "push rbp",
        "push rbx",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov [rdi], rsp",
        "mov rsp, rsi",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbx",
        "pop rbp",
        "ret"
    )
}

/// The first instructions of a fiber.
#[unsafe(naked)]
unsafe extern "C" fn start() {
    core::arch::naked_asm!("mov rdi, rbx", "call r12", "ud2")
}
