//! How deep in brackets a place of JSON is.

/// The state of a reader of JSON that counts brackets, those within texts aside. Bytes that are no JSON do it no harm: the
/// depth of more closing than opening ones is negative.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct JsonNesting {
    pub(super) depth: isize,
    /// Within a text.
    pub(super) quoted: bool,
    escaped: bool,
}

impl JsonNesting {
    #[inline]
    pub(super) fn take(&mut self, byte: u8) {
        match byte {
            _ if self.escaped => self.escaped = false,
            b'\\' if self.quoted => self.escaped = true,
            b'"' => self.quoted = !self.quoted,
            b'{' | b'[' if !self.quoted => self.depth += 1,
            b'}' | b']' if !self.quoted => self.depth -= 1,
            _ => {}
        }
    }
}
