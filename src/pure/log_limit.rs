//! Keeps a hosted daemon quiet on stdout: decides which log lines go out, and when.
//!
//! [`BURST`] lines at once, then one every [`PACE`]; a line said again within [`WINDOW`] is counted, not
//! repeated; once a window one line says how much was held back. An error line is never dropped: it waits, and
//! several that wait go out as one. Bounded whatever comes in. A line in flight while CouchDB restarts us can
//! crash its daemon manager (seen on 2.2.0), which is why this exists. Writing is left to `host::stdio`.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use log::Level;

/// Lines that may go out at once after a time of quiet: a start with a dozen webhooks fits.
pub const BURST: u32 = 20;
/// Time between lines after that.
pub const PACE: Duration = Duration::from_millis(500);
/// How long a text counts as said, and how often what was held back is told.
pub const WINDOW: Duration = Duration::from_secs(10);

/// Lines below error that wait for their turn; the next ones are only counted. As many as go out in a window.
const WAITING_MAX: usize = 20;
/// Different error texts that wait; the next ones are only counted, and the count goes out at error level.
const ERRORS_MAX: usize = 200;
/// Different texts remembered as said in this window.
const SAID_MAX: usize = 200;
/// Bytes of error texts in one merged line; leaves room for its head below the codec's limit.
const MERGED_BYTES_MAX: usize = 3_500;
/// Characters of a repeated line that the count shows.
const SHOWN_CHARS_MAX: usize = 80;

/// One log line: what was said, how bad it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// How bad.
    pub level: Level,
    /// What; may still hold line breaks, the codec escapes them.
    pub text: String,
}

/// The machine. Feed it lines, drain [`LogLimit::next_line`], come back at [`LogLimit::next_deadline`].
#[derive(Debug)]
pub struct LogLimit {
    tokens: u32,
    /// When `tokens` was last brought up to date.
    filled: Instant,
    waiting: VecDeque<Line>,
    errors: VecDeque<String>,
    n_errors_not_kept: u64,
    /// What was said in this window, and how often again.
    said: BTreeMap<(Level, String), u64>,
    n_not_shown: u64,
    window_end: Instant,
}

impl LogLimit {
    /// All quiet so far.
    pub fn new(now: Instant) -> LogLimit {
        LogLimit {
            tokens: BURST,
            filled: now,
            waiting: VecDeque::new(),
            errors: VecDeque::new(),
            n_errors_not_kept: 0,
            said: BTreeMap::new(),
            n_not_shown: 0,
            window_end: now + WINDOW,
        }
    }

    /// Somebody logged a line.
    pub fn on_line(&mut self, line: Line) {
        let key = (line.level, line.text);
        if let Some(n_again) = self.said.get_mut(&key) {
            *n_again += 1;
            return;
        }
        let (level, text) = key;
        if level == Level::Error {
            if self.errors.len() == ERRORS_MAX {
                self.n_errors_not_kept += 1;
                return;
            }
            self.errors.push_back(text.clone());
        } else {
            if self.waiting.len() >= WAITING_MAX {
                self.n_not_shown += 1;
                return;
            }
            self.waiting.push_back(Line { level, text: text.clone() });
        }
        if self.said.len() < SAID_MAX {
            self.said.insert((level, text), 0);
        }
    }

    /// So many lines were lost before they came here.
    pub fn on_lost(&mut self, n_lines: u64) {
        self.n_not_shown += n_lines;
    }

    /// The next line to write, if one may go out now; errors first.
    pub fn next_line(&mut self, now: Instant) -> Option<Line> {
        self.fill(now);
        if now >= self.window_end {
            // The count is one line a window and stands outside the pace, so that a flood cannot hide it.
            if let Some(count) = self.end_window(now) {
                return Some(count);
            }
        }
        if self.tokens == 0 {
            return None;
        }
        let line = self.merged_errors().or_else(|| self.waiting.pop_front())?;
        self.tokens -= 1;
        Some(line)
    }

    /// When [`LogLimit::next_line`] may give a line without another one coming in.
    pub fn next_deadline(&self) -> Option<Instant> {
        let waits = !self.waiting.is_empty() || !self.errors.is_empty() || self.n_errors_not_kept > 0;
        let counts = self.n_not_shown > 0 || self.said.values().any(|n_again| *n_again > 0);
        let turn = waits.then(|| if self.tokens > 0 { self.filled } else { self.filled + PACE });
        let count = counts.then_some(self.window_end);
        turn.into_iter().chain(count).min()
    }

    /// Everything that still waits, without regard to the pace: the process ends.
    pub fn drain(&mut self, now: Instant) -> Vec<Line> {
        let mut lines: Vec<Line> = std::iter::from_fn(|| self.merged_errors()).collect();
        lines.extend(self.waiting.drain(..));
        lines.extend(self.end_window(now));
        lines
    }

    fn fill(&mut self, now: Instant) {
        while self.tokens < BURST && now.saturating_duration_since(self.filled) >= PACE {
            self.tokens += 1;
            self.filled += PACE;
        }
        if self.tokens == BURST {
            self.filled = now;
        }
    }

    /// One error as it is, or as many as fit into one line.
    fn merged_errors(&mut self) -> Option<Line> {
        let line = |text| Some(Line { level: Level::Error, text });
        let Some(first) = self.errors.pop_front() else {
            let n_not_kept = std::mem::take(&mut self.n_errors_not_kept);
            return if n_not_kept > 0 { line(format!("{n_not_kept} more errors")) } else { None };
        };
        let mut texts = vec![first];
        let mut n_bytes = texts[0].len();
        while let Some(next) = self.errors.front() {
            n_bytes += next.len() + 3;
            if n_bytes > MERGED_BYTES_MAX {
                break;
            }
            texts.extend(self.errors.pop_front());
        }
        if texts.len() == 1 {
            return line(texts.remove(0));
        }
        line(format!("{} errors: {}", texts.len(), texts.join(" | ")))
    }

    /// Forgets what was said, and tells what was held back.
    fn end_window(&mut self, now: Instant) -> Option<Line> {
        self.window_end = now + WINDOW;
        let n_not_shown = std::mem::take(&mut self.n_not_shown);
        let said = std::mem::take(&mut self.said);
        let n_again: u64 = said.values().sum();
        let most = said.into_iter().max_by_key(|(_, n_again)| *n_again);
        let mut parts = Vec::new();
        let mut level = Level::Info;
        if let Some(((repeated_level, text), n_most)) = most.filter(|(_, n_most)| *n_most > 0) {
            let shown: String = text.chars().take(SHOWN_CHARS_MAX).collect();
            let dots = if shown.len() < text.len() { "…" } else { "" };
            let others =
                if n_again > n_most { format!(", others {}", n_again - n_most) } else { String::new() };
            parts.push(format!("repeated {n_most} times: `{shown}{dots}`{others}"));
            level = repeated_level;
        }
        if n_not_shown > 0 {
            parts.push(format!("{n_not_shown} lines not shown"));
        }
        (!parts.is_empty()).then(|| Line { level, text: format!("log: {}", parts.join("; ")) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Run {
        limit: LogLimit,
        start: Instant,
    }

    impl Run {
        fn new() -> Run {
            #[expect(clippy::disallowed_methods, reason = "any instant will do")]
            let start = Instant::now();
            Run { limit: LogLimit::new(start), start }
        }

        fn say(&mut self, level: Level, texts: impl IntoIterator<Item = String>) {
            for text in texts {
                self.limit.on_line(Line { level, text });
            }
        }

        fn out(&mut self, at_ms: u64) -> Vec<String> {
            let now = self.start + Duration::from_millis(at_ms);
            std::iter::from_fn(|| self.limit.next_line(now)).map(|line| line.text).collect()
        }

        fn deadline_ms(&self) -> Option<u128> {
            self.limit.next_deadline().map(|at| at.saturating_duration_since(self.start).as_millis())
        }
    }

    fn numbered(word: &str, n: usize) -> Vec<String> {
        (0..n).map(|i| format!("{word} {i}")).collect()
    }

    #[test]
    fn twenty_lines_at_once_then_two_a_second() {
        let mut run = Run::new();
        run.say(Level::Info, numbered("line", 20));
        assert_eq!(run.out(0), numbered("line", 20));
        run.say(Level::Info, numbered("more", 4));
        assert_eq!(run.out(0), [""; 0]);
        assert_eq!(run.deadline_ms(), Some(500));
        assert_eq!(run.out(499), [""; 0]);
        assert_eq!(run.out(500), ["more 0"]);
        assert_eq!(run.out(1_600), ["more 1", "more 2"]);
        assert_eq!(run.deadline_ms(), Some(2_000));
        assert_eq!(run.out(2_000), ["more 3"]);
        assert_eq!(run.deadline_ms(), None);
    }

    #[test]
    fn quiet_time_fills_the_burst_and_no_more() {
        let mut run = Run::new();
        run.say(Level::Info, numbered("a", 20));
        run.out(0);
        run.say(Level::Info, numbered("b", 20));
        run.say(Level::Info, numbered("c", 20));
        assert_eq!(run.out(60_000).len(), 21, "20 lines and the count of the 20 that found no room");
        assert_eq!(run.out(60_000).len(), 0);
    }

    #[test]
    fn a_repeated_line_is_counted_once_a_window_and_said_again_in_the_next() {
        let mut run = Run::new();
        run.say(Level::Warn, vec!["endpoint refused".to_owned(); 13]);
        assert_eq!(run.out(0), ["endpoint refused"]);
        assert_eq!(run.deadline_ms(), Some(10_000));
        assert_eq!(run.out(9_999), [""; 0]);
        assert_eq!(run.out(10_000), ["log: repeated 12 times: `endpoint refused`"]);
        assert_eq!(run.deadline_ms(), None);
        run.say(Level::Warn, ["endpoint refused".to_owned()]);
        assert_eq!(run.out(10_001), ["endpoint refused"]);
    }

    #[test]
    fn a_flood_is_bounded_and_its_size_is_told() {
        let mut run = Run::new();
        run.say(Level::Info, numbered("x", 100_000));
        let mut n_out = run.out(0).len();
        for at_ms in (0..10_000).step_by(100) {
            n_out += run.out(at_ms).len();
        }
        assert_eq!(n_out, 20);
        assert_eq!(run.out(10_000), ["log: 99980 lines not shown"]);
    }

    #[test]
    fn errors_overtake_and_are_merged_never_dropped() {
        let mut run = Run::new();
        run.say(Level::Info, numbered("x", 20));
        run.out(0);
        run.say(Level::Info, numbered("late", 3));
        run.say(Level::Error, numbered("bad", 3));
        assert_eq!(run.out(500), ["3 errors: bad 0 | bad 1 | bad 2"]);
        run.say(Level::Error, ["alone".to_owned()]);
        assert_eq!(run.out(1_000), ["alone"]);
        assert_eq!(run.out(1_500), ["late 0"]);
        let long = (0..10).map(|i| format!("{i}{}", "e".repeat(999)));
        run.say(Level::Error, long);
        run.say(Level::Error, numbered("flood", 1_000));
        let mut seen = String::new();
        for at_ms in (2_000..20_000).step_by(500) {
            seen += &run.out(at_ms).join(" ");
        }
        for i in 0..10 {
            assert!(seen.contains(&format!("{i}eee")), "long error {i}");
        }
        assert!(seen.contains("flood 189") && !seen.contains("flood 190"));
        assert!(seen.contains("810 more errors"), "{seen}");
    }

    #[test]
    fn a_repeated_error_is_counted_at_error_level() {
        let mut run = Run::new();
        run.say(Level::Error, vec!["no room".to_owned(); 3]);
        assert_eq!(run.out(0), ["no room"]);
        let count = run.limit.next_line(run.start + WINDOW).unwrap();
        assert_eq!((count.level, count.text.as_str()), (Level::Error, "log: repeated 2 times: `no room`"));
    }

    #[test]
    fn at_the_end_nothing_that_waits_is_lost() {
        let mut run = Run::new();
        run.say(Level::Info, numbered("x", 25));
        run.out(0);
        run.say(Level::Info, numbered("y", 2));
        run.say(Level::Error, numbered("e", 2));
        let now = run.start;
        let texts: Vec<String> = run.limit.drain(now).into_iter().map(|line| line.text).collect();
        assert_eq!(texts, ["2 errors: e 0 | e 1", "y 0", "y 1", "log: 5 lines not shown"]);
        assert_eq!(run.deadline_ms(), None);
    }
}
