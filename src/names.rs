//! Host names to addresses, for agents: looked up when there is need, not with every request.
//!
//! `ureq` asks its resolver before every request, also when a pooled connection is about to be used, and where a
//! request has a deadline its own resolver starts a thread for the answer: measured, two thirds of the CPU time of a
//! delivery, and a look-up per delivery for the name server. Guarantees that an address written as such is never
//! looked up, that a name is looked up again after `FRESH` or when [`Names::forget`] says that nobody was met
//! there, and that no request waits longer than its deadline (the look-up itself is `ureq`'s, thread and all).

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use http::Uri;
use http::uri::Authority;
use ureq::config::Config;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::NextTimeout;
use ureq::{Agent, Error};

use crate::socket::Sockets;
use crate::sys;

/// So long an answer is taken to be true; as `nscd` and the JVM have it.
const FRESH: Duration = Duration::from_secs(30);

/// What is known of names, for one agent. Cheap to clone; clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Names {
    /// An agent of ours talks to one host.
    last: Arc<Mutex<Option<Known>>>,
}

#[derive(Debug)]
struct Known {
    authority: Authority,
    addresses: ResolvedSocketAddrs,
    until: Instant,
}

/// An agent with this configuration that looks names up this way. Knows no proxy.
pub fn agent(config: Config, names: &Names) -> Agent {
    Agent::with_parts(config, Sockets::default(), names.clone())
}

impl Names {
    /// Nobody was met at the addresses known: the next request looks the name up again.
    pub fn forget(&self) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn known(&self, authority: &Authority, now: Instant) -> Option<ResolvedSocketAddrs> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let known = last.as_ref().filter(|known| now < known.until && known.authority == *authority);
        known.map(|known| known.addresses.clone())
    }
}

impl Resolver for Names {
    fn resolve(
        &self,
        uri: &Uri,
        config: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, Error> {
        let look_up = || DefaultResolver::default().resolve(uri, config, timeout);
        let Some(authority) = uri.authority() else { return look_up() };
        if let Some(address) = literal(uri, authority) {
            let mut addresses = self.empty();
            addresses.push(address);
            return Ok(addresses);
        }
        let now = sys::now();
        if let Some(addresses) = self.known(authority, now) {
            return Ok(addresses);
        }
        let addresses = look_up()?;
        let known = Known { authority: authority.clone(), addresses: addresses.clone(), until: now + FRESH };
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(known);
        Ok(addresses)
    }
}

/// The address of a URL that names it by number.
fn literal(uri: &Uri, authority: &Authority) -> Option<SocketAddr> {
    let host = authority.host();
    let ip: IpAddr = host.trim_start_matches('[').trim_end_matches(']').parse().ok()?;
    let port = authority.port_u16().or(match uri.scheme_str() {
        Some("http") => Some(80),
        Some("https") => Some(443),
        _ => None,
    })?;
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(names: &Names, url: &str) -> Result<Vec<SocketAddr>, Error> {
        let uri: Uri = url.parse().unwrap();
        let addresses = names.resolve(&uri, &Config::default(), NextTimeout::default())?;
        Ok(addresses.iter().copied().collect())
    }

    #[test]
    fn an_address_is_taken_as_it_is() {
        let check = |url: &str, expected: &str| {
            assert_eq!(resolve(&Names::default(), url).unwrap(), [expected.parse().unwrap()], "{url}");
        };
        check("http://127.0.0.1:5984/x", "127.0.0.1:5984");
        check("http://user:secret@192.0.2.7/", "192.0.2.7:80");
        check("https://192.0.2.7/", "192.0.2.7:443");
        check("https://[2001:db8::1]/", "[2001:db8::1]:443");
        check("http://[::1]:81/", "[::1]:81");
    }

    #[test]
    fn a_name_is_remembered_until_forgotten() {
        let names = Names::default();
        let found = resolve(&names, "http://localhost:7/").unwrap();
        assert!(found.iter().all(|address| address.ip().is_loopback() && address.port() == 7), "{found:?}");
        // What is remembered is what is answered, for this name and no other.
        let elsewhere: SocketAddr = "192.0.2.1:7".parse().unwrap();
        let mut addresses = names.empty();
        addresses.push(elsewhere);
        names.last.lock().unwrap().as_mut().unwrap().addresses = addresses;
        assert_eq!(resolve(&names, "http://localhost:7/").unwrap(), [elsewhere]);
        assert_ne!(resolve(&names, "http://localhost:8/").unwrap(), [elsewhere]);
        resolve(&names, "http://localhost:7/").unwrap();
        names.forget();
        assert_eq!(resolve(&names, "http://localhost:7/").unwrap(), found);
    }

    #[test]
    fn what_is_old_is_looked_up_again() {
        let names = Names::default();
        resolve(&names, "http://localhost:7/").unwrap();
        let authority: Authority = "localhost:7".parse().unwrap();
        let now = sys::now();
        assert!(names.known(&authority, now).is_some());
        assert!(names.known(&authority, now + FRESH).is_none());
    }
}
