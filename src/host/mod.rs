//! Who started us, and what follows from it: where configuration comes from, where logs go, when to end.

pub mod config_poller;
pub mod ending;
pub mod standalone;
pub mod stdio;
pub mod systemd;
pub mod update_notification;

use std::os::fd::AsFd;

use nix::sys::stat::{SFlag, fstat};

/// How the process was started (DESIGN §3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// By CouchDB's `[os_daemons]`: configuration and logs over stdio; ends with stdin.
    OsDaemon,
    /// By systemd, a container, a person: files or `_config`, stderr; ends with a signal.
    Standalone,
}

impl Mode {
    /// What the bare command means: an os_daemon when stdin and stdout are pipes, as CouchDB makes them; `None`
    /// (print help, exit 2) anywhere else.
    pub fn of_bare_start() -> Option<Mode> {
        is_between_pipes().then_some(Mode::OsDaemon)
    }
}

/// Whether stdin and stdout are pipes, as CouchDB makes them.
pub fn is_between_pipes() -> bool {
    is_pipe(std::io::stdin()) && is_pipe(std::io::stdout())
}

/// Whether an Erlang machine started us: before OTP 19 it is our parent itself, since then its helper is. `false` where
/// there is no `/proc`.
pub fn is_under_erlang() -> bool {
    let name = std::fs::read_to_string(format!("/proc/{}/comm", ending::parent()));
    name.is_ok_and(|name| name.starts_with("beam") || name.starts_with("erl_child_setup"))
}

fn is_pipe(end: impl AsFd) -> bool {
    fstat(end).is_ok_and(|stat| SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFIFO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_is_told_from_a_file_and_a_socket() {
        let (reader, writer) = std::io::pipe().unwrap();
        assert!(is_pipe(&reader) && is_pipe(&writer));
        assert!(!is_pipe(std::fs::File::open("/dev/null").unwrap()));
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(!is_pipe(socket));
    }
}
