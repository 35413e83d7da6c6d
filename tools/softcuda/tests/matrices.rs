//! Products of matrices by a warp, against products by loops.

mod device;

use cuda::run::matrix::{f32_to_bf16, f32_to_f16};
use device::{Device, Value, kernel};

/// Small whole numbers, so that every sum is exact.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 28) as f32 - 8.0
        })
        .collect()
}

fn product(a: &[f32], b: &[f32], c: &[f32], [m, n, k]: [usize; 3]) -> Vec<f32> {
    let mut out = c.to_vec();
    for row in 0..m {
        for column in 0..n {
            for step in 0..k {
                out[row * n + column] += a[row * k + step] * b[step * n + column];
            }
        }
    }
    out
}

fn halves(values: &[f32], bf16: bool) -> Vec<u16> {
    values.iter().map(|&value| if bf16 { f32_to_bf16(value) } else { f32_to_f16(value) }).collect()
}

/// `wmma` of 16 by 16 numbers: both operands from memory, row by row and column by column.
fn wmma(kind: &str, bf16: bool, b_layout: &str) -> (Vec<f32>, Vec<f32>) {
    let device = Device::new("all");
    let (a, b, c) = (numbers(256, 1), numbers(256, 2), numbers(256, 3));
    let stored: Vec<f32> =
        if b_layout == "col" { (0..256).map(|i| b[i % 16 * 16 + i / 16]).collect() } else { b.clone() };
    let addresses = [
        device.upload(&halves(&a, bf16)),
        device.upload(&halves(&stored, bf16)),
        device.upload(&c),
        device.allocate(1024),
    ];
    let count = if bf16 { 4 } else { 8 };
    let list =
        |from: usize, count: usize| (from..from + count).map(|i| format!("%r{i}")).collect::<Vec<_>>().join(", ");
    let floats = (1..9).map(|i| format!("%f{i}")).collect::<Vec<_>>().join(", ");
    let types = if bf16 { "f32.bf16.bf16.f32" } else { "f32.f32" };
    let body = format!(
        "wmma.load.a.sync.aligned.row.m16n16k16.global.{kind} {{{}}}, [%rd1], 16;\n\
         wmma.load.b.sync.aligned.{b_layout}.m16n16k16.global.{kind} {{{}}}, [%rd2], 16;\n\
         wmma.load.c.sync.aligned.row.m16n16k16.global.f32 {{{floats}}}, [%rd3], 16;\n\
         wmma.mma.sync.aligned.row.{b_layout}.m16n16k16.{types} {{{floats}}}, {{{}}}, {{{}}}, {{{floats}}};\n\
         wmma.store.d.sync.aligned.row.m16n16k16.global.f32 [%rd4], {{{floats}}}, 16;",
        list(10, count),
        list(20, count),
        list(10, count),
        list(20, count)
    );
    device.run(&kernel("", 4, &body), [1; 3], [32, 1, 1], 0, &addresses.map(Value::Wide)).good();
    (device.download(addresses[3], 256), product(&a, &b, &c, [16, 16, 16]))
}

#[test]
fn wmma_multiplies_halves() {
    for layout in ["row", "col"] {
        let (found, expected) = wmma("f16", false, layout);
        assert_eq!(found, expected);
    }
}

#[test]
fn wmma_multiplies_bfloat16() {
    let (found, expected) = wmma("bf16", true, "col");
    assert_eq!(found, expected);
}

/// `mma.m16n8k16` whose fragments are loaded by the layout of the PTX manual; `wrong` swaps two lanes of the second operand.
fn mma(wrong: bool) -> (Vec<f32>, Vec<f32>) {
    let device = Device::new("all");
    let (a, b, c) = (numbers(256, 1), numbers(128, 2), numbers(128, 3));
    let columns: Vec<f32> = (0..128).map(|i| b[i % 16 * 8 + i / 16]).collect();
    let addresses = [
        device.upload(&halves(&a, true)),
        device.upload(&halves(&columns, true)),
        device.upload(&c),
        device.allocate(512),
    ];
    let lane = if wrong { "xor.b32 %r3, %r1, 1;" } else { "mov.u32 %r3, %r1;" };
    // Group %r4 = lane / 4, in it %r5 = lane % 4; a: row * 32 + in * 4 bytes; b: column * 32 + in * 4 bytes; c: row * 32 + in * 8.
    let body = format!(
        "shr.u32 %r4, %r1, 2;\nand.b32 %r5, %r1, 3;\n\
         mul.wide.u32 %rd5, %r4, 32;\nmul.wide.u32 %rd6, %r5, 4;\nadd.s64 %rd7, %rd5, %rd6;\nadd.s64 %rd7, %rd1, %rd7;\n\
         ld.global.u32 %r10, [%rd7];\nld.global.u32 %r11, [%rd7+256];\nld.global.u32 %r12, [%rd7+16];\nld.global.u32 %r13, [%rd7+272];\n\
         {lane}\nshr.u32 %r6, %r3, 2;\nand.b32 %r7, %r3, 3;\nmul.wide.u32 %rd8, %r6, 32;\nmul.wide.u32 %rd9, %r7, 4;\n\
         add.s64 %rd8, %rd8, %rd9;\nadd.s64 %rd8, %rd2, %rd8;\nld.global.u32 %r14, [%rd8];\nld.global.u32 %r15, [%rd8+16];\n\
         mul.wide.u32 %rd11, %r5, 8;\nadd.s64 %rd11, %rd11, %rd5;\nadd.s64 %rd12, %rd3, %rd11;\nadd.s64 %rd13, %rd4, %rd11;\n\
         ld.global.v2.f32 {{%f1, %f2}}, [%rd12];\nld.global.v2.f32 {{%f3, %f4}}, [%rd12+256];\n\
         mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{%f1, %f2, %f3, %f4}}, {{%r10, %r11, %r12, %r13}}, {{%r14, %r15}}, {{%f1, %f2, %f3, %f4}};\n\
         st.global.v2.f32 [%rd13], {{%f1, %f2}};\nst.global.v2.f32 [%rd13+256], {{%f3, %f4}};"
    );
    device.run(&kernel("", 4, &body), [1; 3], [32, 1, 1], 0, &addresses.map(Value::Wide)).good();
    (device.download(addresses[3], 128), product(&a, &b, &c, [16, 8, 16]))
}

#[test]
fn mma_multiplies_bfloat16() {
    let (found, expected) = mma(false);
    assert_eq!(found, expected);
}

#[test]
fn a_wrong_lane_changes_the_product() {
    let (found, expected) = mma(true);
    assert_ne!(found, expected);
}

#[test]
fn mma_multiplies_tf32_and_ignores_what_it_cannot_hold() {
    let device = Device::new("all");
    let (mut a, b) = (numbers(128, 1), numbers(64, 2));
    let expected = product(&a, &b, &[0.0; 128], [16, 8, 8]);
    // Bits that the unit does not see.
    a.iter_mut().for_each(|value| *value = f32::from_bits(value.to_bits() | 0x7ff));
    let addresses = [device.upload(&a), device.upload(&b), device.allocate(512)];
    let body = "shr.u32 %r4, %r1, 2;\nand.b32 %r5, %r1, 3;\nmul.wide.u32 %rd5, %r4, 32;\nmul.wide.u32 %rd6, %r5, 4;\n\
         add.s64 %rd7, %rd5, %rd6;\nadd.s64 %rd7, %rd1, %rd7;\nld.global.u32 %r10, [%rd7];\nld.global.u32 %r11, [%rd7+256];\n\
         ld.global.u32 %r12, [%rd7+16];\nld.global.u32 %r13, [%rd7+272];\nmul.wide.u32 %rd8, %r5, 32;\nmul.wide.u32 %rd9, %r4, 4;\n\
         add.s64 %rd8, %rd8, %rd9;\nadd.s64 %rd8, %rd2, %rd8;\nld.global.u32 %r14, [%rd8];\nld.global.u32 %r15, [%rd8+128];\n\
         mov.f32 %f1, 0f00000000;\nmov.f32 %f2, 0f00000000;\nmov.f32 %f3, 0f00000000;\nmov.f32 %f4, 0f00000000;\n\
         mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1, %f2, %f3, %f4}, {%r10, %r11, %r12, %r13}, {%r14, %r15}, {%f1, %f2, %f3, %f4};\n\
         mul.wide.u32 %rd11, %r5, 8;\nadd.s64 %rd11, %rd11, %rd5;\nadd.s64 %rd13, %rd3, %rd11;\n\
         st.global.v2.f32 [%rd13], {%f1, %f2};\nst.global.v2.f32 [%rd13+256], {%f3, %f4};";
    device.run(&kernel("", 3, body), [1; 3], [32, 1, 1], 0, &addresses.map(Value::Wide)).good();
    assert_eq!(device.download::<f32>(addresses[2], 128), expected);
}

#[test]
fn mma_multiplies_bytes() {
    let device = Device::new("all");
    let (a, b) = (numbers(256, 1), numbers(128, 2));
    let bytes = |values: &[f32]| values.iter().map(|&value| value as i8).collect::<Vec<i8>>();
    let columns: Vec<f32> = (0..128).map(|i| b[i % 16 * 8 + i / 16]).collect();
    let addresses = [device.upload(&bytes(&a)), device.upload(&bytes(&columns)), device.allocate(512)];
    let body = "shr.u32 %r4, %r1, 2;\nand.b32 %r5, %r1, 3;\nmul.wide.u32 %rd5, %r4, 16;\nmul.wide.u32 %rd6, %r5, 4;\n\
         add.s64 %rd7, %rd5, %rd6;\nadd.s64 %rd8, %rd1, %rd7;\nld.global.u32 %r10, [%rd8];\nld.global.u32 %r11, [%rd8+128];\n\
         add.s64 %rd9, %rd2, %rd7;\nld.global.u32 %r14, [%rd9];\n\
         mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%r20, %r21, %r22, %r23}, {%r10, %r11}, {%r14}, {0, 0, 0, 0};\n\
         mul.wide.u32 %rd11, %r5, 8;\nmul.wide.u32 %rd12, %r4, 32;\nadd.s64 %rd11, %rd11, %rd12;\nadd.s64 %rd13, %rd3, %rd11;\n\
         st.global.v2.u32 [%rd13], {%r20, %r21};\nst.global.v2.u32 [%rd13+256], {%r22, %r23};";
    device.run(&kernel("", 3, body), [1; 3], [32, 1, 1], 0, &addresses.map(Value::Wide)).good();
    let expected: Vec<i32> = product(&a, &b, &[0.0; 128], [16, 8, 16]).iter().map(|&value| value as i32).collect();
    assert_eq!(device.download::<i32>(addresses[2], 128), expected);
}

#[test]
fn ldmatrix_and_stmatrix_move_rows_and_columns() {
    let device = Device::new("all");
    // Four matrices of 8 by 8 numbers, row by row: number r * 8 + c of matrix i is 64 i + 8 r + c.
    let values: Vec<u16> = (0..256).collect();
    let (from, to, back) = (device.upload(&values), device.allocate(512), device.allocate(512));
    let body = |turned: &str| {
        let body = format!(
            "mov.u64 %rd4, s;\nmul.wide.u32 %rd5, %r1, 16;\nadd.s64 %rd6, %rd4, %rd5;\nadd.s64 %rd7, %rd1, %rd5;\n\
             ld.global.v4.u32 {{%r3, %r4, %r5, %r6}}, [%rd7];\nst.shared.v4.u32 [%rd6], {{%r3, %r4, %r5, %r6}};\nbar.sync 0;\n\
             ldmatrix.sync.aligned.m8n8.x4{turned}.shared.b16 {{%r10, %r11, %r12, %r13}}, [%rd6];\n\
             add.s64 %rd8, %rd2, %rd5;\nst.global.v4.u32 [%rd8], {{%r10, %r11, %r12, %r13}};\nbar.sync 0;\n\
             stmatrix.sync.aligned.m8n8.x4.shared.b16 [%rd6], {{%r10, %r11, %r12, %r13}};\nbar.sync 0;\n\
             ld.shared.v4.u32 {{%r3, %r4, %r5, %r6}}, [%rd6];\nadd.s64 %rd9, %rd3, %rd5;\nst.global.v4.u32 [%rd9], {{%r3, %r4, %r5, %r6}};"
        );
        kernel(".shared .align 16 .b8 s[512];", 3, &body)
    };
    let addresses = [from, to, back].map(Value::Wide);
    device.run(&body(""), [1; 3], [32, 1, 1], 0, &addresses).good();
    for (lane, numbers) in device.download::<u16>(to, 256).chunks(8).enumerate() {
        for (i, &number) in numbers.iter().enumerate() {
            let (matrix, row, column) = (i / 2, lane / 4, lane % 4 * 2 + i % 2);
            assert_eq!(usize::from(number), 64 * matrix + 8 * row + column);
        }
    }
    assert_eq!(device.download::<u16>(back, 256), values);
    device.run(&body(".trans"), [1; 3], [32, 1, 1], 0, &addresses).good();
    let turned: Vec<u16> = (0..256).map(|i| i / 64 * 64 + i % 8 * 8 + i % 64 / 8).collect();
    assert_eq!(device.download::<u16>(back, 256), turned);
}

#[test]
fn a_product_without_all_threads_is_found() {
    let device = Device::new("all");
    let body = "setp.ge.u32 %p1, %r1, 31;\n@%p1 ret;\nmov.u32 %r10, 0;\nmov.u32 %r11, 0;\nmov.f32 %f1, 0f00000000;\n\
         mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%f1, %f1, %f1, %f1}, {%r10, %r11}, {%r10}, {%f1, %f1, %f1, %f1};";
    device
        .run(&kernel("", 0, body), [1; 3], [32, 1, 1], 0, &[])
        .fails(719, &["no thread can continue", "1 threads have ended, 31 threads wait"]);
}
