//! The body of `/v1/chat/completions`.

use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::super::defaults::SamplingDefaults;
use super::super::error::ApiError;
use super::super::fields::{Fields, parse_field};
use super::super::tools::ToolFormat;
use super::messages::{parse_messages, parse_value};
use super::{MAX_TOP_LOGPROBS, Settings};
use crate::chat::{ChatTemplate, Message};

/// A checked request.
#[derive(Debug, PartialEq)]
pub(in super::super) struct ChatRequest {
    pub(in super::super) settings: Settings,
    /// At least one.
    pub(in super::super) messages: Vec<Message>,
    /// `tools` and `chat_template_kwargs`, for the template.
    pub(in super::super) fields: Map<String, Value>,
    /// How the model calls tools, if there are any that it may call.
    pub(in super::super) tools: Option<ToolFormat>,
}

impl ChatRequest {
    /// Parses and checks a body for a model with this template.
    pub(in super::super) fn parse(
        body: &[u8],
        template: &ChatTemplate,
        defaults: &SamplingDefaults,
    ) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        let mut settings = Settings::take(&mut fields, defaults)?;
        let raw = fields.take_raw("messages").ok_or(ApiError::Missing { name: "messages" })?;
        let messages = parse_messages(raw, template)?;
        let logprobs = fields.take_bool("logprobs")?;
        let top = fields.take_integer("top_logprobs", 0, MAX_TOP_LOGPROBS)?;
        if top.is_some_and(|top| top > 0) && !logprobs {
            return Err(ApiError::field("top_logprobs", "is only for `logprobs: true`"));
        }
        settings.logprobs = logprobs.then_some(top.unwrap_or(0) as usize);
        // `max_tokens` is the older name.
        let most = fields.take_integer("max_completion_tokens", 1, i64::MAX)?;
        let older = fields.take_integer("max_tokens", 1, i64::MAX)?;
        if let (Some(most), Some(older)) = (most, older)
            && most != older
        {
            return Err(ApiError::field("max_tokens", "differs from `max_completion_tokens`: give one of them"));
        }
        settings.max_tokens = most.or(older).map(|most| most as usize);
        let mut for_template = Map::new();
        let tools = take_tools(&mut fields, template)?;
        let format = match tools {
            None => None,
            Some((tools, format)) => {
                for_template.insert("tools".into(), tools);
                Some(format)
            }
        };
        if let Some(raw) = fields.take_raw("chat_template_kwargs") {
            let kwargs = parse_value("chat_template_kwargs", raw)?;
            for_template.insert("chat_template_kwargs".into(), kwargs);
        }
        refuse_unsupported(&mut fields)?;
        fields.finish()?;
        Ok(Self { settings, messages, fields: for_template, tools: format })
    }
}

/// Fields of OpenAI's API that bear on the result and are not supported, with the values that ask for nothing.
fn refuse_unsupported(fields: &mut Fields<'_>) -> Result<(), ApiError> {
    const NO_GRAMMAR: &str = "the model's text is not constrained to a grammar";
    const NO_SUCH_MODEL: &str = "the model has no such setting";
    for (name, neutral, reason) in [
        ("response_format", ["{\"type\":\"text\"}"].as_slice(), NO_GRAMMAR),
        ("modalities", &["[\"text\"]"], "the model only writes text"),
        ("audio", &[], "the model only writes text"),
        ("prediction", &[], "no text is predicted"),
        ("web_search_options", &[], "nothing is searched"),
        ("reasoning_effort", &[], "set what the chat template reads by `chat_template_kwargs`"),
        ("verbosity", &[], NO_SUCH_MODEL),
        ("moderation", &[], "nothing is moderated"),
        ("functions", &["[]"], "it is replaced by `tools`"),
        ("function_call", &["\"none\""], "it is replaced by `tool_choice`"),
    ] {
        fields.refuse(name, neutral, reason)?;
    }
    Ok(())
}

/// The tools that the model may call, and how it calls them.
fn take_tools(fields: &mut Fields<'_>, template: &ChatTemplate) -> Result<Option<(Value, ToolFormat)>, ApiError> {
    let tools = fields.take_raw("tools");
    let choice = fields.take_raw("tool_choice");
    fields.refuse("parallel_tool_calls", &["true"], "the number of calls is not constrained")?;
    let choice = choice.map(tool_choice).transpose()?.unwrap_or(true);
    let Some(raw) = tools else { return Ok(None) };
    let Value::Array(tools) = parse_value("tools", raw)? else {
        return Err(ApiError::field("tools", "must be a list"));
    };
    for (index, tool) in tools.iter().enumerate() {
        check_tool(index, tool)?;
    }
    if tools.is_empty() || !choice {
        return Ok(None);
    }
    let Some(source) = template.tools_source() else {
        return Err(ApiError::unsupported("tools", "the chat template of the model does not read them"));
    };
    let Some(format) = ToolFormat::of_template(source) else {
        return Err(ApiError::unsupported("tools", "the form in which the model calls them is not known"));
    };
    Ok(Some((tools.into(), format)))
}

/// Whether the model may call tools. A call that must be made would need text that is constrained to a grammar.
fn tool_choice(raw: &RawValue) -> Result<bool, ApiError> {
    match raw.get() {
        "\"auto\"" => Ok(true),
        "\"none\"" => Ok(false),
        _ => Err(ApiError::unsupported("tool_choice", "only `auto` and `none` are")),
    }
}

fn check_tool(index: usize, tool: &Value) -> Result<(), ApiError> {
    let place = format!("tools[{index}]");
    match tool["type"].as_str() {
        Some("function") => {}
        Some(_) => return Err(ApiError::unsupported(format!("{place}.type"), "only `function` is")),
        None => return Err(ApiError::field(format!("{place}.type"), "must be `function`")),
    }
    let function = &tool["function"];
    if function["name"].as_str().is_none_or(str::is_empty) {
        return Err(ApiError::field(format!("{place}.function.name"), "must be a name"));
    }
    if !matches!(function["parameters"], Value::Null | Value::Object(_)) {
        return Err(ApiError::field(format!("{place}.function.parameters"), "must be a JSON schema"));
    }
    if function["strict"] == true {
        let reason = "arguments are not constrained to the schema";
        return Err(ApiError::unsupported(format!("{place}.function.strict"), reason));
    }
    Ok(())
}

/// `arguments` of an earlier call, which templates read as an object.
pub(super) fn parse_arguments(place: &str, arguments: &Value) -> Result<Value, ApiError> {
    match arguments {
        Value::Object(_) => Ok(arguments.clone()),
        Value::String(text) if text.trim().is_empty() => Ok(Value::Object(Map::new())),
        Value::String(text) => {
            let raw: &RawValue = serde_json::from_str(text.trim())
                .map_err(|error| ApiError::field(place, format!("must be an object as JSON text: {error}")))?;
            match parse_field::<Value>(place, raw, "must be an object as JSON text")? {
                value @ Value::Object(_) => Ok(value),
                _ => Err(ApiError::field(place, "must be an object as JSON text")),
            }
        }
        _ => Err(ApiError::field(place, "must be an object as JSON text")),
    }
}
