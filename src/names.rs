//! Host names to addresses, for agents: looked up when there is need, not with every request, and judged.
//!
//! `ureq` asks its resolver before every request, also when a pooled connection is about to be used, and where a
//! request has a deadline its own resolver starts a thread for the answer: measured, two thirds of the CPU time of a
//! delivery, and a look-up per delivery for the name server. Guarantees that an address written as such is never
//! looked up, that a name is looked up again after `FRESH` or when [`Names::forget`] says that nobody was met
//! there, that no request waits longer than its deadline (the look-up itself is `ureq`'s, thread and all), and that
//! an agent connects only to addresses that its [`Guard`] let through: those very ones, so that a name cannot mean one
//! address when it is judged and another when it is connected to.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use http::Uri;
use http::uri::Authority;
use ureq::config::Config;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{NextTimeout, time};
use ureq::{Agent, Error};

use crate::pure::guard::{Guard, Rule};
use crate::socket::Sockets;
use crate::sys;

/// So long an answer is taken to be true; as `nscd` and the JVM have it.
const FRESH: Duration = Duration::from_secs(30);

/// What is known of names, for one agent. Cheap to clone; clones are the same. The default lets every address through.
#[derive(Debug, Clone)]
pub struct Names {
    /// An agent of ours talks to one host. What stands here was let through.
    last: Arc<Mutex<Option<Known>>>,
    guard: Arc<Guard>,
}

impl Default for Names {
    fn default() -> Names {
        Names::guarded(Guard::off())
    }
}

/// No address of the host is let through; this is the first one, and why. Inside `ureq::Error::Other`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    host: String,
    address: IpAddr,
    rule: Rule,
}

impl std::fmt::Display for Refused {
    /// ``the address `10.0.0.7` of `shop.example` is refused: `endpoint_deny` lists it``
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Refused { host, address, rule } = self;
        match host.parse::<IpAddr>() {
            Ok(_) => write!(f, "the address `{address}` is refused: {rule}"),
            Err(_) => write!(f, "the address `{address}` of `{host}` is refused: {rule}"),
        }
    }
}

impl std::error::Error for Refused {}

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
    /// Nothing known yet; addresses that the guard refuses are never connected to.
    pub fn guarded(guard: Guard) -> Names {
        Names { last: Arc::default(), guard: Arc::new(guard) }
    }

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
        let Some(authority) = uri.authority() else { return Err(Error::HostNotFound) };
        let now = sys::now();
        if let Some(addresses) = self.known(authority, now) {
            return Ok(addresses);
        }
        let mut addresses = match literal(uri, authority) {
            Some(address) => {
                let mut addresses = self.empty();
                addresses.push(address);
                addresses
            }
            None => look_up()?,
        };
        self.judge(authority, &mut addresses, config, left(timeout, now))?;
        let known = Known { authority: authority.clone(), addresses: addresses.clone(), until: now + FRESH };
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(known);
        Ok(addresses)
    }
}

impl Names {
    /// Leaves those addresses that the guard lets through.
    ///
    /// # Errors
    /// [`Refused`] when none is left.
    fn judge(
        &self,
        authority: &Authority,
        addresses: &mut ResolvedSocketAddrs,
        config: &Config,
        timeout: NextTimeout,
    ) -> Result<(), Error> {
        if *self.guard == Guard::off() {
            return Ok(());
        }
        let Some(port) = addresses.first().map(SocketAddr::port) else { return Err(Error::HostNotFound) };
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        let watched = match self.guard.may_be_watched(host, port) {
            Some(watched) if watched.eq_ignore_ascii_case(host) => {
                addresses.iter().map(SocketAddr::ip).collect()
            }
            // A name that nobody can look up now is one that we do not get changes from either.
            Some(watched) => ips(watched, config, timeout).unwrap_or_default(),
            None => Vec::new(),
        };
        let mut left = self.empty();
        let mut refused = None;
        for address in addresses.iter() {
            match self.guard.judge(address.ip(), &watched) {
                Ok(()) => left.push(*address),
                Err(rule) if refused.is_none() => {
                    refused = Some(Refused { host: host.to_owned(), address: address.ip(), rule });
                }
                Err(_) => {}
            }
        }
        match refused {
            Some(refused) if left.is_empty() => Err(Error::Other(Box::new(refused))),
            _ => {
                *addresses = left;
                Ok(())
            }
        }
    }
}

/// Addresses of a host without brackets.
fn ips(host: &str, config: &Config, timeout: NextTimeout) -> Option<Vec<IpAddr>> {
    if let Ok(ip) = host.parse() {
        return Some(vec![ip]);
    }
    let uri = format!("http://{host}/").parse().ok()?;
    let found = DefaultResolver::default().resolve(&uri, config, timeout).ok()?;
    Some(found.iter().map(SocketAddr::ip).collect())
}

/// What is left of a time that began then.
fn left(timeout: NextTimeout, began: Instant) -> NextTimeout {
    let after = match timeout.after {
        time::Duration::Exact(after) => time::Duration::Exact(after.saturating_sub(began.elapsed())),
        never => never,
    };
    NextTimeout { after, ..timeout }
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
    use crate::pure::guard::{Level, Network, Watched};

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

    /// Names whose endpoints may be anything but what the lines say.
    fn guarded(allow: &[&str], deny: &[&str], watched: Option<(&str, u16)>) -> Names {
        let networks = |texts: &[&str]| texts.iter().map(|text| Network::parse(text).unwrap()).collect();
        let watched = watched.map(|(host, port)| Watched { host: host.to_owned(), port });
        Names::guarded(Guard {
            level: Level::Metadata,
            allow: networks(allow),
            deny: networks(deny),
            watched,
        })
    }

    #[track_caller]
    fn refused(names: &Names, url: &str, expected: &str) {
        match resolve(names, url) {
            Err(Error::Other(error)) => assert_eq!(error.to_string(), expected, "{url}"),
            other => panic!("{url}: expected a refusal, got {other:?}"),
        }
    }

    #[test]
    fn an_address_that_is_refused_is_never_given() {
        let names = guarded(&[], &[], None);
        let text = "the address `169.254.169.254` is refused: a link-local address; `endpoint_allow` lets it through";
        refused(&names, "http://169.254.169.254/latest", text);
        // Nor from memory.
        refused(&names, "http://169.254.169.254/latest", text);
        refused(
            &names,
            "https://[::ffff:169.254.169.254]/",
            "the address `::ffff:169.254.169.254` is refused: a link-local address; `endpoint_allow` lets it through",
        );
        assert!(resolve(&names, "http://127.0.0.1:7/").is_ok());
        let found = resolve(&Names::default(), "http://localhost:7/").unwrap();
        let denied = guarded(&[], &["127.0.0.0/8", "::1"], None);
        let first = found[0].ip();
        let text = format!("the address `{first}` of `localhost` is refused: `endpoint_deny` lists it");
        refused(&denied, "http://localhost:7/", &text);
        // What is let through is given without what is not.
        let one = guarded(&[], &["::1"], None);
        assert_eq!(resolve(&one, "http://localhost:7/").unwrap(), ["127.0.0.1:7".parse().unwrap()]);
    }

    #[test]
    fn the_watched_couchdb_is_found_under_other_names() {
        let text = "the address `127.0.0.1` is refused: the watched CouchDB listens there; `endpoint_allow` lets it through";
        let names = guarded(&[], &[], Some(("localhost", 5984)));
        refused(&names, "http://127.0.0.1:5984/", text);
        assert!(resolve(&names, "http://127.0.0.1:5985/").is_ok());
        let names = guarded(&["127.0.0.0/8"], &[], Some(("localhost", 5984)));
        assert!(resolve(&names, "http://127.0.0.1:5984/").is_ok());
        let names = guarded(&[], &[], Some(("127.0.0.1", 5984)));
        let found = resolve(&names, "http://localhost:5984/").unwrap_err().to_string();
        assert!(found.contains("of `localhost` is refused: the watched CouchDB"), "{found}");
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
