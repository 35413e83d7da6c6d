//! Values: conversion, quantization, dequantization and transposition.

pub(crate) mod conversion;
pub(crate) mod dequantize;
pub(crate) mod gguf_rows;
pub(crate) mod quant;
pub(crate) mod quantize;
pub(crate) mod transpose;
