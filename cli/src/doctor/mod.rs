//! `tern doctor`: whether this host is safe and able to run Machines, in one screen.
//!
//! [`facts`] looks, [`judge`] says what it means: pure functions, each with its test. It needs neither a server that
//! runs nor root; what only root sees counts as unknown, which is a warning that says so.

mod facts;
mod judge;

use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;

use crate::args::Doctor;
use crate::output;

/// What is said of one thing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Line {
    /// What was looked at.
    what: &'static str,
    level: Level,
    /// What was found.
    found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Ok,
    /// Machines run, and something is worse than it could be; or it cannot be seen from here.
    Warn,
    /// Machines do not run here, or not safely.
    Fail,
}

impl Line {
    fn ok(what: &'static str, found: impl Into<String>) -> Self {
        Self {
            what,
            level: Level::Ok,
            found: found.into(),
            advice: None,
        }
    }

    fn warn(what: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            level: Level::Warn,
            advice: Some(advice.into()),
            ..Self::ok(what, found)
        }
    }

    fn fail(what: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            level: Level::Fail,
            ..Self::warn(what, found, advice)
        }
    }
}

/// Looks and tells. Exits with 1 where something fails; warnings are none of a script's business.
pub fn run(args: &Doctor) -> Result<ExitCode> {
    let lines = judge::all(&facts::gather(&args.at.data_dir));
    if args.json {
        output::json(&lines)?;
    } else {
        print!("{}", shown(&lines));
    }
    let worst = lines.iter().map(|line| line.level).max();
    Ok(match worst {
        Some(Level::Fail) => ExitCode::FAILURE,
        _ => ExitCode::SUCCESS,
    })
}

fn shown(lines: &[Line]) -> String {
    let width = lines.iter().map(|line| line.what.len()).max().unwrap_or(0);
    let mut text = String::new();
    for line in lines {
        let level = match line.level {
            Level::Ok => "ok  ",
            Level::Warn => "warn",
            Level::Fail => "FAIL",
        };
        text.push_str(&format!("{level}  {:width$}  {}\n", line.what, line.found));
        if let Some(advice) = &line.advice {
            text.push_str(&format!("      {:width$}  -> {advice}\n", ""));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_has_its_level_and_what_to_do() {
        let lines = [
            Line::ok("KVM", "there"),
            Line::fail("clock", "wrong", "set it"),
        ];
        let text = shown(&lines);
        assert_eq!(
            text,
            "ok    KVM    there\nFAIL  clock  wrong\n             -> set it\n"
        );
        let json = serde_json::to_value(&lines).unwrap();
        assert_eq!(json[1]["level"], "fail");
        assert!(json[0].get("advice").is_none());
    }

    #[test]
    fn this_host_can_be_looked_at_whatever_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let lines = judge::all(&facts::gather(&dir.path().join("not/made/yet")));
        let names: std::collections::BTreeSet<_> = lines.iter().map(|l| l.what).collect();
        assert_eq!(names.len(), lines.len(), "each once");
        assert!(lines.len() >= 12, "{lines:?}");
        for line in lines {
            assert_eq!(line.level == Level::Ok, line.advice.is_none(), "{line:?}");
        }
    }
}
