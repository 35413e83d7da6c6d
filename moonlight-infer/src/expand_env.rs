//! Environment variables in paths.

/// Expands a leading `~` and every `$NAME` or `${NAME}` from the environment. If `CARGO_HOME` is not set, it has cargo's
/// default, `~/.cargo`.
///
/// # Errors
///
/// The name of the first variable that is not set.
pub fn expand_env(text: &str) -> Result<String, String> {
    expand_with(text, |name| std::env::var(name).ok())
}

fn expand_with(text: &str, variable: impl Fn(&str) -> Option<String>) -> Result<String, String> {
    let home = || variable("HOME").or_else(|| variable("USERPROFILE"));
    let look_up = |name: &str| {
        variable(name)
            .or_else(|| if name == "CARGO_HOME" { home().map(|home| format!("{home}/.cargo")) } else { None })
            .ok_or_else(|| name.to_owned())
    };
    let mut rest = text;
    let mut expanded = String::with_capacity(text.len());
    // `~name` is another user's home directory, and is not expanded.
    if let Some(after) = text.strip_prefix('~')
        && (after.is_empty() || after.starts_with(['/', '\\']))
    {
        expanded.push_str(&home().ok_or_else(|| "HOME".to_owned())?);
        rest = after;
    }
    while let Some(dollar) = rest.find('$') {
        expanded.push_str(&rest[..dollar]);
        let after = &rest[dollar + 1..];
        let (name, next) = match after.strip_prefix('{').and_then(|inner| inner.split_once('}')) {
            Some(braced) => braced,
            None => {
                let end = after.find(|c: char| c != '_' && !c.is_ascii_alphanumeric()).unwrap_or(after.len());
                after.split_at(end)
            }
        };
        if name.is_empty() {
            expanded.push('$');
        } else {
            expanded.push_str(&look_up(name)?);
        }
        rest = next;
    }
    expanded.push_str(rest);
    Ok(expanded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_and_the_home_directory_are_expanded() {
        let environment = |name: &str| match name {
            "HOME" => Some("/home/me".to_owned()),
            "DATA" => Some("/data".to_owned()),
            _ => None,
        };
        for (text, expected) in [
            ("~/x", "/home/me/x"),
            ("~x/~", "~x/~"),
            ("$DATA/*.txt", "/data/*.txt"),
            ("${DATA}x", "/datax"),
            ("$CARGO_HOME/registry", "/home/me/.cargo/registry"),
            ("a$/b", "a$/b"),
        ] {
            assert_eq!(expand_with(text, environment), Ok(expected.to_owned()), "{text}");
        }
        assert_eq!(expand_with("$NOWHERE/x", environment), Err("NOWHERE".to_owned()));
    }
}
