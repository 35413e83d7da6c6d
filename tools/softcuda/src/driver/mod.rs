//! The functions of the driver that programs call. A function that is not here is exported as well: it returns
//! `CUDA_ERROR_NOT_SUPPORTED`, and its name is in the log.
#![allow(non_snake_case, reason = "the names are the driver's")]
#![allow(clippy::missing_safety_doc, reason = "the driver's documentation says what each function takes")]
#![allow(missing_docs, reason = "as above")]

pub mod context;
pub mod copies;
pub mod device;
pub mod error;
pub mod launch;
pub mod memory;
pub mod module;
mod state;
pub mod stream;
mod unsupported;

pub use context::*;
pub use copies::*;
pub use device::*;
pub use launch::*;
pub use memory::*;
pub use module::*;
pub use stream::*;

/// What functions of the driver return.
pub type CUresult = i32;
