//! All that keeps a checkpoint from being loaded, in one message.

use std::collections::BTreeMap;
use std::fmt;

/// How many names of a kind the one-line message spells out.
const SPELLED_OUT: usize = 4;

/// One thing that is wrong with a checkpoint's files.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Problem {
    /// A file that the index names does not exist.
    MissingFile {
        /// The file.
        file: String,
        /// How many tensors the index puts there.
        tensors: usize,
    },
    /// A file cannot be read as safetensors.
    BrokenFile {
        /// The file.
        file: String,
        /// What is wrong with it, as the rest of a sentence.
        problem: String,
    },
    /// The index puts a tensor into a file that does not hold it.
    NotInFile {
        /// The tensor's name.
        tensor: String,
        /// The file.
        file: String,
    },
    /// The model has a parameter that no file holds.
    Missing {
        /// The tensor's name.
        tensor: String,
    },
    /// A file holds a tensor that the model has no parameter for.
    Unexpected {
        /// The tensor's name.
        tensor: String,
        /// The file that holds it.
        file: String,
    },
    /// A tensor has another shape than the model's parameter.
    WrongShape {
        /// The tensor's name.
        tensor: String,
        /// The file that holds it.
        file: String,
        /// Its shape there.
        found: Vec<usize>,
        /// The shape that the configuration asks for.
        expected: Vec<usize>,
    },
    /// A tensor has a dtype that weights are not read from.
    WrongDtype {
        /// The tensor's name.
        tensor: String,
        /// The file that holds it.
        file: String,
        /// The dtype as safetensors spells it.
        dtype: String,
    },
    /// Quantized weights in a way that is not read.
    QuantizedTensor {
        /// The tensor's name.
        tensor: String,
        /// The file that holds it.
        file: String,
        /// Why not, as the rest of a sentence.
        problem: String,
    },
    /// The `quantization_config` asks for what is not followed.
    QuantizationConfig {
        /// What, as a sentence without its full stop.
        problem: String,
    },
    /// Two tensors for one parameter.
    Duplicate {
        /// The one.
        tensor: String,
        /// The other.
        other: String,
    },
    /// The configuration describes a model that these files are far too few for.
    Implausible {
        /// What is wrong, as a clause.
        problem: String,
    },
}

impl Problem {
    /// The file that the problem is in, where it is in one.
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

    /// Whether something is not there, and nothing is wrong with what is.
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

    /// The problem as one item of the list of its kind.
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
                write!(formatter, "`{file}` does not exist; the index puts {tensors} tensors there")
            }
            Self::BrokenFile { file, problem } => write!(formatter, "`{file}` {problem}"),
            Self::NotInFile { tensor, file } => {
                write!(formatter, "`{file}` does not hold `{tensor}`; the index says so")
            }
            Self::Missing { tensor } => write!(formatter, "`{tensor}` is missing"),
            Self::Unexpected { tensor, file } => write!(formatter, "`{tensor}` in `{file}` is unexpected"),
            Self::WrongShape { tensor, file, found, expected } => {
                write!(formatter, "`{tensor}` in `{file}` is {found:?}; `config.json` asks for {expected:?}")
            }
            Self::WrongDtype { tensor, file, dtype } => {
                write!(
                    formatter,
                    "`{tensor}` in `{file}` is {dtype}; weights are read from F32, BF16, F16 and FP8 (E4M3)"
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
            Self::Implausible => "the configuration is implausible".into(),
            Self::QuantizationConfig => "the weights are quantized in a way that is not read".into(),
            Self::MissingFile => plural("shard file is absent", "shard files are absent"),
            Self::BrokenFile => plural("file is broken", "files are broken"),
            Self::NotInFile => plural("tensor is not where the index says", "tensors are not where the index says"),
            Self::Missing => plural("tensor is missing", "tensors are missing"),
            Self::Unexpected => plural("tensor is unexpected", "tensors are unexpected"),
            Self::WrongShape => plural("tensor has the wrong shape", "tensors have the wrong shape"),
            Self::WrongDtype => plural("tensor has a dtype that is not read", "tensors have a dtype that is not read"),
            Self::QuantizedTensor => plural(
                "tensor is quantized in a way that is not read",
                "tensors are quantized in a way that is not read",
            ),
            Self::Duplicate => plural("parameter is there twice", "parameters are there twice"),
        }
    }
}

/// Every problem of a checkpoint. Displays as one line that gives the count of each kind and spells out the first few.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProblemList {
    pub(crate) list: Vec<Problem>,
    /// The `quant_method` of the configuration, where it has one.
    pub(crate) quantized: Option<String>,
}

impl ProblemList {
    /// Each of them.
    pub fn list(&self) -> &[Problem] {
        &self.list
    }

    pub(crate) fn hint(&self) -> Option<String> {
        let any = |kind| self.list.iter().any(|problem| problem.kind() == kind);
        let all = |kinds: &[Kind]| self.list.iter().all(|problem| kinds.contains(&problem.kind()));
        if let Some(method) = &self.quantized
            && (any(Kind::WrongDtype)
                || any(Kind::QuantizedTensor)
                || any(Kind::QuantizationConfig)
                || any(Kind::Unexpected))
        {
            return Some(format!(
                "the configuration speaks of quantized weights (`quant_method` `{method}`); read are FP8 (E4M3) with a scale a \
                 tensor, a row or a block, and INT4 in groups as compressed-tensors packs it; of others take the weights before \
                 they were quantized, or write them in bf16 with the program that quantized them"
            ));
        }
        if any(Kind::WrongDtype) {
            return Some("weights are read from F32, BF16 and F16, and FP8 (E4M3) matrices beside their scales".into());
        }
        if any(Kind::MissingFile) || any(Kind::BrokenFile) {
            return Some("a download that was cut short looks like this: fetch these files again".into());
        }
        let head_missing =
            |problem: &Problem| matches!(problem, Problem::Missing { tensor } if tensor == crate::mapping::names::HEAD);
        if self.list.len() == 1 && self.list.iter().any(head_missing) {
            return Some("if the head is the embedding, set `tie_word_embeddings` to true in `config.json`".into());
        }
        if all(&[Kind::Unexpected]) {
            return Some(
                "the model that `config.json` describes has no place for these tensors: it may be another model's, or the files \
                 hold parts that are not computed here"
                    .into(),
            );
        }
        let is_scale = |problem: &Problem| matches!(problem, Problem::Missing { tensor } if tensor.ends_with(".weight_scale_inv") || tensor.ends_with(".weight_scale"));
        if self.list.iter().all(is_scale) {
            return Some(
                "FP8 matrices are read beside their scales; where they were cast without any, cast them to bf16 with torch first"
                    .into(),
            );
        }
        if all(&[Kind::Missing]) {
            return Some(
                "the files hold less than the model that `config.json` describes; are all of them there?".into(),
            );
        }
        if all(&[Kind::Missing, Kind::Unexpected, Kind::WrongShape, Kind::Implausible]) {
            return Some("`config.json` and the files disagree; are both of the same model?".into());
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
            write!(formatter, "{}: ", kind.title(problems.len()))?;
            let items: Vec<String> = problems.iter().take(SPELLED_OUT).map(|problem| problem.item()).collect();
            formatter.write_str(&items.join(", "))?;
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

    #[test]
    fn long_lists_are_counted_and_cut() {
        let mut list: Vec<Problem> = (0..30).map(|i| Problem::Missing { tensor: format!("t{i}") }).collect();
        list.push(Problem::WrongShape {
            tensor: "w".into(),
            file: "model.safetensors".into(),
            found: vec![2, 3],
            expected: vec![3, 2],
        });
        assert_eq!(
            ProblemList { list, quantized: None }.to_string(),
            "30 tensors are missing: `t0`, `t1`, `t2`, `t3` and 26 more; \
             1 tensor has the wrong shape: `w` is [2, 3], not [3, 2]"
        );
    }
}
