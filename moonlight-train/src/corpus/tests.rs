//! Whole corpora of made-up packages.

use std::collections::{BTreeSet, HashMap};

use serde_json::Value;

use super::*;

/// Thirty packages of three files each.
fn packages() -> tempfile::TempDir {
    let home = tempfile::tempdir().unwrap();
    for package in 0..30 {
        let folder = home.path().join(format!("package{package}-1.{package}.0"));
        fs::create_dir_all(folder.join("src/inner")).unwrap();
        for name in ["lib", "inner/mod", "inner/x"] {
            let function = |index: usize| {
                format!(
                    "/// Returns the number {index} of {package} as in {name}.\npub fn number_{index}_of_{package}(a: u8) -> \
                     u{package} {{\n    let first_of_{package} = {index} + a + {package};\n    \
                     first_of_{package}.combine(other_of_{package}, {index})\n}}\n\n"
                )
            };
            let text = format!("//! The file {name} of {package}.\n\n") + &(0..8).map(function).collect::<String>();
            fs::write(folder.join(format!("src/{name}.rs")), text).unwrap();
        }
    }
    home
}

fn options(home: &tempfile::TempDir) -> CorpusOptions {
    CorpusOptions {
        from: vec![home.path().to_owned()],
        extensions: vec!["rs".into()],
        max_bytes: 1_000_000,
        max_folder_bytes: 400_000,
        max_file_bytes: 100_000,
        valid_fraction: 0.3,
        vocab: 350,
        choices: 20,
        conversations: 50,
        seed: 0,
    }
}

fn all_files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => files.extend(all_files(&path)),
            false => drop(files.insert(path.clone(), fs::read(&path).unwrap())),
        }
    }
    files
}

fn read_lines(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn packages_of(lines: &[Value]) -> BTreeSet<String> {
    lines.iter().map(|line| line["path"].as_str().unwrap().split('/').next().unwrap().to_owned()).collect()
}

#[test]
fn a_corpus_has_each_file_once_split_by_package() {
    let (home, output) = (packages(), tempfile::tempdir().unwrap());
    let dir = output.path().join("corpus");
    let report = write_corpus(&options(&home), &dir).unwrap();
    let [train, valid] = ["train", "valid"].map(|split| read_lines(&dir.join(format!("{split}.jsonl"))));
    let (of_train, of_valid) = (packages_of(&train), packages_of(&valid));
    assert_eq!((of_train.len() + of_valid.len(), train.len() + valid.len()), (30, 90));
    assert!(of_train.is_disjoint(&of_valid) && of_valid.len() >= 4, "{of_valid:?}");
    assert_eq!((report.train.packages, report.train.files), (of_train.len() as u64, train.len() as u64));
    assert_eq!((report.valid.packages, report.valid.files), (of_valid.len() as u64, valid.len() as u64));
    assert_eq!(report.left_out, LeftOut::default());
    for line in train.iter().chain(&valid) {
        let (package, inside) = line["path"].as_str().unwrap().split_once('/').unwrap();
        let version = package.strip_prefix("package").unwrap();
        let path = home.path().join(format!("{package}-1.{version}.0")).join(inside);
        assert_eq!(line["text"].as_str().unwrap(), fs::read_to_string(path).unwrap());
    }
    let bytes: usize = valid.iter().map(|line| line["text"].as_str().unwrap().len()).sum();
    assert_eq!(report.valid.bytes, bytes as u64);
    // The tokenizer opens by the name of the folder, and the questions have the counts that are reported.
    let tokenizer = Tokenizer::open(&dir.display().to_string()).unwrap();
    assert_eq!((tokenizer.vocab_size(), tokenizer.eos()), (350, Some(0)));
    let text = valid[0]["text"].as_str().unwrap();
    assert_eq!(tokenizer.decode(&tokenizer.encode(text).unwrap()), text);
    assert!((0.05..0.7).contains(&report.tokenizer.tokens_per_byte), "{}", report.tokenizer.tokens_per_byte);
    assert_eq!(read_lines(&dir.join("choices.jsonl")).len(), report.choices);
    assert_eq!(report.choices, 20);
    let lines = |name: &str| read_lines(&dir.join(format!("conversations/{name}.jsonl"))).len();
    let ConversationCounts { train, valid, exact } = report.conversations;
    assert_eq!((lines("train"), lines("valid"), lines("exact")), (train, valid, exact));
    assert!(train == 50 && valid > 0 && exact > 0, "{:?}", report.conversations);
    let stored: CorpusReport = serde_json::from_slice(&fs::read(dir.join(REPORT)).unwrap()).unwrap();
    assert_eq!(stored.digest, report.digest);
}

#[test]
fn the_same_options_give_the_same_bytes_and_another_seed_does_not() {
    let (home, output) = (packages(), tempfile::tempdir().unwrap());
    let contents = |name: &str, options: &CorpusOptions| {
        let dir = output.path().join(name);
        write_corpus(options, &dir).unwrap();
        let files = all_files(&dir).into_iter();
        files.map(|(path, bytes)| (path.strip_prefix(&dir).unwrap().to_owned(), bytes)).collect::<HashMap<_, _>>()
    };
    let first = contents("a", &options(&home));
    assert_eq!(first.len(), 9);
    assert!(first == contents("b", &options(&home)));
    let other = contents("c", &CorpusOptions { seed: 1, ..options(&home) });
    assert!(first[Path::new("train.jsonl")] != other[Path::new("train.jsonl")]);
}

#[test]
fn files_that_are_no_text_to_learn_from_are_counted_and_left_out() {
    let (home, output) = (packages(), tempfile::tempdir().unwrap());
    let folder = home.path().join("package0-1.0.0");
    let write = |name: &str, contents: &[u8]| {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, contents).unwrap();
    };
    write("src/latin.rs", b"// gr\xF6\xDFer\n");
    write("src/empty.rs", b"\n \n");
    write("src/copy.rs", &fs::read(folder.join("src/lib.rs")).unwrap());
    write("src/made.rs", b"//\n// @generated by a program\n");
    write("src/late.rs", b"//\n//\n//\n//\n//\n// @generated is far from the start\n");
    write("src/long.rs", format!("const A: &str = \"{}\";\n", "a".repeat(2000)).as_bytes());
    write("src/large.rs", "// line\n".repeat(20_000).as_bytes());
    write("src/other.txt", b"text");
    write("tests/all.rs", b"// test\n");
    write("src/.hidden/x.rs", b"// hidden\n");
    fs::create_dir_all(home.path().join("nothing-1.0.0")).unwrap();
    let report = write_corpus(&options(&home), &output.path().join("corpus")).unwrap();
    assert_eq!(report.train.files + report.valid.files, 91);
    let expected = LeftOut {
        packages_without_files: 1,
        folders: 1,
        too_large: 1,
        not_utf8: 1,
        empty: 1,
        generated: 2,
        repeated: 1,
        ..LeftOut::default()
    };
    assert_eq!(report.left_out, expected);
    assert_eq!(report.left_out.reasons().count(), 7);
    // Text files of any other kind are taken from every folder.
    let texts = CorpusOptions { extensions: vec!["txt".into()], valid_fraction: 0.999, ..options(&home) };
    let error = write_corpus(&texts, &output.path().join("texts")).unwrap_err();
    assert!(error.to_string().contains("there is no training text in the 31 packages"), "{error}");
}

#[test]
fn limits_hold_for_packages_and_splits() {
    let home = packages();
    let found = find_packages(&[home.path().to_owned()]).unwrap();
    let one = fs::metadata(home.path().join("package1-1.1.0/src/lib.rs")).unwrap().len();
    let limits = CorpusOptions { max_bytes: 10 * one, max_folder_bytes: one + one / 2, ..options(&home) };
    let collected = collect(&found, &limits).unwrap();
    assert!(collected.train_counts.bytes <= 10 * one && collected.valid_counts.bytes <= 3 * one);
    // A twentieth of the split is less than a file.
    assert_eq!((collected.train_counts.files, collected.train_counts.packages), (0, 0));
    let limits = CorpusOptions { max_bytes: 30 * one, max_folder_bytes: one + one / 2, ..options(&home) };
    let collected = collect(&found, &limits).unwrap();
    let mut of_package = HashMap::new();
    for file in collected.train.iter().chain(&collected.valid) {
        *of_package.entry(file.package.as_str()).or_insert(0) += file.text.len() as u64;
    }
    assert!(of_package.values().all(|bytes| *bytes <= one + one / 2));
    assert_eq!(collected.train_counts.files, collected.train_counts.packages);
    assert!(collected.left_out.over_limit > 0);
}

#[test]
fn an_existing_folder_is_kept_unless_it_is_the_same_corpus() {
    let (home, output) = (packages(), tempfile::tempdir().unwrap());
    let dir = output.path().join("corpus");
    fs::create_dir(&dir).unwrap();
    let report = write_corpus(&options(&home), &dir).unwrap();
    let before = all_files(&dir);
    let again = write_corpus(&options(&home), &dir).unwrap();
    assert_eq!((again.digest, again.files), (report.digest, report.files));
    let refusal = |options: &CorpusOptions, dir: &Path| {
        let error = write_corpus(options, dir).unwrap_err();
        assert_eq!(error.hint().unwrap(), "choose another folder for `--output`, or remove this one");
        error.to_string()
    };
    let other = CorpusOptions { vocab: 300, ..options(&home) };
    assert!(refusal(&other, &dir).ends_with("corpus` contains another corpus"));
    assert!(before == all_files(&dir));
    fs::write(dir.join("choices.jsonl"), "{}").unwrap();
    assert!(refusal(&options(&home), &dir).ends_with("contains this corpus, but `choices.jsonl` was changed"));
    fs::remove_file(dir.join(REPORT)).unwrap();
    assert!(refusal(&options(&home), &dir).ends_with("is not empty and contains no corpus"));
}
