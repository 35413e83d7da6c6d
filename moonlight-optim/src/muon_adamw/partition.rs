//! How parameters are divided among ranks: every element of every parameter has one owner.

use burn::module::ParamId;
use serde::{Deserialize, Serialize};

use crate::distributed::even_cuts;
use crate::load_balance::balance;
use crate::{AdamWConfig, Assignment, Blocks, GroupSettings, MuonConfig};

/// How Muon's work and state are divided among ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum DistributedForm {
    /// Each rank owns whole matrices, balanced by the cost of their Newton-Schulz: it alone keeps their momentum and
    /// orthogonalizes them. As many bytes are sent as with a sharded AdamW.
    #[default]
    WholeMatrix,
    /// The report's Algorithm 1 (ZeRO-1): the concatenated parameters are cut into as many even parts as there are ranks. A
    /// rank that holds a part of a matrix gathers the momentum of the whole matrix, orthogonalizes it, and keeps its part of
    /// the update.
    Flat,
}

/// A parameter with its optimizer.
#[derive(Clone, Debug)]
pub(crate) struct OptimizedParameter {
    pub(crate) path: String,
    /// Burn's id of the parameter in the module that the rules were assigned to.
    pub(crate) id: ParamId,
    pub(crate) group: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) kind: OptimizerKind,
}

/// The optimizer of a parameter; `optimizer` is its index in the list of [`Optimizers`].
#[derive(Clone, Debug)]
pub(crate) enum OptimizerKind {
    /// `stack` is `[matrices, rows, columns]`.
    Muon {
        optimizer: usize,
        stack: [usize; 3],
    },
    AdamW {
        optimizer: usize,
    },
    /// Any other Burn optimizer.
    Other,
}

impl OptimizedParameter {
    pub(crate) fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The elements that are orthogonalized together: those of one matrix for Muon, of the whole parameter otherwise.
    pub(crate) fn unit(&self) -> usize {
        match self.kind {
            OptimizerKind::Muon { stack: [_, rows, columns], .. } => rows * columns,
            OptimizerKind::AdamW { .. } | OptimizerKind::Other => self.elements(),
        }
    }
}

/// The distinct optimizers of an assignment, each with its factor on the learning rate.
#[derive(Clone, Debug, Default)]
pub(crate) struct Optimizers {
    pub(crate) muon: Vec<(MuonConfig, f64)>,
    pub(crate) adamw: Vec<(AdamWConfig, f64)>,
}

/// The parameters of an assignment that have an optimizer, in the module's order.
pub(crate) fn optimized_parameters(assignment: &Assignment) -> (Vec<OptimizedParameter>, Optimizers) {
    let mut optimizers = Optimizers::default();
    let mut parameters = Vec::new();
    let group_of = |name: &str| assignment.groups().find(|(group, _)| *group == name).map(|(_, group)| group);
    for row in assignment.rows().iter().filter(|row| row.is_optimized()) {
        let kind = match group_of(&row.group).map(|group| (group.settings(), group.learning_rate_factor())) {
            Some((GroupSettings::Muon(config), factor)) => {
                let blocks = if row.blocks == Blocks::Whole { config.blocks.clone() } else { row.blocks.clone() };
                let config = config.as_ref().clone().with_blocks(blocks);
                let stack = config.view.stack(&row.shape);
                OptimizerKind::Muon { optimizer: index_of(&mut optimizers.muon, (config, factor)), stack }
            }
            Some((GroupSettings::AdamW(config), factor)) => {
                OptimizerKind::AdamW { optimizer: index_of(&mut optimizers.adamw, (config.clone(), factor)) }
            }
            Some((GroupSettings::Other { .. }, _)) | None => OptimizerKind::Other,
        };
        let (path, group, shape) = (row.path.clone(), row.group.clone(), row.shape.clone());
        parameters.push(OptimizedParameter { path, id: row.id, group, shape, kind });
    }
    (parameters, optimizers)
}

/// The index of an item in a list; the item is added if it is new.
fn index_of<T: PartialEq>(list: &mut Vec<T>, item: T) -> usize {
    list.iter().position(|known| *known == item).unwrap_or_else(|| {
        list.push(item);
        list.len() - 1
    })
}

/// Consecutive elements of a parameter that one rank owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// Index of the parameter.
    pub(super) parameter: usize,
    pub(super) start: usize,
    pub(super) end: usize,
}

impl Segment {
    pub(super) fn len(&self) -> usize {
        self.end - self.start
    }
}

/// Parameters whose gradients are reduced together.
#[derive(Clone, Debug)]
pub(super) struct Bucket {
    /// Indices of the parameters, descending.
    pub(super) parameters: Vec<usize>,
    /// The segments that each rank owns: whole matrices first, then the rest, each in the order of `parameters` and of elements.
    pub(super) parts: Vec<Vec<Segment>>,
}

impl Bucket {
    /// The number of elements that each rank owns.
    pub(super) fn lengths(&self) -> Vec<usize> {
        self.parts.iter().map(|segments| segments.iter().map(Segment::len).sum()).collect()
    }
}

/// Divides the parameters into buckets of at least `bucket_elements` elements, and each bucket among `ranks`. Buckets run from
/// the last parameter to the first, the order in which a backward pass computes gradients, so that the first buckets are
/// reduced while it is still running.
pub(super) fn partition(
    parameters: &[OptimizedParameter],
    optimizers: &Optimizers,
    form: DistributedForm,
    ranks: usize,
    bucket_elements: usize,
) -> Vec<Bucket> {
    let owners = match form {
        DistributedForm::WholeMatrix => owners(parameters, optimizers, ranks),
        DistributedForm::Flat => vec![None; parameters.len()],
    };
    let mut groups: Vec<(usize, Vec<usize>)> = Vec::new(); // elements, indices
    for (index, parameter) in parameters.iter().enumerate().rev() {
        match groups.last_mut().filter(|(elements, _)| *elements < bucket_elements) {
            Some((elements, members)) => {
                *elements += parameter.elements();
                members.push(index);
            }
            None => groups.push((parameter.elements(), vec![index])),
        }
    }
    let bucket = |(_, members): (usize, Vec<usize>)| {
        let mut parts = vec![Vec::new(); ranks];
        for &parameter in members.iter().filter(|&&index| owners[index].is_some()) {
            let unit = parameters[parameter].unit();
            for (matrix, &owner) in owners[parameter].iter().flatten().enumerate() {
                add(&mut parts[owner], Segment { parameter, start: matrix * unit, end: (matrix + 1) * unit });
            }
        }
        // Parameters without owners are concatenated and cut evenly: in the flat form all, otherwise those of AdamW, which is
        // elementwise and may be cut anywhere.
        let flat: Vec<usize> = members.iter().copied().filter(|&index| owners[index].is_none()).collect();
        let elements = flat.iter().map(|&index| parameters[index].elements()).sum();
        let cuts = even_cuts(elements, ranks);
        let mut before = 0;
        for parameter in flat {
            let length = parameters[parameter].elements();
            for rank in 0..ranks {
                let start = cuts[rank].clamp(before, before + length) - before;
                let end = cuts[rank + 1].clamp(before, before + length) - before;
                if end > start {
                    add(&mut parts[rank], Segment { parameter, start, end });
                }
            }
            before += length;
        }
        Bucket { parameters: members, parts }
    };
    groups.into_iter().map(bucket).collect()
}

/// Adds a segment, or extends the last one if the two are adjacent, so that a stack of experts is stepped in few pieces.
fn add(segments: &mut Vec<Segment>, segment: Segment) {
    match segments.last_mut().filter(|last| last.parameter == segment.parameter && last.end == segment.start) {
        Some(last) => last.end = segment.end,
        None => segments.push(segment),
    }
}

/// The owner of each matrix of a Muon parameter; `None` for other parameters.
fn owners(parameters: &[OptimizedParameter], optimizers: &Optimizers, ranks: usize) -> Vec<Option<Vec<usize>>> {
    let mut costs = Vec::new();
    for parameter in parameters {
        if let OptimizerKind::Muon { optimizer, stack: [matrices, rows, columns] } = parameter.kind {
            let iteration = optimizers.muon[optimizer].0.build();
            // Counted without the symmetric kernels, so that ranks on different backends agree on the owners.
            let cost = iteration.newton_schulz().flops(rows, columns, false);
            costs.extend(std::iter::repeat_n(cost, matrices));
        }
    }
    let mut rank_of = balance(&costs, ranks).rank_of.into_iter();
    // In the order in which the costs were listed.
    let owners = parameters.iter().map(|parameter| match parameter.kind {
        OptimizerKind::Muon { stack: [matrices, ..], .. } => Some(rank_of.by_ref().take(matrices).collect()),
        OptimizerKind::AdamW { .. } | OptimizerKind::Other => None,
    });
    owners.collect()
}

/// The ranks that own a part of the elements `start..end` of a parameter, in rank order: `(rank, first, last)`, where the part
/// of the rank is `first..last`, counted from `start`.
pub(super) fn holders(bucket: &Bucket, parameter: usize, start: usize, end: usize) -> Vec<(usize, usize, usize)> {
    let mut holders = Vec::new();
    for (rank, segments) in bucket.parts.iter().enumerate() {
        for segment in segments.iter().filter(|segment| segment.parameter == parameter) {
            let (from, to) = (segment.start.max(start), segment.end.min(end));
            if from < to {
                holders.push((rank, from - start, to - start));
            }
        }
    }
    holders
}

#[cfg(test)]
mod tests {
    use super::*;

    fn examples() -> (Vec<OptimizedParameter>, Optimizers) {
        let muon = |path: &str, stack: [usize; 3]| OptimizedParameter {
            path: path.into(),
            id: ParamId::new(),
            group: "muon".into(),
            shape: stack.to_vec(),
            kind: OptimizerKind::Muon { optimizer: 0, stack },
        };
        let adamw = |path: &str, shape: &[usize]| OptimizedParameter {
            path: path.into(),
            id: ParamId::new(),
            group: "adamw".into(),
            shape: shape.to_vec(),
            kind: OptimizerKind::AdamW { optimizer: 0 },
        };
        let parameters = vec![
            adamw("embedding", &[11, 4]),
            muon("a", [1, 4, 6]),
            adamw("norm", &[4]),
            muon("experts", [5, 4, 3]),
            muon("b", [1, 4, 6]),
        ];
        let optimizers = Optimizers { muon: vec![(MuonConfig::new(), 1.0)], adamw: vec![(AdamWConfig::new(), 1.0)] };
        (parameters, optimizers)
    }

    #[test]
    fn every_element_has_one_owner() {
        let (parameters, optimizers) = examples();
        for form in [DistributedForm::WholeMatrix, DistributedForm::Flat] {
            for ranks in 1..=7 {
                for bucket_elements in [1, 50, 10_000] {
                    let buckets = partition(&parameters, &optimizers, form, ranks, bucket_elements);
                    let order: Vec<usize> = buckets.iter().flat_map(|bucket| bucket.parameters.clone()).collect();
                    assert_eq!(order, [4, 3, 2, 1, 0]);
                    let mut owned: Vec<Vec<u8>> =
                        parameters.iter().map(|parameter| vec![0; parameter.elements()]).collect();
                    for segment in buckets.iter().flat_map(|bucket| bucket.parts.iter().flatten()) {
                        owned[segment.parameter][segment.start..segment.end].iter_mut().for_each(|count| *count += 1);
                    }
                    assert!(owned.iter().flatten().all(|&count| count == 1), "{form:?} {ranks} {bucket_elements}");
                }
            }
        }
    }

    #[test]
    fn matrices_stay_whole_and_flat_parts_are_even() {
        let (parameters, optimizers) = examples();
        let buckets = partition(&parameters, &optimizers, DistributedForm::WholeMatrix, 3, 1000);
        for segment in buckets.iter().flat_map(|bucket| bucket.parts.iter().flatten()) {
            let parameter = &parameters[segment.parameter];
            if matches!(parameter.kind, OptimizerKind::Muon { .. }) {
                assert!(segment.start % parameter.unit() == 0 && segment.end % parameter.unit() == 0);
            }
        }
        let flat = partition(&parameters, &optimizers, DistributedForm::Flat, 3, 1000);
        assert_eq!(flat[0].lengths(), [52, 52, 52]);
        // The third expert, elements 48 to 60 of bucket positions 24 + 24..36, crosses the first cut.
        assert_eq!(holders(&flat[0], 3, 24, 36), [(0, 0, 4), (1, 4, 12)]);
        assert_eq!(holders(&flat[0], 4, 0, 24), [(0, 0, 24)]);
    }
}
