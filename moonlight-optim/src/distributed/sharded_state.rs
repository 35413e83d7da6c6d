//! The state of an optimizer in files, each with the parts that one worker holds.
//!
//! A file of parts is a burnpack. A tensor's name is `path:field:offset`, its values are those of the field from element
//! `offset` on, and the metadata `path:field` is the shape of the whole field; scalars are `path:name`. The file that a
//! single optimizer writes (`ModuleOptimizer::save`) is read as one with every field in one part. Who reads takes what it
//! needs, from however many files there are.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use burn::tensor::{Bytes, DType, Shape, Tensor, TensorData};
use burn_pack::{Reader, Scalar, Tensor as Stored, Writer};

use super::partition::{By, Target};
use crate::state::RANK;
use crate::{Assignment, BatchedOptimizer, MuonConfig, StateError};

/// The metadata that says that a file has parts.
const PARTS: &str = "moonlight-optim:parts";

/// A part of a field of a parameter's state.
pub(super) struct PartToSave {
    pub(super) path: String,
    pub(super) field: &'static str,
    /// Shape of the whole field.
    pub(super) shape: Vec<usize>,
    pub(super) offset: usize,
    pub(super) values: Tensor<1>,
}

/// Writes a file of parts.
pub(super) fn write_parts(
    path: &Path,
    parts: Vec<PartToSave>,
    scalars: BTreeMap<(String, &'static str), Scalar>,
) -> Result<(), StateError> {
    let mut metadata = BTreeMap::new();
    let tensors = parts.into_iter().map(|PartToSave { path, field, shape, offset, values }| {
        let key = format!("{path}:{field}");
        let (name, dtype, [elements]) = (format!("{key}:{offset}"), values.dtype(), values.dims());
        metadata.insert(key, shape.iter().map(usize::to_string).collect::<Vec<_>>().join(","));
        // Each comes off its device when its turn to be written comes.
        let provider = move || Ok(values.clone().into_data().into_parts().0);
        Stored::deferred(name, dtype, Shape::from([elements]), None, elements * dtype.size(), provider)
    });
    let mut writer = Writer::new(tensors.collect()).with_metadata(PARTS, "1");
    for (key, shape) in &metadata {
        writer = writer.with_metadata(key, shape);
    }
    for ((path, name), value) in scalars {
        writer = writer.with_scalar(&format!("{path}:{name}"), value);
    }
    Ok(writer.write_to_file(path)?)
}

/// A stretch of a parameter whose state is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Piece {
    pub(super) target: usize,
    /// In elements of the parameter.
    pub(super) start: usize,
    pub(super) end: usize,
}

/// The state of the pieces that were asked for.
#[derive(Debug, Default)]
pub(super) struct Collected {
    fields: HashMap<(Piece, String), Values>,
    /// By target.
    pub(super) scalars: HashMap<usize, BTreeMap<String, Scalar>>,
}

#[derive(Debug)]
struct Values {
    dtype: DType,
    bytes: Vec<u8>,
    filled: usize,
    shape: Vec<usize>,
}

impl Collected {
    /// A field of a piece.
    pub(super) fn take(&mut self, piece: Piece, field: &str) -> Option<TensorData> {
        let Values { dtype, bytes, .. } = self.fields.remove(&(piece, field.to_string()))?;
        let elements = bytes.len() / dtype.size();
        Some(TensorData::from_bytes(Bytes::from_bytes_vec(bytes), [elements], dtype))
    }

    /// A whole number beside a target's state.
    pub(super) fn number(&self, target: usize, name: &str) -> usize {
        let scalar = self.scalars.get(&target).and_then(|scalars| scalars.get(name));
        scalar.and_then(|scalar| usize::try_from(*scalar).ok()).unwrap_or(0)
    }
}

/// A field as it lies in a file.
struct Found {
    path: String,
    field: String,
    shape: Vec<usize>,
    offset: usize,
    stored: Stored,
}

/// The state of `pieces` from files. What a module does not train, what has another shape, and a piece of which a part
/// is missing are errors; a parameter without any state is none.
pub(super) fn collect(
    files: &[PathBuf],
    targets: &[Target],
    muons: &[(MuonConfig, f64)],
    pieces: &[Piece],
) -> Result<Collected, StateError> {
    let by_path: HashMap<&str, usize> =
        targets.iter().enumerate().map(|(index, target)| (target.path.as_str(), index)).collect();
    let mut wanted: HashMap<usize, Vec<Piece>> = HashMap::new();
    for &piece in pieces {
        wanted.entry(piece.target).or_default().push(piece);
    }
    let mut collected = Collected::default();
    for file in files {
        let (found, scalars) = read(file)?;
        for ((path, name), value) in scalars {
            let target = *by_path.get(path.as_str()).ok_or(StateError::UnknownParameter { path })?;
            collected.scalars.entry(target).or_default().insert(name, value);
        }
        for Found { path, field, shape, offset, stored } in found {
            let target = *by_path.get(path.as_str()).ok_or(StateError::UnknownParameter { path })?;
            let expected = expected_shape(&targets[target], muons, &field)?;
            // A second moment that is not asked for is dropped at the next step.
            let Some(expected) = expected else { continue };
            if shape != expected {
                let path = targets[target].path.clone();
                return Err(StateError::Shape { path, found: shape, expected });
            }
            let Some(pieces) = wanted.get(&target) else { continue };
            let per_element = |element: usize| field_place(&targets[target], &shape, &field, element);
            let dtype = stored.dtype;
            let size = dtype.size();
            let length = stored.shape.num_elements();
            let touched: Vec<(Piece, usize, usize)> = pieces
                .iter()
                .map(|&piece| (piece, per_element(piece.start), per_element(piece.end)))
                .filter(|&(_, start, end)| start < offset + length && offset < end)
                .collect();
            if touched.is_empty() {
                continue;
            }
            let bytes = stored.into_bytes()?;
            for (piece, start, end) in touched {
                let values = collected.fields.entry((piece, field.clone())).or_insert_with(|| Values {
                    dtype,
                    bytes: vec![0; (end - start) * size],
                    filled: 0,
                    shape: shape.clone(),
                });
                let (from, to) = (start.max(offset), end.min(offset + length));
                values.bytes[(from - start) * size..(to - start) * size]
                    .copy_from_slice(&bytes[(from - offset) * size..(to - offset) * size]);
                values.filled += to - from;
            }
        }
    }
    check(&collected, targets, pieces)?;
    Ok(collected)
}

/// The shape of a field of a target's state, `None` for a second moment that its Muon does not keep.
fn expected_shape(target: &Target, muons: &[(MuonConfig, f64)], field: &str) -> Result<Option<Vec<usize>>, StateError> {
    let other = || StateError::OtherOptimizer { path: target.path.clone(), group: target.group.clone() };
    let own = || Ok(Some(target.shape.clone()));
    match (&target.by, field) {
        (By::Muon { optimizer, .. }, "second_moment") => {
            Ok(muons[*optimizer].0.second_moment_shape(&target.shape).map(|shape| shape.to_vec()))
        }
        (By::Muon { .. }, "momentum") | (By::AdamW { .. }, "momentum.moment_1" | "momentum.moment_2") => own(),
        (_, "master") => own(),
        _ => Err(other()),
    }
}

/// Where the state of a parameter's element begins in a field.
fn field_place(target: &Target, shape: &[usize], field: &str, element: usize) -> usize {
    match field {
        // One for each matrix, of another size than the matrix.
        "second_moment" => element / target.unit() * shape[1..].iter().product::<usize>(),
        _ => element,
    }
}

/// Every field is whole, and every state is that of its optimizer.
fn check(collected: &Collected, targets: &[Target], pieces: &[Piece]) -> Result<(), StateError> {
    for ((piece, field), values) in &collected.fields {
        if values.filled * values.dtype.size() != values.bytes.len() {
            let path = &targets[piece.target].path;
            return Err(StateError::Unreadable(format!("a part of the {field} of `{path}` is missing")));
        }
    }
    for &piece in pieces {
        let target = &targets[piece.target];
        let has = |field: &str| collected.fields.contains_key(&(piece, field.to_string()));
        let needed: &[&str] = match target.by {
            By::Muon { .. } => &["momentum"],
            By::AdamW { .. } => &["momentum.moment_1", "momentum.moment_2"],
        };
        let some = ["momentum", "momentum.moment_1", "momentum.moment_2", "master"].into_iter().any(has);
        if some && !needed.iter().all(|field| has(field)) {
            return Err(StateError::OtherOptimizer { path: target.path.clone(), group: target.group.clone() });
        }
    }
    Ok(())
}

type Scalars = BTreeMap<(String, String), Scalar>;

/// What a file holds, of either kind.
fn read(file: &Path) -> Result<(Vec<Found>, Scalars), StateError> {
    let reader = Reader::from_file(file)?;
    let (metadata, scalars) = (reader.metadata().clone(), reader.scalars().clone());
    let nameless = |entry: &str| StateError::Nameless { entry: entry.to_string() };
    if !metadata.contains_key(PARTS) {
        let path = |entry: &str| {
            let (id, field) = entry.split_once('.').ok_or_else(|| nameless(entry))?;
            let path = metadata.get(id).ok_or_else(|| nameless(entry))?;
            Ok::<_, StateError>((path.clone(), field.to_string()))
        };
        let scalars = scalars
            .iter()
            .filter(|(name, _)| !name.ends_with(RANK))
            .map(|(name, value)| Ok((path(name)?, *value)))
            .collect::<Result<Scalars, StateError>>()?;
        let found = reader.into_tensors()?.into_iter().map(|stored| {
            let (path, field) = path(&stored.name)?;
            Ok(Found { path, field, shape: stored.shape.as_slice().to_vec(), offset: 0, stored })
        });
        return Ok((found.collect::<Result<_, StateError>>()?, scalars));
    }
    let scalars = scalars.iter().map(|(name, value)| {
        let (path, field) = name.split_once(':').ok_or_else(|| nameless(name))?;
        Ok(((path.to_string(), field.to_string()), *value))
    });
    let scalars = scalars.collect::<Result<Scalars, StateError>>()?;
    let found = reader.into_tensors()?.into_iter().map(|stored| {
        let place = stored.name.rsplit_once(':').and_then(|(key, offset)| {
            let (path, field) = key.split_once(':')?;
            let shape = metadata.get(key)?.split(',').map(str::parse).collect::<Result<Vec<usize>, _>>().ok()?;
            Some((path.to_string(), field.to_string(), shape, offset.parse::<usize>().ok()?))
        });
        let (path, field, shape, offset) = place.ok_or_else(|| nameless(&stored.name))?;
        let whole: usize = shape.iter().product();
        if offset.checked_add(stored.shape.num_elements()).is_none_or(|end| end > whole) {
            return Err(StateError::Unreadable(format!("`{}` is longer than its parameter", stored.name)));
        }
        Ok(Found { path, field, shape, offset, stored })
    });
    Ok((found.collect::<Result<_, StateError>>()?, scalars))
}

impl Assignment {
    /// The optimizer of [`Assignment::batched_optimizer`] with the state that the workers of a
    /// [`DistributedOptimizer`](super::DistributedOptimizer) wrote, each into a file of its own, or that a single optimizer
    /// wrote into one.
    ///
    /// # Errors
    ///
    /// See [`StateError`].
    pub fn load_batched_optimizer_parts(&self, files: &[PathBuf]) -> Result<BatchedOptimizer, StateError> {
        let (targets, optimizers) = super::partition::targets(self).map_err(|group| {
            StateError::Unreadable(format!("it is in parts, and the group `{group}` has no state that is"))
        })?;
        let piece = |(target, of): (usize, &Target)| Piece { target, start: 0, end: of.elements() };
        let pieces: Vec<Piece> = targets.iter().enumerate().map(piece).collect();
        let collected = collect(files, &targets, &optimizers.muon, &pieces)?;
        // The identities are those of the file alone: they are matched by path.
        let tensors = collected.fields.into_iter().map(|((piece, field), values)| {
            let name = format!("{}.{field}", piece.target);
            let Values { dtype, bytes, shape, .. } = values;
            Stored::new(name, dtype, Shape::from(shape), None, Bytes::from_bytes_vec(bytes))
        });
        let mut writer = Writer::new(tensors.collect());
        for (target, scalars) in collected.scalars {
            let rank = Scalar::from(targets[target].shape.len());
            writer = writer.with_scalar(&format!("{target}.{RANK}"), rank);
            writer = writer.with_metadata(&target.to_string(), &targets[target].path);
            for (name, value) in scalars {
                writer = writer.with_scalar(&format!("{target}.{name}"), value);
            }
        }
        self.load_batched_optimizer_bytes(writer.into_bytes()?)
    }
}
