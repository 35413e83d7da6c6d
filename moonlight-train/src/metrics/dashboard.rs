//! The figures as burn-train's metrics, which its dashboard plots.

use std::sync::Arc;

use burn::tensor::TensorReadError;
use burn::train::metric::state::{FormatOptions, NumericMetricState};
use burn::train::metric::{
    Adaptor, Metric, MetricAttributes, MetricMetadata, MetricName, Numeric, NumericAttributes, NumericEntry,
    SerializedEntry,
};
use burn::train::{LearnerModel, SupervisedTraining};

use super::{FIGURES, Figure, Figures};
use crate::trainer::Trainee;

/// Registers every figure: all for training, the loss and the perplexity for validation too.
pub(crate) fn register(training: SupervisedTraining<Trainee>) -> SupervisedTraining<Trainee>
where
    Trainee: LearnerModel,
{
    FIGURES.iter().fold(training, |training, figure| {
        let training = training.metric_train_numeric(FigureMetric::new(figure));
        if matches!(figure.key, "loss" | "perplexity") {
            training.metric_valid_numeric(FigureMetric::new(figure))
        } else {
            training
        }
    })
}

#[derive(Clone)]
struct FigureMetric {
    name: MetricName,
    unit: Option<&'static str>,
    of: fn(&Figures) -> Option<f64>,
    state: NumericMetricState,
    /// Whether the figure was ever there; some are measured every so many steps.
    seen: bool,
}

impl FigureMetric {
    fn new(figure: &Figure) -> Self {
        Self {
            name: Arc::new(figure.title.to_owned()),
            unit: figure.unit,
            of: figure.of,
            state: NumericMetricState::new(),
            seen: false,
        }
    }

    fn format(&self) -> FormatOptions {
        let format = FormatOptions::new(self.name.clone()).precision(4);
        match self.unit {
            Some(unit) => format.unit(unit),
            None => format,
        }
    }
}

impl Metric for FigureMetric {
    type Input = Figures;

    fn name(&self) -> MetricName {
        self.name.clone()
    }

    fn attributes(&self) -> MetricAttributes {
        let higher_is_better = self.unit == Some("tokens/s");
        NumericAttributes { unit: self.unit.map(str::to_owned), higher_is_better }.into()
    }

    fn update(&mut self, figures: &Figures, _metadata: &MetricMetadata) -> Result<SerializedEntry, TensorReadError> {
        if let Some(value) = (self.of)(figures) {
            self.state.update(value, 1);
            self.seen = true;
        }
        if !self.seen {
            return Ok(SerializedEntry::not_available(self.unit));
        }
        Ok(self.state.compute_update(self.format()))
    }

    fn compute(&mut self) -> Result<SerializedEntry, TensorReadError> {
        if !self.seen {
            return Ok(SerializedEntry::not_available(self.unit));
        }
        Ok(self.state.compute_final(self.format()))
    }

    fn clear(&mut self) {
        self.state.reset();
        self.seen = false;
    }
}

impl Numeric for FigureMetric {
    fn value(&self) -> Option<NumericEntry> {
        self.seen.then(|| self.state.current_value())
    }

    fn running_value(&self) -> Option<NumericEntry> {
        self.seen.then(|| self.state.running_value())
    }

    fn final_value(&self) -> NumericEntry {
        self.state.final_value()
    }
}

impl Adaptor<Figures> for Figures {
    fn adapt(&self) -> Figures {
        self.clone()
    }
}
