//! The byte alphabet of byte-level BPE.

/// The character that stands for a byte in byte-level BPE (GPT-2's table): printable Latin-1 characters stand for
/// themselves, the other 68 bytes are mapped to U+0100 and following.
pub fn byte_to_char(byte: u8) -> char {
    match byte {
        b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
        0x00..=0x20 => shifted(u32::from(byte)),
        0x7F..=0xA0 => shifted(33 + u32::from(byte) - 0x7F),
        0xAD => shifted(67),
    }
}

/// The character for the byte number `index` of those that are not printable.
fn shifted(index: u32) -> char {
    char::from_u32(0x100 + index).unwrap_or('\u{FFFD}')
}

/// A token's bytes in the spelling of `tokenizer.json`.
pub(super) fn spell(bytes: &[u8]) -> String {
    bytes.iter().map(|&byte| byte_to_char(byte)).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_byte_has_a_unique_visible_character() {
        let characters: BTreeSet<char> = (0..=u8::MAX).map(byte_to_char).collect();
        assert_eq!(characters.len(), 256);
        assert!(characters.iter().all(|character| !character.is_whitespace() && !character.is_control()));
        assert_eq!(spell(b" a\n\xE6"), "ĠaĊæ");
    }
}
