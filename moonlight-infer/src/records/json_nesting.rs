//! The nesting depth of a position in JSON.

/// Counts brackets byte by byte, except those in strings. Bytes that are not JSON are accepted: if there are more closing than
/// opening brackets, the depth is negative.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct JsonNesting {
    pub(super) depth: isize,
    /// Whether the position is within a string.
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
