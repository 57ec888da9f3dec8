//! Tokens: made, listed and revoked.
//!
//! A token makes none that may more than itself, or for longer. It is known which made which: with a token go all that
//! it has made, so that who has stolen one keeps nothing when it is revoked.

use std::collections::BTreeSet;

use axum::extract::State;
use http::StatusCode;
use jiff::{SignedDuration, Timestamp};
use serde::Deserialize;
use serde_json::{Value, json};
use tern_catalog::{
    AppName, Compare, GoDuration, Op, OrgSlug, Record as _, Scope, Snapshot, Token, TokenApps,
    Transaction, limits,
};

use crate::apps;
use crate::auth::{Caller, generation, lineage, token_hash};
use crate::error::ApiError;
use crate::extract::{Json, Path, Query};
use crate::machines::optional;
use crate::rights::{AppRight, Denied, OrganizationRight, Principal};
use crate::server::Shared;

/// Digits of a token's hash that name it to people; enough to be unique.
const ID_DIGITS: usize = 16;
/// Fewest digits of an id that are taken for one: fewer may be a slip.
const LEAST_ID_DIGITS: usize = 8;
/// Randomness of a token.
const TOKEN_BYTES: usize = 32;
/// Last characters that are kept of a token: two bytes of its randomness.
const TAIL: usize = 4;
/// Longest name, in characters.
const MAX_NAME: usize = 100;
/// Most apps of one token.
const MAX_APPS: usize = 50;
/// Most tokens of one organization. Every copy of the catalog holds them in memory.
const MAX_TOKENS: usize = 1000;
/// How long an ended token is kept, so that who still uses it is told why it does not work.
const KEPT_AFTER_ITS_END: SignedDuration = SignedDuration::from_hours(30 * 24);

/// What a new token is to be good for.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Create {
    name: String,
    org_slug: Option<OrgSlug>,
    #[serde(default)]
    scope: Kind,
    /// Of `deploy` and `machine_exec`.
    #[serde(default)]
    apps: BTreeSet<AppName>,
    /// From now; absent is for ever.
    expiry: Option<GoDuration>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    #[default]
    Full,
    Read,
    Deploy,
    MachineExec,
}

#[derive(Debug, Default, Deserialize)]
struct ToDeploy {
    expiry: Option<GoDuration>,
}

#[derive(Debug, Default, Deserialize)]
pub struct RevokeQuery {
    /// What it has made stays good.
    #[serde(default)]
    keep_made: bool,
}

/// `GET /v1/tokens`.
pub async fn list(State(shared): State<Shared>, caller: Caller) -> Json<Value> {
    let snapshot = shared.view.snapshot();
    let mut tokens: Vec<&Token> = visible(&snapshot, &caller, OrganizationRight::Read).collect();
    tokens.sort_by_key(|t| t.created_at);
    let now = Timestamp::now();
    let shown: Vec<Value> = tokens.into_iter().map(|t| shape(t, now)).collect();
    Json(json!({"tokens": shown}))
}

/// `GET /v1/tokens/current`: what the call is sent with.
pub async fn current_one(caller: Caller) -> Json<Value> {
    let now = Timestamp::now();
    let own: Vec<Value> = caller.token().map(|t| shape(t, now)).into_iter().collect();
    Json(json!({"tokens": own}))
}

/// `POST /v1/tokens`: the only answer that ever holds the token.
pub async fn create(
    State(shared): State<Shared>,
    caller: Caller,
    Json(create): Json<Create>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let made = mint(&shared, &caller, &create).await?;
    Ok((StatusCode::CREATED, Json(made)))
}

/// `POST /v1/apps/{app}/deploy_token`, as Fly.io has it: a token to deploy that app.
pub async fn create_to_deploy(
    State(shared): State<Shared>,
    caller: Caller,
    Path(app): Path<AppName>,
    body: bytes::Bytes,
) -> Result<Json<Value>, ApiError> {
    let asked: ToDeploy = optional(&body)?;
    let create = Create {
        name: "deploy token".to_owned(),
        org_slug: None,
        scope: Kind::Deploy,
        apps: [app].into(),
        expiry: asked.expiry,
    };
    let made = mint(&shared, &caller, &create).await?;
    Ok(Json(json!({"token": made["token"]})))
}

/// What is made, with the token.
async fn mint(shared: &Shared, caller: &Caller, create: &Create) -> Result<Value, ApiError> {
    let (snapshot, now) = (shared.view.snapshot(), Timestamp::now());
    let parent = caller.token().ok_or(Denied::Unknown)?;
    let (organization, scope) = wanted(&snapshot, caller, create)?;
    let secret = format!("tern_{}", hex::encode(rand::random::<[u8; TOKEN_BYTES]>()));
    let token = Token {
        hash: token_hash(&secret),
        name: named(&create.name)?,
        organization,
        scope,
        created_at: now,
        expires_at: end(create.expiry, now, parent)?,
        parent: Some(parent.hash.clone()),
        tail: secret.chars().skip(secret.len() - TAIL).collect(),
    };
    // Whatever was asked for and however: what a token may do is what its record says.
    let principal = Principal::of(&token).filter(|made| caller.principal().covers(made));
    if principal.is_none() {
        return Err(ApiError::forbidden(format!(
            "a token makes none that may more than itself; this one is {}",
            caller.principal()
        )));
    }
    if generation(&snapshot, &token).is_none() {
        return Err(ApiError::forbidden(
            "this token was made by one that was made by another, and so on; ask with one of the first of them",
        ));
    }
    sweep(shared, &snapshot, now).await?;
    let beside = snapshot.tokens.values();
    if beside
        .filter(|t| t.organization == token.organization)
        .count()
        >= MAX_TOKENS
    {
        return Err(ApiError::invalid(format!(
            "there are {MAX_TOKENS} tokens already; revoke some, see `tern tokens list`"
        )));
    }
    let mut compares = vec![Compare::absent(&token), current(shared, parent).await?.1];
    for app in token.scope.apps().into_iter().flat_map(TokenApps::keys) {
        compares.push(apps::still_there(shared, caller, app).await?);
    }
    let transaction = Transaction {
        compares,
        ops: vec![Op::put(&token)],
    };
    let revision = shared.catalog.store().commit(transaction).await?;
    shared.seen(revision).await;
    let mut shown = shape(&token, now);
    shown["token"] = json!(secret);
    Ok(shown)
}

/// `DELETE /v1/tokens/{id}`: it, and all that it has made, unless that is to be kept.
pub async fn revoke(
    State(shared): State<Shared>,
    caller: Caller,
    Path(id): Path<String>,
    Query(query): Query<RevokeQuery>,
) -> Result<Json<Value>, ApiError> {
    if id.len() < LEAST_ID_DIGITS {
        return Err(ApiError::invalid(format!(
            "{id:?} is too short for the id of a token: give the {ID_DIGITS} digits that `tern tokens list` shows"
        )));
    }
    let snapshot = shared.view.snapshot();
    // Of what the caller may not revoke it is not told either.
    let mut found: Vec<&Token> = visible(&snapshot, &caller, OrganizationRight::Write)
        .filter(|t| t.hash.starts_with(&id))
        .collect();
    let token = match (found.pop(), found.len()) {
        (None, _) => return Err(ApiError::not_found(format!("token {id}"))),
        (Some(token), 0) => token,
        (Some(_), others) => {
            return Err(ApiError::conflict(format!(
                "{id} is the beginning of {} tokens' ids; give more of its digits",
                others + 1
            )));
        }
    };
    let mut gone = vec![token];
    let others = snapshot.tokens.values().map(|t| &**t);
    let mut others = others.filter(|t| t.hash != token.hash);
    if query.keep_made {
        // Who revokes what itself came from, and keeps what that has made, would leave its owner nothing to revoke.
        let is_own = |of: &Token| of.hash == token.hash || descends(&snapshot, of, &token.hash);
        if *caller.principal() != Principal::Platform && caller.token().is_some_and(|t| is_own(t)) {
            return Err(ApiError::forbidden(
                "a token cannot be revoked by itself, or by one that it has made, and leave what it has made; use \
                 another token of the organization",
            ));
        }
        let own: Vec<&Token> = others
            .filter(|t| t.parent.as_ref() == Some(&token.hash))
            .collect();
        hand_up(&shared, token, &own).await?;
    } else {
        gone.extend(
            others
                .by_ref()
                .filter(|t| descends(&snapshot, t, &token.hash)),
        );
        // What it has made is good no more with the first of these: the rest is to leave nothing behind.
        for some in gone.chunks(limits::MAX_OPS) {
            let revision = shared.catalog.store().commit(removal(some)).await?;
            shared.seen(revision).await;
        }
    }
    let ids: Vec<&str> = gone.iter().map(|t| id_of(t)).collect();
    Ok(Json(json!({"revoked": ids})))
}

/// Revokes a token, and makes what it has made the work of who has made it.
async fn hand_up(shared: &Shared, token: &Token, made: &[&Token]) -> Result<(), ApiError> {
    if made.len() >= limits::MAX_OPS {
        return Err(ApiError::conflict(format!(
            "token {} has made {} others; revoke some of these first",
            id_of(token),
            made.len()
        )));
    }
    let mut transaction = removal(&[token]);
    for made in made {
        // One that is revoked at this moment must not come back.
        let (mut made, compare) = current(shared, made).await?;
        made.parent.clone_from(&token.parent);
        transaction.compares.push(compare);
        transaction.ops.push(Op::put(&made));
    }
    let revision = shared.catalog.store().commit(transaction).await?;
    shared.seen(revision).await;
    Ok(())
}

/// For which organization and what a token is asked for, where that makes sense and the caller may know of it.
fn wanted(
    snapshot: &Snapshot,
    caller: &Caller,
    create: &Create,
) -> Result<(Option<OrgSlug>, Scope), ApiError> {
    let by_app = matches!(create.scope, Kind::Deploy | Kind::MachineExec);
    if by_app == create.apps.is_empty() || create.apps.len() > MAX_APPS {
        return Err(ApiError::invalid(format!(
            "apps: a token of scope deploy or machine_exec is for 1 to {MAX_APPS} apps, any other for none"
        )));
    }
    if let Some(org) = &create.org_slug {
        let least = OrganizationRight::See;
        let principal = caller.principal();
        principal.must_have_organization(snapshot, org, least)?;
    }
    let needed = match create.scope {
        Kind::Full => return Ok((create.org_slug.clone(), Scope::Full)),
        Kind::Read if create.org_slug.is_none() => {
            return Err(ApiError::invalid(
                "org_slug: say which organization the token is to read",
            ));
        }
        Kind::Read => return Ok((create.org_slug.clone(), Scope::Read)),
        Kind::Deploy => AppRight::Deploy,
        Kind::MachineExec => AppRight::Exec,
    };
    let mut owner: Option<&OrgSlug> = create.org_slug.as_ref();
    let mut apps = TokenApps::new();
    for name in &create.apps {
        let principal = caller.principal();
        let app = principal.must_have_app(snapshot, name, needed)?;
        if owner.is_some_and(|owner| *owner != app.organization) {
            return Err(ApiError::invalid(format!(
                "app {name} is of organization {}: a token is for the apps of one organization",
                app.organization
            )));
        }
        owner = Some(&app.organization);
        apps.insert(name.clone(), app.created_at);
    }
    let scope = match create.scope {
        Kind::MachineExec => Scope::MachineExec { apps },
        _ => Scope::Deploy { apps },
    };
    Ok((owner.cloned(), scope))
}

fn named(name: &str) -> Result<String, ApiError> {
    // It is printed to terminals.
    if name.trim().is_empty() || name.chars().any(char::is_control) {
        return Err(ApiError::invalid(
            "name: give the token a name to know it by, of characters that can be printed",
        ));
    }
    Ok(name.chars().take(MAX_NAME).collect())
}

/// When a token that is asked for now ends; its parent's end is the last it may have.
fn end(
    expiry: Option<GoDuration>,
    now: Timestamp,
    parent: &Token,
) -> Result<Option<Timestamp>, ApiError> {
    let end = match expiry {
        None => None,
        Some(GoDuration(expiry)) => {
            let end = SignedDuration::try_from(expiry)
                .ok()
                .filter(|expiry| expiry.is_positive())
                .and_then(|expiry| now.checked_add(expiry).ok());
            Some(end.ok_or_else(|| {
                ApiError::invalid("expiry: give a time from now on, as in \"720h\"")
            })?)
        }
    };
    match parent.expires_at {
        Some(last) if end.is_none_or(|end| end > last) => Err(ApiError::forbidden(format!(
            "a token makes none that is good for longer than itself, until {last:.0}; give an expiry before that"
        ))),
        _ => Ok(end),
    }
}

/// A token as it is now, and what makes a transaction fail if it was revoked or changed by then.
async fn current(shared: &Shared, token: &Token) -> Result<(Token, Compare), ApiError> {
    let found = shared.catalog.get::<Token>(&token.hash).await?;
    let (token, revision) = found.ok_or(Denied::Unknown)?;
    let compare = Compare {
        key: token.key(),
        revision: Some(revision),
    };
    Ok((token, compare))
}

/// Removes what ended long ago, and what is good for nothing any more: its apps are gone, or what has made it was
/// revoked, and that broken off.
async fn sweep(shared: &Shared, snapshot: &Snapshot, now: Timestamp) -> Result<(), ApiError> {
    // What cannot be read here may be what a token lives by.
    if !snapshot.unreadable.is_empty() {
        return Ok(());
    }
    let over = |token: &&Token| {
        let kept_until = |end: Timestamp| end.checked_add(KEPT_AFTER_ITS_END);
        let ended = token
            .expires_at
            .is_some_and(|end| kept_until(end).is_ok_and(|t| t <= now));
        let is_there = |(name, made): (&AppName, &Timestamp)| {
            snapshot
                .apps
                .get(name)
                .is_some_and(|app| app.created_at == *made)
        };
        let apps_gone = token
            .scope
            .apps()
            .is_some_and(|apps| !apps.iter().any(is_there));
        ended || apps_gone || generation(snapshot, token).is_none()
    };
    let all = snapshot.tokens.values().map(|t| &**t);
    let over: Vec<&Token> = all.filter(over).take(limits::MAX_OPS).collect();
    if !over.is_empty() {
        shared.catalog.store().commit(removal(&over)).await?;
    }
    Ok(())
}

fn removal(tokens: &[&Token]) -> Transaction {
    let ops = tokens.iter().map(|t| Op::Delete { key: t.key() });
    Transaction::of(ops.collect())
}

/// The good and the ended tokens that are the caller's to see, or to revoke: its own, what that has made, and what
/// is of an organization that it has this right on. Those for everything are for who may do everything.
fn visible<'a>(
    snapshot: &'a Snapshot,
    caller: &Caller,
    needed: OrganizationRight,
) -> impl Iterator<Item = &'a Token> {
    let own = caller.token().map(|own| own.hash.as_str());
    let is_visible = move |token: &&Token| {
        let granted = match &token.organization {
            Some(org) => caller.principal().on_organization(org) >= Some(needed),
            None => *caller.principal() == Principal::Platform,
        };
        let is_own = own.is_some_and(|own| descends(snapshot, token, own));
        (granted || is_own) && generation(snapshot, token).is_some()
    };
    let all = snapshot.tokens.values().map(|t| &**t);
    all.filter(is_visible).collect::<Vec<_>>().into_iter()
}

/// Whether a token is that one, or was made by it, or by one that it has made.
fn descends(snapshot: &Snapshot, token: &Token, from: &str) -> bool {
    lineage(snapshot, token).any(|above| above.hash == from)
}

fn id_of(token: &Token) -> &str {
    token.hash.get(..ID_DIGITS).unwrap_or(&token.hash)
}

fn shape(token: &Token, now: Timestamp) -> Value {
    let scope = match token.scope {
        Scope::Full => "full",
        Scope::Read => "read",
        Scope::Deploy { .. } => "deploy",
        Scope::MachineExec { .. } => "machine_exec",
    };
    json!({
        "id": id_of(token),
        "name": token.name,
        "org_slug": token.organization,
        "scope": scope,
        "apps": token.scope.apps().map(|apps| apps.keys().collect::<Vec<_>>()).unwrap_or_default(),
        "last_characters": token.tail,
        "created_at": token.created_at,
        "expires_at": token.expires_at,
        "expired": token.has_expired(now),
        "made_by": token.parent.as_deref().and_then(|hash| hash.get(..ID_DIGITS)),
    })
}

#[cfg(test)]
mod tests;
