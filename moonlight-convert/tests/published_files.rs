//! The layout that `examples/synthetic_checkpoint` writes is that of the published files.

#[path = "../examples/synthetic_checkpoint/published.rs"]
mod published;

use moonlight_model::ModelConfig;
use published::{PublishedFile, published_files};

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
