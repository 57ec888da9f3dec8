//! Who is asking: bearer tokens, and basic authentication for registry clients.
//!
//! Only hashes of tokens are kept, so that a copy of the catalog opens nothing. [`authorize`] decides for every
//! request, before its handler: `routes.rs` has what each route needs, [`crate::rights`] who has it.

use std::sync::Arc;

use axum::extract::FromRequestParts;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::request::Parts;
use jiff::Timestamp;
use sha2::{Digest as _, Sha256};
use tern_catalog::{App, AppName, OrgSlug, Snapshot, Token};

use crate::error::ApiError;
use crate::rights::{AppRight, Denied, Principal, Right};

/// Longest token looked at; ours have 69 characters.
const MAX_TOKEN_BYTES: usize = 512;
/// Most tokens of one call that are looked at.
const MAX_TOKENS: usize = 32;

/// Tokens that were made one by another; the first has none above it.
const MAX_GENERATIONS: usize = 8;

/// Whoever sent a request, and what the route it came by needs.
#[derive(Debug, Clone)]
pub struct Caller {
    principal: Principal,
    /// The token as it is kept; a host's is not.
    token: Option<Arc<Token>>,
    right: Right,
}

/// The hash that is kept of a token.
pub fn token_hash(token: &str) -> String {
    hex::encode(Sha256::digest(token))
}

/// Decides of a request: who sent it, where that one may do what the route needs with the thing that `named` names.
/// `None` is anybody, where anybody may. Of several tokens the first that may counts.
pub fn authorize(
    snapshot: &Snapshot,
    internal: &str,
    now: Timestamp,
    header: Option<&str>,
    right: Right,
    named: Option<&str>,
) -> Result<Option<Caller>, Denied> {
    if right == Right::Public {
        return Ok(None);
    }
    let mut denied = Denied::Unknown;
    for token in tokens_of(header.unwrap_or_default()) {
        let known = identify(snapshot, internal, now, &token);
        let allowed = known.and_then(|(principal, token)| {
            principal.check(snapshot, right, named)?;
            Ok(Caller {
                principal,
                token,
                right,
            })
        });
        match allowed {
            Ok(caller) => return Ok(Some(caller)),
            Err(other) if other.says() > denied.says() => denied = other,
            Err(_) => {}
        }
    }
    Err(denied)
}

fn identify(
    snapshot: &Snapshot,
    internal: &str,
    now: Timestamp,
    token: &str,
) -> Result<(Principal, Option<Arc<Token>>), Denied> {
    // Hashes are compared, so the time it takes tells nothing of the token.
    let hash = token_hash(token);
    if hash == token_hash(internal) {
        return Ok((Principal::Host, None));
    }
    let token = snapshot.tokens.get(&hash).ok_or(Denied::Unknown)?;
    let principal = Principal::of(token).ok_or(Denied::Unknown)?;
    generation(snapshot, token).ok_or(Denied::Unknown)?;
    match token.expires_at {
        Some(end) if token.has_expired(now) => Err(Denied::Expired(format!(
            "this token ({:?}) has expired at {end:.0}; make a new one with `tern tokens create`",
            token.name
        ))),
        _ => Ok((principal, Some(Arc::clone(token)))),
    }
}

/// How many tokens are above this one, each made by the one before; `None` where one of them was revoked, and all
/// that it has made with it.
pub fn generation(snapshot: &Snapshot, token: &Token) -> Option<usize> {
    let mut above = token.parent.as_ref();
    for generation in 0..MAX_GENERATIONS {
        match above {
            None => return Some(generation),
            Some(hash) => above = snapshot.tokens.get(hash)?.parent.as_ref(),
        }
    }
    None
}

/// This token, the one that has made it, and so on to the first.
pub fn lineage<'a>(snapshot: &'a Snapshot, token: &'a Token) -> impl Iterator<Item = &'a Token> {
    let maker = |token: &&Token| {
        let hash = token.parent.as_ref()?;
        snapshot.tokens.get(hash).map(|maker| &**maker)
    };
    std::iter::successors(Some(token), maker).take(MAX_GENERATIONS)
}

impl Caller {
    /// What it may do.
    pub fn principal(&self) -> &Principal {
        &self.principal
    }

    /// Its token, as it is kept.
    pub fn token(&self) -> Option<&Arc<Token>> {
        self.token.as_ref()
    }

    /// The app that the route is about. It was there when the call came in; since then its body has come, and the
    /// name may be somebody else's by now.
    pub fn app<'a>(&self, snapshot: &'a Snapshot, name: &AppName) -> Result<&'a App, Denied> {
        let needed = match self.right {
            Right::App(needed) => needed,
            _ => AppRight::Manage,
        };
        self.principal.must_have_app(snapshot, name, needed)
    }

    /// An error unless this caller may have the images of an app that the call names beside its own.
    pub fn must_pull(&self, snapshot: &Snapshot, name: &AppName) -> Result<(), Denied> {
        let found = self.principal.must_have_app(snapshot, name, AppRight::Pull);
        found.map(drop)
    }

    /// Whether an app is shown to this caller.
    pub fn sees_app(&self, app: &App) -> bool {
        self.principal.on_app(app) >= Some(AppRight::Read)
    }

    /// Whether an organization is shown to this caller.
    pub fn sees_organization(&self, organization: &OrgSlug) -> bool {
        self.principal.on_organization(organization).is_some()
    }
}

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = ApiError;

    /// As [`authorize`] has found it before the handler was called.
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let found = parts.extensions.get::<Self>().cloned();
        found.ok_or_else(|| Denied::Unknown.into())
    }
}

/// `Bearer x`, `FlyV1 x,y` as flyctl sends it (any good one counts), or the password of `Basic`.
fn tokens_of(header: &str) -> Vec<String> {
    let Some((scheme, rest)) = header.split_once(' ') else {
        return Vec::new();
    };
    let rest = rest.trim();
    let mut tokens: Vec<String> = if scheme.eq_ignore_ascii_case("bearer") {
        vec![rest.to_owned()]
    } else if scheme.eq_ignore_ascii_case("flyv1") {
        let listed = rest.split(',').map(|token| token.trim().to_owned());
        listed.take(MAX_TOKENS).collect()
    } else if scheme.eq_ignore_ascii_case("basic") && rest.len() <= 2 * MAX_TOKEN_BYTES {
        let decoded = STANDARD.decode(rest).ok();
        let decoded = decoded.and_then(|bytes| String::from_utf8(bytes).ok());
        let password = decoded
            .as_deref()
            .and_then(|d| d.split_once(':'))
            .map(|(_, password)| password.to_owned());
        password.into_iter().collect()
    } else {
        Vec::new()
    };
    // Others' may be longer: those are not ours.
    tokens.retain(|token| (1..=MAX_TOKEN_BYTES).contains(&token.len()));
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_come_in_three_schemes() {
        assert_eq!(tokens_of("Bearer abc"), ["abc"]);
        assert_eq!(tokens_of("FlyV1 abc"), ["abc"]);
        let basic = format!("Basic {}", STANDARD.encode("x:abc"));
        assert_eq!(tokens_of(&basic), ["abc"]);
        for bad in [
            "",
            "abc",
            "Bearer ",
            "Digest abc",
            "Basic %%%",
            &format!("Bearer {}", "a".repeat(9999)),
        ] {
            assert!(tokens_of(bad).is_empty(), "{bad}");
        }
    }

    #[test]
    fn of_several_tokens_each_is_tried() {
        let others = format!("fm2_{}", "x".repeat(900));
        assert_eq!(
            tokens_of(&format!("FlyV1 fm2_x, {others},abc,")),
            ["fm2_x", "abc"]
        );
        let many = vec!["t"; 1000].join(",");
        assert_eq!(tokens_of(&format!("FlyV1 {many}")).len(), MAX_TOKENS);
    }
}
