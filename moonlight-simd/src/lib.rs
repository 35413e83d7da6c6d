//! Which vector instructions the CPU kernels of the Moonlight crates use.
//!
//! A kernel that exists in several forms asks [`level`] and takes the widest form that the level allows. The level is the best
//! that the processor has, or at most what the environment says ([`LEVEL_VARIABLE`], `MOONLIGHT_SIMD=avx2`), so that the form for
//! an older processor can be run and tested on a newer one. Burn's own operations choose for themselves.
//!
//! # What is equal at every level
//!
//! [`by_level!`] compiles one body several times. Rust neither reorders sums nor fuses a product and a sum, so such a
//! function gives the same bits at every level. [`gemm`](mod@gemm) does not: from `avx2` on it fuses, and how it divides a
//! matrix depends on the width of registers. Its results, and what is computed with them, agree to rounding only.

#[cfg(target_arch = "x86_64")]
use std::arch::is_x86_feature_detected;
use std::cell::Cell;
use std::fmt;
use std::sync::OnceLock;

#[doc(hidden)]
pub use multiversion;
use thiserror::Error;

pub mod gemm;
pub mod testing;

/// The environment variable that names the level, at most.
pub const LEVEL_VARIABLE: &str = "MOONLIGHT_SIMD";

/// Sets of vector instructions, each a superset of those before it on the same architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Level {
    /// What every processor of the architecture has.
    Scalar,
    /// AArch64: NEON.
    Neon,
    /// x86-64: AVX2 and FMA.
    Avx2,
    /// x86-64: AVX-512 F alone, as the first processors that had it. The kernels written for AVX-512 by hand run from here on
    /// (those in bf16 where the processor has that, too); those that the compiler vectorises, as for AVX2.
    Avx512F,
    /// x86-64: AVX-512 as of Ice Lake, with bytes and words, and without the lower clock of its first processors.
    Avx512,
}

impl Level {
    /// The levels of this architecture, lowest first.
    pub const ALL: &'static [Level] = if cfg!(target_arch = "x86_64") {
        &[Level::Scalar, Level::Avx2, Level::Avx512F, Level::Avx512]
    } else if cfg!(target_arch = "aarch64") {
        &[Level::Scalar, Level::Neon]
    } else {
        &[Level::Scalar]
    };

    /// Its name in [`LEVEL_VARIABLE`].
    pub fn name(self) -> &'static str {
        match self {
            Level::Scalar => "scalar",
            Level::Neon => "neon",
            Level::Avx2 => "avx2",
            Level::Avx512F => "avx512f",
            Level::Avx512 => "avx512",
        }
    }

    /// Whether this processor has it.
    pub fn is_available(self) -> bool {
        self <= Self::best() && Self::ALL.contains(&self)
    }

    /// The highest that this processor has.
    pub fn best() -> Self {
        static BEST: OnceLock<Level> = OnceLock::new();
        *BEST.get_or_init(|| {
            Self::ALL.iter().copied().take_while(|level| level.is_detected()).last().unwrap_or(Level::Scalar)
        })
    }

    fn is_detected(self) -> bool {
        match self {
            Level::Scalar => true,
            #[cfg(target_arch = "aarch64")]
            Level::Neon => compiled_level() == Level::Neon,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => compiled_level() >= Level::Avx2 && gemm::has_fused_kernels(),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512F => is_x86_feature_detected!("avx512f"),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => is_x86_feature_detected!("avx512f") && compiled_level() == Level::Avx512,
            #[allow(unreachable_patterns, reason = "each architecture has some of them")]
            _ => false,
        }
    }

    fn parse(name: &str) -> Result<Self, LevelError> {
        let level = Self::ALL.iter().copied().find(|level| level.name().eq_ignore_ascii_case(name));
        let level = level.ok_or_else(|| LevelError::Unknown { name: name.to_owned() })?;
        if level.is_available() { Ok(level) } else { Err(LevelError::Unavailable { level, best: Self::best() }) }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// The widest of the targets of [`by_level!`] that this processor has: `multiversion` looks for the same features here as it
/// compiles for there.
#[multiversion::multiversion(targets("x86_64+avx512f", "x86_64+avx2", "aarch64+neon"))]
fn compiled_level() -> Level {
    multiversion::target::match_target! {
        "x86_64+avx512f" => Level::Avx512,
        "x86_64+avx2" => Level::Avx2,
        "aarch64+neon" => Level::Neon,
        _ => Level::Scalar,
    }
}

/// Why the level that the environment names cannot be taken.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum LevelError {
    /// No level of this architecture has the name.
    #[error("MOONLIGHT_SIMD is `{}`, which is none of this architecture's levels", name.escape_debug())]
    Unknown {
        /// What was asked for.
        name: String,
    },
    /// The processor lacks it.
    #[error("MOONLIGHT_SIMD is `{level}`, which this processor lacks: it has `{best}` at most")]
    Unavailable {
        /// What was asked for.
        level: Level,
        /// The highest that there is.
        best: Level,
    },
}

impl LevelError {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        let names: Vec<&str> =
            Level::ALL.iter().filter(|level| level.is_available()).map(|level| level.name()).collect();
        Some(format!("unset {LEVEL_VARIABLE}, or set it to one of: {}", names.join(", ")))
    }
}

/// The level that the environment asks for, or the best where it does not. Programs look before they begin, and stop with the
/// error: kernels take the best level where there is one.
///
/// # Errors
///
/// [`LevelError`] for a name that is no level, and for a level that the processor lacks.
pub fn from_environment() -> Result<Level, LevelError> {
    match std::env::var_os(LEVEL_VARIABLE) {
        Some(name) if !name.is_empty() => Level::parse(&name.to_string_lossy()),
        _ => Ok(Level::best()),
    }
}

thread_local! {
    /// The level of this thread; `None` until it first asks.
    static LEVEL: Cell<Option<Level>> = const { Cell::new(None) };
}

/// The level that kernels have to keep to on this thread. The processor has it.
#[inline]
pub fn level() -> Level {
    match LEVEL.get() {
        Some(level) => level,
        None => process_level(),
    }
}

#[cold]
fn process_level() -> Level {
    static PROCESS: OnceLock<Level> = OnceLock::new();
    let level = *PROCESS.get_or_init(|| from_environment().unwrap_or_else(|_| Level::best()));
    LEVEL.set(Some(level));
    level
}

/// A function that is compiled once for each level, and runs as the one of the [`level`]. Type parameters stand in square
/// brackets.
///
/// ```
/// moonlight_simd::by_level! {
///     /// The sum of squares.
///     pub fn squares[](values: &[f32]) -> f32 {
///         values.iter().map(|value| value * value).sum()
///     }
/// }
/// assert_eq!(squares(&[3.0, 4.0]), 25.0);
/// ```
#[macro_export]
macro_rules! by_level {
    (
        $(#[$attribute:meta])*
        $visibility:vis fn $name:ident[$($type:ident: $bound:path),*]($($argument:ident: $of:ty),* $(,)?) $(-> $output:ty)? $body:block
    ) => {
        $(#[$attribute])*
        $visibility fn $name<$($type: $bound),*>($($argument: $of),*) $(-> $output)? {
            #[inline(always)]
            fn plain<$($type: $bound),*>($($argument: $of),*) $(-> $output)? $body

            #[$crate::multiversion::target("x86_64+avx2")]
            fn avx2<$($type: $bound),*>($($argument: $of),*) $(-> $output)? $body

            #[$crate::multiversion::target("x86_64+avx512f")]
            fn avx512<$($type: $bound),*>($($argument: $of),*) $(-> $output)? $body

            #[$crate::multiversion::target("aarch64+neon")]
            fn neon<$($type: $bound),*>($($argument: $of),*) $(-> $output)? $body

            match $crate::level() {
                // SAFETY: `level` gives none that the processor lacks, and what this one is compiled for is what `Level` looks for.
                #[cfg(target_arch = "x86_64")]
                $crate::Level::Avx512 => unsafe { avx512::<$($type),*>($($argument),*) },
                // SAFETY: as above; every higher level has AVX2.
                #[cfg(target_arch = "x86_64")]
                $crate::Level::Avx2 | $crate::Level::Avx512F => unsafe { avx2::<$($type),*>($($argument),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "aarch64")]
                $crate::Level::Neon => unsafe { neon::<$($type),*>($($argument),*) },
                _ => plain::<$($type),*>($($argument),*),
            }
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_known_by_their_names() {
        for &level in Level::ALL.iter().filter(|level| level.is_available()) {
            assert_eq!(Level::parse(level.name()), Ok(level));
            assert_eq!(Level::parse(&level.name().to_uppercase()), Ok(level));
        }
        assert!(Level::Scalar.is_available());
        assert!(Level::ALL.is_sorted());
    }

    #[test]
    fn what_is_no_level_or_not_there_is_an_error_that_names_those_that_are() {
        let error = Level::parse("avx9000\u{1b}").unwrap_err();
        assert_eq!(
            error.to_string(),
            "MOONLIGHT_SIMD is `avx9000\\u{1b}`, which is none of this architecture's levels"
        );
        assert!(error.hint().unwrap().contains("scalar"));
        let absent = LevelError::Unavailable { level: Level::Avx512, best: Level::Avx2 };
        let text = "MOONLIGHT_SIMD is `avx512`, which this processor lacks: it has `avx2` at most";
        assert_eq!(absent.to_string(), text);
        for &level in Level::ALL.iter().filter(|level| !level.is_available()) {
            assert_eq!(Level::parse(level.name()), Err(LevelError::Unavailable { level, best: Level::best() }));
        }
    }

    crate::by_level! {
        fn which[T: Copy](value: T) -> T {
            value
        }
    }

    #[test]
    fn a_level_holds_for_the_threads_of_its_pool_alone() {
        let outside = level();
        testing::at_each_level("a pool of its own", |forced| {
            use rayon::prelude::*;
            assert_eq!(level(), forced);
            assert!((0..100).into_par_iter().map(|_| level()).all(|found| found == forced));
            assert_eq!(which(3), 3);
        });
        assert_eq!(level(), outside);
    }
}
