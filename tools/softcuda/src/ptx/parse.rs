//! Modules: directives, variables and the heads of functions.

use super::parse_body::Body;
use super::token::{Kind, Token, tokens};
use super::{Array, Error, Function, Module, Parameter, Space, Type};

pub(super) fn module(text: &str) -> Result<Module, Error> {
    Parser { tokens: tokens(text)?, at: 0, module: Module::default() }.module()
}

pub(super) struct Parser {
    tokens: Vec<Token>,
    at: usize,
    module: Module,
}

impl Parser {
    fn module(mut self) -> Result<Module, Error> {
        loop {
            let line = self.line();
            let word = match self.next() {
                Kind::End => return Ok(self.module),
                Kind::Word(word) => word,
                other => return Err(Error::new(line, format!("unexpected {other:?}"))),
            };
            match word.as_str() {
                ".version" => self.module.version = self.number()?,
                ".target" => {
                    self.module.target = self.word()?;
                    while self.take(',') {
                        self.word()?;
                    }
                }
                ".address_size" => {
                    self.number()?;
                }
                ".extern" | ".visible" | ".weak" | ".common" | ".internal" => {}
                ".file" => self.file()?,
                ".section" => self.section()?,
                ".pragma" => self.until(';'),
                ".entry" => self.function(true)?,
                ".func" => self.function(false)?,
                ".global" | ".const" | ".shared" => {
                    let array = self.array(space(&word).unwrap_or(Space::Global))?;
                    self.module.arrays.extend(array);
                }
                _ => return Err(Error::new(line, format!("unknown directive `{word}`"))),
            }
        }
    }

    fn function(&mut self, entry: bool) -> Result<(), Error> {
        if !entry && self.peek(0) == &Kind::Sign('(') {
            self.parameters()?;
        }
        let line = self.line();
        let name = self.word()?;
        let parameters = if self.peek(0) == &Kind::Sign('(') { self.parameters()? } else { Vec::new() };
        let (mut required_block, mut most_threads) = (None, None);
        loop {
            let line = self.line();
            match self.next() {
                Kind::Word(word) => match word.as_str() {
                    ".reqntid" => required_block = Some(self.triple()?),
                    ".maxntid" => most_threads = Some(self.triple()?.iter().product()),
                    ".minnctapersm" | ".maxnctapersm" | ".maxnreg" | ".maxclusterrank" => {
                        self.number()?;
                    }
                    ".reqnctapercluster" | ".explicitcluster" => {
                        return Err(Error::new(line, format!("clusters are not supported: `{word}`")));
                    }
                    ".noreturn" | ".blocksareclusters" => {}
                    _ => return Err(Error::new(line, format!("unknown directive `{word}`"))),
                },
                // A declaration.
                Kind::Sign(';') => return Ok(()),
                Kind::Sign('{') => break,
                other => return Err(Error::new(line, format!("unexpected {other:?}"))),
            }
        }
        let mut body = Body::default();
        self.body(&mut body)?;
        self.module.functions.push(Function {
            name,
            entry,
            parameters,
            registers: body.registers,
            arrays: body.arrays,
            body: body.statements,
            required_block,
            most_threads,
            line,
        });
        Ok(())
    }

    fn parameters(&mut self) -> Result<Vec<Parameter>, Error> {
        let mut out = Vec::new();
        self.expect('(')?;
        while !self.take(')') {
            let (mut ty, mut align, mut name) = (None, None, String::new());
            loop {
                match self.next() {
                    Kind::Word(word) => match word.as_str() {
                        ".param" | ".reg" | ".ptr" | ".global" | ".shared" | ".const" | ".local" => {}
                        ".align" => {
                            // The alignment of what a pointer points to, where the parameter has a type already.
                            let value = self.integer()? as u32;
                            if ty.is_none() {
                                align = Some(value);
                            }
                        }
                        _ => match word.strip_prefix('.') {
                            Some(known) => ty = Some(self.ty(known)?),
                            None => name = word,
                        },
                    },
                    other => return Err(Error::new(self.line(), format!("unexpected {other:?} in parameters"))),
                }
                if matches!(self.peek(0), Kind::Sign(',' | ')' | '[')) {
                    break;
                }
            }
            let ty = ty.ok_or_else(|| Error::new(self.line(), format!("the parameter `{name}` has no type")))?;
            let mut size = ty.bytes();
            if self.take('[') {
                size *= self.integer()? as u32;
                self.expect(']')?;
            }
            self.take(',');
            out.push(Parameter { name, size, align: align.unwrap_or(ty.bytes()) });
        }
        Ok(out)
    }

    /// Variables after their state space, up to the semicolon: `.align 4 .b8 name[16] = {1, 2};`.
    pub(super) fn array(&mut self, space: Space) -> Result<Vec<Array>, Error> {
        let (mut align, mut ty) = (None, None);
        while let Kind::Word(word) = self.peek(0) {
            let Some(directive) = word.strip_prefix('.') else { break };
            let directive = directive.to_owned();
            self.at += 1;
            match directive.as_str() {
                "align" => align = Some(self.integer()? as u32),
                "attribute" => self.until(')'),
                _ => ty = Some(self.ty(&directive)?),
            }
        }
        let ty = ty.ok_or_else(|| Error::new(self.line(), "a variable has no type"))?;
        let mut out = Vec::new();
        loop {
            let name = self.word()?;
            let mut count = 1;
            while self.take('[') {
                if self.take(']') {
                    count = 0;
                } else {
                    count *= self.integer()? as u32;
                    self.expect(']')?;
                }
            }
            let bytes = if self.take('=') { self.initial(ty)? } else { Vec::new() };
            let size = if count == 0 { bytes.len() as u32 } else { count * ty.bytes() };
            out.push(Array { space, align: align.unwrap_or(ty.bytes()), size, name, bytes });
            if !self.take(',') {
                break;
            }
        }
        self.expect(';')?;
        Ok(out)
    }

    fn initial(&mut self, ty: Type) -> Result<Vec<u8>, Error> {
        let mut out = Vec::new();
        let mut depth = 0;
        loop {
            match self.peek(0) {
                Kind::Sign('{') => {
                    depth += 1;
                    self.at += 1;
                }
                Kind::Sign('}') => {
                    depth -= 1;
                    self.at += 1;
                }
                Kind::Sign(',') if depth > 0 => self.at += 1,
                _ => out.extend_from_slice(&self.bits()?.to_le_bytes()[..ty.bytes() as usize]),
            }
            if depth == 0 {
                return Ok(out);
            }
        }
    }

    fn triple(&mut self) -> Result<[u32; 3], Error> {
        let mut out = [1; 3];
        for (i, value) in out.iter_mut().enumerate() {
            if i == 0 || self.take(',') {
                *value = self.integer()? as u32;
            }
        }
        Ok(out)
    }

    pub(super) fn file(&mut self) -> Result<(), Error> {
        let line = self.line();
        let number = self.integer()? as u32;
        if let Kind::Text(name) = self.next() {
            self.module.files.push((number, name));
        }
        self.rest_of(line);
        Ok(())
    }

    /// Debugging information.
    fn section(&mut self) -> Result<(), Error> {
        while self.peek(0) != &Kind::Sign('{') {
            if self.peek(0) == &Kind::End {
                return Err(Error::new(self.line(), "a section has no contents"));
            }
            self.at += 1;
        }
        let mut depth = 0;
        loop {
            match self.next() {
                Kind::Sign('{') => depth += 1,
                Kind::Sign('}') => depth -= 1,
                Kind::End => return Err(Error::new(self.line(), "a section has no end")),
                _ => {}
            }
            if depth == 0 {
                return Ok(());
            }
        }
    }

    // -- tokens --

    pub(super) fn line(&self) -> u32 {
        self.tokens[self.at].line
    }

    pub(super) fn peek(&self, ahead: usize) -> &Kind {
        &self.tokens[(self.at + ahead).min(self.tokens.len() - 1)].kind
    }

    pub(super) fn next(&mut self) -> Kind {
        let kind = self.tokens[self.at].kind.clone();
        self.at = (self.at + 1).min(self.tokens.len() - 1);
        kind
    }

    pub(super) fn take(&mut self, sign: char) -> bool {
        let found = self.peek(0) == &Kind::Sign(sign);
        if found {
            self.at += 1;
        }
        found
    }

    pub(super) fn expect(&mut self, sign: char) -> Result<(), Error> {
        if self.take(sign) {
            Ok(())
        } else {
            Err(Error::new(self.line(), format!("expected `{sign}`, found {:?}", self.peek(0))))
        }
    }

    pub(super) fn word(&mut self) -> Result<String, Error> {
        let line = self.line();
        match self.next() {
            Kind::Word(word) => Ok(word),
            other => Err(Error::new(line, format!("expected a name, found {other:?}"))),
        }
    }

    pub(super) fn number(&mut self) -> Result<String, Error> {
        let line = self.line();
        match self.next() {
            Kind::Number(number) => Ok(number),
            other => Err(Error::new(line, format!("expected a number, found {other:?}"))),
        }
    }

    pub(super) fn integer(&mut self) -> Result<u64, Error> {
        self.bits()
    }

    /// A number, as its bits.
    fn bits(&mut self) -> Result<u64, Error> {
        let negative = self.take('-');
        let line = self.line();
        let text = self.number()?;
        let value = number(&text).ok_or_else(|| Error::new(line, format!("`{text}` is not a number")))?;
        Ok(if negative { value.wrapping_neg() } else { value })
    }

    pub(super) fn ty(&self, name: &str) -> Result<Type, Error> {
        Type::from_name(name).ok_or_else(|| Error::new(self.line(), format!("unknown type `.{name}`")))
    }

    pub(super) fn until(&mut self, sign: char) {
        while self.peek(0) != &Kind::End && !self.take(sign) {
            self.at += 1;
        }
    }

    /// What ends with its line and not with a semicolon.
    pub(super) fn rest_of(&mut self, line: u32) {
        while self.line() == line && self.peek(0) != &Kind::End {
            self.at += 1;
        }
    }
}

pub(super) fn space(directive: &str) -> Option<Space> {
    Some(match directive {
        ".global" => Space::Global,
        ".const" => Space::Const,
        ".shared" => Space::Shared,
        ".local" => Space::Local,
        ".param" => Space::Param,
        _ => return None,
    })
}

/// The bits of a number: decimal, hexadecimal, octal, binary, `0f3f800000`, `0d3ff0000000000000`.
pub(super) fn number(text: &str) -> Option<u64> {
    let text = text.strip_suffix('U').unwrap_or(text);
    let parse = |digits: &str, radix| u64::from_str_radix(digits, radix).ok();
    match text.as_bytes() {
        [b'0', b'x' | b'X', ..] | [b'0', b'f' | b'F' | b'd' | b'D', _, ..] => parse(&text[2..], 16),
        [b'0', b'b' | b'B', ..] => parse(&text[2..], 2),
        [b'0', _, ..] => parse(&text[1..], 8),
        _ => parse(text, 10).or_else(|| text.parse::<f64>().ok().map(f64::to_bits)),
    }
}
