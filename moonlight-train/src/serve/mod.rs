//! What `moonlight serve` adds to the server of `moonlight-infer`: the runs of a folder with their metrics, for the page and
//! for other clients (`runs.rs`), and the newest checkpoint of a running training as a model (`follow.rs`).

mod follow;
mod records;
mod run_list;
mod runs;

pub use follow::{Follower, Following};
pub use runs::router;
