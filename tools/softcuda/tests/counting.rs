//! What is counted.

mod device;

use cuda::counts::{self, Kind};
use device::{Device, Value, kernel};

#[test]
fn launches_bytes_operations_and_waits_are_counted() {
    let device = Device::new("uninitialized,barriers");
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
    let device = Device::new("uninitialized,barriers");
    counts::reset();
    let body = "mov.u32 %r10, 0;\nmov.f32 %f1, 0f00000000;\n\
         mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1, %f2, %f3, %f4}, {%r10, %r10, %r10, %r10}, {%r10, %r10}, {%f1, %f1, %f1, %f1};";
    device.run(&kernel("", 0, body), [3, 1, 1], [64, 1, 1], 0, &[]).good();
    assert_eq!(counts::of_kernel("k", Kind::MatrixBf16), 3 * 2 * 2 * 16 * 8 * 16);
    assert_eq!(counts::of_kernel("k", Kind::MatrixTf32), 0);
}
