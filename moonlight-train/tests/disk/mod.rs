//! A simulated power loss: contents that were not synced may be lost, and changes of names may reach the disk in any order.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use moonlight_convert::storage::Call;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A file-system call, with the contents that a sync made durable.
enum Event {
    CreateDir(PathBuf),
    Write(PathBuf),
    SyncFile(PathBuf, Arc<Vec<u8>>),
    SyncDir(PathBuf),
    Rename(PathBuf, PathBuf),
    Exchange(PathBuf, PathBuf),
    RemoveDir(PathBuf),
}

/// The calls of a run.
pub(crate) struct Journal {
    root: PathBuf,
    events: Mutex<Vec<Event>>,
}

/// The state at the moment of the power loss.
pub(crate) struct Lost {
    /// The step of the newest checkpoint whose save had returned.
    pub(crate) saved: Option<u64>,
}

impl Journal {
    /// Records the calls below `root`, which exists and is durable.
    pub(crate) fn new(root: PathBuf) -> Self {
        Self { root, events: Mutex::new(Vec::new()) }
    }

    pub(crate) fn observer(self: Arc<Self>) -> Arc<moonlight_convert::storage::Observer> {
        Arc::new(move |call: Call<'_>| -> io::Result<()> {
            let event = match call {
                Call::CreateDir(path) => Event::CreateDir(path.into()),
                Call::Write(path) => Event::Write(path.into()),
                Call::SyncFile(path) => Event::SyncFile(path.into(), Arc::new(fs::read(path)?)),
                Call::SyncDir(path) => Event::SyncDir(path.into()),
                Call::Rename(from, to) => Event::Rename(from.into(), to.into()),
                Call::Exchange(a, b) => Event::Exchange(a.into(), b.into()),
                Call::RemoveDir(path) => Event::RemoveDir(path.into()),
                Call::Read(_) => return Ok(()),
            };
            self.events.lock().unwrap().push(event);
            Ok(())
        })
    }

    /// Cuts the power at a random moment of the run in `run`, and writes what is left to the folder `to`.
    pub(crate) fn cut(&self, seed: u64, run: &Path, to: &Path) -> Lost {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let events = self.events.lock().unwrap();
        let moment = random.random_range(0..=events.len());
        let mut disk = Disk::default();
        let mut saved = None;
        for event in &events[..moment] {
            disk.apply(event, &self.root);
            // The last call of a save syncs the folder that contains the checkpoint's name.
            if let Event::SyncDir(path) = event
                && path.file_name().is_some_and(|name| name == "checkpoints")
            {
                let checkpoints = disk.find(&relative(path, &self.root)).map(|id| &disk.nodes[id].durable);
                let steps = checkpoints
                    .into_iter()
                    .flatten()
                    .filter_map(|(name, _)| name.to_str()?.strip_prefix("step-")?.parse::<u64>().ok());
                saved = steps.max().max(saved);
            }
        }
        disk.cut(&mut random);
        let _ = fs::remove_dir_all(to);
        if let Some(id) = disk.find(&relative(run, &self.root)) {
            disk.write(id, to, &mut random);
        }
        Lost { saved }
    }
}

fn relative(path: &Path, root: &Path) -> Vec<OsString> {
    path.strip_prefix(root).unwrap().iter().map(ToOwned::to_owned).collect()
}

/// A change of the names in a directory.
#[derive(Clone)]
enum Change {
    Link(OsString, usize),
    Unlink(OsString),
    Rename(OsString, OsString),
    Exchange(OsString, OsString),
}

/// A file or a directory.
#[derive(Default)]
struct Node {
    is_dir: bool,
    /// The names that programs see.
    names: BTreeMap<OsString, usize>,
    /// The names on the disk.
    durable: BTreeMap<OsString, usize>,
    /// Changes since the last sync.
    pending: Vec<Change>,
    /// The contents on the disk, if a sync made them durable.
    contents: Option<Arc<Vec<u8>>>,
}

struct Disk {
    nodes: Vec<Node>,
}

impl Default for Disk {
    fn default() -> Self {
        Self { nodes: vec![Node { is_dir: true, ..Node::default() }] }
    }
}

fn change(names: &mut BTreeMap<OsString, usize>, change: &Change) {
    match change {
        Change::Link(name, id) => {
            names.insert(name.clone(), *id);
        }
        Change::Unlink(name) => {
            names.remove(name);
        }
        Change::Rename(from, to) => {
            if let Some(id) = names.remove(from) {
                names.insert(to.clone(), id);
            }
        }
        Change::Exchange(a, b) => {
            if let (Some(&left), Some(&right)) = (names.get(a), names.get(b)) {
                names.insert(a.clone(), right);
                names.insert(b.clone(), left);
            }
        }
    }
}

impl Disk {
    /// The node at a path that programs see.
    fn find(&self, path: &[OsString]) -> Option<usize> {
        path.iter().try_fold(0, |id, name| self.nodes[id].names.get(name).copied())
    }

    fn parent(&self, path: &[OsString]) -> Option<(usize, OsString)> {
        let (name, parent) = path.split_last()?;
        Some((self.find(parent)?, name.clone()))
    }

    fn add(&mut self, path: &[OsString], is_dir: bool) -> Option<usize> {
        let (parent, name) = self.parent(path)?;
        self.nodes.push(Node { is_dir, ..Node::default() });
        let id = self.nodes.len() - 1;
        self.change(parent, Change::Link(name, id));
        Some(id)
    }

    fn change(&mut self, dir: usize, what: Change) {
        change(&mut self.nodes[dir].names, &what);
        self.nodes[dir].pending.push(what);
    }

    fn apply(&mut self, event: &Event, root: &Path) {
        let path = |path: &Path| relative(path, root);
        match event {
            Event::CreateDir(of) => {
                self.add(&path(of), true);
            }
            Event::Write(of) => {
                // An existing file of this name is truncated, so its durable contents are gone.
                match self.find(&path(of)) {
                    Some(id) => self.nodes[id].contents = None,
                    None => drop(self.add(&path(of), false)),
                }
            }
            Event::SyncFile(of, contents) => {
                let id = self.find(&path(of)).or_else(|| self.add(&path(of), false));
                if let Some(id) = id {
                    self.nodes[id].contents = Some(contents.clone());
                }
            }
            Event::SyncDir(of) => {
                if let Some(id) = self.find(&path(of)) {
                    let node = &mut self.nodes[id];
                    node.durable = node.names.clone();
                    node.pending.clear();
                }
            }
            Event::Rename(from, to) => {
                if let Some((dir, from)) = self.parent(&path(from))
                    && self.nodes[dir].names.contains_key(&from)
                {
                    self.change(dir, Change::Rename(from, to.file_name().unwrap().into()));
                }
            }
            Event::Exchange(a, b) => {
                if let Some((dir, a)) = self.parent(&path(a)) {
                    self.change(dir, Change::Exchange(a, b.file_name().unwrap().into()));
                }
            }
            Event::RemoveDir(of) => {
                if let Some(id) = self.find(&path(of)) {
                    let names: Vec<OsString> = self.nodes[id].names.keys().cloned().collect();
                    names.into_iter().for_each(|name| self.change(id, Change::Unlink(name)));
                    if let Some((dir, name)) = self.parent(&path(of)) {
                        self.change(dir, Change::Unlink(name));
                    }
                }
            }
        }
    }

    /// Any of the changes that are not durable may have reached the disk, in any order.
    fn cut(&mut self, random: &mut ChaCha8Rng) {
        for node in &mut self.nodes {
            let mut pending: Vec<Change> = node.pending.drain(..).collect();
            let share = [0.0, 0.3, 0.7, 1.0][random.random_range(0..4)];
            pending.retain(|_| random.random_bool(share));
            if pending.len() > 1 && random.random_bool(0.3) {
                let (one, other) = (random.random_range(0..pending.len()), random.random_range(0..pending.len()));
                pending.swap(one, other);
            }
            pending.iter().for_each(|pending| change(&mut node.durable, pending));
            node.names = node.durable.clone();
        }
        // A directory whose rename reached the disk in part has one of its two names, and not both.
        let mut seen = BTreeSet::new();
        for node in &mut self.nodes {
            node.names.retain(|_, id| seen.insert(*id));
        }
    }

    fn write(&self, id: usize, to: &Path, random: &mut ChaCha8Rng) {
        let node = &self.nodes[id];
        if node.is_dir {
            fs::create_dir_all(to).unwrap();
            node.names.iter().for_each(|(name, &id)| self.write(id, &to.join(name), random));
            return;
        }
        let lost: &[&[u8]] = &[b"", b"{", &[0; 64]];
        match &node.contents {
            Some(contents) => fs::write(to, contents.as_slice()).unwrap(),
            // Contents that were not synced: any part of them may be on the disk.
            None => fs::write(to, lost[random.random_range(0..lost.len())]).unwrap(),
        }
    }
}
