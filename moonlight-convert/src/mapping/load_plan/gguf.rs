//! The plan for a GGUF file: its tensors are named by `format/gguf/names.rs`, and have the usual shapes, the outermost
//! dimension first.

use moonlight_model::config::{ParameterKind, ParameterShape};

use super::{PlannedParameter, TensorMatcher};
use crate::dtype::conversion::WeightDtype;
use crate::dtype::dequantize::{Encoding, Layout, SourceTensor};
use crate::dtype::gguf_rows::{GgufRows, StoredOrder};
use crate::format::gguf::BlockType;
use crate::format::gguf::dequantize::dtype_of;
use crate::format::gguf::names::{self as gguf, GgufTensor, HeadRows, RowOrder, Values};
use crate::format::shard::FileRange;
use crate::mapping::names::{self, HfTensor};
use crate::report::validation::Problem;

/// A tensor that was found.
struct Found {
    stored_index: usize,
    part: FileRange,
    block_type: BlockType,
    dtype: WeightDtype,
}

impl TensorMatcher<'_> {
    pub(super) fn plan_in_gguf(&mut self, parameter: ParameterShape, wanted: Vec<HfTensor>) -> PlannedParameter {
        let sources = self.match_in_gguf(&parameter, wanted).unwrap_or_default();
        PlannedParameter { parameter, sources }
    }

    fn match_in_gguf(&mut self, parameter: &ParameterShape, wanted: Vec<HfTensor>) -> Option<Vec<SourceTensor>> {
        let transposed = names::transposed(parameter.kind);
        if let Some(alternative) = self.alternative(parameter, &wanted) {
            return self.match_alternative(parameter, wanted, alternative, transposed);
        }
        let tensors = match gguf::tensors_of(self.checkpoint.config(), 0, parameter) {
            Ok(tensors) => tensors,
            Err(problem) => {
                self.problems.push(Problem::Implausible { problem });
                return None;
            }
        };
        // All are looked up before the first return, so that every problem is listed.
        let found: Vec<Option<Found>> = tensors.iter().map(|tensor| self.find_in_gguf(tensor)).collect();
        let order = |tensor: &GgufTensor| match tensor.values {
            Values::Parameter { order, .. } => order,
            Values::RopeFactors(_) => RowOrder::Same,
        };
        let mut found = found.into_iter().collect::<Option<Vec<Found>>>()?.into_iter();
        match (tensors.as_slice(), found.next()?, found.next()) {
            ([key, value], keys, Some(values)) => {
                let (RowOrder::KeyUp(rows), RowOrder::ValueUp(_)) = (order(key), order(value)) else { return None };
                let dtype = keys.dtype.widest(values.dtype);
                let order = StoredOrder::ValueUp { rows, keys: (keys.part, keys.block_type) };
                let rows = GgufRows { block_type: values.block_type, order };
                let tensor = wanted.into_iter().next()?;
                let Found { stored_index, part, .. } = values;
                let encoding = Encoding::Gguf(rows);
                Some(vec![SourceTensor { tensor, stored_index, dtype, part, encoding, transposed }])
            }
            ([tensor], found, None) => {
                let order = order(tensor);
                let length = found.part.range.len() / wanted.len().max(1);
                let source = |(at, tensor): (usize, HfTensor)| {
                    let start = found.part.range.start + at * length;
                    found.source(tensor, start..start + length, stored_order(order), transposed)
                };
                Some(wanted.into_iter().enumerate().map(source).collect())
            }
            _ => None,
        }
    }

    /// The tensor of an older or fused form, if the file has it and not the usual one.
    fn alternative(&self, parameter: &ParameterShape, wanted: &[HfTensor]) -> Option<HfTensor> {
        let name = gguf::alternative(parameter.path_in_layer(), parameter.layer?)?;
        let usual = gguf::tensors_of(self.checkpoint.config(), 0, parameter).ok()?;
        if !self.by_key.contains_key(name.as_str())
            || usual.iter().any(|tensor| self.by_key.contains_key(tensor.name.as_str()))
        {
            return None;
        }
        let shape = match (parameter.kind, wanted.first()?.shape.as_slice()) {
            // Of each expert, the rows of gate, then those of up.
            (ParameterKind::Experts, &[output, input]) => vec![wanted.len(), 2 * output, input],
            (_, shape) => shape.to_vec(),
        };
        Some(HfTensor { name, shape })
    }

    fn match_alternative(
        &mut self,
        parameter: &ParameterShape,
        wanted: Vec<HfTensor>,
        alternative: HfTensor,
        transposed: bool,
    ) -> Option<Vec<SourceTensor>> {
        let found = self.find_usual(alternative)?;
        if parameter.kind != ParameterKind::Experts {
            let (tensor, range) = (wanted.into_iter().next()?, found.part.range.clone());
            return Some(vec![found.source(tensor, range, StoredOrder::Same, transposed)]);
        }
        // Half of the rows of each expert.
        let length = found.part.range.len() / (2 * wanted.len()).max(1);
        let second = usize::from(parameter.path.ends_with("up_proj"));
        let source = |(expert, tensor): (usize, HfTensor)| {
            let start = found.part.range.start + (2 * expert + second) * length;
            found.source(tensor, start..start + length, StoredOrder::Same, transposed)
        };
        Some(wanted.into_iter().enumerate().map(source).collect())
    }

    fn find_in_gguf(&mut self, tensor: &GgufTensor) -> Option<Found> {
        let shape = tensor.shape.iter().rev().copied().collect();
        self.find_usual(HfTensor { name: tensor.name.clone(), shape })
    }

    /// Finds a tensor of a GGUF file; adds a problem if it is missing, or has another shape or type.
    fn find_usual(&mut self, tensor: HfTensor) -> Option<Found> {
        let (stored_index, part) = self.find(&tensor)?;
        let stored = self.stored(stored_index);
        let Some(block_type) = stored.dtype.block_type() else {
            self.wrong_dtype(stored);
            return None;
        };
        // A vector is treated as a column, and a block is part of a row.
        if tensor.shape.len() < 2 && block_type.is_quantized() {
            self.wrong_dtype(stored);
            return None;
        }
        let narrowed = self.checkpoint.narrowed(stored_index);
        let dtype = narrowed.unwrap_or(dtype_of(block_type));
        Some(Found { stored_index, part, block_type, dtype })
    }
}

impl Found {
    fn source(
        &self,
        tensor: HfTensor,
        range: std::ops::Range<usize>,
        order: StoredOrder,
        transposed: bool,
    ) -> SourceTensor {
        let Self { stored_index, block_type, dtype, .. } = *self;
        let as_stored = matches!(
            (block_type, dtype),
            (BlockType::F32, WeightDtype::F32)
                | (BlockType::F16, WeightDtype::F16)
                | (BlockType::Bf16, WeightDtype::Bf16)
        );
        let encoding = match order {
            StoredOrder::Same if as_stored => Encoding::Plain(Layout::HuggingFace),
            order => Encoding::Gguf(GgufRows { block_type, order }),
        };
        let part = FileRange { shard: self.part.shard, range };
        SourceTensor { tensor, stored_index, dtype, part, encoding, transposed }
    }
}

fn stored_order(order: RowOrder) -> StoredOrder {
    match order {
        RowOrder::Rotated(rows) => StoredOrder::Rotated(rows),
        RowOrder::Same | RowOrder::KeyUp(HeadRows { .. }) | RowOrder::ValueUp(_) => StoredOrder::Same,
    }
}

/// The layer of a tensor, `None` if it belongs to none.
pub(super) fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("blk.")?.split_once('.')?.0.parse().ok()
}
