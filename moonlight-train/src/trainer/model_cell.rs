//! The model of a rank while it is trained.

use std::ops::Deref;

use moonlight_model::CausalLm;

/// The model of a rank. An update consumes it and returns it: a second handle would keep every old parameter alive while its
/// new value is computed, and double the memory of the weights.
#[derive(Debug, Clone)]
pub(crate) struct ModelCell(Option<CausalLm>);

impl ModelCell {
    pub(crate) fn new(model: CausalLm) -> Self {
        Self(Some(model))
    }

    /// Replaces the model by the result of `update`. An error loses the model, so it must end the run.
    pub(crate) fn update<E>(&mut self, update: impl FnOnce(CausalLm) -> Result<CausalLm, E>) -> Result<(), E> {
        let model = self.0.take().expect("an update that lost the model ended the run");
        self.0 = Some(update(model)?);
        Ok(())
    }

    pub(crate) fn into_inner(self) -> CausalLm {
        self.0.expect("an update that lost the model ended the run")
    }
}

impl Deref for ModelCell {
    type Target = CausalLm;

    fn deref(&self) -> &CausalLm {
        self.0.as_ref().expect("an update that lost the model ended the run")
    }
}
