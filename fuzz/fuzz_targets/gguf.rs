#![no_main]

libfuzzer_sys::fuzz_target!(init: moonlight_fuzz::begin(), |data: &[u8]| moonlight_fuzz::run(|| moonlight_fuzz::gguf(data)));
