//! A model that writes a given text, so that tests of texts know what it writes.

use std::sync::Arc;

use burn::tensor::{Tensor, TensorData};
use moonlight_model::CausalLm;
use serde_json::json;

use super::*;

const FIRST_WORD: usize = 259;
const HIDDEN: usize = 288;

/// The tokenizer of bytes with an added token for each word, a special one for `<|...|>`.
fn tokenizer(words: &[&str]) -> Tokenizer {
    let mut file: Value = serde_json::from_slice(&Tokenizer::bytes().files()[0].contents).unwrap();
    for (index, word) in words.iter().enumerate() {
        file["added_tokens"].as_array_mut().unwrap().push(json!({
            "id": FIRST_WORD + index, "content": word, "special": word.starts_with("<|"), "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false,
        }));
    }
    Tokenizer::from_json(file.to_string().as_bytes()).unwrap()
}

/// A model that after any byte writes the words, one after the other, and then EOS. The words must differ.
///
/// The embedding of a token is a unit vector that the layers do not change, and the head maps it to the next token.
fn model(words: usize) -> CausalLm {
    let vocab = FIRST_WORD + words;
    assert!(vocab <= HIDDEN);
    let mut model = init(json!({
        "model_type": "llama", "vocab_size": vocab, "hidden_size": HIDDEN, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "initializer_range": 1e-6,
        "tie_word_embeddings": false,
    }));
    let (mut embedding, mut head) = (vec![0f32; vocab * HIDDEN], vec![0f32; HIDDEN * vocab]);
    for token in 0..vocab {
        embedding[token * HIDDEN + token] = 1.0;
        let next = match token {
            _ if token < FIRST_WORD => FIRST_WORD,
            _ if token + 1 < vocab => token + 1,
            _ => EOS as usize,
        };
        head[token * vocab + next] = 1.0;
    }
    let tensor =
        |values: Vec<f32>, shape: [usize; 2]| Tensor::<2>::from_data(TensorData::new(values, shape), &Device::flex());
    model.embed_tokens.weight = model.embed_tokens.weight.map(|_| tensor(embedding, [vocab, HIDDEN]));
    let mut lm_head = model.lm_head.take().unwrap();
    lm_head.weight = lm_head.weight.map(|_| tensor(head, [HIDDEN, vocab]));
    model.lm_head = Some(lm_head);
    model
}

/// A server whose model answers everything with the words, in the conversations of a template.
pub(super) fn server(template: &str, words: &[&str]) -> TestServer {
    let tokenizer = tokenizer(words);
    let chat = ChatEncoder::new(ChatTemplate::from_source(template).unwrap(), tokenizer.clone());
    let text = TextModel {
        tokenizer,
        chat: Some(Arc::new(chat)),
        eos: vec![EOS],
        end_of_turn: vec![EOS],
        defaults: SamplingDefaults::default(),
    };
    let engine =
        Engine::start("tiny", model(words.len()), EngineOptions { context: 1024, ..engine_options() }).unwrap();
    let server = Server::new(engine.clone(), text, ServerOptions::default()).unwrap();
    TestServer { engine, router: server.router() }
}

/// A template that writes tools and results, in the form of Hermes.
pub(super) const HERMES: &str = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}\
    {% for call in m.tool_calls or [] %}<tool_call>{\"name\": \"{{ call.function.name }}\", \"arguments\": \
    {{ call.function.arguments | tojson }}}</tool_call>{% endfor %}\n{% endfor %}{# 'user' 'assistant' 'tool' #}";

/// The same in the form of Kimi K2.
pub(super) const KIMI: &str = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}\
    {% for call in m.tool_calls or [] %}<|tool_call_begin|>{{ call.id }}<|tool_call_argument_begin|>\
    {{ call.function.arguments | tojson }}<|tool_call_end|>{% endfor %}\n{% endfor %}{# 'user' 'assistant' 'tool' #}";
