//! Faults that a kernel may have: each is found, and the same kernel without it passes.

mod device;

use device::{Device, Outcome, Value, kernel};

const ILLEGAL_ADDRESS: i32 = 700;
const LAUNCH_TIMEOUT: i32 = 702;
const MISALIGNED: i32 = 716;
const FAILED: i32 = 719;
const NOT_SUPPORTED: i32 = 801;

fn device() -> Device {
    Device::new("all,reads")
}

/// One block of `threads`.
fn block(device: &Device, ptx: &str, threads: u32, values: &[Value]) -> Outcome {
    device.run(ptx, [1, 1, 1], [threads, 1, 1], 0, values)
}

/// Each thread writes to shared memory and reads what another one wrote.
fn reversed(barrier: &str) -> String {
    let body = format!(
        "mov.u64 %rd3, s;\nadd.s64 %rd4, %rd3, %rd10;\nst.shared.u32 [%rd4], %r1;\n{barrier}\n\
         sub.s32 %r3, 63, %r1;\nmul.wide.u32 %rd5, %r3, 4;\nadd.s64 %rd5, %rd3, %rd5;\nld.shared.u32 %r4, [%rd5];\n\
         add.s64 %rd6, %rd1, %rd10;\nst.global.u32 [%rd6], %r4;"
    );
    kernel(".shared .align 4 .b8 s[256];", 1, &body)
}

#[test]
fn a_missing_barrier() {
    let device = device();
    let out = device.allocate(256);
    block(&device, &reversed("bar.sync 0;"), 64, &[Value::Wide(out)]).good();
    assert_eq!(device.download::<u32>(out, 64), (0..64).rev().collect::<Vec<u32>>());
    block(&device, &reversed(""), 64, &[Value::Wide(out)]).fails(FAILED, &["uninitialized read", "shared memory"]);
}

#[test]
fn a_barrier_that_comes_too_late_for_memory_that_is_used_again() {
    let device = device();
    let out = device.allocate(256);
    // After the values were read, the memory is written again.
    let again = |barrier: &str| {
        reversed("bar.sync 0;").replace("add.s64 %rd6", &format!("{barrier}\nst.shared.u32 [%rd4], 7;\nadd.s64 %rd6"))
    };
    block(&device, &again("bar.sync 0;"), 64, &[Value::Wide(out)]).good();
    block(&device, &again(""), 64, &[Value::Wide(out)])
        .fails(FAILED, &["race", "of shared memory", "st.shared.u32 [%rd4], 7"]);
}

/// Copies `%r1 + shift` of a buffer.
fn copied(shift: i32) -> String {
    let body = format!(
        "add.s64 %rd3, %rd1, %rd10;\nld.global.u32 %r3, [%rd3+{shift}];\nadd.s64 %rd4, %rd2, %rd10;\nst.global.u32 [%rd4], %r3;"
    );
    kernel("", 2, &body.replace("+-", "-"))
}

#[test]
fn one_row_too_far() {
    let device = device();
    let (from, to) = (device.upload(&[5_u32; 64]), device.allocate(256));
    block(&device, &copied(0), 64, &[Value::Wide(from), Value::Wide(to)]).good();
    block(&device, &copied(128), 64, &[Value::Wide(from), Value::Wide(to)]).fails(
        ILLEGAL_ADDRESS,
        &["out-of-bounds read of 4 bytes", "0 bytes after the end of allocation", "thread (32, 0, 0)"],
    );
}

#[test]
fn before_the_start() {
    let device = device();
    let (from, to) = (device.upload(&[5_u32; 64]), device.allocate(256));
    block(&device, &copied(-4), 64, &[Value::Wide(from), Value::Wide(to)])
        .fails(ILLEGAL_ADDRESS, &["out-of-bounds read", "thread (0, 0, 0)", "ld.global.u32"]);
}

#[test]
fn a_write_beyond_the_end() {
    let device = device();
    let (from, to) = (device.upload(&[5_u32; 64]), device.allocate(252));
    let short = device.upload(&[5_u32; 63]);
    block(&device, &copied(0), 63, &[Value::Wide(short), Value::Wide(to)]).good();
    block(&device, &copied(0), 64, &[Value::Wide(from), Value::Wide(to)])
        .fails(ILLEGAL_ADDRESS, &["out-of-bounds write", "0 bytes after the end", "(252 bytes"]);
}

#[test]
fn a_global_read_of_what_was_not_written() {
    let device = device();
    let (from, to) = (device.allocate(256), device.allocate(256));
    block(&device, &copied(0), 64, &[Value::Wide(from), Value::Wide(to)])
        .fails(FAILED, &["uninitialized read", "byte 0 of allocation"]);
}

#[test]
fn a_host_read_of_what_was_not_written() {
    let device = device();
    let (from, to) = (device.upload(&[1_u32; 64]), device.allocate(256));
    // Half of the buffer is written.
    block(&device, &copied(0), 32, &[Value::Wide(from), Value::Wide(to)]).good();
    let mut out = [0_u32; 64];
    // SAFETY: the range is that of the array.
    let result = unsafe { cuda::driver::cuMemcpyDtoH_v2(out.as_mut_ptr().cast(), to, 256) };
    assert_eq!(result, FAILED);
    assert_eq!(device.download::<u32>(to, 32), [1; 32]);
}

#[test]
fn use_after_free() {
    let device = device();
    let (from, to) = (device.upload(&[5_u32; 64]), device.allocate(256));
    device.free(from);
    block(&device, &copied(0), 64, &[Value::Wide(from), Value::Wide(to)])
        .fails(ILLEGAL_ADDRESS, &["use after free", "freed allocation"]);
}

#[test]
fn an_accumulator_that_is_not_set() {
    let device = device();
    let sum = |first: &str| {
        let body = format!(
            "{first}\nmov.u32 %r5, 0;\nL:\ncvt.rn.f32.u32 %f2, %r5;\nadd.f32 %f1, %f1, %f2;\nadd.s32 %r5, %r5, 1;\n\
             setp.lt.u32 %p1, %r5, 4;\n@%p1 bra L;\nadd.s64 %rd3, %rd1, %rd10;\nst.global.f32 [%rd3], %f1;"
        );
        kernel("", 1, &body)
    };
    let out = device.allocate(128);
    block(&device, &sum("mov.f32 %f1, 0f00000000;"), 32, &[Value::Wide(out)]).good();
    assert_eq!(device.download::<f32>(out, 32), [6.0; 32]);
    // In a loop the second pass would read what the first one wrote, so that the first reading has no value on one path only.
    let once = kernel("", 1, "add.f32 %f1, %f1, 0f3f800000;\nadd.s64 %rd3, %rd1, %rd10;\nst.global.f32 [%rd3], %f1;");
    block(&device, &once, 32, &[Value::Wide(out)]).fails(FAILED, &["uninitialized register", "add.f32 %f1, %f1"]);
}

#[test]
fn an_accumulator_in_shared_memory_that_is_not_set() {
    let device = device();
    let body = |first: &str| {
        let body = format!(
            "mov.u64 %rd3, s;\nadd.s64 %rd4, %rd3, %rd10;\n{first}\nld.shared.f32 %f1, [%rd4];\nadd.f32 %f1, %f1, 0f3f800000;\n\
             st.shared.f32 [%rd4], %f1;"
        );
        kernel(".shared .align 4 .b8 s[128];", 0, &body)
    };
    block(&device, &body("st.shared.u32 [%rd4], 0;"), 32, &[]).good();
    block(&device, &body(""), 32, &[]).fails(FAILED, &["uninitialized read of 4 bytes at byte 0 of 128"]);
}

#[test]
fn a_barrier_in_a_branch() {
    let device = device();
    // Half of a warp waits at one barrier, half at another.
    let divergent = "setp.lt.u32 %p1, %r1, 16;\n@%p1 bra A;\nbar.sync 0;\nbra B;\nA:\nbar.sync 0;\nB:";
    block(&device, &kernel("", 0, divergent), 32, &[]).fails(FAILED, &["different barriers"]);
    // Whole warps may.
    block(&device, &kernel("", 0, &divergent.replace(", 16;", ", 32;")), 64, &[]).good();
}

#[test]
fn a_barrier_that_some_threads_miss() {
    let device = device();
    let body = |last: u32| kernel("", 0, &format!("setp.ge.u32 %p1, %r1, {last};\n@%p1 ret;\nbar.sync 0;"));
    block(&device, &body(64), 64, &[]).good();
    block(&device, &body(48), 64, &[]).fails(FAILED, &["a barrier is missed by 16 of 64 threads"]);
}

#[test]
fn threads_that_wait_for_different_things() {
    let device = device();
    let body = "setp.lt.u32 %p1, %r1, 16;\n@%p1 bra A;\nbar.sync 0;\nbra B;\nA:\nbar.sync 1;\nB:";
    block(&device, &kernel("", 0, body), 32, &[])
        .fails(FAILED, &["no thread can continue", "16 threads wait for the barrier"]);
}

#[test]
fn a_misaligned_access() {
    let device = device();
    let from = device.upload(&[1_u32; 16]);
    let body = |shift: u32| kernel("", 1, &format!("ld.global.v2.u32 {{%r3, %r4}}, [%rd1+{shift}];"));
    block(&device, &body(8), 1, &[Value::Wide(from)]).good();
    block(&device, &body(4), 1, &[Value::Wide(from)]).fails(MISALIGNED, &["misaligned read of 8 bytes"]);
}

#[test]
fn beyond_the_shared_memory() {
    let device = device();
    let body = "mov.u64 %rd3, s;\nadd.s64 %rd4, %rd3, %rd10;\nst.shared.u32 [%rd4], %r1;";
    let ptx = kernel(".extern .shared .align 16 .b8 s[];", 0, body);
    device.run(&ptx, [1; 3], [64, 1, 1], 256, &[]).good();
    device
        .run(&ptx, [1; 3], [64, 1, 1], 240, &[])
        .fails(ILLEGAL_ADDRESS, &["out-of-bounds write of 4 bytes at byte 240 of 240 bytes of shared memory"]);
}

#[test]
fn beyond_the_local_memory() {
    let device = device();
    let body = |at: u32| {
        kernel("", 0, &format!(".local .align 4 .b8 l[16];\nmov.u64 %rd3, l;\nst.local.u32 [%rd3+{at}], %r1;"))
    };
    block(&device, &body(12), 1, &[]).good();
    block(&device, &body(16), 1, &[]).fails(ILLEGAL_ADDRESS, &["out-of-bounds write of 4 bytes of local memory"]);
}

#[test]
fn two_threads_write_the_same_element() {
    let device = device();
    let out = device.allocate(256);
    let body = |shift: u32| {
        kernel(
            "",
            1,
            &format!(
                "shr.u32 %r3, %r1, {shift};\nmul.wide.u32 %rd3, %r3, 4;\nadd.s64 %rd3, %rd1, %rd3;\nst.global.u32 [%rd3], %r1;"
            ),
        )
    };
    block(&device, &body(0), 64, &[Value::Wide(out)]).good();
    block(&device, &body(1), 64, &[Value::Wide(out)])
        .fails(FAILED, &["race: write", "global memory", "after a write by thread (0, 0, 0)"]);
}

#[test]
fn two_blocks_add_to_the_same_element() {
    let device = device();
    let sum = |add: &str| kernel("", 1, add);
    let plain = "ld.global.u32 %r3, [%rd1];\nadd.s32 %r3, %r3, 1;\nst.global.u32 [%rd1], %r3;";
    let out = device.upload(&[0_u32]);
    device.run(&sum("red.global.add.u32 [%rd1], 1;"), [8, 1, 1], [1, 1, 1], 0, &[Value::Wide(out)]).good();
    assert_eq!(device.download::<u32>(out, 1), [8]);
    device.run(&sum(plain), [1, 1, 1], [1, 1, 1], 0, &[Value::Wide(out)]).good();
    device.run(&sum(plain), [8, 1, 1], [1, 1, 1], 0, &[Value::Wide(out)]).fails(FAILED, &["race", "block 0"]);
}

#[test]
fn threads_of_a_warp_that_do_not_wait_for_each_other() {
    let device = device();
    let body = |wait: &str| {
        let body = format!(
            "mov.u64 %rd3, s;\nadd.s64 %rd4, %rd3, %rd10;\nst.shared.u32 [%rd4], %r1;\nbar.sync 0;\nxor.b32 %r3, %r1, 1;\n\
             mul.wide.u32 %rd5, %r3, 4;\nadd.s64 %rd5, %rd3, %rd5;\nld.shared.u32 %r4, [%rd5];\n{wait}\n\
             st.shared.u32 [%rd4], %r4;"
        );
        kernel(".shared .align 4 .b8 s[128];", 0, &body)
    };
    block(&device, &body("bar.warp.sync 0xffffffff;"), 32, &[]).good();
    block(&device, &body(""), 32, &[]).fails(FAILED, &["race"]);
}

#[test]
fn an_asynchronous_copy_that_is_not_waited_for() {
    let device = device();
    let from = device.upload(&[7_u32; 4]);
    let out = device.allocate(16);
    let body = |wait: &str| {
        let body = format!(
            "mov.u64 %rd3, s;\ncp.async.cg.shared.global [%rd3], [%rd1], 16;\ncp.async.commit_group;\n{wait}\n\
             ld.shared.v4.u32 {{%r3, %r4, %r5, %r6}}, [%rd3];\nst.global.v4.u32 [%rd2], {{%r3, %r4, %r5, %r6}};"
        );
        kernel(".shared .align 16 .b8 s[16];", 2, &body)
    };
    block(&device, &body("cp.async.wait_group 0;"), 1, &[Value::Wide(from), Value::Wide(out)]).good();
    assert_eq!(device.download::<u32>(out, 4), [7; 4]);
    block(&device, &body("cp.async.wait_group 1;"), 1, &[Value::Wide(from), Value::Wide(out)])
        .fails(FAILED, &["uninitialized read of 16 bytes"]);
}

#[test]
fn the_sum_of_a_warp_by_a_wrong_lane() {
    let device = device();
    let sum = |last: u32| {
        let steps: String = [16, 8, 4, 2, last]
            .iter()
            .map(|step| format!("shfl.sync.bfly.b32 %r4, %r3, {step}, 31, 0xffffffff;\nadd.s32 %r3, %r3, %r4;\n"))
            .collect();
        kernel("", 1, &format!("mov.u32 %r3, %r1;\n{steps}add.s64 %rd3, %rd1, %rd10;\nst.global.u32 [%rd3], %r3;"))
    };
    let out = device.allocate(128);
    block(&device, &sum(1), 32, &[Value::Wide(out)]).good();
    assert_eq!(device.download::<u32>(out, 32), [496; 32]);
    block(&device, &sum(2), 32, &[Value::Wide(out)]).good();
    assert_ne!(device.download::<u32>(out, 32), [496; 32]);
}

#[test]
fn a_thread_that_its_mask_excludes() {
    let device = device();
    let body = |mask: &str| kernel("", 0, &format!("shfl.sync.idx.b32 %r3, %r1, 0, 31, {mask};"));
    block(&device, &body("0xffffffff"), 32, &[]).good();
    block(&device, &body("0x0000ffff"), 32, &[]).fails(FAILED, &["excludes"]);
}

#[test]
fn a_loop_without_end() {
    let device = device();
    block(&device, &kernel("", 0, "L:\nadd.s32 %r1, %r1, 1;\nbra L;"), 1, &[]).fails(LAUNCH_TIMEOUT, &["does not end"]);
}

#[test]
fn an_unknown_instruction() {
    let device = device();
    let body = "setp.eq.u32 %p1, %r1, 7;\n@%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%rd1], 32;";
    let ptx = kernel("", 1, body);
    // Not reached.
    block(&device, &ptx, 7, &[Value::Wide(0)]).good();
    block(&device, &ptx, 8, &[Value::Wide(0)]).fails(NOT_SUPPORTED, &["tcgen05.alloc", "thread (7, 0, 0)"]);
}

#[test]
fn memory_of_another_device() {
    let device = device();
    let to = device.allocate(256);
    block(&device, &copied(0), 64, &[Value::Wide(cuda::memory::BASE + cuda::memory::SPAN), Value::Wide(to)])
        .fails(ILLEGAL_ADDRESS, &["no memory of this device"]);
}

#[test]
fn text_that_is_not_ptx() {
    let device = device();
    let ptx = kernel("", 0, "").replace(".address_size", ".adress_size"); // typos: off
    block(&device, &ptx, 1, &[]).fails(218, &["line 3", "unknown directive"]);
}
