//! Distributed training: several ranks train one module, each with a part of the optimizer's state ("Muon is Scalable for LLM
//! Training", arXiv 2502.16982, section 2.3 and Algorithm 1).
//!
//! Every rank holds the whole module and sees different data (data parallelism), and keeps the optimizer state of the
//! parameters that it owns (ZeRO-1). A step has three parts:
//!
//! 1. Reduce-scatter: gradients are summed over the ranks, bucket by bucket while the backward pass is still running. Each
//!    rank receives the sums for what it owns.
//! 2. Each rank updates what it owns.
//! 3. All-gather: every rank receives the new parameters.
//!
//! The optimizer of each rank is a [`MuonAdamW`](crate::MuonAdamW), built with [`OptimizerOptions::with_communicator`]. How
//! parameters are divided is [`DistributedForm`].
//!
//! | ranks are | transport | type |
//! |---|---|---|
//! | threads of one process | memory | [`InProcess`] |
//! | processes, on one machine or many | MPI (feature `mpi`) | `Mpi` |
//! | CUDA devices of one process | NCCL | [`NcclCollective`] |
//! | devices of several processes | one of each kind | [`HierarchicalCollective`] |
//! | a single one | none | [`SingleRank`] |
//!
//! [`OptimizerOptions::with_communicator`]: crate::OptimizerOptions::with_communicator
//!
//! ```
//! use std::time::Duration;
//!
//! use burn::module::Module;
//! use burn::nn::{Linear, LinearConfig};
//! use burn::optim::GradientsParams;
//! use burn::tensor::{Device, Tensor};
//! use moonlight_optim::distributed::{Communicator, InProcess};
//! use moonlight_optim::{AdamWConfig, MuonConfig, OptimizerOptions, ParameterRules};
//!
//! # #[derive(Module, Debug)]
//! # struct Net { hidden: Linear, output: Linear }
//! let device = Device::default().autodiff();
//! let net = Net { hidden: LinearConfig::new(8, 16).init(&device), output: LinearConfig::new(16, 4).init(&device) };
//! let rules = ParameterRules::muon_except(["output.*"], MuonConfig::new(), AdamWConfig::new());
//!
//! // A rank is a thread here; with the feature `mpi` it is a process (`Mpi::open`).
//! let threads: Vec<_> = InProcess::collectives(2, Duration::from_secs(20))
//!     .into_iter()
//!     .map(|collective| {
//!         let (mut net, rules, device) = (net.clone().fork(&device), rules.clone(), device.clone());
//!         std::thread::spawn(move || {
//!             let communicator = Communicator::new(collective);
//!             let assignment = rules.assign(&net)?;
//!             let options = OptimizerOptions::new().with_communicator(communicator.clone());
//!             let mut optimizer = assignment.build(options)?;
//!             for _ in 0..3 {
//!                 // This rank's data. Gradients are summed over the ranks, so the loss is divided by their number.
//!                 let x = Tensor::<2>::ones([2, 8], &device).mul_scalar(communicator.rank() as f64 + 1.0);
//!                 let loss = net.output.forward(net.hidden.forward(x)).square().mean();
//!                 let loss = loss / communicator.size() as f64;
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

mod bytes_sent;
mod collective;
mod communicator;
mod error;
mod hierarchical;
mod in_process;
#[cfg(feature = "mpi")]
mod mpi;
mod nccl;
mod single_rank;
mod sum_of_squares;
#[cfg(test)]
mod tests;
mod transport;

pub use crate::load_balance::{Balance, balance};
pub use crate::muon_adamw::{DistributedConfig, DistributedForm, GatherPrecision};
pub use bytes_sent::{BytesSent, CollectiveOp};
pub use collective::{Collective, even_cuts};
pub use communicator::{BusyGuard, Communicator, PendingCollective};
pub use error::CollectiveError;
pub use hierarchical::HierarchicalCollective;
pub use in_process::InProcess;
#[cfg(feature = "mpi")]
pub use mpi::Mpi;
pub use nccl::{NcclCollective, supports_nccl};
pub use single_rank::SingleRank;
pub(crate) use sum_of_squares::SumsOfSquares;
pub use sum_of_squares::sum_of_squares;
pub use transport::{HostCollective, Payload, Transport};
