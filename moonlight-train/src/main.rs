//! `moonlight`: train and run language models of the Moonlight family.

fn main() -> std::process::ExitCode {
    moonlight_train::cli::main()
}
