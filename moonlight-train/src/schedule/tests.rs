use super::*;

fn config(name: ScheduleName) -> ScheduleConfig {
    ScheduleConfig {
        name,
        warmup_steps: 0,
        decay_steps: 0,
        final_fraction: 0.0,
        total_steps: 0,
        stages: Vec::new(),
        accumulation: Vec::new(),
    }
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-12 * b.abs().max(1.0)
}

#[test]
fn warm_up_ends_at_the_peak_and_constant_stays() {
    let schedule =
        Schedule::new(&ScheduleConfig { warmup_steps: 4, ..config(ScheduleName::Constant) }, 0.8, 10).unwrap();
    let rates: Vec<f64> = (0..12).map(|step| schedule.rate(step)).collect();
    for (rate, expected) in rates.iter().zip([0.2, 0.4, 0.6, 0.8, 0.8, 0.8]) {
        assert!(close(*rate, expected), "{rates:?}");
    }
    assert_eq!(rates[3], 0.8);
    assert_eq!(rates[11], 0.8);
}

#[test]
fn cosine_goes_from_the_peak_to_the_final_rate() {
    let config = ScheduleConfig { warmup_steps: 2, final_fraction: 0.1, ..config(ScheduleName::Cosine) };
    let schedule = Schedule::new(&config, 1.0, 12).unwrap();
    assert_eq!((schedule.rate(1), schedule.rate(11), schedule.rate(99)), (1.0, 0.1, 0.1));
    // Halfway down after half of the ten steps.
    assert!(close(schedule.rate(6), 0.55), "{}", schedule.rate(6));
    assert!((0..11).all(|step| step < 1 || schedule.rate(step) > schedule.rate(step + 1)));
}

#[test]
fn without_warm_up_the_decay_begins_at_the_peak() {
    let schedule = Schedule::new(&config(ScheduleName::Linear), 1.0, 4).unwrap();
    let rates: Vec<f64> = (0..4).map(|step| schedule.rate(step)).collect();
    assert_eq!(rates, [0.75, 0.5, 0.25, 0.0]);
}

#[test]
fn wsd_is_stable_and_then_decays() {
    let config = ScheduleConfig { warmup_steps: 10, decay_steps: 20, ..config(ScheduleName::Wsd) };
    let schedule = Schedule::new(&config, 1.0, 100).unwrap();
    assert_eq!((schedule.rate(9), schedule.rate(10), schedule.rate(79)), (1.0, 1.0, 1.0));
    assert_eq!((schedule.rate(80), schedule.rate(89), schedule.rate(99)), (0.95, 0.5, 0.0));
    let fifth = Schedule::new(&super::tests::config(ScheduleName::Wsd), 1.0, 100).unwrap();
    assert_eq!((fifth.rate(79), fifth.rate(99)), (1.0, 0.0));
}

#[test]
fn a_stage_starts_at_the_last_rate_of_the_one_before() {
    let stage = |steps, to, shape| Stage { steps, to, shape, bias_update_rate: None };
    let mut stages = vec![
        stage(10, 4.2e-4, StageShape::Linear),
        stage(100, 4.2e-5, StageShape::Cosine),
        stage(5, 1e-4, StageShape::Linear),
        stage(20, 0.0, StageShape::Linear),
    ];
    stages[2].bias_update_rate = Some(0.0);
    stages[3].bias_update_rate = Some(0.0);
    let schedule = Schedule::new(&ScheduleConfig { stages, ..config(ScheduleName::Stages) }, 1.0, 135).unwrap();
    assert!(close(schedule.rate(0), 4.2e-5));
    assert_eq!((schedule.rate(9), schedule.rate(109), schedule.rate(114)), (4.2e-4, 4.2e-5, 1e-4));
    assert_eq!((schedule.rate(134), schedule.rate(1000)), (0.0, 0.0));
    assert!(schedule.rate(10) < 4.2e-4 && schedule.rate(110) > 4.2e-5);
    assert_eq!((schedule.bias_update_rate(109), schedule.bias_update_rate(110)), (None, Some(0.0)));
}

#[test]
fn a_run_may_stop_before_the_end_of_its_schedule() {
    let config = ScheduleConfig { total_steps: 100, ..config(ScheduleName::Linear) };
    let schedule = Schedule::new(&config, 1.0, 20).unwrap();
    assert_eq!(schedule.rate(19), 0.8);
}

#[test]
fn a_warm_up_or_decay_that_does_not_fit_is_an_error() {
    let warmup = ScheduleConfig { warmup_steps: 11, ..config(ScheduleName::Cosine) };
    assert_eq!(Schedule::new(&warmup, 1.0, 10).unwrap_err().key, "schedule.warmup_steps");
    let decay = ScheduleConfig { warmup_steps: 5, decay_steps: 6, ..config(ScheduleName::Wsd) };
    assert_eq!(Schedule::new(&decay, 1.0, 10).unwrap_err().key, "schedule.decay_steps");
}

#[test]
fn a_run_of_no_steps_has_a_rate() {
    assert_eq!(Schedule::new(&config(ScheduleName::Cosine), 0.5, 0).unwrap().rate(0), 0.5);
}

#[test]
fn gradient_accumulation_may_change_during_a_run() {
    let change = |from_step, gradient_accumulation| AccumulationChange { from_step, gradient_accumulation };
    let config = ScheduleConfig { accumulation: vec![change(10, 4), change(20, 2)], ..config(ScheduleName::Constant) };
    let schedule = Schedule::new(&config, 1.0, 30).unwrap();
    let passes = [9, 10, 19, 20, 99].map(|step| schedule.gradient_accumulation(step));
    assert_eq!(passes, [None, Some(4), Some(4), Some(2), Some(2)]);
}
