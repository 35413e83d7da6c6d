//! One kernel as a function of C.

use std::collections::{HashMap, HashSet};
use std::fmt::Write;

use crate::counts::{KINDS, Kind};
use crate::ptx::{Array, Function, Instruction, Module, Space, Statement, Type};

use super::{Options, undefined, unset};

/// What a launch needs to know of a kernel.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Its name.
    pub name: String,
    /// Offset and size of each parameter in the area of parameters.
    pub parameters: Vec<(u32, u32)>,
    /// Shared memory that it declares with a size; what the launch gives follows it.
    pub shared: u32,
    /// The block that it demands.
    pub required_block: Option<[u32; 3]>,
    /// The most threads of a block that it allows.
    pub most_threads: Option<u32>,
    /// Registers that are read and never written before: line and name.
    pub unset: Vec<(u32, String)>,
    /// Instructions that are not known: line and text.
    pub unknown: Vec<(u32, String)>,
}

/// The name of the kernel's entry in the compiled library.
pub(crate) fn symbol(name: &str) -> String {
    format!("entry_{}", name.replace('$', "_"))
}

/// Why an instruction cannot be translated.
pub(super) type Unknown = String;

/// Where a variable is for the kernel that is written.
#[derive(Clone, Copy)]
pub(super) enum Place {
    /// Offset in the area of parameters, and size.
    Param(u32, u32),
    /// Offset in shared memory.
    Shared(u32),
    /// Shared memory whose size the launch gives.
    Dynamic,
    /// Offset in the local memory of the thread.
    Local(u32),
    /// Number of a variable of the module.
    Global(usize),
}

pub(super) struct Writer<'a> {
    pub(super) registers: HashMap<&'a str, Type>,
    pub(super) places: HashMap<&'a str, Place>,
    /// Whether threads of a block wait for each other.
    pub(super) sync: bool,
    pub(super) seen: HashSet<String>,
    /// Whether values that are not defined are followed.
    pub(super) track: bool,
    /// Registers that may have such a value.
    pub(super) doubtful: HashSet<&'a str>,
    counts: [u64; KINDS],
    counted: [bool; KINDS],
    body: String,
    unknown: Vec<(u32, String)>,
}

pub(super) fn write(
    module: &Module,
    function: &Function,
    globals: &[Array],
    options: Options,
    source: &mut String,
) -> Kernel {
    let mut writer = Writer {
        registers: function.registers.iter().map(|register| (register.name.as_str(), register.ty)).collect(),
        places: HashMap::new(),
        sync: false,
        seen: HashSet::new(),
        track: options.uninitialized,
        doubtful: if options.uninitialized { undefined::doubtful(function) } else { HashSet::new() },
        counts: [0; KINDS],
        counted: [false; KINDS],
        body: String::new(),
        unknown: Vec::new(),
    };
    for (i, array) in globals.iter().enumerate() {
        if let Some((name, _)) = named(module, function, &array.name) {
            writer.places.insert(name, Place::Global(i));
        }
    }
    let mut parameters = Vec::new();
    let mut end = 0;
    for parameter in &function.parameters {
        let at = aligned(end, parameter.align);
        end = at + parameter.size;
        parameters.push((at, parameter.size));
        writer.places.insert(&parameter.name, Place::Param(at, parameter.size));
    }
    let (mut shared, mut local) = (0, 0);
    for array in module.arrays.iter().chain(&function.arrays) {
        match array.space {
            Space::Shared if array.size == 0 => {
                writer.places.insert(&array.name, Place::Dynamic);
            }
            Space::Shared => {
                let at = aligned(shared, array.align);
                shared = at + array.size;
                writer.places.insert(&array.name, Place::Shared(at));
            }
            Space::Local => {
                let at = aligned(local, array.align);
                local = at + array.size;
                writer.places.insert(&array.name, Place::Local(at));
            }
            _ => {}
        }
    }
    for statement in &function.body {
        match statement {
            Statement::Label(name) => {
                writer.flush();
                let _ = writeln!(writer.body, "{}:;", label(name));
                writer.seen.insert(label(name));
            }
            Statement::Instruction(instruction) => writer.instruction(instruction),
        }
    }
    writer.flush();
    writer.finish(function, local, source);
    Kernel {
        name: function.name.clone(),
        parameters,
        shared: aligned(shared, 16),
        required_block: function.required_block,
        most_threads: function.most_threads,
        unset: unset::find(function),
        unknown: writer.unknown,
    }
}

fn named<'a>(module: &'a Module, function: &'a Function, name: &str) -> Option<(&'a str, u32)> {
    module
        .arrays
        .iter()
        .chain(&function.arrays)
        .find(|array| array.name == name)
        .map(|array| (array.name.as_str(), array.size))
}

pub(super) fn aligned(at: u32, align: u32) -> u32 {
    at.next_multiple_of(align.max(1))
}

pub(super) fn label(name: &str) -> String {
    format!("L_{}", name.replace(['$', '.', '%'], "_"))
}

impl Writer<'_> {
    pub(super) fn count(&mut self, kind: Kind, amount: u64) {
        self.counts[kind as usize] += amount;
    }

    /// Writes what the instructions since the last place of a branch count.
    fn flush(&mut self) {
        for kind in 0..KINDS {
            if self.counts[kind] > 0 {
                let _ = write!(self.body, "    n{kind} += {};", self.counts[kind]);
                self.counted[kind] = true;
                self.counts[kind] = 0;
            }
        }
        self.body.push('\n');
    }

    fn instruction(&mut self, instruction: &Instruction) {
        let leaves = matches!(instruction.name.as_str(), "bra" | "ret" | "exit" | "brx" | "trap");
        self.count(Kind::Instructions, 1);
        // A guarded instruction counts where it is carried out.
        if leaves || instruction.guard.is_some() {
            self.flush();
        }
        let code = match self.translate(instruction) {
            Ok(code) => self.followed(instruction, code),
            Err(why) => {
                let what = format!("`{}`: {why}", instruction.opcode());
                let text = what.replace(['\\', '"'], "'");
                self.unknown.push((instruction.line, what));
                format!("t->run->unknown(t, \"{text}\", {}); goto done;", instruction.line)
            }
        };
        match &instruction.guard {
            None => {
                let _ = writeln!(self.body, "    {code}");
            }
            Some((register, negated)) => {
                let not = if *negated { "!" } else { "" };
                if self.doubtful.contains(register.as_str()) {
                    let _ = writeln!(self.body, "    PTX_DERIVED(U_{register}, 0, {})", instruction.line);
                }
                let _ = write!(self.body, "    if ({not}R_{register}) {{ {code}");
                self.flush();
                let _ = writeln!(self.body, "    }}");
            }
        }
    }

    fn finish(&self, function: &Function, local: u32, source: &mut String) {
        let _ = writeln!(source, "static void body_{}(Thread *t) {{", symbol(&function.name));
        let mut by_type: HashMap<u32, Vec<&str>> = HashMap::new();
        for register in &function.registers {
            by_type.entry(register.ty.bits()).or_default().push(&register.name);
        }
        let mut by_type: Vec<_> = by_type.into_iter().collect();
        by_type.sort();
        for (bits, names) in by_type {
            // What was not written has no value; a program must not depend on it being zero.
            let poison = match bits {
                8 => "1",
                16 => "0xcdcd",
                32 => "0xcdcdcdcdu",
                _ => "0xcdcdcdcdcdcdcdcdull",
            };
            for some in names.chunks(32) {
                let list: Vec<String> = some.iter().map(|name| format!("R_{name} = {poison}")).collect();
                let _ = writeln!(source, "    {} {};", Type::untyped(bits).c(), list.join(", "));
                for name in some.iter().filter(|name| self.doubtful.contains(*name)) {
                    let _ = writeln!(source, "    uint8_t U_{name} = {};", (1 << (bits / 8)) - 1);
                }
            }
        }
        for kind in (0..KINDS).filter(|&kind| self.counted[kind]) {
            let _ = writeln!(source, "    uint64_t n{kind} = 0;");
        }
        let _ = writeln!(source, "    uint32_t spins = 0; (void)spins;");
        // Of one byte where there is none, for what asks for its address.
        let _ = writeln!(source, "    _Alignas(16) uint8_t locals[{}]; (void)locals;", local.max(1));
        let _ = writeln!(source, "    uint8_t locals_state[{}]; (void)locals_state;", local.max(1));
        if local > 0 {
            let _ = writeln!(source, "    memset(locals_state, 0, sizeof locals);");
            let _ = writeln!(source, "    memset(locals, 0xcd, sizeof locals);");
        }
        source.push_str(&self.body);
        let _ = writeln!(source, "done:;");
        for kind in (0..KINDS).filter(|&kind| self.counted[kind]) {
            let _ = writeln!(source, "    t->counts[{kind}] += n{kind};");
        }
        let _ = writeln!(source, "}}");
        let name = symbol(&function.name);
        let _ = writeln!(source, "const Entry {name} = {{ body_{name}, {} }};", u8::from(self.sync));
    }

    fn translate(&mut self, i: &Instruction) -> Result<String, Unknown> {
        match i.name.as_str() {
            "mov" => self.mov(i),
            "ld" | "ldu" => self.load(i),
            "st" => self.store(i),
            "atom" => self.atomic(i, true),
            "red" => self.atomic(i, false),
            "cvta" => self.cvta(i),
            "isspacep" => self.isspacep(i),
            "cp" => self.copy(i),
            "prefetch" | "prefetchu" => Ok(";".into()),
            "add" | "sub" | "mul" | "mad" | "fma" | "div" | "rem" | "neg" | "abs" | "min" | "max" | "mul24"
            | "mad24" | "sad" | "dp4a" => self.arithmetic(i),
            "rcp" | "sqrt" | "rsqrt" | "ex2" | "lg2" | "sin" | "cos" | "tanh" | "copysign" | "testp" => {
                self.special_function(i)
            }
            "and" | "or" | "xor" | "not" | "cnot" | "lop3" | "shl" | "shr" | "shf" | "bfe" | "bfi" | "prmt"
            | "popc" | "clz" | "brev" | "bfind" => self.bits(i),
            "setp" => self.setp(i),
            "set" => self.set(i),
            "selp" => self.selp(i),
            "slct" => self.slct(i),
            "cvt" => self.cvt(i),
            "bra" => self.bra(i),
            "ret" | "exit" => Ok("goto done;".into()),
            "trap" => Ok(format!(
                "t->run->unknown(t, \"`trap`, which the program executes on an error of its own\", {}); goto done;",
                i.line
            )),
            "bar" | "barrier" => self.barrier(i),
            "membar" | "fence" => self.fence(i),
            "shfl" => self.shuffle(i),
            "vote" => self.vote(i),
            "activemask" => self.activemask(i),
            "match" => self.matching(i),
            "redux" => self.redux(i),
            "elect" => self.elect(i),
            "nanosleep" => Ok(format!("if (!t->run->tick(t, {})) goto done;", i.line)),
            "wmma" => self.wmma(i),
            "mma" => self.mma(i),
            "ldmatrix" | "stmatrix" => self.move_matrix(i),
            _ => Err("the instruction is not known".into()),
        }
    }
}
