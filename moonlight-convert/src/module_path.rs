//! The path of the parameter that a visitor or mapper of a module has reached.

/// The names of the modules that a visitor or mapper is in: `layers`, `3`, `self_attn`, ….
///
/// Burn's [`ModuleVisitor`](burn::module::ModuleVisitor) and [`ModuleMapper`](burn::module::ModuleMapper) report only
/// single names.
#[derive(Debug, Default)]
pub(crate) struct ModulePath(Vec<String>);

impl ModulePath {
    /// The path of a part of the model, such as `layers.3`; empty for the model itself.
    pub(crate) fn new(path: &str) -> Self {
        Self(path.split('.').filter(|name| !name.is_empty()).map(str::to_owned).collect())
    }

    pub(crate) fn enter(&mut self, name: &str) {
        self.0.push(name.to_owned());
    }

    pub(crate) fn exit(&mut self) {
        self.0.pop();
    }

    /// `layers.3.self_attn.q_proj.weight`.
    pub(crate) fn dotted(&self) -> String {
        self.0.join(".")
    }
}
