//! Devices and dtypes by name: the only place where a backend is named.

use burn::tensor::{DType, Device};

/// A device or dtype that there is not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// A name that is no device's.
    #[error("there is no device `{0}`")]
    Unknown(String),
    /// A device that this build cannot use.
    #[error("this build has no `{kind}` (it has: {built})")]
    NotBuilt {
        /// The kind of device.
        kind: &'static str,
        /// The kinds that the build has, with commas between.
        built: String,
    },
    /// A device whose number is none.
    #[error("`{index}` in `{name}` is not the number of a device")]
    Index {
        /// The name as it was given.
        name: String,
        /// Its kind.
        kind: &'static str,
        /// What is in the number's place.
        index: String,
    },
    /// A number for a kind of which there is one.
    #[error("`{0}` takes no number")]
    NoIndex(&'static str),
    /// A name that is no dtype's.
    #[error("there is no dtype `{0}`")]
    Dtype(String),
}

impl DeviceError {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Unknown(_) => "devices are cpu, cuda[:N], wgpu[:N], vulkan[:N] and metal".into(),
            Self::NotBuilt { kind, .. } => format!("build with `--features {kind}`"),
            Self::Index { kind, .. } => format!("write `{kind}` or `{kind}:0`"),
            Self::NoIndex(kind) => format!("write `{kind}`"),
            Self::Dtype(_) => "dtypes are f32, bf16, f16 and auto".into(),
        })
    }
}

/// A device to run on.
#[derive(Debug, Clone)]
pub struct ComputeDevice {
    /// The device, without gradients.
    pub device: Device,
    /// Whether it is the CPU, where weights are f32 unless another dtype is asked for.
    pub is_cpu: bool,
}

/// The names of the devices, in the order in which `auto` tries them.
const KINDS: &[(&str, bool)] = &[
    ("cuda", cfg!(feature = "cuda")),
    ("metal", cfg!(feature = "metal")),
    ("vulkan", cfg!(feature = "vulkan")),
    ("wgpu", cfg!(feature = "wgpu")),
    ("cpu", cfg!(feature = "cpu")),
];

impl ComputeDevice {
    /// Opens `cpu`, `cuda[:N]`, `wgpu[:N]`, `vulkan[:N]`, `metal`, or `auto` for the first that the build has.
    ///
    /// # Errors
    ///
    /// [`DeviceError`] for a name that is no device's, and for a device that this build cannot use.
    pub fn open(name: &str) -> Result<Self, DeviceError> {
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
                let wrong = |_| DeviceError::Index { name: name.into(), kind, index: index.into() };
                Some(index.parse::<usize>().map_err(wrong)?)
            }
        };
        Ok(Self { device: device(kind, index), is_cpu: kind == "cpu" })
    }
}

/// The name of the device `offset` places after the one that `name` means, for the workers of one machine; there is one CPU,
/// and one device of Metal.
pub fn nth_device_name(name: &str, offset: usize) -> String {
    let first = KINDS.iter().find(|(_, built)| *built).map_or("cpu", |(kind, _)| *kind);
    let name = if name == "auto" { first } else { name };
    let (kind, index) = name.split_once(':').unwrap_or((name, "0"));
    match (kind, index.parse::<usize>()) {
        ("cpu" | "metal", _) | (_, Err(_)) => name.to_owned(),
        // What is not numbered is left to the backend, which has a device of its own choice.
        (_, Ok(0)) if offset == 0 => name.to_owned(),
        (_, Ok(index)) => format!("{kind}:{}", index + offset),
    }
}

#[allow(unused_variables, reason = "a build with the CPU alone has no use for the number")]
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
        _ => Device::default(),
    }
}

/// The dtype that `f32`, `bf16`, `f16` or `auto` stands for: `auto` is f32 on the CPU and `None`, as stored, elsewhere.
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

    #[test]
    fn wrong_names_say_what_there_is() {
        let hint = |name: &str| ComputeDevice::open(name).unwrap_err().hint().unwrap();
        assert!(hint("gpu").contains("vulkan[:N]"));
        assert!(hint("cpu:1").contains("`cpu`"));
        #[cfg(not(feature = "cuda"))]
        assert!(hint("cuda:0").contains("--features cuda"));
    }

    #[test]
    fn workers_use_one_device_after_the_other() {
        assert_eq!(nth_device_name("cuda", 0), "cuda");
        assert_eq!(nth_device_name("cuda", 3), "cuda:3");
        assert_eq!(nth_device_name("vulkan:2", 1), "vulkan:3");
        assert_eq!((nth_device_name("cpu", 5), nth_device_name("metal", 1)), ("cpu".to_owned(), "metal".to_owned()));
    }

    #[cfg(feature = "cpu")]
    #[test]
    fn weights_are_f32_on_the_cpu_unless_another_dtype_is_asked_for() {
        let cpu = ComputeDevice::open("cpu").unwrap();
        assert_eq!(parse_dtype("auto", &cpu).unwrap(), Some(DType::F32));
        assert_eq!(parse_dtype("bf16", &cpu).unwrap(), Some(DType::BF16));
        assert!(parse_dtype("int8", &cpu).is_err());
    }
}
