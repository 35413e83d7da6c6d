//! `messages` of a chat request, in the form that chat templates read.

use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::super::error::ApiError;
use super::super::fields::{expected_error, quoted};
use super::chat::parse_arguments;
use crate::chat::{ChatTemplate, Message};

/// The limit of JSON values in a field, because each takes far more memory than the text of it.
const MAX_VALUES: usize = 1 << 17;

/// The value of a field of any type.
pub(super) fn parse_value(name: &str, raw: &RawValue) -> Result<Value, ApiError> {
    if count_values(raw.get()) > MAX_VALUES {
        return Err(ApiError::TooManyValues { limit: MAX_VALUES });
    }
    super::parse_field(name, raw, "must be JSON")
}

/// About the number of values in a JSON text, and not less.
fn count_values(json: &str) -> usize {
    let (mut count, mut in_string, mut escaped) = (1, false, false);
    for byte in json.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b',' | b'[' | b'{' if !in_string => count += 1,
            _ => {}
        }
    }
    count
}

/// The messages, with the arguments of tool calls as objects, and `developer` as `system` for a template without it.
pub(super) fn parse_messages(raw: &RawValue, template: &ChatTemplate) -> Result<Vec<Message>, ApiError> {
    let Value::Array(list) = parse_value("messages", raw)? else {
        return Err(expected_error("messages", raw, "must be a list of messages"));
    };
    if list.is_empty() {
        return Err(ApiError::field("messages", "must have at least one message"));
    }
    list.into_iter().enumerate().map(|(index, message)| parse_message(index, message, template)).collect()
}

fn parse_message(index: usize, message: Value, template: &ChatTemplate) -> Result<Message, ApiError> {
    let place = format!("messages[{index}]");
    let Value::Object(mut fields) = message else {
        return Err(ApiError::field(place, "must be an object with `role` and `content`"));
    };
    fields.retain(|_, value| !value.is_null());
    let Some(role) = fields.get("role").and_then(Value::as_str).map(str::to_owned) else {
        return Err(ApiError::field(format!("{place}.role"), "must be a string"));
    };
    match role.as_str() {
        "system" | "user" | "assistant" => {}
        // OpenAI's newer name for the system message.
        "developer" if !template.knows_role("developer") => {
            fields.insert("role".into(), "system".into());
        }
        _ if template.knows_role(&role) => {}
        _ => {
            let problem = format!("is {}, which the chat template does not have", quoted(&role));
            return Err(ApiError::field(format!("{place}.role"), problem));
        }
    }
    // lm-evaluation-harness and OpenAI's newer API give messages a type.
    match fields.shift_remove("type") {
        None => {}
        Some(kind) if kind == "text" || kind == "message" => {}
        Some(_) => return Err(ApiError::unsupported(format!("{place}.type"), "only `text` and `message` are")),
    }
    if let Some(calls) = fields.get_mut("tool_calls") {
        let is_empty = check_calls(&format!("{place}.tool_calls"), &role, calls)?;
        if is_empty {
            fields.shift_remove("tool_calls");
        }
    }
    check_content(&format!("{place}.content"), &role, &mut fields)?;
    Message::from_fields(fields).ok_or_else(|| ApiError::field(format!("{place}.role"), "must be a string"))
}

/// Checks earlier tool calls, and makes their arguments objects. Returns whether there are none.
fn check_calls(place: &str, role: &str, calls: &mut Value) -> Result<bool, ApiError> {
    let Value::Array(calls) = calls else { return Err(ApiError::field(place, "must be a list")) };
    if !calls.is_empty() && role != "assistant" {
        return Err(ApiError::field(place, "is only for the role `assistant`"));
    }
    for (index, call) in calls.iter_mut().enumerate() {
        let place = format!("{place}[{index}]");
        if !call.is_object() {
            return Err(ApiError::field(place, "must be an object"));
        }
        if call.get("type").is_some_and(|kind| kind != "function") {
            return Err(ApiError::unsupported(format!("{place}.type"), "only `function` is"));
        }
        let Some(Value::Object(function)) = call.get_mut("function") else {
            return Err(ApiError::field(format!("{place}.function"), "must be an object with `name` and `arguments`"));
        };
        if !function.get("name").is_some_and(Value::is_string) {
            return Err(ApiError::field(format!("{place}.function.name"), "must be a string"));
        }
        let arguments = function.get("arguments").cloned().unwrap_or_else(|| "".into());
        let arguments = parse_arguments(&format!("{place}.function.arguments"), &arguments)?;
        function.insert("arguments".into(), arguments);
    }
    Ok(calls.is_empty())
}

/// Checks the content: a text, or a list of parts that are texts. Only an assistant's message may have none, if it has calls or
/// reasoning.
fn check_content(place: &str, role: &str, fields: &mut Map<String, Value>) -> Result<(), ApiError> {
    match fields.get("content") {
        Some(Value::String(_)) => Ok(()),
        Some(Value::Array(parts)) => {
            for (index, part) in parts.iter().enumerate() {
                let place = format!("{place}[{index}]");
                match part["type"].as_str() {
                    Some("text") if part["text"].is_string() => {}
                    Some("text") => return Err(ApiError::field(format!("{place}.text"), "must be a string")),
                    Some(kind) => {
                        let problem = format!("is {}, and only `text` is supported", quoted(kind));
                        return Err(ApiError::field(format!("{place}.type"), problem));
                    }
                    None => return Err(ApiError::field(format!("{place}.type"), "must be `text`")),
                }
            }
            Ok(())
        }
        None if role == "assistant" && fields.len() > 1 => {
            // Templates test and join the content, which without calls would be a text.
            fields.insert("content".into(), "".into());
            Ok(())
        }
        None => Err(ApiError::field(place, "is missing")),
        Some(_) => Err(ApiError::field(place, "must be a text or a list of parts")),
    }
}
