//! Values that are computed from memory that was not written: of no consequence where they are not used, found where they are.

mod device;

use device::{Device, Outcome, Value, kernel};

const FAILED: i32 = 719;

fn device() -> Device {
    Device::new("all")
}

fn block(device: &Device, ptx: &str, threads: u32, values: &[Value]) -> Outcome {
    device.run(ptx, [1, 1, 1], [threads, 1, 1], 0, values)
}

/// Whether the host may read `count` numbers.
fn readable(address: u64, count: usize) -> bool {
    let mut out = vec![0_u32; count];
    // SAFETY: the range is that of the vector.
    let result = unsafe { cuda::driver::cuMemcpyDtoH_v2(out.as_mut_ptr().cast(), address, 4 * count) };
    assert!(result == 0 || result == FAILED);
    result == 0
}

/// Each thread reads its number of the first buffer, does something, and writes `%r4` to the second.
fn through(body: &str) -> String {
    let body = format!(
        "add.s64 %rd3, %rd1, %rd10;\nld.global.u32 %r3, [%rd3];\n{body}\nadd.s64 %rd4, %rd2, %rd10;\nst.global.u32 [%rd4], %r4;"
    );
    kernel(".shared .align 16 .b8 s[1024];", 2, &body)
}

/// A buffer of 64 numbers whose second half was not written, and one for results.
fn buffers(device: &Device) -> (u64, u64) {
    let (from, to) = (device.allocate(256), device.allocate(256));
    let values = [3_u32; 32];
    // SAFETY: the range is that of the array.
    assert_eq!(unsafe { cuda::driver::cuMemcpyHtoD_v2(from, values.as_ptr().cast(), 128) }, 0);
    (from, to)
}

#[test]
fn a_value_that_is_not_selected_is_of_no_consequence() {
    let device = device();
    let (from, to) = buffers(&device);
    let select = |last: u32| through(&format!("setp.lt.u32 %p1, %r1, {last};\nselp.b32 %r4, %r3, 0, %p1;"));
    block(&device, &select(32), 64, &[Value::Wide(from), Value::Wide(to)]).good();
    assert_eq!(device.download::<u32>(to, 64)[31..33], [3, 0]);
    // One too many is selected.
    block(&device, &select(33), 64, &[Value::Wide(from), Value::Wide(to)]).good();
    assert!(readable(to, 32) && !readable(to + 128, 1) && readable(to + 132, 31));
}

#[test]
fn arithmetic_spreads_it() {
    let device = device();
    let (from, to) = buffers(&device);
    for operation in [
        "add.s32 %r4, %r3, 1;",
        "mov.b32 %f1, %r3;\nmul.f32 %f2, %f1, 0f40000000;\nmov.b32 %r4, %f2;",
        "shr.u32 %r4, %r3, 8;",
    ] {
        block(&device, &through(operation), 64, &[Value::Wide(from), Value::Wide(to)]).good();
        assert!(readable(to, 32), "{operation}");
        assert!(!readable(to + 128, 1), "{operation}");
    }
}

#[test]
fn each_byte_is_followed_by_itself() {
    let device = device();
    let (from, to) = (device.allocate(4), device.allocate(256));
    // The lower half is written, the upper is not.
    // SAFETY: the range is that of the array.
    assert_eq!(unsafe { cuda::driver::cuMemcpyHtoD_v2(from, [7_u8, 0].as_ptr().cast(), 2) }, 0);
    for (body, good) in [
        ("mov.b32 {%h1, %h2}, %r3;\ncvt.u32.u16 %r4, %h1;", true),
        ("mov.b32 {%h1, %h2}, %r3;\ncvt.u32.u16 %r4, %h2;", false),
        ("mov.b32 {%h1, %h2}, %r3;\nmov.b32 %r5, {%h1, %h1};\nmov.b32 %r4, %r5;", true),
        ("shl.b32 %r4, %r3, 16;", true),
        ("shr.u32 %r4, %r3, 16;", false),
    ] {
        block(&device, &through(body), 1, &[Value::Wide(from), Value::Wide(to)]).good();
        assert_eq!(readable(to, 1), good, "{body}");
    }
}

#[test]
fn a_branch_by_it_is_found() {
    let device = device();
    let (from, to) = buffers(&device);
    let ptx = through("mov.u32 %r4, 0;\nsetp.gt.s32 %p1, %r3, 2;\n@%p1 bra L;\nmov.u32 %r4, 1;\nL:");
    block(&device, &ptx, 32, &[Value::Wide(from), Value::Wide(to)]).good();
    block(&device, &ptx, 64, &[Value::Wide(from), Value::Wide(to)]).fails(
        FAILED,
        &[
            "the thread branches by a value that is computed from memory that was not written",
            "thread (32, 0, 0)",
            "the first such read",
            "ld.global.u32 %r3",
        ],
    );
}

#[test]
fn an_address_by_it_is_found() {
    let device = device();
    let (from, to) = buffers(&device);
    let ptx = through("mul.wide.u32 %rd5, %r3, 4;\nadd.s64 %rd5, %rd1, %rd5;\nld.global.u32 %r4, [%rd5];");
    block(&device, &ptx, 32, &[Value::Wide(from), Value::Wide(to)]).good();
    block(&device, &ptx, 64, &[Value::Wide(from), Value::Wide(to)]).fails(FAILED, &["accesses memory at a value"]);
}

#[test]
fn an_atomic_operation_with_it_is_found() {
    let device = device();
    let (from, to) = buffers(&device);
    let sum = device.upload(&[0_u32]);
    let ptx = kernel("", 2, "add.s64 %rd3, %rd1, %rd10;\nld.global.u32 %r3, [%rd3];\nred.global.add.u32 [%rd2], %r3;");
    block(&device, &ptx, 32, &[Value::Wide(from), Value::Wide(sum)]).good();
    assert_eq!(device.download::<u32>(sum, 1), [96]);
    block(&device, &ptx, 64, &[Value::Wide(from), Value::Wide(sum)]).fails(FAILED, &["an atomic operation takes"]);
    block(&device, &ptx, 32, &[Value::Wide(from), Value::Wide(to)]).fails(FAILED, &["uninitialized atomic operation"]);
}

#[test]
fn it_is_followed_through_memory_and_kernels() {
    let device = device();
    let (from, to) = buffers(&device);
    let last = device.allocate(256);
    let shared = "mov.u64 %rd5, s;\nadd.s64 %rd5, %rd5, %rd10;\nst.shared.u32 [%rd5], %r3;\nld.shared.u32 %r4, [%rd5];";
    block(&device, &through(shared), 64, &[Value::Wide(from), Value::Wide(to)]).good();
    block(&device, &through("add.s32 %r4, %r3, 1;"), 64, &[Value::Wide(to), Value::Wide(last)]).good();
    assert!(readable(last, 32) && !readable(last + 128, 1));
    // Written again with what is defined.
    block(&device, &through("mov.u32 %r4, 5;"), 64, &[Value::Wide(from), Value::Wide(last)]).good();
    assert!(readable(last, 64));
}

#[test]
fn the_missing_lane_of_a_shuffle_is_not_defined() {
    let device = device();
    let (from, to) = (device.upload(&[1_u32; 32]), device.allocate(128));
    let ptx = |steps: &str| through(&format!("mov.u32 %r4, %r3;\n{steps}"));
    let values = [Value::Wide(from), Value::Wide(to)];
    // Of 16 threads; the first step wants 32.
    let step = |step: u32| format!("shfl.sync.bfly.b32 %r5, %r4, {step}, 31, 0xffffffff;\nadd.s32 %r4, %r4, %r5;\n");
    block(&device, &ptx(&[8, 4, 2, 1].map(step).concat()), 16, &values).good();
    assert_eq!(device.download::<u32>(to, 16), [16; 16]);
    block(&device, &ptx(&[16, 8, 4, 2, 1].map(step).concat()), 16, &values).good();
    assert!(!readable(to, 1));
}

#[test]
fn it_spreads_over_rows_and_columns_of_a_product() {
    let device = device();
    let (a, out) = (device.allocate(512), device.allocate(512));
    // Of the left matrix, row 3 was not written.
    let row = [0_u16; 16];
    for at in (0..16).filter(|&at| at != 3) {
        // SAFETY: the range is that of the array.
        assert_eq!(unsafe { cuda::driver::cuMemcpyHtoD_v2(a + 32 * at, row.as_ptr().cast(), 32) }, 0);
    }
    let body = "shr.u32 %r4, %r1, 2;\nand.b32 %r5, %r1, 3;\nmul.wide.u32 %rd5, %r4, 32;\nmul.wide.u32 %rd6, %r5, 4;\n\
         add.s64 %rd7, %rd5, %rd6;\nadd.s64 %rd7, %rd1, %rd7;\nld.global.u32 %r10, [%rd7];\nld.global.u32 %r11, [%rd7+256];\n\
         ld.global.u32 %r12, [%rd7+16];\nld.global.u32 %r13, [%rd7+272];\nmov.u32 %r14, 0;\nmov.f32 %f1, 0f00000000;\n\
         mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1, %f2, %f3, %f4}, {%r10, %r11, %r12, %r13}, {%r14, %r14}, {%f1, %f1, %f1, %f1};\n\
         mul.wide.u32 %rd11, %r5, 8;\nadd.s64 %rd11, %rd11, %rd5;\nadd.s64 %rd13, %rd2, %rd11;\n\
         st.global.v2.f32 [%rd13], {%f1, %f2};\nst.global.v2.f32 [%rd13+256], {%f3, %f4};";
    block(&device, &kernel("", 2, body), 32, &[Value::Wide(a), Value::Wide(out)]).good();
    for row in 0..16 {
        assert_eq!(readable(out + 32 * row, 8), row != 3, "row {row}");
    }
}

#[test]
fn copies_on_the_device_carry_it() {
    let device = device();
    let (from, to) = buffers(&device);
    // SAFETY: both ranges are those of allocations.
    assert_eq!(unsafe { cuda::driver::cuMemcpyDtoD_v2(to, from, 256) }, 0);
    assert!(readable(to, 32) && !readable(to + 128, 1));
}

#[test]
fn a_pair_with_an_unset_half_is_of_no_consequence_unless_the_half_is_used() {
    let device = device();
    let (from, to) = buffers(&device);
    let pair = |used: &str| {
        through(&format!(
            "{{ .reg .b16 %h<5>;\ncvt.u16.u32 %h1, %r3;\nmov.b32 %r5, {{%h1, %h2}};\nmov.b32 {{%h3, %h4}}, %r5;\n\
             cvt.u32.u16 %r4, {used}; }}"
        ))
    };
    block(&device, &pair("%h3"), 32, &[Value::Wide(from), Value::Wide(to)]).good();
    assert!(readable(to, 32));
    block(&device, &pair("%h4"), 32, &[Value::Wide(from), Value::Wide(to)]).good();
    assert!(!readable(to, 1));
}
