//! `fly.toml`: what an app is and how it runs, as its developer wrote it.
//!
//! [`AppConfig::parse`] accepts the documented schema and says exactly where a file departs from it:
//! a key nobody knows is an error with its line; a key that Tern does not act on yet is a warning. [`machine`] turns the result into Machine configurations.

mod forms;
mod keys;
pub mod machine;
mod schema;

use std::path::{Path, PathBuf};

pub use keys::Problem;
pub(crate) use keys::unknown;
pub use schema::*;

/// A `fly.toml` that was read without errors.
#[derive(Debug)]
pub struct Loaded {
    /// What it says.
    pub config: AppConfig,
    /// What it says in vain.
    pub warnings: Vec<Problem>,
    /// Where it is.
    pub path: PathBuf,
}

/// Why a `fly.toml` or `tern.toml` was refused.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// It cannot be read.
    #[error("{} cannot be read: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is there, but wrong. All problems at once.
    #[error("{} is not right:\n{}", path.display(), list(problems))]
    Wrong {
        /// The file.
        path: PathBuf,
        /// Every problem found.
        problems: Vec<Problem>,
    },
}

/// A file larger than this is neither.
const MAX_BYTES: u64 = 1 << 20;

impl AppConfig {
    /// Reads the file.
    pub fn load(path: &Path) -> Result<Loaded, LoadError> {
        let text = read(path)?;
        match Self::parse(&text) {
            Ok((config, warnings)) => Ok(Loaded {
                config,
                warnings,
                path: path.to_owned(),
            }),
            Err(problems) => Err(LoadError::Wrong {
                path: path.to_owned(),
                problems,
            }),
        }
    }

    /// Reads the text; answers warnings beside it, or every error.
    pub fn parse(text: &str) -> Result<(Self, Vec<Problem>), Vec<Problem>> {
        let syntax = |e: toml::de::Error| vec![Problem::at_span(text, e.span(), e.message())];
        let table = toml::de::DeTable::parse(text).map_err(syntax)?;
        let mut unknown = Vec::new();
        let deserializer = toml::de::Deserializer::from(table.clone());
        let mut config: Self = serde_ignored::deserialize(deserializer, |path| {
            unknown.push(keys::written(&path.to_string()))
        })
        .map_err(syntax)?;

        let (mut errors, mut warnings) = (Vec::new(), Vec::new());
        for path in unknown {
            let line = keys::line_of(text, table.get_ref(), &path);
            match keys::judge(&path) {
                keys::Verdict::Unknown(text) => errors.push(Problem { line, text }),
                keys::Verdict::NotYet(_) if keys::asks_nothing(table.get_ref(), &path) => {}
                keys::Verdict::NotYet(text) => warnings.push(Problem { line, text }),
            }
        }
        config.vm.append(&mut config.compute);
        let is_empty = |i: usize| keys::is_empty_table(table.get_ref(), &format!("services.{i}"));
        for (i, service) in config.services.iter().enumerate() {
            if !service.ports.is_empty() || is_empty(i) {
                continue;
            }
            warnings.push(Problem {
                line: keys::line_of(text, table.get_ref(), &format!("services.{i}")),
                text: "no [[services.ports]]: this service is reachable on the private network alone, whose \
                       traffic wakes a suspended Machine but does not keep one from being stopped"
                    .into(),
            });
        }
        for (path, text_of) in config.check() {
            errors.push(Problem {
                line: keys::line_of(text, table.get_ref(), &path),
                text: text_of,
            });
        }
        // Its lines are told: indices may shift. A service of which nothing is said is none.
        let mut i = 0..;
        config.services.retain(|_| !i.next().is_some_and(is_empty));
        if errors.is_empty() {
            Ok((config, warnings))
        } else {
            Err(errors)
        }
    }
}

/// The text of a configuration file.
pub(crate) fn read(path: &Path) -> Result<String, LoadError> {
    let io = |source| LoadError::Io {
        path: path.to_owned(),
        source,
    };
    if std::fs::metadata(path).map_err(io)?.len() > MAX_BYTES {
        return Err(io(std::io::Error::other("it is larger than 1 MiB")));
    }
    std::fs::read_to_string(path).map_err(io)
}

fn list(problems: &[Problem]) -> String {
    let lines: Vec<String> = problems.iter().map(|p| format!("  {p}")).collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests;
