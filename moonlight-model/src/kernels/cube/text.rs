//! Expands all kernels to the languages of devices that are not here: HIP C++ (AMD) and the Metal shading language. It needs no device, and
//! finds what a language cannot say; the text is not compiled further.

use std::sync::Arc;

use cubecl::Compiler;
use cubecl::ir::features::{Features, MmaConfig};
use cubecl::ir::{
    DeviceIdentity, DeviceProperties, ElemType, FloatKind, HardwareProperties, IntKind, MemoryDeviceProperties,
    UIntKind,
};
use cubecl::prelude::*;
use cubecl_cpp::shared::{CompilationOptions, CppCompiler};
use cubecl_cpp::target::{CppTarget, Hip, Metal};

use super::{attention, cross_entropy, dispatch, grouped_gemm, grouped_mma, norm, quantized, rotary, routing, swiglu};

/// What kernels are expanded for.
pub(super) struct Dialect {
    pub float: ElemType,
    pub int: ElemType,
    pub byte: ElemType,
    pub device: Arc<DeviceProperties>,
}

/// `kernel!(dialect, units of a cube, type of the kernel, compilation arguments...)`
macro_rules! kernel {
    ($on:expr, $units:expr, $kernel:path, $($argument:expr),* $(,)?) => {{
        use $kernel as Kernel;
        let settings = KernelSettings::new(
            *CubeDim::new_1d($units as u32),
            ExecutionMode::Unchecked,
            AddressType::U32,
        );
        let kernel = Kernel::new(settings, $on.device.clone(), Default::default(), $($argument),*);
        Box::new(kernel) as Box<dyn CubeKernel>
    }};
}
pub(super) use kernel;

pub(super) fn buffer() -> BufferCompilationArg {
    BufferCompilationArg { inplace: None }
}

pub(super) fn tensor() -> TensorCompilationArg {
    TensorCompilationArg { meta: TensorMetaCompilationArg { len: (), rank: () }, buffer: buffer() }
}

fn dialect(float: FloatKind) -> Dialect {
    let hardware = HardwareProperties {
        load_width: 128,
        vector_register_count: None,
        plane_size_min: 32,
        plane_size_max: 32,
        max_bindings: 32,
        max_shared_memory_size: 32 * 1024,
        max_cube_count: (u32::MAX, u16::MAX.into(), u16::MAX.into()),
        max_units_per_cube: 1024,
        max_cube_dim: (1024, 1024, 1024),
        num_streaming_multiprocessors: None,
        num_tensor_cores: None,
        min_tensor_cores_dim: None,
        num_cpu_cores: None,
        last_level_cache_size: None,
        max_vector_size: VectorSize::MAX,
        cube_mma_reserved_shared_memory: 0,
    };
    let identity = DeviceIdentity { name: "text".into(), fingerprint: "text".into(), physical: None };
    let memory = MemoryDeviceProperties::new(u64::MAX, 256);
    let timing = cubecl::profile::TimingMethod::Device;
    // AMD's matrix units multiply halves.
    let mut features = Features::default();
    let (half, sums) = (ElemType::Float(float), ElemType::Float(FloatKind::F32));
    features.matmul.cmma.insert(MmaConfig { a_type: half, b_type: half, cd_type: sums, m: 16, n: 16, k: 16 });
    Dialect {
        float: ElemType::Float(float),
        int: ElemType::Int(IntKind::I32),
        byte: ElemType::UInt(UIntKind::U8),
        device: Arc::new(DeviceProperties::new(features, memory, hardware, timing, identity)),
    }
}

/// The kernels that need no matrix units.
fn everywhere(on: &Dialect) -> Vec<Box<dyn CubeKernel>> {
    [
        attention::kernels(on),
        cross_entropy::kernels(on),
        dispatch::kernels(on),
        grouped_gemm::kernels(on),
        norm::kernels(on),
        quantized::kernels(on),
        rotary::kernels(on),
        routing::kernels(on),
        swiglu::kernels(on),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn expand<T: CppTarget>(kernels: Vec<Box<dyn CubeKernel>>) -> Vec<String>
where
    CppCompiler<T>: Compiler<CompilationOptions = CompilationOptions>,
    <CppCompiler<T> as Compiler>::Representation: ToString,
{
    let expanded = kernels.into_iter().map(|kernel| {
        let name = kernel.name();
        let text = CppCompiler::<T>::default()
            .compile(kernel.define(), &CompilationOptions::default())
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        text.to_string()
    });
    expanded.collect()
}

#[test]
fn kernels_can_be_said_in_hip() {
    for float in [FloatKind::F32, FloatKind::F16, FloatKind::BF16] {
        let texts = expand::<Hip>(everywhere(&dialect(float)));
        assert!(texts.len() > 30, "{} kernels", texts.len());
        assert!(texts.iter().all(|text| text.contains("__global__")), "a text has no kernel");
    }
    // The products of attention are NVIDIA's alone.
    for float in [FloatKind::F16, FloatKind::BF16] {
        let texts = expand::<Hip>(grouped_mma::kernels(&dialect(float)));
        assert!(texts.iter().all(|text| text.contains("wmma")), "a product without matrix units");
    }
}

#[test]
fn kernels_can_be_said_in_metal() {
    for float in [FloatKind::F32, FloatKind::F16, FloatKind::BF16] {
        let texts = expand::<Metal>(everywhere(&dialect(float)));
        assert!(texts.iter().all(|text| text.contains("[[kernel]]")), "a text has no kernel");
    }
}
