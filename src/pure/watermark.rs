//! How far a feed is finished: the longest unbroken run of finished changes, by order of arrival.
//!
//! Every change gets a running ordinal when it is read; `through_seq` is the seq of the last change before the
//! first unfinished one. A seq is carried, never compared (it differs from request to request, CONTRACT §6).
//! Takes room only for what is unfinished: a change that waits for hours costs one entry, however many others
//! were finished behind it.

use std::collections::BTreeMap;

use crate::pure::seq::Seq;

/// The watermark of one reading of a feed.
#[derive(Debug, Clone)]
pub struct Watermark {
    /// The ordinal that the next change gets.
    next: u64,
    /// The seq of the latest change that had one; where reading began, before the first.
    last: Seq,
    /// Unfinished ordinals, each with the last seq before it.
    unfinished: BTreeMap<u64, Seq>,
}

impl Watermark {
    /// Starts to read behind `since`; ordinals count from `first`, so that those of an earlier reading of the
    /// same feed can never be taken for ours.
    pub fn new(since: Seq, first: u64) -> Watermark {
        Watermark { next: first, last: since, unfinished: BTreeMap::new() }
    }

    /// A change arrived that has to be told; gives its ordinal. `seq` is `None` where CouchDB wrote `null`:
    /// the mark then stays before it until a change with a seq is finished.
    pub fn arrive(&mut self, seq: Option<Seq>) -> u64 {
        let ordinal = self.next;
        self.next += 1;
        let before = match seq {
            Some(seq) => std::mem::replace(&mut self.last, seq),
            None => self.last.clone(),
        };
        self.unfinished.insert(ordinal, before);
        ordinal
    }

    /// A change arrived that is finished already (not wanted, told before), or a page's `last_seq` that counts.
    pub fn arrive_finished(&mut self, seq: Option<Seq>) -> u64 {
        let ordinal = self.next;
        self.next += 1;
        if let Some(seq) = seq {
            self.last = seq;
        }
        ordinal
    }

    /// Marks a change as finished. Unknown and old ordinals are fine.
    pub fn finish(&mut self, ordinal: u64) {
        self.unfinished.remove(&ordinal);
    }

    /// All up to here is finished.
    pub fn through_seq(&self) -> &Seq {
        self.unfinished.first_key_value().map_or(&self.last, |(_, before)| before)
    }

    /// The first ordinal that is not finished: all below it are.
    pub fn first_unfinished(&self) -> u64 {
        self.unfinished.first_key_value().map_or(self.next, |(ordinal, _)| *ordinal)
    }

    /// Where to go on reading: the seq of the latest change that had one.
    pub fn read_seq(&self) -> &Seq {
        &self.last
    }

    /// The ordinal that the next change gets.
    pub fn next_ordinal(&self) -> u64 {
        self.next
    }

    /// Whether this ordinal belongs to this reading and is still open.
    pub fn is_unfinished(&self, ordinal: u64) -> bool {
        self.unfinished.contains_key(&ordinal)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seq(n: usize) -> Seq {
        Seq::from_json(&n.to_string()).unwrap()
    }

    /// All orders in which `n` changes can finish.
    fn permutations(n: usize) -> Vec<Vec<usize>> {
        if n == 0 {
            return vec![vec![]];
        }
        let mut all = Vec::new();
        for shorter in permutations(n - 1) {
            for at in 0..=shorter.len() {
                let mut order = shorter.clone();
                order.insert(at, n - 1);
                all.push(order);
            }
        }
        all
    }

    #[test]
    fn agrees_with_a_naive_model_in_every_order_up_to_six() {
        for n in 0..=6 {
            for order in permutations(n) {
                let mut watermark = Watermark::new(seq(100), 7);
                let ordinals: Vec<u64> = (0..n).map(|i| watermark.arrive(Some(seq(i)))).collect();
                let mut done = vec![false; n];
                assert_eq!(watermark.through_seq(), &seq(100));
                for i in order {
                    watermark.finish(ordinals[i]);
                    done[i] = true;
                    let run = done.iter().take_while(|done| **done).count();
                    let expected = if run == 0 { seq(100) } else { seq(run - 1) };
                    assert_eq!(watermark.through_seq(), &expected);
                    assert_eq!(watermark.first_unfinished(), 7 + run as u64);
                }
            }
        }
    }

    #[test]
    fn a_null_seq_holds_the_mark_before_it() {
        let mut watermark = Watermark::new(seq(0), 0);
        let first = watermark.arrive(Some(seq(1)));
        let second = watermark.arrive(None);
        let third = watermark.arrive(Some(seq(3)));
        watermark.finish(first);
        watermark.finish(second);
        assert_eq!(watermark.through_seq(), &seq(1));
        watermark.finish(third);
        assert_eq!(watermark.through_seq(), &seq(3));
    }

    #[test]
    fn what_is_not_wanted_moves_the_mark_only_when_nothing_before_it_is_open() {
        let mut watermark = Watermark::new(seq(0), 0);
        watermark.arrive_finished(Some(seq(1)));
        assert_eq!(watermark.through_seq(), &seq(1));
        let open = watermark.arrive(Some(seq(2)));
        watermark.arrive_finished(Some(seq(3)));
        assert_eq!(watermark.through_seq(), &seq(1));
        watermark.finish(open);
        assert_eq!(watermark.through_seq(), &seq(3));
    }
}
