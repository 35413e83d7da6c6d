//! Instructions against the values that PTX defines for them.

mod device;

use device::{Device, Value, kernel};

/// The 32-bit results of `body`, which leaves them in `%r20`, `%r21`, ... for each of two inputs in `%r3` and `%r4`.
fn results(count: usize, inputs: &[[u32; 2]], body: &str) -> Vec<Vec<u32>> {
    let device = Device::new("uninitialized,host,barriers");
    let from = device.upload(inputs);
    let to = device.allocate(inputs.len() * count * 4);
    let stores: String = (0..count).map(|i| format!("st.global.u32 [%rd5+{}], %r{};\n", 4 * i, 20 + i)).collect();
    let ptx = kernel(
        "",
        2,
        &format!(
            "mul.wide.u32 %rd3, %r1, 8;\nadd.s64 %rd3, %rd1, %rd3;\nld.global.v2.u32 {{%r3, %r4}}, [%rd3];\n\
             mul.wide.u32 %rd4, %r1, {};\nadd.s64 %rd5, %rd2, %rd4;\nmov.b32 %f1, %r3;\nmov.b32 %f2, %r4;\n{body}\n{stores}",
            4 * count
        ),
    );
    let threads = inputs.len() as u32;
    device.run(&ptx, [1; 3], [threads, 1, 1], 0, &[Value::Wide(from), Value::Wide(to)]).good();
    device.download::<u32>(to, inputs.len() * count).chunks(count).map(<[u32]>::to_vec).collect()
}

fn bits(value: f32) -> u32 {
    value.to_bits()
}

#[test]
fn sums_are_rounded_in_the_four_directions() {
    let tiny = 2_f32.powi(-30);
    let out = results(
        4,
        &[[bits(1.0), bits(tiny)], [bits(-1.0), bits(-tiny)], [bits(1.5), bits(0.25)]],
        "add.rn.f32 %f3, %f1, %f2;\nadd.rz.f32 %f4, %f1, %f2;\nadd.rm.f32 %f5, %f1, %f2;\nadd.rp.f32 %f6, %f1, %f2;\n\
         mov.b32 %r20, %f3;\nmov.b32 %r21, %f4;\nmov.b32 %r22, %f5;\nmov.b32 %r23, %f6;",
    );
    let up = 1.0 + f32::EPSILON;
    assert_eq!(out[0], [1.0, 1.0, 1.0, up].map(bits));
    assert_eq!(out[1], [-1.0, -1.0, -up, -1.0].map(bits));
    assert_eq!(out[2], [1.75; 4].map(bits));
}

#[test]
fn fused_multiplications_round_once() {
    let a = 1.0 + f32::EPSILON;
    let out = results(
        3,
        &[[bits(a), bits(a)]],
        "neg.f32 %f7, %f1;\nmul.f32 %f3, %f1, %f2;\nneg.f32 %f4, %f3;\nfma.rn.f32 %f5, %f1, %f2, %f4;\n\
         fma.rp.f32 %f6, %f1, %f2, 0f00000000;\nmov.b32 %r20, %f3;\nmov.b32 %r21, %f5;\nmov.b32 %r22, %f6;",
    );
    let exact = f64::from(a) * f64::from(a);
    let rounded = exact as f32;
    let above = if f64::from(rounded) < exact { f32::from_bits(rounded.to_bits() + 1) } else { rounded };
    assert_eq!(out[0], [bits(rounded), bits((exact - f64::from(rounded)) as f32), bits(above)]);
}

#[test]
fn quotients_and_roots_are_rounded_in_their_direction() {
    let out = results(
        4,
        &[[bits(1.0), bits(3.0)], [bits(2.0), bits(7.0)]],
        "div.rn.f32 %f3, %f1, %f2;\ndiv.rp.f32 %f4, %f1, %f2;\nsqrt.rn.f32 %f5, %f2;\nsqrt.rz.f32 %f6, %f2;\n\
         mov.b32 %r20, %f3;\nmov.b32 %r21, %f4;\nmov.b32 %r22, %f5;\nmov.b32 %r23, %f6;",
    );
    for (row, (a, b)) in out.iter().zip([(1.0_f32, 3.0_f32), (2.0, 7.0)]) {
        let exact = f64::from(a) / f64::from(b);
        assert_eq!(f32::from_bits(row[0]), a / b);
        let up = f64::from(f32::from_bits(row[1]));
        assert!(up >= exact && up - exact < f64::from(f32::EPSILON));
        assert_eq!(f32::from_bits(row[2]), b.sqrt());
        let down = f64::from(f32::from_bits(row[3]));
        assert!(down <= f64::from(b).sqrt() && f64::from(b).sqrt() - down < 2.0 * f64::from(f32::EPSILON));
    }
}

#[test]
fn subnormal_numbers_are_flushed_where_it_is_asked_for() {
    let small = f32::from_bits(1000);
    let out = results(
        2,
        &[[bits(small), bits(1.0)], [bits(-small), bits(1.0)]],
        "mul.f32 %f3, %f1, %f2;\nmul.ftz.f32 %f4, %f1, %f2;\nmov.b32 %r20, %f3;\nmov.b32 %r21, %f4;",
    );
    assert_eq!(out, [[bits(small), bits(0.0)], [bits(-small), bits(-0.0)]]);
}

#[test]
fn conversions_to_integers_round_and_saturate() {
    let values = [2.5, -2.5, 3e9, -3e9, f32::NAN, 1e20, -0.75];
    let inputs: Vec<[u32; 2]> = values.iter().map(|&value| [bits(value), 0]).collect();
    let out = results(
        6,
        &inputs,
        "cvt.rni.s32.f32 %r20, %f1;\ncvt.rzi.s32.f32 %r21, %f1;\ncvt.rmi.s32.f32 %r22, %f1;\ncvt.rpi.s32.f32 %r23, %f1;\n\
         cvt.rzi.u32.f32 %r24, %f1;\ncvt.rzi.s8.f32 %r25, %f1;",
    );
    for (row, value) in out.iter().zip(values) {
        let signed =
            [value.round_ties_even() as i32, value as i32, value.floor() as i32, value.ceil() as i32].map(|v| v as u32);
        assert_eq!(row[..4], signed, "{value}");
        assert_eq!(row[4], value as u32, "{value}");
        assert_eq!(row[5], (value as i8) as i32 as u32, "{value}");
    }
}

#[test]
fn conversions_from_integers_round_in_their_direction() {
    let out = results(
        4,
        &[[0x0100_0001, 0], [0xfeff_ffff, 0], [0xffff_ffff, 0]],
        "cvt.rn.f32.s32 %f3, %r3;\ncvt.rz.f32.s32 %f4, %r3;\ncvt.rp.f32.s32 %f5, %r3;\ncvt.rm.f32.u32 %f6, %r3;\n\
         mov.b32 %r20, %f3;\nmov.b32 %r21, %f4;\nmov.b32 %r22, %f5;\nmov.b32 %r23, %f6;",
    );
    assert_eq!(out[0], [16777216.0, 16777216.0, 16777218.0, 16777216.0].map(bits));
    assert_eq!(out[1], [-16777216.0, -16777216.0, -16777216.0, 4278190080.0 - 256.0].map(bits));
    assert_eq!(out[2], [-1.0, -1.0, -1.0, 4294967040.0].map(bits));
}

#[test]
fn halves_are_rounded_to_the_nearest_and_toward_zero() {
    let values = [1.0, 1.0 + 2_f32.powi(-11), 1.0 + 3.0 * 2_f32.powi(-11), 65519.0, 65520.0, 1e-8, 6e-8, -1e-5];
    let inputs: Vec<[u32; 2]> = values.iter().map(|&value| [bits(value), 0]).collect();
    let out = results(
        3,
        &inputs,
        "cvt.rn.f16.f32 %h1, %f1;\ncvt.rz.f16.f32 %h2, %f1;\ncvt.rn.bf16.f32 %h3, %f1;\n\
         cvt.u32.u16 %r20, %h1;\ncvt.u32.u16 %r21, %h2;\ncvt.u32.u16 %r22, %h3;",
    );
    assert_eq!(
        out.iter().map(|row| row[0]).collect::<Vec<_>>(),
        [0x3c00, 0x3c00, 0x3c02, 0x7bff, 0x7c00, 0, 1, 0x80a8]
    );
    assert_eq!(
        out.iter().map(|row| row[1]).collect::<Vec<_>>(),
        [0x3c00, 0x3c00, 0x3c01, 0x7bff, 0x7bff, 0, 1, 0x80a7]
    );
    for (row, value) in out.iter().zip(values) {
        let bits = value.to_bits();
        assert_eq!(row[2], (bits + 0x7fff + (bits >> 16 & 1)) >> 16, "{value}");
    }
}

#[test]
fn all_halves_survive_the_way_to_single_precision_and_back() {
    for bits in 0..=u16::MAX {
        let value = cuda::run::matrix::f16_to_f32(bits);
        let back = cuda::run::matrix::f32_to_f16(value);
        assert!(
            back == bits || (value.is_nan() && back & 0x7c00 == 0x7c00),
            "{bits:#x} is {value}, and back {back:#x}"
        );
    }
    assert_eq!(cuda::run::matrix::f16_to_f32(0x3555), 0.333_251_95);
    assert_eq!(cuda::run::matrix::f16_to_f32(1), 2_f32.powi(-24));
}

#[test]
fn arithmetic_of_halves_rounds_each_result() {
    // 2049 has no half; 2048 + 1 is 2048, 2048 + 3 is 2052.
    let out = results(
        3,
        &[[0x6800, 0x3c00], [0x6800, 0x4200], [0x3c01, 0x3c01]],
        "cvt.u16.u32 %h1, %r3;\ncvt.u16.u32 %h2, %r4;\nadd.f16 %h3, %h1, %h2;\nmul.f16 %h4, %h1, %h2;\nfma.rn.f16 %h5, %h1, %h2, %h2;\n\
         cvt.u32.u16 %r20, %h3;\ncvt.u32.u16 %r21, %h4;\ncvt.u32.u16 %r22, %h5;",
    );
    assert_eq!(out[0], [0x6800, 0x6800, 0x6800]);
    assert_eq!(out[1], [0x6802, 0x6e00, 0x6e01]);
    assert_eq!(out[2], [0x4001, 0x3c02, 0x4002]);
}

#[test]
fn integers_wrap_divide_and_shift_as_on_a_device() {
    let out = results(
        8,
        &[[0xffff_ffff, 0], [0x8000_0000, 0xffff_ffff], [100, 33]],
        "add.s32 %r20, %r3, 1;\nmul.hi.u32 %r21, %r3, %r3;\ndiv.s32 %r22, %r3, %r4;\nrem.u32 %r23, %r3, %r4;\n\
         shl.b32 %r24, %r3, %r4;\nshr.s32 %r25, %r3, %r4;\nmul.lo.s32 %r26, %r3, %r3;\nabs.s32 %r27, %r3;",
    );
    assert_eq!(out[0], [0, 0xffff_fffe, 0xffff_ffff, 0xffff_ffff, 0xffff_ffff, 0xffff_ffff, 1, 1]);
    assert_eq!(out[1], [0x8000_0001, 0x4000_0000, 0x8000_0000, 0x8000_0000, 0, 0xffff_ffff, 0, 0x8000_0000]);
    assert_eq!(out[2], [101, 0, 3, 1, 0, 0, 10000, 100]);
}

#[test]
fn fields_of_bits() {
    let out = results(
        8,
        &[[0x1234_5678, 0xaabb_ccdd]],
        "bfe.u32 %r20, %r3, 8, 8;\nbfe.s32 %r21, %r4, 24, 8;\nbfi.b32 %r22, %r3, %r4, 16, 8;\nprmt.b32 %r23, %r3, %r4, 0x7531;\n\
         lop3.b32 %r24, %r3, %r4, 255, 0x6a;\nbrev.b32 %r25, %r3;\nshf.l.wrap.b32 %r26, %r3, %r4, 8;\nclz.b32 %r27, %r3;",
    );
    let (a, b) = (0x1234_5678_u32, 0xaabb_ccdd_u32);
    assert_eq!(
        out[0],
        [0x56, 0xffff_ffaa, 0xaa78_ccdd, 0xaacc_1256, (a & b) ^ 255, a.reverse_bits(), b << 8 | a >> 24, 3]
    );
}

#[test]
fn comparisons_of_nan_follow_their_order() {
    let out = results(
        4,
        &[[bits(f32::NAN), bits(1.0)], [bits(1.0), bits(1.0)], [bits(0.5), bits(1.0)]],
        "setp.ne.f32 %p1, %f1, %f2;\nsetp.neu.f32 %p2, %f1, %f2;\nsetp.lt.f32 %p3, %f1, %f2;\nsetp.ltu.f32 %p4, %f1, %f2;\n\
         selp.u32 %r20, 1, 0, %p1;\nselp.u32 %r21, 1, 0, %p2;\nselp.u32 %r22, 1, 0, %p3;\nselp.u32 %r23, 1, 0, %p4;",
    );
    assert_eq!(out, [[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]);
}

#[test]
fn extremes_ignore_nan_or_return_it() {
    let out = results(
        3,
        &[[bits(f32::NAN), bits(1.0)], [bits(-0.0), bits(0.0)]],
        "min.f32 %f3, %f1, %f2;\nmax.NaN.f32 %f4, %f1, %f2;\nmax.f32 %f5, %f1, %f2;\n\
         mov.b32 %r20, %f3;\nmov.b32 %r21, %f4;\nmov.b32 %r22, %f5;",
    );
    assert_eq!(out[0][0], bits(1.0));
    assert!(f32::from_bits(out[0][1]).is_nan());
    assert_eq!(out[1], [bits(-0.0), bits(0.0), bits(0.0)]);
}

#[test]
fn tf32_keeps_ten_bits() {
    let out = results(
        1,
        &[[bits(1.0 + 2_f32.powi(-11)), 0], [bits(1.0 + 2_f32.powi(-12)), 0]],
        "cvt.rna.tf32.f32 %r20, %f1;",
    );
    assert_eq!(out, [[bits(1.0 + 2_f32.powi(-10))], [bits(1.0)]]);
}

#[test]
fn pairs_are_computed_half_by_half() {
    // (1.0, 2.0) and (3.0, 0.5) as f16.
    let out = results(2, &[[0x4000_3c00, 0x3800_4200]], "add.f16x2 %r20, %r3, %r4;\nfma.rn.f16x2 %r21, %r3, %r4, %r4;");
    assert_eq!(out[0], [0x4100_4400, 0x3e00_4600]);
}

#[test]
fn atomic_operations_return_the_value_before() {
    let device = Device::new("uninitialized,host,barriers");
    let (cell, out) = (device.upload(&[10_u32, 0, 5]), device.allocate(4 * 64));
    let body = "atom.global.add.u32 %r3, [%rd1], 1;\natom.global.max.u32 %r4, [%rd1+4], %r1;\natom.global.inc.u32 %r5, [%rd1+8], 6;\n\
                add.s64 %rd3, %rd2, %rd10;\nst.global.u32 [%rd3], %r3;";
    let values = [Value::Wide(cell), Value::Wide(out)];
    device.run(&kernel("", 2, body), [1; 3], [64, 1, 1], 0, &values).good();
    assert_eq!(device.download::<u32>(cell, 3), [74, 63, (5 + 64) % 7]);
    let mut before = device.download::<u32>(out, 64);
    before.sort_unstable();
    assert_eq!(before, (10..74).collect::<Vec<u32>>());
}

#[test]
fn what_a_warp_does_together() {
    let device = Device::new("uninitialized,host,barriers");
    let out = device.allocate(32 * 8 * 4);
    let body = "setp.lt.u32 %p1, %r1, 5;\nvote.sync.ballot.b32 %r20, %p1, 0xffffffff;\nvote.sync.any.pred %p2, %p1, 0xffffffff;\n\
                vote.sync.all.pred %p3, %p1, 0xffffffff;\nselp.u32 %r21, 1, 0, %p2;\nselp.u32 %r22, 1, 0, %p3;\n\
                shfl.sync.up.b32 %r23|%p4, %r1, 3, 0, 0xffffffff;\nselp.u32 %r24, 1, 0, %p4;\n\
                shr.u32 %r3, %r1, 2;\nmatch.any.sync.b32 %r25, %r3, 0xffffffff;\nredux.sync.add.s32 %r26, %r1, 0xffffffff;\n\
                @%p1 bra A;\nactivemask.b32 %r27;\nbra B;\nA:\nactivemask.b32 %r27;\nB:\n\
                mul.wide.u32 %rd3, %r1, 32;\nadd.s64 %rd3, %rd1, %rd3;\nst.global.v4.u32 [%rd3], {%r20, %r21, %r22, %r23};\n\
                st.global.v4.u32 [%rd3+16], {%r24, %r25, %r26, %r27};";
    device.run(&kernel("", 1, body), [1; 3], [32, 1, 1], 0, &[Value::Wide(out)]).good();
    for (lane, row) in device.download::<u32>(out, 256).chunks(8).enumerate() {
        let lane = lane as u32;
        let from = if lane >= 3 { lane - 3 } else { lane };
        let group = 15 << (lane / 4 * 4);
        let active = if lane < 5 { 31 } else { !31 };
        assert_eq!(row, [31, 1, 0, from, u32::from(lane >= 3), group, 496, active]);
    }
}
