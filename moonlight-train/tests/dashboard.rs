//! The dashboard on a pseudo-terminal.

#![cfg(target_os = "linux")]

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::ops::{Deref, DerefMut};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::{Home, checkpoints, hangup_ends_programs};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{ioctl_tiocsctty, setsid};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

/// `moonlight train` on a pseudo-terminal, started as a shell does.
struct OnTerminal {
    child: Running,
    keys: File,
    screen: Receiver<Vec<u8>>,
    terminal: OwnedFd,
    /// Ends the thread that reads the screen, which closes its end of the terminal.
    closed: Arc<AtomicBool>,
    reader: JoinHandle<()>,
}

impl OnTerminal {
    fn start(home: &Home, name: &str) -> Self {
        Self::open(home, name, true)
    }

    /// With `control` it is the controlling terminal of the program, which gets SIGHUP when it closes.
    fn open(home: &Home, name: &str, control: bool) -> Self {
        Self::with(home, name, control, true, 1_000_000)
    }

    /// Without `keys` stdin is not a terminal.
    fn with(home: &Home, name: &str, control: bool, keys: bool, steps: u64) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let terminal = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        tcsetwinsize(&terminal, Winsize { ws_row: 40, ws_col: 120, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
        let stdio = || Stdio::from(terminal.try_clone().unwrap());
        let mut command =
            home.train(name, &["--set", &format!("train.steps={steps}"), "--set", "train.checkpoint_every=0"]);
        command
            .stdin(if keys { stdio() } else { Stdio::null() })
            .stdout(stdio())
            .stderr(stdio())
            .env("TERM", "xterm")
            .env_remove("NO_COLOR");
        // SAFETY: between fork and exec only async-signal-safe calls are allowed; both are system calls and allocate nothing.
        unsafe {
            command.pre_exec(move || {
                setsid()?;
                if control {
                    ioctl_tiocsctty(rustix::stdio::stdin())?;
                }
                Ok(())
            });
        }
        let child = Running(command.spawn().unwrap());
        let keys = File::from(master);
        let mut output = keys.try_clone().unwrap();
        let (sender, screen) = channel();
        let closed = Arc::new(AtomicBool::new(false));
        let close = closed.clone();
        let reader = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            let patience = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
            while !close.load(Ordering::SeqCst) {
                let ready = poll(&mut [PollFd::new(&output, PollFlags::IN)], Some(&patience)).unwrap();
                if ready > 0 {
                    let Ok(read @ 1..) = output.read(&mut buffer) else { break };
                    let _ = sender.send(buffer[..read].to_vec());
                }
            }
        });
        Self { child, keys, screen, terminal, closed, reader }
    }

    /// Closes the terminal, like a lost connection, and returns the program, which keeps running.
    fn close(self) -> Running {
        let Self { child, keys, terminal, closed, reader, .. } = self;
        closed.store(true, Ordering::SeqCst);
        reader.join().unwrap();
        drop((keys, terminal));
        child
    }

    /// Reads the screen until all of `words` appeared, in any order.
    fn wait_for(&self, words: &[&str]) -> String {
        let started = Instant::now();
        let mut said = String::new();
        while !words.iter().all(|word| said.contains(word)) {
            assert!(started.elapsed() < Duration::from_secs(60), "the screen has not said {words:?}: {said}");
            if let Ok(bytes) = self.screen.recv_timeout(Duration::from_secs(1)) {
                said.push_str(&String::from_utf8_lossy(&bytes));
            }
        }
        said
    }

    fn press(&mut self, key: &[u8]) {
        self.keys.write_all(key).unwrap();
    }

    /// Waits for the end and returns the exit code, after checking that the terminal's mode is restored.
    fn end(&mut self) -> Option<i32> {
        let started = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(started.elapsed() < Duration::from_secs(60), "it does not end");
            std::thread::sleep(Duration::from_millis(20));
        };
        let modes = tcgetattr(&self.terminal).unwrap().local_modes;
        assert!(modes.contains(LocalModes::ISIG | LocalModes::ICANON | LocalModes::ECHO), "{modes:?}");
        status.code()
    }
}

/// A process that is killed when the test ends.
struct Running(Child);

impl Deref for Running {
    type Target = Child;

    fn deref(&self) -> &Child {
        &self.0
    }
}

impl DerefMut for Running {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Running {
    fn end(&mut self) -> ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.try_wait().unwrap() {
                return status;
            }
            assert!(started.elapsed() < Duration::from_secs(60), "it does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn ctrl_c_under_the_dashboard_saves_and_restores_the_terminal() {
    let home = Home::new();
    std::fs::write(home.path("text/not-utf8.txt"), b"no\xfftext").unwrap();
    let mut run = OnTerminal::start(&home, "interrupted");
    let said = run.wait_for(&["Perplexity", "Controls"]);
    // Notes about the data are on the main screen, which is visible again at the end.
    let (before, _) = said.split_once("\x1b[?1049h").unwrap();
    assert!(before.contains("data: ") && before.contains("note: data.train: bytes that are not UTF-8"), "{before}");
    std::thread::sleep(Duration::from_millis(500)); // steps under the dashboard
    run.press(b"\x03");
    let said = run.wait_for(&["stopped after step"]);
    assert!(said.contains("\x1b[?1049l"), "the dashboard left its screen: {said}");
    assert_eq!(run.end(), Some(130));
    assert_eq!(checkpoints(&home.run("interrupted")).len(), 1);
}

#[test]
fn a_run_killed_from_the_dashboard_ends_with_an_error_and_without_a_panic() {
    let home = Home::new();
    let mut run = OnTerminal::start(&home, "killed");
    run.wait_for(&["Perplexity", "Controls"]);
    run.press(b"q");
    run.wait_for(&["Kill"]);
    run.press(b"k");
    let said = run.wait_for(&["killed from the dashboard", "--resume"]);
    assert!(!said.contains("panicked"), "{said}");
    assert_eq!(run.end(), Some(1));
}

#[test]
fn a_run_whose_terminal_closes_is_saved() {
    if !hangup_ends_programs() {
        return;
    }
    let home = Home::new();
    let run = OnTerminal::start(&home, "closed");
    run.wait_for(&["Perplexity", "Controls"]);
    let mut run = run.close();
    let status = run.end();
    assert_eq!(status.code(), Some(130), "{status:?}");
    assert_eq!(checkpoints(&home.run("closed")).len(), 1);
}

/// The start of a mouse report. The thread of the dashboard that reads it waits for the rest.
const HALF_A_KEY: &[u8] = b"\x1b[<0;";

#[test]
fn a_run_whose_terminal_closes_within_a_key_is_saved_and_ends() {
    if !hangup_ends_programs() {
        return;
    }
    let home = Home::new();
    let mut run = OnTerminal::start(&home, "within-a-key");
    run.wait_for(&["Perplexity", "Controls"]);
    run.press(HALF_A_KEY);
    std::thread::sleep(Duration::from_millis(500)); // until the dashboard has read it
    let mut run = run.close();
    let status = run.end();
    assert_eq!(status.code(), Some(130), "{status:?}");
    assert_eq!(checkpoints(&home.run("within-a-key")).len(), 1);
}

#[test]
fn a_run_ends_although_the_dashboard_waits_for_the_rest_of_a_key() {
    let home = Home::new();
    let mut run = OnTerminal::start(&home, "half-a-key");
    run.wait_for(&["Perplexity", "Controls"]);
    run.press(HALF_A_KEY);
    std::thread::sleep(Duration::from_millis(500));
    assert!(Command::new("kill").args(["-TERM", &run.child.id().to_string()]).status().unwrap().success());
    let said = run.wait_for(&["stopped after step"]);
    assert!(said.contains("\x1b[?1049l"), "its screen is left: {said}");
    assert_eq!(run.end(), Some(130));
}

#[test]
fn a_run_continues_if_a_terminal_that_does_not_control_it_closes() {
    let home = Home::new();
    let mut run = OnTerminal::open(&home, "unseen", false);
    run.wait_for(&["Perplexity", "Controls"]);
    run.press(HALF_A_KEY);
    std::thread::sleep(Duration::from_millis(500));
    let mut run = run.close();
    let lines = || std::fs::read_to_string(home.run("unseen").join("metrics.jsonl")).unwrap().lines().count();
    let before = lines();
    std::thread::sleep(Duration::from_secs(2));
    assert!(run.try_wait().unwrap().is_none() && lines() > before, "the run continues");
    assert!(Command::new("kill").args(["-TERM", &run.id().to_string()]).status().unwrap().success());
    let status = run.end();
    assert_eq!(status.code(), Some(130), "{status:?}");
    assert_eq!(checkpoints(&home.run("unseen")).len(), 1);
}

/// Under `docker run -t` without `-i`, or as a service whose output is a terminal, no key can be pressed.
#[test]
fn a_terminal_without_keys_gets_log_lines() {
    let home = Home::new();
    let mut run = OnTerminal::with(&home, "no-keys", false, false, 3);
    let said = run.wait_for(&["step: 3/"]);
    assert!(!said.contains("\x1b[?1049h") && !said.contains("panicked"), "{said}");
    assert_eq!(run.end(), Some(0));
}
