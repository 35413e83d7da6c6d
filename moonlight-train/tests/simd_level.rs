//! The environment variable `MOONLIGHT_SIMD`, from the command line.

mod common;

use common::{Home, metrics, moonlight, text};
use moonlight_model::simd::testing::skipped;
use moonlight_model::simd::{LEVEL_VARIABLE, Level};

#[test]
fn an_unavailable_level_is_refused_before_anything_else_happens() {
    let absent = Level::ALL.iter().find(|level| !level.is_available());
    for level in ["avx9000", absent.map_or("neon or so", |level| level.name())] {
        let output = moonlight(&["plan", "nowhere.toml"]).env(LEVEL_VARIABLE, level).output().unwrap();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(&format!("`MOONLIGHT_SIMD` is `{level}`, which")) && said.contains("hint: "), "{said}");
        assert!(!said.contains("nowhere.toml"), "{said}");
    }
}

/// Each level sums matrix products in another order; nothing else differs.
#[test]
fn a_run_is_the_same_at_each_level_up_to_rounding() {
    let home = Home::new();
    let losses = |level: Level| -> Vec<f64> {
        let mut command = home.train(level.name(), &[]);
        let output = command.env(LEVEL_VARIABLE, level.name()).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        metrics(&home.run(level.name())).iter().map(|line| line["loss"].as_f64().unwrap()).collect()
    };
    let expected = losses(Level::Scalar);
    for &level in &Level::ALL[1..] {
        if !level.is_available() {
            skipped("a run at each level", &format!("this processor has no {level}"));
            continue;
        }
        let found = losses(level);
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() < 2e-3, "{level}: a loss of {found} and not {expected}");
        }
    }
}
