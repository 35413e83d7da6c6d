//! Settings of CubeCL, the runtime below Burn's GPU backends.

use std::path::Path;

use cubecl::config::cache::CacheConfig;
use cubecl::config::memory::{CudaAllocator, PersistentMemory};
use cubecl::config::{CubeClRuntimeConfig, RuntimeConfig};

use crate::device::Workload;

/// The files that CubeCL reads its settings from, in the working folder or one above it.
const FILES: [&str; 4] = ["cubecl.toml", "CubeCL.toml", "burn.toml", "Burn.toml"];

/// Sets how this process uses GPUs, unless it has opened one, or there is a file with settings of CubeCL, which then counts alone:
///
/// * Compiled kernels and the results of autotune are kept in the user's cache folder, so that the next run does not compile them again.
/// * On CUDA memory is allocated in stream order, so that a pool that grows does not wait for the device.
/// * For training, buffers with the size of a weight come from a pool of that size, because gradients and moments of the optimizer
///   have it too.
pub(crate) fn configure(workload: Workload) {
    let Ok(folder) = std::env::current_dir() else { return };
    if !folder.ancestors().any(has_settings) {
        // Settings that are in use already stay.
        let _ = CubeClRuntimeConfig::try_set(settings(workload).override_from_env());
    }
}

fn has_settings(folder: &Path) -> bool {
    FILES.iter().any(|file| folder.join(file).is_file())
}

fn settings(workload: Workload) -> CubeClRuntimeConfig {
    let mut config = CubeClRuntimeConfig::default();
    config.compilation.cache = true;
    config.environment.path = CacheConfig::Global;
    config.memory.cuda.allocator = CudaAllocator::Async;
    if workload == Workload::Training {
        config.memory.persistent_memory = PersistentMemory::SizeMatch;
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_kept_in_the_cache_of_the_user() {
        for workload in [Workload::Training, Workload::Inference] {
            let config = settings(workload);
            assert!(config.compilation.cache);
            assert!(matches!(config.environment.path, CacheConfig::Global));
        }
        assert!(matches!(settings(Workload::Training).memory.persistent_memory, PersistentMemory::SizeMatch));
        assert!(matches!(settings(Workload::Inference).memory.persistent_memory, PersistentMemory::Enabled));
    }

    #[test]
    fn a_file_with_settings_is_found() {
        let folder = tempfile::tempdir().unwrap();
        assert!(!has_settings(folder.path()));
        std::fs::write(folder.path().join("cubecl.toml"), "").unwrap();
        assert!(has_settings(folder.path()));
    }
}
