//! Tells systemd how we are: ready, reloading, stopping, alive (sd_notify(3)).
//!
//! Written here and not taken from `sd-notify`: a datagram to a socket named in the environment is thirty lines of
//! std, abstract names included, and the crate's other half (passed sockets, vsock, monotonic time for
//! `Type=notify-reload`, which the systemd of machines with an old CouchDB does not know) is of no use here.
//! Guarantees that a missing or deaf systemd changes nothing. When to say what is left to `daemon`.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use crate::pure::os_daemon::one_line;

/// The way to the service manager; without one every call does nothing.
#[derive(Debug)]
pub struct Systemd {
    to: Option<(UnixDatagram, SocketAddr)>,
    alive_every: Option<Duration>,
}

impl Systemd {
    /// As `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID` say.
    pub fn from_environment() -> Systemd {
        let variable = |name: &str| std::env::var_os(name);
        let number = |name: &str| variable(name)?.to_str()?.parse::<u64>().ok();
        let ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let watchdog_usec = number("WATCHDOG_USEC").filter(|usec| ours && *usec > 0);
        Systemd::new(variable("NOTIFY_SOCKET").map(|name| name.as_bytes().to_vec()), watchdog_usec)
    }

    fn new(socket_name: Option<Vec<u8>>, watchdog_usec: Option<u64>) -> Systemd {
        let to = socket_name.and_then(|name| Some((UnixDatagram::unbound().ok()?, address(&name)?)));
        if let Some((socket, _)) = &to {
            // A full socket must not stop us; the next message says the same.
            let _ = socket.set_nonblocking(true);
        }
        let alive_every = watchdog_usec.filter(|_| to.is_some()).map(|usec| Duration::from_micros(usec) / 2);
        Systemd { to, alive_every }
    }

    /// How often to call [`Systemd::alive`], from the loop whose standstill is to be noticed: half of the watchdog's
    /// limit; `None` when no watchdog runs.
    pub fn alive_every(&self) -> Option<Duration> {
        self.alive_every
    }

    /// Everything runs; also after [`Systemd::reloading`].
    pub fn ready(&self) {
        self.send("READY=1");
    }

    /// A new configuration is being applied.
    pub fn reloading(&self) {
        self.send("RELOADING=1");
    }

    /// The clean end has begun.
    pub fn stopping(&self) {
        self.send("STOPPING=1");
    }

    /// The main loop goes round.
    pub fn alive(&self) {
        self.send("WATCHDOG=1");
    }

    /// One line for `systemctl status`.
    pub fn status(&self, text: &str) {
        self.send(&format!("STATUS={}", one_line(text)));
    }

    fn send(&self, message: &str) {
        if let Some((socket, address)) = &self.to {
            // A systemd that does not listen is not our trouble.
            let _ = socket.send_to_addr(message.as_bytes(), address);
        }
    }
}

/// `/run/systemd/notify`, or `@name` for an abstract one.
fn address(name: &[u8]) -> Option<SocketAddr> {
    match name {
        [b'/', ..] => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(name)).ok(),
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(listener: &UnixDatagram, name: &str) {
        listener.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let systemd = Systemd::new(Some(name.into()), Some(30_000_000));
        assert_eq!(systemd.alive_every(), Some(Duration::from_secs(15)));
        systemd.ready();
        systemd.reloading();
        systemd.alive();
        systemd.status("3 webhooks\nREADY=1");
        systemd.stopping();
        let mut bytes = [0; 256];
        for expected in ["READY=1", "RELOADING=1", "WATCHDOG=1", "STATUS=3 webhooks\\nREADY=1", "STOPPING=1"]
        {
            let n_bytes = listener.recv(&mut bytes).unwrap();
            assert_eq!(std::str::from_utf8(&bytes[..n_bytes]).unwrap(), expected);
        }
    }

    #[test]
    fn messages_arrive_at_a_path_and_at_an_abstract_name() {
        let path = std::env::temp_dir().join(format!("couch-hookd-notify-{}", std::process::id()));
        check(&UnixDatagram::bind(&path).unwrap(), path.to_str().unwrap());
        std::fs::remove_file(&path).unwrap();
        let name = format!("couch-hookd-notify-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        check(&UnixDatagram::bind_addr(&address).unwrap(), &format!("@{name}"));
    }

    #[test]
    fn without_systemd_nothing_happens() {
        for (name, usec) in [(None, Some(1)), (Some(&b"vsock:2:1"[..]), Some(1)), (Some(b"/nowhere"), None)] {
            let systemd = Systemd::new(name.map(<[u8]>::to_vec), usec);
            systemd.ready();
            assert_eq!(systemd.alive_every(), None);
        }
    }
}
