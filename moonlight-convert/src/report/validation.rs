//! The problems of a checkpoint, gathered into one message.

use std::collections::BTreeMap;
use std::fmt;

/// How many names of each kind the message lists.
const SPELLED_OUT: usize = 4;

/// A reason why a checkpoint cannot be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Problem {
    /// A file in the index does not exist.
    MissingFile {
        /// The file.
        file: String,
        /// How many tensors the index maps to it.
        tensors: usize,
    },
    /// A weight file is damaged or cannot be read.
    BrokenFile {
        /// The file.
        file: String,
        /// What is wrong with it, as the rest of a sentence.
        problem: String,
    },
    /// The index maps a tensor to a file that does not contain it.
    NotInFile {
        /// The tensor's name.
        tensor: String,
        /// The file.
        file: String,
    },
    /// No file contains a parameter of the model.
    Missing {
        /// The tensor's name.
        tensor: String,
    },
    /// A file contains a tensor for which the model has no parameter.
    Unexpected {
        /// The tensor's name.
        tensor: String,
        /// The file that contains it.
        file: String,
    },
    /// A tensor has a different shape than the model's parameter.
    WrongShape {
        /// The tensor's name.
        tensor: String,
        /// The file that contains it.
        file: String,
        /// Its shape in the file.
        found: Vec<usize>,
        /// The shape that follows from the config.
        expected: Vec<usize>,
    },
    /// A tensor has a dtype that is not supported for weights.
    WrongDtype {
        /// The tensor's name.
        tensor: String,
        /// The file that contains it.
        file: String,
        /// The dtype in the terms of safetensors.
        dtype: String,
    },
    /// A tensor is quantized in an unsupported way.
    QuantizedTensor {
        /// The tensor's name.
        tensor: String,
        /// The file that contains it.
        file: String,
        /// What is unsupported, as the rest of a sentence.
        problem: String,
    },
    /// The `quantization_config` contains something unsupported.
    QuantizationConfig {
        /// What, as a sentence without a full stop.
        problem: String,
    },
    /// Two tensors are the same parameter.
    Duplicate {
        /// The first tensor's name.
        tensor: String,
        /// The second tensor's name.
        other: String,
    },
    /// The config describes a model that these files cannot contain.
    Implausible {
        /// What is implausible, as a clause.
        problem: String,
    },
}

impl Problem {
    /// The affected file, if it is a single one.
    pub fn file(&self) -> Option<&str> {
        match self {
            Self::MissingFile { file, .. }
            | Self::BrokenFile { file, .. }
            | Self::NotInFile { file, .. }
            | Self::Unexpected { file, .. }
            | Self::WrongShape { file, .. }
            | Self::WrongDtype { file, .. }
            | Self::QuantizedTensor { file, .. } => Some(file),
            Self::Missing { .. }
            | Self::Duplicate { .. }
            | Self::Implausible { .. }
            | Self::QuantizationConfig { .. } => None,
        }
    }

    /// Whether the problem is that something is missing.
    pub(crate) fn is_missing(&self) -> bool {
        matches!(self, Self::MissingFile { .. } | Self::Missing { .. })
    }

    fn kind(&self) -> Kind {
        match self {
            Self::QuantizedTensor { .. } => Kind::QuantizedTensor,
            Self::QuantizationConfig { .. } => Kind::QuantizationConfig,
            Self::Implausible { .. } => Kind::Implausible,
            Self::MissingFile { .. } => Kind::MissingFile,
            Self::BrokenFile { .. } => Kind::BrokenFile,
            Self::NotInFile { .. } => Kind::NotInFile,
            Self::Missing { .. } => Kind::Missing,
            Self::Unexpected { .. } => Kind::Unexpected,
            Self::WrongShape { .. } => Kind::WrongShape,
            Self::WrongDtype { .. } => Kind::WrongDtype,
            Self::Duplicate { .. } => Kind::Duplicate,
        }
    }

    /// The problem as an item in the list of its kind.
    fn item(&self) -> String {
        match self {
            Self::MissingFile { file, tensors } => format!("`{file}` ({tensors} tensors)"),
            Self::BrokenFile { file, problem } => format!("`{file}` {problem}"),
            Self::NotInFile { tensor, file } => format!("`{tensor}` (not in `{file}`)"),
            Self::Missing { tensor } | Self::Unexpected { tensor, .. } => format!("`{tensor}`"),
            Self::WrongShape { tensor, found, expected, .. } => format!("`{tensor}` is {found:?}, not {expected:?}"),
            Self::WrongDtype { tensor, dtype, .. } => format!("`{tensor}` is {dtype}"),
            Self::QuantizedTensor { tensor, problem, .. } => format!("`{tensor}` {problem}"),
            Self::Duplicate { tensor, other } => format!("`{tensor}` and `{other}`"),
            Self::Implausible { problem } | Self::QuantizationConfig { problem } => problem.clone(),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MissingFile { file, tensors } => {
                write!(formatter, "`{file}` does not exist; the index maps {tensors} tensors to it")
            }
            Self::BrokenFile { file, problem } => write!(formatter, "`{file}` {problem}"),
            Self::NotInFile { tensor, file } => {
                write!(formatter, "`{file}` does not contain `{tensor}`, which the index maps to it")
            }
            Self::Missing { tensor } => write!(formatter, "`{tensor}` is missing"),
            Self::Unexpected { tensor, file } => write!(formatter, "`{tensor}` in `{file}` is unexpected"),
            Self::WrongShape { tensor, file, found, expected } => {
                write!(formatter, "`{tensor}` in `{file}` has the shape {found:?}; `config.json` requires {expected:?}")
            }
            Self::WrongDtype { tensor, file, dtype } => {
                write!(
                    formatter,
                    "`{tensor}` in `{file}` has the dtype {dtype}; supported are F32, BF16, F16 and F8_E4M3"
                )
            }
            Self::QuantizedTensor { tensor, file, problem } => {
                write!(formatter, "`{tensor}` in `{file}` {problem}")
            }
            Self::Duplicate { tensor, other } => write!(formatter, "`{tensor}` and `{other}` are the same parameter"),
            Self::Implausible { problem } | Self::QuantizationConfig { problem } => formatter.write_str(problem),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Implausible,
    QuantizationConfig,
    MissingFile,
    BrokenFile,
    NotInFile,
    Missing,
    Unexpected,
    WrongShape,
    WrongDtype,
    QuantizedTensor,
    Duplicate,
}

impl Kind {
    fn title(self, count: usize) -> String {
        let plural = |one: &str, many: &str| format!("{count} {}", if count == 1 { one } else { many });
        match self {
            Self::Implausible => "`config.json` is implausible".into(),
            Self::QuantizationConfig => "the quantization is not supported".into(),
            Self::MissingFile => plural("weight file is missing", "weight files are missing"),
            Self::BrokenFile => plural("file is damaged", "files are damaged"),
            Self::NotInFile => plural("tensor is not where the index says", "tensors are not where the index says"),
            Self::Missing => plural("tensor is missing", "tensors are missing"),
            Self::Unexpected => plural("tensor is unexpected", "tensors are unexpected"),
            Self::WrongShape => plural("tensor has the wrong shape", "tensors have the wrong shape"),
            Self::WrongDtype => plural("tensor has an unsupported dtype", "tensors have an unsupported dtype"),
            Self::QuantizedTensor => {
                plural("tensor has an unsupported quantization", "tensors have an unsupported quantization")
            }
            Self::Duplicate => plural("parameter is stored twice", "parameters are stored twice"),
        }
    }
}

/// Every problem of a checkpoint. Displays as one line with the count of each kind and the first few names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProblemList {
    pub(crate) list: Vec<Problem>,
    /// The config's `quant_method`, if it has one.
    pub(crate) quantized: Option<String>,
    /// Whether the config is the metadata of a GGUF file.
    pub(crate) gguf: bool,
}

/// A message about a checkpoint whose config may be the metadata of a GGUF file.
pub(crate) fn about(gguf: bool, message: impl Into<String>) -> String {
    let message = message.into();
    if gguf { message.replace("`config.json`", "the metadata") } else { message }
}

impl ProblemList {
    /// The problems, in the order in which they were found.
    pub fn list(&self) -> &[Problem] {
        &self.list
    }

    pub(crate) fn hint(&self) -> Option<String> {
        self.hint_for_directory().map(|hint| about(self.gguf, hint))
    }

    fn hint_for_directory(&self) -> Option<String> {
        let any = |kind| self.list.iter().any(|problem| problem.kind() == kind);
        let all = |kinds: &[Kind]| self.list.iter().all(|problem| kinds.contains(&problem.kind()));
        // First, because an unsupported quantization may also be the cause of unexpected tensors and wrong dtypes.
        if let Some(method) = &self.quantized
            && (any(Kind::WrongDtype)
                || any(Kind::QuantizedTensor)
                || any(Kind::QuantizationConfig)
                || any(Kind::Unexpected))
        {
            return Some(format!(
                "use the unquantized weights, or write them in bf16 with the program that quantized them (`quant_method` \
                 `{method}`); supported are FP8 (E4M3) with one scale per tensor, row or block, and INT4 and INT8 with one \
                 scale per group in the layout of compressed-tensors (`pack-quantized`)"
            ));
        }
        if any(Kind::WrongDtype) {
            return Some("convert the weights to f32, bf16 or f16; FP8 (E4M3) is read with its scales".into());
        }
        if any(Kind::MissingFile) || any(Kind::BrokenFile) {
            return Some("download these files again; an interrupted download looks like this".into());
        }
        let head_missing =
            |problem: &Problem| matches!(problem, Problem::Missing { tensor } if tensor == crate::mapping::names::HEAD);
        if self.list.len() == 1 && self.list.iter().any(head_missing) {
            return Some("set `tie_word_embeddings` to true in `config.json`, if the head is the embedding".into());
        }
        if all(&[Kind::Unexpected]) {
            return Some(
                "check that `config.json` belongs to these files: its model has no parameters for these tensors, or they \
                 belong to parts that are not supported"
                    .into(),
            );
        }
        let is_scale = |problem: &Problem| matches!(problem, Problem::Missing { tensor } if tensor.ends_with(".weight_scale_inv") || tensor.ends_with(".weight_scale"));
        if self.list.iter().all(is_scale) {
            return Some("cast the matrices to bf16 with torch, if they were cast to FP8 without scales".into());
        }
        if all(&[Kind::Missing]) {
            return Some("check that all files were downloaded and `config.json` belongs to them".into());
        }
        if all(&[Kind::Missing, Kind::Unexpected, Kind::WrongShape, Kind::Implausible]) {
            return Some("check that `config.json` and the files belong to the same model".into());
        }
        None
    }
}

impl fmt::Display for ProblemList {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut kinds: BTreeMap<Kind, Vec<&Problem>> = BTreeMap::new();
        for problem in &self.list {
            kinds.entry(problem.kind()).or_default().push(problem);
        }
        for (index, (kind, problems)) in kinds.into_iter().enumerate() {
            if index > 0 {
                formatter.write_str("; ")?;
            }
            write!(formatter, "{}: ", about(self.gguf, kind.title(problems.len())))?;
            let items: Vec<String> = problems.iter().take(SPELLED_OUT).map(|problem| problem.item()).collect();
            formatter.write_str(&about(self.gguf, items.join(", ")))?;
            if problems.len() > SPELLED_OUT {
                write!(formatter, " and {} more", problems.len() - SPELLED_OUT)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{every_variant, rendered};

    fn examples() -> Vec<Problem> {
        use Problem as P;
        let (tensor, file) = (|| "model.norm.weight".to_owned(), || "model.safetensors".to_owned());
        every_variant!(Problem:
            P::MissingFile { .. } => [P::MissingFile { file: file(), tensors: 12 }],
            P::BrokenFile { .. } => [P::BrokenFile { file: file(), problem: "is truncated".into() }],
            P::NotInFile { .. } => [P::NotInFile { tensor: tensor(), file: file() }],
            P::Missing { .. } => [P::Missing { tensor: tensor() }],
            P::Unexpected { .. } => [P::Unexpected { tensor: tensor(), file: file() }],
            P::WrongShape { .. } => [P::WrongShape {
                tensor: tensor(),
                file: file(),
                found: vec![2, 3],
                expected: vec![3, 2],
            }],
            P::WrongDtype { .. } => [P::WrongDtype { tensor: tensor(), file: file(), dtype: "I8".into() }],
            P::QuantizedTensor { .. } => [P::QuantizedTensor {
                tensor: tensor(),
                file: file(),
                problem: "has weights with zero points".into(),
            }],
            P::QuantizationConfig { .. } => [P::QuantizationConfig {
                problem: "unknown key `quantization_config.new_key`".into(),
            }],
            P::Duplicate { .. } => [P::Duplicate { tensor: tensor(), other: "norm.weight".into() }],
            P::Implausible { .. } => [P::Implausible { problem: "`n_routed_experts` is 1000000".into() }],
        )
    }

    /// Each problem as `inspect` prints it, and as the only one of an error.
    #[test]
    fn messages_and_hints() {
        let text: String = examples()
            .into_iter()
            .map(|problem| {
                let line = format!("problem: {problem}\n");
                let list = ProblemList { list: vec![problem], quantized: None, gguf: false };
                line + &rendered(&list, list.hint())
            })
            .collect();
        insta::assert_snapshot!(text);
    }

    #[test]
    fn the_hint_names_the_quantization_method() {
        let list =
            vec![Problem::WrongDtype { tensor: "w".into(), file: "model.safetensors".into(), dtype: "I8".into() }];
        let list = ProblemList { list, quantized: Some("gptq".into()), gguf: false };
        insta::assert_snapshot!(rendered(&list, list.hint()));
    }

    #[test]
    fn long_lists_are_counted_and_truncated() {
        let mut list: Vec<Problem> = (0..30).map(|i| Problem::Missing { tensor: format!("t{i}") }).collect();
        list.push(Problem::WrongShape {
            tensor: "w".into(),
            file: "model.safetensors".into(),
            found: vec![2, 3],
            expected: vec![3, 2],
        });
        assert_eq!(
            ProblemList { list, quantized: None, gguf: false }.to_string(),
            "30 tensors are missing: `t0`, `t1`, `t2`, `t3` and 26 more; \
             1 tensor has the wrong shape: `w` is [2, 3], not [3, 2]"
        );
    }
}
