//! Where the time of a start goes (`--timings`).

use std::fmt::Write as _;
use std::time::{Duration, Instant};

/// Moments since the beginning.
#[derive(Debug)]
pub struct Timings {
    started: Instant,
    marks: Vec<(String, Duration)>,
}

impl Timings {
    /// Begins now.
    pub fn start() -> Self {
        Self {
            started: Instant::now(),
            marks: Vec::new(),
        }
    }

    /// Notes that a step is done.
    pub fn mark(&mut self, step: impl Into<String>) {
        self.marks.push((step.into(), self.started.elapsed()));
    }

    /// A table: when each step was done, and how long it took.
    pub fn table(&self) -> String {
        let mut table = String::new();
        let mut before = Duration::ZERO;
        for (step, at) in &self.marks {
            let took = at.saturating_sub(before).as_secs_f64();
            // Writing to a string does not fail.
            let _ = writeln!(
                table,
                "tern-metal: {:7.3} s  +{took:.3}  {step}",
                at.as_secs_f64()
            );
            before = *at;
        }
        table
    }
}
