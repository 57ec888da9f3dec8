//! The ports that an image says its app listens on: `EXPOSE` in a Dockerfile, `ExposedPorts` in an image's
//! configuration. They bind nobody, but are the best guess there is.

use std::collections::{BTreeMap, BTreeSet};

/// The TCP ports that the image of a Dockerfile exposes, as far as its text tells: those of the stage that is built
/// (the last one, where none is named) and of the stages that it is made from. What an image from elsewhere exposes
/// is not in it.
pub fn of_dockerfile(text: &str, target: Option<&str>) -> BTreeSet<u16> {
    let mut global: BTreeMap<String, String> = BTreeMap::new();
    let mut stages: Vec<Stage> = Vec::new();
    for line in instructions(text) {
        let Some((word, rest)) = line.split_once(char::is_whitespace) else {
            continue;
        };
        let rest = rest.trim();
        match (word.to_ascii_uppercase().as_str(), stages.last_mut()) {
            ("FROM", _) => stages.push(Stage::begin(rest, &stages, &global)),
            ("ARG", None) => assign(rest, &mut global),
            ("ARG", Some(stage)) => {
                // Without a value of its own it has that of before the first stage.
                let inherited = global.get(rest).cloned();
                match inherited {
                    Some(value) => drop(stage.values.insert(rest.to_owned(), value)),
                    None => assign(rest, &mut stage.values),
                }
            }
            ("ENV", Some(stage)) => assign(rest, &mut stage.values),
            ("EXPOSE", Some(stage)) => {
                let words = rest.split_ascii_whitespace();
                let ports = words.flat_map(|word| ports(&resolve(word, &stage.values)));
                stage.ports.extend(ports);
            }
            _ => {}
        }
    }
    let built = match target {
        Some(target) => stages.iter().find(|stage| stage.is(target)),
        None => stages.last(),
    };
    built.map(|stage| stage.ports.clone()).unwrap_or_default()
}

/// The TCP ports of `3000`, `3000/tcp` or `3000-3002`.
pub fn ports(text: &str) -> Vec<u16> {
    let (range, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    if !protocol.eq_ignore_ascii_case("tcp") {
        return Vec::new();
    }
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    match (first.parse::<u16>(), last.parse::<u16>()) {
        (Ok(first), Ok(last)) if first > 0 && first <= last && last - first < MOST_OF_A_RANGE => {
            (first..=last).collect()
        }
        _ => Vec::new(),
    }
}

/// A longer range tells nothing of where the app listens.
const MOST_OF_A_RANGE: u16 = 32;

#[derive(Default)]
struct Stage {
    name: String,
    values: BTreeMap<String, String>,
    ports: BTreeSet<u16>,
}

impl Stage {
    /// `[--platform=…] image [AS name]`: begins with what the stage named `image` has.
    fn begin(rest: &str, before: &[Self], global: &BTreeMap<String, String>) -> Self {
        let mut words = rest
            .split_ascii_whitespace()
            .filter(|word| !word.starts_with("--"));
        let image = resolve(words.next().unwrap_or_default(), global);
        let name = match words.next() {
            Some(word) if word.eq_ignore_ascii_case("as") => words.next().unwrap_or_default(),
            _ => "",
        };
        let parent = before.iter().rev().find(|stage| stage.is(&image));
        Self {
            name: name.to_owned(),
            values: parent.map(|p| p.values.clone()).unwrap_or_default(),
            ports: parent.map(|p| p.ports.clone()).unwrap_or_default(),
        }
    }

    fn is(&self, name: &str) -> bool {
        !self.name.is_empty() && self.name.eq_ignore_ascii_case(name)
    }
}

/// Instructions, each on one line, without comments. What stands in here-documents is taken for instructions of its
/// own: it mostly is no `EXPOSE`.
fn instructions(text: &str) -> Vec<String> {
    let escape = text
        .lines()
        .map_while(|line| line.trim().strip_prefix('#'))
        .filter_map(|directive| directive.split_once('='))
        .find(|(name, _)| name.trim().eq_ignore_ascii_case("escape"))
        .map_or('\\', |(_, value)| {
            value.trim().chars().next().unwrap_or('\\')
        });
    let mut all = Vec::new();
    let mut open = String::new();
    for line in text.lines().map(str::trim) {
        if line.starts_with('#') || (line.is_empty() && open.is_empty()) {
            continue;
        }
        match line.strip_suffix(escape) {
            Some(begun) => {
                open.push_str(begun);
                open.push(' ');
            }
            None => {
                open.push_str(line);
                all.push(std::mem::take(&mut open));
            }
        }
    }
    all.push(open);
    all
}

/// `NAME=value …` or `NAME value`, of `ENV` and `ARG`.
fn assign(rest: &str, values: &mut BTreeMap<String, String>) {
    let words = shlex::split(rest).unwrap_or_default();
    let pairs: Vec<(String, String)> = match &words[..] {
        [name, value] if !name.contains('=') => vec![(name.clone(), value.clone())],
        words => words
            .iter()
            .filter_map(|word| word.split_once('='))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect(),
    };
    for (name, value) in pairs {
        let value = resolve(&value, values);
        values.insert(name, value);
    }
}

/// A word with `$NAME`, `${NAME}` and `${NAME:-default}` filled in; what is not known is left as it is.
fn resolve(word: &str, values: &BTreeMap<String, String>) -> String {
    let Some(dollar) = word.find('$') else {
        return word.to_owned();
    };
    let (before, rest) = word.split_at(dollar);
    let rest = &rest[1..];
    let (name, default, after) = match rest.strip_prefix('{').and_then(|r| r.split_once('}')) {
        Some((inside, after)) => match inside.split_once(":-") {
            Some((name, default)) => (name, Some(default), after),
            None => (inside, None, after),
        },
        None => {
            let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
            let end = rest.find(|c| !is_name(c)).unwrap_or(rest.len());
            (&rest[..end], None, &rest[end..])
        }
    };
    match values.get(name).map(String::as_str).or(default) {
        Some(value) => format!("{before}{value}{}", resolve(after, values)),
        None => word.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exposed(text: &str) -> Vec<u16> {
        of_dockerfile(text, None).into_iter().collect()
    }

    #[test]
    fn the_ports_of_the_stage_that_is_built_are_found() {
        assert_eq!(exposed("FROM node:22\nEXPOSE 3000\nCMD node ."), [3000]);
        assert_eq!(exposed("from x\nexpose 80/tcp 53/udp 443"), [80, 443]);
        assert_eq!(
            exposed("FROM x\nEXPOSE \\\n  # both\n  8000-8002 \\\n  9"),
            [9, 8000, 8001, 8002]
        );
        let stages =
            "FROM a AS base\nEXPOSE 4000\nFROM b AS build\nEXPOSE 1\nFROM base\nEXPOSE 5000";
        assert_eq!(exposed(stages), [4000, 5000]);
        assert_eq!(of_dockerfile(stages, Some("build")), [1].into());
        assert_eq!(exposed("FROM x\nCMD y"), [0u16; 0]);
    }

    #[test]
    fn variables_are_filled_in() {
        assert_eq!(exposed("FROM x\nENV PORT=3000 A=b\nEXPOSE $PORT"), [3000]);
        assert_eq!(exposed("FROM x\nENV PORT 3000\nEXPOSE ${PORT}/tcp"), [3000]);
        assert_eq!(exposed("ARG P=1234\nFROM x\nARG P\nEXPOSE $P"), [1234]);
        assert_eq!(exposed("FROM x\nEXPOSE ${PORT:-8081}"), [8081]);
        assert_eq!(exposed("FROM x\nARG PORT\nEXPOSE $PORT 7"), [7]);
        assert_eq!(
            exposed("ARG B=base\nFROM y AS base\nEXPOSE 6\nFROM ${B}"),
            [6]
        );
    }

    #[test]
    fn another_escape_and_nonsense_are_no_trouble() {
        assert_eq!(exposed("# escape=`\nFROM x\nEXPOSE `\n 81"), [81]);
        for nonsense in [
            "",
            "EXPOSE 1",
            "FROM",
            "FROM x\nEXPOSE 0 70000 9-1 a $ ${ ${}",
            "\\",
        ] {
            assert_eq!(exposed(nonsense), [0u16; 0], "{nonsense}");
        }
        assert_eq!(ports("1-65535"), [0u16; 0]);
    }
}
