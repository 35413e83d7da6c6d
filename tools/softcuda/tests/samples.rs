//! A kernel as LLVM writes it for CubeCL: the RMS norm of rows of bfloat16.

mod device;

use cuda::run::matrix::f32_to_bf16;
use device::{Device, Value};

const NORM: &str = include_str!("samples/norm-bf16.ptx");
const ROWS: usize = 3;
const WIDTH: usize = 300;

fn run(ptx: &str, input: &[f32]) -> (device::Outcome, Vec<f32>) {
    let device = Device::new("all");
    let bf16 = |values: &[f32]| values.iter().map(|&value| f32_to_bf16(value)).collect::<Vec<u16>>();
    let addresses =
        [device.upload(&bf16(input)), device.upload(&bf16(&[2.0; WIDTH])), device.allocate(2 * ROWS * WIDTH)];
    let structure = [ROWS as u32, WIDTH as u32, 1e-5_f32.to_bits(), 0, 0, 0, 0, 0];
    let [a, b, c] = addresses.map(Value::Wide);
    let outcome = device.run(ptx, [ROWS as u32, 1, 1], [128, 1, 1], 512, &[a, b, c, Value::Structure(structure)]);
    if outcome.wait != 0 {
        return (outcome, Vec::new());
    }
    let out = device.download::<u16>(addresses[2], ROWS * WIDTH);
    (outcome, out.iter().map(|&bits| f32::from_bits(u32::from(bits) << 16)).collect())
}

#[test]
fn a_norm_gives_what_a_loop_gives() {
    let input: Vec<f32> = (0..ROWS * WIDTH).map(|i| (i * 37 % 64) as f32 / 8.0 - 4.0).collect();
    let (outcome, out) = run(NORM, &input);
    outcome.good();
    for (row, out) in input.chunks(WIDTH).zip(out.chunks(WIDTH)) {
        let mean: f32 = row.iter().map(|value| value * value).sum::<f32>() / WIDTH as f32;
        for (&value, &out) in row.iter().zip(out) {
            let expected = 2.0 * value / (mean + 1e-5).sqrt();
            assert!((out - expected).abs() <= expected.abs() * 0.01, "{out} and {expected}");
        }
    }
}

#[test]
fn each_of_its_barriers_is_missed() {
    let input = vec![1.0; ROWS * WIDTH];
    let places: Vec<usize> = NORM.match_indices("bar.sync").map(|(at, _)| at).collect();
    // The last one only keeps a later use of the memory apart, and there is none.
    for &at in &places[..places.len() - 1] {
        let ptx = format!("{}{}", &NORM[..at], NORM[at..].replacen("bar.sync \t0;", "", 1));
        assert_ne!(ptx, NORM);
        let (outcome, _) = run(&ptx, &input);
        assert_eq!(outcome.wait, 719, "{outcome:?}");
    }
}

#[test]
fn a_row_too_many_is_found() {
    let (outcome, _) = run(NORM, &vec![1.0; (ROWS - 1) * WIDTH]);
    outcome.fails(700, &["out-of-bounds read of 2 bytes", "block (2, 0, 0)"]);
}
