//! The dashboard on a terminal of its own.

#![cfg(target_os = "linux")]

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use common::{Home, checkpoints};
use rustix::process::{ioctl_tiocsctty, setsid};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

/// `moonlight train` on a pseudo-terminal, as a shell starts it.
struct OnTerminal {
    child: Child,
    keys: File,
    screen: Receiver<Vec<u8>>,
    terminal: OwnedFd,
}

impl OnTerminal {
    fn start(home: &Home, name: &str) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let terminal = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        tcsetwinsize(&terminal, Winsize { ws_row: 40, ws_col: 120, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
        let stdio = || Stdio::from(terminal.try_clone().unwrap());
        let mut command = home.train(name, &["--set", "train.steps=1000000", "--set", "train.checkpoint_every=0"]);
        command.stdin(stdio()).stdout(stdio()).stderr(stdio()).env("TERM", "xterm").env_remove("NO_COLOR");
        // SAFETY: both calls are system calls and allocate nothing.
        unsafe {
            command.pre_exec(|| {
                setsid()?;
                ioctl_tiocsctty(rustix::stdio::stdin())?;
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        let keys = File::from(master);
        let mut output = keys.try_clone().unwrap();
        let (sender, screen) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(read @ 1..) = output.read(&mut buffer) {
                if sender.send(buffer[..read].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self { child, keys, screen, terminal }
    }

    /// Reads the screen until it has said all of `words`, in any order.
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

    /// Waits for the end and says the exit code; the terminal is a shell's again.
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

impl Drop for OnTerminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn ctrl_c_under_the_dashboard_saves_and_gives_the_terminal_back() {
    let home = Home::new();
    std::fs::write(home.path("text/not-utf8.txt"), b"no\xfftext").unwrap();
    let mut run = OnTerminal::start(&home, "interrupted");
    let said = run.wait_for(&["Perplexity", "Controls"]);
    // What is to know of the data stands on the terminal's own screen, which comes back at the end.
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
fn killed_from_the_dashboard_it_is_an_error_and_no_panic() {
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
