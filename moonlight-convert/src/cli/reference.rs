//! The manual's page of commands, made from clap's definitions, and the test that it is current.

use std::path::Path;

use clap::CommandFactory;
use clap_markdown::{MarkdownOptions, help_markdown_command_custom};

/// Set to write the page instead of comparing it.
const UPDATE: &str = "UPDATE_COMMAND_REFERENCE";
const PAGE: &str = "docs/src/reference/moonlight-convert.md";
const HEAD: &str = "\
<!-- Made from the command line's definition (moonlight-convert/src/cli): change the doc comments there, not this page. -->

# `moonlight-convert`

You will know every command of `moonlight-convert`, its arguments and its options. `moonlight-convert help COMMAND` prints the same.
`DIR`, `SRC`, `A` and `B` may be a directory or `org/name` in the Hub's cache. Exit codes are in [Exit codes](exit-codes.md).
";

#[test]
fn the_page_of_commands_is_current() {
    let options = MarkdownOptions::new().show_footer(false).show_table_of_contents(false).title("commands".into());
    let made = help_markdown_command_custom(&super::Arguments::command(), &options);
    // Our head replaces clap-markdown's. Its headings of the sixth level would be smaller than the text, and become bold.
    let commands = &made[made.find("## `").expect("a command comes first")..];
    let heading = |line: &str| line.strip_prefix("###### **")?.strip_suffix(":**").map(|name| format!("**{name}**"));
    let lines = commands.lines().map(str::trim_end).map(|line| heading(line).unwrap_or_else(|| line.to_owned()));
    let mut page = format!("{HEAD}\n");
    for line in lines {
        if !(line.is_empty() && page.ends_with("\n\n")) {
            page += &(line + "\n");
        }
    }
    let page = page.trim_end().to_owned() + "\n";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(PAGE);
    if std::env::var_os(UPDATE).is_some() {
        std::fs::write(&path, &page).unwrap();
    }
    assert!(
        std::fs::read_to_string(&path).unwrap_or_default() == page,
        "`{PAGE}` differs from the command line's definition. Update it with:\n\n    \
         {UPDATE}=1 cargo test -p moonlight-convert --bin moonlight-convert reference\n"
    );
}
