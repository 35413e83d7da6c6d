//! Muon: momentum, orthogonalised.

use burn::optim::{LearningRate, ModuleOptimizer, Optimizer, RecordState, StateSink, StateSource};
use burn::tensor::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::newton_schulz::full_precision;
use crate::{Coefficients, NewtonSchulz, Scale, WeightLayout};

/// The type of the products inside Newton-Schulz.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// f32 (f64 for f64 parameters).
    #[default]
    F32,
    /// bf16, as in the report's training: faster where the device has units for it, slower on a CPU.
    Bf16,
}

/// Settings of [`Muon`]; the defaults are the report's (arXiv 2502.16982, 2.2 and its released code).
///
/// ```
/// use moonlight_optim::{MuonConfig, Scale};
///
/// let config = MuonConfig::new().with_weight_decay(0.0).with_scale(Scale::KellerJordan);
/// let muon = config.build();
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MuonConfig {
    /// Momentum `mu` in `M <- mu M + grad`. 0.95.
    pub momentum: f64,
    /// Whether Newton-Schulz gets `mu M + grad` (Nesterov) or `M`. `true`.
    pub nesterov: bool,
    /// Decoupled weight decay: `W <- W - lr * weight_decay * W`, at the learning rate before any scale. 0.1.
    pub weight_decay: f64,
    /// The factor on the orthogonalised update. `0.2 sqrt(max(A, B))`.
    pub scale: Scale,
    /// Which side of a stored matrix is the layer's input; read only by scales that are not symmetric.
    pub layout: WeightLayout,
    /// The polynomials of Newton-Schulz.
    pub coefficients: Coefficients,
    /// The number of Newton-Schulz steps. 5.
    pub steps: usize,
    /// Added to a matrix's norm before dividing by it. 1e-7.
    pub epsilon: f64,
    /// The type of the products inside Newton-Schulz. f32.
    pub precision: Precision,
}

impl Default for MuonConfig {
    fn default() -> Self {
        Self {
            momentum: 0.95,
            nesterov: true,
            weight_decay: 0.1,
            scale: Scale::default(),
            layout: WeightLayout::default(),
            coefficients: Coefficients::default(),
            steps: 5,
            epsilon: 1e-7,
            precision: Precision::default(),
        }
    }
}

impl MuonConfig {
    /// The report's settings.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets [`MuonConfig::momentum`].
    pub fn with_momentum(mut self, momentum: f64) -> Self {
        self.momentum = momentum;
        self
    }

    /// Sets [`MuonConfig::nesterov`].
    pub fn with_nesterov(mut self, nesterov: bool) -> Self {
        self.nesterov = nesterov;
        self
    }

    /// Sets [`MuonConfig::weight_decay`].
    pub fn with_weight_decay(mut self, weight_decay: f64) -> Self {
        self.weight_decay = weight_decay;
        self
    }

    /// Sets [`MuonConfig::scale`].
    pub fn with_scale(mut self, scale: Scale) -> Self {
        self.scale = scale;
        self
    }

    /// Sets [`MuonConfig::layout`].
    pub fn with_layout(mut self, layout: WeightLayout) -> Self {
        self.layout = layout;
        self
    }

    /// Sets [`MuonConfig::coefficients`].
    pub fn with_coefficients(mut self, coefficients: Coefficients) -> Self {
        self.coefficients = coefficients;
        self
    }

    /// Sets [`MuonConfig::steps`].
    pub fn with_steps(mut self, steps: usize) -> Self {
        self.steps = steps;
        self
    }

    /// Sets [`MuonConfig::epsilon`].
    pub fn with_epsilon(mut self, epsilon: f64) -> Self {
        self.epsilon = epsilon;
        self
    }

    /// Sets [`MuonConfig::precision`].
    pub fn with_precision(mut self, precision: Precision) -> Self {
        self.precision = precision;
        self
    }

    /// The optimizer, to be given to a parameter group (see [`ParameterRules`](crate::ParameterRules)).
    pub fn build(&self) -> Muon {
        let newton_schulz = NewtonSchulz {
            schedule: self.coefficients.schedule(self.steps),
            epsilon: self.epsilon,
            dtype: match self.precision {
                Precision::F32 => None,
                Precision::Bf16 => Some(DType::BF16),
            },
        };
        Muon { config: self.clone(), newton_schulz }
    }

    /// Muon for every parameter of a module. Only for a module that consists of matrices alone; any other needs
    /// [`ParameterRules`](crate::ParameterRules).
    pub fn init(&self) -> ModuleOptimizer {
        ModuleOptimizer::from(self.build())
    }
}

/// The Muon optimizer, for matrices `[A, B]` and for stacks of matrices `[batch, A, B]`.
///
/// ```text
/// M <- mu M + grad
/// O  = NewtonSchulz(mu M + grad)                 (Nesterov; or of M)
/// W <- W - lr * (0.2 sqrt(max(A, B)) O + weight_decay W)
/// ```
///
/// Every matrix of a stack is orthogonalised and scaled as if it stood alone, from its own two dimensions.
///
/// A zero gradient with zero momentum gives a zero update. A gradient that holds a NaN or an infinity makes the
/// parameter's own matrix NaN, visibly, and no other matrix of its stack; as with AdamW the momentum keeps the NaN, so
/// a loop that wants to go on must look at its gradients before it steps.
///
/// Momentum and update are computed in f32 (f64 for f64 parameters) and the parameter is rounded once, so bf16
/// parameters keep an f32 momentum.
///
/// # Panics
///
/// [`Optimizer::step`] panics for a parameter that is not of rank 2 or 3, where the update has no meaning.
/// [`ParameterRules`](crate::ParameterRules) turns that into an error before the first step.
#[derive(Clone, Debug)]
pub struct Muon {
    config: MuonConfig,
    newton_schulz: NewtonSchulz,
}

/// What Muon keeps for a parameter: one buffer of its shape, half of what AdamW keeps.
#[derive(Clone, Debug)]
pub struct MuonState<const D: usize> {
    /// `M`, in f32 (f64 for f64 parameters).
    pub momentum: Tensor<D>,
}

impl<const D: usize> RecordState for MuonState<D> {
    fn state_flatten(&self, prefix: &str, out: &mut StateSink) {
        out.push_tensor(prefix, "momentum", self.momentum.clone().into_data());
    }

    fn state_unflatten(prefix: &str, src: &mut StateSource, device: &Device) -> Option<Self> {
        let data = src.take_tensor(prefix, "momentum")?;
        // The stored type, not the device's default: a state must come back bit for bit.
        let dtype = data.dtype();
        Some(Self { momentum: Tensor::from_data(data, (device, dtype)) })
    }
}

impl Muon {
    /// The settings it was built from.
    pub fn config(&self) -> &MuonConfig {
        &self.config
    }

    /// The update of a parameter for a momentum (Nesterov already applied): orthogonalised and scaled, before the
    /// learning rate and without decay. `[batch, A, B]` to `[batch, A, B]`.
    pub fn direction(&self, momentum: Tensor<3>) -> Tensor<3> {
        let [_, rows, columns] = momentum.dims();
        let update = self.newton_schulz.apply(momentum);
        match (self.config.scale.factor(rows, columns, self.config.layout), self.config.scale) {
            (Some(factor), _) => update.mul_scalar(factor),
            (None, Scale::UpdateNorm { factor }) => {
                let mean_square = update.clone().square().mean_dims(&[1, 2]); // [batch, 1, 1]
                // An update of zeros stays one.
                let rms = mean_square.sqrt().add_scalar(f64::from(f32::MIN_POSITIVE));
                update.mul(rms.recip().mul_scalar(factor))
            }
            (None, _) => update,
        }
    }
}

impl Optimizer for Muon {
    type State<const D: usize> = MuonState<D>;

    fn step<const D: usize>(
        &self,
        lr: LearningRate,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<Self::State<D>>,
    ) -> (Tensor<D>, Option<Self::State<D>>) {
        let shape = tensor.shape();
        assert!(
            D == 2 || D == 3,
            "Muon orthogonalises matrices `[A, B]` and stacks of matrices `[batch, A, B]`; a parameter of shape {:?} \
             is neither and belongs in another parameter group",
            shape.as_slice()
        );
        let MuonConfig { momentum: mu, nesterov, weight_decay, .. } = self.config;
        let stored = tensor.dtype();
        let dtype = full_precision(stored);

        let grad = grad.cast(dtype);
        let momentum = match state {
            Some(state) => state.momentum.mul_scalar(mu).add(grad.clone()),
            None => grad.clone(),
        };
        let input = if nesterov { momentum.clone().mul_scalar(mu).add(grad) } else { momentum.clone() };

        let stack = [if D == 3 { shape[0] } else { 1 }, shape[D - 2], shape[D - 1]];
        let update = self.direction(input.reshape(stack)).reshape(shape);

        let tensor = tensor.cast(dtype);
        let tensor = if weight_decay == 0.0 { tensor } else { tensor.mul_scalar(1.0 - lr * weight_decay) };
        let tensor = tensor.sub(update.mul_scalar(lr)).cast(stored);
        (tensor, Some(MuonState { momentum }))
    }

    fn to_device<const D: usize>(state: Self::State<D>, device: &Device) -> Self::State<D> {
        MuonState { momentum: state.momentum.to_device(device) }
    }
}

#[cfg(test)]
mod tests;
