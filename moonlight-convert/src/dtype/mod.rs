//! Values: their dtypes, quantized forms and orientation.

pub(crate) mod conversion;
pub(crate) mod dequantize;
pub(crate) mod quant;
pub(crate) mod transpose;
