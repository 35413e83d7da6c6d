#![doc = include_str!("../README.md")]

#[cfg(target_arch = "x86_64")]
use std::arch::is_x86_feature_detected;
use std::cell::Cell;
use std::fmt;
use std::sync::OnceLock;

use half::bf16;
#[doc(hidden)]
pub use multiversion;
use thiserror::Error;

pub mod bf16_gemm;
pub mod gemm;
pub mod quant;
pub mod testing;
#[cfg(target_arch = "x86_64")]
mod transpose;

/// The environment variable with the highest level to use.
pub const LEVEL_VARIABLE: &str = "MOONLIGHT_SIMD";

/// A set of vector instructions. On one architecture each level includes those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Level {
    /// The instructions that every processor of the architecture has.
    Scalar,
    /// AArch64: NEON.
    Neon,
    /// x86-64: AVX2 and FMA.
    Avx2,
    /// x86-64: AVX-512 F, as in the first processors with AVX-512. From this level on, kernels written by hand for AVX-512 run (those
    /// for bf16 if the processor has the instructions); kernels that the compiler vectorizes run as for AVX2.
    Avx512F,
    /// x86-64: AVX-512 from Ice Lake on, with instructions for bytes and words. These processors do not lower their clock as the first
    /// ones did, so kernels that the compiler vectorizes run in 512 bits.
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

    /// The name in [`LEVEL_VARIABLE`].
    pub fn name(self) -> &'static str {
        match self {
            Level::Scalar => "scalar",
            Level::Neon => "neon",
            Level::Avx2 => "avx2",
            Level::Avx512F => "avx512f",
            Level::Avx512 => "avx512",
        }
    }

    /// Whether this processor has the level.
    pub fn is_available(self) -> bool {
        self <= Self::best() && Self::ALL.contains(&self)
    }

    /// The highest level that this processor has.
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
            #[allow(unreachable_patterns, reason = "each architecture has some of the levels")]
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

/// The level of the widest target of [`by_level!`] that this processor has. `multiversion` detects the features here that it compiles
/// for in the macro, so the macro's calls are sound. It adds the features of Ice Lake to every target with `avx512f`, which therefore
/// is [`Level::Avx512`] and not [`Level::Avx512F`].
#[multiversion::multiversion(targets("x86_64+avx512f", "x86_64+avx2", "aarch64+neon"))]
fn compiled_level() -> Level {
    multiversion::target::match_target! {
        "x86_64+avx512f" => Level::Avx512,
        "x86_64+avx2" => Level::Avx2,
        "aarch64+neon" => Level::Neon,
        _ => Level::Scalar,
    }
}

/// The nearest bf16, ties to even. NaN stays NaN.
// Not `bf16::from_f32`, whose branch for NaN keeps loops from being vectorized. Adding 0x7fff and the lowest kept bit carries into the
// kept bits if the dropped bits are above half, or are half and the lowest kept bit is 1.
#[inline(always)]
pub fn round_to_bf16(value: f32) -> bf16 {
    let bits = value.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
    bf16::from_bits(if value.is_nan() { 0x7fc0 } else { rounded })
}

/// Why the level in the environment cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum LevelError {
    /// This architecture has no level with the name.
    #[error("`MOONLIGHT_SIMD` is `{}`, which is not a level of this architecture", name.escape_debug())]
    Unknown {
        /// The name in the environment.
        name: String,
    },
    /// The processor does not have the level.
    #[error("`MOONLIGHT_SIMD` is `{level}`, which this processor does not have: its highest level is `{best}`")]
    Unavailable {
        /// The level in the environment.
        level: Level,
        /// The highest level of the processor.
        best: Level,
    },
}

impl LevelError {
    /// The levels that can be set instead.
    pub fn hint(&self) -> Option<String> {
        let names: Vec<&str> =
            Level::ALL.iter().filter(|level| level.is_available()).map(|level| level.name()).collect();
        Some(format!("unset `{LEVEL_VARIABLE}`, or set it to one of: {}", names.join(", ")))
    }
}

/// The level in the environment, or the highest level if there is none.
///
/// A program should call this at its start and report the error. Kernels do not: they use the highest level if the environment
/// has an invalid one.
///
/// # Errors
///
/// [`LevelError`] if the name is not a level, or the processor does not have it.
pub fn from_environment() -> Result<Level, LevelError> {
    match std::env::var_os(LEVEL_VARIABLE) {
        Some(name) if !name.is_empty() => Level::parse(&name.to_string_lossy()),
        _ => Ok(Level::best()),
    }
}

thread_local! {
    /// The level of this thread; `None` until the first call of [`level`]. Per thread and not per process, so that tests can run a
    /// pool at another level.
    static LEVEL: Cell<Option<Level>> = const { Cell::new(None) };
}

/// The level that kernels on this thread must use, which the processor has.
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

/// Defines a function that is compiled once for each level and runs the version of the current [`level`]. Type parameters are in
/// square brackets after the name.
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
                // SAFETY: `level` returns only levels of the processor, and `Level` detects the features that this function is
                // compiled for.
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
    fn levels_are_parsed_by_name() {
        for &level in Level::ALL.iter().filter(|level| level.is_available()) {
            assert_eq!(Level::parse(level.name()), Ok(level));
            assert_eq!(Level::parse(&level.name().to_uppercase()), Ok(level));
        }
        assert!(Level::Scalar.is_available());
        assert!(Level::ALL.is_sorted());
    }

    #[test]
    fn unknown_and_unavailable_levels_are_errors() {
        let error = Level::parse("avx9000\u{1b}").unwrap_err();
        assert!(error.hint().unwrap().contains("scalar"));
        for &level in Level::ALL.iter().filter(|level| !level.is_available()) {
            assert_eq!(Level::parse(level.name()), Err(LevelError::Unavailable { level, best: Level::best() }));
        }
    }

    #[test]
    fn messages() {
        let examples = [
            LevelError::Unknown { name: "avx9000\u{1b}".into() },
            LevelError::Unavailable { level: Level::Avx512, best: Level::Avx2 },
        ];
        let lines = examples.map(|error| {
            // The compiler asks for an example of a new variant here.
            match error {
                LevelError::Unknown { .. } | LevelError::Unavailable { .. } => {}
            }
            // The levels at the end of the hint are those of the machine.
            let hint = error.hint().unwrap();
            let hint = hint.split_once(": ").unwrap().0;
            format!("error: {error}\nhint: {hint}: [..]\n")
        });
        insta::assert_snapshot!(lines.join("\n"));
    }

    crate::by_level! {
        fn which[T: Copy](value: T) -> T {
            value
        }
    }

    #[test]
    fn a_level_applies_to_the_threads_of_its_pool_only() {
        let outside = level();
        testing::at_each_level("a separate pool", |forced| {
            use rayon::prelude::*;
            assert_eq!(level(), forced);
            assert!((0..100).into_par_iter().map(|_| level()).all(|found| found == forced));
            assert_eq!(which(3), 3);
        });
        assert_eq!(level(), outside);
    }
}
