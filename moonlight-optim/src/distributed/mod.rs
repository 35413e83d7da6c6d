//! Distributed Muon: several workers train one module, each with a part of the optimizer ("Muon is Scalable for LLM
//! Training", arXiv 2502.16982, section 2.3 and Algorithm 1).
//!
//! All workers hold the whole module and see different data. A step sums the gradients over the workers, bucket by bucket
//! while the backward pass goes on, so that each worker gets the sum of what it owns; each updates what it owns, and the
//! new parameters go to all. State is kept by the owner alone, as in ZeRO-1.
//!
//! ```
//! use std::time::Duration;
//!
//! use burn::module::Module;
//! use burn::nn::{Linear, LinearConfig};
//! use burn::optim::GradientsParams;
//! use burn::tensor::{Device, Tensor};
//! use moonlight_optim::distributed::{DistributedConfig, InProcess, Worker};
//! use moonlight_optim::{AdamWConfig, MuonConfig, ParameterRules};
//!
//! # #[derive(Module, Debug)]
//! # struct Net { hidden: Linear, output: Linear }
//! let device = Device::default().autodiff();
//! let net = Net { hidden: LinearConfig::new(8, 16).init(&device), output: LinearConfig::new(16, 4).init(&device) };
//! let rules = ParameterRules::muon_except(["output.*"], MuonConfig::new(), AdamWConfig::new());
//!
//! // A thread for each worker; with the feature `mpi`, a process: `Mpi::open`.
//! let threads: Vec<_> = InProcess::collectives(2, Duration::from_secs(20))
//!     .into_iter()
//!     .map(|collective| {
//!         let (mut net, rules, device) = (net.clone().fork(&device), rules.clone(), device.clone());
//!         std::thread::spawn(move || {
//!             let worker = Worker::new(collective);
//!             let assignment = rules.assign(&net)?;
//!             let mut optimizer = assignment.distributed_optimizer(worker.clone(), DistributedConfig::default())?;
//!             for _ in 0..3 {
//!                 // This worker's data; the loss of a step is the sum of all workers' losses.
//!                 let x = Tensor::<2>::ones([2, 8], &device).mul_scalar(worker.rank() as f64 + 1.0);
//!                 let loss = net.output.forward(net.hidden.forward(x)).square().mean() / worker.size() as f64;
//!                 let gradients = GradientsParams::from_grads(loss.backward(), &net);
//!                 net = optimizer.step(0.02, net, gradients)?;
//!             }
//!             Ok::<_, Box<dyn std::error::Error + Send + Sync>>(net.hidden.weight.val().into_data())
//!         })
//!     })
//!     .collect();
//! let weights: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap().unwrap()).collect();
//! assert_eq!(weights[0], weights[1]);
//! ```

mod collective;
mod comm_stats;
mod error;
mod hierarchical;
mod in_process;
#[cfg(feature = "mpi")]
mod mpi;
mod nccl;
mod norm;
mod optimizer;
mod partition;
mod sharded_state;
mod single;
#[cfg(test)]
mod tests;
mod transport;
mod whole_matrix;
mod worker;
mod zero1;

pub use crate::load_balance::{Balance, balance};
pub use collective::{Collective, even_cuts};
pub use comm_stats::{Operation, Traffic};
pub use error::CollectiveError;
pub use hierarchical::Nested;
pub use in_process::InProcess;
#[cfg(feature = "mpi")]
pub use mpi::Mpi;
pub use nccl::{OnDevices, devices_reduce};
pub use norm::sum_of_squares;
pub use optimizer::{DistributedConfig, DistributedError, DistributedOptimizer, GatherPrecision};
pub use partition::DistributedForm;
pub use single::Solo;
pub use transport::{ByHost, Payload, Transport};
pub use worker::{Busy, Pending, Worker};
