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
        let token = header
            .and_then(token_of)
            .ok_or_else(ApiError::unauthenticated)?;
        // Hashes are compared, so the time it takes tells nothing of the token.
        let hash = token_hash(&token);
        if hash == token_hash(internal) {
            return Ok(Self { organization: None });
        }
        let known = snapshot
            .tokens
            .get(&hash)
            .ok_or_else(ApiError::unauthenticated)?;
        Ok(Self {
            organization: known.organization.clone(),
        })
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

/// `Bearer x`, `FlyV1 x` as flyctl sends it, or the password of `Basic`.
fn token_of(header: &str) -> Option<String> {
    let (scheme, rest) = header.split_once(' ')?;
    let rest = rest.trim();
    if rest.is_empty() || rest.len() > MAX_TOKEN_BYTES {
        return None;
    }
    if scheme.eq_ignore_ascii_case("bearer") || scheme.eq_ignore_ascii_case("flyv1") {
        return Some(rest.to_owned());
    }
    if scheme.eq_ignore_ascii_case("basic") {
        let decoded = String::from_utf8(STANDARD.decode(rest).ok()?).ok()?;
        return decoded
            .split_once(':')
            .map(|(_, password)| password.to_owned());
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_come_in_three_schemes() {
        assert_eq!(token_of("Bearer abc").as_deref(), Some("abc"));
        assert_eq!(token_of("FlyV1 abc").as_deref(), Some("abc"));
        assert_eq!(
            token_of(&format!("Basic {}", STANDARD.encode("x:abc"))).as_deref(),
            Some("abc")
        );
        for bad in [
            "",
            "abc",
            "Bearer ",
            "Digest abc",
            "Basic %%%",
            &format!("Bearer {}", "a".repeat(9999)),
        ] {
            assert_eq!(token_of(bad), None, "{bad}");
        }
    }
}
