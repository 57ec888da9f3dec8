//! Who is asking: bearer tokens, and basic authentication for registry clients.
//!
//! Only hashes of tokens are kept, so that a copy of the catalog opens nothing. A token is good for one
//! organization, or for everything.

use axum::extract::FromRequestParts;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::AUTHORIZATION;
use http::request::Parts;
use sha2::{Digest as _, Sha256};
use tern_catalog::{App, AppName, OrgSlug, Snapshot};

use crate::error::ApiError;
use crate::server::Shared;

/// Longest token looked at; ours have 69 characters.
const MAX_TOKEN_BYTES: usize = 512;
/// Most tokens of one call that are looked at.
const MAX_TOKENS: usize = 32;

/// Whoever sent a request, as its token says.
#[derive(Debug, Clone)]
pub struct Caller {
    organization: Option<OrgSlug>,
}

/// The hash that is kept of a token.
pub fn token_hash(token: &str) -> String {
    hex::encode(Sha256::digest(token))
}

impl Caller {
    /// May do everything.
    pub fn is_admin(&self) -> bool {
        self.organization.is_none()
    }

    /// May see and change this organization.
    pub fn may(&self, organization: &OrgSlug) -> bool {
        self.organization
            .as_ref()
            .is_none_or(|own| own == organization)
    }

    /// An error unless this caller may see and change the organization.
    pub fn must(&self, organization: &OrgSlug) -> Result<(), ApiError> {
        if self.may(organization) {
            Ok(())
        } else {
            Err(ApiError::forbidden(format!(
                "this token is not for organization {organization}"
            )))
        }
    }

    /// An error unless this caller may do everything.
    pub fn must_be_admin(&self) -> Result<(), ApiError> {
        if self.is_admin() {
            Ok(())
        } else {
            Err(ApiError::forbidden("this needs a token for everything"))
        }
    }

    /// An app that this caller may see and change.
    pub fn app<'a>(&self, snapshot: &'a Snapshot, name: &AppName) -> Result<&'a App, ApiError> {
        let app = snapshot
            .apps
            .get(name)
            .ok_or_else(|| ApiError::not_found(format!("app {name}")))?;
        self.must(&app.organization)?;
        Ok(app)
    }

    /// The caller with this `Authorization` header.
    pub fn find(
        snapshot: &Snapshot,
        internal: &str,
        header: Option<&str>,
    ) -> Result<Self, ApiError> {
        let internal = token_hash(internal);
        // Hashes are compared, so the time it takes tells nothing of the token.
        let mut hashes = tokens_of(header.unwrap_or_default())
            .into_iter()
            .map(|token| token_hash(&token));
        let known = hashes.find_map(|hash| {
            if hash == internal {
                return Some(None);
            }
            snapshot
                .tokens
                .get(&hash)
                .map(|token| token.organization.clone())
        });
        let organization = known.ok_or_else(ApiError::unauthenticated)?;
        Ok(Self { organization })
    }
}

impl FromRequestParts<Shared> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, shared: &Shared) -> Result<Self, ApiError> {
        let header = parts
            .headers
            .get(AUTHORIZATION)
            .and_then(|h| h.to_str().ok());
        Self::find(
            &shared.view.snapshot(),
            &shared.config.internal_token,
            header,
        )
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
