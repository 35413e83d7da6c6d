//! The published chat template of Moonlight. It is a separate module because both `chat` and `tokenizer` use it.

/// Moonlight's template, as published in its `tokenizer_config.json`. It writes no line breaks and no `[BOS]`, and adds a
/// system message to a conversation without one.
pub const MOONLIGHT_TEMPLATE: &str = "{%- for message in messages -%}{%- if loop.first and messages[0]['role'] != \
     'system' -%}<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>{%- endif -%}{%- if \
     message['role'] == 'system' -%}<|im_system|>{%- endif -%}{%- if message['role'] == 'user' -%}<|im_user|>{%- endif \
     -%}{%- if message['role'] == 'assistant' -%}<|im_assistant|>{%- endif -%}{{ message['role'] \
     }}<|im_middle|>{{message['content']}}<|im_end|>{%- endfor -%}{%- if add_generation_prompt \
     -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}";

/// The special tokens of [`MOONLIGHT_TEMPLATE`].
pub(crate) const MOONLIGHT_TOKENS: [&str; 5] =
    ["<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>"];
