//! Whose a thing is, of several that could have it: rendezvous hashing (highest random weight).
//!
//! Guarantees that all who ask with the same names get the same answer, in every process, on every machine, in every
//! version from now on; that each gets about the same share; and that when one goes only what was its own moves.
//! Source: Thaler and Ravishankar, "A Name-Based Mapping Scheme for Rendezvous", 1996.

/// How much `member` is to have `thing`: the highest of all members has it.
pub fn weight(member: &str, thing: &str) -> u64 {
    // The length in front keeps `a` + `bc` apart from `ab` + `c`.
    let length = (member.len() as u64).to_be_bytes();
    let bytes = length.iter().chain(member.as_bytes()).chain(thing.as_bytes());
    mix(bytes
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)))
}

/// Whether `one` has `thing` rather than `other`; names settle what weighs the same.
pub fn is_before(one: &str, other: &str, thing: &str) -> bool {
    (weight(one, thing), one) > (weight(other, thing), other)
}

/// Spreads what FNV-1a leaves together. Source: the finalizer of `MurmurHash3` (Appleby, public domain).
fn mix(mut hash: u64) -> u64 {
    hash ^= hash >> 33;
    hash = hash.wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash ^= hash >> 33;
    hash = hash.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn owner<'a>(members: &[&'a str], thing: &str) -> &'a str {
        members.iter().copied().max_by_key(|one| (weight(one, thing), *one)).unwrap()
    }

    #[test]
    fn each_of_three_has_its_third_of_3000_databases() {
        for round in 0..50 {
            let names: Vec<String> =
                (0..3).map(|n| format!("daemon:db{}:{}:{round:08x}.1", n + 1, 4_711 + n)).collect();
            let members: Vec<&str> = names.iter().map(String::as_str).collect();
            let mut shares: BTreeMap<&str, usize> = BTreeMap::new();
            for n in 0..3_000 {
                *shares.entry(owner(&members, &format!("tenant-{n}"))).or_default() += 1;
            }
            assert!(shares.len() == 3 && shares.values().all(|n| (850..=1_150).contains(n)), "{shares:?}");
        }
    }

    #[test]
    fn whoever_goes_moves_only_what_was_its_own_and_a_newcomer_takes_only_its_own() {
        let all = ["a", "b", "c", "d"];
        for n in 0..3_000 {
            let thing = format!("tenant-{n}");
            let before = owner(&all, &thing);
            for gone in all {
                let rest: Vec<&str> = all.into_iter().filter(|one| *one != gone).collect();
                let after = owner(&rest, &thing);
                assert!(after == before || before == gone);
            }
        }
    }

    #[test]
    fn what_is_whose_stays_the_same_in_later_versions() {
        assert_eq!(weight("daemon:db1:4711:5f0c12ab.1", "tenant-1"), 16_622_698_751_994_789_845);
        assert_ne!(weight("a", "bc"), weight("ab", "c"));
    }
}
