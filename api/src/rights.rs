//! What a call needs, what a token gives, and whether the one is in the other.
//!
//! A token makes a [`Principal`], a route needs a [`Right`], and [`Principal::check`] is the one place where the two
//! meet. Rights on an app, and on an organization, are in order: each holds those before it. Who has none on a thing
//! is answered as if it were not there, and who has too little is told what is needed.

use std::fmt;

use tern_catalog::{App, AppName, NameError, OrgSlug, Scope, Snapshot, Token, TokenApps};

/// What a call needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Right {
    /// Nothing: anybody may, without a token.
    Public,
    /// Any good token; nothing of anybody's is told.
    Known,
    /// A token of people's. The answer holds what that token may see, and no more.
    Own,
    /// All there is.
    Platform,
    /// The organization that the path names as `{org}`.
    Organization(OrganizationRight),
    /// The organization that the body names as `org_slug`.
    OrganizationInBody(OrganizationRight),
    /// The app that the path names as `{app}`.
    App(AppRight),
}

/// What may be done with an app. Each holds those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum AppRight {
    /// Have its images.
    Pull,
    /// See it, its Machines with their configurations, and its logs.
    Read,
    /// Run commands in its Machines. These see all that its Machines do, which is why it holds [`AppRight::Read`].
    Exec,
    /// Change what runs, and what that needs. Whoever may deploy may run what they like anyway.
    Deploy,
    /// Destroy it, its volumes and their snapshots: what no deploy brings back.
    Manage,
}

/// What may be done with an organization. Each holds those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum OrganizationRight {
    /// Know that it is there.
    See,
    /// See all that it has.
    Read,
    /// Change all that it has.
    Write,
}

/// Whoever sent a request, as its token says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Principal {
    /// May do everything.
    Platform,
    /// A host of ours: pulls images of every app.
    Host,
    /// May do everything in its organization.
    Organization(OrgSlug),
    /// May see everything in its organization.
    Reader(OrgSlug),
    /// May deploy these apps of its organization.
    Deployer(OrgSlug, TokenApps),
    /// May run commands in the Machines of these apps of its organization.
    Executor(OrgSlug, TokenApps),
}

/// Why a call is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Denied {
    /// There is no good token. Says nothing of why: whoever guesses learns nothing.
    Unknown,
    /// The token was good once. Only who has it learns that.
    Expired(String),
    /// There is no such thing, or none that this token may know of.
    NotFound(String),
    /// What is there needs more.
    Forbidden(String),
    /// The path names nothing that could be.
    Malformed(String),
}

impl Principal {
    /// Whom a token speaks for; nobody, where its record makes no sense.
    pub fn of(token: &Token) -> Option<Self> {
        let Some(org) = token.organization.clone() else {
            return (token.scope == Scope::Full).then_some(Self::Platform);
        };
        Some(match &token.scope {
            Scope::Full => Self::Organization(org),
            Scope::Read => Self::Reader(org),
            Scope::Deploy { apps } => Self::Deployer(org, apps.clone()),
            Scope::MachineExec { apps } => Self::Executor(org, apps.clone()),
        })
    }

    /// What it may do with this app at most.
    pub fn on_app(&self, app: &App) -> Option<AppRight> {
        match self {
            Self::Platform => Some(AppRight::Manage),
            Self::Host => Some(AppRight::Pull),
            Self::Organization(org) if *org == app.organization => Some(AppRight::Manage),
            Self::Reader(org) if *org == app.organization => Some(AppRight::Read),
            Self::Deployer(org, apps) if means(org, apps, app) => Some(AppRight::Deploy),
            Self::Executor(org, apps) if means(org, apps, app) => Some(AppRight::Exec),
            _ => None,
        }
    }

    /// What it may do with this organization at most.
    pub fn on_organization(&self, organization: &OrgSlug) -> Option<OrganizationRight> {
        match self {
            Self::Platform => Some(OrganizationRight::Write),
            Self::Host => None,
            Self::Organization(org) => (org == organization).then_some(OrganizationRight::Write),
            Self::Reader(org) => (org == organization).then_some(OrganizationRight::Read),
            Self::Deployer(org, _) | Self::Executor(org, _) => {
                (org == organization).then_some(OrganizationRight::See)
            }
        }
    }

    /// Whether it may do all that the other may: only then may it make a token for that.
    pub fn covers(&self, other: &Self) -> bool {
        use Principal::{Deployer, Executor, Host, Organization, Platform, Reader};
        match (self, other) {
            // Hosts' tokens are in no catalog.
            (Host, _) | (_, Host) => false,
            (Platform, _) => true,
            (_, Platform) => false,
            (
                Organization(own),
                Organization(org) | Reader(org) | Deployer(org, _) | Executor(org, _),
            ) => own == org,
            (Reader(own), Reader(org)) => own == org,
            (Deployer(own, all), Deployer(org, apps) | Executor(org, apps))
            | (Executor(own, all), Executor(org, apps)) => {
                let has = |(name, made)| all.get(name) == Some(made);
                own == org && apps.iter().all(has)
            }
            (Reader(_) | Deployer(..) | Executor(..), _) => false,
        }
    }

    /// An error unless it has this right, on the thing named `named` where the right is on one.
    pub fn check(
        &self,
        snapshot: &Snapshot,
        right: Right,
        named: Option<&str>,
    ) -> Result<(), Denied> {
        match right {
            Right::Public | Right::Known => Ok(()),
            Right::Own if *self == Self::Host => Err(Denied::Forbidden(format!(
                "this needs a token of people's; this one is {self}"
            ))),
            Right::Own => Ok(()),
            Right::Platform if *self == Self::Platform => Ok(()),
            Right::Platform => Err(Denied::Forbidden(format!(
                "this needs a token for everything; this one is {self}"
            ))),
            Right::Organization(needed) | Right::OrganizationInBody(needed) => {
                let org = named.unwrap_or_default().parse()?;
                self.must_have_organization(snapshot, &org, needed)
            }
            Right::App(needed) => {
                let app = named.unwrap_or_default().parse()?;
                self.must_have_app(snapshot, &app, needed).map(drop)
            }
        }
    }

    /// The app of this name, if it is there and the right on it too.
    pub fn must_have_app<'a>(
        &self,
        snapshot: &'a Snapshot,
        name: &AppName,
        needed: AppRight,
    ) -> Result<&'a App, Denied> {
        let found = snapshot.apps.get(name);
        let granted = found.and_then(|app| Some((app, self.on_app(app)?)));
        match granted {
            None => Err(Denied::NotFound(format!("app {name}"))),
            Some((app, granted)) if granted >= needed => Ok(app),
            Some(_) => Err(Denied::Forbidden(format!(
                "this needs a token that may {needed} app {name}; this one is {self}"
            ))),
        }
    }

    /// An error unless the organization is there and the right on it too.
    pub fn must_have_organization(
        &self,
        snapshot: &Snapshot,
        org: &OrgSlug,
        needed: OrganizationRight,
    ) -> Result<(), Denied> {
        let found = snapshot.organizations.get(org);
        match found.and_then(|_| self.on_organization(org)) {
            None => Err(Denied::NotFound(format!("organization {org}"))),
            Some(granted) if granted >= needed => Ok(()),
            Some(_) => Err(Denied::Forbidden(format!(
                "this needs a token that may {needed} organization {org}; this one is {self}"
            ))),
        }
    }
}

/// Whether this app is among them. Its name alone does not do: another organization may have it since, or another app.
fn means(org: &OrgSlug, apps: &TokenApps, app: &App) -> bool {
    *org == app.organization && apps.get(&app.name) == Some(&app.created_at)
}

impl Denied {
    /// Of several tokens' refusals the one that says most is told.
    pub fn says(&self) -> u8 {
        match self {
            Self::Unknown => 0,
            Self::Expired(_) => 1,
            Self::NotFound(_) => 2,
            Self::Malformed(_) => 3,
            Self::Forbidden(_) => 4,
        }
    }
}

impl From<NameError> for Denied {
    fn from(error: NameError) -> Self {
        Self::Malformed(error.to_string())
    }
}

impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Platform => write!(f, "for everything"),
            Self::Host => write!(f, "a host's, which pulls images"),
            Self::Organization(org) => write!(f, "for organization {org}"),
            Self::Reader(org) => write!(f, "to read organization {org}"),
            Self::Deployer(_, apps) => write!(f, "to deploy {}", names(apps)),
            Self::Executor(_, apps) => write!(f, "to run commands in Machines of {}", names(apps)),
        }
    }
}

fn names(apps: &TokenApps) -> String {
    let names: Vec<&str> = apps.keys().map(AppName::as_str).collect();
    names.join(", ")
}

impl fmt::Display for AppRight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pull => "pull images of",
            Self::Read => "read",
            Self::Exec => "run commands in Machines of",
            Self::Deploy => "deploy",
            Self::Manage => "destroy what belongs to",
        })
    }
}

impl fmt::Display for OrganizationRight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::See => "see",
            Self::Read => "read",
            Self::Write => "change",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn principals() -> Vec<Principal> {
        let org = |slug: &str| slug.parse::<OrgSlug>().unwrap();
        let made = jiff::Timestamp::UNIX_EPOCH;
        let apps = |names: &[&str]| -> TokenApps {
            names.iter().map(|n| (n.parse().unwrap(), made)).collect()
        };
        vec![
            Principal::Platform,
            Principal::Host,
            Principal::Organization(org("a")),
            Principal::Organization(org("b")),
            Principal::Reader(org("a")),
            Principal::Deployer(org("a"), apps(&["shop"])),
            Principal::Deployer(org("a"), apps(&["shop", "blog"])),
            Principal::Deployer(org("b"), apps(&["shop"])),
            Principal::Executor(org("a"), apps(&["shop"])),
            Principal::Executor(org("a"), apps(&["blog"])),
        ]
    }

    #[test]
    fn who_covers_another_has_each_of_its_rights() {
        let things = ["a", "b"].map(|org| org.parse::<OrgSlug>().unwrap());
        for one in principals() {
            for other in principals() {
                if !one.covers(&other) {
                    continue;
                }
                for organization in &things {
                    let (more, less) = (
                        one.on_organization(organization),
                        other.on_organization(organization),
                    );
                    assert!(more >= less, "{one:?} covers {other:?} on {organization}");
                    for name in ["shop", "blog", "third"] {
                        let app = App {
                            name: name.parse().unwrap(),
                            organization: organization.clone(),
                            network: tern_catalog::NetworkId(1),
                            deleting: false,
                            created_at: jiff::Timestamp::UNIX_EPOCH,
                        };
                        let (more, less) = (one.on_app(&app), other.on_app(&app));
                        assert!(more >= less, "{one:?} covers {other:?} on {app:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn each_covers_itself_and_no_narrower_one_its_wider() {
        for (n, one) in principals().iter().enumerate() {
            let covered: Vec<usize> = (0..)
                .zip(&principals())
                .filter(|(_, other)| one.covers(other))
                .map(|(n, _)| n)
                .collect();
            let expected: &[usize] = match n {
                0 => &[0, 2, 3, 4, 5, 6, 7, 8, 9],
                1 => &[],
                2 => &[2, 4, 5, 6, 8, 9],
                3 => &[3, 7],
                4 => &[4],
                5 => &[5, 8],
                6 => &[5, 6, 8, 9],
                7 => &[7],
                8 => &[8],
                _ => &[9],
            };
            assert_eq!(covered, expected, "{one:?}");
        }
    }

    #[test]
    fn a_later_app_of_the_same_name_is_not_meant() {
        let mut app = App {
            name: "shop".parse().unwrap(),
            organization: "a".parse().unwrap(),
            network: tern_catalog::NetworkId(1),
            deleting: false,
            created_at: jiff::Timestamp::UNIX_EPOCH,
        };
        let deployer = &principals()[5];
        assert_eq!(deployer.on_app(&app), Some(AppRight::Deploy));
        app.created_at = jiff::Timestamp::from_second(1).unwrap();
        assert_eq!(deployer.on_app(&app), None);
    }

    #[test]
    fn a_record_that_makes_no_sense_speaks_for_nobody() {
        let token = Token {
            hash: "ab".into(),
            name: "x".into(),
            organization: None,
            scope: Scope::Read,
            created_at: jiff::Timestamp::UNIX_EPOCH,
            expires_at: None,
            parent: None,
            tail: String::new(),
        };
        assert_eq!(Principal::of(&token), None);
    }
}
