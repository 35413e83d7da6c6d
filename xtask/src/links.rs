//! Checks the links of all pages to files of the repository and to headings. Links to the web are not followed, so that the
//! check does not depend on a network.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use anyhow::{Result, bail};

use crate::pages;

/// Checks all Markdown pages of the repository.
///
/// # Errors
///
/// A broken link; all of them are printed first.
pub(crate) fn run(root: &Path, _check: bool) -> Result<()> {
    let pages = pages::all(root)?;
    let by_path: BTreeMap<&Path, &pages::Page> = pages.iter().map(|page| (page.path.as_path(), page)).collect();
    let (mut checked, mut broken) = (0, 0);
    for page in &pages {
        for (line, link) in &page.links {
            if is_elsewhere(link) {
                continue;
            }
            checked += 1;
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = match file.is_empty() {
                true => page.path.clone(),
                false => normal(&page.path.parent().unwrap_or(Path::new("")).join(file)),
            };
            let problem = if !root.join(&target).exists() {
                format!("`{}` does not exist", target.display())
            } else if page.path.starts_with(pages::MANUAL) && !target.starts_with(pages::MANUAL) {
                format!("`{}` is not part of the manual", target.display())
            } else if !anchor.is_empty() && !by_path.get(target.as_path()).is_some_and(|it| it.anchors.contains(anchor))
            {
                format!("`{}` has no heading `#{anchor}`", target.display())
            } else {
                continue;
            };
            broken += 1;
            eprintln!("{}: {problem}", page.place(*line));
        }
    }
    if broken > 0 {
        bail!("{broken} of {checked} links are broken");
    }
    eprintln!("{checked} links in {} pages", pages.len());
    Ok(())
}

fn is_elsewhere(link: &str) -> bool {
    // A README that is also a crate's documentation contains links to items of the code.
    link.contains("://") || link.starts_with("mailto:") || link.contains("::")
}

/// A path without `.` and `..`.
fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => drop(normal.pop()),
            component => normal.push(component),
        }
    }
    normal
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_taken_to_their_end() {
        assert_eq!(
            normal(Path::new("docs/src/guides/../reference/./recipe.md")),
            Path::new("docs/src/reference/recipe.md")
        );
    }

    #[test]
    fn the_links_of_the_repository_lead_somewhere() {
        run(crate::root(), true).unwrap();
    }
}
