//! Maps the tensors of the files to the parameters of the model: their names, and the plan that loading follows.

pub(crate) mod load_plan;
pub(crate) mod names;
