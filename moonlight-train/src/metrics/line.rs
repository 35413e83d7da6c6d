//! One readable line a step, for logs: torchtitan's order of fields.

use std::fmt::Write;

use super::{Figures, Split};

impl Figures {
    /// The figures as one line.
    pub(crate) fn line(&self) -> String {
        let mut line = match self.split {
            Split::Train => format!("step: {:>6}", self.step),
            Split::Valid => format!("validate step: {:>6}", self.step),
        };
        let mut put = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                let _ = write!(line, "  {name}: {value}");
            }
        };
        put("loss", self.loss.map(|loss| format!("{loss:.4}")));
        put("grad_norm", self.grad_norm.map(|norm| format!("{norm:.4}")));
        put("memory", self.memory_mib.map(|memory| format!("{:.2}GiB", memory / 1024.0)));
        put("tps", self.tokens_per_second.map(|speed| format!("{speed:.0}")));
        put("lr", self.lr.map(|lr| format!("{lr:.2e}")));
        put("perplexity", (self.split == Split::Valid).then_some(self.perplexity).flatten().map(|p| format!("{p:.2}")));
        put("imbalance", self.expert_imbalance.map(|imbalance| format!("{imbalance:.2}")));
        put("dead", self.dead_experts.filter(|&dead| dead > 0.0).map(|dead| format!("{dead:.0}")));
        put("logit", self.max_attention_logit.map(|logit| format!("{logit:.1}")));
        put("rms", self.update_rms_muon.map(|rms| format!("{rms:.3}")));
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_in_a_fixed_order() {
        let figures = Figures {
            step: 12,
            loss: Some(2.5),
            grad_norm: Some(0.25),
            tokens_per_second: Some(1234.5),
            lr: Some(2e-3),
            dead_experts: Some(0.0),
            ..Figures::default()
        };
        assert_eq!(figures.line(), "step:     12  loss: 2.5000  grad_norm: 0.2500  tps: 1234  lr: 2.00e-3");
    }
}
