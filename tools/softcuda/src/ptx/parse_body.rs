//! Bodies of functions: declarations, labels and instructions.

use std::collections::{HashMap, HashSet};

use super::parse::{Parser, number, space};
use super::token::Kind;
use super::{Array, Error, Instruction, Operand, Register, Space, Statement, Type};

/// What has been read of a body.
#[derive(Default)]
pub(super) struct Body {
    pub(super) registers: Vec<Register>,
    pub(super) arrays: Vec<Array>,
    pub(super) statements: Vec<Statement>,
    /// Names of the scopes that are open, innermost last, with their names in the function: a scope may declare a name again.
    scopes: Vec<HashMap<String, String>>,
    scope_count: usize,
    names: HashSet<String>,
    source: Option<(u32, u32)>,
}

impl Body {
    fn declare(&mut self, name: &str) -> String {
        let plain = name.trim_start_matches('%').replace(['$', '.', '%'], "_");
        let unique = if self.scopes.len() > 1 { format!("{plain}__{}", self.scope_count) } else { plain };
        if let Some(scope) = self.scopes.last_mut() {
            scope.insert(name.to_owned(), unique.clone());
        }
        unique
    }

    fn register(&mut self, name: &str, ty: Type) {
        let name = self.declare(name);
        self.names.insert(name.clone());
        self.registers.push(Register { name, ty });
    }

    fn find(&self, name: &str) -> Option<&String> {
        self.scopes.iter().rev().find_map(|scope| scope.get(name))
    }

    fn is_register(&self, name: &str) -> bool {
        self.names.contains(name)
    }
}

impl Parser {
    /// A body after its opening brace, with the closing one.
    pub(super) fn body(&mut self, body: &mut Body) -> Result<(), Error> {
        body.scopes.push(HashMap::new());
        while !body.scopes.is_empty() {
            let line = self.line();
            match self.next() {
                Kind::Sign('{') => {
                    body.scope_count += 1;
                    body.scopes.push(HashMap::new());
                }
                Kind::Sign('}') => {
                    body.scopes.pop();
                }
                Kind::Sign(';') => {}
                Kind::Sign('@') => {
                    let negated = self.take('!');
                    let name = self.word()?;
                    let Some(register) = body.find(&name).cloned() else {
                        return Err(Error::new(line, format!("unknown predicate `{name}`")));
                    };
                    let opcode = self.word()?;
                    self.instruction(body, opcode, line, Some((register, negated)))?;
                }
                Kind::Word(word) if word.starts_with('.') => self.declaration(body, &word, line)?,
                Kind::Word(word) if self.take(':') => body.statements.push(Statement::Label(word)),
                Kind::Word(word) => self.instruction(body, word, line, None)?,
                other => return Err(Error::new(line, format!("unexpected {other:?}"))),
            }
        }
        Ok(())
    }

    fn declaration(&mut self, body: &mut Body, word: &str, line: u32) -> Result<(), Error> {
        match word {
            ".reg" => self.registers(body),
            ".local" | ".shared" | ".param" | ".global" | ".const" => {
                let mut arrays = self.array(space(word).unwrap_or(Space::Local))?;
                for array in &mut arrays {
                    array.name = body.declare(&array.name);
                }
                body.arrays.append(&mut arrays);
                Ok(())
            }
            ".loc" => {
                let (file, number) = (self.integer()? as u32, self.integer()? as u32);
                body.source = Some((file, number));
                self.rest_of(line);
                Ok(())
            }
            ".file" => self.file(),
            ".pragma" => {
                self.until(';');
                Ok(())
            }
            _ => Err(Error::new(line, format!("unknown directive `{word}`"))),
        }
    }

    fn registers(&mut self, body: &mut Body) -> Result<(), Error> {
        let line = self.line();
        let ty = self.word()?;
        let ty = self.ty(ty.trim_start_matches('.')).map_err(|_| Error::new(line, format!("unknown type `{ty}`")))?;
        loop {
            let name = self.word()?;
            if self.take('<') {
                let count = self.integer()?;
                self.expect('>')?;
                for i in 0..count {
                    body.register(&format!("{name}{i}"), ty);
                }
            } else {
                body.register(&name, ty);
            }
            if !self.take(',') {
                break;
            }
        }
        self.expect(';')
    }

    fn instruction(
        &mut self,
        body: &mut Body,
        opcode: String,
        line: u32,
        guard: Option<(String, bool)>,
    ) -> Result<(), Error> {
        let mut parts = opcode.split('.').map(str::to_owned);
        let name = parts.next().unwrap_or_default();
        let mut operands = Vec::new();
        if !self.take(';') {
            loop {
                operands.push(self.operand(body)?);
                if self.take(';') {
                    break;
                }
                self.expect(',')?;
            }
        }
        body.statements.push(Statement::Instruction(Instruction {
            guard,
            name,
            modifiers: parts.collect(),
            operands,
            line,
            source: body.source,
        }));
        Ok(())
    }

    fn operand(&mut self, body: &Body) -> Result<Operand, Error> {
        let first = self.single(body)?;
        Ok(if self.take('|') { Operand::Pair(Box::new(first), Box::new(self.single(body)?)) } else { first })
    }

    fn single(&mut self, body: &Body) -> Result<Operand, Error> {
        let line = self.line();
        let negative = self.take('-');
        Ok(match self.next() {
            Kind::Sign('!') => Operand::Not(Box::new(self.single(body)?)),
            Kind::Sign(open @ ('{' | '(')) => {
                let close = if open == '{' { '}' } else { ')' };
                let mut parts = Vec::new();
                while !self.take(close) {
                    parts.push(self.operand(body)?);
                    self.take(',');
                }
                Operand::Vector(parts)
            }
            Kind::Sign('[') => {
                let base = self.single(body)?;
                let mut offset = 0;
                // `integer` reads a sign of its own.
                while self.take('+') || self.peek(0) == &Kind::Sign('-') {
                    offset += self.integer()? as i64;
                }
                // What follows a comma are the coordinates of a tensor: kept, so that the instruction is refused by its name.
                if self.take(',') {
                    let more = self.single(body)?;
                    self.expect(']')?;
                    return Ok(Operand::Vector(vec![Operand::Address(Box::new(base), offset), more]));
                }
                self.expect(']')?;
                Operand::Address(Box::new(base), offset)
            }
            Kind::Number(text) => {
                let value = number(&text).ok_or_else(|| Error::new(line, format!("`{text}` is not a number")))?;
                match text.get(..2) {
                    Some("0f" | "0F") if text.len() > 2 => Operand::F32(value as u32),
                    Some("0d" | "0D") if text.len() > 2 => Operand::F64(value),
                    _ if text.contains('.') => Operand::F64(value),
                    _ if negative => Operand::Integer(value.wrapping_neg()),
                    _ => Operand::Integer(value),
                }
            }
            Kind::Word(word) if word == "_" => Operand::Sink,
            Kind::Word(word) => match body.find(&word) {
                Some(name) if body.is_register(name) => Operand::Register(name.clone()),
                Some(name) => Operand::Symbol(name.clone()),
                None => match word.strip_prefix('%') {
                    Some(special) => Operand::Special(special.to_owned()),
                    None => Operand::Symbol(word),
                },
            },
            other => return Err(Error::new(line, format!("unexpected {other:?} in an operand"))),
        })
    }
}
