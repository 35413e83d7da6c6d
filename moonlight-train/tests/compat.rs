//! Files of earlier versions still open: checkpoints, an adapter and run folders in `fixtures/compat`, by the command line
//! alone. `make_compat_fixtures.py` wrote them with the program of the commit that their README names.
//!
//! Each run was trained for six steps with a checkpoint after the third. Here its last checkpoint is removed and the run is
//! resumed from the third; it must take the same steps to the same weights as the original run.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use common::{checkpoint, metrics, moonlight, text};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use tempfile::TempDir;

const HALF_WAY: u64 = 3;
const LAST: u64 = 6;

/// A copy of the fixtures. Paths in their recipes are relative to it.
struct Fixtures {
    dir: TempDir,
    expected: Value,
}

/// The largest differences allowed from the numbers of the earlier version.
#[derive(Clone, Copy)]
struct Tolerance {
    /// In a loss, nats.
    loss: f64,
    /// In a gradient norm, relative.
    norm: f64,
    /// In a weight.
    weight: f64,
}

/// On a CPU with the vector instructions that the fixtures were made with.
const BITWISE: Tolerance = Tolerance { loss: 0.0, norm: 0.0, weight: 0.0 };
/// On another CPU: vector kernels sum in lanes, and the number of lanes decides the order of a sum.
const OTHER_CPU: Tolerance = Tolerance { loss: 1e-6, norm: 1e-4, weight: 1e-5 };
/// In addition, a difference in the last bit of f32 may become one in the last bit of a bf16 weight, 2^-8 of it.
const OTHER_CPU_BF16: Tolerance = Tolerance { loss: 1e-2, norm: 5e-2, weight: 1e-2 };

impl Fixtures {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/compat"), dir.path());
        let expected = serde_json::from_str(&fs::read_to_string(dir.path().join("expected.json")).unwrap()).unwrap();
        Self { dir, expected }
    }

    fn run(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs `moonlight ARGUMENTS` in the folder of the fixtures.
    fn moonlight(&self, arguments: &[&str]) -> Output {
        let output = moonlight(arguments).args(["--device", "cpu"]).current_dir(self.dir.path()).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
        output
    }

    fn tolerance(&self, name: &str) -> Tolerance {
        let recorded = &self.expected["cpu"];
        let features: Vec<&str> =
            recorded["features"].as_array().unwrap().iter().map(|f| f.as_str().unwrap()).collect();
        let here = recorded["architecture"] == std::env::consts::ARCH && features == cpu_features();
        match (here, name) {
            // Recorded when operands in bf16 were widened; now processors with AVX512-BF16 multiply them as they are.
            (_, "bf16") => OTHER_CPU_BF16,
            (true, _) => BITWISE,
            (false, _) => OTHER_CPU,
        }
    }

    /// Removes the last checkpoint, resumes the run, and compares its steps and weights with the original ones.
    fn resumes(&self, name: &str) {
        let tolerance = self.tolerance(name);
        let run = self.run(name);
        let steps_before = metrics(&run);
        let last = checkpoint(&run, LAST);
        let original = self.dir.path().join(format!("{name}-original"));
        fs::rename(&last, &original).unwrap();
        assert!(checkpoint(&run, HALF_WAY).is_dir());

        let recipe = format!("{name}/recipe.toml");
        self.moonlight(&["train", &recipe, "--resume"]);

        let steps_after = metrics(&run);
        assert_eq!(steps_before.len(), steps_after.len(), "{name}");
        let mut resumed = 0;
        for (before, after) in steps_before.iter().zip(&steps_after) {
            assert_eq!((&before["split"], &before["step"]), (&after["split"], &after["step"]), "{name}");
            let step = before["step"].as_u64().unwrap();
            assert!(step > HALF_WAY || before == after, "{name}: the lines up to the checkpoint are unchanged");
            near(&before["loss"], &after["loss"], tolerance.loss, || format!("{name}: the loss of step {step}"));
            if before["split"] == "train" {
                let norm = before["grad_norm"].as_f64().unwrap();
                let what = || format!("{name}: the gradient norm of step {step}");
                near(&before["grad_norm"], &after["grad_norm"], tolerance.norm * norm, what);
                resumed += u64::from(step > HALF_WAY);
            }
        }
        assert_eq!(resumed, LAST - HALF_WAY, "{name}");
        same_weights(name, &original, &last, tolerance.weight);
    }

    /// Asserts that the model of the fixture continues a prompt as it did originally.
    fn generates(&self, name: &str) {
        let expected = &self.expected["generated"][name];
        let arguments: Vec<&str> =
            expected["arguments"].as_array().unwrap().iter().map(|argument| argument.as_str().unwrap()).collect();
        let output: Value = serde_json::from_slice(&self.moonlight(&arguments).stdout).unwrap();
        for key in ["prompt_tokens", "tokens", "text", "stop"] {
            assert_eq!(output[key], expected[key], "{name}: {key}");
        }
        assert_eq!(output["tokens"].as_array().unwrap().len(), 12, "{name}");
    }
}

#[track_caller]
fn near(before: &Value, after: &Value, tolerance: f64, what: impl Fn() -> String) {
    let (before, after) = (before.as_f64().unwrap(), after.as_f64().unwrap());
    // `<=` and not `<`: a tolerance of 0 asks for equal bits. NaN is never within a tolerance.
    let is_near = before == after || (before - after).abs() <= tolerance;
    assert!(is_near, "{} was {before} and is {after}", what());
}

/// The CPU features by which kernels are chosen, as `make_compat_fixtures.py` lists them.
fn cpu_features() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    let found = [
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512bw", is_x86_feature_detected!("avx512bw")),
        ("avx512_bf16", is_x86_feature_detected!("avx512bf16")),
    ];
    #[cfg(not(target_arch = "x86_64"))]
    let found: [(&str, bool); 0] = [];
    found.into_iter().filter(|(_, there)| *there).map(|(name, _)| name).collect()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), target).unwrap()),
        }
    }
}

/// The tensors of a checkpoint's model or adapter, by name.
fn weights(dir: &Path) -> BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
    let file = ["model.safetensors", "adapter_model.safetensors"].map(|file| dir.join(file));
    let bytes = fs::read(file.iter().find(|file| file.exists()).unwrap()).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = tensors.tensors().into_iter();
    tensors.map(|(name, view)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()))).collect()
}

fn values(dtype: Dtype, bytes: &[u8]) -> Vec<f64> {
    match dtype {
        Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|bytes| f64::from(f32::from_le_bytes(*bytes))).collect(),
        // bf16 is the upper half of an f32.
        Dtype::BF16 => {
            let wide = |bytes: &[u8; 2]| f64::from(f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16));
            bytes.as_chunks::<2>().0.iter().map(wide).collect()
        }
        other => panic!("unexpected dtype {other:?}"),
    }
}

fn same_weights(name: &str, before: &Path, after: &Path, tolerance: f64) {
    let (before, after) = (weights(before), weights(after));
    assert!(before.len() > 5 && before.keys().eq(after.keys()), "{name}");
    for (tensor, (dtype, shape, was)) in &before {
        let (is_dtype, is_shape, is) = &after[tensor];
        assert_eq!((dtype, shape), (is_dtype, is_shape), "{name}: {tensor}");
        if tolerance == 0.0 {
            assert!(was == is, "{name}: {tensor} differs");
            continue;
        }
        let furthest =
            values(*dtype, was).iter().zip(values(*dtype, is)).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(furthest <= tolerance, "{name}: {tensor} differs by {furthest}");
    }
}

#[test]
fn a_pretraining_run_opens_resumes_and_generates() {
    let fixtures = Fixtures::new();
    fixtures.generates("pretrain");
    fixtures.resumes("pretrain");
    // The resumed run ends with the same model.
    fixtures.generates("pretrain");
}

#[test]
fn an_adapter_opens_resumes_and_generates() {
    let fixtures = Fixtures::new();
    fixtures.generates("lora");
    fixtures.resumes("lora");
    fixtures.generates("lora");
}

#[test]
fn the_optimizer_state_of_two_ranks_opens_and_resumes() {
    let fixtures = Fixtures::new();
    for half_way in [HALF_WAY, LAST] {
        let checkpoint = checkpoint(&fixtures.run("distributed"), half_way);
        for part in 0..2 {
            assert!(checkpoint.join(format!("optimizer-{part:05}-of-00002.bpk")).exists());
        }
    }
    fixtures.generates("distributed");
    fixtures.resumes("distributed");
}

#[test]
fn master_weights_of_a_bf16_model_open_and_resume() {
    let fixtures = Fixtures::new();
    let file = fs::read(checkpoint(&fixtures.run("bf16"), HALF_WAY).join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    assert_eq!(tensors.tensor("model.embed_tokens.weight").unwrap().dtype(), Dtype::BF16);
    fixtures.generates("bf16");
    fixtures.resumes("bf16");
}
