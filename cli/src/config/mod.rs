//! `/etc/tern/tern.toml`: what a server's commands are not given as flags.
//!
//! Its keys are the ids of the flags of `tern serve`, found in their clap definitions; so are their types, and what a value
//! must look like. What the file says is put among the arguments where neither a flag nor the environment says anything, so
//! that clap judges all of it together: what requires what, and what conflicts. [`print()`] makes the file anew.
//!
//! Commands that look after a server's disks read the keys that they have flags for.

mod print;

use std::error::Error as _;
use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command, CommandFactory as _, FromArgMatches as _};
use toml::de::{DeTable, DeValue};

use crate::appconfig::{self, LoadError, Problem};
use crate::args::{Args, ConfigFile};

pub use print::print;

/// Where the file is unless `--config` says otherwise.
pub const PATH: &str = "/etc/tern/tern.toml";

/// Flags of `tern serve` that are about the file itself.
const NOT_KEYS: [&str; 3] = ["config_file", "print_config", "check_config"];

/// The exit status for wrong flags and for a wrong file: trying again does not help (`tern.service` knows it).
const USAGE: u8 = 2;

/// Why the command line was not taken.
#[derive(Debug)]
pub enum Refused {
    /// By clap (a call for help too). With what the file had to do with it.
    Flags(clap::Error, Option<String>),
    /// The file is wrong.
    File(LoadError),
}

impl Refused {
    /// Tells it, and how the program is to end.
    pub fn tell(self) -> ExitCode {
        match self {
            Self::Flags(error, note) => {
                // A closed pipe after `--help` is nothing to tell.
                let _ = error.print();
                if let Some(note) = note {
                    eprintln!("\n{note}");
                }
                ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(USAGE))
            }
            Self::File(error) => {
                eprintln!("Error: {error}");
                ExitCode::from(USAGE)
            }
        }
    }
}

/// The command line, completed from the file.
pub fn parse(argv: Vec<OsString>) -> Result<Args, Refused> {
    parse_with(argv, Path::new(PATH))
}

/// What this server's file says of its data directory.
pub fn data_dir() -> Option<String> {
    data_dir_of(&load(Path::new(PATH)).ok()?)
}

fn data_dir_of(settings: &[Setting]) -> Option<String> {
    let said = settings.iter().find(|s| s.id == "data_dir")?;
    let argument = said.arguments.first()?;
    Some(argument.strip_prefix("--data-dir=")?.to_owned())
}

fn parse_with(mut argv: Vec<OsString>, default: &Path) -> Result<Args, Refused> {
    let root = Args::command();
    // First for what is there: what is missing may be in the file, and what is wrong is told below.
    let Ok(given) = root
        .clone()
        .ignore_errors(true)
        .try_get_matches_from(argv.clone())
    else {
        return Args::try_parse(argv, None);
    };
    let (command, given) = leaf(&root, &given);
    let has = |id: &str| command.get_arguments().any(|a| a.get_id() == id);
    let printing = has("print_config") && given.get_flag("print_config");
    if !has("config_file") || printing {
        return Args::try_parse(argv, None);
    }
    let named = ConfigFile::from_arg_matches(given).unwrap_or_default().path;
    let path = match &named {
        Some(path) => path.as_path(),
        None if default.exists() => default,
        None => return Args::try_parse(argv, None),
    };
    let settings = load(path).map_err(Refused::File)?;

    let elsewhere = |id: &str| {
        let source = given.value_source(id);
        matches!(
            source,
            Some(ValueSource::CommandLine | ValueSource::EnvVariable)
        )
    };
    let taken: Vec<&Setting> = settings
        .iter()
        .filter(|s| has(&s.id) && !elsewhere(&s.id))
        .collect();
    let arguments = taken.iter().flat_map(|s| &s.arguments);
    // Nothing behind a lone `--` is a flag.
    let end = argv.iter().position(|a| a == "--").unwrap_or(argv.len());
    argv.splice(end..end, arguments.map(OsString::from));
    let from_file = (!taken.is_empty()).then(|| {
        let lines = taken.iter().map(|s| format!("{} (line {})", s.id, s.line));
        let lines: Vec<String> = lines.collect();
        format!("{} has {}", path.display(), lines.join(", "))
    });
    Args::try_parse(argv, from_file)
}

impl Args {
    fn try_parse(argv: Vec<OsString>, from_file: Option<String>) -> Result<Self, Refused> {
        <Self as clap::Parser>::try_parse_from(argv).map_err(|error| {
            let both = matches!(
                error.kind(),
                ErrorKind::ArgumentConflict | ErrorKind::MissingRequiredArgument
            );
            Refused::Flags(error, from_file.filter(|_| both))
        })
    }
}

/// The command that is meant, and what it was given.
fn leaf<'a>(mut command: &'a Command, mut given: &'a ArgMatches) -> (&'a Command, &'a ArgMatches) {
    while let Some((name, inner)) = given.subcommand() {
        let Some(sub) = command.find_subcommand(name) else {
            break;
        };
        (command, given) = (sub, inner);
    }
    (command, given)
}

/// What the file says for one flag.
#[derive(Debug, PartialEq, Eq)]
struct Setting {
    id: String,
    line: usize,
    /// As they would stand on the command line.
    arguments: Vec<String>,
}

/// The flags of `tern serve` that are keys of the file, in their order.
fn keys() -> Vec<Arg> {
    let root = Args::command();
    let serve = root.find_subcommand("serve");
    serve
        .into_iter()
        .flat_map(Command::get_arguments)
        .filter(|arg| !NOT_KEYS.contains(&arg.get_id().as_str()))
        .cloned()
        .collect()
}

fn load(path: &Path) -> Result<Vec<Setting>, LoadError> {
    read(&appconfig::read(path)?).map_err(|problems| LoadError::Wrong {
        path: path.to_owned(),
        problems,
    })
}

/// Reads the text; answers every problem if there is one.
fn read(text: &str) -> Result<Vec<Setting>, Vec<Problem>> {
    let table =
        DeTable::parse(text).map_err(|e| vec![Problem::at_span(text, e.span(), e.message())])?;
    let keys = keys();
    let (mut settings, mut problems) = (Vec::new(), Vec::new());
    for (key, value) in table.get_ref() {
        let name = key.get_ref().as_ref();
        let problem = |what: &str| Problem::at_span(text, Some(key.span()), what);
        let arg = keys.iter().find(|arg| arg.get_id() == name);
        match arg.map(|arg| arguments(arg, value.get_ref())) {
            None => {
                let taken = keys.iter().map(|arg| arg.get_id().as_str());
                let meant = name.replace('-', "_");
                problems.push(problem(&appconfig::unknown(name, &meant, taken)));
            }
            Some(Err(what)) => problems.push(problem(&format!("`{name}` {what}"))),
            Some(Ok(arguments)) => settings.push(Setting {
                id: name.to_owned(),
                line: problem("").line.unwrap_or_default(),
                arguments,
            }),
        }
    }
    settings.sort_by_key(|s| s.line);
    problems.sort_by_key(|p| p.line);
    match problems.is_empty() {
        true => Ok(settings),
        false => Err(problems),
    }
}

/// A value as arguments of its flag, if the flag takes it.
fn arguments(arg: &Arg, value: &DeValue<'_>) -> Result<Vec<String>, String> {
    let flag = format!("--{}", arg.get_long().unwrap_or_default());
    if is_switch(arg) {
        return match value {
            DeValue::Boolean(true) => Ok(vec![flag]),
            DeValue::Boolean(false) => Ok(Vec::new()),
            _ => Err("is either true or false".to_owned()),
        };
    }
    let values = match value {
        DeValue::Array(items) if is_list(arg) => {
            items.iter().map(|item| scalar(item.get_ref())).collect()
        }
        one => scalar(one).map(|text| vec![text]),
    }?;
    values
        .into_iter()
        .map(|text| {
            judge(arg, &text).map_err(|reason| format!("cannot be \"{text}\": {reason}"))?;
            Ok(format!("{flag}={text}"))
        })
        .collect()
}

fn is_switch(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::SetTrue)
}

fn is_list(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::Append)
}

fn scalar(value: &DeValue<'_>) -> Result<String, String> {
    match value {
        DeValue::String(text) if text.is_empty() => {
            Err("is empty; leave the key out for its default".to_owned())
        }
        DeValue::String(text) => Ok(text.to_string()),
        DeValue::Integer(number) => Ok(number.to_string()),
        DeValue::Float(number) => Ok(number.to_string()),
        DeValue::Boolean(_) => Err("is not true or false, but a value".to_owned()),
        DeValue::Array(_) => Err("has one value, not a list".to_owned()),
        DeValue::Datetime(_) => Err("is not a date".to_owned()),
        DeValue::Table(_) => {
            Err("is not a table; write `key = value`, without a [section]".to_owned())
        }
    }
}

/// Asks the flag's own parser, without the company that the flag may require.
fn judge(arg: &Arg, text: &str) -> Result<(), String> {
    let mut alone = Arg::new(arg.get_id().clone())
        .long("value")
        .action(arg.get_action().clone())
        .value_parser(arg.get_value_parser().clone());
    if let Some(delimiter) = arg.get_value_delimiter() {
        alone = alone.value_delimiter(delimiter);
    }
    let command = Command::new("tern").no_binary_name(true).arg(alone);
    let Err(error) = command.try_get_matches_from([format!("--value={text}")]) else {
        return Ok(());
    };
    if let Some(reason) = error.source() {
        return Err(reason.to_string());
    }
    Err(match error.get(ContextKind::ValidValue) {
        Some(ContextValue::Strings(valid)) => format!("it is one of {}", valid.join(", ")),
        _ => error.kind().to_string(),
    })
}

#[cfg(test)]
mod tests;
