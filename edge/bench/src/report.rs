//! Samples, and what is made of them: a table, a file of everything, a plot.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::case::{Case, Measure, Sample};
use crate::contender::Kind;

/// All samples so far.
pub struct Report {
    kinds: Vec<Kind>,
    results: PathBuf,
    rows: Vec<Row>,
    resident: Vec<(Kind, f64)>,
}

/// One measure of one case: a sample a round, in the order of rounds.
struct Row {
    case: Case,
    measure: Measure,
    samples: Vec<(Kind, f64)>,
}

impl Row {
    fn of(&self, kind: Kind) -> Vec<f64> {
        of(&self.samples, kind)
    }
}

fn of(samples: &[(Kind, f64)], kind: Kind) -> Vec<f64> {
    let its = samples.iter().filter(|(whose, _)| *whose == kind);
    its.map(|(_, value)| *value).collect()
}

impl Report {
    pub fn new(kinds: &[Kind], results: &Path) -> Self {
        Self {
            kinds: kinds.to_vec(),
            results: results.to_owned(),
            rows: Vec::new(),
            resident: Vec::new(),
        }
    }

    pub fn add(&mut self, kind: Kind, case: Case, samples: Vec<Sample>) {
        for (measure, value) in samples {
            let at = self
                .rows
                .iter()
                .position(|row| row.case == case && row.measure == measure);
            let at = at.unwrap_or_else(|| {
                self.rows.push(Row {
                    case,
                    measure,
                    samples: Vec::new(),
                });
                self.rows.len() - 1
            });
            self.rows[at].samples.push((kind, value));
        }
    }

    /// Memory after the load, before connections idle.
    pub fn resident(&mut self, kind: Kind, kib: f64) {
        self.resident.push((kind, kib));
    }

    /// Medians; in parentheses, the median of the rounds' ratios to nginx.
    pub fn markdown(&self) -> String {
        let mut out = String::from("| case | measure |");
        for kind in &self.kinds {
            let _ = write!(out, " {} |", kind.name());
        }
        let columns = "---:|".repeat(self.kinds.len());
        let _ = writeln!(out, "\n|---|---|{columns}");
        for row in &self.rows {
            let what = (row.case.title(), row.measure.name());
            self.line(&mut out, what, 1.0, &row.samples);
        }
        self.line(
            &mut out,
            ("after the load", "resident MiB"),
            1024.0,
            &self.resident,
        );
        out
    }

    fn line(
        &self,
        out: &mut String,
        (case, measure): (&str, &str),
        unit: f64,
        samples: &[(Kind, f64)],
    ) {
        let _ = write!(out, "| {case} | {measure} |");
        for &kind in &self.kinds {
            let value = median(&of(samples, kind)).map(|value| value / unit);
            let value = value.map_or_else(|| "-".to_owned(), digits);
            let ratio = (kind != Kind::Nginx).then(|| median(&ratios(samples, kind)));
            let ratio = ratio.flatten().map(|ratio| format!(" ({ratio:.2})"));
            let _ = write!(out, " {value}{} |", ratio.unwrap_or_default());
        }
        out.push('\n');
    }

    /// Leaves `edge.md`, `edge.json` and `edge.svg`.
    pub fn write(&self) -> Result<()> {
        let rows: Vec<Value> = self
            .rows
            .iter()
            .map(|row| {
                let samples: serde_json::Map<String, Value> = self
                    .kinds
                    .iter()
                    .map(|&kind| (kind.name().to_owned(), json!(row.of(kind))))
                    .collect();
                json!({"case": row.case.name(), "measure": row.measure.name(), "samples": samples})
            })
            .collect();
        let resident: serde_json::Map<String, Value> = self
            .kinds
            .iter()
            .map(|&kind| (kind.name().to_owned(), json!(of(&self.resident, kind))))
            .collect();
        let all = json!({"rows": rows, "resident_kib": resident});
        std::fs::create_dir_all(&self.results)?;
        for (name, text) in [
            ("edge.md", self.markdown()),
            ("edge.json", serde_json::to_string_pretty(&all)?),
            ("edge.svg", self.plot()),
        ] {
            let path = self.results.join(name);
            std::fs::write(&path, text).with_context(|| format!("{}", path.display()))?;
        }
        Ok(())
    }

    /// Bars of what each case is about (processor time, memory) as ratios to nginx; a dot for each round.
    fn plot(&self) -> String {
        const COLOURS: [&str; 4] = ["#7f7f7f", "#1f77b4", "#2ca02c", "#d62728"];
        const LEFT: usize = 270;
        const WIDTH: usize = 600;
        const BAR: usize = 16;
        const GAP: usize = 14;
        let rows: Vec<&Row> = self
            .rows
            .iter()
            .filter(|row| matches!(row.measure, Measure::Cpu | Measure::PerConnection))
            .collect();
        let drawn = |row: &Row, kind| ratios(&row.samples, kind);
        let largest = rows
            .iter()
            .flat_map(|row| self.kinds.iter().flat_map(|&kind| drawn(row, kind)))
            .fold(1.0, f64::max);
        let x = |ratio: f64| LEFT as f64 + ratio / largest * WIDTH as f64;
        let group = BAR * self.kinds.len() + GAP;
        let height = 60 + group * rows.len();
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{height}\" font-family=\"sans-serif\" \
             font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
             <text x=\"16\" y=\"26\" font-size=\"18\">Processor time and memory beside nginx (less is better)</text>\n",
            LEFT + WIDTH + 80
        );
        for (n, row) in rows.iter().enumerate() {
            let top = 48 + n * group;
            let _ = writeln!(
                svg,
                "<text x=\"16\" y=\"{}\">{}</text>",
                top + group / 2,
                row.case.title()
            );
            for (m, &kind) in self.kinds.iter().enumerate() {
                let all = drawn(row, kind);
                let Some(ratio) = median(&all) else { continue };
                let (y, colour) = (top + m * BAR, COLOURS[kind as usize]);
                let _ = writeln!(
                    svg,
                    "<rect x=\"{LEFT}\" y=\"{y}\" width=\"{:.1}\" height=\"{}\" fill=\"{colour}\" fill-opacity=\"0.6\"/>\
                     <text x=\"{:.1}\" y=\"{}\" font-size=\"11\">{} {ratio:.2}</text>",
                    x(ratio) - LEFT as f64,
                    BAR - 2,
                    all.iter().copied().map(x).fold(0.0, f64::max) + 6.0,
                    y + BAR - 4,
                    kind.name(),
                );
                for ratio in all {
                    let middle = y + BAR / 2 - 1;
                    let _ = writeln!(
                        svg,
                        "<circle cx=\"{:.1}\" cy=\"{middle}\" r=\"2.5\" fill=\"{colour}\"/>",
                        x(ratio)
                    );
                }
            }
        }
        svg + "</svg>\n"
    }
}

/// Of each round, to nginx's sample of the same round; none where nginx took no part.
fn ratios(samples: &[(Kind, f64)], kind: Kind) -> Vec<f64> {
    let nginx = of(samples, Kind::Nginx);
    let its = of(samples, kind);
    its.iter()
        .zip(&nginx)
        .map(|(its, nginx)| its / nginx)
        .collect()
}

fn median(samples: &[f64]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[middle]),
        _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
    }
}

/// Three digits or so.
fn digits(value: f64) -> String {
    match value {
        value if value < 10.0 => format!("{value:.2}"),
        value if value < 100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let mut report = Report::new(&[Kind::Nginx, Kind::Tern], Path::new("unused"));
        // A machine that is twice as slow in its second round.
        for slow in [1.0, 2.0, 1.0] {
            report.add(Kind::Tern, Case::H1, vec![(Measure::Cpu, 3.0 * slow)]);
            report.add(Kind::Nginx, Case::H1, vec![(Measure::Cpu, 2.0 * slow)]);
            report.resident(Kind::Nginx, 2048.0);
            report.resident(Kind::Tern, 1024.0);
        }
        report
    }

    #[test]
    fn ratios_are_of_rounds_and_figures_are_medians() {
        let table = report().markdown();
        let line = "| HTTP/1.1, 32 connections | CPU s per 100k | 2.00 | 3.00 (1.50) |\n";
        assert!(table.contains(line), "{table}");
        let line = "| after the load | resident MiB | 2.00 | 1.00 (0.50) |\n";
        assert!(table.contains(line), "{table}");
    }

    #[test]
    fn every_round_is_in_the_plot() {
        let plot = report().plot();
        assert_eq!(plot.matches("<circle").count(), 6);
        assert!(plot.contains("tern 1.50"), "{plot}");
    }

    #[test]
    fn without_nginx_there_are_no_ratios() {
        let mut report = Report::new(&[Kind::Tern], Path::new("unused"));
        report.add(Kind::Tern, Case::H2, vec![(Measure::Cpu, 12.0)]);
        assert!(report.markdown().contains("| 12.0 |"));
        assert!(!report.plot().contains("<circle"));
    }

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }
}
