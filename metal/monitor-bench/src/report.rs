//! The table and the raw numbers.

use std::fmt::Write as _;

use serde_json::{Value, json};

/// One measure of both monitors, in milliseconds or KiB.
#[derive(Debug, Default)]
pub struct Measure {
    /// What was measured.
    pub what: &'static str,
    /// Unit of the samples.
    pub unit: &'static str,
    /// Tern's at most this share of QEMU's median.
    pub goal_ratio: Option<f64>,
    /// Tern's median at most this.
    pub goal_most: Option<f64>,
    /// Tern's samples in the order taken.
    pub tern: Vec<f64>,
    /// QEMU's samples in the order taken.
    pub qemu: Vec<f64>,
}

/// Median, 95th percentile, maximum.
pub fn summary(samples: &[f64]) -> Option<[f64; 3]> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().checked_sub(1)?;
    let median = (sorted[last / 2] + sorted[last.div_ceil(2)]) / 2.0;
    // Nearest rank.
    let rank = (sorted.len() * 95).div_ceil(100).saturating_sub(1);
    Some([median, sorted[rank], sorted[last]])
}

impl Measure {
    /// Whether each goal is met, with what it compares.
    fn verdicts(&self) -> Vec<(String, bool)> {
        let (Some(tern), Some(qemu)) = (summary(&self.tern), summary(&self.qemu)) else {
            return Vec::new();
        };
        let ratio = self
            .goal_ratio
            .map(|goal| (format!("<= {goal} of QEMU"), tern[0] / qemu[0] <= goal));
        let most = self
            .goal_most
            .map(|goal| (format!("<= {goal:.0} {}", self.unit), tern[0] <= goal));
        ratio.into_iter().chain(most).collect()
    }

    /// For the JSON: everything.
    pub fn json(&self) -> Value {
        json!({
            "what": self.what, "unit": self.unit, "tern": self.tern, "qemu": self.qemu,
            "tern_median_p95_max": summary(&self.tern), "qemu_median_p95_max": summary(&self.qemu),
            "goals": self.verdicts().iter().map(|(goal, met)| json!({"goal": goal, "met": met})).collect::<Vec<_>>(),
        })
    }
}

/// The table in Markdown.
pub fn table(measures: &[&Measure]) -> String {
    let mut out = String::from(
        "| measure | n | Tern median / p95 / max | QEMU median / p95 / max | ratio | goal | |\n|---|---|---|---|---|---|---|\n",
    );
    for measure in measures {
        let (Some(tern), Some(qemu)) = (summary(&measure.tern), summary(&measure.qemu)) else {
            continue;
        };
        let show = |[a, b, c]: [f64; 3]| format!("{a:.1} / {b:.1} / {c:.1}");
        let verdicts = measure.verdicts();
        let goals: Vec<_> = verdicts.iter().map(|(goal, _)| goal.as_str()).collect();
        let met: Vec<_> = verdicts
            .iter()
            .map(|(_, met)| if *met { "met" } else { "missed" })
            .collect();
        let _ = writeln!(
            out,
            "| {} ({}) | {} | {} | {} | {:.2} | {} | {} |",
            measure.what,
            measure.unit,
            measure.tern.len().min(measure.qemu.len()),
            show(tern),
            show(qemu),
            tern[0] / qemu[0],
            goals.join("; "),
            met.join("; ")
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_percentiles() {
        let twenty: Vec<f64> = (1..=20).map(f64::from).collect();
        assert_eq!(summary(&twenty), Some([10.5, 19.0, 20.0]));
        assert_eq!(summary(&[3.0]), Some([3.0, 3.0, 3.0]));
        assert_eq!(summary(&[]), None);
    }

    #[test]
    fn a_goal_is_of_the_medians() {
        let measure = Measure {
            goal_ratio: Some(0.3),
            goal_most: Some(2.0),
            tern: vec![3.0],
            qemu: vec![10.0],
            ..Measure::default()
        };
        let met: Vec<_> = measure.verdicts().into_iter().map(|(_, met)| met).collect();
        assert_eq!(met, [true, false]);
    }
}
