//! Which tensor of the files is which parameter of the model.

pub(crate) mod load_plan;
pub(crate) mod names;
