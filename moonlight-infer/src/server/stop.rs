//! Stop strings: found across the boundaries of tokens, and never sent, not even in part.

/// Searches text that arrives in pieces for any of several strings.
#[derive(Debug, Clone)]
pub(super) struct StopStrings {
    strings: Vec<String>,
    /// Text that was not released, because a stop string may begin in it.
    held: String,
}

/// The result of [`StopStrings::push`].
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Released {
    /// Text that cannot be part of a stop string.
    pub(super) text: String,
    /// The index of the stop string that follows the text, and the text after it, if one was found.
    pub(super) stop: Option<(usize, String)>,
}

impl StopStrings {
    /// None of the `strings` is empty.
    pub(super) fn new(strings: Vec<String>) -> Self {
        debug_assert!(strings.iter().all(|string| !string.is_empty()));
        Self { strings, held: String::new() }
    }

    /// Adds text. Of the stop strings in it the one that ends first counts, and of those the longest, so that the result is
    /// independent of how the text is divided.
    pub(super) fn push(&mut self, text: &str) -> Released {
        self.held.push_str(text);
        let found = self.strings.iter().enumerate().filter_map(|(index, string)| {
            let start = self.held.find(string.as_str())?;
            Some((start + string.len(), start, index))
        });
        if let Some((end, start, index)) = found.min() {
            let rest = self.held.split_off(end);
            self.held.truncate(start);
            return Released { text: std::mem::take(&mut self.held), stop: Some((index, rest)) };
        }
        let kept = self.strings.iter().map(|string| overlap(&self.held, string)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - kept);
        Released { text: std::mem::replace(&mut self.held, rest), stop: None }
    }

    /// The text that was held back, at the end of the text.
    pub(super) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// The length of the longest end of `text` with which `string` begins, and which is shorter than `string`.
fn overlap(text: &str, string: &str) -> usize {
    let starts = string.char_indices().map(|(index, _)| index).skip(1);
    starts.filter(|&length| text.ends_with(&string[..length])).last().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn strings(strings: &[&str]) -> StopStrings {
        StopStrings::new(strings.iter().map(ToString::to_string).collect())
    }

    fn text(text: &str) -> Released {
        Released { text: text.into(), stop: None }
    }

    #[test]
    fn a_stop_string_is_found_across_pieces() {
        let mut stops = strings(&["</s>", "\n\nUser:"]);
        assert_eq!(stops.push("Hello <"), text("Hello "));
        assert_eq!(stops.push("/"), text(""));
        assert_eq!(stops.push("b>\n"), text("</b>"));
        assert_eq!(stops.push("\nUse"), text(""));
        let found = Released { text: String::new(), stop: Some((1, " x".into())) };
        assert_eq!(stops.push("r: x"), found);
        assert_eq!(stops.finish(), "");
    }

    #[test]
    fn held_text_is_released_at_the_end() {
        let mut stops = strings(&["END"]);
        assert_eq!(stops.push("the EN"), text("the "));
        assert_eq!(stops.finish(), "EN");
    }

    #[test]
    fn the_stop_string_that_ends_first_counts_however_the_text_is_divided() {
        for pieces in [vec!["xabcd"], vec!["x", "a", "b", "c", "d"], vec!["xab", "cd"]] {
            let mut stops = strings(&["abcd", "bc", "c"]);
            let mut all = String::new();
            for piece in pieces {
                let released = stops.push(piece);
                all.push_str(&released.text);
                if let Some((index, _)) = released.stop {
                    assert_eq!(index, 1);
                    break;
                }
            }
            assert_eq!(all, "xa");
        }
    }

    /// The definition, on the complete text.
    fn cut<'t>(text: &'t str, strings: &[String]) -> Option<&'t str> {
        (0..=text.len()).filter(|&end| text.is_char_boundary(end)).find_map(|end| {
            let matching = strings.iter().filter(|string| text[..end].ends_with(string.as_str()));
            Some(&text[..end - matching.map(String::len).max()?])
        })
    }

    proptest! {
        #[test]
        fn pieces_give_the_text_before_the_first_stop(
            pieces in prop::collection::vec("[abé]{0,4}", 0..12),
            strings in prop::collection::vec("[abé]{1,4}", 0..4),
        ) {
            let whole: String = pieces.concat();
            let mut stops = StopStrings::new(strings.clone());
            let (mut sent, mut stopped) = (String::new(), false);
            for piece in &pieces {
                let released = stops.push(piece);
                sent.push_str(&released.text);
                stopped = released.stop.is_some();
                // What was sent is always a start of the final text.
                prop_assert!(cut(&whole, &strings).unwrap_or(&whole).starts_with(&sent));
                if stopped {
                    break;
                }
            }
            if !stopped {
                sent.push_str(&stops.finish());
            }
            prop_assert_eq!(cut(&whole, &strings).is_some(), stopped);
            prop_assert_eq!(cut(&whole, &strings).unwrap_or(&whole), sent);
        }
    }
}
