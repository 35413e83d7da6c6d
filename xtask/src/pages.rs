//! Markdown pages: their files, headings, links and blocks of code.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use pulldown_cmark::{CodeBlockKind, Event, Options, Parser, Tag, TagEnd};

use crate::shell;

/// The folder of the manual's pages.
pub(crate) const MANUAL: &str = "docs/src";

/// The parts of a page that the checks use.
pub(crate) struct Page {
    /// Relative to the root of the repository.
    pub(crate) path: PathBuf,
    pub(crate) text: String,
    /// Anchors of headings, as mdBook and GitHub make them.
    pub(crate) anchors: BTreeSet<String>,
    /// Targets of links and pictures, each with its line.
    pub(crate) links: Vec<(usize, String)>,
    /// Blocks of code.
    pub(crate) blocks: Vec<Block>,
    /// Inline code, each with its line.
    pub(crate) codes: Vec<(usize, String)>,
    /// The text of the first heading, and of the first paragraph.
    pub(crate) opening: (String, String),
}

/// A block of code.
pub(crate) struct Block {
    pub(crate) line: usize,
    /// The words after the fence: the language, then marks such as `run`.
    pub(crate) info: Vec<String>,
    pub(crate) text: String,
}

impl Block {
    pub(crate) fn is(&self, language: &str) -> bool {
        self.info.first().is_some_and(|info| info == language)
    }

    pub(crate) fn is_marked(&self, mark: &str) -> bool {
        self.info.iter().skip(1).any(|info| info == mark)
    }
}

/// Every Markdown file that git tracks or would track, except fixtures.
pub(crate) fn all(root: &Path) -> Result<Vec<Page>> {
    let mut git = shell::command(root, "git ls-files --cached --others --exclude-standard *.md");
    let listed = shell::output(&mut git)?;
    let paths: BTreeSet<&str> = listed.lines().filter(|path| !path.starts_with("fixtures/")).collect();
    paths.into_iter().filter(|path| root.join(path).exists()).map(|path| Page::read(root, Path::new(path))).collect()
}

/// The pages of the manual.
pub(crate) fn manual(root: &Path) -> Result<Vec<Page>> {
    Ok(all(root)?.into_iter().filter(|page| page.path.starts_with(MANUAL)).collect())
}

impl Page {
    fn read(root: &Path, path: &Path) -> Result<Self> {
        let text = fs::read_to_string(root.join(path)).with_context(|| format!("`{}`", path.display()))?;
        Ok(Self::parse(path, text))
    }

    pub(crate) fn parse(path: &Path, text: String) -> Self {
        let mut page = Self {
            path: path.to_owned(),
            text,
            anchors: BTreeSet::new(),
            links: Vec::new(),
            blocks: Vec::new(),
            codes: Vec::new(),
            opening: Default::default(),
        };
        let starts: Vec<usize> =
            std::iter::once(0).chain(page.text.match_indices('\n').map(|(at, _)| at + 1)).collect();
        let line = |offset: usize| starts.partition_point(|&start| start <= offset);
        let mut seen: BTreeMap<String, usize> = BTreeMap::new();
        let (mut heading, mut paragraph, mut block) = (None::<String>, None::<String>, None::<Block>);
        let options = Options::ENABLE_TABLES | Options::ENABLE_STRIKETHROUGH | Options::ENABLE_FOOTNOTES;
        for (event, range) in Parser::new_ext(&page.text, options).into_offset_iter() {
            match event {
                Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
                Event::End(TagEnd::Heading(_)) => {
                    let text = heading.take().unwrap_or_default();
                    let slug = slug(&text);
                    let count = seen.entry(slug.clone()).or_default();
                    page.anchors.insert(if *count == 0 { slug } else { format!("{slug}-{count}") });
                    *count += 1;
                    if page.opening.0.is_empty() {
                        page.opening.0 = text;
                    }
                }
                Event::Start(Tag::Paragraph) => paragraph = Some(String::new()),
                Event::End(TagEnd::Paragraph) => {
                    let text = paragraph.take().unwrap_or_default();
                    if page.opening.1.is_empty() {
                        page.opening.1 = text;
                    }
                }
                Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                    page.links.push((line(range.start), dest_url.into_string()));
                }
                Event::Start(Tag::CodeBlock(CodeBlockKind::Fenced(info))) => {
                    let info = info.split([',', ' ']).filter(|word| !word.is_empty()).map(str::to_owned).collect();
                    block = Some(Block { line: line(range.start) + 1, info, text: String::new() });
                }
                Event::End(TagEnd::CodeBlock) => page.blocks.extend(block.take()),
                Event::Text(text) => {
                    let into = block.as_mut().map(|block| &mut block.text);
                    if let Some(into) = into.or(heading.as_mut()).or(paragraph.as_mut()) {
                        into.push_str(&text);
                    }
                }
                Event::Code(code) => {
                    if let Some(into) = heading.as_mut().or(paragraph.as_mut()) {
                        into.push_str(&code);
                    }
                    page.codes.push((line(range.start), code.into_string()));
                }
                Event::SoftBreak | Event::HardBreak => {
                    if let Some(paragraph) = &mut paragraph {
                        paragraph.push(' ');
                    }
                }
                _ => {}
            }
        }
        page
    }

    /// `docs/src/guides/lora.md:12`.
    pub(crate) fn place(&self, line: usize) -> String {
        format!("{}:{line}", self.path.display())
    }
}

/// The anchor of a heading: lower case, with hyphens for blanks and without punctuation.
fn slug(heading: &str) -> String {
    let kept = heading.trim().chars().filter_map(|character| match character {
        ' ' | '-' => Some('-'),
        '_' => Some('_'),
        character if character.is_alphanumeric() => Some(character.to_ascii_lowercase()),
        _ => None,
    });
    kept.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_taken_apart() {
        let text = "# `[lora]` and more\n\nYou will\nknow.\n\n## A b\n\n## A b\n\n[x](y.md#z) `moonlight train`\n\n```sh run\nls\n```\n";
        let page = Page::parse(Path::new("a.md"), text.to_owned());
        assert_eq!(page.opening, ("[lora] and more".into(), "You will know.".into()));
        assert_eq!(page.anchors.iter().map(String::as_str).collect::<Vec<_>>(), ["a-b", "a-b-1", "lora-and-more"]);
        assert_eq!(page.links, [(10, "y.md#z".to_owned())]);
        assert_eq!(page.codes[1], (10, "moonlight train".to_owned()));
        let block = &page.blocks[0];
        assert!(block.is("sh") && block.is_marked("run"));
        assert_eq!((block.line, block.text.as_str()), (13, "ls\n"));
    }
}
