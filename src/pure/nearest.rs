//! The known name that a misspelt one was probably meant to be.

/// The name that differs least from `word`: by at most a third of its letters, but `always` many at least.
pub fn nearest_of<'a>(
    word: &str,
    names: impl IntoIterator<Item = &'a str>,
    always: usize,
) -> Option<&'a str> {
    let allowed = (word.chars().count() / 3).max(always);
    let near = names.into_iter().map(|name| (distance(word, name), name));
    let near = near.filter(|(distance, name)| *distance <= allowed && *distance < name.chars().count());
    near.min().map(|(_, name)| name)
}

/// Letters to insert, delete or replace, a swap of two neighbours counting once (optimal string alignment).
fn distance(from: &str, to: &str) -> usize {
    let (from, to): (Vec<char>, Vec<char>) = (from.chars().collect(), to.chars().collect());
    let mut rows: Vec<Vec<usize>> = vec![(0..=to.len()).collect()];
    for i in 1..=from.len() {
        let mut row = vec![i];
        for j in 1..=to.len() {
            let replaced = rows[i - 1][j - 1] + usize::from(from[i - 1] != to[j - 1]);
            let mut best = replaced.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && from[i - 1] == to[j - 2] && from[i - 2] == to[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[from.len()][to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_least_is_meant() {
        let check = |word: &str, expected: Option<&str>| {
            assert_eq!(nearest_of(word, ["selector", "filter", "source", "url"], 2), expected, "{word}");
        };
        check("selecter", Some("selector"));
        check("soruce", Some("source"));
        check("fliter", Some("filter"));
        check("ulr", Some("url"));
        check("comment", None);
        check("x", None);
    }
}
