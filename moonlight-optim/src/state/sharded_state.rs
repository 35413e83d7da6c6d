//! The file format of optimizer state, and its reader, which also reads Burn's record.
//!
//! | | a file of parts, as [`write_parts`] writes it | Burn's record, as `ModuleOptimizer::save` writes it |
//! |---|---|---|
//! | contents | what one rank owns | everything, each field in one part |
//! | tensor | `path:field:offset`: elements of a field from `offset` on | `id.field` |
//! | scalar | `path:name` | `id.name` |
//! | metadata | `path:field`: the shape of the whole field, as `4,6` | `id`: the path |
//!
//! Both are burnpacks. A reader takes what it needs from any number of files.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use burn::tensor::{Bytes, DType, Shape, Tensor, TensorData};
use burn_pack::{Reader, Scalar, Tensor as Stored, Writer};

use super::StateError;
use crate::MuonConfig;
use crate::muon_adamw::{OptimizedParameter, OptimizerKind};

/// The name under which Burn's record stores a parameter's number of dimensions.
pub(super) const RANK: &str = "__rank";

/// The metadata that marks a file of parts.
const PARTS: &str = "moonlight-optim:parts";

/// A part of a field (such as `momentum`) of a parameter's state.
pub(crate) struct PartToSave {
    pub(crate) path: String,
    pub(crate) field: &'static str,
    /// The shape of the whole field.
    pub(crate) shape: Vec<usize>,
    /// The index in the field of the part's first element.
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
        // Deferred: a tensor is copied from the device when it is written, so that only one at a time is on the host.
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
    /// Index of the parameter.
    pub(crate) parameter: usize,
    /// In elements of the parameter.
    pub(crate) start: usize,
    pub(crate) end: usize,
}

/// The state of the requested pieces.
#[derive(Debug, Default)]
pub(crate) struct Collected {
    pub(crate) fields: BTreeMap<(Piece, String), Values>,
    /// By index of the parameter, then by name.
    pub(crate) scalars: BTreeMap<usize, BTreeMap<String, Scalar>>,
    /// The parameters that have an entry, with or without a tensor.
    pub(crate) present: BTreeSet<usize>,
}

#[derive(Debug)]
pub(crate) struct Values {
    pub(crate) dtype: DType,
    pub(crate) bytes: Vec<u8>,
    /// Elements read so far.
    filled: usize,
    /// The shape of the whole field.
    pub(crate) shape: Vec<usize>,
}

impl Collected {
    /// Takes out a field of a piece; `None` if the files have none.
    pub(crate) fn take(&mut self, piece: Piece, field: &str) -> Option<TensorData> {
        let Values { dtype, bytes, .. } = self.fields.remove(&(piece, field.to_string()))?;
        let elements = bytes.len() / dtype.size();
        Some(TensorData::from_bytes(Bytes::from_bytes_vec(bytes), [elements], dtype))
    }

    /// A scalar of a parameter's state, such as its step; 0 if the files have none.
    pub(crate) fn number(&self, parameter: usize, name: &str) -> usize {
        let scalar = self.scalars.get(&parameter).and_then(|scalars| scalars.get(name));
        scalar.and_then(|scalar| usize::try_from(*scalar).ok()).unwrap_or(0)
    }
}

/// A part of a field in a file.
struct StoredPart {
    path: String,
    field: String,
    shape: Vec<usize>,
    offset: usize,
    stored: Stored,
}

struct FileContents {
    parts: Vec<StoredPart>,
    scalars: BTreeMap<(String, String), Scalar>,
    /// The parameters that it has an entry for.
    paths: BTreeSet<String>,
}

/// Reads the state of `pieces` from files. State of an unknown parameter or in another shape is an error, and so is a piece that
/// the files have only in part. A parameter without state in any file is not: it starts without.
pub(crate) fn collect<P: AsRef<Path>>(
    files: &[P],
    parameters: &[OptimizedParameter],
    muon: &[&MuonConfig],
    pieces: &[Piece],
) -> Result<Collected, StateError> {
    let by_path: HashMap<&str, usize> =
        parameters.iter().enumerate().map(|(index, parameter)| (parameter.path.as_str(), index)).collect();
    let index_of = |path: String| by_path.get(path.as_str()).copied().ok_or(StateError::UnknownParameter { path });
    let mut wanted: HashMap<usize, Vec<Piece>> = HashMap::new();
    for &piece in pieces {
        wanted.entry(piece.parameter).or_default().push(piece);
    }
    let mut collected = Collected::default();
    for file in files {
        let FileContents { mut parts, scalars, paths } = read(file.as_ref())?;
        for path in paths {
            collected.present.insert(index_of(path)?);
        }
        for ((path, name), value) in scalars {
            collected.scalars.entry(index_of(path)?).or_default().insert(name, value);
        }
        // The order in Burn's record is random. Sorting makes an error name the same parameter every time.
        parts.sort_by(|one, other| (&one.path, &one.field, one.offset).cmp(&(&other.path, &other.field, other.offset)));
        for part in parts {
            let parameter = index_of(part.path.clone())?;
            collected.add(part, &parameters[parameter], muon, wanted.get(&parameter).map_or(&[], Vec::as_slice))?;
        }
    }
    check(&collected, parameters, pieces)?;
    Ok(collected)
}

impl Collected {
    /// Copies a stored part into the pieces that overlap with it. Its bytes are not read if none does.
    fn add(
        &mut self,
        part: StoredPart,
        parameter: &OptimizedParameter,
        muon: &[&MuonConfig],
        pieces: &[Piece],
    ) -> Result<(), StateError> {
        let StoredPart { path, field, shape, offset, stored } = part;
        match expected_shape(parameter, muon, &field)? {
            Expected::Any => {}
            Expected::Nothing => return Ok(()),
            Expected::Shape(expected) if shape == expected => {}
            Expected::Shape(expected) => return Err(StateError::Shape { path, found: shape, expected }),
        }
        let dtype = stored.dtype;
        let size = dtype.size();
        let length = stored.shape.num_elements();
        let whole: usize = shape.iter().product();
        let range = |piece: Piece| match parameter.kind {
            // Its fields may have any shape. Only Burn's optimizer loads them, and it needs them whole.
            OptimizerKind::Other => (0, whole),
            _ => (
                field_offset(parameter, &shape, &field, piece.start),
                field_offset(parameter, &shape, &field, piece.end),
            ),
        };
        let overlapping: Vec<(Piece, usize, usize)> = pieces
            .iter()
            .map(|&piece| (piece, range(piece)))
            .filter(|&(_, (start, end))| start < offset + length && offset < end)
            .map(|(piece, (start, end))| (piece, start, end))
            .collect();
        if overlapping.is_empty() {
            return Ok(());
        }
        let bytes = stored.into_bytes()?;
        if bytes.len() != length * size {
            return Err(StateError::Unreadable(format!("the {field} of `{path}` has {} bytes", bytes.len())));
        }
        for (piece, start, end) in overlapping {
            let values = self.fields.entry((piece, field.clone())).or_insert_with(|| Values {
                dtype,
                bytes: vec![0; (end - start) * size],
                filled: 0,
                shape: shape.clone(),
            });
            if values.dtype != dtype {
                return Err(StateError::Unreadable(format!("parts of the {field} of `{path}` differ in dtype")));
            }
            let (from, to) = (start.max(offset), end.min(offset + length));
            values.bytes[(from - start) * size..(to - start) * size]
                .copy_from_slice(&bytes[(from - offset) * size..(to - offset) * size]);
            values.filled += to - from;
        }
        Ok(())
    }
}

/// What a field must be.
enum Expected {
    Shape(Vec<usize>),
    /// Unknown: the field of an optimizer that is neither Muon nor AdamW.
    Any,
    /// Dropped: a second moment that Muon's present settings do not keep.
    Nothing,
}

fn expected_shape(parameter: &OptimizedParameter, muon: &[&MuonConfig], field: &str) -> Result<Expected, StateError> {
    let own = || Ok(Expected::Shape(parameter.shape.clone()));
    match (&parameter.kind, field) {
        (OptimizerKind::Other, _) => Ok(Expected::Any),
        (OptimizerKind::Muon { optimizer, .. }, "second_moment") => {
            Ok(match muon[*optimizer].second_moment_shape(&parameter.shape) {
                Some(shape) => Expected::Shape(shape.to_vec()),
                None => Expected::Nothing,
            })
        }
        (OptimizerKind::Muon { .. }, "momentum")
        | (OptimizerKind::AdamW { .. }, "momentum.moment_1" | "momentum.moment_2") => own(),
        (_, "master") => own(),
        _ => Err(StateError::OtherOptimizer { path: parameter.path.clone(), group: parameter.group.clone() }),
    }
}

/// The index in a field that belongs to an element of the parameter: for a second moment, the first entry of the matrix that
/// has the element.
fn field_offset(parameter: &OptimizedParameter, shape: &[usize], field: &str, element: usize) -> usize {
    match field {
        // `[matrices, ...]`, with a number of second moments per matrix that may differ from its number of elements.
        "second_moment" => element / parameter.unit() * shape[1..].iter().product::<usize>(),
        _ => element,
    }
}

/// Checks that every field is complete and finite, and that every state has the fields of its parameter's optimizer.
fn check(collected: &Collected, parameters: &[OptimizedParameter], pieces: &[Piece]) -> Result<(), StateError> {
    for ((piece, field), values) in &collected.fields {
        let (path, needed) = (&parameters[piece.parameter].path, values.bytes.len() / values.dtype.size());
        if !is_finite(values.dtype, &values.bytes) {
            return Err(StateError::Unreadable(format!("the {field} of `{path}` contains NaN or infinity")));
        }
        if values.filled < needed {
            return Err(StateError::Unreadable(format!("a part of the {field} of `{path}` is missing")));
        }
        if values.filled > needed {
            return Err(StateError::Unreadable(format!("a part of the {field} of `{path}` appears twice")));
        }
    }
    for &piece in pieces {
        let parameter = &parameters[piece.parameter];
        let has = |field: &str| collected.fields.contains_key(&(piece, field.to_string()));
        let needed: &[&str] = match parameter.kind {
            OptimizerKind::Muon { .. } => &["momentum"],
            OptimizerKind::AdamW { .. } => &["momentum.moment_1", "momentum.moment_2"],
            OptimizerKind::Other => &[],
        };
        // A state with some fields, but not all that this optimizer needs, belongs to another optimizer.
        let some = ["momentum", "momentum.moment_1", "momentum.moment_2", "master"].into_iter().any(has);
        if some && !needed.iter().all(|field| has(field)) {
            return Err(StateError::OtherOptimizer { path: parameter.path.clone(), group: parameter.group.clone() });
        }
    }
    Ok(())
}

/// Whether no value is NaN or an infinity, which have all bits of their exponent set. Testing the bits needs no conversion.
fn is_finite(dtype: DType, bytes: &[u8]) -> bool {
    let all_finite =
        |mask: u16| bytes.chunks_exact(2).all(|value| u16::from_le_bytes([value[0], value[1]]) & mask != mask);
    match dtype {
        DType::F32 => bytes
            .chunks_exact(4)
            .all(|value| u32::from_le_bytes([value[0], value[1], value[2], value[3]]) & 0x7f80_0000 != 0x7f80_0000),
        DType::F64 => bytes.chunks_exact(8).all(|value| value[7] & 0x7f != 0x7f || value[6] & 0xf0 != 0xf0),
        DType::BF16 => all_finite(0x7f80),
        DType::F16 => all_finite(0x7c00),
        _ => true,
    }
}

/// Reads a file of either format, except the bytes of tensors, which are read when they are needed.
fn read(file: &Path) -> Result<FileContents, StateError> {
    let reader = Reader::from_file(file)?;
    if reader.metadata().contains_key(PARTS) { read_parts(reader) } else { read_burn(reader) }
}

fn nameless(entry: &str) -> StateError {
    StateError::Nameless { entry: entry.to_string() }
}

/// Reads Burn's record of a `ModuleOptimizer`.
fn read_burn(reader: Reader) -> Result<FileContents, StateError> {
    let (metadata, scalars) = (reader.metadata().clone(), reader.scalars().clone());
    let mut paths = BTreeSet::new();
    for path in metadata.values() {
        if !paths.insert(path.clone()) {
            return Err(StateError::Unreadable(format!("`{path}` appears twice")));
        }
    }
    let key = |entry: &str| {
        let (id, field) = entry.split_once('.').ok_or_else(|| nameless(entry))?;
        let path = metadata.get(id).ok_or_else(|| nameless(entry))?;
        Ok::<_, StateError>((path.clone(), field.to_string()))
    };
    let scalars = scalars
        .iter()
        // Not state: it follows from the parameter's shape.
        .filter(|(name, _)| !name.ends_with(RANK))
        .map(|(name, value)| Ok((key(name)?, *value)))
        .collect::<Result<_, StateError>>()?;
    let parts = reader.into_tensors()?.into_iter().map(|stored| {
        let (path, field) = key(&stored.name)?;
        Ok(StoredPart { path, field, shape: stored.shape.as_slice().to_vec(), offset: 0, stored })
    });
    Ok(FileContents { parts: parts.collect::<Result<_, StateError>>()?, scalars, paths })
}

/// Reads a file that [`write_parts`] wrote.
fn read_parts(reader: Reader) -> Result<FileContents, StateError> {
    let (metadata, scalars) = (reader.metadata().clone(), reader.scalars().clone());
    let scalars = scalars.iter().map(|(name, value)| {
        let (path, field) = name.split_once(':').ok_or_else(|| nameless(name))?;
        Ok(((path.to_string(), field.to_string()), *value))
    });
    let scalars = scalars.collect::<Result<BTreeMap<_, _>, StateError>>()?;
    let parts = reader.into_tensors()?.into_iter().map(|stored| {
        let name = stored.name.rsplit_once(':').and_then(|(key, offset)| {
            let (path, field) = key.split_once(':')?;
            let shape = metadata.get(key)?.split(',').map(str::parse).collect::<Result<Vec<usize>, _>>().ok()?;
            Some((path.to_string(), field.to_string(), shape, offset.parse::<usize>().ok()?))
        });
        let (path, field, shape, offset) = name.ok_or_else(|| nameless(&stored.name))?;
        // The shape comes from the file, and its product may overflow. 0 then makes any part too long.
        let whole = shape.iter().try_fold(1usize, |product, &side| product.checked_mul(side)).unwrap_or(0);
        if offset.checked_add(stored.shape.num_elements()).is_none_or(|end| end > whole) {
            return Err(StateError::Unreadable(format!("`{}` is longer than its field", stored.name)));
        }
        Ok(StoredPart { path, field, shape, offset, stored })
    });
    let parts = parts.collect::<Result<Vec<_>, StateError>>()?;
    let paths = parts.iter().map(|part| part.path.clone()).chain(scalars.keys().map(|(path, _)| path.clone()));
    Ok(FileContents { paths: paths.collect(), parts, scalars })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn non_finite_values_of_every_float_type_are_found() {
        let bytes = |values: [f64; 2]| -> [Vec<u8>; 4] {
            [
                values.iter().flat_map(|value| value.to_le_bytes()).collect(),
                values.iter().flat_map(|value| (*value as f32).to_le_bytes()).collect(),
                values.iter().flat_map(|value| burn::tensor::f16::from_f64(*value).to_le_bytes()).collect(),
                values.iter().flat_map(|value| burn::tensor::bf16::from_f64(*value).to_le_bytes()).collect(),
            ]
        };
        let dtypes = [DType::F64, DType::F32, DType::F16, DType::BF16];
        for (values, finite) in [([1.0, -3e4], true), ([0.0, f64::NAN], false), ([f64::NEG_INFINITY, 1.0], false)] {
            for (dtype, bytes) in dtypes.into_iter().zip(bytes(values)) {
                assert_eq!(is_finite(dtype, &bytes), finite, "{dtype:?} {values:?}");
            }
        }
    }
}
