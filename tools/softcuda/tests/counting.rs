//! What is counted.

mod device;

use cuda::counts::{self, Kind};
use device::{Device, Value, kernel};

/// Where the counts are written when the tests end.
fn device() -> Device {
    let path = std::env::temp_dir().join("softcuda-test-counts.json");
    Device::with("uninitialized,host,barriers", &[("SOFTCUDA_COUNTS", &path.to_string_lossy())])
}

#[test]
fn launches_bytes_operations_and_waits_are_counted() {
    let device = device();
    let (a, out) = (device.upload(&[1.0_f32; 256]), device.allocate(1024));
    counts::reset();
    // Each thread reads 4 bytes and writes 4; odd threads add, all multiply and add twice in a loop.
    let body = "add.s64 %rd3, %rd1, %rd10;\nld.global.f32 %f1, [%rd3];\nand.b32 %r3, %r1, 1;\nsetp.eq.u32 %p1, %r3, 1;\n\
         @%p1 add.f32 %f1, %f1, %f1;\nmov.u32 %r5, 0;\nL:\nfma.rn.f32 %f1, %f1, %f1, %f1;\nadd.s32 %r5, %r5, 1;\n\
         setp.lt.u32 %p2, %r5, 2;\n@%p2 bra L;\nadd.s64 %rd4, %rd2, %rd10;\nst.global.f32 [%rd4], %f1;";
    let values = [Value::Wide(a), Value::Wide(out)];
    device.run(&kernel("", 2, body), [1; 3], [256, 1, 1], 0, &values).good();
    assert_eq!(counts::of_kernel("k", Kind::GlobalRead), 1024);
    assert_eq!(counts::of_kernel("k", Kind::GlobalWritten), 1024);
    assert_eq!(counts::of_kernel("k", Kind::F32), 128 + 256 * 4);
    assert_eq!(counts::of_call("cuCtxSynchronize"), 1);
    let _ = device.download::<f32>(out, 256);
    assert_eq!(counts::of_call("cuMemcpyDtoH"), 1);
    let json = counts::json();
    for part in [
        "\"launches\": 1, \"blocks\": 1, \"threads\": 256",
        "\"cuMemcpyDtoH\": {\"calls\": 1, \"bytes\": 1024}",
        "\"synchronizations\": 1",
    ] {
        assert!(json.contains(part), "{part} in {json}");
    }
}

#[test]
fn operations_of_matrix_units_are_counted_by_their_type() {
    let device = device();
    counts::reset();
    let body = "mov.u32 %r10, 0;\nmov.f32 %f1, 0f00000000;\n\
         mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1, %f2, %f3, %f4}, {%r10, %r10, %r10, %r10}, {%r10, %r10}, {%f1, %f1, %f1, %f1};";
    device.run(&kernel("", 0, body), [3, 1, 1], [64, 1, 1], 0, &[]).good();
    assert_eq!(counts::of_kernel("k", Kind::MatrixBf16), 3 * 2 * 2 * 16 * 8 * 16);
    assert_eq!(counts::of_kernel("k", Kind::MatrixTf32), 0);
}

#[test]
fn bytes_that_several_threads_read_are_counted_once_as_distinct() {
    let device = device();
    let (a, out) = (device.upload(&[1_u32; 64]), device.allocate(1024));
    counts::reset();
    // 256 threads read 64 numbers in turn, and write 256.
    let body = "and.b32 %r3, %r1, 63;\nmul.wide.u32 %rd3, %r3, 4;\nadd.s64 %rd3, %rd1, %rd3;\nld.global.u32 %r4, [%rd3];\n\
         add.s64 %rd4, %rd2, %rd10;\nst.global.u32 [%rd4], %r4;";
    device.run(&kernel("", 2, body), [1; 3], [256, 1, 1], 0, &[Value::Wide(a), Value::Wide(out)]).good();
    assert_eq!(counts::of_kernel("k", Kind::GlobalRead), 1024);
    assert_eq!(counts::of_kernel("k", Kind::DistinctRead), 256);
    assert_eq!(counts::of_kernel("k", Kind::DistinctWritten), 1024);
}
