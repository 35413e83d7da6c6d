//! The one format of state, and its reader, which also knows Burn's.
//!
//! A file is a burnpack with the parts of the state that one rank holds. A tensor's name is `path:field:offset`, its values
//! are those of the field from element `offset` on, and the metadata `path:field` is the shape of the whole field; scalars
//! are `path:name`. Burn's record (`ModuleOptimizer::save`) has `id.field` for tensors and scalars and the metadata
//! `id` = path; it is read as a file with every field in one part. A reader takes what it needs from any number of files.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use burn::tensor::{Bytes, DType, Shape, Tensor, TensorData};
use burn_pack::{Reader, Scalar, Tensor as Stored, Writer};

use super::StateError;
use crate::MuonConfig;
use crate::muon_adamw::{By, Target};

/// The key under which Burn keeps the rank of a parameter's state.
pub(super) const RANK: &str = "__rank";

/// The metadata that marks a file of parts.
const PARTS: &str = "moonlight-optim:parts";

/// A part of a field of a parameter's state.
pub(crate) struct PartToSave {
    pub(crate) path: String,
    pub(crate) field: &'static str,
    /// Shape of the whole field.
    pub(crate) shape: Vec<usize>,
    pub(crate) offset: usize,
    pub(crate) values: Tensor<1>,
}

/// Writes a file of parts.
pub(crate) fn write_parts(
    path: &Path,
    parts: Vec<PartToSave>,
    scalars: BTreeMap<(String, &'static str), Scalar>,
) -> Result<(), StateError> {
    let mut metadata = BTreeMap::new();
    let tensors = parts.into_iter().map(|PartToSave { path, field, shape, offset, values }| {
        let key = format!("{path}:{field}");
        let (name, dtype, [elements]) = (format!("{key}:{offset}"), values.dtype(), values.dims());
        metadata.insert(key, shape.iter().map(usize::to_string).collect::<Vec<_>>().join(","));
        // Each comes off its device when it is written.
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

/// A segment of a parameter whose state is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Piece {
    pub(crate) target: usize,
    /// In elements of the parameter.
    pub(crate) start: usize,
    pub(crate) end: usize,
}

/// The state of the requested pieces.
#[derive(Debug, Default)]
pub(crate) struct Collected {
    pub(crate) fields: BTreeMap<(Piece, String), Values>,
    /// By target.
    pub(crate) scalars: BTreeMap<usize, BTreeMap<String, Scalar>>,
    /// The targets that have an entry, be it without a tensor.
    pub(crate) present: BTreeSet<usize>,
}

#[derive(Debug)]
pub(crate) struct Values {
    pub(crate) dtype: DType,
    pub(crate) bytes: Vec<u8>,
    /// Elements read so far.
    filled: usize,
    /// Of the whole field.
    pub(crate) shape: Vec<usize>,
}

impl Collected {
    /// A field of a piece.
    pub(crate) fn take(&mut self, piece: Piece, field: &str) -> Option<TensorData> {
        let Values { dtype, bytes, .. } = self.fields.remove(&(piece, field.to_string()))?;
        let elements = bytes.len() / dtype.size();
        Some(TensorData::from_bytes(Bytes::from_bytes_vec(bytes), [elements], dtype))
    }

    /// A whole number beside a target's state.
    pub(crate) fn number(&self, target: usize, name: &str) -> usize {
        let scalar = self.scalars.get(&target).and_then(|scalars| scalars.get(name));
        scalar.and_then(|scalar| usize::try_from(*scalar).ok()).unwrap_or(0)
    }
}

/// A part of a field in a file.
struct Found {
    path: String,
    field: String,
    shape: Vec<usize>,
    offset: usize,
    stored: Stored,
}

/// The content of a file.
struct Contents {
    found: Vec<Found>,
    scalars: BTreeMap<(String, String), Scalar>,
    /// The parameters that it has an entry for.
    paths: BTreeSet<String>,
}

/// The state of `pieces` from files. It is an error if a parameter is not one of the targets, has another shape, or lacks
/// a part of a piece; a parameter without any state is not.
pub(crate) fn collect<P: AsRef<Path>>(
    files: &[P],
    targets: &[Target],
    muon: &[&MuonConfig],
    pieces: &[Piece],
) -> Result<Collected, StateError> {
    let by_path: HashMap<&str, usize> =
        targets.iter().enumerate().map(|(index, target)| (target.path.as_str(), index)).collect();
    let of = |path: String| by_path.get(path.as_str()).copied().ok_or(StateError::UnknownParameter { path });
    let mut wanted: HashMap<usize, Vec<Piece>> = HashMap::new();
    for &piece in pieces {
        wanted.entry(piece.target).or_default().push(piece);
    }
    let mut collected = Collected::default();
    for file in files {
        let Contents { mut found, scalars, paths } = read(file.as_ref())?;
        for path in paths {
            collected.present.insert(of(path)?);
        }
        for ((path, name), value) in scalars {
            collected.scalars.entry(of(path)?).or_default().insert(name, value);
        }
        // The order in Burn's file is random; errors name the first parameter by path.
        found.sort_by(|one, other| (&one.path, &one.field, one.offset).cmp(&(&other.path, &other.field, other.offset)));
        for part in found {
            let target = of(part.path.clone())?;
            collected.add(part, &targets[target], muon, wanted.get(&target).map_or(&[], Vec::as_slice))?;
        }
    }
    check(&collected, targets, pieces)?;
    Ok(collected)
}

impl Collected {
    /// Adds a part of a field to the pieces that need it.
    fn add(&mut self, part: Found, target: &Target, muon: &[&MuonConfig], pieces: &[Piece]) -> Result<(), StateError> {
        let Found { path, field, shape, offset, stored } = part;
        match expected_shape(target, muon, &field)? {
            Expected::Any => {}
            Expected::Nothing => return Ok(()),
            Expected::Shape(expected) if shape == expected => {}
            Expected::Shape(expected) => return Err(StateError::Shape { path, found: shape, expected }),
        }
        let dtype = stored.dtype;
        let size = dtype.size();
        let length = stored.shape.num_elements();
        let whole: usize = shape.iter().product();
        let range = |piece: Piece| match target.by {
            By::Other => (0, whole),
            _ => (field_place(target, &shape, &field, piece.start), field_place(target, &shape, &field, piece.end)),
        };
        let touched: Vec<(Piece, usize, usize)> = pieces
            .iter()
            .map(|&piece| (piece, range(piece)))
            .filter(|&(_, (start, end))| start < offset + length && offset < end)
            .map(|(piece, (start, end))| (piece, start, end))
            .collect();
        if touched.is_empty() {
            return Ok(());
        }
        let bytes = stored.into_bytes()?;
        if bytes.len() != length * size {
            return Err(StateError::Unreadable(format!("the {field} of `{path}` has {} bytes", bytes.len())));
        }
        for (piece, start, end) in touched {
            let values = self.fields.entry((piece, field.clone())).or_insert_with(|| Values {
                dtype,
                bytes: vec![0; (end - start) * size],
                filled: 0,
                shape: shape.clone(),
            });
            if values.dtype != dtype {
                return Err(StateError::Unreadable(format!("parts of the {field} of `{path}` differ in type")));
            }
            let (from, to) = (start.max(offset), end.min(offset + length));
            values.bytes[(from - start) * size..(to - start) * size]
                .copy_from_slice(&bytes[(from - offset) * size..(to - offset) * size]);
            values.filled += to - from;
        }
        Ok(())
    }
}

/// What a field may be.
enum Expected {
    Shape(Vec<usize>),
    /// The state of an optimizer of which nothing is known.
    Any,
    /// A second moment that the Muon of now does not keep: it is dropped.
    Nothing,
}

fn expected_shape(target: &Target, muon: &[&MuonConfig], field: &str) -> Result<Expected, StateError> {
    let own = || Ok(Expected::Shape(target.shape.clone()));
    match (&target.by, field) {
        (By::Other, _) => Ok(Expected::Any),
        (By::Muon { optimizer, .. }, "second_moment") => {
            Ok(match muon[*optimizer].second_moment_shape(&target.shape) {
                Some(shape) => Expected::Shape(shape.to_vec()),
                None => Expected::Nothing,
            })
        }
        (By::Muon { .. }, "momentum") | (By::AdamW { .. }, "momentum.moment_1" | "momentum.moment_2") => own(),
        (_, "master") => own(),
        _ => Err(StateError::OtherOptimizer { path: target.path.clone(), group: target.group.clone() }),
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

/// Every field is complete and finite, and every state is that of its optimizer.
fn check(collected: &Collected, targets: &[Target], pieces: &[Piece]) -> Result<(), StateError> {
    for ((piece, field), values) in &collected.fields {
        let (path, needed) = (&targets[piece.target].path, values.bytes.len() / values.dtype.size());
        if !is_finite(values.dtype, &values.bytes) {
            return Err(StateError::Unreadable(format!("the {field} of `{path}` holds infinite or NaN values")));
        }
        if values.filled < needed {
            return Err(StateError::Unreadable(format!("a part of the {field} of `{path}` is missing")));
        }
        if values.filled > needed {
            return Err(StateError::Unreadable(format!("a part of the {field} of `{path}` is there twice")));
        }
    }
    for &piece in pieces {
        let target = &targets[piece.target];
        let has = |field: &str| collected.fields.contains_key(&(piece, field.to_string()));
        let needed: &[&str] = match target.by {
            By::Muon { .. } => &["momentum"],
            By::AdamW { .. } => &["momentum.moment_1", "momentum.moment_2"],
            By::Other => &[],
        };
        let some = ["momentum", "momentum.moment_1", "momentum.moment_2", "master"].into_iter().any(has);
        if some && !needed.iter().all(|field| has(field)) {
            return Err(StateError::OtherOptimizer { path: target.path.clone(), group: target.group.clone() });
        }
    }
    Ok(())
}

/// Whether no value has all bits of its exponent set, as infinities and NaN have.
fn is_finite(dtype: DType, bytes: &[u8]) -> bool {
    let none16 = |mask: u16| bytes.chunks_exact(2).all(|value| u16::from_le_bytes([value[0], value[1]]) & mask != mask);
    match dtype {
        DType::F32 => bytes
            .chunks_exact(4)
            .all(|value| u32::from_le_bytes([value[0], value[1], value[2], value[3]]) & 0x7f80_0000 != 0x7f80_0000),
        DType::BF16 => none16(0x7f80),
        DType::F16 => none16(0x7c00),
        _ => true,
    }
}

/// Reads a file of either kind; tensors are left in it until they are needed.
fn read(file: &Path) -> Result<Contents, StateError> {
    let reader = Reader::from_file(file)?;
    if reader.metadata().contains_key(PARTS) { read_parts(reader) } else { read_burn(reader) }
}

fn nameless(entry: &str) -> StateError {
    StateError::Nameless { entry: entry.to_string() }
}

/// Burn's record of a `ModuleOptimizer`.
fn read_burn(reader: Reader) -> Result<Contents, StateError> {
    let (metadata, scalars) = (reader.metadata().clone(), reader.scalars().clone());
    let mut paths = BTreeSet::new();
    for path in metadata.values() {
        if !paths.insert(path.clone()) {
            return Err(StateError::Unreadable(format!("`{path}` is there twice")));
        }
    }
    let place = |entry: &str| {
        let (id, field) = entry.split_once('.').ok_or_else(|| nameless(entry))?;
        let path = metadata.get(id).ok_or_else(|| nameless(entry))?;
        Ok::<_, StateError>((path.clone(), field.to_string()))
    };
    let scalars = scalars
        .iter()
        .filter(|(name, _)| !name.ends_with(RANK))
        .map(|(name, value)| Ok((place(name)?, *value)))
        .collect::<Result<_, StateError>>()?;
    let found = reader.into_tensors()?.into_iter().map(|stored| {
        let (path, field) = place(&stored.name)?;
        Ok(Found { path, field, shape: stored.shape.as_slice().to_vec(), offset: 0, stored })
    });
    Ok(Contents { found: found.collect::<Result<_, StateError>>()?, scalars, paths })
}

/// Parts, as [`write_parts`] writes them.
fn read_parts(reader: Reader) -> Result<Contents, StateError> {
    let (metadata, scalars) = (reader.metadata().clone(), reader.scalars().clone());
    let scalars = scalars.iter().map(|(name, value)| {
        let (path, field) = name.split_once(':').ok_or_else(|| nameless(name))?;
        Ok(((path.to_string(), field.to_string()), *value))
    });
    let scalars = scalars.collect::<Result<BTreeMap<_, _>, StateError>>()?;
    let found = reader.into_tensors()?.into_iter().map(|stored| {
        let place = stored.name.rsplit_once(':').and_then(|(key, offset)| {
            let (path, field) = key.split_once(':')?;
            let shape = metadata.get(key)?.split(',').map(str::parse).collect::<Result<Vec<usize>, _>>().ok()?;
            Some((path.to_string(), field.to_string(), shape, offset.parse::<usize>().ok()?))
        });
        let (path, field, shape, offset) = place.ok_or_else(|| nameless(&stored.name))?;
        let whole = shape.iter().try_fold(1usize, |product, &side| product.checked_mul(side)).unwrap_or(0);
        if offset.checked_add(stored.shape.num_elements()).is_none_or(|end| end > whole) {
            return Err(StateError::Unreadable(format!("`{}` is longer than its parameter", stored.name)));
        }
        Ok(Found { path, field, shape, offset, stored })
    });
    let found = found.collect::<Result<Vec<_>, StateError>>()?;
    let paths = found.iter().map(|part| part.path.clone()).chain(scalars.keys().map(|(path, _)| path.clone()));
    Ok(Contents { paths: paths.collect(), found, scalars })
}
