//! The checks of this repository, as `cargo xtask COMMAND`. Continuous integration and `.ci/run` call only these commands, so
//! that a failure there can be repeated with one command.

mod book;
mod ci;
mod commands;
mod errors;
mod evidence;
mod links;
mod notices;
mod package;
mod pages;
mod programs;
mod scripts;
mod shell;
mod words;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "The checks of this repository")]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Run all checks in order; a check that this machine cannot run is reported as SKIPPED
    Ci,
    /// Find words that STYLE.md excludes
    Words {
        /// Files or folders [default: the whole repository]
        paths: Vec<String>,
    },
    /// Check the spelling with `typos`
    Typos,
    /// Check the formatting of the code
    Fmt,
    /// Lint the default features
    Lint,
    /// Lint all features and compile the fuzz targets; needs no CUDA, and MPI only with `--mpi`
    LintAll {
        /// Lint the feature `mpi` as well, which needs an MPI with its headers
        #[arg(long)]
        mpi: bool,
    },
    /// Run all tests
    Test,
    /// Build the code's documentation; warnings are errors
    Doc,
    /// Build and run the examples of the manual, which assert their results
    Examples,
    /// Lint and compile the scripts, and run the quick ones
    Scripts,
    /// Write the generated pages of the manual and build it
    Book {
        /// Write nothing; fail if a page is out of date
        #[arg(long)]
        check: bool,
    },
    /// Run the manual's blocks of commands that are marked with `run`
    Blocks {
        /// The folder with the programs
        #[arg(default_value = "target/release")]
        programs: PathBuf,
    },
    /// Check the links of all pages
    Links,
    /// Write the evidence page from its data file
    Evidence {
        /// Write nothing; fail if the page is out of date
        #[arg(long)]
        check: bool,
    },
    /// Package all crates as for crates.io, and build each from its package
    Package {
        /// Do not build the packages
        #[arg(long)]
        no_verify: bool,
    },
    /// Check licenses, advisories and sources of dependencies with `cargo deny`
    Deny {
        /// Do not fetch the advisories
        #[arg(long)]
        no_advisories: bool,
    },
    /// Install both programs from a wheel into an environment without Rust, and run them
    Wheel {
        /// The wheel [default: one that is packed from the programs of the tests]
        wheel: Option<PathBuf>,
    },
    /// Serve a tiny model to OpenAI's client, to load, and to clients that misbehave
    Serve,
    /// Use the page of the server in headless Chromium
    Browser,
    /// Compare GGUF files of each type with llama.cpp
    Gguf,
    /// Write `THIRD-PARTY-LICENSES.txt`: the licenses of what is compiled into the programs
    Notices {
        /// The features of the build
        #[arg(long, default_value = "converter")]
        features: String,
    },
    /// Train on two ranks with MPI
    Mpi,
    /// Run the GPU kernels on a CUDA device in software
    Cuda,
    /// Run the GPU kernels on a software Vulkan driver
    Wgpu,
    /// Run each fuzz target for some seconds
    Fuzz {
        /// Seconds for each target
        #[arg(default_value_t = 15)]
        seconds: u32,
    },
}

/// The root of the repository.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is a folder of the repository")
}

fn main() -> ExitCode {
    match run(&Arguments::parse().command, root()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: &Task, root: &Path) -> Result<()> {
    match task {
        Task::Ci => ci::run(root),
        Task::Words { paths } => words::run(root, paths),
        Task::Typos => ci::typos(root),
        Task::Fmt => ci::fmt(root),
        Task::Lint => ci::lint(root),
        Task::LintAll { mpi } => ci::lint_all(root, *mpi),
        Task::Test => ci::test(root),
        Task::Doc => ci::doc(root),
        Task::Examples => ci::examples(root),
        Task::Scripts => scripts::run(root),
        Task::Book { check } => book::run(root, *check),
        Task::Blocks { programs } => commands::run_blocks(root, &root.join(programs)),
        Task::Links => links::run(root, true),
        Task::Evidence { check } => evidence::run(root, *check),
        Task::Package { no_verify } => package::run(root, *no_verify),
        Task::Deny { no_advisories } => ci::deny(root, !no_advisories),
        Task::Wheel { wheel } => programs::wheel(root, wheel.as_deref()),
        Task::Serve => programs::serve(root),
        Task::Browser => programs::browser(root),
        Task::Gguf => programs::gguf(root),
        Task::Notices { features } => notices::run(root, features),
        Task::Mpi => ci::mpi(root),
        Task::Cuda => ci::cuda(root),
        Task::Wgpu => ci::wgpu(root),
        Task::Fuzz { seconds } => ci::fuzz(root, *seconds),
    }
}
