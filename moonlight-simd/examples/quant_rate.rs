//! Benchmark: products by quantized weights on one thread. Prints a line of JSON for each number of bits and rows.
//!
//! `cargo run --release -p moonlight-simd --example quant_rate -- [input] [output]`

use std::time::Instant;

use moonlight_simd::quant::{
    BLOCK, Bits, QuantizedMatrix, QuantizedRows, ScaleType, Shape, quantize_block, quantize_tiles,
};

fn main() {
    let mut arguments = std::env::args().skip(1).map(|number| number.parse().expect("a number"));
    let input: usize = arguments.next().unwrap_or(2048);
    let output: usize = arguments.next().unwrap_or(1408);
    let weights: Vec<f32> = (0..input * output).map(|index| ((index * 37 % 101) as f32 - 50.0) / 1000.0).collect();
    for bits in [Bits::Eight, Bits::Four] {
        let shape = Shape { bits, input, output };
        // More matrices than the caches hold, so that a single row reads memory.
        let copies = if std::env::var_os("CACHED").is_some() { 1 } else { ((256 << 20) / shape.value_bytes()).max(1) };
        let (mut values, mut scales) = (vec![0; shape.value_bytes()], vec![0; shape.scales()]);
        quantize_tiles(&weights, shape, ScaleType::F16, 0, &mut values, &mut scales);
        let (values, scales) = (values.repeat(copies), scales.repeat(copies));
        let matrix = |copy: usize| {
            QuantizedMatrix::new(
                shape,
                ScaleType::F16,
                &values[copy * shape.value_bytes()..][..shape.value_bytes()],
                &scales[copy * shape.scales()..][..shape.scales()],
            )
        };
        for count in [1, 2, 4, 6, 8, 24, 192] {
            let x: Vec<f32> = (0..count * input).map(|index| ((index * 31 % 97) as f32 - 48.0) / 50.0).collect();
            let rows = QuantizedRows::new(&x, input);
            let mut out = vec![0.0; count * output];
            let mut times = Vec::new();
            for copy in 0..(2 * copies).clamp(100, 400) {
                let start = Instant::now();
                matrix(copy % copies).multiply(&rows, 0..count, 0..shape.tiles(), &mut out, output);
                times.push(start.elapsed().as_secs_f64());
            }
            times.sort_by(f64::total_cmp);
            let seconds = times[times.len() / 2];
            let bytes = shape.value_bytes() + 2 * shape.scales();
            println!(
                r#"{{"bits": "{bits:?}", "rows": {count}, "gb_per_second": {:.1}, "billion_products_per_second": {:.1}, "check": {}}}"#,
                bytes as f64 / seconds / 1e9,
                (count * input * output) as f64 / seconds / 1e9,
                out[0],
            );
        }
        let start = Instant::now();
        let mut codes = [0; BLOCK];
        for block in weights.chunks_exact(BLOCK) {
            std::hint::black_box(quantize_block(block, bits, ScaleType::F16, &mut codes));
        }
        let rate = weights.len() as f64 / start.elapsed().as_secs_f64() / 1e9;
        println!(r#"{{"bits": "{bits:?}", "billion_quantized_per_second": {rate:.3}}}"#);
        let mut panel = vec![0.0; 256 * 256];
        let start = Instant::now();
        for repeat in 0..200 {
            matrix(0).dequantize(0..16, 0..8, &mut panel);
            std::hint::black_box(&panel[repeat]);
        }
        println!(
            r#"{{"bits": "{bits:?}", "billion_dequantized_per_second": {:.2}}}"#,
            200.0 * 65536.0 / start.elapsed().as_secs_f64() / 1e9
        );
    }
}
