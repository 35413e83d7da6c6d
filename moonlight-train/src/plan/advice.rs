//! What to change in a run so that it fits.

use super::{MemorySettings, MemoryPlan};

/// A change, with all before it, and what the run needs then.
#[derive(Debug, Clone, PartialEq)]
pub struct Advice {
    /// As a recipe writes it.
    pub change: String,
    /// Bytes with this change and those before it.
    pub peak: u64,
}

/// A way to need less: its words in a recipe, and the settings with it; `None` where it is taken already or has no place.
type Change = fn(&MemorySettings) -> Option<(String, MemorySettings)>;

/// From what costs nothing to what costs the most: time first, then what the result is worth.
const LADDER: &[Change] = &[
    |settings| {
        settings.probed.then(|| ("train.probe_every = 0".into(), MemorySettings { probed: false, ..settings.clone() }))
    },
    |settings| {
        let chunk = 1024;
        let tokens = settings.batch * settings.sequence;
        let all = settings.loss_chunk_tokens == 0 || settings.loss_chunk_tokens > chunk;
        (all && tokens > chunk).then(|| {
            ("train.loss_chunk_tokens = 1024".into(), MemorySettings { loss_chunk_tokens: chunk, ..settings.clone() })
        })
    },
    |settings| {
        (!settings.recompute).then(|| {
            let words = "train.activation_checkpointing = \"block\"".into();
            (words, MemorySettings { recompute: true, ..settings.clone() })
        })
    },
    |settings| {
        (settings.batch > 1 && !settings.fused).then(|| {
            let words =
                format!("train.batch_size = 1, train.gradient_accumulation = {} times what it is", settings.batch);
            (words, MemorySettings { batch: 1, accumulates: true, ..settings.clone() })
        })
    },
    |settings| {
        (settings.muon && settings.momentum_bytes == 4).then(|| {
            let words = "optimizer.momentum_dtype = \"bf16\"".into();
            (words, MemorySettings { momentum_bytes: 2, ..settings.clone() })
        })
    },
    |settings| {
        (settings.bytes == 4).then(|| {
            let words = "model.dtype = \"bf16\"".into();
            (words, MemorySettings { bytes: 2, ..settings.clone() })
        })
    },
    |settings| {
        (settings.bytes < 4 && settings.masters).then(|| {
            let words = "optimizer.rounding = \"stochastic\"".into();
            (words, MemorySettings { masters: false, ..settings.clone() })
        })
    },
    |settings| {
        (!settings.fused).then(|| {
            let words = "train.fuse_update = true, train.gradient_clip = 0, train.gradient_accumulation = 1".into();
            (words, MemorySettings { fused: true, accumulates: false, ..settings.clone() })
        })
    },
];

impl MemoryPlan {
    /// Changes, one upon the other, until the run fits into `budget` bytes or nothing is left to change. Those that it
    /// fits without are left out.
    pub fn advice(&self, budget: u64) -> Vec<Advice> {
        let peak = |taken: &[Change]| self.with(taken).last().map_or(self.peak(), |advice| advice.peak);
        let mut taken: Vec<Change> = Vec::new();
        for change in LADDER {
            if peak(&taken) <= budget {
                break;
            }
            taken.push(*change);
        }
        // The dearest first: what came before it on the ladder may have been for nothing.
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

    /// What each change comes to, those before it included; a change that has no place is left out.
    fn with(&self, changes: &[Change]) -> Vec<Advice> {
        let mut settings = self.settings.clone();
        let mut taken = Vec::new();
        for change in changes {
            let Some((change, changed)) = change(&settings) else { continue };
            let peak = MemoryPlan::new(self.config.clone(), changed.clone()).peak();
            settings = changed;
            taken.push(Advice { change, peak });
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
            bytes: 2,
            recompute: false,
            loss_chunk_tokens: 0,
            fused: false,
            accumulates: false,
            muon: true,
            momentum_bytes: 4,
            second_moment_bytes: 0,
            masters: true,
            cpu: false,
            plain_attention: false,
            threads: 1,
            frozen: Vec::new(),
            lora: None,
            packed: None,
            probed: false,
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
        // Full fine-tuning on one GPU of 80 GB takes no masters, and gradients of one layer at a time.
        let advice = plan.advice(79e9 as u64);
        let has = |words: &str| advice.iter().any(|advice| advice.change.contains(words));
        assert!(has("fuse_update") && has("stochastic") && has("block"), "{advice:?}");
    }

    #[test]
    fn what_cannot_fit_is_made_as_small_as_it_goes() {
        let advice = sixteen().advice(1);
        assert!(advice.last().unwrap().peak > 60e9 as u64);
    }
}
