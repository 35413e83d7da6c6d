//! Load, save, load again: nothing changes, in the dtype of the file.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::Device;
use moonlight_convert::{Checkpoint, SaveOptions, load, save};

use crate::fixture::{FAMILIES, directory};

/// The dtype, shape and bytes of every tensor in a directory, by name.
fn contents(directory: &Path) -> BTreeMap<String, (String, Vec<usize>, Vec<u8>)> {
    let checkpoint = Checkpoint::open(directory).unwrap();
    checkpoint
        .tensors()
        .map(|(name, tensor)| {
            let value = (tensor.dtype.to_string(), tensor.shape.clone(), checkpoint.data(tensor).unwrap());
            (name.to_owned(), value)
        })
        .collect()
}

/// bf16 bytes as f32 bytes, which is exact.
fn widened(bytes: &[u8]) -> Vec<u8> {
    bytes.chunks_exact(2).flat_map(|half| [0, 0, half[0], half[1]]).collect()
}

#[test]
fn every_tensor_survives_bitwise() {
    let device = Device::default();
    for family in FAMILIES {
        let mut published = contents(&directory(family));
        let loaded = load(&directory(family), &device, None).unwrap();
        for name in loaded.report.skipped.values().flatten() {
            assert!(name.ends_with("inv_freq"), "{family}: {name} was skipped");
            published.remove(name);
        }
        for (name, (dtype, _, bytes)) in &mut published {
            // Moonlight stores the bias in bf16; here it is always f32.
            if name.ends_with("e_score_correction_bias") && dtype == "BF16" {
                (*dtype, *bytes) = ("F32".into(), widened(bytes));
            }
        }

        let temporary = tempfile::tempdir().unwrap();
        let (first, second) = (temporary.path().join("first"), temporary.path().join("second"));
        // Small shards, so that the index is written and read as well.
        let options = SaveOptions { max_shard_size: 50_000, ..SaveOptions::default() };
        save(&loaded.model, &first, &options).unwrap();
        let once = contents(&first);
        assert_eq!(once.keys().collect::<Vec<_>>(), published.keys().collect::<Vec<_>>(), "{family}");
        for (name, value) in &published {
            assert!(once[name] == *value, "{family}: {name} changed");
        }

        let again = load(&first, &device, None).unwrap();
        assert!(again.report.skipped.is_empty(), "{family}");
        assert_eq!(again.model.config(), loaded.model.config(), "{family}");
        save(&again.model, &second, &options).unwrap();
        let mut files = 0;
        for entry in std::fs::read_dir(&first).unwrap() {
            let file = entry.unwrap().file_name();
            let same = std::fs::read(first.join(&file)).unwrap() == std::fs::read(second.join(&file)).unwrap();
            assert!(same, "{family}: {} differs the second time", file.display());
            files += 1;
        }
        println!("{family}: {} tensors survive bitwise, and so do all {files} files the second time", once.len());
    }
}
