//! PTX as LLVM and NVRTC write it.

use cuda::ptx::{Module, Operand, Space, Statement, Type};

fn module(body: &str) -> Module {
    Module::parse(&format!(".version 8.5\n.target sm_90a, debug\n.address_size 64\n{body}")).unwrap()
}

fn instructions(module: &Module) -> Vec<&cuda::ptx::Instruction> {
    let body = &module.functions[0].body;
    body.iter()
        .filter_map(|statement| match statement {
            Statement::Instruction(instruction) => Some(instruction),
            Statement::Label(_) => None,
        })
        .collect()
}

fn register(name: &str) -> Operand {
    Operand::Register(name.into())
}

#[test]
fn variables_have_sizes_and_values() {
    let module = module(
        ".global .align 4 .u32 table[3] = {1, 0x10, -1};\n.const .f32 one = 0f3f800000;\n.extern .shared .align 16 .b8 s[];\n\
         .visible .shared .align 8 .b64 fixed[2][4];",
    );
    let sizes: Vec<(Space, u32, u32)> =
        module.arrays.iter().map(|array| (array.space, array.size, array.align)).collect();
    assert_eq!(sizes, [(Space::Global, 12, 4), (Space::Const, 4, 4), (Space::Shared, 0, 16), (Space::Shared, 64, 8)]);
    assert_eq!(module.arrays[0].bytes, [1, 0, 0, 0, 16, 0, 0, 0, 255, 255, 255, 255]);
    assert_eq!(module.arrays[1].bytes, 1.0_f32.to_le_bytes());
    assert_eq!((module.version.as_str(), module.target.as_str()), ("8.5", "sm_90a"));
}

#[test]
fn parameters_have_sizes_and_alignments() {
    let module = module(
        ".visible .entry k(\n.param .u64 .ptr .global .align 1 a, // an address\n.param .align 8 .b8 b[40],\n.param .f32 c\n)\n\
         .maxntid 256, 1, 1\n.minnctapersm 2\n{\nret;\n}",
    );
    let kernel = &module.functions[0];
    let parameters: Vec<(&str, u32, u32)> =
        kernel.parameters.iter().map(|p| (p.name.as_str(), p.size, p.align)).collect();
    assert_eq!(parameters, [("a", 8, 8), ("b", 40, 8), ("c", 4, 4)]);
    assert_eq!((kernel.most_threads, kernel.required_block), (Some(256), None));
}

#[test]
fn operands_are_read_by_their_form() {
    let module = module(
        ".entry k() {\n.reg .pred %p<2>;\n.reg .b32 %r<9>;\n.reg .b64 %rd<2>;\n\
         @!%p1 ld.global.L1::no_allocate.v4.b32 {%r1, %r2, _, %r4}, [%rd1+-16];\n\
         setp.lt.and.s32 %p0|%p1, %r1, -5, !%p1;\nmov.b32 %r3, 0f3F800000;\nmov.u32 %r5, %tid.x;\n}",
    );
    let all = instructions(&module);
    let load = all[0];
    assert_eq!(load.guard, Some(("p1".into(), true)));
    assert_eq!(load.opcode(), "ld.global.L1::no_allocate.v4.b32");
    assert_eq!(load.types(), [Type::B32]);
    assert_eq!(load.operands[0], Operand::Vector(vec![register("r1"), register("r2"), Operand::Sink, register("r4")]));
    assert_eq!(load.operands[1], Operand::Address(Box::new(register("rd1")), -16));
    let compare = all[1];
    assert_eq!(compare.operands[0], Operand::Pair(Box::new(register("p0")), Box::new(register("p1"))));
    assert_eq!(compare.operands[2], Operand::Integer(5_u64.wrapping_neg()));
    assert_eq!(compare.operands[3], Operand::Not(Box::new(register("p1"))));
    assert_eq!(all[2].operands[1], Operand::F32(0x3f80_0000));
    assert_eq!(all[3].operands[1], Operand::Special("tid.x".into()));
}

#[test]
fn names_of_an_inner_scope_hide_those_outside() {
    let module = module(
        ".entry k() {\n.reg .b32 %r<2>;\nmov.u32 %r1, 1;\n{ .reg .b32 t; mov.u32 t, 2; }\n{ .reg .b64 t; mov.u64 t, 3; }\nret;\n}",
    );
    let all = instructions(&module);
    let (Operand::Register(first), Operand::Register(second)) = (&all[1].operands[0], &all[2].operands[0]) else {
        panic!("registers are expected")
    };
    assert_ne!(first, second);
    let types: Vec<Type> = [first, second]
        .iter()
        .map(|name| module.functions[0].registers.iter().find(|register| register.name == **name).unwrap().ty)
        .collect();
    assert_eq!(types, [Type::B32, Type::B64]);
}

#[test]
fn instructions_know_their_line_in_the_source() {
    let module = module(
        ".entry k() {\n.loc 2 14 7\nadd.s32 %r, %r, 1;\nret;\n}\n.file 2 \"norm.rs\", 0, 0\n.section .debug_str { .b8 1, 2 }",
    );
    let all = instructions(&module);
    assert_eq!((all[0].line, all[0].source), (6, Some((2, 14))));
    assert_eq!(module.files, [(2, "norm.rs".to_owned())]);
}

#[test]
fn errors_name_the_line() {
    for (text, words) in [
        (".target sm_80\n.entry k() {\nadd.s32 %r1 %r2;\n}", "line 3: expected `,`"),
        (".target sm_80\n.bogus 1", "line 2: unknown directive `.bogus`"),
        (".entry k() {\n.reg .f80 %x;\n}", "line 2: unknown type"),
        (".entry k() {\n#\n}", "line 2: unexpected character `#`"),
        (".entry k() {\nret;", "line 2: unexpected End"),
    ] {
        let error = Module::parse(text).unwrap_err().to_string();
        assert!(error.starts_with(words), "{error}");
    }
}
