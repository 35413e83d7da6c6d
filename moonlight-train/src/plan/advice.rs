//! Which settings to change so that a run fits.

use moonlight_model::QuantBits;

use super::{MemoryPlan, MemorySettings};

/// A change of a recipe, and the peak memory with it and all changes before it in the list.
#[derive(Debug, Clone, PartialEq)]
pub struct Advice {
    /// The keys and their new values, as in a recipe: `train.fuse_update = true, train.gradient_clip = 0`.
    pub change: String,
    /// The same as pairs of a key and a TOML value.
    pub sets: Vec<(&'static str, String)>,
    /// Peak memory, bytes.
    pub peak: u64,
}

type Sets = Vec<(&'static str, String)>;

/// A change that needs less memory: the keys to set, and the settings with them; `None` if it does not apply.
type Change = fn(&MemorySettings) -> Option<(Sets, MemorySettings)>;

/// From the cheapest change to the most expensive: first those that cost nothing, then time, then quality of the result.
const LADDER: &[Change] = &[
    |settings| {
        settings
            .probes
            .then(|| (vec![("train.probe_every", "0".into())], MemorySettings { probes: false, ..settings.clone() }))
    },
    |settings| {
        let chunk = 1024;
        let tokens = settings.batch * settings.sequence;
        let larger = settings.loss_chunk_tokens == 0 || settings.loss_chunk_tokens > chunk;
        (larger && tokens > chunk).then(|| {
            let sets = vec![("train.loss_chunk_tokens", chunk.to_string())];
            (sets, MemorySettings { loss_chunk_tokens: chunk, ..settings.clone() })
        })
    },
    |settings| {
        (!settings.recompute).then(|| {
            let sets = vec![("train.activation_checkpointing", quoted("block"))];
            (sets, MemorySettings { recompute: true, ..settings.clone() })
        })
    },
    |settings| {
        // A step keeps its number of sequences: micro-batches of one, and correspondingly more of them.
        (settings.batch > 1 && !settings.fuse_update).then(|| {
            let gradient_accumulation = settings.batch * settings.gradient_accumulation;
            let sets = vec![
                ("train.batch_size", "1".into()),
                ("train.gradient_accumulation", gradient_accumulation.to_string()),
            ];
            (sets, MemorySettings { batch: 1, gradient_accumulation, accumulates: true, ..settings.clone() })
        })
    },
    |settings| {
        (settings.muon && settings.momentum_bytes == 4).then(|| {
            let sets = vec![("optimizer.momentum_dtype", quoted("bf16"))];
            (sets, MemorySettings { momentum_bytes: 2, ..settings.clone() })
        })
    },
    |settings| {
        (settings.bytes_per_value == 4).then(|| {
            let sets = vec![("model.dtype", quoted("bf16"))];
            (sets, MemorySettings { bytes_per_value: 2, ..settings.clone() })
        })
    },
    |settings| quantized(settings, QuantBits::Eight, "int8"),
    |settings| quantized(settings, QuantBits::Four, "int4"),
    |settings| {
        (settings.bytes_per_value < 4 && settings.master_weights).then(|| {
            let sets = vec![("optimizer.rounding", quoted("stochastic"))];
            (sets, MemorySettings { master_weights: false, ..settings.clone() })
        })
    },
    |settings| {
        // A fused update has neither a global norm to clip by nor a sum of gradients over micro-batches, so the recipe would be refused
        // without these two keys.
        (!settings.fuse_update).then(|| {
            let sets = vec![
                ("train.fuse_update", "true".into()),
                ("train.gradient_clip", "0".into()),
                ("train.gradient_accumulation", "1".into()),
            ];
            let fused = MemorySettings { fuse_update: true, accumulates: false, ..settings.clone() };
            (sets, MemorySettings { gradient_accumulation: 1, ..fused })
        })
    },
];

/// A string as TOML writes it.
fn quoted(text: &str) -> String {
    format!("\"{text}\"")
}

/// Only projections that `[lora]` freezes can be quantized.
fn quantized(settings: &MemorySettings, bits: QuantBits, name: &str) -> Option<(Sets, MemorySettings)> {
    let fewer_bits = settings.quantization.is_none_or(|now| now == QuantBits::Eight && bits == QuantBits::Four);
    (settings.lora.is_some() && fewer_bits).then(|| {
        let sets = vec![("model.quantize", quoted(name))];
        (sets, MemorySettings { quantization: Some(bits), ..settings.clone() })
    })
}

impl MemoryPlan {
    /// The fewest changes, cheapest first, with which the run fits into `budget` bytes; if it fits with none, all changes that help.
    pub fn advice(&self, budget: u64) -> Vec<Advice> {
        let peak = |taken: &[Change]| self.with(taken).last().map_or(self.peak(), |advice| advice.peak);
        let mut taken: Vec<Change> = Vec::new();
        for change in LADDER {
            if peak(&taken) <= budget {
                break;
            }
            taken.push(*change);
        }
        // An expensive change may make cheaper ones unnecessary. Drop those, beginning with the most expensive.
        let least = peak(&taken).max(budget);
        for index in (0..taken.len()).rev() {
            let mut fewer = taken.clone();
            fewer.remove(index);
            if peak(&fewer) <= least {
                taken = fewer;
            }
        }
        self.with(&taken)
    }

    /// Applies the changes in order. One that does not apply is left out.
    fn with(&self, changes: &[Change]) -> Vec<Advice> {
        let mut settings = self.settings.clone();
        let mut taken = Vec::new();
        for change in changes {
            let Some((sets, changed)) = change(&settings) else { continue };
            let peak = MemoryPlan::new(self.config.clone(), changed.clone()).peak();
            settings = changed;
            let assignments: Vec<String> = sets.iter().map(|(key, value)| format!("{key} = {value}")).collect();
            taken.push(Advice { change: assignments.join(", "), sets, peak });
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use moonlight_model::ModelConfig;

    use super::*;

    /// Moonlight-16B in bf16 with f32 masters, one sequence of 4096 tokens a micro-batch, on a GPU.
    fn sixteen() -> MemoryPlan {
        let settings = MemorySettings {
            batch: 1,
            sequence: 4096,
            bytes_per_value: 2,
            recompute: false,
            loss_chunk_tokens: 0,
            fuse_update: false,
            gradient_accumulation: 1,
            accumulates: false,
            muon: true,
            momentum_bytes: 4,
            second_moment_bytes: 0,
            master_weights: true,
            cpu: false,
            unfused_attention: false,
            threads: 1,
            frozen: Vec::new(),
            lora: None,
            quantization: None,
            probes: false,
        };
        MemoryPlan::new(ModelConfig::preset("moonlight-16b-a3b").unwrap(), settings)
    }

    #[test]
    fn a_run_that_fits_needs_no_advice() {
        assert!(sixteen().advice(u64::MAX).is_empty());
    }

    #[test]
    fn each_change_is_needed_and_the_last_one_fits() {
        let plan = sixteen();
        for budget in [190e9 as u64, 141e9 as u64, 79e9 as u64] {
            let advice = plan.advice(budget);
            assert!(advice.last().unwrap().peak <= budget, "{advice:?}");
            let again = plan.advice(advice.last().unwrap().peak);
            assert_eq!(again.last().unwrap().peak, advice.last().unwrap().peak);
        }
        assert_eq!(plan.advice(190e9 as u64).len(), 1);
        // To train all parameters on one GPU of 80 GB takes bf16 weights without masters and gradients of one layer at a time.
        let advice = plan.advice(79e9 as u64);
        let has = |words: &str| advice.iter().any(|advice| advice.change.contains(words));
        assert!(has("fuse_update") && has("stochastic") && has("block"), "{advice:?}");
    }

    #[test]
    fn a_run_that_cannot_fit_gets_every_change_that_helps() {
        let advice = sixteen().advice(1);
        assert!(advice.last().unwrap().peak > 60e9 as u64);
    }
}
