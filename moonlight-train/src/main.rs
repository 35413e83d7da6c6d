//! The program `moonlight`: trains and runs language models of the Moonlight family.

fn main() -> std::process::ExitCode {
    moonlight_model::keep_freed_memory();
    moonlight_train::cli::main()
}
