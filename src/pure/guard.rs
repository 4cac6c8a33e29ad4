//! Which addresses a webhook's endpoint may have: the decision about those that a name was resolved to.
//!
//! Guarantees that an IPv4 address is recognised in every IPv6 address that leads to it (mapped, compatible, NAT64,
//! 6to4, Teredo); that `endpoint_deny` beats `endpoint_allow`, and that beats everything else. Leaves to others
//! that exactly the judged addresses are connected to (`names`): a name that is looked up twice may mean two things.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// What is refused when neither list says anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Level {
    /// Link-local addresses and those under which clouds hand out their machines' credentials.
    #[default]
    Metadata,
    /// Whatever is not globally routable unicast.
    Public,
    /// Nothing, the watched CouchDB included.
    Off,
}

/// The words of `endpoint_guard`.
pub const LEVELS: &[&str] = &["metadata", "public", "off"];

impl Level {
    /// The level that a word of [`LEVELS`] names.
    pub fn of_word(word: &str) -> Level {
        match word {
            "public" => Level::Public,
            "off" => Level::Off,
            _ => Level::Metadata,
        }
    }

    /// The word of [`LEVELS`].
    pub fn word(self) -> &'static str {
        match self {
            Level::Metadata => "metadata",
            Level::Public => "public",
            Level::Off => "off",
        }
    }
}

/// A network `10.0.0.0/8`, or one address. An IPv4-mapped one is the IPv4 network that it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    /// Leading bits that count.
    prefix: u32,
}

impl Network {
    /// Reads `10.0.0.0/8`, `fd00::/8`, `192.0.2.7` or `2001:db8::7`.
    ///
    /// # Errors
    /// What was expected; bits behind the prefix must be zero, or something else was meant.
    pub fn parse(text: &str) -> Result<Network, String> {
        let expected =
            "expected networks such as `10.0.0.0/8`, `fd00::/8` or `192.0.2.7`, separated by commas";
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let bare = address.trim_start_matches('[').trim_end_matches(']');
        let ip: IpAddr = bare.parse().map_err(|_| expected.to_owned())?;
        let bits = if ip.is_ipv4() { 32 } else { 128 };
        let prefix = match prefix {
            None => bits,
            Some(text) if !text.starts_with('+') => {
                text.parse().ok().filter(|prefix| *prefix <= bits).ok_or(expected)?
            }
            Some(_) => return Err(expected.to_owned()),
        };
        let network = match ip {
            IpAddr::V6(v6) if prefix >= 96 && v6.to_ipv4_mapped().is_some() => {
                Network { address: ip.to_canonical(), prefix: prefix - 96 }
            }
            _ => Network { address: ip, prefix },
        };
        match network.first() == network.address {
            true => Ok(network),
            false => {
                let first = Network { address: network.first(), ..network };
                Err(format!("expected a network's first address; write `{first}`"))
            }
        }
    }

    /// Whether it holds the address, which must not be an IPv4-mapped one.
    fn holds(&self, ip: IpAddr) -> bool {
        ip.is_ipv4() == self.address.is_ipv4() && Network { address: ip, ..*self }.first() == self.address
    }

    fn first(&self) -> IpAddr {
        match self.address {
            IpAddr::V4(v4) => {
                let mask = u32::MAX.checked_shl(32 - self.prefix).unwrap_or(0);
                Ipv4Addr::from_bits(v4.to_bits() & mask).into()
            }
            IpAddr::V6(v6) => {
                let mask = u128::MAX.checked_shl(128 - self.prefix).unwrap_or(0);
                Ipv6Addr::from_bits(v6.to_bits() & mask).into()
            }
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.address, self.prefix) {
            (IpAddr::V4(v4), 32) => write!(f, "{v4}"),
            (IpAddr::V6(v6), 128) => write!(f, "{v6}"),
            (address, prefix) => write!(f, "{address}/{prefix}"),
        }
    }
}

/// Where the watched CouchDB listens: its host as it is written, and its port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Watched {
    /// In lower case, an IPv6 address without brackets.
    pub host: String,
    /// Of the URL, or its scheme's.
    pub port: u16,
}

/// What one webhook's endpoint may be. The default refuses as [`Level::Metadata`] does and knows no CouchDB.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Guard {
    /// What is refused when neither list says anything.
    pub level: Level,
    /// Let through whatever the level and [`Guard::watched`] say.
    pub allow: Vec<Network>,
    /// Refused whatever else is said.
    pub deny: Vec<Network>,
    /// The watched CouchDB: nobody wants its changes posted to itself.
    pub watched: Option<Watched>,
}

/// Why an address is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// `endpoint_deny` holds it.
    Denied,
    /// It is a link-local address.
    LinkLocal,
    /// A cloud answers there with the credentials of its machine.
    CloudMetadata,
    /// With [`Level::Public`]: not globally routable unicast.
    NotPublic,
    /// The watched CouchDB listens there.
    Watched,
}

impl fmt::Display for Rule {
    /// What it is, and which key to change: fits behind "`192.0.2.7` is refused: ".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Rule::Denied => "`endpoint_deny` lists it",
            Rule::LinkLocal => "a link-local address; `endpoint_allow` lets it through",
            Rule::CloudMetadata => {
                "clouds hand out credentials there; `endpoint_allow` lets it through"
            }
            Rule::NotPublic => {
                "no public address, which `endpoint_guard = public` asks for; `endpoint_allow` lets it through"
            }
            Rule::Watched => "the watched CouchDB listens there; `endpoint_allow` lets it through",
        })
    }
}

/// Addresses beside the link-local ones under which a cloud hands out its machine's credentials or configuration.
///
/// Source: the clouds' own manuals: Alibaba; Azure's WireServer; Oracle Cloud Classic; AWS (instance
/// metadata, Pod Identity); Google; Scaleway.
const METADATA: [Network; 7] = [
    v4([100, 100, 100, 200], 32),
    v4([168, 63, 129, 16], 32),
    v4([192, 0, 0, 192], 32),
    one_of(0xfd00, 0xec2, 0x254),
    one_of(0xfd00, 0xec2, 0x23),
    one_of(0xfd20, 0xce, 0x254),
    one_of(0xfd00, 0x42, 0x42),
];

const LINK_LOCAL: [Network; 2] = [v4([169, 254, 0, 0], 16), v6([0xfe80, 0, 0, 0], 10)];

/// Not global unicast. Of IPv6 only what lies in 2000::/3 or is NAT64 (64:ff9b::/96) is looked up here at all.
///
/// Source: IANA's IPv4 and IPv6 Special-Purpose Address Registries, 2025-10.
const NOT_PUBLIC: [Network; 18] = [
    v4([0, 0, 0, 0], 8),
    v4([10, 0, 0, 0], 8),
    v4([100, 64, 0, 0], 10),
    v4([127, 0, 0, 0], 8),
    v4([169, 254, 0, 0], 16),
    v4([172, 16, 0, 0], 12),
    v4([192, 0, 0, 0], 24),
    v4([192, 0, 2, 0], 24),
    v4([192, 88, 99, 0], 24),
    v4([192, 168, 0, 0], 16),
    v4([198, 18, 0, 0], 15),
    v4([198, 51, 100, 0], 24),
    v4([203, 0, 113, 0], 24),
    v4([224, 0, 0, 0], 4),
    v4([240, 0, 0, 0], 4),
    v6([0x2001, 0, 0, 0], 23),
    v6([0x2001, 0xdb8, 0, 0], 32),
    v6([0x3fff, 0, 0, 0], 20),
];

const NAT64: Network =
    Network { address: IpAddr::V6(Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0, 0)), prefix: 96 };
const NAT64_LOCAL: Network = v6([0x64, 0xff9b, 1, 0], 48);
const SIX_TO_FOUR: Network = v6([0x2002, 0, 0, 0], 16);
const TEREDO: Network = v6([0x2001, 0, 0, 0], 32);
const COMPATIBLE: Network = Network { address: IpAddr::V6(Ipv6Addr::UNSPECIFIED), prefix: 96 };
const GLOBAL_UNICAST: Network = v6([0x2000, 0, 0, 0], 3);

const fn v4([a, b, c, d]: [u8; 4], prefix: u32) -> Network {
    Network { address: IpAddr::V4(Ipv4Addr::new(a, b, c, d)), prefix }
}

const fn v6([a, b, c, d]: [u16; 4], prefix: u32) -> Network {
    Network { address: IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0)), prefix }
}

const fn one_of(a: u16, b: u16, last: u16) -> Network {
    Network { address: IpAddr::V6(Ipv6Addr::new(a, b, 0, 0, 0, 0, 0, last)), prefix: 128 }
}

impl Guard {
    /// Lets everything through.
    pub fn off() -> Guard {
        Guard { level: Level::Off, ..Guard::default() }
    }

    /// The host of the watched CouchDB, when an endpoint of this host (as written, without brackets) and port may
    /// be it: its addresses are then to be known for [`Guard::judge`].
    ///
    /// On ports 80 and 443 one address serves many names, so there a name must be the same to be the same.
    pub fn may_be_watched(&self, host: &str, port: u16) -> Option<&str> {
        let asked = self.level != Level::Off;
        let watched = self.watched.as_ref().filter(|watched| asked && watched.port == port)?;
        let same = watched.host.eq_ignore_ascii_case(host);
        let shared_port = [80, 443].contains(&port) && host.parse::<IpAddr>().is_err();
        (same || !shared_port).then_some(&watched.host)
    }

    /// Judges an address that an endpoint's name was resolved to. `watched` are the addresses of the watched
    /// CouchDB, if [`Guard::may_be_watched`]; on one machine its loopback addresses are all the same.
    ///
    /// # Errors
    /// The rule by which it is refused.
    pub fn judge(&self, ip: IpAddr, watched: &[IpAddr]) -> Result<(), Rule> {
        let ip = ip.to_canonical();
        let any = |networks: &[Network], ip: IpAddr| networks.iter().any(|network| network.holds(ip));
        let mut faces = embedded(ip);
        faces.push(ip);
        if faces.iter().any(|face| any(&self.deny, *face)) {
            return Err(Rule::Denied);
        }
        if self.level == Level::Off || any(&self.allow, ip) {
            return Ok(());
        }
        faces.retain(|face| !any(&self.allow, *face));
        let same = |face: &IpAddr| {
            let same = |other: &IpAddr| {
                let other = other.to_canonical();
                other == *face || (is_this_machine(other) && is_this_machine(*face))
            };
            watched.iter().any(same)
        };
        // The graver rule first, by whichever face.
        let of_any = |rule: &dyn Fn(&IpAddr) -> bool| faces.iter().any(rule);
        if of_any(&same) {
            Err(Rule::Watched)
        } else if of_any(&|face| any(&LINK_LOCAL, *face)) {
            Err(Rule::LinkLocal)
        } else if of_any(&|face| any(&METADATA, *face)) {
            Err(Rule::CloudMetadata)
        } else if self.level == Level::Public && of_any(&|face| !is_public(*face)) {
            Err(Rule::NotPublic)
        } else {
            Ok(())
        }
    }
}

/// Loopback, and the unspecified address, which a socket takes for it.
fn is_this_machine(ip: IpAddr) -> bool {
    ip.is_loopback() || ip.is_unspecified()
}

fn is_public(ip: IpAddr) -> bool {
    let reachable = ip.is_ipv4() || GLOBAL_UNICAST.holds(ip) || NAT64.holds(ip);
    reachable && !NOT_PUBLIC.iter().any(|network| network.holds(ip))
}

/// IPv4 addresses to which an IPv6 address may lead.
///
/// Source: RFC 6052 §2.2 (NAT64; with the local prefix of RFC 8215 the place depends on the prefix's length),
/// RFC 3056 (6to4), RFC 4380 (Teredo: relay, and client with all bits turned), RFC 4291 §2.5.5 (compatible).
fn embedded(ip: IpAddr) -> Vec<IpAddr> {
    let IpAddr::V6(v6) = ip else { return Vec::new() };
    let b = v6.octets();
    let at = |places: [usize; 4]| IpAddr::from(places.map(|place| b[place]));
    let last = at([12, 13, 14, 15]);
    if NAT64_LOCAL.holds(ip) {
        vec![last, at([6, 7, 9, 10]), at([7, 9, 10, 11]), at([9, 10, 11, 12])]
    } else if NAT64.holds(ip) || (COMPATIBLE.holds(ip) && !is_this_machine(ip)) {
        vec![last]
    } else if SIX_TO_FOUR.holds(ip) {
        vec![at([2, 3, 4, 5])]
    } else if TEREDO.holds(ip) {
        vec![at([4, 5, 6, 7]), IpAddr::from([12, 13, 14, 15].map(|place: usize| !b[place]))]
    } else {
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn networks(text: &str) -> Vec<Network> {
        text.split_whitespace().map(|text| Network::parse(text).unwrap()).collect()
    }

    /// What each level makes of an address: `metadata`, then `public`.
    #[track_caller]
    fn check(ip: &str, metadata: Result<(), Rule>, public: Result<(), Rule>) {
        for (level, expected) in [(Level::Metadata, metadata), (Level::Public, public), (Level::Off, Ok(()))]
        {
            let guard = Guard { level, ..Guard::default() };
            assert_eq!(guard.judge(ip.parse().unwrap(), &[]), expected, "{ip} {level:?}");
        }
    }

    #[test]
    fn link_local_and_metadata_addresses_are_refused_in_every_form() {
        let link_local = Err(Rule::LinkLocal);
        for ip in [
            "169.254.169.254",
            "169.254.0.0",
            "169.254.170.2",
            "169.254.255.255",
            "fe80::1",
            "fe80::a9fe:a9fe",
            "febf:ffff::1",
            "::ffff:169.254.169.254",
            "::ffff:a9fe:a9fe",
            "::169.254.169.254",
            "64:ff9b::169.254.169.254",
            "64:ff9b:1::169.254.169.254",
            "64:ff9b:1:a9fe:a9:fe00::",
            "64:ff9b:1:a9:fe:a9fe::",
            "64:ff9b:1:0:a9:fea9:fe00:0",
            "2002:a9fe:a9fe::1",
            // Teredo by its relay, and by its client.
            "2001:0:a9fe:a9fe:0:0:fefe:fefe",
            "2001:0:808:808::5601:5601",
        ] {
            check(ip, link_local, link_local);
        }
        let metadata = Err(Rule::CloudMetadata);
        for ip in [
            "100.100.100.200",
            "168.63.129.16",
            "192.0.0.192",
            "fd00:ec2::254",
            "fd00:ec2::23",
            "fd20:ce::254",
            "fd00:42::42",
            "::ffff:100.100.100.200",
            "64:ff9b::168.63.129.16",
            "2002:a83f:8110::1",
        ] {
            check(ip, metadata, metadata);
        }
    }

    #[test]
    fn public_lets_only_global_unicast_through() {
        for ip in [
            "0.0.0.0",
            "10.0.0.1",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.1",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.0.1",
            "198.18.0.1",
            "198.19.255.255",
            "198.51.100.1",
            "203.0.113.1",
            "224.0.0.1",
            "239.255.255.255",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::2",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "64:ff9b::10.0.0.1",
            "64:ff9b:1::8.8.8.8",
            "100::1",
            "2001::1",
            "2001:1ff::1",
            "2001:db8::1",
            "2002:a00:1::1",
            "3fff:fff::1",
            "5f00::1",
            "fc00::1",
            "fd12:3456::1",
            "fec0::1",
            "ff02::1",
        ] {
            check(ip, Ok(()), Err(Rule::NotPublic));
        }
        for ip in [
            "1.1.1.1",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "169.253.255.255",
            "169.255.0.0",
            "172.15.255.255",
            "172.32.0.0",
            "198.20.0.0",
            "223.255.255.255",
            "2001:200::1",
            "2606:4700::1111",
            "2002:808:808::1",
            "64:ff9b::8.8.8.8",
            "::ffff:8.8.8.8",
            "3fff:1000::1",
        ] {
            check(ip, Ok(()), Ok(()));
        }
    }

    #[test]
    fn deny_beats_allow_and_allow_beats_the_level() {
        let guard = Guard {
            level: Level::Public,
            allow: networks("10.0.0.0/8 169.254.7.7 2002:a01:203::/48 fd00::/8"),
            deny: networks("10.9.0.0/16 8.8.8.8 fd00:bad::/32"),
            watched: None,
        };
        let check = |ip: &str, expected| assert_eq!(guard.judge(ip.parse().unwrap(), &[]), expected, "{ip}");
        check("10.1.2.3", Ok(()));
        check("::ffff:10.1.2.3", Ok(()));
        check("64:ff9b::10.1.2.3", Ok(()));
        check("10.9.2.3", Err(Rule::Denied));
        check("64:ff9b::10.9.2.3", Err(Rule::Denied));
        check("2002:a09:1::1", Err(Rule::Denied));
        check("8.8.8.8", Err(Rule::Denied));
        check("::ffff:8.8.8.8", Err(Rule::Denied));
        check("8.8.4.4", Ok(()));
        check("169.254.7.7", Ok(()));
        check("169.254.7.8", Err(Rule::LinkLocal));
        check("fd00:ec2::254", Ok(()));
        check("fd00:bad::1", Err(Rule::Denied));
        check("192.168.0.1", Err(Rule::NotPublic));
        let off = Guard { level: Level::Off, ..guard.clone() };
        assert_eq!(off.judge("8.8.8.8".parse().unwrap(), &[]), Err(Rule::Denied));
    }

    #[test]
    fn the_watched_couchdb_is_refused_under_each_of_its_addresses() {
        let watched = Some(Watched { host: "couch.example".to_owned(), port: 5984 });
        let guard = Guard { watched, ..Guard::default() };
        let judge = |ip: &str, watched: &str| {
            let watched: Vec<IpAddr> = watched.split(' ').map(|ip| ip.parse().unwrap()).collect();
            guard.judge(ip.parse().unwrap(), &watched)
        };
        assert_eq!(judge("10.0.0.2", "10.0.0.1 10.0.0.2"), Err(Rule::Watched));
        assert_eq!(judge("::ffff:10.0.0.2", "10.0.0.2"), Err(Rule::Watched));
        assert_eq!(judge("10.0.0.3", "10.0.0.1 10.0.0.2"), Ok(()));
        for ip in ["127.0.0.1", "127.1.2.3", "::1", "0.0.0.0", "::", "::ffff:127.0.0.1"] {
            assert_eq!(judge(ip, "127.0.0.1"), Err(Rule::Watched), "{ip}");
            assert_eq!(judge(ip, "10.0.0.1"), Ok(()), "{ip}");
        }
        let loopback: IpAddr = "127.0.0.1".parse().unwrap();
        for allowed in [
            Guard { allow: networks("127.0.0.1"), ..guard.clone() },
            Guard { level: Level::Off, ..guard.clone() },
        ] {
            assert_eq!(allowed.judge(loopback, &["::1".parse().unwrap()]), Ok(()));
        }
        assert_eq!(guard.may_be_watched("anything", 5984), Some("couch.example"));
        assert_eq!(guard.may_be_watched("couch.example", 5985), None);
        let front = Guard { watched: Some(Watched { host: "front".to_owned(), port: 443 }), ..guard };
        assert_eq!(front.may_be_watched("shop.example", 443), None);
        assert_eq!(front.may_be_watched("FRONT", 443), Some("front"));
        assert_eq!(front.may_be_watched("10.0.0.1", 443), Some("front"));
        assert_eq!(Guard::default().may_be_watched("front", 443), None);
    }

    #[test]
    fn networks_are_read_or_refused() {
        let check = |text: &str, expected: &str| {
            let found = match Network::parse(text) {
                Ok(network) => network.to_string(),
                Err(why) => why.rsplit("; ").next().unwrap().split(" such").next().unwrap().to_owned(),
            };
            assert_eq!(found, expected, "{text}");
        };
        check("10.0.0.0/8", "10.0.0.0/8");
        check("0.0.0.0/0", "0.0.0.0/0");
        check("::/0", "::/0");
        check("fd00::/8", "fd00::/8");
        check("192.0.2.7", "192.0.2.7");
        check("192.0.2.7/32", "192.0.2.7");
        check("[::1]", "::1");
        check("::ffff:10.0.0.0/104", "10.0.0.0/8");
        check("10.0.0.1/8", "write `10.0.0.0/8`");
        check("fd00::1/8", "write `fd00::/8`");
        for bad in
            ["", "10.0.0.0/33", "::/129", "10.0.0.0/", "10.0.0.0/+8", "10.0.0", "example.com", "010.0.0.0/8"]
        {
            check(bad, "expected networks");
        }
        let all = Guard { deny: networks("0.0.0.0/0 ::/0"), ..Guard::default() };
        for ip in ["1.2.3.4", "2606:4700::1111"] {
            assert_eq!(all.judge(ip.parse().unwrap(), &[]), Err(Rule::Denied));
        }
    }
}
