//! Tables for people: columns that line up, no wider than the terminal.
//!
//! Guarantees that a cell of somebody else's text cannot steer the terminal, that colours appear only where
//! [`Out`] says so, and that without a terminal nothing is cut: what a script reads is whole. JSON is the
//! commands' own.

use crate::cli::out::{Colour, Out};
use crate::error::Result;
use crate::pure::os_daemon::one_line;

/// Between two columns.
const GAP: usize = 2;
/// A column that is cut keeps at least so many characters.
const COLUMN_MIN: usize = 8;
/// No terminal is taken to be narrower.
const WIDTH_MIN: usize = 40;

/// One cell.
#[derive(Debug, Clone)]
pub(crate) struct Cell {
    text: String,
    colour: Option<Colour>,
}

impl Cell {
    /// A text in the terminal's own colour; control characters in it are escaped.
    pub(crate) fn new(text: impl AsRef<str>) -> Cell {
        Cell { text: one_line(text.as_ref()), colour: None }
    }

    /// The same in a colour, for one of our own words.
    pub(crate) fn coloured(text: impl AsRef<str>, colour: Colour) -> Cell {
        Cell { colour: Some(colour), ..Cell::new(text) }
    }

    fn width(&self) -> usize {
        self.text.chars().count()
    }
}

impl<T: AsRef<str>> From<T> for Cell {
    fn from(text: T) -> Cell {
        Cell::new(text)
    }
}

/// Rows under headings.
#[derive(Debug)]
pub(crate) struct Table {
    headings: Vec<Cell>,
    right: Vec<bool>,
    rows: Vec<Vec<Cell>>,
}

impl Table {
    /// An empty table; a heading that begins with `>` is of a column of numbers, set to the right.
    pub(crate) fn new(headings: &[&str]) -> Table {
        Table {
            right: headings.iter().map(|heading| heading.starts_with('>')).collect(),
            headings: headings.iter().map(|heading| Cell::new(heading.trim_start_matches('>'))).collect(),
            rows: Vec::new(),
        }
    }

    /// One more row; as many cells as there are headings.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = Cell>) {
        let cells: Vec<Cell> = cells.into_iter().collect();
        assert_eq!(cells.len(), self.headings.len(), "a cell for every heading");
        self.rows.push(cells);
    }

    /// Whether it has no row.
    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// How wide it is when nothing is cut.
    pub(crate) fn width(&self) -> usize {
        let widths = self.widths(None);
        widths.iter().sum::<usize>() + GAP * widths.len().saturating_sub(1)
    }

    /// Takes the last column away.
    pub(crate) fn drop_last(&mut self) {
        let cells = self.rows.iter_mut().chain([&mut self.headings]);
        cells.for_each(|cells| drop(cells.pop()));
        self.right.pop();
    }

    /// Prints it, cut to the terminal's width where there is one; nothing when it has no row.
    ///
    /// # Errors
    /// As [`Out::line`].
    pub(crate) fn print(&self, out: &mut Out) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        for line in self.lines(out.width(), out.has_colours()) {
            out.styled(&line)?;
        }
        Ok(())
    }

    /// The lines, headings first, for whoever prints by itself.
    pub(crate) fn lines(&self, width: Option<usize>, colours: bool) -> Vec<String> {
        let widths = self.widths(width);
        std::iter::once(&self.headings)
            .chain(&self.rows)
            .map(|cells| self.line(cells, &widths, colours))
            .collect()
    }

    fn line(&self, cells: &[Cell], widths: &[usize], colours: bool) -> String {
        let mut line = String::new();
        for (at, (cell, width)) in cells.iter().zip(widths).enumerate() {
            let text = cut(&cell.text, *width);
            let blanks = " ".repeat(width - text.chars().count());
            if at > 0 {
                line.push_str(&" ".repeat(GAP));
            }
            let text = match cell.colour {
                Some(colour) if colours => colour.paint(&text),
                _ => text,
            };
            match self.right[at] {
                true => line.extend([blanks, text]),
                false => line.extend([text, blanks]),
            }
        }
        line.truncate(line.trim_end().len());
        line
    }

    /// How wide each column is: as its longest cell, the widest ones cut until the whole fits.
    fn widths(&self, width: Option<usize>) -> Vec<usize> {
        let longest = |at: usize| {
            std::iter::once(&self.headings)
                .chain(&self.rows)
                .map(|cells| cells[at].width())
                .max()
                .unwrap_or(0)
        };
        let mut widths: Vec<usize> = (0..self.headings.len()).map(longest).collect();
        let Some(room) = width else { return widths };
        let room = room.max(WIDTH_MIN).saturating_sub(GAP * widths.len().saturating_sub(1));
        while widths.iter().sum::<usize>() > room {
            // Numbers are short, and one that is cut says something else.
            let widest = (0..widths.len()).filter(|at| !self.right[*at]).max_by_key(|at| widths[*at]);
            match widest {
                Some(at) if widths[at] > COLUMN_MIN => widths[at] -= 1,
                _ => break,
            }
        }
        widths
    }
}

/// At most `width` characters, the last of them `…` when some are missing.
fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    text.chars().take(width.saturating_sub(1)).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Table {
        let mut table = Table::new(&["WEBHOOK", "STATE", ">PENDING", "WHY"]);
        table.row([
            "orders".into(),
            Cell::coloured("down", Colour::Red),
            "12".into(),
            "connection\nrefused".into(),
        ]);
        table.row(["a-long-name-of-a-webhook".into(), "running".into(), "0".into(), "".into()]);
        table
    }

    #[test]
    fn columns_line_up_and_numbers_stand_to_the_right() {
        let expected = "\
WEBHOOK                   STATE    PENDING  WHY
orders                    down          12  connection\\nrefused
a-long-name-of-a-webhook  running        0";
        assert_eq!(sample().lines(None, false).join("\n"), expected);
    }

    #[test]
    fn what_is_wider_than_the_terminal_is_cut_where_it_is_widest() {
        let lines = sample().lines(Some(50), false);
        assert!(lines.iter().all(|line| line.chars().count() <= 50), "{lines:#?}");
        assert!(lines[2].starts_with("a-long-name-"), "{lines:#?}");
        assert!(lines[1].contains("connection") && lines[1].ends_with('…'), "{lines:#?}");
        assert!(lines[1].contains("  12  "), "a number is never cut: {lines:#?}");
    }

    #[test]
    fn the_last_column_can_be_taken_away() {
        let mut table = sample();
        assert_eq!(table.width(), 63);
        table.drop_last();
        assert_eq!(table.width(), 42);
        assert_eq!(table.lines(None, false)[1], "orders                    down          12");
    }

    #[test]
    fn colours_take_no_room() {
        let line = &sample().lines(None, true)[1];
        assert_eq!(
            line,
            "orders                    \u{1b}[31mdown\u{1b}[0m          12  connection\\nrefused"
        );
    }
}
