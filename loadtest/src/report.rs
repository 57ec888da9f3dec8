//! Results as text, as Markdown tables and as files.

use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::tally::{Latency, Summary};

/// Prints a result to standard output.
pub fn print(report: &impl Serialize, text: &str, as_json: bool) -> Result<()> {
    if as_json {
        println!("{}", serde_json::to_string(report)?);
    } else {
        print!("{text}");
    }
    Ok(())
}

/// Writes a file and says so.
pub fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    eprintln!("wrote {}", path.display());
    Ok(())
}

/// A Markdown table whose columns line up in a terminal, too. The first column is text, the others
/// are numbers.
pub fn table(head: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let head: Vec<String> = head.iter().map(|&cell| cell.to_owned()).collect();
    let rows: Vec<Vec<String>> = rows.into_iter().collect();
    let width = |column: usize| {
        let cells = rows.iter().chain([&head]).filter_map(|row| row.get(column));
        cells
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or(0)
            .max(3)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |row: &[String]| {
        let cells = row
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(n, (cell, &width))| {
                if n == 0 {
                    format!(" {cell:<width$} |")
                } else {
                    format!(" {cell:>width$} |")
                }
            });
        format!("|{}\n", cells.collect::<String>())
    };
    let rule = widths.iter().enumerate().map(|(n, &width)| {
        let dashes = "-".repeat(width);
        if n == 0 {
            format!(" {dashes} |")
        } else {
            format!(" {}: |", &dashes[1..])
        }
    });
    let mut text = line(&head);
    text += &format!("|{}\n", rule.collect::<String>());
    rows.iter().for_each(|row| text += &line(row));
    text
}

/// A time in milliseconds, to three digits or so.
pub fn millis(millis: f64) -> String {
    if millis < 10.0 {
        format!("{millis:.2}")
    } else {
        format!("{millis:.1}")
    }
}

/// Counts, latencies and failures of a run.
pub fn summary(summary: &Summary) -> String {
    let statuses: Vec<String> = summary
        .statuses
        .iter()
        .map(|(status, count)| format!("{status}: {count}"))
        .collect();
    let mut text = format!(
        "requests {}   failed {}   statuses {}\n\n",
        summary.requests,
        summary.failed,
        if statuses.is_empty() {
            "none".to_owned()
        } else {
            statuses.join(", ")
        }
    );
    let row = |name: &str, latency: &Latency| {
        let Latency {
            min,
            median,
            p90,
            p95,
            p99,
            p999,
            max,
        } = *latency;
        let times = [min, median, p90, p95, p99, p999, max].map(millis);
        [name.to_owned()].into_iter().chain(times).collect()
    };
    if summary.requests > summary.failed {
        text += &table(
            &[
                "milliseconds",
                "min",
                "median",
                "p90",
                "p95",
                "p99",
                "p99.9",
                "max",
            ],
            [
                row("sent to first byte", &summary.first_byte),
                row("intended to first byte", &summary.from_start),
                row("intended to end", &summary.total),
            ],
        );
    }
    let failures = failures(summary);
    if !failures.is_empty() {
        text += &format!("\nfailures:\n{failures}");
    }
    text
}

/// One line for each reason why requests failed.
pub fn failures(summary: &Summary) -> String {
    let line = |reason: &crate::tally::Reason| {
        format!(
            "  {:>6} x {:?}: {}\n",
            reason.count, reason.kind, reason.detail
        )
    };
    summary.failures.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_line_up() {
        let rows = [
            vec!["a".to_owned(), "1.5".to_owned()],
            vec!["long".to_owned(), "2".to_owned()],
        ];
        assert_eq!(
            table(&["name", "n"], rows),
            "| name |   n |\n\
             | ---- | --: |\n\
             | a    | 1.5 |\n\
             | long |   2 |\n"
        );
    }
}
