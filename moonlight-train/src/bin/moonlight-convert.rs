//! The program `moonlight-convert`, for builds that give both programs: see the feature `converter`.

fn main() -> std::process::ExitCode {
    moonlight_convert::cli::main()
}
