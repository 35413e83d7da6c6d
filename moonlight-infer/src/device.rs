//! Opens devices and parses dtypes by name. No other file names a backend.

use burn::tensor::{DType, Device};

/// A device or dtype that does not exist or is not available.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// An unknown device.
    #[error("there is no device `{0}`")]
    Unknown(String),
    /// A backend that is not compiled in.
    #[error("this build does not support `{kind}` (it supports {built})")]
    NotBuilt {
        /// The name of the backend.
        kind: &'static str,
        /// The backends of this build, separated by commas.
        built: String,
    },
    /// A device index that is not a number.
    #[error("`{index}` in `{name}` is not a device index")]
    Index {
        /// The name of the device as the user wrote it.
        name: String,
        /// The name of the backend.
        kind: &'static str,
        /// The text after the colon.
        index: String,
    },
    /// An index for a backend with a single device.
    #[error("`{0}` has a single device, and does not take an index")]
    NoIndex(&'static str),
    /// An unknown dtype.
    #[error("there is no dtype `{0}`")]
    Dtype(String),
}

impl DeviceError {
    /// What to do about the error.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Unknown(_) => "devices are cpu, cuda[:N], wgpu[:N], vulkan[:N], metal and auto".into(),
            Self::NotBuilt { kind, .. } => format!("build with `--features {kind}`"),
            Self::Index { kind, .. } => format!("write `{kind}` or `{kind}:0`"),
            Self::NoIndex(kind) => format!("write `{kind}`"),
            Self::Dtype(_) => "dtypes are f32, bf16, f16 and auto".into(),
        })
    }
}

/// A device that was chosen by name.
#[derive(Debug, Clone)]
pub struct ComputeDevice {
    /// The device, without autodiff.
    pub device: Device,
    /// Whether it is the CPU, where the default dtype is f32.
    pub is_cpu: bool,
}

/// What a device is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Workload {
    /// Tensors of the same sizes come back in each step.
    Training,
    /// Tensors grow with a conversation.
    Inference,
}

/// The backends in the order in which `auto` tries them, and whether each is compiled in.
const KINDS: &[(&str, bool)] = &[
    ("cuda", cfg!(feature = "cuda")),
    ("metal", cfg!(feature = "metal")),
    ("vulkan", cfg!(feature = "vulkan")),
    ("wgpu", cfg!(feature = "wgpu")),
    ("cpu", cfg!(feature = "cpu")),
];

impl ComputeDevice {
    /// Opens `cpu`, `cuda[:N]`, `wgpu[:N]`, `vulkan[:N]`, `metal`, or `auto` for the first backend of this build.
    ///
    /// # Errors
    ///
    /// [`DeviceError`] for an unknown device and for a backend that is not compiled in.
    pub fn open(name: &str) -> Result<Self, DeviceError> {
        Self::open_for(name, Workload::Inference)
    }

    /// [`open`](Self::open), with memory managed for the workload. All GPUs of a process are used as the first one was opened for; a
    /// file with settings of CubeCL, `cubecl.toml`, in the working folder or above it counts before both.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    #[allow(unused_variables, reason = "not used in a build for the CPU alone")]
    pub fn open_for(name: &str, workload: Workload) -> Result<Self, DeviceError> {
        let built: Vec<&str> = KINDS.iter().filter(|(_, built)| *built).map(|(kind, _)| *kind).collect();
        let name = if name == "auto" { built.first().copied().unwrap_or("cpu") } else { name };
        let (kind, index) = match name.split_once(':') {
            None => (name, None),
            Some((kind, index)) => (kind, Some(index)),
        };
        let known = KINDS.iter().find(|(known, _)| *known == kind);
        let &(kind, built_in) = known.ok_or_else(|| DeviceError::Unknown(name.into()))?;
        if !built_in {
            return Err(DeviceError::NotBuilt { kind, built: built.join(", ") });
        }
        let index = match index {
            None => None,
            Some(_) if matches!(kind, "cpu" | "metal") => return Err(DeviceError::NoIndex(kind)),
            Some(index) => {
                let invalid = |_| DeviceError::Index { name: name.into(), kind, index: index.into() };
                Some(index.parse::<usize>().map_err(invalid)?)
            }
        };
        #[cfg(any(feature = "cuda", feature = "wgpu", feature = "vulkan", feature = "metal"))]
        if kind != "cpu" {
            crate::gpu_runtime::configure(workload);
        }
        Ok(Self { device: device(kind, index), is_cpu: kind == "cpu" })
    }
}

/// The name of the device for the rank at `offset` on one machine, if `name` is the device of the rank at 0: for `cuda` and
/// 3 it is `cuda:3`. All ranks share the CPU, or the only Metal device.
pub fn nth_device_name(name: &str, offset: usize) -> String {
    let first = KINDS.iter().find(|(_, built)| *built).map_or("cpu", |(kind, _)| *kind);
    let name = if name == "auto" { first } else { name };
    let (kind, index) = name.split_once(':').unwrap_or((name, "0"));
    match (kind, index.parse::<usize>()) {
        ("cpu" | "metal", _) | (_, Err(_)) => name.to_owned(),
        // The name is unchanged, because the backend chooses the device if there is no index.
        (_, Ok(0)) if offset == 0 => name.to_owned(),
        (_, Ok(index)) => format!("{kind}:{}", index + offset),
    }
}

#[allow(unused_variables, reason = "not used in a build for the CPU alone")]
fn device(kind: &str, index: Option<usize>) -> Device {
    #[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal"))]
    let gpu = index.map_or(burn::tensor::DeviceKind::DefaultDevice, burn::tensor::DeviceKind::DiscreteGpu);
    match kind {
        #[cfg(feature = "cuda")]
        "cuda" => Device::cuda(index.unwrap_or(0)),
        #[cfg(feature = "wgpu")]
        "wgpu" => Device::wgpu(gpu),
        #[cfg(feature = "vulkan")]
        "vulkan" => Device::vulkan(gpu),
        #[cfg(feature = "metal")]
        "metal" => Device::metal(gpu),
        #[cfg(feature = "cpu")]
        "cpu" => Device::flex(),
        // Not reached: `open` passes only backends that are compiled in.
        _ => Device::default(),
    }
}

/// Parses `f32`, `bf16`, `f16` or `auto`. `auto` is f32 on the CPU, and `None` on other devices: the dtype of the checkpoint.
///
/// # Errors
///
/// [`DeviceError::Dtype`] for any other name.
pub fn parse_dtype(name: &str, target: &ComputeDevice) -> Result<Option<DType>, DeviceError> {
    match name {
        "auto" => Ok(target.is_cpu.then_some(DType::F32)),
        "f32" => Ok(Some(DType::F32)),
        "bf16" => Ok(Some(DType::BF16)),
        "f16" => Ok(Some(DType::F16)),
        other => Err(DeviceError::Dtype(other.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::tests::render;

    #[test]
    fn hints_list_the_devices() {
        let hint = |name: &str| ComputeDevice::open(name).unwrap_err().hint().unwrap();
        assert!(hint("gpu").contains("vulkan[:N]"));
        assert!(hint("cpu:1").contains("`cpu`"));
        #[cfg(not(feature = "cuda"))]
        assert!(hint("cuda:0").contains("--features cuda"));
    }

    #[test]
    fn ranks_use_consecutive_devices() {
        assert_eq!(nth_device_name("cuda", 0), "cuda");
        assert_eq!(nth_device_name("cuda", 3), "cuda:3");
        assert_eq!(nth_device_name("vulkan:2", 1), "vulkan:3");
        assert_eq!((nth_device_name("cpu", 5), nth_device_name("metal", 1)), ("cpu".to_owned(), "metal".to_owned()));
    }

    #[cfg(feature = "cpu")]
    #[test]
    fn the_default_dtype_on_the_cpu_is_f32() {
        let cpu = ComputeDevice::open("cpu").unwrap();
        assert_eq!(parse_dtype("auto", &cpu).unwrap(), Some(DType::F32));
        assert_eq!(parse_dtype("bf16", &cpu).unwrap(), Some(DType::BF16));
        assert!(parse_dtype("int8", &cpu).is_err());
    }

    #[test]
    fn messages_of_device_errors() {
        let errors = [
            DeviceError::Unknown("gpu".into()),
            DeviceError::NotBuilt { kind: "cuda", built: "cpu".into() },
            DeviceError::Index { name: "cuda:x".into(), kind: "cuda", index: "x".into() },
            DeviceError::NoIndex("cpu"),
            DeviceError::Dtype("int8".into()),
        ];
        // A new variant does not compile here: add an example of it above.
        let is_covered = |error: &DeviceError| match error {
            DeviceError::Unknown(_)
            | DeviceError::NotBuilt { .. }
            | DeviceError::Index { .. }
            | DeviceError::NoIndex(_)
            | DeviceError::Dtype(_) => true,
        };
        assert!(errors.iter().all(is_covered));
        insta::assert_snapshot!(render(errors.iter().map(|error| (error.to_string(), error.hint()))));
    }
}
