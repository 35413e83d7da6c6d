//! Who holds what: every element of every parameter has one owner.

use serde::{Deserialize, Serialize};

use super::collective::even_cuts;
use crate::load_balance::balance;
use crate::{AdamWConfig, Assignment, Blocks, GroupSettings, MuonConfig};

/// How Muon's work and state are divided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum DistributedForm {
    /// Each worker has whole matrices, by the cost of their Newton-Schulz: it alone keeps their momentum and
    /// orthogonalises them. What travels is what a sharded AdamW sends.
    #[default]
    WholeMatrix,
    /// The report's Algorithm 1: parameters lie end to end and are cut into as many even parts as there are workers, in the
    /// manner of ZeRO-1. Who holds a part of a matrix gathers the whole of its momentum, orthogonalises it, and keeps its
    /// part of the update.
    Flat,
}

/// A parameter that is optimised.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) path: String,
    pub(super) group: String,
    pub(super) shape: Vec<usize>,
    pub(super) by: By,
}

/// By what.
#[derive(Clone, Debug)]
pub(super) enum By {
    /// Muon, as a stack `[matrices, rows, columns]`; its number among the optimizers.
    Muon { optimizer: usize, stack: [usize; 3] },
    /// AdamW; its number among the optimizers.
    AdamW { optimizer: usize },
}

impl Target {
    pub(super) fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Elements of one of its matrices; of all of it, where it is none of Muon's.
    pub(super) fn unit(&self) -> usize {
        match self.by {
            By::Muon { stack: [_, rows, columns], .. } => rows * columns,
            By::AdamW { .. } => self.elements(),
        }
    }
}

/// The optimizers of an assignment, each with the learning rate's factor.
#[derive(Clone, Debug, Default)]
pub(super) struct Optimizers {
    pub(super) muon: Vec<(MuonConfig, f64)>,
    pub(super) adamw: Vec<(AdamWConfig, f64)>,
}

/// The parameters of an assignment, in the module's order; `None` and the group's name where a group is neither Muon nor
/// AdamW.
pub(super) fn targets(assignment: &Assignment) -> Result<(Vec<Target>, Optimizers), String> {
    let mut optimizers = Optimizers::default();
    let mut targets = Vec::new();
    let group_of = |name: &str| assignment.groups().find(|(group, _)| *group == name).map(|(_, group)| group);
    for row in assignment.rows().iter().filter(|row| row.is_optimized()) {
        let group = group_of(&row.group).ok_or_else(|| row.group.clone())?;
        let factor = group.learning_rate_factor();
        let by = match group.settings() {
            GroupSettings::Muon(config) => {
                let blocks = if row.blocks == Blocks::Whole { config.blocks.clone() } else { row.blocks.clone() };
                let config = config.as_ref().clone().with_blocks(blocks);
                let stack = config.view.stack(&row.shape);
                By::Muon { optimizer: place(&mut optimizers.muon, (config, factor)), stack }
            }
            GroupSettings::AdamW(config) => {
                By::AdamW { optimizer: place(&mut optimizers.adamw, (config.clone(), factor)) }
            }
            GroupSettings::Other { .. } => return Err(row.group.clone()),
        };
        targets.push(Target { path: row.path.clone(), group: row.group.clone(), shape: row.shape.clone(), by });
    }
    Ok((targets, optimizers))
}

/// The number of an item in a list, to which it is added if it is not there.
fn place<T: PartialEq>(list: &mut Vec<T>, item: T) -> usize {
    list.iter().position(|known| *known == item).unwrap_or_else(|| {
        list.push(item);
        list.len() - 1
    })
}

/// Consecutive elements of a parameter that one worker owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) target: usize,
    pub(super) start: usize,
    pub(super) end: usize,
}

impl Segment {
    pub(super) fn len(&self) -> usize {
        self.end - self.start
    }
}

/// Parameters whose gradients travel together.
#[derive(Clone, Debug)]
pub(super) struct Bucket {
    pub(super) targets: Vec<usize>,
    /// The segments of each worker, in the order of parameters and elements.
    pub(super) parts: Vec<Vec<Segment>>,
}

impl Bucket {
    /// Elements of each worker.
    pub(super) fn lengths(&self) -> Vec<usize> {
        self.parts.iter().map(|segments| segments.iter().map(Segment::len).sum()).collect()
    }
}

/// Buckets in the order in which a backward pass comes to them: from the last parameter to the first.
pub(super) fn partition(
    targets: &[Target],
    optimizers: &Optimizers,
    form: DistributedForm,
    workers: usize,
    bucket_elements: usize,
) -> Vec<Bucket> {
    let owners = match form {
        DistributedForm::WholeMatrix => owners(targets, optimizers, workers),
        DistributedForm::Flat => vec![None; targets.len()],
    };
    let mut groups: Vec<(usize, Vec<usize>)> = Vec::new(); // elements, targets
    for (index, target) in targets.iter().enumerate().rev() {
        match groups.last_mut().filter(|(elements, _)| *elements < bucket_elements) {
            Some((elements, members)) => {
                *elements += target.elements();
                members.push(index);
            }
            None => groups.push((target.elements(), vec![index])),
        }
    }
    let bucket = |(_, members): (usize, Vec<usize>)| {
        let mut parts = vec![Vec::new(); workers];
        for &target in members.iter().filter(|&&target| owners[target].is_some()) {
            let unit = targets[target].unit();
            for (matrix, &owner) in owners[target].iter().flatten().enumerate() {
                add(&mut parts[owner], Segment { target, start: matrix * unit, end: (matrix + 1) * unit });
            }
        }
        // What has no owner lies end to end and is cut evenly.
        let flat: Vec<usize> = members.iter().copied().filter(|&target| owners[target].is_none()).collect();
        let elements = flat.iter().map(|&target| targets[target].elements()).sum();
        let cuts = even_cuts(elements, workers);
        let mut before = 0;
        for target in flat {
            let length = targets[target].elements();
            for worker in 0..workers {
                let start = cuts[worker].clamp(before, before + length) - before;
                let end = cuts[worker + 1].clamp(before, before + length) - before;
                if end > start {
                    add(&mut parts[worker], Segment { target, start, end });
                }
            }
            before += length;
        }
        Bucket { targets: members, parts }
    };
    groups.into_iter().map(bucket).collect()
}

/// Adds a segment, to the last one where it goes on.
fn add(segments: &mut Vec<Segment>, segment: Segment) {
    match segments.last_mut().filter(|last| last.target == segment.target && last.end == segment.start) {
        Some(last) => last.end = segment.end,
        None => segments.push(segment),
    }
}

/// The owner of each matrix of Muon's; `None` for other parameters.
fn owners(targets: &[Target], optimizers: &Optimizers, workers: usize) -> Vec<Option<Vec<usize>>> {
    let mut costs = Vec::new();
    for target in targets {
        if let By::Muon { optimizer, stack: [matrices, rows, columns] } = target.by {
            let iteration = optimizers.muon[optimizer].0.build();
            // In full: what every backend does, so that all agree.
            let cost = iteration.newton_schulz().flops(rows, columns, false);
            costs.extend(std::iter::repeat_n(cost, matrices));
        }
    }
    let mut worker_of = balance(&costs, workers).rank_of.into_iter();
    let owners = targets.iter().map(|target| match target.by {
        By::Muon { stack: [matrices, ..], .. } => Some(worker_of.by_ref().take(matrices).collect()),
        By::AdamW { .. } => None,
    });
    owners.collect()
}

/// The parts of a matrix that each worker holds, where it holds one: `(worker, start, end)` in elements of the matrix.
pub(super) fn holders(bucket: &Bucket, target: usize, start: usize, end: usize) -> Vec<(usize, usize, usize)> {
    let mut holders = Vec::new();
    for (worker, segments) in bucket.parts.iter().enumerate() {
        for segment in segments.iter().filter(|segment| segment.target == target) {
            let (from, to) = (segment.start.max(start), segment.end.min(end));
            if from < to {
                holders.push((worker, from - start, to - start));
            }
        }
    }
    holders
}

#[cfg(test)]
mod tests {
    use super::*;

    fn examples() -> (Vec<Target>, Optimizers) {
        let muon = |path: &str, stack: [usize; 3]| Target {
            path: path.into(),
            group: "muon".into(),
            shape: stack.to_vec(),
            by: By::Muon { optimizer: 0, stack },
        };
        let adamw = |path: &str, shape: &[usize]| Target {
            path: path.into(),
            group: "adamw".into(),
            shape: shape.to_vec(),
            by: By::AdamW { optimizer: 0 },
        };
        let targets = vec![
            adamw("embedding", &[11, 4]),
            muon("a", [1, 4, 6]),
            adamw("norm", &[4]),
            muon("experts", [5, 4, 3]),
            muon("b", [1, 4, 6]),
        ];
        let optimizers = Optimizers { muon: vec![(MuonConfig::new(), 1.0)], adamw: vec![(AdamWConfig::new(), 1.0)] };
        (targets, optimizers)
    }

    #[test]
    fn every_element_has_one_owner() {
        let (targets, optimizers) = examples();
        for form in [DistributedForm::WholeMatrix, DistributedForm::Flat] {
            for workers in 1..=7 {
                for bucket_elements in [1, 50, 10_000] {
                    let buckets = partition(&targets, &optimizers, form, workers, bucket_elements);
                    let order: Vec<usize> = buckets.iter().flat_map(|bucket| bucket.targets.clone()).collect();
                    assert_eq!(order, [4, 3, 2, 1, 0]);
                    let mut owned: Vec<Vec<u8>> = targets.iter().map(|target| vec![0; target.elements()]).collect();
                    for segment in buckets.iter().flat_map(|bucket| bucket.parts.iter().flatten()) {
                        owned[segment.target][segment.start..segment.end].iter_mut().for_each(|count| *count += 1);
                    }
                    assert!(owned.iter().flatten().all(|&count| count == 1), "{form:?} {workers} {bucket_elements}");
                }
            }
        }
    }

    #[test]
    fn matrices_stay_whole_and_flat_parts_are_even() {
        let (targets, optimizers) = examples();
        let buckets = partition(&targets, &optimizers, DistributedForm::WholeMatrix, 3, 1000);
        for segment in buckets.iter().flat_map(|bucket| bucket.parts.iter().flatten()) {
            let target = &targets[segment.target];
            if matches!(target.by, By::Muon { .. }) {
                assert!(segment.start % target.unit() == 0 && segment.end % target.unit() == 0);
            }
        }
        let flat = partition(&targets, &optimizers, DistributedForm::Flat, 3, 1000);
        assert_eq!(flat[0].lengths(), [52, 52, 52]);
        // The third expert, elements 48 to 60 of bucket positions 24 + 24..36, crosses the first cut.
        assert_eq!(holders(&flat[0], 3, 24, 36), [(0, 0, 4), (1, 4, 12)]);
        assert_eq!(holders(&flat[0], 4, 0, 24), [(0, 0, 24)]);
    }
}
