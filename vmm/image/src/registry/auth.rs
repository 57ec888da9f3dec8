//! How registries ask who we are, and what we answer.
//!
//! `WWW-Authenticate` ([RFC 9110, section 11](https://www.rfc-editor.org/rfc/rfc9110#section-11)) and
//! the [token protocol](https://distribution.github.io/distribution/spec/auth/token/) of registries.

use ::http::{HeaderMap, HeaderValue, header};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use serde::Deserialize;
use url::Url;

use crate::Credentials;

/// Tokens are signed documents of a few KiB.
const MAX_TOKEN_RESPONSE: usize = 256 << 10;

/// What a registry wants to see.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    /// A user name and password.
    Basic,
    /// A token from a token service.
    Bearer(Bearer),
}

/// Where tokens are to be had.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Bearer {
    realm: String,
    service: Option<String>,
    scope: Option<String>,
}

impl Bearer {
    /// The address that gives out tokens to read `repository`.
    pub(super) fn token_url(&self, repository: &str) -> Option<Url> {
        let mut url = Url::parse(&self.realm).ok()?;
        let scope = match &self.scope {
            Some(scope) => scope.clone(),
            None => format!("repository:{repository}:pull"),
        };
        {
            let mut query = url.query_pairs_mut();
            if let Some(service) = &self.service {
                query.append_pair("service", service);
            }
            query.append_pair("scope", &scope);
        }
        Some(url)
    }
}

/// The challenge of a 401 that we can meet; tokens rather than passwords.
pub(super) fn challenge(headers: &HeaderMap) -> Option<Challenge> {
    let mut basic = None;
    for value in headers.get_all(header::WWW_AUTHENTICATE) {
        let Ok(text) = value.to_str() else { continue };
        let (scheme, parameters) = text.trim().split_once(' ').unwrap_or((text, ""));
        if scheme.eq_ignore_ascii_case("bearer") {
            let mut bearer = Bearer::default();
            for (name, value) in Parameters(parameters) {
                match name.to_ascii_lowercase().as_str() {
                    "realm" => bearer.realm = value,
                    "service" => bearer.service = Some(value),
                    "scope" => bearer.scope = Some(value),
                    _ => {}
                }
            }
            return Some(Challenge::Bearer(bearer));
        }
        if scheme.eq_ignore_ascii_case("basic") {
            basic = Some(Challenge::Basic);
        }
    }
    basic
}

/// `name=value, name="quoted \" value", …`. Ends at the first thing that is something else.
struct Parameters<'a>(&'a str);

impl Iterator for Parameters<'_> {
    type Item = (String, String);

    fn next(&mut self) -> Option<Self::Item> {
        let text = self.0.trim_start_matches([' ', '\t', ',']);
        let (name, rest) = text.split_once('=')?;
        let (value, rest) = match rest.strip_prefix('"') {
            Some(quoted) => {
                let mut value = String::new();
                let mut characters = quoted.char_indices();
                let end = loop {
                    match characters.next()? {
                        (at, '"') => break at + 1,
                        (_, '\\') => value.push(characters.next()?.1),
                        (_, other) => value.push(other),
                    }
                };
                (value, &quoted[end..])
            }
            None => {
                let end = rest.find([',', ' ']).unwrap_or(rest.len());
                (rest[..end].to_owned(), &rest[end..])
            }
        };
        self.0 = rest;
        Some((name.trim().to_owned(), value))
    }
}

/// The header of a user name and password.
pub(super) fn basic(credentials: &Credentials) -> HeaderValue {
    let encoded = STANDARD.encode(format!("{}:{}", credentials.username, credentials.password));
    secret(format!("Basic {encoded}")).expect("base64 is plain ASCII")
}

/// The header made of a token service's answer.
pub(super) async fn token(
    body: Incoming,
) -> Result<HeaderValue, Box<dyn std::error::Error + Send + Sync>> {
    #[derive(Deserialize)]
    struct Answer {
        token: Option<String>,
        access_token: Option<String>,
    }
    let body = Limited::new(body, MAX_TOKEN_RESPONSE).collect();
    let body = tokio::time::timeout(super::IDLE, body).await??.to_bytes();
    let answer: Answer = serde_json::from_slice(&body)?;
    let token = answer
        .token
        .or(answer.access_token)
        .ok_or("there is no token in its answer")?;
    Ok(secret(format!("Bearer {token}"))?)
}

fn secret(text: String) -> Result<HeaderValue, ::http::header::InvalidHeaderValue> {
    let mut value = HeaderValue::try_from(text)?;
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(values: &[&str]) -> Option<Challenge> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(
                header::WWW_AUTHENTICATE,
                HeaderValue::from_str(value).unwrap(),
            );
        }
        challenge(&headers)
    }

    #[test]
    fn reads_a_token_challenge() {
        let challenge = parse(&[
            r#"Bearer realm="https://auth.example/token",service="a \"b\"",scope="repository:x:pull,push""#,
        ]);
        let Some(Challenge::Bearer(bearer)) = challenge else {
            panic!("{challenge:?}")
        };
        assert_eq!(bearer.service.as_deref(), Some("a \"b\""));
        assert_eq!(
            bearer.token_url("x").unwrap().as_str(),
            "https://auth.example/token?service=a+%22b%22&scope=repository%3Ax%3Apull%2Cpush"
        );
    }

    #[test]
    fn prefers_tokens_and_asks_for_what_it_needs_if_not_told() {
        let challenge = parse(&["Basic realm=x", "bearer realm=http://a/t"]);
        let Some(Challenge::Bearer(bearer)) = challenge else {
            panic!("{challenge:?}")
        };
        let url = bearer.token_url("a/b").unwrap();
        assert_eq!(url.query(), Some("scope=repository%3Aa%2Fb%3Apull"));
        assert_eq!(parse(&["BASIC realm=\"x\""]), Some(Challenge::Basic));
        assert_eq!(parse(&["Negotiate"]), None);
    }

    proptest! {
        #[test]
        fn garbage_never_panics(text in "Bearer [ -~]{0,80}") {
            if let Some(Challenge::Bearer(bearer)) = parse(&[&text]) {
                let _ = bearer.token_url("x");
            }
        }
    }
}
