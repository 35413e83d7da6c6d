//! Error messages as the programs print them, for snapshot tests.

use std::collections::BTreeSet;
use std::fmt::Display;

/// Each error with the name of its variant, its message, and its hint if it has one.
pub(crate) fn render<E: Display>(
    errors: &[E],
    name: impl Fn(&E) -> &'static str,
    hint: impl Fn(&E) -> Option<String>,
) -> String {
    let mut text = String::new();
    for error in errors {
        text.push_str(&format!("[{}]\nerror: {error}\n", name(error)));
        if let Some(hint) = hint(error) {
            text.push_str(&format!("hint: {hint}\n"));
        }
        text.push('\n');
    }
    text
}

/// The variants that have an example.
pub(crate) fn seen<E>(errors: &[E], name: impl Fn(&E) -> &'static str) -> BTreeSet<&'static str> {
    errors.iter().map(name).collect()
}
