//! Numbers with units that people read: `4.54 M`, `11.3 GB`.

/// Three significant digits and a decimal prefix: `4.54 M`, `163 k`, `12`.
pub(super) fn count(number: f64) -> String {
    scaled(number, &["", "k", "M", "B", "T"])
}

/// Bytes by powers of 1000: `31.9 GB`.
pub(super) fn bytes(bytes: u64) -> String {
    scaled(bytes as f64, &["B", "kB", "MB", "GB", "TB"])
}

/// Floating-point operations: `6.29 GFLOP`.
pub(super) fn flops(flops: f64) -> String {
    scaled(flops, &["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP"])
}

fn scaled(number: f64, units: &[&str]) -> String {
    // From 999.5 on, rounding would show 1000 of the smaller unit; 9.995 and 99.95 below are the same limits for fewer digits.
    let mut scale = 0;
    let mut value = number;
    while value >= 999.5 && scale + 1 < units.len() {
        value /= 1000.0;
        scale += 1;
    }
    let digits = match value {
        _ if scale == 0 => 0,
        value if value < 9.995 => 2,
        value if value < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.digits$} {}", units[scale]).trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits_and_a_unit() {
        let shown = [0.0, 12.0, 999.4, 1000.0, 4_538_480.0, 15_960_110_208.0, 999_999.0, 99_960.0].map(count);
        assert_eq!(shown, ["0", "12", "999", "1.00 k", "4.54 M", "16.0 B", "1.00 M", "100 k"]);
        assert_eq!([0, 512, 72_947_000_000, 4_500_000].map(bytes), ["0 B", "512 B", "72.9 GB", "4.50 MB"]);
        assert_eq!([6.29e9, 4.22e17].map(flops), ["6.29 GFLOP", "422 PFLOP"]);
    }
}
