//! Which tensor of the files is which parameter of the model: names, and the plan that loading follows.

pub(crate) mod load_plan;
pub(crate) mod names;
