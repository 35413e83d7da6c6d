use std::path::{Path, PathBuf};

use moonlight_infer::tokenizer::Tokenizer;
use moonlight_optim::{AdamWConfig, MomentumPrecision, MuonConfig, Precision, Rounding, UpdateScale};

use super::*;
use crate::schedule::Schedule;

const SMALL: &str = r#"
[model]
preset = "bench-small"

[data]
train = ["data/*.txt"]

[optimizer]
learning_rate = 1e-3

[train]
steps = 10
"#;

fn parse(text: &str, sets: &[&str]) -> Result<Recipe, RecipeError> {
    let sets: Vec<String> = sets.iter().map(|&set| set.to_owned()).collect();
    Recipe::parse(text, Path::new("runs/small.toml"), &sets)
}

fn message(text: &str, sets: &[&str]) -> String {
    parse(text, sets).unwrap_err().to_string()
}

#[test]
fn defaults_are_filled_in() {
    let recipe = parse(SMALL, &[]).unwrap();
    assert_eq!(recipe.run.name, "small");
    assert_eq!(recipe.run.folder(), PathBuf::from("runs/small"));
    assert_eq!((recipe.data.format, recipe.data.tokenizer.as_str()), (DataFormat::Text, "bytes"));
    assert_eq!((recipe.data.pack, recipe.data.shuffle, recipe.data.sequence_length), (true, true, 1024));
    assert_eq!((recipe.optimizer.name, recipe.optimizer.adamw.betas), (OptimizerName::Muon, [0.9, 0.95]));
    assert_eq!((recipe.moe.bias_update_rate, recipe.moe.sequence_balance_weight), (1e-3, 1e-4));
    assert_eq!(recipe.data.cache_dir, PathBuf::from("runs/token-cache"));
}

#[test]
fn the_resolved_recipe_reads_back_equal() {
    let staged = r#"
        [model]
        preset = "deepseek-v3"
        num_hidden_layers = 4
        [data]
        train = ["a", "b/**"]
        valid = ["$HOME/c"]
        tokenizer = "none"
        format = "tokens"
        [optimizer]
        learning_rate = 0
        epsilon = 1e-20
        [schedule]
        name = "stages"
        [[schedule.stages]]
        steps = 5
        to = 4.2e-4
        [[schedule.stages]]
        steps = 7
        to = 0
        shape = "cosine"
        bias_update_rate = 0.0
        [[schedule.accumulation]]
        from_step = 3
        gradient_accumulation = 2
        [train]
    "#;
    for text in [SMALL, staged] {
        let recipe = parse(text, &["sample.prompt=fn main() {\n\t\"é\"", "run.seed=7"]).unwrap();
        let written = recipe.to_toml();
        let again = Recipe::parse(&written, Path::new("elsewhere/recipe.toml"), &[]).unwrap();
        assert_eq!(again, recipe, "{written}");
        for key in ["weight_decay", "max_file_bytes", "total_steps", "probe_every", "bias_update_rate", "top_k"] {
            assert!(written.contains(key), "{key} is missing from\n{written}");
        }
    }
    assert_eq!(parse(staged, &[]).unwrap().train.steps, 12);
}

#[test]
fn an_unknown_key_is_an_error_with_its_line_and_the_nearest_key() {
    let text = SMALL.replace("steps = 10", "stesp = 10");
    let error = parse(&text, &[]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "runs/small.toml:12: unknown key `train.stesp` (the nearest known key is `train.steps`)"
    );
    assert!(error.hint().unwrap().contains("gradient_clip"));
    assert!(message(SMALL, &["train.learning_rate=1"]).contains("`optimizer.learning_rate`"));
    assert!(message(SMALL, &["optimzer.momentum=1"]).contains("`[optimizer]`"));
    assert!(
        message(&format!("steps = 3\n{SMALL}"), &[])
            .contains("runs/small.toml:1: unknown key `steps` (the nearest known key is `train.steps`)")
    );
    assert!(message(SMALL, &["model.hiden_size=3"]).contains("`model.hidden_size`"));
    let stages = "[schedule]\nname = \"stages\"\nstages = [{ steps = 1, too = 1.0, to = 1.0 }]\n";
    assert!(
        message(&format!("{SMALL}{stages}"), &[]).contains("`schedule.stages[0].too` (the nearest known key is `to`)")
    );
}

#[test]
fn set_overrides_the_file() {
    let sets = ["optimizer.learning_rate=2e-3", "run.name=7", "model.num_hidden_layers=2", "data.train=x.txt"];
    let recipe = parse(SMALL, &sets).unwrap();
    assert_eq!((recipe.optimizer.learning_rate, recipe.run.name.as_str()), (2e-3, "7"));
    assert_eq!(recipe.model.config(0).unwrap().num_hidden_layers, 2);
    assert_eq!(recipe.data.train, ["x.txt"]);
    assert!(
        message(SMALL, &["train.steps=many"]).contains("--set train.steps=many: `train.steps` must be a whole number")
    );
}

#[test]
fn an_invalid_value_is_an_error_with_its_key() {
    for (set, expected) in [
        ("train.batch_size=0", "`train.batch_size` is 0; it must be at least 1"),
        ("optimizer.learning_rate=-1", "`optimizer.learning_rate` is -1; it must be at least 0"),
        ("optimizer.name=sgd", "`optimizer.name` is `sgd`; it must be one of: muon, adamw"),
        (
            "data.sequence_length=4097",
            "`data.sequence_length` is 4097, longer than the model's `max_position_embeddings`",
        ),
        ("data.sequence_length=0", "`data.sequence_length` is 0"),
        ("data.valid_fraction=1", "`data.valid_fraction` is 1"),
        ("data.format=talk", "`data.format` is `talk`; it must be one of: text, tokens, chat"),
        ("data.broken=ignore", "`data.broken` is `ignore`; it must be one of: error, skip"),
        ("data.too_long=cut", "`data.too_long` is `cut`; it must be one of: error, truncate, skip"),
        ("data.tokenizer=none", "`data.tokenizer` is `none`, but text needs a tokenizer"),
        ("data.train=[]", "`data.train` is empty"),
        ("data.train=a[", "`data.train` contains `a[`, which is not a glob"),
        ("data.train=$NO_SUCH_THING/x", "the environment variable `NO_SUCH_THING` is not set"),
        ("schedule.warmup_steps=11", "`schedule.warmup_steps` is 11, more than the 10 steps of the schedule"),
        ("schedule.final_fraction=2", "`schedule.final_fraction` is 2"),
        ("run.name=a/b", "`run.name` is `a/b`, which cannot name a folder"),
        ("model.num_hidden_layers=0", "[model]: the model config's `num_hidden_layers` must be at least 1"),
        ("model.preset=nothing", "`model.preset` is unknown"),
        (
            "model.path=/no/such/folder",
            "`model.path` is `/no/such/folder`, but `/no/such/folder/config.json` cannot be",
        ),
        ("model.dtype=f8", "`model.dtype` is `f8`"),
        ("train.gradient_clip=-1", "`train.gradient_clip` is -1"),
        ("sample.top_p=0", "`sample.top_p` is 0"),
        ("train.gradient_accumulation=4294967295", "a step has more than 2^32 tokens"),
        ("train.batch_size=4294967295", "a step has more than 2^32 tokens"),
        (
            "schedule.accumulation=[{from_step=1, gradient_accumulation=4294967295}]",
            "`schedule.accumulation` is 4294967295",
        ),
        ("optimizer.betas=[0.9]", "`optimizer.betas` must be a list of two numbers, not [0.9]"),
    ] {
        let text = if set.starts_with("model.path") {
            SMALL.replace("preset = \"bench-small\"", "")
        } else {
            SMALL.to_owned()
        };
        let message = message(&text, &[set]);
        assert!(message.contains(expected), "{set}: {message}");
        assert!(!message.contains('\n'), "{message}");
    }
}

#[test]
fn epochs_become_steps_once_the_data_are_known() {
    let text = SMALL.replace("steps = 10", "epochs = 2\nbatch_size = 4\ngradient_accumulation = 3");
    let steps = |sets: &[&str], sequences| parse(&text, sets).unwrap().with_steps(sequences).map(|it| it.train.steps);
    // While the number of steps is unknown, the warm-up is not checked against it.
    assert_eq!(parse(&text, &["schedule.warmup_steps=5"]).unwrap().train.steps, 0);
    // 2 * 60 sequences in micro-batches of 4 are 30 passes, and 3 passes are a step.
    assert_eq!(steps(&[], 60), Ok(10));
    assert_eq!(steps(&[], 61), Ok(11));
    assert_eq!(steps(&["train.epochs=0.1"], 60), Ok(1));
    // 2 steps of 3, 3 of 1, then 5 a step: 6 + 3 + 21 passes.
    let changes =
        "schedule.accumulation=[{from_step=2, gradient_accumulation=1}, {from_step=5, gradient_accumulation=5}]";
    assert_eq!(steps(&[changes], 60), Ok(2 + 3 + 5));
    assert_eq!(steps(&[changes], 16), Ok(2 + 2));
    // The written recipe has both keys and reads back; another number of steps is an error.
    let resolved = parse(&text, &[]).unwrap().with_steps(60).unwrap();
    let again = Recipe::parse(&resolved.to_toml(), Path::new("recipe.toml"), &[]).unwrap();
    assert_eq!((&again, again.train.epochs), (&resolved, 2.0));
    assert_eq!(again.with_steps(60).unwrap(), resolved);
    let error = steps(&["train.steps=9"], 60).unwrap_err();
    assert!(
        error.to_string().contains("`train.steps` is 9, but `train.epochs = 2` is 10 steps with these data"),
        "{error}"
    );
    assert!(steps(&["train.epochs=1e300"], 60).unwrap_err().to_string().contains("`train.epochs` is 1e300, which is"));
    assert!(message(&text, &["train.epochs=-1"]).contains("`train.epochs` is -1; it must be at least 0"));
    assert_eq!(parse(SMALL, &[]).unwrap().with_steps(60).unwrap().train.steps, 10);
}

#[test]
fn a_missing_required_key_is_named() {
    for (line, key) in [
        ("steps = 10", "train.steps"),
        ("learning_rate = 1e-3", "optimizer.learning_rate"),
        ("train = [\"data/*.txt\"]", "data.train"),
        ("preset = \"bench-small\"", "model.path"),
    ] {
        let message = message(&SMALL.replace(line, ""), &[]);
        assert!(message.contains(&format!("the recipe lacks `{key}`")), "{message}");
    }
}

#[test]
fn the_vocabulary_is_that_of_the_shape_or_else_of_the_tokenizer() {
    let tokenizer = Tokenizer::open("bytes").unwrap();
    let preset = parse(SMALL, &[]).unwrap().model.config_for(Some(&tokenizer)).unwrap();
    assert_eq!((preset.vocab_size, preset.eos_token_id), (8192, vec![257]));
    let small = parse(SMALL, &["model.vocab_size=258"]).unwrap().model.config_for(Some(&tokenizer)).unwrap_err();
    assert!(small.to_string().contains("`vocab_size` is 258, but the tokenizer has 259 tokens"), "{small}");
    let shape = SMALL.replace(
        "preset = \"bench-small\"",
        "model_type = \"llama\"\nhidden_size = 8\nintermediate_size = 16\nnum_hidden_layers = 1\n\
         num_attention_heads = 2\nmax_position_embeddings = 64",
    );
    let recipe = parse(&shape, &[]).unwrap();
    assert_eq!(recipe.data.sequence_length, 64);
    assert_eq!(recipe.model.config_for(Some(&tokenizer)).unwrap().vocab_size, 259);
    assert!(recipe.model.config_for(None).unwrap_err().to_string().contains("lacks `vocab_size`"));
    assert!(recipe.to_toml().contains("hidden_size = 8"));
}

#[test]
fn a_preset_may_be_a_file_next_to_the_recipe() {
    let folder = tempfile::tempdir().unwrap();
    let shape = moonlight_model::ModelConfig::preset("bench-small").unwrap().to_json();
    std::fs::write(folder.path().join("shape.json"), shape).unwrap();
    let path = folder.path().join("recipe.toml");
    std::fs::write(&path, SMALL.replace("bench-small", "shape.json")).unwrap();
    let recipe = Recipe::load(&path, &["model.num_hidden_layers=3".into()]).unwrap();
    let config = recipe.model.config(0).unwrap();
    assert_eq!((config.num_hidden_layers, config.vocab_size), (3, 8192));
}

/// A JSON file is a `config.json`, whose absent keys have the defaults of transformers; a TOML file has those of recipes.
#[test]
fn a_preset_in_json_has_the_defaults_of_its_class() {
    let folder = tempfile::tempdir().unwrap();
    let mut shape = moonlight_model::ModelConfig::preset("moonlight-16b-a3b").unwrap().to_value();
    let map = shape.as_object_mut().unwrap();
    ["architectures", "torch_dtype", "num_nextn_predict_layers", "routed_scaling_factor"]
        .iter()
        .for_each(|key| drop(map.remove(*key)));
    map.retain(|_, value| !value.is_null());
    let toml = toml::to_string(&*map).unwrap();
    // TOML has no null, which stands for "no query latent".
    map.insert("q_lora_rank".into(), serde_json::Value::Null);
    for (file, text, factor) in [("shape.json", shape.to_string(), 2.5), ("shape.toml", toml, 1.0)] {
        std::fs::write(folder.path().join(file), text).unwrap();
        let path = folder.path().join("recipe.toml");
        std::fs::write(&path, SMALL.replace("bench-small", file)).unwrap();
        let moe = Recipe::load(&path, &[]).unwrap().model.config(0).unwrap().moe.unwrap();
        assert_eq!(moe.routed_scaling_factor, factor, "{file}");
    }
}

/// Every `.toml` of a folder of the repository.
pub(super) fn toml_files(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(folder);
    let files = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> = files.filter(|path| path.extension().is_some_and(|end| end == "toml")).collect();
    files.sort();
    files
}

#[test]
fn every_recipe_of_the_repository_is_valid() {
    let files = toml_files("configs");
    assert!(files.len() >= 3, "{files:?}");
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        // The weights that fine-tuning starts from are not on this machine, so their `config.json` is enough here.
        let folder = tempfile::tempdir().unwrap();
        let shape = moonlight_model::ModelConfig::preset("moonlight-16b-a3b").unwrap().to_json();
        std::fs::write(folder.path().join("config.json"), shape).unwrap();
        let fine_tunes = text.lines().any(|line| line.starts_with("path = "));
        let set = format!("model.path={}", folder.path().display());
        let sets = if fine_tunes { vec![set] } else { Vec::new() };
        let recipe = Recipe::load(&file, &sets).unwrap_or_else(|error| panic!("{error}"));
        let again = Recipe::parse(&recipe.to_toml(), &file, &[]).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(again, recipe);
        recipe.model.config(0).unwrap();
        // With each option set, too.
        for option in OPTIONS {
            let sets = [&sets[..], &[option.to_owned()]].concat();
            let recipe = match Recipe::load(&file, &sets) {
                Ok(recipe) => recipe,
                // `train.fuse_update` and several ranks exclude each other.
                Err(error) => {
                    assert!(error.to_string().contains("`train.fuse_update`"), "{option}: {error}");
                    continue;
                }
            };
            let again = Recipe::parse(&recipe.to_toml(), &file, &[]);
            assert_eq!(again.as_ref(), Ok(&recipe), "{option}");
        }
    }
}

/// A value for each option of Muon, AdamW and distributed training that recipes of earlier versions could not set.
const OPTIONS: [&str; 24] = [
    "optimizer.momentum_warmup={ start = 0.85, steps = 300 }",
    "optimizer.momentum_dtype=bf16",
    "optimizer.nesterov=false",
    "optimizer.decay={ independent = true, cautious = true, schedule = { cosine = { steps = 10, last = 0.1 } } }",
    "optimizer.decay.schedule={ inverse_square = { hold = 7 } }",
    "optimizer.scale=update_norm",
    "optimizer.scale={ hidden_size = { factor = 0.3, hidden = 512 } }",
    "optimizer.scale.report.factor=0.5",
    "optimizer.layout=out_in",
    "optimizer.view=kernel",
    "optimizer.blocks={ rows = [128, 64] }",
    "optimizer.adaptive=nor_muon",
    "optimizer.adaptive.ada_muon={ beta_2 = 0.9, sign = false }",
    "optimizer.rounding=stochastic",
    "optimizer.coefficients=polar_express",
    "optimizer.coefficients={ custom = [[3.4445, -4.775, 2.0315], [1.5, -0.5, 0.0]] }",
    "optimizer.newton_schulz_steps=7",
    "optimizer.newton_schulz_epsilon=1e-10",
    "optimizer.newton_schulz_dtype=f16",
    "optimizer.form={ gram = { restarts = [2] } }",
    "optimizer.epsilon=1e-12",
    "distributed.bucket_elements=1000",
    "distributed.form=flat",
    "distributed.gather_dtype=f32",
];

#[test]
fn every_option_of_muon_is_a_key_and_is_written_back() {
    let plain = parse(SMALL, &[]).unwrap();
    for set in OPTIONS {
        let recipe = parse(SMALL, &[set]).unwrap_or_else(|error| panic!("{set}: {error}"));
        assert_ne!(recipe, plain, "{set} changes nothing");
        let again = Recipe::parse(&recipe.to_toml(), Path::new("recipe.toml"), &[]);
        assert_eq!(again.as_ref(), Ok(&recipe), "{set}:\n{}", recipe.to_toml());
    }
    let recipe = parse(SMALL, &["optimizer.adaptive=nor_muon", "optimizer.coefficients=polar_express"]).unwrap();
    assert_eq!(recipe.optimizer.muon.adaptive, moonlight_optim::Adaptive::NorMuon { beta_2: 0.95, epsilon: 1e-8 });
    assert_eq!(recipe.optimizer.muon.coefficients, moonlight_optim::Coefficients::PolarExpress);
    // A recipe contains every field of `MuonConfig`.
    let written = recipe.to_toml();
    let optimizer: toml::Table =
        toml::from_str::<toml::Table>(&written).unwrap()["optimizer"].as_table().unwrap().clone();
    let muon = serde_json::to_value(&recipe.optimizer.muon).unwrap();
    for (key, value) in muon.as_object().unwrap() {
        assert_eq!(optimizer.contains_key(key), !value.is_null(), "{key}:\n{written}");
    }
    // Keys that both optimizers share have the same value in both, except for `epsilon`, which is AdamW's.
    let recipe = parse(SMALL, &["optimizer.weight_decay=0.3", "optimizer.rounding=nearest", "optimizer.epsilon=1e-5"]);
    let OptimizerRecipe { muon, adamw, .. } = recipe.unwrap().optimizer;
    assert_eq!((muon.weight_decay, adamw.weight_decay, adamw.epsilon, muon.epsilon), (0.3, 0.3, 1e-5, 1e-7));
    assert_eq!(muon.rounding, adamw.rounding);
}

#[test]
fn options_of_choices_are_checked() {
    for (set, expected) in [
        ("optimizer.scale=repport", "`optimizer.scale` is `repport`; it must be one of: report, update_norm"),
        (
            "optimizer.adaptive.nor_muon.beta_3=1",
            "unknown key `optimizer.adaptive.nor_muon.beta_3` (the nearest known key is `beta_2`)",
        ),
        (
            "optimizer.coefficients={ custom = [[1.0, 2.0]] }",
            "`optimizer.coefficients.custom[0]` must be a list of three numbers, not [1.0, 2.0]",
        ),
        (
            "optimizer.decay.schedule={ cosine = { steps = 10 } }",
            "the recipe lacks `optimizer.decay.schedule.cosine.last`",
        ),
        (
            "optimizer.form.gram.restarts=[-1]",
            "`optimizer.form.gram.restarts[0]` must be a whole number from 0, not -1",
        ),
        ("optimizer.embedding_rate_factor=0", "`optimizer.embedding_rate_factor` is 0; it must be above 0"),
        ("optimizer.update_rms=0", "`optimizer.update_rms` is 0; it must be above 0"),
        ("optimizer.newton_schulz_steps=0", "`optimizer.newton_schulz_steps` is 0; it must be from 1 to 100"),
        ("schedule.stages=[{ to = 1.0 }]", "the recipe lacks `schedule.stages[0].steps`"),
        ("data.train=[1]", "`data.train[0]` must be a string, not 1"),
        ("train.plots=yes", "`train.plots` must be true or false, not yes"),
        (
            "run.dir=$NO_SUCH_THING/x",
            "`run.dir` is `$NO_SUCH_THING/x`, but the environment variable `NO_SUCH_THING` is not set",
        ),
        ("run.device=", "`run.device` is empty; write `auto` for the default device"),
        ("run=3", "the key needs its section"),
    ] {
        let message = message(SMALL, &[set]);
        assert!(message.contains(expected), "{set}: {message}");
    }
    assert!(
        message(&format!("{SMALL}[sample]\n\ntop_k = -1\n"), &[]).starts_with("runs/small.toml:15: `sample.top_k`")
    );
    let error = parse(SMALL, &["optimizer.name=moun"]).unwrap_err();
    assert_eq!(error.hint().as_deref(), Some("write `muon` if that is meant"));
}

/// Parsing does not access the disk; what a recipe names is looked up when it is resolved.
#[test]
fn parsing_does_not_access_the_disk() {
    for model in ["path = \"/no/such/folder\"", "path = \"no/such-model\"", "preset = \"no-such-file.toml\""] {
        let text = SMALL.replace("preset = \"bench-small\"", model);
        let draft = Draft::parse(&text, Path::new("runs/small.toml"), &[]).unwrap();
        let error = draft.resolve().unwrap_err().to_string();
        assert!(error.starts_with("runs/small.toml:3: `model.p"), "{error}");
    }
}

/// Recipes of runs of earlier versions.
#[test]
fn recipes_of_earlier_versions_mean_the_same() {
    let mut seen = 0;
    let runs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/compat");
    let runs = ["bf16", "lora", "pretrain", "distributed"].map(|run| runs.join(run).join("recipe.toml"));
    for file in toml_files("moonlight-train/tests/old_recipes").into_iter().chain(runs) {
        let text = std::fs::read_to_string(&file).unwrap();
        let old: toml::Table = toml::from_str(&text).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let shape = moonlight_model::ModelConfig::preset("moonlight-16b-a3b").unwrap().to_json();
        std::fs::write(folder.path().join("config.json"), shape).unwrap();
        let fine_tunes = old["model"].get("path").is_some();
        let set = format!("model.path={}", folder.path().display());
        let sets = if fine_tunes { vec![set] } else { Vec::new() };
        let recipe = Recipe::load(&file, &sets).unwrap_or_else(|error| panic!("{error}"));
        // Every value is written back exactly, under the key's current name.
        let new: toml::Table = toml::from_str(&recipe.to_toml()).unwrap();
        for (section, keys) in &old {
            for (key, value) in keys.as_table().unwrap() {
                if (section.as_str(), key.as_str()) != ("model", "path") {
                    let name = format!("{section}.{key}");
                    let renamed = RENAMED_KEYS.iter().find(|(old, _)| *old == name).map(|(_, new)| *new);
                    let key = renamed.and_then(|new| new.split_once('.')).map_or(key.as_str(), |(_, key)| key);
                    assert_eq!(new[section].get(key), Some(value), "{}: {name}", file.display());
                }
            }
        }
        let (muon, adamw) = as_the_older_program_read(&old["optimizer"]);
        assert_eq!((recipe.optimizer.muon, recipe.optimizer.adamw), (muon, adamw), "{}", file.display());
        seen += 1;
    }
    assert_eq!(seen, 10);
}

/// Muon and AdamW by the keys that recipes of earlier versions had.
fn as_the_older_program_read(keys: &toml::Value) -> (MuonConfig, AdamWConfig) {
    let number = |key: &str| keys[key].as_float().unwrap();
    let word = |key: &str| keys[key].as_str().unwrap();
    let rounding = match word("rounding") {
        "nearest" => Rounding::Nearest,
        "stochastic" => Rounding::Stochastic,
        "master" => Rounding::MasterWeights,
        other => panic!("{other}"),
    };
    let factor = number("update_rms");
    let scale = match word("scale") {
        "report" => UpdateScale::Report { factor },
        "update_norm" => UpdateScale::UpdateNorm { factor },
        // The hidden size is filled in when parameters are assigned.
        "hidden_size" => UpdateScale::HiddenSize { factor, hidden: 0 },
        "keller_jordan" => UpdateScale::KellerJordan,
        "spectral" => UpdateScale::Spectral,
        "unit" => UpdateScale::Unit,
        other => panic!("{other}"),
    };
    let bf16 = |key: &str| match word(key) {
        "f32" => false,
        "bf16" => true,
        other => panic!("{other}"),
    };
    let muon = MuonConfig::new()
        .with_momentum(number("momentum"))
        .with_nesterov(keys["nesterov"].as_bool().unwrap())
        .with_weight_decay(number("weight_decay"))
        .with_scale(scale)
        .with_steps(keys["newton_schulz_steps"].as_integer().unwrap() as usize)
        .with_rounding(rounding)
        .with_momentum_precision(match bf16("momentum_dtype") {
            false => MomentumPrecision::F32,
            true => MomentumPrecision::Bf16,
        })
        .with_precision(match bf16("newton_schulz_dtype") {
            false => Precision::F32,
            true => Precision::Bf16,
        });
    let betas = keys["betas"].as_array().unwrap();
    let adamw = AdamWConfig::new()
        .with_betas(betas[0].as_float().unwrap(), betas[1].as_float().unwrap())
        .with_epsilon(number("epsilon"))
        .with_weight_decay(number("weight_decay"))
        .with_rounding(rounding);
    (muon, adamw)
}

#[test]
fn every_shape_of_the_repository_is_valid() {
    let millions = |name: &str| match name {
        "moonlight-1b" => 900.0..1100.0,
        "muon-report-545m" => 500.0..570.0,
        "muon-report-822m" => 780.0..850.0,
        "muon-report-1.1b" => 1050.0..1150.0,
        "muon-report-1.5b" => 1450.0..1600.0,
        other => panic!("what is the size of {other}?"),
    };
    for file in toml_files("configs/models") {
        let recipe = parse(SMALL, &[&format!("model.preset={}", file.display())]).unwrap();
        let config = recipe.model.config(0).unwrap();
        let name = file.file_stem().unwrap().to_string_lossy().into_owned();
        let count = config.parameter_count();
        let count = if name.starts_with("muon") { count.total - count.embeddings } else { count.total };
        assert!(millions(&name).contains(&(count as f64 / 1e6)), "{name} has {count} parameters");
    }
}

/// The numbers of the report's section 3.3.
#[test]
fn the_three_stages_of_the_report() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/moonlight-16b-pretrain.toml");
    let recipe = Recipe::load(&file, &[]).unwrap();
    let schedule = Schedule::new(&recipe.schedule, recipe.optimizer.learning_rate, recipe.train.steps).unwrap();
    let end = recipe.train.steps;
    assert_eq!((schedule.rate(1999), schedule.rate(160_971), schedule.rate(161_071)), (4.2e-4, 4.2e-5, 1e-4));
    assert_eq!((schedule.rate(end - 1), schedule.bias_update_rate(end - 1)), (0.0, Some(0.0)));
    assert_eq!(schedule.bias_update_rate(160_971), None);
    let sequences: u64 = (0..end)
        .map(|step| schedule.gradient_accumulation(step).unwrap_or(recipe.train.gradient_accumulation) as u64)
        .sum();
    let tokens = sequences as f64 * recipe.data.sequence_length as f64;
    assert!((tokens / 5.7e12 - 1.0).abs() < 1e-3, "{tokens}");
}
