//! Who started us, and what follows from it: where configuration comes from, where logs go, when to end.

pub mod config_poller;
pub mod standalone;
pub mod stdio;
pub mod systemd;

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
        (is_pipe(std::io::stdin()) && is_pipe(std::io::stdout())).then_some(Mode::OsDaemon)
    }
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
