//! The keys of `quantization_config`: each is read, or does not affect the weights, or is refused by name.

use serde_json::{Map, Value};

use super::block;

/// The methods whose settings are checked. With another method the tensors decide: unquantized ones are read.
const METHODS: [&str; 4] = ["compressed-tensors", "fbgemm_fp8", "fp8", "modelopt"];

/// Keys that are read, and those that concern activations, caches, which modules are quantized (the tensors show it)
/// and how a program computes.
const KEYS: &[&str] = &[
    "activation_scale_ub",
    "activation_scheme",
    "config_groups",
    "dequantize",
    "exclude_modules",
    "expert_dtype",
    "fmt",
    "format",
    "global_compression_ratio",
    "ignore",
    "ignored_layers",
    "kv_cache_quant_algo",
    "kv_cache_scheme",
    "modules_to_convert",
    "modules_to_not_convert",
    "producer",
    "quant_algo",
    "quant_method",
    "quantization_status",
    "run_compressed",
    "scale_fmt",
    "sparsity_config",
    "transform_config",
    "use_optimized_inference",
    "version",
    "weight_block_size",
];

/// Keys of an entry of `config_groups`.
const GROUP: &[&str] = &["format", "input_activations", "output_activations", "targets", "weights"];

/// Keys of the entry's `weights`.
const WEIGHTS: &[&str] = &[
    "actorder",
    "block_structure",
    "dynamic",
    "group_size",
    "num_bits",
    "observer",
    "observer_kwargs",
    "scale_dtype",
    "strategy",
    "symmetric",
    "type",
    "zp_dtype",
];

/// The supported values of keys that also have unsupported ones. A `format` may be that of int8 weights in bytes, too: those
/// are refused for their dtype.
const SUPPORTED_VALUES: &[(&str, &[&str])] = &[
    ("expert_dtype", &["fp8"]),
    ("fmt", &["e4m3", "e4m3fn", "float8_e4m3fn"]),
    ("format", &["dense", "float-quantized", "mixed-precision", "naive-quantized", "pack-quantized"]),
    ("quant_algo", &["FP8", "FP8_BLOCK_SCALES", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN"]),
    ("strategy", &["block", "channel", "group", "tensor"]),
    ("type", &["float", "int"]),
    // The order in which columns were rounded does not affect decoding, except for `group`, which permutes them.
    ("actorder", &["static", "weight"]),
];

/// The unsupported settings of a `quantization_config`, each as a sentence without a full stop.
pub(super) fn unsupported(quantization: &Value) -> Vec<String> {
    let mut found = Vec::new();
    let Some(map) = quantization.as_object() else {
        if !quantization.is_null() {
            found.push("`quantization_config` is not an object".into());
        }
        return found;
    };
    // Without a method, the settings are checked as well.
    match map.get("quant_method") {
        Some(Value::String(method)) if !METHODS.contains(&method.as_str()) => return found,
        _ => {}
    }
    keys(map, KEYS, "", &mut found);
    for key in ["sparsity_config", "transform_config"] {
        if let Some(value) = map.get(key).filter(|value| !is_nothing(value)) {
            let what = if key == "sparsity_config" {
                "stores only nonzero weights"
            } else {
                "rotates weights and activations"
            };
            found.push(format!("`quantization_config.{key}` is {}: it {what}", shown(value)));
        }
    }
    sides(map, "weight_block_size", "", &mut found);
    match map.get("config_groups") {
        None | Some(Value::Null) => {}
        Some(Value::Object(groups)) => {
            groups.iter().take(MOST).for_each(|(name, value)| group(name, value, &mut found))
        }
        Some(_) => found.push("`quantization_config.config_groups` is not an object".into()),
    }
    found.truncate(MOST);
    found
}

/// The most problems that are reported.
const MOST: usize = 32;

fn group(name: &str, value: &Value, found: &mut Vec<String>) {
    let place = format!("config_groups.{}.", cut(name));
    let Some(map) = value.as_object() else {
        found.push(format!(
            "`quantization_config.config_groups.{}` names a preset; presets are not supported",
            cut(name)
        ));
        return;
    };
    keys(map, GROUP, &place, found);
    let Some(weights) = map.get("weights").and_then(Value::as_object) else { return };
    let place = format!("{place}weights.");
    keys(weights, WEIGHTS, &place, found);
    sides(weights, "block_structure", &place, found);
    if let Some(dynamic) = weights.get("dynamic").filter(|value| !is_nothing(value)) {
        found.push(format!(
            "`quantization_config.{place}dynamic` is {}; only scales stored in the file are supported",
            shown(dynamic)
        ));
    }
}

/// Reports unknown keys and unsupported values.
fn keys(map: &Map<String, Value>, known: &[&str], place: &str, found: &mut Vec<String>) {
    for (key, value) in map.iter().filter(|(_, value)| !value.is_null()) {
        if found.len() >= MOST {
            return;
        }
        if !known.contains(&key.as_str()) {
            found.push(format!("unknown key `quantization_config.{place}{}`", cut(key)));
        } else if let Some((_, values)) = SUPPORTED_VALUES.iter().find(|(name, _)| name == key)
            && !value.as_str().is_some_and(|value| values.contains(&value))
            && !(key == "actorder" && value == &Value::Bool(false))
        {
            let known = values.join(", ");
            found.push(format!("`quantization_config.{place}{key}` is {}; supported are {known}", shown(value)));
        }
    }
}

/// Reports a block that is not two positive sizes.
fn sides(map: &Map<String, Value>, key: &str, place: &str, found: &mut Vec<String>) {
    if let Some(value) = map.get(key).filter(|value| !value.is_null() && block(value).is_none()) {
        found.push(format!("`quantization_config.{place}{key}` is {}; it must be two sizes", shown(value)));
    }
}

/// Whether a value is null, false, empty, or an object of such values. A `sparsity_config` of the format `dense` counts,
/// too.
fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.get("format").is_some_and(|format| format == "dense") || map.values().all(is_nothing),
        _ => false,
    }
}

fn shown(value: &Value) -> String {
    cut(&value.to_string())
}

fn cut(text: &str) -> String {
    const LONGEST: usize = 80;
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A config as llm-compressor writes it, with one group. `over` replaces keys of the config, and `weights` those of
    /// the group's weights.
    fn compressed(over: Value, weights: Value) -> Value {
        let mut config = json!({"quant_method": "compressed-tensors", "format": "pack-quantized", "version": "0.12.2",
            "quantization_status": "compressed", "ignore": ["lm_head"], "global_compression_ratio": null,
            "kv_cache_scheme": null, "sparsity_config": {}, "transform_config": {},
            "config_groups": {"group_0": {"targets": ["Linear"], "format": "pack-quantized", "output_activations": null,
                "input_activations": {"dynamic": true, "num_bits": 8, "type": "float"},
                "weights": {"num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": 32,
                    "actorder": "weight", "block_structure": null, "dynamic": false, "observer": "minmax",
                    "observer_kwargs": {}, "scale_dtype": null, "zp_dtype": null}}}});
        for (key, value) in over.as_object().unwrap() {
            config[key] = value.clone();
        }
        for (key, value) in weights.as_object().unwrap() {
            config["config_groups"]["group_0"]["weights"][key] = value.clone();
        }
        config
    }

    #[test]
    fn the_keys_of_published_configs_are_known() {
        for config in [
            compressed(json!({}), json!({})),
            compressed(
                json!({"sparsity_config": {"format": "dense", "global_sparsity": 0.1}}),
                json!({"actorder": "static"}),
            ),
            compressed(
                json!({"transform_config": {"config_groups": {}}}),
                json!({"actorder": null, "strategy": "channel"}),
            ),
            json!({"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "scale_fmt": "ue8m0",
                "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}),
            json!({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"], "weight_block_size": null}),
            json!({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": []}),
            json!({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"],
                "producer": {"name": "modelopt"}}),
            // The tensors decide.
            json!({"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}),
            json!(null),
        ] {
            assert_eq!(unsupported(&config), [""; 0], "{config}");
        }
    }

    #[test]
    fn keys_that_change_the_weights_are_refused_by_name() {
        let hadamard = json!({"config_groups": {"u": {"type": "hadamard", "apply": [{"targets": ["Linear"]}]}}});
        for (over, weights, named) in [
            (json!({"transform_config": hadamard}), json!({}), "transform_config` is "),
            (json!({"sparsity_config": {"format": "sparse-24-bitmask"}}), json!({}), "sparsity_config` is "),
            (json!({"format": "marlin-24"}), json!({}), "format` is \"marlin-24\"; supported are dense"),
            (json!({"format": "int-quantized"}), json!({}), "format` is"),
            (json!({"format": "nvfp4-pack-quantized"}), json!({}), "format` is"),
            (json!({}), json!({"actorder": "group"}), "config_groups.group_0.weights.actorder` is \"group\""),
            (json!({}), json!({"actorder": true}), "weights.actorder` is true"),
            (json!({}), json!({"dynamic": true}), "weights.dynamic` is true"),
            (json!({}), json!({"strategy": "tensor_group"}), "weights.strategy` is"),
            (json!({}), json!({"type": "fp"}), "weights.type` is"),
            (json!({}), json!({"block_structure": "16"}), "weights.block_structure` is"),
            (json!({}), json!({"rotation": 3}), "weights.rotation`"),
            (json!({"weight_block_size": [0, 32]}), json!({}), "weight_block_size` is [0,32]"),
            (json!({"fmt": "e5m2"}), json!({}), "fmt` is"),
            (json!({"expert_dtype": "fp4"}), json!({}), "expert_dtype` is"),
            (json!({"hadamard": true}), json!({}), "unknown key `quantization_config.hadamard`"),
        ] {
            let found = unsupported(&compressed(over.clone(), weights.clone()));
            assert!(matches!(&found[..], [one] if one.contains(named)), "{over} {weights}: {found:?}");
        }
        let preset = json!({"config_groups": {"FP8_DYNAMIC": ["Linear"]}});
        assert!(unsupported(&preset)[0].contains("names a preset"));
    }
}
