//! What to change in a run so that it fits.

use super::{Plan, Setting};

/// A change, with all before it, and what the run needs then.
#[derive(Debug, Clone, PartialEq)]
pub struct Advice {
    /// As it stands in a recipe.
    pub change: String,
    /// Bytes with this change and those before it.
    pub peak: u64,
}

/// A way to need less: its words in a recipe, and the setting with it; `None` where it is taken already or has no place.
type Change = fn(&Setting) -> Option<(String, Setting)>;

/// From what costs nothing to what costs the most: time first, then what the result is worth.
const LADDER: &[Change] = &[
    |setting| {
        let chunk = 1024;
        let tokens = setting.batch * setting.sequence;
        let all = setting.loss_chunk_tokens == 0 || setting.loss_chunk_tokens > chunk;
        (all && tokens > chunk)
            .then(|| ("train.loss_chunk_tokens = 1024".into(), Setting { loss_chunk_tokens: chunk, ..setting.clone() }))
    },
    |setting| {
        (!setting.recompute).then(|| {
            let words = "train.activation_checkpointing = \"block\"".into();
            (words, Setting { recompute: true, ..setting.clone() })
        })
    },
    |setting| {
        (setting.batch > 1 && !setting.fused).then(|| {
            let words =
                format!("train.batch_size = 1, train.gradient_accumulation = {} times what it is", setting.batch);
            (words, Setting { batch: 1, accumulates: true, ..setting.clone() })
        })
    },
    |setting| {
        (setting.muon && setting.momentum_bytes == 4).then(|| {
            let words = "optimizer.momentum_dtype = \"bf16\"".into();
            (words, Setting { momentum_bytes: 2, ..setting.clone() })
        })
    },
    |setting| {
        (setting.bytes == 4).then(|| {
            let words = "model.dtype = \"bf16\"".into();
            (words, Setting { bytes: 2, fast: false, ..setting.clone() })
        })
    },
    |setting| {
        (setting.bytes < 4 && setting.masters).then(|| {
            let words = "optimizer.rounding = \"stochastic\"".into();
            (words, Setting { masters: false, ..setting.clone() })
        })
    },
    |setting| {
        (!setting.fused).then(|| {
            let words = "train.fuse_update = true, train.gradient_clip = 0, train.gradient_accumulation = 1".into();
            (words, Setting { fused: true, accumulates: false, ..setting.clone() })
        })
    },
];

impl Plan {
    /// Changes, one upon the other, until the run fits into `budget` bytes or nothing is left to change. Those that do not
    /// help are left out.
    pub fn advice(&self, budget: u64) -> Vec<Advice> {
        let mut taken = Vec::new();
        let mut setting = self.setting.clone();
        let mut peak = self.peak();
        for change in LADDER {
            if peak <= budget {
                break;
            }
            let Some((change, changed)) = change(&setting) else { continue };
            let with = Plan::new(self.config.clone(), changed.clone()).peak();
            if with < peak {
                (setting, peak) = (changed, with);
                taken.push(Advice { change, peak });
            }
        }
        taken
    }
}
