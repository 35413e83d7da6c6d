//! `moonlight-convert verify`.

use std::collections::BTreeMap;
use std::process::ExitCode;

use half::{bf16, f16};
use moonlight_convert::{Checkpoint, StoredTensor};
use safetensors::Dtype;

/// How far two tensors are apart.
#[derive(Debug, PartialEq)]
struct Distance {
    largest: f64,
    mean: f64,
}

/// Compares two checkpoints under the names that their files give; bit by bit where the dtypes agree, by value where
/// they do not.
pub(crate) fn verify(a: &Checkpoint, b: &Checkpoint) -> ExitCode {
    let of = |checkpoint: &'_ Checkpoint| -> BTreeMap<String, StoredTensor> {
        // What a model does not need may be in one and not in the other.
        let needless: Vec<String> = checkpoint.skipped().into_values().flatten().collect();
        let needed = checkpoint.tensors().filter(|(name, _)| !needless.iter().any(|needless| needless == name));
        needed.map(|(name, tensor)| (name.to_owned(), tensor.clone())).collect()
    };
    let (left, right) = (of(a), of(b));
    let mut differences = 0;
    let mut differ = |text: String| {
        println!("{text}");
        differences += 1;
    };
    for (name, tensor) in &left {
        let Some(other) = right.get(name) else {
            differ(format!("{name}: only in {}", a.dir().display()));
            continue;
        };
        if tensor.shape != other.shape {
            differ(format!("{name}: {:?} and {:?}", tensor.shape, other.shape));
            continue;
        }
        let (mine, theirs) = (a.data(tensor), b.data(other));
        if tensor.dtype == other.dtype && mine == theirs {
            continue;
        }
        match distance((tensor.dtype, mine), (other.dtype, theirs)) {
            Some(Distance { largest: 0.0, .. }) if tensor.dtype != other.dtype => {}
            Some(Distance { largest, mean }) => {
                differ(format!("{name}: largest difference {largest:.3e}, mean {mean:.3e}"));
            }
            None => differ(format!("{name}: {:?} and {:?} cannot be compared", tensor.dtype, other.dtype)),
        }
    }
    for name in right.keys().filter(|name| !left.contains_key(*name)) {
        differ(format!("{name}: only in {}", b.dir().display()));
    }
    if differences == 0 {
        println!("equal: {} tensors", left.len());
        ExitCode::SUCCESS
    } else {
        eprintln!("error: {differences} of {} tensors differ", left.len().max(right.len()));
        ExitCode::FAILURE
    }
}

/// `None` for dtypes that are not weights'.
fn distance(a: (Dtype, &[u8]), b: (Dtype, &[u8])) -> Option<Distance> {
    let (mut largest, mut sum, mut count) = (0.0f64, 0.0, 0u64);
    for (a, b) in values(a)?.zip(values(b)?) {
        let difference = (a - b).abs();
        // A value that is no number is as far away as can be.
        largest = if difference.is_nan() { f64::INFINITY } else { largest.max(difference) };
        sum += difference;
        count += 1;
    }
    Some(Distance { largest, mean: sum / count.max(1) as f64 })
}

fn values((dtype, data): (Dtype, &[u8])) -> Option<Box<dyn Iterator<Item = f64> + '_>> {
    let two = |data: &[u8]| [data[0], data[1]];
    match dtype {
        Dtype::F32 => Some(Box::new(
            data.chunks_exact(4).map(|value| f64::from(f32::from_le_bytes([value[0], value[1], value[2], value[3]]))),
        )),
        Dtype::BF16 => Some(Box::new(data.chunks_exact(2).map(move |value| bf16::from_le_bytes(two(value)).to_f64()))),
        Dtype::F16 => Some(Box::new(data.chunks_exact(2).map(move |value| f16::from_le_bytes(two(value)).to_f64()))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_are_between_values_whatever_their_dtypes() {
        let wide: Vec<u8> = [1.0f32, -2.0, 0.5].iter().flat_map(|value| value.to_le_bytes()).collect();
        let narrow: Vec<u8> =
            [1.0f32, -2.0, 1.5].iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect();
        let found = distance((Dtype::F32, &wide), (Dtype::BF16, &narrow)).unwrap();
        assert_eq!(found, Distance { largest: 1.0, mean: 1.0 / 3.0 });
        assert_eq!(distance((Dtype::F32, &wide), (Dtype::I64, &wide)), None);
    }
}
