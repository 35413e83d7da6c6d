//! GGUF, the file format of llama.cpp.

#![allow(dead_code, reason = "connected step by step")]

pub(crate) mod names;
