//! The forms that values of a `fly.toml` come in: times, sizes, tables that may be arrays, and what flyctl wrote in
//! earlier years.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Deserializer};
use tern_catalog::{CheckHeader, Concurrency, GoDuration};

#[derive(Deserialize)]
#[serde(untagged)]
enum NumberOrText {
    Number(u64),
    Text(String),
}

/// What stands where text is meant.
#[derive(Deserialize)]
#[serde(untagged)]
enum Scalar {
    Text(String),
    Bool(bool),
    Int(i64),
    Float(f64),
}

impl Scalar {
    fn text(self) -> String {
        match self {
            Self::Text(s) => s,
            Self::Bool(b) => b.to_string(),
            Self::Int(i) => i.to_string(),
            Self::Float(f) => f.to_string(),
        }
    }
}

fn duration<'de, D: Deserializer<'de>>(
    deserializer: D,
    bare: fn(u64) -> Duration,
) -> Result<Option<Duration>, D::Error> {
    match NumberOrText::deserialize(deserializer)? {
        NumberOrText::Number(n) => Ok(Some(bare(n))),
        // As if it were not there: flyctl has written that too.
        NumberOrText::Text(text) if text.is_empty() => Ok(None),
        NumberOrText::Text(text) => {
            let parsed = GoDuration::parse(&text).map_err(serde::de::Error::custom)?;
            Ok(Some(parsed.0))
        }
    }
}

pub(super) fn seconds<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Duration>, D::Error> {
    duration(deserializer, Duration::from_secs)
}

pub(super) fn millis<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Duration>, D::Error> {
    duration(deserializer, Duration::from_millis)
}

pub(super) fn memory<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    let wrong = |text: &str| {
        serde::de::Error::custom(format!(
            "\"{text}\" is not a memory size; write \"512mb\", \"1gb\" or MiB"
        ))
    };
    let mib = match NumberOrText::deserialize(deserializer)? {
        NumberOrText::Number(n) => n,
        NumberOrText::Text(text) => {
            let lower = text.trim().to_ascii_lowercase();
            let digits = lower
                .find(|c: char| !c.is_ascii_digit())
                .unwrap_or(lower.len());
            let number: u64 = lower[..digits].parse().map_err(|_| wrong(&text))?;
            match lower[digits..].trim() {
                "" | "mb" | "mib" | "m" => number,
                "gb" | "gib" | "g" => number.saturating_mul(1024),
                _ => return Err(wrong(&text)),
            }
        }
    };
    u32::try_from(mib)
        .map(Some)
        .map_err(|_| wrong(&mib.to_string()))
}

pub(super) fn gigabytes<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<u32>, D::Error> {
    let wrong = |text: &str| {
        serde::de::Error::custom(format!(
            "\"{text}\" is not a volume's size; write \"10gb\" or a number of GB"
        ))
    };
    match NumberOrText::deserialize(deserializer)? {
        NumberOrText::Number(n) => u32::try_from(n).map_err(|_| wrong(&n.to_string())),
        NumberOrText::Text(text) => {
            let lower = text.trim().to_ascii_lowercase();
            let digits = lower
                .strip_suffix("gib")
                .or(lower.strip_suffix("gb"))
                .or(lower.strip_suffix('g'))
                .unwrap_or(&lower);
            digits.trim().parse().map_err(|_| wrong(&text))
        }
    }
    .map(Some)
}

pub(super) fn text_map<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<BTreeMap<String, String>, D::Error> {
    let maps: Vec<BTreeMap<String, Scalar>> = one_or_many(deserializer)?;
    let all = maps.into_iter().flatten();
    Ok(all.map(|(key, value)| (key, value.text())).collect())
}

/// A port, as a number or, in files of 2021, as text.
pub(super) fn port<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u16, D::Error> {
    let wrong = |text: &str| {
        serde::de::Error::custom(format!("{text} is no port; write a number from 1 to 65535"))
    };
    let port = match NumberOrText::deserialize(deserializer)? {
        NumberOrText::Number(n) => u16::try_from(n).map_err(|_| wrong(&n.to_string())),
        NumberOrText::Text(text) => text.trim().parse().map_err(|_| wrong(&text)),
    };
    port.and_then(|port: u16| if port == 0 { Err(wrong("0")) } else { Ok(port) })
}

/// As [`port`], where it may be left out.
pub(super) fn some_port<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<u16>, D::Error> {
    port(deserializer).map(Some)
}

/// `[processes]`, or as it was written in 2021: an empty array, or one of tables with `name` and `command`.
pub(super) fn processes<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<BTreeMap<String, String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Form {
        Named {
            name: String,
            #[serde(default)]
            command: String,
        },
        Map(BTreeMap<String, String>),
    }
    let forms: Vec<Form> = one_or_many(deserializer)?;
    let mut all = BTreeMap::new();
    for form in forms {
        match form {
            Form::Named { name, command } => drop(all.insert(name, command)),
            Form::Map(map) => all.extend(map),
        }
    }
    Ok(all)
}

/// `[concurrency]`, or `"soft,hard"`. Told apart by what is there, so that keys nobody knows are seen.
pub(super) fn concurrency<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Concurrency, D::Error> {
    struct Either;
    impl<'de> serde::de::Visitor<'de> for Either {
        type Value = Concurrency;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a table with soft_limit and hard_limit")
        }

        fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Concurrency, E> {
            let limits = text.split_once(',').and_then(|(soft, hard)| {
                Some((soft.trim().parse().ok()?, hard.trim().parse().ok()?))
            });
            let (soft, hard) = limits.ok_or_else(|| {
                E::custom(format!(
                    "{text:?} is no concurrency; write soft_limit and hard_limit"
                ))
            })?;
            Ok(Concurrency {
                soft_limit: Some(soft),
                hard_limit: Some(hard),
                ..Concurrency::default()
            })
        }

        fn visit_map<A: serde::de::MapAccess<'de>>(self, map: A) -> Result<Concurrency, A::Error> {
            Concurrency::deserialize(serde::de::value::MapAccessDeserializer::new(map))
        }
    }
    deserializer.deserialize_any(Either)
}

/// Words, or one text that is split into words as a shell does.
pub(super) fn words<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Vec<String>>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Form {
        Text(String),
        Words(Vec<String>),
    }
    let words = match Form::deserialize(deserializer)? {
        Form::Words(words) => words,
        Form::Text(text) => shlex::split(&text).ok_or_else(|| {
            serde::de::Error::custom(format!("a quote in `{text}` is not closed"))
        })?,
    };
    Ok(Some(words).filter(|words| !words.is_empty()))
}

/// `headers` of a check: `[….headers]` with a text or several for each name, or an array of `{name, value}`.
pub(super) fn headers<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<CheckHeader>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Values {
        One(Scalar),
        Many(Vec<Scalar>),
    }
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Form {
        Named { name: String, value: Values },
        Map(BTreeMap<String, Values>),
    }
    let forms: Vec<Form> = one_or_many(deserializer)?;
    let pairs = forms.into_iter().flat_map(|form| match form {
        Form::Named { name, value } => vec![(name, value)],
        Form::Map(map) => map.into_iter().collect(),
    });
    let header = |(name, values)| CheckHeader {
        name,
        values: match values {
            Values::One(value) => vec![value.text()],
            Values::Many(values) => values.into_iter().map(Scalar::text).collect(),
        },
    };
    Ok(pairs.map(header).collect())
}

/// `[x]` or `[[x]]`, told apart by what is there, so that errors keep their place in the file.
pub(super) fn one_or_many<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Vec<T>, D::Error> {
    struct Either<T>(std::marker::PhantomData<T>);
    impl<'de, T: Deserialize<'de>> serde::de::Visitor<'de> for Either<T> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a table or an array of tables")
        }

        fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
            let mut all = Vec::new();
            while let Some(one) = seq.next_element()? {
                all.push(one);
            }
            Ok(all)
        }

        fn visit_map<A: serde::de::MapAccess<'de>>(self, map: A) -> Result<Vec<T>, A::Error> {
            T::deserialize(serde::de::value::MapAccessDeserializer::new(map)).map(|one| vec![one])
        }
    }
    deserializer.deserialize_any(Either(std::marker::PhantomData))
}
