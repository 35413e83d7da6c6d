//! The program `moonlight-convert`: inspects, converts, compares and downloads checkpoints.

fn main() -> std::process::ExitCode {
    moonlight_convert::cli::main()
}
