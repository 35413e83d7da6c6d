//! Optimizer states of earlier versions, in the formats of their time. Each loads, and the following steps have the same bits as
//! those of the version that wrote it.
//!
//! `fixtures/optimizer-state/README.md` describes how the files were made.

mod net;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use burn::module::Module;
use burn::optim::ModuleOptimizer;
use burn::tensor::{DType, Device};
use moonlight_optim::distributed::{Communicator, DistributedConfig, DistributedForm, InProcess};
use moonlight_optim::{AdamWConfig, Adaptive, MuonAdamW, MuonConfig, OptimizerOptions, ParameterRules};
use net::{MICRO_BATCHES, Net, RATE, STEPS, gradients, half_precision, net, rules, values, with_values};

/// A kind of state and its fixtures.
struct Case {
    /// Its key in `expected.json`.
    name: &'static str,
    dtype: DType,
    rules: ParameterRules,
    form: DistributedForm,
    /// Files, or folders with a file for each rank: each is a complete state.
    states: &'static [&'static str],
}

fn cases() -> Vec<Case> {
    use DistributedForm::{Flat, WholeMatrix};
    let full = || rules(MuonConfig::new(), AdamWConfig::new());
    vec![
        Case {
            name: "f32",
            dtype: DType::F32,
            rules: full(),
            form: WholeMatrix,
            states: &["f32-single.bpk", "f32-burn.bpk"],
        },
        Case {
            name: "bf16",
            dtype: DType::BF16,
            rules: half_precision(Adaptive::nor_muon()),
            form: WholeMatrix,
            states: &["bf16-single.bpk", "bf16-burn.bpk", "bf16-whole-2", "bf16-whole-3"],
        },
        Case { name: "f32-flat", dtype: DType::F32, rules: full(), form: Flat, states: &["f32-flat-2", "f32-flat-3"] },
        Case {
            name: "bf16-flat",
            dtype: DType::BF16,
            rules: half_precision(Adaptive::Off),
            form: Flat,
            states: &["bf16-flat-2", "bf16-flat-3"],
        },
    ]
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/optimizer-state")
}

/// The files of a state.
fn files(state: &str) -> Vec<PathBuf> {
    let path = fixtures().join(state);
    if path.is_file() {
        return vec![path];
    }
    let entries = std::fs::read_dir(path).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// The parameters when the state was written and after each of the steps that followed.
fn expected(case: &Case) -> Vec<Vec<f32>> {
    let text = std::fs::read_to_string(fixtures().join("expected.json")).unwrap();
    let all: std::collections::BTreeMap<String, Vec<String>> = serde_json::from_str(&text).unwrap();
    let (digits, shift) = if case.dtype == DType::BF16 { (4, 16) } else { (8, 0) };
    let value = |hex: &[u8]| {
        let bits = u32::from_str_radix(std::str::from_utf8(hex).unwrap(), 16).unwrap();
        f32::from_bits(bits << shift)
    };
    let history = all[case.name].iter().map(|line| line.as_bytes().chunks(digits).map(value).collect());
    history.collect()
}

/// The parameters of one rank after loading a state and after each step that follows.
fn continued(
    case: &Case,
    load: &[PathBuf],
    communicator: &Communicator,
    start: &[f32],
    save: Option<&Path>,
) -> Vec<Vec<f32>> {
    let mut model = with_values(net(case.dtype).fork(&Device::default().autodiff()), start);
    let config = DistributedConfig::new().with_form(case.form).with_bucket_elements(60);
    let options = OptimizerOptions::new().with_communicator(communicator.clone()).with_distributed(config);
    let mut optimizer: MuonAdamW = case.rules.assign(&model).unwrap().load(load, options).unwrap();
    if let Some(save) = save {
        optimizer.save(save.join(format!("{}.bpk", communicator.rank()))).unwrap();
    }
    let each = MICRO_BATCHES / communicator.size();
    let own = communicator.rank() * each..(communicator.rank() + 1) * each;
    let mut history = vec![values(&model)];
    for step in STEPS..2 * STEPS {
        let gradients = gradients(&model, step, own.clone());
        model = optimizer.step(RATE, model, gradients).unwrap();
        history.push(values(&model));
    }
    history
}

/// The fixtures were written on a processor with AVX-512. Kernels for other processors may round differently.
fn assert_same(found: &[Vec<f32>], expected: &[Vec<f32>], what: &str) {
    assert_eq!(found.len(), expected.len());
    let far = found.iter().flatten().zip(expected.iter().flatten()).map(|(one, other)| (one - other).abs());
    let far = far.fold(0.0, f32::max);
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512f") {
        assert!(found == expected, "{what}: expected equal bits, found a difference of {far}");
    }
    assert!(far < 1e-2, "{what}: {far}");
}

#[test]
fn every_old_state_continues_as_before_on_any_number_of_ranks() {
    for case in cases() {
        let case = Arc::new(case);
        let expected = expected(&case);
        assert!(expected[0] != expected[3] && expected[0] != values(&net(case.dtype)));
        for state in case.states {
            let mut load = files(state);
            let mut held = Vec::new(); // temporary folders, which the next world size reads
            // Each world size loads what the one before it wrote.
            for size in [1, 2, 3] {
                let again = tempfile::tempdir().unwrap();
                let groups = InProcess::collectives(size, Duration::from_secs(60));
                let threads: Vec<_> = groups
                    .into_iter()
                    .map(|collective| {
                        let (case, load, start) = (case.clone(), load.clone(), expected[0].clone());
                        let save = again.path().to_path_buf();
                        std::thread::spawn(move || {
                            continued(&case, &load, &Communicator::new(collective), &start, Some(&save))
                        })
                    })
                    .collect();
                for thread in threads {
                    let found = thread.join().unwrap();
                    assert_same(&found, &expected, &format!("{state} on {size}"));
                }
                load = (0..size).map(|rank| again.path().join(format!("{rank}.bpk"))).collect();
                held.push(again);
            }
        }
    }
}

#[test]
fn burns_optimizer_loads_every_old_state() {
    for case in cases().into_iter().filter(|case| case.form == DistributedForm::WholeMatrix) {
        let expected = expected(&case);
        for state in case.states {
            let mut model: Net = with_values(net(case.dtype), &expected[0]);
            let assignment = case.rules.assign(&model).unwrap();
            let mut optimizer: ModuleOptimizer = assignment.load_module_optimizer(&files(state)).unwrap();
            let mut history = vec![values(&model)];
            for step in STEPS..2 * STEPS {
                let gradients = gradients(&model, step, 0..MICRO_BATCHES);
                model = optimizer.step(RATE, model, gradients);
                history.push(values(&model));
            }
            assert_same(&history, &expected, state);
        }
    }
}
