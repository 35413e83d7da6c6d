//! Faults put into a module on purpose, to see whether the tests of a kernel find them: `SOFTCUDA_FAULT=KERNEL:KIND:N`.

use crate::settings::Fault;

/// The module with the fault, and what was changed; `None` if it has no such kernel or no such place.
pub(crate) fn put(ptx: &str, fault: &Fault) -> Option<(String, String)> {
    let entry = format!(".entry {}", fault.kernel);
    let mut inside = false;
    let mut places = 0;
    // Lists of registers that are still to come up to the left factor's, if an instruction is written over several lines.
    let mut lists = 0;
    let mut found = None;
    let lines: Vec<&str> = ptx.lines().collect();
    for (at, line) in lines.iter().enumerate() {
        if line.contains(".entry ") {
            inside = line.contains(&entry);
        }
        if !inside {
            continue;
        }
        if fault.kind == "fragment" && is(line.trim(), PRODUCTS) && !line.contains('{') {
            lists = 2;
            continue;
        }
        let is_left = lists == 1 && line.contains('{');
        lists -= usize::from(lists > 0 && line.contains('{'));
        let changed = if is_left { swapped(line.trim()) } else { changed(line.trim(), &fault.kind) };
        let Some(changed) = changed else { continue };
        if places == fault.place {
            found = Some((at, changed));
            break;
        }
        places += 1;
    }
    let (at, changed) = found?;
    let change = format!("PTX line {}: `{}` became `{changed}`", at + 1, lines[at].trim());
    let text: Vec<&str> =
        lines.iter().enumerate().map(|(line, &text)| if line == at { &changed } else { text }).collect();
    Some((text.join("\n"), change))
}

/// A line with a fault of a kind; `None` if it has no place for it.
fn changed(line: &str, kind: &str) -> Option<String> {
    match kind {
        "barrier" => is(line, &["bar.sync", "barrier.sync", "barrier.cta.sync"]).then(String::new),
        "read" => is(line, &["ld.global"]).then(|| moved(line))?,
        "write" => is(line, &["st.global"]).then(|| moved(line))?,
        "shared" => is(line, &["st.shared"]).then(String::new),
        // A register that begins with zero and later changes has a copy of its own, made by `mov`.
        "initial" => (is(line, &["mov.b32", "mov.f32"]) && line.contains("0f00000000")).then(String::new),
        "compare" => {
            let pairs = [(".lt.", ".le."), (".le.", ".lt."), (".gt.", ".ge."), (".ge.", ".gt."), (".eq.", ".ne.")];
            let (from, to) = pairs.into_iter().find(|(from, _)| is(line, &["setp"]) && line.contains(from))?;
            Some(line.replacen(from, to, 1))
        }
        "lane" => {
            let (start, lane, end) = is(line, &["shfl"]).then(|| operand(line, 2))??;
            let lane: u32 = lane.parse().ok()?;
            Some(format!("{start}{}{end}", lane ^ 3))
        }
        "fragment" => {
            // The left factor is the second list.
            let at = is(line, PRODUCTS).then(|| line.match_indices('{').nth(1))??.0;
            Some(format!("{}{}", &line[..at], swapped(&line[at..])?))
        }
        _ => None,
    }
}

/// Products of matrices.
const PRODUCTS: &[&str] = &["mma.sync", "wmma.mma"];

/// A text whose first list has its first two registers exchanged.
fn swapped(text: &str) -> Option<String> {
    let (start, list) = text.split_once('{')?;
    let registers: Vec<&str> = list.split('}').next()?.split(',').map(str::trim).collect();
    let [first, second, ..] = registers[..] else { return None };
    let list = list.replacen(first, "\0", 1).replacen(second, first, 1).replacen('\0', second, 1);
    Some(format!("{start}{{{list}"))
}

/// Whether a line is one of these instructions; a predicate may be before it.
fn is(line: &str, names: &[&str]) -> bool {
    let instruction =
        line.strip_prefix('@').and_then(|line| line.split_once(char::is_whitespace)).map_or(line, |at| at.1);
    names.iter().any(|name| instruction.trim_start().starts_with(name))
}

/// An access 4 KiB further on.
fn moved(line: &str) -> Option<String> {
    let (start, rest) = line.split_once('[')?;
    let (address, end) = rest.split_once(']')?;
    let (base, offset) = address.split_once('+').unwrap_or((address, "0"));
    let offset: i64 = offset.trim().parse().ok()?;
    Some(format!("{start}[{}+{}]{end}", base.trim(), offset + 4096))
}

/// What is before an operand, the operand, and what is after it.
fn operand(line: &str, at: usize) -> Option<(&str, &str, &str)> {
    let (before, rest) = match at {
        0 => return None,
        _ => line.split_at(line.match_indices(',').nth(at - 1)?.0 + 1),
    };
    let space = rest.len() - rest.trim_start().len();
    let (value, after) = rest[space..].split_at(rest[space..].find([',', ';'])?);
    Some((&line[..before.len() + space], value.trim(), after))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PTX: &str = "\
.visible .entry one()
{
\tbar.sync 0;
}
.visible .entry two_a1(.param .u64 p)
{
\tmov.b32 %r1, 0f00000000;
\t@%p1 ld.global.v2.b32 {%r2, %r3}, [%rd1+8];
\tst.shared.b32 [%r4], %r2;
\tbar.sync 0;
\tshfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;
\tsetp.lt.u32 %p2, %r5, %r6;
\tmma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r10, %r11, %r12, %r13}, {%r14, %r15, %r16, %r17}, {%r18, %r19}, {%r20, %r21, %r22, %r23};
\tst.global.b32 [%rd2], %r5;
\twmma.mma.sync.aligned.row.row.m16n16k16.f32.f32
\t\t{%r30, %r31},
\t\t{%r32, %r33},
\t\t{%r34, %r35},
\t\t{%r30, %r31};
\tbar.sync 1;
}";

    fn with(kind: &str, place: usize) -> Option<String> {
        let fault = Fault { kernel: "two".into(), kind: kind.into(), place };
        put(PTX, &fault).map(|(_, change)| change)
    }

    #[test]
    fn each_kind_changes_its_instruction_of_the_named_kernel() {
        let expected = [
            ("barrier", "`bar.sync 0;` became ``"),
            ("read", "became `@%p1 ld.global.v2.b32 {%r2, %r3}, [%rd1+4104];`"),
            ("write", "became `st.global.b32 [%rd2+4096], %r5;`"),
            ("shared", "`st.shared.b32 [%r4], %r2;` became ``"),
            ("initial", "`mov.b32 %r1, 0f00000000;` became ``"),
            ("compare", "became `setp.le.u32 %p2, %r5, %r6;`"),
            ("lane", "became `shfl.sync.bfly.b32 %r5, %r1, 2, 31, -1;`"),
            ("fragment", "{%r15, %r14, %r16, %r17}, {%r18, %r19}"),
        ];
        for (kind, part) in expected {
            let change = with(kind, 0).unwrap_or_else(|| panic!("{kind} has no place"));
            assert!(change.contains(part), "{kind}: {change}");
        }
    }

    #[test]
    fn an_instruction_may_be_written_over_several_lines() {
        assert!(with("fragment", 1).is_some_and(|change| change.ends_with("became `{%r33, %r32},`")));
    }

    #[test]
    fn places_are_counted_within_the_kernel() {
        assert!(with("barrier", 1).is_some_and(|change| change.contains("`bar.sync 1;`")));
        assert_eq!(with("barrier", 2), None);
        let other = Fault { kernel: "three".into(), kind: "barrier".into(), place: 0 };
        assert_eq!(put(PTX, &other), None);
    }
}
