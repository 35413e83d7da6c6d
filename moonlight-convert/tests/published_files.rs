//! The layout that `examples/synthetic_checkpoint` writes is that of the published files.

#[path = "../examples/synthetic_checkpoint/published.rs"]
mod published;

use moonlight_model::{ModelConfig, QuantBits};
use published::{PublishedFile, published_files, quantized_files};

/// The sizes of the 27 files of moonshotai/Moonlight-16B-A3B-Instruct at revision
/// 4e735b07a89f73647dfab71ab91b840f362ede5b.
#[test]
fn moonlights_files_have_the_published_sizes() {
    let files = published_files(&ModelConfig::preset("moonlight-16b-a3b").unwrap()).unwrap();
    assert_eq!(files.iter().map(|file| file.tensors.len()).sum::<usize>(), 5_344);
    let mut expected = vec![837_036_512];
    expected.extend([1_169_721_008; 9]);
    expected.extend([1_169_721_216; 16]);
    expected.push(1_840_814_416);
    assert_eq!(files.iter().map(PublishedFile::bytes).collect::<Vec<_>>(), expected);
    assert_eq!(files[26].name, "model-27-of-27.safetensors");
}

/// The packed form has the same matrices: 4.5 or 8.5 bits for each value of the layers' projections, and 16 bytes for its shape.
#[test]
fn quantized_files_have_the_size_of_their_bits() {
    let config = ModelConfig::preset("moonlight-16b-a3b").unwrap();
    for (bits, gigabytes) in [(QuantBits::Four, 9.95), (QuantBits::Eight, 17.6)] {
        let files = quantized_files(&config, bits).unwrap();
        let bytes: u64 = files.iter().map(PublishedFile::bytes).sum();
        assert!((bytes as f64 / 1e9 - gigabytes).abs() < 0.1, "{bytes}");
        let packed = files.iter().flat_map(|file| &file.tensors).filter(|tensor| tensor.name.ends_with("_packed"));
        assert_eq!(packed.count(), 3 + 26 * 3 * 65 + 27 * 4, "dense MLP, experts, attention");
    }
}
