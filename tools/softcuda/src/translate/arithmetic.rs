//! Arithmetic and functions of one number.

use crate::counts::Kind;
use crate::ptx::{Instruction, Operand, Type};

use super::kernel::{Unknown, Writer};

/// The rounding mode, where it is not to the nearest.
fn direction(i: &Instruction) -> Option<&'static str> {
    i.modifiers.iter().find_map(|m| match m.as_str() {
        "rz" => Some("PTX_RZ"),
        "rm" => Some("PTX_RM"),
        "rp" => Some("PTX_RP"),
        _ => None,
    })
}

/// The type that a value of `ty`, or of its halves, is computed in.
fn number(ty: Type) -> Type {
    ty.half().unwrap_or(ty)
}

impl Writer<'_> {
    pub(super) fn count_flops(&mut self, ty: Type, amount: u64) {
        let amount = amount * if ty.half().is_some() { 2 } else { 1 };
        match number(ty) {
            Type::F16 | Type::Bf16 => self.count(Kind::F16, amount),
            Type::F64 => self.count(Kind::F64, amount),
            Type::F32 => self.count(Kind::F32, amount),
            _ => {}
        }
    }

    /// The result of `how` of the operands after the first, for a number or for each of a pair.
    pub(super) fn map(&self, i: &Instruction, ty: Type, how: impl Fn(&[String]) -> String) -> Result<String, Unknown> {
        let ftz = i.has("ftz") && number(ty) == Type::F32;
        let flushed = |value: String| if ftz { format!("ptx_ftz({value})") } else { value };
        let to = self.operand(i, 0)?;
        let Some(half) = ty.half() else {
            let mut values = Vec::new();
            for operand in &i.operands[1..] {
                values.push(flushed(self.get(operand, ty)?));
            }
            return self.put(to, ty, &flushed(how(&values)));
        };
        let wide = half.bits();
        let mut results = Vec::new();
        for shift in [0, wide] {
            let mut values = Vec::new();
            for operand in &i.operands[1..] {
                let (bits, _) = self.raw(operand)?;
                let part = format!("({})((uint64_t){bits} >> {shift})", Type::untyped(wide).c());
                values.push(flushed(format!("ptx_{}({part})", half.name())));
            }
            let value = flushed(how(&values));
            results.push(if half == Type::F32 {
                format!("ptx_bits32({value})")
            } else {
                format!("ptx_to_{}({value})", half.name())
            });
        }
        self.put(to, Type::untyped(ty.bits()), &format!("{} | (uint64_t){} << {wide}", results[0], results[1]))
    }

    pub(super) fn arithmetic(&mut self, i: &Instruction) -> Result<String, Unknown> {
        let ty = self.ty(i)?;
        if i.name == "dp4a" {
            let types = i.types();
            let args: Result<Vec<_>, _> = (1..4).map(|at| self.get(self.operand(i, at)?, Type::U32)).collect();
            let signs = types.iter().map(|ty| u8::from(ty.is_signed()).to_string()).collect::<Vec<_>>().join(", ");
            return self.put(self.operand(i, 0)?, Type::B32, &format!("ptx_dp4a({}, {signs})", args?.join(", ")));
        }
        if !ty.is_float() && ty.half().is_none() {
            return self.integer(i, ty);
        }
        match i.name.as_str() {
            "neg" | "abs" => {
                let sign: u64 = match ty {
                    Type::F64 => 1 << 63,
                    Type::F32 => 1 << 31,
                    Type::F16x2 | Type::Bf16x2 => 0x8000_8000,
                    Type::F32x2 => 0x8000_0000_8000_0000,
                    _ => 0x8000,
                };
                let (bits, _) = self.raw(self.operand(i, 1)?)?;
                let change = if i.name == "neg" { format!("^ {sign:#x}ull") } else { format!("& ~{sign:#x}ull") };
                return self.put(self.operand(i, 0)?, Type::untyped(ty.bits()), &format!("(uint64_t){bits} {change}"));
            }
            "min" | "max" => {
                let nan = if i.has("NaN") { "_nan" } else { "" };
                let function = format!("ptx_{}{nan}", i.name);
                if i.has("xorsign") || i.has("abs") {
                    return Err("the form is not known".into());
                }
                return self.map(i, ty, |v| {
                    v[1..].iter().fold(v[0].clone(), |most, value| format!("{function}({most}, {value})"))
                });
            }
            _ => {}
        }
        let name = if i.name == "mad" { "fma" } else { i.name.as_str() };
        self.count_flops(ty, if name == "fma" { 2 } else { 1 });
        let base = number(ty);
        let mode = direction(i).filter(|_| !i.has("approx") && !i.has("full"));
        let (saturate, relu) = (i.has("sat"), i.has("relu"));
        let directed = matches!(base, Type::F32 | Type::F64).then_some(mode).flatten();
        let fused = match base {
            Type::F32 => "fmaf",
            Type::F64 => "fma",
            _ => "ptx_fma16",
        };
        let sign = match name {
            "add" => "+",
            "sub" => "-",
            "mul" => "*",
            "div" => "/",
            "fma" => "",
            _ => return Err("the instruction is not known for this type".into()),
        };
        self.map(i, ty, |v| {
            let value = match directed {
                Some(mode) => {
                    format!("ptx_{name}_{}({mode}, {}, {}, {})", base.name(), v[0], v[1], v.get(2).map_or("0", |v| v))
                }
                None if name == "fma" => format!("{fused}({}, {}, {})", v[0], v[1], v[2]),
                None => format!("({} {sign} {})", v[0], v[1]),
            };
            let value = if saturate { format!("ptx_sat({value})") } else { value };
            if relu { format!("ptx_relu({value})") } else { value }
        })
    }

    /// The product of two integers: its type and value.
    fn product(&self, i: &Instruction, ty: Type) -> Result<(Type, String), Unknown> {
        let (a, b) = (self.get(self.operand(i, 1)?, ty)?, self.get(self.operand(i, 2)?, ty)?);
        let signed = ty.is_signed();
        if i.has("wide") {
            let wide = match (ty.bits(), signed) {
                (16, true) => Type::S32,
                (16, false) => Type::U32,
                (32, true) => Type::S64,
                (32, false) => Type::U64,
                _ => return Err("the product is too wide".into()),
            };
            return Ok((wide, format!("(({0})({a}) * ({0})({b}))", wide.c())));
        }
        if i.has("hi") {
            let big = if signed { "__int128" } else { "unsigned __int128" };
            return Ok((ty, format!("({})((({big})({a}) * ({big})({b})) >> {})", ty.c(), ty.bits())));
        }
        Ok((ty, wrapped(ty, &a, "*", &b)))
    }

    fn integer(&self, i: &Instruction, ty: Type) -> Result<String, Unknown> {
        let to = self.operand(i, 0)?;
        let get = |at| self.get(self.operand(i, at)?, ty);
        let name = i.name.as_str();
        let plain = ty.unsigned().c();
        let value = match name {
            "add" | "sub" if matches!(ty, Type::U16 | Type::S16 | Type::U32 | Type::S32 | Type::U64 | Type::S64) => {
                let sign = if name == "add" { "+" } else { "-" };
                if i.has("sat") {
                    format!("ptx_clamp_{}((__int128)({}) {sign} ({}))", ty.name(), get(1)?, get(2)?)
                } else if i.has("cc") {
                    return Err("carries are not known".into());
                } else {
                    wrapped(ty, &get(1)?, sign, &get(2)?)
                }
            }
            "mul" => {
                let (ty, value) = self.product(i, ty)?;
                return self.put(to, ty, &value);
            }
            "mad" if !i.has("cc") && !i.has("sat") => {
                let (ty, value) = self.product(i, ty)?;
                let third = self.get(self.operand(i, 3)?, ty)?;
                return self.put(to, ty, &wrapped(ty, &value, "+", &third));
            }
            "mul24" | "mad24" if i.has("lo") => {
                let field = |v: String| format!("(({})({v} << 8) >> 8)", ty.c());
                let product = wrapped(ty, &field(get(1)?), "*", &field(get(2)?));
                if name == "mul24" { product } else { wrapped(ty, &product, "+", &get(3)?) }
            }
            "div" | "rem" => format!("ptx_{name}_{}({}, {})", ty.name(), get(1)?, get(2)?),
            "neg" => format!("0 - ({plain}){}", self.raw(self.operand(i, 1)?)?.0),
            "abs" => {
                let a = get(1)?;
                format!("(({a}) < 0 ? 0 - ({plain}){a} : ({plain}){a})")
            }
            "min" | "max" if !i.has("relu") => {
                let sign = if name == "min" { "<" } else { ">" };
                let (a, b) = (get(1)?, get(2)?);
                format!("(({a}) {sign} ({b}) ? ({a}) : ({b}))")
            }
            "sad" => {
                let (a, b) = (get(1)?, get(2)?);
                wrapped(
                    ty,
                    &get(3)?,
                    "+",
                    &format!("(({a}) < ({b}) ? ({plain}){b} - ({plain}){a} : ({plain}){a} - ({plain}){b})"),
                )
            }
            _ => return Err("the instruction is not known for this type".into()),
        };
        self.put(to, ty, &value)
    }

    /// `rcp`, `sqrt`, `ex2` and others; approximations are computed to full precision.
    pub(super) fn special_function(&mut self, i: &Instruction) -> Result<String, Unknown> {
        let ty = self.ty(i)?;
        let double = ty == Type::F64;
        let suffix = if double { "" } else { "f" };
        match i.name.as_str() {
            "copysign" => {
                let (a, b) = (self.get(self.operand(i, 1)?, ty)?, self.get(self.operand(i, 2)?, ty)?);
                return self.put(self.operand(i, 0)?, ty, &format!("copysign({b}, {a})"));
            }
            "testp" => {
                let test = match i.modifiers.first().map(String::as_str) {
                    Some("finite") => "isfinite",
                    Some("infinite") => "isinf",
                    Some("number") => "!isnan",
                    Some("notanumber") => "isnan",
                    Some("normal") => "isnormal",
                    _ => return Err("the test is not known".into()),
                };
                let value = self.get(self.operand(i, 1)?, ty)?;
                return self.put(self.operand(i, 0)?, Type::Pred, &format!("({test}({value}) != 0)"));
            }
            _ => {}
        }
        self.count(Kind::Special, if ty.half().is_some() { 2 } else { 1 });
        let mode = direction(i).filter(|_| !i.has("approx") && !matches!(number(ty), Type::F16 | Type::Bf16));
        let name = ty.name();
        self.map(i, ty, |v| {
            let v = &v[0];
            match (i.name.as_str(), mode) {
                ("rcp", Some(mode)) => format!("ptx_div_{name}({mode}, 1, {v}, 0)"),
                ("rcp", None) => format!("(1 / {v})"),
                ("sqrt", Some(mode)) => format!("ptx_sqrt_{name}({mode}, {v}, 0, 0)"),
                ("sqrt", None) => format!("sqrt{suffix}({v})"),
                ("rsqrt", _) => format!("(1 / sqrt{suffix}({v}))"),
                ("ex2", _) => format!("exp2{suffix}({v})"),
                ("lg2", _) => format!("log2{suffix}({v})"),
                ("sin", _) => format!("sin{suffix}({v})"),
                ("cos", _) => format!("cos{suffix}({v})"),
                _ => format!("tanh{suffix}({v})"),
            }
        })
    }

    /// Whether a comparison holds.
    pub(super) fn compare(&self, a: &Operand, b: &Operand, ty: Type, test: &str, ftz: bool) -> Result<String, Unknown> {
        if ty.is_float() {
            let get = |operand| {
                let value = self.get(operand, ty)?;
                Ok::<_, Unknown>(if ftz && ty == Type::F32 { format!("ptx_ftz({value})") } else { value })
            };
            let (x, y) = (get(a)?, get(b)?);
            let (test, unordered) = match test {
                "num" => return Ok(format!("(!isnan({x}) && !isnan({y}))")),
                "nan" => return Ok(format!("(isnan({x}) || isnan({y}))")),
                "equ" | "neu" | "ltu" | "leu" | "gtu" | "geu" => (&test[..2], true),
                _ => (test, false),
            };
            let sign = sign(test).ok_or("the comparison is not known")?;
            return Ok(match unordered {
                true => format!("(isnan({x}) || isnan({y}) || {x} {sign} {y})"),
                false => format!("(!isnan({x}) && !isnan({y}) && {x} {sign} {y})"),
            });
        }
        if ty.half().is_some() {
            return Err("comparisons of pairs are not known".into());
        }
        let (test, ty) = match test {
            "lo" => ("lt", ty.unsigned()),
            "ls" => ("le", ty.unsigned()),
            "hi" => ("gt", ty.unsigned()),
            "hs" => ("ge", ty.unsigned()),
            _ => (test, ty),
        };
        let sign = sign(test).ok_or("the comparison is not known")?;
        Ok(format!("({} {sign} {})", self.get(a, ty)?, self.get(b, ty)?))
    }
}

fn sign(test: &str) -> Option<&'static str> {
    Some(match test {
        "eq" => "==",
        "ne" => "!=",
        "lt" => "<",
        "le" => "<=",
        "gt" => ">",
        "ge" => ">=",
        _ => return None,
    })
}

/// Integers that wrap around.
pub(super) fn wrapped(ty: Type, a: &str, sign: &str, b: &str) -> String {
    // Narrow integers would be promoted to signed ones.
    let plain = if ty.bits() == 64 { "uint64_t" } else { "uint32_t" };
    format!("({})(({plain})({a}) {sign} ({plain})({b}))", ty.c())
}
