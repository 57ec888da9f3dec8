//! What a directory allows, kept by ourselves, so that it need not refuse. No I/O; the time is given.
//!
//! Counted in sliding windows. Let's Encrypt itself refills buckets over the same times: whoever stays within the
//! windows never finds a bucket empty. What a directory has refused until some time is kept here too.

use std::collections::HashMap;

use jiff::{SignedDuration, Timestamp};
use tern_catalog::{AcmeUsage, Hostname};

use crate::plan::LONGEST_HOLD;

/// The limits of a directory.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Orders of an account in [`ORDERS_IN`].
    pub orders: usize,
    /// Certificates for a registered domain in [`CERTIFICATES_IN`].
    pub certificates: usize,
    /// Certificates for exactly the same names in [`CERTIFICATES_IN`].
    pub duplicates: usize,
}

/// <https://letsencrypt.org/docs/rate-limits/>.
const LETS_ENCRYPT: Limits = Limits {
    orders: 300,
    certificates: 50,
    duplicates: 5,
};
const LETS_ENCRYPT_AT: &str = "https://acme-v02.api.letsencrypt.org/";
const ORDERS_IN: SignedDuration = SignedDuration::from_hours(3);
const CERTIFICATES_IN: SignedDuration = SignedDuration::from_hours(7 * 24);

impl Limits {
    /// Those that a directory publishes; none where it publishes none.
    pub fn of(directory: &str) -> Option<Self> {
        directory
            .starts_with(LETS_ENCRYPT_AT)
            .then_some(LETS_ENCRYPT)
    }
}

/// Why there is no order now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// Until when.
    pub until: Timestamp,
    /// For people.
    pub reason: String,
}

/// What one account has used.
#[derive(Debug)]
pub struct Budget {
    account: String,
    limits: Option<Limits>,
    of_account: Usage,
    of_domains: HashMap<String, Usage>,
}

#[derive(Debug, Default, Clone)]
struct Usage {
    /// Oldest first.
    used: Vec<(Timestamp, Hostname)>,
    not_before: Option<Timestamp>,
}

impl Budget {
    /// As the catalog remembers it.
    pub fn load(account: &str, limits: Option<Limits>, records: Vec<AcmeUsage>) -> Self {
        let mut budget = Self {
            account: account.to_owned(),
            limits,
            of_account: Usage::default(),
            of_domains: HashMap::new(),
        };
        for record in records {
            let usage = Usage {
                used: record.used,
                not_before: record.not_before,
            };
            match record.id.strip_prefix(account) {
                Some("") => budget.of_account = usage,
                Some(rest) => {
                    let domain = rest.trim_start_matches('/').to_owned();
                    budget.of_domains.insert(domain, usage);
                }
                None => {} // Another directory's.
            }
        }
        budget
    }

    /// Whether an order for this name may be made now.
    pub fn ask(&self, hostname: &Hostname, renews: bool, now: Timestamp) -> Result<(), Held> {
        let domain = registered_domain(hostname);
        let none = Usage::default();
        let of_domain = self.of_domains.get(domain).unwrap_or(&none);
        let mut held = Vec::new();
        let mut hold = |until: Option<Timestamp>, reason: String| {
            if let Some(until) = until.filter(|until| *until > now) {
                held.push(Held { until, reason });
            }
        };
        hold(
            self.of_account.not_before,
            "the directory takes no orders of this account".to_owned(),
        );
        hold(
            of_domain.not_before,
            format!("the directory takes no orders for {domain}"),
        );
        if let Some(limits) = self.limits {
            let Limits {
                orders,
                certificates,
                duplicates,
            } = limits;
            let every = |_: &Hostname| true;
            hold(
                self.of_account.free_at(orders, ORDERS_IN, every),
                format!(
                    "the account has made {orders} orders in 3 hours, as many as the directory allows"
                ),
            );
            // Renewals count, and are let through (Let's Encrypt's "renewal exemption"), but for duplicates.
            let of_certificates = of_domain.free_at(certificates, CERTIFICATES_IN, every);
            hold(
                of_certificates.filter(|_| !renews),
                format!(
                    "{domain} has had {certificates} certificates in a week, as many as the directory allows"
                ),
            );
            hold(
                of_domain.free_at(duplicates, CERTIFICATES_IN, |h| h == hostname),
                format!(
                    "{hostname} has had {duplicates} certificates in a week, as many as the directory allows"
                ),
            );
        }
        match held.into_iter().max_by_key(|held| held.until) {
            Some(longest) => Err(longest),
            None => Ok(()),
        }
    }

    /// An order is made. What is to be remembered of it.
    pub fn ordered(&mut self, hostname: &Hostname, now: Timestamp) -> Vec<AcmeUsage> {
        let Some(limits) = self.limits else {
            return Vec::new();
        };
        self.of_account
            .take(hostname, limits.orders, ORDERS_IN, now);
        let domain = registered_domain(hostname);
        let of_domain = self.of_domains.entry(domain.to_owned()).or_default();
        of_domain.take(hostname, limits.certificates, CERTIFICATES_IN, now);
        vec![self.record(None), self.record(Some(domain))]
    }

    /// The order made then came to nothing: it has cost no certificate.
    pub fn lost(&mut self, hostname: &Hostname, made: Timestamp) -> Vec<AcmeUsage> {
        let domain = registered_domain(hostname);
        let Some(usage) = self.of_domains.get_mut(domain) else {
            return Vec::new();
        };
        let before = usage.used.len();
        usage.used.retain(|(at, of)| (*at, of) != (made, hostname));
        if usage.used.len() == before {
            return Vec::new();
        }
        vec![self.record(Some(domain))]
    }

    /// The directory has refused an order until then: for the name's registered domain, as far as can be told. When it
    /// refuses a second domain meanwhile, or all (`whole`), it means the account.
    pub fn refused(
        &mut self,
        hostname: &Hostname,
        until: Timestamp,
        whole: bool,
        now: Timestamp,
    ) -> Vec<AcmeUsage> {
        let domain = registered_domain(hostname);
        let another = self
            .of_domains
            .iter()
            .any(|(other, usage)| other != domain && usage.not_before.is_some_and(|at| at > now));
        let mut changed = Vec::new();
        // A wrong clock, here or there, must not end all orders for ever.
        let until = until.min(now + LONGEST_HOLD);
        if whole || another {
            // Two names' own limits look the same: the account's others are not held for as long as they may be.
            let until = if whole {
                until
            } else {
                until.min(now + ORDERS_IN)
            };
            self.of_account.not_before = self.of_account.not_before.max(Some(until));
            changed.push(self.record(None));
        }
        if !whole {
            let usage = self.of_domains.entry(domain.to_owned()).or_default();
            usage.not_before = usage.not_before.max(Some(until));
            changed.push(self.record(Some(domain)));
        }
        changed
    }

    fn record(&self, domain: Option<&str>) -> AcmeUsage {
        let usage = match domain {
            Some(domain) => self.of_domains.get(domain).cloned().unwrap_or_default(),
            None => self.of_account.clone(),
        };
        AcmeUsage {
            id: match domain {
                Some(domain) => format!("{}/{domain}", self.account),
                None => self.account.clone(),
            },
            used: usage.used,
            not_before: usage.not_before,
        }
    }
}

impl Usage {
    /// When there is room for one more in the window; none while there is.
    fn free_at(
        &self,
        most: usize,
        window: SignedDuration,
        counts: impl Fn(&Hostname) -> bool,
    ) -> Option<Timestamp> {
        let mut times = self.used.iter().filter(|(_, of)| counts(of)).rev();
        let (oldest_that_counts, _) = times.nth(most.checked_sub(1)?)?;
        oldest_that_counts.checked_add(window).ok()
    }

    fn take(&mut self, hostname: &Hostname, most: usize, window: SignedDuration, now: Timestamp) {
        self.used
            .retain(|(at, _)| at.saturating_add(window).is_ok_and(|end| end > now));
        self.used.push((now, hostname.clone()));
        let beyond = self.used.len().saturating_sub(most);
        self.used.drain(..beyond);
    }
}

/// What directories count by: the name under its public suffix (<https://publicsuffix.org>). A public suffix itself,
/// or a name without one, counts for itself.
pub fn registered_domain(hostname: &Hostname) -> &str {
    psl::domain_str(hostname.as_str()).unwrap_or(hostname.as_str())
}

#[cfg(test)]
mod tests;
