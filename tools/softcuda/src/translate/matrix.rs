//! Products of matrices by a warp, and the loads and stores that go with them.

use crate::counts::Kind;
use crate::ptx::{Instruction, Operand, Type};
use crate::run::matrix::Element;

use super::kernel::{Unknown, Writer};
use super::memory::parts;
use super::undefined::ADDRESS;

/// `m16n8k16`.
fn shape(i: &Instruction) -> Option<[u32; 3]> {
    i.modifiers.iter().find_map(|modifier| {
        let (m, rest) = modifier.strip_prefix('m')?.split_once('n')?;
        let (n, k) = rest.split_once('k')?;
        Some([m.parse().ok()?, n.parse().ok()?, k.parse().ok()?])
    })
}

fn elements(i: &Instruction) -> Vec<Element> {
    i.modifiers.iter().filter_map(|modifier| Element::from_name(modifier)).collect()
}

impl Writer<'_> {
    /// The bits of registers as an array of C, and how many.
    fn values(&self, operand: &Operand) -> Result<(String, usize), Unknown> {
        let names = parts(operand);
        let mut out = Vec::new();
        for name in names {
            out.push(format!("(uint32_t){}", self.raw(name)?.0));
        }
        if names.len() > 8 {
            return Err("more than eight registers".into());
        }
        Ok((format!("{{ {} }}", out.join(", ")), names.len()))
    }

    fn results(&self, operand: &Operand, from: &str) -> Result<String, Unknown> {
        let mut out = String::new();
        for (at, name) in parts(operand).iter().enumerate() {
            out += &self.put(name, Type::B32, &format!("{from}[{at}]"))?;
        }
        Ok(out)
    }

    fn product_of(&mut self, i: &Instruction, wmma: bool, kinds: [Element; 4]) -> Result<String, Unknown> {
        self.sync = true;
        let [m, n, k] = shape(i).ok_or("the shape is not known")?;
        let [d, a, b, c] = kinds;
        let integers = matches!(a, Element::S8 | Element::U8);
        let known = match (wmma, a) {
            (true, Element::F16 | Element::Bf16 | Element::S8 | Element::U8) => m * n == 256 && k == 16,
            (true, Element::Tf32) => m * n == 256 && k == 8,
            (false, Element::F16 | Element::Bf16) => (m, n) == (16, 8) && matches!(k, 8 | 16),
            (false, Element::Tf32) => (m, n) == (16, 8) && matches!(k, 4 | 8),
            (false, Element::S8 | Element::U8) => (m, n) == (16, 8) && matches!(k, 16 | 32),
            _ => false,
        };
        let result = if integers {
            c == Element::S32 && d == c
        } else {
            matches!((c, d), (Element::F16 | Element::F32, Element::F16 | Element::F32))
        };
        if !known || !result || i.operands.len() != 4 {
            return Err("the product is not known".into());
        }
        let kind = match a {
            Element::F16 => Kind::MatrixF16,
            Element::Bf16 => Kind::MatrixBf16,
            Element::Tf32 => Kind::MatrixTf32,
            _ => Kind::MatrixInt8,
        };
        self.count(kind, (2 * m * n * k / 32).into());
        let ((av, ac), (bv, bc), (cv, cc)) =
            (self.values(&i.operands[1])?, self.values(&i.operands[2])?, self.values(&i.operands[3])?);
        let dc = parts(&i.operands[0]).len();
        if !wmma {
            let registers = |bits: u32, rows: u32, columns: u32| (bits * rows * columns / 1024) as usize;
            let wanted = [
                registers(a.bits(), m, k),
                registers(b.bits(), k, n),
                registers(c.bits(), m, n),
                registers(d.bits(), m, n),
            ];
            if wanted != [ac, bc, cc, dc] {
                return Err(format!("the product takes {wanted:?} registers"));
            }
        }
        let form = [u32::from(wmma), m, n, k, d as u32, a as u32, b as u32, c as u32].map(|v| v.to_string()).join(", ");
        let results = self.results(&i.operands[0], "d")? + &self.put_flags_of(&i.operands[0], "t->flags[3]");
        let flags: String = match self.track {
            true => (0..3).map(|at| format!("t->flags[{at}] = {};", self.flags_of(&i.operands[at + 1]))).collect(),
            false => String::new(),
        };
        Ok(format!(
            "{{ static const uint32_t form[] = {{ {form} }}; uint32_t a[8] = {av}, b[8] = {bv}, c[8] = {cv}, d[8]; {flags} \
             if (!t->run->matrix(t, form, a, b, c, d, {})) goto done; {results} }}",
            i.line
        ))
    }

    pub(super) fn mma(&mut self, i: &Instruction) -> Result<String, Unknown> {
        let kinds = elements(i);
        let &[d, a, b, c] = kinds.as_slice() else { return Err("four types are expected".into()) };
        if i.has("sp")
            || i.has("satfinite")
            || !i.has("row")
            || !i.has("col")
            || i.modifiers.iter().any(|m| m.starts_with("kind"))
        {
            return Err("the form is not known".into());
        }
        self.product_of(i, false, [d, a, b, c])
    }

    pub(super) fn wmma(&mut self, i: &Instruction) -> Result<String, Unknown> {
        let kinds = elements(i);
        match i.modifiers.first().map(String::as_str) {
            Some("mma") => {
                let kinds = match *kinds.as_slice() {
                    [d, a, b, c] => [d, a, b, c],
                    // Of halves only the results are named.
                    [d, c] => [d, Element::F16, Element::F16, c],
                    _ => return Err("the types are not known".into()),
                };
                if i.has("satfinite") {
                    return Err("the form is not known".into());
                }
                self.product_of(i, true, kinds)
            }
            Some(direction @ ("load" | "store")) => {
                let [m, n, k] = shape(i).ok_or("the shape is not known")?;
                let (rows, columns) = match i.modifiers.get(1).map(String::as_str) {
                    Some("a") => (m, k),
                    Some("b") => (k, n),
                    _ => (m, n),
                };
                let element = *kinds.last().ok_or("the type is not known")?;
                let row = i.has("row");
                let load = direction == "load";
                let (at, values) = if load { (1, 0) } else { (0, 1) };
                let stride = match i.operands.get(2) {
                    Some(operand) => self.get(operand, Type::U32)?,
                    None => if row { columns } else { rows }.to_string(),
                };
                let what = if load { 0 } else { 1 };
                self.moved(i, [what, rows, columns, element as u32, u32::from(row)], at, values, &stride)
            }
            _ => Err("the form is not known".into()),
        }
    }

    /// `ldmatrix` and `stmatrix`.
    pub(super) fn move_matrix(&mut self, i: &Instruction) -> Result<String, Unknown> {
        self.sync = true;
        let load = i.name == "ldmatrix";
        if !i.has("m8n8") || !i.has("b16") {
            return Err("the form is not known".into());
        }
        let (at, values) = if load { (1, 0) } else { (0, 1) };
        let what = if load { 2 } else { 3 };
        let form = [what, 8, 8, Element::F16 as u32, u32::from(i.has("trans"))];
        self.moved(i, form, at, values, "0")
    }

    fn moved(
        &mut self,
        i: &Instruction,
        form: [u32; 5],
        at: usize,
        values: usize,
        stride: &str,
    ) -> Result<String, Unknown> {
        let checks = self.defined(i, self.operand(i, at)?, ADDRESS);
        let address = self.address(self.operand(i, at)?)?;
        let values = self.operand(i, values)?;
        let count = parts(values).len();
        if count > 8 {
            return Err("more than eight registers".into());
        }
        let [what, rows, columns, element, flag] = form;
        let (given, taken) = match what {
            0 | 2 => ("{ 0 }".to_owned(), self.results(values, "v")? + &self.put_flags_of(values, "t->flags[3]")),
            _ => (self.values(values)?.0, String::new()),
        };
        let flags = match what {
            1 | 3 if self.track => format!("t->flags[0] = {};", self.flags_of(values)),
            _ => String::new(),
        };
        let form = [what, rows, columns, element, flag, count as u32].map(|v| v.to_string()).join(", ");
        Ok(format!(
            "{{ static const uint32_t form[] = {{ {form} }}; uint32_t v[8] = {given}; {checks} {flags} \
             if (!t->run->move(t, form, {address}, {stride}, v, {})) goto done; {taken} }}",
            i.line
        ))
    }
}
