//! The configuration file with every key, made of the clap definitions so that it cannot say anything else than they do.

use std::fmt::Write as _;

use clap::Arg;

use super::{PATH, is_list, is_switch, keys};

/// Columns of a comment's text.
const WIDTH: usize = 96;

/// The file: each key commented out, with its default or what stands for a value.
pub fn print() -> String {
    let mut file = String::new();
    comment(
        &mut file,
        &format!(
            "The configuration of `tern serve`, read from {PATH} or the file that --config names. `tern doctor`, `tern host` and \
             `tern catalog` read it too. `tern serve --print-config` writes it anew with all defaults."
        ),
    );
    file.push_str("#\n");
    comment(
        &mut file,
        "Each key is a flag of `tern serve`, with underscores. The flag goes before the key, and so does the environment variable \
         where there is one. Every key is shown with its default, or with <WHAT> where it has none: take the `#` away to set it. \
         A server that runs has to be restarted for it; its Machines go on meanwhile.",
    );
    for arg in keys() {
        file.push('\n');
        describe(&mut file, &arg);
        // Writing into a String does not fail.
        let _ = writeln!(file, "#{} = {}", arg.get_id(), value(&arg));
    }
    file
}

fn describe(file: &mut String, arg: &Arg) {
    let help = arg.get_long_help().or_else(|| arg.get_help());
    for paragraph in help
        .map(ToString::to_string)
        .unwrap_or_default()
        .split("\n\n")
    {
        comment(file, paragraph);
    }
    if !is_switch(arg) {
        for possible in arg.get_possible_values() {
            let help = possible.get_help().map(|h| format!(": {h}"));
            comment(
                file,
                &format!("  {}{}", possible.get_name(), help.unwrap_or_default()),
            );
        }
    }
    if let Some(variable) = arg.get_env() {
        comment(
            file,
            &format!("Environment: {}", variable.to_string_lossy()),
        );
    }
}

/// The default as TOML.
fn value(arg: &Arg) -> String {
    if is_switch(arg) {
        return "false".to_owned();
    }
    let defaults = arg.get_default_values().iter();
    let mut texts: Vec<String> = defaults.map(|v| literal(&v.to_string_lossy())).collect();
    if texts.is_empty() {
        let name = arg.get_value_names().and_then(|names| names.first());
        let name = name.map_or_else(|| arg.get_id().as_str().to_uppercase(), ToString::to_string);
        texts.push(format!("\"<{name}>\""));
    }
    match is_list(arg) {
        true => format!("[{}]", texts.join(", ")),
        false => texts.remove(0),
    }
}

/// Numbers stand for themselves; everything else is text.
fn literal(text: &str) -> String {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() => text.to_owned(),
        _ => toml::Value::from(text).to_string(),
    }
}

/// Text as comment lines, broken between words.
fn comment(file: &mut String, text: &str) {
    let indent = text.len() - text.trim_start().len();
    let mut line = " ".repeat(indent);
    for word in text.split_whitespace() {
        if line.len() > indent && line.chars().count() + 1 + word.chars().count() > WIDTH {
            let _ = writeln!(file, "# {line}");
            line = " ".repeat(indent);
        }
        if line.len() > indent {
            line.push(' ');
        }
        line.push_str(word);
    }
    let _ = writeln!(file, "# {line}");
}
